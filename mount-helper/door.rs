//! Runs a program with a descriptor of a file's memory.

use crate::{attributes, mounts};
use hugetlb2fs::sys::passing::{bequeath, receive};
use rustix::fs::{Mode, OFlags};
use std::convert::Infallible;
use std::ffi::OsString;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

/// Executes `command` in place of this program, with a descriptor of the memory of `file` as number
/// `number`. Returns only if that fails.
///
/// # Errors
/// A sentence for the user.
pub fn open(file: &Path, number: RawFd, command: &[OsString]) -> Result<Infallible, String> {
    mounts::pool_file(file)?;
    let (program, arguments) = command.split_first().expect("clap demands a command");
    let (own, daemons) = UnixStream::pair().map_err(|error| format!("socketpair(2): {error}"))?;
    attributes::write(file, attributes::OPEN, &daemons.as_raw_fd().to_string())
        .map_err(|errno| attributes::describe(file, errno))?;
    let memory = receive(&own).map_err(|error| format!("{}: {error}", file.display()))?;
    let memory = memory.ok_or_else(|| format!("{}: no descriptor has come", file.display()))?;
    drop((own, daemons));
    bequeath(memory, number).map_err(|error| format!("descriptor {number}: {error}"))?;
    // The program keeps the file in use, so that the pool is not unmounted meanwhile.
    let file = rustix::fs::open(file, OFlags::PATH, Mode::empty())
        .map_err(|errno| format!("{}: {errno}", file.display()))?;
    std::mem::forget(file);
    let error = Command::new(program).args(arguments).exec();
    Err(format!("{}: {error}", program.display()))
}
