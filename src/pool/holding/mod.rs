//! A file's pages: a sealed file, and the account of the pool's pages that the file owns.
//!
//! ```text
//!     page 0        page 1 (released)   page 2            page 3
//!   +-------------+ - - - - - - - - - +-----------+ - - + - - - - - - -+
//!   | memory      |   nothing         | memory    |     |              |
//!   +-------------+ - - - - - - - - - +-----------+ - - + - - - - - - -+
//!                                        end of file ^  ^ its folio     ^ owned_pages
//! ```
//!
//! The file owns the pages up to `owned_pages`, except those that it has released (punched). Its
//! memory reaches up to the folio with the end of file. Behind that folio the account gives the
//! pages to the file, but their memory is in the reserve.
//!
//! **Changes.** A change that moves memory is made in pieces ([`Change`]), each some milliseconds
//! long. Between two pieces the caller may let others look at the file, but may begin no second
//! change ([`Holding::ready`] asserts that).
//!
//! ```text
//!            begin_*()                  advance() ...                  advance()
//!   settled -----------> under way --------------------> ... -------------------------> settled
//!      |  refused              | advance() fails, or                                      ^
//!      +--> settled            | give_up(): the caller was killed                         |
//!                              +--> undone piece by piece: advance() ... -----------------+
//!                                       | a piece of that fails, too
//!                                       +--> unsettled, until the next change or worker settles it
//! ```
//!
//! | change | others see meanwhile | after a failure or giving up |
//! |---|---|---|
//! | growth, allocation | the old size ([`Holding::size`]), no new page | all is as before |
//! | shrinking | the file gets shorter | the file keeps the size that it has reached |
//! | release | pages become holes, one by one | some are released; moved parts of others are zero |
//! | settling | | the holding stays unsettled |
//!
//! `begin_*` decides everything that can be refused, before anything changes: the pool's pages,
//! soft holes, and the number of runs of released pages that can be noted. A change holds the token
//! for its pages while it moves memory. If memory is stuck half-way, the token can be neither spent
//! nor given back: its pages stay reserved for the holding until that is settled.
//!
//! **A death in between.** The released pages are noted with the file ([`RELEASED`]). A release
//! notes its pages before it moves any memory. A growth strikes pages out of the note after it has
//! moved all memory. So a page that is noted and has memory was on its way, in one direction or the
//! other: it is the file's. A growth that lengthens the file first notes the old size in the header
//! ([`Header`]), as `undo_size`. Its last step clears `undo_size` and makes the pages the
//! file's.
//!
//! So [`Holding::open`] leaves every page in one of two states: released and without memory, or the
//! file's. A page of the file that is noted as released, and lacks some of its memory before the
//! end of file, was on its way. It gets memory again, which is zeros, as the caller had asked for.
//! [`Settling`] fills it once the pool's account is complete. A settling undoes a change as the
//! change was made: piece by piece between the file and the reserves. One step by way of the
//! machine would need all of the memory at once, and another process could take it.
//!
//! A page that is not noted and lacks memory is one out of which a program took memory by
//! MADV_REMOVE. Its blocks stay free for the program's touches until [`Sealed::resume`] has filled
//! them.

mod growth;
mod page_set;
mod release;
mod settling;
mod shrinking;
#[cfg(test)]
mod tests;

use super::{Held, Pool, Token};
use crate::error::{Error, Result};
use crate::sealed::{Header, Hole, Reach, Sealed};
use crate::steps::{self, Step, insist};
use crate::units::{FOLIO_SIZE, Folio, Page, PageSize, Range, Subpage};
use growth::Growth;
use page_set::{MOST_RUNS, PageSet, Run};
use release::Release;
use settling::Settling;
use shrinking::Shrinking;

/// The reason for which soft holes forbid a resize (see S1).
const HAS_SOFT_HOLES: Error = Error::Busy(
    "the file has quarantined subpages; repair them before it grows or gives pages back",
);

/// The refusal of a release, or of an allocation in the middle of a released run.
const TOO_MANY_RUNS: Error = Error::Busy(
    "the file would have more separate holes than can be noted; allocate some of them first",
);

/// The name under which the released pages are noted.
const RELEASED: &str = "released";

/// A file's pages.
#[derive(Debug)]
pub struct Holding {
    sealed: Sealed,
    page_size: PageSize,
    released: PageSet,
    /// The note of the released pages differs from `released`.
    note_is_stale: bool,
    /// A change has begun and has not ended.
    under_way: bool,
    /// A change could be neither finished nor undone. This number of pages stays reserved in the
    /// account, as their memory may be in this file.
    unsettled: Option<u64>,
    /// The file has no name, and the pool counts its pages as orphaned.
    orphaned: bool,
}

