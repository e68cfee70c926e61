//! The filesystem as another process has left it.

use super::{Fs, OBJECTS, Object, Pace, Repaired};
use crate::error::{Error, Result};
use crate::index::Index;
use crate::options::Options;
use crate::pool::{Holding, Pool};
use crate::sealed::{Reach, Sealed};
use crate::units::{FOLIO_SIZE, NodeId, Range};
use crossbeam::channel::Sender;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use std::collections::HashSet;
use std::sync::Arc;

impl Fs {
    /// What is there, with everything that was half done finished or undone. As for [`Fs::create`] otherwise.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for what this version does not know; what the kernel answers.
    pub fn open(options: &Options, repaired: Option<Sender<Repaired>>) -> Result<Self> {
        let index = Index::reopen(options)?;
        let pool = Pool::open(options.page_size)?;
        let fs = Self::on(options, index, pool, repaired)?;
        for entry in std::fs::read_dir(OBJECTS)? {
            let name = entry?.file_name();
            if let Some(node) = name.to_str().and_then(NodeId::parse) {
                fs.adopt(node).map_err(|error| Error::Corrupt(format!("file {node}: {error}")))?;
            }
        }
        fs.balance()?;
        for node in fs.index.orphans() {
            fs.note_orphan(Some(node), &Pace::steady());
        }
        fs.dismantle_stranded();
        // What was reported to an agent that has died with its worker is not known any more.
        for object in fs.all_objects() {
            let size = object.read_lock().sealed().size();
            fs.report_repaired(object, Range::new(0, size));
        }
        Ok(fs)
    }

    /// Takes an object in; one that belongs to no file is to be dismantled.
    fn adopt(&self, node: NodeId) -> Result<()> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let mount = rustix::fs::openat(CWD, format!("{OBJECTS}/{node}"), flags, Mode::empty())?;
        if rustix::fs::accessat(&mount, "ledger", rustix::fs::Access::EXISTS, rustix::fs::AtFlags::empty())
            == Err(Errno::NOENT)
        {
            return Ok(rustix::fs::rmdir(format!("{OBJECTS}/{node}"))?); // only the place for one
        }
        let holding = Holding::open(self.pool.page_size(), Sealed::open(Reach::Programs, mount)?)?;
        let object = Arc::new(Object::new(node, holding));
        object.recall_natives()?;
        if self.index.exists(node) {
            self.objects().insert(node, object);
        } else {
            self.stranded().push(object);
        }
        Ok(())
    }

    /// Completes the pool's account by what the files have; then they can be settled.
    fn balance(&self) -> Result<()> {
        let (mut pages, mut bytes) = (0, 0);
        for object in self.all_objects().iter().chain(self.stranded().iter()) {
            let holding = object.read_lock();
            pages += holding.pages();
            bytes += holding.sealed().folio_count() * FOLIO_SIZE;
        }
        self.pool.adopt(pages, bytes)?;
        self.all_objects()
            .iter()
            .chain(self.stranded().iter())
            .try_for_each(|object| object.settle(&self.pool))
    }

    /// The numbers that files are known by to the kernel ([`Object::backing`]).
    ///
    /// # Errors
    /// [`Error::Corrupt`] where there is a file whose number is not known; what getxattr(2) answers.
    pub fn backings(&self) -> Result<HashSet<u32>> {
        let (objects, stranded) = (self.all_objects(), self.stranded().len());
        let places = std::fs::read_dir(OBJECTS)?.count();
        if places > objects.len() + stranded {
            return Err(Error::Corrupt(format!(
                "{places} files, of which {} could be opened",
                objects.len()
            )));
        }
        objects.iter().filter_map(|object| object.backing().transpose()).collect()
    }

    /// The nodes without names. The kernel tells once that it has given one up, and may have told a worker that has died.
    pub fn orphans(&self) -> Vec<NodeId> {
        self.index.orphans()
    }

    /// Has those look again who poll open files, as far as another worker was told of them; by the kernel's handles.
    ///
    /// # Errors
    /// What getxattr(2) and removexattr(2) answer.
    pub fn wake_pollers(&self, wake: impl Fn(u64)) -> Result<()> {
        self.all_objects().iter().try_for_each(|object| object.wake_noted_pollers(&wake))
    }
}
