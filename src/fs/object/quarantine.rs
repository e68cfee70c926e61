//! Quarantine and repair, on request and after memory errors.

use super::{
    Context, Locked, Object, Pace, are_holes_open, lost_bytes, mend, mend_but_gaps, parts,
};
use crate::error::{Error, Result};
use crate::pool::{Holding, Pool};
use crate::quarantine::{self, Kind, Loss, Quarantined, Repair};
use crate::sealed::{Content, Sealed};
use crate::sys;
use crate::units::{Range, SUBPAGE_SIZE, Subpage};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Good frames that were given up for losses of other machines.
pub static FRAMES_GIVEN_UP: AtomicU64 = AtomicU64::new(0);

/// Bytes that are looked through for memory errors in one piece. That takes some milliseconds if
/// all of them are in small pages.
const LOOKED_AT_ONCE: u64 = 128 << 20;

/// The time for which a folio that cannot be split is tried again, and the pause between two tries.
/// A thread that faults on the folio, or for which the kernel copies from it, refers to it until
/// the thread has got a processor. On a busy machine that can take a tenth of a second.
const PIN_PATIENCE: Duration = Duration::from_millis(500);
const PIN_NAP: Duration = Duration::from_millis(50);

/// Gaps forbid a soft quarantine, for two reasons. A free block would open the hole. And the gaps
/// must not be filled before, because a program that waits for its touch to fill them must not find
/// zeros.
const GAPS_FORBID: Error =
    Error::Busy("the file has punched memory that waits for a touch; fallocate(2) it first");

impl Object {
    /// The quarantined ranges, as the text of the poison attribute. If the text fits into `room`,
    /// the reader gets it, and the alarm ends.
    ///
    /// # Errors
    /// The errors of pwrite(2).
    pub fn report(&self, room: Option<usize>, pace: &Pace) -> Result<String> {
        let mut holding = self.lock(pace)?;
        pace.refuse_if(|| are_holes_open(&holding))?;
        if are_holes_open(&holding)? {
            self.shut(&mut holding);
        }
        let text = quarantine::format(&quarantined(holding.sealed()));
        if room.is_some_and(|room| text.len() <= room) {
            holding.end_alarm()?;
        }
        Ok(text)
    }

