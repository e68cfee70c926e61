//! The pool: the memory that was taken at the mount, and the owners of its pages.
//!
//! ```text
//!   free pages --reserve()--> Token --hand_over()--> pages of a Holding --release()--> free pages
//!       ^                       | drop                                                  |
//!       +-----------------------+                                                       |
//!       +-------------------------------------------------------------------------------+
//! ```
//!
//! > **P1.** Pages of holdings + pages of tokens + free pages = the pool's size. And: memory of the
//! > reserves + memory of the `data` of all files + short bytes = the pool's size in bytes + the
//! > float. The second sum does not count the one piece that is moving ([`moves`]).
//!
//! The account counts pages. It is a mutex that a thread holds for an addition only; memory
//! (folios) moves outside of it. A [`Token`] stands for pages that are promised to its owner alone,
//! so taking from a token cannot fail for want of space. A file owns its pages whole. But the
//! memory behind the 2 MiB folio with the end of file stays in the reserve: no program can reach
//! memory there, and no program may reach memory that the kernel has not cleared (see
//! [`crate::sealed`]).
//!
//! **Moves.** Memory goes from one sealed file to another in pieces: the source gives a piece, then
//! the target takes as much. If another process takes the memory between the two, the *float* has
//! lost it. The float belongs to no page ([`moves`]).
//!
//! **A death in between.** The reserves are mounted at [`RESERVES`], and the intended size of the
//! pool is noted there. A growth notes the new size once the memory is there; a shrinking notes it
//! before any memory goes. So the worker that opens the pool next ([`Pool::open`]) finds one of
//! three states:
//! - the memory that the size demands;
//! - more, which the worker gives back to the machine;
//! - a piece less, which the worker takes from the machine when that has some.
//!
//! **Locks**, in this order: the pool's size, a file's own lock (the caller takes it), the piece
//! that moves, the reserves in the order of their NUMA nodes, the account. A thread waits for pages
//! ([`Pool::patiently`]) with no lock but the first.

mod holding;
mod moves;
mod recovery;
mod shares;

pub use holding::{Change, Holding, Progress};
pub use moves::{PIECE, float_of};
pub use recovery::RESERVES;

use crate::error::{Error, Result};
use crate::sealed::{Reach, Sealed};
use crate::steps::{self, Step};
use crate::sys::{self, refuse_more_than_available};
use crate::units::{FOLIO_SIZE, NumaNode, PageSize, Range};
use shares::Node;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// The most memory that the pool takes from the machine, or gives back to it, in one step of a
/// resize.
pub const STEP: u64 = 64 << 20;

/// Naps while the pool waits for one more page of unlinked files, and the length of a nap. The
/// kernel reports by itself that the last user of such a file is gone (FORGET), but only after
/// unlink(2) has returned. The wait counts naps, not time: on a busy machine the thread that brings
/// the page runs late, and each nap takes longer, too.
const RECLAIM_NAPS: u32 = 20;
const RECLAIM_NAP: Duration = Duration::from_millis(10);

/// The limit of the whole wait, for the case that pages come back all the time and other callers
/// take them first.
const RECLAIM_LIMIT: Duration = Duration::from_secs(5);

/// The pool.
#[derive(Debug)]
pub struct Pool {
    page_size: PageSize,
    reserves: Vec<Reserve>,
    account: Mutex<Account>,
    /// Signalled when the number of free pages grows.
    freed: Condvar,
    /// Held during a resize of the pool.
    resizing: Mutex<()>,
    /// Held during the move of a piece.
    moving: Mutex<()>,
    /// The reserves are mounted at [`RESERVES`].
    outlives_us: bool,
    huge_at_mount: u64,
}

/// Free memory, taken from one NUMA node. Where that node was full, the kernel took memory of
/// another one: see [`moves`].
#[derive(Debug)]
struct Reserve {
    node: NumaNode,
    sealed: Mutex<Sealed>,
    /// The reserve's size when the lock was last released.
    bytes: AtomicU64,
}

/// A reserve, locked.
struct Opened<'a> {
    reserve: &'a Reserve,
    sealed: MutexGuard<'a, Sealed>,
}

impl Deref for Opened<'_> {
    type Target = Sealed;

    fn deref(&self) -> &Sealed {
        &self.sealed
    }
}

impl DerefMut for Opened<'_> {
    fn deref_mut(&mut self) -> &mut Sealed {
        &mut self.sealed
    }
}

impl Drop for Opened<'_> {
    fn drop(&mut self) {
        self.reserve.bytes.store(self.sealed.size(), Ordering::Relaxed);
    }
}

