//! Files that cannot be opened. Each answers EIO, other files are not affected, and the memory of
//! the file stays as it is. The patrol tries to open the file again each second.
//!
//! ```text
//!   a worker starts -- opens and settles a file -- fails --> unavailable: EIO
//!        |                                                      |  ^
//!        v                                    opened, settled   |  | fails
//!   served <----------------------------------------------------+--+ each second
//! ```
//!
//! **The account.** An unavailable file still has pages and memory. The daemon can see two numbers
//! without opening the file: the limit of blocks of its superblock, and the number of its pages if
//! that can be read ([`extent_at`]). The pool counts these pages and this memory as held, so it
//! hands out neither. When the file can be opened, the daemon corrects the account by the true
//! numbers. If the file has more pages than were counted, the additional ones must be free at that
//! moment. The file stays unavailable until they are.
//!
//! **stat(2)** tells the size of the file's memory until then. The kernel does not keep that size,
//! because a change that was under way may still be undone.
//!
//! **Requests** hold the lock of the list for a look-up only, and never wait for the opening of a
//! file.

use super::{Fs, OBJECTS, Object};
use crate::error::{Error, Result};
use crate::pool::{Adoption, Held, Holding, PerNode};
use crate::sealed::{self, Reach, Sealed};
use crate::sys::calls;
use crate::units::{FOLIO_SIZE, InodeId, Range, SUBPAGE_SIZE};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, MutexGuard};

/// A file that cannot be opened.
#[derive(Clone, Debug)]
pub(super) struct Unavailable {
    /// The pages and the memory of the file, as the pool counts them.
    held: Held,
    why: String,
}

/// The pages and the bytes of memory (whole folios) of the file at `place`, from what the daemon
/// sees without opening it. Memory that is moving counts as the file's.
fn extent_at(place: &Path, page_size: u64) -> Result<(u64, u64)> {
    if !place.join("ledger").try_exists()? {
        return Ok((0, 0)); // the place has no file yet
    }
    let limit = rustix::fs::statfs(place)?.f_blocks.saturating_sub(1); // one is the ledger's
    let bytes = limit * SUBPAGE_SIZE / FOLIO_SIZE * FOLIO_SIZE;
    let size = size_at(place)?;
    let owned = sealed::header_at(place).map_or(0, |header| header.owned_pages);
    let behind_end = owned.saturating_sub(size.div_ceil(page_size));
    Ok((bytes.div_ceil(page_size) + behind_end, bytes))
}

