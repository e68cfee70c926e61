//! The one table of the extended attributes that are this filesystem's interface: name = place =
//! meaning of a read and of a write; and the names of the pool's counters.
//!
//! The daemon, the command, the tests and the benches take the names from here. The daemon serves
//! each attribute by a `match` over [`OfFile`], [`OfEntry`] or [`OfRoot`] without a wildcard, so
//! the compiler finds an attribute that was forgotten there. [`crate::quarantine`] has the grammar
//! of ranges.

use crate::units::NumaNode;
use Attribute::{Entry, File, Root};
use std::borrow::Cow;

/// Quarantined ranges.
pub const POISON: &str = "user.hugetlb2.poison";
/// The same ranges, for a reader that leaves the alarm to others.
pub const QUARANTINE: &str = "user.hugetlb2.quarantine";
/// Lists of losses, with the kind of each.
pub const LOSSES: &str = "trusted.hugetlb2.poison";
/// Repair requests.
pub const REPAIR: &str = "user.hugetlb2.repair";
/// Collapse requests.
pub const COLLAPSE: &str = "user.hugetlb2.collapse";
/// The way in which a file is mapped.
pub const MAP: &str = "user.hugetlb2.map";
/// The NUMA nodes from which a file's memory comes.
pub const PLACEMENT: &str = "user.hugetlb2.placement";
/// The reason for the last refusal.
pub const REFUSAL: &str = "user.hugetlb2.refusal";
/// Descriptors of a file's memory.
pub const OPEN: &str = "user.hugetlb2.open";
/// Requests for real memory errors.
pub const INJECT: &str = "trusted.hugetlb2.inject";
/// The counters of the pool.
pub const POOL: &str = "user.hugetlb2.pool";
/// The kinds of memory that the pool has.
pub const TARGETS: &str = "user.hugetlb2.targets";
/// The options of the mount.
pub const OPTIONS: &str = "user.hugetlb2.options";
/// The size of the pool.
pub const SIZE: &str = "trusted.hugetlb2.size";
/// The invariants that do not hold.
pub const CHECK: &str = "trusted.hugetlb2.check";
/// The files that cannot be opened.
pub const UNAVAILABLE: &str = "trusted.hugetlb2.unavailable";
/// Only in debug builds: the step after which the worker dies.
pub const DIE: &str = "trusted.hugetlb2.die";
/// Only in debug builds: the count of each step.
pub const STEPS: &str = "trusted.hugetlb2.steps";
/// Only in debug builds: the number of threads that have stopped at a step.
pub const STOPPED: &str = "trusted.hugetlb2.stopped";
/// Only in debug builds: the system call that fails.
pub const FAIL: &str = "trusted.hugetlb2.fail";

/// Names that begin so belong to the interface, also names that the table does not have.
pub const PREFIXES: [&str; 2] = ["user.hugetlb2.", "trusted.hugetlb2."];

/// Longest value that getxattr(2) returns, in bytes (XATTR_SIZE_MAX).
pub const LONGEST_VALUE: usize = 64 << 10;

/// An attribute of a regular file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OfFile {
    /// [`POISON`].
    Poison,
    /// [`QUARANTINE`].
    Quarantine,
    /// [`LOSSES`].
    Losses,
    /// [`REPAIR`].
    Repair,
    /// [`COLLAPSE`].
    Collapse,
    /// [`MAP`].
    Map,
    /// [`OPEN`].
    Open,
    /// [`INJECT`].
    Inject,
}

/// An attribute of a regular file or a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OfEntry {
    /// [`PLACEMENT`].
    Placement,
    /// [`REFUSAL`].
    Refusal,
}

/// An attribute of the root directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OfRoot {
    /// [`POOL`].
    Pool,
    /// [`TARGETS`].
    Targets,
    /// [`OPTIONS`].
    Options,
    /// [`SIZE`].
    Size,
    /// [`CHECK`].
    Check,
    /// [`UNAVAILABLE`].
    Unavailable,
    /// [`DIE`].
    #[cfg(debug_assertions)]
    Die,
    /// [`STEPS`].
    #[cfg(debug_assertions)]
    Steps,
    /// [`STOPPED`].
    #[cfg(debug_assertions)]
    Stopped,
    /// [`FAIL`].
    #[cfg(debug_assertions)]
    Fail,
}

/// An attribute, by the place that has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attribute {
    /// Of a regular file.
    File(OfFile),
    /// Of a regular file or a directory.
    Entry(OfEntry),
    /// Of the root directory.
    Root(OfRoot),
}

/// A row of the table.
#[derive(Debug)]
pub struct Row {
    /// The whole name.
    pub name: &'static str,
    /// The attribute.
    pub attribute: Attribute,
    /// The meaning of a read; none if the attribute cannot be read (ENODATA).
    pub get: Option<&'static str>,
    /// The meaning of a write; none if the attribute cannot be written (EOPNOTSUPP).
    pub set: Option<&'static str>,
    /// True for an attribute that only debug builds have.
    pub only_for_tests: bool,
}

