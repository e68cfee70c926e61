//! The parts that a pool has on NUMA nodes, as `nodes=` names them.

use super::cases;
use super::nodes::killed;
use super::placement::{nodes, on_processor};
use crate::support::place::Place;
use crate::support::{
    CHECK, FOLIO, GIB, OPTIONS, PLACEMENT, Pool, REFUSAL, SIZE, TARGETS, get, kill_worker, limits,
    run, set, status_and_error,
};
use rustix::io::Errno;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;

const MIB: u64 = 1 << 20;
const USAGE: i32 = 1;
const FAILED: i32 = 32;

cases! {
    TWO_NODES: a_pool_has_the_parts_that_nodes_names,
        a_node_that_cannot_give_its_part_refuses_the_mount, parts_are_resized_one_by_one,
        workers_are_killed_while_parts_are_resized, page_cache_makes_room_for_a_part;
    FOUR_NODES: memory_without_processors_is_taken_by_name_only, nodes_join_and_leave_a_pool;
    TWO_LARGE_NODES: a_gigantic_page_lies_on_each_named_node;
}

fn free_on(node: u32) -> u64 {
    let path = format!("/sys/devices/system/node/node{node}/meminfo");
    let text = fs::read_to_string(path).expect("the node is there");
    let line = text.lines().find(|line| line.contains("MemFree:")).expect("the line");
    line.split_ascii_whitespace().nth(3).and_then(|kib| kib.parse::<u64>().ok()).unwrap() * 1024
}

/// Pages and free pages of each node's part.
pub fn parts(mount_point: &Path) -> Vec<(u32, u64, u64)> {
    let counters = crate::support::counters(mount_point);
    let part = |node: u32| {
        let total = *counters.get(&format!("pages_total_node{node}"))?;
        Some((node, total, counters[&format!("pages_free_node{node}")]))
    };
    (0..4).filter_map(part).collect()
}

/// Makes a file of `pages` pages, whose words are `words`.
fn file_on(directory: &Path, name: &str, words: &str, pages: u64) -> File {
    let path = directory.join(name);
    let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    set(&path, PLACEMENT, words).unwrap();
    file.set_len(pages * FOLIO).unwrap();
    file
}

