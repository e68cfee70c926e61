//! The processes that serve a mount, found without asking the mount, which may not answer.

use hugetlb2fs::sys::process::descriptor_of;
use hugetlb2fs::upgrade::{self, connection_in};
use rustix::fs::{AtFlags, CWD, StatxFlags, statx};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;

/// A process that has the device of a mount open.
pub struct Process {
    /// Its process id.
    pub pid: u32,
    /// Its state in a word (proc(5), /proc/PID/stat).
    pub state: &'static str,
}

/// The processes that serve the mount with the device number 0:`minor`: the supervisor, then its
/// worker. They are recognised by /proc/PID/fdinfo (`fuse_connection`, Linux 6.5). Their numbers
/// are those that they have here: in another process id namespace they have others. A user who may
/// not look at the processes sees none.
pub fn of(minor: u32) -> Vec<Process> {
    let entries = fs::read_dir("/proc").into_iter().flatten().filter_map(Result::ok);
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let pids: Vec<u32> = pids.filter(|pid| serves(*pid, minor)).collect();
    let mut found: Vec<Process> =
        pids.iter().map(|pid| Process { pid: *pid, state: state(*pid) }).collect();
    found
        .sort_by_key(|one| (parent(one.pid).is_some_and(|parent| pids.contains(&parent)), one.pid));
    found
}

/// The supervisor of a mount, held so that its number cannot become another's.
pub struct Supervisor {
    /// Its process id here.
    pub pid: u32,
    /// The connection that it serves: the minor device number of the mount.
    pub connection: u32,
    /// Its pidfd.
    pub process: OwnedFd,
}

/// The supervisor of the pool that `directory` is in, without asking the pool.
///
/// # Errors
/// A sentence, where none is seen.
pub fn supervisor_of(directory: &Path) -> Result<Supervisor, String> {
    const UNSEEN: &str = "its daemon is not seen from here: it has ended, or is in another process id namespace, or you are not root";
    let connection = connection_of(directory).map_err(|errno| errno.to_string())?;
    let pid = of(connection).first().map(|supervisor| supervisor.pid).ok_or(UNSEEN)?;
    let number = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(UNSEEN)?;
    let process = pidfd_open(number, PidfdFlags::empty()).map_err(|_| UNSEEN)?;
    // Had it ended before it was opened, the number could be another's.
    serves(pid, connection)
        .then_some(Supervisor { pid, connection, process })
        .ok_or_else(|| UNSEEN.to_owned())
}

/// The minor device number of the filesystem that a path leads to. The kernel knows it without
/// asking the daemon.
pub fn connection_of(directory: &Path) -> Result<u32, Errno> {
    Ok(statx(CWD, directory, AtFlags::STATX_DONT_SYNC, StatxFlags::empty())?.stx_dev_minor)
}

fn serves(pid: u32, minor: u32) -> bool {
    let descriptors =
        fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().filter_map(Result::ok);
    let devices = descriptors
        .filter(|fd| fs::read_link(fd.path()).is_ok_and(|target| target == Path::new("/dev/fuse")));
    let mut numbers = devices.filter_map(|fd| fd.file_name().to_str()?.parse().ok());
    numbers.any(|number: u32| {
        fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}"))
            .is_ok_and(|text| connection_in(&text) == Some(minor) && !is_over(pid, number))
    })
}

/// True if the filesystem of a device is unmounted: the kernel gives the number of the connection
/// to the next mount then, and the daemon may take a while to end. False if the device cannot be
/// looked at.
fn is_over(pid: u32, number: u32) -> bool {
    let device = || {
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(Errno::SRCH)?;
        descriptor_of(pidfd_open(pid, PidfdFlags::empty())?, number)
    };
    device().is_ok_and(|device| upgrade::is_over(&device))
}

/// The fields of /proc/PID/stat behind the name: state, parent, and so on. The name is in brackets
/// and may hold anything.
fn fields(pid: u32) -> Option<Vec<String>> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    Some(stat.rsplit_once(") ")?.1.split(' ').map(str::to_owned).collect())
}

fn parent(pid: u32) -> Option<u32> {
    fields(pid)?.get(1)?.parse().ok()
}

fn state(pid: u32) -> &'static str {
    let fields = fields(pid).unwrap_or_default();
    match fields.first().and_then(|field| field.chars().next()) {
        Some('T' | 't') => "stopped",
        Some('D') => "waiting for the kernel",
        Some('Z' | 'X') => "dead",
        Some('R') => "running",
        Some(_) => "waiting",
        None => "gone",
    }
}

/// True if a process has the daemon's name. A user who may not look at its descriptors sees no more
/// than that.
pub fn is_called_daemon(pid: u64) -> bool {
    fs::read_to_string(format!("/proc/{pid}/comm"))
        .is_ok_and(|name| name.trim_end() == "hugetlb2fsd")
}
