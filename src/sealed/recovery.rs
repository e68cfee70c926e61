//! Opens a sealed file that another process has left. That process may have died between any two
//! system calls.
//!
//! The ledger's records say which copy of a subpage is the true one. No code here guesses from the
//! bytes. Two rules hold:
//! - No byte that is known is treated as lost.
//! - A program can touch all that it could touch before, except quarantined subpages. If a program
//!   has made a gap by MADV_REMOVE, the gap keeps its free blocks until it is filled.
//!
//! The order of [`Sealed::resume`]:
//!
//! ```text
//!   state that a dead process leaves               change here
//!   a reserve without memory at its end            the reserve is cut behind its last memory
//!   a ledger block that is in no record            the block is freed
//!   a hole in a record that has memory             the hole is punched; if a pin holds its memory,
//!                                                  the quarantine is undone
//!   a limit that is not the one of S1              the limit is set
//!   a noted memory error that the kernel           the note is removed
//!     no longer holds
//!   a gap that no program requested                the gap is filled; if the machine has no
//!                                                  memory, the next request that needs it fills it
//! ```

use super::door::noted_size;
use super::hw_errors::hw_error_subpages;
use super::{Ledger, PUNCHED, Reach, Sealed};
use crate::error::{Error, Result};
use crate::sys::mapping::Window;
use crate::sys::{self, calls, handle, tmpfs};
use crate::units::{FOLIO_SIZE, Folio, Range, Subpage};
use rustix::fs::{Mode, OFlags};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

impl Sealed {
    /// Opens a file that [`Sealed::create`] made, by the mount of its superblock. Changes nothing.
    /// The caller then calls [`Sealed::resume`].
    ///
    /// # Errors
    /// [`Error::Corrupt`] for a ledger that is damaged or of another version.
    pub fn open(reach: Reach, mount: OwnedFd) -> Result<Self> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let data: Arc<File> = Arc::new(calls::openat(&mount, "data", flags, Mode::empty())?.into());
        let ledger = Ledger::open(data.clone(), &mount)?;
        let (door, root) = (noted_size(ledger.notes())?, handle::of(&mount, c"")?);
        let size = door.map_or_else(|| tmpfs::size(&data), Ok)?;
        let (punched, has_door) = (ledger.notes().kept(PUNCHED)?.is_some(), door.is_some());
        let empty = Self::of(root, data, ledger, reach);
        let mut sealed = Self { size, punched, has_door, ..empty };
        sealed.find_memory()?;
        Ok(sealed)
    }

    /// Finishes or undoes the change that was under way, and restores S1.
    ///
    /// `meant` are the folios that should have memory. If such a folio has none at all, a program
    /// has made a gap there, and the function fills it. A folio without memory that is not in
    /// `meant` stays without memory. Requested gaps ([`Sealed::punch`]) stay as they are. So does a
    /// noted size ([`super::Header::undo_size`]): memory must move when the file goes back to
    /// it, so this is left to the owner.
    ///
    /// # Errors
    /// The errors of the system calls. If memory is missing, nothing fails: the next request that
    /// needs the gaps' memory fills them.
    pub fn resume(&mut self, meant: impl Iterator<Item = Folio>) -> Result<()> {
        meant.for_each(|folio| self.mark(folio.range(), true));
        self.fit_reserve()?;
        self.ledger.trim_all()?;
        self.empty_holes()?;
        if tmpfs::blocks(&self.data)?.limit != self.limit() {
            self.seal(&[])?; // only if needed: this remount is the most expensive call here
        }
        self.recall_hw_errors()?;
        if !self.punched {
            self.reclaim_around_hw_errors()?;
        }
        self.assert_sealed();
        Ok(())
    }

    /// Empties the holes that have memory: a touch has filled them, or a quarantine or repair of
    /// them was under way. If a pin holds the memory, the quarantine cannot be finished, and the
    /// function undoes it.
    fn empty_holes(&mut self) -> Result<()> {
        let filled = self.filled_holes(&[])?;
        let of_one_folio =
            |one: &Range, next: &Range| one.start / FOLIO_SIZE == next.start / FOLIO_SIZE;
        for runs in filled.chunk_by(of_one_folio) {
            match self.seal(runs) {
                Err(why @ (Error::Pinned | Error::Busy(_))) => {
                    log::warn!("a quarantine at {} is undone: {why}", runs[0]);
                    self.put_back(runs)?;
                    self.ledger.trim_all()?;
                }
                result => result?,
            }
        }
        Ok(())
    }

    /// Fills gaps, as [`Sealed::reclaim_removed`] does. The kernel may have met a memory error
    /// while there was no daemon, so the error is not noted yet. The function then notes it, and
    /// fills the gaps around it.
    fn reclaim_around_hw_errors(&mut self) -> Result<()> {
        let mut reclaimed = self.reclaim_removed();
        if let Err(Error::Quarantined) = reclaimed {
            self.note_hw_errors(sys::unix_time())?;
            reclaimed = self.reclaim_removed();
        }
        match reclaimed {
            Err(Error::NoMemory) => {
                log::warn!(
                    "what a program has removed of a file cannot be taken back yet: the machine has no memory"
                );
                Ok(())
            }
            result => result,
        }
    }

    /// Reads the noted memory errors, and removes those that the kernel no longer holds.
    fn recall_hw_errors(&mut self) -> Result<()> {
        self.ledger.read_hw_errors()?;
        let noted: Vec<Subpage> = self.hw_errors().keys().copied().collect();
        for subpage in noted {
            let is_there = self.has_memory(subpage.folio())
                && !self.present(subpage.range())?.is_empty()
                && !hw_error_subpages(&Window::new(&self.data, subpage.range())?, subpage.range())?
                    .is_empty();
            if !is_there {
                self.ledger.forget_hw_errors(subpage)?;
            }
        }
        Ok(())
    }

    /// Finds the folios that have memory. A folio counts as such if any memory or a soft hole is in
    /// it. In a file with requested gaps each folio counts, as a part without memory is a gap
    /// there.
    fn find_memory(&mut self) -> Result<()> {
        for folio in Range::new(0, self.size).folios() {
            let has_holes = self.holes().in_range(folio.range()).next().is_some();
            if self.punched || has_holes || tmpfs::resident(&self.data, folio.range())? > 0 {
                self.mark(folio.range(), true);
            }
        }
        self.find_memory_ahead()
    }

    /// Finds the folios behind the end of file ([`Sealed::take_ahead`]). There is none behind the
    /// first one without memory.
    fn find_memory_ahead(&mut self) -> Result<()> {
        let mut folio = Folio(self.size.div_ceil(FOLIO_SIZE));
        // Behind the end of a file with a door, memory is what a program has left there.
        let has_ahead = self.reach == Reach::Programs && !self.has_door;
        while has_ahead && tmpfs::resident(&self.data, folio.range())? > 0 {
            self.mark(folio.range(), true);
            folio = Folio(folio.0 + 1);
        }
        Ok(())
    }

    /// Cuts a reserve behind its last folio with memory.
    fn fit_reserve(&mut self) -> Result<()> {
        match self.reach {
            Reach::Programs => Ok(()),
            Reach::Private => self.cut(self.folios.len() as u64 * FOLIO_SIZE),
        }
    }
}

