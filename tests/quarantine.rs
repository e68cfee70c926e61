//! A file loses subpages: the effect on each process that uses it, and the ways to make it whole
//! again.

mod support;

use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;
use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Instant, SystemTime, UNIX_EPOCH};
use support::{
    CHECK, COLLAPSE, FOLIO, GIB, INJECT, LOSSES, MAP, POISON, POOL, Pool, REPAIR, SUBPAGE, Toucher,
    get, hugetlb2, kill_worker, limits, poison, run, set, status_and_error,
};

/// A byte that differs from its neighbours in this subpage and in others.
fn byte_at(offset: u64) -> u8 {
    (offset % 251) as u8 ^ (offset / SUBPAGE % 255) as u8 | 1
}

fn pattern(offset: u64, length: u64) -> Vec<u8> {
    (offset..offset + length).map(byte_at).collect()
}

/// A file of `size` bytes that depend on their place.
fn patterned(pool: &Pool, name: &str, size: u64) -> PathBuf {
    let file = pool.join(name);
    std::fs::write(&file, pattern(0, size)).unwrap();
    file
}

fn open(file: &Path) -> File {
    OpenOptions::new().read(true).write(true).open(file).unwrap()
}

fn read(file: &Path, offset: u64, length: u64) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; length as usize];
    let read = open(file).read_at(&mut bytes, offset)?;
    bytes.truncate(read);
    Ok(bytes)
}

fn errno<T: std::fmt::Debug>(result: io::Result<T>) -> Errno {
    Errno::from_io_error(&result.expect_err("it is refused")).expect("a system call refused it")
}

/// The ranges of the poison attribute; none if there is no attribute.
fn quarantined(file: &Path) -> Vec<(u64, u64)> {
    match get(file, POISON) {
        Ok(text) => text.lines().map(|line| (column(line, 0), column(line, 1))).collect(),
        Err(Errno::NODATA) => Vec::new(),
        Err(errno) => panic!("{errno}"),
    }
}

fn column(line: &str, n: usize) -> u64 {
    let word = line.split(' ').nth(n).expect("a column");
    match word.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).expect("a number"),
        None => word.parse().expect("a number"),
    }
}

fn names(path: &Path) -> Vec<String> {
    let mut names = vec![0; 4096];
    let length = rustix::fs::llistxattr(path, &mut names[..]).unwrap();
    names.truncate(length);
    names.split(|byte| *byte == 0).filter(|name| !name.is_empty()).map(support::text).collect()
}

fn unix_time() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

/// Asserts that every byte is as [`patterned`] made it, except in the subpages at `lost`, which are
/// EIO. Reads as much at once as there is between two of these.
fn assert_intact_but(file: &Path, size: u64, lost: &[u64]) {
    let fd = open(file);
    for at in lost {
        let refused = errno(fd.read_at(&mut [0; SUBPAGE as usize], *at));
        assert_eq!(refused, Errno::IO, "{at:#x}");
    }
    let mut lost = lost.to_vec();
    lost.sort_unstable();
    let starts = [0].into_iter().chain(lost.iter().map(|at| at + SUBPAGE));
    let ends = lost.iter().copied().chain([size]);
    for (start, end) in starts.zip(ends).filter(|(start, end)| start < end) {
        let mut bytes = vec![0; (end - start) as usize];
        fd.read_exact_at(&mut bytes, start).unwrap();
        let wrong = bytes.iter().zip(start..).find(|(byte, at)| **byte != byte_at(*at));
        assert_eq!(wrong, None, "the byte at a place");
    }
}

/// Waits for an act of the daemon that no request asks for.
fn eventually(what: &str, holds: impl FnMut() -> bool) {
    limits::until(limits::ANSWER, what, holds);
}

// ---- quarantining -------------------------------------------------------------------------------

#[test]
fn a_quarantined_subpage_is_listed_with_kind_and_time() {
    let pool = Pool::small(2);
    let file = patterned(&pool, "file", FOLIO);
    let before = unix_time();
    poison(&file, 5 * SUBPAGE, SUBPAGE).unwrap();
    let line = get(&file, POISON).unwrap();
    assert!(line.starts_with("0x5000 0x1000 soft ") && line.ends_with('\n'), "{line}");
    assert!((before..=unix_time()).contains(&column(line.trim(), 3)), "{line}");
    assert_intact_but(&file, FOLIO, &[5 * SUBPAGE]);
    pool.check();
}

#[test]
fn ranges_are_rounded_outward_and_lines_add_up() {
    for (value, ranges) in [
        ("4096 1", vec![(0x1000, 0x1000)]),
        ("0x1fff 1", vec![(0x1000, 0x1000)]),
        ("4095 2", vec![(0, 0x2000)]),
        ("4095 4098", vec![(0, 0x3000)]),
        ("0x8000 0x1000\n0x2000 0x1000\n", vec![(0x2000, 0x1000), (0x8000, 0x1000)]),
        ("0 1\n4096 1\n\n8192 1\0", vec![(0, 0x3000)]),
        ("0 8192\n4096 8192", vec![(0, 0x3000)]),
    ] {
        let pool = Pool::small(1);
        let file = patterned(&pool, "file", FOLIO);
        set(&file, POISON, value).unwrap();
        assert_eq!(quarantined(&file), ranges, "{value:?}");
        pool.check();
    }
}

#[test]
fn what_is_quarantined_already_keeps_its_time() {
    let pool = Pool::small(1);
    let file = patterned(&pool, "file", FOLIO);
    poison(&file, SUBPAGE, SUBPAGE).unwrap();
    let first = get(&file, POISON).unwrap();
    let time = column(first.trim(), 3);
    eventually("the next second", || unix_time() > time);
    poison(&file, SUBPAGE, SUBPAGE).unwrap();
    assert_eq!(get(&file, POISON).unwrap(), first);
    poison(&file, 0, 3 * SUBPAGE).unwrap();
    let text = get(&file, POISON).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 3, "{text}");
    assert_eq!(lines[1], first.trim());
    assert!(column(lines[0], 3) > time && column(lines[2], 3) > time, "{text}");
    pool.check();
}

#[test]
fn a_value_that_was_read_can_be_written_to_another_file() {
    let pool = Pool::small(2);
    let (from, to) = (patterned(&pool, "from", FOLIO), patterned(&pool, "to", FOLIO));
    set(&from, POISON, "0x3000 0x1000 hw 1700000000 whatever else\n0x9000 0x2000").unwrap();
    let value = get(&from, POISON).unwrap();
    set(&to, POISON, &value).unwrap();
    assert_eq!(quarantined(&to), [(0x3000, 0x1000), (0x9000, 0x2000)]);
    pool.check();
}

#[test]
fn cp_carries_a_quarantine_with_the_attributes() {
    let pool = Pool::small(2);
    let (from, to) = (patterned(&pool, "from", FOLIO), pool.join("to"));
    set(&from, POISON, "0x3000 0x1000\n0x9000 0x2000").unwrap();
    run(Command::new("cp").args(["--sparse=always", "--preserve=xattr"]).arg(&from).arg(&to));
    assert_eq!(quarantined(&to), quarantined(&from));
    assert_intact_but(&to, FOLIO, &[0x3000, 0x9000, 0xa000]);
    pool.check();
}

#[test]
fn rsync_carries_a_quarantine_with_the_attributes() {
    let pool = Pool::small(2);
    let (from, to) = (patterned(&pool, "from", FOLIO), pool.join("to"));
    run(Command::new("cp").arg("-p").arg(&from).arg(&to));
    set(&from, POISON, "0x3000 0x1000\n0x9000 0x2000").unwrap();
    run(Command::new("rsync").arg("-aX").arg(&from).arg(&to));
    assert_eq!(quarantined(&to), quarantined(&from));
    pool.check();
}

