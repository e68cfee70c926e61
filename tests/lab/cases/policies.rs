//! Programs that give a file's memory a policy, or move it themselves, after they have sized it.

use super::cases;
use super::parts::parts;
use super::placement::{nodes, numbered, on_processor, told};
use crate::support::{FOLIO, PLACEMENT, Pool, REPAIR, Toucher, kill_worker, limits, poison, set};
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

/// Pages of the pool; each node has half of them.
const PAGES: u64 = 40;

// linux/mempolicy.h
const BIND: u32 = 2;
const INTERLEAVE: u32 = 3;
const STRICT_AND_MOVE: u32 = 1 | 2;

cases! {
    TWO_NODES: memory_follows_a_policy_that_is_set_after_sizing,
        a_policy_of_a_part_moves_that_part, a_policy_ahead_of_the_size_counts,
        a_policy_set_while_a_file_grows_counts,
        memory_is_counted_where_a_program_moved_it, memory_goes_home_where_it_has_no_place,
        a_placement_comes_before_what_programs_do, policies_are_followed_beside_deaths,
        a_full_node_gets_the_memory_later;
    TWO_NODES_WITH_PROGRAMS: qemus_memory_lies_on_its_host_nodes,
        numactl_places_the_files_of_a_program;
    TWO_LARGE_NODES: a_gigantic_page_follows_a_policy;
}

/// A file of eight pages on node 0 with the placement `caller`, and its bytes.
fn of_the_caller(pool: &Pool) -> (std::path::PathBuf, Vec<u8>) {
    let (path, bytes) = numbered(pool);
    on_processor(0, || set(&path, PLACEMENT, "caller")).unwrap();
    assert_eq!(nodes(&path), [0; 8]);
    (path, bytes)
}

fn wait_for(path: &Path, expected: &[u64]) {
    limits::until(limits::ANSWER, &format!("memory on {expected:?}"), || nodes(path) == expected);
}

/// Waits until the file's eight pages count as pages of `node`, and its memory is there.
fn wait_until_on(pool: &Pool, path: &Path, node: u32) {
    let free = |other: u32| if other == node { PAGES / 2 - 8 } else { PAGES / 2 };
    let expected = [0, 1].map(|node| (node, PAGES / 2, free(node)));
    limits::until(limits::ANSWER, "the account", || parts(&pool.path()) == expected);
    let memory = [format!("{node} {}", 8 * FOLIO)];
    limits::until(limits::ANSWER, "the memory", || told(path) == memory);
}

fn memory_follows_a_policy_that_is_set_after_sizing() {
    let pool = Pool::small(PAGES);
    let (path, bytes) = of_the_caller(&pool);
    let mut program = Toucher::mapping(&path, 8 * FOLIO);
    poison(&path, 3 * FOLIO, 4096).unwrap();
    // QEMU's order for `host-nodes=`: a mapping, a policy, and then a touch.
    assert_eq!(program.ask(&format!("mbind 0 {} {BIND} 2 {STRICT_AND_MOVE}", 8 * FOLIO)), "ok");
    wait_until_on(&pool, &path, 1);
    assert_eq!(program.walk(), [3 * FOLIO], "the quarantined subpage alone is out of reach");
    pool.check();
    kill_worker(&pool);
    assert_eq!(parts(&pool.path()), [(0, 20, 20), (1, 20, 12)]);
    set(&path, REPAIR, format!("salvage {:#x} 4096", 3 * FOLIO)).unwrap();
    assert!(std::fs::read(&path).unwrap() == bytes, "bytes have changed");
    assert_eq!(program.ask(&format!("mbind 0 {} {INTERLEAVE} 3 0", 8 * FOLIO)), "ok");
    wait_for(&path, &[0, 1, 0, 1, 0, 1, 0, 1]);
    assert!(std::fs::read(&path).unwrap() == bytes, "bytes have changed");
    pool.check();
    drop(program);
    pool.unmount();
}

