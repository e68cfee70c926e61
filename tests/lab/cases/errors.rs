//! Real memory errors: the kernel's treatment of an error in tmpfs, and its effect on a file of
//! ours.

use super::cases;
use super::kernel::memory_failures;
use crate::support::sys::{Mapping, Sharing};
use crate::support::{FOLIO, POISON, Pool, REPAIR, SUBPAGE, Toucher, poison, set};
use hugetlb2fs::error::Error;
use hugetlb2fs::sys::sigbus::Hit;
use hugetlb2fs::sys::tmpfs;
use hugetlb2fs::units::{Range, Subpage};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

cases! {
    SMALL:
        an_error_keeps_its_block_until_it_is_punched,
        writing_over_an_error_or_allocating_it_does_not_heal_it,
        a_punched_error_is_healthy_when_it_is_filled_again,
        a_truncation_at_an_error_discards_it_and_one_inside_not,
        a_real_error_costs_its_subpage_only,
        quarantine_and_repair_heal_a_real_error,
        a_repair_heals_a_real_error_that_nobody_has_looked_for,
        a_file_with_a_real_error_gives_healthy_pages_back,
        a_write_over_errors_returns_its_true_prefix;
}

/// The place of the error, in the second of two folios.
const BAD: u64 = FOLIO + 5 * SUBPAGE;
const SIZE: u64 = 2 * FOLIO;
const BUS_MCEERR_AR: i32 = 4;

fn bad() -> Range {
    Range::at(BAD, SUBPAGE)
}

// ---- tmpfs --------------------------------------------------------------------------------------

/// A full tmpfs with one mapped file of sevens that has an error.
struct Sufferer {
    mount: OwnedFd,
    file: File,
    mapping: Mapping,
}

impl Sufferer {
    fn new() -> Self {
        let options =
            tmpfs::Options { blocks: Some(SIZE / SUBPAGE), huge: true, ..Default::default() };
        let mount = tmpfs::create(&options).unwrap();
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL;
        let file: File =
            rustix::fs::openat(&mount, "data", flags, Mode::RUSR | Mode::WUSR).unwrap().into();
        file.write_all_at(&vec![7; SIZE as usize], 0).unwrap();
        let mapping = Mapping::new(&file, Range::new(0, SIZE), Sharing::Shared, true).unwrap();
        assert_eq!(mapping.walk(), []);
        let before = memory_failures(0);
        mapping.advise_range(bad(), libc::MADV_HWPOISON).unwrap();
        assert_eq!(memory_failures(0), before + 1);
        Self { mount, file, mapping }
    }

    /// Free blocks of the superblock (statfs), blocks of the file (stat) and pages of the file
    /// (cachestat).
    fn blocks(&self) -> (u64, u64, u64) {
        let free = tmpfs::blocks(&self.mount).unwrap().free;
        (
            free,
            tmpfs::blocks_taken(&self.file).unwrap(),
            tmpfs::resident(&self.file, Range::new(0, SIZE)).unwrap(),
        )
    }

    fn assert_suffers(&self) {
        assert_eq!(self.blocks(), (0, 1024, 1024));
        assert_eq!(
            self.mapping.walk(),
            [Hit { subpage: Subpage::containing(BAD), code: BUS_MCEERR_AR, lsb: 12 }]
        );
        assert_eq!(self.read_bad(), Err(Errno::IO));
    }

    fn read_bad(&self) -> Result<u8, Errno> {
        let mut byte = [0];
        errno(self.file.read_at(&mut byte, BAD)).map(|_| byte[0])
    }
}

fn errno<T>(result: std::io::Result<T>) -> Result<T, Errno> {
    result.map_err(|error| Errno::from_io_error(&error).expect("of the kernel"))
}

fn an_error_keeps_its_block_until_it_is_punched() {
    let sufferer = Sufferer::new();
    sufferer.assert_suffers();
    // The punch of a part zeroes that part. Here it must not.
    tmpfs::punch(&sufferer.file, Range::at(BAD + 100, 200)).unwrap();
    sufferer.assert_suffers();
    tmpfs::punch(&sufferer.file, bad()).unwrap();
    assert_eq!(sufferer.blocks(), (1, 1023, 1023));
}

