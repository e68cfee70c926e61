//! The abilities of the lab's kernel, without a pool.

use super::{Case, Machine};
use crate::support::Dice;
use memmap2::{Advice, MmapOptions};
use std::fs;

pub const CASES: &[Case] = &[
    Case {
        name: "this_kernel_has_real_memory_errors",
        machine: Machine::SMALL,
        ends_kernel: None,
        run: this_kernel_has_real_memory_errors,
    },
    Case {
        name: "memory_holds_what_was_left_in_it",
        machine: Machine::SMALL,
        ends_kernel: None,
        run: memory_holds_what_was_left_in_it,
    },
    Case {
        name: "a_kernel_that_ends_is_noticed_with_its_last_words",
        machine: Machine::SMALL,
        ends_kernel: Some("sysrq triggered crash"),
        run: a_kernel_that_ends_is_noticed_with_its_last_words,
    },
    Case {
        name: "a_machine_with_two_nodes_tells_how_far_and_how_fast_they_are",
        machine: Machine::TWO_NODES,
        ends_kernel: None,
        run: a_machine_with_two_nodes_tells_how_far_and_how_fast_they_are,
    },
];

fn a_machine_with_two_nodes_tells_how_far_and_how_fast_they_are() {
    let of = |node: u32, what: &str| {
        let path = format!("/sys/devices/system/node/node{node}/access0/initiators/{what}");
        let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
        text.trim().parse::<u64>().expect("a number")
    };
    for node in 0..2 {
        println!(
            "node {node}: {} ns, {} MB/s",
            of(node, "read_latency"),
            of(node, "read_bandwidth")
        );
        assert_eq!(of(node, "read_latency"), 80, "of the processors that are nearest");
    }
}

/// The number of memory errors that the kernel has dealt with on a NUMA node.
pub fn memory_failures(node: u32) -> u64 {
    let path = format!("/sys/devices/system/node/node{node}/memory_failure/total");
    let text = fs::read_to_string(path).expect("the kernel counts memory errors");
    text.trim().parse().expect("a number")
}

fn this_kernel_has_real_memory_errors() {
    let before = memory_failures(0);
    let mut memory = MmapOptions::new().len(8192).map_anon().expect("memory");
    memory.fill(7);
    memory.advise_range(Advice::HwPoison, 0, 4096).expect("MADV_HWPOISON");
    assert_eq!(memory_failures(0), before + 1);
    assert_eq!(memory[4096], 7);
}

/// For a machine that moves. The first run leaves bytes in memory; every run looks for them.
fn memory_holds_what_was_left_in_it() {
    const LEFT: &str = "/tmp/left";
    const WORDS: u64 = (32 << 20) / 8;
    let mut dice = Dice(WORDS);
    let bytes: Vec<u8> = (0..WORDS).flat_map(|_| dice.roll().to_le_bytes()).collect();
    if !fs::exists(LEFT).expect("a look") {
        fs::write(LEFT, &bytes).expect("room");
    }
    let found = fs::read(LEFT).expect("it is there");
    let wrong =
        found.chunks(4096).zip(bytes.chunks(4096)).filter(|(found, left)| found != left).count();
    assert_eq!(
        (found.len(), wrong),
        (bytes.len(), 0),
        "bytes, and pages that are not as they were left"
    );
}

fn a_kernel_that_ends_is_noticed_with_its_last_words() {
    fs::write("/proc/sysrq-trigger", "c").expect("sysrq");
}
