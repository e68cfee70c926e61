//! Checks the invariants of a sealed file.

use super::{Sealed, TRIES};
use crate::error::Result;
use crate::sys::tmpfs;
use crate::units::{FOLIO_SIZE, Folio, Range, SUBPAGE_SIZE, SUBPAGES_PER_FOLIO};
use std::ops::RangeInclusive;

impl Sealed {
    /// Checks S1 and Q1 (each soft hole has exactly one record, and each record is of a soft hole).
    /// Returns a line for each invariant that does not hold.
    ///
    /// # Errors
    /// The errors of fstat(2), fstatfs(2), cachestat(2) and open_by_handle_at(2).
    #[cfg(test)]
    pub fn check(&self) -> Result<Vec<String>> {
        let mut wrong = self.check_totals()?;
        wrong.extend(self.check_part(Range::new(0, self.memory_span()))?);
        Ok(wrong)
    }

    /// The end, in bytes, of the last folio that has memory.
    pub fn memory_span(&self) -> u64 {
        self.folios.len() as u64 * FOLIO_SIZE
    }

    /// Checks the facts that concern the whole file: S1, the size, and the number of the ledger's
    /// blocks.
    ///
    /// # Errors
    /// The errors of fstat(2), fstatfs(2) and open_by_handle_at(2).
    pub fn check_totals(&self) -> Result<Vec<String>> {
        let mut wrong = Vec::new();
        let blocks = tmpfs::blocks(&self.data)?;
        if (blocks.free != 0 && !self.punched) || blocks.limit != self.limit() {
            wrong.push(format!(
                "S1: {} of {} blocks are free, and {} are meant to be taken",
                blocks.free,
                blocks.limit,
                self.limit()
            ));
        }
        match tmpfs::size(&self.data)? {
            size if size == self.size => {}
            size if self.has_door => wrong.push(format!(
                "a program that has the memory open has made {size} bytes of {}",
                self.size
            )),
            _ => wrong.push(format!("the data file is not {} bytes long", self.size)),
        }
        let (ledger, meant) = (self.ledger.blocks()?, self.holes().count() + 1);
        if ledger != meant {
            wrong.push(format!("Q1: the ledger has {ledger} blocks, and {meant} are meant"));
        }
        Ok(wrong)
    }

    /// Checks the folios of `range` and the quarantined subpages in it.
    ///
    /// # Errors
    /// The errors of cachestat(2).
    pub fn check_part(&self, range: Range) -> Result<Vec<String>> {
        let mut wrong = Vec::new();
        for folio in range.intersect(Range::new(0, self.memory_span())).folios() {
            let meant = if self.has_memory(folio) { self.meant_in(folio) } else { 0 };
            let least = if self.punched { 0 } else { meant };
            let resident = self.settled(folio.range(), least..=meant)?;
            if !(least..=meant).contains(&resident) {
                wrong.push(format!(
                    "Q1: folio {} has {resident} subpages, and {meant} are meant",
                    folio.0
                ));
            }
        }
        for hole in self.holes().in_range(range) {
            let resident = self.settled(hole.range, 0..=0)?;
            if resident != 0 {
                wrong.push(format!(
                    "Q1: {resident} quarantined subpages of {} have memory",
                    hole.range
                ));
            }
        }
        Ok(wrong)
    }

    /// Number of subpages of `folio` that are not soft holes. `folio` has memory.
    fn meant_in(&self, folio: Folio) -> u64 {
        let holes: u64 =
            self.holes().in_range(folio.range()).map(|hole| hole.range.len() / SUBPAGE_SIZE).sum();
        SUBPAGES_PER_FOLIO - holes
    }

    /// Number of subpages of `range` that have memory. The function looks again until the number is
    /// in `meant`, [`TRIES`] times at most. A touch of a hole puts its page into the file for an
    /// instant, before it asks for a block and fails (mm/shmem.c, shmem_alloc_and_add_folio).
    fn settled(&self, range: Range, meant: RangeInclusive<u64>) -> Result<u64> {
        let mut resident = tmpfs::resident(&self.data, range)?;
        for _ in 0..TRIES {
            if meant.contains(&resident) {
                break;
            }
            resident = tmpfs::resident(&self.data, range)?;
        }
        Ok(resident)
    }
}