fn a_policy_of_a_part_moves_that_part() {
    let pool = Pool::small(PAGES);
    let (path, bytes) = of_the_caller(&pool);
    let mut program = Toucher::mapping(&path, 8 * FOLIO);
    assert_eq!(program.ask(&format!("mbind {} {} {BIND} 2 0", 2 * FOLIO, 3 * FOLIO)), "ok");
    assert_eq!(program.ask(&format!("mbind {} {} {BIND} 2 0", 7 * FOLIO, FOLIO)), "ok");
    wait_for(&path, &[0, 0, 1, 1, 1, 0, 0, 1]);
    assert!(std::fs::read(&path).unwrap() == bytes, "bytes have changed");
    pool.check();
    drop(program);
    pool.unmount();
}

fn a_policy_ahead_of_the_size_counts() {
    let pool = Pool::small(PAGES);
    let path = pool.join("file");
    let file = File::create(&path).unwrap();
    on_processor(0, || file.set_len(FOLIO)).unwrap();
    let mut program = Toucher::mapping(&path, 8 * FOLIO);
    assert_eq!(program.ask(&format!("mbind {FOLIO} {} {BIND} 2 0", 7 * FOLIO)), "ok");
    on_processor(0, || file.set_len(5 * FOLIO)).unwrap();
    assert_eq!(nodes(&path), [0, 1, 1, 1, 1]);
    // Each program that maps a file can set a policy. It does not make the growth of others fail.
    let strict = pool.join("strict");
    let strict_file = File::create(&strict).unwrap();
    set(&strict, PLACEMENT, "strict:caller").unwrap();
    program.map(&strict, 0, 8 * FOLIO, "shared ro");
    assert_eq!(program.ask(&format!("mbind 0 {} {BIND} 2 0", 8 * FOLIO)), "ok");
    on_processor(0, || strict_file.set_len(8 * FOLIO)).unwrap();
    assert_eq!(nodes(&strict), [0; 8]);
    pool.check();
    drop((file, strict_file, program));
    pool.unmount();
}

fn a_policy_set_while_a_file_grows_counts() {
    const GROWN: u64 = 16;
    let pool = Pool::small(PAGES);
    for round in 0..8 {
        let path = pool.join(format!("file{round}")); // the moves of one file come ever later
        let file = File::create(&path).unwrap();
        file.set_len(FOLIO).unwrap();
        let mut program = Toucher::mapping(&path, GROWN * FOLIO);
        let (node, processor) = (round % 2, 1 - round as usize % 2);
        std::thread::scope(|scope| {
            let grown = scope.spawn(|| on_processor(processor, || file.set_len(GROWN * FOLIO)));
            std::thread::sleep(Duration::from_millis(2 * round)); // another moment in each round
            let mask = 1 << node;
            assert_eq!(program.ask(&format!("mbind 0 {} {BIND} {mask} 0", GROWN * FOLIO)), "ok");
            println!("round {round}: the growth is over: {}", grown.is_finished());
            grown.join().expect("it is no panic").unwrap();
        });
        wait_for(&path, &[node; GROWN as usize]);
        pool.check();
        std::fs::remove_file(path).unwrap();
        drop((file, program));
        pool.wait_for_free_pages(PAGES);
    }
    pool.unmount();
}

fn memory_is_counted_where_a_program_moved_it() {
    let pool = Pool::small(PAGES);
    let (path, bytes) = of_the_caller(&pool);
    let mut program = Toucher::mapping(&path, 8 * FOLIO);
    assert_eq!(program.walk(), []);
    for node in [1, 0, 1] {
        assert_eq!(program.ask(&format!("move 0 {} {node}", 8 * FOLIO)), "ok");
        wait_until_on(&pool, &path, node);
        pool.check();
        kill_worker(&pool);
        wait_until_on(&pool, &path, node);
        pool.check();
    }
    assert!(std::fs::read(&path).unwrap() == bytes, "bytes have changed");
    drop(program);
    pool.unmount();
}

/// A file that has all of node 1's part.
fn all_of_node_1(pool: &Pool) -> File {
    let full = File::create(pool.join("full")).unwrap();
    set(pool.join("full"), PLACEMENT, "bind:1").unwrap();
    full.set_len(PAGES / 2 * FOLIO).unwrap();
    full
}

