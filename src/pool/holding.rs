//! A file's pages: a sealed file, and how many of the pool's pages are its own.
//!
//! ```text
//!     page 0        page 1 (released)   page 2            page 3
//!   +-------------+ - - - - - - - - - +-----------+ - - + - - - - - - -+
//!   | memory      |   nothing         | memory    |     |              |
//!   +-------------+ - - - - - - - - - +-----------+ - - + - - - - - - -+
//!                                        end of file ^  ^ its folio     ^ reserved_pages
//! ```
//!
//! The pages up to `reserved_pages` are the file's, except those that it has released (punched). Memory is in them up
//! to the folio with the end of file; what lies behind is the file's in the account, and in the reserve as memory.
//!
//! **A death in between.** What is released is kept with the file ([`RELEASED`]). Before anything happens to the size that
//! would have to be undone, the size to come back to is noted in the superblock; the note goes with the last step, which for a growth is
//! the one that makes the pages the file's. So [`Holding::open`] finds every page either released and without memory, or the
//! file's; where one of the file's has none up to the end of file, it was being released, or taken away by MADV_REMOVE,
//! and gets memory again: zeros, as was asked for. [`Holding::settle`] does so when the pool's account is complete, since what was
//! under way is undone as it was done: step by step between the file and the reserves. A move back by way of the machine would need
//! all of it at once, and somebody else could take it.

use super::Pool;
use crate::error::{Error, Result};
use crate::sealed::{Reach, Sealed};
use crate::steps::{self, Step};
use crate::units::{FOLIO_SIZE, Folio, Page, PageSize, Range, Subpage};
use std::collections::BTreeSet;

/// Why soft holes forbid a resize (see S1).
const HAS_SOFT_HOLES: Error =
    Error::Busy("the file has quarantined subpages; repair them before it grows or gives pages back");

/// The released pages, as what is kept with the file: ranges of two numbers of 32 bits, first page and number of pages.
const RELEASED: &str = "released";
const MOST_RANGES: usize = (64 << 10) / 8; // XATTR_SIZE_MAX

/// A file's pages.
#[derive(Debug)]
pub struct Holding {
    sealed: Sealed,
    page_size: PageSize,
    released: BTreeSet<Page>,
    /// It belongs to a file without names, and the pool counts its pages as orphaned.
    orphaned: bool,
}

impl Holding {
    /// One without pages.
    ///
    /// # Errors
    /// As for [`Sealed::create`].
    pub fn create(page_size: PageSize) -> Result<Self> {
        let sealed = Sealed::create(Reach::Programs, None)?;
        Ok(Self { sealed, page_size, released: BTreeSet::new(), orphaned: false })
    }

    /// The one that `sealed` was a part of in another process; [`Holding::settle`] is to follow.
    ///
    /// # Errors
    /// What setxattr(2) answers.
    pub fn open(page_size: PageSize, sealed: Sealed) -> Result<Self> {
        let released = sealed.notes().kept(RELEASED)?.map(|ranges| decode(&ranges)).unwrap_or_default();
        let mut holding = Self { sealed, page_size, released: BTreeSet::new(), orphaned: false };
        // One with memory was being made the file's again; one behind those that are reserved was given up.
        let has_memory =
            |page: &Page| holding.memory_of(*page).folios().any(|folio| holding.sealed.has_memory(folio));
        let reserved = holding.sealed.superblock().reserved_pages;
        let is_released = |page: &Page| page.0 < reserved && !has_memory(page);
        holding.released = released.iter().copied().filter(is_released).collect();
        if holding.released != released {
            holding.keep_released()?;
        }
        Ok(holding)
    }

    /// Undoes the change of size that was under way, and has the reserves give what pages of the file lack.
    ///
    /// # Errors
    /// [`Error::NoMemory`] where the machine has none for a step.
    pub fn settle(&mut self, pool: &Pool) -> Result<()> {
        let size = self.settled_size();
        let behind = Range::new(size.next_multiple_of(FOLIO_SIZE), self.sealed.size());
        pool.move_in(&mut self.sealed, behind)?;
        match self.sealed.size() {
            longer if longer > size => self.sealed.cut(size)?,
            _ => self.sealed.grow_size(size)?,
        }
        self.refill(pool)?;
        self.sealed.update(|superblock| superblock.undo_size = None)
    }

    /// The size when nothing is under way.
    fn settled_size(&self) -> u64 {
        self.sealed.superblock().undo_size.unwrap_or(self.sealed.size())
    }

