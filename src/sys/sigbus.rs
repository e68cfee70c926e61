//! Touching mapped memory as a program does, and recording each SIGBUS (sigaction(2), mmap(2)).
//!
//! This is for programs that prove the content of a mapping: the demonstration, the benches and the
//! tests. The two instructions that touch memory have known addresses. If one of them gets the
//! signal, the handler records address and code, and the program continues behind the instruction.
//! The mapping stays as it was. Any other SIGBUS ends the program.

use crate::error::Result;
use crate::units::{Range, SUBPAGE_SIZE, Subpage};
use std::cell::Cell;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::OnceLock;

use probe::{hugetlb2_fault, hugetlb2_load, hugetlb2_store};

/// The two instructions that touch memory, and the place where a thread continues after one of them
/// got a SIGBUS.
mod probe {
    // Assembly counts as unsafe code. SAFETY: the three functions are leaf functions and follow the
    // C calling convention.
    #![allow(unsafe_code)]

    #[cfg(target_arch = "x86_64")]
    std::arch::global_asm!(
        ".globl hugetlb2_load, hugetlb2_store, hugetlb2_fault",
        "hugetlb2_load:",
        "movzx eax, byte ptr [rdi]",
        "ret",
        "hugetlb2_store:",
        "mov byte ptr [rdi], sil",
        "xor eax, eax",
        "ret",
        "hugetlb2_fault:",
        "mov eax, 0x100",
        "ret",
    );

    #[cfg(target_arch = "aarch64")]
    std::arch::global_asm!(
        ".globl hugetlb2_load, hugetlb2_store, hugetlb2_fault",
        "hugetlb2_load:",
        "ldrb w0, [x0]",
        "ret",
        "hugetlb2_store:",
        "strb w1, [x0]",
        "mov w0, #0",
        "ret",
        "hugetlb2_fault:",
        "mov w0, #0x100",
        "ret",
    );

    // SAFETY: the assembly above defines these functions with these signatures. In the first two,
    // the first instruction is the one that touches memory.
    #[allow(unsafe_code)]
    unsafe extern "C" {
        pub(super) fn hugetlb2_load(pointer: *const u8) -> u32;
        pub(super) fn hugetlb2_store(pointer: *mut u8, byte: u8) -> u32;
        pub(super) fn hugetlb2_fault();
    }
}

const FAULTED: u32 = 0x100;

thread_local! {
    /// Address and code of the thread's latest SIGBUS. The handler writes them.
    static LATEST: Cell<(usize, i32)> = const { Cell::new((0, 0)) };
    /// True while the thread makes a memory error.
    static EXPECTING: Cell<bool> = const { Cell::new(false) };
}

/// A mapping (MAP_SHARED or MAP_PRIVATE) that the program reads and writes like memory.
#[derive(Debug)]
pub struct Mapping {
    base: *mut u8,
    length: usize,
    offset: u64,
}

// SAFETY: the mapping belongs to the process, and no reference to its bytes ever exists.
#[allow(unsafe_code)]
unsafe impl Send for Mapping {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Sync for Mapping {}

/// A SIGBUS of a touch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hit {
    /// The touched subpage of the file.
    pub subpage: Subpage,
    /// `si_code`: BUS_ADRERR (2) for a hole, BUS_MCEERR_AR (4) for a memory error.
    pub code: i32,
}

/// The way in which a [`Mapping`] is shared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// MAP_SHARED.
    Shared,
    /// MAP_PRIVATE.
    Private,
}

