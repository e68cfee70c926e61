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
//! memory back. The account has the pages ahead of each NUMA node, and users can have them: a
//! growth that finds its nodes full recalls all of them ([`Fs::recall_ready`]).
//!
//! The size of a new file is not known when it gets its object. So the shelf ([`shelf`]) has what
//! recent files of each directory have taken ([`history`]), and halves of what is free as long as
//! there are none. Each NUMA node has a steward, which makes the files whose memory begins there.
//!
//! **Locks**, in this order: the state, the table of objects. A steward holds `changing` of a file
//! while it clears a piece, and no other lock. It runs in the class SCHED_IDLE meanwhile. A thread
//! that recalls the file needs that lock, and makes the steward hurry first ([`Ready::hurry`]).

mod history;
mod shelf;

use super::{Fs, Object, Pace, RequestContext};
use crate::error::{Error, Result};
use crate::index::{Attributes, Kind};
use crate::options::Clear;
use crate::placement::Resolved;
use crate::pool::{Holding, PerNode};
use crate::sys::processors::{Idle, cpu_time, hurry};
use crate::units::{InodeId, NumaNode, Range};
use history::{History, Wish};
use rustix::thread::Pid;
use shelf::{Memory, Shelf, Work};
use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// New files whose size is not known yet, at most.
const MOST_NEW: usize = 4096;

/// A file that is new keeps the pages that it has not used for so long.
const PATIENCE: Duration = Duration::from_secs(1);

/// After a growth that has found the pool full, no file is made ready for so long.
const HELD_OFF: Duration = Duration::from_secs(2);

/// The generation of the numbers of ready files. The kernel draws those of inodes at random.
const GENERATION: u32 = u32::MAX;

/// The ready files, and what is known of new files.
pub struct Ready {
    is_on: bool,
    /// The part of a processor that a steward takes, in percent.
    percent: u32,
    number: AtomicU32,
    state: Mutex<State>,
    /// The threads of the stewards.
    stewards: Mutex<HashSet<Pid>>,
    /// The number of threads that wait for the stewards.
    waiting: AtomicU32,
    /// A steward can leave the class SCHED_IDLE again.
    can_idle: bool,
}

#[derive(Default)]
struct State {
    shelf: Shelf,
    new: HashMap<InodeId, New>,
    history: History,
    held_off: Option<Instant>,
}

/// A file that is new.
#[derive(Clone)]
struct New {
    since: Instant,
    directory: InodeId,
    /// The nodes of its memory if it gets its size from the thread that has made it.
    placement: Resolved,
}

impl State {
    /// True if pages are not to be made ready now.
    fn is_held_off(&self) -> bool {
        self.held_off.is_some_and(|since| since.elapsed() < HELD_OFF)
    }
}

impl Ready {
    pub fn new(clear: Clear, percent: u32) -> Self {
        let is_on = clear == Clear::Ahead;
        let can_idle = is_on && Idle::is_possible();
        if is_on && !can_idle {
            log::warn!("memory is cleared ahead at the cost of programs (no CAP_SYS_NICE?)");
        }
        // An earlier worker may have left ready files, which are not dismantled yet.
        let number = AtomicU32::new(std::process::id().wrapping_mul(1 << 10));
        let (state, stewards, waiting) = Default::default();
        Self { is_on, percent, number, state, stewards, waiting, can_idle }
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

    fn stewards(&self) -> MutexGuard<'_, HashSet<Pid>> {
        self.stewards.lock().expect("no panic while a thread is noted")
    }

    /// Runs `clear` in the class SCHED_IDLE, unless another thread waits for the end of it.
    fn idly<T>(&self, clear: impl FnOnce() -> T) -> T {
        let own = rustix::thread::gettid();
        self.stewards().insert(own);
        let idle = self.can_idle.then(Idle::enter).flatten();
        let _idle = idle.filter(|_| self.waiting.load(Ordering::SeqCst) == 0);
        clear()
    }

