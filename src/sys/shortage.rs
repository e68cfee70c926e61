//! A shortage of memory. If a thread asks for memory and none is there, the kernel's OOM killer
//! would end a process for it, perhaps a process of a stranger. The daemon's threads never cause
//! that: each is an *IO flusher* (PR_SET_IO_FLUSHER, prctl(2), Linux 5.6).
//!
//! ```text
//!   a call asks for a page, and there is none                 (any other thread: the OOM
//!     |                                                        killer ends a process)
//!     +--> the kernel takes back unused memory, by kswapd --> again
//!                 ^                                             |
//!                 +------------- still none --------------------+--> PATIENCE is over:
//!                                                                    SIGKILL for this worker
//! ```
//!
//! The requests of such a thread lack __GFP_FS, and for a request without it the kernel's
//! `out_of_memory` kills no process. The kernel lets the thread try again, unless the thread itself
//! is being killed (mm/oom_kill.c, Linux 6.12 and 6.18). So a call on memory waits until there is
//! some, and [`patiently`] ends the wait: the worker dies. The next worker finishes or undoes the
//! change that was under way. A request that workers die of again and again is refused alone
//! ([`crate::fuse`]). A next worker that waits as long for the same memory dies as well, before it
//! serves; after ten such workers the supervisor refuses all requests for a while. The OOM killer
//! of a memory *cgroup* is not held off: it ends processes of the daemon's own cgroup.
//!
//! For the lack of __GFP_FS the kernel does not compact memory to make 2 MiB in one piece either
//! (mm/compaction.c, `try_to_compact_pages`). A call that asks for 2 MiB or nothing never leads to
//! the OOM killer, so such a call may run as no IO flusher ([`with_effort`]).

use crate::error::Result;
use rustix::process::configure_io_flusher_behavior;
use std::cell::RefCell;
use std::time::Duration;

/// The time for which a call may wait for memory. To take a piece needs some milliseconds, and a
/// second on a busy machine.
const PATIENCE: Duration = Duration::from_secs(10);

/// From now on the kernel does not call its OOM killer for this thread, nor for threads and
/// processes that it starts.
///
/// # Errors
/// EPERM without CAP_SYS_RESOURCE.
pub fn spare_others() -> Result<()> {
    Ok(configure_io_flusher_behavior(true)?)
}

/// Makes a call that asks the kernel for 2 MiB or nothing. The kernel uses all its means to get the
/// 2 MiB in one piece.
pub(super) fn with_effort<T>(call: impl FnOnce() -> T) -> T {
    let is_sparing = rustix::process::is_io_flusher().unwrap_or(false);
    if !is_sparing || configure_io_flusher_behavior(false).is_err() {
        return call();
    }
    let result = call();
    configure_io_flusher_behavior(true).expect("a capability that was there a moment ago");
    result
}

thread_local! {
    static TIMER: RefCell<Option<Timer>> = const { RefCell::new(None) };
}

/// Makes a call that may wait for memory. If the call waits for too long, the kernel kills this
/// process.
pub(super) fn patiently<T>(call: impl FnOnce() -> T) -> T {
    set_timer(PATIENCE);
    let result = call();
    set_timer(Duration::ZERO);
    result
}

fn set_timer(after: Duration) {
    TIMER.with_borrow_mut(|timer| {
        if timer.is_none() {
            *timer = Timer::new();
        }
        timer.iter().for_each(|timer| timer.set(after));
    });
}

/// A timer of the calling thread, which sends SIGKILL to the process (timer_create(2)). The kernel
/// deletes the timer with the process.
struct Timer(libc::timer_t);

impl Timer {
    /// `None` where the kernel has no memory for a timer.
    fn new() -> Option<Self> {
        // SAFETY: sigevent is integers and a pointer, and SIGEV_SIGNAL does not use the pointer.
        #[allow(unsafe_code)]
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        (event.sigev_notify, event.sigev_signo) = (libc::SIGEV_SIGNAL, libc::SIGKILL);
        let mut timer = std::ptr::null_mut();
        // SAFETY: both structures are alive for the call.
        #[allow(unsafe_code)]
        let created =
            unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer) }
                == 0;
        created.then_some(Self(timer))
    }

    /// Sets the timer to go off after `after`. Zero stops it.
    fn set(&self, after: Duration) {
        let value = libc::timespec {
            tv_sec: after.as_secs() as libc::time_t,
            tv_nsec: after.subsec_nanos().into(),
        };
        let once = libc::itimerspec {
            it_interval: libc::timespec { tv_sec: 0, tv_nsec: 0 },
            it_value: value,
        };
        // SAFETY: the timer lives as long as this object, and the structure is alive for the call.
        #[allow(unsafe_code)]
        let result =
            unsafe { libc::timer_settime(self.0, 0, &raw const once, std::ptr::null_mut()) };
        debug_assert_eq!(result, 0, "timer_settime(2) fails for what is no timer only");
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        // SAFETY: this object made the timer, and deletes it once.
        #[allow(unsafe_code)]
        unsafe {
            libc::timer_delete(self.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, Stdio};

    #[test]
    fn a_call_that_waits_for_too_long_ends_the_process() {
        const NAME: &str = "sys::shortage::tests::a_call_that_waits_for_too_long_ends_the_process";
        const ROLE: &str = "HUGETLB2_TEST_ENDS";
        if std::env::var_os(ROLE).is_some() {
            patiently(|| ()); // the call ends in time
            set_timer(Duration::from_millis(1));
            std::thread::sleep(Duration::from_secs(60)); // a call that waits
            return;
        }
        let mut child = Command::new(std::env::current_exe().unwrap());
        let status =
            child.args(["--exact", NAME]).env(ROLE, "").stdout(Stdio::null()).status().unwrap();
        assert_eq!(status.signal(), Some(libc::SIGKILL), "{status}");
    }
}
