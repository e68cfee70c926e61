//! Other people's tests and programs, unmodified, on a mount of ours; where that tells something, on tmpfs beside it. Each prints
//! what they said in the end.
//!
//! Debian's packages and those of crates.io are installed by `tests/run`, which runs all this in a short form.
//! `HUGETLB2_LONG=1 cargo test --test programs` takes some ten minutes and runs it at length.

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

/// A test: its name, and what panics where it does not hold.
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

/// How much of it is wanted: once or `times`.
pub fn at_length(times: u64) -> u64 {
    if std::env::var_os("HUGETLB2_LONG").is_some() { times } else { 1 }
}

/// A program of crates.io, where `tests/run` installs it.
pub fn installed(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/programs/bin").join(name);
    assert!(path.is_file(), "{} is not there: tests/run installs it", path.display());
    path
}

/// A tmpfs, to compare with.
pub struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    /// One that holds so much.
    pub fn mount(megabytes: u64) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let options = CString::new(format!("size={megabytes}M")).expect("no NUL");
        mount("none", directory.path(), "tmpfs", MountFlags::empty(), Some(options.as_c_str()))
            .expect("mount(2)");
        Self(directory)
    }

    /// Where it is mounted.
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
    let output = limits::output(limit, command).unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text = support::text(&output.stdout) + &support::text(&output.stderr);
    (output, text)
}

/// The same, where it must end well.
pub fn said(command: &mut Command) -> String {
    let (output, text) = outcome(command);
    assert!(output.status.success(), "{command:?}: {}\n{text}", output.status);
    text
}
