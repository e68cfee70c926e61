//! What the kernel refers to: its counts of references, and which of the nodes have no name any more.

use crate::units::NodeId;
use std::collections::HashMap;
use std::os::fd::OwnedFd;

/// The kernel's references.
#[derive(Debug, Default)]
pub struct Nodes {
    known: HashMap<NodeId, Node>,
}

#[derive(Debug, Default)]
struct Node {
    /// Look-ups that were answered less those that were forgotten.
    references: u64,
    /// Its last name is gone.
    unlinked: bool,
    /// Keeps the inode of a removed directory.
    _held: Option<OwnedFd>,
}

impl Nodes {
    /// The kernel gets one more reference.
    pub fn look_up(&mut self, node: NodeId) {
        self.known.entry(node).or_default().references += 1;
    }

    /// The kernel gives up `count` references; true if a node without names has none left.
    pub fn forget(&mut self, node: NodeId, count: u64) -> bool {
        let Some(known) = self.known.get_mut(&node) else { return false };
        known.references = known.references.saturating_sub(count);
        if known.references > 0 {
            return false;
        }
        let unlinked = known.unlinked;
        self.known.remove(&node);
        unlinked
    }

    /// The last name of `node` is gone; `held` keeps its inode where nothing else does.
    pub fn mark_unlinked(&mut self, node: NodeId, held: Option<OwnedFd>) {
        let known = self.known.entry(node).or_default();
        known.unlinked = true;
        known._held = held;
    }

    /// Whether the last name of `node` is gone.
    pub fn is_unlinked(&self, node: NodeId) -> bool {
        self.known.get(&node).is_some_and(|known| known.unlinked)
    }

    /// Nodes without names.
    pub fn unlinked_count(&self) -> usize {
        self.known.values().filter(|known| known.unlinked).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_reference_to_a_node_without_names_matters() {
        let mut nodes = Nodes::default();
        let node = NodeId(77);
        nodes.look_up(node);
        nodes.look_up(node);
        assert!(!nodes.forget(node, 1));
        nodes.mark_unlinked(node, None);
        assert!(nodes.is_unlinked(node));
        assert!(nodes.forget(node, 1));
        assert!(!nodes.is_unlinked(node));
    }

    #[test]
    fn a_node_with_a_name_is_never_reclaimed() {
        let mut nodes = Nodes::default();
        nodes.look_up(NodeId(5));
        assert!(!nodes.forget(NodeId(5), 1));
    }

    #[test]
    fn references_counted_after_a_look_up_that_raced_with_forget_are_kept() {
        let mut nodes = Nodes::default();
        let node = NodeId(9);
        nodes.look_up(node);
        nodes.look_up(node); // the kernel evicted the inode and looked it up again before we saw FORGET
        nodes.mark_unlinked(node, None);
        assert!(!nodes.forget(node, 1), "the newer reference is still out");
        assert!(nodes.forget(node, 1));
    }
}
