//! Memory policies: which NUMA node new memory comes from (numa(7), set_mempolicy(2), mbind(2)).
//!
//! A policy of a range of a tmpfs file belongs to the file: whoever maps the range can set it, and the kernel obeys it for all
//! memory that the range gets, whoever asks for that. It comes before the policy of the thread (mm/shmem.c,
//! shmem_get_pgoff_policy, Linux 6.18).

use super::sigbus::Mapping;
use crate::error::{Error, Result};
use crate::units::Range;
use rustix::io::Errno;

/// Where new memory comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// As if none had been set (MPOL_DEFAULT). For a range: where the thread wants it to; for a thread: as for [`Policy::Local`].
    Default,
    /// Near the processor, unless that node is full (MPOL_LOCAL).
    Local,
    /// From this node, and from others where it is full (MPOL_PREFERRED).
    Prefer(u32),
    /// From this node only (MPOL_BIND). Where that is full, the kernel has its OOM killer free some.
    Bind(u32),
}

const MAX_NODES: usize = 1024; // MAX_NUMNODES of every distribution's kernel or more

type Mask = [u64; MAX_NODES / 64];

impl Policy {
    fn mode(self) -> libc::c_int {
        match self {
            Self::Default => libc::MPOL_DEFAULT,
            Self::Local => libc::MPOL_LOCAL,
            Self::Prefer(_) => libc::MPOL_PREFERRED,
            Self::Bind(_) => libc::MPOL_BIND,
        }
    }

    fn nodes(self) -> Result<Mask> {
        let mut mask = [0; MAX_NODES / 64];
        if let Self::Prefer(node) | Self::Bind(node) = self {
            *mask.get_mut(node as usize / 64).ok_or(Error::Os(Errno::INVAL))? |= 1 << (node % 64);
        }
        Ok(mask)
    }
}

/// Has the calling thread take new memory so (set_mempolicy(2)).
///
/// # Errors
/// EINVAL for a node that is not there, or that the process's cpuset does not allow.
pub fn set_for_thread(policy: Policy) -> Result<()> {
    let mask = policy.nodes()?;
    // SAFETY: the mask is alive for the call and has the number of bits that is named (the kernel reads one less).
    #[allow(unsafe_code)]
    let result =
        unsafe { libc::syscall(libc::SYS_set_mempolicy, policy.mode(), mask.as_ptr(), MAX_NODES + 1) };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error().into()) }
}

/// Has the mapped file take new memory so for `length` bytes of a mapping from `address` on; memory that is there stays (mbind(2)).
///
/// # Errors
/// As for [`set_for_thread`], and ENOMEM.
pub(super) fn set_for_range(address: *mut u8, length: usize, policy: Policy) -> Result<()> {
    let mask = policy.nodes()?;
    // SAFETY: as above. The call changes no byte, and no mapping: the kernel refuses a range that is not mapped.
    #[allow(unsafe_code)]
    let result = unsafe {
        libc::syscall(libc::SYS_mbind, address, length, policy.mode(), mask.as_ptr(), MAX_NODES + 1, 0)
    };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error().into()) }
}

impl Mapping {
    /// Has the mapped file take new memory for `range` so.
    ///
    /// # Errors
    /// What mbind(2) answers.
    pub fn set_policy(&self, range: Range, policy: Policy) -> Result<()> {
        set_for_range(self.pointer(range.start), range.len() as usize, policy)
    }
}
