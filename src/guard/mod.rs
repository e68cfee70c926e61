//! Soft quarantines as memory errors of one process: each is a marker in its page tables
//! ([`crate::sys::markers`]) where the process maps the file shared and writable. `hugetlb2 guard`
//! loads a library into a program for that (`mount-helper/preload/`); a program in Rust calls
//! [`watch`] itself.
//!
//! ```text
//!   a thread of the program           the guard's thread                 the other thread
//!     maps a file
//!     watch: asks       ------------> takes the descriptor, reads
//!       and waits                     the list, sets the markers
//!     goes on           <------------
//!                                     reads the lists: now, and    <---- an alarm (POLLPRI)
//!                                     once a second
//!     changing: unmaps ----- SPACE ---- looks at /proc/self/maps, sets and removes markers
//! ```
//!
//! - **A marker hits no other mapping.** The guard's thread holds `SPACE` while it looks for the
//!   mappings of a file in /proc/self/maps and marks them, and the program holds it while it takes
//!   a mapping away ([`changing`]).
//! - **The program's descriptors are its own.** The guard's threads have a table of descriptors of
//!   their own, so the program cannot close theirs, and its locks (fcntl(2)) stay when they close.
//! - **The alarm is for others.** The guard reads the list by an attribute that does not end the
//!   alarm.
//! - **A repair has no event.** The guard looks once a second, and removes the markers of
//!   subpages that are quarantined no more.
//! - **Any program can be guarded.** The threads have all signals blocked. Nothing here takes
//!   memory of the program's allocator while a lock is held or a thread waits. The tables have a
//!   fixed size.
//! - **A child process starts without a guard** ([`watch`] in it starts one). The kernel gives it
//!   no markers.

mod texts;
mod watcher;

pub use texts::Area;

use crate::attributes::QUARANTINE;
use crate::error::{Error, Result};
use crate::sys::thread::{Gate, SignalsBlocked, after_fork, spawn};
use crate::units::Range;
use rustix::fs::{OFlags, fcntl_getfl, fgetxattr, fstatfs};
use rustix::process::getpid;
use rustix::thread::{futex, gettid};
use rustix::time::Timespec;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering};

/// Held while mappings are taken away, and while markers are set.
static SPACE: Gate = Gate::new();
/// Held while a thread asks.
static ASKING: Gate = Gate::new();
/// One of the states below.
static STATE: AtomicU32 = AtomicU32::new(NONE);
/// No thread runs.
const NONE: u32 = 0;
/// The guard's thread runs, in the process [`OWNER`].
const RUNS: u32 = 1;
/// The guard's thread has said why it cannot run.
const FAILED: u32 = 2;
/// The process that the guard's thread is in.
static OWNER: AtomicI32 = AtomicI32::new(0);
/// Rises when the guard's thread has something to do.
static BELL: AtomicU32 = AtomicU32::new(0);
/// The number of questions, and of answers.
static ASKED: AtomicU32 = AtomicU32::new(0);
static ANSWERED: AtomicU32 = AtomicU32::new(0);
/// The question: a thread and its descriptor of the file to watch, or [`ALL`].
static ASKING_THREAD: AtomicI32 = AtomicI32::new(0);
static ASKED_FILE: AtomicI32 = AtomicI32::new(ALL);
/// In place of a descriptor: set the markers of all files again.
const ALL: i32 = -1;
/// The errno that answers the question, or 0.
static ANSWER: AtomicI32 = AtomicI32::new(0);
/// True if an alarm has come.
static ALARM: AtomicBool = AtomicBool::new(false);
/// True if mappings were taken away.
static UNMAPPED: AtomicBool = AtomicBool::new(false);
/// The addresses between which all markers are that were ever set.
static LOWEST: AtomicU64 = AtomicU64::new(u64::MAX);
static HIGHEST: AtomicU64 = AtomicU64::new(0);

const SECOND: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// Makes each soft quarantine of `file` a memory error of this process, now and from now on, where
/// the process maps the file shared and writable. On return, those that the file has are marked. A
/// later one is marked as soon as the thread of the guard has read the list, and a marker is
/// removed within a second of the repair. This ends when the file is mapped no more.
///
/// A program that does not run under `hugetlb2 guard` calls this after each mapping of the file,
/// and takes mappings away in [`changing`].
///
/// # Errors
/// [`Error::Unsupported`] if `file` is not a file of a pool that is open for reading and writing.
/// The errors of userfaultfd(2), fgetxattr(2) and pidfd_getfd(2). ENFILE if the guard watches as
/// many files as it can.
pub fn watch(file: BorrowedFd<'_>) -> Result<()> {
    if is_of_pool(file) { ask(file.as_raw_fd()) } else { Err(Error::Unsupported) }
}

