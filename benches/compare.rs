//! What it costs, side by side with what a user would use instead, in one run on this machine.
//!
//! `cargo bench --bench compare` takes about a minute, root, and 8 GiB of memory; `-- --short` takes fewer rounds of less
//! memory; `-- --json` prints JSON. Sides are measured in turn, round by round; what is printed is the median over the rounds
//! and the ratio of the medians. On a virtual machine the host backs memory lazily, so every side's memory is touched once
//! before anything is timed.

#[path = "compare/calls.rs"]
mod calls;

use hugetlb2fs::sys::sigbus::{Mapping, Sharing};
use hugetlb2fs::units::Range;
use rustix::fs::{FallocateFlags, XattrFlags, fallocate, setxattr};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use serde_json::{Map, Value, json};
use std::ffi::CString;
use std::fs::{self, File};
use std::hint::black_box;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

const GIB: u64 = 1 << 30;
const LINE: u64 = 64;
const POOL_PAGES: u64 = 4;
const HUGE_PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages";

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let has = |name: &str| arguments.iter().any(|argument| argument == name);
    let rounds = if has("--short") { 3 } else { 7 };
    let directory = tempfile::tempdir().expect("a directory");
    let mut table = Table { json: has("--json"), rows: Map::new() };
    table.note(&format!("medians of {rounds} rounds; {}", kernel()));
    access(&directory.path().join("access"), rounds, &mut table);
    allocation(&directory.path().join("allocation"), rounds, &mut table);
    attributes(&directory.path().join("attributes"), rounds, &mut table);
    calls::measure(&directory.path().join("calls"), rounds, &mut table);
    names(&directory.path().join("names"), rounds, &mut table);
    memory(&directory.path().join("memory"), &mut table);
    table.finish();
}

fn kernel() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease")
        .map_or_else(|_| "unknown kernel".into(), |text| format!("Linux {}", text.trim()))
}

// ---- sides ----------------------------------------------------------------------------------------------------------

/// A filesystem that is mounted for the length of a measurement.
struct Side {
    name: &'static str,
    mount_point: PathBuf,
    reserved: bool,
}

impl Side {
    fn ours(base: &Path, options: &str) -> Self {
        let side = Self::at(base, "hugetlb2", false);
        let mut command = Command::new(env!("CARGO_BIN_EXE_hugetlb2"));
        command.arg0("mount.hugetlb2").arg("bench").arg(&side.mount_point).arg("-o").arg(options);
        assert!(command.status().expect("mount.hugetlb2").success());
        side
    }

    fn hugetlbfs(base: &Path, pages: u64) -> Option<Self> {
        fs::write(HUGE_PAGES, pages.to_string()).ok()?;
        let got: u64 = fs::read_to_string(HUGE_PAGES).ok()?.trim().parse().ok()?;
        if got < pages {
            let _ = fs::write(HUGE_PAGES, "0");
            return None;
        }
        let side = Self::at(base, "hugetlbfs 1G", true);
        side.mount("hugetlbfs", "pagesize=1G");
        Some(side)
    }

    fn tmpfs(base: &Path, name: &'static str, huge: &str, bytes: u64) -> Self {
        let side = Self::at(base, name, false);
        side.mount("tmpfs", &format!("size={bytes},huge={huge}"));
        side
    }

    fn at(base: &Path, name: &'static str, reserved: bool) -> Self {
        let mount_point = base.join(name.replace(' ', "-"));
        fs::create_dir_all(&mount_point).expect("a mount point");
        Self { name, mount_point, reserved }
    }

    fn mount(&self, kind: &str, options: &str) {
        let options = CString::new(options).expect("no NUL");
        mount("bench", &self.mount_point, kind, MountFlags::empty(), Some(options.as_c_str()))
            .expect("mount(2)");
    }

    fn file(&self, name: &str) -> File {
        let path = self.mount_point.join(name);
        File::options().read(true).write(true).create(true).truncate(false).open(path).expect("a file")
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        let _ = unmount(&self.mount_point, UnmountFlags::DETACH);
        if self.reserved {
            let _ = fs::write(HUGE_PAGES, "0");
        }
    }
}

// ---- figures --------------------------------------------------------------------------------------------------------

struct Table {
    json: bool,
    rows: Map<String, Value>,
}

impl Table {
    fn note(&mut self, text: &str) {
        if !self.json {
            println!("{text}");
        }
    }

