//! Tests on real superblocks. They need root and nothing else. No mount is visible to other
//! programs.

use super::*;
use crate::sys::policy::{self, Policy};
use crate::sys::sigbus::Touchable;
use memmap2::{MmapOptions, MmapRaw};
use rustix::pipe::{SpliceFlags, splice};
use std::io::{PipeReader, PipeWriter};
use std::sync::atomic::Ordering;

const TIME: u64 = 1_800_000_000;

fn lost(sealed: &Sealed) -> Vec<Subpage> {
    sealed.lost_in(Range::new(0, sealed.size())).collect()
}

/// Opens the file as another process would.
fn open_again(sealed: &Sealed) -> Sealed {
    let mut again = Sealed::open(sealed.reach, sealed.mount().unwrap()).unwrap();
    again.resume(std::iter::empty()).unwrap();
    again
}

fn folios(count: u64) -> Range {
    Range::new(0, count * FOLIO_SIZE)
}

/// A file of `size` bytes. Each byte is its offset modulo 251.
fn sealed(size: u64) -> Sealed {
    let mut sealed = Sealed::create(Reach::Programs, None).expect("root makes superblocks");
    sealed.take(Range::new(0, size).folios_out(), size).unwrap();
    let bytes: Vec<u8> = (0..size).map(|offset| (offset % 251) as u8).collect();
    assert_eq!(tmpfs::write_at(&sealed.data, &bytes, 0).unwrap() as u64, size);
    sealed
}

fn map(sealed: &Sealed, range: Range) -> MmapRaw {
    MmapOptions::new().offset(range.start).len(range.len() as usize).map_raw(&sealed.data).unwrap()
}

/// The file as a program maps it.
pub(super) fn mapped(sealed: &Sealed, range: Range) -> Touchable {
    Touchable::new(map(sealed, range), range.start).unwrap()
}

/// Keeps the page at `offset` in a pipe, so that its folio has a user more than the kernel can
/// account for (mm/shmem.c, shmem_file_splice_read).
pub(super) fn pinned(sealed: &Sealed, mut offset: u64) -> (PipeReader, PipeWriter) {
    let (reader, writer) = std::io::pipe().unwrap();
    let count = splice(&sealed.data, Some(&mut offset), &writer, None, 1, SpliceFlags::empty());
    assert_eq!(count, Ok(1));
    (reader, writer)
}

/// Does to the file what MADV_REMOVE of a program does (mm/madvise.c, madvise_remove).
fn remove(sealed: &Sealed, range: Range) {
    tmpfs::punch(&sealed.data, range).unwrap();
}

fn assert_sealed(sealed: &Sealed) {
    assert_eq!(sealed.check().unwrap(), Vec::<String>::new());
    let meant = sealed.folio_count() * SUBPAGES_PER_FOLIO - sealed.holes().count();
    assert_eq!(tmpfs::blocks_taken(&sealed.data).unwrap(), meant);
    let past_everything = Range::at((sealed.folios.len() as u64 + 1) * FOLIO_SIZE, SUBPAGE_SIZE);
    assert!(
        matches!(tmpfs::allocate(&sealed.data, past_everything), Err(Error::Full)),
        "a block is free"
    );
}

fn assert_unchanged(sealed: &Sealed, range: Range) {
    let mut bytes = vec![0; range.len() as usize];
    tmpfs::read_at(&sealed.data, &mut bytes, range.start).unwrap();
    let wrong =
        bytes.iter().zip(range.start..).position(|(byte, offset)| *byte != (offset % 251) as u8);
    assert_eq!(wrong, None, "in {range}");
}

fn huge_bytes(sealed: &Sealed) -> u64 {
    let ranges = sealed.huge_ranges(Range::new(0, sealed.size())).unwrap();
    ranges.iter().map(|range| range.len()).sum()
}

