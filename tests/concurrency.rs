//! Many threads and processes use few files and few pages. Nothing hangs, no byte is lost, and each
//! refusal has a reason.
//!
//! Seeds make the sequences, so a failure's operations can be found again. The order of the threads
//! is not repeatable.

mod support;

use hugetlb2fs::units::Range;
use rustix::fs::{AtFlags, CWD, FallocateFlags, OFlags, RenameFlags, SeekFrom, XattrFlags};
use rustix::io::Errno;
use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use support::sys::{Mapping, Sharing};
use support::{
    CHECK, COLLAPSE, Dice, FOLIO, MAP, POISON, POOL, Pool, REPAIR, SIZE, SUBPAGE, Toucher, get,
    limits, poison, set,
};

const PAGE: u64 = FOLIO;
const THREADS: u64 = 8;

// ---- means --------------------------------------------------------------------------------------

/// Waits until all pages are free: the kernel forgets the last files some time after their removal.
fn all_pages_come_back(pool: &Pool, pages: u64) {
    pool.wait_for_free_pages(pages);
    assert_eq!(pool.counter("pages_used"), 0);
    assert_eq!(pool.counter("pages_reserved"), 0);
    assert_eq!(pool.counter("quarantined_soft"), 0);
    pool.check();
}

fn made(path: &Path) -> File {
    File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .expect("a file can be made")
}

fn errno(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).expect("a system call's error")
}

// ---- everything at once -------------------------------------------------------------------------

/// The chores with their weights, and the errors that each may meet. ENOENT is always legal:
/// another thread may have removed the name.
const CHORES: &[(Chore, u64, &[Errno])] = &[
    (Chore::Create, 6, &[]),
    (Chore::Write, 12, &[Errno::NOSPC, Errno::IO, Errno::BUSY]),
    (Chore::Read, 8, &[Errno::IO]),
    (Chore::Map, 6, &[]),
    (Chore::MapElsewhere, 4, &[]),
    (Chore::Truncate, 6, &[Errno::NOSPC, Errno::BUSY]),
    (Chore::Allocate, 4, &[Errno::NOSPC, Errno::BUSY, Errno::IO]),
    (Chore::Punch, 4, &[Errno::BUSY, Errno::IO]),
    // EINVAL: the file has become shorter, or the page was released. EBUSY: another process holds
    // the folio at the moment.
    (Chore::Quarantine, 5, &[Errno::INVAL, Errno::BUSY]),
    (Chore::Repair, 6, &[Errno::NODATA, Errno::INVAL]),
    (Chore::Collapse, 3, &[Errno::INVAL, Errno::BUSY]),
    (Chore::Rename, 3, &[Errno::EXIST]),
    (Chore::Link, 2, &[Errno::EXIST]),
    (Chore::Unlink, 3, &[]),
    (Chore::Attributes, 3, &[Errno::NODATA]),
    (Chore::List, 2, &[]),
    (Chore::Seek, 3, &[Errno::NXIO]),
    (Chore::Look, 3, &[Errno::NODATA]),
    (Chore::Check, 1, &[]),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Chore {
    Create,
    Write,
    Read,
    Map,
    MapElsewhere,
    Truncate,
    Allocate,
    Punch,
    Quarantine,
    Repair,
    Collapse,
    Rename,
    Link,
    Unlink,
    Attributes,
    List,
    Seek,
    Look,
    Check,
}

/// One thread of the crowd.
struct Worker<'a> {
    pool: &'a Pool,
    number: u64,
    dice: Dice,
    toucher: Toucher,
}

type Outcome = Result<(), Errno>;

