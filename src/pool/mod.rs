//! The pool: the memory that was taken at the mount, and the owners of its pages.
//!
//! Each NUMA node has a part of the pool: pages, a *reserve* with its free memory, and a float. The
//! part of a node that the mount does not take memory of has no page, no float and an empty reserve
//! ([`resizing`]). A page belongs to one part, its *home*, for as long as it is in the pool. The
//! following holds for each part.
//!
//! > **P1.** Pages of holdings + pages of tokens + free pages = the part's size. And: memory of the
//! > reserve + memory of the `data` of all files + short bytes = the part's size in bytes + the
//! > float. The second sum does not count the one piece that is moving ([`moves`]).
//!
//! The account counts pages ([`account`]). It is a mutex that a thread holds for an addition only;
//! memory (folios) moves outside of it. A [`Token`] stands for pages that are promised to its owner
//! alone, so taking from a token cannot fail for want of space. A file owns its pages whole. But
//! the memory behind the 2 MiB folio with the end of file stays in the reserve: no program can
//! reach memory there, and no program may reach memory that the kernel has not cleared (see
//! [`crate::sealed`]).
//!
//! **A growth.** The pool promises the pages and chooses their homes in one step
//! ([`Pool::promise_pages`], [`plan`]). Then the holding moves memory, transfer by transfer
//! ([`Holding`]), and at the end the pages become the file's.
//!
//! **Moves.** Memory goes from one sealed file to another in pieces: the source gives a piece, then
//! the target takes as much. If another process takes the memory between the two, the *float* has
//! lost it. The float belongs to no page ([`moves`]).
//!
//! **A death in between.** The reserves are mounted at [`RESERVES`], and the intended size of each
//! part is noted there. A growth notes the new sizes once the memory is there; a shrinking notes
//! them before any memory goes. So the worker that opens the pool next ([`Pool::open`]) finds one
//! of three states:
//! - the memory that the sizes demand;
//! - more, which the worker gives back to the machine;
//! - a piece less, which the worker takes from the machine when that has some.
//!
//! **Locks**, in this order: the pool's size, a file's own lock (the caller takes it), the piece
//! that moves, one reserve, the account. A thread waits for pages ([`Pool::patiently`]) with no
//! lock but the first.

mod account;
mod adoption;
mod holding;
mod homes;
mod moves;
mod page_set;
mod per_node;
mod plan;
mod recovery;
mod resizing;
mod shares;
mod sizes;
#[cfg(test)]
mod tests;

pub use account::{Account, Accounts, Held, Token};
pub use adoption::Adoption;
pub use holding::{Change, Displaced, Holding, Progress};
pub use moves::PIECE;
pub use page_set::{EVERY_PAGE, Run};
pub use per_node::PerNode;
pub use recovery::RESERVES;
pub use sizes::Sizes;

use crate::error::{Error, Result};
use crate::placement::{Full, Resolved, choose};
use crate::sealed::{Reach, Sealed};
use crate::sys::{self, numa, refuse_more_than_available};
use crate::units::{FOLIO_SIZE, NumaNode, Page, PageSize, Range};
use account::Books;
use moves::bytes_of;
use page_set::{PageSet, length};
use shares::Node;
use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
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
    /// One for each NUMA node that had memory at the mount, ascending. Never empty.
    reserves: Vec<Reserve>,
    accounts: Mutex<Accounts>,
    /// Signalled when the number of free pages grows.
    freed: Condvar,
    /// Pages of unlinked files, which come back when their last users are gone.
    orphaned: Arc<AtomicU64>,
    /// Held during a resize of the pool.
    resizing: Mutex<()>,
    /// Held during the move of a piece.
    moving: Mutex<()>,
    /// The machine has one NUMA node.
    is_alone: bool,
    /// The mount has named the nodes: each part takes memory of its node only.
    names_nodes: bool,
    /// The reserves are mounted at [`RESERVES`].
    outlives_us: bool,
    huge_at_mount: u64,
}

/// The free memory of one NUMA node's part. Where that node was full, the kernel took memory of
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

impl Opened<'_> {
    fn node(&self) -> NumaNode {
        self.reserve.node
    }
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