/// States between two system calls. The tests make them by hand on real superblocks.
#[cfg(test)]
mod tests {
    use super::super::tests::{mapped, pinned};
    use super::super::{Bytes, Content};
    use super::*;
    use crate::units::{SUBPAGE_SIZE, SUBPAGES_PER_FOLIO};

    const TIME: u64 = 1_800_000_000;
    const ZEROS: Bytes = [0; SUBPAGE_SIZE as usize];
    const SEVENS: Bytes = [7; SUBPAGE_SIZE as usize];
    const SIZE: u64 = 2 * FOLIO_SIZE;
    const LOST: Subpage = Subpage(3);
    /// Offset in the subpage at which a program stores.
    const PLACE: u64 = 100;

    /// A file of two folios; each byte is 7.
    fn sevens() -> Sealed {
        let mut sealed = Sealed::create(Reach::Programs, None).expect("root makes superblocks");
        sealed.take(Range::new(0, SIZE), SIZE).unwrap();
        tmpfs::write_all_at(&sealed.data, &[7; SIZE as usize], 0).unwrap();
        sealed
    }

    fn open_again(sealed: &Sealed, is_meant: bool) -> Sealed {
        let mut again = Sealed::open(sealed.reach, sealed.mount().unwrap()).unwrap();
        let meant = is_meant.then(|| Range::new(0, SIZE).folios());
        again.resume(meant.into_iter().flatten()).unwrap();
        assert_eq!(again.check().unwrap(), Vec::<String>::new());
        again
    }

    fn bytes_of(sealed: &Sealed, subpage: Subpage) -> Bytes {
        let mut bytes = ZEROS;
        tmpfs::read_at(&sealed.data, &mut bytes, subpage.offset()).unwrap();
        bytes
    }

    fn store(sealed: &Sealed) {
        tmpfs::write_all_at(&sealed.data, &[9], LOST.offset() + PLACE).unwrap();
    }

    /// Asserts that each byte of the subpage, or of its copy in the ledger, is 7. Only the byte
    /// that a program has stored may differ.
    fn assert_known(sealed: &Sealed) {
        let is_lost = sealed.is_lost(LOST);
        let bytes = if is_lost { sealed.rescued(LOST).unwrap() } else { bytes_of(sealed, LOST) };
        let others = bytes.iter().zip(0..).filter(|(_, place)| *place != PLACE);
        assert!(
            others.into_iter().all(|(byte, _)| *byte == 7),
            "bytes are lost (quarantined: {is_lost})"
        );
    }

