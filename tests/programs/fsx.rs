//! fsx reads and writes by system calls and through mappings, truncates, punches and copies. It
//! compares each read with the expected bytes.

use crate::support::{FOLIO, POISON, Pool, REPAIR, SUBPAGE, get, poison, set};
use crate::{at_length, installed, said, tests};
use rustix::process::{Pid, Signal, kill_process};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

tests!(
    fsx_finds_every_byte_where_it_must_be,
    fsx_does_not_notice_deaths_of_the_worker,
    fsx_does_not_notice_quarantines_and_repairs_beside_it,
);

/// Less than a page, so that no punch releases a page: a mapping of a released page is SIGBUS.
const LENGTH: u64 = 1_900_000;

/// The weights of operations. sendfile is left out: it does not see later stores through a mapping
/// (docs/SEMANTICS.md, limits).
const WEIGHTS: &str = "
[opsize]
max = 200000
[weights]
invalidate = 1
mapread = 10
mapwrite = 10
read = 10
write = 10
fsync = 1
fdatasync = 1
posix_fadvise = 1
copy_file_range = 3
";
/// Operations that change sizes and take memory, and operations that only make sense with these.
const RESIZING: &str = "close_open = 1\ntruncate = 3\nposix_fallocate = 2\npunch_hole = 3\n";

fn fsx(file: &Path, settings: &str, operations: u64, seed: u64) {
    let work = tempfile::tempdir().unwrap();
    let configuration = work.path().join("fsx.toml");
    std::fs::write(&configuration, settings).unwrap();
    let mut command = Command::new(installed("fsx"));
    command.arg("-f").arg(&configuration).arg("-P").arg(work.path());
    command.args(["-N", &operations.to_string(), "-S", &seed.to_string()]).arg(file);
    let text = said(&mut command);
    println!(
        "fsx  seed {seed}, {operations} operations: {}",
        text.lines().last().unwrap_or_default()
    );
}

/// Sets the flag at its drop, also after a panic: another thread works until then.
struct SetAtEnd<'a>(&'a AtomicBool);

impl Drop for SetAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn resizing() -> String {
    format!("flen = {LENGTH}\n{WEIGHTS}{RESIZING}")
}

fn fsx_finds_every_byte_where_it_must_be() {
    for pool in [Pool::small(4), Pool::gigantic(1)] {
        for seed in 1..=at_length(25) + 1 {
            fsx(&pool.join("file"), &resizing(), 20_000, seed);
        }
        pool.check();
        pool.unmount();
    }
}

fn fsx_does_not_notice_deaths_of_the_worker() {
    let pool = Pool::small(4);
    let stop = AtomicBool::new(false);
    let deaths = std::thread::scope(|scope| {
        let killer = scope.spawn(|| {
            let mut deaths = 0;
            while !stop.load(Ordering::Relaxed) {
                let worker = Pid::from_raw(pool.counter("worker_pid") as i32).unwrap();
                kill_process(worker, Signal::KILL).unwrap();
                deaths += 1;
                // About five deaths a second, at any moment of fsx's work.
                std::thread::sleep(Duration::from_millis(200));
            }
            deaths
        });
        let end = SetAtEnd(&stop);
        fsx(&pool.join("file"), &resizing(), 20_000 * at_length(10), 77);
        drop(end);
        killer.join().unwrap()
    });
    println!("fsx  with {deaths} deaths of the worker");
    assert!(deaths > 1);
    pool.check();
    pool.unmount();
}

fn fsx_does_not_notice_quarantines_and_repairs_beside_it() {
    let pool = Pool::small(4);
    let path = pool.join("file");
    // fsx changes neither the size nor any byte behind its length.
    std::fs::write(&path, vec![0; 2 * FOLIO as usize]).unwrap();
    let settings =
        format!("flen = {LENGTH}\nblockmode = true\nnosizechecks = true\n{WEIGHTS}truncate = 0\n");
    let stop = AtomicBool::new(false);
    let quarantines = std::thread::scope(|scope| {
        let other = scope.spawn(|| {
            let mut round = 0;
            while !stop.load(Ordering::Relaxed) {
                // In a folio that fsx uses, and in a folio that it does not use.
                for place in [FOLIO - SUBPAGE * (1 + round % 40), FOLIO + SUBPAGE * (round % 512)] {
                    poison(&path, place, SUBPAGE).unwrap();
                }
                assert!(get(&path, POISON).is_ok());
                set(&path, REPAIR, "salvage all").unwrap();
                round += 1;
            }
            2 * round
        });
        let end = SetAtEnd(&stop);
        fsx(&path, &settings, 20_000 * at_length(10), 5);
        drop(end);
        other.join().unwrap()
    });
    println!("fsx  beside {quarantines} quarantines and repairs");
    assert!(quarantines > 2);
    pool.check();
    pool.unmount();
}