impl Pool {
    /// Takes pages from the machine: of the nodes that `sizes` names, or evenly of all nodes with
    /// processors as far as these have room ([`shares`]). Tells `progress` the number of bytes that
    /// are taken so far.
    ///
    /// # Errors
    /// [`Error::NoMemory`] where the machine cannot give that much, [`Error::NodeFull`] where a
    /// named node cannot, [`Error::Invalid`] for a node without memory, and the errors of
    /// `progress`. The memory that was taken is given back.
    pub fn fill(
        page_size: PageSize,
        sizes: &Sizes,
        mut progress: impl FnMut(u64) -> Result<()>,
    ) -> Result<Self> {
        let pages = sizes.pages();
        let parts: PerNode = match sizes.parts() {
            None => {
                refuse_more_than_available(pages.saturating_mul(page_size.bytes()))?;
                let nodes = numa::nodes_with_processors()?;
                shares_of(&nodes, &PerNode::default(), pages, page_size)?
            }
            Some(parts) => parts.into_iter().collect(),
        };
        let (nodes, is_alone) = (numa::memory_nodes()?, is_alone()?);
        sizes::refuse_other_than(&nodes, parts.iter().map(|(node, _)| node))?;
        let mut reserves = Vec::new();
        for node in &nodes {
            let preferred = (!is_alone).then_some(*node);
            reserves.push(Reserve::new(*node, Sealed::create(Reach::Private, preferred)?));
        }
        let account = |node| Account::of_free_pages(parts.of(node), page_size.bytes());
        let accounts = nodes.iter().map(|node| (*node, account(*node))).collect();
        let mut pool = Self::on(page_size, reserves, accounts);
        (pool.is_alone, pool.names_nodes) = (is_alone, sizes.parts().is_some());
        let bytes = parts.iter().map(|(node, pages)| (node, bytes_of(pages, page_size))).collect();
        let (mut taken, total) = (0, pages * page_size.bytes());
        pool.grow_reserves(&bytes, pool.asked(), |step| {
            taken += step;
            log::debug!("{taken} bytes taken");
            progress(taken.min(total))
        })?;
        Ok(pool)
    }

    /// A pool with these reserves and accounts. It ends with the process.
    fn on(
        page_size: PageSize,
        reserves: Vec<Reserve>,
        accounts: BTreeMap<NumaNode, Account>,
    ) -> Self {
        Self {
            page_size,
            reserves,
            accounts: Mutex::new(Accounts::new(accounts)),
            freed: Condvar::new(),
            orphaned: Arc::default(),
            resizing: Mutex::default(),
            moving: Mutex::default(),
            is_alone: true,
            names_nodes: false,
            outlives_us: false,
            huge_at_mount: 0,
        }
    }

    /// The size of the pool's pages.
    pub fn page_size(&self) -> PageSize {
        self.page_size
    }

    /// The NUMA nodes that the pool has pages of, ascending.
    pub fn nodes(&self) -> Vec<NumaNode> {
        self.accounts().totals().iter().map(|(node, _)| node).collect()
    }

    /// True if the machine has one NUMA node with memory.
    pub fn is_alone(&self) -> bool {
        self.is_alone
    }

    /// True if the mount has named the nodes.
    pub fn names_nodes(&self) -> bool {
        self.names_nodes
    }

    /// The nodes of all reserves, ascending.
    fn nodes_of_reserves(&self) -> Vec<NumaNode> {
        self.reserves.iter().map(|reserve| reserve.node).collect()
    }

    /// The nodes that give the memory that a part lacks.
    fn source(&self) -> Source {
        self.source_of(self.asked())
    }

    /// True if `node` can give `bytes` and keeps its share of the machine's margin.
    fn has_room(&self, node: NumaNode, bytes: u64) -> bool {
        room_on(node, self.reserves.len()).is_ok_and(|room| room >= bytes)
    }

    /// True if the part of `node` has pages.
    fn has_pages_of(&self, node: NumaNode) -> bool {
        self.accounts().of(node).total > 0
    }

    /// The state of the account, summed over all nodes.
    pub fn balance(&self) -> Account {
        self.accounts().sum()
    }

    /// The state of the account of each node.
    pub fn balances(&self) -> Accounts {
        self.accounts().clone()
    }

    /// The number of pages of unlinked files. The owner of the files keeps it up to date.
    pub fn orphaned(&self) -> &Arc<AtomicU64> {
        &self.orphaned
    }

    /// NUMA node and bytes of the reserve of each part with pages, as of the end of the last move.
    pub fn reserves(&self) -> Vec<(NumaNode, u64)> {
        let row = |reserve: &Reserve| (reserve.node, reserve.bytes.load(Ordering::Relaxed));
        self.reserves.iter().filter(|reserve| self.has_pages_of(reserve.node)).map(row).collect()
    }

    fn reserve_of(&self, node: NumaNode) -> &Reserve {
        let found = self.reserves.iter().find(|reserve| reserve.node == node);
        found.expect("the pool has memory of this node")
    }

