//! The share of the pool's memory that each NUMA node gives; pure.

use crate::units::FOLIO_SIZE;

/// A NUMA node, before memory is taken from the machine.
#[derive(Clone, Copy, Debug)]
pub struct Node {
    /// Bytes of the node that the pool has.
    pub has: u64,
    /// Bytes that the node can give.
    pub room: u64,
}

impl Node {
    fn take(&mut self, bytes: u64) {
        self.has += bytes;
        self.room = self.room.saturating_sub(bytes);
    }
}

/// Divides `wanted` bytes, whole folios, among the nodes. `nodes` has at least one.
///
/// Each grain (a page) comes from a node with room for the grain: from the node of which the pool
/// has the least. A grain that fits into no node is divided by folios. A folio that fits into no
/// node is assigned to the node with the most room: the kernel then finds the memory, as it can
/// take back memory that is used as cache.
pub fn shares(wanted: u64, grain: u64, nodes: &[Node]) -> Vec<u64> {
    let mut after = nodes.to_vec();
    let mut left = wanted;
    while left > 0 {
        let (at, bytes) = [grain, FOLIO_SIZE]
            .into_iter()
            .filter(|bytes| *bytes <= left)
            .find_map(|bytes| Some((poorest_with(bytes, &after)?, bytes)))
            .unwrap_or_else(|| (roomiest(&after), FOLIO_SIZE.min(left)));
        after[at].take(bytes);
        left -= bytes;
    }
    after.iter().zip(nodes).map(|(after, before)| after.has - before.has).collect()
}

fn poorest_with(room: u64, nodes: &[Node]) -> Option<usize> {
    let with_room = (0..nodes.len()).filter(|at| nodes[*at].room >= room);
    with_room.min_by_key(|at| nodes[*at].has)
}

fn roomiest(nodes: &[Node]) -> usize {
    let by_room = |at: &usize| (std::cmp::Reverse(nodes[*at].room), nodes[*at].has);
    (0..nodes.len()).min_by_key(by_room).expect("there is a node with memory")
}

#[cfg(test)]
mod tests {
    use super::*;

    const F: u64 = FOLIO_SIZE;
    const GIB: u64 = 1 << 30;
    const PLENTY: u64 = 1 << 40;

    fn shares_of(wanted: u64, grain: u64, nodes: &[(u64, u64)]) -> Vec<u64> {
        let nodes: Vec<_> =
            nodes.iter().map(|(has, room)| Node { has: *has, room: *room }).collect();
        let shares = shares(wanted, grain, &nodes);
        assert_eq!(shares.iter().sum::<u64>(), wanted);
        shares
    }

    #[test]
    fn nodes_with_room_give_evenly() {
        assert_eq!(shares_of(18 * F, F, &[(0, PLENTY), (0, PLENTY)]), [9 * F, 9 * F]);
        assert_eq!(shares_of(5 * F, F, &[(0, PLENTY)]), [5 * F]);
        assert_eq!(shares_of(0, F, &[(0, PLENTY), (0, PLENTY)]), [0, 0]);
        assert_eq!(shares_of(7 * F, F, &[(0, PLENTY); 3]), [3 * F, 2 * F, 2 * F]);
    }

    #[test]
    fn a_page_comes_from_one_node_if_one_has_room() {
        let float = 16 * F;
        assert_eq!(
            shares_of(3 * GIB + float, GIB, &[(0, PLENTY), (0, PLENTY)]),
            [2 * GIB, GIB + float],
            "the rest is for the node that gives least"
        );
        assert_eq!(shares_of(2 * GIB, GIB, &[(0, GIB - F), (0, PLENTY)]), [0, 2 * GIB]);
        assert_eq!(shares_of(GIB, GIB, &[(0, GIB / 2), (0, GIB / 2)]), [GIB / 2, GIB / 2]);
    }

    #[test]
    fn a_full_node_gives_nothing_where_another_has_room() {
        assert_eq!(shares_of(80 * F, F, &[(0, 0), (0, PLENTY)]), [0, 80 * F]);
        assert_eq!(shares_of(80 * F, F, &[(0, 3 * F + 1), (0, PLENTY)]), [3 * F, 77 * F]);
        assert_eq!(shares_of(10 * F, F, &[(0, F - 1), (0, 4 * F), (0, PLENTY)]), [0, 4 * F, 6 * F]);
    }

    #[test]
    fn the_node_that_the_pool_has_least_of_gives_first() {
        assert_eq!(shares_of(6 * F, F, &[(8 * F, PLENTY), (4 * F, PLENTY)]), [F, 5 * F]);
        assert_eq!(shares_of(6 * F, F, &[(8 * F, PLENTY), (4 * F, 2 * F)]), [4 * F, 2 * F]);
    }

    #[test]
    fn what_no_node_has_room_for_is_the_roomiest_ones() {
        assert_eq!(
            shares_of(4 * F, F, &[(0, F / 2), (0, F / 4)]),
            [2 * F, 2 * F],
            "each in its turn"
        );
        assert_eq!(shares_of(4 * F, F, &[(8 * F, 0), (0, 0)]), [0, 4 * F]);
        assert_eq!(shares_of(4 * F, F, &[(0, 0), (0, 0)]), [2 * F, 2 * F]);
    }
}
