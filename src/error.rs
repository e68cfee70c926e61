//! The error type of the daemon, and the table that turns each error into an errno.

use rustix::io::Errno;

/// The reasons for which an operation of the filesystem fails.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The pool has no free page, or a sealed file has no free block.
    #[error("no free page in the pool")]
    Full,
    /// The pool has no free page yet. The pages of unlinked files would be enough, and may come
    /// back soon.
    #[error("no free page in the pool but those of removed files that somebody has open")]
    Returning,
    /// The kernel itself reads the file's memory for a program that has the file open, or has just
    /// closed it.
    #[error("programs have the file open for reading natively (see the option io=)")]
    OpenNatively,
    /// Programs have the memory of the file open by themselves ([`crate::fs::Fs::open_door`]).
    #[error(
        "programs have the memory of the file open (hugetlb2 open): it changes once they have ended"
    )]
    HasDoor,
    /// There can be no more files: each file takes resources of which the daemon or the machine has
    /// a limited number.
    #[error("there are as many files as the daemon can have")]
    TooManyFiles,
    /// The machine has no memory for the needs of the pool.
    #[error("the machine is out of memory")]
    NoMemory,
    /// A NUMA node cannot give the memory of its part of the pool. The text has the figures.
    #[error("{0}")]
    NodeFull(String),
    /// More pages of a part of the pool are in use than it would have. The text has the figures.
    #[error("{0}")]
    InUse(String),
    /// The operation meets a quarantined subpage.
    #[error("a quarantined subpage is in the way")]
    Quarantined,
    /// The operation is not possible now. The text has the reason.
    #[error("{0}")]
    Busy(&'static str),
    /// The kernel cannot split a folio, because something refers to it: a pin, or for a moment a
    /// page fault.
    #[error("the folio is pinned (vmsplice, io_uring, VFIO or the like) and cannot be split")]
    Pinned,
    /// The kernel refuses for the moment (madvise(2), MADV_COLLAPSE).
    #[error("the kernel cannot do this right now")]
    Again,
    /// The request takes too long for a thread that other requests wait for. Nothing has changed.
    /// The caller of the system call never sees this error.
    #[error("the request takes long")]
    TakesLong,
    /// The calling program was killed while its request was carried out.
    #[error("the caller was killed")]
    Interrupted,
    /// The request makes no sense. The text says what the filesystem expects.
    #[error("{0}")]
    Invalid(String),
    /// The thing that the request names does not exist: for example an attribute, or a quarantine
    /// in a range.
    #[error("nothing of that kind is there")]
    NoData,
    /// This filesystem or this kernel does not have the operation.
    #[error("not supported")]
    Unsupported,
    /// The operation is not permitted on this object.
    #[error("not permitted")]
    NotPermitted,
    /// The offset or size is beyond the largest file size.
    #[error("beyond the largest file size")]
    TooLarge,
    /// The value of an attribute is longer than getxattr(2) can return.
    #[error("the attribute is too long to return")]
    TooLong,
    /// Stored data that outlives a process does not have its format.
    #[error("damaged: {0}")]
    Corrupt(String),
    /// The error of a system call, unchanged.
    #[error("{0}")]
    Os(Errno),
}

/// A result with the daemon's error type.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// The errno that the caller of the system call gets.
    pub fn errno(&self) -> Errno {
        match self {
            Self::Full | Self::Returning => Errno::NOSPC,
            // tmpfs answers ENOSPC beyond nr_inodes=. ENFILE would speak of the open files of the
            // machine.
            Self::TooManyFiles => Errno::NOSPC,
            // Not ENOMEM: the filesystem could not give the requested space. For this case,
            // open(2), write(2) and fallocate(2) document ENOSPC.
            Self::NoMemory | Self::NodeFull(_) => Errno::NOSPC,
            Self::Quarantined | Self::Corrupt(_) => Errno::IO,
            // Not EAGAIN: programs ask for a collapse by setxattr(2), and there the kernel turns
            // EAGAIN into EOPNOTSUPP (fs/xattr.c, __vfs_setxattr_noperm).
            Self::InUse(_)
            | Self::Busy(_)
            | Self::Pinned
            | Self::Again
            | Self::OpenNatively
            | Self::HasDoor => Errno::BUSY,
            Self::TakesLong => Errno::AGAIN,
            Self::Interrupted => Errno::INTR,
            Self::Invalid(_) => Errno::INVAL,
            Self::NoData => Errno::NODATA,
            Self::Unsupported => Errno::OPNOTSUPP,
            Self::NotPermitted => Errno::PERM,
            Self::TooLarge => Errno::FBIG,
            Self::TooLong => Errno::TOOBIG,
            // The daemon has reached its own limit of descriptors. EMFILE would name the caller's
            // limit, and the caller would close files in vain.
            Self::Os(Errno::MFILE) => Errno::NFILE,
            Self::Os(errno) => *errno,
        }
    }

    /// True if the kernel lacked memory, descriptors or room for an attribute. A retry a moment
    /// later may succeed.
    pub fn is_shortage(&self) -> bool {
        matches!(
            self,
            Self::NoMemory | Self::Os(Errno::NOMEM | Errno::MFILE | Errno::NFILE | Errno::NOSPC)
        )
    }

    /// An [`Error::Invalid`]. `why` says what is wrong and what the filesystem expects.
    pub fn invalid(why: impl Into<String>) -> Self {
        Self::Invalid(why.into())
    }
}

impl From<Errno> for Error {
    fn from(errno: Errno) -> Self {
        Self::Os(errno)
    }
}

impl From<std::io::Error> for Error {
    fn from(error: std::io::Error) -> Self {
        Self::Os(Errno::from_io_error(&error).unwrap_or(Errno::IO))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_answer_is_passed_on_unchanged() {
        assert_eq!(Error::from(Errno::NOTEMPTY).errno(), Errno::NOTEMPTY);
        assert_eq!(Error::from(std::io::Error::from_raw_os_error(2)).errno(), Errno::NOENT);
    }

    #[test]
    fn the_daemons_limit_is_not_the_callers() {
        assert_eq!(Error::Os(Errno::MFILE).errno(), Errno::NFILE);
    }

    #[test]
    fn want_of_memory_looks_like_a_full_filesystem() {
        assert_eq!(Error::NoMemory.errno(), Errno::NOSPC);
        assert_eq!(Error::Full.errno(), Errno::NOSPC);
    }
}