#[test]
fn malformed_requests_and_ranges_past_the_end_change_nothing() {
    let pool = Pool::small(2);
    let size = FOLIO + 5000;
    let file = patterned(&pool, "file", size);
    poison(&file, 7 * SUBPAGE, 1).unwrap();
    let before = get(&file, POISON).unwrap();
    for value in [
        "",
        "\n",
        "all",
        "x",
        "0",
        "0 y",
        "0 0",
        "-1 4096",
        "+0 4096",
        "0x 4096",
        "0 4096 \n nonsense",
        "0 4096\n4096",
        "0 4096\n0 0",
        &format!("0 4096\n{} 1", size.next_multiple_of(SUBPAGE)),
        &format!("{} 1", size.next_multiple_of(SUBPAGE)),
        &format!("{} 4097", size / SUBPAGE * SUBPAGE),
        &format!("0 {}", size.next_multiple_of(SUBPAGE) + 1),
        "18446744073709551615 2",
        "18446744073709551616 1",
        "0 18446744073709551615",
    ] {
        assert_eq!(set(&file, POISON, value), Err(Errno::INVAL), "{value:?}");
        assert_eq!(get(&file, POISON).unwrap(), before, "{value:?}");
    }
    assert_eq!(set(&file, POISON, b"0 4096\n\xff\xfe"), Err(Errno::INVAL));
    assert_eq!(get(&file, POISON).unwrap(), before);
    assert_intact_but(&file, size, &[7 * SUBPAGE]);
    pool.check();
}

#[test]
fn a_released_page_has_nothing_to_quarantine() {
    let pool = Pool::small(2);
    let file = patterned(&pool, "file", 2 * FOLIO);
    fallocate(open(&file), FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, FOLIO, FOLIO)
        .unwrap();
    assert_eq!(set(&file, POISON, format!("0 4096\n{FOLIO} 4096")), Err(Errno::INVAL));
    assert_eq!(quarantined(&file), []);
    pool.check();
}

#[test]
fn an_empty_file_has_nothing_to_quarantine() {
    let pool = Pool::small(1);
    let file = patterned(&pool, "file", 0);
    assert_eq!(poison(&file, 0, 1), Err(Errno::INVAL));
    assert_eq!(set(&file, REPAIR, "zero all"), Err(Errno::NODATA));
    pool.check();
}

#[test]
fn only_regular_files_have_the_attributes_of_files() {
    let pool = Pool::small(1);
    std::fs::create_dir(pool.join("directory")).unwrap();
    std::os::unix::fs::symlink("directory", pool.join("symlink")).unwrap();
    for name in ["directory", "symlink", "."] {
        for (attribute, value) in
            [(POISON, "0 1"), (REPAIR, "zero all"), (COLLAPSE, "all"), (MAP, "")]
        {
            let refused = set(pool.join(name), attribute, value).expect_err("it is refused");
            assert!(
                [Errno::OPNOTSUPP, Errno::PERM].contains(&refused),
                "{name} {attribute}: {refused}"
            );
            assert_eq!(get(pool.join(name), attribute), Err(Errno::NODATA), "{name} {attribute}");
        }
    }
    pool.check();
}

#[test]
fn a_file_without_a_quarantine_has_no_poison_attribute() {
    let pool = Pool::small(1);
    let file = patterned(&pool, "file", FOLIO);
    rustix::fs::setxattr(&file, "user.own", b"1", rustix::fs::XattrFlags::empty()).unwrap();
    assert_eq!(get(&file, POISON), Err(Errno::NODATA));
    assert_eq!(names(&file), ["user.own"]);
    poison(&file, 0, 1).unwrap();
    assert_eq!(names(&file), ["user.own", POISON]);
    set(&file, REPAIR, "zero all").unwrap();
    assert_eq!(names(&file), ["user.own"]);
    assert_eq!(get(&file, POISON), Err(Errno::NODATA));
}

#[test]
fn a_quarantine_does_not_end_by_removing_the_attribute() {
    let pool = Pool::small(1);
    let file = patterned(&pool, "file", FOLIO);
    assert_eq!(rustix::fs::removexattr(&file, POISON), Err(Errno::PERM));
    poison(&file, 0, 1).unwrap();
    assert_eq!(rustix::fs::removexattr(&file, POISON), Err(Errno::PERM));
    assert_eq!(quarantined(&file), [(0, 0x1000)]);
}

#[test]
fn quarantining_needs_permission_to_write_the_file() {
    let pool = Pool::small(1);
    let file = patterned(&pool, "file", FOLIO);
    let setfattr = |uid: &str| {
        let mut command = Command::new("setpriv");
        command.args([
            &format!("--reuid={uid}"),
            "--clear-groups",
            "setfattr",
            "-n",
            POISON,
            "-v",
            "0 1",
        ]);
        status_and_error(command.arg(&file))
    };
    // The mount point lies in a directory of the test, which others must be able to search.
    let directory = pool.path().parent().unwrap().to_owned();
    rustix::fs::chmod(&directory, rustix::fs::Mode::from_raw_mode(0o755)).unwrap();
    let (status, error) = setfattr("65534");
    assert!(status != 0 && error.contains("denied"), "{error}");
    assert_eq!(quarantined(&file), []);
    std::os::unix::fs::chown(&file, Some(65534), None).unwrap();
    assert_eq!(setfattr("65534"), (0, String::new()));
    assert_eq!(quarantined(&file), [(0, 0x1000)]);
}

// ---- repair -------------------------------------------------------------------------------------

#[test]
fn repair_zero_gives_zeros_and_salvage_gives_every_byte_back() {
    let pool = Pool::small(2);
    for (verb, expected) in
        [("zero", vec![0; SUBPAGE as usize]), ("salvage", pattern(0x6000, SUBPAGE))]
    {
        let file = patterned(&pool, verb, FOLIO);
        let mut toucher = Toucher::mapping(&file, FOLIO);
        poison(&file, 0x6000, 1).unwrap();
        set(&file, REPAIR, format!("{verb} 0x6000 1")).unwrap();
        assert_eq!(quarantined(&file), []);
        assert_eq!(read(&file, 0x6000, SUBPAGE).unwrap(), expected, "{verb}");
        assert_eq!(toucher.load(0x6000 + 17), Some(expected[17]), "{verb}");
        assert_eq!(toucher.walk(), []);
        assert_eq!(read(&file, 0, 0x6000).unwrap(), pattern(0, 0x6000));
        assert_eq!(read(&file, 0x7000, FOLIO).unwrap(), pattern(0x7000, FOLIO - 0x7000));
    }
    pool.check();
}

#[test]
fn repair_all_repairs_all_and_ranges_only_what_they_name() {
    let pool = Pool::small(2);
    let file = patterned(&pool, "file", 2 * FOLIO);
    let lost: Vec<u64> = vec![0, 0x5000, 0x6000, FOLIO - SUBPAGE, FOLIO, 2 * FOLIO - SUBPAGE];
    for offset in &lost {
        poison(&file, *offset, 1).unwrap();
    }
    set(&file, REPAIR, "salvage 0x5001 1\nsalvage 0x1ff000 0x1001\n").unwrap();
    assert_intact_but(&file, 2 * FOLIO, &[0, 0x6000, 2 * FOLIO - SUBPAGE]);
    set(&file, REPAIR, "zero 0 4096\nsalvage all").unwrap();
    assert_eq!(quarantined(&file), []);
    assert_eq!(read(&file, 0, SUBPAGE).unwrap(), vec![0; SUBPAGE as usize]);
    assert_eq!(read(&file, SUBPAGE, 2 * FOLIO).unwrap(), pattern(SUBPAGE, 2 * FOLIO - SUBPAGE));
    pool.check();
}

