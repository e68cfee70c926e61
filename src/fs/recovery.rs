//! The start of a new worker: it opens the filesystem that another process has left, and finishes
//! or undoes each change that was under way.
//!
//! The order matters:
//!
//! 1. The worker opens each object at its place. An object whose node is gone becomes stranded. A
//!    file that cannot be opened is set aside (`unavailable`), and the worker goes on.
//! 2. It completes the pool's account with the pages and bytes of all these files.
//! 3. It settles each file. This needs the account, because it moves pages and memory between the
//!    file and the pool.
//! 4. It counts the pages of orphans and of stranded objects, and reports all files to the agent
//!    that collapses folios.
//!
//! The patrol dismantles stranded objects when the worker serves ([`Fs::retry_what_waits`]): the
//! memory of a large file takes a while, and no program waits for that.

use super::{Fs, OBJECTS, Repaired};
use crate::error::{Error, Result};
use crate::index::Index;
use crate::options::Options;
use crate::pool::Pool;
use crate::units::{InodeId, Range};
use crossbeam::channel::Sender;
use std::collections::HashSet;

impl Fs {
    /// Opens the existing filesystem, and finishes or undoes all changes that are half done.
    /// Reports to `repaired` as [`Fs::create`].
    ///
    /// # Errors
    /// [`Error::Corrupt`] for stored data that this version does not know; the errors of the system
    /// calls.
    pub fn open(options: &Options, repaired: Option<Sender<Repaired>>) -> Result<Self> {
        let index = Index::reopen(options)?;
        let pool = Pool::open(options.page_size, options.nodes.is_some())?;
        let fs = Self::on(options, index, pool, repaired)?;
        for entry in std::fs::read_dir(OBJECTS)? {
            let name = entry?.file_name();
            if let Some(node) = name.to_str().and_then(InodeId::parse) {
                fs.adopt(node).or_else(|error| fs.set_aside(node, &error))?;
            }
        }
        fs.balance()?;
        fs.index.orphans().into_iter().for_each(|node| fs.note_orphan(Some(node)));
        fs.stranded().iter().for_each(|object| object.note_orphaned());
        fs.note_lent();
        // The agent has died with its worker, and its list of folios with it. So all folios are
        // reported.
        for object in fs.all_objects() {
            let size = object.read_lock().sealed().size();
            fs.report_repaired(object, Range::new(0, size));
        }
        Ok(fs)
    }

    /// Takes an existing object in. An object that belongs to no file becomes stranded, and is
    /// dismantled later.
    fn adopt(&self, node: InodeId) -> Result<()> {
        match self.open_object(node)? {
            None => {}
            Some(object) if self.index.exists(node)? => drop(self.objects().insert(node, object)),
            Some(object) => self.stranded().push(object),
        }
        Ok(())
    }

    /// Completes the pool's account with the pages and bytes of all files, and then settles the
    /// files. A file that cannot be settled is set aside.
    fn balance(&self) -> Result<()> {
        let mut adoption = self.pool.begin_adoption();
        let objects = self.objects_and_stranded();
        objects.iter().for_each(|object| object.join(&mut adoption));
        self.charge_unavailable(&mut adoption);
        self.pool.adopt(adoption)?;
        for object in objects {
            if let Err(error) = object.settle(&self.pool) {
                self.set_object_aside(&object, &error);
            }
        }
        Ok(())
    }

    /// The backing numbers of all files ([`Object::backing`](super::Object::backing)).
    ///
    /// # Errors
    /// [`Error::Corrupt`] if a file could not be opened, because its number is not known then; the
    /// errors of getxattr(2).
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

    /// The nodes without a name. The kernel tells only once that it has given up a node, and may
    /// have told a worker that has died.
    pub fn orphans(&self) -> Vec<InodeId> {
        self.index.orphans()
    }

    /// Calls `wake` with each handle of the kernel's that another worker noted, so that the
    /// programs which poll these open files look again.
    ///
    /// # Errors
    /// The errors of getxattr(2) and removexattr(2).
    pub fn wake_pollers(&self, wake: impl Fn(u64)) -> Result<()> {
        self.all_objects().iter().try_for_each(|object| object.wake_noted_pollers(&wake))
    }
}
