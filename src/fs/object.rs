//! A regular file's contents: reading, writing and resizing it, by the rules for quarantined subpages.
//!
//! **Locks**, in order.
//!
//! - One for changes of size and pages, held for the whole of a change: the kernel lets writes that do not lengthen a file come
//!   at once (FOPEN_PARALLEL_DIRECT_WRITES), and each of two may need pages.
//! - One reader-writer lock a file: what only moves bytes shares it, what changes sizes, pages or the quarantine has it alone.
//! - One for collapsing, held for a folio.
//!
//! Programs that map the file need none of them.
//!
//! A change that takes long is done in pieces. Between two of them it gives way ([`Pace`]): those who wait for the file's lock get
//! the lock first. So each piece leaves the file as another request may find it. What stat(2) and poll(2) tell is kept beside the file
//! ([`Summary`]), and brought up to date whenever the lock is given up ([`Locked`]): who asks for that waits for no change.

use super::modified::Modified;
use super::native::Natives;
use super::pace::Pace;
use super::pollers::{self, Pollers, Waker};
use crate::error::{Error, Result};
use crate::pool::{Change, Holding, PIECE, Pool, Progress};
use crate::quarantine::{self, Kind, Quarantined, Repair};
use crate::sealed::{Content, Notes, Sealed};
use crate::steps::{self, Step, insist};
use crate::sys::mapping::View;
use crate::sys::{self, tmpfs};
use crate::units::{FOLIO_SIZE, Folio, NodeId, Range, STAT_BLOCK, SUBPAGE_SIZE, Subpage};
use parking_lot::{Mutex as FairMutex, MutexGuard as FairGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::fs::File;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

/// What is kept with a file, by name.
const BACKING: &str = "backing";
const NATIVES: &str = "natives";

/// How often what the kernel cannot put together at the moment is tried in vain, and how long its pages are left to who holds them in
/// between: memory compaction, say.
const COLLAPSE_TRIES: u32 = 3;
const COLLAPSE_NAP: Duration = Duration::from_millis(3);

/// How much is punched and kept in one piece: to drop memory takes some 15 ms per GiB.
const PUNCHED_AT_ONCE: u64 = 128 << 20;

/// How much is looked through for memory errors in one piece: some milliseconds where all of it is in
/// small pages.
const LOOKED_AT_ONCE: u64 = 128 << 20;

/// Why gaps forbid a soft quarantine. A free block would open the hole; and who counts on its touches filling them must not find zeros.
const GAPS_FORBID: Error =
    Error::Busy("the file has punched memory that waits for a touch; fallocate(2) it first");

/// A regular file's contents.
pub struct Object {
    node: NodeId,
    data: Arc<File>,
    /// What is kept with the file, for the next worker.
    notes: Notes,
    /// What is noted as [`BACKING`], once that is known.
    backing: OnceLock<u32>,
    /// Held while a change of size or pages is under way, as that gives the next lock up between its pieces.
    changing: FairMutex<()>,
    holding: RwLock<Holding>,
    summary: Mutex<Summary>,
    /// Held while a folio is collapsed: two at once would hold its pages against each other, and both fail.
    collapsing: Mutex<()>,
    natives: Natives,
    modified: Modified,
    view: Mutex<Option<Arc<View>>>,
    /// The log has said that soft holes are open and cannot be shut.
    is_stuck_open: AtomicBool,
    pollers: Pollers,
}

/// What is known of a file without its lock: as a change left it that has ended, or given way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Size in bytes.
    pub size: u64,
    /// Memory in bytes: whole pages, as the pool counts them. A file with quarantined subpages counts what it can be read of
    /// instead: cp(1) looks for holes only where that is less than the size.
    pub memory: u64,
    /// Quarantined subpages on request.
    pub soft: u64,
    /// Quarantined subpages with memory errors.
    pub hw: u64,
    /// The quarantine has grown since its [`Object::report`] was read.
    pub alarm: bool,
    /// There may be gaps that were asked for.
    pub punched: bool,
}

impl Summary {
    fn of(holding: &Holding) -> Self {
        let (sealed, size) = (holding.sealed(), holding.size());
        let (soft, hw) = (sealed.holes().count(), sealed.poisoned().len() as u64);
        let memory = match sealed.lost_count() {
            0 => holding.bytes(),
            lost => {
                let released: u64 = holding.released_in(Range::new(0, size)).map(Range::len).sum();
                (size - released).saturating_sub(lost * SUBPAGE_SIZE)
            }
        };
        let (alarm, punched) = (sealed.superblock().alarm, sealed.is_punched());
        Self { size, memory, soft, hw, alarm, punched }
    }
}

/// A file's lock in the hands of a request that changes sizes, pages or the quarantine.
pub struct Locked<'a> {
    object: &'a Object,
    holding: RwLockWriteGuard<'a, Holding>,
}

impl Locked<'_> {
    /// Gives the lock up if others wait for it, and takes it again when they have had it.
    pub fn let_others_go_first(&mut self) {
        self.publish();
        RwLockWriteGuard::bump(&mut self.holding);
    }

    fn publish(&self) {
        *self.object.summary.lock().expect("no panic with a summary") = Summary::of(&self.holding);
        if self.holding.sealed().holes().is_empty() {
            self.object.natives.admit();
        }
    }
}

impl Deref for Locked<'_> {
    type Target = Holding;

    fn deref(&self) -> &Holding {
        &self.holding
    }
}

impl DerefMut for Locked<'_> {
    fn deref_mut(&mut self) -> &mut Holding {
        &mut self.holding
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        self.publish();
    }
}

/// What an operation on a file's contents needs to know besides.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    /// Where pages come from.
    pub pool: &'a Pool,
    /// A write that covers a quarantined subpage repairs it.
    pub recovery_write: bool,
    /// Pages that are punched stay the file's.
    pub keep_punched: bool,
    /// Is told of folios that have become whole again.
    pub repaired: &'a (dyn Fn(Folio) + Sync),
    /// Is asked between two pieces of a long change.
    pub pace: &'a Pace,
}

