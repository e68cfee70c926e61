//! The contents of files, and the memory that they take.

use crate::support::sys::{Mapping, Sharing};
use crate::support::{FOLIO, GIB, Pool, SUBPAGE, Toucher};
use hugetlb2fs::units::Range;
use rustix::fs::{FallocateFlags, FlockOperation, OFlags, SeekFrom};
use rustix::io::Errno;
use std::fmt::Debug;
use std::fs::{self, File, OpenOptions};
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

const PUNCH: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);
const ZERO_KEEP: FallocateFlags = FallocateFlags::ZERO_RANGE.union(FallocateFlags::KEEP_SIZE);

type Attempt = Box<dyn Fn(&File) -> io::Result<()>>;
type Lock = fn(&File, FlockOperation) -> rustix::io::Result<()>;
type Heal = fn(&File);

/// MADV_REMOVE of madvise(2).
const REMOVE: u32 = 9;

/// Makes a file and opens it in this process.
fn create(pool: &Pool, name: &str) -> (PathBuf, File) {
    let path = pool.join(name);
    let file =
        File::options().read(true).write(true).create_new(true).open(&path).expect("a new file");
    (path, file)
}

/// Makes a file that holds `length` times `byte`.
fn filled(pool: &Pool, name: &str, length: u64, byte: u8) -> (PathBuf, File) {
    let (path, file) = create(pool, name);
    file.write_all_at(&vec![byte; length as usize], 0).expect("it fits");
    (path, file)
}

fn fallocate(
    file: &File,
    mode: FallocateFlags,
    offset: u64,
    length: u64,
) -> rustix::io::Result<()> {
    rustix::fs::fallocate(file, mode, offset, length)
}

fn errno<T: Debug>(result: io::Result<T>) -> Errno {
    Errno::from_io_error(&result.expect_err("it is to be refused")).expect("the kernel's answer")
}

fn size(file: &File) -> u64 {
    file.metadata().expect("stat").len()
}

/// The number of pages (of 2 MiB) that the file has.
fn pages(file: &File) -> u64 {
    file.metadata().expect("stat").blocks() * 512 / FOLIO
}

/// Reads `length` bytes at `offset`, or fewer at the end of file.
fn read(file: &File, offset: u64, length: u64) -> Vec<u8> {
    let mut bytes = vec![0xee; length as usize];
    let mut done = 0;
    while done < bytes.len() {
        match file.read_at(&mut bytes[done..], offset + done as u64).expect("readable") {
            0 => break,
            count => done += count,
        }
    }
    bytes.truncate(done);
    bytes
}

/// All bytes of the file, as lengths of runs of equal bytes.
fn runs(file: &File) -> Vec<(usize, u8)> {
    read(file, 0, size(file))
        .chunk_by(|one, next| one == next)
        .map(|run| (run.len(), run[0]))
        .collect()
}

/// Bytes that depend on their place.
fn pattern(length: u64) -> Vec<u8> {
    (0..length).map(|at| (at / 251 % 256) as u8 ^ (at % 249) as u8).collect()
}

/// The state that a refused request must not change.
fn state(pool: &Pool, file: &File) -> (u64, u64, u64, Vec<(usize, u8)>) {
    (size(file), pages(file), pool.free_pages(), runs(file))
}

// ---- read and write -----------------------------------------------------------------------------

#[test]
fn what_is_written_at_any_place_is_read_there() {
    let pool = Pool::small(4);
    let (_, file) = create(&pool, "file");
    let mut expected = Vec::new();
    for (offset, length) in
        [(0, 1), (1, 4095), (4095, 2), (100, 70_000), (FOLIO - 1, 2), (FOLIO + 5, 3), (0, 3)]
    {
        let bytes = pattern(length);
        assert_eq!(file.write_at(&bytes, offset).unwrap() as u64, length);
        expected.resize(expected.len().max((offset + length) as usize), 0);
        expected[offset as usize..(offset + length) as usize].copy_from_slice(&bytes);
        assert!(read(&file, 0, 4 * FOLIO) == expected, "{length} bytes at {offset}");
    }
    pool.check();
}

#[test]
fn writing_and_reading_nothing_does_nothing() {
    let pool = Pool::small(1);
    let (_, file) = filled(&pool, "file", 10, 7);
    assert_eq!(file.write_at(&[], 0).unwrap(), 0);
    assert_eq!(file.write_at(&[], 1 << 40).unwrap(), 0);
    assert_eq!(file.read_at(&mut [], 0).unwrap(), 0);
    assert_eq!(runs(&file), [(10, 7)]);
}

#[test]
fn reading_ends_at_the_end() {
    let pool = Pool::small(1);
    let (_, file) = filled(&pool, "file", 5000, 7);
    assert_eq!(read(&file, 4990, 100).len(), 10);
    for offset in [5000, 5001, 8192, FOLIO, 1 << 50] {
        assert_eq!(file.read_at(&mut [0; 10], offset).unwrap(), 0, "{offset}");
    }
}

#[test]
fn a_write_beyond_the_end_leaves_zeros_between() {
    let pool = Pool::small(4);
    let (_, file) = filled(&pool, "file", 10, 7);
    file.write_all_at(&[8; 5], 3 * FOLIO + 9).unwrap();
    assert_eq!(runs(&file), [(10, 7), (3 * FOLIO as usize - 1, 0), (5, 8)]);
    assert_eq!((pages(&file), pool.free_pages()), (4, 0));
    pool.check();
}

#[test]
fn megabytes_are_read_and_written_in_one_call() {
    let pool = Pool::small(8);
    let (_, file) = create(&pool, "file");
    let bytes = pattern(9_999_999);
    assert_eq!(file.write_at(&bytes, 12_345).unwrap(), bytes.len());
    let mut back = vec![0; bytes.len()];
    assert_eq!(file.read_at(&mut back, 12_345).unwrap(), bytes.len());
    assert!(back == bytes);
}

