//! Long requests, which run outside of the threads that serve.
//!
//! ```text
//!   serving thread --submit()--> queue of the user --turn--> a job's thread --> answered
//!        |                                                   | waits for pages or a close(2)
//!        | short requests: answered at once                  +--admit()--> own thread --> answered
//! ```
//!
//! A thread that serves reads one request after the other, and all users wait for it. So a request
//! that moves memory, looks through a file, or finds the file locked goes to a job's thread
//! ([`crate::error::Error::TakesLong`]). Users take turns there, and one user has [`MOST_OF_USER`]
//! threads at most. So a user with a thousand long requests delays the first long request of
//! another user by the rest of one running request at most. All job threads leave one processor to
//! the threads that serve ([`processors::leave_one`]): a machine with two processors carries out
//! long requests with one, and answers short ones with the other.
//!
//! Some requests wait for pages or a close(2) that other requests bring. Such a request holds no
//! job's thread while it waits. [`MOST_WAITING`] requests wait at once, over all users. The next
//! one is refused, as if it had waited in vain. There is a limit for the bytes that requests keep,
//! too ([`Held`]).

use crate::sys::processors;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

/// Threads for long requests.
const THREADS: usize = 16;

/// The most of these threads that one user has at a time.
const MOST_OF_USER: usize = 2;

/// The most requests that wait for other requests: of all users, and of one. Each has a thread.
const MOST_WAITING: Limits = Limits { total: 128, of_user: 64 };

/// The most bytes that requests keep for later: of all users, and of one.
const MOST_HELD: Limits = Limits { total: 16 << 20, of_user: 8 << 20 };

/// Bytes that a request may keep in any case: no more than its caller's stack takes in the kernel.
const ALWAYS_HELD: usize = 4096;

/// The user whose jobs are the daemon's own.
pub const DAEMON: u32 = u32::MAX; // no user has this id (setuid(2))

/// The work of a thread.
pub type Job = Box<dyn FnOnce() + Send>;

/// The threads and their queue. Dropping it waits for the jobs that run, and discards the jobs that
/// wait.
pub struct Jobs {
    queue: Arc<Queue>,
    threads: Vec<JoinHandle<()>>,
}

impl Jobs {
    /// Starts the threads.
    ///
    /// # Errors
    /// EAGAIN where a thread cannot be started.
    pub fn start() -> io::Result<Self> {
        let mut jobs = Self { queue: Arc::default(), threads: Vec::new() };
        for number in 0..THREADS {
            let queue = jobs.queue.clone();
            let builder = std::thread::Builder::new().name(format!("job-{number}"));
            jobs.threads.push(builder.spawn(move || queue.work())?);
        }
        Ok(jobs)
    }

    /// Runs `job` on a job's thread when it is the turn of `user`.
    pub fn submit(&self, user: u32, job: impl FnOnce() + Send + 'static) {
        self.queue.turns().add(user, Box::new(job));
        self.queue.changed.notify_one();
    }
}

impl Drop for Jobs {
    fn drop(&mut self) {
        self.queue.turns().close();
        self.queue.changed.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join(); // a thread that panics ends the process
        }
    }
}

#[derive(Default)]
struct Queue {
    turns: Mutex<Turns<Job>>,
    changed: Condvar,
}

impl Queue {
    fn turns(&self) -> MutexGuard<'_, Turns<Job>> {
        self.turns.lock().expect("no panic while the queue is open")
    }

    fn work(&self) {
        processors::leave_one();
        while let Some((user, job)) = self.next() {
            job();
            self.turns().end(user);
            self.changed.notify_one(); // the next job of this user may have waited for the end
        }
    }

    /// Waits for the next job. `None` if none will come.
    fn next(&self) -> Option<(u32, Job)> {
        let mut turns = self.turns();
        while !turns.closed {
            if let Some(next) = turns.next() {
                return Some(next);
            }
            turns = self.changed.wait(turns).expect("no panic while the queue is open");
        }
        None
    }
}

/// The order in which jobs run.
struct Turns<J> {
    /// The users with waiting jobs, the next user first.
    users: VecDeque<u32>,
    waiting: HashMap<u32, VecDeque<J>>,
    running: HashMap<u32, usize>,
    closed: bool,
}

impl<J> Default for Turns<J> {
    fn default() -> Self {
        let (users, waiting, running) = (VecDeque::new(), HashMap::new(), HashMap::new());
        Self { users, waiting, running, closed: false }
    }
}

