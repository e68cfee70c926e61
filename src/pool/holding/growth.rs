//! Growth and allocation: memory moves first, then the account changes.

use super::{Holding, PageSet, Progress};
use crate::error::{Error, Result};
use crate::pool::Token;
use crate::sealed::Sealed;
use crate::steps::{self, Step};
use crate::units::{FOLIO_SIZE, Range};

/// A growth or an allocation that is under way.
#[derive(Debug)]
pub struct Growth<'pool> {
    /// The token for the pages that become the file's.
    token: Option<Token<'pool>>,
    /// The released pages that become the file's again.
    missing: PageSet,
    owned_pages: u64,
    before: u64,
    size: u64,
    /// The ranges that still need memory, the first one last. The part behind the old memory comes
    /// after the released pages.
    wanting: Vec<Range>,
    /// The ranges that have got memory, in this order.
    filled: Vec<Range>,
    /// The released pages are the file's again, and not the token's any more.
    are_taken: bool,
    failure: Option<Error>,
}

impl<'pool> Growth<'pool> {
    pub fn new(
        holding: &Holding,
        token: Token<'pool>,
        missing: PageSet,
        owned_pages: u64,
        size: u64,
    ) -> Self {
        let memory_end = holding.memory_end();
        let memory = Range::new(0, memory_end);
        let inside = missing.runs().map(|run| holding.page_size.bytes_of(run).intersect(memory));
        let behind = Range::new(memory_end, size).folios_out();
        let mut wanting: Vec<Range> =
            inside.chain([behind]).filter(|range| !range.is_empty()).collect();
        wanting.reverse();
        Self {
            token: Some(token),
            missing,
            owned_pages,
            before: holding.size(),
            size,
            wanting,
            filled: Vec::new(),
            are_taken: false,
            failure: None,
        }
    }

    pub fn give_up(&mut self, why: Error) {
        self.failure.get_or_insert(why);
    }

    pub fn advance(&mut self, holding: &mut Holding) -> Result<Progress> {
        if self.failure.is_some() {
            return self.undo(holding);
        }
        match self.fill(holding) {
            Err(error) => {
                self.give_up(error);
                Ok(Progress::More)
            }
            progress => progress,
        }
    }

    fn fill(&mut self, holding: &mut Holding) -> Result<Progress> {
        let memory_end = self.before.next_multiple_of(FOLIO_SIZE);
        let next = self.wanting.last().copied();
        let is_behind = next.is_none_or(|range| range.start >= memory_end);
        if is_behind {
            holding.sealed.grow_size(self.size.min(memory_end))?;
        }
        let Some(range) = next else { return self.commit(holding) };
        let size = if is_behind { self.size } else { self.before };
        let moved = self.token().pool.move_piece_out(&mut holding.sealed, range, size)?;
        let (done, left) =
            (Range::at(range.start, moved), Range::new(range.start + moved, range.end));
        self.filled.push(done);
        self.wanting.pop();
        self.wanting.extend((!left.is_empty()).then_some(left));
        Ok(Progress::More)
    }

    fn token(&self) -> &Token<'pool> {
        self.token.as_ref().expect("it is kept to the end")
    }

    /// `pages` of the token's pages become the file's. A negative number goes the other way.
    fn hand_over(&mut self, holding: &Holding, pages: i64) {
        let token = self.token.as_mut().expect("it is kept to the end");
        token.hand_over(pages);
        if holding.orphaned {
            token.pool.note_orphaned(pages);
        }
    }

    /// All memory is there: the pages become the file's.
    fn commit(&mut self, holding: &mut Holding) -> Result<Progress> {
        steps::reached(Step::AllocateMoved);
        holding.set_released(holding.released.clone().without(&self.missing))?;
        self.are_taken = true;
        self.hand_over(holding, self.missing.count() as i64);
        steps::reached(Step::AllocateTaken);
        holding.sealed.update(|header| {
            header.owned_pages = self.owned_pages;
            header.undo_size = None;
        })?;
        steps::reached(Step::AllocateDone);
        self.hand_over(holding, self.token().pages as i64);
        Ok(Progress::Done)
    }

    fn undo(&mut self, holding: &mut Holding) -> Result<Progress> {
        let why = self.failure.clone().expect("there is a reason to undo");
        match self.undo_piece(holding) {
            Ok(Progress::More) => return Ok(Progress::More),
            Ok(Progress::Done) => {}
            Err(error) => self.leave_unsettled(holding, &error),
        }
        Err(why)
    }

    pub(super) fn leave_unsettled(&mut self, holding: &mut Holding, why: &Error) {
        holding.leave_unsettled(self.token.take(), why);
    }

    fn undo_piece(&mut self, holding: &mut Holding) -> Result<Progress> {
        if self.are_taken {
            holding.set_released(holding.released.clone().union(&self.missing))?;
            self.are_taken = false;
            self.hand_over(holding, -(self.missing.count() as i64));
        }
        while let Some(range) = self.filled.pop() {
            let pool = self.token().pool;
            if let Some(moved) = pool.move_piece_in(&mut holding.sealed, range, Sealed::give)? {
                self.filled.push(Range::new(range.start, moved.start));
                return Ok(Progress::More);
            }
        }
        if holding.sealed.size() > self.before {
            holding.sealed.cut(self.before)?;
        }
        holding.sealed.update(|header| header.undo_size = None)?;
        Ok(Progress::Done)
    }
}
