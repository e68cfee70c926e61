//! The filesystem as users see it: files and directories with one set of rules.
//!
//! The index has the names and inodes, an [`Object`] has the contents of a regular file, and the
//! pool has the pages. This module joins them. The daemon makes an object when a regular file is
//! opened for the first time, even if the file is still empty: the answer to open(2) must tell the
//! kernel which file to map. An object ends when its node has lost its last name and the kernel has
//! forgotten the node. The module `places` says where the objects are and how many there can be.
//!
//! **Locks**, in their order:
//!
//! - `retrying`, while the daemon opens a file that could not be opened before.
//! - `dismantling`, while the memory of removed files moves back to the pool.
//! - `making`, while an object is made or served again.
//! - `stranded` and `objects`, for one look-up, or while the daemon asks the kernel if it still
//!   knows a node and removes the inode of that node.
//! - `unavailable`, for one look-up.
//! - the lock of a file.
//!
//! The check shares the locks of all files for an addition, so that no page moves. Only then it
//! looks at the tables `stranded` and `objects`, and it does not wait for their locks.

mod attributes;
mod callers;
mod check;
mod contents;
mod doors;
mod gate;
mod hw_errors;
mod mtime;
mod native;
mod object;
mod orphans;
mod pace;
mod places;
mod placing;
mod policies;
mod pollers;
mod ready;
mod recovery;
mod refusals;
mod requests;
mod targets;
mod unavailable;

pub use attributes::Reading;
pub use contents::Position;
pub use object::{Allocation, Context, Extent, Located, Object, State, Summary};
pub use pace::Pace;
pub use places::refuse_too_few_descriptors;
pub use policies::Policies;
pub use pollers::Waker;
pub use requests::{NewValue, RequestContext};

use crate::error::{Error, Result};
use crate::index::{Attributes, DirEntry, Index, Inode, Kind, Time};
use crate::options::{Io, Nodes, Options};
use crate::pool::{Holding, Pool};
use crate::sys::{memory_failures, numa::memory_nodes};
use crate::units::{Folio, InodeId, NumaNode, Range, STAT_BLOCK};
use crossbeam::channel::Sender;
use hw_errors::{FAILURES, FAILURES_IN_POOL};
use native::Closings;
use places::Places;
use placing::Placer;
use ready::Ready;
use refusals::Refusals;
use rustix::io::Errno;
use std::collections::{BTreeMap, HashMap};
use std::ffi::{CString, OsStr};
use std::os::fd::OwnedFd;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard};
use unavailable::Unavailable;

/// The directory of the daemon's mount namespace where the superblocks of the objects are mounted.
pub const OBJECTS: &str = "/objects";

/// A part of a file whose folios may be whole again, so that they can be collapsed.
pub type Repaired = (Arc<Object>, Range);

/// The filesystem.
pub struct Fs {
    index: Index,
    pool: Pool,
    places: Places,
    objects: Mutex<HashMap<InodeId, Arc<Object>>>,
    /// Locks for the making of objects. The node selects one of them. Two requests may open one
    /// file for the first time at the same moment.
    making: [Mutex<()>; 64],
    /// Objects whose nodes are gone, and whose pages have not moved yet.
    stranded: Mutex<Vec<Arc<Object>>>,
    /// Held while pages of stranded objects move.
    dismantling: Mutex<()>,
    /// Files that cannot be opened ([`unavailable`]).
    unavailable: Mutex<BTreeMap<InodeId, Unavailable>>,
    /// Held while the daemon tries to open an unavailable file again.
    retrying: Mutex<()>,
    refusals: Refusals,
    /// The options of the mount.
    options: Options,
    recovery_write: bool,
    /// Descriptors for reading only become native readers (option `io=`).
    native: bool,
    closings: Closings,
    keep_punched: bool,
    repaired: Option<Sender<Repaired>>,
    /// The kernel's count of memory errors when all files were last looked through. `None` if the
    /// kernel has no such count, or if the look must be repeated.
    failures: Mutex<Option<u64>>,
    /// The same count for free memory.
    failures_in_pool: Mutex<Option<u64>>,
    nodes: Vec<NumaNode>,
    placer: Placer,
    ready: Ready,
}

