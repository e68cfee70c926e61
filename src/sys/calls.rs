//! Calls of rustix that can fail for want of memory, descriptors or room. A test can make each of
//! them fail ([`crate::faults`]). Otherwise they are the calls of rustix, unchanged.

use crate::faults::{Want, attempt};
use rustix::fd::OwnedFd;
use rustix::fs::{
    AtFlags, Dir, FileType, Gid, Mode, OFlags, RenameFlags, StatFs, Statx, StatxFlags, Timestamps,
    Uid, XattrFlags,
};
use rustix::io::Result;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, FsPickFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags,
    UnmountFlags,
};
use rustix::path::Arg;
use std::ffi::CString;
use std::os::fd::AsFd;

macro_rules! calls {
    ($($module:ident::$name:ident($($argument:ident: $type:ty),*) -> $answer:ty, wants $want:ident;)+) => {
        $(
            #[doc = concat!("As `rustix::", stringify!($module), "::", stringify!($name), "`.")]
            ///
            /// # Errors
            /// The errors of the system call.
            #[track_caller]
            pub fn $name($($argument: $type),*) -> Result<$answer> {
                attempt(Want::$want)?;
                rustix::$module::$name($($argument),*)
            }
        )+
    };
}

calls! {
    fs::openat(directory: impl AsFd, path: impl Arg, flags: OFlags, mode: Mode) -> OwnedFd, wants Descriptor;
    fs::mkdir(path: impl Arg, mode: Mode) -> (), wants Room;
    fs::mkdirat(directory: impl AsFd, path: impl Arg, mode: Mode) -> (), wants Room;
    fs::mknodat(directory: impl AsFd, path: impl Arg, kind: FileType, mode: Mode, device: u64) -> (), wants Room;
    fs::symlinkat(target: impl Arg, directory: impl AsFd, path: impl Arg) -> (), wants Room;
    fs::linkat(from: impl AsFd, old: impl Arg, to: impl AsFd, new: impl Arg, flags: AtFlags) -> (), wants Room;
    fs::renameat(from: impl AsFd, old: impl Arg, to: impl AsFd, new: impl Arg) -> (), wants Room;
    fs::renameat_with(from: impl AsFd, old: impl Arg, to: impl AsFd, new: impl Arg, flags: RenameFlags) -> (),
        wants Room;
    fs::rmdir(path: impl Arg) -> (), wants Memory;
    fs::unlinkat(directory: impl AsFd, path: impl Arg, flags: AtFlags) -> (), wants Memory;
    fs::statx(directory: impl AsFd, path: impl Arg, flags: AtFlags, mask: StatxFlags) -> Statx, wants Memory;
    fs::fstatfs(file: impl AsFd) -> StatFs, wants Memory;
    fs::readlinkat(directory: impl AsFd, path: impl Arg, buffer: Vec<u8>) -> CString, wants Memory;
    fs::chmodat(directory: impl AsFd, path: impl Arg, mode: Mode, flags: AtFlags) -> (), wants Memory;
    fs::chownat(directory: impl AsFd, path: impl Arg, owner: Option<Uid>, group: Option<Gid>, flags: AtFlags) -> (),
        wants Memory;
    fs::utimensat(directory: impl AsFd, path: impl Arg, times: &Timestamps, flags: AtFlags) -> (), wants Memory;
    fs::getxattr(path: impl Arg, name: impl Arg, value: &mut [u8]) -> usize, wants Memory;
    fs::getxattr_query(path: impl Arg, name: impl Arg) -> usize, wants Memory;
    fs::fgetxattr(file: impl AsFd, name: impl Arg, value: &mut [u8]) -> usize, wants Memory;
    fs::listxattr(path: impl Arg, names: &mut [u8]) -> usize, wants Memory;
    fs::setxattr(path: impl Arg, name: impl Arg, value: &[u8], flags: XattrFlags) -> (), wants Room;
    fs::fsetxattr(file: impl AsFd, name: impl Arg, value: &[u8], flags: XattrFlags) -> (), wants Room;
    fs::removexattr(path: impl Arg, name: impl Arg) -> (), wants Memory;
    fs::fremovexattr(file: impl AsFd, name: impl Arg) -> (), wants Memory;
    mount::fsopen(name: impl Arg, flags: FsOpenFlags) -> OwnedFd, wants Descriptor;
    mount::fspick(mount: impl AsFd, path: impl Arg, flags: FsPickFlags) -> OwnedFd, wants Descriptor;
    mount::fsconfig_set_flag(context: impl AsFd, key: impl Arg) -> (), wants Memory;
    mount::fsconfig_set_string(context: impl AsFd, key: impl Arg, value: impl Arg) -> (), wants Memory;
    mount::fsconfig_create(context: impl AsFd) -> (), wants Memory;
    mount::fsconfig_reconfigure(context: impl AsFd) -> (), wants Memory;
    mount::fsmount(context: impl AsFd, flags: FsMountFlags, attributes: MountAttrFlags) -> OwnedFd, wants Descriptor;
    mount::open_tree(directory: impl AsFd, path: impl Arg, flags: OpenTreeFlags) -> OwnedFd, wants Descriptor;
    mount::move_mount(from: impl AsFd, old: impl Arg, to: impl AsFd, new: impl Arg, flags: MoveMountFlags) -> (),
        wants Room;
    mount::unmount(path: impl Arg, flags: UnmountFlags) -> (), wants Memory;
}

/// As [`Dir::read_from`].
///
/// # Errors
/// The errors of openat(2).
#[track_caller]
pub fn read_dir(directory: impl AsFd) -> Result<Dir> {
    attempt(Want::Descriptor)?;
    Dir::read_from(directory)
}
