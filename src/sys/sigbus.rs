//! Touching mapped memory as a program does, and noting where it gets SIGBUS (sigaction(2), mmap(2)).
//!
//! For programs that prove what a mapping holds: the demonstration, the benches and the tests. The two instructions
//! that touch memory stand at known addresses; when one of them gets the signal, the handler notes address and
//! code and lets the program go on behind it, with the mapping as it was. Any other SIGBUS ends the program.

use crate::error::Result;
use crate::units::{Range, SUBPAGE_SIZE, Subpage};
use std::cell::Cell;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::OnceLock;

use probe::{hugetlb2_fault, hugetlb2_load, hugetlb2_store};

/// The two touching instructions, and where a thread goes on that one of them got a SIGBUS.
mod probe {
    // Assembly counts as unsafe code; SAFETY: three leaf functions that follow the C calling convention.
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

    // SAFETY: defined above with these signatures; the first instruction of each is the one that touches memory.
    #[allow(unsafe_code)]
    unsafe extern "C" {
        pub(super) fn hugetlb2_load(pointer: *const u8) -> u32;
        pub(super) fn hugetlb2_store(pointer: *mut u8, byte: u8) -> u32;
        pub(super) fn hugetlb2_fault();
    }
}

const FAULTED: u32 = 0x100;

thread_local! {
    /// Address and code of the thread's latest SIGBUS; written by the handler.
    static LATEST: Cell<(usize, i32)> = const { Cell::new((0, 0)) };
    /// The thread is making a memory error.
    static EXPECTING: Cell<bool> = const { Cell::new(false) };
}

/// A mapping (MAP_SHARED or MAP_PRIVATE) that is read and written like memory.
#[derive(Debug)]
pub struct Mapping {
    base: *mut u8,
    length: usize,
    offset: u64,
}

// SAFETY: the mapping belongs to the process, and no reference to its bytes is ever made.
#[allow(unsafe_code)]
unsafe impl Send for Mapping {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Sync for Mapping {}

/// One SIGBUS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hit {
    /// The subpage of the file that was touched.
    pub subpage: Subpage,
    /// `si_code`: BUS_ADRERR (2) for a hole, BUS_MCEERR_AR (4) for a memory error.
    pub code: i32,
}

/// Sharing of a [`Mapping`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// MAP_SHARED.
    Shared,
    /// MAP_PRIVATE.
    Private,
}

impl Mapping {
    /// Maps `range` of `file` readable and, where `writable`, writable.
    ///
    /// # Errors
    /// What mmap(2) answers.
    pub fn new(file: &File, range: Range, sharing: Sharing, writable: bool) -> Result<Self> {
        install_handler()?;
        let protection = if writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        let flags = match sharing {
            Sharing::Shared => libc::MAP_SHARED,
            Sharing::Private => libc::MAP_PRIVATE,
        };
        let length = range.len() as usize;
        // SAFETY: a new mapping at an address of the kernel's choice.
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

    /// The offset in the file of what is mapped at `address`.
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
    /// The SIGBUS that was received instead.
    pub fn load(&self, offset: u64) -> std::result::Result<u8, Hit> {
        let pointer = self.pointer(offset);
        // SAFETY: the byte is inside of the mapping; a fault there is resolved by the handler.
        #[allow(unsafe_code)]
        let value = unsafe { hugetlb2_load(pointer) };
        if value == FAULTED { Err(self.latest_hit()) } else { Ok(value as u8) }
    }

    /// Writes the byte at `offset` of the file.
    ///
    /// # Errors
    /// The SIGBUS that was received instead.
    pub fn store(&self, offset: u64, byte: u8) -> std::result::Result<(), Hit> {
        let pointer = self.pointer(offset);
        // SAFETY: the byte is inside of the mapping; a fault there is resolved by the handler.
        #[allow(unsafe_code)]
        let value = unsafe { hugetlb2_store(pointer, byte) };
        if value == FAULTED { Err(self.latest_hit()) } else { Ok(()) }
    }

    /// Reads `buffer.len()` bytes from `offset`; none of them may be in a lost subpage.
    ///
    /// # Errors
    /// The signal that was received.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> std::result::Result<(), Hit> {
        for (n, byte) in buffer.iter_mut().enumerate() {
            *byte = self.load(offset + n as u64)?;
        }
        Ok(())
    }

