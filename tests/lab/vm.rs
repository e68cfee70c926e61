//! Virtual machines with a file of ours for a memory:
//! `-object memory-backend-file,mem-path=FILE,share=on,prealloc=on,align=2M`.

use crate::boot::{Boot, Report, Verdict};
use crate::cases::Machine;
use crate::support::{
    COLLAPSE, FOLIO, MAP, Pool, REPAIR, SUBPAGE, get, huge_bytes, limits, poison, set,
};
use rustix::process::{Pid, Signal, kill_process};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub const TESTS: &[(&str, fn())] = &[
    (
        "a_virtual_machine_goes_on_beside_quarantine_and_repair",
        a_virtual_machine_goes_on_beside_quarantine_and_repair,
    ),
    (
        "a_virtual_machine_is_ended_by_a_quarantine_of_what_it_uses",
        a_virtual_machine_is_ended_by_a_quarantine_of_what_it_uses,
    ),
    (
        "a_virtual_machine_goes_on_from_a_copy_of_its_memory",
        a_virtual_machine_goes_on_from_a_copy_of_its_memory,
    ),
    ("a_virtual_machine_moves_to_another_process", a_virtual_machine_moves_to_another_process),
    ("a_machine_that_cannot_move_by_postcopy_stays", a_machine_that_cannot_move_by_postcopy_stays),
    (
        "a_machine_moves_by_postcopy_with_punched_pages_kept",
        a_machine_moves_by_postcopy_with_punched_pages_kept,
    ),
];

const MEBIBYTES: u64 = 512;
const MACHINE: Machine = Machine { memory: MEBIBYTES, ..Machine::SMALL };
/// The machine runs this case to show that it works. Among other things, it makes a memory error of
/// its own.
const WORK: &str = "this_kernel_has_real_memory_errors";

/// The machine runs this case to show that its memory is unchanged. The first run leaves bytes in
/// memory.
const REMEMBER: &str = "memory_holds_what_was_left_in_it";

const SIGBUS: i32 = 7;

/// A machine, and QEMU's monitor.
struct Vm {
    boot: Boot,
    monitor: PathBuf,
    memory: PathBuf,
}

impl Vm {
    /// Starts a machine on the file `memory`, and makes the file if there is none.
    fn spawn(memory: &Path, work: &Path, incoming: Option<&str>) -> Self {
        let monitor = work.join(memory.file_name().expect("a file"));
        let backend = format!(
            "memory-backend-file,id=ram,mem-path={},size={MEBIBYTES}M,share=on,prealloc=on,align=2M",
            memory.display()
        );
        let mut more: Vec<String> =
            ["-object", &backend, "-machine", "memory-backend=ram", "-monitor"]
                .map(str::to_owned)
                .to_vec();
        more.push(format!("unix:{},server=on,wait=off", monitor.display()));
        more.extend(incoming.iter().flat_map(|from| ["-incoming".to_owned(), (*from).to_owned()]));
        let boot = Boot::spawn(MACHINE, &more).unwrap();
        Self { boot, monitor, memory: memory.to_owned() }
    }

    fn start(memory: &Path, work: &Path) -> Self {
        let vm = Self::spawn(memory, work, None);
        vm.boot.wait_until_ready().unwrap();
        vm
    }

    /// Asserts that the machine works.
    fn works(&mut self) {
        self.does(WORK);
    }

    /// Asserts that the machine's memory holds the bytes of the first run.
    fn remembers(&mut self) {
        self.does(REMEMBER);
    }

    fn does(&mut self, what: &str) {
        let report = self.boot.run(what);
        assert!(matches!(report.verdict, Verdict::Passed), "{}", describe(&report));
    }

    /// Gives QEMU's monitor a command, and returns the answer.
    fn tell(&self, command: &str) -> String {
        let mut connected = None;
        limits::until(limits::ANSWER, "QEMU's monitor, which it makes as it starts", || {
            connected = UnixStream::connect(&self.monitor).ok();
            connected.is_some()
        });
        let mut monitor = connected.expect("it listens");
        monitor.set_read_timeout(Some(limits::ANSWER)).expect("a limit for each answer");
        read_to_prompt(&mut monitor);
        writeln!(monitor, "{command}").unwrap();
        let answer = read_to_prompt(&mut monitor);
        assert!(!answer.contains("Error:"), "{command}: {answer}");
        answer
    }

    /// Waits until the machine has moved to its target.
    fn wait_until_gone(&self) -> String {
        self.wait_until_migration_is("completed")
    }

    fn wait_until_migration_is(&self, stage: &str) -> String {
        let patience = Instant::now() + Duration::from_secs(120);
        loop {
            let status = self.tell("info migrate");
            if status.contains(&format!("Migration status: {stage}")) {
                return status;
            }
            assert!(!status.contains("Migration status: failed"), "{status}");
            assert!(Instant::now() < patience, "{status}");
            std::thread::sleep(Duration::from_millis(50)); // QEMU does not announce it
        }
    }

