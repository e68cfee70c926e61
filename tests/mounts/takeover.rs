//! The worker may die at any instruction. No call fails, no byte is lost, and programs that map a
//! file notice nothing.

use crate::support::{
    DIE, FOLIO, POISON, Pool, REPAIR, SUBPAGE, Toucher, Worker, get, hugetlb2, kill_worker, limits,
    poison, run, set, status_and_error,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FlockOperation, XattrFlags, flock};
use rustix::process::{Pid, Signal, kill_process};
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::Stdio;
use std::time::{Duration, Instant};

const SIZE: u64 = 2 * FOLIO;

fn sevens(pool: &Pool) -> std::path::PathBuf {
    let path = pool.join("file");
    fs::write(&path, vec![7; SIZE as usize]).unwrap();
    path
}

fn is_alarmed(file: &File, seconds: i64) -> bool {
    let timeout = Timespec { tv_sec: seconds, tv_nsec: 0 };
    let mut fds = [PollFd::new(file, PollFlags::PRI)];
    poll(&mut fds, Some(&timeout)).unwrap();
    fds[0].revents() == PollFlags::PRI
}

/// Waits until a worker serves again: the supervisor receives the hangup signal at a moment of its
/// own.
fn wait_for_service(serves: impl FnMut() -> bool) {
    limits::until(limits::ANSWER, "a worker that serves after a hangup signal", serves);
}

// ---- a takeover that no program notices ---------------------------------------------------------

#[test]
fn a_new_worker_serves_after_one_was_killed_while_idle() {
    let pool = Pool::small(8);
    let path = sevens(&pool);
    let (supervisor, before) = (pool.counter("daemon_pid"), pool.counter("worker_pid"));
    kill_worker(&pool);
    assert_eq!(fs::read(&path).unwrap(), vec![7; SIZE as usize]);
    assert_eq!(pool.counter("daemon_pid"), supervisor);
    assert_ne!(pool.counter("worker_pid"), before);
    assert_eq!(pool.free_pages(), 6);
    pool.check();
    pool.await_log(&format!("worker {before} has ended (signal 9)"));
    pool.unmount();
}

#[test]
fn all_that_programs_hold_survives_twenty_takeovers() {
    let pool = Pool::small(8);
    let path = sevens(&pool);
    let file = File::options().read(true).write(true).open(&path).unwrap();
    flock(&file, FlockOperation::LockExclusive).unwrap();
    let mut mapper = Toucher::mapping(&path, SIZE);
    assert_eq!(mapper.walk(), []);
    let unlinked = pool.join("unlinked");
    fs::write(&unlinked, vec![9; FOLIO as usize]).unwrap();
    let mut orphan = Toucher::mapping(&unlinked, FOLIO);
    assert_eq!(orphan.load(5), Some(9));
    fs::remove_file(&unlinked).unwrap();
    fs::create_dir(pool.join("gone")).unwrap();
    let gone = File::open(pool.join("gone")).unwrap();
    fs::remove_dir(pool.join("gone")).unwrap();
    poison(&path, 5 * SUBPAGE, SUBPAGE).unwrap();
    for round in 0..20u64 {
        kill_worker(&pool);
        assert_eq!(mapper.ask("walk"), format!("hits {}:2", 5 * SUBPAGE), "round {round}");
        assert_eq!(mapper.huge(), 1);
        let at = FOLIO + round;
        file.write_all_at(&[round as u8], at).unwrap();
        assert_eq!(mapper.load(at), Some(round as u8));
        assert!(mapper.store(at, 7));
        assert_eq!(
            mapper.ask(&format!("lock {} flock", path.display())),
            "errno 11",
            "it is locked by us"
        );
        assert!(orphan.store(round, round as u8));
        assert_eq!(orphan.load(round), Some(round as u8));
        assert_eq!(gone.metadata().unwrap().nlink(), 0);
        let mut byte = [0];
        assert!(file.read_at(&mut byte, 5 * SUBPAGE).is_err());
        assert_eq!(pool.counter("orphans"), 2);
        pool.check();
    }
    set(&path, REPAIR, "salvage all").unwrap();
    assert_eq!(mapper.ask(&format!("differ 0 {SIZE} 7")), "count 0");
    drop((orphan, gone));
    kill_worker(&pool);
    pool.wait_for_orphans();
    pool.wait_for_free_pages(6);
    pool.check();
    drop((mapper, file));
    pool.unmount();
}

