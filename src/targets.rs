//! The kinds of memory that the machine has, by NUMA node: the parse of the kernel's texts, the
//! order of the nodes by a quality, and the text for programs; pure.
//!
//! The words are hwloc's: a *target* is memory, an *initiator* is a node from which programs reach
//! it, and the names and units of the attributes are those of hwloc's memory attributes.
//!
//! Sources, best first:
//!
//! - **Access classes** (firmware's HMAT table, or CXL devices). The kernel tells how fast a node
//!   is as its *best* initiators see it, and nothing about other initiators. Class 1 is of
//!   processors only, and class 0 has other devices, too.
//! - **Distances** (firmware's SLIT table, or the kernel's guess). They are no latencies. They
//!   order nodes where nothing else is known.
//!
//! A value that the kernel does not tell is unknown, and never guessed.

use crate::error::Result;
use crate::placement::Quality;
use crate::sys::memory_texts::{AccessTexts, NodeTexts, Texts};
use crate::units::NumaNode;
use std::fmt::Write as _;
use std::ops::Range;

/// The memory of one NUMA node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The node.
    pub node: NumaNode,
    /// The kind of memory.
    pub kind: Kind,
    /// The nodes that the performance is about, ascending; all nodes with processors where the
    /// kernel tells no performance.
    pub initiators: Vec<NumaNode>,
    /// Bytes of the node.
    pub capacity: Option<u64>,
    /// As the initiators see it.
    pub performance: Performance,
    /// The distance from each node that is online, in the kernel's units: 10 is the least.
    pub distances: Vec<(NumaNode, u32)>,
}

/// A kind of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Memory of a node that has processors.
    Dram,
    /// Memory without processors that the kernel ranks above that of processors.
    Hbm,
    /// Memory without processors in a region of CXL memory.
    Cxl,
    /// Other memory without processors.
    MemoryOnly,
}

impl Kind {
    /// The word in the attribute.
    pub fn name(self) -> &'static str {
        match self {
            Self::Dram => "dram",
            Self::Hbm => "hbm",
            Self::Cxl => "cxl",
            Self::MemoryOnly => "memory-only",
        }
    }
}

/// The performance of a node for its initiators, as far as the kernel tells it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Performance {
    /// In nanoseconds.
    pub read_latency: Option<u64>,
    /// In nanoseconds.
    pub write_latency: Option<u64>,
    /// In MiB/s.
    pub read_bandwidth: Option<u64>,
    /// In MiB/s.
    pub write_bandwidth: Option<u64>,
}

impl Performance {
    /// True if the kernel tells any value.
    pub fn is_known(&self) -> bool {
        *self != Self::default()
    }
}

impl Target {
    /// All memory, on a kernel without CONFIG_NUMA.
    fn only() -> Self {
        let node = NumaNode(0);
        let (capacity, performance, distances) = Default::default();
        Self { node, kind: Kind::Dram, initiators: vec![node], capacity, performance, distances }
    }

    /// The distance from a node; from the nearest initiator if none is given. A distance that is
    /// not known is the greatest.
    pub fn distance(&self, from: Option<NumaNode>) -> u32 {
        let is_asked = |node: &NumaNode| match from {
            Some(from) => *node == from,
            None => self.initiators.contains(node),
        };
        let asked = self.distances.iter().filter(|(node, _)| is_asked(node));
        asked.map(|(_, distance)| *distance).min().unwrap_or(u32::MAX)
    }

    /// The performance for an initiator, or for the best initiators if none is given.
    fn seen_from(&self, initiator: Option<NumaNode>) -> Performance {
        match initiator {
            Some(initiator) if !self.initiators.contains(&initiator) => Performance::default(),
            _ => self.performance,
        }
    }
}

/// The pool's part of a node's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Bytes of the pool on the node.
    pub bytes: u64,
    /// Bytes of these that files can take.
    pub free: u64,
}

// ---- the text -----------------------------------------------------------------------------------

/// The values of a line, in order, with their units where the name has none. The first ones are
/// attributes of hwloc, with its names and units.
pub const VALUES: &[(&str, &str)] = &[
    ("Capacity", "B"),
    ("ReadLatency", "ns"),
    ("WriteLatency", "ns"),
    ("ReadBandwidth", "MiB/s"),
    ("WriteBandwidth", "MiB/s"),
    ("Distance", ""),
    ("pool_bytes", ""),
    ("free_bytes", ""),
];

