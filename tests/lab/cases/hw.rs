//! Real memory errors in the filesystem: the processes that learn of them, the bytes that they see,
//! and the ways to make a file whole again.

use super::{cases, meminfo};
use crate::support::{
    COLLAPSE, FOLIO, LOSSES, MAP, POISON, Pool, REPAIR, SUBPAGE, Toucher, get, hugetlb2, poison,
    run, set, status_and_error,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FallocateFlags, SeekFrom, XattrFlags, fallocate, fsetxattr, seek};
use rustix::io::Errno;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

cases! {
    SMALL:
        an_injected_error_is_listed_counted_and_logged_once,
        the_patrol_finds_an_error_that_nobody_touches,
        injection_accepts_only_one_place_with_memory,
        a_list_of_losses_becomes_real_errors,
        an_error_costs_readers_and_mappers_its_subpage_only,
        zeroing_heals_an_error_whose_bytes_cannot_be_salvaged,
        a_write_over_an_error_repairs_it_and_over_a_part_ends_there,
        punching_and_truncating_discard_an_error,
        a_file_with_an_error_grows_and_shrinks,
        a_file_grows_from_within_a_lost_subpage,
        unlinking_a_file_with_errors_gives_all_its_pages_back,
        errors_are_told_apart_wherever_they_are,
        soft_and_hardware_errors_are_repaired_in_either_order,
        an_error_in_an_unlinked_file_is_found_and_repaired,
        an_error_behind_the_end_does_not_keep_a_file_from_growing,
        a_write_that_meets_an_unknown_error_succeeds,
        a_request_that_meets_an_unknown_error_knows_of_it,
        the_kernel_itself_reads_up_to_an_error_and_never_through_it,
        a_large_read_ends_before_an_error_that_nobody_knew_of,
        a_write_past_the_end_repairs_known_and_unknown_errors;
}

pub use crate::support::INJECT;

/// The place of the error, in the second of two folios.
const BAD: u64 = FOLIO + 5 * SUBPAGE;
const SIZE: u64 = 2 * FOLIO;
const BUS_MCEERR_AR: i32 = 4;
const PATIENCE: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };
const NOW: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };

/// A pool of four pages, which makes huge mappings again only on request.
fn pool() -> Pool {
    Pool::mount("pagesize=2M,size=8M,collapse=off")
}

/// Makes a file of sevens.
fn sevens(pool: &Pool, size: u64) -> (PathBuf, File) {
    let path = pool.join("file");
    std::fs::write(&path, vec![7; size as usize]).unwrap();
    let file = File::options().read(true).write(true).open(&path).unwrap();
    (path, file)
}

pub fn inject(path: &Path, offset: u64) {
    set(path, INJECT, format!("hw {offset}")).unwrap();
}

/// Makes an error without asking the filesystem for it.
fn strike(toucher: &mut Toucher, offset: u64) {
    assert_eq!(toucher.ask(&format!("advise {offset} {SUBPAGE} {}", libc::MADV_HWPOISON)), "ok");
}

/// The poison attribute without the times.
pub fn listed(path: &Path) -> Vec<String> {
    match get(path, POISON) {
        Ok(text) => {
            text.lines().map(|line| line.rsplit_once(' ').expect("columns").0.to_owned()).collect()
        }
        Err(Errno::NODATA) => Vec::new(),
        Err(errno) => panic!("{errno}"),
    }
}

/// The lines of [`listed`] for single errors.
fn hw(offsets: &[u64]) -> Vec<String> {
    offsets.iter().map(|offset| format!("{offset:#x} 0x1000 hw")).collect()
}

fn errno<T>(result: std::io::Result<T>) -> Result<T, Errno> {
    result.map_err(|error| Errno::from_io_error(&error).expect("of the kernel"))
}

fn read(file: &File, offset: u64, length: u64) -> Result<Vec<u8>, Errno> {
    let mut bytes = vec![0; length as usize];
    let read = errno(file.read_at(&mut bytes, offset))?;
    bytes.truncate(read);
    Ok(bytes)
}