/// The state of a [`Change`] after a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Pieces are left.
    More,
    /// The change is complete.
    Done,
}

/// A change of a holding that is under way. The caller advances it until it is over, with the
/// holding that began it.
#[derive(Debug)]
#[must_use = "a change that is not advanced to its end leaves the file between two states"]
pub struct Change<'pool>(Kind<'pool>);

#[derive(Debug)]
enum Kind<'pool> {
    Nothing,
    Growth(Growth<'pool>),
    Shrinking(Shrinking<'pool>),
    Release(Release<'pool>),
    Settling(Settling<'pool>),
}

impl Change<'_> {
    /// Makes one piece: it moves at most [`super::PIECE`] of memory, and takes some milliseconds.
    ///
    /// # Errors
    /// The reason for which the change failed or was given up. The change is over then, and undone
    /// as far as the table above says.
    pub fn advance(&mut self, holding: &mut Holding) -> Result<Progress> {
        let progress = match &mut self.0 {
            Kind::Nothing => Ok(Progress::Done),
            Kind::Growth(growth) => growth.advance(holding),
            Kind::Shrinking(shrinking) => shrinking.advance(holding),
            Kind::Release(release) => release.advance(holding),
            Kind::Settling(settling) => settling.advance(holding),
        };
        holding.under_way = matches!(progress, Ok(Progress::More));
        progress
    }

    /// The caller does not want the change any more, for the reason `why`. The caller still
    /// advances it until it is over: the pieces that follow undo the change or bring it to an end,
    /// and the last one fails with `why`.
    pub fn give_up(&mut self, why: Error) {
        match &mut self.0 {
            Kind::Nothing | Kind::Settling(_) => {}
            Kind::Growth(growth) => growth.give_up(why),
            Kind::Shrinking(shrinking) => shrinking.give_up(why),
            Kind::Release(release) => release.give_up(why),
        }
    }
}

impl Holding {
    /// A holding without pages.
    ///
    /// # Errors
    /// As for [`Sealed::create`].
    pub fn create(page_size: PageSize) -> Result<Self> {
        Ok(Self::of(Sealed::create(Reach::Programs, None)?, page_size))
    }

    fn of(sealed: Sealed, page_size: PageSize) -> Self {
        let (released, note_is_stale, under_way) = (PageSet::default(), false, false);
        Self {
            sealed,
            page_size,
            released,
            note_is_stale,
            under_way,
            unsettled: None,
            orphaned: false,
        }
    }

    /// The holding of `sealed`, which another process has left. [`Holding::begin_settling`] must
    /// follow.
    ///
    /// # Errors
    /// The errors of getxattr(2), and those of [`Sealed::resume`].
    pub fn open(page_size: PageSize, sealed: Sealed) -> Result<Self> {
        let noted =
            sealed.notes().kept(RELEASED)?.map(|runs| PageSet::decode(&runs)).unwrap_or_default();
        let mut holding = Self::of(sealed, page_size);
        holding.released = noted.clone();
        // The dead worker gave them up.
        holding.released.remove(holding.reserved().end..Page(u64::MAX));
        // Other pages of the file lack memory if a program took it out by MADV_REMOVE. The program
        // may touch them again.
        let meant = holding.owned_in(Range::new(0, holding.size()));
        holding.sealed.resume(meant.into_iter().flat_map(Range::folios))?;
        holding.own_what_has_memory();
        holding.note_is_stale = holding.released != noted;
        holding.try_to_note_released();
        Ok(holding)
    }

    /// Makes each released page that has memory the file's. Returns the number of such pages.
    fn own_what_has_memory(&mut self) -> u64 {
        let memory = self.memory_end();
        let with_memory = self.released.runs().flat_map(|run| {
            let folios = self.page_size.bytes_of(run).intersect(Range::new(0, memory)).folios();
            folios.filter(|folio| self.sealed.has_memory(*folio))
        });
        let page_of = |folio: Folio| self.page_size.pages_touching(folio.range());
        let owned: PageSet = with_memory.map(page_of).collect();
        self.released = std::mem::take(&mut self.released).without(&owned);
        self.note_is_stale |= !owned.is_empty();
        owned.count()
    }

    /// Notes the released pages, unless the note is true already.
    fn note_released(&mut self) -> Result<()> {
        if self.note_is_stale {
            self.note(&self.released)?;
            self.note_is_stale = false;
        }
        Ok(())
    }

    /// Notes the released pages, and goes on if that fails: a stale note does no harm here. A page
    /// that is noted and has memory is the file's, and a page that is noted behind `owned_pages`
    /// has no owner. The next change corrects the note, or is refused.
    fn try_to_note_released(&mut self) {
        if let Err(error) = self.note_released() {
            log::warn!("pages of a file stay noted as released that are not: {error}");
        }
    }

    fn note(&self, released: &PageSet) -> Result<()> {
        refuse_too_many_runs(released)?;
        self.sealed.notes().keep(RELEASED, &released.encode())
    }

    /// Notes `released` as the released pages and then sets them. On an error both are as before.
    fn set_released(&mut self, released: PageSet) -> Result<()> {
        if released != self.released || self.note_is_stale {
            self.note(&released)?;
            self.released = released;
            self.note_is_stale = false;
        }
        Ok(())
    }

    // ---- what there is -------------------------------------------------------------------------

    /// The sealed file.
    pub fn sealed(&self) -> &Sealed {
        &self.sealed
    }

    /// The sealed file, for quarantine and repair. Only this module changes its folios and its
    /// size.
    pub fn sealed_mut(&mut self) -> &mut Sealed {
        &mut self.sealed
    }

    /// Size of the file in bytes. The sealed file is longer while a growth is under way.
    pub fn size(&self) -> u64 {
        self.sealed.header().undo_size.unwrap_or(self.sealed.size())
    }

    /// Bytes of the pages that are the file's.
    pub fn bytes(&self) -> u64 {
        self.pages() * self.page_size.bytes()
    }

    /// Pages that are the file's.
    pub fn pages(&self) -> u64 {
        self.sealed.header().owned_pages - self.released.count()
    }

    /// The pages that the file owns or has released.
    fn reserved(&self) -> Run {
        Page(0)..Page(self.sealed.header().owned_pages)
    }

    /// The end of the file's memory. Only released pages before it have none.
    fn memory_end(&self) -> u64 {
        self.size().next_multiple_of(FOLIO_SIZE)
    }

    /// True if a page is released.
    pub fn has_released(&self) -> bool {
        !self.released.is_empty()
    }

    /// The parts of `range` before the end of file that lie in released pages, ascending.
    pub fn released_in(&self, range: Range) -> impl Iterator<Item = Range> + '_ {
        let range = range.intersect(Range::new(0, self.size()));
        let runs = self.released.within(self.page_size.pages_touching(range));
        runs.map(move |run| self.page_size.bytes_of(&run).intersect(range))
    }

    /// The parts of `range` before the end of file that do not lie in released pages, ascending.
    pub fn owned_in(&self, range: Range) -> Vec<Range> {
        let range = range.intersect(Range::new(0, self.size()));
        let runs = self.released.gaps_within(self.page_size.pages_touching(range));
        runs.iter().map(|run| self.page_size.bytes_of(run).intersect(range)).collect()
    }

    /// True if every byte of `range` has memory or is a soft hole.
    pub fn has_pages(&self, range: Range) -> bool {
        range.end <= self.size() && self.released_in(range).next().is_none()
    }

    /// True if a write of `range` lengthens the file within the memory that it has, so that no
    /// memory moves ([`Sealed::append`]).
    pub fn can_append(&self, range: Range) -> bool {
        let (size, folio) = (self.size(), Subpage::containing(self.size()).folio());
        self.is_settled()
            && range.end > size
            && range.end <= self.memory_end()
            && self.sealed.has_memory(folio)
            && self.sealed.holes().is_empty()
            && self
                .sealed
                .lost_in(Range::new(range.start.min(size), folio.range().end))
                .next()
                .is_none()
            && self.has_pages(Range::new(range.start.min(size), size))
    }

    /// True if no change is under way, and none is stuck half-way.
    pub fn is_settled(&self) -> bool {
        !self.under_way && self.unsettled.is_none()
    }

    /// This holding's part of [`Held`].
    pub fn held(&self) -> Held {
        let bytes = self.sealed.folio_count() * FOLIO_SIZE;
        Held { pages: self.pages(), bytes, stuck: self.unsettled.unwrap_or(0) }
    }

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
                self.first_without_memory(self.page_size.bytes_of(&range).intersect(memory))
            {
                wrong.push(format!("{range} is the file's and has no memory"));
            }
        }
        Ok(wrong)
    }

    /// The first run of folios in `range` that have no memory, if there is one.
    fn first_without_memory(&self, range: Range) -> Option<Range> {
        let lacks = |folio: &Folio| !self.sealed.has_memory(*folio);
        let mut folios = range.folios().skip_while(|folio| !lacks(folio)).take_while(lacks);
        let first = folios.next()?;
        let last = folios.last().unwrap_or(first);
        Some(Range::new(first.range().start, last.range().end))
    }

    /// The last part of `range` that can be given back within the time of a piece: to forget a run
    /// of soft holes costs some 10 us. The part has memory if `range` has.
    fn end_with_few_holes(&self, range: Range) -> Range {
        const MOST_HOLES: usize = 128;
        let first = self.sealed.holes().in_range(range).rev().nth(MOST_HOLES);
        let folio_of = |hole: Hole| Subpage::containing(hole.range.start).folio().range();
        first.map_or(range, |hole| Range::new(folio_of(hole).start.max(range.start), range.end))
    }

    // ---- changes -------------------------------------------------------------------------------

    /// Begins to make the file at least `size` bytes long. Every byte from the old end on and in
    /// `range` gets memory.
    ///
    /// # Errors
    /// [`Error::Full`] and [`Error::Returning`]; [`Error::Busy`] where soft holes forbid the growth
    /// or there would be too many separate holes. Nothing has changed. The change itself fails with
    /// [`Error::NoMemory`], and nothing has changed either.
    pub fn begin_growth<'pool>(
        &mut self,
        pool: &'pool Pool,
        range: Range,
        size: u64,
    ) -> Result<Change<'pool>> {
        self.ready(pool)?;
        let before = self.size();
        let size = size.max(before);
        let inside = self.released_touching(range.intersect(Range::new(0, size)));
        let missing = inside.union(&self.released_touching(Range::new(before, size)));
        if missing.is_empty() && size == before {
            return Ok(Change(Kind::Nothing));
        }
        self.refuse_with_holes()?;
        self.begin_acquiring(pool, missing, size, size)
    }

    /// Begins to make the pages up to the end of `range` the file's. The part of `range` before the
    /// end of file gets memory. The file keeps its size.
    ///
    /// # Errors
    /// Those of [`Holding::begin_growth`].
    pub fn begin_allocation<'pool>(
        &mut self,
        pool: &'pool Pool,
        range: Range,
    ) -> Result<Change<'pool>> {
        self.ready(pool)?;
        let size = self.size();
        let missing = self.released_touching(range);
        if !self.released_touching(range.intersect(Range::new(0, size))).is_empty() {
            self.refuse_with_holes()?; // behind the end of file no memory moves
        }
        self.begin_acquiring(pool, missing, size, range.end)
    }

    /// Begins to make the file own the pages up to `end` and the released pages in `missing`, with
    /// memory before the end of file, which will be at `size`.
    fn begin_acquiring<'pool>(
        &mut self,
        pool: &'pool Pool,
        missing: PageSet,
        size: u64,
        end: u64,
    ) -> Result<Change<'pool>> {
        refuse_too_many_runs(&self.released.clone().without(&missing))?;
        let reserved = self.reserved().end.0;
        let wanted = reserved.max(self.page_size.pages_up(end));
        let token = pool.reserve(wanted - reserved + missing.count())?;
        if size > self.size() {
            let before = self.size();
            self.sealed.update(|header| header.undo_size = Some(before))?;
            steps::reached(Step::AllocateAnnounced);
        }
        Ok(self.begun(Kind::Growth(Growth::new(self, token, missing, wanted, size))))
    }

    /// Begins to shorten the file to `size` bytes and to give back the pages behind. Quarantines
    /// behind the new end are forgotten. If the file has this size already, no memory moves, and
    /// soft holes do not forbid the change.
    ///
    /// # Errors
    /// [`Error::Busy`] where soft holes before the new end forbid it. The change itself fails with
    /// [`Error::NoMemory`] where the machine has no memory for a piece.
    pub fn begin_shrinking<'pool>(
        &mut self,
        pool: &'pool Pool,
        size: u64,
    ) -> Result<Change<'pool>> {
        if size > 0 {
            self.ready(pool)?; // to size 0, stuck memory goes with the rest
        }
        if size < self.size() && self.sealed.holes().in_range(Range::new(0, size)).next().is_some()
        {
            return Err(HAS_SOFT_HOLES);
        }
        Ok(self.begun(Kind::Shrinking(Shrinking::new(pool, size))))
    }

    /// Begins to give back the pages that lie in `range` whole. Quarantines in these pages are
    /// forgotten.
    ///
    /// # Errors
    /// [`Error::Busy`] where soft holes elsewhere forbid it or there would be too many separate
    /// holes; nothing has changed. The change itself may fail with [`Error::NoMemory`] after it has
    /// released some of the pages.
    pub fn begin_release<'pool>(
        &mut self,
        pool: &'pool Pool,
        range: Range,
    ) -> Result<Change<'pool>> {
        self.ready(pool)?;
        let within = self.page_size.pages_within(range);
        let bytes = self.page_size.bytes_of(&within);
        let runs = self.released.gaps_within(within.start..within.end.min(self.reserved().end));
        if runs.is_empty() {
            return Ok(Change(Kind::Nothing));
        }
        let released = self.released.clone().union(&runs.iter().cloned().collect());
        if self.sealed.holes().all().any(|hole| !bytes.covers(hole.range)) {
            return Err(HAS_SOFT_HOLES);
        }
        self.note(&released)?;
        self.note_is_stale = true; // until the pages are released
        steps::reached(Step::ReleaseNoted);
        Ok(self.begun(Kind::Release(Release::new(self, pool, runs))))
    }

    /// Begins to undo a change that another process left under way, or that this process could not
    /// undo, and to give the file's pages the memory that they lack.
    ///
    /// # Errors
    /// The change itself fails with [`Error::NoMemory`] where the machine has no memory for a
    /// piece.
    pub fn begin_settling<'pool>(&mut self, pool: &'pool Pool) -> Change<'pool> {
        self.begun(Kind::Settling(Settling::new(pool)))
    }

    fn begun<'pool>(&mut self, kind: Kind<'pool>) -> Change<'pool> {
        assert!(!self.under_way, "one change of a file begins while another is under way");
        self.under_way = true;
        Change(kind)
    }

    /// Carries a change out without a pause.
    ///
    /// # Errors
    /// Those of [`Change::advance`].
    pub fn complete(&mut self, mut change: Change<'_>) -> Result<()> {
        while change.advance(self)? == Progress::More {}
        Ok(())
    }

    /// Makes the holding ready for a change: settles an earlier change that is stuck half-way.
    fn ready(&mut self, pool: &Pool) -> Result<()> {
        assert!(!self.under_way, "one change of a file begins while another is under way");
        if self.unsettled.is_some() {
            let settling = self.begin_settling(pool);
            self.complete(settling)?;
        }
        Ok(())
    }

    /// A change could not be undone. Its memory stays here, and its pages stay reserved for that
    /// memory.
    fn leave_unsettled(&mut self, token: Option<Token<'_>>, why: &Error) {
        let kept = token.map_or(0, Token::keep);
        log::error!(
            "a change of a file's pages could not be undone, {kept} pages stay with the file for now: {why}"
        );
        self.unsettled = Some(self.unsettled.unwrap_or(0) + kept);
    }

    /// The released pages that hold any byte of `range`. `range` may reach up to the largest file
    /// size, so the released runs are searched, not `range`.
    fn released_touching(&self, range: Range) -> PageSet {
        self.released.within(self.page_size.pages_touching(range)).collect()
    }

    /// Gives back the pages behind the page with the end of file. No memory moves for that.
    fn give_up_pages_behind_end(&mut self, pool: &Pool) -> Result<()> {
        let end = Page(self.page_size.pages_up(self.sealed.size()));
        let before = self.pages();
        let update = |header: &mut Header| {
            header.owned_pages = header.owned_pages.min(end.0);
            header.undo_size = None;
        };
        insist(|| self.sealed.update(update))?; // must succeed, as memory may have moved already
        steps::reached(Step::ShrinkNoted);
        if self.released.within(end..Page(u64::MAX)).next().is_some() {
            self.released.remove(end..Page(u64::MAX));
            self.note_is_stale = true;
            self.try_to_note_released();
        }
        steps::reached(Step::ShrinkDone);
        self.release_to(pool, before - self.pages());
        Ok(())
    }

    /// Tells the account that the file gave up `pages` pages, whose memory is in the reserves.
    fn release_to(&self, pool: &Pool, pages: u64) {
        pool.release(pages);
        if self.orphaned {
            pool.note_orphaned(-(pages as i64));
        }
    }

    /// The file has lost its last name. The pool counts its pages as orphaned: they come back when
    /// the last user is gone.
    pub fn note_orphaned(&mut self, pool: &Pool) {
        if !self.orphaned {
            self.orphaned = true;
            pool.note_orphaned(self.pages() as i64);
        }
    }

    fn refuse_with_holes(&self) -> Result<()> {
        if self.sealed.holes().is_empty() { Ok(()) } else { Err(HAS_SOFT_HOLES) }
    }
}

fn refuse_too_many_runs(released: &PageSet) -> Result<()> {
    if released.run_count() <= MOST_RUNS { Ok(()) } else { Err(TOO_MANY_RUNS) }
}