    #[test]
    fn an_unrecorded_quarantine_is_undone_and_keeps_later_stores() {
        let sealed = sevens();
        sealed.set_limit(1).unwrap();
        let ledger = sealed.notes().file().unwrap();
        tmpfs::write_all_at(&ledger, &SEVENS, super::super::ledger::place(LOST.range()).start)
            .unwrap();
        tmpfs::write_all_at(&sealed.data, &[8; SUBPAGE_SIZE as usize], LOST.offset()).unwrap();
        let mut again = open_again(&sealed, false);
        assert!(bytes_of(&again, LOST) == [8; SUBPAGE_SIZE as usize], "a store is lost");
        assert!(again.holes().is_empty());
        again.quarantine(LOST.range(), TIME).unwrap(); // as the kernel sends the request again
        assert!(again.rescued(LOST).unwrap() == [8; SUBPAGE_SIZE as usize]);
    }

    /// The states of a quarantine and of a repair in which the record names the subpage. The limit
    /// is raised, and the hole has memory or not.
    #[test]
    fn a_recorded_subpage_is_a_hole_in_spite_of_stores() {
        for (punched, stored) in [(false, false), (false, true), (true, false), (true, true)] {
            let mut sealed = sevens();
            sealed.quarantine(LOST.range(), TIME).unwrap();
            sealed.set_limit(1).unwrap();
            if !punched {
                tmpfs::write_all_at(&sealed.data, &SEVENS, LOST.offset()).unwrap();
            }
            if stored {
                store(&sealed);
            }
            let again = open_again(&sealed, false);
            assert!(again.is_lost(LOST) && again.header().alarm);
            assert_known(&again);
        }
    }

    #[test]
    fn a_repair_with_its_record_struck_keeps_later_stores() {
        for freed in [false, true] {
            let mut sealed = sevens();
            sealed.quarantine(LOST.range(), TIME).unwrap();
            sealed.set_limit(1).unwrap();
            tmpfs::write_all_at(&sealed.data, &SEVENS, LOST.offset()).unwrap();
            sealed.ledger.strike(&[LOST.range()]).unwrap();
            store(&sealed);
            if freed {
                sealed.ledger.free(LOST.range()).unwrap();
            }
            let again = open_again(&sealed, false);
            assert!(!again.is_lost(LOST));
            assert_eq!(bytes_of(&again, LOST)[PLACE as usize], 9, "a store is lost");
            assert_known(&again);
        }
    }

    #[test]
    fn a_quarantine_of_a_folio_that_is_pinned_is_undone() {
        let mut sealed = sevens();
        let pin = pinned(&sealed, 9 * SUBPAGE_SIZE);
        sealed.set_limit(1).unwrap();
        sealed.keep(&[LOST.range()], TIME).unwrap();
        tmpfs::punch(&sealed.data, LOST.range()).unwrap();
        let again = open_again(&sealed, false);
        assert!(again.holes().is_empty());
        assert_known(&again);
        drop(pin);
    }

    #[test]
    fn a_lost_block_of_the_ledger_is_unknown_and_opens_no_hole() {
        let mut sealed = sevens();
        sealed.quarantine(Range::at(LOST.offset(), 2 * SUBPAGE_SIZE), TIME).unwrap();
        let ledger = sealed.notes().file().unwrap();
        tmpfs::write_all_at(&ledger, &[6], super::super::ledger::place(LOST.range()).start)
            .unwrap();
        let mut again = open_again(&sealed, false);
        assert_eq!(again.holes(), sealed.holes());
        assert!(matches!(again.rescued(LOST), Err(Error::NoData)));
        assert!(again.rescued(Subpage(LOST.0 + 1)).unwrap() == SEVENS);
        again.repair(Folio(0).range(), Content::Known).unwrap();
        assert!(bytes_of(&again, LOST) == ZEROS && bytes_of(&again, Subpage(LOST.0 + 1)) == SEVENS);
    }

    #[test]
    fn a_gap_that_a_program_has_made_can_be_touched_all_the_time() {
        let sealed = sevens();
        let mapping = mapped(&sealed, Range::new(0, SIZE));
        tmpfs::punch(&sealed.data, Folio(1).range()).unwrap();
        let mut again = Sealed::open(Reach::Programs, sealed.mount().unwrap()).unwrap();
        assert_eq!(mapping.load(FOLIO_SIZE), Ok(0));
        tmpfs::punch(&sealed.data, Folio(1).range()).unwrap();
        again.resume(Range::new(0, SIZE).folios()).unwrap();
        assert_eq!(mapping.walk(), []);
        assert_eq!((again.folio_count(), again.check().unwrap()), (2, Vec::new()));
    }

    #[test]
    fn the_repair_of_a_memory_error_that_has_punched_ends_in_zeros() {
        let mut sealed = sevens();
        sealed.quarantine(Subpage(9).range(), TIME).unwrap();
        sealed.ledger.note_hw_error(LOST, TIME).unwrap();
        tmpfs::punch(&sealed.data, LOST.range()).unwrap();
        let again = open_again(&sealed, true);
        assert!(again.hw_errors().is_empty());
        assert!(bytes_of(&again, LOST) == ZEROS);
        assert_eq!(
            again.holes().all().map(|hole| hole.range).collect::<Vec<_>>(),
            [Subpage(9).range()]
        );
        assert_eq!(tmpfs::resident(&again.data, Folio(0).range()).unwrap(), SUBPAGES_PER_FOLIO - 1);
    }
}