impl Worker<'_> {
    const FILES: u64 = 4;

    fn name(&mut self) -> PathBuf {
        self.pool.join(format!("file{}", self.dice.below(Self::FILES)))
    }

    fn choose(&mut self) -> (Chore, &'static [Errno]) {
        let mut left = self.dice.below(CHORES.iter().map(|row| row.1).sum());
        for (chore, weight, legal) in CHORES {
            if left < *weight {
                return (*chore, legal);
            }
            left -= weight;
        }
        unreachable!("the weights were summed up");
    }

    fn offset(&mut self) -> u64 {
        self.dice.below(3) * PAGE
            + [0, SUBPAGE, 3 * SUBPAGE + 5, PAGE - SUBPAGE][self.dice.below(4) as usize]
    }

    fn length(&mut self) -> u64 {
        [1, SUBPAGE, 3 * SUBPAGE, PAGE, 2 * PAGE][self.dice.below(5) as usize]
    }

    /// The mark of this thread: every byte of every file is 0 or the mark of a thread.
    fn byte(&self) -> u8 {
        self.number as u8 + 1
    }

    fn assert_known(&self, bytes: &[u8]) {
        let alien = bytes.iter().find(|byte| u64::from(**byte) > THREADS);
        assert_eq!(alien, None, "a byte that nobody wrote");
    }

    fn open(&mut self) -> Result<File, Errno> {
        let path = self.name();
        Ok(rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, rustix::fs::Mode::empty())?
            .into())
    }

    fn run(&mut self, chore: Chore) -> Outcome {
        let (offset, length) = (self.offset(), self.length());
        match chore {
            Chore::Create => {
                let path = self.name();
                let options = File::options()
                    .read(true)
                    .write(true)
                    .create(true)
                    .truncate(false)
                    .mode(0o600)
                    .open(path);
                options.map(drop).map_err(|error| errno(&error))
            }
            Chore::Write => {
                let bytes = vec![self.byte(); length.min(5 * SUBPAGE) as usize];
                rustix::io::pwrite(self.open()?, &bytes, offset).map(drop)
            }
            Chore::Read => {
                let mut bytes = vec![0; 3 * SUBPAGE as usize];
                let count = rustix::io::pread(self.open()?, &mut bytes[..], offset)?;
                self.assert_known(&bytes[..count]);
                Ok(())
            }
            Chore::Map => self.map(),
            Chore::MapElsewhere => self.map_elsewhere(),
            Chore::Truncate => rustix::fs::ftruncate(self.open()?, offset),
            Chore::Allocate => {
                let modes = [
                    FallocateFlags::empty(),
                    FallocateFlags::KEEP_SIZE,
                    FallocateFlags::ZERO_RANGE,
                ];
                let mode = modes[self.dice.below(3) as usize];
                rustix::fs::fallocate(self.open()?, mode, offset, length)
            }
            Chore::Punch => {
                let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                rustix::fs::fallocate(self.open()?, mode, offset, length)
            }
            Chore::Quarantine => poison(self.name(), offset, 1 + self.dice.below(3) * SUBPAGE),
            Chore::Repair => {
                let verb = ["zero", "salvage"][self.dice.below(2) as usize];
                set(self.name(), REPAIR, format!("{verb} all"))
            }
            Chore::Collapse => set(self.name(), COLLAPSE, "all"),
            Chore::Rename => {
                let (from, to) = (self.name(), self.name());
                let flags = [RenameFlags::empty(), RenameFlags::NOREPLACE, RenameFlags::EXCHANGE];
                rustix::fs::renameat_with(CWD, from, CWD, to, flags[self.dice.below(3) as usize])
            }
            Chore::Link => rustix::fs::linkat(CWD, self.name(), CWD, self.name(), AtFlags::empty()),
            Chore::Unlink => rustix::fs::unlink(self.name()),
            Chore::Attributes => {
                let (file, name) = (self.open()?, "user.colour");
                rustix::fs::fsetxattr(&file, name, &[self.byte()], XattrFlags::empty())?;
                let mut value = [0];
                rustix::fs::fgetxattr(&file, name, &mut value[..])?;
                self.assert_known(&value);
                rustix::fs::fremovexattr(&file, name)
            }
            Chore::List => {
                let entries = std::fs::read_dir(self.pool.path()).expect("the root can be read");
                let names =
                    entries.map(|entry| entry.expect("it can be read to the end").file_name());
                assert!(names.into_iter().all(|name| name.to_string_lossy().starts_with("file")));
                Ok(())
            }
            Chore::Seek => {
                let place =
                    [SeekFrom::Data(offset), SeekFrom::Hole(offset)][self.dice.below(2) as usize];
                rustix::fs::seek(self.open()?, place).map(drop)
            }
            Chore::Look => {
                let file = self.open()?;
                rustix::fs::fstat(&file)?;
                let mut value = vec![0; 64 << 10];
                rustix::fs::fgetxattr(&file, POISON, &mut value[..]).map(drop)
            }
            Chore::Check => {
                assert_eq!(get(self.pool.path(), CHECK), Ok(String::new()));
                Ok(())
            }
        }
    }

    /// A touch may meet SIGBUS at any time: other threads quarantine, punch and truncate.
    fn map(&mut self) -> Outcome {
        let mapping = Mapping::new(&self.open()?, Range::new(0, 3 * PAGE), Sharing::Shared, true);
        let mapping = mapping.expect("it can be mapped");
        for _ in 0..4 {
            let offset = self.offset();
            if let Ok(byte) = mapping.load(offset) {
                self.assert_known(&[byte]);
            }
            let _ = mapping.store(offset, self.byte());
        }
        Ok(())
    }

    fn map_elsewhere(&mut self) -> Outcome {
        let path = self.name();
        let answer = self.toucher.ask(&format!("map {} 0 {} shared rw", path.display(), 3 * PAGE));
        if answer.contains("(os error 2)") {
            return Err(Errno::NOENT);
        }
        assert_eq!(answer, "ok");
        for _ in 0..4 {
            let offset = self.offset();
            if let Some(byte) = self.toucher.load(offset) {
                self.assert_known(&[byte]);
            }
            self.toucher.store(offset, self.byte());
        }
        // Some files stay mapped until the next chore of this kind. They keep their pages even if a
        // thread unlinks them meanwhile.
        if self.dice.below(8) != 0 {
            assert_eq!(self.toucher.ask("unmap"), "ok");
        }
        Ok(())
    }
}