#[test]
fn repairing_what_is_not_broken_is_refused_and_changes_nothing() {
    let pool = Pool::small(1);
    let file = patterned(&pool, "file", FOLIO);
    for value in ["zero all", "salvage all", "zero 0 4096"] {
        assert_eq!(set(&file, REPAIR, value), Err(Errno::NODATA), "{value}");
    }
    poison(&file, 0, 1).unwrap();
    for value in ["zero 4096 4096", "zero 0 4096\nzero 4096 4096", "salvage 0 1\nsalvage 8192 1"] {
        assert_eq!(set(&file, REPAIR, value), Err(Errno::NODATA), "{value}");
        assert_intact_but(&file, FOLIO, &[0]);
    }
    pool.check();
}

#[test]
fn malformed_repairs_are_refused_and_change_nothing() {
    let pool = Pool::small(1);
    let file = patterned(&pool, "file", FOLIO);
    poison(&file, 0, 1).unwrap();
    for value in [
        "",
        "zero",
        "salvage",
        "all",
        "heal all",
        "zero all all",
        "zero 0",
        "zero 0 0",
        "zero 0 1 2",
        "zero 0 1\nheal 0 1",
        "zero 0 1\nzero 2097152 1",
        "zero 0 2097153",
        "ZERO all",
    ] {
        assert_eq!(set(&file, REPAIR, value), Err(Errno::INVAL), "{value:?}");
        assert_eq!(quarantined(&file), [(0, 0x1000)], "{value:?}");
    }
    assert_eq!(get(&file, REPAIR), Err(Errno::NODATA));
    pool.check();
}

#[test]
fn the_last_subpage_of_a_file_that_ends_within_it_comes_back() {
    let pool = Pool::small(2);
    for (verb, expected) in [("salvage", pattern(0x3000, 1000)), ("zero", vec![0; 1000])] {
        let file = patterned(&pool, verb, 0x3000 + 1000);
        poison(&file, 0x3000, 1).unwrap();
        assert_eq!(errno(read(&file, 0x3000, SUBPAGE)), Errno::IO);
        set(&file, REPAIR, format!("{verb} all")).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 0x3000 + 1000);
        assert_eq!(read(&file, 0x3000, SUBPAGE).unwrap(), expected);
        // The bytes behind the old end are zeros.
        open(&file).set_len(0x5000).unwrap();
        assert_eq!(read(&file, 0x3000 + 1000, SUBPAGE).unwrap(), vec![0; SUBPAGE as usize]);
        pool.check();
    }
}

#[test]
fn a_file_goes_bad_and_is_repaired_over_and_over() {
    let pool = Pool::small(1);
    let file = patterned(&pool, "file", FOLIO);
    for round in 0..50 {
        poison(&file, round * 7 % 512 * SUBPAGE, 2).unwrap();
        poison(&file, (round * 7 + 3) % 512 * SUBPAGE, 1).unwrap();
        set(&file, REPAIR, "salvage all").unwrap();
    }
    assert_intact_but(&file, FOLIO, &[]);
    assert_eq!(pool.counter("quarantined_soft"), 0);
    pool.check();
}

// ---- read(2), lseek(2) --------------------------------------------------------------------------

#[test]
fn a_read_ends_before_a_quarantined_subpage_and_is_eio_at_it() {
    let pool = Pool::small(1);
    let file = patterned(&pool, "file", FOLIO);
    set(&file, POISON, "0x4000 1\n0x9000 1").unwrap();
    assert_eq!(read(&file, 0, FOLIO).unwrap(), pattern(0, 0x4000));
    assert_eq!(read(&file, 0x3fff, 0x1002).unwrap(), pattern(0x3fff, 1));
    assert_eq!(read(&file, 0x5000, FOLIO).unwrap(), pattern(0x5000, 0x4000));
    assert_eq!(read(&file, 0xa000, FOLIO).unwrap(), pattern(0xa000, FOLIO - 0xa000));
    for offset in [0x4000, 0x4001, 0x4fff, 0x9000, 0x9800] {
        assert_eq!(errno(read(&file, offset, 1)), Errno::IO, "{offset:#x}");
    }
    pool.check();
}

#[test]
fn seeking_steps_over_quarantined_subpages() {
    let pool = Pool::small(2);
    let size = FOLIO + 5000;
    let file = patterned(&pool, "file", size);
    set(&file, POISON, format!("0 1\n0x5000 0x2000\n{} 1", FOLIO + SUBPAGE)).unwrap();
    let fd = open(&file);
    let data = |at| seek(&fd, SeekFrom::Data(at));
    let hole = |at| seek(&fd, SeekFrom::Hole(at));
    for (at, data_at, hole_at) in [
        (0, Ok(0x1000), 0),
        (0xfff, Ok(0x1000), 0xfff),
        (0x1000, Ok(0x1000), 0x5000),
        (0x4fff, Ok(0x4fff), 0x5000),
        (0x5000, Ok(0x7000), 0x5000),
        (0x6001, Ok(0x7000), 0x6001),
        (0x7000, Ok(0x7000), FOLIO + SUBPAGE),
        (FOLIO + SUBPAGE, Err(Errno::NXIO), FOLIO + SUBPAGE),
        (size - 1, Err(Errno::NXIO), size - 1),
    ] {
        assert_eq!(data(at), data_at, "SEEK_DATA {at:#x}");
        assert_eq!(hole(at), Ok(hole_at), "SEEK_HOLE {at:#x}");
    }
    assert_eq!((data(size), hole(size)), (Err(Errno::NXIO), Err(Errno::NXIO)));
}

#[test]
fn cp_rescues_everything_that_is_not_lost() {
    let pool = Pool::small(4);
    let outside = tempfile::tempdir_in("/dev/shm").unwrap();
    for (name, size) in [("whole", 2 * FOLIO), ("ragged", FOLIO + 123_457), ("short", 40_000)] {
        let file = patterned(&pool, name, size);
        let lost = [0u64, 0x5000, 0x6000];
        set(&file, POISON, "0 1\n0x5000 0x2000").unwrap();
        let copy = outside.path().join(name);
        run(Command::new("cp").arg("--sparse=always").arg(&file).arg(&copy));
        let rescued = std::fs::read(&copy).unwrap();
        assert_eq!(rescued.len() as u64, size);
        for (n, byte) in rescued.iter().enumerate() {
            let offset = n as u64;
            let expected =
                if lost.contains(&(offset / SUBPAGE * SUBPAGE)) { 0 } else { byte_at(offset) };
            assert_eq!(*byte, expected, "{name} {offset:#x}");
        }
        std::fs::remove_file(&file).unwrap();
    }
    pool.check();
}

// ---- write(2) -----------------------------------------------------------------------------------

