//! The worker dies at random moments, and at every step of every change, while programs use the
//! pool.

mod support;

use rustix::fs::{CWD, FallocateFlags, RenameFlags, fallocate, renameat_with};
use rustix::process::{Pid, Signal, kill_process};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use support::{
    DIE, Dice, FOLIO, GIB, MAP, PLACEMENT, POISON, Pool, REPAIR, SIZE as SIZE_OF_POOL, STEPS,
    SUBPAGE, Toucher, await_shut, get, limits, open_memory, poison, set,
};

// ---- at random ---------------------------------------------------------------------------------

const DEATHS: usize = 300;
/// The daemon refuses a request after the eighth death.
const MOST_DEATHS_OF_AN_ACT: usize = 5;
const SEED: u64 = 0x5eed_0f5e_ed0f_5eed;
const MOST_FOLIOS: u64 = 4;

/// A file in the pool, a process that uses it, and the bytes that the file must hold.
struct User {
    process: Toucher,
    pool: PathBuf,
    name: u64,
    number: u64,
    bytes: Vec<u8>,
    random: Dice,
}

impl User {
    fn new(pool: &Pool, number: u64) -> Self {
        let random = Dice(SEED ^ (number + 1) << 32);
        let user = Self {
            process: Toucher::start(),
            pool: pool.path(),
            name: 0,
            number,
            bytes: vec![],
            random,
        };
        File::create_new(user.path()).unwrap();
        user
    }

    fn path(&self) -> PathBuf {
        self.pool.join(format!("file-{}-{}", self.number, self.name))
    }

    fn ask(&mut self, command: &str, arguments: &str) -> String {
        let line = format!("{command} {} {arguments}", self.path().display());
        self.process.ask(&line)
    }

    /// Does one thing that programs do. The result must be as if the worker lived for ever.
    fn act(&mut self) {
        match self.random.below(8) {
            0 | 1 => self.write(),
            2 => self.read(),
            3 => self.resize(),
            4 => self.rename(),
            5 => self.store(),
            6 => self.lose_and_salvage(),
            _ => self.punch(),
        }
    }

    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// A part of the file that is not empty, if the file is not empty.
    fn part(&mut self) -> Option<(u64, u64)> {
        let start = self.random.below(self.size().max(1));
        let length = (1 + self.random.below(300_000)).min(self.size().saturating_sub(start));
        (length > 0).then_some((start, length))
    }

    fn write(&mut self) {
        let (start, length) =
            (self.random.below(self.size() + 5000), 1 + self.random.below(100_000));
        let byte = self.random.below(256) as u8;
        let end = (start + length).min(MOST_FOLIOS * FOLIO);
        let length = end.saturating_sub(start);
        if length == 0 {
            return;
        }
        assert_eq!(
            self.ask("pwrite", &format!("{start} {length} {byte}")),
            format!("count {length}")
        );
        self.bytes.resize(self.bytes.len().max(end as usize), 0);
        self.bytes[start as usize..end as usize].fill(byte);
    }

    fn read(&mut self) {
        let Some((start, length)) = self.part() else { return };
        let runs =
            self.bytes[start as usize..(start + length) as usize].chunk_by(|one, next| one == next);
        let meant =
            runs.fold("runs".to_owned(), |line, run| line + &format!(" {}:{}", run.len(), run[0]));
        assert_eq!(self.ask("pread", &format!("{start} {length}")), meant);
    }

    fn resize(&mut self) {
        let size = self.random.below(MOST_FOLIOS * FOLIO);
        assert_eq!(self.ask("truncate", &size.to_string()), "ok");
        self.bytes.resize(size as usize, 0);
    }

    fn rename(&mut self) {
        let before = self.path();
        self.name += 1;
        match self.random.below(3) {
            0 => {
                fs::write(self.path(), "in the way").unwrap();
                fs::rename(before, self.path()).unwrap();
            }
            1 => {
                fs::create_dir(self.path()).unwrap();
                renameat_with(CWD, &before, CWD, self.path(), RenameFlags::EXCHANGE).unwrap();
                fs::remove_dir(before).unwrap();
            }
            _ => {
                fs::hard_link(&before, self.path()).unwrap();
                fs::remove_file(before).unwrap();
            }
        }
    }

