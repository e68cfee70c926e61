//! `hugetlb2 touch`: a program that maps a file and touches it on command, one line in, one line
//! out. The demonstration and the tests use it as "another process that has the file mapped".
//!
//! ```text
//!   map PATH OFFSET LENGTH shared|private ro|rw   ok
//!   load OFFSET                                   byte N          or: sigbus OFFSET CODE
//!   store OFFSET BYTE                             ok              or: sigbus OFFSET CODE
//!   fill OFFSET LENGTH BYTE                       ok              or: sigbus OFFSET CODE
//!   differ OFFSET LENGTH BYTE                     count N         (bytes that are not BYTE; or: sigbus ...)
//!   walk                                          hits OFFSET:CODE ...   (one touch per subpage)
//!   huge                                          count N         (2 MiB entries that map it, smaps)
//!   advise OFFSET LENGTH ADVICE                   ok              (madvise(2), by number)
//!   bind OFFSET LENGTH NODE                       ok              (mbind(2), MPOL_BIND)
//!   keep-binding OFFSET LENGTH NODE               ok              (a thread does so and undoes it until the program ends)
//!   occupy NODE BYTES                             ok              (takes so much memory from that NUMA node only, and keeps it)
//!   hammer OFFSET [BYTE]                          ok              (a thread stores there until stop: BYTE, or what it loads)
//!   tally TOUCHES                                 count N M       (of so many or more touches that began from now on)
//!   stop                                          count N M       (touches, and how many were SIGBUS)
//!   pin OFFSET                                    ok              (the page there is in a pipe, by vmsplice(2))
//!   pin-for-io OFFSET                             ok              (it is a fixed buffer of an io_uring)
//!   unpin                                         ok
//!   unmap                                         ok
//!   lock PATH flock|fcntl                         ok              (exclusive, without waiting; or: errno E)
//!   unlock                                        ok
//!   pwrite PATH OFFSET LENGTH BYTE                count N         (bytes written; or: errno E)
//!   append PATH LENGTH BYTE                       count N         (as pwrite, with O_APPEND)
//!   pread PATH OFFSET LENGTH                      runs N:BYTE ... (what was read; or: errno E)
//!   truncate PATH SIZE                            ok              (or: errno E)
//!   fallocate PATH MODE OFFSET LENGTH             ok              (or: errno E)
//!   cover PID SOURCE TARGET                       ok              (in that process's mounts, by mount(2), MS_BIND; or: errno E)
//!   uncover PID TARGET                            ok              (umount2(2); or: errno E)
//! ```
//!
//! The five from pwrite on are one system call each on a file that is opened for it. The last two
//! leave the program in the mount namespace of the other process. `error WHY` answers what cannot
//! be done; end of input ends the program.

use hugetlb2fs::sys::policy::{self, Policy};
use hugetlb2fs::sys::sigbus::{Hit, Mapping, Pin, Sharing};
use hugetlb2fs::units::{NumaNode, Range};
use rustix::fs::{FallocateFlags, FlockOperation};
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::process::ExitCode;
use std::str::{FromStr, SplitAsciiWhitespace};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

/// The mapping, the thread that hammers it, what is pinned of it, the file that is locked, and
/// memory that is kept from others.
#[derive(Default)]
struct Toucher {
    mapping: Option<Arc<Mapping>>,
    hammer: Option<Hammer>,
    pin: Option<Pin>,
    locked: Option<File>,
    occupied: Vec<Vec<u8>>,
}

struct Hammer {
    progress: Arc<Progress>,
    thread: JoinHandle<(u64, u64)>,
}

/// Words between a hammer and its owner.
#[derive(Default)]
struct Progress {
    stop: AtomicBool,
    /// Raised to have the touches that begin from then on counted apart.
    epoch: AtomicU64,
    /// The latest [`Tally`], packed so that it is read as it was written.
    latest: AtomicU64,
}

/// Touches that began in one epoch; the counts stop at what fits.
#[derive(Clone, Copy, Default)]
struct Tally {
    epoch: u16,
    touches: u32,
    faults: u32,
}

impl Tally {
    const MOST: u32 = (1 << 24) - 1;

    fn count(&mut self, faulted: bool) {
        self.touches = (self.touches + 1).min(Self::MOST);
        self.faults = (self.faults + u32::from(faulted)).min(Self::MOST);
    }

    fn pack(self) -> u64 {
        u64::from(self.epoch) << 48 | u64::from(self.touches) << 24 | u64::from(self.faults)
    }

    fn unpack(packed: u64) -> Self {
        let field = |shift: u32| (packed >> shift) as u32 & Self::MOST;
        Self { epoch: (packed >> 48) as u16, touches: field(24), faults: field(0) }
    }
}

