//! Finds memory errors that no program has touched yet, shuts soft holes that a program has opened,
//! and retries work that had to wait for memory.

use crate::faults;
use crate::fs::Fs;
use crate::sys::processors;
use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, bounded};
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

/// The time between two rounds. In each round the patrol reads the kernel's count of memory errors:
/// one small file in /sys for each NUMA node. The period is also the longest time for which a soft
/// hole stays open after a program has opened it.
const PERIOD: Duration = Duration::from_secs(1);

/// The agent. It ends when this value is dropped.
pub struct Patrol {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// Starts the agent.
///
/// # Errors
/// EAGAIN if the thread cannot be started.
pub fn start(fs: Arc<Fs>) -> io::Result<Patrol> {
    let (stop, stopped) = bounded(0);
    let thread =
        std::thread::Builder::new().name("patrol".into()).spawn(move || run(&fs, &stopped))?;
    Ok(Patrol { stop: Some(stop), thread: Some(thread) })
}

fn run(fs: &Fs, stopped: &Receiver<()>) {
    faults::exempt();
    processors::leave_one();
    fs.retry_what_waits(); // an earlier worker may have left stranded objects
    while stopped.recv_timeout(PERIOD) == Err(RecvTimeoutError::Timeout) {
        fs.shut_opened_holes();
        fs.look_for_hw_errors();
        fs.look_for_hw_errors_in_free_memory();
        fs.retry_what_waits();
    }
}

impl Drop for Patrol {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
