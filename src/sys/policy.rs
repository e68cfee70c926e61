//! Memory policies: the NUMA node from which new memory comes (numa(7), set_mempolicy(2),
//! mbind(2)).
//!
//! A policy of a range of a tmpfs file belongs to the file. Any process that maps the range can set
//! it. The kernel obeys it for all memory that the range gets, whichever process asks for the
//! memory. The policy of the range comes before the policy of the thread (mm/shmem.c,
//! shmem_get_pgoff_policy, Linux 6.18).

use crate::error::{Error, Result};
use crate::units::NumaNode;
use rustix::io::Errno;

/// The source of new memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// As if no policy was set (MPOL_DEFAULT). A range follows the thread's policy. A thread
    /// behaves as with [`Policy::Local`].
    Default,
    /// Near the processor, unless that node is full (MPOL_LOCAL).
    Local,
    /// From this node, and from others where it is full (MPOL_PREFERRED).
    Prefer(NumaNode),
    /// From this node only (MPOL_BIND). If the node is full, the kernel's OOM killer makes room.
    Bind(NumaNode),
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
        if let Self::Prefer(NumaNode(node)) | Self::Bind(NumaNode(node)) = self {
            *mask.get_mut(node as usize / 64).ok_or(Error::Os(Errno::INVAL))? |= 1 << (node % 64);
        }
        Ok(mask)
    }
}

/// Sets the policy for new memory of the calling thread (set_mempolicy(2)).
///
/// # Errors
/// EINVAL for a node that does not exist, or that the process's cpuset does not allow.
pub fn set_for_thread(policy: Policy) -> Result<()> {
    let mask = policy.nodes()?;
    // SAFETY: the mask is alive for the call and has the number of bits that the call names (the
    // kernel reads one bit less).
    #[allow(unsafe_code)]
    let result = unsafe {
        libc::syscall(libc::SYS_set_mempolicy, policy.mode(), mask.as_ptr(), MAX_NODES + 1)
    };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error().into()) }
}

/// Until the guard is dropped, the kernel takes new memory of this thread from `node`, as far as
/// that node has some. `None` if the process's cpuset does not allow the node any more, and on a
/// kernel without NUMA.
pub fn prefer(node: NumaNode) -> Option<Preference> {
    match set_for_thread(Policy::Prefer(node)) {
        Ok(()) => Some(Preference(())),
        Err(error) => {
            log::debug!("node {node} cannot be preferred: {error}");
            None
        }
    }
}

/// The guard that [`prefer`] returns.
#[must_use = "the preference ends with the guard"]
#[derive(Debug)]
pub struct Preference(());

impl Drop for Preference {
    fn drop(&mut self) {
        if let Err(error) = set_for_thread(Policy::Default) {
            log::error!("a thread goes on preferring a NUMA node: {error}");
        }
    }
}

/// Sets the policy for new memory of the mapped file, for `length` bytes of the mapping from
/// `address` on. Memory that is there stays (mbind(2)).
///
/// # Errors
/// Those of [`set_for_thread`], and ENOMEM.
pub fn set_for_range(address: usize, length: usize, policy: Policy) -> Result<()> {
    let mask = policy.nodes()?;
    // SAFETY: the mask is as above. The call changes no byte and no mapping: the kernel refuses a
    // range that is not mapped.
    #[allow(unsafe_code)]
    let result = unsafe {
        libc::syscall(
            libc::SYS_mbind,
            address,
            length,
            policy.mode(),
            mask.as_ptr(),
            MAX_NODES + 1,
            0,
        )
    };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error().into()) }
}
