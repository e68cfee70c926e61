//! A sealed file: a tmpfs superblock of its own, all of whose blocks are taken.
//!
//! ```text
//!            data                                    ledger
//!   +--------------------------+---------+     +----+----+----+
//!   | 2 MiB | 2 MiB | 2M |....|  no     |     | sb | r1 | r2 |     limit = taken = data + ledger
//!   | folio | folio | *  |  * |  memory |     |    |    |    |     (*: a soft hole; its block is r1, r2)
//!   +--------------------------+---------+     +----+----+----+
//! ```
//!
//! > **S1.** A sealed file has no free block, except inside a resize, for the microseconds of a quarantine or repair, and
//! > for gaps (see below), which a file with soft holes does not have.
//!
//! From S1 follows that *a hole in `data` cannot be filled by anyone*: a fault there finds no block and becomes SIGBUS
//! in every process that maps the file, a write becomes ENOSPC. This module is the only one that changes how
//! many blocks a superblock has, takes or frees, and so the owner of S1.
//!
//! **Who may do what.** Functions with `&mut self` need the caller's exclusive lock on the file and leave S1 as
//! they found it, whatever they return. Functions with `&self` may run beside each other. Neither keeps a program that
//! maps the file from touching it at any instruction; that is what [`Sealed::shut_strays`] is for: where a block was
//! free for an instant, a touched hole may have caught it. The count of blocks says so at once, the hole is found
//! with cachestat(2), punched again, counted and logged.
//!
//! **No uncleared folio is ever within a program's reach.** Memory for `data` is taken by a write fault of our own, below
//! the end of file, where tmpfs clears a folio before anybody can see it. fallocate(2) would be faster (it clears
//! nothing), but a program that calls MADV_COLLAPSE on such a folio gets it mapped with its former user's bytes, even
//! beyond the end of file (Linux 6.18, `collapse_pte_mapped_thp` does not look at the uptodate flag). fallocate is
//! for memory that no program can map ([`Reach::Private`]), and for parts of a folio, which MADV_COLLAPSE leaves alone.
//!
//! **Gaps.** A file without soft holes has nothing that S1 would have to keep shut. There, memory can be punched out and its blocks
//! left free ([`Sealed::punch`]): a touch fills the gap with cleared memory, and so do a write and userfaultfd(2). A note with the
//! file says that this was asked for; no folio changes hands meanwhile, but when the file is dismantled. Whoever opens the file leaves the
//! gaps as they are, because a gap that came to have memory would look to userfaultfd as if it had been filled. For the same reason
//! nothing that only looks at memory touches a gap ([`Sealed::present`]). [`Sealed::reclaim_removed`] ends it, before anything
//! that needs S1.

mod ledger;
mod recovery;

pub use ledger::{Bytes, Notes, Record, Superblock, check_version};
use ledger::{Direction, LEDGER, Ledger};

use crate::error::{Error, Result};
use crate::steps::{self, Step};
use crate::sys::mapping::Window;
use crate::sys::{self, calls, handle, tmpfs};
use crate::units::{FOLIO_SIZE, Folio, NodeId, Range, SUBPAGE_SIZE, SUBPAGES_PER_FOLIO, Subpage};
use rustix::fs::{Mode, OFlags};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs::File;
use std::ops::RangeInclusive;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::time::{Duration, Instant};

/// Tries at something that a program which hammers the file can spoil; each takes some 10 us, and the worst seen
/// needed 200.
const TRIES: u32 = 10_000;

/// How often a folio must have withstood being split to be called pinned, and how long its holder is let run in between.
/// A fault that waits for it holds it as a pin does, for as long as its thread gets no processor, so that some tries in a
/// row tell nothing; and with every try more, what was written to the subpage meanwhile is lost to its owner.
const SPLIT_TRIES: u32 = 64;
const SPLIT_NAP: Duration = Duration::from_millis(1);

/// When a trade is given up: after so many tries, and not before so much time.
const TRADE_TRIES: u32 = 1_000;
const TRADE_PATIENCE: Duration = Duration::from_millis(100);

const PINNED: &str = "the folio is pinned (vmsplice, io_uring, VFIO or the like) and cannot be split";
const UNWINNABLE: &str = "the subpage is pinned (vmsplice, io_uring, VFIO or the like), or touched faster than it can be \
    taken away";

/// Whether the file has gaps on purpose, as what is kept with it.
const PUNCHED: &str = "punched";

/// Holes that were filled while a block was free, found and shut again, since the daemon started.
pub static STRAYS_SHUT: AtomicU64 = AtomicU64::new(0);

/// Whether programs can map a sealed file's `data`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// They can: memory is cleared before they can see it.
    Programs,
    /// Only the daemon, which never reads it: memory stays as it came.
    Private,
}

/// What a repaired subpage is to hold.
#[derive(Clone, Copy, Debug)]
pub enum Content<'a> {
    /// Zeros.
    Zero,
    /// These bytes.
    Bytes(&'a Bytes),
}

impl Content<'_> {
    fn bytes(&self) -> &Bytes {
        const ZEROS: Bytes = [0; SUBPAGE_SIZE as usize];
        match self {
            Self::Zero => &ZEROS,
            Self::Bytes(bytes) => bytes,
        }
    }
}

/// A sealed file. Dropping it closes it; the memory is freed with the last user of the superblock.
#[derive(Debug)]
pub struct Sealed {
    /// The root directory of its superblock, by which that is reached from `data`: the one descriptor that is kept open.
    root: NodeId,
    /// The mount of its superblock, until that is attached to a path.
    unattached: Option<OwnedFd>,
    data: Arc<File>,
    ledger: Ledger,
    reach: Reach,
    size: u64,
    /// Whether each folio of `data` has memory.
    folios: Vec<bool>,
    /// How many of them do.
    folio_count: u64,
    /// It may have gaps that were asked for; there are no soft holes then.
    punched: bool,
}

impl Sealed {
    /// Creates an empty one, with memory from `node` only where one is given.
    ///
    /// # Errors
    /// [`Error::NoMemory`], and what fsopen(2) and openat(2) answer.
    pub fn create(reach: Reach, node: Option<u32>) -> Result<Self> {
        let options = tmpfs::Options { blocks: Some(1), huge: true, node, ..Default::default() };
        let mount = tmpfs::create(&options)?;
        let create = |name| -> Result<File> {
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            Ok(calls::openat(&mount, name, flags, Mode::from_raw_mode(0o600))?.into())
        };
        let (first, data) = (create(LEDGER)?, Arc::new(create(c"data")?));
        let ledger = Ledger::create(data.clone(), first)?;
        let root = handle::of(&mount, c"")?;
        let (folios, unattached) = (Vec::new(), Some(mount));
        let (size, folio_count, punched) = (0, 0, false);
        Ok(Self { root, unattached, data, ledger, reach, size, folios, folio_count, punched })
    }

