//! The accounts of a pool that another process has left, made from its reserves and files. Pure.
//!
//! A worker finds the home of each page by the memory that is there. Where the kernel took memory
//! of another node than it was asked for, or a file cannot be opened, the sums of a node differ
//! from its noted size. Then the sizes of the nodes' parts follow the memory: no memory moves for
//! that.

use super::PerNode;
use super::account::{Account, Accounts, Held};
use super::moves::bytes_of;
use super::page_set::Run;
use crate::error::{Error, Result};
use crate::placement::{Full, Resolved, choose};
use crate::units::{NumaNode, PageSize};
use std::collections::BTreeMap;

/// The accounts of a pool while they are made.
#[derive(Debug)]
pub struct Adoption {
    page_size: PageSize,
    nodes: BTreeMap<NumaNode, Part>,
}

/// One node's part of the pool.
#[derive(Clone, Copy, Debug, Default)]
struct Part {
    /// Pages that the part is meant to have.
    total: u64,
    /// Bytes of the reserve.
    reserve: u64,
    /// Pages of files.
    pages: u64,
    /// Bytes of files.
    bytes: u64,
}

impl Part {
    /// Bytes that the part has beyond those that are meant. A negative number means that it lacks
    /// some.
    fn surplus(&self, page_size: PageSize) -> i128 {
        i128::from(self.reserve + self.bytes) - i128::from(bytes_of(self.total, page_size))
    }

    /// Pages that files do not have.
    fn spare(&self) -> u64 {
        self.total.saturating_sub(self.pages)
    }
}

impl Adoption {
    /// Begins with the noted size of each node's part in pages, and the bytes of its reserve.
    pub(super) fn new(page_size: PageSize, totals: &PerNode, reserves: &[(NumaNode, u64)]) -> Self {
        let part = |(node, reserve): &(NumaNode, u64)| {
            (*node, Part { total: totals.of(*node), reserve: *reserve, ..Part::default() })
        };
        let nodes: BTreeMap<_, _> = reserves.iter().map(part).collect();
        assert!(!nodes.is_empty(), "a pool has memory of some node");
        Self { page_size, nodes }
    }

    /// Counts the pages and the memory of a file.
    pub fn add(&mut self, held: &Held) {
        for (node, pages) in held.pages.iter() {
            self.part(node).pages += pages;
        }
        for (node, bytes) in held.bytes.iter() {
            self.part(node).bytes += bytes;
        }
    }

    /// The parts that are meant to have pages.
    fn with_pages(&self) -> impl Iterator<Item = (&NumaNode, &Part)> {
        self.nodes.iter().filter(|(_, part)| part.total > 0)
    }

    fn part(&mut self, node: NumaNode) -> &mut Part {
        self.nodes.get_mut(&node).expect("the pool has memory of this node")
    }

    /// Chooses homes for pages of which no memory tells: on the nodes with the most pages that no
    /// file has. The caller then counts the file ([`Adoption::add`]).
    pub fn homes_for(&self, pages: &[Run]) -> Vec<(Run, NumaNode)> {
        let spare: Vec<_> = self.with_pages().map(|(node, part)| (*node, part.spare())).collect();
        homes_for(pages, &spare)
    }

    /// Counts a file of which only the sums are known, on the node that lacks the most memory.
    /// Returns what was counted.
    pub fn charge(&mut self, pages: u64, bytes: u64) -> Held {
        let lacking = self.with_pages().min_by_key(|(_, part)| part.surplus(self.page_size));
        let node = *lacking.expect("a pool has memory of some node").0;
        let held = Held {
            pages: PerNode::on(node, pages),
            bytes: PerNode::on(node, bytes),
            ..Held::default()
        };
        self.add(&held);
        debug_assert_eq!(held.pages.total(), pages, "each page is counted");
        debug_assert_eq!(held.bytes.total(), bytes, "each byte is counted");
        held
    }

    /// The accounts, and the bytes that each node has too many.
    ///
    /// # Errors
    /// [`Error::Corrupt`] where files have more pages than the pool.
    pub(super) fn finish(mut self) -> Result<(Accounts, PerNode)> {
        let sum = |of: fn(&Part) -> u64| self.nodes.values().map(of).sum::<u64>();
        let (pages, total) = (sum(|part| part.pages), sum(|part| part.total));
        if pages > total {
            return Err(Error::Corrupt(format!("files have {pages} of {total} pages")));
        }
        self.follow_memory();
        self.cover_files();
        assert_eq!(
            self.nodes.values().map(|part| part.total).sum::<u64>(),
            total,
            "it keeps its size"
        );
        let (page_size, mut surplus) = (self.page_size, PerNode::default());
        let mut accounts = BTreeMap::new();
        for (node, part) in self.nodes {
            let (more, bytes) = (part.surplus(page_size), page_size.bytes());
            let mut account = Account::of_free_pages(part.total, bytes);
            account.free -= part.pages;
            account.set_short(more.min(0).unsigned_abs() as u64, bytes);
            surplus.add(node, more.max(0) as u64);
            accounts.insert(node, account);
        }
        Ok((Accounts::new(accounts), surplus))
    }

