//! Pages of 1 GiB on two NUMA nodes: a page moves from one to the other, beside hugetlbfs.

use super::cases;
use super::placement::nodes;
use crate::support::{
    CHECK, FOLIO, GIB, PLACEMENT, POISON, Pool, REFUSAL, REPAIR, SUBPAGE, Toucher, get,
    kill_worker, poison, set,
};
use hugetlb2fs::sys::mapping::Window;
use hugetlb2fs::units::{NumaNode, Range};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

cases! {
    TWO_LARGE_NODES: a_gigantic_page_moves_while_a_program_uses_it,
        a_gigantic_page_that_moves_survives_deaths, a_move_is_timed_beside_one_of_hugetlbfs;
}

const OPTIONS: &str = "pagesize=1G,nodes=0:1G,1:1G";

/// A file of one page on node 0. Each MiB begins with its number.
fn numbered(pool: &Pool) -> PathBuf {
    let path = pool.join("file");
    let file = File::create(&path).unwrap();
    set(&path, PLACEMENT, "strict:bind:0").unwrap();
    file.set_len(GIB).unwrap();
    for at in (0..GIB).step_by(1 << 20) {
        file.write_all_at(&at.to_le_bytes(), at).unwrap();
    }
    path
}

/// Asserts that each number is there, but for those in the 2 MiB from `but` on.
fn assert_numbers(path: &Path, but: Option<u64>) {
    let file = File::open(path).unwrap();
    for at in (0..GIB).step_by(1 << 20).filter(|at| but.is_none_or(|but| at / FOLIO != but / FOLIO))
    {
        let mut word = [0; 8];
        file.read_exact_at(&mut word, at).unwrap();
        assert_eq!(u64::from_le_bytes(word), at, "the bytes at {at:#x}");
    }
}

fn lies_on(path: &Path, node: u64) -> bool {
    nodes(path).iter().all(|on| *on == node)
}

fn a_gigantic_page_moves_while_a_program_uses_it() {
    const BAD: u64 = 5 * FOLIO + 3 * SUBPAGE;
    let pool = Pool::mount(OPTIONS);
    let path = numbered(&pool);
    poison(&path, BAD, 1).unwrap();
    let mut program = Toucher::mapping(&path, GIB);
    for node in [1, 0] {
        set(&path, PLACEMENT, format!("strict:bind:{node}")).unwrap();
        assert!(lies_on(&path, node), "{:?}", get(&path, PLACEMENT));
        assert_eq!(pool.counter(&format!("pages_free_node{node}")), 0);
        assert_eq!(pool.counter(&format!("pages_free_node{}", 1 - node)), 1);
        assert_eq!(program.step(4 * FOLIO..7 * FOLIO, SUBPAGE), [BAD], "it alone is out of reach");
        assert_numbers(&path, Some(BAD));
        assert_eq!(get(pool.path(), CHECK).unwrap(), "");
    }
    assert!(get(&path, POISON).unwrap().contains("soft"));
    set(&path, REPAIR, "salvage all").unwrap();
    assert_numbers(&path, None);
    // Both pages are used now: a strict move has no page to go to, and changes nothing.
    let other = File::create(pool.join("other")).unwrap();
    other.set_len(GIB).unwrap();
    assert_eq!(set(&path, PLACEMENT, "strict:bind:1"), Err(Errno::NOSPC));
    println!("{}", get(&path, REFUSAL).unwrap_or_default());
    assert!(get(&path, PLACEMENT).unwrap().starts_with("strict:bind:0\n") && lies_on(&path, 0));
    drop((program, other));
    pool.unmount();
}

fn a_gigantic_page_that_moves_survives_deaths() {
    let pool = Pool::mount(OPTIONS);
    let path = numbered(&pool);
    for round in 0..4 {
        let words = format!("bind:{}", (round + 1) % 2);
        std::thread::scope(|scope| {
            let moved = scope.spawn(|| {
                let moved = set(&path, PLACEMENT, &words);
                moved.map_err(|errno| (errno, get(&path, REFUSAL)))
            });
            kill_worker(&pool);
            kill_worker(&pool);
            moved.join().unwrap().unwrap();
        });
        assert_eq!(get(pool.path(), CHECK).unwrap(), "", "after {words}");
    }
    assert_numbers(&path, None);
    set(&path, PLACEMENT, "strict:bind:1").unwrap();
    assert!(lies_on(&path, 1));
    pool.unmount();
}

/// Time of a move, and the worst time of one store of a program that stores all the while.
#[derive(Debug)]
struct Cost {
    moving: Duration,
    stall: Duration,
}