    /// Waits until this target has received the machine, which is paused as at its source.
    fn wait_until_there(&self) {
        let patience = Instant::now() + Duration::from_secs(120);
        while self.tell("info status").contains("inmigrate") {
            assert!(Instant::now() < patience, "nothing has come");
            std::thread::sleep(Duration::from_millis(50)); // QEMU does not announce it
        }
    }

    /// Finds a subpage in the middle of memory that the machine has not written to.
    fn unused(&self) -> u64 {
        let memory = File::open(&self.memory).unwrap();
        let mut folio = vec![0; FOLIO as usize];
        let is_unused = |number: &u64| {
            memory.read_exact_at(&mut folio, number * FOLIO).unwrap();
            folio.iter().all(|byte| *byte == 0)
        };
        let found = (0..(MEBIBYTES << 20) / FOLIO).rev().find({
            let mut is_unused = is_unused;
            move |number| is_unused(number)
        });
        found.expect("some memory is unused") * FOLIO + 77 * SUBPAGE
    }
}

fn read_to_prompt(monitor: &mut UnixStream) -> String {
    let mut said = Vec::new();
    let mut byte = [0];
    while !said.ends_with(b"(qemu) ") {
        assert_eq!(monitor.read(&mut byte).unwrap(), 1, "QEMU has ended");
        said.push(byte[0]);
    }
    String::from_utf8_lossy(&said).into_owned()
}

fn describe(report: &Report) -> String {
    match &report.verdict {
        Verdict::Passed => "passed".into(),
        Verdict::Failed(why) | Verdict::Skipped(why) => why.clone(),
        Verdict::Ended => "the machine has ended".into(),
        Verdict::Hung => "the machine hangs".into(),
    }
}

fn pool(machines: u64) -> Pool {
    Pool::mount(&format!("pagesize=2M,size={}M", machines * MEBIBYTES))
}

fn a_virtual_machine_goes_on_beside_quarantine_and_repair() {
    let (pool, work) = (pool(1), tempfile::tempdir().unwrap());
    let memory = pool.join("vm0");
    let mut vm = Vm::start(&memory, work.path());
    assert_eq!(
        huge_bytes(vm.boot.pid(), &memory),
        (MEBIBYTES << 20, MEBIBYTES << 20),
        "all is huge"
    );
    vm.works();
    let place = vm.unused();
    poison(&memory, place, SUBPAGE).unwrap();
    vm.works();
    set(&memory, REPAIR, "salvage all").unwrap();
    vm.works();
    pool.check();
    vm.boot.shut_down();
    fs::remove_file(memory).unwrap();
    pool.unmount();
}

/// Without KVM, QEMU 7.2 has no handler for SIGBUS, so the signal ends it. (With KVM, QEMU tells
/// the guest of BUS_MCEERR_AR.)
fn a_virtual_machine_is_ended_by_a_quarantine_of_what_it_uses() {
    let (pool, work) = (pool(1), tempfile::tempdir().unwrap());
    let memory = pool.join("vm0");
    let mut vm = Vm::start(&memory, work.path());
    vm.works();
    vm.tell("stop");
    // Quarantines used subpages in the first 64 MiB, where the kernel is.
    let file = File::open(&memory).unwrap();
    let mut subpage = vec![0; SUBPAGE as usize];
    for place in ((16 << 20)..(64 << 20)).step_by(64 * SUBPAGE as usize) {
        file.read_exact_at(&mut subpage, place).unwrap();
        if subpage.iter().any(|byte| *byte != 0) {
            poison(&memory, place, SUBPAGE).unwrap();
        }
    }
    vm.tell("cont");
    let report = vm.boot.run(WORK);
    assert!(matches!(report.verdict, Verdict::Ended), "{}", describe(&report));
    assert_eq!(vm.boot.wait_for_end().signal(), Some(SIGBUS));
    // The bytes that the machine had in memory are not lost.
    set(&memory, REPAIR, "salvage all").unwrap();
    pool.check();
    drop((vm, file));
    fs::remove_file(memory).unwrap();
    pool.unmount();
}