    /// One row: for each side its samples; ratios are to the last side.
    fn row(&mut self, what: &str, unit: &str, samples: &mut [(&str, Vec<f64>)]) {
        let medians: Vec<_> = samples.iter_mut().map(|(name, samples)| (*name, spread(samples))).collect();
        let base = medians.last().map_or(1.0, |(_, (median, ..))| *median);
        self.note(&format!("{what} ({unit})"));
        let mut row = Map::new();
        for (name, (median, low, high)) in &medians {
            let ratio = median / base;
            self.note(&format!("  {name:<16}{median:>12.3}  ({low:.3} .. {high:.3})   x {ratio:.3}"));
            row.insert((*name).into(), json!({ "median": median, "min": low, "max": high, "ratio": ratio }));
        }
        row.insert("unit".into(), json!(unit));
        self.rows.insert(what.into(), Value::Object(row));
    }

    fn finish(self) {
        if self.json {
            println!("{:#}", Value::Object(self.rows));
        }
    }
}

fn spread(samples: &mut [f64]) -> (f64, f64, f64) {
    samples.sort_by(f64::total_cmp);
    (samples[samples.len() / 2], samples[0], samples[samples.len() - 1])
}

fn milliseconds(run: impl FnOnce()) -> f64 {
    let clock = Instant::now();
    run();
    clock.elapsed().as_secs_f64() * 1e3
}

fn microseconds(run: impl FnOnce()) -> f64 {
    milliseconds(run) * 1e3
}

// ---- access through mmap --------------------------------------------------------------------------------------------

fn access(base: &Path, rounds: usize, table: &mut Table) {
    const STEPS: u64 = 1 << 21;
    let sides: Vec<Side> = [
        Some(Side::ours(base, "size=1G")),
        Some(Side::tmpfs(base, "tmpfs huge", "always", GIB)),
        Some(Side::tmpfs(base, "tmpfs 4K", "never", GIB)),
        Side::hugetlbfs(base, 1),
    ]
    .into_iter()
    .flatten()
    .collect();
    let mappings: Vec<Mapping> = sides.iter().map(map_one_gib).collect();
    mappings.iter().for_each(|mapping| mapping.set_all(1));
    let order = cycle();
    let mut fills: Vec<_> = sides.iter().map(|side| (side.name, Vec::new())).collect();
    let mut chases = fills.clone();
    for _ in 0..rounds {
        for (n, mapping) in mappings.iter().enumerate() {
            fills[n].1.push(milliseconds(|| mapping.set_all(2)));
        }
    }
    mappings.iter().for_each(|mapping| lay_out(mapping, &order));
    for _ in 0..rounds {
        for (n, mapping) in mappings.iter().enumerate() {
            chases[n].1.push(milliseconds(|| chase(mapping, STEPS)) * 1e6 / STEPS as f64);
        }
    }
    table.row("pointer chase through 1 GiB", "ns a step", &mut chases);
    table.row("memset of 1 GiB", "ms", &mut fills);
}

fn map_one_gib(side: &Side) -> Mapping {
    let file = side.file("access");
    file.set_len(GIB).expect("ftruncate");
    Mapping::new(&file, Range::new(0, GIB), Sharing::Shared, true).expect("mmap")
}

/// One random cycle through all cache lines (Sattolo).
fn cycle() -> Vec<u32> {
    let mut order: Vec<u32> = (0..(GIB / LINE) as u32).collect();
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    for last in (1..order.len()).rev() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        order.swap(last, (state % last as u64) as usize);
    }
    order
}

fn lay_out(mapping: &Mapping, order: &[u32]) {
    for (line, next) in order.iter().enumerate() {
        mapping.store_word(line as u64 * LINE, u64::from(*next) * LINE);
    }
}

fn chase(mapping: &Mapping, steps: u64) {
    let mut at = 0;
    for _ in 0..steps {
        at = mapping.load_word(at);
    }
    black_box(at);
}

// ---- allocation -----------------------------------------------------------------------------------------------------

