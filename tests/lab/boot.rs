//! One boot of a machine: starts QEMU, asks the guest for cases, and collects their results.

use crate::cases::Machine;
use crate::image::{Image, directory};
use crate::support::{end, limits};
use libtest_mimic::{Completion, Failed};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// A boot takes 3 s on an idle machine.
const BOOT_DEADLINE: Duration = Duration::from_secs(90);
/// The longest case takes about 10 s on an idle machine.
const CASE_DEADLINE: Duration = Duration::from_secs(120);
/// A machine within the machine is emulated twice.
const NESTED_DEADLINE: Duration = Duration::from_secs(900);
const SHUT_DOWN_DEADLINE: Duration = Duration::from_secs(20);

/// `no_timer_check`: on a busy host an emulated timer is late, and the kernel would take it for
/// broken.
const COMMAND_LINE: &str =
    "console=ttyS0 panic=-1 mitigations=off random.trust_cpu=on no_timer_check";

/// The processors take turns. With a thread for each of them, the emulator can run an instruction
/// that another processor has just replaced. The kernel replaces instructions of its own while it
/// runs, and ends with "Oops: int3" then.
const ACCELERATOR: &str = "tcg,thread=single";

/// Without CMPXCHG16B: QEMU 7.2 leaves wrong flags (helper_cmpxchg16b_unlocked takes the
/// flags of an earlier instruction for computed). An interrupt right after the instruction then
/// brings the kernel to a double fault. A wait for memory, as in postcopy, makes such an interrupt
/// likely.
///
/// Without the promise that string instructions for bytes are fast (ERMS, FSRM): QEMU emulates each
/// byte by itself, and the kernel would clear and copy all memory by these.
const PROCESSOR: &str = "max,cx16=off,erms=off,fsrm=off";

/// A disk of zeros, which takes no memory of the host. Its cache takes the guest's.
const DISK: &str = "if=none,id=disk,driver=null-co,size=2G,read-zeroes=on";

/// A running machine. Dropping it pulls the plug.
pub struct Boot {
    qemu: Child,
    input: ChildStdin,
    lines: Receiver<String>,
    console: PathBuf,
    /// The limit of a case.
    deadline: Duration,
}

/// The result of a case.
pub enum Verdict {
    Passed,
    Failed(String),
    Skipped(String),
    /// The machine has ended.
    Ended,
    /// The machine has not answered in time.
    Hung,
}

/// The result of a case, with all output.
pub struct Report {
    pub verdict: Verdict,
    /// Output of the case.
    pub output: String,
    /// Output of the kernel during the case.
    console: String,
}

impl Boot {
    /// Boots a machine and waits until the guest is ready for a case.
    pub fn start(machine: Machine) -> Result<Self, String> {
        let boot = Self::spawn(machine, &[])?;
        boot.wait_until_ready()?;
        Ok(boot)
    }

    /// Starts QEMU for a machine, with `more` arguments.
    pub fn spawn(machine: Machine, more: &[String]) -> Result<Self, String> {
        Self::spawn_by(None, machine, more)
    }

