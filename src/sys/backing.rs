//! The numbers of files that a FUSE server has given the kernel for passthrough (Linux 6.9).
//!
//! A number outlives the worker that got it. fuser can reply with a number only if it owns the
//! number, and fuser closes the numbers that it owns. [`Lent`] is the way around.

use crate::error::Result;
use fuser::{BackingId, ReplyCreate, ReplyOpen};
use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd};

/// Gives the kernel `file` for passthrough (FUSE_DEV_IOC_BACKING_OPEN). Returns its number, which
/// is never 0.
///
/// # Errors
/// The errors of the kernel: EPERM without CAP_SYS_ADMIN, ELOOP for a file of a stacked filesystem.
pub fn open(device: impl AsFd, file: impl AsFd) -> Result<u32> {
    Ok(BackingId::create_raw(device, file)?)
}

/// Makes the kernel drop the file with this number (FUSE_DEV_IOC_BACKING_CLOSE).
///
/// # Errors
/// ENOENT where `number` is no backing number.
pub fn close(device: impl AsFd, number: u32) -> Result<()> {
    const BACKING_CLOSE: libc::Ioctl = 0x4004_e502u32 as libc::Ioctl; // _IOW(229, 2, uint32_t)
    // SAFETY: the kernel reads four bytes from `number`.
    #[allow(unsafe_code)]
    let result =
        unsafe { libc::ioctl(device.as_fd().as_raw_fd(), BACKING_CLOSE, &raw const number) };
    if result < 0 { Err(std::io::Error::last_os_error().into()) } else { Ok(()) }
}

/// A number in a reply to the kernel. fuser closes the number when its [`BackingId`] is dropped, so
/// this type takes the number out of it first.
#[derive(Debug)]
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

/// A reply that can contain a number.
pub trait Borrower {
    /// The number, in the form that this reply needs. If the kernel does not know the number,
    /// open(2) fails with EIO.
    fn lend(&self, number: u32) -> Lent;
}

macro_rules! borrower {
    ($reply:ty) => {
        impl Borrower for $reply {
            fn lend(&self, number: u32) -> Lent {
                // SAFETY: fuser asks for a number that it may close. `Lent` gives it out by
                // reference only and takes it out again, so fuser never closes it. A number that is
                // not open reaches the kernel only, which refuses it.
                #[allow(unsafe_code)]
                Lent(Some(unsafe { self.wrap_backing(number) }))
            }
        }
    };
}
borrower!(ReplyOpen);
borrower!(ReplyCreate);
