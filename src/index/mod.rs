//! The tree: names, owners, modes, times, links and attributes, as the inodes of one private tmpfs.
//!
//! ```text
//!   /index/tree/...       what users see; a regular file here is empty and only stands for its object
//!   /index/.orphans/<id>  what was unlinked and is still open or mapped
//!   /index/.witnesses/<n> what a request found, see [`Index::witness`]
//! ```
//!
//! Create, rename, link, chmod and the rest are the kernel's own, atomic system calls on that tmpfs, and POSIX comes
//! with them. A [`NodeId`] is the file handle of an inode, so this module keeps no table from id to inode, and no count of
//! the kernel's references: whether the kernel still knows a node is the kernel's to say (see [`Index::erase`]).
//!
//! **File handles.** The id is also what a program's file handle holds (open_by_handle_at(2)), so an id may be made up. Each
//! request but one names a node that the kernel has been told of. The one is the look-up of `.`, which finds nodes below the
//! root of the tree only ([`Index::lookup`]).
//!
//! **Unlinking.** An inode is moved into `.orphans` with its last name, in one step that takes no memory: where there is none
//! left, removing is what helps. Only a file that another is renamed over goes in two, so that its name is never missing: the inode is
//! linked into `.orphans`, then replaced. Between the two it has one link too many; [`Index::reopen`] takes that back.
//!
//! **Locks.** `unlinking` is held from looking at a link count to having acted on it; `orphaned` for one look-up. Neither
//! while calling out of this module.

use crate::error::{Error, Result};
use crate::options::Options;
use crate::steps::{self, Step, insist};
use crate::sys::handle;
use crate::sys::identity::{Caller, Member, acting_as};
use crate::sys::{calls, fd_path, tmpfs};
use crate::units::NodeId;
use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, RenameFlags, SeekFrom, Stat, Timestamps, Uid, XattrFlags,
    major, minor,
};
use rustix::io::Errno;
use std::collections::HashSet;
use std::ffi::{CStr, CString, OsStr};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The index's mount point in the daemon's namespace.
pub const MOUNT_POINT: &str = "/index";

const TREE: &str = "tree";
const ORPHANS: &str = ".orphans";
const WITNESSES: &str = ".witnesses";

/// What the tmpfs counts of inodes that are no users': its root, `.orphans`, `.witnesses`, `handover`, and one for the attributes
/// that the daemon keeps at them.
const OWN_INODES: u64 = 5;

/// Inodes that no new node gets, for what is there for a moment only: a note of what a request found, and the second name of a
/// file that another is renamed over.
const SPARE_INODES: u64 = 256;

const ACCESS_ACL: &str = "system.posix_acl_access";

const SET_USER_ID: u32 = 0o4000;
const SET_GROUP_ID: u32 = 0o2000;

/// What kind of thing a node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Regular file.
    File,
    /// Directory.
    Directory,
    /// Symbolic link.
    Symlink,
    /// FIFO.
    Fifo,
    /// Socket.
    Socket,
    /// Character device.
    CharDevice,
    /// Block device.
    BlockDevice,
}

impl Kind {
    fn from_mode(mode: u32) -> Self {
        match FileType::from_raw_mode(mode) {
            FileType::Directory => Self::Directory,
            FileType::Symlink => Self::Symlink,
            FileType::Fifo => Self::Fifo,
            FileType::Socket => Self::Socket,
            FileType::CharacterDevice => Self::CharDevice,
            FileType::BlockDevice => Self::BlockDevice,
            FileType::RegularFile | FileType::Unknown => Self::File,
        }
    }
}

/// What stat(2) tells of a node; a regular file's size and blocks are its object's, and zero here.
#[derive(Clone, Copy, Debug)]
pub struct Attributes {
    /// Its id.
    pub node: NodeId,
    /// What it is.
    pub kind: Kind,
    /// Permission bits, with set-id and sticky bits.
    pub mode: u32,
    /// Names.
    pub links: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device number (major, minor).
    pub device: (u32, u32),
    /// Size in bytes.
    pub size: u64,
    /// Memory in units of 512 bytes.
    pub blocks: u64,
    /// Size and memory may be told otherwise later, without a change of the file; never so here.
    pub provisional: bool,
    /// Last access, as utimens(2) set it: reads do not change it.
    pub accessed: SystemTime,
    /// Last modification; writes through a mapping do not change it.
    pub modified: SystemTime,
    /// Last change of the inode.
    pub changed: SystemTime,
}

/// What utimens(2) is to set one of the two times to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Time {
    /// Leave it.
    Omit,
    /// The present.
    Now,
    /// That.
    At(SystemTime),
}