#[test]
fn what_came_in_small_pages_is_gathered() {
    let sealed = sealed(2 * FOLIO_SIZE);
    for subpage in Folio(1).range().steps(SUBPAGE_SIZE) {
        let bytes: Vec<u8> =
            (subpage.start..subpage.end).map(|offset| (offset % 251) as u8).collect();
        tmpfs::punch(&sealed.data, subpage).unwrap();
        tmpfs::write_all_at(&sealed.data, &bytes, subpage.start).unwrap();
    }
    assert_eq!(huge_bytes(&sealed), FOLIO_SIZE, "one folio was to be in small pages");
    Window::new(&sealed.data, folios(2)).unwrap().gather(folios(2));
    assert_eq!(huge_bytes(&sealed), 2 * FOLIO_SIZE);
    assert_unchanged(&sealed, folios(2));
    assert_sealed(&sealed);
}

/// The policy of a mapping, from its line `ADDRESS POLICY ...` in numa_maps.
fn policy_of(map: &MmapRaw) -> String {
    let maps = std::fs::read_to_string("/proc/self/numa_maps").expect("a kernel with CONFIG_NUMA");
    let address = format!("{:x} ", map.as_ptr() as usize);
    let line = maps.lines().find_map(|line| line.trim_start_matches('0').strip_prefix(&address));
    line.and_then(|line| line.split(' ').next()).expect("it is mapped").to_owned()
}

#[test]
fn a_policy_of_a_program_waits_while_memory_is_taken() {
    let mut sealed = sealed(FOLIO_SIZE);
    let behind = Range::at(FOLIO_SIZE, FOLIO_SIZE);
    let map = map(&sealed, behind);
    let set = |policy| policy::set_for_range(map.as_ptr() as usize, map.len(), policy).unwrap();
    set(Policy::Bind(NumaNode(0)));
    let aside = sealed.set_policies_aside(behind);
    assert_eq!(policy_of(&map), "default");
    drop(aside);
    assert_eq!(policy_of(&map), "bind:0");
    let aside = sealed.set_policies_aside(behind);
    set(Policy::Prefer(NumaNode(0)));
    drop(aside);
    assert_eq!(policy_of(&map), "prefer:0", "the newer one stays");
    sealed.take(behind, 2 * FOLIO_SIZE).unwrap();
    let place = Subpage::containing(behind.start);
    sealed.quarantine(place.range(), TIME).unwrap();
    sealed.repair(place.range(), Content::Zero).unwrap();
    assert_eq!(policy_of(&map), "prefer:0");
}

/// The machine of this test has a node 0, and may have others.
#[test]
fn memory_tells_the_node_on_which_it_lies() {
    let mut reserve = Sealed::create(Reach::Private, Some(NumaNode(0))).unwrap();
    reserve.take(folios(3), 3 * FOLIO_SIZE).unwrap();
    let last = Range::at(2 * FOLIO_SIZE, FOLIO_SIZE);
    let on = |range, node| reserve.bytes_elsewhere(range, NumaNode(node)).unwrap();
    assert_eq!((on(folios(3), 0), on(last, 0)), (0, 0));
    assert_eq!((on(folios(3), 1), on(last, 1)), (3 * FOLIO_SIZE, FOLIO_SIZE));
    assert_sealed(&reserve);
}

#[test]
fn what_came_in_small_pages_is_put_into_folios() {
    let mut reserve = Sealed::create(Reach::Private, None).expect("root makes superblocks");
    reserve.take(folios(4), 4 * FOLIO_SIZE).unwrap();
    for subpage in Folio(2).range().steps(SUBPAGE_SIZE) {
        tmpfs::punch(&reserve.data, subpage).unwrap();
        tmpfs::allocate(&reserve.data, subpage).unwrap();
    }
    let whole: u64 = reserve.huge_ranges(folios(4)).unwrap().iter().map(|range| range.len()).sum();
    assert_eq!(whole, 3 * FOLIO_SIZE, "one folio was to be in small pages");
    assert_eq!(reserve.collapse_untouched().unwrap(), 4);
    assert_sealed(&reserve);
}