/// What fallocate(2) is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allocation {
    /// Mode 0: memory for the range, and the file at least that long.
    Extend,
    /// FALLOC_FL_KEEP_SIZE: memory for the range.
    KeepSize,
    /// FALLOC_FL_PUNCH_HOLE: whole pages back to the pool, the rest zeroed; or all of it a gap ([`Context::keep_punched`]).
    Punch,
    /// FALLOC_FL_ZERO_RANGE: zeros, and the file at least that long.
    Zero,
    /// FALLOC_FL_ZERO_RANGE with FALLOC_FL_KEEP_SIZE.
    ZeroKeepSize,
}

/// How a part of a file is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// By 2 MiB entries.
    Huge,
    /// By 4 KiB entries.
    Small,
    /// Not: quarantined.
    Poisoned,
    /// Not: its pages were given back.
    Released,
    /// Not: punched, and a touch fills it.
    Punched,
}

impl State {
    /// As the map attribute has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Huge => "huge",
            Self::Small => "small",
            Self::Poisoned => "poisoned",
            Self::Released => "released",
            Self::Punched => "punched",
        }
    }
}

/// A part of a file in one state, on one NUMA node as far as that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Which part.
    pub range: Range,
    /// How it is mapped.
    pub state: State,
    /// Where its memory is.
    pub node: Option<u32>,
}

impl Object {
    /// Of `node`, with what `holding` has.
    pub fn new(node: NodeId, holding: Holding) -> Self {
        let (data, notes) = (holding.sealed().data().clone(), holding.sealed().notes().clone());
        let (natives, modified, view) = (Natives::default(), Modified::default(), Mutex::default());
        if !holding.sealed().holes().is_empty() {
            natives.exclude();
        }
        let (summary, holding) = (Mutex::new(Summary::of(&holding)), RwLock::new(holding));
        let (collapsing, pollers) = (Mutex::default(), Pollers::default());
        let (backing, changing) = (OnceLock::new(), FairMutex::default());
        let is_stuck_open = AtomicBool::new(false);
        Self {
            node,
            data,
            notes,
            backing,
            changing,
            holding,
            summary,
            collapsing,
            natives,
            modified,
            view,
            is_stuck_open,
            pollers,
        }
    }

    /// Whose contents these are.
    pub fn node(&self) -> NodeId {
        self.node
    }

    /// The file that programs map.
    pub fn data(&self) -> &File {
        &self.data
    }

    /// What changes of the contents have done to the inode.
    pub fn modified(&self) -> &Modified {
        &self.modified
    }

