//! The contents of files: read(2), write(2), fallocate(2), lseek(2) and copy_file_range(2).

use super::{Allocation, Context, Fs, Object, Pace, RequestContext};
use crate::error::{Error, Result};
use crate::units::InodeId;
use std::time::{Duration, Instant};

/// A place in a file.
#[derive(Clone, Copy, Debug)]
pub struct Position {
    /// The file.
    pub node: InodeId,
    /// The distance from its start in bytes.
    pub offset: u64,
}

/// The time to wait for the kernel's RELEASE of a native reader. close(2) returns before the daemon
/// receives RELEASE. The time is some thousand times as long as the kernel needs, because the
/// machine may be busy.
const CLOSING_PATIENCE: Duration = Duration::from_millis(300);

/// The time to wait for the pages of files that the kernel has given up. The memory of a large file
/// moves at some GiB per second, and a busy machine is slower.
const DISMANTLING_PATIENCE: Duration = Duration::from_secs(5);

impl Fs {
    /// Repeats `request` while it fails for something that is on its way. After
    /// [`Error::Returning`], pages that are ready come back at once, and those of removed files by
    /// [`Fs::forget`]. After [`Error::OpenNatively`], a native reader is closed by
    /// [`Fs::close_natively`]. The caller must leave another thread free for these calls.
    ///
    /// # Errors
    /// The error of the last run of `request`.
    pub fn patiently<T>(&self, mut request: impl FnMut() -> Result<T>) -> Result<T> {
        let mut request = || match request() {
            Err(Error::Returning) if self.recall_ready() => request(),
            result => result,
        };
        let started = Instant::now();
        let deadline = started + CLOSING_PATIENCE;
        loop {
            let seen = self.closings.count();
            match self.pool.patiently(&mut request) {
                // The kernel has given the files up. So their pages come back for certain.
                Err(Error::Returning)
                    if started.elapsed() < DISMANTLING_PATIENCE && self.is_dismantling() => {}
                Err(Error::OpenNatively)
                    if Instant::now() < deadline && self.closings.wait(seen, deadline) => {}
                result => return result,
            }
        }
    }

    /// True if the kernel may read the file's memory without the daemon for a descriptor that is
    /// being opened ([`Object::open_natively`]). The number of the request stands for the
    /// descriptor from then on.
    ///
    /// # Errors
    /// The errors of setxattr(2).
    pub fn open_natively(
        &self,
        object: &Object,
        read_only: bool,
        request: RequestContext,
    ) -> Result<bool> {
        if self.native && read_only { object.open_natively(request.unique) } else { Ok(false) }
    }

    /// A native reader is closed.
    pub fn close_natively(&self, node: InodeId, number: u64) {
        if let Some(object) = self.known_object(node) {
            object.close_natively(number);
            self.closings.add();
        }
    }

    /// pread(2).
    ///
    /// # Errors
    /// EIO at a quarantined subpage.
    pub fn read(
        &self,
        node: InodeId,
        buffer: &mut [u8],
        offset: u64,
        request: RequestContext,
    ) -> Result<usize> {
        let object = self.object(node)?;
        let pace = Pace::of(request);
        self.heeding_hw_errors(&object, request, || object.read(buffer, offset, &pace))
    }

    /// pwrite(2).
    ///
    /// # Errors
    /// ENOSPC, EIO, EBUSY, EFBIG.
    pub fn write(
        &self,
        node: InodeId,
        bytes: &[u8],
        offset: u64,
        request: RequestContext,
    ) -> Result<usize> {
        let object = self.object(node)?;
        self.contents_change(&object, request.unprivileged)?;
        let write = |context: Context<'_>| object.write(bytes, offset, context);
        let write = || self.with_context(&object, request, write);
        self.heeding_hw_errors(&object, request, write)
    }

    /// fallocate(2) of `length` bytes at `offset`.
    ///
    /// # Errors
    /// ENOSPC, EIO, EBUSY, EFBIG.
    pub fn allocate(
        &self,
        node: InodeId,
        what: Allocation,
        offset: u64,
        length: u64,
        request: RequestContext,
    ) -> Result<()> {
        let object = self.object(node)?;
        self.contents_change(&object, request.unprivileged)?;
        let allocate = |context: Context<'_>| object.allocate(what, offset, length, context);
        let allocate = || self.with_context(&object, request, allocate);
        self.heeding_hw_errors(&object, request, allocate)?;
        self.learn_size(&object);
        Ok(())
    }

    /// copy_file_range(2): copies up to `length` bytes, perhaps fewer.
    ///
    /// # Errors
    /// The errors of reading and writing, if not one byte could be copied.
    pub fn copy(
        &self,
        from: Position,
        to: Position,
        length: u64,
        request: RequestContext,
    ) -> Result<usize> {
        const PIECE: usize = 1 << 20;
        const MOST: usize = 256 << 20; // so that one request does not keep a thread for seconds
        let pace = Pace::of(request);
        pace.refuse_if(|| Ok(true))?;
        let length = usize::try_from(length).unwrap_or(MOST).min(MOST);
        let mut buffer = vec![0; PIECE.min(length)];
        let mut done = 0;
        while done < length {
            let wanted = buffer.len().min(length - done);
            let read = pace.go_on().and_then(|()| {
                self.read(from.node, &mut buffer[..wanted], from.offset + done as u64, request)
            });
            let piece = read.and_then(|read| match read {
                0 => Ok((0, 0)),
                read => {
                    let at = to.offset + done as u64;
                    Ok((read, self.write(to.node, &buffer[..read], at, request)?))
                }
            });
            match piece {
                Ok((read, written)) => {
                    done += written;
                    if read == 0 || written < wanted {
                        break;
                    }
                }
                Err(_) if done > 0 => break,
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }

    /// lseek(2) with SEEK_DATA (true) or SEEK_HOLE.
    ///
    /// # Errors
    /// ENXIO.
    pub fn seek(
        &self,
        node: InodeId,
        offset: u64,
        data: bool,
        request: RequestContext,
    ) -> Result<u64> {
        let (object, pace) = (self.object(node)?, Pace::of(request));
        self.look_for_hw_errors_in(&object, &pace)?;
        object.seek(offset, data, &pace)
    }
}