    fn store(&mut self) {
        let Some((start, _)) = self.part() else { return };
        let byte = self.random.below(256) as u8;
        let length = self.size();
        self.process.map(&self.path(), 0, length, "shared rw");
        assert!(self.process.store(start, byte), "SIGBUS");
        self.bytes[start as usize] = byte;
        assert_eq!(self.process.load(start), Some(byte));
        self.process.ask("unmap");
    }

    fn lose_and_salvage(&mut self) {
        let Some((start, _)) = self.part() else { return };
        let path = self.path();
        poison(&path, start, 1).unwrap();
        let answer = self.ask("pread", &format!("{start} 1"));
        assert_eq!(answer, format!("errno {}", rustix::io::Errno::IO.raw_os_error()));
        assert_eq!(get(&path, POISON).unwrap().lines().count(), 1);
        set(&path, REPAIR, "salvage all").unwrap();
    }

    fn punch(&mut self) {
        let Some((start, length)) = self.part() else { return };
        let mode = (FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE).bits();
        assert_eq!(self.ask("fallocate", &format!("{mode} {start} {length}")), "ok");
        self.bytes[start as usize..(start + length) as usize].fill(0);
        // Until a released page is allocated again, a program that maps it gets SIGBUS there.
        let size = self.size();
        assert_eq!(self.ask("fallocate", &format!("0 0 {size}")), "ok");
    }

    fn assert_holds(&self) {
        let found = fs::read(self.path()).unwrap();
        assert_eq!(found.len(), self.bytes.len());
        let wrong = found.iter().zip(&self.bytes).position(|(found, meant)| found != meant);
        assert_eq!(wrong, None, "{} has a wrong byte", self.path().display());
    }
}

/// The acts of a user, and the number of workers that have died since the last act.
#[derive(Default)]
struct Progress {
    acts: AtomicUsize,
    deaths: AtomicUsize,
}

impl Progress {
    fn note_act(&self) {
        self.acts.fetch_add(1, Ordering::SeqCst);
        self.deaths.store(0, Ordering::SeqCst);
    }

    fn note_death(&self) {
        self.deaths.fetch_add(1, Ordering::SeqCst);
    }

    /// Waits for the end of an act during which many workers have died. The daemon refuses a
    /// request that eight workers in a row die of, and on a busy machine any request may be slow
    /// enough for that.
    fn wait_where_starved(&self) {
        let is_fed = || self.deaths.load(Ordering::SeqCst) < MOST_DEATHS_OF_AN_ACT;
        limits::until(limits::ANSWER, "the end of what a process does meanwhile", is_fed);
    }
}

/// Kills workers until enough have died. Returns the time that a call waited for each next worker.
fn kill_at_random(pool: &Pool, users: &[Progress]) -> Vec<Duration> {
    let mut random = Dice(SEED);
    let mut stalls = Vec::new();
    for _ in 0..DEATHS {
        std::thread::sleep(Duration::from_micros(random.below(30_000))); // during some act
        users.iter().for_each(Progress::wait_where_starved);
        users.iter().for_each(Progress::note_death);
        let worker = Pid::from_raw(pool.counter("worker_pid") as i32).expect("a process id");
        let died = Instant::now();
        kill_process(worker, Signal::KILL).expect("it runs");
        assert_ne!(pool.counter("worker_pid") as i32, worker.as_raw_nonzero().get());
        stalls.push(died.elapsed());
    }
    stalls.sort();
    stalls
}

/// Stops the users when it is dropped, also by a panic: the test would wait for them.
struct Stopping<'a>(&'a AtomicBool);

