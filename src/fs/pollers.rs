//! Pollers: open files whose programs poll(2) for a growth of the quarantine (POLLPRI).
//!
//! The kernel names an open file by a *handle*. The daemon wakes all pollers of a file at once, and
//! each poller once. A program that polls on sends a new poll request after that. The daemon notes
//! the handles with the file, so that the next worker can wake them ([`wake_noted`]). The notes are
//! in chunks. One more poller rewrites one chunk, so its cost does not grow with the number of
//! pollers.
//!
//! The kernel does not tell the daemon that a polled file was closed. So the daemon empties a full
//! list by waking all its pollers, and the programs that still poll send new requests. A list with
//! too little room for these programs would be emptied again and again. A program that polls many
//! files polls all of them anew after each wake-up, and poll(2) does not even look at its timeout
//! then (fs/select.c, `do_poll`). So the room of the list must grow with the number of open files,
//! and with nothing else:
//!
//! - Handles rise: the kernel takes the next number for each file that it opens (fs/fuse/file.c,
//!   `fuse_file_alloc`).
//! - A handle is **old** if it is not above the highest handle that had come when the list was last
//!   emptied. Its file was open at that moment: the kernel had opened the file before, and the
//!   program has polled it since.
//! - When a list is full, its room becomes twice the number of its old handles, but at least
//!   [`FEW`]. So a list is never longer than twice the largest number of files that were open at
//!   one time, or [`FEW`].
//! - A full list gets more room if more than half of its handles are old. Otherwise, at least half
//!   of its handles came for the first time. So the wake-ups cost a few requests for each file that
//!   is opened and polled, and the programs that poll on soon have room in the list.

use crate::error::Result;
use crate::sealed::Notes;
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};

/// Wakes the programs that poll one open file. The daemon runs it once, when the quarantine of the
/// file has grown.
pub type Waker = Box<dyn FnOnce() + Send>;

/// Handles in one chunk: 1 KiB.
const CHUNK: usize = 128;

/// The least number of pollers for which a list has room.
const FEW: usize = 1024;

/// The pollers of one file.
pub struct Pollers(Mutex<List>);

struct List {
    wakers: HashMap<u64, Waker>,
    /// The handles of the wakers, in the order of their notes: chunk after chunk.
    noted: Vec<u64>,
    /// The number of wakers at which the list is full.
    room: usize,
    /// The highest handle that has come.
    highest: u64,
    /// The highest handle that had come when the list was last emptied.
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

    /// Adds a poller: `waker` runs when all are woken. A later waker for the same handle replaces
    /// it. The handle is noted first.
    ///
    /// # Errors
    /// The errors of setxattr(2) and removexattr(2). The list does not have the waker then.
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

    /// Wakes all pollers, and removes their notes.
    ///
    /// # Errors
    /// The errors of removexattr(2). All pollers are woken then, and the next worker wakes some of
    /// them again.
    pub fn wake(&self, notes: &Notes) -> Result<()> {
        self.list().wake(notes)
    }
}

impl List {
    /// Makes room for all pollers whose files may still be open.
    fn grow(&mut self) {
        let old = self.noted.iter().filter(|handle| **handle <= self.old).count();
        self.room = FEW.max(2 * old);
    }

    /// Runs all wakers, and then removes the notes. If the worker dies in between, the next worker
    /// finds the notes.
    fn wake(&mut self, notes: &Notes) -> Result<()> {
        std::mem::take(&mut self.wakers).into_values().for_each(|wake| wake());
        let chunks = std::mem::take(&mut self.noted).len().div_ceil(CHUNK);
        self.old = self.highest;
        discard(chunks, notes)
    }

    /// Rewrites the last chunk, with `handle` added at its end.
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

/// Calls `wake` for each handle that [`Pollers::add`] noted in another process, and then removes
/// the notes.
///
/// # Errors
/// The errors of getxattr(2) and removexattr(2).
pub fn wake_noted(notes: &Notes, wake: impl Fn(u64)) -> Result<()> {
    let mut chunks = 0;
    while let Some(bytes) = notes.kept(&name(chunks))? {
        let (handles, _) = bytes.as_chunks::<8>();
        handles.iter().for_each(|handle| wake(u64::from_le_bytes(*handle)));
        chunks += 1;
    }
    discard(chunks, notes)
}

/// Removes the first `chunks` chunks, from the last to the first. If the worker dies in between,
/// [`wake_noted`] finds all chunks that are left.
fn discard(chunks: usize, notes: &Notes) -> Result<()> {
    (0..chunks).rev().try_for_each(|chunk| notes.discard(&name(chunk)))
}

/// The name under which a chunk is stored. The name of the first chunk is also the only one of a
/// worker that knows no chunks.
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

    /// The notes of an empty file. The file lives as long as the notes.
    fn notes() -> Notes {
        Holding::create(PageSize::Huge).unwrap().sealed().notes().clone()
    }

    /// Adds a poller for each of `handles`. Returns the number of pollers, old and new, that this
    /// has woken.
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