    /// Shares the lock.
    pub fn read_lock(&self) -> RwLockReadGuard<'_, Holding> {
        self.holding.read()
    }

    fn share(&self, pace: &Pace) -> Result<RwLockReadGuard<'_, Holding>> {
        pace.lock(|| self.holding.read(), || self.holding.try_read())
    }

    /// Shares the lock. A program that has punched a file with soft holes by MADV_REMOVE has opened these: where the
    /// memory is still free, they are shut first. For the reader nothing depends on that, as it goes by the records.
    fn shut_share(&self, pace: &Pace) -> Result<RwLockReadGuard<'_, Holding>> {
        let holding = self.share(pace)?;
        if !is_torn_around_holes(&holding)? {
            return Ok(holding);
        }
        drop(holding);
        pace.refuse_if(|| Ok(true))?;
        self.shut(&mut self.write_lock());
        Ok(self.read_lock())
    }

    /// Shuts the soft holes that a program has opened by MADV_REMOVE, also where it has touched them since, so that no
    /// block is free any more. Where a change of the file is under way, the next call does it.
    pub fn shut_opened_holes(&self) {
        let Some(holding) = self.holding.try_read() else { return };
        let sealed = holding.sealed();
        let is_open = !sealed.holes().is_empty()
            && (sealed.is_torn().unwrap_or(true) || sealed.has_strays().unwrap_or(true));
        drop(holding);
        if is_open {
            self.shut(&mut self.write_lock());
        }
    }

    /// The memory that the program gave up is taken from the machine again. While it has none, the holes stay open, and
    /// the log says so once.
    fn shut(&self, holding: &mut Locked<'_>) {
        match reclaim(holding, true, &Pace::steady()) {
            Ok(()) => self.is_stuck_open.store(false, Ordering::Relaxed),
            Err(error) if !self.is_stuck_open.swap(true, Ordering::Relaxed) => {
                log::error!(
                    "file {}: quarantined subpages that a program has opened by MADV_REMOVE are still open: {error}",
                    self.node
                );
            }
            Err(_) => {}
        }
    }

    /// Keeps other changes of size or pages from beginning.
    fn begin(&self, pace: &Pace) -> Result<FairGuard<'_, ()>> {
        pace.lock(|| self.changing.lock(), || self.changing.try_lock())
    }

    fn write_lock(&self) -> Locked<'_> {
        Locked { object: self, holding: self.holding.write() }
    }

    fn lock(&self, pace: &Pace) -> Result<Locked<'_>> {
        let holding = pace.lock(|| self.holding.write(), || self.holding.try_write())?;
        Ok(Locked { object: self, holding })
    }

    /// What is known without the lock.
    pub fn summary(&self) -> Summary {
        *self.summary.lock().expect("no panic with a summary")
    }

    /// Size in bytes, and memory in units of 512 bytes.
    pub fn size_and_blocks(&self) -> (u64, u64) {
        let summary = self.summary();
        (summary.size, summary.memory / STAT_BLOCK)
    }

    // ---- read and write -----------------------------------------------------------------------------------------

    /// Reads at `offset` up to the end of the file or the first quarantined subpage.
    ///
    /// # Errors
    /// [`Error::Poisoned`] where the first byte is quarantined.
    pub fn read(&self, buffer: &mut [u8], offset: u64, pace: &Pace) -> Result<usize> {
        let holding = self.shut_share(pace)?;
        let end = offset.saturating_add(buffer.len() as u64).min(holding.size());
        let range = Range::new(offset, end);
        if range.is_empty() {
            return Ok(0);
        }
        let good = good_prefix(&holding, range)?;
        tmpfs::read_at(&self.data, &mut buffer[..good as usize], offset)
    }

    /// What [`Object::read`] would read of up to `length` bytes, without a copy; nothing where a copy is better: for little, around what
    /// is lost, and where a touch would take memory.
    ///
    /// # Errors
    /// What mmap(2) and fstatfs(2) answer.
    pub fn view(&self, offset: u64, length: u64, pace: &Pace) -> Result<Option<Viewed<'_>>> {
        const LEAST: u64 = 64 << 10; // to copy less costs less than to walk the page tables
        let holding = self.shut_share(pace)?;
        let sealed = holding.sealed();
        let range = Range::new(offset, offset.saturating_add(length).min(holding.size()).max(offset));
        let is_whole =
            range.len() >= LEAST && holding.has_pages(range) && sealed.lost_in(range).next().is_none();
        if !is_whole || sealed.has_free_blocks()? {
            return Ok(None);
        }
        let view = self.view_up_to(range.end)?.filter(|view| view.populate(range).is_ok());
        Ok(view.map(|view| Viewed { _unchanged: holding, view, range }))
    }

    /// The file's view, longer than before where that is too short; none where there are too many of all files.
    fn view_up_to(&self, end: u64) -> Result<Option<Arc<View>>> {
        const GRAIN: u64 = 1 << 30; // a file that grows is not mapped anew each time
        const MOST: usize = 4096; // of the 65,530 mappings that a process may have (vm.max_map_count)
        let mut view = self.view.lock().expect("no panic while a file is mapped");
        if view.as_ref().is_none_or(|view| view.length() < end) {
            *view = None;
            if View::count() >= MOST {
                return Ok(None);
            }
            *view = Some(Arc::new(View::new(&self.data, end.next_multiple_of(GRAIN))?));
        }
        Ok(view.clone())
    }

    /// Writes at `offset`, lengthening the file where that is behind its end. Ends before the first subpage that is
    /// quarantined and covered in part.
    ///
    /// # Errors
    /// [`Error::Full`] where pages are needed that the pool does not have: nothing has changed. [`Error::Poisoned`]
    /// where the first byte cannot be written for a quarantined subpage.
    pub fn write(&self, bytes: &[u8], offset: u64, context: Context<'_>) -> Result<usize> {
        if bytes.is_empty() {
            return Ok(0);
        }
        let range = checked_range(offset, bytes.len() as u64)?;
        {
            let holding = self.share(context.pace)?;
            let sealed = holding.sealed();
            if holding.has_pages(range) && sealed.lost_in(range).next().is_none() && !sealed.is_torn()? {
                return tmpfs::write_at(&self.data, bytes, offset);
            }
        }
        self.write_alone(bytes, range, context)
    }

    fn write_alone(&self, bytes: &[u8], range: Range, context: Context<'_>) -> Result<usize> {
        let _one_at_a_time = self.begin(context.pace)?;
        let mut holding = self.lock(context.pace)?;
        context
            .pace
            .refuse_if(|| takes_long(&holding, range, range.end.max(holding.size()), context.pool))?;
        if holding.has_pages(range) || holding.can_append(range) {
            mend_but_gaps(&mut holding, context.pace)?
        } else {
            mend(&mut holding, context.pace)?
        }
        let size = holding.size();
        if holding.can_append(range) {
            match holding.sealed_mut().append(bytes, range.start) {
                Err(Error::Poisoned) | Ok(0) => mend(&mut holding, context.pace)?, // an error that nobody knew of: around it, as below
                result => return result,
            }
        }
        let end = writable_prefix(&holding, range, context.recovery_write)?;
        let range = Range::new(range.start, end);
        if range.end > size && holding.sealed().has_news_of_poison(range)? {
            return Err(Error::Poisoned); // before the file grows: to cut it again would split the folio with its end
        }
        let growth = holding.begin_growth(context.pool, range, range.end)?;
        carry_out(&mut holding, growth, context.pace)?;
        let (written, ended) = match writable_prefix(&holding, range, context.recovery_write) {
            Ok(end) if end == range.end => self.write_and_repair(&mut holding, bytes, range, context),
            // The patrol has found an error while the growth gave way.
            Ok(end) => {
                let good = Range::new(range.start, end);
                let (written, ended) = self.write_and_repair(&mut holding, bytes, good, context);
                (written, ended.and(Err(Error::Poisoned)))
            }
            Err(error) => (0, Err(error)),
        };
        if ended.is_err() && holding.size() > size {
            let end = if written == 0 { size } else { size.max(range.start + written) };
            let shrinking = holding.begin_shrinking(context.pool, end)?;
            holding.complete(shrinking)?; // the file ends where the write did
        }
        match (written, ended) {
            (0, Err(error)) => Err(error),
            _ => Ok(written as usize),
        }
    }

    /// Writes `range`, which has memory, and repairs what is quarantined in it. Returns how many bytes from the
    /// start of `range` on the file has, and the error that kept it from having the next one.
    fn write_and_repair(
        &self,
        holding: &mut Holding,
        bytes: &[u8],
        range: Range,
        context: Context<'_>,
    ) -> (u64, Result<()>) {
        let mut done = range.start;
        let lost: Vec<Range> = holding.sealed().lost_runs_in(range).collect();
        for run in lost.iter().copied().map(Some).chain([None]) {
            let until = run.map_or(range.end, |run| run.start);
            let piece = &bytes[(done - range.start) as usize..(until - range.start) as usize];
            let (written, ended) = self.write_surely(piece, done);
            done += written as u64;
            let Some(run) = run.filter(|_| ended.is_ok()) else {
                return (done - range.start, ended);
            };
            let content = Content::Bytes { start: range.start, bytes };
            if let Err(error) = self.repair_part(holding, run, content, context) {
                return (done - range.start, Err(error));
            }
            done = run.end.min(range.end);
        }
        (done - range.start, Ok(()))
    }

    /// Writes where there is memory: the kernel takes none for that, so a shortage passes.
    fn write_surely(&self, bytes: &[u8], offset: u64) -> (usize, Result<()>) {
        let written = insist(|| match tmpfs::write_prefix(&self.data, bytes, offset) {
            (0, Err(error)) if error.is_shortage() => Err(error),
            written => Ok(written),
        });
        written.unwrap_or_else(|error| (0, Err(error)))
    }

    // ---- sizes and pages ----------------------------------------------------------------------------------------

    /// ftruncate(2).
    ///
    /// # Errors
    /// [`Error::Full`] with nothing changed; [`Error::Busy`] where soft holes forbid it.
    pub fn truncate(&self, size: u64, context: Context<'_>) -> Result<()> {
        checked_range(0, size)?;
        let _one_at_a_time = self.begin(context.pace)?;
        let mut holding = self.lock(context.pace)?;
        context.pace.refuse_if(|| takes_long(&holding, Range::new(size, size), size, context.pool))?;
        mend(&mut holding, context.pace)?;
        let change = match holding.size() {
            now if size <= now => holding.begin_shrinking(context.pool, size)?,
            now => holding.begin_growth(context.pool, Range::new(now, now), size)?,
        };
        carry_out(&mut holding, change, context.pace)
    }

    /// fallocate(2).
    ///
    /// # Errors
    /// [`Error::Full`] with nothing changed; [`Error::Busy`] where soft holes forbid it.
    pub fn allocate(&self, what: Allocation, offset: u64, length: u64, context: Context<'_>) -> Result<()> {
        let range = match what {
            Allocation::Punch => possible_part(offset, length), // to punch all that there may be is how programs say "to the end"
            _ => checked_range(offset, length)?,
        };
        let _one_at_a_time = self.begin(context.pace)?;
        let mut holding = self.lock(context.pace)?;
        let end = match what {
            Allocation::Extend | Allocation::Zero => range.end.max(holding.size()),
            Allocation::KeepSize | Allocation::ZeroKeepSize | Allocation::Punch => holding.size(),
        };
        context.pace.refuse_if(|| takes_long(&holding, range, end, context.pool))?;
        if what == Allocation::Punch && context.keep_punched {
            return self.punch_and_keep(&mut holding, range, context);
        }
        mend(&mut holding, context.pace)?;
        if matches!(what, Allocation::Punch | Allocation::Zero | Allocation::ZeroKeepSize) {
            refuse_partial_holes(&holding, range)?;
        }
        let change = match what {
            Allocation::Extend | Allocation::Zero => holding.begin_growth(context.pool, range, range.end)?,
            Allocation::KeepSize | Allocation::ZeroKeepSize => {
                holding.begin_allocation(context.pool, range)?
            }
            Allocation::Punch => holding.begin_release(context.pool, range)?,
        };
        carry_out(&mut holding, change, context.pace)?;
        match what {
            Allocation::Extend | Allocation::KeepSize => Ok(()),
            // What a punch has released has no memory to be zeroed.
            Allocation::Punch | Allocation::Zero | Allocation::ZeroKeepSize => {
                self.zero(&mut holding, range, context)
            }
        }
    }

    /// The pages stay the file's, and a touch fills the gaps. Where there are soft holes elsewhere, which a free block would open, all is
    /// zeroed in place.
    fn punch_and_keep(&self, holding: &mut Locked<'_>, range: Range, context: Context<'_>) -> Result<()> {
        mend_but_gaps(holding, context.pace)?;
        refuse_partial_holes(holding, range)?;
        self.repair_lost(holding, range, context)?;
        if holding.sealed().holes().is_empty() && !holding.has_released() {
            let range = range.intersect(Range::new(0, holding.size()));
            range.cut_at_multiples(PUNCHED_AT_ONCE).try_for_each(|piece| {
                holding.sealed_mut().punch(piece)?;
                context.pace.give_way(holding)
            })
        } else {
            self.zero(holding, range, context)
        }
    }

    /// Puts zeros in place of what is quarantined in `range`.
    fn repair_lost(&self, holding: &mut Locked<'_>, range: Range, context: Context<'_>) -> Result<()> {
        let range = range.intersect(Range::new(0, holding.size()));
        parts(range).try_for_each(|part| {
            self.repair_part(holding, part, Content::Zero, context)?;
            context.pace.give_way(holding)
        })
    }

    /// Zeroes what has memory of `range`; quarantined subpages that it covers are repaired, for what they held is
    /// discarded. [`Error::Poisoned`] where one is covered in part; nothing is zeroed then.
    fn zero(&self, holding: &mut Locked<'_>, range: Range, context: Context<'_>) -> Result<()> {
        const ZEROS: &[u8] = &[0; 256 << 10];
        refuse_partial_holes(holding, range)?;
        self.repair_lost(holding, range, context)?;
        for part in holding.owned_in(range) {
            for step in part.steps(ZEROS.len() as u64) {
                let zeros = &ZEROS[..step.len() as usize];
                insist(|| tmpfs::write_all_at(&self.data, zeros, step.start))?; // there is memory for them
                context.pace.give_way(holding)?;
            }
        }
        Ok(())
    }

    /// The next place from `offset` on that is data (true) or not (false): SEEK_DATA and SEEK_HOLE of lseek(2).
    /// Quarantined subpages, released pages and the end of the file are holes, all else is data.
    ///
    /// # Errors
    /// ENXIO behind the end, and for data where there is none left.
    pub fn seek(&self, offset: u64, data: bool, pace: &Pace) -> Result<u64> {
        let holding = self.shut_share(pace)?;
        let rest = Range::new(offset, holding.size());
        let nothing = Error::Os(rustix::io::Errno::NXIO);
        if rest.is_empty() {
            return Err(nothing);
        }
        let mut holes = holes_in(&holding, rest);
        if !data {
            return Ok(holes.next().map_or(rest.end, |hole| hole.start));
        }
        let behind_hole = |at: u64, hole: Range| if hole.start <= at { Ok(hole.end) } else { Err(at) };
        match holes.try_fold(rest.start, behind_hole) {
            Err(at) => Ok(at),
            Ok(at) if at < rest.end => Ok(at),
            Ok(_) => Err(nothing),
        }
    }

    // ---- quarantine ---------------------------------------------------------------------------------------------

    /// What is quarantined, as the poison attribute has it. Where that fits into `room`, its reader gets it, and the growth of
    /// the quarantine has been seen.
    ///
    /// # Errors
    /// What pwrite(2) answers.
    pub fn report(&self, room: Option<usize>, pace: &Pace) -> Result<String> {
        let mut holding = self.lock(pace)?;
        pace.refuse_if(|| is_torn_around_holes(&holding))?;
        if is_torn_around_holes(&holding)? {
            self.shut(&mut holding);
        }
        let text = quarantine::format(&quarantined(holding.sealed()));
        if room.is_some_and(|room| text.len() <= room) {
            holding.sealed_mut().update(|superblock| superblock.alarm = false)?;
        }
        Ok(text)
    }

    /// Bytes that were punched on request and have no memory.
    ///
    /// # Errors
    /// What fstatfs(2) answers.
    pub fn punched_bytes(&self, pace: &Pace) -> Result<u64> {
        if self.summary().punched { self.share(pace)?.sealed().punched_bytes() } else { Ok(0) }
    }

    /// Looks for memory errors that the kernel has met in the file, and returns how many are new. Gives way between its pieces.
    ///
    /// # Errors
    /// What mmap(2) and setxattr(2) answer; [`Error::Interrupted`]. What was found by then is noted.
    pub fn look_for_poison(&self, pace: &Pace) -> Result<usize> {
        let (mut found, time) = (Vec::new(), sys::unix_time());
        let looked = self.note_poison(&mut found, time, pace);
        for subpage in &found {
            log::error!(
                "file {}: memory error, {:#x} {SUBPAGE_SIZE:#x} quarantined (hw)",
                self.node,
                subpage.offset()
            );
        }
        if !found.is_empty() {
            self.wake_all();
        }
        looked.map(|()| found.len())
    }

    /// Adds what is new to `found`, piece by piece.
    fn note_poison(&self, found: &mut Vec<Subpage>, time: u64, pace: &Pace) -> Result<()> {
        let mut holding = self.write_lock();
        let file = Range::new(0, holding.sealed().size()).subpages_out();
        file.steps(LOOKED_AT_ONCE).try_for_each(|piece| {
            found.extend(holding.sealed_mut().note_poison_in(piece, time)?);
            pace.give_way(&mut holding)
        })
    }

    /// Has the kernel treat a subpage as if the hardware had reported an error in it, by a value of the inject attribute.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a value that does not parse or a place without memory; [`Error::Unsupported`] where the
    /// kernel has no CONFIG_MEMORY_FAILURE.
    pub fn inject(&self, value: &[u8]) -> Result<()> {
        let holding = self.read_lock();
        holding.sealed().inject(injectable(&holding, value)?)
    }

    /// Whether [`Object::inject`] would find a place.
    pub fn is_injectable(&self, value: &[u8]) -> bool {
        injectable(&self.read_lock(), value).is_ok()
    }

    /// Runs `waker` once, when the quarantine grows; a later one with the same `key`, the kernel's handle, takes its place.
    /// `waker` may run earlier, too: a program that still polls comes again.
    ///
    /// # Errors
    /// What setxattr(2) and removexattr(2) answer: `waker` is not taken.
    pub fn wake_on_alarm(&self, key: u64, waker: Waker) -> Result<()> {
        self.pollers.add(key, waker, &self.notes)
    }

    /// Wakes by the keys that [`Object::wake_on_alarm`] noted in another process; then the notes are removed.
    ///
    /// # Errors
    /// What getxattr(2) and removexattr(2) answer.
    pub fn wake_noted_pollers(&self, wake: impl Fn(u64)) -> Result<()> {
        pollers::wake_noted(&self.notes, wake)
    }

    /// The number that the kernel knows `data` by (FUSE_DEV_IOC_BACKING_OPEN), if one is kept. All replies that open the file must
    /// say the same, whichever worker gives them.
    ///
    /// # Errors
    /// What getxattr(2) answers.
    pub fn backing(&self) -> Result<Option<u32>> {
        if let Some(number) = self.backing.get() {
            return Ok(Some(*number));
        }
        let kept = self.notes.kept(BACKING)?;
        let number = kept.and_then(|bytes| Some(u32::from_le_bytes(bytes.try_into().ok()?)));
        Ok(number.map(|number| *self.backing.get_or_init(|| number)))
    }

    /// Keeps that number with the file.
    ///
    /// # Errors
    /// What setxattr(2) answers: nothing is kept.
    pub fn keep_backing(&self, number: u32) -> Result<()> {
        self.notes.keep(BACKING, &number.to_le_bytes())
    }

    /// Notes `descriptor` as one by which the kernel reads `data` without us: what is a hole there would be zeros to it. So it
    /// answers no for a file with soft holes; and as long as one is noted, none is made ([`Object::quarantine`]). The notes are kept
    /// with the file, for the next worker.
    ///
    /// # Errors
    /// What setxattr(2) answers: nothing is noted then.
    pub fn open_natively(&self, descriptor: u64) -> Result<bool> {
        let noted = self.natives.add(descriptor, |noted| self.notes.keep(NATIVES, noted));
        steps::done(Step::NativeNoted);
        noted
    }

    /// That descriptor is closed; one that is not noted is no matter.
    pub fn close_natively(&self, descriptor: u64) {
        if let Err(error) = self.natives.remove(descriptor, |noted| self.notes.keep(NATIVES, noted)) {
            log::warn!("file {}: the next worker may take a closed descriptor for open: {error}", self.node);
        }
        steps::done(Step::NativeClosed);
    }

    /// How many descriptors are noted as reading without us.
    pub fn natives(&self) -> usize {
        self.natives.count()
    }

    /// Takes over the notes of another process.
    ///
    /// # Errors
    /// What getxattr(2) answers.
    pub fn recall_natives(&self) -> Result<()> {
        if let Some(noted) = self.notes.kept(NATIVES)? {
            self.natives.recall(&noted);
        }
        Ok(())
    }

    /// Quarantines the subpages of the ranges that a value of the poison attribute names; those that are quarantined
    /// already stay as they are.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a value that does not parse or a range without memory; [`Error::OpenNatively`] where
    /// descriptors are noted that read natively, or [`Error::Busy`] where there are gaps to be filled by touches, and nothing
    /// is done; [`Error::Busy`] for a pinned folio, and those before it in the value are quarantined by then.
    pub fn quarantine(&self, value: &[u8], pool: &Pool, pace: &Pace) -> Result<()> {
        let is_done = {
            let holding = self.read_lock();
            let ranges = quarantinable(&holding, value)?;
            ranges.iter().all(|range| lost_bytes(holding.sealed(), *range) == range.len())
        };
        if is_done {
            return Ok(());
        }
        let mut holding = self.write_lock();
        if !self.natives.exclude() {
            return Err(Error::OpenNatively);
        }
        let ranges = quarantinable(&holding, value)?;
        if holding.sealed().punched_bytes()? > 0 {
            return Err(GAPS_FORBID);
        }
        mend(&mut holding, pace)?;
        let time = sys::unix_time();
        let before = holding.sealed().lost_count();
        let result = ranges
            .into_iter()
            .try_for_each(|range| self.quarantine_range(&mut holding, range, time, (pool, pace)));
        let grown = holding.sealed().lost_count() > before;
        drop(holding);
        if grown {
            self.wake_all();
        }
        result
    }

    fn quarantine_range(
        &self,
        holding: &mut Locked<'_>,
        range: Range,
        time: u64,
        (pool, pace): (&Pool, &Pace),
    ) -> Result<()> {
        let before = holding.sealed().holes().count();
        let result = parts(range).try_for_each(|part| {
            // Where the parts before have made no hole, a native may have come while the lock was given up.
            if !self.natives.exclude() {
                return Err(Error::OpenNatively);
            }
            pool.with_loan(part.len(), || holding.sealed_mut().quarantine(part, time))?;
            pace.give_way(holding)
        });
        if holding.sealed().holes().count() > before {
            log::warn!("file {}: {range} quarantined (soft)", self.node);
        }
        result
    }

    fn wake_all(&self) {
        if let Err(error) = self.pollers.wake(&self.notes) {
            log::warn!("file {}: the next worker wakes its pollers again: {error}", self.node);
        }
    }

    /// Repairs as a value of the repair attribute asks for.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a value that does not parse, [`Error::NoData`] where a range holds nothing to repair or
    /// nothing that could be salvaged: nothing is done.
    ///
    /// What is `resumed` had found enough to do when a worker that died began it; whatever is left is done.
    pub fn repair(&self, value: &[u8], resumed: bool, context: Context<'_>) -> Result<()> {
        let mut holding = self.write_lock();
        let requests = quarantine::parse_repair(value, holding.size())?;
        mend_but_gaps(&mut holding, context.pace)?;
        for (verb, range) in requests.iter().filter(|_| !resumed) {
            check_repairable(&holding, *verb, *range)?;
        }
        for (verb, range) in requests {
            let content = match verb {
                Repair::Zero => Content::Zero,
                Repair::Salvage => Content::Known,
            };
            parts(range).try_for_each(|part| {
                self.repair_part(&mut holding, part, content, context)?;
                context.pace.give_way(&mut holding)
            })?;
            log::info!("file {}: {range} repaired", self.node);
        }
        Ok(())
    }

    /// Whether [`Object::repair`] would find something to do.
    ///
    /// # Errors
    /// Why that cannot be told.
    pub fn is_repairable(&self, value: &[u8]) -> Result<bool> {
        let holding = self.read_lock();
        let requests = quarantine::parse_repair(value, holding.size());
        let is_possible = requests.and_then(|requests| {
            requests.iter().try_for_each(|(verb, range)| check_repairable(&holding, *verb, *range))
        });
        match is_possible {
            Ok(()) => Ok(true),
            Err(Error::Invalid(_) | Error::NoData) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Repairs what is lost of `part`, which is of one folio.
    fn repair_part(
        &self,
        holding: &mut Holding,
        part: Range,
        content: Content<'_>,
        context: Context<'_>,
    ) -> Result<()> {
        if holding.sealed().lost_runs_in(part).next().is_none() {
            return Ok(());
        }
        let lost = lost_bytes(holding.sealed(), part);
        context.pool.with_loan(lost, || holding.sealed_mut().repair(part, content))?;
        let folio = Subpage::containing(part.start).folio();
        if holding.sealed().lost_runs_in(folio.range()).next().is_none() {
            (context.repaired)(folio);
        }
        Ok(())
    }

    /// Puts huge mappings back as a value of the collapse attribute asks for. Parts that cannot be huge, for a quarantined
    /// subpage or because they were released or punched, are left alone.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a value that does not parse; [`Error::Again`] or [`Error::NoMemory`] where the kernel could
    /// not, after having tried all.
    pub fn collapse(&self, value: &[u8], pace: &Pace) -> Result<()> {
        let ranges = quarantine::parse_collapse(value, self.read_lock().size())?;
        let mut left: Vec<Folio> = ranges.iter().flat_map(|range| range.folios()).collect();
        let (mut failure, mut fruitless) = (Ok(()), 0);
        while !left.is_empty() && fruitless < COLLAPSE_TRIES {
            let before = left.len();
            left.retain(|folio| match pace.go_on().and_then(|()| self.collapse_folio(*folio)) {
                Ok(()) => false,
                Err(Error::Again) => true,
                Err(error) => {
                    failure = Err(error);
                    false
                }
            });
            if left.len() == before {
                fruitless += 1;
                std::thread::sleep(COLLAPSE_NAP);
            }
        }
        if left.is_empty() { failure } else { Err(Error::Again) }
    }

    /// Puts one folio back into one piece, as far as it has memory and nothing of it is lost.
    ///
    /// # Errors
    /// As for [`crate::sealed::Sealed::collapse`].
    pub fn collapse_folio(&self, folio: Folio) -> Result<()> {
        let holding = self.read_lock();
        let sealed = holding.sealed();
        match sealed.has_memory(folio).then(|| self.collapse_one(sealed, folio)) {
            None | Some(Err(Error::Busy(_))) => Ok(()),
            Some(result) => result,
        }
    }

    fn collapse_one(&self, sealed: &Sealed, folio: Folio) -> Result<()> {
        let _one_at_a_time = self.collapsing.lock().expect("no panic while a folio is collapsed");
        sealed.collapse(folio)
    }

    /// How the file is mapped, without gaps, ascending.
    ///
    /// # Errors
    /// What mmap(2) and the page map answer.
    pub fn map(&self, nodes: &[u32], pace: &Pace) -> Result<Vec<Extent>> {
        const WINDOW: u64 = 64 << 20;
        let mut extents = Extents::default();
        let mut at = 0;
        loop {
            pace.go_on()?;
            let holding = self.shut_share(pace)?; // for one window: a change of the file goes on in between
            let sealed = holding.sealed();
            let file = Range::new(0, holding.size()).subpages_out();
            let window = Range::at(at, WINDOW).intersect(file);
            if window.is_empty() {
                return Ok(extents.0);
            }
            at = window.end;
            let huge = sealed.huge_ranges(window)?;
            for folio in window.folios() {
                let range = folio.range().intersect(file);
                let node = match (sealed.has_memory(folio), nodes) {
                    (false, _) => None,
                    (true, [only]) => Some(*only),
                    (true, _) => sealed.node_of(folio),
                };
                if !sealed.has_memory(folio) {
                    extents.push(range, State::Released, None);
                } else if huge.iter().any(|huge| huge.covers(folio.range())) {
                    extents.push(range, State::Huge, node);
                } else {
                    let present = sealed.present(range)?;
                    let is_present =
                        |subpage: Subpage| present.iter().any(|part| part.covers(subpage.range()));
                    for subpage in subpages(range) {
                        let (state, node) = match sealed.is_lost(subpage) {
                            true => (State::Poisoned, node),
                            false if is_present(subpage) => (State::Small, node),
                            false => (State::Punched, None),
                        };
                        extents.push(subpage.range(), state, node);
                    }
                }
            }
        }
    }

    /// Verifies what can be told of the file alone; says what does not hold. A change of the file waits for a piece of that.
    ///
    /// # Errors
    /// What the kernel answers; [`Error::Interrupted`].
    pub fn check(&self, pace: &Pace) -> Result<Vec<String>> {
        let mut wrong = self.read_lock().check()?;
        let mut at = 0;
        while at < self.read_lock().sealed().memory_span() {
            pace.go_on()?;
            wrong.extend(self.read_lock().sealed().check_part(Range::at(at, PIECE))?);
            at += PIECE;
        }
        Ok(wrong.into_iter().map(|what| format!("file {}: {what}", self.node)).collect())
    }

    // ---- begin and end ------------------------------------------------------------------------------------------

    /// Undoes what was under way in another process ([`Holding::settle`]).
    ///
    /// # Errors
    /// [`Error::NoMemory`].
    pub fn settle(&self, pool: &Pool) -> Result<()> {
        let mut holding = self.write_lock();
        let settling = holding.begin_settling(pool);
        holding.complete(settling)
    }

    /// The file has lost its last name: its pages will come back when its last user is gone.
    ///
    /// # Errors
    /// [`Error::TakesLong`].
    pub fn note_orphaned(&self, pool: &Pool, pace: &Pace) -> Result<()> {
        self.lock(pace)?.note_orphaned(pool);
        Ok(())
    }

    /// Gives all pages back to the pool.
    ///
    /// # Errors
    /// [`Error::NoMemory`] where the machine has none for a step; to be called again.
    pub fn empty(&self, pool: &Pool) -> Result<()> {
        let _one_at_a_time = self.changing.lock();
        let mut holding = self.write_lock();
        let shrinking = holding.begin_shrinking(pool, 0)?;
        carry_out(&mut holding, shrinking, &Pace::steady())
    }
}

/// A file's lock, for as long as a change has it alone.
/// Makes a change piece by piece, and gives way between two of them. Where the caller was killed, it is given up.
fn carry_out(holding: &mut Locked<'_>, mut change: Change<'_>, pace: &Pace) -> Result<()> {
    while change.advance(holding)? == Progress::More {
        if let Err(why) = pace.give_way(holding) {
            change.give_up(why);
        }
    }
    Ok(())
}

/// A part of a file, none of which is lost, and which stays so as long as this is held.
pub struct Viewed<'a> {
    _unchanged: RwLockReadGuard<'a, Holding>,
    view: Arc<View>,
    range: Range,
}

