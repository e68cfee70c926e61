//! Conversions from our types to those of fuser.

use crate::error::Error;
use crate::index::{Attributes, Kind};
use crate::units::SUBPAGE_SIZE;
use fuser::{FileAttr, FileType, INodeNo};
use std::time::UNIX_EPOCH;

pub(super) fn errno(error: &Error) -> fuser::Errno {
    fuser::Errno::from_i32(error.errno().raw_os_error())
}

pub(super) fn file_type(kind: Kind) -> FileType {
    match kind {
        Kind::File => FileType::RegularFile,
        Kind::Directory => FileType::Directory,
        Kind::Symlink => FileType::Symlink,
        Kind::Fifo => FileType::NamedPipe,
        Kind::Socket => FileType::Socket,
        Kind::CharDevice => FileType::CharDevice,
        Kind::BlockDevice => FileType::BlockDevice,
    }
}

pub(super) fn file_attr(attributes: &Attributes) -> FileAttr {
    FileAttr {
        ino: INodeNo(attributes.node.0),
        size: attributes.size,
        blocks: attributes.blocks,
        atime: attributes.accessed,
        mtime: attributes.modified,
        ctime: attributes.changed,
        crtime: UNIX_EPOCH,
        kind: file_type(attributes.kind),
        perm: attributes.mode as u16,
        nlink: attributes.links,
        uid: attributes.uid,
        gid: attributes.gid,
        rdev: encode_device(attributes.device.0, attributes.device.1),
        blksize: SUBPAGE_SIZE as u32,
        flags: 0,
    }
}

/// Encodes a device number as the kernel's `new_encode_dev` does (linux/kdev_t.h).
fn encode_device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

#[cfg(test)]
mod tests {
    #[test]
    fn device_numbers_are_encoded_as_the_kernel_does() {
        assert_eq!(super::encode_device(1, 3), 0x103);
        assert_eq!(super::encode_device(8, 0x12345), 0x1230_0845);
    }
}