/// Runs `change`, which takes mappings away, or puts others in their places. No marker is set
/// meanwhile.
pub fn changing<T>(change: impl FnOnce() -> T) -> T {
    if STATE.load(Ordering::Acquire) == NONE {
        return change();
    }
    // A signal handler that takes a mapping away must not wait for the thread that it interrupts.
    let _signals = SignalsBlocked::new();
    let _held = SPACE.hold();
    let changed = change();
    UNMAPPED.store(true, Ordering::Release);
    changed
}

/// Sets the markers again that a call of the program has removed from `addresses`
/// (MADV_DONTNEED).
pub fn discarded(addresses: Range) {
    let has_markers = addresses.start < HIGHEST.load(Ordering::Acquire)
        && addresses.end > LOWEST.load(Ordering::Acquire);
    if has_markers {
        moved();
    }
}

/// Sets the markers in mappings that have moved or grown (mremap(2)).
pub fn moved() {
    if STATE.load(Ordering::Acquire) == RUNS {
        let _ = ask(ALL); // the thread says what it cannot do
    }
}

/// True for a file that can have markers. Costs one system call for a file of another filesystem.
fn is_of_pool(file: BorrowedFd<'_>) -> bool {
    const FUSE_SUPER_MAGIC: i64 = 0x6573_5546;
    let is_writable =
        || fcntl_getfl(file).is_ok_and(|flags| flags & OFlags::RWMODE == OFlags::RDWR);
    let has_list = || fgetxattr(file, QUARANTINE, &mut [0u8; 0][..]).is_ok();
    fstatfs(file).is_ok_and(|found| found.f_type == FUSE_SUPER_MAGIC) && is_writable() && has_list()
}

/// Asks the guard's thread, and waits for its answer. The first question starts the thread.
fn ask(file: i32) -> Result<()> {
    let _signals = SignalsBlocked::new();
    let _turn = ASKING.hold();
    if STATE.load(Ordering::Acquire) == NONE {
        start()?;
    }
    ASKED_FILE.store(file, Ordering::Relaxed);
    ASKING_THREAD.store(gettid().as_raw_pid(), Ordering::Relaxed);
    let number = ASKED.load(Ordering::Relaxed).wrapping_add(1);
    ASKED.store(number, Ordering::Release);
    ring();
    loop {
        let answered = ANSWERED.load(Ordering::Acquire);
        if answered == number {
            break;
        }
        let is_there = STATE.load(Ordering::Acquire) == RUNS
            && OWNER.load(Ordering::Relaxed) == getpid().as_raw_pid();
        if !is_there {
            return Err(Error::Unsupported);
        }
        let _ = futex::wait(&ANSWERED, futex::Flags::PRIVATE, answered, Some(&SECOND));
    }
    match ANSWER.load(Ordering::Relaxed) {
        0 => Ok(()),
        errno => Err(rustix::io::Errno::from_raw_os_error(errno).into()),
    }
}

/// Starts the guard's thread.
fn start() -> Result<()> {
    static KNOWS_CHILDREN: AtomicBool = AtomicBool::new(false);
    if !KNOWS_CHILDREN.swap(true, Ordering::Relaxed) {
        after_fork(forget)?;
    }
    OWNER.store(getpid().as_raw_pid(), Ordering::Relaxed);
    STATE.store(RUNS, Ordering::Release);
    spawn(watcher::run).inspect_err(|_| STATE.store(FAILED, Ordering::Release))
}

/// In a new child process: the guard's threads are not there, and neither are those that wait for
/// them.
extern "C" fn forget() {
    SPACE.break_open();
    ASKING.break_open();
    ANSWERED.store(ASKED.load(Ordering::Relaxed), Ordering::Relaxed);
    LOWEST.store(u64::MAX, Ordering::Relaxed);
    HIGHEST.store(0, Ordering::Relaxed);
    STATE.store(NONE, Ordering::Release);
}

/// Wakes the guard's thread.
fn ring() {
    BELL.fetch_add(1, Ordering::Release);
    let _ = futex::wake(&BELL, futex::Flags::PRIVATE, 1);
}