impl Drop for Stopping<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn three_hundred_random_deaths_fail_no_call_and_lose_no_byte() {
    println!("seed {SEED:#x}");
    let pool = Pool::small(40);
    let stop = AtomicBool::new(false);
    let progress: [Progress; 4] = Default::default();
    let stalls = std::thread::scope(|scope| {
        let users: Vec<_> = (0..)
            .zip(&progress)
            .map(|(number, progress)| {
                let (pool, stop) = (&pool, &stop);
                scope.spawn(move || {
                    let mut user = User::new(pool, number);
                    while !stop.load(Ordering::Relaxed) {
                        user.act();
                        progress.note_act();
                    }
                    user.assert_holds();
                    user.path()
                })
            })
            .collect();
        let stopping = Stopping(&stop);
        let stalls = kill_at_random(&pool, &progress);
        drop(stopping);
        for user in users {
            fs::remove_file(user.join().expect("it has found nothing wrong")).unwrap();
        }
        stalls
    });
    println!("what the four processes have done: {:?}", progress.map(|user| user.acts));
    println!("stall: median {:?}, worst {:?}", stalls[stalls.len() / 2], stalls[stalls.len() - 1]);
    // The worst stall depends on the machine.
    assert!(stalls[stalls.len() / 2] < Duration::from_secs(1), "calls hang");
    pool.wait_for_free_pages(40);
    pool.check();
    pool.unmount();
}

// ---- at every step -----------------------------------------------------------------------------

/// The number of steps when this test was written. More may be added.
const FEWEST_STEPS: usize = 58;
/// The most deaths at one step of one situation: further ones would repeat these.
const MOST_DEATHS: u64 = 3;

/// A change that leads over steps, and a check after its call has returned: as if no worker had
/// died.
struct Situation {
    name: &'static str,
    /// Further mount options of the pool.
    options: &'static str,
    prepare: fn(&Pool),
    change: fn(&Pool),
    verify: fn(&Pool),
}

fn file(pool: &Pool) -> PathBuf {
    pool.join("file")
}

fn size_of(pool: &Pool) -> u64 {
    fs::metadata(file(pool)).unwrap().len()
}

fn open(pool: &Pool) -> File {
    File::options().read(true).write(true).open(file(pool)).unwrap()
}

/// A file of three folios of sevens, in a pool of eight.
fn sevens(pool: &Pool) {
    fs::write(file(pool), vec![7; 3 * FOLIO as usize]).unwrap();
}

fn assert_sevens(pool: &Pool, length: u64) {
    let bytes = fs::read(file(pool)).unwrap();
    assert!(bytes.starts_with(&vec![7; length as usize]), "bytes are lost");
}

/// The same, of which two folios have been punched.
fn sevens_and_a_hole(pool: &Pool) {
    sevens(pool);
    punch(pool, FOLIO, 2 * FOLIO);
}

/// 5000 bytes of sevens, and nothing behind them.
fn assert_shrunk(pool: &Pool) {
    assert_eq!((size_of(pool), pool.free_pages()), (5000, 7));
    assert_sevens(pool, 5000);
}

fn lose_one(pool: &Pool) {
    sevens(pool);
    poison(file(pool), FOLIO + SUBPAGE, SUBPAGE).unwrap();
}

fn assert_one_lost(pool: &Pool) {
    let text = get(file(pool), POISON).unwrap();
    assert!(text.starts_with("0x201000 0x1000 soft ") && text.lines().count() == 1, "{text}");
    let mut toucher = Toucher::mapping(&file(pool), 3 * FOLIO);
    assert_eq!(toucher.walk(), [FOLIO + SUBPAGE]);
    drop(toucher);
    set(file(pool), REPAIR, "salvage all").unwrap();
    assert_sevens(pool, 3 * FOLIO);
}

fn assert_nothing_lost(pool: &Pool) {
    assert_eq!(get(file(pool), POISON), Err(rustix::io::Errno::NODATA));
    assert_sevens(pool, 3 * FOLIO);
}

