//! The cost of hugetlb2 beside the filesystems that a user would use instead, in one run on this
//! machine.
//!
//! `cargo bench --bench compare` takes some minutes, root, and as much memory as there is, up to 18
//! GiB. Arguments behind `--`:
//!
//! - `--short` takes few rounds of little memory, under 40 seconds in all. A run by `cargo test` is
//!   short, too.
//! - `--json` prints one JSON object.
//! - `--svg FILE` also writes a picture of the ratios.
//! - The name of a part, such as `allocation`, measures this part only.
//! - `--memory GIB` limits the memory of hugetlbfs and ours together. The program skips or shortens
//!   a row that needs more.
//!
//! Each round measures all sides in turn. A row prints the medians over the rounds and the ratios
//! of the medians. On a virtual machine the host backs memory lazily, so the program touches the
//! memory of every side once before it measures. The program leaves out a row that the machine
//! cannot do, and prints the reason.

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
#[path = "compare/ready.rs"]
mod ready;
#[path = "compare/sides.rs"]
mod sides;
#[path = "compare/stranger.rs"]
mod stranger;
#[path = "compare/svg.rs"]
mod svg;
#[path = "../tests/support/sys/mod.rs"]
mod sys;
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

/// Rows that belong together: a name, and the function that measures them.
type Part = (&'static str, fn(&Plan, &mut Table));

const PARTS: &[Part] = &[
    ("access", access::measure),
    ("quarantine", quarantine::measure),
    ("allocation", allocation::measure),
    ("ready", ready::measure),
    ("mounting", mounting::measure),
    ("calls", calls::measure),
    ("growth", growth::measure),
    ("stranger", stranger::measure),
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
    let most =
        value("--memory").map_or(u64::MAX, |gib| gib.parse::<u64>().expect("--memory GIB") * GIB);
    let plan = Plan { short, most, base: directory.path().to_owned(), directories: Cell::new(0) };
    let machine = Machine::this();
    let mut table = Table::new(has("--json"));
    table.note(&format!("{}, {}, {}", machine.hardware, machine.kernel, machine.date));
    table.note(&format!("medians of {} rounds, or as many as a row says", plan.rounds()));
    let chosen = PARTS.iter().any(|(name, _)| has(name));
    PARTS
        .iter()
        .filter(|(name, _)| has(name) || !chosen)
        .for_each(|(_, measure)| measure(&plan, &mut table));
    table.finish(&machine);
    if let Some(file) = value("--svg") {
        fs::write(file, svg::picture(&table, &machine)).expect("a file to write to");
    }
}

/// The extent of the measurements.
pub struct Plan {
    /// True for few rounds of little memory.
    pub short: bool,
    most: u64,
    base: PathBuf,
    directories: Cell<u32>,
}

impl Plan {
    /// The number of rounds; each side has its turn in each round.
    pub fn rounds(&self) -> usize {
        self.at_most(7)
    }

    /// Returns `rounds`, or 2 in a short run.
    pub fn at_most(&self, rounds: usize) -> usize {
        if self.short { 2 } else { rounds }
    }

    /// The bytes that random accesses touch.
    pub fn span(&self) -> u64 {
        if self.short { 128 << 20 } else { GIB }
    }

    /// Fails with a reason if hugetlbfs and ours may not have `bytes` together.
    pub fn afford(&self, bytes: u64) -> Result<(), String> {
        let short = if self.short { 5 * GIB } else { u64::MAX };
        match bytes {
            bytes if bytes > short => Err("a short run takes less memory".to_owned()),
            bytes if bytes > self.most => Err(format!("--memory allows {} GiB", self.most / GIB)),
            _ => Ok(()),
        }
    }

    /// As [`Plan::afford`], and fails if less than `available` bytes of the machine are available,
    /// too.
    pub fn afford_beside(&self, bytes: u64, available: u64) -> Result<(), String> {
        self.afford(bytes)?;
        match memory_available() {
            Ok(has) if has >= available => Ok(()),
            _ => Err(format!("less than {} GiB are available", available / GIB)),
        }
    }

    /// Makes a directory for a mount.
    fn new_directory(&self, name: &str) -> PathBuf {
        self.directories.set(self.directories.get() + 1);
        let path = self.base.join(format!("{}-{}", name.replace(' ', "-"), self.directories.get()));
        fs::create_dir(&path).expect("a mount point");
        path
    }

    /// Mounts one filesystem of each kind with `bytes`. The table notes a kind that cannot be
    /// mounted as skipped in `what`.
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

/// The hardware, the kernel and the day of the run.
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

/// Measures all sides in each round. Each round begins with the next side.
fn in_turn<T>(
    rounds: usize,
    sides: &[(&str, T)],
    mut measure: impl FnMut(&T) -> f64,
) -> Vec<Samples> {
    let mut samples: Vec<Samples> =
        sides.iter().map(|(name, _)| ((*name).to_owned(), Vec::new())).collect();
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

/// A generator of the same numbers in every run (xorshift).
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
