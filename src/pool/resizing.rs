//! Resizes of the pool while it is in use: as a whole, or node by node.
//!
//! ```text
//!   pages of the parts that shrink are promised | the parts that grow take memory | the sizes are
//!   noted | the parts that shrink give memory | the account follows
//! ```
//!
//! Until the sizes are noted, a refusal or a death changes nothing: the next worker gives memory
//! beyond the noted sizes back. From then on the next worker goes on: it gives the memory of the
//! parts that shrink back. The kernel sends the request again in both cases.
//!
//! Each NUMA node that had memory at the mount has a reserve. So a node joins the pool when its
//! part grows from nothing, and leaves it when its part shrinks to nothing.

use super::moves::bytes_of;
use super::{Error, PerNode, Pool, Result, Sizes, Source, Token};
use super::{refuse_full_nodes, shares_of, sizes};
use crate::steps::{self, Step};
use crate::sys::{numa, refuse_more_than_available};
use crate::units::NumaNode;
use std::collections::{BTreeMap, BTreeSet};

/// The sources of the memory of parts that grow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    /// The pool has chosen how much each node gives. Other nodes may give.
    ByPool,
    /// The admin has. Each node gives its part, or the request is refused.
    ByName,
}

impl Pool {
    /// Changes the pool's size while it is in use. Sizes of parts name each node that the pool has
    /// pages of.
    ///
    /// # Errors
    /// [`Error::Busy`] and [`Error::InUse`] for a size below the pages in use, [`Error::NoMemory`]
    /// and [`Error::NodeFull`] for more than the machine or a node can give, [`Error::Invalid`] for
    /// nodes that cannot be. The size is as before.
    pub fn resize(&self, sizes: &Sizes) -> Result<()> {
        let _one_at_a_time = self.keep_size();
        let before = self.accounts().totals();
        match sizes.parts() {
            None => self.resize_whole(&before, sizes.pages()),
            Some(parts) => self.resize_parts(&before, &parts),
        }
    }

    fn resize_whole(&self, before: &PerNode, pages: u64) -> Result<()> {
        let Some(more) = pages.checked_sub(before.total()) else {
            let token = self.patiently(|| self.promise(before.total() - pages)).map_err(|_| {
                Error::Busy("more pages are in use than the pool would have; remove files first")
            })?;
            return self.change(before, &PerNode::default(), Asked::ByPool, token);
        };
        refuse_more_than_available(more.saturating_mul(self.page_size.bytes()))?;
        let more = shares_of(&self.nodes_that_give(before)?, before, more, self.page_size)?;
        self.change(before, &more, self.asked(), Token::of(self, PerNode::default()))
    }

    /// The nodes from which the pool takes more pages: those that it has. If the mount has named
    /// none, a node with processors gives also if it was full at the mount.
    fn nodes_that_give(&self, before: &PerNode) -> Result<Vec<NumaNode>> {
        let mut nodes: BTreeSet<NumaNode> = before.iter().map(|(node, _)| node).collect();
        if !self.names_nodes {
            let has_reserve = self.nodes_of_reserves();
            let more = numa::nodes_with_processors()?.into_iter();
            nodes.extend(more.filter(|node| has_reserve.contains(node)));
        }
        Ok(nodes.into_iter().collect())
    }

    fn resize_parts(&self, before: &PerNode, parts: &BTreeMap<NumaNode, u64>) -> Result<()> {
        sizes::refuse_other_than(&self.nodes_of_reserves(), parts.keys().copied())?;
        let unnamed = |(node, _): &(NumaNode, u64)| !parts.contains_key(node);
        if let Some((node, pages)) = before.iter().find(unnamed) {
            return Err(Error::invalid(format!(
                "the pool has {pages} pages of NUMA node {node}, which the request does not name; name each node of the \
                 pool, with size 0 to remove its part"
            )));
        }
        let after: PerNode = parts.iter().map(|(node, pages)| (*node, *pages)).collect();
        if after.total() == 0 {
            return Err(Error::invalid("a pool without pages; unmount it in place of that"));
        }
        let beyond = |one: &PerNode, other: &PerNode| -> PerNode {
            one.iter().map(|(node, pages)| (node, pages.saturating_sub(other.of(node)))).collect()
        };
        let token = self.patiently(|| self.promise_parts(&beyond(before, &after)))?;
        self.change(before, &beyond(&after, before), Asked::ByName, token)
    }