const SITUATIONS: &[Situation] = &[
    Situation {
        name: "create",
        options: "",
        prepare: |_| {},
        change: |pool| drop(File::create_new(file(pool)).unwrap()),
        verify: |pool| {
            assert_eq!(size_of(pool), 0);
            sevens(pool);
            assert_sevens(pool, 3 * FOLIO);
        },
    },
    Situation {
        name: "create and mkdir below a directory with a placement",
        options: "",
        prepare: |pool| set(pool.path(), PLACEMENT, "strict:bind:0").unwrap(),
        change: |pool| {
            drop(File::create_new(file(pool)).unwrap());
            fs::create_dir(pool.join("directory")).unwrap();
        },
        verify: |pool| {
            for name in ["file", "directory"] {
                let text = get(pool.join(name), PLACEMENT).unwrap();
                assert_eq!(text, "strict:bind:0\n", "{name}");
            }
        },
    },
    Situation {
        name: "create and size a file that is ready",
        options: ",clear=ahead",
        prepare: |pool| {
            limits::until(limits::ANSWER, "memory that is ready", || {
                pool.counter("pages_ready") > 0
            })
        },
        change: |pool| {
            let file = File::create_new(file(pool)).unwrap();
            file.set_len(FOLIO - 5000).unwrap();
            file.set_len(3 * FOLIO).unwrap();
        },
        verify: |pool| {
            assert!(fs::read(file(pool)).unwrap() == vec![0; 3 * FOLIO as usize]);
            pool.wait_for_free_pages(5);
        },
    },
    Situation {
        name: "open to read natively",
        options: "",
        prepare: sevens,
        change: |pool| {
            let reader = File::open(file(pool)).unwrap();
            assert_eq!(poison(file(pool), 0, 1), Err(rustix::io::Errno::BUSY));
            drop(reader);
            poison(file(pool), 0, 1).unwrap();
            set(file(pool), REPAIR, "salvage all").unwrap();
        },
        verify: assert_nothing_lost,
    },
    Situation {
        name: "unlink",
        options: "",
        prepare: sevens,
        change: |pool| {
            let kept = open(pool);
            fs::remove_file(file(pool)).unwrap();
            let mut byte = [0];
            std::os::unix::fs::FileExt::read_exact_at(&kept, &mut byte, FOLIO).unwrap();
            assert_eq!(byte, [7]);
        },
        verify: |pool| {
            assert!(!file(pool).exists());
            pool.wait_for_free_pages(8);
        },
    },
    Situation {
        name: "rename over a file",
        options: "",
        prepare: |pool| {
            sevens(pool);
            fs::write(pool.join("other"), "other").unwrap();
        },
        change: |pool| fs::rename(file(pool), pool.join("other")).unwrap(),
        verify: |pool| {
            assert!(!file(pool).exists());
            assert_eq!(fs::read(pool.join("other")).unwrap(), vec![7; 3 * FOLIO as usize]);
            pool.wait_for_free_pages(5);
        },
    },
    Situation {
        name: "rmdir and rename over a directory",
        options: "",
        prepare: |pool| {
            ["a", "b", "c"].iter().for_each(|name| fs::create_dir(pool.join(name)).unwrap())
        },
        change: |pool| {
            fs::remove_dir(pool.join("a")).unwrap();
            fs::rename(pool.join("b"), pool.join("c")).unwrap();
        },
        verify: |pool| assert_eq!(fs::read_dir(pool.path()).unwrap().count(), 1),
    },
    Situation {
        name: "exchange",
        options: "",
        prepare: |pool| {
            sevens(pool);
            fs::create_dir(pool.join("other")).unwrap();
        },
        change: |pool| {
            renameat_with(CWD, file(pool), CWD, pool.join("other"), RenameFlags::EXCHANGE).unwrap();
        },
        verify: |pool| {
            assert!(file(pool).is_dir());
            assert_eq!(fs::read(pool.join("other")).unwrap(), vec![7; 3 * FOLIO as usize]);
        },
    },
    Situation {
        name: "grow",
        options: "",
        prepare: |pool| fs::write(file(pool), vec![7; 5000]).unwrap(),
        change: |pool| open(pool).set_len(5 * FOLIO + 17).unwrap(),
        verify: |pool| {
            assert_eq!((size_of(pool), pool.free_pages()), (5 * FOLIO + 17, 2));
            assert_sevens(pool, 5000);
            assert!(fs::read(file(pool)).unwrap()[5000..].iter().all(|byte| *byte == 0));
        },
    },
    Situation {
        name: "shrink",
        options: "",
        prepare: sevens,
        change: |pool| open(pool).set_len(FOLIO + 5000).unwrap(),
        verify: |pool| {
            assert_eq!((size_of(pool), pool.free_pages()), (FOLIO + 5000, 6));
            assert_sevens(pool, FOLIO + 5000);
            open(pool).set_len(2 * FOLIO).unwrap();
            assert!(
                fs::read(file(pool)).unwrap()[FOLIO as usize + 5000..]
                    .iter()
                    .all(|byte| *byte == 0)
            );
        },
    },
    Situation {
        name: "shrink over a quarantine",
        options: "",
        prepare: lose_one,
        change: |pool| open(pool).set_len(FOLIO).unwrap(),
        verify: |pool| {
            assert_eq!((size_of(pool), pool.free_pages()), (FOLIO, 7));
            assert_eq!(get(file(pool), POISON), Err(rustix::io::Errno::NODATA));
            assert_sevens(pool, FOLIO);
        },
    },
    Situation {
        name: "punch",
        options: "",
        prepare: lose_one,
        change: |pool| {
            punch(pool, FOLIO, 2 * FOLIO);
        },
        verify: |pool| {
            assert_eq!((size_of(pool), pool.free_pages()), (3 * FOLIO, 7));
            assert_sevens(pool, FOLIO);
            assert!(fs::read(file(pool)).unwrap()[FOLIO as usize..].iter().all(|byte| *byte == 0));
        },
    },
    Situation {
        name: "shrink before what was punched",
        options: "",
        prepare: sevens_and_a_hole,
        change: |pool| open(pool).set_len(5000).unwrap(),
        verify: assert_shrunk,
    },
    Situation {
        name: "fill what was punched",
        options: "",
        prepare: |pool| {
            sevens(pool);
            punch(pool, FOLIO, FOLIO);
        },
        change: |pool| fallocate(open(pool), FallocateFlags::empty(), 0, 3 * FOLIO).unwrap(),
        verify: |pool| {
            assert_eq!((size_of(pool), pool.free_pages()), (3 * FOLIO, 5));
            assert_eq!(Toucher::mapping(&file(pool), 3 * FOLIO).walk(), []);
            assert_sevens(pool, FOLIO);
        },
    },
    Situation {
        name: "quarantine",
        options: "",
        prepare: sevens,
        change: |pool| poison(file(pool), FOLIO + SUBPAGE, SUBPAGE).unwrap(),
        verify: assert_one_lost,
    },
    Situation {
        name: "quarantine beside a program that stores",
        options: "",
        prepare: sevens,
        change: |pool| {
            beside_stores(pool, |pool| poison(file(pool), FOLIO + SUBPAGE, SUBPAGE).unwrap())
        },
        verify: |pool| {
            assert!(get(file(pool), POISON).unwrap().starts_with("0x201000 0x1000 soft "));
            assert_eq!(Toucher::mapping(&file(pool), 3 * FOLIO).walk(), [FOLIO + SUBPAGE]);
            set(file(pool), REPAIR, "salvage all").unwrap();
            assert_sevens_but_for_stores(pool);
        },
    },
    Situation {
        name: "quarantine of a folio beside a program that stores",
        options: "",
        prepare: sevens,
        change: |pool| beside_stores(pool, |pool| poison(file(pool), FOLIO, FOLIO).unwrap()),
        verify: |pool| {
            assert!(get(file(pool), POISON).unwrap().starts_with("0x200000 0x200000 soft "));
            assert_eq!(
                Toucher::mapping(&file(pool), 3 * FOLIO).walk().len() as u64,
                FOLIO / SUBPAGE
            );
            set(file(pool), REPAIR, "salvage all").unwrap();
            assert_sevens_but_for_stores(pool);
        },
    },
    Situation {
        name: "quarantine of a pinned folio",
        options: "",
        prepare: sevens,
        change: |pool| {
            let mut toucher = Toucher::mapping(&file(pool), 3 * FOLIO);
            assert_eq!(toucher.ask(&format!("pin {FOLIO}")), "ok");
            assert_eq!(poison(file(pool), FOLIO + SUBPAGE, SUBPAGE), Err(rustix::io::Errno::BUSY));
        },
        verify: assert_nothing_lost,
    },
    Situation {
        name: "salvage beside a program that stores",
        options: "",
        prepare: lose_one,
        change: |pool| beside_stores(pool, |pool| set(file(pool), REPAIR, "salvage all").unwrap()),
        verify: assert_sevens_but_for_stores,
    },
    Situation {
        name: "repair by a write beside a program that stores",
        options: "",
        prepare: lose_one,
        change: |pool| {
            beside_stores(pool, |pool| {
                let bytes = [7; SUBPAGE as usize];
                std::os::unix::fs::FileExt::write_all_at(&open(pool), &bytes, FOLIO + SUBPAGE)
                    .unwrap();
            });
        },
        verify: assert_sevens_but_for_stores,
    },
    Situation {
        name: "salvage",
        options: "",
        prepare: lose_one,
        change: |pool| set(file(pool), REPAIR, "salvage all").unwrap(),
        verify: assert_nothing_lost,
    },
    Situation {
        name: "repair by a write",
        options: "",
        prepare: lose_one,
        change: |pool| {
            let bytes = [7; SUBPAGE as usize];
            std::os::unix::fs::FileExt::write_all_at(&open(pool), &bytes, FOLIO + SUBPAGE).unwrap();
        },
        verify: assert_nothing_lost,
    },
    Situation {
        name: "punch and keep",
        options: KEEP,
        prepare: lose_one,
        change: |pool| punch(pool, FOLIO, 2 * FOLIO - SUBPAGE),
        verify: |pool| {
            assert_eq!((size_of(pool), pool.free_pages()), (3 * FOLIO, 5));
            let bytes = fs::read(file(pool)).unwrap();
            let (before, rest) = bytes.split_at(FOLIO as usize);
            let (punched, after) = rest.split_at((2 * FOLIO - SUBPAGE) as usize);
            assert!(before.iter().chain(after).all(|byte| *byte == 7), "bytes are lost");
            assert!(punched.iter().all(|byte| *byte == 0));
            assert!(get(file(pool), MAP).unwrap().contains("0x200000 0x3ff000 punched -"));
            assert_eq!(Toucher::mapping(&file(pool), 3 * FOLIO).walk(), []);
        },
    },
    Situation {
        name: "allocate what was punched and kept",
        options: KEEP,
        prepare: |pool| {
            sevens(pool);
            punch(pool, FOLIO, FOLIO);
        },
        change: |pool| {
            fallocate(open(pool), FallocateFlags::KEEP_SIZE, 0, 3 * FOLIO).unwrap();
            poison(file(pool), FOLIO + SUBPAGE, SUBPAGE).unwrap();
        },
        verify: |pool| {
            assert!(!get(file(pool), MAP).unwrap().contains("punched"));
            assert_eq!(Toucher::mapping(&file(pool), 3 * FOLIO).walk(), [FOLIO + SUBPAGE]);
            set(file(pool), REPAIR, "salvage all").unwrap();
            assert_sevens(pool, FOLIO);
        },
    },
    Situation {
        name: "shrink before what was punched and kept",
        options: KEEP,
        prepare: sevens_and_a_hole,
        change: |pool| open(pool).set_len(5000).unwrap(),
        verify: assert_shrunk,
    },
    Situation {
        name: "unlink what was punched and kept",
        options: KEEP,
        prepare: |pool| {
            sevens(pool);
            punch(pool, 5 * SUBPAGE, 2 * FOLIO);
        },
        change: |pool| fs::remove_file(file(pool)).unwrap(),
        verify: |pool| {
            pool.wait_for_free_pages(8);
            fs::write(file(pool), vec![7; 8 * FOLIO as usize]).unwrap();
        },
    },
    Situation {
        name: "open the memory, spoil the file, and close",
        options: "",
        prepare: sevens,
        change: |pool| {
            let memory = open_memory(file(pool)).unwrap();
            memory.set_len(FOLIO).unwrap();
            fallocate(&memory, FallocateFlags::KEEP_SIZE, 5 * FOLIO, FOLIO).unwrap();
            drop(memory);
            await_shut(file(pool));
        },
        verify: |pool| {
            assert_eq!((size_of(pool), pool.free_pages()), (3 * FOLIO, 5));
            assert_sevens(pool, FOLIO);
            assert_eq!(Toucher::mapping(&file(pool), 3 * FOLIO).walk(), []);
            open(pool).set_len(FOLIO).unwrap();
            fs::write(pool.join("other"), vec![7; 7 * FOLIO as usize]).unwrap();
        },
    },
    Situation {
        name: "enlarge the pool",
        options: "",
        prepare: sevens,
        change: |pool| set(pool.path(), SIZE_OF_POOL, (12 * FOLIO).to_string()).unwrap(),
        verify: |pool| assert_eq!((pool.counter("pages_total"), pool.free_pages()), (12, 9)),
    },
    Situation {
        name: "reduce the pool",
        options: "",
        prepare: sevens,
        change: |pool| set(pool.path(), SIZE_OF_POOL, (4 * FOLIO).to_string()).unwrap(),
        verify: |pool| assert_eq!((pool.counter("pages_total"), pool.free_pages()), (4, 1)),
    },
    Situation {
        name: "resize the part of a node",
        options: ",nodes=0",
        prepare: sevens,
        change: |pool| {
            for pages in [12, 3] {
                set(pool.path(), SIZE_OF_POOL, format!("0:{}", pages * FOLIO)).unwrap();
            }
        },
        verify: |pool| assert_eq!((pool.counter("pages_total_node0"), pool.free_pages()), (3, 0)),
    },
];