/// Asserts that a file holds `byte` in `start..end`.
fn assert_holds(file: &File, start: u64, end: u64, byte: u8) {
    let mut bytes = vec![!byte; (end - start) as usize];
    file.read_exact_at(&mut bytes, start).unwrap();
    let wrong = bytes.iter().position(|found| *found != byte);
    assert_eq!(wrong, None, "{start:#x}..{end:#x} is not all {byte}");
}

fn events(file: &File, timeout: &Timespec) -> PollFlags {
    let mut fds = [PollFd::new(file, PollFlags::PRI)];
    poll(&mut fds, Some(timeout)).unwrap();
    fds[0].revents()
}

/// The bytes that the kernel keeps out of use for good.
fn corrupted() -> u64 {
    meminfo("HardwareCorrupted")
}

/// Asserts that no trace of an error is left: all of the file can be read, mapped, and mapped huge.
fn assert_whole(pool: &Pool, path: &Path, size: u64) {
    assert_eq!(listed(path), [""; 0]);
    assert_eq!(pool.counter("quarantined_hw"), 0);
    set(path, COLLAPSE, "all").unwrap();
    let mut toucher = Toucher::mapping(path, size);
    assert_eq!(toucher.walk(), []);
    assert_eq!(toucher.huge(), size / FOLIO);
    assert_eq!(std::fs::read(path).unwrap().len() as u64, size);
    pool.check();
}

// ---- losses of another machine ------------------------------------------------------------------

fn a_list_of_losses_becomes_real_errors() {
    let pool = pool();
    let (path, file) = sevens(&pool, SIZE);
    let mut toucher = Toucher::mapping(&path, SIZE);
    let before = corrupted();
    let import = |list: String| set(&path, LOSSES, list);
    // Nothing is done if a line is wrong.
    set(&path, POISON, format!("{FOLIO} 4096")).unwrap();
    for wrong in [format!("{BAD} 4096 hw\n{SIZE} 1 hw"), format!("{BAD} 4096 hw\n{FOLIO} 1 hw")] {
        assert_eq!(import(wrong), Err(Errno::INVAL));
    }
    set(&path, REPAIR, "salvage all").unwrap();
    assert_eq!((corrupted(), listed(&path)), (before, hw(&[])));
    let list = format!("{BAD} 4096 hw 1700000000\n{} 4096 hw\n0 4096 soft\n", SIZE - SUBPAGE);
    for _ in 0..2 {
        import(list.clone()).unwrap(); // the second time changes nothing
        let soft = vec!["0x0 0x1000 soft".to_owned()];
        assert_eq!(listed(&path), [soft, hw(&[BAD, SIZE - SUBPAGE])].concat());
        assert_eq!(corrupted() - before, 2 * SUBPAGE, "a frame for each");
        assert_eq!(pool.counter("frames_given_up"), 2);
    }
    let last = SIZE - SUBPAGE;
    let lost = format!("hits 0:2 {BAD}:{BUS_MCEERR_AR} {last}:{BUS_MCEERR_AR}");
    assert_eq!(toucher.ask("walk"), lost);
    drop(toucher);
    set(&path, REPAIR, "zero all").unwrap();
    assert_holds(&file, SUBPAGE, BAD, 7);
    assert_holds(&file, BAD, BAD + SUBPAGE, 0);
    assert_whole(&pool, &path, SIZE);
}

// ---- being told ---------------------------------------------------------------------------------