/// What is made of a directory entry.
#[derive(Clone, Copy, Debug)]
pub enum New<'a> {
    /// A regular file, FIFO, socket or device: file type and mode bits, device number as in `makedev(3)`.
    Node(u32, u64),
    /// A directory with these mode bits.
    Directory(u32),
    /// A symbolic link to there.
    Symlink(&'a CStr),
}

/// One entry that reading a directory yields.
#[derive(Clone, Debug)]
pub struct DirEntry {
    /// The node's id.
    pub node: NodeId,
    /// What it is.
    pub kind: Kind,
    /// Its name.
    pub name: Vec<u8>,
    /// Where to go on reading behind it; stable while the directory changes (tmpfs, Linux 6.6).
    pub next: u64,
}

/// An inode that is open. What changes it needs no descriptor any more.
#[derive(Debug)]
pub struct Inode {
    node: NodeId,
    fd: OwnedFd,
}

/// The tree.
#[derive(Debug)]
pub struct Index {
    mount: OwnedFd,
    tree: OwnedFd,
    /// The tree's own id; users know it as [`NodeId::ROOT`].
    tree_id: NodeId,
    orphans: OwnedFd,
    witnesses: OwnedFd,
    /// What is in `.orphans`.
    orphaned: Mutex<HashSet<NodeId>>,
    unlinking: Mutex<()>,
    /// Held while one of the last inodes is taken.
    taking: Mutex<()>,
    /// An option says how many inodes users may have; besides, there are [`OWN_INODES`] and [`SPARE_INODES`].
    is_bounded: bool,
}

impl Index {
    /// An empty tree, mounted at [`MOUNT_POINT`], with a root and as many inodes as asked for.
    ///
    /// # Errors
    /// What the kernel answers.
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