/// The place of the program's stores, in the subpage that is quarantined.
const PLACE: u64 = FOLIO + SUBPAGE + 100;

/// Runs `change` beside a program that stores one byte at [`PLACE`] all the time, whether or not
/// the subpage is there.
fn beside_stores(pool: &Pool, change: impl FnOnce(&Pool)) {
    let mut toucher = Toucher::mapping(&file(pool), 3 * FOLIO);
    assert_eq!(toucher.ask(&format!("hammer {PLACE} 9")), "ok");
    change(pool);
    assert!(toucher.ask("stop").starts_with("count "));
}

fn assert_sevens_but_for_stores(pool: &Pool) {
    assert_eq!(get(file(pool), POISON), Err(rustix::io::Errno::NODATA));
    let bytes = fs::read(file(pool)).unwrap();
    let lost =
        (0..3 * FOLIO).filter(|place| *place != PLACE && bytes[*place as usize] != 7).count();
    assert_eq!(lost, 0, "so many bytes are lost that no program has stored to");
}

/// Punched parts keep their pages.
const KEEP: &str = ",punch=keep";

fn punch(pool: &Pool, offset: u64, length: u64) {
    fallocate(open(pool), FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, length)
        .unwrap();
}

/// Runs a situation in a pool of its own, with `begin` before its change and `end` after its check.
fn run<T>(situation: &Situation, begin: impl FnOnce(&Pool), end: impl FnOnce(&Pool) -> T) -> T {
    let options = format!("pagesize=2M,size={},io=native{}", 8 * FOLIO, situation.options);
    let pool = Pool::mount(&options);
    (situation.prepare)(&pool);
    begin(&pool);
    (situation.change)(&pool);
    pool.check();
    (situation.verify)(&pool);
    let result = end(&pool);
    pool.check();
    pool.unmount();
    result
}

