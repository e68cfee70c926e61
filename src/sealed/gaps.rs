//! Memory that was punched out and is the file's all the same: on request, or by a program that did not ask.

use super::holes::between;
use super::{Bytes, PUNCHED, Sealed};
use crate::error::Result;
use crate::steps::{self, Step};
use crate::sys::{self, tmpfs};
use crate::units::{Folio, Range, SUBPAGE_SIZE, SUBPAGES_PER_FOLIO};

/// How much of a file is taken back in one piece, which is to clear as much memory: 1 to 2 ms.
const RECLAIMED_AT_ONCE: u64 = 32 << 20;

impl Sealed {
    /// Gives the memory of `range` to the machine and lets whoever touches it have other, cleared memory there. In the account of
    /// folios nothing changes. Subpages that the range covers in part are zeroed, if they have memory.
    ///
    /// The file must not have soft holes: the blocks that come free would fill them.
    ///
    /// # Errors
    /// What the kernel answers; [`Error::Poisoned`] for a memory error in a subpage that is covered in part.
    pub fn punch(&mut self, range: Range) -> Result<()> {
        assert!(self.holes().is_empty(), "a free block would open a hole");
        let range = range.intersect(Range::new(0, self.size));
        let end = if range.end == self.size { self.size.next_multiple_of(SUBPAGE_SIZE) } else { range.end };
        let start = range.start.next_multiple_of(SUBPAGE_SIZE);
        let whole = Range::new(start, end / SUBPAGE_SIZE * SUBPAGE_SIZE);
        self.zero_present(Range::new(range.start, start).intersect(range))?;
        self.zero_present(Range::new(whole.end.max(range.start), range.end))?;
        if whole.is_empty() {
            return Ok(());
        }
        if !self.punched {
            self.notes().keep(PUNCHED, &[])?;
            self.punched = true;
            steps::done(Step::PunchNoted);
        }
        tmpfs::punch(&self.data, whole)?;
        steps::done(Step::PunchDone);
        Ok(())
    }

    /// Zeroes a part of a subpage, unless it has no memory and reads as zeros anyway.
    fn zero_present(&self, range: Range) -> Result<()> {
        const ZEROS: Bytes = [0; SUBPAGE_SIZE as usize];
        if range.is_empty() || tmpfs::resident(&self.data, range)? == 0 {
            return Ok(());
        }
        tmpfs::write_all_at(&self.data, &ZEROS[..range.len() as usize], range.start)
    }

    /// Whether there may be gaps that were asked for.
    pub fn is_punched(&self) -> bool {
        self.punched
    }

    /// Bytes in gaps that were asked for: memory that is the machine's until it is touched.
    ///
    /// # Errors
    /// What fstatfs(2) answers.
    pub fn punched_bytes(&self) -> Result<u64> {
        Ok(if self.punched { tmpfs::blocks(&self.data)?.free * SUBPAGE_SIZE } else { 0 })
    }

    /// The parts of `range` that have memory: what has none would get some from a touch, wherever a block is free.
    ///
    /// # Errors
    /// What cachestat(2) answers.
    pub fn present(&self, range: Range) -> Result<Vec<Range>> {
        let subpages = range.subpages_out();
        match tmpfs::resident(&self.data, range)? {
            0 => Ok(Vec::new()),
            all if all == subpages.len() / SUBPAGE_SIZE => Ok(vec![range]),
            _ => {
                let has_memory =
                    |subpage: &Range| tmpfs::resident(&self.data, *subpage).map(|count| count > 0);
                let mut present = Vec::new();
                for subpage in subpages.steps(SUBPAGE_SIZE) {
                    if has_memory(&subpage)? {
                        present.push(subpage);
                    }
                }
                Ok(present)
            }
        }
    }

    pub(super) fn is_present(&self, folio: Folio) -> Result<bool> {
        Ok(tmpfs::resident(&self.data, folio.range())? == SUBPAGES_PER_FOLIO)
    }

    /// Whether a program has given something up behind our back (madvise(2) with MADV_REMOVE punches the file without
    /// asking), or a change that ended early has left blocks free.
    ///
    /// # Errors
    /// What fstatfs(2) answers.
    pub fn is_torn(&self) -> Result<bool> {
        let blocks = tmpfs::blocks(&self.data)?;
        Ok(!self.punched && (blocks.free > 0 || blocks.limit != self.limit()))
    }

    /// Whether a touch could take memory: of something that was given up, on request or not.
    ///
    /// # Errors
    /// What fstatfs(2) answers.
    pub fn has_free_blocks(&self) -> Result<bool> {
        Ok(tmpfs::blocks(&self.data)?.free > 0)
    }

    /// Takes back what a program gave up, and what was punched, and shuts what that has opened.
    ///
    /// # Errors
    /// [`Error::NoMemory`].
    pub(super) fn reclaim_removed(&mut self) -> Result<()> {
        let mut next = self.begin_reclaiming(false)?;
        while let Some(from) = next {
            next = self.reclaim_piece(from)?;
        }
        Ok(())
    }

    /// Begins with that, and returns where the first piece is; none where nothing is to be done. Touched holes may have all blocks
    /// that are free: `from_strays` has the file looked through for that.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn begin_reclaiming(&mut self, from_strays: bool) -> Result<Option<u64>> {
        let blocks = tmpfs::blocks(&self.data)?;
        if blocks.limit != self.limit() {
            self.ledger.trim_all()?;
            self.seal(&[])?;
        }
        if !from_strays && blocks.free == 0 {
            return self.forget_punched().map(|()| None);
        }
        self.shut_strays()?;
        Ok(Some(0))
    }

    /// Does a piece, from the byte `from` on. Returns where the next one begins; none where nothing is left to be done. Between two
    /// pieces the file is as a program leaves it that gives up what the pieces to come take back.
    ///
    /// # Errors
    /// [`Error::NoMemory`].
    pub fn reclaim_piece(&mut self, from: u64) -> Result<Option<u64>> {
        let piece = Range::at(from, RECLAIMED_AT_ONCE).intersect(Range::new(0, self.memory_span()));
        if piece.is_empty() {
            return self.forget_punched().map(|()| None);
        }
        self.fill_gaps(piece)?;
        Ok(Some(piece.end))
    }

    fn forget_punched(&mut self) -> Result<()> {
        if self.punched {
            steps::done(Step::UnpunchFilled);
            self.notes().discard(PUNCHED)?;
            self.punched = false;
            steps::done(Step::UnpunchDone);
        }
        Ok(())
    }

    fn fill_gaps(&mut self, range: Range) -> Result<()> {
        sys::refuse_more_than_available(tmpfs::blocks(&self.data)?.free * SUBPAGE_SIZE)?;
        let with_memory: Vec<_> = range.folios().filter(|folio| self.has_memory(*folio)).collect();
        for folio in with_memory {
            for part in between(folio.range(), self.lost_runs_in(folio.range())) {
                if tmpfs::resident(&self.data, part)? < part.len() / SUBPAGE_SIZE {
                    self.fill(part)?;
                }
            }
        }
        Ok(())
    }
}
