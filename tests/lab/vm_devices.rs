//! Devices in a process of their own (vhost-user). QEMU passes its descriptor of the machine's
//! memory on, so the device reads and writes a file of ours itself.

use crate::boot::Verdict;
use crate::cases::{DISK_SUBPAGES, FIRST_PATTERN};
use crate::pattern;
use crate::support::{FOLIO, POISON, REPAIR, SUBPAGE, end, get, huge_bytes, limits, poison, set};
use crate::vm::{DOCUMENTED, MACHINE, MEBIBYTES, SIGBUS, Vm, pool, unmount};
use rustix::process::{Pid, Signal, kill_process};
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

pub const TESTS: &[(&str, fn())] = &[
    (
        "a_device_of_another_process_has_errors_for_lost_memory",
        a_device_of_another_process_has_errors_for_lost_memory,
    ),
    (
        "a_device_that_looks_at_lost_memory_is_ended_by_sigbus",
        a_device_that_looks_at_lost_memory_is_ended_by_sigbus,
    ),
];

/// The machine runs these cases to have its disk write and read memory.
const WRITE: &str = "a_disk_takes_the_bytes_of_memory";
const READ: &str = "a_disk_gives_memory_its_bytes";

/// A disk that qemu-storage-daemon(1) serves.
struct Disk {
    daemon: Child,
    /// The bytes of the disk.
    file: PathBuf,
    socket: PathBuf,
}

impl Disk {
    /// Starts a disk whose file has these options. The socket is the daemon's standard input, and
    /// listens before the daemon runs.
    fn start(work: &Path, options: &str) -> Self {
        let (file, socket) = (work.join("disk"), work.join("disk.socket"));
        fs::write(&file, vec![0; (DISK_SUBPAGES * SUBPAGE) as usize]).unwrap();
        let listener = UnixListener::bind(&socket).unwrap();
        let mut daemon = Command::new("qemu-storage-daemon");
        let node = format!("driver=file,node-name=disk{options},filename={}", file.display());
        daemon.args(["--blockdev", &node, "--export"]);
        daemon.arg("vhost-user-blk,id=disk,node-name=disk,writable=on,addr.type=fd,addr.str=0");
        let daemon = daemon.stdin(Stdio::from(OwnedFd::from(listener))).spawn();
        let daemon = daemon.expect("qemu-storage-daemon (Debian's qemu-system-common)");
        Self { daemon, file, socket }
    }

    /// Starts a machine with the disk, to which the machine has written the first pattern.
    fn machine(&self, memory: &Path, work: &Path) -> Vm {
        let socket = format!("socket,id=disk,path={}", self.socket.display());
        let device = "vhost-user-blk-pci,chardev=disk,num-queues=1";
        let more = ["-chardev", &socket, "-device", device];
        let mut vm = Vm::start_as(MACHINE, DOCUMENTED, memory, work, &more);
        vm.remembers();
        assert_eq!(vm.does(WRITE), "");
        assert_eq!(self.patterns(), vec![Some(FIRST_PATTERN); DISK_SUBPAGES as usize]);
        vm
    }

    /// Writes the pattern of `number` to the disk.
    fn fill(&self, number: u64) {
        let file = File::options().write(true).open(&self.file).unwrap();
        for page in 0..DISK_SUBPAGES {
            file.write_all_at(&pattern::of(number, page), page * SUBPAGE).unwrap();
        }
    }

    /// The pattern of each subpage.
    fn patterns(&self) -> Vec<Option<u64>> {
        let file = File::open(&self.file).unwrap();
        (0..DISK_SUBPAGES).map(|page| pattern_at(&file, page * SUBPAGE, page)).collect()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        end(&mut self.daemon, "qemu-storage-daemon");
    }
}

/// The number of the pattern that the subpage at `offset` has, which is to be subpage `page` of it.
/// None if the subpage has other bytes or cannot be read.
fn pattern_at(file: &File, offset: u64, page: u64) -> Option<u64> {
    let mut bytes = [0; SUBPAGE as usize];
    file.read_exact_at(&mut bytes, offset).ok()?;
    (FIRST_PATTERN..FIRST_PATTERN + 3).find(|number| bytes == pattern::of(*number, page))
}

/// The places in the machine's memory of the subpages that the disk is to use.
fn places(vm: &Vm) -> Vec<u64> {
    let file = File::open(&vm.memory).unwrap();
    let patterns: Vec<_> =
        (0..DISK_SUBPAGES).map(|page| pattern::of(FIRST_PATTERN, page)).collect();
    let mut found = vec![Vec::new(); patterns.len()];
    let mut folio = vec![0; FOLIO as usize];
    for start in (0..MEBIBYTES << 20).step_by(FOLIO as usize) {
        file.read_exact_at(&mut folio, start).unwrap();
        for (at, bytes) in (start..).step_by(SUBPAGE as usize).zip(folio.chunks(SUBPAGE as usize)) {
            if let Some(page) = patterns.iter().position(|pattern| pattern == bytes) {
                found[page].push(at);
            }
        }
    }
    let one = |places: Vec<u64>| match places[..] {
        [place] => place,
        _ => panic!("one subpage has each pattern, and not {places:x?}"),
    };
    found.into_iter().map(one).collect()
}