fn an_injected_error_is_listed_counted_and_logged_once() {
    let pool = pool();
    let (path, file) = sevens(&pool, SIZE);
    assert_eq!((listed(&path), pool.counter("quarantined_hw")), (hw(&[]), 0));
    let start = Instant::now();
    inject(&path, BAD + 1);
    assert_eq!(listed(&path), hw(&[BAD]));
    println!("from injection to record, when asked: {:?}", start.elapsed());
    assert_eq!((pool.counter("quarantined_hw"), pool.counter("quarantined_soft")), (1, 0));
    assert!(
        get(&path, MAP).unwrap().contains("0x205000 0x1000 poisoned"),
        "{}",
        get(&path, MAP).unwrap()
    );
    assert_eq!(read(&file, BAD, 1), Err(Errno::IO));
    inject(&path, 0);
    assert_eq!(listed(&path), hw(&[0, BAD]));
    // The later of the two errors.
    let log = pool.await_log("memory error, 0x0 0x1000 quarantined (hw)");
    assert_eq!(log.matches("memory error, 0x205000 0x1000 quarantined (hw)").count(), 1, "{log}");
    pool.check();
    drop(file);
    pool.unmount();
}

fn the_patrol_finds_an_error_that_nobody_touches() {
    let pool = pool();
    let (path, file) = sevens(&pool, SIZE);
    assert_eq!(events(&file, &NOW), PollFlags::empty());
    for (count, offset) in [(1, BAD), (2, 0)] {
        let start = Instant::now();
        inject(&path, offset);
        assert_eq!(events(&file, &PATIENCE), PollFlags::PRI);
        println!("from injection to record, by the patrol: {:?}", start.elapsed());
        assert_eq!(pool.counter("quarantined_hw"), count);
        assert_eq!(listed(&path).len() as u64, count);
        assert_eq!(events(&file, &NOW), PollFlags::empty());
    }
    pool.check();
    drop(file);
    pool.unmount();
}

fn injection_accepts_only_one_place_with_memory() {
    let pool = pool();
    let (path, file) = sevens(&pool, 3 * FOLIO);
    fallocate(&file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, SIZE, FOLIO).unwrap();
    let behind = format!("hw {}", 3 * FOLIO);
    let released = format!("hw {SIZE}");
    for value in
        ["", "hw", "soft 0", "hw 0 1", "hw 0\nhw 4096", "hw -1", "hw x", &behind, &released]
    {
        assert_eq!(set(&path, INJECT, value), Err(Errno::INVAL), "{value:?}");
    }
    assert_eq!(set(pool.path(), INJECT, "hw 0"), Err(Errno::OPNOTSUPP), "a directory");
    assert_eq!(listed(&path), hw(&[]));
    set(&path, INJECT, "hw 0x1fff\n").unwrap();
    assert_eq!(set(&path, INJECT, "hw 0x1000"), Err(Errno::INVAL), "there is one already");
    run(hugetlb2().arg("inject").arg(&path).arg("0x3000"));
    assert_eq!(listed(&path), hw(&[0x1000, 0x3000]));
    for offset in ["x", "0x3000", "999999999999"] {
        assert_ne!(
            status_and_error(hugetlb2().arg("inject").arg(&path).arg(offset)).0,
            0,
            "{offset}"
        );
    }
    assert_ne!(
        status_and_error(hugetlb2().arg("inject").arg(&path).arg("0").uid(65534)).0,
        0,
        "not root"
    );
    assert_eq!(listed(&path), hw(&[0x1000, 0x3000]));
    pool.check();
    drop(file);
    pool.unmount();
}

// ---- seeing it ----------------------------------------------------------------------------------

fn an_error_costs_readers_and_mappers_its_subpage_only() {
    let pool = pool();
    let (path, file) = sevens(&pool, SIZE);
    let mut toucher = Toucher::mapping(&path, SIZE);
    assert_eq!(toucher.walk(), []);
    inject(&path, BAD);
    let mut late = Toucher::mapping(&path, SIZE);
    for process in [&mut toucher, &mut late] {
        assert_eq!(process.ask("walk"), format!("hits {BAD}:{BUS_MCEERR_AR}"));
        assert_eq!(
            process.ask(&format!("store {} 1", BAD + 4095)),
            format!("sigbus {BAD} {BUS_MCEERR_AR}")
        );
        assert_eq!(process.ask(&format!("differ 0 {BAD} 7")), "count 0");
        assert_eq!(
            process.ask(&format!("differ {} {} 7", BAD + SUBPAGE, SIZE - BAD - SUBPAGE)),
            "count 0"
        );
        assert_eq!(process.huge(), 1);
    }
    assert_eq!(read(&file, BAD - 100, SUBPAGE), Ok(vec![7; 100]), "up to it");
    assert_eq!(read(&file, BAD, SUBPAGE), Err(Errno::IO));
    assert_eq!(read(&file, BAD + 4095, 2), Err(Errno::IO));
    assert_holds(&file, 0, BAD, 7);
    assert_holds(&file, BAD + SUBPAGE, SIZE, 7);
    assert_eq!(seek(&file, SeekFrom::Hole(0)), Ok(BAD));
    assert_eq!(seek(&file, SeekFrom::Data(BAD)), Ok(BAD + SUBPAGE));
    assert_eq!(seek(&file, SeekFrom::Hole(BAD + SUBPAGE)), Ok(SIZE));
    pool.check();
    drop((toucher, late, file));
    pool.unmount();
}

