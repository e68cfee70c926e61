//! The sizes that a pool is asked to have.

use super::shares;
use crate::error::{Error, Result};
use crate::units::NumaNode;
use std::collections::BTreeMap;

/// The size of a pool in pages, and its NUMA nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sizes {
    /// So many pages, of the nodes that the pool has; of those with processors at the mount.
    Anywhere(u64),
    /// So many pages, in equal parts of these nodes, ascending.
    Even(Vec<NumaNode>, u64),
    /// The pages of each node's part; 0 for a node that the pool is to have no more.
    Parts(BTreeMap<NumaNode, u64>),
}

impl Sizes {
    /// All pages.
    pub fn pages(&self) -> u64 {
        match self {
            Self::Anywhere(pages) | Self::Even(_, pages) => *pages,
            Self::Parts(parts) => parts.values().sum(),
        }
    }

    /// The pages of each part that is named. `None` where the pool chooses them.
    pub fn parts(&self) -> Option<BTreeMap<NumaNode, u64>> {
        match self {
            Self::Anywhere(_) => None,
            Self::Even(nodes, pages) => {
                Some(nodes.iter().copied().zip(shares::even(*pages, nodes.len())).collect())
            }
            Self::Parts(parts) => Some(parts.clone()),
        }
    }
}

/// Refuses nodes of which there is no memory for the pool. `there` has those of which there is.
///
/// # Errors
/// [`Error::Invalid`].
pub(super) fn refuse_other_than(
    there: &[NumaNode],
    mut nodes: impl Iterator<Item = NumaNode>,
) -> Result<()> {
    nodes.find(|node| !there.contains(node)).map_or(Ok(()), |node| {
        Err(Error::invalid(format!(
            "NUMA node {node} has no memory for the pool; the machine, within the cpuset of the daemon, has {}",
            NumaNode::list(there)
        )))
    })
}
