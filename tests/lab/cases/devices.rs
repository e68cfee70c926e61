//! For machines with devices that take the guest's memory and give it back (virtio-balloon and
//! virtio-mem), or that read and write it (virtio-blk). The host changes these devices, and the
//! guest runs the cases.

use super::{cases, load_module, meminfo, skip};
use crate::pattern;
use crate::support::sys::{Mapping, Sharing};
use crate::support::{Dice, SUBPAGE};
use hugetlb2fs::units::Range;
use memmap2::MmapMut;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

cases! {
    SMALL: drivers_of_memory_devices_can_be_loaded, all_free_memory_holds_what_is_stored_in_it,
        a_disk_takes_the_bytes_of_memory, a_disk_gives_memory_its_bytes;
}

const MODULES: &str = "/lib/devices";
const DRIVERS: [&str; 2] = ["virtio_balloon", "virtio_mem"];

/// The guest needs this memory for all that it does meanwhile.
const LEFT: u64 = 64 << 20;

fn load_driver(name: &str) {
    let path = format!("{MODULES}/{name}.ko");
    if !Path::new(&path).exists() {
        skip(&format!("no module {name} is there: tests/lab/fetch-kernel fetches it"));
    }
    load_module(&path, c"");
}

fn drivers_of_memory_devices_can_be_loaded() {
    DRIVERS.iter().for_each(|name| load_driver(name));
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

/// The subpages of the memory that a disk reads and writes.
pub const DISK_SUBPAGES: u64 = 64;

/// The pattern of that memory at first.
pub const FIRST_PATTERN: u64 = 6;

/// The machine's disk, and the memory. A file of tmpfs keeps the memory from case to case, and from
/// the second case on, no processor touches it.
fn disk_and_memory() -> (File, Mapping) {
    load_driver("virtio_blk");
    // A machine without a disk has a file, which its processors write and read.
    let disk = if Path::new("/dev/vda").exists() { "/dev/vda" } else { "/tmp/disk" };
    let mut usual = File::options();
    usual.read(true).write(true).create(true).truncate(false);
    let direct = usual.clone().custom_flags(libc::O_DIRECT).open(disk).expect("a disk");
    if disk == "/tmp/disk" {
        direct.set_len(DISK_SUBPAGES * SUBPAGE).expect("room");
    }
    let kept = usual.open("/tmp/of-the-disk").expect("a file");
    if kept.metadata().expect("a length").len() == 0 {
        for page in 0..DISK_SUBPAGES {
            kept.write_all_at(&pattern::of(FIRST_PATTERN, page), page * SUBPAGE).expect("room");
        }
    }
    let all = Range::new(0, DISK_SUBPAGES * SUBPAGE);
    (direct, Mapping::new(&kept, all, Sharing::Shared, true).expect("memory"))
}

/// Calls `transfer` for each subpage of the memory, and says if the call fails.
fn each_subpage(transfer: impl Fn(Range) -> std::io::Result<()>) {
    for page in 0..DISK_SUBPAGES {
        if let Err(error) = transfer(Range::at(page * SUBPAGE, SUBPAGE)) {
            println!("subpage {page}: {error}");
        }
    }
}

/// The host looks at the disk afterwards.
fn a_disk_takes_the_bytes_of_memory() {
    let (disk, memory) = disk_and_memory();
    each_subpage(|part| memory.write_to(&disk, part));
}

/// The host looks at the memory afterwards.
fn a_disk_gives_memory_its_bytes() {
    let (disk, memory) = disk_and_memory();
    each_subpage(|part| memory.read_from(&disk, part));
}
