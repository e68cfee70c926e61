//! umount.fuse.hugetlb2: what umount(8) calls, so that the memory is free when it returns.

use crate::attributes;
use clap::{Arg, ArgAction, Command};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// How long the daemon is waited for. It ends at once, unless the filesystem is mounted in other places too.
const PATIENCE: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

const FAILED: u8 = 32;

fn command() -> Command {
    let flag = |name: &'static str, short: char, help: &'static str| {
        Arg::new(name).short(short).action(ArgAction::SetTrue).help(help)
    };
    Command::new("umount.fuse.hugetlb2")
        .version(clap::crate_version!())
        .about("Unmounts a pool and returns when its memory is free again.")
        .arg(Arg::new("dir").required(true).value_parser(clap::value_parser!(PathBuf)))
        .arg(flag("no-mtab", 'n', "accepted; there is no mtab to write to"))
        .arg(flag("lazy", 'l', "detach it now; it ends with its last user"))
        .arg(flag("force", 'f', "abort what is under way"))
        .arg(flag("verbose", 'v', "accepted"))
        .arg(flag("read-only", 'r', "accepted; there is nothing to write back"))
        .arg(Arg::new("namespace").short('N').help("accepted; umount(8) has entered it"))
        .arg(Arg::new("type").short('t').help("accepted; there is one type"))
}

/// Runs as umount.fuse.hugetlb2.
pub fn main(arguments: Vec<OsString>) -> ExitCode {
    let matches = command().get_matches_from(arguments);
    let directory: &PathBuf = matches.get_one("dir").expect("clap has required it");
    let (lazy, force) = (matches.get_flag("lazy"), matches.get_flag("force"));
    let mut flags = UnmountFlags::empty();
    flags.set(UnmountFlags::DETACH, lazy);
    flags.set(UnmountFlags::FORCE, force);
    let daemon = if lazy || force { None } else { daemon_of(directory) };
    if let Err(errno) = unmount(directory, flags) {
        eprintln!("umount.fuse.hugetlb2: {}: {errno}", directory.display());
        return ExitCode::from(FAILED);
    }
    if let Some(daemon) = daemon {
        let _ = poll(&mut [PollFd::new(&daemon, PollFlags::IN)], Some(&PATIENCE));
    }
    ExitCode::SUCCESS
}

fn daemon_of(directory: &Path) -> Option<OwnedFd> {
    let pid = attributes::pool(directory).ok()?.get("daemon_pid")?;
    pidfd_open(Pid::from_raw(i32::try_from(pid).ok()?)?, PidfdFlags::empty()).ok()
}
