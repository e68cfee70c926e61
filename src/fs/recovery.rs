//! The filesystem as another process has left it.

use super::unavailable::Extent;
use super::{Fs, OBJECTS, Pace, Repaired};
use crate::error::{Error, Result};
use crate::index::Index;
use crate::options::Options;
use crate::pool::Pool;
use crate::units::{NodeId, Range};
use crossbeam::channel::Sender;
use std::collections::HashSet;

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
                fs.adopt(node).or_else(|error| fs.set_aside(node, &error))?;
            }
        }
        fs.balance()?;
        for node in fs.index.orphans() {
            fs.note_orphan(Some(node), &Pace::steady());
        }
        fs.dismantle_stranded_or_warn();
        // What was reported to an agent that has died with its worker is not known any more.
        for object in fs.all_objects() {
            let size = object.read_lock().sealed().size();
            fs.report_repaired(object, Range::new(0, size));
        }
        Ok(fs)
    }

    /// Takes an object in; one that belongs to no file is to be dismantled.
    fn adopt(&self, node: NodeId) -> Result<()> {
        match self.open_object(node)? {
            None => {}
            Some(object) if self.index.exists(node)? => drop(self.objects().insert(node, object)),
            Some(object) => self.stranded().push(object),
        }
        Ok(())
    }

    /// Completes the pool's account by what the files have; then they can be settled. One that cannot be is set aside.
    fn balance(&self) -> Result<()> {
        let (mut pages, mut bytes) = self.extent_of_unavailable();
        let objects = self.objects_and_stranded();
        for object in &objects {
            let has = Extent::of(&object.read_lock());
            (pages, bytes) = (pages + has.pages, bytes + has.bytes);
        }
        self.pool.adopt(pages, bytes)?;
        for object in objects {
            if let Err(error) = object.settle(&self.pool) {
                self.set_object_aside(&object, &error);
            }
        }
        Ok(())
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
