//! The command hugetlb2 (being written).
use std::ffi::OsString;
use std::process::ExitCode;
pub fn main(_arguments: Vec<OsString>) -> ExitCode { ExitCode::SUCCESS }
