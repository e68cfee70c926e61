//! Descriptors by which the kernel itself reads a file's memory (`io=native`). No program ever
//! reads zeros from a hole by such a descriptor.

use crate::support::{
    FOLIO, GIB, POISON, Pool, REPAIR, SUBPAGE, Toucher, Worker, get, kill_worker, poison, set,
};
use rustix::io::Errno;
use rustix::process::Signal;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// The subpage that the tests quarantine and repair.
const PLACE: u64 = FOLIO + 3 * SUBPAGE;

fn native(pages: u64) -> Pool {
    Pool::mount(&format!("pagesize=2M,size={},io=native", pages * FOLIO))
}

/// Makes a file of two folios of sevens.
fn sevens(pool: &Pool, name: &str) -> PathBuf {
    let path = pool.join(name);
    fs::write(&path, vec![7; 2 * FOLIO as usize]).unwrap();
    path
}

fn open_to_write(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

/// Reads a subpage by a descriptor.
fn read_subpage(file: &File, at: u64) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0xee; SUBPAGE as usize];
    let read = file.read_at(&mut bytes, at)?;
    bytes.truncate(read);
    Ok(bytes)
}

#[test]
fn who_opens_for_reading_only_reads_without_the_daemon() {
    let pool = native(4);
    let path = sevens(&pool, "file");
    let file = File::open(&path).unwrap();
    assert_eq!(pool.counter("opened_natively"), 1);
    let worker = Worker::of(&pool);
    worker.stop();
    let bytes = read_subpage(&file, PLACE).unwrap();
    let mut all = io::Cursor::new(Vec::new());
    io::copy(&mut &file, &mut all).unwrap();
    worker.signal(Signal::CONT);
    assert_eq!(bytes, [7; SUBPAGE as usize]);
    assert_eq!(all.into_inner(), vec![7; 2 * FOLIO as usize]);
}

#[test]
fn who_opens_for_writing_does_not() {
    let pool = native(4);
    let path = sevens(&pool, "file");
    let files = [open_to_write(&path), File::options().append(true).open(&path).unwrap()];
    assert_eq!(pool.counter("opened_natively"), 0);
    poison(&path, PLACE, 1).unwrap();
    assert_eq!(
        read_subpage(&files[0], PLACE).unwrap_err().raw_os_error(),
        Some(Errno::IO.raw_os_error())
    );
}

#[test]
fn a_native_descriptor_sees_every_store_write_and_resize() {
    let pool = native(8);
    let path = sevens(&pool, "file");
    let (reader, writer) = (File::open(&path).unwrap(), open_to_write(&path));
    let mut toucher = Toucher::mapping(&path, 2 * FOLIO);
    for byte in 1..100 {
        assert!(toucher.store(PLACE, byte));
        writer.write_all_at(&[byte], PLACE + 1).unwrap();
        assert_eq!(read_subpage(&reader, PLACE).unwrap()[..3], [byte, byte, 7]);
        // By sendfile(2), on which io::copy is built, a program reads no older copy either.
        let mut copy = Vec::new();
        io::copy(&mut io::Read::take(&reader, PLACE + 2), &mut copy).unwrap();
        io::Seek::rewind(&mut &reader).unwrap();
        assert_eq!(copy[PLACE as usize..], [byte, byte]);
    }
    writer.set_len(PLACE + 2).unwrap();
    assert_eq!(read_subpage(&reader, PLACE).unwrap(), [99, 99]);
    writer.set_len(3 * FOLIO).unwrap();
    assert_eq!(read_subpage(&reader, PLACE + SUBPAGE).unwrap(), [0; SUBPAGE as usize]);
}

