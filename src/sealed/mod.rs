//! A sealed file: a tmpfs superblock of its own, all of whose blocks are taken.
//!
//! The superblock has two files. Programs map `data`. The *ledger* keeps the bytes of quarantined
//! subpages.
//!
//! ```text
//!          data                                     ledger
//!   +-------+-------+---------+---------+     +---+- - - -+----+- - -+----+
//!   | 2 MiB | 2 MiB |  2 MiB  |   no    |     | h |       | r1 |     | r2 |
//!   | folio | folio |  *   *  | memory  |     |   |       |    |     |    |
//!   +-------+-------+---------+---------+     +---+- - - -+----+- - -+----+
//!
//!   *        a soft hole: a quarantined subpage, which is punched out of data
//!   r1, r2   the ledger's blocks, with the bytes of these two holes
//!   h        a block that is always there; between the blocks the ledger has no memory
//!
//!   blocks of data   = 512 * folios with memory - soft holes
//!   blocks of ledger = 1 + soft holes
//!   limit            = blocks of data + blocks of ledger = 512 * folios with memory + 1
//! ```
//!
//! > **S1.** A sealed file has no free block. There are five exceptions:
//! > - inside a resize;
//! > - for the microseconds of a quarantine or repair;
//! > - for gaps that a program requested (see below), in a file without soft holes;
//! > - while programs have `data` open by themselves (see below), in such a file, too;
//! > - after a program has punched the file by madvise(2) with MADV_REMOVE, until the next request
//! >   for the file, or the patrol, has taken that memory back.
//!
//! S1 keeps every soft hole of `data` empty. A fault in a hole finds no block, and becomes SIGBUS
//! in every process that maps the file. A write to a hole fails with ENOSPC. Only this module
//! changes the number of blocks that a superblock has, takes or frees. So this module owns S1.
//!
//! **Locks.** A function with `&mut self` needs the caller's exclusive lock on the file. The
//! function leaves S1 as it found S1, whatever it returns. Functions with `&self` may run at the
//! same time. No lock stops a program that maps the file: the program may touch the file at any
//! instruction. If the program touches a hole while a block is free, the hole takes that block and
//! becomes a *stray*. [`Sealed::shut_strays`] finds strays by cachestat(2), punches them again,
//! counts them and logs them.
//!
//! **No uncleared folio is ever within a program's reach.** The daemon takes memory for `data` by a
//! write fault of its own, below the end of file. There tmpfs clears a folio before any program can
//! see it. fallocate(2) would be faster, as it clears nothing. But a program that calls
//! MADV_COLLAPSE on an uncleared folio maps it with the bytes of its former user, even beyond the
//! end of file (Linux 6.18: `collapse_pte_mapped_thp` does not look at the uptodate flag). So the
//! daemon calls fallocate(2) only for memory that no program can map ([`Reach::Private`]), for
//! parts of a folio, which MADV_COLLAPSE leaves alone, and for a file that no program has opened
//! yet.
//!
//! **Memory ahead.** Such a file can have memory behind its end: fallocate(2) takes it, and a
//! second fallocate(2) clears it in place. It counts as memory of the file (S1). When the file gets
//! longer, the end of file moves over it. A program that has the file open can reach it by
//! MADV_COLLAPSE, and even store there; so it goes back to the reserve like any other memory, and
//! is cleared again before another file gets it.
//!
//! **Gaps.** In a file without soft holes, S1 has nothing to keep shut. [`Sealed::punch`] punches
//! memory out of such a file and leaves the blocks free. A touch, a write or userfaultfd(2) fills
//! the gap with cleared memory. A note with the file says that a program requested the gaps. Until
//! the gaps are filled, no folio moves between this file and another, except when the file is
//! dismantled. A worker that opens the file leaves the gaps as they are: if it put memory into a
//! gap, userfaultfd(2) would report the gap as filled. For the same reason, code that only looks at
//! memory touches no gap ([`Sealed::present`]). Before a change that needs S1,
//! [`Sealed::reclaim_removed`] fills the gaps.
//!
//! **A door.** A program can have `data` itself open, without FUSE ([`Sealed::open_door`]). It can
//! do what a file of tmpfs lets it do: punch gaps, and change the size. So a file with a door is
//! one with gaps on request, and its true size is noted with it. Whatever the program does, it does
//! to this superblock alone, whose limit the program cannot change.

