//! Test programs of the host that also run in the machine, test by test: both kernels must keep the
//! same rules.

use crate::cases::Machine;
use crate::image::{Image, SUITES};
use crate::support::limits;
use libtest_mimic::Failed;
use std::process::Command;

pub const MACHINE: Machine = Machine::SMALL;

/// Tests that do not run in the machine, and the reasons.
const ELSEWHERE: &[(&str, &str)] = &[
    ("quarantine::cp_carries_a_quarantine_with_the_attributes", NO_PROGRAMS),
    ("quarantine::cp_rescues_everything_that_is_not_lost", NO_PROGRAMS),
    ("quarantine::a_hundred_lost_subpages_cost_a_hundred_subpages", NO_PROGRAMS),
    ("quarantine::rsync_carries_a_quarantine_with_the_attributes", NO_PROGRAMS),
    ("quarantine::quarantining_needs_permission_to_write_the_file", NO_PROGRAMS),
    (
        "quarantine::a_long_range_is_quarantined_and_repaired_by_folios",
        "the emulated machine takes minutes for a page of 1 GiB",
    ),
    ("quarantine::ranges_are_rounded_outward_and_lines_add_up", TEXT),
    ("quarantine::what_is_quarantined_already_keeps_its_time", TEXT),
    ("quarantine::a_value_that_was_read_can_be_written_to_another_file", TEXT),
    ("quarantine::malformed_requests_and_ranges_past_the_end_change_nothing", TEXT),
    ("quarantine::malformed_repairs_are_refused_and_change_nothing", TEXT),
    ("quarantine::malformed_collapses_are_refused", TEXT),
    ("quarantine::an_empty_file_has_nothing_to_quarantine", TEXT),
    ("quarantine::a_released_page_has_nothing_to_quarantine", TEXT),
    ("quarantine::a_file_without_a_quarantine_has_no_poison_attribute", TEXT),
    ("quarantine::a_quarantine_does_not_end_by_removing_the_attribute", TEXT),
    ("quarantine::repairing_what_is_not_broken_is_refused_and_changes_nothing", TEXT),
    ("quarantine::the_map_of_an_empty_file_is_empty", TEXT),
    ("quarantine::the_pool_counts_what_is_quarantined_and_the_log_tells", TEXT),
    ("quarantine::without_recovery_write_a_covering_write_is_eio", TEXT),
    ("guard::a_guarded_program_is_as_without_a_guard", NO_PROGRAMS),
];

const NO_PROGRAMS: &str = "the machine has no cp(1), rsync(1), setpriv(1) and sh(1)";
const TEXT: &str = "the daemon decides by its ledgers and the request alone, on any kernel";

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
