//! A program that maps a file and touches it on command, one line in, one line out. It is "another
//! process that has the file mapped" of the tests (tests/support/toucher.rs).
//!
//! ```text
//!   map PATH OFFSET LENGTH shared|private ro|rw   ok
//!   load OFFSET                                   byte N          or: sigbus OFFSET CODE
//!   report OFFSET                                 byte N          or: sigbus OFFSET CODE LSB (the last is si_addr_lsb)
//!   store OFFSET BYTE                             ok              or: sigbus OFFSET CODE
//!   fill OFFSET LENGTH BYTE                       ok              or: sigbus OFFSET CODE
//!   differ OFFSET LENGTH BYTE                     count N         (bytes that are not BYTE; or: sigbus ...)
//!   walk                                          hits OFFSET:CODE ...   (one touch per subpage)
//!   step OFFSET LENGTH STEP                       hits OFFSET:CODE ...   (one touch per STEP bytes)
//!   huge                                          count N         (2 MiB entries that map it, smaps)
//!   advise OFFSET LENGTH ADVICE                   ok              (madvise(2), by number)
//!   bind OFFSET LENGTH NODE                       ok              (mbind(2), MPOL_BIND)
//!   mbind OFFSET LENGTH MODE NODES FLAGS          ok              (mbind(2), by number; NODES is a mask)
//!   move OFFSET LENGTH NODE                       ok              (move_pages(2), MPOL_MF_MOVE)
//!   keep-binding OFFSET LENGTH NODE               ok              (a thread does so and undoes it until the program ends)
//!   occupy NODE BYTES                             ok              (takes so much memory from that NUMA node only, and keeps it)
//!   hammer OFFSET [BYTE]                          ok              (a thread stores there until stop: BYTE, or what it loads)
//!   tally TOUCHES                                 count N M       (of so many or more touches that began from now on)
//!   stop                                          count N M       (touches, and how many were SIGBUS)
//!   pin OFFSET                                    ok              (the page there is in a pipe, by vmsplice(2))
//!   pin-for-io OFFSET                             ok              (it is a fixed buffer of an io_uring)
//!   unpin                                         ok
//!   replace OFFSET LENGTH                         ok              (by anonymous memory, in its place)
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

mod calls;
mod hammer;
#[path = "../support/sys/mod.rs"]
mod sys;

use hammer::Hammer;
use hugetlb2fs::sys::policy::{self, Policy};
use hugetlb2fs::sys::sigbus::Hit;
use hugetlb2fs::units::{NumaNode, Range};
use std::fs::File;
use std::io::{BufRead, Write};
use std::process::ExitCode;
use std::str::{FromStr, SplitAsciiWhitespace};
use std::sync::Arc;
use sys::pin::Pin;
use sys::{Mapping, Sharing};

/// The words of a line behind the command.
type Words<'a> = SplitAsciiWhitespace<'a>;

/// An answer, or the reason why there is none.
type Answer<T = String> = Result<T, String>;

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

