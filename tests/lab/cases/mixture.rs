//! After any sequence of real memory errors and calls of two processes, the file is as a model
//! says.

use super::cases;
use crate::support::{Dice, FOLIO, INJECT, POISON, Pool, REPAIR, SUBPAGE, Toucher, get, set};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::PathBuf;

cases! {
    SMALL: real_errors_and_requests_mixed_do_what_a_model_says;
}

const SEED: u64 = 0x0bad_cafe_0bad_cafe;
const ACTS: u64 = 600;
const MOST: u64 = 5 * FOLIO;

/// A file, two processes that use it, and the bytes that it must hold.
struct World {
    pool: Pool,
    processes: [Toucher; 2],
    path: PathBuf,
    bytes: Vec<u8>,
    /// The offsets of the subpages with an error.
    lost: BTreeSet<u64>,
    random: Dice,
    /// All steps, for the reader of a failure.
    done: Vec<String>,
}

impl World {
    fn new() -> Self {
        let pool = Pool::small(8);
        let path = pool.join("file");
        File::create_new(&path).unwrap();
        Self {
            pool,
            processes: [Toucher::start(), Toucher::start()],
            path,
            bytes: Vec::new(),
            lost: BTreeSet::new(),
            random: Dice(SEED),
            done: Vec::new(),
        }
    }

    fn act(&mut self) {
        match self.random.below(16) {
            0..=2 => self.write(),
            3..=5 => self.read(),
            6..=7 => self.load(),
            8..=10 => self.lose(),
            11 => self.repair_all(),
            12 => self.repair_one(),
            13 => self.resize(),
            14 => self.begin_anew(),
            _ => self.kill_worker(),
        }
    }

    fn note(&mut self, what: String) {
        self.done.push(what);
    }

    /// Has one of the two processes make a call on the file.
    fn ask(&mut self, command: &str, arguments: &str) -> String {
        let which = self.random.below(2) as usize;
        self.note(format!("process {which}: {command} {arguments}"));
        self.processes[which].ask(&format!("{command} {} {arguments}", self.path.display()))
    }

    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// A random place in the file, if the file is not empty.
    fn place(&mut self) -> Option<u64> {
        (self.size() > 0).then(|| self.random.below(self.bytes.len() as u64))
    }

    fn first_lost(&self, start: u64, end: u64) -> Option<u64> {
        let first = start / SUBPAGE * SUBPAGE;
        if start < end { self.lost.range(first..end).next().copied() } else { None }
    }

    fn write(&mut self) {
        let start = self.random.below(self.size() + 5000).min(MOST - 1);
        let end = (start + 1 + self.random.below(4 * SUBPAGE)).min(MOST);
        let byte = 1 + self.random.below(255) as u8;
        let answer = self.ask("pwrite", &format!("{start} {} {byte}", end - start));
        // The write ends before the first error that it covers only in part. A write to the end
        // of the file covers the last subpage whole.
        let covered = |lost: &u64| start <= *lost && (lost + SUBPAGE).min(self.size()) <= end;
        let obstacle =
            self.lost.range(start / SUBPAGE * SUBPAGE..end).find(|lost| !covered(lost)).copied();
        let end = obstacle.unwrap_or(end);
        if end <= start {
            assert_eq!(answer, format!("errno {}", Errno::IO.raw_os_error()));
            return;
        }
        assert_eq!(answer, format!("count {}", end - start));
        self.bytes.resize(self.bytes.len().max(end as usize), 0);
        self.bytes[start as usize..end as usize].fill(byte);
        let repaired: Vec<u64> = self.lost.range(start..end).copied().collect();
        self.lost.retain(|lost| !repaired.contains(lost));
    }

    fn read(&mut self) {
        let Some(start) = self.place() else { return };
        let end = (start + 1 + self.random.below(6 * SUBPAGE)).min(self.size());
        let answer = self.ask("pread", &format!("{start} {}", end - start));
        let end = self.first_lost(start, end).unwrap_or(end);
        if end <= start {
            assert_eq!(answer, format!("errno {}", Errno::IO.raw_os_error()));
            return;
        }
        let runs = self.bytes[start as usize..end as usize].chunk_by(|one, next| one == next);
        assert_eq!(
            answer,
            runs.fold("runs".to_owned(), |line, run| line + &format!(" {}:{}", run.len(), run[0]))
        );
    }

