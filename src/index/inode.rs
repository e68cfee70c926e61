//! Inodes: stat(2), chmod(2), chown(2), utimens(2) and readlink(2).

use super::Index;
use crate::error::{Error, Result};
use crate::sys::{calls, fd_path};
use crate::units::InodeId;
use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, Stat, Timestamps, Uid, major, minor};
use rustix::io::Errno;
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

const SET_USER_ID: u32 = 0o4000;
pub(super) const SET_GROUP_ID: u32 = 0o2000;

/// File type of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Regular file.
    File,
    /// Directory.
    Directory,
    /// Symbolic link.
    Symlink,
    /// FIFO.
    Fifo,
    /// Socket.
    Socket,
    /// Character device.
    CharDevice,
    /// Block device.
    BlockDevice,
}

impl Kind {
    pub(super) fn from_mode(mode: u32) -> Self {
        match FileType::from_raw_mode(mode) {
            FileType::Directory => Self::Directory,
            FileType::Symlink => Self::Symlink,
            FileType::Fifo => Self::Fifo,
            FileType::Socket => Self::Socket,
            FileType::CharacterDevice => Self::CharDevice,
            FileType::BlockDevice => Self::BlockDevice,
            FileType::RegularFile | FileType::Unknown => Self::File,
        }
    }
}

/// The result of stat(2) for a node. Size and blocks of a regular file come from its object; here
/// they are zero.
#[derive(Clone, Copy, Debug)]
pub struct Attributes {
    /// Its id.
    pub node: InodeId,
    /// Its file type.
    pub kind: Kind,
    /// Permission bits, with set-id and sticky bits.
    pub mode: u32,
    /// Number of names.
    pub links: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device number (major, minor).
    pub device: (u32, u32),
    /// Size in bytes.
    pub size: u64,
    /// Memory in units of 512 bytes.
    pub blocks: u64,
    /// The object's account may still change size and blocks, without a change of the file by a
    /// user. Always false here.
    pub provisional: bool,
    /// Last access, as utimens(2) set it: reads do not change it.
    pub accessed: SystemTime,
    /// Last modification; writes through a mapping do not change it.
    pub modified: SystemTime,
    /// Last change of the inode.
    pub changed: SystemTime,
}

/// The value that utimens(2) sets one of the two times to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Time {
    /// Leave it.
    Omit,
    /// The present.
    Now,
    /// That.
    At(SystemTime),
}

/// An open inode. The calls that change an inode take this, so they need no further descriptor.
#[derive(Debug)]
pub struct Inode {
    pub(super) node: InodeId,
    pub(super) fd: OwnedFd,
}

impl Index {
    /// stat(2).
    ///
    /// # Errors
    /// ESTALE where there is no such node any more.
    pub fn attributes(&self, node: InodeId) -> Result<Attributes> {
        self.attributes_of(&self.inode(node)?)
    }

    /// The same of one that is open.
    ///
    /// # Errors
    /// ESTALE where it is erased.
    pub fn attributes_of(&self, inode: &Inode) -> Result<Attributes> {
        let mut attributes = from_stat(inode.node, &stat(&inode.fd)?);
        if attributes.links == 0 {
            return Err(Error::Os(Errno::STALE)); // erased, but another request still has it open
        }
        if self.is_orphan(inode.node) {
            attributes.links = 0; // its only link is the one in `.orphans`
        }
        Ok(attributes)
    }

    /// The target of a symbolic link.
    ///
    /// # Errors
    /// EINVAL for anything else.
    pub fn read_link(&self, node: InodeId) -> Result<CString> {
        Ok(calls::readlinkat(self.path(node)?, c"", Vec::new())?)
    }

    /// chmod(2).
    ///
    /// # Errors
    /// The errors of fchmodat(2).
    pub fn set_mode(&self, inode: &Inode, mode: u32) -> Result<()> {
        Ok(calls::chmodat(
            CWD,
            fd_path(inode.fd.as_fd()),
            Mode::from_raw_mode(mode),
            AtFlags::empty(),
        )?)
    }

    /// chown(2); the kernel clears set-id bits as it does everywhere.
    ///
    /// # Errors
    /// The errors of fchownat(2).
    pub fn set_owner(&self, inode: &Inode, uid: Option<u32>, gid: Option<u32>) -> Result<()> {
        let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
        Ok(calls::chownat(&inode.fd, c"", uid, gid, AtFlags::EMPTY_PATH)?)
    }

    /// utimens(2).
    ///
    /// # Errors
    /// The errors of utimensat(2).
    pub fn set_times(&self, inode: &Inode, accessed: Time, modified: Time) -> Result<()> {
        set_times_of(&inode.fd, accessed, modified)
    }

