//! The shelf: the ready files, and the choice of the next work on it; pure.

use super::history::{History, Wish};
use crate::placement::{Order, Resolved, choose};
use crate::pool::{PerNode, Run};
use crate::units::{InodeId, NumaNode, Page};
use std::collections::HashMap;

/// Ready files, at most.
const MOST_FILES: usize = 64;

/// Ready files on a node as long as no size is known, at most.
const MOST_GUESSES: usize = 8;

/// The memory of a ready file: the home of each page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Memory(pub Vec<(Run, NumaNode)>);

impl Memory {
    fn by_node(&self) -> PerNode {
        self.0.iter().map(|(run, node)| (*node, run.end.0 - run.start.0)).collect()
    }

    pub fn pages(&self) -> u64 {
        self.by_node().total()
    }

    /// The node whose steward tends the file: that of the first page.
    fn node(&self) -> Option<NumaNode> {
        self.0.first().map(|(_, node)| *node)
    }

    fn serves(&self, wish: &Wish) -> bool {
        self.pages() == wish.pages && wish.placement.suits(&self.0)
    }
}

/// The next work on the shelf.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Work {
    /// A file is made ready.
    Make(Wish),
    /// The pages of a file go back.
    Empty(InodeId),
    Nothing,
}

/// The ready files.
#[derive(Debug, Default)]
pub struct Shelf {
    files: HashMap<InodeId, Memory>,
    /// The files that are being made.
    unfinished: HashMap<InodeId, Memory>,
}

impl Shelf {
    /// A file is being made.
    pub fn begin(&mut self, number: InodeId, memory: Memory) {
        self.unfinished.insert(number, memory);
    }

    /// The file is no longer being made. It is ready from now on if `is_ready`.
    pub fn end(&mut self, number: InodeId, is_ready: bool) {
        let memory = self.unfinished.remove(&number);
        self.files.extend(memory.filter(|_| is_ready).map(|memory| (number, memory)));
    }

    /// The file is not on the shelf any more.
    pub fn remove(&mut self, number: InodeId) {
        self.files.remove(&number);
    }

    /// Files that are ready, or are being made.
    pub fn count(&self) -> usize {
        self.files.len() + self.unfinished.len()
    }

    /// True if a file is being made.
    pub fn is_making(&self) -> bool {
        !self.unfinished.is_empty()
    }

    /// Pages that are ready.
    pub fn pages(&self) -> u64 {
        self.files.values().map(Memory::pages).sum()
    }

    /// The ready file for a new file of about `pages` pages: the smallest that has as many, or the
    /// largest. Its memory is where `placement` asks for it.
    pub fn best(&self, pages: Option<u64>, placement: &Resolved) -> Option<InodeId> {
        let mut files: Vec<_> = self.files.iter().map(|(node, has)| (has.pages(), *node)).collect();
        files.sort_unstable();
        let enough = pages.unwrap_or(u64::MAX);
        let (small, large): (Vec<_>, Vec<_>) = files.iter().partition(|(has, _)| *has < enough);
        let by_fitness = large.into_iter().chain(small.into_iter().rev());
        let mut suitable = by_fitness.filter(|(_, node)| placement.suits(&self.files[node].0));
        suitable.next().map(|(_, node)| node)
    }

    /// Chooses the next work for the steward of `node`, if `free` has the free pages of each node
    /// besides those on the shelf. Half of all these pages of each node may be on the shelf.
    pub fn plan(&self, node: NumaNode, free: &PerNode, history: &History) -> Work {
        let plan = Plan::new(self, node, free);
        if history.is_empty() { plan.by_guess() } else { plan.by_history(history) }
    }
}

/// A plan that is being made.
struct Plan<'a> {
    node: NumaNode,
    free: &'a PerNode,
    /// Pages of the shelf by node.
    on_shelf: PerNode,
    /// Pages that may be on the shelf, by node.
    most: PerNode,
    shelf: &'a Shelf,
}

