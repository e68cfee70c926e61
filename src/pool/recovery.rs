//! A pool that outlives the process that filled it.

use super::adoption::homes_for;
use super::page_set::Run;
use super::{Account, Adoption, Held, PerNode, Pool, Reserve, is_alone};
use crate::attributes::LONGEST_VALUE;
use crate::error::{Error, Result};
use crate::sealed::{Reach, Sealed};
use crate::sys::calls;
use crate::units::{FOLIO_SIZE, NumaNode, PageSize};
use rustix::fs::{CWD, Mode, OFlags, XattrFlags};

/// The directory in the daemon's namespace below which the reserves are mounted. The name of each
/// is the number of its NUMA node.
pub const RESERVES: &str = "/reserve";

/// Attributes of that directory: pages of the pool ([`sizes_text`]), and bytes that were in folios
/// at the mount, decimal.
const PAGES: &str = "trusted.pages";
const HUGE_AT_MOUNT: &str = "trusted.huge_at_mount";

impl Pool {
    /// Mounts the reserves, so that another process finds the pool when this process is gone.
    ///
    /// # Errors
    /// The errors of mkdir(2), move_mount(2) and setxattr(2).
    pub fn attach(&mut self) -> Result<()> {
        self.outlives_us = true;
        for reserve in &self.reserves {
            let path = reserve.path();
            calls::mkdir(&path, Mode::from_raw_mode(0o700))?;
            reserve.lock().attach(&path)?;
        }
        note(HUGE_AT_MOUNT, &self.huge_at_mount.to_string())?;
        let totals = self.accounts().totals();
        self.note_sizes(&totals)
    }

    /// Notes the intended size of each node's part.
    pub(super) fn note_sizes(&self, totals: &PerNode) -> Result<()> {
        if self.outlives_us {
            note(PAGES, &sizes_text(&self.nodes_of_reserves(), totals))
        } else {
            Ok(())
        }
    }

    /// The pool that another process has attached. `names_nodes` says if the mount has named the
    /// nodes. The account is empty until [`Pool::adopt`].
    ///
    /// # Errors
    /// Those of [`Sealed::open`].
    pub fn open(page_size: PageSize, names_nodes: bool) -> Result<Self> {
        let huge_at_mount = noted(HUGE_AT_MOUNT)?.parse();
        let huge_at_mount = huge_at_mount.map_err(|_| Error::Corrupt(HUGE_AT_MOUNT.into()))?;
        let mut reserves = Vec::new();
        for entry in std::fs::read_dir(RESERVES)? {
            let node = entry?.file_name().to_str().and_then(NumaNode::parse);
            let node = node.ok_or_else(|| Error::Corrupt("a reserve that is no node's".into()))?;
            reserves.push(Reserve::open(node)?);
        }
        reserves.sort_by_key(|reserve| reserve.node);
        let nodes: Vec<_> = reserves.iter().map(|reserve| reserve.node).collect();
        let text = noted(PAGES)?;
        let totals = parse_sizes(&text, &nodes);
        let totals = totals.ok_or_else(|| Error::Corrupt(format!("{PAGES} {text:?}")))?;
        let accounts = nodes.iter().map(|node| {
            let mut account = Account::default();
            account.set_total(totals.of(*node), page_size.bytes());
            account.promised = account.total;
            (*node, account)
        });
        let accounts = accounts.collect();
        let pool = Self::on(page_size, reserves, accounts);
        let is_alone = is_alone()?;
        Ok(Self { outlives_us: true, huge_at_mount, is_alone, names_nodes, ..pool })
    }

    /// Begins to make the accounts of a pool that was just opened. [`Pool::adopt`] follows.
    pub fn begin_adoption(&self) -> Adoption {
        let bytes = |reserve: &Reserve| reserve.lock().folio_count() * FOLIO_SIZE;
        let reserves: Vec<_> =
            self.reserves.iter().map(|reserve| (reserve.node, bytes(reserve))).collect();
        Adoption::new(self.page_size, &self.accounts().totals(), &reserves)
    }