/// All steps, and the number of times that each was done since the last call.
fn tally(pool: &Pool) -> Vec<(String, u64)> {
    let text = get(pool.path(), STEPS).expect("a worker that was built for tests");
    let row = |line: &str| {
        let (count, step) = line.split_once(' ').expect("a number and a step");
        (step.to_owned(), count.parse().expect("a number"))
    };
    text.lines().map(row).collect()
}

/// The steps of a situation in which no worker dies, and the number of times of each.
fn steps_of(situation: &Situation) -> Vec<(String, u64)> {
    run(situation, |pool| drop(tally(pool)), tally)
}

/// Runs a situation with a worker that dies when `step` is done for the `nth` time. True if the
/// worker died.
fn die_in(situation: &Situation, step: &str, nth: u64) -> bool {
    println!("{}: a death after {nth} times {step:?}", situation.name);
    let worker = Cell::new(0);
    let begin = |pool: &Pool| {
        worker.set(pool.counter("worker_pid"));
        set(pool.path(), DIE, format!("{nth} {step}")).unwrap();
    };
    run(situation, begin, |pool| pool.counter("worker_pid") != worker.get())
}

#[test]
fn a_death_after_any_step_leaves_no_trace() {
    let mut led_there: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for situation in SITUATIONS {
        for (step, count) in steps_of(situation) {
            let deaths = (1..=count.min(MOST_DEATHS))
                .take_while(|nth| die_in(situation, &step, *nth))
                .count();
            led_there.entry(step).or_default().extend(std::iter::repeat_n(situation.name, deaths));
        }
    }
    led_there.iter().for_each(|(step, situations)| println!("{step}: {}", situations.join(", ")));
    let deaths: usize = led_there.values().map(Vec::len).sum();
    println!("{deaths} deaths at {} steps in {} situations", led_there.len(), SITUATIONS.len());
    assert!(led_there.len() >= FEWEST_STEPS, "there are {} steps only", led_there.len());
    // Pages move to another NUMA node on machines with several: tests/lab/cases/moves.rs.
    led_there.retain(|step, _| !step.starts_with("relocate: "));
    let without: Vec<_> =
        led_there.iter().filter(|(_, situations)| situations.is_empty()).collect();
    assert!(without.is_empty(), "nothing leads to the steps {without:?}");
}

