//! The kinds of memory that a pool has: `user.hugetlb2.targets`. The lab has machines with several
//! nodes.

use crate::support::{FAIL, FOLIO, Pool, SIZE, TARGETS, TargetLine, get, run, set};
use rustix::io::Errno;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

fn sum(lines: &[TargetLine], name: &str) -> u64 {
    lines.iter().map(|line| line.number(name)).sum()
}

#[test]
fn the_targets_share_the_memory_of_machine_and_pool() {
    let pool = Pool::small(8);
    let lines = TargetLine::all(&pool);
    for line in &lines {
        let path = format!("/sys/devices/system/node/node{}/meminfo", line.node);
        let kib = line.number("Capacity") / 1024;
        let told = fs::read_to_string(&path).unwrap();
        let first = told.lines().find(|line| line.contains(" MemTotal:")).unwrap();
        assert!(first.ends_with(&format!(" {kib} kB")), "{first}: {kib}");
    }
    assert!(lines.iter().any(|line| line.kind == "dram"), "some node has processors");
    assert_eq!((sum(&lines, "pool_bytes"), sum(&lines, "free_bytes")), (8 * FOLIO, 8 * FOLIO));
    fs::write(pool.join("file"), vec![7; 3 * FOLIO as usize]).unwrap();
    let lines = TargetLine::all(&pool);
    assert_eq!((sum(&lines, "pool_bytes"), sum(&lines, "free_bytes")), (8 * FOLIO, 5 * FOLIO));
    pool.unmount();
}

#[test]
fn the_targets_follow_a_resize_of_the_pool() {
    let pool = Pool::small(4);
    for pages in [6, 2] {
        set(pool.path(), SIZE, (pages * FOLIO).to_string()).unwrap();
        let lines = TargetLine::all(&pool);
        assert_eq!(sum(&lines, "pool_bytes"), pages * FOLIO);
        assert_eq!(sum(&lines, "free_bytes"), pages * FOLIO);
    }
    pool.unmount();
}

#[test]
fn the_targets_are_for_everybody_and_for_reading_only() {
    let pool = Pool::small(2);
    let around = pool.path().parent().expect("the directory of the test").to_owned();
    fs::set_permissions(around, fs::Permissions::from_mode(0o755)).unwrap();
    let mut reader = Command::new("setpriv");
    reader.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
    reader.args(["getfattr", "--absolute-names", "--only-values", "-n", TARGETS]);
    let said = run(reader.arg(pool.path()));
    assert_eq!(said, get(pool.path(), TARGETS).unwrap());
    assert_eq!(set(pool.path(), TARGETS, "0 dram"), Err(Errno::OPNOTSUPP));
    fs::write(pool.join("file"), "").unwrap();
    assert_eq!(get(pool.join("file"), TARGETS), Err(Errno::NODATA));
    pool.unmount();
}

#[test]
fn targets_that_could_not_be_read_are_read_at_the_next_request() {
    let pool = Pool::small(2);
    set(pool.path(), FAIL, "2 EMFILE").unwrap();
    assert_eq!(get(pool.path(), TARGETS), Err(Errno::NFILE));
    assert!(TargetLine::all(&pool).iter().all(|line| line.number("Capacity") > 0));
    pool.unmount();
}
