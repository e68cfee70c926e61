//! Random sequences of operations against a reference model.
//!
//! [`Model`] states the promises of the filesystem in readable form (bytes, sizes, pages, errors).
//! [`World`] carries out the operations in the real filesystem, from two processes. The answers of
//! both must agree, and so must the state after each operation.

mod support;

use hugetlb2fs::sys::sigbus::{Mapping, Sharing};
use hugetlb2fs::units::Range;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};
use rustix::fs::{AtFlags, CWD, FallocateFlags, Mode, OFlags, RenameFlags, SeekFrom, XattrFlags};
use rustix::io::Errno;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use support::{COLLAPSE, FOLIO, MAP, POISON, Pool, REPAIR, SUBPAGE, Toucher};

/// The pages of the pool, and the bytes in a page.
const PAGES: u64 = 8;
const PAGE: u64 = FOLIO;
/// The numbers of names, of descriptors that this process holds, and of mappings (the first is in
/// this process, the other in the toucher).
const NAMES: usize = 4;
const SLOTS: usize = 2;
const MAPPINGS: usize = 2;
/// The bytes of each mapping.
const MAPPED: u64 = 6 * PAGE;
/// A size beyond the largest file of this pool, and within the range of file sizes.
const ABSURD: u64 = 1 << 62;

// ---- operations ---------------------------------------------------------------------------------

/// The process that uses a file, and its way to the file.
#[derive(Clone, Copy, Debug)]
enum Via {
    /// This process, by name.
    Here(usize),
    /// The other process, by name.
    There(usize),
    /// This process, by a descriptor that it opened in an earlier operation.
    Held(usize),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fallocate {
    Extend,
    KeepSize,
    Punch,
    Zero,
    ZeroKeepSize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verb {
    Zero,
    Salvage,
}

#[derive(Clone, Debug)]
enum Op {
    Create(usize),
    Open { slot: usize, name: usize },
    Close { slot: usize },
    Write { via: Via, offset: u64, length: u64, byte: u8 },
    Append { via: Via, length: u64, byte: u8 },
    Read { via: Via, offset: u64, length: u64 },
    Truncate { via: Via, size: u64 },
    Fallocate { via: Via, what: Fallocate, offset: u64, length: u64 },
    Seek { via: Via, offset: u64, data: bool },
    Poison { via: Via, offset: u64, length: u64 },
    Repair { via: Via, verb: Verb, range: Option<(u64, u64)> },
    Collapse { via: Via, range: Option<(u64, u64)> },
    Map { mapping: usize, name: usize },
    Unmap { mapping: usize },
    Load { mapping: usize, offset: u64 },
    Store { mapping: usize, offset: u64, byte: u8 },
    Unlink(usize),
    Link { from: usize, to: usize },
    Rename { from: usize, to: usize },
    RenameNoReplace { from: usize, to: usize },
    Exchange { from: usize, to: usize },
}

fn name() -> impl Strategy<Value = usize> {
    0..NAMES
}

fn via() -> impl Strategy<Value = Via> {
    prop_oneof![
        4 => name().prop_map(Via::Here),
        3 => name().prop_map(Via::There),
        2 => (0..SLOTS).prop_map(Via::Held),
    ]
}

/// Offsets near boundaries: starts of pages and of subpages, and the first few of both.
fn offset() -> impl Strategy<Value = u64> {
    let page = prop_oneof![4 => 0..3u64, 2 => 3..6u64];
    let within = prop_oneof![
        4 => Just(0),
        3 => (0..6u64).prop_map(|subpage| subpage * SUBPAGE),
        2 => 0..4 * SUBPAGE,
        2 => 0..PAGE,
        1 => Just(PAGE - 1),
        1 => Just(PAGE - SUBPAGE),
    ];
    (page, within).prop_map(|(page, within)| page * PAGE + within)
}

fn short() -> impl Strategy<Value = u64> {
    prop_oneof![
        3 => 1..64u64,
        3 => (1..5u64).prop_map(|subpages| subpages * SUBPAGE),
        2 => 1..5 * SUBPAGE,
    ]
}

/// Lengths of reads: the daemon delivers more than 64 KiB in another way than less.
fn readable() -> impl Strategy<Value = u64> {
    prop_oneof![3 => short(), 2 => (60u64 << 10)..2 * PAGE]
}

fn size() -> impl Strategy<Value = u64> {
    prop_oneof![20 => offset(), 1 => Just(ABSURD), 1 => Just(9 * PAGE)]
}

fn length() -> impl Strategy<Value = u64> {
    prop_oneof![
        6 => short(),
        6 => (1..4u64).prop_map(|pages| pages * PAGE),
        3 => 1..3 * PAGE,
        1 => Just(ABSURD),
    ]
}

fn fallocate() -> impl Strategy<Value = Fallocate> {
    prop_oneof![
        2 => Just(Fallocate::Extend),
        3 => Just(Fallocate::KeepSize),
        5 => Just(Fallocate::Punch),
        2 => Just(Fallocate::Zero),
        2 => Just(Fallocate::ZeroKeepSize),
    ]
}

/// Ranges for quarantines and repairs: mostly inside of files, and a few subpages at most.
fn damage() -> impl Strategy<Value = (u64, u64)> {
    let place = (0..3u64, prop_oneof![3 => 0..6u64, 1 => 508..512u64])
        .prop_map(|(page, subpage)| page * PAGE + subpage * SUBPAGE);
    let length = prop_oneof![8 => Just(1), 4 => 1..3 * SUBPAGE, 1 => Just(0)];
    (place, length)
}

fn area() -> impl Strategy<Value = Option<(u64, u64)>> {
    prop_oneof![2 => Just(None), 3 => damage().prop_map(Some), 1 => (offset(), length()).prop_map(Some)]
}

fn verb() -> impl Strategy<Value = Verb> {
    prop_oneof![Just(Verb::Zero), Just(Verb::Salvage)]
}

fn contents() -> impl Strategy<Value = Op> {
    let byte = || 1..=255u8;
    prop_oneof![
        10 => (via(), offset(), short(), byte())
            .prop_map(|(via, offset, length, byte)| Op::Write { via, offset, length, byte }),
        2 => (via(), short(), byte()).prop_map(|(via, length, byte)| Op::Append { via, length, byte }),
        5 => (via(), offset(), readable())
            .prop_map(|(via, offset, length)| Op::Read { via, offset, length }),
        6 => (via(), size()).prop_map(|(via, size)| Op::Truncate { via, size }),
        8 => (via(), fallocate(), offset(), length())
            .prop_map(|(via, what, offset, length)| Op::Fallocate { via, what, offset, length }),
        3 => (via(), offset(), any::<bool>()).prop_map(|(via, offset, data)| Op::Seek { via, offset, data }),
    ]
}

fn quarantine() -> impl Strategy<Value = Op> {
    prop_oneof![
        5 => (via(), damage()).prop_map(|(via, (offset, length))| Op::Poison { via, offset, length }),
        3 => (via(), verb(), area()).prop_map(|(via, verb, range)| Op::Repair { via, verb, range }),
        1 => (via(), area()).prop_map(|(via, range)| Op::Collapse { via, range }),
    ]
}

fn mapped() -> impl Strategy<Value = Op> {
    let mapping = || 0..MAPPINGS;
    prop_oneof![
        3 => (mapping(), name()).prop_map(|(mapping, name)| Op::Map { mapping, name }),
        1 => mapping().prop_map(|mapping| Op::Unmap { mapping }),
        4 => (mapping(), offset()).prop_map(|(mapping, offset)| Op::Load { mapping, offset }),
        4 => (mapping(), offset(), 1..=255u8)
            .prop_map(|(mapping, offset, byte)| Op::Store { mapping, offset, byte }),
    ]
}

fn names() -> impl Strategy<Value = Op> {
    let two = || (name(), name());
    prop_oneof![
        8 => name().prop_map(Op::Create),
        4 => (0..SLOTS, name()).prop_map(|(slot, name)| Op::Open { slot, name }),
        2 => (0..SLOTS).prop_map(|slot| Op::Close { slot }),
        3 => name().prop_map(Op::Unlink),
        2 => two().prop_map(|(from, to)| Op::Link { from, to }),
        2 => two().prop_map(|(from, to)| Op::Rename { from, to }),
        1 => two().prop_map(|(from, to)| Op::RenameNoReplace { from, to }),
        1 => two().prop_map(|(from, to)| Op::Exchange { from, to }),
    ]
}

fn sequence() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![12 => contents(), 5 => quarantine(), 6 => mapped(), 5 => names()];
    // Most sequences start with files; otherwise half of the operations would find no file.
    let start = prop_oneof![1 => Just(vec![]), 8 => Just(vec![Op::Create(0), Op::Create(1)])];
    (start, prop::collection::vec(op, 1..50)).prop_map(|(mut ops, rest)| {
        ops.extend(rest);
        ops
    })
}

// ---- the model ----------------------------------------------------------------------------------

/// The answer of an operation.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Answer {
    Done,
    Count(u64),
    Bytes(Vec<u8>),
    /// SIGBUS.
    Fault,
    /// Any byte: the place is behind the end of file, in its last subpage.
    Anything,
    Failed(Errno),
}

