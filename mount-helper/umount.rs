//! umount.fuse.hugetlb2: unmounts, and returns when the memory is free.
//!
//! umount(8) calls it only where it looks the mount up in mountinfo (`umount -c`, `-l`, `-f`). For a plain `umount DIR`
//! util-linux 2.38 makes do with statfs(2), sees `fuse`, looks for umount.fuse and else unmounts by itself: the memory
//! is free some milliseconds after that has returned.

use crate::namespace::Namespaces;
use crate::session::Failure;
use crate::{attributes, say};
use clap::{Arg, ArgAction, ArgMatches, Command};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// How long the daemon is waited for. It ends at once, unless the filesystem is mounted in other places too.
const PATIENCE: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

const USAGE_STATUS: u8 = 1;

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
        .arg(
            Arg::new("namespace").short('N').help("unmount in this mount namespace: a process id, or a path"),
        )
        .arg(Arg::new("type").short('t').help("accepted; there is one type"))
}

/// Runs as umount.fuse.hugetlb2.
pub fn main(arguments: Vec<OsString>) -> ExitCode {
    match command().try_get_matches_from(arguments) {
        Ok(matches) => run(&matches),
        Err(error) => {
            let _ = error.print();
            if error.use_stderr() { ExitCode::from(USAGE_STATUS) } else { ExitCode::SUCCESS }
        }
    }
}

fn run(matches: &ArgMatches) -> ExitCode {
    match carry_out(matches) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            say(format_args!("umount.fuse.hugetlb2: {failure}"));
            ExitCode::from(failure.status())
        }
    }
}

fn carry_out(matches: &ArgMatches) -> Result<(), Failure> {
    let directory: &PathBuf = matches.get_one("dir").expect("clap has required it");
    let (lazy, force) = (matches.get_flag("lazy"), matches.get_flag("force"));
    let mut flags = UnmountFlags::empty();
    flags.set(UnmountFlags::DETACH, lazy);
    flags.set(UnmountFlags::FORCE, force);
    Namespaces::open(matches.get_one::<String>("namespace"))?.enter_target()?;
    let daemon = if lazy || force { None } else { daemon_of(directory) };
    unmount(directory, flags).map_err(|errno| Failure::Mount(format!("{}: {errno}", directory.display())))?;
    if let Some(daemon) = daemon {
        let _ = poll(&mut [PollFd::new(&daemon, PollFlags::IN)], Some(&PATIENCE));
    }
    Ok(())
}

fn daemon_of(directory: &Path) -> Option<OwnedFd> {
    let pid = attributes::pool(directory).ok()?.get("daemon_pid")?;
    pidfd_open(Pid::from_raw(i32::try_from(pid).ok()?)?, PidfdFlags::empty()).ok()
}
