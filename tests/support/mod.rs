//! The base of the tests: real mounts, which go away at the end of a test in every case, and other
//! processes that map files.
#![allow(dead_code, missing_docs, unused_imports)]

pub mod cgroup;
pub mod documents;
pub mod limits;
pub mod place;
pub mod sys;
pub mod toucher;

use limits::{Remedy, Waiting};
use rustix::fs::inotify;
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Once;
use std::time::{Duration, Instant};

pub const SUBPAGE: u64 = 4096;
pub const FOLIO: u64 = 2 << 20;
pub const GIB: u64 = 1 << 30;

pub use toucher::Toucher;

pub use hugetlb2fs::attributes::{
    CHECK, COLLAPSE, DIE, FAIL, INJECT, LOSSES, MAP, OPEN, OPTIONS, PLACEMENT, POISON, POOL,
    QUARANTINE, REFUSAL, REPAIR, SIZE, STEPS, STOPPED, TARGETS,
};

/// The program under test. It acts by the name under which it is called (argv[0]).
pub fn hugetlb2() -> Command {
    Command::new(program())
}

fn program() -> PathBuf {
    built("HUGETLB2_PROGRAM", option_env!("CARGO_BIN_EXE_hugetlb2"))
}

/// A program that cargo has built for these tests, unless the environment names another. The lab's
/// machine needs that: its programs lie elsewhere, and cargo does not run the tests there.
fn built(variable: &str, path: Option<&str>) -> PathBuf {
    let named = std::env::var_os(variable).map(PathBuf::from);
    named.or(path.map(PathBuf::from)).unwrap_or_else(|| panic!("{variable} is not set"))
}

/// `hugetlb2 guard --`, which takes a program and its arguments.
pub fn guard() -> Command {
    static BUILT: Once = Once::new();
    if std::env::var_os("HUGETLB2_PROGRAM").is_none() {
        BUILT.call_once(build_guard);
    }
    let mut command = hugetlb2();
    command.args(["guard", "--"]);
    command
}

/// Has cargo build the library of `hugetlb2 guard` beside the program: cargo builds the programs of
/// a package for its tests, and not the libraries of others. With the examples, the packages have
/// the features that they have in tests.
fn build_guard() {
    let program = program();
    let (directory, profile) = (program.parent().unwrap(), program.parent().unwrap().file_name());
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(env!("CARGO_MANIFEST_DIR")).args(["build", "--quiet", "--lib", "--examples"]);
    cargo.arg("--target-dir").arg(directory.parent().unwrap());
    if profile.is_some_and(|profile| profile == "release") {
        cargo.arg("--release");
    }
    let built = limits::output(limits::BUILD, &mut cargo).expect("cargo");
    assert!(built.status.success(), "{}", text(&built.stderr));
}

pub fn mount_hugetlb2() -> Command {
    let mut command = hugetlb2();
    command.arg0("mount.hugetlb2");
    command
}

/// Runs mount.hugetlb2 as a process of `cgroup`.
pub fn mount_hugetlb2_in(cgroup: &Path) -> Command {
    const ENTER: &str = r#"echo $$ >"$0/cgroup.procs" && exec -a mount.hugetlb2 "$@""#;
    let mut command = Command::new("bash");
    command.args(["-c", ENTER]).arg(cgroup).arg(program());
    command
}

pub fn umount_hugetlb2() -> Command {
    let mut command = hugetlb2();
    command.arg0("umount.fuse.hugetlb2");
    command
}

/// Runs a program to its end and returns its output. Panics unless it exits with 0.
pub fn run(command: &mut Command) -> String {
    let output = limits::output(limits::PROGRAM, command).expect("the program can be started");
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    );
    text(&output.stdout)
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs a program to its end and returns its exit status and its standard error.
pub fn status_and_error(command: &mut Command) -> (i32, String) {
    let output = limits::output(limits::PROGRAM, command).expect("the program can be started");
    let Output { status, stderr, .. } = output;
    (status.code().expect("it is not ended by a signal"), text(&stderr))
}

/// A pool that is mounted for the time of a test.
pub struct Pool {
    directory: tempfile::TempDir,
    daemon: Option<Daemon>,
    limit: Waiting,
}

impl Pool {
    /// Mounts `pages` pages of 2 MiB.
    pub fn small(pages: u64) -> Self {
        Self::mount(&format!("pagesize=2M,size={}", pages * FOLIO))
    }

    /// Mounts `pages` pages of 1 GiB.
    pub fn gigantic(pages: u64) -> Self {
        Self::mount(&format!("pagesize=1G,size={}", pages * GIB))
    }