type Outcome<T = ()> = Result<T, Errno>;

fn answer<T>(outcome: Outcome<T>, good: impl FnOnce(T) -> Answer) -> Answer {
    outcome.map_or_else(Answer::Failed, good)
}

/// The bytes that were in a quarantined subpage.
type Rescued = Vec<u8>;

/// A regular file: its bytes and its pages.
#[derive(Clone, Debug, Default)]
struct Contents {
    bytes: Vec<u8>,
    /// The pages from the start of the file on that its size or an allocation behind the end has
    /// taken.
    reserved: u64,
    /// The reserved pages that were punched: the pool has them again, and they read as zeros.
    released: BTreeSet<u64>,
    /// Quarantined subpages.
    holes: BTreeMap<u64, Rescued>,
    names: u64,
    /// With `punch=keep`, punched pages stay the file's, and are memory to every reader.
    keeps: bool,
}

fn subpages(range: Range) -> std::ops::Range<u64> {
    let range = range.subpages();
    range.start.0..range.end.0
}

fn pages_up(bytes: u64) -> u64 {
    bytes.div_ceil(PAGE)
}

/// The pages that hold any byte of `range`.
fn touching(range: Range) -> std::ops::Range<u64> {
    if range.is_empty() { 0..0 } else { range.start / PAGE..pages_up(range.end) }
}

impl Contents {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// The range of the whole file.
    fn extent(&self) -> Range {
        Range::new(0, self.size())
    }

    /// The pages that the file owns: it takes whole pages, and punched pages are the pool's again.
    fn pages(&self) -> u64 {
        self.reserved - self.released.len() as u64
    }

    /// st_blocks: whole pages, as the pool counts them. A file with quarantined subpages counts its
    /// readable bytes instead. That is less than its size, so cp(1) looks for holes.
    fn blocks(&self) -> u64 {
        let page = |page: &u64| Range::at(page * PAGE, PAGE).intersect(self.extent()).len();
        let released: u64 = self.released.iter().map(page).sum();
        let readable = (self.size() - released).saturating_sub(self.holes.len() as u64 * SUBPAGE);
        let counted = if self.holes.is_empty() { self.pages() * PAGE } else { readable };
        counted / 512
    }

    fn holes_in(&self, range: Range) -> Vec<u64> {
        self.holes.range(subpages(range)).map(|(hole, _)| *hole).collect()
    }

    /// The bytes of the file in a subpage.
    fn bytes_of(&self, subpage: u64) -> Range {
        Range::at(subpage * SUBPAGE, SUBPAGE).intersect(self.extent())
    }

    fn put(&mut self, range: Range, byte: u8) {
        if !range.is_empty() {
            self.bytes[range.start as usize..range.end as usize].fill(byte);
        }
    }

    /// Returns good bytes up to the first quarantined subpage. EIO if the first byte lies in that
    /// subpage.
    fn read(&self, offset: u64, length: u64) -> Outcome<Vec<u8>> {
        let range = Range::at(offset, length).intersect(self.extent());
        if range.is_empty() {
            return Ok(Vec::new());
        }
        let end = match self.holes_in(range).first() {
            Some(hole) if hole * SUBPAGE <= range.start => return Err(Errno::IO),
            Some(hole) => hole * SUBPAGE,
            None => range.end,
        };
        Ok(self.bytes[range.start as usize..end as usize].to_vec())
    }

