//! A sealed file as a process has left it that may have died between any two system calls.
//!
//! What was under way is told from what is there. Nothing below takes a byte that is known for lost, and what has arrived is
//! not written again: a program may have changed it since.

use super::{Bytes, Direction, Ledger, Reach, Record, Sealed, poisoned_subpages};
use crate::error::Result;
use crate::sys::mapping::Window;
use crate::sys::tmpfs;
use crate::units::{FOLIO_SIZE, Range, Subpage};
use rustix::fs::{Mode, OFlags};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

impl Sealed {
    /// Opens what [`Sealed::create`] made by the mount of its superblock, finishes or undoes what was under way, and restores S1.
    ///
    /// Folios in which there is nothing at all have no memory afterwards; whether they should is for the owner to know.
    ///
    /// # Errors
    /// [`crate::error::Error::Corrupt`] for a ledger that is damaged or of another version; [`crate::error::Error::NoMemory`].
    pub fn open(reach: Reach, mount: OwnedFd) -> Result<Self> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let open =
            |name| -> Result<File> { Ok(rustix::fs::openat(&mount, name, flags, Mode::empty())?.into()) };
        let ledger = Ledger::open(open("ledger")?)?;
        let data = Arc::new(open("data")?);
        let size = tmpfs::size(&data)?;
        let mut sealed = Self { mount, data, ledger, reach, size, folios: Vec::new(), folio_count: 0 };
        sealed.find_memory()?;
        sealed.come_back_to_size()?;
        sealed.finish_moves()?;
        sealed.vacate(Range::new(0, 0))?;
        sealed.reclaim_removed()?;
        sealed.recall_poison()?;
        Ok(sealed)
    }

    /// Memory errors that were known, as far as the kernel still holds them.
    fn recall_poison(&mut self) -> Result<()> {
        self.ledger.read_poisoned()?;
        let noted: Vec<Subpage> = self.poisoned().keys().copied().collect();
        for subpage in noted {
            let is_there = self.has_memory(subpage.folio())
                && !poisoned_subpages(&Window::new(&self.data, subpage.range())?, subpage.range())?
                    .is_empty();
            if !is_there {
                self.ledger.forget_poisoned(subpage)?;
            }
        }
        Ok(())
    }

    /// A folio has memory if there is any in it, or a soft hole.
    fn find_memory(&mut self) -> Result<()> {
        for folio in Range::new(0, self.size).folios() {
            let has_holes = self.holes_in(folio.range()).next().is_some();
            if has_holes || tmpfs::resident(&self.data, folio.range())? > 0 {
                self.mark(folio.range(), true);
            }
        }
        Ok(())
    }

    fn come_back_to_size(&mut self) -> Result<()> {
        let memory_end = self.folios.len() as u64 * FOLIO_SIZE;
        let size = match (self.reach, self.superblock().undo_size) {
            (Reach::Programs, Some(size)) => size,
            (Reach::Programs, None) => return Ok(()),
            (Reach::Private, _) => memory_end, // a reserve is as long as it has memory
        };
        if size <= self.size {
            self.cut(size)?
        } else {
            self.set_size(size)?
        }
        self.update(|superblock| superblock.undo_size = None)
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

    /// Whether a repair has put the subpage back. A page of zeros in place of other bytes is not it: a touch of the hole, while
    /// there was a block for it, has made that.
    fn has_arrived(&self, subpage: Subpage, bytes: &Bytes) -> Result<bool> {
        if tmpfs::resident(&self.data, subpage.range())? == 0 {
            return Ok(false);
        }
        let mut found = *bytes;
        let read = tmpfs::read_at(&self.data, &mut found, subpage.offset())?;
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