/// The line of a target, without its end: `<node> <kind> initiators=<nodes>`, and `<name>=<value>`
/// for each of [`VALUES`] that is known. Where no performance is known, the distances from the
/// initiators are there, in the order of the initiators.
pub fn format(target: &Target, share: Share) -> String {
    let known = target.performance;
    let numbers = [
        target.capacity,
        known.read_latency,
        known.write_latency,
        known.read_bandwidth,
        known.write_bandwidth,
    ];
    let numbers = numbers.map(|number| number.map(|number| number.to_string()));
    let others = [distances(target), Some(share.bytes.to_string()), Some(share.free.to_string())];
    let initiators = NumaNode::list(&target.initiators);
    let mut line = format!("{} {} initiators={initiators}", target.node, target.kind.name());
    for ((name, _), value) in VALUES.iter().zip(numbers.into_iter().chain(others)) {
        if let Some(value) = value {
            let _ = write!(line, " {name}={value}");
        }
    }
    line
}

/// The distances from the initiators; none if one is not known, or if a performance is.
fn distances(target: &Target) -> Option<String> {
    let of = |from: &NumaNode| {
        let (_, distance) = target.distances.iter().find(|(node, _)| node == from)?;
        Some(distance.to_string())
    };
    if target.performance.is_known() {
        return None;
    }
    let all: Vec<String> = target.initiators.iter().map(of).collect::<Option<_>>()?;
    (!all.is_empty()).then(|| all.join(","))
}

// ---- the order ----------------------------------------------------------------------------------

/// All nodes of `targets`, the best first, for a program on `initiator`, or for a program beside
/// each memory if that is not known:
///
/// - by latency, the node with the least read latency;
/// - by bandwidth, the node with the most read bandwidth;
/// - by capacity, the largest node.
///
/// The nearer node is first of equals, and of nodes of which the kernel tells nothing; then the one
/// with the lower number. The nodes of which the kernel tells nothing for this initiator are
/// behind the others. But if the nearest node is one of these, the distance alone decides: the
/// values of farther nodes cannot be compared with it.
pub fn best(targets: &[Target], quality: Quality, initiator: Option<NumaNode>) -> Vec<NumaNode> {
    let badness = |target: &Target| badness(target, quality, initiator);
    let least = targets.iter().map(|target| target.distance(initiator)).min();
    let nearest = |target: &&Target| Some(target.distance(initiator)) == least;
    let is_comparable = targets.iter().filter(nearest).all(|target| badness(target).is_some());
    let mut sorted: Vec<&Target> = targets.iter().collect();
    sorted.sort_by_key(|target| {
        let badness = badness(target).filter(|_| is_comparable);
        (badness.is_none(), badness, target.distance(initiator), target.node)
    });
    sorted.into_iter().map(|target| target.node).collect()
}

/// A number that is less for a better target; none if the kernel does not tell the quality.
fn badness(target: &Target, quality: Quality, initiator: Option<NumaNode>) -> Option<u64> {
    let performance = target.seen_from(initiator);
    match quality {
        Quality::Latency => performance.read_latency,
        Quality::Bandwidth => performance.read_bandwidth.map(|bandwidth| u64::MAX - bandwidth),
        Quality::Capacity => target.capacity.map(|capacity| u64::MAX - capacity),
    }
}

// ---- the parse ----------------------------------------------------------------------------------

/// The memory of the machine's nodes, ascending. Reads some twenty files of /sys for each node.
///
/// # Errors
/// The errors of [`Texts::read`].
pub fn read() -> Result<Vec<Target>> {
    Texts::read().map(|texts| parse(&texts))
}

/// Parses the kernel's texts. A text that is not the kernel's is as if it was not there.
pub fn parse(texts: &Texts) -> Vec<Target> {
    let machine = Machine::parse(texts);
    if machine.online.is_empty() {
        return vec![Target::only()];
    }
    let rows = machine.online.iter().copied().zip(&texts.nodes);
    let with_memory = rows.filter(|(node, _)| machine.with_memory.contains(node));
    with_memory.map(|(node, texts)| machine.target(node, texts)).collect()
}

