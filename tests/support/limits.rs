//! Limits: no test waits without end, and a limit that passes names the event that the test waited
//! for.
//!
//! A wait is in a table from its beginning to its end. A thread, the watchdog, sleeps until the
//! nearest limit. When a limit passes, the watchdog writes the name of the event to standard error
//! and applies the wait's [`Remedy`]:
//!
//! ```text
//!   a wait for         the watchdog             then
//!   a process          kills the process        the wait ends, and the test panics with its name
//!   calls to a mount   disconnects the mount    the calls fail, and the test panics
//!   anything else      ends this program: it lists all waits, describes all threads,
//!                      disconnects the mounts and kills the processes of all waits, and calls
//!                      abort(3)
//! ```
//!
//! A wait that goes on for [`GRACE`] after its remedy ends the program, too. So does SIGTERM, by
//! which timeout(1) ends a test program (`tests/run`). A program that only died would stay: a
//! thread that waits for the answer to a FUSE request cannot be killed (fs/fuse/dev.c,
//! request_wait_answer).

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use signal_hook::consts::SIGTERM;
use signal_hook::iterator::Signals;
use std::collections::BTreeMap;
use std::fmt::{Display, Formatter, Write as _};
use std::io::Write as _;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, Once, PoisonError};
use std::time::{Duration, Instant};

/// The limit for a program: the slowest of our own takes some seconds on an idle machine. All
/// limits leave room for a machine that runs ten other programs at the same time.
pub const PROGRAM: Duration = Duration::from_secs(300);

/// The limit for a compiler on a busy machine.
pub const BUILD: Duration = Duration::from_secs(1800);

/// The limit for an answer of a process, for the end of a killed process, and for all that the
/// kernel or the worker does by itself.
pub const ANSWER: Duration = Duration::from_secs(120);

/// A remedy takes effect within this time.
pub const GRACE: Duration = Duration::from_secs(10);

/// The watchdog's way to end a wait.
pub enum Remedy {
    /// Ends this program, because nothing less helps.
    End,
    /// Kills the process that a pidfd names.
    Kill(OwnedFd),
    /// Makes every call to a mount fail (umount2(2), MNT_FORCE), takes the mount away, and kills
    /// its supervisor.
    Disconnect { mount_point: PathBuf, supervisor: Option<OwnedFd> },
}

impl Remedy {
    fn apply(&self) {
        match self {
            Self::End => (),
            Self::Kill(process) => kill(process),
            Self::Disconnect { mount_point, supervisor } => {
                let _ = unmount(mount_point, UnmountFlags::FORCE); // EBUSY while calls return
                // EINVAL if nothing is mounted any more.
                let _ = unmount(mount_point, UnmountFlags::DETACH);
                supervisor.iter().for_each(kill);
            }
        }
    }
}

/// ESRCH is no failure: the process has ended.
fn kill(process: &OwnedFd) {
    let _ = pidfd_send_signal(process, Signal::KILL);
}

// ---- the table ----------------------------------------------------------------------------------

struct Wait {
    what: String,
    limit: Duration,
    /// The time at which the watchdog acts next.
    until: Instant,
    remedy: Remedy,
    /// True if the watchdog has applied the remedy.
    overdue: bool,
}

impl Display for Wait {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "limit of {:?} for {}", self.limit, self.what)
    }
}

struct Table {
    waits: BTreeMap<u64, Wait>,
    next: u64,
    /// The notes of this process's threads, by thread id.
    notes: BTreeMap<i32, String>,
}

static TABLE: Mutex<Table> =
    Mutex::new(Table { waits: BTreeMap::new(), next: 0, notes: BTreeMap::new() });
static CHANGED: Condvar = Condvar::new();

fn table() -> MutexGuard<'static, Table> {
    TABLE.lock().unwrap_or_else(PoisonError::into_inner) // each change of the table is one call
}

/// A wait that has begun. Its drop ends it, and panics if the limit has passed.
pub struct Waiting(u64);

/// Begins a wait for `what`.
pub fn begin(limit: Duration, what: impl Into<String>, remedy: Remedy) -> Waiting {
    let mut table = table();
    if table.next == 0 {
        spawn(watch);
    }
    let number = table.next;
    table.next += 1;
    let wait =
        Wait { what: what.into(), limit, until: Instant::now() + limit, remedy, overdue: false };
    table.waits.insert(number, wait);
    CHANGED.notify_all();
    Waiting(number)
}

impl Waiting {
    /// Replaces the remedy: the test now waits for another process.
    pub fn amend(&self, remedy: Remedy) {
        table().waits.get_mut(&self.0).expect("it has not ended").remedy = remedy;
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let wait = table().waits.remove(&self.0).expect("it has not ended");
        assert!(!wait.overdue || std::thread::panicking(), "{wait} has passed");
    }
}

/// Notes the work of this thread, for the list that the watchdog prints when it ends the program.
pub fn note(what: impl Into<String>) {
    table().notes.insert(rustix::thread::gettid().as_raw_nonzero().get(), what.into());
}

// ---- the watchdog -------------------------------------------------------------------------------

/// Starts a thread with a name of its own. Otherwise the list of threads would show the name of the
/// test that began the first wait.
fn spawn(work: impl FnOnce() + Send + 'static) {
    std::thread::Builder::new().name("watchdog".to_owned()).spawn(work).expect("a thread");
}

fn watch() {
    let mut table = table();
    loop {
        let now = Instant::now();
        table = match table.waits.values().map(|wait| wait.until).min() {
            None => CHANGED.wait(table).unwrap_or_else(PoisonError::into_inner),
            Some(next) if next > now => {
                let woken = CHANGED.wait_timeout(table, next - now);
                woken.unwrap_or_else(PoisonError::into_inner).0
            }
            Some(_) => {
                table.act(now);
                table
            }
        };
    }
}

