//! Quarantine and repair while programs touch the memory concerned, at every instruction.

mod support;

use rustix::io::Errno;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use support::{COLLAPSE, FOLIO, POISON, Pool, REPAIR, SUBPAGE, Toucher, get, poison, set};

/// The number of touches after which a test believes a hammer.
const ENOUGH: u64 = 50;

/// Tests with hammers hold this lock: the hammers of two tests would take processor time from each
/// other.
static HAMMERS: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    HAMMERS.lock().unwrap_or_else(PoisonError::into_inner)
}

fn filled(pool: &Pool, size: u64, byte: u8) -> PathBuf {
    let file = pool.join("file");
    std::fs::write(&file, vec![byte; size as usize]).unwrap();
    file
}

fn open(file: &Path) -> File {
    OpenOptions::new().read(true).write(true).open(file).unwrap()
}

fn hammering(file: &Path, size: u64, offset: u64) -> Toucher {
    let mut toucher = Toucher::mapping(file, size);
    assert_eq!(toucher.ask(&format!("hammer {offset}")), "ok");
    toucher
}

/// The touches and the SIGBUS of a hammer. `from` is `tally N` or `stop`.
fn touches_and_faults(toucher: &mut Toucher, from: &str) -> (u64, u64) {
    let answer = toucher.ask(from);
    let counts: Vec<u64> =
        answer.split(' ').skip(1).map(|word| word.parse().expect("a number")).collect();
    match counts[..] {
        [touches, faults] => (touches, faults),
        _ => panic!("{from}: {answer}"),
    }
}

fn assert_all_faults(toucher: &mut Toucher) {
    let (touches, faults) = touches_and_faults(toucher, &format!("tally {ENOUGH}"));
    assert_eq!(faults, touches, "touches that began after the request had returned got through");
}

fn assert_no_faults(toucher: &mut Toucher) {
    let (_, faults) = touches_and_faults(toucher, &format!("tally {ENOUGH}"));
    assert_eq!(faults, 0, "touches that began after the repair had returned were SIGBUS");
}

#[test]
fn a_quarantine_of_a_hammered_subpage_holds_at_once() {
    let _alone = alone();
    let pool = Pool::small(1);
    let file = filled(&pool, FOLIO, 7);
    let mut hammer = hammering(&file, FOLIO, 0x5000);
    let mut walker = Toucher::mapping(&file, FOLIO);
    for round in 0..200 {
        poison(&file, 0x5000, 1).unwrap_or_else(|errno| panic!("round {round}: {errno}"));
        assert_all_faults(&mut hammer);
        assert_eq!(walker.walk(), [0x5000]);
        set(&file, REPAIR, "salvage all").unwrap_or_else(|errno| panic!("round {round}: {errno}"));
        assert_no_faults(&mut hammer);
    }
    touches_and_faults(&mut hammer, "stop");
    // The hammer may have read the hammered byte as zero in passing, and stored that.
    assert_eq!(walker.count(&format!("differ 0 {} 7", 0x5000)), 0);
    assert_eq!(walker.count(&format!("differ {} {} 7", 0x5001, FOLIO - 0x5001)), 0);
    pool.check();
}

#[test]
fn a_quarantine_holds_against_two_hammering_processes() {
    let _alone = alone();
    let pool = Pool::small(1);
    let file = filled(&pool, FOLIO, 7);
    let mut hammers = [hammering(&file, FOLIO, 0x5000), hammering(&file, FOLIO, 0x5800)];
    for round in 0..60 {
        poison(&file, 0x5000, 1).unwrap_or_else(|errno| panic!("round {round}: {errno}"));
        hammers.iter_mut().for_each(assert_all_faults);
        set(&file, REPAIR, "zero all").unwrap_or_else(|errno| panic!("round {round}: {errno}"));
        hammers.iter_mut().for_each(assert_no_faults);
    }
    pool.check();
}

