//! Creating files as another user (setfsuid(2), umask(2), credentials(7)).
//!
//! A new file of the index must belong to the caller from its first moment. Its mode must be the
//! one that the kernel computes from umask, set-group-ID directory and default ACL. So the worker
//! thread takes the caller's identity for the call. The thread keeps its capabilities
//! (`SECBIT_NO_SETUID_FIXUP`), because the kernel has already checked the permissions before it
//! sent the request, with supplementary groups that the worker does not know.

use crate::error::Result;
use rustix::fs::Mode;
use rustix::thread::{CapabilitiesSecureBits, CapabilitySet, UnshareFlags};
use std::cell::Cell;

/// The user of a request, as FUSE tells.
#[derive(Clone, Copy, Debug)]
pub struct Caller {
    /// Filesystem user id.
    pub uid: u32,
    /// Filesystem group id.
    pub gid: u32,
    /// File mode creation mask.
    pub umask: u32,
}

/// The user of a request whose result depends on all groups of the calling process.
#[derive(Clone, Copy, Debug)]
pub struct Member {
    /// Filesystem user id.
    pub uid: u32,
    /// Filesystem group id.
    pub gid: u32,
    /// The calling process or thread. FUSE tells no other group than `gid`.
    pub pid: u32,
}

impl Member {
    /// True if the caller may set the set-group-ID bit of a file of the group `gid`. If /proc does
    /// not show the process, its supplementary groups count as none.
    pub fn may_set_group_id(self, gid: u32) -> bool {
        self.uid == 0 || self.gid == gid || supplementary_groups(self.pid).contains(&gid)
    }
}

/// The supplementary groups of `pid` (proc(5), status). None if /proc does not show the process.
fn supplementary_groups(pid: u32) -> Vec<u32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let groups = status.lines().find_map(|line| line.strip_prefix("Groups:")).unwrap_or_default();
    groups.split_ascii_whitespace().filter_map(|group| group.parse().ok()).collect()
}

thread_local! {
    static OWN_UMASK: Cell<bool> = const { Cell::new(false) };
}

/// The capabilities that the daemon needs (capabilities(7)): to mount, to open files by handle, to
/// act for any user on any file, and to keep its capabilities meanwhile.
const NEEDED: [(CapabilitySet, &str); 9] = [
    (CapabilitySet::SYS_ADMIN, "CAP_SYS_ADMIN"),
    (CapabilitySet::DAC_READ_SEARCH, "CAP_DAC_READ_SEARCH"),
    (CapabilitySet::DAC_OVERRIDE, "CAP_DAC_OVERRIDE"),
    (CapabilitySet::CHOWN, "CAP_CHOWN"),
    (CapabilitySet::FOWNER, "CAP_FOWNER"),
    (CapabilitySet::FSETID, "CAP_FSETID"),
    (CapabilitySet::SETUID, "CAP_SETUID"),
    (CapabilitySet::SETGID, "CAP_SETGID"),
    (CapabilitySet::SETPCAP, "CAP_SETPCAP"),
];

/// The needed capabilities that this process does not have.
///
/// # Errors
/// The errors of capget(2).
pub fn missing_capabilities() -> Result<Vec<&'static str>> {
    let held = rustix::thread::capabilities(None)?.effective;
    Ok(NEEDED.iter().filter(|(needed, _)| !held.contains(*needed)).map(|(_, name)| *name).collect())
}

/// Makes capabilities survive a change of the filesystem user id. The caller does this once, before
/// it starts threads.
///
/// # Errors
/// EPERM without CAP_SETPCAP.
pub fn keep_capabilities_across_fsuid() -> Result<()> {
    Ok(rustix::thread::set_capabilities_secure_bits(CapabilitiesSecureBits::NO_SETUID_FIXUP)?)
}

/// Runs `create` with the filesystem identity and the umask of the caller, in this thread only.
///
/// # Errors
/// The errors of `create`. EPERM if the thread cannot have a umask of its own.
pub fn acting_as<T>(caller: Caller, create: impl FnOnce() -> Result<T>) -> Result<T> {
    if !OWN_UMASK.get() {
        give_thread_its_own_umask()?;
        OWN_UMASK.set(true);
    }
    struct Restore(Mode);
    impl Drop for Restore {
        fn drop(&mut self) {
            set_identity(0, 0);
            rustix::process::umask(self.0);
        }
    }
    let _restore = Restore(rustix::process::umask(Mode::from_raw_mode(caller.umask)));
    set_identity(caller.uid, caller.gid);
    create()
}

/// All threads of a process share umask and working directory, until a thread leaves (unshare(2)).
fn give_thread_its_own_umask() -> Result<()> {
    // SAFETY: leaving CLONE_FS affects neither descriptors nor memory; nothing here uses the
    // working directory.
    #[allow(unsafe_code)]
    Ok(unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }?)
}

/// Sets the filesystem user and group of the calling thread only. For root, the calls cannot fail.
fn set_identity(uid: u32, gid: u32) {
    // SAFETY: the calls use no memory.
    #[allow(unsafe_code)]
    unsafe {
        libc::setfsgid(gid);
        libc::setfsuid(uid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documents_have_each_capability() {
        let operations = include_str!("../../docs/OPERATIONS.md");
        let names: Vec<&str> = NEEDED.iter().map(|(_, name)| *name).collect();
        assert!(operations.contains(&format!("\n| mounting | {} |\n", names.join(", "))));
    }
}