    /// Mounts its superblock at `path`, so that it is there for another process when this one is gone.
    ///
    /// # Errors
    /// What move_mount(2) answers.
    pub fn attach(&mut self, path: &str) -> Result<()> {
        let mount = self.unattached.as_ref().expect("a superblock is attached once");
        tmpfs::attach(mount, path)?;
        self.unattached = None;
        Ok(())
    }

    /// The root directory of its superblock.
    ///
    /// # Errors
    /// What open_by_handle_at(2) answers.
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

    /// What it keeps about itself.
    pub fn superblock(&self) -> Superblock {
        self.ledger.superblock()
    }

    /// Changes what it keeps about itself.
    ///
    /// # Errors
    /// What pwrite(2) answers.
    pub fn update(&mut self, change: impl FnOnce(&mut Superblock)) -> Result<()> {
        self.ledger.update(change)
    }

    /// What is kept with the file for its owner.
    pub fn notes(&self) -> &Notes {
        self.ledger.notes()
    }

    /// The soft holes, ascending.
    pub fn holes(&self) -> &BTreeMap<Subpage, Record> {
        self.ledger.records()
    }

    /// The soft holes that hold any byte of `range`.
    pub fn holes_in(&self, range: Range) -> impl DoubleEndedIterator<Item = Subpage> + '_ {
        self.holes().range(range.subpages()).map(|(subpage, _)| *subpage)
    }

    /// The memory errors that the kernel keeps in the file, and when they were found.
    pub fn poisoned(&self) -> &BTreeMap<Subpage, u64> {
        self.ledger.poisoned()
    }

    /// The quarantined subpages of either kind that hold any byte of `range`, ascending.
    pub fn lost_in(&self, range: Range) -> impl Iterator<Item = Subpage> + '_ {
        let mut soft = self.holes_in(range).peekable();
        let mut hw = self.poisoned().range(range.subpages()).map(|(subpage, _)| *subpage).peekable();
        std::iter::from_fn(move || match (soft.peek(), hw.peek()) {
            (Some(hole), Some(error)) if error < hole => hw.next(),
            (None, _) => hw.next(),
            _ => soft.next(),
        })
    }

    /// How many subpages are quarantined, of either kind. No subpage is of both.
    pub fn lost_count(&self) -> u64 {
        (self.holes().len() + self.poisoned().len()) as u64
    }

    /// Whether `subpage` is quarantined.
    pub fn is_lost(&self, subpage: Subpage) -> bool {
        self.holes().contains_key(&subpage) || self.poisoned().contains_key(&subpage)
    }

    /// Whether `folio` has memory.
    pub fn has_memory(&self, folio: Folio) -> bool {
        self.folios.get(folio.0 as usize).copied().unwrap_or(false)
    }

    /// The folios that have memory, ascending.
    pub fn folios(&self) -> impl DoubleEndedIterator<Item = Folio> + '_ {
        (0..self.folios.len() as u64).map(Folio).filter(|folio| self.has_memory(*folio))
    }

    /// Folios that have memory.
    pub fn folio_count(&self) -> u64 {
        self.folio_count
    }

    /// Blocks that `data` has, holes not counted.
    fn expected_blocks(&self) -> u64 {
        self.folio_count * SUBPAGES_PER_FOLIO - self.holes().len() as u64
    }

    /// The limit that makes S1 hold: everything that is meant to be taken, and the superblock of the ledger.
    fn limit(&self) -> u64 {
        self.folio_count * SUBPAGES_PER_FOLIO + 1
    }

    // ---- resize -------------------------------------------------------------------------------------------------

    /// Takes memory for the folios of `range` (none of which has any) and makes `data` at least `size` long, but not
    /// longer than `range` reaches.
    ///
    /// # Errors
    /// [`Error::NoMemory`] or [`Error::Full`]; everything is as before.
    pub fn take(&mut self, range: Range, size: u64) -> Result<()> {
        assert!(range.folios().all(|folio| !self.has_memory(folio)), "{range} has memory already");
        let before = self.size;
        self.mark(range, true);
        let taken = self
            .set_limit()
            .inspect(|()| steps::done(Step::TakeLimit))
            .and_then(|()| self.grow_size(size.min(range.end)))
            .inspect(|()| steps::done(Step::TakeSize))
            .and_then(|()| self.fill(range))
            .inspect(|()| steps::done(Step::TakeFilled));
        if taken.is_err() {
            self.mark(range, false);
            self.undo_take(range, before);
        }
        taken
    }

    fn undo_take(&mut self, range: Range, size: u64) {
        let cut = if self.size > size { self.cut(size) } else { Ok(()) };
        if let Err(error) = cut.and_then(|()| self.vacate(range)) {
            log::error!("memory that was taken in part could not be given back: {error}");
        }
    }

    /// Gives every block of `range` memory, out of the free blocks that there are for it. A touch of a hole that is going to
    /// fail can have one of them for an instant, which shows nowhere: the next try finds it back.
    fn fill(&mut self, range: Range) -> Result<()> {
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
            Window::new(&self.data, range)?.populate_write(Range::new(range.start, end))?;
        }
        self.fill_behind_end(Range::new(end, range.end))
    }

    /// The part of a folio that lies behind the end of file; nothing is left to do where the folio is in one piece.
    fn fill_behind_end(&self, tail: Range) -> Result<()> {
        if tail.is_empty() {
            return Ok(());
        }
        assert!(tail.len() < FOLIO_SIZE, "a whole folio would come uncleared");
        tmpfs::allocate(&self.data, tail)?;
        tmpfs::clear(&self.data, tail)
    }

    /// Gives back the memory of the folios of `range`, with the soft holes in it and their records. Where that is the
    /// end of the file, the caller shrinks it with [`Sealed::cut`] instead.
    ///
    /// # Errors
    /// What the kernel answers; the call can be repeated.
    pub fn give(&mut self, range: Range) -> Result<()> {
        self.forget_holes(range)?;
        steps::done(Step::GiveHoles);
        self.mark(range, false);
        self.vacate(range)
    }

    /// Makes `data` `size` bytes long (not longer than it is) and gives back the memory of all folios from there on.
    ///
    /// The folio that holds the new end keeps its memory, zeroed behind the end.
    ///
    /// # Errors
    /// As for [`Sealed::give`].
    pub fn cut(&mut self, size: u64) -> Result<()> {
        assert!(size <= self.size);
        let kept = size.next_multiple_of(FOLIO_SIZE);
        let gone = Range::new(kept, (self.folios.len() as u64 * FOLIO_SIZE).max(kept));
        self.forget_holes(Range::new(size.next_multiple_of(SUBPAGE_SIZE), gone.end))?;
        steps::done(Step::CutHoles);
        self.set_size(size)?;
        steps::done(Step::CutSize);
        self.mark(gone, false);
        self.vacate(gone)?;
        steps::done(Step::CutVacated);
        let tail = Range::new(size.next_multiple_of(SUBPAGE_SIZE), kept);
        if !tail.is_empty() && self.has_memory(Subpage::containing(tail.start).folio()) {
            self.fill(tail)?;
            steps::done(Step::CutFilled);
        }
        Ok(())
    }

    /// Makes `data` `size` bytes long (not shorter than it is) within the folio that holds its end.
    ///
    /// # Errors
    /// What the kernel answers; the size is as before.
    pub fn grow_size(&mut self, size: u64) -> Result<()> {
        if size <= self.size {
            return Ok(());
        }
        if self.reach == Reach::Programs {
            self.zero_behind_end(size)?;
        }
        self.set_size(size)
    }

    /// Writes at `offset`, up to behind the end of file but within the folio that holds the end and has memory. Nobody sees
    /// the file longer before the bytes are there. Ends early where a memory error is in the way.
    ///
    /// # Errors
    /// What pwrite(2) answers.
    pub fn append(&mut self, bytes: &[u8], offset: u64) -> Result<usize> {
        let end = offset + bytes.len() as u64;
        assert!(end <= self.size.next_multiple_of(FOLIO_SIZE) && self.holes().is_empty());
        self.grow_size(offset)?;
        let written = tmpfs::write_at(&self.data, bytes, offset)?;
        self.size = self.size.max(offset + written as u64);
        Ok(written)
    }

    /// A program that maps the folio with the end of file by a 2 MiB entry can write behind the end. Those bytes must
    /// not come to light when the file grows.
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
                Ok(_) | Err(Error::Poisoned) => self.zero_around_poison(piece)?,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// The same, subpage by subpage, where a memory error is in the way. One that lies wholly behind the end held nothing:
    /// a healthy page takes its place. One with the end in it stays lost, and its rest need not be zeroed.
    fn zero_around_poison(&mut self, range: Range) -> Result<()> {
        const ZEROS: Bytes = [0; SUBPAGE_SIZE as usize];
        for subpage in range.subpages_out().steps(SUBPAGE_SIZE) {
            let piece = subpage.intersect(range);
            let zeros = &ZEROS[..piece.len() as usize];
            if tmpfs::write_at(&self.data, zeros, piece.start).is_err() && piece.start == subpage.start {
                tmpfs::punch(&self.data, subpage)?;
                tmpfs::write_at(&self.data, zeros, piece.start)?;
            }
        }
        self.size = tmpfs::size(&self.data)?;
        Ok(())
    }

    fn forget_holes(&mut self, range: Range) -> Result<()> {
        let holes: Vec<Subpage> = self.holes_in(range).collect();
        for subpage in holes {
            self.ledger.release_block(self.holes()[&subpage])?;
            self.ledger.forget(subpage)?;
        }
        let poisoned: Vec<Subpage> =
            self.poisoned().range(range.subpages()).map(|(subpage, _)| *subpage).collect();
        poisoned.into_iter().try_for_each(|subpage| self.ledger.forget_poisoned(subpage))
    }

    /// Punches `range`, of which no folio is meant to have memory, until the limit can be lowered: a program may touch
    /// what was just punched as long as there is a block for it.
    fn vacate(&mut self, range: Range) -> Result<()> {
        for _ in 0..TRIES {
            if !range.is_empty() {
                tmpfs::punch(&self.data, range)?;
                steps::done(Step::GivePunched);
            }
            match self.set_limit() {
                Err(Error::Busy(_)) => self.shut_strays()?,
                result => return result,
            };
        }
        Err(Error::Busy("the file is touched faster than memory can be taken from it"))
    }

    /// Setting the size that a tmpfs file has already is no idle call: it frees what lies behind the end, and splits the
    /// folio for it (shmem_setattr).
    fn set_size(&mut self, size: u64) -> Result<()> {
        if size != self.size {
            tmpfs::set_size(&self.data, size)?;
            self.size = size;
        }
        Ok(())
    }

    fn set_limit(&self) -> Result<()> {
        tmpfs::set_limit(self.mount()?, self.limit())
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
    }

    // ---- gaps ---------------------------------------------------------------------------------------------------

    /// Gives the memory of `range` to the machine and lets whoever touches it have other, cleared memory there. In the account of
    /// folios nothing changes. Subpages that the range covers in part are zeroed, if they have memory.
    ///
    /// The file must not have soft holes: the blocks that come free would fill them.
    ///
    /// # Errors
    /// What the kernel answers; [`Error::Poisoned`] for a memory error in a subpage that is covered in part.
    pub fn punch(&mut self, range: Range) -> Result<()> {
        assert!(self.holes().is_empty(), "a free block would open a hole");
        let range = range.intersect(Range::new(0, self.size));
        let end = if range.end == self.size { self.size.next_multiple_of(SUBPAGE_SIZE) } else { range.end };
        let start = range.start.next_multiple_of(SUBPAGE_SIZE);
        let whole = Range::new(start, end / SUBPAGE_SIZE * SUBPAGE_SIZE);
        self.zero_present(Range::new(range.start, start).intersect(range))?;
        self.zero_present(Range::new(whole.end.max(range.start), range.end))?;
        if whole.is_empty() {
            return Ok(());
        }
        if !self.punched {
            self.notes().keep(PUNCHED, &[])?;
            self.punched = true;
            steps::done(Step::PunchNoted);
        }
        tmpfs::punch(&self.data, whole)?;
        steps::done(Step::PunchDone);
        Ok(())
    }

    /// Zeroes a part of a subpage, unless it has no memory and reads as zeros anyway.
    fn zero_present(&self, range: Range) -> Result<()> {
        const ZEROS: Bytes = [0; SUBPAGE_SIZE as usize];
        if range.is_empty() || tmpfs::resident(&self.data, range)? == 0 {
            return Ok(());
        }
        tmpfs::write_all_at(&self.data, &ZEROS[..range.len() as usize], range.start)
    }

    /// Whether there may be gaps that were asked for.
    pub fn is_punched(&self) -> bool {
        self.punched
    }

    /// Bytes in gaps that were asked for: memory that is the machine's until it is touched.
    ///
    /// # Errors
    /// What fstatfs(2) answers.
    pub fn punched_bytes(&self) -> Result<u64> {
        Ok(if self.punched { tmpfs::blocks(&self.data)?.free * SUBPAGE_SIZE } else { 0 })
    }

    /// The parts of `range` that have memory: what has none would get some from a touch, wherever a block is free.
    ///
    /// # Errors
    /// What cachestat(2) answers.
    pub fn present(&self, range: Range) -> Result<Vec<Range>> {
        let subpages = range.subpages_out();
        match tmpfs::resident(&self.data, range)? {
            0 => Ok(Vec::new()),
            all if all == subpages.len() / SUBPAGE_SIZE => Ok(vec![range]),
            _ => {
                let has_memory =
                    |subpage: &Range| tmpfs::resident(&self.data, *subpage).map(|count| count > 0);
                let mut present = Vec::new();
                for subpage in subpages.steps(SUBPAGE_SIZE) {
                    if has_memory(&subpage)? {
                        present.push(subpage);
                    }
                }
                Ok(present)
            }
        }
    }

    fn is_present(&self, folio: Folio) -> Result<bool> {
        Ok(tmpfs::resident(&self.data, folio.range())? == SUBPAGES_PER_FOLIO)
    }

    // ---- quarantine and repair ----------------------------------------------------------------------------------

    /// Takes `subpage` out of the file: from when this returns, touching it is SIGBUS and nothing fills it.
    ///
    /// # Errors
    /// [`Error::Busy`] where somebody has pinned the folio, so that the kernel cannot split it; the bytes are as
    /// before. What the kernel answers otherwise.
    pub fn quarantine(&mut self, subpage: Subpage, time: u64) -> Result<()> {
        assert!(self.has_memory(subpage.folio()), "{subpage:?} has no memory");
        let mut rescued = [0; SUBPAGE_SIZE as usize];
        let known = tmpfs::read_at(&self.data, &mut rescued, subpage.offset()).is_ok_and(|read| read > 0);
        let record = self.ledger.record(subpage, time, known.then_some(&rescued))?;
        steps::done(Step::QuarantineRecorded);
        if let Err(error) = self.trade_to_ledger(subpage, record) {
            self.undo_quarantine(subpage, &rescued)?;
            return Err(error);
        }
        steps::done(Step::QuarantineTraded);
        self.complete_quarantine(record, &rescued)
    }

    /// What is left to do when the ledger has the subpage's block. It is written to even where nothing is known (the record says
    /// so), as the ledger's length tells whoever opens it how many records to look for.
    fn complete_quarantine(&mut self, record: Record, rescued: &Bytes) -> Result<()> {
        self.ledger.store(record, rescued)?;
        steps::done(Step::QuarantineStored);
        self.ledger.update(|superblock| superblock.alarm = true)?;
        self.ledger.end_move(record)?;
        steps::done(Step::QuarantineDone);
        Ok(())
    }

    /// Undoes what a quarantine that did not succeed has done: a punch that freed nothing has zeroed the subpage, one that
    /// did free its block has left that to whoever came first.
    fn undo_quarantine(&mut self, subpage: Subpage, rescued: &Bytes) -> Result<()> {
        self.fill_hole(subpage, rescued).inspect_err(|error| {
            log::error!("{subpage:?} could not be written back: {error}");
        })?;
        self.ledger.forget(subpage)
    }

    /// Moves the block of `subpage` to the ledger. A second thread spins for it, so that a program that hammers the
    /// subpage seldom gets it back first; when it does, punch again.
    fn trade_to_ledger(&self, subpage: Subpage, record: Record) -> Result<()> {
        let punched = Cell::new(false);
        let whole = Cell::new(0);
        let ledger = self.notes().file()?; // opened before anything spins for its block
        self.trade(
            |_| Ledger::take_block(&ledger, record),
            // What stood in the way the last time first: nothing comes between the punch and the taking.
            |sealed| {
                if punched.replace(true) {
                    if sealed.is_in_one_piece(subpage)? {
                        whole.set(whole.get() + 1);
                        if whole.get() == SPLIT_TRIES {
                            return Err(Error::Busy(PINNED));
                        }
                        std::thread::sleep(SPLIT_NAP);
                    }
                    sealed.free_block_that_another_hole_caught(subpage)?;
                }
                tmpfs::punch(&sealed.data, subpage.range())?;
                steps::done(Step::QuarantinePunched);
                Ok(())
            },
        )?;
        // The block that the ledger got may have been another hole's; no block is free now, so what is shut stays shut.
        self.shut_strays_but(Some(subpage))?;
        for _ in 0..TRIES {
            if tmpfs::resident(&self.data, subpage.range())? == 0 {
                return Ok(());
            }
            tmpfs::punch(&self.data, subpage.range())?;
        }
        Err(Error::Busy(UNWINNABLE))
    }

    /// While `subpage` itself is empty and the ledger still waits for its block, another hole may have it.
    fn free_block_that_another_hole_caught(&self, subpage: Subpage) -> Result<()> {
        if tmpfs::resident(&self.data, subpage.range())? == 0 {
            self.shut_strays_but(Some(subpage))?;
        }
        Ok(())
    }

    /// Puts `subpage` back, holding `content`; other soft holes stay shut.
    ///
    /// # Errors
    /// What the kernel answers; the subpage is quarantined as before.
    pub fn repair(&mut self, subpage: Subpage, content: Content<'_>) -> Result<()> {
        if self.poisoned().contains_key(&subpage) {
            return self.replace_poisoned(subpage, content.bytes());
        }
        let record = self.holes()[&subpage];
        let rescued = self.ledger.rescued(record);
        self.ledger.begin_move(record, Direction::Out, content.bytes())?;
        steps::done(Step::RepairKept);
        if let Err(error) = self.fill_hole(subpage, content.bytes()) {
            self.trade_to_ledger(subpage, record)?;
            if let Ok(bytes) = rescued {
                self.ledger.store(record, &bytes)?;
            }
            self.ledger.end_move(record)?;
            return Err(error);
        }
        steps::done(Step::RepairFilled);
        self.ledger.forget(subpage)?;
        steps::done(Step::RepairDone);
        self.shut_strays().map(drop)
    }

    /// Lets the kernel's poisoned page go, which never comes back, and puts a healthy one with `bytes` in its place.
    fn replace_poisoned(&mut self, subpage: Subpage, bytes: &Bytes) -> Result<()> {
        let length = SUBPAGE_SIZE.min(self.size - subpage.offset()) as usize;
        self.trade(
            |sealed| match tmpfs::write_at(&sealed.data, &bytes[..length], subpage.offset()) {
                Ok(written) if written == length => Ok(()),
                Ok(_) | Err(Error::Poisoned) => Err(Error::Full), // the poisoned page is still there
                Err(error) => Err(error),
            },
            |sealed| {
                tmpfs::punch(&sealed.data, subpage.range())?;
                sealed.shut_strays_but(Some(subpage)).map(drop)
            },
        )?;
        self.ledger.forget_poisoned(subpage)?;
        self.shut_strays().map(drop)
    }

    /// Gives `subpage`, which has a record, the block that the ledger may have for it, and `bytes`. A write of a whole
    /// subpage fills a hole in one step: nobody can map it before the bytes are in it. Behind the end of file nothing is
    /// written, as that would move the end.
    fn fill_hole(&self, subpage: Subpage, bytes: &Bytes) -> Result<()> {
        let record = self.holes()[&subpage];
        let length = SUBPAGE_SIZE.min(self.size - subpage.offset()) as usize;
        let released = AtomicBool::new(false);
        self.trade(
            |sealed| match tmpfs::write_at(&sealed.data, &bytes[..length], subpage.offset())? {
                written if written == length => Ok(()),
                _ => Err(Error::Full),
            },
            |sealed| {
                if !released.swap(true, Ordering::Relaxed) {
                    sealed.ledger.release_block(record)?;
                    steps::done(Step::RepairReleased);
                }
                // Another hole of this file may have caught the block.
                sealed.shut_strays_but(Some(subpage)).map(drop)
            },
        )
    }

    /// What was rescued of a quarantined subpage.
    ///
    /// # Errors
    /// [`Error::NoData`] where nothing is known.
    pub fn rescued(&self, subpage: Subpage) -> Result<Bytes> {
        let record = self.holes().get(&subpage).ok_or(Error::NoData)?;
        self.ledger.rescued(*record)
    }

    /// Finds the memory errors that the kernel has met in the file since the last time, and notes them. Returns the new
    /// ones. Costs next to nothing for memory that is mapped huge, and touches no byte of it.
    ///
    /// # Errors
    /// What mmap(2) and setxattr(2) answer.
    pub fn note_poison(&mut self, time: u64) -> Result<Vec<Subpage>> {
        let found = self.find_poison(Range::new(0, self.size).subpages_out())?;
        let new: Vec<Subpage> = found.into_iter().filter(|subpage| !self.is_lost(*subpage)).collect();
        for subpage in &new {
            self.ledger.note_poisoned(*subpage, time)?;
        }
        if !new.is_empty() {
            self.ledger.update(|superblock| superblock.alarm = true)?;
        }
        Ok(new)
    }

    /// Lets memory errors in `range` of a reserve go, and takes healthy memory in their place. Returns how many there were.
    ///
    /// # Errors
    /// [`Error::NoMemory`].
    pub fn replace_poisoned_free(&mut self, range: Range) -> Result<u64> {
        assert_eq!(self.reach, Reach::Private, "programs' memory is repaired when they ask for it");
        let found = self.find_poison(range.intersect(Range::new(0, self.size)))?;
        for subpage in &found {
            tmpfs::punch(&self.data, subpage.range())?;
            tmpfs::allocate(&self.data, subpage.range())?;
        }
        Ok(found.len() as u64)
    }

    fn find_poison(&self, range: Range) -> Result<Vec<Subpage>> {
        const WINDOW: u64 = 1 << 30;
        let mut found = Vec::new();
        for part in range.steps(WINDOW) {
            let window = Window::new(&self.data, part)?;
            for folio in part.folios().filter(|folio| self.has_memory(*folio)) {
                for range in self.present(folio.range().intersect(part))? {
                    found.extend(poisoned_subpages(&window, range)?);
                }
            }
        }
        Ok(found)
    }

    /// Has the kernel treat `subpage` as if the hardware had reported an error in it.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where the kernel has no CONFIG_MEMORY_FAILURE.
    pub fn inject(&self, subpage: Subpage) -> Result<()> {
        let window = Window::new(&self.data, subpage.folio().range())?;
        window.populate(subpage.range())?;
        window.poison(subpage)
    }

    /// Runs `free`, which frees a block, and right after it `take`, until the latter has taken one. A second thread runs `take`
    /// over and over meanwhile, so as to come first more often; but where it gets no processor, this one must be able to
    /// win alone. `take` succeeds once and no more: a second write would undo what a program has stored by then.
    fn trade(
        &self,
        take: impl Fn(&Self) -> Result<()> + Sync,
        free: impl Fn(&Self) -> Result<()>,
    ) -> Result<()> {
        let taken = Mutex::new(false);
        let take_once = || -> Result<()> {
            let mut taken = taken.lock().expect("no panic while a block is taken");
            if !*taken {
                take(self)?;
                *taken = true;
            }
            Ok(())
        };
        let (stop, both) = (AtomicBool::new(false), Barrier::new(2));
        let traded = std::thread::scope(|scope| {
            scope.spawn(|| {
                both.wait();
                while !stop.load(Ordering::Relaxed) && matches!(take_once(), Err(Error::Full)) {
                    std::thread::yield_now();
                }
            });
            both.wait();
            let started = Instant::now();
            let mut tries = 0;
            let mut traded = Err(Error::Full);
            while matches!(traded, Err(Error::Full))
                && (tries < TRADE_TRIES || started.elapsed() < TRADE_PATIENCE)
            {
                tries += 1;
                traded = free(self).and_then(|()| take_once());
            }
            stop.store(true, Ordering::Relaxed);
            traded
        });
        match traded {
            _ if *taken.lock().expect("no panic while a block is taken") => Ok(()),
            Err(Error::Full) => Err(Error::Busy(UNWINNABLE)),
            other => other,
        }
    }

    /// Whether the folio of `subpage`, which was punched, is still in one piece. Touches neither that nor any other
    /// hole: with a block free, that would fill it.
    fn is_in_one_piece(&self, subpage: Subpage) -> Result<bool> {
        let folio = subpage.folio().range();
        let has_other_holes = self.holes_in(folio).any(|hole| hole != subpage);
        let mut others = folio.intersect(Range::new(0, self.size)).steps(SUBPAGE_SIZE);
        let Some(neighbour) = others.find(|range| range.start != subpage.offset()) else {
            return Ok(false);
        };
        if has_other_holes {
            return Ok(false);
        }
        let window = Window::new(&self.data, folio)?;
        match window.populate(neighbour.subpages_out()) {
            Err(Error::NoData | Error::Poisoned) => Ok(false),
            Err(error) => Err(error),
            Ok(()) => Ok(!window.huge_ranges()?.is_empty()),
        }
    }

    /// Finds holes that were filled while a block was free, and punches them again. Returns how many there were.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn shut_strays(&self) -> Result<u64> {
        self.shut_strays_but(None)
    }

    /// The same, with one hole that is being filled on purpose.
    fn shut_strays_but(&self, but: Option<Subpage>) -> Result<u64> {
        if tmpfs::blocks_taken(&self.data)? <= self.expected_blocks() {
            return Ok(0);
        }
        let mut shut = 0;
        for subpage in self.holes().keys().filter(|subpage| Some(**subpage) != but) {
            if tmpfs::resident(&self.data, subpage.range())? > 0 {
                tmpfs::punch(&self.data, subpage.range())?;
                shut += 1;
                log::warn!(
                    "a quarantined subpage at {:#x} was filled in passing; it is shut again",
                    subpage.offset()
                );
            }
        }
        shut += self.punch_where_no_memory_is_meant()?;
        STRAYS_SHUT.fetch_add(shut, Ordering::Relaxed);
        Ok(shut)
    }

    fn punch_where_no_memory_is_meant(&self) -> Result<u64> {
        let end = self.size.div_ceil(FOLIO_SIZE).max(self.folios.len() as u64);
        let mut punched = 0;
        for folio in (0..end).map(Folio).filter(|folio| !self.has_memory(*folio)) {
            if tmpfs::resident(&self.data, folio.range())? > 0 {
                tmpfs::punch(&self.data, folio.range())?;
                punched += 1;
            }
        }
        Ok(punched)
    }

    // ---- huge mappings ------------------------------------------------------------------------------------------

    /// Puts `folio` back into one piece, where it is not.
    ///
    /// # Errors
    /// [`Error::Busy`] with a quarantined subpage in it; else as for [`Window::collapse`].
    pub fn collapse(&self, folio: Folio) -> Result<()> {
        if self.lost_in(folio.range()).next().is_some() {
            return Err(Error::Busy("a quarantined subpage keeps this part from being one huge page"));
        }
        if !self.is_present(folio)? {
            return Err(Error::Busy("what was punched keeps this part from being one huge page"));
        }
        Window::new(&self.data, folio.range())?.collapse(folio)
    }

    /// Maps `range`, which has memory, and returns which parts of it that maps by 2 MiB entries.
    ///
    /// # Errors
    /// What mmap(2) and the page map answer.
    pub fn huge_ranges(&self, range: Range) -> Result<Vec<Range>> {
        let window = Window::new(&self.data, range)?;
        for folio in range.folios() {
            if !self.is_present(folio)? {
                continue;
            }
            match window.populate(Range::at(folio.range().start, 1).subpages_out()) {
                Ok(()) | Err(Error::NoData | Error::Poisoned) => {}
                Err(error) => return Err(error),
            }
        }
        window.huge_ranges()
    }

    /// The NUMA node that the memory of `folio` is on, as far as the kernel tells.
    pub fn node_of(&self, folio: Folio) -> Option<u32> {
        let window = Window::new(&self.data, folio.range()).ok()?;
        let present = self.present(folio.range()).ok()?;
        present.into_iter().flat_map(|range| range.steps(SUBPAGE_SIZE)).find_map(|subpage| {
            window.populate(subpage).ok()?;
            window.node_of(subpage.start)
        })
    }

    /// Puts what memory came in small pages into folios, and returns how many folios are in one piece.
    ///
    /// For memory that nobody has touched: it is mapped but neither read nor cleared.
    ///
    /// # Errors
    /// What mmap(2) and the page map answer.
    pub fn collapse_untouched(&self) -> Result<u64> {
        if self.folios.is_empty() {
            return Ok(0);
        }
        let window = Window::new(&self.data, Range::new(0, self.folios.len() as u64 * FOLIO_SIZE))?;
        for folio in self.folios() {
            if let Err(error) = window.collapse(folio) {
                log::debug!("folio {} stays in small pages: {error}", folio.0);
            }
        }
        Ok(window.huge_ranges()?.iter().map(|range| range.len() / FOLIO_SIZE).sum())
    }

    // ---- check --------------------------------------------------------------------------------------------------

    /// Checks S1 and Q1 (a soft hole has exactly one record, and the other way round); says what does not hold.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn check(&self) -> Result<Vec<String>> {
        let mut wrong = Vec::new();
        let blocks = tmpfs::blocks(&self.data)?;
        if (blocks.free != 0 && !self.punched) || blocks.limit != self.limit() {
            wrong.push(format!(
                "S1: {} of {} blocks are free, and {} are meant to be taken",
                blocks.free,
                blocks.limit,
                self.limit()
            ));
        }
        if tmpfs::size(&self.data)? != self.size {
            wrong.push(format!("the data file is not {} bytes long", self.size));
        }
        for folio in (0..self.folios.len() as u64).map(Folio) {
            let holes = self.holes_in(folio.range()).count() as u64;
            let meant = if self.has_memory(folio) { SUBPAGES_PER_FOLIO - holes } else { 0 };
            let least = if self.punched { 0 } else { meant };
            let resident = self.settled(folio.range(), least..=meant)?;
            if !(least..=meant).contains(&resident) {
                wrong.push(format!("Q1: folio {} has {resident} subpages, and {meant} are meant", folio.0));
            }
        }
        for subpage in self.holes().keys() {
            if self.settled(subpage.range(), 0..=0)? != 0 {
                wrong.push(format!("Q1: the quarantined subpage at {:#x} has memory", subpage.offset()));
            }
        }
        let ledger = self.ledger.blocks()?;
        if ledger != self.holes().len() as u64 + 1 {
            wrong.push(format!("Q1: the ledger has {ledger} blocks for {} holes", self.holes().len()));
        }
        Ok(wrong)
    }

    /// How many subpages of `range` have memory; looked at until that is as `meant`, or often enough. A touch of a hole, as it
    /// fails, has its page in the file for an instant before it asks for a block (mm/shmem.c, shmem_alloc_and_add_folio).
    fn settled(&self, range: Range, meant: RangeInclusive<u64>) -> Result<u64> {
        let mut resident = tmpfs::resident(&self.data, range)?;
        for _ in 0..TRIES {
            if meant.contains(&resident) {
                break;
            }
            resident = tmpfs::resident(&self.data, range)?;
        }
        Ok(resident)
    }

    /// Whether a program has given something up behind our back: madvise(2) with MADV_REMOVE punches the file without asking.
    ///
    /// # Errors
    /// What fstatfs(2) answers.
    pub fn is_torn(&self) -> Result<bool> {
        Ok(!self.punched && self.has_free_blocks()?)
    }

    /// Whether a touch could take memory: of something that was given up, on request or not.
    ///
    /// # Errors
    /// What fstatfs(2) answers.
    pub fn has_free_blocks(&self) -> Result<bool> {
        Ok(tmpfs::blocks(&self.data)?.free > 0)
    }

    /// Takes back what a program gave up, and what was punched. Returns whether there was any.
    ///
    /// # Errors
    /// [`Error::NoMemory`].
    pub fn reclaim_removed(&mut self) -> Result<bool> {
        let reclaimed = self.has_free_blocks()? && self.fill_gaps()?;
        if self.punched {
            steps::done(Step::UnpunchFilled);
            self.notes().discard(PUNCHED)?;
            self.punched = false;
            steps::done(Step::UnpunchDone);
        }
        Ok(reclaimed)
    }

    fn fill_gaps(&mut self) -> Result<bool> {
        self.shut_strays()?;
        sys::refuse_more_than_available(tmpfs::blocks(&self.data)?.free * SUBPAGE_SIZE)?;
        let torn: Vec<Folio> = self
            .folios()
            .filter(|folio| {
                let meant = SUBPAGES_PER_FOLIO - self.holes_in(folio.range()).count() as u64;
                tmpfs::resident(&self.data, folio.range()).is_ok_and(|resident| resident < meant)
            })
            .collect();
        for folio in &torn {
            self.fill_around_holes(*folio)?;
        }
        Ok(!torn.is_empty())
    }

    fn fill_around_holes(&mut self, folio: Folio) -> Result<()> {
        let holes: Vec<Subpage> = self.lost_in(folio.range()).collect();
        let mut start = folio.range().start;
        for end in holes.iter().map(|hole| hole.offset()).chain([folio.range().end]) {
            let piece = Range::new(start, end);
            if !piece.is_empty() {
                self.fill(piece)?;
            }
            start = end + SUBPAGE_SIZE;
        }
        Ok(())
    }
}

