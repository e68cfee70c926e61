//! Virtual machines with a file of ours for a memory:
//! `-object memory-backend-file,mem-path=FILE,share=on,prealloc=on,align=2M`.

use crate::boot::{Boot, Report, Verdict};
use crate::cases::Machine;
use crate::monitor::read_to_prompt;
use crate::support::{
    COLLAPSE, FOLIO, LOSSES, MAP, POISON, Pool, REPAIR, SUBPAGE, get, huge_bytes, hugetlb2, limits,
    poison, run, set, status_and_error,
};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};
use std::fs::{self, File};
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
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
    ("a_machine_moves_with_quarantined_memory", a_machine_moves_with_quarantined_memory),
    ("lost_memory_moves_with_its_machine", lost_memory_moves_with_its_machine),
    ("a_machine_that_cannot_move_by_postcopy_stays", a_machine_that_cannot_move_by_postcopy_stays),
    (
        "a_machine_moves_by_postcopy_with_punched_pages_kept",
        a_machine_moves_by_postcopy_with_punched_pages_kept,
    ),
];

pub const MEBIBYTES: u64 = 512;
pub const MACHINE: Machine = Machine { memory: MEBIBYTES, ..Machine::SMALL };

/// The documented options of the memory, besides its place and size.
pub const DOCUMENTED: &str = "share=on,prealloc=on,align=2M";

/// The machine runs this case to show that it works. Among other things, it makes a memory error of
/// its own.
const WORK: &str = "this_kernel_has_real_memory_errors";

/// The machine runs this case to show that its memory is unchanged. The first run leaves bytes in
/// memory.
const REMEMBER: &str = "memory_holds_what_was_left_in_it";

pub const SIGBUS: i32 = 7;

/// A machine, and QEMU's monitor.
pub struct Vm {
    pub boot: Boot,
    monitor: PathBuf,
    pub memory: PathBuf,
}

impl Vm {
    /// Starts a machine on the file `memory`, and makes the file if there is none.
    pub fn spawn(memory: &Path, work: &Path, incoming: Option<&str>) -> Self {
        let incoming = incoming.map_or_else(Vec::new, |from| vec!["-incoming", from]);
        Self::spawn_as(MACHINE, DOCUMENTED, memory, work, &incoming)
    }

    /// As [`Vm::spawn`], with these options for the memory, and with `more` arguments.
    pub fn spawn_as(
        kind: Machine,
        options: &str,
        memory: &Path,
        work: &Path,
        more: &[&str],
    ) -> Self {
        Self::spawn_by(
            None,
            kind,
            &format!("mem-path={},{options}", memory.display()),
            memory,
            work,
            more,
        )
    }

    /// Starts a machine by `hugetlb2 open`: QEMU has the memory of the file `memory`, and not the
    /// file. Makes the file.
    pub fn spawn_by_door(kind: Machine, memory: &Path, work: &Path, more: &[&str]) -> Self {
        File::create(memory).unwrap().set_len(MEBIBYTES << 20).unwrap();
        let mut by = hugetlb2();
        by.arg("open").arg(memory).args(["--fd", "9", "--"]);
        let options = format!("mem-path=/dev/fd/9,{DOCUMENTED}");
        Self::spawn_by(Some(by), kind, &options, memory, work, more)
    }

    fn spawn_by(
        by: Option<Command>,
        kind: Machine,
        options: &str,
        memory: &Path,
        work: &Path,
        more: &[&str],
    ) -> Self {
        let monitor = work.join(memory.file_name().expect("a file"));
        let backend = format!("memory-backend-file,id=ram,size={MEBIBYTES}M,{options}");
        let socket = |path: &Path| format!("unix:{},server=on,wait=off", path.display());
        let (people, programs) = (socket(&monitor), socket(&qmp(&monitor)));
        let mut all = vec!["-object", &backend, "-machine", "memory-backend=ram"];
        all.extend(["-monitor", &people, "-qmp", &programs]);
        all.extend(more);
        let all: Vec<String> = all.into_iter().map(str::to_owned).collect();
        let boot = Boot::spawn_by(by, kind, &all).unwrap();
        Self { boot, monitor, memory: memory.to_owned() }
    }

    pub fn start(memory: &Path, work: &Path) -> Self {
        Self::start_as(MACHINE, DOCUMENTED, memory, work, &[])
    }