    /// A file with soft holes cannot grow until it is repaired (EBUSY). A growth that does not fit
    /// fails with ENOSPC and changes nothing. A growth takes the punched pages in `range` and in
    /// the new part of the file again.
    fn grow(&mut self, range: Range, size: u64, free: u64) -> Outcome {
        let size = size.max(self.size());
        let grown = Range::new(self.size(), size);
        let inside = range.intersect(Range::new(0, size));
        let again = |page: &u64| touching(inside).contains(page) || touching(grown).contains(page);
        let missing: Vec<u64> = self.released.iter().copied().filter(again).collect();
        if missing.is_empty() && grown.is_empty() {
            return Ok(());
        }
        if !self.holes.is_empty() {
            return Err(Errno::BUSY);
        }
        let reserved = self.reserved.max(pages_up(size));
        if reserved - self.reserved + missing.len() as u64 > free {
            return Err(Errno::NOSPC);
        }
        self.reserved = reserved;
        self.released.retain(|page| !missing.contains(page));
        self.bytes.resize(size as usize, 0);
        Ok(())
    }

    /// FALLOC_FL_KEEP_SIZE: the file takes all pages up to the end of `range`. Behind the end of
    /// file, that only changes counts, so quarantined subpages do not forbid it.
    fn reserve(&mut self, range: Range, free: u64) -> Outcome {
        let missing: Vec<u64> =
            self.released.iter().copied().filter(|page| touching(range).contains(page)).collect();
        if missing.iter().any(|page| page * PAGE < self.size()) && !self.holes.is_empty() {
            return Err(Errno::BUSY);
        }
        let reserved = self.reserved.max(pages_up(range.end));
        if reserved - self.reserved + missing.len() as u64 > free {
            return Err(Errno::NOSPC);
        }
        self.reserved = reserved;
        self.released.retain(|page| !missing.contains(page));
        Ok(())
    }

    /// A write repairs a quarantined subpage that it covers whole (up to the end of file). A
    /// subpage that it covers in part ends the write, with EIO if the write starts there.
    fn write(&mut self, offset: u64, length: u64, byte: u8, free: u64) -> Outcome<u64> {
        let mut range = Range::at(offset, length);
        let obstacle =
            self.holes_in(range).into_iter().find(|hole| !range.covers(self.bytes_of(*hole)));
        match obstacle {
            Some(hole) if hole * SUBPAGE <= offset => return Err(Errno::IO),
            Some(hole) => range.end = hole * SUBPAGE,
            None => {}
        }
        self.grow(range, range.end, free)?;
        for hole in self.holes_in(range) {
            self.holes.remove(&hole);
        }
        self.put(range, byte);
        Ok(range.len())
    }

    /// truncate discards a quarantined subpage with its record. While another one stays, the file
    /// cannot give pages back (EBUSY). Pages behind the end are an exception: a truncate to the
    /// present size gives them back.
    fn truncate(&mut self, size: u64, free: u64) -> Outcome {
        if size > self.size() {
            return self.grow(Range::new(0, 0), size, free);
        }
        if size < self.size() {
            if !self.holes_in(Range::new(0, size)).is_empty() {
                return Err(Errno::BUSY);
            }
            self.bytes.truncate(size as usize);
            self.holes.clear();
        }
        self.reserved = self.reserved.min(pages_up(size));
        self.released.retain(|page| *page < pages_up(size));
        Ok(())
    }

    fn fallocate(&mut self, what: Fallocate, range: Range, free: u64) -> Outcome {
        match what {
            Fallocate::Extend => self.grow(range, range.end, free),
            Fallocate::KeepSize => self.reserve(range, free),
            Fallocate::Zero => {
                self.refuse_partial(range)?;
                self.grow(range, range.end, free)?;
                self.zero(range);
                Ok(())
            }
            Fallocate::ZeroKeepSize => {
                self.refuse_partial(range)?;
                self.reserve(range, free)?;
                self.zero(range);
                Ok(())
            }
            Fallocate::Punch => self.punch(range),
        }
    }

    /// EIO if `range` covers a quarantined subpage only in part: such a part cannot be zeroed.
    fn refuse_partial(&self, range: Range) -> Outcome {
        let range = range.intersect(self.extent());
        let covered = self.holes_in(range).iter().all(|hole| range.covers(self.bytes_of(*hole)));
        if covered { Ok(()) } else { Err(Errno::IO) }
    }

    /// Zeroes a range. Quarantined subpages in it are good again.
    fn zero(&mut self, range: Range) {
        let range = range.intersect(self.extent());
        for hole in self.holes_in(range) {
            self.holes.remove(&hole);
        }
        self.put(range, 0);
    }

    /// Gives whole pages back to the pool, unless quarantined subpages elsewhere forbid it (EBUSY).
    /// Zeroes the rest.
    fn punch(&mut self, range: Range) -> Outcome {
        self.refuse_partial(range)?;
        if self.keeps {
            self.zero(range);
            return Ok(());
        }
        let whole = pages_up(range.start)..range.end / PAGE;
        let owned: Vec<u64> = (0..self.reserved)
            .filter(|page| whole.contains(page) && !self.released.contains(page))
            .collect();
        let outside = |hole: &u64| !owned.contains(&(hole * SUBPAGE / PAGE));
        if !owned.is_empty() && self.holes.keys().any(outside) {
            return Err(Errno::BUSY);
        }
        self.released.extend(owned);
        self.zero(range);
        Ok(())
    }

    fn is_released(&self, offset: u64) -> bool {
        self.released.contains(&(offset / PAGE))
    }

    fn is_hole(&self, offset: u64) -> bool {
        offset >= self.size()
            || self.is_released(offset)
            || self.holes.contains_key(&(offset / SUBPAGE))
    }

    /// SEEK_HOLE and SEEK_DATA: quarantined subpages and released pages are holes, all other bytes
    /// are data.
    fn seek(&self, offset: u64, data: bool) -> Outcome<u64> {
        if offset >= self.size() {
            return Err(Errno::NXIO);
        }
        // Within a subpage nothing changes, so the search looks at the start of each subpage.
        let next = |at: u64| (at / SUBPAGE + 1) * SUBPAGE;
        let found = std::iter::successors(Some(offset), |at| Some(next(*at)))
            .find(|at| *at >= self.size() || self.is_hole(*at) != data)
            .expect("the file ends");
        match data {
            true if found >= self.size() => Err(Errno::NXIO),
            _ => Ok(found.min(self.size())),
        }
    }

