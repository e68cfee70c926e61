//! The only ways in which a holding's memory and pages change. Each keeps the account of the pages
//! by home, and of the memory by home.

use super::Holding;
use crate::error::Result;
use crate::pool::page_set::Run;
use crate::pool::plan::Transfer;
use crate::pool::{PIECE, PerNode, Pool};
use crate::sealed::{Header, Sealed};
use crate::steps::{self, Step, insist};
use crate::units::{FOLIO_SIZE, Folio, NumaNode, Page, Range};

impl Holding {
    /// Moves a piece of memory here for the start of `transfer`, and makes the sealed file longer
    /// for that, up to `size` bytes. Returns the length of the piece.
    ///
    /// # Errors
    /// Those of [`Pool::move_piece_out`].
    pub(super) fn take_piece(&mut self, pool: &Pool, transfer: Transfer, size: u64) -> Result<u64> {
        let before = self.sealed.folio_count();
        let take = |sealed: &mut Sealed, piece| sealed.take(piece, size);
        let moved = pool.move_piece_out(&mut self.sealed, transfer, PIECE, take);
        self.count_memory(transfer.node, before);
        moved
    }

    /// Moves a piece of memory back to the pool: the last part of `range` that has memory, of pages
    /// with one home. `give` takes it out of the sealed file. Returns the part that moved, or
    /// `None` where `range` has no memory.
    ///
    /// # Errors
    /// Those of [`Pool::move_piece_in`].
    pub(super) fn give_piece(
        &mut self,
        pool: &Pool,
        range: Range,
        give: impl FnOnce(&mut Sealed, Range) -> Result<()>,
    ) -> Result<Option<Range>> {
        let has_memory = |folio: &Folio| self.sealed.has_memory(*folio);
        let Some(last) = range.folios().rev().find(has_memory) else { return Ok(None) };
        let (node, start) = self.homes.around(last.range().start);
        let range = Range::new(range.start.max(start), last.range().end);
        let before = self.sealed.folio_count();
        let moved = pool.move_piece_in(&mut self.sealed, Transfer { range, node }, give);
        self.count_memory(node, before);
        moved
    }

    /// The sealed file had `before` folios. The others came from `node`, or went there.
    pub(super) fn count_memory(&mut self, node: NumaNode, before: u64) {
        let after = self.sealed.folio_count();
        self.memory.add(node, after.saturating_sub(before) * FOLIO_SIZE);
        self.memory.take(node, before.saturating_sub(after) * FOLIO_SIZE);
        self.assert_counted();
    }

    /// `pages` have become the file's.
    pub(super) fn own(&mut self, pages: &PerNode) {
        self.owned = std::mem::take(&mut self.owned).and(pages);
    }

    /// `pages` are the file's no more.
    pub(super) fn disown(&mut self, pages: &PerNode) {
        self.owned = std::mem::take(&mut self.owned).less(pages);
    }

    /// Only the file's pages have homes.
    pub(super) fn forget_other_homes(&mut self) {
        let owned = self.released.gaps_within(self.span()).into_iter().collect();
        self.homes.retain(&owned);
    }

    /// Gives back the pages behind the page with the end of file. No memory moves for that.
    pub(super) fn give_up_pages_behind_end(&mut self, pool: &Pool) -> Result<()> {
        let end = Page(self.page_size.pages_up(self.sealed.size()));
        let behind = end..self.span().end.max(end);
        let given_up = self.homes.count(self.released.gaps_within(behind));
        let update = |header: &mut Header| {
            header.owned_pages = header.owned_pages.min(end.0);
            header.undo_size = None;
        };
        insist(|| self.sealed.update(update))?; // must succeed, as memory may have moved already
        steps::reached(Step::ShrinkNoted);
        if self.released.within(end..Page(u64::MAX)).next().is_some() {
            self.released.remove(end..Page(u64::MAX));
            self.note_is_stale = true;
            self.try_to_note_released();
        }
        steps::reached(Step::ShrinkDone);
        self.homes.remove(end..Page(u64::MAX));
        self.disown(&given_up);
        let (before, now) = self.recount_ahead();
        pool.release_ahead(&given_up, &before, &now);
        debug_assert!(self.span().end <= end, "no page behind the end is the file's");
        Ok(())
    }

    /// The pages of `run`, which have no memory any more, go back to the pool.
    pub(super) fn release_pages(&mut self, pool: &Pool, run: Run) {
        let memory = self.page_size.bytes_of(&run);
        debug_assert_eq!(self.first_run(memory.intersect(self.memory_range()), true), None);
        let released = self.homes.count([run.clone()]);
        self.homes.remove(run.clone());
        self.released.insert(run);
        self.disown(&released);
        pool.release(&released);
    }
}
