//! What system calls cost: read(2) and write(2), open, stat, a long directory.

use super::{Side, Table, microseconds};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

const FILE: u64 = 128 << 20;
const SMALL: usize = 4 << 10;
const LARGE: usize = 1 << 20;
/// Calls in one sample of what is done to one block of 4 KiB or to one name.
const CALLS: u64 = 2000;
const NAMES: usize = 10_000;

/// One kind of call, done so often.
type Call = (&'static str, u64, fn(&Side, &File));

const CALLS_TABLE: &[Call] = &[
    ("read of 4 KiB, random", CALLS, |_, file| read_randomly(file)),
    ("write of 4 KiB, random", CALLS, |_, file| write_randomly(file)),
    ("read of 1 MiB, sequential", FILE / LARGE as u64, |_, file| read_all(file, 0, FILE)),
    ("read of 1 MiB, sequential, 2 threads", FILE / LARGE as u64, |_, file| in_halves(file, read_all)),
    ("write of 1 MiB, sequential", FILE / LARGE as u64, |_, file| write_all(file, 0, FILE)),
    ("write of 1 MiB, sequential, 2 threads", FILE / LARGE as u64, |_, file| in_halves(file, write_all)),
    ("open and close", CALLS, |side, _| repeat(|| drop(File::open(side.mount_point.join("file"))))),
    ("stat", CALLS, |side, _| repeat(|| drop(fs::metadata(side.mount_point.join("file"))))),
    ("readdir of 10,000 names", 1, |side, _| count_names(&side.mount_point.join("names"))),
];

/// Fills in the rows of this module.
pub fn measure(base: &Path, rounds: usize, table: &mut Table) {
    let sides = [
        Side::ours(base, "size=256M,pagesize=2M"),
        Side::tmpfs(base, "tmpfs 4K", "never", 2 * FILE),
        Side::tmpfs(base, "tmpfs huge", "always", 2 * FILE),
    ];
    let files: Vec<File> = sides.iter().map(prepare).collect();
    for (what, count, call) in CALLS_TABLE {
        let mut samples: Vec<_> = sides.iter().map(|side| (side.name, Vec::new())).collect();
        for _ in 0..rounds {
            for (n, (side, file)) in sides.iter().zip(&files).enumerate() {
                samples[n].1.push(microseconds(|| call(side, file)) / *count as f64);
            }
        }
        table.row(what, "us", &mut samples);
    }
}

/// A file all of whose memory has been touched, and a directory with many names of one file.
fn prepare(side: &Side) -> File {
    let file = side.file("file");
    file.set_len(FILE).expect("ftruncate");
    write_all(&file, 0, FILE);
    let names = side.mount_point.join("names");
    fs::create_dir(&names).expect("mkdir");
    for n in 0..NAMES {
        fs::hard_link(side.mount_point.join("file"), names.join(n.to_string())).expect("link");
    }
    file
}

fn repeat(call: impl Fn()) {
    (0..CALLS).for_each(|_| call());
}

/// Offsets of blocks, the same ones for every side.
fn places() -> impl Iterator<Item = u64> {
    const STRIDE: u64 = 20_011; // a prime, so that no block comes twice
    (0..CALLS).map(|n| n * STRIDE % (FILE / SMALL as u64) * SMALL as u64)
}

fn read_randomly(file: &File) {
    let mut buffer = [0; SMALL];
    places().for_each(|at| file.read_exact_at(&mut buffer, at).expect("read"));
}

fn write_randomly(file: &File) {
    places().for_each(|at| file.write_all_at(&[1; SMALL], at).expect("write"));
}

fn read_all(file: &File, from: u64, to: u64) {
    let mut buffer = vec![0; LARGE];
    (from..to).step_by(LARGE).for_each(|at| file.read_exact_at(&mut buffer, at).expect("read"));
}

fn write_all(file: &File, from: u64, to: u64) {
    let buffer = vec![1; LARGE];
    (from..to).step_by(LARGE).for_each(|at| file.write_all_at(&buffer, at).expect("write"));
}

fn in_halves(file: &File, run: fn(&File, u64, u64)) {
    std::thread::scope(|scope| {
        scope.spawn(|| run(file, 0, FILE / 2));
        run(file, FILE / 2, FILE);
    });
}

fn count_names(directory: &Path) {
    assert_eq!(fs::read_dir(directory).expect("readdir").count(), NAMES);
}