#[test]
fn a_write_over_a_quarantined_subpage_repairs_it() {
    for (what, size, lost, offset, length) in [
        ("exactly", FOLIO, vec![0x5000], 0x5000, 0x1000),
        ("more, unaligned", FOLIO, vec![0x5000], 0x4ffd, 0x1007),
        ("several", FOLIO, vec![0x5000, 0x6000, 0x8000], 0x4001, 0x6001),
        ("the first", FOLIO, vec![0], 0, 0x1001),
        ("the last", FOLIO, vec![FOLIO - SUBPAGE], FOLIO - SUBPAGE - 1, 0x1001),
        ("up to the end within it", 0x3000 + 777, vec![0x3000], 0x3000, 777),
        ("up to the end, unaligned", 0x3000 + 777, vec![0x2000, 0x3000], 0x1fff, 0x1000 + 778),
        ("across folios", 2 * FOLIO, vec![FOLIO - SUBPAGE, FOLIO], FOLIO - 0x1800, 0x3000),
        ("larger than a request", 2 * FOLIO, vec![0x1000, 0xff000, 0x100000, FOLIO], 0, 2 * FOLIO),
    ] {
        let pool = Pool::small(2);
        let file = patterned(&pool, "file", size);
        let mut toucher = Toucher::mapping(&file, size);
        for subpage in &lost {
            poison(&file, *subpage, 1).unwrap();
        }
        let data: Vec<u8> = pattern(offset, length).iter().map(|byte| !byte).collect();
        open(&file).write_all_at(&data, offset).unwrap();
        assert_eq!(quarantined(&file), [], "{what}");
        let mut expected = pattern(0, size);
        expected[offset as usize..(offset + length) as usize].copy_from_slice(&data);
        assert!(std::fs::read(&file).unwrap() == expected, "{what}");
        assert_eq!(file.metadata().unwrap().len(), size, "{what}");
        assert_eq!(toucher.walk(), [], "{what}");
        assert_eq!(toucher.load(lost[0]), Some(expected[lost[0] as usize]), "{what}");
        pool.check();
    }
}

#[test]
fn a_write_of_a_part_of_a_quarantined_subpage_ends_before_it() {
    let pool = Pool::small(1);
    let file = patterned(&pool, "file", FOLIO);
    poison(&file, 0x5000, 1).unwrap();
    let fd = open(&file);
    let data = vec![0xee; 2 * SUBPAGE as usize];
    // The write ends within the subpage: only the part before the subpage is written.
    assert_eq!(fd.write_at(&data[..0x1800], 0x4000).unwrap(), 0x1000);
    assert_eq!(read(&file, 0x4000, FOLIO).unwrap(), vec![0xee; 0x1000]);
    assert_eq!(fd.write_at(&data[..2], 0x4fff).unwrap(), 1);
    // The write starts in the subpage.
    for (offset, length) in
        [(0x5000, 1), (0x5000, 0xfff), (0x5001, 0xfff), (0x5001, 0x2000 - 1), (0x5fff, 2)]
    {
        assert_eq!(
            errno(fd.write_at(&data[..length], offset)),
            Errno::IO,
            "{offset:#x} {length:#x}"
        );
    }
    assert_eq!(quarantined(&file), [(0x5000, 0x1000)]);
    assert_eq!(read(&file, 0x6000, FOLIO).unwrap(), pattern(0x6000, FOLIO - 0x6000));
    // The write covers one quarantined subpage whole, and the next one in part.
    poison(&file, 0x6000, 1).unwrap();
    assert_eq!(fd.write_at(&data[..0x1800], 0x5000).unwrap(), 0x1000);
    assert_eq!(quarantined(&file), [(0x6000, 0x1000)]);
    assert_eq!(read(&file, 0x5000, FOLIO).unwrap(), vec![0xee; 0x1000]);
    pool.check();
}

#[test]
fn without_recovery_write_a_covering_write_is_eio() {
    let pool = Pool::mount(&format!("pagesize=2M,size={FOLIO},recovery_write=off"));
    let file = patterned(&pool, "file", FOLIO);
    poison(&file, 0x5000, 1).unwrap();
    let fd = open(&file);
    let data = vec![0xee; 0x3000];
    assert_eq!(errno(fd.write_at(&data[..0x1000], 0x5000)), Errno::IO);
    assert_eq!(errno(fd.write_at(&data, 0x5000)), Errno::IO);
    assert_eq!(fd.write_at(&data, 0x4000).unwrap(), 0x1000);
    assert_eq!(quarantined(&file), [(0x5000, 0x1000)]);
    set(&file, REPAIR, "salvage all").unwrap();
    assert_eq!(read(&file, 0x5000, FOLIO).unwrap(), pattern(0x5000, FOLIO - 0x5000));
    pool.check();
}

// ---- sizes and pages ----------------------------------------------------------------------------

const PUNCH: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);

#[test]
fn truncating_discards_the_quarantine_behind_the_new_end() {
    let pool = Pool::small(2);
    let file = patterned(&pool, "file", 2 * FOLIO);
    set(&file, POISON, format!("0x5000 1\n{} 1\n{} 1", FOLIO, 2 * FOLIO - 1)).unwrap();
    open(&file).set_len(0x5000).unwrap();
    assert_eq!(quarantined(&file), []);
    assert_eq!((pool.counter("quarantined_soft"), pool.free_pages()), (0, 1));
    open(&file).set_len(2 * FOLIO).unwrap();
    assert_eq!(read(&file, 0, 0x5000).unwrap(), pattern(0, 0x5000));
    let rest = std::fs::read(&file).unwrap().split_off(0x5000);
    assert!(rest.iter().all(|byte| *byte == 0));
    pool.check();
}

#[test]
fn truncating_to_nothing_is_always_possible() {
    let pool = Pool::small(2);
    let file = patterned(&pool, "file", FOLIO + 5000);
    set(&file, POISON, format!("0 0x3000\n{} 1", FOLIO + SUBPAGE)).unwrap();
    open(&file).set_len(0).unwrap();
    assert_eq!((quarantined(&file), pool.free_pages()), (vec![], 2));
    pool.check();
}

#[test]
fn a_file_with_soft_holes_cannot_grow() {
    let pool = Pool::small(4);
    let file = patterned(&pool, "file", FOLIO - 0x1000);
    poison(&file, 0x5000, 1).unwrap();
    let fd = open(&file);
    for size in [FOLIO - 1, FOLIO, FOLIO + 1, 3 * FOLIO] {
        assert_eq!(errno(fd.set_len(size)), Errno::BUSY, "{size:#x}");
        assert_eq!(fallocate(&fd, FallocateFlags::empty(), 0, size), Err(Errno::BUSY), "{size:#x}");
    }
    assert_eq!(errno(fd.write_at(&[1; 0x1001], FOLIO - 0x2000)), Errno::BUSY);
    assert_eq!(errno(fd.write_at(&[1], 2 * FOLIO)), Errno::BUSY);
    assert_eq!((file.metadata().unwrap().len(), pool.free_pages()), (FOLIO - 0x1000, 3));
    assert_intact_but(&file, FOLIO - 0x1000, &[0x5000]);
    fd.set_len(FOLIO - 0x1000).unwrap();
    set(&file, REPAIR, "zero all").unwrap();
    fd.set_len(3 * FOLIO).unwrap();
    pool.check();
}

#[test]
fn a_file_with_soft_holes_elsewhere_cannot_give_pages_back() {
    let pool = Pool::small(4);
    let file = patterned(&pool, "file", 3 * FOLIO);
    poison(&file, FOLIO + 0x5000, 1).unwrap();
    let fd = open(&file);
    assert_eq!(fallocate(&fd, PUNCH, 0, FOLIO), Err(Errno::BUSY));
    assert_eq!(fallocate(&fd, PUNCH, 2 * FOLIO, FOLIO), Err(Errno::BUSY));
    assert_eq!(errno(fd.set_len(2 * FOLIO)), Errno::BUSY);
    assert_eq!(errno(fd.set_len(FOLIO + 0x5001)), Errno::BUSY);
    assert_eq!((file.metadata().unwrap().len(), pool.free_pages()), (3 * FOLIO, 1));
    assert_intact_but(&file, 3 * FOLIO, &[FOLIO + 0x5000]);
    // The page with the hole can go.
    fallocate(&fd, PUNCH, FOLIO, FOLIO).unwrap();
    assert_eq!((quarantined(&file), pool.free_pages()), (vec![], 2));
    assert_eq!(read(&file, 0, FOLIO).unwrap(), pattern(0, FOLIO));
    assert_eq!(read(&file, 2 * FOLIO, FOLIO).unwrap(), pattern(2 * FOLIO, FOLIO));
    pool.check();
}

