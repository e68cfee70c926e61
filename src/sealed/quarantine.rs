//! Quarantine and repair of the subpages of a folio, and the strays that come of it.
//!
//! **Take, then give.** Both changes first take `n` blocks for a second copy, then say in the ledger's record which of
//! the two copies is the true one, then free the blocks of the other:
//!
//! ```text
//!   quarantine                                     repair
//!     the limit is raised by n                       the limit is raised by n
//!     the ledger has n blocks with the bytes         the holes have n blocks with the content
//!     the record names the subpages        <- one setxattr(2) ->   the record names them no more
//!     data is punched                                the ledger is punched
//!     the limit is lowered by n: S1                  the limit is lowered by n: S1
//! ```
//!
//! So at every instruction a record says which copy is true, and nothing is told from contents: a program may store
//! into an opened hole at any moment. Whoever opens a file that a process has left empties the holes of the records,
//! frees the ledger's other blocks, and lowers the limit ([`super::recovery`]).
//!
//! **Strays.** While the limit is raised, a program that touches a hole of the file takes a block for it. tmpfs lowers
//! a limit only to what is taken, so a stray is found at the latest when the limit is lowered: the hole is punched
//! again, and the limit is tried again ([`Sealed::seal`]). A program that hammers a hole wins the block now and then,
//! and loses it with the next punch.
//!
//! **Pins.** The kernel cannot split a folio that is pinned. A punch zeroes the subpages then and frees nothing, so
//! that the limit cannot be lowered. The bytes are in the ledger by then; they are put back as a repair does.

use super::holes::between;
use super::record::Checksums;
use super::{Bytes, Content, PINNED, STRAYS_SHUT, Sealed, UNWINNABLE, ledger};
use crate::error::{Error, Result};
use crate::steps::{self, Step, insist};
use crate::sys::mapping::Window;
use crate::sys::{processors, tmpfs};
use crate::units::{FOLIO_SIZE, Folio, Range, SUBPAGE_SIZE, SUBPAGES_PER_FOLIO, Subpage};
use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Bytes that are copied at a time.
const PIECE: u64 = 256 << 10;
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// How often a folio must have withstood being split to be called pinned, and how long its holder is let run in between.
/// A fault that waits for it holds it as a pin does, for as long as its thread gets no processor, so that some tries in a
/// row tell nothing; and with every try more, what was written to the subpage meanwhile is lost to its owner.
const SPLIT_TRIES: u32 = 64;
const SPLIT_NAP: Duration = Duration::from_millis(1);

/// Tries at something that programs can spoil by touching the file.
struct Patience {
    tries: u32,
    started: Instant,
    time: Duration,
}

impl Patience {
    const TRIES: u32 = 1_000;
    const TIME: Duration = Duration::from_millis(100);
    const LONG: Duration = Duration::from_secs(5);

    fn new() -> Self {
        Self { tries: 0, started: Instant::now(), time: Self::TIME }
    }

    /// From now on it ends after `time`.
    fn last(&mut self, time: Duration) {
        self.time = time;
    }

    /// Counts a try. Patience ends after so many, and not before so much time.
    fn is_over(&mut self) -> bool {
        self.tries += 1;
        self.tries > Self::TRIES && self.started.elapsed() > self.time
    }
}

impl Sealed {
    // ---- quarantine ---------------------------------------------------------------------------------------------

    /// Takes the subpages of `part`, which is of one folio, out of the file: from when this returns, touching them is
    /// SIGBUS and nothing fills them. Those that are quarantined already stay as they are.
    ///
    /// # Errors
    /// [`Error::Busy`] where a program has pinned the folio, so that the kernel cannot split it; [`Error::NoMemory`]. The
    /// bytes are as before.
    pub fn quarantine(&mut self, part: Range, time: u64) -> Result<()> {
        let folio = Subpage::containing(part.start).folio();
        assert!(folio.range().covers(part) && self.has_memory(folio), "{part} is not memory of one folio");
        match self.quarantine_readable(part, time) {
            // A memory error that was not noted yet: the kernel keeps that subpage out of use by itself.
            Err(Error::Poisoned) if !self.note_poison_in(folio.range(), time)?.is_empty() => {
                self.quarantine_readable(part, time)
            }
            result => result,
        }
    }

