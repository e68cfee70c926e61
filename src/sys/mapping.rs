//! The daemon's own mappings of a file, never read or written through by its instructions.
//!
//! Short-lived ones ([`Window`]) are for what only madvise(2) and the page tables can do or tell: put a huge mapping back, find
//! out how memory is mapped and on which node it lies. One that lasts ([`View`]) is where the kernel copies from when it
//! delivers what was read. File bytes go through system calls alone, where a memory error is an errno and not a signal.

use super::policy::{self, Policy};
use super::shortage::{patiently, with_effort};
use super::{meaning, sigbus};
use crate::error::{Error, Result};
use crate::faults::{Want, attempt};
use crate::units::{FOLIO_SIZE, Folio, Range, Subpage};
use memmap2::{Advice, MmapOptions, MmapRaw};
use rustix::io::Errno;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A mapping of a folio-aligned part of a file.
pub struct Window {
    map: MmapRaw,
    range: Range,
}

impl Window {
    /// Maps `range`, grown to whole folios. Takes no memory and touches none.
    ///
    /// # Errors
    /// What mmap(2) answers.
    #[track_caller]
    pub fn new(file: &File, range: Range) -> Result<Self> {
        let range = range.folios_out();
        assert!(!range.is_empty());
        attempt(Want::Memory)?;
        let map = MmapOptions::new().offset(range.start).len(range.len() as usize).map_raw(file)?;
        // tmpfs aligns mappings of `huge=always` files itself since Linux 4.8 (shmem_get_unmapped_area).
        if !(map.as_ptr() as u64).is_multiple_of(FOLIO_SIZE) {
            return Err(Error::Again);
        }
        Ok(Self { map, range })
    }

    fn position(&self, range: Range) -> (usize, usize) {
        assert!(self.range.covers(range), "{range} is outside of the window");
        ((range.start - self.range.start) as usize, range.len() as usize)
    }

    /// Faults `range` in for reading (MADV_POPULATE_READ, Linux 5.14).
    ///
    /// # Errors
    /// [`Error::Poisoned`] where the kernel holds a poisoned page, [`Error::NoData`] where a hole cannot be filled.
    #[track_caller]
    pub fn populate(&self, range: Range) -> Result<()> {
        let (start, length) = self.position(range);
        populate(&self.map, start, length)
    }

    /// Faults `range` in for writing (MADV_POPULATE_WRITE, Linux 5.14), so that it has memory, cleared before anybody
    /// else can see it.
    ///
    /// The machine's free memory may be in smaller pieces than 2 MiB. Only for a mapping with MADV_HUGEPAGE does a fault then wait
    /// for 2 MiB at all, rather than take small pages (`transparent_hugepage/defrag`, as it is by default), and even so it comes to
    /// small pages here (see [`super::shortage`]). [`Window::gather`] puts these together.
    ///
    /// # Errors
    /// [`Error::NoMemory`], [`Error::Full`] where the superblock has no block left or the file ends before `range` does.
    #[track_caller]
    pub fn populate_write(&self, range: Range) -> Result<()> {
        let (start, length) = self.position(range);
        attempt(Want::Room).map_err(meaning)?;
        self.map.advise(Advice::HugePage)?;
        patiently(|| self.map.advise_range(Advice::PopulateWrite, start, length)).map_err(|error| {
            match Errno::from_io_error(&error) {
                Some(Errno::FAULT) => Error::Full,
                Some(errno) => meaning(errno),
                None => error.into(),
            }
        })
    }

    /// Puts each folio of `range` that is in small pages into one 2 MiB page, as far as the machine has some.
    pub fn gather(&self, range: Range) {
        let Ok(huge) = self.huge_ranges() else { return };
        let is_huge = |folio: &Folio| huge.iter().any(|range| range.covers(folio.range()));
        for folio in range.folios().filter(|folio| range.covers(folio.range()) && !is_huge(folio)) {
            if let Err(error) = self.collapse_once(folio) {
                log::debug!("folio {} stays in small pages: {error}", folio.0);
            }
        }
    }

