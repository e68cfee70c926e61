//! The attribute that asks for NUMA nodes, on the nodes of this machine. A pool of one node has no
//! choice; the words are kept, inherited and answered all the same.

use crate::support::{
    FOLIO, PLACEMENT, Pool, REFUSAL, get, hugetlb2, kill_worker, run, set, status_and_error,
};
use rustix::fs::{CWD, FileType, Mode, XattrFlags, mknodat, removexattr, setxattr};
use rustix::io::Errno;
use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

/// Words that each pool accepts, as they are read again.
const WORDS: [&str; 10] = [
    "caller",
    "local",
    "bind:0",
    "preferred:0",
    "interleave:0",
    "interleave:all",
    "weighted-interleave:0*3",
    "weighted-interleave:all",
    "best:Latency",
    "strict:best:Capacity",
];

/// The words that are asked for.
fn asked(path: impl AsRef<Path>) -> String {
    let text = get(path, PLACEMENT).unwrap();
    text.split_once('\n').expect("a line").0.to_owned()
}

fn is_listed(path: &Path) -> bool {
    let mut names = vec![0; 64 << 10];
    let length = rustix::fs::listxattr(path, &mut names[..]).unwrap();
    names[..length].split(|byte| *byte == 0).any(|name| name == PLACEMENT.as_bytes())
}

/// A pool with a file and a directory, beside the root.
fn places() -> (Pool, [std::path::PathBuf; 3]) {
    let pool = Pool::small(8);
    let places = [pool.path(), pool.join("directory"), pool.join("file")];
    fs::create_dir(&places[1]).unwrap();
    fs::write(&places[2], vec![7; 2 * FOLIO as usize]).unwrap();
    (pool, places)
}

#[test]
fn each_word_is_accepted_and_answered() {
    let (pool, places) = places();
    for path in &places {
        assert_eq!(asked(path), "caller", "nothing is asked for");
        for words in WORDS {
            set(path, PLACEMENT, format!("{words}\n")).unwrap();
            assert_eq!(asked(path), words);
        }
        set(path, PLACEMENT, "weighted-interleave:0*1\0").unwrap();
        assert_eq!(asked(path), "weighted-interleave:0*1");
    }
    let file = &places[2];
    File::options().write(true).open(file).unwrap().set_len(5 * FOLIO).unwrap();
    assert_eq!(pool.free_pages(), 3);
    pool.unmount();
}

#[test]
fn a_bad_word_is_refused_with_its_reason() {
    let (_pool, places) = places();
    for path in &places {
        set(path, PLACEMENT, "strict:local").unwrap();
        for (words, reason) in [
            ("", "no placement; expected caller, local, bind:NODES"),
            ("membind:0", "\"membind:0\" is no placement; expected caller, local, bind:NODES"),
            ("bind:", "bind needs nodes behind a colon, as in 0-1,3, or all"),
            ("bind:0-x", "\"x\" is not the number of a node"),
            ("interleave:0,1000", "the pool has no memory on node 1000; it has 0"),
            ("best:Speed", "\"Speed\" is no quality of memory; expected best:Latency"),
            ("weighted-interleave:0*0", "\"0\" is no weight; expected 1 to 255"),
        ] {
            assert_eq!(set(path, PLACEMENT, words), Err(Errno::INVAL), "{words:?}");
            let said = get(path, REFUSAL).unwrap();
            assert!(said.starts_with(reason), "{words:?}: {said}");
        }
        assert_eq!(asked(path), "strict:local", "a refusal changes nothing");
    }
}

#[test]
fn a_placement_is_listed_as_long_as_it_is_set() {
    let (_pool, places) = places();
    for path in &places {
        assert!(!is_listed(path));
        assert_eq!(removexattr(path, PLACEMENT), Err(Errno::NODATA));
        let flagged = |flags| setxattr(path, PLACEMENT, b"local", flags);
        assert_eq!(flagged(XattrFlags::REPLACE), Err(Errno::NODATA));
        flagged(XattrFlags::CREATE).unwrap();
        assert_eq!(flagged(XattrFlags::CREATE), Err(Errno::EXIST));
        assert!(is_listed(path));
        removexattr(path, PLACEMENT).unwrap();
        assert!(!is_listed(path));
        assert_eq!(asked(path), "caller");
    }
}

