//! The system calls. One function makes one call. This module has the only `unsafe` of the project.
//!
//! Descriptors are owned types. An errno becomes its meaning ([`Error::Full`], [`Error::Busy`])
//! where the call is made. Calls that rustix offers are wrapped only where an errno has such a
//! meaning.

pub mod allocator;
pub mod calls;
pub mod cgroup;
pub mod handle;
pub mod identity;
pub mod mapping;
pub mod mounts;
pub mod namespace;
pub mod policy;
pub mod process;
pub mod processors;
pub mod seccomp;
pub mod shortage;
pub mod sigbus;
pub mod tmpfs;
pub mod userfault;

use crate::error::Error;
use crate::faults::{Want, attempt};
use rustix::io::Errno;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::{SystemTime, UNIX_EPOCH};

/// The meaning of an errno of tmpfs, from a call that takes memory.
fn meaning(errno: Errno) -> Error {
    match errno {
        Errno::NOSPC => Error::Full,
        Errno::NOMEM => Error::NoMemory,
        // tmpfs answers EIO for one reason only (mm/shmem.c, folio_test_hwpoison).
        Errno::HWPOISON | Errno::IO => Error::Quarantined,
        other => Error::Os(other),
    }
}

/// Repeats a call that a signal interrupted.
fn uninterrupted<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    loop {
        match call() {
            Err(Errno::INTR) => continue,
            result => return result,
        }
    }
}

