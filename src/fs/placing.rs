//! The NUMA nodes of a file's memory: the placement that is kept with its inode, and the caller's
//! part in it.
//!
//! The placement decides when a file grows, by the thread that makes it grow: that is when memory
//! is taken. Memory that is there moves when other words are set.

use super::callers::{Callers, Known};
use super::gate::Gate;
use super::targets::{KnownTopology, Topology};
use super::{Fs, Located, Object, Pace, RequestContext};
use crate::attributes::PLACEMENT;
use crate::error::{Error, Result};
use crate::placement::{
    Caller, Machine, POLICY_BYTES, Placement, Resolved, Wish, parse_policy, parse_processor,
};
use crate::sys::topology::weight_of;
use crate::targets::best;
use crate::units::{FOLIO_SIZE, InodeId, NumaNode};
use parking_lot::RwLock;
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt::Write as _;
use std::sync::Arc;

/// The machine's part in a placement.
pub struct Placer {
    /// The nodes of the pool, ascending.
    nodes: RwLock<Arc<[NumaNode]>>,
    pub(super) topology: KnownTopology,
    callers: Callers,
    gate: Gate,
}

impl Placer {
    /// Reads what the machine is like, if the pool has several nodes.
    pub fn new(nodes: Vec<NumaNode>) -> Self {
        let placer = Self {
            nodes: RwLock::new([].into()),
            topology: KnownTopology::default(),
            callers: Callers::default(),
            gate: Gate::default(),
        };
        placer.know(nodes);
        placer
    }

    /// The pool has been resized, and has pages of `nodes`. A growth then finds the topology read.
    pub fn know(&self, nodes: Vec<NumaNode>) {
        *self.nodes.write() = nodes.into();
        self.topology.forget();
        if self.has_choice() {
            self.topology();
        }
    }

    fn topology(&self) -> Arc<Topology> {
        self.topology.get(&Pace::steady()).unwrap_or_else(|error| {
            log::warn!("no placement knows the distance or the quality of a node: {error}");
            Arc::default()
        })
    }

    fn nodes(&self) -> Arc<[NumaNode]> {
        self.nodes.read().clone()
    }

    /// True if the pool has several nodes.
    pub fn has_choice(&self) -> bool {
        self.nodes.read().len() > 1
    }

    /// The nodes that the pages of a growth want, which `request` asks for.
    fn resolve(&self, placement: &Placement, request: RequestContext) -> Resolved {
        self.resolve_for(placement, self.look(&placement.wish, request).as_ref())
    }

    pub(super) fn resolve_for(&self, placement: &Placement, caller: Option<&Caller>) -> Resolved {
        let (topology, nodes) = (self.topology(), self.nodes());
        placement.resolve(
            caller,
            Machine {
                nodes: &nodes,
                distance: &|from, to| topology.distance(from, to),
                weight: &weight_of,
                best: &|quality, near| best(&topology.targets, quality, near),
            },
        )
    }

    /// Looks at the calling thread, as far as `wish` needs it. `None` if that is not at all, or if
    /// /proc does not show the thread.
    fn look(&self, wish: &Wish, request: RequestContext) -> Option<Caller> {
        if request.thread == 0 || !wish.depends_on_caller() {
            return None;
        }
        self.callers.look(request.thread, |thread| self.look_at(thread, wish, request))
    }

    fn look_at(&self, thread: &Known, wish: &Wish, request: RequestContext) -> Option<Caller> {
        let (own, wish) = match wish {
            Wish::Caller => (true, self.policy(thread, request)?),
            wish => (false, wish.clone()),
        };
        let near = if wish.depends_on_caller() { self.near(&thread.files.stat())? } else { None };
        // The kernel has bounded the nodes of all other policies.
        let allowed = if own && wish == Wish::Local { thread.allowed() } else { None };
        Some(Caller { wish, near, allowed })
    }

    fn policy(&self, thread: &Known, request: RequestContext) -> Option<Wish> {
        let text = self.gate.pass(request.user, || thread.files.numa_maps(POLICY_BYTES))?;
        parse_policy(&text)
    }