    /// Rounds a range outward to 4 KiB. EINVAL for a range behind the end of file.
    fn named(&self, offset: u64, length: u64) -> Outcome<Range> {
        let range = Range::at(offset, length);
        let fits = !range.is_empty()
            && offset < self.size()
            && range.end <= self.size().next_multiple_of(SUBPAGE);
        if fits { Ok(range.subpages_out()) } else { Err(Errno::INVAL) }
    }

    fn named_or_all(&self, range: Option<(u64, u64)>) -> Outcome<Range> {
        range.map_or_else(|| Ok(self.extent()), |(offset, length)| self.named(offset, length))
    }

    /// Quarantines a range. EINVAL if a page of it is released: it has no memory. A quarantined
    /// subpage keeps its state.
    fn poison(&mut self, offset: u64, length: u64) -> Outcome {
        let range = self.named(offset, length)?;
        if subpages(range).any(|subpage| self.is_released(subpage * SUBPAGE)) {
            return Err(Errno::INVAL);
        }
        for subpage in subpages(range) {
            let bytes = self.bytes_of(subpage);
            let known = self.bytes[bytes.start as usize..bytes.end as usize].to_vec();
            self.holes.entry(subpage).or_insert(known);
        }
        Ok(())
    }

    /// `zero` gives a subpage zeroed memory; `salvage` gives it all known bytes. ENODATA if there
    /// is nothing to repair.
    fn repair(&mut self, verb: Verb, range: Option<(u64, u64)>) -> Outcome {
        let range = self.named_or_all(range)?;
        let holes = self.holes_in(range);
        if holes.is_empty() {
            return Err(Errno::NODATA);
        }
        for hole in holes {
            let rescued = self.holes.remove(&hole).expect("it was found");
            let range = self.bytes_of(hole);
            let place = &mut self.bytes[range.start as usize..range.end as usize];
            match verb {
                Verb::Zero => place.fill(0),
                Verb::Salvage => place.copy_from_slice(&rescued),
            }
        }
        Ok(())
    }

    /// The answer to a touch of mapped memory: SIGBUS on quarantined subpages, on released pages
    /// and behind the end.
    fn touch(&self, offset: u64) -> Answer {
        let end = self.size().next_multiple_of(SUBPAGE);
        if offset >= end || self.is_released(offset) || self.holes.contains_key(&(offset / SUBPAGE))
        {
            return Answer::Fault;
        }
        if offset < self.size() {
            Answer::Bytes(vec![self.bytes[offset as usize]])
        } else {
            Answer::Anything
        }
    }
}

/// All files, by an id of the model's own.
#[derive(Debug, Default)]
struct Model {
    files: BTreeMap<u64, Contents>,
    next: u64,
    names: [Option<u64>; NAMES],
    slots: [Option<u64>; SLOTS],
    mappings: [Option<u64>; MAPPINGS],
    /// Files keep their punched pages.
    keeps: bool,
}

impl Model {
    fn used(&self) -> u64 {
        self.files.values().map(Contents::pages).sum()
    }

    fn free(&self) -> u64 {
        PAGES - self.used()
    }

    fn quarantined(&self) -> u64 {
        self.files.values().map(|file| file.holes.len() as u64).sum()
    }

    fn named(&self, name: usize) -> Outcome<u64> {
        self.names[name].ok_or(Errno::NOENT)
    }

    /// The file of a name or of a descriptor; EBADF for a descriptor that is not open.
    fn reached(&self, via: Via) -> Outcome<u64> {
        match via {
            Via::Here(name) | Via::There(name) => self.named(name),
            Via::Held(slot) => self.slots[slot].ok_or(Errno::BADF),
        }
    }

    fn file(&mut self, via: Via) -> Outcome<&mut Contents> {
        let id = self.reached(via)?;
        Ok(self.files.get_mut(&id).expect("names lead to files"))
    }

    fn drop_name(&mut self, name: usize) {
        if let Some(id) = self.names[name].take() {
            self.files.get_mut(&id).expect("names lead to files").names -= 1;
        }
    }

    /// Removes unlinked files that have no descriptor and no mapping. Their memory is given back.
    fn bury(&mut self) {
        let held: Vec<u64> = self.slots.iter().chain(&self.mappings).flatten().copied().collect();
        self.files.retain(|id, file| file.names > 0 || held.contains(id));
    }

    fn create(&mut self, name: usize) -> Outcome {
        if self.names[name].is_some() {
            return Err(Errno::EXIST);
        }
        self.files
            .insert(self.next, Contents { names: 1, keeps: self.keeps, ..Contents::default() });
        self.names[name] = Some(self.next);
        self.next += 1;
        Ok(())
    }

    fn link(&mut self, from: usize, to: usize) -> Outcome {
        let id = self.named(from)?;
        if self.names[to].is_some() {
            return Err(Errno::EXIST);
        }
        self.names[to] = Some(id);
        self.files.get_mut(&id).expect("names lead to files").names += 1;
        Ok(())
    }

    /// rename(2): nothing happens if both names belong to one file.
    fn rename(&mut self, from: usize, to: usize) -> Outcome {
        let id = self.named(from)?;
        if self.names[to] != Some(id) {
            self.drop_name(to);
            self.names[to] = self.names[from].take();
        }
        Ok(())
    }

