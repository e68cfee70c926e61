//! The demonstration.

use std::process::ExitCode;

/// Runs it.
pub fn main(_json: bool) -> ExitCode {
    ExitCode::FAILURE
}
