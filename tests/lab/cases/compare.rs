//! One memory error in a file of ours and in a file of hugetlbfs.

use super::cases;
use crate::support::{FOLIO, GIB, Pool, SUBPAGE, Toucher};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

cases! {
    GIGANTIC: an_error_costs_hugetlbfs_a_page_and_hugetlb2fs_a_subpage;
}

const BAD: u64 = GIB / 2 + 5 * SUBPAGE;

/// Bytes of a file that are lost by an error in one subpage.
#[derive(Debug, PartialEq, Eq)]
struct Lost {
    to_mmap: u64,
    to_read: u64,
}

fn an_error_costs_hugetlbfs_a_page_and_hugetlb2fs_a_subpage() {
    let pool = Pool::gigantic(1);
    let ours = suffer(&pool.join("file"));
    let theirs = suffer_on_hugetlbfs();
    println!("bytes of a page of 1 GiB that one memory error takes");
    println!("  {:10} {:>10} {:>10}", "", "mmap", "read(2)");
    for (name, lost) in [("hugetlb2", &ours), ("hugetlbfs", &theirs)] {
        println!("  {name:10} {:>10} {:>10}", lost.to_mmap, lost.to_read);
    }
    assert_eq!(ours, Lost { to_mmap: SUBPAGE, to_read: SUBPAGE });
    assert_eq!(theirs, Lost { to_mmap: GIB, to_read: SUBPAGE });
    pool.check();
    pool.unmount();
}

fn suffer_on_hugetlbfs() -> Lost {
    let directory = tempfile::tempdir().expect("a directory");
    mount("lab", directory.path(), "hugetlbfs", MountFlags::empty(), Some(c"pagesize=1G"))
        .expect("hugetlbfs");
    // The kernel writes every SIGBUS to the console, which is slow.
    std::fs::write("/proc/sys/kernel/printk", "1").expect("the console's level");
    let lost = suffer(&directory.path().join("file"));
    std::fs::write("/proc/sys/kernel/printk", "7").expect("the console's level");
    unmount(directory.path(), UnmountFlags::DETACH).expect("it is mounted");
    lost
}

/// Makes a file of 1 GiB, which a program maps, and poisons one of its subpages. Another process
/// makes the error: the kernel sends a signal at once to a process that maps the page and makes the
/// error itself.
fn suffer(path: &Path) -> Lost {
    let file = File::options().read(true).write(true).create_new(true).open(path).expect("a file");
    file.set_len(GIB).expect("a page");
    let mut victim = Toucher::mapping(path, GIB);
    assert_eq!(lost_to_mmap(&mut victim), 0);
    let mut injector = Toucher::mapping(path, GIB);
    assert_eq!(injector.load(BAD), Some(0));
    assert_eq!(injector.ask(&format!("advise {BAD} {SUBPAGE} {}", libc::MADV_HWPOISON)), "ok");
    Lost { to_mmap: lost_to_mmap(&mut victim), to_read: lost_to_read(&file) }
}

/// The 2 MiB around the error. Each subpage of these is looked at, and the first subpage of every
/// other 2 MiB.
const NEAR: Range<u64> = BAD / FOLIO * FOLIO..(BAD / FOLIO + 1) * FOLIO;

/// The lost bytes, by the offsets of the lost subpages.
fn lost(near: &[u64], all: &[u64]) -> u64 {
    let far = all.iter().filter(|at| !NEAR.contains(at));
    near.len() as u64 * SUBPAGE + far.count() as u64 * FOLIO
}

fn lost_to_mmap(victim: &mut Toucher) -> u64 {
    lost(&victim.step(NEAR, SUBPAGE), &victim.step(0..GIB, FOLIO))
}

fn lost_to_read(file: &File) -> u64 {
    let is_lost = |at: &u64| file.read_exact_at(&mut [0; SUBPAGE as usize], *at).is_err();
    let lost_in = |part: Range<u64>, step: u64| -> Vec<u64> {
        part.step_by(step as usize).filter(is_lost).collect()
    };
    lost(&lost_in(NEAR, SUBPAGE), &lost_in(0..GIB, FOLIO))
}
