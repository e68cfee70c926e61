//! The system calls. One function makes one call. This module has the only `unsafe` of the
//! programs.
//!
//! Descriptors are owned types. An errno becomes its meaning ([`Error::Full`], [`Error::Busy`])
//! where the call is made. Calls that rustix offers are wrapped only where an errno has such a
//! meaning.

pub mod allocator;
pub mod backing;
pub mod callers;
pub mod calls;
pub mod cgroup;
pub mod handle;
pub mod identity;
pub mod mapping;
pub mod markers;
pub mod memory_texts;
pub mod mounts;
pub mod namespace;
pub mod numa;
mod pagemap;
pub mod passing;
pub mod policy;
pub mod process;
pub mod processors;
pub mod seccomp;
pub mod shortage;
pub mod sigbus;
pub mod thread;
pub mod tmpfs;
pub mod topology;

use crate::error::Error;
use crate::faults::{Want, attempt};
use crate::units::NumaNode;
use rustix::io::Errno;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::OnceLock;
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
    if let Some((nodes, available)) = numa::available_in_cpuset()?
        && available < wanted
    {
        log::warn!(
            "{bytes} bytes are refused: the cpuset allows the NUMA nodes {}, with {available} bytes",
            NumaNode::list(&nodes)
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
        Ok(text) if text.contains("[deny]") => Err(Error::invalid(format!(
            "huge pages are denied to tmpfs: write never or advise to {SWITCH}"
        ))),
        Ok(_) => Ok(()),
        Err(_) => Err(Error::invalid(
            "this kernel lacks transparent huge pages (CONFIG_TRANSPARENT_HUGEPAGE)",
        )),
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

/// Memory errors that the kernel has handled since it started, in all NUMA nodes that had memory
/// when this process asked first (Linux 6.3,
/// /sys/devices/system/node/node*/memory_failure/total). `None` where the kernel cannot handle them
/// (no CONFIG_MEMORY_FAILURE).
pub fn memory_failures() -> Option<u64> {
    static NODES: OnceLock<Vec<NumaNode>> = OnceLock::new();
    let nodes = match NODES.get() {
        Some(known) => known,
        None => {
            let found = numa::memory_nodes().ok()?;
            NODES.get_or_init(|| found)
        }
    };
    let total = |node| {
        std::fs::read_to_string(format!("/sys/devices/system/node/node{node}/memory_failure/total"))
    };
    nodes.iter().map(|node| total(node).ok()?.trim().parse::<u64>().ok()).sum()
}