/// With the capability x-ignore-shared, QEMU writes all but the memory to a stream; the memory is
/// the file.
fn a_virtual_machine_goes_on_from_a_copy_of_its_memory() {
    let (pool, work) = (pool(2), tempfile::tempdir().unwrap());
    let (memory, copy, state) = (pool.join("vm0"), pool.join("vm1"), work.path().join("state"));
    let mut vm = Vm::start(&memory, work.path());
    vm.works();
    vm.tell("stop");
    vm.tell("migrate_set_capability x-ignore-shared on");
    vm.tell(&format!("migrate -d \"exec:cat > {}\"", state.display()));
    vm.wait_until_gone();
    crate::support::run(
        std::process::Command::new("cp").arg("--sparse=never").arg(&memory).arg(&copy),
    );
    drop(vm);
    let mut restored = Vm::spawn(&copy, work.path(), Some("defer"));
    restored.tell("migrate_set_capability x-ignore-shared on");
    restored.tell(&format!("migrate_incoming \"exec:cat {}\"", state.display()));
    restored.wait_until_there();
    restored.tell("cont");
    restored.works();
    pool.check();
    restored.boot.shut_down();
    fs::remove_file(memory).unwrap();
    fs::remove_file(copy).unwrap();
    pool.unmount();
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn a_virtual_machine_moves_to_another_process() {
    let (pool, work) = (pool(2), tempfile::tempdir().unwrap());
    let (memory, other) = (pool.join("vm0"), pool.join("vm1"));
    let mut vm = Vm::start(&memory, work.path());
    vm.works();
    let to = format!("tcp:127.0.0.1:{}", free_port());
    let mut target = Vm::spawn(&other, work.path(), Some(&to));
    target.tell("info status");
    vm.tell("migrate_set_parameter max-bandwidth 1G");
    vm.tell(&format!("migrate -d {to}"));
    let status = vm.wait_until_gone();
    drop(vm);
    target.works();
    println!(
        "migration  {}",
        status.lines().filter(|line| line.contains("transferred ram")).collect::<String>()
    );
    pool.check();
    target.boot.shut_down();
    fs::remove_file(memory).unwrap();
    fs::remove_file(other).unwrap();
    pool.unmount();
}

/// For postcopy (userfaultfd), QEMU punches all of the target's memory, so that faults fill it. By
/// default, punched pages go back to the pool, and a fault cannot ask the pool for a page. So
/// SIGBUS ends the target before the source has left.
fn a_machine_that_cannot_move_by_postcopy_stays() {
    let (pool, work) = (pool(2), tempfile::tempdir().unwrap());
    let (memory, other) = (pool.join("vm0"), pool.join("vm1"));
    let mut vm = Vm::start(&memory, work.path());
    let to = format!("tcp:127.0.0.1:{}", free_port());
    let mut target = Vm::spawn(&other, work.path(), Some(&to));
    target.tell("migrate_set_capability postcopy-ram on");
    vm.tell("migrate_set_capability postcopy-ram on");
    vm.tell(&format!("migrate -d {to}"));
    assert_eq!(target.boot.wait_for_end().signal(), Some(SIGBUS));
    vm.works();
    pool.check();
    vm.boot.shut_down();
    drop(target);
    fs::remove_file(memory).unwrap();
    fs::remove_file(other).unwrap();
    pool.unmount();
}

/// The machine runs at the target. The target fetches each page from the source when the machine
/// touches it. Reads of the memory and a death of the worker change nothing about that.
fn a_machine_moves_by_postcopy_with_punched_pages_kept() {
    let work = tempfile::tempdir().unwrap();
    let pool = Pool::mount(&format!("pagesize=2M,size={}M,punch=keep", 2 * MEBIBYTES));
    let (memory, other) = (pool.join("vm0"), pool.join("vm1"));
    let mut vm = Vm::start(&memory, work.path());
    vm.remembers();
    let to = format!("tcp:127.0.0.1:{}", free_port());
    let mut target = Vm::spawn(&other, work.path(), Some(&to));
    target.tell("migrate_set_capability postcopy-ram on");
    vm.tell("migrate_set_capability postcopy-ram on");
    vm.tell("migrate_set_parameter max-bandwidth 8M"); // so that some memory is left for postcopy
    vm.tell("migrate_set_parameter max-postcopy-bandwidth 16M");
    vm.tell(&format!("migrate -d {to}"));
    vm.tell("migrate_start_postcopy");
    vm.wait_until_migration_is("postcopy-active");
    let worker = Pid::from_raw(pool.counter("worker_pid") as i32).unwrap();
    assert!(get(&other, MAP).unwrap().contains(" punched -"), "nothing is missing any more");
    kill_process(worker, Signal::KILL).unwrap();
    pool.check();
    set(&other, COLLAPSE, "all").unwrap();
    vm.wait_until_migration_is("postcopy-active");
    target.remembers();
    let status = vm.wait_until_gone();
    drop(vm);
    target.remembers();
    let requests = status.lines().find(|line| line.contains("postcopy request count"));
    println!("postcopy   {}", requests.expect("QEMU counts them"));
    assert_eq!(pool.free_pages(), 0, "the pages are the files' all along");
    pool.check();
    set(&other, COLLAPSE, "all").unwrap();
    let map = get(&other, MAP).unwrap();
    assert!(map.lines().all(|line| line.contains(" huge ")), "{map}");
    target.works();
    target.boot.shut_down();
    fs::remove_file(memory).unwrap();
    fs::remove_file(other).unwrap();
    pool.unmount();
}