    /// Where a page has memory, if it is the file's.
    fn memory_of(&self, page: Page) -> Range {
        let end = self.settled_size().next_multiple_of(FOLIO_SIZE);
        self.page_size.range(page).intersect(Range::new(0, end))
    }

    fn refill(&mut self, pool: &Pool) -> Result<()> {
        let size = self.sealed.size();
        let missing: Vec<Folio> = self
            .owned()
            .flat_map(|page| self.memory_of(page).folios().collect::<Vec<_>>())
            .filter(|folio| !self.sealed.has_memory(*folio))
            .collect();
        let neighbours = |one: &Folio, next: &Folio| one.0 + 1 == next.0;
        missing.chunk_by(neighbours).try_for_each(|run| {
            let range = Range::new(run[0].range().start, run[run.len() - 1].range().end);
            pool.move_out(&mut self.sealed, range, size)
        })
    }

    fn keep_released(&self) -> Result<()> {
        let ranges = encode(&self.released);
        if ranges.len() > MOST_RANGES * 8 {
            return Err(Error::Busy("the file would have more separate holes than can be noted"));
        }
        match self.sealed.notes().kept(RELEASED)? {
            None if ranges.is_empty() => Ok(()),
            _ => self.sealed.notes().keep(RELEASED, &ranges),
        }
    }

    /// Notes pages as released, or not; as before where that fails.
    fn change_released(&mut self, change: impl FnOnce(&mut BTreeSet<Page>)) -> Result<()> {
        let before = self.released.clone();
        change(&mut self.released);
        if self.released == before {
            return Ok(());
        }
        self.keep_released().inspect_err(|_| self.released = before)
    }

    /// The sealed file.
    pub fn sealed(&self) -> &Sealed {
        &self.sealed
    }

    /// The sealed file, for quarantine and repair; its folios are this module's.
    pub fn sealed_mut(&mut self) -> &mut Sealed {
        &mut self.sealed
    }

    /// Pages that are the file's.
    pub fn pages(&self) -> u64 {
        self.sealed.superblock().reserved_pages - self.released.len() as u64
    }

    /// The pages that were released, ascending.
    pub fn released(&self) -> &BTreeSet<Page> {
        &self.released
    }