    /// The node of the processor that a thread runs on, by its file `stat`; `None` inside for a
    /// node that is not known. `None` if the thread has ended. A processor that is not known has
    /// come to the machine since.
    fn near(&self, stat: &[u8]) -> Option<Option<NumaNode>> {
        let processor = parse_processor(stat)?;
        let known = self.topology().processors.node_of(processor);
        Some(known.or_else(|| {
            self.topology.forget();
            self.topology().processors.node_of(processor)
        }))
    }
}

/// The place of memory, for the words of its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    AsWished,
    /// On another node than was asked for, as it could not be moved.
    Pinned,
    /// On another node than was asked for.
    Elsewhere,
}

impl Fs {
    /// The placement of a file or directory: its own, or that of a node without one.
    pub(super) fn placement(&self, node: InodeId) -> Result<Placement> {
        match self.index.attribute(node, OsStr::new(PLACEMENT)) {
            Ok(text) => Placement::parse(&text),
            Err(Error::Os(Errno::NODATA)) => Ok(Placement::default()),
            Err(error) => Err(error),
        }
    }

    /// The nodes that the pages of a growth from `offset` on want, on a pool of several nodes. A
    /// policy that a program has set for those bytes comes before the thread's own, as on tmpfs.
    /// With `strict:` it does not: each program that may read a file can set one, and would make
    /// the growth of others fail.
    pub(super) fn placement_of_growth(
        &self,
        node: InodeId,
        offset: u64,
        request: RequestContext,
    ) -> Result<Resolved> {
        let placement = self.placement(node)?;
        let is_free = placement == Placement::default();
        let ahead = is_free.then(|| self.wished_ahead(node, offset)).flatten();
        Ok(ahead.unwrap_or_else(|| self.placer.resolve(&placement, request)))
    }

    /// The placement that is set. Its text is the canonical form of the words.
    ///
    /// # Errors
    /// [`Error::Invalid`] for words that are none, and for nodes that the pool does not have.
    pub(super) fn checked_placement(&self, value: &[u8]) -> Result<Placement> {
        let placement = Placement::parse(value)?;
        placement.refuse_other_than(&self.placer.nodes())?;
        Ok(placement)
    }

    /// The move of a file's memory that new words ask for. `None` if the pool has one node, or the
    /// node has no pages.
    ///
    /// # Errors
    /// [`Error::Full`] for strict words whose nodes have too few free pages; [`Error::TakesLong`].
    pub(super) fn relocation(
        &self,
        node: InodeId,
        placement: &Placement,
        request: RequestContext,
    ) -> Result<Option<(Arc<Object>, Resolved)>> {
        let object = self.known_object(node).filter(|object| object.summary().pages > 0);
        let Some(object) = object.filter(|_| self.placer.has_choice()) else { return Ok(None) };
        let pace = Pace::of(request);
        pace.refuse_if(|| Ok(true))?;
        let placement = self.placer.resolve(placement, request);
        self.recall_ready(); // the nodes have room for what is in use before what may be
        object.refuse_relocation(&placement, &self.pool, &pace)?;
        Ok(Some((object, placement)))
    }

    /// The text of the attribute: a line with the words, and for a file with memory a line `<node>
    /// <bytes>` for each node. Bytes on another node than was asked for have a line of their own,
    /// with the reason behind them.
    pub(super) fn placement_text(&self, node: InodeId, pace: &Pace) -> Result<String> {
        let placement = self.placement(node)?;
        let mut text = format!("{placement}\n");
        if let Some(object) = self.known_object(node) {
            for ((on, place), bytes) in self.memory_by_node(&object, &placement, pace)? {
                let on = on.map_or("-".to_owned(), |node| node.to_string());
                let why = match place {
                    Place::AsWished => "",
                    Place::Pinned => " pinned",
                    Place::Elsewhere => self.why_elsewhere(&placement),
                };
                let _ = writeln!(text, "{on} {bytes}{why}");
            }
        }
        Ok(text)
    }