impl Viewed<'_> {
    /// As for [`View::bytes`].
    pub fn bytes(&self) -> &[u8] {
        self.view.bytes(self.range)
    }
}

/// Joins neighbours in the same state on the same node.
#[derive(Default)]
struct Extents(Vec<Extent>);

impl Extents {
    fn push(&mut self, range: Range, state: State, node: Option<u32>) {
        match self.0.last_mut() {
            Some(last) if last.range.end == range.start && last.state == state && last.node == node => {
                last.range.end = range.end;
            }
            _ => self.0.push(Extent { range, state, node }),
        }
    }
}

/// Whether a change of the bytes in `touched` that leaves the file `end` bytes long takes longer than a moment: much is moved or
/// zeroed, or something is to be found, mended or repaired first.
fn takes_long(holding: &Holding, touched: Range, end: u64, pool: &Pool) -> Result<bool> {
    const LITTLE: u64 = 4 << 20;
    let size = holding.size();
    let (inside, cut) = (touched.intersect(Range::new(0, size)), Range::new(end.min(size), size));
    let is_whole = |range: Range| holding.sealed().lost_in(range).next().is_none();
    Ok(inside.len() + size.abs_diff(end) > LITTLE
        || !holding.has_pages(inside)
        || !(is_whole(inside) && is_whole(cut))
        || holding.sealed().has_free_blocks()?
        || pool.move_must_wait())
}

