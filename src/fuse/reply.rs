//! Replies: one function for each form of a reply turns a result into it.

use super::encode::{errno, file_attr};
use crate::error::Result;
use crate::index::{Attributes, Kind};
use fuser::{Generation, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyWrite, ReplyXattr};
use std::time::Duration;

/// The kernel may keep names and attributes for good: see the head of [`super`].
const FOR_GOOD: Duration = Duration::from_secs(365 * 24 * 3600);

/// The kernel tells inodes apart by their number alone: a number is never used twice.
pub(super) const GENERATION: Generation = Generation(0);

/// The time for which the kernel may keep the attributes of a node. Provisional attributes may not
/// be kept, and neither may those of a file with set-id bits: the daemon removes these bits at a
/// write (FUSE_HANDLE_KILLPRIV_V2), and a kernel that kept them would execute the file with them.
pub(super) fn validity(attributes: &Attributes) -> Duration {
    const SET_ID: u32 = 0o6000;
    let mortal = attributes.kind == Kind::File && attributes.mode & SET_ID != 0;
    if mortal || attributes.provisional { Duration::ZERO } else { FOR_GOOD }
}

pub(super) fn reply_entry(reply: ReplyEntry, result: Result<Attributes>) {
    match result {
        Ok(attributes) => reply.entry(&validity(&attributes), &file_attr(&attributes), GENERATION),
        Err(error) => reply.error(errno(&error)),
    }
}

pub(super) fn reply_attr(reply: ReplyAttr, result: Result<Attributes>) {
    match result {
        Ok(attributes) => reply.attr(&validity(&attributes), &file_attr(&attributes)),
        Err(error) => reply.error(errno(&error)),
    }
}

pub(super) fn reply_empty(reply: ReplyEmpty, result: Result<()>) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(errno(&error)),
    }
}

pub(super) fn reply_data(reply: ReplyData, result: Result<impl AsRef<[u8]>>) {
    match result {
        Ok(bytes) => reply.data(bytes.as_ref()),
        Err(error) => reply.error(errno(&error)),
    }
}

pub(super) fn reply_write(reply: ReplyWrite, result: Result<usize>) {
    match result {
        Ok(written) => reply.written(written as u32),
        Err(error) => reply.error(errno(&error)),
    }
}

/// getxattr(2) and listxattr(2): a size of 0 asks for the length.
pub(super) fn reply_xattr(reply: ReplyXattr, size: u32, result: Result<Vec<u8>>) {
    match result {
        Ok(value) if size == 0 => reply.size(value.len() as u32),
        Ok(value) if value.len() > size as usize => reply.error(fuser::Errno::ERANGE),
        Ok(value) => reply.data(&value),
        Err(error) => reply.error(errno(&error)),
    }
}
