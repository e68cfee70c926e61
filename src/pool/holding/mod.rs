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
mod release;
mod settling;
mod shrinking;
mod subpages;
#[cfg(test)]
mod tests;

use super::homes::Homes;
use super::page_set::{MOST_RUNS, PageSet, Run};
use super::plan::Transfer;
use super::{Held, PerNode, Pool, Token};
use crate::error::{Error, Result};
use crate::placement::Resolved;
use crate::sealed::{Header, Hole, Reach, Sealed};
use crate::steps::{self, Step, insist};
use crate::units::{FOLIO_SIZE, Folio, NumaNode, Page, PageSize, Range, Subpage};
use growth::Growth;
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
    /// A change could be neither finished nor undone. These pages stay promised in the account, as
    /// their memory may be in this file.
    unsettled: Option<PerNode>,
    /// The homes of the file's pages, and of those that a change under way gives it.
    homes: Homes,
    /// The file's pages by home.
    owned: PerNode,
    /// Bytes of memory by home.
    memory: PerNode,
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
        }
    }

    /// The holding of `sealed`, which another process has left. The pool has memory of `nodes`; the
    /// pages that have memory get their homes by it. [`Holding::find_homes`] and
    /// [`Holding::begin_settling`] must follow.
    ///
    /// # Errors
    /// The errors of getxattr(2), and those of [`Sealed::resume`].
    pub fn open(page_size: PageSize, sealed: Sealed, nodes: &[NumaNode]) -> Result<Self> {
        let noted =
            sealed.notes().kept(RELEASED)?.map(|runs| PageSet::decode(&runs)).unwrap_or_default();
        let mut holding = Self::of(sealed, page_size);
        holding.released = noted.clone();
        // The dead worker gave them up.
        holding.released.remove(holding.span().end..Page(u64::MAX));
        // Other pages of the file lack memory if a program took it out by MADV_REMOVE. The program
        // may touch them again.
        let meant = holding.owned_in(Range::new(0, holding.size()));
        holding.sealed.resume(meant.into_iter().flat_map(Range::folios))?;
        holding.find_homes_by_memory(nodes);
        holding.release_nothing_with_memory();
        holding.note_is_stale = holding.released != noted;
        holding.try_to_note_released();
        Ok(holding)
    }

    /// Each page that has memory gets the home of that memory.
    fn find_homes_by_memory(&mut self, nodes: &[NumaNode]) {
        let with_memory: PageSet = self.sealed.folios().map(|folio| self.pages_of(folio)).collect();
        if let [node] = nodes {
            with_memory.runs().for_each(|run| self.homes.insert(run.clone(), *node));
            return;
        }
        let pages = with_memory.runs().flat_map(|run| (run.start.0..run.end.0).map(Page));
        for page in pages.collect::<Vec<_>>() {
            let mut folios = self.page_size.range(page).folios();
            let node = folios.find_map(|folio| self.sealed.node_of(folio));
            if let Some(node) = node.filter(|node| nodes.contains(node)) {
                self.homes.insert(page..Page(page.0 + 1), node);
            }
        }
    }

    /// Gives each page that has no home yet one, as `choose` says.
    pub fn find_homes(&mut self, choose: impl FnOnce(&[Run]) -> Vec<(Run, NumaNode)>) {
        let end = self.span().end.max(self.page_size.pages_touching(self.memory_range()).end);
        let homeless: Vec<Run> = (self.released.gaps_within(Page(0)..end).into_iter())
            .flat_map(|run| self.homes.gaps_within(run))
            .collect();
        choose(&homeless).into_iter().for_each(|(run, node)| self.homes.insert(run, node));
        self.owned = self.homes.count(self.released.gaps_within(self.span()));
        let home_of = |folio: Folio| self.homes.around(folio.range().start).0;
        self.memory = self.sealed.folios().map(|folio| (home_of(folio), FOLIO_SIZE)).collect();
    }

    /// The bytes from the start to the end of the last folio with memory.
    fn memory_range(&self) -> Range {
        Range::new(0, self.sealed.memory_span())
    }

    fn pages_of(&self, folio: Folio) -> Run {
        self.page_size.pages_touching(folio.range())
    }

    /// The released pages that have memory are released no more. Returns these pages.
    fn release_nothing_with_memory(&mut self) -> PageSet {
        let memory = self.memory_end();
        let with_memory = self.released.runs().flat_map(|run| {
            let folios = self.page_size.bytes_of(run).intersect(Range::new(0, memory)).folios();
            folios.filter(|folio| self.sealed.has_memory(*folio))
        });
        let owned: PageSet = with_memory.map(|folio| self.pages_of(folio)).collect();
        self.released = std::mem::take(&mut self.released).without(&owned);
        self.note_is_stale |= !owned.is_empty();
        owned
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

    /// True if a growth or an allocation up to `end` may take pages of the pool.
    pub fn may_take_pages(&self, end: u64) -> bool {
        self.has_released() || self.span().end < Page(self.page_size.pages_up(end))
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
        Held {
            pages: self.owned.clone(),
            bytes: self.memory.clone(),
            stuck: self.unsettled.clone().unwrap_or_default(),
        }
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
        homes.into_iter().for_each(|(run, node)| self.homes.insert(run, node));
        let growth = Growth::new(self, token, missing, wanted, size);
        Ok(self.begun(Kind::Growth(growth)))
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

    /// Only the file's pages have homes.
    fn forget_other_homes(&mut self) {
        let owned = self.released.gaps_within(self.span()).into_iter().collect();
        self.homes.retain(&owned);
    }

    // ---- transfers -----------------------------------------------------------------------------

    /// Moves a piece of memory here for the start of `transfer`, and makes the sealed file longer
    /// for that, up to `size` bytes. Returns the length of the piece.
    ///
    /// # Errors
    /// Those of [`Pool::move_piece_out`].
    fn take_piece(&mut self, pool: &Pool, transfer: Transfer, size: u64) -> Result<u64> {
        let before = self.sealed.folio_count();
        let moved = pool.move_piece_out(&mut self.sealed, transfer, size);
        self.count_memory(transfer.node, before);
        moved
    }

    /// Moves a piece of memory back to the pool: the last part of `range` that has memory, of pages
    /// with one home. `give` takes it out of the sealed file. Returns the part that moved, or
    /// `None` where `range` has no memory.
    ///
    /// # Errors
    /// Those of [`Pool::move_piece_in`].
    fn give_piece(
        &mut self,
        pool: &Pool,
        range: Range,
        give: impl FnOnce(&mut Sealed, Range) -> Result<()>,
    ) -> Result<Option<Range>> {
        let has_memory = |folio: &Folio| self.sealed.has_memory(*folio);
        let Some(last) = range.folios().rev().find(has_memory) else { return Ok(None) };
        let (node, start) = self.homes.around(last.range().start);
        let range = Range::new(range.start.max(start), last.range().end);
        let before = self.sealed.folio_count();
        let moved = pool.move_piece_in(&mut self.sealed, Transfer { range, node }, give);
        self.count_memory(node, before);
        moved
    }

    /// The sealed file had `before` folios. The others came from `node`, or went there.
    fn count_memory(&mut self, node: NumaNode, before: u64) {
        let after = self.sealed.folio_count();
        self.memory.add(node, after.saturating_sub(before) * FOLIO_SIZE);
        self.memory.take(node, before.saturating_sub(after) * FOLIO_SIZE);
        assert_eq!(self.memory.total(), after * FOLIO_SIZE, "memory is counted by its homes");
    }

    /// `pages` have become the file's.
    fn own(&mut self, pages: &PerNode) {
        self.owned = std::mem::take(&mut self.owned).and(pages);
    }

    /// `pages` are the file's no more.
    fn disown(&mut self, pages: &PerNode) {
        self.owned = std::mem::take(&mut self.owned).less(pages);
    }

    /// The released pages that hold any byte of `range`. `range` may reach up to the largest file
    /// size, so the released runs are searched, not `range`.
    fn released_touching(&self, range: Range) -> PageSet {
        self.released.within(self.page_size.pages_touching(range)).collect()
    }

    /// Gives back the pages behind the page with the end of file. No memory moves for that.
    fn give_up_pages_behind_end(&mut self, pool: &Pool) -> Result<()> {
        let end = Page(self.page_size.pages_up(self.sealed.size()));
        let behind = end..self.span().end.max(end);
        let given_up = self.homes.count(self.released.gaps_within(behind));
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
        self.homes.remove(end..Page(u64::MAX));
        self.disown(&given_up);
        pool.release(&given_up);
        Ok(())
    }

    /// The pages of `run`, which have no memory any more, go back to the pool.
    fn release_pages(&mut self, pool: &Pool, run: Run) {
        let released = self.homes.count([run.clone()]);
        self.homes.remove(run.clone());
        self.released.insert(run);
        self.disown(&released);
        pool.release(&released);
    }

    fn refuse_with_holes(&self) -> Result<()> {
        if self.sealed.holes().is_empty() { Ok(()) } else { Err(HAS_SOFT_HOLES) }
    }
}

fn refuse_too_many_runs(released: &PageSet) -> Result<()> {
    if released.run_count() <= MOST_RUNS { Ok(()) } else { Err(TOO_MANY_RUNS) }
}