    /// As [`Vm::spawn_as`]. Waits until the machine is ready for a case.
    pub fn start_as(
        kind: Machine,
        options: &str,
        memory: &Path,
        work: &Path,
        more: &[&str],
    ) -> Self {
        let vm = Self::spawn_as(kind, options, memory, work, more);
        vm.boot.wait_until_ready().unwrap();
        vm
    }

    /// Asserts that the machine works.
    pub fn works(&mut self) {
        self.does(WORK);
    }

    /// Asserts that the machine's memory holds the bytes of the first run.
    pub fn remembers(&mut self) {
        self.does(REMEMBER);
    }

    /// Asserts that a case passes in the machine, and returns its output.
    pub fn does(&mut self, what: &str) -> String {
        let report = self.boot.run(what);
        assert!(matches!(report.verdict, Verdict::Passed), "{}", describe(&report));
        report.output
    }

    /// Asserts that SIGBUS ends QEMU while the machine runs a case.
    pub fn is_ended_by_sigbus_in(&mut self, what: &str) {
        let report = self.boot.run(what);
        assert!(matches!(report.verdict, Verdict::Ended), "{}", describe(&report));
        self.is_ended_by_sigbus();
    }

    /// Waits until SIGBUS has ended QEMU.
    pub fn is_ended_by_sigbus(&mut self) {
        assert_eq!(self.boot.wait_for_end().signal(), Some(SIGBUS));
    }

    /// Gives QEMU's monitor a command that succeeds, and returns the answer.
    pub fn tell(&self, command: &str) -> String {
        let answer = self.ask(command);
        assert!(!answer.contains("Error:"), "{command}: {answer}");
        answer
    }

    /// Gives QEMU's monitor a command, and returns the answer.
    pub fn ask(&self, command: &str) -> String {
        read_to_prompt(&mut self.order(command))
    }

    /// Gives QEMU's monitor a command, and returns the connection on which QEMU answers.
    pub fn order(&self, command: &str) -> UnixStream {
        let mut connected = None;
        limits::until(limits::ANSWER, "QEMU's monitor, which it makes as it starts", || {
            connected = UnixStream::connect(&self.monitor).ok();
            connected.is_some()
        });
        let mut monitor = connected.expect("it listens");
        monitor.set_read_timeout(Some(limits::ANSWER)).expect("a limit for each answer");
        read_to_prompt(&mut monitor);
        writeln!(monitor, "{command}").unwrap();
        monitor
    }

    /// The socket of QEMU's other monitor, for programs.
    pub fn qmp(&self) -> PathBuf {
        qmp(&self.monitor)
    }

    /// Waits until the machine has moved to its target.
    pub fn wait_until_gone(&self) -> String {
        self.wait_until_migration_is("completed")
    }