// ---- ways to make a file whole again ------------------------------------------------------------

fn zeroing_heals_an_error_whose_bytes_cannot_be_salvaged() {
    let pool = pool();
    let (path, file) = sevens(&pool, SIZE);
    let mut toucher = Toucher::mapping(&path, SIZE);
    assert_eq!(toucher.walk(), []);
    let before = corrupted();
    inject(&path, BAD);
    assert_eq!(corrupted(), before + SUBPAGE);
    assert_eq!(set(&path, REPAIR, "salvage all"), Err(Errno::NODATA));
    assert_eq!(set(&path, REPAIR, "zero 0 4096"), Err(Errno::NODATA), "nothing is lost there");
    assert_eq!(listed(&path), hw(&[BAD]));
    set(&path, REPAIR, format!("zero {BAD} 1")).unwrap();
    assert_eq!(toucher.walk(), []);
    assert_eq!(toucher.ask(&format!("differ {BAD} {SUBPAGE} 0")), "count 0");
    assert!(toucher.store(BAD, 9));
    assert_eq!(read(&file, BAD, 1), Ok(vec![9]));
    assert_holds(&file, 0, BAD, 7);
    assert_holds(&file, BAD + SUBPAGE, SIZE, 7);
    assert_whole(&pool, &path, SIZE);
    assert_eq!(toucher.walk(), []);
    assert_eq!(corrupted(), before + SUBPAGE, "the frame never comes back");
    drop((toucher, file));
    pool.unmount();
    assert_eq!(corrupted(), before + SUBPAGE, "not after the pool's end either");
}

fn a_write_over_an_error_repairs_it_and_over_a_part_ends_there() {
    let pool = pool();
    let (path, file) = sevens(&pool, SIZE);
    let page = SUBPAGE as usize;
    inject(&path, BAD);
    assert_eq!(listed(&path), hw(&[BAD]));
    assert_eq!(errno(file.write_at(&[9; 10], BAD + 10)), Err(Errno::IO));
    assert_eq!(errno(file.write_at(&vec![9; page], BAD - 10)), Ok(10), "up to it");
    assert_eq!(errno(file.write_at(&vec![9; page], BAD + 10)), Err(Errno::IO));
    assert_eq!(listed(&path), hw(&[BAD]));
    pool.check();
    assert_eq!(errno(file.write_at(&vec![8; page + 20], BAD - 10)), Ok(page + 20));
    assert_holds(&file, BAD - 10, BAD + SUBPAGE + 10, 8);
    assert_holds(&file, 0, BAD - 10, 7);
    assert_holds(&file, BAD + SUBPAGE + 10, SIZE, 7);
    assert_whole(&pool, &path, SIZE);
    drop(file);
    pool.unmount();
}

