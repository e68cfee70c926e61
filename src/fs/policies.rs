//! Files whose memory follows what programs do to it after they have sized them: policies that they
//! set by mbind(2), and moves of their own (mbind(2) with MPOL_MF_MOVE, move_pages(2), and the
//! kernel's when the cpuset of a process changes).
//!
//! A policy of a range is the file's, so the daemon reads it back from a mapping of its own. The
//! daemon looks at a part of all files in each round. When it finds something to move, it looks
//! through that file as a whole:
//!
//! ```text
//!   the page's policy names other nodes than its home  ->  the page moves, with its account
//!   no policy, and all of its memory lies elsewhere    ->  that node becomes its home
//!   neither, or that node has no free page             ->  the memory goes back to the home
//! ```
//!
//! The first two rows are for files with the placement `caller`. The owner of another file has
//! named its nodes.
//!
//! A move keeps the pool and the machine busy, and any program that maps a file can cause one. So
//! after each move of a file, the next one comes later.

use super::{Fs, Object, Pace};
use crate::error::{Error, Result};
use crate::placement::{Nodes, Placement, Resolved, Weights, Wish};
use crate::pool::{Displaced, Run};
use crate::sys::policy::{Mode, RangePolicy};
use crate::units::{InodeId, NumaNode, Page};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Pages whose policies are read in a round. A read takes less than a microsecond.
const POLICIES_A_ROUND: u64 = 16 << 10;

/// Bytes of which a round asks where they lie. The answer takes some microseconds a folio.
const BYTES_A_ROUND: u64 = 2 << 30;

/// A file costs a round as much as so many pages.
const PAGES_PER_FILE: u64 = 16;

/// Pages of a file that are looked at, and moved, at once.
const PART: u64 = 4096;

/// The time that there is between a first move of a file and the second. Each later one is twice as
/// long, up to [`LONGEST`].
const SHORTEST: Duration = Duration::from_secs(1);

const LONGEST: Duration = Duration::from_secs(64);

/// A file that has not moved for so long counts as one that never has.
const FORGOTTEN: Duration = Duration::from_secs(600);

/// The places that the rounds have reached, and the files that have moved. It lives as long as the
/// agent.
#[derive(Default)]
pub struct Policies {
    policies: Walk,
    memory: Walk,
    moved: HashMap<InodeId, Moved>,
}

/// A walk over all pages of all files, over and over.
#[derive(Debug)]
struct Walk {
    /// The next page, and its file. There may be none of these any more.
    next: (InodeId, Page),
}

impl Default for Walk {
    fn default() -> Self {
        Self { next: (InodeId(0), Page(0)) }
    }
}

impl Walk {
    /// The next pages of `files`, which ascend: about `most`, and none twice.
    fn go(&mut self, files: &[(InodeId, u64)], mut most: u64) -> Vec<(InodeId, Run)> {
        let mut found = Vec::new();
        let start = files.partition_point(|(node, _)| *node < self.next.0);
        for (node, pages) in files[start..].iter().chain(&files[..start]) {
            if most == 0 {
                break;
            }
            let first = if *node == self.next.0 { self.next.1.0 } else { 0 };
            let end = pages.min(&(first + most)).to_owned();
            if first < end {
                found.push((*node, Page(first)..Page(end)));
            }
            most = most.saturating_sub(end.saturating_sub(first) + PAGES_PER_FILE);
            self.next =
                if end == *pages { (InodeId(node.0 + 1), Page(0)) } else { (*node, Page(end)) };
        }
        found
    }
}

/// A move of a file.
#[derive(Clone, Copy, Debug)]
struct Moved {
    at: Instant,
    /// The next move comes after this time.
    pause: Duration,
}

impl Moved {
    fn after(before: Option<&Self>, now: Instant) -> Self {
        let recent = before.filter(|before| now.duration_since(before.at) < FORGOTTEN);
        let pause = recent.map_or(SHORTEST, |before| (before.pause * 2).min(LONGEST));
        Self { at: now, pause }
    }

    fn may_move(&self, now: Instant) -> bool {
        now.duration_since(self.at) >= self.pause
    }
}

impl Fs {
    /// True if memory can lie on another NUMA node than it should: the machine has several.
    pub fn has_other_nodes(&self) -> bool {
        !self.pool.is_alone()
    }

    /// A round: looks at a part of the files, and has the memory of those follow in which something
    /// is to be moved. One file moves at a time.
    pub fn follow_programs(&self, policies: &mut Policies, pace: &Pace) {
        let objects: HashMap<InodeId, Arc<Object>> =
            self.objects_of_files().into_iter().map(|object| (object.node(), object)).collect();
        policies.moved.retain(|node, _| objects.contains_key(node));
        for (node, pages) in self.by_policies(policies, &objects) {
            self.follow_if(&objects[&node], policies, pace, |fs, object| {
                fs.is_misplaced_by_policy(object, &pages)
            });
        }
        for (node, pages) in self.by_memory(policies, &objects) {
            self.follow_if(&objects[&node], policies, pace, |_, object| {
                Ok(!object.displaced_among(&pages, pace)?.is_empty())
            });
        }
    }