    /// Promises free pages of each node, all or none.
    fn promise_parts(&self, pages: &PerNode) -> Result<Token<'_>> {
        let mut accounts = self.accounts();
        for (node, wanted) in pages.iter() {
            let account = accounts.of(node);
            if account.available() < wanted {
                let (total, used) = (account.total, account.total - account.available());
                return Err(Error::InUse(format!(
                    "{used} of the {total} pages of NUMA node {node} are in use, and its part would have {}; remove files \
                     there, or move them to other nodes (user.hugetlb2.placement), first",
                    total - wanted
                )));
            }
        }
        pages.iter().for_each(|(node, pages)| accounts.of_mut(node).promise(pages));
        Ok(Token::of(self, pages.clone()))
    }

    /// The parts of the sizes `before` get `more` pages, and lose those of the token `less`.
    fn change(
        &self,
        before: &PerNode,
        more: &PerNode,
        asked: Asked,
        less: Token<'_>,
    ) -> Result<()> {
        let grown = before.clone().and(more);
        let after = grown.clone().less(less.pages());
        let (taken, given) = (more.total() > 0, less.pages().total() > 0);
        let bytes = self.growth_of_parts(before, &grown);
        self.grow_reserves(&bytes, asked, |_| Ok(()))?;
        reached_if(taken, Step::EnlargeGrown);
        if let Err(error) = self.note_sizes(&after) {
            self.cut_reserves(&bytes).1?;
            return Err(error);
        }
        reached_if(taken, Step::EnlargeNoted);
        reached_if(given, Step::ReduceNoted);
        if let Err(error) = self.give_parts(&self.growth_of_parts(&after, &grown)) {
            self.note_sizes(before)?;
            self.cut_reserves(&bytes).1?;
            return Err(error);
        }
        reached_if(given, Step::ReduceCut);
        less.destroy();
        self.hand_out(more);
        debug_assert_eq!(self.accounts().totals(), after, "the parts are as they were noted");
        Ok(())
    }

    /// Counts pages whose memory the reserves have taken.
    fn hand_out(&self, more: &PerNode) {
        let mut accounts = self.accounts();
        for (node, pages) in more.iter() {
            let account = accounts.of_mut(node);
            account.set_total(account.total + pages, self.page_size.bytes());
        }
        accounts.give_back(more);
        drop(accounts);
        self.announce_free_pages();
    }

    /// The parts give `bytes` to the machine, less the bytes that they lack.
    fn give_parts(&self, bytes: &PerNode) -> Result<()> {
        let lacked: PerNode =
            bytes.iter().map(|(node, bytes)| (node, self.lack_less(node, bytes))).collect();
        let (given, cut) = self.cut_reserves(&bytes.clone().less(&lacked));
        if cut.is_err() {
            lacked.and(&given).iter().for_each(|(node, bytes)| self.note_short(node, bytes));
        }
        cut
    }

    /// Bytes by which the parts of the sizes `after` are larger than those of `before`.
    fn growth_of_parts(&self, before: &PerNode, after: &PerNode) -> PerNode {
        let bytes = |parts: &PerNode, node| bytes_of(parts.of(node), self.page_size);
        let more = |node| (node, bytes(after, node) - bytes(before, node));
        self.nodes_of_reserves().into_iter().map(more).collect()
    }

    /// The reserves give `bytes`, which are promised to no file, back to the machine. Returns the
    /// bytes that were given.
    pub(super) fn cut_reserves(&self, bytes: &PerNode) -> (PerNode, Result<()>) {
        let mut given = PerNode::default();
        for (node, bytes) in bytes.iter() {
            let (cut, result) = self.reserve_of(node).cut(bytes);
            given.add(node, cut);
            if result.is_err() {
                return (given, result);
            }
        }
        (given, Ok(()))
    }

    /// Gives `bytes`, which the part of `node` has too many, back to the machine. The next worker
    /// gives back what remains.
    pub(super) fn give_surplus(&self, node: NumaNode, bytes: u64) {
        if let (given, Err(error)) = self.reserve_of(node).cut(bytes) {
            log::warn!("the pool has {} bytes too many: {error}", bytes - given);
        }
    }

    /// The right of the nodes that give memory for a size of the whole pool.
    pub(super) fn asked(&self) -> Asked {
        if self.names_nodes { Asked::ByName } else { Asked::ByPool }
    }

    /// The nodes from which a part takes memory that was asked for so.
    pub(super) fn source_of(&self, asked: Asked) -> Source {
        match asked {
            Asked::ByName if !self.is_alone => Source::ItsNode,
            Asked::ByName | Asked::ByPool => Source::Anywhere,
        }
    }

    /// The reserves take `bytes` from the machine: all or none. Tells `progress` the bytes of each
    /// step.
    ///
    /// # Errors
    /// [`Error::NodeFull`] and [`Error::NoMemory`], and the errors of `progress`.
    pub(super) fn grow_reserves(
        &self,
        bytes: &PerNode,
        asked: Asked,
        mut progress: impl FnMut(u64) -> Result<()>,
    ) -> Result<()> {
        if bytes.total() == 0 {
            return Ok(()); // a pool shrinks also on a machine without memory
        }
        if asked == Asked::ByName {
            refuse_full_nodes(bytes)?;
        }
        refuse_more_than_available(bytes.total())?;
        let source = self.source_of(asked);
        let mut added = PerNode::default();
        let grown = bytes.iter().try_for_each(|(node, bytes)| {
            self.reserve_of(node).grow(bytes, source, |step| {
                added.add(node, step);
                progress(step)
            })
        });
        if grown.is_err() {
            log::warn!(
                "the machine has no memory for {} bytes more; {} bytes are given back",
                bytes.total(),
                added.total()
            );
            self.cut_reserves(&added).1?;
        }
        grown
    }
}