#[test]
fn no_block_is_free_whatever_is_done() {
    let mut sealed = sealed(2 * FOLIO_SIZE + 5000);
    assert_sealed(&sealed);
    sealed.quarantine(Subpage(0).range(), TIME).unwrap();
    sealed.quarantine(Subpage(1).range(), TIME).unwrap();
    sealed.quarantine(Subpage(700).range(), TIME).unwrap();
    assert_sealed(&sealed);
    sealed.repair(Subpage(0).range(), Content::Zero).unwrap();
    assert_sealed(&sealed);
    sealed.give(Folio(1).range()).unwrap();
    assert_sealed(&sealed);
    assert_eq!(lost(&sealed), [Subpage(1)]);
    let size = sealed.size();
    sealed.take(Folio(1).range(), size).unwrap();
    assert_sealed(&sealed);
    sealed.take(Range::at(3 * FOLIO_SIZE, FOLIO_SIZE), 3 * FOLIO_SIZE + 1).unwrap();
    assert_sealed(&sealed);
    for size in [3 * FOLIO_SIZE, 2 * FOLIO_SIZE + 1, FOLIO_SIZE - 4095, SUBPAGE_SIZE, 0] {
        sealed.cut(size).unwrap();
        assert_sealed(&sealed);
    }
    assert_eq!((sealed.folio_count(), sealed.holes().count()), (0, 0));
}

#[test]
fn a_hole_cannot_be_filled_by_a_touch_a_write_or_an_allocation() {
    let mut sealed = sealed(FOLIO_SIZE);
    let mapping = mapped(&sealed, folios(1));
    sealed.quarantine(Subpage(5).range(), TIME).unwrap();
    assert!(
        mapping.load(5 * SUBPAGE_SIZE).is_err() && mapping.store(5 * SUBPAGE_SIZE + 7, 1).is_err()
    );
    assert!(matches!(tmpfs::write_at(&sealed.data, &[1], 5 * SUBPAGE_SIZE), Err(Error::Full)));
    assert!(matches!(tmpfs::allocate(&sealed.data, Subpage(5).range()), Err(Error::Full)));
    assert_eq!(mapping.walk().len(), 1);
    assert_sealed(&sealed);
}

#[test]
fn what_is_quarantined_is_known_to_whoever_opens_the_file_next() {
    let mut sealed = sealed(2 * FOLIO_SIZE + 5000);
    sealed.update(|header| header.owned_pages = 7).unwrap();
    for (n, subpage) in [3, 4, 511, 512, 1025].into_iter().enumerate() {
        sealed.quarantine(Subpage(subpage).range(), TIME + n as u64).unwrap();
    }
    sealed.repair(Subpage(4).range(), Content::Zero).unwrap();
    sealed.repair(Subpage(511).range(), Content::Zero).unwrap();
    sealed.quarantine(Subpage(100).range(), TIME + 9).unwrap();

    let mut again = open_again(&sealed);
    assert_eq!(again.holes(), sealed.holes());
    assert_eq!(again.header(), Header { owned_pages: 7, alarm: true, undo_size: None });
    assert_eq!((again.size(), again.folio_count()), (sealed.size(), sealed.folio_count()));
    assert_sealed(&again);
    drop(sealed);
    for subpage in lost(&again) {
        again.repair(subpage.range(), Content::Known).unwrap();
        assert_unchanged(&again, subpage.range().intersect(Range::new(0, again.size())));
    }
    assert_unchanged(&again, Range::new(5 * SUBPAGE_SIZE, 511 * SUBPAGE_SIZE));
    assert_unchanged(&again, Range::new(FOLIO_SIZE, again.size()));
    assert_sealed(&again);
}

