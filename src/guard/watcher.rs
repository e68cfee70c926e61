//! The guard's threads.

use super::texts::{Area, Areas, List};
use super::{
    ALARM, ALL, ANSWER, ANSWERED, ASKED, ASKED_FILE, ASKING_THREAD, BELL, FAILED, HIGHEST, LOWEST,
    SECOND, SPACE, STATE, UNMAPPED, ring,
};
use crate::attributes::{LONGEST_VALUE, QUARANTINE};
use crate::error::{Error, Result};
use crate::sys::markers::Markers;
use crate::sys::thread::{descriptor_of, lent, own_descriptors, spawn};
use rustix::event::epoll;
use rustix::fs::{fgetxattr, fstat, major, minor};
use rustix::io::{Errno, write};
use rustix::process::{Pid, getpid};
use rustix::thread::futex;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write as _;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::{Duration, Instant};

/// The most files that a guard watches.
const MOST_FILES: usize = 256;

/// The time between two looks at a list, if there is no alarm.
const PERIOD: Duration = Duration::from_secs(1);

/// The queue of alarms, for the thread that waits for them.
static QUEUE: AtomicI32 = AtomicI32::new(-1);

/// A file, as long as it is mapped.
struct Watched {
    file: OwnedFd,
    device: (u32, u32),
    inode: u64,
    /// The hash of the list by which the markers were set.
    list: Option<u64>,
    /// True if it may have markers.
    is_marked: bool,
}

struct Watcher {
    markers: Markers,
    queue: OwnedFd,
    files: [Option<Watched>; MOST_FILES],
    text: [u8; LONGEST_VALUE],
    list: List,
}

/// The guard's thread.
pub extern "C" fn run(_: *mut libc::c_void) -> *mut libc::c_void {
    let failed = match Watcher::new() {
        Ok(watcher) => watcher.serve(),
        Err(error) => error,
    };
    say(&failed, "quarantines are not marked");
    STATE.store(FAILED, Ordering::Release);
    let _ = futex::wake(&ANSWERED, futex::Flags::PRIVATE, u32::MAX >> 1);
    std::ptr::null_mut()
}

/// The thread that waits for alarms.
extern "C" fn listen(_: *mut libc::c_void) -> *mut libc::c_void {
    let queue = QUEUE.load(Ordering::Acquire);
    loop {
        match wait_for_alarm(queue) {
            Ok(()) => {
                ALARM.store(true, Ordering::Release);
                ring();
            }
            Err(Errno::INTR) => {}
            Err(_) => return std::ptr::null_mut(), // a look each second has to do
        }
    }
}

fn wait_for_alarm(queue: i32) -> rustix::io::Result<()> {
    let mut events = [const { std::mem::MaybeUninit::uninit() }; 16];
    epoll::wait(lent(queue), &mut events, None).map(drop)
}

/// Writes a line to the program's standard error.
fn say(error: &Error, what: &str) {
    let mut line = [0; 256];
    let mut rest = &mut line[..];
    let _ = writeln!(rest, "hugetlb2 guard: {what}: {error}"); // cut if it is long
    let left = rest.len();
    if let Ok(stderr) = descriptor_of(getpid(), 2) {
        let _ = write(stderr, &line[..line.len() - left]);
    }
}

impl Watcher {
    fn new() -> Result<Self> {
        own_descriptors()?;
        let markers = Markers::new()?;
        let queue = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        QUEUE.store(queue.as_raw_fd(), Ordering::Release);
        spawn(listen)?;
        let files = [const { None }; MOST_FILES];
        Ok(Self { markers, queue, files, text: [0; LONGEST_VALUE], list: List::new() })
    }

    /// Serves until something makes that impossible.
    fn serve(mut self) -> Error {
        let mut next_look = Instant::now() + PERIOD;
        loop {
            let bell = BELL.load(Ordering::Acquire);
            let asked = ASKED.load(Ordering::Acquire);
            if asked != ANSWERED.load(Ordering::Relaxed) {
                let errno = self.answer().err().map_or(0, |error| error.errno().raw_os_error());
                ANSWER.store(errno, Ordering::Relaxed);
                ANSWERED.store(asked, Ordering::Release);
                let _ = futex::wake(&ANSWERED, futex::Flags::PRIVATE, u32::MAX >> 1);
            }
            let now = Instant::now();
            if ALARM.swap(false, Ordering::Acquire) || now >= next_look {
                next_look = now + PERIOD;
                self.forget_unmapped();
                (0..MOST_FILES).for_each(|number| self.look(number));
            }
            let is_idle = self.files.iter().all(Option::is_none);
            let limit = if is_idle { None } else { Some(&SECOND) };
            let _ = futex::wait(&BELL, futex::Flags::PRIVATE, bell, limit);
        }
    }

