//! The thread that waits for the answer to a request, as /proc shows it.

use rustix::fs::{CWD, Mode, OFlags, openat};
use std::os::fd::OwnedFd;
use std::sync::OnceLock;

/// The most that is read of a file. No file that is read here is as long, unless a program makes
/// it so.
const MOST: usize = 16 << 10;

/// A thread's files in /proc (proc(5), /proc/PID/task/TID). They stay open once they are read, as
/// opening takes longer than reading. They are this thread's for ever: if the thread has ended,
/// they are empty, also where another thread has its number. If the thread has executed a program,
/// its memory policy is empty.
#[derive(Debug)]
pub struct Caller {
    directory: OwnedFd,
    stat: Text,
    status: Text,
    numa_maps: Text,
}

/// A file, once it is open. `None` inside for a file that cannot be opened.
type Text = OnceLock<Option<OwnedFd>>;

impl Caller {
    /// Opens the directory. `None` if /proc does not show the thread.
    pub fn open(thread: u32) -> Option<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let path = format!("/proc/{thread}/task/{thread}");
        let directory = openat(CWD, path, flags, Mode::empty()).ok()?;
        let (stat, status, numa_maps) = Default::default();
        Some(Self { directory, stat, status, numa_maps })
    }

    /// The processor that the thread runs on, and more. Empty if it cannot be read.
    pub fn stat(&self) -> Vec<u8> {
        self.start_of(&self.stat, "stat", MOST)
    }

    /// The nodes of the thread's cpuset, and more. Empty if it cannot be read.
    pub fn status(&self) -> Vec<u8> {
        self.start_of(&self.status, "status", MOST)
    }

    /// The first `bytes` bytes of the file with the thread's memory policy. Empty if it cannot be
    /// read. The kernel looks through one mapping for this, not through all (fs/seq_file.c,
    /// seq_read_iter).
    ///
    /// The kernel waits for the lock of the process's address space (mmap_lock). A process can keep
    /// that lock for as long as it likes: its page fault waits for a server that does not answer.
    pub fn numa_maps(&self, bytes: usize) -> Vec<u8> {
        self.start_of(&self.numa_maps, "numa_maps", bytes)
    }

    /// The bytes that one read delivers. The kernel makes the whole text anew at offset 0.
    fn start_of(&self, text: &Text, name: &str, bytes: usize) -> Vec<u8> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let open = || openat(&self.directory, name, flags, Mode::empty()).ok();
        let Some(file) = text.get_or_init(open) else { return Vec::new() };
        let mut read = Vec::with_capacity(bytes);
        match rustix::io::pread(file, rustix::buffer::spare_capacity(&mut read), 0) {
            Ok(_) => read,
            Err(_) => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own() -> Caller {
        let thread = rustix::thread::gettid().as_raw_nonzero().get();
        Caller::open(thread as u32).expect("/proc is mounted")
    }

    #[test]
    fn the_files_of_a_thread_are_read_as_far_as_asked() {
        let own = own();
        let maps = std::fs::read("/proc/thread-self/numa_maps").unwrap();
        for _ in 0..2 {
            assert_eq!(own.numa_maps(20).len(), 20);
            assert!(maps.starts_with(&own.numa_maps(20)[..12]), "the address of a mapping");
            assert!(String::from_utf8_lossy(&own.status()).contains("\nMems_allowed_list:"));
            assert!(String::from_utf8_lossy(&own.stat()).ends_with('\n'));
        }
    }

    #[test]
    fn a_thread_that_has_ended_tells_nothing() {
        let tell = || {
            let own = own();
            assert!(!own.stat().is_empty() && !own.numa_maps(100).is_empty());
            own
        };
        let ended = std::thread::spawn(tell).join().unwrap();
        let is_gone = || ended.stat().is_empty() && ended.numa_maps(100).is_empty();
        while !is_gone() {
            std::thread::yield_now(); // the kernel still takes it down
        }
        assert!(Caller::open(0).is_none());
    }
}