/// The account: pages, and the bytes that the pool lacks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Account {
    /// The pool's size.
    pub total: u64,
    /// Pages without an owner.
    pub free: u64,
    /// Pages that are promised.
    pub reserved: u64,
    /// Pages of unlinked files. Holdings have them.
    pub orphaned: u64,
    /// Pages of live tokens. With the pages that holdings keep reserved ([`Token::keep`]), they
    /// make up `reserved`.
    in_tokens: u64,
    /// The number of times that pages have become free.
    returns: u64,
    /// Bytes that the pool lacks of its pages and its float.
    pub short: u64,
    /// Free pages that the pool does not hand out, because more is short than the float.
    pub missing: u64,
}

/// The sum over all holdings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Pages of the files.
    pub pages: u64,
    /// Bytes of memory.
    pub bytes: u64,
    /// Pages that stay reserved because their memory is stuck in a holding.
    pub stuck: u64,
}

impl std::iter::Sum for Held {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |sum, held| Self {
            pages: sum.pages + held.pages,
            bytes: sum.bytes + held.bytes,
            stuck: sum.stuck + held.stuck,
        })
    }
}

impl Account {
    fn give_back(&mut self, pages: u64) {
        self.free += pages;
        self.returns += u64::from(pages > 0);
    }

    /// Free pages that the pool can hand out.
    pub fn available(&self) -> u64 {
        self.free.saturating_sub(self.missing)
    }

    /// Pages that holdings have.
    pub fn held(&self) -> u64 {
        self.total - self.free - self.reserved
    }

    fn assert_sound(&self) {
        let owned = self.free.checked_add(self.reserved).expect("pages are counted");
        assert!(owned <= self.total, "more pages than the pool has: {self:?}");
        assert!(self.in_tokens <= self.reserved, "a token without pages: {self:?}");
        assert!(self.missing == 0 || self.short > 0, "pages are missing, and no memory: {self:?}");
    }
}

/// The account, open for a change. The pages add up when the change begins and when it ends.
struct Books<'a>(MutexGuard<'a, Account>);

impl Deref for Books<'_> {
    type Target = Account;

    fn deref(&self) -> &Account {
        &self.0
    }
}

impl DerefMut for Books<'_> {
    fn deref_mut(&mut self) -> &mut Account {
        &mut self.0
    }
}

impl Drop for Books<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.0.assert_sound();
        }
    }
}

/// Pages that are promised to the token's owner. Dropping the token gives them back.
#[derive(Debug)]
pub struct Token<'pool> {
    pool: &'pool Pool,
    pages: u64,
}

impl Token<'_> {
    /// `pages` of the token's pages become a holding's. A negative number goes the other way.
    fn hand_over(&mut self, pages: i64) {
        let mut account = self.pool.account();
        account.reserved =
            account.reserved.checked_add_signed(-pages).expect("no more than there are");
        account.in_tokens =
            account.in_tokens.checked_add_signed(-pages).expect("no more than there are");
        self.pages = self.pages.checked_add_signed(-pages).expect("no more than there are");
    }

    /// Keeps the pages reserved without a token. [`Pool::token_of_kept`] makes a token for them
    /// again.
    fn keep(mut self) -> u64 {
        let pages = std::mem::take(&mut self.pages);
        self.pool.account().in_tokens -= pages;
        pages
    }

    /// Removes the pages from the pool.
    fn destroy(mut self) {
        let pages = std::mem::take(&mut self.pages);
        let mut account = self.pool.account();
        account.reserved -= pages;
        account.in_tokens -= pages;
        let left = account.total - pages;
        account.set_total(left, self.pool.page_size.bytes());
    }
}

impl Drop for Token<'_> {
    fn drop(&mut self) {
        let mut account = self.pool.account();
        account.reserved -= self.pages;
        account.in_tokens -= self.pages;
        account.give_back(self.pages);
        self.pool.freed.notify_all();
    }
}

