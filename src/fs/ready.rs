//! Ready files: objects without a name whose memory is cleared ahead of use (option `clear=`).
//!
//! ```text
//!   steward: make ----> on the shelf ----> lent: the object of a file that is new
//!              |            |                  |  ftruncate: the end of file moves over the memory
//!              |            |                  v
//!              +---------> pages go back <---- the rest, after a moment
//! ```
//!
//! A ready file has a place and is in the table of objects, under a number that no inode has. So a
//! worker that finds it after a death takes it for the object of a file that is gone, and gives its
//! memory back. The pages ahead count as free for users: a growth that finds the pool full recalls
//! all of them ([`Fs::recall_ready`]).
//!
//! The size of a new file is not known when it gets its object. So the shelf has the sizes that
//! recent files have got, and halves of what is free as long as there are none.

use super::{Fs, Object, Pace};
use crate::error::{Error, Result};
use crate::options::Clear;
use crate::pool::{Holding, Progress};
use crate::units::InodeId;
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Files on the shelf, at most.
const MOST_FILES: usize = 8;

/// Sizes that are remembered.
const MOST_SIZES: usize = 8;

/// A file that is new keeps the pages that it has not used for so long.
const PATIENCE: Duration = Duration::from_secs(1);

/// After a growth that has found the pool full, no file is made ready for so long.
const HELD_OFF: Duration = Duration::from_secs(2);

/// The generation of the numbers of ready files. The kernel draws those of inodes at random.
const GENERATION: u32 = u32::MAX;

/// The ready files, and what is known of new files.
pub struct Ready {
    is_on: bool,
    number: AtomicU32,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The pages of each file on the shelf.
    shelf: HashMap<InodeId, u64>,
    /// The file that is being made.
    unfinished: Option<InodeId>,
    /// New files, and the time at which each got its object.
    new: HashMap<InodeId, Instant>,
    /// The pages that files have got, the latest first.
    sizes: VecDeque<u64>,
    held_off: Option<Instant>,
}

/// The next work on the shelf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    /// A file of so many pages is made ready.
    Make(u64),
    /// The pages of a file go back.
    Empty(InodeId),
    Nothing,
}

impl State {
    /// Chooses the next work, if `free` pages are free besides those on the shelf. Half of all
    /// these pages may be on the shelf.
    fn plan(&self, free: u64) -> Work {
        let on_shelf: u64 = self.shelf.values().sum();
        let most = (free + on_shelf) / 2;
        let mut unwanted = self.shelf.clone();
        let mut missing = None;
        for pages in self.wanted(most) {
            let has = unwanted.iter().find(|(_, has)| **has == pages).map(|(node, _)| *node);
            match has.map(|node| unwanted.remove(&node)) {
                Some(_) => {}
                None => missing = missing.or(Some(pages)),
            }
        }
        let misfit = unwanted.iter().max_by_key(|(_, pages)| **pages).map(|(node, _)| *node);
        match (missing, misfit) {
            (Some(pages), Some(_)) if on_shelf + pages <= most => Work::Make(pages),
            (_, Some(node)) if on_shelf > most || missing.is_some() => Work::Empty(node),
            (Some(pages), None) if pages <= free => Work::Make(pages),
            _ => Work::Nothing,
        }
    }

    /// The sizes that the shelf should have, in pages, all together at most `most`.
    fn wanted(&self, most: u64) -> Vec<u64> {
        let mut wanted = Vec::new();
        let mut left = most;
        if self.sizes.is_empty() {
            while left / 2 > 0 && wanted.len() < MOST_FILES {
                wanted.push(left / 2);
                left -= left / 2;
            }
            return wanted;
        }
        for pages in self.sizes.iter().cycle().take(MOST_FILES) {
            if *pages <= left {
                wanted.push(*pages);
                left -= *pages;
            }
        }
        wanted
    }

    /// The file on the shelf for a new file: the smallest that has the pages of the latest file, or
    /// the largest.
    fn best(&self) -> Option<InodeId> {
        let enough = self.sizes.front().copied().unwrap_or(u64::MAX);
        let fits = self.shelf.iter().filter(|(_, pages)| **pages >= enough);
        let fit = fits.min_by_key(|(_, pages)| **pages);
        fit.or_else(|| self.shelf.iter().max_by_key(|(_, pages)| **pages)).map(|(node, _)| *node)
    }

    /// The files that may have pages ahead.
    fn files_ahead(&self) -> Vec<InodeId> {
        let ready = self.shelf.keys().chain(&self.unfinished);
        ready.chain(self.new.keys()).copied().collect()
    }

    fn learn(&mut self, pages: u64) {
        if pages > 0 {
            self.sizes.push_front(pages);
            self.sizes.truncate(MOST_SIZES);
        }
    }
}

impl Ready {
    pub fn new(clear: Clear, is_alone: bool) -> Self {
        let is_on = clear == Clear::Ahead && is_alone;
        if clear == Clear::Ahead && !is_alone {
            // The pages of a file have to lie on the nodes of its placement.
            log::warn!("no memory is cleared ahead on a machine of several NUMA nodes");
        }
        // An earlier worker may have left ready files, which are not dismantled yet.
        let number = AtomicU32::new(std::process::id().wrapping_mul(1 << 10));
        Self { is_on, number, state: Mutex::default() }
    }

