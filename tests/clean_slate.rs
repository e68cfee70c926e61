//! No program ever sees bytes that another program left in memory.
//!
//! A pool takes memory from the machine with the bytes of earlier programs in it. The memory moves
//! between files and reserves, and no step clears it. These tests fill all memory with one byte,
//! give it back, and look for that byte.

mod support;

use hugetlb2fs::units::{Range, Subpage};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use support::sys::userfault::Userfault;
use support::sys::{Mapping, Sharing};
use support::{
    COLLAPSE, FOLIO, MAP, POISON, Pool, REPAIR, SUBPAGE, get, hugetlb2, poison, run, set,
};

/// The byte that the tests leave in memory. No program may see it.
const STALE: u8 = 0xab;

const MADV_COLLAPSE: i32 = 25;

const PUNCH: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);

/// Leaves [`STALE`] in the machine's free memory, as a program with secrets leaves its bytes there.
fn dirty_the_machine() {
    const PIECES: usize = 8;
    let pieces: Vec<Vec<u8>> =
        (0..PIECES).map(|_| std::hint::black_box(vec![STALE; 32 << 20])).collect();
    drop(pieces);
}

/// A pool with [`STALE`] in every byte, left by a file.
fn dirty_pool(pages: u64) -> Pool {
    dirty_the_machine();
    let pool = Pool::small(pages);
    dirty(&pool, pages);
    pool
}

/// Fills `pages` pages of the pool and gives them back.
fn dirty(pool: &Pool, pages: u64) {
    let file = pool.join("dirt");
    std::fs::write(&file, vec![STALE; (pages * FOLIO) as usize]).unwrap();
    open(&file).set_len(0).unwrap();
    std::fs::remove_file(&file).unwrap();
}

fn open(file: &Path) -> File {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).open(file).unwrap()
}

/// Asserts that the file holds `expected` and then zeros up to its end, by read(2) and by mmap(2).
fn assert_holds(file: &File, expected: &[u8], what: &str) {
    let size = file.metadata().unwrap().len() as usize;
    let mut bytes = vec![0; size];
    file.read_exact_at(&mut bytes, 0).unwrap();
    let known = expected.len().min(size);
    assert!(bytes[..known] == expected[..known], "{what}: what was written has changed");
    let stale = bytes[known..].iter().position(|byte| *byte != 0);
    assert_eq!(stale, None, "{what}: read(2) sees something behind {known:#x}");
    if size > 0 {
        let mapping = mapped(file, Range::new(0, size as u64));
        assert_eq!(
            first_seen(&mapping, Range::new(known as u64, size as u64)),
            None,
            "{what}: mmap(2)"
        );
        let end = (size as u64).next_multiple_of(FOLIO);
        drop(mapping);
        let mapping = mapped(file, Range::new(0, end));
        assert_eq!(
            first_seen(&mapping, Range::new(size as u64, end)),
            None,
            "{what}: behind the end of file"
        );
    }
}

fn mapped(file: &File, range: Range) -> Mapping {
    Mapping::new(file, range, Sharing::Shared, true).unwrap()
}

/// Returns the first byte of `range` that is not zero, and its place. Steps over subpages that are
/// SIGBUS: they show nothing.
fn first_seen(mapping: &Mapping, range: Range) -> Option<(u64, u8)> {
    let mut at = range.start;
    while at < range.end {
        match mapping.load(at) {
            Ok(0) => at += 1,
            Ok(byte) => return Some((at, byte)),
            Err(_) => at = (at / SUBPAGE + 1) * SUBPAGE,
        }
    }
    None
}