fn memory_goes_home_where_it_has_no_place() {
    let pool = Pool::small(PAGES);
    let full = all_of_node_1(&pool);
    let (path, bytes) = of_the_caller(&pool);
    let mut program = Toucher::mapping(&path, 8 * FOLIO);
    assert_eq!(program.walk(), []);
    assert_eq!(program.ask(&format!("move 0 {} 1", 8 * FOLIO)), "ok");
    assert_eq!(nodes(&path), [1; 8], "the kernel moves it");
    wait_for(&path, &[0; 8]);
    assert_eq!(parts(&pool.path()), [(0, 20, 12), (1, 20, 0)]);
    pool.check();
    // The next worker has the account from the memory that it finds.
    assert_eq!(program.ask(&format!("move 0 {} 1", 8 * FOLIO)), "ok");
    kill_worker(&pool);
    pool.check();
    assert!(std::fs::read(&path).unwrap() == bytes, "bytes have changed");
    drop((full, program));
    pool.unmount();
}

fn a_placement_comes_before_what_programs_do() {
    let pool = Pool::small(PAGES);
    let (path, bytes) = numbered(&pool); // bind:0
    let mut program = Toucher::mapping(&path, 8 * FOLIO);
    assert_eq!(program.walk(), []);
    assert_eq!(program.ask(&format!("mbind 0 {} {BIND} 2 {STRICT_AND_MOVE}", 8 * FOLIO)), "ok");
    assert_eq!(nodes(&path), [1; 8], "the kernel moves it");
    wait_for(&path, &[0; 8]);
    assert_eq!(parts(&pool.path()), [(0, 20, 12), (1, 20, 20)]);
    assert!(std::fs::read(&path).unwrap() == bytes, "bytes have changed");
    pool.check();
    drop(program);
    pool.unmount();
}

fn policies_are_followed_beside_deaths() {
    let pool = Pool::small(PAGES);
    let (path, bytes) = of_the_caller(&pool);
    let mut program = Toucher::mapping(&path, 8 * FOLIO);
    for round in 0..6_u64 {
        let node = (round + 1) % 2;
        let mask = 1 << node;
        assert_eq!(program.ask(&format!("mbind 0 {} {BIND} {mask} 0", 8 * FOLIO)), "ok");
        let has_begun = || nodes(&path).contains(&node);
        limits::until(limits::ANSWER, "memory that moves", has_begun);
        kill_worker(&pool); // the next worker has no memory of earlier moves
        wait_for(&path, &[node; 8]);
        pool.check();
    }
    assert!(std::fs::read(&path).unwrap() == bytes, "bytes have changed");
    drop(program);
    pool.unmount();
}

fn a_full_node_gets_the_memory_later() {
    let pool = Pool::small(PAGES);
    let full = all_of_node_1(&pool);
    full.set_len((PAGES / 2 - 2) * FOLIO).unwrap();
    let (path, bytes) = of_the_caller(&pool);
    let mut program = Toucher::mapping(&path, 8 * FOLIO);
    assert_eq!(program.ask(&format!("mbind 0 {} {BIND} 2 0", 8 * FOLIO)), "ok");
    wait_for(&path, &[1, 1, 0, 0, 0, 0, 0, 0]);
    pool.check();
    full.set_len(0).unwrap();
    wait_for(&path, &[1; 8]);
    assert!(std::fs::read(&path).unwrap() == bytes, "bytes have changed");
    pool.check();
    drop((full, program));
    pool.unmount();
}

