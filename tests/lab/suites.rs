//! Test programs of the host that also run in the machine, test by test: both kernels must keep the
//! same rules.

use crate::cases::Machine;
use crate::image::{Image, SUITES};
use crate::support::limits;
use libtest_mimic::Failed;
use std::process::Command;

/// Memory for a page of 1 GiB and for all else.
pub const MACHINE: Machine = Machine { memory: 3072, nodes: 1, command_line: "" };

/// Tests that do not run in the machine, and the reasons.
const ELSEWHERE: &[(&str, &str)] = &[
    ("quarantine::cp_carries_a_quarantine_with_the_attributes", "the machine has no cp(1)"),
    ("quarantine::cp_rescues_everything_that_is_not_lost", "the machine has no cp(1)"),
    ("quarantine::a_hundred_lost_subpages_cost_a_hundred_subpages", "the machine has no cp(1)"),
    (
        "quarantine::a_long_range_is_quarantined_and_repaired_by_folios",
        "the emulated machine takes minutes for a page of 1 GiB",
    ),
    ("quarantine::rsync_carries_a_quarantine_with_the_attributes", "the machine has no rsync(1)"),
    (
        "quarantine::quarantining_needs_permission_to_write_the_file",
        "the machine has no setpriv(1)",
    ),
];

/// The names of all tests that run in the machine, `<suite>::<test>`.
///
/// # Errors
/// A suite cannot be built, does not list its tests, or has none.
pub fn tests() -> Result<Vec<String>, Failed> {
    let image = Image::get()?;
    let mut names = Vec::new();
    for (suite, program) in SUITES.iter().zip(&image.suites) {
        let listed = limits::output(
            limits::PROGRAM,
            Command::new(program).args(["--list", "--format", "terse"]),
        )?;
        let text = String::from_utf8_lossy(&listed.stdout).into_owned();
        let of_suite: Vec<String> = text
            .lines()
            .filter_map(|line| line.strip_suffix(": test"))
            .map(|name| format!("{suite}::{name}"))
            .collect();
        if of_suite.is_empty() {
            return Err(format!("{} lists no tests: {text}", program.display()).into());
        }
        names.extend(of_suite);
    }
    for (name, _) in ELSEWHERE {
        if !names.iter().any(|listed| listed == name) {
            return Err(format!("there is no {name} to leave out").into());
        }
    }
    names.retain(|name| ELSEWHERE.iter().all(|(left_out, _)| left_out != name));
    Ok(names)
}
