//! For machines with devices that take the guest's memory and give it back: virtio-balloon and
//! virtio-mem. The host changes these devices, and the guest runs the cases.

use super::{cases, load_module, meminfo, skip};
use crate::support::{Dice, SUBPAGE};
use memmap2::MmapMut;
use std::fs;
use std::path::Path;

cases! {
    SMALL: drivers_of_memory_devices_can_be_loaded, all_free_memory_holds_what_is_stored_in_it;
}

const MODULES: &str = "/lib/memory-devices";
const DRIVERS: [&str; 2] = ["virtio_balloon", "virtio_mem"];

/// The guest needs this memory for all that it does meanwhile.
const LEFT: u64 = 64 << 20;

fn drivers_of_memory_devices_can_be_loaded() {
    if !Path::new(MODULES).join("complete").exists() {
        skip("no modules are there: tests/lab/fetch-kernel fetches them");
    }
    for name in DRIVERS {
        load_module(&format!("{MODULES}/{name}.ko"), c"");
    }
    let loaded = fs::read_to_string("/proc/modules").unwrap();
    assert!(DRIVERS.iter().all(|name| loaded.contains(name)), "{loaded}");
}

fn all_free_memory_holds_what_is_stored_in_it() {
    let length = meminfo("MemAvailable") - LEFT;
    println!("{} MiB", length >> 20);
    let mut memory = MmapMut::map_anon(length as usize).expect("memory");
    let word = |subpage: u64| Dice(subpage).roll().to_le_bytes();
    for (subpage, bytes) in (0..).zip(memory.chunks_mut(SUBPAGE as usize)) {
        bytes[..8].copy_from_slice(&word(subpage));
    }
    for (subpage, bytes) in (0..).zip(memory.chunks(SUBPAGE as usize)) {
        assert_eq!(bytes[..8], word(subpage), "subpage {subpage}");
    }
}
