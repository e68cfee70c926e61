//! Memory that is cleared ahead of use (`clear=ahead`): a new file gets its size at once, and shows
//! zeros.

use crate::support::sys::{Mapping, Sharing};
use crate::support::{
    FOLIO, Held, Pool, REPAIR, SUBPAGE, Toucher, kill_worker, limits, poison, set,
};
use hugetlb2fs::units::Range;
use rustix::fs::{FallocateFlags, fallocate};
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};

const PAGES: u64 = 48;
/// The largest file that is ready as long as no file has been sized: half of what may be ready.
const LARGEST: u64 = PAGES / 4;

fn pool() -> Pool {
    let pool = Pool::mount(&format!("pagesize=2M,size={},clear=ahead", PAGES * FOLIO));
    wait_for_ready(&pool, LARGEST);
    pool
}

/// Waits until `pages` pages or more are ready.
fn wait_for_ready(pool: &Pool, pages: u64) {
    limits::until(limits::ANSWER, "memory that is ready", || pool.counter("pages_ready") >= pages);
}

fn create(pool: &Pool, name: &str) -> File {
    let path = pool.join(name);
    File::options().read(true).write(true).create_new(true).open(path).unwrap()
}

/// Asserts that the file has `size` bytes, which are zeros, by read(2) and by mmap(2).
fn assert_zeros(file: &File, size: u64) {
    assert_eq!(file.metadata().unwrap().len(), size);
    let mut bytes = vec![1; size as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes.iter().all(|byte| *byte == 0), "read(2) sees foreign bytes");
    let mapping = Mapping::new(file, Range::new(0, size), Sharing::Shared, true).unwrap();
    let foreign = (0..size).step_by(64).filter(|at| mapping.load(*at) != Ok(0)).count();
    assert_eq!(foreign, 0, "mmap(2) sees foreign bytes");
}

/// No piece of memory can move while the threads that move some are held.
#[test]
fn a_new_file_gets_its_size_while_no_memory_can_move() {
    let pool = pool();
    let held = Held::at(&pool, "move out: the reserve has given a piece");
    let file = create(&pool, "file");
    file.set_len(LARGEST * FOLIO - 5000).unwrap();
    drop(held);
    assert_zeros(&file, LARGEST * FOLIO - 5000);
    assert_eq!(pool.counter("pages_used"), LARGEST);
    pool.check();
    // The next file of that size is there, too.
    limits::until(limits::ANSWER, "a second file", || {
        pool.counter("pages_ready") >= LARGEST && pool.counter("pages_reserved") == 0
    });
    drop(file);
    fs::remove_file(pool.join("file")).unwrap();
    pool.wait_for_free_pages(PAGES);
    pool.unmount();
}

/// Waits until nothing more is to be cleared.
fn wait_until_cleared(pool: &Pool) {
    limits::until(limits::ANSWER, "all to be cleared", || pool.counter("clearing") == 0);
}

/// The latest file of each directory says what the next one gets.
#[test]
fn each_directory_has_files_of_its_own_sizes_ready() {
    const SIZES: [(&str, u64); 2] = [("large/file", 10), ("small/file", 3)];
    let pool = pool();
    let size_all = || {
        for (name, pages) in SIZES {
            create(&pool, name).set_len(pages * FOLIO).unwrap();
        }
    };
    let remove_all =
        || SIZES.iter().for_each(|(name, _)| fs::remove_file(pool.join(name)).unwrap());
    fs::create_dir(pool.join("large")).unwrap();
    fs::create_dir(pool.join("small")).unwrap();
    size_all();
    remove_all();
    pool.wait_for_free_pages(PAGES);
    wait_until_cleared(&pool);
    let held = Held::at(&pool, "move out: the reserve has given a piece");
    size_all();
    drop(held);
    let pages = pool.counter("pages_used");
    assert_eq!(pages, 13, "each file got a ready one that has its size, and no more");
    pool.check();
    remove_all();
    pool.unmount();
}