    fn next_number(&self) -> InodeId {
        InodeId::from_parts(GENERATION, self.number.fetch_add(1, Ordering::Relaxed))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while the shelf is open")
    }

    /// True if `node` is the number of a ready file.
    pub fn is_number(node: InodeId) -> bool {
        node.parts().0 == GENERATION
    }
}

impl Fs {
    /// True if memory is cleared ahead of use.
    pub fn clears_ahead(&self) -> bool {
        self.ready.is_on
    }

    /// Pages ahead of all files: users can have them.
    pub(super) fn pages_ahead(&self) -> u64 {
        if !self.ready.is_on {
            return 0;
        }
        let nodes = self.ready.state().files_ahead();
        let objects = self.objects();
        nodes.iter().filter_map(|node| objects.get(node)).map(|object| object.summary().ahead).sum()
    }

    /// The ready files, of which each takes a place that a new file can have.
    pub(super) fn ready_files(&self) -> u64 {
        let state = self.ready.state();
        (state.shelf.len() + usize::from(state.unfinished.is_some())) as u64
    }

    /// Pages on the shelf.
    pub(super) fn pages_ready(&self) -> u64 {
        self.ready.state().shelf.values().sum()
    }

    /// Makes a ready file the object of the new file `node`. `None` if there is none.
    pub(super) fn lend(&self, node: InodeId) -> Option<Arc<Object>> {
        if !self.ready.is_on {
            return None;
        }
        let mut state = self.ready.state();
        state.new.insert(node, Instant::now());
        let number = state.best()?;
        let mut objects = self.objects(); // held, so that a check sees the pages exactly once
        let ready = match Arc::try_unwrap(objects.remove(&number)?) {
            Ok(ready) => ready,
            Err(shared) => {
                objects.insert(number, shared); // another thread looks at it
                return None;
            }
        };
        let moved = self.places.rename(number, node);
        let is_lent = moved.inspect_err(|error| log::debug!("no ready file is lent: {error}"));
        let owner = if is_lent.is_ok() { node } else { number };
        let object = Arc::new(Object::new(owner, ready.into_holding(), self.orphaned()));
        objects.insert(owner, object.clone());
        if is_lent.is_err() {
            return None;
        }
        state.shelf.remove(&number);
        Some(object)
    }

    /// The file has got its size.
    pub(super) fn learn_size(&self, object: &Object) {
        if self.ready.is_on {
            let pages = self.pool.page_size().pages_up(object.summary().size);
            let mut state = self.ready.state();
            if state.new.contains_key(&object.node()) {
                state.learn(pages);
            }
        }
    }

    /// The result of a change that may have found the pool full: it has pages as long as some lie
    /// ahead of files.
    pub(super) fn with_pages_ahead<T>(&self, result: Result<T>) -> Result<T> {
        match result {
            Err(Error::Full) if self.pages_ahead() > 0 => Err(Error::Returning),
            result => result,
        }
    }

    /// Gives the pages ahead of all files back to the pool, as a growth has found it full. Returns
    /// true if there were some.
    pub fn recall_ready(&self) -> bool {
        if !self.ready.is_on || self.pages_ahead() == 0 {
            return false;
        }
        let nodes = {
            let mut state = self.ready.state();
            state.held_off = Some(Instant::now());
            let nodes = state.files_ahead();
            state.new.clear();
            nodes
        };
        for node in nodes {
            if Ready::is_number(node) { self.strand(node) } else { self.return_pages_of(node) }
        }
        self.dismantle_stranded_or_warn();
        true
    }

    fn return_pages_of(&self, node: InodeId) {
        if let Some(object) = self.known_object(node)
            && let Err(error) = object.return_ahead(&self.pool)
        {
            log::debug!("file {node}: it keeps pages that it does not use: {error}");
        }
    }

    /// A ready file is none any more: its memory goes back.
    fn strand(&self, number: InodeId) {
        self.ready.state().shelf.remove(&number);
        let mut stranded = self.stranded();
        if let Some(object) = self.objects().remove(&number) {
            object.note_orphaned();
            stranded.push(object);
        }
    }

    /// A round of the steward: returns what new files have not used, and does one piece of work on
    /// the shelf. Returns true if more is to be done.
    ///
    /// # Errors
    /// The errors of making a file, and of moving memory.
    pub fn tend_shelf(&self, pace: &Pace) -> Result<bool> {
        self.tend_new_files();
        let (plan, is_held_off) = {
            let state = self.ready.state();
            let is_held_off = state.held_off.is_some_and(|since| since.elapsed() < HELD_OFF);
            (state.plan(self.pool.balance().available()), is_held_off)
        };
        match plan {
            Work::Make(pages) if !is_held_off => self.make_ready(pages, pace),
            Work::Empty(number) => {
                self.strand(number);
                self.dismantle_stranded().map(|()| true)
            }
            _ => Ok(false),
        }
    }

