//! The steps of all changes that have more than one step. The process may die after each step, and
//! the next worker must be able to finish or undo the change.
//!
//! The code calls [`reached`] after each step. A test arms a step ([`arm`]), and the process kills
//! itself when it reaches this step. [`Step::ALL`] lists all steps, so the test can prove that it
//! has tried each one. [`tally`] counts the steps that a change reaches. A release build contains
//! nothing of this.
//!
//! A test can also stop threads at a step ([`hold`]), to see which requests go on while a change is
//! under way.
//!
//! To add a step, add three things: a line in the table below, a call of `reached` after the step,
//! and a situation in `tests/deaths.rs` that reaches the step. The test fails until it has such a
//! situation.

use crate::error::Result;
use rustix::process::{Signal, getpid, kill_process};
use std::time::{Duration, Instant};

macro_rules! steps {
    ($($operation:literal: $($step:ident = $what:literal),+;)+) => {
        /// A step. Its name says the change to which it belongs, and the state after the step.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u32)]
        pub enum Step {
            $($(
                #[doc = concat!("\"", $operation, "\": ", $what, ".")]
                $step,
            )+)+
        }

        impl Step {
            /// All steps, in the order of the table.
            pub const ALL: &[Self] = &[$($(Self::$step),+),+];

            /// The name of the change, and the state after the step.
            pub fn name(self) -> &'static str {
                match self {
                    $($(Self::$step => concat!($operation, ": ", $what)),+),+
                }
            }
        }
    };
}

steps! {
    "create": CreatePlace = "the object has a place", CreateAttached = "its superblock is there",
        CreateNamed = "the file has its name";
    "number": BackingIssued = "the kernel has given a number out", BackingKept = "it is kept with the file",
        BackingClosed = "the kernel has let go of the memory";
    "open natively": NativeNoted = "the descriptor is noted", NativeClosed = "it is struck out";
    "unlink": UnlinkOrphaned = "the file is linked among the orphans", UnlinkRemoved = "the name is gone or another's";
    "exchange": ExchangeWitnessed = "what it found is noted", ExchangeDone = "the names are exchanged";
    "allocate": AllocateAnnounced = "the size to come back to is noted", AllocateMoved = "the memory is there",
        AllocateTaken = "released pages are the file's again", AllocateDone = "the pages are the file's";
    "take": TakeLimit = "the superblock may have more blocks", TakeSize = "the file is longer",
        TakeFilled = "the memory is there";
    "cut": CutHoles = "quarantines behind the end are forgotten", CutSize = "the file is shorter",
        CutVacated = "the limit is lower", CutFilled = "the folio with the end is whole again";
    "give": GiveHoles = "quarantines are forgotten", GivePunched = "the memory is given up";
    "move out": MoveOutGiven = "the reserve has given a piece", MoveOutTaken = "the file has taken as much";
    "lend": LendGiven = "the reserve has given a folio", LendTaken = "a reserve has taken one";
    "move in": MoveInGiven = "the file has given a piece", MoveInTaken = "the reserve has taken as much";
    "relocate": RelocateNoted = "the home of the page is noted", RelocateGiven = "a reserve has given a piece",
        RelocateMoved = "the file's memory is on the other node", RelocateTaken = "the other reserve has taken as much",
        RelocateDone = "the page has its new home";
    "shrink": ShrinkMoved = "the memory is back in the reserve", ShrinkCut = "the file is shorter",
        ShrinkNoted = "the pages are given up", ShrinkDone = "those that were released are forgotten";
    "release": ReleaseNoted = "the pages are noted as released", ReleaseMoved = "the memory is back in the reserve";
    "punch": PunchNoted = "that there are gaps is noted", PunchDone = "the memory is given up";
    "take back what was punched": UnpunchFilled = "the gaps have memory", UnpunchDone = "the note is gone";
    "quarantine": QuarantineRaised = "the ledger may have blocks for it", QuarantineStored = "the ledger has the bytes",
        QuarantineRecorded = "the ledger's copy is the true one", QuarantinePunched = "the file is punched",
        QuarantineDone = "no block is free";
    "repair": RepairRaised = "the file may have blocks for it", RepairFilled = "the file has the bytes",
        RepairStruck = "the file's copy is the true one", RepairFreed = "the ledger's blocks are free",
        RepairDone = "no block is free";
    "door": DoorNoted = "the size to come back to is noted", DoorMounted = "the memory can be opened",
        DoorUnmounted = "no program has it open", DoorRestored = "the size is as noted", DoorForgotten = "the note is gone";
    "enlarge the pool": EnlargeGrown = "the reserve has the memory", EnlargeNoted = "the new size is noted";
    "reduce the pool": ReduceNoted = "the new size is noted", ReduceCut = "the memory is given back";
    "dismantle": DismantleErased = "the inode is gone", DismantleEmptied = "the memory is back in the reserve",
        DismantleDetached = "the superblock is gone";
}

