//! Filling memory at its first touch (userfaultfd(2), ioctl_userfaultfd(2)), as the destination of
//! a live migration does while the memory of the virtual machine is still elsewhere.

use super::Mapping;
use hugetlb2fs::error::Result;
use hugetlb2fs::units::{Range, SUBPAGE_SIZE, Subpage};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// Reports each touch of missing memory in a part of a mapping. The touching thread waits until the
/// memory is filled.
#[derive(Debug)]
pub struct Userfault<'a> {
    file: File,
    mapping: &'a Mapping,
}

/// `struct uffdio_api` of linux/userfaultfd.h.
#[repr(C)]
#[derive(Default)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
#[derive(Default)]
struct Register {
    start: u64,
    length: u64,
    mode: u64,
    ioctls: u64,
}

/// `struct uffdio_copy`.
#[repr(C)]
#[derive(Default)]
struct Copy {
    target: u64,
    source: u64,
    length: u64,
    mode: u64,
    copied: i64,
}

const _: () =
    assert!(size_of::<Api>() == 24 && size_of::<Register>() == 32 && size_of::<Copy>() == 40);

impl<'a> Userfault<'a> {
    /// Reports the touches of missing memory in `range` of `mapping`.
    ///
    /// # Errors
    /// EINVAL if such memory cannot be filled in this way. The errors of userfaultfd(2).
    pub fn new(mapping: &'a Mapping, range: Range) -> Result<Self> {
        const UFFD_API: u64 = 0xaa;
        const UFFDIO_API: libc::Ioctl = 0xc018_aa3fu32 as libc::Ioctl;
        const UFFDIO_REGISTER: libc::Ioctl = 0xc020_aa00u32 as libc::Ioctl;
        const MISSING: u64 = 1;
        // SAFETY: the call gets no pointer.
        #[allow(unsafe_code)]
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
        if fd < 0 {
            return Err(std::io::Error::last_os_error().into());
        }
        // SAFETY: the call returned a new descriptor that no other code owns.
        #[allow(unsafe_code)]
        let file = File::from(unsafe { OwnedFd::from_raw_fd(fd as RawFd) });
        control(&file, UFFDIO_API, &mut Api { api: UFFD_API, ..Api::default() })?;
        let start = mapping.pointer(range.start, range.len()) as u64;
        let mut register = Register { start, length: range.len(), mode: MISSING, ioctls: 0 };
        control(&file, UFFDIO_REGISTER, &mut register)?;
        Ok(Self { file, mapping })
    }

    /// Waits for the next touch of missing memory, and returns the touched subpage of the file.
    ///
    /// # Errors
    /// The errors of read(2).
    pub fn next(&self) -> Result<Subpage> {
        const PAGEFAULT: u8 = 0x12;
        let mut message = [0; 32]; // struct uffd_msg
        (&self.file).read_exact(&mut message)?;
        assert_eq!(message[0], PAGEFAULT, "nothing else was asked for");
        let address = u64::from_ne_bytes(message[16..24].try_into().expect("eight bytes"));
        Ok(Subpage::containing(self.mapping.offset_of(address)))
    }

    /// Gives `subpage` memory with the content `bytes`, and wakes the threads that wait for it.
    ///
    /// # Errors
    /// EEXIST if the subpage has memory. ENOSPC or EFAULT if there is no memory for it.
    pub fn fill(&self, subpage: Subpage, bytes: &[u8; SUBPAGE_SIZE as usize]) -> Result<()> {
        const UFFDIO_COPY: libc::Ioctl = 0xc028_aa03u32 as libc::Ioctl;
        let (target, source) =
            (self.mapping.pointer(subpage.offset(), SUBPAGE_SIZE) as u64, bytes.as_ptr() as u64);
        control(
            &self.file,
            UFFDIO_COPY,
            &mut Copy { target, source, length: SUBPAGE_SIZE, ..Copy::default() },
        )
    }
}

/// Makes one of the ioctls above. The addresses in `argument` belong to the mapping, or to bytes
/// that live during the call.
fn control<T>(file: &File, request: libc::Ioctl, argument: &mut T) -> Result<()> {
    // SAFETY: the structure belongs to this request and has the kernel's layout. The kernel writes
    // to the structure and to our mapping, and no reference to bytes of the mapping ever exists.
    #[allow(unsafe_code)]
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request, std::ptr::from_mut(argument)) };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error().into()) }
}
