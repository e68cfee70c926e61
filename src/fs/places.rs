//! The places of objects, and the number of places that can still be made. A place is a directory
//! `/objects/<node id>` in the daemon's mount namespace, where one object's superblock is mounted.
//!
//! **Why one mount for each object.** A superblock lives as long as something refers to it. The
//! kernel closes the descriptors of a worker when the worker dies. So a thing that outlives workers
//! must hold each superblock. Here the mount namespace holds it, by the mount. A new worker reads
//! the directory `/objects`, and an upgrade enters the namespace, so no process must hand
//! superblocks to another. The price is a bound: the kernel allows `fs.mount-max` mounts in a
//! namespace, 100,000 unless the administrator has raised the number. The alternatives are worse:
//!
//! - *The supervisor holds a descriptor of each superblock.* A mount that is not attached is in no
//!   namespace (5,000 such mounts added no line to /proc/self/mountinfo). So the bound would be the
//!   limit of descriptors, 2^20. But workers would have to send each descriptor to the supervisor,
//!   ask for all of them after a death, and say which descriptors to close. An upgrade would have
//!   to move the descriptors between two supervisors, 253 in a message (SCM_MAX_FD), while files
//!   come and go. The supervisor would keep a table, allocate memory and read messages. A fault in
//!   any of that would lose all files. Now the supervisor has no such part.
//! - *Several namespaces, or trees of mounts.* A thread can attach a mount only to a tree of its
//!   own namespace (move_mount(2)). So each creation and removal would have to enter another
//!   namespace (setns(2)), and a process with threads cannot do that for mount namespaces. A tree
//!   that is not attached cannot have mounts below it before Linux 6.15.
//! - *One superblock for several files.* These files would share free blocks, or the lack of them.
//!   But S1 is a rule for each single file ([`crate::sealed`]).
//!
//! An administrator raises the bound by one command, `sysctl fs.mount-max=1000000`, and little gets
//! slower. On a machine with a load of 20 (two processors, Linux 6.18), the daemon made a place in
//! 0.2 ms beside 2,000 mounts and in 0.4 ms beside 60,000. The next bounds are the 2^20 descriptors
//! that a process may have (fs.nr_open), and the machine's 2^20 anonymous device numbers. A file
//! takes one descriptor, and a superblock takes one device number. This module does not count the
//! device numbers, because no interface tells how many are left. Without one, the creation of a
//! file fails with ENOSPC, too.
//!
//! **Descriptors for existing files.** The daemon needs descriptors for a moment when it reads,
//! quarantines, repairs or removes a file, and a new worker opens all files. So new files never get
//! the last [`SPARE_DESCRIPTORS`]. A user who makes files until no more can be made does not stop
//! other users from using their files.

use super::OBJECTS;
use crate::error::{Error, Result};
use crate::pool::Holding;
use crate::steps::{self, Step, insist};
use crate::sys::process::{Descriptors, descriptors};
use crate::sys::{calls, mounts, tmpfs};
use crate::units::InodeId;
use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// The directory of the doors: mounts of the data of files that programs have open by themselves.
/// Such a mount cannot be taken away as long as a file is open that was opened through it. So the
/// kernel counts the programs, also while no worker is there.
const DOORS: &str = "/doors";

/// Descriptors that no new file gets: some for each request under way, and some for the start of a
/// worker.
const SPARE_DESCRIPTORS: u64 = 256;

/// Makes, removes and counts places.
pub struct Places {
    /// The number of mounts in the namespace. Only the daemon mounts there. A worker counts the
    /// mounts at its start, which takes about 5 us for each.
    mounts: AtomicU64,
    /// The log has the reason why no more files can be made.
    is_told: AtomicBool,
}

impl Places {
    /// Counts the mounts of the namespace.
    ///
    /// # Errors
    /// The errors of reading /proc/self/mountinfo.
    pub fn count() -> Result<Self> {
        Ok(Self { mounts: mounts::count()?.into(), is_told: AtomicBool::new(false) })
    }

