//! Requests that kill workers. A worker may begin a request only a limited number of times; then
//! the daemon refuses that request alone.
//!
//! When a worker dies, the kernel sends again each request that this worker has read and not
//! answered. Most of these requests are innocent: the worker died of another request, or of a
//! signal. The table in this module finds the guilty one. It is a file that outlives the worker, so
//! the next worker knows which requests the dead one had begun:
//!
//! ```text
//!   sent for the first time       no note, so such requests cost nothing
//!   sent again                    noted as begun once
//!   found to take long            noted as begun once less, until a thread has time for it
//!   sent again, noted already     waits for the turn, is noted as begun once more, and keeps the
//!                                 turn until it is answered
//!   begun MOST times              the next worker answers EIO before it asks the kernel to send
//!                                 requests again
//! ```
//!
//! From the second note on, only one request has the turn. So a death counts against that request
//! only, and an innocent request that was begun at the same time is carried out in the end.
//!
//! The file is one page that exists from the start, so a note takes no memory. The kernel's numbers
//! of requests ascend, and no number comes twice. So an old note does no harm, and the newest note
//! replaces the oldest.

use super::device::AGAIN;
use crate::error::Result;
use crate::sys::tmpfs;
use crate::units::SUBPAGE_SIZE;
use crossbeam::channel::{Receiver, Sender, bounded};
use std::fs::File;
use std::path::Path;
use std::sync::{Mutex, MutexGuard};

/// Times that workers begin a request which was sent again. Together with the first time, a request
/// kills one worker more than this number. If workers are killed at random, some milliseconds
/// apart, a request that takes some milliseconds is done before it reaches this number.
const MOST: u64 = 7;

const NOTE_BYTES: usize = 16;
const NOTES: usize = SUBPAGE_SIZE as usize / NOTE_BYTES;

/// The note about a request that was sent again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Note {
    /// The kernel's number of the request, with the bit [`AGAIN`]. 0 if the note is empty.
    number: u64,
    begun: u64,
}

impl Note {
    fn encode(self) -> [u8; NOTE_BYTES] {
        let mut bytes = [0; NOTE_BYTES];
        bytes[..8].copy_from_slice(&self.number.to_le_bytes());
        bytes[8..].copy_from_slice(&self.begun.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8; NOTE_BYTES]) -> Self {
        let word = |at| u64::from_le_bytes(std::array::from_fn(|n| bytes[at + n]));
        Self { number: word(0), begun: word(8) }
    }
}

/// The table of notes.
#[derive(Debug)]
pub struct Attempts {
    file: File,
    notes: Mutex<[Note; NOTES]>,
    /// Holds one message while a request has the turn.
    turn: (Sender<()>, Receiver<()>),
}

/// The turn: held while a request is carried out that may have killed two workers or more.
#[derive(Debug)]
pub struct Turn(Receiver<()>);

impl Drop for Turn {
    fn drop(&mut self) {
        let _ = self.0.try_recv();
    }
}

impl Attempts {
    /// Opens the table at `path`, as the last worker has left it. If there is no table, makes an
    /// empty one.
    ///
    /// # Errors
    /// The errors of open(2), pread(2) and pwrite(2).
    pub fn open(path: &Path) -> Result<Self> {
        let file =
            File::options().read(true).write(true).create(true).truncate(false).open(path)?;
        let mut bytes = [0; SUBPAGE_SIZE as usize];
        if tmpfs::read_at(&file, &mut bytes, 0)? < bytes.len() {
            tmpfs::write_at(&file, &bytes, 0)?;
        }
        let (encoded, _) = bytes.as_chunks::<NOTE_BYTES>();
        let notes = Mutex::new(std::array::from_fn(|n| Note::decode(&encoded[n])));
        Ok(Self { file, notes, turn: bounded(1) })
    }

