//! Memory ahead: cleared memory behind the end of an empty file, so that the file gets its size at
//! once.
//!
//! ```text
//!   own_ahead, fill_ahead      no program has the file open; the pages are the file's
//!        |
//!        v   begin_growth      the end of file moves over the memory; no memory moves
//!   +----------------+--------------------+
//!   | file           | ahead              |
//!   +----------------+--------------------+
//!                  end of file            end of the file's pages and memory
//!        |
//!        v   return_ahead, or any change but a growth
//!   no memory lies behind the folio with the end of file
//! ```
//!
//! The pages ahead are the file's, though no program has asked for them. So the account and the
//! invariants are those of any file. A note with the file ([`AHEAD`]) says that it has such pages.
//! The note comes before the pages, and goes after them.

use super::{Holding, Progress};
use crate::error::Result;
use crate::placement::Resolved;
use crate::pool::Pool;
use crate::pool::page_set::PageSet;
use crate::pool::plan::Plan;
use crate::sealed::Sealed;
use crate::units::{FOLIO_SIZE, Page, Range};

/// The name of the note. Its content says nothing.
const AHEAD: &str = "ahead";

/// The most memory that is cleared at once: other moves wait for it.
const MOST: u64 = 4 << 20;

impl Holding {
    /// Gives an empty file that no program has opened `pages` pages, without memory.
    ///
    /// # Errors
    /// [`Error::Full`](crate::error::Error::Full); the errors of setxattr(2). Nothing has changed,
    /// but for the note.
    pub fn own_ahead(&mut self, pool: &Pool, pages: u64) -> Result<()> {
        assert!(self.size() == 0 && self.span().is_empty(), "the file is new");
        let wanted = PageSet::from_iter([Page(0)..Page(pages)]);
        let (mut token, homes) = pool.promise_pages(&wanted, &Resolved::default())?;
        self.sealed.notes().keep(AHEAD, AHEAD.as_bytes())?;
        self.has_ahead = true;
        self.sealed.update(|header| header.owned_pages = pages)?;
        homes.into_iter().for_each(|(run, node)| self.homes.insert(run, node));
        let all = token.pages().clone();
        token.hand_over(&all);
        self.own(&all);
        self.assert_sound();
        Ok(())
    }

    /// Moves a piece of memory behind the end of file, for the pages of [`Holding::own_ahead`].
    /// Done when all of them have memory, or when the pages have been given back.
    ///
    /// # Errors
    /// Those of [`Pool::move_piece_out`].
    pub fn fill_ahead(&mut self, pool: &Pool) -> Result<Progress> {
        let end = self.page_size.bytes_of(&self.span()).end;
        let lacking = Range::new(self.ahead().end, end.max(self.ahead().end));
        let Some(transfer) = Plan::new([lacking]).next(&self.homes).filter(|_| self.has_ahead)
        else {
            return Ok(Progress::Done);
        };
        let before = self.sealed.folio_count();
        let moved = pool.move_piece_out(&mut self.sealed, transfer, MOST, Sealed::take_ahead);
        self.count_memory(transfer.node, before);
        moved.map(|_| Progress::More)
    }

    /// The memory behind the folio with the end of file. Empty where there is none.
    pub(super) fn ahead(&self) -> Range {
        Range::new(self.memory_end(), self.sealed.memory_span().max(self.memory_end()))
    }

    /// Pages behind the end of file that no program has asked for.
    pub fn pages_ahead(&self) -> u64 {
        let end = self.page_size.pages_up(self.size());
        if self.has_ahead { self.span().end.0.saturating_sub(end) } else { 0 }
    }

    /// Bytes of [`Holding::pages_ahead`].
    pub fn bytes_ahead(&self) -> u64 {
        self.pages_ahead() * self.page_size.bytes()
    }

    /// Moves a piece of the memory ahead back to the pool. `None` if there is none.
    pub(super) fn give_ahead(&mut self, pool: &Pool) -> Result<Option<Range>> {
        let behind = self.sealed.size().next_multiple_of(FOLIO_SIZE);
        let ahead = Range::new(behind, self.sealed.memory_span().max(behind));
        self.give_piece(pool, ahead, Sealed::give)
    }

    /// Gives the pages ahead and their memory back to the pool, without a pause.
    ///
    /// # Errors
    /// [`Error::NoMemory`](crate::error::Error::NoMemory) where nothing is left to put at stake.
    pub fn return_ahead(&mut self, pool: &Pool) -> Result<()> {
        if !self.has_ahead {
            return Ok(());
        }
        let size = self.size();
        let returning = self.begin_shrinking(pool, size)?;
        self.complete(returning)
    }

    /// No page is ahead any more. A note that stays says so of no page.
    pub(super) fn forget_ahead(&mut self) {
        if std::mem::take(&mut self.has_ahead)
            && let Err(error) = self.sealed.notes().discard(AHEAD)
        {
            log::debug!("a file stays noted as one with pages ahead: {error}");
        }
    }

    /// A growth has used pages ahead.
    pub(super) fn forget_used_ahead(&mut self) {
        if self.pages_ahead() == 0 {
            self.forget_ahead();
        }
    }

    /// Finds out if another process has left pages ahead.
    pub(super) fn recall_ahead(&mut self) -> Result<()> {
        self.has_ahead = self.sealed.notes().kept(AHEAD)?.is_some();
        Ok(())
    }
}