    /// The pages whose policies a round reads.
    fn by_policies(
        &self,
        policies: &mut Policies,
        objects: &HashMap<InodeId, Arc<Object>>,
    ) -> Vec<(InodeId, Run)> {
        if !self.placer.has_choice() {
            return Vec::new(); // there is one node to which memory can move
        }
        policies.policies.go(&self.files(objects), POLICIES_A_ROUND)
    }

    /// The pages of which a round asks where they lie.
    fn by_memory(
        &self,
        policies: &mut Policies,
        objects: &HashMap<InodeId, Arc<Object>>,
    ) -> Vec<(InodeId, Run)> {
        let most = (BYTES_A_ROUND / self.pool.page_size().bytes()).max(1);
        policies.memory.go(&self.files(objects), most)
    }

    fn files(&self, objects: &HashMap<InodeId, Arc<Object>>) -> Vec<(InodeId, u64)> {
        let pages = |object: &Object| object.pages(self.pool.page_size()).end.0;
        let mut files: Vec<_> =
            objects.iter().map(|(node, object)| (*node, pages(object))).collect();
        files.sort_unstable();
        files
    }

    /// Has a file follow if something `is_to_move`, and if it has not moved just now.
    fn follow_if(
        &self,
        object: &Object,
        policies: &mut Policies,
        pace: &Pace,
        is_to_move: impl FnOnce(&Self, &Object) -> Result<bool>,
    ) {
        let (node, now) = (object.node(), Instant::now());
        let before = policies.moved.get(&node);
        if pace.go_on().is_err() || before.is_some_and(|moved| !moved.may_move(now)) {
            return;
        }
        let done = match is_to_move(self, object) {
            Ok(true) => {
                let moved = Moved::after(before, now);
                policies.moved.insert(node, moved);
                self.follow(object, pace)
            }
            Ok(false) => Ok(()),
            Err(error) => Err(error),
        };
        if let Err(error) = done {
            log::debug!("file {node}: memory does not follow now: {error}");
        }
    }

    fn is_misplaced_by_policy(&self, object: &Object, pages: &Run) -> Result<bool> {
        let Some(policies) = self.policies_to_follow(object, pages)? else { return Ok(false) };
        let is_misplaced = |(run, policy): &(Run, RangePolicy)| {
            let wished = self.wished_by(policy);
            wished.is_some_and(|wished| object.are_misplaced(run.clone(), &wished))
        };
        Ok(policies.iter().any(is_misplaced))
    }

    /// The policies of `pages`. `None` for a file that follows no program: it has a placement of
    /// its own, or there is one node to which memory can move.
    fn policies_to_follow(
        &self,
        object: &Object,
        pages: &Run,
    ) -> Result<Option<Vec<(Run, RangePolicy)>>> {
        if !self.placer.has_choice() || self.placement(object.node())? != Placement::default() {
            return Ok(None);
        }
        object.policies_of(pages, self.pool.page_size()).map(Some)
    }

    /// Moves the memory of a file, a part at a time.
    fn follow(&self, object: &Object, pace: &Pace) -> Result<()> {
        let pages = object.pages(self.pool.page_size());
        log::info!("file {}: memory follows a program's policy or move", object.node());
        for start in (pages.start.0..pages.end.0).step_by(PART as usize) {
            let part = Page(start)..Page(pages.end.0.min(start + PART));
            match self.follow_part(object, &part, pace) {
                Err(Error::Interrupted) => return Err(Error::Interrupted),
                Err(error) => log::debug!("file {}: memory stays: {error}", object.node()),
                Ok(()) => {}
            }
        }
        Ok(())
    }

    fn follow_part(&self, object: &Object, part: &Run, pace: &Pace) -> Result<()> {
        let policies = self.policies_to_follow(object, part)?;
        for (run, policy) in policies.iter().flatten() {
            self.move_to(object, run, policy, pace)?;
        }
        let displaced = object.displaced_among(part, pace)?;
        if let Some(policies) = &policies {
            for (page, node) in settled_elsewhere(&displaced, policies) {
                let there = RangePolicy { mode: Mode::Bind, nodes: vec![node] };
                self.move_to(object, &(page..Page(page.0 + 1)), &there, pace)?;
            }
        }
        if !displaced.is_empty() {
            let returned = object.bring_home(part, &self.pool, pace)?;
            log::debug!("file {}: {returned} folios are back on their node", object.node());
        }
        Ok(())
    }

    /// Moves those of `pages` whose homes are other nodes than the policy's.
    fn move_to(
        &self,
        object: &Object,
        pages: &Run,
        policy: &RangePolicy,
        pace: &Pace,
    ) -> Result<()> {
        let wished = self.wished_by(policy);
        match wished.filter(|wished| object.are_misplaced(pages.clone(), wished)) {
            Some(wished) => {
                self.recall_ready(); // the nodes have room for what is in use before what may be
                object.relocate(pages.clone(), &wished, &self.pool, pace)
            }
            None => Ok(()),
        }
    }

