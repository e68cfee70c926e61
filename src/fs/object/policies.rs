//! The memory policies that programs have set for a file by mbind(2), and memory that they have
//! moved themselves.

use super::{Object, Pace};
use crate::error::Result;
use crate::pool::{Displaced, Pool, Run};
use crate::sys::mapping::Window;
use crate::sys::policy::RangePolicy;
use crate::units::{FOLIO_SIZE, Page, PageSize, Range};

impl Object {
    /// The pages of the file, with those that it has released.
    pub fn pages(&self, page_size: PageSize) -> Run {
        Page(0)..Page(page_size.pages_up(self.summary().size))
    }

    /// The policy of the byte at `offset`, which may lie behind the end of the file.
    ///
    /// # Errors
    /// The errors of mmap(2) and get_mempolicy(2).
    pub fn policy_at(&self, offset: u64) -> Result<Option<RangePolicy>> {
        let start = offset / FOLIO_SIZE * FOLIO_SIZE;
        Window::new(&self.data, Range::at(start, FOLIO_SIZE))?.policy_at(start)
    }

    /// The policies of `pages`, ascending, in runs of one policy. A page has the policy of its
    /// first byte. Pages without one are left out.
    ///
    /// # Errors
    /// The errors of mmap(2) and get_mempolicy(2).
    pub fn policies_of(&self, pages: &Run, page_size: PageSize) -> Result<Vec<(Run, RangePolicy)>> {
        let mut found: Vec<(Run, RangePolicy)> = Vec::new();
        if pages.is_empty() {
            return Ok(found);
        }
        let window = Window::new(&self.data, page_size.bytes_of(pages))?;
        for page in (pages.start.0..pages.end.0).map(Page) {
            let Some(policy) = window.policy_at(page_size.range(page).start)? else { continue };
            let next = Page(page.0 + 1);
            match found.last_mut() {
                Some((run, last)) if run.end == page && *last == policy => run.end = next,
                _ => found.push((page..next, policy)),
            }
        }
        Ok(found)
    }

    /// Those of `pages` whose memory a program has moved to another NUMA node.
    ///
    /// # Errors
    /// [`Error::Interrupted`](crate::error::Error::Interrupted).
    pub fn displaced_among(&self, pages: &Run, pace: &Pace) -> Result<Vec<Displaced>> {
        Ok(self.share(pace)?.displaced_among(pages))
    }

    /// Moves memory that a program has moved to another NUMA node back to the home of its page.
    /// Returns the number of folios that are back. A change of the file waits for one folio of
    /// this.
    ///
    /// # Errors
    /// [`Error::NoMemory`](crate::error::Error::NoMemory),
    /// [`Error::Interrupted`](crate::error::Error::Interrupted). Some folios may have moved.
    pub fn bring_home(&self, pages: &Run, pool: &Pool, pace: &Pace) -> Result<u64> {
        let mut returned = 0;
        let displaced = self.share(pace)?.displaced_folios(pages);
        for folio in displaced {
            returned += u64::from(self.lock(pace)?.bring_home(pool, folio)?);
            pace.go_on()?;
        }
        Ok(returned)
    }
}
