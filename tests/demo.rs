//! The first command of README.md.

mod support;

use rustix::mount::{UnmountFlags, unmount};
use serde_json::Value;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use support::{hugetlb2, limits, run};

/// A test holds it while it has a pool of 2 GiB: the machine has memory for one.
static MEMORY: Mutex<()> = Mutex::new(());

fn mounts_of_the_demonstration() -> usize {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
    mounts.lines().filter(|line| line.contains("hugetlb2-demo-")).count()
}

#[test]
fn the_demonstration_shows_its_claims_and_leaves_nothing() {
    let _memory = MEMORY.lock();
    let report: Value =
        serde_json::from_str(&run(hugetlb2().args(["demo", "--json"]))).expect("JSON");
    assert_eq!(report["ok"], true);
    for (name, value) in [
        ("huge_before", 512),
        ("sigbus_after", 1),
        ("huge_poisoned", 511),
        ("good_subpages", 262_143),
        ("good_repaired", 262_144),
        ("huge_repaired", 512),
        ("violations", 0),
        ("lost_here", 4096),
        ("lost_hugetlbfs", 1 << 30),
    ] {
        assert_eq!(report[name], value, "{name}");
    }
    assert_eq!(mounts_of_the_demonstration(), 0);
}

#[test]
fn the_demonstration_follows_nothing_of_another_user() {
    let _memory = MEMORY.lock();
    const NOBODY: u32 = 65534;
    let place = tempfile::tempdir().unwrap();
    let (victim, temporary) = (place.path().join("victim"), place.path().join("tmp"));
    for directory in [&victim, &temporary] {
        std::fs::create_dir(directory).unwrap();
        std::fs::set_permissions(directory, std::fs::Permissions::from_mode(0o1777)).unwrap();
    }
    chown(&temporary, Some(NOBODY), None).unwrap();
    // The directory was once named by the number of the process, which is known before the process
    // starts.
    let mut shell = Command::new("sh");
    shell.args(["-c", "read start; exec \"$0\" demo"]).arg(hugetlb2().get_program());
    shell.env("TMPDIR", &temporary).stdin(Stdio::piped()).stdout(Stdio::null());
    let mut shell = shell.spawn().unwrap();
    let prepared = temporary.join(format!("hugetlb2-demo-{}", shell.id()));
    std::fs::create_dir(&prepared).unwrap();
    symlink(&victim, prepared.join("mnt")).unwrap();
    chown(&prepared, Some(NOBODY), None).unwrap();
    drop(shell.stdin.take());
    let mut mounted_on_victim = false;
    limits::until(limits::PROGRAM, "the end of the demonstration", || {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        mounted_on_victim |= mounts.contains(victim.to_str().unwrap());
        shell.try_wait().unwrap().is_some()
    });
    while unmount(&victim, UnmountFlags::DETACH).is_ok() {}
    assert!(!mounted_on_victim, "the pool was mounted where another user wanted");
    assert!(shell.wait().unwrap().success());
    let left: Vec<_> =
        std::fs::read_dir(&temporary).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(left, [prepared]);
}
