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
//! pages to the file, but their memory is in the reserve of their home.
//!
//! Memory moves by transfers only: [`Holding::take_piece`] and [`Holding::give_piece`] move a piece
//! and count it by its home. No code outside of the pool has the sealed file to change it: changes
//! that move no folio are functions of the holding (`subpages`).
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
//! nor given back: its pages stay promised to the holding until that is settled.
//!
//! **A death in between.** The released pages are noted with the file ([`RELEASED`]). A release
//! notes its pages before it moves any memory. A growth strikes pages out of the note after it has
//! moved all memory. So a page that is noted and has memory was on its way, in one direction or the
//! other: it is the file's. A growth that lengthens the file first notes the old size in the header
//! ([`crate::sealed::Header`]), as `undo_size`. Its last step clears `undo_size` and makes the
//! pages the file's.
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

mod ahead;
mod check;
mod growth;
mod opening;
mod release;
mod relocation;
mod settling;
mod shrinking;
mod subpages;
#[cfg(test)]
mod tests;
mod transfers;

use super::homes::Homes;
use super::page_set::{MOST_RUNS, PageSet, Run};
use super::{Held, PerNode, Pool, Token};
use crate::error::{Error, Result};
use crate::placement::Resolved;
use crate::sealed::{Hole, Reach, Sealed};
use crate::steps::{self, Step};
use crate::units::{FOLIO_SIZE, Folio, Page, PageSize, Range, Subpage};
use ahead::Ahead;
use growth::Growth;
use release::Release;
pub use relocation::Displaced;
use relocation::{HalfMoved, Relocation};
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
    /// A change could be neither finished nor undone. These pages stay promised in the account, as
    /// their memory may be in this file.
    unsettled: Option<PerNode>,
    /// The homes of the file's pages, and of those that a change under way gives it.
    homes: Homes,
    /// The file's pages by home.
    owned: PerNode,
    /// Bytes of memory by home.
    memory: PerNode,
    /// A page that is on its way to another home.
    half_moved: Option<HalfMoved>,
    /// The pages behind the end of file that no program has asked for.
    ahead: Option<Ahead>,
    /// Pages that the last relocation left at their homes, as their memory is pinned. Users ask
    /// for this.
    pinned: PageSet,
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
    Relocation(Relocation<'pool>),
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
            Kind::Relocation(relocation) => relocation.advance(holding),
            Kind::Settling(settling) => settling.advance(holding),
        };
        holding.under_way = matches!(progress, Ok(Progress::More));
        holding.assert_counted();
        match &progress {
            Ok(Progress::Done) => holding.assert_sound(),
            Err(_) if !matches!(self.0, Kind::Settling(_)) => holding.assert_sound(),
            _ => {}
        }
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
            Kind::Relocation(relocation) => relocation.give_up(why),
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
        Self {
            sealed,
            page_size,
            released: PageSet::default(),
            note_is_stale: false,
            under_way: false,
            unsettled: None,
            homes: Homes::new(page_size),
            owned: PerNode::default(),
            memory: PerNode::default(),
            half_moved: None,
            ahead: None,
            pinned: PageSet::default(),
        }
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

    #[cfg(test)]
    pub(super) fn sealed_for_tests(&mut self) -> &mut Sealed {
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
        self.owned.total()
    }

    /// The pages that the file owns or has released.
    fn span(&self) -> Run {
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

    /// True if a growth or an allocation up to `end` may take pages of the pool, or pages ahead.
    pub fn may_take_pages(&self, end: u64) -> bool {
        self.has_released()
            || self.span().end < Page(self.page_size.pages_up(end))
            || (self.ahead.is_some() && end > self.size())
    }

    /// True if a write of `range` lengthens the file within the memory that it has, so that no
    /// memory moves ([`Sealed::append`]).
    pub fn can_append(&self, range: Range) -> bool {
        let (size, folio) = (self.size(), Subpage::containing(self.size()).folio());
        self.is_settled()
            && range.end > size
            && range.end <= self.memory_end()
            && self.ahead.is_none()
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
        Held {
            pages: self.owned.clone(),
            bytes: self.memory.clone(),
            stuck: self.unsettled.clone().unwrap_or_default(),
            ahead: self.ahead.as_ref().map(|ahead| ahead.pages.clone()).unwrap_or_default(),
        }
    }

    /// The first run of folios in `range` that have memory, or that have none. `None` if there is
    /// no such folio.
    fn first_run(&self, range: Range, has_memory: bool) -> Option<Range> {
        let is_one = |folio: &Folio| self.sealed.has_memory(*folio) == has_memory;
        let mut folios = range.folios().skip_while(|folio| !is_one(folio)).take_while(is_one);
        let first = folios.next()?.range();
        Some(folios.last().map_or(first, |last| Range::new(first.start, last.range().end)))
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
    /// `range` gets memory, of the nodes that `placement` wants.
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
        placement: &Resolved,
    ) -> Result<Change<'pool>> {
        self.ready(pool)?;
        if !self.is_ahead_fit_for(placement) {
            self.return_ahead(pool)?;
        }
        let before = self.size();
        let size = size.max(before);
        let inside = self.released_touching(range.intersect(Range::new(0, size)));
        let missing = inside.union(&self.released_touching(Range::new(before, size)));
        if missing.is_empty() && size == before {
            return Ok(Change(Kind::Nothing));
        }
        self.refuse_with_holes()?;
        self.begin_acquiring(pool, missing, size, size, placement)
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
        placement: &Resolved,
    ) -> Result<Change<'pool>> {
        self.ready(pool)?;
        self.return_ahead(pool)?;
        let size = self.size();
        let missing = self.released_touching(range);
        if !self.released_touching(range.intersect(Range::new(0, size))).is_empty() {
            self.refuse_with_holes()?; // behind the end of file no memory moves
        }
        self.begin_acquiring(pool, missing, size, range.end, placement)
    }

    /// Begins to make the file own the pages up to `end` and the released pages in `missing`, with
    /// memory before the end of file, which will be at `size`.
    fn begin_acquiring<'pool>(
        &mut self,
        pool: &'pool Pool,
        missing: PageSet,
        size: u64,
        end: u64,
        placement: &Resolved,
    ) -> Result<Change<'pool>> {
        refuse_too_many_runs(&self.released.clone().without(&missing))?;
        let span = self.span().end;
        let wanted = span.max(Page(self.page_size.pages_up(end)));
        let pages: PageSet = missing.runs().cloned().chain([span..wanted]).collect();
        let (token, homes) = pool.promise_pages(&pages, placement)?;
        if size > self.size() {
            let before = self.size();
            self.sealed.update(|header| header.undo_size = Some(before))?;
            steps::reached(Step::AllocateAnnounced);
        }
        for (run, node) in homes {
            self.pinned.remove(run.clone());
            self.homes.insert(run, node);
        }
        let growth = Growth::new(self, token, missing, wanted, size);
        Ok(self.begun(Kind::Growth(growth)))
    }

    /// Begins to shorten the file to `size` bytes and to give back the pages behind. Quarantines
    /// behind the new end are forgotten. If the file has this size already, memory ahead moves at
    /// most, and soft holes do not forbid the change.
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
        self.return_ahead(pool)?;
        let within = self.page_size.pages_within(range);
        let bytes = self.page_size.bytes_of(&within);
        let runs = self.released.gaps_within(within.start..within.end.min(self.span().end));
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

    /// Begins to give each of `pages` a home that `placement` wishes for it, as far as these nodes
    /// have free pages, and to move the memory there. Programs go on to use the file.
    ///
    /// # Errors
    /// Those of settling the file. The change itself fails with [`Error::NoMemory`] where nothing
    /// is left to put at stake; some pages have moved.
    pub fn begin_relocation<'pool>(
        &mut self,
        pool: &'pool Pool,
        pages: Run,
        placement: &Resolved,
    ) -> Result<Change<'pool>> {
        self.ready(pool)?;
        self.return_ahead(pool)?;
        if pool.nodes().len() == 1 {
            return Ok(Change(Kind::Nothing));
        }
        Ok(self.begun(Kind::Relocation(Relocation::new(pool, pages, placement))))
    }

    /// Refuses a strict placement whose nodes have too few free pages for `pages`.
    ///
    /// # Errors
    /// [`Error::Full`] or [`Error::Returning`].
    pub fn refuse_relocation(&self, pool: &Pool, pages: Run, placement: &Resolved) -> Result<()> {
        if placement.strict {
            let misplaced = self.misplaced(placement, pages).map(|(run, _)| run).collect();
            drop(pool.promise_pages(&misplaced, placement)?);
        }
        Ok(())
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

    /// A change could not be undone. Its memory stays here, and its pages stay promised for that
    /// memory.
    fn leave_unsettled(&mut self, token: Option<Token<'_>>, why: &Error) {
        let kept = token.map(Token::keep).unwrap_or_default();
        log::error!(
            "a change of a file's pages could not be undone, {} pages stay with the file for now: {why}",
            kept.total()
        );
        self.unsettled = Some(self.unsettled.take().unwrap_or_default().and(&kept));
    }

    /// No memory is stuck any more: the pages that were kept for it are free.
    fn end_unsettled(&mut self, pool: &Pool) {
        drop(pool.token_of_kept(self.unsettled.take().unwrap_or_default()));
    }

    /// The released pages that hold any byte of `range`. `range` may reach up to the largest file
    /// size, so the released runs are searched, not `range`.
    fn released_touching(&self, range: Range) -> PageSet {
        self.released.within(self.page_size.pages_touching(range)).collect()
    }

    fn refuse_with_holes(&self) -> Result<()> {
        if self.sealed.holes().is_empty() { Ok(()) } else { Err(HAS_SOFT_HOLES) }
    }

    // ---- assertions, of debug builds ------------------------------------------------------------

    /// Asserts that the memory is counted by its homes.
    fn assert_counted(&self) {
        let bytes = self.sealed.folio_count() * FOLIO_SIZE;
        debug_assert_eq!(self.memory.total(), bytes, "memory is counted by its homes");
        debug_assert!(
            self.homes
                .gaps_within(self.span())
                .iter()
                .all(|run| { self.released.gaps_within(run.clone()).is_empty() }),
            "each page of the file has a home"
        );
    }

    /// Asserts that the account of pages agrees with the header, unless a change is stuck half-way.
    fn assert_sound(&self) {
        self.assert_counted();
        if !self.is_settled() {
            return;
        }
        let span = self.span();
        let owned = self.released.gaps_within(span.clone());
        debug_assert_eq!(self.owned, self.homes.count(owned), "pages are counted by their homes");
        debug_assert_eq!(self.sealed.header().undo_size, None, "no change is to be undone");
        debug_assert_eq!(
            self.released.within(span.end..Page(u64::MAX)).next(),
            None,
            "a page behind the file's pages has no owner"
        );
        debug_assert!(
            self.page_size.pages_up(self.size()) <= span.end.0,
            "the file owns or has released each page before its end"
        );
    }
}

fn refuse_too_many_runs(released: &PageSet) -> Result<()> {
    if released.run_count() <= MOST_RUNS { Ok(()) } else { Err(TOO_MANY_RUNS) }
}
