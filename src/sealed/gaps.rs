//! Gaps: parts of a file that were punched out and still belong to the file. A program requests a
//! gap (option `punch=keep`), or makes one by MADV_REMOVE, of which the daemon is not told.

use super::holes::between;
use super::{Bytes, PUNCHED, Sealed};
use crate::error::Result;
use crate::steps::{self, Step};
use crate::sys::{self, tmpfs};
use crate::units::{Folio, Range, SUBPAGE_SIZE, SUBPAGES_PER_FOLIO};

/// Bytes of a file that are taken back in one piece. The kernel clears as much memory for it, which
/// takes 1 to 2 ms.
const RECLAIMED_AT_ONCE: u64 = 32 << 20;

impl Sealed {
    /// Gives the memory of `range` to the machine. The next touch there gets other, cleared memory.
    /// The account of folios does not change. If the range covers a subpage in part, and the
    /// subpage has memory, the function zeroes that part.
    ///
    /// The file must not have soft holes, as the freed blocks would fill them.
    ///
    /// # Errors
    /// The errors of fallocate(2), pwrite(2) and setxattr(2).
    /// [`Error::Quarantined`](crate::error::Error::Quarantined) for a memory error in a subpage
    /// that is covered in part.
    pub fn punch(&mut self, range: Range) -> Result<()> {
        assert!(self.holes().is_empty(), "a free block would open a hole");
        let range = range.intersect(Range::new(0, self.size));
        let end = if range.end == self.size {
            self.size.next_multiple_of(SUBPAGE_SIZE)
        } else {
            range.end
        };
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
            steps::reached(Step::PunchNoted);
        }
        tmpfs::punch(&self.data, whole)?;
        steps::reached(Step::PunchDone);
        self.assert_sealed();
        Ok(())
    }

    /// Zeroes a part of a subpage. A subpage without memory reads as zeros, and stays without
    /// memory.
    fn zero_present(&self, range: Range) -> Result<()> {
        const ZEROS: Bytes = [0; SUBPAGE_SIZE as usize];
        if range.is_empty() || tmpfs::resident(&self.data, range)? == 0 {
            return Ok(());
        }
        tmpfs::write_all_at(&self.data, &ZEROS[..range.len() as usize], range.start)
    }

    /// True if the file may have gaps that a program requested.
    pub fn is_punched(&self) -> bool {
        self.punched
    }

    /// Bytes in the gaps that a program requested. The machine has this memory until the next touch
    /// of the gap.
    ///
    /// # Errors
    /// The errors of fstatfs(2).
    pub fn punched_bytes(&self) -> Result<u64> {
        Ok(if self.punched { tmpfs::blocks(&self.data)?.free * SUBPAGE_SIZE } else { 0 })
    }

    /// The parts of `range` that have memory. The caller must not touch the other parts: if a block
    /// is free, a touch there takes memory.
    ///
    /// # Errors
    /// The errors of cachestat(2).
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

    /// True if blocks are free without a request. Either a program has punched the file by
    /// madvise(2) with MADV_REMOVE, which the daemon is not told of, or a change that ended early
    /// has left blocks free.
    ///
    /// # Errors
    /// The errors of fstatfs(2).
    pub fn has_removed(&self) -> Result<bool> {
        let blocks = tmpfs::blocks(&self.data)?;
        Ok(!self.punched && (blocks.free > 0 || blocks.limit != self.limit()))
    }

    /// True if a touch could take memory: the file has gaps, with or without a request.
    ///
    /// # Errors
    /// The errors of fstatfs(2).
    pub fn has_free_blocks(&self) -> Result<bool> {
        Ok(tmpfs::blocks(&self.data)?.free > 0)
    }

    /// Fills all gaps, requested or not, and shuts the holes that were opened by the free blocks.
    ///
    /// # Errors
    /// [`Error::NoMemory`](crate::error::Error::NoMemory).
    pub(super) fn reclaim_removed(&mut self) -> Result<()> {
        let mut next = self.begin_reclaiming(false)?;
        while let Some(from) = next {
            next = self.reclaim_piece(from, u64::MAX)?;
        }
        debug_assert!(!self.punched, "no gap is left that a program requested");
        self.assert_sealed();
        Ok(())
    }

    /// Begins to fill all gaps. Returns the start of the first piece, or `None` if there is nothing
    /// to do. If touched holes have taken all of the free blocks, no block is free: with
    /// `from_strays`, the function looks through the file for such holes all the same.
    ///
    /// # Errors
    /// The errors of the system calls.
    pub fn begin_reclaiming(&mut self, from_strays: bool) -> Result<Option<u64>> {
        let blocks = tmpfs::blocks(&self.data)?;
        if blocks.limit != self.limit() {
            self.ledger.trim_all()?;
            self.seal(&[])?;
        }
        self.assert_sealed();
        if !from_strays && blocks.free == 0 {
            return self.forget_punched().map(|()| None);
        }
        self.shut_strays()?;
        Ok(Some(0))
    }

    /// Fills the gaps of one piece, from the byte `from` on, which ends at `end` at the latest.
    /// Returns the start of the next piece, or `None` if there is nothing more to do. Between two
    /// pieces the file is in a state that a program could make, too: its gaps are those that the
    /// next pieces fill.
    ///
    /// # Errors
    /// [`Error::NoMemory`](crate::error::Error::NoMemory).
    pub fn reclaim_piece(&mut self, from: u64, end: u64) -> Result<Option<u64>> {
        let memory = Range::new(0, self.memory_span().min(end));
        let piece = Range::at(from, RECLAIMED_AT_ONCE).intersect(memory);
        if piece.is_empty() {
            return self.forget_punched().map(|()| None);
        }
        let (folios, lost) = (self.folio_count, self.lost_count());
        self.fill_gaps(piece)?;
        debug_assert_eq!(self.folio_count, folios, "a gap belongs to a folio with memory");
        debug_assert_eq!(self.lost_count(), lost, "a quarantined subpage is no gap");
        Ok(Some(piece.end))
    }

    fn forget_punched(&mut self) -> Result<()> {
        if self.punched {
            steps::reached(Step::UnpunchFilled);
            self.notes().discard(PUNCHED)?;
            self.punched = false;
            steps::reached(Step::UnpunchDone);
        }
        debug_assert!(!self.punched);
        self.assert_sound();
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