    /// What programs have set for the mapped part of the file by mbind(2) is void: new memory for it comes from where the thread that
    /// asks wants it to. It would be taken where a program says otherwise, however little there is.
    ///
    /// That takes two calls. The kernel passes over what the mapping itself has been told already, and a new mapping has the default
    /// (mm/mempolicy.c, mbind_range, Linux 6.18).
    pub fn void_policy(&self) {
        let set = |policy| policy::set_for_range(self.map.as_mut_ptr(), self.map.len(), policy);
        if let Err(error) = set(Policy::Local).and_then(|()| set(Policy::Default)) {
            log::debug!("a policy of a program may be in force: {error}"); // a kernel without CONFIG_NUMA
        }
    }

    /// Puts `folio` into one 2 MiB page (MADV_COLLAPSE, Linux 6.1); other processes map it so at their next touch.
    ///
    /// # Errors
    /// [`Error::Again`] where somebody holds one of its pages at the moment, [`Error::NoMemory`] where the machine has
    /// no free 2 MiB, [`Error::NoData`] where it has a hole.
    #[track_caller]
    pub fn collapse(&self, folio: Folio) -> Result<()> {
        match self.collapse_once(folio) {
            // So answers Linux 6.12 too, even for a folio that is in one piece, where the process has no page table yet
            // for this GiB of its addresses (find_pmd_or_thp_or_none in mm/khugepaged.c). A touch makes one.
            Err(Error::NoData) => {
                self.populate(Subpage::containing(folio.range().start).range())?;
                self.collapse_once(folio)
            }
            result => result,
        }
    }

    #[track_caller]
    fn collapse_once(&self, folio: Folio) -> Result<()> {
        const MADV_COLLAPSE: libc::c_int = 25;
        attempt(Want::Memory).map_err(|_| Error::NoMemory)?;
        let (start, length) = self.position(folio.range());
        let address = self.map.as_mut_ptr().wrapping_add(start);
        // SAFETY: the range lies in our own mapping, and MADV_COLLAPSE changes how it is mapped, not what it holds.
        #[allow(unsafe_code)]
        let result = with_effort(|| unsafe { libc::madvise(address.cast(), length, MADV_COLLAPSE) });
        if result == 0 {
            return Ok(());
        }
        Err(match Errno::from_io_error(&std::io::Error::last_os_error()) {
            Some(Errno::AGAIN | Errno::BUSY) => Error::Again,
            Some(Errno::NOMEM) => Error::NoMemory,
            Some(Errno::INVAL) => Error::NoData,
            other => Error::Os(other.unwrap_or(Errno::IO)),
        })
    }

    /// Has the kernel treat the mapped page at `subpage` as if the hardware had reported an error in it (MADV_HWPOISON).
    ///
    /// # Errors
    /// [`Error::Unsupported`] where the kernel has no CONFIG_MEMORY_FAILURE.
    pub fn poison(&self, subpage: Subpage) -> Result<()> {
        let (start, length) = self.position(subpage.range());
        let address = self.map.as_mut_ptr().wrapping_add(start);
        // SAFETY: the page lies in our own mapping, of which nothing is ever read or written.
        #[allow(unsafe_code)]
        let result =
            sigbus::expecting_news(|| unsafe { libc::madvise(address.cast(), length, libc::MADV_HWPOISON) })?;
        if result == 0 {
            return Ok(());
        }
        match Errno::from_io_error(&std::io::Error::last_os_error()) {
            // The page is marked as bad, only its folio could not be split: somebody has pinned it.
            Some(Errno::HWPOISON) => Ok(()),
            Some(Errno::INVAL) => Err(Error::Unsupported),
            other => Err(Error::Os(other.unwrap_or(Errno::IO))),
        }
    }

    /// The parts of the window that are mapped by 2 MiB entries right now (PAGEMAP_SCAN, Linux 6.7), ascending.
    ///
    /// # Errors
    /// What ioctl(2) on /proc/self/pagemap answers.
    #[track_caller]
    pub fn huge_ranges(&self) -> Result<Vec<Range>> {
        attempt(Want::Descriptor)?;
        let pagemap = File::open("/proc/self/pagemap")?;
        let base = self.map.as_ptr() as u64;
        let end = base + self.range.len();
        let mut found = Vec::new();
        let mut start = base;
        while start < end {
            let mut regions = [PageRegion::default(); 64];
            let (count, walked_to) = scan_huge(&pagemap, start, end, &mut regions)?;
            found.extend(regions[..count].iter().map(|region| {
                Range::new(region.start - base + self.range.start, region.end - base + self.range.start)
            }));
            start = walked_to;
        }
        Ok(found)
    }

