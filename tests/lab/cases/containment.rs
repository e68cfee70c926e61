//! Memory errors outside of programs' bytes, at bad moments, and beside a worker's death.

use super::cases;
use super::hw::{INJECT, inject, listed};
use crate::support::sys::{Mapping, Sharing};
use crate::support::{
    COLLAPSE, FOLIO, MAP, POISON, Pool, REPAIR, SIZE as SIZE_OF_POOL, SUBPAGE, Toucher, get,
    kill_worker, limits, poison, set,
};
use hugetlb2fs::units::Range;
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

cases! {
    SMALL:
        an_error_in_free_memory_is_replaced_and_never_handed_out,
        an_error_in_the_ledger_loses_what_was_kept_and_opens_no_hole,
        an_error_in_a_pinned_folio_is_contained_as_the_kernel_can,
        an_error_beside_memory_that_a_program_removed_stays_alone,
        errors_beside_gaps_fill_no_gap_and_are_repaired,
        a_resize_keeps_or_discards_errors_with_their_place,
        errors_that_arrive_during_a_repair_are_repaired_later,
        every_request_survives_memory_errors_under_it,
        the_next_worker_finds_errors_of_the_time_without_one,
        a_worker_starts_in_spite_of_errors_and_removed_memory,
        errors_are_known_to_the_next_worker_with_their_times,
        a_worker_that_the_oom_killer_takes_is_replaced,
        the_patrol_costs_next_to_nothing_at_rest;
}

const BAD: u64 = FOLIO + 5 * SUBPAGE;
const SIZE: u64 = 2 * FOLIO;

fn pool(pages: u64) -> Pool {
    Pool::mount(&format!("pagesize=2M,collapse=off,size={}", pages * FOLIO))
}

fn sevens(pool: &Pool) -> PathBuf {
    let path = pool.join("file");
    fs::write(&path, vec![7; SIZE as usize]).unwrap();
    path
}

/// A file of the daemon, by way of the daemon's root.
fn inside(pool: &Pool, path: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{}/root/{path}", pool.daemon().pid))
}

/// Makes a memory error in any file.
fn strike(path: &Path, offset: u64) {
    try_to_strike(path, offset).unwrap();
}

/// Tries to make a memory error. The kernel may fail if another process holds the page at that
/// instant.
fn try_to_strike(path: &Path, offset: u64) -> hugetlb2fs::error::Result<()> {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let folio = Range::at(offset, 1).folios_out();
    let length = file.metadata().unwrap().len();
    let range = Range::new(folio.start, folio.end.min(length.next_multiple_of(SUBPAGE)));
    let mapping = Mapping::new(&file, range, Sharing::Shared, true).unwrap();
    mapping.load(offset).expect("it is healthy");
    mapping.advise_range(Range::at(offset, SUBPAGE), libc::MADV_HWPOISON)
}

fn wait_until(what: &str, holds: impl FnMut() -> bool) {
    limits::until(limits::ANSWER, what, holds);
}

// ---- where no program's bytes are ---------------------------------------------------------------

fn an_error_in_free_memory_is_replaced_and_never_handed_out() {
    let pool = pool(4);
    let reserve = inside(&pool, "reserve/0/data");
    for offset in [0, BAD, 4 * FOLIO - SUBPAGE] {
        strike(&reserve, offset);
    }
    wait_until("the patrol replaces them", || {
        pool.log().contains("free subpages of the pool replaced")
    });
    pool.check();
    let path = pool.join("file");
    fs::write(&path, vec![7; 4 * FOLIO as usize]).unwrap();
    let mut toucher = Toucher::mapping(&path, 4 * FOLIO);
    assert!(toucher.walk().is_empty());
    assert_eq!(listed(&path), [""; 0]);
    drop(toucher);
    // Now with an error that the patrol has not found yet.
    fs::remove_file(&path).unwrap();
    wait_until("the pages are back", || pool.free_pages() == 4);
    strike(&reserve, BAD);
    fs::write(&path, vec![8; 4 * FOLIO as usize]).unwrap();
    let mut toucher = Toucher::mapping(&path, 4 * FOLIO);
    assert!(toucher.walk().is_empty());
    pool.check();
    drop(toucher);
    pool.unmount();
}

