//! Markers of memory errors in this process's page tables (UFFDIO_POISON, Linux 6.6,
//! ioctl_userfaultfd(2)). A touch of a marked page is SIGBUS with BUS_MCEERR_AR, as if its memory
//! had failed, in this process and in no other.
//!
//! - The kernel sets a marker only where the page table has no page. A quarantine of a subpage
//!   takes the page out of all page tables, so the place is free.
//! - A marker is set in a range that is registered with a userfaultfd, and stays when the range is
//!   registered no more. A touch in between waits for the marker.
//! - The kernel registers only mappings that may be made writable.
//! - MADV_DONTNEED removes the marker. So does each other call that empties the page table. A child
//!   process has no markers.

use super::pagemap::{PAGE_IS_SWAPPED, PageRegion, scan};
use crate::error::Result;
use crate::units::{Range, SUBPAGE_SIZE};
use rustix::io::Errno;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;

/// The way to set markers and to see them. It holds two descriptors.
#[derive(Debug)]
pub struct Markers {
    userfault: File,
    pagemap: File,
}

/// `struct uffdio_api` of linux/userfaultfd.h.
#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_range`.
#[repr(C)]
struct Span {
    start: u64,
    length: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct Register {
    span: Span,
    mode: u64,
    ioctls: u64,
}

/// `struct uffdio_poison`.
#[repr(C)]
struct Poison {
    span: Span,
    mode: u64,
    updated: i64,
}

const _: () =
    assert!(size_of::<Api>() == 24 && size_of::<Register>() == 32 && size_of::<Poison>() == 32);

const UFFDIO_API: libc::Ioctl = 0xc018_aa3fu32 as libc::Ioctl;
const UFFDIO_REGISTER: libc::Ioctl = 0xc020_aa00u32 as libc::Ioctl;
const UFFDIO_UNREGISTER: libc::Ioctl = 0x8010_aa01u32 as libc::Ioctl;
const UFFDIO_POISON: libc::Ioctl = 0xc020_aa08u32 as libc::Ioctl;

impl Markers {
    /// Needs no privilege: the userfaultfd is for touches from user mode
    /// (UFFD_USER_MODE_ONLY), and a touch by the kernel meets the marker all the same.
    ///
    /// # Errors
    /// The errors of userfaultfd(2); EINVAL before Linux 6.6. ENOENT where /proc is not mounted.
    pub fn new() -> Result<Self> {
        const UFFD_USER_MODE_ONLY: libc::c_int = 1;
        const UFFD_API: u64 = 0xaa;
        const FEATURES: u64 = 1 << 5 | 1 << 14; // UFFD_FEATURE_MISSING_SHMEM, UFFD_FEATURE_POISON
        let flags = libc::O_CLOEXEC | UFFD_USER_MODE_ONLY;
        // SAFETY: the call gets no pointer.
        #[allow(unsafe_code)]
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        if fd < 0 {
            return Err(std::io::Error::last_os_error().into());
        }
        // SAFETY: the call returned a new descriptor that no other code owns.
        #[allow(unsafe_code)]
        let userfault = File::from(unsafe { OwnedFd::from_raw_fd(fd as RawFd) });
        let mut api = Api { api: UFFD_API, features: FEATURES, ioctls: 0 };
        control(&userfault, UFFDIO_API, &mut api)?;
        Ok(Self { userfault, pagemap: File::open("/proc/self/pagemap")? })
    }

    /// Marks the pages of `addresses`, which belong to one shared mapping of a file on tmpfs.
    /// Returns true if all are marked: a page that the page table has is not.
    ///
    /// # Errors
    /// EPERM for a mapping that cannot be made writable; EINVAL or ENOMEM for addresses of no such
    /// mapping.
    pub fn mark(&self, addresses: Range) -> Result<bool> {
        const MISSING: u64 = 1;
        if self.are_marked(addresses) {
            return Ok(true);
        }
        let span = || Span { start: addresses.start, length: addresses.len() };
        let mut register = Register { span: span(), mode: MISSING, ioctls: 0 };
        let registered = match control(&self.userfault, UFFDIO_REGISTER, &mut register) {
            Err(Errno::BUSY) => false, // with another userfaultfd, which serves as well
            result => result.map(|()| true)?,
        };
        let marked = self.mark_registered(addresses);
        if registered {
            let _ = control(&self.userfault, UFFDIO_UNREGISTER, &mut span()); // it is registered
        }
        marked
    }

