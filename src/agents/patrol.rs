//! Finds memory errors that no program has touched yet and soft holes that a program has opened, and does again what had to
//! wait for memory.

use crate::faults;
use crate::fs::Fs;
use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, bounded};
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

/// How often the kernel's count of memory errors is looked at, which is to read one small file in /sys for each NUMA node;
/// and the longest that a soft hole stays open that a program has opened.
const PERIOD: Duration = Duration::from_secs(1);

/// The agent, which ends when this is dropped.
pub struct Patrol {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// Starts the agent.
///
/// # Errors
/// EAGAIN where no thread can be started.
pub fn start(fs: Arc<Fs>) -> io::Result<Patrol> {
    let (stop, stopped) = bounded(0);
    let thread = std::thread::Builder::new().name("patrol".into()).spawn(move || run(&fs, &stopped))?;
    Ok(Patrol { stop: Some(stop), thread: Some(thread) })
}

fn run(fs: &Fs, stopped: &Receiver<()>) {
    faults::exempt();
    while stopped.recv_timeout(PERIOD) == Err(RecvTimeoutError::Timeout) {
        fs.shut_opened_holes();
        fs.look_for_poison();
        fs.look_for_poison_in_free_memory();
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
