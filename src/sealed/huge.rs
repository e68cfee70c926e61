//! How the memory of a file is mapped: in folios of one piece, and on which NUMA node.

use super::Sealed;
use crate::error::{Error, Result};
use crate::sys::mapping::Window;
use crate::units::{FOLIO_SIZE, Folio, Range, SUBPAGE_SIZE};

impl Sealed {
    /// Puts `folio` back into one piece, where it is not.
    ///
    /// # Errors
    /// [`Error::Busy`] with a quarantined subpage in it; else as for [`Window::collapse`].
    pub fn collapse(&self, folio: Folio) -> Result<()> {
        if self.lost_in(folio.range()).next().is_some() {
            return Err(Error::Busy("a quarantined subpage keeps this part from being one huge page"));
        }
        if !self.is_present(folio)? {
            return Err(Error::Busy("what was punched keeps this part from being one huge page"));
        }
        Window::new(&self.data, folio.range())?.collapse(folio)
    }

    /// Maps `range`, which has memory, and returns which parts of it that maps by 2 MiB entries.
    ///
    /// # Errors
    /// What mmap(2) and the page map answer.
    pub fn huge_ranges(&self, range: Range) -> Result<Vec<Range>> {
        let window = Window::new(&self.data, range)?;
        for folio in range.folios() {
            if !self.is_present(folio)? {
                continue;
            }
            match window.populate(Range::at(folio.range().start, 1).subpages_out()) {
                Ok(()) | Err(Error::NoData | Error::Poisoned) => {}
                Err(error) => return Err(error),
            }
        }
        window.huge_ranges()
    }

    /// The NUMA node that the memory of `folio` is on, as far as the kernel tells.
    pub fn node_of(&self, folio: Folio) -> Option<u32> {
        let window = Window::new(&self.data, folio.range()).ok()?;
        let present = self.present(folio.range()).ok()?;
        present.into_iter().flat_map(|range| range.steps(SUBPAGE_SIZE)).find_map(|subpage| {
            window.populate(subpage).ok()?;
            window.node_of(subpage.start)
        })
    }

    /// What programs have set for `range` by mbind(2) does not count for memory that it is going to get.
    pub(super) fn void_policy(&self, range: Range) {
        match Window::new(&self.data, range) {
            Ok(window) => window.void_policy(),
            Err(error) => log::debug!("a policy of a program may be in force: {error}"),
        }
    }

    /// Puts what memory came in small pages into folios, and returns how many folios are in one piece.
    ///
    /// For memory that nobody has touched: it is mapped but neither read nor cleared.
    ///
    /// # Errors
    /// What mmap(2) and the page map answer.
    pub fn collapse_untouched(&self) -> Result<u64> {
        if self.folios.is_empty() {
            return Ok(0);
        }
        let window = Window::new(&self.data, Range::new(0, self.folios.len() as u64 * FOLIO_SIZE))?;
        for folio in self.folios() {
            if let Err(error) = window.collapse(folio) {
                log::debug!("folio {} stays in small pages: {error}", folio.0);
            }
        }
        Ok(window.huge_ranges()?.iter().map(|range| range.len() / FOLIO_SIZE).sum())
    }
}