impl Pool {
    /// Takes `pages` pages from the machine, evenly from its NUMA nodes as far as these have room
    /// ([`shares`]). Tells `progress` the number of bytes that are taken so far.
    ///
    /// # Errors
    /// [`Error::NoMemory`] where the machine cannot give that much, and the errors of `progress`.
    /// The memory that was taken is given back.
    pub fn fill(
        page_size: PageSize,
        pages: u64,
        mut progress: impl FnMut(u64) -> Result<()>,
    ) -> Result<Self> {
        let total = pages * page_size.bytes();
        let all = total + float_of(total);
        refuse_more_than_available(all)?;
        let nodes = sys::numa::memory_nodes()?;
        let mut reserves = Vec::new();
        for node in &nodes {
            let preferred = (nodes.len() > 1).then_some(*node);
            let sealed = Sealed::create(Reach::Private, preferred)?;
            reserves.push(Reserve::new(*node, sealed));
        }
        let mut taken = 0;
        for (reserve, bytes) in shares_of(&reserves, all, page_size)? {
            reserve.grow(bytes, |step| {
                taken += step;
                log::debug!("{taken} bytes taken");
                progress(taken.min(total))
            })?;
        }
        Ok(Self::on(
            page_size,
            reserves,
            Account { total: pages, free: pages, ..Account::default() },
        ))
    }

    /// A pool with these reserves and this account. It ends with the process.
    fn on(page_size: PageSize, reserves: Vec<Reserve>, account: Account) -> Self {
        let (account, freed) = (Mutex::new(account), Condvar::new());
        let (resizing, moving) = (Mutex::default(), Mutex::default());
        Self {
            page_size,
            reserves,
            account,
            freed,
            resizing,
            moving,
            outlives_us: false,
            huge_at_mount: 0,
        }
    }

    /// The size of the pool's pages.
    pub fn page_size(&self) -> PageSize {
        self.page_size
    }

    /// The state of the account.
    pub fn balance(&self) -> Account {
        *self.account()
    }

    /// NUMA node and bytes of each reserve, as of the end of the last move.
    pub fn reserves(&self) -> Vec<(NumaNode, u64)> {
        let row = |reserve: &Reserve| (reserve.node, reserve.bytes.load(Ordering::Relaxed));
        self.reserves.iter().map(row).collect()
    }

