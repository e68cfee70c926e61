//! Doors: programs that have the memory of a file open by themselves, as a file on tmpfs.
//!
//! Some programs look at the filesystem of a file and use what only tmpfs and hugetlbfs have: QEMU
//! 8.1 and later migrates by postcopy only into memory of these two (migration/postcopy-ram.c,
//! `test_ramblock_postcopiable`). A program that may write a file can ask for a descriptor of its
//! memory. The kernel counts the holders ([`super::places`]); an agent ([`crate::agents::doors`])
//! shuts the door when the last one is gone.
//!
//! A holder can do to the file's own superblock what a file of tmpfs allows ([`crate::sealed`]). It
//! reaches no other file. The daemon changes nothing of the file meanwhile
//! ([`Error::HasDoor`]), so no change of the daemon's depends on what a holder does.

use super::{Fs, Object, Pace, RequestContext};
use crate::error::{Error, Result};
use crate::sys::passing::{has_unreceived, send, socket_of};
use std::sync::Arc;

impl Fs {
    /// Sends a descriptor of the file's memory over the caller's Unix socket whose number `value`
    /// is.
    ///
    /// # Errors
    /// Those of [`Object::open_door`]; [`Error::Invalid`] if there is no such socket;
    /// [`Error::Busy`] if an earlier message in it was not received.
    pub(super) fn open_door(
        &self,
        object: &Object,
        value: &[u8],
        request: RequestContext,
    ) -> Result<()> {
        let number = std::str::from_utf8(value).ok().and_then(|text| text.trim().parse().ok());
        let expected = "expected the number of a descriptor: a Unix socket of the caller";
        let socket = socket_of(request.thread, number.ok_or_else(|| Error::invalid(expected))?)?;
        match has_unreceived(&socket)? {
            true if request.resent => return Ok(()), // the dead worker has sent it
            true => return Err(Error::Busy("receive what was sent over the socket first")),
            false => {}
        }
        object.open_door(&self.pool, &Pace::of(request), || {
            send(socket, self.places.open_by_door(object.node(), object.data())?)
        })
    }

    /// Shuts the doors of the files whose memory no program has open any more.
    pub fn close_unused_doors(&self) {
        for object in self.with_doors() {
            if let Err(error) = self.close_door(&object) {
                log::debug!("file {}: its door is not shut: {error}", object.node());
            }
        }
    }

    /// The files whose memory programs have open, also those that are removed.
    pub(super) fn with_doors(&self) -> Vec<Arc<Object>> {
        let mut objects = self.objects_and_stranded();
        objects.retain(|object| object.summary().has_door);
        objects
    }

    /// Shuts the file's door unless a program has its memory open. True if there is no door.
    ///
    /// # Errors
    /// Those of [`Object::close_door`].
    pub(super) fn close_door(&self, object: &Object) -> Result<bool> {
        object.close_door(self.keep_punched, || self.places.close_door(object.node()))
    }

    /// Runs `change`, and once more if only a door that no program uses was in the way.
    pub(super) fn heeding_doors<T>(
        &self,
        object: &Object,
        pace: &Pace,
        mut change: impl FnMut() -> Result<T>,
    ) -> Result<T> {
        let result = change();
        if !matches!(result, Err(Error::HasDoor)) {
            return result;
        }
        pace.refuse_if(|| Ok(true))?; // gaps may have to be filled
        if self.close_door(object)? { change() } else { result }
    }
}
