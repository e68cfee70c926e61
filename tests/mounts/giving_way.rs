//! Other requests do not wait for a long request, unless they need its outcome.
//!
//! A test stops a long request at one of its steps, so that the request is under way for as long as
//! the test wants. The daemon answers other requests before the test lets the long one go on. If it
//! does not, the limit of the mount ends the test.

use crate::support::{FOLIO, Held, POISON, Pool, REPAIR, get, hugetlb2, limits, set};
use rustix::fs::{AtFlags, CWD, StatxFlags, statx};
use rustix::process::Pid;
use rustix::thread::sched_getaffinity;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// The file's own lock is held, and its pages are reserved.
const ANNOUNCED: &str = "allocate: the size to come back to is noted";
/// The file and a reserve are locked.
const TAKEN: &str = "move out: the file has taken as much";

/// A folio is quarantined, and its file is locked.
const QUARANTINED: &str = "quarantine: no block is free";

/// The time after which the worker looks at a caller again (src/fs/pace.rs).
const BETWEEN_LOOKS: Duration = Duration::from_millis(10);

/// More than the threads that serve.
const MANY: usize = 10;
/// Bytes whose change takes some time.
const LONG: u64 = 4 * FOLIO;

fn small_file(pool: &Pool, name: &str) -> PathBuf {
    let path = pool.join(name);
    fs::write(&path, name).expect("there is room");
    path
}

/// The size that the filesystem answers, not the one that the kernel remembers.
fn size(path: &Path) -> u64 {
    statx(CWD, path, AtFlags::STATX_FORCE_SYNC, StatxFlags::SIZE).expect("it is there").stx_size
}

/// Makes the calls that another user makes all the time.
fn live_on(pool: &Pool, round: usize) {
    let directory = pool.join(format!("directory-{round}"));
    fs::create_dir(&directory).unwrap();
    fs::write(directory.join("new"), "").unwrap();
    let mut byte = [0];
    File::open(pool.join("other")).unwrap().read_exact_at(&mut byte, 0).unwrap();
    assert_eq!(byte, *b"o");
    fs::rename(directory.join("new"), directory.join("old")).unwrap();
    fs::remove_file(directory.join("old")).unwrap();
    fs::remove_dir(&directory).unwrap();
    assert_eq!(pool.counter("pages_orphaned"), 0);
}

/// Holds `MANY` growths at a step, and runs `meanwhile` beside them.
fn beside_growths(step: &str, meanwhile: impl FnOnce(&Pool, &[PathBuf])) {
    let pool = Pool::small(64);
    small_file(&pool, "other");
    let files: Vec<_> = (0..MANY).map(|n| small_file(&pool, &format!("file-{n}"))).collect();
    let ended = AtomicUsize::new(0);
    thread::scope(|scope| {
        let held = Held::at(&pool, step);
        for path in &files {
            let ended = &ended;
            scope.spawn(move || {
                File::options().write(true).open(path).unwrap().set_len(LONG).unwrap();
                ended.fetch_add(1, Ordering::SeqCst);
            });
        }
        limits::until(limits::ANSWER, "pages that are reserved", || {
            pool.counter("pages_reserved") > 0
        });
        meanwhile(&pool, &files);
        assert_eq!(ended.load(Ordering::SeqCst), 0, "the growths are under way");
        drop(held);
    });
    assert!(files.iter().all(|path| size(path) == LONG));
    pool.check();
    files.iter().for_each(|path| fs::remove_file(path).unwrap());
    pool.unmount();
}

#[test]
fn nobody_waits_for_the_growth_of_other_files() {
    for step in [ANNOUNCED, TAKEN] {
        beside_growths(step, |pool, _| (0..MANY).for_each(|round| live_on(pool, round)));
    }
}

#[test]
fn a_file_that_grows_can_be_looked_at_opened_and_listed() {
    beside_growths(TAKEN, |pool, files| {
        for path in files {
            assert_eq!(
                size(path),
                path.file_name().unwrap().len() as u64,
                "the growth has yet to succeed"
            );
            File::open(path).unwrap();
        }
        assert_eq!(fs::read_dir(pool.path()).unwrap().count(), MANY + 1);
    });
}