#[test]
fn a_quarantine_leaves_other_hammered_holes_shut() {
    let _alone = alone();
    let pool = Pool::small(2);
    let file = filled(&pool, 2 * FOLIO, 7);
    // One hole is in this folio, next to the later quarantine. The other is in another folio.
    set(&file, POISON, format!("0x4000 1\n{} 1", FOLIO + 0x9000)).unwrap();
    let mut hammers =
        [hammering(&file, 2 * FOLIO, 0x4000), hammering(&file, 2 * FOLIO, FOLIO + 0x9000)];
    let mut walker = Toucher::mapping(&file, 2 * FOLIO);
    for round in 0..40 {
        let offset = if round % 2 == 0 { 0x5000 } else { FOLIO + 0x20000 };
        poison(&file, offset, 1).unwrap_or_else(|errno| panic!("round {round}: {errno}"));
        hammers.iter_mut().for_each(assert_all_faults);
        let mut holes = vec![0x4000, FOLIO + 0x9000, offset];
        holes.sort_unstable();
        assert_eq!(walker.walk(), holes, "round {round}");
        set(&file, REPAIR, format!("salvage {offset} 1")).unwrap();
        hammers.iter_mut().for_each(assert_all_faults);
    }
    pool.check();
    drop(hammers);
    set(&file, REPAIR, "salvage all").unwrap();
    assert_eq!(walker.count(&format!("differ 0 {} 7", 2 * FOLIO)), 0);
    pool.check();
}

#[test]
fn a_repair_leaves_other_holes_shut_and_counts_strays() {
    let _alone = alone();
    let pool = Pool::small(1);
    let file = filled(&pool, FOLIO, 7);
    let holes: Vec<u64> =
        [3u64, 4, 100, 101, 102, 400, 511].iter().map(|subpage| subpage * SUBPAGE).collect();
    for hole in &holes {
        poison(&file, *hole, 1).unwrap();
    }
    let mut hammers = [hammering(&file, FOLIO, holes[1]), hammering(&file, FOLIO, holes[5])];
    let mut walker = Toucher::mapping(&file, FOLIO);
    for round in 0..60 {
        let repaired = holes[[0, 2, 3, 4, 6][round % 5]];
        set(&file, REPAIR, format!("salvage {repaired} 1"))
            .unwrap_or_else(|errno| panic!("round {round}: {errno}"));
        hammers.iter_mut().for_each(assert_all_faults);
        let left: Vec<u64> = holes.iter().copied().filter(|hole| *hole != repaired).collect();
        assert_eq!(walker.walk(), left, "round {round}");
        assert_eq!(walker.count(&format!("differ {repaired} {SUBPAGE} 7")), 0, "round {round}");
        if round % 10 == 0 {
            pool.check();
        }
        poison(&file, repaired, 1).unwrap();
    }
    let touched: u64 = hammers
        .iter_mut()
        .map(|hammer| touches_and_faults(hammer, "stop"))
        .map(|(touches, faults)| touches - faults)
        .sum();
    let counted = pool.counter("holes_shut_again");
    assert!(
        touched == 0 || counted > 0,
        "{touched} touches got through and no hole was shut again"
    );
    if counted > 0 {
        pool.await_log("was filled in passing; it is shut again");
    }
    pool.check();
}

#[test]
fn a_covering_write_leaves_other_hammered_holes_shut() {
    let _alone = alone();
    let pool = Pool::small(1);
    let file = filled(&pool, FOLIO, 7);
    let mut hammer = hammering(&file, FOLIO, 0x8000);
    let fd = open(&file);
    poison(&file, 0x8000, 1).unwrap();
    for round in 0..100 {
        set(&file, POISON, "0x4000 0x1000\n0x6000 0x1000").unwrap();
        let data = vec![round as u8; 0x3000];
        fd.write_all_at(&data, 0x4000).unwrap();
        assert_all_faults(&mut hammer);
        let mut read = vec![0; 0x8000];
        assert_eq!(fd.read_at(&mut read, 0x4000).unwrap(), 0x4000, "the hole at 0x8000 ends it");
        assert!(read[..0x3000] == data, "round {round}");
    }
    pool.check();
}

