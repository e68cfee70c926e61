//! Finds memory errors that no program has touched yet, shuts soft holes that a program has opened,
//! and retries work that had to wait for memory.

use super::rounds::Rounds;
use crate::fs::Fs;
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// The time between two rounds. In each round the patrol reads the kernel's count of memory errors:
/// one small file in /sys for each NUMA node. The period is also the longest time for which a soft
/// hole stays open after a program has opened it.
const PERIOD: Duration = Duration::from_secs(1);

/// Starts the agent.
///
/// # Errors
/// EAGAIN if the thread cannot be started.
pub fn start(fs: Arc<Fs>) -> io::Result<Rounds> {
    let mut is_first = true;
    let round = move |_: &_| {
        if std::mem::take(&mut is_first) {
            fs.retry_what_waits(); // an earlier worker may have left stranded objects
            return PERIOD;
        }
        fs.shut_opened_holes();
        fs.look_for_hw_errors();
        fs.look_for_hw_errors_in_free_memory();
        fs.retry_what_waits();
        PERIOD
    };
    Rounds::start("patrol", Duration::ZERO, round)
}
