//! pjdfstest: the rules of POSIX for files and directories.

use crate::support::Pool;
use crate::{Tmpfs, installed, outcome, tests};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

tests!(pjdfstest_passes_here_what_it_passes_on_tmpfs);

/// Users and groups that every Debian machine has.
const CONFIGURATION: &str = r#"
[features]
posix_fallocate = {}
rename_ctime = {}
utimensat = {}
utime_now = {}
[settings]
naptime = 0.01
[dummy_auth]
entries = [["nobody", "nogroup"], ["daemon", "daemon"]]
"#;

/// Tests that pass on tmpfs and cannot pass here, each with the reason.
const EXCLUDED: &[(&str, &str)] = &[];

/// The result of each test, and the closing line.
fn run(directory: &Path) -> (BTreeMap<String, String>, String) {
    let configuration = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(configuration.path(), CONFIGURATION).unwrap();
    let mut command = Command::new(installed("pjdfstest"));
    command.current_dir(directory).arg("-c").arg(configuration.path()).arg("-p").arg(directory);
    let (_, text) = outcome(&mut command);
    let result = |line: &str| {
        let (name, result) = line.split_once(char::is_whitespace)?;
        let result = result.trim();
        let known = ["ok", "FAILED"].contains(&result) || result.starts_with("skipped");
        (name.contains("::") && known).then(|| (name.to_owned(), result.to_owned()))
    };
    let closing = text.lines().find(|line| line.starts_with("Summary: "));
    let closing = closing.unwrap_or_else(|| panic!("no summary: {text}")).to_owned();
    (text.lines().filter_map(result).collect(), closing)
}

fn pjdfstest_passes_here_what_it_passes_on_tmpfs() {
    // A test makes a file of more than 2 GiB, so the pool needs that much memory.
    let (tmpfs, pool) = (Tmpfs::mount(2200), Pool::mount("pagesize=2M,size=2200M"));
    let (theirs, their_closing) = run(&tmpfs.path());
    let (ours, our_closing) = run(&pool.path());
    println!("pjdfstest  tmpfs     {their_closing}\n           hugetlb2  {our_closing}");
    assert!(theirs.len() > 300, "few results were read: {}", theirs.len());
    for (name, reason) in EXCLUDED {
        println!("           left out: {name}: {reason}");
    }
    let differs = |(name, result): &(&String, &String)| {
        *result == "ok"
            && ours.get(*name) != Some(*result)
            && EXCLUDED.iter().all(|(left_out, _)| left_out != name)
    };
    let worse: Vec<_> =
        theirs.iter().filter(differs).map(|(name, _)| (name, ours.get(name))).collect();
    assert!(worse.is_empty(), "these pass on tmpfs: {worse:?}");
    pool.check();
    pool.unmount();
}
