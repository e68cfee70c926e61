//! The other process of the demonstration: it maps a file and touches it on command.
//!
//! A command is a line of its standard input, and an answer is a line of numbers:
//!
//! ```text
//!   walk          OFFSET ...   the subpages that answer a touch with SIGBUS
//!   work OFFSET                (none: a thread loads and stores there until rest)
//!   rest          COUNT        touches of that thread that were SIGBUS
//! ```

use crate::terminal::say;
use hugetlb2fs::sys::sigbus::Touchable;
use memmap2::MmapOptions;
use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

/// The name by which this program is called for it.
pub const NAME: &str = "hugetlb2-demo-mapper";

// ---- from outside -------------------------------------------------------------------------------

/// The process.
pub struct Mapper {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Mapper {
    /// Starts a process that maps all of `file`.
    pub fn start(file: &Path) -> Result<Self, String> {
        let failed = |error| format!("another process: {error}");
        let mut command = Command::new(std::env::current_exe().map_err(failed)?);
        command.arg0(NAME).arg(file).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().map_err(failed)?;
        let pipes = child.stdin.take().zip(child.stdout.take());
        let (input, output) = pipes.ok_or("the other process has no pipes")?;
        Ok(Self { child, input, output: BufReader::new(output) })
    }

    fn ask(&mut self, line: &str) -> Result<Vec<u64>, String> {
        let mut answer = String::new();
        writeln!(self.input, "{line}")
            .and_then(|()| self.output.read_line(&mut answer))
            .map_err(|error| format!("the other process: {error}"))?;
        let numbers = answer.strip_suffix('\n').ok_or("the other process has ended")?;
        let numbers: Result<_, _> = numbers.split_ascii_whitespace().map(str::parse).collect();
        numbers.map_err(|_| format!("{line}: {answer}"))
    }

    /// The offsets of the subpages that answer a touch with SIGBUS.
    pub fn walk(&mut self) -> Result<Vec<u64>, String> {
        self.ask("walk")
    }

    /// Has a thread of the process load and store at `offset` from now on.
    pub fn work(&mut self, offset: u64) -> Result<(), String> {
        self.ask(&format!("work {offset}")).map(drop)
    }

    /// Ends that thread. Returns how many of its touches were SIGBUS.
    pub fn rest(&mut self) -> Result<u64, String> {
        self.ask("rest")?.first().copied().ok_or_else(|| "rest: no number".to_owned())
    }

    /// The 2 MiB entries that map the file (proc(5), /proc/PID/smaps_rollup; the process maps no
    /// other file of tmpfs).
    pub fn huge_entries(&self) -> Result<u64, String> {
        let path = format!("/proc/{}/smaps_rollup", self.child.id());
        let text = std::fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))?;
        let kib = text.lines().find_map(|line| line.strip_prefix("ShmemPmdMapped:"));
        let kib = kib.and_then(|rest| rest.trim().strip_suffix(" kB")?.parse::<u64>().ok());
        kib.map(|kib| kib >> 11).ok_or_else(|| format!("{path} has no ShmemPmdMapped"))
    }
}

impl Drop for Mapper {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

// ---- inside -------------------------------------------------------------------------------------

/// Maps the file that the arguments name, and serves standard input until its end.
pub fn main(arguments: &[OsString]) -> ExitCode {
    match arguments.get(1).ok_or("no file".to_owned()).and_then(|file| serve(Path::new(file))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            say(format_args!("{NAME}: {why}"));
            ExitCode::FAILURE
        }
    }
}

fn serve(file: &Path) -> Result<(), String> {
    let opened = File::options().read(true).write(true).open(file);
    let map = opened.and_then(|file| MmapOptions::new().map_raw(&file));
    let map = map.map_err(|error| format!("{}: {error}", file.display()))?;
    let memory = Arc::new(Touchable::new(map, 0).map_err(|error| error.to_string())?);
    let mut work = None;
    for line in std::io::stdin().lock().lines().map_while(Result::ok) {
        match line.split_once(' ').unwrap_or((&line, "")) {
            ("walk", _) => print(memory.walk().iter().map(|hit| hit.subpage.offset()))?,
            ("work", offset) => {
                let offset = offset.parse().map_err(|_| format!("{line}: no offset"))?;
                work = Some(Work::start(memory.clone(), offset));
                print([])?;
            }
            ("rest", _) => print(work.take().map(Work::end))?,
            _ => return Err(format!("{line}: no command")),
        }
    }
    Ok(())
}

fn print(numbers: impl IntoIterator<Item = u64>) -> Result<(), String> {
    let line = numbers.into_iter().fold(String::new(), |line, number| line + &format!("{number} "));
    writeln!(std::io::stdout(), "{line}").map_err(|error| format!("standard output: {error}"))
}

/// A thread that uses one byte.
struct Work {
    is_over: Arc<AtomicBool>,
    thread: JoinHandle<u64>,
}

impl Work {
    fn start(memory: Arc<Touchable>, offset: u64) -> Self {
        let is_over = Arc::new(AtomicBool::new(false));
        let thread = std::thread::spawn({
            let is_over = is_over.clone();
            move || {
                let touch = || memory.load(offset).and_then(|byte| memory.store(offset, byte));
                let mut faults = 0;
                while !is_over.load(Ordering::Relaxed) {
                    faults += u64::from(touch().is_err());
                }
                faults
            }
        });
        Self { is_over, thread }
    }

    /// Ends the thread. Returns its touches that were SIGBUS.
    fn end(self) -> u64 {
        self.is_over.store(true, Ordering::Relaxed);
        self.thread.join().expect("it does not panic")
    }
}