fn punching_and_truncating_discard_an_error() {
    let pool = pool();
    let (path, file) = sevens(&pool, SIZE);
    let punch = |offset, length| {
        fallocate(&file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, length)
    };
    inject(&path, BAD);
    assert_eq!(listed(&path), hw(&[BAD]));
    assert_eq!(punch(BAD + 1, 10), Err(Errno::IO), "a part of it cannot be zeroed");
    punch(BAD, SUBPAGE).unwrap();
    assert_holds(&file, BAD, BAD + SUBPAGE, 0);
    assert_whole(&pool, &path, SIZE);

    inject(&path, BAD);
    punch(FOLIO, FOLIO).unwrap(); // the page goes back to the pool
    assert_eq!((listed(&path), pool.free_pages()), (hw(&[]), 3));
    pool.check();
    fallocate(&file, FallocateFlags::empty(), 0, SIZE).unwrap();
    assert_whole(&pool, &path, SIZE);

    for size in [BAD, FOLIO, 100, 0] {
        file.set_len(SIZE).unwrap();
        inject(&path, BAD);
        file.set_len(size).unwrap();
        assert_eq!(listed(&path), hw(&[]), "{size:#x}");
        pool.check();
        file.set_len(SIZE).unwrap();
        assert_whole(&pool, &path, SIZE);
    }
    drop(file);
    pool.unmount();
}

// ---- sizes --------------------------------------------------------------------------------------

fn a_file_with_an_error_grows_and_shrinks() {
    let pool = pool();
    let (path, file) = sevens(&pool, SIZE);
    inject(&path, BAD);
    for size in [
        SIZE + 5000,
        4 * FOLIO,
        3 * FOLIO - 1,
        SIZE - SUBPAGE,
        SIZE,
        BAD + SUBPAGE,
        BAD + 2 * FOLIO,
    ] {
        file.set_len(size).unwrap();
        assert_eq!(listed(&path), hw(&[BAD]), "{size:#x}");
        pool.check();
    }
    assert_holds(&file, 0, BAD, 7);
    assert_holds(&file, BAD + SUBPAGE, BAD + 2 * FOLIO, 0);
    let mut toucher = Toucher::mapping(&path, BAD + 2 * FOLIO);
    assert_eq!(toucher.walk(), [BAD]);
    set(&path, REPAIR, "zero all").unwrap();
    assert_eq!(toucher.walk(), []);
    pool.check();
    drop((toucher, file));
    pool.unmount();
}

fn a_file_grows_from_within_a_lost_subpage() {
    let pool = pool();
    let (path, file) = sevens(&pool, BAD + 100);
    inject(&path, BAD);
    for size in [BAD + 200, BAD + SUBPAGE + 500, BAD + 20 * SUBPAGE + 7, SIZE + 1] {
        file.set_len(size).unwrap();
        assert_eq!(listed(&path), hw(&[BAD]), "{size:#x}");
        pool.check();
    }
    assert_holds(&file, BAD + SUBPAGE, SIZE + 1, 0);
    file.set_len(BAD + 100).unwrap();
    assert_eq!(listed(&path), hw(&[BAD]));
    pool.check();
    assert_eq!(errno(file.write_at(&[9; 100], BAD)), Ok(100), "all that there is of it");
    assert_holds(&file, BAD, BAD + 100, 9);
    file.set_len(SIZE).unwrap();
    assert_holds(&file, BAD + 100, SIZE, 0);
    assert_whole(&pool, &path, SIZE);
    drop(file);
    pool.unmount();
}

fn unlinking_a_file_with_errors_gives_all_its_pages_back() {
    let pool = pool();
    let (path, file) = sevens(&pool, 4 * FOLIO);
    for offset in [0, BAD, 3 * FOLIO, 4 * FOLIO - 1] {
        inject(&path, offset);
    }
    assert_eq!(listed(&path).len(), 4);
    drop(file);
    std::fs::remove_file(&path).unwrap();
    pool.wait_for_free_pages(4);
    assert_eq!(pool.counter("quarantined_hw"), 0);
    pool.check();
    let (path, file) = sevens(&pool, 4 * FOLIO);
    assert_whole(&pool, &path, 4 * FOLIO);
    assert_holds(&file, 0, 4 * FOLIO, 7);
    drop(file);
    pool.unmount();
}

// ---- many errors --------------------------------------------------------------------------------