/// The attacker maps what may lie behind the end of his file before the file has a size.
#[test]
fn memory_that_is_ready_shows_zeros_before_and_after_a_file_has_its_size() {
    const PAGES: u64 = 32;
    dirty_the_machine();
    let pool = Pool::mount(&format!("pagesize=2M,size={},clear=ahead", PAGES * FOLIO));
    for round in 0..10 {
        dirty(&pool, PAGES / 2);
        let is_ready = || pool.counter("pages_ready") >= 4;
        support::limits::until(support::limits::ANSWER, "memory that is ready", is_ready);
        let path = pool.join("file");
        let file = open(&path);
        let reach = Range::new(0, PAGES / 2 * FOLIO);
        let mapping = mapped(&file, reach);
        for folio in reach.folios() {
            let _ = mapping.advise_range(folio.range(), MADV_COLLAPSE);
        }
        assert_eq!(first_seen(&mapping, reach), None, "round {round}: before it has a size");
        if round % 3 == 0 {
            let worker = pool.counter("worker_pid") as i32;
            kill_process(Pid::from_raw(worker).unwrap(), Signal::KILL).unwrap();
        }
        let size = (round + 1) * FOLIO - 77 * round;
        file.set_len(size).unwrap();
        for folio in reach.folios() {
            let _ = mapping.advise_range(folio.range(), MADV_COLLAPSE);
        }
        assert_eq!(first_seen(&mapping, reach), None, "round {round}: after it has one");
        assert_holds(&file, &[], &format!("round {round}"));
        drop((mapping, file));
        std::fs::remove_file(&path).unwrap();
        pool.wait_for_free_pages(PAGES);
        pool.check();
    }
    pool.unmount();
}

/// Sizes around every boundary.
const SIZES: [u64; 12] = [
    1,
    100,
    SUBPAGE - 1,
    SUBPAGE,
    SUBPAGE + 1,
    5 * SUBPAGE + 77,
    FOLIO - SUBPAGE,
    FOLIO - 1,
    FOLIO,
    FOLIO + 1,
    FOLIO + 3 * SUBPAGE + 5,
    2 * FOLIO - 1,
];

#[test]
fn a_file_that_reuses_pages_shows_zeros_however_it_takes_them() {
    let pool = dirty_pool(4);
    for size in SIZES {
        for how in TAKES {
            let path = pool.join("file");
            let file = open(&path);
            take(&file, size, how);
            assert_eq!(file.metadata().unwrap().len(), size);
            assert_holds(&file, &[], &format!("{how:?} {size:#x}"));
            // Makes the memory dirty for the next round, also behind the end of file.
            let end = size.next_multiple_of(FOLIO);
            let mapping = mapped(&file, Range::new(0, end));
            for at in (0..end).step_by(64) {
                // SIGBUS behind the end if small entries map the folio.
                let _ = mapping.store(at, STALE);
            }
            drop((mapping, file));
            std::fs::remove_file(&path).unwrap();
        }
    }
    pool.check();
}

/// A way in which a file takes memory.
#[derive(Clone, Copy, Debug)]
enum Take {
    Truncate,
    Allocate,
    AllocateThenTruncate,
    WriteLastByte,
}

const TAKES: [Take; 4] =
    [Take::Truncate, Take::Allocate, Take::AllocateThenTruncate, Take::WriteLastByte];

fn take(file: &File, size: u64, how: Take) {
    match how {
        Take::Truncate => file.set_len(size).unwrap(),
        Take::Allocate => fallocate(file, FallocateFlags::empty(), 0, size).unwrap(),
        Take::AllocateThenTruncate => {
            fallocate(file, FallocateFlags::KEEP_SIZE, 0, size).unwrap();
            file.set_len(size).unwrap();
        }
        Take::WriteLastByte => file.write_all_at(&[0], size - 1).unwrap(),
    }
}

#[test]
fn what_was_cut_off_is_not_there_when_the_file_grows_again() {
    let pool = dirty_pool(4);
    let file = open(&pool.join("file"));
    for kept in SIZES.into_iter().chain([0]) {
        for grown in
            [kept + 1, kept + SUBPAGE, kept.next_multiple_of(SUBPAGE), 2 * FOLIO, 3 * FOLIO - 5]
        {
            file.set_len(0).unwrap();
            file.write_all_at(&vec![STALE; 2 * FOLIO as usize + 9], 0).unwrap();
            file.set_len(kept).unwrap();
            file.set_len(grown.max(kept)).unwrap();
            assert_holds(&file, &vec![STALE; kept as usize], &format!("{kept:#x} to {grown:#x}"));
        }
    }
    pool.check();
}

