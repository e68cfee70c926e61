//! Features of QEMU that read, copy or punch the memory of a virtual machine, beside quarantines in
//! the file that is the memory.
//!
//! A kernel that clears the memory that it takes, as Debian's does by default, touches memory
//! before a device punches it. The kernel of [`UNCLEARED`] does not.

use crate::cases::Machine;
use crate::support::{
    FOLIO, POISON, Pool, REPAIR, SUBPAGE, await_text, get, huge_bytes, limits, poison, run, set,
};
use crate::vm::{DOCUMENTED, MACHINE, MEBIBYTES, Vm, pool, unmount};
use rustix::fs::{FallocateFlags, fallocate};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

pub const TESTS: &[(&str, fn())] = &[
    ("a_private_mapping_is_a_copy_beside_the_file", a_private_mapping_is_a_copy_beside_the_file),
    (
        "a_private_mapping_has_no_zeros_in_place_of_lost_memory",
        a_private_mapping_has_no_zeros_in_place_of_lost_memory,
    ),
    (
        "a_balloon_punches_quarantined_memory_as_any_other",
        a_balloon_punches_quarantined_memory_as_any_other,
    ),
    (
        "a_balloon_of_a_guest_that_clears_memory_touches_it",
        a_balloon_of_a_guest_that_clears_memory_touches_it,
    ),
    (
        "memory_that_a_guest_reports_free_is_punched_and_kept",
        memory_that_a_guest_reports_free_is_punched_and_kept,
    ),
    (
        "memory_that_a_guest_reports_free_is_gone_by_default",
        memory_that_a_guest_reports_free_is_gone_by_default,
    ),
    (
        "virtio_mem_takes_memory_that_is_allocated_before",
        virtio_mem_takes_memory_that_is_allocated_before,
    ),
    (
        "virtio_mem_hands_out_memory_that_is_not_there",
        virtio_mem_hands_out_memory_that_is_not_there,
    ),
    (
        "virtio_mem_takes_and_gives_with_punched_pages_kept",
        virtio_mem_takes_and_gives_with_punched_pages_kept,
    ),
    ("a_snapshot_holds_all_memory_or_is_not_made", a_snapshot_holds_all_memory_or_is_not_made),
    (
        "a_dump_holds_all_memory_or_ends_at_a_quarantine",
        a_dump_holds_all_memory_or_ends_at_a_quarantine,
    ),
    (
        "a_machine_is_saved_by_migration_to_a_file_once_it_is_whole",
        a_machine_is_saved_by_migration_to_a_file_once_it_is_whole,
    ),
];

/// A machine whose kernel does not touch memory that a device is to punch.
const UNCLEARED: Machine = Machine { command_line: "init_on_alloc=0", ..MACHINE };

/// The machine runs this case to have its drivers of virtio-balloon and virtio-mem.
const DRIVERS: &str = "drivers_of_memory_devices_can_be_loaded";

/// The machine runs this case to use all memory that it has.
const FILL: &str = "all_free_memory_holds_what_is_stored_in_it";

/// A pool for a machine and further memory, with these further options.
fn pool_with(mebibytes: u64, options: &str) -> Pool {
    Pool::mount(&format!("pagesize=2M,size={}M{options}", MEBIBYTES + mebibytes))
}

/// The number of quarantined ranges of a file.
fn quarantines(file: &Path) -> usize {
    get(file, POISON).map_or(0, |list| list.lines().count()) // ENODATA: none
}

/// Quarantines a subpage of each folio from `offsets`, while the machine stands still.
fn quarantine(vm: &Vm, offsets: impl Iterator<Item = u64>) {
    vm.tell("stop");
    vm.tell("info status"); // QEMU takes this command when the machine has stopped
    for offset in offsets {
        poison(&vm.memory, offset, SUBPAGE).unwrap();
    }
    vm.tell("cont");
}

/// Quarantines a subpage that the machine does not use.
fn quarantine_unused(vm: &Vm) {
    let place = vm.unused();
    quarantine(vm, [place].into_iter());
}