    fn tend_new_files(&self) {
        let old: Vec<InodeId> = {
            let state = self.ready.state();
            let is_old = |(_, since): &(&InodeId, &Instant)| since.elapsed() >= PATIENCE;
            state.new.iter().filter(is_old).map(|(node, _)| *node).collect()
        };
        for node in old {
            self.return_pages_of(node);
            self.ready.state().new.remove(&node);
        }
    }

    /// Makes a file of `pages` pages ready, piece by piece. Returns false if it was recalled
    /// meanwhile.
    fn make_ready(&self, pages: u64, pace: &Pace) -> Result<bool> {
        let number = self.ready.next_number();
        let object = {
            let mut objects = self.objects(); // held, so that a check sees the pages exactly once
            let holding = Holding::create(self.pool.page_size());
            let mut holding = self.places.make(number, || holding)?;
            if let Err(error) = holding.own_ahead(&self.pool, pages) {
                self.places.remove(number);
                return Err(error);
            }
            let object = Arc::new(Object::new(number, holding, self.orphaned()));
            objects.insert(number, object.clone());
            object
        };
        self.ready.state().unfinished = Some(number);
        let filled = self.fill(&object, pace);
        self.ready.state().unfinished = None;
        let is_ready = matches!(filled, Ok(true));
        if is_ready {
            let mut state = self.ready.state();
            if self.objects().contains_key(&number) {
                state.shelf.insert(number, pages);
            }
        } else {
            self.strand(number);
        }
        filled
    }

    /// Fills a ready file. Between two pieces the thread rests, so that it takes a part of a
    /// processor only. Returns false if the file's pages were recalled meanwhile.
    fn fill(&self, object: &Object, pace: &Pace) -> Result<bool> {
        const RESTS: u32 = 1;
        loop {
            let begun = Instant::now();
            let progress = object.fill_ahead(&self.pool)?;
            if self.known_object(object.node()).is_none() {
                return Ok(false);
            }
            if progress == Progress::Done {
                return Ok(true);
            }
            pace.go_on()?;
            std::thread::sleep(begun.elapsed() * RESTS);
            self.tend_new_files();
        }
    }

    /// The files that another worker has lent, and whose pages ahead have to go back.
    pub(super) fn note_lent(&self) {
        let objects = self.all_objects();
        let lent = objects.iter().filter(|object| object.summary().ahead > 0);
        let mut state = self.ready.state();
        state.new.extend(lent.map(|object| (object.node(), Instant::now())));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(shelf: &[u64], sizes: &[u64]) -> State {
        let numbered = (1..).map(InodeId).zip(shelf.iter().copied());
        State {
            shelf: numbered.collect(),
            sizes: sizes.iter().copied().collect(),
            ..State::default()
        }
    }

    #[test]
    fn the_shelf_gets_halves_until_sizes_are_known() {
        assert_eq!(state(&[], &[]).plan(100), Work::Make(25));
        assert_eq!(state(&[25], &[]).plan(75), Work::Make(12));
        assert_eq!(state(&[25, 12], &[]).plan(63), Work::Make(6));
        assert_eq!(state(&[], &[]).plan(1), Work::Nothing);
        assert_eq!(state(&[], &[]).plan(4), Work::Make(1));
    }

    #[test]
    fn the_shelf_gets_the_sizes_of_recent_files() {
        assert_eq!(state(&[], &[16]).plan(100), Work::Make(16));
        assert_eq!(state(&[16], &[16]).plan(84), Work::Make(16));
        assert_eq!(state(&[16, 16, 16], &[16]).plan(52), Work::Nothing, "half is on the shelf");
        assert_eq!(state(&[16], &[4, 16]).plan(84), Work::Make(4));
        assert_eq!(state(&[], &[200]).plan(100), Work::Nothing, "it is larger than half");
    }

    #[test]
    fn what_does_not_fit_makes_room() {
        assert_eq!(state(&[25], &[50]).plan(75), Work::Empty(InodeId(1)));
        assert_eq!(state(&[25], &[16]).plan(75), Work::Make(16), "there is room beside it");
        assert_eq!(state(&[25, 16], &[16]).plan(9), Work::Empty(InodeId(1)), "too much is ready");
    }

    #[test]
    fn a_new_file_gets_what_the_latest_one_has_taken() {
        assert_eq!(state(&[], &[16]).best(), None);
        assert_eq!(state(&[25, 16, 12], &[16]).best(), Some(InodeId(2)));
        assert_eq!(state(&[25, 12], &[16]).best(), Some(InodeId(1)));
        assert_eq!(state(&[8, 12], &[16]).best(), Some(InodeId(2)), "the largest");
        assert_eq!(state(&[8, 12], &[]).best(), Some(InodeId(2)));
    }

    #[test]
    fn the_number_of_a_ready_file_is_told_from_an_inodes() {
        assert!(Ready::is_number(InodeId::from_parts(GENERATION, 7)));
        assert!(!Ready::is_number(InodeId::from_parts(GENERATION - 1, 7)));
    }
}
