//! Who serves a mount, found without asking the mount: it may not answer.

use std::fs;
use std::path::Path;

/// A process that has the device of a mount open.
pub struct Process {
    /// Its process id.
    pub pid: u32,
    /// Its state in a word (proc(5), /proc/PID/stat).
    pub state: &'static str,
}

/// The processes that serve the mount whose files have the device number 0:`minor`: the supervisor, then its worker.
/// They are known by /proc/PID/fdinfo (`fuse_connection`, Linux 6.5).
pub fn of(minor: u32) -> Vec<Process> {
    let entries = fs::read_dir("/proc").into_iter().flatten().filter_map(Result::ok);
    let mut pids: Vec<u32> = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    pids.sort_unstable();
    pids.into_iter().filter(|pid| serves(*pid, minor)).map(|pid| Process { pid, state: state(pid) }).collect()
}

fn serves(pid: u32, minor: u32) -> bool {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().filter_map(Result::ok);
    let devices = descriptors
        .filter(|fd| fs::read_link(fd.path()).is_ok_and(|target| target == Path::new("/dev/fuse")));
    let mut connections = devices.filter_map(|fd| {
        let number = fd.file_name().to_str()?.to_owned();
        let text = fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}")).ok()?;
        text.lines().find_map(|line| line.strip_prefix("fuse_connection:")?.trim().parse::<u32>().ok())
    });
    connections.any(|connection| connection == minor)
}

fn state(pid: u32) -> &'static str {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name before the state is in brackets, and may hold anything.
    match stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next()) {
        Some('T' | 't') => "stopped",
        Some('D') => "waiting for the kernel",
        Some('Z' | 'X') => "dead",
        Some('R') => "running",
        Some(_) => "waiting",
        None => "gone",
    }
}
