//! Messages of these programs to people.

use std::fmt::Arguments;
use std::io::Write;

/// Writes a line to standard error. Without a reader the line is lost, and the mount goes on:
/// eprintln would panic.
pub fn say(line: Arguments<'_>) {
    let _ = writeln!(std::io::stderr(), "{line}");
}
