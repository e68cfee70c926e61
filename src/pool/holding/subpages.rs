//! The changes of a file's subpages that move no folio between the file and the pool. The sealed
//! file is changed through its holding alone, so that the account of pages and memory stays true.

use super::Holding;
use crate::error::Result;
use crate::sealed::Content;
use crate::units::{Range, Subpage};

impl Holding {
    /// As [`Sealed::attach`].
    ///
    /// # Errors
    /// Those of [`Sealed::attach`].
    pub fn attach(&mut self, path: &str) -> Result<()> {
        self.sealed.attach(path)
    }

    /// As [`Sealed::quarantine`].
    ///
    /// # Errors
    /// Those of [`Sealed::quarantine`].
    pub fn quarantine(&mut self, range: Range, time: u64) -> Result<()> {
        self.sealed.quarantine(range, time)
    }

    /// As [`Sealed::repair`].
    ///
    /// # Errors
    /// Those of [`Sealed::repair`].
    pub fn repair(&mut self, range: Range, content: Content<'_>) -> Result<()> {
        self.sealed.repair(range, content)
    }

    /// As [`Sealed::note_hw_errors_in`].
    ///
    /// # Errors
    /// Those of [`Sealed::note_hw_errors_in`].
    pub fn note_hw_errors_in(&mut self, range: Range, time: u64) -> Result<Vec<Subpage>> {
        self.sealed.note_hw_errors_in(range, time)
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
        self.sealed.append(bytes, offset)
    }

    /// As [`Sealed::punch`].
    ///
    /// # Errors
    /// Those of [`Sealed::punch`].
    pub fn punch(&mut self, range: Range) -> Result<()> {
        self.sealed.punch(range)
    }

    /// As [`Sealed::begin_reclaiming`].
    ///
    /// # Errors
    /// Those of [`Sealed::begin_reclaiming`].
    pub fn begin_reclaiming(&mut self, from_strays: bool) -> Result<Option<u64>> {
        self.sealed.begin_reclaiming(from_strays)
    }

    /// As [`Sealed::reclaim_piece`].
    ///
    /// # Errors
    /// Those of [`Sealed::reclaim_piece`].
    pub fn reclaim_piece(&mut self, from: u64) -> Result<Option<u64>> {
        self.sealed.reclaim_piece(from)
    }
}
