//! The numbers by which the kernel knows the memory of files (FUSE passthrough). Each file has one
//! number. The worker closes it once and loses none.

use crate::support::sys::{Mapping, Sharing};
use crate::support::{DIE, FOLIO, Pool, SUBPAGE, get, kill_worker, limits, set};
use hugetlb2fs::sys::backing;
use hugetlb2fs::sys::process::descriptor_of;
use hugetlb2fs::units::Range;
use rustix::fs::{MemfdFlags, memfd_create};
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const THREADS: u64 = 8;

/// Returns /dev/fuse as the daemon has it open.
fn device(pool: &Pool) -> OwnedFd {
    let daemon = pool.daemon();
    let number = fs::read_dir(format!("/proc/{}/fd", daemon.pid))
        .unwrap()
        .map(Result::unwrap)
        .find(|entry| {
            fs::read_link(entry.path()).is_ok_and(|target| target == Path::new("/dev/fuse"))
        });
    let number = number.expect("the daemon has the device open").file_name();
    descriptor_of(daemon.process(), number.to_str().unwrap().parse().unwrap()).unwrap()
}

/// Returns the number that the kernel gives out next.
fn next_number(device: &OwnedFd) -> u32 {
    let file = memfd_create("a file", MemfdFlags::CLOEXEC).unwrap();
    let number = backing::open(device, file).unwrap();
    backing::close(device, number).unwrap();
    number
}

/// Returns the numbers that the kernel still knows. The call closes them.
fn open_numbers(device: &OwnedFd) -> Vec<u32> {
    (1..next_number(device)).filter(|number| backing::close(device, *number).is_ok()).collect()
}

/// Waits until the kernel has forgotten all removed files.
fn wait_for_the_end_of_files(pool: &Pool, pages: u64) {
    pool.wait_for_free_pages(pages);
    pool.wait_for_orphans();
}

/// Makes, uses and removes a file. A program maps and reads the bytes that it wrote.
fn live(path: &Path, word: u64) {
    let mut file = File::options().read(true).write(true).create_new(true).open(path).unwrap();
    if word.is_multiple_of(2) {
        drop(file); // the file keeps its number
        file = File::options().read(true).write(true).open(path).unwrap();
    }
    file.write_all_at(&u128::from(word).to_ne_bytes(), 0).unwrap();
    let mapping = Mapping::new(&file, Range::new(0, SUBPAGE), Sharing::Shared, true).unwrap();
    assert_eq!(mapping.load_word(0), word, "{} is mapped from another file", path.display());
    mapping.store_word(8, !word);
    let reader = File::open(path).unwrap();
    fs::remove_file(path).unwrap();
    let mut bytes = [0; 16];
    reader.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(u128::from_ne_bytes(bytes), u128::from(word) | u128::from(!word) << 64);
}

#[test]
fn each_file_is_mapped_from_its_own_memory() {
    const TIME: Duration = Duration::from_secs(4);
    let pool = Pool::mount(&format!("pagesize=2M,size={},io=native", 32 * FOLIO));
    let (end, is_over, lives) = (Instant::now() + TIME, AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        for number in 0..THREADS {
            let (pool, is_over, lives) = (&pool, &is_over, &lives);
            scope.spawn(move || {
                while !is_over.load(Ordering::Relaxed) {
                    let life = lives.fetch_add(1, Ordering::Relaxed);
                    live(&pool.join(format!("file-{number}-{life}")), life << 8 | number);
                }
            });
        }
        while Instant::now() < end {
            // The files live for a while under each worker.
            thread::sleep(Duration::from_millis(40));
            kill_worker(&pool);
        }
        is_over.store(true, Ordering::Relaxed);
    });
    wait_for_the_end_of_files(&pool, 32);
    kill_worker(&pool);
    let log = pool.log();
    println!("{} files", lives.load(Ordering::Relaxed));
    println!(
        "lines about numbers: {}",
        log.lines().filter(|line| line.contains("backing")).count()
    );
    pool.check(); // the next worker serves, so the losses of the dead one are known now
    let device = device(&pool);
    assert_eq!(
        open_numbers(&device),
        [0; 0],
        "no file is left, and the kernel still knows numbers"
    );
    assert!(!log.contains("Failed to close backing"), "{log}");
    drop(device);
    pool.unmount();
}

/// Makes and removes files until the worker dies at `step`.
fn die_at(pool: &Pool, step: &str) {
    let worker = pool.counter("worker_pid");
    set(pool.path(), DIE, format!("1 {step}")).unwrap();
    limits::until(limits::ANSWER, &format!("a death at {step:?}"), || {
        File::create_new(pool.join("file")).unwrap();
        fs::remove_file(pool.join("file")).unwrap();
        pool.counter("worker_pid") != worker
    });
}

#[test]
fn a_death_with_a_number_in_hand_loses_none() {
    let pool = Pool::small(1);
    let keeper = File::create_new(pool.join("keeper")).unwrap();
    let steps = get(pool.path(), DIE).expect("a worker that was built for tests");
    let steps: Vec<&str> = steps.lines().filter(|step| step.starts_with("number: ")).collect();
    assert_eq!(steps.len(), 3);
    for step in steps {
        die_at(&pool, step);
        wait_for_the_end_of_files(&pool, 1);
    }
    File::open(pool.join("keeper")).expect("the number of a file that is there stays");
    drop(keeper);
    fs::remove_file(pool.join("keeper")).unwrap();
    wait_for_the_end_of_files(&pool, 1);
    let device = device(&pool);
    assert_eq!(
        open_numbers(&device),
        [0; 0],
        "no file is left, and the kernel still knows numbers"
    );
    assert!(!pool.log().contains("the kernel keeps"), "{}", pool.log());
    drop(device);
    pool.unmount();
}