fn a_gigantic_page_follows_a_policy() {
    let pool = Pool::mount("nodes=0:1G,1:1G");
    let path = pool.join("file");
    let file = File::create(&path).unwrap();
    on_processor(0, || file.set_len(16 * FOLIO)).unwrap();
    assert_eq!(nodes(&path), [0; 16]);
    let mut program = Toucher::mapping(&path, 16 * FOLIO);
    assert!(program.store(5 * FOLIO, 7));
    assert_eq!(program.ask(&format!("mbind 0 {} {BIND} 2 0", 16 * FOLIO)), "ok");
    wait_for(&path, &[1; 16]);
    limits::until(limits::ANSWER, "the account", || parts(&pool.path()) == [(0, 1, 1), (1, 1, 0)]);
    // A program moves a part of the page: the page stays, so the part goes home.
    assert_eq!(program.ask(&format!("mbind 0 {} 0 0 0", 16 * FOLIO)), "ok");
    assert_eq!(program.walk(), []);
    assert_eq!(program.ask(&format!("move {} {} 0", 4 * FOLIO, 2 * FOLIO)), "ok");
    assert_eq!(nodes(&path)[4..6], [0, 0], "the kernel moves it");
    wait_for(&path, &[1; 16]);
    assert_eq!(program.load(5 * FOLIO), Some(7));
    pool.check();
    drop((file, program));
    pool.unmount();
}

/// A program of Debian, whose standard input and output are pipes.
fn spawn(name: &str, arguments: &[String]) -> std::process::Child {
    let mut program = std::process::Command::new(Path::new("/bin").join(name));
    program
        .args(arguments)
        .env("QEMU_MODULE_DIR", "/lib/qemu")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    program.spawn().expect("the machine has it")
}

/// A virtual machine with two NUMA nodes: each has a file of ours, with a policy of its own.
fn qemus_memory_lies_on_its_host_nodes() {
    let pool = Pool::small(PAGES);
    for prealloc in ["on", "off"] {
        let backend = |name: &str, policy: &str| {
            let path = pool.join(name).display().to_string();
            let size = 8 * FOLIO;
            let how = format!("size={size},share=on,align=2M,prealloc={prealloc},{policy}");
            ["-object".to_owned(), format!("memory-backend-file,id={name},mem-path={path},{how}")]
        };
        let mut arguments =
            ["-machine", "none", "-nodefaults", "-display", "none"].map(str::to_owned).to_vec();
        arguments.extend(backend("bound", "host-nodes=1,policy=bind"));
        arguments.extend(backend("spread", "host-nodes=0-1,policy=interleave"));
        arguments.extend(["-monitor", "stdio"].map(str::to_owned));
        let mut qemu = on_processor(0, || spawn("qemu-system-x86_64", &arguments));
        limits::until(limits::ANSWER, "QEMU's files", || pool.join("spread").exists());
        wait_for(&pool.join("bound"), &[1; 8]);
        wait_for(&pool.join("spread"), &[0, 1, 0, 1, 0, 1, 0, 1]);
        assert_eq!(parts(&pool.path()), [(0, 20, 16), (1, 20, 8)]);
        pool.check();
        writeln!(qemu.stdin.take().expect("a pipe"), "quit").unwrap();
        assert!(limits::exit(limits::ANSWER, "QEMU", &mut qemu).success());
        std::fs::remove_file(pool.join("bound")).unwrap();
        std::fs::remove_file(pool.join("spread")).unwrap();
        pool.wait_for_free_pages(PAGES);
    }
    pool.unmount();
}

fn numactl_places_the_files_of_a_program() {
    let pool = Pool::small(PAGES);
    let path = pool.join("file");
    let rows: [(&str, &[u64]); 4] = [
        ("--membind=1", &[1; 8]),
        ("--preferred=1", &[1; 8]),
        ("--interleave=all", &[0, 1, 0, 1, 0, 1, 0, 1]),
        ("--cpunodebind=1", &[1; 8]),
    ];
    for (option, expected) in rows {
        File::create_new(&path).unwrap();
        let arguments = [option.to_owned(), "/bin/toucher".to_owned()];
        let mut program = on_processor(0, || spawn("numactl", &arguments));
        let line = format!("truncate {} {}", path.display(), 8 * FOLIO);
        writeln!(program.stdin.take().expect("a pipe"), "{line}").unwrap();
        let status = limits::exit(limits::ANSWER, option, &mut program);
        assert!(status.success(), "{option}: {status}");
        assert_eq!(nodes(&path), expected, "{option}");
        std::fs::remove_file(&path).unwrap();
        pool.wait_for_free_pages(PAGES);
    }
    pool.unmount();
}