    /// Mounts a pool with these options. When the test fails, it prints the daemon's log, unless
    /// the options name a log.
    pub fn mount(options: &str) -> Self {
        Self::mount_by(mount_hugetlb2(), options)
    }

    /// Mounts a pool by a command that ends as mount.hugetlb2.
    pub fn mount_by(mut mount: Command, options: &str) -> Self {
        let directory = tempfile::tempdir().expect("a directory for the test");
        std::fs::create_dir(directory.path().join("mnt")).expect("a mount point");
        let log = directory.path().join("log");
        let mount_point = directory.path().join("mnt");
        let log = if options.contains("log=") {
            String::new()
        } else {
            format!(",log={}", log.display())
        };
        run(mount.arg("test-pool").arg(&mount_point).arg("-o").arg(format!("{options}{log}")));
        let mut pool = Self { directory, daemon: None, limit: limits::test(&mount_point, None) };
        pool.note_new_daemon();
        pool
    }

    pub fn path(&self) -> PathBuf {
        self.directory.path().join("mnt")
    }

    /// A path in the pool.
    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path().join(name)
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    /// Waits until `text` is in the log, and returns the log.
    pub fn await_log(&self, text: &str) -> String {
        await_text(&self.directory.path().join("log"), text)
    }

    pub fn counters(&self) -> BTreeMap<String, u64> {
        counters(&self.path())
    }

    pub fn counter(&self, name: &str) -> u64 {
        self.counters()[name]
    }

    pub fn free_pages(&self) -> u64 {
        self.counter("pages_free")
    }

    /// Asserts that every invariant holds.
    pub fn check(&self) {
        let wrong = get(self.path(), CHECK).expect("the check attribute");
        assert_eq!(wrong, "", "the check found something\n{}", self.log());
    }

    pub fn daemon(&self) -> &Daemon {
        self.daemon.as_ref().expect("it is mounted")
    }

    /// Notes that another daemon has taken over.
    pub fn note_new_daemon(&mut self) {
        let daemon = Daemon::of(&self.path());
        let supervisor = Some(daemon.fd.try_clone().expect("a descriptor"));
        self.limit.amend(Remedy::Disconnect { mount_point: self.path(), supervisor });
        self.daemon = Some(daemon);
    }

    /// Waits until `pages` pages are free: the kernel forgets a file some time after its last user
    /// has ended.
    pub fn wait_for_free_pages(&self, pages: u64) {
        limits::until(limits::ANSWER, &format!("{pages} free pages"), || {
            self.free_pages() == pages
        });
    }

    /// Waits until no file without a name is left; the kernel forgets such a file late, too.
    pub fn wait_for_orphans(&self) {
        limits::until(limits::ANSWER, "the last file without a name", || {
            self.counter("orphans") == 0
        });
    }

    /// A child that another test of this program is starting has a copy of each descriptor here
    /// until its exec(2), and the kernel does not unmount before that.
    fn unmount_when_free(&self) {
        limits::until(limits::ANSWER, "the last descriptor on the mount", || {
            match unmount(self.path(), UnmountFlags::empty()) {
                Err(rustix::io::Errno::BUSY) => false,
                result => result.map(|()| true).expect("it is mounted"),
            }
        });
    }

    /// Unmounts now, and returns when the daemon has ended and its memory is free.
    pub fn unmount(mut self) {
        self.unmount_when_free();
        let daemon = self.daemon.take().expect("it is mounted");
        daemon.wait();
        self.assert_no_internal_error();
    }

    /// Asserts that no assertion of a worker has failed, but for the one that a test asks for. The
    /// next worker would hide that.
    fn assert_no_internal_error(&self) {
        let log = self.log();
        let mut errors = log.lines().filter(|line| line.contains("internal error"));
        let unasked = errors.find(|line| !line.contains("a request that the worker dies of"));
        assert_eq!(unasked, None, "a worker has ended by itself:\n{log}");
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("---- log of {}\n{}", self.path().display(), self.log());
        }
        if let Some(daemon) = self.daemon.take() {
            let detached = unmount(self.path(), UnmountFlags::DETACH);
            if !std::thread::panicking() {
                detached.expect("it is mounted");
                daemon.wait();
                self.assert_no_internal_error();
            }
        }
    }
}

/// Waits until the regular file `path` has `text` in it, and returns all of it.
pub fn await_text(path: &Path, text: &str) -> String {
    let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
    let changes = File::from(inotify::init(flags).expect("inotify"));
    inotify::add_watch(&changes, path, inotify::WatchFlags::MODIFY).expect("the file is there");
    let end = Instant::now() + limits::ANSWER;
    loop {
        let found = std::fs::read_to_string(path).expect("the file can be read");
        if found.contains(text) {
            return found;
        }
        let left = end.saturating_duration_since(Instant::now());
        limits::readable(left, &format!("{text:?} in this log:\n{found}"), &changes);
        let _ = (&changes).read(&mut [0; 4096]); // the next wait is for the next change
    }
}

