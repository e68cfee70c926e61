//! What others can do while a request that takes long is under way: nobody waits for it but those who need its outcome.
//!
//! A long request is stopped at one of its steps, so that it is under way for as long as a test wants. What is asked meanwhile is answered
//! before it goes on, or the test ends by the limit of its mount.

mod support;

use rustix::fs::{AtFlags, CWD, StatxFlags, statx};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use support::{FOLIO, Held, Pool, limits};

/// The file has the lock of its own, and its pages are reserved.
const ANNOUNCED: &str = "allocate: the size to come back to is noted";
/// The file and a reserve are locked.
const TAKEN: &str = "move out: the file has taken as much";

/// More than the threads that serve.
const MANY: usize = 10;
/// So much that a change of it is no matter of a moment.
const LONG: u64 = 4 * FOLIO;

fn small_file(pool: &Pool, name: &str) -> PathBuf {
    let path = pool.join(name);
    fs::write(&path, name).expect("there is room");
    path
}

/// As the filesystem tells it, not as the kernel remembers it.
fn size(path: &Path) -> u64 {
    statx(CWD, path, AtFlags::STATX_FORCE_SYNC, StatxFlags::SIZE).expect("it is there").stx_size
}

/// What another user does all the time.
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

/// Holds `MANY` growths at a step, and has `meanwhile` run beside them.
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
        limits::until(limits::ANSWER, "pages that are reserved", || pool.counter("pages_reserved") > 0);
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
            assert_eq!(size(path), path.file_name().unwrap().len() as u64, "the growth has yet to succeed");
            File::open(path).unwrap();
        }
        assert_eq!(fs::read_dir(pool.path()).unwrap().count(), MANY + 1);
    });
}
