//! Taking a pool in use over from another daemon, of this version or an older one.
//!
//! ```text
//!   1. read    what the other leaves, by /proc/<pid>/root; a version that is not known ends it here
//!   2. take    a copy of its descriptor of the device (pidfd_getfd(2)), and enter its mount namespace (setns(2))
//!   3. kill    the other supervisor; its worker is killed with it
//!   4. go on   as a supervisor whose worker has died
//! ```
//!
//! Up to step 3 the other notices nothing. From there on it is what happens after any death: the kernel keeps the requests, and
//! has the device open in us.

use crate::error::Error;
use crate::fs::{OBJECTS, refuse_too_few_descriptors};
use crate::fuse;
use crate::handover::Handover;
use crate::options::Options;
use crate::sealed;
use crate::sys::process;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use rustix::thread::{ThreadNameSpaceType, move_into_thread_name_spaces};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

/// Another daemon, which serves.
pub struct Predecessor {
    process: OwnedFd,
    /// Files that are going to be opened.
    files: u64,
    /// What the pool was mounted with.
    pub options: Options,
    /// /dev/fuse, as it has it open.
    pub device: OwnedFd,
}

impl Predecessor {
    /// Looks at the supervisor with this process id, and changes nothing.
    ///
    /// # Errors
    /// A sentence: it is none, or this version does not know what it would leave.
    pub fn find(pid: i32) -> Result<Self, String> {
        let none = |why: String| format!("process {pid} is no daemon that could be taken over from: {why}");
        let process = Pid::from_raw(pid).ok_or_else(|| none("no process id".into()))?;
        let process = pidfd_open(process, PidfdFlags::empty()).map_err(|errno| none(errno.to_string()))?;
        let root = PathBuf::from(format!("/proc/{pid}/root"));
        let left = Handover::read(&root).map_err(|error| none(error.to_string()))?;
        fuse::would_agree(&left.handshake)?;
        let files = check_objects(&root).map_err(|error| none(error.to_string()))?;
        let device = device_of(pid, &process).map_err(|error| none(error.to_string()))?;
        Ok(Self { process, files, options: left.options, device })
    }

    /// Goes where its files are.
    ///
    /// # Errors
    /// What setns(2) answers; [`Error::Invalid`] where so many files cannot be open here.
    pub fn enter_namespace(&self) -> Result<(), Error> {
        refuse_too_few_descriptors(self.files)?;
        Ok(move_into_thread_name_spaces(self.process.as_fd(), ThreadNameSpaceType::MOUNT)?)
    }

    /// Ends it, and returns what is needed to go on.
    ///
    /// # Errors
    /// A sentence.
    pub fn succeed(self) -> Result<(Options, OwnedFd), String> {
        let failed = |errno: Errno| format!("ending the other daemon: {errno}");
        match pidfd_send_signal(&self.process, Signal::KILL) {
            Ok(()) => {}
            Err(errno) => return Err(failed(errno)), // ESRCH: it has gone, or another has taken over
        }
        while let Err(errno) = poll(&mut [PollFd::new(&self.process, PollFlags::IN)], None) {
            if errno != Errno::INTR {
                return Err(failed(errno));
            }
        }
        Ok((self.options, self.device))
    }
}

/// Whether every object is of a version that is known here; how many there are.
fn check_objects(root: &Path) -> Result<u64, Error> {
    let mut count = 0;
    for object in std::fs::read_dir(root.join(OBJECTS.trim_start_matches('/')))? {
        match sealed::check_version(&object?.path()) {
            Ok(()) | Err(Error::Os(Errno::NOENT)) => count += 1, // NOENT: one that goes or comes just now
            Err(error) => return Err(error),
        }
    }
    Ok(count)
}

fn device_of(pid: i32, process: &OwnedFd) -> Result<OwnedFd, Error> {
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        let entry = entry?;
        let number = entry.file_name().to_str().and_then(|name| name.parse().ok());
        if let Some(number) = number
            && std::fs::read_link(entry.path()).is_ok_and(|target| target == Path::new("/dev/fuse"))
        {
            return process::descriptor_of(process, number);
        }
    }
    Err(Error::NoData)
}