    fn mark_registered(&self, addresses: Range) -> Result<bool> {
        let mut are_marked = true;
        let mut at = addresses.start;
        while at < addresses.end {
            let span = Span { start: at, length: addresses.end - at };
            let mut poison = Poison { span, mode: 0, updated: 0 };
            match control(&self.userfault, UFFDIO_POISON, &mut poison) {
                Ok(()) => break,
                Err(Errno::AGAIN) => at += u64::try_from(poison.updated).unwrap_or(0),
                // A page, a huge page, or a marker.
                Err(Errno::EXIST | Errno::FAULT) => {
                    are_marked &= self.is_marked(at);
                    at += SUBPAGE_SIZE;
                }
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(are_marked)
    }

    /// True if the page at this address is marked.
    fn is_marked(&self, address: u64) -> bool {
        is_marker_in(&self.pagemap, address).unwrap_or(false)
    }

    /// True if these pages are known to be marked. To mark them again costs ten times as much.
    fn are_marked(&self, addresses: Range) -> bool {
        const FEW: usize = 64;
        let mut entries = [[0; ENTRY]; FEW];
        let count = (addresses.len() / SUBPAGE_SIZE) as usize;
        let Some(entries) = entries.get_mut(..count) else { return false };
        let at = addresses.start / SUBPAGE_SIZE * ENTRY as u64;
        let are_read = self.pagemap.read_exact_at(entries.as_flattened_mut(), at).is_ok();
        are_read && entries.iter().all(is_marker)
    }

    /// Calls `found` with each run of marked pages in `addresses`, which belong to a shared mapping
    /// of a file that is never swapped out.
    ///
    /// # Errors
    /// The errors of ioctl(2).
    pub fn for_each_marked(&self, addresses: Range, mut found: impl FnMut(Range)) -> Result<()> {
        let mut start = addresses.start;
        while start < addresses.end {
            let mut regions = [PageRegion::default(); 64];
            let (count, walked_to) =
                scan(&self.pagemap, PAGE_IS_SWAPPED, start, addresses.end, &mut regions)?;
            regions[..count].iter().for_each(|region| found(Range::new(region.start, region.end)));
            start = walked_to;
        }
        Ok(())
    }

    /// Removes the markers of `addresses`. The caller says that they belong to a shared mapping of
    /// a file: such a mapping loses nothing, as the file has its bytes.
    ///
    /// # Errors
    /// The errors of madvise(2).
    pub fn remove(&self, addresses: Range) -> Result<()> {
        let start: *mut libc::c_void =
            std::ptr::with_exposed_provenance_mut(addresses.start as usize);
        let (length, advice) = (addresses.len() as usize, libc::MADV_DONTNEED);
        // Not by the C library's function: in a guarded program, that asks for all markers again.
        // SAFETY: the memory of a shared mapping is the file's, and the call changes none of its
        // bytes.
        #[allow(unsafe_code)]
        let result = unsafe { libc::syscall(libc::SYS_madvise, start, length, advice) };
        if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error().into()) }
    }
}

/// True if a process has a marker at this address of a shared mapping of a file that is never
/// swapped out. `pagemap` is the process's /proc/PID/pagemap.
///
/// # Errors
/// The errors of read(2).
pub fn is_marker_in(pagemap: &File, address: u64) -> Result<bool> {
    let mut entry = [0; ENTRY];
    pagemap.read_exact_at(&mut entry, address / SUBPAGE_SIZE * ENTRY as u64)?;
    Ok(is_marker(&entry))
}

/// Bytes of pagemap for one page.
const ENTRY: usize = 8;

/// True if an entry of pagemap is that of no page in memory.
fn is_marker(entry: &[u8; ENTRY]) -> bool {
    const IS_SWAPPED: u64 = 1 << 62;
    u64::from_ne_bytes(*entry) & IS_SWAPPED != 0
}

fn control<T>(
    file: &File,
    request: libc::Ioctl,
    argument: &mut T,
) -> std::result::Result<(), Errno> {
    // SAFETY: the argument has the kernel's layout for this request, and is alive for the call.
    // Registering and marking change no byte of memory.
    #[allow(unsafe_code)]
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request, std::ptr::from_mut(argument)) };
    if result == 0 {
        return Ok(());
    }
    let error = std::io::Error::last_os_error();
    Err(Errno::from_io_error(&error).unwrap_or(Errno::IO))
}
