//! The pool: the memory that was taken at mount, and who has it.
//!
//! ```text
//!   free pages --reserve()--> Token --hand_over()--> pages of a Holding --release()--> free pages
//!       ^                       | drop                                                  |
//!       +-----------------------+                                                       |
//!       +-------------------------------------------------------------------------------+
//! ```
//!
//! > **P1.** Pages of holdings + pages of tokens + free pages = the pool's size; and the memory of the reserves plus
//! > the memory of all files' `data` plus what is short = that size in bytes plus the float, but for the one piece
//! > that is moving ([`moves`]).
//!
//! The account (pages) is a mutex that is held for an addition; memory (folios) moves outside of it. A [`Token`]
//! stands for pages that nobody else can have; taking from it cannot fail for want of space. A file's pages belong
//! to it whole, but their memory stays in the reserve as far as it lies behind the 2 MiB folio with the end of file: no
//! program can reach it there, and none must reach memory that has not been cleared (see [`crate::sealed`]).
//!
//! **Moves.** Memory goes from one sealed file to another in pieces: the source gives one, then the target takes as much. What
//! another process catches in between is the *float*'s, which belongs to no page ([`moves`]).
//!
//! **A death in between.** The reserves are mounted at [`RESERVES`], and what the size of the pool is meant to be is noted there: when it
//! grows, once the memory is there; when it shrinks, before any goes. So whoever opens the pool ([`Pool::open`]) finds what there
//! should be; or more, which it gives back to the machine; or a piece less, which it takes from the machine when there is some.
//!
//! **Locks**, in order: that of the pool's size, a file's own (the caller's), that of the piece that moves, the reserves' in the
//! order of their nodes, the account. Nobody waits for pages with any of them but the first: [`Pool::patiently`].

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
use crate::units::{FOLIO_SIZE, PageSize, Range};
use shares::Node;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Most memory that the pool takes from the machine, or gives back to it, at once when its size changes.
pub const STEP: u64 = 64 << 20;

/// How long to wait for one more page of the files that were unlinked and whose last user may be gone: the kernel tells
/// of that (FORGET) by itself, but not before unlink(2) returns. In naps, as time also passes while the machine is too
/// busy to run whoever brings the page: that stretches a nap, and the others with it.
const RECLAIM_NAPS: u32 = 20;
const RECLAIM_NAP: Duration = Duration::from_millis(10);

/// How long to wait in all, where pages come back all the time and others are faster to take them.
const RECLAIM_LIMIT: Duration = Duration::from_secs(5);

/// The pool.
#[derive(Debug)]
pub struct Pool {
    page_size: PageSize,
    reserves: Vec<Reserve>,
    account: Mutex<Account>,
    /// Signalled when free pages grow.
    freed: Condvar,
    /// Held while the pool's size changes.
    resizing: Mutex<()>,
    /// Held while a piece moves.
    moving: Mutex<()>,
    /// Mounted at [`RESERVES`].
    outlives_us: bool,
    huge_at_mount: u64,
}

/// Free memory, taken for one NUMA node. Where that was full, the kernel has taken another's: see [`moves`].
#[derive(Debug)]
struct Reserve {
    node: u32,
    sealed: Mutex<Sealed>,
    /// Its size as it was when the lock was given up last.
    bytes: AtomicU64,
}

/// A reserve's lock.
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

/// Pages, and bytes that the pool lacks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Account {
    /// The pool's size.
    pub total: u64,
    /// Nobody's.
    pub free: u64,
    /// In tokens.
    pub reserved: u64,
    /// Of those that holdings have: of files that were unlinked.
    pub orphaned: u64,
    /// Pages of the tokens that there are: with those that holdings keep reserved ([`Token::keep`]), all that is reserved.
    in_tokens: u64,
    /// How often pages have become free.
    returns: u64,
    /// Bytes that the pool lacks of its pages and its float.
    pub short: u64,
    /// Free pages that are not handed out, as what is short is more than the float.
    pub missing: u64,
}

