//! Amounts by NUMA node.

use crate::units::NumaNode;
use std::collections::BTreeMap;
use std::iter::Sum;

/// An amount (pages, or bytes) for each NUMA node. A node that is not named has 0.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PerNode(BTreeMap<NumaNode, u64>);

impl PerNode {
    /// `amount` on one node.
    pub fn on(node: NumaNode, amount: u64) -> Self {
        let mut amounts = Self::default();
        amounts.add(node, amount);
        amounts
    }

    /// The amount on `node`.
    pub fn of(&self, node: NumaNode) -> u64 {
        self.0.get(&node).copied().unwrap_or(0)
    }

    /// The sum over all nodes.
    pub fn total(&self) -> u64 {
        self.0.values().sum()
    }

    /// The nodes with an amount above 0, ascending.
    pub fn iter(&self) -> impl Iterator<Item = (NumaNode, u64)> + '_ {
        self.0.iter().map(|(node, amount)| (*node, *amount))
    }

    /// `amount` more on `node`.
    pub fn add(&mut self, node: NumaNode, amount: u64) {
        if amount > 0 {
            *self.0.entry(node).or_default() += amount;
        }
        debug_assert!(self.of(node) >= amount, "amounts are no bigger than memory is");
        debug_assert!(
            self.0.values().all(|amount| *amount > 0),
            "a node with nothing is not named"
        );
    }

    /// `amount` less on `node`.
    ///
    /// # Panics
    /// If the node has less than that.
    pub fn take(&mut self, node: NumaNode, amount: u64) {
        let left = self.of(node).checked_sub(amount).expect("no more than there is");
        if left == 0 {
            self.0.remove(&node);
        } else {
            self.0.insert(node, left);
        }
        debug_assert_eq!(self.of(node), left);
        debug_assert!(
            self.0.values().all(|amount| *amount > 0),
            "a node with nothing is not named"
        );
    }

    /// The amounts of both.
    pub fn and(mut self, other: &Self) -> Self {
        other.iter().for_each(|(node, amount)| self.add(node, amount));
        self
    }

    /// These amounts less those of `other`.
    ///
    /// # Panics
    /// If `other` has more on some node.
    pub fn less(mut self, other: &Self) -> Self {
        other.iter().for_each(|(node, amount)| self.take(node, amount));
        self
    }
}

impl FromIterator<(NumaNode, u64)> for PerNode {
    fn from_iter<I: IntoIterator<Item = (NumaNode, u64)>>(amounts: I) -> Self {
        amounts.into_iter().fold(Self::default(), |mut sum, (node, amount)| {
            sum.add(node, amount);
            sum
        })
    }
}

impl Sum for PerNode {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |sum, amounts| sum.and(&amounts))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_added_and_taken_by_node() {
        let [zero, one] = [0, 1].map(NumaNode);
        let mut amounts: PerNode = [(zero, 3), (one, 2), (zero, 1)].into_iter().collect();
        assert_eq!((amounts.of(zero), amounts.of(one), amounts.total()), (4, 2, 6));
        amounts.take(one, 2);
        assert_eq!(amounts, PerNode::on(zero, 4));
        assert_eq!(amounts.less(&PerNode::on(zero, 4)), PerNode::default());
    }

    #[test]
    #[should_panic(expected = "no more than there is")]
    fn more_than_there_is_cannot_be_taken() {
        PerNode::on(NumaNode(0), 1).take(NumaNode(1), 1);
    }
}