#[test]
fn eight_threads_that_do_everything_to_four_files_lose_nothing() {
    const PAGES: u64 = 8;
    const ROUNDS: u64 = 400;
    let pool = Pool::small(PAGES);
    thread::scope(|scope| {
        for number in 0..THREADS {
            let pool = &pool;
            scope.spawn(move || {
                let mut worker =
                    Worker { pool, number, dice: Dice(number), toucher: Toucher::start() };
                for round in 0..ROUNDS {
                    let (chore, legal) = worker.choose();
                    limits::note(format!("round {round}: {chore:?}"));
                    if let Err(errno) = worker.run(chore) {
                        let legal = errno == Errno::NOENT || legal.contains(&errno);
                        assert!(legal, "thread {number}, round {round}: {chore:?} failed: {errno}");
                    }
                }
                limits::note("end");
            });
        }
    });
    pool.check();
    for entry in std::fs::read_dir(pool.path()).unwrap() {
        std::fs::remove_file(entry.unwrap().path()).unwrap();
    }
    all_pages_come_back(&pool, PAGES);
    pool.unmount();
}

// ---- files that come and go ---------------------------------------------------------------------

/// Each thread has at most one page at a time, and the pool has a page for each thread. So no
/// thread is ever refused.
#[test]
fn the_page_of_a_removed_file_is_there_for_the_next_one() {
    const ROUNDS: u64 = 150;
    let pool = Pool::small(THREADS);
    thread::scope(|scope| {
        for number in 0..THREADS {
            let pool = &pool;
            scope.spawn(move || {
                for round in 0..ROUNDS {
                    limits::note(format!("round {round}"));
                    let path = pool.join(format!("{number}-{round}"));
                    let file = made(&path);
                    if round % 2 == 0 {
                        std::fs::remove_file(&path).unwrap();
                    }
                    let written = file.write_all_at(&[number as u8 + 1; 100], PAGE / 2);
                    written
                        .unwrap_or_else(|error| panic!("thread {number}, round {round}: {error}"));
                    let mut bytes = [0xff; 100];
                    file.read_exact_at(&mut bytes, 0).unwrap();
                    assert_eq!(bytes, [0; 100], "another file's bytes");
                    drop(file);
                    if round % 2 != 0 {
                        std::fs::remove_file(&path).unwrap();
                    }
                }
            });
        }
    });
    assert_eq!(std::fs::read_dir(pool.path()).unwrap().count(), 0);
    all_pages_come_back(&pool, THREADS);
    assert_eq!(pool.counter("objects"), 0);
    assert_eq!(pool.counter("orphans"), 0);
    assert_eq!(pool.counter("pages_orphaned"), 0);
    pool.unmount();
}

// ---- the last pages -----------------------------------------------------------------------------

