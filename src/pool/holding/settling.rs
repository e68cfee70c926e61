//! Settling: undoes a change that was stopped half-way, in this process or in one that has died.

use super::{Holding, Progress};
use crate::error::Result;
use crate::pool::Pool;
use crate::pool::plan::Plan;
use crate::sealed::Sealed;
use crate::units::{FOLIO_SIZE, Range};

/// A settling that is under way.
#[derive(Debug)]
pub struct Settling<'pool> {
    pool: &'pool Pool,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    /// The memory of a page that was on its way to another home goes back to its home.
    Return,
    /// Memory behind `undo_size` goes back to the reserves.
    Shorten,
    /// The file's pages get the memory that they lack, from this byte on.
    Fill(u64),
}

impl<'pool> Settling<'pool> {
    pub fn new(pool: &'pool Pool) -> Self {
        Self { pool, stage: Stage::Return }
    }

    pub fn advance(&mut self, holding: &mut Holding) -> Result<Progress> {
        match self.stage {
            Stage::Return => self.return_half_moved(holding),
            Stage::Shorten => self.shorten(holding),
            Stage::Fill(from) => self.fill(holding, from),
        }
    }

    fn return_half_moved(&mut self, holding: &mut Holding) -> Result<Progress> {
        if holding.return_half_moved(self.pool)?.is_none() {
            self.stage = Stage::Shorten;
        }
        Ok(Progress::More)
    }

    fn shorten(&mut self, holding: &mut Holding) -> Result<Progress> {
        let size = holding.size();
        if holding.sealed.size() > size && holding.give_ahead(self.pool)?.is_some() {
            return Ok(Progress::More); // the end of file goes back over what lies before this
        }
        let behind = Range::new(size.next_multiple_of(FOLIO_SIZE), holding.sealed.size());
        let cut = |sealed: &mut Sealed, piece: Range| sealed.cut(piece.start);
        if holding.give_piece(self.pool, behind, cut)?.is_some() {
            return Ok(Progress::More);
        }
        let sealed = &mut holding.sealed;
        match sealed.size() {
            longer if longer > size => sealed.cut(size)?,
            _ => sealed.grow_size(size)?,
        }
        self.own_what_has_memory(holding);
        holding.try_to_note_released();
        self.stage = Stage::Fill(0);
        Ok(Progress::More)
    }

    /// Released pages that have memory become the file's. They are taken out of the pages that
    /// stayed promised for stuck memory.
    fn own_what_has_memory(&self, holding: &mut Holding) {
        let owned = holding.release_nothing_with_memory();
        if let Some(kept) = holding.unsettled.take() {
            let owned = holding.homes.count(owned.runs().cloned());
            holding.unsettled = Some(kept.less(&owned));
            self.pool.token_of_kept(owned.clone()).hand_over(&owned);
            holding.own(&owned);
        }
    }

    fn fill(&mut self, holding: &mut Holding, from: u64) -> Result<Progress> {
        let file = Range::new(from, holding.size());
        let lacking =
            holding.owned_in(file).into_iter().find_map(|part| holding.first_run(part, false));
        let Some(transfer) = Plan::new(lacking).next(&holding.homes) else {
            return self.finish(holding);
        };
        let size = holding.sealed.size();
        let moved = holding.take_piece(self.pool, transfer, size)?;
        self.stage = Stage::Fill(transfer.range.start + moved);
        Ok(Progress::More)
    }

    fn finish(&self, holding: &mut Holding) -> Result<Progress> {
        holding.sealed.update(|header| header.undo_size = None)?;
        holding.end_unsettled(self.pool); // the memory of these pages has gone back
        holding.forget_other_homes();
        holding.count_ahead(self.pool);
        debug_assert!(holding.half_moved.is_none(), "no page is on its way");
        debug_assert!(holding.unsettled.is_none(), "no memory is stuck");
        Ok(Progress::Done)
    }
}