/// What is quarantined, ascending.
fn quarantined(sealed: &Sealed) -> Vec<Quarantined> {
    let soft = sealed.holes().all().map(|hole| (hole.range, Kind::Soft, hole.time));
    let hw = sealed.poisoned().iter().map(|(subpage, time)| (subpage.range(), Kind::Hw, *time));
    let mut all: Vec<_> = soft.chain(hw).collect();
    all.sort_by_key(|(range, ..)| range.start);
    quarantine::coalesce(all.into_iter())
}

/// Whether a touch could fill soft holes: a program has made blocks free behind our back.
fn is_torn_around_holes(holding: &Holding) -> Result<bool> {
    Ok(!holding.sealed().holes().is_empty() && holding.sealed().is_torn()?)
}

/// Before an operation that needs S1: take back what a program punched, with madvise(2) or on request. Gives way between its pieces.
fn mend(holding: &mut Locked<'_>, pace: &Pace) -> Result<()> {
    reclaim(holding, false, pace)
}

fn reclaim(holding: &mut Locked<'_>, from_strays: bool, pace: &Pace) -> Result<()> {
    let mut next = holding.sealed_mut().begin_reclaiming(from_strays)?;
    while let Some(from) = next {
        pace.give_way(holding)?;
        next = holding.sealed_mut().reclaim_piece(from)?;
    }
    Ok(())
}

