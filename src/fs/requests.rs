//! Requests that change names and attributes. Each takes effect once, even if the kernel sends the
//! request twice.
//!
//! If a worker dies, the kernel sends each request that this worker had read and not answered to
//! the next worker ([`RequestContext::resent`]). Most requests have the same result the second
//! time. The others need care:
//!
//! - On a re-sent creation, EEXIST means that the dead worker already made the name. On a re-sent
//!   removal, ENOENT means that the dead worker already removed the name. This is safe: the kernel
//!   has looked the name up before it sends the request, and keeps the directory locked from then
//!   on until the daemon answers. So no other request can have made or removed the name.
//! - An exchange of names, a change of an attribute that must (not) exist, and a repair note what
//!   they find before they change anything ([`crate::index::Index::witness`]). On the re-sent
//!   request, the answer follows the note.

use super::Fs;
use crate::error::{Error, Result};
use crate::index::{Attributes, Name, New};
use crate::steps::{self, Step};
use crate::sys::identity::{Caller, Member};
use crate::units::InodeId;
use rustix::fs::{RenameFlags, XattrFlags};
use rustix::io::Errno;
use std::ffi::OsStr;

/// The identity and the circumstances of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestContext {
    /// The number of the request. The kernel never gives a number to two requests.
    pub unique: u64,
    /// The kernel sent this request before, to a worker that died without an answer.
    pub resent: bool,
    /// The user who asks.
    pub user: u32,
    /// The thread that waits for the answer. 0 if the daemon cannot see the thread, because it is
    /// in another pid namespace.
    pub thread: u32,
    /// The thread has no CAP_FSETID, so its change of contents drops set-id bits.
    pub unprivileged: bool,
    /// The thread that carries the request out also serves other requests. Work that takes longer
    /// than a moment fails with [`Error::TakesLong`] there.
    pub brief: bool,
}

/// A value that setxattr(2) sets.
#[derive(Clone, Copy, Debug)]
pub struct NewValue<'a> {
    /// The value.
    pub bytes: &'a [u8],
    /// XATTR_CREATE or XATTR_REPLACE.
    pub flags: XattrFlags,
}

/// The texts of a note: the thing that the request is about was absent or present at first.
const ABSENT: &str = "absent";
const PRESENT: &str = "present";

impl Fs {
    /// Makes an entry with `caller` as its owner.
    ///
    /// # Errors
    /// EEXIST and the other errors of mknod(2), mkdir(2) and symlink(2).
    pub fn make(
        &self,
        parent: InodeId,
        name: &OsStr,
        new: New<'_>,
        caller: Caller,
        request: RequestContext,
    ) -> Result<Attributes> {
        match self.index.make(parent, name, new, caller) {
            Err(Error::Os(Errno::EXIST)) if request.resent => {
                let made = self.index.finish_making(parent, name, new)?;
                self.with_contents(made)
            }
            result => result.inspect(|made| self.note_new(made, parent, request)),
        }
    }

    /// link(2).
    ///
    /// # Errors
    /// EEXIST, EMLINK and the other errors of link(2).
    pub fn link(
        &self,
        node: InodeId,
        parent: InodeId,
        name: &OsStr,
        request: RequestContext,
    ) -> Result<Attributes> {
        match self.index.link(node, parent, name) {
            Err(Error::Os(Errno::EXIST)) if request.resent => self.lookup(parent, name),
            result => result.and_then(|attributes| self.with_contents(attributes)),
        }
    }

    /// unlink(2). The memory stays until the last user of the file is gone.
    ///
    /// # Errors
    /// ENOENT, EISDIR.
    pub fn unlink(&self, parent: InodeId, name: &OsStr, request: RequestContext) -> Result<()> {
        removed(self.index.unlink(parent, name), request).map(|orphan| self.note_orphan(orphan))
    }

    /// rmdir(2).
    ///
    /// # Errors
    /// ENOTEMPTY, ENOTDIR.
    pub fn remove_directory(
        &self,
        parent: InodeId,
        name: &OsStr,
        request: RequestContext,
    ) -> Result<()> {
        removed(self.index.remove_directory(parent, name).map(|()| None), request).map(drop)
    }

