//! A long change of a file gives way between its pieces, and ends early when its caller was killed.
//!
//! A caller that is killed waits on: the kernel answers its system call when the request is answered (fs/fuse/dev.c,
//! request_wait_answer), and only then lets the process go. The kernel would tell of the signal by FUSE_INTERRUPT, but fuser 0.18
//! answers that with ENOSYS, after which the kernel sends none. So the daemon looks for a pending SIGKILL itself.

use crate::error::{Error, Result};
use crate::pool::Holding;
use crate::sys::process::is_killed;
use parking_lot::RwLockWriteGuard;
use std::cell::Cell;
use std::time::{Duration, Instant};

/// The least time between two looks at the caller: a look reads a file in /proc, which takes some 20 us.
const BETWEEN_LOOKS: Duration = Duration::from_millis(10);

/// The pace of one request.
#[derive(Debug)]
pub struct Pace {
    /// The thread that waits for the answer; 0 where that is not known.
    caller: u32,
    looked: Cell<Instant>,
}

impl Pace {
    /// That of a request by the thread `caller`; 0 stands for one that is not known, whose death ends nothing.
    pub fn of(caller: u32) -> Self {
        Self { caller, looked: Cell::new(Instant::now()) }
    }

    /// Lets those who wait for the file have it first. The file may have changed when this returns.
    ///
    /// # Errors
    /// [`Error::Interrupted`] where the caller was killed: the change is to be ended or undone.
    pub fn give_way(&self, file: &mut RwLockWriteGuard<'_, Holding>) -> Result<()> {
        RwLockWriteGuard::bump(file);
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

    /// Waits until the pace has looked again.
    fn look(pace: &Pace) -> Result<()> {
        pace.looked.set(Instant::now().checked_sub(BETWEEN_LOOKS).expect("the machine is up"));
        pace.go_on()
    }

    #[test]
    fn a_caller_that_lives_or_is_unknown_is_not_interrupted() {
        assert!(look(&Pace::of(std::process::id())).is_ok());
        assert!(look(&Pace::of(0)).is_ok());
    }
}
