//! Shuts doors: when no program has the memory of a file open by itself any more, the daemon has it
//! for itself again.
//!
//! A shut door can mean that gaps get memory, which takes long in a large file. So this is no duty
//! of the patrol.

use super::rounds::Rounds;
use crate::fs::Fs;
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// The time between two rounds. A request that a door is in the way of looks by itself.
const PERIOD: Duration = Duration::from_secs(1);

/// Starts the agent.
///
/// # Errors
/// EAGAIN if the thread cannot be started.
pub fn start(fs: Arc<Fs>) -> io::Result<Rounds> {
    let round = move |_: &_| {
        fs.close_unused_doors();
        PERIOD
    };
    Rounds::start("doors", PERIOD, round)
}
