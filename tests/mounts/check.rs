//! The check of a pool in use.

use crate::support::{Dice, FOLIO, Pool};
use rustix::fs::{FallocateFlags, fallocate};
use std::fs::{self, File};
use std::sync::atomic::{AtomicBool, Ordering};

const LOOKS: usize = 300;
const MOST_FOLIOS: u64 = 5;

/// Makes, sizes, punches and removes a file of its own until `stop` is set. A full pool refuses
/// some of these requests.
fn change_a_file(pool: &Pool, number: u64, stop: &AtomicBool) -> u64 {
    const PUNCH: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);
    let (path, mut random, mut changes) = (pool.join(format!("file{number}")), Dice(number + 1), 0);
    while !stop.load(Ordering::Relaxed) {
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .unwrap();
        let (offset, length) = (random.below(MOST_FOLIOS * FOLIO), 1 + random.below(2 * FOLIO));
        let _ = match random.below(5) {
            0 => fallocate(&file, PUNCH, offset, length),
            1 => fallocate(&file, FallocateFlags::KEEP_SIZE, offset, length),
            2 => fs::remove_file(&path)
                .map_err(|error| rustix::io::Errno::from_io_error(&error).unwrap()),
            _ => rustix::fs::ftruncate(&file, offset),
        };
        changes += 1;
    }
    changes
}

#[test]
fn a_check_finds_nothing_while_files_change() {
    let (pool, stop) = (Pool::small(16), AtomicBool::new(false));
    let changes: Vec<u64> = std::thread::scope(|scope| {
        let (pool, stop) = (&pool, &stop);
        let threads: Vec<_> =
            (0..4).map(|number| scope.spawn(move || change_a_file(pool, number, stop))).collect();
        (0..LOOKS).for_each(|_| pool.check());
        stop.store(true, Ordering::Relaxed);
        threads
            .into_iter()
            .map(|thread| thread.join().expect("no change fails but for space"))
            .collect()
    });
    println!("{LOOKS} looks beside {changes:?} changes");
    assert!(changes.iter().all(|count| *count > 0), "nothing changed meanwhile: {changes:?}");
    pool.check();
}