/// What holdings have together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Pages.
    pub pages: u64,
    /// Bytes of memory.
    pub bytes: u64,
    /// Pages that stay reserved for memory that is stuck with a holding.
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

    /// Free pages that can be handed out.
    pub fn available(&self) -> u64 {
        self.free.saturating_sub(self.missing)
    }

    /// Pages that holdings have.
    pub fn held(&self) -> u64 {
        self.total - self.free - self.reserved
    }
}

/// Pages that were promised to somebody. Dropping it gives them back.
#[derive(Debug)]
pub struct Token<'pool> {
    pool: &'pool Pool,
    pages: u64,
}

impl Token<'_> {
    /// So many of the pages become a holding's, or (negative) the other way round.
    fn hand_over(&mut self, pages: i64) {
        let mut account = self.pool.account();
        account.reserved = account.reserved.checked_add_signed(-pages).expect("no more than there are");
        account.in_tokens = account.in_tokens.checked_add_signed(-pages).expect("no more than there are");
        self.pages = self.pages.checked_add_signed(-pages).expect("no more than there are");
    }

    /// The pages stay reserved, for [`Pool::token_of_kept`].
    fn keep(mut self) -> u64 {
        let pages = std::mem::take(&mut self.pages);
        self.pool.account().in_tokens -= pages;
        pages
    }

    /// The pages leave the pool.
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
    /// Takes `pages` pages from the machine, evenly from its NUMA nodes as far as these have room ([`shares`]), and tells
    /// `progress` how many bytes it has.
    ///
    /// # Errors
    /// [`Error::NoMemory`] where the machine cannot give that much; what was taken is given back. What `progress`
    /// answers, likewise.
    pub fn fill(
        page_size: PageSize,
        pages: u64,
        mut progress: impl FnMut(u64) -> Result<()>,
    ) -> Result<Self> {
        let total = pages * page_size.bytes();
        let all = total + float_of(total);
        refuse_more_than_available(all)?;
        let nodes = sys::memory_nodes()?;
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
        Ok(Self::on(page_size, reserves, Account { total: pages, free: pages, ..Account::default() }))
    }

    /// A pool on `reserves`, with this account, that ends with the process.
    fn on(page_size: PageSize, reserves: Vec<Reserve>, account: Account) -> Self {
        let (account, freed) = (Mutex::new(account), Condvar::new());
        let (resizing, moving) = (Mutex::default(), Mutex::default());
        Self { page_size, reserves, account, freed, resizing, moving, outlives_us: false, huge_at_mount: 0 }
    }

    /// Grain of reservation.
    pub fn page_size(&self) -> PageSize {
        self.page_size
    }

    /// The state of the account.
    pub fn balance(&self) -> Account {
        *self.account()
    }

    /// The reserves' NUMA nodes and bytes, as the last move that has ended left them.
    pub fn reserves(&self) -> Vec<(u32, u64)> {
        let row = |reserve: &Reserve| (reserve.node, reserve.bytes.load(Ordering::Relaxed));
        self.reserves.iter().map(row).collect()
    }

    fn account(&self) -> MutexGuard<'_, Account> {
        self.account.lock().expect("no panic while the account is open")
    }

    /// Reserves pages: all or none.
    ///
    /// # Errors
    /// [`Error::Full`], or [`Error::Returning`] where the pages of unlinked files would make it possible.
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

    /// The token for pages that stayed reserved after [`Token::keep`].
    fn token_of_kept(&self, pages: u64) -> Token<'_> {
        self.account().in_tokens += pages;
        Token { pool: self, pages }
    }

    /// Does `request` again as long as it answers [`Error::Returning`] and pages do come back.
    ///
    /// To be called without a lock, on a thread that nobody needs to give pages back.
    ///
    /// # Errors
    /// What `request` answers, in the end.
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

    /// Whether pages became free after the account had `seen` so many returns.
    fn wait_for_return(&self, seen: u64) -> bool {
        let mut account = self.account();
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

    /// A holding has given up `pages` pages, whose memory is back in the reserves.
    fn release(&self, pages: u64) {
        self.account().give_back(pages);
        self.freed.notify_all();
    }

    /// So many pages more, or (negative) fewer, belong to unlinked files.
    fn note_orphaned(&self, pages: i64) {
        let mut account = self.account();
        account.orphaned = account.orphaned.saturating_add_signed(pages);
    }

    /// Changes the pool's size while it is in use.
    ///
    /// # Errors
    /// [`Error::Busy`] for less than is in use, [`Error::NoMemory`] for more than the machine can give; the size is as
    /// before.
    pub fn resize(&self, pages: u64) -> Result<()> {
        let _one_at_a_time = self.keep_size();
        let before = self.balance().total;
        if pages >= before {
            return self.enlarge(pages - before);
        }
        let token = self
            .patiently(|| self.reserve(before - pages))
            .map_err(|_| Error::Busy("more pages are in use than the pool would have; remove files first"))?;
        self.note_size(pages)?;
        steps::done(Step::ReduceNoted);
        let surplus = self.bytes_of(before) - self.bytes_of(pages);
        let lacked = self.lack_less(surplus);
        if let (cut, Err(error)) = self.cut_reserves(surplus - lacked) {
            self.note_short(lacked + cut);
            self.note_size(before)?;
            return Err(error);
        }
        steps::done(Step::ReduceCut);
        token.destroy();
        Ok(())
    }

    /// Gives `bytes` of the reserves back to the machine, which are promised to no file. Returns how many it has given.
    fn cut_reserves(&self, bytes: u64) -> (u64, Result<()>) {
        let mut left = bytes;
        while left > 0 {
            let (_, mut richest) = self.lock_richest();
            let step = left.min(STEP).min(richest.size());
            let size = richest.size() - step;
            let cut = if step > 0 { moves::shorten(&mut richest, size) } else { Err(Error::NoMemory) };
            if cut.is_err() {
                return (bytes - left, cut);
            }
            left -= step;
        }
        (bytes, Ok(()))
    }

    /// Gives `bytes` that the pool has too much back to the machine. What stays here, the next worker gives back.
    fn give_surplus(&self, bytes: u64) {
        if let (given, Err(error)) = self.cut_reserves(bytes) {
            log::warn!("the pool has {} bytes too many: {error}", bytes - given);
        }
    }

    /// Takes `bytes` from the machine for the reserves.
    fn grow_reserves(&self, bytes: u64) -> Result<()> {
        refuse_more_than_available(bytes)?;
        let mut added = 0;
        let grown =
            shares_of(&self.reserves, bytes, self.page_size)?.into_iter().try_for_each(|(reserve, share)| {
                reserve.grow(share, |step| {
                    added += step;
                    Ok(())
                })
            });
        if grown.is_err() {
            log::warn!("the machine has no memory for {bytes} bytes more; {added} bytes are given back");
            self.cut_reserves(added).1?;
        }
        grown
    }

    fn enlarge(&self, pages: u64) -> Result<()> {
        let (before, after) = (self.balance().total, self.balance().total + pages);
        let more = self.bytes_of(after) - self.bytes_of(before);
        self.grow_reserves(more)?;
        steps::done(Step::EnlargeGrown);
        if let Err(error) = self.note_size(after) {
            self.cut_reserves(more).1?;
            return Err(error);
        }
        steps::done(Step::EnlargeNoted);
        let mut account = self.account();
        account.set_total(after, self.page_size.bytes());
        account.give_back(pages);
        self.freed.notify_all();
        Ok(())
    }

    /// Whether the next move has to wait: for another one, for a reserve, or for memory that the pool lacks.
    pub fn move_must_wait(&self) -> bool {
        self.moving.try_lock().is_err()
            || self.reserves.iter().any(|reserve| reserve.sealed.try_lock().is_err())
            || self.is_float_used_up()
    }

    /// Looks the free memory through for memory errors, and replaces what has one: nobody is ever given it. A step at a time, so
    /// that nobody waits for long. Returns how many there were.
    ///
    /// # Errors
    /// [`Error::NoMemory`].
    pub fn replace_poisoned(&self) -> Result<u64> {
        let mut replaced = 0;
        for reserve in &self.reserves {
            let mut at = 0;
            while at < reserve.lock().size() {
                replaced += reserve.lock().replace_poisoned_free(Range::at(at, STEP))?;
                at += STEP;
            }
        }
        Ok(replaced)
    }

    /// Puts what came in small pages into folios, and remembers how many bytes of the reserves are in 2 MiB folios.
    ///
    /// # Errors
    /// What mmap(2) and the page map answer.
    pub fn collapse_reserves(&mut self) -> Result<()> {
        let mut folios = 0;
        for reserve in &self.reserves {
            folios += reserve.lock().collapse_untouched()?;
        }
        self.huge_at_mount = (folios * FOLIO_SIZE).min(self.balance().total * self.page_size.bytes());
        Ok(())
    }

    /// Bytes of the pool's pages that were in 2 MiB folios when it was mounted.
    pub fn huge_at_mount(&self) -> u64 {
        self.huge_at_mount
    }

    /// Keeps the pool's size as it is for as long as the guard lives. Comes before all other locks: a resize waits for
    /// pages with this one.
    pub fn keep_size(&self) -> MutexGuard<'_, ()> {
        self.resizing.lock().expect("no panic while the pool is resized")
    }

    /// Checks S1 of the reserves; says what does not hold. Moves wait for a piece of one reserve.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn check_reserves(&self) -> Result<Vec<String>> {
        let mut wrong = Vec::new();
        for reserve in &self.reserves {
            let named = |what: String| format!("reserve {}: {what}", reserve.node);
            wrong.extend(reserve.lock().check_totals()?.into_iter().map(named));
            let mut at = 0;
            while at < reserve.lock().memory_span() {
                wrong.extend(reserve.lock().check_part(Range::at(at, PIECE))?.into_iter().map(named));
                at += PIECE;
            }
        }
        Ok(wrong)
    }

    /// Checks P1, and that what is reserved is reserved for somebody, given what all holdings together have; says what does
    /// not hold. The caller keeps pages from moving meanwhile, and the size with [`Pool::keep_size`].
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
            wrong.push(format!("P1: {free} pages are free, and the reserves have {reserves} bytes"));
        }
        if account.reserved != account.in_tokens + held.stuck {
            let (reserved, tokens, stuck) = (account.reserved, account.in_tokens, held.stuck);
            wrong.push(format!("P1: {reserved} pages are reserved, {tokens} for changes under way and {stuck} for stuck memory"));
        }
        wrong
    }
}