#[test]
fn truncating_under_hammers_discards_the_holes() {
    let _alone = alone();
    let pool = Pool::small(2);
    let file = filled(&pool, 2 * FOLIO, 7);
    let fd = open(&file);
    let mut hammers =
        [hammering(&file, 2 * FOLIO, 0x5000), hammering(&file, 2 * FOLIO, FOLIO + 0x7000)];
    for round in 0..30 {
        set(&file, POISON, format!("0x5000 1\n{} 1\n{} 1", FOLIO + 0x7000, FOLIO + 0x9000))
            .unwrap();
        fd.set_len([0, 1, 0x5000, 0x3001][round % 4])
            .unwrap_or_else(|error| panic!("round {round}: {error}"));
        hammers.iter_mut().for_each(assert_all_faults);
        assert_eq!(get(&file, POISON), Err(Errno::NODATA));
        pool.check();
        fd.set_len(2 * FOLIO).unwrap();
        hammers.iter_mut().for_each(assert_no_faults);
        pool.check();
    }
}

// ---- neighbours ---------------------------------------------------------------------------------

#[test]
fn quarantine_and_repair_never_change_the_bytes_beside() {
    let pool = Pool::small(1);
    let file = filled(&pool, FOLIO, 7);
    let fd = open(&file);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut rounds = 0u64;
            while !stop.load(Ordering::Relaxed) {
                let mut bytes = [0; SUBPAGE as usize];
                for offset in [0x4000, 0x6000] {
                    fd.read_exact_at(&mut bytes, offset).unwrap();
                    assert!(bytes.iter().all(|byte| *byte == 7), "{offset:#x}");
                }
                rounds += 1;
            }
            rounds
        });
        let writer = scope.spawn(|| {
            let mut last = 7u8;
            while !stop.load(Ordering::Relaxed) {
                last = last.wrapping_add(1);
                fd.write_all_at(&[last; SUBPAGE as usize], 0x3000).unwrap();
                let mut bytes = [0; SUBPAGE as usize];
                fd.read_exact_at(&mut bytes, 0x3000).unwrap();
                assert!(bytes.iter().all(|byte| *byte == last), "what was written is not there");
            }
            last
        });
        let mut mapped = Toucher::mapping(&file, FOLIO);
        let end = Stop(&stop);
        for _ in 0..100 {
            poison(&file, 0x5000, 1).unwrap();
            assert_eq!(mapped.count("differ 16384 4096 7"), 0);
            set(&file, REPAIR, "salvage all").unwrap();
            assert_eq!(mapped.count("differ 16384 12288 7"), 0);
        }
        drop(end);
        assert!(reader.join().unwrap() > 0);
        writer.join().unwrap();
    });
    pool.check();
}

/// Ends the other threads of a test, also after a panic.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

// ---- pinned folios ------------------------------------------------------------------------------

/// The limit for a refusal, on a machine that does other work.
const SOON: Duration = Duration::from_secs(2);

/// Asserts that a quarantine at `offset` is refused soon, and that every byte is unchanged.
fn assert_refused_as_pinned(
    pool: &Pool,
    file: &Path,
    toucher: &mut Toucher,
    offset: u64,
    size: u64,
) {
    let before = get(file, POISON);
    let holes = toucher.walk();
    let started = Instant::now();
    assert_eq!(poison(file, offset, 1), Err(Errno::BUSY), "{offset:#x}");
    let took = started.elapsed();
    assert!(took < SOON, "{took:?} for a refusal");
    assert_eq!(get(file, POISON), before);
    assert_eq!(toucher.walk(), holes);
    let length = SUBPAGE.min(size - offset);
    assert_eq!(toucher.count(&format!("differ {offset} {length} 7")), 0, "its bytes are as before");
    pool.await_log("pinned");
    pool.check();
}

#[test]
fn a_pinned_folio_is_refused_with_its_bytes_as_before() {
    let pool = Pool::small(2);
    let file = filled(&pool, 2 * FOLIO, 7);
    let mut toucher = Toucher::mapping(&file, 2 * FOLIO);
    let places = [(0x5000, 0x5000), (0x5000, 0), (0, FOLIO - SUBPAGE), (FOLIO + 0x7000, FOLIO)];
    for (pin, (pinned, wanted)) in
        ["pin", "pin-for-io"].into_iter().flat_map(|pin| places.map(|place| (pin, place)))
    {
        assert_eq!(toucher.ask(&format!("{pin} {pinned}")), "ok");
        assert_refused_as_pinned(&pool, &file, &mut toucher, wanted, 2 * FOLIO);
        assert_eq!(toucher.ask("unpin"), "ok");
        poison(&file, wanted, 1).unwrap();
        assert_eq!(toucher.walk(), [wanted]);
        set(&file, REPAIR, "salvage all").unwrap();
        set(&file, COLLAPSE, "all").unwrap();
        assert_eq!(toucher.count(&format!("differ 0 {} 7", 2 * FOLIO)), 0);
    }
    pool.check();
}

