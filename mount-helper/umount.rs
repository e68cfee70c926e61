//! umount.fuse.hugetlb2: unmounts, and returns when the memory is free.
//!
//! umount(8) calls this program only if it looks the mount up in mountinfo (`umount -c`, `-l`,
//! `-f`). For a plain `umount DIR`, util-linux 2.38 asks statfs(2), sees `fuse`, looks for
//! umount.fuse, and otherwise unmounts by itself. Then the memory is free some milliseconds after
//! umount(8) has returned.

use crate::namespace::Namespaces;
use crate::protocol::{self, Failure};
use crate::{attributes, daemons, mounts};
use clap::{Arg, ArgAction, ArgMatches, Command};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

/// The time after which a daemon is said not to answer.
const ANSWER: Duration = Duration::from_secs(2);

/// The longest wait for the end of the daemon. It ends at once, unless the filesystem is mounted in
/// other places, too.
const PATIENCE: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// The command line.
pub fn command() -> Command {
    let flag = |name: &'static str, short: char, help: &'static str| {
        Arg::new(name).short(short).action(ArgAction::SetTrue).help(help)
    };
    Command::new("umount.fuse.hugetlb2")
        .version(clap::crate_version!())
        .about("Unmounts a pool and returns when its memory is free again.")
        .arg(Arg::new("dir").required(true).value_parser(clap::value_parser!(PathBuf)))
        .arg(flag("no-mtab", 'n', "accepted; there is no mtab to write to"))
        .arg(flag("lazy", 'l', "detach it now; it ends with its last user"))
        .arg(flag("force", 'f', "end it though it is in use, if its daemon does not answer"))
        .arg(flag("verbose", 'v', "accepted"))
        .arg(flag("read-only", 'r', "accepted; there is nothing to write back"))
        .arg(
            Arg::new("namespace")
                .short('N')
                .help("unmount in this mount namespace: a process id, or a path"),
        )
        .arg(Arg::new("type").short('t').help("accepted; there is one type"))
}

/// Runs as umount.fuse.hugetlb2.
pub fn main(arguments: Vec<OsString>) -> ExitCode {
    protocol::run(command(), arguments, carry_out)
}

fn carry_out(matches: &ArgMatches) -> Result<(), Failure> {
    let directory: &PathBuf = matches.get_one("dir").expect("clap has required it");
    let (lazy, force) = (matches.get_flag("lazy"), matches.get_flag("force"));
    Namespaces::open(matches.get_one::<String>("namespace"))?.enter_target()?;
    let failed = |why: String| Failure::Mount(format!("{}: {why}", directory.display()));
    let name = mounts::enter_parent(directory).map_err(|errno| failed(errno.to_string()))?;
    mounts::require_pool(&name).map_err(failed)?;
    let daemon = if lazy { None } else { daemons::supervisor_of(&name).ok() };
    let flags = if lazy { UnmountFlags::DETACH } else { UnmountFlags::empty() };
    match unmount(&name, flags | UnmountFlags::NOFOLLOW) {
        Err(Errno::BUSY) if force => end_connection(&name).map_err(failed)?,
        other => other.map_err(|errno| failed(errno.to_string()))?,
    }
    if let Some(daemon) = daemon {
        let _ = poll(&mut [PollFd::new(&daemon.process, PollFlags::IN)], Some(&PATIENCE));
    }
    Ok(())
}

/// Ends the connection, so that every call to the pool fails for good; only if the daemon does not
/// answer. MNT_FORCE ends it before the kernel looks for users (fs/fuse/inode.c,
/// fuse_umount_begin).
fn end_connection(mount_point: &Path) -> Result<(), String> {
    if matches!(attributes::pool_within(mount_point, ANSWER), Some(Ok(_))) {
        return Err(
            "it is in use, and its daemon answers: nothing is forced (see lsof(8), or detach it by -l)"
                .into(),
        );
    }
    unmount(mount_point, UnmountFlags::FORCE | UnmountFlags::NOFOLLOW).map_err(
        |errno| match errno {
            Errno::BUSY => {
                "its daemon did not answer, so all calls fail from now on; it is still in use"
                    .to_owned()
            }
            other => other.to_string(),
        },
    )
}
