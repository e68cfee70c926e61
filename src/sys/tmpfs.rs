//! tmpfs superblocks and the memory of their files (tmpfs(5), fsopen(2), fallocate(2), cachestat(2)).

use super::calls::{
    fsconfig_create, fsconfig_reconfigure, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, fspick,
    move_mount, unmount,
};
use super::shortage::patiently;
use super::{calls, meaning, uninterrupted};
use crate::error::{Error, Result};
use crate::faults::{Want, attempt};
use crate::steps::insist;
use crate::units::{Range, SUBPAGE_SIZE};
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, FsPickFlags, MountAttrFlags, MoveMountFlags, UnmountFlags};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// How a tmpfs superblock is made.
#[derive(Debug, Default)]
pub struct Options {
    /// Most blocks (4 KiB) that its files may take; `None` for tmpfs's own default.
    pub blocks: Option<u64>,
    /// Allocate in 2 MiB folios (`huge=always`).
    pub huge: bool,
    /// Most inodes, as tmpfs counts them (`nr_inodes`); `None` for tmpfs's own default.
    pub inodes: Option<u64>,
    /// Inode numbers of 32 bits, so that one fits in half a node id.
    pub inode32: bool,
    /// Take memory from this NUMA node, and from others where it is full (`mpol=prefer:N`).
    pub node: Option<u32>,
}

/// Creates a superblock; nothing can reach it but the mount that is returned, and it ends with that
/// (unless it is [`attach`]ed somewhere).
///
/// # Errors
/// What fsopen(2), fsconfig(2) and fsmount(2) answer; EINVAL for `noswap` on Linux before 6.4.
#[track_caller]
pub fn create(options: &Options) -> Result<OwnedFd> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(context.as_fd(), "mode", "0700")?;
    fsconfig_set_flag(context.as_fd(), "noswap")?;
    if let Some(blocks) = options.blocks {
        assert!(blocks > 0, "tmpfs takes 0 for unlimited");
        fsconfig_set_string(context.as_fd(), "nr_blocks", blocks.to_string())?;
    }
    if let Some(inodes) = options.inodes {
        assert!(inodes > 0, "tmpfs takes 0 for unlimited");
        fsconfig_set_string(context.as_fd(), "nr_inodes", inodes.to_string())?;
    }
    if options.huge {
        fsconfig_set_string(context.as_fd(), "huge", "always")?;
    }
    if options.inode32 {
        fsconfig_set_flag(context.as_fd(), "inode32")?;
    }
    if let Some(node) = options.node {
        fsconfig_set_string(context.as_fd(), "mpol", format!("prefer:{node}"))?;
    }
    fsconfig_create(context.as_fd())?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOATIME;
    Ok(fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)?)
}

