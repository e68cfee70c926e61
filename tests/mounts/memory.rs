//! Memory is short: in the daemon's cgroup, or in the machine.

use crate::support::cgroup::Cgroup;
use crate::support::{
    DIE, FOLIO, Pool, REPAIR, Toucher, kill_worker, limits, mount_hugetlb2, mount_hugetlb2_in,
    poison, set, status_and_error, text,
};
use rustix::process::{Pid, Signal, kill_process};
use std::fs::{self, File};
use std::process::Stdio;

const MIB: u64 = 1 << 20;
/// mount(8): the mount failed.
const FAILED: i32 = 32;

// ---- cgroups -----------------------------------------------------------------------------------

/// A memory cgroup for one test.
fn cgroup(name: &str) -> Cgroup {
    Cgroup::new(name, "memory", ["memory.limit_in_bytes", "memory.max"])
}

/// Asserts that a message names the cgroup and its limit.
fn assert_named(cgroup: &Cgroup, said: &str) {
    let name = cgroup.directory.file_name().unwrap().to_str().unwrap();
    assert!(said.contains(cgroup.limit) && said.contains(name), "{said}");
}

fn resize(pool: &Pool, bytes: u64) -> (i32, String) {
    let options = format!("remount,size={bytes}");
    status_and_error(mount_hugetlb2().arg("test-pool").arg(pool.path()).args(["-o", &options]))
}

#[test]
fn a_mount_beyond_its_cgroups_limit_names_the_limit() {
    let cgroup = cgroup("mount");
    cgroup.limit(64 * MIB);
    let place = tempfile::tempdir().unwrap();
    let mut mount = mount_hugetlb2_in(&cgroup.directory);
    let (status, said) = status_and_error(
        mount.arg("test-pool").arg(place.path()).args(["-o", "pagesize=2M,size=200M"]),
    );
    assert_eq!(status, FAILED, "{said}");
    assert_named(&cgroup, &said);
}

#[test]
fn a_pool_does_not_grow_beyond_its_cgroups_limit() {
    let cgroup = cgroup("growth");
    let pool = Pool::mount_by(mount_hugetlb2_in(&cgroup.directory), "pagesize=2M,size=64M");
    let worker = pool.counter("worker_pid");
    cgroup.limit(150 * MIB);
    let (status, said) = resize(&pool, 300 * MIB);
    assert_eq!(status, FAILED, "{said}");
    assert_named(&cgroup, &said);
    assert_named(&cgroup, &pool.await_log(cgroup.limit));
    assert_eq!(
        (pool.counter("worker_pid"), pool.free_pages()),
        (worker, 32),
        "it lives, nothing has changed"
    );
    fs::create_dir(pool.join("directory")).unwrap();
    cgroup.limit(400 * MIB);
    assert_eq!(resize(&pool, 300 * MIB).0, 0);
    assert_eq!((pool.counter("worker_pid"), pool.free_pages()), (worker, 150));
    pool.check();
    pool.unmount();
}

#[test]
fn a_quarantine_takes_no_memory_beyond_the_pool() {
    let cgroup = cgroup("quarantine");
    let options = "pagesize=2M,size=64M,collapse=off"; // a later collapse would take memory, too
    let pool = Pool::mount_by(mount_hugetlb2_in(&cgroup.directory), options);
    let path = pool.join("file");
    fs::write(&path, vec![7; 4 * FOLIO as usize]).unwrap();
    let there_and_back = |offset: u64| {
        poison(&path, offset, FOLIO).unwrap();
        assert_eq!(pool.counter("quarantined_soft"), 512);
        set(&path, REPAIR, "salvage all").unwrap();
    };
    // After these rounds each thread of the worker has the memory that it needs for itself.
    (0..20).for_each(|_| there_and_back(0));
    let worker = pool.counter("worker_pid");
    cgroup.limit(cgroup.taken() + FOLIO / 2);
    (1..4).for_each(|folio| there_and_back(folio * FOLIO));
    assert_eq!((pool.counter("worker_pid"), pool.counter("short_bytes")), (worker, 0));
    assert!(fs::read(&path).unwrap().iter().all(|byte| *byte == 7));
    pool.check();
    pool.unmount();
}

/// The first child of a process, as soon as it has one.
fn first_child(parent: i32) -> i32 {
    let mut child = None;
    limits::until(limits::ANSWER, "the child of a process", || {
        let children =
            fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).expect("it runs");
        child =
            children.split_ascii_whitespace().next().map(|pid| pid.parse().expect("a process id"));
        child.is_some()
    });
    child.expect("it was waited for")
}

#[test]
fn a_mount_whose_worker_is_killed_says_so() {
    let place = tempfile::tempdir().unwrap();
    let mut mount = mount_hugetlb2();
    mount.arg("test-pool").arg(place.path()).args(["-o", "pagesize=2M,size=1G"]);
    let mount = mount.stderr(Stdio::piped()).spawn().unwrap();
    let worker = first_child(first_child(mount.id() as i32));
    kill_process(Pid::from_raw(worker).unwrap(), Signal::KILL).unwrap();
    let output = limits::collect(limits::PROGRAM, "mount.hugetlb2", mount).unwrap();
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(FAILED), "{said}");
    assert!(said.contains("signal 9") && said.contains("OOM killer"), "{said}");
}

