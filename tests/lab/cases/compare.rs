//! One memory error in a file of ours and in a file of hugetlbfs.

use super::cases;
use crate::support::{FOLIO, GIB, Pool, SUBPAGE, Toucher};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use std::fs::File;
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
    assert_eq!(count_lost(|offset| victim.load(offset).is_none()), 0);
    let mut injector = Toucher::mapping(path, GIB);
    assert_eq!(injector.load(BAD), Some(0));
    assert_eq!(injector.ask(&format!("advise {BAD} {SUBPAGE} {}", libc::MADV_HWPOISON)), "ok");
    Lost {
        to_mmap: count_lost(|offset| victim.load(offset).is_none()),
        to_read: count_lost(|offset| {
            file.read_exact_at(&mut [0; SUBPAGE as usize], offset).is_err()
        }),
    }
}

/// Counts the lost bytes; `is_lost` is true for a lost subpage. Asks for each subpage of the 2 MiB
/// around the error, and for the first subpage of every other 2 MiB.
fn count_lost(mut is_lost: impl FnMut(u64) -> bool) -> u64 {
    let near = BAD / FOLIO * FOLIO;
    let far = (0..GIB).step_by(FOLIO as usize).filter(|start| *start != near);
    let far: u64 = far.map(|start| u64::from(is_lost(start)) * FOLIO).sum();
    let near = (near..near + FOLIO).step_by(SUBPAGE as usize);
    far + near.map(|start| u64::from(is_lost(start)) * SUBPAGE).sum::<u64>()
}