/// Puts a superblock's mount where a path leads to it.
///
/// # Errors
/// What move_mount(2) answers.
#[track_caller]
pub fn attach(mount: impl AsFd, path: &str) -> Result<()> {
    Ok(move_mount(mount, "", rustix::fs::CWD, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
}

/// Takes a mount away from its path; it ends when its last user does.
///
/// # Errors
/// What umount2(2) answers.
#[track_caller]
pub fn detach(path: &str) -> Result<()> {
    Ok(unmount(path, UnmountFlags::DETACH)?)
}

/// Changes how many blocks a superblock's files may take.
///
/// A fault that has read the old limit can be counted right after the kernel has compared the new one with what is taken
/// (mm/shmem.c, shmem_reconfigure and shmem_inode_acct_blocks, Linux 6.18). Then more is taken than the limit, and the
/// number of free blocks wraps around.
///
/// # Errors
/// [`Error::Busy`] for fewer than they have taken already; the limit may be the new one all the same.
#[track_caller]
pub fn set_limit(mount: impl AsFd, limit: u64) -> Result<()> {
    const MORE_TAKEN: Error = Error::Busy("more blocks are taken than that");
    assert!(limit > 0, "tmpfs takes 0 for unlimited");
    let mount = mount.as_fd();
    let context = fspick(mount, "", FsPickFlags::FSPICK_CLOEXEC | FsPickFlags::FSPICK_EMPTY_PATH)?;
    fsconfig_set_string(context.as_fd(), "nr_blocks", limit.to_string())?;
    fsconfig_reconfigure(context.as_fd()).map_err(|errno| match errno {
        Errno::INVAL => MORE_TAKEN,
        other => Error::Os(other),
    })?;
    let now = insist(|| blocks(mount))?; // the limit is the new one already
    if now.free > now.limit { Err(MORE_TAKEN) } else { Ok(()) }
}

/// Blocks (4 KiB) of a superblock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocks {
    /// Most that may be taken.
    pub limit: u64,
    /// Not taken.
    pub free: u64,
}

/// Counts a superblock's blocks (fstatfs(2)).
///
/// # Errors
/// What fstatfs(2) answers.
#[track_caller]
pub fn blocks(mount: impl AsFd) -> Result<Blocks> {
    let stat = calls::fstatfs(mount)?;
    Ok(Blocks { limit: stat.f_blocks, free: stat.f_bfree })
}

/// Takes memory for `range` and leaves the file's size alone.
///
/// Fresh memory is *not cleared* by this call: tmpfs does that when somebody touches it, but not when the
/// toucher is MADV_COLLAPSE, which maps such a folio with the bytes of its former user in it (seen on Linux
/// 6.18). Memory that programs will see needs [`clear`] before they can reach it.
///
/// # Errors
/// [`Error::Full`] where the superblock's limit does not allow it, [`Error::NoMemory`] where the machine does not;
/// the file is as before.
#[track_caller]
pub fn allocate(file: impl AsFd, range: Range) -> Result<()> {
    attempt(Want::Room).map_err(meaning)?;
    let file = file.as_fd();
    let take = || rustix::fs::fallocate(file, FallocateFlags::KEEP_SIZE, range.start, range.len());
    patiently(|| uninterrupted(take)).map_err(meaning)
}

/// Zeroes what [`allocate`] took and nobody has touched since; what has been touched stays as it is.
///
/// It is the same system call once more: tmpfs must initialise a folio that is allocated a second time (mm/shmem.c,
/// shmem_get_folio_gfp, SGP_FALLOC). 42 ms per GiB where clearing is bound by memory.
///
/// # Errors
/// As for [`allocate`].
#[track_caller]
pub fn clear(file: impl AsFd, range: Range) -> Result<()> {
    allocate(file, range)
}

/// Gives back the memory of `range`, whole 4 KiB blocks only; the file's size stays.
///
/// # Errors
/// What fallocate(2) answers.
#[track_caller]
pub fn punch(file: impl AsFd, range: Range) -> Result<()> {
    attempt(Want::Memory).map_err(meaning)?;
    let file = file.as_fd();
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    uninterrupted(|| rustix::fs::fallocate(file, flags, range.start, range.len())).map_err(meaning)
}

/// Sets a file's size; shrinking gives back all memory from the new end on, also what lay beyond the old one.
///
/// # Errors
/// What ftruncate(2) answers.
#[track_caller]
pub fn set_size(file: impl AsFd, size: u64) -> Result<()> {
    attempt(Want::Memory).map_err(meaning)?;
    let file = file.as_fd();
    uninterrupted(|| rustix::fs::ftruncate(file, size)).map_err(meaning)
}

/// Reads at `offset` until `buffer` is full or the file ends; holes read as zeros.
///
/// # Errors
/// [`Error::Poisoned`] or EIO where a memory error is met before the first byte.
#[track_caller]
pub fn read_at(file: impl AsFd, buffer: &mut [u8], offset: u64) -> Result<usize> {
    attempt(Want::Memory).map_err(meaning)?;
    let file = file.as_fd();
    let mut done = 0;
    while done < buffer.len() {
        match uninterrupted(|| rustix::io::pread(file, &mut buffer[done..], offset + done as u64)) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(_) if done > 0 => break,
            Err(errno) => return Err(meaning(errno)),
        }
    }
    Ok(done)
}

