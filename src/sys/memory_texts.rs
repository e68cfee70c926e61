//! The texts of sysfs about the kinds of memory that the machine has. [`crate::targets`] parses
//! them.
//!
//! | below /sys/ | documented in (kernel, Documentation/) |
//! |---|---|
//! | devices/system/node | ABI/stable/sysfs-devices-node, admin-guide/mm/numaperf.rst |
//! | devices/virtual/memory_tiering | ABI/testing/sysfs-kernel-mm-memory-tiers |
//! | bus/cxl/devices | ABI/testing/sysfs-bus-cxl |
//! | devices/system/memory | admin-guide/mm/memory-hotplug.rst |

use crate::error::{Error, Result};
use crate::faults::{Want, attempt};
use crate::units::NumaNode;
use rustix::io::Errno;
use std::fs;
use std::io;

const NODES: &str = "/sys/devices/system/node";
const TIERS: &str = "/sys/devices/virtual/memory_tiering";
const CXL: &str = "/sys/bus/cxl/devices";
const BLOCK_SIZE: &str = "/sys/devices/system/memory/block_size_bytes";

/// The texts. One that the kernel does not have is empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Texts {
    /// The nodes that are online, in the kernel's list format.
    pub online: String,
    /// The nodes that have memory.
    pub has_memory: String,
    /// The nodes that have processors.
    pub has_cpu: String,
    /// A row for each node that is online.
    pub nodes: Vec<NodeTexts>,
    /// The names of the memory tiers, with their nodes.
    pub tiers: Vec<(String, String)>,
    /// First byte and number of bytes of each region of CXL memory.
    pub cxl_regions: Vec<(String, String)>,
    /// Bytes of a memory block. Read only where there is CXL memory.
    pub block_size: String,
}

/// The texts about one node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeTexts {
    /// The memory of the node.
    pub meminfo: String,
    /// The distances from this node to each node that is online.
    pub distance: String,
    /// The access classes 0 and 1.
    pub access: [AccessTexts; 2],
    /// The names of the node's memory blocks. Read only where there is CXL memory.
    pub blocks: Vec<String>,
}

/// The texts about one access class of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AccessTexts {
    /// The names in the directory of the initiators; those of nodes are among them.
    pub initiators: Vec<String>,
    /// In nanoseconds.
    pub read_latency: String,
    /// In nanoseconds.
    pub write_latency: String,
    /// In MiB/s.
    pub read_bandwidth: String,
    /// In MiB/s.
    pub write_bandwidth: String,
}

impl Texts {
    /// Reads the texts, some twenty files for each node.
    ///
    /// # Errors
    /// The errors of open(2) and read(2), but those that say that the kernel does not have a text.
    /// [`Error::Corrupt`] for a list of nodes that does not parse.
    pub fn read() -> Result<Self> {
        let online = text(&format!("{NODES}/online"))?;
        let cxl_regions = cxl_regions()?;
        let has_cxl = !cxl_regions.is_empty();
        let nodes = match online.trim() {
            "" => Vec::new(), // a kernel without CONFIG_NUMA
            list => NumaNode::parse_list(list)
                .ok_or_else(|| Error::Corrupt(format!("node list {list:?}")))?,
        };
        Ok(Self {
            has_memory: text(&format!("{NODES}/has_memory"))?,
            has_cpu: text(&format!("{NODES}/has_cpu"))?,
            nodes: nodes
                .iter()
                .map(|node| NodeTexts::read(*node, has_cxl))
                .collect::<Result<_>>()?,
            tiers: tiers()?,
            block_size: if has_cxl { text(BLOCK_SIZE)? } else { String::new() },
            online,
            cxl_regions,
        })
    }
}

impl NodeTexts {
    fn read(node: NumaNode, has_cxl: bool) -> Result<Self> {
        let directory = format!("{NODES}/node{node}");
        let blocks = if has_cxl { names(&directory, "memory")? } else { Vec::new() };
        Ok(Self {
            meminfo: text(&format!("{directory}/meminfo"))?,
            distance: text(&format!("{directory}/distance"))?,
            access: [
                AccessTexts::read(&format!("{directory}/access0/initiators"))?,
                AccessTexts::read(&format!("{directory}/access1/initiators"))?,
            ],
            blocks,
        })
    }
}

impl AccessTexts {
    fn read(directory: &str) -> Result<Self> {
        let initiators = names(directory, "node")?;
        if initiators.is_empty() {
            return Ok(Self::default());
        }
        Ok(Self {
            initiators,
            read_latency: text(&format!("{directory}/read_latency"))?,
            write_latency: text(&format!("{directory}/write_latency"))?,
            read_bandwidth: text(&format!("{directory}/read_bandwidth"))?,
            write_bandwidth: text(&format!("{directory}/write_bandwidth"))?,
        })
    }
}

fn tiers() -> Result<Vec<(String, String)>> {
    let nodes = |name: String| {
        let nodes = text(&format!("{TIERS}/{name}/nodelist"))?;
        Ok((name, nodes))
    };
    names(TIERS, "memory_tier")?.into_iter().map(nodes).collect()
}

fn cxl_regions() -> Result<Vec<(String, String)>> {
    let extent = |name: String| {
        Ok((text(&format!("{CXL}/{name}/resource"))?, text(&format!("{CXL}/{name}/size"))?))
    };
    names(CXL, "region")?.into_iter().map(extent).collect()
}

/// The text of a file; empty if there is no such file.
fn text(path: &str) -> Result<String> {
    attempt(Want::Descriptor)?;
    if_there(fs::read_to_string(path))
}

/// The names in a directory that begin with `prefix`, sorted; none if there is no such directory.
fn names(directory: &str, prefix: &str) -> Result<Vec<String>> {
    attempt(Want::Descriptor)?;
    let entries = fs::read_dir(directory).and_then(Iterator::collect::<io::Result<Vec<_>>>);
    let names =
        if_there(entries)?.into_iter().filter_map(|entry| entry.file_name().into_string().ok());
    let mut names: Vec<String> = names.filter(|name| name.starts_with(prefix)).collect();
    names.sort_unstable();
    Ok(names)
}

/// The default for a file that is not there, or whose device has gone.
fn if_there<T: Default>(result: io::Result<T>) -> Result<T> {
    let gone = [Errno::NOENT, Errno::NODEV, Errno::NXIO].map(|errno| Some(errno.raw_os_error()));
    match result {
        Err(error) if gone.contains(&error.raw_os_error()) => Ok(T::default()),
        result => Ok(result?),
    }
}
