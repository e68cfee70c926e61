//! Files on two NUMA nodes: their memory comes from the nodes that are asked for.

use super::cases;
use super::nodes::Cpuset;
use crate::support::{
    FOLIO, MAP, PLACEMENT, Pool, REFUSAL, REPAIR, Toucher, get, kill_worker, poison, set,
};
use hugetlb2fs::sys::policy::{Policy, set_for_thread};
use hugetlb2fs::units::NumaNode;
use rustix::fs::Uid;
use rustix::io::Errno;
use rustix::thread::{CpuSet, sched_setaffinity, set_thread_res_uid};
use std::fs::{File, Permissions, set_permissions};
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

/// Pages of the pool; each node has half of them.
const PAGES: u64 = 40;

cases! {
    TWO_NODES: each_word_places_a_file, a_files_memory_follows_the_callers_policy,
        the_policy_of_another_users_program_counts, the_callers_cpuset_bounds_its_policy,
        a_strict_file_does_not_grow_onto_another_node,
        memory_on_another_node_is_told_with_the_reason, memory_moves_while_a_program_uses_it,
        memory_that_moves_survives_deaths;
}

/// A file of a directory, made and sized by this thread.
fn sized(directory: &Path, pages: u64) -> (std::path::PathBuf, std::io::Result<()>) {
    let path = directory.join("file");
    let grown = File::create(&path).unwrap().set_len(pages * FOLIO);
    (path, grown)
}

/// The node of each page of a file.
pub fn nodes(path: &Path) -> Vec<u64> {
    let number = |word: &str| match word.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).expect("a number"),
        None => word.parse().expect("a number"),
    };
    let pages = |line: &str| {
        let words: Vec<&str> = line.split(' ').collect();
        vec![number(words[3]); (number(words[1]) / FOLIO) as usize]
    };
    get(path, MAP).unwrap().lines().flat_map(pages).collect()
}

/// The lines behind the words.
pub fn told(path: &Path) -> Vec<String> {
    get(path, PLACEMENT).unwrap().lines().skip(1).map(str::to_owned).collect()
}

/// Runs `run` on a thread on the processor of this number: the number of its node.
pub fn on_processor<T: Send>(number: usize, run: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let pinned = scope.spawn(move || {
            let mut set = CpuSet::new();
            set.set(number);
            sched_setaffinity(None, &set).unwrap();
            run()
        });
        pinned.join().unwrap()
    })
}

fn each_word_places_a_file() {
    let pool = Pool::small(PAGES);
    let rows: [(&str, &[u64]); 11] = [
        ("bind:1", &[1, 1, 1, 1, 1, 1]),
        ("preferred:0", &[0, 0, 0, 0, 0, 0]),
        ("strict:bind:1", &[1, 1, 1, 1, 1, 1]),
        ("bind:all", &[0, 0, 0, 0, 0, 0]),
        ("interleave:all", &[0, 1, 0, 1, 0, 1]),
        ("interleave:1", &[1, 1, 1, 1, 1, 1]),
        ("weighted-interleave:0*2,1", &[0, 0, 1, 0, 0, 1]),
        ("strict:weighted-interleave:all", &[0, 1, 0, 1, 0, 1]),
        ("local", &[0, 0, 0, 0, 0, 0]),
        ("best:Latency", &[0, 0, 0, 0, 0, 0]),
        ("best:Bandwidth", &[0, 0, 0, 0, 0, 0]),
    ];
    for (words, expected) in rows {
        set(pool.path(), PLACEMENT, words).unwrap();
        let (path, grown) = on_processor(0, || sized(&pool.path(), 6));
        grown.unwrap();
        assert_eq!(nodes(&path), expected, "{words}");
        assert!(told(&path).iter().all(|line| line.split(' ').count() == 2), "{words}");
        std::fs::remove_file(path).unwrap();
        pool.wait_for_free_pages(PAGES);
    }
    // A file that grows in pieces, by different workers, is laid out as one that grows at once.
    set(pool.path(), PLACEMENT, "interleave:0-1").unwrap();
    let path = pool.join("file");
    let file = File::create(&path).unwrap();
    for pages in [1, 2, 5, 8] {
        file.set_len(pages * FOLIO).unwrap();
        kill_worker(&pool);
    }
    assert_eq!(nodes(&path), [0, 1, 0, 1, 0, 1, 0, 1]);
    pool.check();
    drop(file);
    pool.unmount();
}