    /// The number of places that can still be made.
    ///
    /// # Errors
    /// The errors of reading /proc.
    pub fn left(&self) -> Result<u64> {
        let mounts = mounts::most()?.saturating_sub(self.mounts.load(Ordering::Relaxed));
        Ok(mounts.min(descriptors_for_files(descriptors()?)))
    }

    /// Makes a new object for the file `node`, and its place.
    ///
    /// # Errors
    /// [`Error::TooManyFiles`] or [`Error::NoMemory`]. Nothing has changed then.
    pub fn make(&self, node: InodeId, create: impl FnOnce() -> Result<Holding>) -> Result<Holding> {
        self.refuse_the_last_descriptors()?;
        let mut holding = create().map_err(no_more)?;
        attach(node, &mut holding).map_err(no_more)?;
        self.mounts.fetch_add(1, Ordering::Relaxed);
        steps::reached(Step::CreateAttached);
        Ok(holding)
    }

    /// The object at the place of `from` gets the place of `to`.
    ///
    /// # Errors
    /// The errors of mkdir(2) and move_mount(2). Nothing has changed then.
    pub fn rename(&self, from: InodeId, to: InodeId) -> Result<()> {
        let (from, to) = (path(from), path(to));
        calls::mkdir(&*to, Mode::from_raw_mode(0o700))?;
        steps::reached(Step::CreatePlace);
        tmpfs::rename(text(&from), text(&to)).inspect_err(|_| {
            let _ = calls::rmdir(&*to);
        })?;
        steps::reached(Step::CreateAttached);
        if let Err(error) = insist(|| Ok(calls::rmdir(&*from)?)) {
            log::error!("the directory of a ready file stays: {error}");
        }
        Ok(())
    }

    fn refuse_the_last_descriptors(&self) -> Result<()> {
        let now = descriptors()?;
        if descriptors_for_files(now) > 0 {
            return Ok(());
        }
        if !self.is_told.swap(true, Ordering::Relaxed) {
            log::error!(
                "no more files can be made: {} of {} descriptors are open, and {SPARE_DESCRIPTORS} are kept for the files that \
                 are there. To have more, mount with a higher limit (ulimit -n, LimitNOFILE=)",
                now.open,
                now.most
            );
        }
        Err(Error::TooManyFiles)
    }

    /// Opens the data of the object at the place of `node` through its door, which is mounted if
    /// it is not there yet. `data` is the same file.
    ///
    /// # Errors
    /// The errors of open_tree(2), move_mount(2) and openat(2).
    pub fn open_by_door(&self, node: InodeId, data: &File) -> Result<OwnedFd> {
        let door = door(node);
        make_directory(DOORS)?;
        let stub = OFlags::WRONLY | OFlags::CREATE | OFlags::CLOEXEC;
        let is_meant = |file: &OwnedFd| {
            let (one, other) = (rustix::fs::fstat(file)?, rustix::fs::fstat(data)?);
            Ok::<_, Error>((one.st_dev, one.st_ino) == (other.st_dev, other.st_ino))
        };
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(0o600);
        if !is_meant(&calls::openat(CWD, &*door, stub, mode)?)? {
            tmpfs::bind(&format!("{}/data", text(&path(node))), text(&door)).map_err(no_more)?;
            self.mounts.fetch_add(1, Ordering::Relaxed);
            steps::reached(Step::DoorMounted);
        }
        let opened = calls::openat(CWD, &*door, flags, Mode::empty())?;
        assert!(is_meant(&opened)?, "the door leads to the file, and nothing is mounted over it");
        Ok(opened)
    }

    /// Takes the door of `node` away, unless a program has opened or mapped the file through it.
    /// True if there is no door any more.
    ///
    /// # Errors
    /// The errors of umount2(2).
    pub fn close_door(&self, node: InodeId) -> Result<bool> {
        let door = door(node);
        if !tmpfs::detach_unused(text(&door))? {
            return Ok(false);
        }
        steps::reached(Step::DoorUnmounted);
        // Without the stub there is no mount, so a second call does not count one again.
        match calls::unlinkat(CWD, &*door, AtFlags::empty()) {
            Ok(()) => drop(self.mounts.fetch_sub(1, Ordering::Relaxed)),
            Err(error) => log::debug!("file {node}: no stub of a door is removed: {error}"),
        }
        Ok(true)
    }

