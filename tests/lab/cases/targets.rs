//! The kinds of memory of machines with NUMA nodes that have no processor.

use super::cases;
use crate::support::{FOLIO, PLACEMENT, Pool, TargetLine, hugetlb2, run, set};
use hugetlb2fs::placement::Quality;
use hugetlb2fs::targets;
use hugetlb2fs::units::NumaNode;
use std::fs;

cases! {
    FOUR_NODES: targets_have_the_values_of_the_firmware, a_file_takes_of_the_bytes_of_its_target,
        the_command_shows_the_targets_of_four_nodes, the_firmwares_values_order_the_targets;
    DISTANT_NODES: targets_without_values_of_the_firmware_have_distances,
        distances_order_targets_without_values;
}

/// A text of the kernel about a node.
fn told(node: u32, file: &str) -> String {
    let path = format!("/sys/devices/system/node/node{node}/{file}");
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    text.trim().to_owned()
}

/// Bytes of a node, as the kernel tells them.
fn capacity(node: u32) -> u64 {
    let text = told(node, "meminfo");
    let line = text.lines().find(|line| line.contains("MemTotal:")).expect("the line");
    line.split_ascii_whitespace().nth(3).and_then(|kib| kib.parse::<u64>().ok()).unwrap() * 1024
}

fn kinds(lines: &[TargetLine]) -> Vec<(u32, &str, &str)> {
    lines.iter().map(|line| (line.node, line.kind.as_str(), line.value("initiators"))).collect()
}

fn targets_have_the_values_of_the_firmware() {
    const FILES: [(&str, &str); 4] = [
        ("ReadLatency", "read_latency"),
        ("WriteLatency", "write_latency"),
        ("ReadBandwidth", "read_bandwidth"),
        ("WriteBandwidth", "write_bandwidth"),
    ];
    let pool = Pool::mount("pagesize=2M,size=48M,nodes=0-3");
    let lines = TargetLine::all(&pool);
    assert_eq!(
        kinds(&lines),
        [(0, "dram", "0"), (1, "dram", "1"), (2, "memory-only", "0"), (3, "hbm", "1")]
    );
    for line in &lines {
        for (name, file) in FILES {
            let file = format!("access1/initiators/{file}");
            assert_eq!(line.value(name), told(line.node, &file), "{name} of node {}", line.node);
        }
        assert_eq!(line.number("Capacity"), capacity(line.node));
        assert!(!line.values.contains_key("Distance"), "the values are better");
    }
    let of = |name: &str| lines.iter().map(|line| line.number(name)).collect::<Vec<_>>();
    assert_eq!(of("ReadLatency"), [80, 80, 250, 90]);
    assert_eq!(of("WriteBandwidth"), [204_800, 204_800, 61_440, 819_200]);
    pool.unmount();
}

fn a_file_takes_of_the_bytes_of_its_target() {
    let pool = Pool::mount("pagesize=2M,size=48M,nodes=0-3");
    let bytes = |name: &str| {
        TargetLine::all(&pool).iter().map(|line| line.number(name)).collect::<Vec<_>>()
    };
    let all = bytes("pool_bytes");
    assert_eq!(all.iter().sum::<u64>(), 24 * FOLIO);
    assert_eq!(bytes("free_bytes"), all);
    let path = pool.join("file");
    fs::write(&path, "").unwrap();
    set(&path, PLACEMENT, "strict:bind:2").unwrap();
    fs::write(&path, vec![7; 5 * FOLIO as usize]).unwrap();
    assert_eq!(bytes("pool_bytes"), all);
    assert_eq!(bytes("free_bytes"), [all[0], all[1], all[2] - 5 * FOLIO, all[3]]);
    pool.unmount();
}

fn the_command_shows_the_targets_of_four_nodes() {
    let pool = Pool::mount("pagesize=2M,size=48M,nodes=0-3");
    let said = run(hugetlb2().arg("targets").arg(pool.path()));
    println!("{said}");
    let rows: Vec<Vec<&str>> =
        said.lines().map(|line| line.split_ascii_whitespace().collect()).collect();
    assert_eq!(
        rows[0],
        [
            "node",
            "kind",
            "initiators",
            "Capacity[B]",
            "ReadLatency[ns]",
            "WriteLatency[ns]",
            "ReadBandwidth[MiB/s]",
            "WriteBandwidth[MiB/s]",
            "pool_bytes",
            "free_bytes",
        ]
    );
    assert_eq!(rows[3][..3], ["2", "memory-only", "0"]);
    assert_eq!(rows[3][4..8], ["250", "250", "61440", "61440"]);
    let json = run(hugetlb2().args(["--json", "targets"]).arg(pool.path()));
    let json: String = json.split_ascii_whitespace().collect();
    let node = format!(
        r#"{{"node":2,"kind":"memory-only","initiators":[0],"Capacity":{},"ReadLatency":250,"#,
        capacity(2)
    );
    assert!(json.starts_with(r#"[{"node":0,"#) && json.contains(&node), "{json}");
    pool.unmount();
}

/// The nodes, the best first for a program on a node.
fn best(quality: Quality, initiator: u32) -> Vec<u32> {
    let targets = targets::read().expect("the targets of this machine");
    let nodes = targets::best(&targets, quality, Some(NumaNode(initiator)));
    nodes.into_iter().map(|node| node.0).collect()
}

fn the_firmwares_values_order_the_targets() {
    assert_eq!(best(Quality::Latency, 0), [0, 2, 1, 3], "1 and 3 are not known, and 1 is nearer");
    assert_eq!(best(Quality::Bandwidth, 0), [0, 2, 1, 3]);
    assert_eq!(best(Quality::Latency, 1), [1, 3, 0, 2]);
    assert_eq!(best(Quality::Bandwidth, 1), [3, 1, 0, 2]);
}

fn targets_without_values_of_the_firmware_have_distances() {
    let pool = Pool::mount("pagesize=2M,size=48M,nodes=0-2");
    let lines = TargetLine::all(&pool);
    assert_eq!(kinds(&lines), [(0, "dram", "0,1"), (1, "dram", "0,1"), (2, "memory-only", "0,1")]);
    let distances: Vec<&str> = lines.iter().map(|line| line.value("Distance")).collect();
    assert_eq!(distances, ["10,21", "21,10", "24,28"]);
    for line in &lines {
        let unknown = ["ReadLatency", "WriteLatency", "ReadBandwidth", "WriteBandwidth"];
        assert!(unknown.iter().all(|name| !line.values.contains_key(*name)));
        assert_eq!(line.number("Capacity"), capacity(line.node));
    }
    let said = run(hugetlb2().arg("targets").arg(pool.path()));
    println!("{said}");
    assert!(said.contains(" Distance ") && !said.contains("Latency"), "{said}");
    pool.unmount();
}

fn distances_order_targets_without_values() {
    assert_eq!(best(Quality::Latency, 0), [0, 1, 2]);
    assert_eq!(best(Quality::Bandwidth, 1), [1, 0, 2]);
    let largest = (0..3).max_by_key(|node| capacity(*node)).expect("a node");
    assert_eq!(best(Quality::Capacity, 1)[0], largest);
}