// ---- options of the memory ----------------------------------------------------------------------

/// The bytes that a process has of its own in its mappings of a file (proc(5), /proc/PID/smaps).
fn own_bytes(pid: u32, file: &Path) -> u64 {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).expect("the process runs");
    let path = format!(" {}", file.display());
    let (mut own, mut is_of_file) = (0, false);
    for line in smaps.lines() {
        let (name, value) = line.split_once(' ').expect("two words");
        match name {
            "Anonymous:" if is_of_file => {
                own += value.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10;
            }
            _ if name.ends_with(':') => (),
            _ => is_of_file = line.ends_with(&path), // the heading of a mapping
        }
    }
    own
}

/// A subpage of each folio of a machine's memory.
fn of_each_folio() -> impl Iterator<Item = u64> {
    (0..(MEBIBYTES << 20) / FOLIO).map(|folio| folio * FOLIO + 5 * SUBPAGE)
}

fn a_private_mapping_is_a_copy_beside_the_file() {
    const PRIVATE: &str = "share=off,prealloc=on,prealloc-threads=2,align=2M";
    let (pool, work) = (pool(1), tempfile::tempdir().unwrap());
    let memory = pool.join("vm0");
    let mut vm = Vm::start_as(MACHINE, PRIVATE, &memory, work.path(), &[]);
    vm.remembers();
    let all = MEBIBYTES << 20;
    assert_eq!(own_bytes(vm.boot.pid(), &memory), all, "a copy of each subpage");
    assert_eq!(huge_bytes(vm.boot.pid(), &memory), (all, 0), "in small pages");
    assert_eq!(pool.free_pages(), 0, "and the file has its memory, too");
    assert_eq!(vm.unused_folios().count() as u64, all / FOLIO, "the file has no byte of it");
    quarantine(&vm, of_each_folio());
    vm.remembers();
    vm.does(FILL);
    vm.works();
    drop(vm);
    set(&memory, REPAIR, "zero all").unwrap();
    unmount(pool);
}

/// Without `prealloc=on`, the memory that the machine has not written to is the file's.
fn a_private_mapping_has_no_zeros_in_place_of_lost_memory() {
    const PRIVATE: &str = "share=off,reserve=off,align=2M";
    let (pool, work) = (pool(1), tempfile::tempdir().unwrap());
    let memory = pool.join("vm0");
    let mut vm = Vm::start_as(MACHINE, PRIVATE, &memory, work.path(), &[]);
    vm.remembers();
    let own = own_bytes(vm.boot.pid(), &memory);
    assert!(own < MEBIBYTES << 19, "{own} bytes are copied, more than half");
    quarantine(&vm, of_each_folio());
    vm.is_ended_by_sigbus_in(FILL);
    drop(vm);
    set(&memory, REPAIR, "zero all").unwrap();
    unmount(pool);
}

// ---- devices that punch memory ------------------------------------------------------------------

const BALLOON: [&str; 2] = ["-device", "virtio-balloon-pci"];
const REPORTING: [&str; 2] = ["-device", "virtio-balloon-pci,free-page-reporting=on"];

/// Starts a machine with a device. The machine remembers bytes.
fn start_with(device: &[&str], kind: Machine, pool: &Pool, work: &Path) -> Vm {
    let mut vm = Vm::start_as(kind, DOCUMENTED, &pool.join("vm0"), work, device);
    vm.remembers();
    vm
}

fn balloon(vm: &Vm, mebibytes: u64) {
    vm.tell(&format!("balloon {mebibytes}"));
    let there = format!("actual={mebibytes}\r");
    limits::until(limits::ANSWER, "the guest to change its balloon", || {
        vm.tell("info balloon").contains(&there)
    });
}