#[test]
fn punching_or_zeroing_what_is_quarantined_discards_it() {
    for (what, flags) in [
        ("punch", PUNCH),
        ("zero", FallocateFlags::ZERO_RANGE),
        ("zero, keeping the size", FallocateFlags::ZERO_RANGE.union(FallocateFlags::KEEP_SIZE)),
    ] {
        let pool = Pool::small(1);
        let size = FOLIO - 0x1000 - 96;
        let last = size / SUBPAGE * SUBPAGE;
        let file = patterned(&pool, "file", size);
        let mut toucher = Toucher::mapping(&file, size);
        set(&file, POISON, format!("0x5000 0x2000\n{last} 1")).unwrap();
        let fd = open(&file);
        fallocate(&fd, flags, 0x4800, 0x3000).unwrap();
        assert_eq!(quarantined(&file), [(last, SUBPAGE)], "{what}");
        fallocate(&fd, flags, last, size - last).unwrap();
        assert_eq!(quarantined(&file), [], "{what}");
        let mut expected = pattern(0, size);
        expected[0x4800..0x7800].fill(0);
        expected[last as usize..].fill(0);
        assert!(std::fs::read(&file).unwrap() == expected, "{what}");
        assert_eq!(toucher.walk(), [], "{what}");
        pool.check();
    }
}

#[test]
fn erasing_a_part_of_a_quarantined_subpage_changes_nothing() {
    let pool = Pool::small(3);
    let file = patterned(&pool, "file", 3 * FOLIO);
    poison(&file, 0x5000, 1).unwrap();
    let fd = open(&file);
    for (offset, length) in
        [(0x4000, 0x1001), (0x5001, 0x1000), (0x5800, 0x10), (0x5fff, 1), (0x5800, 2 * FOLIO)]
    {
        for flags in [PUNCH, FallocateFlags::ZERO_RANGE] {
            assert_eq!(
                fallocate(&fd, flags, offset, length),
                Err(Errno::IO),
                "{offset:#x} {length:#x}"
            );
        }
    }
    assert_intact_but(&file, 3 * FOLIO, &[0x5000]);
    assert_eq!(pool.free_pages(), 0);
    pool.check();
}

#[test]
fn unlinking_a_file_with_soft_holes_returns_its_pages() {
    let pool = Pool::small(2);
    let file = patterned(&pool, "file", 2 * FOLIO);
    poison(&file, 0x5000, 3 * SUBPAGE).unwrap();
    std::fs::remove_file(&file).unwrap();
    eventually("its pages are free", || pool.free_pages() == 2);
    assert_eq!(pool.counter("quarantined_soft"), 0);
    let next = patterned(&pool, "next", 2 * FOLIO);
    assert_intact_but(&next, 2 * FOLIO, &[]);
    pool.check();
}

// ---- mmap(2) ------------------------------------------------------------------------------------

#[test]
fn sigbus_comes_exactly_there_whoever_mapped_the_file_and_when() {
    let pool = Pool::small(3);
    let file = patterned(&pool, "file", 3 * FOLIO);
    let mut before = Toucher::mapping(&file, 3 * FOLIO);
    let mut untouched = Toucher::mapping(&file, 3 * FOLIO);
    let mut private = Toucher::start();
    private.map(&file, 0, 3 * FOLIO, "private rw");
    assert_eq!((before.walk(), private.walk()), (vec![], vec![]));
    let lost = [0, 0x5000, FOLIO - SUBPAGE, FOLIO, FOLIO + SUBPAGE, 3 * FOLIO - SUBPAGE];
    for offset in lost {
        poison(&file, offset, 1).unwrap();
    }
    let mut after = Toucher::mapping(&file, 3 * FOLIO);
    let mut private_after = Toucher::start();
    private_after.map(&file, 0, 3 * FOLIO, "private ro");
    for toucher in [&mut before, &mut untouched, &mut private, &mut after, &mut private_after] {
        assert_eq!(toucher.walk(), lost);
    }
    // Every byte of the subpage is lost to loads and stores, and no byte of its neighbours is.
    for (at, good) in
        [(0x4fff, true), (0x5000, false), (0x5abc, false), (0x5fff, false), (0x6000, true)]
    {
        assert_eq!(before.load(at), good.then(|| byte_at(at)), "{at:#x}");
        assert_eq!(before.store(at, byte_at(at)), good, "{at:#x}");
    }
    set(&file, REPAIR, "salvage all").unwrap();
    for toucher in [&mut before, &mut untouched, &mut private, &mut after, &mut private_after] {
        assert_eq!(toucher.walk(), []);
    }
    assert_intact_but(&file, 3 * FOLIO, &[]);
    pool.check();
}

#[test]
fn a_copy_that_a_private_mapping_has_made_stays() {
    let pool = Pool::small(1);
    let file = patterned(&pool, "file", FOLIO);
    let mut private = Toucher::start();
    private.map(&file, 0, FOLIO, "private rw");
    assert!(private.store(0x5000, 0x77));
    set(&file, POISON, "0x5000 0x2000").unwrap();
    assert_eq!(private.walk(), [0x6000]);
    assert_eq!(private.load(0x5000), Some(0x77));
    assert_eq!(private.load(0x5001), Some(byte_at(0x5001)));
    set(&file, REPAIR, "salvage all").unwrap();
    assert_eq!(read(&file, 0x5000, 1).unwrap(), pattern(0x5000, 1));
    pool.check();
}

#[test]
fn a_folio_can_be_lost_and_its_neighbours_stay_huge() {
    let pool = Pool::small(3);
    let file = patterned(&pool, "file", 3 * FOLIO);
    let mut toucher = Toucher::mapping(&file, 3 * FOLIO);
    assert_eq!((toucher.walk(), toucher.huge()), (vec![], 3));
    poison(&file, FOLIO, FOLIO).unwrap();
    let all: Vec<u64> = (FOLIO..2 * FOLIO).step_by(SUBPAGE as usize).collect();
    assert_eq!(toucher.walk(), all);
    assert_eq!(toucher.huge(), 2);
    assert_eq!(quarantined(&file), [(FOLIO, FOLIO)]);
    assert_eq!(pool.counter("quarantined_soft"), 512);
    pool.check();
    set(&file, REPAIR, format!("salvage {FOLIO} {FOLIO}")).unwrap();
    set(&file, COLLAPSE, "all").unwrap();
    assert_eq!((toucher.walk(), toucher.huge()), (vec![], 3));
    assert_intact_but(&file, 3 * FOLIO, &[]);
    pool.check();
}

#[test]
fn neighbouring_folios_break_apart_one_by_one() {
    let pool = Pool::small(4);
    let file = patterned(&pool, "file", 4 * FOLIO);
    let mut toucher = Toucher::mapping(&file, 4 * FOLIO);
    for (n, (offset, length)) in
        [(2 * FOLIO - SUBPAGE, 2 * SUBPAGE), (0, 1)].into_iter().enumerate()
    {
        poison(&file, offset, length).unwrap();
        toucher.walk();
        assert_eq!(toucher.huge(), 2 - n as u64);
    }
    assert_eq!(toucher.walk(), [0, 2 * FOLIO - SUBPAGE, 2 * FOLIO]);
    pool.check();
}

