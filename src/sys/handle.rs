//! File handles (name_to_handle_at(2), open_by_handle_at(2)), and node ids as the handles of tmpfs.
//!
//! A handle of tmpfs has type 1 and 12 bytes: the generation, and the low and the high half of the
//! inode number. With `inode32` the high half is zero, so a [`InodeId`] contains the whole handle.
//! tmpfs opens an inode by its handle only after it was asked for this handle once. That has always
//! happened, because all ids come from [`of`].

use crate::error::{Error, Result};
use crate::faults::{Want, attempt};
use crate::units::InodeId;
use rustix::io::Errno;
use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

const TMPFS: libc::c_int = 1;
const BYTES: u32 = 12;

/// `struct file_handle` with room for the twelve bytes of tmpfs and FUSE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Handle {
    bytes: u32,
    /// The type of the handle, which defines the meaning of the words (linux/exportfs.h, `enum
    /// fid_type`).
    pub kind: libc::c_int,
    /// The words by which the filesystem finds the inode.
    pub words: [u32; 3],
}

const _: () = assert!(size_of::<Handle>() == 8 + BYTES as usize);

impl Handle {
    /// Makes a handle from its type and words.
    pub fn new(kind: libc::c_int, words: [u32; 3]) -> Self {
        Self { bytes: BYTES, kind, words }
    }

    /// The handle of `name` in the directory `parent`. If `name` is empty, the handle of `parent`
    /// itself.
    ///
    /// # Errors
    /// The errors of name_to_handle_at(2): ENOENT, ENOTDIR, ENAMETOOLONG. EOVERFLOW if the handle
    /// is longer.
    #[track_caller]
    pub fn of(parent: impl AsFd, name: &CStr) -> Result<Self> {
        attempt(Want::Memory)?;
        let mut handle = Self::new(0, [0; 3]);
        let mut mount_id: libc::c_int = 0;
        // SAFETY: `handle` begins with the kernel's structure, and has as many bytes behind it as
        // its length says.
        #[allow(unsafe_code)]
        let result = unsafe {
            libc::name_to_handle_at(
                parent.as_fd().as_raw_fd(),
                name.as_ptr(),
                (&raw mut handle).cast(),
                &raw mut mount_id,
                libc::AT_EMPTY_PATH,
            )
        };
        if result == 0 { Ok(handle) } else { Err(std::io::Error::last_os_error().into()) }
    }

    /// Opens the inode. `mount` is any descriptor on the same filesystem that was not opened with
    /// O_PATH. The caller needs CAP_DAC_READ_SEARCH.
    ///
    /// # Errors
    /// ESTALE if the inode does not exist any more.
    #[track_caller]
    pub fn open(mut self, mount: impl AsFd, flags: libc::c_int) -> Result<OwnedFd> {
        attempt(Want::Descriptor)?;
        let mount = mount.as_fd().as_raw_fd();
        // SAFETY: as above. The kernel only reads the handle.
        #[allow(unsafe_code)]
        let fd = unsafe {
            libc::open_by_handle_at(mount, (&raw mut self).cast(), flags | libc::O_CLOEXEC)
        };
        if fd < 0 {
            let error = std::io::Error::last_os_error();
            return Err(Error::Os(Errno::from_io_error(&error).unwrap_or(Errno::STALE)));
        }
        // SAFETY: the call returned a new descriptor that no other code owns.
        #[allow(unsafe_code)]
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

/// The id of `name` in the directory `parent` on a tmpfs. If `name` is empty, the id of `parent`
/// itself.
///
/// # Errors
/// The errors of [`Handle::of`].
#[track_caller]
pub fn of(parent: impl AsFd, name: &CStr) -> Result<InodeId> {
    let handle = Handle::of(parent, name)?;
    let [generation, inode_low, inode_high] = handle.words;
    if handle.kind != TMPFS || handle.bytes != BYTES || inode_high != 0 {
        return Err(Error::Corrupt(format!(
            "tmpfs handle of type {}, {} bytes",
            handle.kind, handle.bytes
        )));
    }
    Ok(InodeId::from_parts(generation, inode_low))
}

/// Opens the inode `id` on the tmpfs of `mount`.
///
/// # Errors
/// The errors of [`Handle::open`].
#[track_caller]
pub fn open(mount: impl AsFd, id: InodeId, flags: libc::c_int) -> Result<OwnedFd> {
    let (generation, inode_low) = id.parts();
    Handle::new(TMPFS, [generation, inode_low, 0]).open(mount, flags)
}