fn errors_are_told_apart_wherever_they_are() {
    let last = SIZE + 3 * SUBPAGE;
    for places in [
        vec![BAD, BAD + 2 * SUBPAGE],
        vec![FOLIO - SUBPAGE - SUBPAGE, FOLIO],
        vec![0, last],
        vec![0, 2 * SUBPAGE, BAD, SIZE, last],
    ] {
        let pool = pool();
        let (path, file) = sevens(&pool, last + 10); // the file ends within its last subpage
        places.iter().for_each(|place| inject(&path, *place));
        assert_eq!(listed(&path), hw(&places));
        assert_eq!(pool.counter("quarantined_hw"), places.len() as u64);
        let mut toucher = Toucher::mapping(&path, last + 10);
        assert_eq!(toucher.walk(), places);
        pool.check();
        let (first, others) = places.split_first().unwrap();
        assert_eq!(errno(file.write_at(&[9; SUBPAGE as usize], *first)), Ok(SUBPAGE as usize));
        assert_eq!(listed(&path), hw(others));
        assert_eq!(toucher.walk(), others);
        pool.check();
        set(&path, REPAIR, "zero all").unwrap();
        assert_eq!(toucher.walk(), []);
        assert_holds(&file, *first, first + SUBPAGE, 9);
        others
            .iter()
            .for_each(|place| assert_holds(&file, *place, (place + SUBPAGE).min(last + 10), 0));
        assert_eq!(std::fs::metadata(&path).unwrap().len(), last + 10);
        pool.check();
        drop((toucher, file));
        pool.unmount();
    }
}

fn soft_and_hardware_errors_are_repaired_in_either_order() {
    for (first, second) in [(BAD, BAD + SUBPAGE), (BAD + SUBPAGE, BAD)] {
        for hw_is_new in [false, true] {
            let pool = pool();
            let (path, file) = sevens(&pool, SIZE);
            if hw_is_new {
                poison(&path, BAD, 1).unwrap();
                inject(&path, BAD + SUBPAGE);
            } else {
                inject(&path, BAD + SUBPAGE);
                poison(&path, BAD, 2 * SUBPAGE).unwrap();
            }
            assert_eq!(listed(&path), ["0x205000 0x1000 soft", "0x206000 0x1000 hw"]);
            let mut toucher = Toucher::mapping(&path, SIZE);
            assert_eq!(
                toucher.ask("walk"),
                format!("hits {BAD}:2 {}:{BUS_MCEERR_AR}", BAD + SUBPAGE)
            );
            pool.check();
            set(&path, REPAIR, format!("zero {first} 1")).unwrap();
            assert_eq!(toucher.walk(), [second]);
            pool.check();
            set(&path, REPAIR, format!("zero {second} 1")).unwrap();
            assert_eq!(toucher.walk(), []);
            assert_holds(&file, BAD, BAD + 2 * SUBPAGE, 0);
            assert_whole(&pool, &path, SIZE);
            drop((toucher, file));
            pool.unmount();
        }
    }
}

fn an_error_in_an_unlinked_file_is_found_and_repaired() {
    let pool = pool();
    let (path, file) = sevens(&pool, SIZE);
    let mut toucher = Toucher::mapping(&path, SIZE);
    assert_eq!(toucher.walk(), []);
    std::fs::remove_file(&path).unwrap();
    strike(&mut toucher, BAD);
    assert_eq!(toucher.ask("walk"), format!("hits {BAD}:{BUS_MCEERR_AR}"));
    assert_eq!(events(&file, &PATIENCE), PollFlags::PRI);
    assert_eq!(pool.counter("quarantined_hw"), 1);
    fsetxattr(&file, REPAIR, b"zero all", XattrFlags::empty()).unwrap();
    assert_eq!(toucher.walk(), []);
    pool.check();
    strike(&mut toucher, 0);
    drop(file);
    assert_eq!(toucher.ask("walk"), format!("hits 0:{BUS_MCEERR_AR}"), "while it is only mapped");
    pool.check();
    drop(toucher);
    pool.wait_for_free_pages(4);
    assert_eq!(pool.counter("quarantined_hw"), 0);
    pool.check();
    let (path, file) = sevens(&pool, 4 * FOLIO);
    assert_whole(&pool, &path, 4 * FOLIO);
    drop(file);
    pool.unmount();
}

