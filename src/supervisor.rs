//! The supervisor holds the device and the private mount namespace, and keeps a worker running.
//!
//! ```text
//!                 fork                        ended, status 0
//!   [start] ------------------> [worker] ------------------------> [end]: unmounted, the memory is free
//!                                |    ^
//!                  killed, ended |    | fork: at once where it had been of use, else after a pause
//!                                v    |
//!                             [between] -- RESTARTS in a row that were of no use ---> [refusing]
//!                                  ^  ^                                                |  | SIGHUP, or an upgrade
//!                                  |  +------------------------------------------------+  |
//!                                  |      after a pause: one worker, then refusing again  |
//!                                  +------------------------------------------------------+
//! ```
//!
//! SIGHUP replaces the worker in every state, even a worker that hangs. The supervisor passes
//! SIGUSR1 on to the worker, which opens its log anew ([`logging`]).
//!
//! A request that worker after worker dies of does not lead to *refusing*: the next worker answers
//! that one request with EIO and serves all others (the module `fuse`). *Refusing* is for workers
//! that cannot start. The resource that they lack may come back, so the supervisor ends each
//! refusal after a pause and starts one worker. If that worker cannot start either, the supervisor
//! refuses again, for twice as long, up to [`LONGEST_REFUSAL`].
//!
//! In every state the supervisor keeps the namespace, and so all memory. Every mapping stays valid,
//! and the kernel keeps the requests. In *refusing*, a process that knows nothing of files answers
//! every request with EIO. SIGTERM and SIGINT end the worker, then the supervisor, in every state.
//! The memory is free when the last mapping is gone.
//!
//! The supervisor has one thread, reads nothing that users write, and allocates nothing once it has
//! started: only the worker can fail, be killed or be replaced. The supervisor forks workers and
//! does not execute them, because the root that they live in holds no program. The kernel kills a
//! worker when its supervisor is gone (prctl(2), PR_SET_PDEATHSIG), so two supervisors never have
//! workers at once. A worker waits until the worker before it is gone ([`crate::worker`]).

use crate::error::{Error, Result};
use crate::logging;
use crate::mount_protocol::{Control, Message};
use crate::sys::process::{self, Fork, Signals};
use crate::sys::{self, cgroup};
use rustix::process::{Pid, Signal, WaitStatus, getpid, kill_process};
use std::io::{PipeReader, PipeWriter, Read, Write, pipe};
use std::time::{Duration, Instant};

/// Workers that may die in a row without having been of use.
const RESTARTS: u32 = 10;
/// A worker that serves for a shorter time and then ends by its own fault counts as a failed start:
/// the kernel sends the request that it died of to the next worker, too.
const SERVICE: Duration = Duration::from_secs(1);
/// The pause after the first of them; each further one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// The time that requests are refused before the supervisor starts a worker again. Each further
/// refusal is twice as long.
const FIRST_REFUSAL: Duration = Duration::from_secs(1);
const LONGEST_REFUSAL: Duration = Duration::from_secs(30);

/// Given to a worker, and said by it when it serves.
pub struct Announcement(PipeWriter);

impl Announcement {
    /// From here on its end is no failure to start.
    pub fn serving(mut self) {
        let _ = self.0.write_all(b"!"); // a supervisor that is gone need not know
    }
}

/// The end of the worker before.
#[derive(Clone, Copy, Debug)]
pub struct Death {
    /// Its process.
    pub worker: Pid,
    /// The end of the worker.
    pub status: WaitStatus,
}

/// The part that a worker is started for.
pub enum Role {
    /// One that serves.
    Serve {
        /// To be made use of once.
        announcement: Announcement,
        /// The circumstances of its start.
        start: Start,
    },
    /// One that refuses everything, as those that should serve have died.
    Refuse,
}

/// The circumstances in which a worker starts.
pub struct Start {
    /// The mount helper, or the command, that waits for this worker to serve. Only the first
    /// worker has one.
    pub control: Option<Control>,
    /// There is no filesystem yet: the worker makes it.
    pub mounting: bool,
    /// The end of the worker before. `None` for the first.
    pub after: Option<Death>,
}

/// The end of a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Unmounted.
    Unmounted,
    /// The first worker did not come to serve.
    NeverServed,
    /// By a signal.
    Stopped,
}

/// Decides what follows a death. Pure.
#[derive(Debug, Default)]
struct Restarts {
    fruitless: u32,
}

#[derive(Debug, PartialEq, Eq)]
enum Next {
    /// A worker that serves, after a pause.
    Serve(Duration),
    /// A worker that refuses, for so long.
    Refuse(Duration),
}