/// The facts that are not of one node.
struct Machine {
    online: Vec<NumaNode>,
    with_memory: Vec<NumaNode>,
    with_processors: Vec<NumaNode>,
    /// The distances from each node that is online, in the order of these nodes.
    distances: Vec<Vec<Option<u32>>>,
    /// The number of each tier, and its nodes. Faster tiers have lower numbers.
    tiers: Vec<(u32, Vec<NumaNode>)>,
    /// The numbers of the memory blocks with CXL memory.
    cxl_blocks: Vec<Range<u64>>,
}

impl Machine {
    fn parse(texts: &Texts) -> Self {
        let distances = |node: &NodeTexts| {
            node.distance.split_ascii_whitespace().map(|word| word.parse().ok()).collect()
        };
        let tier = |(name, nodes): &(String, String)| {
            Some((name.strip_prefix("memory_tier")?.parse().ok()?, nodes_of(nodes)))
        };
        let block_size = parse_hex(&texts.block_size);
        let blocks = |(start, size): &(String, String)| blocks_of(start, size, block_size?);
        Self {
            online: nodes_of(&texts.online),
            with_memory: nodes_of(&texts.has_memory),
            with_processors: nodes_of(&texts.has_cpu),
            distances: texts.nodes.iter().map(distances).collect(),
            tiers: texts.tiers.iter().filter_map(tier).collect(),
            cxl_blocks: texts.cxl_regions.iter().filter_map(blocks).collect(),
        }
    }

    fn target(&self, node: NumaNode, texts: &NodeTexts) -> Target {
        let [any, processors] = &texts.access;
        let told = [processors, any].into_iter().map(parse_access);
        let told = told
            .into_iter()
            .find(|(nodes, performance)| !nodes.is_empty() && performance.is_known());
        let (initiators, performance) =
            told.unwrap_or_else(|| (self.with_processors.clone(), Performance::default()));
        Target {
            node,
            kind: self.kind(node, texts),
            initiators,
            capacity: parse_capacity(&texts.meminfo),
            performance,
            distances: self.distances_to(node),
        }
    }

    fn distances_to(&self, node: NumaNode) -> Vec<(NumaNode, u32)> {
        let Some(column) = self.online.iter().position(|online| *online == node) else {
            return Vec::new();
        };
        let rows = self.online.iter().zip(&self.distances);
        rows.filter_map(|(from, row)| Some((*from, row.get(column).copied()??))).collect()
    }

    fn kind(&self, node: NumaNode, texts: &NodeTexts) -> Kind {
        let is_cxl = |name: &String| {
            let number = name.strip_prefix("memory").and_then(|number| number.parse().ok());
            number.is_some_and(|number| self.cxl_blocks.iter().any(|range| range.contains(&number)))
        };
        if self.with_processors.contains(&node) {
            Kind::Dram
        } else if texts.blocks.iter().any(is_cxl) {
            Kind::Cxl
        } else if self.is_ranked_above_processors(node) {
            Kind::Hbm
        } else {
            Kind::MemoryOnly
        }
    }

    fn is_ranked_above_processors(&self, node: NumaNode) -> bool {
        let tier = |node: &NumaNode| {
            self.tiers.iter().find(|(_, nodes)| nodes.contains(node)).map(|(number, _)| *number)
        };
        let of_processors = self.with_processors.iter().filter_map(tier).min();
        tier(&node).zip(of_processors).is_some_and(|(own, theirs)| own < theirs)
    }
}

/// The nodes of a list; none for an empty list, or a text that is no list.
fn nodes_of(list: &str) -> Vec<NumaNode> {
    NumaNode::parse_list(list.trim()).unwrap_or_default()
}