#[test]
fn a_wholly_quarantined_folio_still_belongs_to_the_file() {
    let mut sealed = sealed(FOLIO_SIZE);
    for subpage in (0..SUBPAGES_PER_FOLIO).map(Subpage) {
        sealed.quarantine(subpage.range(), TIME).unwrap();
    }
    assert_sealed(&sealed);
    let mut again = open_again(&sealed);
    assert!(again.has_memory(Folio(0)));
    assert_sealed(&again);
    drop(sealed);
    again.repair(folios(1), Content::Known).unwrap();
    again.collapse(Folio(0)).unwrap();
    assert_eq!(again.huge_ranges(folios(1)).unwrap(), [folios(1)]);
    assert_unchanged(&again, folios(1));
    assert_sealed(&again);
}

#[test]
fn a_hole_that_took_a_free_block_is_found_and_shut() {
    let mut sealed = sealed(2 * FOLIO_SIZE);
    sealed.quarantine(Subpage(5).range(), TIME).unwrap();
    sealed.quarantine(Subpage(900).range(), TIME).unwrap();
    let mapping = mapped(&sealed, folios(2));
    assert_eq!(sealed.shut_strays().unwrap(), 0);
    // As if a program touched one hole in the middle of the repair of the other.
    sealed.set_limit(1).unwrap();
    assert_eq!(mapping.load(Subpage(5).offset()), Ok(0));
    assert_ne!(sealed.check().unwrap(), Vec::<String>::new());
    let before = STRAYS_SHUT.load(Ordering::Relaxed);
    assert_eq!(sealed.shut_strays().unwrap(), 1);
    assert!(STRAYS_SHUT.load(Ordering::Relaxed) > before, "it is counted");
    assert_eq!(tmpfs::resident(&sealed.data, Subpage(5).range()).unwrap(), 0);
    sealed.seal(&[]).unwrap();
    assert!(mapping.load(Subpage(5).offset()).is_err());
    assert_sealed(&sealed);
}

#[test]
fn a_hole_with_a_block_is_shut_before_the_limit_falls() {
    let mut sealed = sealed(FOLIO_SIZE);
    sealed.quarantine(Subpage(5).range(), TIME).unwrap();
    let mapping = mapped(&sealed, folios(1));
    sealed.set_limit(1).unwrap();
    assert_eq!(mapping.load(Subpage(5).offset()), Ok(0));
    sealed.seal(&[]).unwrap();
    assert_eq!(mapping.walk().len(), 1);
    assert_sealed(&sealed);
}

#[test]
fn a_run_is_quarantined_and_repaired_at_once() {
    let mut sealed = sealed(2 * FOLIO_SIZE);
    sealed.quarantine(Subpage(7).range(), TIME).unwrap();
    sealed.quarantine(Range::new(1, 9 * SUBPAGE_SIZE + 1), TIME + 1).unwrap();
    sealed.quarantine(Folio(1).range(), TIME).unwrap();
    assert_sealed(&sealed);
    assert_eq!(sealed.holes().count(), 10 + SUBPAGES_PER_FOLIO);
    let mut again = open_again(&sealed);
    assert_eq!(again.holes(), sealed.holes());
    drop(sealed);
    again.repair(Range::new(3 * SUBPAGE_SIZE, 6 * SUBPAGE_SIZE), Content::Known).unwrap();
    assert_sealed(&again);
    let bytes: Vec<u8> = (0..9 * SUBPAGE_SIZE).map(|offset| (offset % 251) as u8).collect();
    again
        .repair(Range::new(0, bytes.len() as u64), Content::Bytes { start: 0, bytes: &bytes })
        .unwrap();
    assert_eq!(lost(&again)[0], Subpage(9));
    again.repair(folios(1), Content::Known).unwrap();
    again.repair(Folio(1).range(), Content::Known).unwrap();
    assert_sealed(&again);
    assert_unchanged(&again, folios(2));
}

