//! Release: pages in the middle of a file go back, from the last to the first.

use super::{Holding, Progress};
use crate::error::{Error, Result};
use crate::pool::Pool;
use crate::pool::page_set::{MOST_RUNS, Run};
use crate::pool::plan::Plan;
use crate::sealed::Sealed;
use crate::steps::{self, Step};
use crate::units::{Page, Range};

/// A release that is under way. All of its pages are noted as released from the start.
#[derive(Debug)]
pub struct Release<'pool> {
    pool: &'pool Pool,
    /// The pages that the file still owns, ascending.
    runs: Vec<Run>,
    /// The last of these pages has no memory from this byte on.
    moved_from: u64,
    /// The reason to stop at the next page.
    stop: Option<Error>,
    /// Memory could not be moved: the page that was begun must become whole again.
    failed: bool,
}

impl<'pool> Release<'pool> {
    pub fn new(holding: &Holding, pool: &'pool Pool, runs: Vec<Run>) -> Self {
        let mut release = Self { pool, runs, moved_from: 0, stop: None, failed: false };
        release.begin_run(holding);
        release
    }

    pub fn give_up(&mut self, why: Error) {
        self.stop.get_or_insert(why);
    }

    fn begin_run(&mut self, holding: &Holding) {
        self.moved_from = self.runs.last().map_or(0, |run| holding.page_size.bytes_of(run).end);
    }

    /// The part of the page under way that has no memory any more.
    fn begun(&self, holding: &Holding) -> Range {
        let end = self.runs.last().map_or(0, |run| holding.page_size.bytes_of(run).end);
        Range::new(self.moved_from, end).intersect(Range::new(0, holding.memory_end()))
    }

    pub fn advance(&mut self, holding: &mut Holding) -> Result<Progress> {
        if self.failed {
            return self.make_whole(holding);
        }
        let may_stop = self.begun(holding).is_empty() && holding.released.run_count() <= MOST_RUNS;
        match self.stop.clone() {
            Some(why) if may_stop => self.end(holding, why),
            _ if self.runs.is_empty() => self.finish(holding),
            _ => Ok(self.release_piece(holding)),
        }
    }

    fn release_piece(&mut self, holding: &mut Holding) -> Progress {
        let Some(run) = self.runs.last().cloned() else { return Progress::More };
        // A release that has to stop ends with the page that was begun.
        let first = if self.stop.is_some() { Page(run.end.0 - 1) } else { run.start };
        let start = holding.page_size.range(first).start;
        let memory = holding
            .end_with_few_holes(Range::new(start, self.moved_from.min(holding.memory_end())));
        match holding.give_piece(self.pool, memory, Sealed::give) {
            Ok(moved) => {
                self.moved_from = moved.map_or(memory.start, |piece| piece.start);
                steps::reached(Step::ReleaseMoved);
                self.note_released(holding, run);
            }
            Err(error) => {
                self.give_up(error);
                self.failed = true;
            }
        }
        Progress::More
    }

    /// The pages of `run` without memory do not belong to the file any more.
    fn note_released(&mut self, holding: &mut Holding, run: Run) {
        let from = Page(holding.page_size.pages_up(self.moved_from));
        assert!(run.start <= from && from <= run.end, "{from:?} is not in {run:?}");
        holding.release_pages(self.pool, from..run.end);
        if from == run.start {
            self.runs.pop();
            self.begin_run(holding);
        } else {
            *self.runs.last_mut().expect("it is not empty") = run.start..from;
        }
    }

    fn finish(&self, holding: &mut Holding) -> Result<Progress> {
        debug_assert!(self.runs.is_empty() && !self.failed, "each page is released");
        holding.note_is_stale = false;
        match &self.stop {
            Some(why) => Err(why.clone()),
            None => Ok(Progress::Done),
        }
    }

    /// Gives memory, which is zeros, to the page that was begun.
    fn make_whole(&mut self, holding: &mut Holding) -> Result<Progress> {
        let why = self.stop.clone().expect("there is a reason to stop");
        let memory = Range::new(0, holding.memory_end());
        let run = self.runs.last().map(|run| holding.page_size.bytes_of(run).intersect(memory));
        let lacking = run.and_then(|run| holding.first_run(run, false));
        let Some(transfer) = Plan::new(lacking).next(&holding.homes) else {
            return self.end(holding, why);
        };
        let size = holding.sealed.size();
        match holding.take_piece(self.pool, transfer, size) {
            Ok(_) => Ok(Progress::More),
            Err(error) => {
                holding.leave_unsettled(None, &error);
                Err(why)
            }
        }
    }

    /// Ends the release early, and notes only the pages that were released so far.
    fn end(&self, holding: &mut Holding, why: Error) -> Result<Progress> {
        if let Err(error) = holding.note_released() {
            holding.leave_unsettled(None, &error);
        }
        Err(why)
    }
}
