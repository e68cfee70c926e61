//! The processors that a thread runs on.
//!
//! If all processors are busy, a thread that was asleep waits for its turn, up to a tick of the
//! scheduler (4 ms with CONFIG_HZ=250). A system call of a program takes several such turns: the
//! kernel wakes the daemon, and the daemon wakes the program. So threads with long work leave one
//! processor to the threads that answer at once.

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Keeps the calling thread, and the threads that it starts, off the last of its allowed
/// processors, if it is allowed more than one. If the kernel refuses that, the log says so, and
/// long work may delay short work.
pub fn leave_one() {
    let left = sched_getaffinity(None).and_then(|allowed| match but_the_last(allowed) {
        Some(others) => sched_setaffinity(None, &others),
        None => Ok(()),
    });
    if let Err(errno) = left {
        log::warn!(
            "this thread runs on all processors, and may delay who is answered at once: {errno}"
        );
    }
}

/// All processors of `allowed` except the last. `None` where no processor would be left.
fn but_the_last(mut allowed: CpuSet) -> Option<CpuSet> {
    let last = (0..CpuSet::MAX_CPU).rev().find(|number| allowed.is_set(*number))?;
    allowed.unset(last);
    (allowed.count() > 0).then_some(allowed)
}

/// While this value lives, the calling thread, and the threads that it starts, run on all
/// processors that the first thread of the process may use.
#[derive(Debug)]
pub struct All {
    before: CpuSet,
}

impl All {
    /// Lets the calling thread run on all of them. `None` where the kernel refuses that;
    /// [`leave_one`] has had no effect either in this case.
    pub fn use_them() -> Option<Self> {
        let before = sched_getaffinity(None).ok()?;
        let all = sched_getaffinity(Some(rustix::process::getpid())).ok()?;
        sched_setaffinity(None, &all).ok().map(|()| Self { before })
    }
}

impl Drop for All {
    fn drop(&mut self) {
        // Refused only where none of these processors is left.
        let _ = sched_setaffinity(None, &self.before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(numbers: &[usize]) -> CpuSet {
        let mut set = CpuSet::new();
        numbers.iter().for_each(|number| set.set(*number));
        set
    }

    #[test]
    fn the_last_of_several_processors_is_left() {
        assert_eq!(but_the_last(set(&[1, 4, 70])), Some(set(&[1, 4])));
        assert_eq!(but_the_last(set(&[3])), None, "the only one");
    }

    #[test]
    fn a_thread_that_uses_all_processors_is_back_on_its_own() {
        let beside = || {
            leave_one();
            let own = sched_getaffinity(None).unwrap();
            let all = All::use_them().unwrap();
            assert_eq!(sched_getaffinity(None), sched_getaffinity(Some(rustix::process::getpid())));
            drop(all);
            assert_eq!(sched_getaffinity(None), Ok(own));
        };
        std::thread::spawn(beside).join().unwrap();
    }
}