    /// Answers the question of a thread of the program.
    fn answer(&mut self) -> Result<()> {
        match ASKED_FILE.load(Ordering::Relaxed) {
            ALL => {
                (0..MOST_FILES).for_each(|number| {
                    self.expect_news(number);
                    self.look(number);
                });
                Ok(())
            }
            fd => {
                let thread = Pid::from_raw(ASKING_THREAD.load(Ordering::Relaxed));
                let file = descriptor_of(thread.ok_or(Errno::SRCH)?, fd)?;
                let number = self.adopt(file)?;
                self.expect_news(number);
                self.refresh(number)
            }
        }
    }

    /// Has the next look set all markers of a file.
    fn expect_news(&mut self, number: usize) {
        if let Some(Some(watched)) = self.files.get_mut(number) {
            watched.list = None;
        }
    }

    /// Takes a file into the table, if it is not there. Returns its place.
    fn adopt(&mut self, file: OwnedFd) -> Result<usize> {
        let status = fstat(&file)?;
        let (device, inode) = ((major(status.st_dev), minor(status.st_dev)), status.st_ino);
        let is_it = |entry: &Option<Watched>| {
            entry.as_ref().is_some_and(|one| (one.device, one.inode) == (device, inode))
        };
        if let Some(number) = self.files.iter().position(is_it) {
            return Ok(number);
        }
        let number = self.files.iter().position(Option::is_none).ok_or(Errno::NFILE)?;
        // Edges: an alarm that no program ends would be reported without end.
        let flags = epoll::EventFlags::PRI | epoll::EventFlags::ET;
        epoll::add(&self.queue, &file, epoll::EventData::new_u64(number as u64), flags)?;
        self.files[number] = Some(Watched { file, device, inode, list: None, is_marked: false });
        Ok(number)
    }

    /// Lets go of the files that the process does not map any more.
    fn forget_unmapped(&mut self) {
        if !UNMAPPED.swap(false, Ordering::Acquire) {
            return;
        }
        let mut are_mapped = [false; MOST_FILES];
        let Ok(areas) = Areas::open() else { return };
        for area in areas {
            let is_of = |entry: &Option<Watched>| {
                entry
                    .as_ref()
                    .is_some_and(|one| (one.device, one.inode) == (area.device, area.inode))
            };
            if let Some(number) = self.files.iter().position(is_of) {
                are_mapped[number] = true;
            }
        }
        for (entry, is_mapped) in self.files.iter_mut().zip(are_mapped) {
            if let Some(watched) = entry.take_if(|_| !is_mapped) {
                // The program may have it open, so the queue would keep it.
                let _ = epoll::delete(&self.queue, &watched.file);
            }
        }
    }

    /// Reads a list, and sets the markers by it if it has changed.
    fn look(&mut self, number: usize) {
        // Without an answer the markers stay as they are, and the next look may have one.
        let _ = self.refresh(number);
    }

    fn refresh(&mut self, number: usize) -> Result<()> {
        let Some(Some(watched)) = self.files.get_mut(number) else { return Ok(()) };
        let length = fgetxattr(&watched.file, QUARANTINE, &mut self.text[..])?;
        let text = &self.text[..length.min(LONGEST_VALUE)];
        let mut hasher = DefaultHasher::new();
        text.hash(&mut hasher);
        let hash = hasher.finish();
        if watched.list == Some(hash) {
            return Ok(());
        }
        watched.list = Some(hash);
        self.list.parse(text);
        if text.is_empty() && !watched.is_marked {
            return Ok(());
        }
        watched.is_marked = true;
        let is_done = mark(&self.markers, watched, &self.list);
        match is_done {
            Ok(true) => watched.is_marked = !text.is_empty(),
            _ => watched.list = None, // the next look tries again
        }
        is_done.map(drop)
    }
}

/// Sets and removes markers in all mappings of a file. Returns true if all are set.
fn mark(markers: &Markers, watched: &Watched, list: &List) -> Result<bool> {
    let _held = SPACE.hold();
    let mut is_done = true;
    for area in Areas::open()? {
        if area.is_shared && (area.device, area.inode) == (watched.device, watched.inode) {
            is_done &= mark_area(markers, &area, list)?;
        }
    }
    Ok(is_done)
}

/// The same in one mapping.
fn mark_area(markers: &Markers, area: &Area, list: &List) -> Result<bool> {
    markers.for_each_marked(area.addresses, |marked| {
        list.for_each_good_in(area.bytes_at(marked), |good| {
            let _ = markers.remove(area.addresses_of(good)); // it is mapped
        });
    })?;
    let mut is_done = true;
    for bytes in list.soft_in(area.bytes()) {
        let addresses = area.addresses_of(bytes);
        LOWEST.fetch_min(addresses.start, Ordering::Release);
        HIGHEST.fetch_max(addresses.end, Ordering::Release);
        match markers.mark(addresses) {
            Ok(are_set) => is_done &= are_set,
            Err(Error::Os(Errno::PERM)) => {} // it was mapped by a descriptor for reading only
            Err(error) => return Err(error),
        }
    }
    Ok(is_done)
}