/// The initiators of an access class, and the performance for them.
fn parse_access(texts: &AccessTexts) -> (Vec<NumaNode>, Performance) {
    let node = |name: &String| NumaNode::parse(name.strip_prefix("node")?);
    let mut initiators: Vec<NumaNode> = texts.initiators.iter().filter_map(node).collect();
    initiators.sort_unstable();
    // The kernel writes 0 for a value that the firmware does not tell.
    let value = |text: &str| text.trim().parse().ok().filter(|value| *value > 0);
    let performance = Performance {
        read_latency: value(&texts.read_latency),
        write_latency: value(&texts.write_latency),
        read_bandwidth: value(&texts.read_bandwidth),
        write_bandwidth: value(&texts.write_bandwidth),
    };
    (initiators, performance)
}

/// Bytes of a node, from the line `Node N MemTotal: NUMBER kB` of its meminfo.
fn parse_capacity(meminfo: &str) -> Option<u64> {
    let mut words = meminfo.split_ascii_whitespace().skip_while(|word| *word != "MemTotal:");
    let kib: u64 = words.nth(1)?.parse().ok()?;
    kib.checked_mul(1024)
}

/// The numbers of the memory blocks in a region of CXL memory. The kernel writes all ones for a
/// region that has no place.
fn blocks_of(start: &str, size: &str, block_size: u64) -> Option<Range<u64>> {
    let (start, size) = (parse_hex(start)?, parse_hex(size)?);
    let end = start.checked_add(size)?;
    Some(start.checked_div(block_size)?..end.div_ceil(block_size))
}

