//! The share of the pool's pages that each NUMA node gives; pure.

/// A NUMA node, before memory is taken from the machine.
#[derive(Clone, Copy, Debug)]
pub struct Node {
    /// Pages of the node that the pool has.
    pub has: u64,
    /// Pages that the node can give.
    pub room: u64,
}

/// Divides `wanted` pages among the nodes. `nodes` has at least one.
///
/// Each page comes from a node with room for it: from the node of which the pool has the least. A
/// page that fits into no node is assigned to the node of which the pool has the least: the kernel
/// then finds the memory, as it can take back memory that is used as cache, or memory of other
/// nodes.
pub fn shares(wanted: u64, nodes: &[Node]) -> Vec<u64> {
    let mut after = nodes.to_vec();
    for _ in 0..wanted {
        let by_need = |at: &usize| (after[*at].room == 0, after[*at].has);
        let at = (0..nodes.len()).min_by_key(by_need).expect("there is a node with memory");
        after[at].has += 1;
        after[at].room = after[at].room.saturating_sub(1);
    }
    after.iter().zip(nodes).map(|(after, before)| after.has - before.has).collect()
}

/// Divides `wanted` pages evenly among `nodes` nodes. The first ones have the remainder.
pub fn even(wanted: u64, nodes: usize) -> Vec<u64> {
    let nodes = nodes as u64;
    (0..nodes).map(|at| wanted / nodes + u64::from(at < wanted % nodes)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_parts_differ_by_one_page_at_most() {
        assert_eq!(even(9, 3), [3, 3, 3]);
        assert_eq!(even(8, 3), [3, 3, 2]);
        assert_eq!(even(1, 2), [1, 0]);
    }

    const PLENTY: u64 = 1 << 20;

    fn shares_of(wanted: u64, nodes: &[(u64, u64)]) -> Vec<u64> {
        let nodes: Vec<_> =
            nodes.iter().map(|(has, room)| Node { has: *has, room: *room }).collect();
        let shares = shares(wanted, &nodes);
        assert_eq!(shares.iter().sum::<u64>(), wanted);
        shares
    }

    #[test]
    fn nodes_with_room_give_evenly() {
        assert_eq!(shares_of(18, &[(0, PLENTY), (0, PLENTY)]), [9, 9]);
        assert_eq!(shares_of(5, &[(0, PLENTY)]), [5]);
        assert_eq!(shares_of(0, &[(0, PLENTY), (0, PLENTY)]), [0, 0]);
        assert_eq!(shares_of(7, &[(0, PLENTY); 3]), [3, 2, 2]);
    }

    #[test]
    fn a_full_node_gives_nothing_where_another_has_room() {
        assert_eq!(shares_of(80, &[(0, 0), (0, PLENTY)]), [0, 80]);
        assert_eq!(shares_of(80, &[(0, 3), (0, PLENTY)]), [3, 77]);
        assert_eq!(shares_of(10, &[(0, 0), (0, 4), (0, PLENTY)]), [0, 4, 6]);
    }

    #[test]
    fn the_node_that_the_pool_has_least_of_gives_first() {
        assert_eq!(shares_of(6, &[(8, PLENTY), (4, PLENTY)]), [1, 5]);
        assert_eq!(shares_of(6, &[(8, PLENTY), (4, 2)]), [4, 2]);
    }

    #[test]
    fn what_no_node_has_room_for_is_divided_evenly() {
        assert_eq!(shares_of(4, &[(0, 0), (0, 0)]), [2, 2]);
        assert_eq!(shares_of(4, &[(8, 0), (0, 0)]), [0, 4]);
        assert_eq!(shares_of(4, &[(0, 1), (0, 0)]), [2, 2]);
    }
}
