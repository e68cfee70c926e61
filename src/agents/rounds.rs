//! The thread of an agent that works in rounds, until it is stopped.

use crate::faults;
use crate::fs::Pace;
use crate::sys::processors;
use crossbeam::channel::{RecvTimeoutError, Sender, bounded};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// An agent. It ends when this value is dropped: after the round, or at the next look at the pace.
pub struct Rounds {
    stop: Option<Sender<()>>,
    stopped: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Rounds {
    /// Starts a thread that runs `round` again and again. `round` gets the pace of the agent's
    /// work, and returns the time until the next round.
    ///
    /// # Errors
    /// EAGAIN if the thread cannot be started.
    pub fn start(
        name: &str,
        first: Duration,
        mut round: impl FnMut(&Pace) -> Duration + Send + 'static,
    ) -> io::Result<Self> {
        let (stop, wait) = bounded(0);
        let stopped = Arc::new(AtomicBool::new(false));
        let flag = stopped.clone();
        let thread = std::thread::Builder::new().name(name.into()).spawn(move || {
            faults::exempt();
            processors::leave_one();
            let (pace, mut rest) = (Pace::until(flag), first);
            while wait.recv_timeout(rest) == Err(RecvTimeoutError::Timeout) {
                rest = round(&pace);
            }
        })?;
        Ok(Self { stop: Some(stop), stopped, thread: Some(thread) })
    }
}

impl Drop for Rounds {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Relaxed);
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