/// Before one that needs S1 only for the sake of soft holes. Where there are gaps on request, there are none.
fn mend_but_gaps(holding: &mut Locked<'_>, pace: &Pace) -> Result<()> {
    if holding.sealed().is_punched() { Ok(()) } else { mend(holding, pace) }
}

/// The parts of `range` that are of one folio each.
fn parts(range: Range) -> impl Iterator<Item = Range> {
    range.folios().map(move |folio| folio.range().intersect(range))
}

/// Bytes of `range` that are quarantined.
fn lost_bytes(sealed: &Sealed, range: Range) -> u64 {
    sealed.lost_runs_in(range).map(Range::len).sum()
}

fn subpages(range: Range) -> impl Iterator<Item = Subpage> {
    let subpages = range.subpages();
    (subpages.start.0..subpages.end.0).map(Subpage)
}

/// Largest size of a file, chosen so that rounding up cannot overflow.
const LARGEST_SIZE: u64 = i64::MAX as u64 / FOLIO_SIZE * FOLIO_SIZE;

/// A range that a file can have.
fn checked_range(offset: u64, length: u64) -> Result<Range> {
    Range::checked_at(offset, length).filter(|range| range.end <= LARGEST_SIZE).ok_or(Error::TooLarge)
}

/// The part of a range that a file can have.
fn possible_part(offset: u64, length: u64) -> Range {
    Range::new(offset, offset.saturating_add(length)).intersect(Range::new(0, LARGEST_SIZE))
}

