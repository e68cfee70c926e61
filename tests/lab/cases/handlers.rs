//! The programs of docs/HANDLERS.md, unchanged, on a file with a real memory error and a quarantine
//! on request.

use super::{HANDLER_C, HANDLER_RUST, cases};
use crate::support::{FOLIO, POISON, Pool, SUBPAGE, Toucher, get, poison, run, set};
use rustix::io::Errno;
use std::process::Command;

cases! {
    SMALL:
        the_c_handler_repairs_and_goes_on,
        the_rust_handler_repairs_and_goes_on;
}

const INJECT: &str = "trusted.hugetlb2.inject";
const SIZE: u64 = 3 * FOLIO;
/// The real error.
const HARD: u64 = FOLIO + 5 * SUBPAGE;
/// The quarantine.
const SOFT: u64 = 2 * FOLIO + 511 * SUBPAGE;
const BUS_ADRERR: i32 = 2;
const BUS_MCEERR_AR: i32 = 4;

fn the_c_handler_repairs_and_goes_on() {
    repairs_and_goes_on(HANDLER_C);
}

fn the_rust_handler_repairs_and_goes_on() {
    repairs_and_goes_on(HANDLER_RUST);
}

fn repairs_and_goes_on(program: &str) {
    let pool = Pool::small(4);
    let path = pool.join("file");
    let mut expected = vec![7; SIZE as usize];
    std::fs::write(&path, &expected).unwrap();
    set(&path, INJECT, format!("hw {HARD}")).unwrap();
    poison(&path, SOFT, SUBPAGE).unwrap();
    let mut toucher = Toucher::mapping(&path, SIZE);
    assert_eq!(toucher.ask("walk"), format!("hits {HARD}:{BUS_MCEERR_AR} {SOFT}:{BUS_ADRERR}"));

    let output = run(Command::new(program).arg(&path));
    assert_eq!(
        output,
        format!("lost 4096 bytes at offset {HARD}\nlost 4096 bytes at offset {SOFT}\n")
    );
    assert_eq!(run(Command::new(program).arg(&path)), "", "nothing is left to be lost");

    assert_eq!(get(&path, POISON), Err(Errno::NODATA));
    for lost in [HARD, SOFT] {
        expected[lost as usize..(lost + SUBPAGE) as usize].fill(0);
        assert_eq!(toucher.ask(&format!("differ {lost} {SUBPAGE} 0")), "count 0");
    }
    assert!(std::fs::read(&path).unwrap() == expected, "all else is intact");
    assert_eq!(toucher.walk(), []);
    pool.check();
    drop(toucher);
    pool.unmount();
}