/// Those of `range`, all of which has memory.
fn poisoned_subpages(window: &Window, range: Range) -> Result<Vec<Subpage>> {
    let mut found = Vec::new();
    match window.populate(range) {
        Ok(()) => return Ok(found),
        Err(Error::Poisoned | Error::NoData) => {} // some of them, or punched in the meantime
        Err(error) => return Err(error),
    }
    for subpage in range.steps(SUBPAGE_SIZE) {
        match window.populate(subpage) {
            Err(Error::Poisoned) => found.push(Subpage::containing(subpage.start)),
            Ok(()) | Err(Error::NoData) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

/// On real superblocks, which need root and nothing else: no mount is made that anybody could see.
#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::sigbus::{Mapping, Sharing};

    const TIME: u64 = 1_800_000_000;

    fn folios(count: u64) -> Range {
        Range::new(0, count * FOLIO_SIZE)
    }

    /// Of `size` bytes, each of which is its offset's remainder by 251.
    fn sealed(size: u64) -> Sealed {
        let mut sealed = Sealed::create(Reach::Programs, None).expect("root makes superblocks");
        sealed.take(Range::new(0, size).folios_out(), size).unwrap();
        let bytes: Vec<u8> = (0..size).map(|offset| (offset % 251) as u8).collect();
        assert_eq!(tmpfs::write_at(&sealed.data, &bytes, 0).unwrap() as u64, size);
        sealed
    }

    fn assert_sealed(sealed: &Sealed) {
        assert_eq!(sealed.check().unwrap(), Vec::<String>::new());
        assert_eq!(tmpfs::blocks_taken(&sealed.data).unwrap(), sealed.expected_blocks());
        let past_everything = Range::at((sealed.folios.len() as u64 + 1) * FOLIO_SIZE, SUBPAGE_SIZE);
        assert!(
            matches!(tmpfs::allocate(&sealed.data, past_everything), Err(Error::Full)),
            "a block is free"
        );
    }

    fn assert_unchanged(sealed: &Sealed, range: Range) {
        let mut bytes = vec![0; range.len() as usize];
        tmpfs::read_at(&sealed.data, &mut bytes, range.start).unwrap();
        let wrong = bytes.iter().zip(range.start..).position(|(byte, offset)| *byte != (offset % 251) as u8);
        assert_eq!(wrong, None, "in {range}");
    }

    #[test]
    fn what_came_in_small_pages_is_put_into_folios() {
        let mut reserve = Sealed::create(Reach::Private, None).expect("root makes superblocks");
        reserve.take(folios(4), 4 * FOLIO_SIZE).unwrap();
        for subpage in Folio(2).range().steps(SUBPAGE_SIZE) {
            tmpfs::punch(&reserve.data, subpage).unwrap();
            tmpfs::allocate(&reserve.data, subpage).unwrap();
        }
        let whole: u64 = reserve.huge_ranges(folios(4)).unwrap().iter().map(|range| range.len()).sum();
        assert_eq!(whole, 3 * FOLIO_SIZE, "one folio was to be in small pages");
        assert_eq!(reserve.collapse_untouched().unwrap(), 4);
        assert_sealed(&reserve);
    }

    #[test]
    fn no_block_is_free_whatever_is_done() {
        let mut sealed = sealed(2 * FOLIO_SIZE + 5000);
        assert_sealed(&sealed);
        sealed.quarantine(Subpage(0), TIME).unwrap();
        sealed.quarantine(Subpage(1), TIME).unwrap();
        sealed.quarantine(Subpage(700), TIME).unwrap();
        assert_sealed(&sealed);
        sealed.repair(Subpage(0), Content::Zero).unwrap();
        assert_sealed(&sealed);
        sealed.give(Folio(1).range()).unwrap();
        assert_sealed(&sealed);
        assert_eq!(sealed.holes().keys().collect::<Vec<_>>(), [&Subpage(1)]);
        let size = sealed.size();
        sealed.take(Folio(1).range(), size).unwrap();
        assert_sealed(&sealed);
        sealed.take(Range::at(3 * FOLIO_SIZE, FOLIO_SIZE), 3 * FOLIO_SIZE + 1).unwrap();
        assert_sealed(&sealed);
        for size in [3 * FOLIO_SIZE, 2 * FOLIO_SIZE + 1, FOLIO_SIZE - 4095, SUBPAGE_SIZE, 0] {
            sealed.cut(size).unwrap();
            assert_sealed(&sealed);
        }
        assert_eq!((sealed.folio_count(), sealed.holes().len()), (0, 0));
    }

    #[test]
    fn a_hole_cannot_be_filled_by_a_touch_a_write_or_an_allocation() {
        let mut sealed = sealed(FOLIO_SIZE);
        let mapping = Mapping::new(sealed.data(), folios(1), Sharing::Shared, true).unwrap();
        sealed.quarantine(Subpage(5), TIME).unwrap();
        assert!(mapping.load(5 * SUBPAGE_SIZE).is_err() && mapping.store(5 * SUBPAGE_SIZE + 7, 1).is_err());
        assert!(matches!(tmpfs::write_at(&sealed.data, &[1], 5 * SUBPAGE_SIZE), Err(Error::Full)));
        assert!(matches!(tmpfs::allocate(&sealed.data, Subpage(5).range()), Err(Error::Full)));
        assert_eq!(mapping.walk().len(), 1);
        assert_sealed(&sealed);
    }

    #[test]
    fn what_is_quarantined_is_known_to_whoever_opens_the_file_next() {
        let mut sealed = sealed(2 * FOLIO_SIZE + 5000);
        sealed.update(|superblock| superblock.reserved_pages = 7).unwrap();
        for (n, subpage) in [3, 4, 511, 512, 1025].into_iter().enumerate() {
            sealed.quarantine(Subpage(subpage), TIME + n as u64).unwrap();
        }
        // A slot in the middle is free, another one is used for the second time.
        sealed.repair(Subpage(4), Content::Zero).unwrap();
        sealed.repair(Subpage(511), Content::Zero).unwrap();
        sealed.quarantine(Subpage(100), TIME + 9).unwrap();

        let mut again = Sealed::open(Reach::Programs, sealed.mount().unwrap()).unwrap();
        assert_eq!(again.holes(), sealed.holes());
        assert_eq!(again.superblock(), Superblock { reserved_pages: 7, alarm: true, undo_size: None });
        assert_eq!((again.size(), again.folio_count()), (sealed.size(), sealed.folio_count()));
        assert_sealed(&again);
        drop(sealed);
        for subpage in again.holes().keys().copied().collect::<Vec<_>>() {
            let rescued = again.rescued(subpage).unwrap();
            again.repair(subpage, Content::Bytes(&rescued)).unwrap();
            assert_unchanged(&again, subpage.range().intersect(Range::new(0, again.size())));
        }
        assert_unchanged(&again, Range::new(5 * SUBPAGE_SIZE, 511 * SUBPAGE_SIZE));
        assert_unchanged(&again, Range::new(FOLIO_SIZE, again.size()));
        assert_sealed(&again);
    }

    #[test]
    fn a_folio_of_which_everything_is_quarantined_still_belongs_to_the_file() {
        let mut sealed = sealed(FOLIO_SIZE);
        for subpage in (0..SUBPAGES_PER_FOLIO).map(Subpage) {
            sealed.quarantine(subpage, TIME).unwrap();
        }
        assert_sealed(&sealed);
        let mut again = Sealed::open(Reach::Programs, sealed.mount().unwrap()).unwrap();
        assert!(again.has_memory(Folio(0)));
        assert_sealed(&again);
        drop(sealed);
        for subpage in (0..SUBPAGES_PER_FOLIO).map(Subpage) {
            let rescued = again.rescued(subpage).unwrap();
            again.repair(subpage, Content::Bytes(&rescued)).unwrap();
        }
        again.collapse(Folio(0)).unwrap();
        assert_eq!(again.huge_ranges(folios(1)).unwrap(), [folios(1)]);
        assert_unchanged(&again, folios(1));
        assert_sealed(&again);
    }

    #[test]
    fn a_hole_that_was_filled_while_a_block_was_free_is_found_and_shut() {
        let mut sealed = sealed(2 * FOLIO_SIZE);
        sealed.quarantine(Subpage(5), TIME).unwrap();
        sealed.quarantine(Subpage(900), TIME).unwrap();
        let mapping = Mapping::new(sealed.data(), folios(2), Sharing::Shared, true).unwrap();
        assert_eq!(sealed.shut_strays().unwrap(), 0);
        // As if a program touched one hole in the middle of the repair of the other.
        let record = sealed.holes()[&Subpage(900)];
        sealed.ledger.release_block(record).unwrap();
        assert_eq!(mapping.load(Subpage(5).offset()), Ok(0));
        assert_ne!(sealed.check().unwrap(), Vec::<String>::new());
        let before = STRAYS_SHUT.load(Ordering::Relaxed);
        assert_eq!(sealed.shut_strays().unwrap(), 1);
        assert!(STRAYS_SHUT.load(Ordering::Relaxed) > before, "it is counted");
        assert_eq!(tmpfs::resident(&sealed.data, Subpage(5).range()).unwrap(), 0);
        Ledger::take_block(&sealed.notes().file().unwrap(), record).unwrap();
        assert!(mapping.load(Subpage(5).offset()).is_err());
        assert_sealed(&sealed);
    }

    #[test]
    fn a_quarantine_takes_its_block_back_from_a_hole_that_caught_it() {
        let mut sealed = sealed(FOLIO_SIZE);
        sealed.quarantine(Subpage(5), TIME).unwrap();
        let mapping = Mapping::new(sealed.data(), folios(1), Sharing::Shared, true).unwrap();
        // As if a program touched the one hole right after the punch of the other.
        let record = sealed.ledger.record(Subpage(6), TIME, None).unwrap();
        tmpfs::punch(&sealed.data, Subpage(6).range()).unwrap();
        assert_eq!(mapping.load(Subpage(5).offset()), Ok(0));
        sealed.trade_to_ledger(Subpage(6), record).unwrap();
        assert_eq!(mapping.walk().len(), 2);
        assert_sealed(&sealed);
    }

    #[test]
    fn a_pinned_folio_is_left_as_it_was() {
        let mut sealed = sealed(FOLIO_SIZE);
        let mapping = Mapping::new(sealed.data(), folios(1), Sharing::Shared, true).unwrap();
        let pin = mapping.pin(9 * SUBPAGE_SIZE).unwrap();
        assert!(matches!(sealed.quarantine(Subpage(5), TIME), Err(Error::Busy(PINNED))));
        assert!(sealed.holes().is_empty());
        assert_unchanged(&sealed, folios(1));
        assert_sealed(&sealed);
        drop(pin);
        sealed.quarantine(Subpage(5), TIME).unwrap();
        assert_sealed(&sealed);
    }

    #[test]
    fn gaps_are_left_to_who_touches_them_by_all_but_who_needs_the_blocks() {
        let mut sealed = sealed(3 * FOLIO_SIZE - 5000);
        let gaps = [Range::at(3 * SUBPAGE_SIZE, SUBPAGE_SIZE), Range::new(FOLIO_SIZE, sealed.size())];
        gaps.iter().for_each(|gap| sealed.punch(*gap).unwrap());
        let missing = SUBPAGE_SIZE + (sealed.size() - FOLIO_SIZE).next_multiple_of(SUBPAGE_SIZE);
        let mut again = Sealed::open(Reach::Programs, sealed.mount().unwrap()).unwrap();
        for sealed in [&mut sealed, &mut again] {
            assert!(!sealed.is_torn().unwrap());
            assert_eq!(sealed.note_poison(TIME).unwrap(), []);
            assert_eq!(sealed.huge_ranges(folios(3)).unwrap(), []);
            assert!(sealed.folios().all(|folio| sealed.collapse(folio).is_err()));
            assert_eq!(sealed.punched_bytes().unwrap(), missing);
            assert_eq!((sealed.check().unwrap(), sealed.folio_count()), (vec![], 3));
        }
        drop(sealed);
        let mapping = Mapping::new(again.data(), folios(3), Sharing::Shared, true).unwrap();
        assert_eq!(mapping.load(3 * SUBPAGE_SIZE), Ok(0));
        assert_eq!(again.punched_bytes().unwrap(), missing - SUBPAGE_SIZE);
        assert!(again.reclaim_removed().unwrap());
        assert!(!again.is_punched());
        assert_sealed(&again);
        assert_unchanged(&again, Range::new(4 * SUBPAGE_SIZE, FOLIO_SIZE));
        again.quarantine(Subpage(3), TIME).unwrap();
        assert_sealed(&again);
    }

    #[test]
    fn memory_that_a_program_removed_is_taken_back() {
        const MADV_REMOVE: i32 = 9;
        let mut sealed = sealed(2 * FOLIO_SIZE);
        sealed.quarantine(Subpage(5), TIME).unwrap();
        let mapping = Mapping::new(sealed.data(), folios(2), Sharing::Shared, true).unwrap();
        mapping.advise_range(Range::at(4 * SUBPAGE_SIZE, 3 * SUBPAGE_SIZE), MADV_REMOVE).unwrap();
        mapping.advise_range(Folio(1).range(), MADV_REMOVE).unwrap();
        assert!(sealed.reclaim_removed().unwrap());
        assert_sealed(&sealed);
        assert_eq!(mapping.walk().len(), 1);
        assert!(!sealed.reclaim_removed().unwrap());
    }
}
