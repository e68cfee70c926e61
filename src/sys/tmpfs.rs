//! tmpfs superblocks and the memory of their files (tmpfs(5), fsopen(2), fallocate(2),
//! cachestat(2)).

use super::calls::{
    fsconfig_create, fsconfig_reconfigure, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen,
    fspick, move_mount, open_tree, unmount,
};
use super::shortage::patiently;
use super::{calls, meaning, uninterrupted};
use crate::error::{Error, Result};
use crate::faults::{Want, attempt};
use crate::steps::insist;
use crate::units::{NumaNode, Range, SUBPAGE_SIZE};
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, FsPickFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags,
    UnmountFlags,
};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// The options of a new tmpfs superblock.
#[derive(Debug, Default)]
pub struct Options {
    /// The most blocks (4 KiB) that its files may take. `None` for tmpfs's own default.
    pub blocks: Option<u64>,
    /// Allocate in 2 MiB folios (`huge=always`).
    pub huge: bool,
    /// The most inodes, as tmpfs counts them (`nr_inodes`). `None` for tmpfs's own default.
    pub inodes: Option<u64>,
    /// Use inode numbers of 32 bits, so that a number fits into half a node id.
    pub inode32: bool,
    /// Take memory from this NUMA node, and from others where it is full (`mpol=prefer:N`).
    pub node: Option<NumaNode>,
}

/// Creates a superblock. Only the returned mount leads to it, and the superblock ends with that
/// mount, unless the mount is [`attach`]ed.
///
/// # Errors
/// The errors of fsopen(2), fsconfig(2) and fsmount(2); EINVAL for `noswap` on Linux before 6.4.
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