    /// The stewards run as any other thread until the result is dropped.
    fn hurry(&self) -> Hurry<'_> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        self.stewards().iter().for_each(|thread| hurry(*thread));
        Hurry(self)
    }
}

/// See [`Ready::hurry`].
pub struct Hurry<'a>(&'a Ready);

impl Drop for Hurry<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Fs {
    /// True if memory is cleared ahead of use.
    pub fn clears_ahead(&self) -> bool {
        self.ready.is_on
    }

    /// The stewards run as any other thread until the result is dropped. The caller waits for their
    /// end.
    pub fn hurry_stewards(&self) -> Hurry<'_> {
        self.ready.hurry()
    }

    /// The ready files, of which each takes a place that a new file can have.
    pub(super) fn ready_files(&self) -> u64 {
        self.ready.state().shelf.count() as u64
    }

    /// Pages on the shelf.
    pub(super) fn pages_ready(&self) -> u64 {
        self.ready.state().shelf.pages()
    }

    /// A regular file has been made in `directory`. It may get a ready file as its object.
    pub(super) fn note_new(&self, made: &Attributes, directory: InodeId, request: RequestContext) {
        if !self.ready.is_on || made.kind != Kind::File {
            return;
        }
        let has_choice = self.placer.has_choice();
        let placement = has_choice.then(|| self.placement_of_growth(made.node, 0, request));
        let placement = placement.and_then(Result::ok).unwrap_or_default();
        let mut state = self.ready.state();
        if state.new.len() < MOST_NEW {
            state.new.insert(made.node, New { since: Instant::now(), directory, placement });
        }
    }

    /// Makes a ready file the object of the new file `node`. `None` if there is none.
    pub(super) fn lend(&self, node: InodeId) -> Option<Arc<Object>> {
        if !self.ready.is_on {
            return None;
        }
        let mut state = self.ready.state();
        let new = state.new.get(&node)?;
        let number = state.shelf.best(state.history.latest(new.directory), &new.placement)?;
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
        state.shelf.remove(number);
        Some(object)
    }

    /// The file has got its size.
    pub(super) fn learn_size(&self, object: &Object) {
        if !self.ready.is_on {
            return;
        }
        let pages = self.pool.page_size().pages_up(object.summary().size);
        let mut state = self.ready.state();
        let new = state.new.get(&object.node()).filter(|_| pages > 0).cloned();
        if let Some(New { directory, placement, .. }) = new {
            state.history.learn(directory, Wish { pages, placement });
        }
    }

    /// Gives the pages ahead of all files back to the pool, as a growth has found it full, or as
    /// the kernel has met a memory error. Returns true if there were some.
    pub fn recall_ready(&self) -> bool {
        if !self.ready.is_on || self.pool.balance().ahead == 0 {
            return false;
        }
        let _hurry = self.ready.hurry();
        self.ready.state().held_off = Some(Instant::now());
        for object in self.all_objects().iter().filter(|object| object.summary().ahead > 0) {
            match object.node() {
                number if Ready::is_number(number) => self.strand(number),
                node => self.return_pages_of(node),
            }
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
        self.ready.state().shelf.remove(number);
        let mut stranded = self.stranded();
        if let Some(object) = self.objects().remove(&number) {
            object.note_orphaned();
            stranded.push(object);
        }
    }

    /// A round of the steward of the NUMA node `on`: returns what new files have not used, and does
    /// one piece of work on the shelf. Returns true if more is to be done.
    ///
    /// # Errors
    /// The errors of making a file, and of moving memory.
    pub fn tend_shelf(&self, on: NumaNode, pace: &Pace) -> Result<bool> {
        self.tend_new_files();
        match self.plan_shelf(on) {
            Work::Make(_) if self.ready.state().is_held_off() => Ok(false),
            Work::Make(wish) => self.make_ready(wish, pace),
            Work::Empty(number) => {
                self.strand(number);
                self.dismantle_stranded().map(|()| true)
            }
            Work::Nothing => Ok(false),
        }
    }

    fn plan_shelf(&self, on: NumaNode) -> Work {
        let balances = self.pool.balances();
        let free: PerNode =
            balances.iter().map(|(node, account)| (node, account.available())).collect();
        let state = self.ready.state();
        state.shelf.plan(on, &free, &state.history)
    }

    /// True if the stewards have work, or will have some when memory is back that is on its way.
    pub(super) fn is_getting_ready(&self) -> bool {
        let has_work = |node: &NumaNode| self.plan_shelf(*node) != Work::Nothing;
        self.ready.is_on
            && (self.ready.state().shelf.is_making()
                || self.is_dismantling()
                || self.nodes.iter().any(has_work))
    }

    fn tend_new_files(&self) {
        let is_old = |_: &InodeId, new: &mut New| new.since.elapsed() >= PATIENCE;
        let old: Vec<InodeId> =
            self.ready.state().new.extract_if(is_old).map(|(node, _)| node).collect();
        old.into_iter().for_each(|node| self.return_pages_of(node));
    }

    /// Makes a file ready, piece by piece. Returns false if it was recalled meanwhile.
    fn make_ready(&self, mut wish: Wish, pace: &Pace) -> Result<bool> {
        wish.placement.strict = true; // elsewhere it would serve nobody
        let number = self.ready.next_number();
        let mut holding = self.places.make(number, || Holding::create(self.pool.page_size()))?;
        let object = {
            let mut state = self.ready.state();
            let mut objects = self.objects(); // held, so that a check sees the pages exactly once
            let owned = match state.is_held_off() {
                true => Err(Error::Full), // a growth needs the pages that are free now
                false => holding.own_ahead(&self.pool, wish.pages, &wish.placement),
            };
            let homes = owned.inspect_err(|_| self.places.remove(number))?;
            let object = Arc::new(Object::new(number, holding, self.orphaned()));
            objects.insert(number, object.clone());
            state.shelf.begin(number, Memory(homes));
            object
        };
        let filled = self.fill(object, pace);
        let is_ready = matches!(filled, Ok(true));
        {
            let mut state = self.ready.state();
            let is_there = self.objects().contains_key(&number);
            state.shelf.end(number, is_ready && is_there);
        }
        if !is_ready {
            self.strand(number);
        }
        filled
    }

    /// Fills a ready file. Between two pieces the thread rests, so that it takes its part of a
    /// processor only. Returns false if the file's pages were recalled meanwhile. It consumes the
    /// steward's share of the object: only an object that the table alone has can be lent.
    fn fill(&self, object: Arc<Object>, pace: &Pace) -> Result<bool> {
        let clear = |range: Range| self.ready.idly(|| object.clear_behind_end(range));
        let percent = self.ready.percent;
        loop {
            let begun = cpu_time();
            let is_full = !object.fill_ahead(&self.pool, clear)?;
            if self.known_object(object.node()).is_none() {
                return Ok(false);
            }
            if is_full {
                return Ok(true);
            }
            pace.go_on()?;
            std::thread::sleep((cpu_time() - begun) * (100 - percent) / percent);
            self.tend_new_files();
        }
    }

    /// The files that another worker has lent, and whose pages ahead have to go back.
    pub(super) fn note_lent(&self) {
        let objects = self.all_objects();
        let lent = objects.iter().filter(|object| object.summary().ahead > 0);
        let (since, directory, placement) = (Instant::now(), InodeId::ROOT, Resolved::default());
        let new = New { since, directory, placement };
        self.ready.state().new.extend(lent.map(|object| (object.node(), new.clone())));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_a_ready_file_is_told_from_an_inodes() {
        assert!(Ready::is_number(InodeId::from_parts(GENERATION, 7)));
        assert!(!Ready::is_number(InodeId::from_parts(GENERATION - 1, 7)));
    }
}
