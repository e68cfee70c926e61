//! Shrinking: memory goes back from the end of the file on, then the pages do.

use super::{Holding, Progress};
use crate::error::{Error, Result};
use crate::pool::Pool;
use crate::steps::{self, Step};
use crate::units::{FOLIO_SIZE, Range};

/// A shrinking that is under way. Readers never see a byte of the file change. They see the file
/// end earlier, piece by piece.
#[derive(Debug)]
pub struct Shrinking<'pool> {
    pool: &'pool Pool,
    size: u64,
    /// Memory has moved: the file is shorter than it was.
    has_moved: bool,
    failure: Option<Error>,
}

impl<'pool> Shrinking<'pool> {
    pub fn new(pool: &'pool Pool, size: u64) -> Self {
        Self { pool, size, has_moved: false, failure: None }
    }

    pub fn give_up(&mut self, why: Error) {
        self.failure.get_or_insert(why);
    }

    pub fn advance(&mut self, holding: &mut Holding) -> Result<Progress> {
        if self.failure.is_some() {
            return self.finish(holding);
        }
        match holding.give_ahead(self.pool) {
            Ok(None) => {}
            Ok(Some(_)) => return Ok(Progress::More),
            Err(error) => {
                self.give_up(error);
                return Ok(Progress::More);
            }
        }
        let gone = Range::new(self.size.next_multiple_of(FOLIO_SIZE), holding.sealed.size());
        let piece = holding.end_with_few_holes(gone);
        match holding.give_piece(self.pool, piece, |sealed, piece| sealed.cut(piece.start)) {
            Ok(Some(_)) => {
                self.has_moved = true;
                Ok(Progress::More)
            }
            Ok(None) => self.finish(holding),
            Err(error) => {
                self.give_up(error);
                Ok(Progress::More)
            }
        }
    }

    /// The file does not get any shorter: its pages behind the end go back.
    fn finish(&mut self, holding: &mut Holding) -> Result<Progress> {
        if let Some(why) = self.failure.take_if(|_| !self.has_moved) {
            return Err(why); // nothing has changed, nor have the pages behind the end
        }
        steps::reached(Step::ShrinkMoved);
        if self.failure.is_none() && self.size < holding.sealed.size() {
            holding.sealed.cut(self.size)?;
        }
        steps::reached(Step::ShrinkCut);
        holding.give_up_pages_behind_end(self.pool)?;
        holding.forget_ahead();
        debug_assert!(self.failure.is_some() || holding.size() <= self.size, "it is shortened");
        debug_assert!(holding.size() >= self.size, "no byte before the new end is cut off");
        if holding.sealed.size() == 0 {
            holding.end_unsettled(self.pool); // stuck memory has gone back with the rest
        }
        self.failure.take().map_or(Ok(Progress::Done), Err)
    }
}