/// Runs `work` beside a thread that stores into one folio after the other.
fn beside_stores(path: &Path, length: u64, work: impl FnOnce()) -> Cost {
    use crate::support::sys::{Mapping, Sharing};
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mapping = Mapping::new(&file, Range::new(0, length), Sharing::Shared, true).unwrap();
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let stores = scope.spawn(|| {
            let mut worst = Duration::ZERO;
            for at in (0..length).step_by(FOLIO as usize).cycle() {
                let started = Instant::now();
                mapping.store_word(at + 8, at);
                worst = worst.max(started.elapsed());
                if is_over.load(Ordering::Relaxed) {
                    return worst;
                }
            }
            worst
        });
        let started = Instant::now();
        work();
        let moving = started.elapsed();
        is_over.store(true, Ordering::Relaxed);
        Cost { moving, stall: stores.join().unwrap() }
    })
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

/// 128 MiB go to the other node and back, some times, here and on hugetlbfs with pages of 2 MiB.
fn a_move_is_timed_beside_one_of_hugetlbfs() {
    const LENGTH: u64 = 128 << 20;
    const ROUNDS: usize = 5;
    let pool = Pool::mount("pagesize=2M,nodes=0:160M,1:160M");
    let ours = pool.join("file");
    let file = File::create(&ours).unwrap();
    set(&ours, PLACEMENT, "strict:bind:0").unwrap();
    file.set_len(LENGTH).unwrap();
    let theirs = Hugetlbfs::with(LENGTH);
    let (mut here, mut there) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        let node = (round as u32 + 1) % 2;
        here.push(beside_stores(&ours, LENGTH, || {
            set(&ours, PLACEMENT, format!("strict:bind:{node}")).unwrap();
        }));
        let left = nodes(&ours).iter().filter(|on| **on != u64::from(node)).count();
        if left > 0 {
            println!("hugetlb2 has left {left} of 64 pages: they were in use");
        }
        there.push(beside_stores(&theirs.path, LENGTH, || theirs.move_to(NumaNode(node))));
    }
    let of = |costs: &[Cost], time: fn(&Cost) -> Duration| median(costs.iter().map(time).collect());
    println!(
        "move of 128 MiB to another node beside a program that stores, median of {ROUNDS}, in ms"
    );
    println!("  {:10} {:>8} {:>12}", "", "move", "worst store");
    for (name, costs) in [("hugetlb2", &here), ("hugetlbfs", &there)] {
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        println!(
            "  {name:10} {:>8.0} {:>12.1}",
            ms(of(costs, |cost| cost.moving)),
            ms(of(costs, |cost| cost.stall))
        );
    }
    theirs.give_back();
    drop(file);
    pool.check();
    pool.unmount();
}

/// A file of hugetlbfs with pages of 2 MiB on node 0, and as many free pages on node 1.
struct Hugetlbfs {
    directory: tempfile::TempDir,
    path: PathBuf,
    length: u64,
}

impl Hugetlbfs {
    fn pages_on(node: u32) -> String {
        format!("/sys/devices/system/node/node{node}/hugepages/hugepages-2048kB/nr_hugepages")
    }

    fn with(length: u64) -> Self {
        let pages = length / FOLIO;
        for node in [0, 1] {
            fs::write(Self::pages_on(node), (pages + 8).to_string()).unwrap();
            let got: u64 =
                fs::read_to_string(Self::pages_on(node)).unwrap().trim().parse().unwrap();
            assert_eq!(got, pages + 8, "pages of node {node}");
        }
        let directory = tempfile::tempdir().unwrap();
        mount("lab", directory.path(), "hugetlbfs", MountFlags::empty(), Some(c"pagesize=2M"))
            .unwrap();
        let path = directory.path().join("file");
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        file.set_len(length).unwrap();
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, length).unwrap();
        Self { directory, path, length }
    }

    /// Moves all pages by move_pages(2), as migratepages(8) does.
    fn move_to(&self, node: NumaNode) {
        let file = File::options().read(true).write(true).open(&self.path).unwrap();
        let window = Window::new(&file, Range::new(0, self.length)).unwrap();
        window.populate(Range::new(0, self.length)).unwrap();
        let pages: Vec<u64> = (0..self.length).step_by(FOLIO as usize).collect();
        window.migrate(&pages, node).unwrap();
        let there = window.nodes_of(&pages).iter().filter(|on| **on == Some(node)).count();
        if there < pages.len() {
            println!(
                "hugetlbfs has moved {there} of {} pages: the others were in use",
                pages.len()
            );
        }
    }

    fn give_back(self) {
        unmount(self.directory.path(), UnmountFlags::DETACH).unwrap();
        [0, 1].into_iter().for_each(|node| fs::write(Self::pages_on(node), "0").unwrap());
    }
}
