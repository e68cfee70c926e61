//! The table of a file's soft holes, and the time of each. This module does not touch the file.
//!
//! The table keeps holes as runs. A run takes 40 bytes, and a folio that is quarantined whole is
//! one run, so a long quarantine needs little memory of the daemon. No run crosses the end of a
//! folio, because one record of the ledger holds the runs of one folio ([`super::ledger`]).

use crate::units::{FOLIO_SIZE, Range, SUBPAGE_SIZE, Subpage};
use std::collections::BTreeMap;

/// A run of subpages that were quarantined at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hole {
    /// Whole subpages of one folio.
    pub range: Range,
    /// Time of the quarantine, in seconds since the epoch.
    pub time: u64,
}

/// The soft holes of a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holes {
    /// Key: the first byte of the run. Value: the byte behind the run, and its time.
    runs: BTreeMap<u64, (u64, u64)>,
    bytes: u64,
}

impl Holes {
    /// True if there are no holes.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Number of subpages that are holes.
    pub fn count(&self) -> u64 {
        self.bytes / SUBPAGE_SIZE
    }

    /// The holes that hold any byte of `range`, cut to the subpages that `range` touches;
    /// ascending.
    pub fn in_range(&self, range: Range) -> impl DoubleEndedIterator<Item = Hole> + '_ {
        let range = range.subpages_out();
        let reaches_in =
            self.runs.range(..range.start).next_back().filter(|(_, (end, _))| *end > range.start);
        let first = reaches_in.map_or(range.start, |(start, _)| *start);
        let cut = move |(start, (end, time)): (&u64, &(u64, u64))| Hole {
            range: Range::new(*start, *end).intersect(range),
            time: *time,
        };
        self.runs.range(first..range.end.max(first)).map(cut).filter(|hole| !hole.range.is_empty())
    }

    /// All holes, ascending.
    pub fn all(&self) -> impl DoubleEndedIterator<Item = Hole> + '_ {
        self.runs
            .iter()
            .map(|(start, (end, time))| Hole { range: Range::new(*start, *end), time: *time })
    }

    /// True if `subpage` is a hole.
    pub fn contains(&self, subpage: Subpage) -> bool {
        self.in_range(subpage.range()).next().is_some()
    }

    /// Adds a run. No part of the run is a hole yet. The run is joined with a neighbour in the same
    /// folio that has the same time.
    ///
    /// # Panics
    /// If a part of the run is a hole, or the run crosses the end of a folio.
    pub fn add(&mut self, hole: Hole) {
        assert!(
            self.in_range(hole.range).next().is_none(),
            "{} is quarantined in part",
            hole.range
        );
        assert_eq!(hole.range.folios().count(), 1, "{} is not of one folio", hole.range);
        assert_eq!(hole.range, hole.range.subpages_out(), "a hole is whole subpages");
        self.bytes += hole.range.len();
        let Hole { range: Range { mut start, mut end }, time } = hole;
        let joins = |(_, before): &(&u64, &(u64, u64))| **before == (start, time);
        if !start.is_multiple_of(FOLIO_SIZE)
            && let Some((before, _)) = self.runs.range(..start).next_back().filter(joins)
        {
            start = *before;
        }
        if !end.is_multiple_of(FOLIO_SIZE)
            && let Some((after, _)) =
                self.runs.get(&end).copied().filter(|(_, other)| *other == time)
        {
            self.runs.remove(&end);
            end = after;
        }
        self.runs.insert(start, (end, time));
        debug_assert!(start <= hole.range.start && hole.range.end <= end, "no byte is left out");
        debug_assert_eq!(
            Range::new(start, end).folios().count(),
            1,
            "no run crosses a folio's end"
        );
    }

    /// Removes the holes, and parts of holes, in `range`.
    pub fn remove(&mut self, range: Range) {
        let range = range.subpages_out();
        let removed: Vec<Hole> = self.in_range(range).collect();
        for hole in removed {
            self.bytes -= hole.range.len();
            let last = self.runs.range(..=hole.range.start).next_back();
            let (start, (end, time)) =
                last.map(|(start, run)| (*start, *run)).expect("it is a part of a run");
            self.runs.remove(&start);
            for rest in [Range::new(start, hole.range.start), Range::new(hole.range.end, end)] {
                if !rest.is_empty() {
                    self.runs.insert(rest.start, (rest.end, time));
                }
            }
        }
        debug_assert!(self.in_range(range).next().is_none(), "no hole is left in {range}");
        debug_assert_eq!(self.bytes == 0, self.runs.is_empty(), "bytes are counted");
    }
}

/// Number of subpages in `runs`.
pub fn subpages(runs: &[Range]) -> u64 {
    runs.iter().map(|run| run.len() / SUBPAGE_SIZE).sum()
}

/// The parts of `range` that are not in `lost`. `range` is whole subpages, and `lost` ascends.
pub fn between(range: Range, lost: impl Iterator<Item = Range>) -> Vec<Range> {
    let mut parts = Vec::new();
    let mut start = range.start;
    for lost in lost {
        parts.push(Range::new(start, lost.start));
        start = lost.end.max(start);
    }
    parts.push(Range::new(start, range.end));
    parts.retain(|part| !part.is_empty());
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(first: u64, count: u64, time: u64) -> Hole {
        Hole { range: Range::at(first * SUBPAGE_SIZE, count * SUBPAGE_SIZE), time }
    }

    fn holes(runs: &[Hole]) -> Holes {
        let mut holes = Holes::default();
        runs.iter().for_each(|run| holes.add(*run));
        holes
    }

    #[test]
    fn neighbours_of_one_time_in_one_folio_are_one_run() {
        let one = holes(&[run(3, 1, 9), run(5, 2, 9), run(4, 1, 9)]);
        assert_eq!(one.all().collect::<Vec<_>>(), [run(3, 4, 9)]);
        assert_eq!(one.count(), 4);
        let two = holes(&[run(3, 1, 9), run(4, 1, 8), run(511, 1, 7), run(512, 1, 7)]);
        assert_eq!(two.all().count(), 4);
    }

    #[test]
    fn a_part_of_a_run_can_be_taken_out() {
        let mut some = holes(&[run(10, 10, 9)]);
        some.remove(run(12, 3, 0).range);
        assert_eq!(some.all().collect::<Vec<_>>(), [run(10, 2, 9), run(15, 5, 9)]);
        some.remove(run(0, 16, 0).range);
        assert_eq!(some.all().collect::<Vec<_>>(), [run(16, 4, 9)]);
        assert_eq!(some.count(), 4);
        some.remove(run(0, 512, 0).range);
        assert!(some.is_empty() && some.count() == 0);
    }

    #[test]
    fn runs_are_cut_to_the_range_that_is_asked_for() {
        let some = holes(&[run(10, 10, 9), run(30, 1, 9)]);
        let within = |first, count| some.in_range(run(first, count, 0).range).collect::<Vec<_>>();
        assert_eq!(within(15, 100), [run(15, 5, 9), run(30, 1, 9)]);
        assert_eq!(within(0, 11), [run(10, 1, 9)]);
        assert_eq!(within(20, 10), []);
        assert_eq!(within(12, 0), []);
        assert!(some.contains(Subpage(19)) && !some.contains(Subpage(20)));
    }

    #[test]
    fn what_is_left_between_runs_is_found() {
        let lost = [run(2, 1, 0).range, run(3, 2, 0).range, run(9, 1, 0).range];
        let left = between(run(0, 10, 0).range, lost.into_iter());
        assert_eq!(left, [run(0, 2, 0).range, run(5, 4, 0).range]);
    }
}
