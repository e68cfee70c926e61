//! The mapping of a file's memory: folios in one piece, and their NUMA nodes.

use super::Sealed;
use super::holes::between;
use crate::error::{Error, Result};
use crate::sys::mapping::{PoliciesAside, Window};
use crate::units::{FOLIO_SIZE, Folio, NumaNode, Range, SUBPAGE_SIZE};
use std::time::Duration;

/// Tries to move a folio before it counts as pinned, and the pause between two. A thread that
/// faults on the folio refers to it until it has got a processor, so one failure proves nothing.
const MIGRATE_TRIES: u32 = 10;
const MIGRATE_NAP: Duration = Duration::from_millis(2);

impl Sealed {
    /// Puts `folio` into one piece, if it is in small pages.
    ///
    /// # Errors
    /// [`Error::Busy`] if a quarantined subpage or a gap is in the folio. Otherwise as for
    /// [`Window::collapse`].
    pub fn collapse(&self, folio: Folio) -> Result<()> {
        if self.lost_in(folio.range()).next().is_some() {
            return Err(Error::Busy(
                "a quarantined subpage keeps this part from being one huge page",
            ));
        }
        if !self.is_present(folio)? {
            return Err(Error::Busy("what was punched keeps this part from being one huge page"));
        }
        Window::new(&self.data, folio.range())?.collapse(folio)
    }

    /// Maps `range` and returns the parts of it that the kernel maps by 2 MiB entries. A folio with
    /// a hole or a gap is not touched.
    ///
    /// # Errors
    /// The errors of mmap(2) and of ioctl(2) on the page map.
    pub fn huge_ranges(&self, range: Range) -> Result<Vec<Range>> {
        let window = Window::new(&self.data, range)?;
        for folio in range.folios() {
            if !self.is_present(folio)? {
                continue;
            }
            match window.populate(Range::at(folio.range().start, 1).subpages_out()) {
                Ok(()) | Err(Error::NoData | Error::Quarantined) => {}
                Err(error) => return Err(error),
            }
        }
        window.huge_ranges()
    }

    /// The folios of `range` that have memory, ascending, each with its NUMA node; `None` in place
    /// of the node if the kernel does not tell. Maps `range` once.
    pub fn nodes_of(&self, range: Range) -> Vec<(Folio, Option<NumaNode>)> {
        let folios = range.folios().filter(|folio| self.has_memory(*folio));
        let window = if range.is_empty() { None } else { Window::new(&self.data, range).ok() };
        let Some(window) = window else { return folios.map(|folio| (folio, None)).collect() };
        let first = |folio| (folio, self.map_first(&window, folio));
        let firsts: Vec<(Folio, Option<u64>)> = folios.map(first).collect();
        let offsets: Vec<u64> = firsts.iter().filter_map(|(_, first)| *first).collect();
        let mut nodes = window.nodes_of(&offsets).into_iter();
        let node = |(folio, first): (Folio, Option<u64>)| {
            (folio, first.and_then(|_| nodes.next().flatten()))
        };
        firsts.into_iter().map(node).collect()
    }

    /// Maps the first subpage of `folio` that can be mapped. Returns its offset.
    fn map_first(&self, window: &Window, folio: Folio) -> Option<u64> {
        let present = self.present(folio.range()).ok()?;
        let mut subpages = present.into_iter().flat_map(|range| range.steps(SUBPAGE_SIZE));
        subpages.find(|subpage| window.populate(*subpage).is_ok()).map(|subpage| subpage.start)
    }

