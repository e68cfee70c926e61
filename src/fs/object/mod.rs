//! The contents of a regular file: reads, writes, sizes and pages, by the rules for quarantined
//! subpages.
//!
//! **Locks**, in order.
//!
//! - `changing`, held for the whole of a change of size or pages. The kernel lets writes that do
//!   not lengthen a file come at the same time (FOPEN_PARALLEL_DIRECT_WRITES), and each of two may
//!   need pages.
//! - `holding`, a reader-writer lock. Requests that only move bytes share it; a change of sizes,
//!   pages or the quarantine has it alone.
//! - `collapsing`, a reader-writer lock, held alone while a folio is collapsed. The kernel's copy
//!   out of a view shares it (`io::Viewed`).
//!
//! Programs that map the file need none of them.
//!
//! A change that takes long is made in pieces and gives way between two of them ([`Pace`]):
//! requests that wait for the file's lock get the lock first. So each piece leaves the file in a
//! state that another request may find. A [`Summary`] beside the file has all that stat(2) and
//! poll(2) tell. The summary is brought up to date whenever the lock is released ([`Locked`]), so
//! stat(2) and poll(2) wait for no change.
//!
//! `io` reads and writes, `sizes` changes size and pages, `quarantine` quarantines and repairs,
//! `map` tells how a file is mapped and collapses folios, `policies` reads the NUMA policies that
//! programs have set, `door` lets programs open the memory by themselves, `descriptors` keeps what
//! the kernel and programs hold of a file, `summary` has the summary and the lock.

mod descriptors;
mod door;
mod io;
mod map;
mod policies;
mod quarantine;
mod sizes;
mod summary;

pub use map::{Extent, Located, State};
pub use quarantine::FRAMES_GIVEN_UP;
pub use sizes::Allocation;
pub use summary::{Locked, Summary};

use super::mtime::Mtime;
use super::native::NativeReaders;
use super::pace::Pace;
use super::pollers::Pollers;
use crate::error::{Error, Result};
use crate::placement::Resolved;
use crate::pool::{Adoption, Change, Holding, PIECE, Pool, Progress, Run};
use crate::sealed::{Notes, Sealed};
use crate::sys::mapping::View;
use crate::sys::tmpfs;
use crate::units::{Folio, InodeId, NumaNode, Range, STAT_BLOCK};
use parking_lot::{Mutex as FairMutex, MutexGuard as FairGuard, RwLock, RwLockReadGuard};
use std::fs::File;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use summary::Published;

/// The contents of a regular file.
pub struct Object {
    node: InodeId,
    data: Arc<File>,
    /// Notes with the file, for the next worker.
    notes: Notes,
    /// The kernel's number of the backing file, once it is known.
    backing: OnceLock<u32>,
    /// Held while a change of size or pages is under way. The change releases `holding` between its
    /// pieces.
    changing: FairMutex<()>,
    holding: RwLock<Holding>,
    summary: Mutex<Published>,
    /// Held alone while a folio is collapsed. Two threads would hold its pages against each other,
    /// and both would fail. A collapse takes the folio out of the daemon's view, too.
    collapsing: RwLock<()>,
    natives: NativeReaders,
    mtime: Mtime,
    view: Mutex<Option<Arc<View>>>,
    /// The log already says that soft holes are open and cannot be shut.
    is_stuck_open: AtomicBool,
    pollers: Pollers,
}

/// The surroundings of an operation on a file's contents.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    /// The pool that pages come from.
    pub pool: &'a Pool,
    /// A write that covers a quarantined subpage repairs it.
    pub recovery_write: bool,
    /// Punched pages stay the file's (`punch=keep`).
    pub keep_punched: bool,
    /// Called before a growth takes pages, with the offset of the first one: the NUMA nodes that
    /// these pages want. A growth is refused if that cannot be read. `None` for a pool of one node.
    pub placement: Option<&'a (dyn Fn(u64) -> Result<Resolved> + Sync)>,
    /// Called for each folio that has become whole again.
    pub repaired: &'a (dyn Fn(Folio) + Sync),
    /// Asked between two pieces of a long change.
    pub pace: &'a Pace,
}