#[test]
fn vectors_are_scattered_and_gathered() {
    let pool = Pool::small(2);
    let (_, file) = create(&pool, "file");
    let parts = [IoSlice::new(&[1; 5000]), IoSlice::new(&[]), IoSlice::new(&[2; 3])];
    assert_eq!(rustix::io::pwritev(&file, &parts, 100), Ok(5003));
    let (mut one, mut other) = ([0; 5001], [0; 10]);
    let mut targets = [IoSliceMut::new(&mut one), IoSliceMut::new(&mut other)];
    assert_eq!(rustix::io::preadv(&file, &mut targets, 100), Ok(5003));
    assert_eq!((one[4999], one[5000], &other[..3]), (1, 2, &[2, 2, 0][..]));
}

#[test]
fn direct_io_needs_no_alignment() {
    let pool = Pool::small(2);
    let path = pool.join("file");
    let flags = OFlags::DIRECT.bits() as i32;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .custom_flags(flags)
        .open(path)
        .unwrap();
    let bytes = pattern(10_001);
    file.write_all_at(&bytes, 3).unwrap();
    assert!(read(&file, 3, 20_000) == bytes);
}

#[test]
fn appends_of_two_processes_do_not_mix() {
    const COUNT: usize = 200;
    const LENGTH: usize = 1000;
    let pool = Pool::small(2);
    let (path, file) = create(&pool, "file");
    std::thread::scope(|scope| {
        for byte in [1, 2] {
            let line = format!("append {} {LENGTH} {byte}", path.display());
            scope.spawn(move || {
                let mut toucher = Toucher::start();
                (0..COUNT).for_each(|_| assert_eq!(toucher.ask(&line), format!("count {LENGTH}")));
            });
        }
    });
    let bytes = read(&file, 0, FOLIO);
    assert_eq!(bytes.len(), 2 * COUNT * LENGTH);
    let whole = bytes.chunks(LENGTH).all(|record| record.iter().all(|byte| *byte == record[0]));
    assert!(whole, "records are torn");
    assert_eq!(bytes.iter().filter(|byte| **byte == 1).count(), COUNT * LENGTH);
}

#[test]
fn an_append_goes_to_the_end_wherever_the_file_has_been_read() {
    let pool = Pool::small(1);
    let (path, file) = filled(&pool, "file", 10, 1);
    let mut appending = OpenOptions::new().append(true).read(true).open(&path).unwrap();
    file.set_len(20).unwrap();
    appending.write_all(&[2; 5]).unwrap();
    fallocate(&file, FallocateFlags::empty(), 0, 40).unwrap();
    appending.write_all(&[3; 5]).unwrap();
    file.set_len(43).unwrap();
    appending.write_all(&[4; 2]).unwrap();
    assert_eq!(runs(&file), [(10, 1), (10, 0), (5, 2), (15, 0), (3, 3), (2, 4)]);
}

#[test]
fn opening_with_truncation_gives_every_page_back() {
    let pool = Pool::small(2);
    let (path, file) = filled(&pool, "file", 2 * FOLIO, 7);
    drop(File::create(path).unwrap());
    assert_eq!((size(&file), pages(&file), pool.free_pages()), (0, 0, 2));
    pool.check();
}

#[test]
fn syncing_is_possible_and_needs_to_do_nothing() {
    let pool = Pool::small(1);
    let (_, file) = filled(&pool, "file", 10, 7);
    file.sync_all().unwrap();
    file.sync_data().unwrap();
    File::open(pool.path()).unwrap().sync_all().unwrap();
    rustix::fs::syncfs(&file).unwrap();
    assert_eq!(runs(&file), [(10, 7)]);
}

// ---- sizes --------------------------------------------------------------------------------------

#[test]
fn a_file_has_any_size_and_grows_by_zeros() {
    let pool = Pool::small(4);
    let (_, file) = create(&pool, "file");
    let sizes = [0, 1, 4095, 4096, 4097, FOLIO - 1, FOLIO, FOLIO + 1, 3 * FOLIO + 5000];
    for from in sizes {
        for to in sizes {
            file.set_len(0).unwrap();
            file.write_all_at(&vec![7; from as usize], 0).unwrap();
            file.set_len(to).unwrap();
            assert_eq!((size(&file), pages(&file)), (to, to.div_ceil(FOLIO)), "{from} to {to}");
            file.set_len(4 * FOLIO).unwrap();
            let kept = from.min(to) as usize;
            let expected = [(kept, 7), (4 * FOLIO as usize - kept, 0)];
            assert_eq!(runs(&file), expected[usize::from(kept == 0)..], "{from} to {to} and up");
        }
    }
    pool.check();
}

#[test]
fn what_a_mapping_wrote_behind_the_end_does_not_come_to_light() {
    let pool = Pool::small(2);
    let (path, file) = filled(&pool, "file", 2 * FOLIO, 7);
    let mut toucher = Toucher::mapping(&path, 2 * FOLIO);
    assert_eq!(toucher.walk(), []);
    file.set_len(100).unwrap();
    for offset in [100, 4095, 4096, FOLIO - 1] {
        toucher.store(offset, 9); // SIGBUS or not, by the kind of the mapping
    }
    file.set_len(2 * FOLIO).unwrap();
    assert_eq!(runs(&file), [(100, 7), (2 * FOLIO as usize - 100, 0)]);
    pool.check();
}

#[test]
fn growth_within_a_page_takes_no_page() {
    let pool = Pool::small(2);
    let (_, file) = filled(&pool, "file", 1, 7);
    let (_, _other) = filled(&pool, "other", 1, 7);
    assert_eq!(pool.free_pages(), 0);
    file.write_all_at(&[8], FOLIO - 1).unwrap();
    file.set_len(5).unwrap();
    file.set_len(FOLIO).unwrap();
    fallocate(&file, FallocateFlags::empty(), 0, FOLIO).unwrap();
    assert_eq!(runs(&file), [(1, 7), (FOLIO as usize - 1, 0)]);
    assert_eq!(errno(file.set_len(FOLIO + 1)), Errno::NOSPC);
}

