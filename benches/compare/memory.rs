//! Memory outside of the pool: the daemon's own, and the kernel's for its accounts.

use super::sides::{Kind, Side};
use super::{Plan, Table, quarantine};
use hugetlb2fs::attributes::Counter;
use hugetlb2fs::sys::memory_total;
use rustix::process::Pid;
use std::fs::{self, File};

const POOL: u64 = 64 << 20;
const COUNT: u64 = 1000;
const MIB: u64 = 1 << 20;

/// Measures the rows of this module.
pub fn measure(plan: &Plan, table: &mut Table) {
    let side = match Side::ours(plan, POOL, "pagesize=2M,collapse=off") {
        Ok(side) => side,
        Err(why) => return table.skip("memory of the daemon", &why),
    };
    side.file("quarantined").set_len(POOL).expect("ftruncate");
    let at_first = resident(side.process(Counter::WorkerPid));
    (0..COUNT)
        .for_each(|n| drop(File::create(side.mount_point.join(n.to_string())).expect("create")));
    let with_files = resident(side.process(Counter::WorkerPid));
    let places: Vec<u64> = (0..COUNT).map(|n| n * 16).collect();
    quarantine::quarantine(&side.mount_point.join("quarantined"), &places);
    let with_quarantine = resident(side.process(Counter::WorkerPid));
    let mut row = |what: &str, unit, value| {
        table.compare(what, unit, vec![(Kind::Ours.name().to_owned(), vec![value])])
    };
    row("resident memory of the worker with one file", "KiB", at_first);
    row(
        "the same, each of 1,000 empty files more",
        "bytes",
        (with_files - at_first) * 1024.0 / COUNT as f64,
    );
    let each = (with_quarantine - with_files) * 1024.0 / COUNT as f64;
    row("the same, each of 1,000 quarantined subpages more", "bytes", each);
    row("resident memory of the supervisor", "KiB", resident(side.process(Counter::DaemonPid)));
    table.note(&struct_pages());
}

/// A text about the kernel's page structures. hugetlbfs can free most of these structures again
/// (hugetlb_free_vmemmap); a tmpfs folio, and so a page of ours, keeps them.
fn struct_pages() -> String {
    const PER_GIB: u64 = (1 << 30) / 4096 * 64 / MIB;
    let switch = fs::read_to_string("/proc/sys/vm/hugetlb_optimize_vmemmap");
    let theirs = match switch.as_deref().map(str::trim) {
        Ok("1") => "hugetlbfs frees all but 4 KiB of that here",
        Ok(_) => {
            "hugetlbfs could free all but 4 KiB of that (hugetlb_optimize_vmemmap is off here)"
        }
        Err(_) => "hugetlbfs frees none of that on this kernel",
    };
    let total = memory_total().unwrap_or(0) / 4096 * 64 / MIB;
    format!(
        "struct page: 64 bytes per 4 KiB, {PER_GIB} MiB a GiB, {total} MiB on this machine; {theirs}"
    )
}

/// The resident memory of a process in KiB.
fn resident(process: Pid) -> f64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).expect("its status");
    let kib =
        status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"));
    kib.and_then(|kib| kib.parse().ok()).expect("a number")
}
