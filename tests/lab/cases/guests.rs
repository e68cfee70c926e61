//! A virtual machine that KVM runs within the lab's machine, with a file of ours as its memory: the
//! processors of AMD that QEMU emulates have what KVM needs.

use super::hw::{inject, listed};
use super::{cases, load_module, skip};
use crate::monitor::read_to_prompt;
use crate::pattern;
use crate::support::documents::{blocks, subsection};
use crate::support::{
    FOLIO, POISON, Pool, REPAIR, SUBPAGE, Toucher, await_shut, get, hugetlb2, kill_worker, limits,
    run, set, status_and_error,
};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

cases! {
    NESTED: a_guest_of_kvm_goes_on_without_the_subpage_that_it_has_lost,
        an_error_in_what_the_kernel_of_a_guest_uses_is_the_panic_of_that_kernel,
        a_guest_of_kvm_arrives_with_its_loss,
        a_guest_of_kvm_moves_by_postcopy,
        an_error_costs_a_guest_2_mib_of_hugetlbfs;
}

/// The files that `tests/lab/fetch-nested` has fetched, the kernel, and the guest's programs.
const FILES: &str = "/lib/nested";

/// QEMU 10.
pub const QEMU: &str = "/lib/nested/qemu-system-x86_64";

/// The guest's programs.
const PROGRAMS: [u64; 6] = [1, 2, 3, 4, 5, 9];

/// The memory of the guest.
pub const BYTES: u64 = 128 << 20;

/// The document with the commands for an error in a machine's memory.
const OPERATIONS: &str = include_str!("../../../docs/OPERATIONS.md");

fn documented_commands() -> Vec<&'static str> {
    blocks(subsection(OPERATIONS, "A memory error in a virtual machine"), "text")
}

/// The time for an event in the guest, which is emulated twice.
const PATIENCE: Duration = Duration::from_secs(200);

/// The time that a program is watched which must not go on.
const WATCH: Duration = Duration::from_secs(3);

/// A guest, and its console.
pub struct Guest {
    pub qemu: Child,
    pub memory: PathBuf,
    console: PathBuf,
    monitor: PathBuf,
    /// The other monitor, for programs.
    pub qmp: PathBuf,
}

impl Guest {
    /// Starts a guest and waits until its programs are ready.
    pub fn start(memory: PathBuf) -> Self {
        let guest = Self::spawn(memory, &[]);
        guest.await_programs();
        guest
    }

    pub fn await_programs(&self) {
        let is_ready = |number: u64| self.await_line(0, &format!("program {number} is ready"));
        PROGRAMS.into_iter().for_each(is_ready);
    }

    /// Starts a guest with these `further` arguments.
    fn spawn(memory: PathBuf, further: &[&str]) -> Self {
        Self::spawn_by(Command::new(QEMU), &memory.clone(), memory, further)
    }

