//! From the words of a placement to the nodes that the pages of a growth want.

use super::{Caller, Nodes, Order, Placement, Quality, Resolved, Wish};
use crate::units::NumaNode;

/// The facts about the machine that the words refer to.
#[derive(Clone, Copy)]
pub struct Machine<'a> {
    /// The nodes of the pool, ascending.
    pub nodes: &'a [NumaNode],
    /// The distance from a processor's node to a node of memory, in the kernel's units (10 is the
    /// least).
    pub distance: &'a dyn Fn(NumaNode, NumaNode) -> u32,
    /// The machine's weight of a node (weighted interleaving).
    pub weight: &'a dyn Fn(NumaNode) -> u32,
    /// The nodes by a quality, the best first, for a processor of a node if that is known.
    pub best: &'a dyn Fn(Quality, Option<NumaNode>) -> Vec<NumaNode>,
}

impl Placement {
    /// The nodes that the pages of a growth want, if `caller` makes the file grow. The cpuset of
    /// the caller counts only where the placement is the caller's: else it is the file's owner who
    /// names the nodes. A caller that is not known has no wish.
    pub fn resolve(&self, caller: Option<&Caller>, machine: Machine<'_>) -> Resolved {
        let (wish, allowed) = match (&self.wish, caller) {
            (Wish::Caller, None) => (&Wish::Caller, None),
            (Wish::Caller, Some(caller)) => (&caller.wish, caller.allowed.clone()),
            (wish, _) => (wish, None),
        };
        let view = View { machine, near: caller.and_then(|caller| caller.near), allowed };
        view.resolve(wish, self.strict)
    }
}

/// The machine as a caller sees it.
struct View<'a> {
    machine: Machine<'a>,
    near: Option<NumaNode>,
    allowed: Option<Vec<NumaNode>>,
}

