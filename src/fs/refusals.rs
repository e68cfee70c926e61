//! The reasons of refused requests, for the threads that made them.
//!
//! setxattr(2) returns only a number, and EBUSY has a dozen causes. So the worker keeps the reason
//! as a sentence. The thread that made the request can read the sentence as an attribute of the
//! same file. When a worker dies, its sentences are lost.

use crate::units::InodeId;
use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard};

/// The number of sentences that are kept. A new one replaces the oldest.
const MOST: usize = 64;

/// The sentences.
#[derive(Default)]
pub struct Refusals(Mutex<VecDeque<Refusal>>);

struct Refusal {
    node: InodeId,
    thread: u32,
    why: String,
}

impl Refusals {
    fn kept(&self) -> MutexGuard<'_, VecDeque<Refusal>> {
        self.0.lock().expect("no panic while the list is open")
    }

    /// Keeps the reason why a request of `thread` for `node` was refused, in place of an earlier
    /// one. None removes the reason, because the request has succeeded. All threads of other
    /// process id namespaces have the number 0 here, so the list keeps no reason for them.
    pub fn note(&self, node: InodeId, thread: u32, why: Option<String>) {
        let mut kept = self.kept();
        kept.retain(|refusal| (refusal.node, refusal.thread) != (node, thread));
        if let Some(why) = why.filter(|_| thread != 0) {
            kept.push_back(Refusal { node, thread, why });
        }
        if kept.len() > MOST {
            kept.pop_front();
        }
    }

    /// The reason of the last refusal for this thread and file.
    pub fn of(&self, node: InodeId, thread: u32) -> Option<String> {
        let kept = self.kept();
        let found = kept.iter().find(|refusal| (refusal.node, refusal.thread) == (node, thread));
        found.map(|refusal| refusal.why.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_for_the_thread_that_asked_alone() {
        let refusals = Refusals::default();
        let (node, other) = (InodeId::ROOT, InodeId(7));
        refusals.note(node, 5, Some("first".into()));
        refusals.note(node, 5, Some("second".into()));
        refusals.note(node, 0, Some("of a thread that has no number here".into()));
        assert_eq!(refusals.of(node, 5).as_deref(), Some("second"));
        for (node, thread) in [(other, 5), (node, 6), (node, 0)] {
            assert_eq!(refusals.of(node, thread), None);
        }
        refusals.note(other, 5, Some("third".into()));
        refusals.note(other, 5, None);
        assert_eq!(refusals.of(other, 5), None, "it has succeeded since");
        (0..MOST as u32)
            .for_each(|thread| refusals.note(other, 100 + thread, Some("another".into())));
        assert_eq!(refusals.of(node, 5), None, "the oldest is gone");
    }
}
