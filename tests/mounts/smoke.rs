//! The shortest test of all parts together.

use crate::support::{FOLIO, POISON, Pool, REPAIR, SUBPAGE, Toucher, get, poison, set};

#[test]
fn a_subpage_goes_bad_and_everything_else_stays() {
    let pool = Pool::small(8);
    let file = pool.join("file");
    std::fs::write(&file, vec![7; 2 * FOLIO as usize]).unwrap();
    let mut toucher = Toucher::mapping(&file, 2 * FOLIO);
    assert_eq!(toucher.walk(), []);
    assert_eq!(toucher.huge(), 2);
    poison(&file, FOLIO + SUBPAGE, 1).unwrap();
    assert_eq!(toucher.walk(), [FOLIO + SUBPAGE]);
    assert_eq!(toucher.huge(), 1);
    assert!(get(&file, POISON).unwrap().starts_with("0x201000 0x1000 soft "));
    set(&file, REPAIR, "salvage all").unwrap();
    assert_eq!(toucher.walk(), []);
    assert_eq!(toucher.load(FOLIO + SUBPAGE), Some(7));
    pool.check();
    drop(toucher);
    pool.unmount();
}
