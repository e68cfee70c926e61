//! Taking a pool in use over from another daemon, of this version or an older one.
//!
//! ```text
//!   1. read    what the other leaves, by /proc/<pid>/root, with a lock there that one daemon can have; a version
//!              that is not known ends it here
//!   2. take    a copy of its descriptor of the device (pidfd_getfd(2)), and enter its mount namespace (setns(2))
//!   3. kill    the other supervisor; its worker is killed with it
//!   4. go on   as a supervisor whose worker has died
//! ```
//!
//! Up to step 3 the other daemon notices nothing. From there on everything goes as after any death:
//! the kernel keeps the requests, because the new daemon has the device open.

use crate::error::Error;
use crate::fs::{OBJECTS, refuse_too_few_descriptors};
use crate::fuse;
use crate::options::Options;
use crate::pool::RESERVES;
use crate::sealed;
use crate::session_record::SessionRecord;
use crate::sys::process;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use rustix::thread::{ThreadNameSpaceType, move_into_thread_name_spaces};
use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

/// Another daemon, which serves.
pub struct Predecessor {
    process: OwnedFd,
    /// Files that are going to be opened.
    files: u64,
    /// The options that the pool was mounted with.
    pub options: Options,
    /// /dev/fuse, as it has it open.
    pub device: OwnedFd,
    /// Locked until the worker of the new daemon serves. Without the lock, two daemons that take
    /// over at once would both go on, and a daemon that is taken over from before it serves would
    /// be reported as failed.
    only_one: File,
}

impl Predecessor {
    /// Looks at the supervisor with this process id, which serves `connection`, the minor device
    /// number of a mount. Changes nothing.
    ///
    /// # Errors
    /// A sentence: the process is no supervisor, another daemon takes over just now, or this
    /// version does not know what the supervisor would leave.
    pub fn find(pid: i32, connection: i32) -> Result<Self, String> {
        let refused = |why: &str| format!("process {pid} is not taken over from: {why}");
        let failed = |error: Error| refused(&reason(error));
        let process = Pid::from_raw(pid).ok_or_else(|| refused("no process has this number"))?;
        let process =
            pidfd_open(process, PidfdFlags::empty()).map_err(|errno| failed(errno.into()))?;
        if !is_roots(pid).map_err(failed)? {
            return Err(refused("it is another user's"));
        }
        if !is_of_our_pid_namespace(pid).map_err(failed)? {
            return Err(refused("it is in another process id namespace: start the upgrade there"));
        }
        let root = PathBuf::from(format!("/proc/{pid}/root"));
        let only_one = lock(&root).map_err(failed)?;
        let left = SessionRecord::read(&root).map_err(failed)?;
        fuse::would_agree(&left.handshake).map_err(|why| refused(&why))?;
        let files = check_versions(&root).map_err(failed)?;
        let device = device_of(pid, &process, connection).map_err(failed)?;
        if has_ended(&process) {
            return Err(refused("it has ended")); // all of this may be another's
        }
        Ok(Self { process, files, options: left.options, device, only_one })
    }

    /// Goes where its files are.
    ///
    /// # Errors
    /// The errors of setns(2). [`Error::Invalid`] if so many files cannot be open here.
    pub fn enter_namespace(&self) -> Result<(), Error> {
        refuse_too_few_descriptors(self.files)?;
        Ok(move_into_thread_name_spaces(self.process.as_fd(), ThreadNameSpaceType::MOUNT)?)
    }

    /// Ends it, and returns what is needed to go on.
    ///
    /// # Errors
    /// A sentence.
    pub fn succeed(self) -> Result<(Options, OwnedFd, File), String> {
        let failed = |errno: Errno| format!("ending the other daemon: {errno}");
        match pidfd_send_signal(&self.process, Signal::KILL) {
            Ok(()) => {}
            // ESRCH: it has gone, or another has taken over.
            Err(errno) => return Err(failed(errno)),
        }
        while let Err(errno) = poll(&mut [PollFd::new(&self.process, PollFlags::IN)], None) {
            if errno != Errno::INTR {
                return Err(failed(errno));
            }
        }
        Ok((self.options, self.device, self.only_one))
    }
}