#[test]
fn pages_that_are_ready_are_free_for_every_file() {
    let pool = pool();
    let idle: Vec<File> = (0..100).map(|n| create(&pool, &format!("idle{n}"))).collect();
    assert!(idle.iter().all(|file| file.metadata().unwrap().blocks() == 0), "they are empty");
    assert_eq!(pool.free_pages(), PAGES);
    let file = create(&pool, "file");
    file.set_len(PAGES * FOLIO).unwrap();
    assert_eq!(pool.free_pages(), 0);
    pool.check();
    let refused = idle[0].set_len(1).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(rustix::io::Errno::NOSPC.raw_os_error()));
    assert_zeros(&file, PAGES * FOLIO);
    drop((file, idle));
    pool.unmount();
}

#[test]
fn what_a_new_file_does_not_use_goes_back() {
    let pool = pool();
    let mut file = create(&pool, "file");
    for piece in 0..48_u64 {
        file.write_all(&[piece as u8; 64 << 10]).unwrap();
    }
    pool.check();
    limits::until(limits::ANSWER, "the rest", || pool.counter("pages_used") == 2);
    let bytes = fs::read(pool.join("file")).unwrap();
    assert!(bytes.iter().enumerate().all(|(at, byte)| usize::from(*byte) == at >> 16));
    pool.check();
    drop(file);
    pool.unmount();
}

/// Each change comes at once: pages lie behind the end of the file.
#[test]
fn a_file_with_pages_ahead_is_a_file_as_any_other() {
    let pool = pool();
    type Change = fn(&Pool, &File);
    let changes: [(&str, Change); 8] = [
        ("grow", |_, file| file.set_len(3 * FOLIO + 7).unwrap()),
        ("grow beyond", |_, file| file.set_len((LARGEST + 3) * FOLIO).unwrap()),
        ("shrink", |_, file| file.set_len(100).unwrap()),
        ("shrink to nothing", |_, file| file.set_len(0).unwrap()),
        ("punch", |_, file| {
            let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(file, punch, 0, FOLIO).unwrap();
            fallocate(file, FallocateFlags::empty(), 0, 2 * FOLIO).unwrap();
        }),
        ("allocate", |_, file| {
            fallocate(file, FallocateFlags::KEEP_SIZE, 0, 5 * FOLIO).unwrap();
        }),
        ("quarantine and repair", |pool, _| {
            poison(pool.join("file"), FOLIO + SUBPAGE, SUBPAGE).unwrap();
            set(pool.join("file"), REPAIR, "salvage all").unwrap();
        }),
        ("remove", |pool, _| fs::remove_file(pool.join("file")).unwrap()),
    ];
    for (name, change) in changes {
        println!("{name}");
        let file = create(&pool, "file");
        file.set_len(2 * FOLIO).unwrap();
        change(&pool, &file);
        pool.check();
        assert_zeros(&file, file.metadata().unwrap().len());
        file.set_len(4 * FOLIO).unwrap();
        assert_zeros(&file, 4 * FOLIO);
        pool.check();
        drop(file);
        let _ = fs::remove_file(pool.join("file"));
        pool.wait_for_free_pages(PAGES);
        pool.check();
        wait_for_ready(&pool, 2);
    }
    pool.unmount();
}

#[test]
fn ready_memory_survives_the_death_of_the_worker() {
    let pool = pool();
    for round in 0..6 {
        let name = format!("file{round}");
        let file = create(&pool, &name);
        if round % 2 == 0 {
            kill_worker(&pool);
        }
        file.set_len(2 * FOLIO + round).unwrap();
        kill_worker(&pool);
        assert_zeros(&file, 2 * FOLIO + round);
        pool.check();
        let pages = 2 + u64::from(round > 0);
        assert_eq!(pool.free_pages() + pool.counter("pages_orphaned"), PAGES - pages);
        let mut program = Toucher::mapping(&pool.join(&name), 2 * FOLIO);
        assert_eq!(program.walk(), []);
        drop((program, file));
        fs::remove_file(pool.join(&name)).unwrap();
        pool.wait_for_free_pages(PAGES);
        wait_for_ready(&pool, 1);
    }
    assert_eq!(pool.counter("short_bytes"), 0, "no memory is lost to the machine");
    pool.check();
    pool.unmount();
}
