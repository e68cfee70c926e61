//! The places of objects: each object's superblock is mounted in the daemon's namespace. How many more places there can be.
//!
//! **Why a mount each.** A superblock lives as long as something refers to it, and the descriptors of a worker end with the worker.
//! So something that outlives workers must hold each superblock: here the namespace does, by a mount at `/objects/<node id>`. A new
//! worker reads the directory, and an upgrade enters the namespace; neither is handed anything. The price is a bound: the kernel
//! allows `fs.mount-max` mounts in a namespace, 100,000 where the administrator has not raised the number. The alternatives:
//!
//! - *The supervisor holds a descriptor of each superblock.* Mounts that are not attached are in no namespace (5,000 of them added
//!   no line to /proc/self/mountinfo), so the bound would be the limit of descriptors, 2^20. But workers would have to send the
//!   supervisor each descriptor, ask for all of them after a death, and say which to drop; an upgrade would have to move them
//!   between two supervisors, 253 a message (SCM_MAX_FD), while files come and go. The supervisor would keep a table, allocate,
//!   and read messages, and a fault in any of that would be the loss of all files. Now the supervisor has no such part.
//! - *Several namespaces, or trees of mounts.* A thread attaches only to a tree of its own namespace (move_mount(2)), so each
//!   creation and removal would have to enter another one (setns(2), which a process with threads cannot use for mounts). A
//!   tree that is not attached cannot have mounts below it before Linux 6.15.
//! - *A superblock for several files* has free blocks or full ones in common, and S1 is each file's own ([`crate::sealed`]).
//!
//! An administrator raises the bound by one line, `sysctl fs.mount-max=1000000`, and little slows down: on a machine with a load of
//! 20 (two processors, Linux 6.18), a place took 0.2 ms to make beside 2,000 mounts and 0.4 ms beside 60,000. The next bounds are
//! the 2^20 descriptors that a process may have (fs.nr_open), of which a file takes one, and the machine's 2^20 anonymous device
//! numbers, of which a superblock takes one. The latter are not counted here, as no interface tells how many are left: to make a
//! file without one is ENOSPC, too.
//!
//! **What is kept for the files that are there.** To read, quarantine, repair and remove a file takes descriptors for a moment, and a
//! new worker opens all files. So [`SPARE_DESCRIPTORS`] of them are not for new files: who makes files until no more can be made
//! stops nobody else from using theirs.

use super::OBJECTS;
use crate::error::{Error, Result};
use crate::pool::Holding;
use crate::steps::{self, Step, insist};
use crate::sys::process::{Descriptors, descriptors};
use crate::sys::{calls, mounts, tmpfs};
use crate::units::NodeId;
use rustix::fs::Mode;
use rustix::io::Errno;
use std::ffi::{CStr, CString};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Descriptors that no new file gets: some for each request that is carried out at the same moment, and for the start of a worker.
const SPARE_DESCRIPTORS: u64 = 256;

/// Makes and removes places, and counts them.
pub struct Places {
    /// Mounts in the namespace. Only the daemon mounts there, so a worker counts them at its start, some 5 us each.
    mounts: AtomicU64,
    /// It was logged why no more files can be made.
    is_told: AtomicBool,
}

impl Places {
    /// Those that are there.
    ///
    /// # Errors
    /// What reading /proc/self/mountinfo answers.
    pub fn count() -> Result<Self> {
        Ok(Self { mounts: mounts::count()?.into(), is_told: AtomicBool::new(false) })
    }

    /// How many more there can be.
    ///
    /// # Errors
    /// What reading /proc answers.
    pub fn left(&self) -> Result<u64> {
        let mounts = mounts::most()?.saturating_sub(self.mounts.load(Ordering::Relaxed));
        Ok(mounts.min(descriptors_for_files(descriptors()?)))
    }

    /// A new object for the file `node`, in its place.
    ///
    /// # Errors
    /// [`Error::TooManyFiles`] and [`Error::NoMemory`]: nothing has changed.
    pub fn make(&self, node: NodeId, create: impl FnOnce() -> Result<Holding>) -> Result<Holding> {
        self.refuse_the_last_descriptors()?;
        let mut holding = create().map_err(no_more)?;
        attach(node, &mut holding).map_err(no_more)?;
        self.mounts.fetch_add(1, Ordering::Relaxed);
        steps::done(Step::CreateAttached);
        Ok(holding)
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

    /// Takes the place of `node` away. The superblock ends with the last who uses it. Nothing tries this a second time, so a
    /// shortage does not end it.
    pub fn remove(&self, node: NodeId) {
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

/// Refuses to open so many files where this process may not have the descriptors.
///
/// # Errors
/// [`Error::Invalid`], with both numbers.
pub fn refuse_too_few_descriptors(files: u64) -> Result<()> {
    let most = descriptors()?.most;
    if files.saturating_add(SPARE_DESCRIPTORS) <= most {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "{files} files need a descriptor each, and {SPARE_DESCRIPTORS} more: this process may have {most} (ulimit -n)"
    )))
}

/// Attached at its path: all of it or nothing.
fn attach(node: NodeId, holding: &mut Holding) -> Result<()> {
    let path = path(node);
    calls::mkdir(&*path, Mode::from_raw_mode(0o700))?;
    steps::done(Step::CreatePlace);
    holding.sealed_mut().attach(text(&path)).inspect_err(|_| {
        let _ = calls::rmdir(&*path);
    })
}

/// What the kernel answers for want of descriptors, of anonymous device numbers (fs/super.c, get_anon_bdev) and of mounts.
fn no_more(error: Error) -> Error {
    match error {
        Error::Os(Errno::MFILE | Errno::NFILE | Errno::NOSPC) => Error::TooManyFiles,
        other => other,
    }
}

fn path(node: NodeId) -> CString {
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
        let places = |mounts: u64| Places { mounts: mounts.into(), is_told: AtomicBool::new(false) };
        let most = mounts::most().unwrap();
        assert_eq!(places(most).left().unwrap(), 0);
        assert_eq!(places(most + 1).left().unwrap(), 0);
        assert_eq!(places(most - 1).left().unwrap(), 1);
        assert!(places(0).left().unwrap() <= descriptors().unwrap().most.saturating_sub(SPARE_DESCRIPTORS));
    }

    #[test]
    fn want_of_descriptors_and_of_mounts_is_want_of_space() {
        for errno in [Errno::MFILE, Errno::NFILE, Errno::NOSPC] {
            assert_eq!(no_more(Error::Os(errno)).errno(), Errno::NOSPC);
        }
        assert_eq!(no_more(Error::Os(Errno::PERM)).errno(), Errno::PERM);
    }
}
