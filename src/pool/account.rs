//! The account: the owners of the pool's pages, and the bytes that the pool lacks, for each NUMA
//! node. Pure.
//!
//! ```text
//!   free pages --promise--> Token --hand_over()--> pages of a Holding --release()--> free pages
//!       ^                     | drop                                                 |
//!       +---------------------+                                                      |
//!       +----------------------------------------------------------------------------+
//! ```

use super::moves::{bytes_of, float_of};
use super::{PerNode, Pool};
use crate::error::{Error, Result};
use crate::placement::Resolved;
use crate::units::{NumaNode, PageSize};
use std::collections::{BTreeMap, BTreeSet};
use std::iter::Sum;
use std::ops::{Deref, DerefMut};
use std::sync::MutexGuard;

/// The account of one NUMA node's part of the pool, or the sum over all nodes: pages, and the bytes
/// that the pool lacks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Account {
    /// The pool's size.
    pub total: u64,
    /// Pages without an owner.
    pub free: u64,
    /// Pages that are promised.
    pub promised: u64,
    /// Pages of holdings that no program has asked for: their memory is cleared ahead of use.
    pub ahead: u64,
    /// Pages of live tokens. With the pages that holdings keep promised ([`Token::keep`]), they
    /// make up `promised`.
    pub(super) in_tokens: u64,
    /// Bytes that the pool lacks of its pages and its float.
    pub short: u64,
    /// Free pages that the pool does not hand out, because more is short than the float.
    pub missing: u64,
    /// Bytes of the float, without those that are short.
    pub float: u64,
}

impl Account {
    /// The account of `total` free pages, of `page_size` bytes each.
    pub(super) fn of_free_pages(total: u64, page_size: u64) -> Self {
        let mut account = Self { free: total, ..Self::default() };
        account.set_total(total, page_size);
        account
    }

    /// Free pages that the pool can hand out.
    pub fn available(&self) -> u64 {
        self.free.saturating_sub(self.missing)
    }

    /// Pages that users can have: those that the pool can hand out, and those ahead.
    pub fn free_for_users(&self) -> u64 {
        self.available() + self.ahead
    }

    /// Pages of holdings that programs have asked for.
    pub fn used(&self) -> u64 {
        self.held().saturating_sub(self.ahead) // some may still be promised
    }

    /// Pages that holdings have.
    pub fn held(&self) -> u64 {
        self.total - self.free - self.promised
    }

    /// Sets the bytes that the pool lacks of its pages, of `page_size` bytes each, and their float.
    pub(super) fn set_short(&mut self, short: u64, page_size: u64) {
        assert!(page_size > 0, "a page has bytes");
        self.short = short;
        self.missing = short.saturating_sub(self.float).div_ceil(page_size);
        debug_assert_eq!(self.missing > 0, short > self.float, "the float lends what it has");
    }

    /// Sets the number of the pool's pages, of `page_size` bytes each.
    pub(super) fn set_total(&mut self, total: u64, page_size: u64) {
        self.total = total;
        self.float = float_of(total * page_size);
        self.set_short(self.short, page_size);
    }

    /// Bytes of the float that are there.
    pub(super) fn float_at_hand(&self) -> u64 {
        self.float.saturating_sub(self.short)
    }

    /// Promises `pages` available pages to a token.
    pub(super) fn promise(&mut self, pages: u64) {
        assert!(pages <= self.available(), "{pages} pages are promised: {self:?}");
        self.free -= pages;
        self.promised += pages;
        self.in_tokens += pages;
        self.assert_sound();
    }

    /// `pages` pages of a holding are a token's again.
    fn take_over(&mut self, pages: u64) {
        assert!(pages <= self.held(), "{pages} pages of holdings: {self:?}");
        self.promised += pages;
        self.in_tokens += pages;
        self.assert_sound();
    }

    /// Sets the pages ahead that a holding has here, which had `before`.
    pub(super) fn set_ahead(&mut self, before: u64, now: u64) {
        assert!(before <= self.ahead, "{before} pages ahead of a holding: {self:?}");
        self.ahead = self.ahead - before + now;
    }

    /// `pages` promised pages have a token again.
    pub(super) fn promise_again(&mut self, pages: u64) {
        let kept = self.promised - self.in_tokens;
        assert!(pages <= kept, "{pages} pages are kept: {self:?}");
        self.in_tokens += pages;
        self.assert_sound();
    }

    /// `pages` pages of holdings become free.
    fn give_back(&mut self, pages: u64) {
        assert!(pages <= self.held(), "{pages} pages of holdings: {self:?}");
        self.free += pages;
        self.assert_sound();
    }