    fn accounts(&self) -> Books<'_> {
        Books::open(self.accounts.lock().expect("no panic while the account is open"))
    }

    /// Promises the pages of `wanted`, all or none, and chooses the home of each.
    ///
    /// # Errors
    /// [`Error::Full`], or [`Error::NodeFull`] for a strict placement; [`Error::Returning`] where
    /// the pages of unlinked files would suffice, or pages ahead would be a better choice.
    pub fn promise_pages(
        &self,
        wanted: &PageSet,
        placement: &Resolved,
    ) -> Result<(Token<'_>, Vec<(Run, NumaNode)>)> {
        let mut accounts = self.accounts();
        let homes = self.choose_homes(&accounts, wanted, placement)?;
        if accounts.has_ahead_for(placement) && !placement.suits(&homes) {
            return Err(Error::Returning);
        }
        Ok(self.promise_homes(&mut accounts, homes))
    }

    /// As [`Pool::promise_pages`], out of the pages that are free now.
    fn promise_free_pages(
        &self,
        wanted: &PageSet,
        placement: &Resolved,
    ) -> Result<(Token<'_>, Vec<(Run, NumaNode)>)> {
        let mut accounts = self.accounts();
        let homes = self.choose_homes(&accounts, wanted, placement)?;
        Ok(self.promise_homes(&mut accounts, homes))
    }

    /// As [`Pool::promise_pages`], for pages that will be ahead. The account says so at once: no
    /// other thread finds these pages neither free nor ahead.
    fn promise_ahead(
        &self,
        wanted: &PageSet,
        placement: &Resolved,
    ) -> Result<(Token<'_>, Vec<(Run, NumaNode)>)> {
        let mut accounts = self.accounts();
        let homes = self.choose_homes(&accounts, wanted, placement)?;
        let promised = self.promise_homes(&mut accounts, homes);
        accounts.set_ahead(&PerNode::default(), promised.0.pages());
        Ok(promised)
    }

    fn choose_homes(
        &self,
        accounts: &Accounts,
        wanted: &PageSet,
        placement: &Resolved,
    ) -> Result<Vec<(Run, NumaNode)>> {
        let homes = choose(wanted.runs().cloned(), &accounts.available(), placement)
            .map_err(|Full| self.full(accounts, wanted.count(), placement))?;
        let pages: u64 = homes.iter().map(|(run, _)| length(run)).sum();
        assert_eq!(pages, wanted.count(), "each page has one home");
        Ok(homes)
    }

    fn promise_homes(
        &self,
        accounts: &mut Accounts,
        homes: Vec<(Run, NumaNode)>,
    ) -> (Token<'_>, Vec<(Run, NumaNode)>) {
        let pages_of = |(run, node): &(Run, NumaNode)| (*node, length(run));
        let pages: PerNode = homes.iter().map(pages_of).collect();
        pages.iter().for_each(|(node, pages)| accounts.of_mut(node).promise(pages));
        (Token::of(self, pages), homes)
    }

    /// Promises `pages` pages that no file gets: all or none.
    ///
    /// # Errors
    /// Those of [`Pool::promise_pages`].
    fn promise(&self, pages: u64) -> Result<Token<'_>> {
        let wanted = PageSet::from_iter([Page(0)..Page(pages)]);
        Ok(self.promise_pages(&wanted, &Resolved::default())?.0)
    }

    /// Promises `pages` pages of one node that no file gets: all or none.
    ///
    /// # Errors
    /// [`Error::Full`].
    fn promise_on(&self, node: NumaNode, pages: u64) -> Result<Token<'_>> {
        let mut accounts = self.accounts();
        let account = accounts.of_mut(node);
        if account.available() < pages {
            return Err(Error::Full);
        }
        account.promise(pages);
        Ok(Token::of(self, PerNode::on(node, pages)))
    }

    fn full(&self, accounts: &Accounts, wanted: u64, placement: &Resolved) -> Error {
        let sum = accounts.sum();
        let available = sum.available();
        let returning = self.orphaned.load(Ordering::Relaxed) + sum.ahead;
        match returning > 0 && available + returning >= wanted {
            true => Error::Returning,
            false if placement.strict && available >= wanted => {
                strictly_full(accounts, wanted, placement)
            }
            false => Error::Full,
        }
    }

    /// A holding has `now` pages ahead, and had `before`.
    fn set_ahead(&self, before: &PerNode, now: &PerNode) {
        self.accounts().set_ahead(before, now);
    }

    /// A token for pages that [`Token::keep`] left promised.
    fn token_of_kept(&self, pages: PerNode) -> Token<'_> {
        let mut accounts = self.accounts();
        pages.iter().for_each(|(node, pages)| accounts.of_mut(node).promise_again(pages));
        drop(accounts);
        Token::of(self, pages)
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
            let seen = self.accounts().returns;
            match request() {
                Err(Error::Returning) if Instant::now() < limit && self.wait_for_return(seen) => {}
                result => return result,
            }
        }
    }

    /// Waits for free pages. True if some became free after the caller had `seen` this count of
    /// returns.
    fn wait_for_return(&self, seen: u64) -> bool {
        let mut accounts = self.accounts.lock().expect("no panic while the account is open");
        for _ in 0..RECLAIM_NAPS {
            let silent = |accounts: &mut Accounts| accounts.returns == seen;
            let napped = self.freed.wait_timeout_while(accounts, RECLAIM_NAP, silent);
            accounts = napped.expect("no panic while the account is open").0;
            if accounts.returns != seen {
                return true;
            }
        }
        false
    }

    /// Wakes the threads that wait for free pages.
    fn announce_free_pages(&self) {
        self.freed.notify_all();
    }

    /// A holding has given up `pages` pages. Their memory is back in the reserves.
    fn release(&self, pages: &PerNode) {
        self.release_ahead(pages, &PerNode::default(), &PerNode::default());
    }

    /// As [`Pool::release`]. The holding has `now` pages ahead, and had `before`. Both change in
    /// one step: no other thread finds these pages neither free nor ahead.
    fn release_ahead(&self, pages: &PerNode, before: &PerNode, now: &PerNode) {
        let mut accounts = self.accounts();
        accounts.set_ahead(before, now);
        accounts.give_back(pages);
        drop(accounts);
        self.announce_free_pages();
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

    /// Checks P1 of each node's part, and that each promised page has a token or a holding, given
    /// the sum of all holdings. Returns a line for each violation. The caller keeps pages from
    /// moving meanwhile, and the size unchanged with [`Pool::keep_size`].
    pub fn check(&self, held: &Held) -> Vec<String> {
        let _all_moved = self.moving();
        let check = |reserve: &Reserve| {
            let node = reserve.node;
            let wrong = self.check_part(reserve, held);
            wrong.into_iter().map(move |what| format!("P1, node {node}: {what}"))
        };
        self.reserves.iter().flat_map(check).collect()
    }

    fn check_part(&self, reserve: &Reserve, held: &Held) -> Vec<String> {
        let node = reserve.node;
        let has = reserve.lock().folio_count() * FOLIO_SIZE;
        let account = *self.accounts().of(node);
        let (pages, bytes) = (held.pages.of(node), has + held.bytes.of(node));
        let (short, meant) = (account.short, bytes_of(account.total, self.page_size));
        let mut wrong = Vec::new();
        if account.held() != pages {
            wrong
                .push(format!("files have {pages} pages, and the account says {}", account.held()));
        }
        if account.ahead != held.ahead.of(node) {
            wrong.push(format!(
                "{} pages are ahead, and the account says {}",
                held.ahead.of(node),
                account.ahead
            ));
        }
        if bytes + short != meant {
            wrong.push(format!("{bytes} bytes are there, and {short} are short, of {meant}"));
        }
        let available = account.available();
        if has < available * self.page_size.bytes() {
            wrong.push(format!("{available} pages are free, and the reserve has {has} bytes"));
        }
        let (promised, tokens, stuck) = (account.promised, account.in_tokens, held.stuck.of(node));
        if promised != tokens + stuck {
            wrong.push(format!(
                "{promised} pages are promised, {tokens} for changes under way and {stuck} for stuck memory"
            ));
        }
        wrong
    }
}