    /// Whole pages that one node has too many and another lacks: their part of the pool's size goes
    /// to the node that has the memory. It does not where the nodes would lack as much then: a part
    /// that gets its first pages needs a float, too.
    fn follow_memory(&mut self) {
        loop {
            let lacking = self.lacking();
            let page_size = self.page_size;
            let surplus = |part: &Part| part.surplus(page_size);
            let pages = |bytes: i128| bytes.max(0) as u64 / page_size.bytes();
            let most = self.nodes.iter().max_by_key(|(_, part)| surplus(part));
            let least = self.nodes.iter().min_by_key(|(_, part)| surplus(part));
            let (most, least) = most.zip(least).expect("a pool has memory of some node");
            let (has, lacks) = (pages(surplus(most.1)), pages(-surplus(least.1)));
            let moved = has.min(lacks).min(least.1.total);
            if moved == 0 {
                return;
            }
            let (most, least) = (*most.0, *least.0);
            self.part(most).total += moved;
            self.part(least).total -= moved;
            if self.lacking() >= lacking {
                self.part(most).total -= moved;
                self.part(least).total += moved;
                return;
            }
        }
    }

    /// Bytes that the parts lack, all together.
    fn lacking(&self) -> u128 {
        let lacks = |part: &Part| part.surplus(self.page_size).min(0).unsigned_abs();
        self.nodes.values().map(lacks).sum()
    }

    /// Each node's part is as large as the pages that files have of it.
    fn cover_files(&mut self) {
        let lacking = |(_, part): &(&NumaNode, &Part)| part.pages > part.total;
        while let Some((node, part)) = self.nodes.iter().find(lacking) {
            let (node, lacks) = (*node, part.pages - part.total);
            let richest = self.nodes.iter().max_by_key(|(_, part)| part.spare());
            let (richest, spare) = richest.map(|(node, part)| (*node, part.spare())).expect("some");
            let moved = lacks.min(spare);
            assert!(moved > 0, "files have no more pages than the pool");
            self.part(node).total += moved;
            self.part(richest).total -= moved;
        }
    }
}

