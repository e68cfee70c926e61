//! Programs that have a file's memory open by themselves.

use super::{Object, mend, reclaim, return_ahead_of};
use crate::error::{Error, Result};
use crate::fs::pace::Pace;
use crate::pool::Pool;
use crate::units::FOLIO_SIZE;

impl Object {
    /// Lets programs open the file's memory by themselves: `open` mounts the door if it is not
    /// there yet, and opens the memory through it. Until the last program has closed it
    /// ([`Object::close_door`]), nothing changes the file's size, pages or quarantine.
    ///
    /// # Errors
    /// With nothing changed: [`Error::Invalid`] for a file whose size is not a multiple of 2 MiB or
    /// that has released pages, [`Error::Busy`] for one with soft quarantines. The errors of the
    /// system calls and of `open`: the door is shut again a moment later.
    pub fn open_door<T>(
        &self,
        pool: &Pool,
        pace: &Pace,
        open: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let _one_at_a_time = pace.lock(|| self.changing.lock(), || self.changing.try_lock())?;
        if !self.summary().has_door {
            let mut holding = self.lock(pace)?;
            let size = holding.size();
            if size == 0 || !size.is_multiple_of(FOLIO_SIZE) {
                return Err(Error::invalid(format!(
                    "the file has {size} bytes; its memory can be opened if they are a multiple of 2 MiB"
                )));
            }
            if holding.has_released() {
                return Err(Error::invalid(
                    "the file has released pages, which have no memory; fallocate(2) it first",
                ));
            }
            if !holding.sealed().holes().is_empty() {
                return Err(QUARANTINED);
            }
            mend(&mut holding, pace)?;
            return_ahead_of(&mut holding, pool, pace)?;
            holding.open_door()?;
        }
        open()
    }

    /// Shuts the door if no program has the memory open any more, which `unmount` tells. The file
    /// gets its size back, and memory in its gaps unless they are `kept`. True if there is no door.
    ///
    /// # Errors
    /// ENOMEM if the machine has no memory for the gaps. The next call tries again.
    pub fn close_door(&self, kept: bool, unmount: impl FnOnce() -> Result<bool>) -> Result<bool> {
        let _one_at_a_time = self.changing.lock();
        if !self.summary().has_door {
            return Ok(true);
        }
        if !unmount()? {
            return Ok(false);
        }
        let mut holding = self.write_lock();
        holding.restore_size()?;
        if !kept {
            reclaim(&mut holding, false, &Pace::steady())?;
        }
        holding.forget_door()?;
        Ok(true)
    }
}

/// A read(2) of the memory by itself delivers zeros in place of a soft hole.
const QUARANTINED: Error =
    Error::Busy("the file has subpages that are quarantined (soft); repair them first");
