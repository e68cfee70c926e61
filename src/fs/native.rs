//! Native readers: descriptors for which the kernel reads a file's memory itself, without the
//! daemon.
//!
//! A native reader gets zeros from a hole in the memory. A read that the daemon answers fails with
//! EIO there. So a file has soft holes or native readers, and never both. A quarantine excludes
//! native readers before it makes the first hole ([`NativeReaders::exclude`]). A change that leaves
//! the file without soft holes admits them again. open(2) needs no lock of the file for this, so
//! open(2) waits for no change.
//!
//! ```text
//!   admitted                -- exclude(), no reader is noted -->   excluded
//!   readers come and go,                                           no reader is noted,
//!   no soft hole            <-- admit(), no soft hole is left --   soft holes come and go
//! ```
//!
//! [`NativeReaders::exclude`] fails while a reader is noted, and the quarantine with it.
//!
//! A native reader is noted by the number of the request that opened it. The number stays the same
//! when the kernel sends the request again, and the kernel repeats the number when it tells of the
//! close. So a second note of one number changes nothing, nor does a second removal.
//!
//! A note can be stale. This happens if the worker that wrote it dies before it answers open(2),
//! and the next worker never gets the request: the caller is killed at that moment, or the
//! supervisor has no worker and refuses the request. A stale note blocks quarantine until the file
//! is gone. That is safe: no reader gets zeros.
//!
//! The repair of a *hardware* error is an exception. Between the subpage that the kernel has
//! poisoned and the healthy one there is a hole for some microseconds. A native reader gets zeros
//! from that hole. The program that asked for the repair has given up the old bytes, or has others.

use crate::error::Result;
use std::collections::BTreeSet;
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::Instant;

/// Native readers that one file can have. The daemon itself answers the reads of any further
/// descriptor. There is a limit because each new note writes all notes of the file again.
const MOST: usize = 1024;

/// The native readers of one file.
#[derive(Default)]
pub struct NativeReaders(Mutex<Notes>);

#[derive(Default)]
struct Notes {
    noted: BTreeSet<u64>,
    /// The file has soft holes, or a quarantine is about to make one.
    excluded: bool,
}

impl NativeReaders {
    fn notes(&self) -> MutexGuard<'_, Notes> {
        self.0.lock().expect("no panic while the notes are open")
    }

    /// The number of native readers that are noted.
    pub fn count(&self) -> usize {
        self.notes().noted.len()
    }

    /// Excludes native readers until [`NativeReaders::admit`], unless one is noted now. True if
    /// they are excluded.
    pub fn exclude(&self) -> bool {
        let mut notes = self.notes();
        notes.excluded |= notes.noted.is_empty();
        notes.excluded
    }

    /// Admits native readers again. The file has no soft hole, and the caller prevents a new one
    /// meanwhile.
    pub fn admit(&self) {
        self.notes().excluded = false;
    }

    /// Notes a native reader. `keep` stores all notes for the next worker. False, without a note,
    /// if the file has too many native readers or they are excluded.
    ///
    /// # Errors
    /// The errors of `keep`. The reader is not noted then.
    pub fn add(&self, descriptor: u64, keep: impl FnOnce(&[u8]) -> Result<()>) -> Result<bool> {
        let Notes { noted, excluded } = &mut *self.notes();
        if (*excluded || noted.len() >= MOST) && !noted.contains(&descriptor) {
            return Ok(false);
        }
        if noted.insert(descriptor)
            && let Err(error) = keep(&encode(noted))
        {
            noted.remove(&descriptor);
            return Err(error);
        }
        Ok(true)
    }

    /// Removes the note of a reader, if there is one. `keep` stores the other notes.
    ///
    /// # Errors
    /// The errors of `keep`. The note is gone from this list even then.
    pub fn remove(&self, descriptor: u64, keep: impl FnOnce(&[u8]) -> Result<()>) -> Result<()> {
        let noted = &mut self.notes().noted;
        if !noted.remove(&descriptor) {
            return Ok(());
        }
        keep(&encode(noted))
    }

    /// Takes over the notes that another worker stored.
    pub fn recall(&self, kept: &[u8]) {
        let (numbers, _) = kept.as_chunks::<8>();
        self.notes().noted = numbers.iter().map(|number| u64::from_le_bytes(*number)).collect();
    }
}

