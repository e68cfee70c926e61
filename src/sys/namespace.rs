//! A mount namespace of our own with an empty root of our own (mount_namespaces(7), pivot_root(2)).

use super::{cgroup, tmpfs};
use crate::error::Result;
use rustix::fs::{CWD, Mode};
use rustix::mount::{
    MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount_change, move_mount, open_tree,
    unmount,
};
use rustix::thread::UnshareFlags;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

/// Leaves every mount of the machine behind, so that none is held busy by us, and keeps `/proc`, `/sys` and the hierarchies of
/// memory cgroups.
///
/// Afterwards `/` is an empty tmpfs that only this process and its children can see; the directories named
/// in `directories` exist in it. Nothing of the old tree can be reached any more: open what is needed first.
///
/// # Errors
/// EPERM without CAP_SYS_ADMIN; EINVAL where the old root is the initramfs itself, which cannot be left.
pub fn enter_private_root(directories: &[&str]) -> Result<()> {
    // SAFETY: a new mount namespace affects neither descriptors nor memory of this single-threaded process.
    #[allow(unsafe_code)]
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    let root = tmpfs::create(&tmpfs::Options { blocks: Some(16), ..Default::default() })?;
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
    // Any directory will do to attach the new root to, and this one exists: we have just cloned it. Before Linux 6.15
    // nothing can be mounted below a root that is not attached.
    tmpfs::attach(root.as_fd(), "/proc")?;
    for (name, tree) in kept {
        rustix::fs::mkdirat(&root, &name, Mode::from_raw_mode(0o755))?;
        move_mount(&tree, "", &root, &name, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    }
    rustix::process::fchdir(&root)?;
    rustix::process::pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    Ok(rustix::process::chdir("/")?)
}

fn clone_tree(path: impl AsRef<Path>) -> Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    Ok(open_tree(CWD, path.as_ref(), flags)?)
}