#[test]
fn who_polls_for_errors_is_woken_by_the_next_worker() {
    let pool = Pool::small(8);
    let path = sevens(&pool);
    let file = File::open(&path).unwrap();
    for round in 0..20 {
        let waiter = std::thread::spawn({
            let file = file.try_clone().unwrap();
            move || is_alarmed(&file, 60)
        });
        kill_worker(&pool);
        poison(&path, round * SUBPAGE, SUBPAGE).unwrap();
        assert!(waiter.join().unwrap(), "round {round}");
        assert!(get(&path, POISON).is_ok());
        assert!(!is_alarmed(&file, 0), "it has been read");
    }
    drop(file);
    pool.unmount();
}

#[test]
fn a_directory_can_be_read_on_after_each_entry() {
    const ENTRIES: usize = 3000;
    let pool = Pool::small(2);
    for n in 0..ENTRIES {
        fs::create_dir(pool.join(format!("a-name-that-takes-some-room-{n:05}"))).unwrap();
    }
    let mut seen = Vec::new();
    let mut entries = fs::read_dir(pool.path()).unwrap();
    for entry in entries.by_ref() {
        seen.push(entry.unwrap().file_name());
        if seen.len().is_multiple_of(150) {
            kill_worker(&pool);
        }
    }
    drop(entries);
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), ENTRIES);
    pool.unmount();
}

#[test]
fn an_unlinked_file_closed_without_a_worker_returns_its_pages() {
    let pool = Pool::small(8);
    let path = sevens(&pool);
    let file = File::open(&path).unwrap();
    fs::remove_file(&path).unwrap();
    assert_eq!(pool.free_pages(), 6);
    let worker = Worker::of(&pool);
    worker.stop();
    drop(file);
    worker.kill();
    pool.wait_for_free_pages(8);
    pool.check();
    pool.unmount();
}

#[test]
fn a_call_that_was_under_way_returns_its_result() {
    let pool = Pool::small(8);
    let path = sevens(&pool);
    let worker = Worker::of(&pool);
    worker.stop();
    let caller = std::thread::spawn(move || fs::read(path).unwrap());
    worker.kill();
    assert_eq!(caller.join().unwrap(), vec![7; SIZE as usize]);
    pool.unmount();
}

// ---- deaths in a row ----------------------------------------------------------------------------

#[test]
fn fifty_deaths_within_a_second_fail_no_call() {
    let pool = Pool::small(8);
    let path = sevens(&pool);
    let supervisor = pool.counter("daemon_pid");
    let mut killed = 0;
    let end = Instant::now() + Duration::from_secs(1);
    while killed < 50 || Instant::now() < end {
        killed += kill_children(supervisor);
    }
    assert_eq!(fs::read(&path).unwrap(), vec![7; SIZE as usize]);
    pool.check();
    pool.unmount();
}

/// Kills the children of a process, at any point of their start. Returns their number.
fn kill_children(parent: u64) -> usize {
    let children =
        fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).expect("it runs");
    let pids = children.split_ascii_whitespace().filter_map(|pid| Pid::from_raw(pid.parse().ok()?));
    pids.filter(|pid| kill_process(*pid, Signal::KILL).is_ok()).count()
}

#[test]
fn repeated_deaths_end_in_refusal_and_sighup_ends_that() {
    let pool = Pool::mount(&format!("pagesize=2M,size={},io=native", 8 * FOLIO));
    let path = sevens(&pool);
    let mut mapper = Toucher::mapping(&path, SIZE);
    let (native, file) =
        (File::open(&path).unwrap(), File::options().append(true).read(true).open(&path).unwrap());
    let supervisor = pool.daemon().pid;
    // The next worker first reads the version, and does not know this one.
    let handover = format!("/proc/{supervisor}/root/index/handover");
    let text = fs::read_to_string(&handover).unwrap();
    fs::write(&handover, text.replacen("handover 1", "handover 2", 1)).unwrap();
    kill_worker(&pool);
    let refused = file.read_at(&mut [0], 0).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(5), "EIO");
    pool.await_log("every request is refused");
    pool.await_log("version 2, and this program knows 1");
    assert_eq!(mapper.ask(&format!("differ 0 {SIZE} 7")), "count 0", "mappings stay");
    assert!(mapper.store(3, 7));
    drop(native); // the next worker learns of it
    fs::write(&handover, text).unwrap();
    kill_process(Pid::from_raw(supervisor).unwrap(), Signal::HUP).unwrap();
    wait_for_service(|| file.read_at(&mut [0], 0).is_ok());
    poison(&path, 0, 1).unwrap();
    assert_eq!(pool.counter("opened_natively"), 0);
    pool.check();
    drop((mapper, file));
    pool.unmount();
}

