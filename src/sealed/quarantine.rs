//! Quarantine and repair of the subpages of one folio, and the strays that come of both.
//!
//! **Take, then give.** A quarantine or repair of `n` subpages first takes `n` blocks for a second
//! copy. Then it changes the ledger's record, which says which copy is the true one. Then it frees
//! the blocks of the other copy.
//!
//! ```text
//!   quarantine                              true    repair                                  true
//!                                           copy                                            copy
//!   1. raise the limit by n                 data    1. raise the limit by n                 ledger
//!   2. copy the bytes to n ledger blocks    data    2. write the content into the n holes   ledger
//!   3. add the subpages to the record       ledger  3. strike them out of the record        data
//!   4. punch data                           ledger  4. punch the ledger                     data
//!   5. lower the limit by n: S1 holds       ledger  5. lower the limit by n: S1 holds       data
//! ```
//!
//! Step 3 is one setxattr(2), or one removexattr(2) if the record becomes empty. So the record is
//! true at every instruction, and no code guesses from the bytes: a program may store into an
//! opened hole at any moment. If the worker dies after any step, the next worker empties the holes
//! that are in records, frees the ledger's other blocks, and lowers the limit
//! ([`super::recovery`]). So a quarantine or repair that died before step 3 is undone. One that
//! died after step 3 is finished. If a pin holds the memory of a recorded hole, the next worker
//! undoes the quarantine instead.
//!
//! **Strays.** While the limit is raised, a program that touches a hole takes a block for it: the
//! hole becomes a stray. tmpfs refuses a limit below the number of blocks that are taken. So the
//! daemon finds a stray at the latest when it lowers the limit. Then it punches the hole again, and
//! lowers the limit again ([`Sealed::seal`]). A program that hammers a hole wins the block now and
//! then, and loses it with the next punch.
//!
//! **Pins.** The kernel cannot split a pinned folio. A punch there zeroes the subpages and frees no
//! block, so the limit cannot be lowered. At that time the ledger has the bytes, and the daemon
//! puts them back as a repair does.

use super::holes::{between, subpages};
use super::record::Checksums;
use super::{Bytes, Content, STRAYS_SHUT, Sealed, UNWINNABLE, ledger};
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

/// Split attempts before the folio is reported as pinned, and the pause after each. A fault that
/// waits for the folio holds a reference, too, so one failure proves nothing. More attempts have a
/// price: from the first one on the subpage has zeros, and the bytes that a program stores there
/// are lost if the quarantine is undone.
const SPLIT_TRIES: u32 = 3;
const SPLIT_NAP: Duration = Duration::from_millis(1);

/// Counts the tries at a change that programs can spoil by touching the file.
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

    /// Sets the time after which patience ends.
    fn last(&mut self, time: Duration) {
        self.time = time;
    }

    /// Counts a try. True after [`Patience::TRIES`] tries, but not before the time is over.
    fn is_over(&mut self) -> bool {
        self.tries += 1;
        self.tries > Self::TRIES && self.started.elapsed() > self.time
    }
}

impl Sealed {
    // ---- quarantine -----------------------------------------------------------------------------

    /// Takes the subpages of `part`, which is of one folio, out of the file. When this function
    /// returns, a touch of them is SIGBUS and nothing fills them. Subpages that are quarantined
    /// already stay as they are.
    ///
    /// # Errors
    /// [`Error::Pinned`] if the folio is in use by more than the page cache, so that the kernel
    /// cannot split it: the caller can try again. [`Error::Busy`] if a program touches a hole
    /// faster than the daemon can punch it. [`Error::NoMemory`]. The bytes are as before.
    pub fn quarantine(&mut self, part: Range, time: u64) -> Result<()> {
        let folio = Subpage::containing(part.start).folio();
        assert!(
            folio.range().covers(part) && self.has_memory(folio),
            "{part} is not memory of one folio"
        );
        assert!(!self.punched, "a gap would open the hole");
        let before = self.lost_count();
        let result = self.quarantine_around_errors(part, folio, time);
        self.assert_sound();
        let meant = part.intersect(Range::new(0, self.size())).subpages_out();
        let is_lost = |bytes: Range| self.is_lost(Subpage::containing(bytes.start));
        debug_assert!(result.is_err() || meant.steps(SUBPAGE_SIZE).all(is_lost), "{part}");
        debug_assert!(self.lost_count() >= before, "a quarantine repairs nothing");
        result
    }