/// The number of regular files. Fails if a sealed file has a version that this program does not
/// know.
fn check_versions(root: &Path) -> Result<u64, Error> {
    count_known(root, RESERVES)?;
    count_known(root, OBJECTS)
}

/// The number of sealed files in a directory. Fails if one has a version that this program does not
/// know.
fn count_known(root: &Path, directory: &str) -> Result<u64, Error> {
    let mut count = 0;
    for place in std::fs::read_dir(root.join(directory.trim_start_matches('/')))? {
        match sealed::check_version(&place?.path()) {
            // NOENT: one that goes or comes just now.
            Ok(()) | Err(Error::Os(Errno::NOENT)) => count += 1,
            Err(error) => return Err(error),
        }
    }
    Ok(count)
}

/// Process ids must mean the same in both daemons: a worker finds itself by its own number in the
/// /proc that the other daemon leaves.
fn is_of_our_pid_namespace(pid: i32) -> Result<bool, Error> {
    let namespace = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/pid"));
    Ok(namespace("self")? == namespace(&pid.to_string())?)
}

/// True if root runs the process, in our user namespace. The root directory of another user's
/// process holds what that user has prepared. The owner of /proc/PID proves nothing: it is root,
/// too, for a process that is not dumpable (prctl(2)).
fn is_roots(pid: i32) -> Result<bool, Error> {
    let namespace = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/user"));
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let users = status.lines().find_map(|line| line.strip_prefix("Uid:")).unwrap_or_default();
    let is_root = users.split_ascii_whitespace().eq(["0"; 4]);
    Ok(is_root && namespace("self")? == namespace(&pid.to_string())?)
}

/// The reason in words. Another version is no damage.
fn reason(error: Error) -> String {
    match error {
        Error::Corrupt(why) => why,
        other => other.to_string(),
    }
}

/// The lock is on the session record of the other daemon, so the upgrade creates no file.
fn lock(root: &Path) -> Result<File, Error> {
    let lock = match File::open(SessionRecord::path(root)) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return Err(Error::invalid(
                "it is no daemon of this filesystem, or has not come to serve yet",
            ));
        }
        opened => opened?,
    };
    match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(lock),
        Err(Errno::WOULDBLOCK) => {
            Err(Error::Busy("another daemon is taking over from it just now"))
        }
        Err(errno) => Err(errno.into()),
    }
}

fn has_ended(process: &OwnedFd) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&now)) != Ok(0)
}

/// True if the filesystem of a device (/dev/fuse) is unmounted, which poll(2) tells by POLLERR.
pub fn is_over(device: &OwnedFd) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut look = [PollFd::new(device, PollFlags::empty())];
    poll(&mut look, Some(&now)).is_ok() && look[0].revents().contains(PollFlags::ERR)
}

/// The connection that a text of /proc/PID/fdinfo names (Linux 6.5).
pub fn connection_in(text: &str) -> Option<u32> {
    text.lines().find_map(|line| line.strip_prefix("fuse_connection:")?.trim().parse().ok())
}

/// Its descriptor of the device, if that is the one of `connection` (/proc/PID/fdinfo, Linux 6.5)
/// and the filesystem is mounted. (The kernel gives the number of a connection that is over to
/// another one.)
fn device_of(pid: i32, process: &OwnedFd, connection: i32) -> Result<OwnedFd, Error> {
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        let entry = entry?;
        let number = entry.file_name().to_str().and_then(|name| name.parse().ok());
        if let Some(number) = number
            && std::fs::read_link(entry.path()).is_ok_and(|target| target == Path::new("/dev/fuse"))
        {
            let device = process::descriptor_of(process, number)?;
            let about =
                std::fs::read_to_string(format!("/proc/self/fdinfo/{}", device.as_raw_fd()))?;
            if connection_in(&about) == u32::try_from(connection).ok() && !is_over(&device) {
                return Ok(device);
            }
        }
    }
    Err(Error::invalid("it does not serve this pool"))
}