/// Counts native readers that were closed, so that a request can wait for the next one. close(2)
/// returns before the daemon receives RELEASE.
#[derive(Default)]
pub struct Closings {
    count: Mutex<u64>,
    another: Condvar,
}

impl Closings {
    /// The number of closings so far.
    pub fn count(&self) -> u64 {
        *self.count.lock().expect("no panic while it is counted")
    }

    /// Counts a closing, and wakes all waiters.
    pub fn add(&self) {
        *self.count.lock().expect("no panic while it is counted") += 1;
        self.another.notify_all();
    }

    /// Waits until there have been more than `seen` closings, or until `deadline`. True if there
    /// have been.
    pub fn wait(&self, seen: u64, deadline: Instant) -> bool {
        let patience = deadline.saturating_duration_since(Instant::now());
        let count = self.count.lock().expect("no panic while it is counted");
        let waited = self.another.wait_timeout_while(count, patience, |count| *count == seen);
        *waited.expect("no panic while it is counted").0 != seen
    }
}

fn encode(noted: &BTreeSet<u64>) -> Vec<u8> {
    noted.iter().flat_map(|number| number.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;
    use std::time::Duration;

    #[test]
    fn who_waits_for_a_closing_is_told_of_it_or_of_the_deadline() {
        let closings = Closings::default();
        assert!(!closings.wait(0, Instant::now() + Duration::from_millis(1)));
        std::thread::scope(|scope| {
            scope.spawn(|| closings.add());
            assert!(closings.wait(0, Instant::now() + Duration::from_secs(60)));
        });
    }

    fn kept(_: &[u8]) -> Result<()> {
        Ok(())
    }

    #[test]
    fn one_is_noted_and_struck_out_once_however_often_that_is_asked() {
        let natives = NativeReaders::default();
        assert!(natives.add(2, kept).unwrap() && natives.add(2, kept).unwrap());
        assert_eq!(natives.count(), 1);
        natives.remove(2, kept).unwrap();
        natives.remove(2, |_| panic!("there is nothing to strike out")).unwrap();
        assert_eq!(natives.count(), 0);
    }

    #[test]
    fn what_is_kept_is_recalled() {
        let (natives, next) = (NativeReaders::default(), NativeReaders::default());
        for descriptor in [2, u64::MAX >> 1] {
            let keep = |bytes: &[u8]| {
                next.recall(bytes);
                Ok(())
            };
            natives.add(descriptor, keep).unwrap();
        }
        assert_eq!(next.notes().noted, natives.notes().noted);
    }

    #[test]
    fn one_that_cannot_be_kept_is_not_noted() {
        let natives = NativeReaders::default();
        assert!(natives.add(2, |_| Err(Error::NoMemory)).is_err());
        assert_eq!(natives.count(), 0);
    }

    #[test]
    fn natives_and_soft_holes_exclude_each_other() {
        let natives = NativeReaders::default();
        assert!(natives.add(2, kept).unwrap());
        assert!(!natives.exclude(), "one is noted");
        natives.remove(2, kept).unwrap();
        assert!(natives.exclude() && natives.exclude());
        assert!(!natives.add(4, kept).unwrap());
        natives.admit();
        assert!(natives.add(4, kept).unwrap());
    }

    #[test]
    fn there_are_only_so_many() {
        let natives = NativeReaders::default();
        (0..MOST as u64).for_each(|descriptor| assert!(natives.add(descriptor, kept).unwrap()));
        assert!(!natives.add(MOST as u64, kept).unwrap());
        assert!(natives.add(7, kept).unwrap(), "it is noted already");
    }
}