    /// `pages` pages of a token get another owner, or none.
    fn take_from_token(&mut self, pages: u64) {
        assert!(pages <= self.in_tokens, "{pages} pages of tokens: {self:?}");
        assert!(pages <= self.promised, "{pages} promised pages: {self:?}");
        self.promised -= pages;
        self.in_tokens -= pages;
    }

    fn assert_sound(&self) {
        let owned = self.free.checked_add(self.promised).expect("pages are counted");
        assert!(owned <= self.total, "more pages than the pool has: {self:?}");
        assert!(self.in_tokens <= self.promised, "a token without pages: {self:?}");
        assert!(self.ahead <= self.total - self.free, "pages ahead that are free: {self:?}");
        assert!(self.missing == 0 || self.short > 0, "pages are missing, and no memory: {self:?}");
    }
}

impl Sum for Account {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |sum, one| Self {
            total: sum.total + one.total,
            free: sum.free + one.free,
            promised: sum.promised + one.promised,
            ahead: sum.ahead + one.ahead,
            in_tokens: sum.in_tokens + one.in_tokens,
            short: sum.short + one.short,
            missing: sum.missing + one.missing.min(one.free),
            float: sum.float + one.float,
        })
    }
}

/// The accounts of all NUMA nodes that the pool has memory of.
#[derive(Clone, Debug, Default)]
pub struct Accounts {
    nodes: BTreeMap<NumaNode, Account>,
    /// The number of times that pages have become free.
    pub(super) returns: u64,
}

impl Accounts {
    pub(super) fn new(nodes: BTreeMap<NumaNode, Account>) -> Self {
        assert!(!nodes.is_empty(), "a pool has memory of some node");
        Self { nodes, returns: 0 }
    }

    /// The account of `node`, of which the pool has memory.
    pub(super) fn of(&self, node: NumaNode) -> &Account {
        self.nodes.get(&node).expect("the pool has memory of this node")
    }

    pub(super) fn of_mut(&mut self, node: NumaNode) -> &mut Account {
        self.nodes.get_mut(&node).expect("the pool has memory of this node")
    }

    /// The accounts by node, ascending.
    pub fn iter(&self) -> impl Iterator<Item = (NumaNode, &Account)> {
        self.nodes.iter().map(|(node, account)| (*node, account))
    }

    #[cfg(test)]
    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = (NumaNode, &mut Account)> {
        self.nodes.iter_mut().map(|(node, account)| (*node, account))
    }

    /// The sum over all nodes.
    pub fn sum(&self) -> Account {
        self.nodes.values().copied().sum()
    }

    /// Pages that can be handed out.
    pub(super) fn available(&self) -> Vec<(NumaNode, u64)> {
        self.iter().map(|(node, account)| (node, account.available())).collect()
    }

    /// A holding, or its token, has `now` pages ahead, and had `before`.
    pub(super) fn set_ahead(&mut self, before: &PerNode, now: &PerNode) {
        let nodes: BTreeSet<_> = before.iter().chain(now.iter()).map(|(node, _)| node).collect();
        for node in nodes {
            self.of_mut(node).set_ahead(before.of(node), now.of(node));
        }
    }

    /// True if pages are ahead on a node that `placement` asks for.
    pub(super) fn has_ahead_for(&self, placement: &Resolved) -> bool {
        let asked = placement.nodes();
        let mut ahead = self.iter().filter(|(_, account)| account.ahead > 0);
        ahead.any(|(node, _)| asked.contains(&node))
    }

    /// The size of each node's part, in pages.
    pub(super) fn totals(&self) -> PerNode {
        self.iter().map(|(node, account)| (node, account.total)).collect()
    }

    /// `pages` become free.
    pub(super) fn give_back(&mut self, pages: &PerNode) {
        let before = self.sum();
        for (node, pages) in pages.iter() {
            self.of_mut(node).give_back(pages);
            self.returns += 1;
        }
        debug_assert_eq!(self.sum().free, before.free + pages.total(), "pages are counted once");
        debug_assert_eq!(self.sum().total, before.total, "the pool keeps its size");
    }