/// Chooses homes for pages of which no memory tells: on the nodes with the most `spare` pages, or
/// on the first node if there are too few.
pub(super) fn homes_for(pages: &[Run], spare: &[(NumaNode, u64)]) -> Vec<(Run, NumaNode)> {
    let first = spare.first().expect("a pool has memory of some node").0;
    choose(pages.iter().cloned(), spare, &Resolved::default())
        .unwrap_or_else(|Full| pages.iter().map(|run| (run.clone(), first)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{FOLIO_SIZE, Page};

    const PAGE: u64 = FOLIO_SIZE;
    const ZERO: NumaNode = NumaNode(0);
    const ONE: NumaNode = NumaNode(1);

    fn on(pages: [u64; 2]) -> PerNode {
        [ZERO, ONE].into_iter().zip(pages).collect()
    }

    /// Bytes of a part of `pages` pages, and its float.
    fn all(pages: u64) -> u64 {
        bytes_of(pages, PageSize::Huge)
    }

    fn adoption(totals: [u64; 2], reserves: [u64; 2]) -> Adoption {
        let reserves = [(ZERO, reserves[0]), (ONE, reserves[1])];
        Adoption::new(PageSize::Huge, &on(totals), &reserves)
    }

    fn held(pages: [u64; 2]) -> Held {
        let pages = on(pages);
        let bytes = pages.iter().map(|(node, pages)| (node, pages * PAGE)).collect();
        Held { pages, bytes, ..Held::default() }
    }

    fn free_and_short(accounts: &Accounts) -> Vec<(u64, u64, u64)> {
        accounts.iter().map(|(_, account)| (account.total, account.free, account.short)).collect()
    }

    /// Size, free pages and short bytes of each part after the adoption of files with the pages
    /// `files`. No part has bytes too many.
    fn adopted(totals: [u64; 2], reserves: [u64; 2], files: [u64; 2]) -> Vec<(u64, u64, u64)> {
        let mut adoption = adoption(totals, reserves);
        adoption.add(&held(files));
        let (accounts, surplus) = adoption.finish().unwrap();
        assert_eq!(surplus, PerNode::default());
        free_and_short(&accounts)
    }

    #[test]
    fn a_pool_in_order_keeps_its_sizes() {
        let parts = adopted([8, 4], [all(8) - 3 * PAGE, all(4) - PAGE], [3, 1]);
        assert_eq!(parts, [(8, 5, 0), (4, 3, 0)]);
    }

    #[test]
    fn memory_that_was_moving_is_short_on_its_node() {
        let parts = adopted([8, 4], [all(8) - 3 * PAGE, all(4) - 3 * PAGE], [3, 1]);
        assert_eq!(parts, [(8, 5, 0), (4, 3, 2 * PAGE)]);
    }

    #[test]
    fn memory_of_another_node_makes_that_part_larger() {
        // The kernel took three pages of node 1 for a file whose pages came from node 0.
        let parts = adopted([8, 4], [all(8) - 3 * PAGE, all(4)], [0, 3]);
        assert_eq!(parts, [(5, 5, 0), (7, 4, 0)]);
    }

    #[test]
    fn a_size_that_was_noted_without_nodes_is_divided() {
        let parts = adopted([12, 0], [all(8) - 3 * PAGE, all(4)], [3, 0]);
        assert_eq!(parts, [(8, 5, 0), (4, 4, 0)]);
    }

    /// Parts of six pages each become `after`; files have two pages of node 1. The worker has died
    /// when the sizes `noted` were noted, and the reserves had `reserves`.
    #[track_caller]
    fn assert_settled(noted: [u64; 2], reserves: [u64; 2]) {
        let mut adoption = adoption(noted, reserves);
        adoption.add(&held([0, 2]));
        let (accounts, surplus) = adoption.finish().unwrap();
        let [zero, one] = noted;
        assert_eq!(free_and_short(&accounts), [(zero, zero, 0), (one, one - 2, 0)]);
        let has =
            |node: usize, pages| reserves[node] + if node == 1 { 2 * PAGE } else { 0 } - pages;
        assert_eq!(surplus, on([has(0, all(zero)), has(1, all(one))]), "the rest is given back");
    }

    #[test]
    fn a_death_amid_a_change_of_parts_leaves_the_sizes_that_are_noted() {
        let files = 2 * PAGE;
        for after in [[2, 9], [0, 12], [9, 2], [9, 9], [2, 3]] {
            let [zero, one] = after;
            let (grown, cut) = ([all(zero.max(6)), all(one.max(6))], [all(zero), all(one)]);
            let partly = |from: u64, to: u64| from - (from - to) / 2 / PAGE * PAGE;
            assert_settled([6, 6], [all(6), all(6) - files]);
            assert_settled([6, 6], [partly(grown[0], all(6)), partly(grown[1], all(6)) - files]);
            assert_settled([6, 6], [grown[0], grown[1] - files]);
            assert_settled(after, [grown[0], grown[1] - files]);
            assert_settled(after, [partly(grown[0], cut[0]), partly(grown[1], cut[1]) - files]);
            assert_settled(after, [cut[0], cut[1] - files]);
        }
    }

    #[test]
    fn a_part_without_pages_gets_some_for_the_pages_of_files_only() {
        // Another process has caught a page of node 0, and the kernel gave one of node 1 for it.
        assert_eq!(adopted([1, 0], [2 * PAGE, 0], [0, 0]), [(1, 1, PAGE), (0, 0, 0)]);
        let mut adoption = adoption([1, 0], [2 * PAGE, 0]);
        adoption.add(&held([0, 1]));
        let (accounts, surplus) = adoption.finish().unwrap();
        assert_eq!(free_and_short(&accounts), [(0, 0, 0), (1, 0, 2 * PAGE)]);
        assert_eq!(surplus, PerNode::on(ZERO, 2 * PAGE));
    }

    #[test]
    fn a_file_of_which_only_sums_are_known_is_counted() {
        let mut adoption = adoption([8, 4], [all(8), all(4) - 3 * PAGE]);
        assert_eq!(adoption.charge(3, 3 * PAGE), held([0, 3]));
        let (accounts, _) = adoption.finish().unwrap();
        assert_eq!(free_and_short(&accounts), [(8, 8, 0), (4, 1, 0)]);
        let mut adoption = self::adoption([0, 4], [0, all(4)]);
        assert_eq!(adoption.charge(3, 0), Held { pages: on([0, 3]), ..Held::default() });
    }

    #[test]
    fn pages_without_memory_are_counted_where_pages_are_free() {
        let mut adoption = adoption([8, 4], [all(8), all(4)]);
        adoption.add(&Held { pages: on([7, 0]), ..Held::default() });
        let homes = adoption.homes_for(&[Page(3)..Page(5)]);
        assert_eq!(homes, [(Page(3)..Page(5), ONE)]);
    }

    #[test]
    fn files_with_more_pages_than_a_part_make_it_larger() {
        let mut adoption = adoption([4, 4], [all(4), all(4)]);
        adoption.add(&Held { pages: on([6, 0]), ..Held::default() });
        let (accounts, _) = adoption.finish().unwrap();
        assert_eq!(accounts.sum().total, 8);
        assert_eq!(accounts.of(ZERO).free, 0);
        let mut adoption = self::adoption([4, 4], [all(4), all(4)]);
        adoption.add(&Held { pages: on([6, 3]), ..Held::default() });
        assert!(matches!(adoption.finish(), Err(Error::Corrupt(_))));
    }
}
