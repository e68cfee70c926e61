//! The extended attributes of an inode itself.

use super::Index;
use super::inode::{SET_GROUP_ID, change_mode, stat_of};
use crate::attributes::PLACEMENT;
use crate::error::Result;
use crate::sys::identity::Member;
use crate::sys::{calls, fd_path};
use crate::units::InodeId;
use rustix::fs::XattrFlags;
use rustix::io::Errno;
use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};

const ACCESS_ACL: &str = "system.posix_acl_access";

impl Index {
    /// An extended attribute of the inode itself.
    ///
    /// # Errors
    /// The errors of getxattr(2).
    pub fn attribute(&self, node: InodeId, name: &OsStr) -> Result<Vec<u8>> {
        let fd = self.path(node)?;
        let mut value = vec![0; 64 << 10]; // XATTR_SIZE_MAX
        let length = calls::getxattr(fd_path(fd.as_fd()), name, &mut value[..])?;
        value.truncate(length);
        Ok(value)
    }

    /// Sets an extended attribute of the inode itself to a value, with the flags of setxattr(2).
    ///
    /// # Errors
    /// The errors of setxattr(2).
    pub fn set_attribute(
        &self,
        node: InodeId,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        by: Member,
    ) -> Result<()> {
        let fd = self.path(node)?;
        let flags = XattrFlags::from_bits_retain(flags as u32);
        let set = || Ok(calls::setxattr(fd_path(fd.as_fd()), name, value, flags)?);
        self.taking(inodes_for_attribute(name, value), set)?;
        if name == ACCESS_ACL { drop_undue_set_group_id(&fd, by) } else { Ok(()) }
    }

    /// Copies the placement of a directory to a new entry of it.
    pub(super) fn inherit(&self, directory: &OwnedFd, entry: &OwnedFd) -> Result<()> {
        let from = fd_path(directory.as_fd());
        let length = match calls::getxattr_query(&from, PLACEMENT) {
            Err(Errno::NODATA) => return Ok(()),
            length => length?,
        };
        let mut value = vec![0; length];
        // The kernel keeps the directory locked while a name is made, and its attributes with it.
        let length = calls::getxattr(&from, PLACEMENT, &mut value[..])?;
        let value = &value[..length];
        let to = fd_path(entry.as_fd());
        let set = || Ok(calls::setxattr(to, PLACEMENT, value, XattrFlags::empty())?);
        self.taking(inodes_for_attribute(OsStr::new(PLACEMENT), value), set)
    }

    /// Removes an extended attribute of the inode itself.
    ///
    /// # Errors
    /// The errors of removexattr(2).
    pub fn remove_attribute(&self, node: InodeId, name: &OsStr) -> Result<()> {
        let fd = self.path(node)?;
        Ok(calls::removexattr(fd_path(fd.as_fd()), name)?)
    }

    /// The names of the inode's extended attributes, each with a NUL behind it.
    ///
    /// # Errors
    /// The errors of listxattr(2).
    pub fn attribute_names(&self, node: InodeId) -> Result<Vec<u8>> {
        let fd = self.path(node)?;
        let mut names = vec![0; 64 << 10]; // XATTR_LIST_MAX
        let length = calls::listxattr(fd_path(fd.as_fd()), &mut names[..])?;
        names.truncate(length);
        Ok(names)
    }
}

/// Inodes that tmpfs counts for an attribute: one for each 1024 bytes of value, name and
/// description (mm/shmem.c, BOGO_INODE_SIZE).
fn inodes_for_attribute(name: &OsStr, value: &[u8]) -> u64 {
    const DESCRIPTION: usize = 128;
    1 + (DESCRIPTION + name.len() + value.len()) as u64 / 1024
}

/// Setting the access ACL is a chmod(2), which removes set-group-id when the caller is not in the
/// file's group. The kernel cannot do that here, because the daemon sets the ACL as root. The flag
/// FUSE_SETXATTR_EXT would say when to do it; fuser 0.18 does not know that flag.
fn drop_undue_set_group_id(fd: &OwnedFd, by: Member) -> Result<()> {
    let attributes = stat_of(fd)?;
    let undue = attributes.mode & SET_GROUP_ID != 0 && !by.may_set_group_id(attributes.gid);
    change_mode(
        fd,
        attributes.mode,
        if undue { attributes.mode & !SET_GROUP_ID } else { attributes.mode },
    )
}
