//! The numbers that the kernel knows files' memory by (FUSE_DEV_IOC_BACKING_OPEN): each regular file that was opened has one.
//!
//! ```text
//!   issued   the kernel has given the number out, and no file says it yet
//!      |     keep: the number is noted with the file (fs::Object::keep_backing)
//!      v
//!    kept    each reply to open(2) and creat(2) says this number, whichever worker answers
//!      |     close: the file has no name, and the kernel does not know the node any more (fs::Fs::forget)
//!      v
//!   closed   the inode of the file is removed next, so no reply can say the number again
//! ```
//!
//! - **One owner.** The note with the file owns the number. A reply borrows the number ([`Lent`]), and fuser never closes one.
//! - **One closer.** [`close`] is called by [`super::forget`] alone, while no request for the node can be under way: the kernel
//!   holds an inode for each node that a request names, and it has just said that it holds none.
//! - **A death while issued.** The next worker closes the number ([`close_lost`]). Numbers are issued one at a time and in
//!   ascending order (fs/fuse/backing.c, `idr_alloc_cyclic`), so a dead worker has lost the last one that was issued, or none.
//! - **A death while closing.** The next worker finds the orphan with its number, and closes the number once more, before
//!   any other is issued: the kernel answers ENOENT.

use crate::error::{Error, Result};
use crate::faults::{Want, attempt};
use crate::fs::{Fs, Object};
use crate::steps::{self, Step};
use crate::sys;
use fuser::{BackingId, ReplyCreate, ReplyOpen};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::Errno;
use std::ops::Deref;
use std::os::fd::OwnedFd;
use std::sync::Mutex;

/// Numbers below the last one that a new worker looks at. A worker that dies loses one number, and one more where it dies in
/// [`close_lost`]; so many workers do not die in a row without one that lives.
const MOST_LOST: u32 = 64;

/// Gives numbers out, one at a time.
#[derive(Default)]
pub struct Issuer {
    issuing: Mutex<()>,
}

impl Issuer {
    /// The number of `object`; the kernel issues one at the first call.
    ///
    /// # Errors
    /// What FUSE_DEV_IOC_BACKING_OPEN and setxattr(2) answer. No number is issued then.
    pub fn number_of(&self, object: &Object, device: &OwnedFd) -> Result<u32> {
        let _one_at_a_time = self.issuing.lock().expect("no panic while a number is issued");
        if let Some(number) = object.backing()? {
            return Ok(number);
        }
        attempt(Want::Memory)?;
        let number = BackingId::create_raw(device, object.data())?;
        steps::done(Step::BackingIssued);
        if let Err(error) = object.keep_backing(number) {
            sys::close_backing(device, number)?;
            return Err(error);
        }
        steps::done(Step::BackingKept);
        Ok(number)
    }
}

/// Has the kernel let go of the memory of `object`, which no request can name any more.
///
/// # Errors
/// ENOENT where a worker has done this and died; what getxattr(2) and FUSE_DEV_IOC_BACKING_CLOSE answer.
pub fn close(object: &Object, device: &OwnedFd) -> Result<()> {
    if let Some(number) = object.backing()? {
        sys::close_backing(device, number)?;
        steps::done(Step::BackingClosed);
    }
    Ok(())
}

/// Closes the numbers that were issued to workers that have died before they kept them. No number may be issued meanwhile.
///
/// # Errors
/// What the kernel answers, and [`Error::Corrupt`] where the number of a file is not known: nothing is closed then.
pub fn close_lost(fs: &Fs, device: &OwnedFd) -> Result<()> {
    let kept = fs.backings()?;
    let last = BackingId::create_raw(device, memfd_create("nothing", MemfdFlags::CLOEXEC)?)?;
    let lost = (last.saturating_sub(MOST_LOST).max(1)..=last).filter(|number| !kept.contains(number));
    lost.map(|number| sys::close_backing(device, number)).try_for_each(|closed| match closed {
        Err(Error::Os(Errno::NOENT)) => Ok(()),
        closed => closed,
    })
}

/// A number on its way to the kernel. fuser would close it where its [`BackingId`] is dropped; here it is taken back.
pub struct Lent(Option<BackingId>);

impl Deref for Lent {
    type Target = BackingId;

    fn deref(&self) -> &BackingId {
        self.0.as_ref().expect("the number is there until it is taken back")
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.0.take().map(BackingId::into_raw);
    }
}

/// A reply that can say a number.
pub trait Borrower {
    /// The number, for this reply.
    fn lend(&self, number: u32) -> Lent;
}

macro_rules! borrower {
    ($reply:ty) => {
        impl Borrower for $reply {
            fn lend(&self, number: u32) -> Lent {
                // SAFETY: `Lent` gives the number back, so fuser, which would own it from here on, never closes it.
                #[allow(unsafe_code)]
                Lent(Some(unsafe { self.wrap_backing(number) }))
            }
        }
    };
}
borrower!(ReplyOpen);
borrower!(ReplyCreate);
