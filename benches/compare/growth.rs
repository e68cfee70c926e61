//! The cost of calls as the number of files grows. Each number of files has a mount of its own.

use super::sides::Side;
use super::{Plan, Table, in_turn, microseconds, set_attribute};
use hugetlb2fs::attributes::{POISON, REPAIR};
use rustix::fs::{AtFlags, CWD, StatxFlags, statx};
use std::fs::{self, File};
use std::path::PathBuf;

/// Descriptors that a worker may need besides the descriptors of files.
const OTHER_DESCRIPTORS: u64 = 1000;
/// Calls in a sample.
const CALLS: u64 = 64;
/// Every mount has at least this number of files.
const FEW: u64 = 10;
const POOL: u64 = 64 << 20;

/// A kind of call, made [`CALLS`] times.
type Call = (&'static str, fn(&Many));

/// Each row finds the files as the rows above it have left them.
const CALLS_TABLE: &[Call] = &[
    ("create of an empty file", |many| {
        new_ones(many).for_each(|path| drop(File::create(path).expect("create")))
    }),
    ("open and close", |many| {
        old_ones(many).for_each(|path| drop(File::open(path).expect("open")))
    }),
    ("stat that asks the daemon", |many| old_ones(many).for_each(|path| stat(&path))),
    ("unlink of an empty file", |many| {
        new_ones(many).for_each(|path| fs::remove_file(path).expect("unlink"))
    }),
    ("quarantine of a subpage", quarantine),
];

/// A mount with many files.
struct Many {
    side: Side,
    files: u64,
}

/// Measures the rows of this module.
pub fn measure(plan: &Plan, table: &mut Table) {
    let counts: &[u64] = if plan.short { &[10, 300] } else { &[10, 1000, 6000, 10_000] };
    let mut mounts = Vec::new();
    for files in counts {
        match Many::mount(plan, *files) {
            Ok(many) => mounts.push((format!("with {files} files"), many)),
            Err(why) => table.skip(&format!("cost of calls with {files} files"), &why),
        }
    }
    let mounts: Vec<_> = mounts.iter().map(|(name, many)| (name.as_str(), many)).collect();
    let mut samples: Vec<_> = CALLS_TABLE.iter().map(|_| Vec::new()).collect();
    for _ in 0..plan.rounds() {
        for ((_, call), samples) in CALLS_TABLE.iter().zip(&mut samples) {
            samples.push(in_turn(1, &mounts, |many| microseconds(|| call(many)) / CALLS as f64));
        }
        mounts.iter().for_each(|(_, many)| set_attribute(&many.quarantined(), REPAIR, "zero all"));
    }
    for ((what, _), samples) in CALLS_TABLE.iter().zip(samples) {
        table.growth(what, "us", joined(samples));
    }
}

/// Joins the samples of all rounds, side by side.
fn joined(rounds: Vec<Vec<super::Samples>>) -> Vec<super::Samples> {
    let mut rounds = rounds.into_iter();
    let mut all = rounds.next().unwrap_or_default();
    for round in rounds {
        for ((_, all), (_, samples)) in all.iter_mut().zip(round) {
            all.extend(samples);
        }
    }
    all
}

impl Many {
    fn mount(plan: &Plan, files: u64) -> Result<Self, String> {
        let many = Self { side: Side::ours(plan, POOL, "pagesize=2M,collapse=off")?, files };
        let before = many.side.descriptors();
        many.create(0..FEW);
        let wanted = files * (many.side.descriptors() - before) / FEW + OTHER_DESCRIPTORS;
        let limit = many.side.descriptor_limit();
        if limit < wanted {
            return Err(format!(
                "the daemon may have {limit} descriptors (RLIMIT_NOFILE), not {wanted}"
            ));
        }
        many.create(FEW..files);
        many.side.file("quarantined").set_len(POOL).expect("ftruncate");
        Ok(many)
    }

    fn create(&self, numbers: std::ops::Range<u64>) {
        numbers.for_each(|n| drop(File::create(self.path(&n.to_string())).expect("create")));
    }

    fn path(&self, name: &str) -> PathBuf {
        self.side.mount_point.join(name)
    }

    fn quarantined(&self) -> PathBuf {
        self.path("quarantined")
    }
}

fn new_ones(many: &Many) -> impl Iterator<Item = PathBuf> + '_ {
    (0..CALLS).map(|n| many.path(&format!("new{n}")))
}

/// Returns [`FEW`] of the old files, evenly spread, so that the number of used files is the same on
/// each mount.
fn old_ones(many: &Many) -> impl Iterator<Item = PathBuf> + '_ {
    (0..CALLS).map(|n| many.path(&(n % FEW * (many.files / FEW)).to_string()))
}

fn stat(path: &PathBuf) {
    statx(CWD, path, AtFlags::STATX_FORCE_SYNC, StatxFlags::BASIC_STATS).expect("statx");
}

fn quarantine(many: &Many) {
    let path = many.quarantined();
    for place in 0..CALLS {
        set_attribute(&path, POISON, &format!("{:#x} 4096", place * (POOL / CALLS) + 0x5000));
    }
}