fn a_pool_has_the_parts_that_nodes_names() {
    type Parts<'a> = &'a [(u32, u64, u64)];
    let rows: [(&str, Parts<'_>); 5] = [
        ("nodes=1:128M,size=128M", &[(1, 64, 64)]),
        ("nodes=0:8M,1:24M", &[(0, 4, 4), (1, 12, 12)]),
        ("nodes=0,1,size=30M", &[(0, 8, 8), (1, 7, 7)]),
        ("size=32M,nodes=0-1", &[(0, 8, 8), (1, 8, 8)]),
        ("size=32M", &[(0, 8, 8), (1, 8, 8)]),
    ];
    for (options, expected) in rows {
        let before = [free_on(0), free_on(1)];
        let pool = Pool::mount(&format!("pagesize=2M,{options}"));
        assert_eq!(parts(&pool.path()), expected, "{options}");
        if let [(1, pages, _)] = expected {
            let taken = |node: usize| before[node].saturating_sub(free_on(node as u32));
            println!("{options}: {} and {} MiB less are free", taken(0) / MIB, taken(1) / MIB);
            // Memory of an earlier case may still be on its way back.
            let half = pages * FOLIO / 2;
            assert!(taken(1) >= half && taken(0) < half, "it is node 1's");
            let file = File::create(pool.join("file")).unwrap();
            file.set_len(pages * FOLIO).unwrap();
            assert_eq!(nodes(&pool.join("file")), vec![1; *pages as usize]);
            fs::remove_file(pool.join("file")).unwrap();
            drop(file);
            pool.wait_for_free_pages(*pages);
        }
        kill_worker(&pool);
        assert_eq!(parts(&pool.path()), expected, "{options}, by the next worker");
        pool.check();
        pool.unmount();
    }
    let pool = Pool::mount("pagesize=2M,nodes=0:8M,1:24M");
    let file = file_on(&pool.path(), "file", "strict:bind:1", 12);
    assert_eq!(nodes(&pool.join("file")), [1; 12]);
    assert_eq!(parts(&pool.path()), [(0, 4, 4), (1, 12, 0)]);
    let status = run(crate::support::hugetlb2().arg("status").arg(pool.path()));
    assert!(status.contains("node 1      12, 24 MiB: 12 used, 0 free"), "{status}");
    drop(file);
    pool.unmount();
}

fn a_node_that_cannot_give_its_part_refuses_the_mount() {
    let place = Place::new();
    let too_much = (free_on(0) + 8 * MIB).next_multiple_of(FOLIO);
    for options in [format!("nodes=0:{too_much},1:8M"), format!("nodes=0,1,size={}", 2 * too_much)]
    {
        let options = format!("pagesize=2M,{options}");
        let before = free_on(1);
        place.assert_refused(&mut place.mount(&options), FAILED, "");
        assert!(free_on(1) + 64 * MIB > before, "the memory is given back");
    }
    let rows = [
        (format!("nodes=0:{too_much},1:8M"), FAILED, "NUMA node 0 cannot give"),
        ("nodes=0:8M,2:8M".to_owned(), FAILED, "NUMA node 2 has no memory"),
        ("nodes=0,2,size=8M".to_owned(), FAILED, "within the cpuset of the daemon, has 0,1"),
        ("nodes=0:8M,1:8M,size=8M".to_owned(), USAGE, "make them agree"),
        ("nodes=0:1M,1:8M".to_owned(), USAGE, "node 0: a size of 1048576 bytes is less than"),
        ("nodes=0,1".to_owned(), USAGE, "option size is required"),
    ];
    for (options, status, word) in rows {
        place.assert_refused(&mut place.mount(&format!("pagesize=2M,{options}")), status, word);
    }
}

fn parts_are_resized_one_by_one() {
    let pool = Pool::mount("pagesize=2M,nodes=0:8M,1:24M");
    let remount = |options: &str| {
        let mut command = crate::support::mount_hugetlb2();
        command.arg("source").arg(pool.path()).arg("-o").arg(format!("remount,{options}"));
        command
    };
    let file = file_on(&pool.path(), "file", "strict:bind:1", 6);
    for (options, expected) in [
        ("nodes=0:16M,1:24M", [(0, 8, 8), (1, 12, 6)]),
        ("nodes=0:2M,1:64M", [(0, 1, 1), (1, 32, 26)]),
        ("nodes=0:32M,1:12M", [(0, 16, 16), (1, 6, 0)]),
        ("nodes=0-1", [(0, 16, 16), (1, 6, 0)]),
        ("size=60M", [(0, 16, 16), (1, 14, 8)]),
    ] {
        run(&mut remount(options));
        assert_eq!(parts(&pool.path()), expected, "{options}");
        kill_worker(&pool);
        assert_eq!(parts(&pool.path()), expected, "{options}, by the next worker");
        pool.check();
    }
    let too_much = (free_on(0) + 64 * MIB).next_multiple_of(FOLIO);
    let rows = [
        ("nodes=0:32M,1:10M".to_owned(), FAILED, "6 of the 14 pages of NUMA node 1 are in use"),
        // Node 1 would shrink, and does not, as node 0 cannot grow.
        (format!("nodes=0:{too_much},1:12M"), FAILED, "NUMA node 0 cannot give"),
        (
            "nodes=0:32M".to_owned(),
            FAILED,
            "has 14 pages of NUMA node 1, which the request does not",
        ),
        ("nodes=0:32M,1:0".to_owned(), FAILED, "6 of the 14 pages of NUMA node 1 are in use"),
        ("nodes=0:0,1:0".to_owned(), FAILED, "a pool without pages"),
        ("nodes=0:32M,1:28M,2:2M".to_owned(), FAILED, "NUMA node 2 has no memory for the pool"),
        ("nodes=0:32M,1:32M,size=8M".to_owned(), USAGE, "make them agree"),
        ("nodes=1:32M,0:32M".to_owned(), USAGE, "names no nodes"),
    ];
    for (options, status, word) in rows {
        let (found, error) = status_and_error(&mut remount(&options));
        assert_eq!(found, status, "{options}: {error}");
        assert!(error.contains(word), "{options}: {word:?} is not in {error:?}");
        assert_eq!(parts(&pool.path()), [(0, 16, 16), (1, 14, 8)], "{options}");
        assert_eq!(get(pool.path(), CHECK).unwrap(), "");
    }
    drop(file);
    pool.unmount();
}

fn memory_without_processors_is_taken_by_name_only() {
    let pool = Pool::small(8);
    assert_eq!(parts(&pool.path()), [(0, 4, 4), (1, 4, 4)]);
    pool.unmount();
    let pool = Pool::mount("pagesize=2M,nodes=0:4M,2:8M");
    assert_eq!(parts(&pool.path()), [(0, 2, 2), (2, 4, 4)]);
    let file = file_on(&pool.path(), "file", "strict:bind:2", 4);
    assert_eq!(nodes(&pool.join("file")), [2; 4]);
    pool.check();
    drop(file);
    pool.unmount();
}

/// The refusal of the size `size`, whose errno is `errno`.
fn refusal(pool: &Pool, size: &str, errno: Errno) -> String {
    assert_eq!(set(pool.path(), SIZE, size), Err(errno), "{size}");
    get(pool.path(), REFUSAL).unwrap()
}

fn nodes_in_force(pool: &Pool) -> String {
    let options = get(pool.path(), OPTIONS).unwrap();
    options.lines().find_map(|line| line.strip_prefix("nodes ")).expect("the option").to_owned()
}

fn nodes_join_and_leave_a_pool() {
    let pool = Pool::mount("pagesize=2M,nodes=0:8M,1:8M");
    let before = free_on(2);
    set(pool.path(), SIZE, "0:8M,1:8M,2:32M").unwrap();
    assert_eq!(parts(&pool.path()), [(0, 4, 4), (1, 4, 4), (2, 16, 16)]);
    assert!(free_on(2) + 32 * MIB <= before, "the memory is node 2's");
    assert_eq!(nodes_in_force(&pool), "0,1,2");
    let file = file_on(&pool.path(), "file", "strict:bind:2", 3);
    file.write_all_at(&[7; 3 * FOLIO as usize], 0).unwrap();
    let all = file_on(&pool.path(), "all", "interleave:all", 3);
    assert_eq!(nodes(&pool.join("file")), [2; 3]);
    assert_eq!(nodes(&pool.join("all")), [0, 1, 2], "a placement knows the node");
    kill_worker(&pool);
    assert_eq!(parts(&pool.path()), [(0, 4, 3), (1, 4, 3), (2, 16, 12)]);
    let why = refusal(&pool, "0:8M,1:8M,2:0", Errno::BUSY);
    assert!(why.starts_with("4 of the 16 pages of NUMA node 2 are in use"), "{why}");
    set(pool.join("file"), PLACEMENT, "strict:bind:0").unwrap();
    set(pool.join("all"), PLACEMENT, "strict:bind:1").unwrap();
    set(pool.path(), SIZE, "0:8M,1:8M,2:0").unwrap();
    assert_eq!(parts(&pool.path()), [(0, 4, 1), (1, 4, 1)]);
    assert!(fs::read(pool.join("file")).unwrap() == [7; 3 * FOLIO as usize]);
    assert_eq!(nodes_in_force(&pool), "0,1");
    let targets = get(pool.path(), TARGETS).unwrap();
    assert!(targets.lines().all(|line| !line.starts_with("2 ")), "{targets}");
    let placed = set(pool.join("file"), PLACEMENT, "bind:2");
    assert_eq!(placed, Err(Errno::INVAL), "the pool has no memory there");
    let mut remount = crate::support::mount_hugetlb2();
    run(remount.arg("source").arg(pool.path()).args(["-o", "remount,nodes=0-3,size=40M"]));
    assert_eq!(parts(&pool.path()), [(0, 5, 2), (1, 5, 2), (2, 5, 5), (3, 5, 5)]);
    kill_worker(&pool);
    assert_eq!(nodes_in_force(&pool), "0,1,2,3");
    pool.check();
    drop((file, all));
    pool.unmount();
}

/// Sizes of the parts, in turn, and the pages that each part has then. Parts grow and shrink in one
/// change, and node 0 leaves and joins.
const TURNS: [(&str, &[(u32, u64)]); 3] = [
    ("0:80M,1:12M", &[(0, 40), (1, 6)]),
    ("0:0,1:72M", &[(1, 36)]),
    ("0:8M,1:24M", &[(0, 4), (1, 12)]),
];

/// Asserts that the pool has these parts, of which node 1 has the three pages of a file.
fn assert_parts(pool: &Pool, expected: &[(u32, u64)]) {
    let free = |(node, total): &(u32, u64)| (*node, *total, total - 3 * u64::from(*node == 1));
    assert_eq!(parts(&pool.path()), expected.iter().map(free).collect::<Vec<_>>());
    pool.check();
    assert_eq!(nodes(&pool.join("file")), [1; 3]);
}

fn workers_are_killed_while_parts_are_resized() {
    const ROUNDS: usize = 24;
    let pool = Pool::mount("pagesize=2M,nodes=0:8M,1:24M");
    let file = file_on(&pool.path(), "file", "strict:bind:1", 3);
    let mut halfway = 0;
    for round in 0..ROUNDS {
        let (size, expected) = TURNS[round % TURNS.len()];
        let before = [free_on(0), free_on(1)];
        std::thread::scope(|scope| {
            let resized = scope.spawn(|| set(pool.path(), SIZE, size));
            let moved = |node: u32| free_on(node).abs_diff(before[node as usize]);
            let has_begun = || moved(0).max(moved(1)) >= round as u64 % 8 * 8 * MIB;
            limits::until(limits::ANSWER, "memory that moves", || {
                resized.is_finished() || has_begun()
            });
            halfway += u32::from(!resized.is_finished());
            kill_worker(&pool);
            kill_worker(&pool);
            resized.join().expect("it is no panic").unwrap();
        });
        assert_parts(&pool, expected);
    }
    println!("{halfway} of {ROUNDS} workers died before the answer");
    drop(file);
    pool.unmount();
}

fn a_gigantic_page_lies_on_each_named_node() {
    let pool = Pool::mount("nodes=0:1G,1:1G");
    assert_eq!(parts(&pool.path()), [(0, 1, 1), (1, 1, 1)]);
    let file = file_on(&pool.path(), "file", "strict:bind:1", 2);
    assert_eq!(nodes(&pool.join("file")), [1; 2]);
    let second = File::create(pool.join("second")).unwrap();
    set(pool.join("second"), PLACEMENT, "strict:bind:1").unwrap();
    assert!(second.set_len(FOLIO).is_err(), "node 1 has one page");
    let why = refusal(&pool, "0:1G,1:0", Errno::BUSY);
    assert!(why.starts_with("1 of the 1 pages of NUMA node 1 are in use"), "{why}");
    let why = refusal(&pool, "0:1G,1:2G", Errno::NOSPC);
    assert!(why.starts_with("NUMA node 1 cannot give"), "{why}");
    kill_worker(&pool);
    assert_eq!(parts(&pool.path()), [(0, 1, 1), (1, 1, 0)]);
    fs::remove_file(pool.join("file")).unwrap();
    drop((file, second));
    pool.wait_for_free_pages(2);
    let before = free_on(1);
    set(pool.path(), SIZE, "0:1G,1:0").unwrap();
    assert_eq!(parts(&pool.path()), [(0, 1, 1)]);
    assert!(free_on(1) >= before + GIB / 2, "the memory is given back");
    set(pool.path(), SIZE, "0:1G,1:1G").unwrap();
    assert_eq!(parts(&pool.path()), [(0, 1, 1), (1, 1, 1)]);
    pool.check();
    pool.unmount();
    let pool = Pool::mount("nodes=1,size=1G");
    assert_eq!(parts(&pool.path()), [(1, 1, 1)]);
    let file = file_on(&pool.path(), "file", "caller", 2);
    assert_eq!(nodes(&pool.join("file")), [1; 2]);
    drop(file);
    pool.unmount();
}

/// Reads from the disk until its cache has taken the memory of node 0, but for `left` bytes.
fn fill_with_page_cache(left: u64) {
    let mut disk = File::open("/dev/nvme0n1").expect("the machine has a disk");
    on_processor(0, || {
        let mut buffer = vec![0; MIB as usize];
        while free_on(0) > left {
            disk.read_exact(&mut buffer).expect("the disk is larger than the node");
        }
    });
    println!("free on node 0: {} MiB, on node 1: {} MiB", free_on(0) / MIB, free_on(1) / MIB);
}

fn page_cache_makes_room_for_a_part() {
    let killed_before = killed();
    fill_with_page_cache(48 * MIB);
    let pool = Pool::mount("pagesize=2M,nodes=0:144M,1:8M");
    fill_with_page_cache(48 * MIB);
    set(pool.path(), SIZE, "0:200M,1:8M").unwrap();
    assert_eq!(parts(&pool.path()), [(0, 100, 100), (1, 4, 4)]);
    assert_eq!(killed(), killed_before, "the OOM killer has killed processes");
    println!("{} MiB are in folios", pool.counter("huge_bytes_at_mount") / MIB);
    let file = file_on(&pool.path(), "file", "strict:bind:0", 100);
    assert_eq!(nodes(&pool.join("file")), [0; 100]);
    pool.check();
    drop(file);
    pool.unmount();
}
