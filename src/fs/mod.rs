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
mod mtime;
mod native;
mod object;
mod pace;
mod places;
mod pollers;
mod recovery;
mod refusals;
mod requests;
mod unavailable;

pub use attributes::Reading;
pub use object::{Allocation, Context, Extent, Object, State, Summary};
pub use pace::Pace;
pub use places::refuse_too_few_descriptors;
pub use pollers::Waker;
pub use requests::RequestContext;

use crate::error::{Error, Result};
use crate::index::{Attributes, DirEntry, Index, Inode, Kind, Time};
use crate::options::{Io, Options};
use crate::pool::{Holding, Pool};
use crate::steps::{self, Step};
use crate::sys::{memory_failures, numa::memory_nodes};
use crate::units::{Folio, InodeId, NumaNode, Range, STAT_BLOCK};
use crossbeam::channel::Sender;
use native::Closings;
use places::Places;
use refusals::Refusals;
use rustix::io::Errno;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::{CString, OsStr};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};
use unavailable::Unavailable;

/// The directory of the daemon's mount namespace where the superblocks of the objects are mounted.
pub const OBJECTS: &str = "/objects";

/// The time to wait for the kernel's RELEASE of a native reader. close(2) returns before the daemon
/// receives RELEASE. The time is some thousand times as long as the kernel needs, because the
/// machine may be busy.
const CLOSING_PATIENCE: Duration = Duration::from_millis(300);

/// The time to wait for the pages of files that the kernel has given up. The memory of a large file
/// moves at some GiB per second, and a busy machine is slower.
const DISMANTLING_PATIENCE: Duration = Duration::from_secs(5);

