//! Pools on the lab's kernel and machines, without memory errors.

use super::cases;
use crate::support::place::Place;
use crate::support::{
    COLLAPSE, FOLIO, GIB, MAP, POISON, Pool, REPAIR, SUBPAGE, Toucher, get, poison, set,
};
use std::os::unix::fs::FileExt;

cases! {
    SMALL: a_pool_mounts_and_serves, a_quarantine_takes_one_subpage_and_repair_returns_it;
    TWO_NODES: a_pool_takes_evenly_from_two_nodes_and_files_give_back;
    GIGANTIC: a_pool_of_one_gigantic_page_serves;
    INITRAMFS: an_initramfs_is_named_as_what_cannot_be_left;
}

fn a_pool_mounts_and_serves() {
    let pool = Pool::small(4);
    let file = pool.join("file");
    std::fs::write(&file, "some bytes").unwrap();
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "some bytes");
    assert_eq!(pool.free_pages(), 3);
    pool.check();
    std::fs::remove_file(&file).unwrap();
    pool.unmount();
}

fn a_quarantine_takes_one_subpage_and_repair_returns_it() {
    const BAD: u64 = FOLIO + SUBPAGE;
    let pool = Pool::mount("pagesize=2M,size=8M,collapse=off");
    let path = pool.join("file");
    std::fs::write(&path, vec![7; 2 * FOLIO as usize]).unwrap();
    let mut toucher = Toucher::mapping(&path, 2 * FOLIO);
    assert_eq!(toucher.walk(), []);
    assert_eq!(toucher.huge(), 2);
    poison(&path, BAD, 1).unwrap();
    assert_eq!(toucher.walk(), [BAD]);
    assert_eq!(toucher.load(BAD - 1), Some(7));
    assert_eq!(toucher.load(BAD + SUBPAGE), Some(7));
    assert!(!toucher.store(BAD + 9, 1));
    assert_eq!(toucher.huge(), 1);
    let file = std::fs::File::open(&path).unwrap();
    assert_eq!(
        file.read_at(&mut [0; 1], BAD).unwrap_err().raw_os_error(),
        Some(rustix::io::Errno::IO.raw_os_error())
    );
    assert!(get(&path, POISON).unwrap().starts_with("0x201000 0x1000 soft "));
    set(&path, REPAIR, "salvage all").unwrap();
    set(&path, COLLAPSE, "all").unwrap();
    assert_eq!(toucher.walk(), []);
    assert_eq!(toucher.load(BAD), Some(7));
    assert_eq!(toucher.huge(), 2);
    pool.check();
    drop((toucher, file));
    pool.unmount();
}

fn a_pool_takes_evenly_from_two_nodes_and_files_give_back() {
    const FLOAT: u64 = 4 * FOLIO; // each node's part of a small pool has two folios
    let pool = Pool::small(16);
    assert_eq!(pool.counter("float_bytes"), FLOAT);
    let reserves = || [pool.counter("reserve_bytes_node0"), pool.counter("reserve_bytes_node1")];
    assert_eq!(reserves(), [10 * FOLIO; 2]);
    let file = pool.join("file");
    std::fs::write(&file, vec![7; 5 * FOLIO as usize]).unwrap();
    assert_eq!(reserves().iter().sum::<u64>(), 11 * FOLIO + FLOAT);
    pool.check();
    let map = get(&file, MAP).unwrap();
    assert!(map.lines().all(|line| line.contains(" huge ")), "{map}");
    let mut toucher = Toucher::mapping(&file, 5 * FOLIO);
    assert_eq!(toucher.walk(), []);
    assert_eq!(toucher.huge(), 5);
    drop(toucher);
    std::fs::remove_file(&file).unwrap();
    pool.wait_for_free_pages(16);
    assert_eq!(reserves(), [10 * FOLIO; 2], "memory goes back to the node that it is on");
    pool.check();
    pool.unmount();
}

fn a_pool_of_one_gigantic_page_serves() {
    let pool = Pool::gigantic(1);
    assert_eq!(pool.counter("huge_bytes_at_mount"), GIB);
    let path = pool.join("file");
    let file = std::fs::File::create_new(&path).unwrap();
    file.set_len(GIB).unwrap();
    file.write_all_at(b"the end", GIB - 7).unwrap();
    assert_eq!(file.set_len(GIB + 1).unwrap_err().kind(), std::io::ErrorKind::StorageFull);
    let mut toucher = Toucher::mapping(&path, GIB);
    assert_eq!(toucher.walk(), []);
    assert_eq!(toucher.huge(), 512);
    assert_eq!(toucher.load(GIB - 1), Some(b'd'));
    pool.check();
    drop((toucher, file));
    pool.unmount();
}

fn an_initramfs_is_named_as_what_cannot_be_left() {
    const FAILED: i32 = 32;
    assert!(std::fs::read_to_string("/proc/self/mountinfo").unwrap().contains(" / / rw - rootfs "));
    let place = Place::new();
    let words = "pivot_root(2): this root directory cannot be left: it is the initramfs";
    place.assert_refused(&mut place.mount("size=8M,pagesize=2M"), FAILED, words);
}
