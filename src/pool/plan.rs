//! The plan of a growth: the transfers of memory, one after the other. Pure.
//!
//! ```text
//!   pages that are wanted, free pages of each part  --placement::choose()-->  their homes
//!   parts of a file that lack memory, their homes   --Plan-->                 transfers
//! ```

use super::homes::Homes;
use crate::units::{FOLIO_SIZE, NumaNode, Range};

/// Memory that moves between a part of a file and one NUMA node's part of the pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// Whole folios of pages with this home.
    pub range: Range,
    /// The home of these pages.
    pub node: NumaNode,
}

/// The transfers that give a file the memory that it lacks, the first one first.
#[derive(Debug)]
pub struct Plan {
    /// The parts that lack memory, the first one last.
    lacking: Vec<Range>,
}

impl Plan {
    /// A plan for `lacking`: ranges of whole folios in the order in which they get memory.
    pub fn new(lacking: impl IntoIterator<Item = Range>) -> Self {
        let mut lacking: Vec<_> = lacking.into_iter().filter(|range| !range.is_empty()).collect();
        lacking.reverse();
        let is_whole = |range: &Range| *range == range.folios_out();
        assert!(lacking.iter().all(is_whole), "memory moves by whole folios: {lacking:?}");
        Self { lacking }
    }

    /// The next transfer; `None` if the file lacks nothing any more. Every page of the plan has a
    /// home in `homes`.
    pub fn next(&self, homes: &Homes) -> Option<Transfer> {
        let range = *self.lacking.last()?;
        let (node, end) = homes.at(range.start).expect("a page has a home before it has memory");
        Some(Transfer { range: Range::new(range.start, range.end.min(end)), node })
    }

    /// The first `bytes` of the next transfer are made. Returns their range.
    pub fn advance(&mut self, bytes: u64) -> Range {
        let range = self.lacking.pop().expect("there is a transfer");
        assert!(0 < bytes && bytes <= range.len(), "{bytes} bytes of {range}");
        assert!(bytes.is_multiple_of(FOLIO_SIZE), "{bytes} bytes are no whole folios");
        let left = Range::new(range.start + bytes, range.end);
        self.lacking.extend((!left.is_empty()).then_some(left));
        Range::at(range.start, bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::super::page_set::Run;
    use super::*;
    use crate::units::{Page, PageSize};

    fn run(first: u64, end: u64) -> Run {
        Page(first)..Page(end)
    }

    fn bytes(first: u64, end: u64) -> Range {
        Range::new(first * FOLIO_SIZE, end * FOLIO_SIZE)
    }

    #[test]
    fn a_transfer_has_one_home_and_ends_with_its_pages() {
        let [zero, one] = [0, 1].map(NumaNode);
        let mut homes = Homes::new(PageSize::Huge);
        homes.insert(run(0, 2), zero);
        homes.insert(run(2, 6), one);
        let mut plan = Plan::new([bytes(1, 4), bytes(2, 2), bytes(5, 6)]);
        let mut made = Vec::new();
        while let Some(transfer) = plan.next(&homes) {
            let moved = transfer.range.len().min(FOLIO_SIZE);
            made.push((plan.advance(moved), transfer));
        }
        let rows = [
            (bytes(1, 2), Transfer { range: bytes(1, 2), node: zero }),
            (bytes(2, 3), Transfer { range: bytes(2, 4), node: one }),
            (bytes(3, 4), Transfer { range: bytes(3, 4), node: one }),
            (bytes(5, 6), Transfer { range: bytes(5, 6), node: one }),
        ];
        assert_eq!(made, rows);
    }
}