fn an_error_behind_the_end_does_not_keep_a_file_from_growing() {
    let pool = pool();
    let (path, file) = sevens(&pool, SIZE);
    inject(&path, BAD); // no request has asked for the list of errors
    file.set_len(BAD - 10).unwrap();
    file.set_len(SIZE).unwrap();
    assert_holds(&file, BAD - 10, SIZE, 0);
    assert_whole(&pool, &path, SIZE);

    file.set_len(BAD - 10).unwrap();
    set(&path, COLLAPSE, "all").unwrap();
    let mut toucher = Toucher::mapping(&path, SIZE);
    assert!(toucher.load(FOLIO).is_some());
    assert_eq!(toucher.huge(), 1, "what lies behind the end is mapped with the rest");
    strike(&mut toucher, BAD + 7 * SUBPAGE);
    file.set_len(BAD + 3 * SUBPAGE).unwrap();
    pool.check();
    file.set_len(SIZE).unwrap();
    assert_holds(&file, BAD - 10, SIZE, 0);
    assert_eq!(toucher.walk(), []);
    drop(toucher);
    assert_whole(&pool, &path, SIZE);
    drop(file);
    pool.unmount();
}

// ---- errors that no process knows of ------------------------------------------------------------

fn a_write_that_meets_an_unknown_error_succeeds() {
    let pool = pool();
    let (path, file) = sevens(&pool, SIZE);
    let mut toucher = Toucher::mapping(&path, SIZE);
    assert_eq!(toucher.walk(), []);
    strike(&mut toucher, BAD);
    assert_eq!(errno(file.write_at(&[9; SUBPAGE as usize], BAD)), Ok(SUBPAGE as usize));
    assert_eq!(toucher.walk(), []);
    assert_holds(&file, BAD, BAD + SUBPAGE, 9);
    pool.check();
    strike(&mut toucher, BAD + SUBPAGE);
    file.write_all_at(&[8; 3 * SUBPAGE as usize], BAD).unwrap();
    // If the error hit a 4 KiB entry, the kernel has left a mark in the page table. Only a new page
    // table is without it.
    set(&path, COLLAPSE, "all").unwrap();
    assert_eq!(toucher.walk(), []);
    assert_holds(&file, BAD, BAD + 3 * SUBPAGE, 8);
    drop(toucher);
    assert_whole(&pool, &path, SIZE);
    drop(file);
    pool.unmount();
}

fn a_request_that_meets_an_unknown_error_knows_of_it() {
    let pool = pool();
    let (path, file) = sevens(&pool, SIZE);
    let mut toucher = Toucher::mapping(&path, SIZE);
    assert_eq!(toucher.walk(), []);
    for offset in [BAD, 0] {
        strike(&mut toucher, offset);
        set(&path, REPAIR, format!("zero {offset} 1")).unwrap();
        assert_eq!(toucher.walk(), []);
    }
    strike(&mut toucher, BAD);
    assert_eq!(seek(&file, SeekFrom::Hole(0)), Ok(BAD));
    strike(&mut toucher, 0);
    assert!(
        get(&path, MAP).unwrap().starts_with("0x0 0x1000 poisoned"),
        "{}",
        get(&path, MAP).unwrap()
    );
    pool.check();
    drop((toucher, file));
    pool.unmount();
}