/// A damaged ledger: its header is overwritten. Keeps the header's former bytes.
struct Damage {
    ledger: std::path::PathBuf,
    superblock: Vec<u8>,
}

impl Damage {
    const SUPERBLOCK: &str = "trusted.superblock";

    fn to_only_file_of(pool: &Pool) -> Self {
        let objects = fs::read_dir(format!("/proc/{}/root/objects", pool.daemon().pid)).unwrap();
        let ledgers: Vec<_> = objects.map(|object| object.unwrap().path().join("ledger")).collect();
        let [ledger] = &ledgers[..] else { panic!("one file: {ledgers:?}") };
        let mut superblock = vec![0; 40];
        let length = rustix::fs::getxattr(ledger, Self::SUPERBLOCK, &mut superblock[..]).unwrap();
        superblock.truncate(length);
        let damage = Self { ledger: ledger.clone(), superblock };
        damage.set(&[0; 40]);
        damage
    }

    fn set(&self, bytes: &[u8]) {
        rustix::fs::setxattr(&self.ledger, Self::SUPERBLOCK, bytes, XattrFlags::empty()).unwrap();
    }

    fn undo(self) {
        self.set(&self.superblock);
    }
}

#[test]
fn a_file_that_cannot_be_opened_is_refused_alone() {
    let pool = Pool::small(8);
    let (path, other) = (sevens(&pool), pool.join("other"));
    let (file, mut mapper) = (File::open(&path).unwrap(), Toucher::mapping(&path, SIZE));
    let damage = Damage::to_only_file_of(&pool);
    kill_worker(&pool);
    fs::write(&other, vec![8; 5 * FOLIO as usize]).unwrap();
    assert_eq!(file.read_at(&mut [0], 0).unwrap_err().raw_os_error(), Some(5), "EIO");
    assert_eq!(fs::metadata(&path).unwrap().len(), SIZE);
    assert_eq!((pool.counter("files_unavailable"), pool.free_pages()), (1, 1));
    let refused = fs::write(pool.join("third"), vec![9; SIZE as usize]).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(28), "ENOSPC: the pages of that file are no other's");
    assert_eq!(mapper.ask(&format!("differ 0 {SIZE} 7")), "count 0", "a mapping stays");
    let status = run(hugetlb2().arg("status").arg(pool.path()));
    assert!(status.contains("/file 2 damaged: an object's superblock"), "{status}");
    pool.check();
    damage.undo();
    wait_for_service(|| file.read_at(&mut [0], 0).is_ok());
    assert!(fs::read(&path).unwrap().iter().all(|byte| *byte == 7));
    assert!(fs::read(&other).unwrap().iter().all(|byte| *byte == 8));
    assert_eq!(pool.counter("files_unavailable"), 0);
    pool.check();
    drop((file, mapper));
    pool.unmount();
}

#[test]
fn a_removed_file_that_cannot_be_opened_returns_its_pages() {
    let pool = Pool::small(8);
    let path = sevens(&pool);
    let damage = Damage::to_only_file_of(&pool);
    kill_worker(&pool);
    assert_eq!(fs::read(&path).unwrap_err().raw_os_error(), Some(5), "EIO");
    fs::remove_file(&path).unwrap();
    assert_eq!((pool.counter("files_unavailable"), pool.free_pages()), (1, 6));
    damage.undo();
    limits::until(limits::ANSWER, "the pages of a removed file", || pool.free_pages() == 8);
    assert_eq!(pool.counter("files_unavailable"), 0);
    pool.check();
    pool.unmount();
}

/// Sends a request that the worker dies of: by a panic, or by SIGKILL as from the OOM killer.
fn ask_for_death(pool: &Pool, how: &str) -> rustix::io::Result<()> {
    set(pool.path(), DIE, how)
}

