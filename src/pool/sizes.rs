//! The sizes that a pool is asked to have.

use super::PerNode;
use crate::error::{Error, Result};
use crate::sys::numa;
use crate::units::NumaNode;

/// The size of a pool in pages, and its NUMA nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sizes {
    /// So many pages, of the nodes with processors.
    Anywhere(u64),
    /// So many pages, in equal parts of these nodes, ascending.
    Even(Vec<NumaNode>, u64),
    /// The pages of each node's part.
    Parts(PerNode),
}

impl Sizes {
    /// All pages.
    pub fn pages(&self) -> u64 {
        match self {
            Self::Anywhere(pages) | Self::Even(_, pages) => *pages,
            Self::Parts(parts) => parts.total(),
        }
    }

    /// True if the admin has chosen the nodes.
    pub fn names_nodes(&self) -> bool {
        !matches!(self, Self::Anywhere(_))
    }

    /// The nodes, ascending.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a node that has no memory, or that the cpuset of the process forbids.
    pub(super) fn nodes(&self) -> Result<Vec<NumaNode>> {
        let nodes: Vec<NumaNode> = match self {
            Self::Anywhere(_) => return numa::nodes_with_processors(),
            Self::Even(nodes, _) => nodes.clone(),
            Self::Parts(parts) => parts.iter().map(|(node, _)| node).collect(),
        };
        let there = numa::memory_nodes()?;
        match nodes.iter().find(|node| !there.contains(node)) {
            None => Ok(nodes),
            Some(node) => Err(Error::invalid(format!(
                "NUMA node {node} has no memory for the pool; the machine, within the cpuset of the daemon, has {}",
                NumaNode::list(&there)
            ))),
        }
    }
}
