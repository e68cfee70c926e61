//! What it costs, side by side with what a user would use instead, in one run on this machine.
//!
//! `cargo bench --bench compare` takes some minutes, root, and as much memory as there is, up to 18 GiB. Behind `--`:
//!
//! - `--short` takes few rounds of little memory, under 40 seconds in all; so does a run by `cargo test`;
//! - `--json` prints one JSON object;
//! - `--svg FILE` writes a picture of the ratios, too;
//! - names of parts, such as `allocation`, measure these only;
//! - `--memory GIB` takes no more than that for hugetlbfs and ours together, and skips or shortens what needs more.
//!
//! Sides are measured in turn, round by round; what is printed is the median over the rounds and the ratio of the medians.
//! On a virtual machine the host backs memory lazily, so every side's memory is touched once before anything is timed.
//! A row that the machine cannot do is left out, with the reason.

#[path = "compare/access.rs"]
mod access;
#[path = "compare/allocation.rs"]
mod allocation;
#[path = "compare/calls.rs"]
mod calls;
#[path = "compare/growth.rs"]
mod growth;
#[path = "../tests/support/limits.rs"]
#[allow(dead_code, missing_docs)]
mod limits;
#[path = "compare/memory.rs"]
mod memory;
#[path = "compare/mounting.rs"]
mod mounting;
#[path = "compare/quarantine.rs"]
mod quarantine;
#[path = "compare/sides.rs"]
mod sides;
#[path = "compare/svg.rs"]
mod svg;
#[path = "compare/table.rs"]
mod table;
#[path = "compare/takeover.rs"]
mod takeover;

use hugetlb2fs::sys::{memory_available, memory_total};
use sides::{GIB, Kind, Side};
use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;
use table::{Samples, Table};

/// Rows that go together: their name, and what fills them in.
type Part = (&'static str, fn(&Plan, &mut Table));

const PARTS: &[Part] = &[
    ("access", access::measure),
    ("quarantine", quarantine::measure),
    ("allocation", allocation::measure),
    ("mounting", mounting::measure),
    ("calls", calls::measure),
    ("growth", growth::measure),
    ("takeover", takeover::measure),
    ("memory", memory::measure),
];

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let has = |name: &str| arguments.iter().any(|argument| argument == name);
    let value = |name: &str| arguments.iter().skip_while(|argument| *argument != name).nth(1);
    let directory = tempfile::tempdir().expect("a directory");
    sides::undo_on_signals(directory.path());
    let short = has("--short") || !has("--bench");
    let most = value("--memory").map_or(u64::MAX, |gib| gib.parse::<u64>().expect("--memory GIB") * GIB);
    let plan = Plan { short, most, base: directory.path().to_owned(), directories: Cell::new(0) };
    let machine = Machine::this();
    let mut table = Table::new(has("--json"));
    table.note(&format!("{}, {}, {}", machine.hardware, machine.kernel, machine.date));
    table.note(&format!("medians of {} rounds, or as many as a row says", plan.rounds()));
    let chosen = PARTS.iter().any(|(name, _)| has(name));
    PARTS.iter().filter(|(name, _)| has(name) || !chosen).for_each(|(_, measure)| measure(&plan, &mut table));
    table.finish(&machine);
    if let Some(file) = value("--svg") {
        fs::write(file, svg::picture(&table, &machine)).expect("a file to write to");
    }
}

/// How much is to be done.
pub struct Plan {
    /// Few rounds of little memory.
    pub short: bool,
    most: u64,
    base: PathBuf,
    directories: Cell<u32>,
}

impl Plan {
    /// How often each side has its turn.
    pub fn rounds(&self) -> usize {
        self.at_most(7)
    }

    /// So often, or less in a short run.
    pub fn at_most(&self, rounds: usize) -> usize {
        if self.short { 2 } else { rounds }
    }

    /// What is walked at random, out of a gigabyte.
    pub fn span(&self) -> u64 {
        if self.short { 128 << 20 } else { GIB }
    }

    /// Whether hugetlbfs and ours may have so much together.
    pub fn afford(&self, bytes: u64) -> Result<(), String> {
        let short = if self.short { 5 * GIB } else { u64::MAX };
        match bytes {
            bytes if bytes > short => Err("a short run takes less memory".to_owned()),
            bytes if bytes > self.most => Err(format!("--memory allows {} GiB", self.most / GIB)),
            _ => Ok(()),
        }
    }

    /// Whether a side may have so much, and the machine has `available` before.
    pub fn afford_beside(&self, bytes: u64, available: u64) -> Result<(), String> {
        self.afford(bytes)?;
        match memory_available() {
            Ok(has) if has >= available => Ok(()),
            _ => Err(format!("less than {} GiB are available", available / GIB)),
        }
    }

    /// A directory to mount something on.
    fn new_directory(&self, name: &str) -> PathBuf {
        self.directories.set(self.directories.get() + 1);
        let path = self.base.join(format!("{}-{}", name.replace(' ', "-"), self.directories.get()));
        fs::create_dir(&path).expect("a mount point");
        path
    }

    /// Mounts one of each kind with `bytes`; those that cannot be are left out of `what`.
    fn mount_all(&self, kinds: &[Kind], bytes: u64, what: &str, table: &mut Table) -> Vec<Side> {
        let mut sides = Vec::new();
        for kind in kinds {
            match kind.mount(self, bytes) {
                Ok(side) => sides.push(side),
                Err(why) => table.skip(&format!("{what}, {}", kind.name()), &why),
            }
        }
        sides
    }
}

/// Where and when.
pub struct Machine {
    hardware: String,
    kernel: String,
    date: String,
}

impl Machine {
    fn this() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let model = read("/proc/cpuinfo").lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            (name.trim() == "model name").then(|| value.trim().to_owned())
        });
        let model = model.unwrap_or_else(|| std::env::consts::ARCH.to_owned());
        let cores = std::thread::available_parallelism().map_or(0, usize::from);
        let memory = memory_total().unwrap_or(0).div_ceil(GIB);
        let date = limits::output(limits::ANSWER, Command::new("date").arg("+%F"));
        let date = date.map(|output| output.stdout).unwrap_or_default();
        Self {
            hardware: format!("{model}, {cores} cores, {memory} GiB"),
            kernel: format!("Linux {}", read("/proc/sys/kernel/osrelease").trim()),
            date: String::from_utf8_lossy(&date).trim().to_owned(),
        }
    }
}

/// Measures each side in turn, round by round; each round begins with the next of them.
fn in_turn<T>(rounds: usize, sides: &[(&str, T)], mut measure: impl FnMut(&T) -> f64) -> Vec<Samples> {
    let mut samples: Vec<Samples> = sides.iter().map(|(name, _)| ((*name).to_owned(), Vec::new())).collect();
    for round in 0..rounds {
        for n in (round..round + sides.len()).map(|n| n % sides.len()) {
            samples[n].1.push(measure(&sides[n].1));
        }
    }
    samples
}

fn milliseconds(run: impl FnOnce()) -> f64 {
    let clock = Instant::now();
    run();
    clock.elapsed().as_secs_f64() * 1e3
}

fn microseconds(run: impl FnOnce()) -> f64 {
    milliseconds(run) * 1e3
}

fn set_attribute(path: &Path, name: &str, value: &str) {
    let flags = rustix::fs::XattrFlags::empty();
    rustix::fs::setxattr(path, name, value.as_bytes(), flags).expect("setxattr");
}

/// Numbers that are the same in every run (xorshift).
struct Random(u64);

impl Random {
    const fn new() -> Self {
        Self(0x9e37_79b9_7f4a_7c15)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}