impl Object {
    /// The contents of `node`, which are in `holding`. When the file has lost its last name,
    /// `orphaned` counts its pages.
    pub fn new(node: InodeId, holding: Holding, orphaned: Arc<AtomicU64>) -> Self {
        let (data, notes) = (holding.sealed().data().clone(), holding.sealed().notes().clone());
        let (natives, mtime, view) = (NativeReaders::default(), Mtime::default(), Mutex::default());
        if !holding.sealed().holes().is_empty() {
            natives.exclude();
        }
        let summary = Mutex::new(Published::new(Summary::of(&holding), orphaned));
        let holding = RwLock::new(holding);
        let (collapsing, pollers) = (RwLock::default(), Pollers::default());
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
            mtime,
            view,
            is_stuck_open,
            pollers,
        }
    }

    /// The node that has these contents.
    pub fn node(&self) -> InodeId {
        self.node
    }

    /// The file that programs map.
    pub fn data(&self) -> &File {
        &self.data
    }

    /// The state of the inode's times, for changes of the contents.
    pub fn mtime(&self) -> &Mtime {
        &self.mtime
    }

    /// The state of the file as far as it is known without the lock.
    pub fn summary(&self) -> Summary {
        self.published().summary()
    }

    fn published(&self) -> MutexGuard<'_, Published> {
        self.summary.lock().expect("no panic with a summary")
    }

    /// Size in bytes, and memory in units of 512 bytes.
    pub fn size_and_blocks(&self) -> (u64, u64) {
        let summary = self.summary();
        (summary.size, summary.memory / STAT_BLOCK)
    }

    /// Shares the lock.
    pub fn read_lock(&self) -> RwLockReadGuard<'_, Holding> {
        self.holding.read()
    }

    fn write_lock(&self) -> Locked<'_> {
        Locked { object: self, holding: self.holding.write() }
    }

    fn share(&self, pace: &Pace) -> Result<RwLockReadGuard<'_, Holding>> {
        pace.lock(|| self.holding.read(), || self.holding.try_read())
    }

    /// Shares the lock. A program that used MADV_REMOVE on a file with soft holes has opened them:
    /// if the memory is still free, the holes are shut first. The reader does not depend on that,
    /// because it goes by the records.
    fn shut_share(&self, pace: &Pace) -> Result<RwLockReadGuard<'_, Holding>> {
        let holding = self.share(pace)?;
        if !are_holes_open(&holding)? {
            return Ok(holding);
        }
        drop(holding);
        pace.refuse_if(|| Ok(true))?;
        self.shut(&mut self.write_lock());
        Ok(self.read_lock())
    }

    fn lock(&self, pace: &Pace) -> Result<Locked<'_>> {
        let holding = pace.lock(|| self.holding.write(), || self.holding.try_write())?;
        Ok(Locked { object: self, holding })
    }

    /// The nodes that the pages want of a growth that touches the bytes in `touched`. `None` if the
    /// growth takes no page, as far as is known before the file is locked.
    ///
    /// This holds no lock when it reads them: such a read can last as long as the calling program
    /// likes ([`crate::sys::callers`]).
    fn placement_ahead(&self, touched: Range, context: Context<'_>) -> Result<Option<Resolved>> {
        let Some(read) = context.placement else { return Ok(None) };
        let holding = self.share(context.pace)?;
        if !holding.may_take_pages(touched.end) {
            return Ok(None);
        }
        let (size, start) = (touched.end.max(holding.size()), touched.start.min(holding.size()));
        context.pace.refuse_if(|| takes_long(&holding, touched, size, context.pool))?;
        drop(holding);
        read(start).map(Some)
    }

    /// Excludes other changes of size, pages or the quarantine.
    fn begin(&self, pace: &Pace) -> Result<FairGuard<'_, ()>> {
        let alone = pace.lock(|| self.changing.lock(), || self.changing.try_lock())?;
        if self.summary().has_door { Err(Error::HasDoor) } else { Ok(alone) }
    }

    /// Shuts the soft holes that a program has opened by MADV_REMOVE, also if the program has
    /// touched them since, so that no block is free any more. While a change of the file is under
    /// way, this call does nothing; the next one does it.
    pub fn shut_opened_holes(&self) {
        let Some(holding) = self.holding.try_read() else { return };
        let sealed = holding.sealed();
        let is_open = !sealed.holes().is_empty()
            && (sealed.has_removed().unwrap_or(true) || sealed.has_strays().unwrap_or(true));
        drop(holding);
        if is_open {
            self.shut(&mut self.write_lock());
        }
    }

    /// Takes the memory that the program gave up from the machine again. While the machine has
    /// none, the holes stay open, and the log says so once.
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

    /// Verifies the invariants of the file alone, and names those that do not hold. A change of the
    /// file waits for one piece of this.
    ///
    /// # Errors
    /// The errors of the system calls; [`Error::Interrupted`](crate::error::Error::Interrupted).
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

    /// Bytes that were punched on request and have no memory.
    ///
    /// # Errors
    /// The errors of fstatfs(2).
    pub fn punched_bytes(&self, pace: &Pace) -> Result<u64> {
        if self.summary().punched { self.share(pace)?.sealed().punched_bytes() } else { Ok(0) }
    }

    /// Finishes or undoes the change that was under way in another process
    /// ([`Holding::begin_settling`]).
    ///
    /// # Errors
    /// ENOMEM.
    pub fn settle(&self, pool: &Pool) -> Result<()> {
        let mut holding = self.write_lock();
        let settling = holding.begin_settling(pool);
        holding.complete(settling)
    }

    /// Notes that the file has lost its last name: its pages come back when its last user is gone.
    pub fn note_orphaned(&self) {
        self.published().note_orphaned();
    }

    /// Gives each page of a file that another process has left a home, and counts the file.
    pub fn join(&self, adoption: &mut Adoption) {
        self.find_homes(|pages| adoption.homes_for(pages));
        adoption.add(&self.read_lock().held());
    }

    /// Gives each page that has no home yet one, as `choose` says.
    pub fn find_homes(&self, choose: impl FnOnce(&[Run]) -> Vec<(Run, NumaNode)>) {
        self.write_lock().find_homes(choose);
    }

    /// The holding, without its file.
    pub fn into_holding(self) -> Holding {
        self.holding.into_inner()
    }

    /// Takes a piece of memory behind the end of a file that no program has opened, and calls
    /// `clear` with it. Returns false if all of the memory is there. Only other changes of the file
    /// wait for `clear`.
    ///
    /// # Errors
    /// Those of [`Holding::take_ahead`] and of `clear`.
    pub fn fill_ahead(&self, pool: &Pool, clear: impl FnOnce(Range) -> Result<()>) -> Result<bool> {
        let _one_at_a_time = self.changing.lock();
        let piece = self.write_lock().take_ahead(pool)?;
        match piece {
            Some(piece) => clear(piece)?,
            None => self.write_lock().end_ahead(),
        }
        Ok(piece.is_some())
    }

    /// Clears memory behind the end of a file that no program has opened.
    ///
    /// # Errors
    /// Those of fallocate(2).
    pub fn clear_behind_end(&self, range: Range) -> Result<()> {
        tmpfs::clear(&self.data, range)
    }

    /// Gives the pages back that no program has asked for.
    ///
    /// # Errors
    /// ENOMEM if the machine has no memory for a step. The next change tries again.
    pub fn return_ahead(&self, pool: &Pool) -> Result<()> {
        let _one_at_a_time = self.changing.lock();
        return_ahead_of(&mut self.write_lock(), pool, &Pace::steady())
    }

    /// Gives all pages back to the pool.
    ///
    /// # Errors
    /// ENOMEM if the machine has no memory for a step, [`Error::HasDoor`]; the caller calls again.
    pub fn empty(&self, pool: &Pool) -> Result<()> {
        let _one_at_a_time = self.begin(&Pace::steady())?;
        let mut holding = self.write_lock();
        let shrinking = holding.begin_shrinking(pool, 0)?;
        carry_out(&mut holding, shrinking, &Pace::steady())
    }
}

