//! Memory that moves to another NUMA node while a worker dies at each step, a device holds a part
//! of it, and memory errors hit it.

use super::cases;
use super::hw::{inject, listed};
use super::parts::parts;
use super::placement::{nodes, numbered, told};
use crate::support::{
    DIE, FOLIO, INJECT, PLACEMENT, Pool, REPAIR, SUBPAGE, Toucher, get, kill_worker, limits, set,
};
use rustix::io::Errno;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

/// Pages of the pool; each node has half of them.
const PAGES: u64 = 40;

cases! {
    TWO_NODES: pinned_memory_stays_and_is_told, memory_errors_move_with_their_file,
        memory_errors_hit_a_file_that_moves;
    TWO_NODES_WITH_PROGRAMS: a_death_at_each_step_of_a_move_leaves_no_trace;
    TWO_LARGE_NODES: a_death_at_each_step_of_a_gigantic_move_leaves_no_trace,
        a_gigantic_page_moves_but_for_what_is_pinned;
}

/// Mounts a pool by programs that were built for tests: a worker dies where it is told to.
pub fn with_kill_points(options: &str) -> Pool {
    let mut mount = Command::new("/lib/killable/hugetlb2");
    mount.arg0("mount.hugetlb2");
    Pool::mount_by(mount, options)
}

/// Moves the file back and forth, each time with a worker that dies at another step. `verify`
/// tells if the file is as it should be on a node. Returns the number of steps that were reached.
fn die_at_each_step(pool: &Pool, path: &Path, verify: impl Fn(u64)) -> usize {
    const MOST_DEATHS: u64 = 3;
    let steps = get(pool.path(), DIE).expect("a build for tests");
    let steps = steps.lines().filter(|step| step.starts_with("relocate: "));
    let (mut node, mut reached) = (0, 0);
    for step in steps {
        for nth in 1..=MOST_DEATHS {
            let worker = pool.counter("worker_pid");
            set(pool.path(), DIE, format!("{nth} {step}")).unwrap();
            node = 1 - node;
            set(path, PLACEMENT, format!("bind:{node}")).unwrap();
            pool.check();
            verify(node);
            if pool.counter("worker_pid") == worker {
                break; // it is not reached so often
            }
            println!("a death after {nth} times {step:?}");
            reached += usize::from(nth == 1);
        }
    }
    reached
}

fn a_death_at_each_step_of_a_move_leaves_no_trace() {
    let pool = with_kill_points(&format!("pagesize=2M,size={}", PAGES * FOLIO));
    let (path, bytes) = numbered(&pool);
    let reached = die_at_each_step(&pool, &path, |node| {
        assert_eq!(nodes(&path), [node; 8]);
        let free = |on: u32| PAGES / 2 - 8 * u64::from(u64::from(on) == node);
        assert_eq!(parts(&pool.path()), [0, 1].map(|on| (on, PAGES / 2, free(on))));
        assert!(std::fs::read(&path).unwrap() == bytes, "bytes have changed");
    });
    assert_eq!(reached, 4, "each step but the note of a page of many folios");
    pool.unmount();
}

fn a_death_at_each_step_of_a_gigantic_move_leaves_no_trace() {
    let pool = with_kill_points("nodes=0:1G,1:1G");
    let path = pool.join("file");
    let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    set(&path, PLACEMENT, "strict:bind:0").unwrap();
    file.set_len(64 * FOLIO).unwrap();
    for folio in 0..64 {
        file.write_all_at(&[folio as u8 + 1], folio * FOLIO + 9).unwrap();
    }
    let reached = die_at_each_step(&pool, &path, |node| {
        assert_eq!(nodes(&path), [node; 64]);
        let free = |on: u32| u64::from(u64::from(on) != node);
        assert_eq!(parts(&pool.path()), [0, 1].map(|on| (on, 1, free(on))));
        for folio in 0..64 {
            let mut bytes = [0; 2];
            file.read_exact_at(&mut bytes, folio * FOLIO + 9).unwrap();
            assert_eq!(bytes, [folio as u8 + 1, 0]);
        }
    });
    assert_eq!(reached, 5, "each step");
    drop(file);
    pool.unmount();
}