fn a_files_memory_follows_the_callers_policy() {
    let pool = Pool::small(PAGES);
    let node = NumaNode;
    let rows = [
        (0, Policy::Default, 0),
        (1, Policy::Default, 1),
        (1, Policy::Local, 1),
        (0, Policy::Bind(node(1)), 1),
        (1, Policy::Prefer(node(0)), 0),
    ];
    for (processor, policy, expected) in rows {
        let (path, grown) = on_processor(processor, || {
            set_for_thread(policy).unwrap();
            sized(&pool.path(), 4)
        });
        grown.unwrap();
        assert_eq!(nodes(&path), [expected; 4], "{policy:?} on processor {processor}");
        std::fs::remove_file(path).unwrap();
        pool.wait_for_free_pages(PAGES);
    }
    // Each thread that makes the file grow decides for the pages that it takes.
    let path = pool.join("file");
    let file = File::create(&path).unwrap();
    on_processor(1, || file.set_len(2 * FOLIO)).unwrap();
    on_processor(0, || file.set_len(4 * FOLIO)).unwrap();
    assert_eq!(nodes(&path), [1, 1, 0, 0]);
    drop(file);
    pool.unmount();
}

/// The thread takes the identity of another user before it opens the file.
fn the_policy_of_another_users_program_counts() {
    let pool = Pool::small(PAGES);
    set_permissions(pool.path(), Permissions::from_mode(0o777)).unwrap();
    let (path, grown) = on_processor(0, || {
        let user = Uid::from_raw(65534);
        set_thread_res_uid(user, user, user).unwrap();
        set_for_thread(Policy::Bind(NumaNode(1))).unwrap();
        sized(&pool.path(), 4)
    });
    grown.unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().uid(), 65534);
    assert_eq!(nodes(&path), [1; 4]);
    pool.unmount();
}

fn the_callers_cpuset_bounds_its_policy() {
    let pool = Pool::small(PAGES);
    let cpuset = Cpuset::enter();
    let (path, grown) = on_processor(0, || sized(&pool.path(), 4));
    grown.unwrap();
    assert_eq!(nodes(&path), [1; 4], "the processor is node 0's, and the cpuset allows node 1");
    on_processor(1, || set(&path, PLACEMENT, "local")).unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    on_processor(0, || file.set_len(6 * FOLIO)).unwrap();
    assert_eq!(nodes(&path), [1, 1, 1, 1, 0, 0], "the file's owner asks, not the caller");
    drop(file);
    pool.unmount();
    drop(cpuset);
}

fn a_strict_file_does_not_grow_onto_another_node() {
    let pool = Pool::small(PAGES);
    set(pool.path(), PLACEMENT, "strict:bind:1").unwrap();
    let (path, grown) = sized(&pool.path(), PAGES / 2 + 1);
    assert_eq!(grown.unwrap_err().kind(), ErrorKind::StorageFull);
    assert_eq!((std::fs::metadata(&path).unwrap().len(), pool.free_pages()), (0, PAGES));
    let why = get(&path, REFUSAL).unwrap();
    assert!(why.contains("asks for 21 free pages of the NUMA nodes 1: node 1 has 20"), "{why}");
    let file = File::options().write(true).open(&path).unwrap();
    file.set_len(PAGES / 2 * FOLIO).unwrap();
    assert_eq!(nodes(&path), [1; PAGES as usize / 2]);
    // Strict words that cannot be had change nothing.
    let refused = set(&path, PLACEMENT, "strict:interleave:0");
    assert_eq!(refused, Ok(()), "node 0 has room");
    assert_eq!(nodes(&path), [0; PAGES as usize / 2]);
    set(&path, PLACEMENT, "bind:1").unwrap();
    file.set_len((PAGES / 2 + 1) * FOLIO).unwrap();
    assert_eq!(nodes(&path).last(), Some(&0), "it asks for no more than what can be had");
    drop(file);
    pool.check();
    pool.unmount();
}