    /// Reads eight bytes at `offset`, as fast as memory is; a SIGBUS there ends the program.
    pub fn load_word(&self, offset: u64) -> u64 {
        assert!(offset.is_multiple_of(8));
        let pointer: *const u64 = self.pointer(offset).cast();
        // SAFETY: aligned and inside of the mapping, and every bit pattern is a number.
        #[allow(unsafe_code)]
        unsafe {
            pointer.read_volatile()
        }
    }

    /// Writes eight bytes at `offset`; a SIGBUS there ends the program.
    pub fn store_word(&self, offset: u64, word: u64) {
        assert!(offset.is_multiple_of(8));
        let pointer: *mut u64 = self.pointer(offset).cast();
        // SAFETY: aligned and inside of the mapping.
        #[allow(unsafe_code)]
        unsafe {
            pointer.write_volatile(word);
        }
    }

    /// memset(3) on all of it; a SIGBUS there ends the program.
    pub fn set_all(&self, byte: u8) {
        // SAFETY: the range is our own mapping, to whose bytes no reference exists.
        #[allow(unsafe_code)]
        unsafe {
            self.base.write_bytes(byte, self.length);
        }
    }

    /// Touches the first byte of every subpage and returns where that was a SIGBUS, ascending.
    pub fn walk(&self) -> Vec<Hit> {
        (0..self.length as u64)
            .step_by(SUBPAGE_SIZE as usize)
            .filter_map(|at| self.load(self.offset + at).err())
            .collect()
    }

    /// madvise(2) on all of it.
    ///
    /// # Errors
    /// What madvise(2) answers.
    pub fn advise(&self, advice: i32) -> Result<()> {
        self.advise_range(Range::at(self.offset, self.length as u64), advice)
    }

    /// madvise(2) on a part of it.
    ///
    /// # Errors
    /// What madvise(2) answers.
    pub fn advise_range(&self, range: Range, advice: i32) -> Result<()> {
        let start = self.pointer(range.start);
        assert!(range.end - self.offset <= self.length as u64);
        // SAFETY: the range is inside of our own mapping, which is only ever accessed byte by byte.
        #[allow(unsafe_code)]
        let result = expecting_news(|| unsafe { libc::madvise(start.cast(), range.len() as usize, advice) })?;
        if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error().into()) }
    }

    /// Keeps the page at `offset` of the file in a pipe (vmsplice(2)): until the pin is dropped its folio has one more
    /// user than the kernel can account for, and cannot be split.
    ///
    /// # Errors
    /// What pipe(2) and vmsplice(2) answer; EFAULT where the page cannot be touched.
    pub fn pin(&self, offset: u64) -> Result<Pin> {
        let (reader, writer) = std::io::pipe()?;
        let bytes = libc::iovec { iov_base: self.pointer(offset).cast(), iov_len: 1 };
        // SAFETY: the one byte is inside of the mapping. The kernel takes a reference to its page and writes nothing.
        #[allow(unsafe_code)]
        let taken = unsafe { libc::vmsplice(writer.as_raw_fd(), &raw const bytes, 1, 0) };
        match taken {
            1 => Ok(Pin::Pipe(reader, writer)),
            _ => Err(std::io::Error::last_os_error().into()),
        }
    }

    /// Makes the page at `offset` of the file a fixed buffer of an io_uring (io_uring_register(2), IORING_REGISTER_BUFFERS): a pin
    /// for good, as devices have that read from or write to memory.
    ///
    /// # Errors
    /// What io_uring_setup(2) and io_uring_register(2) answer.
    pub fn pin_for_io(&self, offset: u64) -> Result<Pin> {
        const REGISTER_BUFFERS: libc::c_uint = 0;
        let mut parameters = [0u8; 120]; // struct io_uring_params
        // SAFETY: the structure has the kernel's size, and zeros are its defaults.
        #[allow(unsafe_code)]
        let ring = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, parameters.as_mut_ptr()) };
        if ring < 0 {
            return Err(std::io::Error::last_os_error().into());
        }
        // SAFETY: the call returned a new descriptor that nobody else owns.
        #[allow(unsafe_code)]
        let ring = unsafe { OwnedFd::from_raw_fd(ring as RawFd) };
        let buffer = libc::iovec { iov_base: self.pointer(offset).cast(), iov_len: SUBPAGE_SIZE as usize };
        // SAFETY: the buffer is inside of the mapping, and nothing is ever read into it.
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
        if registered == 0 { Ok(Pin::Ring(ring)) } else { Err(std::io::Error::last_os_error().into()) }
    }

    fn latest_hit(&self) -> Hit {
        let (address, code) = LATEST.get();
        Hit { subpage: Subpage::containing(self.offset_of(address as u64)), code }
    }
}

