//! The way in which a file is mapped, and huge mappings that are put back.

use super::{Object, Pace};
use crate::error::{Error, Result};
use crate::quarantine;
use crate::sealed::Sealed;
use crate::units::{Folio, NumaNode, Range, Subpage};
use std::time::Duration;

/// Passes without a folio collapsed after which a collapse is given up, and the pause between two
/// passes. Memory compaction, for instance, holds pages for a moment.
const COLLAPSE_TRIES: u32 = 3;

const COLLAPSE_NAP: Duration = Duration::from_millis(3);

/// Bytes that are looked at in one turn of the lock.
const WINDOW: u64 = 64 << 20;

/// The way in which a part of a file is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Mapped by a 2 MiB entry.
    Huge,
    /// Mapped by 4 KiB entries.
    Small,
    /// Not mapped: quarantined.
    Quarantined,
    /// Not mapped: its pages went back to the pool.
    Released,
    /// Not mapped: punched; a touch fills it.
    Punched,
}

/// A folio with memory, and the place of that memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Located {
    /// The folio.
    pub folio: Folio,
    /// The NUMA node of its memory, as far as the kernel tells it.
    pub on: Option<NumaNode>,
    /// The memory could not be moved where it should be, as a device or the kernel held it.
    pub is_pinned: bool,
}

impl State {
    /// The word for it in the map attribute.
    pub fn name(self) -> &'static str {
        match self {
            Self::Huge => "huge",
            Self::Small => "small",
            Self::Quarantined => "poisoned",
            Self::Released => "released",
            Self::Punched => "punched",
        }
    }
}

/// A part of a file in one state, on one NUMA node as far as that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The part.
    pub range: Range,
    /// The way in which it is mapped.
    pub state: State,
    /// The NUMA node of its memory, as far as known.
    pub node: Option<NumaNode>,
}

impl Object {
    /// The extents of the whole file, ascending.
    ///
    /// # Errors
    /// The errors of mmap(2) and of reading the page map.
    pub fn map(&self, nodes: &[NumaNode], pace: &Pace) -> Result<Vec<Extent>> {
        let mut extents = Extents::default();
        let mut at = 0;
        loop {
            pace.go_on()?;
            // For one window: a change of the file goes on between two.
            let holding = self.shut_share(pace)?;
            let sealed = holding.sealed();
            let file = Range::new(0, holding.size()).subpages_out();
            let window = Range::at(at, WINDOW).intersect(file);
            if window.is_empty() {
                return Ok(extents.0);
            }
            at = window.end;
            let huge = sealed.huge_ranges(window)?;
            let located = if nodes.len() > 1 { sealed.nodes_of(window) } else { Vec::new() };
            let mut located = located.into_iter();
            for folio in window.folios() {
                let range = folio.range().intersect(file);
                let node = match (sealed.has_memory(folio), nodes) {
                    (false, _) => None,
                    (true, [only]) => Some(*only),
                    (true, _) => located.next().and_then(|(_, node)| node),
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
                            true => (State::Quarantined, node),
                            false if is_present(subpage) => (State::Small, node),
                            false => (State::Punched, None),
                        };
                        extents.push(subpage.range(), state, node);
                    }
                }
            }
        }
    }

    /// Calls `each` for each folio that has memory, ascending.
    ///
    /// # Errors
    /// [`Error::Interrupted`].
    pub fn locate(&self, pace: &Pace, mut each: impl FnMut(Located)) -> Result<()> {
        let mut at = 0;
        loop {
            pace.go_on()?;
            let holding = self.share(pace)?;
            let sealed = holding.sealed();
            let window =
                Range::at(at, WINDOW).intersect(Range::new(0, holding.size()).folios_out());
            if window.is_empty() {
                return Ok(());
            }
            at = window.end;
            for (folio, on) in sealed.nodes_of(window) {
                each(Located { folio, on, is_pinned: holding.is_pinned(folio, on) });
            }
        }
    }

    /// Puts huge mappings back in the ranges of a value of the collapse attribute. Folios that
    /// cannot be huge are left alone: those with a quarantined subpage, and those that were
    /// released or punched.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a value that does not parse. EAGAIN or ENOMEM if the kernel cannot
    /// collapse a folio; all others are tried before.
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

    /// Puts one folio back into one piece, if it has memory and no lost subpage.
    ///
    /// # Errors
    /// The errors of [`crate::sealed::Sealed::collapse`].
    pub fn collapse_folio(&self, folio: Folio) -> Result<()> {
        let holding = self.read_lock();
        let sealed = holding.sealed();
        match sealed.has_memory(folio).then(|| self.collapse_one(sealed, folio)) {
            None | Some(Err(Error::Busy(_))) => Ok(()),
            Some(result) => result,
        }
    }

    fn collapse_one(&self, sealed: &Sealed, folio: Folio) -> Result<()> {
        let _one_at_a_time = self.collapsing.write();
        sealed.collapse(folio)
    }
}

/// Joins neighbours in the same state on the same NUMA node.
#[derive(Default)]
struct Extents(Vec<Extent>);

impl Extents {
    fn push(&mut self, range: Range, state: State, node: Option<NumaNode>) {
        match self.0.last_mut() {
            Some(last)
                if last.range.end == range.start && last.state == state && last.node == node =>
            {
                last.range.end = range.end;
            }
            _ => self.0.push(Extent { range, state, node }),
        }
    }
}

fn subpages(range: Range) -> impl Iterator<Item = Subpage> {
    let subpages = range.subpages();
    (subpages.start.0..subpages.end.0).map(Subpage)
}
