//! The index: names, owners, modes, times, links and attributes of all files, as the inodes of one
//! private tmpfs.
//!
//! ```text
//!   /index/tree/...       the tree that users see; a regular file in it is empty and stands for its object
//!   /index/.orphans/<id>  inodes that are unlinked and still open or mapped
//!   /index/.witnesses/<n> notes of requests, see [`Index::witness`]
//! ```
//!
//! Create, rename, link, chmod and the rest are atomic system calls of the kernel on that tmpfs,
//! and POSIX semantics come with them. A [`InodeId`] is the file handle of an inode. So this module
//! keeps no table from id to inode and no count of the kernel's references: the kernel says which
//! nodes it still knows (see [`Index::erase`]).
//!
//! Each submodule adds the calls of one subject to [`Index`]: `names` creates and removes names,
//! `inode` reads and sets what stat(2) tells, `xattrs` the extended attributes, `directory` lists
//! entries, `orphans` keeps inodes without a name, `records` keeps notes for the next worker.
//!
//! **File handles.** A program's file handle holds the same id (open_by_handle_at(2)), so a program
//! can make an id up. Only one request can carry such an id: the look-up of `.`, which finds nodes
//! below the root of the tree only ([`Index::lookup`]). All other requests name a node that the
//! kernel got from us.
//!
//! **Unlinking.** [`Index::unlink`] moves an inode with its last name into `.orphans`, in one
//! rename(2). That takes no memory, because a user removes files when memory is short.
//! [`Index::rename`] over a file takes two steps, so that the name is never missing: the inode is
//! linked into `.orphans`, then its name is replaced. Between the two the inode has one link too
//! many; [`Index::reopen`] removes it.
//!
//! **Locks.** `unlinking` is held from reading a link count to having acted on it, `taking` while
//! one of the last inodes is taken, `orphaned` for one look-up, in this order. None is held while
//! this module calls another of the daemon's modules.

mod directory;
mod inode;
mod names;
mod orphans;
mod records;
mod xattrs;

pub use directory::DirEntry;
pub use inode::{Attributes, Inode, Kind, Time};
pub use names::{Name, New};

