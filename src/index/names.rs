//! Names: mknod(2), mkdir(2), symlink(2), link(2), unlink(2), rmdir(2) and rename(2).

use super::inode::stat_of;
use super::orphans::orphan_name;
use super::{Attributes, Index, Kind, c_name};
use crate::error::{Error, Result};
use crate::steps::{self, Step};
use crate::sys::calls;
use crate::sys::identity::{Caller, acting_as};
use crate::units::InodeId;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use std::ffi::{CStr, OsStr};
use std::os::fd::OwnedFd;
use std::sync::MutexGuard;

/// The node that a new directory entry stands for.
#[derive(Clone, Copy, Debug)]
pub enum New<'a> {
    /// A regular file, FIFO, socket or device: file type and mode bits, device number as in
    /// `makedev(3)`.
    Node(u32, u64),
    /// A directory with these mode bits.
    Directory(u32),
    /// A symbolic link to there.
    Symlink(&'a CStr),
}

/// A name in a directory.
#[derive(Clone, Copy, Debug)]
pub struct Name<'a> {
    /// The directory.
    pub parent: InodeId,
    /// The name: one component of a path.
    pub name: &'a OsStr,
}

/// A name in an open directory.
#[derive(Clone, Copy)]
struct Place<'a> {
    directory: &'a OwnedFd,
    name: &'a CStr,
}

impl Index {
    /// Makes an entry and looks it up. The entry belongs to `caller` from the first moment on. A
    /// file or directory inherits the placement of its directory.
    ///
    /// # Errors
    /// EEXIST, EDQUOT, ENOSPC: the errors of the system call.
    pub fn make(
        &self,
        parent: InodeId,
        name: &OsStr,
        new: New<'_>,
        caller: Caller,
    ) -> Result<Attributes> {
        let directory = self.path(parent)?;
        let name = c_name(name)?;
        self.taking(1, || acting_as(caller, || Ok(make_in(&directory, &name, new)?)))?;
        steps::reached(Step::CreateNamed);
        self.endow(&directory, &name, new)
    }

    /// Finishes an [`Index::make`] of a worker that died after the entry had its name.
    ///
    /// # Errors
    /// The errors of [`Index::make`].
    pub fn finish_making(&self, parent: InodeId, name: &OsStr, new: New<'_>) -> Result<Attributes> {
        self.endow(&self.path(parent)?, &c_name(name)?, new)
    }

    /// Has an entry inherit that no program has seen yet, and looks it up. A refused call leaves no
    /// entry.
    fn endow(&self, directory: &OwnedFd, name: &CStr, new: New<'_>) -> Result<Attributes> {
        let endowed = || {
            let inode = self.inode(self.id_of(directory, name)?)?;
            let attributes = self.attributes_of(&inode)?;
            if matches!(attributes.kind, Kind::File | Kind::Directory) {
                self.inherit(directory, &inode.fd)?;
            }
            Ok(attributes)
        };
        endowed().inspect_err(|_| {
            let kind =
                if let New::Directory(_) = new { AtFlags::REMOVEDIR } else { AtFlags::empty() };
            let _ = calls::unlinkat(directory, name, kind);
        })
    }

    /// Gives a node one more name, and looks it up.
    ///
    /// # Errors
    /// The errors of linkat(2).
    pub fn link(&self, node: InodeId, parent: InodeId, name: &OsStr) -> Result<Attributes> {
        let directory = self.path(parent)?;
        let name = c_name(name)?;
        let _unlinking = self.unlinking();
        if self.is_orphan(node) {
            return Err(Error::Os(Errno::NOENT)); // link(2) of an open file without a name
        }
        let inode = self.inode(node)?;
        let link = || Ok(calls::linkat(&inode.fd, c"", &directory, &*name, AtFlags::EMPTY_PATH)?);
        self.taking(1, link)?;
        self.attributes_of(&inode)
    }

    /// Removes a name that does not stand for a directory. Returns the node if that was its last
    /// name.
    ///
    /// # Errors
    /// The errors of unlinkat(2).
    pub fn unlink(&self, parent: InodeId, name: &OsStr) -> Result<Option<InodeId>> {
        let directory = self.path(parent)?;
        let name = c_name(name)?;
        let _unlinking = self.unlinking();
        let id = self.id_of(&directory, &name)?;
        let orphan = self.is_last_name(&self.path(id)?)?.then_some(id);
        match orphan {
            Some(id) => self.move_away(&directory, &name, id)?,
            None => {
                calls::unlinkat(&directory, &*name, AtFlags::empty())?;
                steps::reached(Step::UnlinkRemoved);
            }
        }
        Ok(orphan)
    }

