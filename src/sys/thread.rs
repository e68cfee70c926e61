//! Threads that stay out of the way of the program that they live in.

use crate::error::Result;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use rustix::thread::futex;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering};

/// Blocks the signals of this thread until it is dropped, but for those of the C library itself.
#[must_use = "the signals are blocked until it is dropped"]
pub struct SignalsBlocked(libc::sigset_t);

impl SignalsBlocked {
    /// Blocks them.
    pub fn new() -> Self {
        // SAFETY: both sets are valid for the calls, and zeros are a valid set.
        #[allow(unsafe_code)]
        unsafe {
            let (mut all, mut before): (libc::sigset_t, libc::sigset_t) = std::mem::zeroed();
            libc::sigfillset(&raw mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
            Self(before)
        }
    }
}

impl Default for SignalsBlocked {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for SignalsBlocked {
    fn drop(&mut self) {
        // SAFETY: the set is one that the kernel has returned.
        #[allow(unsafe_code)]
        unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, std::ptr::null_mut());
        }
    }
}

/// The body of a thread. The argument is null, and so is the value that it returns.
pub type Body = extern "C" fn(*mut libc::c_void) -> *mut libc::c_void;

/// Starts a thread with the signal mask of this one. Unlike the threads of the standard library, it
/// takes no memory of the program's allocator.
///
/// # Errors
/// The errors of pthread_create(3).
pub fn spawn(body: Body) -> Result<()> {
    const STACK: usize = 4 << 20; // of addresses; memory is taken as far as it is used
    // SAFETY: the attributes are initialised before they are used, and the thread gets no argument.
    #[allow(unsafe_code)]
    let error = unsafe {
        let mut attributes: libc::pthread_attr_t = std::mem::zeroed();
        let mut thread: libc::pthread_t = std::mem::zeroed();
        let attributes = &raw mut attributes;
        libc::pthread_attr_init(attributes);
        libc::pthread_attr_setstacksize(attributes, STACK);
        libc::pthread_attr_setdetachstate(attributes, libc::PTHREAD_CREATE_DETACHED);
        let null = std::ptr::null_mut();
        let error = libc::pthread_create(&raw mut thread, attributes, body, null);
        libc::pthread_attr_destroy(attributes);
        error
    };
    if error == 0 { Ok(()) } else { Err(Errno::from_raw_os_error(error).into()) }
}

// SAFETY: the C library has this function (pthread_atfork(3)).
#[allow(unsafe_code)]
unsafe extern "C" {
    fn pthread_atfork(
        prepare: Option<extern "C" fn()>,
        parent: Option<extern "C" fn()>,
        child: Option<extern "C" fn()>,
    ) -> libc::c_int;
}

/// Has `child` run in each process that this one forks from now on (fork(2), not vfork(2)).
///
/// # Errors
/// ENOMEM.
pub fn after_fork(child: extern "C" fn()) -> Result<()> {
    // SAFETY: the function has the signature that is asked for.
    #[allow(unsafe_code)]
    let error = unsafe { pthread_atfork(None, None, Some(child)) };
    if error == 0 { Ok(()) } else { Err(Errno::from_raw_os_error(error).into()) }
}

/// Gives this thread a table of descriptors of its own, which is empty. Threads that it starts
/// share the table. So the program cannot close their descriptors, and they keep none of the
/// program's open. Locks of the program (fcntl(2)) stay when they close one.
///
/// # Errors
/// The errors of close_range(2).
pub fn own_descriptors() -> Result<()> {
    const CLOSE_RANGE_UNSHARE: libc::c_uint = 2;
    // SAFETY: the thread owns no descriptor yet, and those of the other threads stay.
    #[allow(unsafe_code)]
    let result =
        unsafe { libc::syscall(libc::SYS_close_range, 0, libc::c_uint::MAX, CLOSE_RANGE_UNSHARE) };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error().into()) }
}

/// The descriptor `fd` of a thread, which may have a table of its own, or be one of another process
/// (Linux 6.9, pidfd_open(2), PIDFD_THREAD; rustix does not know its bit).
///
/// # Errors
/// The errors of pidfd_open(2) and pidfd_getfd(2).
pub fn descriptor_of(thread: Pid, fd: RawFd) -> Result<OwnedFd> {
    const PIDFD_THREAD: PidfdFlags = PidfdFlags::from_bits_retain(libc::O_EXCL as u32);
    let thread = pidfd_open(thread, PIDFD_THREAD)?;
    Ok(pidfd_getfd(thread, fd, PidfdGetfdFlags::empty())?)
}

/// A descriptor of this thread's table that another thread owns. The caller says that it stays
/// open.
pub fn lent(fd: RawFd) -> BorrowedFd<'static> {
    // SAFETY: the caller says that the descriptor is open as long as the value is used.
    #[allow(unsafe_code)]
    unsafe {
        BorrowedFd::borrow_raw(fd)
    }
}

/// A lock that can be a static variable of a library in any program: to take it needs no memory,
/// and a child process can break it open.
#[derive(Default)]
pub struct Gate(AtomicU32);

/// The lock is held until this is dropped.
#[must_use = "the lock is held until it is dropped"]
pub struct Held<'a>(&'a Gate);

impl Gate {
    const OPEN: u32 = 0;
    const HELD: u32 = 1;
    const AWAITED: u32 = 2;

    /// An open one.
    pub const fn new() -> Self {
        Self(AtomicU32::new(Self::OPEN))
    }

    /// Waits until the lock is open, and holds it.
    pub fn hold(&self) -> Held<'_> {
        let free =
            self.0.compare_exchange(Self::OPEN, Self::HELD, Ordering::Acquire, Ordering::Relaxed);
        if free.is_err() {
            while self.0.swap(Self::AWAITED, Ordering::Acquire) != Self::OPEN {
                let _ = futex::wait(&self.0, futex::Flags::PRIVATE, Self::AWAITED, None);
            }
        }
        Held(self)
    }

    /// Opens the lock of a thread that this process does not have.
    pub fn break_open(&self) {
        self.0.store(Self::OPEN, Ordering::Release);
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if self.0.0.swap(Gate::OPEN, Ordering::Release) == Gate::AWAITED {
            let _ = futex::wake(&self.0.0, futex::Flags::PRIVATE, 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gate_lets_one_thread_through_at_a_time() {
        static GATE: Gate = Gate::new();
        static INSIDE: AtomicU32 = AtomicU32::new(0);
        let pass = || {
            for _ in 0..10_000 {
                let held = GATE.hold();
                assert_eq!(INSIDE.fetch_add(1, Ordering::Relaxed), 0);
                assert_eq!(INSIDE.fetch_sub(1, Ordering::Relaxed), 1);
                drop(held);
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(pass);
            }
        });
    }
}