    fn quarantine_readable(&mut self, part: Range, time: u64) -> Result<()> {
        let file = Range::new(0, self.size()).subpages_out();
        let runs = between(part.subpages_out().intersect(file), self.lost_runs_in(part));
        if runs.is_empty() {
            return Ok(());
        }
        let alarm = self.superblock().alarm;
        self.set_limit(subpages(&runs))?;
        steps::done(Step::QuarantineRaised);
        let kept = self.keep(&runs, time);
        let emptied = kept.and_then(|()| self.seal(&runs));
        if let Err(error) = emptied {
            self.undo_quarantine(&runs, alarm)?;
            return Err(error);
        }
        steps::done(Step::QuarantineDone);
        Ok(())
    }

    /// Copies `runs` of a folio to the ledger, and has the record say that the copy is the true one.
    pub(super) fn keep(&mut self, runs: &[Range], time: u64) -> Result<()> {
        let (file, mut checksums) = (self.notes().file()?, Checksums::default());
        for piece in runs.iter().flat_map(|run| run.steps(PIECE)) {
            self.copy_to_ledger(&file, piece, runs, &mut checksums)?;
        }
        steps::done(Step::QuarantineStored);
        self.update(|superblock| superblock.alarm = true)?;
        self.ledger.record(runs, time, &checksums)?;
        steps::done(Step::QuarantineRecorded);
        Ok(())
    }

    fn copy_to_ledger(
        &self,
        file: &File,
        piece: Range,
        runs: &[Range],
        checksums: &mut Checksums,
    ) -> Result<()> {
        let mut bytes = vec![0; piece.len() as usize];
        let inside = piece.intersect(Range::new(0, self.size())).len() as usize;
        if tmpfs::read_at(self.data(), &mut bytes[..inside], piece.start)? < inside {
            return Err(Error::Poisoned); // the one cause for a read to end before the end of file
        }
        checksums.note(piece.start, &bytes);
        let folio = Subpage::containing(piece.start).folio();
        write_among_strays(file, &bytes, ledger::place(piece).start, || {
            self.ledger.trim(folio, runs)?;
            self.shut_strays().map(drop)
        })
    }

    /// Undoes what a quarantine that did not succeed has changed. It may have got no further than to raise the limit, or as far
    /// as to lower it again.
    fn undo_quarantine(&mut self, runs: &[Range], alarm: bool) -> Result<()> {
        let folio = Subpage::containing(runs[0].start).folio();
        if self.holes().contains(Subpage::containing(runs[0].start)) {
            insist(|| self.set_limit(subpages(runs)))?;
            self.put_back(runs)?;
        }
        insist(|| self.update(|superblock| superblock.alarm = alarm))?;
        insist(|| self.ledger.trim(folio, &[]))?;
        insist(|| self.seal(&[]))
    }

    /// Gives `runs` their bytes back from the ledger, and strikes them out of the record.
    ///
    /// # Errors
    /// What the kernel answers; the ledger's copy is the true one as before.
    pub(super) fn put_back(&mut self, runs: &[Range]) -> Result<()> {
        insist(|| self.fill_and_strike(runs, Content::Known))
            .inspect_err(|error| log::error!("{} could not be written back: {error}", runs[0]))
    }

    // ---- repair -------------------------------------------------------------------------------------------------

    /// Puts what is quarantined of `part`, which is of one folio, back, holding `content`; other soft holes stay shut.
    ///
    /// # Errors
    /// What the kernel answers; what is soft is quarantined as before.
    pub fn repair(&mut self, part: Range, content: Content<'_>) -> Result<()> {
        assert_eq!(part.folios().count(), 1, "{part} is not of one folio");
        let runs: Vec<Range> = self.holes().in_range(part).map(|hole| hole.range).collect();
        if !runs.is_empty() {
            self.repair_runs(&runs, content)?;
        }
        let errors: Vec<Subpage> =
            self.poisoned().range(part.subpages()).map(|(subpage, _)| *subpage).collect();
        errors.into_iter().try_for_each(|subpage| self.replace_poisoned(subpage, content))
    }

