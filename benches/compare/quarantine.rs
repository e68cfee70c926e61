//! The cost of a quarantine for the programs that go on using the file, and the cost to make and to
//! end one.

use super::access::{chase, cycle, lay_out, nanoseconds_each};
use super::sides::{GIB, Kind, Side};
use super::sys::Mapping;
use super::table::Samples;
use super::{Plan, Random, Table, microseconds, set_attribute};
use hugetlb2fs::attributes::{COLLAPSE, POISON, REPAIR};
use std::collections::BTreeSet;
use std::path::Path;

const SUBPAGE: u64 = 4096;
const LINES_PER_SUBPAGE: u32 = 64;
/// Ranges in one value: an attribute holds at most 64 KiB.
const RANGES_AT_ONCE: usize = 2000;

/// Measures the rows of this module.
pub fn measure(plan: &Plan, table: &mut Table) {
    beside_quarantine(plan, table);
    requests(plan, table);
}

/// Times random reads in a file while more and more of its subpages are quarantined. Right before
/// each, times them in a file without a quarantine.
fn beside_quarantine(plan: &Plan, table: &mut Table) {
    const WHAT: &str = "random reads beside quarantined subpages";
    let side = match Side::ours(plan, 2 * GIB, "collapse=off") {
        Ok(side) => side,
        Err(why) => return table.skip(WHAT, &why),
    };
    let counts: &[usize] = if plan.short { &[1, 100, 1000] } else { &[1, 100, 10_000] };
    let steps = if plan.short { 1 << 17 } else { 1 << 21 };
    let lost = places(plan.span(), counts[counts.len() - 1]);
    let lines = lines_beside(plan.span(), &lost);
    let order = cycle(&lines);
    let (whole, hurt) = (side.mapped("whole", GIB), side.mapped("hurt", GIB));
    [&whole, &hurt].iter().for_each(|mapping| lay_out(mapping, &lines, &order));
    let mut samples = SamplesOfStates::default();
    let path = side.mount_point.join("hurt");
    for _ in 0..plan.rounds() {
        let mut look = |state: String, mapping: &Mapping| {
            samples.add(state, nanoseconds_each(steps, || chase(mapping, steps)));
        };
        let mut quarantined = 0;
        for count in counts {
            quarantine(&path, &lost[quarantined..*count]);
            quarantined = *count;
            look("no quarantine".to_owned(), &whole);
            look(format!("{count} quarantined"), &hurt);
        }
        set_attribute(&path, REPAIR, "salvage all");
        set_attribute(&path, COLLAPSE, "all");
        look("no quarantine".to_owned(), &whole);
        look("repaired and collapsed".to_owned(), &hurt);
    }
    table.growth(WHAT, "ns a step", samples.0);
}

/// The samples of each state, in the order in which the states first came.
#[derive(Default)]
struct SamplesOfStates(Vec<Samples>);

impl SamplesOfStates {
    fn add(&mut self, state: String, sample: f64) {
        match self.0.iter_mut().find(|(known, _)| *known == state) {
            Some((_, samples)) => samples.push(sample),
            None => self.0.push((state, vec![sample])),
        }
    }
}

/// Returns `count` random subpages of the first `span` bytes. The first subpage is not among them,
/// because a chase begins there.
fn places(span: u64, count: usize) -> Vec<u64> {
    let mut random = Random::new();
    let mut seen = BTreeSet::from([0]);
    let places = std::iter::repeat_with(|| random.below(span / SUBPAGE));
    places.filter(|place| seen.insert(*place)).take(count).collect()
}

fn lines_beside(span: u64, lost: &[u64]) -> Vec<u32> {
    let lost: BTreeSet<u64> = lost.iter().copied().collect();
    let whole = (0..span / SUBPAGE).filter(|subpage| !lost.contains(subpage));
    let lines = |subpage: u64| {
        (0..LINES_PER_SUBPAGE).map(move |line| subpage as u32 * LINES_PER_SUBPAGE + line)
    };
    whole.flat_map(lines).collect()
}

/// Quarantines subpages, many in each request.
pub fn quarantine(path: &Path, subpages: &[u64]) {
    for some in subpages.chunks(RANGES_AT_ONCE) {
        let value: String =
            some.iter().map(|subpage| format!("{:#x} 4096\n", subpage * SUBPAGE)).collect();
        set_attribute(path, POISON, &value);
    }
}

fn requests(plan: &Plan, table: &mut Table) {
    const PLACES: u64 = 32;
    let side = match Side::ours(plan, GIB, "collapse=off") {
        Ok(side) => side,
        Err(why) => return table.skip("quarantine, repair, collapse", &why),
    };
    side.file("file").set_len(GIB).expect("ftruncate");
    let path = side.mount_point.join("file");
    let set = |name: &str, value: &str| microseconds(|| set_attribute(&path, name, value));
    let (mut quarantine, mut repair, mut collapse) = (Vec::new(), Vec::new(), Vec::new());
    for place in 0..plan.rounds() as u64 * PLACES {
        let range = format!("{:#x} 0x1000", place % 512 * (2 << 20) + 0x5000);
        quarantine.push(set(POISON, &range));
        repair.push(set(REPAIR, &format!("salvage {range}")));
        collapse.push(set(COLLAPSE, &range));
    }
    let ours = |samples| vec![(Kind::Ours.name().to_owned(), samples)];
    table.compare("quarantine of a subpage", "us", ours(quarantine));
    table.compare("repair of a subpage", "us", ours(repair));
    table.compare("collapse of a folio", "us", ours(collapse));
}
