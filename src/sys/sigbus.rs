//! SIGBUS in this process: touches of mapped memory that outlive it, and reports of memory errors
//! that end nothing (sigaction(2)).
//!
//! The two instructions that touch memory have known addresses. If one of them gets the signal, the
//! handler records address and code, and the program continues behind the instruction. The mapping
//! stays as it was. The handler ignores reports. Any other SIGBUS ends the program.

use crate::error::Result;
use crate::units::{SUBPAGE_SIZE, Subpage};
use memmap2::MmapRaw;
use std::cell::Cell;
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
    /// Address, code and logarithm of the thread's latest SIGBUS. The handler writes them.
    static LATEST: Cell<(usize, i32, u8)> = const { Cell::new((0, 0, 0)) };
    /// True while the thread makes a memory error.
    static EXPECTING: Cell<bool> = const { Cell::new(false) };
}

/// A mapping of a file that the program touches as it touches other memory, at any place in it.
#[derive(Debug)]
pub struct Touchable {
    map: MmapRaw,
    start: u64,
}

/// A SIGBUS of a touch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hit {
    /// The touched subpage of the file.
    pub subpage: Subpage,
    /// `si_code`: BUS_ADRERR (2) for a hole, BUS_MCEERR_AR (4) for a memory error.
    pub code: i32,
    /// `si_addr_lsb`: the logarithm of the bytes that a memory error took, 12 for a subpage.
    /// 0 for a hole.
    pub lsb: u8,
}

impl Touchable {
    /// Takes a mapping of which the first byte is the file's byte at `start`.
    ///
    /// # Errors
    /// The errors of sigaction(2).
    pub fn new(map: MmapRaw, start: u64) -> Result<Self> {
        install_handler()?;
        Ok(Self { map, start })
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
        // SAFETY: the byte is inside the mapping, no reference to it exists, and the handler
        // resolves a fault there.
        #[allow(unsafe_code)]
        let value = unsafe { hugetlb2_store(pointer, byte) };
        if value == FAULTED { Err(self.latest_hit()) } else { Ok(()) }
    }

    /// Touches the first byte of every subpage. Returns the touches that got a SIGBUS, in ascending
    /// order.
    pub fn walk(&self) -> Vec<Hit> {
        (0..self.map.len() as u64)
            .step_by(SUBPAGE_SIZE as usize)
            .filter_map(|at| self.load(self.start + at).err())
            .collect()
    }

    fn pointer(&self, offset: u64) -> *mut u8 {
        let at = (offset - self.start) as usize;
        assert!(at < self.map.len(), "offset {offset:#x} is not mapped");
        self.map.as_mut_ptr().wrapping_add(at)
    }

    fn latest_hit(&self) -> Hit {
        let (address, code, lsb) = LATEST.get();
        let at = (address - self.map.as_ptr() as usize) as u64;
        Hit { subpage: Subpage::containing(self.start + at), code, lsb }
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

/// The place of `si_addr_lsb` in siginfo_t (asm-generic/siginfo.h), of which the low byte is here.
const SI_ADDR_LSB: usize = 24;

/// Ignores reports of memory errors. After a SIGBUS of a probe instruction, the thread continues
/// behind it. Any other SIGBUS ends the process, as if there were no handler.
extern "C" fn handler(
    _signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    let probes = [hugetlb2_load as *const () as u64, hugetlb2_store as *const () as u64];
    // SAFETY: the kernel passes valid pointers (SA_SIGINFO) to structures that are filled in
    // whole, and the handler runs on the thread that they describe.
    #[allow(unsafe_code)]
    let (address, code, lsb, instruction) = unsafe {
        let context = &mut *context.cast::<libc::ucontext_t>();
        let lsb = *info.cast::<u8>().add(SI_ADDR_LSB);
        ((*info).si_addr() as usize, (*info).si_code, lsb, instruction_pointer(context))
    };
    let lsb = if code == libc::BUS_ADRERR { 0 } else { lsb };
    if EXPECTING.get() || code == libc::BUS_MCEERR_AO {
        // This is a report, and nothing in this thread depends on it.
    } else if probes.contains(instruction) {
        LATEST.set((address, code, lsb));
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