/// A pin never has a new page in place of lost memory. Beside lost memory, a pin delays no repair
/// and no quarantine.
#[test]
fn lost_memory_cannot_be_pinned_and_is_repaired_beside_pins() {
    let pool = Pool::small(2);
    let file = filled(&pool, 2 * FOLIO, 7);
    let mut toucher = Toucher::mapping(&file, 2 * FOLIO);
    poison(&file, 0x5000, 1).unwrap();
    for pin in ["pin", "pin-for-io"] {
        let answer = toucher.ask(&format!("{pin} 20480"));
        assert!(answer.contains("Bad address"), "{answer}");
        assert_eq!(toucher.walk(), [0x5000]);
        assert_eq!(toucher.ask(&format!("{pin} 24576")), "ok");
        set(&file, REPAIR, "salvage all").unwrap();
        assert_eq!(toucher.count(&format!("differ 0 {} 7", 2 * FOLIO)), 0);
        // The 2 MiB are in small pages as long as the pin lasts, so nothing has to be split.
        assert_eq!(set(&file, COLLAPSE, "all"), Err(Errno::BUSY));
        poison(&file, 0x5000, 2 * SUBPAGE).unwrap();
        assert_eq!(toucher.walk(), [0x5000, 0x6000]);
        assert_eq!(toucher.ask("unpin"), "ok");
        set(&file, REPAIR, "salvage all").unwrap();
        set(&file, COLLAPSE, "all").unwrap();
        assert_eq!(toucher.count(&format!("differ 0 {} 7", 2 * FOLIO)), 0);
        poison(&file, 0x5000, 1).unwrap();
        pool.check();
    }
}

/// The kernel refers to a folio for a moment for many reasons, which look like this pin.
#[test]
fn a_folio_that_is_pinned_for_a_moment_is_quarantined() {
    const MOMENT: Duration = Duration::from_millis(200);
    let pool = Pool::small(1);
    let file = filled(&pool, FOLIO, 7);
    let mut toucher = Toucher::mapping(&file, FOLIO);
    assert_eq!(toucher.ask("pin 20480"), "ok");
    std::thread::scope(|scope| {
        let quarantine = scope.spawn(|| poison(&file, 0, 1));
        std::thread::sleep(MOMENT);
        assert!(!quarantine.is_finished(), "the folio cannot be split, and there is time left");
        assert_eq!(toucher.ask("unpin"), "ok");
        assert_eq!(quarantine.join().unwrap(), Ok(()));
    });
    assert_eq!(toucher.walk(), [0]);
    set(&file, REPAIR, "salvage all").unwrap();
    assert_eq!(toucher.count(&format!("differ 0 {FOLIO} 7")), 0);
    pool.check();
}

#[test]
fn a_pinned_folio_at_the_end_of_file_is_refused_unchanged() {
    for size in [100, SUBPAGE, SUBPAGE + 1, 3 * SUBPAGE + 5] {
        let pool = Pool::small(1);
        let file = filled(&pool, size, 7);
        let mut toucher = Toucher::mapping(&file, size);
        assert_eq!(toucher.ask("pin 0"), "ok");
        assert_refused_as_pinned(&pool, &file, &mut toucher, 0, size);
        assert_refused_as_pinned(&pool, &file, &mut toucher, (size - 1) / SUBPAGE * SUBPAGE, size);
        assert_eq!(toucher.ask("unpin"), "ok");
        poison(&file, 0, 1).unwrap();
        assert_eq!(toucher.load(0), None);
        pool.check();
    }
}