    /// The bytes of released pages below the end of file, as ranges, ascending.
    pub fn released_ranges(&self) -> impl Iterator<Item = Range> + '_ {
        let file = Range::new(0, self.sealed.size());
        self.released.iter().map(move |page| self.page_size.range(*page).intersect(file))
    }

    /// Whether every byte of `range` has memory or is a soft hole.
    pub fn has_pages(&self, range: Range) -> bool {
        range.end <= self.sealed.size()
            && (self.released.is_empty()
                || self.page_size.pages_touching(range).all(|page| !self.released.contains(&page)))
    }

    /// Whether a write of `range` lengthens the file within memory that it has, and so moves none ([`Sealed::append`]).
    pub fn can_append(&self, range: Range) -> bool {
        let (size, folio) = (self.sealed.size(), Subpage::containing(self.sealed.size()).folio());
        range.end > size
            && range.end <= size.next_multiple_of(FOLIO_SIZE)
            && self.sealed.has_memory(folio)
            && self.sealed.holes().is_empty()
            && self.sealed.lost_in(Range::new(range.start.min(size), folio.range().end)).next().is_none()
            && self.has_pages(Range::new(range.start.min(size), size))
    }

    /// The released pages that hold any byte of `range`. It is them that are looked through, as a range may be as long
    /// as the largest file size, which is no file's.
    fn released_touching(&self, range: Range) -> impl Iterator<Item = Page> + '_ {
        let touches = move |page: &Page| !self.page_size.range(*page).intersect(range).is_empty();
        self.released.iter().copied().filter(touches)
    }

    /// Makes the file at least `size` bytes long, with memory for every byte from the old end on and in `range`.
    ///
    /// # Errors
    /// [`Error::Full`], [`Error::NoMemory`], [`Error::Busy`] where soft holes forbid it; nothing has changed.
    pub fn grow(&mut self, pool: &Pool, range: Range, size: u64) -> Result<()> {
        let before = self.sealed.size();
        let size = size.max(before);
        let grown = Range::new(before, size);
        let inside = range.intersect(Range::new(0, size));
        let missing = self.released_touching(inside).chain(self.released_touching(grown)).collect();
        if BTreeSet::is_empty(&missing) && grown.is_empty() {
            return Ok(());
        }
        self.refuse_with_holes()?;
        self.acquire(pool, &missing, grown, size)
    }

    /// Makes the pages up to `end` and the released ones in `missing` the file's, with memory for what lies before the
    /// end of file, which comes to be that of `grown`.
    fn acquire(&mut self, pool: &Pool, missing: &BTreeSet<Page>, grown: Range, end: u64) -> Result<()> {
        let reserved = self.sealed.superblock().reserved_pages;
        let wanted = reserved.max(self.page_size.pages_up(end));
        let pages = wanted - reserved + missing.len() as u64;
        let token = pool.reserve(pages)?;
        let before = self.sealed.size();
        if !grown.is_empty() {
            self.sealed.update(|superblock| superblock.undo_size = Some(before))?;
            steps::done(Step::AllocateAnnounced);
        }
        if let Err(error) = self.take_memory(pool, missing, grown) {
            self.sealed.update(|superblock| superblock.undo_size = None)?;
            return Err(error);
        }
        steps::done(Step::AllocateMoved);
        self.change_released(|released| released.retain(|page| !missing.contains(page)))?;
        steps::done(Step::AllocateTaken);
        self.sealed.update(|superblock| {
            superblock.reserved_pages = wanted;
            superblock.undo_size = None;
        })?;
        steps::done(Step::AllocateDone);
        token.spend();
        if self.orphaned {
            pool.note_orphaned(pages as i64);
        }
        Ok(())
    }

    /// Memory for released pages, then for what the file grows by.
    fn take_memory(&mut self, pool: &Pool, missing: &BTreeSet<Page>, grown: Range) -> Result<()> {
        let before = self.sealed.size();
        let memory_end = before.next_multiple_of(FOLIO_SIZE);
        let mut done = Vec::new();
        let mut result = Ok(());
        for page in missing {
            let range = self.page_size.range(*page).intersect(Range::new(0, memory_end));
            result = pool.move_out(&mut self.sealed, range, before);
            if result.is_err() {
                break;
            }
            done.push(range);
        }
        let result = result.and_then(|()| self.grow_end(pool, memory_end, grown.end));
        if result.is_err() {
            for range in done.into_iter().rev() {
                pool.undo_move_out(&mut self.sealed, range, before);
            }
        }
        result
    }

    /// Makes the file `size` bytes long; it has memory up to `memory_end`.
    fn grow_end(&mut self, pool: &Pool, memory_end: u64, size: u64) -> Result<()> {
        let before = self.sealed.size();
        self.sealed.grow_size(size.min(memory_end))?;
        let moved = pool.move_out(&mut self.sealed, Range::new(memory_end, size).folios_out(), size);
        if moved.is_err() && self.sealed.size() > before {
            self.sealed.cut(before)?;
        }
        moved
    }

    /// Makes the pages up to the end of `range` the file's, with memory for what lies in `range` before the end of file,
    /// and leaves its size alone.
    ///
    /// # Errors
    /// [`Error::Full`], [`Error::NoMemory`], [`Error::Busy`] where soft holes forbid it; nothing has changed.
    pub fn allocate(&mut self, pool: &Pool, range: Range) -> Result<()> {
        let size = self.sealed.size();
        let missing: BTreeSet<Page> = self.released_touching(range).collect();
        if missing.iter().any(|page| self.page_size.range(*page).start < size) {
            self.refuse_with_holes()?; // behind the end no memory moves
        }
        self.acquire(pool, &missing, Range::new(size, size), range.end)
    }

    /// Makes the file `size` bytes long, not longer than it is, and gives back the pages behind; what was
    /// quarantined there is forgotten.
    ///
    /// # Errors
    /// [`Error::Busy`] where soft holes before the new end forbid it. [`Error::NoMemory`] where the machine has no memory
    /// for a step; the file may have become shorter by then, but not as short as asked.
    pub fn shrink(&mut self, pool: &Pool, size: u64) -> Result<()> {
        if self.sealed.holes_in(Range::new(0, size)).next().is_some() {
            return Err(HAS_SOFT_HOLES);
        }
        let gone = Range::new(size.next_multiple_of(FOLIO_SIZE), self.sealed.size());
        pool.move_in(&mut self.sealed, gone)?;
        steps::done(Step::ShrinkMoved);
        self.sealed.cut(size.min(self.sealed.size()))?;
        steps::done(Step::ShrinkCut);
        self.give_up_pages_behind_end(pool)
    }

    /// Gives back the pages behind the one with the end of file. No memory moves for that, so soft holes do not forbid it.
    ///
    /// # Errors
    /// What pwrite(2) answers.
    pub fn give_up_pages_behind_end(&mut self, pool: &Pool) -> Result<()> {
        let first = Page(self.page_size.pages_up(self.sealed.size()));
        let before = self.pages();
        self.sealed.update(|superblock| {
            superblock.reserved_pages = superblock.reserved_pages.min(first.0);
        })?;
        steps::done(Step::ShrinkNoted);
        self.change_released(|released| released.retain(|page| *page < first))?;
        steps::done(Step::ShrinkDone);
        self.release_to(pool, before - self.pages());
        Ok(())
    }

    /// Gives back the pages of which `range` holds every byte; what was quarantined there is forgotten.
    ///
    /// # Errors
    /// [`Error::Busy`] where soft holes elsewhere forbid it; [`Error::NoMemory`] after some of the pages.
    pub fn release(&mut self, pool: &Pool, range: Range) -> Result<()> {
        let pages: BTreeSet<Page> =
            self.owned().filter(|page| range.covers(self.page_size.range(*page))).collect();
        if pages.is_empty() {
            return Ok(());
        }
        let inside = |offset: u64| pages.contains(&Page(offset / self.page_size.bytes()));
        if self.sealed.holes().keys().any(|hole| !inside(hole.offset())) {
            return Err(HAS_SOFT_HOLES);
        }
        let size = self.sealed.size();
        self.sealed.update(|superblock| superblock.undo_size = Some(size))?;
        steps::done(Step::ReleaseAnnounced);
        let released = pages.into_iter().try_for_each(|page| self.release_one(pool, page));
        self.sealed.update(|superblock| superblock.undo_size = None)?;
        steps::done(Step::ReleaseDone);
        released
    }

    fn release_one(&mut self, pool: &Pool, page: Page) -> Result<()> {
        let size = self.sealed.size();
        let memory = self.memory_of(page);
        let moved = pool.move_in(&mut self.sealed, memory);
        self.sealed.grow_size(size)?; // where the end of file was in it, that moved
        moved?;
        steps::done(Step::ReleaseMoved);
        self.change_released(|released| released.extend([page]))?;
        steps::done(Step::ReleaseNoted);
        self.release_to(pool, 1);
        Ok(())
    }

    /// Tells the account of pages whose memory is in the reserves.
    fn release_to(&self, pool: &Pool, pages: u64) {
        pool.release(pages);
        if self.orphaned {
            pool.note_orphaned(-(pages as i64));
        }
    }

    /// Its file has lost its last name, so its pages will come back when the last user is gone.
    pub fn note_orphaned(&mut self, pool: &Pool) {
        if !self.orphaned {
            self.orphaned = true;
            pool.note_orphaned(self.pages() as i64);
        }
    }

    /// The pages that are the file's, ascending.
    fn owned(&self) -> impl Iterator<Item = Page> + '_ {
        let reserved = (0..self.sealed.superblock().reserved_pages).map(Page);
        reserved.filter(|page| !self.released.contains(page))
    }

    fn refuse_with_holes(&self) -> Result<()> {
        if self.sealed.holes().is_empty() { Ok(()) } else { Err(HAS_SOFT_HOLES) }
    }

    /// Gives everything back. Where the machine has no memory for that, the holding keeps the rest and can be asked again.
    ///
    /// # Errors
    /// As for [`Holding::shrink`].
    pub fn empty(&mut self, pool: &Pool) -> Result<()> {
        self.shrink(pool, 0)
    }
}