impl Fs {
    pub(super) fn unavailable(&self) -> MutexGuard<'_, BTreeMap<InodeId, Unavailable>> {
        self.unavailable.lock().expect("no panic while the list is open")
    }

    /// The number of files that cannot be opened.
    pub fn unavailable_count(&self) -> usize {
        self.unavailable().len()
    }

    /// Counts the files that were set aside so far in `adoption`.
    pub(super) fn charge_unavailable(&self, adoption: &mut Adoption) {
        for file in self.unavailable().values_mut() {
            let Held { pages, bytes, .. } = &file.held;
            file.held = adoption.charge(pages.total(), bytes.total());
        }
    }

    /// The pages and bytes that the account counts for these files.
    pub(super) fn held_by_unavailable(&self) -> Held {
        self.unavailable().values().map(|file| file.held.clone()).sum()
    }

    /// These files, one a line: `<path> <pages> <why>`. Spaces and unprintable characters of the
    /// path are escaped.
    pub fn unavailable_text(&self) -> String {
        let files = self.unavailable().clone(); // look-ups of paths take long
        files.iter().fold(String::new(), |mut text, (node, file)| {
            let path = self.index.path_of(*node).unwrap_or_else(|_| format!("file {node}"));
            let path = path.escape_debug().to_string().replace(' ', "\\u{20}");
            let _ = writeln!(text, "{path} {} {}", file.held.pages.total(), file.why);
            text
        })
    }

    /// [`Error::Corrupt`] if the file is among those that cannot be opened.
    pub(super) fn refuse_unavailable(&self, node: InodeId) -> Result<()> {
        match self.unavailable().get(&node) {
            None => Ok(()),
            Some(file) => {
                Err(Error::Corrupt(format!("file {node} cannot be opened: {}", file.why)))
            }
        }
    }

    /// The size in bytes and the pages of `node`, if it cannot be opened.
    pub(super) fn size_of_unavailable(&self, node: InodeId) -> Result<Option<(u64, u64)>> {
        let Some(file) = self.unavailable().get(&node).cloned() else { return Ok(None) };
        Ok(Some((size_at(&place_of(node))?, file.held.pages.total())))
    }

    /// Opens the file at its place in [`OBJECTS`], as another worker has left it. None if the place
    /// has no file; the place is removed then.
    pub(super) fn open_object(&self, node: InodeId) -> Result<Option<Arc<Object>>> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let place = place_of(node);
        let mount = calls::openat(CWD, &place, flags, Mode::empty())?;
        let ledger = rustix::fs::accessat(
            &mount,
            "ledger",
            rustix::fs::Access::EXISTS,
            rustix::fs::AtFlags::empty(),
        );
        if ledger == Err(Errno::NOENT) {
            calls::rmdir(&place)?;
            return Ok(None);
        }
        let sealed = Sealed::open(Reach::Programs, mount)?;
        let holding = Holding::open(self.pool.page_size(), sealed, &self.pool.nodes())?;
        let object = Arc::new(Object::new(node, holding, self.pool.orphaned().clone()));
        object.recall_natives()?;
        Ok(Some(object))
    }

    /// Makes a file that could not be opened answer EIO from now on.
    ///
    /// # Errors
    /// The errors of statfs(2): the account needs to know the file's memory.
    pub(super) fn set_aside(&self, node: InodeId, why: &Error) -> Result<()> {
        let (pages, bytes) = extent_at(&place_of(node), self.pool.page_size().bytes())?;
        let somewhere = |amount| PerNode::on(self.pool.nodes()[0], amount); // until the adoption
        let (pages, bytes) = (somewhere(pages), somewhere(bytes));
        self.note_unavailable(node, Held { pages, bytes, ..Held::default() }, why);
        Ok(())
    }

    /// Makes a file that was opened but could not be settled answer EIO from now on.
    pub(super) fn set_object_aside(&self, object: &Object, why: &Error) {
        self.stranded().retain(|other| other.node() != object.node());
        self.objects().remove(&object.node());
        self.note_unavailable(object.node(), object.read_lock().held(), why);
    }

    fn note_unavailable(&self, node: InodeId, held: Held, why: &Error) {
        let file = Unavailable { held, why: why.to_string() };
        if self.unavailable().insert(node, file).is_none() {
            log::error!(
                "file {node} cannot be opened and answers EIO; it is tried again each second: {why}"
            );
        }
    }

    /// Tries to open each unavailable file again.
    pub fn retry_unavailable(&self) {
        let _one_at_a_time = self.retrying.lock().expect("no panic while a file is opened");
        let nodes: Vec<InodeId> = self.unavailable().keys().copied().collect();
        for node in nodes {
            if let Err(error) = self.try_again(node) {
                self.unavailable().entry(node).and_modify(|file| file.why = error.to_string());
            }
        }
    }

    fn try_again(&self, node: InodeId) -> Result<()> {
        let Some(object) = self.open_object(node)? else {
            self.unavailable().remove(&node);
            return Ok(());
        };
        object.find_homes(|pages| self.pool.homes_for(pages));
        self.correct_account(node, object.read_lock().held())?;
        let settled = object.settle(&self.pool);
        self.count_as(node, object.read_lock().held());
        settled?;
        let size = object.read_lock().size();
        self.take_in(object.clone())?;
        self.report_repaired(object, Range::new(0, size));
        if self.index.is_orphan(node) {
            self.note_orphan(Some(node));
        }
        Ok(())
    }

    /// Corrects the account by the true extent of a file. This can give memory to the machine, so
    /// the thread holds no lock for which requests wait.
    fn correct_account(&self, node: InodeId, has: Held) -> Result<()> {
        let file = self.unavailable().get(&node).cloned();
        let counted = file.expect("only one thread takes files out").held;
        self.pool.correct(&counted, &has)?;
        self.count_as(node, has);
        Ok(())
    }

    fn count_as(&self, node: InodeId, has: Held) {
        self.unavailable().entry(node).and_modify(|file| file.held = has);
    }

    /// Serves a settled file from now on. A file without a name and a user is dismantled the next
    /// time.
    fn take_in(&self, object: Arc<Object>) -> Result<()> {
        let node = object.node();
        let _none_is_made = self.making(node); // meanwhile its inode is not erased either
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

fn place_of(node: InodeId) -> PathBuf {
    Path::new(OBJECTS).join(node.to_string())
}

/// The size in bytes of the file at `place`. 0 if the place has no file yet.
fn size_at(place: &Path) -> Result<u64> {
    match std::fs::metadata(place.join("data")) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(0),
        data => Ok(data?.len()),
    }
}