    fn account(&self) -> Books<'_> {
        let account = self.account.lock().expect("no panic while the account is open");
        account.assert_sound();
        Books(account)
    }

    /// Reserves `pages` pages: all or none.
    ///
    /// # Errors
    /// [`Error::Full`]; or [`Error::Returning`] where the pages of unlinked files would suffice.
    pub fn reserve(&self, pages: u64) -> Result<Token<'_>> {
        let mut account = self.account();
        if account.available() < pages {
            let hopeful = account.available() + account.orphaned >= pages;
            return Err(if hopeful { Error::Returning } else { Error::Full });
        }
        account.free -= pages;
        account.reserved += pages;
        account.in_tokens += pages;
        Ok(Token { pool: self, pages })
    }

    /// A token for pages that [`Token::keep`] left reserved.
    fn token_of_kept(&self, pages: u64) -> Token<'_> {
        self.account().in_tokens += pages;
        Token { pool: self, pages }
    }

    /// Repeats `request` as long as its error is [`Error::Returning`] and pages do come back.
    ///
    /// The caller holds no lock, and its thread is not one that gives pages back.
    ///
    /// # Errors
    /// The last error of `request`.
    pub fn patiently<T>(&self, mut request: impl FnMut() -> Result<T>) -> Result<T> {
        let limit = Instant::now() + RECLAIM_LIMIT;
        loop {
            let seen = self.account().returns;
            match request() {
                Err(Error::Returning) if Instant::now() < limit && self.wait_for_return(seen) => {}
                result => return result,
            }
        }
    }

    /// Waits for free pages. True if some became free after the caller had `seen` this count of
    /// returns.
    fn wait_for_return(&self, seen: u64) -> bool {
        let mut account = self.account.lock().expect("no panic while the account is open");
        for _ in 0..RECLAIM_NAPS {
            let silent = |account: &mut Account| account.returns == seen;
            let napped = self.freed.wait_timeout_while(account, RECLAIM_NAP, silent);
            account = napped.expect("no panic while the account is open").0;
            if account.returns != seen {
                return true;
            }
        }
        false
    }

    /// A holding has given up `pages` pages. Their memory is back in the reserves.
    fn release(&self, pages: u64) {
        self.account().give_back(pages);
        self.freed.notify_all();
    }

    /// `pages` more pages belong to unlinked files. A negative number means fewer.
    fn note_orphaned(&self, pages: i64) {
        let mut account = self.account();
        account.orphaned = account.orphaned.saturating_add_signed(pages);
    }

    /// Changes the pool's size while it is in use.
    ///
    /// # Errors
    /// [`Error::Busy`] for a size below the pages in use, [`Error::NoMemory`] for more than the
    /// machine can give. The size is as before.
    pub fn resize(&self, pages: u64) -> Result<()> {
        let _one_at_a_time = self.keep_size();
        let before = self.balance().total;
        if pages >= before {
            return self.enlarge(pages - before);
        }
        let token = self.patiently(|| self.reserve(before - pages)).map_err(|_| {
            Error::Busy("more pages are in use than the pool would have; remove files first")
        })?;
        self.note_size(pages)?;
        steps::reached(Step::ReduceNoted);
        let surplus = self.bytes_of(before) - self.bytes_of(pages);
        let lacked = self.lack_less(surplus);
        if let (cut, Err(error)) = self.cut_reserves(surplus - lacked) {
            self.note_short(lacked + cut);
            self.note_size(before)?;
            return Err(error);
        }
        steps::reached(Step::ReduceCut);
        token.destroy();
        Ok(())
    }

    /// Gives `bytes` of the reserves back to the machine. They are promised to no file. Returns the
    /// number of bytes that were given.
    fn cut_reserves(&self, bytes: u64) -> (u64, Result<()>) {
        let mut left = bytes;
        while left > 0 {
            let (_, mut richest) = self.lock_richest();
            let step = left.min(STEP).min(richest.size());
            let size = richest.size() - step;
            let cut =
                if step > 0 { moves::shorten(&mut richest, size) } else { Err(Error::NoMemory) };
            if cut.is_err() {
                return (bytes - left, cut);
            }
            left -= step;
        }
        (bytes, Ok(()))
    }

    /// Gives `bytes`, which the pool has too many, back to the machine. The next worker gives back
    /// what remains.
    fn give_surplus(&self, bytes: u64) {
        if let (given, Err(error)) = self.cut_reserves(bytes) {
            log::warn!("the pool has {} bytes too many: {error}", bytes - given);
        }
    }

    /// Takes `bytes` from the machine for the reserves.
    fn grow_reserves(&self, bytes: u64) -> Result<()> {
        refuse_more_than_available(bytes)?;
        let mut added = 0;
        let grown = shares_of(&self.reserves, bytes, self.page_size)?.into_iter().try_for_each(
            |(reserve, share)| {
                reserve.grow(share, |step| {
                    added += step;
                    Ok(())
                })
            },
        );
        if grown.is_err() {
            log::warn!(
                "the machine has no memory for {bytes} bytes more; {added} bytes are given back"
            );
            self.cut_reserves(added).1?;
        }
        grown
    }

    fn enlarge(&self, pages: u64) -> Result<()> {
        let (before, after) = (self.balance().total, self.balance().total + pages);
        let more = self.bytes_of(after) - self.bytes_of(before);
        self.grow_reserves(more)?;
        steps::reached(Step::EnlargeGrown);
        if let Err(error) = self.note_size(after) {
            self.cut_reserves(more).1?;
            return Err(error);
        }
        steps::reached(Step::EnlargeNoted);
        let mut account = self.account();
        account.set_total(after, self.page_size.bytes());
        account.give_back(pages);
        self.freed.notify_all();
        Ok(())
    }

    /// True if the next move has to wait: for another move, for a reserve, or for memory that the
    /// pool lacks.
    pub fn move_must_wait(&self) -> bool {
        self.moving.try_lock().is_err()
            || self.reserves.iter().any(|reserve| reserve.sealed.try_lock().is_err())
            || self.is_float_used_up()
    }

    /// Looks for memory errors in the free memory and replaces each bad subpage, so that no file
    /// ever gets one. Works in steps, so that no other thread waits for long. Returns the number of
    /// subpages replaced.
    ///
    /// # Errors
    /// [`Error::NoMemory`].
    pub fn replace_bad(&self) -> Result<u64> {
        let mut replaced = 0;
        for reserve in &self.reserves {
            let mut at = 0;
            while at < reserve.lock().size() {
                replaced += reserve.lock().replace_bad_free(Range::at(at, STEP))?;
                at += STEP;
            }
        }
        Ok(replaced)
    }

    /// Collapses the parts of the reserves that the kernel gave in small pages. Remembers the
    /// number of bytes of the reserves in 2 MiB folios.
    ///
    /// # Errors
    /// The errors of mmap(2) and of reading the page map.
    pub fn collapse_reserves(&mut self) -> Result<()> {
        let mut folios = 0;
        for reserve in &self.reserves {
            folios += reserve.lock().collapse_untouched()?;
        }
        self.huge_at_mount =
            (folios * FOLIO_SIZE).min(self.balance().total * self.page_size.bytes());
        Ok(())
    }

    /// Bytes of the pool's pages that were in 2 MiB folios at the mount.
    pub fn huge_at_mount(&self) -> u64 {
        self.huge_at_mount
    }

    /// Keeps the pool's size unchanged for as long as the guard lives. This lock comes before all
    /// others: a resize holds it while it waits for pages.
    pub fn keep_size(&self) -> MutexGuard<'_, ()> {
        self.resizing.lock().expect("no panic while the pool is resized")
    }

    /// Checks S1 of the reserves. Returns a line for each violation. Moves wait while one reserve's
    /// part of [`PIECE`] bytes is checked.
    ///
    /// # Errors
    /// The errors of the kernel.
    pub fn check_reserves(&self) -> Result<Vec<String>> {
        let mut wrong = Vec::new();
        for reserve in &self.reserves {
            let named = |what: String| format!("reserve {}: {what}", reserve.node);
            wrong.extend(reserve.lock().check_totals()?.into_iter().map(named));
            let mut at = 0;
            while at < reserve.lock().memory_span() {
                wrong.extend(
                    reserve.lock().check_part(Range::at(at, PIECE))?.into_iter().map(named),
                );
                at += PIECE;
            }
        }
        Ok(wrong)
    }

    /// Checks P1, and that each reserved page has a token or a holding, given the sum of all
    /// holdings. Returns a line for each violation. The caller keeps pages from moving meanwhile,
    /// and the size unchanged with [`Pool::keep_size`].
    pub fn check(&self, held: Held) -> Vec<String> {
        let _all_moved = self.moving();
        let reserves: u64 =
            self.reserves.iter().map(|reserve| reserve.lock().folio_count() * FOLIO_SIZE).sum();
        let (account, bytes) = (self.balance(), reserves + held.bytes);
        let mut wrong = Vec::new();
        if account.held() != held.pages {
            wrong.push(format!(
                "P1: files have {} pages, and the account says {}",
                held.pages,
                account.held()
            ));
        }
        if bytes + account.short != self.bytes_of(account.total) {
            let (short, meant) = (account.short, self.bytes_of(account.total));
            wrong.push(format!("P1: {bytes} bytes are there, and {short} are short, of {meant}"));
        }
        if reserves < account.available() * self.page_size.bytes() {
            let free = account.available();
            wrong
                .push(format!("P1: {free} pages are free, and the reserves have {reserves} bytes"));
        }
        if account.reserved != account.in_tokens + held.stuck {
            let (reserved, tokens, stuck) = (account.reserved, account.in_tokens, held.stuck);
            wrong.push(format!("P1: {reserved} pages are reserved, {tokens} for changes under way and {stuck} for stuck memory"));
        }
        wrong
    }
}