    fn do_op(&mut self, op: &Op) -> Answer {
        let free = self.free();
        let done = |outcome| answer(outcome, |()| Answer::Done);
        let answer = match *op {
            Op::Create(name) => done(self.create(name)),
            Op::Open { slot, name } => done(self.named(name).map(|id| self.slots[slot] = Some(id))),
            Op::Close { slot } => done(self.slots[slot].take().map(drop).ok_or(Errno::BADF)),
            Op::Write { via, offset, length, byte } => answer(
                self.file(via).and_then(|file| file.write(offset, length, byte, free)),
                Answer::Count,
            ),
            Op::Append { via, length, byte } => {
                let write = |file: &mut Contents| file.write(file.size(), length, byte, free);
                answer(self.file(via).and_then(write), Answer::Count)
            }
            Op::Read { via, offset, length } => {
                answer(self.file(via).and_then(|file| file.read(offset, length)), Answer::Bytes)
            }
            Op::Truncate { via, size } => {
                done(self.file(via).and_then(|file| file.truncate(size, free)))
            }
            Op::Fallocate { via, what, offset, length } => {
                let range = Range::at(offset, length);
                done(self.file(via).and_then(|file| file.fallocate(what, range, free)))
            }
            Op::Seek { via, offset, data } => {
                answer(self.file(via).and_then(|file| file.seek(offset, data)), Answer::Count)
            }
            Op::Poison { via, offset, length } => {
                done(self.file(via).and_then(|file| file.poison(offset, length)))
            }
            Op::Repair { via, verb, range } => {
                done(self.file(via).and_then(|file| file.repair(verb, range)))
            }
            Op::Collapse { via, range } => {
                done(self.file(via).and_then(|file| file.named_or_all(range).map(drop)))
            }
            Op::Map { mapping, name } => {
                done(self.named(name).map(|id| self.mappings[mapping] = Some(id)))
            }
            Op::Unmap { mapping } => {
                done(self.mappings[mapping].take().map(drop).ok_or(Errno::BADF))
            }
            Op::Load { mapping, offset } => match self.mappings[mapping] {
                Some(id) => self.files[&id].touch(offset),
                None => Answer::Failed(Errno::BADF),
            },
            Op::Store { mapping, offset, byte } => self.store(mapping, offset, byte),
            Op::Unlink(name) => done(self.named(name).map(|_| self.drop_name(name))),
            Op::Link { from, to } => done(self.link(from, to)),
            Op::Rename { from, to } => done(self.rename(from, to)),
            Op::RenameNoReplace { from, to } => done(match (self.named(from), self.named(to)) {
                (Err(errno), _) => Err(errno),
                (_, Ok(_)) => Err(Errno::EXIST),
                _ => self.rename(from, to),
            }),
            Op::Exchange { from, to } => {
                done(self.named(from).and(self.named(to)).map(|_| self.names.swap(from, to)))
            }
        };
        self.bury();
        answer
    }

    fn store(&mut self, mapping: usize, offset: u64, byte: u8) -> Answer {
        let Some(id) = self.mappings[mapping] else { return Answer::Failed(Errno::BADF) };
        let file = self.files.get_mut(&id).expect("it is mapped");
        match file.touch(offset) {
            Answer::Bytes(_) => file.put(Range::at(offset, 1), byte),
            // A store behind the end never becomes visible, so the file is unchanged.
            Answer::Anything => {}
            other => return other,
        }
        Answer::Done
    }

    /// True if the answer to a touch is certain. A 2 MiB entry maps all of the folio with the end
    /// of file, so behind the last subpage a program may get SIGBUS or not.
    fn is_settled(&self, mapping: usize, offset: u64) -> bool {
        let Some(id) = self.mappings[mapping] else { return true };
        let size = self.files[&id].size();
        !(size.next_multiple_of(SUBPAGE)..size.next_multiple_of(FOLIO)).contains(&offset)
    }
}

// ---- the world ----------------------------------------------------------------------------------

/// A descriptor, opened for one operation or held for longer.
enum Reached<'a> {
    Opened(File),
    Held(&'a File),
}

impl Reached<'_> {
    fn file(&self) -> &File {
        match self {
            Self::Opened(file) => file,
            Self::Held(file) => file,
        }
    }
}

/// The real filesystem, and two processes that use it.
struct World<'a> {
    pool: &'a Pool,
    toucher: &'a mut Toucher,
    slots: [Option<File>; SLOTS],
    mapping: Option<Mapping>,
    toucher_maps: bool,
}

impl<'a> World<'a> {
    fn new(pool: &'a Pool, toucher: &'a mut Toucher) -> Self {
        Self { pool, toucher, slots: [None, None], mapping: None, toucher_maps: false }
    }

    fn path(&self, name: usize) -> PathBuf {
        self.pool.join(format!("f{name}"))
    }

    fn open(&self, name: usize, flags: OFlags) -> Outcome<File> {
        Ok(rustix::fs::open(self.path(name), flags | OFlags::RDWR | OFlags::CLOEXEC, Mode::RUSR)?
            .into())
    }

