//! Requests that change names and attributes. Each takes effect once, even if the kernel sends the
//! request twice.
//!
//! If a worker dies, the kernel sends each request that this worker had read and not answered to
//! the next worker ([`Ticket::again`]). Most requests have the same result the second time. The
//! others need care:
//!
//! - On a re-sent creation, EEXIST means that the dead worker already made the name. On a re-sent
//!   removal, ENOENT means that the dead worker already removed the name. This is safe: the kernel
//!   has looked the name up before it sends the request, and keeps the directory locked from then
//!   on until the daemon answers. So no other request can have made or removed the name.
//! - An exchange of names, a change of an attribute that must (not) exist, and a repair note what
//!   they find before they change anything ([`crate::index::Index::witness`]). On the re-sent
//!   request, the answer follows the note.

use super::{Fs, Pace};
use crate::error::{Error, Result};
use crate::index::{Attributes, New};
use crate::steps::{self, Step};
use crate::sys::identity::{Caller, Member};
use crate::units::NodeId;
use rustix::fs::{RenameFlags, XattrFlags};
use rustix::io::Errno;
use std::ffi::OsStr;

/// The identity and the circumstances of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket {
    /// The number of the request. The kernel never gives a number to two requests.
    pub number: u64,
    /// The kernel sent this request before, to a worker that died without an answer.
    pub again: bool,
    /// The thread that waits for the answer. 0 if the daemon cannot see the thread, because it is
    /// in another pid namespace.
    pub thread: u32,
    /// The thread has no CAP_FSETID, so its change of contents drops set-id bits.
    pub unprivileged: bool,
    /// The thread that carries the request out also serves other requests. Work that takes longer
    /// than a moment fails with [`Error::TakesLong`] there.
    pub brief: bool,
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
        parent: NodeId,
        name: &OsStr,
        new: New<'_>,
        caller: Caller,
        ticket: Ticket,
    ) -> Result<Attributes> {
        let made = self.index.make(parent, name, new, caller);
        steps::done(Step::CreateNamed);
        match made {
            Err(Error::Os(Errno::EXIST)) if ticket.again => self.lookup(parent, name),
            result => result,
        }
    }

    /// link(2).
    ///
    /// # Errors
    /// EEXIST, EMLINK and the other errors of link(2).
    pub fn link(&self, node: NodeId, parent: NodeId, name: &OsStr, ticket: Ticket) -> Result<Attributes> {
        match self.index.link(node, parent, name) {
            Err(Error::Os(Errno::EXIST)) if ticket.again => self.lookup(parent, name),
            result => result.and_then(|attributes| self.with_contents(attributes)),
        }
    }

    /// unlink(2). The memory stays until the last user of the file is gone.
    ///
    /// # Errors
    /// ENOENT, EISDIR.
    pub fn unlink(&self, parent: NodeId, name: &OsStr, ticket: Ticket) -> Result<()> {
        removed(self.index.unlink(parent, name), ticket)
            .map(|orphan| self.note_orphan(orphan, &Pace::of(ticket)))
    }

    /// rmdir(2).
    ///
    /// # Errors
    /// ENOTEMPTY, ENOTDIR.
    pub fn remove_directory(&self, parent: NodeId, name: &OsStr, ticket: Ticket) -> Result<()> {
        removed(self.index.remove_directory(parent, name).map(|()| None), ticket).map(drop)
    }

    /// renameat2(2).
    ///
    /// # Errors
    /// EEXIST, ENOTEMPTY, EINVAL for RENAME_WHITEOUT.
    pub fn rename(
        &self,
        from: (NodeId, &OsStr),
        to: (NodeId, &OsStr),
        flags: RenameFlags,
        ticket: Ticket,
    ) -> Result<()> {
        if flags.contains(RenameFlags::WHITEOUT) {
            return Err(Error::invalid("there are no whiteouts here"));
        }
        if flags.contains(RenameFlags::EXCHANGE) && self.has_exchanged(from, to, ticket)? {
            return Ok(());
        }
        let renamed = self.index.rename(from, to, flags);
        if flags.contains(RenameFlags::EXCHANGE) {
            steps::done(Step::ExchangeDone);
        }
        removed(renamed, ticket).map(|orphan| self.note_orphan(orphan, &Pace::of(ticket)))
    }

    fn has_exchanged(&self, from: (NodeId, &OsStr), to: (NodeId, &OsStr), ticket: Ticket) -> Result<bool> {
        let id = |(parent, name)| self.index.lookup(parent, name).map(|found| found.node);
        let now = format!("{} {}", id(from)?, id(to)?);
        let noted = self.index.witness(ticket.number, &now)?;
        steps::done(Step::ExchangeWitnessed);
        Ok(noted.is_some_and(|noted| noted != now))
    }

    /// Sets an attribute that the index stores with the inode, on behalf of the user `by`.
    ///
    /// # Errors
    /// The errors of setxattr(2).
    pub(super) fn set_user_attribute(
        &self,
        node: NodeId,
        name: &OsStr,
        (value, flags): (&[u8], i32),
        by: Member,
        ticket: Ticket,
    ) -> Result<()> {
        let mut flags = XattrFlags::from_bits_retain(flags as u32);
        if flags.contains(XattrFlags::CREATE) && self.first_found(node, name, ticket)? == Some(false) {
            flags.remove(XattrFlags::CREATE); // this request has made the attribute that exists now
        }
        self.inode_changed(node, || self.index.set_attribute(node, name, value, flags.bits() as i32, by))
    }

    /// Removes an attribute that the index stores with the inode.
    ///
    /// # Errors
    /// The errors of removexattr(2).
    pub(super) fn remove_user_attribute(&self, node: NodeId, name: &OsStr, ticket: Ticket) -> Result<()> {
        let first = self.first_found(node, name, ticket)?;
        match self.index.remove_attribute(node, name) {
            Err(Error::Os(Errno::NODATA)) if first == Some(true) => Ok(()),
            result => result,
        }
    }

    /// True if an earlier worker noted for this request that the attribute existed. None if no
    /// worker noted anything: then this note is the first.
    fn first_found(&self, node: NodeId, name: &OsStr, ticket: Ticket) -> Result<Option<bool>> {
        self.found_before(self.index.attribute(node, name).is_ok(), ticket)
    }

    fn found_before(&self, now: bool, ticket: Ticket) -> Result<Option<bool>> {
        let noted = self.index.witness(ticket.number, if now { PRESENT } else { ABSENT })?;
        Ok(noted.map(|noted| noted == PRESENT))
    }

    /// True if an earlier worker noted that this request was `due`, and died before it answered.
    pub(super) fn was_due(&self, ticket: Ticket, due: bool) -> Result<bool> {
        Ok(self.found_before(due, ticket)? == Some(true))
    }

    /// Forgets the note of an answered request, which the kernel will not send again.
    pub fn dismiss(&self, ticket: Ticket) {
        self.index.dismiss(ticket.number);
    }
}

/// Turns ENOENT into success on a re-sent removal: the dead worker has removed the name.
fn removed(result: Result<Option<NodeId>>, ticket: Ticket) -> Result<Option<NodeId>> {
    match result {
        Err(Error::Os(Errno::NOENT)) if ticket.again => Ok(None),
        result => result,
    }
}
