//! Memory on two NUMA nodes, one of which is full. A call that asks for memory fails, or gets
//! memory of the other node. The OOM killer kills no process.

use super::cases;
use crate::support::place::Place;
use crate::support::{
    COLLAPSE, FOLIO, Pool, REFUSAL, SIZE, Toucher, get, kill_worker, limits, set,
};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use std::fs::{self, File};
use std::path::PathBuf;

const MIB: u64 = 1 << 20;
/// Bytes that the stranger leaves on node 0. The kernel keeps 24 MiB of these for itself (the `min`
/// of /proc/zoneinfo), so the rest is less than a piece.
const LEFT: u64 = 44 * MIB;

cases! {
    TWO_NODES: a_pool_is_mounted_beside_a_full_node, a_pool_grows_beside_a_full_node,
        files_grow_and_shrink_beside_a_full_node, a_policy_of_a_program_kills_nobody,
        a_policy_set_over_and_over_kills_nobody, no_thread_of_the_daemon_asks_for_the_oom_killer,
        a_pool_stays_within_its_cpuset, the_kernel_leaves_the_daemons_memory_mapped,
        a_named_node_that_is_full_is_refused_and_kills_nobody;
}

/// The number in the line `... NAME NUMBER` or `... NAME: NUMBER kB` of a file.
fn number_in(path: &str, name: &str) -> u64 {
    let text = fs::read_to_string(path).unwrap_or_else(|error| panic!("{path}: {error}"));
    let mut words =
        text.split_ascii_whitespace().skip_while(|word| word.trim_end_matches(':') != name);
    words
        .nth(1)
        .and_then(|word| word.parse().ok())
        .unwrap_or_else(|| panic!("{path} has no {name}"))
}

fn free_on(node: u32) -> u64 {
    number_in(&format!("/sys/devices/system/node/node{node}/meminfo"), "MemFree") << 10
}

/// Processes that the OOM killer has killed since the machine started.
pub fn killed() -> u64 {
    number_in("/proc/vmstat", "oom_kill")
}

/// Another process, which has all memory of node 0 except some bytes.
struct Stranger {
    process: Toucher,
    killed: u64,
}

impl Stranger {
    fn who_leaves(left: u64) -> Self {
        let mut process = Toucher::start();
        let taken = free_on(0).checked_sub(left).expect("node 0 has more than that");
        assert_eq!(process.ask(&format!("occupy 0 {taken}")), "ok");
        println!("free on node 0: {} MiB, on node 1: {} MiB", free_on(0) / MIB, free_on(1) / MIB);
        Self { process, killed: killed() }
    }

    fn assert_alive(&mut self) {
        assert_eq!(killed(), self.killed, "the OOM killer has killed processes");
        assert_eq!(self.process.ask("unlock"), "ok", "the stranger lives");
    }
}

fn a_pool_is_mounted_beside_a_full_node() {
    let mut stranger = Stranger::who_leaves(LEFT);
    let pool = Pool::small(80);
    stranger.assert_alive();
    let file = File::create(pool.join("file")).unwrap();
    file.set_len(80 * FOLIO).unwrap();
    stranger.assert_alive();
    pool.check();
    drop(file);
    pool.unmount();
}

fn a_pool_grows_beside_a_full_node() {
    let pool = Pool::small(8);
    let mut stranger = Stranger::who_leaves(LEFT);
    set(pool.path(), SIZE, (80 * FOLIO).to_string()).unwrap();
    stranger.assert_alive();
    assert_eq!(pool.free_pages(), 80);
    pool.check();
    pool.unmount();
}