/// The refusal of a strict placement whose nodes have too few free pages, while others have some.
fn strictly_full(accounts: &Accounts, wanted: u64, placement: &Resolved) -> Error {
    let nodes = placement.nodes();
    let free = |node: &NumaNode| {
        let found = accounts.iter().find(|(known, _)| known == node);
        format!("node {node} has {}", found.map_or(0, |(_, account)| account.available()))
    };
    let free: Vec<String> = nodes.iter().map(free).collect();
    Error::NodeFull(format!(
        "the placement is strict, and asks for {wanted} free pages of the NUMA nodes {}: {}",
        NumaNode::list(&nodes),
        free.join(", ")
    ))
}

/// The pages of `pages` that each of `nodes` gives. The pool has the parts `has`.
fn shares_of(
    nodes: &[NumaNode],
    has: &PerNode,
    pages: u64,
    page_size: PageSize,
) -> Result<PerNode> {
    let mut parts = Vec::new();
    for node in nodes {
        let room = match nodes.len() {
            1 => u64::MAX,
            all => room_on(*node, all)?,
        };
        parts.push(Node { has: has.of(*node), room: page_size.pages_down(room) });
    }
    Ok(nodes.iter().copied().zip(shares::shares(pages, &parts)).collect())
}

/// Bytes that a node can give, of `nodes` nodes that share the machine's margin. A node that does
/// not tell has as much as the machine.
fn room_on(node: NumaNode, nodes: usize) -> Result<u64> {
    let available = sys::numa::memory_available_on(node).or_else(|_| sys::memory_available())?;
    Ok(available.saturating_sub(sys::MARGIN / nodes as u64))
}