/// The changes that setattr asks for.
#[derive(Clone, Copy, Debug)]
pub struct Changes {
    /// Permission bits.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Size in bytes.
    pub size: Option<u64>,
    /// Last access.
    pub accessed: Time,
    /// Last modification.
    pub modified: Time,
}

/// The numbers that statfs(2) returns.
#[derive(Clone, Copy, Debug)]
pub struct Statistics {
    /// Bytes in a page. A page is the unit of `pages` and `free_pages`.
    pub page_size: u64,
    /// Pages of the pool.
    pub pages: u64,
    /// Free pages that can be handed out.
    pub free_pages: u64,
    /// The existing inodes, plus [`Statistics::free_inodes`].
    pub inodes: u64,
    /// Regular files that can still be made. Each takes an inode and a place. Other kinds of files
    /// take no place, so if fewer places than inodes are left, more directories than this can be
    /// made.
    pub free_inodes: u64,
}

impl Fs {
    /// Makes an empty filesystem on `pool`. Reports parts of files that have become whole to
    /// `repaired`.
    ///
    /// # Errors
    /// The errors of the system calls.
    pub fn create(
        options: &Options,
        mut pool: Pool,
        repaired: Option<Sender<Repaired>>,
    ) -> Result<Self> {
        pool.collapse_reserves()?;
        pool.attach()?;
        let index = Index::create(options)?;
        index.keep(FAILURES, memory_failures())?;
        index.keep(FAILURES_IN_POOL, memory_failures())?;
        Self::on(options, index, pool, repaired)
    }

    fn on(
        options: &Options,
        index: Index,
        pool: Pool,
        repaired: Option<Sender<Repaired>>,
    ) -> Result<Self> {
        let failures = Mutex::new(index.kept(FAILURES)?);
        let failures_in_pool = Mutex::new(index.kept(FAILURES_IN_POOL)?);
        let placer = Placer::new(pool.nodes());
        let ready = Ready::new(options.clear, options.cpu);
        Ok(Self {
            index,
            pool,
            places: Places::count()?,
            objects: Mutex::default(),
            making: [const { Mutex::new(()) }; 64],
            stranded: Mutex::default(),
            dismantling: Mutex::default(),
            unavailable: Mutex::default(),
            retrying: Mutex::default(),
            refusals: Refusals::default(),
            options: options.clone(),
            recovery_write: options.recovery_write,
            native: reads_natively(options.io),
            closings: Closings::default(),
            keep_punched: options.keep_punched,
            repaired,
            failures,
            failures_in_pool,
            nodes: memory_nodes()?,
            placer,
            ready,
        })
    }

    /// The NUMA nodes that have memory, ascending.
    pub fn nodes(&self) -> &[NumaNode] {
        &self.nodes
    }

    /// Bytes of the pool that were in 2 MiB folios when it was mounted.
    pub fn huge_at_mount(&self) -> u64 {
        self.pool.huge_at_mount()
    }

    /// Looks a name up.
    ///
    /// # Errors
    /// ENOENT, ENOTDIR, ENAMETOOLONG.
    pub fn lookup(&self, parent: InodeId, name: &OsStr) -> Result<Attributes> {
        self.index.lookup(parent, name).and_then(|attributes| self.with_contents(attributes))
    }

    /// stat(2).
    ///
    /// # Errors
    /// ESTALE.
    pub fn attributes(&self, node: InodeId) -> Result<Attributes> {
        self.index.attributes(node).and_then(|attributes| self.with_contents(attributes))
    }

    fn with_contents(&self, mut attributes: Attributes) -> Result<Attributes> {
        if attributes.kind != Kind::File {
            return Ok(attributes);
        }
        // This list first: a file joins the objects before it leaves this list.
        if let Some((size, pages)) = self.size_of_unavailable(attributes.node)? {
            (attributes.size, attributes.blocks) =
                (size, pages * self.pool.page_size().bytes() / STAT_BLOCK);
            attributes.provisional = true;
        } else if let Some(object) = self.known_object(attributes.node) {
            (attributes.size, attributes.blocks) = object.size_and_blocks();
        }
        Ok(attributes)
    }