fn reached_if(condition: bool, step: Step) {
    if condition {
        steps::reached(step);
    }
}

/// The machine needs no second node: the account goes by the homes of pages.
#[cfg(test)]
mod tests {
    use super::super::tests::{assert_sound, pool_of_two_nodes};
    use super::super::{Holding, Resolved};
    use super::*;
    use crate::placement::Order;
    use crate::units::{FOLIO_SIZE, PageSize, Range};

    const PAGE: u64 = FOLIO_SIZE;

    fn parts(parts: &[(u32, u64)]) -> Sizes {
        Sizes::Parts(parts.iter().map(|(node, pages)| (NumaNode(*node), *pages)).collect())
    }

    fn sizes(pool: &Pool) -> Vec<(u32, u64)> {
        pool.accounts().totals().iter().map(|(node, pages)| (node.0, pages)).collect()
    }

    /// Bytes of all reserves.
    fn bytes(pool: &Pool) -> Vec<u64> {
        pool.reserves.iter().map(|reserve| reserve.lock().size()).collect()
    }

    fn file_on(pool: &Pool, node: u32, pages: u64) -> Holding {
        let mut file = Holding::create(PageSize::Huge).unwrap();
        let order = Order::Prefer(vec![NumaNode(node)]);
        let wish = Resolved { order, strict: true, ..Resolved::default() };
        let growth = file.begin_growth(pool, Range::new(0, 0), pages * PAGE, &wish).unwrap();
        file.complete(growth).unwrap();
        file
    }

    #[test]
    fn parts_grow_and_shrink_in_one_change() {
        let pool = pool_of_two_nodes();
        let files = [file_on(&pool, 1, 2)];
        for wanted in [[(0, 2), (1, 9)], [(0, 8), (1, 2)], [(0, 8), (1, 2)], [(0, 9), (1, 10)]] {
            pool.resize(&parts(&wanted)).unwrap();
            assert_eq!(sizes(&pool), wanted);
            assert_sound(&pool, &files);
        }
    }

    #[test]
    fn a_part_shrinks_to_nothing_and_grows_from_nothing() {
        let pool = pool_of_two_nodes();
        let files = [file_on(&pool, 0, 2)];
        pool.resize(&parts(&[(0, 4), (1, 0)])).unwrap();
        assert_eq!((sizes(&pool), pool.nodes()), (vec![(0, 4)], vec![NumaNode(0)]));
        assert_eq!(bytes(&pool)[1], 0, "a part without pages has no float");
        assert_sound(&pool, &files);
        let refused = pool.promise_on(NumaNode(1), 1).map(drop);
        assert!(matches!(refused, Err(Error::Full)), "{refused:?}");
        pool.resize(&Sizes::Even(vec![NumaNode(0), NumaNode(1)], 9)).unwrap();
        assert_eq!(sizes(&pool), [(0, 5), (1, 4)]);
        assert_sound(&pool, &[file_on(&pool, 1, 4)].into_iter().chain(files).collect::<Vec<_>>());
    }

    #[test]
    fn a_refused_change_of_parts_changes_nothing() {
        let pool = pool_of_two_nodes();
        let files = [file_on(&pool, 1, 3)];
        let (before, taken) = (sizes(&pool), bytes(&pool));
        const TOO_MANY: u64 = 1 << 30;
        for (wanted, why) in [
            (parts(&[(0, 8), (1, 2)]), "3 of the 6 pages of NUMA node 1 are in use, and its part"),
            (parts(&[(0, 8), (1, 0)]), "3 of the 6 pages of NUMA node 1 are in use, and its part"),
            (parts(&[(0, TOO_MANY), (1, 4)]), "NUMA node 0 cannot give 225179983"),
            (parts(&[(0, 8)]), "the pool has 6 pages of NUMA node 1, which the request does not"),
            (parts(&[(0, 6), (1, 6), (7, 1)]), "NUMA node 7 has no memory for the pool"),
            (parts(&[(0, 0), (1, 0)]), "a pool without pages"),
        ] {
            let error = pool.resize(&wanted).unwrap_err().to_string();
            assert!(error.starts_with(why), "{wanted:?}: {error}");
            assert_eq!((sizes(&pool), bytes(&pool)), (before.clone(), taken.clone()), "{wanted:?}");
            assert_sound(&pool, &files);
        }
    }
}