impl Table {
    /// Acts on the waits whose limit has passed.
    fn act(&mut self, now: Instant) {
        for wait in self.waits.values_mut().filter(|wait| wait.until <= now) {
            if wait.overdue || matches!(wait.remedy, Remedy::End) {
                let why = format!("{wait}");
                return give_up(self, &why);
            }
            say(&format!("{wait} has passed\n"));
            wait.overdue = true;
            wait.until = now + GRACE;
            wait.remedy.apply();
        }
    }
}

/// Ends this program, and everything that it waits for.
fn give_up(table: &Table, why: &str) {
    let mut list = format!("{why} ends this program, which waits for\n");
    for wait in table.waits.values() {
        let _ = writeln!(list, "  {} (limit {:?})", wait.what, wait.limit);
    }
    say(&(list + &threads(&table.notes)));
    table.waits.values().for_each(|wait| wait.remedy.apply());
    std::process::abort();
}

/// Describes each thread of this process: its name, its note, and its place in the kernel
/// (proc(5)).
fn threads(notes: &BTreeMap<i32, String>) -> String {
    let tasks = std::fs::read_dir("/proc/self/task").into_iter().flatten().filter_map(Result::ok);
    let describe = |task: std::fs::DirEntry| {
        let read = |name: &str| std::fs::read_to_string(task.path().join(name)).unwrap_or_default();
        let id: Option<i32> = task.file_name().to_str().and_then(|id| id.parse().ok());
        let note = id.and_then(|id| notes.get(&id)).map(String::as_str).unwrap_or_default();
        let stack = read("stack"); // empty if this process may not look
        let stack: Vec<&str> =
            stack.lines().filter_map(|line| line.split(' ').nth(1)).take(5).collect();
        format!("  thread {} {note} {}\n", read("comm").trim_end(), stack.join(" < "))
    };
    tasks.map(describe).collect()
}

/// Writes to standard error itself: the output of eprintln! belongs to a test, and is shown when
/// that test has ended.
fn say(text: &str) {
    let _ = std::io::stderr().write_all(text.as_bytes());
}

// ---- waits --------------------------------------------------------------------------------------

/// Waits in `wait` for `what`; ends this program when the limit passes.
pub fn within<T>(limit: Duration, what: &str, wait: impl FnOnce() -> T) -> T {
    let _waiting = begin(limit, what, Remedy::End);
    wait()
}

/// Calls `holds` again and again until it returns true. Only for conditions that no event
/// announces.
pub fn until(limit: Duration, what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + limit;
    while !holds() {
        assert!(Instant::now() < end, "limit of {limit:?} for {what} has passed");
        std::thread::yield_now();
    }
}

/// Waits until poll(2) reports POLLIN of `file`: a pidfd whose process has ended, or a pipe with
/// something to read.
pub fn readable(limit: Duration, what: &str, file: impl AsFd) {
    assert!(is_readable(limit, file), "limit of {limit:?} for {what} has passed");
}

pub fn is_readable(limit: Duration, file: impl AsFd) -> bool {
    let timeout = Timespec::try_from(limit).expect("a limit in seconds");
    poll(&mut [PollFd::new(&file, PollFlags::IN)], Some(&timeout)).expect("poll works") == 1
}

/// Runs a program to its end, without input, and returns its output. A program that cannot be
/// started is an error.
pub fn output(limit: Duration, command: &mut Command) -> std::io::Result<Output> {
    let child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    collect(limit, &format!("{command:?}"), child)
}

/// Waits for the end of a child, and returns its output on the pipes.
pub fn collect(limit: Duration, what: &str, child: Child) -> std::io::Result<Output> {
    let _waiting = begin(limit, format!("the end of {what}"), Remedy::Kill(process(&child)));
    child.wait_with_output()
}

/// Waits for the end of a child.
pub fn exit(limit: Duration, what: &str, child: &mut Child) -> ExitStatus {
    if let Some(status) = child.try_wait().expect("it is a child") {
        return status; // an earlier wait for the child is no error
    }
    let _waiting = begin(limit, format!("the end of {what}"), Remedy::Kill(process(child)));
    child.wait().expect("it is a child")
}

/// Opens a pidfd of a child that nothing has waited for yet.
pub fn process(child: &Child) -> OwnedFd {
    let pid = Pid::from_raw(child.id() as i32).expect("a process id");
    pidfd_open(pid, PidfdFlags::empty()).expect("it has not been waited for")
}

// ---- the limit of a test ------------------------------------------------------------------------

static TEST: AtomicU64 = AtomicU64::new(900);

/// Sets the limit of each test of this program, in seconds; the default is 900.
pub fn allow(seconds: u64) {
    TEST.store(seconds, Ordering::Relaxed);
}

/// Makes SIGTERM end this program in the way in which a passed limit does.
fn listen() {
    let mut signals = Signals::new([SIGTERM]).expect("a handler for SIGTERM");
    spawn(move || {
        signals.forever().next();
        give_up(&table(), "SIGTERM");
    });
}

/// Begins the time of a test that uses a mount: calls to the mount have no limit of their own.
pub fn test(mount_point: &Path, supervisor: Option<OwnedFd>) -> Waiting {
    static LISTENING: Once = Once::new();
    LISTENING.call_once(listen);
    let thread = std::thread::current();
    let name = thread.name().unwrap_or("a test");
    let what = format!("the end of {name}, which uses {}", mount_point.display());
    let limit = Duration::from_secs(TEST.load(Ordering::Relaxed));
    begin(limit, what, Remedy::Disconnect { mount_point: mount_point.to_owned(), supervisor })
}