mod check;
mod door;
mod gaps;
mod holes;
mod huge;
mod hw_errors;
mod ledger;
mod quarantine;
mod record;
mod recovery;

pub use holes::{Hole, Holes};
pub use ledger::{Bytes, Notes, check_version, header_at};
use ledger::{LEDGER, Ledger};
pub use record::Header;

use crate::error::{Error, Result};
use crate::steps::{self, Step, insist};
use crate::sys::mapping::Window;
use crate::sys::{calls, handle, tmpfs};
use crate::units::{
    FOLIO_SIZE, Folio, InodeId, NumaNode, Range, SUBPAGE_SIZE, SUBPAGES_PER_FOLIO, Subpage,
};
use rustix::fs::{Mode, OFlags};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

/// Tries at a change that a program can spoil by hammering the file. A try takes some 10 us. The
/// worst case seen needed 200 tries.
const TRIES: u32 = 10_000;

const UNWINNABLE: &str = "the subpage is pinned (vmsplice, io_uring, VFIO or the like), or touched faster than it can be \
    taken away";

/// Name of the note that says that a program requested gaps in the file.
const PUNCHED: &str = "punched";

/// Strays that were found and shut again since the daemon started.
pub static STRAYS_SHUT: AtomicU64 = AtomicU64::new(0);

/// Says if programs can map the `data` of a sealed file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Programs can map it. Memory is cleared before they can see it.
    Programs,
    /// Only the daemon has it, and never reads it. Memory stays as the kernel delivers it.
    Private,
}

/// The content of repaired subpages.
#[derive(Clone, Copy, Debug)]
pub enum Content<'a> {
    /// Zeros.
    Zero,
    /// The bytes that are known, and zeros where no bytes are known.
    Known,
    /// These bytes.
    Bytes {
        /// Offset in the file of the first byte.
        start: u64,
        /// The bytes. They reach at least to the end of the repaired range, or to the end of file.
        bytes: &'a [u8],
    },
}

impl Content<'_> {
    /// The bytes for `range`, which is part of one subpage or of the range of `Bytes`. Of a memory
    /// error no bytes are known, so `Known` gives zeros here.
    fn of(&self, range: Range) -> &[u8] {
        const ZEROS: &Bytes = &[0; SUBPAGE_SIZE as usize];
        let length = range.len() as usize;
        match self {
            Self::Zero | Self::Known => &ZEROS[..length],
            Self::Bytes { start, bytes } => &bytes[(range.start - start) as usize..][..length],
        }
    }
}

/// A sealed file. Dropping it closes the file. The kernel frees the memory with the last user of
/// the superblock.
#[derive(Debug)]
pub struct Sealed {
    /// The root directory of the superblock. The daemon opens it by this handle through `data`,
    /// which is the one descriptor that stays open.
    root: InodeId,
    /// The mount of the superblock, until [`Sealed::attach`] attaches it to a path.
    unattached: Option<OwnedFd>,
    data: Arc<File>,
    ledger: Ledger,
    reach: Reach,
    size: u64,
    /// For each folio of `data`: true if the folio has memory.
    folios: Vec<bool>,
    /// Number of folios that have memory.
    folio_count: u64,
    /// True if the file may have gaps that a program requested. Then it has no soft holes.
    punched: bool,
    /// True if programs may have `data` open by themselves ([`Sealed::open_door`]).
    has_door: bool,
}

