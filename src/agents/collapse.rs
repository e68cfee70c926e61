//! Puts huge mappings back after repairs.

use crate::faults;
use crate::fs::Repaired;
use crossbeam::channel::{Receiver, Sender, unbounded};
use std::io;
use std::thread::JoinHandle;

/// The agent; it ends when all senders are gone and everything that was sent has been seen to.
pub type Agent = JoinHandle<()>;

/// Starts the agent, and returns where to report what may have become whole again.
///
/// # Errors
/// EAGAIN where no thread can be started.
pub fn start() -> io::Result<(Sender<Repaired>, Agent)> {
    let (sender, receiver) = unbounded();
    let agent = std::thread::Builder::new().name("collapse".into()).spawn(move || run(&receiver))?;
    Ok((sender, agent))
}

/// A folio that cannot be put together now (somebody holds a page of it) stays in small pages until its owner asks.
fn run(repaired: &Receiver<Repaired>) {
    faults::exempt();
    for (object, range) in repaired {
        for folio in range.folios() {
            if let Err(error) = object.collapse_folio(folio) {
                log::info!(
                    "file {}: the 2 MiB at {:#x} stay in small pages: {error}",
                    object.node(),
                    folio.range().start
                );
            }
        }
    }
}