#[test]
fn a_size_that_no_file_can_have_is_efbig_or_enospc() {
    const MOST: u64 = i64::MAX as u64;
    let pool = Pool::small(1);
    let (_, file) = filled(&pool, "file", 10, 7);
    let before = state(&pool, &file);
    assert_eq!(errno(file.set_len(MOST)), Errno::FBIG);
    assert_eq!(errno(file.write_at(&[1; 8], MOST - 8)), Errno::FBIG);
    assert_eq!(fallocate(&file, FallocateFlags::empty(), MOST, 1), Err(Errno::FBIG));
    assert_eq!(fallocate(&file, FallocateFlags::KEEP_SIZE, MOST - 1, 1), Err(Errno::FBIG));
    assert_eq!(errno(file.set_len(MOST / 2)), Errno::NOSPC);
    assert_eq!(errno(file.write_at(&[1], MOST / 2)), Errno::NOSPC);
    assert_eq!(fallocate(&file, FallocateFlags::KEEP_SIZE, 0, MOST / 2), Err(Errno::NOSPC));
    assert_eq!(fallocate(&file, PUNCH, 100, MOST - 100), Ok(()));
    assert_eq!(state(&pool, &file), before);
    pool.check();
}

// ---- fallocate ----------------------------------------------------------------------------------

#[test]
fn fallocate_lengthens_a_file_and_takes_pages() {
    let pool = Pool::small(4);
    let (_, file) = filled(&pool, "file", 100, 7);
    fallocate(&file, FallocateFlags::empty(), 50, 2 * FOLIO).unwrap();
    assert_eq!((size(&file), pages(&file), pool.free_pages()), (50 + 2 * FOLIO, 3, 1));
    assert_eq!(runs(&file), [(100, 7), (2 * FOLIO as usize - 50, 0)]);
    fallocate(&file, FallocateFlags::empty(), 0, 10).unwrap();
    assert_eq!((size(&file), pages(&file)), (50 + 2 * FOLIO, 3));
    pool.check();
}

#[test]
fn keep_size_takes_pages_past_the_end_until_a_truncation() {
    for mode in [FallocateFlags::KEEP_SIZE, ZERO_KEEP] {
        for shorter_by in [1, 0] {
            let pool = Pool::small(4);
            let (_, file) = filled(&pool, "file", 100, 7);
            fallocate(&file, mode, 1000, 3 * FOLIO).unwrap();
            assert_eq!((size(&file), pages(&file), pool.free_pages()), (100, 4, 0));
            pool.check();
            file.set_len(100 - shorter_by).unwrap();
            assert_eq!(
                (pages(&file), pool.free_pages()),
                (1, 3),
                "{mode:?}, shorter by {shorter_by}"
            );
            pool.check();
        }
    }
}

#[test]
fn o_trunc_frees_the_pages_behind_the_end_of_an_empty_file() {
    let pool = Pool::small(2);
    let (path, file) = create(&pool, "file");
    fallocate(&file, FallocateFlags::KEEP_SIZE, 0, 2 * FOLIO).unwrap();
    assert_eq!((size(&file), pages(&file), pool.free_pages()), (0, 2, 0));
    drop(File::create(path).unwrap());
    assert_eq!((pages(&file), pool.free_pages()), (0, 2));
    pool.check();
}

#[test]
fn pages_behind_the_end_are_the_files_whatever_others_want() {
    let pool = Pool::small(3);
    let (_, file) = create(&pool, "file");
    let (_, other) = create(&pool, "other");
    fallocate(&file, FallocateFlags::KEEP_SIZE, 0, 2 * FOLIO).unwrap();
    other.set_len(FOLIO).unwrap();
    assert_eq!(errno(other.set_len(FOLIO + 1)), Errno::NOSPC);
    file.write_all_at(&[7; 100], 2 * FOLIO - 100).unwrap();
    assert_eq!(runs(&file), [(2 * FOLIO as usize - 100, 0), (100, 7)]);
    pool.check();
}

#[test]
fn a_range_can_be_zeroed() {
    let pool = Pool::small(4);
    let (_, file) = filled(&pool, "file", FOLIO + 1000, 7);
    fallocate(&file, FallocateFlags::ZERO_RANGE, 4000, FOLIO - 4000).unwrap();
    assert_eq!(runs(&file), [(4000, 7), (FOLIO as usize - 4000, 0), (1000, 7)]);
    fallocate(&file, ZERO_KEEP, FOLIO + 500, FOLIO).unwrap();
    assert_eq!((size(&file), pages(&file)), (FOLIO + 1000, 3), "as with KEEP_SIZE alone");
    fallocate(&file, FallocateFlags::ZERO_RANGE, FOLIO, 3000).unwrap();
    assert_eq!(runs(&file), [(4000, 7), (FOLIO as usize - 1000, 0)]);
    pool.check();
}

#[test]
fn a_punch_gives_whole_pages_back_and_zeroes_the_rest() {
    let pool = Pool::small(5);
    let (_, file) = filled(&pool, "file", 5 * FOLIO, 7);
    fallocate(&file, PUNCH, FOLIO - 1000, 3 * FOLIO + 2000).unwrap();
    assert_eq!((size(&file), pages(&file), pool.free_pages()), (5 * FOLIO, 2, 3));
    let (page, hole) = (FOLIO as usize, 3 * FOLIO as usize + 2000);
    assert_eq!(runs(&file), [(page - 1000, 7), (hole, 0), (page - 1000, 7)]);
    pool.check();
    fallocate(&file, PUNCH, 10, 20).unwrap();
    assert_eq!(pool.free_pages(), 3);
    assert_eq!(runs(&file)[..3], [(10, 7), (20, 0), (page - 1030, 7)]);
}

#[test]
fn a_punch_of_the_last_page_leaves_the_size_alone() {
    let pool = Pool::small(4);
    let (_, file) = filled(&pool, "file", FOLIO + 100, 7);
    fallocate(&file, FallocateFlags::KEEP_SIZE, 0, 4 * FOLIO).unwrap();
    fallocate(&file, PUNCH, FOLIO, 2 * FOLIO).unwrap();
    assert_eq!((size(&file), pages(&file), pool.free_pages()), (FOLIO + 100, 2, 2));
    assert_eq!(runs(&file), [(FOLIO as usize, 7), (100, 0)]);
    pool.check();
    file.set_len(FOLIO + 200).unwrap();
    assert_eq!((pages(&file), pool.free_pages()), (3, 1));
    fallocate(&file, FallocateFlags::KEEP_SIZE, 0, 4 * FOLIO).unwrap();
    assert_eq!((pages(&file), pool.free_pages()), (4, 0));
    assert_eq!(runs(&file), [(FOLIO as usize, 7), (200, 0)]);
    pool.check();
}