    /// Notes that a request begins, if the kernel has sent it again. If the table has a note about
    /// the request already, the call waits for the turn. The request keeps the turn until the
    /// returned value is dropped.
    pub fn begin(&self, number: u64) -> Option<Turn> {
        if number & AGAIN == 0 {
            return None;
        }
        let turn = self.is_noted(number).then(|| self.wait_for_turn());
        if let Err(error) = self.note(number) {
            log::error!("that a request is carried out again could not be noted: {error}");
        }
        turn
    }

    /// Corrects the note about a request that has begun, has done nothing, and begins again later.
    /// No death until then is its fault.
    pub fn postpone(&self, number: u64) {
        let mut notes = self.notes();
        let Some(at) = notes.iter().position(|note| note.number == number && note.begun > 0) else {
            return;
        };
        notes[at].begun -= 1;
        if let Err(error) = self.keep(at, notes[at]) {
            log::error!("that a request is postponed could not be noted: {error}");
        }
    }

    fn wait_for_turn(&self) -> Turn {
        self.turn.0.send(()).expect("the other end is ours");
        Turn(self.turn.1.clone())
    }

    /// The requests that workers have begun [`MOST`] times.
    pub fn exhausted(&self) -> Vec<u64> {
        self.notes().iter().filter(|note| note.begun >= MOST).map(|note| note.number).collect()
    }

    fn notes(&self) -> MutexGuard<'_, [Note; NOTES]> {
        self.notes.lock().expect("no panic while the table is open")
    }

    fn is_noted(&self, number: u64) -> bool {
        self.notes().iter().any(|note| note.number == number && note.begun > 0)
    }

    fn note(&self, number: u64) -> Result<()> {
        let mut notes = self.notes();
        let known = notes.iter().position(|note| note.number == number);
        let oldest = || (0..NOTES).min_by_key(|at| notes[*at].number).expect("there are notes");
        let at = known.unwrap_or_else(oldest);
        let begun = known.map_or(0, |at| notes[at].begun) + 1;
        notes[at] = Note { number, begun };
        self.keep(at, notes[at])
    }

    fn keep(&self, at: usize, note: Note) -> Result<()> {
        tmpfs::write_at(&self.file, &note.encode(), (at * NOTE_BYTES) as u64).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file for the table, and a function that opens it as the next worker does.
    fn table() -> (tempfile::NamedTempFile, impl Fn(&Path) -> Attempts) {
        (tempfile::NamedTempFile::new().unwrap(), |path| Attempts::open(path).unwrap())
    }

    #[test]
    fn a_request_is_exhausted_by_as_many_workers_as_have_begun_it() {
        let (file, open) = table();
        for worker in 0..MOST {
            let attempts = open(file.path());
            assert_eq!(attempts.exhausted(), [], "worker {worker}");
            let turn = attempts.begin(7 | AGAIN);
            assert_eq!(turn.is_some(), worker > 0);
        }
        assert_eq!(open(file.path()).exhausted(), [7 | AGAIN]);
    }

    #[test]
    fn a_request_that_waits_for_a_thread_is_not_to_blame() {
        let (file, open) = table();
        for _ in 0..2 * MOST {
            let attempts = open(file.path());
            drop(attempts.begin(7 | AGAIN));
            attempts.postpone(7 | AGAIN);
        }
        assert_eq!(open(file.path()).exhausted(), []);
        open(file.path()).postpone(9); // a request that was sent for the first time has no note
    }

    #[test]
    fn a_request_that_is_sent_for_the_first_time_is_not_noted() {
        let (file, open) = table();
        for _ in 0..2 * MOST {
            assert!(open(file.path()).begin(7).is_none());
        }
        assert_eq!(open(file.path()).exhausted(), []);
    }

    #[test]
    fn the_oldest_request_makes_room_for_the_newest() {
        let (file, open) = table();
        for number in 1..=NOTES as u64 + 1 {
            open(file.path()).begin(number | AGAIN);
        }
        let attempts = open(file.path());
        assert!(attempts.begin(1 | AGAIN).is_none(), "the note about 1 had to go");
        assert!(attempts.begin(NOTES as u64 | AGAIN).is_some());
    }
}