#[test]
fn a_growth_shows_zeros_where_a_mapping_wrote_past_the_end() {
    let pool = dirty_pool(3);
    for size in SIZES {
        for (how, grown) in [
            ("a little", size + 1),
            ("in its subpage", size.next_multiple_of(SUBPAGE)),
            ("in its folio", size.next_multiple_of(FOLIO)),
            ("far", 3 * FOLIO),
        ] {
            let path = pool.join("file");
            let file = open(&path);
            file.write_all_at(&vec![7; size as usize], 0).unwrap();
            let end = size.next_multiple_of(FOLIO);
            let mapping = mapped(&file, Range::new(0, end));
            for at in (size..end).step_by(61) {
                let _ = mapping.store(at, STALE); // SIGBUS if small entries map the folio
            }
            let _ = mapping.store(end - 1, STALE);
            file.set_len(grown).unwrap();
            assert_eq!(
                first_seen(&mapping, Range::new(size, grown.min(end))),
                None,
                "{size:#x} {how}"
            );
            drop(mapping);
            let mut bytes = vec![1; (grown - size) as usize];
            file.read_exact_at(&mut bytes, size).unwrap();
            assert!(bytes.iter().all(|byte| *byte == 0), "{size:#x} {how}");
            drop(file);
            std::fs::remove_file(&path).unwrap();
        }
    }
    pool.check();
}

#[test]
fn what_was_punched_is_zeros_before_and_after_it_is_taken_again() {
    let pool = dirty_pool(3);
    let file = open(&pool.join("file"));
    for (offset, length) in [
        (0, 1),
        (100, SUBPAGE),
        (SUBPAGE, SUBPAGE),
        (0, FOLIO),
        (FOLIO, FOLIO),
        (5, 2 * FOLIO),
        (FOLIO - 7, FOLIO + 14),
        (0, 3 * FOLIO),
    ] {
        let what = format!("{offset:#x} {length:#x}");
        file.write_all_at(&vec![STALE; 3 * FOLIO as usize], 0).unwrap();
        fallocate(&file, PUNCH, offset, length).unwrap();
        let mut expected = vec![STALE; 3 * FOLIO as usize];
        expected[offset as usize..(offset + length) as usize].fill(0);
        let mut bytes = vec![1; expected.len()];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes == expected, "punched {what}");
        fallocate(&file, FallocateFlags::empty(), 0, 3 * FOLIO).unwrap();
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes == expected, "taken again {what}");
        let mapping = mapped(&file, Range::new(0, 3 * FOLIO));
        assert_eq!(first_seen(&mapping, Range::at(offset, length)), None, "{what}");
    }
    pool.check();
}

#[test]
fn a_subpage_that_is_repaired_by_zeros_shows_zeros() {
    let pool = dirty_pool(2);
    let file = open(&pool.join("file"));
    file.write_all_at(&vec![STALE; FOLIO as usize + 5000], 0).unwrap();
    let mapping = mapped(&file, Range::new(0, FOLIO + 5000));
    for subpage in [0, 5 * SUBPAGE, FOLIO - SUBPAGE, FOLIO, FOLIO + SUBPAGE] {
        poison(pool.join("file"), subpage, 1).unwrap();
        set(pool.join("file"), REPAIR, format!("zero {subpage} 1")).unwrap();
        assert_eq!(
            first_seen(&mapping, Range::at(subpage, SUBPAGE.min(FOLIO + 5000 - subpage))),
            None
        );
    }
    file.set_len(2 * FOLIO).unwrap();
    let mut bytes = vec![1; FOLIO as usize - 5000];
    file.read_exact_at(&mut bytes, FOLIO + 5000).unwrap();
    assert!(bytes.iter().all(|byte| *byte == 0));
    pool.check();
}