    fn reach(&self, via: Via, flags: OFlags) -> Outcome<Reached<'_>> {
        match via {
            Via::Here(name) | Via::There(name) => self.open(name, flags).map(Reached::Opened),
            Via::Held(slot) => self.slots[slot].as_ref().map(Reached::Held).ok_or(Errno::BADF),
        }
    }

    /// Asks the other process, if that is the one to act.
    fn ask(
        &mut self,
        via: Via,
        line: impl FnOnce(std::path::Display<'_>) -> String,
    ) -> ControlFlow<Answer> {
        let Via::There(name) = via else { return ControlFlow::Continue(()) };
        let path = self.path(name);
        let answer = self.toucher.ask(&line(path.display()));
        ControlFlow::Break(understood(&answer))
    }

    fn do_op(&mut self, op: &Op) -> Answer {
        match self.do_there(op) {
            ControlFlow::Break(answer) => answer,
            ControlFlow::Continue(()) => self.do_here(op),
        }
    }

    fn do_there(&mut self, op: &Op) -> ControlFlow<Answer> {
        match *op {
            Op::Write { via, offset, length, byte } => {
                self.ask(via, |path| format!("pwrite {path} {offset} {length} {byte}"))
            }
            Op::Append { via, length, byte } => {
                self.ask(via, |path| format!("append {path} {length} {byte}"))
            }
            Op::Read { via, offset, length } => {
                self.ask(via, |path| format!("pread {path} {offset} {length}"))
            }
            Op::Truncate { via, size } => self.ask(via, |path| format!("truncate {path} {size}")),
            Op::Fallocate { via, what, offset, length } => {
                let mode = mode_of(what).bits();
                self.ask(via, |path| format!("fallocate {path} {mode} {offset} {length}"))
            }
            Op::Map { mapping: 1, name } => {
                let answer = self
                    .toucher
                    .ask(&format!("map {} 0 {MAPPED} shared rw", self.path(name).display()));
                self.toucher_maps |= answer == "ok";
                ControlFlow::Break(if answer.contains("(os error 2)") {
                    Answer::Failed(Errno::NOENT)
                } else {
                    understood(&answer)
                })
            }
            Op::Unmap { mapping: 1 } if self.toucher_maps => {
                self.toucher_maps = false;
                ControlFlow::Break(understood(&self.toucher.ask("unmap")))
            }
            Op::Load { mapping: 1, offset } if self.toucher_maps => {
                ControlFlow::Break(understood(&self.toucher.ask(&format!("load {offset}"))))
            }
            Op::Store { mapping: 1, offset, byte } if self.toucher_maps => {
                ControlFlow::Break(understood(&self.toucher.ask(&format!("store {offset} {byte}"))))
            }
            Op::Unmap { mapping: 1 }
            | Op::Load { mapping: 1, .. }
            | Op::Store { mapping: 1, .. } => ControlFlow::Break(Answer::Failed(Errno::BADF)),
            _ => ControlFlow::Continue(()),
        }
    }

    fn do_here(&mut self, op: &Op) -> Answer {
        let done = |outcome| answer(outcome, |()| Answer::Done);
        match *op {
            Op::Create(name) => done(self.open(name, OFlags::CREATE | OFlags::EXCL).map(drop)),
            Op::Open { slot, name } => {
                done(self.open(name, OFlags::empty()).map(|file| self.slots[slot] = Some(file)))
            }
            Op::Close { slot } => done(self.slots[slot].take().map(drop).ok_or(Errno::BADF)),
            Op::Write { via, offset, length, byte } => {
                let bytes = vec![byte; length as usize];
                let written = self.with(via, |file| rustix::io::pwrite(file, &bytes, offset));
                answer(written, |count| Answer::Count(count as u64))
            }
            Op::Append { via, length, byte } => {
                answer(self.append(via, length, byte), Answer::Count)
            }
            Op::Read { via, offset, length } => {
                answer(self.with(via, |file| read(file, offset, length)), Answer::Bytes)
            }
            Op::Truncate { via, size } => {
                done(self.with(via, |file| rustix::fs::ftruncate(file, size)))
            }
            Op::Fallocate { via, what, offset, length } => done(
                self.with(via, |file| rustix::fs::fallocate(file, mode_of(what), offset, length)),
            ),
            Op::Seek { via, offset, data } => {
                answer(self.with(via, |file| seek(file, offset, data)), Answer::Count)
            }
            Op::Poison { via, offset, length } => {
                done(self.poison(via, &format!("{offset} {length}")))
            }
            Op::Repair { via, verb, range } => {
                let verb = match verb {
                    Verb::Zero => "zero",
                    Verb::Salvage => "salvage",
                };
                done(self.set(via, REPAIR, &format!("{verb} {}", target(range))))
            }
            Op::Collapse { via, range } => done(match self.set(via, COLLAPSE, &target(range)) {
                // The kernel may be unable to at the moment. Nothing depends on it.
                Err(Errno::BUSY) => Ok(()),
                outcome => outcome,
            }),
            Op::Map { name, .. } => done(self.open(name, OFlags::empty()).map(|file| {
                let range = Range::new(0, MAPPED);
                self.mapping = Some(
                    Mapping::new(&file, range, Sharing::Shared, true).expect("it can be mapped"),
                );
            })),
            Op::Unmap { .. } => done(self.mapping.take().map(drop).ok_or(Errno::BADF)),
            Op::Load { offset, .. } => {
                match self.mapping.as_ref().map(|mapping| mapping.load(offset)) {
                    None => Answer::Failed(Errno::BADF),
                    Some(Ok(byte)) => Answer::Bytes(vec![byte]),
                    Some(Err(_)) => Answer::Fault,
                }
            }
            Op::Store { offset, byte, .. } => {
                match self.mapping.as_ref().map(|mapping| mapping.store(offset, byte)) {
                    None => Answer::Failed(Errno::BADF),
                    Some(Ok(())) => Answer::Done,
                    Some(Err(_)) => Answer::Fault,
                }
            }
            Op::Unlink(name) => done(rustix::fs::unlink(self.path(name))),
            Op::Link { from, to } => {
                done(rustix::fs::linkat(CWD, self.path(from), CWD, self.path(to), AtFlags::empty()))
            }
            Op::Rename { from, to } => done(self.rename(from, to, RenameFlags::empty())),
            Op::RenameNoReplace { from, to } => done(self.rename(from, to, RenameFlags::NOREPLACE)),
            Op::Exchange { from, to } => done(self.rename(from, to, RenameFlags::EXCHANGE)),
        }
    }

    fn with<T>(&self, via: Via, run: impl FnOnce(&File) -> Outcome<T>) -> Outcome<T> {
        self.reach(via, OFlags::empty()).and_then(|reached| run(reached.file()))
    }

    /// Sets O_APPEND for the time of the write if the descriptor is a held one.
    fn append(&self, via: Via, length: u64, byte: u8) -> Outcome<u64> {
        let reached = self.reach(via, OFlags::APPEND)?;
        rustix::fs::fcntl_setfl(reached.file(), OFlags::APPEND)?;
        let written = rustix::io::write(reached.file(), &vec![byte; length as usize]);
        rustix::fs::fcntl_setfl(reached.file(), OFlags::empty())?;
        written.map(|count| count as u64)
    }

    fn set(&self, via: Via, name: &str, value: &str) -> Outcome {
        self.with(via, |file| {
            rustix::fs::fsetxattr(file, name, value.as_bytes(), XattrFlags::empty())
        })
    }

    /// Quarantines a range. If punched memory is missing (EBUSY), fills it first: the model does
    /// not know the gaps that touches have filled.
    fn poison(&self, via: Via, value: &str) -> Outcome {
        match self.set(via, POISON, value) {
            Err(Errno::BUSY) => {
                self.with(via, |file| {
                    let (map, size) =
                        (crate::value(file, MAP), rustix::fs::fstat(file)?.st_size as u64);
                    assert!(map.contains(" punched -"), "{map}");
                    rustix::fs::fallocate(file, FallocateFlags::KEEP_SIZE, 0, size)
                })?;
                self.set(via, POISON, value)
            }
            outcome => outcome,
        }
    }

    fn rename(&self, from: usize, to: usize, flags: RenameFlags) -> Outcome {
        rustix::fs::renameat_with(CWD, self.path(from), CWD, self.path(to), flags)
    }
}

