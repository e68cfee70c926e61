//! What every change of a file's contents does to its inode besides: the time of modification, and the end of set-id bits and
//! capabilities.
//!
//! The kernel's clock for times of files stands still for some milliseconds (CLOCK_REALTIME_COARSE, clock_gettime(2)). What was
//! done once at one of its readings need not be done again at the same, unless somebody has changed the inode's mode, owner, times or
//! attributes since. The kernel has a file's inode locked for any of those, and shares the lock between writes within the file only: what
//! is noted here by one of them is not undone by a change of the inode under way at once (fs/fuse/file.c, fs/attr.c, fs/xattr.c;
//! FUSE_ASYNC_DIO, with which a write could outlive the lock, is not asked for).

use crate::error::Result;
use rustix::time::{ClockId, clock_gettime};
use std::sync::atomic::{AtomicU64, Ordering};

/// When that was done last. 0: it is not known, or something has been changed since.
#[derive(Default)]
pub struct Modified {
    by_anybody: AtomicU64,
    by_unprivileged: AtomicU64,
}

impl Modified {
    /// Runs `note` unless it has been run at this reading of the clock, by somebody with as few privileges.
    ///
    /// # Errors
    /// Those of `note`.
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

    /// The inode has been changed.
    pub fn forget(&self) {
        self.by_anybody.store(0, Ordering::Release);
        self.by_unprivileged.store(0, Ordering::Release);
    }
}

/// In nanoseconds since the epoch.
fn coarse_time() -> u64 {
    let now = clock_gettime(ClockId::RealtimeCoarse);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;
    use std::cell::Cell;

    /// Runs `acts` until they have fallen on one reading of the clock.
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
            let (modified, count) = (Modified::default(), Cell::new(0));
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
            let (modified, count) = (Modified::default(), Cell::new(0));
            assert!(modified.note(true, || Err(Error::NoMemory)).is_err());
            modified.note(true, || count_one(&count)).unwrap();
            modified.forget();
            modified.note(true, || count_one(&count)).unwrap();
            count.get()
        });
        assert_eq!(count, 2);
    }
}