impl Restarts {
    fn after_death(&mut self, was_of_use: bool) -> Next {
        if was_of_use {
            self.fruitless = 0;
            return Next::Serve(Duration::ZERO);
        }
        self.fruitless = self.fruitless.saturating_add(1);
        if let Some(refusals) = self.fruitless.checked_sub(RESTARTS) {
            return Next::Refuse(doubled(FIRST_REFUSAL, refusals).min(LONGEST_REFUSAL));
        }
        Next::Serve(doubled(FIRST_PAUSE, self.fruitless - 1).min(LONGEST_PAUSE))
    }

    fn forgive(&mut self) {
        self.fruitless = 0;
    }
}

/// `time`, doubled so many times.
fn doubled(time: Duration, times: u32) -> Duration {
    time.saturating_mul(1u32.checked_shl(times).unwrap_or(u32::MAX))
}

/// A child, until it ends.
struct Worker {
    pid: Pid,
    started: Instant,
    announced: Option<PipeReader>,
}

/// The end of one wait.
enum Event {
    Ended(WaitStatus),
    Stop,
    TryAgain,
    /// The worker has run for as long as it was to.
    TimeIsUp,
}

/// Keeps workers running. Each worker is a process of its own that carries out `work` and ends with
/// the status that `work` returns. The first worker gets `control`. With `must_serve`, the first
/// worker has to come to serve.
///
/// # Errors
/// The kernel's answer to a call of the supervisor itself. The workers are gone then.
pub fn supervise(
    mut control: Option<Control>,
    must_serve: bool,
    mut work: impl FnMut(Role) -> i32,
) -> Result<End> {
    let signals =
        Signals::block(&[Signal::CHILD, Signal::TERM, Signal::INT, Signal::HUP, Signal::USR1])?;
    // Of which a worker has the use: here the signal is blocked.
    logging::reopen_on(Signal::USR1.as_raw())?;
    let mut restarts = Restarts::default();
    let mut mounting = must_serve;
    let mut last_words =
        control.as_ref().filter(|_| must_serve).map(Control::try_clone).transpose()?;
    let mut after = None;
    let mut next = Next::Serve(Duration::ZERO);
    loop {
        if let Next::Serve(pause) = next
            && pause > Duration::ZERO
            && matches!(signals.wait(Some(pause))?, Some(Signal::TERM | Signal::INT))
        {
            return Ok(End::Stopped);
        }
        let mut worker = match start(
            signals,
            &next,
            Start { control: control.take(), mounting, after },
            &mut work,
        ) {
            Ok(worker) => worker,
            Err(error) if mounting => {
                tell(last_words, no_process(&error));
                return Ok(End::NeverServed);
            }
            Err(_) => {
                // No memory for a process: there may be some later.
                next = restarts.after_death(false);
                restarts.fruitless = restarts.fruitless.min(RESTARTS - 2);
                continue;
            }
        };
        let limit = match next {
            Next::Serve(_) => None,
            Next::Refuse(limit) => Some(limit),
        };
        match wait(signals, &worker, limit)? {
            Event::Ended(status) if status.exit_status() == Some(0) => return Ok(End::Unmounted),
            Event::Ended(status) => {
                let had_served = worker.has_served();
                if mounting && !had_served {
                    report(status, last_words);
                    return Ok(End::NeverServed);
                }
                (mounting, last_words) = (false, None);
                after = Some(Death { worker: worker.pid, status });
                let was_killed = status.terminating_signal() == Some(Signal::KILL.as_raw());
                let was_of_use = had_served && (was_killed || worker.started.elapsed() >= SERVICE);
                next = restarts.after_death(was_of_use);
            }
            Event::Stop => {
                worker.kill()?;
                return Ok(End::Stopped);
            }
            Event::TryAgain => {
                worker.kill()?;
                if mounting && !worker.has_served() {
                    return Ok(End::NeverServed);
                }
                (mounting, last_words, after) = (false, None, None);
                restarts.forgive();
                next = Next::Serve(Duration::ZERO);
            }
            Event::TimeIsUp => {
                worker.kill()?;
                after = None;
                next = Next::Serve(Duration::ZERO);
            }
        }
    }
}

fn start(
    signals: Signals,
    next: &Next,
    circumstances: Start,
    work: &mut impl FnMut(Role) -> i32,
) -> Result<Worker> {
    let supervisor = getpid();
    let (announced, announcement) = pipe()?;
    let announced = Some(announced);
    match process::fork()? {
        Fork::Parent(pid) => Ok(Worker { pid, started: Instant::now(), announced }),
        Fork::Child => {
            drop(announced);
            let ready = process::die_with(supervisor).and_then(|()| signals.unblock());
            let role = match next {
                Next::Serve(_) => {
                    Role::Serve { announcement: Announcement(announcement), start: circumstances }
                }
                Next::Refuse(_) => Role::Refuse,
            };
            std::process::exit(if ready.is_ok() { work(role) } else { 1 })
        }
    }
}