/// Makes a call that a change needs after it has begun, to finish or to undo the change. A shortage
/// usually passes, so the function tries again for a while. If the shortage lasts, this process
/// kills itself: the next worker finishes or undoes the change. The thread keeps its locks for that
/// second, so requests for the same file wait. The kernel sends the request again; in a shortage
/// that outlasts eight workers the request is refused ([`crate::fuse`]), and the file is
/// unavailable if it cannot even be opened.
///
/// # Errors
/// The errors of `call` that are no shortage.
pub fn insist<T>(mut call: impl FnMut() -> Result<T>) -> Result<T> {
    const PATIENCE: Duration = Duration::from_secs(1);
    const NAP: Duration = Duration::from_millis(1);
    let started = Instant::now();
    loop {
        match call() {
            Err(error) if error.is_shortage() && started.elapsed() < PATIENCE => {
                std::thread::sleep(NAP)
            }
            Err(error) if error.is_shortage() => {
                log::error!(
                    "a change can be neither finished nor undone here, and is left to the next worker: {error}"
                );
                die();
            }
            result => return result,
        }
    }
}

/// Kills this process in the way of the OOM killer.
pub fn die() -> ! {
    let _ = kill_process(getpid(), Signal::KILL);
    loop {
        std::thread::park(); // the signal ends the process
    }
}

#[cfg(debug_assertions)]
mod armed {
    use super::Step;
    use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
    use std::sync::{Condvar, Mutex, MutexGuard};

    const NONE: u32 = u32::MAX;
    static ARMED: AtomicU32 = AtomicU32::new(NONE);
    static LEFT: AtomicU64 = AtomicU64::new(0);
    static HELD: Mutex<Held> = Mutex::new(Held { step: None, stopped: 0 });
    static RELEASED: Condvar = Condvar::new();
    static TALLY: [AtomicU64; Step::ALL.len()] = [const { AtomicU64::new(0) }; Step::ALL.len()];

    struct Held {
        step: Option<Step>,
        stopped: u32,
    }

    fn held() -> MutexGuard<'static, Held> {
        HELD.lock().expect("no panic while a step is compared")
    }

    /// From now on, each thread that reaches `step` stops there until [`release`].
    pub fn hold(step: Step) {
        *held() = Held { step: Some(step), stopped: 0 };
    }

    /// The number of threads that have stopped at the step that is held.
    pub fn stopped() -> u32 {
        held().stopped
    }

    /// Ends [`hold`]: the stopped threads go on.
    pub fn release() {
        *held() = Held { step: None, stopped: 0 };
        RELEASED.notify_all();
    }

    /// The process dies when it reaches `step` for the `nth` time from now on, counted from 1.
    pub fn arm(step: Step, nth: u64) {
        LEFT.store(nth, Ordering::SeqCst);
        ARMED.store(step as u32, Ordering::SeqCst);
    }

    /// Returns the count of each step since the last call, or since the process began.
    pub fn tally() -> impl Iterator<Item = (Step, u64)> {
        Step::ALL.iter().map(|step| (*step, TALLY[*step as usize].swap(0, Ordering::SeqCst)))
    }

    /// Marks that `step` is done: counts it, dies if it is armed, waits while it is held.
    pub fn reached(step: Step) {
        TALLY[step as usize].fetch_add(1, Ordering::SeqCst);
        if ARMED.load(Ordering::SeqCst) == step as u32 && LEFT.fetch_sub(1, Ordering::SeqCst) == 1 {
            super::die()
        }
        let mut held = held();
        if held.step == Some(step) {
            held.stopped += 1;
        }
        let is_held = |held: &mut Held| held.step == Some(step);
        drop(RELEASED.wait_while(held, is_held).expect("no panic while a step is compared"));
    }
}

#[cfg(debug_assertions)]
pub use armed::{arm, hold, reached, release, stopped, tally};

/// Marks that a step is reached.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn reached(_step: Step) {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    #[test]
    fn what_is_insisted_on_outlasts_a_shortage() {
        let mut answers =
            vec![Ok(7), Err(Error::NoMemory), Err(Error::Os(rustix::io::Errno::MFILE))];
        assert_eq!(insist(|| answers.pop().expect("it ends with the first success")).unwrap(), 7);
        let mut tries = 0;
        let refused: Result<()> = insist(|| {
            tries += 1;
            Err(Error::Quarantined)
        });
        assert!(matches!(refused, Err(Error::Quarantined)) && tries == 1);
    }

    #[test]
    fn no_two_steps_have_one_name() {
        let names: std::collections::BTreeSet<_> =
            Step::ALL.iter().map(|step| step.name()).collect();
        assert_eq!(names.len(), Step::ALL.len());
    }
}