    /// As [`Boot::spawn`], by a command that executes its arguments.
    pub fn spawn_by(
        by: Option<Command>,
        machine: Machine,
        more: &[String],
    ) -> Result<Self, String> {
        static BOOTS: AtomicU32 = AtomicU32::new(0);
        let image = Image::get()?;
        let number = BOOTS.fetch_add(1, Ordering::Relaxed);
        let console = directory().join(format!("console.{number}"));
        let mut command = command(&image, machine, &console);
        if let Some(mut by) = by {
            by.arg(command.get_program()).args(command.get_args());
            command = by;
        }
        let mut qemu =
            command.args(more).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().map_err(
                |error| format!("qemu-system-x86_64 (Debian's qemu-system-x86): {error}"),
            )?;
        let input = qemu.stdin.take().expect("a pipe");
        let output = qemu.stdout.take().expect("a pipe");
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            let lines = BufReader::new(output).lines().map_while(Result::ok);
            lines.map_while(|line| sender.send(line).ok()).for_each(drop);
        });
        let deadline = if machine.nested { NESTED_DEADLINE } else { CASE_DEADLINE };
        Ok(Self { qemu, input, lines, console, deadline })
    }

    /// Waits until the guest is ready for a case.
    pub fn wait_until_ready(&self) -> Result<(), String> {
        match self.next_line(Instant::now() + BOOT_DEADLINE) {
            Ok(line) if line == "ready" => Ok(()),
            other => Err(format!(
                "the machine does not come up ({other:?}); its console:\n{}",
                self.console_from(0)
            )),
        }
    }

    /// QEMU's process id.
    pub fn pid(&self) -> u32 {
        self.qemu.id()
    }

    /// Waits until QEMU has ended, and returns its exit status.
    pub fn wait_for_end(&mut self) -> std::process::ExitStatus {
        limits::exit(CASE_DEADLINE, "QEMU", &mut self.qemu)
    }

    fn next_line(&self, deadline: Instant) -> Result<String, RecvTimeoutError> {
        let line = self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now()))?;
        Ok(line.trim_end().to_owned())
    }

    /// True if QEMU has ended by itself.
    pub fn has_ended(&mut self) -> bool {
        !matches!(self.qemu.try_wait(), Ok(None))
    }

    /// Runs the case `name` in the guest.
    pub fn run(&mut self, name: &str) -> Report {
        let deadline = Instant::now() + self.deadline;
        let start = self.console_bytes().len();
        let mut output = String::new();
        let verdict = match writeln!(self.input, "run {name}") {
            Ok(()) => self.wait_for(name, deadline, &mut output),
            Err(_) => Verdict::Ended,
        };
        Report { verdict, output, console: self.console_from(start) }
    }

    fn wait_for(&self, name: &str, deadline: Instant, output: &mut String) -> Verdict {
        loop {
            let line = match self.next_line(deadline) {
                Ok(line) => line,
                Err(RecvTimeoutError::Timeout) => return Verdict::Hung,
                Err(RecvTimeoutError::Disconnected) => return Verdict::Ended,
            };
            if let Some(text) = line.strip_prefix("output ") {
                output.push_str(text);
                output.push('\n');
            } else if let Some(verdict) = verdict(&line, name) {
                return verdict;
            }
        }
    }

    /// Turns the machine off and waits for its end.
    pub fn shut_down(mut self) {
        let asked = writeln!(self.input, "off");
        let deadline = Instant::now() + SHUT_DOWN_DEADLINE;
        while asked.is_ok() && self.next_line(deadline).is_ok() {}
    }

    fn console_bytes(&self) -> Vec<u8> {
        fs::read(&self.console).unwrap_or_default()
    }

    fn console_from(&self, start: usize) -> String {
        let bytes = self.console_bytes();
        String::from_utf8_lossy(bytes.get(start..).unwrap_or_default()).replace('\r', "")
    }
}

impl Drop for Boot {
    fn drop(&mut self) {
        end(&mut self.qemu, "QEMU");
    }
}

/// Reads a line `case NAME passed`, `case NAME failed WHY` or `case NAME skipped WHY`.
fn verdict(line: &str, name: &str) -> Option<Verdict> {
    let rest = line.strip_prefix("case ")?.strip_prefix(name)?.strip_prefix(' ')?;
    let (word, why) = rest.split_once(' ').unwrap_or((rest, ""));
    match word {
        "passed" => Some(Verdict::Passed),
        "failed" => Some(Verdict::Failed(why.to_owned())),
        "skipped" => Some(Verdict::Skipped(why.to_owned())),
        _ => None,
    }
}

/// The QEMU that `tests/lab/fetch-nested` fetches.
pub fn qemu_10() -> PathBuf {
    directory().join("nested/qemu-system-x86_64")
}