    /// The tree that another process made, at [`MOUNT_POINT`], with what that had half done taken back.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn reopen(options: &Options) -> Result<Self> {
        let index = Self::of(open_directory_at(CWD, MOUNT_POINT)?, options)?;
        for id in index.listed_orphans()? {
            let attributes = from_stat(id, &stat(&index.path(id)?)?);
            if attributes.kind != Kind::Directory && attributes.links > 1 {
                calls::unlinkat(&index.orphans, orphan_name(id), AtFlags::empty())?;
            } else {
                index.orphaned().insert(id);
            }
        }
        Ok(index)
    }

    fn of(mount: OwnedFd, options: &Options) -> Result<Self> {
        let (tree, orphans) = (open_directory_at(&mount, TREE)?, open_directory_at(&mount, ORPHANS)?);
        let witnesses = open_directory_at(&mount, WITNESSES)?;
        let tree_id = handle::of(&tree, c"")?;
        let (orphaned, unlinking, taking) = (Mutex::default(), Mutex::default(), Mutex::default());
        let is_bounded = options.inodes.is_some();
        Ok(Self { mount, tree, tree_id, orphans, witnesses, orphaned, unlinking, taking, is_bounded })
    }

    fn listed_orphans(&self) -> Result<Vec<NodeId>> {
        let mut orphans = Vec::new();
        for entry in calls::read_dir(&self.orphans)? {
            let name = entry?.file_name().to_owned();
            orphans.extend(name.to_str().ok().and_then(NodeId::parse));
        }
        Ok(orphans)
    }

    fn orphaned(&self) -> MutexGuard<'_, HashSet<NodeId>> {
        self.orphaned.lock().expect("no panic while the set is open")
    }

    /// Whether `node` has no name, and its references are all that keeps it.
    pub fn is_orphan(&self, node: NodeId) -> bool {
        self.orphaned().contains(&node)
    }

    fn open(&self, node: NodeId, flags: OFlags) -> Result<OwnedFd> {
        match node {
            NodeId::ROOT => Ok(calls::openat(&self.tree, ".", flags | OFlags::CLOEXEC, Mode::empty())?),
            _ => handle::open(&self.tree, node, flags.bits() as i32),
        }
    }

    /// A descriptor that names the node and gives no access to its contents.
    fn path(&self, node: NodeId) -> Result<OwnedFd> {
        self.open(node, OFlags::PATH)
    }

    fn id_of(&self, parent: &OwnedFd, name: &CStr) -> Result<NodeId> {
        handle::of(parent, name)
    }

    /// The same; none where there is no such name. A look-up that fails for another reason says nothing about that.
    fn id_if_there(&self, parent: &OwnedFd, name: &CStr) -> Result<Option<NodeId>> {
        match self.id_of(parent, name) {
            Ok(id) => Ok(Some(id)),
            Err(Error::Os(Errno::NOENT)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The id that users know an inode by.
    fn public_id(&self, id: NodeId) -> NodeId {
        if id == self.tree_id { NodeId::ROOT } else { id }
    }

    /// Looks `name` up in `parent`. `.` and `..` are how the kernel looks a node up of which it has the id only, from a file handle
    /// (FUSE_EXPORT_SUPPORT).
    ///
    /// # Errors
    /// What statx(2) answers; ESTALE for an id that is no node's below the root.
    pub fn lookup(&self, parent: NodeId, name: &OsStr) -> Result<Attributes> {
        match name.as_bytes() {
            b"." => return self.recall(parent),
            b".." => return self.parent_of(parent),
            _ => {}
        }
        let directory = self.path(parent)?;
        self.look_up_in(&directory, &c_name(name)?)
    }

    /// The node of an id that comes from outside. The caller may have kept the id for long, or have made it up.
    fn recall(&self, node: NodeId) -> Result<Attributes> {
        let inode = self.inode(node)?;
        if node != NodeId::ROOT && !is_below_root(&inode.fd)? {
            return Err(Error::Os(Errno::STALE));
        }
        self.attributes_of(&inode)
    }

    fn parent_of(&self, node: NodeId) -> Result<Attributes> {
        let found = self.recall(node)?; // no place outside of the tree is asked for its handle
        if node == NodeId::ROOT {
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
    pub fn inode(&self, node: NodeId) -> Result<Inode> {
        Ok(Inode { node, fd: self.path(node)? })
    }

    /// What stat(2) tells of a node.
    ///
    /// # Errors
    /// ESTALE where there is no such node any more.
    pub fn attributes(&self, node: NodeId) -> Result<Attributes> {
        self.attributes_of(&self.inode(node)?)
    }

    /// The same of one that is open.
    ///
    /// # Errors
    /// ESTALE where it is erased.
    pub fn attributes_of(&self, inode: &Inode) -> Result<Attributes> {
        let mut attributes = from_stat(inode.node, &stat(&inode.fd)?);
        if attributes.links == 0 {
            return Err(Error::Os(Errno::STALE)); // erased, and here only until another request has closed it
        }
        if self.is_orphan(inode.node) {
            attributes.links = 0; // those that it has are in `.orphans`
        }
        Ok(attributes)
    }

    /// Makes an entry that belongs to `caller` from the first moment it can be seen, and looks it up.
    ///
    /// # Errors
    /// EEXIST, EDQUOT, ENOSPC: what the system call answers.
    pub fn make(&self, parent: NodeId, name: &OsStr, new: New<'_>, caller: Caller) -> Result<Attributes> {
        let directory = self.path(parent)?;
        let name = c_name(name)?;
        self.taking(1, || acting_as(caller, || Ok(make_in(&directory, &name, new)?)))?;
        self.look_up_in(&directory, &name).inspect_err(|_| {
            let kind = if let New::Directory(_) = new { AtFlags::REMOVEDIR } else { AtFlags::empty() };
            let _ = calls::unlinkat(&directory, &*name, kind); // what fails leaves nothing behind
        })
    }

    /// Gives a node one more name, and looks it up.
    ///
    /// # Errors
    /// What linkat(2) answers.
    pub fn link(&self, node: NodeId, parent: NodeId, name: &OsStr) -> Result<Attributes> {
        let directory = self.path(parent)?;
        let name = c_name(name)?;
        let _unlinking = self.unlinking();
        if self.is_orphan(node) {
            return Err(Error::Os(Errno::NOENT)); // as link(2) answers for an open file without a name
        }
        let inode = self.inode(node)?;
        let link = || Ok(calls::linkat(&inode.fd, c"", &directory, &*name, AtFlags::EMPTY_PATH)?);
        self.taking(1, link)?;
        self.attributes_of(&inode)
    }

    /// Runs `make`, which takes up to `wanted` inodes, or as much room in attributes, where so many are left to users.
    fn taking<T>(&self, wanted: u64, make: impl FnOnce() -> Result<T>) -> Result<T> {
        const PLENTY: u64 = 64 << 10; // more than all threads that are here at the same moment can take
        if self.inodes()?.1 > PLENTY {
            return make();
        }
        let _alone = self.taking.lock().expect("no panic while an inode is taken");
        if self.inodes()?.1 < wanted {
            return Err(Error::Os(Errno::NOSPC));
        }
        make()
    }

    fn unlinking(&self) -> MutexGuard<'_, ()> {
        self.unlinking.lock().expect("no panic while unlinking")
    }

    /// Removes a name that is not a directory's. Returns the node if that was its last name.
    ///
    /// # Errors
    /// What unlinkat(2) answers.
    pub fn unlink(&self, parent: NodeId, name: &OsStr) -> Result<Option<NodeId>> {
        let directory = self.path(parent)?;
        let name = c_name(name)?;
        let _unlinking = self.unlinking();
        let id = self.id_of(&directory, &name)?;
        let orphan = self.is_last_name(&self.path(id)?)?.then_some(id);
        match orphan {
            Some(id) => self.move_away(&directory, &name, id)?,
            None => {
                calls::unlinkat(&directory, &*name, AtFlags::empty())?;
                steps::done(Step::UnlinkRemoved);
            }
        }
        Ok(orphan)
    }

    /// Whether the node has one name only, and is not a directory.
    fn is_last_name(&self, node: &OwnedFd) -> Result<bool> {
        let attributes = attributes_of(node)?;
        Ok(attributes.links == 1 && attributes.kind != Kind::Directory)
    }

    /// Makes an orphan of `id`, whose last name this is.
    fn move_away(&self, directory: &OwnedFd, name: &CStr, id: NodeId) -> Result<()> {
        calls::renameat(directory, name, &self.orphans, orphan_name(id))?;
        steps::done(Step::UnlinkRemoved);
        self.orphaned().insert(id);
        Ok(())
    }

    /// Removes an empty directory: moves it away, so that who has it open or for a working directory keeps it. Nothing can be put into
    /// it in the meantime, as the kernel holds it locked.
    ///
    /// # Errors
    /// ENOTEMPTY, and what renameat(2) answers.
    pub fn remove_directory(&self, parent: NodeId, name: &OsStr) -> Result<()> {
        let directory = self.path(parent)?;
        let name = c_name(name)?;
        let _unlinking = self.unlinking();
        self.move_directory_away(&directory, &name).map(drop)
    }

    fn move_directory_away(&self, parent: &OwnedFd, name: &CStr) -> Result<NodeId> {
        let id = self.id_of(parent, name)?;
        refuse_non_empty(&self.open(id, OFlags::RDONLY | OFlags::DIRECTORY)?)?;
        self.move_away(parent, name, id)?;
        Ok(id)
    }

    /// Gives an entry another name or place, or exchanges two. Returns the node that lost its last name by it, if
    /// that is not a directory.
    ///
    /// # Errors
    /// What renameat2(2) answers.
    pub fn rename(
        &self,
        from: (NodeId, &OsStr),
        to: (NodeId, &OsStr),
        flags: RenameFlags,
    ) -> Result<Option<NodeId>> {
        let (source, target) = (self.path(from.0)?, self.path(to.0)?);
        let (old, new) = (c_name(from.1)?, c_name(to.1)?);
        let _unlinking = self.unlinking();
        let replaced = match self.id_if_there(&target, &new)? {
            Some(id) if flags.is_empty() && id != self.id_of(&source, &old)? => Some(id),
            _ => None,
        };
        let kind = replaced.map(|id| attributes_of(&self.path(id)?)).transpose()?.map(|found| found.kind);
        if kind == Some(Kind::Directory) {
            return self.rename_over_directory((&source, &old), (&target, &new));
        }
        let orphan = if replaced.is_some() { self.orphan_if_last(&target, &new)? } else { None };
        let renamed = calls::renameat_with(&source, &*old, &target, &*new, flags);
        steps::done(Step::UnlinkRemoved);
        self.settle(orphan, renamed)
    }

    /// The directory that is replaced is moved away first: who has it open keeps it. The kernel holds both parents locked, so
    /// that nobody sees the name missing.
    fn rename_over_directory(
        &self,
        (source, old): (&OwnedFd, &CStr),
        (target, new): (&OwnedFd, &CStr),
    ) -> Result<Option<NodeId>> {
        if attributes_of(&self.path(self.id_of(source, old)?)?)?.kind != Kind::Directory {
            return Err(Error::Os(Errno::ISDIR));
        }
        let moved = self.move_directory_away(target, new)?;
        if let Err(errno) = calls::renameat_with(source, old, target, new, RenameFlags::NOREPLACE) {
            calls::renameat_with(&self.orphans, orphan_name(moved), target, new, RenameFlags::NOREPLACE)?;
            self.orphaned().remove(&moved);
            return Err(errno.into());
        }
        Ok(None)
    }

    /// Links what `name` stands for into `.orphans`, if that is its only name, before something else takes the name.
    fn orphan_if_last(&self, directory: &OwnedFd, name: &CStr) -> Result<Option<NodeId>> {
        let id = self.id_of(directory, name)?;
        let node = self.path(id)?;
        if !self.is_last_name(&node)? {
            return Ok(None);
        }
        calls::linkat(&node, c"", &self.orphans, orphan_name(id), AtFlags::EMPTY_PATH)?;
        steps::done(Step::UnlinkOrphaned);
        Ok(Some(id))
    }

    /// Counts the orphan as one if its name is gone, and takes it back out of `.orphans` if not.
    fn settle(&self, orphan: Option<NodeId>, removed: Result<(), Errno>) -> Result<Option<NodeId>> {
        match (removed, orphan) {
            (Ok(()), Some(id)) => {
                self.orphaned().insert(id);
            }
            (Err(_), Some(id)) => {
                calls::unlinkat(&self.orphans, orphan_name(id), AtFlags::empty())?;
            }
            (_, None) => {}
        }
        removed?;
        Ok(orphan)
    }

    /// The nodes without names that were there at some moment.
    pub fn orphans(&self) -> Vec<NodeId> {
        self.orphaned().iter().copied().collect()
    }

    /// Removes a node without names that the kernel does not know any more, so that nobody can reach it.
    ///
    /// # Errors
    /// What unlinkat(2) answers. A shortage is no reason to fail: no request comes that could try again.
    pub fn erase(&self, node: NodeId) -> Result<()> {
        let name = orphan_name(node);
        let unlink = |flags| match calls::unlinkat(&self.orphans, &name, flags) {
            Err(Errno::NOENT) => Ok(()),
            result => Ok(result?),
        };
        let erased = insist(|| match unlink(AtFlags::empty()) {
            Err(Error::Os(Errno::ISDIR)) => unlink(AtFlags::REMOVEDIR),
            result => result,
        });
        self.orphaned().remove(&node);
        erased
    }

    /// Keeps a number for the next worker, or that there is none.
    ///
    /// # Errors
    /// What setxattr(2) answers.
    pub fn keep(&self, name: &str, number: Option<u64>) -> Result<()> {
        let text = number.map(|number| number.to_string()).unwrap_or_default();
        Ok(calls::fsetxattr(&self.orphans, kept(name), text.as_bytes(), XattrFlags::empty())?)
    }

    /// The number that was kept.
    ///
    /// # Errors
    /// What getxattr(2) answers.
    pub fn kept(&self, name: &str) -> Result<Option<u64>> {
        let mut text = [0; 20]; // digits of 2^64
        let length = calls::fgetxattr(&self.orphans, kept(name), &mut text[..])?;
        Ok(std::str::from_utf8(&text[..length]).ok().and_then(|text| text.parse().ok()))
    }

    // ---- witnesses ----------------------------------------------------------------------------------------------

    /// Notes what `request` found before it changes it. A request that was carried out by a daemon that died before it could
    /// answer is asked again of the next one, which cannot tell by looking whether it is done already: an exchange of two
    /// names, say. The note tells. The kernel never gives a number to two requests.
    ///
    /// Returns what is noted already, where the request had come this far before.
    ///
    /// # Errors
    /// What symlinkat(2) answers.
    pub fn witness(&self, request: u64, found: &str) -> Result<Option<String>> {
        let name = request.to_string();
        match calls::symlinkat(found, &self.witnesses, &name) {
            Ok(()) => Ok(None),
            Err(Errno::EXIST) => {
                let noted = calls::readlinkat(&self.witnesses, &name, Vec::new())?;
                Ok(Some(noted.to_string_lossy().into_owned()))
            }
            Err(errno) => Err(errno.into()),
        }
    }

    /// Forgets the note, when the request has been answered.
    pub fn dismiss(&self, request: u64) {
        // A note that stays is a few bytes that no request looks at again. The kernel has its answer already, so no
        // test can tell when this is done, and none counts it.
        let _ = rustix::fs::unlinkat(&self.witnesses, request.to_string(), AtFlags::empty());
    }

    /// The target of a symbolic link.
    ///
    /// # Errors
    /// EINVAL for anything else.
    pub fn read_link(&self, node: NodeId) -> Result<CString> {
        Ok(calls::readlinkat(self.path(node)?, c"", Vec::new())?)
    }

    /// chmod(2).
    ///
    /// # Errors
    /// What fchmodat(2) answers.
    pub fn set_mode(&self, inode: &Inode, mode: u32) -> Result<()> {
        Ok(calls::chmodat(CWD, fd_path(inode.fd.as_fd()), Mode::from_raw_mode(mode), AtFlags::empty())?)
    }

    /// chown(2); the kernel clears set-id bits as it does everywhere.
    ///
    /// # Errors
    /// What fchownat(2) answers.
    pub fn set_owner(&self, inode: &Inode, uid: Option<u32>, gid: Option<u32>) -> Result<()> {
        let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
        Ok(calls::chownat(&inode.fd, c"", uid, gid, AtFlags::EMPTY_PATH)?)
    }

    /// utimens(2).
    ///
    /// # Errors
    /// What utimensat(2) answers.
    pub fn set_times(&self, inode: &Inode, accessed: Time, modified: Time) -> Result<()> {
        set_times_of(&inode.fd, accessed, modified)
    }

    /// The contents change: file capabilities go whoever changes them, and with `unprivileged`, at the hands of somebody without
    /// CAP_FSETID, set-user-id goes too, and set-group-id of what a group may execute (FUSE_HANDLE_KILLPRIV_V2 in
    /// linux/fuse.h).
    ///
    /// # Errors
    /// What chmod(2), removexattr(2) and utimensat(2) answer.
    pub fn contents_changed(&self, node: NodeId, unprivileged: bool) -> Result<()> {
        const CAPABILITIES: &CStr = c"security.capability";
        let fd = self.path(node)?;
        if unprivileged {
            let mode = attributes_of(&fd)?.mode;
            let group = if mode & 0o010 != 0 { SET_GROUP_ID } else { 0 };
            change_mode(&fd, mode, mode & !(SET_USER_ID | group))?;
        }
        match calls::removexattr(fd_path(fd.as_fd()), CAPABILITIES) {
            Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP) => {}
            Err(errno) => return Err(errno.into()),
        }
        set_times_of(&fd, Time::Omit, Time::Now)
    }

    /// An extended attribute of the inode itself.
    ///
    /// # Errors
    /// What getxattr(2) answers.
    pub fn attribute(&self, node: NodeId, name: &OsStr) -> Result<Vec<u8>> {
        let fd = self.path(node)?;
        let mut value = vec![0; 64 << 10]; // XATTR_SIZE_MAX
        let length = calls::getxattr(fd_path(fd.as_fd()), name, &mut value[..])?;
        value.truncate(length);
        Ok(value)
    }

    /// Sets an extended attribute of the inode itself to a value, with flags.
    ///
    /// # Errors
    /// What setxattr(2) answers.
    pub fn set_attribute(
        &self,
        node: NodeId,
        name: &OsStr,
        (value, flags): (&[u8], i32),
        by: Member,
    ) -> Result<()> {
        let fd = self.path(node)?;
        let flags = XattrFlags::from_bits_retain(flags as u32);
        let set = || Ok(calls::setxattr(fd_path(fd.as_fd()), name, value, flags)?);
        self.taking(inodes_for_attribute(name, value), set)?;
        if name == ACCESS_ACL { drop_undue_set_group_id(&fd, by) } else { Ok(()) }
    }

    /// Removes an extended attribute of the inode itself.
    ///
    /// # Errors
    /// What removexattr(2) answers.
    pub fn remove_attribute(&self, node: NodeId, name: &OsStr) -> Result<()> {
        let fd = self.path(node)?;
        Ok(calls::removexattr(fd_path(fd.as_fd()), name)?)
    }

    /// The names of the inode's extended attributes, each with a NUL behind it.
    ///
    /// # Errors
    /// What listxattr(2) answers.
    pub fn attribute_names(&self, node: NodeId) -> Result<Vec<u8>> {
        let fd = self.path(node)?;
        let mut names = vec![0; 64 << 10]; // XATTR_LIST_MAX
        let length = calls::listxattr(fd_path(fd.as_fd()), &mut names[..])?;
        names.truncate(length);
        Ok(names)
    }

    /// Opens a directory for reading.
    ///
    /// # Errors
    /// What open(2) answers.
    pub fn open_directory(&self, node: NodeId) -> Result<OwnedFd> {
        self.open(node, OFlags::RDONLY | OFlags::DIRECTORY)
    }

    /// Reads a directory from the place `from` on (0, or an entry's [`DirEntry::next`]) for as long as `take` answers
    /// true. What it refuses is read again the next time.
    ///
    /// # Errors
    /// What getdents(2) answers.
    pub fn read_directory(
        &self,
        directory: &OwnedFd,
        from: u64,
        mut take: impl FnMut(DirEntry) -> bool,
    ) -> Result<()> {
        rustix::fs::seek(directory, SeekFrom::Start(from))?;
        let mut buffer = Vec::with_capacity(32 << 10);
        let mut entries = rustix::fs::RawDir::new(directory, buffer.spare_capacity_mut());
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let node = match self.entry_id(directory, entry.file_name()) {
                Ok(node) => node,
                Err(Error::Os(Errno::NOENT | Errno::STALE)) => continue, // removed since it was read
                Err(error) => return Err(error),
            };
            let taken = take(DirEntry {
                node,
                kind: Kind::from_mode(entry.file_type().as_raw_mode()),
                name: entry.file_name().to_bytes().to_vec(),
                next: entry.next_entry_cookie(),
            });
            if !taken {
                break;
            }
        }
        Ok(())
    }

    /// `..` of the root is the root itself; nobody is to learn of what is above it.
    fn entry_id(&self, directory: &OwnedFd, name: &CStr) -> Result<NodeId> {
        let own = || Ok(self.public_id(handle::of(directory, c"")?));
        match name.to_bytes() {
            b"." => own(),
            b".." if own()? == NodeId::ROOT => Ok(NodeId::ROOT),
            _ => Ok(self.public_id(handle::of(directory, name)?)),
        }
    }

    /// How many inodes users may have, and how many more they can make.
    ///
    /// # Errors
    /// What fstatfs(2) answers.
    pub fn inodes(&self) -> Result<(u64, u64)> {
        let stat = calls::fstatfs(&self.mount)?;
        let (own, spare) = if self.is_bounded { (OWN_INODES, SPARE_INODES) } else { (0, 0) };
        Ok((stat.f_files.saturating_sub(own + spare), stat.f_ffree.saturating_sub(spare)))
    }

    /// Nodes without names that somebody still has open or mapped.
    pub fn orphan_count(&self) -> usize {
        self.orphaned().len()
    }

    /// Whether an inode of this id exists. A look-up that fails for want of memory or descriptors says nothing about that.
    ///
    /// # Errors
    /// What open_by_handle_at(2) answers.
    pub fn exists(&self, node: NodeId) -> Result<bool> {
        match self.path(node) {
            Err(Error::Os(Errno::STALE)) => Ok(false),
            found => found.map(|_| true),
        }
    }

    /// One of the paths of a node, below the root: the kernel's, of the name that it was found by last.
    ///
    /// # Errors
    /// What open_by_handle_at(2) and readlink(2) answer.
    pub fn path_of(&self, node: NodeId) -> Result<String> {
        let path = rustix::fs::readlink(fd_path(self.path(node)?.as_fd()), Vec::new())?;
        let path = path.to_string_lossy().into_owned();
        Ok(path.strip_prefix(&format!("{MOUNT_POINT}/{TREE}")).map(str::to_owned).unwrap_or(path))
    }
}

fn make_in(directory: &OwnedFd, name: &CStr, new: New<'_>) -> Result<(), Errno> {
    match new {
        New::Node(mode, device) => {
            let (kind, mode) = (FileType::from_raw_mode(mode), Mode::from_raw_mode(mode));
            calls::mknodat(directory, name, kind, mode, device)
        }
        New::Directory(mode) => calls::mkdirat(directory, name, Mode::from_raw_mode(mode)),
        New::Symlink(target) => calls::symlinkat(target, directory, name),
    }
}

/// tmpfs counts 1024 bytes of attributes, with their names and the memory that describes them, as an inode (mm/shmem.c,
/// BOGO_INODE_SIZE).
fn inodes_for_attribute(name: &OsStr, value: &[u8]) -> u64 {
    const DESCRIPTION: usize = 128;
    1 + (DESCRIPTION + name.len() + value.len()) as u64 / 1024
}

/// Whether a node is in the tree, and not the root itself. What has no name, and what only the daemon uses, is elsewhere.
fn is_below_root(fd: &OwnedFd) -> Result<bool> {
    let inside = format!("{MOUNT_POINT}/{TREE}/");
    match calls::readlinkat(CWD, fd_path(fd.as_fd()), Vec::new()) {
        Ok(path) => Ok(path.to_bytes().starts_with(inside.as_bytes())),
        Err(Errno::NAMETOOLONG) => Ok(true), // no path outside of the tree has more than some hundred bytes
        Err(errno) => Err(errno.into()),
    }
}

fn set_times_of(fd: &OwnedFd, accessed: Time, modified: Time) -> Result<()> {
    let times = Timestamps { last_access: to_timespec(accessed), last_modification: to_timespec(modified) };
    Ok(calls::utimensat(fd, c"", &times, AtFlags::EMPTY_PATH)?)
}

fn change_mode(fd: &OwnedFd, before: u32, mode: u32) -> Result<()> {
    if mode == before {
        return Ok(());
    }
    Ok(calls::chmodat(CWD, fd_path(fd.as_fd()), Mode::from_raw_mode(mode), AtFlags::empty())?)
}

/// To set the access ACL is a chmod(2), which drops set-group-id at the hands of somebody outside the group. The kernel left it
/// to us, who are root; it says whom it means only to those who speak FUSE_SETXATTR_EXT, which fuser does not.
fn drop_undue_set_group_id(fd: &OwnedFd, by: Member) -> Result<()> {
    let attributes = attributes_of(fd)?;
    let undue = attributes.mode & SET_GROUP_ID != 0 && !by.may_set_group_id(attributes.gid);
    change_mode(fd, attributes.mode, if undue { attributes.mode & !SET_GROUP_ID } else { attributes.mode })
}

fn open_directory_at(parent: impl AsFd, name: &str) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(calls::openat(parent, name, flags, Mode::empty())?)
}

