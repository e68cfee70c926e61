//! Files that cannot be opened: each answers EIO alone, its memory stays as it is, and the patrol tries it again each second.
//!
//! ```text
//!   a worker starts -- opens and settles a file -- fails --> unavailable: EIO
//!        |                                                      |  ^
//!        v                                    opened, settled   |  | fails
//!   served <----------------------------------------------------+--+ each second
//! ```
//!
//! **The account.** A file that is unavailable has pages and memory all the same. How much is known without opening it: its
//! superblock's limit of blocks, and the number of its pages where that can be read ([`Extent`]). The pool counts them as held, so
//! neither is handed out. When the file can be opened, the account is corrected by what it has in truth. Pages that it has beyond
//! what was counted must be free at that moment; until they are, it stays unavailable. Until then stat(2) tells the size that the
//! memory has, which the kernel does not keep: a change that has not ended may be undone.
//!
//! **Requests** take the list's lock for a look-up, and never wait for a file that is being opened.

use super::{Fs, OBJECTS, Object, Pace};
use crate::error::{Error, Result};
use crate::pool::{Held, Holding};
use crate::sealed::{self, Reach, Sealed};
use crate::sys::calls;
use crate::units::{FOLIO_SIZE, NodeId, Range, SUBPAGE_SIZE};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, MutexGuard};

/// What a file has, as the pool counts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) pages: u64,
    /// Of memory, in whole folios.
    pub(super) bytes: u64,
}

impl Extent {
    /// What an open file has.
    pub(super) fn of(holding: &Holding) -> Self {
        Self { pages: holding.pages(), bytes: holding.sealed().folio_count() * FOLIO_SIZE }
    }

    /// What the file at `place` has, as far as that can be seen from outside. Memory that is moving counts for it.
    fn at(place: &Path, page_size: u64) -> Result<Self> {
        if !place.join("ledger").try_exists()? {
            return Ok(Self { pages: 0, bytes: 0 }); // only the place for a file
        }
        let limit = rustix::fs::statfs(place)?.f_blocks.saturating_sub(1); // one is the ledger's
        let bytes = limit * SUBPAGE_SIZE / FOLIO_SIZE * FOLIO_SIZE;
        let size = size_at(place)?;
        let reserved = sealed::superblock_at(place).map_or(0, |superblock| superblock.reserved_pages);
        let behind_end = reserved.saturating_sub(size.div_ceil(page_size));
        Ok(Self { pages: bytes.div_ceil(page_size) + behind_end, bytes })
    }
}

/// A file that cannot be opened.
#[derive(Clone, Debug)]
pub(super) struct Unavailable {
    pub(super) extent: Extent,
    why: String,
}