/// A daemon, and a descriptor to wait for its end.
pub struct Daemon {
    pub pid: i32,
    fd: OwnedFd,
}

impl Daemon {
    pub fn of(mount_point: &Path) -> Self {
        let pid = counters(mount_point)["daemon_pid"] as i32;
        let fd = pidfd_open(Pid::from_raw(pid).expect("a process id"), PidfdFlags::empty())
            .expect("it runs");
        Self { pid, fd }
    }

    /// The process. The descriptor stays with it, even if the kernel gives its number to another
    /// process later.
    pub fn process(&self) -> &OwnedFd {
        &self.fd
    }

    /// Waits for its end.
    pub fn wait(&self) {
        limits::readable(limits::ANSWER, &format!("the end of the daemon {}", self.pid), &self.fd);
    }

    pub fn ends_within(&self, seconds: u64) -> bool {
        limits::is_readable(Duration::from_secs(seconds), &self.fd)
    }
}

pub fn counters(mount_point: &Path) -> BTreeMap<String, u64> {
    let text = get(mount_point, POOL).expect("the pool attribute");
    let row = |line: &str| {
        let (name, value) = line.split_once(' ').expect("name and value");
        (name.to_owned(), value.parse().expect("a number"))
    };
    text.lines().map(row).collect()
}

/// A line of the targets of a pool.
pub struct TargetLine {
    pub node: u32,
    pub kind: String,
    pub values: BTreeMap<String, String>,
}

impl TargetLine {
    /// The lines of a pool, in their order.
    pub fn all(pool: &Pool) -> Vec<Self> {
        let text = get(pool.path(), TARGETS).expect("the targets attribute");
        text.lines().map(Self::parse).collect()
    }

    fn parse(line: &str) -> Self {
        let mut words = line.split(' ');
        let node = words.next().and_then(|word| word.parse().ok()).expect("a node");
        let kind = words.next().expect("a kind").to_owned();
        let pair = |word: &str| {
            let (name, value) = word.split_once('=').expect("name and value");
            (name.to_owned(), value.to_owned())
        };
        Self { node, kind, values: words.map(pair).collect() }
    }

    pub fn value(&self, name: &str) -> &str {
        self.values.get(name).unwrap_or_else(|| panic!("node {} has no {name}", self.node))
    }

    pub fn number(&self, name: &str) -> u64 {
        self.value(name).parse().expect("a number")
    }
}

// ---- attributes ---------------------------------------------------------------------------------

pub fn get(path: impl AsRef<Path>, name: &str) -> rustix::io::Result<String> {
    let mut value = vec![0; 64 << 10];
    let length = rustix::fs::lgetxattr(path.as_ref(), name, &mut value[..])?;
    Ok(text(&value[..length]))
}

pub fn set(path: impl AsRef<Path>, name: &str, value: impl AsRef<[u8]>) -> rustix::io::Result<()> {
    rustix::fs::lsetxattr(path.as_ref(), name, value.as_ref(), rustix::fs::XattrFlags::empty())
}

/// Quarantines `length` bytes at `offset`.
/// Asks for a descriptor of a file's memory.
pub fn open_memory(path: impl AsRef<Path>) -> rustix::io::Result<File> {
    let (own, daemons) = UnixStream::pair().expect("a pair of sockets");
    set(path, OPEN, daemons.as_raw_fd().to_string())?;
    let memory = hugetlb2fs::sys::passing::receive(&own).expect("a message");
    Ok(memory.expect("a descriptor").into())
}

/// Waits until no program has the memory of a file open any more, and the daemon has noted that.
pub fn await_shut(path: impl AsRef<Path>) {
    let is_shut = || get(&path, OPEN) == Err(rustix::io::Errno::NODATA);
    limits::until(limits::ANSWER, "the end of a door", is_shut);
}

pub fn poison(path: impl AsRef<Path>, offset: u64, length: u64) -> rustix::io::Result<()> {
    set(path, POISON, format!("{offset} {length}"))
}

// ---- other programs -----------------------------------------------------------------------------

/// Starts a process, and returns when it has printed `word` as its first line.
pub fn start_until(word: &str, command: &mut Command) -> Child {
    let mut child = command.stdout(Stdio::piped()).spawn().expect("the program can be started");
    let mut output = BufReader::new(child.stdout.take().expect("a pipe"));
    let mut line = String::new();
    limits::readable(limits::ANSWER, &format!("{word:?} of {command:?}"), output.get_ref());
    output.read_line(&mut line).expect("it speaks");
    if line.trim_end() != word {
        end(&mut child, "a process that was to get ready");
        panic!("{command:?} says {line:?} and not {word:?}");
    }
    child
}