fn object_of(pool: &Pool) -> PathBuf {
    let mut objects = fs::read_dir(inside(pool, "objects")).unwrap();
    objects.next().expect("one object").unwrap().path()
}

fn an_error_in_the_ledger_loses_what_was_kept_and_opens_no_hole() {
    let pool = pool(4);
    let path = sevens(&pool);
    let mut toucher = Toucher::mapping(&path, SIZE);
    assert!(toucher.walk().is_empty());
    poison(&path, BAD, 2 * SUBPAGE).unwrap();
    // The ledger's copy of the first of the two.
    strike(&object_of(&pool).join("ledger"), FOLIO + BAD);
    assert_eq!(toucher.walk(), [BAD, BAD + SUBPAGE]);
    pool.check();
    kill_worker(&pool);
    assert_eq!(toucher.walk(), [BAD, BAD + SUBPAGE], "nor in the hands of another worker");
    pool.check();
    assert_eq!(set(&path, REPAIR, format!("salvage {BAD} {SUBPAGE}")), Err(Errno::NODATA));
    pool.await_log("a memory error has hit the ledger");
    set(&path, REPAIR, "salvage all").unwrap();
    assert!(toucher.walk().is_empty());
    assert_eq!(toucher.load(BAD), Some(0), "what is not known is zeros, as was asked for");
    assert_eq!(toucher.load(BAD + SUBPAGE), Some(7));
    pool.check();
    poison(&path, BAD, 2 * SUBPAGE).unwrap();
    set(&path, REPAIR, "salvage all").unwrap();
    assert_eq!(toucher.load(BAD + SUBPAGE), Some(7), "the ledger has a healthy page");
    pool.check();
    drop(toucher);
    pool.unmount();
}

// ---- at bad moments -----------------------------------------------------------------------------

fn an_error_in_a_pinned_folio_is_contained_as_the_kernel_can() {
    for pin in ["pin", "pin-for-io"] {
        contain_in_a_folio_with(pin);
    }
}

fn contain_in_a_folio_with(pin: &str) {
    let pool = pool(4);
    let path = sevens(&pool);
    let mut pinner = Toucher::mapping(&path, SIZE);
    assert!(pinner.walk().is_empty());
    assert_eq!(pinner.ask(&format!("{pin} {FOLIO}")), "ok");
    inject(&path, BAD);
    let mut other = Toucher::mapping(&path, SIZE);
    let file = File::open(&path).unwrap();
    let lost = |at: &u64| file.read_at(&mut [0], *at).is_err();
    assert_eq!((0..SIZE).step_by(SUBPAGE as usize).filter(lost).collect::<Vec<_>>(), [BAD]);
    assert_eq!(listed(&path), [format!("{BAD:#x} 0x1000 hw")]);
    assert_eq!(other.walk(), [BAD]);
    pool.check();
    assert_eq!(set(&path, REPAIR, "zero all"), Err(Errno::BUSY));
    assert_eq!(listed(&path), [format!("{BAD:#x} 0x1000 hw")]);
    assert_eq!(other.walk(), [BAD]);
    pool.check();
    assert_eq!(pinner.ask("unpin"), "ok");
    set(&path, REPAIR, "zero all").unwrap();
    set(&path, COLLAPSE, "all").unwrap();
    assert!(other.walk().is_empty());
    assert_eq!(other.load(BAD), Some(0));
    assert_eq!(other.load(BAD - 1), Some(7));
    pool.check();
    drop((pinner, other, file));
    pool.unmount();
}

