//! The largest number of files: the refusals at that number, the calls that go on, and the numbers
//! of statfs(2) before.

use crate::support::{
    FOLIO, POISON, Pool, REPAIR, SUBPAGE, get, hugetlb2, kill_worker, limits, mount_hugetlb2,
    poison, run, set, status_and_error,
};
use rustix::fs::{AtFlags, CWD, linkat, statvfs, symlinkat};
use rustix::io::Errno;
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

fn is_full<T>(result: io::Result<T>) -> bool {
    result.is_err_and(|error| Errno::from_io_error(&error) == Some(Errno::NOSPC))
}

/// Makes files until the pool refuses one, and returns their number.
fn fill_with_files(pool: &Pool, name: &str) -> u64 {
    let path = |number| pool.join(format!("{name}-{number}"));
    let mut made = 0;
    loop {
        match File::create_new(path(made)) {
            Ok(_) => made += 1,
            Err(error) => {
                assert_eq!(
                    Errno::from_io_error(&error),
                    Some(Errno::NOSPC),
                    "file {made}: {error}"
                );
                assert!(!path(made).exists(), "what was refused has left a name");
                return made;
            }
        }
    }
}

fn files_left(pool: &Pool) -> u64 {
    statvfs(pool.path()).unwrap().f_ffree
}

fn descriptors_of(pid: u64) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

/// Lowers the limit of descriptors of the daemon and of each worker that it starts.
fn allow_descriptors(pool: &Pool, most: u64) {
    for process in ["daemon_pid", "worker_pid"] {
        let pid = Pid::from_raw(pool.counter(process) as i32);
        let limit = Rlimit { current: Some(most), maximum: Some(most) };
        prlimit(pid, Resource::Nofile, limit).unwrap();
    }
}

#[test]
fn no_more_files_than_descriptors_leaves_all_in_use() {
    const MOST: u64 = 400;
    let pool = Pool::small(8);
    let tenant = pool.join("tenant");
    fs::write(&tenant, vec![7; FOLIO as usize]).unwrap();
    allow_descriptors(&pool, MOST);
    let left = files_left(&pool);
    let made = fill_with_files(&pool, "file");
    println!(
        "{made} files made, {left} were promised, {} descriptors",
        descriptors_of(pool.counter("worker_pid"))
    );
    assert!(made > 50, "{made}");
    assert_eq!(made, left);
    assert_eq!(files_left(&pool), 0);
    limits::until(limits::ANSWER, "a line in the log", || {
        pool.log().contains("no more files can be made")
    });
    fs::create_dir(pool.join("a directory takes no descriptor")).unwrap();
    for _worker in 0..2 {
        let file = File::options().read(true).write(true).open(&tenant).unwrap();
        file.write_all_at(b"new", 10).unwrap();
        poison(&tenant, SUBPAGE, SUBPAGE).unwrap();
        assert!(file.read_at(&mut [0], SUBPAGE).is_err());
        set(&tenant, REPAIR, "salvage all").unwrap();
        assert_eq!(get(&tenant, POISON), Err(Errno::NODATA));
        assert_eq!(fs::read(&tenant).unwrap()[SUBPAGE as usize], 7);
        file.set_len(2 * FOLIO).unwrap();
        file.set_len(FOLIO).unwrap();
        pool.check();
        kill_worker(&pool);
    }
    let more = fill_with_files(&pool, "one-more");
    assert!(more <= 4, "a worker that takes over has {more} descriptors fewer of its own");
    for number in 0..3 {
        fs::remove_file(pool.join(format!("file-{number}"))).unwrap();
    }
    limits::until(limits::ANSWER, "room for three files", || files_left(&pool) == 3);
    assert_eq!(fill_with_files(&pool, "again"), 3);
    pool.check();
    pool.unmount();
}

#[test]
fn an_open_descriptor_costs_the_daemon_none() {
    let pool = Pool::small(8);
    fs::write(pool.join("file"), "bytes").unwrap();
    let processes = [pool.counter("worker_pid"), pool.counter("daemon_pid")];
    let before = processes.map(descriptors_of);
    let open = |path: PathBuf| File::open(path).unwrap();
    let held: Vec<_> =
        (0..500).flat_map(|_| [open(pool.join("file")), open(pool.path())]).collect();
    let now = processes.map(descriptors_of);
    // The patrol opens some descriptors each second, and closes them again.
    let few = |(now, before): (&usize, &usize)| *now < before + 20;
    assert!(now.iter().zip(&before).all(few), "{before:?} before, {now:?} with 1000 open");
    // A process that another test starts may hold copies a moment longer, so Pool detaches the
    // mount.
    drop(held);
}

