//! From an empty file to a file with every page touched.
//!
//! The filesystems spend the time at different moments. Ours clears memory when the file takes it.
//! hugetlbfs and tmpfs clear it at the first touch; fallocate(2) has hugetlbfs clear it at once. So
//! the first and the third row show a part of the time, and the second row shows all of it.
//!
//! In each round, one side at a time has memory, and touches all of it before the measurement. A
//! host that backs memory lazily takes free memory back within seconds (page reporting). To back it
//! again takes many times as long as the operation that is measured here.

use super::sides::{GIB, Kind, map};
use super::sys::Mapping;
use super::table::Samples;
use super::{Plan, Table, milliseconds};
use rustix::fs::{FallocateFlags, fallocate};
use std::fs::File;

const SUBPAGE: u64 = 4096;
pub const FOLIO: u64 = 2 << 20;

/// A way in which a file gets its memory.
struct Way {
    name: &'static str,
    kind: Kind,
    by_fallocate: bool,
}

const WAYS: [Way; 5] = [
    Way { name: "hugetlb2", kind: Kind::Ours, by_fallocate: false },
    Way { name: "hugetlbfs 1G", kind: Kind::Gigantic, by_fallocate: false },
    Way { name: "hugetlbfs 1G, fallocate", kind: Kind::Gigantic, by_fallocate: true },
    Way { name: "hugetlbfs 2M", kind: Kind::Huge, by_fallocate: false },
    Way { name: "tmpfs huge", kind: Kind::TmpfsHuge, by_fallocate: false },
];

/// Times in milliseconds.
struct Times {
    /// The call that gives the file its size.
    ready: f64,
    /// That call and the touches of every subpage together.
    touched: f64,
    /// The longest first touch of a folio.
    worst: f64,
}

/// Measures the rows of this module.
pub fn measure(plan: &Plan, table: &mut Table) {
    sizes(plan, 1, plan.at_most(7), table);
    if !plan.short {
        sizes(plan, 4, 5, table);
        match plan.afford_beside(8 * GIB, 18 * GIB) {
            Ok(()) => sizes(plan, 8, 3, table),
            Err(why) => table.skip("a file of 8 GiB, all touched", &why),
        }
    }
}

fn sizes(plan: &Plan, gib: u64, rounds: usize, table: &mut Table) {
    let mut ways: Vec<(&Way, Vec<Times>)> = WAYS.iter().map(|way| (way, Vec::new())).collect();
    for _ in 0..rounds {
        ways.retain_mut(|(way, times)| match once(plan, way, gib * GIB) {
            Ok(time) => {
                times.push(time);
                true
            }
            Err(why) => {
                table.skip(&format!("a file of {gib} GiB, all touched, {}", way.name), &why);
                false
            }
        });
    }
    let of = |part: fn(&Times) -> f64| -> Vec<Samples> {
        ways.iter()
            .map(|(way, times)| (way.name.to_owned(), times.iter().map(part).collect()))
            .collect()
    };
    let what = format!("an empty file to {gib} GiB, {rounds} rounds");
    table.compare(&format!("{what}: ready to map"), "ms", of(|times| times.ready));
    table.compare(&format!("{what}: every page touched"), "ms", of(|times| times.touched));
    table.compare(&format!("{what}: longest stall of a touch"), "ms", of(|times| times.worst));
}

fn once(plan: &Plan, way: &Way, bytes: u64) -> Result<Times, String> {
    let side = way.kind.mount(plan, bytes)?;
    let file = side.file("large");
    lengthen_and_touch(&file, way, bytes);
    file.set_len(0).expect("ftruncate");
    Ok(lengthen_and_touch(&file, way, bytes))
}

fn lengthen_and_touch(file: &File, way: &Way, bytes: u64) -> Times {
    let ready = milliseconds(|| lengthen(file, bytes, way.by_fallocate));
    let mapping = map(file, bytes);
    let mut worst = 0.0;
    let touching = milliseconds(|| worst = touch(&mapping, bytes));
    Times { ready, touched: ready + touching, worst }
}

/// Gives a file its size, and by fallocate(2) its memory.
pub fn lengthen(file: &File, bytes: u64, by_fallocate: bool) {
    if by_fallocate {
        fallocate(file, FallocateFlags::empty(), 0, bytes).expect("fallocate");
    } else {
        file.set_len(bytes).expect("ftruncate");
    }
}

/// Writes to every subpage. Returns the time of the longest first write to a folio in milliseconds.
pub fn touch(mapping: &Mapping, bytes: u64) -> f64 {
    let store = |at| mapping.store(at, 1).expect("no subpage is lost");
    let mut worst = 0.0f64;
    for folio in (0..bytes).step_by(FOLIO as usize) {
        worst = worst.max(milliseconds(|| store(folio)));
        (folio + SUBPAGE..folio + FOLIO).step_by(SUBPAGE as usize).for_each(store);
    }
    worst
}
