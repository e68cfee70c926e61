//! Resizes of the pool while it is in use: as a whole, or node by node.
//!
//! A part that grows takes its memory first, and notes its new size then. A part that shrinks does
//! it the other way round. A worker that dies in between leaves a size that is noted and memory
//! beyond it, which the next worker gives back; the kernel sends the request again.

use super::moves::bytes_of;
use super::{Error, PerNode, Pool, Result, Sizes, Token, refuse_full_nodes, shares_of};
use crate::steps::{self, Step};
use crate::sys::refuse_more_than_available;
use crate::units::NumaNode;

impl Pool {
    /// Changes the pool's size while it is in use.
    ///
    /// # Errors
    /// [`Error::Busy`] and [`Error::InUse`] for a size below the pages in use, [`Error::NoMemory`]
    /// and [`Error::NodeFull`] for more than the machine or a node can give, [`Error::Invalid`] for
    /// nodes that are not the pool's. The size is as before.
    pub fn resize(&self, sizes: &Sizes) -> Result<()> {
        let _one_at_a_time = self.keep_size();
        let before = self.accounts().totals();
        match sizes {
            Sizes::Anywhere(pages) | Sizes::Even(_, pages) => self.resize_whole(&before, *pages),
            Sizes::Parts(parts) => self.resize_parts(&before, parts),
        }
    }

    fn resize_whole(&self, before: &PerNode, pages: u64) -> Result<()> {
        let Some(more) = pages.checked_sub(before.total()) else {
            let token = self.patiently(|| self.promise(before.total() - pages)).map_err(|_| {
                Error::Busy("more pages are in use than the pool would have; remove files first")
            })?;
            return self.reduce(before, token);
        };
        refuse_more_than_available(more.saturating_mul(self.page_size.bytes()))?;
        self.enlarge(before, &shares_of(&self.reserves, before, more, self.page_size)?)
    }

    /// The parts that shrink promise their pages first, and give them last: if a part cannot grow,
    /// nothing has changed.
    fn resize_parts(&self, before: &PerNode, parts: &PerNode) -> Result<()> {
        let nodes: Vec<NumaNode> = parts.iter().map(|(node, _)| node).collect();
        if nodes != self.nodes() {
            return Err(Error::invalid(format!(
                "the pool has the NUMA nodes {}, and the request names {}: a mounted pool keeps its nodes",
                NumaNode::list(&self.nodes()),
                NumaNode::list(&nodes)
            )));
        }
        let beyond = |one: &PerNode, other: &PerNode| -> PerNode {
            one.iter().map(|(node, pages)| (node, pages.saturating_sub(other.of(node)))).collect()
        };
        let (more, less) = (beyond(parts, before), beyond(before, parts));
        let token = self.patiently(|| self.promise_parts(&less))?;
        let grown = before.clone().and(&more);
        if more.total() > 0 {
            refuse_full_nodes(&self.growth_of_parts(before, &grown))?;
            self.enlarge(before, &more)?;
        }
        if less.total() > 0 { self.reduce(&grown, token) } else { Ok(()) }
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

    fn reduce(&self, before: &PerNode, token: Token<'_>) -> Result<()> {
        let after = before.clone().less(token.pages());
        self.note_sizes(&after)?;
        steps::reached(Step::ReduceNoted);
        let surplus = self.growth_of_parts(&after, before);
        let lacked: PerNode =
            surplus.iter().map(|(node, bytes)| (node, self.lack_less(node, bytes))).collect();
        if let (given, Err(error)) = self.cut_reserves(&surplus.less(&lacked)) {
            lacked.and(&given).iter().for_each(|(node, bytes)| self.note_short(node, bytes));
            self.note_sizes(before)?;
            return Err(error);
        }
        steps::reached(Step::ReduceCut);
        token.destroy();
        debug_assert_eq!(self.accounts().totals(), after, "the parts are as they were noted");
        Ok(())
    }

    /// Bytes by which the parts of the sizes `after` are larger than those of `before`.
    fn growth_of_parts(&self, before: &PerNode, after: &PerNode) -> PerNode {
        let bytes = |parts: &PerNode, node| bytes_of(parts.of(node), self.page_size);
        let more = |node| (node, bytes(after, node) - bytes(before, node));
        self.nodes().into_iter().map(more).collect()
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

    fn enlarge(&self, before: &PerNode, more: &PerNode) -> Result<()> {
        let after = before.clone().and(more);
        let bytes = self.growth_of_parts(before, &after);
        self.grow_reserves(&bytes)?;
        steps::reached(Step::EnlargeGrown);
        if let Err(error) = self.note_sizes(&after) {
            self.cut_reserves(&bytes).1?;
            return Err(error);
        }
        steps::reached(Step::EnlargeNoted);
        let mut accounts = self.accounts();
        for (node, total) in after.iter() {
            accounts.of_mut(node).set_total(total, self.page_size.bytes());
        }
        accounts.give_back(more);
        debug_assert_eq!(accounts.totals(), after, "the parts are as they were noted");
        drop(accounts);
        self.announce_free_pages();
        Ok(())
    }

    /// The reserves take `bytes` from the machine: all or none.
    fn grow_reserves(&self, bytes: &PerNode) -> Result<()> {
        refuse_more_than_available(bytes.total())?;
        let mut added = PerNode::default();
        let grown = bytes.iter().try_for_each(|(node, bytes)| {
            self.reserve_of(node).grow(bytes, |step| {
                added.add(node, step);
                Ok(())
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
