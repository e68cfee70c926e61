//! Creating files as somebody else (setfsuid(2), umask(2), credentials(7)).
//!
//! What the index creates must belong to the caller from the first moment it can be seen, with the mode that the
//! kernel works out from umask, set-gid directory and default ACL. So the worker thread takes the caller's identity
//! for the call. Its capabilities stay (`SECBIT_NO_SETUID_FIXUP`): permissions were checked by the kernel before the
//! request was sent, with groups that we do not know.

use crate::error::Result;
use rustix::fs::Mode;
use rustix::thread::{CapabilitiesSecureBits, CapabilitySet, UnshareFlags};
use std::cell::Cell;

/// Who asks, as FUSE tells.
#[derive(Clone, Copy, Debug)]
pub struct Caller {
    /// Filesystem user id.
    pub uid: u32,
    /// Filesystem group id.
    pub gid: u32,
    /// File mode creation mask.
    pub umask: u32,
}

impl Caller {
    /// The daemon itself.
    pub const ROOT: Self = Self { uid: 0, gid: 0, umask: 0 };
}

/// Who asks, for what depends on all the groups of a process.
#[derive(Clone, Copy, Debug)]
pub struct Member {
    /// Filesystem user id.
    pub uid: u32,
    /// Filesystem group id.
    pub gid: u32,
    /// Its process, or thread; FUSE tells of no other groups than `gid`.
    pub pid: u32,
}

impl Member {
    /// Whether set-group-id of a file of the group `gid` is for it to give. Not where the process cannot be seen from here.
    pub fn may_set_group_id(self, gid: u32) -> bool {
        self.uid == 0 || self.gid == gid || supplementary_groups(self.pid).contains(&gid)
    }
}

/// Those of `pid` (proc(5), status); none if it cannot be seen.
fn supplementary_groups(pid: u32) -> Vec<u32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let groups = status.lines().find_map(|line| line.strip_prefix("Groups:")).unwrap_or_default();
    groups.split_ascii_whitespace().filter_map(|group| group.parse().ok()).collect()
}

thread_local! {
    static OWN_UMASK: Cell<bool> = const { Cell::new(false) };
}

/// Capabilities that the daemon cannot do without (capabilities(7)): to mount, to open files by handle, to act for any
/// user on any file, and to keep its capabilities meanwhile.
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

/// Those of the capabilities that the daemon needs which this process does not have.
///
/// # Errors
/// What capget(2) answers.
pub fn missing_capabilities() -> Result<Vec<&'static str>> {
    let held = rustix::thread::capabilities(None)?.effective;
    Ok(NEEDED.iter().filter(|(needed, _)| !held.contains(*needed)).map(|(_, name)| *name).collect())
}

/// Keeps capabilities across changes of the filesystem uid. Call once, before threads are started.
///
/// # Errors
/// EPERM without CAP_SETPCAP.
pub fn keep_capabilities_across_fsuid() -> Result<()> {
    Ok(rustix::thread::set_capabilities_secure_bits(CapabilitiesSecureBits::NO_SETUID_FIXUP)?)
}

/// Runs `create` with the calling thread's filesystem identity and umask set to the caller's.
///
/// # Errors
/// Those of `create`, and EPERM where the thread cannot have a umask of its own.
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

/// umask(2) and the working directory are shared by all threads of a process until one leaves (unshare(2)).
fn give_thread_its_own_umask() -> Result<()> {
    // SAFETY: leaving CLONE_FS affects neither descriptors nor memory; nothing here uses the working directory.
    #[allow(unsafe_code)]
    Ok(unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }?)
}

/// The calling thread's filesystem uid and gid; both calls are per thread and cannot fail for root.
fn set_identity(uid: u32, gid: u32) {
    // SAFETY: no memory is involved.
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