    /// As [`Guest::spawn`], by a command that ends as QEMU, to which the memory is at `path`.
    pub fn spawn_by(mut command: Command, path: &Path, memory: PathBuf, further: &[&str]) -> Self {
        let of_it = |kind| Path::new("/tmp").join(memory.file_name().unwrap()).with_extension(kind);
        let (console, monitor, qmp) = (of_it("console"), of_it("monitor"), of_it("qmp"));
        let _ = fs::remove_file(&console); // of an earlier guest
        let backend = format!(
            "memory-backend-file,id=ram,mem-path={},size={BYTES},share=on,prealloc=on",
            path.display()
        );
        command.args(["-L", FILES, "-accel", "kvm", "-cpu", "host", "-nodefaults"]);
        command.args(["-no-user-config", "-display", "none", "-no-reboot", "-object", &backend]);
        command.args(["-machine", "pc,memory-backend=ram", "-m", "128"]);
        command.args(["-kernel", &format!("{FILES}/vmlinuz")]);
        command.args(["-initrd", &format!("{FILES}/initramfs"), "-append"]);
        command
            .arg("console=ttyS0 panic=-1 mitigations=off random.trust_cpu=on no_timer_check quiet");
        command.arg("-serial").arg(format!("file:{}", console.display()));
        let socket = |path: &Path| format!("unix:{},server=on,wait=off", path.display());
        command.args(["-monitor", &socket(&monitor), "-qmp", &socket(&qmp)]).args(further);
        let qemu = command.stdin(Stdio::null()).spawn().expect("QEMU");
        Self { qemu, memory, console, monitor, qmp }
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.console).unwrap_or_default()).replace('\r', "")
    }

    /// Waits until the console has `words` in the part behind `from` bytes.
    pub fn await_line(&self, from: usize, words: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.text().get(from..).is_some_and(|text| text.contains(words)) {
            let is_wrong = Instant::now() >= deadline || self.text().contains("WRONG BYTES");
            assert!(!is_wrong, "{words}? The guest:\n{}", self.text());
            std::thread::sleep(Duration::from_millis(100)); // the guest needs the processors
        }
    }

    /// Waits until each of these programs has gone through its memory once more.
    pub fn await_rounds(&self, programs: &[u64]) {
        let now = self.text().len();
        let goes_on = |number| self.await_line(now, &format!("program {number}: round"));
        programs.iter().for_each(goes_on);
    }

    /// Carries commands out for the subpage at `offset` of the guest's memory: those of hugetlb2 as
    /// a shell would, and the others in QEMU's monitor.
    fn carry_out(&self, commands: &str, offset: u64) {
        let here = |word: &str| match word {
            "FILE" => self.memory.display().to_string(),
            "OFFSET" => offset.to_string(),
            "LENGTH" => SUBPAGE.to_string(),
            _ => word.to_owned(),
        };
        for line in commands.lines() {
            match line.strip_prefix("hugetlb2 ") {
                Some(words) => drop(run(hugetlb2().args(words.split(' ').map(here)))),
                None => drop(self.ask(line)),
            }
        }
    }

    /// Gives QEMU's monitor a command, and returns the answer, which comes when the command is
    /// carried out.
    pub fn ask(&self, command: &str) -> String {
        let mut monitor = UnixStream::connect(&self.monitor).unwrap();
        monitor.set_read_timeout(Some(PATIENCE)).unwrap();
        read_to_prompt(&mut monitor);
        writeln!(monitor, "{command}").unwrap();
        read_to_prompt(&mut monitor)
    }

    /// The subpage of the guest's memory that program `number` uses, as its offset in the file.
    pub fn subpage_of(&self, number: u64) -> u64 {
        let meant = pattern::of(number, 0);
        let found = self.subpages_with(|bytes| bytes == meant).first().copied();
        found.unwrap_or_else(|| panic!("program {number} has no subpage with its bytes"))
    }

    /// The subpages of the guest's memory that can be read and whose bytes are such, as offsets in
    /// the file.
    fn subpages_with(&self, is_such: impl Fn(&[u8]) -> bool) -> Vec<u64> {
        let file = File::open(&self.memory).unwrap();
        let mut bytes = [0; SUBPAGE as usize];
        let mut is_it = |at: &u64| file.read_exact_at(&mut bytes, *at).is_ok() && is_such(&bytes);
        (0..BYTES).step_by(SUBPAGE as usize).filter(|at| is_it(at)).collect()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

pub fn load_kvm() {
    if !Path::new(FILES).join("complete").exists() {
        skip("no KVM modules and no QEMU 10 are there: tests/lab/fetch-nested fetches them");
    }
    for (name, parameters) in [("irqbypass", c""), ("kvm", c""), ("kvm-amd", c"nested=0")] {
        load_module(&format!("{FILES}/{name}.ko"), parameters);
    }
}

fn a_guest_of_kvm_goes_on_without_the_subpage_that_it_has_lost() {
    load_kvm();
    let pool = Pool::mount(&format!("pagesize=2M,size={}", BYTES + (32 << 20)));
    let mut guest = Guest::start(pool.join("guest"));
    let memory = guest.memory.clone();
    // A program that handles SIGBUS is told of the subpage.
    let now = guest.text().len();
    inject(&memory, guest.subpage_of(3));
    guest.await_line(now, "program 3: SIGBUS 4, lsb 12, at subpage 0"); // BUS_MCEERR_AR
    guest.await_rounds(&[1, 2, 4, 9]);
    // One that does not is ended, and no other.
    let now = guest.text().len();
    inject(&memory, guest.subpage_of(1));
    guest.await_line(now, "program 1 has ended: None Some(7)");
    guest.await_rounds(&[2, 4, 9]);
    assert_eq!(pool.counter("quarantined_hw"), 2, "two errors, two subpages");
    let list = run(hugetlb2().arg("poison").arg(&memory));
    assert!(list.contains(" hw"), "{list}");
    // A quarantine on request: the program waits, and goes on with its bytes after the repair.
    // The machine stands still for either: a processor that waits for a quarantined subpage touches
    // it again and again, and would see zeros in the microseconds of a repair (docs/SEMANTICS.md).
    let [quarantine, repair, ..] = documented_commands()[..] else { panic!("two blocks") };
    let lost = guest.subpage_of(2);
    guest.carry_out(quarantine, lost);
    guest.await_rounds(&[4, 9]);
    let now = guest.text().len();
    std::thread::sleep(WATCH);
    assert!(!guest.text()[now..].contains("program 2"), "it goes on:\n{}", guest.text());
    guest.await_rounds(&[4, 9]);
    guest.carry_out(repair, lost);
    guest.await_rounds(&[2, 4, 9]);
    // QEMU moves no guest that it has told of an error. The guest stays, and its losses.
    let mut out = hugetlb2();
    out.args(["migrate", "out", "--to", "unix:/tmp/nowhere", "--qmp"]).arg(&guest.qmp);
    let (status, said) = status_and_error(&mut out);
    assert!(status == 1 && said.contains("hardware poisoned memory"), "{status}: {said}");
    assert_eq!(pool.counter("quarantined_hw"), 2, "as before");
    guest.await_rounds(&[2, 4, 9]);
    assert_eq!(guest.qemu.try_wait().unwrap(), None, "QEMU runs");
    set(&memory, REPAIR, "zero all").unwrap();
    assert_eq!(lost_of(&memory), 0);
    pool.check();
    drop(guest);
    fs::remove_file(&memory).unwrap();
    pool.unmount();
}

/// The guest's kernel reads the lost subpage when program 5 asks for its version, and has no
/// program to end in its place. `panic=-1` has it restart then, and `-no-reboot` makes that the
/// usual end of QEMU, with status 0.
fn an_error_in_what_the_kernel_of_a_guest_uses_is_the_panic_of_that_kernel() {
    /// The beginning of the kernel's `linux_proc_banner`.
    const BANNER: &[u8] = b"%s version %s (";
    load_kvm();
    let pool = Pool::mount(&format!("pagesize=2M,size={}", BYTES + (32 << 20)));
    let other = pool.join("other");
    let bytes: Vec<u8> = (0..4).flat_map(|page| pattern::of(7, page)).collect();
    fs::write(&other, &bytes).unwrap();
    let mut guest = Guest::start(pool.join("guest"));
    guest.await_rounds(&[5]);
    let has_banner = |bytes: &[u8]| bytes.windows(BANNER.len()).any(|part| part == BANNER);
    let [place] = guest.subpages_with(has_banner)[..] else { panic!("it is in one subpage") };
    let now = guest.text().len();
    inject(&guest.memory, place);
    guest.await_line(now, "Kernel panic - not syncing");
    let end = limits::exit(PATIENCE, "QEMU, whose guest restarts", &mut guest.qemu);
    assert_eq!(end.code(), Some(0), "{end}; the guest:\n{}", guest.text());
    let console = guest.text();
    let words = console.lines().find(|line| line.contains("Kernel panic"));
    println!("subpage {place:#x}: {}", words.expect("it is there"));
    assert_eq!(listed(&guest.memory), [format!("{place:#x} 0x1000 hw")]);
    assert_eq!(lost_of(&guest.memory), SUBPAGE, "all other subpages can be loaded");
    assert_eq!(fs::read(&other).unwrap(), bytes);
    assert_eq!(get(&other, POISON), Err(Errno::NODATA));
    pool.check();
    set(&guest.memory, REPAIR, "zero all").unwrap();
    assert_eq!(lost_of(&guest.memory), 0);
    ["guest", "other"].iter().for_each(|name| fs::remove_file(pool.join(name)).unwrap());
    drop(guest);
    pool.unmount();
}

/// A guest comes from a machine that has lost one of its subpages. Here, the list in the pipe names
/// a subpage that a program of the guest uses.
fn a_guest_of_kvm_arrives_with_its_loss() {
    load_kvm();
    let pool = Pool::mount(&format!("pagesize=2M,size={}", 2 * BYTES + (32 << 20)));
    let guest = Guest::start(pool.join("guest"));
    let lost = guest.subpage_of(3);
    let to = "unix:/tmp/migration";
    let mut there = Guest::spawn(pool.join("there"), &["-incoming", to]);
    await_qemu(&there, to);
    let mut into = hugetlb2();
    into.args(["migrate", "in", "--qmp"]).arg(&there.qmp);
    move_with_loss(&guest, lost, to, into);
    drop(guest);
    there.await_line(0, "program 3: SIGBUS 4, lsb 12, at subpage 0"); // BUS_MCEERR_AR
    there.await_rounds(&[1, 2, 4, 9]);
    assert_eq!(pool.counter("quarantined_hw"), 1);
    assert_eq!(pool.counter("frames_given_up"), 1);
    assert_eq!(there.qemu.try_wait().unwrap(), None, "QEMU runs");
    set(&there.memory, REPAIR, "zero all").unwrap();
    pool.check();
    drop(there);
    ["guest", "there"].iter().for_each(|name| fs::remove_file(pool.join(name)).unwrap());
    pool.unmount();
}

/// Waits until a QEMU waits for a guest at the address `to`, unix:PATH.
pub fn await_qemu(there: &Guest, to: &str) {
    let socket = Path::new(to.strip_prefix("unix:").expect("a socket"));
    limits::until(limits::ANSWER, "the other QEMU", || {
        socket.exists() && UnixStream::connect(&there.qmp).is_ok()
    });
}

/// Moves `guest` to the QEMU at `to`, which `migrate_in` is for. The list in the pipe names `lost`
/// as a lost subpage of the guest's memory.
pub fn move_with_loss(guest: &Guest, lost: u64, to: &str, mut migrate_in: Command) {
    let mut into = migrate_in.stdin(Stdio::piped()).spawn().unwrap();
    let mut out = hugetlb2();
    let losses = run(out.args(["migrate", "out", "--to", to, "--qmp"]).arg(&guest.qmp));
    let (heading, end) = losses.split_once('\n').unwrap();
    let list = format!("{heading}\nlost ram {lost} {SUBPAGE}\n{end}");
    into.stdin.take().unwrap().write_all(list.as_bytes()).unwrap();
    assert!(limits::exit(limits::PROGRAM, "hugetlb2 migrate in", &mut into).success());
}

/// Waits until a migration from `guest` is at a stage.
fn await_migration(guest: &Guest, stage: &str) {
    limits::until(limits::PROGRAM, "a stage of a migration", || {
        let status = guest.ask("info migrate");
        assert!(!status.contains("Migration status: failed"), "{status}");
        status.contains(&format!("Migration status: {stage}"))
    });
}

/// The guest runs at its destination before its memory is there. The worker dies meanwhile.
fn a_guest_of_kvm_moves_by_postcopy() {
    load_kvm();
    let pool = Pool::mount(&format!("pagesize=2M,size={}", 2 * BYTES + (32 << 20)));
    let (guest, other) = (Guest::start(pool.join("guest")), pool.join("there"));
    File::create(&other).unwrap().set_len(BYTES).unwrap();
    let mut by = hugetlb2();
    by.arg("open").arg(&other).args(["--fd", "9", "--", QEMU]);
    let (door, to) = (Path::new("/proc/self/fd/9"), "unix:/tmp/postcopy");
    let mut there = Guest::spawn_by(by, door, other.clone(), &["-incoming", to]);
    limits::until(limits::ANSWER, "the other QEMU", || UnixStream::connect(&there.monitor).is_ok());
    for side in [&there, &guest] {
        side.ask("migrate_set_capability postcopy-ram on");
    }
    guest.ask("migrate_set_parameter max-bandwidth 1M"); // so that some is left for postcopy
    guest.ask("migrate_set_parameter max-postcopy-bandwidth 4M");
    guest.ask(&format!("migrate -d {to}"));
    guest.ask("migrate_start_postcopy");
    await_migration(&guest, "postcopy-active");
    kill_worker(&pool);
    there.await_rounds(&[1, 3]);
    await_migration(&guest, "completed");
    drop(guest);
    there.await_rounds(&PROGRAMS);
    assert_eq!(there.qemu.try_wait().unwrap(), None, "QEMU runs");
    pool.check();
    drop(there);
    await_shut(&other);
    assert_eq!(lost_of(&other), 0);
    pool.check();
    ["guest", "there"].iter().for_each(|name| fs::remove_file(pool.join(name)).unwrap());
    pool.unmount();
}

/// Bytes of the guest's memory that a program cannot load.
fn lost_of(memory: &Path) -> u64 {
    let mut program = Toucher::mapping(memory, BYTES);
    program.step(0..BYTES, SUBPAGE).len() as u64 * SUBPAGE
}

/// One error in a subpage that a program of the guest uses: the bytes that the guest loses, and the
/// programs.
fn an_error_costs_a_guest_2_mib_of_hugetlbfs() {
    load_kvm();
    let pool = Pool::mount(&format!("pagesize=2M,size={}", BYTES + (32 << 20)));
    let ours = suffer(pool.join("guest"), true);
    pool.unmount();
    let directory = tempfile::tempdir().unwrap();
    fs::write(HUGE_PAGES, (BYTES / FOLIO + 2).to_string()).unwrap();
    mount("lab", directory.path(), "hugetlbfs", MountFlags::empty(), Some(c"pagesize=2M")).unwrap();
    let theirs = suffer(directory.path().join("guest"), false);
    unmount(directory.path(), UnmountFlags::DETACH).unwrap();
    fs::write(HUGE_PAGES, "0").unwrap();
    println!("one memory error in the memory of a guest of KVM");
    for (name, (bytes, end)) in [("hugetlb2", &ours), ("hugetlbfs 2M", &theirs)] {
        println!("  {name:12} {bytes:>8} bytes are lost; {end}");
    }
    assert_eq!((ours.0, theirs.0), (SUBPAGE, FOLIO));
}

const HUGE_PAGES: &str = "/proc/sys/vm/nr_hugepages";

/// Starts a guest on `memory` and strikes the subpage of its program 3. Returns the bytes that are
/// lost, and what became of the guest a moment later.
fn suffer(memory: PathBuf, others_go_on: bool) -> (u64, String) {
    let mut guest = Guest::start(memory.clone());
    let at = guest.subpage_of(3);
    let mut injector = Toucher::mapping(&memory, BYTES);
    assert!(injector.load(at).is_some());
    let now = guest.text().len();
    // Also if the kernel cannot split the folio at once: the error is there.
    injector.ask(&format!("advise {at} {SUBPAGE} {}", libc::MADV_HWPOISON));
    if others_go_on {
        guest.await_line(now, "program 3: SIGBUS 4, lsb 12, at subpage 0");
        guest.await_rounds(&[1, 2, 4, 9]);
    } else {
        std::thread::sleep(WATCH);
    }
    let text = guest.text();
    let end = match guest.qemu.try_wait().unwrap() {
        Some(status) => format!("QEMU has ended: {status}"),
        None if text.contains("Kernel panic") => "its kernel has panicked".to_owned(),
        None => {
            let ended = text.lines().filter(|line| line.contains("has ended")).count();
            format!("{ended} of its programs have ended")
        }
    };
    drop((guest, injector));
    let bytes = lost_of(&memory);
    fs::remove_file(&memory).unwrap();
    (bytes, end)
}