#[test]
fn a_repair_restores_huge_mappings_of_running_processes() {
    let pool = Pool::small(2);
    let file = patterned(&pool, "file", 2 * FOLIO);
    let mut toucher = Toucher::mapping(&file, 2 * FOLIO);
    toucher.walk();
    set(&file, POISON, "0x5000 1\n0x9000 1").unwrap();
    toucher.walk();
    assert_eq!(toucher.huge(), 1);
    set(&file, REPAIR, "salvage 0x5000 1").unwrap();
    toucher.walk();
    assert_eq!(toucher.huge(), 1, "a subpage is still lost");
    set(&file, REPAIR, "salvage 0x9000 1").unwrap();
    eventually("the huge mapping is put back", || {
        toucher.walk();
        toucher.huge() == 2
    });
    assert_intact_but(&file, 2 * FOLIO, &[]);
    pool.check();
}

#[test]
fn a_covering_write_puts_the_huge_mapping_back_too() {
    let pool = Pool::small(1);
    let file = patterned(&pool, "file", FOLIO);
    let mut toucher = Toucher::mapping(&file, FOLIO);
    poison(&file, 0x5000, 1).unwrap();
    toucher.walk();
    assert_eq!(toucher.huge(), 0);
    open(&file).write_all_at(&pattern(0x5000, SUBPAGE), 0x5000).unwrap();
    eventually("the huge mapping is put back", || {
        toucher.walk();
        toucher.huge() == 1
    });
    assert_intact_but(&file, FOLIO, &[]);
}

// ---- the collapse and map attributes ------------------------------------------------------------

/// A pool that makes no huge mapping again by itself.
fn without_agent(pages: u64) -> Pool {
    Pool::mount(&format!("pagesize=2M,size={},collapse=off", pages * FOLIO))
}

/// The map attribute as (offset, length, state). Asserts that it covers the file without gaps.
fn map(file: &Path) -> Vec<(u64, u64, String)> {
    let text = get(file, MAP).unwrap();
    let rows: Vec<_> = text
        .lines()
        .map(|line| (column(line, 0), column(line, 1), line.split(' ').nth(2).unwrap().to_owned()))
        .collect();
    let end = rows.iter().fold(0, |end, (offset, length, _)| {
        assert_eq!(*offset, end, "{text}");
        assert!(*length > 0, "{text}");
        end + length
    });
    assert_eq!(end, file.metadata().unwrap().len().next_multiple_of(SUBPAGE), "{text}");
    rows
}

fn bytes_in(file: &Path, state: &str) -> u64 {
    map(file).iter().filter(|row| row.2 == state).map(|row| row.1).sum()
}

#[test]
fn without_the_agent_memory_stays_small_until_it_is_asked_for() {
    let pool = without_agent(2);
    let file = patterned(&pool, "file", 2 * FOLIO);
    let mut toucher = Toucher::mapping(&file, 2 * FOLIO);
    poison(&file, 0x5000, 1).unwrap();
    set(&file, REPAIR, "salvage all").unwrap();
    toucher.walk();
    assert_eq!(toucher.huge(), 1);
    assert_eq!(bytes_in(&file, "small"), FOLIO);
    set(&file, COLLAPSE, "0 1").unwrap();
    toucher.walk();
    assert_eq!(toucher.huge(), 2);
    assert_eq!(bytes_in(&file, "huge"), 2 * FOLIO);
    assert_intact_but(&file, 2 * FOLIO, &[]);
    pool.check();
}

#[test]
fn collapse_takes_ranges_and_leaves_holes_and_the_rest_alone() {
    let pool = without_agent(4);
    let file = patterned(&pool, "file", 4 * FOLIO);
    for folio in 0..3 {
        poison(&file, folio * FOLIO, 1).unwrap();
    }
    set(&file, REPAIR, format!("salvage 0 {}", 2 * FOLIO)).unwrap();
    assert_eq!(bytes_in(&file, "huge"), FOLIO);
    set(&file, COLLAPSE, format!("0x1000 1\n{} {}", 2 * FOLIO, 2 * FOLIO)).unwrap();
    assert_eq!(bytes_in(&file, "huge"), 2 * FOLIO);
    assert_eq!(bytes_in(&file, "poisoned"), SUBPAGE);
    set(&file, COLLAPSE, "all").unwrap();
    assert_eq!(bytes_in(&file, "huge"), 3 * FOLIO);
    assert_eq!(quarantined(&file), [(2 * FOLIO, SUBPAGE)]);
    assert_intact_but(&file, 4 * FOLIO, &[2 * FOLIO]);
    pool.check();
}

#[test]
fn malformed_collapses_are_refused() {
    let pool = Pool::small(1);
    let file = patterned(&pool, "file", FOLIO);
    for value in
        ["", "everything", "0", "0 0", "0 1 2", "all all", "all\nx", "2097152 1", "0 2097153"]
    {
        assert_eq!(set(&file, COLLAPSE, value), Err(Errno::INVAL), "{value:?}");
    }
    assert_eq!(get(&file, COLLAPSE), Err(Errno::NODATA));
}

#[test]
fn the_map_tells_all_four_states_and_adds_up() {
    let pool = without_agent(4);
    let size = 3 * FOLIO + 5000;
    let file = patterned(&pool, "file", size);
    fallocate(open(&file), PUNCH, FOLIO, FOLIO).unwrap();
    set(&file, POISON, format!("{} 0x2000\n{} 1", 2 * FOLIO + 0x5000, 3 * FOLIO + SUBPAGE))
        .unwrap();
    let state = |offset: u64| {
        let row = map(&file).into_iter().rfind(|row| row.0 <= offset).unwrap();
        row.2
    };
    assert_eq!(state(0), "huge");
    assert_eq!(state(FOLIO), "released");
    assert_eq!(state(2 * FOLIO), "small");
    assert_eq!(state(2 * FOLIO + 0x5000), "poisoned");
    assert_eq!(state(2 * FOLIO + 0x7000), "small");
    assert_eq!(state(3 * FOLIO + SUBPAGE), "poisoned");
    let sum = |state| bytes_in(&file, state);
    assert_eq!((sum("huge"), sum("released"), sum("poisoned")), (FOLIO, FOLIO, 3 * SUBPAGE));
    assert_eq!(sum("small"), FOLIO - 2 * SUBPAGE + SUBPAGE);
    assert_eq!(set(&file, MAP, "0 1"), Err(Errno::OPNOTSUPP));
    let node = get(&file, MAP).unwrap();
    assert!(node.lines().all(|line| line.split(' ').count() == 4), "{node}");
    // To read the map changes nothing.
    assert_eq!(quarantined(&file), [(2 * FOLIO + 0x5000, 0x2000), (3 * FOLIO + SUBPAGE, 0x1000)]);
    pool.check();
}

#[test]
fn the_map_of_an_empty_file_is_empty() {
    let pool = Pool::small(1);
    assert_eq!(map(&patterned(&pool, "file", 0)), []);
}

// ---- poll(2) ------------------------------------------------------------------------------------

const NOW: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };
const PATIENCE: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// The events that poll(2) reports of `fd` at this moment.
fn events(fd: &File) -> PollFlags {
    let mut fds = [PollFd::new(fd, PollFlags::IN | PollFlags::OUT | PollFlags::PRI)];
    poll(&mut fds, Some(&NOW)).unwrap();
    fds[0].revents()
}

/// Waits until thread `tid` of this process sleeps in a system call that waits for events.
fn wait_until_it_waits(tid: i32) {
    let waiting = [
        libc::SYS_ppoll,
        libc::SYS_epoll_pwait,
        #[cfg(target_arch = "x86_64")]
        libc::SYS_poll,
        #[cfg(target_arch = "x86_64")]
        libc::SYS_epoll_wait,
    ];
    eventually("the thread waits", || {
        let call = std::fs::read_to_string(format!("/proc/self/task/{tid}/syscall")).unwrap();
        call.split(' ')
            .next()
            .and_then(|number| number.parse().ok())
            .is_some_and(|n| waiting.contains(&n))
    });
}