/// Waits until the worker has ended, a signal comes, or the worker has run for `limit`.
fn wait(signals: Signals, worker: &Worker, limit: Option<Duration>) -> Result<Event> {
    loop {
        if let Some(status) = process::ended(worker.pid)? {
            return Ok(Event::Ended(status));
        }
        let left = limit.map(|limit| limit.saturating_sub(worker.started.elapsed()));
        if left == Some(Duration::ZERO) {
            return Ok(Event::TimeIsUp);
        }
        match signals.wait(left)? {
            Some(Signal::TERM | Signal::INT) => return Ok(Event::Stop),
            Some(Signal::HUP) => return Ok(Event::TryAgain),
            Some(Signal::USR1) => worker.signal(Signal::USR1)?,
            _ => {}
        }
    }
}

/// Tells the mount helper of a worker that a signal has ended. A worker that ended by itself has
/// told the reason.
fn report(status: WaitStatus, helper: Option<Control>) {
    if let Some(signal) = status.terminating_signal() {
        tell(helper, ended_by(signal));
    }
}

fn ended_by(signal: i32) -> String {
    let why =
        format!("the daemon's worker was, before it served, {}", process::explain_signal(signal));
    let limit = cgroup::tightest_limit("self").filter(|_| signal == Signal::KILL.as_raw());
    limit.map_or(why.clone(), |limit| format!("{why}: {limit}"))
}

fn no_process(error: &Error) -> String {
    format!("no process for the worker can be started: {}", process::explain_refusal(error))
}

fn tell(helper: Option<Control>, why: String) {
    log::error!("{why}");
    if let Some(mut helper) = helper {
        let _ = helper.send(&Message::Failed(why)); // a helper that is gone need not know
    }
}

impl Worker {
    /// True if the worker has come to serve. For the time after its end: its end of the pipe is
    /// closed then, so the call does not wait.
    fn has_served(&mut self) -> bool {
        let mut word = [0];
        self.announced
            .take()
            .is_some_and(|mut announced| matches!(announced.read(&mut word), Ok(1)))
    }

    fn kill(&self) -> Result<()> {
        self.signal(Signal::KILL)?;
        process::wait_for_end(self.pid)
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        match kill_process(self.pid, signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(errno) => Err(Error::Os(errno)),
        }
    }
}

/// Detaches all mounts of this namespace, so that the memory is free when this process ends, and
/// not some time later. Nothing can be done in the namespace afterwards.
pub fn free_memory() {
    let _ = sys::tmpfs::detach("/"); // it would go with the namespace, too
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_that_had_been_of_use_is_replaced_at_once() {
        let mut restarts = Restarts::default();
        for _ in 0..100 {
            assert_eq!(restarts.after_death(true), Next::Serve(Duration::ZERO));
        }
    }

    #[test]
    fn useless_workers_bring_longer_pauses_and_then_refusal() {
        let mut restarts = Restarts::default();
        let mut last = Duration::ZERO;
        for _ in 1..RESTARTS {
            let Next::Serve(pause) = restarts.after_death(false) else { panic!("refused early") };
            assert!(pause > last || pause == LONGEST_PAUSE);
            last = pause;
        }
        assert_eq!(restarts.after_death(false), Next::Refuse(FIRST_REFUSAL));
        restarts.forgive();
        assert_eq!(restarts.after_death(false), Next::Serve(FIRST_PAUSE));
    }

    #[test]
    fn each_refusal_ends_in_a_try_and_grows_to_a_limit() {
        let mut restarts = Restarts { fruitless: RESTARTS - 1 };
        let mut last = Duration::ZERO;
        for _ in 0..100 {
            let Next::Refuse(limit) = restarts.after_death(false) else {
                panic!("served in between")
            };
            assert!(limit == 2 * last || limit == FIRST_REFUSAL || limit == LONGEST_REFUSAL);
            last = limit;
        }
        assert_eq!(last, LONGEST_REFUSAL);
        assert_eq!(restarts.after_death(true), Next::Serve(Duration::ZERO));
        assert_eq!(restarts.after_death(false), Next::Serve(FIRST_PAUSE));
    }

    #[test]
    fn one_that_was_of_use_in_between_starts_the_count_anew() {
        let mut restarts = Restarts::default();
        for _ in 0..5 * RESTARTS {
            restarts.after_death(false);
            restarts.after_death(true);
        }
        assert_eq!(restarts.after_death(false), Next::Serve(FIRST_PAUSE));
    }
}
