//! A holding that another process has left: its pages, and their homes.

use super::{Holding, RELEASED};
use crate::error::Result;
use crate::pool::page_set::{PageSet, Run};
use crate::sealed::Sealed;
use crate::units::{FOLIO_SIZE, Folio, NumaNode, Page, PageSize, Range};

/// Bytes of a file whose NUMA nodes are looked for in one mapping.
const MAPPED_AT_ONCE: u64 = 1 << 30;

impl Holding {
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
        holding.recall_ahead()?;
        // The dead worker gave them up.
        holding.released.remove(holding.span().end..Page(u64::MAX));
        // Other pages of the file lack memory if a program took it out by MADV_REMOVE. The program
        // may touch them again.
        let meant = holding.owned_in(Range::new(0, holding.size()));
        holding.sealed.resume(meant.into_iter().flat_map(Range::folios))?;
        holding.find_homes_by_memory(nodes);
        holding.find_homes_of_gaps();
        holding.recall_half_moved(nodes)?;
        holding.release_nothing_with_memory();
        holding.note_is_stale = holding.released != noted;
        holding.try_to_note_released();
        Ok(holding)
    }

    /// Each page that has memory gets the home of that memory.
    pub(super) fn find_homes_by_memory(&mut self, nodes: &[NumaNode]) {
        if let [node] = nodes {
            let pages = self.sealed.folios().map(|folio| self.pages_of(folio));
            let with_memory: PageSet = pages.collect();
            with_memory.runs().for_each(|run| self.homes.insert(run.clone(), *node));
            return;
        }
        for window in self.memory_range().steps(MAPPED_AT_ONCE) {
            for (folio, node) in self.sealed.nodes_of(window) {
                let (page, node) = (self.pages_of(folio), node.filter(|node| nodes.contains(node)));
                // The first folio of which the kernel tells stands for the page.
                if let Some(node) = node.filter(|_| !self.homes.has(page.start)) {
                    self.homes.insert(page, node);
                }
            }
        }
    }

    /// A page that was punched and is still the file's has no memory to tell its home. It gets the
    /// home of the page before it, or of the one behind it.
    fn find_homes_of_gaps(&mut self) {
        let pages = self.page_size.pages_touching(self.memory_range());
        let owned = self.released.gaps_within(pages).into_iter();
        let gaps: Vec<Run> = owned.flat_map(|run| self.homes.gaps_within(run)).collect();
        for gap in gaps {
            let of = |page| self.homes.within(Page(page)..Page(page + 1)).next();
            let before = gap.start.0.checked_sub(1).and_then(of);
            if let Some((_, node)) = before.or_else(|| of(gap.end.0)) {
                self.homes.insert(gap, node);
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
        let counted = |folio| (self.node_counted(folio), FOLIO_SIZE);
        self.memory = self.sealed.folios().map(counted).collect();
        self.assert_counted();
        debug_assert!(
            self.homes
                .gaps_within(Page(0)..end)
                .iter()
                .all(|run| { self.released.within(run.clone()).eq([run.clone()]) }),
            "each page that is not released has a home"
        );
    }

    /// The bytes from the start to the end of the last folio with memory.
    pub(super) fn memory_range(&self) -> Range {
        Range::new(0, self.sealed.memory_span())
    }

    pub(super) fn pages_of(&self, folio: Folio) -> Run {
        self.page_size.pages_touching(folio.range())
    }

    /// The released pages that have memory are released no more. Returns these pages.
    pub(super) fn release_nothing_with_memory(&mut self) -> PageSet {
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
}
