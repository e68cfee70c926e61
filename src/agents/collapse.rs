//! Restores huge mappings after repairs.

use crate::faults;
use crate::fs::Repaired;
use crate::sys::processors;
use crossbeam::channel::{Receiver, Sender, unbounded};
use std::io;
use std::thread::JoinHandle;

/// The thread of the agent. It ends when all senders are gone and the queue is empty.
pub type Agent = JoinHandle<()>;

/// Starts the agent. Returns the sender for repaired ranges, whose folios may be whole again.
///
/// # Errors
/// EAGAIN if the thread cannot be started.
pub fn start() -> io::Result<(Sender<Repaired>, Agent)> {
    let (sender, receiver) = unbounded();
    let agent =
        std::thread::Builder::new().name("collapse".into()).spawn(move || run(&receiver))?;
    Ok((sender, agent))
}

/// Collapses each reported folio. If the kernel cannot do it now, because a page of the folio is
/// held, the folio stays in small pages until its owner asks for a collapse.
fn run(repaired: &Receiver<Repaired>) {
    faults::exempt();
    processors::leave_one();
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
