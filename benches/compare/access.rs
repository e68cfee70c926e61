//! The cost of a touch of memory through mmap(2): at random, and from one end to the other.

use super::sides::{GIB, Kind};
use super::sys::Mapping;
use super::{Plan, Random, Table, in_turn, milliseconds};
use std::hint::black_box;

const LINE: u64 = 64;

/// Measures the rows of this module.
pub fn measure(plan: &Plan, table: &mut Table) {
    let steps = if plan.short { 1 << 18 } else { 1 << 21 };
    let sides = plan.mount_all(&Kind::ALL, GIB, "access through mmap", table);
    let mappings: Vec<_> =
        sides.iter().map(|side| (side.name, side.mapped("access", GIB))).collect();
    mappings.iter().for_each(|(_, mapping)| mapping.set_all(1));
    let rounds = plan.rounds();
    let fills = in_turn(rounds, &mappings, |mapping| milliseconds(|| mapping.set_all(2)));
    let sums = in_turn(rounds, &mappings, |mapping| milliseconds(|| sum(mapping)));
    let writes =
        in_turn(rounds, &mappings, |mapping| nanoseconds_each(steps, || write(mapping, steps)));
    let span = plan.span();
    let lines: Vec<u32> = (0..(span / LINE) as u32).collect();
    let order = cycle(&lines);
    mappings.iter().for_each(|(_, mapping)| lay_out(mapping, &lines, &order));
    let chases =
        in_turn(rounds, &mappings, |mapping| nanoseconds_each(steps, || chase(mapping, steps)));
    let chase = format!(
        "random reads, a pointer chase through {}",
        if plan.short { "128 MiB" } else { "1 GiB" }
    );
    table.compare(&chase, "ns a step", chases);
    table.compare("random writes in 1 GiB", "ns each", writes);
    table.compare("sequential write, memset of 1 GiB", "ms", fills);
    table.compare("sequential read, sum of a word a line of 1 GiB", "ms", sums);
}

/// Nanoseconds for each of the `count` steps of `run`.
pub fn nanoseconds_each(count: u64, run: impl FnOnce()) -> f64 {
    milliseconds(run) * 1e6 / count as f64
}

/// Returns, for each of `lines`, its successor in one random cycle through all of them (Sattolo).
pub fn cycle(lines: &[u32]) -> Vec<u32> {
    let mut order = lines.to_vec();
    let mut random = Random::new();
    for last in (1..order.len()).rev() {
        order.swap(last, random.below(last as u64) as usize);
    }
    order
}

/// Writes the place of the next line into each line.
pub fn lay_out(mapping: &Mapping, lines: &[u32], order: &[u32]) {
    for (line, next) in lines.iter().zip(order) {
        mapping.store_word(u64::from(*line) * LINE, u64::from(*next) * LINE);
    }
}

/// Follows the lines: each holds the place of the next one.
pub fn chase(mapping: &Mapping, steps: u64) {
    let mut at = 0;
    for _ in 0..steps {
        at = mapping.load_word(at);
    }
    black_box(at);
}

fn write(mapping: &Mapping, steps: u64) {
    let mut random = Random::new();
    for step in 0..steps {
        mapping.store_word(random.below(GIB / LINE) * LINE, step);
    }
}

/// Reads one word of each cache line. That brings in all of the memory and leaves the processor
/// little else to do.
fn sum(mapping: &Mapping) {
    let words = (0..GIB).step_by(LINE as usize).map(|at| mapping.load_word(at));
    black_box(words.fold(0, u64::wrapping_add));
}