impl<'a> Plan<'a> {
    fn new(shelf: &'a Shelf, node: NumaNode, free: &'a PerNode) -> Self {
        let all = shelf.files.values().chain(shelf.unfinished.values());
        let on_shelf: PerNode = all.map(Memory::by_node).sum();
        let both = free.clone().and(&on_shelf);
        let most = both.iter().map(|(node, pages)| (node, pages / 2)).collect();
        Self { node, free, on_shelf, most, shelf }
    }

    /// No size is known: halves of what may be on the shelf.
    fn by_guess(&self) -> Work {
        let is_here = |memory: &&Memory| memory.node() == Some(self.node);
        let all = self.shelf.files.values().chain(self.shelf.unfinished.values());
        let (most, has) = (self.most.of(self.node), self.on_shelf.of(self.node));
        let half = most.saturating_sub(has) / 2;
        if has > most {
            return empty(self.shelf.files.iter(), &[self.node]);
        }
        if half == 0 || all.filter(is_here).count() >= MOST_GUESSES {
            return Work::Nothing;
        }
        let order = Order::Prefer(vec![self.node]);
        Work::Make(Wish { pages: half, placement: Resolved { order, ..Resolved::default() } })
    }

    fn by_history(&self, history: &History) -> Work {
        let mut left: HashMap<NumaNode, u64> = self.most.iter().collect();
        let mut unwanted: HashMap<InodeId, &Memory> =
            self.shelf.files.iter().map(numbered).collect();
        unwanted.extend(self.shelf.unfinished.iter().map(numbered));
        let mut missing = None;
        for wish in history.wishes().take(MOST_FILES) {
            let found = unwanted.iter().find(|(_, memory)| memory.serves(wish));
            let found = found.map(|(number, memory)| (*number, (*memory).clone()));
            let Some(memory) = found
                .as_ref()
                .map_or_else(|| choice(wish, &left), |(_, memory)| Some(memory.clone()))
            else {
                continue;
            };
            if !subtract(&mut left, &memory.by_node()) {
                continue;
            }
            match found {
                Some((number, _)) => drop(unwanted.remove(&number)),
                None if memory.node() == Some(self.node) && missing.is_none() => {
                    missing = Some((wish, memory.by_node()));
                }
                None => {}
            }
        }
        let files = || self.shelf.files.iter().filter(|(number, _)| unwanted.contains_key(number));
        match missing {
            None if self.is_over() => empty(files(), &[self.node]),
            None => Work::Nothing,
            Some((wish, pages)) => match self.full_nodes(&pages) {
                full if full.is_empty() => Work::Make(wish.clone()),
                full => empty(files(), &full),
            },
        }
    }

    fn is_over(&self) -> bool {
        self.on_shelf.of(self.node) > self.most.of(self.node)
    }

    /// The nodes that have no room for `pages` more on the shelf.
    fn full_nodes(&self, pages: &PerNode) -> Vec<NumaNode> {
        let is_full = |(node, pages): &(NumaNode, u64)| {
            *pages > self.free.of(*node) || self.on_shelf.of(*node) + pages > self.most.of(*node)
        };
        pages.iter().filter(is_full).map(|(node, _)| node).collect()
    }
}

/// The file with the most pages of `nodes` goes back.
fn empty<'a>(files: impl Iterator<Item = (&'a InodeId, &'a Memory)>, nodes: &[NumaNode]) -> Work {
    let pages_there = |memory: &Memory| -> u64 {
        let pages = memory.by_node();
        nodes.iter().map(|node| pages.of(*node)).sum()
    };
    let there = files.map(|(number, memory)| (pages_there(memory), *number));
    let largest = there.filter(|(pages, _)| *pages > 0).max_by_key(|(pages, _)| *pages);
    largest.map_or(Work::Nothing, |(_, number)| Work::Empty(number))
}

fn numbered<'a>((number, memory): (&InodeId, &'a Memory)) -> (InodeId, &'a Memory) {
    (*number, memory)
}

