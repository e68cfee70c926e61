//! Memory errors (hw): the kernel has met them in a file, and keeps their pages there.

use super::{Reach, Sealed};
use crate::error::{Error, Result};
use crate::sys::mapping::Window;
use crate::sys::tmpfs;
use crate::units::{Range, SUBPAGE_SIZE, Subpage};

impl Sealed {
    /// Finds the memory errors that the kernel has met in the file since the last time, and notes
    /// them. Returns the new ones. For memory that is mapped huge, this costs next to nothing. It
    /// touches no byte.
    ///
    /// # Errors
    /// The errors of mmap(2) and setxattr(2).
    pub fn note_hw_errors(&mut self, time: u64) -> Result<Vec<Subpage>> {
        self.note_hw_errors_in(Range::new(0, self.size).subpages_out(), time)
    }

    /// Finds and notes the new memory errors in `range`, whole subpages.
    ///
    /// # Errors
    /// As for [`Sealed::note_hw_errors`].
    pub fn note_hw_errors_in(&mut self, range: Range, time: u64) -> Result<Vec<Subpage>> {
        let range = range.intersect(Range::new(0, self.size).subpages_out());
        let found = self.find_hw_errors(range)?;
        let new: Vec<Subpage> =
            found.into_iter().filter(|subpage| !self.is_lost(*subpage)).collect();
        for subpage in &new {
            self.ledger.note_hw_error(*subpage, time)?;
        }
        if !new.is_empty() {
            self.ledger.update(|header| header.alarm = true)?;
        }
        debug_assert!(new.iter().all(|subpage| self.is_lost(*subpage)), "they are noted");
        debug_assert!(
            new.iter().all(|subpage| range.covers(subpage.range())),
            "they were asked for"
        );
        Ok(new)
    }

    /// Drops the pages with memory errors in `range` of a reserve, and takes healthy memory in
    /// their place. Returns the number of these errors.
    ///
    /// # Errors
    /// [`Error::NoMemory`].
    pub fn replace_bad_free(&mut self, range: Range) -> Result<u64> {
        assert_eq!(self.reach, Reach::Private, "programs' memory is repaired when they ask for it");
        let found = self.find_hw_errors(range.intersect(Range::new(0, self.size)))?;
        for subpage in &found {
            tmpfs::punch(&self.data, subpage.range())?;
            tmpfs::allocate(&self.data, subpage.range())?;
        }
        self.assert_sealed();
        debug_assert_eq!(self.lost_count(), 0, "a reserve holds no bytes that could be lost");
        Ok(found.len() as u64)
    }

    /// True if the kernel has met a memory error in `range` that is not noted yet. This costs a
    /// walk over the page tables of the range, and touches no byte.
    ///
    /// # Errors
    /// The errors of mmap(2).
    pub fn has_new_hw_errors(&self, range: Range) -> Result<bool> {
        let inside = range.intersect(Range::new(0, self.size));
        let found = if inside.is_empty() {
            Vec::new()
        } else {
            self.find_hw_errors(inside.subpages_out())?
        };
        Ok(found.iter().any(|subpage| !self.is_lost(*subpage)))
    }

    fn find_hw_errors(&self, range: Range) -> Result<Vec<Subpage>> {
        const WINDOW: u64 = 1 << 30;
        let mut found = Vec::new();
        for part in range.steps(WINDOW) {
            let window = Window::new(&self.data, part)?;
            for folio in part.folios().filter(|folio| self.has_memory(*folio)) {
                for range in self.present(folio.range().intersect(part))? {
                    found.extend(hw_error_subpages(&window, range)?);
                }
            }
        }
        Ok(found)
    }

    /// Makes the kernel treat `subpage` as if the hardware had reported an error in it.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a kernel without CONFIG_MEMORY_FAILURE.
    pub fn inject(&self, subpage: Subpage) -> Result<()> {
        let window = Window::new(&self.data, subpage.folio().range())?;
        window.populate(subpage.range())?;
        window.poison(subpage)
    }
}

/// The subpages of `range` with a memory error. All of `range` has memory.
pub(super) fn hw_error_subpages(window: &Window, range: Range) -> Result<Vec<Subpage>> {
    let mut found = Vec::new();
    match window.populate(range) {
        Ok(()) => return Ok(found),
        // Some have an error, or were punched meanwhile.
        Err(Error::Quarantined | Error::NoData) => {}
        Err(error) => return Err(error),
    }
    for subpage in range.steps(SUBPAGE_SIZE) {
        match window.populate(subpage) {
            Err(Error::Quarantined) => found.push(Subpage::containing(subpage.start)),
            Ok(()) | Err(Error::NoData) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}
