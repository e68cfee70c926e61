//! Operations, and the strategies that generate them.

use super::*;

/// The process that uses a file, and its way to the file.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Via {
    /// This process, by name.
    Here(usize),
    /// The other process, by name.
    There(usize),
    /// This process, by a descriptor that it opened in an earlier operation.
    Held(usize),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fallocate {
    Extend,
    KeepSize,
    Punch,
    Zero,
    ZeroKeepSize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verb {
    Zero,
    Salvage,
}

#[derive(Clone, Debug)]
pub(crate) enum Op {
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

pub(crate) fn name() -> impl Strategy<Value = usize> {
    0..NAMES
}

pub(crate) fn via() -> impl Strategy<Value = Via> {
    prop_oneof![
        4 => name().prop_map(Via::Here),
        3 => name().prop_map(Via::There),
        2 => (0..SLOTS).prop_map(Via::Held),
    ]
}

/// Offsets near boundaries: starts of pages and of subpages, and the first few of both.
pub(crate) fn offset() -> impl Strategy<Value = u64> {
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

pub(crate) fn short() -> impl Strategy<Value = u64> {
    prop_oneof![
        3 => 1..64u64,
        3 => (1..5u64).prop_map(|subpages| subpages * SUBPAGE),
        2 => 1..5 * SUBPAGE,
    ]
}

/// Lengths of reads: the daemon delivers more than 64 KiB in another way than less.
pub(crate) fn readable() -> impl Strategy<Value = u64> {
    prop_oneof![3 => short(), 2 => (60u64 << 10)..2 * PAGE]
}

pub(crate) fn size() -> impl Strategy<Value = u64> {
    prop_oneof![20 => offset(), 1 => Just(ABSURD), 1 => Just(9 * PAGE)]
}

pub(crate) fn length() -> impl Strategy<Value = u64> {
    prop_oneof![
        6 => short(),
        6 => (1..4u64).prop_map(|pages| pages * PAGE),
        3 => 1..3 * PAGE,
        1 => Just(ABSURD),
    ]
}

pub(crate) fn fallocate() -> impl Strategy<Value = Fallocate> {
    prop_oneof![
        2 => Just(Fallocate::Extend),
        3 => Just(Fallocate::KeepSize),
        5 => Just(Fallocate::Punch),
        2 => Just(Fallocate::Zero),
        2 => Just(Fallocate::ZeroKeepSize),
    ]
}

/// Ranges for quarantines and repairs: mostly inside of files, and a few subpages at most.
pub(crate) fn damage() -> impl Strategy<Value = (u64, u64)> {
    let place = (0..3u64, prop_oneof![3 => 0..6u64, 1 => 508..512u64])
        .prop_map(|(page, subpage)| page * PAGE + subpage * SUBPAGE);
    let length = prop_oneof![8 => Just(1), 4 => 1..3 * SUBPAGE, 1 => Just(0)];
    (place, length)
}

pub(crate) fn area() -> impl Strategy<Value = Option<(u64, u64)>> {
    prop_oneof![2 => Just(None), 3 => damage().prop_map(Some), 1 => (offset(), length()).prop_map(Some)]
}

pub(crate) fn verb() -> impl Strategy<Value = Verb> {
    prop_oneof![Just(Verb::Zero), Just(Verb::Salvage)]
}

pub(crate) fn contents() -> impl Strategy<Value = Op> {
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

pub(crate) fn quarantine() -> impl Strategy<Value = Op> {
    prop_oneof![
        5 => (via(), damage()).prop_map(|(via, (offset, length))| Op::Poison { via, offset, length }),
        3 => (via(), verb(), area()).prop_map(|(via, verb, range)| Op::Repair { via, verb, range }),
        1 => (via(), area()).prop_map(|(via, range)| Op::Collapse { via, range }),
    ]
}

pub(crate) fn mapped() -> impl Strategy<Value = Op> {
    let mapping = || 0..MAPPINGS;
    prop_oneof![
        3 => (mapping(), name()).prop_map(|(mapping, name)| Op::Map { mapping, name }),
        1 => mapping().prop_map(|mapping| Op::Unmap { mapping }),
        4 => (mapping(), offset()).prop_map(|(mapping, offset)| Op::Load { mapping, offset }),
        4 => (mapping(), offset(), 1..=255u8)
            .prop_map(|(mapping, offset, byte)| Op::Store { mapping, offset, byte }),
    ]
}

pub(crate) fn names() -> impl Strategy<Value = Op> {
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

pub(crate) fn sequence() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![12 => contents(), 5 => quarantine(), 6 => mapped(), 5 => names()];
    // Most sequences start with files; otherwise half of the operations would find no file.
    let start = prop_oneof![1 => Just(vec![]), 8 => Just(vec![Op::Create(0), Op::Create(1)])];
    (start, prop::collection::vec(op, 1..50)).prop_map(|(mut ops, rest)| {
        ops.extend(rest);
        ops
    })
}