/// The part of `bytes` that each reserve takes from the machine.
fn shares_of(
    reserves: &[Reserve],
    bytes: u64,
    page_size: PageSize,
) -> Result<Vec<(&Reserve, u64)>> {
    let mut nodes = Vec::new();
    for reserve in reserves {
        let room = match reserves.len() {
            1 => bytes,
            _ => sys::numa::memory_available_on(reserve.node)?
                .saturating_sub(sys::MARGIN / reserves.len() as u64),
        };
        nodes.push(Node { has: reserve.lock().size(), room });
    }
    Ok(reserves.iter().zip(shares::shares(bytes, page_size.bytes(), &nodes)).collect())
}

impl Reserve {
    fn new(node: NumaNode, sealed: Sealed) -> Self {
        Self { node, bytes: AtomicU64::new(sealed.size()), sealed: Mutex::new(sealed) }
    }

    fn lock(&self) -> Opened<'_> {
        let sealed = self.sealed.lock().expect("no panic while a reserve is resized");
        Opened { reserve: self, sealed }
    }

    /// Takes `bytes` more from the machine. Memory that was taken before an error stays.
    ///
    /// A step that cannot succeed is refused before it starts: it would take the machine's last
    /// memory from all other processes, if only for a moment. Other processes take memory
    /// meanwhile, so each step asks again. Where the NUMA node has become full meanwhile, the
    /// kernel takes memory from another node.
    fn grow(&self, bytes: u64, mut progress: impl FnMut(u64) -> Result<()>) -> Result<()> {
        for step in Range::new(0, bytes).steps(STEP) {
            refuse_more_than_available(step.len())?;
            let mut sealed = self.lock();
            let size = sealed.size();
            sealed.take(Range::at(size, step.len()), size + step.len())?;
            drop(sealed);
            progress(step.len())?;
        }
        Ok(())
    }
}
