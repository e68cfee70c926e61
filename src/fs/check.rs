//! The check: verifies the invariants of a pool in use, file by file.

use super::ready::Ready;
use super::{Fs, Object, Pace};
use crate::error::{Error, Result};
use crate::units::InodeId;
use std::collections::HashSet;
use std::sync::Arc;

impl Fs {
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
            if !Ready::is_number(object.node())
                && !self.index.exists(object.node())?
                && self.known_object(object.node()).is_some()
            {
                wrong.push(format!("P2: object {} belongs to no file", object.node()));
            }
        }
        wrong.extend(self.pool.check_reserves()?);
        wrong.extend(self.check_account()?);
        Ok(wrong)
    }

    pub(super) fn objects_and_stranded(&self) -> Vec<Arc<Object>> {
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
                let held = held.chain([self.held_by_unavailable()]).sum();
                return Ok(self.pool.check(&held));
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
