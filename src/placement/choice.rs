//! The choice of a NUMA node for each page; pure.
//!
//! The cost is that of the nodes for each run of pages, not for each page. Interleaved pages have a
//! run for each turn of a node.

use super::{Order, Resolved};
use crate::units::{NumaNode, Page};
use std::cmp::Reverse;
use std::ops::Range;

/// The nodes that a placement allows have too few free pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// Chooses a node for each of `pages`. `free` has the free pages of each node once. The runs of
/// the answer have the order of `pages`, and neighbours are on different nodes.
///
/// Each page goes to the first of these nodes that has a free page:
///
/// 1. the nodes of the order ([`Order`]);
/// 2. unless the placement is strict: the other nodes among which the order interleaves, the one
///    with the most free pages first;
/// 3. the nodes of [`Resolved::next`], in order;
/// 4. the allowed nodes, then all others, the one with the most free pages first.
///
/// Of nodes with as many free pages, the one with the lowest number is first. If several nodes give
/// pages of a run in this way, each gives its pages in one piece.
///
/// # Errors
/// [`Full`] if a page has no node. Then no page is chosen.
pub fn choose(
    pages: impl IntoIterator<Item = Range<Page>>,
    free: &[(NumaNode, u64)],
    placement: &Resolved,
) -> Result<Vec<(Range<Page>, NumaNode)>, Full> {
    let mut choice = Choice { free: free.to_vec(), chosen: Vec::new() };
    choice.free.sort_unstable_by_key(|(node, _)| *node);
    for run in pages {
        for turn in turns(run, &placement.order) {
            choice.place(turn, placement)?;
        }
    }
    Ok(choice.chosen)
}

/// The pieces of `run` whose pages want the same nodes.
fn turns(run: Range<Page>, order: &Order) -> impl Iterator<Item = Range<Page>> + '_ {
    let (mut at, end) = (run.start.0, run.end.0);
    std::iter::from_fn(move || {
        let start = at;
        at = match order {
            Order::Even | Order::Prefer(_) => end,
            Order::Interleave(turns) => end.min(start + turn_of(start, turns).1),
        };
        (start < end).then_some(Page(start)..Page(at))
    })
}

/// The node whose turn it is at the page of this index, and the number of pages from there on to
/// the end of the turn.
pub(super) fn turn_of(page: u64, turns: &[(NumaNode, u32)]) -> (NumaNode, u64) {
    let round: u64 = turns.iter().map(|(_, weight)| u64::from(*weight)).sum();
    assert!(round > 0, "an order without nodes: {turns:?}");
    let mut behind = page % round;
    for (node, weight) in turns {
        match u64::from(*weight) {
            weight if behind < weight => return (*node, weight - behind),
            weight => behind -= weight,
        }
    }
    unreachable!("the weights add up to the round")
}

/// A choice under way.
struct Choice {
    /// The free pages that are left, by the node's number.
    free: Vec<(NumaNode, u64)>,
    chosen: Vec<(Range<Page>, NumaNode)>,
}

impl Choice {
    /// Places a run whose pages want the same nodes.
    fn place(&mut self, mut run: Range<Page>, placement: &Resolved) -> Result<(), Full> {
        match &placement.order {
            Order::Even => self.take_evenly(&mut run, |node| placement.allows(node)),
            Order::Prefer(nodes) => self.take_in_order(&mut run, nodes),
            Order::Interleave(turns) => {
                let (node, _) = turn_of(run.start.0, turns);
                self.take(&mut run, node);
            }
        }
        if !placement.strict {
            self.fall_back(&mut run, placement);
        }
        if run.is_empty() { Ok(()) } else { Err(Full) }
    }

    fn fall_back(&mut self, run: &mut Range<Page>, placement: &Resolved) {
        if let Order::Interleave(turns) = &placement.order {
            self.take_evenly(run, |node| turns.iter().any(|(turn, _)| *turn == node));
        }
        self.take_in_order(run, &placement.next);
        self.take_evenly(run, |node| placement.allows(node));
        self.take_evenly(run, |_| true);
    }

    /// Takes as many pages of `run` as `node` has, from the start of the run.
    fn take(&mut self, run: &mut Range<Page>, node: NumaNode) {
        if let Ok(at) = self.free.binary_search_by_key(&node, |(node, _)| *node) {
            self.take_some(run, at, u64::MAX);
        }
    }

    fn take_in_order(&mut self, run: &mut Range<Page>, nodes: &[NumaNode]) {
        nodes.iter().for_each(|node| self.take(run, *node));
    }

