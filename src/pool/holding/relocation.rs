//! Relocation: pages get other homes, and their memory moves to other NUMA nodes, while programs
//! use it.
//!
//! ```text
//!   reserve of the new home      file            reserve of the old home
//!      gives a piece  --->   its folios move  --->   takes as much
//! ```
//!
//! A page of one folio has moved or has not. A page of many folios moves in pieces, and all of it
//! counts as moved in the end; a few folios that a device has pinned may stay. While it moves, the
//! page and its old home are noted with the file ([`MOVING`]). So a settling, in this worker or in
//! the next one, knows from the memory itself which part has moved, and moves it back.

use super::{Holding, Progress};
use crate::error::{Error, Result};
use crate::placement::Resolved;
use crate::pool::page_set::{PageSet, Run, length};
use crate::pool::{PIECE, PerNode, Pool, Token};
use crate::steps::{self, Step};
use crate::units::{FOLIO_SIZE, Folio, NumaNode, Page, PageSize, Range};

/// The name under which a page of many folios is noted that is on its way: its number, 8 bytes, and
/// its old home, 4 bytes, little-endian.
const MOVING: &str = "moving";

/// A page of many folios that is on its way.
#[derive(Clone, Copy, Debug)]
pub struct HalfMoved {
    /// The old home, which is the page's until all of it has moved.
    home: NumaNode,
    to: NumaNode,
    /// The part of the page whose memory counts as that of the new home.
    moved: Range,
}

/// A page whose memory a program has moved away from the NUMA node that it counts as, by mbind(2)
/// or move_pages(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Displaced {
    /// The page.
    pub page: Page,
    /// The node that has all of its memory. `None` if several nodes have some.
    pub on: Option<NumaNode>,
}

/// A relocation that is under way.
#[derive(Debug)]
pub struct Relocation<'pool> {
    pool: &'pool Pool,
    /// The wished nodes, and no others.
    placement: Resolved,
    /// The pages that have not been looked at.
    rest: Run,
    batch: Option<Batch<'pool>>,
    stop: Option<Error>,
}

/// Pages with one home that get another one together: one page, or as many as make up a piece.
#[derive(Debug)]
struct Batch<'pool> {
    pages: Run,
    from: NumaNode,
    to: NumaNode,
    /// As many pages of the new home.
    token: Token<'pool>,
    /// The memory from here on has not moved.
    at: u64,
}

impl<'pool> Relocation<'pool> {
    pub fn new(pool: &'pool Pool, pages: Run, placement: &Resolved) -> Self {
        let placement = Resolved { strict: true, ..placement.clone() };
        Self { pool, placement, rest: pages, batch: None, stop: None }
    }

    pub fn give_up(&mut self, why: Error) {
        self.stop.get_or_insert(why);
    }

    pub fn advance(&mut self, holding: &mut Holding) -> Result<Progress> {
        match self.batch.take() {
            Some(batch) => self.move_piece(holding, batch),
            None => self.begin_batch(holding),
        }
    }

    fn begin_batch(&mut self, holding: &mut Holding) -> Result<Progress> {
        if let Some(why) = &self.stop {
            return Err(why.clone());
        }
        let misplaced = holding.misplaced(&self.placement, self.rest.clone()).next();
        let Some((pages, from)) = misplaced else { return Ok(Progress::Done) };
        holding.pinned.remove(pages.clone());
        let Some((token, pages, to)) = self.promise(pages.clone()) else {
            self.rest.start = pages.end; // the wished nodes are full
            return Ok(Progress::More);
        };
        self.rest.start = pages.end;
        let at = holding.page_size.bytes_of(&pages).start;
        if holding.page_size != PageSize::Huge {
            holding.note_half_moved(pages.start, from, to)?;
        }
        self.batch = Some(Batch { pages, from, to, token, at });
        Ok(Progress::More)
    }

    /// A token for the first of `pages`: as many as one wished node has free, at least one.
    fn promise(&self, pages: Run) -> Option<(Token<'pool>, Run, NumaNode)> {
        let one = pages.start..Page(pages.start.0 + 1);
        [pages, one].into_iter().find_map(|pages| {
            let wanted = PageSet::from_iter([pages]);
            let (token, homes) = self.pool.promise_free_pages(&wanted, &self.placement).ok()?;
            let (pages, to) = homes.into_iter().next()?;
            let token = token.reduced_to(PerNode::on(to, length(&pages)));
            Some((token, pages, to))
        })
    }