    pub fn wait_until_migration_is(&self, stage: &str) -> String {
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
    pub fn wait_until_there(&self) {
        let patience = Instant::now() + Duration::from_secs(120);
        while self.tell("info status").contains("inmigrate") {
            assert!(Instant::now() < patience, "nothing has come");
            std::thread::sleep(Duration::from_millis(50)); // QEMU does not announce it
        }
    }

    /// Finds a subpage in the middle of memory that the machine has not written to.
    pub fn unused(&self) -> u64 {
        self.unused_folios().next().expect("some memory is unused") + 77 * SUBPAGE
    }

    /// The folios that the machine has not written to, as offsets in the file, the last one first.
    pub fn unused_folios(&self) -> impl Iterator<Item = u64> {
        let memory = File::open(&self.memory).unwrap();
        let mut folio = vec![0; FOLIO as usize];
        let is_unused = move |at: &u64| {
            memory.read_exact_at(&mut folio, *at).unwrap();
            folio.iter().all(|byte| *byte == 0)
        };
        let folios = (0..(MEBIBYTES << 20) / FOLIO).rev().map(|number| number * FOLIO);
        folios.filter(is_unused)
    }
}

/// The place of QEMU's other monitor.
fn qmp(monitor: &Path) -> PathBuf {
    monitor.with_extension("qmp")
}

fn describe(report: &Report) -> String {
    match &report.verdict {
        Verdict::Passed => "passed".into(),
        Verdict::Failed(why) | Verdict::Skipped(why) => why.clone(),
        Verdict::Ended => "the machine has ended".into(),
        Verdict::Hung => "the machine hangs".into(),
    }
}

/// Removes all files of a pool that nothing uses any more, and unmounts it.
pub fn unmount(pool: Pool) {
    pool.check();
    for entry in fs::read_dir(pool.path()).unwrap() {
        fs::remove_file(entry.unwrap().path()).unwrap();
    }
    pool.unmount();
}

pub fn pool(machines: u64) -> Pool {
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
    unmount(pool);
}

/// Without KVM, QEMU 7.2 has no handler for SIGBUS, so the signal ends it. (With KVM, QEMU tells
/// the guest of BUS_MCEERR_AR.)
fn a_virtual_machine_is_ended_by_a_quarantine_of_what_it_uses() {
    let (pool, work) = (pool(1), tempfile::tempdir().unwrap());
    let memory = pool.join("vm0");
    let mut vm = Vm::start(&memory, work.path());
    vm.works();
    vm.tell("stop");
    used_subpages(&memory).iter().for_each(|place| poison(&memory, *place, SUBPAGE).unwrap());
    vm.tell("cont");
    vm.is_ended_by_sigbus_in(WORK);
    // The bytes that the machine had in memory are not lost.
    set(&memory, REPAIR, "salvage all").unwrap();
    pool.check();
    drop(vm);
    unmount(pool);
}

/// Some subpages in the first 64 MiB of a machine, where its kernel is.
pub fn used_subpages(memory: &Path) -> Vec<u64> {
    let file = File::open(memory).unwrap();
    let mut subpage = vec![0; SUBPAGE as usize];
    let mut is_used = |place: &u64| {
        file.read_exact_at(&mut subpage, *place).unwrap();
        subpage.iter().any(|byte| *byte != 0)
    };
    let places = ((16 << 20)..(64 << 20)).step_by(64 * SUBPAGE as usize);
    places.filter(|place| is_used(place)).collect()
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
    run(Command::new("cp").arg("--sparse=never").arg(&memory).arg(&copy));
    drop(vm);
    let mut restored = Vm::spawn(&copy, work.path(), Some("defer"));
    restored.tell("migrate_set_capability x-ignore-shared on");
    restored.tell(&format!("migrate_incoming \"exec:cat {}\"", state.display()));
    restored.wait_until_there();
    restored.tell("cont");
    restored.works();
    pool.check();
    restored.boot.shut_down();
    unmount(pool);
}

pub fn free_port() -> u16 {
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
    unmount(pool);
}

// ---- hugetlb2 migrate ---------------------------------------------------------------------------

pub fn migrate_out(vm: &Vm, to: &str) -> Command {
    let mut command = hugetlb2();
    command.args(["migrate", "out", "--to", to, "--qmp"]).arg(qmp(&vm.monitor));
    command
}

fn migrate_in(vm: &Vm) -> Command {
    let mut command = hugetlb2();
    command.args(["migrate", "in", "--qmp"]).arg(qmp(&vm.monitor));
    command
}

/// Moves the machine `vm` to `target`, which waits at `to`.
pub fn migrate(vm: &Vm, target: &Vm, to: &str) {
    target.tell("info status"); // it has a monitor now
    let mut out = migrate_out(vm, to).stdout(Stdio::piped()).spawn().unwrap();
    let losses = out.stdout.take().expect("a pipe");
    let (has_come, said) = receive(target, losses);
    let out = limits::exit(limits::PROGRAM, "hugetlb2 migrate out", &mut out);
    assert!(has_come && out.success(), "{out}: {said}");
}

/// Runs `hugetlb2 migrate in` with these losses. Returns whether it succeeds, and its words.
pub fn receive(vm: &Vm, losses: impl Into<Stdio>) -> (bool, String) {
    let mut into = migrate_in(vm);
    let into = into.stdin(losses).stderr(Stdio::piped()).spawn().unwrap();
    let into = limits::collect(limits::PROGRAM, "hugetlb2 migrate in", into).unwrap();
    (into.status.success(), String::from_utf8_lossy(&into.stderr).into_owned())
}

fn refused(command: &mut Command, why: &str) {
    let (status, said) = status_and_error(command);
    assert!(status == 1 && said.contains(why), "{status}: {said}");
}

pub fn state(vm: &Vm) -> String {
    let answer = vm.tell("info status");
    let state = answer.lines().find_map(|line| line.trim().strip_prefix("VM status: "));
    state.expect("it has one").to_owned()
}

/// Makes a machine that waits at the address for another one to come.
fn target(memory: &Path, work: &Path) -> (Vm, String) {
    let to = format!("tcp:127.0.0.1:{}", free_port());
    (Vm::spawn(memory, work, Some(&to)), to)
}

/// The bytes of the quarantined subpages are known, so the machine runs while it moves.
fn a_machine_moves_with_quarantined_memory() {
    let (pool, work) = (pool(2), tempfile::tempdir().unwrap());
    let (memory, other) = (pool.join("vm0"), pool.join("vm1"));
    let mut vm = Vm::start(&memory, work.path());
    vm.remembers();
    poison(&memory, vm.unused(), SUBPAGE).unwrap();
    vm.tell("stop");
    let used = used_subpages(&memory);
    used.iter().for_each(|place| poison(&memory, *place, SUBPAGE).unwrap());
    let (mut there, to) = target(&other, work.path());
    migrate(&vm, &there, &to);
    assert_eq!(get(&other, POISON), Err(Errno::NODATA));
    assert_eq!(state(&there), "paused", "as at its source");
    there.tell("cont");
    drop(vm);
    there.remembers();
    there.works();
    pool.check();
    there.boot.shut_down();
    unmount(pool);
}

/// The bytes of a subpage are lost. Where the machine goes, they stay lost; where it stays, too.
fn lost_memory_moves_with_its_machine() {
    let (pool, work) = (pool(2), tempfile::tempdir().unwrap());
    let (memory, other) = (pool.join("vm0"), pool.join("vm1"));
    let mut vm = Vm::start(&memory, work.path());
    vm.remembers();
    let place = vm.unused();
    let lose = || set(&memory, LOSSES, format!("{place} {SUBPAGE} hw")).unwrap();
    let salvage = format!("salvage {place} {SUBPAGE}");
    let is_lost = |memory: &Path| {
        let list = get(memory, POISON).unwrap();
        assert_eq!(list.lines().count(), 1, "{list}");
        assert!(list.starts_with(&format!("{place:#x} 0x1000 ")), "{list}");
        assert_eq!(set(memory, REPAIR, &salvage), Err(Errno::NODATA));
    };
    lose();
    is_lost(&memory);
    let list = work.path().join("losses");
    fs::write(&list, format!("hugetlb2-losses 1\nlost ram {place} 4096\nmoved running\n")).unwrap();
    let (has_come, said) = receive(&vm, File::open(&list).unwrap());
    assert!(!has_come && said.contains("zeros in place of lost bytes"), "{said}");
    is_lost(&memory);
    assert_eq!(state(&vm), "running");
    vm.works();
    // The command is asked to end, and then killed, when the memory has begun to move.
    vm.tell("migrate_set_parameter max-bandwidth 1M");
    for signal in [Signal::TERM, Signal::KILL] {
        let (there, to) = target(&other, work.path());
        there.tell("info status");
        let mut out = migrate_out(&vm, &to).stdout(Stdio::null()).spawn().unwrap();
        vm.wait_until_migration_is("active");
        assert_eq!(state(&vm), "paused", "it stands still");
        kill_process(Pid::from_child(&out), signal).unwrap();
        assert!(!out.wait().unwrap().success());
        if signal == Signal::KILL {
            vm.tell("migrate_cancel");
            vm.wait_until_migration_is("cancelled");
        } else {
            is_lost(&memory);
            assert_eq!(state(&vm), "running");
        }
        drop(there);
        fs::remove_file(&other).unwrap();
    }
    assert_eq!(get(&memory, POISON), Err(Errno::NODATA), "zeros, which the machine has not seen");
    // No machine waits there.
    refused(&mut migrate_out(&vm, &format!("tcp:127.0.0.1:{}", free_port())), "as it was");
    is_lost(&memory);
    vm.tell("migrate_set_parameter max-bandwidth 1G");
    let (mut there, to) = target(&other, work.path());
    there.tell("info status");
    refused(&mut migrate_in(&there), "no losses");
    migrate(&vm, &there, &to);
    drop(vm);
    is_lost(&other);
    there.tell("cont"); // at its source it stood still, as the killed command had left it
    there.remembers();
    there.works();
    is_lost(&other);
    set(&other, REPAIR, "zero all").unwrap();
    pool.check();
    there.boot.shut_down();
    unmount(pool);
}

// ---- postcopy -----------------------------------------------------------------------------------

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
    target.is_ended_by_sigbus();
    vm.works();
    pool.check();
    vm.boot.shut_down();
    drop(target);
    unmount(pool);
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
    unmount(pool);
}