    /// Does what a change of the contents demands: sets the modification time and removes file
    /// capabilities. If the writer has no CAP_FSETID (`unprivileged`), also removes set-user-id,
    /// and set-group-id if the group may execute (FUSE_HANDLE_KILLPRIV_V2 in linux/fuse.h).
    ///
    /// # Errors
    /// The errors of chmod(2), removexattr(2) and utimensat(2).
    pub fn contents_changed(&self, node: InodeId, unprivileged: bool) -> Result<()> {
        const CAPABILITIES: &CStr = c"security.capability";
        let fd = self.path(node)?;
        if unprivileged {
            let mode = stat_of(&fd)?.mode;
            let group = if mode & 0o010 != 0 { SET_GROUP_ID } else { 0 };
            change_mode(&fd, mode, mode & !(SET_USER_ID | group))?;
        }
        match calls::removexattr(fd_path(fd.as_fd()), CAPABILITIES) {
            Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP) => {}
            Err(errno) => return Err(errno.into()),
        }
        set_times_of(&fd, Time::Omit, Time::Now)
    }
}

fn set_times_of(fd: &OwnedFd, accessed: Time, modified: Time) -> Result<()> {
    let times =
        Timestamps { last_access: to_timespec(accessed), last_modification: to_timespec(modified) };
    Ok(calls::utimensat(fd, c"", &times, AtFlags::EMPTY_PATH)?)
}

pub(super) fn change_mode(fd: &OwnedFd, before: u32, mode: u32) -> Result<()> {
    if mode == before {
        return Ok(());
    }
    Ok(calls::chmodat(CWD, fd_path(fd.as_fd()), Mode::from_raw_mode(mode), AtFlags::empty())?)
}

pub(super) fn stat_of(fd: &OwnedFd) -> Result<Attributes> {
    Ok(from_stat(InodeId::ROOT, &stat(fd)?))
}

/// stat(2) of an open file. The kernel then looks no path up and takes no memory (fs/stat.c,
/// vfs_fstat).
fn stat(fd: &OwnedFd) -> Result<Stat> {
    Ok(rustix::fs::fstat(fd)?)
}

fn from_stat(node: InodeId, stat: &Stat) -> Attributes {
    Attributes {
        node,
        kind: Kind::from_mode(stat.st_mode),
        mode: stat.st_mode & 0o7777,
        links: stat.st_nlink as u32, // its type is the architecture's
        uid: stat.st_uid,
        gid: stat.st_gid,
        device: (major(stat.st_rdev), minor(stat.st_rdev)),
        size: stat.st_size as u64,
        blocks: stat.st_blocks as u64,
        provisional: false,
        accessed: from_timestamp(stat.st_atime, stat.st_atime_nsec as u32),
        modified: from_timestamp(stat.st_mtime, stat.st_mtime_nsec as u32),
        changed: from_timestamp(stat.st_ctime, stat.st_ctime_nsec as u32),
    }
}

fn from_timestamp(seconds: i64, nanoseconds: u32) -> SystemTime {
    let fraction = Duration::from_nanos(u64::from(nanoseconds));
    match u64::try_from(seconds) {
        Ok(seconds) => UNIX_EPOCH + Duration::from_secs(seconds) + fraction,
        Err(_) => UNIX_EPOCH - Duration::from_secs(seconds.unsigned_abs()) + fraction,
    }
}

fn to_timespec(time: Time) -> rustix::fs::Timespec {
    let special = |nanoseconds| rustix::fs::Timespec { tv_sec: 0, tv_nsec: nanoseconds };
    let time = match time {
        Time::Omit => return special(rustix::fs::UTIME_OMIT),
        Time::Now => return special(rustix::fs::UTIME_NOW),
        Time::At(time) => time,
    };
    match time.duration_since(UNIX_EPOCH) {
        Ok(since) => rustix::fs::Timespec {
            tv_sec: since.as_secs() as i64,
            tv_nsec: i64::from(since.subsec_nanos()) as _,
        },
        Err(before) => {
            let before = before.duration();
            let borrow = i64::from(before.subsec_nanos() > 0);
            rustix::fs::Timespec {
                tv_sec: 0_i64.saturating_sub_unsigned(before.as_secs()) - borrow,
                tv_nsec: (borrow * 1_000_000_000 - i64::from(before.subsec_nanos())) as _,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_the_epoch_survive_both_conversions() {
        for (seconds, nanoseconds) in [
            (-1, 0),
            (-1, 999_999_999),
            (-5, 250),
            (0, 1),
            (7, 0),
            (i64::MIN, 0),
            (i64::MIN, 1),
            (i64::MAX, 7),
        ] {
            let timespec = to_timespec(Time::At(from_timestamp(seconds, nanoseconds)));
            assert_eq!((timespec.tv_sec, timespec.tv_nsec as u32), (seconds, nanoseconds));
        }
    }
}