#[test]
fn files_that_compete_never_have_more_pages_than_the_pool() {
    const PAGES: u64 = 8;
    const ROUNDS: u64 = 300;
    let pool = Pool::small(PAGES);
    // The pages that the threads certainly have. A thread adds pages after a growth and subtracts
    // them before a shrinking.
    let had = AtomicU64::new(0);
    let refusals = AtomicU64::new(0);
    thread::scope(|scope| {
        for number in 0..THREADS {
            let (pool, had, refusals) = (&pool, &had, &refusals);
            scope.spawn(move || {
                let mut dice = Dice(100 + number);
                let file = made(&pool.join(format!("file{number}")));
                let mut pages = 0;
                for round in 0..ROUNDS {
                    let wanted = dice.below(4);
                    limits::note(format!("round {round}: from {pages} to {wanted}"));
                    had.fetch_sub(pages - pages.min(wanted), Ordering::SeqCst);
                    match rustix::fs::ftruncate(&file, wanted * PAGE) {
                        Ok(()) => {
                            let sum = had.fetch_add(wanted - pages.min(wanted), Ordering::SeqCst);
                            assert!(
                                sum <= PAGES - (wanted - pages.min(wanted)),
                                "more pages than there are"
                            );
                            mark_new_pages(&file, pages, wanted, number as u8 + 1);
                            pages = wanted;
                        }
                        Err(errno) => {
                            assert_eq!(errno, Errno::NOSPC);
                            assert!(wanted > pages, "a file could not shrink");
                            assert_eq!(
                                file.metadata().unwrap().len(),
                                pages * PAGE,
                                "a refusal changed the size"
                            );
                            refusals.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                    for page in 0..pages {
                        let mut byte = [0];
                        file.read_exact_at(&mut byte, page * PAGE).unwrap();
                        assert_eq!(byte, [number as u8 + 1], "another file's page, or none");
                    }
                }
            });
        }
    });
    assert!(refusals.into_inner() > 0, "they did not compete");
    assert_eq!(pool.counter("pages_used"), had.into_inner());
    pool.check();
    for number in 0..THREADS {
        std::fs::remove_file(pool.join(format!("file{number}"))).unwrap();
    }
    all_pages_come_back(&pool, PAGES);
    pool.unmount();
}

/// Asserts that new pages are zeros, and marks them.
fn mark_new_pages(file: &File, before: u64, now: u64, byte: u8) {
    for page in before..now {
        let mut bytes = vec![0xff; PAGE as usize];
        file.read_exact_at(&mut bytes, page * PAGE).unwrap();
        assert!(bytes.iter().all(|byte| *byte == 0), "a new page holds old bytes");
        file.write_all_at(&[byte; 8], page * PAGE).unwrap();
    }
}

// ---- one file, two processes --------------------------------------------------------------------

#[test]
fn two_writers_of_disjoint_parts_lose_nothing() {
    const STRIPE: u64 = 10_000; // two stripes share a subpage, and sometimes a page
    const STRIPES: u64 = 4 * PAGE / STRIPE;
    let pool = Pool::small(4);
    let path = pool.join("file");
    made(&path);
    let start = Barrier::new(2);
    thread::scope(|scope| {
        for parity in 0..2 {
            let (path, start) = (&path, &start);
            scope.spawn(move || {
                let mut toucher = Toucher::start();
                start.wait();
                for stripe in (parity..STRIPES).step_by(2) {
                    limits::note(format!("stripe {stripe}"));
                    let line = format!(
                        "{} {} {STRIPE} {}",
                        path.display(),
                        stripe * STRIPE,
                        stripe % 250 + 1
                    );
                    assert_eq!(toucher.ask(&format!("pwrite {line}")), format!("count {STRIPE}"));
                }
            });
        }
    });
    let bytes = std::fs::read(&path).unwrap();
    assert_eq!(bytes.len() as u64, STRIPES * STRIPE);
    assert_stripes(&bytes, STRIPE, |stripe| (stripe % 250 + 1) as u8);
    // Now through mappings, for which no lock orders the two writers.
    thread::scope(|scope| {
        for parity in 0..2 {
            let path = &path;
            scope.spawn(move || {
                let mut toucher = Toucher::mapping(path, STRIPES * STRIPE);
                for stripe in (parity..STRIPES).step_by(2) {
                    let line = format!("fill {} {STRIPE} {}", stripe * STRIPE, stripe % 249 + 2);
                    assert_eq!(toucher.ask(&line), "ok");
                }
            });
        }
    });
    assert_stripes(&std::fs::read(&path).unwrap(), STRIPE, |stripe| (stripe % 249 + 2) as u8);
    pool.check();
    std::fs::remove_file(&path).unwrap();
    all_pages_come_back(&pool, 4);
    pool.unmount();
}

fn assert_stripes(bytes: &[u8], stripe: u64, byte: impl Fn(u64) -> u8) {
    for (n, part) in bytes.chunks(stripe as usize).enumerate() {
        let wrong = part.iter().position(|found| *found != byte(n as u64));
        assert_eq!(wrong, None, "stripe {n}");
    }
}

// ---- a pool that changes its size ---------------------------------------------------------------

#[test]
fn a_pool_resized_in_use_accounts_for_every_page_at_every_look() {
    const PAGES: u64 = 8;
    const RESIZES: u64 = 200;
    const WORKERS: u64 = 3;
    const MOST: u64 = 2; // most pages of one worker
    let pool = Pool::small(PAGES);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let (pool, done) = (&pool, &done);
        for number in 0..WORKERS {
            scope.spawn(move || {
                let mut dice = Dice(200 + number);
                let file = made(&pool.join(format!("file{number}")));
                while !done.load(Ordering::Relaxed) {
                    match rustix::fs::ftruncate(&file, dice.below(MOST + 1) * PAGE) {
                        Ok(()) | Err(Errno::NOSPC) => {}
                        Err(errno) => panic!("worker {number}: {errno}"),
                    }
                }
            });
        }
        let watcher = scope.spawn(move || {
            let mut looks = 0;
            while !done.load(Ordering::Relaxed) {
                let now = pool.counters();
                let [total, free, used, reserved] =
                    ["pages_total", "pages_free", "pages_used", "pages_reserved"]
                        .map(|name| now[name]);
                assert_eq!(total, free + used + reserved, "{now:?}");
                assert!(used <= WORKERS * MOST && (1..=12).contains(&total), "{now:?}");
                looks += 1;
            }
            looks
        });
        let resized =
            thread::Builder::new().spawn_scoped(scope, move || resize_at_random(pool, RESIZES));
        let resized = resized.expect("a thread").join();
        done.store(true, Ordering::Relaxed);
        assert!(watcher.join().expect("every look was right") > 0);
        let (grown, shrunk) = resized.expect("every resize was answered as it should be");
        assert!(grown > 0 && shrunk > 0, "the pool did not change: {grown}, {shrunk}");
    });
    pool.check();
    for number in 0..WORKERS {
        std::fs::remove_file(pool.join(format!("file{number}"))).unwrap();
    }
    set(pool.path(), SIZE, format!("{}", PAGES * PAGE)).unwrap();
    assert!(get(pool.path(), POOL).unwrap().contains(&format!("pages_total {PAGES}\n")));
    all_pages_come_back(&pool, PAGES);
    pool.unmount();
}