    /// Takes pages so that the nodes keep as even a number of free pages as can be: as if each page
    /// came from the node that has the most of them by then.
    fn take_evenly(&mut self, run: &mut Range<Page>, may_give: impl Fn(NumaNode) -> bool) {
        if run.is_empty() {
            return;
        }
        let giving = self.free.iter().map(|(node, free)| if may_give(*node) { *free } else { 0 });
        let mut shares: Vec<(usize, u64)> =
            even_shares(length(run), &giving.collect::<Vec<_>>()).into_iter().enumerate().collect();
        shares.sort_by_key(|(at, _)| Reverse(self.free[*at].1));
        shares.into_iter().for_each(|(at, share)| self.take_some(run, at, share));
    }

    fn take_some(&mut self, run: &mut Range<Page>, at: usize, most: u64) {
        let (node, free) = &mut self.free[at];
        let taken = length(run).min(*free).min(most);
        if taken == 0 {
            return;
        }
        *free -= taken;
        let piece = run.start..Page(run.start.0 + taken);
        run.start = piece.end;
        match self.chosen.last_mut() {
            Some((last, on)) if *on == *node && last.end == piece.start => last.end = piece.end,
            _ => self.chosen.push((piece, *node)),
        }
    }
}

fn length(run: &Range<Page>) -> u64 {
    run.end.0.saturating_sub(run.start.0)
}