/// Runs `command`, holds its request at `step`, and kills the command meanwhile.
fn kill_at(pool: &Pool, step: &str, command: &mut Command) {
    let held = Held::at(pool, step);
    let mut caller = command.spawn().unwrap();
    held.await_stop();
    let stopped = Instant::now();
    caller.kill().unwrap();
    // The request has begun before that.
    thread::sleep(BETWEEN_LOOKS.saturating_sub(stopped.elapsed()));
    drop(held);
    let status = limits::exit(limits::ANSWER, "the end of a caller that was killed", &mut caller);
    assert!(!status.success(), "{status}");
}

#[test]
fn a_growth_whose_caller_is_killed_is_undone() {
    let pool = Pool::small(64);
    let (path, free) = (small_file(&pool, "file"), pool.free_pages());
    kill_at(&pool, TAKEN, Command::new("truncate").arg("-s100M").arg(&path));
    assert_eq!(size(&path), "file".len() as u64);
    assert_eq!(pool.free_pages(), free);
    assert_eq!(fs::read(&path).unwrap(), b"file");
    pool.check();
    pool.unmount();
}

#[test]
fn a_quarantine_whose_caller_is_killed_ends_early() {
    let pool = Pool::small(16);
    let path = pool.join("file");
    File::create(&path).unwrap().set_len(8 * FOLIO).unwrap();
    kill_at(&pool, QUARANTINED, hugetlb2().arg("poison").arg(&path).args(["0", "16777216"]));
    let quarantined = get(&path, POISON).unwrap();
    assert!(quarantined.starts_with("0x0 0x200000 soft "), "{quarantined}");
    set(&path, REPAIR, "zero all").unwrap();
    pool.check();
    pool.unmount();
}

#[test]
fn nobody_waits_for_a_check() {
    let pool = Pool::small(64);
    small_file(&pool, "other");
    let path = small_file(&pool, "file");
    let ended = AtomicUsize::new(0);
    thread::scope(|scope| {
        let held = Held::at(&pool, TAKEN);
        scope.spawn(|| File::options().write(true).open(&path).unwrap().set_len(LONG).unwrap());
        held.await_stop();
        let check = scope.spawn(|| {
            pool.check(); // the check waits for a piece of the growth
            ended.fetch_add(1, Ordering::SeqCst);
        });
        (0..MANY).for_each(|round| live_on(&pool, round));
        assert_eq!(ended.load(Ordering::SeqCst), 0, "the check is under way");
        drop(held);
        check.join().unwrap();
    });
    pool.unmount();
}

/// A number from the worker's /proc/PID/status.
fn status(pool: &Pool, name: &str) -> usize {
    let text = fs::read_to_string(format!("/proc/{}/status", pool.counter("worker_pid"))).unwrap();
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap();
    value.split_ascii_whitespace().next().unwrap().parse().unwrap()
}

/// Files of a page each. They have no name any more.
fn unlinked(pool: &Pool, count: usize) -> Vec<File> {
    let path = pool.join("unlinked");
    let one = |_| {
        let file = File::create(&path).unwrap();
        file.set_len(FOLIO).unwrap();
        fs::remove_file(&path).unwrap();
        file
    };
    (0..count).map(one).collect()
}

