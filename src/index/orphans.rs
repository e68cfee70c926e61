//! Orphans: inodes without a name that the kernel still refers to.

use super::inode::stat_of;
use super::{Index, Kind};
use crate::error::{Error, Result};
use crate::steps::insist;
use crate::sys::calls;
use crate::units::InodeId;
use rustix::fs::AtFlags;
use rustix::io::Errno;
use std::collections::HashSet;
use std::sync::MutexGuard;

impl Index {
    /// Reads `.orphans`. An inode that still has another name is not an orphan: the last worker
    /// died between the two steps of a rename, so its link in `.orphans` is removed.
    pub(super) fn recover_orphans(&self) -> Result<()> {
        for id in self.listed_orphans()? {
            let found = stat_of(&self.path(id)?)?;
            if found.kind != Kind::Directory && found.links > 1 {
                calls::unlinkat(&self.orphans, orphan_name(id), AtFlags::empty())?;
            } else {
                self.orphaned().insert(id);
            }
        }
        Ok(())
    }

    fn listed_orphans(&self) -> Result<Vec<InodeId>> {
        let mut orphans = Vec::new();
        for entry in calls::read_dir(&self.orphans)? {
            let name = entry?.file_name().to_owned();
            orphans.extend(name.to_str().ok().and_then(InodeId::parse));
        }
        Ok(orphans)
    }

    pub(super) fn orphaned(&self) -> MutexGuard<'_, HashSet<InodeId>> {
        self.orphaned.lock().expect("no panic while the set is open")
    }

    /// True if `node` has no name, so that only references of the kernel keep it.
    pub fn is_orphan(&self, node: InodeId) -> bool {
        self.orphaned().contains(&node)
    }

    /// The orphans at this moment.
    pub fn orphans(&self) -> Vec<InodeId> {
        self.orphaned().iter().copied().collect()
    }

    /// Number of orphans: programs still have them open or mapped.
    pub fn orphan_count(&self) -> usize {
        self.orphaned().len()
    }

    /// Removes an orphan. The kernel must not know the node any more: then no program can reach it.
    ///
    /// # Errors
    /// The errors of unlinkat(2). A shortage is not among them: no later request would try again,
    /// so the call is repeated ([`insist`]).
    pub fn erase(&self, node: InodeId) -> Result<()> {
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
}

pub(super) fn orphan_name(id: InodeId) -> String {
    id.to_string()
}