/// Each subpage has the pattern `all`, but for one.
fn all_but(lost: usize, all: u64, one: Option<u64>) -> Vec<Option<u64>> {
    let mut patterns = vec![Some(all); DISK_SUBPAGES as usize];
    patterns[lost] = one;
    patterns
}

/// No processor of the machine touches the lost subpage, so QEMU lives: the guest's kernel only
/// tells the device its place.
fn a_device_of_another_process_has_errors_for_lost_memory() {
    const LOST: usize = 20;
    let [first, second, third] = [0, 1, 2].map(|more| FIRST_PATTERN + more);
    let (pool, work) = (pool(1), tempfile::tempdir().unwrap());
    let mut disk = Disk::start(work.path(), "");
    let mut vm = disk.machine(&pool.join("vm0"), work.path());
    let (mapped, huge) = huge_bytes(disk.daemon.id(), &vm.memory);
    assert_eq!((mapped, huge > 0), (MEBIBYTES << 20, true), "{huge} bytes are mapped huge");
    let places = places(&vm);
    let memory = File::open(&vm.memory).unwrap();
    let of_memory = || -> Vec<_> {
        (0..).zip(&places).map(|(page, place)| pattern_at(&memory, *place, page)).collect()
    };
    poison(&vm.memory, places[LOST], SUBPAGE).unwrap();
    let error = format!("subpage {LOST}: Input/output error (os error 5)\n");
    // The device reads memory.
    disk.fill(second);
    assert_eq!(vm.does(WRITE), error);
    assert_eq!(disk.patterns(), all_but(LOST, first, Some(second)), "written, or as before");
    // The device writes memory.
    disk.fill(third);
    assert_eq!(vm.does(READ), error);
    assert_eq!(of_memory(), all_but(LOST, third, None));
    assert_eq!(get(&vm.memory, POISON).unwrap().lines().count(), 1, "as before");
    vm.remembers();
    set(&vm.memory, REPAIR, "salvage all").unwrap();
    assert_eq!(of_memory(), all_but(LOST, third, Some(first)), "its bytes");
    assert_eq!(vm.does(READ), "");
    assert_eq!(of_memory(), vec![Some(third); DISK_SUBPAGES as usize]);
    assert_eq!(vm.does(WRITE), "");
    assert_eq!(disk.patterns(), vec![Some(third); DISK_SUBPAGES as usize]);
    assert_eq!(disk.daemon.try_wait().unwrap(), None, "the device has lived all along");
    vm.works();
    drop(memory);
    vm.boot.shut_down();
    drop(disk);
    unmount(pool);
}

/// The daemon itself looks for zeros in the memory, so that it need not write them.
fn a_device_that_looks_at_lost_memory_is_ended_by_sigbus() {
    const LOST: usize = 20;
    let (pool, work) = (pool(1), tempfile::tempdir().unwrap());
    let mut disk = Disk::start(work.path(), ",detect-zeroes=on");
    let mut vm = disk.machine(&pool.join("vm0"), work.path());
    let place = places(&vm)[LOST];
    poison(&vm.memory, place, SUBPAGE).unwrap();
    let second = FIRST_PATTERN + 1;
    disk.fill(second);
    let qemu = Pid::from_raw(vm.boot.pid().cast_signed()).unwrap();
    let end = std::thread::scope(|scope| {
        let request = scope.spawn(|| vm.boot.run(WRITE).verdict);
        let end = limits::exit(limits::ANSWER, "qemu-storage-daemon", &mut disk.daemon);
        kill_process(qemu, Signal::KILL).unwrap();
        assert!(matches!(request.join().unwrap(), Verdict::Ended));
        end
    });
    assert_eq!(end.signal(), Some(SIGBUS));
    let written = |page| if page < LOST { FIRST_PATTERN } else { second };
    let patterns: Vec<_> = (0..DISK_SUBPAGES as usize).map(|page| Some(written(page))).collect();
    assert_eq!(disk.patterns(), patterns, "the lost subpage and all behind it are as before");
    let memory = vm.memory.clone();
    drop(vm);
    set(&memory, REPAIR, "salvage all").unwrap();
    assert_eq!(pattern_at(&File::open(&memory).unwrap(), place, LOST as u64), Some(FIRST_PATTERN));
    unmount(pool);
}
