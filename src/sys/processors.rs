//! The processors that a thread runs on.
//!
//! If all processors are busy, a thread that was asleep waits for its turn, up to a tick of the
//! scheduler (4 ms with CONFIG_HZ=250). A system call of a program takes several such turns: the
//! kernel wakes the daemon, and the daemon wakes the program. So threads with long work leave one
//! processor to the threads that answer at once.

use super::topology::Processors;
use crate::error::Result;
use crate::units::NumaNode;
use rustix::thread::{CpuSet, Pid, sched_getaffinity, sched_setaffinity};
use rustix::time::{ClockId, clock_gettime};
use std::thread::ScopedJoinHandle;
use std::time::Duration;

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

/// The number of threads that fill `bytes` of memory at once: one for each processor that the
/// calling thread may use, as far as each has enough to do.
pub fn threads_for(bytes: u64) -> u64 {
    let allowed = sched_getaffinity(None).map_or(1, |allowed| allowed.count());
    threads_within(bytes, u64::from(allowed))
}

fn threads_within(bytes: u64, allowed: u64) -> u64 {
    const LEAST: u64 = 8 << 20; // cleared in half a millisecond; a thread starts in a tenth of that
    (bytes / LEAST).clamp(1, allowed.max(1))
}

/// Runs `work` on each of `parts` at the same time: the first one on the calling thread, and the
/// others on threads that inherit its processors and its memory policy (fork(2)). Where no thread
/// can be started, the calling thread does that part, too.
///
/// # Errors
/// The first error of `work`, after all parts have ended.
pub fn at_once<T: Copy + Send + Sync>(
    parts: impl IntoIterator<Item = T>,
    work: impl Fn(T) -> Result<()> + Sync,
) -> Result<()> {
    let mut parts = parts.into_iter();
    let (first, work) = (parts.next(), &work);
    std::thread::scope(|scope| {
        let start = |part| {
            let builder = std::thread::Builder::new().name("filler".into());
            builder.spawn_scoped(scope, move || work(part)).map_err(|_| part)
        };
        let started: Vec<_> = parts.map(start).collect();
        let own = first.map_or(Ok(()), work);
        let end = |begun: std::result::Result<ScopedJoinHandle<'_, Result<()>>, T>| match begun {
            Ok(thread) => thread.join().expect("a thread that panics ends the process"),
            Err(part) => work(part),
        };
        started.into_iter().map(end).fold(own, Result::and)
    })
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

/// Keeps the calling thread on the processors of `node`, as far as it may use them. The thread
/// stays where it is if that are none: a node can have memory only.
pub fn stay_on(node: NumaNode) {
    let own: Vec<u32> = Processors::read().of(node).collect();
    let stay = sched_getaffinity(None).and_then(|mut allowed| {
        let is_far = |number: &usize| !own.contains(&(*number as u32));
        (0..CpuSet::MAX_CPU).filter(is_far).for_each(|number| allowed.unset(number));
        if allowed.count() > 0 { sched_setaffinity(None, &allowed) } else { Ok(()) }
    });
    if let Err(errno) = stay {
        log::debug!("a thread works on memory of a far node {node}: {errno}");
    }
}

/// The time that the calling thread has had a processor.
pub fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// While this value lives, the calling thread runs only when no other thread wants its processor
/// (SCHED_IDLE, sched(7)). It must hold no lock that others wait for, or [`hurry`] ends this state.
#[derive(Debug)]
pub struct Idle(());

impl Idle {
    /// `None` where the kernel refuses that.
    pub fn enter() -> Option<Self> {
        set_class(None, libc::SCHED_IDLE).then_some(Self(()))
    }

    /// True if a thread can leave the state again. It needs CAP_SYS_NICE or RLIMIT_NICE for that.
    pub fn is_possible() -> bool {
        let try_it = || Self::enter().is_some_and(|_idle| set_class(None, libc::SCHED_OTHER));
        std::thread::spawn(try_it).join().unwrap_or(false)
    }
}

impl Drop for Idle {
    fn drop(&mut self) {
        set_class(None, libc::SCHED_OTHER); // it was possible before
    }
}

/// A thread of this process runs as others do from now on.
pub fn hurry(thread: Pid) {
    set_class(Some(thread), libc::SCHED_OTHER); // refused if the thread has ended
}

/// Sets the scheduling class of a thread, or of the calling one. Returns true if the kernel does
/// it.
fn set_class(thread: Option<Pid>, class: libc::c_int) -> bool {
    let thread = thread.map_or(0, |thread| thread.as_raw_nonzero().get());
    let priority = libc::sched_param { sched_priority: 0 };
    // SAFETY: the structure is as large as the kernel reads it, and outlives the call.
    #[allow(unsafe_code)]
    let result = unsafe { libc::sched_setscheduler(thread, class, &raw const priority) };
    result == 0
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
    fn each_thread_has_enough_to_do_and_a_processor() {
        let rows = [(0, 16, 1), (15, 16, 1), (16, 16, 2), (64, 16, 8), (64, 3, 3), (64, 0, 1)];
        for (mebibytes, allowed, threads) in rows {
            assert_eq!(threads_within(mebibytes << 20, allowed), threads, "{mebibytes} {allowed}");
        }
    }

    #[test]
    fn each_part_is_worked_on_once_and_an_error_is_told() {
        let done = std::sync::Mutex::new(Vec::new());
        let work = |part: u32| {
            done.lock().unwrap().push(part);
            if part == 3 { Err(crate::error::Error::Full) } else { Ok(()) }
        };
        assert!(at_once([1, 2], work).is_ok());
        assert!(matches!(at_once([4, 3, 5], work), Err(crate::error::Error::Full)));
        assert!(at_once([], work).is_ok());
        let mut done = done.into_inner().unwrap();
        done.sort_unstable();
        assert_eq!(done, [1, 2, 3, 4, 5]);
    }

    #[test]
    fn a_thread_stays_on_the_processors_of_its_node() {
        let beside = || {
            let before = sched_getaffinity(None).unwrap();
            stay_on(NumaNode(1023));
            assert_eq!(sched_getaffinity(None), Ok(before), "no such node");
            stay_on(NumaNode(0));
            let own: Vec<u32> = Processors::read().of(NumaNode(0)).collect();
            let allowed = sched_getaffinity(None).unwrap();
            let mut numbers = (0..CpuSet::MAX_CPU).filter(|number| allowed.is_set(*number));
            assert!(numbers.all(|number| own.contains(&(number as u32))));
        };
        std::thread::spawn(beside).join().unwrap();
    }

    #[test]
    fn a_thread_is_idle_until_it_has_done_or_is_told_to_hurry() {
        let class = || {
            // SAFETY: the call has no argument but a number.
            #[allow(unsafe_code)]
            unsafe {
                libc::sched_getscheduler(0)
            }
        };
        assert!(Idle::is_possible(), "root may do that");
        let beside = move || {
            let idle = Idle::enter().unwrap();
            assert_eq!(class(), libc::SCHED_IDLE);
            hurry(rustix::thread::gettid());
            assert_eq!(class(), libc::SCHED_OTHER);
            drop(idle);
            drop(Idle::enter().unwrap());
            assert_eq!(class(), libc::SCHED_OTHER);
        };
        std::thread::spawn(beside).join().unwrap();
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