fn a_named_node_that_is_full_is_refused_and_kills_nobody() {
    const WHY: &str = "NUMA node 0 cannot give ";
    let pool = Pool::mount("pagesize=2M,nodes=0:8M,1:8M");
    let place = Place::new();
    let mut stranger = Stranger::who_leaves(LEFT);
    let before = (pool.counters(), free_on(1));
    for size in ["0:80M,1:8M", "0:80M,1:4M", "0:80M,1:64M"] {
        assert_eq!(set(pool.path(), SIZE, size), Err(Errno::NOSPC), "{size}");
        let why = get(pool.path(), REFUSAL).unwrap();
        assert!(why.starts_with(WHY) && why.contains("are available now"), "{size}: {why}");
        assert_eq!(pool.counters(), before.0, "{size}");
        stranger.assert_alive();
    }
    for options in ["nodes=0:80M,1:8M", "nodes=0,1,size=160M", "nodes=0,size=80M"] {
        place.assert_refused(&mut place.mount(&format!("pagesize=2M,{options}")), 32, WHY);
        stranger.assert_alive();
    }
    assert!(free_on(1) + 16 * MIB > before.1, "the memory of node 1 is given back");
    set(pool.path(), SIZE, "0:8M,1:64M").unwrap();
    pool.check();
    pool.unmount();
}

/// A kernel that balances NUMA nodes unmaps memory with the default policy now and then.
fn the_kernel_leaves_the_daemons_memory_mapped() {
    let pool = Pool::small(8);
    let worker = pool.counter("worker_pid");
    let threads = fs::read_dir(format!("/proc/{worker}/task")).unwrap();
    let mut seen = 0;
    for thread in threads.map(|thread| thread.unwrap().path()) {
        let maps = fs::read_to_string(thread.join("numa_maps")).unwrap();
        for line in maps.lines().filter(|line| line.contains(" anon=")) {
            assert!(line.contains(" local "), "{}: {line}", thread.display());
            seen += 1;
        }
    }
    assert!(seen > 0, "it has memory of its own");
    pool.unmount();
}

fn files_grow_and_shrink_beside_a_full_node() {
    let pool = Pool::small(80);
    let mut stranger = Stranger::who_leaves(LEFT);
    for name in ["first", "second"] {
        let file = File::create(pool.join(name)).unwrap();
        file.set_len(40 * FOLIO).unwrap();
        stranger.assert_alive();
    }
    let first = File::options().write(true).open(pool.join("first")).unwrap();
    first.set_len(FOLIO).unwrap();
    first.set_len(40 * FOLIO).unwrap();
    stranger.assert_alive();
    pool.check();
    drop(first);
    pool.unmount();
}

fn a_policy_of_a_program_kills_nobody() {
    let pool = Pool::small(80);
    let path = pool.join("file");
    let file = File::create(&path).unwrap();
    file.set_len(FOLIO).unwrap();
    let mut program = Toucher::mapping(&path, 80 * FOLIO);
    let mut stranger = Stranger::who_leaves(LEFT);
    assert_eq!(program.ask(&format!("bind 0 {} 0", 80 * FOLIO)), "ok");
    for pages in (8..=80).step_by(8) {
        file.set_len(pages * FOLIO).unwrap();
        stranger.assert_alive();
    }
    assert_eq!(program.walk(), []);
    pool.check();
    drop((file, program));
    pool.unmount();
}

/// A thread that sets a policy over and over wins against the daemon, which voids it, in one of
/// some growths. The pool lies on the other node, so in the end that growth waits for memory that
/// no process gives back. That ends the worker, and no other process.
fn a_policy_set_over_and_over_kills_nobody() {
    const MOST_GROWTHS: u32 = 20;
    let mut stranger = Stranger::who_leaves(LEFT);
    let pool = Pool::small(80);
    let path = pool.join("file");
    let file = File::create(&path).unwrap();
    file.set_len(FOLIO).unwrap();
    let mut program = Toucher::mapping(&path, 80 * FOLIO);
    assert_eq!(program.ask(&format!("keep-binding 0 {} 0", 80 * FOLIO)), "ok");
    let has_ended = || pool.log().matches("has ended (signal 9)").count();
    let mut growths = 0;
    let grown = std::thread::scope(|scope| {
        loop {
            growths += 1;
            let growth = scope.spawn(|| file.set_len(80 * FOLIO));
            let is_over = || growth.is_finished() || has_ended() > 0;
            limits::until(limits::ANSWER, "the growth, or the end of a worker", is_over);
            if has_ended() > 0 || growths == MOST_GROWTHS {
                drop(program); // so no program works against the next worker
                break growth.join().expect("it is no panic");
            }
            growth.join().expect("it is no panic").unwrap();
            file.set_len(FOLIO).unwrap();
        }
    });
    println!("workers ended: {}, in growth {growths}; then {grown:?}", has_ended());
    grown.unwrap();
    stranger.assert_alive();
    pool.check();
    drop(file);
    pool.unmount();
}

