//! The README's first command.

mod support;

use serde_json::Value;
use support::{hugetlb2, run};

fn mounts_of_the_demonstration() -> usize {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
    mounts.lines().filter(|line| line.contains("hugetlb2-demo-")).count()
}

#[test]
fn the_demonstration_holds_what_it_claims_and_leaves_nothing_behind() {
    let report: Value = serde_json::from_str(&run(hugetlb2().args(["demo", "--json"]))).expect("JSON");
    assert_eq!(report["ok"], true);
    for (name, value) in [
        ("huge_before", 512),
        ("sigbus_after", 1),
        ("huge_poisoned", 511),
        ("good_subpages", 262_143),
        ("good_repaired", 262_144),
        ("huge_repaired", 512),
        ("violations", 0),
        ("lost_here", 4096),
        ("lost_hugetlbfs", 1 << 30),
    ] {
        assert_eq!(report[name], value, "{name}");
    }
    assert_eq!(mounts_of_the_demonstration(), 0);
}
