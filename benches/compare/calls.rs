//! The cost of system calls: read(2) and write(2), open, stat, create, a long directory.
//!
//! Ours has two mounts. In the first, the calls use a descriptor for reading and writing. In the
//! second, they use a descriptor for reading only; with the option `io=native` the kernel itself
//! serves such reads.

use super::limits;
use super::sides::{Kind, Side};
use super::table::Samples;
use super::{Plan, Table, in_turn, microseconds};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

const FILE: u64 = 128 << 20;
const SMALL: usize = 4 << 10;
const LARGE: usize = 1 << 20;

/// A filesystem and the things in it that the calls use.
struct Subject {
    /// Stands before `side` to be dropped first: the filesystem ends when no file of it is open.
    file: File,
    side: Side,
    /// Calls in one sample of an operation on one block of 4 KiB or on one name.
    calls: u64,
    /// Names in a directory.
    names: u64,
}

/// A kind of call: its name, the number of calls in a sample, and the function that makes them.
type Call = (&'static str, fn(&Subject) -> u64, fn(&Subject));

/// Calls that a descriptor for reading only can make.
const READING: &[Call] = &[
    ("read of 4 KiB, random", |on| on.calls, read_randomly),
    ("read of 1 MiB, sequential", blocks, |on| read_all(&on.file, 0, FILE)),
    ("read of 1 MiB, sequential, 2 threads", blocks, |on| in_halves(&on.file, read_all)),
    (
        "open for reading and close",
        |on| on.calls,
        |on| on.repeat(|| drop(File::open(on.path("file")))),
    ),
];

const OTHERS: &[Call] = &[
    ("write of 4 KiB, random", |on| on.calls, write_randomly),
    ("write of 1 MiB, sequential", blocks, |on| write_all(&on.file, 0, FILE)),
    ("write of 1 MiB, sequential, 2 threads", blocks, |on| in_halves(&on.file, write_all)),
    ("stat", |on| on.calls, |on| on.repeat(|| drop(fs::metadata(on.path("file"))))),
    (
        "create and unlink of an empty file",
        |on| on.calls,
        |on| on.repeat(|| create_and_unlink(&on.path("empty"))),
    ),
    ("readdir, a name", |on| on.names, count_names),
];

fn blocks(_: &Subject) -> u64 {
    FILE / LARGE as u64
}

/// Measures the rows of this module.
pub fn measure(plan: &Plan, table: &mut Table) {
    let mut subjects: Vec<(&str, Subject)> = Vec::new();
    match Side::ours(plan, 2 * FILE, "pagesize=2M") {
        Ok(side) => subjects.push((side.name, Subject::with_names(plan, side))),
        Err(why) => return table.skip("system calls", &why),
    }
    for side in
        plan.mount_all(&[Kind::TmpfsHuge, Kind::TmpfsSmall], 2 * FILE, "system calls", table)
    {
        subjects.push((side.name, Subject::with_names(plan, side)));
    }
    for (what, samples) in OTHERS.iter().map(|call| samples(call, plan, &subjects)) {
        table.compare(what, "us", samples);
    }
    match read_only(plan) {
        Ok(subject) => subjects.push(subject),
        Err(why) => table.skip("calls of a descriptor that only reads", &why),
    }
    for (what, mut samples) in READING.iter().map(|call| samples(call, plan, &subjects)) {
        table.compare(what, "us", samples.clone());
        if subjects.last().is_some_and(|(name, _)| is_read_only(name)) {
            samples.rotate_right(1); // the last side comes first, as ours
            samples.retain(|(name, _)| name != Kind::Ours.name());
            table.compare(&format!("{what}, read-only descriptor"), "us", samples);
        }
    }
}

fn samples(call: &Call, plan: &Plan, subjects: &[(&str, Subject)]) -> (&'static str, Vec<Samples>) {
    let (what, count, all) = *call;
    let each = |on: &Subject| microseconds(|| all(on)) / count(on) as f64;
    (what, in_turn(plan.rounds(), subjects, each))
}

const READ_ONLY: [&str; 2] = ["hugetlb2 read-only descriptor", "hugetlb2 read-only, io=native"];

fn is_read_only(name: &str) -> bool {
    READ_ONLY.contains(&name)
}

fn read_only(plan: &Plan) -> Result<(&'static str, Subject), String> {
    let native = knows_native();
    let options = if native { "pagesize=2M,io=native" } else { "pagesize=2M" };
    let mut subject = Subject::new(plan, Side::ours(plan, 2 * FILE, options)?);
    subject.file = File::open(subject.path("file")).expect("open");
    Ok((READ_ONLY[usize::from(native)], subject))
}

/// True if ours has the option `io=`.
fn knows_native() -> bool {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hugetlb2"));
    command.arg0("mount.hugetlb2").arg("--help");
    let help = limits::output(limits::PROGRAM, &mut command).expect("mount.hugetlb2");
    String::from_utf8_lossy(&help.stdout).lines().any(|line| line.trim_start().starts_with("io="))
}

impl Subject {
    /// Makes a file and touches all of its memory.
    fn new(plan: &Plan, side: Side) -> Self {
        let file = side.file("file");
        file.set_len(FILE).expect("ftruncate");
        write_all(&file, 0, FILE);
        let (calls, names) = if plan.short { (200, 1000) } else { (2000, 10_000) };
        Self { file, side, calls, names }
    }

    /// Makes also a directory with many names of that file.
    fn with_names(plan: &Plan, side: Side) -> Self {
        let subject = Self::new(plan, side);
        let names = subject.path("names");
        fs::create_dir(&names).expect("mkdir");
        for n in 0..subject.names {
            fs::hard_link(subject.path("file"), names.join(n.to_string())).expect("link");
        }
        subject
    }

    fn path(&self, name: &str) -> PathBuf {
        self.side.mount_point.join(name)
    }

    fn repeat(&self, call: impl Fn()) {
        (0..self.calls).for_each(|_| call());
    }

    /// Offsets of blocks, equal for every side.
    fn places(&self) -> impl Iterator<Item = u64> {
        const STRIDE: u64 = 20_011; // a prime, so that no block comes twice
        (0..self.calls).map(|n| n * STRIDE % (FILE / SMALL as u64) * SMALL as u64)
    }
}

fn read_randomly(on: &Subject) {
    let mut buffer = [0; SMALL];
    on.places().for_each(|at| on.file.read_exact_at(&mut buffer, at).expect("read"));
}

fn write_randomly(on: &Subject) {
    on.places().for_each(|at| on.file.write_all_at(&[1; SMALL], at).expect("write"));
}

/// Runs `run` with a buffer of [`LARGE`] bytes that begins on a page boundary, as the buffers of
/// dd, fio and databases do. An unaligned buffer of 1 MiB touches one page more than a FUSE request
/// can hold, so the kernel sends two requests.
fn with_buffer(run: impl FnOnce(&mut [u8])) {
    let mut room = vec![1; LARGE + SMALL];
    let start = room.as_ptr().align_offset(SMALL);
    run(&mut room[start..start + LARGE]);
}

fn read_all(file: &File, from: u64, to: u64) {
    with_buffer(|buffer| {
        (from..to).step_by(LARGE).for_each(|at| file.read_exact_at(buffer, at).expect("read"));
    });
}

fn write_all(file: &File, from: u64, to: u64) {
    with_buffer(|buffer| {
        (from..to).step_by(LARGE).for_each(|at| file.write_all_at(buffer, at).expect("write"));
    });
}

fn in_halves(file: &File, run: fn(&File, u64, u64)) {
    std::thread::scope(|scope| {
        scope.spawn(|| run(file, 0, FILE / 2));
        run(file, FILE / 2, FILE);
    });
}

fn create_and_unlink(path: &Path) {
    File::create(path).expect("create");
    fs::remove_file(path).expect("unlink");
}

fn count_names(on: &Subject) {
    assert_eq!(fs::read_dir(on.path("names")).expect("readdir").count() as u64, on.names);
}
