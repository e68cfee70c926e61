//! The descriptors by which the kernel reads a file's memory without us.
//!
//! A hole in the memory is zeros to such a reader, where it would be EIO to one who asks us. So there are either soft holes in a
//! file or natives, never both: a quarantine excludes natives before it makes the first hole ([`Natives::exclude`]), and they are
//! admitted again when a change leaves the file without holes. That needs no lock of the file: open(2) waits for no change.
//!
//! A descriptor is known by the number of the request that opened it, which is the same when the request is sent again, and which
//! the kernel names when the descriptor is closed: noting it twice, or striking it out twice, is noting it once.
//!
//! A note can outlive its descriptor, and then forbid quarantines until the file is gone: where the worker that wrote it died before it
//! answered, and nobody asked again, as whoever had asked was killed in that instant, or was refused by a supervisor that has
//! no worker. It errs on the safe side.
//!
//! The repair of a *real* memory error is another matter: between the page that the kernel had poisoned and the healthy one there is
//! a hole for some microseconds, which is zeros to a native. Whoever asked for the repair has given the bytes up, or has others.

use crate::error::Result;
use std::collections::BTreeSet;
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::Instant;

/// Most of a file; who opens it then is mediated. All of them are written anew with each.
const MOST: usize = 1024;

/// The natives of one file.
#[derive(Default)]
pub struct Natives(Mutex<Notes>);

#[derive(Default)]
struct Notes {
    noted: BTreeSet<u64>,
    /// There are soft holes, or are going to be.
    excluded: bool,
}

impl Natives {
    fn notes(&self) -> MutexGuard<'_, Notes> {
        self.0.lock().expect("no panic while the notes are open")
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.notes().noted.len()
    }

    /// No more are noted until [`Natives::admit`], where none is noted now. Returns whether that is so.
    pub fn exclude(&self) -> bool {
        let mut notes = self.notes();
        notes.excluded |= notes.noted.is_empty();
        notes.excluded
    }

    /// There are no soft holes (any more). The caller keeps others from making one.
    pub fn admit(&self) {
        self.notes().excluded = false;
    }

    /// Notes one more, which `keep` keeps for the next worker. Answers no where there are too many, or none is to be.
    ///
    /// # Errors
    /// Those of `keep`; it is not noted then.
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

    /// Strikes one out, if it is noted, which `keep` keeps.
    ///
    /// # Errors
    /// Those of `keep`; it is struck out here all the same.
    pub fn remove(&self, descriptor: u64, keep: impl FnOnce(&[u8]) -> Result<()>) -> Result<()> {
        let noted = &mut self.notes().noted;
        if !noted.remove(&descriptor) {
            return Ok(());
        }
        keep(&encode(noted))
    }

    /// Notes those that were kept.
    pub fn recall(&self, kept: &[u8]) {
        let (numbers, _) = kept.as_chunks::<8>();
        self.notes().noted = numbers.iter().map(|number| u64::from_le_bytes(*number)).collect();
    }
}

/// How often natives have been closed, to wait for it: close(2) returns before we are told of it.
#[derive(Default)]
pub struct Closings {
    count: Mutex<u64>,
    another: Condvar,
}

impl Closings {
    /// How many there have been.
    pub fn count(&self) -> u64 {
        *self.count.lock().expect("no panic while it is counted")
    }

    /// One more.
    pub fn add(&self) {
        *self.count.lock().expect("no panic while it is counted") += 1;
        self.another.notify_all();
    }

    /// Waits until there have been more than `seen`, until `deadline` at most. Returns whether there were.
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
        let natives = Natives::default();
        assert!(natives.add(2, kept).unwrap() && natives.add(2, kept).unwrap());
        assert_eq!(natives.count(), 1);
        natives.remove(2, kept).unwrap();
        natives.remove(2, |_| panic!("there is nothing to strike out")).unwrap();
        assert_eq!(natives.count(), 0);
    }

    #[test]
    fn what_is_kept_is_recalled() {
        let (natives, next) = (Natives::default(), Natives::default());
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
        let natives = Natives::default();
        assert!(natives.add(2, |_| Err(Error::NoMemory)).is_err());
        assert_eq!(natives.count(), 0);
    }

    #[test]
    fn natives_and_soft_holes_exclude_each_other() {
        let natives = Natives::default();
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
        let natives = Natives::default();
        (0..MOST as u64).for_each(|descriptor| assert!(natives.add(descriptor, kept).unwrap()));
        assert!(!natives.add(MOST as u64, kept).unwrap());
        assert!(natives.add(7, kept).unwrap(), "it is noted already");
    }
}