impl Progress {
    /// Touches until it is told to stop; returns how often, and how often that was SIGBUS.
    fn hammer(&self, mapping: &Mapping, offset: u64, byte: Option<u8>) -> (u64, u64) {
        let (mut touches, mut faults) = (0, 0);
        let mut latest = Tally::default();
        while !self.stop.load(Ordering::Relaxed) {
            let epoch = self.epoch.load(Ordering::SeqCst) as u16;
            let stored = byte.map_or_else(|| mapping.load(offset), Ok);
            let faulted = stored.and_then(|byte| mapping.store(offset, byte)).is_err();
            touches += 1;
            faults += u64::from(faulted);
            if latest.epoch != epoch {
                latest = Tally { epoch, ..Tally::default() };
            }
            latest.count(faulted);
            self.latest.store(latest.pack(), Ordering::SeqCst);
        }
        (touches, faults)
    }

    /// Waits for `touches` touches that begin from now on.
    fn tally(&self, touches: u32) -> Tally {
        let epoch = (self.epoch.fetch_add(1, Ordering::SeqCst) + 1) as u16;
        loop {
            let latest = Tally::unpack(self.latest.load(Ordering::SeqCst));
            if latest.epoch == epoch && latest.touches >= touches.min(Tally::MOST) {
                return latest;
            }
            std::thread::yield_now();
        }
    }
}

/// Serves standard input until its end.
pub fn main() -> ExitCode {
    let mut toucher = Toucher::default();
    let mut out = std::io::stdout().lock();
    for line in std::io::stdin().lock().lines().map_while(Result::ok) {
        let answer = toucher.answer(&line).unwrap_or_else(|why| format!("error {why}"));
        if writeln!(out, "{answer}").and_then(|()| out.flush()).is_err() {
            break;
        }
    }
    ExitCode::SUCCESS
}

fn number<T: FromStr>(words: &mut SplitAsciiWhitespace<'_>) -> Result<T, String> {
    words.next().and_then(|word| word.parse().ok()).ok_or_else(|| "a number is missing".to_owned())
}

/// Runs `change` in the mount namespace of the process that is named first.
fn in_mounts_of(
    words: &mut SplitAsciiWhitespace<'_>,
    change: impl FnOnce(&mut SplitAsciiWhitespace<'_>) -> Result<(), Errno>,
) -> Result<String, String> {
    let process: i32 = number(words)?;
    let namespace =
        File::open(format!("/proc/{process}/ns/mnt")).map_err(|error| error.to_string())?;
    let entered = move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Mount));
    Ok(match entered.and_then(|()| change(words)) {
        Ok(()) => "ok".to_owned(),
        Err(errno) => format!("errno {}", errno.raw_os_error()),
    })
}

fn sigbus(hit: Hit) -> String {
    format!("sigbus {} {}", hit.subpage.offset(), hit.code)
}

impl Toucher {
    fn answer(&mut self, line: &str) -> Result<String, String> {
        let mut words = line.split_ascii_whitespace();
        match words.next() {
            Some("map") => self.map(&mut words),
            Some("load") => {
                let offset = number(&mut words)?;
                Ok(self.mapping()?.load(offset).map_or_else(sigbus, |byte| format!("byte {byte}")))
            }
            Some("store") => {
                let (offset, byte) = (number(&mut words)?, number(&mut words)?);
                Ok(self.mapping()?.store(offset, byte).map_or_else(sigbus, |()| "ok".to_owned()))
            }
            Some("fill") => self.fill(&mut words),
            Some("differ") => self.differ(&mut words),
            Some("walk") => {
                let hits = self.mapping()?.walk();
                let hits = hits.iter().map(|hit| format!(" {}:{}", hit.subpage.offset(), hit.code));
                Ok(hits.fold("hits".to_owned(), |line, hit| line + &hit))
            }
            Some("huge") => {
                huge_entries(self.mapping()?.address()).map(|count| format!("count {count}"))
            }
            Some("advise") => {
                let range = Range::at(number(&mut words)?, number(&mut words)?);
                let advice = number(&mut words)?;
                self.mapping()?.advise_range(range, advice).map_err(|error| error.to_string())?;
                Ok("ok".to_owned())
            }
            Some("bind") => {
                let range = Range::at(number(&mut words)?, number(&mut words)?);
                bind(self.mapping()?, range, number(&mut words)?)
            }
            Some("keep-binding") => {
                let range = Range::at(number(&mut words)?, number(&mut words)?);
                let (mapping, node) = (self.mapping()?.clone(), number(&mut words)?);
                bind(&mapping, range, node)?;
                // The kernel ignores a policy that the mapping has already, so another policy is
                // set in between.
                let set = move |policy| mapping.set_policy(range, policy).is_ok();
                std::thread::spawn(move || {
                    while set(Policy::Default) && set(Policy::Bind(NumaNode(node))) {}
                });
                Ok("ok".to_owned())
            }
            Some("occupy") => self.occupy(number(&mut words)?, number(&mut words)?),
            Some("hammer") => self.hammer(number(&mut words)?, number(&mut words).ok()),
            Some("tally") => self.tally(number(&mut words)?),
            Some("stop") => self.stop(),
            Some("pin") => {
                let pin =
                    self.mapping()?.pin(number(&mut words)?).map_err(|error| error.to_string())?;
                self.pin = Some(pin);
                Ok("ok".to_owned())
            }
            Some("pin-for-io") => {
                let pin = self
                    .mapping()?
                    .pin_for_io(number(&mut words)?)
                    .map_err(|error| error.to_string())?;
                self.pin = Some(pin);
                Ok("ok".to_owned())
            }
            Some("unpin") => {
                self.pin = None;
                Ok("ok".to_owned())
            }
            Some("unmap") => {
                self.mapping = None;
                Ok("ok".to_owned())
            }
            Some("lock") => self.lock(&mut words),
            Some("unlock") => {
                self.locked = None;
                Ok("ok".to_owned())
            }
            Some("pwrite") => call(&mut words, File::options().write(true), pwrite),
            Some("append") => call(&mut words, File::options().append(true), append),
            Some("pread") => call(&mut words, File::options().read(true), pread),
            Some("truncate") => call(&mut words, File::options().write(true), truncate),
            Some("fallocate") => call(&mut words, File::options().write(true), fallocate),
            Some("cover") => in_mounts_of(&mut words, |words| {
                let (source, target) =
                    (words.next().unwrap_or_default(), words.next().unwrap_or_default());
                rustix::mount::mount_bind(source, target)
            }),
            Some("uncover") => in_mounts_of(&mut words, |words| {
                unmount(words.next().unwrap_or_default(), UnmountFlags::empty())
            }),
            other => Err(format!("unknown command {other:?}")),
        }
    }

