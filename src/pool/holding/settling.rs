//! Settling: undoes a change that was stopped half-way, in this process or in one that has died.

use super::{Holding, Progress};
use crate::error::Result;
use crate::pool::Pool;
use crate::units::{FOLIO_SIZE, Range};

/// A settling that is under way.
#[derive(Debug)]
pub struct Settling<'pool> {
    pool: &'pool Pool,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    /// Memory behind `undo_size` goes back to the reserves.
    Shorten,
    /// The file's pages get the memory that they lack, from this byte on.
    Fill(u64),
}

impl<'pool> Settling<'pool> {
    pub fn new(pool: &'pool Pool) -> Self {
        Self { pool, stage: Stage::Shorten }
    }

    pub fn advance(&mut self, holding: &mut Holding) -> Result<Progress> {
        match self.stage {
            Stage::Shorten => self.shorten(holding),
            Stage::Fill(from) => self.fill(holding, from),
        }
    }

    fn shorten(&mut self, holding: &mut Holding) -> Result<Progress> {
        let (size, sealed) = (holding.size(), &mut holding.sealed);
        let behind = Range::new(size.next_multiple_of(FOLIO_SIZE), sealed.size());
        if self
            .pool
            .move_piece_in(sealed, behind, |sealed, piece| sealed.cut(piece.start))?
            .is_some()
        {
            return Ok(Progress::More);
        }
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
    /// stayed reserved for stuck memory.
    fn own_what_has_memory(&self, holding: &mut Holding) {
        let owned = holding.own_what_has_memory();
        if let Some(kept) = &mut holding.unsettled {
            *kept = kept.checked_sub(owned).expect("pages are kept for all memory that is stuck");
            self.pool.token_of_kept(owned).hand_over(owned as i64);
        }
    }

    fn fill(&mut self, holding: &mut Holding, from: u64) -> Result<Progress> {
        let file = Range::new(from, holding.size());
        let lacking =
            holding.owned_in(file).into_iter().find_map(|part| holding.first_without_memory(part));
        let Some(range) = lacking else { return self.finish(holding) };
        let size = holding.sealed.size();
        let moved = self.pool.move_piece_out(&mut holding.sealed, range, size)?;
        self.stage = Stage::Fill(range.start + moved);
        Ok(Progress::More)
    }

    fn finish(&self, holding: &mut Holding) -> Result<Progress> {
        holding.sealed.update(|header| header.undo_size = None)?;
        let left = holding.unsettled.take().unwrap_or(0);
        drop(self.pool.token_of_kept(left)); // the memory of these pages has gone back
        Ok(Progress::Done)
    }
}