fn writing_over_an_error_or_allocating_it_does_not_heal_it() {
    let sufferer = Sufferer::new();
    assert_eq!(errno(sufferer.file.write_at(&[9; SUBPAGE as usize], BAD)), Err(Errno::IO));
    assert_eq!(errno(sufferer.file.write_at(&[9; 10], BAD + 10)), Err(Errno::IO));
    assert_eq!(sufferer.mapping.store(BAD, 9).unwrap_err().code, BUS_MCEERR_AR);
    tmpfs::allocate(&sufferer.file, Range::at(FOLIO, FOLIO)).unwrap();
    // 25 is MADV_COLLAPSE.
    let collapse = sufferer.mapping.advise_range(Range::at(FOLIO, FOLIO), 25);
    assert!(is(&collapse, Errno::AGAIN), "{collapse:?}");
    let populate = sufferer.mapping.advise_range(bad(), libc::MADV_POPULATE_WRITE);
    assert!(is(&populate, Errno::HWPOISON), "{populate:?}");
    sufferer.assert_suffers();
}

fn is(result: &Result<(), Error>, errno: Errno) -> bool {
    matches!(result, Err(Error::Os(found)) if *found == errno)
}

fn a_punched_error_is_healthy_when_it_is_filled_again() {
    let sufferer = Sufferer::new();
    tmpfs::punch(&sufferer.file, bad()).unwrap();
    assert_eq!(sufferer.mapping.walk(), []);
    assert_eq!(sufferer.read_bad(), Ok(0));
    sufferer.mapping.store(BAD, 9).unwrap();
    assert_eq!(sufferer.read_bad(), Ok(9));
    assert_eq!(sufferer.blocks(), (0, 1024, 1024));
    sufferer.mapping.advise_range(Range::at(FOLIO, FOLIO), 25).expect("MADV_COLLAPSE");
}

fn a_truncation_at_an_error_discards_it_and_one_inside_not() {
    let sufferer = Sufferer::new();
    sufferer.file.set_len(BAD + 100).unwrap();
    assert_eq!(sufferer.read_bad(), Err(Errno::IO));
    assert_eq!(sufferer.blocks(), (506, 518, 518));
    sufferer.file.set_len(BAD).unwrap();
    assert_eq!(sufferer.blocks(), (507, 517, 517));
    sufferer.file.set_len(SIZE).unwrap();
    assert_eq!(sufferer.mapping.walk(), []);
}

// ---- a pool -------------------------------------------------------------------------------------

/// Makes a file of sevens with an error. Returns the process that maps the file.
fn suffer(path: &Path) -> Toucher {
    std::fs::write(path, vec![7; SIZE as usize]).unwrap();
    let mut toucher = Toucher::mapping(path, SIZE);
    assert_eq!(toucher.walk(), []);
    assert_eq!(toucher.ask(&format!("advise {BAD} {SUBPAGE} {}", libc::MADV_HWPOISON)), "ok");
    toucher
}

fn suffering_pool() -> (Pool, PathBuf, Toucher) {
    let pool = Pool::mount("pagesize=2M,size=8M,collapse=off");
    let path = pool.join("file");
    let toucher = suffer(&path);
    (pool, path, toucher)
}

fn a_real_error_costs_its_subpage_only() {
    let (pool, path, mut toucher) = suffering_pool();
    let mut other = Toucher::mapping(&path, SIZE);
    for process in [&mut toucher, &mut other] {
        assert_eq!(process.ask("walk"), format!("hits {BAD}:{BUS_MCEERR_AR}"));
        assert_eq!(
            process.ask(&format!("store {} 1", BAD + 4095)),
            format!("sigbus {BAD} {BUS_MCEERR_AR}")
        );
        assert_eq!(process.huge(), 1, "the other folio stays in one piece");
        assert_eq!(process.ask(&format!("differ 0 {BAD} 7")), "count 0");
        assert_eq!(
            process.ask(&format!("differ {} {} 7", BAD + SUBPAGE, SIZE - BAD - SUBPAGE)),
            "count 0"
        );
    }
    let file = File::open(&path).unwrap();
    let mut buffer = vec![0; SIZE as usize];
    assert_eq!(errno(file.read_at(&mut buffer, BAD)), Err(Errno::IO));
    file.read_exact_at(&mut buffer[..BAD as usize], 0).unwrap();
    assert_eq!(errno(file.read_at(&mut buffer, BAD - 100)), Ok(100), "up to the error");
    file.read_exact_at(&mut buffer[BAD as usize..(SIZE - SUBPAGE) as usize], BAD + SUBPAGE)
        .unwrap();
    assert!(buffer[..(SIZE - SUBPAGE) as usize].iter().all(|byte| *byte == 7));
    pool.check();
    drop((toucher, other, file));
    pool.unmount();
}

