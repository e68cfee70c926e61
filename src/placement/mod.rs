//! The NUMA nodes from which a file's pages come: the words of a placement, and the choice of a
//! node for each page; pure.
//!
//! ```text
//!   "bind:0-1" --parse()--> Placement --resolve()--> Resolved --choose()--> a node for each page
//!                                        ^ the calling thread, the machine    ^ free pages
//! ```
//!
//! `words` has the grammar, `caller` reads the policy of a thread, `resolve` turns words into an
//! order of nodes, `choice` chooses.

mod caller;
mod choice;
mod resolve;
mod words;

pub use caller::{Caller, POLICY_BYTES, parse_allowed, parse_policy, parse_processor};
pub use choice::{Full, choose};
pub use resolve::Machine;
pub use words::{Nodes, Placement, Quality, Weights, Wish};

use crate::units::{NumaNode, Page};
use std::ops::Range;

/// The nodes that a page wants.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// The allowed node with the most free pages.
    #[default]
    Even,
    /// The first of these nodes that has a free page.
    Prefer(Vec<NumaNode>),
    /// Nodes take turns by the index of the page in the file, each for as many pages as its weight.
    /// So a file that grows in pieces has the same layout as one that grows at once. There is at
    /// least one node, and no weight is 0.
    Interleave(Vec<(NumaNode, u32)>),
}

/// A placement for one growth of one file: the input of [`choose`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resolved {
    /// The nodes that are asked for.
    pub order: Order,
    /// The nodes that give where those of the order are full, in this order. Other nodes follow.
    pub next: Vec<NumaNode>,
    /// No other nodes than those of the order.
    pub strict: bool,
    /// The nodes that the caller's cpuset allows; all where there is none. Other nodes give last.
    pub allowed: Option<Vec<NumaNode>>,
}

impl Resolved {
    /// True if the caller may use `node`.
    pub fn allows(&self, node: NumaNode) -> bool {
        self.allowed.as_ref().is_none_or(|allowed| allowed.contains(&node))
    }

    /// The nodes that are asked for.
    pub fn nodes(&self) -> Vec<NumaNode> {
        match &self.order {
            Order::Even => self.allowed.clone().unwrap_or_default(),
            Order::Prefer(nodes) => nodes.clone(),
            Order::Interleave(turns) => turns.iter().map(|(node, _)| *node).collect(),
        }
    }

    /// True if each page of these runs is on a node that it asks for.
    pub fn suits(&self, homes: &[(Range<Page>, NumaNode)]) -> bool {
        homes.iter().all(|(run, node)| match &self.order {
            Order::Even | Order::Prefer(_) => self.wishes(run.start, *node),
            Order::Interleave(_) => {
                (run.start.0..run.end.0).all(|page| self.wishes(Page(page), *node))
            }
        })
    }

    /// True if `page` is as asked for on `node`.
    pub fn wishes(&self, page: Page, node: NumaNode) -> bool {
        match &self.order {
            Order::Even => self.allows(node),
            Order::Prefer(nodes) => nodes.contains(&node),
            Order::Interleave(turns) => choice::turn_of(page.0, turns).0 == node,
        }
    }
}
