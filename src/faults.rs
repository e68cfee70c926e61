//! System calls that fail when a test asks for it. In an emergency the kernel can refuse each of
//! these calls. Then the operation that made the call must leave everything as before.
//!
//! The functions of [`crate::sys`] call [`attempt`] before a system call that can fail for want of
//! memory, descriptors or room. A test arms one failure ([`arm`]): "the n-th call from now on that
//! can answer ENOMEM does so". [`report`] says afterwards where the failed call is in the code, or
//! that there were fewer than n calls. A release build contains nothing of this.
//!
//! The calls of the daemon's agents do not count ([`exempt`]), because a test cannot tell when an
//! agent makes a call.

use rustix::io::Errno;

/// The resource that a system call needs, and so the errors of the call in an emergency. Each call
/// can answer ENOMEM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// Kernel memory during the call. ENOMEM is the only error.
    Memory,
    /// A descriptor. The call can also answer EMFILE.
    Descriptor,
    /// Room in a filesystem or for an attribute. The call can also answer ENOSPC. (The length of an
    /// attribute causes no error here: the code that stores an attribute checks the length before
    /// it changes anything.)
    Room,
}

impl Want {
    /// True if such a call can answer `errno`.
    pub fn can_answer(self, errno: Errno) -> bool {
        match errno {
            Errno::NOMEM => true,
            Errno::MFILE => self == Self::Descriptor,
            Errno::NOSPC => self == Self::Room,
            _ => false,
        }
    }
}

/// The error with this name, if a test can ask for it.
#[cfg(debug_assertions)]
pub fn named(name: &str) -> Option<Errno> {
    const NAMES: &[(&str, Errno)] =
        &[("ENOMEM", Errno::NOMEM), ("EMFILE", Errno::MFILE), ("ENOSPC", Errno::NOSPC)];
    NAMES.iter().find(|row| row.0 == name).map(|row| row.1)
}

#[cfg(debug_assertions)]
mod armed {
    use super::Want;
    use rustix::io::Errno;
    use std::cell::Cell;
    use std::panic::Location;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicBool, Ordering};

    /// The armed failure, and its result.
    struct Plan {
        errno: Errno,
        nth: u64,
        /// All calls from the n-th on fail.
        lasts: bool,
        counted: u64,
        hit: Option<&'static Location<'static>>,
    }

    static PLAN: Mutex<Option<Plan>> = Mutex::new(None);
    /// Without a plan, calls need not take the lock of `PLAN`.
    static IS_ARMED: AtomicBool = AtomicBool::new(false);

    thread_local! {
        static IS_EXEMPT: Cell<bool> = const { Cell::new(false) };
    }

    /// From now on, the calls of this thread do not count and never fail.
    pub fn exempt() {
        IS_EXEMPT.set(true);
    }

    /// Counts the calls that can answer `errno`, from now on and from 1. The `nth` call fails with
    /// `errno`; if the emergency `lasts`, so does each call after it.
    pub fn arm(nth: u64, errno: Errno, lasts: bool) {
        let mut plan = PLAN.lock().expect("no panic while calls are counted");
        *plan = Some(Plan { errno, nth, lasts, counted: 0, hit: None });
        IS_ARMED.store(true, Ordering::SeqCst);
    }

    /// Ends the counting. Returns the place of the failed call, or the number of calls. The text is
    /// empty if no failure was armed.
    pub fn report() -> String {
        IS_ARMED.store(false, Ordering::SeqCst);
        let plan = PLAN.lock().expect("no panic while calls are counted").take();
        plan.map_or_else(String::new, |plan| match plan.hit {
            Some(place) => format!("failed {place}\n"),
            None => format!("counted {}\n", plan.counted),
        })
    }

    /// Announces a system call.
    ///
    /// # Errors
    /// The armed error. Then the function must not make the call.
    #[track_caller]
    pub fn attempt(want: Want) -> Result<(), Errno> {
        if !IS_ARMED.load(Ordering::SeqCst) || IS_EXEMPT.get() {
            return Ok(());
        }
        let mut plan = PLAN.lock().expect("no panic while calls are counted");
        let Some(plan) = plan.as_mut().filter(|plan| want.can_answer(plan.errno)) else {
            return Ok(());
        };
        plan.counted += 1;
        let fails = plan.counted == plan.nth || plan.lasts && plan.counted > plan.nth;
        if !fails {
            return Ok(());
        }
        plan.hit = Some(Location::caller());
        Err(plan.errno)
    }
}

#[cfg(debug_assertions)]
pub use armed::{arm, attempt, exempt, report};

/// Announces a system call.
///
/// # Errors
/// None.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn attempt(_want: Want) -> Result<(), Errno> {
    Ok(())
}

/// The calls of this thread do not count.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn exempt() {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_comes_of_calls_that_can_answer_it() {
        let answers =
            |errno| [Want::Memory, Want::Descriptor, Want::Room].map(|want| want.can_answer(errno));
        assert_eq!(answers(Errno::NOMEM), [true, true, true]);
        assert_eq!(answers(Errno::MFILE), [false, true, false]);
        assert_eq!(answers(Errno::NOSPC), [false, false, true]);
    }
}
