//! A sealed file as a process has left it that may have died between any two system calls.
//!
//! What was under way is told from what is there. Nothing below takes a byte that is known for lost, and what has arrived is
//! not written again: a program may have changed it since.

use super::{Bytes, Direction, Ledger, PUNCHED, Reach, Record, Sealed, poisoned_subpages};
use crate::error::{Error, Result};
use crate::sys::mapping::Window;
use crate::sys::{self, calls, handle, tmpfs};
use crate::units::{FOLIO_SIZE, Range, Subpage};
use rustix::fs::{Mode, OFlags};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

impl Sealed {
    /// Opens what [`Sealed::create`] made by the mount of its superblock, finishes or undoes what was under way, and restores S1.
    ///
    /// Folios in which there is nothing at all have no memory afterwards, unless the file was punched, whose gaps are left as they
    /// are; whether they should have is for the owner to know. So is how
    /// to come back to a size that was noted ([`super::Superblock::undo_size`]), as memory moves for that.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for a ledger that is damaged or of another version; [`Error::NoMemory`].
    pub fn open(reach: Reach, mount: OwnedFd) -> Result<Self> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let data: Arc<File> = Arc::new(calls::openat(&mount, "data", flags, Mode::empty())?.into());
        let ledger = Ledger::open(data.clone(), &mount)?;
        let (size, root) = (tmpfs::size(&data)?, handle::of(&mount, c"")?);
        let (folios, folio_count, unattached) = (Vec::new(), 0, None);
        let punched = ledger.notes().kept(PUNCHED)?.is_some();
        let mut sealed = Self { root, unattached, data, ledger, reach, size, folios, folio_count, punched };
        sealed.find_memory()?;
        sealed.fit_reserve()?;
        sealed.finish_moves()?;
        if tmpfs::blocks(&sealed.data)?.limit != sealed.limit() {
            sealed.vacate(Range::new(0, 0))?; // a change of the superblock's is the dearest of all this
        }
        sealed.recall_poison()?;
        if !sealed.punched {
            sealed.reclaim_around_poison()?;
        }
        Ok(sealed)
    }

    /// Fills what has been emptied, as [`Sealed::reclaim_removed`] does. A memory error that nobody knows of yet, as the kernel
    /// has met it while there was no daemon, is no reason to fail: it is noted, and filled around.
    fn reclaim_around_poison(&mut self) -> Result<()> {
        match self.reclaim_removed() {
            Err(Error::Poisoned) => {
                self.note_poison(sys::unix_time())?;
                // To look for an error is to touch, and a block was free.
                self.holes().keys().try_for_each(|subpage| self.shut(*subpage))?;
                self.reclaim_removed().map(drop)
            }
            result => result.map(drop),
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
            let has_holes = self.holes_in(folio.range()).next().is_some();
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

    /// Finishes the quarantines and repairs that were under way (see [`super::ledger`] for their order).
    fn finish_moves(&mut self) -> Result<()> {
        let records: Vec<(Subpage, Record)> =
            self.holes().iter().map(|(subpage, record)| (*subpage, *record)).collect();
        for (subpage, record) in records {
            match self.ledger.moving(record)? {
                Some((Direction::In, bytes)) => self.finish_quarantine(subpage, record, &bytes)?,
                Some((Direction::Out, bytes)) => self.finish_repair(subpage, record, &bytes)?,
                None if self.ledger.has_block(record)? => self.shut(subpage)?,
                None => self.ledger.forget(subpage)?, // it was being discarded
            }
        }
        Ok(())
    }

    fn finish_quarantine(&mut self, subpage: Subpage, record: Record, bytes: &Bytes) -> Result<()> {
        if self.ledger.has_block(record)? {
            self.shut(subpage)?;
        } else if record.checksum.is_some() && self.has_arrived(subpage, bytes)? {
            // It has not been punched, and what is there may be newer than what was kept. The request is sent again.
            // (Where nothing is known, zeros could as well be a touch of the hole.)
            return self.ledger.forget(subpage);
        } else if let Err(error) = self.trade_to_ledger(subpage, record) {
            log::warn!("a quarantine at {:#x} is undone: {error}", subpage.offset());
            return self.undo_quarantine(subpage, bytes);
        }
        self.complete_quarantine(record, bytes)
    }

    fn finish_repair(&mut self, subpage: Subpage, record: Record, bytes: &Bytes) -> Result<()> {
        if self.ledger.has_block(record)? || !self.has_arrived(subpage, bytes)? {
            self.fill_hole(subpage, bytes)?;
        }
        self.ledger.forget(subpage)
    }

    /// Whether the subpage is in the file: not punched yet, or put back. A page of zeros in place of other bytes is not it: a touch
    /// of the hole, while there was a block for it, has made that. One that a memory error has hit since is.
    fn has_arrived(&self, subpage: Subpage, bytes: &Bytes) -> Result<bool> {
        if tmpfs::resident(&self.data, subpage.range())? == 0 {
            return Ok(false);
        }
        let mut found = *bytes;
        let read = match tmpfs::read_at(&self.data, &mut found, subpage.offset()) {
            Err(Error::Poisoned) => return Ok(true),
            read => read?,
        };
        let is_zero = |bytes: &[u8]| bytes.iter().all(|byte| *byte == 0);
        Ok(!is_zero(&found[..read]) || is_zero(&bytes[..read]))
    }

    /// Empties a hole that a touch has filled.
    fn shut(&self, subpage: Subpage) -> Result<()> {
        match tmpfs::resident(&self.data, subpage.range())? {
            0 => Ok(()),
            _ => tmpfs::punch(&self.data, subpage.range()),
        }
    }
}

/// States between two system calls, made by hand on real superblocks.
#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{Folio, SUBPAGE_SIZE, SUBPAGES_PER_FOLIO};

    const TIME: u64 = 1_800_000_000;
    const ZEROS: Bytes = [0; SUBPAGE_SIZE as usize];

    /// Two folios of sevens.
    fn sevens() -> Sealed {
        let mut sealed = Sealed::create(Reach::Programs, None).expect("root makes superblocks");
        sealed.take(Range::new(0, 2 * FOLIO_SIZE), 2 * FOLIO_SIZE).unwrap();
        let bytes = vec![7; 2 * FOLIO_SIZE as usize];
        assert_eq!(tmpfs::write_at(&sealed.data, &bytes, 0).unwrap(), bytes.len());
        sealed
    }

    fn open_again(sealed: Sealed) -> Sealed {
        let again = Sealed::open(sealed.reach, sealed.mount().unwrap()).unwrap();
        assert_eq!(again.check().unwrap(), Vec::<String>::new());
        again
    }

    fn bytes_of(sealed: &Sealed, subpage: Subpage) -> Bytes {
        let mut bytes = ZEROS;
        tmpfs::read_at(&sealed.data, &mut bytes, subpage.offset()).unwrap();
        bytes
    }

    #[test]
    fn quarantines_of_which_nothing_was_rescued_are_known_to_whoever_opens_the_file_next() {
        let mut sealed = sevens();
        for subpage in [3, 4, 5].map(Subpage) {
            let record = sealed.ledger.record(subpage, TIME, None).unwrap();
            sealed.trade_to_ledger(subpage, record).unwrap();
            sealed.complete_quarantine(record, &ZEROS).unwrap();
        }
        let holes = sealed.holes().clone();
        let again = open_again(sealed);
        assert_eq!(*again.holes(), holes);
        assert!(holes.keys().all(|subpage| again.rescued(*subpage).is_err()));
    }

    #[test]
    fn a_quarantine_that_has_not_punched_yet_is_undone_and_keeps_what_was_stored_since() {
        let mut sealed = sevens();
        sealed.ledger.record(Subpage(3), TIME, Some(&[7; SUBPAGE_SIZE as usize])).unwrap();
        tmpfs::write_at(&sealed.data, &[8; SUBPAGE_SIZE as usize], Subpage(3).offset()).unwrap();
        let mut again = open_again(sealed);
        assert!(bytes_of(&again, Subpage(3)) == [8; SUBPAGE_SIZE as usize], "a store is lost");
        assert!(again.holes().is_empty());
        again.quarantine(Subpage(3), TIME).unwrap(); // the request is sent again
        assert!(again.rescued(Subpage(3)).unwrap() == [8; SUBPAGE_SIZE as usize]);
    }

    #[test]
    fn a_quarantine_that_has_punched_is_finished_whoever_has_caught_the_hole() {
        for caught in [false, true] {
            let mut sealed = sevens();
            sealed.ledger.record(Subpage(3), TIME, Some(&[7; SUBPAGE_SIZE as usize])).unwrap();
            tmpfs::punch(&sealed.data, Subpage(3).range()).unwrap();
            if caught {
                tmpfs::write_at(&sealed.data, &ZEROS, Subpage(3).offset()).unwrap();
            }
            let again = open_again(sealed);
            assert!(again.rescued(Subpage(3)).unwrap() == [7; SUBPAGE_SIZE as usize]);
            assert!(again.superblock().alarm);
        }
    }

    #[test]
    fn the_repair_of_a_memory_error_that_has_punched_ends_in_zeros() {
        let mut sealed = sevens();
        sealed.quarantine(Subpage(9), TIME).unwrap();
        sealed.ledger.note_poisoned(Subpage(3), TIME).unwrap();
        tmpfs::punch(&sealed.data, Subpage(3).range()).unwrap();
        let again = open_again(sealed);
        assert!(again.poisoned().is_empty());
        assert!(bytes_of(&again, Subpage(3)) == ZEROS);
        assert_eq!(again.holes().keys().collect::<Vec<_>>(), [&Subpage(9)]);
        assert_eq!(tmpfs::resident(&again.data, Folio(0).range()).unwrap(), SUBPAGES_PER_FOLIO - 1);
    }
}
