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

/// A policy of a range that prefers some nodes to others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RangePolicy {
    /// The use that the kernel makes of the nodes.
    pub mode: Mode,
    /// The nodes, ascending, at least one.
    pub nodes: Vec<NumaNode>,
}

/// The use that the kernel makes of the nodes of a [`RangePolicy`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// These nodes only (MPOL_BIND).
    Bind,
    /// These nodes, and others where they are full (MPOL_PREFERRED, MPOL_PREFERRED_MANY).
    Prefer,
    /// These nodes in turn (MPOL_INTERLEAVE).
    Interleave,
    /// These nodes in turn, by the machine's weights (MPOL_WEIGHTED_INTERLEAVE).
    WeightedInterleave,
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

/// Has the kernel leave the memory of this thread, and of those that it starts, mapped. Where the
/// kernel balances NUMA nodes, it takes the mappings of memory with the default policy away now and
/// then, to see who touches them (mm/mempolicy.c, vma_policy_mof). If the worker is killed at that
/// time, the kernel does not copy a request or an answer, and ends the request with EIO
/// ([`super::allocator`]). New memory comes from the same node as by default.
pub fn stay_mapped() {
    if let Err(error) = set_for_thread(Policy::Local) {
        log::debug!("the kernel may unmap this process's memory: {error}"); // without CONFIG_NUMA
    }
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
        if let Err(error) = set_for_thread(Policy::Local) {
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
    bind(address, length, policy.mode(), &policy.nodes()?)
}

fn bind(address: usize, length: usize, mode: libc::c_int, mask: &Mask) -> Result<()> {
    // SAFETY: the mask is as above. The call changes no byte and no mapping: the kernel refuses a
    // range that is not mapped.
    #[allow(unsafe_code)]
    let result = unsafe {
        libc::syscall(libc::SYS_mbind, address, length, mode, mask.as_ptr(), MAX_NODES + 1, 0)
    };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error().into()) }
}

/// A policy of a range as the kernel tells it, with its flags.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    mode: libc::c_int,
    mask: Mask,
}

/// The policy that a program has set by mbind(2) for the mapped file at `address` (get_mempolicy(2)
/// with MPOL_F_ADDR). Takes no memory and touches none. `None` without a policy.
///
/// # Errors
/// EFAULT for an address that is not mapped; ENOSYS on a kernel without CONFIG_NUMA.
pub fn of_address(address: usize) -> Result<Option<Told>> {
    const MPOL_F_ADDR: libc::c_ulong = 1 << 1; // linux/mempolicy.h
    let (mut mode, mut mask): (libc::c_int, Mask) = (0, [0; MAX_NODES / 64]);
    // SAFETY: both places are alive for the call, and the mask has the number of bits that the call
    // names (the kernel writes one bit less). The call does not look at the memory at the address.
    #[allow(unsafe_code)]
    let result = unsafe {
        libc::syscall(
            libc::SYS_get_mempolicy,
            &raw mut mode,
            mask.as_mut_ptr(),
            MAX_NODES + 1,
            address,
            MPOL_F_ADDR,
        )
    };
    if result != 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    Ok((mode != libc::MPOL_DEFAULT).then_some(Told { mode, mask }))
}

impl Told {
    /// The nodes that the policy prefers. `None` for a policy that names no nodes, and for one
    /// whose nodes are relative to the program's cpuset (MPOL_F_RELATIVE_NODES): that cpuset is not
    /// known.
    pub fn meaning(&self) -> Option<RangePolicy> {
        // linux/mempolicy.h; the first two are since Linux 5.15 and 6.9
        const PREFERRED_MANY: libc::c_int = 5;
        const WEIGHTED_INTERLEAVE: libc::c_int = 6;
        const BALANCING: libc::c_int = 1 << 13;
        const STATIC_NODES: libc::c_int = 1 << 15;
        let mode = match self.mode & !(BALANCING | STATIC_NODES) {
            libc::MPOL_BIND => Mode::Bind,
            libc::MPOL_PREFERRED | PREFERRED_MANY => Mode::Prefer,
            libc::MPOL_INTERLEAVE => Mode::Interleave,
            WEIGHTED_INTERLEAVE => Mode::WeightedInterleave,
            _ => return None,
        };
        let is_set = |node: &usize| self.mask[node / 64] & (1 << (node % 64)) != 0;
        let nodes: Vec<_> =
            (0..MAX_NODES).filter(is_set).map(|node| NumaNode(node as u32)).collect();
        (!nodes.is_empty()).then_some(RangePolicy { mode, nodes })
    }

    /// Sets this policy for `length` bytes of the mapping from `address` on.
    ///
    /// # Errors
    /// Those of [`set_for_range`].
    pub fn set_for_range(&self, address: usize, length: usize) -> Result<()> {
        bind(address, length, self.mode, &self.mask)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_is_read_with_its_flags_and_nodes() {
        let mut mask = [0; MAX_NODES / 64];
        mask[0] = 0b101;
        mask[1] = 1;
        let nodes = [0, 2, 64].map(NumaNode).to_vec();
        let rows = [
            (libc::MPOL_BIND, Some(Mode::Bind)),
            (libc::MPOL_BIND | 1 << 15, Some(Mode::Bind)),
            (libc::MPOL_BIND | 1 << 14, None),
            (libc::MPOL_PREFERRED, Some(Mode::Prefer)),
            (5, Some(Mode::Prefer)),
            (libc::MPOL_INTERLEAVE, Some(Mode::Interleave)),
            (6, Some(Mode::WeightedInterleave)),
            (libc::MPOL_DEFAULT, None),
            (libc::MPOL_LOCAL, None),
        ];
        for (number, mode) in rows {
            let expected = mode.map(|mode| RangePolicy { mode, nodes: nodes.clone() });
            let told = Told { mode: number, mask };
            assert_eq!(told.meaning(), expected, "{number:#x}");
        }
        let without_nodes = Told { mode: libc::MPOL_BIND, mask: [0; MAX_NODES / 64] };
        assert_eq!(without_nodes.meaning(), None);
    }
}