#[test]
fn modes_of_fallocate_that_are_not_there_are_eopnotsupp() {
    let pool = Pool::small(4);
    let (_, file) = filled(&pool, "file", 3 * FOLIO, 7);
    let before = state(&pool, &file);
    for mode in [
        FallocateFlags::COLLAPSE_RANGE,
        FallocateFlags::INSERT_RANGE,
        FallocateFlags::UNSHARE_RANGE,
        FallocateFlags::PUNCH_HOLE,
        FallocateFlags::from_bits_retain(1 << 30),
    ] {
        assert_eq!(fallocate(&file, mode, 0, FOLIO), Err(Errno::OPNOTSUPP), "{mode:?}");
    }
    assert_eq!(fallocate(&file, FallocateFlags::empty(), 0, 0), Err(Errno::INVAL));
    let readable = File::open(pool.join("file")).unwrap();
    assert_eq!(fallocate(&readable, FallocateFlags::empty(), 0, FOLIO), Err(Errno::BADF));
    assert_eq!(state(&pool, &file), before);
}

// ---- released pages -----------------------------------------------------------------------------

#[test]
fn a_released_page_reads_zeros_and_is_sigbus_until_written() {
    let pool = Pool::small(3);
    let (path, file) = filled(&pool, "file", 3 * FOLIO, 7);
    let mut toucher = Toucher::mapping(&path, 3 * FOLIO);
    assert_eq!(toucher.walk(), []);
    fallocate(&file, PUNCH, FOLIO, FOLIO).unwrap();
    let page = FOLIO as usize;
    assert_eq!(runs(&file), [(page, 7), (page, 0), (page, 7)]);
    assert_eq!(toucher.walk().len(), page / SUBPAGE as usize);
    assert!(!toucher.store(FOLIO, 1) && toucher.store(FOLIO - 1, 1) && toucher.store(2 * FOLIO, 1));
    assert_eq!(pool.free_pages(), 1);
    file.write_all_at(&[8], FOLIO + 10).unwrap();
    assert_eq!((pages(&file), pool.free_pages()), (3, 0));
    assert_eq!((toucher.load(FOLIO + 9), toucher.load(FOLIO + 10)), (Some(0), Some(8)));
    assert_eq!(toucher.walk(), []);
    assert_eq!(toucher.huge(), 3);
    pool.check();
}

#[test]
fn fallocate_takes_released_pages_again() {
    for mode in
        [FallocateFlags::empty(), FallocateFlags::KEEP_SIZE, FallocateFlags::ZERO_RANGE, ZERO_KEEP]
    {
        let pool = Pool::small(3);
        let (_, file) = filled(&pool, "file", 3 * FOLIO, 7);
        fallocate(&file, PUNCH, 0, 2 * FOLIO).unwrap();
        fallocate(&file, mode, FOLIO + 5, 10).unwrap();
        assert_eq!((size(&file), pages(&file), pool.free_pages()), (3 * FOLIO, 2, 1), "{mode:?}");
        fallocate(&file, mode, 0, FOLIO + 1).unwrap();
        assert_eq!((pages(&file), pool.free_pages()), (3, 0), "{mode:?}");
        assert_eq!(runs(&file), [(2 * FOLIO as usize, 0), (FOLIO as usize, 7)]);
        pool.check();
    }
}

#[test]
fn a_write_into_a_page_that_another_file_has_is_enospc() {
    let pool = Pool::small(2);
    let (_, file) = filled(&pool, "file", 2 * FOLIO, 7);
    fallocate(&file, PUNCH, FOLIO, FOLIO).unwrap();
    let (other_path, other) = filled(&pool, "other", 1, 1);
    let before = state(&pool, &file);
    assert_eq!(errno(file.write_at(&[8; 100], FOLIO - 50)), Errno::NOSPC);
    assert_eq!(errno(file.write_at(&[8], 2 * FOLIO - 1)), Errno::NOSPC);
    assert_eq!(fallocate(&file, FallocateFlags::empty(), 0, 2 * FOLIO), Err(Errno::NOSPC));
    assert_eq!(state(&pool, &file), before);
    pool.check();
    fs::remove_file(other_path).unwrap();
    drop(other);
    file.write_all_at(&[8; 100], FOLIO - 50).unwrap();
    assert_eq!(runs(&file), [(FOLIO as usize - 50, 7), (100, 8), (FOLIO as usize - 50, 0)]);
    pool.check();
}

fn data(file: &File, offset: u64) -> rustix::io::Result<u64> {
    rustix::fs::seek(file, SeekFrom::Data(offset))
}

fn hole(file: &File, offset: u64) -> rustix::io::Result<u64> {
    rustix::fs::seek(file, SeekFrom::Hole(offset))
}

#[test]
fn released_pages_are_holes_and_all_else_is_data() {
    let pool = Pool::small(5);
    let (_, file) = create(&pool, "file");
    assert_eq!((data(&file, 0), hole(&file, 0)), (Err(Errno::NXIO), Err(Errno::NXIO)));
    let end = 5 * FOLIO - 100;
    file.set_len(end).unwrap();
    assert_eq!(
        (data(&file, 0), hole(&file, 0)),
        (Ok(0), Ok(end)),
        "nothing has been written, and it is data"
    );
    fallocate(&file, PUNCH, FOLIO, FOLIO).unwrap();
    fallocate(&file, PUNCH, 3 * FOLIO, 3 * FOLIO).unwrap();
    assert_eq!((hole(&file, 0), hole(&file, FOLIO - 1)), (Ok(FOLIO), Ok(FOLIO)));
    assert_eq!((hole(&file, FOLIO), hole(&file, FOLIO + 5)), (Ok(FOLIO), Ok(FOLIO + 5)));
    assert_eq!((data(&file, FOLIO), data(&file, 2 * FOLIO - 1)), (Ok(2 * FOLIO), Ok(2 * FOLIO)));
    assert_eq!(
        (data(&file, 2 * FOLIO + 5), hole(&file, 2 * FOLIO)),
        (Ok(2 * FOLIO + 5), Ok(3 * FOLIO))
    );
    assert_eq!(
        (data(&file, 3 * FOLIO), data(&file, end - 1)),
        (Err(Errno::NXIO), Err(Errno::NXIO))
    );
    assert_eq!((hole(&file, end - 1), hole(&file, end)), (Ok(end - 1), Err(Errno::NXIO)));
    assert_eq!(data(&file, end), Err(Errno::NXIO));
}