pub fn the_kernel_itself_reads_up_to_an_error_and_never_through_it() {
    let pool = pool();
    let (path, writer) = sevens(&pool, SIZE);
    let (before, mut copy) = (File::open(&path).unwrap(), tempfile::tempfile().unwrap());
    inject(&path, BAD);
    let after = File::open(&path).unwrap();
    assert_eq!(
        pool.counter("opened_natively"),
        2,
        "this kernel looks for errors, and io=auto is the default"
    );
    for reader in [&before, &after] {
        assert_eq!(read(reader, BAD - SUBPAGE, 3 * SUBPAGE), Ok(vec![7; SUBPAGE as usize]));
        assert_eq!(read(reader, BAD, SUBPAGE), Err(Errno::IO));
        assert_eq!(read(reader, BAD + 100, 1), Err(Errno::IO));
        assert_holds(reader, BAD + SUBPAGE, SIZE, 7);
        let mut from = BAD;
        assert_eq!(rustix::fs::sendfile(&copy, reader, Some(&mut from), 1), Err(Errno::IO));
    }
    assert_eq!(poison(&path, 0, 1), Err(Errno::BUSY), "a hole would be zeros to them");
    assert_eq!(poison(&path, BAD, 1), Ok(()), "that is quarantined already");
    writer.write_all_at(&[8; SUBPAGE as usize], BAD).unwrap();
    assert_eq!(read(&before, BAD, SUBPAGE), Ok(vec![8; SUBPAGE as usize]));
    drop((before, after));
    poison(&path, 0, 1).unwrap();
    let mediated = File::open(&path).unwrap();
    assert_eq!(read(&mediated, 0, SUBPAGE), Err(Errno::IO));
    assert_eq!(std::io::Seek::stream_position(&mut copy).unwrap(), 0);
    set(&path, REPAIR, "salvage all").unwrap();
    assert_whole(&pool, &path, SIZE);
}

/// The daemon answers large reads from its own mapping of the file, which is there already.
pub fn a_large_read_ends_before_an_error_that_nobody_knew_of() {
    let pool = pool();
    let (path, file) = sevens(&pool, SIZE);
    let worker = pool.counter("worker_pid");
    let mut toucher = Toucher::mapping(&path, SIZE);
    for offset in [BAD, BAD + 100 * SUBPAGE, BAD + 400 * SUBPAGE] {
        let from = offset - 5 * SUBPAGE;
        assert_eq!(read(&file, from, FOLIO / 8), Ok(vec![7; (FOLIO / 8) as usize]));
        strike(&mut toucher, offset);
        assert_eq!(read(&file, from, FOLIO / 8), Ok(vec![7; (5 * SUBPAGE) as usize]));
        assert_eq!(read(&file, offset, FOLIO / 8), Err(Errno::IO));
        assert_eq!(read(&file, offset + SUBPAGE, FOLIO / 8), Ok(vec![7; (FOLIO / 8) as usize]));
    }
    assert_eq!(listed(&path).len(), 3);
    assert_eq!(pool.counter("worker_pid"), worker, "the daemon has not died of it");
    set(&path, REPAIR, "zero all").unwrap();
    drop(toucher);
    assert_whole(&pool, &path, SIZE);
}

pub fn a_write_past_the_end_repairs_known_and_unknown_errors() {
    const LAST: u64 = FOLIO - SUBPAGE;
    let bytes = [8; 2 * SUBPAGE as usize];
    for known in [true, false] {
        let pool = pool();
        let (path, file) = sevens(&pool, FOLIO + 1000);
        let mut toucher = Toucher::mapping(&path, 2 * FOLIO);
        strike(&mut toucher, LAST); // in another folio than the end
        if known {
            assert_eq!(listed(&path), hw(&[LAST]));
        }
        file.write_all_at(&bytes, LAST).unwrap();
        assert_holds(&file, LAST, FOLIO + SUBPAGE, 8);
        // Behind the end, so that no byte is lost.
        strike(&mut toucher, FOLIO + SUBPAGE);
        if known {
            assert_eq!(listed(&path), hw(&[]));
        }
        file.write_all_at(&bytes, FOLIO + SUBPAGE).unwrap();
        assert_holds(&file, LAST, FOLIO + 3 * SUBPAGE, 8);
        assert_holds(&file, 0, LAST, 7);
        drop(toucher);
        pool.check();
        assert_eq!(listed(&path), hw(&[]));
    }
}
