//! Memory that is cleared ahead (`clear=ahead`): on two NUMA nodes, beside memory errors, and on a
//! kernel that does not clear what it hands out.

use super::cases;
use super::moves::with_kill_points;
use super::parts::parts;
use super::placement::{nodes, on_processor};
use crate::support::{
    FOLIO, Held, PLACEMENT, POISON, Pool, SUBPAGE, Toucher, get, kill_worker, limits, set,
};
use hugetlb2fs::sys::policy::{Policy, set_for_thread};
use hugetlb2fs::units::NumaNode;
use rustix::io::Errno;
use std::fs::{self, File};
use std::path::Path;

cases! {
    SMALL: ready_memory_shows_no_foreign_bytes, an_error_behind_the_end_is_replaced,
        an_error_in_memory_that_is_ready_is_replaced;
    UNCLEARED: ready_memory_shows_none_where_the_kernel_does_not_clear;
    TWO_NODES_WITH_PROGRAMS: each_node_has_memory_ready, ready_memory_is_ready_for_a_placement;
}

const MADV_COLLAPSE: u32 = 25;

/// Pages of a pool of two nodes; each node has half of them.
const PAGES: u64 = 40;

/// The step at which each move of memory out of the pool is held.
const MOVE: &str = "move out: the reserve has given a piece";

/// Waits until nothing more is to be cleared.
fn wait_until_ready(pool: &Pool) {
    limits::until(limits::ANSWER, "memory that is ready", || pool.counter("clearing") == 0);
}

fn create(path: &Path) -> File {
    File::options().read(true).write(true).create_new(true).open(path).unwrap()
}

fn ready_memory_shows_no_foreign_bytes() {
    assert_no_foreign_bytes();
}

fn ready_memory_shows_none_where_the_kernel_does_not_clear() {
    let words = fs::read_to_string("/proc/cmdline").unwrap();
    assert!(words.contains("init_on_alloc=0"), "{words}");
    assert_no_foreign_bytes();
}

/// The attacker maps what may lie behind the end of his file before the file has a size.
fn assert_no_foreign_bytes() {
    const READY: u64 = 4;
    let pool = Pool::mount(&format!("pagesize=2M,size={},clear=ahead", 4 * READY * FOLIO));
    let path = pool.join("file");
    for round in 0..4 {
        std::fs::write(pool.join("dirt"), vec![0xab; (2 * READY * FOLIO) as usize]).unwrap();
        std::fs::remove_file(pool.join("dirt")).unwrap();
        let is_ready = || pool.counter("pages_ready") >= READY;
        limits::until(limits::ANSWER, "memory that is ready", is_ready);
        let file = std::fs::File::create_new(&path).unwrap();
        let mut attacker = Toucher::mapping(&path, READY * FOLIO);
        let attack = |attacker: &mut Toucher| {
            for at in (0..READY).map(|folio| folio * FOLIO) {
                attacker.ask(&format!("advise {at} {FOLIO} {MADV_COLLAPSE}"));
            }
        };
        attack(&mut attacker);
        file.set_len(READY * FOLIO).unwrap();
        attack(&mut attacker);
        let foreign = attacker.count(&format!("differ 0 {} 0", READY * FOLIO));
        assert_eq!(foreign, 0, "round {round}");
        drop((attacker, file));
        std::fs::remove_file(&path).unwrap();
        pool.wait_for_free_pages(4 * READY);
        pool.check();
    }
    pool.unmount();
}

// ---- memory errors ------------------------------------------------------------------------------

/// An empty file with memory behind its end, and a program that has mapped a folio of that.
fn mapped_behind_the_end(pool: &Pool, path: &Path) -> (File, Toucher) {
    wait_until_ready(pool);
    let file = create(path);
    let mut program = Toucher::mapping(path, 4 * FOLIO);
    assert_eq!(program.ask(&format!("advise {FOLIO} {FOLIO} {MADV_COLLAPSE}")), "ok");
    (file, program)
}

fn strike(program: &mut Toucher, at: u64) {
    program.ask(&format!("advise {at} {SUBPAGE} {}", libc::MADV_HWPOISON)); // also if it is killed by that
}

/// The file gets its size before the patrol has seen the error, and after it.
fn an_error_behind_the_end_is_replaced() {
    const BAD: u64 = FOLIO + 7 * SUBPAGE;
    let pool = Pool::mount(&format!("pagesize=2M,size={},clear=ahead", 24 * FOLIO));
    let path = pool.join("file");
    for round in 0..4 {
        kill_worker(&pool); // the next one has looked for the error of the last round
        let (file, mut program) = mapped_behind_the_end(&pool, &path);
        let before = hugetlb2fs::sys::memory_failures();
        strike(&mut program, BAD);
        assert!(hugetlb2fs::sys::memory_failures() > before, "the kernel has met an error");
        if round % 2 == 1 {
            kill_worker(&pool);
        }
        file.set_len(4 * FOLIO).unwrap();
        drop(program);
        let mut program = Toucher::mapping(&path, 4 * FOLIO);
        assert_eq!(program.walk(), [], "round {round}: no subpage of a new file is lost");
        assert_eq!(program.count(&format!("differ 0 {} 0", 4 * FOLIO)), 0);
        assert_eq!(get(&path, POISON), Err(Errno::NODATA));
        pool.check();
        drop((program, file));
        fs::remove_file(&path).unwrap();
        pool.wait_for_free_pages(24);
    }
    pool.unmount();
}