fn quarantine_and_repair_heal_a_real_error() {
    let (pool, path, mut toucher) = suffering_pool();
    poison(&path, BAD, SUBPAGE).unwrap();
    let walked = toucher.ask("walk");
    assert_eq!(
        walked,
        format!("hits {BAD}:{BUS_MCEERR_AR}"),
        "it is the kernel's, and quarantined already"
    );
    pool.check();
    assert_eq!(set(&path, REPAIR, "salvage all"), Err(Errno::NODATA), "the bytes are lost");
    set(&path, REPAIR, "zero all").unwrap();
    assert_eq!(toucher.walk(), []);
    assert_eq!(toucher.load(BAD), Some(0));
    assert!(toucher.store(BAD, 9));
    assert_eq!(crate::support::get(&path, POISON), Err(Errno::NODATA));
    pool.check();
    drop(toucher);
    pool.unmount();
}

fn a_repair_heals_a_real_error_that_nobody_has_looked_for() {
    let (pool, path, mut toucher) = suffering_pool();
    set(&path, REPAIR, format!("zero {BAD} {SUBPAGE}")).unwrap();
    assert_eq!(toucher.walk(), []);
    assert_eq!(toucher.load(BAD), Some(0));
    assert_eq!(set(&path, REPAIR, "zero all"), Err(Errno::NODATA), "nothing else is lost");
    pool.check();
    drop(toucher);
    pool.unmount();
}

fn a_file_with_a_real_error_gives_healthy_pages_back() {
    let (pool, path, toucher) = suffering_pool();
    std::fs::remove_file(&path).unwrap();
    drop(toucher);
    pool.wait_for_free_pages(4);
    pool.check();
    std::fs::write(&path, vec![8; 4 * FOLIO as usize]).unwrap();
    let mut toucher = Toucher::mapping(&path, 4 * FOLIO);
    assert_eq!(toucher.walk(), []);
    assert_eq!(toucher.huge(), 4);
    pool.check();
    drop(toucher);
    pool.unmount();
}

/// The write covers an error that no process knows of yet, and a known error behind it.
fn a_write_over_errors_returns_its_true_prefix() {
    const LENGTH: u64 = 1 << 20;
    let (unknown, known) = (25 * SUBPAGE, LENGTH / 2);
    let pool = Pool::mount("pagesize=2M,size=8M,collapse=off");
    let path = pool.join("file");
    std::fs::write(&path, vec![7; SIZE as usize]).unwrap();
    let mut toucher = Toucher::mapping(&path, SIZE);
    assert_eq!(toucher.walk(), []);
    let poison_at = |toucher: &mut Toucher, offset: u64| {
        assert_eq!(
            toucher.ask(&format!("advise {offset} {SUBPAGE} {}", libc::MADV_HWPOISON)),
            "ok"
        );
    };
    poison_at(&mut toucher, known);
    assert_eq!(crate::support::get(&path, POISON).unwrap().lines().count(), 1, "it is known now");
    poison_at(&mut toucher, unknown);
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let written = file.write_at(&vec![2; LENGTH as usize], 0).unwrap() as u64;
    println!("pwrite of {LENGTH}: {written}");
    for subpage in Range::new(0, written).steps(SUBPAGE) {
        let mut byte = [0];
        assert_eq!(errno(file.read_at(&mut byte, subpage.start)), Ok(1), "{subpage}");
        assert_eq!(byte, [2], "{subpage} was said to be written");
    }
    file.write_all_at(&vec![2; (LENGTH - written) as usize], written).unwrap();
    let mut bytes = vec![0; LENGTH as usize];
    // The process that was hit cannot read it: its page table keeps the kernel's mark.
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes.iter().all(|byte| *byte == 2));
    pool.check();
    drop((toucher, file));
    pool.unmount();
}
