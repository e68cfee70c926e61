//! Tests and programs of others, unchanged, on a mount of ours. Some run on tmpfs, too, for
//! comparison. Each test prints the last words of its program.
//!
//! `tests/run` installs the packages of Debian and crates.io, and runs a short form of all this.
//! `HUGETLB2_LONG=1 cargo test --test programs` runs the long form in about ten minutes.

mod databases;
mod fio;
mod fsx;
mod jvm;
mod posix;
mod qemu;
mod stress;
#[path = "../support/mod.rs"]
mod support;
mod tools;

use libtest_mimic::{Arguments, Trial};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use std::ffi::CString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Output};
use std::time::Duration;
use support::limits;

/// A test: its name, and a function that panics if the rule does not hold.
pub type Test = (&'static str, fn());

macro_rules! tests {
    ($($name:ident),+ $(,)?) => {
        pub const TESTS: &[$crate::Test] = &[$((stringify!($name), $name)),+];
    };
}
use tests;

fn main() -> ExitCode {
    limits::allow(1800 * at_length(6));
    let all = [
        posix::TESTS,
        fsx::TESTS,
        stress::TESTS,
        fio::TESTS,
        jvm::TESTS,
        databases::TESTS,
        tools::TESTS,
        qemu::TESTS,
    ];
    let trial = |(name, run): &Test| {
        let run = *run;
        Trial::test(*name, move || {
            run();
            Ok(())
        })
    };
    let trials = all.into_iter().flatten().map(trial).collect();
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

/// The factor for the amount of work: `times` in the long form, otherwise 1.
pub fn at_length(times: u64) -> u64 {
    if std::env::var_os("HUGETLB2_LONG").is_some() { times } else { 1 }
}

/// The path of a program of crates.io that `tests/run` has installed.
pub fn installed(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/programs/bin").join(name);
    assert!(path.is_file(), "{} is not there: tests/run installs it", path.display());
    path
}

/// A tmpfs, for comparison.
pub struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    /// Mounts a tmpfs of this size.
    pub fn mount(megabytes: u64) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let options = CString::new(format!("size={megabytes}M")).expect("no NUL");
        mount("none", directory.path(), "tmpfs", MountFlags::empty(), Some(options.as_c_str()))
            .expect("mount(2)");
        Self(directory)
    }

    /// Its mount point.
    pub fn path(&self) -> PathBuf {
        self.0.path().to_owned()
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = unmount(self.0.path(), UnmountFlags::DETACH);
    }
}

/// Runs a program to its end, and returns all that it printed.
pub fn outcome(command: &mut Command) -> (Output, String) {
    let limit = Duration::from_secs(600 * at_length(6));
    let output =
        limits::output(limit, command).unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text = support::text(&output.stdout) + &support::text(&output.stderr);
    (output, text)
}

/// Runs a program that must succeed, and returns all that it printed.
pub fn said(command: &mut Command) -> String {
    let (output, text) = outcome(command);
    assert!(output.status.success(), "{command:?}: {}\n{text}", output.status);
    text
}