impl Mapping {
    /// Maps `range` of `file` readable. If `writable` is true, maps it writable, too.
    ///
    /// # Errors
    /// The errors of mmap(2).
    pub fn new(file: &File, range: Range, sharing: Sharing, writable: bool) -> Result<Self> {
        install_handler()?;
        let protection =
            if writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        let flags = match sharing {
            Sharing::Shared => libc::MAP_SHARED,
            Sharing::Private => libc::MAP_PRIVATE,
        };
        let length = range.len() as usize;
        // SAFETY: the kernel chooses the address of the new mapping.
        #[allow(unsafe_code)]
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                protection,
                flags,
                file.as_raw_fd(),
                range.start as libc::off_t,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error().into());
        }
        Ok(Self { base: base.cast(), length, offset: range.start })
    }

    /// The address of the mapping's first byte.
    pub fn address(&self) -> usize {
        self.base as usize
    }

    /// The offset in the file of the byte at `address`.
    pub(super) fn offset_of(&self, address: u64) -> u64 {
        address - self.base as u64 + self.offset
    }

    pub(super) fn pointer(&self, offset: u64) -> *mut u8 {
        let at = (offset - self.offset) as usize;
        assert!(at < self.length, "offset {offset:#x} is not mapped");
        self.base.wrapping_add(at)
    }

    /// Reads the byte at `offset` of the file.
    ///
    /// # Errors
    /// The SIGBUS, if the touch got one.
    pub fn load(&self, offset: u64) -> std::result::Result<u8, Hit> {
        let pointer = self.pointer(offset);
        // SAFETY: the byte is inside the mapping, and the handler resolves a fault there.
        #[allow(unsafe_code)]
        let value = unsafe { hugetlb2_load(pointer) };
        if value == FAULTED { Err(self.latest_hit()) } else { Ok(value as u8) }
    }

    /// Writes the byte at `offset` of the file.
    ///
    /// # Errors
    /// The SIGBUS, if the touch got one.
    pub fn store(&self, offset: u64, byte: u8) -> std::result::Result<(), Hit> {
        let pointer = self.pointer(offset);
        // SAFETY: the byte is inside the mapping, and the handler resolves a fault there.
        #[allow(unsafe_code)]
        let value = unsafe { hugetlb2_store(pointer, byte) };
        if value == FAULTED { Err(self.latest_hit()) } else { Ok(()) }
    }

    /// Reads `buffer.len()` bytes from `offset`.
    ///
    /// # Errors
    /// The first SIGBUS, if a byte is in a quarantined subpage.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> std::result::Result<(), Hit> {
        for (n, byte) in buffer.iter_mut().enumerate() {
            *byte = self.load(offset + n as u64)?;
        }
        Ok(())
    }

    /// Reads eight bytes at `offset` in one access, at the speed of memory. A SIGBUS there ends the
    /// program.
    pub fn load_word(&self, offset: u64) -> u64 {
        assert!(offset.is_multiple_of(8));
        let pointer: *const u64 = self.pointer(offset).cast();
        // SAFETY: the address is aligned and inside the mapping, and every bit pattern is a number.
        #[allow(unsafe_code)]
        unsafe {
            pointer.read_volatile()
        }
    }

    /// Writes eight bytes at `offset`. A SIGBUS there ends the program.
    pub fn store_word(&self, offset: u64, word: u64) {
        assert!(offset.is_multiple_of(8));
        let pointer: *mut u64 = self.pointer(offset).cast();
        // SAFETY: the address is aligned and inside the mapping.
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
            self.base.write_bytes(byte, self.length);
        }
    }

    /// Touches the first byte of every subpage. Returns the touches that got a SIGBUS, in ascending
    /// order.
    pub fn walk(&self) -> Vec<Hit> {
        (0..self.length as u64)
            .step_by(SUBPAGE_SIZE as usize)
            .filter_map(|at| self.load(self.offset + at).err())
            .collect()
    }

    /// Calls madvise(2) for the whole mapping.
    ///
    /// # Errors
    /// The errors of madvise(2).
    pub fn advise(&self, advice: i32) -> Result<()> {
        self.advise_range(Range::at(self.offset, self.length as u64), advice)
    }

    /// Calls madvise(2) for a part of the mapping.
    ///
    /// # Errors
    /// The errors of madvise(2).
    pub fn advise_range(&self, range: Range, advice: i32) -> Result<()> {
        let start = self.pointer(range.start);
        assert!(range.end - self.offset <= self.length as u64);
        // SAFETY: the range is inside our own mapping, which the program only accesses byte by
        // byte.
        #[allow(unsafe_code)]
        let result = expecting_news(|| unsafe {
            libc::madvise(start.cast(), range.len() as usize, advice)
        })?;
        if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error().into()) }
    }

    /// Keeps the page at `offset` of the file in a pipe (vmsplice(2)). Until the pin is dropped,
    /// the folio has one user more than the kernel can account for, so the kernel cannot split the
    /// folio.
    ///
    /// # Errors
    /// The errors of pipe(2) and vmsplice(2). EFAULT if the page cannot be touched.
    pub fn pin(&self, offset: u64) -> Result<Pin> {
        let (reader, writer) = std::io::pipe()?;
        let bytes = libc::iovec { iov_base: self.pointer(offset).cast(), iov_len: 1 };
        // SAFETY: the one byte is inside the mapping. The kernel takes a reference to its page and
        // writes nothing.
        #[allow(unsafe_code)]
        let taken = unsafe { libc::vmsplice(writer.as_raw_fd(), &raw const bytes, 1, 0) };
        match taken {
            1 => Ok(Pin::Pipe(reader, writer)),
            _ => Err(std::io::Error::last_os_error().into()),
        }
    }

    /// Makes the page at `offset` of the file a fixed buffer of an io_uring (io_uring_register(2),
    /// IORING_REGISTER_BUFFERS). This is a long-term pin, like the pins of devices that read or
    /// write memory.
    ///
    /// # Errors
    /// The errors of io_uring_setup(2) and io_uring_register(2).
    pub fn pin_for_io(&self, offset: u64) -> Result<Pin> {
        const REGISTER_BUFFERS: libc::c_uint = 0;
        let mut parameters = [0u8; 120]; // struct io_uring_params
        // SAFETY: the structure has the kernel's size, and zeros are its default values.
        #[allow(unsafe_code)]
        let ring = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, parameters.as_mut_ptr()) };
        if ring < 0 {
            return Err(std::io::Error::last_os_error().into());
        }
        // SAFETY: the call returned a new descriptor that no other code owns.
        #[allow(unsafe_code)]
        let ring = unsafe { OwnedFd::from_raw_fd(ring as RawFd) };
        let buffer =
            libc::iovec { iov_base: self.pointer(offset).cast(), iov_len: SUBPAGE_SIZE as usize };
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
            Ok(Pin::Ring(ring))
        } else {
            Err(std::io::Error::last_os_error().into())
        }
    }

    fn latest_hit(&self) -> Hit {
        let (address, code) = LATEST.get();
        Hit { subpage: Subpage::containing(self.offset_of(address as u64)), code }
    }
}

