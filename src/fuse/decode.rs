//! The parts of a request, as this crate's types.

use super::device;
use crate::error::{Error, Result};
use crate::fs::{Allocation, RequestContext};
use crate::index::Time;
use crate::sys::identity::{Caller, Member};
use crate::units::InodeId;
use fuser::{INodeNo, Request, TimeOrNow};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

pub(super) fn node_id(ino: INodeNo) -> InodeId {
    InodeId(ino.0)
}

pub(super) fn caller(request: &Request, umask: u32) -> Caller {
    Caller { uid: request.uid(), gid: request.gid(), umask }
}

/// The caller as a member of its groups, for the rules on set-group-id.
pub(super) fn member(request: &Request) -> Member {
    Member { uid: request.uid(), gid: request.gid(), pid: request.pid() }
}

/// The identity of a request. The kernel says only for a write if the caller has CAP_FSETID; for
/// other requests, root is taken to have it.
pub(super) fn context(request: &Request) -> RequestContext {
    let (unique, resent) =
        (request.unique().0 & !device::AGAIN, request.unique().0 & device::AGAIN != 0);
    RequestContext {
        unique,
        resent,
        user: request.uid(),
        thread: request.pid(),
        unprivileged: request.uid() != 0,
        brief: true,
    }
}

pub(super) fn is_read_only(flags: i32) -> bool {
    flags & libc::O_ACCMODE == libc::O_RDONLY
}

/// A time of utimensat(2).
pub(super) fn time(time: Option<TimeOrNow>) -> Time {
    match time {
        None => Time::Omit,
        Some(TimeOrNow::Now) => Time::Now,
        Some(TimeOrNow::SpecificTime(time)) => Time::At(as_sent(time)),
    }
}

/// Corrects a time before 1970: fuser 0.18 counts the nanoseconds backward, the kernel counts them
/// forward.
fn as_sent(time: SystemTime) -> SystemTime {
    match UNIX_EPOCH.duration_since(time) {
        Ok(before) => {
            UNIX_EPOCH - Duration::from_secs(before.as_secs())
                + Duration::from_nanos(before.subsec_nanos().into())
        }
        Err(_) => time,
    }
}

/// The mode of fallocate(2).
///
/// # Errors
/// `Unsupported` for a mode that this filesystem does not have.
pub(super) fn allocation(mode: i32) -> Result<Allocation> {
    const KEEP: i32 = libc::FALLOC_FL_KEEP_SIZE;
    const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | KEEP;
    const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE;
    const ZERO_KEEP: i32 = ZERO | KEEP;
    match mode {
        0 => Ok(Allocation::Extend),
        KEEP => Ok(Allocation::KeepSize),
        PUNCH => Ok(Allocation::Punch),
        ZERO => Ok(Allocation::Zero),
        ZERO_KEEP => Ok(Allocation::ZeroKeepSize),
        _ => Err(Error::Unsupported),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_of_fallocate_that_are_not_offered_are_refused() {
        assert!(matches!(allocation(libc::FALLOC_FL_COLLAPSE_RANGE), Err(Error::Unsupported)));
        assert!(matches!(allocation(libc::FALLOC_FL_PUNCH_HOLE), Err(Error::Unsupported)));
        assert!(matches!(
            allocation(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE),
            Ok(Allocation::Punch)
        ));
    }
}