    fn mapping(&self) -> Result<&Arc<Mapping>, String> {
        self.mapping.as_ref().ok_or_else(|| "nothing is mapped".to_owned())
    }

    fn map(&mut self, words: &mut SplitAsciiWhitespace<'_>) -> Result<String, String> {
        let path = words.next().ok_or("a path is missing")?;
        let range = Range::at(number(words)?, number(words)?);
        let sharing = match words.next() {
            Some("shared") => Sharing::Shared,
            Some("private") => Sharing::Private,
            other => return Err(format!("{other:?} is neither shared nor private")),
        };
        let writable = words.next() == Some("rw");
        let file =
            File::options().read(true).write(writable && sharing == Sharing::Shared).open(path);
        let file = file.map_err(|error| format!("{path}: {error}"))?;
        let mapping =
            Mapping::new(&file, range, sharing, writable).map_err(|error| error.to_string())?;
        self.mapping = Some(Arc::new(mapping));
        Ok("ok".to_owned())
    }

    fn lock(&mut self, words: &mut SplitAsciiWhitespace<'_>) -> Result<String, String> {
        let path = words.next().ok_or("a path is missing")?;
        let file = File::options()
            .read(true)
            .write(true)
            .open(path)
            .map_err(|error| format!("{path}: {error}"))?;
        let locked = match words.next() {
            Some("flock") => rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive),
            Some("fcntl") => {
                rustix::fs::fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive)
            }
            other => return Err(format!("{other:?} is neither flock nor fcntl")),
        };
        if let Err(errno) = locked {
            return Ok(format!("errno {}", errno.raw_os_error()));
        }
        self.locked = Some(file);
        Ok("ok".to_owned())
    }

    fn fill(&self, words: &mut SplitAsciiWhitespace<'_>) -> Result<String, String> {
        let range = Range::at(number(words)?, number(words)?);
        let byte = number(words)?;
        let mapping = self.mapping()?;
        let filled = (range.start..range.end).try_for_each(|offset| mapping.store(offset, byte));
        Ok(filled.map_or_else(sigbus, |()| "ok".to_owned()))
    }

    fn differ(&self, words: &mut SplitAsciiWhitespace<'_>) -> Result<String, String> {
        let range = Range::at(number(words)?, number(words)?);
        let byte: u8 = number(words)?;
        let mapping = self.mapping()?;
        let mut count = 0;
        for offset in range.start..range.end {
            match mapping.load(offset) {
                Ok(found) => count += u64::from(found != byte),
                Err(hit) => return Ok(sigbus(hit)),
            }
        }
        Ok(format!("count {count}"))
    }

    fn occupy(&mut self, node: u32, bytes: usize) -> Result<String, String> {
        policy::set_for_thread(Policy::Bind(NumaNode(node))).map_err(|error| error.to_string())?;
        self.occupied.push(vec![1; bytes]);
        policy::set_for_thread(Policy::Default).map_err(|error| error.to_string())?;
        Ok("ok".to_owned())
    }

    fn hammer(&mut self, offset: u64, byte: Option<u8>) -> Result<String, String> {
        let mapping = self.mapping()?.clone();
        let progress = Arc::new(Progress::default());
        let thread = std::thread::spawn({
            let progress = progress.clone();
            move || progress.hammer(&mapping, offset, byte)
        });
        self.hammer = Some(Hammer { progress, thread });
        Ok("ok".to_owned())
    }

    fn tally(&self, touches: u32) -> Result<String, String> {
        let hammer = self.hammer.as_ref().ok_or("nothing is hammered")?;
        let Tally { touches, faults, .. } = hammer.progress.tally(touches);
        Ok(format!("count {touches} {faults}"))
    }

    fn stop(&mut self) -> Result<String, String> {
        let hammer = self.hammer.take().ok_or("nothing is hammered")?;
        hammer.progress.stop.store(true, Ordering::Relaxed);
        let (touches, faults) =
            hammer.thread.join().map_err(|_| "the hammer panicked".to_owned())?;
        Ok(format!("count {touches} {faults}"))
    }
}