/// The names under which the index keeps the kernel's counts of memory errors that have been seen.
const FAILURES: &str = "failures";
const FAILURES_IN_POOL: &str = "failures in pool";

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
    /// Objects whose nodes have lost their last name, and whose pages are not counted as orphaned
    /// yet.
    uncounted: Mutex<Vec<Arc<Object>>>,
    /// Files that cannot be opened ([`unavailable`]).
    unavailable: Mutex<BTreeMap<InodeId, Unavailable>>,
    /// Held while the daemon tries to open an unavailable file again.
    retrying: Mutex<()>,
    refusals: Refusals,
    /// The options in force, as the text of the attribute.
    options: String,
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
        Ok(Self {
            index,
            pool,
            places: Places::count()?,
            objects: Mutex::default(),
            making: [const { Mutex::new(()) }; 64],
            stranded: Mutex::default(),
            dismantling: Mutex::default(),
            uncounted: Mutex::default(),
            unavailable: Mutex::default(),
            retrying: Mutex::default(),
            refusals: Refusals::default(),
            options: in_force(options),
            recovery_write: options.recovery_write,
            native: reads_natively(options.io),
            closings: Closings::default(),
            keep_punched: options.keep_punched,
            repaired,
            failures,
            failures_in_pool,
            nodes: memory_nodes()?,
        })
    }

    /// The pool.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Bytes of the pool that were in 2 MiB folios when it was mounted.
    pub fn huge_at_mount(&self) -> u64 {
        self.pool.huge_at_mount()
    }

    // ---- names ---------------------------------------------------------------------------------

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
            let truncate =
                || self.with_context(&object, request, |context| object.truncate(size, context));
            self.heeding_hw_errors(&object, request, truncate)?;
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

    /// Counts the pages of a node that has lost its last name as orphaned. If the lock of the file
    /// is not free now, [`Fs::count_orphans`] does it later.
    fn note_orphan(&self, orphan: Option<InodeId>, pace: &Pace) {
        if let Some(object) = orphan.and_then(|node| self.known_object(node))
            && object.note_orphaned(&self.pool, pace).is_err()
        {
            self.uncounted().push(object);
        }
    }

    fn uncounted(&self) -> MutexGuard<'_, Vec<Arc<Object>>> {
        self.uncounted.lock().expect("no panic while the list is open")
    }

    /// True if [`Fs::count_orphans`] has something to do.
    pub fn has_uncounted_orphans(&self) -> bool {
        !self.uncounted().is_empty()
    }

    /// Counts the orphans that could not be counted at once. It waits for the locks of the files.
    pub fn count_orphans(&self) {
        let uncounted = self.uncounted().clone();
        for object in uncounted {
            let counted = object.note_orphaned(&self.pool, &Pace::steady());
            counted.expect("a steady pace waits for the lock");
            self.uncounted().retain(|other| !Arc::ptr_eq(other, &object));
        }
    }

    /// Runs `change`. A pool is not known to be full while orphans are uncounted, because their
    /// pages come back: then this counts them and runs `change` once more.
    fn counting_orphans<T>(
        &self,
        request: RequestContext,
        mut change: impl FnMut() -> Result<T>,
    ) -> Result<T> {
        match change() {
            Err(Error::Full) if self.has_uncounted_orphans() => {
                Pace::of(request).refuse_if(|| Ok(true))?;
                self.count_orphans();
                change()
            }
            result => result,
        }
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
        let free_inodes = left.min(self.places.left()?);
        let inodes = most.saturating_sub(left) + free_inodes;
        Ok(Statistics {
            page_size: self.pool.page_size().bytes(),
            pages: account.total,
            free_pages: account.available(),
            inodes,
            free_inodes,
        })
    }

    /// The kernel gives up references to `node`. If the node has no name and the kernel does not
    /// know it any more, this removes its inode and returns true. Then the caller must call
    /// [`Fs::dismantle_stranded`], which gives the memory back to the pool. Before the inode is
    /// removed, `close` makes the kernel let the memory go.
    ///
    /// From the question to the kernel until the inode is gone, no request finds the object
    /// ([`Fs::object`]). A later request, for a file handle that a program has kept, finds no
    /// inode: ESTALE.
    pub fn forget(
        &self,
        node: InodeId,
        is_known: impl FnOnce() -> bool,
        close: impl FnOnce(&Object),
    ) -> bool {
        self.index.is_orphan(node) && self.part_with(node, is_known, close)
    }

    fn part_with(
        &self,
        node: InodeId,
        is_known: impl FnOnce() -> bool,
        close: impl FnOnce(&Object),
    ) -> bool {
        let _none_is_made = self.making(node);
        let mut stranded = self.stranded(); // held so that the check sees an object exactly once
        let mut objects = self.objects();
        if !self.index.is_orphan(node) || is_known() {
            return false;
        }
        if let Some(object) = objects.remove(&node) {
            close(&object);
            stranded.push(object);
        }
        if let Err(error) = self.index.erase(node) {
            log::error!("file {node}: its inode could not be removed: {error}");
        }
        steps::reached(Step::DismantleErased);
        true
    }

    // ---- objects -------------------------------------------------------------------------------

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
        let holding = self.places.make(node, || Holding::create(self.pool.page_size()))?;
        let object = Arc::new(Object::new(node, holding));
        self.objects().insert(node, object.clone());
        Ok(object)
    }

    /// Repeats the work that had to wait for memory of the machine.
    pub fn retry_what_waits(&self) {
        self.pool.refill();
        self.retry_unavailable();
        if let Err(error) = self.dismantle_stranded() {
            log::debug!("memory of removed files is still not back in the pool: {error}");
        }
    }

    fn making(&self, node: InodeId) -> MutexGuard<'_, ()> {
        let lock = &self.making[node.0 as usize % self.making.len()];
        lock.lock().expect("no panic while an object is made")
    }

    /// Gives the memory of removed files back to the pool. If some memory cannot move now, the
    /// patrol tries again each second.
    ///
    /// # Errors
    /// The reason why the memory of a file could not move, after all files were tried.
    pub fn dismantle_stranded(&self) -> Result<()> {
        let _one_at_a_time = self.dismantling.lock().expect("no panic while memory is moved back");
        let stranded = self.stranded().clone();
        stranded.iter().map(|object| self.dismantle(object)).fold(Ok(()), Result::and)
    }

    /// As [`Fs::dismantle_stranded`]. An error goes to the log.
    pub fn dismantle_stranded_or_warn(&self) {
        if let Err(error) = self.dismantle_stranded() {
            log::warn!(
                "memory of removed files is not back in the pool yet; the patrol tries again: {error}"
            );
        }
    }

    fn stranded(&self) -> MutexGuard<'_, Vec<Arc<Object>>> {
        self.stranded.lock().expect("no panic while the list is open")
    }

    fn dismantle(&self, object: &Arc<Object>) -> Result<()> {
        object.empty(&self.pool)?;
        steps::reached(Step::DismantleEmptied);
        self.places.remove(object.node());
        steps::reached(Step::DismantleDetached);
        self.stranded().retain(|other| !Arc::ptr_eq(other, object));
        Ok(())
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
        let pace = &Pace::of(request);
        run(Context { pool: &self.pool, recovery_write, keep_punched, repaired: &repaired, pace })
    }

    // ---- memory errors -------------------------------------------------------------------------

    /// Looks for memory errors in a file, if the kernel has met errors for which the patrol has not
    /// looked yet. Returns the number of new errors.
    ///
    /// # Errors
    /// [`Error::TakesLong`]; the errors of mmap(2) and setxattr(2).
    pub fn look_for_hw_errors_in(&self, object: &Object, pace: &Pace) -> Result<usize> {
        if memory_failures() == *self.failures.lock().expect("no panic while a number is compared")
        {
            return Ok(0);
        }
        pace.refuse_if(|| Ok(true))?;
        object.look_for_hw_errors(pace)
    }

    /// Looks for memory errors in all files, if the kernel has met any since the last time.
    pub fn look_for_hw_errors(&self) {
        self.if_memory_failed(&self.failures, FAILURES, || {
            let look = |object: &Arc<Object>| {
                let looked = object.look_for_hw_errors(&Pace::steady()).map(drop);
                looked.inspect_err(|error| {
                    log::error!("file {}: looking for memory errors: {error}", object.node())
                })
            };
            // An error in one file does not stop the look at the others.
            self.all_objects().iter().map(look).fold(Ok(()), Result::and)
        });
    }

    /// Looks for memory errors in free memory. This takes longer, because free memory may never
    /// have been touched.
    pub fn look_for_hw_errors_in_free_memory(&self) {
        self.if_memory_failed(&self.failures_in_pool, FAILURES_IN_POOL, || {
            let replaced = self.pool.replace_bad();
            match &replaced {
                Ok(0) => {}
                Ok(count) => {
                    log::error!("memory error, {count} free subpages of the pool replaced")
                }
                Err(error) => log::error!("looking for memory errors in free memory: {error}"),
            }
            replaced.map(drop)
        });
    }

    /// Shuts the soft holes that programs have opened by madvise(2) with MADV_REMOVE. Costs one
    /// fstatfs(2) for each file with soft holes, and one cachestat(2) for each run of holes.
    pub fn shut_opened_holes(&self) {
        self.all_objects().iter().for_each(|object| object.shut_opened_holes());
    }

    /// Runs `look` if the kernel has met memory errors since `look` last succeeded, in this worker
    /// or in an earlier one.
    fn if_memory_failed(
        &self,
        seen: &Mutex<Option<u64>>,
        kept: &str,
        look: impl FnOnce() -> Result<()>,
    ) {
        let seen = || seen.lock().expect("no panic while a number is compared");
        // An error that the kernel meets from here on counts as unseen, even if `look` finds it.
        let now = memory_failures();
        if now == *seen() {
            return;
        }
        let looked = if look().is_ok() { now } else { None }; // `None`: look again
        *seen() = looked;
        if let Err(error) = self.index.keep(kept, looked) {
            log::warn!("the next worker will not know which memory errors were seen: {error}");
        }
    }

    /// Runs `access`, a read or a change. If it meets a memory error that was not known, notes the
    /// error and runs `access` once more: now `access` may go on around the error.
    fn heeding_hw_errors<T>(
        &self,
        object: &Object,
        request: RequestContext,
        mut access: impl FnMut() -> Result<T>,
    ) -> Result<T> {
        match self.counting_orphans(request, &mut access) {
            Err(Error::Quarantined) => {
                self.look_for_hw_errors_in(object, &Pace::of(request))?;
                self.counting_orphans(request, &mut access)
            }
            result => result,
        }
    }

    // ---- contents ------------------------------------------------------------------------------

    /// Repeats `request` while it fails for something that is on its way. After
    /// [`Error::Returning`], pages come back by [`Fs::forget`]. After [`Error::OpenNatively`], a
    /// native reader is closed by [`Fs::close_natively`]. The caller must leave another thread free
    /// for these calls.
    ///
    /// # Errors
    /// The error of the last run of `request`.
    pub fn patiently<T>(&self, mut request: impl FnMut() -> Result<T>) -> Result<T> {
        let started = Instant::now();
        let deadline = started + CLOSING_PATIENCE;
        loop {
            let seen = self.closings.count();
            match self.pool.patiently(&mut request) {
                // The kernel has given the files up. So their pages come back for certain.
                Err(Error::Returning)
                    if started.elapsed() < DISMANTLING_PATIENCE && !self.stranded().is_empty() => {}
                Err(Error::OpenNatively)
                    if Instant::now() < deadline && self.closings.wait(seen, deadline) => {}
                result => return result,
            }
        }
    }

    /// True if the kernel may read the file's memory without the daemon for a descriptor that is
    /// being opened ([`Object::open_natively`]). The number of the request stands for the
    /// descriptor from then on.
    ///
    /// # Errors
    /// The errors of setxattr(2).
    pub fn open_natively(
        &self,
        object: &Object,
        read_only: bool,
        request: RequestContext,
    ) -> Result<bool> {
        if self.native && read_only { object.open_natively(request.unique) } else { Ok(false) }
    }

    /// A native reader is closed.
    pub fn close_natively(&self, node: InodeId, number: u64) {
        if let Some(object) = self.known_object(node) {
            object.close_natively(number);
            self.closings.add();
        }
    }

    /// pread(2).
    ///
    /// # Errors
    /// EIO at a quarantined subpage.
    pub fn read(
        &self,
        node: InodeId,
        buffer: &mut [u8],
        offset: u64,
        request: RequestContext,
    ) -> Result<usize> {
        let object = self.object(node)?;
        let pace = Pace::of(request);
        self.heeding_hw_errors(&object, request, || object.read(buffer, offset, &pace))
    }

    /// pwrite(2).
    ///
    /// # Errors
    /// ENOSPC, EIO, EBUSY, EFBIG.
    pub fn write(
        &self,
        node: InodeId,
        bytes: &[u8],
        offset: u64,
        request: RequestContext,
    ) -> Result<usize> {
        let object = self.object(node)?;
        self.contents_change(&object, request.unprivileged)?;
        let write =
            || self.with_context(&object, request, |context| object.write(bytes, offset, context));
        self.heeding_hw_errors(&object, request, write)
    }

    /// fallocate(2) of `length` bytes at `offset`.
    ///
    /// # Errors
    /// ENOSPC, EIO, EBUSY, EFBIG.
    pub fn allocate(
        &self,
        node: InodeId,
        what: Allocation,
        (offset, length): (u64, u64),
        request: RequestContext,
    ) -> Result<()> {
        let object = self.object(node)?;
        self.contents_change(&object, request.unprivileged)?;
        let allocate = |context: Context<'_>| object.allocate(what, offset, length, context);
        self.heeding_hw_errors(&object, request, || self.with_context(&object, request, allocate))
    }

    /// copy_file_range(2): copies up to `length` bytes, perhaps fewer.
    ///
    /// # Errors
    /// The errors of reading and writing, if not one byte could be copied.
    pub fn copy(
        &self,
        from: (InodeId, u64),
        to: (InodeId, u64),
        length: u64,
        request: RequestContext,
    ) -> Result<usize> {
        const PIECE: usize = 1 << 20;
        const MOST: usize = 256 << 20; // so that one request does not keep a thread for seconds
        let pace = Pace::of(request);
        pace.refuse_if(|| Ok(true))?;
        let length = usize::try_from(length).unwrap_or(MOST).min(MOST);
        let mut buffer = vec![0; PIECE.min(length)];
        let mut done = 0;
        while done < length {
            let wanted = buffer.len().min(length - done);
            let read = pace.go_on().and_then(|()| {
                self.read(from.0, &mut buffer[..wanted], from.1 + done as u64, request)
            });
            let piece = read.and_then(|read| match read {
                0 => Ok((0, 0)),
                read => Ok((read, self.write(to.0, &buffer[..read], to.1 + done as u64, request)?)),
            });
            match piece {
                Ok((read, written)) => {
                    done += written;
                    if read == 0 || written < wanted {
                        break;
                    }
                }
                Err(_) if done > 0 => break,
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }

    /// lseek(2) with SEEK_DATA (true) or SEEK_HOLE.
    ///
    /// # Errors
    /// ENXIO.
    pub fn seek(
        &self,
        node: InodeId,
        offset: u64,
        data: bool,
        request: RequestContext,
    ) -> Result<u64> {
        let (object, pace) = (self.object(node)?, Pace::of(request));
        self.look_for_hw_errors_in(&object, &pace)?;
        object.seek(offset, data, &pace)
    }

    // ---- check ---------------------------------------------------------------------------------

    /// Verifies S1, P1, P2 and Q1, and returns a text for each violation. The check looks at one
    /// file after the other. No request waits longer for the check than it takes to look at a piece
    /// of one file.
    ///
    /// # Errors
    /// The errors of the system calls; [`Error::Busy`] if files come and go faster than the check
    /// can count them.
    pub fn check(&self, pace: &Pace) -> Result<Vec<String>> {
        let mut wrong = Vec::new();
        for object in self.objects_and_stranded() {
            wrong.extend(object.check(pace)?);
            // An object leaves the table before its inode is erased.
            if !self.index.exists(object.node())? && self.known_object(object.node()).is_some() {
                wrong.push(format!("P2: object {} belongs to no file", object.node()));
            }
        }
        wrong.extend(self.pool.check_reserves()?);
        wrong.extend(self.check_account()?);
        Ok(wrong)
    }

    fn objects_and_stranded(&self) -> Vec<Arc<Object>> {
        let stranded = self.stranded(); // an object that is being removed is in one of the two
        self.objects().values().chain(&*stranded).cloned().collect()
    }

    /// Compares the pool's account with the pages of all files. No page moves while this shares the
    /// locks of all files. To get the locks, it waits for the pieces that are under way. It holds
    /// the locks for one addition for each file.
    fn check_account(&self) -> Result<Vec<String>> {
        const TRIES: u32 = 1000;
        let _as_large_as_it_is = self.pool.keep_size();
        let _none_is_opened = self.retrying.lock().expect("no panic while a file is opened");
        for _ in 0..TRIES {
            let objects = self.objects_and_stranded();
            let locked: Vec<_> = objects.iter().map(|object| object.read_lock()).collect();
            // With files locked, this does not wait for the tables: their owners wait for files.
            let tables = (self.stranded.try_lock(), self.objects.try_lock());
            if let (Ok(stranded), Ok(table)) = &tables
                && has_all(&objects, table.values().chain(&**stranded))
            {
                let held = locked.iter().map(|holding| holding.held());
                return Ok(self.pool.check(held.chain([self.held_by_unavailable()]).sum()));
            }
            drop((tables, locked));
            std::thread::yield_now();
        }
        Err(Error::Busy("files come and go faster than they can be counted; check again"))
    }
}

/// True if `objects` are the objects of `now`, in any order.
fn has_all<'a>(objects: &[Arc<Object>], now: impl Iterator<Item = &'a Arc<Object>>) -> bool {
    let known: HashSet<InodeId> = objects.iter().map(|object| object.node()).collect();
    let now: Vec<InodeId> = now.map(|object| object.node()).collect();
    now.len() == known.len() && now.iter().all(|node| known.contains(node))
}

/// The options of the mount, one a line: `<name> <value>`. The size is not among them, because it
/// may have changed since.
fn in_force(options: &Options) -> String {
    let lasting = options.given().filter(|(name, _)| *name != "size");
    lasting.fold(String::new(), |text, (name, value)| text + name + " " + &value + "\n")
}

fn reads_natively(io: Io) -> bool {
    match io {
        Io::Native => true,
        Io::Mediated => false,
        Io::Auto => memory_failures().is_some(),
    }
}