fn memory_on_another_node_is_told_with_the_reason() {
    let pool = Pool::small(PAGES);
    set(pool.path(), PLACEMENT, "bind:1").unwrap();
    let (path, grown) = sized(&pool.path(), PAGES / 2 + 4);
    grown.unwrap();
    let (half, rest) = (PAGES / 2 * FOLIO, 4 * FOLIO);
    assert_eq!(told(&path), [format!("0 {rest} full"), format!("1 {half}")]);
    set(&path, PLACEMENT, "bind:0").unwrap();
    assert_eq!(told(&path), [format!("0 {half}"), format!("1 {rest} full")], "it has moved");
    let refused = set(&path, PLACEMENT, "strict:bind:0");
    assert_eq!(refused, Err(Errno::NOSPC));
    assert_eq!(get(&path, PLACEMENT).unwrap().lines().next(), Some("bind:0"));
    on_processor(0, || set(&path, PLACEMENT, "caller")).unwrap();
    assert_eq!(told(&path), [format!("0 {half}"), format!("1 {rest}")]);
    pool.check();
    pool.unmount();
}

/// A file of eight pages on node 0, each byte of which tells its page, and the bytes.
pub fn numbered(pool: &Pool) -> (std::path::PathBuf, Vec<u8>) {
    let path = pool.join("file");
    File::create(&path).unwrap();
    set(&path, PLACEMENT, "bind:0").unwrap();
    let bytes: Vec<u8> = (0..8 * FOLIO).map(|at| (at / FOLIO + at / 4096) as u8).collect();
    std::fs::write(&path, &bytes).unwrap();
    assert_eq!(nodes(&path), [0; 8]);
    (path, bytes)
}

fn memory_moves_while_a_program_uses_it() {
    let pool = Pool::small(PAGES);
    let (path, bytes) = numbered(&pool);
    let mut program = Toucher::mapping(&path, 8 * FOLIO);
    poison(&path, 3 * FOLIO, 4096).unwrap();
    let half = 4 * FOLIO;
    let everywhere = [format!("0 {half}"), format!("1 {half}")];
    for (words, expected) in
        [("bind:1", &[format!("1 {}", 2 * half)][..]), ("interleave:0-1", &everywhere)]
    {
        set(&path, PLACEMENT, words).unwrap();
        assert_eq!(told(&path), expected, "{words}");
        assert_eq!(program.walk(), [3 * FOLIO], "the quarantined subpage alone is out of reach");
        pool.check();
    }
    set(&path, REPAIR, format!("salvage {:#x} 4096", 3 * FOLIO)).unwrap();
    assert!(std::fs::read(&path).unwrap() == bytes, "bytes have changed");
    assert_eq!(pool.free_pages(), PAGES - 8);
    pool.check();
    drop(program);
    pool.unmount();
}

fn memory_that_moves_survives_deaths() {
    let pool = Pool::small(PAGES);
    let (path, bytes) = numbered(&pool);
    for round in 0..12 {
        let words = format!("bind:{}", (round + 1) % 2);
        std::thread::scope(|scope| {
            let moved = scope.spawn(|| set(&path, PLACEMENT, &words));
            kill_worker(&pool);
            kill_worker(&pool);
            moved.join().unwrap().unwrap();
        });
    }
    assert!(std::fs::read(&path).unwrap() == bytes, "bytes have changed");
    pool.check();
    assert_eq!(pool.free_pages(), PAGES - 8);
    set(&path, PLACEMENT, "bind:1").unwrap();
    assert_eq!(nodes(&path), [1; 8]);
    pool.check();
    pool.unmount();
}
