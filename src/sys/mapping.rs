//! The daemon's own mappings of a file. No instruction of the daemon reads or writes through them.
//!
//! A [`Window`] is short-lived. It serves the work that only madvise(2) and the page tables can do:
//! put a huge mapping back, find out how memory is mapped and on which NUMA node it lies. A
//! [`View`] lasts. The kernel copies from it when it delivers the bytes of a read. File bytes go
//! through system calls alone, where a memory error is an errno and not a signal.

use super::pagemap::{PAGE_IS_HUGE, PageRegion, scan};
use super::policy::{self, Policy, RangePolicy, Told};
use super::processors::{at_once, threads_for};
use super::shortage::{patiently, with_effort};
use super::{meaning, sigbus};
use crate::error::{Error, Result};
use crate::faults::{Want, attempt};
use crate::units::{FOLIO_SIZE, Folio, NumaNode, Range, Subpage};
use memmap2::{Advice, MmapOptions, MmapRaw};
use rustix::io::Errno;
use std::fs::File;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A mapping of a folio-aligned part of a file.
pub struct Window {
    map: MmapRaw,
    range: Range,
}

impl Window {
    /// Maps `range`, extended to whole folios. Takes no memory and touches none.
    ///
    /// # Errors
    /// The errors of mmap(2).
    #[track_caller]
    pub fn new(file: &File, range: Range) -> Result<Self> {
        let range = range.folios_out();
        assert!(!range.is_empty());
        attempt(Want::Memory)?;
        let map = MmapOptions::new().offset(range.start).len(range.len() as usize).map_raw(file)?;
        // tmpfs aligns mappings of `huge=always` files by itself since Linux 4.8
        // (shmem_get_unmapped_area).
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
    /// [`Error::Quarantined`] where a page of the range has a memory error, [`Error::NoData`] where
    /// a hole cannot be filled.
    #[track_caller]
    pub fn populate(&self, range: Range) -> Result<()> {
        let (start, length) = self.position(range);
        populate(&self.map, start, length)
    }

    /// Faults `range` in for writing (MADV_POPULATE_WRITE, Linux 5.14), so that the range has
    /// memory. The kernel clears the memory before any program can see it. Several processors clear
    /// a large range.
    ///
    /// The machine's free memory may be in pieces smaller than 2 MiB. A fault waits for 2 MiB, and
    /// does not take small pages at once, only in a mapping with MADV_HUGEPAGE
    /// (`transparent_hugepage/defrag`, by default). Even so the fault may end in small pages here
    /// (see [`super::shortage`]). [`Window::gather`] puts these together.
    ///
    /// # Errors
    /// [`Error::NoMemory`]; [`Error::Full`] where the superblock has no free block or the file ends
    /// before `range` does.
    #[track_caller]
    pub fn populate_write(&self, range: Range) -> Result<()> {
        self.populate_by(range, threads_for(range.len()))
    }

    /// As [`Window::populate_write`], by so many threads.
    #[track_caller]
    fn populate_by(&self, range: Range, threads: u64) -> Result<()> {
        attempt(Want::Room).map_err(meaning)?;
        self.map.advise(Advice::HugePage)?;
        let part = range.len().div_ceil(threads).next_multiple_of(FOLIO_SIZE);
        at_once(range.steps(part), |part| self.populate_part(part))
    }

    fn populate_part(&self, part: Range) -> Result<()> {
        let (start, length) = self.position(part);
        patiently(|| self.map.advise_range(Advice::PopulateWrite, start, length)).map_err(|error| {
            match Errno::from_io_error(&error) {
                Some(Errno::FAULT) => Error::Full,
                Some(errno) => meaning(errno),
                None => error.into(),
            }
        })
    }

    /// Makes one 2 MiB page of each folio of `range` that is in small pages, as far as the machine
    /// has 2 MiB pages.
    pub fn gather(&self, range: Range) {
        let Ok(huge) = self.huge_ranges() else { return };
        let is_huge = |folio: &Folio| huge.iter().any(|range| range.covers(folio.range()));
        for folio in range.folios().filter(|folio| range.covers(folio.range()) && !is_huge(folio)) {
            if let Err(error) = self.collapse_once(folio) {
                log::debug!("folio {} stays in small pages: {error}", folio.0);
            }
        }
    }

    /// Sets aside the policies that programs have set for the mapped part of the file by mbind(2),
    /// until the guard is dropped. New memory then comes from the NUMA node that the asking thread
    /// wants. With a program's policy the kernel would take it from the program's node, however
    /// little memory that node has.
    pub fn set_policies_aside(self) -> PoliciesAside {
        let mut policies: Vec<(Range, Told)> = Vec::new();
        for range in self.range.folios().map(Folio::range) {
            let Ok(Some(told)) = self.told_at(range.start) else { continue };
            match policies.last_mut() {
                Some((run, last)) if run.end == range.start && *last == told => run.end = range.end,
                _ => policies.push((range, told)),
            }
        }
        // Without one, nothing is voided: else a policy that is set at this moment would be lost.
        if !policies.is_empty() {
            self.void_policy();
        }
        PoliciesAside { window: self, policies }
    }

    /// This takes two calls. The kernel passes over a policy that the mapping itself already has,
    /// and a new mapping has the default (mm/mempolicy.c, mbind_range, Linux 6.18).
    fn void_policy(&self) {
        let set =
            |policy| policy::set_for_range(self.map.as_ptr() as usize, self.map.len(), policy);
        if let Err(error) = set(Policy::Local).and_then(|()| set(Policy::Default)) {
            log::debug!("a policy of a program may be in force: {error}"); // a kernel without CONFIG_NUMA
        }
    }

    fn told_at(&self, offset: u64) -> Result<Option<Told>> {
        let (start, _) = self.position(Range::at(offset, 1));
        policy::of_address(self.map.as_ptr() as usize + start)
    }

    /// The policy that a program has set for the file at `offset` by mbind(2)
    /// ([`Told::meaning`](policy::Told::meaning)).
    ///
    /// # Errors
    /// ENOSYS on a kernel without CONFIG_NUMA.
    pub fn policy_at(&self, offset: u64) -> Result<Option<RangePolicy>> {
        Ok(self.told_at(offset)?.and_then(|told| told.meaning()))
    }

    /// Puts `folio` into one 2 MiB page (MADV_COLLAPSE, Linux 6.1). Other processes map it as one
    /// at their next touch.
    ///
    /// # Errors
    /// [`Error::Again`] where one of the folio's pages is in use at the moment, [`Error::NoMemory`]
    /// where the machine has no free 2 MiB, [`Error::NoData`] where the folio has a hole.
    #[track_caller]
    pub fn collapse(&self, folio: Folio) -> Result<()> {
        match self.collapse_once(folio) {
            // Linux 6.12 also answers EINVAL for a folio in one piece, if this process has no page
            // table yet for this GiB of its addresses (find_pmd_or_thp_or_none in mm/khugepaged.c).
            // A touch makes one.
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
        // SAFETY: the range lies in our own mapping. MADV_COLLAPSE changes how the range is mapped,
        // not the bytes in it.
        #[allow(unsafe_code)]
        let result =
            with_effort(|| unsafe { libc::madvise(address.cast(), length, MADV_COLLAPSE) });
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

    /// Makes the kernel treat the mapped page at `subpage` as if the hardware had reported an error
    /// in it (MADV_HWPOISON).
    ///
    /// # Errors
    /// [`Error::Unsupported`] where the kernel has no CONFIG_MEMORY_FAILURE.
    pub fn poison(&self, subpage: Subpage) -> Result<()> {
        let (start, length) = self.position(subpage.range());
        let address = self.map.as_mut_ptr().wrapping_add(start);
        // SAFETY: the page lies in our own mapping, and no instruction reads or writes that
        // mapping.
        #[allow(unsafe_code)]
        let result = sigbus::expecting_news(|| unsafe {
            libc::madvise(address.cast(), length, libc::MADV_HWPOISON)
        })?;
        if result == 0 {
            return Ok(());
        }
        match Errno::from_io_error(&std::io::Error::last_os_error()) {
            // The page is marked as bad. The kernel could not split its folio, as the folio is
            // pinned.
            Some(Errno::HWPOISON) => Ok(()),
            Some(Errno::INVAL) => Err(Error::Unsupported),
            other => Err(Error::Os(other.unwrap_or(Errno::IO))),
        }
    }

    /// The parts of the window that are mapped by 2 MiB entries at this moment (PAGEMAP_SCAN, Linux
    /// 6.7), ascending.
    ///
    /// # Errors
    /// The errors of opening /proc/self/pagemap and of ioctl(2) on it.
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
            let (count, walked_to) = scan(&pagemap, PAGE_IS_HUGE, start, end, &mut regions)?;
            found.extend(regions[..count].iter().map(|region| {
                Range::new(
                    region.start - base + self.range.start,
                    region.end - base + self.range.start,
                )
            }));
            start = walked_to;
        }
        Ok(found)
    }

    /// The NUMA node of the page at each of `offsets` (move_pages(2)). `None` where the page is not
    /// mapped.
    pub fn nodes_of(&self, offsets: &[u64]) -> Vec<Option<NumaNode>> {
        let node = |status: libc::c_int| u32::try_from(status).ok().map(NumaNode);
        match self.move_pages(offsets, None) {
            Ok(statuses) => statuses.into_iter().map(node).collect(),
            Err(_) => vec![None; offsets.len()],
        }
    }

    /// Moves the folios that are mapped at `offsets` to `node`, in one piece each, for all
    /// processes that map them (move_pages(2) with MPOL_MF_MOVE_ALL). Every process that maps one
    /// waits for its copy. A folio that is pinned stays, so the caller asks [`Window::nodes_of`]
    /// afterwards.
    ///
    /// A folio moves in one piece only if the node has as large a free piece: else the kernel
    /// splits the folio and moves small pages.
    ///
    /// # Errors
    /// EPERM without CAP_SYS_NICE; ENODEV, EINVAL or EACCES for a node that is not there or not
    /// allowed by the process's cpuset.
    pub fn migrate(&self, offsets: &[u64], node: NumaNode) -> Result<()> {
        self.move_pages(offsets, Some(node)).map(drop)
    }

    /// The status that move_pages(2) returns for each page: a node, or a negative errno.
    fn move_pages(&self, offsets: &[u64], to: Option<NumaNode>) -> Result<Vec<libc::c_int>> {
        const MPOL_MF_MOVE_ALL: libc::c_int = 1 << 2;
        let address = |offset: &u64| -> *const u8 {
            self.map.as_ptr().wrapping_add(self.position(Range::at(*offset, 1)).0)
        };
        let pages: Vec<_> = offsets.iter().map(address).collect();
        let mut statuses = vec![-1 as libc::c_int; pages.len()];
        let nodes = to.map(|NumaNode(node)| vec![node as libc::c_int; pages.len()]);
        let nodes = nodes.as_ref().map_or(std::ptr::null(), |nodes| nodes.as_ptr());
        // SAFETY: all arrays have as many entries as the call names, and are alive for the call.
        // The move of a page changes neither its bytes nor the mapping.
        #[allow(unsafe_code)]
        let result = unsafe {
            libc::syscall(
                libc::SYS_move_pages,
                0,
                pages.len(),
                pages.as_ptr(),
                nodes,
                statuses.as_mut_ptr(),
                if to.is_some() { MPOL_MF_MOVE_ALL } else { 0 },
            )
        };
        // A positive number counts pages that did not move.
        if result >= 0 { Ok(statuses) } else { Err(std::io::Error::last_os_error().into()) }
    }
}

/// The guard that [`Window::set_policies_aside`] returns. Where a program has set another policy
/// meanwhile, that one stays.
#[must_use = "the policies are in force again when the guard is dropped"]
pub struct PoliciesAside {
    window: Window,
    policies: Vec<(Range, Told)>,
}

impl Drop for PoliciesAside {
    fn drop(&mut self) {
        for (range, told) in &self.policies {
            let (start, length) = self.window.position(*range);
            let is_free = |told| matches!(told, Ok(None));
            let set = || told.set_for_range(self.window.map.as_ptr() as usize + start, length);
            if let Err(error) = is_free(self.window.told_at(range.start)).then(set).transpose() {
                log::debug!("a program has lost the policy of {range}: {error}");
            }
        }
    }
}

#[track_caller]
fn populate(map: &MmapRaw, start: usize, length: usize) -> Result<()> {
    attempt(Want::Memory).map_err(meaning)?;
    // A hole may get memory.
    let populated = patiently(|| map.advise_range(Advice::PopulateRead, start, length));
    populated.map_err(|error| match Errno::from_io_error(&error) {
        Some(Errno::FAULT) => Error::NoData,
        Some(errno) => meaning(errno),
        None => error.into(),
    })
}

/// A mapping of a file from its start on, for as long as the file is read. It may be longer than
/// the file.
#[derive(Debug)]
pub struct View(MmapRaw);

/// The number of views in this process.
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
    /// The errors of mmap(2).
    #[track_caller]
    pub fn new(file: &File, length: u64) -> Result<Self> {
        attempt(Want::Memory)?;
        let map = MmapOptions::new().len(length as usize).map_raw_read_only(file)?;
        VIEWS.fetch_add(1, Ordering::Relaxed);
        Ok(Self(map))
    }

