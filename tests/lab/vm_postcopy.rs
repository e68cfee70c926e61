//! Postcopy migration of QEMU 10 into memory that is a file on tmpfs to it (`hugetlb2 open`).

use crate::support::{
    COLLAPSE, OPEN, Pool, SUBPAGE, await_shut, get, kill_worker, limits, poison, set,
};
use crate::vm::{Vm, free_port, pool, unmount};
use crate::vm_snapshots::MACHINE;
use rustix::io::Errno;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, channel};

pub const TESTS: &[(&str, fn())] = &[
    (
        "a_machine_moves_by_postcopy_into_memory_that_is_open",
        a_machine_moves_by_postcopy_into_memory_that_is_open,
    ),
    ("postcopy_goes_on_after_the_network_broke", postcopy_goes_on_after_the_network_broke),
];

/// A machine that has begun to move by postcopy, and its target.
struct Stage {
    pool: Pool,
    _work: tempfile::TempDir,
    vm: Vm,
    target: Vm,
    other: PathBuf,
}

impl Stage {
    /// The machine moves by way of the port that `way` returns for the target's.
    fn set(way: impl FnOnce(u16) -> u16) -> Self {
        let (pool, work) = (pool(2), tempfile::tempdir().unwrap());
        let other = pool.join("vm1");
        let memory = pool.join("vm0");
        let mut vm = Vm::start_as(MACHINE, crate::vm::DOCUMENTED, &memory, work.path(), &[]);
        vm.remembers();
        let port = free_port();
        let from = format!("tcp:127.0.0.1:{port}");
        let target = Vm::spawn_by_door(MACHINE, &other, work.path(), &["-incoming", &from]);
        for side in [&target, &vm] {
            side.tell("migrate_set_capability postcopy-ram on");
            side.tell("migrate_set_capability events on");
        }
        vm.tell("migrate_set_parameter max-bandwidth 8M"); // so that some memory is left for postcopy
        vm.tell("migrate_set_parameter max-postcopy-bandwidth 16M");
        vm.tell(&format!("migrate -d tcp:127.0.0.1:{}", way(port)));
        vm.tell("migrate_start_postcopy");
        vm.wait_until_migration_is("postcopy-active");
        Self { pool, _work: work, vm, target, other }
    }

    /// The machine has all its bytes at the target, and the file is as any other when QEMU ends.
    fn arrive(self) {
        let Self { pool, _work, vm, mut target, other } = self;
        vm.wait_until_gone();
        drop(vm);
        target.remembers();
        target.works();
        assert_eq!(get(&other, OPEN).unwrap(), "open\n");
        assert_eq!(pool.free_pages(), 0, "the pages are the files' all along");
        pool.check();
        target.boot.shut_down();
        await_shut(&other);
        set(&other, COLLAPSE, "all").unwrap();
        poison(&other, 0, SUBPAGE).unwrap();
        unmount(pool);
    }
}

/// QEMU 10 asks statfs(2) for tmpfs. A death of the worker changes nothing.
fn a_machine_moves_by_postcopy_into_memory_that_is_open() {
    let mut stage = Stage::set(|port| port);
    kill_worker(&stage.pool);
    assert_eq!(poison(&stage.other, 0, SUBPAGE), Err(Errno::BUSY));
    stage.pool.check();
    stage.vm.wait_until_migration_is("postcopy-active");
    stage.target.remembers();
    stage.arrive();
}

/// A way through the network, which can break.
struct Wire {
    port: u16,
    ends: Receiver<TcpStream>,
}

impl Wire {
    /// A way to a port of this machine, for one connection.
    fn to(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let own = listener.local_addr().unwrap().port();
        let (sender, ends) = channel();
        std::thread::spawn(move || {
            let (one, _) = listener.accept().unwrap();
            let other = TcpStream::connect(("127.0.0.1", port)).unwrap();
            for (from, to) in [(&one, &other), (&other, &one)] {
                let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                std::thread::spawn(move || {
                    let _ = io::copy(&mut from, &mut to); // until the wire breaks
                    let _ = to.shutdown(Shutdown::Both);
                });
            }
            [one, other].into_iter().for_each(|end| drop(sender.send(end)));
        });
        Self { port: own, ends }
    }

    fn break_now(self) {
        self.ends.iter().for_each(|end| end.shutdown(Shutdown::Both).unwrap());
    }
}

/// QEMU's monitor for programs, in the mode in which QEMU answers although its machine waits for
/// memory with QEMU's lock (docs/interop/qmp-spec.rst of QEMU, out-of-band execution).
struct Aside(BufReader<UnixStream>);

impl Aside {
    fn of(vm: &Vm) -> Self {
        let mut monitor = Self(BufReader::new(UnixStream::connect(vm.qmp()).unwrap()));
        monitor.0.get_ref().set_read_timeout(Some(limits::ANSWER)).unwrap();
        monitor.await_line("QMP");
        monitor.tell(r#"{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}"#);
        monitor
    }

    fn await_line(&mut self, words: &str) {
        let mut line = String::new();
        while !line.contains(words) {
            line.clear();
            assert!(self.0.read_line(&mut line).unwrap() > 0, "QEMU has ended");
            assert!(!line.contains(r#""error""#), "{line}");
        }
    }

    fn tell(&mut self, command: &str) {
        writeln!(self.0.get_mut(), "{command}").unwrap();
        self.await_line(r#""return""#);
    }
}

/// The network breaks in the middle of the postcopy, and the worker dies meanwhile.
fn postcopy_goes_on_after_the_network_broke() {
    let mut wire = None;
    let stage = Stage::set(|port| wire.insert(Wire::to(port)).port);
    let mut target = Aside::of(&stage.target);
    wire.expect("it was asked for").break_now();
    stage.vm.wait_until_migration_is("postcopy-paused");
    target.await_line("postcopy-paused");
    kill_worker(&stage.pool);
    assert_eq!(get(&stage.other, OPEN).unwrap(), "open\n");
    let port = free_port();
    target.tell(&format!(
        r#"{{"exec-oob": "migrate-recover", "arguments": {{"uri": "tcp:127.0.0.1:{port}"}}}}"#
    ));
    stage.vm.tell(&format!("migrate -d -r tcp:127.0.0.1:{}", Wire::to(port).port));
    stage.arrive();
}