#[test]
fn a_request_that_workers_die_of_is_refused_in_the_end() {
    for how in ["now", "killed"] {
        let pool = Pool::small(8);
        let path = sevens(&pool);
        let before = pool.counter("worker_pid");
        assert_eq!(ask_for_death(&pool, how), Err(rustix::io::Errno::IO));
        assert_eq!(fs::read(&path).unwrap(), vec![7; SIZE as usize], "it alone is refused");
        assert_ne!(pool.counter("worker_pid"), before);
        let log = pool.await_log("it is refused (EIO)");
        assert_eq!(log.matches("this one takes over").count(), 8, "{log}");
        assert!(!log.contains("every request is refused"), "{log}");
        pool.check();
        pool.unmount();
    }
}

#[test]
fn what_is_asked_beside_a_deadly_request_succeeds() {
    let pool = Pool::small(16);
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for thread in 0..6 {
            let (stop, pool) = (&stop, &pool);
            scope.spawn(move || {
                let path = pool.join(format!("file-{thread}"));
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    fs::write(&path, vec![thread; SIZE as usize]).unwrap();
                    assert_eq!(fs::read(&path).unwrap(), vec![thread; SIZE as usize]);
                    fs::remove_file(&path).unwrap();
                }
            });
        }
        let answers: Vec<_> = (0..3).map(|_| ask_for_death(&pool, "killed")).collect();
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        assert_eq!(answers, [Err(rustix::io::Errno::IO); 3]);
    });
    assert!(!pool.log().contains("every request is refused"), "{}", pool.log());
    pool.check();
    pool.unmount();
}

#[test]
fn a_refusal_ends_by_itself_when_its_cause_is_gone() {
    let pool = Pool::small(8);
    let path = sevens(&pool);
    let file = File::open(&path).unwrap();
    let handover = format!("/proc/{}/root/index/handover", pool.daemon().pid);
    let text = fs::read_to_string(&handover).unwrap();
    fs::write(&handover, text.replacen("handover 1", "handover 2", 1)).unwrap();
    kill_worker(&pool);
    assert_eq!(file.read_at(&mut [0], 0).unwrap_err().raw_os_error(), Some(5), "EIO");
    pool.await_log("every request is refused");
    fs::write(&handover, text).unwrap();
    wait_for_service(|| file.read_at(&mut [0], 0).is_ok());
    pool.check();
    drop(file);
    pool.unmount();
}

#[test]
fn a_worker_that_hangs_is_shown_and_replaced_by_a_hangup_signal() {
    let pool = Pool::small(2);
    let worker = Worker::of(&pool);
    worker.stop();
    let (status, said) = status_and_error(hugetlb2().arg("status").arg(pool.path()));
    assert_eq!(status, 1);
    assert!(
        said.contains("no answer") && said.contains(&format!("process {} is stopped", worker.pid)),
        "{said}"
    );
    kill_process(Pid::from_raw(pool.daemon().pid).unwrap(), Signal::HUP).unwrap();
    assert!(run(hugetlb2().arg("status").arg(pool.path())).contains("2 free"));
    pool.unmount();
}

// ---- the supervisor -----------------------------------------------------------------------------

#[test]
fn without_a_supervisor_mappings_stay_valid_and_calls_fail() {
    let pool = Pool::small(8);
    let path = sevens(&pool);
    let file = File::open(&path).unwrap();
    let mut mapper = Toucher::mapping(&path, SIZE);
    assert_eq!(mapper.walk(), []);
    let worker = Worker::of(&pool);
    kill_process(Pid::from_raw(pool.daemon().pid).unwrap(), Signal::KILL).unwrap();
    pool.daemon().wait();
    worker.wait();
    assert_eq!(file.read_at(&mut [0], 0).unwrap_err().raw_os_error(), Some(107), "ENOTCONN");
    assert_eq!(mapper.ask(&format!("differ 0 {SIZE} 7")), "count 0");
    assert!(mapper.store(1, 2));
    drop((mapper, file));
}

#[test]
fn a_stopped_daemon_ends_with_its_worker() {
    for signal in [Signal::TERM, Signal::INT] {
        let pool = Pool::small(8);
        sevens(&pool);
        let worker = Worker::of(&pool);
        kill_process(Pid::from_raw(pool.daemon().pid).unwrap(), signal).unwrap();
        pool.daemon().wait();
        assert!(worker.has_ended(), "the supervisor ends last");
    }
}

