//! The open files that programs poll for a grown quarantine (POLLPRI).
//!
//! The kernel names an open file by a handle. All pollers of a file are woken at once, and each of
//! them once: a program that polls on comes again. The handles are noted with the file, for the
//! next worker to wake them ([`wake_noted`]). The notes are in chunks, and one poller more writes
//! one chunk anew: it costs as much beside a thousand others as beside none.
//!
//! The kernel does not tell that a polled file was closed. So a full list is emptied by waking all:
//! the programs that still poll come again. If the list had too little room for these, it would be
//! emptied for ever: a program that polls many files starts anew whenever it is woken, and poll(2)
//! does not even look at its timeout then (fs/select.c, `do_poll`). So the list must grow with the
//! number of open files, and with nothing else:
//!
//! - Handles rise: the kernel takes the next number for each file that it opens (fs/fuse/file.c,
//!   `fuse_file_alloc`).
//! - A handle is **old** if it is not above all that came before the list was last emptied. Its
//!   file was open at that moment, or the handle would not have come since.
//! - When a list is full, its room becomes twice the number of its old handles, at least [`FEW`].
//!   A list is never longer than twice the number of files that were open at one time, or [`FEW`].
//! - So a full list gets more room if more than half of its handles are old. Otherwise at least
//!   half of them came for the first time. So emptying costs a few requests for each file that is
//!   opened and polled, and programs that all come again fit in soon.

use crate::error::Result;
use crate::sealed::Notes;
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};

/// Runs once, when the quarantine of a file has grown.
pub type Waker = Box<dyn FnOnce() + Send>;

/// Handles in one chunk: 1 KiB of them.
const CHUNK: usize = 128;

/// So many pollers a list has room for at least.
const FEW: usize = 1024;

/// The pollers of one file.
pub struct Pollers(Mutex<List>);

struct List {
    wakers: HashMap<u64, Waker>,
    /// The handles of the wakers, in the order of their notes: chunk after chunk.
    noted: Vec<u64>,
    /// So many wakers are a full list.
    room: usize,
    /// The highest handle that has come.
    highest: u64,
    /// The highest handle that had come when the list was emptied.
    old: u64,
}

impl Default for Pollers {
    fn default() -> Self {
        let (wakers, noted) = (HashMap::new(), Vec::new());
        Self(Mutex::new(List { wakers, noted, room: FEW, highest: 0, old: 0 }))
    }
}

impl Pollers {
    fn list(&self) -> MutexGuard<'_, List> {
        self.0.lock().expect("no panic while the list is open")
    }

    /// Has `waker` run when all are woken; a later one for the same handle takes its place. The
    /// handle is noted first.
    ///
    /// # Errors
    /// What setxattr(2) and removexattr(2) answer: the waker is not taken.
    pub fn add(&self, handle: u64, waker: Waker, notes: &Notes) -> Result<()> {
        let mut list = self.list();
        if !list.wakers.contains_key(&handle) {
            if list.wakers.len() >= list.room {
                list.grow();
                list.wake(notes)?;
            }
            list.note(handle, notes)?;
        }
        list.wakers.insert(handle, waker);
        Ok(())
    }

    /// Wakes all, and removes their notes.
    ///
    /// # Errors
    /// What removexattr(2) answers: all are woken, and the next worker wakes some of them again.
    pub fn wake(&self, notes: &Notes) -> Result<()> {
        self.list().wake(notes)
    }
}

impl List {
    /// Makes room for all whose files may still be open.
    fn grow(&mut self) {
        let old = self.noted.iter().filter(|handle| **handle <= self.old).count();
        self.room = FEW.max(2 * old);
    }

    /// The notes go after the wakers have run: a worker that dies in between leaves them to the
    /// next one.
    fn wake(&mut self, notes: &Notes) -> Result<()> {
        std::mem::take(&mut self.wakers).into_values().for_each(|wake| wake());
        let chunks = std::mem::take(&mut self.noted).len().div_ceil(CHUNK);
        self.old = self.highest;
        discard(chunks, notes)
    }

    /// Writes the last chunk, with `handle` behind the others.
    fn note(&mut self, handle: u64, notes: &Notes) -> Result<()> {
        let chunk = self.noted.len() / CHUNK;
        let handles = self.noted[chunk * CHUNK..].iter().chain([&handle]);
        let bytes: Vec<u8> = handles.flat_map(|handle| handle.to_le_bytes()).collect();
        notes.keep(&name(chunk), &bytes)?;
        self.noted.push(handle);
        self.highest = self.highest.max(handle);
        Ok(())
    }
}

