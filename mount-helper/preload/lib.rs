//! The library that `hugetlb2 guard` loads into a program (LD_PRELOAD). Functions of the C library
//! that change mappings are replaced here, so the guard ([`hugetlb2fs::guard`]) learns of the files
//! that the program maps. Each makes the system call, as the C library does.
//!
//! The functions are in a library of their own: a program that links them calls them in place of
//! those of the C library.
//!
//! Mappings that the program changes by syscall(2) pass the guard by, as do those that the C
//! library makes for itself.

use hugetlb2fs::guard;
use hugetlb2fs::units::Range;
use libc::{c_int, c_long, c_void, off_t, size_t};
use std::os::fd::BorrowedFd;

/// mmap(2). A file of a pool that is mapped shared is guarded before this returns.
///
/// # Safety
/// As that of the C library.
#[allow(unsafe_code)] // SAFETY: the function has the signature of the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mmap(
    address: *mut c_void,
    length: size_t,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    offset: off_t,
) -> *mut c_void {
    // SAFETY: the arguments are the caller's.
    let map =
        || unsafe { libc::syscall(libc::SYS_mmap, address, length, protection, flags, fd, offset) };
    let mapped = if flags & libc::MAP_FIXED == 0 { map() } else { guard::changing(map) };
    let is_shared = matches!(
        flags & (libc::MAP_SHARED | libc::MAP_PRIVATE | libc::MAP_SHARED_VALIDATE),
        libc::MAP_SHARED | libc::MAP_SHARED_VALIDATE
    );
    if mapped != FAILED && is_shared && flags & libc::MAP_ANONYMOUS == 0 && fd >= 0 {
        // SAFETY: the kernel has just mapped the file of this descriptor.
        let file = unsafe { BorrowedFd::borrow_raw(fd) };
        let _ = guard::watch(file); // a file of another filesystem, or the guard has said why
    }
    pointer(mapped)
}

/// The same.
///
/// # Safety
/// As that of the C library.
#[allow(unsafe_code)] // SAFETY: the function has the signature of the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mmap64(
    address: *mut c_void,
    length: size_t,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    offset: off_t,
) -> *mut c_void {
    // SAFETY: the arguments are the caller's.
    unsafe { mmap(address, length, protection, flags, fd, offset) }
}

/// munmap(2).
///
/// # Safety
/// As that of the C library.
#[allow(unsafe_code)] // SAFETY: the function has the signature of the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn munmap(address: *mut c_void, length: size_t) -> c_int {
    // SAFETY: the arguments are the caller's.
    guard::changing(|| unsafe { libc::syscall(libc::SYS_munmap, address, length) }) as c_int
}

/// mremap(2). The kernel moves markers with the mapping, and a part that is new has none.
///
/// # Safety
/// As that of the C library.
// SAFETY: the C library's function has the same signature, but that the last argument is only
// there if a flag says so, and is only read then.
#[allow(unsafe_code)]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mremap(
    address: *mut c_void,
    length: size_t,
    new_length: size_t,
    flags: c_int,
    new_address: *mut c_void,
) -> *mut c_void {
    // SAFETY: the arguments are the caller's.
    let mapped = guard::changing(|| unsafe {
        libc::syscall(libc::SYS_mremap, address, length, new_length, flags, new_address)
    });
    if mapped != FAILED && (new_length > length || flags & libc::MREMAP_DONTUNMAP != 0) {
        guard::moved();
    }
    pointer(mapped)
}

/// madvise(2). A marker that the call removes is set again.
///
/// # Safety
/// As that of the C library.
#[allow(unsafe_code)] // SAFETY: the function has the signature of the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn madvise(address: *mut c_void, length: size_t, advice: c_int) -> c_int {
    // SAFETY: the arguments are the caller's.
    let done = unsafe { libc::syscall(libc::SYS_madvise, address, length, advice) };
    let discards =
        matches!(advice, libc::MADV_DONTNEED | libc::MADV_DONTNEED_LOCKED | libc::MADV_REMOVE);
    if done == 0 && discards {
        let start = address.addr() as u64;
        guard::discarded(Range::new(start, start.saturating_add(length as u64)));
    }
    done as c_int
}

/// As MAP_FAILED.
const FAILED: c_long = -1;

fn pointer(address: c_long) -> *mut c_void {
    std::ptr::with_exposed_provenance_mut(address as usize)
}