/// Runs `wait` on another thread, and `act` when that thread sleeps. Returns the result of `wait`.
fn while_waiting<T: Send>(wait: impl FnOnce() -> T + Send, act: impl FnOnce()) -> T {
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let waiter = scope.spawn(move || {
            sender.send(rustix::thread::gettid().as_raw_nonzero().get()).unwrap();
            wait()
        });
        wait_until_it_waits(receiver.recv_timeout(limits::ANSWER).expect("the other thread runs"));
        act();
        waiter.join().unwrap()
    })
}

#[test]
fn poll_wakes_when_the_quarantine_grows() {
    let pool = Pool::small(1);
    let file = patterned(&pool, "file", FOLIO);
    let fd = open(&file);
    for round in 0..3 {
        let wait = || {
            let mut fds = [PollFd::new(&fd, PollFlags::PRI)];
            (poll(&mut fds, Some(&PATIENCE)).unwrap(), fds[0].revents())
        };
        let woken = while_waiting(wait, || poison(&file, round * SUBPAGE, 1).unwrap());
        assert_eq!(woken, (1, PollFlags::PRI));
        get(&file, POISON).unwrap();
    }
}

#[test]
fn epoll_wakes_when_the_quarantine_grows() {
    let pool = Pool::small(1);
    let file = patterned(&pool, "file", FOLIO);
    let fd = open(&file);
    let queue = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
    epoll::add(&queue, &fd, epoll::EventData::new_u64(7), epoll::EventFlags::PRI).unwrap();
    for round in 0..3 {
        let wait = || {
            let mut events: Vec<epoll::Event> = Vec::with_capacity(4);
            epoll::wait(&queue, rustix::buffer::spare_capacity(&mut events), Some(&PATIENCE))
                .unwrap();
            events.iter().map(|event| ({ event.data }.u64(), { event.flags })).collect::<Vec<_>>()
        };
        let woken = while_waiting(wait, || poison(&file, round * SUBPAGE, 1).unwrap());
        assert_eq!(woken, [(7, epoll::EventFlags::PRI)]);
        get(&file, POISON).unwrap();
    }
}

#[test]
fn a_read_of_the_attribute_ends_the_alarm_not_of_its_length() {
    let pool = Pool::small(1);
    let file = patterned(&pool, "file", FOLIO);
    // A descriptor for reading only might be native, and would forbid the quarantines below.
    let (fd, other) = (open(&file), open(&file));
    let usual = PollFlags::IN | PollFlags::OUT;
    assert_eq!(events(&fd), usual);
    poison(&file, 0, 1).unwrap();
    assert_eq!((events(&fd), events(&other)), (usual | PollFlags::PRI, usual | PollFlags::PRI));
    rustix::fs::getxattr(&file, POISON, &mut [0u8; 0][..]).unwrap();
    assert_eq!(names(&file), [POISON]);
    assert_eq!(events(&fd), usual | PollFlags::PRI, "only its length was asked for");
    assert_eq!(rustix::fs::getxattr(&file, POISON, &mut [0u8; 3][..]), Err(Errno::RANGE));
    assert_eq!(events(&fd), usual | PollFlags::PRI, "the value was not delivered");
    get(&file, POISON).unwrap();
    assert_eq!((events(&fd), events(&other)), (usual, usual));
    poison(&file, 0, 1).unwrap();
    assert_eq!(events(&fd), usual, "nothing was added");
    poison(&file, 0, 2 * SUBPAGE).unwrap();
    assert_eq!(events(&fd), usual | PollFlags::PRI);
    set(&file, REPAIR, "zero all").unwrap();
    assert_eq!(get(&file, POISON), Err(Errno::NODATA));
    assert_eq!(events(&fd), usual, "it was looked at, though nothing is left");
}

// ---- counters and the log -----------------------------------------------------------------------

#[test]
fn the_pool_counts_what_is_quarantined_and_the_log_tells() {
    let pool = Pool::small(2);
    let (one, two) = (patterned(&pool, "one", FOLIO), patterned(&pool, "two", FOLIO));
    assert_eq!(pool.counter("quarantined_soft"), 0);
    poison(&one, 0x5000, 2 * SUBPAGE).unwrap();
    poison(&two, 0x9000, 1).unwrap();
    assert_eq!(pool.counter("quarantined_soft"), 3);
    assert_eq!(pool.counter("pages_free"), 0);
    set(&one, REPAIR, "salvage 0x5000 1").unwrap();
    assert_eq!(pool.counter("quarantined_soft"), 2);
    assert_eq!(set(&one, POISON, "nonsense"), Err(Errno::INVAL));
    for line in [
        "0x5000 0x2000 quarantined (soft)",
        "0x9000 0x1000 quarantined (soft)",
        "0x5000 0x1000 repaired",
        "\"nonsense\" refused",
    ] {
        pool.await_log(line);
    }
    assert!(get(pool.path(), POOL).is_ok() && get(pool.path(), CHECK).as_deref() == Ok(""));
}

// ---- a gigantic page ----------------------------------------------------------------------------

