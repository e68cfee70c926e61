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
//! > the memory of all files' `data` is that size in bytes, but for the one step of a move that is under way.
//!
//! The account (pages) is a mutex that is held for an addition; memory (folios) moves outside of it. A [`Token`]
//! stands for pages that nobody else can have; taking from it cannot fail for want of space. A file's pages belong
//! to it whole, but their memory stays in the reserve as far as it lies behind the 2 MiB folio with the end of file: no
//! program can reach it there, and none must reach memory that has not been cleared (see [`crate::sealed`]).
//!
//! **Moves.** Memory goes from one sealed file to another in pieces of at most [`PIECE`]: the target takes a piece from
//! the machine, then the source gives as much back. Never the other way round: between the two another process could
//! take it. So the machine needs one piece more than the pool, for as long as a move lasts.
//!
//! **A death in between.** The reserves are mounted at [`RESERVES`], and what the size of the pool is meant to be is noted there: when it
//! grows, once the memory is there; when it shrinks, before any goes. A move takes before it gives, so whoever opens the pool
//! ([`Pool::open`]) finds what there should be and perhaps a piece more, which it gives back to the machine.
//!
//! **Locks**, in order: that of the pool's size, a file's own (the caller's), the reserves' in the order of their nodes,
//! the account. Nobody waits for pages with any of them but the first: [`Pool::patiently`].

mod holding;
mod recovery;

pub use holding::{Change, Holding, Progress};
pub use recovery::RESERVES;

use crate::error::{Error, Result};
use crate::sealed::{Reach, Sealed};
use crate::steps::{self, Step};
use crate::sys::{self, MARGIN, refuse_more_than_available};
use crate::units::{FOLIO_SIZE, PageSize, Range};
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Most memory that the pool takes from the machine, or gives back to it, at once when its size changes.
pub const STEP: u64 = 64 << 20;

/// Most memory that moves between a file and the reserves at once, chosen so that a piece takes some milliseconds: others
/// wait for that long.
pub const PIECE: u64 = 32 << 20;

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
    /// Mounted at [`RESERVES`].
    outlives_us: bool,
    huge_at_mount: u64,
}

/// The free memory of one NUMA node.
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

/// Pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
        account.total -= pages;
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
    /// Takes `pages` pages from the machine, evenly from its NUMA nodes, and tells `progress` how many bytes it has.
    ///
    /// # Errors
    /// [`Error::NoMemory`] where the machine cannot give that much; what was taken is given back. What `progress`
    /// answers, likewise.
    pub fn fill(
        page_size: PageSize,
        pages: u64,
        mut progress: impl FnMut(u64) -> Result<()>,
    ) -> Result<Self> {
        refuse_more_than_available(pages * page_size.bytes())?;
        let nodes = sys::memory_nodes()?;
        let mut reserves = Vec::new();
        for node in &nodes {
            let bound = (nodes.len() > 1).then_some(*node);
            let sealed = Sealed::create(Reach::Private, bound)?;
            reserves.push(Reserve::new(*node, sealed));
        }
        let mut taken = 0;
        for (n, reserve) in reserves.iter().enumerate() {
            let share = pages / nodes.len() as u64 + u64::from((n as u64) < pages % nodes.len() as u64);
            reserve.grow(share * page_size.bytes(), |step| {
                taken += step;
                log::debug!("{taken} bytes taken");
                progress(taken)
            })?;
        }
        let account =
            Account { total: pages, free: pages, reserved: 0, orphaned: 0, in_tokens: 0, returns: 0 };
        let (account, freed, resizing) = (Mutex::new(account), Condvar::new(), Mutex::new(()));
        Ok(Self { page_size, reserves, account, freed, resizing, outlives_us: false, huge_at_mount: 0 })
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
        if account.free < pages {
            let hopeful = account.free + account.orphaned >= pages;
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
        if let Err(error) = self.cut_reserves((before - pages) * self.page_size.bytes()) {
            self.note_size(before)?;
            return Err(error);
        }
        steps::done(Step::ReduceCut);
        token.destroy();
        Ok(())
    }

    /// Gives `bytes` of the reserves back to the machine, which nobody has been promised.
    fn cut_reserves(&self, bytes: u64) -> Result<()> {
        let mut left = bytes;
        while left > 0 {
            let (_, mut richest) = self.lock_richest();
            let step = left.min(STEP).min(richest.size());
            let size = richest.size() - step;
            richest.cut(size)?;
            left -= step;
        }
        Ok(())
    }

    /// Takes `bytes` from the machine for the reserve that has the least.
    fn grow_poorest(&self, bytes: u64) -> Result<()> {
        let poorest = self.reserves.iter().min_by_key(|reserve| reserve.lock().size());
        let reserve = poorest.expect("there is a node with memory");
        let mut added = 0;
        let grown = reserve.grow(bytes, |step| {
            added += step;
            Ok(())
        });
        if grown.is_err() {
            log::warn!("the machine has no memory for {bytes} bytes more; {added} bytes are given back");
            self.cut_reserves(added)?;
        }
        grown
    }

    fn enlarge(&self, pages: u64) -> Result<()> {
        self.grow_poorest(pages * self.page_size.bytes())?;
        steps::done(Step::EnlargeGrown);
        if let Err(error) = self.note_size(self.balance().total + pages) {
            self.cut_reserves(pages * self.page_size.bytes())?;
            return Err(error);
        }
        steps::done(Step::EnlargeNoted);
        let mut account = self.account();
        account.total += pages;
        account.give_back(pages);
        self.freed.notify_all();
        Ok(())
    }

    /// Whether memory is moved to or from a reserve at this moment: the next move has to wait.
    pub fn is_moving(&self) -> bool {
        self.reserves.iter().any(|reserve| reserve.sealed.try_lock().is_err())
    }

    /// The reserve with the most memory. All of them are locked to find it, so that it has some where there is any.
    fn lock_richest(&self) -> (&Reserve, Opened<'_>) {
        let locked: Vec<_> = self.reserves.iter().map(|reserve| (reserve, reserve.lock())).collect();
        let richest = locked.into_iter().max_by_key(|(_, sealed)| sealed.size());
        richest.expect("there is a node with memory")
    }

    /// Moves a piece of memory for the start of `range`, which has none, into `target`, and makes that up to `size` bytes long as it
    /// goes. Returns the length of the piece.
    ///
    /// # Errors
    /// [`Error::NoMemory`] where the machine has no memory for a piece. Nothing has moved, but `target` may be longer.
    fn move_piece_out(&self, target: &mut Sealed, range: Range, size: u64) -> Result<u64> {
        let (reserve, mut source) = self.lock_richest();
        let piece = range.len().min(affordable_piece()?).min(source.size());
        assert!(piece > 0, "a token was given for memory that the reserves do not have");
        let _bound = self.bind_to(reserve.node)?;
        let taken = Range::at(range.start, piece);
        target.take(taken, size)?;
        steps::done(Step::MoveOutTaken);
        let left = source.size() - piece;
        if let Err(error) = source.cut(left) {
            if source.size() > left {
                target.give(taken)?;
                return Err(error);
            }
            log::warn!("a reserve may have free blocks until memory moves the next time: {error}");
        }
        steps::done(Step::MoveOutGiven);
        Ok(piece)
    }

    /// Moves a piece of memory from the end of `range`, as far as that has any, back into the reserves: `give` takes it out of `source`.
    /// Returns which part it was; none where there is no memory.
    ///
    /// # Errors
    /// [`Error::NoMemory`] where the machine has no memory for a piece.
    fn move_piece_in(
        &self,
        source: &mut Sealed,
        range: Range,
        give: impl FnOnce(&mut Sealed, Range) -> Result<()>,
    ) -> Result<Option<Range>> {
        let Some(piece) = self.last_piece_within(source, range)? else { return Ok(None) };
        let mut target = self.reserve_for(source, piece).lock();
        let size = target.size();
        target.take(Range::at(size, piece.len()), size + piece.len())?;
        steps::done(Step::MoveInTaken);
        if let Err(error) = give(source, piece) {
            if piece.folios().any(|folio| source.has_memory(folio)) {
                target.cut(size)?;
            }
            return Err(error);
        }
        steps::done(Step::MoveInGiven);
        Ok(Some(piece))
    }

    /// The last run of folios with memory in `range`, of one node and at most a piece long.
    fn last_piece_within(&self, source: &Sealed, range: Range) -> Result<Option<Range>> {
        let mut folios = range.folios().rev().skip_while(|folio| !source.has_memory(*folio));
        let Some(last) = folios.next() else { return Ok(None) };
        let most = affordable_piece()? / FOLIO_SIZE;
        let node = self.node_of(source, last);
        let before = folios
            .take(most as usize - 1)
            .take_while(|folio| source.has_memory(*folio) && self.node_of(source, *folio) == node)
            .count() as u64;
        let end = last.range().end;
        Ok(Some(Range::new(end - (before + 1) * FOLIO_SIZE, end)))
    }

    fn node_of(&self, source: &Sealed, folio: crate::units::Folio) -> Option<u32> {
        if self.reserves.len() == 1 { None } else { source.node_of(folio) }
    }

    fn reserve_for(&self, source: &Sealed, step: Range) -> &Reserve {
        let node = step.folios().next().and_then(|folio| self.node_of(source, folio));
        self.reserves.iter().find(|reserve| Some(reserve.node) == node).unwrap_or(&self.reserves[0])
    }

    /// Until the guard is dropped, this thread takes new memory from `node`.
    fn bind_to(&self, node: u32) -> Result<Option<NodeBinding>> {
        if self.reserves.len() == 1 {
            return Ok(None);
        }
        sys::mapping::bind_thread_to_node(Some(node))?;
        Ok(Some(NodeBinding))
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
        self.huge_at_mount = folios * FOLIO_SIZE;
        Ok(())
    }

    /// Bytes of the reserves that were in 2 MiB folios when the pool was mounted.
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
        if bytes != account.total * self.page_size.bytes() {
            wrong.push(format!("P1: {bytes} bytes are there for {} pages", account.total));
        }
        if reserves < account.free * self.page_size.bytes() {
            wrong
                .push(format!("P1: {} pages are free, and the reserves have {reserves} bytes", account.free));
        }
        if account.reserved != account.in_tokens + held.stuck {
            let (reserved, tokens, stuck) = (account.reserved, account.in_tokens, held.stuck);
            wrong.push(format!("P1: {reserved} pages are reserved, {tokens} for changes under way and {stuck} for stuck memory"));
        }
        wrong
    }
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
    /// else, if only for a moment. Others take memory while this goes on, so each step asks again.
    fn grow(&self, bytes: u64, mut progress: impl FnMut(u64) -> Result<()>) -> Result<()> {
        refuse_more_than_available(bytes)?;
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

/// How much a move may take from the machine before it gives as much back.
fn affordable_piece() -> Result<u64> {
    match sys::memory_available()? {
        available if available >= PIECE + MARGIN => Ok(PIECE),
        available if available >= 2 * FOLIO_SIZE => Ok(FOLIO_SIZE),
        _ => Err(Error::NoMemory),
    }
}

struct NodeBinding;

impl Drop for NodeBinding {
    fn drop(&mut self) {
        if let Err(error) = sys::mapping::bind_thread_to_node(None) {
            log::error!("a thread stays bound to a NUMA node: {error}");
        }
    }
}
