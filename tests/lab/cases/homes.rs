//! Memory of a file keeps its NUMA node through quarantine, repair, punching, collapse and deaths;
//! the command moves it, and a quarantined subpage stays out of reach meanwhile.

use super::cases;
use crate::support::{
    CHECK, COLLAPSE, FOLIO, PLACEMENT, Pool, REPAIR, SUBPAGE, Toucher, get, hugetlb2, kill_worker,
    poison, run, set,
};
use rustix::fs::{FallocateFlags, fallocate};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

cases! {
    TWO_NODES: repairs_and_refills_come_from_the_pages_home,
        the_command_moves_memory_that_a_program_stores_into,
        a_hammered_hole_stays_shut_while_its_file_moves;
}

const PAGES: u64 = 16;

/// A file of `pages` pages on `node`, each byte of which is 7.
fn sevens(pool: &Pool, node: u32, pages: u64) -> PathBuf {
    let path = pool.join("file");
    File::create(&path).unwrap();
    set(&path, PLACEMENT, format!("strict:bind:{node}")).unwrap();
    std::fs::write(&path, vec![7; (pages * FOLIO) as usize]).unwrap();
    path
}

fn assert_on(pool: &Pool, path: &Path, node: u64, what: &str) {
    let told = get(path, PLACEMENT).unwrap();
    let rows: Vec<&str> = told.lines().skip(1).collect();
    // No node is told of 2 MiB of which all memory is punched.
    let is_there = |row: &&str| row.starts_with(&format!("{node} ")) || row.starts_with("- ");
    assert!(rows.iter().all(is_there), "{what}: {told}");
    assert_eq!(get(pool.path(), CHECK).unwrap(), "", "{what}");
}

fn repairs_and_refills_come_from_the_pages_home() {
    const PUNCH: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);
    for options in ["punch=release", "punch=keep"] {
        let pool = Pool::mount(&format!("pagesize=2M,nodes=0:32M,1:32M,{options}"));
        let path = sevens(&pool, 1, 8);
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let steps: [(&str, &dyn Fn()); 9] = [
            ("at first", &|| {}),
            ("a quarantine", &|| poison(&path, FOLIO, FOLIO / 2).unwrap()),
            ("a salvage", &|| set(&path, REPAIR, "salvage all").unwrap()),
            ("another quarantine", &|| poison(&path, 3 * FOLIO, 5 * SUBPAGE).unwrap()),
            ("a repair by zeros", &|| set(&path, REPAIR, "zero all").unwrap()),
            ("a collapse", &|| set(&path, COLLAPSE, "all").unwrap()),
            ("a punched page", &|| fallocate(&file, PUNCH, 5 * FOLIO, FOLIO).unwrap()),
            ("a refilled page", &|| {
                file.write_all_at(&vec![8; FOLIO as usize], 5 * FOLIO).unwrap();
            }),
            ("a growth", &|| file.set_len(10 * FOLIO).unwrap()),
        ];
        for (what, step) in steps {
            step();
            assert_on(&pool, &path, 1, &format!("{options}: {what}"));
            kill_worker(&pool);
            assert_on(&pool, &path, 1, &format!("{options}: {what}, and a death"));
        }
        assert_eq!(get(&path, PLACEMENT).unwrap(), format!("strict:bind:1\n1 {}\n", 10 * FOLIO));
        let mut bytes = vec![0; FOLIO as usize];
        file.read_exact_at(&mut bytes, FOLIO).unwrap();
        assert!(bytes.iter().all(|byte| *byte == 7), "what was salvaged");
        file.read_exact_at(&mut bytes, 5 * FOLIO).unwrap();
        assert!(bytes.iter().all(|byte| *byte == 8), "what was written");
        drop(file);
        pool.unmount();
    }
}

fn moved(path: &Path, words: &str) -> Command {
    let mut command = hugetlb2();
    command.arg("move").arg(path).args(["--to", words]);
    command
}

fn the_command_moves_memory_that_a_program_stores_into() {
    let pool = Pool::mount("pagesize=2M,nodes=0:32M,1:32M");
    let path = sevens(&pool, 0, PAGES);
    let mut program = Toucher::mapping(&path, PAGES * FOLIO);
    assert_eq!(program.ask(&format!("hammer {} 9", 5 * FOLIO)), "ok");
    for node in [1, 0, 1] {
        let said = run(&mut moved(&path, &format!("strict:bind:{node}")));
        assert!(said.contains(&(PAGES * FOLIO).to_string()), "{said}");
        assert_on(&pool, &path, node, "a move");
    }
    assert!(program.ask("stop").ends_with(" 0"), "no store has failed");
    let mut bytes = vec![7; (PAGES * FOLIO) as usize];
    bytes[5 * FOLIO as usize] = 9;
    assert!(std::fs::read(&path).unwrap() == bytes);
    drop(program);
    pool.unmount();
}

fn a_hammered_hole_stays_shut_while_its_file_moves() {
    let pool = Pool::mount("pagesize=2M,nodes=0:32M,1:32M,collapse=off");
    let path = sevens(&pool, 0, PAGES);
    poison(&path, 5 * FOLIO, 1).unwrap();
    let mut program = Toucher::mapping(&path, PAGES * FOLIO);
    assert_eq!(program.ask(&format!("hammer {}", 5 * FOLIO)), "ok");
    for node in [1, 0, 1, 0] {
        run(&mut moved(&path, &format!("strict:bind:{node}")));
        assert_on(&pool, &path, node, "a move");
    }
    let said = program.ask("stop");
    let numbers: Vec<u64> = said.split(' ').filter_map(|word| word.parse().ok()).collect();
    println!("touches of the hole and SIGBUS: {said}");
    assert!(numbers[0] > 1000 && numbers[0] == numbers[1], "each touch is SIGBUS: {said}");
    set(&path, REPAIR, "salvage all").unwrap();
    assert!(std::fs::read(&path).unwrap() == vec![7; (PAGES * FOLIO) as usize]);
    drop(program);
    pool.unmount();
}
