//! The thread that waits for the answer to a request, as /proc shows it.

use rustix::fs::{CWD, Mode, OFlags, openat};
use std::os::fd::OwnedFd;

/// The most that is read of a file. No file that is read here is as long, unless a program makes
/// it so.
const MOST: usize = 16 << 10;

/// The directory of a thread in /proc (proc(5), /proc/PID/task/TID). It stays the thread's: if
/// the thread ends, its files cannot be read any more.
#[derive(Debug)]
pub struct Caller(OwnedFd);

impl Caller {
    /// Opens the directory. `None` if /proc does not show the thread.
    pub fn open(thread: u32) -> Option<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        openat(CWD, format!("/proc/{thread}/task/{thread}"), flags, Mode::empty()).ok().map(Self)
    }

    /// The processor that the thread runs on, and more. Empty if it cannot be read.
    pub fn stat(&self) -> Vec<u8> {
        self.start_of("stat", MOST)
    }

    /// The nodes of the thread's cpuset, and more. Empty if it cannot be read.
    pub fn status(&self) -> Vec<u8> {
        self.start_of("status", MOST)
    }

    /// The first `bytes` bytes of the file with the thread's memory policy. Empty if it cannot be
    /// read. The kernel looks through one mapping for this, not through all (fs/seq_file.c,
    /// seq_read_iter).
    ///
    /// The kernel waits for the lock of the process's address space (mmap_lock). A process can keep
    /// that lock for as long as it likes: its page fault waits for a server that does not answer.
    pub fn numa_maps(&self, bytes: usize) -> Vec<u8> {
        self.start_of("numa_maps", bytes)
    }

    /// The bytes that one read(2) delivers. The kernel makes the whole text at the first read.
    fn start_of(&self, name: &str, bytes: usize) -> Vec<u8> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let Ok(file) = openat(&self.0, name, flags, Mode::empty()) else { return Vec::new() };
        let mut text = Vec::with_capacity(bytes);
        match rustix::io::read(file, rustix::buffer::spare_capacity(&mut text)) {
            Ok(_) => text,
            Err(_) => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_of_a_thread_are_read_as_far_as_asked() {
        let own = Caller::open(rustix::thread::gettid().as_raw_nonzero().get() as u32).unwrap();
        assert_eq!(own.numa_maps(20).len(), 20);
        let maps = std::fs::read("/proc/thread-self/numa_maps").unwrap();
        assert!(maps.starts_with(&own.numa_maps(20)[..13]), "the address of the first mapping");
        assert!(String::from_utf8_lossy(&own.status()).contains("\nMems_allowed_list:"));
        assert!(String::from_utf8_lossy(&own.stat()).ends_with('\n'));
    }

    #[test]
    fn a_thread_that_has_ended_tells_nothing() {
        let tell = || Caller::open(rustix::thread::gettid().as_raw_nonzero().get() as u32).unwrap();
        let ended = std::thread::spawn(tell).join().unwrap();
        let is_gone = || ended.stat().is_empty() && ended.numa_maps(100).is_empty();
        while !is_gone() {
            std::thread::yield_now(); // the kernel still takes it down
        }
        assert!(Caller::open(0).is_none());
    }
}