/// Serves standard input until its end.
fn main() -> ExitCode {
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

fn number<T: FromStr>(words: &mut Words<'_>) -> Answer<T> {
    words.next().and_then(|word| word.parse().ok()).ok_or_else(|| "a number is missing".to_owned())
}

fn range(words: &mut Words<'_>) -> Answer<Range> {
    Ok(Range::at(number(words)?, number(words)?))
}

fn sigbus(hit: Hit) -> String {
    format!("sigbus {} {}", hit.subpage.offset(), hit.code)
}

fn hits(hits: &[Hit]) -> String {
    let hits = hits.iter().map(|hit| format!(" {}:{}", hit.subpage.offset(), hit.code));
    hits.fold("hits".to_owned(), |line, hit| line + &hit)
}

/// `ok`, or the reason of a failure.
fn done<T>(result: hugetlb2fs::error::Result<T>) -> Answer {
    result.map(|_| ok()).map_err(|error| error.to_string())
}

fn ok() -> String {
    "ok".to_owned()
}

impl Toucher {
    fn answer(&mut self, line: &str) -> Answer {
        let mut words = line.split_ascii_whitespace();
        let command = words.next().unwrap_or_default();
        let words = &mut words;
        match command {
            "map" => self.map(words),
            "unmap" => Ok(release(&mut self.mapping)),
            "load" => self.load(number(words)?),
            "report" => self.report(number(words)?),
            "replace" => done(self.mapping()?.replace(range(words)?)),
            "store" => self.store(number(words)?, number(words)?),
            "fill" => self.fill(range(words)?, number(words)?),
            "differ" => self.differ(range(words)?, number(words)?),
            "walk" => Ok(hits(&self.mapping()?.walk())),
            "step" => Ok(hits(&self.mapping()?.step(range(words)?, number(words)?))),
            "huge" => self.huge(),
            "advise" => done(self.mapping()?.advise_range(range(words)?, number(words)?)),
            "bind" => bind(self.mapping()?, range(words)?, number(words)?),
            "mbind" => mbind(self.mapping()?, words),
            "move" => done(self.mapping()?.move_to(range(words)?, NumaNode(number(words)?))),
            "keep-binding" => self.keep_binding(range(words)?, number(words)?),
            "occupy" => self.occupy(number(words)?, number(words)?),
            "hammer" => self.hammer(number(words)?, number(words).ok()),
            "tally" => self.hammer.as_ref().ok_or("nothing is hammered")?.tally(number(words)?),
            "stop" => self.hammer.take().ok_or("nothing is hammered")?.stop(),
            "pin" => self.pin(Pin::in_pipe, number(words)?),
            "pin-for-io" => self.pin(Pin::for_io, number(words)?),
            "unpin" => Ok(release(&mut self.pin)),
            "lock" => calls::lock(words, &mut self.locked),
            "unlock" => Ok(release(&mut self.locked)),
            _ => calls::answer(command, words),
        }
    }

    fn mapping(&self) -> Answer<&Arc<Mapping>> {
        self.mapping.as_ref().ok_or_else(|| "nothing is mapped".to_owned())
    }

    fn map(&mut self, words: &mut Words<'_>) -> Answer {
        let path = words.next().ok_or("a path is missing")?;
        let range = range(words)?;
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
        Ok(ok())
    }

    fn load(&self, offset: u64) -> Answer {
        Ok(self.mapping()?.load(offset).map_or_else(sigbus, |byte| format!("byte {byte}")))
    }

    fn report(&self, offset: u64) -> Answer {
        let loaded = self.mapping()?.load(offset);
        Ok(loaded.map_or_else(
            |hit| format!("{} {}", sigbus(hit), hit.lsb),
            |byte| format!("byte {byte}"),
        ))
    }

    fn store(&self, offset: u64, byte: u8) -> Answer {
        Ok(self.mapping()?.store(offset, byte).map_or_else(sigbus, |()| ok()))
    }

    fn fill(&self, range: Range, byte: u8) -> Answer {
        let mapping = self.mapping()?;
        let filled = (range.start..range.end).try_for_each(|offset| mapping.store(offset, byte));
        Ok(filled.map_or_else(sigbus, |()| ok()))
    }

    fn differ(&self, range: Range, byte: u8) -> Answer {
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

    fn huge(&self) -> Answer {
        huge_entries(self.mapping()?.address()).map(|count| format!("count {count}"))
    }

    /// The kernel ignores a policy that the mapping has already, so another policy is set in
    /// between.
    fn keep_binding(&self, range: Range, node: u32) -> Answer {
        let mapping = self.mapping()?.clone();
        bind(&mapping, range, node)?;
        let set = move |policy| mapping.set_policy(range, policy).is_ok();
        std::thread::spawn(
            move || {
                while set(Policy::Default) && set(Policy::Bind(NumaNode(node))) {}
            },
        );
        Ok(ok())
    }

    fn occupy(&mut self, node: u32, bytes: usize) -> Answer {
        done(policy::set_for_thread(Policy::Bind(NumaNode(node))))?;
        self.occupied.push(vec![1; bytes]);
        done(policy::set_for_thread(Policy::Default))
    }

    fn hammer(&mut self, offset: u64, byte: Option<u8>) -> Answer {
        self.hammer = Some(Hammer::start(self.mapping()?.clone(), offset, byte));
        Ok(ok())
    }

    fn pin(
        &mut self,
        pin: impl FnOnce(&Mapping, u64) -> hugetlb2fs::error::Result<Pin>,
        offset: u64,
    ) -> Answer {
        done(pin(self.mapping()?, offset).map(|pin| self.pin = Some(pin)))
    }
}

fn release<T>(held: &mut Option<T>) -> String {
    *held = None;
    ok()
}

fn bind(mapping: &Mapping, range: Range, node: u32) -> Answer {
    done(mapping.set_policy(range, Policy::Bind(NumaNode(node))))
}

fn mbind(mapping: &Mapping, words: &mut Words<'_>) -> Answer {
    done(mapping.bind(range(words)?, number(words)?, number(words)?, number(words)?))
}

/// The number of 2 MiB entries that map the mapping at `address` (proc(5), smaps).
fn huge_entries(address: usize) -> Answer<u64> {
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
