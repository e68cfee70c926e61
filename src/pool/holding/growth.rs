//! Growth and allocation: memory moves first, then the account changes.

use super::{Holding, Progress};
use crate::error::{Error, Result};
use crate::pool::page_set::PageSet;
use crate::pool::plan::Plan;
use crate::pool::{PerNode, Token};
use crate::sealed::Sealed;
use crate::steps::{self, Step};
use crate::units::{Page, Range};

/// A growth or an allocation that is under way.
#[derive(Debug)]
pub struct Growth<'pool> {
    /// The token for the pages that become the file's.
    token: Option<Token<'pool>>,
    /// The released pages that become the file's again.
    missing: PageSet,
    /// The end of the pages that the file will own.
    end: Page,
    before: u64,
    /// The end of the memory that the file had before, with the memory ahead.
    memory_end: u64,
    size: u64,
    /// The parts that still need memory: released pages first, then the part behind the old memory.
    plan: Plan,
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
        end: Page,
        size: u64,
    ) -> Self {
        let ahead = holding.ahead();
        let (memory, memory_end) = (Range::new(0, holding.memory_end()), ahead.end);
        let inside = missing.runs().map(|run| holding.page_size.bytes_of(run).intersect(memory));
        let behind = Range::new(memory_end, size.max(memory_end)).folios_out();
        let plan = Plan::new(inside.chain([behind]));
        Self {
            token: Some(token),
            missing,
            end,
            before: holding.size(),
            memory_end,
            size,
            plan,
            // If the growth is undone, the memory ahead goes back, too.
            filled: if size > holding.size() { vec![ahead] } else { Vec::new() },
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
        let next = self.plan.next(&holding.homes);
        let is_behind = next.is_none_or(|transfer| transfer.range.start >= self.memory_end);
        if is_behind {
            holding.sealed.grow_size(self.size.min(self.memory_end))?;
        }
        let Some(transfer) = next else { return self.commit(holding) };
        let size = if is_behind { self.size } else { self.before };
        let moved = holding.take_piece(self.token().pool, transfer, size)?;
        self.filled.push(self.plan.advance(moved));
        Ok(Progress::More)
    }

    fn token(&self) -> &Token<'pool> {
        self.token.as_ref().expect("it is kept to the end")
    }

    fn token_mut(&mut self) -> &mut Token<'pool> {
        self.token.as_mut().expect("it is kept to the end")
    }

    /// The released pages that become the file's again, by home.
    fn missing_by_home(&self, holding: &Holding) -> PerNode {
        holding.homes.count(self.missing.runs().cloned())
    }

    /// All memory is there: the pages become the file's.
    fn commit(&mut self, holding: &mut Holding) -> Result<Progress> {
        steps::reached(Step::AllocateMoved);
        assert_eq!(self.plan.next(&holding.homes), None, "all memory has moved");
        assert_eq!(holding.sealed.size(), self.size, "the file is as long as was asked for");
        holding.set_released(holding.released.clone().without(&self.missing))?;
        self.are_taken = true;
        let missing = self.missing_by_home(holding);
        self.token_mut().hand_over(&missing);
        holding.own(&missing);
        steps::reached(Step::AllocateTaken);
        holding.sealed.update(|header| {
            header.owned_pages = self.end.0;
            header.undo_size = None;
        })?;
        steps::reached(Step::AllocateDone);
        let rest = self.token().pages().clone();
        self.token_mut().hand_over(&rest);
        holding.own(&rest);
        debug_assert_eq!(self.token().pages().total(), 0, "each page is the file's");
        holding.count_ahead(self.token().pool);
        holding.forget_used_ahead();
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
            let missing = self.missing_by_home(holding);
            self.token_mut().take_over(&missing);
            holding.disown(&missing);
        }
        while let Some(range) = self.filled.pop() {
            let pool = self.token().pool;
            if let Some(moved) = holding.give_piece(pool, range, Sealed::give)? {
                self.filled.push(Range::new(range.start, moved.start));
                return Ok(Progress::More);
            }
        }
        if holding.sealed.size() > self.before {
            holding.sealed.cut(self.before)?;
        }
        holding.sealed.update(|header| header.undo_size = None)?;
        holding.forget_other_homes();
        debug_assert!(self.filled.is_empty(), "all memory has gone back");
        debug_assert_eq!(holding.size(), self.before, "the size is as before");
        Ok(Progress::Done)
    }
}
