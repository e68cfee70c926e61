//! A private mount namespace with an empty root (mount_namespaces(7), pivot_root(2)).

use super::{cgroup, tmpfs};
use crate::error::{Error, Result};
use rustix::fs::{CWD, Mode};
use rustix::io::Errno;
use rustix::mount::{
    MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount_change, move_mount,
    open_tree, unmount,
};
use rustix::thread::UnshareFlags;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

/// Leaves all mounts of the machine, so that the daemon keeps none of them busy. Only `/proc`,
/// `/sys` and the hierarchies of memory cgroups stay.
///
/// Afterwards `/` is an empty tmpfs that only this process and its children can see. It contains
/// the directories in `directories`. The old tree is out of reach, so the caller must open the
/// files that it needs before the call.
///
/// # Errors
/// A sentence that names the system call. The process cannot leave a root that is no mount point,
/// nor the initramfs.
pub fn enter_private_root(directories: &[&str]) -> Result<()> {
    // SAFETY: a new mount namespace affects neither descriptors nor memory of this single-threaded
    // process.
    #[allow(unsafe_code)]
    let unshared = unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) };
    unshared.map_err(|errno| refused("unshare(2)", errno))?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(|errno| cannot_be_left("mount(2) of MS_PRIVATE", errno))?;
    let root = tmpfs::create(&tmpfs::Options { blocks: Some(16), ..Default::default() }).map_err(
        |error| Error::invalid(format!("making a tmpfs (fsopen(2), fsmount(2)): {error}")),
    )?;
    for name in directories {
        rustix::fs::mkdirat(&root, *name, Mode::from_raw_mode(0o700))?;
    }
    let mut kept = Vec::new();
    for name in ["proc", "sys"] {
        kept.push((name.to_owned(), clone_tree(Path::new("/").join(name))?));
    }
    for (number, mount_point) in cgroup::mount_points().into_iter().enumerate() {
        match clone_tree(&mount_point) {
            Ok(tree) => kept.push((format!("cgroup{number}"), tree)),
            Err(error) => log::warn!("limits in {} cannot be seen: {error}", mount_point.display()),
        }
    }
    // The new root must be attached somewhere, because before Linux 6.15 the kernel mounts nothing
    // below a root that is not attached. Any directory will do. This one exists: the code above has
    // just cloned its tree.
    tmpfs::attach(root.as_fd(), "/proc")
        .map_err(|error| Error::invalid(format!("move_mount(2): {error}")))?;
    for (name, tree) in kept {
        rustix::fs::mkdirat(&root, &name, Mode::from_raw_mode(0o755))?;
        move_mount(&tree, "", &root, &name, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    }
    rustix::process::fchdir(&root)?;
    rustix::process::pivot_root(".", ".")
        .map_err(|errno| cannot_be_left("pivot_root(2)", errno))?;
    unmount(".", UnmountFlags::DETACH)?;
    Ok(rustix::process::chdir("/")?)
}

fn clone_tree(path: impl AsRef<Path>) -> Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let path = path.as_ref();
    open_tree(CWD, path, flags)
        .map_err(|errno| refused(&format!("open_tree(2) of {}", path.display()), errno))
}

fn refused(call: &str, errno: Errno) -> Error {
    Error::invalid(format!("{call}: {errno}"))
}

/// When a process leaves its root directory, EINVAL has one cause: see pivot_root(2), "ERRORS" and
/// "NOTES".
fn cannot_be_left(call: &str, errno: Errno) -> Error {
    match errno {
        Errno::INVAL => Error::invalid(format!(
            "{call}: this root directory cannot be left: it is the initramfs, or a directory of chroot(1) that is no \
             mount point. switch_root(8) to another root first, or bind-mount the directory on itself"
        )),
        other => refused(call, other),
    }
}
