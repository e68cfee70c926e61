//! A gate before reads of /proc that a program can make last.
//!
//! The kernel reads the memory policy of a thread under a lock of the thread's process, and any
//! process can keep its own lock for as long as it likes ([`crate::sys::callers`]). A thread that
//! serves requests must not be lost to each request of such a process. So only [`MOST`] threads
//! read at a time, and one for each user. A read takes some 10 us, so another thread waits for its
//! turn. If a read has lasted for [`PATIENCE`], the others do not wait for it: they do without.

use parking_lot::{Condvar, Mutex};
use std::time::{Duration, Instant};

/// Threads that read at a time.
const MOST: usize = 2;

/// The time after which a read counts as stuck.
const PATIENCE: Duration = Duration::from_millis(5);

/// The gate.
#[derive(Default)]
pub struct Gate {
    inside: Mutex<Vec<Reader>>,
    left: Condvar,
}

/// A thread behind the gate.
struct Reader {
    user: u32,
    since: Instant,
}

/// Leaves on drop.
struct Inside<'a> {
    gate: &'a Gate,
    user: u32,
}

impl Gate {
    /// Runs `read` for a request of `user`, when it is this user's turn. `None` if reads are stuck.
    pub fn pass<T>(&self, user: u32, read: impl FnOnce() -> T) -> Option<T> {
        let _inside = self.enter(user)?;
        Some(read())
    }

    fn enter(&self, user: u32) -> Option<Inside<'_>> {
        let mut inside = self.inside.lock();
        while let Some(since) = in_the_way(&inside, user) {
            if self.left.wait_until(&mut inside, since + PATIENCE).timed_out() {
                return None;
            }
        }
        inside.push(Reader { user, since: Instant::now() });
        Some(Inside { gate: self, user })
    }
}

/// The start of the read that `user` has to wait for: its own, or the last one if there are too
/// many.
fn in_the_way(inside: &[Reader], user: u32) -> Option<Instant> {
    let own = inside.iter().find(|reader| reader.user == user);
    let last = (inside.len() >= MOST).then(|| inside.last()).flatten();
    own.or(last).map(|reader| reader.since)
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        let mut inside = self.gate.inside.lock();
        let at = inside.iter().position(|reader| reader.user == self.user);
        let reader = inside.remove(at.expect("it has entered"));
        drop(inside);
        self.gate.left.notify_all();
        if reader.since.elapsed() >= PATIENCE {
            let (user, lasted) = (self.user, reader.since.elapsed());
            log::info!(user = user; "user {user}: the memory policy of a thread was read in {lasted:?}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn a_stuck_read_keeps_no_other_user_out() {
        let gate = Gate::default();
        let stuck = gate.enter(7).expect("none is inside");
        assert_eq!(gate.pass(7, || 1), None, "one of a user");
        assert_eq!(gate.pass(8, || 1), Some(1));
        let other = gate.enter(8).expect("there is room for one");
        assert_eq!(gate.pass(9, || 1), None, "no more than two in all");
        drop((stuck, other));
        assert_eq!(gate.pass(7, || 1), Some(1));
    }

    #[test]
    fn a_read_that_is_under_way_is_waited_for() {
        let gate = Gate::default();
        let first = gate.enter(7).expect("none is inside");
        let (begun, begins) = channel();
        std::thread::scope(|scope| {
            let next = scope.spawn(|| {
                begun.send(()).unwrap();
                gate.enter(7).is_some()
            });
            begins.recv().unwrap();
            // As if the read had just begun, however slow this machine is.
            gate.inside.lock()[0].since = Instant::now() + Duration::from_secs(60);
            gate.left.notify_all();
            drop(first);
            assert!(next.join().unwrap());
        });
    }
}