/// Wakes by the handles that [`Pollers::add`] noted in another process; then the notes are removed.
///
/// # Errors
/// What getxattr(2) and removexattr(2) answer.
pub fn wake_noted(notes: &Notes, wake: impl Fn(u64)) -> Result<()> {
    let mut chunks = 0;
    while let Some(bytes) = notes.kept(&name(chunks))? {
        let (handles, _) = bytes.as_chunks::<8>();
        handles.iter().for_each(|handle| wake(u64::from_le_bytes(*handle)));
        chunks += 1;
    }
    discard(chunks, notes)
}

/// Removes the first `chunks` chunks, from the last to the first: if the worker dies in between,
/// [`wake_noted`] finds all that are left.
fn discard(chunks: usize, notes: &Notes) -> Result<()> {
    (0..chunks).rev().try_for_each(|chunk| notes.discard(&name(chunk)))
}

/// What a chunk is kept under. The first is also the only one of a worker that knows no chunks.
fn name(chunk: usize) -> String {
    if chunk == 0 { "pollers".to_owned() } else { format!("pollers {chunk}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::Holding;
    use crate::units::PageSize;
    use std::cell::RefCell;
    use std::collections::BTreeSet;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// The notes of an empty file, which stays as long as they do.
    fn notes() -> Notes {
        Holding::create(PageSize::Huge).unwrap().sealed().notes().clone()
    }

    /// Adds a poller for each of `handles`. Returns how many of all pollers were woken by that.
    fn add(
        pollers: &Pollers,
        handles: impl IntoIterator<Item = u64>,
        woken: &Arc<AtomicUsize>,
        notes: &Notes,
    ) -> usize {
        let before = woken.load(Ordering::Relaxed);
        for handle in handles {
            let woken = woken.clone();
            let waker = Box::new(move || _ = woken.fetch_add(1, Ordering::Relaxed));
            pollers.add(handle, waker, notes).unwrap();
        }
        woken.load(Ordering::Relaxed) - before
    }

    fn noted(notes: &Notes) -> BTreeSet<u64> {
        let handles = RefCell::new(BTreeSet::new());
        let wake = |handle| assert!(handles.borrow_mut().insert(handle), "{handle} is noted twice");
        wake_noted(notes, wake).unwrap();
        handles.into_inner()
    }

    #[test]
    fn all_who_come_again_fit_in_soon() {
        const MANY: u64 = 5 * FEW as u64;
        let (pollers, woken, notes) = (Pollers::default(), Arc::default(), notes());
        let rounds = (1..20).find(|_| add(&pollers, 1..=MANY, &woken, &notes) == 0);
        assert!(rounds.is_some_and(|rounds| rounds <= 5), "{rounds:?}");
        assert_eq!(add(&pollers, 1..=MANY, &woken, &notes), 0);
        let before = woken.load(Ordering::Relaxed);
        pollers.wake(&notes).unwrap();
        assert_eq!(woken.load(Ordering::Relaxed) - before, MANY as usize);
        assert_eq!(add(&pollers, 1..=MANY, &woken, &notes), 0, "there is room for them still");
    }

    #[test]
    fn closed_files_do_not_lengthen_the_list() {
        const OPEN: u64 = 700;
        let (pollers, woken, notes) = (Pollers::default(), Arc::default(), notes());
        for closed in (OPEN + 1..30 * FEW as u64).step_by(FEW) {
            add(&pollers, closed..closed + FEW as u64, &woken, &notes);
            add(&pollers, 1..=OPEN, &woken, &notes);
            assert!(pollers.list().wakers.len() <= FEW.max(2 * OPEN as usize));
        }
    }

    #[test]
    fn those_who_are_not_woken_are_noted() {
        let (pollers, woken, notes) = (Pollers::default(), Arc::default(), notes());
        let handles = (1..=3 * CHUNK as u64 + 5).map(|number| 7 * number);
        add(&pollers, handles.clone(), &woken, &notes);
        assert_eq!(noted(&notes), handles.collect());
        assert_eq!(noted(&notes), BTreeSet::new(), "the notes are gone");
        let pollers = Pollers::default();
        add(&pollers, 1..=2 * CHUNK as u64, &woken, &notes);
        pollers.wake(&notes).unwrap();
        assert_eq!(noted(&notes), BTreeSet::new(), "all are woken");
        add(&pollers, [9], &woken, &notes);
        assert_eq!(noted(&notes), BTreeSet::from([9]));
    }
}