    /// Looks for memory errors that the kernel has met in the file, and returns the number of new
    /// ones. Gives way between its pieces.
    ///
    /// # Errors
    /// The errors of mmap(2) and setxattr(2); [`Error::Interrupted`]. Errors that were found by
    /// then are noted.
    pub fn look_for_hw_errors(&self, pace: &Pace) -> Result<usize> {
        let (mut found, time) = (Vec::new(), sys::unix_time());
        let looked = self.note_hw_errors(&mut found, time, pace);
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

    /// Adds new memory errors to `found`, piece by piece.
    fn note_hw_errors(&self, found: &mut Vec<Subpage>, time: u64, pace: &Pace) -> Result<()> {
        let mut holding = self.write_lock();
        let file = Range::new(0, holding.sealed().size()).subpages_out();
        file.steps(LOOKED_AT_ONCE).try_for_each(|piece| {
            found.extend(holding.note_hw_errors_in(piece, time)?);
            pace.give_way(&mut holding)
        })
    }

    /// Makes the kernel treat a subpage as if the hardware had reported an error in it. `value` is
    /// one of the inject attribute.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a value that does not parse or a place without memory;
    /// [`Error::Unsupported`] if the kernel has no CONFIG_MEMORY_FAILURE.
    pub fn inject(&self, value: &[u8]) -> Result<()> {
        let holding = self.read_lock();
        holding.sealed().inject(injectable(&holding, value)?)
    }

    /// True if [`Object::inject`] would find a place.
    pub fn is_injectable(&self, value: &[u8]) -> bool {
        injectable(&self.read_lock(), value).is_ok()
    }

    /// Quarantines the subpages of the ranges that a value of the poison attribute names. Subpages
    /// that are quarantined already stay as they are.
    ///
    /// # Errors
    /// With nothing done: [`Error::Invalid`] for a value that does not parse or a range without
    /// memory, [`Error::OpenNatively`] if the kernel reads by a descriptor itself, [`Error::Busy`]
    /// if the file has gaps that touches may fill. [`Error::Busy`] also for a pinned folio; the
    /// ranges before it in the value are quarantined then.
    pub fn quarantine(&self, value: &[u8], pool: &Pool, pace: &Pace) -> Result<()> {
        let ranges = |holding: &Holding| quarantine::parse_poison(value, holding.size());
        self.quarantine_ranges(ranges, pool, pace)
    }

    /// Quarantines the ranges of a list of losses: those of kind hw by a real memory error in each
    /// subpage, which costs its frame. Where the kernel has no memory errors, they become soft
    /// holes of which no byte is known, as those of kind lost do everywhere. Subpages that have a
    /// memory error already stay as they are.
    ///
    /// # Errors
    /// Those of [`Object::quarantine`]. With nothing done: [`Error::Invalid`] for a subpage of kind
    /// hw that is punched, or is a soft hole although the kernel has memory errors.
    /// [`Error::Interrupted`]; the subpages before that one are quarantined then.
    pub fn import(&self, value: &[u8], pool: &Pool, pace: &Pace) -> Result<()> {
        let losses = quarantine::parse_losses(value, self.read_lock().size())?;
        let has_errors = sys::memory_failures().is_some();
        let of_kind = |kind: Loss| -> Vec<Range> {
            let kind_here = |loss: Loss| match loss {
                Loss::Error if !has_errors => Loss::WithoutBytes,
                other => other,
            };
            losses.iter().filter(|loss| kind_here(loss.1) == kind).map(|loss| loss.0).collect()
        };
        let (hw, soft) = (of_kind(Loss::Error), of_kind(Loss::Soft));
        let without_bytes = of_kind(Loss::WithoutBytes);
        let holding = self.read_lock();
        subpages(&hw).try_for_each(|at| strikable(&holding, at).map(drop))?;
        drop(holding);
        if !soft.is_empty() {
            self.quarantine_ranges(|_| Ok(soft.clone()), pool, pace)?;
        }
        if !without_bytes.is_empty() {
            self.quarantine_without_bytes(&without_bytes, pool, pace)?;
        }
        if hw.is_empty() { Ok(()) } else { self.strike(&hw, pace) }
    }

    /// Makes a real memory error in each subpage of `ranges` that has none.
    fn strike(&self, ranges: &[Range], pace: &Pace) -> Result<()> {
        for place in subpages(ranges) {
            let holding = self.read_lock();
            if let Some(subpage) = strikable(&holding, place)? {
                match holding.sealed().inject(subpage) {
                    Ok(()) => drop(FRAMES_GIVEN_UP.fetch_add(1, Ordering::Relaxed)),
                    Err(Error::Quarantined) => {} // by an error that the kernel met just now
                    Err(error) => return Err(error),
                }
            }
            drop(holding);
            pace.go_on()?;
        }
        self.look_for_hw_errors(pace)?;
        let holding = self.read_lock();
        let is_lost = |range: &Range| lost_bytes(holding.sealed(), *range) == range.len();
        match ranges.iter().all(is_lost) {
            true => Ok(()),
            false => Err(Error::Busy("the file was changed meanwhile; try again")),
        }
    }

    /// Makes `ranges` soft holes whose bytes count as lost.
    fn quarantine_without_bytes(&self, ranges: &[Range], pool: &Pool, pace: &Pace) -> Result<()> {
        self.quarantine_ranges(|_| Ok(ranges.to_vec()), pool, pace)?;
        let _one_at_a_time = self.begin(pace)?;
        let mut holding = self.write_lock();
        ranges
            .iter()
            .flat_map(|range| parts(*range))
            .try_for_each(|part| holding.forget_bytes(part))
    }

    /// Makes the ranges that `ranges` finds soft holes.
    fn quarantine_ranges(
        &self,
        ranges: impl Fn(&Holding) -> Result<Vec<Range>>,
        pool: &Pool,
        pace: &Pace,
    ) -> Result<()> {
        let quarantinable = |holding: &Holding| quarantinable(holding, ranges(holding)?);
        let is_done = {
            let holding = self.read_lock();
            let ranges = quarantinable(&holding)?;
            ranges.iter().all(|range| lost_bytes(holding.sealed(), *range) == range.len())
        };
        if is_done {
            return Ok(());
        }
        let _one_at_a_time = self.begin(pace)?;
        let mut holding = self.write_lock();
        if !self.natives.exclude() {
            return Err(Error::OpenNatively);
        }
        let ranges = quarantinable(&holding)?;
        if holding.sealed().punched_bytes()? > 0 {
            return Err(GAPS_FORBID);
        }
        mend(&mut holding, pace)?;
        let time = sys::unix_time();
        let before = holding.sealed().lost_count();
        let result = ranges
            .into_iter()
            .try_for_each(|range| self.quarantine_range(&mut holding, range, time, pool, pace));
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
        pool: &Pool,
        pace: &Pace,
    ) -> Result<()> {
        let before = holding.sealed().holes().count();
        let result = parts(range).try_for_each(|part| {
            self.quarantine_part(holding, part, time, pool, pace)?;
            pace.give_way(holding)
        });
        if holding.sealed().holes().count() > before {
            log::warn!("file {}: {range} quarantined (soft)", self.node);
        }
        result
    }

    /// Quarantines the subpages of `part`, which is of one folio. If the folio cannot be split,
    /// tries again for [`PIN_PATIENCE`]; others may have the file meanwhile.
    fn quarantine_part(
        &self,
        holding: &mut Locked<'_>,
        part: Range,
        time: u64,
        pool: &Pool,
        pace: &Pace,
    ) -> Result<()> {
        let started = Instant::now();
        loop {
            // While no subpage is a hole and the lock is released, a native reader may open the
            // file.
            if !self.natives.exclude() {
                return Err(Error::OpenNatively);
            }
            match holding.quarantine(pool, part, time) {
                Err(Error::Pinned) if started.elapsed() < PIN_PATIENCE => {
                    holding.rest(PIN_NAP);
                    pace.go_on()?;
                }
                result => return result,
            }
        }
    }

    /// Carries out the requests of a value of the repair attribute. A request that is `resumed` was
    /// begun by a worker that died, and had found enough to repair then: it repairs the rest, which
    /// may be nothing.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a value that does not parse, [`Error::NoData`] if a range has nothing
    /// to repair or nothing that can be salvaged: nothing is done.
    pub fn repair(&self, value: &[u8], resumed: bool, context: Context<'_>) -> Result<()> {
        let _one_at_a_time = self.begin(context.pace)?;
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

    /// True if [`Object::repair`] would find something to repair.
    ///
    /// # Errors
    /// The error that keeps this from being known.
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

    /// Repairs the lost subpages of `part`, which lies in one folio.
    pub(super) fn repair_part(
        &self,
        holding: &mut Holding,
        part: Range,
        content: Content<'_>,
        context: Context<'_>,
    ) -> Result<()> {
        if holding.sealed().lost_runs_in(part).next().is_none() {
            return Ok(());
        }
        holding.repair(context.pool, part, content)?;
        let folio = Subpage::containing(part.start).folio();
        if holding.sealed().lost_runs_in(folio.range()).next().is_none() {
            (context.repaired)(folio);
        }
        Ok(())
    }
}

/// The quarantined ranges, ascending.
fn quarantined(sealed: &Sealed) -> Vec<Quarantined> {
    let soft = sealed.holes().all().map(|hole| (hole.range, Kind::Soft, hole.time));
    let hw = sealed.hw_errors().iter().map(|(subpage, time)| (subpage.range(), Kind::Hw, *time));
    let mut all: Vec<_> = soft.chain(hw).collect();
    all.sort_by_key(|(range, ..)| range.start);
    quarantine::coalesce(all.into_iter())
}

/// The ranges, if all of them lie in the file and have memory.
fn quarantinable(holding: &Holding, ranges: Vec<Range>) -> Result<Vec<Range>> {
    let file = Range::new(0, holding.size()).subpages_out();
    for range in &ranges {
        if !file.covers(*range) {
            return Err(Error::invalid(format!("{range} is not in the file")));
        }
        if holding.released_in(*range).next().is_some() {
            return Err(Error::invalid(format!(
                "{range} was released and has no memory to quarantine"
            )));
        }
    }
    Ok(ranges)
}

fn subpages(ranges: &[Range]) -> impl Iterator<Item = Range> {
    ranges.iter().flat_map(|range| range.steps(SUBPAGE_SIZE))
}

/// The subpage at `place`, or none if it has a memory error already.
fn strikable(holding: &Holding, place: Range) -> Result<Option<Subpage>> {
    let subpage = Subpage::containing(place.start);
    if holding.sealed().hw_errors().contains_key(&subpage) {
        return Ok(None);
    }
    with_memory(holding, subpage).map(Some)
}

fn injectable(holding: &Holding, value: &[u8]) -> Result<Subpage> {
    with_memory(holding, quarantine::parse_inject(value, holding.size())?)
}

fn with_memory(holding: &Holding, subpage: Subpage) -> Result<Subpage> {
    let sealed = holding.sealed();
    if sealed.is_lost(subpage)
        || !sealed.has_memory(subpage.folio())
        || sealed.present(subpage.range())?.is_empty()
    {
        return Err(Error::invalid(format!(
            "{:#x} has no memory, or is quarantined",
            subpage.offset()
        )));
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