impl<J> Turns<J> {
    fn add(&mut self, user: u32, job: J) {
        let queue = self.waiting.entry(user).or_default();
        if queue.is_empty() {
            self.users.push_back(user);
        }
        queue.push_back(job);
    }

    /// The job whose turn it is. It counts as running until [`Turns::end`].
    fn next(&mut self) -> Option<(u32, J)> {
        let has_room =
            |user: &u32| self.running.get(user).is_none_or(|running| *running < MOST_OF_USER);
        let user = self.users.remove(self.users.iter().position(has_room)?)?;
        let queue = self.waiting.get_mut(&user)?;
        let job = queue.pop_front()?;
        if queue.is_empty() {
            self.waiting.remove(&user);
        } else {
            self.users.push_back(user);
        }
        *self.running.entry(user).or_default() += 1;
        Some((user, job))
    }

    fn end(&mut self, user: u32) {
        subtract(&mut self.running, user, 1);
    }

    fn close(&mut self) {
        self.closed = true;
        self.users.clear();
        self.waiting.clear();
    }
}

fn subtract(counts: &mut HashMap<u32, usize>, user: u32, amount: usize) {
    if let Some(count) = counts.get_mut(&user) {
        *count -= amount;
        if *count == 0 {
            counts.remove(&user);
        }
    }
}

/// The limits of an amount.
#[derive(Clone, Copy, Debug)]
struct Limits {
    total: usize,
    of_user: usize,
}

/// The share of each user in an amount with limits.
struct Shares {
    limits: Limits,
    by_user: Mutex<HashMap<u32, usize>>,
}

impl Shares {
    fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self { limits, by_user: Mutex::default() })
    }

    fn by_user(&self) -> MutexGuard<'_, HashMap<u32, usize>> {
        self.by_user.lock().expect("no panic while shares are counted")
    }

    /// A share for `user`, or `None` if the share would exceed a limit.
    fn take(self: &Arc<Self>, user: u32, amount: usize) -> Option<Share> {
        let mut by_user = self.by_user();
        let (total, own) =
            (by_user.values().sum::<usize>(), by_user.get(&user).copied().unwrap_or(0));
        let fits = total + amount <= self.limits.total && own + amount <= self.limits.of_user;
        fits.then(|| {
            by_user.insert(user, own + amount);
            Share { shares: self.clone(), user, amount }
        })
    }
}

/// A part of the amount. Dropping it gives the part back.
struct Share {
    shares: Arc<Shares>,
    user: u32,
    amount: usize,
}

impl Drop for Share {
    fn drop(&mut self) {
        subtract(&mut self.shares.by_user(), self.user, self.amount);
    }
}

/// The places for requests that wait.
pub struct Waiting(Arc<Shares>);

impl Default for Waiting {
    fn default() -> Self {
        Self(Shares::new(MOST_WAITING))
    }
}

impl Waiting {
    /// Runs `job` of `user`. If a place is free, the job runs on a thread of its own, with `true`:
    /// it may wait for other requests. If too many requests wait, or no thread can be started, the
    /// job runs at once on this thread, with `false`.
    pub fn admit(&self, user: u32, job: impl FnOnce(bool) + Send + 'static) {
        let Some(share) = self.0.take(user, 1) else { return job(false) };
        let (hand_over, take_over) = std::sync::mpsc::sync_channel::<Job>(1);
        let wait = move || {
            let _share = share;
            if let Ok(job) = take_over.recv() {
                job();
            }
        };
        match std::thread::Builder::new().name("waiting".into()).spawn(wait) {
            Ok(_) => {
                let sent = hand_over.send(Box::new(|| job(true)));
                sent.expect("the thread has just been started, and takes one job");
            }
            Err(error) => {
                log::error!("no thread to wait on: {error}");
                job(false);
            }
        }
    }
}

/// The room for bytes that requests bring and that the daemon needs later.
pub struct Holds(Arc<Shares>);

impl Default for Holds {
    fn default() -> Self {
        Self(Shares::new(MOST_HELD))
    }
}

impl Holds {
    /// Keeps `bytes` for `user`, or returns `None` where that would exceed a limit.
    pub fn hold(&self, user: u32, bytes: &[u8]) -> Option<Held> {
        let share =
            if bytes.len() <= ALWAYS_HELD { None } else { Some(self.0.take(user, bytes.len())?) };
        Some(Held { bytes: bytes.to_vec(), _share: share })
    }