    fn quarantine_around_errors(&mut self, part: Range, folio: Folio, time: u64) -> Result<()> {
        match self.quarantine_readable(part, time) {
            // The memory error was not noted before. The kernel keeps that subpage out of use by
            // itself.
            Err(Error::Quarantined) if !self.note_hw_errors_in(folio.range(), time)?.is_empty() => {
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
        let alarm = self.header().alarm;
        self.set_limit(subpages(&runs))?;
        steps::reached(Step::QuarantineRaised);
        let kept = self.keep(&runs, time);
        let emptied = kept.and_then(|()| self.seal(&runs));
        if let Err(error) = emptied {
            self.undo_quarantine(&runs, alarm)?;
            return Err(error);
        }
        steps::reached(Step::QuarantineDone);
        self.assert_limit(0);
        Ok(())
    }

    /// Copies `runs` of one folio to the ledger, and then adds them to the record: the copy is now
    /// the true one.
    pub(super) fn keep(&mut self, runs: &[Range], time: u64) -> Result<()> {
        assert!(runs.iter().all(|run| self.lost_runs_in(*run).next().is_none()), "they have bytes");
        let (file, mut checksums) = (self.notes().file()?, Checksums::default());
        for piece in runs.iter().flat_map(|run| run.steps(PIECE)) {
            self.copy_to_ledger(&file, piece, runs, &mut checksums)?;
        }
        steps::reached(Step::QuarantineStored);
        self.update(|header| header.alarm = true)?;
        self.ledger.record(runs, time, &checksums)?;
        steps::reached(Step::QuarantineRecorded);
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
            return Err(Error::Quarantined); // the only reason for a read to end early
        }
        checksums.note(piece.start, &bytes);
        let folio = Subpage::containing(piece.start).folio();
        write_among_strays(file, &bytes, ledger::place(piece).start, || {
            self.ledger.trim(folio, runs)?;
            self.shut_strays().map(drop)
        })
    }

    /// Undoes the changes of a quarantine that failed. It may have raised the limit and no more, or
    /// it may have lowered the limit again already.
    fn undo_quarantine(&mut self, runs: &[Range], alarm: bool) -> Result<()> {
        let folio = Subpage::containing(runs[0].start).folio();
        if self.holes().contains(Subpage::containing(runs[0].start)) {
            insist(|| self.set_limit(subpages(runs)))?;
            self.put_back(runs)?;
        }
        insist(|| self.update(|header| header.alarm = alarm))?;
        insist(|| self.ledger.trim(folio, &[]))?;
        insist(|| self.seal(&[]))
    }

    /// Writes the bytes of `runs` from the ledger back into the file, and strikes `runs` out of the
    /// record.
    ///
    /// # Errors
    /// The errors of the system calls. The ledger's copy is the true one, as before.
    pub(super) fn put_back(&mut self, runs: &[Range]) -> Result<()> {
        let is_hole = |run: &Range| self.holes().in_range(*run).map(|hole| hole.range).eq([*run]);
        debug_assert!(runs.iter().all(is_hole), "the ledger has the bytes of {runs:?}");
        insist(|| self.fill_and_strike(runs, Content::Known))
            .inspect_err(|error| log::error!("{} could not be written back: {error}", runs[0]))
    }

    // ---- repair ---------------------------------------------------------------------------------

    /// Puts healthy subpages with `content` in place of the quarantined subpages of `part`, which
    /// is of one folio. Other soft holes stay shut.
    ///
    /// # Errors
    /// The errors of the system calls. The soft holes are as before.
    pub fn repair(&mut self, part: Range, content: Content<'_>) -> Result<()> {
        assert_eq!(part.folios().count(), 1, "{part} is not of one folio");
        let others = self.lost_count() - self.lost_in(part).count() as u64;
        let runs: Vec<Range> = self.holes().in_range(part).map(|hole| hole.range).collect();
        if !runs.is_empty() {
            self.repair_runs(&runs, content)?;
        }
        let errors: Vec<Subpage> =
            self.hw_errors().range(part.subpages()).map(|(subpage, _)| *subpage).collect();
        errors.into_iter().try_for_each(|subpage| self.replace_bad(subpage, content))?;
        self.assert_sound();
        debug_assert!(self.lost_runs_in(part).next().is_none(), "{part} is repaired");
        debug_assert_eq!(self.lost_count(), others, "other subpages stay quarantined");
        Ok(())
    }

    fn repair_runs(&mut self, runs: &[Range], content: Content<'_>) -> Result<()> {
        self.set_limit(subpages(runs))?;
        steps::reached(Step::RepairRaised);
        if let Err(error) = self.fill_and_strike(runs, content) {
            insist(|| self.seal(runs))?;
            return Err(error);
        }
        // The subpages are repaired. If the rest fails, the next request that needs S1 finishes it
        // ([`Sealed::reclaim_removed`]).
        let freed = runs.iter().try_for_each(|run| insist(|| self.ledger.free(*run)));
        steps::reached(Step::RepairFreed);
        if let Err(error) = freed.and_then(|()| insist(|| self.seal(&[]))) {
            log::warn!("{} is repaired, and blocks are still free: {error}", runs[0]);
        }
        steps::reached(Step::RepairDone);
        Ok(())
    }

    /// Fills the holes `runs`, for which there are blocks, and strikes them out of the record: the
    /// file's copy is now the true one.
    fn fill_and_strike(&mut self, runs: &[Range], content: Content<'_>) -> Result<()> {
        let _aside = self.set_policies_aside(runs[0]);
        runs.iter().try_for_each(|run| self.fill_run(*run, runs, content))?;
        steps::reached(Step::RepairFilled);
        self.ledger.strike(runs)?;
        steps::reached(Step::RepairStruck);
        Ok(())
    }

    /// Writes the content of `run`, one of `runs`. A write of a whole subpage fills a hole in one
    /// step: no program can map the subpage before the bytes are in it. The function writes nothing
    /// behind the end of file, as such a write would move the end.
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

    /// Drops the page with the memory error, which no program can ever use again, and puts a
    /// healthy page in its place. After the punch, a touch of the subpage would find zeros. So a
    /// shortage does not end this function.
    fn replace_bad(&mut self, subpage: Subpage, content: Content<'_>) -> Result<()> {
        let inside = subpage.range().intersect(Range::new(0, self.size()));
        let mut patience = Patience::new();
        let _aside = self.set_policies_aside(subpage.range());
        loop {
            tmpfs::punch(self.data(), subpage.range())?;
            match insist(|| tmpfs::write_all_at(self.data(), content.of(inside), inside.start)) {
                Ok(()) => break,
                // A stray has taken the block, or the bad page is still there.
                Err(Error::Full | Error::Quarantined) if !patience.is_over() => {}
                Err(Error::Full | Error::Quarantined) => return Err(Error::Busy(UNWINNABLE)),
                Err(error) => return Err(error),
            }
            insist(|| self.shut_strays())?;
        }
        insist(|| self.ledger.forget_hw_errors(subpage))?;
        insist(|| self.shut_strays()).map(drop)
    }

    /// The bytes of the soft holes in `part`, which is of one folio, count as lost from now on.
    ///
    /// # Errors
    /// The errors of setxattr(2).
    pub fn forget_bytes(&mut self, part: Range) -> Result<()> {
        self.ledger.forget_bytes(part)
    }

    /// The bytes that the ledger keeps of a quarantined subpage.
    ///
    /// # Errors
    /// [`Error::NoData`] if no bytes are known. A shortage: then it is not known if the ledger has
    /// them.
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

    // ---- S1 -------------------------------------------------------------------------------------

    /// Empties the holes `fresh` of one folio, which still have memory, and lowers the limit to the
    /// blocks that are meant to be taken. Shuts other holes that were filled meanwhile.
    ///
    /// # Errors
    /// [`Error::Pinned`], and [`Error::Busy`] if a program touches a hole faster than the daemon
    /// can punch it.
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
                    return Err(Error::Pinned);
                }
                std::thread::sleep(SPLIT_NAP);
            }
            // Each punch is one more chance for the other thread to lower the limit. As long as
            // there are strays,
            // no pin is to blame.
            while self.shut_strays_but(fresh)? > 0 && !patience.is_over() {
                patience.last(Patience::LONG);
            }
        }
    }

    fn punch_fresh(&self, fresh: &[Range]) -> Result<()> {
        fresh.iter().try_for_each(|run| tmpfs::punch(self.data(), *run))?;
        if !fresh.is_empty() {
            steps::reached(Step::QuarantinePunched);
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

    /// True if the folio of `fresh` is still in one piece, although `fresh` was punched. The
    /// function touches no hole: while a block is free, a touch would fill the hole.
    fn is_in_one_piece(&self, fresh: &[Range]) -> Result<bool> {
        let Some(first) = fresh.first() else { return Ok(false) };
        let folio = Subpage::containing(first.start).folio().range();
        let inside = folio.intersect(Range::new(0, self.size()).subpages_out());
        let sound = between(inside, self.lost_runs_in(inside)).first().copied();
        let holes: Vec<Range> = self.holes().in_range(folio).map(|hole| hole.range).collect();
        let Some(sound) = sound.filter(|_| subpages(&holes) == subpages(fresh)) else {
            return Ok(false); // an earlier hole split it, or no subpage is left to look at
        };
        let window = Window::new(self.data(), folio)?;
        match window.populate(Range::at(sound.start, SUBPAGE_SIZE)) {
            Err(Error::NoData | Error::Quarantined) => Ok(false),
            Err(error) => Err(error),
            Ok(()) => Ok(!window.huge_ranges()?.is_empty()),
        }
    }

    /// Finds strays and punches them. Returns the number of their subpages.
    ///
    /// # Errors
    /// The errors of the system calls.
    pub fn shut_strays(&self) -> Result<u64> {
        self.shut_strays_but(&[])
    }

    /// True if there are strays. Costs one cachestat(2) for each run of holes.
    ///
    /// # Errors
    /// The errors of cachestat(2).
    pub fn has_strays(&self) -> Result<bool> {
        Ok(!self.filled_holes(&[])?.is_empty())
    }

    /// Finds strays and punches them, except in the holes `runs` of one folio, which the caller
    /// fills or empties.
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

    /// The runs of holes that have memory in some subpage, except in `runs` of one folio.
    pub(super) fn filled_holes(&self, runs: &[Range]) -> Result<Vec<Range>> {
        let mut filled = Vec::new();
        for hole in self.holes().all() {
            let inside =
                runs.iter().map(|run| run.intersect(hole.range)).filter(|run| !run.is_empty());
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

/// Writes all of `bytes`. There are blocks for them, but a hole that a program has touched may have
/// taken one. So may subpages next to the range, as tmpfs fills more than the range if this makes a
/// large folio. Then `free` frees these blocks, and the write continues where it ended.
fn write_among_strays(
    file: &File,
    bytes: &[u8],
    offset: u64,
    free: impl Fn() -> Result<()>,
) -> Result<()> {
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

/// Runs `work`, which frees blocks, while another thread runs `take` again and again, which takes
/// them. A program that hammers a hole takes a freed block within microseconds, which is before one
/// thread gets to its next call. Both threads need a processor for this. The result is that of
/// `work`. If the kernel refuses the thread, `work` runs alone, and fails more often while a
/// program hammers a hole.
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
            log::warn!(
                "no second thread beside a change of a file that a program touches: {error}"
            );
        }
        let done = work();
        stop.store(true, Ordering::Relaxed);
        done
    })
}

const _: () =
    assert!(PIECE.is_multiple_of(SUBPAGE_SIZE) && SUBPAGES_PER_FOLIO * SUBPAGE_SIZE == FOLIO_SIZE);
