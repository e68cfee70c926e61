//! How long a request may keep its thread and the locks of files.
//!
//! A thread that serves the kernel's requests carries one out only if that is short. Otherwise it answers [`Error::TakesLong`] before
//! anything has changed, and the request is carried out once more on another thread. There, a long change of a file gives way
//! between its pieces, and ends early when its caller was killed.
//!
//! A caller that is killed waits on: the kernel answers its system call when the request is answered (fs/fuse/dev.c,
//! request_wait_answer), and only then lets the process go. The kernel would tell of the signal by FUSE_INTERRUPT, but fuser 0.18
//! answers that with ENOSYS, after which the kernel sends none. So the daemon looks for a pending SIGKILL itself.

use super::Ticket;
use super::object::Locked;
use crate::error::{Error, Result};
use crate::sys::process::is_killed;
use std::cell::Cell;
use std::time::{Duration, Instant};

/// The least time between two looks at the caller: a look reads a file in /proc, which takes some 20 us.
const BETWEEN_LOOKS: Duration = Duration::from_millis(10);

/// The pace of one request.
#[derive(Debug)]
pub struct Pace {
    /// Others wait for the thread.
    brief: bool,
    /// The thread that waits for the answer; 0 where that is not known.
    caller: u32,
    looked: Cell<Instant>,
}

impl Pace {
    /// That of a request.
    pub fn of(ticket: Ticket) -> Self {
        Self { brief: ticket.brief, caller: ticket.thread, looked: Cell::new(Instant::now()) }
    }

    /// That of what the daemon does by itself: no caller's death ends it.
    pub fn steady() -> Self {
        Self { brief: false, caller: 0, looked: Cell::new(Instant::now()) }
    }

    /// Whether others wait for the thread.
    pub fn is_brief(&self) -> bool {
        self.brief
    }

    /// Refuses what takes long on a thread that others wait for. To be asked before anything has changed.
    ///
    /// # Errors
    /// [`Error::TakesLong`].
    pub fn refuse_if(&self, takes_long: impl FnOnce() -> Result<bool>) -> Result<()> {
        if self.brief && takes_long()? { Err(Error::TakesLong) } else { Ok(()) }
    }

    /// A lock; on a thread that others wait for, only if that is free.
    ///
    /// # Errors
    /// [`Error::TakesLong`].
    pub fn lock<G>(&self, take: impl FnOnce() -> G, try_take: impl FnOnce() -> Option<G>) -> Result<G> {
        if self.brief { try_take().ok_or(Error::TakesLong) } else { Ok(take()) }
    }

    /// Lets those who wait for the file have it first. The file may have changed when this returns.
    ///
    /// # Errors
    /// [`Error::Interrupted`] where the caller was killed: the change is to be ended or undone.
    pub fn give_way(&self, file: &mut Locked<'_>) -> Result<()> {
        if !self.brief {
            file.let_others_go_first();
        }
        self.go_on()
    }

    /// The same for work that holds no lock at the moment.
    ///
    /// # Errors
    /// As for [`Pace::give_way`].
    pub fn go_on(&self) -> Result<()> {
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
        Pace::of(Ticket { number: 1, again: false, thread, unprivileged: false, brief })
    }

    /// Asks as if the last look at the caller were long ago.
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
    fn only_a_thread_that_others_wait_for_refuses_what_takes_long() {
        assert!(matches!(of(0, true).refuse_if(|| Ok(true)), Err(Error::TakesLong)));
        assert!(of(0, true).refuse_if(|| Ok(false)).is_ok());
        assert!(of(0, false).refuse_if(|| panic!("it is not asked")).is_ok());
        assert!(matches!(of(0, true).lock(|| 1, || None), Err(Error::TakesLong)));
        assert_eq!(of(0, false).lock(|| 1, || None).unwrap(), 1);
    }
}