    /// renameat2(2).
    ///
    /// # Errors
    /// EEXIST, ENOTEMPTY, EINVAL for RENAME_WHITEOUT.
    pub fn rename(
        &self,
        from: Name<'_>,
        to: Name<'_>,
        flags: RenameFlags,
        request: RequestContext,
    ) -> Result<()> {
        if flags.contains(RenameFlags::WHITEOUT) {
            return Err(Error::invalid("there are no whiteouts here"));
        }
        if flags.contains(RenameFlags::EXCHANGE) && self.has_exchanged(from, to, request)? {
            return Ok(());
        }
        let renamed = self.index.rename(from, to, flags);
        if flags.contains(RenameFlags::EXCHANGE) {
            steps::reached(Step::ExchangeDone);
        }
        removed(renamed, request).map(|orphan| self.note_orphan(orphan))
    }

    fn has_exchanged(&self, from: Name<'_>, to: Name<'_>, request: RequestContext) -> Result<bool> {
        let id = |of: Name<'_>| self.index.lookup(of.parent, of.name).map(|found| found.node);
        let now = format!("{} {}", id(from)?, id(to)?);
        let noted = self.index.witness(request.unique, &now)?;
        steps::reached(Step::ExchangeWitnessed);
        Ok(noted.is_some_and(|noted| noted != now))
    }

    /// Sets an attribute that the index stores with the inode, on behalf of the user `by`.
    ///
    /// # Errors
    /// The errors of setxattr(2).
    pub(super) fn set_user_attribute(
        &self,
        node: InodeId,
        name: &OsStr,
        value: NewValue<'_>,
        by: Member,
        request: RequestContext,
    ) -> Result<()> {
        let mut flags = value.flags;
        if flags.contains(XattrFlags::CREATE)
            && self.first_found(node, name, request)? == Some(false)
        {
            flags.remove(XattrFlags::CREATE); // this request has made the attribute that exists now
        }
        self.inode_changed(node, || {
            self.index.set_attribute(node, name, value.bytes, flags.bits() as i32, by)
        })
    }

    /// Removes an attribute that the index stores with the inode.
    ///
    /// # Errors
    /// The errors of removexattr(2).
    pub(super) fn remove_user_attribute(
        &self,
        node: InodeId,
        name: &OsStr,
        request: RequestContext,
    ) -> Result<()> {
        let first = self.first_found(node, name, request)?;
        match self.index.remove_attribute(node, name) {
            Err(Error::Os(Errno::NODATA)) if first == Some(true) => Ok(()),
            result => result,
        }
    }

    /// True if an earlier worker noted for this request that the attribute existed. None if no
    /// worker noted anything: then this note is the first.
    fn first_found(
        &self,
        node: InodeId,
        name: &OsStr,
        request: RequestContext,
    ) -> Result<Option<bool>> {
        self.found_before(self.index.attribute(node, name).is_ok(), request)
    }

    fn found_before(&self, now: bool, request: RequestContext) -> Result<Option<bool>> {
        let noted = self.index.witness(request.unique, if now { PRESENT } else { ABSENT })?;
        Ok(noted.map(|noted| noted == PRESENT))
    }

    /// True if an earlier worker noted that this request was `due`, and died before it answered.
    pub(super) fn was_due(&self, request: RequestContext, due: bool) -> Result<bool> {
        Ok(self.found_before(due, request)? == Some(true))
    }

    /// Forgets the note of an answered request, which the kernel will not send again.
    pub fn dismiss(&self, request: RequestContext) {
        self.index.dismiss(request.unique);
    }
}

/// Turns ENOENT into success on a re-sent removal: the dead worker has removed the name.
fn removed(result: Result<Option<InodeId>>, request: RequestContext) -> Result<Option<InodeId>> {
    match result {
        Err(Error::Os(Errno::NOENT)) if request.resent => Ok(None),
        result => result,
    }
}
