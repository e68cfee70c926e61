//! A door: programs have the file `data` open by themselves, without FUSE.
//!
//! ```text
//!   shut                      --- open_door() --->   open
//!   S1 holds                                         gaps are allowed; the size is noted
//!        ^                                              |  the last program has closed it
//!        +--- forget_door() --- gaps are filled <--- restore_size()
//! ```
//!
//! A holder of the descriptor has no other way into the superblock. `data` is a file of root's with
//! the mode 0600: a holder who is not root cannot open it again (/proc/self/fd), nor change the
//! inode's mode, owner or attributes. (With the mode 0666 it could set attributes, and so take the
//! room of the notes.) tmpfs knows no seal that would forbid ftruncate(2) for a file on a mount
//! (F_SEAL_SEAL, mm/shmem.c), so the size is put right when the last holder is gone.

use super::{Notes, PUNCHED, Sealed};
use crate::error::{Error, Result};
use crate::steps::{self, Step};
use crate::sys::tmpfs;
use crate::units::FOLIO_SIZE;

/// Name of the note with the size in bytes, 8 bytes. It is there while there is a door.
const DOOR: &str = "door";

/// The size that is noted of a file with a door.
///
/// # Errors
/// The errors of getxattr(2); [`Error::Corrupt`].
pub(super) fn noted_size(notes: &Notes) -> Result<Option<u64>> {
    let Some(size) = notes.kept(DOOR)? else { return Ok(None) };
    let size = size.try_into().map_err(|_| Error::Corrupt("the size of a file with a door".into()));
    size.map(|size| Some(u64::from_le_bytes(size)))
}

impl Sealed {
    /// True if programs may have `data` open by themselves.
    pub fn has_door(&self) -> bool {
        self.has_door
    }

    /// Prepares the file for programs that have `data` open by themselves. The file has no soft
    /// holes, and memory for each of its bytes and no more.
    ///
    /// # Errors
    /// The errors of setxattr(2). [`Sealed::forget_door`] ends what was done.
    pub fn open_door(&mut self) -> Result<()> {
        assert!(self.holes().is_empty(), "a free block would open a hole");
        assert_eq!(self.size, self.folio_count * FOLIO_SIZE, "each byte has memory");
        if !self.punched {
            self.notes().keep(PUNCHED, &[])?;
            self.punched = true;
        }
        self.notes().keep(DOOR, &self.size.to_le_bytes())?;
        self.has_door = true;
        steps::reached(Step::DoorNoted);
        self.assert_sealed();
        Ok(())
    }

    /// Gives the file its size back, which a program may have changed. No program has `data` open
    /// any more. Bytes that the program has cut off are zeros, as after ftruncate(2).
    ///
    /// # Errors
    /// The errors of ftruncate(2).
    pub fn restore_size(&mut self) -> Result<()> {
        // Also to the same size: this frees what lies behind it.
        tmpfs::set_size(&self.data, self.size)?;
        steps::reached(Step::DoorRestored);
        self.assert_sealed();
        debug_assert_eq!(tmpfs::size(&self.data).ok(), Some(self.size));
        Ok(())
    }

    /// Ends a door, after [`Sealed::restore_size`]. Gaps stay as they are.
    ///
    /// # Errors
    /// The errors of removexattr(2).
    pub fn forget_door(&mut self) -> Result<()> {
        if self.has_door {
            self.notes().discard(DOOR)?;
            self.has_door = false;
            steps::reached(Step::DoorForgotten);
        }
        Ok(())
    }
}
