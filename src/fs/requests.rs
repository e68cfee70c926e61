//! What changes names and attributes, carried out once, though it may be asked for twice.
//!
//! What a worker had read and not answered when it died, the kernel asks of the next one again ([`Ticket::again`]). Most requests
//! come out the same the second time. For the others:
//!
//! - To make a name that exists, or remove one that does not, is an error the first time and what the dead worker has done the
//!   second: the kernel asks for it only when it has looked the name up, and keeps the directory locked from then on until
//!   it is answered, so that nobody else can have made or removed it.
//! - What an exchange of names, an attribute that must (not) exist, or a repair found is noted before it is changed
//!   ([`crate::index::Index::witness`]); the second time, the answer goes by the note.

use super::{Fs, Pace};
use crate::error::{Error, Result};
use crate::index::{Attributes, New};
use crate::steps::{self, Step};
use crate::sys::identity::{Caller, Member};
use crate::units::NodeId;
use rustix::fs::{RenameFlags, XattrFlags};
use rustix::io::Errno;
use std::ffi::OsStr;

/// A request of the kernel's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket {
    /// Its number, which no other has.
    pub number: u64,
    /// It was asked before, of a worker that died without an answer.
    pub again: bool,
    /// The thread that asks and waits for the answer; 0 where that cannot be seen from here, in another pid namespace.
    pub thread: u32,
    /// That thread is without CAP_FSETID: set-id bits are dropped when it changes contents.
    pub unprivileged: bool,
    /// The thread that carries the request out serves others: what takes longer than a moment is [`Error::TakesLong`].
    pub brief: bool,
}

/// What a request found at first.
const ABSENT: &str = "absent";
const PRESENT: &str = "present";

impl Fs {
    /// Makes an entry that belongs to `caller`.
    ///
    /// # Errors
    /// EEXIST and the like.
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
    /// EEXIST, EMLINK and the like.
    pub fn link(&self, node: NodeId, parent: NodeId, name: &OsStr, ticket: Ticket) -> Result<Attributes> {
        match self.index.link(node, parent, name) {
            Err(Error::Os(Errno::EXIST)) if ticket.again => self.lookup(parent, name),
            result => result.and_then(|attributes| self.with_contents(attributes)),
        }
    }

    /// unlink(2). The memory stays until the last user is gone.
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

    /// Sets an attribute of the inode itself, by somebody.
    ///
    /// # Errors
    /// What setxattr(2) answers.
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
            flags.remove(XattrFlags::CREATE); // what is there now is what this request has put there
        }
        self.inode_changed(node, || self.index.set_attribute(node, name, value, flags.bits() as i32, by))
    }

    /// Removes an attribute of the inode itself.
    ///
    /// # Errors
    /// What removexattr(2) answers.
    pub(super) fn remove_user_attribute(&self, node: NodeId, name: &OsStr, ticket: Ticket) -> Result<()> {
        let first = self.first_found(node, name, ticket)?;
        match self.index.remove_attribute(node, name) {
            Err(Error::Os(Errno::NODATA)) if first == Some(true) => Ok(()),
            result => result,
        }
    }

    /// Whether the attribute was there when this request was asked for the first time; `None` if that is now.
    fn first_found(&self, node: NodeId, name: &OsStr, ticket: Ticket) -> Result<Option<bool>> {
        self.found_before(self.index.attribute(node, name).is_ok(), ticket)
    }

    fn found_before(&self, now: bool, ticket: Ticket) -> Result<Option<bool>> {
        let noted = self.index.witness(ticket.number, if now { PRESENT } else { ABSENT })?;
        Ok(noted.map(|noted| noted == PRESENT))
    }

    /// Whether a request was `due` when it was asked for the first time, of a worker that died.
    pub(super) fn was_due(&self, ticket: Ticket, due: bool) -> Result<bool> {
        Ok(self.found_before(due, ticket)? == Some(true))
    }

    /// The request has been answered, and will not be asked again.
    pub fn dismiss(&self, ticket: Ticket) {
        self.index.dismiss(ticket.number);
    }
}

/// What a removal found no name for, asked again, it has removed.
fn removed(result: Result<Option<NodeId>>, ticket: Ticket) -> Result<Option<NodeId>> {
    match result {
        Err(Error::Os(Errno::NOENT)) if ticket.again => Ok(None),
        result => result,
    }
}