/// QEMU punches each 4 KiB of a balloon by itself. So the pages stay the file's, with zeros.
fn a_balloon_punches_quarantined_memory_as_any_other() {
    for mode in ["", ",punch=keep"] {
        let (pool, work) = (pool_with(0, mode), tempfile::tempdir().unwrap());
        let mut vm = start_with(&BALLOON, UNCLEARED, &pool, work.path());
        vm.does(DRIVERS);
        let folios: Vec<u64> = vm.unused_folios().step_by(4).collect();
        quarantine(&vm, folios.iter().map(|folio| folio + 77 * SUBPAGE));
        let before = quarantines(&vm.memory);
        balloon(&vm, 192);
        let left = quarantines(&vm.memory);
        println!("balloon{mode}  {left} of {before} quarantines are left");
        assert!(left < before, "all {before} quarantines are left");
        assert_eq!(
            (pool.free_pages(), pool.counter("punched_bytes")),
            (0, 0),
            "no page is punched"
        );
        if left > 0 {
            set(&vm.memory, REPAIR, "salvage all").unwrap();
        }
        balloon(&vm, MEBIBYTES);
        vm.remembers();
        vm.does(FILL);
        vm.boot.shut_down();
        unmount(pool);
    }
}

fn a_balloon_of_a_guest_that_clears_memory_touches_it() {
    let (pool, work) = (pool(1), tempfile::tempdir().unwrap());
    let mut vm = start_with(&BALLOON, MACHINE, &pool, work.path());
    vm.does(DRIVERS);
    let folios: Vec<u64> = vm.unused_folios().step_by(4).collect();
    quarantine(&vm, folios.iter().map(|folio| folio + 77 * SUBPAGE));
    vm.tell("balloon 192");
    vm.is_ended_by_sigbus();
    set(&vm.memory, REPAIR, "salvage all").unwrap();
    drop(vm);
    unmount(pool);
}

/// Waits until the guest has reported the folio of the one quarantine as free. A kernel reports
/// some memory after two seconds, and then more every two seconds.
fn report(vm: &mut Vm) {
    quarantine_unused(vm);
    assert_eq!(quarantines(&vm.memory), 1);
    vm.does(DRIVERS);
    limits::until(limits::ANSWER, "the guest to report memory", || quarantines(&vm.memory) == 0);
}

fn memory_that_a_guest_reports_free_is_punched_and_kept() {
    let (pool, work) = (pool_with(0, ",punch=keep"), tempfile::tempdir().unwrap());
    let mut vm = start_with(&REPORTING, MACHINE, &pool, work.path());
    report(&mut vm);
    println!("reporting  {} MiB are punched", pool.counter("punched_bytes") >> 20);
    assert_ne!(pool.counter("punched_bytes"), 0);
    vm.remembers();
    vm.does(FILL);
    vm.works();
    vm.boot.shut_down();
    unmount(pool);
}

/// The memory goes back to the pool, and the guest does not know that it is to ask for it.
fn memory_that_a_guest_reports_free_is_gone_by_default() {
    let (pool, work) = (pool(1), tempfile::tempdir().unwrap());
    let mut vm = start_with(&REPORTING, MACHINE, &pool, work.path());
    report(&mut vm);
    println!("reporting  {} pages are the pool's", pool.free_pages());
    assert_ne!(pool.free_pages(), 0);
    vm.is_ended_by_sigbus_in(FILL);
    drop(vm);
    unmount(pool);
}

/// The memory of a Linux memory block. A guest takes and gives back whole blocks if it can.
const BLOCK: u64 = 128 << 20;

/// A device of virtio-mem. Its memory is the file of its name.
struct Memory {
    name: &'static str,
    blocks: u64,
    file: PathBuf,
}

impl Memory {
    fn new(name: &'static str, blocks: u64, pool: &Pool) -> Self {
        Self { name, blocks, file: pool.join(name) }
    }

    fn bytes(&self) -> u64 {
        self.blocks * BLOCK
    }

    fn arguments(&self, options: &str) -> [String; 6] {
        let (name, path, bytes) = (self.name, self.file.display(), self.bytes());
        let memory = format!("memory-backend-file,id=of-{name},mem-path={path},size={bytes}");
        let device = format!("virtio-mem-pci,id={name},memdev=of-{name},requested-size=0{options}");
        let [limit, memory] = ["maxmem=1G".to_owned(), format!("{memory},{DOCUMENTED}")];
        ["-m".into(), limit, "-object".into(), memory, "-device".into(), device]
    }

