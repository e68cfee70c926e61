//! System calls that only tests make, and mapped memory as a program sees it. This module has the
//! only `unsafe` of the tests and the benches.
#![allow(dead_code, missing_docs)]

pub mod pin;
pub mod userfault;

use hugetlb2fs::error::Result;
use hugetlb2fs::sys::policy::{self, Policy};
use hugetlb2fs::sys::sigbus::{Hit, Touchable, expecting_news};
use hugetlb2fs::units::{NumaNode, Range, SUBPAGE_SIZE};
use memmap2::{MmapOptions, MmapRaw};
use std::fs::File;
use std::ops::Deref;
use std::os::fd::AsRawFd;

/// A mapping that the program reads and writes like memory.
#[derive(Debug)]
pub struct Mapping {
    touchable: Touchable,
    /// The address of the first byte.
    address: usize,
    /// The offset in the file of the first byte.
    start: u64,
    /// The bytes that are mapped.
    length: u64,
}

/// The way in which a [`Mapping`] is shared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// MAP_SHARED.
    Shared,
    /// MAP_PRIVATE.
    Private,
}

/// The result of a system call that transfers `length` bytes.
fn all_done(done: isize, length: usize, if_short: std::io::ErrorKind) -> std::io::Result<()> {
    match usize::try_from(done) {
        Err(_) => Err(std::io::Error::last_os_error()),
        Ok(done) if done < length => Err(if_short.into()),
        Ok(_) => Ok(()),
    }
}

/// The touches that a program makes in spite of SIGBUS.
impl Deref for Mapping {
    type Target = Touchable;

    fn deref(&self) -> &Touchable {
        &self.touchable
    }
}

impl Mapping {
    /// Maps `range` of `file` readable. If `writable` is true, maps it writable, too.
    ///
    /// # Errors
    /// The errors of mmap(2).
    pub fn new(file: &File, range: Range, sharing: Sharing, writable: bool) -> Result<Self> {
        let mut options = MmapOptions::new();
        options.offset(range.start).len(range.len() as usize);
        let map = match (sharing, writable) {
            (Sharing::Shared, true) => options.map_raw(file)?,
            (Sharing::Shared, false) => options.map_raw_read_only(file)?,
            (Sharing::Private, _) => map_private(&options, file, writable)?,
        };
        let address = map.as_mut_ptr().expose_provenance();
        let touchable = Touchable::new(map, range.start)?;
        Ok(Self { touchable, address, start: range.start, length: range.len() })
    }

    /// The address of the mapping's first byte.
    pub fn address(&self) -> usize {
        self.address
    }

    /// The place of `length` bytes from `offset` of the file on.
    fn pointer(&self, offset: u64, length: u64) -> *mut u8 {
        let at = offset - self.start;
        assert!(at + length <= self.length, "{length} bytes at {offset:#x} are not mapped");
        std::ptr::with_exposed_provenance_mut(self.address + at as usize)
    }

    /// The offset in the file of the byte at `address`.
    fn offset_of(&self, address: u64) -> u64 {
        address - self.address as u64 + self.start
    }