fn an_error_beside_memory_that_a_program_removed_stays_alone() {
    const MADV_REMOVE: i32 = 9;
    let pool = pool(4);
    let path = sevens(&pool);
    let mut toucher = Toucher::mapping(&path, SIZE);
    assert!(toucher.walk().is_empty());
    inject(&path, BAD);
    assert_eq!(toucher.ask(&format!("advise {} {SUBPAGE} {MADV_REMOVE}", BAD + 3 * SUBPAGE)), "ok");
    let file = File::options().write(true).open(&path).unwrap();
    file.write_all_at(&[1; 10], BAD + 7 * SUBPAGE).unwrap(); // takes the memory back
    pool.check();
    assert_eq!(toucher.walk(), [BAD]);
    assert_eq!(toucher.load(BAD + 3 * SUBPAGE), Some(0));
    set(&path, REPAIR, "zero all").unwrap();
    assert!(toucher.walk().is_empty());
    pool.check();
    drop((toucher, file));
    pool.unmount();
}

/// A search for errors, another worker, a repair and a punch leave the gaps empty.
fn errors_beside_gaps_fill_no_gap_and_are_repaired() {
    const OTHER: u64 = BAD + 2 * SUBPAGE;
    const GAP: u64 = BAD + 8 * SUBPAGE;
    let pool = Pool::mount(&format!("pagesize=2M,size={},punch=keep", 4 * FOLIO));
    let path = sevens(&pool);
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let keep = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let is_missing = |range: &str| get(&path, MAP).unwrap().contains(&format!("{range} punched -"));
    let mut victim = Toucher::mapping(&path, SIZE);
    assert!(victim.walk().is_empty());
    fallocate(&file, keep, 0, FOLIO).unwrap();
    fallocate(&file, keep, GAP, 4 * SUBPAGE).unwrap();
    let all_missing = || is_missing("0x0 0x200000") && is_missing("0x20d000 0x4000");
    assert_eq!(victim.ask(&format!("advise {BAD} {SUBPAGE} {}", libc::MADV_HWPOISON)), "ok");
    inject(&path, OTHER);
    let both = [BAD, OTHER].map(|offset| format!("{offset:#x} 0x1000 hw"));
    assert_eq!(listed(&path), both);
    assert!(all_missing(), "{}", get(&path, MAP).unwrap());
    kill_worker(&pool);
    assert_eq!(listed(&path), both);
    pool.check();
    set(&path, REPAIR, format!("zero {BAD} 1")).unwrap();
    set(&path, COLLAPSE, "all").unwrap();
    fallocate(&file, keep, OTHER, SUBPAGE).unwrap();
    assert_eq!(listed(&path), [""; 0]);
    assert!(all_missing() && is_missing("0x207000 0x1000"), "{}", get(&path, MAP).unwrap());
    // The other process keeps the kernel's mark of the errors.
    let mut toucher = Toucher::mapping(&path, SIZE);
    assert_eq!((toucher.load(BAD), toucher.load(OTHER)), (Some(0), Some(0)));
    assert_eq!((toucher.load(GAP), toucher.load(BAD + SUBPAGE)), (Some(0), Some(7)));
    assert!(toucher.walk().is_empty());
    pool.check();
    drop((toucher, victim, file));
    pool.unmount();
}