/// Numbers that look random and are equal in every run (splitmix64).
fn random(seed: u64) -> impl Iterator<Item = u64> {
    (1..).map(move |n: u64| {
        let mut z = seed.wrapping_add(n.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    })
}

/// A subpage with its number in every eight bytes.
fn numbered(subpage: u64) -> Vec<u8> {
    (subpage << 16 | 0xa5a5).to_le_bytes().repeat(SUBPAGE as usize / 8)
}

#[test]
fn a_hundred_lost_subpages_cost_a_hundred_subpages() {
    const PIECE: u64 = 256;
    let pool = Pool::gigantic(1);
    let file = pool.join("file");
    std::fs::write(&file, []).unwrap();
    let fd = open(&file);
    for piece in 0..GIB / SUBPAGE / PIECE {
        let bytes: Vec<u8> = (piece * PIECE..(piece + 1) * PIECE).flat_map(numbered).collect();
        fd.write_all_at(&bytes, piece * PIECE * SUBPAGE).unwrap();
    }
    let mut before = Toucher::mapping(&file, GIB);
    assert_eq!((before.walk(), before.huge()), (vec![], 512));
    let mut lost = BTreeSet::new();
    lost.extend(random(2_097_152).map(|n| n % (GIB / SUBPAGE) * SUBPAGE).take(100));
    assert_eq!(lost.len(), 100, "the seed has no repetition");
    let value: Vec<String> = lost.iter().map(|offset| format!("{offset:#x} 0x1000")).collect();
    set(&file, POISON, value.join("\n")).unwrap();
    let lost: Vec<u64> = lost.into_iter().collect();

    let mut after = Toucher::mapping(&file, GIB);
    assert_eq!(before.walk(), lost);
    assert_eq!(after.walk(), lost);
    assert_eq!(before.walk(), lost, "touching does not heal");
    let split: BTreeSet<u64> = lost.iter().map(|offset| offset / FOLIO).collect();
    assert_eq!(before.huge(), 512 - split.len() as u64);
    assert_eq!(pool.counter("quarantined_soft"), 100);

    // read(2), with the data and holes that lseek(2) shows.
    let (mut at, mut holes) = (0, Vec::new());
    let mut buffer = vec![0; (PIECE * SUBPAGE) as usize];
    while at < GIB {
        let data = seek(&fd, SeekFrom::Data(at)).unwrap_or(GIB);
        holes.extend((at..data).step_by(SUBPAGE as usize));
        let end = if data < GIB { seek(&fd, SeekFrom::Hole(data)).unwrap() } else { GIB };
        at = data;
        while at < end {
            let length = (end - at).min(buffer.len() as u64) as usize;
            fd.read_exact_at(&mut buffer[..length], at).unwrap();
            assert_numbered(&buffer[..length], at);
            at += length as u64;
        }
    }
    assert_eq!(holes, lost);
    assert!(lost.iter().all(|offset| errno(fd.read_at(&mut [0; 1], *offset)) == Errno::IO));

    let outside = tempfile::tempdir_in("/dev/shm").unwrap();
    let copy = outside.path().join("copy");
    run(Command::new("cp").arg("--sparse=always").arg(&file).arg(&copy));
    let copied = File::open(&copy).unwrap();
    for offset in (0..GIB).step_by(SUBPAGE as usize) {
        copied.read_exact_at(&mut buffer[..SUBPAGE as usize], offset).unwrap();
        match lost.binary_search(&offset) {
            Ok(_) => assert!(buffer[..SUBPAGE as usize].iter().all(|byte| *byte == 0)),
            Err(_) => assert_numbered(&buffer[..SUBPAGE as usize], offset),
        }
    }
    set(&file, REPAIR, "salvage all").unwrap();
    assert_eq!(before.walk(), []);
    for offset in lost {
        fd.read_exact_at(&mut buffer[..SUBPAGE as usize], offset).unwrap();
        assert_numbered(&buffer[..SUBPAGE as usize], offset);
    }
    pool.check();
}

fn assert_numbered(bytes: &[u8], offset: u64) {
    for (n, subpage) in bytes.chunks(SUBPAGE as usize).enumerate() {
        let number = offset / SUBPAGE + n as u64;
        assert!(subpage == numbered(number), "subpage {number:#x} is not as it was");
    }
}

// ---- injection ----------------------------------------------------------------------------------

#[test]
fn injecting_is_refused_with_the_reason_if_the_kernel_cannot() {
    let pool = Pool::small(1);
    let file = pool.join("file");
    std::fs::write(&file, vec![7; 8192]).unwrap();
    for value in ["", "hw", "soft 0", "hw 8192", "hw 0 1"] {
        assert_eq!(set(&file, INJECT, value), Err(rustix::io::Errno::INVAL), "{value:?}");
    }
    if has_memory_errors() {
        set(&file, INJECT, "hw 0").unwrap();
        assert!(get(&file, POISON).unwrap().starts_with("0x0 0x1000 hw "));
    } else {
        assert_eq!(set(&file, INJECT, "hw 0"), Err(rustix::io::Errno::OPNOTSUPP));
        pool.await_log("this kernel has no CONFIG_MEMORY_FAILURE");
        assert_eq!(std::fs::read(&file).unwrap(), vec![7; 8192]);
    }
    pool.check();
}

#[test]
fn losses_become_soft_if_the_kernel_has_no_memory_errors() {
    let pool = Pool::small(1);
    let file = pool.join("file");
    std::fs::write(&file, vec![7; 6 * 4096]).unwrap();
    for value in ["", "0 4096 bad", "0 4096 hw\n24576 1 hw", "0 4096 soft\nx 1"] {
        assert_eq!(set(&file, LOSSES, value), Err(Errno::INVAL), "{value:?}");
    }
    assert_eq!(get(&file, POISON), Err(Errno::NODATA));
    run(hugetlb2().args(["poison", "--hw"]).arg(&file).args(["0", "8192"]));
    for _ in 0..2 {
        set(&file, LOSSES, "0x1000 4096 hw 1\n0x2000 4096 soft 2\n0x3000 1\n").unwrap();
    }
    set(&file, LOSSES, format!("{} 4096 lost", 5 * SUBPAGE)).unwrap();
    let listed = get(&file, POISON).unwrap();
    let kind = |subpage: u64| {
        let holds = |line: &&str| {
            let words: Vec<u64> = line.split(' ').take(2).map(number).collect();
            (words[0]..words[0] + words[1]).contains(&(subpage * SUBPAGE))
        };
        listed.lines().find(holds).unwrap().split(' ').nth(2).unwrap()
    };
    let hw = if has_memory_errors() { "hw" } else { "soft" };
    assert_eq!([0, 1, 2, 3, 5].map(kind), [hw, hw, "soft", "soft", "soft"], "{listed}");
    if !has_memory_errors() {
        assert_eq!(pool.counter("frames_given_up"), 0);
    }
    // Of the lost ones no byte is known, and of the others each.
    let salvage = |at: u64| set(&file, REPAIR, format!("salvage {at} 4096"));
    let salvaged = [0, SUBPAGE, 2 * SUBPAGE, 3 * SUBPAGE, 5 * SUBPAGE].map(salvage);
    let unknown = Err(Errno::NODATA);
    assert_eq!(salvaged, [unknown, unknown, Ok(()), Ok(()), unknown]);
    kill_worker(&pool);
    assert_eq!([0, 5 * SUBPAGE].map(salvage), [unknown, unknown]);
    set(&file, REPAIR, "zero all").unwrap();
    let parts = [vec![0; 8192], vec![7; 3 * 4096], vec![0; 4096]];
    assert_eq!(std::fs::read(&file).unwrap(), parts.concat());
    pool.check();
}

fn number(text: &str) -> u64 {
    u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap()
}

fn has_memory_errors() -> bool {
    hugetlb2fs::sys::memory_failures().is_some()
}

/// The worker copies and punches a whole folio at once. Subpage by subpage, 32 folios would take
/// 512 times as long as 32 subpages.
#[test]
fn a_long_range_is_quarantined_and_repaired_by_folios() {
    const FOLIOS: u64 = 32;
    const MOST_TIMES: u32 = 100;
    let pool = Pool::small(FOLIOS);
    let file = patterned(&pool, "file", FOLIOS * FOLIO);
    let took = |name: &str, value: String| {
        let started = Instant::now();
        set(&file, name, value).unwrap();
        started.elapsed()
    };
    let each =
        |what: &str| (0..FOLIOS).map(|n| format!("{what}{} 4096\n", n * FOLIO + 0x5000)).collect();
    let (some, put_back) = (took(POISON, each("")), took(REPAIR, each("salvage ")));
    let all = took(POISON, format!("0 {}", FOLIOS * FOLIO));
    assert_eq!(pool.counter("quarantined_soft"), FOLIOS * FOLIO / SUBPAGE);
    assert_eq!(get(&file, POISON).unwrap().lines().count(), 1);
    assert_eq!(
        Toucher::mapping(&file, FOLIOS * FOLIO).walk().len() as u64,
        FOLIOS * FOLIO / SUBPAGE
    );
    let salvaged = took(REPAIR, "salvage all".to_owned());
    assert!(std::fs::read(&file).unwrap() == pattern(0, FOLIOS * FOLIO), "bytes are lost");
    took(POISON, format!("0 {}", FOLIOS * FOLIO));
    let zeroed = took(REPAIR, "zero all".to_owned());
    assert!(std::fs::read(&file).unwrap().iter().all(|byte| *byte == 0));
    for (what, time, subpages) in
        [("quarantine", all, some), ("salvage", salvaged, put_back), ("zero", zeroed, put_back)]
    {
        println!(
            "{what}: {:?} a GiB; {FOLIOS} single subpages: {subpages:?}",
            time * (512 / FOLIOS as u32)
        );
        assert!(
            time < subpages * MOST_TIMES,
            "{what} takes {time:?}, and {subpages:?} for {FOLIOS} subpages"
        );
    }
    pool.check();
}
