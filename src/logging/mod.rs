//! The daemon's log: a file that the admin names, the system log, or the kernel's log.
//!
//! ```text
//!   supervisor --+
//!                +--> [queue: a socket pair] --> the worker's writer --> [`sink`]: file or system log
//!   worker ------+
//! ```
//!
//! **A thread that logs never waits.** It puts a line into the queue without blocking. If the queue
//! is full, the line is dropped and counted. One thread of the worker, the writer, takes lines out
//! of the queue. Only the writer can wait for a disk or for another program. As soon as the log
//! takes lines again, the writer says how many were dropped.
//!
//! The supervisor makes the queue and holds both ends, so lines outlive the worker that wrote them:
//! the next worker's writer goes on with them. The supervisor has no thread but its first, and
//! writes nothing itself.
//!
//! **A user cannot fill the log.** Each place in the code may log [`limit::BURST`] lines at once
//! and [`limit::RATE`] lines a second, for each user that the place knows. The writer says how many
//! more lines there were. A line has at most [`text::LONGEST`] bytes, and every character of a line
//! that is not printable is escaped.
//!
//! SIGUSR1 has the writer open the file, or the connection to the system log, anew ([`reopen_on`]).

mod limit;
mod sink;
mod text;

pub use text::Excerpt;

use limit::{Admission, Key, Limits};
use log::{Level, Log, Metadata, Record};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::net::sockopt::set_socket_send_buffer_size;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair,
};
use sink::Sink;
use std::fmt::Arguments;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// Bytes of lines and their headers that the queue holds: some hundred lines.
const QUEUE_BYTES: usize = 200 << 10;

/// The time between two reports of suppressed lines.
const REPORT_PERIOD: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// The longest time that the end of a process waits for a log that does not take the last lines.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// Messages of the queue that are no lines: a line is longer than one byte.
const NUDGE: &[u8] = b"N";
const FLUSH: &[u8] = b"F";

static LOG: OnceLock<DaemonLog> = OnceLock::new();

/// Lines of this process that the log did not take.
static DROPPED: AtomicU64 = AtomicU64::new(0);
static DROPPED_IN_ALL: AtomicU64 = AtomicU64::new(0);

struct DaemonLog {
    filter: env_filter::Filter,
    shape: text::Shape,
    /// Both ends of the queue.
    lines: OwnedFd,
    queue: OwnedFd,
    /// The writer's.
    sink: Mutex<Sink>,
    limits: Mutex<Limits>,
    /// The next line is to go to a file that is opened anew.
    reopen: Arc<AtomicBool>,
    /// This process has a writer.
    is_written: AtomicBool,
    /// FLUSH messages that the writer has come to.
    flushed: Mutex<u64>,
    flushing: Condvar,
}

/// Starts logging to `path`, or else to the system log. Lines stay in the queue until a process
/// calls [`start_writer`].
///
/// # Errors
/// `path` cannot be opened, or is not safe to write to. A machine without a system log is served by
/// its kernel log.
pub fn start(path: Option<&str>) -> io::Result<()> {
    let root = openat(CWD, "/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let sink = Sink::open(root, path)?;
    let (lines, queue) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    set_socket_send_buffer_size(&queue, QUEUE_BYTES)?;
    let wanted = std::env::var("HUGETLB2_LOG");
    // fuser warns of each request that this filesystem leaves out; a user can send those at will.
    let wanted = wanted.as_deref().unwrap_or("info,fuser=error");
    let mut filter = env_filter::Builder::new();
    filter.try_parse(wanted).map_err(|error| io::Error::other(format!("HUGETLB2_LOG: {error}")))?;
    let log = LOG.get_or_init(|| DaemonLog {
        filter: filter.build(),
        shape: sink.shape(),
        lines,
        queue,
        sink: Mutex::new(sink),
        limits: Mutex::default(),
        reopen: Arc::default(),
        is_written: AtomicBool::new(false),
        flushed: Mutex::default(),
        flushing: Condvar::new(),
    });
    log::set_logger(log).map_err(|_| io::Error::other("this process logs already"))?;
    log::set_max_level(log.filter.filter());
    Ok(())
}

/// Has this signal open the log anew, in this process and those that it forks.
///
/// # Errors
/// The errors of sigaction(2).
pub fn reopen_on(signal: i32) -> io::Result<()> {
    let Some(log) = LOG.get() else { return Ok(()) };
    signal_hook::flag::register(signal, log.reopen.clone())?;
    // The byte that wakes the writer is a message like NUDGE.
    signal_hook::low_level::pipe::register(signal, log.queue.try_clone()?).map(drop)
}

/// Starts this process's writer. The process must not fork afterwards.
///
/// # Errors
/// EAGAIN where no thread can be had.
pub fn start_writer() -> io::Result<()> {
    let Some(log) = LOG.get() else { return Ok(()) };
    if !log.is_written.swap(true, Ordering::SeqCst) {
        let thread = std::thread::Builder::new().name("log".into());
        let started = thread.spawn(|| log.write());
        log.is_written.store(started.is_ok(), Ordering::SeqCst);
        started?;
    }
    Ok(())
}

/// Waits until the lines of this process are written, but not for long: a process that is to end
/// must not wait for its log.
pub fn flush() {
    if let Some(log) = LOG.get()
        && start_writer().is_ok()
    {
        log.flush();
    }
}

/// Lines that this worker has dropped because the log did not take them.
pub fn dropped() -> u64 {
    DROPPED_IN_ALL.load(Ordering::Relaxed)
}

fn count_dropped() {
    DROPPED.fetch_add(1, Ordering::Relaxed);
    DROPPED_IN_ALL.fetch_add(1, Ordering::Relaxed);
}

/// A panic elsewhere leaves these tables usable: each change to them is one step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Log for DaemonLog {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.filter.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        if !self.filter.matches(record) {
            return;
        }
        let line = self.shape.line(record.level(), record.args());
        let admission = lock(&self.limits).admit(Key::of(record), &line, Instant::now());
        match admission {
            Admission::Admitted => self.put(&line),
            // A full queue wakes the writer, too.
            Admission::FirstSuppressed => drop(self.send(NUDGE)),
            Admission::Suppressed => {}
        }
    }

    fn flush(&self) {
        let mut flushed = lock(&self.flushed);
        let before = *flushed;
        if self.send(FLUSH).is_ok() {
            let is_behind = |flushed: &mut u64| *flushed == before;
            flushed = self
                .flushing
                .wait_timeout_while(flushed, LAST_WORDS, is_behind)
                .map_or_else(|poisoned| poisoned.into_inner().0, |(flushed, _)| flushed);
        }
        drop(flushed);
    }
}

