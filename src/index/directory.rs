//! readdir(3).

use super::{Index, Kind};
use crate::error::{Error, Result};
use crate::sys::handle;
use crate::units::InodeId;
use rustix::fs::{OFlags, SeekFrom};
use rustix::io::Errno;
use std::ffi::CStr;
use std::os::fd::OwnedFd;

/// One directory entry.
#[derive(Clone, Debug)]
pub struct DirEntry {
    /// The node's id.
    pub node: InodeId,
    /// Its file type.
    pub kind: Kind,
    /// Its name.
    pub name: Vec<u8>,
    /// The place to go on reading behind this entry; stable while the directory changes (tmpfs,
    /// Linux 6.6).
    pub next: u64,
}

impl Index {
    /// Opens a directory for reading.
    ///
    /// # Errors
    /// The errors of open(2).
    pub fn open_directory(&self, node: InodeId) -> Result<OwnedFd> {
        self.open(node, OFlags::RDONLY | OFlags::DIRECTORY)
    }

    /// Reads a directory from the place `from` on (0, or an entry's [`DirEntry::next`]) for as long
    /// as `take` answers true. An entry that `take` refuses is read again the next time.
    ///
    /// # Errors
    /// The errors of getdents(2).
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
                // Removed since it was read.
                Err(Error::Os(Errno::NOENT | Errno::STALE)) => continue,
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

    /// `..` of the root is the root itself: users must not see the directories above it.
    fn entry_id(&self, directory: &OwnedFd, name: &CStr) -> Result<InodeId> {
        let own = || Ok(self.public_id(handle::of(directory, c"")?));
        match name.to_bytes() {
            b"." => own(),
            b".." if own()? == InodeId::ROOT => Ok(InodeId::ROOT),
            _ => Ok(self.public_id(handle::of(directory, name)?)),
        }
    }
}