/// Bytes of `range` before the first quarantined one.
fn good_prefix(holding: &Holding, range: Range) -> Result<u64> {
    match holding.sealed().lost_in(range).next() {
        None => Ok(range.len()),
        Some(hole) if hole.offset() <= range.start => Err(Error::Poisoned),
        Some(hole) => Ok(hole.offset() - range.start),
    }
}

/// Where a write of `range` has to end: before the first quarantined subpage that it must not repair.
///
/// A subpage that the write covers up to the end of the file is covered whole.
fn writable_prefix(holding: &Holding, range: Range, recovery_write: bool) -> Result<u64> {
    let obstacle = match recovery_write {
        true => covered_in_part(holding, range),
        false => holding.sealed().lost_in(range).next(),
    };
    match obstacle {
        None => Ok(range.end),
        Some(hole) if hole.offset() <= range.start => Err(Error::Poisoned),
        Some(hole) => Ok(hole.offset()),
    }
}

/// The first lost subpage of which `range` holds some bytes of the file and not all.
fn covered_in_part(holding: &Holding, range: Range) -> Option<Subpage> {
    let file = Range::new(0, holding.size());
    let ends = [Subpage::containing(range.start), Subpage::containing(range.end.saturating_sub(1))];
    let is_in_part = |subpage: &Subpage| {
        let bytes = subpage.range().intersect(file);
        !range.covers(bytes) && !range.intersect(bytes).is_empty()
    };
    ends.into_iter().find(|subpage| holding.sealed().is_lost(*subpage) && is_in_part(subpage))
}

