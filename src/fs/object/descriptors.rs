//! The kernel's number of the backing file, descriptors by which the kernel reads itself, and
//! pollers: all noted with the file, for the next worker.

use super::Object;
use crate::error::Result;
use crate::fs::pollers::{self, Waker};
use crate::steps::{self, Step};

/// Names of notes that are stored with a file.
const BACKING: &str = "backing";

const NATIVES: &str = "natives";

impl Object {
    /// The kernel's number of `data` (FUSE_DEV_IOC_BACKING_OPEN), if one is stored. All replies
    /// that open the file must have the same number, from every worker.
    ///
    /// # Errors
    /// The errors of getxattr(2).
    pub fn backing(&self) -> Result<Option<u32>> {
        if let Some(number) = self.backing.get() {
            return Ok(Some(*number));
        }
        let kept = self.notes.kept(BACKING)?;
        let number = kept.and_then(|bytes| Some(u32::from_le_bytes(bytes.try_into().ok()?)));
        Ok(number.map(|number| *self.backing.get_or_init(|| number)))
    }

    /// Stores that number with the file.
    ///
    /// # Errors
    /// The errors of setxattr(2): nothing is stored then.
    pub fn keep_backing(&self, number: u32) -> Result<()> {
        self.notes.keep(BACKING, &number.to_le_bytes())
    }

    /// Notes `descriptor` as one by which the kernel reads `data` itself. Such a reader sees zeros
    /// in a soft hole. So the answer is false for a file with soft holes, and no soft hole is made
    /// while a descriptor is noted ([`Object::quarantine`]). The notes are stored with the file,
    /// for the next worker.
    ///
    /// # Errors
    /// The errors of setxattr(2): nothing is noted then.
    pub fn open_natively(&self, descriptor: u64) -> Result<bool> {
        let noted = self.natives.add(descriptor, |noted| self.notes.keep(NATIVES, noted));
        steps::reached(Step::NativeNoted);
        noted
    }

    /// Removes the note of a closed descriptor, if there is one.
    pub fn close_natively(&self, descriptor: u64) {
        if let Err(error) = self.natives.remove(descriptor, |noted| self.notes.keep(NATIVES, noted))
        {
            log::warn!(
                "file {}: the next worker may take a closed descriptor for open: {error}",
                self.node
            );
        }
        steps::reached(Step::NativeClosed);
    }

    /// Number of descriptors that are noted.
    pub fn natives(&self) -> usize {
        self.natives.count()
    }

    /// Reads the notes of an earlier worker.
    ///
    /// # Errors
    /// The errors of getxattr(2).
    pub fn recall_natives(&self) -> Result<()> {
        if let Some(noted) = self.notes.kept(NATIVES)? {
            self.natives.recall(&noted);
        }
        Ok(())
    }

    /// Runs `waker` once, when the quarantine grows. A later waker with the same `key`, the
    /// kernel's handle, replaces it. `waker` may also run earlier: a program that still polls asks
    /// again.
    ///
    /// # Errors
    /// The errors of setxattr(2) and removexattr(2): `waker` is not stored then.
    pub fn wake_on_alarm(&self, key: u64, waker: Waker) -> Result<()> {
        self.pollers.add(key, waker, &self.notes)
    }

    /// Wakes by the keys that [`Object::wake_on_alarm`] noted in another process, and removes the
    /// notes.
    ///
    /// # Errors
    /// The errors of getxattr(2) and removexattr(2).
    pub fn wake_noted_pollers(&self, wake: impl Fn(u64)) -> Result<()> {
        pollers::wake_noted(&self.notes, wake)
    }

    pub(super) fn wake_all(&self) {
        if let Err(error) = self.pollers.wake(&self.notes) {
            log::warn!("file {}: the next worker wakes its pollers again: {error}", self.node);
        }
    }
}