#[test]
fn who_appends_shows_nothing_before_the_bytes_are_there() {
    let pool = native(2);
    let path = pool.join("file");
    let (writer, stop) = (open_to_write_new(&path), AtomicBool::new(false));
    writer.write_all_at(&[7; SUBPAGE as usize], 0).unwrap();
    let reader = File::open(&path).unwrap();
    std::thread::scope(|scope| {
        let looking = scope.spawn(|| {
            let mut bytes = vec![0xee; 2 * FOLIO as usize];
            let mut looks = 0;
            while !stop.load(Ordering::Relaxed) {
                let read = reader.read_at(&mut bytes, 0).unwrap();
                assert!(
                    bytes[..read].iter().all(|byte| *byte == 7),
                    "zeros in place of what is being written"
                );
                looks += 1;
            }
            looks
        });
        for at in (SUBPAGE..FOLIO).step_by(SUBPAGE as usize) {
            writer.write_all_at(&[7; SUBPAGE as usize], at).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        println!("{} looks", looking.join().expect("it has found nothing wrong"));
    });
    assert_eq!(fs::metadata(&path).unwrap().len(), FOLIO);
    pool.check();
}

#[test]
fn sendfile_by_a_native_descriptor_reads_what_was_stored_last() {
    let pool = native(4);
    let path = sevens(&pool, "file");
    let (reader, mut toucher) = (File::open(&path).unwrap(), Toucher::mapping(&path, 2 * FOLIO));
    let directory = tempfile::tempdir().unwrap();
    let target = open_to_write_new(&directory.path().join("copy"));
    for byte in 1..20 {
        assert!(toucher.store(PLACE, byte));
        let mut from = PLACE;
        assert_eq!(rustix::fs::sendfile(&target, &reader, Some(&mut from), 1), Ok(1));
    }
    assert_eq!(fs::read(directory.path().join("copy")).unwrap(), (1..20).collect::<Vec<u8>>());
}

fn open_to_write_new(path: &Path) -> File {
    File::options().read(true).write(true).create_new(true).open(path).unwrap()
}

#[test]
fn as_long_as_somebody_reads_natively_no_quarantine_is_made() {
    let pool = native(4);
    let path = sevens(&pool, "file");
    let readers = [File::open(&path).unwrap(), File::open(&path).unwrap()];
    for reader in readers {
        assert_eq!(poison(&path, PLACE, 1), Err(Errno::BUSY));
        assert_eq!(get(&path, POISON), Err(Errno::NODATA));
        assert_eq!(read_subpage(&reader, PLACE).unwrap(), [7; SUBPAGE as usize]);
        assert_eq!(
            poison(&path, 2 * FOLIO, 1),
            Err(Errno::INVAL),
            "what makes no sense is told first"
        );
    }
    pool.await_log("open for reading natively");
    poison(&path, PLACE, 1).unwrap();
    pool.check();
}

#[test]
fn a_descriptor_that_was_closed_is_in_nobodys_way() {
    let pool = native(4);
    let path = sevens(&pool, "file");
    for _ in 0..200 {
        drop(File::open(&path).unwrap());
        poison(&path, PLACE, 1).unwrap();
        set(&path, REPAIR, "salvage all").unwrap();
    }
    // More quarantines wait for closes at once than there are threads to receive the closes.
    fs::remove_file(path).unwrap();
    let paths: Vec<PathBuf> = (0..2).map(|n| sevens(&pool, &n.to_string())).collect();
    for round in 0..20 {
        let readers: Vec<File> = paths.iter().map(|path| File::open(path).unwrap()).collect();
        std::thread::scope(|scope| {
            for n in 0..24 {
                let path = &paths[n % 2];
                scope.spawn(move || poison(path, n as u64 * SUBPAGE, 1).unwrap());
            }
            drop(readers);
        });
        paths.iter().for_each(|path| set(path, REPAIR, "zero all").unwrap());
        assert_eq!(pool.counter("opened_natively"), 0, "round {round}");
    }
    pool.check();
}

#[test]
fn the_daemon_reads_a_quarantined_file_until_a_later_open() {
    let pool = native(4);
    let path = sevens(&pool, "file");
    poison(&path, PLACE, 1).unwrap();
    let mediated = File::open(&path).unwrap();
    assert_eq!(pool.counter("opened_natively"), 0);
    assert_eq!(
        read_subpage(&mediated, PLACE).unwrap_err().raw_os_error(),
        Some(Errno::IO.raw_os_error())
    );
    set(&path, REPAIR, "salvage all").unwrap();
    let native = File::open(&path).unwrap();
    assert_eq!(pool.counter("opened_natively"), 1);
    assert_eq!(read_subpage(&mediated, PLACE).unwrap(), read_subpage(&native, PLACE).unwrap());
    drop(native);
    poison(&path, PLACE, 1).unwrap();
    assert!(read_subpage(&mediated, PLACE).is_err());
}

#[test]
fn the_next_worker_knows_who_reads_natively() {
    let pool = native(4);
    let path = sevens(&pool, "file");
    let readers: Vec<File> = (0..3).map(|_| File::open(&path).unwrap()).collect();
    for reader in readers {
        kill_worker(&pool);
        assert_eq!(poison(&path, PLACE, 1), Err(Errno::BUSY));
        assert_eq!(read_subpage(&reader, PLACE).unwrap(), [7; SUBPAGE as usize]);
        kill_worker(&pool);
        drop(reader); // the next worker learns of it
    }
    poison(&path, PLACE, 1).unwrap();
    assert_eq!(pool.counter("opened_natively"), 0);
    pool.check();
}

#[test]
fn the_io_option_decides_if_the_daemon_reads() {
    let looks = Path::new("/sys/devices/system/node/node0/memory_failure").exists();
    for (io, meant) in [("mediated", 0), ("auto", u64::from(looks))] {
        let pool = Pool::mount(&format!("pagesize=2M,size={},io={io}", 2 * FOLIO));
        let path = sevens(&pool, "file");
        let _reader = File::open(&path).unwrap();
        assert_eq!(pool.counter("opened_natively"), meant, "{io}");
    }
}

#[test]
fn a_gigantic_page_is_read_natively_at_its_end_as_at_its_start() {
    let pool = Pool::mount(&format!("size={GIB},io=native"));
    let path = pool.join("file");
    let writer = open_to_write_new(&path);
    writer.set_len(GIB).unwrap();
    writer.write_all_at(&[9], GIB - 1).unwrap();
    let reader = File::open(&path).unwrap();
    assert_eq!(read_subpage(&reader, GIB - SUBPAGE).unwrap().last(), Some(&9));
    assert_eq!(read_subpage(&reader, GIB).unwrap(), []);
}

// ---- every order of open, inject, read, repair --------------------------------------------------

/// One step in the life of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    OpenToRead,
    OpenToWrite,
    Close,
    Inject,
    Salvage,
    Zero,
    WriteOver,
}