    fn repair_runs(&mut self, runs: &[Range], content: Content<'_>) -> Result<()> {
        self.set_limit(subpages(runs))?;
        steps::done(Step::RepairRaised);
        if let Err(error) = self.fill_and_strike(runs, content) {
            insist(|| self.seal(runs))?;
            return Err(error);
        }
        // They are repaired. Where the rest fails, the next request that needs S1 finishes it ([`Sealed::reclaim_removed`]).
        let freed = runs.iter().try_for_each(|run| insist(|| self.ledger.free(*run)));
        steps::done(Step::RepairFreed);
        if let Err(error) = freed.and_then(|()| insist(|| self.seal(&[]))) {
            log::warn!("{} is repaired, and blocks are still free: {error}", runs[0]);
        }
        steps::done(Step::RepairDone);
        Ok(())
    }

    /// Fills the holes `runs`, for which there are blocks, and has the record say that the file's copy is the true one.
    fn fill_and_strike(&mut self, runs: &[Range], content: Content<'_>) -> Result<()> {
        self.void_policy(runs[0]);
        runs.iter().try_for_each(|run| self.fill_run(*run, runs, content))?;
        steps::done(Step::RepairFilled);
        self.ledger.strike(runs)?;
        steps::done(Step::RepairStruck);
        Ok(())
    }

    /// Writes the content of `run`, one of `runs`. A write of a whole subpage fills a hole in one step: no program can map
    /// the subpage before the bytes are in it. Behind the end of file nothing is written, as that would move the end.
    fn fill_run(&self, run: Range, runs: &[Range], content: Content<'_>) -> Result<()> {
        let inside = run.intersect(Range::new(0, self.size()));
        let write = |bytes: &[u8], offset| {
            write_among_strays(self.data(), bytes, offset, || self.shut_strays_but(runs).map(drop))
        };
        match content {
            Content::Zero => inside
                .steps(ZEROS.len() as u64)
                .try_for_each(|piece| write(&ZEROS[..piece.len() as usize], piece.start)),
            Content::Bytes { .. } => write(content.of(inside), inside.start),
            Content::Known => {
                let folio = Subpage::containing(run.start).folio();
                let (file, checksums) = (self.notes().file()?, self.ledger.checksums(folio)?);
                inside.steps(PIECE).try_for_each(|piece| {
                    let mut bytes = vec![0; piece.subpages_out().len() as usize];
                    ledger::Ledger::read(&file, piece.subpages_out(), &checksums, &mut bytes)?;
                    write(&bytes[..piece.len() as usize], piece.start)
                })
            }
        }
    }

    /// Lets the kernel's poisoned page go, which never comes back, and puts a healthy one in its place. From the punch on a touch
    /// of the subpage would find zeros, so a shortage does not end this.
    fn replace_poisoned(&mut self, subpage: Subpage, content: Content<'_>) -> Result<()> {
        let inside = subpage.range().intersect(Range::new(0, self.size()));
        let mut patience = Patience::new();
        self.void_policy(subpage.range());
        loop {
            tmpfs::punch(self.data(), subpage.range())?;
            match insist(|| tmpfs::write_all_at(self.data(), content.of(inside), inside.start)) {
                Ok(()) => break,
                Err(Error::Full | Error::Poisoned) if !patience.is_over() => {} // a stray has the block, or the page is still there
                Err(Error::Full | Error::Poisoned) => return Err(Error::Busy(UNWINNABLE)),
                Err(error) => return Err(error),
            }
            insist(|| self.shut_strays())?;
        }
        insist(|| self.ledger.forget_poisoned(subpage))?;
        insist(|| self.shut_strays()).map(drop)
    }

