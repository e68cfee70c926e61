//! Rules that the test suites of others (xfstests, LTP) ask for, and that this filesystem meets in
//! its own way. Each rule that is a limit stands in docs/SEMANTICS.md.

use crate::support::{FOLIO, Pool, SUBPAGE, Toucher, limits};
use rustix::fs::{FallocateFlags, IFlags, Mode, OFlags, SeekFrom, ioctl_setflags};
use rustix::io::Errno;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::sync::Barrier;

fn open(pool: &Pool, name: &str, flags: OFlags) -> File {
    let mut how = OpenOptions::new();
    how.read(true).write(true).create(true).custom_flags(flags.bits() as i32);
    how.open(pool.join(name)).expect("a file")
}

/// The first places at or behind `offset` that hold data and a hole.
fn seeks(file: &File, offset: u64) -> (rustix::io::Result<u64>, rustix::io::Result<u64>) {
    (rustix::fs::seek(file, SeekFrom::Data(offset)), rustix::fs::seek(file, SeekFrom::Hole(offset)))
}

// ---- holes --------------------------------------------------------------------------------------

/// xfstests generic/490 makes its hole by a write far behind the end, for which the pool would need
/// memory. In this filesystem, a punch makes the hole.
#[test]
fn a_seek_from_the_middle_of_a_large_hole_finds_its_end() {
    const PAGES: u64 = 60;
    let pool = Pool::small(PAGES);
    let file = open(&pool, "file", OFlags::empty());
    file.set_len(PAGES * FOLIO).unwrap();
    let hole = (FOLIO, (PAGES - 1) * FOLIO);
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&file, punch, hole.0, hole.1 - hole.0).unwrap();
    for offset in
        [hole.0, hole.0 + 1, 12 * FOLIO, 30 * FOLIO - SUBPAGE, 45 * FOLIO + 77, hole.1 - 1]
    {
        assert_eq!(seeks(&file, offset), (Ok(hole.1), Ok(offset)), "{offset:#x}");
    }
    assert_eq!(seeks(&file, hole.0 - 1), (Ok(hole.0 - 1), Ok(hole.0)));
    assert_eq!(seeks(&file, hole.1), (Ok(hole.1), Ok(PAGES * FOLIO)), "the end is a hole");
    assert_eq!(seeks(&file, PAGES * FOLIO), (Err(Errno::NXIO), Err(Errno::NXIO)));
    pool.check();
}

/// LTP lseek11 concludes from this rule that a filesystem has no holes, and skips itself.
#[test]
fn what_was_never_written_is_data_that_takes_memory() {
    let pool = Pool::small(4);
    let file = open(&pool, "file", OFlags::empty());
    file.write_all_at(b"a", 3 * FOLIO).unwrap();
    assert_eq!(seeks(&file, 0), (Ok(0), Ok(3 * FOLIO + 1)));
    assert_eq!(pool.free_pages(), 0);
    assert_eq!(
        file.set_len(4 * FOLIO + 1).unwrap_err().raw_os_error(),
        Some(Errno::NOSPC.raw_os_error())
    );
}

// ---- times --------------------------------------------------------------------------------------

/// Waits until the kernel's clock for file times advances.
fn wait_for_the_clock() {
    let now = || rustix::time::clock_gettime(rustix::time::ClockId::RealtimeCoarse);
    let then = now();
    limits::until(limits::ANSWER, "the next reading of the coarse clock", || now() != then);
}

/// xfstests generic/003 asks for the opposite, with `relatime` and `strictatime`.
#[test]
fn a_read_does_not_change_the_time_of_access() {
    let pool = Pool::small(1);
    let file = open(&pool, "file", OFlags::empty());
    file.write_all_at(b"text", 0).unwrap();
    let before = (file.metadata().unwrap().atime(), file.metadata().unwrap().atime_nsec());
    wait_for_the_clock();
    file.read_at(&mut [0; 4], 0).unwrap();
    fs::read(pool.join("file")).unwrap();
    let read = fs::metadata(pool.join("file")).unwrap();
    assert_eq!((read.atime(), read.atime_nsec()), before);
    let later = std::time::SystemTime::UNIX_EPOCH + limits::PROGRAM;
    file.set_times(fs::FileTimes::new().set_accessed(later)).unwrap();
    assert_eq!(
        fs::metadata(pool.join("file")).unwrap().accessed().unwrap(),
        later,
        "utimensat(2) does"
    );
}

