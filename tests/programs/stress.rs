//! stress-ng: many unusual calls on files, each verified.

use crate::support::Pool;
use crate::{Tmpfs, at_length, outcome, tests};
use std::path::Path;
use std::process::Command;

tests!(stress_ng_finds_nothing_wrong);

/// Stressors, the number of their operations, and further arguments.
const STRESSORS: &[(&str, u64, &[&str])] = &[
    ("mmap", 10, &["--mmap-file", "--mmap-bytes", "8m"]),
    ("hdd", 500, &["--hdd-bytes", "8m"]),
    ("dir", 50, &[]),
    ("fallocate", 30, &["--fallocate-bytes", "16m"]),
    ("rename", 500, &[]),
    ("link", 1, &[]),
    ("xattr", 1, &[]),
    ("seek", 500, &["--seek-size", "4m"]),
    ("flock", 1000, &[]),
    ("madvise", 10, &[]),
    ("userfaultfd", 200, &["--userfaultfd-bytes", "4m"]),
];

/// Runs stress-ng and returns its last words.
fn run(directory: &Path) -> String {
    let mut command = Command::new("stress-ng");
    // The number of operations bounds the run. The limit of time is for a run that hangs.
    command.arg("--temp-path").arg(directory).args(["--verify", "--timeout", "300"]);
    for (name, operations, more) in STRESSORS {
        let operations = (operations * at_length(8)).to_string();
        command
            .args([&format!("--{name}"), "1", &format!("--{name}-ops"), &operations])
            .args(*more);
    }
    let (output, text) = outcome(&mut command);
    assert!(output.status.success(), "{}\n{text}", output.status);
    assert!(!text.contains("fail:"), "{text}");
    text.lines().last().unwrap_or_default().to_owned()
}

fn stress_ng_finds_nothing_wrong() {
    let (tmpfs, pool) = (Tmpfs::mount(128), Pool::small(64));
    let (theirs, ours) = (run(&tmpfs.path()), run(&pool.path()));
    println!("stress-ng  tmpfs     {theirs}\n           hugetlb2  {ours}");
    pool.check();
    pool.unmount();
}
