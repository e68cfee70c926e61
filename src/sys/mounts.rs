//! Mounts of this process's namespace, and how many there may be (mount_namespaces(7), proc(5)).

use crate::error::{Error, Result};
use std::io::ErrorKind;

/// How many there are: those that this process can reach, and the kernel's first root below them (rootfs), which each namespace
/// has and no list shows.
///
/// # Errors
/// What reading /proc/self/mountinfo answers.
pub fn count() -> Result<u64> {
    let text = std::fs::read("/proc/self/mountinfo")?;
    Ok(1 + text.iter().filter(|byte| **byte == b'\n').count() as u64)
}

/// How many there may be in one namespace (/proc/sys/fs/mount-max, Linux 4.9).
///
/// # Errors
/// [`Error::Corrupt`] where that is no number.
pub fn most() -> Result<u64> {
    const DEFAULT: u64 = 100_000; // fs/namespace.c, sysctl_mount_max
    match std::fs::read_to_string("/proc/sys/fs/mount-max") {
        Ok(text) => {
            let number = text.trim().parse();
            number.map_err(|_| Error::Corrupt(format!("/proc/sys/fs/mount-max: {:?}", text.trim())))
        }
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(DEFAULT), // a kernel without CONFIG_SYSCTL
        Err(error) => Err(error.into()),
    }
}