fn pinned_memory_stays_and_is_told() {
    let pool = Pool::small(PAGES);
    let (path, bytes) = numbered(&pool);
    let mut program = Toucher::mapping(&path, 8 * FOLIO);
    let rest = format!("1 {}", 7 * FOLIO);
    for pin in ["pin", "pin-for-io"] {
        assert_eq!(program.ask(&format!("{pin} {}", 2 * FOLIO + SUBPAGE)), "ok");
        set(&path, PLACEMENT, "bind:1").unwrap();
        assert_eq!(told(&path), [format!("0 {FOLIO} pinned"), rest.clone()], "{pin}");
        assert_eq!(nodes(&path), [1, 1, 0, 1, 1, 1, 1, 1]);
        pool.check();
        kill_worker(&pool);
        assert_eq!(told(&path), [format!("0 {FOLIO} earlier"), rest.clone()], "{pin}");
        assert_eq!(program.ask("unpin"), "ok");
        set(&path, PLACEMENT, "bind:1").unwrap();
        assert_eq!(told(&path), [format!("1 {}", 8 * FOLIO)], "{pin}");
        set(&path, PLACEMENT, "bind:0").unwrap();
        assert_eq!(told(&path), [format!("0 {}", 8 * FOLIO)], "{pin}");
        pool.check();
    }
    assert!(std::fs::read(&path).unwrap() == bytes, "bytes have changed");
    drop(program);
    pool.unmount();
}

fn a_gigantic_page_moves_but_for_what_is_pinned() {
    let pool = Pool::mount("nodes=0:1G,1:1G");
    let path = pool.join("file");
    let file = File::create(&path).unwrap();
    set(&path, PLACEMENT, "strict:bind:0").unwrap();
    file.set_len(64 * FOLIO).unwrap();
    let mut program = Toucher::mapping(&path, 64 * FOLIO);
    assert_eq!(program.walk(), []);
    assert_eq!(program.ask(&format!("pin-for-io {}", 5 * FOLIO)), "ok");
    set(&path, PLACEMENT, "bind:1").unwrap();
    assert_eq!(told(&path), [format!("0 {FOLIO} pinned"), format!("1 {}", 63 * FOLIO)]);
    assert_eq!(parts(&pool.path()), [(0, 1, 1), (1, 1, 0)], "the page counts as moved");
    pool.check();
    assert_eq!(program.ask("unpin"), "ok");
    // The agent moves the rest once it is free.
    limits::until(limits::ANSWER, "the rest", || told(&path) == [format!("1 {}", 64 * FOLIO)]);
    pool.check();
    drop((file, program));
    pool.unmount();
}

/// The subpage that an error hits.
const BAD: u64 = 2 * FOLIO + 3 * SUBPAGE;

fn memory_errors_move_with_their_file() {
    let pool = Pool::small(PAGES);
    let (path, bytes) = numbered(&pool);
    let mut program = Toucher::mapping(&path, 8 * FOLIO);
    inject(&path, BAD);
    for node in [1, 0] {
        set(&path, PLACEMENT, format!("bind:{node}")).unwrap();
        assert_eq!(told(&path), [format!("{node} {}", 8 * FOLIO)]);
        assert_eq!(program.walk(), [BAD], "the error alone is out of reach");
        assert_eq!(listed(&path), [format!("{BAD:#x} 0x1000 hw")]);
        pool.check();
        kill_worker(&pool);
    }
    set(&path, REPAIR, "zero all").unwrap();
    let mut expected = bytes;
    expected[BAD as usize..(BAD + SUBPAGE) as usize].fill(0);
    assert!(std::fs::read(&path).unwrap() == expected, "bytes have changed");
    pool.check();
    drop(program);
    pool.unmount();
}

/// The errors hit at any instruction of a move.
fn memory_errors_hit_a_file_that_moves() {
    const ERRORS: u64 = 16;
    let pool = Pool::small(PAGES);
    let (path, mut bytes) = numbered(&pool);
    let places: Vec<u64> =
        (0..ERRORS).map(|nth| nth % 8 * FOLIO + (nth * 37 % 512) * SUBPAGE).collect();
    let moves = std::thread::scope(|scope| {
        let striker = scope.spawn(|| {
            for place in &places {
                match set(&path, INJECT, format!("hw {place}")) {
                    Ok(()) | Err(Errno::INVAL) => {}
                    Err(errno) => panic!("{place:#x}: {errno}"),
                }
            }
        });
        let mut moves = 0;
        while !striker.is_finished() || moves < 4 {
            moves += 1;
            set(&path, PLACEMENT, format!("bind:{}", moves % 2)).unwrap();
        }
        moves
    });
    println!("{moves} moves beside {ERRORS} errors");
    let mut expected: Vec<u64> = places.clone();
    expected.sort_unstable();
    let mut program = Toucher::mapping(&path, 8 * FOLIO);
    assert_eq!(program.walk(), expected, "each error costs its subpage");
    assert!(listed(&path).iter().all(|line| line.ends_with("hw")));
    pool.check();
    set(&path, REPAIR, "zero all").unwrap();
    for place in places {
        bytes[place as usize..(place + SUBPAGE) as usize].fill(0);
    }
    assert!(std::fs::read(&path).unwrap() == bytes, "bytes have changed");
    set(&path, PLACEMENT, "bind:1").unwrap();
    assert_eq!(told(&path), [format!("1 {}", 8 * FOLIO)]);
    pool.check();
    drop(program);
    pool.unmount();
}