const fn row(
    name: &'static str,
    attribute: Attribute,
    get: Option<&'static str>,
    set: Option<&'static str>,
) -> Row {
    Row { name, attribute, get, set, only_for_tests: false }
}

#[cfg(debug_assertions)]
const fn only_for_tests(
    name: &'static str,
    attribute: OfRoot,
    get: &'static str,
    set: Option<&'static str>,
) -> Row {
    Row { only_for_tests: true, ..row(name, Root(attribute), Some(get), set) }
}

/// All attributes, in the order of the documentation.
pub const TABLE: &[Row] = &[
    row(
        POISON,
        File(OfFile::Poison),
        Some("quarantined ranges"),
        Some("quarantine these ranges too"),
    ),
    row(
        QUARANTINE,
        File(OfFile::Quarantine),
        Some("quarantined ranges; the alarm does not end"),
        None,
    ),
    row(
        LOSSES,
        File(OfFile::Losses),
        None,
        Some("quarantine these ranges too, those of kind hw by real memory errors"),
    ),
    row(
        REPAIR,
        File(OfFile::Repair),
        None,
        Some("repair ranges with zeros, or salvage their bytes"),
    ),
    row(COLLAPSE, File(OfFile::Collapse), None, Some("put huge mappings back now")),
    row(MAP, File(OfFile::Map), Some("ranges, with state and NUMA node"), None),
    row(
        OPEN,
        File(OfFile::Open),
        Some("that programs have the memory open by themselves"),
        Some("send a descriptor of the memory over this Unix socket of the caller"),
    ),
    row(INJECT, File(OfFile::Inject), None, Some("a real memory error, for tests")),
    row(
        PLACEMENT,
        Entry(OfEntry::Placement),
        Some("the NUMA nodes that are asked for, and those of the memory"),
        Some("ask for NUMA nodes"),
    ),
    row(
        REFUSAL,
        Entry(OfEntry::Refusal),
        Some("the reason for the last refusal of this thread here"),
        None,
    ),
    row(POOL, Root(OfRoot::Pool), Some("the counters of the pool"), None),
    row(TARGETS, Root(OfRoot::Targets), Some("the kinds of memory, by NUMA node"), None),
    row(OPTIONS, Root(OfRoot::Options), Some("the options of the mount, but for the size"), None),
    row(SIZE, Root(OfRoot::Size), Some("the size of the pool in bytes"), Some("resize the pool")),
    row(CHECK, Root(OfRoot::Check), Some("the invariants that do not hold"), None),
    row(UNAVAILABLE, Root(OfRoot::Unavailable), Some("the files that cannot be opened"), None),
    #[cfg(debug_assertions)]
    only_for_tests(
        DIE,
        OfRoot::Die,
        "the names of the steps",
        Some("die at a step, or stop there"),
    ),
    #[cfg(debug_assertions)]
    only_for_tests(STEPS, OfRoot::Steps, "the count of each step since the last read", None),
    #[cfg(debug_assertions)]
    only_for_tests(STOPPED, OfRoot::Stopped, "the number of threads that have stopped", None),
    #[cfg(debug_assertions)]
    only_for_tests(
        FAIL,
        OfRoot::Fail,
        "the failure so far",
        Some("the system call to fail, and the error"),
    ),
];

/// The row of an attribute; none for a name that the table does not have.
pub fn find(name: &[u8]) -> Option<&'static Row> {
    TABLE.iter().find(|row| row.name.as_bytes() == name)
}

/// True if a name belongs to the interface, and not to users.
pub fn is_of_interface(name: &[u8]) -> bool {
    PREFIXES.iter().any(|prefix| name.starts_with(prefix.as_bytes()))
}