impl Sealed {
    /// Creates an empty sealed file. If `node` is given, memory comes from that NUMA node as long
    /// as the node has some.
    ///
    /// # Errors
    /// [`Error::NoMemory`], and the errors of fsopen(2) and openat(2).
    pub fn create(reach: Reach, node: Option<NumaNode>) -> Result<Self> {
        let options = tmpfs::Options { blocks: Some(1), huge: true, node, ..Default::default() };
        let mount = tmpfs::create(&options)?;
        let create = |name| -> Result<File> {
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            Ok(calls::openat(&mount, name, flags, Mode::from_raw_mode(0o600))?.into())
        };
        let (first, data) = (create(LEDGER)?, Arc::new(create(c"data")?));
        let ledger = Ledger::create(data.clone(), first)?;
        let root = handle::of(&mount, c"")?;
        Ok(Self { unattached: Some(mount), ..Self::of(root, data, ledger, reach) })
    }

    /// An empty file.
    fn of(root: InodeId, data: Arc<File>, ledger: Ledger, reach: Reach) -> Self {
        let (size, folio_count, punched, has_door) = (0, 0, false, false);
        let (unattached, folios) = (None, Vec::new());
        Self { root, unattached, data, ledger, reach, size, folios, folio_count, punched, has_door }
    }

    /// Mounts the superblock at `path`, so that another process finds it when this process is gone.
    ///
    /// # Errors
    /// The errors of move_mount(2).
    pub fn attach(&mut self, path: &str) -> Result<()> {
        let mount = self.unattached.as_ref().expect("a superblock is attached once");
        tmpfs::attach(mount, path)?;
        self.unattached = None;
        Ok(())
    }

    /// Opens the root directory of the superblock.
    ///
    /// # Errors
    /// The errors of open_by_handle_at(2).
    pub fn mount(&self) -> Result<OwnedFd> {
        handle::open(&self.data, self.root, libc::O_RDONLY | libc::O_DIRECTORY)
    }

    /// The file that programs map.
    pub fn data(&self) -> &Arc<File> {
        &self.data
    }

    /// Size of `data` in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The header: the data that the sealed file keeps about itself.
    pub fn header(&self) -> Header {
        self.ledger.header()
    }

    /// Changes the header.
    ///
    /// # Errors
    /// The errors of setxattr(2). The header is as before.
    pub fn update(&mut self, change: impl FnOnce(&mut Header)) -> Result<()> {
        self.ledger.update(change)
    }

    /// The notes that the file's owner keeps with the file.
    pub fn notes(&self) -> &Notes {
        self.ledger.notes()
    }

    /// The soft holes.
    pub fn holes(&self) -> &Holes {
        self.ledger.holes()
    }

    /// The memory errors that the kernel keeps in the file, each with the time at which it was
    /// found.
    pub fn hw_errors(&self) -> &BTreeMap<Subpage, u64> {
        self.ledger.hw_errors()
    }

