//! Clears memory ahead of use (option `clear=ahead`). The agent ends also in the middle of a file.

use super::rounds::Rounds;
use crate::fs::Fs;
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// The time between two rounds if there is nothing to do.
const PERIOD: Duration = Duration::from_millis(250);

/// Starts the agent. `None` if memory is not cleared ahead.
///
/// # Errors
/// EAGAIN if the thread cannot be started.
pub fn start(fs: Arc<Fs>) -> io::Result<Option<Rounds>> {
    if !fs.clears_ahead() {
        return Ok(None);
    }
    let round = move |pace: &_| match fs.tend_shelf(pace) {
        Ok(true) => Duration::ZERO,
        Ok(false) => PERIOD,
        Err(error) => {
            log::debug!("no memory is made ready now: {error}");
            PERIOD
        }
    };
    Rounds::start("steward", Duration::ZERO, round).map(Some)
}
