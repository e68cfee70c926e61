//! A thread that touches one place over and over.

use super::Answer;
use super::sys::Mapping;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

/// A thread that stores to one byte until it is stopped.
pub struct Hammer {
    progress: Arc<Progress>,
    thread: JoinHandle<(u64, u64)>,
}

impl Hammer {
    /// Starts a thread that stores `byte` at `offset`, or the byte that it loads there.
    pub fn start(mapping: Arc<Mapping>, offset: u64, byte: Option<u8>) -> Self {
        let progress = Arc::new(Progress::default());
        let thread = std::thread::spawn({
            let progress = progress.clone();
            move || progress.hammer(&mapping, offset, byte)
        });
        Self { progress, thread }
    }

    /// Counts the touches that begin from now on, until there are `touches` of them.
    pub fn tally(&self, touches: u32) -> Answer {
        let Tally { touches, faults, .. } = self.progress.tally(touches);
        Ok(format!("count {touches} {faults}"))
    }

    /// Ends the thread, and counts all of its touches.
    pub fn stop(self) -> Answer {
        self.progress.stop.store(true, Ordering::Relaxed);
        let (touches, faults) = self.thread.join().map_err(|_| "the hammer panicked".to_owned())?;
        Ok(format!("count {touches} {faults}"))
    }
}

/// Words between a hammer and its owner.
#[derive(Default)]
struct Progress {
    stop: AtomicBool,
    /// Raised to have the touches that begin from then on counted apart.
    epoch: AtomicU64,
    /// The latest [`Tally`], packed so that it is read as it was written.
    latest: AtomicU64,
}

/// Touches that began in one epoch; the counts stop at what fits.
#[derive(Clone, Copy, Default)]
struct Tally {
    epoch: u16,
    touches: u32,
    faults: u32,
}

impl Tally {
    const MOST: u32 = (1 << 24) - 1;

    fn count(&mut self, faulted: bool) {
        self.touches = (self.touches + 1).min(Self::MOST);
        self.faults = (self.faults + u32::from(faulted)).min(Self::MOST);
    }

    fn pack(self) -> u64 {
        u64::from(self.epoch) << 48 | u64::from(self.touches) << 24 | u64::from(self.faults)
    }

    fn unpack(packed: u64) -> Self {
        let field = |shift: u32| (packed >> shift) as u32 & Self::MOST;
        Self { epoch: (packed >> 48) as u16, touches: field(24), faults: field(0) }
    }
}

impl Progress {
    /// Touches until it is told to stop; returns how often, and how often that was SIGBUS.
    fn hammer(&self, mapping: &Mapping, offset: u64, byte: Option<u8>) -> (u64, u64) {
        let (mut touches, mut faults) = (0, 0);
        let mut latest = Tally::default();
        while !self.stop.load(Ordering::Relaxed) {
            let epoch = self.epoch.load(Ordering::SeqCst) as u16;
            let stored = byte.map_or_else(|| mapping.load(offset), Ok);
            let faulted = stored.and_then(|byte| mapping.store(offset, byte)).is_err();
            touches += 1;
            faults += u64::from(faulted);
            if latest.epoch != epoch {
                latest = Tally { epoch, ..Tally::default() };
            }
            latest.count(faulted);
            self.latest.store(latest.pack(), Ordering::SeqCst);
        }
        (touches, faults)
    }

    /// Waits for `touches` touches that begin from now on.
    fn tally(&self, touches: u32) -> Tally {
        let epoch = (self.epoch.fetch_add(1, Ordering::SeqCst) + 1) as u16;
        loop {
            let latest = Tally::unpack(self.latest.load(Ordering::SeqCst));
            if latest.epoch == epoch && latest.touches >= touches.min(Tally::MOST) {
                return latest;
            }
            std::thread::yield_now();
        }
    }
}