fn a_resize_keeps_or_discards_errors_with_their_place() {
    let pool = pool(16);
    let path = sevens(&pool);
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let mut rounds = 0;
    std::thread::scope(|scope| {
        let striker = scope.spawn(|| {
            for round in 0..12 {
                let place = (round * 37 % 512) * SUBPAGE;
                match set(&path, INJECT, format!("hw {place}")) {
                    Ok(()) | Err(Errno::INVAL) => {} // EINVAL: the error is there already
                    Err(errno) => panic!("{errno}"),
                }
            }
        });
        while !striker.is_finished() || rounds < 20 {
            file.set_len(FOLIO + 5000).unwrap();
            file.set_len(12 * FOLIO).unwrap();
            let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(&file, punch, 2 * FOLIO, 3 * FOLIO).unwrap();
            fallocate(&file, FallocateFlags::empty(), 0, 12 * FOLIO).unwrap();
            rounds += 1;
        }
    });
    assert_eq!(
        listed(&path).iter().filter(|line| line.ends_with("hw")).count(),
        listed(&path).len()
    );
    let mut toucher = Toucher::mapping(&path, 12 * FOLIO);
    let lost = toucher.walk();
    assert_eq!(lost.len(), 12, "those of the first folio, which was never given back");
    assert!(lost.iter().all(|offset| *offset < FOLIO));
    pool.check();
    set(&path, REPAIR, "zero all").unwrap();
    set(&path, COLLAPSE, "all").unwrap();
    assert!(toucher.walk().is_empty());
    pool.check();
    drop((toucher, file));
    pool.unmount();
}

/// The errors hit at any instruction of a repair, and the filesystem is not told of them.
fn errors_that_arrive_during_a_repair_are_repaired_later() {
    const ERRORS: u64 = 40;
    let pool = pool(4);
    let path = sevens(&pool);
    let worker = pool.counter("worker_pid");
    let repair = || match set(&path, REPAIR, "zero all") {
        Ok(()) => true,
        Err(Errno::NODATA) => false, // there is no error at the moment
        Err(errno) => panic!("{errno}: {}", pool.log()),
    };
    let place = |n: u64| FOLIO + n * 3 * SUBPAGE;
    let mut repairs = 0;
    let struck: Vec<bool> = std::thread::scope(|scope| {
        let all = || (0..ERRORS).map(|n| try_to_strike(&path, place(n)).is_ok()).collect();
        let striker = scope.spawn(all);
        while !striker.is_finished() {
            repairs += u64::from(repair());
        }
        striker.join().unwrap()
    });
    repairs += u64::from(repair());
    let certain = struck.iter().filter(|struck| **struck).count();
    println!("{certain} of {ERRORS} errors as the kernel says, {repairs} repairs that found some");
    assert_eq!(listed(&path), [""; 0]);
    let bytes = fs::read(&path).unwrap();
    for (at, subpage) in (0..).step_by(SUBPAGE as usize).zip(bytes.chunks(SUBPAGE as usize)) {
        let hit = (0..ERRORS).find(|n| place(*n) == at).map(|n| struck[n as usize]);
        let (zeros, sevens) =
            (subpage.iter().all(|byte| *byte == 0), subpage.iter().all(|byte| *byte == 7));
        assert!(
            if hit == Some(true) { zeros } else { sevens || hit.is_some() && zeros },
            "{at:#x}: {hit:?}"
        );
    }
    assert_eq!(pool.counter("worker_pid"), worker, "{}", pool.log());
    pool.check();
    pool.unmount();
}