    /// Reads `buffer.len()` bytes from `offset`.
    ///
    /// # Errors
    /// The first SIGBUS, if a byte is in a quarantined subpage.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> std::result::Result<(), Hit> {
        for (byte, at) in buffer.iter_mut().zip(offset..) {
            *byte = self.load(at)?;
        }
        Ok(())
    }

    /// Touches the first of each `step` bytes in a part of the file. Returns the touches that got a
    /// SIGBUS.
    pub fn step(&self, part: Range, step: usize) -> Vec<Hit> {
        (part.start..part.end).step_by(step).filter_map(|at| self.load(at).err()).collect()
    }

    /// Reads eight bytes at `offset` in one access, at the speed of memory. A SIGBUS there ends the
    /// program.
    pub fn load_word(&self, offset: u64) -> u64 {
        assert!(offset.is_multiple_of(8));
        let pointer: *const u64 = self.pointer(offset, 8).cast();
        // SAFETY: the address is aligned and inside the mapping, and every bit pattern is a number.
        #[allow(unsafe_code)]
        unsafe {
            pointer.read_volatile()
        }
    }

    /// Writes eight bytes at `offset`. A SIGBUS there ends the program.
    pub fn store_word(&self, offset: u64, word: u64) {
        assert!(offset.is_multiple_of(8));
        let pointer: *mut u64 = self.pointer(offset, 8).cast();
        // SAFETY: the address is aligned and inside the mapping, and no reference to its bytes
        // exists.
        #[allow(unsafe_code)]
        unsafe {
            pointer.write_volatile(word);
        }
    }

    /// Fills the whole mapping with `byte`, as memset(3) does. A SIGBUS there ends the program.
    pub fn set_all(&self, byte: u8) {
        // SAFETY: the range is our own mapping, and no reference to its bytes exists.
        #[allow(unsafe_code)]
        unsafe {
            self.pointer(self.start, self.length).write_bytes(byte, self.length as usize);
        }
    }

    /// Has the kernel write a part of the mapping to the same place of `file` (pwrite(2)).
    ///
    /// # Errors
    /// The errors of pwrite(2). EFAULT at a subpage that the kernel cannot read. WriteZero if the
    /// call ends short.
    pub fn write_to(&self, file: &File, part: Range) -> std::io::Result<()> {
        let (bytes, length) = (self.pointer(part.start, part.len()), part.len() as usize);
        // SAFETY: the bytes are inside the mapping. The kernel only reads them.
        #[allow(unsafe_code)]
        let done = unsafe {
            libc::pwrite(file.as_raw_fd(), bytes.cast(), length, part.start.cast_signed())
        };
        all_done(done, length, std::io::ErrorKind::WriteZero)
    }

    /// Has the kernel fill a part of the mapping from the same place of `file` (pread(2)).
    ///
    /// # Errors
    /// The errors of pread(2). EFAULT at a subpage that the kernel cannot write. UnexpectedEof if
    /// the call ends short.
    pub fn read_from(&self, file: &File, part: Range) -> std::io::Result<()> {
        let (bytes, length) = (self.pointer(part.start, part.len()), part.len() as usize);
        // SAFETY: the bytes are inside the mapping, and no reference to them exists.
        #[allow(unsafe_code)]
        let done = unsafe {
            libc::pread(file.as_raw_fd(), bytes.cast(), length, part.start.cast_signed())
        };
        all_done(done, length, std::io::ErrorKind::UnexpectedEof)
    }

    /// Calls madvise(2) for the whole mapping.
    ///
    /// # Errors
    /// The errors of madvise(2).
    pub fn advise(&self, advice: i32) -> Result<()> {
        self.advise_range(Range::at(self.start, self.length), advice)
    }

    /// Calls madvise(2) for a part of the mapping.
    ///
    /// # Errors
    /// The errors of madvise(2).
    pub fn advise_range(&self, part: Range, advice: i32) -> Result<()> {
        let start = self.pointer(part.start, part.len());
        // SAFETY: the range is inside our own mapping, no reference to its bytes exists, and the
        // program expects that its bytes change.
        #[allow(unsafe_code)]
        let result =
            expecting_news(|| unsafe { libc::madvise(start.cast(), part.len() as usize, advice) })?;
        if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error().into()) }
    }

    /// Puts anonymous memory in the place of a part of the mapping (mmap(2), MAP_FIXED).
    ///
    /// # Errors
    /// The errors of mmap(2).
    pub fn replace(&self, part: Range) -> Result<()> {
        let start = self.pointer(part.start, part.len()).cast();
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: the part is inside our own mapping, which stays mapped as long as before, and no
        // reference to its bytes exists.
        #[allow(unsafe_code)]
        let result = unsafe { libc::mmap(start, part.len() as usize, protection, flags, -1, 0) };
        if result == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error().into());
        }
        Ok(())
    }

    /// Sets the policy for new memory of the mapped file in `part` (mbind(2)).
    ///
    /// # Errors
    /// The errors of mbind(2).
    pub fn set_policy(&self, part: Range, policy: Policy) -> Result<()> {
        let start = self.pointer(part.start, part.len());
        policy::set_for_range(start as usize, part.len() as usize, policy)
    }

    /// mbind(2) of the mapped file in `part`, with the numbers of linux/mempolicy.h. Bit N of
    /// `nodes` is node N.
    ///
    /// # Errors
    /// The errors of mbind(2).
    pub fn bind(&self, part: Range, mode: i32, nodes: u64, flags: u32) -> Result<()> {
        let (start, length) = (self.pointer(part.start, part.len()), part.len());
        let nodes: *const u64 = &raw const nodes;
        // SAFETY: the mask is alive for the call, which changes no byte. The kernel reads one bit
        // less than the number says.
        #[allow(unsafe_code)]
        let result =
            unsafe { libc::syscall(libc::SYS_mbind, start, length, mode, nodes, 64_u64, flags) };
        if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error().into()) }
    }

    /// Moves the memory of `part` to a NUMA node, as far as this process has mapped it
    /// (move_pages(2), MPOL_MF_MOVE).
    ///
    /// # Errors
    /// The errors of move_pages(2).
    pub fn move_to(&self, part: Range, NumaNode(node): NumaNode) -> Result<()> {
        const MPOL_MF_MOVE: libc::c_int = 1 << 1;
        let subpages = part.steps(SUBPAGE_SIZE);
        let pages: Vec<_> =
            subpages.map(|subpage| self.pointer(subpage.start, subpage.len())).collect();
        let nodes = vec![node as libc::c_int; pages.len()];
        let mut statuses = vec![0 as libc::c_int; pages.len()];
        // SAFETY: all arrays have as many entries as the call names, and are alive for the call,
        // which changes no byte.
        #[allow(unsafe_code)]
        let result = unsafe {
            libc::syscall(
                libc::SYS_move_pages,
                0,
                pages.len(),
                pages.as_ptr(),
                nodes.as_ptr(),
                statuses.as_mut_ptr(),
                MPOL_MF_MOVE,
            )
        };
        if result >= 0 { Ok(()) } else { Err(std::io::Error::last_os_error().into()) }
    }
}

/// Maps a file with MAP_PRIVATE.
fn map_private(options: &MmapOptions, file: &File, writable: bool) -> Result<MmapRaw> {
    // SAFETY: the mapping becomes raw at once, so no reference to its bytes ever exists.
    #[allow(unsafe_code)]
    unsafe {
        Ok(if writable {
            options.map_copy(file)?.into()
        } else {
            options.map_copy_read_only(file)?.into()
        })
    }
}