/// xfstests generic/215 asks for the opposite, but the kernel does not tell a FUSE server of a
/// store.
#[test]
fn a_store_through_a_mapping_changes_no_time() {
    let pool = Pool::small(1);
    let file = open(&pool, "file", OFlags::empty());
    file.set_len(FOLIO).unwrap();
    let times = || {
        let stat = fs::metadata(pool.join("file")).unwrap();
        [(stat.mtime(), stat.mtime_nsec()), (stat.ctime(), stat.ctime_nsec())]
    };
    let before = times();
    wait_for_the_clock();
    let mut toucher = Toucher::mapping(&pool.join("file"), FOLIO);
    assert!(toucher.store(0, 1));
    drop(toucher);
    assert_eq!(times(), before);
    wait_for_the_clock();
    file.write_all_at(b"text", 0).unwrap();
    let after = times();
    assert!(after[0] > before[0] && after[1] > before[1], "write(2) does: {before:?}, {after:?}");
}

// ---- writes -------------------------------------------------------------------------------------

/// xfstests generic/069 appends three million times 4 bytes. Each is a request of about 20 us, so
/// that takes a minute.
#[test]
fn appends_of_six_descriptors_are_whole_and_each_in_its_order() {
    const APPENDS: [u32; 6] = [1, 20, 300, 2000, 3000, 1234];
    let pool = Pool::small(1);
    let append = &|writer: usize| {
        let mut file =
            OpenOptions::new().append(true).create(true).open(pool.join("file")).unwrap();
        for number in 0..APPENDS[writer] {
            let word = (writer as u32) << 24 | number;
            file.write_all(&word.to_ne_bytes()).unwrap();
        }
    };
    std::thread::scope(|scope| {
        (0..APPENDS.len()).for_each(|writer| drop(scope.spawn(move || append(writer))))
    });
    let bytes = fs::read(pool.join("file")).unwrap();
    let words: Vec<u32> =
        bytes.chunks(4).map(|word| u32::from_ne_bytes(word.try_into().unwrap())).collect();
    for (writer, appends) in APPENDS.into_iter().enumerate() {
        let own = words.iter().filter(|word| **word >> 24 == writer as u32);
        assert!(own.map(|word| word & 0xff_ffff).eq(0..appends), "the words of writer {writer}");
    }
    assert_eq!(words.len(), APPENDS.iter().sum::<u32>() as usize);
}

/// xfstests generic/538 steps by 512 bytes through three blocks of statfs(2). Here these blocks are
/// pages of 2 MiB or 1 GiB.
#[test]
fn unaligned_direct_writes_at_once_keep_their_neighbours_bytes() {
    const LENGTH: u64 = 2 * SUBPAGE;
    let pool = Pool::small(2);
    for shift in (512..4 * SUBPAGE).step_by(1536) {
        let file = open(&pool, "file", OFlags::DIRECT);
        let first = FOLIO - SUBPAGE - 512; // the first write reaches across a page's end
        file.set_len(first + 512).unwrap();
        let start = Barrier::new(2);
        std::thread::scope(|scope| {
            for (byte, at) in [(1, first), (2, first + LENGTH + shift)] {
                let (file, start) = (&file, &start);
                scope.spawn(move || {
                    start.wait();
                    file.write_all_at(&[byte; LENGTH as usize], at).unwrap();
                });
            }
        });
        let mut bytes = vec![9; (2 * LENGTH + shift) as usize];
        file.read_exact_at(&mut bytes, first).unwrap();
        let runs: Vec<(usize, u8)> =
            bytes.chunk_by(|one, next| one == next).map(|run| (run.len(), run[0])).collect();
        assert_eq!(
            runs,
            [(LENGTH as usize, 1), (shift as usize, 0), (LENGTH as usize, 2)],
            "{shift}"
        );
        fs::remove_file(pool.join("file")).unwrap();
    }
    pool.check();
}

// ---- missing features ---------------------------------------------------------------------------

/// LTP open14, openat03: fuser 0.18 does not know the request (FUSE_TMPFILE, Linux 6.1).
#[test]
fn a_file_without_a_name_cannot_be_opened() {
    let pool = Pool::small(1);
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    for _ in 0..2 {
        let opened = rustix::fs::open(pool.path(), flags, Mode::from_raw_mode(0o600));
        assert_eq!(
            opened.err(),
            Some(Errno::OPNOTSUPP),
            "by which programs know that they need a name"
        );
    }
    assert_eq!(fs::read_dir(pool.path()).unwrap().count(), 0);
    pool.check();
}

/// LTP setxattr03: the flags of chattr(1) would also have to protect the file's memory.
#[test]
fn a_file_cannot_be_made_immutable_or_append_only() {
    let pool = Pool::small(1);
    let file = open(&pool, "file", OFlags::empty());
    for flags in [IFlags::IMMUTABLE, IFlags::APPEND] {
        assert_eq!(ioctl_setflags(&file, flags), Err(Errno::NOTTY), "{flags:?}");
    }
    file.write_all_at(b"text", 0).unwrap();
    fs::remove_file(pool.join("file")).unwrap();
}