/// Part of a lost subpage cannot be zeroed.
fn refuse_partial_holes(holding: &Holding, range: Range) -> Result<()> {
    if covered_in_part(holding, range).is_some() { Err(Error::Poisoned) } else { Ok(()) }
}

/// The parts of `range` that are quarantined subpages or lie in released pages, ascending.
fn holes_in(holding: &Holding, range: Range) -> impl Iterator<Item = Range> + '_ {
    let mut lost = holding.sealed().lost_in(range).map(move |lost| lost.range().intersect(range)).peekable();
    let mut released = holding.released_in(range).peekable();
    std::iter::from_fn(move || match (lost.peek(), released.peek()) {
        (Some(one), Some(other)) if one.start < other.start => lost.next(),
        (_, None) => lost.next(),
        _ => released.next(),
    })
}

/// The ranges that a value of the poison attribute names.
fn quarantinable(holding: &Holding, value: &[u8]) -> Result<Vec<Range>> {
    let ranges = quarantine::parse_poison(value, holding.size())?;
    for range in &ranges {
        if holding.released_in(*range).next().is_some() {
            return Err(Error::invalid(format!("{range} was released and has no memory to quarantine")));
        }
    }
    Ok(ranges)
}

fn injectable(holding: &Holding, value: &[u8]) -> Result<Subpage> {
    let subpage = quarantine::parse_inject(value, holding.size())?;
    let sealed = holding.sealed();
    if sealed.is_lost(subpage)
        || !sealed.has_memory(subpage.folio())
        || sealed.present(subpage.range())?.is_empty()
    {
        return Err(Error::invalid(format!("{:#x} has no memory, or is quarantined", subpage.offset())));
    }
    Ok(subpage)
}

fn check_repairable(holding: &Holding, verb: Repair, range: Range) -> Result<()> {
    let sealed = holding.sealed();
    for subpage in sealed.lost_in(range) {
        match sealed.rescued(subpage) {
            Err(Error::NoData) if verb == Repair::Salvage => {}
            Err(error) if verb == Repair::Salvage => return Err(error),
            _ => return Ok(()),
        }
    }
    Err(Error::NoData)
}

#[cfg(test)]
mod tests;
