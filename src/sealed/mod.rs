//! A sealed file: a tmpfs superblock of its own, all of whose blocks are taken.
//!
//! ```text
//!            data                                    ledger
//!   +--------------------------+---------+     +----+- - - - -+----+- - -+----+
//!   | 2 MiB | 2 MiB | 2M |....|  no     |     | sb |  holes  | r1 |     | r2 |     limit = taken = data + ledger
//!   | folio | folio | *  |  * |  memory |     |    |         |    |     |    |     (*: a soft hole; its block is r1, r2)
//!   +--------------------------+---------+     +----+- - - - -+----+- - -+----+
//! ```
//!
//! > **S1.** A sealed file has no free block, except inside a resize, for the microseconds of a quarantine or repair,
//! > for gaps (see below), which a file with soft holes does not have, and after a program has punched the file by
//! > madvise(2) with MADV_REMOVE: until the next request for the file, or the patrol, has taken that memory back.
//!
//! From S1 follows that *a hole in `data` cannot be filled by anyone*: a fault there finds no block and becomes SIGBUS
//! in every process that maps the file, a write becomes ENOSPC. This module is the only one that changes how
//! many blocks a superblock has, takes or frees, and so the owner of S1.
//!
//! **Who may do what.** Functions with `&mut self` need the caller's exclusive lock on the file and leave S1 as
//! they found it, whatever they return. Functions with `&self` may run beside each other. Neither keeps a program that
//! maps the file from touching it at any instruction; that is what [`Sealed::shut_strays`] is for: where a block was
//! free for an instant, a touched hole may have caught it. cachestat(2) finds the hole, and it is punched again, counted
//! and logged.
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

mod check;
mod gaps;
mod holes;
mod huge;
mod ledger;
mod poison;
mod quarantine;
mod record;
mod recovery;

pub use holes::{Hole, Holes};
pub use ledger::{Bytes, Notes, check_version, superblock_at};
use ledger::{LEDGER, Ledger};
pub use record::Superblock;

use crate::error::{Error, Result};
use crate::steps::{self, Step, insist};
use crate::sys::mapping::Window;
use crate::sys::{calls, handle, tmpfs};
use crate::units::{FOLIO_SIZE, Folio, NodeId, Range, SUBPAGE_SIZE, SUBPAGES_PER_FOLIO, Subpage};
use rustix::fs::{Mode, OFlags};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

/// Tries at something that a program which hammers the file can spoil; each takes some 10 us, and the worst seen
/// needed 200.
const TRIES: u32 = 10_000;

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

/// What repaired subpages are to hold.
#[derive(Clone, Copy, Debug)]
pub enum Content<'a> {
    /// Zeros.
    Zero,
    /// What is known of them, and zeros where nothing is.
    Known,
    /// These bytes.
    Bytes {
        /// Where the bytes start in the file.
        start: u64,
        /// At least up to the end of what is repaired, or the end of file.
        bytes: &'a [u8],
    },
}