    /// Removes the place of `node`. The superblock ends with its last user. A shortage does not end
    /// this removal, because nothing would try it again.
    pub fn remove(&self, node: InodeId) {
        let path = path(node);
        match insist(|| tmpfs::detach(text(&path))) {
            Ok(()) => self.mounts.fetch_sub(1, Ordering::Relaxed),
            Err(error) => return log::error!("file {node}: its superblock stays mounted: {error}"),
        };
        if let Err(error) = insist(|| Ok(calls::rmdir(&*path)?)) {
            log::error!("file {node}: its directory stays: {error}");
        }
    }
}

fn descriptors_for_files(now: Descriptors) -> u64 {
    now.most.saturating_sub(SPARE_DESCRIPTORS).saturating_sub(now.open)
}

/// Refuses `files` files if the limit of this process leaves too few descriptors to open them.
///
/// # Errors
/// [`Error::Invalid`], with the number of files and the limit.
pub fn refuse_too_few_descriptors(files: u64) -> Result<()> {
    let most = descriptors()?.most;
    if files.saturating_add(SPARE_DESCRIPTORS) <= most {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "{files} files need a descriptor each, and {SPARE_DESCRIPTORS} more: this process may have {most} (ulimit -n)"
    )))
}

/// Attaches the object's superblock at its place, or changes nothing.
fn attach(node: InodeId, holding: &mut Holding) -> Result<()> {
    let path = path(node);
    calls::mkdir(&*path, Mode::from_raw_mode(0o700))?;
    steps::reached(Step::CreatePlace);
    holding.attach(text(&path)).inspect_err(|_| {
        let _ = calls::rmdir(&*path);
    })
}

/// Turns the kernel's errors for lack of descriptors, of anonymous device numbers (fs/super.c,
/// get_anon_bdev) and of mounts into [`Error::TooManyFiles`].
fn no_more(error: Error) -> Error {
    match error {
        Error::Os(Errno::MFILE | Errno::NFILE | Errno::NOSPC) => Error::TooManyFiles,
        other => other,
    }
}

/// Makes a directory, unless it is there.
fn make_directory(path: &str) -> Result<()> {
    match calls::mkdir(path, Mode::from_raw_mode(0o700)) {
        Err(Errno::EXIST) | Ok(()) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// The path of a file's door.
fn door(node: InodeId) -> CString {
    CString::new(format!("{DOORS}/{node}")).expect("hexadecimal digits hold no NUL")
}

fn path(node: InodeId) -> CString {
    CString::new(format!("{OBJECTS}/{node}")).expect("hexadecimal digits hold no NUL")
}

fn text(path: &CStr) -> &str {
    path.to_str().expect("hexadecimal digits are text")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_descriptors_are_not_for_files() {
        let left = |most, open| descriptors_for_files(Descriptors { most, open });
        assert_eq!(left(1000, 100), 1000 - 100 - SPARE_DESCRIPTORS);
        assert_eq!(left(1000, 1000 - SPARE_DESCRIPTORS), 0);
        assert_eq!(left(1000, 1000), 0);
        assert_eq!(left(100, 3), 0);
    }

    #[test]
    fn the_fewest_of_mounts_and_descriptors_are_left() {
        let places =
            |mounts: u64| Places { mounts: mounts.into(), is_told: AtomicBool::new(false) };
        let most = mounts::most().unwrap();
        assert_eq!(places(most).left().unwrap(), 0);
        assert_eq!(places(most + 1).left().unwrap(), 0);
        assert_eq!(places(most - 1).left().unwrap(), 1);
        assert!(
            places(0).left().unwrap()
                <= descriptors().unwrap().most.saturating_sub(SPARE_DESCRIPTORS)
        );
    }

    #[test]
    fn want_of_descriptors_and_of_mounts_is_want_of_space() {
        for errno in [Errno::MFILE, Errno::NFILE, Errno::NOSPC] {
            assert_eq!(no_more(Error::Os(errno)).errno(), Errno::NOSPC);
        }
        assert_eq!(no_more(Error::Os(Errno::PERM)).errno(), Errno::PERM);
    }
}
