//! Moves the memory of files to the NUMA nodes that programs bind it to by mbind(2), and counts it
//! where they have moved it.
//!
//! A move of a large file takes long, so this is no duty of the patrol, whose other duties must be
//! done each second.

use crate::faults;
use crate::fs::{Fs, Pace, Policies};
use crate::sys::processors;
use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, bounded};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The time between two rounds. It is longer after a round that took longer: the agent works at
/// most half of the time.
const PERIOD: Duration = Duration::from_secs(1);

/// The agent. It ends when this value is dropped, also in the middle of a move.
pub struct Follower {
    stop: Option<Sender<()>>,
    stopped: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// Starts the agent. `None` on a machine of one NUMA node, where it has nothing to do.
///
/// # Errors
/// EAGAIN if the thread cannot be started.
pub fn start(fs: Arc<Fs>) -> io::Result<Option<Follower>> {
    if !fs.has_other_nodes() {
        return Ok(None);
    }
    let (stop, wait) = bounded(0);
    let stopped = Arc::new(AtomicBool::new(false));
    let pace = Pace::until(stopped.clone());
    let thread = std::thread::Builder::new()
        .name("policies".into())
        .spawn(move || run(&fs, &wait, &pace))?;
    Ok(Some(Follower { stop: Some(stop), stopped, thread: Some(thread) }))
}

fn run(fs: &Fs, stopped: &Receiver<()>, pace: &Pace) {
    faults::exempt();
    processors::leave_one();
    let (mut policies, mut rest) = (Policies::default(), PERIOD);
    while stopped.recv_timeout(rest) == Err(RecvTimeoutError::Timeout) {
        let begun = Instant::now();
        fs.follow_programs(&mut policies, pace);
        rest = begun.elapsed().max(PERIOD);
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Relaxed);
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
