//! Clears memory ahead of use (option `clear=ahead`).

use crate::faults;
use crate::fs::{Fs, Pace};
use crate::sys::processors;
use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, bounded};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// The time between two rounds if there is nothing to do.
const PERIOD: Duration = Duration::from_millis(250);

/// The agent. It ends when this value is dropped, also in the middle of a file.
pub struct Steward {
    stop: Option<Sender<()>>,
    stopped: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// Starts the agent. `None` if memory is not cleared ahead.
///
/// # Errors
/// EAGAIN if the thread cannot be started.
pub fn start(fs: Arc<Fs>) -> io::Result<Option<Steward>> {
    if !fs.clears_ahead() {
        return Ok(None);
    }
    let (stop, wait) = bounded(0);
    let stopped = Arc::new(AtomicBool::new(false));
    let pace = Pace::until(stopped.clone());
    let thread =
        std::thread::Builder::new().name("steward".into()).spawn(move || run(&fs, &wait, &pace))?;
    Ok(Some(Steward { stop: Some(stop), stopped, thread: Some(thread) }))
}

fn run(fs: &Fs, stopped: &Receiver<()>, pace: &Pace) {
    faults::exempt();
    processors::leave_one();
    let mut rest = Duration::ZERO;
    while stopped.recv_timeout(rest) == Err(RecvTimeoutError::Timeout) {
        rest = match fs.tend_shelf(pace) {
            Ok(true) => Duration::ZERO,
            Ok(false) => PERIOD,
            Err(error) => {
                log::debug!("no memory is made ready now: {error}");
                PERIOD
            }
        };
    }
}

impl Drop for Steward {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Relaxed);
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