/// A path to the file of `fd`, for every mode in which `fd` may be open (proc(5), /proc/self/fd).
pub fn fd_path(fd: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// Takes over a descriptor that the parent process left open for this process. The children of this
/// process do not get it.
///
/// # Errors
/// EBADF where no descriptor has this number; [`Error::Invalid`] for standard input, output or
/// error.
pub fn inherited(fd: RawFd) -> Result<OwnedFd, Error> {
    if fd <= 2 {
        return Err(Error::invalid("standard input, output and error are not handed over"));
    }
    // SAFETY: the number only reaches F_SETFD, which refuses a number that is not open.
    #[allow(unsafe_code)]
    let result = unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
    if result != 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    // SAFETY: the descriptor is open, and the caller says that this process has no other owner of
    // it.
    #[allow(unsafe_code)]
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Closes every descriptor from 3 on, except `kept` (close_range(2), Linux 5.9). A process calls
/// this at its start, before it opens a descriptor: it has no use for those that its parent left
/// open.
///
/// # Errors
/// ENOSYS.
pub fn close_all_but(kept: &mut [RawFd]) -> Result<(), Error> {
    kept.sort_unstable();
    let mut first = 3;
    for end in kept.iter().map(|fd| i64::from(*fd)).chain([i64::from(u32::MAX) + 1]) {
        if first < end {
            // SAFETY: the caller says that no object of this process owns a descriptor of this
            // range.
            #[allow(unsafe_code)]
            let result = unsafe { libc::syscall(libc::SYS_close_range, first, end - 1, 0) };
            if result != 0 {
                return Err(std::io::Error::last_os_error().into());
            }
        }
        first = first.max(end + 1);
    }
    Ok(())
}

/// Makes the kernel drop a file that a FUSE server gave it for passthrough
/// (FUSE_DEV_IOC_BACKING_CLOSE, Linux 6.9).
///
/// # Errors
/// ENOENT where `number` is no backing number.
pub fn close_backing(device: impl AsFd, number: u32) -> Result<(), Error> {
    const BACKING_CLOSE: libc::Ioctl = 0x4004_e502u32 as libc::Ioctl; // _IOW(229, 2, uint32_t)
    // SAFETY: the kernel reads four bytes from `number`.
    #[allow(unsafe_code)]
    let result = unsafe { libc::ioctl(device.as_fd().as_raw_fd(), BACKING_CLOSE, &raw const number) };
    if result < 0 { Err(std::io::Error::last_os_error().into()) } else { Ok(()) }
}

/// Seconds since the epoch.
pub fn unix_time() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// Bytes that stay with the machine when memory is taken from it.
pub const MARGIN: u64 = 64 << 20;

/// Refuses `bytes` that cannot be taken now with a margin left: from the machine, from the NUMA
/// nodes that this process's cpuset allows, or within the limits of its cgroup. To take them would
/// be the end of other processes, or of this one.
///
/// # Errors
/// [`Error::NoMemory`] is the refusal. Another error means that /proc is not mounted.
pub fn refuse_more_than_available(bytes: u64) -> Result<(), Error> {
    let wanted = bytes.saturating_add(MARGIN);
    if memory_available()? < wanted {
        return Err(Error::NoMemory);
    }
    if let Some((nodes, available)) = available_in_cpuset()?
        && available < wanted
    {
        log::warn!(
            "{bytes} bytes are refused: the cpuset allows the NUMA nodes {nodes:?}, with {available} bytes"
        );
        return Err(Error::NoMemory);
    }
    match cgroup::tightest_limit("self") {
        Some(limit) if limit.room() < bytes => {
            log::warn!("{bytes} bytes are refused: {limit}");
            Err(Error::NoMemory)
        }
        _ => Ok(()),
    }
}

/// Bytes that the kernel can give without swapping (MemAvailable, proc(5)).
///
/// # Errors
/// If /proc is not mounted or has no such line.
pub fn memory_available() -> Result<u64, Error> {
    meminfo("MemAvailable:")
}

/// The machine's memory (MemTotal, proc(5)), in bytes.
///
/// # Errors
/// If /proc is not mounted or has no such line.
pub fn memory_total() -> Result<u64, Error> {
    meminfo("MemTotal:")
}

/// Checks that tmpfs may have 2 MiB folios on this machine
/// (Documentation/admin-guide/mm/transhuge.rst).
///
/// # Errors
/// [`Error::Invalid`], which names the setting to change.
pub fn huge_tmpfs_allowed() -> Result<(), Error> {
    const SWITCH: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
    match std::fs::read_to_string(SWITCH) {
        Ok(text) if text.contains("[deny]") => {
            Err(Error::invalid(format!("huge pages are denied to tmpfs: write never or advise to {SWITCH}")))
        }
        Ok(_) => Ok(()),
        Err(_) => {
            Err(Error::invalid("this kernel lacks transparent huge pages (CONFIG_TRANSPARENT_HUGEPAGE)"))
        }
    }
}

fn meminfo(name: &str) -> Result<u64, Error> {
    attempt(Want::Descriptor)?;
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let kib: Option<u64> = text
        .lines()
        .find_map(|line| line.strip_prefix(name))
        .and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse().ok());
    kib.map(|kib| kib * 1024).ok_or_else(|| Error::Corrupt(format!("/proc/meminfo has no {name}")))
}

/// The NUMA nodes that have memory (/sys/devices/system/node/has_memory) and that this process's
/// cpuset allows (cpuset(7), Mems_allowed_list), ascending. Never empty.
///
/// # Errors
/// If /proc or /sys is not mounted, or if a list does not parse.
pub fn memory_nodes() -> Result<Vec<u32>, Error> {
    let nodes = all_memory_nodes()?;
    let status = std::fs::read_to_string("/proc/self/status")?;
    let allowed = status.lines().find_map(|line| line.strip_prefix("Mems_allowed_list:"));
    allowed_of(&nodes, allowed).ok_or_else(|| Error::Corrupt(format!("of nodes {nodes:?}: {allowed:?}")))
}

/// The NUMA nodes that have memory.
fn all_memory_nodes() -> Result<Vec<u32>, Error> {
    let Ok(text) = std::fs::read_to_string("/sys/devices/system/node/has_memory") else {
        return Ok(vec![0]); // a kernel without CONFIG_NUMA
    };
    parse_node_list(text.trim()).ok_or_else(|| Error::Corrupt(format!("node list {text:?}")))
}

/// The nodes that this process's cpuset allows, and the bytes that they can give. `None` where the
/// cpuset allows every node.
///
/// # Errors
/// Those of [`memory_nodes`] and [`memory_available_on`].
pub fn available_in_cpuset() -> Result<Option<(Vec<u32>, u64)>, Error> {
    let (allowed, all) = (memory_nodes()?, all_memory_nodes()?);
    if allowed == all {
        return Ok(None);
    }
    let available = allowed.iter().map(|node| memory_available_on(*node)).sum::<Result<u64, Error>>()?;
    Ok(Some((allowed, available)))
}

/// The part of `nodes` that is in the list `allowed`, or all if there is no list (no
/// CONFIG_CPUSETS). `None` where no node is left, or where the list does not parse.
fn allowed_of(nodes: &[u32], allowed: Option<&str>) -> Option<Vec<u32>> {
    let Some(allowed) = allowed else { return Some(nodes.to_vec()) };
    let allowed = parse_node_list(allowed.trim())?;
    let nodes: Vec<_> = nodes.iter().copied().filter(|node| allowed.contains(node)).collect();
    (!nodes.is_empty()).then_some(nodes)
}

/// About the bytes that a NUMA node can give without swapping
/// (/sys/devices/system/node/nodeN/meminfo): its free memory and half of its page cache, as the
/// kernel keeps some of that.
///
/// # Errors
/// If /sys is not mounted or has no such lines.
pub fn memory_available_on(node: u32) -> Result<u64, Error> {
    attempt(Want::Descriptor)?;
    let text = std::fs::read_to_string(format!("/sys/devices/system/node/node{node}/meminfo"))?;
    available_on(&text).ok_or_else(|| Error::Corrupt(format!("the meminfo of node {node} has no MemFree")))
}

/// Computes [`memory_available_on`] from the text of that file. Each line is `Node N NAME: NUMBER
/// kB`.
fn available_on(meminfo: &str) -> Option<u64> {
    let kib = |name: &str| {
        let mut lines = meminfo.lines().map(|line| line.split_ascii_whitespace().skip(2));
        lines.find_map(|mut words| (words.next()? == name).then(|| words.next()?.parse::<u64>().ok())?)
    };
    let cache = kib("Active(file):")? + kib("Inactive(file):")?;
    Some((kib("MemFree:")? + cache / 2) << 10)
}

/// Memory errors that the kernel has handled since it started, in all NUMA nodes (Linux 6.3,
/// /sys/devices/system/node/node*/memory_failure/total). `None` where the kernel cannot handle them
/// (no CONFIG_MEMORY_FAILURE).
pub fn memory_failures() -> Option<u64> {
    let nodes = memory_nodes().ok()?;
    let total =
        |node| std::fs::read_to_string(format!("/sys/devices/system/node/node{node}/memory_failure/total"));
    nodes.into_iter().map(|node| total(node).ok()?.trim().parse::<u64>().ok()).sum()
}

/// Parses the kernel's list format, `0-2,5`.
fn parse_node_list(text: &str) -> Option<Vec<u32>> {
    let mut nodes = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        nodes.extend(first..=last);
    }
    (!nodes.is_empty()).then_some(nodes)
}

