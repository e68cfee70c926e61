//! Limits of memory cgroups (cgroups(7); Documentation/admin-guide/cgroup-v2.rst and
//! cgroup-v1/memory.rst).
//!
//! If a process takes memory beyond the limit of its cgroup, or of an ancestor, the kernel's OOM
//! killer ends a process of that cgroup. So the daemon reads the limits before it takes memory.

use std::fmt;
use std::fs::read_to_string;
use std::path::{Path, PathBuf};

/// Memory that the daemon leaves free in a cgroup: more than its own processes need.
const MARGIN: u64 = 16 << 20;

/// A number of this size or more means that there is no limit.
const UNLIMITED: u64 = 1 << 62;

/// The limit of one cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limit {
    /// The name of the file that contains the limit.
    pub file: &'static str,
    /// The path of the cgroup, as in /proc/PID/cgroup.
    pub cgroup: PathBuf,
    /// Bytes that the processes of the cgroup may have.
    pub bytes: u64,
    /// Bytes that they have now, without the page cache, which the kernel gives up first.
    pub used: u64,
}

impl Limit {
    /// Bytes that the daemon can take without touching the margin.
    pub fn room(&self) -> u64 {
        self.bytes.saturating_sub(self.used).saturating_sub(MARGIN)
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (file, cgroup) = (self.file, self.cgroup.display());
        write!(
            f,
            "{file} of the cgroup {cgroup} allows {} bytes, of which {} are in use",
            self.bytes, self.used
        )
    }
}

/// One of the two versions of the interface.
#[derive(Debug, PartialEq, Eq)]
struct Version {
    limit: &'static str,
    usage: &'static str,
    /// The lines of memory.stat that count page cache.
    cache: [&'static str; 2],
}

const V1: Version = Version {
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    cache: ["total_inactive_file", "total_active_file"],
};
const V2: Version = Version {
    limit: "memory.max",
    usage: "memory.current",
    cache: ["inactive_file", "active_file"],
};

/// A mount of a hierarchy that may have a memory controller.
#[derive(Debug, PartialEq, Eq)]
struct Hierarchy {
    version: &'static Version,
    /// The cgroup at the root of the mount.
    root: PathBuf,
    mount_point: PathBuf,
}

/// The mount points of hierarchies with a memory controller, in the mount namespace of this
/// process.
pub fn mount_points() -> Vec<PathBuf> {
    let mounts = read_to_string("/proc/self/mountinfo").unwrap_or_default();
    hierarchies(&mounts).map(|hierarchy| hierarchy.mount_point).collect()
}

/// The limit that leaves the least room to `process` (a process id, or `self`). None if nothing
/// limits the process, or if this process's mount namespace has no hierarchy.
pub fn tightest_limit(process: &str) -> Option<Limit> {
    let memberships = read_to_string(format!("/proc/{process}/cgroup")).ok()?;
    let mounts = read_to_string("/proc/self/mountinfo").ok()?;
    limits(&memberships, &mounts).into_iter().min_by_key(Limit::room)
}

/// The limits of a process's cgroups and of all their ancestors. `memberships` is its
/// /proc/PID/cgroup, and `mounts` a /proc/PID/mountinfo.
fn limits(memberships: &str, mounts: &str) -> Vec<Limit> {
    let mut limits = Vec::new();
    for hierarchy in hierarchies(mounts) {
        let Some(cgroup) = membership(memberships, hierarchy.version) else { continue };
        // A process may be outside of the mount's root (bind mount, cgroup namespace). Then, of
        // this mount, only the root can limit it.
        let inside = cgroup.strip_prefix(&hierarchy.root).unwrap_or(Path::new(""));
        let ancestors = inside.ancestors();
        limits.extend(ancestors.filter_map(|ancestor| hierarchy.limit_of(ancestor)));
    }
    limits
}

/// The hierarchies in the text of a mountinfo (proc_pid_mountinfo(5)).
fn hierarchies(mounts: &str) -> impl Iterator<Item = Hierarchy> {
    mounts.lines().filter_map(|line| {
        let (mount, superblock) = line.split_once(" - ")?;
        let mut superblock = superblock.split(' ');
        let version = match (superblock.next()?, superblock.nth(1)?) {
            ("cgroup2", _) => &V2,
            ("cgroup", options) if options.split(',').any(|option| option == "memory") => &V1,
            _ => return None,
        };
        let mut fields = mount.split(' ').skip(3).map(unescape);
        Some(Hierarchy { version, root: fields.next()?.into(), mount_point: fields.next()?.into() })
    })
}

/// Decodes a field of mountinfo. The kernel writes some characters as octal numbers; of these, only
/// the space is usual in names.
fn unescape(field: &str) -> String {
    field.replace("\\040", " ")
}

/// The cgroup of a process in a hierarchy. Each line of /proc/PID/cgroup has the form
/// `4:memory:/a/b` or `0::/a/b`.
fn membership<'a>(memberships: &'a str, version: &Version) -> Option<&'a Path> {
    memberships.lines().find_map(|line| {
        let (controllers, cgroup) = line.split_once(':')?.1.split_once(':')?;
        let is_it = match version {
            &V2 => controllers.is_empty(),
            _ => controllers.split(',').any(|controller| controller == "memory"),
        };
        is_it.then_some(Path::new(cgroup))
    })
}

