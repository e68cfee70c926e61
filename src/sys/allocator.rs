//! The daemon's memory: present when the kernel copies a request into it, and at hand when a thread
//! answers a request.
//!
//! **Present.** The kernel copies each request into the buffer of a thread (fuse_dev_do_read). If
//! the thread is killed during the copy, the kernel still completes it, unless a page must be
//! faulted in. The kernel refuses a fault to a dying thread, and then ends the request with EIO
//! instead of keeping it for the next worker. fuser allocates these buffers itself, 16 MiB for each
//! thread, and leaves them untouched. So the allocator touches the beginning of each buffer, as far
//! as a request reaches.
//!
//! **At hand.** The threads of a process share the lock of its address space (mmap_lock). A thread
//! that has the kernel fill, map or collapse memory holds that lock for milliseconds, and longer
//! where other programs take its processor. glibc waits for the lock whenever it lengthens a heap
//! (mprotect(2)), and lets threads share heaps, so all threads that share the heap wait, too. A
//! thread that serves must not wait for that. So each thread has a heap of its own, which is long
//! enough from the start, and which glibc does not shorten.

use std::alloc::{GlobalAlloc, Layout, System};

/// Nothing else in the daemon allocates so much at once.
const LARGE: usize = 8 << 20;
/// The largest request, with room for the headers before its data.
const TOUCHED: usize = (1 << 20) + (64 << 10);
const PAGE: usize = 4096;

/// Heaps: more than there are threads, but for those that wait. A heap is 64 MiB of addresses, and
/// memory as far as it is touched.
const HEAPS: libc::c_int = 64;
/// By so much a heap is longer than what was asked for.
const AHEAD: libc::c_int = 1 << 20;
/// So much is free at the end of a heap before that is shortened.
const KEPT: libc::c_int = 8 << 20;

/// Has the allocator keep the promise of this module's head in this process. To be called while
/// there is one thread.
pub fn keep_memory_at_hand() {
    for (parameter, value) in
        [(libc::M_ARENA_MAX, HEAPS), (libc::M_TOP_PAD, AHEAD), (libc::M_TRIM_THRESHOLD, KEPT)]
    {
        // SAFETY: mallopt(3) changes numbers of the allocator's.
        #[allow(unsafe_code)]
        let is_set = unsafe { libc::mallopt(parameter, value) };
        assert_eq!(is_set, 1, "glibc knows these parameters");
    }
}

/// The system's allocator. The beginning of large zeroed memory is present at once.
pub struct Present;

// SAFETY: all calls go to the system's allocator, with the caller's own layout.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Present {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the arguments are the caller's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the arguments are the caller's.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the arguments are the caller's.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the arguments are the caller's.
        let pointer = unsafe { System.alloc_zeroed(layout) };
        if layout.size() >= LARGE && !pointer.is_null() {
            for offset in (0..TOUCHED).step_by(PAGE) {
                // SAFETY: the byte is in the new allocation, which no other code has yet.
                unsafe { pointer.add(offset).write_volatile(0) };
            }
        }
        pointer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_beginning_of_large_zeroed_memory_is_present() {
        let resident = || {
            let text = std::fs::read_to_string("/proc/thread-self/statm").unwrap();
            text.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * PAGE
        };
        let layout = Layout::from_size_align(16 * LARGE, 1).unwrap();
        let before = resident();
        // SAFETY: the layout is not empty, and the memory is given back with the same layout.
        #[allow(unsafe_code)]
        let (grown, zero) = unsafe {
            let pointer = Present.alloc_zeroed(layout);
            let grown = resident() - before;
            let zero =
                (0..layout.size()).step_by(PAGE).all(|offset| pointer.add(offset).read() == 0);
            Present.dealloc(pointer, layout);
            (grown, zero)
        };
        assert!(zero);
        assert!((TOUCHED..16 * LARGE).contains(&(grown + (256 << 10))), "{grown} bytes"); // the kernel counts in batches
    }
}