// ---- a full pool --------------------------------------------------------------------------------

#[test]
fn a_full_pool_refuses_growth_and_changes_nothing() {
    let pool = Pool::small(4);
    let (other_path, other) = filled(&pool, "other", FOLIO, 9);
    let (_, file) = filled(&pool, "file", FOLIO + 1000, 7);
    let whole =
        |mode| move |file: &File| fallocate(file, mode, 0, 4 * FOLIO).map_err(io::Error::from);
    let end = FOLIO + 1000;
    let attempts: [(&str, Attempt); 9] = [
        ("truncate", Box::new(|file| file.set_len(3 * FOLIO + 1))),
        (
            "write across the end of the last page",
            Box::new(|file| file.write_at(&[1; 200], 3 * FOLIO - 100).map(drop)),
        ),
        ("write far behind", Box::new(|file| file.write_at(&[1], 50 * FOLIO).map(drop))),
        ("fallocate", Box::new(whole(FallocateFlags::empty()))),
        ("keep size", Box::new(whole(FallocateFlags::KEEP_SIZE))),
        ("zero range", Box::new(whole(FallocateFlags::ZERO_RANGE))),
        ("zero range, keep size", Box::new(whole(ZERO_KEEP))),
        (
            "copy",
            Box::new(move |file| {
                copy(file, 0, file, 3 * FOLIO - 10, 100).map(drop).map_err(io::Error::from)
            }),
        ),
        ("append", Box::new(move |file| file.write_at(&[1; 1 << 20], 3 * FOLIO - 5).map(drop))),
    ];
    let before = state(&pool, &file);
    assert_eq!((before.0, before.1, before.2), (end, 2, 1));
    for (name, attempt) in &attempts {
        assert_eq!(errno(attempt(&file)), Errno::NOSPC, "{name}");
        assert_eq!(state(&pool, &file), before, "{name}");
        pool.check();
    }
    drop(other);
    fs::remove_file(other_path).unwrap();
    file.set_len(4 * FOLIO).unwrap();
    assert_eq!(runs(&file), [(end as usize, 7), ((4 * FOLIO - end) as usize, 0)]);
    pool.check();
}

/// The kernel cuts a long write into requests of up to 1 MiB.
#[test]
fn a_long_write_ends_where_the_pool_does() {
    let pool = Pool::small(2);
    let (_, file) = create(&pool, "file");
    let bytes = pattern(3 * FOLIO);
    let written = file.write_at(&bytes, 0).unwrap() as u64;
    assert!((FOLIO..=2 * FOLIO).contains(&written), "{written}");
    assert!(read(&file, 0, 3 * FOLIO) == bytes[..written as usize]);
    assert_eq!((size(&file), pool.free_pages()), (written, 0));
    assert_eq!(errno(file.write_at(&bytes[..1 << 20], 2 * FOLIO - 1)), Errno::NOSPC);
    assert_eq!(size(&file), written, "a request that does not fit is refused whole");
    pool.check();
}

#[test]
fn every_page_has_one_taker() {
    const TAKERS: usize = 12;
    let pool = Pool::small(5);
    let files: Vec<_> = (0..TAKERS).map(|n| create(&pool, &format!("file{n}")).1).collect();
    let taken = std::thread::scope(|scope| {
        let takers: Vec<_> = files.iter().map(|file| scope.spawn(|| file.set_len(FOLIO))).collect();
        takers.into_iter().map(|taker| taker.join().unwrap()).filter(Result::is_ok).count()
    });
    assert_eq!((taken, pool.free_pages()), (5, 0));
    assert_eq!(files.iter().map(pages).sum::<u64>(), 5);
    pool.check();
}

#[test]
fn the_blocks_of_all_files_are_the_pages_that_are_not_free() {
    let pool = Pool::small(16);
    let (_, one) = create(&pool, "one");
    let (_, two) = create(&pool, "two");
    let steps: [&dyn Fn(); 9] = [
        &|| one.write_all_at(&[7], 5 * FOLIO).unwrap(),
        &|| two.set_len(3 * FOLIO - 1).unwrap(),
        &|| fallocate(&one, PUNCH, FOLIO, 2 * FOLIO).unwrap(),
        &|| fallocate(&two, FallocateFlags::KEEP_SIZE, 0, 5 * FOLIO).unwrap(),
        &|| fallocate(&two, PUNCH, 3 * FOLIO, FOLIO).unwrap(),
        &|| one.set_len(FOLIO + 1).unwrap(),
        &|| two.set_len(4 * FOLIO).unwrap(),
        &|| fallocate(&one, FallocateFlags::empty(), 0, 4 * FOLIO).unwrap(),
        &|| two.set_len(0).unwrap(),
    ];
    for (n, step) in steps.iter().enumerate() {
        step();
        let blocks: u64 = [&one, &two].iter().map(|file| file.metadata().unwrap().blocks()).sum();
        let stat = rustix::fs::statfs(pool.path()).unwrap();
        assert_eq!(blocks * 512, (stat.f_blocks - stat.f_bfree) * stat.f_bsize as u64, "step {n}");
        assert_eq!(blocks * 512, pool.counter("pages_used") * FOLIO, "step {n}");
        pool.check();
    }
}

// ---- the end of a file --------------------------------------------------------------------------

#[test]
fn the_memory_of_an_unlinked_file_stays_until_it_is_closed() {
    let pool = Pool::small(2);
    let (path, file) = filled(&pool, "file", 2 * FOLIO, 7);
    fs::remove_file(path).unwrap();
    let (_, other) = create(&pool, "other");
    assert_eq!(errno(other.set_len(1)), Errno::NOSPC);
    assert_eq!(runs(&file), [(2 * FOLIO as usize, 7)]);
    file.write_all_at(&[8], 0).unwrap();
    file.set_len(FOLIO).unwrap();
    other.set_len(FOLIO).unwrap();
    drop(file);
    other.set_len(2 * FOLIO).unwrap();
    assert_eq!(runs(&other), [(2 * FOLIO as usize, 0)]);
    pool.check();
}