    /// A file has the pages and the memory `has`, and the accounts say that it has `counted`. Where
    /// the homes differ, the sizes of the nodes' parts follow. Returns the bytes that each part has
    /// too many then.
    ///
    /// # Errors
    /// [`Error::Full`] where the file has more pages, and as many are not free. Nothing has
    /// changed.
    pub(super) fn correct(
        &mut self,
        counted: &Held,
        has: &Held,
        page_size: PageSize,
    ) -> Result<PerNode> {
        if has.pages.total().saturating_sub(counted.pages.total()) > self.sum().available() {
            return Err(Error::Full);
        }
        let there = |(node, account): (NumaNode, &Account)| {
            let counted_there = bytes_of(account.total, page_size) - account.short;
            (node, counted_there + has.bytes.of(node) - counted.bytes.of(node))
        };
        let there: Vec<_> = self.iter().map(there).collect();
        let before = self.sum();
        self.move_homes(&counted.pages, &has.pages, page_size.bytes());
        let mut surplus = PerNode::default();
        for (node, bytes) in there {
            let account = self.of_mut(node);
            let meant = bytes_of(account.total, page_size);
            account.set_short(meant.saturating_sub(bytes), page_size.bytes());
            surplus.add(node, bytes.saturating_sub(meant));
        }
        let sum = self.sum();
        assert_eq!(sum.total, before.total, "the pool keeps its size");
        assert_eq!(
            sum.held() + counted.pages.total(),
            before.held() + has.pages.total(),
            "the file's pages are counted, and no other's"
        );
        Ok(surplus)
    }

    fn move_homes(&mut self, counted: &PerNode, has: &PerNode, page_size: u64) {
        let nodes: Vec<_> = self.iter().map(|(node, _)| node).collect();
        let more = |one: &PerNode, other: &PerNode| -> PerNode {
            let more = |node: &NumaNode| (*node, one.of(*node).saturating_sub(other.of(*node)));
            nodes.iter().map(more).collect()
        };
        let (gained, mut lost) = (more(has, counted), more(counted, has));
        for (node, mut pages) in gained.iter() {
            for from in nodes.iter().copied() {
                let moved = pages.min(lost.of(from));
                lost.take(from, moved);
                pages -= moved;
                self.move_size(from, node, moved, page_size);
            }
            for from in std::iter::once(node).chain(nodes.iter().copied()) {
                let moved = pages.min(self.of(from).free);
                self.of_mut(from).free -= moved;
                pages -= moved;
                self.move_size(from, node, moved, page_size);
            }
        }
        lost.iter().for_each(|(node, pages)| self.of_mut(node).free += pages);
    }

    /// `pages` of the size of one part become the other's.
    fn move_size(&mut self, from: NumaNode, to: NumaNode, pages: u64, page_size: u64) {
        assert!(pages <= self.of(from).total, "{pages} pages of node {from}: {self:?}");
        if from != to {
            let [less, more] = [self.of(from).total - pages, self.of(to).total + pages];
            self.of_mut(from).set_total(less, page_size);
            self.of_mut(to).set_total(more, page_size);
        }
    }

    fn assert_sound(&self) {
        self.nodes.values().for_each(Account::assert_sound);
    }
}

/// The accounts, open for a change. The pages add up when the change begins and when it ends.
pub(super) struct Books<'a>(MutexGuard<'a, Accounts>);

impl<'a> Books<'a> {
    pub(super) fn open(accounts: MutexGuard<'a, Accounts>) -> Self {
        accounts.assert_sound();
        Self(accounts)
    }
}

impl Deref for Books<'_> {
    type Target = Accounts;

    fn deref(&self) -> &Accounts {
        &self.0
    }
}

impl DerefMut for Books<'_> {
    fn deref_mut(&mut self) -> &mut Accounts {
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
    pub(super) pool: &'pool Pool,
    pages: PerNode,
}

impl<'pool> Token<'pool> {
    /// A token for pages that the account has promised already.
    pub(super) fn of(pool: &'pool Pool, pages: PerNode) -> Self {
        Self { pool, pages }
    }

    /// The pages of the token.
    pub(super) fn pages(&self) -> &PerNode {
        &self.pages
    }

    /// A token for `pages` of these pages. The others become free.
    pub(super) fn reduced_to(mut self, pages: PerNode) -> Self {
        let others = std::mem::take(&mut self.pages).less(&pages);
        self.pages = others;
        Self { pool: self.pool, pages }
    }

    /// `pages` of the token's pages become a holding's.
    pub(super) fn hand_over(&mut self, pages: &PerNode) {
        let mut accounts = self.pool.accounts();
        for (node, pages) in pages.iter() {
            accounts.of_mut(node).take_from_token(pages);
            self.pages.take(node, pages);
        }
    }