/// Refuses `bytes` of each node that a node cannot give.
fn refuse_full_nodes(bytes: &PerNode) -> Result<()> {
    let nodes = bytes.iter().count();
    for (node, wanted) in bytes.iter() {
        let room = room_on(node, nodes)?;
        if wanted > room {
            return Err(Error::NodeFull(format!(
                "NUMA node {node} cannot give {wanted} bytes: {room} are available now; choose a smaller part of it, or free \
                 memory there first"
            )));
        }
    }
    Ok(())
}

/// The nodes from which a part takes memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// Its own as long as that has some, and then others.
    Anywhere,
    /// Its own.
    ItsNode,
}

/// True if the machine has one NUMA node with memory.
fn is_alone() -> Result<bool> {
    Ok(sys::numa::all_memory_nodes()?.len() == 1)
}

impl Reserve {
    fn new(node: NumaNode, sealed: Sealed) -> Self {
        Self { node, bytes: AtomicU64::new(sealed.size()), sealed: Mutex::new(sealed) }
    }

    fn lock(&self) -> Opened<'_> {
        let sealed = self.sealed.lock().expect("no panic while a reserve is resized");
        Opened { reserve: self, sealed }
    }

    fn is_locked(&self) -> bool {
        self.sealed.try_lock().is_err()
    }

    /// Gives `bytes`, which are promised to no file, back to the machine, in steps. Returns the
    /// number of bytes that were given.
    fn cut(&self, bytes: u64) -> (u64, Result<()>) {
        for step in Range::new(0, bytes).steps(STEP) {
            let mut sealed = self.lock();
            let left = sealed.size().checked_sub(step.len()).ok_or(Error::NoMemory);
            if let Err(error) = left.and_then(|left| moves::shorten(&mut sealed, left)) {
                return (step.start, Err(error));
            }
        }
        (bytes, Ok(()))
    }

    /// Takes `bytes` more from the machine. Memory that was taken before an error stays.
    ///
    /// A step that cannot succeed is refused before it starts: it would take the machine's last
    /// memory from all other processes, if only for a moment. Other processes take memory
    /// meanwhile, so each step asks again. Where the NUMA node has become full meanwhile, the
    /// kernel takes memory from another node; if the source is the node alone, the step is given
    /// back and refused.
    fn grow(
        &self,
        bytes: u64,
        source: Source,
        mut progress: impl FnMut(u64) -> Result<()>,
    ) -> Result<()> {
        for step in Range::new(0, bytes).steps(STEP) {
            refuse_more_than_available(step.len())?;
            self.take(step.len(), source)?;
            progress(step.len())?;
        }
        Ok(())
    }

    /// Takes a step from the machine: all or nothing.
    fn take(&self, bytes: u64, source: Source) -> Result<()> {
        let mut sealed = self.lock();
        let size = sealed.size();
        let step = Range::at(size, bytes);
        sealed.take(step, step.end)?;
        debug_assert_eq!(sealed.folio_count() * FOLIO_SIZE, sealed.size(), "it has no gap");
        let elsewhere = match source {
            Source::Anywhere => Ok(0),
            Source::ItsNode => sealed.bytes_elsewhere(step, self.node),
        };
        if matches!(elsewhere, Ok(0)) {
            return Ok(());
        }
        moves::shorten(&mut sealed, size)?;
        let elsewhere = elsewhere?;
        Err(Error::NodeFull(format!(
            "NUMA node {} cannot give as much: of {bytes} bytes the kernel took {elsewhere} from other nodes; choose a \
             smaller part of it, or free memory there first",
            self.node
        )))
    }
}