    fn move_piece(&mut self, holding: &mut Holding, mut batch: Batch<'pool>) -> Result<Progress> {
        let end = holding.page_size.bytes_of(&batch.pages).end.min(holding.memory_end());
        let Some(range) = holding.first_run(Range::new(batch.at, end), true) else {
            return self.finish(holding, batch);
        };
        match holding.exchange(self.pool, range, batch.from, batch.to) {
            Ok((_, folios)) if folios.is_empty() && holding.half_moved.is_some() => {
                holding.pinned.insert(batch.pages);
                return holding.forget_half_moved().map(|()| Progress::More);
            }
            Ok((piece, folios)) => {
                batch.at = piece.end;
                if holding.half_moved.is_none() {
                    holding.pinned.insert(holding.page_size.pages_touching(piece));
                    holding.change_homes(&mut batch, folios.into_iter().map(page_of));
                }
            }
            Err(error) => return self.fail(holding, batch, error),
        }
        self.batch = Some(batch);
        Ok(Progress::More)
    }

    /// All memory of the batch has moved. The pages without memory move by the account alone.
    fn finish(&mut self, holding: &mut Holding, mut batch: Batch<'pool>) -> Result<Progress> {
        if holding.half_moved.is_some() {
            let page = batch.pages.start;
            holding.change_homes(&mut batch, [page].into_iter());
            holding.forget_half_moved()?;
        } else {
            let pages = (batch.pages.start.0..batch.pages.end.0).map(Page);
            let without = |page: &Page| !holding.sealed.has_memory(Folio(page.0));
            let without: Vec<_> = pages.filter(without).collect();
            holding.change_homes(&mut batch, without.into_iter());
        }
        steps::reached(Step::RelocateDone);
        Ok(Progress::More)
    }

    fn fail(&self, holding: &mut Holding, batch: Batch<'pool>, why: Error) -> Result<Progress> {
        match holding.half_moved {
            Some(half) if !half.moved.is_empty() => {
                holding.leave_unsettled(Some(batch.token), &why);
            }
            _ => holding.forget_half_moved()?,
        }
        Err(why)
    }
}

/// The page that is this folio.
fn page_of(folio: Folio) -> Page {
    Page(folio.0)
}

#[cfg(test)]
impl Holding {
    /// Ends a relocation as if nothing was left to put at stake.
    pub(in crate::pool) fn stop_for_tests(&mut self, change: super::Change<'_>) {
        let super::Change(super::Kind::Relocation(mut relocation)) = change else {
            panic!("it is a relocation");
        };
        let batch = relocation.batch.take().expect("a page is on its way");
        assert!(relocation.fail(self, batch, Error::NoMemory).is_err());
        self.under_way = false;
    }
}