/// Kills a child and waits for its end.
pub fn end(child: &mut Child, what: &str) {
    let _ = child.kill(); // a child that has ended by itself needs the wait, too
    limits::exit(limits::ANSWER, what, child);
}

/// The bytes of a file that a process maps, and the bytes of these that huge entries map (proc(5),
/// /proc/PID/smaps).
pub fn huge_bytes(pid: u32, file: &Path) -> (u64, u64) {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).expect("the process runs");
    let path = format!(" {}", file.display());
    let (mut mapped, mut huge, mut is_of_file) = (0, 0, false);
    for line in smaps.lines() {
        let (name, value) = line.split_once(' ').expect("two words");
        let kibibytes = || value.trim().trim_end_matches(" kB").parse::<u64>().expect("a number");
        match name {
            "Size:" if is_of_file => mapped += kibibytes() << 10,
            "ShmemPmdMapped:" | "FilePmdMapped:" if is_of_file => huge += kibibytes() << 10,
            _ if name.ends_with(':') => (),
            _ => is_of_file = line.ends_with(&path), // the heading of a mapping
        }
    }
    (mapped, huge)
}

// ---- mounting -----------------------------------------------------------------------------------

impl Daemon {
    /// A daemon whose mount does not serve yet.
    pub fn with_pid(pid: i32) -> Self {
        let fd = pidfd_open(Pid::from_raw(pid).expect("a process id"), PidfdFlags::empty())
            .expect("it runs");
        Self { pid, fd }
    }
}

// ---- ending a worker ----------------------------------------------------------------------------

/// A worker, with a descriptor that cannot mean another process: the kernel may give the number of
/// an ended process to another at once.
pub struct Worker {
    pub pid: i32,
    pub process: OwnedFd,
}

impl Worker {
    /// The worker that serves now.
    pub fn of(pool: &Pool) -> Self {
        let pid = pool.counter("worker_pid") as i32;
        let process = pidfd_open(Pid::from_raw(pid).expect("a process id"), PidfdFlags::empty())
            .expect("it runs");
        Self { pid, process }
    }

    pub fn signal(&self, signal: Signal) {
        pidfd_send_signal(&self.process, signal).expect("it runs");
    }

    /// Stops the worker, and returns when each of its threads stands still.
    pub fn stop(&self) {
        self.signal(Signal::STOP);
        let is_stopped = |task: std::fs::DirEntry| {
            let stat = std::fs::read_to_string(task.path().join("stat")).expect("it is there");
            stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T'))
        };
        let tasks = || {
            std::fs::read_dir(format!("/proc/{}/task", self.pid))
                .expect("it runs")
                .map(Result::unwrap)
        };
        let what = format!("the stop of worker {}", self.pid);
        // Only the parent could wait for that.
        limits::until(limits::ANSWER, &what, || tasks().all(is_stopped));
    }

    /// Kills the worker, and returns when it is dead.
    pub fn kill(self) {
        self.signal(Signal::KILL);
        self.wait();
    }

    /// Returns when the worker is dead.
    pub fn wait(&self) {
        limits::readable(limits::ANSWER, &format!("the end of worker {}", self.pid), &self.process);
    }

    pub fn has_ended(&self) -> bool {
        limits::is_readable(Duration::ZERO, &self.process)
    }
}

/// Kills the worker; the next call waits for the next worker.
pub fn kill_worker(pool: &Pool) {
    Worker::of(pool).kill();
}

// ---- holding a worker at a step -----------------------------------------------------------------

/// Stops all threads of the worker that come to a step, until this value is dropped.
pub struct Held<'a>(&'a Pool);

impl<'a> Held<'a> {
    pub fn at(pool: &'a Pool, step: &str) -> Self {
        set(pool.path(), DIE, format!("hold {step}")).expect("a debug build");
        Self(pool)
    }

    /// Waits until a thread has stopped there.
    pub fn await_stop(&self) {
        limits::until(limits::ANSWER, "a thread that stops at a step", || {
            get(self.0.path(), STOPPED).expect("a debug build") != "0"
        });
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        set(self.0.path(), DIE, "release").expect("it is held");
    }
}

// ---- chance -------------------------------------------------------------------------------------

/// A generator of numbers (splitmix64). The numbers only need to differ from seed to seed.
pub struct Dice(pub u64);

impl Dice {
    pub fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.roll() % bound
    }
}
