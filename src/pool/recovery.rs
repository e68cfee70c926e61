//! A pool that outlives the process that filled it.

use super::{Account, Pool, Reserve};
use crate::error::{Error, Result};
use crate::sealed::{Reach, Sealed};
use crate::sys::calls;
use crate::units::{FOLIO_SIZE, NumaNode, PageSize};
use rustix::fs::{CWD, Mode, OFlags, XattrFlags};

/// The directory in the daemon's namespace below which the reserves are mounted. The name of each
/// is the number of its NUMA node.
pub const RESERVES: &str = "/reserve";

/// Attributes of that directory, decimal: pages of the pool, and bytes that were in folios at the
/// mount.
const PAGES: &str = "trusted.pages";
const HUGE_AT_MOUNT: &str = "trusted.huge_at_mount";

impl Pool {
    /// Mounts the reserves, so that another process finds the pool when this process is gone.
    ///
    /// # Errors
    /// The errors of mkdir(2), move_mount(2) and setxattr(2).
    pub fn attach(&mut self) -> Result<()> {
        self.outlives_us = true;
        for reserve in &self.reserves {
            let path = reserve.path();
            calls::mkdir(&path, Mode::from_raw_mode(0o700))?;
            reserve.lock().attach(&path)?;
        }
        note(HUGE_AT_MOUNT, self.huge_at_mount)?;
        self.note_size(self.balance().total)
    }

    /// Notes the intended size of the pool.
    pub(super) fn note_size(&self, pages: u64) -> Result<()> {
        if self.outlives_us { note(PAGES, pages) } else { Ok(()) }
    }

    /// The pool that another process has attached. Its account is empty until [`Pool::adopt`].
    ///
    /// # Errors
    /// Those of [`Sealed::open`].
    pub fn open(page_size: PageSize) -> Result<Self> {
        let (total, huge_at_mount) = (noted(PAGES)?, noted(HUGE_AT_MOUNT)?);
        let mut reserves = Vec::new();
        for entry in std::fs::read_dir(RESERVES)? {
            let node = entry?.file_name().to_str().and_then(NumaNode::parse);
            let node = node.ok_or_else(|| Error::Corrupt("a reserve that is no node's".into()))?;
            reserves.push(Reserve::open(node)?);
        }
        reserves.sort_by_key(|reserve| reserve.node);
        let account = Account { total, reserved: total, ..Account::default() };
        Ok(Self { outlives_us: true, huge_at_mount, ..Self::on(page_size, reserves, account) })
    }

    /// Makes the account that of a pool that was just opened, before [`Pool::adopt`].
    #[cfg(test)]
    pub(super) fn forget_account(&self) {
        let mut account = self.account();
        *account = Account { total: account.total, reserved: account.total, ..Account::default() };
    }

    /// Completes the account: all files together have `pages` pages, and `bytes` of memory. Memory
    /// beyond P1 goes back to the machine. Memory that P1 lacks is short: it was moving, or a
    /// program took it out of its file.
    ///
    /// # Errors
    /// [`Error::Corrupt`] where files have more pages than the pool.
    pub fn adopt(&self, pages: u64, bytes: u64) -> Result<()> {
        let total = self.balance().total;
        let free = total.checked_sub(pages);
        let free =
            free.ok_or_else(|| Error::Corrupt(format!("files have {pages} of {total} pages")))?;
        let reserves: u64 =
            self.reserves.iter().map(|reserve| reserve.lock().folio_count() * FOLIO_SIZE).sum();
        let (has, meant) = (reserves + bytes, self.bytes_of(total));
        self.cut_reserves(has.saturating_sub(meant)).1?;
        {
            let mut account = self.account();
            (account.reserved, account.free) = (0, free);
            account.set_short(meant.saturating_sub(has), self.page_size.bytes());
        }
        self.refill();
        match self.balance().missing {
            0 => {}
            pages => log::warn!(
                "memory for {pages} pages is missing; it is taken again when there is some"
            ),
        }
        Ok(())
    }
}