    /// `pages` that were handed over are the token's again.
    pub(super) fn take_over(&mut self, pages: &PerNode) {
        let mut accounts = self.pool.accounts();
        for (node, pages) in pages.iter() {
            accounts.of_mut(node).take_over(pages);
            self.pages.add(node, pages);
        }
    }

    /// Keeps the pages promised without a token. [`Pool::token_of_kept`] makes a token for them
    /// again.
    pub(super) fn keep(mut self) -> PerNode {
        let pages = std::mem::take(&mut self.pages);
        let mut accounts = self.pool.accounts();
        pages.iter().for_each(|(node, pages)| accounts.of_mut(node).in_tokens -= pages);
        drop(accounts);
        pages
    }

    /// Removes the pages from the pool.
    pub(super) fn destroy(mut self) {
        let page_size = self.pool.page_size().bytes();
        let mut accounts = self.pool.accounts();
        for (node, pages) in std::mem::take(&mut self.pages).iter() {
            let account = accounts.of_mut(node);
            account.take_from_token(pages);
            account.set_total(account.total - pages, page_size);
        }
    }
}

impl Drop for Token<'_> {
    fn drop(&mut self) {
        let mut accounts = self.pool.accounts();
        self.pages.iter().for_each(|(node, pages)| accounts.of_mut(node).take_from_token(pages));
        accounts.give_back(&self.pages);
        drop(accounts);
        self.pool.announce_free_pages();
    }
}

/// The pages and the memory of a holding, or of several.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Pages of the files.
    pub pages: PerNode,
    /// Bytes of memory.
    pub bytes: PerNode,
    /// Pages that stay promised because their memory is stuck in a holding.
    pub stuck: PerNode,
    /// Those of `pages` that no program has asked for.
    pub ahead: PerNode,
}

impl Sum for Held {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |sum, held| Self {
            pages: sum.pages.and(&held.pages),
            bytes: sum.bytes.and(&held.bytes),
            stuck: sum.stuck.and(&held.stuck),
            ahead: sum.ahead.and(&held.ahead),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::FOLIO_SIZE;

    #[test]
    fn what_is_short_beyond_the_float_makes_pages_missing() {
        let page = FOLIO_SIZE;
        let mut account = Account::of_free_pages(8, page);
        let float = account.float;
        for (short, missing) in [(0, 0), (float, 0), (float + 1, 1), (float + 2 * page, 2)] {
            account.set_short(short, page);
            assert_eq!((account.short, account.missing), (short, missing));
        }
    }

    #[test]
    fn a_nodes_missing_pages_are_no_other_nodes() {
        let mut poor = Account::of_free_pages(2, FOLIO_SIZE);
        poor.set_short(poor.float + 2 * FOLIO_SIZE, FOLIO_SIZE);
        poor.promised = 1;
        poor.free = 1;
        let rich = Account::of_free_pages(4, FOLIO_SIZE);
        let sum: Account = [poor, rich].into_iter().sum();
        assert_eq!((poor.available(), rich.available(), sum.available()), (0, 4, 4));
    }

    #[test]
    fn a_file_that_is_corrected_has_its_own_homes() {
        let [zero, one] = [0, 1].map(NumaNode);
        let held = |node, pages: u64| Held {
            pages: PerNode::on(node, pages),
            bytes: PerNode::on(node, pages * FOLIO_SIZE),
            ..Held::default()
        };
        let accounts = || {
            let mut accounts = Accounts::new(
                [zero, one].map(|node| (node, Account::of_free_pages(8, FOLIO_SIZE))).into(),
            );
            accounts.of_mut(zero).free -= 3; // counted there
            accounts
        };
        let sizes = |accounts: &Accounts| {
            [zero, one].map(|node| (accounts.of(node).total, accounts.of(node).free))
        };
        let rows = [
            (held(zero, 3), [(8, 5), (8, 8)]),
            (held(one, 3), [(5, 5), (11, 8)]),
            (held(zero, 1), [(8, 7), (8, 8)]),
            (held(one, 5), [(5, 5), (11, 6)]),
            (held(zero, 10), [(10, 0), (6, 6)]),
        ];
        for (has, meant) in rows {
            let mut accounts = accounts();
            accounts.correct(&held(zero, 3), &has, PageSize::Huge).unwrap();
            assert_eq!(sizes(&accounts), meant, "{has:?}");
            accounts.assert_sound();
        }
        let refused = accounts().correct(&held(zero, 3), &held(one, 17), PageSize::Huge);
        assert!(matches!(refused, Err(Error::Full)));
    }
}
