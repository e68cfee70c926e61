//! Memory is short: in the daemon's cgroup, or in the machine.

mod support;

use rustix::process::{Pid, Signal, kill_process};
use std::fs;
use std::path::PathBuf;
use std::process::Stdio;
use support::{Pool, limits, mount_hugetlb2, mount_hugetlb2_in, status_and_error, text};

const MIB: u64 = 1 << 20;
/// mount(8): the mount failed.
const FAILED: i32 = 32;

// ---- cgroups --------------------------------------------------------------------------------------------------------

/// A memory cgroup of the test's own, of either version; its processes must be gone when it is dropped.
struct Cgroup {
    directory: PathBuf,
    limit: &'static str,
}

impl Cgroup {
    fn new(name: &str) -> Self {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let mounted = |kind: &str, option: &str| {
            let mut fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
            let found =
                fields.find(|fields| fields[2] == kind && fields[3].split(',').any(|one| one == option));
            found.map(|fields| PathBuf::from(fields[1]))
        };
        let (parent, limit) = match mounted("cgroup", "memory") {
            Some(parent) => (parent, "memory.limit_in_bytes"),
            None => {
                let parent = mounted("cgroup2", "rw").expect("memory cgroups of either version are mounted");
                fs::write(parent.join("cgroup.subtree_control"), "+memory").expect("a memory controller");
                (parent, "memory.max")
            }
        };
        let directory = parent.join(format!("hugetlb2-{name}-{}", std::process::id()));
        fs::create_dir(&directory).unwrap();
        Self { directory, limit }
    }

    fn limit(&self, bytes: u64) {
        fs::write(self.directory.join(self.limit), bytes.to_string()).unwrap();
    }

    /// Asserts that a message names the limit.
    fn assert_named(&self, said: &str) {
        let cgroup = self.directory.file_name().unwrap().to_str().unwrap();
        assert!(said.contains(self.limit) && said.contains(cgroup), "{said}");
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let gone = || fs::remove_dir(&self.directory).is_ok();
            limits::until(limits::ANSWER, "a cgroup whose last process has ended", gone);
        }
    }
}

fn resize(pool: &Pool, bytes: u64) -> (i32, String) {
    let options = format!("remount,size={bytes}");
    status_and_error(mount_hugetlb2().arg("test-pool").arg(pool.path()).args(["-o", &options]))
}

#[test]
fn a_mount_beyond_its_cgroups_limit_names_the_limit() {
    let cgroup = Cgroup::new("mount");
    cgroup.limit(64 * MIB);
    let place = tempfile::tempdir().unwrap();
    let mut mount = mount_hugetlb2_in(&cgroup.directory);
    let (status, said) =
        status_and_error(mount.arg("test-pool").arg(place.path()).args(["-o", "pagesize=2M,size=200M"]));
    assert_eq!(status, FAILED, "{said}");
    cgroup.assert_named(&said);
}

#[test]
fn a_pool_does_not_grow_beyond_its_cgroups_limit() {
    let cgroup = Cgroup::new("growth");
    let pool = Pool::mount_by(mount_hugetlb2_in(&cgroup.directory), "pagesize=2M,size=64M");
    let worker = pool.counter("worker_pid");
    cgroup.limit(150 * MIB);
    let (status, said) = resize(&pool, 300 * MIB);
    assert_eq!(status, FAILED, "{said}");
    cgroup.assert_named(&said);
    cgroup.assert_named(&pool.await_log(cgroup.limit));
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

/// The children of a process, as soon as it has any.
fn first_child(parent: i32) -> i32 {
    let mut child = None;
    limits::until(limits::ANSWER, "the child of a process", || {
        let children = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).expect("it runs");
        child = children.split_ascii_whitespace().next().map(|pid| pid.parse().expect("a process id"));
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
