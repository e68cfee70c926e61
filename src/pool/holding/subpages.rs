//! The changes of a file's subpages that move no folio between the file and the pool. The sealed
//! file is changed through its holding alone, so that the account of pages and memory stays true.

use super::Holding;
use crate::error::Result;
use crate::pool::Pool;
use crate::sealed::Content;
#[cfg(doc)]
use crate::sealed::Sealed;
use crate::sys::policy::{Preference, prefer};
use crate::units::{Range, Subpage};

impl Holding {
    /// As [`Sealed::attach`].
    ///
    /// # Errors
    /// Those of [`Sealed::attach`].
    pub fn attach(&mut self, path: &str) -> Result<()> {
        self.sealed.attach(path)
    }

    /// As [`Sealed::open_door`].
    ///
    /// # Errors
    /// Those of [`Sealed::open_door`].
    pub fn open_door(&mut self) -> Result<()> {
        self.sealed.open_door()
    }

    /// As [`Sealed::restore_size`].
    ///
    /// # Errors
    /// Those of [`Sealed::restore_size`].
    pub fn restore_size(&mut self) -> Result<()> {
        self.sealed.restore_size()
    }

    /// As [`Sealed::forget_door`].
    ///
    /// # Errors
    /// Those of [`Sealed::forget_door`].
    pub fn forget_door(&mut self) -> Result<()> {
        self.sealed.forget_door()
    }

    /// As [`Sealed::quarantine`], with a loan of the pool.
    ///
    /// # Errors
    /// Those of [`Sealed::quarantine`], and [`Error::NoMemory`](crate::error::Error::NoMemory)
    /// where nothing is left to lend.
    pub fn quarantine(&mut self, pool: &Pool, part: Range, time: u64) -> Result<()> {
        let node = self.node_counted(Subpage::containing(part.start).folio());
        let quarantined = pool.with_loan(node, part.len(), || self.sealed.quarantine(part, time));
        self.assert_sound();
        quarantined
    }

    /// As [`Sealed::repair`], with a loan of the pool. The memory comes from the home of the page,
    /// as far as that node has some.
    ///
    /// # Errors
    /// Those of [`Sealed::repair`], and [`Error::NoMemory`](crate::error::Error::NoMemory) where
    /// nothing is left to lend.
    pub fn repair(&mut self, pool: &Pool, part: Range, content: Content<'_>) -> Result<()> {
        let node = self.node_counted(Subpage::containing(part.start).folio());
        let lost = self.sealed.lost_runs_in(part).map(Range::len).sum();
        let repaired = pool.with_loan(node, lost, || self.sealed.repair(part, content));
        self.assert_sound();
        repaired
    }

    /// As [`Sealed::note_hw_errors_in`].
    ///
    /// # Errors
    /// Those of [`Sealed::note_hw_errors_in`].
    pub fn note_hw_errors_in(&mut self, range: Range, time: u64) -> Result<Vec<Subpage>> {
        self.sealed.note_hw_errors_in(range, time)
    }

    /// As [`Sealed::forget_bytes`].
    ///
    /// # Errors
    /// Those of [`Sealed::forget_bytes`].
    pub fn forget_bytes(&mut self, part: Range) -> Result<()> {
        self.sealed.forget_bytes(part)
    }

    /// Ends the alarm.
    ///
    /// # Errors
    /// Those of [`Sealed::update`].
    pub fn end_alarm(&mut self) -> Result<()> {
        self.sealed.update(|header| header.alarm = false)
    }

    /// As [`Sealed::append`], for a write that [`Holding::can_append`] allows.
    ///
    /// # Errors
    /// Those of [`Sealed::append`].
    pub fn append(&mut self, bytes: &[u8], offset: u64) -> Result<usize> {
        assert!(self.is_settled(), "a write lengthens a file within its memory");
        let written = self.sealed.append(bytes, offset);
        self.assert_sound();
        written
    }

    /// As [`Sealed::punch`].
    ///
    /// # Errors
    /// Those of [`Sealed::punch`].
    pub fn punch(&mut self, range: Range) -> Result<()> {
        let punched = self.sealed.punch(range);
        self.assert_sound();
        punched
    }

    /// Until the value is dropped, this thread takes memory of the home of the page at `offset`, as
    /// far as that node has some: a write fills gaps. `None` for a file without gaps on request.
    pub fn prefer_home(&self, offset: u64) -> Option<Preference> {
        let home = self.homes.at(offset).filter(|_| self.sealed.is_punched());
        home.and_then(|(node, _)| prefer(node))
    }

    /// As [`Sealed::begin_reclaiming`].
    ///
    /// # Errors
    /// Those of [`Sealed::begin_reclaiming`].
    pub fn begin_reclaiming(&mut self, from_strays: bool) -> Result<Option<u64>> {
        let begun = self.sealed.begin_reclaiming(from_strays);
        self.assert_sound();
        begun
    }

    /// As [`Sealed::reclaim_piece`], for pages with one home. The memory comes from that node, as
    /// far as it has some.
    ///
    /// # Errors
    /// Those of [`Sealed::reclaim_piece`].
    pub fn reclaim_piece(&mut self, from: u64) -> Result<Option<u64>> {
        let home = self.homes.at(from);
        let _preferred = home.and_then(|(node, _)| prefer(node));
        let reclaimed = self.sealed.reclaim_piece(from, home.map_or(u64::MAX, |(_, end)| end));
        self.assert_sound();
        reclaimed
    }
}
