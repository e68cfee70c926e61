//! Processes and descriptors: fork(2), waitpid(2), prctl(2), sigwaitinfo(2), dup3(2).

use super::calls;
use crate::error::{Error, Result};
use rustix::fs::{AtFlags, CWD, StatxFlags};
use rustix::process::{
    Pid, Resource, Signal, WaitOptions, WaitStatus, getppid, getrlimit,
    set_parent_process_death_signal, waitpid,
};
use std::fmt::Display;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

/// The two results of [`fork`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fork {
    /// This is the calling process. The value is the process id of the child.
    Parent(Pid),
    /// This is the new process.
    Child,
}

/// Makes a copy of this process, which must have only one thread.
///
/// # Errors
/// EAGAIN, ENOMEM.
///
/// # Panics
/// If there are more threads: in the child, their locks would stay locked.
pub fn fork() -> Result<Fork> {
    assert_eq!(thread_count()?, 1, "a process with threads must not fork and go on");
    // SAFETY: there is one thread, so the child's memory is as consistent as the parent's.
    #[allow(unsafe_code)]
    match unsafe { libc::fork() } {
        0 => Ok(Fork::Child),
        -1 => Err(std::io::Error::last_os_error().into()),
        pid => Ok(Fork::Parent(Pid::from_raw(pid).expect("a process id is positive"))),
    }
}

/// The text for a refused thread or process, with the limits of their number (clone(2), EAGAIN).
pub fn explain_refusal(error: impl Display) -> String {
    format!(
        "{error}; pids.max of the daemon's cgroup or kernel.threads-max is too low, or memory is short"
    )
}

/// The text about a process that a signal has ended.
pub fn explain_signal(signal: i32) -> String {
    let why = match Signal::from_named_raw(signal) {
        Some(Signal::KILL) => ", most likely by the OOM killer (the kernel log says so then)",
        Some(Signal::SYS) => {
            ", by a seccomp filter: the kernel log has the number of the system call"
        }
        _ => "; see the kernel log",
    };
    format!("ended by signal {signal}{why}")
}

/// The link count of /proc/self/task is 2 plus the number of threads (proc(5)). The call allocates
/// nothing.
fn thread_count() -> Result<u32> {
    let (flags, wanted) = (rustix::fs::AtFlags::empty(), rustix::fs::StatxFlags::NLINK);
    let stat = rustix::fs::statx(rustix::fs::CWD, c"/proc/self/task", flags, wanted)?;
    Ok(stat.stx_nlink.saturating_sub(2))
}

/// The kernel kills this process when `parent` ends.
///
/// # Errors
/// The errors of prctl(2). ESRCH if `parent` has ended before the call.
pub fn die_with(parent: Pid) -> Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    if getppid() == Some(parent) { Ok(()) } else { Err(Error::Os(rustix::io::Errno::SRCH)) }
}

/// The status of a child that has ended. None if the child still runs.
///
/// # Errors
/// The errors of waitpid(2).
pub fn ended(child: Pid) -> Result<Option<WaitStatus>> {
    Ok(waitpid(Some(child), WaitOptions::NOHANG)?.map(|(_, status)| status))
}

/// Waits until a child has ended.
///
/// # Errors
/// The errors of waitpid(2).
pub fn wait_for_end(child: Pid) -> Result<()> {
    loop {
        match waitpid(Some(child), WaitOptions::empty()) {
            Err(rustix::io::Errno::INTR) => {}
            other => return Ok(other.map(drop)?),
        }
    }
}

/// True if the thread with this id was killed and still has to notice it: SIGKILL is pending for
/// the thread itself. For every signal that ends a process, the kernel makes SIGKILL pending for
/// each of its threads (kernel/signal.c, complete_signal). A thread that /proc does not show counts
/// as alive.
pub fn is_killed(thread: u32) -> bool {
    const SIGKILL: u64 = 1 << (libc::SIGKILL - 1);
    let status = std::fs::read_to_string(format!("/proc/{thread}/status")).unwrap_or_default();
    let pending = status.lines().find_map(|line| line.strip_prefix("SigPnd:"));
    pending
        .and_then(|set| u64::from_str_radix(set.trim(), 16).ok())
        .is_some_and(|set| set & SIGKILL != 0)
}