// ---- replacement --------------------------------------------------------------------------------

#[test]
fn an_upgrade_in_use_fails_no_call() {
    let mut pool = Pool::small(8);
    let path = sevens(&pool);
    let copy = tempfile::NamedTempFile::new().unwrap();
    fs::copy(env!("CARGO_BIN_EXE_hugetlb2fsd"), copy.path()).unwrap();
    let copy = copy.into_temp_path(); // a program that is open for writing cannot be executed
    let mut mapper = Toucher::mapping(&path, SIZE);
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for thread in 0..3 {
            let (path, stop, pool) = (&path, &stop, &pool);
            scope.spawn(move || {
                let mut round = 0;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    let name = pool.join(format!("{thread}-{round}"));
                    fs::write(&name, "text").unwrap();
                    fs::rename(&name, pool.join(format!("{thread}"))).unwrap();
                    assert_eq!(fs::read(path).unwrap().len() as u64, SIZE);
                    round += 1;
                }
            });
        }
        for _ in 0..5 {
            let before = pool.counter("daemon_pid");
            run(hugetlb2().arg("upgrade").arg(pool.path()).arg("--binary").arg(&copy));
            assert_ne!(pool.counter("daemon_pid"), before);
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    assert_eq!(mapper.ask(&format!("differ 0 {SIZE} 7")), "count 0");
    let running = fs::read_link(format!("/proc/{}/exe", pool.counter("daemon_pid"))).unwrap();
    assert_eq!(running, fs::canonicalize(&copy).unwrap());
    pool.check();
    drop(mapper);
    pool.note_new_daemon();
    pool.unmount();
}

/// The processes of daemons, which stand still until this value is dropped.
struct Stopped(Vec<Worker>);

impl Stopped {
    fn new(pools: &[Pool]) -> Self {
        let both = |pool: &Pool| {
            let process = pool.daemon().process().try_clone().unwrap();
            [Worker::of(pool), Worker { pid: pool.daemon().pid, process }]
        };
        let all = Self(pools.iter().flat_map(both).collect());
        all.0.iter().for_each(Worker::stop);
        all
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        self.0.iter().for_each(|process| process.signal(Signal::CONT));
    }
}

/// A daemon ends some time after its pool is unmounted, and has the device open until then. The
/// kernel gives the pool's number to another mount at once: to the next pool, if it is not the
/// number of one of the filesystems that this pool is made of, or of another test's.
#[test]
fn a_daemon_that_has_yet_to_end_is_not_taken_for_that_of_the_next_pool() {
    const POOLS: usize = 8;
    let number = |pool: &Pool| fs::metadata(pool.path()).unwrap().dev();
    limits::until(limits::ANSWER, "a pool with the number of an earlier one", || {
        let old: Vec<Pool> = (0..POOLS).map(|_| Pool::small(1)).collect();
        let numbers: Vec<u64> = old.iter().map(number).collect();
        let paths: Vec<_> = old.iter().map(|pool| pool.path().display().to_string()).collect();
        let stopped = Stopped::new(&old);
        std::thread::scope(|scope| {
            let stopped = stopped; // it is dropped before the threads are waited for
            old.into_iter().for_each(|pool| drop(scope.spawn(|| drop(pool))));
            limits::until(limits::ANSWER, "the end of the mounts", || {
                let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
                paths.iter().all(|path| !mounts.contains(path))
            });
            let mut next = Pool::small(1);
            let is_anothers = numbers.contains(&number(&next));
            if is_anothers {
                let said = run(hugetlb2().arg("upgrade").arg(next.path()));
                let words = format!("in place of {}\n", next.daemon().pid);
                assert!(said.ends_with(&words), "{said}, and {words}");
                assert!(next.daemon().ends_within(0), "the daemon that it replaces has ended");
                next.note_new_daemon();
                next.check();
            }
            drop(stopped);
            is_anothers
        })
    });
}