    /// Removes an empty directory by moving it away. A program that has the directory open, or as
    /// its working directory, keeps it. The kernel holds the directory locked, so no entry can be
    /// added meanwhile.
    ///
    /// # Errors
    /// ENOTEMPTY, and what renameat(2) answers.
    pub fn remove_directory(&self, parent: InodeId, name: &OsStr) -> Result<()> {
        let directory = self.path(parent)?;
        let name = c_name(name)?;
        let _unlinking = self.unlinking();
        self.move_directory_away(&directory, &name).map(drop)
    }

    /// Gives an entry another name or place, or exchanges two. Returns the node that lost its last
    /// name by this, if that node is not a directory.
    ///
    /// # Errors
    /// The errors of renameat2(2).
    pub fn rename(
        &self,
        from: Name<'_>,
        to: Name<'_>,
        flags: RenameFlags,
    ) -> Result<Option<InodeId>> {
        let (source, target) = (self.path(from.parent)?, self.path(to.parent)?);
        let (old, new) = (c_name(from.name)?, c_name(to.name)?);
        let _unlinking = self.unlinking();
        let replaced = match self.id_if_there(&target, &new)? {
            Some(id) if flags.is_empty() && id != self.id_of(&source, &old)? => Some(id),
            _ => None,
        };
        let kind = replaced.map(|id| stat_of(&self.path(id)?)).transpose()?.map(|found| found.kind);
        if kind == Some(Kind::Directory) {
            return self.rename_over_directory(
                Place { directory: &source, name: &old },
                Place { directory: &target, name: &new },
            );
        }
        let orphan = if replaced.is_some() { self.orphan_if_last(&target, &new)? } else { None };
        let renamed = calls::renameat_with(&source, &*old, &target, &*new, flags);
        steps::reached(Step::UnlinkRemoved);
        self.settle(orphan, renamed)
    }

    /// Moves the replaced directory away first: a program that has it open keeps it. The kernel
    /// holds both parents locked, so no program sees the name missing.
    fn rename_over_directory(&self, from: Place<'_>, to: Place<'_>) -> Result<Option<InodeId>> {
        const TO_NOTHING: RenameFlags = RenameFlags::NOREPLACE;
        let moving = self.path(self.id_of(from.directory, from.name)?)?;
        if stat_of(&moving)?.kind != Kind::Directory {
            return Err(Error::Os(Errno::ISDIR));
        }
        let replaced = self.move_directory_away(to.directory, to.name)?;
        if let Err(errno) =
            calls::renameat_with(from.directory, from.name, to.directory, to.name, TO_NOTHING)
        {
            let orphan = orphan_name(replaced);
            calls::renameat_with(&self.orphans, orphan, to.directory, to.name, TO_NOTHING)?;
            self.orphaned().remove(&replaced);
            return Err(errno.into());
        }
        Ok(None)
    }

    fn unlinking(&self) -> MutexGuard<'_, ()> {
        self.unlinking.lock().expect("no panic while unlinking")
    }

    /// True if the node has one name only and is not a directory.
    fn is_last_name(&self, node: &OwnedFd) -> Result<bool> {
        let attributes = stat_of(node)?;
        Ok(attributes.links == 1 && attributes.kind != Kind::Directory)
    }

    /// Makes an orphan of `id`. `name` is its last name.
    fn move_away(&self, directory: &OwnedFd, name: &CStr, id: InodeId) -> Result<()> {
        calls::renameat(directory, name, &self.orphans, orphan_name(id))?;
        steps::reached(Step::UnlinkRemoved);
        self.orphaned().insert(id);
        Ok(())
    }

    fn move_directory_away(&self, parent: &OwnedFd, name: &CStr) -> Result<InodeId> {
        let id = self.id_of(parent, name)?;
        refuse_non_empty(&self.open(id, OFlags::RDONLY | OFlags::DIRECTORY)?)?;
        self.move_away(parent, name, id)?;
        Ok(id)
    }

    /// Links the node of `name` into `.orphans` if `name` is its only name, before another node
    /// takes the name.
    fn orphan_if_last(&self, directory: &OwnedFd, name: &CStr) -> Result<Option<InodeId>> {
        let id = self.id_of(directory, name)?;
        let node = self.path(id)?;
        if !self.is_last_name(&node)? {
            return Ok(None);
        }
        calls::linkat(&node, c"", &self.orphans, orphan_name(id), AtFlags::EMPTY_PATH)?;
        steps::reached(Step::UnlinkOrphaned);
        Ok(Some(id))
    }

    /// Counts the orphan as one if its name is gone, and removes it from `.orphans` if not.
    fn settle(
        &self,
        orphan: Option<InodeId>,
        removed: Result<(), Errno>,
    ) -> Result<Option<InodeId>> {
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

fn refuse_non_empty(directory: &OwnedFd) -> Result<()> {
    for entry in calls::read_dir(directory)? {
        if !matches!(entry?.file_name().to_bytes(), b"." | b"..") {
            return Err(Error::Os(Errno::NOTEMPTY));
        }
    }
    Ok(())
}
