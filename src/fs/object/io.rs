//! read(2) and write(2).

use super::sizes::checked_range;
use super::{Context, Object, Pace, carry_out, mend, mend_but_gaps, placement_now, takes_long};
use crate::error::{Error, Result};
use crate::pool::Holding;
use crate::sealed::Content;
use crate::steps::insist;
use crate::sys::mapping::View;
use crate::sys::tmpfs;
use crate::units::{Range, Subpage};
use parking_lot::RwLockReadGuard;
use std::sync::Arc;

impl Object {
    /// Reads at `offset` up to the end of the file or the first quarantined subpage.
    ///
    /// # Errors
    /// [`Error::Quarantined`] if the first byte is quarantined.
    pub fn read(&self, buffer: &mut [u8], offset: u64, pace: &Pace) -> Result<usize> {
        let holding = self.shut_share(pace)?;
        let end = offset.saturating_add(buffer.len() as u64).min(holding.size());
        let range = Range::new(offset, end);
        if range.is_empty() {
            return Ok(0);
        }
        let good = good_prefix(&holding, range)?;
        tmpfs::read_at(&self.data, &mut buffer[..good as usize], offset)
    }

    /// The bytes that [`Object::read`] would read of up to `length` bytes, without a copy. None if
    /// a copy is better: for few bytes, around quarantined subpages, and if a touch would take
    /// memory.
    ///
    /// # Errors
    /// The errors of mmap(2) and fstatfs(2).
    pub fn view(&self, offset: u64, length: u64, pace: &Pace) -> Result<Option<Viewed<'_>>> {
        // For fewer bytes, a copy costs less than a walk of the page tables.
        const LEAST: u64 = 64 << 10;
        let holding = self.shut_share(pace)?;
        let sealed = holding.sealed();
        let range =
            Range::new(offset, offset.saturating_add(length).min(holding.size()).max(offset));
        let is_whole = range.len() >= LEAST
            && holding.has_pages(range)
            && sealed.lost_in(range).next().is_none();
        if !is_whole || sealed.has_free_blocks()? {
            return Ok(None);
        }
        let Some(mapped) = self.collapsing.try_read() else { return Ok(None) };
        let view = self.view_up_to(range.end)?.filter(|view| view.populate(range).is_ok());
        Ok(view.map(|view| Viewed { _unchanged: holding, _mapped: mapped, view, range }))
    }

    /// The file's view, mapped anew if it is too short; none if all files together have too many
    /// views.
    fn view_up_to(&self, end: u64) -> Result<Option<Arc<View>>> {
        const GRAIN: u64 = 1 << 30; // so that a growing file is not mapped anew each time
        // Of the 65,530 mappings that a process may have (vm.max_map_count).
        const MOST: usize = 4096;
        let mut view = self.view.lock().expect("no panic while a file is mapped");
        if view.as_ref().is_none_or(|view| view.length() < end) {
            *view = None;
            if View::count() >= MOST {
                return Ok(None);
            }
            *view = Some(Arc::new(View::new(&self.data, end.next_multiple_of(GRAIN))?));
        }
        Ok(view.clone())
    }

    /// Writes at `offset`, and lengthens the file if the bytes reach behind its end. The write ends
    /// before the first subpage that is quarantined and covered in part.
    ///
    /// # Errors
    /// [`Error::Full`] if the pool does not have the pages: nothing has changed.
    /// [`Error::Quarantined`] if a quarantined subpage keeps the first byte from being written.
    pub fn write(&self, bytes: &[u8], offset: u64, context: Context<'_>) -> Result<usize> {
        if bytes.is_empty() {
            return Ok(0);
        }
        let range = checked_range(offset, bytes.len() as u64)?;
        {
            let holding = self.share(context.pace)?;
            let sealed = holding.sealed();
            if holding.has_pages(range)
                && sealed.lost_in(range).next().is_none()
                && !sealed.has_removed()?
            {
                let _preferred = holding.prefer_home(offset);
                return tmpfs::write_at(&self.data, bytes, offset);
            }
        }
        self.write_alone(bytes, range, context)
    }

    fn write_alone(&self, bytes: &[u8], range: Range, context: Context<'_>) -> Result<usize> {
        let ahead = self.placement_ahead(range, context)?;
        let _one_at_a_time = self.begin(context.pace)?;
        let mut holding = self.lock(context.pace)?;
        context.pace.refuse_if(|| {
            takes_long(&holding, range, range.end.max(holding.size()), context.pool)
        })?;
        if holding.has_pages(range) || holding.can_append(range) {
            mend_but_gaps(&mut holding, context.pace)?
        } else {
            mend(&mut holding, context.pace)?
        }
        let size = holding.size();
        if holding.can_append(range) {
            match holding.append(bytes, range.start) {
                // A new memory error: write around it, as below.
                Err(Error::Quarantined) | Ok(0) => mend(&mut holding, context.pace)?,
                result => return result,
            }
        }
        let end = writable_prefix(&holding, range, context.recovery_write)?;
        let range = Range::new(range.start, end);
        if range.end > size && holding.sealed().has_new_hw_errors(range)? {
            // Before the file grows: cutting it again would split a folio.
            return Err(Error::Quarantined);
        }
        let placement = placement_now(ahead, &holding, range, context)?;
        let growth = holding.begin_growth(context.pool, range, range.end, &placement)?;
        carry_out(&mut holding, growth, context.pace)?;
        let (written, ended) = match writable_prefix(&holding, range, context.recovery_write) {
            Ok(end) if end == range.end => {
                self.write_and_repair(&mut holding, bytes, range, context)
            }
            // The patrol found an error while the growth gave way.
            Ok(end) => {
                let good = Range::new(range.start, end);
                let (written, ended) = self.write_and_repair(&mut holding, bytes, good, context);
                (written, ended.and(Err(Error::Quarantined)))
            }
            Err(error) => (0, Err(error)),
        };
        if ended.is_err() && holding.size() > size {
            let end = if written == 0 { size } else { size.max(range.start + written) };
            let shrinking = holding.begin_shrinking(context.pool, end)?;
            holding.complete(shrinking)?; // the file ends where the write did
        }
        match (written, ended) {
            (0, Err(error)) => Err(error),
            _ => Ok(written as usize),
        }
    }

    /// Writes `range`, which has memory, and repairs the quarantined subpages in it. Returns the
    /// number of bytes from the start of `range` on that the file has now, and the error that kept
    /// the next byte out.
    fn write_and_repair(
        &self,
        holding: &mut Holding,
        bytes: &[u8],
        range: Range,
        context: Context<'_>,
    ) -> (u64, Result<()>) {
        let _preferred = holding.prefer_home(range.start);
        let mut done = range.start;
        let lost: Vec<Range> = holding.sealed().lost_runs_in(range).collect();
        for run in lost.iter().copied().map(Some).chain([None]) {
            let until = run.map_or(range.end, |run| run.start);
            let piece = &bytes[(done - range.start) as usize..(until - range.start) as usize];
            let (written, ended) = self.write_surely(piece, done);
            done += written as u64;
            let Some(run) = run.filter(|_| ended.is_ok()) else {
                return (done - range.start, ended);
            };
            let content = Content::Bytes { start: range.start, bytes };
            if let Err(error) = self.repair_part(holding, run, content, context) {
                return (done - range.start, Err(error));
            }
            done = run.end.min(range.end);
        }
        (done - range.start, Ok(()))
    }

    /// Writes to memory that the file has. The kernel takes none for that, so a shortage passes,
    /// and the call is repeated.
    fn write_surely(&self, bytes: &[u8], offset: u64) -> (usize, Result<()>) {
        let written = insist(|| match tmpfs::write_prefix(&self.data, bytes, offset) {
            (0, Err(error)) if error.is_shortage() => Err(error),
            written => Ok(written),
        });
        written.unwrap_or_else(|error| (0, Err(error)))
    }
}

