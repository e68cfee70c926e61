//! The effect that a change of a file's contents has on its inode: a new modification time, and the
//! loss of set-id bits and capabilities.
//!
//! The kernel takes times of files from CLOCK_REALTIME_COARSE, which advances every few
//! milliseconds (clock_gettime(2)). A value of that clock is a *tick* here. If a change of contents
//! has updated the inode in the current tick, and the inode has not changed since, the next change
//! skips the update.
//!
//! A change of the inode's mode, owner, times or attributes never runs beside the update that a
//! write makes. The kernel holds the inode's lock alone for such a change. Only writes within the
//! file share that lock (fs/fuse/file.c, fs/attr.c, fs/xattr.c). With FUSE_ASYNC_DIO a write could
//! outlive the lock; the daemon does not ask for this flag.

use crate::error::Result;
use rustix::time::{ClockId, clock_gettime};
use std::sync::atomic::{AtomicU64, Ordering};

/// The ticks of the last updates. 0 means that there was none, or that the inode has changed since.
#[derive(Default)]
pub struct Mtime {
    by_anybody: AtomicU64,
    by_unprivileged: AtomicU64,
}

impl Mtime {
    /// Runs `note`, the update of the inode, unless an update in this tick did as much. The update
    /// for an unprivileged writer does all that the one for a privileged writer does, and more.
    ///
    /// # Errors
    /// The errors of `note`. The next change of contents runs `note` again.
    pub fn note(&self, unprivileged: bool, note: impl FnOnce() -> Result<()>) -> Result<()> {
        let now = coarse_time();
        let done = if unprivileged { &self.by_unprivileged } else { &self.by_anybody };
        if done.load(Ordering::Acquire) == now {
            return Ok(());
        }
        note()?;
        self.by_anybody.store(now, Ordering::Release);
        if unprivileged {
            self.by_unprivileged.store(now, Ordering::Release);
        }
        Ok(())
    }

    /// Records that the inode has changed. The next change of contents updates the inode again.
    pub fn forget(&self) {
        self.by_anybody.store(0, Ordering::Release);
        self.by_unprivileged.store(0, Ordering::Release);
    }
}

/// The current tick, in nanoseconds since the epoch.
fn coarse_time() -> u64 {
    let now = clock_gettime(ClockId::RealtimeCoarse);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;
    use std::cell::Cell;

    /// Repeats `acts` until the clock does not advance during a run, and returns the result of that
    /// run.
    fn within_a_tick(acts: impl Fn() -> u32) -> u32 {
        loop {
            let before = coarse_time();
            let count = acts();
            if coarse_time() == before {
                return count;
            }
        }
    }

    fn count_one(count: &Cell<u32>) -> Result<()> {
        count.set(count.get() + 1);
        Ok(())
    }

    #[test]
    fn a_tick_sets_the_time_once_and_again_if_unprivileged() {
        let count = within_a_tick(|| {
            let (modified, count) = (Mtime::default(), Cell::new(0));
            for unprivileged in [false, false, true, true, false] {
                modified.note(unprivileged, || count_one(&count)).unwrap();
            }
            count.get()
        });
        assert_eq!(count, 2);
    }

    #[test]
    fn a_failure_or_a_changed_inode_has_the_time_set_again() {
        let count = within_a_tick(|| {
            let (modified, count) = (Mtime::default(), Cell::new(0));
            assert!(modified.note(true, || Err(Error::NoMemory)).is_err());
            modified.note(true, || count_one(&count)).unwrap();
            modified.forget();
            modified.note(true, || count_one(&count)).unwrap();
            count.get()
        });
        assert_eq!(count, 2);
    }
}