fn target(range: Option<(u64, u64)>) -> String {
    range.map_or_else(|| "all".to_owned(), |(offset, length)| format!("{offset:#x} {length}"))
}

fn mode_of(what: Fallocate) -> FallocateFlags {
    match what {
        Fallocate::Extend => FallocateFlags::empty(),
        Fallocate::KeepSize => FallocateFlags::KEEP_SIZE,
        Fallocate::Punch => FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
        Fallocate::Zero => FallocateFlags::ZERO_RANGE,
        Fallocate::ZeroKeepSize => FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE,
    }
}

fn read(file: &File, offset: u64, length: u64) -> Outcome<Vec<u8>> {
    let mut buffer = vec![0xee; length as usize];
    let count = rustix::io::pread(file, &mut buffer[..], offset)?;
    buffer.truncate(count);
    Ok(buffer)
}

fn seek(file: &File, offset: u64, data: bool) -> Outcome<u64> {
    rustix::fs::seek(file, if data { SeekFrom::Data(offset) } else { SeekFrom::Hole(offset) })
}

/// Reads an answer of the toucher.
fn understood(line: &str) -> Answer {
    let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
    let number = || rest.parse::<u64>().unwrap_or_else(|_| panic!("the toucher said {line:?}"));
    match word {
        "ok" => Answer::Done,
        "count" => Answer::Count(number()),
        "byte" => Answer::Bytes(vec![number() as u8]),
        "sigbus" => Answer::Fault,
        "errno" => Answer::Failed(Errno::from_raw_os_error(number() as i32)),
        "runs" => Answer::Bytes(rest.split_ascii_whitespace().flat_map(run).collect()),
        _ => panic!("the toucher said {line:?}"),
    }
}

fn run(text: &str) -> Vec<u8> {
    let (count, byte) = text.split_once(':').expect("count and byte");
    vec![byte.parse().expect("a byte"); count.parse().expect("a count")]
}

// ---- comparing ----------------------------------------------------------------------------------

type Verdict = Result<(), TestCaseError>;

fn agree<T: PartialEq + std::fmt::Debug>(what: &str, real: &T, model: &T) -> Verdict {
    if real == model {
        return Ok(());
    }
    let short = |value: &T| {
        let text = format!("{value:?}");
        if text.len() > 300 { format!("{} ...", &text[..300]) } else { text }
    };
    Err(TestCaseError::fail(format!(
        "{what}: it is {}, and the model says {}",
        short(real),
        short(model)
    )))
}

impl World<'_> {
    /// Compares all that programs see of every file and of the pool.
    fn compare(&self, model: &Model, around: Option<u64>) -> Verdict {
        self.compare_pool(model)?;
        for (slot, id) in model.slots.iter().enumerate() {
            if let (Some(file), Some(id)) = (&self.slots[slot], id) {
                compare_file(file, &model.files[id], around)?;
            }
        }
        for (name, id) in model.names.iter().enumerate() {
            match (self.open(name, OFlags::empty()), id) {
                (Ok(file), Some(id)) => compare_file(&file, &model.files[id], around)?,
                (found, id) => {
                    agree("an open", &found.err(), &id.is_none().then_some(Errno::NOENT))?
                }
            }
        }
        Ok(())
    }

    /// Waits for the pages of removed files: the kernel forgets a file at a moment of its own.
    fn compare_pool(&self, model: &Model) -> Verdict {
        let wanted = [model.free(), model.used(), model.quarantined()];
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            let counters = self.pool.counters();
            let found = ["pages_free", "pages_used", "quarantined_soft"].map(|name| counters[name]);
            if found == wanted || Instant::now() > deadline {
                return agree("pages_free, pages_used, quarantined_soft", &found, &wanted);
            }
            std::thread::yield_now();
        }
    }
}

fn compare_file(file: &File, model: &Contents, around: Option<u64>) -> Verdict {
    let stat = rustix::fs::fstat(file).expect("an open file");
    agree("st_size", &(stat.st_size as u64), &model.size())?;
    agree("st_blocks", &(stat.st_blocks as u64), &model.blocks())?;
    agree("st_nlink", &(stat.st_nlink as u64), &model.names)?;
    compare_poison(file, model)?;
    let Some(around) = around else { return Ok(()) };
    let from = around.saturating_sub(SUBPAGE);
    agree("read around", &read(file, from, 3 * SUBPAGE), &model.read(from, 3 * SUBPAGE))
}

/// The value of an attribute; empty if there is none.
fn value(file: impl AsFd, name: &str) -> String {
    let mut value = vec![0; 64 << 10];
    match rustix::fs::fgetxattr(file, name, &mut value[..]) {
        Ok(length) => String::from_utf8_lossy(&value[..length]).into_owned(),
        Err(Errno::NODATA) => String::new(),
        Err(errno) => panic!("{name}: {errno}"),
    }
}

/// The range at the start of an attribute's line, and the word behind it.
fn extent(line: &str) -> (Range, String) {
    let mut words = line.split_ascii_whitespace();
    let mut number = || u64::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok();
    let (start, length) = (number().expect("an offset"), number().expect("a length"));
    (Range::at(start, length), words.next().expect("a word").to_owned())
}

fn compare_poison(file: &File, model: &Contents) -> Verdict {
    let text = value(file, POISON);
    let found: Vec<u64> = text.lines().flat_map(|line| subpages(extent(line).0)).collect();
    agree("poison", &found, &model.holes.keys().copied().collect())?;
    let mut names = vec![0; 64 << 10];
    let length = rustix::fs::flistxattr(file, &mut names[..]).expect("an open file");
    let listed = names[..length].split(|byte| *byte == 0).any(|name| name == POISON.as_bytes());
    agree("poison is listed", &listed, &!model.holes.is_empty())
}

