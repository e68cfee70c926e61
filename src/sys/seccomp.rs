//! Filters of system calls (seccomp(2)) on this process.
//!
//! If a filter refuses a call, the daemon could start to serve and fail later. It could even create
//! the files of users as root, because setfsuid(2) reports no error. So a filtered daemon first
//! tries each call of [`NEEDED`]. This does not find a filter that kills the process instead of
//! refusing the call. In that case the kernel's log has the number of the call.

use super::tmpfs::SYS_CACHESTAT;
use crate::error::Result;
use rustix::io::Errno;
use std::ffi::c_long;

/// Names and numbers of the calls that the daemon makes and that filters of services and containers
/// may refuse.
pub const NEEDED: &[(&str, c_long)] = &[
    ("unshare", libc::SYS_unshare),
    ("mount", libc::SYS_mount),
    ("umount2", libc::SYS_umount2),
    ("pivot_root", libc::SYS_pivot_root),
    ("open_tree", libc::SYS_open_tree),
    ("move_mount", libc::SYS_move_mount),
    ("fsopen", libc::SYS_fsopen),
    ("fsconfig", libc::SYS_fsconfig),
    ("fsmount", libc::SYS_fsmount),
    ("fspick", libc::SYS_fspick),
    ("name_to_handle_at", libc::SYS_name_to_handle_at),
    ("open_by_handle_at", libc::SYS_open_by_handle_at),
    ("setfsuid", libc::SYS_setfsuid),
    ("setfsgid", libc::SYS_setfsgid),
    ("set_mempolicy", libc::SYS_set_mempolicy),
    ("get_mempolicy", libc::SYS_get_mempolicy),
    ("move_pages", libc::SYS_move_pages),
    ("madvise", libc::SYS_madvise),
    ("fallocate", libc::SYS_fallocate),
    ("ftruncate", libc::SYS_ftruncate),
    ("cachestat", SYS_CACHESTAT),
    ("flock", libc::SYS_flock),
    ("ioctl", libc::SYS_ioctl),
    ("dup3", libc::SYS_dup3),
    ("socketpair", libc::SYS_socketpair),
    ("prctl", libc::SYS_prctl),
    ("rt_sigtimedwait", libc::SYS_rt_sigtimedwait),
    ("statx", libc::SYS_statx),
    ("fstatfs", libc::SYS_fstatfs),
    ("mkdirat", libc::SYS_mkdirat),
    ("mknodat", libc::SYS_mknodat),
    ("symlinkat", libc::SYS_symlinkat),
    ("linkat", libc::SYS_linkat),
    ("unlinkat", libc::SYS_unlinkat),
    ("renameat2", libc::SYS_renameat2),
    ("readlinkat", libc::SYS_readlinkat),
    ("fchmod", libc::SYS_fchmod),
    ("fchmodat", libc::SYS_fchmodat),
    ("fchown", libc::SYS_fchown),
    ("fchownat", libc::SYS_fchownat),
    ("utimensat", libc::SYS_utimensat),
    ("getxattr", libc::SYS_getxattr),
    ("setxattr", libc::SYS_setxattr),
    ("listxattr", libc::SYS_listxattr),
    ("removexattr", libc::SYS_removexattr),
    ("fgetxattr", libc::SYS_fgetxattr),
    ("fsetxattr", libc::SYS_fsetxattr),
    ("fremovexattr", libc::SYS_fremovexattr),
];

/// The calls of [`NEEDED`] that a filter refuses to this process. The process must have the
/// capabilities that the daemon needs.
///
/// # Errors
/// The errors of reading /proc/self/status: it fails if /proc is not mounted.
pub fn refused_calls() -> Result<Vec<&'static str>> {
    if !is_filtered()? {
        return Ok(Vec::new());
    }
    Ok(NEEDED.iter().filter(|(_, number)| is_refused(*number)).map(|(name, _)| *name).collect())
}

/// True if a filter is in force (proc(5), /proc/PID/status).
fn is_filtered() -> Result<bool> {
    const FILTER: &str = "2";
    let status = std::fs::read_to_string("/proc/self/status")?;
    let mode = status.lines().find_map(|line| line.strip_prefix("Seccomp:"));
    Ok(mode.is_some_and(|mode| mode.trim() == FILTER))
}

/// Makes a call with invalid arguments. The kernel itself answers EBADF, EFAULT or EINVAL; a filter
/// answers EPERM, EACCES or ENOSYS.
fn is_refused(number: c_long) -> bool {
    // SAFETY: -1 is no descriptor, no address and no set of flags, so none of the calls in the
    // table does anything. setfsuid(2) and setfsgid(2) do not change the ids, and return them.
    #[allow(unsafe_code)]
    let answer = unsafe { libc::syscall(number, -1, -1, -1, -1, -1, -1) };
    answer == -1
        && matches!(
            Errno::from_io_error(&std::io::Error::last_os_error()),
            Some(Errno::PERM | Errno::ACCESS | Errno::NOSYS)
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_itself_refuses_no_call_that_is_needed() {
        let refused: Vec<_> = NEEDED.iter().filter(|(_, number)| is_refused(*number)).collect();
        assert!(refused.is_empty(), "{refused:?}");
    }
}