/// Parses a hexadecimal number, with or without `0x`.
fn parse_hex(text: &str) -> Option<u64> {
    let text = text.trim();
    u64::from_str_radix(text.strip_prefix("0x").unwrap_or(text), 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nodes(numbers: &[u32]) -> Vec<NumaNode> {
        numbers.iter().copied().map(NumaNode).collect()
    }

    fn access(initiators: &[u32], values: [u64; 4]) -> AccessTexts {
        let [read_latency, write_latency, read_bandwidth, write_bandwidth] =
            values.map(|value| format!("{value}\n"));
        let others = ["read_bandwidth", "read_latency", "write_bandwidth", "write_latency"];
        let links = initiators.iter().map(|node| format!("node{node}"));
        AccessTexts {
            initiators: links.chain(others.map(str::to_owned)).collect(),
            read_latency,
            write_latency,
            read_bandwidth,
            write_bandwidth,
        }
    }

    fn node(number: u32, mib: u64, distance: &str) -> NodeTexts {
        let meminfo = format!(
            "Node {number} MemTotal:     {:8} kB\nNode {number} MemFree:       100 kB\n",
            mib << 10
        );
        NodeTexts { meminfo, distance: format!("{distance}\n"), ..NodeTexts::default() }
    }

    /// Two sockets, 0 and 1, and memory without processors on node 2, beside socket 0.
    fn without_values() -> Texts {
        Texts {
            online: "0-2\n".into(),
            has_memory: "0-2\n".into(),
            has_cpu: "0-1\n".into(),
            nodes: vec![
                node(0, 512, "10 21 17"),
                node(1, 256, "21 10 28"),
                node(2, 1024, "17 28 10"),
            ],
            tiers: vec![("memory_tier4".into(), "0-2\n".into())],
            ..Texts::default()
        }
    }

    /// The same with values from the firmware.
    fn with_values() -> Texts {
        let mut texts = without_values();
        let local = [80, 90, 204_800, 102_400];
        for (at, initiator, values) in [(0, 0, local), (1, 1, local), (2, 0, [250, 0, 61_440, 0])] {
            texts.nodes[at].access = [access(&[initiator], values), access(&[initiator], values)];
        }
        texts
    }

    #[test]
    fn values_are_read_as_the_kernel_writes_them() {
        let targets = parse(&with_values());
        assert_eq!(
            targets[2],
            Target {
                node: NumaNode(2),
                kind: Kind::MemoryOnly,
                initiators: nodes(&[0]),
                capacity: Some(1 << 30),
                performance: Performance {
                    read_latency: Some(250),
                    write_latency: None,
                    read_bandwidth: Some(61_440),
                    write_bandwidth: None,
                },
                distances: vec![(NumaNode(0), 17), (NumaNode(1), 28), (NumaNode(2), 10)],
            }
        );
        let kinds: Vec<_> = targets.iter().map(|target| target.kind).collect();
        assert_eq!(kinds, [Kind::Dram, Kind::Dram, Kind::MemoryOnly]);
    }

    #[test]
    fn without_values_all_nodes_with_processors_are_initiators() {
        let targets = parse(&without_values());
        for target in &targets {
            assert_eq!(target.initiators, nodes(&[0, 1]));
            assert!(!target.performance.is_known());
        }
        let distance = |from: Option<u32>| targets[2].distance(from.map(NumaNode));
        assert_eq!([Some(0), Some(1), None, Some(9)].map(distance), [17, 28, 17, u32::MAX]);
    }

    #[test]
    fn the_class_of_processors_counts_before_that_of_all_devices() {
        let mut texts = with_values();
        texts.nodes[2].access[0] = access(&[2], [50, 50, 900_000, 900_000]);
        assert_eq!(parse(&texts)[2].initiators, nodes(&[0]), "2 is a device without processors");
        assert_eq!(parse(&texts)[2].performance.read_latency, Some(250));
        texts.nodes[2].access[1] = AccessTexts::default();
        assert_eq!(parse(&texts)[2].initiators, nodes(&[2]));
        assert_eq!(parse(&texts)[2].performance.read_latency, Some(50));
        texts.nodes[2].access[0] = access(&[0], [0; 4]);
        assert_eq!(parse(&texts)[2].initiators, nodes(&[0, 1]), "zeros tell nothing");
    }

    #[test]
    fn a_node_without_processors_has_its_kind_from_the_kernel() {
        let tiers = |of_two: &str| {
            let mut texts = without_values();
            texts.tiers = vec![
                ("memory_tier4".into(), "0-1\n".into()),
                (format!("memory_tier{of_two}"), "2\n".into()),
            ];
            texts
        };
        let with_region = |resource: &str, size: &str| {
            let mut texts = tiers("2");
            texts.cxl_regions = vec![(format!("{resource}\n"), format!("{size}\n"))];
            texts.block_size = "8000000\n".into(); // 128 MiB
            texts.nodes[0].blocks = vec!["memory0".into(), "memory_failure".into()];
            texts.nodes[2].blocks = vec!["memory_failure".into(), "memory96".into()];
            texts
        };
        let rows = [
            (tiers("4"), Kind::MemoryOnly),
            (tiers("22"), Kind::MemoryOnly),
            (tiers("2"), Kind::Hbm),
            (tiers("x"), Kind::MemoryOnly),
            (Texts { tiers: Vec::new(), ..without_values() }, Kind::MemoryOnly),
            (with_region("0x300000000", "0x40000000"), Kind::Cxl),
            (with_region("0x2f0000000", "0x18000000"), Kind::Cxl),
            (with_region("0x2f0000000", "0x10000000"), Kind::Hbm),
            (with_region("0xffffffffffffffff", "0x40000000"), Kind::Hbm),
        ];
        for (texts, kind) in rows {
            let targets = parse(&texts);
            assert_eq!((targets[0].kind, targets[2].kind), (Kind::Dram, kind), "{texts:?}");
        }
    }

    #[test]
    fn nodes_without_memory_are_no_targets() {
        let mut texts = with_values();
        texts.has_memory = "0,2\n".into();
        let targets = parse(&texts);
        assert_eq!(targets.iter().map(|target| target.node).collect::<Vec<_>>(), nodes(&[0, 2]));
        assert_eq!(targets[1].distance(Some(NumaNode(1))), 28);
    }

    #[test]
    fn a_text_that_is_not_there_is_unknown() {
        assert_eq!(parse(&Texts::default()), [Target::only()]);
        let mut texts = without_values();
        texts.nodes[1] = NodeTexts { distance: "21 x".into(), ..NodeTexts::default() };
        let target = &parse(&texts)[1];
        assert_eq!((target.capacity, target.kind), (None, Kind::Dram));
        assert_eq!(target.distances, [(NumaNode(0), 21), (NumaNode(2), 28)]);
    }

    #[test]
    fn a_line_has_what_the_kernel_tells() {
        let share = Share { bytes: 4096, free: 0 };
        let lines = |texts: &Texts| -> Vec<String> {
            parse(texts).iter().map(|target| format(target, share)).collect()
        };
        assert_eq!(
            lines(&with_values())[1..],
            [
                "1 dram initiators=1 Capacity=268435456 ReadLatency=80 WriteLatency=90 \
                 ReadBandwidth=204800 WriteBandwidth=102400 pool_bytes=4096 free_bytes=0",
                "2 memory-only initiators=0 Capacity=1073741824 ReadLatency=250 \
                 ReadBandwidth=61440 pool_bytes=4096 free_bytes=0",
            ]
        );
        let mut texts = without_values();
        texts.nodes[0].distance = "10".into();
        assert_eq!(
            lines(&texts),
            [
                "0 dram initiators=0,1 Capacity=536870912 Distance=10,21 \
                 pool_bytes=4096 free_bytes=0",
                "1 dram initiators=0,1 Capacity=268435456 pool_bytes=4096 free_bytes=0",
                "2 memory-only initiators=0,1 Capacity=1073741824 pool_bytes=4096 free_bytes=0",
            ]
        );
        assert_eq!(
            format(&Target::only(), share),
            "0 dram initiators=0 pool_bytes=4096 free_bytes=0"
        );
    }

    /// Reason, machine, quality, initiator and the order of the nodes.
    type Row<'a> = (&'a str, Texts, Quality, Option<u32>, &'a [u32]);

    #[test]
    fn nodes_are_ordered_by_each_quality() {
        use Quality::{Bandwidth, Capacity, Latency};
        let hbm = || {
            let mut texts = with_values();
            texts.nodes[2].access[1] = access(&[0], [90, 90, 800_000, 800_000]);
            texts
        };
        let unknown = || {
            let mut texts = with_values();
            texts.nodes[1].access = Default::default();
            texts
        };
        let rows: Vec<Row> = vec![
            ("values of its own", with_values(), Latency, Some(0), &[0, 2, 1]),
            ("values of its own", with_values(), Bandwidth, Some(0), &[0, 2, 1]),
            ("values of node 1, then distances", with_values(), Latency, Some(1), &[1, 0, 2]),
            ("all values", with_values(), Latency, None, &[0, 1, 2]),
            ("more bandwidth, more latency", hbm(), Bandwidth, Some(0), &[2, 0, 1]),
            ("more bandwidth, more latency", hbm(), Latency, Some(0), &[0, 2, 1]),
            ("more bandwidth, of another socket", hbm(), Bandwidth, Some(1), &[1, 0, 2]),
            ("all values", hbm(), Bandwidth, None, &[2, 0, 1]),
            ("distances", without_values(), Latency, Some(1), &[1, 0, 2]),
            ("distances", without_values(), Bandwidth, Some(0), &[0, 2, 1]),
            ("of an initiator that is not there", with_values(), Latency, Some(7), &[0, 1, 2]),
            ("the nearest is unknown", unknown(), Latency, Some(1), &[1, 0, 2]),
            ("capacities", with_values(), Capacity, Some(1), &[2, 0, 1]),
            ("capacities", without_values(), Capacity, None, &[2, 0, 1]),
        ];
        for (why, texts, quality, initiator, order) in rows {
            let found = best(&parse(&texts), quality, initiator.map(NumaNode));
            assert_eq!(found, nodes(order), "{why}: {quality:?} for {initiator:?}");
        }
        let mut equal = without_values();
        equal.nodes[2].meminfo = equal.nodes[0].meminfo.clone();
        equal.nodes[1].meminfo = equal.nodes[0].meminfo.clone();
        assert_eq!(best(&parse(&equal), Capacity, Some(NumaNode(0))), nodes(&[0, 2, 1]));
        assert_eq!(best(&[], Capacity, None), []);
    }

    #[test]
    fn this_machine_has_a_target_for_each_node_with_memory() {
        let targets = read().unwrap();
        // A node that still gets its memory has less than /proc/meminfo tells.
        let total: Option<u64> = targets.iter().map(|target| target.capacity).sum();
        assert!((1..=crate::sys::memory_total().unwrap()).contains(&total.unwrap()));
        for node in crate::sys::numa::memory_nodes().unwrap() {
            assert!(targets.iter().any(|target| target.node == node), "{node}: {targets:?}");
        }
    }
}