/// The memory for `wish`, out of the pages `left`, if they have it where it is asked for.
fn choice(wish: &Wish, left: &HashMap<NumaNode, u64>) -> Option<Memory> {
    let left: Vec<_> = left.iter().map(|(node, pages)| (*node, *pages)).collect();
    let homes = choose([Page(0)..Page(wish.pages)], &left, &wish.placement).ok()?;
    wish.placement.suits(&homes).then_some(Memory(homes))
}

/// Subtracts `pages` if there are as many.
fn subtract(left: &mut HashMap<NumaNode, u64>, pages: &PerNode) -> bool {
    let has = |(node, pages): (NumaNode, u64)| left.get(&node).is_some_and(|left| *left >= pages);
    let fits = pages.iter().all(has);
    if fits {
        pages.iter().for_each(|(node, pages)| *left.entry(node).or_default() -= pages);
    }
    fits
}

#[cfg(test)]
mod tests {
    use super::*;

    const ZERO: NumaNode = NumaNode(0);
    const ONE: NumaNode = NumaNode(1);

    fn on(node: NumaNode) -> Resolved {
        Resolved { order: Order::Prefer(vec![node]), ..Resolved::default() }
    }

    fn memory(node: NumaNode, pages: u64) -> Memory {
        Memory(vec![(Page(0)..Page(pages), node)])
    }

    /// A shelf with these files, of which the first has number 1.
    fn shelf_of(files: &[(NumaNode, u64)]) -> Shelf {
        let files = files.iter().map(|(node, pages)| memory(*node, *pages));
        Shelf { files: (1..).map(InodeId).zip(files).collect(), ..Shelf::default() }
    }

    fn shelf(files: &[u64]) -> Shelf {
        shelf_of(&files.iter().map(|pages| (ZERO, *pages)).collect::<Vec<_>>())
    }

    /// Files of one directory have taken these sizes, the latest first.
    fn history(wishes: &[(u64, Resolved)]) -> History {
        let mut history = History::default();
        for (pages, placement) in wishes.iter().rev().cloned() {
            history.learn(InodeId(1), Wish { pages, placement });
        }
        history
    }

    /// The plan of the steward of node 0. `Make` has the pages only.
    fn plan(files: &[u64], sizes: &[u64], free: u64) -> (&'static str, u64) {
        let wishes: Vec<_> = sizes.iter().map(|pages| (*pages, Resolved::default())).collect();
        told(shelf(files).plan(ZERO, &PerNode::on(ZERO, free), &history(&wishes)))
    }

    fn told(work: Work) -> (&'static str, u64) {
        match work {
            Work::Make(wish) => ("make", wish.pages),
            Work::Empty(number) => ("empty", number.0),
            Work::Nothing => ("nothing", 0),
        }
    }

    #[test]
    fn the_shelf_gets_halves_until_sizes_are_known() {
        let rows: [(&[u64], u64, (&str, u64)); 6] = [
            (&[], 100, ("make", 25)),
            (&[25], 75, ("make", 12)),
            (&[25, 12], 63, ("make", 6)),
            (&[25, 12], 61, ("make", 6)), // other files take pages: what is ready stays
            (&[], 1, ("nothing", 0)),
            (&[], 4, ("make", 1)),
        ];
        for (files, free, work) in rows {
            assert_eq!(plan(files, &[], free), work, "{files:?}, {free} free");
        }
        assert_eq!(plan(&[25, 12], &[], 20), ("empty", 1), "more than half of all is ready");
        assert_eq!(plan(&[1; 8], &[], 1000), ("nothing", 0));
    }

    #[test]
    fn the_shelf_gets_the_sizes_of_recent_files() {
        assert_eq!(plan(&[], &[16], 100), ("make", 16));
        assert_eq!(plan(&[16], &[16], 84), ("make", 16));
        assert_eq!(plan(&[16, 16, 16], &[16], 52), ("nothing", 0), "half is on the shelf");
        assert_eq!(plan(&[16], &[4, 16], 84), ("make", 4));
        assert_eq!(plan(&[], &[200], 100), ("nothing", 0), "it is larger than half");
        assert_eq!(plan(&[1; MOST_FILES], &[1], 1000), ("nothing", 0));
    }