    /// What is kept of a quarantined subpage.
    ///
    /// # Errors
    /// [`Error::NoData`] where nothing is known; a shortage, where that cannot be told.
    pub fn rescued(&self, subpage: Subpage) -> Result<Bytes> {
        if !self.holes().contains(subpage) {
            return Err(Error::NoData);
        }
        let (file, checksums) = (self.notes().file()?, self.ledger.checksums(subpage.folio())?);
        let mut bytes = [0; SUBPAGE_SIZE as usize];
        match ledger::Ledger::read(&file, subpage.range(), &checksums, &mut bytes)? {
            0 => Ok(bytes),
            _ => Err(Error::NoData),
        }
    }

    // ---- S1 -----------------------------------------------------------------------------------------------------

    /// Empties the holes `fresh` of one folio, which have memory yet, and lowers the limit to what is meant to be taken; other
    /// holes that were filled meanwhile are shut.
    ///
    /// # Errors
    /// [`Error::Busy`] where the folio is pinned, or a hole is touched faster than it can be punched.
    pub(super) fn seal(&self, fresh: &[Range]) -> Result<()> {
        self.punch_fresh(fresh)?;
        match self.set_limit(0) {
            Ok(()) if self.are_empty(fresh)? => return Ok(()),
            Ok(()) | Err(Error::Busy(_)) => {}
            Err(error) => return Err(error),
        }
        let mount = self.mount()?;
        let lower = || drop(tmpfs::set_limit(&mount, self.limit()));
        meanwhile(lower, || self.seal_among_strays(fresh))
    }

    fn seal_among_strays(&self, fresh: &[Range]) -> Result<()> {
        let (mut patience, mut whole) = (Patience::new(), 0);
        loop {
            self.punch_fresh(fresh)?;
            match self.set_limit(0) {
                Ok(()) if self.are_empty(fresh)? => return Ok(()),
                Ok(()) | Err(Error::Busy(_)) => {}
                Err(error) => return Err(error),
            }
            if patience.is_over() {
                return Err(Error::Busy(UNWINNABLE));
            }
            if self.is_in_one_piece(fresh)? {
                whole += 1;
                if whole == SPLIT_TRIES {
                    return Err(Error::Busy(PINNED));
                }
                std::thread::sleep(SPLIT_NAP);
            }
            // Each punch is one more chance for the other thread. As long as there are strays, no pin is to blame.
            while self.shut_strays_but(fresh)? > 0 && !patience.is_over() {
                patience.last(Patience::LONG);
            }
        }
    }

    fn punch_fresh(&self, fresh: &[Range]) -> Result<()> {
        fresh.iter().try_for_each(|run| tmpfs::punch(self.data(), *run))?;
        if !fresh.is_empty() {
            steps::done(Step::QuarantinePunched);
        }
        Ok(())
    }

