//! The state of pages in this process's page tables (Documentation/admin-guide/mm/pagemap.rst).

use crate::error::Result;
use std::fs::File;
use std::os::fd::AsRawFd;

/// The page is mapped by a huge entry.
pub const PAGE_IS_HUGE: u64 = 1 << 6;

/// The entry of the page is none of a page. In a shared mapping of tmpfs without swap, that is a
/// marker.
pub const PAGE_IS_SWAPPED: u64 = 1 << 4;

/// `struct page_region` of linux/fs.h.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct PageRegion {
    /// The address of the first byte.
    pub start: u64,
    /// The address behind the last byte.
    pub end: u64,
    categories: u64,
}

/// `struct pm_scan_arg` of linux/fs.h.
#[repr(C)]
#[derive(Default)]
struct PmScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

const _: () = assert!(size_of::<PmScanArg>() == 96 && size_of::<PageRegion>() == 24);

/// Fills `regions` with the parts of `start..end` whose pages have the `category` (Linux 6.7).
/// Returns their number, and the address up to which the kernel has walked. `pagemap` is
/// /proc/self/pagemap.
///
/// # Errors
/// The errors of ioctl(2).
pub fn scan(
    pagemap: &File,
    category: u64,
    start: u64,
    end: u64,
    regions: &mut [PageRegion],
) -> Result<(usize, u64)> {
    // _IOWR('f', 16, struct pm_scan_arg).
    const PAGEMAP_SCAN: libc::Ioctl = 0xc060_6610u32 as libc::Ioctl;
    let mut argument = PmScanArg {
        size: size_of::<PmScanArg>() as u64,
        start,
        end,
        vec: regions.as_mut_ptr() as u64,
        vec_len: regions.len() as u64,
        category_mask: category,
        return_mask: category,
        ..PmScanArg::default()
    };
    // SAFETY: the argument has the kernel's layout and names `regions`, which outlives the call,
    // with its length.
    #[allow(unsafe_code)]
    let count = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut argument) };
    if count < 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    Ok((count as usize, argument.walk_end.max(start + 1)))
}