#[test]
fn two_files_that_exchange_pages_see_nothing_of_each_other() {
    let pool = dirty_pool(4);
    let (one, two) = (open(&pool.join("one")), open(&pool.join("two")));
    for round in 0..8u64 {
        let (mine, other) = if round % 2 == 0 { (&one, &two) } else { (&two, &one) };
        mine.write_all_at(&vec![STALE; 3 * FOLIO as usize + 77], 0).unwrap();
        mine.set_len(0).unwrap();
        let size = SIZES[round as usize] + FOLIO;
        other.set_len(size).unwrap();
        assert_holds(other, &[], &format!("round {round}"));
        other.set_len(0).unwrap();
    }
    pool.check();
}

#[test]
fn collapsing_untouched_memory_shows_zeros() {
    let pool = dirty_pool(8);
    for size in SIZES.into_iter().chain([8 * FOLIO - 3]) {
        for how in [Take::Truncate, Take::Allocate] {
            dirty(&pool, 8);
            let path = pool.join("file");
            let file = open(&path);
            take(&file, size, how);
            let all = Range::new(0, size.next_multiple_of(FOLIO));
            let mapping = mapped(&file, all);
            // The call may be refused (for example, the file ends in this folio), but it must not
            // uncover stale bytes.
            for folio in all.folios() {
                let _ = mapping.advise_range(folio.range(), MADV_COLLAPSE);
            }
            assert_eq!(first_seen(&mapping, all), None, "{how:?} {size:#x}");
            drop((mapping, file));
            std::fs::remove_file(&path).unwrap();
        }
    }
    pool.check();
}

#[test]
fn collapsing_memory_behind_a_size_that_was_cut_shows_zeros() {
    let pool = dirty_pool(4);
    for size in SIZES {
        let path = pool.join("file");
        let file = open(&path);
        file.write_all_at(&vec![STALE; 3 * FOLIO as usize], 0).unwrap();
        file.set_len(size).unwrap();
        let mapping = mapped(&file, Range::new(0, 3 * FOLIO));
        for folio in Range::new(0, 3 * FOLIO).folios() {
            let _ = mapping.advise_range(folio.range(), MADV_COLLAPSE);
        }
        assert_eq!(first_seen(&mapping, Range::new(size, 3 * FOLIO)), None, "{size:#x}");
        drop((mapping, file));
        std::fs::remove_file(&path).unwrap();
    }
    pool.check();
}

#[test]
fn collapsing_a_file_while_it_grows_and_shrinks_shows_zeros() {
    const PAGES: u64 = 8;
    let pool = dirty_pool(PAGES + 2);
    let path = pool.join("file");
    let file = open(&path);
    let (stop, looks) = (AtomicBool::new(false), AtomicU64::new(0));
    let mapping = mapped(&file, Range::new(0, PAGES * FOLIO));
    let found = std::thread::scope(|scope| {
        let look = || {
            while !stop.load(Ordering::Relaxed) {
                for folio in Range::new(0, PAGES * FOLIO).folios() {
                    let _ = mapping.advise_range(folio.range(), MADV_COLLAPSE);
                    let seen = (folio.range().start..folio.range().end)
                        .step_by(509)
                        .find_map(|at| mapping.load(at).ok().filter(|byte| *byte != 0));
                    if seen.is_some() {
                        return seen;
                    }
                }
                looks.fetch_add(1, Ordering::Relaxed);
            }
            None
        };
        let looker = scope.spawn(look);
        let mut round = 0;
        while !looker.is_finished() && (round < 40 || looks.load(Ordering::Relaxed) < 20) {
            for size in [
                1,
                SUBPAGE,
                FOLIO - 1,
                FOLIO + 1,
                3 * FOLIO - SUBPAGE,
                5 * FOLIO,
                PAGES * FOLIO - 9,
            ] {
                file.set_len(size).unwrap();
            }
            file.set_len([0, 10, FOLIO, FOLIO + 10][round % 4]).unwrap();
            round += 1;
        }
        stop.store(true, Ordering::Relaxed);
        looker.join().unwrap()
    });
    assert_eq!(found, None, "the looker has seen what others left");
    drop(mapping);
    pool.check();
}