use crate::error::{Error, Result};
use crate::options::Options;
use crate::sys::handle;
use crate::sys::{calls, fd_path, tmpfs};
use crate::units::InodeId;
use rustix::fs::{CWD, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;
use std::collections::HashSet;
use std::ffi::{CStr, CString, OsStr};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::Mutex;

/// The index's mount point in the daemon's namespace.
pub const MOUNT_POINT: &str = "/index";

const TREE: &str = "tree";
const ORPHANS: &str = ".orphans";
const WITNESSES: &str = ".witnesses";

/// Inodes of the daemon in this tmpfs: its root, `.orphans`, `.witnesses`, `handover`, and one that
/// the kernel counts for the attributes that the daemon keeps at them.
const OWN_INODES: u64 = 5;

/// Inodes that no new node gets. Short-lived entries use them: a note of a request, and the second
/// name of a file that another file is renamed over.
const SPARE_INODES: u64 = 256;

/// The index.
#[derive(Debug)]
pub struct Index {
    mount: OwnedFd,
    tree: OwnedFd,
    /// The tree's own id; users know it as [`InodeId::ROOT`].
    tree_id: InodeId,
    orphans: OwnedFd,
    witnesses: OwnedFd,
    /// The ids in `.orphans`.
    orphaned: Mutex<HashSet<InodeId>>,
    unlinking: Mutex<()>,
    /// Held while one of the last inodes is taken.
    taking: Mutex<()>,
    /// The option `nr_inodes=` bounds the users' inodes. The tmpfs then has [`OWN_INODES`] and
    /// [`SPARE_INODES`] besides.
    is_bounded: bool,
}

impl Index {
    /// An empty tree, mounted at [`MOUNT_POINT`], with a root and as many inodes as asked for.
    ///
    /// # Errors
    /// The errors of the system calls.
    pub fn create(options: &Options) -> Result<Self> {
        let inodes = options.inodes.map(|users| users + OWN_INODES + SPARE_INODES);
        let mount = tmpfs::create(&tmpfs::Options { inode32: true, inodes, ..Default::default() })?;
        tmpfs::attach(&mount, MOUNT_POINT)?;
        for name in [TREE, ORPHANS, WITNESSES] {
            calls::mkdirat(&mount, name, Mode::from_raw_mode(0o700))?;
        }
        let index = Self::of(mount, options)?;
        let (uid, gid) = (Uid::from_raw(options.uid), Gid::from_raw(options.gid));
        rustix::fs::fchown(&index.tree, Some(uid), Some(gid))?;
        rustix::fs::fchmod(&index.tree, Mode::from_raw_mode(options.mode))?;
        Ok(index)
    }

    /// Opens the tree that an earlier worker made, at [`MOUNT_POINT`], and undoes what that worker
    /// had half done.
    ///
    /// # Errors
    /// The errors of the system calls.
    pub fn reopen(options: &Options) -> Result<Self> {
        let index = Self::of(open_directory_at(CWD, MOUNT_POINT)?, options)?;
        index.recover_orphans()?;
        Ok(index)
    }

    fn of(mount: OwnedFd, options: &Options) -> Result<Self> {
        let (tree, orphans) =
            (open_directory_at(&mount, TREE)?, open_directory_at(&mount, ORPHANS)?);
        let witnesses = open_directory_at(&mount, WITNESSES)?;
        let tree_id = handle::of(&tree, c"")?;
        let (orphaned, unlinking, taking) = (Mutex::default(), Mutex::default(), Mutex::default());
        let is_bounded = options.inodes.is_some();
        Ok(Self {
            mount,
            tree,
            tree_id,
            orphans,
            witnesses,
            orphaned,
            unlinking,
            taking,
            is_bounded,
        })
    }

    fn open(&self, node: InodeId, flags: OFlags) -> Result<OwnedFd> {
        match node {
            InodeId::ROOT => {
                Ok(calls::openat(&self.tree, ".", flags | OFlags::CLOEXEC, Mode::empty())?)
            }
            _ => handle::open(&self.tree, node, flags.bits() as i32),
        }
    }

    /// A descriptor that names the node and gives no access to its contents (O_PATH).
    fn path(&self, node: InodeId) -> Result<OwnedFd> {
        self.open(node, OFlags::PATH)
    }

    fn id_of(&self, parent: &OwnedFd, name: &CStr) -> Result<InodeId> {
        handle::of(parent, name)
    }

    /// The same, or none where the directory has no such name. Every other failure is an error: it
    /// does not tell that the name is missing.
    fn id_if_there(&self, parent: &OwnedFd, name: &CStr) -> Result<Option<InodeId>> {
        match self.id_of(parent, name) {
            Ok(id) => Ok(Some(id)),
            Err(Error::Os(Errno::NOENT)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The id that users know an inode by.
    fn public_id(&self, id: InodeId) -> InodeId {
        if id == self.tree_id { InodeId::ROOT } else { id }
    }

    /// Looks `name` up in `parent`. The kernel asks for `.` and `..` when it has only an id, from a
    /// file handle (FUSE_EXPORT_SUPPORT).
    ///
    /// # Errors
    /// The errors of statx(2); ESTALE for an id that belongs to no node below the root.
    pub fn lookup(&self, parent: InodeId, name: &OsStr) -> Result<Attributes> {
        match name.as_bytes() {
            b"." => return self.recall(parent),
            b".." => return self.parent_of(parent),
            _ => {}
        }
        let directory = self.path(parent)?;
        self.look_up_in(&directory, &c_name(name)?)
    }

    /// The node of an id that comes from outside. The program may have kept the id for long, or
    /// have made it up.
    fn recall(&self, node: InodeId) -> Result<Attributes> {
        let inode = self.inode(node)?;
        if node != InodeId::ROOT && !is_below_root(&inode.fd)? {
            return Err(Error::Os(Errno::STALE));
        }
        self.attributes_of(&inode)
    }

    fn parent_of(&self, node: InodeId) -> Result<Attributes> {
        let found = self.recall(node)?; // no place outside of the tree is asked for its handle
        if node == InodeId::ROOT {
            return Ok(found);
        }
        let parent = self.public_id(self.id_of(&self.path(node)?, c"..")?);
        self.recall(parent)
    }

    fn look_up_in(&self, directory: &OwnedFd, name: &CStr) -> Result<Attributes> {
        self.attributes_of(&self.inode(self.id_of(directory, name)?)?)
    }

    /// Opens a node, so that it can be changed.
    ///
    /// # Errors
    /// ESTALE where there is no such node any more.
    pub fn inode(&self, node: InodeId) -> Result<Inode> {
        Ok(Inode { node, fd: self.path(node)? })
    }

    /// True if an inode of this id exists. A look-up that fails for want of memory or descriptors
    /// is an error, not a "no".
    ///
    /// # Errors
    /// The errors of open_by_handle_at(2).
    pub fn exists(&self, node: InodeId) -> Result<bool> {
        match self.path(node) {
            Err(Error::Os(Errno::STALE)) => Ok(false),
            found => found.map(|_| true),
        }
    }

    /// One of the paths of a node, from the root on: the name by which the kernel found the node
    /// last.
    ///
    /// # Errors
    /// The errors of open_by_handle_at(2) and readlink(2).
    pub fn path_of(&self, node: InodeId) -> Result<String> {
        let path = rustix::fs::readlink(fd_path(self.path(node)?.as_fd()), Vec::new())?;
        let path = path.to_string_lossy().into_owned();
        Ok(path.strip_prefix(&format!("{MOUNT_POINT}/{TREE}")).map(str::to_owned).unwrap_or(path))
    }

    /// The inodes that users may have in all, and those that they can still make.
    ///
    /// # Errors
    /// The errors of fstatfs(2).
    pub fn inodes(&self) -> Result<(u64, u64)> {
        let stat = calls::fstatfs(&self.mount)?;
        let (own, spare) = if self.is_bounded { (OWN_INODES, SPARE_INODES) } else { (0, 0) };
        Ok((stat.f_files.saturating_sub(own + spare), stat.f_ffree.saturating_sub(spare)))
    }

    /// Runs `make`, which takes up to `wanted` inodes (or as much room in attributes), if users
    /// have so many left.
    fn taking<T>(&self, wanted: u64, make: impl FnOnce() -> Result<T>) -> Result<T> {
        const PLENTY: u64 = 64 << 10; // more than all threads can take at the same moment
        if self.inodes()?.1 > PLENTY {
            return make();
        }
        let _alone = self.taking.lock().expect("no panic while an inode is taken");
        if self.inodes()?.1 < wanted {
            return Err(Error::Os(Errno::NOSPC));
        }
        make()
    }
}

/// True if a node is in the tree and is not the root. Orphans and the daemon's own files are
/// elsewhere.
fn is_below_root(fd: &OwnedFd) -> Result<bool> {
    let inside = format!("{MOUNT_POINT}/{TREE}/");
    match calls::readlinkat(CWD, fd_path(fd.as_fd()), Vec::new()) {
        Ok(path) => Ok(path.to_bytes().starts_with(inside.as_bytes())),
        // No path outside of the tree has more than some hundred bytes.
        Err(Errno::NAMETOOLONG) => Ok(true),
        Err(errno) => Err(errno.into()),
    }
}

fn open_directory_at(parent: impl AsFd, name: &str) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(calls::openat(parent, name, flags, Mode::empty())?)
}

fn c_name(name: &OsStr) -> Result<CString> {
    CString::new(name.as_bytes()).map_err(|_| Error::Os(Errno::INVAL))
}