/// A cgroup that allows its processes memory of node 1 only. The test process is in the cgroup
/// until this value is dropped.
pub struct Cpuset {
    root: PathBuf,
}

impl Cpuset {
    pub fn enter() -> Self {
        let root = PathBuf::from("/tmp/cgroup");
        fs::create_dir_all(&root).unwrap();
        mount("cgroup", &root, "cgroup2", MountFlags::empty(), None).unwrap();
        fs::write(root.join("cgroup.subtree_control"), "+cpuset").unwrap();
        fs::create_dir(root.join("one")).unwrap();
        fs::write(root.join("one/cpuset.mems"), "1").unwrap();
        let cpuset = Self { root };
        cpuset.move_to("one");
        cpuset
    }

    fn move_to(&self, cgroup: &str) {
        fs::write(self.root.join(cgroup).join("cgroup.procs"), "0").unwrap();
    }
}

impl Drop for Cpuset {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return; // after a failed case the machine runs no other case
        }
        self.move_to("");
        fs::remove_dir(self.root.join("one")).unwrap();
        unmount(&self.root, UnmountFlags::empty()).unwrap();
    }
}

fn a_pool_stays_within_its_cpuset() {
    let (killed_before, free) = (killed(), free_on(0));
    let cpuset = Cpuset::enter();
    let pool = Pool::small(40);
    assert_eq!(pool.counter("reserve_bytes_node1"), 40 * FOLIO + pool.counter("float_bytes"));
    assert!(!pool.counters().contains_key("reserve_bytes_node0"));
    assert!(free_on(0) > free - 40 * FOLIO, "the memory is node 1's");
    let too_much = free_on(1) + 100 * MIB;
    let refused = set(pool.path(), SIZE, too_much.next_multiple_of(FOLIO).to_string());
    assert_eq!(refused, Err(Errno::NOSPC), "the machine has as much, and the cpuset does not");
    pool.await_log("cpuset");
    let file = File::create(pool.join("file")).unwrap();
    file.set_len(40 * FOLIO).unwrap();
    pool.check();
    drop(file);
    pool.unmount();
    drop(cpuset);
    assert_eq!(killed(), killed_before);
}

/// Flags of each thread of a process (proc(5), /proc/PID/task/TID/stat), with the thread's name.
fn flags_of_threads(process: u64) -> Vec<(String, u64)> {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).expect("it runs");
    let flags = |task: std::io::Result<fs::DirEntry>| {
        let stat = fs::read_to_string(task.unwrap().path().join("stat")).expect("it runs");
        let (name, rest) =
            stat.split_once(" (").and_then(|(_, rest)| rest.rsplit_once(") ")).unwrap();
        (name.to_owned(), rest.split(' ').nth(6).unwrap().parse().unwrap())
    };
    tasks.map(flags).collect()
}

fn no_thread_of_the_daemon_asks_for_the_oom_killer() {
    // PF_MEMALLOC_NOIO (linux/sched.h). PR_SET_IO_FLUSHER of prctl(2) sets this flag.
    const NOIO: u64 = 0x0008_0000;
    let pool = Pool::small(8);
    let path = pool.join("file");
    fs::write(&path, vec![7; 3 * FOLIO as usize]).unwrap();
    kill_worker(&pool);
    fs::write(&path, vec![8; 4 * FOLIO as usize]).unwrap();
    set(&path, COLLAPSE, "all").unwrap();
    for process in ["daemon_pid", "worker_pid"] {
        let threads = flags_of_threads(pool.counter(process));
        let asks: Vec<_> = threads.iter().filter(|(_, flags)| flags & NOIO == 0).collect();
        assert!(
            asks.is_empty() && !threads.is_empty(),
            "{process}: {asks:x?} of {}",
            threads.len()
        );
    }
    pool.unmount();
}
