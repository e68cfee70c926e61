//! A set of a file's pages, kept as runs: no cost grows with the number of pages in the set.

use crate::units::Page;
use rangemap::RangeSet;
use std::ops::Range;

/// Pages that follow one another.
pub type Run = Range<Page>;

/// All pages that a file can have.
pub const EVERY_PAGE: Run = Page(0)..Page(u64::MAX);

/// Bytes of one run as it is stored with a file: its first page and its length, 32 bits each,
/// little-endian.
const RUN_BYTES: usize = 8;

/// The most runs that an extended attribute of a file can hold (XATTR_SIZE_MAX, 64 KiB). Unit tests
/// have fewer, as 8,192 separate pages are more memory than a test may take.
pub const MOST_RUNS: usize = if cfg!(test) { 4 } else { (64 << 10) / RUN_BYTES };

/// A set of pages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageSet {
    runs: RangeSet<Page>,
    count: u64,
}

impl PageSet {
    /// The number of pages in the set.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The number of runs of the set.
    pub fn run_count(&self) -> usize {
        self.runs.len()
    }

    /// True if the set has no page.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The runs, ascending.
    pub fn runs(&self) -> impl Iterator<Item = &Run> {
        self.runs.iter()
    }

    /// The parts of the set's runs that lie in `run`, ascending.
    pub fn within(&self, run: Run) -> impl Iterator<Item = Run> + '_ {
        let Range { start, end } = run;
        let clip = move |part: &Run| part.start.max(start)..part.end.min(end);
        let parts = (start < end).then(|| self.runs.overlapping(start..end));
        parts.into_iter().flatten().map(clip)
    }

    /// The parts of `run` that are not in the set, ascending.
    pub fn gaps_within(&self, run: Run) -> Vec<Run> {
        if run.is_empty() { Vec::new() } else { self.runs.gaps(&run).collect() }
    }

    /// Puts the pages of `run` into the set.
    pub fn insert(&mut self, run: Run) {
        if !run.is_empty() {
            self.count += length(&run) - self.count_within(&run);
            self.runs.insert(run.clone());
        }
        debug_assert!(self.gaps_within(run).is_empty(), "each page is in the set");
        debug_assert_eq!(self.count == 0, self.runs.is_empty(), "pages are counted");
    }

    /// Takes the pages of `run` out of the set.
    pub fn remove(&mut self, run: Run) {
        if !run.is_empty() {
            self.count -= self.count_within(&run);
            self.runs.remove(run.clone());
        }
        debug_assert!(self.within(run).next().is_none(), "no page is in the set");
        debug_assert_eq!(self.count == 0, self.runs.is_empty(), "pages are counted");
    }

    /// The pages of either set.
    pub fn union(mut self, other: &Self) -> Self {
        other.runs().for_each(|run| self.insert(run.clone()));
        self
    }

    /// The pages of this set that are not in the other.
    pub fn without(mut self, other: &Self) -> Self {
        other.runs().for_each(|run| self.remove(run.clone()));
        self
    }

    fn count_within(&self, run: &Run) -> u64 {
        self.within(run.clone()).map(|part| length(&part)).sum()
    }

    /// The set in the form in which it is stored with a file.
    ///
    /// # Panics
    /// If the number of a page has more than 32 bits. No page of a pool has such a number.
    pub fn encode(&self) -> Vec<u8> {
        let number = |value: u64| {
            u32::try_from(value).expect("a file has fewer pages than 2^32").to_le_bytes()
        };
        self.runs().flat_map(|run| [number(run.start.0), number(length(run))]).flatten().collect()
    }

    /// Reads the bytes that [`PageSet::encode`] wrote.
    pub fn decode(bytes: &[u8]) -> Self {
        let (words, _) = bytes.as_chunks::<4>();
        let (runs, _) = words.as_chunks::<2>();
        runs.iter().fold(Self::default(), |mut set, run| {
            let [first, count] = run.map(|word| u64::from(u32::from_le_bytes(word)));
            set.insert(Page(first)..Page(first + count));
            set
        })
    }
}

impl FromIterator<Run> for PageSet {
    fn from_iter<I: IntoIterator<Item = Run>>(runs: I) -> Self {
        runs.into_iter().fold(Self::default(), |mut set, run| {
            set.insert(run);
            set
        })
    }
}

/// The number of pages of `run`.
pub fn length(run: &Run) -> u64 {
    run.end.0 - run.start.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const PAGES: u64 = 40;

    fn run(first: u64, end: u64) -> Run {
        Page(first)..Page(end)
    }

    fn pages(runs: impl IntoIterator<Item = Run>) -> Vec<u64> {
        runs.into_iter().flat_map(|run| run.start.0..run.end.0).collect()
    }

    #[test]
    fn a_set_reads_as_it_was_kept() {
        for pages in [&[][..], &[0], &[0, 1, 2], &[5, 7, 8, 100_000, u64::from(u32::MAX) - 1]] {
            let set: PageSet = pages.iter().map(|page| run(*page, page + 1)).collect();
            assert_eq!(PageSet::decode(&set.encode()), set);
        }
        assert_eq!(PageSet::from_iter([run(0, 500), run(500, 1000)]).encode().len(), RUN_BYTES);
    }

    proptest! {
        /// The model is a plain set of page numbers.
        #[test]
        fn a_set_of_runs_is_the_same_as_a_set_of_pages(
            changes in prop::collection::vec((any::<bool>(), 0..PAGES, 0..PAGES), 0..30),
            first in 0..PAGES,
            end in 0..PAGES,
        ) {
            let (mut set, mut model) = (PageSet::default(), BTreeSet::new());
            for (is_put_in, first, end) in changes {
                if is_put_in {
                    set.insert(run(first, end));
                    model.extend(first..end);
                } else {
                    set.remove(run(first, end));
                    model.retain(|page| !(first..end).contains(page));
                }
            }
            prop_assert_eq!(set.count(), model.len() as u64);
            prop_assert_eq!(pages(set.runs().cloned()), Vec::from_iter(model.iter().copied()));
            let asked = first..end;
            let (inside, outside): (Vec<u64>, Vec<u64>) = asked.partition(|page| model.contains(page));
            prop_assert_eq!(pages(set.within(run(first, end))), inside);
            prop_assert_eq!(pages(set.gaps_within(run(first, end))), outside);
            prop_assert_eq!(PageSet::decode(&set.encode()), set);
        }
    }
}