    /// The NUMA node of the page at `offset`, which must be mapped; `None` where it is not (move_pages(2)).
    pub fn node_of(&self, offset: u64) -> Option<u32> {
        let (start, _) = self.position(Range::at(offset, 1));
        let page: *const u8 = self.map.as_ptr().wrapping_add(start);
        let mut status: libc::c_int = -1;
        // SAFETY: one page and one status, both alive for the call; without target nodes nothing is moved.
        #[allow(unsafe_code)]
        let result = unsafe {
            libc::syscall(
                libc::SYS_move_pages,
                0,
                1usize,
                &raw const page,
                std::ptr::null::<libc::c_int>(),
                &raw mut status,
                0,
            )
        };
        (result == 0).then(|| u32::try_from(status).ok()).flatten()
    }
}

#[track_caller]
fn populate(map: &MmapRaw, start: usize, length: usize) -> Result<()> {
    attempt(Want::Memory).map_err(meaning)?;
    let populated = patiently(|| map.advise_range(Advice::PopulateRead, start, length)); // a hole may get memory
    populated.map_err(|error| match Errno::from_io_error(&error) {
        Some(Errno::FAULT) => Error::NoData,
        Some(errno) => meaning(errno),
        None => error.into(),
    })
}

/// A mapping of a file from its start on, for as long as the file is read; it may be longer than the file.
#[derive(Debug)]
pub struct View(MmapRaw);

/// Those that there are.
static VIEWS: AtomicUsize = AtomicUsize::new(0);

impl Drop for View {
    fn drop(&mut self) {
        VIEWS.fetch_sub(1, Ordering::Relaxed);
    }
}

impl View {
    /// Maps `length` bytes. Takes no memory and touches none.
    ///
    /// # Errors
    /// What mmap(2) answers.
    #[track_caller]
    pub fn new(file: &File, length: u64) -> Result<Self> {
        attempt(Want::Memory)?;
        let map = MmapOptions::new().len(length as usize).map_raw_read_only(file)?;
        VIEWS.fetch_add(1, Ordering::Relaxed);
        Ok(Self(map))
    }

    /// How many there are in this process.
    pub fn count() -> usize {
        VIEWS.load(Ordering::Relaxed)
    }

    /// How long it is.
    pub fn length(&self) -> u64 {
        self.0.len() as u64
    }

    /// Faults `range` in, which has to be done before each use: what was mapped may have been taken out since.
    ///
    /// # Errors
    /// As for [`Window::populate`].
    #[track_caller]
    pub fn populate(&self, range: Range) -> Result<()> {
        populate(&self.0, range.start as usize, range.len() as usize)
    }

    /// The bytes of `range`, to be named to a system call. They are other programs' to change and the kernel's to take away: no
    /// instruction of ours may read them. The call may answer EFAULT for them, and a read of FUSE ends with EIO then; that takes a
    /// memory error, or the end of this process, in the microseconds since they were faulted in.
    pub fn bytes(&self, range: Range) -> &[u8] {
        assert!(range.end <= self.length(), "{range} is outside of the view");
        // SAFETY: the range lies in a mapping that lives as long as the slice. See above for what must not be done with it.
        #[allow(unsafe_code)]
        unsafe {
            std::slice::from_raw_parts(self.0.as_ptr().add(range.start as usize), range.len() as usize)
        }
    }
}

/// `struct page_region` of linux/fs.h.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
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

/// Fills `regions` with what is mapped huge in `start..end`; returns how many, and how far the walk came.
fn scan_huge(pagemap: &File, start: u64, end: u64, regions: &mut [PageRegion]) -> Result<(usize, u64)> {
    const PAGEMAP_SCAN: libc::Ioctl = 0xc060_6610u32 as libc::Ioctl; // _IOWR('f', 16, struct pm_scan_arg)
    const PAGE_IS_HUGE: u64 = 1 << 6;
    let mut argument = PmScanArg {
        size: size_of::<PmScanArg>() as u64,
        start,
        end,
        vec: regions.as_mut_ptr() as u64,
        vec_len: regions.len() as u64,
        category_mask: PAGE_IS_HUGE,
        return_mask: PAGE_IS_HUGE,
        ..PmScanArg::default()
    };
    // SAFETY: the argument has the kernel's layout and names `regions`, which outlives the call, with its length.
    #[allow(unsafe_code)]
    let count = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut argument) };
    if count < 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    Ok((count as usize, argument.walk_end.max(start + 1)))
}
