//! Node ids as tmpfs file handles (name_to_handle_at(2), open_by_handle_at(2)).
//!
//! tmpfs's handle is of type 1 and 12 bytes long: generation, low and high half of the inode number. With
//! `inode32` the last is zero, so a handle and a [`NodeId`] are the same thing. The inode must have been asked for
//! its handle once before it can be opened by it; [`of`] is how ids are obtained, so it always has.

use crate::error::{Error, Result};
use crate::units::NodeId;
use rustix::io::Errno;
use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

const HANDLE_TYPE: libc::c_int = 1;
const HANDLE_BYTES: u32 = 12;

/// `struct file_handle` with room for tmpfs's twelve bytes.
#[repr(C)]
struct Handle {
    bytes: u32,
    kind: libc::c_int,
    generation: u32,
    inode_low: u32,
    inode_high: u32,
}

const _: () = assert!(size_of::<Handle>() == 8 + HANDLE_BYTES as usize);

/// The id of `name` in the directory `parent`, or of `parent` itself where `name` is empty.
///
/// # Errors
/// What name_to_handle_at(2) answers: ENOENT, ENOTDIR, ENAMETOOLONG.
pub fn of(parent: impl AsFd, name: &CStr) -> Result<NodeId> {
    let mut handle = Handle { bytes: HANDLE_BYTES, kind: 0, generation: 0, inode_low: 0, inode_high: 0 };
    let mut mount_id: libc::c_int = 0;
    // SAFETY: `handle` starts with the kernel's structure and has as many bytes behind it as it says.
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
    if result != 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    if handle.kind != HANDLE_TYPE || handle.bytes != HANDLE_BYTES || handle.inode_high != 0 {
        return Err(Error::Corrupt(format!("tmpfs handle of type {}, {} bytes", handle.kind, handle.bytes)));
    }
    Ok(NodeId::from_parts(handle.generation, handle.inode_low))
}

/// Opens the inode `id` of the filesystem that `mount` is on, a descriptor that was not opened with O_PATH. Needs
/// CAP_DAC_READ_SEARCH.
///
/// # Errors
/// ESTALE where there is no such inode any more.
pub fn open(mount: impl AsFd, id: NodeId, flags: libc::c_int) -> Result<OwnedFd> {
    let (generation, inode_low) = id.parts();
    let mut handle = Handle { bytes: HANDLE_BYTES, kind: HANDLE_TYPE, generation, inode_low, inode_high: 0 };
    // SAFETY: as above; the kernel only reads the handle.
    #[allow(unsafe_code)]
    let fd = unsafe {
        libc::open_by_handle_at(mount.as_fd().as_raw_fd(), (&raw mut handle).cast(), flags | libc::O_CLOEXEC)
    };
    if fd < 0 {
        return Err(Error::Os(
            Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::STALE),
        ));
    }
    // SAFETY: the call returned a new descriptor that nobody else owns.
    #[allow(unsafe_code)]
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