#[test]
fn a_bound_of_inodes_is_kept_and_told() {
    let pool = Pool::mount(&format!("pagesize=2M,size={},nr_inodes=10", 8 * FOLIO));
    let counts = || statvfs(pool.path()).map(|counts| (counts.f_files, counts.f_ffree)).unwrap();
    assert_eq!(counts(), (10, 9), "the root is one");
    assert_eq!(fill_with_files(&pool, "file"), 9);
    let (first, other) = (pool.join("file-0"), pool.join("other"));
    for _worker in 0..2 {
        assert_eq!(counts(), (10, 0));
        assert!(is_full(fs::create_dir(&other)));
        assert!(is_full(symlinkat("target", CWD, &other).map_err(io::Error::from)));
        assert!(is_full(
            linkat(CWD, &first, CWD, &other, AtFlags::empty()).map_err(io::Error::from)
        ));
        assert_eq!(set(&first, "user.other", "value"), Err(Errno::NOSPC));
        assert!(run(hugetlb2().arg("status").arg(pool.path())).contains("10 used, 0 more files"));
        kill_worker(&pool);
    }
    fs::rename(pool.join("file-1"), &first).expect("what replaces a file needs no inode");
    limits::until(limits::ANSWER, "room for a file", || counts() == (10, 1));
    fs::create_dir(&other).unwrap();
    pool.check();
    pool.unmount();
}

#[test]
fn a_bound_of_inodes_is_kept_by_eight_threads_at_once() {
    const BOUND: u64 = 100;
    const THREADS: u64 = 8;
    let pool = Pool::mount(&format!("pagesize=2M,size={},nr_inodes={BOUND}", 2 * FOLIO));
    (0..THREADS).for_each(|thread| fs::create_dir(pool.join(thread.to_string())).unwrap());
    let made = AtomicU64::new(1 + THREADS); // the root, and a directory for each thread
    thread::scope(|scope| {
        for thread in 0..THREADS {
            let (pool, made) = (&pool, &made);
            scope.spawn(move || {
                let more = fill_with_files(pool, &format!("{thread}/file"));
                made.fetch_add(more, Ordering::Relaxed);
            });
        }
    });
    assert_eq!(made.into_inner(), BOUND);
    pool.check();
    pool.unmount();
}

#[test]
fn a_remount_does_not_change_the_bound_of_inodes() {
    let pool = Pool::mount(&format!("pagesize=2M,size={},nr_inodes=1k", 2 * FOLIO));
    let remount = |options: &str| {
        let options = format!("remount,{options}");
        status_and_error(mount_hugetlb2().arg("test-pool").arg(pool.path()).arg("-o").arg(options))
    };
    assert_eq!(remount("nr_inodes=1024").0, 0);
    let (status, why) = remount("nr_inodes=2k");
    assert_ne!(status, 0);
    assert!(why.contains("option nr_inodes: 1024 is in force"), "{why}");
    pool.unmount();
}

#[test]
fn an_upgrade_that_could_not_open_all_files_is_refused() {
    const LOWERED: &str = "ulimit -n 300; exec \"$0\" upgrade \"$1\"";
    let pool = Pool::small(8);
    fs::write(pool.join("file"), "bytes").unwrap();
    (0..60).for_each(|number| drop(File::create_new(pool.join(format!("file-{number}"))).unwrap()));
    let (daemon, program) = (pool.counter("daemon_pid"), hugetlb2().get_program().to_owned());
    let mut upgrade = Command::new("setpriv");
    upgrade.args(["--bounding-set=-sys_resource", "--inh-caps=-sys_resource", "sh", "-c", LOWERED]);
    let (status, why) = status_and_error(upgrade.arg(program).arg(pool.path()));
    assert_ne!(status, 0);
    assert!(why.contains("61 files need a descriptor each"), "{why}");
    assert_eq!(pool.counter("daemon_pid"), daemon);
    assert_eq!(fs::read(pool.join("file")).unwrap(), b"bytes");
    pool.unmount();
}
