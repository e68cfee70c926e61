//! Moves the memory of files to the NUMA nodes that programs bind it to by mbind(2), and counts it
//! where they have moved it.
//!
//! A move of a large file takes long, so this is no duty of the patrol, whose other duties must be
//! done each second. The agent ends also in the middle of a move.

use super::rounds::Rounds;
use crate::fs::{Fs, Policies};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The time between two rounds. It is longer after a round that took longer: the agent works at
/// most half of the time.
const PERIOD: Duration = Duration::from_secs(1);

/// Starts the agent. `None` on a machine of one NUMA node, where it has nothing to do.
///
/// # Errors
/// EAGAIN if the thread cannot be started.
pub fn start(fs: Arc<Fs>) -> io::Result<Option<Rounds>> {
    if !fs.has_other_nodes() {
        return Ok(None);
    }
    let mut policies = Policies::default();
    let round = move |pace: &_| {
        let begun = Instant::now();
        fs.follow_programs(&mut policies, pace);
        begun.elapsed().max(PERIOD)
    };
    Rounds::start("policies", PERIOD, round).map(Some)
}