    /// Keeps `bytes` for `user`, or only a short prefix where they would exceed a limit.
    pub fn hold_prefix(&self, user: u32, bytes: &[u8]) -> Held {
        let few = &bytes[..bytes.len().min(ALWAYS_HELD)];
        let held = self.hold(user, bytes).or_else(|| self.hold(user, few));
        held.expect("few are always held")
    }
}

/// Bytes that are kept for later.
pub struct Held {
    bytes: Vec<u8>,
    _share: Option<Share>,
}

impl std::ops::Deref for Held {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;
    use std::time::Duration;

    const PATIENCE: Duration = Duration::from_secs(60);

    fn turns(jobs: &[(u32, u32)]) -> Turns<u32> {
        let mut turns = Turns::default();
        jobs.iter().for_each(|(user, job)| turns.add(*user, *job));
        turns
    }

    #[test]
    fn users_take_turns() {
        let mut turns = turns(&[(7, 0), (7, 1), (7, 2), (8, 3), (9, 4)]);
        let order: Vec<_> = std::iter::from_fn(|| turns.next()).map(|(_, job)| job).collect();
        assert_eq!(
            order,
            [0, 3, 4, 1],
            "two of one user at a time, after the first of each other one"
        );
        turns.end(8);
        assert!(turns.next().is_none(), "the third waits for one of its own user");
        turns.end(7);
        assert_eq!(turns.next(), Some((7, 2)));
        assert!(turns.next().is_none() && turns.users.is_empty() && turns.waiting.is_empty());
    }

    #[test]
    fn no_trace_is_left_of_a_user_without_jobs() {
        let mut turns = turns(&[(7, 0), (8, 1)]);
        while let Some((user, _)) = turns.next() {
            turns.end(user);
        }
        assert!(turns.running.is_empty() && turns.waiting.is_empty() && turns.users.is_empty());
    }

    #[test]
    fn a_users_long_jobs_do_not_keep_another_user_waiting() {
        let jobs = Jobs::start().expect("threads can be started");
        let (release, held) = channel::<()>();
        let held = Arc::new(Mutex::new(held));
        for _ in 0..2 * THREADS {
            let held = held.clone();
            jobs.submit(7, move || _ = held.lock().unwrap().recv());
        }
        let (done, other) = channel();
        jobs.submit(8, move || done.send(()).unwrap());
        other
            .recv_timeout(PATIENCE)
            .expect("the other user's job is done while those of the first are held");
        drop(release);
    }

    #[test]
    fn a_share_is_refused_beyond_a_limit_and_given_back() {
        let shares = Shares::new(Limits { total: 10, of_user: 6 });
        let first = shares.take(7, 6).expect("there is room");
        assert!(shares.take(7, 1).is_none(), "one user's limit");
        let second = shares.take(8, 4).expect("there is room");
        assert!(shares.take(9, 1).is_none(), "the limit of all");
        drop((first, second));
        assert!(shares.take(9, 6).is_some());
    }

    #[test]
    fn of_a_write_that_there_is_no_room_for_a_prefix_is_kept() {
        let holds = Holds::default();
        let megabyte = vec![7; 1 << 20];
        let held: Vec<_> = (0..20).map(|_| holds.hold_prefix(7, &megabyte)).collect();
        let total: usize = held.iter().map(|held| held.len()).sum();
        assert!(
            held.iter().all(|held| !held.is_empty())
                && total <= MOST_HELD.of_user + 20 * ALWAYS_HELD
        );
        assert!(holds.hold(7, &megabyte).is_none());
        drop(held);
        assert!(holds.hold(7, &megabyte).is_some());
    }

    #[test]
    fn only_so_many_wait_at_once() {
        let waiting = Waiting::default();
        let (release, held) = channel::<()>();
        let (held, (word, words)) = (Arc::new(Mutex::new(held)), channel());
        let admit = |user| {
            let (held, word) = (held.clone(), word.clone());
            waiting.admit(user, move |may_wait| {
                word.send(may_wait).unwrap();
                if may_wait {
                    let _ = held.lock().unwrap().recv();
                }
            });
            words.recv_timeout(PATIENCE).expect("a job is done, by whatever thread")
        };
        assert!((0..MOST_WAITING.of_user).all(|_| admit(7)));
        assert!(!admit(7), "one more of that user");
        assert!(admit(8), "another user's");
        drop(release);
    }
}