impl Pool {
    /// Corrects the account of one file. [`Pool::adopt`] counted `counted` pages and bytes for it,
    /// and the file has `has`.
    ///
    /// # Errors
    /// [`Error::Full`] where the file has more pages than were counted, and the pool has no free
    /// ones; nothing has changed.
    pub fn correct(&self, counted: (u64, u64), has: (u64, u64)) -> Result<()> {
        match has.0.checked_sub(counted.0) {
            Some(more) => self.reserve(more)?.hand_over(more as i64),
            None => self.release(counted.0 - has.0),
        }
        let surplus = {
            let mut account = self.account();
            let lacking = account.short + counted.1;
            account.set_short(lacking.saturating_sub(has.1), self.page_size.bytes());
            has.1.saturating_sub(lacking)
        };
        self.give_surplus(surplus);
        Ok(())
    }
}

impl Reserve {
    fn path(&self) -> String {
        format!("{RESERVES}/{}", self.node)
    }

    fn open(node: NumaNode) -> Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let mount = calls::openat(CWD, format!("{RESERVES}/{node}"), flags, Mode::empty())?;
        let mut sealed = Sealed::open(Reach::Private, mount)?;
        sealed.resume(std::iter::empty())?;
        Ok(Self::new(node, sealed))
    }
}

fn note(name: &str, value: u64) -> Result<()> {
    Ok(calls::setxattr(RESERVES, name, value.to_string().as_bytes(), XattrFlags::empty())?)
}

fn noted(name: &str) -> Result<u64> {
    let mut text = [0; 20]; // a u64 has 20 digits at most
    let length = calls::getxattr(RESERVES, name, &mut text[..])?;
    let number = std::str::from_utf8(&text[..length]).ok().and_then(|text| text.parse().ok());
    number.ok_or_else(|| Error::Corrupt(format!("{RESERVES}: {name}")))
}

/// Memory goes back as it came, step by step between file and reserve. The machine gives no more
/// than a step.
#[cfg(test)]
mod tests {
    use super::super::Holding;
    use super::*;
    use crate::units::Range;

    const SIZE: u64 = 3 * FOLIO_SIZE;

    /// A pool of eight pages, and a file with three of these.
    fn three_of_eight() -> (Pool, Holding) {
        let pool = Pool::fill(PageSize::Huge, 8, |_| Ok(())).expect("root takes 16 MiB");
        let mut holding = Holding::create(PageSize::Huge).unwrap();
        let growth = holding.begin_growth(&pool, Range::new(0, 0), SIZE).unwrap();
        holding.complete(growth).unwrap();
        (pool, holding)
    }

    /// The holding as the next process opens it. No memory goes to the machine or comes from there
    /// on the way.
    fn come_back(pool: &Pool, holding: &Holding) -> Holding {
        let reserves = pool.reserves();
        let mount = holding.sealed().mount().unwrap();
        let sealed = Sealed::open(Reach::Programs, mount).unwrap();
        let mut again = Holding::open(PageSize::Huge, sealed).unwrap();
        pool.forget_account();
        pool.adopt(again.pages(), again.sealed().folio_count() * FOLIO_SIZE).unwrap();
        assert_eq!(pool.reserves(), reserves);
        let settling = again.begin_settling(pool);
        again.complete(settling).unwrap();
        assert_eq!(pool.check(again.held()), Vec::<String>::new());
        assert_eq!((again.held().pages, again.held().bytes), (3, SIZE));
        assert_eq!(again.sealed().check().unwrap(), Vec::<String>::new());
        assert_eq!(again.check().unwrap(), Vec::<String>::new());
        assert_eq!((again.sealed().size(), again.sealed().header().undo_size), (SIZE, None));
        again
    }

    #[test]
    fn a_growth_that_has_moved_memory_gives_it_back_to_the_reserve() {
        let (pool, mut holding) = three_of_eight();
        holding.sealed_mut().update(|header| header.undo_size = Some(SIZE)).unwrap();
        pool.move_piece_out(holding.sealed_mut(), Range::new(SIZE, 2 * SIZE), 2 * SIZE).unwrap();
        come_back(&pool, &holding);
    }
}