    /// Makes the changes that setattr asks for. The size comes first, because only its change is
    /// likely to fail.
    ///
    /// # Errors
    /// The errors of truncate(2), chmod(2), chown(2) and utimens(2).
    pub fn change(
        &self,
        node: InodeId,
        changes: &Changes,
        request: RequestContext,
    ) -> Result<Attributes> {
        let inode = self.index.inode(node)?;
        if let Some(size) = changes.size {
            let object = self.object(node)?;
            self.contents_change(&object, request.unprivileged)?;
            let truncate = |context: Context<'_>| object.truncate(size, context);
            let truncate = || self.with_context(&object, request, truncate);
            self.heeding_hw_errors(&object, request, truncate)?;
            self.learn_size(&object);
        }
        self.inode_changed(node, || self.change_inode(&inode, changes))?;
        self.index.attributes_of(&inode).and_then(|attributes| self.with_contents(attributes))
    }

    fn change_inode(&self, inode: &Inode, changes: &Changes) -> Result<()> {
        if changes.uid.is_some() || changes.gid.is_some() {
            self.index.set_owner(inode, changes.uid, changes.gid)?;
        }
        if let Some(mode) = changes.mode {
            self.index.set_mode(inode, mode)?;
        }
        if (changes.accessed, changes.modified) != (Time::Omit, Time::Omit) {
            self.index.set_times(inode, changes.accessed, changes.modified)?;
        }
        Ok(())
    }

    /// Updates the inode for a change of the file's contents. Like Linux itself (mm/filemap.c,
    /// __generic_file_write_iter), the daemon does this before the contents change. So an error
    /// here refuses the change, and no change is reported as refused after it has happened.
    fn contents_change(&self, object: &Object, unprivileged: bool) -> Result<()> {
        let node = object.node();
        object.mtime().note(unprivileged, || self.index.contents_changed(node, unprivileged))
    }

    /// Runs `change`, a change of an inode's mode, owner, times or attributes. After it, the next
    /// change of contents updates the inode again.
    fn inode_changed<T>(&self, node: InodeId, change: impl FnOnce() -> Result<T>) -> Result<T> {
        let changed = change();
        if let Some(object) = self.known_object(node) {
            object.mtime().forget();
        }
        changed
    }

    /// readlink(2).
    ///
    /// # Errors
    /// EINVAL.
    pub fn read_link(&self, node: InodeId) -> Result<CString> {
        self.index.read_link(node)
    }

    /// Opens a directory for [`Fs::read_directory`].
    ///
    /// # Errors
    /// The errors of open(2).
    pub fn open_directory(&self, node: InodeId) -> Result<OwnedFd> {
        self.index.open_directory(node)
    }

    /// Reads a directory from the position `from` on, as long as `take` returns true.
    ///
    /// # Errors
    /// The errors of getdents(2).
    pub fn read_directory(
        &self,
        fd: &OwnedFd,
        from: u64,
        take: impl FnMut(DirEntry) -> bool,
    ) -> Result<()> {
        self.index.read_directory(fd, from, take)
    }

    /// statfs(2).
    ///
    /// # Errors
    /// The errors of fstatfs(2).
    pub fn statistics(&self) -> Result<Statistics> {
        let account = self.pool.balance();
        let (most, left) = self.index.inodes()?;
        let free_inodes = left.min(self.places.left()? + self.ready_files());
        let inodes = most.saturating_sub(left) + free_inodes;
        Ok(Statistics {
            page_size: self.pool.page_size().bytes(),
            pages: account.total,
            free_pages: account.free_for_users(),
            inodes,
            free_inodes,
        })
    }