#[test]
fn the_memory_of_an_unlinked_file_stays_until_it_is_unmapped() {
    let pool = Pool::small(1);
    let (path, file) = filled(&pool, "file", FOLIO, 7);
    let mut toucher = Toucher::mapping(&path, FOLIO);
    fs::remove_file(path).unwrap();
    drop(file);
    let (_, other) = create(&pool, "other");
    assert_eq!(errno(other.set_len(1)), Errno::NOSPC);
    assert_eq!(toucher.count(&format!("differ 0 {FOLIO} 7")), 0);
    assert!(toucher.store(5, 9));
    assert_eq!(toucher.load(5), Some(9));
    assert_eq!(toucher.ask("unmap"), "ok");
    other.set_len(FOLIO).unwrap();
    assert_eq!(runs(&other), [(FOLIO as usize, 0)]);
    pool.check();
}

#[test]
fn an_allocation_right_after_rm_finds_the_memory() {
    let pool = Pool::small(4);
    for round in 0..100 {
        let (path, file) = create(&pool, "file");
        file.set_len(4 * FOLIO).unwrap_or_else(|error| panic!("round {round}: {error}"));
        file.write_all_at(&[7], 4 * FOLIO - 1).unwrap();
        drop(file);
        fs::remove_file(path).unwrap();
    }
    pool.check();
}

#[test]
fn a_file_that_another_replaces_gives_its_memory_back() {
    let pool = Pool::small(4);
    drop(filled(&pool, "file", 2 * FOLIO, 1));
    for round in 0..20 {
        let (new, file) = create(&pool, "new");
        file.set_len(2 * FOLIO).unwrap_or_else(|error| panic!("round {round}: {error}"));
        drop(file);
        fs::rename(new, pool.join("file")).unwrap();
    }
    pool.check();
}

// ---- locks --------------------------------------------------------------------------------------

#[test]
fn locks_keep_other_processes_out_until_their_holder_is_gone() {
    let pool = Pool::small(1);
    let (path, file) = create(&pool, "file");
    let locks: [(&str, Lock); 2] = [
        ("flock", |file, how| rustix::fs::flock(file, how)),
        ("fcntl", |file, how| rustix::fs::fcntl_lock(file, how)),
    ];
    for (kind, lock) in locks {
        let mut holder = Toucher::start();
        let ask = format!("lock {} {kind}", path.display());
        assert_eq!(holder.ask(&ask), "ok");
        assert_eq!(
            lock(&file, FlockOperation::NonBlockingLockExclusive),
            Err(Errno::AGAIN),
            "{kind}"
        );
        assert_eq!(lock(&file, FlockOperation::NonBlockingLockShared), Err(Errno::AGAIN), "{kind}");
        assert_eq!(holder.ask("unlock"), "ok");
        lock(&file, FlockOperation::NonBlockingLockShared).unwrap();
        assert_eq!(holder.ask(&ask), format!("errno {}", Errno::AGAIN.raw_os_error()), "{kind}");
        lock(&file, FlockOperation::Unlock).unwrap();
        assert_eq!(holder.ask(&ask), "ok");
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| lock(&file, FlockOperation::LockExclusive));
            drop(holder);
            waiting.join().unwrap().unwrap();
        });
        lock(&file, FlockOperation::Unlock).unwrap();
    }
}

// ---- copies -------------------------------------------------------------------------------------

fn copy(from: &File, at: u64, to: &File, target: u64, length: u64) -> rustix::io::Result<u64> {
    let (mut at, mut target) = (at, target);
    rustix::fs::copy_file_range(from, Some(&mut at), to, Some(&mut target), length as usize)
        .map(|count| count as u64)
}

#[test]
fn ranges_are_copied_between_files() {
    let pool = Pool::small(8);
    let (_, from) = create(&pool, "from");
    let (_, to) = filled(&pool, "to", 10, 1);
    let bytes = pattern(5_000_000);
    from.write_all_at(&bytes, 0).unwrap();
    assert_eq!(copy(&from, 3, &to, 5, 5_000_000), Ok(4_999_997), "to the end of the source");
    assert!(read(&to, 0, 8 * FOLIO) == [&[1; 5], &bytes[3..]].concat());
    assert_eq!(copy(&from, 5_000_000, &to, 0, 10), Ok(0));
    assert_eq!(copy(&from, 100, &to, 0, 0), Ok(0));
    assert_eq!(size(&to), 5_000_002);
    pool.check();
}

#[test]
fn ranges_are_copied_within_a_file_unless_they_overlap() {
    let pool = Pool::small(2);
    let (_, file) = create(&pool, "file");
    file.write_all_at(&[[1; 100], [2; 100]].concat(), 0).unwrap();
    assert_eq!(copy(&file, 0, &file, 200, 150), Ok(150));
    assert_eq!(runs(&file), [(100, 1), (100, 2), (100, 1), (50, 2)]);
    assert_eq!(copy(&file, 0, &file, 50, 100), Err(Errno::INVAL));
    assert_eq!(copy(&file, 150, &file, FOLIO, 50), Ok(50));
    assert_eq!((size(&file), pages(&file)), (FOLIO + 50, 2));
}

#[test]
fn a_released_page_is_copied_as_zeros() {
    let pool = Pool::small(3);
    let (_, from) = filled(&pool, "from", FOLIO, 7);
    let (_, to) = filled(&pool, "to", FOLIO, 8);
    fallocate(&from, PUNCH, 0, FOLIO).unwrap();
    assert_eq!(copy(&from, 0, &to, 10, 100), Ok(100));
    assert_eq!(runs(&to), [(10, 8), (100, 0), (FOLIO as usize - 110, 8)]);
    assert_eq!(pages(&from), 0);
}