fn command(image: &Image, machine: Machine, console: &std::path::Path) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    // A machine that runs KVM came to a standstill under QEMU 7.2 once in some thirty runs: its
    // kernel waited for ever, and so did all limits of time in it. QEMU 10 is faster there, too.
    if machine.by_qemu_10 || machine.nested && qemu_10().exists() {
        command = Command::new(qemu_10());
        command.arg("-L").arg(directory().join("nested"));
    }
    command
        .args(["-accel", ACCELERATOR, "-cpu", PROCESSOR])
        .args(["-machine", if machine.hmat { "pc,hmat=on" } else { "pc" }])
        .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"])
        .args(["-smp", &format!("{0},sockets={0}", machine.processors)])
        .args(["-m", &machine.memory.to_string()])
        .arg("-kernel")
        .arg(&image.kernel)
        .arg("-initrd")
        .arg(image.initramfs_of(machine))
        .arg("-append")
        .arg(format!("{COMMAND_LINE} {}", machine.command_line))
        .arg("-serial")
        .arg(format!("file:{}", console.display()))
        .args(["-serial", "stdio"]);
    if machine.nodes > 1 {
        command.args(numa(machine)).args(["-drive", DISK, "-device", "nvme,drive=disk,serial=0"]);
    }
    command
}

/// The way from a processor's node to memory, as the firmware tells it.
struct Way {
    /// In nanoseconds.
    latency: u32,
    /// In GiB/s.
    bandwidth: u32,
    /// In the units of the firmware's other table (SLIT).
    distance: u32,
}

impl Way {
    fn new(from: u64, to: u64) -> Self {
        let (latency, bandwidth, distance) = match (from, to) {
            _ if from == to => (80, 200, 10),
            (0 | 1, 0 | 1) => (160, 100, 21),
            (0, 2) | (2, 0) => (250, 60, 24),
            (1, 2) | (2, 1) => (300, 50, 28),
            (1, 3) | (3, 1) => (90, 800, 13),
            _ => (170, 100, 23),
        };
        Self { latency, bandwidth, distance }
    }
}

/// The arguments for NUMA nodes with equal shares of the memory, and one processor in each of the
/// first two. The third is slow memory beside the first, and the fourth is fast memory beside the
/// second.
fn numa(machine: Machine) -> Vec<String> {
    let share = machine.memory / machine.nodes;
    let mut arguments = Vec::new();
    let mut option = |name: &str, value: String| arguments.extend([name.to_owned(), value]);
    for node in 0..machine.nodes {
        let nearest = node % 2;
        let initiator = if machine.hmat { format!(",initiator={nearest}") } else { String::new() };
        option("-object", format!("memory-backend-ram,id=node{node},size={share}M"));
        option("-numa", format!("node,nodeid={node},memdev=node{node}{initiator}"));
        if node < 2 {
            option("-numa", format!("cpu,node-id={node},socket-id={node}"));
        }
    }
    for (from, to) in
        (0..machine.nodes).flat_map(|from| (0..machine.nodes).map(move |to| (from, to)))
    {
        let Way { latency, bandwidth, distance } = Way::new(from, to);
        option("-numa", format!("dist,src={from},dst={to},val={distance}"));
        if machine.hmat && from < 2 {
            let of = format!("hmat-lb,initiator={from},target={to},hierarchy=memory");
            option("-numa", format!("{of},data-type=access-latency,latency={latency}"));
            option("-numa", format!("{of},data-type=access-bandwidth,bandwidth={bandwidth}G"));
        }
    }
    arguments
}

impl Report {
    /// The result of the test.
    pub fn judge(self, name: &str, ends_kernel: Option<&str>) -> Result<Completion, Failed> {
        let why = match (&self.verdict, ends_kernel) {
            (Verdict::Ended, Some(words)) if self.console.contains(words) => {
                return Ok(Completion::Completed);
            }
            (Verdict::Passed, None) => {
                if !self.output.is_empty() && !name.contains("::") {
                    println!("---- {name}\n{}", self.output);
                }
                return Ok(Completion::Completed);
            }
            (Verdict::Skipped(why), _) => return Ok(Completion::ignored_with(why)),
            (Verdict::Passed, Some(_)) => "the kernel has survived it".to_owned(),
            (Verdict::Failed(why), _) => why.clone(),
            (Verdict::Ended, _) => "the machine has ended".to_owned(),
            (Verdict::Hung, _) => "no end within the limit of a case".to_owned(),
        };
        Err(format!("{why}\n---- output\n{}---- kernel\n{}", self.output, self.console).into())
    }
}