/// A part of a file without quarantined subpages. No request changes that while this is held, and
/// the part stays mapped. If the daemon were killed while the kernel faults a page in again, the
/// kernel would not copy on: the read would end with EIO in place of waiting for the next worker
/// (mm/gup.c, __get_user_pages; fs/fuse/dev.c, fuse_dev_do_write).
pub struct Viewed<'a> {
    _unchanged: RwLockReadGuard<'a, Holding>,
    _mapped: RwLockReadGuard<'a, ()>,
    view: Arc<View>,
    range: Range,
}

impl Viewed<'_> {
    /// The bytes, with the limits of [`View::bytes`].
    pub fn bytes(&self) -> &[u8] {
        self.view.bytes(self.range)
    }
}

/// Number of bytes of `range` before the first quarantined subpage.
fn good_prefix(holding: &Holding, range: Range) -> Result<u64> {
    match holding.sealed().lost_in(range).next() {
        None => Ok(range.len()),
        Some(hole) if hole.offset() <= range.start => Err(Error::Quarantined),
        Some(hole) => Ok(hole.offset() - range.start),
    }
}

/// The end of a write of `range`: before the first quarantined subpage that the write must not
/// repair. A subpage that the write covers up to the end of the file counts as covered whole.
fn writable_prefix(holding: &Holding, range: Range, recovery_write: bool) -> Result<u64> {
    let obstacle = match recovery_write {
        true => covered_in_part(holding, range),
        false => holding.sealed().lost_in(range).next(),
    };
    match obstacle {
        None => Ok(range.end),
        Some(hole) if hole.offset() <= range.start => Err(Error::Quarantined),
        Some(hole) => Ok(hole.offset()),
    }
}

/// The first lost subpage that `range` covers in part: some of its bytes in the file, and not all.
pub(super) fn covered_in_part(holding: &Holding, range: Range) -> Option<Subpage> {
    let file = Range::new(0, holding.size());
    let ends = [Subpage::containing(range.start), Subpage::containing(range.end.saturating_sub(1))];
    let is_in_part = |subpage: &Subpage| {
        let bytes = subpage.range().intersect(file);
        !range.covers(bytes) && !range.intersect(bytes).is_empty()
    };
    ends.into_iter().find(|subpage| holding.sealed().is_lost(*subpage) && is_in_part(subpage))
}