#[test]
fn a_pin_in_a_split_folio_is_refused_soon_or_does_no_harm() {
    let pool = Pool::small(1);
    let file = filled(&pool, FOLIO, 7);
    let mut toucher = Toucher::mapping(&file, FOLIO);
    poison(&file, 0x100000, 1).unwrap();
    for (pinned, wanted) in [
        (0x101000, 0x101000),
        (0x102000, 0x103000),
        (0x104000, 0x107000),
        (0x110000, 0x11f000),
        (0x180000, 0x1ff000),
        (0xff000, 0xff000),
        (0xff000, 0xfe000),
        (0x80000, 0x81000),
        (0, 0x7f000),
    ] {
        assert_eq!(toucher.ask(&format!("pin {pinned}")), "ok");
        let started = Instant::now();
        let result = poison(&file, wanted, 1);
        let took = started.elapsed();
        assert!(took < SOON, "{took:?} for {result:?} of {wanted:#x}");
        match result {
            Ok(()) => {
                assert!(toucher.walk().contains(&wanted));
                set(&file, REPAIR, format!("salvage {wanted} 1")).unwrap();
            }
            Err(errno) => assert_eq!(errno, Errno::BUSY, "{pinned:#x} {wanted:#x}"),
        }
        assert_eq!(toucher.walk(), [0x100000], "{pinned:#x} {wanted:#x}");
        assert_eq!(
            toucher.count(&format!("differ {wanted} {SUBPAGE} 7")),
            0,
            "{pinned:#x} {wanted:#x}"
        );
        pool.check();
        assert_eq!(toucher.ask("unpin"), "ok");
        poison(&file, wanted, 1).unwrap();
        set(&file, REPAIR, format!("salvage {wanted} 1")).unwrap();
    }
    set(&file, REPAIR, "salvage all").unwrap();
    assert_eq!(toucher.count(&format!("differ 0 {FOLIO} 7")), 0);
    pool.check();
}

#[test]
fn a_failed_quarantine_leaves_the_holes_of_others_shut() {
    let _alone = alone();
    let pool = Pool::small(2);
    let file = filled(&pool, 2 * FOLIO, 7);
    let mut hammer = hammering(&file, 2 * FOLIO, 0x5000);
    poison(&file, 0x5000, 1).unwrap();
    let mut toucher = Toucher::mapping(&file, 2 * FOLIO);
    assert_eq!(toucher.ask(&format!("pin {FOLIO}")), "ok");
    for _ in 0..5 {
        assert_eq!(poison(&file, FOLIO + SUBPAGE, 1), Err(Errno::BUSY));
        assert_all_faults(&mut hammer);
        assert_eq!(toucher.walk(), [0x5000]);
        assert_eq!(toucher.count(&format!("differ {FOLIO} 12288 7")), 0);
    }
    pool.check();
}

/// The kernel delivers large reads from the worker's mapping of the file. In a hole it would find
/// zeros.
#[test]
fn large_reads_beside_quarantines_end_before_lost_bytes() {
    const ROUNDS: u64 = 300;
    const PLACE: u64 = FOLIO + 100 * SUBPAGE;
    let pool = Pool::small(4);
    let file = filled(&pool, 2 * FOLIO, 7);
    let (stop, shortened) = (AtomicBool::new(false), Mutex::new(0));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let (reader, mut bytes) = (open(&file), vec![0; 1 << 20]);
                while !stop.load(Ordering::Relaxed) {
                    let read = reader.read_at(&mut bytes, FOLIO).unwrap();
                    assert!(
                        bytes[..read].iter().all(|byte| *byte == 7),
                        "zeros in place of what is lost"
                    );
                    let lost = read as u64 == PLACE - FOLIO;
                    assert!(lost || read == bytes.len(), "{read} bytes");
                    *shortened.lock().unwrap() += u64::from(lost);
                }
            });
        }
        let writer = open(&file);
        for round in 0..ROUNDS {
            poison(&file, PLACE, 1).unwrap();
            set(&file, REPAIR, "salvage all").unwrap();
            writer.set_len(if round % 2 == 0 { 4 * FOLIO } else { 2 * FOLIO }).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
    });
    println!("{} reads ended at the quarantine", shortened.into_inner().unwrap());
    pool.check();
}
