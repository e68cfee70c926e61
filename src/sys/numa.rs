//! NUMA nodes: the nodes that have memory, and the bytes that each can give.

use crate::error::Error;
use crate::faults::{Want, attempt};
use crate::units::NumaNode;

/// The NUMA nodes that have memory (/sys/devices/system/node/has_memory) and that this process's
/// cpuset allows (cpuset(7), Mems_allowed_list), ascending. Never empty.
///
/// # Errors
/// If /proc or /sys is not mounted, or if a list does not parse.
pub fn memory_nodes() -> Result<Vec<NumaNode>, Error> {
    let nodes = all_memory_nodes()?;
    let status = std::fs::read_to_string("/proc/self/status")?;
    let allowed = status.lines().find_map(|line| line.strip_prefix("Mems_allowed_list:"));
    allowed_of(&nodes, allowed)
        .ok_or_else(|| Error::Corrupt(format!("of nodes {}: {allowed:?}", NumaNode::list(&nodes))))
}

/// The nodes of [`memory_nodes`] that have processors, too (/sys/devices/system/node/has_cpu). All
/// of [`memory_nodes`] where none has one.
///
/// # Errors
/// Those of [`memory_nodes`].
pub fn nodes_with_processors() -> Result<Vec<NumaNode>, Error> {
    let nodes = memory_nodes()?;
    let text = std::fs::read_to_string("/sys/devices/system/node/has_cpu").unwrap_or_default();
    let with_processors = NumaNode::parse_list(text.trim()).unwrap_or_default();
    let found: Vec<_> =
        nodes.iter().copied().filter(|node| with_processors.contains(node)).collect();
    Ok(if found.is_empty() { nodes } else { found })
}

/// The NUMA nodes that have memory (/sys/devices/system/node/has_memory). Node 0 on a kernel
/// without CONFIG_NUMA.
///
/// # Errors
/// If the list does not parse.
pub fn all_memory_nodes() -> Result<Vec<NumaNode>, Error> {
    let Ok(text) = std::fs::read_to_string("/sys/devices/system/node/has_memory") else {
        return Ok(vec![NumaNode(0)]); // a kernel without CONFIG_NUMA
    };
    NumaNode::parse_list(text.trim()).ok_or_else(|| Error::Corrupt(format!("node list {text:?}")))
}

/// The nodes that this process's cpuset allows, and the bytes that they can give. `None` where the
/// cpuset allows every node.
///
/// # Errors
/// Those of [`memory_nodes`] and [`memory_available_on`].
pub fn available_in_cpuset() -> Result<Option<(Vec<NumaNode>, u64)>, Error> {
    let (allowed, all) = (memory_nodes()?, all_memory_nodes()?);
    if allowed == all {
        return Ok(None);
    }
    let available =
        allowed.iter().map(|node| memory_available_on(*node)).sum::<Result<u64, Error>>()?;
    Ok(Some((allowed, available)))
}

/// The part of `nodes` that is in the list `allowed`, or all if there is no list (no
/// CONFIG_CPUSETS). `None` where no node is left, or where the list does not parse.
fn allowed_of(nodes: &[NumaNode], allowed: Option<&str>) -> Option<Vec<NumaNode>> {
    let Some(allowed) = allowed else { return Some(nodes.to_vec()) };
    let allowed = NumaNode::parse_list(allowed.trim())?;
    let nodes: Vec<_> = nodes.iter().copied().filter(|node| allowed.contains(node)).collect();
    (!nodes.is_empty()).then_some(nodes)
}

/// About the bytes that a NUMA node can give without swapping
/// (/sys/devices/system/node/nodeN/meminfo): its free memory and half of its page cache, as the
/// kernel keeps some of that.
///
/// # Errors
/// If /sys is not mounted or has no such lines.
pub fn memory_available_on(node: NumaNode) -> Result<u64, Error> {
    attempt(Want::Descriptor)?;
    let text = std::fs::read_to_string(format!("/sys/devices/system/node/node{node}/meminfo"))?;
    available_on(&text)
        .ok_or_else(|| Error::Corrupt(format!("the meminfo of node {node} has no MemFree")))
}

/// Computes [`memory_available_on`] from the text of that file. Each line is `Node N NAME: NUMBER
/// kB`.
fn available_on(meminfo: &str) -> Option<u64> {
    let kib = |name: &str| {
        let mut lines = meminfo.lines().map(|line| line.split_ascii_whitespace().skip(2));
        lines.find_map(|mut words| {
            (words.next()? == name).then(|| words.next()?.parse::<u64>().ok())?
        })
    };
    let cache = kib("Active(file):")? + kib("Inactive(file):")?;
    Some((kib("MemFree:")? + cache / 2) << 10)
}

#[cfg(test)]
mod tests {
    use super::NumaNode;

    #[test]
    fn nodes_outside_of_the_cpuset_are_left_alone() {
        type Nodes = &'static [u32];
        let rows: [(Nodes, Option<&str>, Option<Nodes>); 5] = [
            (&[0, 1, 2], Some("\t0-3"), Some(&[0, 1, 2])),
            (&[0, 1, 2], Some("\t1"), Some(&[1])),
            (&[0, 2], Some("\t1-2,5"), Some(&[2])),
            (&[0, 1], None, Some(&[0, 1])),
            (&[0, 1], Some("\t2"), None),
        ];
        for (nodes, allowed, left) in rows {
            let numbered = |nodes: Nodes| nodes.iter().copied().map(NumaNode).collect::<Vec<_>>();
            assert_eq!(
                super::allowed_of(&numbered(nodes), allowed),
                left.map(numbered),
                "{nodes:?} {allowed:?}"
            );
        }
    }

    #[test]
    fn what_a_node_can_give_is_read_as_the_kernel_writes_it() {
        let text = "\nNode 1 MemTotal:   524288 kB\nNode 1 MemFree:    27140 kB\nNode 1 Active:  9 kB\n\
            Node 1 Active(file):     100 kB\nNode 1 Inactive(file):    2000 kB\n";
        assert_eq!(super::available_on(text), Some((27140 + 1050) << 10));
        assert_eq!(super::available_on("Node 1 MemFree: 5 kB\n"), None);
        let machine = crate::sys::memory_total().unwrap();
        for node in super::memory_nodes().unwrap() {
            let there = super::memory_available_on(node).unwrap();
            assert!(
                0 < there && there <= machine,
                "{there} bytes on node {node} of a machine of {machine}"
            );
        }
    }
}