    /// Starts a machine with the device, which has these options.
    fn start(&self, options: &str, kind: Machine, pool: &Pool, work: &Path) -> Vm {
        let arguments = self.arguments(options);
        start_with(&arguments.each_ref().map(String::as_str), kind, pool, work)
    }

    fn request(&self, vm: &Vm, bytes: u64) {
        vm.tell(&format!("qom-set /machine/peripheral/{} requested-size {bytes}", self.name));
    }

    /// Requests bytes, and waits until QEMU has refused the guest's first change.
    fn request_in_vain(&self, vm: &Vm, bytes: u64, log: &Path) {
        const BUSY: &str = "virtio_mem_send_response type=2"; // VIRTIO_MEM_RESP_BUSY
        fs::write(log, "").unwrap();
        vm.tell(&format!("logfile {}", log.display()));
        vm.tell("trace-event virtio_mem_send_response on");
        self.request(vm, bytes);
        await_text(log, BUSY);
    }

    /// The bytes that the guest has.
    fn plugged(&self, vm: &Vm) -> u64 {
        let answer = vm.tell(&format!("qom-get /machine/peripheral/{} size", self.name));
        let size = answer.lines().find_map(|line| line.trim().parse().ok());
        size.unwrap_or_else(|| panic!("no size in {answer:?}"))
    }

    /// Has the guest take all.
    fn plug(&self, vm: &Vm) {
        self.request(vm, self.bytes());
        limits::until(limits::ANSWER, "the guest to take memory", || {
            self.plugged(vm) == self.bytes()
        });
    }

    /// Gives the file all of its memory.
    fn allocate(&self) {
        let file = File::options().write(true).open(&self.file).unwrap();
        fallocate(&file, FallocateFlags::empty(), 0, self.bytes()).unwrap();
    }
}

/// QEMU punches the memory of such a device when it starts. `prealloc=on` of the device makes QEMU
/// refuse to plug memory that the file does not have.
fn virtio_mem_takes_memory_that_is_allocated_before() {
    let (pool, work) = (pool_with(256, ""), tempfile::tempdir().unwrap());
    let more = Memory::new("more", 2, &pool);
    let mut vm = more.start(",prealloc=on", UNCLEARED, &pool, work.path());
    let free = || pool.free_pages() * FOLIO;
    assert_eq!(free(), more.bytes(), "the pool has the memory");
    vm.does(DRIVERS);
    more.request_in_vain(&vm, more.bytes(), &work.path().join("takes"));
    vm.does(FILL);
    assert_eq!(more.plugged(&vm), 0);
    more.allocate();
    more.request(&vm, 0);
    more.plug(&vm);
    vm.does(FILL);
    // A quarantined file gives nothing back until it is repaired.
    poison(&more.file, BLOCK / 2, SUBPAGE).unwrap();
    more.request_in_vain(&vm, BLOCK, &work.path().join("gives"));
    assert_eq!((more.plugged(&vm), quarantines(&more.file)), (more.bytes(), 1));
    set(&more.file, REPAIR, "salvage all").unwrap();
    more.request(&vm, BLOCK + FOLIO);
    limits::until(limits::ANSWER, "the pool to get memory", || free() > BLOCK / 2);
    vm.remembers();
    vm.does(FILL);
    vm.boot.shut_down();
    unmount(pool);
}

/// Without `prealloc=on` of the device, QEMU plugs memory that is not there.
fn virtio_mem_hands_out_memory_that_is_not_there() {
    let (pool, work) = (pool_with(128, ""), tempfile::tempdir().unwrap());
    let more = Memory::new("more", 1, &pool);
    let mut vm = more.start("", MACHINE, &pool, work.path());
    vm.does(DRIVERS);
    more.plug(&vm);
    vm.is_ended_by_sigbus_in(FILL);
    drop(vm);
    unmount(pool);
}