#[test]
fn what_is_made_in_a_directory_inherits_its_placement() {
    let (pool, [root, directory, file]) = places();
    set(&root, PLACEMENT, "local").unwrap();
    set(&directory, PLACEMENT, "strict:bind:0").unwrap();
    let below = |name: &str| directory.join(name);
    fs::write(below("file"), "text").unwrap();
    mknodat(CWD, below("node"), FileType::RegularFile, Mode::RUSR, 0).unwrap();
    fs::create_dir_all(below("a/b")).unwrap();
    fs::write(below("a/b/file"), "text").unwrap();
    for name in ["file", "node", "a", "a/b", "a/b/file"] {
        assert_eq!(asked(below(name)), "strict:bind:0", "{name}");
    }
    fs::write(pool.join("later"), "text").unwrap();
    assert_eq!([asked(pool.join("later")), asked(&file)], ["local", "caller"]);
    std::os::unix::fs::symlink("file", below("link")).unwrap();
    mknodat(CWD, below("fifo"), FileType::Fifo, Mode::RUSR, 0).unwrap();
    for name in ["link", "fifo"] {
        let value = rustix::fs::lgetxattr(below(name), PLACEMENT, &mut [0_u8; 64][..]);
        assert_eq!(value, Err(Errno::NODATA), "{name}");
    }
}

#[test]
fn a_placement_stays_with_its_file_and_its_directory() {
    let (pool, [_, directory, file]) = places();
    set(&directory, PLACEMENT, "interleave:0").unwrap();
    fs::write(directory.join("file"), "text").unwrap();
    set(&directory, PLACEMENT, "local").unwrap();
    fs::rename(directory.join("file"), pool.join("moved")).unwrap();
    assert_eq!(asked(pool.join("moved")), "interleave:0");
    fs::hard_link(&file, directory.join("linked")).unwrap();
    fs::rename(&file, directory.join("renamed")).unwrap();
    assert_eq!([asked(directory.join("linked")), asked(&directory)], ["caller", "local"]);
}

#[test]
fn a_placement_survives_deaths_and_upgrades() {
    let (mut pool, [_, directory, file]) = places();
    set(&directory, PLACEMENT, "preferred:0").unwrap();
    set(&file, PLACEMENT, "strict:local").unwrap();
    let holds = |name: &str| {
        fs::write(directory.join(name), "text").unwrap();
        assert_eq!(asked(directory.join(name)), "preferred:0");
        assert_eq!([asked(&file), asked(&directory)], ["strict:local", "preferred:0"]);
    };
    kill_worker(&pool);
    holds("one");
    run(hugetlb2().arg("upgrade").arg(pool.path()));
    pool.note_new_daemon();
    holds("two");
    pool.check();
}

#[test]
fn the_answer_tells_the_bytes_of_each_node() {
    let (pool, [_, directory, file]) = places();
    set(&directory, PLACEMENT, "bind:0").unwrap();
    assert_eq!(get(&directory, PLACEMENT).unwrap(), "bind:0\n");
    let empty = directory.join("empty");
    drop(File::create(&empty).unwrap());
    assert_eq!(get(&empty, PLACEMENT).unwrap(), "bind:0\n");
    let text = get(&file, PLACEMENT).unwrap();
    let bytes = |line: &str| line.split(' ').nth(1).unwrap().parse::<u64>().unwrap();
    assert_eq!(text.lines().skip(1).map(bytes).sum::<u64>(), 2 * FOLIO);
    if pool.counters().keys().filter(|name| name.starts_with("reserve_bytes_node")).count() == 1 {
        assert_eq!(text, format!("caller\n0 {}\n", 2 * FOLIO));
    }
}

#[test]
fn a_copy_with_its_attributes_asks_for_the_same_nodes() {
    let (_pool, [_, directory, file]) = places();
    set(&file, PLACEMENT, "strict:interleave:0").unwrap();
    let copy = directory.join("copy");
    run(Command::new("cp").arg("--preserve=xattr").args([&file, &copy]));
    assert_eq!(asked(&copy), "strict:interleave:0");
}

#[test]
fn a_placement_needs_the_right_to_write() {
    let (_pool, [_, directory, file]) = places();
    for path in [&directory, &file] {
        let mut other = Command::new("setpriv");
        other.args(["--reuid=65534", "--regid=65534", "--clear-groups", "setfattr"]);
        other.args(["-n", PLACEMENT, "-v", "local"]).arg(path);
        let (status, error) = status_and_error(&mut other);
        assert_ne!(status, 0, "{error}");
        assert_eq!(asked(path), "caller");
    }
}