    /// Chooses homes for pages of a file of which no memory tells, after the adoption.
    pub fn homes_for(&self, pages: &[Run]) -> Vec<(Run, NumaNode)> {
        let accounts = self.accounts();
        let with_pages = accounts.iter().filter(|(_, account)| account.total > 0);
        let available: Vec<_> =
            with_pages.map(|(node, account)| (node, account.available())).collect();
        homes_for(pages, &available)
    }

    /// Completes the accounts with those of `adoption`, which has all files. Memory beyond P1 goes
    /// back to the machine. Memory that P1 lacks is short: it was moving, or a program took it out
    /// of its file.
    ///
    /// # Errors
    /// [`Error::Corrupt`] where files have more pages than the pool.
    pub fn adopt(&self, adoption: Adoption) -> Result<()> {
        let (accounts, surplus) = adoption.finish()?;
        let before = self.accounts().totals();
        *self.accounts() = accounts;
        assert_eq!(self.balance().total, before.total(), "the pool keeps its size");
        assert_eq!(self.balance().promised, 0, "a new worker has promised nothing");
        self.cut_reserves(&surplus).1?;
        self.note_new_sizes(&before)?;
        self.refill();
        match self.balance().missing {
            0 => {}
            pages => log::warn!(
                "memory for {pages} pages is missing; it is taken again when there is some"
            ),
        }
        Ok(())
    }

    /// Notes the sizes of the parts if they are not `before` any more.
    fn note_new_sizes(&self, before: &PerNode) -> Result<()> {
        let totals = self.accounts().totals();
        if totals == *before {
            return Ok(());
        }
        let text = sizes_text(&self.nodes_of_reserves(), &totals);
        log::warn!("the NUMA nodes' parts of the pool: {text}");
        self.note_sizes(&totals)
    }

    /// Corrects the account of one file. The accounts have `counted` for it, and the file has
    /// `has`. Where homes differ, the sizes of the nodes' parts follow; no memory moves.
    ///
    /// # Errors
    /// [`Error::Full`] where the file has more pages than were counted, and the pool has no free
    /// ones; nothing has changed.
    pub fn correct(&self, counted: &Held, has: &Held) -> Result<()> {
        let before = self.accounts().totals();
        let surplus = self.accounts().correct(counted, has, self.page_size)?;
        self.announce_free_pages();
        surplus.iter().for_each(|(node, bytes)| self.give_surplus(node, bytes));
        self.note_new_sizes(&before)
    }

    /// Makes the accounts those of a pool that was just opened, before [`Pool::adopt`].
    #[cfg(test)]
    pub(super) fn forget_account(&self) {
        for (_, account) in self.accounts().iter_mut() {
            (account.promised, account.free, account.in_tokens) = (account.total, 0, 0);
            account.ahead = 0;
            account.set_short(0, self.page_size.bytes());
        }
    }
}

impl Reserve {
    fn path(&self) -> String {
        format!("{RESERVES}/{}", self.node)
    }

    fn open(node: NumaNode) -> Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let mount = calls::openat(CWD, format!("{RESERVES}/{node}"), flags, Mode::empty())?;
        let mut sealed = Sealed::open(Reach::Private, mount)?;
        sealed.resume(std::iter::empty())?;
        Ok(Self::new(node, sealed))
    }
}

/// The sizes of the parts as they are noted: `PAGES`, or `NODE:PAGES,NODE:PAGES` for several nodes.
fn sizes_text(nodes: &[NumaNode], totals: &PerNode) -> String {
    match nodes {
        [node] => totals.of(*node).to_string(),
        _ => {
            let part = |node: &NumaNode| format!("{node}:{}", totals.of(*node));
            nodes.iter().map(part).collect::<Vec<_>>().join(",")
        }
    }
}

/// Reads what [`sizes_text`] wrote. A size without nodes is the first node's, as an earlier version
/// noted it: [`Adoption`] then divides it by the memory that is there.
fn parse_sizes(text: &str, nodes: &[NumaNode]) -> Option<PerNode> {
    if let Ok(pages) = text.parse() {
        return nodes.first().map(|node| PerNode::on(*node, pages));
    }
    let part = |part: &str| {
        let (node, pages) = part.split_once(':')?;
        let node = NumaNode::parse(node).filter(|node| nodes.contains(node))?;
        Some((node, pages.parse().ok()?))
    };
    text.split(',').map(part).collect()
}