#[test]
fn collapses_beside_punches_and_growths_show_zeros() {
    const PAGES: u64 = 4;
    let pool = dirty_pool(PAGES + 1);
    let file = open(&pool.join("file"));
    file.set_len(PAGES * FOLIO).unwrap();
    let (stop, looks) = (AtomicBool::new(false), AtomicU64::new(0));
    let mapping = mapped(&file, Range::new(0, PAGES * FOLIO));
    let found = std::thread::scope(|scope| {
        let looker = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let _ = mapping.advise(MADV_COLLAPSE);
                let seen = (0..PAGES * FOLIO)
                    .step_by(509)
                    .find_map(|at| mapping.load(at).ok().filter(|byte| *byte != 0));
                if seen.is_some() {
                    return seen;
                }
                looks.fetch_add(1, Ordering::Relaxed);
            }
            None
        });
        let mut round = 0;
        while !looker.is_finished() && (round < 40 || looks.load(Ordering::Relaxed) < 20) {
            let page = round % PAGES;
            fallocate(&file, PUNCH, page * FOLIO, FOLIO).unwrap();
            fallocate(&file, FallocateFlags::empty(), page * FOLIO, FOLIO).unwrap();
            round += 1;
        }
        stop.store(true, Ordering::Relaxed);
        looker.join().unwrap()
    });
    assert_eq!(found, None, "the looker has seen what others left");
    drop(mapping);
    pool.check();
}

// ---- punched and kept ---------------------------------------------------------------------------

/// A pool of dirty pages that leaves punched pages to their file (`punch=keep`).
fn keeping_pool(pages: u64) -> Pool {
    dirty_the_machine();
    let pool = Pool::mount(&format!("pagesize=2M,size={},punch=keep", pages * FOLIO));
    dirty(&pool, pages);
    pool
}

/// A file of three folios of [`STALE`].
fn stale_file(pool: &Pool) -> File {
    let file = open(&pool.join("file"));
    file.write_all_at(&vec![STALE; 3 * FOLIO as usize], 0).unwrap();
    file
}

/// True if the file has a gap, which a touch would fill.
fn has_gaps(pool: &Pool) -> bool {
    get(pool.join("file"), MAP).unwrap().contains(" punched -")
}

fn kill_worker(pool: &Pool) {
    let worker = pool.counter("worker_pid");
    kill_process(Pid::from_raw(worker as i32).unwrap(), Signal::KILL).unwrap();
    assert_ne!(pool.counter("worker_pid"), worker);
}

#[test]
fn a_large_read_of_a_gap_is_zeros_and_takes_no_memory() {
    let pool = keeping_pool(3);
    let file = stale_file(&pool);
    fallocate(&file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, FOLIO, FOLIO).unwrap();
    let before = get(pool.join("file"), MAP).unwrap();
    let mut bytes = vec![1; 3 * FOLIO as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes[FOLIO as usize..2 * FOLIO as usize].iter().all(|byte| *byte == 0));
    let rest = bytes[..FOLIO as usize].iter().chain(&bytes[2 * FOLIO as usize..]);
    assert!(rest.into_iter().all(|byte| *byte == STALE));
    assert_eq!(get(pool.join("file"), MAP).unwrap(), before);
    assert!(has_gaps(&pool));
    pool.check();
}