/// The daemon touches file memory in many requests: it reads and writes for programs, zeroes cut or
/// punched bytes, rescues and restores quarantined bytes, copies, maps for madvise(2), moves memory
/// and looks for errors. This case makes each such request over an error that the daemon does not
/// know of yet. At the end the same worker serves.
fn every_request_survives_memory_errors_under_it() {
    type Request = (&'static str, fn(&Path, &File));
    let requests: &[Request] = &[
        ("read", |_, file| tried(file.read_at(&mut vec![0; SIZE as usize], 0))),
        ("write", |_, file| tried(file.write_at(&vec![8; SIZE as usize], 0))),
        ("write in part", |_, file| tried(file.write_at(&[8; 100], BAD + 50))),
        ("append", |_, file| tried(file.write_at(&[8; 100], SIZE))),
        ("truncate into it", |_, file| tried(file.set_len(BAD + 100))),
        ("truncate before it", |_, file| tried(file.set_len(BAD - 100))),
        ("grow", |_, file| tried(file.set_len(SIZE + 10))),
        ("punch it", |_, file| punch(file, BAD, SUBPAGE)),
        ("punch in part", |_, file| punch(file, BAD + 10, 20)),
        ("punch its page", |_, file| punch(file, FOLIO, FOLIO)),
        ("zero", |_, file| tried(fallocate(file, FallocateFlags::ZERO_RANGE, 0, SIZE))),
        ("quarantine it", |path, _| tried(poison(path, BAD, SUBPAGE))),
        ("quarantine its neighbours", |path, _| tried(poison(path, BAD - SUBPAGE, 3 * SUBPAGE))),
        ("repair", |path, _| tried(set(path, REPAIR, "zero all"))),
        ("salvage", |path, _| tried(set(path, REPAIR, "salvage all"))),
        ("collapse", |path, _| tried(set(path, COLLAPSE, "all"))),
        ("map", |path, _| tried(get(path, crate::support::MAP))),
        ("copy", |path, file| {
            let to = File::create(path.with_file_name("copy")).unwrap();
            tried(rustix::fs::copy_file_range(
                file,
                Some(&mut 0),
                &to,
                Some(&mut 0),
                SIZE as usize,
            ));
        }),
        ("seek", |_, file| tried(rustix::fs::seek(file, rustix::fs::SeekFrom::Hole(0)))),
        ("unlink", |path, _| fs::remove_file(path).unwrap()),
        ("resize the pool", |path, _| {
            set(path.parent().unwrap(), SIZE_OF_POOL, (12 * FOLIO).to_string()).unwrap();
        }),
    ];
    for (name, request) in requests {
        let pool = pool(8);
        let worker = pool.counter("worker_pid");
        let path = sevens(&pool);
        let file = File::options().read(true).write(true).open(&path).unwrap();
        strike(&path, BAD); // the daemon is not told
        request(&path, &file);
        assert_eq!(pool.counter("worker_pid"), worker, "{name} ended the worker: {}", pool.log());
        pool.check();
        drop(file);
        pool.unmount();
    }
    println!("{} requests", requests.len());
}

/// Ignores the result: another case tests it.
fn tried<T, E>(_: Result<T, E>) {}

fn punch(file: &File, offset: u64, length: u64) {
    tried(fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, length));
}

// ---- beside a worker's death --------------------------------------------------------------------

fn the_next_worker_finds_errors_of_the_time_without_one() {
    let pool = pool(4);
    let path = sevens(&pool);
    let mut toucher = Toucher::mapping(&path, SIZE);
    assert!(toucher.walk().is_empty());
    let worker = Pid::from_raw(pool.counter("worker_pid") as i32).unwrap();
    kill_process(worker, Signal::STOP).unwrap();
    assert_eq!(toucher.ask(&format!("advise {BAD} {SUBPAGE} {}", libc::MADV_HWPOISON)), "ok");
    kill_process(worker, Signal::KILL).unwrap();
    assert_eq!(listed(&path), [format!("{BAD:#x} 0x1000 hw")]);
    assert_eq!(pool.counter("quarantined_hw"), 1);
    assert_eq!(toucher.walk(), [BAD]);
    pool.check();
    drop(toucher);
    pool.unmount();
}

