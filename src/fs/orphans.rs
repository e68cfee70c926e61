//! Orphans: files without a name that the kernel still refers to; and stranded objects, whose nodes
//! are gone and whose memory has yet to move back to the pool.
//!
//! ```text
//!   a file --unlink--> orphan --FORGET--> stranded --dismantle--> its pages are free
//! ```
//!
//! A growth that finds the pool full waits for the pages of orphans and of stranded objects
//! ([`Fs::patiently`]).

use super::{Fs, Object, Pace};
use crate::error::{Error, Result};
use crate::steps::{self, Step};
use crate::units::InodeId;
use std::sync::{Arc, MutexGuard};

impl Fs {
    /// Counts the pages of a node that has lost its last name as orphaned.
    pub(super) fn note_orphan(&self, orphan: Option<InodeId>) {
        if let Some(object) = orphan.and_then(|node| self.known_object(node)) {
            object.note_orphaned();
        }
    }

    /// The kernel gives up references to `node`. If the node has no name and the kernel does not
    /// know it any more, this removes its inode and returns true. Then the caller must call
    /// [`Fs::dismantle_stranded`], which gives the memory back to the pool. Before the inode is
    /// removed, `close` makes the kernel let the memory go.
    ///
    /// From the question to the kernel until the inode is gone, no request finds the object
    /// ([`Fs::object`]). A later request, for a file handle that a program has kept, finds no
    /// inode: ESTALE.
    pub fn forget(
        &self,
        node: InodeId,
        is_known: impl FnOnce() -> bool,
        close: impl FnOnce(&Object),
    ) -> bool {
        self.index.is_orphan(node) && self.part_with(node, is_known, close)
    }

    fn part_with(
        &self,
        node: InodeId,
        is_known: impl FnOnce() -> bool,
        close: impl FnOnce(&Object),
    ) -> bool {
        let _none_is_made = self.making(node);
        let mut stranded = self.stranded(); // held so that the check sees an object exactly once
        let mut objects = self.objects();
        if !self.index.is_orphan(node) || is_known() {
            return false;
        }
        if let Some(object) = objects.remove(&node) {
            close(&object);
            stranded.push(object);
        }
        if let Err(error) = self.index.erase(node) {
            log::error!("file {node}: its inode could not be removed: {error}");
        }
        steps::reached(Step::DismantleErased);
        true
    }

    /// Repeats the work that had to wait for memory of the machine.
    pub fn retry_what_waits(&self) {
        self.pool.refill();
        self.retry_unavailable();
        if let Err(error) = self.dismantle_stranded() {
            log::debug!("memory of removed files is still not back in the pool: {error}");
        }
    }

    /// Gives the memory of removed files back to the pool. If some memory cannot move now, the
    /// patrol tries again each second.
    ///
    /// # Errors
    /// The reason why the memory of a file could not move, after all files were tried.
    pub fn dismantle_stranded(&self) -> Result<()> {
        let _one_at_a_time = self.dismantling.lock().expect("no panic while memory is moved back");
        let stranded = self.stranded().clone();
        stranded.iter().map(|object| self.dismantle(object)).fold(Ok(()), Result::and)
    }

    /// As [`Fs::dismantle_stranded`]. An error goes to the log.
    pub fn dismantle_stranded_or_warn(&self) {
        if let Err(error) = self.dismantle_stranded() {
            log::warn!(
                "memory of removed files is not back in the pool yet; the patrol tries again: {error}"
            );
        }
    }

    /// True if memory of removed files is on its way back to the pool.
    pub(super) fn is_dismantling(&self) -> bool {
        self.stranded().iter().any(|object| !object.summary().has_door)
    }

    pub(super) fn stranded(&self) -> MutexGuard<'_, Vec<Arc<Object>>> {
        self.stranded.lock().expect("no panic while the list is open")
    }

    fn dismantle(&self, object: &Arc<Object>) -> Result<()> {
        match self.heeding_doors(object, &Pace::steady(), || object.empty(&self.pool)) {
            Err(Error::HasDoor) => return Ok(()), // programs still use its memory
            emptied => emptied?,
        }
        steps::reached(Step::DismantleEmptied);
        self.places.remove(object.node());
        steps::reached(Step::DismantleDetached);
        self.stranded().retain(|other| !Arc::ptr_eq(other, object));
        Ok(())
    }
}