/// Makes a change piece by piece, and gives way between two of them. If the caller was killed, the
/// change is given up.
fn carry_out(holding: &mut Locked<'_>, mut change: Change<'_>, pace: &Pace) -> Result<()> {
    while change.advance(holding)? == Progress::More {
        if let Err(why) = pace.give_way(holding) {
            change.give_up(why);
        }
    }
    Ok(())
}

/// Gives the pages back that no program has asked for.
fn return_ahead_of(holding: &mut Locked<'_>, pool: &Pool, pace: &Pace) -> Result<()> {
    if holding.pages_ahead() == 0 {
        return Ok(());
    }
    let size = holding.size();
    let returning = holding.begin_shrinking(pool, size)?;
    carry_out(holding, returning, pace)
}

/// The nodes that the pages want of a growth that touches the bytes in `touched`, of a file that is
/// locked. They are read now only if another request has taken pages away since
/// [`Object::placement_ahead`].
fn placement_now(
    ahead: Option<Resolved>,
    holding: &Holding,
    touched: Range,
    context: Context<'_>,
) -> Result<Resolved> {
    match (ahead, context.placement) {
        (Some(ahead), _) => Ok(ahead),
        (None, Some(read)) if holding.may_take_pages(touched.end) => {
            read(touched.start.min(holding.size()))
        }
        (None, _) => Ok(Resolved::default()),
    }
}

/// True if a change of the bytes in `touched`, which leaves the file `end` bytes long, takes longer
/// than a moment: it moves or zeroes much, or has to find, mend or repair something first.
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

/// True if a touch could fill soft holes, because a program has made blocks free by MADV_REMOVE.
fn are_holes_open(holding: &Holding) -> Result<bool> {
    Ok(!holding.sealed().holes().is_empty() && holding.sealed().has_removed()?)
}

/// Restores S1 before an operation that needs it: takes back the memory that a program punched, by
/// madvise(2) or on request. Gives way between its pieces.
fn mend(holding: &mut Locked<'_>, pace: &Pace) -> Result<()> {
    reclaim(holding, false, pace)
}

fn reclaim(holding: &mut Locked<'_>, from_strays: bool, pace: &Pace) -> Result<()> {
    let mut next = holding.begin_reclaiming(from_strays)?;
    while let Some(from) = next {
        pace.give_way(holding)?;
        next = holding.reclaim_piece(from)?;
    }
    Ok(())
}

/// Restores S1 before an operation that needs it for soft holes only. A file with gaps on request
/// has no soft holes.
fn mend_but_gaps(holding: &mut Locked<'_>, pace: &Pace) -> Result<()> {
    if holding.sealed().is_punched() { Ok(()) } else { mend(holding, pace) }
}

/// Cuts `range` into parts of one folio each.
fn parts(range: Range) -> impl Iterator<Item = Range> {
    range.folios().map(move |folio| folio.range().intersect(range))
}

/// Bytes of `range` that are quarantined.
fn lost_bytes(sealed: &Sealed, range: Range) -> u64 {
    sealed.lost_runs_in(range).map(Range::len).sum()
}

#[cfg(test)]
mod tests;