#[test]
fn a_touched_gap_is_zeros_and_no_sigbus() {
    let pool = keeping_pool(3);
    for (offset, length) in [
        (0, 1),
        (100, SUBPAGE),
        (SUBPAGE, SUBPAGE),
        (0, FOLIO),
        (FOLIO, FOLIO),
        (5, 2 * FOLIO),
        (FOLIO - 7, FOLIO + 14),
        (2 * FOLIO + 77, i64::MAX as u64 - 2 * FOLIO - 77),
        (0, 3 * FOLIO),
    ] {
        let what = format!("{offset:#x} {length:#x}");
        let file = stale_file(&pool);
        let mapping = mapped(&file, Range::new(0, 3 * FOLIO));
        assert_eq!(mapping.walk(), []);
        fallocate(&file, PUNCH, offset, length).unwrap();
        let end = (offset + length).min(3 * FOLIO);
        let mut expected = vec![STALE; 3 * FOLIO as usize];
        expected[offset as usize..end as usize].fill(0);
        let mut bytes = vec![1; expected.len()];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes == expected, "read(2), punched {what}");
        pool.check();
        assert_eq!(has_gaps(&pool), end - offset > 1 && offset != 100, "{what}");
        mapping.read(0, &mut bytes).expect("no SIGBUS");
        assert!(bytes == expected, "mmap(2), punched {what}");
        assert!(!has_gaps(&pool), "{what}");
        mapping.store(offset, 5).unwrap();
        file.read_exact_at(&mut bytes[..1], offset).unwrap();
        assert_eq!(bytes[0], 5);
        pool.check();
        drop((mapping, file));
        std::fs::remove_file(pool.join("file")).unwrap();
    }
}

#[test]
fn gaps_belong_to_their_file_and_stay_in_the_account() {
    let pool = keeping_pool(4);
    let file = stale_file(&pool);
    let size = std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap());
    fallocate(&file, PUNCH, 0, 3 * FOLIO).unwrap();
    assert_eq!((pool.free_pages(), pool.counter("pages_used")), (1, 3));
    assert_eq!(pool.counter("punched_bytes"), 3 * FOLIO);
    assert_eq!(std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap()), size);
    let other = open(&pool.join("other"));
    assert!(other.set_len(2 * FOLIO).is_err(), "a punched page is another file's");
    other.set_len(FOLIO).unwrap();
    kill_worker(&pool);
    assert_eq!((pool.free_pages(), pool.counter("pages_used")), (0, 4));
    pool.check();
    assert!(has_gaps(&pool));
    let status = run(hugetlb2().arg("status").arg(pool.path()));
    assert!(status.contains("6144 KiB are the machine's until they are touched"), "{status}");
    file.write_all_at(&[7], 0).unwrap();
    assert!(pool.counter("punched_bytes") < 3 * FOLIO);
    drop((file, other));
    std::fs::remove_file(pool.join("file")).unwrap();
    open(&pool.join("other")).set_len(4 * FOLIO).unwrap();
    pool.check();
    pool.unmount();
}

#[test]
fn a_write_leaves_what_was_punched_and_kept_elsewhere_as_it_is() {
    let pool = keeping_pool(3);
    let file = stale_file(&pool);
    fallocate(&file, PUNCH, SUBPAGE, FOLIO).unwrap();
    file.write_all_at(&[7; 10], 3 * SUBPAGE).unwrap();
    file.write_all_at(&[7; 10], 2 * FOLIO).unwrap();
    let map = get(pool.join("file"), MAP).unwrap();
    // Bytes before the gap may share the kernel's unit of memory.
    assert!(map.contains("0x4000 0x1fd000 punched -"), "{map}");
    let mut bytes = [1; SUBPAGE as usize];
    file.read_exact_at(&mut bytes, 3 * SUBPAGE).unwrap();
    assert!(bytes[..10] == [7; 10] && bytes[10..].iter().all(|byte| *byte == 0));
    pool.check();
}

/// The bytes that userfaultfd puts into a subpage.
fn content(subpage: Subpage) -> [u8; SUBPAGE as usize] {
    std::array::from_fn(|at| (subpage.0 as usize * 31 + at) as u8 | 1)
}

/// Touches the last subpage of `range` and fills it by userfaultfd, then fills all other subpages.
/// Meanwhile the worker dies twice, and a check and a collapse look at the memory.
fn fill_all(pool: &Pool, mapping: &Mapping, range: Range) {
    let fault = Userfault::new(mapping, range).unwrap();
    let last = Subpage::containing(range.end - 1);
    std::thread::scope(|scope| {
        let toucher = scope.spawn(|| mapping.load(last.offset()));
        assert_eq!(fault.next().unwrap(), last);
        kill_worker(pool);
        pool.check();
        set(pool.join("file"), COLLAPSE, "all").unwrap();
        assert!(has_gaps(pool));
        fault.fill(last, &content(last)).unwrap();
        assert_eq!(toucher.join().unwrap(), Ok(content(last)[0]));
        kill_worker(pool);
        for subpage in (range.start / SUBPAGE..last.0).map(Subpage) {
            fault.fill(subpage, &content(subpage)).unwrap();
        }
    });
}

