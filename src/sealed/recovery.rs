//! A sealed file as a process has left it that may have died between any two system calls.
//!
//! The records of the ledger say which copy of a subpage is the true one; nothing is told from contents. Nothing below
//! takes a byte that is known for lost, and nothing narrows what a program could touch before: a gap that a program
//! has made by MADV_REMOVE keeps its free blocks until it is filled.

use super::poison::poisoned_subpages;
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
    /// Opens what [`Sealed::create`] made by the mount of its superblock. Changes nothing: [`Sealed::resume`] is to
    /// follow.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for a ledger that is damaged or of another version.
    pub fn open(reach: Reach, mount: OwnedFd) -> Result<Self> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let data: Arc<File> = Arc::new(calls::openat(&mount, "data", flags, Mode::empty())?.into());
        let ledger = Ledger::open(data.clone(), &mount)?;
        let (size, root) = (tmpfs::size(&data)?, handle::of(&mount, c"")?);
        let (folios, folio_count, unattached) = (Vec::new(), 0, None);
        let punched = ledger.notes().kept(PUNCHED)?.is_some();
        let mut sealed = Self { root, unattached, data, ledger, reach, size, folios, folio_count, punched };
        sealed.find_memory()?;
        Ok(sealed)
    }

    /// Finishes or undoes what was under way, and restores S1.
    ///
    /// A folio in which there is nothing at all is a gap that a program has made if it is `meant` to have memory, and gets
    /// some again; any other has no memory afterwards, unless the file was punched, whose gaps are left as they are. So
    /// is a size that was noted ([`super::Superblock::undo_size`]): to come back to it is for the owner, as memory moves
    /// for that.
    ///
    /// # Errors
    /// What the kernel answers. For want of memory nothing fails: the gaps are filled at the next request that needs it.
    pub fn resume(&mut self, meant: impl Iterator<Item = Folio>) -> Result<()> {
        meant.for_each(|folio| self.mark(folio.range(), true));
        self.fit_reserve()?;
        self.ledger.trim_all()?;
        self.empty_holes()?;
        if tmpfs::blocks(&self.data)?.limit != self.limit() {
            self.seal(&[])?; // a change of the superblock's is the dearest of all this
        }
        self.recall_poison()?;
        if !self.punched {
            self.reclaim_around_poison()?;
        }
        Ok(())
    }

    /// Empties the holes that have memory: a touch has filled them, or they were being quarantined or repaired. Where a pin
    /// holds the memory, the quarantine cannot be finished, and is undone.
    fn empty_holes(&mut self) -> Result<()> {
        let filled = self.filled_holes(&[])?;
        let of_one_folio = |one: &Range, next: &Range| one.start / FOLIO_SIZE == next.start / FOLIO_SIZE;
        for runs in filled.chunk_by(of_one_folio) {
            match self.seal(runs) {
                Err(Error::Busy(why)) => {
                    log::warn!("a quarantine at {} is undone: {why}", runs[0]);
                    self.put_back(runs)?;
                    self.ledger.trim_all()?;
                }
                result => result?,
            }
        }
        Ok(())
    }

    /// Fills what has been emptied, as [`Sealed::reclaim_removed`] does. A memory error that nobody knows of yet, as the kernel
    /// has met it while there was no daemon, is no reason to fail: it is noted, and filled around.
    fn reclaim_around_poison(&mut self) -> Result<()> {
        let mut reclaimed = self.reclaim_removed();
        if let Err(Error::Poisoned) = reclaimed {
            self.note_poison(sys::unix_time())?;
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

    /// Memory errors that were known, as far as the kernel still holds them.
    fn recall_poison(&mut self) -> Result<()> {
        self.ledger.read_poisoned()?;
        let noted: Vec<Subpage> = self.poisoned().keys().copied().collect();
        for subpage in noted {
            let is_there = self.has_memory(subpage.folio())
                && !self.present(subpage.range())?.is_empty()
                && !poisoned_subpages(&Window::new(&self.data, subpage.range())?, subpage.range())?
                    .is_empty();
            if !is_there {
                self.ledger.forget_poisoned(subpage)?;
            }
        }
        Ok(())
    }

    /// A folio has memory if there is any in it, or a soft hole; or a gap, as all there is without memory is one then.
    fn find_memory(&mut self) -> Result<()> {
        for folio in Range::new(0, self.size).folios() {
            let has_holes = self.holes().in_range(folio.range()).next().is_some();
            if self.punched || has_holes || tmpfs::resident(&self.data, folio.range())? > 0 {
                self.mark(folio.range(), true);
            }
        }
        Ok(())
    }

    /// A reserve is as long as it has memory.
    fn fit_reserve(&mut self) -> Result<()> {
        match self.reach {
            Reach::Programs => Ok(()),
            Reach::Private => self.cut(self.folios.len() as u64 * FOLIO_SIZE),
        }
    }
}

/// States between two system calls, made by hand on real superblocks.
#[cfg(test)]
mod tests {
    use super::super::{Bytes, Content};
    use super::*;
    use crate::sys::sigbus::{Mapping, Sharing};
    use crate::units::{SUBPAGE_SIZE, SUBPAGES_PER_FOLIO};

    const TIME: u64 = 1_800_000_000;
    const ZEROS: Bytes = [0; SUBPAGE_SIZE as usize];
    const SEVENS: Bytes = [7; SUBPAGE_SIZE as usize];
    const SIZE: u64 = 2 * FOLIO_SIZE;
    const LOST: Subpage = Subpage(3);
    /// Where a program stores into the subpage.
    const PLACE: u64 = 100;

    /// Two folios of sevens.
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

    /// What is kept of the subpage, or in it, must be all sevens but for what a program has stored.
    fn assert_known(sealed: &Sealed) {
        let is_lost = sealed.is_lost(LOST);
        let bytes = if is_lost { sealed.rescued(LOST).unwrap() } else { bytes_of(sealed, LOST) };
        let others = bytes.iter().zip(0..).filter(|(_, place)| *place != PLACE);
        assert!(others.into_iter().all(|(byte, _)| *byte == 7), "bytes are lost (quarantined: {is_lost})");
    }

    #[test]
    fn an_unrecorded_quarantine_is_undone_and_keeps_later_stores() {
        let sealed = sevens();
        sealed.set_limit(1).unwrap();
        let ledger = sealed.notes().file().unwrap();
        tmpfs::write_all_at(&ledger, &SEVENS, super::super::ledger::place(LOST.range()).start).unwrap();
        tmpfs::write_all_at(&sealed.data, &[8; SUBPAGE_SIZE as usize], LOST.offset()).unwrap();
        let mut again = open_again(&sealed, false);
        assert!(bytes_of(&again, LOST) == [8; SUBPAGE_SIZE as usize], "a store is lost");
        assert!(again.holes().is_empty());
        again.quarantine(LOST.range(), TIME).unwrap(); // the request is sent again
        assert!(again.rescued(LOST).unwrap() == [8; SUBPAGE_SIZE as usize]);
    }

    /// The states of a quarantine and of a repair in which the record names the subpage: the limit is raised, and the hole
    /// has memory or not.
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
            assert!(again.is_lost(LOST) && again.superblock().alarm);
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
        let mapping = Mapping::new(sealed.data(), Range::new(0, SIZE), Sharing::Shared, true).unwrap();
        let pin = mapping.pin(9 * SUBPAGE_SIZE).unwrap();
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
        tmpfs::write_all_at(&ledger, &[6], super::super::ledger::place(LOST.range()).start).unwrap();
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
        let mapping = Mapping::new(sealed.data(), Range::new(0, SIZE), Sharing::Shared, true).unwrap();
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
        sealed.ledger.note_poisoned(LOST, TIME).unwrap();
        tmpfs::punch(&sealed.data, LOST.range()).unwrap();
        let again = open_again(&sealed, true);
        assert!(again.poisoned().is_empty());
        assert!(bytes_of(&again, LOST) == ZEROS);
        assert_eq!(again.holes().all().map(|hole| hole.range).collect::<Vec<_>>(), [Subpage(9).range()]);
        assert_eq!(tmpfs::resident(&again.data, Folio(0).range()).unwrap(), SUBPAGES_PER_FOLIO - 1);
    }
}