// ---- between the pieces of a page --------------------------------------------------------------

/// Carries out `change` with a worker that dies in its middle, after the tenth piece of memory has
/// moved `way`.
fn die_halfway(pool: &Pool, way: &str, change: impl FnOnce()) {
    let steps = get(pool.path(), DIE).expect("a worker that was built for tests");
    let step = steps.lines().find(|step| step.starts_with(way)).expect("memory moves in steps");
    let worker = pool.counter("worker_pid");
    set(pool.path(), DIE, format!("10 {step}")).unwrap();
    change();
    assert_ne!(pool.counter("worker_pid"), worker, "{way}: it was done before the tenth piece");
    pool.check();
}

#[test]
fn a_death_within_a_gigantic_page_leaves_no_trace() {
    let pool = Pool::mount(&format!("pagesize=1G,size={GIB}"));
    let file = File::options().read(true).write(true).create_new(true).open(file(&pool)).unwrap();
    let first = |byte: u8| {
        let mut bytes = [1; 5000];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0).unwrap();
        assert!(bytes.iter().all(|found| *found == byte), "the first bytes are not {byte}");
    };
    let state = || (size_of(&pool), pool.free_pages());
    die_halfway(&pool, "move out: ", || file.set_len(GIB - 5000).unwrap());
    assert_eq!(state(), (GIB - 5000, 0));
    std::os::unix::fs::FileExt::write_all_at(&file, &[7; 5000], 0).unwrap();
    die_halfway(&pool, "move in: ", || punch(&pool, 0, GIB));
    assert_eq!(state(), (GIB - 5000, 1));
    first(0);
    die_halfway(&pool, "move out: ", || {
        fallocate(&file, FallocateFlags::empty(), 0, GIB - 5000).unwrap()
    });
    assert_eq!(state(), (GIB - 5000, 0));
    std::os::unix::fs::FileExt::write_all_at(&file, &[7; 5000], 0).unwrap();
    die_halfway(&pool, "move in: ", || file.set_len(6000).unwrap());
    assert_eq!(state(), (6000, 0));
    first(7);
    drop(file);
    pool.unmount();
}