    fn map(&mut self) -> usize {
        let (which, size) = (self.random.below(2) as usize, self.size().next_multiple_of(SUBPAGE));
        self.processes[which].map(&self.path, 0, size, "shared rw");
        which
    }

    fn load(&mut self) {
        let Some(at) = self.place() else { return };
        let which = self.map();
        self.note(format!("process {which}: load {at}"));
        let found = self.processes[which].load(at);
        let meant = self.first_lost(at, at + 1).is_none().then(|| self.bytes[at as usize]);
        assert_eq!(found, meant);
        self.processes[which].ask("unmap");
    }

    /// Makes an error, and tells the filesystem of it or not.
    fn lose(&mut self) {
        let Some(at) = self.place().map(|at| at / SUBPAGE * SUBPAGE) else { return };
        if self.lost.contains(&at) {
            return;
        }
        if self.random.below(2) == 0 {
            self.note(format!("inject {at}"));
            set(&self.path, INJECT, format!("hw {at}")).unwrap();
        } else {
            let which = self.map();
            self.note(format!("process {which}: strike {at}"));
            let strike = format!("advise {at} {SUBPAGE} {}", libc::MADV_HWPOISON);
            assert_eq!(self.processes[which].ask(&strike), "ok");
            self.processes[which].ask("unmap");
        }
        self.lost.insert(at);
    }

    fn zero(&mut self, at: u64) {
        let end = (at + SUBPAGE).min(self.size());
        self.bytes[at as usize..end as usize].fill(0);
        self.lost.remove(&at);
    }

    fn repair_all(&mut self) {
        self.note("repair all".to_owned());
        let repaired = set(&self.path, REPAIR, "zero all");
        match (self.lost.is_empty(), self.size()) {
            (_, 0) => assert!(repaired.is_err()),
            (true, _) => assert_eq!(repaired, Err(Errno::NODATA)),
            _ => assert_eq!(repaired, Ok(())),
        }
        self.lost.clone().into_iter().for_each(|lost| self.zero(lost));
    }

    fn repair_one(&mut self) {
        let Some(at) = self.lost.first().copied() else { return };
        self.note(format!("repair {at}"));
        set(&self.path, REPAIR, format!("zero {at} 1")).unwrap();
        self.zero(at);
    }

    fn resize(&mut self) {
        let size = self.random.below(MOST);
        assert_eq!(self.ask("truncate", &size.to_string()), "ok");
        self.bytes.resize(size as usize, 0);
        self.lost.retain(|lost| *lost < size);
    }

    fn begin_anew(&mut self) {
        self.note("begin anew".to_owned());
        fs::remove_file(&self.path).unwrap();
        File::create_new(&self.path).unwrap();
        self.bytes.clear();
        self.lost.clear();
    }

    fn kill_worker(&mut self) {
        self.note("kill the worker".to_owned());
        let worker = Pid::from_raw(self.pool.counter("worker_pid") as i32).unwrap();
        kill_process(worker, Signal::KILL).unwrap();
    }

    /// Asserts the rules that hold after each step.
    fn verify(&mut self) {
        let listed = match get(&self.path, POISON) {
            Ok(text) => text,
            Err(Errno::NODATA) => String::new(),
            Err(errno) => panic!("{errno}"),
        };
        let mut found = BTreeSet::new();
        for line in listed.lines() {
            let words: Vec<&str> = line.split(' ').collect();
            let number =
                |word: &str| u64::from_str_radix(word.trim_start_matches("0x"), 16).unwrap();
            assert_eq!(words[2], "hw");
            found.extend((0..number(words[1]) / SUBPAGE).map(|n| number(words[0]) + n * SUBPAGE));
        }
        assert_eq!(found, self.lost, "what is listed");
        assert_eq!(fs::metadata(&self.path).unwrap().len(), self.size());
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let last = self.done.len().saturating_sub(30);
            println!("the last acts:\n{}", self.done[last..].join("\n"));
        }
    }
}

fn real_errors_and_requests_mixed_do_what_a_model_says() {
    println!("seed {SEED:#x}");
    let mut world = World::new();
    for act in 0..ACTS {
        world.act();
        world.verify();
        if act.is_multiple_of(50) {
            world.pool.check();
        }
    }
    world.pool.check();
    println!("{} acts", world.done.len());
}