/// A pinned page; see [`Mapping::pin`] and [`Mapping::pin_for_io`].
#[derive(Debug)]
pub enum Pin {
    /// The page is in a pipe.
    Pipe(std::io::PipeReader, std::io::PipeWriter),
    /// The page is a buffer of an io_uring.
    Ring(OwnedFd),
}

impl Drop for Pin {
    /// Unregisters the buffer of a ring, so the page is free on return. If a ring is only closed,
    /// the kernel gives the buffers up some time later.
    fn drop(&mut self) {
        const UNREGISTER_BUFFERS: libc::c_uint = 1;
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

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `new` mapped this range, and only this value owns it.
        #[allow(unsafe_code)]
        unsafe {
            libc::munmap(self.base.cast(), self.length)
        };
    }
}

/// Makes the process survive reports of memory errors (BUS_MCEERR_AO) in memory that it maps and
/// has not touched. A touch that cannot continue still ends the process.
///
/// # Errors
/// The errors of sigaction(2).
pub fn survive_news() -> Result<()> {
    install_handler()
}

/// Runs `call`, which makes a memory error. The kernel then sends the caller a SIGBUS as if the
/// caller had touched the memory (Linux 6.12, madvise_inject_error); the handler ignores it.
///
/// # Errors
/// The errors of sigaction(2).
pub fn expecting_news<T>(call: impl FnOnce() -> T) -> Result<T> {
    install_handler()?;
    EXPECTING.set(true);
    let value = call();
    EXPECTING.set(false);
    Ok(value)
}

fn install_handler() -> Result<()> {
    static INSTALLED: OnceLock<Result<()>> = OnceLock::new();
    INSTALLED
        .get_or_init(|| {
            // SAFETY: zero is a valid value of every field, and the handler has the signature for
            // SA_SIGINFO.
            #[allow(unsafe_code)]
            let result = unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
                action.sa_sigaction = handler as *const () as usize;
                libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut())
            };
            if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error().into()) }
        })
        .clone()
}

/// Ignores reports of memory errors. After a SIGBUS of a probe instruction, the thread continues
/// behind it. Any other SIGBUS ends the process, as if there were no handler.
extern "C" fn handler(
    _signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    let probes = [hugetlb2_load as *const () as u64, hugetlb2_store as *const () as u64];
    // SAFETY: the kernel passes valid pointers (SA_SIGINFO), and the handler runs on the thread
    // that they describe.
    #[allow(unsafe_code)]
    let (address, code, instruction) = unsafe {
        let context = &mut *context.cast::<libc::ucontext_t>();
        ((*info).si_addr() as usize, (*info).si_code, instruction_pointer(context))
    };
    if EXPECTING.get() || code == libc::BUS_MCEERR_AO {
        // This is a report, and nothing in this thread depends on it.
    } else if probes.contains(instruction) {
        LATEST.set((address, code));
        *instruction = hugetlb2_fault as *const () as u64;
    } else {
        // SAFETY: signal(2) is async-signal-safe. On return the instruction faults again, and the
        // default action ends the process.
        #[allow(unsafe_code)]
        unsafe {
            libc::signal(libc::SIGBUS, libc::SIG_DFL)
        };
    }
}

#[cfg(target_arch = "x86_64")]
fn instruction_pointer(context: &mut libc::ucontext_t) -> &mut u64 {
    let register: &mut i64 = &mut context.uc_mcontext.gregs[libc::REG_RIP as usize];
    // SAFETY: i64 and u64 have the same size, alignment and valid values.
    #[allow(unsafe_code)]
    unsafe {
        &mut *std::ptr::from_mut(register).cast()
    }
}

#[cfg(target_arch = "aarch64")]
fn instruction_pointer(context: &mut libc::ucontext_t) -> &mut u64 {
    &mut context.uc_mcontext.pc
}