impl Hierarchy {
    /// The limit of one cgroup. None if the cgroup has no limit, or no memory controller.
    fn limit_of(&self, cgroup: &Path) -> Option<Limit> {
        let directory = self.mount_point.join(cgroup);
        let number =
            |file: &str| read_to_string(directory.join(file)).ok()?.trim().parse::<u64>().ok();
        // Without a limit, the file of version 2 contains "max", which is no number. The file of
        // version 1 contains the largest number of whole pages.
        let bytes = number(self.version.limit).filter(|bytes| *bytes < UNLIMITED)?;
        let stat = read_to_string(directory.join("memory.stat")).unwrap_or_default();
        let cache: u64 = self.version.cache.iter().filter_map(|name| row(&stat, name)).sum();
        let used = number(self.version.usage)?.saturating_sub(cache);
        Some(Limit { file: self.version.limit, cgroup: self.root.join(cgroup), bytes, used })
    }
}

fn row(stat: &str, name: &str) -> Option<u64> {
    stat.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{create_dir_all, write};

    const MIB: u64 = 1 << 20;

    /// A directory that stands for a hierarchy, and its line in mountinfo.
    fn hierarchy(kind: &str, root: &str) -> (tempfile::TempDir, String) {
        let directory = tempfile::tempdir().unwrap();
        let mount_point = directory.path().display().to_string();
        (directory, format!("35 31 0:32 {root} {mount_point} rw,relatime - {kind}\n"))
    }

    fn set(directory: &Path, version: &Version, limit: &str, used: u64, cache: u64) {
        create_dir_all(directory).unwrap();
        write(directory.join(version.limit), format!("{limit}\n")).unwrap();
        write(directory.join(version.usage), format!("{used}\n")).unwrap();
        let stat = format!(
            "anon 5\n{} {}\n{} {}\n",
            version.cache[0],
            cache / 2,
            version.cache[1],
            cache / 2
        );
        write(directory.join("memory.stat"), stat).unwrap();
    }

    #[test]
    fn the_limit_of_every_ancestor_counts_in_version_2() {
        let (directory, mounts) = hierarchy("cgroup2 cgroup2 rw", "/");
        create_dir_all(directory.path().join("a/b")).unwrap(); // the root has no limit
        set(&directory.path().join("a"), &V2, &(64 * MIB).to_string(), 50 * MIB, 10 * MIB);
        set(&directory.path().join("a/b"), &V2, "max", 40 * MIB, 0);
        let found = limits("4:cpu:/x\n0::/a/b\n", &mounts);
        let meant =
            Limit { file: "memory.max", cgroup: "/a".into(), bytes: 64 * MIB, used: 40 * MIB };
        assert_eq!(found, [meant]);
        assert_eq!(found[0].room(), 8 * MIB);
        let said = found[0].to_string();
        assert_eq!(
            said,
            "memory.max of the cgroup /a allows 67108864 bytes, of which 41943040 are in use"
        );
    }

    #[test]
    fn the_limit_of_every_ancestor_counts_in_version_1() {
        let (directory, mounts) = hierarchy("cgroup cgroup rw,memory", "/");
        set(directory.path(), &V1, "9223372036854771712", 0, 0);
        set(&directory.path().join("a"), &V1, "100", 60, 0);
        set(&directory.path().join("a/b"), &V1, "200", 10, 0);
        let mut found = limits("5:cpu,cpuacct:/\n4:memory:/a/b\n0::/z\n", &mounts);
        found.sort_by_key(|limit| limit.bytes);
        let bytes: Vec<_> =
            found.iter().map(|limit| (limit.cgroup.to_str().unwrap(), limit.bytes)).collect();
        assert_eq!(bytes, [("/a", 100), ("/a/b", 200)], "the root has no limit");
    }

    #[test]
    fn a_cgroup_is_found_below_the_root_of_a_mount() {
        let (directory, mounts) = hierarchy("cgroup2 cgroup2 rw", "/docker/1");
        set(&directory.path().join("a"), &V2, "100", 60, 0);
        assert_eq!(limits("0::/docker/1/a\n", &mounts)[0].cgroup, Path::new("/docker/1/a"));
        assert_eq!(limits("0::/elsewhere\n", &mounts), [], "the root of the mount has no limit");
    }

    #[test]
    fn a_mount_without_a_memory_controller_limits_nothing() {
        let mounts =
            "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n1 2 3 / / rw - ext4 x rw\n";
        assert_eq!(hierarchies(mounts).count(), 0);
        let (directory, mounts) = hierarchy("cgroup2 cgroup2 rw", "/");
        create_dir_all(directory.path().join("a")).unwrap();
        assert_eq!(limits("0::/a\n", &mounts), []);
    }
}