/// The worker knows one error; the other hits while no worker serves. The next worker must fill the
/// removed memory around both errors and around a hole.
fn a_worker_starts_in_spite_of_errors_and_removed_memory() {
    const KNOWN: u64 = BAD + 2 * SUBPAGE;
    const HOLE: u64 = BAD + 4 * SUBPAGE;
    const REMOVED: u64 = BAD + 6 * SUBPAGE;
    let pool = pool(4);
    let path = sevens(&pool);
    inject(&path, KNOWN);
    poison(&path, HOLE, SUBPAGE).unwrap();
    let mut toucher = Toucher::mapping(&path, SIZE);
    assert_eq!(toucher.walk(), [KNOWN, HOLE]);
    let worker = Pid::from_raw(pool.counter("worker_pid") as i32).unwrap();
    kill_process(worker, Signal::STOP).unwrap();
    assert_eq!(toucher.ask(&format!("advise {BAD} {SUBPAGE} {}", libc::MADV_HWPOISON)), "ok");
    assert_eq!(toucher.ask(&format!("advise {REMOVED} {SUBPAGE} {}", libc::MADV_REMOVE)), "ok");
    kill_process(worker, Signal::KILL).unwrap();
    let lost = [(BAD, "hw"), (KNOWN, "hw"), (HOLE, "soft")];
    assert_eq!(listed(&path), lost.map(|(offset, kind)| format!("{offset:#x} 0x1000 {kind}")));
    assert_eq!(toucher.walk(), [BAD, KNOWN, HOLE]);
    assert_eq!((toucher.load(REMOVED), toucher.load(BAD - SUBPAGE)), (Some(0), Some(7)));
    pool.check();
    set(&path, REPAIR, format!("salvage {HOLE} 1")).unwrap();
    assert_eq!(toucher.load(HOLE), Some(7));
    pool.check();
    drop(toucher);
    pool.unmount();
}

fn errors_are_known_to_the_next_worker_with_their_times() {
    let pool = pool(4);
    let path = sevens(&pool);
    inject(&path, BAD);
    inject(&path, 0);
    let before = get(&path, POISON).unwrap();
    kill_worker(&pool);
    assert_eq!(pool.counter("quarantined_hw"), 2);
    assert_eq!(get(&path, POISON).unwrap(), before);
    set(&path, REPAIR, format!("zero {BAD} 1")).unwrap();
    kill_worker(&pool);
    assert_eq!(listed(&path), ["0x0 0x1000 hw"]);
    pool.check();
    pool.unmount();
}

fn a_worker_that_the_oom_killer_takes_is_replaced() {
    let pool = pool(4);
    let path = sevens(&pool);
    let mut toucher = Toucher::mapping(&path, SIZE);
    assert!(toucher.walk().is_empty());
    let worker = pool.counter("worker_pid");
    // The OOM killer would not choose a worker; here it must choose no other process.
    fs::write(format!("/proc/{worker}/oom_score_adj"), "1000").unwrap();
    // Calls the OOM killer (Documentation/admin-guide/sysrq.rst).
    fs::write("/proc/sysrq-trigger", "f").unwrap();
    wait_until("it is taken", || pool.counter("worker_pid") != worker);
    assert_eq!(fs::read(&path).unwrap(), vec![7; SIZE as usize]);
    assert!(toucher.walk().is_empty());
    pool.await_log(&format!("worker {worker} has ended (signal 9)"));
    pool.check();
    drop(toucher);
    pool.unmount();
}

// ---- cost ---------------------------------------------------------------------------------------

/// The nanoseconds of processor time of all threads of a process (proc(5), schedstat).
fn time_spent(pid: u64) -> u64 {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap().map(Result::unwrap);
    let spent = tasks.map(|task| {
        let text = fs::read_to_string(task.path().join("schedstat")).unwrap();
        text.split(' ').next().unwrap().parse::<u64>().unwrap()
    });
    spent.sum()
}

fn the_patrol_costs_next_to_nothing_at_rest() {
    const SECONDS: u64 = 5;
    let pool = pool(4);
    let path = sevens(&pool);
    let worker = pool.counter("worker_pid");
    let before = time_spent(worker);
    std::thread::sleep(Duration::from_secs(SECONDS)); // the case measures time
    let spent = time_spent(worker) - before;
    println!("the worker at rest: {} us a second, emulated", spent / SECONDS / 1000);
    assert!(spent < SECONDS * 100_000_000, "that is a tenth of a processor and no rest");
    assert_eq!(listed(&path), [""; 0]);
    pool.unmount();
}
