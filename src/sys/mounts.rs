//! The mounts of this process's namespace, and the limit of their number (mount_namespaces(7),
//! proc(5)).

use crate::error::{Error, Result};
use std::io::ErrorKind;

/// The number of mounts: those that this process can reach, and the kernel's first root below them
/// (rootfs). Each namespace has that root, and no list shows it.
///
/// # Errors
/// The errors of reading /proc/self/mountinfo.
pub fn count() -> Result<u64> {
    let text = std::fs::read("/proc/self/mountinfo")?;
    Ok(1 + text.iter().filter(|byte| **byte == b'\n').count() as u64)
}

/// The limit of the number of mounts in one namespace (/proc/sys/fs/mount-max, Linux 4.9).
///
/// # Errors
/// [`Error::Corrupt`] if the file does not contain a number.
pub fn most() -> Result<u64> {
    const DEFAULT: u64 = 100_000; // fs/namespace.c, sysctl_mount_max
    match std::fs::read_to_string("/proc/sys/fs/mount-max") {
        Ok(text) => {
            let number = text.trim().parse();
            number.map_err(|_| Error::Corrupt(format!("/proc/sys/fs/mount-max: {:?}", text.trim())))
        }
        // A kernel without CONFIG_SYSCTL.
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(DEFAULT),
        Err(error) => Err(error.into()),
    }
}