/// The bytes that sendfile(2) puts into a pipe.
fn send(file: &File, offset: u64, length: usize) -> Vec<u8> {
    let (mut reader, writer) = io::pipe().expect("a pipe");
    let mut offset = offset;
    let sent = rustix::fs::sendfile(&writer, file, Some(&mut offset), length).expect("sendfile");
    drop(writer);
    let mut bytes = Vec::new();
    reader.read_to_end(&mut bytes).expect("what was sent");
    assert_eq!(bytes.len(), sent);
    bytes
}

#[test]
fn sendfile_sees_what_system_calls_did() {
    let pool = Pool::small(4);
    let (_, file) = filled(&pool, "file", 10_000, 1);
    let (_, other) = filled(&pool, "other", 10_000, 5);
    assert_eq!(send(&file, 4000, 200), [1; 200]);
    file.write_all_at(&[2; 100], 4050).unwrap();
    assert_eq!(send(&file, 4000, 200), [vec![1; 50], vec![2; 100], vec![1; 50]].concat());
    fallocate(&file, PUNCH, 4060, 10).unwrap();
    assert_eq!(send(&file, 4050, 30), [[2; 10], [0; 10], [2; 10]].concat());
    fallocate(&file, FallocateFlags::ZERO_RANGE, 4050, 10).unwrap();
    assert_eq!(send(&file, 4050, 30), [[0; 10], [0; 10], [2; 10]].concat());
    copy(&other, 0, &file, 4055, 10).unwrap();
    assert_eq!(send(&file, 4050, 20), [vec![0; 5], vec![5; 10], vec![0; 5]].concat());
    file.set_len(4060).unwrap();
    assert_eq!(send(&file, 4050, 100), [[0; 5], [5; 5]].concat());
    file.set_len(4100).unwrap();
    assert_eq!(send(&file, 4050, 100), [vec![0; 5], vec![5; 5], vec![0; 40]].concat());
}

#[test]
fn sendfile_sees_what_another_process_wrote() {
    let pool = Pool::small(1);
    let (path, file) = filled(&pool, "file", 10_000, 1);
    assert_eq!(send(&file, 0, 100), [1; 100]);
    assert_eq!(Toucher::start().ask(&format!("pwrite {} 0 50 2", path.display())), "count 50");
    assert_eq!(send(&file, 0, 100), [[2; 50], [1; 50]].concat());
}

// ---- mappings -----------------------------------------------------------------------------------

fn map(file: &File, offset: u64, length: u64, sharing: Sharing) -> Mapping {
    Mapping::new(file, Range::at(offset, length), sharing, true).expect("mmap")
}

#[test]
fn mappings_and_system_calls_see_the_same_bytes() {
    let pool = Pool::small(3);
    let (path, file) = filled(&pool, "file", 3 * FOLIO, 7);
    let places = [
        (0, 1),
        (SUBPAGE, SUBPAGE),
        (3 * SUBPAGE, 5 * SUBPAGE + 100),
        (FOLIO - SUBPAGE, FOLIO + 2 * SUBPAGE),
    ];
    for (n, (offset, length)) in (0..).zip(places) {
        let mapping = map(&file, offset, length, Sharing::Shared);
        let mut toucher = Toucher::start();
        toucher.map(&path, offset, length, "shared rw");
        for at in [offset, offset + length - 1] {
            mapping.store(at, 10 + n).unwrap();
            assert_eq!((read(&file, at, 1), toucher.load(at)), (vec![10 + n], Some(10 + n)));
            assert!(toucher.store(at, 20 + n));
            assert_eq!((read(&file, at, 1), mapping.load(at)), (vec![20 + n], Ok(20 + n)));
            file.write_all_at(&[30 + n], at).unwrap();
            assert_eq!((toucher.load(at), mapping.load(at)), (Some(30 + n), Ok(30 + n)));
        }
    }
    pool.check();
}

#[test]
fn what_is_written_to_a_private_mapping_is_seen_there_only() {
    let pool = Pool::small(2);
    let (path, file) = filled(&pool, "file", 2 * FOLIO, 7);
    let mut toucher = Toucher::start();
    toucher.map(&path, SUBPAGE, FOLIO, "private rw");
    let shared = map(&file, 0, 2 * FOLIO, Sharing::Shared);
    assert!(toucher.store(SUBPAGE, 9) && toucher.store(FOLIO, 9));
    assert_eq!((toucher.load(SUBPAGE), toucher.load(FOLIO)), (Some(9), Some(9)));
    assert_eq!((shared.load(SUBPAGE), shared.load(FOLIO)), (Ok(7), Ok(7)));
    assert_eq!(runs(&file), [(2 * FOLIO as usize, 7)]);
    file.write_all_at(&[8], 2 * SUBPAGE).unwrap();
    assert_eq!(toucher.load(2 * SUBPAGE), Some(8), "what it has not written it shares");
    pool.check();
}

#[test]
fn a_read_only_file_can_be_mapped_but_not_for_writing() {
    let pool = Pool::small(1);
    let (path, _file) = filled(&pool, "file", FOLIO, 7);
    let readable = File::open(path).unwrap();
    let shared = |writable| Mapping::new(&readable, Range::at(0, FOLIO), Sharing::Shared, writable);
    assert_eq!(shared(false).unwrap().load(5), Ok(7));
    assert_eq!(shared(true).err().map(|error| error.errno()), Some(Errno::ACCESS));
    assert!(map(&readable, 0, FOLIO, Sharing::Private).store(5, 9).is_ok());
    assert_eq!(runs(&readable), [(FOLIO as usize, 7)]);
}

#[test]
fn whole_pages_are_mapped_by_huge_entries() {
    let pool = Pool::small(4);
    let (path, file) = create(&pool, "file");
    file.set_len(3 * FOLIO + 1).unwrap();
    let mut toucher = Toucher::mapping(&path, 3 * FOLIO);
    assert_eq!(toucher.walk(), []);
    assert_eq!(toucher.huge(), 3);
    toucher.map(&path, FOLIO + SUBPAGE, 2 * FOLIO - SUBPAGE, "shared rw");
    assert_eq!(toucher.walk(), []);
    assert_eq!(toucher.huge(), 1, "of what begins within a page the rest is huge");
}