    /// Moves the memory of `range` to `node`, for all processes that map it. Each byte stays in
    /// reach all the time. Returns the folios that lie on `node` then; of a folio in small pages, a
    /// pinned page may be elsewhere.
    ///
    /// # Errors
    /// The errors of mmap(2), cachestat(2) and move_pages(2). Some folios may have moved.
    pub fn migrate(&self, range: Range, node: NumaNode) -> Result<Vec<Folio>> {
        assert_eq!(range, range.folios_out(), "memory moves by whole folios");
        let window = Window::new(&self.data, range)?;
        let (mut pages, mut firsts) = (Vec::new(), Vec::new());
        for folio in range.folios().filter(|folio| self.has_memory(*folio)) {
            let mapped = self.map_around_lost(&window, folio)?;
            firsts.extend(mapped.first().map(|first| (folio, *first)));
            pages.push((folio, mapped));
        }
        // The head of a folio in one piece stands for all of it.
        let huge = window.huge_ranges()?;
        let is_huge = |folio: &Folio| huge.iter().any(|range| range.covers(folio.range()));
        let pages = pages.into_iter().flat_map(|(folio, mut pages)| {
            pages.truncate(if is_huge(&folio) { 1 } else { pages.len() });
            pages
        });
        let pages: Vec<u64> = pages.collect();
        let offsets: Vec<u64> = firsts.iter().map(|(_, first)| *first).collect();
        let mut tries = 0;
        let nodes = loop {
            window.migrate(&pages, node)?;
            let nodes = window.nodes_of(&offsets);
            tries += 1;
            if tries == MIGRATE_TRIES || nodes.iter().all(|on| *on == Some(node)) {
                break nodes;
            }
            std::thread::sleep(MIGRATE_NAP);
        };
        let moved = nodes.into_iter().zip(firsts).filter(|(on, _)| *on == Some(node));
        Ok(moved.map(|(_, (folio, _))| folio).collect())
    }

    /// Maps the subpages of `folio` that have memory and no memory error. Returns their offsets.
    /// The ledger may not know of an error yet.
    fn map_around_lost(&self, window: &Window, folio: Folio) -> Result<Vec<u64>> {
        let mut mapped = Vec::new();
        for part in between(folio.range(), self.lost_runs_in(folio.range())) {
            for present in self.present(part)? {
                match window.populate(present) {
                    Ok(()) => mapped.extend(present.steps(SUBPAGE_SIZE)),
                    Err(Error::Quarantined) => {
                        let is_sound = |subpage: &Range| window.populate(*subpage).is_ok();
                        mapped.extend(present.steps(SUBPAGE_SIZE).filter(is_sound));
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(mapped.into_iter().map(|subpage| subpage.start).collect())
    }

    /// Sets aside the policies that programs have set for `range` by mbind(2), until the guard is
    /// dropped, so that they do not apply to the memory that `range` gets meanwhile.
    pub(super) fn set_policies_aside(&self, range: Range) -> Option<PoliciesAside> {
        match Window::new(&self.data, range) {
            Ok(window) => Some(window.set_policies_aside()),
            Err(error) => {
                log::debug!("a policy of a program may be in force: {error}");
                None
            }
        }
    }

    /// Puts memory that came in small pages into folios. Returns the number of folios in one piece.
    ///
    /// This is for memory that no program has touched: the function maps the memory, but neither
    /// reads nor clears it.
    ///
    /// # Errors
    /// The errors of mmap(2) and of ioctl(2) on the page map.
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

    /// Bytes of `range` that lie on another NUMA node than `node`. All of `range` has memory, which
    /// no program has touched, as for [`Sealed::collapse_untouched`]. A folio that stays in small
    /// pages is cleared, and each of its pages is looked at.
    ///
    /// # Errors
    /// The errors of mmap(2) and madvise(2). [`Error::Again`] if the kernel does not tell the node.
    pub fn bytes_elsewhere(&self, range: Range, node: NumaNode) -> Result<u64> {
        let window = Window::new(&self.data, range)?;
        for folio in range.folios() {
            if window.collapse(folio).is_err() {
                window.populate(folio.range())?;
            }
        }
        let huge = window.huge_ranges()?;
        let grain = |folio: &Folio| match huge.iter().any(|range| range.covers(folio.range())) {
            true => FOLIO_SIZE,
            false => SUBPAGE_SIZE,
        };
        let pages: Vec<Range> =
            range.folios().flat_map(|folio| folio.range().steps(grain(&folio))).collect();
        let starts: Vec<u64> = pages.iter().map(|page| page.start).collect();
        let mut elsewhere = 0;
        for (page, on) in pages.iter().zip(window.nodes_of(&starts)) {
            match on {
                Some(on) if on == node => {}
                Some(_) => elsewhere += page.len(),
                None => return Err(Error::Again),
            }
        }
        Ok(elsewhere)
    }
}
