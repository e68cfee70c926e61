//! The one error type, and the one table from error to errno.

use rustix::io::Errno;

/// What an operation of the filesystem can fail with.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// No free page in the pool, or no free block in a sealed file.
    #[error("no free page in the pool")]
    Full,
    /// No free page in the pool yet: those of files that were unlinked would do, and may be on their way back.
    #[error("no free page in the pool but those of removed files that somebody has open")]
    Returning,
    /// The kernel reads the file's memory for somebody who has it open, or has just closed it.
    #[error("programs have the file open for reading natively (see the option io=)")]
    OpenNatively,
    /// No more files: each takes of what the daemon or the machine has only so many of.
    #[error("there are as many files as the daemon can have")]
    TooManyFiles,
    /// The machine itself has no memory for what the pool needs.
    #[error("the machine is out of memory")]
    NoMemory,
    /// A quarantined subpage is in the way.
    #[error("a quarantined subpage is in the way")]
    Poisoned,
    /// Not now, and why.
    #[error("{0}")]
    Busy(&'static str),
    /// A transient refusal of the kernel (madvise(2), MADV_COLLAPSE).
    #[error("the kernel cannot do this right now")]
    Again,
    /// The request is none for a thread that others wait for; nothing has changed. No caller sees this one.
    #[error("the request takes long")]
    TakesLong,
    /// The program that asked was killed meanwhile.
    #[error("the caller was killed")]
    Interrupted,
    /// A request that makes no sense, with what would.
    #[error("{0}")]
    Invalid(String),
    /// Asked for something that is not there.
    #[error("nothing of that kind is there")]
    NoData,
    /// Not offered by this filesystem or this kernel.
    #[error("not supported")]
    Unsupported,
    /// Not a thing to be done to this object.
    #[error("not permitted")]
    NotPermitted,
    /// Beyond the largest file.
    #[error("beyond the largest file size")]
    TooLarge,
    /// An attribute's value is longer than getxattr(2) can return.
    #[error("the attribute is too long to return")]
    TooLong,
    /// What outlives a process does not read as it was written.
    #[error("damaged: {0}")]
    Corrupt(String),
    /// The kernel's own answer, passed on as it is.
    #[error("{0}")]
    Os(Errno),
}

/// Shorthand.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// What the caller of the system call sees.
    pub fn errno(&self) -> Errno {
        match self {
            Self::Full | Self::Returning => Errno::NOSPC,
            // As tmpfs answers beyond nr_inodes=. ENFILE would tell of the machine's open files.
            Self::TooManyFiles => Errno::NOSPC,
            // Not ENOMEM: for the caller the filesystem could not give the space it asked for, and ENOSPC
            // is what open(2), write(2) and fallocate(2) document for that.
            Self::NoMemory => Errno::NOSPC,
            Self::Poisoned | Self::Corrupt(_) => Errno::IO,
            // Not EAGAIN: setxattr(2), by which collapsing is asked for, would make EOPNOTSUPP of it (fs/xattr.c,
            // __vfs_setxattr_noperm).
            Self::Busy(_) | Self::Again | Self::OpenNatively => Errno::BUSY,
            Self::TakesLong => Errno::AGAIN,
            Self::Interrupted => Errno::INTR,
            Self::Invalid(_) => Errno::INVAL,
            Self::NoData => Errno::NODATA,
            Self::Unsupported => Errno::OPNOTSUPP,
            Self::NotPermitted => Errno::PERM,
            Self::TooLarge => Errno::FBIG,
            Self::TooLong => Errno::TOOBIG,
            // The daemon's own limit of descriptors. EMFILE would name the limit of the caller, who can close what he likes in vain.
            Self::Os(Errno::MFILE) => Errno::NFILE,
            Self::Os(errno) => *errno,
        }
    }

    /// The kernel lacked memory, descriptors or room for an attribute. It may have them a moment later.
    pub fn is_shortage(&self) -> bool {
        matches!(self, Self::NoMemory | Self::Os(Errno::NOMEM | Errno::MFILE | Errno::NFILE | Errno::NOSPC))
    }

    /// An [`Error::Invalid`] that says what was wrong and what would be right.
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