#[test]
fn writers_that_wait_for_pages_are_bounded() {
    const PAGES: usize = 64;
    const WRITERS: usize = 200;
    const MOST_OF_USER: usize = 64; // src/fuse/jobs.rs
    const MOST_KIB: usize = 32 << 10; // the bytes that are kept, and the memory of the threads
    let pool = Pool::small(PAGES as u64);
    let (threads, memory) = (status(&pool, "Threads"), status(&pool, "VmRSS"));
    let files: Vec<_> =
        (0..WRITERS).map(|n| File::create(pool.join(n.to_string())).unwrap()).collect();
    let mut coming = unlinked(&pool, PAGES);
    let (written, refused) = (AtomicUsize::new(0), AtomicUsize::new(0));
    thread::scope(|scope| {
        for file in &files {
            scope.spawn(|| match file.write_at(&[7; 256 << 10], 0) {
                Ok(_) => written.fetch_add(1, Ordering::SeqCst),
                Err(error) => {
                    assert_eq!(error.raw_os_error(), Some(28), "ENOSPC, not {error}");
                    refused.fetch_add(1, Ordering::SeqCst)
                }
            });
        }
        let (mut most, mut largest) = (0, 0);
        limits::until(limits::ANSWER, "writers that have an answer", || {
            (most, largest) =
                (most.max(status(&pool, "Threads")), largest.max(status(&pool, "VmRSS")));
            let has_refused = refused.load(Ordering::SeqCst) > 0;
            if has_refused {
                coming.pop(); // the page of this file comes back
            }
            written.load(Ordering::SeqCst) + refused.load(Ordering::SeqCst) == WRITERS
        });
        println!("{threads} threads, then {most}; {memory} KiB, then {largest}");
        assert!(most > threads, "some have waited");
        let bound = threads + MOST_OF_USER + WRITERS / 8; // threads end after their place is free
        assert!(most <= bound && largest < memory + MOST_KIB, "{most}, {largest} KiB");
    });
    println!("{written:?} have written, {refused:?} were refused");
    assert!(written.into_inner() > 0);
    drop((coming, files));
    pool.wait_for_orphans();
    pool.check();
    pool.unmount();
}

/// The worker's threads whose names begin with `name`.
fn threads(pool: &Pool, name: &str) -> Vec<Pid> {
    let threads = fs::read_dir(format!("/proc/{}/task", pool.counter("worker_pid"))).unwrap();
    let threads = threads.map(|thread| thread.unwrap().path());
    let named =
        threads.filter(|thread| fs::read_to_string(thread.join("comm")).unwrap().starts_with(name));
    let id = |thread: PathBuf| thread.file_name()?.to_str()?.parse().ok().and_then(Pid::from_raw);
    named.map(|thread| id(thread).expect("a thread's id")).collect()
}

#[test]
fn long_work_leaves_a_processor_to_the_threads_that_serve() {
    let pool = Pool::small(4);
    let processors = |thread: &Pid| sched_getaffinity(Some(*thread)).unwrap().count();
    let serving = threads(&pool, "fuser-");
    let all = processors(&serving[0]);
    assert!(serving.iter().all(|thread| processors(thread) == all));
    let long: Vec<_> =
        ["job-", "collapse", "patrol"].iter().flat_map(|name| threads(&pool, name)).collect();
    assert!(long.len() > serving.len());
    limits::until(limits::ANSWER, "threads that have found their processors", || {
        long.iter().all(|thread| processors(thread) == (all - 1).max(1))
    });
    pool.unmount();
}

#[test]
fn each_thread_has_a_heap_that_need_not_grow() {
    // Glibc's heaps begin at multiples of this, except the first thread's.
    const HEAP_GRAIN: usize = 64 << 20;
    const LONG: usize = 1 << 20;
    let pool = Pool::small(4);
    let count = threads(&pool, "fuser-").len() + threads(&pool, "job-").len();
    let maps = format!("/proc/{}/maps", pool.counter("worker_pid"));
    let is_heap = |line: &str| {
        let (range, rest) = line.split_once(' ').unwrap();
        let (start, end) = range.split_once('-').unwrap();
        let [start, end] = [start, end].map(|address| usize::from_str_radix(address, 16).unwrap());
        rest.starts_with("rw-p") && start.is_multiple_of(HEAP_GRAIN) && end - start > LONG
    };
    limits::until(limits::ANSWER, "a heap for each thread", || {
        fs::read_to_string(&maps).unwrap().lines().filter(|line| is_heap(line)).count() >= count
    });
    pool.unmount();
}