/// Keeps a page pinned; see [`Mapping::pin`] and [`Mapping::pin_for_io`].
#[derive(Debug)]
pub enum Pin {
    /// In a pipe.
    Pipe(std::io::PipeReader, std::io::PipeWriter),
    /// As a buffer of an io_uring.
    Ring(OwnedFd),
}

impl Drop for Pin {
    /// A ring that is closed gives its buffers up some time later; whoever drops this may rely on it.
    fn drop(&mut self) {
        const UNREGISTER_BUFFERS: libc::c_uint = 1;
        let Self::Ring(ring) = self else { return };
        let nothing = std::ptr::null::<libc::c_void>();
        // SAFETY: the request takes no argument.
        #[allow(unsafe_code)]
        unsafe {
            libc::syscall(libc::SYS_io_uring_register, ring.as_raw_fd(), UNREGISTER_BUFFERS, nothing, 0)
        };
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `new`, with whatever the handler put into it.
        #[allow(unsafe_code)]
        unsafe {
            libc::munmap(self.base.cast(), self.length)
        };
    }
}

/// Keeps news of memory errors (BUS_MCEERR_AO) from ending a process that maps the memory and has not touched it. A touch
/// that cannot go on still ends it.
///
/// # Errors
/// What sigaction(2) answers.
pub fn survive_news() -> Result<()> {
    install_handler()
}

/// Runs `call`, which makes a memory error: the kernel tells the caller of it as if the caller had touched it (Linux 6.12,
/// madvise_inject_error).
///
/// # Errors
/// What sigaction(2) answers.
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
            // SAFETY: zero is a valid value of every field; the handler has the signature that SA_SIGINFO asks for.
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

/// Continues behind a probing instruction; everything else dies of the signal as if there were no handler.
extern "C" fn handler(_signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let probes = [hugetlb2_load as *const () as u64, hugetlb2_store as *const () as u64];
    // SAFETY: the kernel passes valid pointers (SA_SIGINFO), and the handler runs on the thread that they describe.
    #[allow(unsafe_code)]
    let (address, code, instruction) = unsafe {
        let context = &mut *context.cast::<libc::ucontext_t>();
        ((*info).si_addr() as usize, (*info).si_code, instruction_pointer(context))
    };
    if EXPECTING.get() || code == libc::BUS_MCEERR_AO {
        // News, and nothing that this thread does depends on it.
    } else if probes.contains(instruction) {
        LATEST.set((address, code));
        *instruction = hugetlb2_fault as *const () as u64;
    } else {
        // SAFETY: signal(2) is async-signal-safe; on return the instruction faults again and the default action ends us.
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
