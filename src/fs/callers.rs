//! Calling threads whose files in /proc stay open for a while: a thread that makes a file grow
//! often does so again.

use crate::placement::parse_allowed;
use crate::sys::callers;
use crate::units::NumaNode;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Threads that are remembered. Each has up to four descriptors.
const MOST: usize = 8;

/// The time for which a cpuset counts. An administrator seldom changes it, and to read it takes
/// longer than all else.
const CPUSET_COUNTS: Duration = Duration::from_secs(1);

/// The threads.
#[derive(Default)]
pub struct Callers(Mutex<VecDeque<(u32, Arc<Known>)>>);

/// A thread that is remembered.
pub struct Known {
    /// Its files.
    pub files: callers::Caller,
    allowed: Mutex<Option<(Instant, Option<Vec<NumaNode>>)>>,
}

impl Callers {
    /// Lets `look` look at a thread. If a look at a thread that is remembered finds nothing,
    /// another thread may have its number, or it has executed a program: then `look` looks at the
    /// thread that has the number now. `None` if that finds nothing, or if there is no such thread.
    pub fn look<T>(&self, thread: u32, look: impl Fn(&Known) -> Option<T>) -> Option<T> {
        let remembered = self.remembered(thread).and_then(|known| look(&known));
        remembered.or_else(|| {
            let files = callers::Caller::open(thread)?;
            let known = Arc::new(Known { files, allowed: Mutex::default() });
            let found = look(&known)?;
            self.remember(thread, known);
            Some(found)
        })
    }

    fn remembered(&self, thread: u32) -> Option<Arc<Known>> {
        let threads = self.0.lock();
        threads.iter().find(|(number, _)| *number == thread).map(|(_, known)| known.clone())
    }

    fn remember(&self, thread: u32, known: Arc<Known>) {
        let mut threads = self.0.lock();
        threads.retain(|(number, _)| *number != thread);
        threads.push_back((thread, known));
        let forgotten = (threads.len() > MOST).then(|| threads.pop_front());
        drop(threads);
        drop(forgotten); // this closes files, without the lock
    }
}

impl Known {
    /// The NUMA nodes that the thread's cpuset allows; `None` if they are not told.
    pub fn allowed(&self) -> Option<Vec<NumaNode>> {
        let mut allowed = self.allowed.lock();
        if let Some((_, nodes)) = allowed.as_ref().filter(|(at, _)| at.elapsed() < CPUSET_COUNTS) {
            return nodes.clone();
        }
        let nodes = parse_allowed(&self.files.status());
        *allowed = Some((Instant::now(), nodes.clone()));
        nodes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own_number() -> u32 {
        rustix::thread::gettid().as_raw_nonzero().get() as u32
    }

    fn address(known: &Known) -> Option<usize> {
        Some(std::ptr::from_ref(known) as usize)
    }

    #[test]
    fn a_thread_is_remembered_until_others_have_come() {
        let (callers, own) = (Callers::default(), own_number());
        let first = callers.look(own, address).unwrap();
        assert_eq!(callers.look(own, address), Some(first));
        assert!(callers.look(own, |known| known.allowed()).is_some());
        for _ in 0..MOST {
            std::thread::scope(|scope| {
                let other = scope.spawn(|| callers.look(own_number(), |_| Some(())));
                assert_eq!(other.join().unwrap(), Some(()));
            });
        }
        assert!(callers.remembered(own).is_none());
        assert_eq!(callers.0.lock().len(), MOST);
    }

    #[test]
    fn a_thread_that_tells_nothing_any_more_is_looked_for_anew() {
        let (callers, own) = (Callers::default(), own_number());
        let first = callers.look(own, address).unwrap();
        let is_another = |known: &Known| address(known).filter(|found| *found != first);
        let second = callers.look(own, is_another).expect("it is opened again");
        assert_eq!(callers.look(own, address), Some(second));
        assert_eq!(callers.look(own, |_| None::<()>), None);
        assert_eq!(callers.look(0, |_| Some(())), None, "there is no such thread");
    }
}
