//! ftruncate(2), fallocate(2) and lseek(2).

use super::io::covered_in_part;
use super::{
    Context, Locked, Object, Pace, carry_out, mend, mend_but_gaps, parts, placement_now, takes_long,
};
use crate::error::{Error, Result};
use crate::placement::Resolved;
use crate::pool::{EVERY_PAGE, Holding, Pool, Run};
use crate::sealed::Content;
use crate::steps::insist;
use crate::sys::tmpfs;
use crate::units::{FOLIO_SIZE, Range};
use std::time::Duration;

/// Largest size of a file, chosen so that rounding up cannot overflow.
const LARGEST_SIZE: u64 = i64::MAX as u64 / FOLIO_SIZE * FOLIO_SIZE;

/// Bytes that are punched and kept in one piece. The kernel drops memory in some 15 ms per GiB.
const PUNCHED_AT_ONCE: u64 = 128 << 20;

/// Passes of a move over the pages that could not be moved, and the pause between two passes: half
/// a second for a page that is pinned for long. A thread that is about to touch a folio holds a
/// reference until it gets a processor, and a busy machine keeps it waiting.
const PASSES: u32 = 25;

const BETWEEN_PASSES: Duration = Duration::from_millis(20);

/// The wish of a fallocate(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allocation {
    /// Mode 0: memory for the range, and the file at least that long.
    Extend,
    /// FALLOC_FL_KEEP_SIZE: memory for the range.
    KeepSize,
    /// FALLOC_FL_PUNCH_HOLE: whole pages go back to the pool and the rest is zeroed; or all of the
    /// range becomes a gap ([`Context::keep_punched`]).
    Punch,
    /// FALLOC_FL_ZERO_RANGE: zeros, and the file at least that long.
    Zero,
    /// FALLOC_FL_ZERO_RANGE with FALLOC_FL_KEEP_SIZE.
    ZeroKeepSize,
}

impl Object {
    /// ftruncate(2).
    ///
    /// # Errors
    /// [`Error::Full`] with nothing changed; [`Error::Busy`] if soft holes forbid it.
    pub fn truncate(&self, size: u64, context: Context<'_>) -> Result<()> {
        checked_range(0, size)?;
        let end = Range::new(size, size);
        let ahead = self.placement_ahead(end, context)?;
        let _one_at_a_time = self.begin(context.pace)?;
        let mut holding = self.lock(context.pace)?;
        context.pace.refuse_if(|| takes_long(&holding, end, size, context.pool))?;
        mend(&mut holding, context.pace)?;
        let change = match holding.size() {
            now if size <= now => holding.begin_shrinking(context.pool, size)?,
            now => {
                let placement = placement_now(ahead, &holding, end, context)?;
                holding.begin_growth(context.pool, Range::new(now, now), size, &placement)?
            }
        };
        carry_out(&mut holding, change, context.pace)
    }

    /// fallocate(2).
    ///
    /// # Errors
    /// [`Error::Full`] with nothing changed; [`Error::Busy`] if soft holes forbid it.
    pub fn allocate(
        &self,
        what: Allocation,
        offset: u64,
        length: u64,
        context: Context<'_>,
    ) -> Result<()> {
        let range = match what {
            Allocation::Punch => possible_part(offset, length), // programs punch the largest range to say "to the end"
            _ => checked_range(offset, length)?,
        };
        let ahead = match what {
            Allocation::Punch => None,
            _ => self.placement_ahead(range, context)?,
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
            Allocation::Extend | Allocation::Zero => {
                let placement = placement_now(ahead, &holding, range, context)?;
                holding.begin_growth(context.pool, range, range.end, &placement)?
            }
            Allocation::KeepSize | Allocation::ZeroKeepSize => {
                let placement = placement_now(ahead, &holding, range, context)?;
                holding.begin_allocation(context.pool, range, &placement)?
            }
            Allocation::Punch => holding.begin_release(context.pool, range)?,
        };
        carry_out(&mut holding, change, context.pace)?;
        match what {
            Allocation::Extend | Allocation::KeepSize => Ok(()),
            // Pages that the punch has released have no memory to be zeroed.
            Allocation::Punch | Allocation::Zero | Allocation::ZeroKeepSize => {
                self.zero(&mut holding, range, context)
            }
        }
    }

    /// Refuses a strict placement whose nodes have too few free pages for the file's.
    ///
    /// # Errors
    /// [`Error::Full`].
    pub fn refuse_relocation(&self, placement: &Resolved, pool: &Pool, pace: &Pace) -> Result<()> {
        self.share(pace)?.refuse_relocation(pool, EVERY_PAGE, placement)
    }

    /// True if `placement` wishes another NUMA node for one of `pages`.
    pub fn are_misplaced(&self, pages: Run, placement: &Resolved) -> bool {
        self.read_lock().are_misplaced(pages, placement)
    }

