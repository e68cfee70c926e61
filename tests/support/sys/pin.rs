//! Pages that the kernel cannot account for: a folio that has one user more cannot be split.

use super::Mapping;
use hugetlb2fs::error::Result;
use hugetlb2fs::units::Subpage;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// A page that has one user more until this value is dropped.
#[derive(Debug)]
pub enum Pin {
    /// The page is in a pipe.
    Pipe(std::io::PipeReader, std::io::PipeWriter),
    /// The page is a buffer of an io_uring.
    Ring(OwnedFd),
}

const REGISTER_BUFFERS: libc::c_uint = 0;
const UNREGISTER_BUFFERS: libc::c_uint = 1;

impl Pin {
    /// Keeps the page at `offset` of the mapped file in a pipe (vmsplice(2)).
    ///
    /// # Errors
    /// The errors of pipe(2) and vmsplice(2). EFAULT if the page cannot be touched.
    pub fn in_pipe(mapping: &Mapping, offset: u64) -> Result<Self> {
        let (reader, writer) = std::io::pipe()?;
        let byte = mapping.pointer(offset, 1);
        let bytes = libc::iovec { iov_base: byte.cast(), iov_len: 1 };
        // SAFETY: the one byte is inside the mapping. The kernel takes a reference to its page and
        // writes nothing.
        #[allow(unsafe_code)]
        let taken = unsafe { libc::vmsplice(writer.as_raw_fd(), &raw const bytes, 1, 0) };
        match taken {
            1 => Ok(Self::Pipe(reader, writer)),
            _ => Err(std::io::Error::last_os_error().into()),
        }
    }

    /// Makes the page at `offset` of the mapped file a fixed buffer of an io_uring
    /// (io_uring_register(2), IORING_REGISTER_BUFFERS). This is a long-term pin, like the pins of
    /// devices that read or write memory.
    ///
    /// # Errors
    /// The errors of io_uring_setup(2) and io_uring_register(2).
    pub fn for_io(mapping: &Mapping, offset: u64) -> Result<Self> {
        let page = Subpage::containing(offset).range();
        let ring = new_ring()?;
        let base = mapping.pointer(page.start, page.len()).cast();
        let buffer = libc::iovec { iov_base: base, iov_len: page.len() as usize };
        // SAFETY: the buffer is inside the mapping, and the ring never reads into it.
        #[allow(unsafe_code)]
        let registered = unsafe {
            libc::syscall(
                libc::SYS_io_uring_register,
                ring.as_raw_fd(),
                REGISTER_BUFFERS,
                &raw const buffer,
                1,
            )
        };
        if registered == 0 {
            Ok(Self::Ring(ring))
        } else {
            Err(std::io::Error::last_os_error().into())
        }
    }
}

fn new_ring() -> Result<OwnedFd> {
    let mut parameters = [0u8; 120]; // struct io_uring_params
    // SAFETY: the structure has the kernel's size, and zeros are its default values.
    #[allow(unsafe_code)]
    let ring = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, parameters.as_mut_ptr()) };
    if ring < 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    // SAFETY: the call returned a new descriptor that no other code owns.
    #[allow(unsafe_code)]
    Ok(unsafe { OwnedFd::from_raw_fd(ring as RawFd) })
}

impl Drop for Pin {
    /// Unregisters the buffer of a ring, so the page is free on return. If a ring is only closed,
    /// the kernel gives the buffers up some time later.
    fn drop(&mut self) {
        let Self::Ring(ring) = self else { return };
        let nothing = std::ptr::null::<libc::c_void>();
        // SAFETY: the request takes no argument.
        #[allow(unsafe_code)]
        unsafe {
            libc::syscall(
                libc::SYS_io_uring_register,
                ring.as_raw_fd(),
                UNREGISTER_BUFFERS,
                nothing,
                0,
            )
        };
    }
}