    /// The nodes that a policy names, as far as the pool has pages of them. `None` if it has none.
    fn wished_by(&self, policy: &RangePolicy) -> Option<Resolved> {
        let placement = Placement { wish: wish_of(policy), strict: false };
        let wished = self.placer.resolve_for(&placement, None);
        (!wished.nodes().is_empty()).then_some(wished)
    }

    /// The nodes that the pages of a growth from `offset` on want by the policy that a program has
    /// set there. `None` where there is no policy, and where the kernel does not tell.
    pub(super) fn wished_ahead(&self, node: InodeId, offset: u64) -> Option<Resolved> {
        let policy = self.known_object(node)?.policy_at(offset).unwrap_or_else(|error| {
            log::debug!("file {node}: the policy at {offset} is not known: {error}");
            None
        });
        policy.and_then(|policy| self.wished_by(&policy))
    }
}

/// The pages among `displaced` of which one node has all the memory, and that have no policy.
fn settled_elsewhere<'a>(
    displaced: &'a [Displaced],
    policies: &'a [(Run, RangePolicy)],
) -> impl Iterator<Item = (Page, NumaNode)> + 'a {
    let has_policy = |page: Page| {
        let after = policies.partition_point(|(run, _)| run.end <= page);
        policies.get(after).is_some_and(|(run, _)| run.contains(&page))
    };
    let settled = move |displaced: &Displaced| {
        displaced.on.filter(|_| !has_policy(displaced.page)).map(|node| (displaced.page, node))
    };
    displaced.iter().filter_map(settled)
}

fn wish_of(policy: &RangePolicy) -> Wish {
    let nodes = Nodes::Listed(policy.nodes.clone());
    match policy.mode {
        Mode::Bind => Wish::Bind(nodes),
        Mode::Prefer => Wish::Preferred(nodes),
        Mode::Interleave => Wish::Interleave(nodes),
        Mode::WeightedInterleave => Wish::WeightedInterleave(nodes, Weights::new()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(pages: &[(u64, u64)]) -> Vec<(InodeId, u64)> {
        pages.iter().map(|(node, pages)| (InodeId(*node), *pages)).collect()
    }

    /// The pages of one round, a file as `(number, first, end)`.
    fn round(walk: &mut Walk, pages: &[(u64, u64)], most: u64) -> Vec<(u64, u64, u64)> {
        let found = walk.go(&files(pages), most);
        found.into_iter().map(|(node, run)| (node.0, run.start.0, run.end.0)).collect()
    }

    #[test]
    fn a_walk_reaches_each_page_in_turn() {
        const FILES: &[(u64, u64)] = &[(3, 10), (4, 0), (7, 100)];
        let mut walk = Walk::default();
        assert_eq!(round(&mut walk, FILES, 60), [(3, 0, 10), (7, 0, 18)]);
        assert_eq!(round(&mut walk, FILES, 60), [(7, 18, 78)]);
        assert_eq!(round(&mut walk, FILES, 60), [(7, 78, 100), (3, 0, 10)]);
        assert_eq!(round(&mut walk, &[(3, 10)], 60), [(3, 0, 10)], "the others are gone");
        assert_eq!(round(&mut walk, &[(3, 10)], 60), [(3, 0, 10)]);
        assert_eq!(round(&mut walk, &[], 60), []);
        assert_eq!(round(&mut walk, &[(1, 300)], 200), [(1, 0, 200)]);
        assert_eq!(round(&mut walk, &[(1, 50)], 200), [], "it has become shorter");
        assert_eq!(round(&mut walk, &[(1, 50)], 200), [(1, 0, 50)]);
    }

    #[test]
    fn a_file_that_moves_often_moves_ever_less_often() {
        let (start, mut last) = (Instant::now(), None::<Moved>);
        let mut moves = Vec::new();
        for second in 0..400 {
            let now = start + Duration::from_secs(second);
            if last.is_none_or(|last| last.may_move(now)) {
                last = Some(Moved::after(last.as_ref(), now));
                moves.push(second);
            }
        }
        assert_eq!(moves, [0, 1, 3, 7, 15, 31, 63, 127, 191, 255, 319, 383]);
        let later = start + Duration::from_secs(383) + FORGOTTEN;
        assert_eq!(Moved::after(last.as_ref(), later).pause, SHORTEST, "it was calm");
    }

    #[test]
    fn memory_without_a_policy_stays_where_a_program_moved_it() {
        let bind = |node| RangePolicy { mode: Mode::Bind, nodes: vec![NumaNode(node)] };
        let policies = [(Page(2)..Page(4), bind(0)), (Page(6)..Page(7), bind(1))];
        let displaced =
            |page, on: Option<u32>| Displaced { page: Page(page), on: on.map(NumaNode) };
        let displaced = [
            displaced(1, Some(1)),
            displaced(3, Some(1)),
            displaced(4, None),
            displaced(6, Some(0)),
            displaced(7, Some(0)),
        ];
        let settled: Vec<_> = settled_elsewhere(&displaced, &policies).collect();
        assert_eq!(settled, [(Page(1), NumaNode(1)), (Page(7), NumaNode(0))]);
    }
}