fn note(name: &str, text: &str) -> Result<()> {
    Ok(calls::setxattr(RESERVES, name, text.as_bytes(), XattrFlags::empty())?)
}

fn noted(name: &str) -> Result<String> {
    let mut text = vec![0; LONGEST_VALUE];
    let length = calls::getxattr(RESERVES, name, &mut text[..])?;
    text.truncate(length);
    String::from_utf8(text).map_err(|_| Error::Corrupt(format!("{RESERVES}: {name}")))
}

/// Memory goes back as it came, step by step between file and reserve. The machine gives no more
/// than a step.
#[cfg(test)]
mod tests {
    use super::super::plan::Transfer;
    use super::super::tests::adopt_one;
    use super::super::{Holding, Sizes};
    use super::*;
    use crate::placement::Resolved;
    use crate::units::Range;

    const SIZE: u64 = 3 * FOLIO_SIZE;

    /// A pool of eight pages, and a file with three of these.
    fn three_of_eight() -> (Pool, Holding) {
        let pool =
            Pool::fill(PageSize::Huge, &Sizes::Anywhere(8), |_| Ok(())).expect("root takes 16 MiB");
        let mut holding = Holding::create(PageSize::Huge).unwrap();
        let growth =
            holding.begin_growth(&pool, Range::new(0, 0), SIZE, &Resolved::default()).unwrap();
        holding.complete(growth).unwrap();
        (pool, holding)
    }

    /// The holding as the next process opens it. No memory goes to the machine or comes from there
    /// on the way.
    fn come_back(pool: &Pool, holding: &Holding) -> Holding {
        let reserves = pool.reserves();
        let mount = holding.sealed().mount().unwrap();
        let sealed = Sealed::open(Reach::Programs, mount).unwrap();
        let mut again = Holding::open(PageSize::Huge, sealed, &pool.nodes()).unwrap();
        adopt_one(pool, &mut again);
        assert_eq!(pool.reserves(), reserves);
        let settling = again.begin_settling(pool);
        again.complete(settling).unwrap();
        assert_eq!(pool.check(&again.held()), Vec::<String>::new());
        assert_eq!((again.held().pages.total(), again.held().bytes.total()), (3, SIZE));
        assert_eq!(again.sealed().check().unwrap(), Vec::<String>::new());
        assert_eq!(again.check().unwrap(), Vec::<String>::new());
        assert_eq!((again.sealed().size(), again.sealed().header().undo_size), (SIZE, None));
        again
    }

    #[test]
    fn a_growth_that_has_moved_memory_gives_it_back_to_the_reserve() {
        let (pool, mut holding) = three_of_eight();
        holding.sealed_for_tests().update(|header| header.undo_size = Some(SIZE)).unwrap();
        let transfer = Transfer { range: Range::new(SIZE, 2 * SIZE), node: pool.nodes()[0] };
        let take = |sealed: &mut Sealed, piece| sealed.take(piece, 2 * SIZE);
        pool.move_piece_out(holding.sealed_for_tests(), transfer, SIZE, take).unwrap();
        come_back(&pool, &holding);
    }

    #[test]
    fn sizes_are_read_as_they_were_noted() {
        let nodes = [0, 2].map(NumaNode);
        let sizes: PerNode = [(nodes[0], 32), (nodes[1], 64)].into_iter().collect();
        assert_eq!(sizes_text(&nodes, &sizes), "0:32,2:64");
        assert_eq!(parse_sizes("0:32,2:64", &nodes), Some(sizes));
        assert_eq!(sizes_text(&nodes, &PerNode::default()), "0:0,2:0");
        let one = PerNode::on(nodes[0], 8);
        assert_eq!(sizes_text(&nodes[..1], &one), "8");
        assert_eq!(parse_sizes("8", &nodes), Some(one));
        for wrong in ["", "0:", "1:4", "0:4,", "0:x", "-1"] {
            assert_eq!(parse_sizes(wrong, &nodes), None, "{wrong}");
        }
    }
}
