//! Messages of these programs to people.

use std::fmt::Arguments;
use std::io::{IsTerminal, Write};

/// Writes a line to standard error. Without a reader the line is lost, and the mount goes on:
/// eprintln would panic.
pub fn say(line: Arguments<'_>) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Shows on a terminal how much of some work is done; shows nothing elsewhere.
pub struct Meter {
    what: &'static str,
    shown: bool,
}

impl Meter {
    /// A meter for `what`, as in "taking memory".
    pub fn new(what: &'static str) -> Self {
        Self { what, shown: std::io::stderr().is_terminal() }
    }

    /// True if there is a terminal to show something on.
    pub fn is_shown(&self) -> bool {
        self.shown
    }

    /// Shows that `done` of `total` bytes are done.
    pub fn show(&self, done: u64, total: u64) {
        const GIB: f64 = (1u64 << 30) as f64;
        if self.shown {
            let (what, done, total) = (self.what, done as f64 / GIB, total as f64 / GIB);
            // A terminal that has gone away is no reason to give up.
            let _ = write!(std::io::stderr(), "\r{what}: {done:.1} of {total:.1} GiB");
        }
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        if self.shown {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}