    /// The number of views in this process.
    pub fn count() -> usize {
        VIEWS.load(Ordering::Relaxed)
    }

    /// The length in bytes.
    pub fn length(&self) -> u64 {
        self.0.len() as u64
    }

    /// Faults `range` in. The caller does so before each use, as memory may have been taken out
    /// since the last one.
    ///
    /// # Errors
    /// Those of [`Window::populate`].
    #[track_caller]
    pub fn populate(&self, range: Range) -> Result<()> {
        populate(&self.0, range.start as usize, range.len() as usize)
    }

    /// The bytes of `range`, as an argument for a system call. Other programs may change these
    /// bytes, and the kernel may take them away, so no instruction of the daemon may read them. The
    /// call may answer EFAULT for them, and a read of FUSE then ends with EIO. For that, a memory
    /// error or the end of this process must fall into the microseconds since the range was faulted
    /// in.
    pub fn bytes(&self, range: Range) -> &[u8] {
        assert!(range.end <= self.length(), "{range} is outside of the view");
        // SAFETY: the range lies in a mapping that lives as long as the slice. The comment above
        // says what callers must not do with the slice.
        #[allow(unsafe_code)]
        unsafe {
            std::slice::from_raw_parts(
                self.0.as_ptr().add(range.start as usize),
                range.len() as usize,
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::{calls, tmpfs};
    use crate::units::SUBPAGE_SIZE;
    use rustix::fs::{Mode, OFlags};

    #[test]
    fn several_threads_fill_a_range_or_say_that_it_does_not_fit() {
        const SIZE: u64 = 16 * FOLIO_SIZE;
        for (blocks, threads) in [(SIZE, 1), (SIZE, 3), (SIZE, 16), (SIZE - FOLIO_SIZE, 3)] {
            let options = tmpfs::Options {
                blocks: Some(blocks / SUBPAGE_SIZE),
                huge: true,
                ..Default::default()
            };
            let mount = tmpfs::create(&options).expect("root makes superblocks");
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC;
            let file = calls::openat(&mount, c"file", flags, Mode::from_raw_mode(0o600)).unwrap();
            let file = File::from(file);
            tmpfs::set_size(&file, SIZE).unwrap();
            let all = Range::new(0, SIZE);
            let filled = Window::new(&file, all).unwrap().populate_by(all, threads);
            let resident = tmpfs::resident(&file, all).unwrap() * SUBPAGE_SIZE;
            match blocks {
                SIZE => assert!(filled.is_ok() && resident == SIZE, "{threads}: {filled:?}"),
                _ => assert!(matches!(filled, Err(Error::Full)), "{filled:?}, {resident} bytes"),
            }
        }
    }
}
