//! The NUMA node of each processor, and the weights of nodes for interleaving.

use crate::units::NumaNode;
use std::ops::RangeInclusive;

/// The processors of each node that is online (Documentation/ABI/stable/sysfs-devices-node,
/// cpulist), at one moment. Processors can come while the machine runs.
#[derive(Clone, Debug, Default)]
pub struct Processors(Vec<(NumaNode, Vec<RangeInclusive<u32>>)>);

impl Processors {
    /// Reads them. They are none if the kernel has no NUMA or /sys is not mounted.
    pub fn read() -> Self {
        let online = NumaNode::parse_list(read_of("online").trim()).unwrap_or_default();
        let row =
            |node: NumaNode| (node, parse_ranges(read_of(&format!("node{node}/cpulist")).trim()));
        Self(online.into_iter().map(row).collect())
    }

    /// The processors of `node`, ascending.
    pub fn of(&self, node: NumaNode) -> impl Iterator<Item = u32> {
        let own = self.0.iter().filter(move |(of, _)| *of == node);
        own.flat_map(|(_, ranges)| ranges.iter().cloned().flatten())
    }

    /// The node of a processor. `None` for a processor that was not online.
    pub fn node_of(&self, processor: u32) -> Option<NumaNode> {
        let has = |ranges: &[RangeInclusive<u32>]| ranges.iter().any(|r| r.contains(&processor));
        self.0.iter().find(|(_, ranges)| has(ranges)).map(|(node, _)| *node)
    }
}

fn read_of(name: &str) -> String {
    std::fs::read_to_string(format!("/sys/devices/system/node/{name}")).unwrap_or_default()
}

/// The weight of a node in interleaving
/// (Documentation/ABI/testing/sysfs-kernel-mm-mempolicy-weighted-interleave, Linux 6.9), 1 where
/// the kernel has none.
pub fn weight_of(node: NumaNode) -> u32 {
    let path = format!("/sys/kernel/mm/mempolicy/weighted_interleave/node{node}");
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.trim().parse().unwrap_or(1).max(1)
}

/// Parses the kernel's list format for processors, `0-2,5`. A part that does not parse is left
/// out.
fn parse_ranges(text: &str) -> Vec<RangeInclusive<u32>> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.parse().ok()?..=last.parse().ok()?)
    };
    text.split(',').filter_map(range).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_are_read_as_the_kernel_writes_them() {
        let [one, other] = [0, 2].map(NumaNode);
        let processors =
            Processors(vec![(one, parse_ranges("0-3,8-11")), (other, parse_ranges("4"))]);
        let nodes = [0, 3, 9, 4, 12].map(|processor| processors.node_of(processor));
        assert_eq!(nodes, [Some(one), Some(one), Some(one), Some(other), None]);
        assert!(parse_ranges("").is_empty());
    }

    #[test]
    fn the_processor_of_this_thread_has_a_node() {
        let own = rustix::thread::sched_getcpu() as u32;
        let node = Processors::read().node_of(own).expect("a kernel with NUMA");
        assert!(weight_of(node) >= 1);
    }
}