impl Fs {
    pub(super) fn unavailable(&self) -> MutexGuard<'_, BTreeMap<NodeId, Unavailable>> {
        self.unavailable.lock().expect("no panic while the list is open")
    }

    /// Files that cannot be opened.
    pub fn unavailable_count(&self) -> usize {
        self.unavailable().len()
    }

    /// Pages and bytes that are counted for them.
    pub(super) fn extent_of_unavailable(&self) -> (u64, u64) {
        let unavailable = self.unavailable();
        unavailable.values().fold((0, 0), |sum, file| (sum.0 + file.extent.pages, sum.1 + file.extent.bytes))
    }

    /// The same, for the check.
    pub(super) fn held_by_unavailable(&self) -> Held {
        let (pages, bytes) = self.extent_of_unavailable();
        Held { pages, bytes, stuck: 0 }
    }

    /// Those files, `<path> <pages> <why>` a line. Characters that are not printable are escaped in a path, and so are spaces.
    pub fn unavailable_text(&self) -> String {
        let files = self.unavailable().clone(); // the look-ups of many paths take long
        files.iter().fold(String::new(), |mut text, (node, file)| {
            let path = self.index.path_of(*node).unwrap_or_else(|_| format!("file {node}"));
            let path = path.escape_debug().to_string().replace(' ', "\\u{20}");
            let _ = writeln!(text, "{path} {} {}", file.extent.pages, file.why);
            text
        })
    }

    /// [`Error::Corrupt`] where the file cannot be opened.
    pub(super) fn refuse_unavailable(&self, node: NodeId) -> Result<()> {
        match self.unavailable().get(&node) {
            None => Ok(()),
            Some(file) => Err(Error::Corrupt(format!("file {node} cannot be opened: {}", file.why))),
        }
    }

    /// Size in bytes and pages of a file that cannot be opened.
    pub(super) fn size_of_unavailable(&self, node: NodeId) -> Result<Option<(u64, u64)>> {
        let Some(file) = self.unavailable().get(&node).cloned() else { return Ok(None) };
        Ok(Some((size_at(&place_of(node))?, file.extent.pages)))
    }

    /// The file at its place in [`OBJECTS`], as another worker has left it; none where there is only the place for a file.
    pub(super) fn open_object(&self, node: NodeId) -> Result<Option<Arc<Object>>> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let place = place_of(node);
        let mount = calls::openat(CWD, &place, flags, Mode::empty())?;
        let ledger =
            rustix::fs::accessat(&mount, "ledger", rustix::fs::Access::EXISTS, rustix::fs::AtFlags::empty());
        if ledger == Err(Errno::NOENT) {
            calls::rmdir(&place)?;
            return Ok(None);
        }
        let holding = Holding::open(self.pool.page_size(), Sealed::open(Reach::Programs, mount)?)?;
        let object = Arc::new(Object::new(node, holding));
        object.recall_natives()?;
        Ok(Some(object))
    }

    /// A file that could not be opened answers EIO from now on.
    ///
    /// # Errors
    /// What statfs(2) answers: how much it has must be known.
    pub(super) fn set_aside(&self, node: NodeId, why: &Error) -> Result<()> {
        let extent = Extent::at(&place_of(node), self.pool.page_size().bytes())?;
        self.note_unavailable(node, extent, why);
        Ok(())
    }

    /// A file that was opened, but could not be settled, answers EIO from now on.
    pub(super) fn set_object_aside(&self, object: &Object, why: &Error) {
        self.stranded().retain(|other| other.node() != object.node());
        self.objects().remove(&object.node());
        self.note_unavailable(object.node(), Extent::of(&object.read_lock()), why);
    }

    fn note_unavailable(&self, node: NodeId, extent: Extent, why: &Error) {
        let file = Unavailable { extent, why: why.to_string() };
        if self.unavailable().insert(node, file).is_none() {
            log::error!("file {node} cannot be opened and answers EIO; it is tried again each second: {why}");
        }
    }

    /// Tries again to open what cannot be opened.
    pub fn retry_unavailable(&self) {
        let _one_at_a_time = self.retrying.lock().expect("no panic while a file is opened");
        let nodes: Vec<NodeId> = self.unavailable().keys().copied().collect();
        for node in nodes {
            if let Err(error) = self.try_again(node) {
                self.unavailable().entry(node).and_modify(|file| file.why = error.to_string());
            }
        }
    }

    fn try_again(&self, node: NodeId) -> Result<()> {
        let Some(object) = self.open_object(node)? else {
            self.unavailable().remove(&node);
            return Ok(());
        };
        self.correct_account(node, Extent::of(&object.read_lock()))?;
        let settled = object.settle(&self.pool);
        self.count_as(node, Extent::of(&object.read_lock()));
        settled?;
        let size = object.read_lock().size();
        self.take_in(object.clone())?;
        self.report_repaired(object, Range::new(0, size));
        if self.index.is_orphan(node) {
            self.note_orphan(Some(node), &Pace::steady());
        }
        Ok(())
    }

    /// Has the account count what a file has. That can give memory to the machine, so no lock is held that requests wait for.
    fn correct_account(&self, node: NodeId, has: Extent) -> Result<()> {
        let counted = self.unavailable().get(&node).expect("only one thread takes files out").extent;
        self.pool.correct((counted.pages, counted.bytes), (has.pages, has.bytes))?;
        self.count_as(node, has);
        Ok(())
    }

    fn count_as(&self, node: NodeId, has: Extent) {
        self.unavailable().entry(node).and_modify(|file| file.extent = has);
    }

    /// A file that is settled is served from now on. Where it has neither a name nor a user, it is dismantled next time.
    fn take_in(&self, object: Arc<Object>) -> Result<()> {
        let node = object.node();
        let _none_is_made = self.making(node); // nor does its inode go meanwhile
        let mut stranded = self.stranded();
        let mut objects = self.objects();
        if self.index.exists(node)? {
            log::info!("file {node} is served again");
            objects.insert(node, object);
        } else {
            stranded.push(object);
        }
        self.unavailable().remove(&node);
        Ok(())
    }
}

fn place_of(node: NodeId) -> PathBuf {
    Path::new(OBJECTS).join(node.to_string())
}

/// Size in bytes of the file at `place`; 0 where there is only the place for a file.
fn size_at(place: &Path) -> Result<u64> {
    match std::fs::metadata(place.join("data")) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(0),
        data => Ok(data?.len()),
    }
}