fn refuse_non_empty(directory: &OwnedFd) -> Result<()> {
    for entry in calls::read_dir(directory)? {
        if !matches!(entry?.file_name().to_bytes(), b"." | b"..") {
            return Err(Error::Os(Errno::NOTEMPTY));
        }
    }
    Ok(())
}

fn kept(name: &str) -> String {
    format!("trusted.kept.{name}")
}

fn orphan_name(id: NodeId) -> String {
    id.to_string()
}

fn c_name(name: &OsStr) -> Result<CString> {
    CString::new(name.as_bytes()).map_err(|_| Error::Os(Errno::INVAL))
}

fn attributes_of(fd: &OwnedFd) -> Result<Attributes> {
    Ok(from_stat(NodeId::ROOT, &stat(fd)?))
}

/// Of an open file. The kernel looks no path up for that, and takes no memory (fs/stat.c, vfs_fstat).
fn stat(fd: &OwnedFd) -> Result<Stat> {
    Ok(rustix::fs::fstat(fd)?)
}

fn from_stat(node: NodeId, stat: &Stat) -> Attributes {
    Attributes {
        node,
        kind: Kind::from_mode(stat.st_mode),
        mode: stat.st_mode & 0o7777,
        links: stat.st_nlink as u32, // its type is the architecture's
        uid: stat.st_uid,
        gid: stat.st_gid,
        device: (major(stat.st_rdev), minor(stat.st_rdev)),
        size: stat.st_size as u64,
        blocks: stat.st_blocks as u64,
        provisional: false,
        accessed: from_timestamp(stat.st_atime, stat.st_atime_nsec as u32),
        modified: from_timestamp(stat.st_mtime, stat.st_mtime_nsec as u32),
        changed: from_timestamp(stat.st_ctime, stat.st_ctime_nsec as u32),
    }
}