/// The patrol cannot look at memory that is ready: after an error anywhere, all of it goes back.
fn an_error_in_memory_that_is_ready_is_replaced() {
    let pool = Pool::mount(&format!("pagesize=2M,size={},clear=ahead", 24 * FOLIO));
    let path = pool.join("file");
    let (file, mut program) = mapped_behind_the_end(&pool, &path);
    file.set_len(4 * FOLIO).unwrap();
    wait_until_ready(&pool);
    assert!(pool.counter("pages_ready") > 0);
    assert_eq!(program.walk(), []);
    strike(&mut program, 7 * SUBPAGE);
    limits::until(limits::ANSWER, "that the patrol takes it all back", || {
        pool.counter("pages_ready") == 0
    });
    wait_until_ready(&pool);
    assert!(pool.counter("pages_ready") > 0, "and clears memory again");
    pool.check();
    drop((program, file));
    pool.unmount();
}

// ---- two nodes ----------------------------------------------------------------------------------

fn pool_of_two_nodes() -> Pool {
    let pool = with_kill_points(&format!("pagesize=2M,size={},clear=ahead", PAGES * FOLIO));
    wait_until_ready(&pool);
    pool
}

/// Makes a file by a thread on `processor`, and sizes it by one on `grower`.
fn sized(path: &Path, pages: u64, [processor, grower]: [usize; 2]) -> File {
    let file = on_processor(processor, || create(path));
    on_processor(grower, || file.set_len(pages * FOLIO)).unwrap();
    file
}

fn each_node_has_memory_ready() {
    const READY: u64 = PAGES / 2 / 4;
    let pool = pool_of_two_nodes();
    let path = pool.join("file");
    for node in [1, 0, 1] {
        let held = Held::at(&pool, MOVE);
        let file = sized(&path, READY, [node, node]);
        drop(held);
        assert_eq!(nodes(&path), [node as u64; READY as usize]);
        pool.check();
        drop(file);
        fs::remove_file(&path).unwrap();
        pool.wait_for_free_pages(PAGES);
        wait_until_ready(&pool);
    }
    // The thread that gives the file its size decides, and not the one that has made it.
    let file = sized(&path, READY, [0, 1]);
    assert_eq!(nodes(&path), [1; READY as usize]);
    pool.check();
    drop(file);
    fs::remove_file(&path).unwrap();
    pool.wait_for_free_pages(PAGES);
    // A node whose memory is ready for others is not full.
    wait_until_ready(&pool);
    let free = |on| (on, PAGES / 2, PAGES / 2);
    assert_eq!(parts(&pool.path()), [0, 1].map(free), "what is ready is free");
    let file = sized(&path, PAGES / 2, [1, 1]);
    assert_eq!(nodes(&path), [1; PAGES as usize / 2]);
    pool.check();
    drop(file);
    pool.unmount();
}

fn ready_memory_is_ready_for_a_placement() {
    const SIZE: u64 = 6;
    let pool = pool_of_two_nodes();
    let rows: [(&str, Policy, [u64; SIZE as usize]); 4] = [
        ("interleave:all", Policy::Default, [0, 1, 0, 1, 0, 1]),
        ("strict:bind:1", Policy::Default, [1; SIZE as usize]),
        ("weighted-interleave:0*2,1", Policy::Default, [0, 0, 1, 0, 0, 1]),
        ("caller", Policy::Bind(NumaNode(1)), [1; SIZE as usize]),
    ];
    for (number, (words, policy, expected)) in rows.into_iter().enumerate() {
        let directory = pool.join(number.to_string());
        fs::create_dir(&directory).unwrap();
        set(&directory, PLACEMENT, words).unwrap();
        let make = || {
            set_for_thread(policy).unwrap();
            let file = create(&directory.join("file"));
            file.set_len(SIZE * FOLIO).unwrap();
        };
        // The first file teaches the size and the placement.
        on_processor(0, make);
        assert_eq!(nodes(&directory.join("file")), expected, "{words}, the first file");
        fs::remove_file(directory.join("file")).unwrap();
        pool.wait_for_free_pages(PAGES);
        wait_until_ready(&pool);
        let held = Held::at(&pool, MOVE);
        on_processor(0, make);
        drop(held);
        assert_eq!(nodes(&directory.join("file")), expected, "{words}");
        pool.check();
        fs::remove_file(directory.join("file")).unwrap();
        pool.wait_for_free_pages(PAGES);
    }
    pool.unmount();
}