impl View<'_> {
    fn resolve(self, wish: &Wish, strict: bool) -> Resolved {
        let (order, next) = match wish {
            Wish::Caller => (Order::Even, Vec::new()),
            Wish::Local => self.local(),
            Wish::Bind(nodes) | Wish::Preferred(nodes) => self.nearest(nodes),
            Wish::Interleave(nodes) => self.in_turn(nodes, |_| 1),
            Wish::WeightedInterleave(nodes, weights) => self.in_turn(nodes, |node| {
                weights.get(&node).copied().unwrap_or_else(|| (self.machine.weight)(node)).max(1)
            }),
            Wish::Best(quality) => self.first((self.machine.best)(*quality, self.near)),
        };
        Resolved { order, next, strict, allowed: self.allowed }
    }

    /// The nodes of the pool among `nodes` that the caller may use.
    fn usable<'a>(&'a self, nodes: &'a [NumaNode]) -> impl Iterator<Item = NumaNode> + 'a {
        let may = |node: &NumaNode| self.allowed.as_ref().is_none_or(|nodes| nodes.contains(node));
        let in_pool = |node: &NumaNode| self.machine.nodes.contains(node);
        nodes.iter().copied().filter(move |node| in_pool(node) && may(node))
    }

    fn set(&self, nodes: &Nodes) -> Vec<NumaNode> {
        match nodes {
            Nodes::All => self.usable(self.machine.nodes).collect(),
            Nodes::Listed(nodes) => self.usable(nodes).collect(),
        }
    }

    /// Sorts by the distance from a node, then by number.
    fn by_distance(&self, from: NumaNode, mut nodes: Vec<NumaNode>) -> Vec<NumaNode> {
        nodes.sort_by_key(|node| ((self.machine.distance)(from, *node), *node));
        nodes
    }

    fn local(&self) -> (Order, Vec<NumaNode>) {
        let Some(near) = self.near else { return (Order::Even, Vec::new()) };
        let nodes = self.usable(self.machine.nodes).collect();
        self.first(self.by_distance(near, nodes))
    }

    /// The first of `nodes`, and then the others.
    fn first(&self, nodes: Vec<NumaNode>) -> (Order, Vec<NumaNode>) {
        let mut nodes = self.usable(&nodes);
        (Order::Prefer(nodes.next().into_iter().collect()), nodes.collect())
    }

    /// The nodes of a set, those near the caller first, and then those near the set.
    fn nearest(&self, nodes: &Nodes) -> (Order, Vec<NumaNode>) {
        let mut wished = self.set(nodes);
        if let Some(near) = self.near {
            wished = self.by_distance(near, wished);
        }
        let first = wished.first().or_else(|| nodes.listed().first());
        let others: Vec<NumaNode> =
            self.usable(self.machine.nodes).filter(|node| !wished.contains(node)).collect();
        let next = first.map_or_else(Vec::new, |first| self.by_distance(*first, others));
        (Order::Prefer(wished), next)
    }

    fn in_turn(&self, nodes: &Nodes, weight: impl Fn(NumaNode) -> u32) -> (Order, Vec<NumaNode>) {
        let turns: Vec<_> = self.set(nodes).into_iter().map(|node| (node, weight(node))).collect();
        match turns.is_empty() {
            true => self.nearest(nodes), // no node of the set is there
            false => (Order::Interleave(turns), Vec::new()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nodes(numbers: &[u32]) -> Vec<NumaNode> {
        numbers.iter().copied().map(NumaNode).collect()
    }

    /// A machine of two sockets with two nodes each: 0 and 1, 2 and 3.
    fn resolved(text: &str, caller: Option<&Caller>) -> Resolved {
        let pool = nodes(&[0, 1, 2, 3]);
        let machine = Machine {
            nodes: &pool,
            distance: &|from, to| match (from == to, from.0 / 2 == to.0 / 2) {
                (true, _) => 10,
                (false, true) => 12,
                (false, false) => 21,
            },
            weight: &|node| node.0 + 1,
            best: &|quality, _| match quality {
                Quality::Capacity => nodes(&[3, 2, 1, 0]),
                Quality::Latency | Quality::Bandwidth => nodes(&[1, 0, 2, 3, 9]),
            },
        };
        Placement::parse(text.as_bytes()).unwrap().resolve(caller, machine)
    }

    fn near(node: u32) -> Caller {
        Caller { wish: Wish::Local, near: Some(NumaNode(node)), allowed: None }
    }

    fn prefer(wished: &[u32], next: &[u32]) -> (Order, Vec<NumaNode>) {
        (Order::Prefer(nodes(wished)), nodes(next))
    }

    fn in_turn(turns: &[(u32, u32)]) -> (Order, Vec<NumaNode>) {
        let turns = turns.iter().map(|(node, weight)| (NumaNode(*node), *weight));
        (Order::Interleave(turns.collect()), Vec::new())
    }

    #[test]
    fn each_word_has_its_order() {
        let rows = [
            ("caller", prefer(&[2], &[3, 0, 1])),
            ("local", prefer(&[2], &[3, 0, 1])),
            ("bind:0-1", prefer(&[0, 1], &[2, 3])),
            ("bind:0,2-3", prefer(&[2, 3, 0], &[1])),
            ("bind:all", prefer(&[2, 3, 0, 1], &[])),
            ("preferred:1", prefer(&[1], &[0, 2, 3])),
            ("interleave:0,3", in_turn(&[(0, 1), (3, 1)])),
            ("interleave:all", in_turn(&[(0, 1), (1, 1), (2, 1), (3, 1)])),
            ("weighted-interleave:0*7,1", in_turn(&[(0, 7), (1, 2)])),
            ("weighted-interleave:all", in_turn(&[(0, 1), (1, 2), (2, 3), (3, 4)])),
            ("best:Capacity", prefer(&[3], &[2, 1, 0])),
            ("best:Latency", prefer(&[1], &[0, 2, 3])),
        ];
        for (text, (order, next)) in rows {
            let expected = Resolved { order, next, strict: false, allowed: None };
            assert_eq!(resolved(text, Some(&near(2))), expected, "{text}");
            let strict = Resolved { strict: true, ..expected };
            assert_eq!(resolved(&format!("strict:{text}"), Some(&near(2))), strict, "{text}");
        }
    }

    #[test]
    fn a_caller_that_is_not_known_has_no_wish() {
        for text in ["caller", "local"] {
            assert_eq!(resolved(text, None), Resolved::default(), "{text}");
        }
        let far = Caller { wish: Wish::Local, near: None, allowed: None };
        assert_eq!(resolved("caller", Some(&far)), Resolved::default());
        let bound = resolved("bind:0,3", None);
        assert_eq!((bound.order, bound.next), prefer(&[0, 3], &[1, 2]), "by number");
    }

    #[test]
    fn a_callers_policy_is_the_placement() {
        let wish = |nodes: &[u32]| Nodes::Listed(nodes.iter().copied().map(NumaNode).collect());
        let rows = [
            (Wish::Bind(wish(&[1, 3])), prefer(&[3, 1], &[2, 0])),
            (Wish::Preferred(wish(&[0])), prefer(&[0], &[1, 2, 3])),
            (Wish::Interleave(wish(&[1, 2])), in_turn(&[(1, 1), (2, 1)])),
            (Wish::Interleave(wish(&[8])), prefer(&[], &[0, 1, 2, 3])),
        ];
        for (wish, (order, next)) in rows {
            let caller = Caller { wish, ..near(2) };
            let found = resolved("caller", Some(&caller));
            assert_eq!((found.order, found.next), (order, next), "{caller:?}");
        }
    }

    #[test]
    fn the_cpuset_of_the_caller_bounds_its_own_policy_only() {
        let caged = Caller { allowed: Some(nodes(&[0, 1])), ..near(2) };
        let own = resolved("caller", Some(&caged));
        assert_eq!((own.order, own.next), prefer(&[0], &[1]));
        assert_eq!(own.allowed, Some(nodes(&[0, 1])));
        let owners = resolved("local", Some(&caged));
        assert_eq!((owners.order, owners.next), prefer(&[2], &[3, 0, 1]));
        assert_eq!(owners.allowed, None);
    }
}
