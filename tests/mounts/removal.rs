//! Programs that punch a file without a request to the daemon, by madvise(2) with MADV_REMOVE.

use crate::support::sys::{Mapping, Sharing};
use crate::support::{FOLIO, Pool, REPAIR, SUBPAGE, Worker, poison, set};
use hugetlb2fs::units::Range;
use rustix::io::Errno;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const MADV_REMOVE: i32 = 9;

fn filled(pool: &Pool, size: u64) -> PathBuf {
    let file = pool.join("file");
    fs::write(&file, vec![7; size as usize]).unwrap();
    file
}

fn mapped(path: &Path, size: u64) -> Mapping {
    let file = File::options().read(true).write(true).open(path).unwrap();
    Mapping::new(&file, Range::new(0, size), Sharing::Shared, true).unwrap()
}

#[test]
fn what_a_removal_opens_is_shut_within_seconds() {
    const LIMIT: Duration = Duration::from_secs(10); // the patrol comes each second
    let pool = Pool::small(4);
    let path = filled(&pool, 2 * FOLIO);
    poison(&path, 0x5000, SUBPAGE).unwrap();
    let (mapping, file) = (mapped(&path, 2 * FOLIO), File::open(&path).unwrap());
    assert!(mapping.load(0x5000).is_err());
    mapping.advise_range(Range::at(FOLIO, SUBPAGE), MADV_REMOVE).unwrap();
    let removed = Instant::now();
    while mapping.store(0x5000, 9).is_ok() {
        assert!(removed.elapsed() < LIMIT, "the quarantined subpage can still be touched");
        std::thread::yield_now(); // not by a request, which would shut the hole
    }
    println!("shut {:?} after the removal", removed.elapsed());
    assert_eq!(mapping.load(FOLIO), Ok(0));
    let mut byte = [0];
    assert_eq!(
        file.read_at(&mut byte, 0x5000).unwrap_err().raw_os_error(),
        Some(Errno::IO.raw_os_error())
    );
    assert!(pool.log().contains("was filled in passing; it is shut again"));
    pool.check();
    set(&path, REPAIR, "salvage all").unwrap();
    assert_eq!(
        mapping.load(0x5000),
        Ok(7),
        "a store into an opened hole is lost, and nothing else"
    );
    pool.check();
}

#[test]
fn a_request_shuts_what_a_removal_has_opened() {
    let pool = Pool::small(4);
    let path = filled(&pool, 2 * FOLIO);
    poison(&path, 0x5000, SUBPAGE).unwrap();
    let (mapping, file) = (mapped(&path, 2 * FOLIO), File::open(&path).unwrap());
    for round in 0..100 {
        mapping.advise_range(Range::at(FOLIO, SUBPAGE), MADV_REMOVE).unwrap();
        let mut byte = [0];
        let read = file.read_at(&mut byte, 0x5000).unwrap_err();
        assert_eq!(read.raw_os_error(), Some(Errno::IO.raw_os_error()), "round {round}");
        assert!(
            mapping.store(0x5000, 9).is_err(),
            "round {round}: it can be touched after a request"
        );
    }
    pool.check();
}

#[test]
fn a_death_narrows_nothing_that_a_program_may_touch() {
    const FOLIOS: u64 = 16;
    const DEATHS: usize = 60;
    let pool = Pool::small(FOLIOS + 1);
    let path = filled(&pool, FOLIOS * FOLIO);
    let mapping = mapped(&path, FOLIOS * FOLIO);
    let (stop, touches, faults) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                mapping.advise_range(Range::new(0, FOLIOS * FOLIO), MADV_REMOVE).unwrap();
                for folio in 0..FOLIOS {
                    // Long enough that at some death, at any step of the next worker, a folio is
                    // empty.
                    let next = Instant::now() + Duration::from_micros(300);
                    while Instant::now() < next {
                        std::thread::yield_now();
                    }
                    let touched = mapping.load(folio * FOLIO);
                    touches.fetch_add(1, Ordering::Relaxed);
                    faults.fetch_add(u64::from(touched != Ok(0)), Ordering::Relaxed);
                }
            }
        });
        for _ in 0..DEATHS {
            Worker::of(&pool).kill();
        }
        stop.store(true, Ordering::Relaxed);
    });
    println!("{touches:?} touches, {faults:?} of them SIGBUS, {DEATHS} deaths");
    assert_eq!(faults.into_inner(), 0, "touches were SIGBUS");
    drop(mapping);
    pool.check();
}