const ACTS: [Act; 7] = [
    Act::OpenToRead,
    Act::OpenToWrite,
    Act::Close,
    Act::Inject,
    Act::Salvage,
    Act::Zero,
    Act::WriteOver,
];
const LENGTH: u32 = 4;

/// A file, its open descriptors, and the contents of its subpage.
struct History {
    path: PathBuf,
    /// Each descriptor, and true if it reads natively.
    open: Vec<(File, bool)>,
    quarantined: bool,
    byte: u8,
}

impl History {
    fn act(&mut self, act: Act) {
        match act {
            Act::OpenToRead => {
                let file = File::open(&self.path).unwrap();
                self.open.push((file, !self.quarantined));
            }
            Act::OpenToWrite => self.open.push((open_to_write(&self.path), false)),
            Act::Close if !self.open.is_empty() => drop(self.open.remove(0)),
            Act::Close => {}
            Act::Inject => self.inject(),
            Act::Salvage => self.repair("salvage all", self.byte),
            Act::Zero => self.repair("zero all", 0),
            Act::WriteOver => {
                self.byte = self.byte.max(7) + 1;
                let file = File::options().write(true).open(&self.path).unwrap();
                file.write_all_at(&[self.byte; SUBPAGE as usize], PLACE).unwrap();
                self.quarantined = false;
            }
        }
    }