impl Holding {
    /// Those of `pages` whose homes `placement` does not wish for them, ascending, in runs of one
    /// home with no more pages than a batch.
    pub(super) fn misplaced<'a>(
        &'a self,
        placement: &'a Resolved,
        pages: Run,
    ) -> impl Iterator<Item = (Run, NumaNode)> + 'a {
        let most = (PIECE / self.page_size.bytes()).max(1);
        let end = pages.end.min(self.span().end);
        self.homes.within(pages.start.min(end)..end).flat_map(move |(run, node)| {
            let mut at = run.start.0;
            std::iter::from_fn(move || {
                let is_misplaced = |page: &u64| !placement.wishes(Page(*page), node);
                let first = (at..run.end.0).find(is_misplaced)?;
                let end = run.end.0.min(first + most);
                at = (first..end).find(|page| !is_misplaced(page)).unwrap_or(end);
                Some((Page(first)..Page(at), node))
            })
        })
    }

    /// True if `placement` wishes another home for one of `pages`.
    pub fn are_misplaced(&self, pages: Run, placement: &Resolved) -> bool {
        self.misplaced(placement, pages).next().is_some()
    }

    /// Those of `pages` whose memory a program has moved away from the node that it counts as.
    pub fn displaced_among(&self, pages: &Run) -> Vec<Displaced> {
        let located = self.located(pages);
        let of_page = located.chunk_by(|(one, _), (other, _)| self.page(*one) == self.page(*other));
        let displaced = |part: &[(Folio, Option<NumaNode>)]| {
            let (first, on) = *part.first()?;
            let on = on.filter(|_| part.iter().all(|(_, other)| *other == on));
            let is_displaced = part.iter().any(|one| self.is_displaced(one));
            is_displaced.then(|| Displaced { page: self.page(first), on })
        };
        of_page.filter_map(displaced).collect()
    }

    /// The folios of `pages` whose memory a program has moved away from the node that it counts as.
    pub fn displaced_folios(&self, pages: &Run) -> Vec<Folio> {
        let displaced = self.located(pages).into_iter().filter(|one| self.is_displaced(one));
        displaced.map(|(folio, _)| folio).collect()
    }

    /// True if the last relocation has left some of `pages` at their homes, as their memory is
    /// pinned.
    pub fn are_pinned(&self, pages: Run) -> bool {
        self.pinned.within(pages).next().is_some()
    }

    /// True if memory of a folio, which lies on the node `on`, could not be moved where it should
    /// be, as a device has pinned it.
    pub fn is_pinned(&self, folio: Folio, on: Option<NumaNode>) -> bool {
        let page = self.page(folio);
        self.is_displaced(&(folio, on)) || self.are_pinned(page..Page(page.0 + 1))
    }

    fn located(&self, pages: &Run) -> Vec<(Folio, Option<NumaNode>)> {
        self.sealed.nodes_of(self.page_size.bytes_of(pages).intersect(self.memory_range()))
    }

    fn is_displaced(&self, (folio, on): &(Folio, Option<NumaNode>)) -> bool {
        on.is_some_and(|node| node != self.node_counted(*folio))
    }

    fn page(&self, folio: Folio) -> Page {
        self.page_size.pages_touching(folio.range()).start
    }

    /// Moves the memory of a displaced folio back to the node that it counts as. Returns false if
    /// it has stayed, as a device has pinned it.
    ///
    /// # Errors
    /// [`Error::NoMemory`] where nothing is left to put at stake; the errors of
    /// [`Sealed::migrate`](crate::sealed::Sealed::migrate).
    pub fn bring_home(&self, pool: &Pool, folio: Folio) -> Result<bool> {
        let located = self.sealed.nodes_of(folio.range().intersect(self.memory_range()));
        if !located.iter().any(|one| self.is_displaced(one)) {
            return Ok(false); // it has gone home, or has no memory any more
        }
        let home = self.node_counted(folio);
        let (_, moved) = pool.bring_piece_home(&self.sealed, folio.range(), home)?;
        Ok(!moved.is_empty())
    }

    /// Moves a piece of memory from one node to another: the first part of `range`. Returns the
    /// piece, and the folios of it that count as moved.
    fn exchange(
        &mut self,
        pool: &Pool,
        range: Range,
        from: NumaNode,
        to: NumaNode,
    ) -> Result<(Range, Vec<Folio>)> {
        let has_begun = self.half_moved.map(|half| !half.moved.is_empty());
        let counts = |piece: Range, moved: Vec<Folio>| match has_begun {
            Some(has_begun) if has_begun || !moved.is_empty() => piece.folios().collect(),
            _ => moved,
        };
        let (piece, folios) = pool.exchange_piece(&self.sealed, range, from, to, counts)?;
        let bytes = folios.len() as u64 * FOLIO_SIZE;
        self.memory.take(from, bytes);
        self.memory.add(to, bytes);
        self.assert_counted();
        if let Some(half) = self.half_moved.as_mut().filter(|_| !folios.is_empty()) {
            half.count(piece, to);
        }
        Ok((piece, folios))
    }

    /// `pages` of the batch, of which all memory has moved, have the new home.
    fn change_homes(&mut self, batch: &mut Batch<'_>, pages: impl Iterator<Item = Page>) {
        let pages: PageSet = pages.map(|page| page..Page(page.0 + 1)).collect();
        let is_old = |(_, home)| home == batch.from;
        debug_assert!(pages.runs().all(|run| self.homes.within(run.clone()).all(is_old)));
        debug_assert_eq!(
            pages.count(),
            pages.within(batch.pages.clone()).map(|run| length(&run)).sum::<u64>()
        );
        let (old, new) =
            (PerNode::on(batch.from, pages.count()), PerNode::on(batch.to, pages.count()));
        for run in pages.runs() {
            self.pinned.remove(run.clone());
            self.homes.insert(run.clone(), batch.to);
        }
        batch.token.hand_over(&new);
        self.own(&new);
        self.disown(&old);
        batch.token.pool.release(&old);
    }

    /// Notes a page of many folios before any of it moves.
    fn note_half_moved(&mut self, page: Page, home: NumaNode, to: NumaNode) -> Result<()> {
        assert!(self.half_moved.is_none(), "one page is on its way at a time");
        let note = page.0.to_le_bytes().into_iter().chain(home.0.to_le_bytes());
        self.sealed.notes().keep(MOVING, &note.collect::<Vec<_>>())?;
        steps::reached(Step::RelocateNoted);
        let start = self.page_size.range(page).start;
        self.half_moved = Some(HalfMoved { home, to, moved: Range::new(start, start) });
        Ok(())
    }

    /// No page is on its way any more.
    fn forget_half_moved(&mut self) -> Result<()> {
        if self.half_moved.take().is_some() {
            self.sealed.notes().discard(MOVING)?;
        }
        Ok(())
    }

    /// Finds out from the note and the memory which page another process has left on its way, and
    /// which part of it has moved. The page has its old home.
    pub(super) fn recall_half_moved(&mut self, nodes: &[NumaNode]) -> Result<()> {
        let Some(note) = self.sealed.notes().kept(MOVING)? else { return Ok(()) };
        let damaged = || Error::Corrupt(format!("{MOVING} {note:?}"));
        let (page, home) = note.split_first_chunk().ok_or_else(damaged)?;
        let home = home.try_into().map(u32::from_le_bytes).map_err(|_| damaged())?;
        let (page, home) = (Page(u64::from_le_bytes(*page)), NumaNode(home));
        if !nodes.contains(&home) {
            return Err(damaged());
        }
        let range = self.page_size.range(page);
        let mut half = HalfMoved { home, to: home, moved: Range::new(range.start, range.start) };
        for (folio, node) in self.sealed.nodes_of(range.intersect(self.memory_range())) {
            if let Some(to) = node.filter(|node| *node != home && nodes.contains(node)) {
                half.to = to;
                let start =
                    if half.moved.is_empty() { folio.range().start } else { half.moved.start };
                half.moved = Range::new(start, folio.range().end);
            }
        }
        self.homes.insert(page..Page(page.0 + 1), home);
        self.half_moved = Some(half);
        Ok(())
    }

    /// Moves a piece of the page that is on its way back to its home. `None` if none is left.
    pub(super) fn return_half_moved(&mut self, pool: &Pool) -> Result<Option<Progress>> {
        match self.half_moved {
            Some(HalfMoved { to, home, moved, .. }) if !moved.is_empty() => {
                self.exchange(pool, moved, to, home)?;
                Ok(Some(Progress::More))
            }
            _ => self.forget_half_moved().map(|()| None),
        }
    }

    /// The node whose memory the folio counts as: the home of its page, or the new home of a page
    /// that is on its way.
    pub(super) fn node_counted(&self, folio: Folio) -> NumaNode {
        match self.half_moved {
            Some(half) if half.moved.covers(folio.range()) => half.to,
            _ => self.homes.around(folio.range().start).0,
        }
    }
}

impl HalfMoved {
    /// All of `piece` counts as memory of `node` now.
    fn count(&mut self, piece: Range, node: NumaNode) {
        assert!(node == self.to || node == self.home, "{piece} moves to node {node}");
        self.moved = if node == self.to {
            Range::new(self.moved.start, piece.end)
        } else {
            Range::new(piece.end, self.moved.end)
        };
    }
}