/// The part of `bytes` that each reserve is to take from the machine.
fn shares_of(reserves: &[Reserve], bytes: u64, page_size: PageSize) -> Result<Vec<(&Reserve, u64)>> {
    let mut nodes = Vec::new();
    for reserve in reserves {
        let room = match reserves.len() {
            1 => bytes,
            _ => sys::memory_available_on(reserve.node)?.saturating_sub(sys::MARGIN / reserves.len() as u64),
        };
        nodes.push(Node { has: reserve.lock().size(), room });
    }
    Ok(reserves.iter().zip(shares::shares(bytes, page_size.bytes(), &nodes)).collect())
}

impl Reserve {
    fn new(node: u32, sealed: Sealed) -> Self {
        Self { node, bytes: AtomicU64::new(sealed.size()), sealed: Mutex::new(sealed) }
    }

    fn lock(&self) -> Opened<'_> {
        let sealed = self.sealed.lock().expect("no panic while a reserve is resized");
        Opened { reserve: self, sealed }
    }

    /// Takes `bytes` more from the machine; what was taken before an error stays.
    ///
    /// What cannot succeed is refused before it starts: it would take the last memory of the machine from everybody
    /// else, if only for a moment. Others take memory while this goes on, so each step asks again. Where the node has come to be
    /// full meanwhile, the kernel takes from another.
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
