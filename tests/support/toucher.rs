//! Another process that maps a file.

use super::limits::{self, Remedy};
use super::{built, end};
use rustix::process::{Signal, pidfd_send_signal};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

/// The program of the other process.
fn program() -> PathBuf {
    built("HUGETLB2_TOUCHER", option_env!("CARGO_BIN_EXE_toucher"))
}

/// Another process that maps a file and touches it. `tests/toucher/program.rs` defines the language
/// of its commands.
pub struct Toucher {
    child: Child,
    process: OwnedFd,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Toucher {
    pub fn start() -> Self {
        Self::start_by(Command::new(program()))
    }

    /// The command that starts it under `hugetlb2 guard`.
    pub fn guarded() -> Command {
        let mut command = super::guard();
        command.arg(program());
        command
    }

    /// Starts it by a command that becomes its process.
    pub fn start_by(mut command: Command) -> Self {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the program can be started");
        let input = child.stdin.take().expect("a pipe");
        let output = BufReader::new(child.stdout.take().expect("a pipe"));
        Self { process: limits::process(&child), child, input, output }
    }

    /// Starts a process that maps all of `file`, which has `length` bytes, shared and writable.
    pub fn mapping(file: &Path, length: u64) -> Self {
        let mut toucher = Self::start();
        toucher.map(file, 0, length, "shared rw");
        toucher
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn map(&mut self, file: &Path, offset: u64, length: u64, how: &str) {
        assert_eq!(self.ask(&format!("map {} {offset} {length} {how}", file.display())), "ok");
    }

    pub fn ask(&mut self, line: &str) -> String {
        self.ask_within(limits::ANSWER, line)
    }

    /// Asks and returns the answer, which is empty if the process has ended.
    pub fn ask_within(&mut self, limit: Duration, line: &str) -> String {
        let what = format!("the answer of process {} to {line:?}", self.child.id());
        let process = self.process.try_clone().expect("a descriptor");
        let waiting = limits::begin(limit, what, Remedy::Kill(process));
        let mut answer = String::new();
        let asked = writeln!(self.input, "{line}");
        let answered = asked.and_then(|()| self.output.read_line(&mut answer));
        drop(waiting);
        answered.expect("it answers");
        answer.trim_end().to_owned()
    }

    /// Stops the process where it is.
    pub fn freeze(&self) {
        pidfd_send_signal(&self.process, Signal::STOP).expect("it runs");
    }

    /// The byte at `offset`, or `None` for SIGBUS.
    pub fn load(&mut self, offset: u64) -> Option<u8> {
        let answer = self.ask(&format!("load {offset}"));
        match answer.split_once(' ') {
            Some(("byte", byte)) => Some(byte.parse().expect("a byte")),
            Some(("sigbus", _)) => None,
            _ => panic!("load {offset}: {answer}"),
        }
    }

    /// Stores a byte. Returns false if the store met SIGBUS.
    pub fn store(&mut self, offset: u64, byte: u8) -> bool {
        let answer = self.ask(&format!("store {offset} {byte}"));
        assert!(answer == "ok" || answer.starts_with("sigbus"), "store {offset}: {answer}");
        answer == "ok"
    }

    /// Offsets of the subpages whose first byte is SIGBUS.
    pub fn walk(&mut self) -> Vec<u64> {
        self.hits("walk")
    }

    /// Offsets of the subpages that are SIGBUS where the process touches every `step` bytes.
    pub fn step(&mut self, part: std::ops::Range<u64>, step: u64) -> Vec<u64> {
        self.hits(&format!("step {} {} {step}", part.start, part.end - part.start))
    }

    fn hits(&mut self, line: &str) -> Vec<u64> {
        let answer = self.ask(line);
        let hits = answer.strip_prefix("hits").unwrap_or_else(|| panic!("{line}: {answer}"));
        hits.split_ascii_whitespace()
            .map(|hit| hit.split_once(':').expect("offset and code").0.parse().expect("an offset"))
            .collect()
    }

    /// Asks and returns the number behind `count`.
    pub fn count(&mut self, line: &str) -> u64 {
        let answer = self.ask(line);
        let count = answer.strip_prefix("count ").unwrap_or_else(|| panic!("{line}: {answer}"));
        count.split(' ').next().expect("a word").parse().expect("a number")
    }

    /// The number of 2 MiB entries that map the file.
    pub fn huge(&mut self) -> u64 {
        self.count("huge")
    }
}

impl Drop for Toucher {
    fn drop(&mut self) {
        end(&mut self.child, "a process that maps a file");
    }
}