#[test]
fn an_upgrade_that_cannot_be_is_refused_and_the_other_goes_on() {
    let pool = Pool::small(8);
    sevens(&pool);
    let (supervisor, worker) = (pool.counter("daemon_pid"), pool.counter("worker_pid"));
    let refused = |binary: &str, word: &str| {
        let (status, said) =
            status_and_error(hugetlb2().arg("upgrade").arg(pool.path()).args(["--binary", binary]));
        assert_eq!(status, 1, "{said}");
        assert!(said.contains(word), "{said}");
        assert_eq!((pool.counter("daemon_pid"), pool.counter("worker_pid")), (supervisor, worker));
        pool.check();
    };
    refused("/nonexistent", "/nonexistent: No such file");
    refused("/etc/passwd", "cannot be started");
    refused("/bin/true", "ended without a word");
    let handover = format!("/proc/{supervisor}/root/index/handover");
    let text = fs::read_to_string(&handover).unwrap();
    fs::write(&handover, text.replacen("handover 1", "handover 7", 1)).unwrap();
    refused(
        env!("CARGO_BIN_EXE_hugetlb2fsd"),
        "is not taken over from: what was left is of version 7, and this program knows 1",
    );
    fs::write(&handover, text).unwrap();
    let file = fs::metadata(pool.join("file")).unwrap().ino();
    for place in [format!("objects/{file:016x}"), "reserve/0".to_owned()] {
        let ledger = format!("/proc/{supervisor}/root/{place}/ledger");
        let mut header = [0; 40];
        rustix::fs::getxattr(&ledger, HEADER, &mut header[..]).unwrap();
        set(&ledger, HEADER, of_version(1, header)).unwrap();
        refused(env!("CARGO_BIN_EXE_hugetlb2fsd"), "an object of version 1");
        set(&ledger, HEADER, header).unwrap();
    }
    pool.unmount();
}

/// The attribute with the header of a sealed file (docs/FORMAT.md).
const HEADER: &str = "trusted.superblock";

fn of_version(version: u8, mut header: [u8; 40]) -> [u8; 40] {
    header[8] = version;
    let checksum = crc32fast::hash(&header[..32]);
    header[32..36].copy_from_slice(&checksum.to_le_bytes());
    header
}

#[test]
fn of_upgrades_at_one_moment_one_goes_on() {
    let mut pool = Pool::small(8);
    let path = sevens(&pool);
    for _ in 0..5 {
        let start = |_| {
            let mut upgrade = hugetlb2();
            upgrade.arg("upgrade").arg(pool.path()).stdout(Stdio::null()).stderr(Stdio::piped());
            upgrade.spawn().unwrap()
        };
        let upgrades: Vec<_> = (0..4).map(start).collect();
        let ends = upgrades
            .into_iter()
            .map(|upgrade| limits::collect(limits::PROGRAM, "an upgrade", upgrade).unwrap());
        let (done, refused): (Vec<_>, Vec<_>) = ends.partition(|end| end.status.success());
        assert!(!done.is_empty(), "none has gone on");
        for end in refused {
            let said = String::from_utf8_lossy(&end.stderr).into_owned();
            let known = [
                "is not taken over from: ",
                "its daemon is not seen from here",
                "ending the other daemon",
            ];
            assert!(known.iter().any(|word| said.contains(word)), "{said}");
        }
        assert!(fs::read(&path).unwrap().iter().all(|byte| *byte == 7));
        assert_eq!(serving(&pool), 2, "a supervisor and a worker");
    }
    pool.check();
    pool.note_new_daemon();
    pool.unmount();
}

/// Counts the processes that have the pool's connection open, after the killed ones have ended.
fn serving(pool: &Pool) -> usize {
    let minor = rustix::fs::minor(fs::metadata(pool.path()).unwrap().dev());
    let line = format!("fuse_connection:\t{minor}\n");
    let serves = |process: &fs::DirEntry| {
        let open = fs::read_dir(process.path().join("fdinfo"))
            .into_iter()
            .flatten()
            .filter_map(Result::ok);
        open.filter_map(|fd| fs::read_to_string(fd.path()).ok()).any(|text| text.contains(&line))
    };
    let count = || fs::read_dir("/proc").unwrap().filter_map(Result::ok).filter(serves).count();
    let patience = Instant::now() + Duration::from_secs(5);
    while count() != 2 && Instant::now() < patience {
        std::thread::yield_now(); // a worker ends after its supervisor
    }
    count()
}
