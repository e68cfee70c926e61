//! The memory targets of the pool: the machine's, with the pool's bytes on each.
//!
//! The daemon reads the machine's when a program asks for the first time, and again when a program
//! asks after a resize, as more memory for the pool can be more memory of the machine. So a program
//! that asks over and over costs no more than the text.

use super::{Fs, Pace};
use crate::error::Result;
use crate::pool::Account;
use crate::targets::{self, Share, Target};
use parking_lot::RwLock;
use std::sync::Arc;

/// The machine's targets, as they were when they were last read. None if they are to be read.
#[derive(Debug, Default)]
pub struct Targets(RwLock<Option<Arc<[Target]>>>);

impl Targets {
    /// The targets, ascending by node. One thread reads them, and the others wait for it.
    ///
    /// # Errors
    /// [`crate::error::Error::TakesLong`] if they are to be read, on a thread for which other
    /// requests wait; the errors of [`targets::read`].
    pub fn get(&self, pace: &Pace) -> Result<Arc<[Target]>> {
        let known = pace.lock(|| self.0.read(), || self.0.try_read())?.clone();
        if let Some(known) = known {
            return Ok(known);
        }
        pace.refuse_if(|| Ok(true))?;
        let mut known = self.0.write();
        if let Some(known) = &*known {
            return Ok(known.clone());
        }
        let read: Arc<[Target]> = targets::read()?.into();
        Ok(known.insert(read).clone())
    }

    /// Has the next [`Targets::get`] read the targets anew.
    pub fn forget(&self) {
        *self.0.write() = None;
    }
}

impl Fs {
    /// The text of the attribute: a line for each node that the pool has pages of.
    pub(super) fn targets_text(&self, pace: &Pace) -> Result<String> {
        let machine = self.targets.get(pace)?;
        let (accounts, page) = (self.pool.balances(), self.pool.page_size().bytes());
        let line = |target: &Target| {
            let is_its = |(node, part): &(_, &Account)| *node == target.node && part.total > 0;
            let (_, account) = accounts.iter().find(is_its)?;
            let share = Share { bytes: account.total * page, free: account.available() * page };
            Some(targets::format(target, share) + "\n")
        };
        Ok(machine.iter().filter_map(line).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::super::RequestContext;
    use super::*;
    use crate::error::Error;

    fn on_a_thread_that_serves() -> Pace {
        Pace::of(RequestContext {
            unique: 1,
            resent: false,
            user: 0,
            thread: 0,
            unprivileged: false,
            brief: true,
        })
    }

    #[test]
    fn targets_are_read_again_only_after_a_resize() {
        let targets = Targets::default();
        let serving = on_a_thread_that_serves();
        assert!(matches!(targets.get(&serving), Err(Error::TakesLong)));
        let first = targets.get(&Pace::steady()).unwrap();
        for pace in [&serving, &Pace::steady()] {
            assert!(Arc::ptr_eq(&first, &targets.get(pace).unwrap()));
        }
        targets.forget();
        assert!(matches!(targets.get(&serving), Err(Error::TakesLong)));
        assert!(!Arc::ptr_eq(&first, &targets.get(&Pace::steady()).unwrap()));
    }
}