/// Returns the number of growths and of shrinkings. The pool may only refuse a shrinking, with
/// EBUSY, and then keeps its size.
fn resize_at_random(pool: &Pool, count: u64) -> (u64, u64) {
    let mut dice = Dice(300);
    let (mut grown, mut shrunk) = (0, 0);
    for round in 0..count {
        let before = pool.counter("pages_total");
        let wanted = 1 + dice.below(12);
        limits::note(format!("resize {round}: from {before} to {wanted}"));
        match set(pool.path(), SIZE, format!("{}", wanted * PAGE)) {
            Ok(()) => {
                assert_eq!(pool.counter("pages_total"), wanted);
                grown += u64::from(wanted > before);
                shrunk += u64::from(wanted < before);
            }
            Err(errno) => {
                assert_eq!(errno, Errno::BUSY);
                assert!(wanted < before, "a pool could not grow from {before} to {wanted}");
                assert_eq!(pool.counter("pages_total"), before);
            }
        }
    }
    (grown, shrunk)
}

/// A reader of the map shares the lock of a file, so an unlink cannot count the pages of the file
/// at once. They come back all the same, and the next file waits for them.
#[test]
fn pages_come_back_while_a_map_is_read() {
    const PAGES: u64 = 3;
    let pool = Pool::small(PAGES);
    let path = pool.join("file");
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                let _ = get(&path, MAP); // there may be no file just now
            }
        });
        let rounds = (0..300).try_for_each(|_| {
            let file = File::create(&path)?;
            file.set_len(PAGES * FOLIO)?;
            drop(file);
            std::fs::remove_file(&path)
        });
        is_over.store(true, Ordering::Relaxed);
        rounds.expect("the pages of the last file");
    });
    pool.unmount();
}