// ---- the queue ----------------------------------------------------------------------------------

impl DaemonLog {
    fn put(&self, line: &str) {
        if self.send(line.as_bytes()).is_err() {
            count_dropped();
        }
    }

    fn send(&self, message: &[u8]) -> Result<(), Errno> {
        send(&self.queue, message, SendFlags::DONTWAIT | SendFlags::NOSIGNAL).map(drop)
    }

    /// The next message; `None` where `patience` ends first.
    fn next<'a>(&self, buffer: &'a mut [u8], patience: Option<&Timespec>) -> Option<&'a [u8]> {
        let ready = poll(&mut [PollFd::new(&self.lines, PollFlags::IN)], patience);
        if ready == Ok(0) {
            return None;
        }
        // A signal that has interrupted the wait is served like a message.
        let length =
            recv(&self.lines, &mut *buffer, RecvFlags::DONTWAIT).map_or(0, |(length, _)| length);
        Some(&buffer[..length])
    }
}

// ---- the writer ---------------------------------------------------------------------------------

impl DaemonLog {
    fn write(&self) {
        let mut sink = lock(&self.sink);
        self.reopen(&mut sink); // the file may be another than when the supervisor opened it
        let mut buffer = [0; text::LONGEST];
        loop {
            let are_suppressed = lock(&self.limits).any_suppressed();
            let message = self.next(&mut buffer, are_suppressed.then_some(&REPORT_PERIOD));
            if self.reopen.swap(false, Ordering::SeqCst) {
                self.reopen(&mut sink);
            }
            match message {
                None => self.report_suppressed(&mut sink),
                Some(FLUSH) => self.note_flush(),
                Some(line) if line.len() > 1 => self.deliver(&mut sink, line),
                Some(_) => {} // a nudge
            }
        }
    }

    fn note_flush(&self) {
        *lock(&self.flushed) += 1;
        self.flushing.notify_all();
    }

    fn reopen(&self, sink: &mut Sink) {
        if let Err(error) = sink.reopen() {
            self.say(sink, Level::Error, format_args!("the log goes on where it was: {error}"));
        }
    }

    fn deliver(&self, sink: &mut Sink, line: &[u8]) {
        if !sink.write(line) {
            return count_dropped();
        }
        let dropped = DROPPED.swap(0, Ordering::Relaxed);
        if dropped > 0 {
            let what = format_args!("{dropped} messages dropped: the log did not take them");
            self.say(sink, Level::Warn, what);
        }
    }

    fn report_suppressed(&self, sink: &mut Sink) {
        let suppressed = lock(&self.limits).take_suppressed();
        for (count, like) in suppressed {
            self.say(
                sink,
                Level::Warn,
                format_args!("{count} more messages suppressed that are like: {like}"),
            );
        }
    }

    /// The writer's own lines do not go through the queue, which could be full.
    fn say(&self, sink: &mut Sink, level: Level, what: Arguments<'_>) {
        if !sink.write(self.shape.line(level, &what).as_bytes()) {
            count_dropped();
        }
    }
}