    #[test]
    fn what_does_not_fit_makes_room() {
        assert_eq!(plan(&[25], &[50], 75), ("empty", 1));
        assert_eq!(plan(&[25], &[16], 75), ("make", 16), "there is room beside it");
        assert_eq!(plan(&[25, 16], &[16], 9), ("empty", 1), "too much is ready");
    }

    #[test]
    fn each_steward_makes_what_its_node_gives() {
        let free: PerNode = [(ZERO, 100), (ONE, 100)].into_iter().collect();
        let learnt = history(&[(16, on(ONE)), (8, on(ZERO))]);
        let shelf = shelf_of(&[(ONE, 16)]);
        assert_eq!(told(shelf.plan(ZERO, &free, &learnt)), ("make", 8));
        assert_eq!(told(shelf.plan(ONE, &free, &learnt)), ("make", 16));
        assert_eq!(told(shelf.plan(ZERO, &free, &history(&[(16, on(ONE))]))), ("nothing", 0));
        let full: PerNode = [(ZERO, 100), (ONE, 4)].into_iter().collect();
        let empty = Shelf::default();
        assert_eq!(told(empty.plan(ONE, &full, &learnt)), ("nothing", 0), "not on another node");
        let guess = empty.plan(ONE, &free, &History::default());
        assert_eq!(guess, Work::Make(Wish { pages: 25, placement: on(ONE) }));
    }

    #[test]
    fn memory_of_several_nodes_is_ready_as_it_is_asked_for() {
        let free: PerNode = [(ZERO, 100), (ONE, 100)].into_iter().collect();
        let turns = Order::Interleave(vec![(ZERO, 1), (ONE, 1)]);
        let placement = Resolved { order: turns, ..Resolved::default() };
        let learnt = history(&[(2, placement.clone())]);
        let mut shelf = shelf_of(&[(ZERO, 2)]);
        assert_eq!(told(shelf.plan(ZERO, &free, &learnt)), ("make", 2));
        assert_eq!(told(shelf.plan(ONE, &free, &learnt)), ("nothing", 0), "the first page is not");
        assert_eq!(shelf.best(Some(2), &placement), None);
        let full = shelf_of(&[(ONE, 30), (ONE, 25)]);
        let free: PerNode = [(ZERO, 100), (ONE, 55)].into_iter().collect();
        assert_eq!(told(full.plan(ZERO, &free, &learnt)), ("empty", 1), "the other node has room");
        let homes = vec![(Page(0)..Page(1), ZERO), (Page(1)..Page(2), ONE)];
        shelf.begin(InodeId(9), Memory(homes));
        assert_eq!(shelf.best(Some(2), &placement), None, "it is being made");
        shelf.end(InodeId(9), true);
        assert_eq!(shelf.best(Some(2), &placement), Some(InodeId(9)));
    }

    #[test]
    fn a_new_file_gets_about_the_size_that_is_guessed() {
        let best = |files: &[u64], pages| shelf(files).best(pages, &Resolved::default());
        assert_eq!(best(&[], Some(16)), None);
        assert_eq!(best(&[25, 16, 12], Some(16)), Some(InodeId(2)));
        assert_eq!(best(&[25, 12], Some(16)), Some(InodeId(1)));
        assert_eq!(best(&[8, 12], Some(16)), Some(InodeId(2)), "the largest");
        assert_eq!(best(&[8, 12], None), Some(InodeId(2)));
        let nodes = shelf_of(&[(ZERO, 25), (ONE, 12)]);
        assert_eq!(nodes.best(None, &on(ONE)), Some(InodeId(2)));
        assert_eq!(nodes.best(None, &on(NumaNode(2))), None);
    }
}
