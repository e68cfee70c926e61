//! Mounted pools, as the kernel lists them, and the mount point that root's commands act on.
//!
//! The owner of a directory above a mount point can put something else in the place of its path at
//! any time, also between a look at the mount and the act on it. So umount and remount go to the
//! directory (fchdir(2)), and look and act there.

use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxFlags, major, minor, openat, readlinkat, statx};
use rustix::io::Errno;
use rustix::process::fchdir;
use std::ffi::OsString;
use std::fs::Metadata;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// A mounted pool.
pub struct Mounted {
    /// The kernel's number for the mount.
    id: u64,
    /// `st_dev` of its files, as mountinfo writes it.
    pub device: String,
    /// The path of its root.
    pub mount_point: PathBuf,
}

impl Mounted {
    /// Reads a line of mountinfo (proc(5)). `None` if it is no pool. `user_id=0` shows that root
    /// has mounted it: a user who may mount FUSE filesystems (fusermount3(1)) can choose the name
    /// of the type, but not that number.
    fn parse(line: &str) -> Option<Self> {
        let (mount, filesystem) = line.split_once(" - ")?;
        let options = filesystem.strip_prefix("fuse.hugetlb2 ")?.rsplit(' ').next()?;
        options.split(',').find(|option| *option == "user_id=0")?;
        let mut fields = mount.split(' ');
        let id = fields.next()?.parse().ok()?;
        let device = fields.nth(1)?.to_owned();
        Some(Self { id, device, mount_point: unescape(fields.nth(1)?) })
    }
}

/// mountinfo writes space, tab, newline and backslash as three octal digits.
fn unescape(text: &str) -> PathBuf {
    let octal = [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")];
    PathBuf::from(
        octal.iter().fold(text.to_owned(), |text, (code, plain)| text.replace(code, plain)),
    )
}

/// All pools of this process's mount namespace.
///
/// # Errors
/// A sentence, where /proc is not mounted.
pub fn all() -> Result<Vec<Mounted>, String> {
    let text =
        std::fs::read("/proc/self/mountinfo").map_err(|error| format!("mountinfo: {error}"))?;
    Ok(String::from_utf8_lossy(&text).lines().filter_map(Mounted::parse).collect())
}

/// Succeeds where a pool is mounted on `directory` itself; the pool is not asked.
///
/// # Errors
/// A sentence.
pub fn require_pool(directory: &Path) -> Result<(), String> {
    let found = statx(CWD, directory, AtFlags::STATX_DONT_SYNC, StatxFlags::MNT_ID);
    let id = found.map_err(|errno| errno.to_string())?.stx_mnt_id;
    let is_there = all()?.iter().any(|pool| pool.id == id);
    if is_there { Ok(()) } else { Err("no hugetlb2 pool is mounted there".to_owned()) }
}

/// True if `path` is in a pool.
pub fn is_in_pool(path: &Path) -> bool {
    of_pool(path, |_| true, "entry").is_ok()
}

/// The metadata of a file or directory in a pool, if it is of the kind that `is_right` accepts.
/// Another one is refused: an ordinary filesystem would store the attributes as some text of the
/// user's, and do nothing.
///
/// # Errors
/// A sentence.
pub fn of_pool(
    path: &Path,
    is_right: impl Fn(&Metadata) -> bool,
    kind: &str,
) -> Result<Metadata, String> {
    let metadata =
        std::fs::metadata(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let device = format!("{}:{}", major(metadata.dev()), minor(metadata.dev()));
    if is_right(&metadata) && all()?.iter().any(|pool| pool.device == device) {
        return Ok(metadata);
    }
    Err(format!("{}: not a {kind} of a hugetlb2 pool", path.display()))
}

/// The metadata of a regular file in a pool.
///
/// # Errors
/// A sentence.
pub fn pool_file(file: &Path) -> Result<Metadata, String> {
    of_pool(file, Metadata::is_file, "regular file")
}

/// Goes to a mounted pool, and returns the path by which it is found from now on.
///
/// # Errors
/// The errors of openat(2).
pub fn enter(directory: &Path) -> Result<&'static Path, Errno> {
    go_to(directory)?;
    Ok(Path::new("."))
}

/// Goes to the directory that holds the name of a mount point, and returns the name. The mount
/// itself must not be open, or it could not be unmounted. As long as it is mounted, the kernel
/// keeps the name in its place (rename(2), EBUSY).
///
/// # Errors
/// The errors of openat(2). EINVAL for a path that ends in no name.
pub fn enter_parent(directory: &Path) -> Result<PathBuf, Errno> {
    const MOST_LINKS: usize = 40; // as for the kernel (path_resolution(7))
    let mut path = directory.to_owned();
    for _ in 0..MOST_LINKS {
        let name = PathBuf::from(path.file_name().ok_or(Errno::INVAL)?);
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        go_to(parent.unwrap_or(Path::new(".")))?;
        match readlinkat(CWD, &name, Vec::new()) {
            Ok(target) => path = OsString::from_vec(target.into_bytes()).into(),
            Err(Errno::INVAL) => return Ok(name), // no symbolic link
            Err(errno) => return Err(errno),
        }
    }
    Err(Errno::LOOP)
}

fn go_to(directory: &Path) -> Result<(), Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    fchdir(openat(CWD, directory, flags, Mode::empty())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_root_has_mounted_is_a_pool() {
        let line = |kind: &str, user: u32| {
            format!(
                "36 35 0:58 / /mnt/a\\040b rw,nosuid - {kind} pool0 rw,user_id={user},group_id=0"
            )
        };
        let pool = Mounted::parse(&line("fuse.hugetlb2", 0)).unwrap();
        assert_eq!((pool.id, pool.device.as_str()), (36, "0:58"));
        assert_eq!(pool.mount_point, Path::new("/mnt/a b"));
        assert!(Mounted::parse(&line("fuse.hugetlb2", 1000)).is_none());
        assert!(Mounted::parse(&line("fuse.sshfs", 0)).is_none());
    }
}