/// Puts a superblock's mount at `path`.
///
/// # Errors
/// The errors of move_mount(2).
#[track_caller]
pub fn attach(mount: impl AsFd, path: &str) -> Result<()> {
    Ok(move_mount(mount, "", rustix::fs::CWD, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
}

/// Moves a mount from one path to another.
///
/// # Errors
/// The errors of move_mount(2).
#[track_caller]
pub fn rename(from: &str, to: &str) -> Result<()> {
    let cwd = rustix::fs::CWD;
    Ok(move_mount(cwd, from, cwd, to, MoveMountFlags::empty())?)
}

/// Takes a mount away from its path. The mount ends with its last user.
///
/// # Errors
/// The errors of umount2(2).
#[track_caller]
pub fn detach(path: &str) -> Result<()> {
    Ok(unmount(path, UnmountFlags::DETACH)?)
}

/// Mounts the file at `from` at the path `to`, which has a file.
///
/// # Errors
/// The errors of open_tree(2) and move_mount(2).
#[track_caller]
pub fn bind(from: &str, to: &str) -> Result<()> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    attach(open_tree(rustix::fs::CWD, from, flags)?, to)
}

/// Takes a mount away from its path, unless a program has a file open that it opened through this
/// mount, or maps one. True if no mount is there any more.
///
/// # Errors
/// The errors of umount2(2).
#[track_caller]
pub fn detach_unused(path: &str) -> Result<bool> {
    match unmount(path, UnmountFlags::empty()) {
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => Ok(true),
        Err(Errno::BUSY) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// Changes the number of blocks that a superblock's files may take.
///
/// The kernel compares the new limit with the blocks that are taken, and then sets the limit. A
/// fault that has read the old limit can be counted in between (mm/shmem.c, shmem_reconfigure and
/// shmem_inode_acct_blocks, Linux 6.18). Then more blocks are taken than the limit, and the number
/// of free blocks wraps around.
///
/// # Errors
/// [`Error::Busy`] where more than `limit` blocks are taken. The limit may be the new one all the
/// same.
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
    let now = insist(|| blocks(mount))?; // must succeed, as the limit is the new one already
    if now.free > now.limit { Err(MORE_TAKEN) } else { Ok(()) }
}

/// Blocks (4 KiB) of a superblock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocks {
    /// The most blocks that may be taken.
    pub limit: u64,
    /// The blocks that are not taken.
    pub free: u64,
}

/// Counts a superblock's blocks (fstatfs(2)).
///
/// # Errors
/// The errors of fstatfs(2).
#[track_caller]
pub fn blocks(mount: impl AsFd) -> Result<Blocks> {
    let stat = calls::fstatfs(mount)?;
    Ok(Blocks { limit: stat.f_blocks, free: stat.f_bfree })
}

/// Takes memory for `range`. The file keeps its size.
///
/// This call does *not clear* fresh memory. tmpfs clears it at a touch, but not when MADV_COLLAPSE
/// touches it: MADV_COLLAPSE maps such a folio with the bytes of its former user (seen on Linux
/// 6.18). Memory that programs will see needs [`clear`] before they can reach it.
///
/// # Errors
/// [`Error::Full`] where the superblock's limit forbids it, [`Error::NoMemory`] where the machine
/// has no memory. The file is as before.
#[track_caller]
pub fn allocate(file: impl AsFd, range: Range) -> Result<()> {
    attempt(Want::Room).map_err(meaning)?;
    let file = file.as_fd();
    let take = || rustix::fs::fallocate(file, FallocateFlags::KEEP_SIZE, range.start, range.len());
    patiently(|| uninterrupted(take)).map_err(meaning)
}

/// Zeroes memory that [`allocate`] took and that has not been touched since. Touched memory keeps
/// its bytes.
///
/// This makes the system call of [`allocate`] once more: tmpfs must initialise a folio that is
/// allocated a second time (mm/shmem.c, shmem_get_folio_gfp, SGP_FALLOC). It takes 42 ms per GiB if
/// the speed of memory bounds the clearing.
///
/// # Errors
/// Those of [`allocate`].
#[track_caller]
pub fn clear(file: impl AsFd, range: Range) -> Result<()> {
    allocate(file, range)
}

/// Gives back the memory of `range`, whole 4 KiB blocks only. The file keeps its size.
///
/// # Errors
/// The errors of fallocate(2).
#[track_caller]
pub fn punch(file: impl AsFd, range: Range) -> Result<()> {
    attempt(Want::Memory).map_err(meaning)?;
    let file = file.as_fd();
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    uninterrupted(|| rustix::fs::fallocate(file, flags, range.start, range.len())).map_err(meaning)
}

/// Sets a file's size. A call that does not lengthen the file gives back all memory from the new
/// end on, also the memory behind the old end.
///
/// # Errors
/// The errors of ftruncate(2).
#[track_caller]
pub fn set_size(file: impl AsFd, size: u64) -> Result<()> {
    attempt(Want::Memory).map_err(meaning)?;
    let file = file.as_fd();
    uninterrupted(|| rustix::fs::ftruncate(file, size)).map_err(meaning)
}

/// Reads at `offset` until `buffer` is full or the file ends. Holes read as zeros.
///
/// # Errors
/// [`Error::Quarantined`] where the first byte has a memory error, and the other errors of
/// pread(2). After the first byte an error ends the read early.
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

/// Writes at `offset` and returns the number of bytes written: all of them, unless an error ended
/// the write.
///
/// # Errors
/// [`Error::Full`] where the first byte falls into a hole that no free block can fill, and the
/// other errors of pwrite(2).
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
/// The error that ended the write, as for [`write_at`]. The bytes before it are written.
#[track_caller]
pub fn write_all_at(file: impl AsFd, bytes: &[u8], offset: u64) -> Result<()> {
    write_prefix(file, bytes, offset).1
}

/// Writes at `offset`. Returns the number of bytes written, and the error that ended the write, if
/// one did.
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
            Ok(0) => return (done, Err(Error::Os(Errno::IO))), // pwrite(2) names no such case
            Ok(written) => done += written,
            Err(errno) => return (done, Err(meaning(errno))),
        }
    }
    (done, Ok(()))
}

/// Blocks (4 KiB) that one file has taken (fstat(2)).
///
/// # Errors
/// The errors of fstat(2).
#[track_caller]
pub fn blocks_taken(file: impl AsFd) -> Result<u64> {
    let stat = rustix::fs::fstat(file)?;
    Ok(stat.st_blocks as u64 / (SUBPAGE_SIZE / crate::units::STAT_BLOCK))
}

/// A file's size in bytes (fstat(2)).
///
/// # Errors
/// The errors of fstat(2).
#[track_caller]
pub fn size(file: impl AsFd) -> Result<u64> {
    Ok(rustix::fs::fstat(file)?.st_size as u64)
}

/// The number is the same on every architecture. The libc crate does not have it.
pub(super) const SYS_CACHESTAT: libc::c_long = 451;

/// The number of 4 KiB subpages of `range` that have memory, touched or not (cachestat(2), Linux
/// 6.5).
///
/// # Errors
/// The errors of cachestat(2).
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
        return Ok(0); // a length of 0 means: to the end of the file
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