fn allocation(base: &Path, rounds: usize, table: &mut Table) {
    let bytes = POOL_PAGES * GIB;
    let mut ours = ("hugetlb2", Vec::new());
    let mut theirs = ("hugetlbfs 1G", Vec::new());
    // One after the other: the machine need not have both pools at once.
    {
        let side = Side::ours(base, &format!("size={bytes}"));
        for round in 0..=rounds {
            let time = milliseconds(|| side.file("large").set_len(bytes).expect("ftruncate"));
            if round > 0 {
                ours.1.push(time);
            }
            fs::remove_file(side.mount_point.join("large")).expect("unlink");
        }
    }
    if let Some(side) = Side::hugetlbfs(base, POOL_PAGES) {
        for round in 0..=rounds {
            let allocate =
                || fallocate(side.file("large"), FallocateFlags::empty(), 0, bytes).expect("fallocate");
            let time = milliseconds(allocate);
            if round > 0 {
                theirs.1.push(time);
            }
            fs::remove_file(side.mount_point.join("large")).expect("unlink");
        }
    }
    if theirs.1.is_empty() {
        table.note("hugetlbfs is left out of the next row: the machine has not 4 GiB in whole gigabytes");
    }
    let mut samples: Vec<_> = [ours, theirs].into_iter().filter(|side| !side.1.is_empty()).collect();
    table.row("file of 4 GiB, cleared and ready (ftruncate; fallocate)", "ms", &mut samples);
}

// ---- quarantine, repair, collapse -----------------------------------------------------------------------------------

fn attributes(base: &Path, rounds: usize, table: &mut Table) {
    const PLACES: u64 = 32;
    let side = Side::ours(base, "size=1G,collapse=off");
    let path = side.mount_point.join("file");
    side.file("file").set_len(GIB).expect("ftruncate");
    let set = |name: &str, value: String| {
        milliseconds(|| setxattr(&path, name, value.as_bytes(), XattrFlags::empty()).expect("setxattr")) * 1e3
    };
    let (mut quarantine, mut repair, mut collapse) = (Vec::new(), Vec::new(), Vec::new());
    for place in 0..rounds as u64 * PLACES {
        let range = format!("{:#x} 0x1000", place % 512 * (2 << 20) + 0x5000);
        quarantine.push(set("user.hugetlb2.poison", range.clone()));
        repair.push(set("user.hugetlb2.repair", format!("salvage {range}")));
        collapse.push(set("user.hugetlb2.collapse", range));
    }
    table.row("quarantine of a subpage", "us", &mut [("hugetlb2", quarantine)]);
    table.row("repair of a subpage", "us", &mut [("hugetlb2", repair)]);
    table.row("collapse of a folio", "us", &mut [("hugetlb2", collapse)]);
}

// ---- names ----------------------------------------------------------------------------------------------------------

fn names(base: &Path, rounds: usize, table: &mut Table) {
    const FILES: usize = 1000;
    let sides = [Side::ours(base, "size=64M,pagesize=2M"), Side::tmpfs(base, "tmpfs", "never", 64 << 20)];
    let mut samples: Vec<_> = sides.iter().map(|side| (side.name, Vec::new())).collect();
    for _ in 0..rounds {
        for (n, side) in sides.iter().enumerate() {
            let path = side.mount_point.join("empty");
            let time = milliseconds(|| {
                for _ in 0..FILES {
                    File::create(&path).expect("create");
                    fs::remove_file(&path).expect("unlink");
                }
            });
            samples[n].1.push(time * 1e3 / FILES as f64);
        }
    }
    table.row("create and unlink of an empty file", "us", &mut samples);
}

// ---- memory ---------------------------------------------------------------------------------------------------------

fn memory(base: &Path, table: &mut Table) {
    let side = Side::ours(base, "size=64M,pagesize=2M");
    for count in [1, 1000] {
        for n in 0..count {
            File::create(side.mount_point.join(n.to_string())).expect("create");
        }
        let resident = resident_kib(&side.mount_point);
        table.row(
            &format!("resident memory of the daemon, {count} files"),
            "KiB",
            &mut [("hugetlb2", vec![resident])],
        );
    }
}

fn resident_kib(mount_point: &Path) -> f64 {
    let mut counters = vec![0; 4096];
    let length = rustix::fs::getxattr(mount_point, "user.hugetlb2.pool", &mut counters[..])
        .expect("the pool attribute");
    let counters = String::from_utf8_lossy(&counters[..length]).into_owned();
    let pid = counters.lines().find_map(|line| line.strip_prefix("worker_pid ")).expect("a process id");
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("its status");
    let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"));
    kib.and_then(|kib| kib.parse().ok()).expect("a number")
}