#[test]
fn userfaultfd_fills_gaps_beside_readers_and_deaths() {
    let pool = keeping_pool(3);
    let file = stale_file(&pool);
    let mapping = mapped(&file, Range::new(0, 3 * FOLIO));
    for range in
        [Range::new(5 * SUBPAGE, 9 * SUBPAGE), Range::new(0, FOLIO), Range::new(FOLIO, 3 * FOLIO)]
    {
        file.write_all_at(&vec![STALE; 3 * FOLIO as usize], 0).unwrap();
        fallocate(&file, PUNCH, range.start, range.len()).unwrap();
        fill_all(&pool, &mapping, range);
        assert!(!has_gaps(&pool), "{range}");
        let mut bytes = vec![0; range.len() as usize];
        file.read_exact_at(&mut bytes, range.start).unwrap();
        for (subpage, bytes) in
            (range.start / SUBPAGE..).map(Subpage).zip(bytes.chunks(SUBPAGE as usize))
        {
            assert!(*bytes == content(subpage), "{subpage:?} of {range}");
        }
        assert_eq!(pool.free_pages(), 0);
        pool.check();
    }
}

#[test]
fn a_file_with_gaps_can_be_changed_like_any_other() {
    let pool = keeping_pool(5);
    let path = pool.join("file");
    let file = stale_file(&pool);
    let mapping = mapped(&file, Range::new(0, 3 * FOLIO));
    let sevens =
        |range: Range| file.write_all_at(&vec![7; range.len() as usize], range.start).unwrap();
    let punch = || {
        fallocate(&file, PUNCH, FOLIO, FOLIO).unwrap();
        assert!(has_gaps(&pool));
        pool.check();
    };
    punch();
    let before = get(&path, MAP).unwrap();
    assert_eq!(
        poison(&path, 0, 1),
        Err(Errno::BUSY),
        "who fills the gaps would find zeros in them"
    );
    assert_eq!(get(&path, MAP).unwrap(), before);
    pool.await_log("fallocate(2) it first");
    fallocate(&file, FallocateFlags::KEEP_SIZE, 0, 3 * FOLIO).unwrap();
    assert!(!has_gaps(&pool));
    poison(&path, FOLIO + SUBPAGE, 1).unwrap(); // among the subpages that were punched
    assert_eq!(
        mapping.walk().iter().map(|hit| hit.subpage.offset()).collect::<Vec<_>>(),
        [FOLIO + SUBPAGE]
    );
    pool.check();
    // Outside of the hole, a punch leaves no gap.
    sevens(Range::new(0, FOLIO));
    fallocate(&file, PUNCH, 0, FOLIO).unwrap();
    assert!(!has_gaps(&pool));
    assert_eq!(first_seen(&mapping, Range::new(0, FOLIO)), None);
    assert_eq!(mapping.walk().len(), 1);
    // A punch over the hole discards the hole with its record.
    punch();
    assert!(get(&path, POISON).is_err());
    assert_eq!(mapping.load(FOLIO + SUBPAGE), Ok(0));
    punch();
    file.set_len(4 * FOLIO + 5).unwrap();
    assert!(!has_gaps(&pool));
    assert_eq!(pool.free_pages(), 0);
    pool.check();
    punch();
    file.set_len(3 * FOLIO).unwrap();
    assert!(!has_gaps(&pool));
    assert_eq!(pool.free_pages(), 2);
    pool.check();
    punch();
    fallocate(&file, FallocateFlags::empty(), 0, 3 * FOLIO).unwrap();
    assert!(!has_gaps(&pool));
    assert_eq!(first_seen(&mapping, Range::new(0, 2 * FOLIO)), None);
    assert_eq!(mapping.load(2 * FOLIO), Ok(STALE));
    pool.check();
}
