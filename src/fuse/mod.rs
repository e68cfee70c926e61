//! From FUSE to [`crate::fs`] and back: decode, call, encode. This is the only module that uses
//! fuser's types, but for the one call of fuser that is unsafe ([`crate::sys::backing`]).
//!
//! Every regular file is opened `PASSTHROUGH`: mmap(2) reaches the object's `data` without the
//! daemon (Linux 6.9). All opens of a file name the same number of a backing file, which lives as
//! long as the file does (`backing`). With `DIRECT_IO` besides, the kernel sends reads and writes
//! to the daemon (`adapter::Opened`). A descriptor for reading only can go without: the kernel then
//! reads `data` itself.
//!
//! Names and attributes change through this kernel only, so the kernel may keep them for good. The
//! kernel drops them itself when a request changes them (fs/fuse/dir.c); `reply::validity` has the
//! one exception.
//!
//! A worker may die at any instruction, and another takes over ([`Connection::take_over`]). So this
//! module keeps nothing for an open file or directory but its node. The number of the backing file
//! is stored with the file.
//!
//! `operations` has the requests, in the order of decode, call and reply: `decode`, `adapter`,
//! `reply` and `encode`. `jobs` are the threads for long requests, `attempts` counts how often a
//! request was begun, `device` sends what the kernel has not asked for, `features` and `session`
//! begin and take over a session.

mod adapter;
mod attempts;
mod backing;
mod decode;
mod device;
mod encode;
mod features;
mod jobs;
mod operations;
mod reply;
mod session;

pub use device::{refuse_one, resend};
pub use session::{Connection, Handshake, rehearse_threads, would_agree};

/// Largest read or write in one request, in bytes. `max_read=` of the mount must have the same
/// value.
pub const LARGEST_REQUEST: u32 = 1 << 20;

/// Threads that serve requests. None of them waits for a file's lock, for memory that moves, or for
/// another request (`Adapter::answer`).
const THREADS: usize = 8;