/// The pages that each node gives if each of `wanted` pages comes from the node with the most free
/// pages by then, the first of equals. They are fewer than `wanted` if there are not as many.
fn even_shares(wanted: u64, free: &[u64]) -> Vec<u64> {
    let above = |level: u64| free.iter().map(|free| free.saturating_sub(level)).sum::<u64>();
    let wanted = wanted.min(above(0));
    let (mut low, mut high) = (0, free.iter().copied().max().unwrap_or(0));
    // The lowest level above which the nodes have fewer than `wanted` pages, or just as many.
    while low < high {
        let middle = low + (high - low) / 2;
        if above(middle) <= wanted { high = middle } else { low = middle + 1 }
    }
    let mut rest = wanted - above(low);
    let share = |free: &u64| {
        let one_more = u64::from(rest > 0 && low > 0 && *free >= low);
        rest -= one_more;
        free.saturating_sub(low) + one_more
    };
    free.iter().map(share).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn nodes(numbers: &[u32]) -> Vec<NumaNode> {
        numbers.iter().copied().map(NumaNode).collect()
    }

    fn with_free(free: &[u64]) -> Vec<(NumaNode, u64)> {
        (0..).map(NumaNode).zip(free.iter().copied()).collect()
    }

    fn placement(order: Order) -> Resolved {
        Resolved { order, ..Resolved::default() }
    }

    fn strict(order: Order) -> Resolved {
        Resolved { order, strict: true, ..Resolved::default() }
    }

    fn prefer(numbers: &[u32]) -> Order {
        Order::Prefer(nodes(numbers))
    }

    fn interleave(turns: &[(u32, u32)]) -> Order {
        Order::Interleave(turns.iter().map(|(node, weight)| (NumaNode(*node), *weight)).collect())
    }

    /// The chosen runs as `(first page, number of pages, node)`.
    fn chosen(
        pages: Range<u64>,
        free: &[u64],
        placement: &Resolved,
    ) -> Result<Vec<(u64, u64, u32)>, Full> {
        let run = Page(pages.start)..Page(pages.end);
        let row = |(run, node): (Range<Page>, NumaNode)| (run.start.0, length(&run), node.0);
        let runs = choose([run], &with_free(free), placement)?;
        Ok(runs.into_iter().map(row).collect())
    }

    #[test]
    fn even_takes_from_the_node_with_the_most_free_pages() {
        let even = placement(Order::Even);
        assert_eq!(chosen(0..1, &[5, 6], &even), Ok(vec![(0, 1, 1)]));
        assert_eq!(chosen(7..8, &[6, 6], &even), Ok(vec![(7, 1, 0)]), "the first of equals");
        assert_eq!(chosen(0..6, &[8, 10], &even), Ok(vec![(0, 4, 1), (4, 2, 0)]));
        assert_eq!(chosen(0..5, &[8, 10], &even), Ok(vec![(0, 3, 1), (3, 2, 0)]));
        assert_eq!(chosen(0..4, &[2, 2], &even), Ok(vec![(0, 2, 0), (2, 2, 1)]));
        assert_eq!(chosen(0..5, &[2, 2], &even), Err(Full));
        assert_eq!(chosen(3..3, &[0, 0], &even), Ok(vec![]));
        assert_eq!(chosen(0..1, &[], &even), Err(Full));
    }

    #[test]
    fn preferred_nodes_give_in_their_order() {
        let both = placement(prefer(&[1, 0]));
        assert_eq!(chosen(0..3, &[4, 4, 4], &both), Ok(vec![(0, 3, 1)]));
        assert_eq!(chosen(0..6, &[4, 4, 4], &both), Ok(vec![(0, 4, 1), (4, 2, 0)]));
        assert_eq!(chosen(0..9, &[4, 4, 4], &both), Ok(vec![(0, 4, 1), (4, 4, 0), (8, 1, 2)]));
        assert_eq!(chosen(0..2, &[4, 0, 1], &placement(prefer(&[7]))), Ok(vec![(0, 2, 0)]));
    }

    #[test]
    fn a_strict_placement_fails_where_its_nodes_are_full() {
        assert_eq!(chosen(0..4, &[9, 4], &strict(prefer(&[1]))), Ok(vec![(0, 4, 1)]));
        assert_eq!(chosen(0..5, &[9, 4], &strict(prefer(&[1]))), Err(Full));
        assert_eq!(chosen(0..1, &[9, 4], &strict(prefer(&[]))), Err(Full));
        assert_eq!(chosen(0..4, &[9, 1], &strict(interleave(&[(0, 1), (1, 1)]))), Err(Full));
        assert_eq!(chosen(0..13, &[9, 4], &strict(Order::Even)).map(|runs| runs.len()), Ok(2));
    }

    #[test]
    fn pages_are_interleaved_by_their_index() {
        let turns = placement(interleave(&[(0, 1), (1, 1)]));
        assert_eq!(chosen(0..3, &[9, 9], &turns), Ok(vec![(0, 1, 0), (1, 1, 1), (2, 1, 0)]));
        assert_eq!(chosen(3..5, &[9, 9], &turns), Ok(vec![(3, 1, 1), (4, 1, 0)]));
        let weighted = placement(interleave(&[(0, 3), (1, 1)]));
        assert_eq!(
            chosen(1..9, &[9, 9], &weighted),
            Ok(vec![(1, 2, 0), (3, 1, 1), (4, 3, 0), (7, 1, 1), (8, 1, 0)])
        );
        assert_eq!(chosen(0..100, &[99, 99], &placement(interleave(&[(1, 1)]))).unwrap().len(), 2);
    }

    #[test]
    fn the_turn_of_a_full_node_goes_to_another_of_the_set_first() {
        let turns = placement(interleave(&[(0, 1), (1, 1)]));
        assert_eq!(chosen(0..4, &[1, 5, 9], &turns), Ok(vec![(0, 1, 0), (1, 3, 1)]));
        assert_eq!(chosen(0..3, &[0, 1, 9], &turns), Ok(vec![(0, 1, 1), (1, 2, 2)]));
    }

    #[test]
    fn other_nodes_give_in_the_order_of_their_nearness() {
        let near = Resolved { next: nodes(&[2, 1]), ..placement(prefer(&[0])) };
        assert_eq!(chosen(0..3, &[1, 9, 1], &near), Ok(vec![(0, 1, 0), (1, 1, 2), (2, 1, 1)]));
    }

    #[test]
    fn nodes_that_the_caller_may_not_use_give_last() {
        let caged = Resolved { allowed: Some(nodes(&[0, 1])), ..placement(prefer(&[1])) };
        assert_eq!(chosen(0..2, &[4, 1, 9], &caged), Ok(vec![(0, 1, 1), (1, 1, 0)]));
        assert_eq!(chosen(0..6, &[4, 1, 9], &caged).unwrap().last(), Some(&(5, 1, 2)));
        let even = Resolved { allowed: Some(nodes(&[0])), ..strict(Order::Even) };
        assert_eq!(chosen(0..4, &[4, 9], &even), Ok(vec![(0, 4, 0)]));
        assert_eq!(chosen(0..5, &[4, 9], &even), Err(Full));
    }

    #[test]
    fn a_long_request_has_as_many_runs_as_nodes_give() {
        let (many, free) = (500_000, [400_000, 300_000]);
        for order in [Order::Even, prefer(&[1])] {
            assert_eq!(chosen(0..many, &free, &placement(order)).unwrap().len(), 2);
        }
    }

    #[test]
    fn runs_of_one_node_are_joined_across_requested_runs() {
        let runs = [Page(0)..Page(2), Page(2)..Page(3), Page(5)..Page(6)];
        let chosen = choose(runs, &with_free(&[9]), &placement(Order::Even)).unwrap();
        let node = NumaNode(0);
        assert_eq!(chosen, [(Page(0)..Page(3), node), (Page(5)..Page(6), node)]);
    }

    // ---- against a model that chooses page by page --------------------------------------------

    /// The node with the most free pages, the first of equals.
    fn richest(free: &[u64], may: impl Fn(NumaNode) -> bool) -> Option<usize> {
        let giving = (0..free.len()).filter(|at| free[*at] > 0 && may(NumaNode(*at as u32)));
        giving.min_by_key(|at| (Reverse(free[*at]), *at))
    }

    fn first(free: &[u64], nodes: &[NumaNode]) -> Option<usize> {
        nodes.iter().map(|node| node.0 as usize).find(|at| free.get(*at).is_some_and(|n| *n > 0))
    }

    fn model(page: u64, free: &[u64], placement: &Resolved) -> Option<usize> {
        let wished = match &placement.order {
            Order::Even => richest(free, |node| placement.allows(node)),
            Order::Prefer(nodes) => first(free, nodes),
            Order::Interleave(turns) => {
                let pages =
                    turns.iter().flat_map(|(node, n)| std::iter::repeat_n(*node, *n as usize));
                let round: Vec<NumaNode> = pages.collect();
                first(free, &[round[page as usize % round.len()]])
            }
        };
        let in_set = |node: NumaNode| match &placement.order {
            Order::Interleave(turns) => turns.iter().any(|(turn, _)| *turn == node),
            _ => false,
        };
        if placement.strict {
            return wished;
        }
        wished
            .or_else(|| richest(free, in_set))
            .or_else(|| first(free, &placement.next))
            .or_else(|| richest(free, |node| placement.allows(node)))
            .or_else(|| richest(free, |_| true))
    }

    fn any_nodes(least: usize) -> impl Strategy<Value = Vec<NumaNode>> {
        let numbers = prop::sample::subsequence((0..5).collect::<Vec<u32>>(), least..=5);
        numbers.prop_shuffle().prop_map(|numbers| nodes(&numbers))
    }

    fn any_placement() -> impl Strategy<Value = Resolved> {
        let turns = any_nodes(1).prop_flat_map(|nodes| {
            prop::collection::vec(1..4_u32, nodes.len())
                .prop_map(move |weights| nodes.iter().copied().zip(weights).collect())
        });
        let order = prop_oneof![
            Just(Order::Even),
            any_nodes(0).prop_map(Order::Prefer),
            turns.prop_map(Order::Interleave),
        ];
        (order, any_nodes(0), any::<bool>(), prop::option::of(any_nodes(0)))
            .prop_map(|(order, next, strict, allowed)| Resolved { order, next, strict, allowed })
    }

    proptest! {
        #[test]
        fn a_choice_is_that_of_a_model_page_by_page(
            free in prop::collection::vec(0..9_u64, 1..5),
            gaps in prop::collection::vec((0..4_u64, 1..7_u64), 0..5),
            placement in any_placement(),
        ) {
            let mut at = 0;
            let runs: Vec<Range<Page>> = gaps.iter().map(|(gap, length)| {
                let start = at + gap;
                at = start + length;
                Page(start)..Page(at)
            }).collect();
            let pages: Vec<u64> = runs.iter().flat_map(|run| run.start.0..run.end.0).collect();
            let mut left = free.clone();
            let expected: Option<Vec<u32>> = pages.iter().map(|page| {
                let at = model(*page, &left, &placement)?;
                left[at] -= 1;
                Some(at as u32)
            }).collect();
            let choice = choose(runs, &with_free(&free), &placement);
            prop_assert_eq!(choice.is_ok(), expected.is_some());
            let (Ok(choice), Some(expected)) = (choice, expected) else { return Ok(()) };
            let covered: Vec<u64> =
                choice.iter().flat_map(|(run, _)| run.start.0..run.end.0).collect();
            prop_assert_eq!(&covered, &pages, "each page once, in order");
            let on = |node: u32| expected.iter().filter(|on| **on == node).count() as u64;
            for node in 0..free.len() as u32 {
                let given = choice.iter().filter(|(_, on)| on.0 == node);
                prop_assert_eq!(given.map(|(run, _)| length(run)).sum::<u64>(), on(node));
            }
            if let Order::Prefer(_) = placement.order && placement.strict {
                let in_order = choice.iter().flat_map(|(run, node)| {
                    std::iter::repeat_n(node.0, length(run) as usize)
                });
                prop_assert_eq!(in_order.collect::<Vec<_>>(), expected);
            }
        }

        #[test]
        fn a_file_that_grows_in_pieces_is_interleaved_as_one(
            weights in prop::collection::vec(1..4_u32, 1..4),
            pieces in prop::collection::vec(1..9_u64, 1..9),
        ) {
            let turns: Vec<(u32, u32)> = (0..).zip(weights).collect();
            let (placement, plenty) = (placement(interleave(&turns)), [1000; 4]);
            let by_page = |pages: Range<u64>| -> Vec<u32> {
                let runs = chosen(pages, &plenty, &placement).unwrap();
                runs.iter().flat_map(|(_, n, node)| std::iter::repeat_n(*node, *n as usize)).collect()
            };
            let mut at = 0;
            let in_pieces: Vec<u32> = pieces.iter().flat_map(|length| {
                at += length;
                by_page(at - length..at)
            }).collect();
            prop_assert_eq!(in_pieces, by_page(0..at));
        }
    }
}