fn encode(pages: &BTreeSet<Page>) -> Vec<u8> {
    let mut ranges: Vec<(u32, u32)> = Vec::new();
    for Page(page) in pages.iter().copied() {
        let page = u32::try_from(page).expect("a file has fewer pages than 2^32");
        match ranges.last_mut() {
            Some((first, count)) if *first + *count == page => *count += 1,
            _ => ranges.push((page, 1)),
        }
    }
    ranges.iter().flat_map(|(first, count)| [first.to_le_bytes(), count.to_le_bytes()]).flatten().collect()
}

fn decode(bytes: &[u8]) -> BTreeSet<Page> {
    let (words, _) = bytes.as_chunks::<4>();
    let (ranges, _) = words.as_chunks::<2>();
    let pages = ranges.iter().flat_map(|range| {
        let [first, count] = range.map(u32::from_le_bytes);
        (first..first + count).map(|page| Page(page.into()))
    });
    pages.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn released_pages_read_as_they_were_written() {
        for pages in [&[][..], &[0], &[0, 1, 2], &[5, 7, 8, 100_000, u64::from(u32::MAX) - 1]] {
            let pages = pages.iter().copied().map(Page).collect();
            assert_eq!(decode(&encode(&pages)), pages);
        }
        assert_eq!(encode(&(0..1000).map(Page).collect()).len(), 8);
    }
}
