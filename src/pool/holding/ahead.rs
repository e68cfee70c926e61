//! Memory ahead: cleared memory behind the end of an empty file, so that the file gets its size at
//! once.
//!
//! ```text
//!   own_ahead, take_ahead,     no program has the file open; the pages are the file's
//!   tmpfs::clear, end_ahead
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
//! invariants are those of any file, and the account says how many of its pages are ahead. A note
//! with the file ([`AHEAD`]) says that it has such pages. The note comes before the pages, and goes
//! after them.
//!
//! A growth uses the memory only if this worker has cleared it, if it lies on the NUMA nodes that
//! the growth asks for, and if the kernel has met no memory error since it was taken. Else the
//! memory goes back first.

use super::Holding;
use crate::error::Result;
use crate::placement::Resolved;
use crate::pool::page_set::{PageSet, Run};
use crate::pool::plan::Plan;
use crate::pool::{PerNode, Pool};
use crate::sealed::Sealed;
use crate::sys::memory_failures;
use crate::units::{FOLIO_SIZE, NumaNode, Page, Range};

/// The name of the note. Its content says nothing.
const AHEAD: &str = "ahead";

/// The most memory that is taken and cleared at once: who recalls it waits for that.
const MOST: u64 = 4 << 20;

/// The pages ahead of a file, and the state of their memory.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    /// The pages, by home, as the account has them.
    pub(super) pages: PerNode,
    /// The kernel's count of memory errors before the memory was taken.
    failures: Option<u64>,
    /// This worker has cleared all of the memory.
    is_clear: bool,
}

impl Holding {
    /// Gives an empty file that no program has opened `pages` pages, without memory, on the nodes
    /// that `placement` asks for. Returns the home of each page.
    ///
    /// # Errors
    /// Those of [`Pool::promise_pages`], and of setxattr(2). Nothing has changed, but for the note.
    pub fn own_ahead(
        &mut self,
        pool: &Pool,
        pages: u64,
        placement: &Resolved,
    ) -> Result<Vec<(Run, NumaNode)>> {
        assert!(self.size() == 0 && self.span().is_empty(), "the file is new");
        let wanted = PageSet::from_iter([Page(0)..Page(pages)]);
        let failures = memory_failures();
        let (mut token, homes) = pool.promise_ahead(&wanted, placement)?;
        let all = token.pages().clone();
        if let Err(error) = self.note_ahead(pages) {
            drop(token);
            pool.set_ahead(&all, &PerNode::default());
            return Err(error);
        }
        self.ahead = Some(Ahead { failures, pages: all.clone(), is_clear: false });
        homes.iter().cloned().for_each(|(run, node)| self.homes.insert(run, node));
        token.hand_over(&all);
        self.own(&all);
        self.assert_sound();
        Ok(homes)
    }

    fn note_ahead(&mut self, pages: u64) -> Result<()> {
        self.sealed.notes().keep(AHEAD, AHEAD.as_bytes())?;
        self.sealed.update(|header| header.owned_pages = pages)
    }

    /// Takes a piece of memory behind the end of file, for the pages of [`Holding::own_ahead`].
    /// The caller clears it before it takes the next one. Returns the piece, or `None` if all pages
    /// have memory or have been given back.
    ///
    /// # Errors
    /// Those of [`Pool::move_piece_out`].
    pub fn take_ahead(&mut self, pool: &Pool) -> Result<Option<Range>> {
        let end = self.page_size.bytes_of(&self.span()).end;
        let lacking = Range::new(self.ahead().end, end.max(self.ahead().end));
        let is_wanted = self.ahead.is_some();
        let Some(transfer) = Plan::new([lacking]).next(&self.homes).filter(|_| is_wanted) else {
            return Ok(None);
        };
        let before = self.sealed.folio_count();
        let moved = pool.move_piece_out(&mut self.sealed, transfer, MOST, Sealed::take_ahead);
        self.count_memory(transfer.node, before);
        moved.map(|bytes| Some(Range::at(transfer.range.start, bytes)))
    }

    /// The memory of all pages ahead is there, and the caller has cleared it.
    pub fn end_ahead(&mut self) {
        if let Some(ahead) = &mut self.ahead {
            ahead.is_clear = true;
        }
    }

    /// The memory behind the folio with the end of file. Empty where there is none.
    pub(super) fn ahead(&self) -> Range {
        Range::new(self.memory_end(), self.sealed.memory_span().max(self.memory_end()))
    }

    /// True if a growth by `placement` may use the memory ahead, or there is none.
    pub(super) fn is_ahead_fit_for(&self, placement: &Resolved) -> bool {
        let Some(ahead) = &self.ahead else { return true };
        ahead.is_clear
            && self.size().is_multiple_of(FOLIO_SIZE) // else a folio is to be zeroed, which can fail
            && placement.suits(&self.homes.within(self.behind_end()).collect::<Vec<_>>())
            && ahead.failures == memory_failures()
    }

    /// The pages behind the end of file.
    fn behind_end(&self) -> Run {
        let end = Page(self.page_size.pages_up(self.size()));
        end..self.span().end.max(end)
    }

    /// Tells the account how many pages are ahead.
    pub(super) fn count_ahead(&mut self, pool: &Pool) {
        let (before, now) = self.recount_ahead();
        pool.set_ahead(&before, &now);
    }

    /// Counts the pages ahead anew. Returns the pages that the account has had, and those that it
    /// has to have.
    pub(super) fn recount_ahead(&mut self) -> (PerNode, PerNode) {
        let now = self.homes.count(self.released.gaps_within(self.behind_end()));
        match &mut self.ahead {
            Some(ahead) => (std::mem::replace(&mut ahead.pages, now.clone()), now),
            None => Default::default(),
        }
    }

    /// Pages behind the end of file that no program has asked for.
    pub fn pages_ahead(&self) -> u64 {
        self.ahead.as_ref().map_or(0, |ahead| ahead.pages.total())
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
        if self.ahead.is_none() {
            return Ok(());
        }
        let size = self.size();
        let returning = self.begin_shrinking(pool, size)?;
        self.complete(returning)
    }

    /// No page is ahead any more. A note that stays says so of no page.
    pub(super) fn forget_ahead(&mut self) {
        if let Some(ahead) = self.ahead.take() {
            debug_assert_eq!(ahead.pages, PerNode::default(), "no page is ahead");
            if let Err(error) = self.sealed.notes().discard(AHEAD) {
                log::debug!("a file stays noted as one with pages ahead: {error}");
            }
        }
    }

    /// A growth has used pages ahead.
    pub(super) fn forget_used_ahead(&mut self) {
        if self.pages_ahead() == 0 {
            self.forget_ahead();
        }
    }

    /// Finds out if another process has left pages ahead. [`Holding::count_ahead`] counts them when
    /// the file is settled.
    pub(super) fn recall_ahead(&mut self) -> Result<()> {
        self.ahead = self.sealed.notes().kept(AHEAD)?.map(|_| Ahead::default());
        Ok(())
    }
}