    /// Bytes of memory on each node, by the kind of place that this is for them.
    fn memory_by_node(
        &self,
        object: &Object,
        placement: &Placement,
        pace: &Pace,
    ) -> Result<BTreeMap<(Option<NumaNode>, Place), u64>> {
        let mut bytes = BTreeMap::new();
        if let [only] = self.placer.nodes()[..] {
            let memory = object.summary().memory;
            bytes.extend((memory > 0).then_some(((Some(only), Place::AsWished), memory)));
            return Ok(bytes);
        }
        pace.refuse_if(|| Ok(true))?;
        let (wished, page_size) = (self.wished(placement), self.pool.page_size());
        object.locate(pace, |Located { folio, on, is_pinned }| {
            let page = page_size.pages_touching(folio.range()).start;
            let place = match on.is_none_or(|node| wished.wishes(page, node)) {
                true => Place::AsWished,
                false if is_pinned => Place::Pinned,
                false => Place::Elsewhere,
            };
            *bytes.entry((on, place)).or_default() += FOLIO_SIZE;
        })?;
        Ok(bytes)
    }

    /// The nodes that the words name. The wish of a caller that has gone is not known: then each
    /// node is as wished.
    fn wished(&self, placement: &Placement) -> Resolved {
        match placement.wish.names_nodes() {
            true => self.placer.resolve_for(placement, None),
            false => Resolved::default(),
        }
    }

    /// The reason, behind a space, why memory that is not pinned is not on the nodes that are asked
    /// for: these are full, or they were when the file grew.
    fn why_elsewhere(&self, placement: &Placement) -> &'static str {
        let (wished, balances) = (self.wished(placement).nodes(), self.pool.balances());
        let mut with_room = balances.iter().filter(|(_, account)| account.available() > 0);
        if with_room.any(|(node, _)| wished.contains(&node)) { " earlier" } else { " full" }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::placement::Order;

    fn request(thread: u32) -> RequestContext {
        RequestContext {
            unique: 1,
            resent: false,
            user: 0,
            thread,
            unprivileged: false,
            brief: false,
        }
    }

    fn placer() -> Placer {
        Placer::new([0, 1].map(NumaNode).to_vec())
    }

    fn resolved(words: &str, thread: u32) -> Resolved {
        placer().resolve(&Placement::parse(words.as_bytes()).unwrap(), request(thread))
    }

    /// The machine of this test has a node 0, and may have others.
    #[test]
    fn a_thread_without_a_policy_wants_memory_where_it_runs() {
        let own = rustix::thread::gettid().as_raw_nonzero().get() as u32;
        for words in ["caller", "local"] {
            let Order::Prefer(nodes) = resolved(words, own).order else { panic!("{words}") };
            assert_eq!(nodes.len(), 1, "{words}");
        }
        let Order::Prefer(nodes) = resolved("bind:0-1", own).order else { panic!() };
        assert_eq!(nodes.len(), 2);
    }

    #[test]
    fn the_policy_of_the_calling_thread_counts() {
        use crate::sys::policy::{Policy, set_for_thread};
        let within = |policy| {
            let resolve = move || {
                set_for_thread(policy).unwrap();
                resolved("caller", rustix::thread::gettid().as_raw_nonzero().get() as u32)
            };
            std::thread::spawn(resolve).join().unwrap()
        };
        let bound = within(Policy::Bind(NumaNode(0)));
        assert_eq!(bound.order, Order::Prefer(vec![NumaNode(0)]));
        assert_eq!((bound.strict, bound.next), (false, vec![NumaNode(1)]));
        let preferred = within(Policy::Prefer(NumaNode(0)));
        assert_eq!(preferred.order, Order::Prefer(vec![NumaNode(0)]));
    }

    #[test]
    fn a_thread_that_is_not_seen_has_no_wish() {
        const NO_THREAD: u32 = i32::MAX as u32; // above the largest pid_max
        for thread in [0, NO_THREAD] {
            assert_eq!(resolved("caller", thread), Resolved::default());
            assert_eq!(resolved("local", thread), Resolved::default());
        }
    }
}
