//! A summary of a file for requests that do not take its lock, and the lock that keeps it up to
//! date.

use super::Object;
use crate::pool::Holding;
use crate::units::{Range, SUBPAGE_SIZE};
use parking_lot::RwLockWriteGuard;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The state of a file that is known without its lock: as the last change has left it that ended or
/// gave way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Size in bytes.
    pub size: u64,
    /// Memory in bytes: whole pages, as the pool counts them. For a file with quarantined subpages,
    /// the bytes that can be read: cp(1) looks for holes only if they are fewer than the size.
    pub memory: u64,
    /// Subpages that are quarantined on request.
    pub soft: u64,
    /// Subpages that are quarantined for memory errors.
    pub hw: u64,
    /// The quarantine has grown since its [`Object::report`] was read.
    pub alarm: bool,
    /// The file may have gaps that a program asked for.
    pub punched: bool,
    /// Programs may have its memory open by themselves.
    pub has_door: bool,
    /// Pages of the pool that are the file's.
    pub pages: u64,
    /// Those of them that no program has asked for.
    pub ahead: u64,
}

impl Summary {
    pub(super) fn of(holding: &Holding) -> Self {
        let (sealed, size) = (holding.sealed(), holding.size());
        let (soft, hw) = (sealed.holes().count(), sealed.hw_errors().len() as u64);
        let memory = match sealed.lost_count() {
            // A holding that is being opened has no pages yet.
            0 => holding.bytes().saturating_sub(holding.bytes_ahead()),
            lost => {
                let released: u64 = holding.released_in(Range::new(0, size)).map(Range::len).sum();
                (size - released).saturating_sub(lost * SUBPAGE_SIZE)
            }
        };
        let (alarm, punched) = (sealed.header().alarm, sealed.is_punched());
        let has_door = sealed.has_door();
        let (pages, ahead) = (holding.pages(), holding.pages_ahead());
        Self { size, memory, soft, hw, alarm, punched, has_door, pages, ahead }
    }

    /// Pages that programs have asked for. The account has the others as ahead.
    fn used(&self) -> u64 {
        self.pages.saturating_sub(self.ahead)
    }
}

/// The summary of a file. While the file has no name, its pages are part of the number of orphaned
/// pages, except those ahead, which users can have already.
pub(super) struct Published {
    summary: Summary,
    is_orphan: bool,
    /// The pages of all files without a name.
    orphaned: Arc<AtomicU64>,
}

impl Published {
    pub(super) fn new(summary: Summary, orphaned: Arc<AtomicU64>) -> Self {
        Self { summary, is_orphan: false, orphaned }
    }

    pub(super) fn summary(&self) -> Summary {
        self.summary
    }

    fn set(&mut self, summary: Summary) {
        let before = std::mem::replace(&mut self.summary, summary);
        if self.is_orphan {
            self.orphaned.fetch_add(summary.used(), Ordering::Relaxed);
            self.orphaned.fetch_sub(before.used(), Ordering::Relaxed);
        }
    }

    pub(super) fn note_orphaned(&mut self) {
        if !std::mem::replace(&mut self.is_orphan, true) {
            self.orphaned.fetch_add(self.summary.used(), Ordering::Relaxed);
        }
    }
}

impl Drop for Published {
    fn drop(&mut self) {
        if self.is_orphan {
            self.orphaned.fetch_sub(self.summary.used(), Ordering::Relaxed);
        }
    }
}

/// A file's lock, held by a request that changes sizes, pages or the quarantine.
pub struct Locked<'a> {
    pub(super) object: &'a Object,
    pub(super) holding: RwLockWriteGuard<'a, Holding>,
}

impl Locked<'_> {
    /// Releases the lock if other requests wait for it, and takes it again after them.
    pub fn let_others_go_first(&mut self) {
        self.publish();
        RwLockWriteGuard::bump(&mut self.holding);
    }

    /// Releases the lock for `time`, and takes it again.
    pub fn rest(&mut self, time: Duration) {
        self.publish();
        RwLockWriteGuard::unlocked(&mut self.holding, || std::thread::sleep(time));
    }

    fn publish(&self) {
        self.object.published().set(Summary::of(&self.holding));
        if self.holding.sealed().holes().is_empty() {
            self.object.natives.admit();
        }
    }
}

impl Deref for Locked<'_> {
    type Target = Holding;

    fn deref(&self) -> &Holding {
        &self.holding
    }
}

impl DerefMut for Locked<'_> {
    fn deref_mut(&mut self) -> &mut Holding {
        &mut self.holding
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        self.publish();
    }
}