    /// Moves the file's pages among `pages` to the NUMA nodes that `placement` wishes for them, as
    /// far as these have free pages. Programs go on to use the file.
    ///
    /// # Errors
    /// [`Error::NoMemory`] after some pages have moved.
    pub fn relocate(
        &self,
        pages: Run,
        placement: &Resolved,
        pool: &Pool,
        pace: &Pace,
    ) -> Result<()> {
        let _one_at_a_time = self.begin(pace)?;
        for pass in 1.. {
            let mut holding = self.lock(pace)?;
            let relocation = holding.begin_relocation(pool, pages.clone(), placement)?;
            carry_out(&mut holding, relocation, pace)?;
            if !holding.are_pinned(pages.clone()) || pass == PASSES {
                break;
            }
            holding.rest(BETWEEN_PASSES);
        }
        Ok(())
    }

    /// Punches; the pages stay the file's, and a touch fills the gaps. A free block would open soft
    /// holes, so in a file with soft holes the range is zeroed in place.
    fn punch_and_keep(
        &self,
        holding: &mut Locked<'_>,
        range: Range,
        context: Context<'_>,
    ) -> Result<()> {
        mend_but_gaps(holding, context.pace)?;
        refuse_partial_holes(holding, range)?;
        self.repair_lost(holding, range, context)?;
        if holding.sealed().holes().is_empty() && !holding.has_released() {
            let range = range.intersect(Range::new(0, holding.size()));
            range.cut_at_multiples(PUNCHED_AT_ONCE).try_for_each(|piece| {
                holding.punch(piece)?;
                context.pace.give_way(holding)
            })
        } else {
            self.zero(holding, range, context)
        }
    }

    /// Repairs the quarantined subpages in `range` with zeros.
    fn repair_lost(
        &self,
        holding: &mut Locked<'_>,
        range: Range,
        context: Context<'_>,
    ) -> Result<()> {
        let range = range.intersect(Range::new(0, holding.size()));
        parts(range).try_for_each(|part| {
            self.repair_part(holding, part, Content::Zero, context)?;
            context.pace.give_way(holding)
        })
    }

    /// Zeroes the part of `range` that has memory. Quarantined subpages that it covers are
    /// repaired: their bytes are discarded anyway. [`Error::Quarantined`] if one is covered in
    /// part; nothing is zeroed then.
    fn zero(&self, holding: &mut Locked<'_>, range: Range, context: Context<'_>) -> Result<()> {
        const ZEROS: &[u8] = &[0; 256 << 10];
        refuse_partial_holes(holding, range)?;
        self.repair_lost(holding, range, context)?;
        for part in holding.owned_in(range) {
            for step in part.steps(ZEROS.len() as u64) {
                let zeros = &ZEROS[..step.len() as usize];
                // The file has memory for them.
                insist(|| tmpfs::write_all_at(&self.data, zeros, step.start))?;
                context.pace.give_way(holding)?;
            }
        }
        Ok(())
    }

    /// The next place from `offset` on that is data (`data`) or a hole: SEEK_DATA and SEEK_HOLE of
    /// lseek(2). Quarantined subpages, released pages and the end of the file are holes. All else
    /// is data.
    ///
    /// # Errors
    /// ENXIO behind the end of the file, and if no data is left.
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
        let behind_hole =
            |at: u64, hole: Range| if hole.start <= at { Ok(hole.end) } else { Err(at) };
        match holes.try_fold(rest.start, behind_hole) {
            Err(at) => Ok(at),
            Ok(at) if at < rest.end => Ok(at),
            Ok(_) => Err(nothing),
        }
    }
}

/// A range, if a file can have it.
pub(super) fn checked_range(offset: u64, length: u64) -> Result<Range> {
    Range::checked_at(offset, length)
        .filter(|range| range.end <= LARGEST_SIZE)
        .ok_or(Error::TooLarge)
}

/// The part of a range that a file can have.
fn possible_part(offset: u64, length: u64) -> Range {
    Range::new(offset, offset.saturating_add(length)).intersect(Range::new(0, LARGEST_SIZE))
}

/// Refuses a range that covers a lost subpage in part: such a part cannot be zeroed.
fn refuse_partial_holes(holding: &Holding, range: Range) -> Result<()> {
    if covered_in_part(holding, range).is_some() { Err(Error::Quarantined) } else { Ok(()) }
}

/// The parts of `range` that are quarantined subpages or lie in released pages, ascending.
fn holes_in(holding: &Holding, range: Range) -> impl Iterator<Item = Range> + '_ {
    let mut lost =
        holding.sealed().lost_in(range).map(move |lost| lost.range().intersect(range)).peekable();
    let mut released = holding.released_in(range).peekable();
    std::iter::from_fn(move || match (lost.peek(), released.peek()) {
        (Some(one), Some(other)) if one.start < other.start => lost.next(),
        (_, None) => lost.next(),
        _ => released.next(),
    })
}
