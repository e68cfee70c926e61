//! The check of a holding.

use super::{Holding, RELEASED};
use crate::error::Result;
use crate::pool::page_set::PageSet;
#[cfg(doc)]
use crate::sealed::Sealed;
use crate::units::Range;

impl Holding {
    /// Checks the holding as a whole; [`Sealed::check_part`] checks the rest. Returns a line for
    /// each violation. Between two pieces of a change, checks only the invariants that hold at each
    /// moment.
    ///
    /// # Errors
    /// The errors of the kernel.
    pub fn check(&self) -> Result<Vec<String>> {
        let mut wrong = self.sealed.check_totals()?;
        if self.is_settled() {
            wrong.extend(self.check_pages()?);
        }
        Ok(wrong)
    }

    fn check_pages(&self) -> Result<Vec<String>> {
        let (mut wrong, file) = (Vec::new(), Range::new(0, self.size()));
        let header = self.sealed.header();
        if header.undo_size.is_some() {
            wrong.push("a size to come back to is noted, and no change is under way".to_owned());
        }
        let owned = header.owned_pages - self.released.count();
        if owned != self.pages() {
            wrong.push(format!("{owned} pages are the file's, and {} are counted", self.pages()));
        }
        if header.owned_pages < self.page_size.pages_up(file.end) {
            wrong.push(format!(
                "{} pages are the file's, which has {} bytes",
                header.owned_pages, file.end
            ));
        }
        let noted = self
            .sealed
            .notes()
            .kept(RELEASED)?
            .map(|runs| PageSet::decode(&runs))
            .unwrap_or_default();
        if noted != self.released && !self.note_is_stale {
            let counts = (noted.count(), self.released.count());
            wrong.push(format!("{} pages are noted as released, and {} are", counts.0, counts.1));
        }
        let memory = Range::new(0, self.memory_end());
        for range in self.released.runs().map(|run| self.page_size.bytes_of(run).intersect(memory))
        {
            if let Some(folio) = range.folios().find(|folio| self.sealed.has_memory(*folio)) {
                wrong.push(format!("folio {} is released and has memory", folio.0));
            }
        }
        for range in self.released.gaps_within(self.page_size.pages_touching(memory)) {
            if let Some(range) =
                self.first_run(self.page_size.bytes_of(&range).intersect(memory), false)
            {
                wrong.push(format!("{range} is the file's and has no memory"));
            }
        }
        Ok(wrong)
    }
}