/// Makes the descriptor `target` refer to the open file of `source`.
///
/// # Errors
/// The errors of dup3(2).
pub fn replace(target: BorrowedFd<'_>, source: impl AsFd) -> Result<()> {
    let source = source.as_fd().as_raw_fd();
    // SAFETY: the number of `target` stays open, and its owner keeps it. Only the open file behind
    // it changes.
    #[allow(unsafe_code)]
    match unsafe { libc::dup3(source, target.as_raw_fd(), libc::O_CLOEXEC) } {
        -1 => Err(std::io::Error::last_os_error().into()),
        _ => Ok(()),
    }
}

/// Copies a descriptor of another process (pidfd_getfd(2), Linux 5.6). `number` is the descriptor's
/// number in that process.
///
/// # Errors
/// EPERM without CAP_SYS_PTRACE, EBADF, ESRCH.
pub fn descriptor_of(process: impl AsFd, number: u32) -> Result<OwnedFd> {
    let fd = rustix::process::pidfd_getfd(
        process.as_fd(),
        i32::try_from(number).map_err(|_| Error::Os(rustix::io::Errno::BADF))?,
        rustix::process::PidfdGetfdFlags::empty(),
    )?;
    Ok(fd)
}

/// The descriptors of this process.
#[derive(Clone, Copy, Debug)]
pub struct Descriptors {
    /// The limit of their number (RLIMIT_NOFILE).
    pub most: u64,
    /// The number of open descriptors.
    pub open: u64,
}

/// Counts the descriptors of this process.
///
/// # Errors
/// The errors of statx(2): it fails if /proc is not mounted.
pub fn descriptors() -> Result<Descriptors> {
    // Since Linux 6.2, the size of the directory is the number of descriptors (fs/proc/fd.c).
    let stat = calls::statx(CWD, c"/proc/self/fd", AtFlags::empty(), StatxFlags::SIZE)?;
    let most = getrlimit(Resource::Nofile).current;
    Ok(Descriptors { most: most.unwrap_or(u64::MAX), open: stat.stx_size })
}

/// Signals that a thread waits for. They interrupt no call.
#[derive(Clone, Copy)]
pub struct Signals(libc::sigset_t);

impl Signals {
    /// Blocks `signals` for this thread and its children.
    ///
    /// # Errors
    /// EINVAL for a number that is no signal.
    pub fn block(signals: &[Signal]) -> Result<Self> {
        let mut set = MaybeUninit::uninit();
        // SAFETY: sigemptyset initialises the whole set.
        #[allow(unsafe_code)]
        let mut set: libc::sigset_t = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            set.assume_init()
        };
        for signal in signals {
            // SAFETY: the set is initialised. The default action replaces an inherited one: if a
            // process ignores SIGCHLD, the kernel does not tell it of the end of its children.
            #[allow(unsafe_code)]
            unsafe {
                libc::signal(signal.as_raw(), libc::SIG_DFL);
                libc::sigaddset(&raw mut set, signal.as_raw());
            };
        }
        let signals = Self(set);
        signals.mask(libc::SIG_BLOCK)?;
        Ok(signals)
    }

    /// Unblocks the signals for the calling thread and for the threads that it starts.
    ///
    /// # Errors
    /// None is known.
    pub fn unblock(self) -> Result<()> {
        self.mask(libc::SIG_UNBLOCK)
    }

    fn mask(self, how: libc::c_int) -> Result<()> {
        // SAFETY: the set is initialised, and the null pointer means that the former set is not
        // wanted.
        #[allow(unsafe_code)]
        match unsafe { libc::pthread_sigmask(how, &raw const self.0, std::ptr::null_mut()) } {
            0 => Ok(()),
            code => Err(std::io::Error::from_raw_os_error(code).into()),
        }
    }

    /// Waits for one of the signals, at most for the time `patience`. `None` if no signal has come.
    ///
    /// # Errors
    /// None is known.
    pub fn wait(self, patience: Option<Duration>) -> Result<Option<Signal>> {
        let timeout = patience.map(|patience| libc::timespec {
            tv_sec: patience.as_secs().try_into().unwrap_or(libc::time_t::MAX),
            tv_nsec: patience.subsec_nanos().into(),
        });
        let timeout = timeout.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        // SAFETY: the set and the time are initialised, and the null pointer means that no siginfo
        // is wanted.
        #[allow(unsafe_code)]
        match unsafe { libc::sigtimedwait(&raw const self.0, std::ptr::null_mut(), timeout) } {
            -1 => match std::io::Error::last_os_error().raw_os_error() {
                Some(libc::EAGAIN | libc::EINTR) => Ok(None),
                _ => Err(std::io::Error::last_os_error().into()),
            },
            number => Ok(Signal::from_named_raw(number)),
        }
    }
}