/// Writes at `offset` and returns how much was written: all, unless an error was met on the way.
///
/// # Errors
/// [`Error::Full`] where the first byte falls on a hole that no free block can fill.
#[track_caller]
pub fn write_at(file: impl AsFd, bytes: &[u8], offset: u64) -> Result<usize> {
    match write_prefix(file, bytes, offset) {
        (0, Err(error)) => Err(error),
        (done, _) => Ok(done),
    }
}

/// Writes all of `bytes` at `offset`.
///
/// # Errors
/// The error that ended the write, as for [`write_at`]; the bytes before it are written.
#[track_caller]
pub fn write_all_at(file: impl AsFd, bytes: &[u8], offset: u64) -> Result<()> {
    write_prefix(file, bytes, offset).1
}

/// How much of `bytes` was written, and the error that ended the write, if one did.
#[track_caller]
pub fn write_prefix(file: impl AsFd, bytes: &[u8], offset: u64) -> (usize, Result<()>) {
    if let Err(errno) = attempt(Want::Memory) {
        return (0, Err(meaning(errno)));
    }
    let file = file.as_fd();
    let mut done = 0;
    while done < bytes.len() {
        let write = || rustix::io::pwrite(file, &bytes[done..], offset + done as u64);
        match patiently(|| uninterrupted(write)) {
            Ok(0) => return (done, Err(Error::Os(Errno::IO))), // pwrite(2) names no case of this
            Ok(written) => done += written,
            Err(errno) => return (done, Err(meaning(errno))),
        }
    }
    (done, Ok(()))
}

/// Blocks (4 KiB) that one file has taken (fstat(2)).
///
/// # Errors
/// What fstat(2) answers.
#[track_caller]
pub fn blocks_taken(file: impl AsFd) -> Result<u64> {
    let stat = rustix::fs::fstat(file)?;
    Ok(stat.st_blocks as u64 / (SUBPAGE_SIZE / crate::units::STAT_BLOCK))
}

/// A file's size in bytes (fstat(2)).
///
/// # Errors
/// What fstat(2) answers.
#[track_caller]
pub fn size(file: impl AsFd) -> Result<u64> {
    Ok(rustix::fs::fstat(file)?.st_size as u64)
}

/// The same number on every architecture; the libc crate has none.
pub(super) const SYS_CACHESTAT: libc::c_long = 451;

/// How many 4 KiB subpages of `range` have memory, touched or not (cachestat(2), Linux 6.5).
///
/// # Errors
/// What cachestat(2) answers.
#[track_caller]
pub fn resident(file: impl AsFd, range: Range) -> Result<u64> {
    #[repr(C)]
    struct CachestatRange {
        offset: u64,
        length: u64,
    }
    #[repr(C)]
    #[derive(Default)]
    struct Cachestat {
        cached: u64,
        dirty: u64,
        writeback: u64,
        evicted: u64,
        recently_evicted: u64,
    }
    if range.is_empty() {
        return Ok(0); // a length of 0 would mean: to the end of the file
    }
    attempt(Want::Memory)?;
    let wanted = CachestatRange { offset: range.start, length: range.len() };
    let mut counts = Cachestat::default();
    let fd = file.as_fd().as_raw_fd();
    // SAFETY: both structures have the kernel's layout (linux/mman.h) and outlive the call.
    #[allow(unsafe_code)]
    let result = unsafe { libc::syscall(SYS_CACHESTAT, fd, &raw const wanted, &raw mut counts, 0) };
    if result == 0 { Ok(counts.cached) } else { Err(std::io::Error::last_os_error().into()) }
}