    fn inject(&mut self) {
        let refused = self.open.iter().any(|(_, native)| *native) && !self.quarantined;
        let answer = poison(&self.path, PLACE, 1);
        assert_eq!(answer, if refused { Err(Errno::BUSY) } else { Ok(()) });
        self.quarantined |= !refused;
    }

    fn repair(&mut self, how: &str, byte: u8) {
        let answer = set(&self.path, REPAIR, how);
        assert_eq!(answer, if self.quarantined { Ok(()) } else { Err(Errno::NODATA) });
        if self.quarantined {
            self.byte = byte;
        }
        self.quarantined = false;
    }

    fn assert_reads(&self) {
        let fresh = File::open(&self.path).unwrap();
        for file in self.open.iter().map(|(file, _)| file).chain([&fresh]) {
            match read_subpage(file, PLACE) {
                Ok(bytes) if !self.quarantined => assert_eq!(bytes, [self.byte; SUBPAGE as usize]),
                Err(error) if self.quarantined => {
                    assert_eq!(error.raw_os_error(), Some(Errno::IO.raw_os_error()));
                }
                other => panic!("quarantined: {}, and read: {other:?}", self.quarantined),
            }
            let mut around = [0; 3 * SUBPAGE as usize];
            let read = file.read_at(&mut around, PLACE - SUBPAGE).unwrap();
            let meant = if self.quarantined { SUBPAGE } else { 3 * SUBPAGE };
            assert_eq!((read as u64, around[0]), (meant, 7));
        }
    }
}

#[test]
fn no_order_of_opens_and_repairs_shows_wrong_bytes() {
    const THREADS: u64 = 48; // most of the time, nearly all threads wait for a refusal
    let orders = (ACTS.len() as u64).pow(LENGTH);
    let pool = native(2 * THREADS);
    let next = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (pool, next) = (&pool, &next);
            scope.spawn(move || {
                let path = sevens(pool, &thread.to_string());
                loop {
                    let order = next.fetch_add(1, Ordering::Relaxed);
                    if order >= orders {
                        break;
                    }
                    let acts = (0..LENGTH).map(|n| ACTS[(order / 7u64.pow(n) % 7) as usize]);
                    let mut history =
                        History { path: path.clone(), open: vec![], quarantined: false, byte: 7 };
                    for act in acts {
                        history.act(act);
                        history.assert_reads();
                    }
                    open_to_write(&path).write_all_at(&[7; SUBPAGE as usize], PLACE).unwrap();
                }
            });
        }
    });
    println!("{orders} orders");
    pool.check();
}

#[test]
fn readers_beside_quarantines_and_repairs_never_see_zeros() {
    const ROUNDS: usize = 400;
    let pool = native(4);
    let path = sevens(&pool, "file");
    let (stop, lost) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut made = 0;
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let file = File::open(&path).unwrap();
                    for _ in 0..3 {
                        match read_subpage(&file, PLACE) {
                            Ok(bytes) => assert_eq!(bytes, [7; SUBPAGE as usize]),
                            Err(_) => drop(lost.fetch_add(1, Ordering::Relaxed)),
                        }
                    }
                }
            });
        }
        for round in 0..ROUNDS {
            if round % 100 == 99 {
                kill_worker(&pool);
            }
            match poison(&path, PLACE, 1) {
                Ok(()) => made += 1,
                Err(errno) => assert_eq!(errno, Errno::BUSY),
            }
            if get(&path, POISON).is_ok() {
                set(&path, REPAIR, "salvage all").unwrap();
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    println!("{made} quarantines, met by {} reads", lost.load(Ordering::Relaxed));
    assert!(made > 0, "readers were in the way all the time");
    pool.check();
}
