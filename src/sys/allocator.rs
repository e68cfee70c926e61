//! Memory that the kernel finds present when it copies a request into it.
//!
//! A thread that is killed while the kernel copies a request to it (fuse_dev_do_read) still completes that, unless a page has to be
//! faulted in: the fault is refused to who is being killed, and the kernel ends the request with EIO instead of keeping it for the next
//! worker. fuser makes the buffers that it reads into itself, one of 16 MiB for each thread, of which nothing has been touched; so they
//! are touched where they are made, as far as a request reaches.

use std::alloc::{GlobalAlloc, Layout, System};

/// Nothing else in the daemon asks for so much at once.
const LARGE: usize = 8 << 20;
/// The largest request, and room for what comes before its data.
const TOUCHED: usize = (1 << 20) + (64 << 10);
const PAGE: usize = 4096;

/// The system's allocator, but for large zeroed memory, of which the beginning is there at once.
pub struct Present;

// SAFETY: all memory is the system's allocator's, asked for and given back with the caller's own layout.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Present {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: passed on as it is.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: passed on as it is.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: passed on as it is.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: passed on as it is.
        let pointer = unsafe { System.alloc_zeroed(layout) };
        if layout.size() >= LARGE && !pointer.is_null() {
            for offset in (0..TOUCHED).step_by(PAGE) {
                // SAFETY: within what was just allocated, and nobody else's yet.
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
        // SAFETY: the layout is not empty; what was allocated is given back with it.
        #[allow(unsafe_code)]
        let (grown, zero) = unsafe {
            let pointer = Present.alloc_zeroed(layout);
            let grown = resident() - before;
            let zero = (0..layout.size()).step_by(PAGE).all(|offset| pointer.add(offset).read() == 0);
            Present.dealloc(pointer, layout);
            (grown, zero)
        };
        assert!(zero);
        assert!((TOUCHED..16 * LARGE).contains(&(grown + (256 << 10))), "{grown} bytes"); // the kernel counts in batches
    }
}