impl Content<'_> {
    /// Those for `range`, a part of a subpage or what the bytes were given for. Of a memory error nothing is known.
    fn of(&self, range: Range) -> &[u8] {
        const ZEROS: &Bytes = &[0; SUBPAGE_SIZE as usize];
        let length = range.len() as usize;
        match self {
            Self::Zero | Self::Known => &ZEROS[..length],
            Self::Bytes { start, bytes } => &bytes[(range.start - start) as usize..][..length],
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
    /// Creates an empty one, with memory from `node`, where one is given, as far as that has some.
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

    /// The soft holes.
    pub fn holes(&self) -> &Holes {
        self.ledger.holes()
    }

    /// The memory errors that the kernel keeps in the file, and when they were found.
    pub fn poisoned(&self) -> &BTreeMap<Subpage, u64> {
        self.ledger.poisoned()
    }

    /// The quarantined subpages of either kind that hold any byte of `range`, ascending.
    pub fn lost_in(&self, range: Range) -> impl Iterator<Item = Subpage> + '_ {
        let subpages = |run: Range| run.steps(SUBPAGE_SIZE).map(|subpage| Subpage::containing(subpage.start));
        self.lost_runs_in(range).flat_map(subpages)
    }

    /// The same as runs, none of which reaches over the end of a folio.
    pub fn lost_runs_in(&self, range: Range) -> impl Iterator<Item = Range> + '_ {
        let mut soft = self.holes().in_range(range).map(|hole| hole.range).peekable();
        let hw = self.poisoned().range(range.subpages());
        let mut hw = hw.map(|(subpage, _)| subpage.range()).peekable();
        std::iter::from_fn(move || match (soft.peek(), hw.peek()) {
            (Some(hole), Some(error)) if error.start < hole.start => hw.next(),
            (None, _) => hw.next(),
            _ => soft.next(),
        })
    }

    /// How many subpages are quarantined, of either kind. No subpage is of both.
    pub fn lost_count(&self) -> u64 {
        self.holes().count() + self.poisoned().len() as u64
    }

    /// Whether `subpage` is quarantined.
    pub fn is_lost(&self, subpage: Subpage) -> bool {
        self.holes().contains(subpage) || self.poisoned().contains_key(&subpage)
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
            .set_limit(0)
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
        let cut = if self.size > size { self.cut(size) } else { insist(|| tmpfs::punch(&self.data, range)) };
        if let Err(error) = cut.and_then(|()| self.vacate(range)) {
            log::error!("memory that was taken in part could not be given back: {error}");
        }
    }

    /// Gives every block of `range` memory, out of the free blocks that there are for it. A touch of a hole that is going to
    /// fail can have one of them for an instant, which shows nowhere: the next try finds it back.
    fn fill(&mut self, range: Range) -> Result<()> {
        if self.reach == Reach::Programs {
            self.void_policy(range);
        }
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
    /// [`Error::Busy`] where programs touch the file faster than memory can be taken from it. A shortage is no reason to fail:
    /// nothing is taken that the machine could lack for long.
    pub fn give(&mut self, range: Range) -> Result<()> {
        self.forget_holes(range)?;
        steps::done(Step::GiveHoles);
        insist(|| tmpfs::punch(&self.data, range))?;
        steps::done(Step::GivePunched);
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
        insist(|| self.set_size(size))?;
        steps::done(Step::CutSize);
        self.mark(gone, false);
        self.vacate(gone)?;
        steps::done(Step::CutVacated);
        let tail = Range::new(size.next_multiple_of(SUBPAGE_SIZE), kept);
        if !tail.is_empty() && self.has_memory(Subpage::containing(tail.start).folio()) {
            insist(|| self.fill(tail))?;
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
        let before = self.size;
        let zeroed = if self.reach == Reach::Programs { self.zero_behind_end(size) } else { Ok(()) };
        let grown = zeroed.and_then(|()| self.set_size(size));
        if grown.is_err() && self.size > before {
            self.cut(before)?;
        }
        grown
    }

    /// Writes at `offset`, up to behind the end of file but within the folio that holds the end and has memory. Nobody sees
    /// the file longer before the bytes are there. Ends early where a memory error is in the way.
    ///
    /// # Errors
    /// What pwrite(2) answers; the size is as before.
    pub fn append(&mut self, bytes: &[u8], offset: u64) -> Result<usize> {
        let end = offset + bytes.len() as u64;
        assert!(end <= self.size.next_multiple_of(FOLIO_SIZE) && self.holes().is_empty());
        let before = self.size;
        self.grow_size(offset)?;
        let written = tmpfs::write_at(&self.data, bytes, offset);
        match written {
            Ok(written) => self.size = self.size.max(offset + written as u64),
            Err(_) if self.size > before => self.cut(before)?,
            Err(_) => {}
        }
        written
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
        self.void_policy(range);
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

    /// What is known of the quarantined subpages of `range` is discarded, and that they were quarantined.
    fn forget_holes(&mut self, range: Range) -> Result<()> {
        let runs: Vec<Range> = self.holes().in_range(range).map(|hole| hole.range).collect();
        let of_one_folio = |one: &Range, next: &Range| one.start / FOLIO_SIZE == next.start / FOLIO_SIZE;
        for runs in runs.chunk_by(of_one_folio) {
            insist(|| self.ledger.strike(runs))?;
            runs.iter().try_for_each(|run| insist(|| self.ledger.free(*run)))?;
        }
        let poisoned: Vec<Subpage> =
            self.poisoned().range(range.subpages()).map(|(subpage, _)| *subpage).collect();
        poisoned.into_iter().try_for_each(|subpage| insist(|| self.ledger.forget_poisoned(subpage)))
    }

    /// Lowers the limit once `range`, of which no folio is meant to have memory, has been given up: a program may touch
    /// what was just punched as long as there is a block for it, and is punched again.
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

    /// Setting the size that a tmpfs file has already is no idle call: it frees what lies behind the end, and splits the
    /// folio for it (shmem_setattr).
    fn set_size(&mut self, size: u64) -> Result<()> {
        if size != self.size {
            tmpfs::set_size(&self.data, size)?;
            self.size = size;
        }
        Ok(())
    }

    /// Lets the superblock have what is meant to be taken, and `more` blocks.
    fn set_limit(&self, more: u64) -> Result<()> {
        tmpfs::set_limit(self.mount()?, self.limit() + more)
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
}

#[cfg(test)]
mod tests;