fn virtio_mem_takes_and_gives_with_punched_pages_kept() {
    let (pool, work) = (pool_with(128, ",punch=keep"), tempfile::tempdir().unwrap());
    let more = Memory::new("more", 1, &pool);
    let mut vm = more.start("", UNCLEARED, &pool, work.path());
    let punched = || pool.counter("punched_bytes");
    assert_eq!(punched(), more.bytes(), "the machine has the memory");
    vm.does(DRIVERS);
    more.plug(&vm);
    vm.does(FILL);
    more.allocate(); // a quarantine needs a file without punched pages
    poison(&more.file, BLOCK / 2, SUBPAGE).unwrap();
    more.request(&vm, 0);
    limits::until(limits::ANSWER, "the guest to give memory back", || punched() > BLOCK / 4);
    assert_eq!(quarantines(&more.file), 0, "a punch discards the quarantine");
    vm.remembers();
    more.plug(&vm);
    vm.does(FILL);
    vm.remembers();
    vm.boot.shut_down();
    unmount(pool);
}

// ---- copies of the memory -----------------------------------------------------------------------

/// The arguments for a disk that holds snapshots, made by qemu-img(1).
fn disk(work: &Path) -> [String; 2] {
    let path = work.join("disk").display().to_string();
    run(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2", &path, "64M"]));
    ["-drive".into(), format!("if=none,id=disk,format=qcow2,file={path}")]
}

/// QEMU reads all memory to save it, and compares memory with zeros to load them. SIGBUS ends it at
/// a quarantine.
fn a_snapshot_holds_all_memory_or_is_not_made() {
    let (pool, work) = (pool(1), tempfile::tempdir().unwrap());
    let disk = disk(work.path());
    let disk = disk.each_ref().map(String::as_str);
    let mut vm = start_with(&disk, MACHINE, &pool, work.path());
    quarantine_unused(&vm);
    set(&vm.memory, REPAIR, "salvage all").unwrap();
    vm.tell("savevm good");
    vm.does(FILL);
    vm.tell("loadvm good");
    vm.remembers();
    quarantine_unused(&vm);
    let answer = vm.order("savevm bad");
    vm.is_ended_by_sigbus();
    drop((answer, vm));
    set(pool.join("vm0"), REPAIR, "salvage all").unwrap();
    // The disk has the one snapshot, which another machine loads.
    const UNRESERVED: &str = "share=on,reserve=off,align=2M";
    let mut vm = Vm::spawn_as(MACHINE, UNRESERVED, &pool.join("vm0"), work.path(), &disk);
    let list = vm.tell("info snapshots");
    assert!(list.contains(" good ") && !list.contains(" bad "), "{list}");
    vm.tell("loadvm good");
    vm.remembers();
    assert_eq!(own_bytes(vm.boot.pid(), &vm.memory), 0, "all memory is the file's");
    quarantine_unused(&vm);
    let answer = vm.order("loadvm good");
    vm.is_ended_by_sigbus();
    drop((answer, vm));
    set(pool.join("vm0"), REPAIR, "salvage all").unwrap();
    unmount(pool);
}

/// The parts of a dump that are memory of a machine: address, offset in the dump, length (elf(5),
/// Elf64_Phdr).
fn parts(dump: &File) -> Vec<(u64, u64, u64)> {
    let number = |at: u64, length: usize| {
        let mut bytes = [0; 8];
        dump.read_exact_at(&mut bytes[..length], at).unwrap();
        u64::from_le_bytes(bytes)
    };
    const PT_LOAD: u64 = 1;
    let (table, size, count) = (number(32, 8), number(54, 2), number(56, 2));
    let headers = (0..count).map(|index| table + index * size);
    let parts = headers.filter(|at| number(*at, 4) == PT_LOAD);
    parts.map(|at| (number(at + 24, 8), number(at + 8, 8), number(at + 32, 8))).collect()
}

/// Asserts that a dump holds the bytes of the memory above the first MiB, in which a PC has other
/// things besides.
fn assert_holds(dump: &Path, memory: &Path) {
    const MEBIBYTE: u64 = 1 << 20;
    let (dump, memory) = (File::open(dump).unwrap(), File::open(memory).unwrap());
    let [mut found, mut meant] = [(); 2].map(|()| vec![0; MEBIBYTE as usize]);
    let mut compared = 0;
    for (address, offset, length) in parts(&dump) {
        for at in (address..(address + length).min(MEBIBYTES << 20)).step_by(MEBIBYTE as usize) {
            if at < MEBIBYTE {
                continue;
            }
            memory.read_exact_at(&mut meant, at).unwrap();
            dump.read_exact_at(&mut found, offset + (at - address)).unwrap();
            assert!(found == meant, "the dump has other bytes at {at:#x}");
            compared += MEBIBYTE;
        }
    }
    assert_eq!(compared, (MEBIBYTES << 20) - MEBIBYTE, "bytes in the dump");
}

/// QEMU writes a dump by write(2) from the memory itself. At a quarantine, the call is EFAULT.
fn a_dump_holds_all_memory_or_ends_at_a_quarantine() {
    const THREADS: &str = "share=on,prealloc=on,prealloc-threads=2,align=2M";
    let (pool, work) = (pool(1), tempfile::tempdir().unwrap());
    let mut vm = Vm::start_as(MACHINE, THREADS, &pool.join("vm0"), work.path(), &[]);
    vm.remembers();
    assert_eq!(huge_bytes(vm.boot.pid(), &vm.memory), (MEBIBYTES << 20, MEBIBYTES << 20));
    let [good, bad] = ["good", "bad"].map(|name| work.path().join(name));
    vm.tell("stop");
    let place = vm.unused();
    poison(&vm.memory, place, SUBPAGE).unwrap();
    let answer = vm.ask(&format!("dump-guest-memory {}", bad.display()));
    assert!(answer.contains("Error: dump: failed to save memory: Bad address"), "{answer}");
    let parts = parts(&File::open(&bad).unwrap());
    let (address, offset, _) =
        parts.into_iter().find(|part| (part.0..part.0 + part.2).contains(&place)).expect("a part");
    let end = fs::metadata(&bad).unwrap().len();
    assert!(end <= offset + (place - address), "the dump goes on behind the quarantine: {end}");
    set(&vm.memory, REPAIR, "salvage all").unwrap();
    vm.tell(&format!("dump-guest-memory {}", good.display()));
    assert_holds(&good, &vm.memory);
    vm.tell("cont");
    vm.remembers();
    vm.boot.shut_down();
    unmount(pool);
}

/// Starts a machine from the file `state`.
fn restore(memory: &Path, work: &Path, state: &Path) -> Vm {
    Vm::spawn(memory, work, Some(&format!("exec:cat {}", state.display())))
}

/// Precopy reads all memory, and SIGBUS ends QEMU at a quarantine. QEMU refuses a state that ends
/// early.
fn a_machine_is_saved_by_migration_to_a_file_once_it_is_whole() {
    let (pool, work) = (pool(2), tempfile::tempdir().unwrap());
    let [whole, cut] = ["whole", "cut"].map(|name| work.path().join(name));
    let save = |vm: &Vm, state: &Path| {
        vm.tell("migrate_set_parameter max-bandwidth 1G");
        vm.tell(&format!("migrate -d \"exec:cat > {}\"", state.display()));
    };
    let vm = start_with(&[], MACHINE, &pool, work.path());
    quarantine_unused(&vm);
    set(&vm.memory, REPAIR, "salvage all").unwrap();
    save(&vm, &whole);
    vm.wait_until_gone();
    drop(vm);
    let mut restored = restore(&pool.join("vm1"), work.path(), &whole);
    restored.wait_until_there();
    restored.remembers();
    quarantine_unused(&restored);
    save(&restored, &cut);
    restored.is_ended_by_sigbus();
    drop(restored);
    let mut refused = restore(&pool.join("vm0"), work.path(), &cut);
    assert_eq!(refused.boot.wait_for_end().code(), Some(1), "QEMU refuses the state");
    drop(refused);
    set(pool.join("vm1"), REPAIR, "salvage all").unwrap();
    unmount(pool);
}
