//! The numbers by which the kernel knows the memory of files (FUSE_DEV_IOC_BACKING_OPEN). Each
//! regular file that was opened once has one number.
//!
//! ```text
//!   issued   the kernel has given the number out, and no file has a note of it yet
//!      |     keep: the worker notes the number with the file (fs::Object::keep_backing)
//!      v
//!    kept    every worker uses this number in each reply to open(2) and creat(2)
//!      |     close: the file has no name, and the kernel has given up the node (fs::Fs::forget)
//!      v
//!   closed   the worker removes the inode of the file next, so no reply can have the number again
//! ```
//!
//! - **One owner.** The note with the file owns the number. A reply borrows the number
//!   ([`backing::Lent`]), and fuser never closes it.
//! - **One closer.** Only [`super::adapter::forget`] calls [`close`], when no request for the node
//!   can be under way: the kernel holds an inode for each node that a request names, and the kernel
//!   has just said that it holds none.
//! - **A death while issued.** The next worker closes the number ([`close_lost`]). The kernel
//!   issues numbers one at a time and in ascending order (fs/fuse/backing.c, `idr_alloc_cyclic`),
//!   so a dead worker has lost the last issued number, or none.
//! - **A death while closing.** The next worker finds the orphan with its number, and closes the
//!   number once more, before the kernel issues another one. The kernel answers ENOENT.
//! - **A file that is removed while it is unavailable** ([`crate::fs::Fs::retry_unavailable`]). The
//!   worker cannot read the number when the kernel gives the node up, so it stays issued. The
//!   memory of the file goes back to the pool all the same. The kernel keeps an empty superblock
//!   and one number for each such file: until [`close_lost`] of a later worker, if the number is
//!   among the last [`MOST_LOST`], and otherwise until the filesystem is unmounted.

use crate::error::{Error, Result};
use crate::faults::{Want, attempt};
use crate::fs::{Fs, Object};
use crate::steps::{self, Step};
use crate::sys::backing;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::Errno;
use std::os::fd::OwnedFd;
use std::sync::Mutex;

/// Numbers below the last one that a new worker checks. A worker that dies loses one number, and
/// one more if it dies in [`close_lost`]. Fewer workers than this number die in a row before one
/// lives.
const MOST_LOST: u32 = 64;

/// Gets numbers from the kernel, one at a time.
#[derive(Default)]
pub struct Issuer {
    issuing: Mutex<()>,
}

impl Issuer {
    /// The number of `object`. At the first call for a file, the kernel issues the number.
    ///
    /// # Errors
    /// The errors of FUSE_DEV_IOC_BACKING_OPEN and setxattr(2). Then the file has no number.
    pub fn number_of(&self, object: &Object, device: &OwnedFd) -> Result<u32> {
        let _one_at_a_time = self.issuing.lock().expect("no panic while a number is issued");
        if let Some(number) = object.backing()? {
            return Ok(number);
        }
        attempt(Want::Memory)?;
        let number = backing::open(device, object.data())?;
        steps::reached(Step::BackingIssued);
        if let Err(error) = object.keep_backing(number) {
            backing::close(device, number)?;
            return Err(error);
        }
        steps::reached(Step::BackingKept);
        Ok(number)
    }
}

/// Closes the number of `object`, so that the kernel releases the memory. No request can name the
/// file any more.
///
/// # Errors
/// ENOENT if a worker has closed the number and died. The errors of getxattr(2) and
/// FUSE_DEV_IOC_BACKING_CLOSE.
pub fn close(object: &Object, device: &OwnedFd) -> Result<()> {
    if let Some(number) = object.backing()? {
        backing::close(device, number)?;
        steps::reached(Step::BackingClosed);
    }
    Ok(())
}

/// Closes the numbers that the kernel issued to workers which died before they noted them. The
/// caller makes sure that the kernel issues no number meanwhile.
///
/// # Errors
/// The errors of the kernel. [`Error::Corrupt`] if the number of a file is not known; then nothing
/// is closed.
pub fn close_lost(fs: &Fs, device: &OwnedFd) -> Result<()> {
    let kept = fs.backings()?;
    let last = backing::open(device, memfd_create("nothing", MemfdFlags::CLOEXEC)?)?;
    let lost =
        (last.saturating_sub(MOST_LOST).max(1)..=last).filter(|number| !kept.contains(number));
    lost.map(|number| backing::close(device, number)).try_for_each(|closed| match closed {
        Err(Error::Os(Errno::NOENT)) => Ok(()),
        closed => closed,
    })
}