#[cfg(test)]
mod tests {
    #[test]
    fn node_lists_are_read_as_the_kernel_writes_them() {
        assert_eq!(super::parse_node_list("0"), Some(vec![0]));
        assert_eq!(super::parse_node_list("0-2,5"), Some(vec![0, 1, 2, 5]));
        assert_eq!(super::parse_node_list(""), None);
    }

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
            assert_eq!(super::allowed_of(nodes, allowed).as_deref(), left, "{nodes:?} {allowed:?}");
        }
    }

    #[test]
    fn what_a_node_can_give_is_read_as_the_kernel_writes_it() {
        let text = "\nNode 1 MemTotal:   524288 kB\nNode 1 MemFree:    27140 kB\nNode 1 Active:  9 kB\n\
            Node 1 Active(file):     100 kB\nNode 1 Inactive(file):    2000 kB\n";
        assert_eq!(super::available_on(text), Some((27140 + 1050) << 10));
        assert_eq!(super::available_on("Node 1 MemFree: 5 kB\n"), None);
        let machine = super::memory_total().unwrap();
        for node in super::memory_nodes().unwrap() {
            let there = super::memory_available_on(node).unwrap();
            assert!(0 < there && there <= machine, "{there} bytes on node {node} of a machine of {machine}");
        }
    }
}