    fn objects(&self) -> MutexGuard<'_, HashMap<InodeId, Arc<Object>>> {
        self.objects.lock().expect("no panic while the table of objects is open")
    }

    fn known_object(&self, node: InodeId) -> Option<Arc<Object>> {
        self.objects().get(&node).cloned()
    }

    /// All objects, in no order.
    pub fn all_objects(&self) -> Vec<Arc<Object>> {
        self.objects().values().cloned().collect()
    }

    /// The objects of files, in no order: all but the ready ones.
    fn objects_of_files(&self) -> Vec<Arc<Object>> {
        let mut objects = self.all_objects();
        objects.retain(|object| !Ready::is_number(object.node()));
        objects
    }

    /// The contents of a regular file. Makes its object if there is none yet.
    ///
    /// # Errors
    /// EISDIR for a directory, EINVAL for other kinds of files; [`Error::NoMemory`],
    /// [`Error::TooManyFiles`]; [`Error::Corrupt`] for an unavailable file.
    pub fn object(&self, node: InodeId) -> Result<Arc<Object>> {
        if let Some(object) = self.known_object(node) {
            return Ok(object);
        }
        let _one_at_a_time = self.making(node);
        if let Some(object) = self.known_object(node) {
            return Ok(object);
        }
        self.refuse_unavailable(node)?;
        match self.index.attributes(node)?.kind {
            Kind::File => {}
            Kind::Directory => return Err(Error::Os(Errno::ISDIR)),
            _ => return Err(Error::invalid("only regular files have contents")),
        }
        if let Some(object) = self.lend(node) {
            return Ok(object);
        }
        let holding = self.places.make(node, || Holding::create(self.pool.page_size()))?;
        let object = Arc::new(Object::new(node, holding, self.orphaned()));
        self.objects().insert(node, object.clone());
        Ok(object)
    }

    fn orphaned(&self) -> Arc<AtomicU64> {
        self.pool.orphaned().clone()
    }

    fn making(&self, node: InodeId) -> MutexGuard<'_, ()> {
        let lock = &self.making[node.0 as usize % self.making.len()];
        lock.lock().expect("no panic while an object is made")
    }

    fn report_repaired(&self, object: Arc<Object>, range: Range) {
        if let Some(sender) = &self.repaired {
            let _ = sender.send((object, range)); // a repair does not fail if the agent has ended
        }
    }

    /// Runs `run` with the context that [`Object`] needs for a change.
    fn with_context<T>(
        &self,
        object: &Arc<Object>,
        request: RequestContext,
        run: impl FnOnce(Context<'_>) -> T,
    ) -> T {
        let repaired = |folio: Folio| self.report_repaired(object.clone(), folio.range());
        let (recovery_write, keep_punched) = (self.recovery_write, self.keep_punched);
        let placement = |offset: u64| self.placement_of_growth(object.node(), offset, request);
        let (pool, pace) = (&self.pool, &Pace::of(request));
        run(Context {
            pool,
            recovery_write,
            keep_punched,
            placement: self.placer.has_choice().then_some(&placement),
            repaired: &repaired,
            pace,
        })
    }

    /// Shuts the soft holes that programs have opened by madvise(2) with MADV_REMOVE. Costs one
    /// fstatfs(2) for each file with soft holes, and one cachestat(2) for each run of holes.
    pub fn shut_opened_holes(&self) {
        self.objects_of_files().iter().for_each(|object| object.shut_opened_holes());
    }
}

/// The options in force, one a line: `<name> <value>`. The sizes of the pool and of its parts are
/// not among them, because they may have changed since the mount, and so may the `nodes` have.
fn in_force(options: &Options, nodes: Vec<NumaNode>) -> String {
    let nodes = options.nodes.as_ref().map(|_| Nodes::Even(nodes));
    let options = Options { size: None, nodes, ..options.clone() };
    let lasting = options.given();
    lasting.fold(String::new(), |text, (name, value)| text + name + " " + &value + "\n")
}

fn reads_natively(io: Io) -> bool {
    match io {
        Io::Native => true,
        Io::Mediated => false,
        Io::Auto => memory_failures().is_some(),
    }
}
