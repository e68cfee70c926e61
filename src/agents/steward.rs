//! Clears memory ahead of use (option `clear=ahead`): an agent for each NUMA node, which runs on
//! the processors of that node. The agents end also in the middle of a file.

use super::rounds::Rounds;
use crate::fs::Fs;
use crate::sys::processors;
use crate::units::NumaNode;
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// The time between two rounds if there is nothing to do.
const PERIOD: Duration = Duration::from_millis(250);

/// Starts the agents. None if memory is not cleared ahead.
///
/// # Errors
/// EAGAIN if a thread cannot be started.
pub fn start(fs: &Arc<Fs>) -> io::Result<Vec<Rounds>> {
    let nodes = if fs.clears_ahead() { fs.nodes() } else { &[] };
    nodes.iter().map(|node| start_on(fs.clone(), *node)).collect()
}

fn start_on(fs: Arc<Fs>, node: NumaNode) -> io::Result<Rounds> {
    let mut is_first = true;
    let round = move |pace: &_| {
        if std::mem::take(&mut is_first) {
            processors::stay_on(node);
        }
        match fs.tend_shelf(node, pace) {
            Ok(true) => Duration::ZERO,
            Ok(false) => PERIOD,
            Err(error) => {
                log::debug!("no memory of node {node} is made ready now: {error}");
                PERIOD
            }
        }
    };
    Rounds::start(&format!("steward-{node}"), Duration::ZERO, round)
}
