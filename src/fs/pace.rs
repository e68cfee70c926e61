//! The rules by which a request that takes long makes room for others.
//!
//! A thread that serves the kernel's requests carries a request out only if that is short.
//! Otherwise the attempt ends with [`Error::TakesLong`] before anything has changed, and another
//! thread carries the request out from its beginning. There, a long change of a file gives way to
//! other requests between its pieces, and ends early when its caller was killed.
//!
//! A killed caller still waits: the kernel returns from its system call only when the daemon
//! answers the request (fs/fuse/dev.c, request_wait_answer), and the process cannot exit before
//! that. The kernel could report the signal by FUSE_INTERRUPT. But fuser 0.18 answers
//! FUSE_INTERRUPT with ENOSYS, and after that answer the kernel sends no more of them. So the
//! daemon itself looks for a pending SIGKILL.

use super::RequestContext;
use super::object::Locked;
use crate::error::{Error, Result};
use crate::sys::process::is_killed;
use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// The shortest time between two looks at the caller. A look reads a file in /proc, which takes
/// about 20 us.
const BETWEEN_LOOKS: Duration = Duration::from_millis(10);

/// The pace of one request.
#[derive(Debug)]
pub struct Pace {
    /// The thread serves requests, so other requests wait for it.
    brief: bool,
    /// The thread that waits for the answer. 0 if the daemon does not know it.
    caller: u32,
    looked: Cell<Instant>,
    /// Set when the agent whose work this is has to end.
    stopped: Option<Arc<AtomicBool>>,
}

impl Pace {
    /// The pace of a request.
    pub fn of(request: RequestContext) -> Self {
        Self { brief: request.brief, caller: request.thread, ..Self::steady() }
    }

    /// The pace of the daemon's own work, which the death of no caller ends.
    pub fn steady() -> Self {
        Self { brief: false, caller: 0, looked: Cell::new(Instant::now()), stopped: None }
    }

    /// The pace of an agent's work, which ends early once `stopped` is set.
    pub fn until(stopped: Arc<AtomicBool>) -> Self {
        Self { stopped: Some(stopped), ..Self::steady() }
    }

    /// Refuses long work on a thread for which other requests wait. The caller must not have
    /// changed anything yet.
    ///
    /// # Errors
    /// [`Error::TakesLong`].
    pub fn refuse_if(&self, takes_long: impl FnOnce() -> Result<bool>) -> Result<()> {
        if self.brief && takes_long()? { Err(Error::TakesLong) } else { Ok(()) }
    }

    /// Takes a lock. A thread for which other requests wait takes it only if it is free.
    ///
    /// # Errors
    /// [`Error::TakesLong`] if the lock is not free.
    pub fn lock<G>(
        &self,
        take: impl FnOnce() -> G,
        try_take: impl FnOnce() -> Option<G>,
    ) -> Result<G> {
        if self.brief { try_take().ok_or(Error::TakesLong) } else { Ok(take()) }
    }

    /// Gives the lock of the file to the requests that wait for it, and takes the lock back after
    /// them. The file may be different when this returns.
    ///
    /// # Errors
    /// [`Error::Interrupted`] if the caller was killed, or the agent has to end. The change must
    /// end, or be undone.
    pub fn give_way(&self, file: &mut Locked<'_>) -> Result<()> {
        if !self.brief {
            file.let_others_go_first();
        }
        self.go_on()
    }

    /// As [`Pace::give_way`], for work that holds no lock at the moment.
    ///
    /// # Errors
    /// The errors of [`Pace::give_way`].
    pub fn go_on(&self) -> Result<()> {
        if self.stopped.as_ref().is_some_and(|stopped| stopped.load(Ordering::Relaxed)) {
            return Err(Error::Interrupted);
        }
        if self.caller == 0 || self.looked.get().elapsed() < BETWEEN_LOOKS {
            return Ok(());
        }
        self.looked.set(Instant::now());
        if is_killed(self.caller) { Err(Error::Interrupted) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(thread: u32, brief: bool) -> Pace {
        let (unique, user, resent, unprivileged) = (1, 0, false, false);
        Pace::of(RequestContext { unique, resent, user, thread, unprivileged, brief })
    }

    /// Acts as if the last look at the caller was long ago.
    fn look(pace: &Pace) -> Result<()> {
        pace.looked.set(Instant::now().checked_sub(BETWEEN_LOOKS).expect("the machine is up"));
        pace.go_on()
    }

    #[test]
    fn a_caller_that_lives_or_is_unknown_is_not_interrupted() {
        assert!(look(&of(std::process::id(), false)).is_ok());
        assert!(look(&of(0, false)).is_ok());
    }

    #[test]
    fn the_work_of_an_agent_ends_when_the_agent_has_to() {
        let stopped = Arc::new(AtomicBool::new(false));
        let pace = Pace::until(stopped.clone());
        assert!(pace.go_on().is_ok());
        stopped.store(true, Ordering::Relaxed);
        assert!(matches!(pace.go_on(), Err(Error::Interrupted)));
    }

    #[test]
    fn only_a_thread_that_others_wait_for_refuses_what_takes_long() {
        assert!(matches!(of(0, true).refuse_if(|| Ok(true)), Err(Error::TakesLong)));
        assert!(of(0, true).refuse_if(|| Ok(false)).is_ok());
        assert!(of(0, false).refuse_if(|| panic!("it is not asked")).is_ok());
        assert!(matches!(of(0, true).lock(|| 1, || None), Err(Error::TakesLong)));
        assert_eq!(of(0, false).lock(|| 1, || None).unwrap(), 1);
    }
}