    fn are_empty(&self, runs: &[Range]) -> Result<bool> {
        for run in runs {
            if insist(|| tmpfs::resident(self.data(), *run))? > 0 {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Whether the folio of `fresh`, which were punched, is still in one piece. Touches neither these nor any other
    /// hole: with a block free, that would fill it.
    fn is_in_one_piece(&self, fresh: &[Range]) -> Result<bool> {
        let Some(first) = fresh.first() else { return Ok(false) };
        let folio = Subpage::containing(first.start).folio().range();
        let inside = folio.intersect(Range::new(0, self.size()).subpages_out());
        let sound = between(inside, self.lost_runs_in(inside)).first().copied();
        let holes: Vec<Range> = self.holes().in_range(folio).map(|hole| hole.range).collect();
        let Some(sound) = sound.filter(|_| subpages(&holes) == subpages(fresh)) else {
            return Ok(false); // it was split before, or there is nothing to tell by
        };
        let window = Window::new(self.data(), folio)?;
        match window.populate(Range::at(sound.start, SUBPAGE_SIZE)) {
            Err(Error::NoData | Error::Poisoned) => Ok(false),
            Err(error) => Err(error),
            Ok(()) => Ok(!window.huge_ranges()?.is_empty()),
        }
    }

    /// Finds strays and punches them. Returns how many subpages that were.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn shut_strays(&self) -> Result<u64> {
        self.shut_strays_but(&[])
    }

    /// Whether there are any. Costs one cachestat(2) for each run of holes.
    ///
    /// # Errors
    /// What cachestat(2) answers.
    pub fn has_strays(&self) -> Result<bool> {
        Ok(!self.filled_holes(&[])?.is_empty())
    }

    /// The same, but for the holes `runs` of one folio, which the caller fills or empties.
    fn shut_strays_but(&self, runs: &[Range]) -> Result<u64> {
        let mut shut = self.punch_where_no_memory_is_meant()?;
        for hole in self.filled_holes(runs)? {
            shut += tmpfs::resident(self.data(), hole)?;
            tmpfs::punch(self.data(), hole)?;
            log::warn!("a quarantined subpage of {hole} was filled in passing; it is shut again");
        }
        STRAYS_SHUT.fetch_add(shut, Ordering::Relaxed);
        Ok(shut)
    }

    /// The runs of holes that have memory somewhere, but for `runs` of one folio.
    pub(super) fn filled_holes(&self, runs: &[Range]) -> Result<Vec<Range>> {
        let mut filled = Vec::new();
        for hole in self.holes().all() {
            let inside = runs.iter().map(|run| run.intersect(hole.range)).filter(|run| !run.is_empty());
            for part in between(hole.range, inside) {
                if tmpfs::resident(self.data(), part)? > 0 {
                    filled.push(part);
                }
            }
        }
        Ok(filled)
    }

    fn punch_where_no_memory_is_meant(&self) -> Result<u64> {
        let end = self.size().div_ceil(FOLIO_SIZE).max(self.folios.len() as u64);
        let mut punched = 0;
        for folio in (0..end).map(Folio).filter(|folio| !self.has_memory(*folio)) {
            if tmpfs::resident(self.data(), folio.range())? > 0 {
                tmpfs::punch(self.data(), folio.range())?;
                punched += 1;
            }
        }
        Ok(punched)
    }
}

/// Writes all of `bytes`, for which there are blocks. A hole that a program has touched may have one of them, and so may
/// the neighbourhood, as tmpfs fills more than it is asked to where that makes a large folio. Then `free` makes the
/// blocks free again, and the write goes on where it ended.
fn write_among_strays(file: &File, bytes: &[u8], offset: u64, free: impl Fn() -> Result<()>) -> Result<()> {
    let mut patience = Patience::new();
    let mut done = 0;
    loop {
        let (written, ended) = tmpfs::write_prefix(file, &bytes[done..], offset + done as u64);
        done += written;
        match ended {
            Err(Error::Full) if !patience.is_over() => free()?,
            Err(Error::Full) => return Err(Error::Busy(UNWINNABLE)),
            result => return result,
        }
    }
}

/// Runs `work`, which frees blocks, and `take`, which takes them, over and over in another thread. A program that hammers a
/// hole takes a block back within microseconds, sooner than a second call of one thread can come; both threads need a processor for
/// that. `work` says what fails. Where the kernel refuses a thread, `work` goes without; it fails more often then, beside a hammer.
pub(super) fn meanwhile<T>(take: impl Fn() + Sync, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let stop = AtomicBool::new(false);
    let _wherever_there_is_time = processors::All::use_them();
    std::thread::scope(|scope| {
        let spin = || {
            while !stop.load(Ordering::Relaxed) {
                take();
            }
        };
        if let Err(error) = std::thread::Builder::new().spawn_scoped(scope, spin) {
            log::warn!("no second thread beside a change of a file that a program touches: {error}");
        }
        let done = work();
        stop.store(true, Ordering::Relaxed);
        done
    })
}

/// How many subpages `runs` have.
fn subpages(runs: &[Range]) -> u64 {
    runs.iter().map(|run| run.len() / SUBPAGE_SIZE).sum()
}

const _: () = assert!(PIECE.is_multiple_of(SUBPAGE_SIZE) && SUBPAGES_PER_FOLIO * SUBPAGE_SIZE == FOLIO_SIZE);
