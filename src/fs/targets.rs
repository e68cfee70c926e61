//! The machine's memory targets and processors by node, and the pool's bytes on each target.
//!
//! The daemon reads the machine's when they are needed for the first time, and again after a
//! resize, as more memory for the pool can be more memory of the machine. So a program that asks
//! over and over costs no more than the text.

use super::{Fs, Pace};
use crate::error::Result;
use crate::pool::Account;
use crate::sys::topology::Processors;
use crate::targets::{self, Share, Target};
use crate::units::NumaNode;
use parking_lot::RwLock;
use std::sync::Arc;

/// The facts about the machine that seldom change.
#[derive(Debug, Default)]
pub struct Topology {
    pub processors: Processors,
    /// Ascending by node.
    pub targets: Vec<Target>,
}

impl Topology {
    /// The distance from one node to another. A pair that is not known is as far as can be.
    pub fn distance(&self, from: NumaNode, to: NumaNode) -> u32 {
        let target = self.targets.iter().find(|target| target.node == to);
        target.map_or(u32::MAX, |target| target.distance(Some(from)))
    }
}

/// The topology as it was when it was last read. None if it is to be read.
#[derive(Debug, Default)]
pub struct KnownTopology(RwLock<Option<Arc<Topology>>>);

impl KnownTopology {
    /// The topology. One thread reads it, and the others wait for it.
    ///
    /// # Errors
    /// [`crate::error::Error::TakesLong`] if it is to be read, on a thread for which other requests
    /// wait; the errors of [`targets::read`].
    pub fn get(&self, pace: &Pace) -> Result<Arc<Topology>> {
        let known = pace.lock(|| self.0.read(), || self.0.try_read())?.clone();
        if let Some(known) = known {
            return Ok(known);
        }
        pace.refuse_if(|| Ok(true))?;
        let mut known = self.0.write();
        if let Some(known) = &*known {
            return Ok(known.clone());
        }
        let read = Topology { processors: Processors::read(), targets: targets::read()? };
        Ok(known.insert(Arc::new(read)).clone())
    }

    /// Has the next [`KnownTopology::get`] read the topology anew.
    pub fn forget(&self) {
        *self.0.write() = None;
    }
}

impl Fs {
    /// The text of the attribute: a line for each node that the pool has pages of.
    pub(super) fn targets_text(&self, pace: &Pace) -> Result<String> {
        let topology = self.placer.topology.get(pace)?;
        let (accounts, page) = (self.pool.balances(), self.pool.page_size().bytes());
        let line = |target: &Target| {
            let is_its = |(node, part): &(_, &Account)| *node == target.node && part.total > 0;
            let (_, account) = accounts.iter().find(is_its)?;
            let share =
                Share { bytes: account.total * page, free: account.free_for_users() * page };
            Some(targets::format(target, share) + "\n")
        };
        Ok(topology.targets.iter().filter_map(line).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::super::RequestContext;
    use super::*;
    use crate::error::Error;

    fn on_a_thread_that_serves() -> Pace {
        Pace::of(RequestContext {
            unique: 1,
            resent: false,
            user: 0,
            thread: 0,
            unprivileged: false,
            brief: true,
        })
    }

    #[test]
    fn the_topology_is_read_again_only_after_a_resize() {
        let topology = KnownTopology::default();
        let serving = on_a_thread_that_serves();
        assert!(matches!(topology.get(&serving), Err(Error::TakesLong)));
        let first = topology.get(&Pace::steady()).unwrap();
        for pace in [&serving, &Pace::steady()] {
            assert!(Arc::ptr_eq(&first, &topology.get(pace).unwrap()));
        }
        topology.forget();
        assert!(matches!(topology.get(&serving), Err(Error::TakesLong)));
        assert!(!Arc::ptr_eq(&first, &topology.get(&Pace::steady()).unwrap()));
    }
}
