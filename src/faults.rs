//! System calls that fail when a test says so: each of them can be refused in an emergency, and what asked for it must be as before.
//!
//! The functions of [`crate::sys`] ask [`attempt`] before they make a call that can fail for want of memory, descriptors or room.
//! A test arms one failure ([`arm`]): "the n-th call from now on that can answer ENOMEM does so". [`report`] says afterwards
//! where that call was made, or that there were fewer than n. In a release build nothing of this is left.
//!
//! The daemon's own agents are not counted ([`exempt`]), because a test cannot tell when they call.

use rustix::io::Errno;

/// The errors that a call can answer with in an emergency. ENOMEM is one of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// Memory of the kernel's for the length of the call.
    Memory,
    /// A descriptor: EMFILE, too.
    Descriptor,
    /// Room in a filesystem, or for an attribute: ENOSPC, too. (No attribute is longer than it may be: who keeps one makes sure of
    /// that before anything changes.)
    Room,
}

impl Want {
    /// Whether such a call can answer `errno`.
    pub fn can_answer(self, errno: Errno) -> bool {
        match errno {
            Errno::NOMEM => true,
            Errno::MFILE => self == Self::Descriptor,
            Errno::NOSPC => self == Self::Room,
            _ => false,
        }
    }
}

/// The errors that a test can ask for, as their names have them.
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

    /// The failure to come, and what has come of it.
    struct Plan {
        errno: Errno,
        nth: u64,
        counted: u64,
        hit: Option<&'static Location<'static>>,
    }

    static PLAN: Mutex<Option<Plan>> = Mutex::new(None);
    /// Spares the calls of a daemon without a plan the lock.
    static IS_ARMED: AtomicBool = AtomicBool::new(false);

    thread_local! {
        static IS_EXEMPT: Cell<bool> = const { Cell::new(false) };
    }

    /// The calling thread's calls are not counted and never fail.
    pub fn exempt() {
        IS_EXEMPT.set(true);
    }

    /// The `nth` call from now on, counted from 1, that can answer `errno` answers it, once.
    pub fn arm(nth: u64, errno: Errno) {
        let mut plan = PLAN.lock().expect("no panic while calls are counted");
        *plan = Some(Plan { errno, nth, counted: 0, hit: None });
        IS_ARMED.store(true, Ordering::SeqCst);
    }

    /// Ends the counting. Says where the call was that failed, or how many calls there were; nothing if none was armed.
    pub fn report() -> String {
        IS_ARMED.store(false, Ordering::SeqCst);
        let plan = PLAN.lock().expect("no panic while calls are counted").take();
        plan.map_or_else(String::new, |plan| match plan.hit {
            Some(place) => format!("failed {place}\n"),
            None => format!("counted {}\n", plan.counted),
        })
    }

    /// A call is about to be made.
    ///
    /// # Errors
    /// What a test has armed; the call is not to be made then.
    #[track_caller]
    pub fn attempt(want: Want) -> Result<(), Errno> {
        if !IS_ARMED.load(Ordering::SeqCst) || IS_EXEMPT.get() {
            return Ok(());
        }
        let mut plan = PLAN.lock().expect("no panic while calls are counted");
        let Some(plan) = plan.as_mut().filter(|plan| want.can_answer(plan.errno)) else { return Ok(()) };
        plan.counted += 1;
        if plan.counted != plan.nth {
            return Ok(());
        }
        plan.hit = Some(Location::caller());
        Err(plan.errno)
    }
}

#[cfg(debug_assertions)]
pub use armed::{arm, attempt, exempt, report};

/// A call is about to be made.
///
/// # Errors
/// None.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn attempt(_want: Want) -> Result<(), Errno> {
    Ok(())
}

/// The calling thread's calls are not counted.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn exempt() {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_comes_of_calls_that_can_answer_it() {
        let answers = |errno| [Want::Memory, Want::Descriptor, Want::Room].map(|want| want.can_answer(errno));
        assert_eq!(answers(Errno::NOMEM), [true, true, true]);
        assert_eq!(answers(Errno::MFILE), [false, true, false]);
        assert_eq!(answers(Errno::NOSPC), [false, false, true]);
    }
}