fn from_timestamp(seconds: i64, nanoseconds: u32) -> SystemTime {
    let fraction = Duration::from_nanos(u64::from(nanoseconds));
    match u64::try_from(seconds) {
        Ok(seconds) => UNIX_EPOCH + Duration::from_secs(seconds) + fraction,
        Err(_) => UNIX_EPOCH - Duration::from_secs(seconds.unsigned_abs()) + fraction,
    }
}

fn to_timespec(time: Time) -> rustix::fs::Timespec {
    let special = |nanoseconds| rustix::fs::Timespec { tv_sec: 0, tv_nsec: nanoseconds };
    let time = match time {
        Time::Omit => return special(rustix::fs::UTIME_OMIT),
        Time::Now => return special(rustix::fs::UTIME_NOW),
        Time::At(time) => time,
    };
    match time.duration_since(UNIX_EPOCH) {
        Ok(since) => rustix::fs::Timespec {
            tv_sec: since.as_secs() as i64,
            tv_nsec: i64::from(since.subsec_nanos()) as _,
        },
        Err(before) => {
            let before = before.duration();
            let borrow = i64::from(before.subsec_nanos() > 0);
            rustix::fs::Timespec {
                tv_sec: 0_i64.saturating_sub_unsigned(before.as_secs()) - borrow,
                tv_nsec: (borrow * 1_000_000_000 - i64::from(before.subsec_nanos())) as _,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_the_epoch_survive_the_way_to_the_kernel_and_back() {
        for (seconds, nanoseconds) in [
            (-1, 0),
            (-1, 999_999_999),
            (-5, 250),
            (0, 1),
            (7, 0),
            (i64::MIN, 0),
            (i64::MIN, 1),
            (i64::MAX, 7),
        ] {
            let timespec = to_timespec(Time::At(from_timestamp(seconds, nanoseconds)));
            assert_eq!((timespec.tv_sec, timespec.tv_nsec as u32), (seconds, nanoseconds));
        }
    }
}