    /// The quarantined subpages (soft and hw) that hold any byte of `range`, ascending.
    pub fn lost_in(&self, range: Range) -> impl Iterator<Item = Subpage> + '_ {
        let subpages =
            |run: Range| run.steps(SUBPAGE_SIZE).map(|subpage| Subpage::containing(subpage.start));
        self.lost_runs_in(range).flat_map(subpages)
    }

    /// The subpages of [`Sealed::lost_in`], as runs. No run crosses the end of a folio.
    pub fn lost_runs_in(&self, range: Range) -> impl Iterator<Item = Range> + '_ {
        let mut soft = self.holes().in_range(range).map(|hole| hole.range).peekable();
        let hw = self.hw_errors().range(range.subpages());
        let mut hw = hw.map(|(subpage, _)| subpage.range()).peekable();
        std::iter::from_fn(move || match (soft.peek(), hw.peek()) {
            (Some(hole), Some(error)) if error.start < hole.start => hw.next(),
            (None, _) => hw.next(),
            _ => soft.next(),
        })
    }

    /// Number of quarantined subpages, soft and hw. No subpage is both.
    pub fn lost_count(&self) -> u64 {
        self.holes().count() + self.hw_errors().len() as u64
    }

    /// True if `subpage` is quarantined.
    pub fn is_lost(&self, subpage: Subpage) -> bool {
        self.holes().contains(subpage) || self.hw_errors().contains_key(&subpage)
    }

    /// True if `folio` has memory.
    pub fn has_memory(&self, folio: Folio) -> bool {
        self.folios.get(folio.0 as usize).copied().unwrap_or(false)
    }

    /// The folios that have memory, ascending.
    pub fn folios(&self) -> impl DoubleEndedIterator<Item = Folio> + '_ {
        (0..self.folios.len() as u64).map(Folio).filter(|folio| self.has_memory(*folio))
    }

    /// Number of folios that have memory.
    pub fn folio_count(&self) -> u64 {
        self.folio_count
    }

    /// The limit with which S1 holds: the blocks of the folios with memory (for a soft hole the
    /// ledger's block counts), and the first block of the ledger.
    fn limit(&self) -> u64 {
        self.folio_count * SUBPAGES_PER_FOLIO + 1
    }

    // ---- resize ---------------------------------------------------------------------------------

    /// Takes memory for the folios of `range`, none of which has memory, and makes `data` at least
    /// `size` long, but not longer than the end of `range`.
    ///
    /// # Errors
    /// [`Error::NoMemory`] or [`Error::Full`]. Everything is as before.
    pub fn take(&mut self, range: Range, size: u64) -> Result<()> {
        assert!(range.folios().all(|folio| !self.has_memory(folio)), "{range} has memory already");
        assert_eq!(range, range.folios_out(), "memory is taken by whole folios");
        let before = self.size;
        self.mark(range, true);
        let taken = self
            .set_limit(0)
            .inspect(|()| steps::reached(Step::TakeLimit))
            .and_then(|()| self.grow_size(size.min(range.end)))
            .inspect(|()| steps::reached(Step::TakeSize))
            .and_then(|()| self.fill(range))
            .inspect(|()| steps::reached(Step::TakeFilled));
        if taken.is_err() {
            self.mark(range, false);
            self.undo_take(range, before);
            self.assert_sound();
            return taken;
        }
        self.assert_sealed();
        debug_assert_eq!(self.size, before.max(size.min(range.end)), "the size is as asked for");
        taken
    }

    /// Takes memory behind the end of file for the folios of `range`, none of which has memory. The
    /// size stays as it is: [`Sealed::grow_size`] then makes the memory part of the file, in the
    /// time of one system call. The memory comes *uncleared*: no program may have the file open
    /// before [`tmpfs::clear`] has cleared the memory in place.
    ///
    /// # Errors
    /// [`Error::NoMemory`] or [`Error::Full`]. Everything is as before.
    pub fn take_ahead(&mut self, range: Range) -> Result<()> {
        assert!(range.folios().all(|folio| !self.has_memory(folio)), "{range} has memory already");
        assert_eq!(range, range.folios_out(), "memory is taken by whole folios");
        assert!(range.start >= self.size, "{range} is behind the end of file");
        self.mark(range, true);
        let taken = self
            .set_limit(0)
            .inspect(|()| steps::reached(Step::TakeLimit))
            .and_then(|()| tmpfs::allocate(&self.data, range))
            .inspect(|()| steps::reached(Step::TakeFilled));
        if taken.is_err() {
            self.mark(range, false);
            self.undo_take(range, self.size);
        }
        self.assert_sealed();
        taken
    }

    fn undo_take(&mut self, range: Range, size: u64) {
        let cut = if self.size > size {
            self.cut(size)
        } else {
            insist(|| tmpfs::punch(&self.data, range))
        };
        if let Err(error) = cut.and_then(|()| self.vacate(range)) {
            log::error!("memory that was taken in part could not be given back: {error}");
        }
    }

    /// Fills every block of `range` from the free blocks, of which there are enough. A program's
    /// touch of a hole takes a block for an instant before the touch fails. No count shows this
    /// block; the next try finds it free again.
    fn fill(&mut self, range: Range) -> Result<()> {
        let is_mapped = self.reach == Reach::Programs;
        let _aside = is_mapped.then(|| self.set_policies_aside(range)).flatten();
        match self.try_fill(range) {
            Err(Error::Full) => {
                let fill = || drop(self.try_fill(range));
                quarantine::meanwhile(fill, || self.fill_among_strays(range))
            }
            result => result,
        }
    }

    fn fill_among_strays(&self, range: Range) -> Result<()> {
        const FRUITLESS_TRIES: u32 = 100;
        const NAP: Duration = Duration::from_micros(100);
        let mut fruitless = 0;
        for _ in 0..TRIES {
            match self.try_fill(range) {
                Err(Error::Full) if self.shut_strays()? > 0 => {}
                Err(Error::Full) if fruitless < FRUITLESS_TRIES => {
                    fruitless += 1;
                    std::thread::sleep(NAP);
                }
                result => return result,
            }
        }
        Err(Error::Busy("the file is touched faster than memory can be put where it belongs"))
    }

    fn try_fill(&self, range: Range) -> Result<()> {
        if self.reach == Reach::Private {
            return tmpfs::allocate(&self.data, range);
        }
        let end = range.end.min(self.size.next_multiple_of(SUBPAGE_SIZE)).max(range.start);
        if end > range.start {
            let (window, inside) = (Window::new(&self.data, range)?, Range::new(range.start, end));
            window.populate_write(inside)?;
            window.gather(inside);
        }
        self.fill_behind_end(Range::new(end, range.end))
    }

    /// Fills the part of a folio that lies behind the end of file. If the folio is in one piece,
    /// all of its blocks have memory already.
    fn fill_behind_end(&self, tail: Range) -> Result<()> {
        if tail.is_empty() {
            return Ok(());
        }
        assert!(tail.len() < FOLIO_SIZE, "a whole folio would come uncleared");
        tmpfs::allocate(&self.data, tail)?;
        tmpfs::clear(&self.data, tail)
    }

    /// Gives back the memory of the folios of `range`, and forgets the soft holes in `range` and
    /// their records. If `range` is the end of the file, the caller shrinks the file with
    /// [`Sealed::cut`] instead.
    ///
    /// # Errors
    /// [`Error::Busy`] if programs touch the file faster than the daemon can take memory from it. A
    /// shortage does not end this function, as it takes no memory that the machine could lack for
    /// long.
    pub fn give(&mut self, range: Range) -> Result<()> {
        self.forget_holes(range)?;
        steps::reached(Step::GiveHoles);
        insist(|| tmpfs::punch(&self.data, range))?;
        steps::reached(Step::GivePunched);
        let before = self.folio_count;
        self.mark(range, false);
        debug_assert!(self.folio_count <= before, "who gives memory has less");
        self.vacate(range)?;
        self.assert_sealed();
        debug_assert!(self.lost_runs_in(range).next().is_none(), "{range} has nothing to lose");
        Ok(())
    }

    /// Makes `data` `size` bytes long, which is not longer than before, and gives back the memory
    /// of all folios behind the new end.
    ///
    /// The folio with the new end keeps its memory, zeroed behind the end.
    ///
    /// # Errors
    /// As for [`Sealed::give`].
    pub fn cut(&mut self, size: u64) -> Result<()> {
        assert!(size <= self.size, "a file of {} bytes is cut to {size}", self.size);
        let kept = size.next_multiple_of(FOLIO_SIZE);
        let gone = Range::new(kept, (self.folios.len() as u64 * FOLIO_SIZE).max(kept));
        self.forget_holes(Range::new(size.next_multiple_of(SUBPAGE_SIZE), gone.end))?;
        steps::reached(Step::CutHoles);
        insist(|| self.set_size(size))?;
        steps::reached(Step::CutSize);
        self.mark(gone, false);
        self.vacate(gone)?;
        steps::reached(Step::CutVacated);
        let tail = Range::new(size.next_multiple_of(SUBPAGE_SIZE), kept);
        if !tail.is_empty() && self.has_memory(Subpage::containing(tail.start).folio()) {
            insist(|| self.fill(tail))?;
            steps::reached(Step::CutFilled);
        }
        self.assert_sealed();
        debug_assert_eq!(self.size, size);
        debug_assert!(self.memory_span() <= kept, "no memory is left behind the end");
        Ok(())
    }

    /// Makes `data` `size` bytes long, within the folio that holds the end of file, or within the
    /// memory behind it ([`Sealed::take_ahead`]). A `size` that is not larger than before changes
    /// nothing.
    ///
    /// # Errors
    /// The errors of pwrite(2), fallocate(2) and ftruncate(2). The size is as before.
    pub fn grow_size(&mut self, size: u64) -> Result<()> {
        if size <= self.size {
            return Ok(());
        }
        let (before, folios) = (self.size, self.folio_count);
        let zeroed =
            if self.reach == Reach::Programs { self.zero_behind_end(size) } else { Ok(()) };
        let grown = zeroed.and_then(|()| self.set_size(size));
        if grown.is_err() && self.size > before {
            self.cut(before)?;
        }
        debug_assert_eq!(self.size, if grown.is_ok() { size } else { before });
        debug_assert_eq!(self.folio_count, folios, "no memory moves within a folio");
        grown
    }

    /// Writes at `offset`, which may be behind the end of file. The written range lies within the
    /// folio that holds the end, and this folio has memory. No program sees the file longer before
    /// the bytes are in it. The write ends early at a memory error.
    ///
    /// # Errors
    /// The errors of pwrite(2). The size is as before.
    pub fn append(&mut self, bytes: &[u8], offset: u64) -> Result<usize> {
        let end = offset + bytes.len() as u64;
        assert!(end <= self.size.next_multiple_of(FOLIO_SIZE), "{end} is behind the last folio");
        assert!(self.holes().is_empty(), "a longer file would open a hole");
        let before = self.size;
        self.grow_size(offset)?;
        let written = tmpfs::write_at(&self.data, bytes, offset);
        match written {
            Ok(written) => self.size = self.size.max(offset + written as u64),
            Err(_) if self.size > before => self.cut(before)?,
            Err(_) => {}
        }
        self.assert_sound();
        debug_assert!((before..=before.max(end)).contains(&self.size), "no byte is cut off");
        written
    }

    /// Zeroes the bytes behind the end of file. A program that maps the folio with the end by a 2
    /// MiB entry can write behind the end. These bytes must not appear when the file grows.
    fn zero_behind_end(&mut self, size: u64) -> Result<()> {
        static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
        let end = size.min(self.size.next_multiple_of(FOLIO_SIZE));
        if !self.has_memory(Subpage::containing(self.size).folio()) {
            return Ok(());
        }
        for piece in Range::new(self.size, end).steps(ZEROS.len() as u64) {
            let zeros = &ZEROS[..piece.len() as usize];
            match tmpfs::write_at(&self.data, zeros, piece.start) {
                Ok(written) if written == zeros.len() => self.size = piece.end,
                Ok(_) | Err(Error::Quarantined) => self.zero_around_hw_errors(piece)?,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Zeroes `range` subpage by subpage, as a memory error is in the way. If the bad subpage lies
    /// wholly behind the end of file, it holds no data, and a healthy page takes its place. If the
    /// end of file lies in the bad subpage, it stays quarantined, and its rest needs no zeros.
    fn zero_around_hw_errors(&mut self, range: Range) -> Result<()> {
        const ZEROS: Bytes = [0; SUBPAGE_SIZE as usize];
        let _aside = self.set_policies_aside(range);
        for subpage in range.subpages_out().steps(SUBPAGE_SIZE) {
            let piece = subpage.intersect(range);
            let zeros = &ZEROS[..piece.len() as usize];
            if tmpfs::write_at(&self.data, zeros, piece.start).is_err()
                && piece.start == subpage.start
            {
                tmpfs::punch(&self.data, subpage)?;
                tmpfs::write_at(&self.data, zeros, piece.start)?;
            }
        }
        self.size = tmpfs::size(&self.data)?;
        Ok(())
    }

    /// Forgets the quarantined subpages of `range`, and discards the bytes that the ledger has of
    /// them.
    fn forget_holes(&mut self, range: Range) -> Result<()> {
        let runs: Vec<Range> = self.holes().in_range(range).map(|hole| hole.range).collect();
        let of_one_folio =
            |one: &Range, next: &Range| one.start / FOLIO_SIZE == next.start / FOLIO_SIZE;
        for runs in runs.chunk_by(of_one_folio) {
            insist(|| self.ledger.strike(runs))?;
            runs.iter().try_for_each(|run| insist(|| self.ledger.free(*run)))?;
        }
        let hw_errors: Vec<Subpage> =
            self.hw_errors().range(range.subpages()).map(|(subpage, _)| *subpage).collect();
        hw_errors
            .into_iter()
            .try_for_each(|subpage| insist(|| self.ledger.forget_hw_errors(subpage)))
    }

    /// Lowers the limit after the memory of `range` was given up. No folio of `range` is meant to
    /// have memory now. As long as there is a free block, a program can touch the punched range and
    /// take that block. Then the function punches the range again.
    fn vacate(&mut self, range: Range) -> Result<()> {
        for _ in 0..TRIES {
            match insist(|| self.set_limit(0)) {
                Err(Error::Busy(_)) => insist(|| self.shut_strays())?,
                result => return result,
            };
            if !range.is_empty() {
                insist(|| tmpfs::punch(&self.data, range))?;
            }
        }
        Err(Error::Busy("the file is touched faster than memory can be taken from it"))
    }

    /// Sets the size, unless the file has this size. ftruncate(2) to the size that a tmpfs file
    /// already has frees the memory behind the end, and splits the folio for it (shmem_setattr).
    fn set_size(&mut self, size: u64) -> Result<()> {
        if size != self.size {
            tmpfs::set_size(&self.data, size)?;
            self.size = size;
        }
        Ok(())
    }

    /// Sets the superblock's limit to the blocks that are meant to be taken, and `more`.
    fn set_limit(&self, more: u64) -> Result<()> {
        tmpfs::set_limit(self.mount()?, self.limit() + more)?;
        self.assert_limit(more);
        Ok(())
    }

    fn mark(&mut self, range: Range, has_memory: bool) {
        for folio in range.folios() {
            let index = folio.0 as usize;
            if self.folios.len() <= index {
                self.folios.resize(index + 1, false);
            }
            match (self.folios[index], has_memory) {
                (false, true) => self.folio_count += 1,
                (true, false) => self.folio_count -= 1,
                _ => {}
            }
            self.folios[index] = has_memory;
        }
        let used = self.folios.iter().rposition(|has| *has).map_or(0, |last| last + 1);
        self.folios.truncate(used);
        debug_assert!(range.folios().all(|folio| self.has_memory(folio) == has_memory));
        self.assert_counted();
    }

    // ---- assertions, of debug builds ------------------------------------------------------------

    /// Asserts that the folios with memory are counted.
    fn assert_counted(&self) {
        let count = || self.folios.iter().filter(|has| **has).count() as u64;
        debug_assert_eq!(self.folio_count, count(), "folios are counted");
        debug_assert!(self.folios.last().is_none_or(|has| *has), "the last folio has memory");
    }

    /// Asserts that the fields agree with one another.
    fn assert_sound(&self) {
        self.assert_counted();
        debug_assert!(!self.punched || self.holes().is_empty(), "a gap would open a soft hole");
        let folio = |hole: Hole| Subpage::containing(hole.range.start).folio();
        debug_assert!(
            self.holes().all().all(|hole| self.has_memory(folio(hole))),
            "a soft hole counts as memory, so its folio has memory"
        );
    }

    /// Asserts that the fields agree with one another and with the limit of the superblock (S1).
    fn assert_sealed(&self) {
        self.assert_sound();
        self.assert_limit(0);
    }

    /// Asserts that the superblock has `more` blocks than are meant to be taken.
    fn assert_limit(&self, more: u64) {
        let limit = || rustix::fs::fstatfs(&self.data).map(|stat| stat.f_blocks);
        debug_assert_eq!(limit(), Ok(self.limit() + more), "the limit is as it was set");
    }
}

#[cfg(test)]
mod tests;