/// hugetlbfs lengthens a file in mmap(2) (fs/hugetlbfs/inode.c, hugetlbfs_file_mmap). The kernel
/// does not tell a FUSE server of an mmap(2).
#[test]
fn a_mapping_does_not_lengthen_its_file() {
    let pool = Pool::small(2);
    let (path, file) = create(&pool, "file");
    let mut toucher = Toucher::start();
    toucher.map(&path, 0, FOLIO, "shared rw");
    assert_eq!((size(&file), pool.free_pages()), (0, 2));
    assert!(!toucher.store(5, 1), "SIGBUS, as on tmpfs");
    file.set_len(FOLIO).unwrap();
    assert!(toucher.store(5, 1), "ftruncate(2) has taken the memory");
    assert_eq!(toucher.huge(), 1);
    pool.check();
}

#[test]
fn a_mapping_behind_the_end_is_sigbus_until_the_file_is_longer() {
    let pool = Pool::small(3);
    let (path, file) = filled(&pool, "file", 5000, 7);
    let mut toucher = Toucher::start();
    toucher.map(&path, 0, 3 * SUBPAGE, "shared rw");
    assert_eq!(
        (toucher.load(4999), toucher.load(5000), toucher.load(8191)),
        (Some(7), Some(0), Some(0))
    );
    assert_eq!(toucher.walk(), [2 * SUBPAGE]);
    toucher.map(&path, 0, 3 * FOLIO, "shared rw");
    assert_eq!((toucher.load(FOLIO), toucher.load(3 * FOLIO - 1)), (None, None));
    file.set_len(3 * FOLIO).unwrap();
    assert_eq!(toucher.walk(), []);
    assert_eq!((toucher.load(5000), toucher.load(FOLIO)), (Some(0), Some(0)));
    file.set_len(FOLIO).unwrap();
    assert_eq!((toucher.load(FOLIO - 1), toucher.load(FOLIO)), (Some(0), None));
    assert!(!toucher.store(2 * FOLIO, 1));
    pool.check();
}

#[test]
fn what_a_mapper_removes_reads_as_zeros_and_is_the_files_again() {
    let heals: [(&str, Heal); 4] = [
        ("a write elsewhere", |file| file.write_all_at(&[8], 0).unwrap()),
        ("truncate down", |file| file.set_len(3 * FOLIO - 1).unwrap()),
        ("truncate up", |file| file.set_len(3 * FOLIO + 1).unwrap()),
        ("fallocate", |file| fallocate(file, FallocateFlags::empty(), 0, 10).unwrap()),
    ];
    for (name, heal) in heals {
        for (offset, length) in [(FOLIO, SUBPAGE), (FOLIO + SUBPAGE, FOLIO), (FOLIO, FOLIO)] {
            let pool = Pool::small(4);
            let (path, file) = filled(&pool, "file", 3 * FOLIO, 7);
            let mut toucher = Toucher::mapping(&path, 3 * FOLIO);
            assert_eq!(toucher.walk(), []);
            assert_eq!(toucher.ask(&format!("advise {offset} {length} {REMOVE}")), "ok");
            heal(&file);
            pool.check();
            assert_eq!(read(&file, offset, length), vec![0; length as usize], "{name}");
            assert_eq!(
                (read(&file, offset - 1, 1), read(&file, offset + length, 1)),
                (vec![7], vec![7]),
                "{name}"
            );
            assert_eq!(
                (toucher.walk(), pages(&file)),
                (vec![], size(&file).div_ceil(FOLIO)),
                "{name}"
            );
            pool.check();
        }
    }
}

#[test]
fn what_a_mapper_removes_and_touches_again_is_zeros() {
    let pool = Pool::small(2);
    let (path, file) = filled(&pool, "file", 2 * FOLIO, 7);
    let mut toucher = Toucher::mapping(&path, 2 * FOLIO);
    assert_eq!(toucher.ask(&format!("advise {SUBPAGE} {FOLIO} {REMOVE}")), "ok");
    assert_eq!(toucher.walk(), []);
    assert_eq!(toucher.count(&format!("differ {SUBPAGE} {FOLIO} 0")), 0);
    assert_eq!(runs(&file).iter().map(|run| run.1).collect::<Vec<_>>(), [7, 0, 7]);
    pool.check();
}

// ---- gigantic pages -----------------------------------------------------------------------------

fn gigantic_pages(path: &Path) -> u64 {
    fs::metadata(path).expect("stat").blocks() * 512 / GIB
}

#[test]
fn gigantic_pages_are_the_grain_of_space_and_nothing_else() {
    let pool = Pool::gigantic(2);
    let (one_path, one) = create(&pool, "one");
    let (two_path, two) = create(&pool, "two");
    one.write_all_at(b"first", 0).unwrap();
    two.set_len(5000).unwrap();
    assert_eq!((size(&one), size(&two), pool.free_pages()), (5, 5000, 0));
    assert_eq!((gigantic_pages(&one_path), gigantic_pages(&two_path)), (1, 1));
    let (_, third) = create(&pool, "third");
    assert_eq!(errno(third.write_at(b"x", 0)), Errno::NOSPC);
    assert_eq!(errno(one.set_len(GIB + 1)), Errno::NOSPC);
    assert_eq!((size(&one), size(&third)), (5, 0));
    pool.check();
    one.set_len(GIB).unwrap();
    let mut toucher = Toucher::mapping(&one_path, GIB);
    assert_eq!(toucher.walk(), []);
    assert_eq!(toucher.huge(), 512);
    assert!(toucher.store(GIB - 1, 7));
    assert_eq!((read(&one, 0, 6), read(&one, GIB - 1, 9)), (b"first\0".to_vec(), vec![7]));
    fallocate(&one, PUNCH, 0, GIB / 2).unwrap();
    assert_eq!(
        (pool.free_pages(), read(&one, 0, 5)),
        (0, vec![0; 5]),
        "part of a page is not given back"
    );
    pool.check();
    fallocate(&one, PUNCH, 0, GIB).unwrap();
    assert_eq!((size(&one), pool.free_pages()), (GIB, 1));
    third.write_all_at(b"x", 0).unwrap();
    assert_eq!(errno(one.write_at(b"x", 77)), Errno::NOSPC);
    pool.check();
}