// ---- the machine -------------------------------------------------------------------------------

/// While this value lives, the daemon of one pool sees a machine with next to no memory left.
struct Shortage {
    supervisor: i32,
}

impl Shortage {
    fn of(pool: &Pool) -> Self {
        let supervisor = pool.daemon().pid;
        let lines = fs::read_to_string("/proc/meminfo").unwrap();
        let mut lines: Vec<_> = lines.lines().map(str::to_owned).collect();
        let available = lines.iter_mut().find(|line| line.starts_with("MemAvailable:")).unwrap();
        *available = "MemAvailable:       1024 kB".to_owned();
        fs::write(format!("/proc/{supervisor}/root/index/meminfo"), lines.join("\n") + "\n")
            .unwrap();
        let covered =
            Toucher::start().ask(&format!("cover {supervisor} /index/meminfo /proc/meminfo"));
        assert_eq!(covered, "ok");
        Self { supervisor }
    }

    fn end(self) {
        assert_eq!(
            Toucher::start().ask(&format!("uncover {} /proc/meminfo", self.supervisor)),
            "ok"
        );
    }
}

/// Waits until a counter changes by itself: the patrol looks each second.
fn wait_for_counter(pool: &Pool, name: &str, value: u64) {
    let what = format!("counter {name} of the pool to become {value}");
    limits::until(limits::ANSWER, &what, || pool.counter(name) == value);
}

#[test]
fn a_pool_works_when_the_machine_has_nothing_left() {
    let pool = Pool::small(128);
    let shortage = Shortage::of(&pool);
    let path = pool.join("file");
    File::create(&path).unwrap().set_len(20 * MIB).unwrap();
    fs::write(&path, vec![7; 30 * MIB as usize]).unwrap();
    assert!(fs::read(&path).unwrap().iter().all(|byte| *byte == 7));
    let mut mapper = Toucher::mapping(&path, 30 * MIB);
    assert_eq!(mapper.walk(), []);
    assert_eq!(mapper.huge(), 15);
    drop(mapper);
    pool.check();
    File::options().write(true).open(&path).unwrap().set_len(10 * MIB).unwrap();
    assert_eq!(pool.free_pages(), 123);
    fs::remove_file(&path).unwrap();
    wait_for_counter(&pool, "pages_free", 128);
    assert_eq!(resize(&pool, 200 * MIB).0, 0);
    assert_eq!(resize(&pool, 256 * MIB).0, FAILED, "a larger pool takes memory from the machine");
    assert_eq!((pool.free_pages(), pool.counter("short_bytes")), (100, 0));
    shortage.end();
    assert_eq!(resize(&pool, 256 * MIB).0, 0);
    pool.check();
    pool.unmount();
}

#[test]
fn what_a_death_has_cost_the_float_comes_back_by_itself() {
    for (step, name) in [
        ("move out: the reserve has given a piece", "growth"),
        ("move in: the file has given a piece", "shrinking"),
    ] {
        let pool = Pool::small(32);
        let path = pool.join("file");
        fs::write(&path, vec![7; 10 * FOLIO as usize]).unwrap();
        let shortage = Shortage::of(&pool);
        set(pool.path(), DIE, format!("3 {step}")).unwrap();
        let size = if name == "growth" { 20 * FOLIO } else { 2 * FOLIO };
        File::options().write(true).open(&path).unwrap().set_len(size).unwrap();
        assert_eq!(
            pool.counter("short_bytes"),
            FOLIO,
            "{name}: the machine does not give it again yet"
        );
        assert_eq!((pool.counter("pages_missing"), pool.free_pages()), (0, 32 - size / FOLIO));
        assert!(fs::read(&path).unwrap()[..2 * FOLIO as usize].iter().all(|byte| *byte == 7));
        pool.check();
        shortage.end();
        wait_for_counter(&pool, "short_bytes", 0);
        pool.check();
        pool.unmount();
    }
}

#[test]
fn memory_that_a_program_removed_stops_no_takeover() {
    let pool = Pool::small(32);
    let (path, other) = (pool.join("file"), pool.join("other"));
    fs::write(&path, vec![7; 10 * FOLIO as usize]).unwrap();
    fs::write(&other, vec![8; 2 * FOLIO as usize]).unwrap();
    let mut mapper = Toucher::mapping(&path, 10 * FOLIO);
    let shortage = Shortage::of(&pool);
    assert_eq!(mapper.ask(&format!("advise 0 {} 9", 8 * FOLIO)), "ok", "MADV_REMOVE");
    kill_worker(&pool);
    assert!(fs::read(&other).unwrap().iter().all(|byte| *byte == 8));
    let bytes = fs::read(&path).unwrap();
    assert!(bytes[..8 * FOLIO as usize].iter().all(|byte| *byte == 0), "as was asked for");
    assert!(bytes[8 * FOLIO as usize..].iter().all(|byte| *byte == 7));
    let third = File::create(pool.join("third")).unwrap();
    third.set_len(20 * FOLIO).unwrap();
    assert_eq!((pool.counter("files_unavailable"), pool.free_pages()), (0, 0));
    shortage.end();
    // The worker takes the removed memory back for this call.
    File::options().write(true).open(&path).unwrap().set_len(10 * FOLIO).unwrap();
    pool.check();
    drop((mapper, third));
    pool.unmount();
}