fn bind(mapping: &Mapping, range: Range, node: u32) -> Result<String, String> {
    mapping.set_policy(range, Policy::Bind(NumaNode(node))).map_err(|error| error.to_string())?;
    Ok("ok".to_owned())
}

/// A line on one file: its path, then numbers.
type Words<'a> = SplitAsciiWhitespace<'a>;

/// Opens the file that the line names and makes one system call on it; the answer is `errno E`
/// where either fails.
fn call(
    words: &mut Words<'_>,
    how: &OpenOptions,
    call: impl FnOnce(&File, &mut Words<'_>) -> Result<io::Result<String>, String>,
) -> Result<String, String> {
    let path = words.next().ok_or("a path is missing")?;
    let answer = match how.open(path) {
        Ok(file) => call(&file, words)?,
        Err(error) => Err(error),
    };
    answer.or_else(|error| match error.raw_os_error() {
        Some(errno) => Ok(format!("errno {errno}")),
        None => Err(error.to_string()),
    })
}

fn pwrite(file: &File, words: &mut Words<'_>) -> Result<io::Result<String>, String> {
    let (offset, length, byte) = (number(words)?, number(words)?, number(words)?);
    Ok(file.write_at(&vec![byte; length], offset).map(|count| format!("count {count}")))
}

fn append(mut file: &File, words: &mut Words<'_>) -> Result<io::Result<String>, String> {
    let (length, byte) = (number(words)?, number(words)?);
    Ok(file.write(&vec![byte; length]).map(|count| format!("count {count}")))
}

fn pread(file: &File, words: &mut Words<'_>) -> Result<io::Result<String>, String> {
    let (offset, length) = (number(words)?, number(words)?);
    let mut buffer = vec![0; length];
    Ok(file.read_at(&mut buffer, offset).map(|count| runs(&buffer[..count])))
}

fn runs(bytes: &[u8]) -> String {
    let runs = bytes.chunk_by(|one, next| one == next);
    runs.fold("runs".to_owned(), |line, run| line + &format!(" {}:{}", run.len(), run[0]))
}

fn truncate(file: &File, words: &mut Words<'_>) -> Result<io::Result<String>, String> {
    let size = number(words)?;
    Ok(file.set_len(size).map(|()| "ok".to_owned()))
}

fn fallocate(file: &File, words: &mut Words<'_>) -> Result<io::Result<String>, String> {
    let mode = FallocateFlags::from_bits_retain(number(words)?);
    let (offset, length) = (number(words)?, number(words)?);
    let done: Result<(), Errno> = rustix::fs::fallocate(file, mode, offset, length);
    Ok(done.map(|()| "ok".to_owned()).map_err(io::Error::from))
}

/// The number of 2 MiB entries that map the mapping at `address` (proc(5), smaps).
fn huge_entries(address: usize) -> Result<u64, String> {
    let smaps =
        std::fs::read_to_string("/proc/self/smaps").map_err(|error| format!("smaps: {error}"))?;
    let header = format!("{address:x}-");
    let mut lines = smaps.lines().skip_while(|line| !line.starts_with(&header)).skip(1);
    let is_field = |line: &&str| line.split(' ').next().is_some_and(|word| word.ends_with(':'));
    let kib: u64 = lines
        .by_ref()
        .take_while(is_field)
        .filter(|line| line.starts_with("ShmemPmdMapped:") || line.starts_with("FilePmdMapped:"))
        .filter_map(|line| line.split_ascii_whitespace().nth(1)?.parse::<u64>().ok())
        .sum();
    Ok(kib / 2048)
}
