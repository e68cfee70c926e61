//! The homes of a file's pages.

use super::PerNode;
use super::page_set::{PageSet, Run, length};
use crate::units::{NumaNode, Page, PageSize};
use rangemap::RangeMap;
use std::ops::Range;

/// For each page of a file its home: the NUMA node whose part of the pool has given the page. Pages
/// that follow one another on one node take one entry.
#[derive(Clone, Debug)]
pub struct Homes {
    page_size: PageSize,
    nodes: RangeMap<Page, NumaNode>,
}

impl Homes {
    /// No page has a home.
    pub fn new(page_size: PageSize) -> Self {
        Self { page_size, nodes: RangeMap::new() }
    }

    /// The home of the page with the byte at `offset`, and the end of the last page of that run of
    /// pages, in bytes. `None` if the page has no home.
    pub fn at(&self, offset: u64) -> Option<(NumaNode, u64)> {
        let page = Page(self.page_size.pages_down(offset));
        let (run, node) = self.nodes.get_key_value(&page)?;
        Some((*node, self.page_size.bytes_of(run).end))
    }

    /// The home of the page with the byte at `offset`, which has one, and the start of the first
    /// page of that run of pages, in bytes.
    pub fn around(&self, offset: u64) -> (NumaNode, u64) {
        let page = Page(self.page_size.pages_down(offset));
        let (run, node) = self.nodes.get_key_value(&page).expect("the page has a home");
        (*node, self.page_size.bytes_of(run).start)
    }

    /// True if `page` has a home.
    pub fn has(&self, page: Page) -> bool {
        self.nodes.contains_key(&page)
    }

    /// The pages of `run` get the home `node`.
    pub fn insert(&mut self, run: Run, node: NumaNode) {
        if !run.is_empty() {
            self.nodes.insert(run.clone(), node);
        }
        debug_assert!(self.within(run.clone()).all(|(_, home)| home == node), "{run:?} on {node}");
        debug_assert!(self.gaps_within(run).is_empty(), "each page has a home");
    }

    /// The pages of `run` have no home any more.
    pub fn remove(&mut self, run: Run) {
        if !run.is_empty() {
            self.nodes.remove(run.clone());
        }
        debug_assert!(self.within(run).next().is_none(), "no page has a home");
    }

    /// The homes of the pages of `run` that have one, ascending.
    pub fn within(&self, run: Run) -> impl Iterator<Item = (Run, NumaNode)> + '_ {
        let Range { start, end } = run;
        let cut = move |(part, node): (&Run, &NumaNode)| {
            (part.start.max(start)..part.end.min(end), *node)
        };
        let parts = (start < end).then(|| self.nodes.overlapping(start..end));
        parts.into_iter().flatten().map(cut)
    }

    /// The pages of `run` without a home, ascending.
    pub fn gaps_within(&self, run: Run) -> Vec<Run> {
        if run.is_empty() { Vec::new() } else { self.nodes.gaps(&run).collect() }
    }

    /// The number of pages of `runs` on each node. Each page has a home.
    pub fn count(&self, runs: impl IntoIterator<Item = Run>) -> PerNode {
        let mut counts = PerNode::default();
        for run in runs {
            let mut left = length(&run);
            for (part, node) in self.within(run.clone()) {
                counts.add(node, length(&part));
                left -= length(&part);
            }
            assert_eq!(left, 0, "a page of {run:?} has no home");
        }
        counts
    }

    /// Only the pages of `kept` keep their homes.
    pub fn retain(&mut self, kept: &PageSet) {
        let mut nodes = RangeMap::new();
        for run in kept.runs() {
            self.within(run.clone()).for_each(|(part, node)| nodes.insert(part, node));
        }
        self.nodes = nodes;
        let inside = |(run, _): (&Run, &NumaNode)| kept.within(run.clone()).eq([run.clone()]);
        debug_assert!(self.nodes.iter().all(inside), "no other page has a home");
    }
}