/// A counter of the pool: a line `<name> <value>` of [`POOL`]. docs/OPERATIONS.md has the meanings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// Bytes of a page.
    PageSize,
    /// The size of the pool, in pages.
    PagesTotal,
    /// Pages that a file can take.
    PagesFree,
    /// Pages whose memory is cleared ahead, out of those that are free.
    PagesReady,
    /// 1 while more memory is to be cleared ahead, or else 0.
    Clearing,
    /// Pages of files.
    PagesUsed,
    /// Pages that are promised to requests under way.
    PagesReserved,
    /// Pages of files without a name, out of those that are used.
    PagesOrphaned,
    /// Pages of which memory is missing.
    PagesMissing,
    /// Bytes that the pool holds beyond its size, to move memory with.
    FloatBytes,
    /// Bytes that are missing in the free memory.
    ShortBytes,
    /// Bytes in whole folios when the pool was filled.
    HugeBytesAtMount,
    /// Pages of the pool on a NUMA node.
    PagesTotalOn {
        /// The NUMA node.
        node: NumaNode,
    },
    /// Free pages of the pool on a NUMA node.
    PagesFreeOn {
        /// The NUMA node.
        node: NumaNode,
    },
    /// Pages of files on a NUMA node.
    PagesUsedOn {
        /// The NUMA node.
        node: NumaNode,
    },
    /// Bytes of free memory on a NUMA node.
    ReserveBytes {
        /// The NUMA node.
        node: NumaNode,
    },
    /// Regular files, with those that have no name.
    Objects,
    /// Files that cannot be opened.
    FilesUnavailable,
    /// Nodes without a name.
    Orphans,
    /// Bytes that are punched and still the file's.
    PunchedBytes,
    /// Subpages that are quarantined on request.
    QuarantinedSoft,
    /// Subpages that are quarantined for a hardware error.
    QuarantinedHw,
    /// Good frames of memory that were given up for losses of other machines, since the worker
    /// began.
    FramesGivenUp,
    /// Descriptors by which the kernel reads itself.
    OpenedNatively,
    /// Files whose memory programs have open by themselves.
    MemoryOpen,
    /// Lines that the log has lost.
    LogLinesDropped,
    /// Quarantined subpages that a touch has opened, and that were shut again.
    HolesShutAgain,
    /// The supervisor.
    DaemonPid,
    /// The worker.
    WorkerPid,
}

impl Counter {
    /// The name in [`POOL`].
    pub fn name(self) -> Cow<'static, str> {
        Cow::Borrowed(match self {
            Self::PageSize => "page_size",
            Self::PagesTotal => "pages_total",
            Self::PagesFree => "pages_free",
            Self::PagesReady => "pages_ready",
            Self::Clearing => "clearing",
            Self::PagesUsed => "pages_used",
            Self::PagesReserved => "pages_reserved",
            Self::PagesOrphaned => "pages_orphaned",
            Self::PagesMissing => "pages_missing",
            Self::FloatBytes => "float_bytes",
            Self::ShortBytes => "short_bytes",
            Self::HugeBytesAtMount => "huge_bytes_at_mount",
            Self::PagesTotalOn { node } => return Cow::Owned(format!("pages_total_node{node}")),
            Self::PagesFreeOn { node } => return Cow::Owned(format!("pages_free_node{node}")),
            Self::PagesUsedOn { node } => return Cow::Owned(format!("pages_used_node{node}")),
            Self::ReserveBytes { node } => return Cow::Owned(format!("reserve_bytes_node{node}")),
            Self::Objects => "objects",
            Self::FilesUnavailable => "files_unavailable",
            Self::Orphans => "orphans",
            Self::PunchedBytes => "punched_bytes",
            Self::QuarantinedSoft => "quarantined_soft",
            Self::QuarantinedHw => "quarantined_hw",
            Self::FramesGivenUp => "frames_given_up",
            Self::OpenedNatively => "opened_natively",
            Self::MemoryOpen => "memory_open",
            Self::LogLinesDropped => "log_lines_dropped",
            Self::HolesShutAgain => "holes_shut_again",
            Self::DaemonPid => "daemon_pid",
            Self::WorkerPid => "worker_pid",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_readme_has_each_attribute() {
        let readme = include_str!("../README.md");
        let documented: Vec<Vec<&str>> = readme
            .lines()
            .map(|line| line.split(" | ").map(|cell| cell.trim_matches(['|', ' ', '`'])).collect())
            .filter(|cells: &Vec<&str>| cells.len() > 3 && is_of_interface(cells[0].as_bytes()))
            .collect();
        let offered: Vec<&Row> = TABLE.iter().filter(|row| !row.only_for_tests).collect();
        let names = |row: &&Row| row.name;
        assert!(
            offered.iter().map(names).eq(documented.iter().map(|cells| cells[0])),
            "{documented:?}"
        );
        for (row, cells) in offered.iter().zip(&documented) {
            let place = match row.attribute {
                File(_) => "file",
                Entry(_) => "file, directory",
                Root(_) => "root",
            };
            assert_eq!(cells[1], place, "{}", row.name);
            assert_eq!(cells[2] != "-", row.get.is_some(), "{}: {}", row.name, cells[2]);
            assert_eq!(cells[cells.len() - 1] != "-", row.set.is_some(), "{}: {cells:?}", row.name);
        }
    }

    #[test]
    fn every_name_of_the_table_belongs_to_the_interface_once() {
        for row in TABLE {
            assert!(is_of_interface(row.name.as_bytes()), "{}", row.name);
            assert_eq!(
                TABLE.iter().filter(|other| other.name == row.name).count(),
                1,
                "{}",
                row.name
            );
            assert!(row.get.is_some() || row.set.is_some(), "{} does nothing", row.name);
        }
        assert!(!is_of_interface(b"user.hugetlb2"), "users may have that one");
    }
}