#[test]
fn a_pinned_folio_is_left_as_it_was() {
    let mut sealed = sealed(FOLIO_SIZE);
    let pin = pinned(&sealed, 9 * SUBPAGE_SIZE);
    assert!(matches!(sealed.quarantine(Subpage(5).range(), TIME), Err(Error::Pinned)));
    assert!(sealed.holes().is_empty());
    assert_unchanged(&sealed, folios(1));
    assert_sealed(&sealed);
    drop(pin);
    sealed.quarantine(Subpage(5).range(), TIME).unwrap();
    assert_sealed(&sealed);
}

#[test]
fn only_a_touch_or_a_need_of_blocks_fills_gaps() {
    let mut sealed = sealed(3 * FOLIO_SIZE - 5000);
    let gaps = [Range::at(3 * SUBPAGE_SIZE, SUBPAGE_SIZE), Range::new(FOLIO_SIZE, sealed.size())];
    gaps.iter().for_each(|gap| sealed.punch(*gap).unwrap());
    let missing = SUBPAGE_SIZE + (sealed.size() - FOLIO_SIZE).next_multiple_of(SUBPAGE_SIZE);
    let mut again = open_again(&sealed);
    for sealed in [&mut sealed, &mut again] {
        assert!(!sealed.has_removed().unwrap());
        assert_eq!(sealed.note_hw_errors(TIME).unwrap(), []);
        assert_eq!(sealed.huge_ranges(folios(3)).unwrap(), []);
        assert!(sealed.folios().all(|folio| sealed.collapse(folio).is_err()));
        assert_eq!(sealed.punched_bytes().unwrap(), missing);
        assert_eq!((sealed.check().unwrap(), sealed.folio_count()), (vec![], 3));
    }
    drop(sealed);
    let mapping = mapped(&again, folios(3));
    assert_eq!(mapping.load(3 * SUBPAGE_SIZE), Ok(0));
    assert_eq!(again.punched_bytes().unwrap(), missing - SUBPAGE_SIZE);
    again.reclaim_removed().unwrap();
    assert!(!again.is_punched());
    assert_sealed(&again);
    assert_unchanged(&again, Range::new(4 * SUBPAGE_SIZE, FOLIO_SIZE));
    again.quarantine(Subpage(3).range(), TIME).unwrap();
    assert_sealed(&again);
}

#[test]
fn memory_that_a_program_removed_is_taken_back() {
    let mut sealed = sealed(2 * FOLIO_SIZE);
    sealed.quarantine(Subpage(5).range(), TIME).unwrap();
    let mapping = mapped(&sealed, folios(2));
    remove(&sealed, Range::at(4 * SUBPAGE_SIZE, 3 * SUBPAGE_SIZE));
    remove(&sealed, Folio(1).range());
    assert!(sealed.has_removed().unwrap());
    sealed.reclaim_removed().unwrap();
    assert_sealed(&sealed);
    assert_eq!(mapping.walk().len(), 1);
    assert_eq!(sealed.begin_reclaiming(false).unwrap(), None, "nothing is left to be done");
}

#[test]
fn what_was_removed_is_taken_back_in_pieces() {
    const SIZE: u64 = 34 << 20; // a piece, and a folio
    let mut sealed = sealed(SIZE);
    [0, 16].into_iter().for_each(|folio| remove(&sealed, Folio(folio).range()));
    let free = |sealed: &Sealed| tmpfs::blocks(sealed.data()).unwrap().free;
    assert_eq!(sealed.begin_reclaiming(false).unwrap(), Some(0));
    assert_eq!(sealed.reclaim_piece(0, u64::MAX).unwrap(), Some(32 << 20));
    assert_eq!(free(&sealed), SUBPAGES_PER_FOLIO, "the rest is for the next piece");
    assert_eq!(sealed.reclaim_piece(32 << 20, u64::MAX).unwrap(), Some(SIZE));
    assert_eq!(sealed.reclaim_piece(SIZE, u64::MAX).unwrap(), None);
    assert_sealed(&sealed);
}