/// Compares every byte, every hole and every part of the map.
fn compare_whole(file: &File, model: &Contents) -> Verdict {
    compare_file(file, model, None)?;
    let mut at = 0;
    while at <= model.size() {
        const PIECE: u64 = 1 << 20;
        let found = read(file, at, PIECE);
        let wanted = model.read(at, PIECE);
        if found != wanted {
            let differs = found
                .iter()
                .flatten()
                .zip(wanted.iter().flatten())
                .position(|(one, other)| one != other);
            agree(&format!("read at {at:#x}, which differs at {differs:?}"), &found, &wanted)?;
        }
        at = match found {
            Ok(bytes) if bytes.is_empty() => break,
            Ok(bytes) => at + bytes.len() as u64,
            Err(_) => (at / SUBPAGE + 1) * SUBPAGE,
        };
    }
    compare_seeks(file, model)?;
    compare_map(file, model)
}

fn compare_seeks(file: &File, model: &Contents) -> Verdict {
    let mut at = 0;
    for data in [true, false].into_iter().cycle() {
        let found = seek(file, at, data);
        agree(&format!("seek from {at:#x}, data {data}"), &found, &model.seek(at, data))?;
        match found {
            Ok(next) => at = next,
            Err(_) => break,
        }
    }
    Ok(())
}

fn compare_map(file: &File, model: &Contents) -> Verdict {
    let mut end = 0;
    for (range, state) in value(file, MAP).lines().map(extent) {
        agree("the map has no gaps", &range.start, &end)?;
        end = range.end;
        let wanted = |subpage: u64| match model.is_released(subpage * SUBPAGE) {
            true => "released",
            false if model.holes.contains_key(&subpage) => "poisoned",
            false => "memory",
        };
        let is_memory = state == "huge" || state == "small" || (model.keeps && state == "punched");
        let found = if is_memory { "memory" } else { &state };
        for subpage in subpages(range) {
            agree(&format!("the map at {:#x}", subpage * SUBPAGE), &found, &wanted(subpage))?;
        }
    }
    agree("the map's end", &end, &model.size().next_multiple_of(SUBPAGE))
}

// ---- the property -------------------------------------------------------------------------------

/// The place of the bytes that an operation leaves.
fn place(op: &Op) -> Option<u64> {
    match *op {
        Op::Write { offset, .. } | Op::Store { offset, .. } | Op::Poison { offset, .. } => {
            Some(offset)
        }
        Op::Fallocate { offset, .. } => Some(offset),
        Op::Truncate { size, .. } if size < ABSURD => Some(size),
        Op::Repair { range: Some((offset, _)), .. } => Some(offset),
        _ => None,
    }
}

fn follow(world: &mut World<'_>, ops: &[Op], keeps: bool) -> Verdict {
    let mut model = Model { keeps, ..Model::default() };
    for (n, op) in ops.iter().enumerate() {
        if let Op::Load { mapping, offset } | Op::Store { mapping, offset, .. } = *op
            && !model.is_settled(mapping, offset)
        {
            continue;
        }
        let wanted = model.do_op(op);
        let found = world.do_op(op);
        let at_step =
            |error: TestCaseError| TestCaseError::fail(format!("step {n}, {op:?}: {error}"));
        match (&wanted, &found) {
            (Answer::Anything, Answer::Bytes(_)) => {}
            _ => agree("the answer", &found, &wanted).map_err(at_step)?,
        }
        world.compare(&model, place(op)).map_err(at_step)?;
    }
    for (name, id) in model.names.iter().enumerate() {
        if let Some(id) = id {
            let file = world.open(name, OFlags::empty()).expect("it was compared before");
            compare_whole(&file, &model.files[id])?;
        }
    }
    agree(
        "the check",
        &value(File::open(world.pool.path()).expect("the root"), support::CHECK),
        &String::new(),
    )
}

/// Leaves the pool as it was before the sequence: all pages free.
fn clean(mut world: World<'_>) -> Verdict {
    world.slots = [None, None];
    world.mapping = None;
    if world.toucher_maps {
        world.toucher.ask("unmap");
    }
    for name in 0..NAMES {
        // After most sequences only some of the names exist.
        let _ = rustix::fs::unlink(world.path(name));
    }
    world.compare_pool(&Model::default())
}

/// A pool and a toucher for many sequences. After a failed sequence they are in an unknown state,
/// so the next one gets new ones.
struct Stage {
    props: Option<(Pool, Toucher)>,
    /// The pool is mounted with `punch=keep`.
    keeps: bool,
}

impl Stage {
    fn set_up(&self) -> (Pool, Toucher) {
        let punch = if self.keeps { "keep" } else { "release" };
        let pool = Pool::mount(&format!("pagesize=2M,size={},punch={punch}", PAGES * FOLIO));
        (pool, Toucher::start())
    }

    fn play(&mut self, ops: &[Op]) -> Verdict {
        let (pool, mut toucher) = self.props.take().unwrap_or_else(|| self.set_up());
        let mut world = World::new(&pool, &mut toucher);
        let verdict = follow(&mut world, ops, self.keeps);
        let verdict = verdict.and(clean(world));
        if verdict.is_ok() {
            self.props = Some((pool, toucher));
        } else {
            eprintln!("{}", pool.log());
            drop(toucher);
        }
        verdict
    }
}

fn number_from_environment(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn any_sequence_of_operations_does_what_the_model_says() {
    play_all(false);
}

#[test]
fn with_punched_pages_kept_operations_do_what_the_model_says() {
    play_all(true);
}

fn play_all(keeps: bool) {
    const CASES: u32 = 200;
    let cases = number_from_environment("PROPTEST_CASES").map_or(CASES, |cases| cases as u32);
    let seed = number_from_environment("MODEL_SEED").unwrap_or_else(|| {
        RandomState::new().build_hasher().finish() // the standard library seeds this at random
    });
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let config =
        Config { cases, failure_persistence: None, max_shrink_iters: 2000, ..Config::default() };
    let mut runner =
        TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
    let stage = RefCell::new(Stage { props: None, keeps });
    match runner.run(&sequence(), |ops| stage.borrow_mut().play(&ops)) {
        Ok(()) => {}
        Err(TestError::Fail(why, ops)) => {
            let steps = ops
                .iter()
                .enumerate()
                .fold(String::new(), |text, (n, op)| text + &format!("  {n}: {op:?}\n"));
            panic!("{why}\nby\n{steps}MODEL_SEED={seed} repeats it")
        }
        Err(TestError::Abort(why)) => panic!("{why}"),
    }
    let last = stage.borrow_mut().props.take();
    if let Some((pool, toucher)) = last {
        drop(toucher);
        pool.check();
        pool.unmount();
    }
}
