//! The command hugetlb2: for people. Everything it does goes through the filesystem's attributes.

use crate::mappers::{self, Misaligned};
use crate::targets::Table;
use crate::terminal::{Meter, say};
use crate::{
    attributes, daemons, demo, door, guard, manual, metrics, migrate, mount, mounts, session,
    umount,
};
use clap::{CommandFactory, Parser, Subcommand, ValueEnum};
use hugetlb2fs::attributes::Counter;
use hugetlb2fs::placement::Placement;
use hugetlb2fs::quarantine;
use rustix::fs::statvfs;
use rustix::io::Errno;
use rustix::process::geteuid;
use serde_json::{Map, Value, json};
use std::ffi::OsString;
use std::fmt::{Display, Write as _};
use std::fs::Metadata;
use std::io::{ErrorKind, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc;
use std::time::Duration;

const FAILED: u8 = 1;

/// Looks after pools of gigantic pages and the files in them.
#[derive(Parser)]
#[command(name = "hugetlb2", version, about, propagate_version = true)]
struct Cli {
    /// Answer in JSON
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Show the mounted pools, or those mounted on the directories given
    Status {
        /// Mount points
        directories: Vec<PathBuf>,
    },
    /// Print the counters of the mounted pools, or of those given, as OpenMetrics text
    ///
    /// For node_exporter's textfile collector: write the text to a file beside its place, and
    /// rename it. A pool whose daemon does not answer within two seconds has hugetlb2_pool_up 0.
    Metrics {
        /// Mount points
        directories: Vec<PathBuf>,
    },
    /// Show the kinds of memory that a pool has: a line for each NUMA node
    ///
    /// Capacity is the node's memory. Latencies and bandwidths are those that the firmware tells
    /// for accesses from the initiators; where it tells none, Distance has the distance of each
    /// initiator instead, which is 10 at least and no time. pool_bytes is the pool's part of the
    /// node's memory, and free_bytes are left of it for files.
    Targets {
        /// The mount point
        directory: PathBuf,
    },
    /// Show what is quarantined in a file, or quarantine a range of it
    ///
    /// A range is rounded outward to 4 KiB. Its bytes are kept as far as they can be read, for
    /// `repair salvage`.
    Poison {
        /// The file
        file: PathBuf,
        /// First byte and number of bytes, decimal or 0x hexadecimal; nothing, to show
        #[arg(num_args = 2, value_names = ["OFFSET", "LENGTH"])]
        range: Vec<String>,
        /// By a real memory error in each subpage, whose memory the kernel gives up for good. On a
        /// kernel without memory errors, it is a quarantine that keeps no bytes. Root only
        #[arg(long, requires = "range")]
        hw: bool,
    },
    /// Put quarantined memory back into use
    Repair {
        /// The file
        file: PathBuf,
        /// zero: with zeros in it; salvage: with every byte that is still known, zeros elsewhere
        #[arg(value_enum)]
        verb: Verb,
        /// `all`, or first byte and number of bytes (decimal or 0x hexadecimal)
        #[arg(num_args = 1..=2, required = true, value_names = ["all|OFFSET", "LENGTH"])]
        target: Vec<String>,
    },
    /// Put huge mappings back now, where memory has come to lie in small pages
    Collapse {
        /// The file
        file: PathBuf,
        /// `all`, or first byte and number of bytes (decimal or 0x hexadecimal)
        #[arg(num_args = 1..=2, required = true, value_names = ["all|OFFSET", "LENGTH"])]
        target: Vec<String>,
    },
    /// Show how a file is mapped: offset, length, state, NUMA node
    Map {
        /// The file
        file: PathBuf,
    },
    /// Show or choose the NUMA nodes from which a file takes its memory
    ///
    /// Shows what is asked for, and the bytes that the file has on each node: with `full` behind
    /// them if the nodes that are asked for have no room for them, with `pinned` if they could not
    /// be moved as a device held them, and with `earlier` if the nodes had no room when the file
    /// grew. A placement counts when a file grows. Words for a file move the
    /// memory that it has, while programs use it. What is made in a directory inherits the
    /// placement that the directory has at that time.
    #[command(after_help = PLACEMENT_WORDS)]
    Placement {
        /// The file or directory
        path: PathBuf,
        /// The words for it; nothing, to show
        words: Option<String>,
    },
    /// Move the memory of a file to other NUMA nodes, while programs use it
    ///
    /// Sets the placement of the file, as `placement FILE WORDS` does, shows on a terminal how much
    /// has moved, and shows at the end where the memory lies. Memory that the nodes have no room
    /// for stays where it is; with `strict:`, nothing moves then, and this fails. If this is
    /// interrupted, the words stay, what has moved stays, and the rest moves when this is called
    /// again. (For the files that a directory will get: `placement DIRECTORY WORDS`.)
    #[command(after_help = PLACEMENT_WORDS)]
    Move {
        /// The file
        file: PathBuf,
        /// The words
        #[arg(long, value_name = "PLACEMENT")]
        to: String,
    },
    /// Have the kernel treat a subpage as if the hardware had reported an error in it; for tests,
    /// root only
    Inject {
        /// The file
        file: PathBuf,
        /// Any byte of the subpage, decimal or 0x hexadecimal
        offset: String,
    },
    /// Show how much free memory is cleared ahead, or wait until enough is
    ///
    /// A pool that is mounted with clear=ahead clears up to half of its free memory in the
    /// background, for the files that come next.
    Ready {
        /// The mount point
        directory: PathBuf,
        /// Wait until nothing more is to be cleared; a terminal shows how much is
        #[arg(long)]
        wait: bool,
    },
    /// Run a program for which quarantines on request are memory errors
    ///
    /// Where COMMAND maps a file of a pool shared and writable, a touch of a quarantined subpage is
    /// SIGBUS with BUS_MCEERR_AR, as for a real memory error: QEMU tells its guest of it, and goes
    /// on. Other programs get BUS_ADRERR as before, and no memory is given up. What COMMAND starts
    /// is guarded, too. A library is loaded into COMMAND for that (LD_PRELOAD), so a static program
    /// or one that is set-user-ID is refused. A subpage that is quarantined while COMMAND runs is
    /// BUS_ADRERR for the moment until the library has marked it, and one that is repaired is lost
    /// to COMMAND for up to a second more. A child process that does not exec a program is not
    /// guarded. The kernel needs CONFIG_MEMORY_FAILURE.
    ///
    /// hugetlb2 guard -- qemu-system-x86_64 -accel kvm ...
    Guard {
        /// The program and its arguments
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        command: Vec<OsString>,
    },
    /// Move a virtual machine to another QEMU, and the losses of its memory with it
    ///
    /// QEMU ends by SIGBUS if it meets a quarantined subpage while it moves its memory. So `out`
    /// gives each subpage its bytes back, as far as they are known, and moves the machine. `in`
    /// makes subpages whose bytes are lost memory errors of the destination. A machine with lost
    /// bytes stands still meanwhile; otherwise it runs. Both need a QMP monitor of their QEMU.
    ///
    /// hugetlb2 migrate out --qmp S --to tcp:HOST:PORT | ssh HOST hugetlb2 migrate in --qmp D
    Migrate {
        #[command(subcommand)]
        direction: Direction,
    },
    /// Run a program with a descriptor of a file's memory: of the file on tmpfs that programs map
    ///
    /// For programs that look at the filesystem of a file, as QEMU 8.1 and later does before it
    /// migrates by postcopy: mem-path=/dev/fd/3 there. The file must be a multiple of 2 MiB long
    /// and have no soft quarantines; as long as a program has the descriptor open or maps it,
    /// nothing changes the file's size, pages or quarantine (EBUSY), and memory that the program
    /// punches is the machine's. A user who may write the file may do this.
    Open {
        /// The file
        file: PathBuf,
        /// The number of the descriptor
        #[arg(long, value_name = "NUMBER", default_value_t = 3)]
        fd: i32,
        /// The program and its arguments
        #[arg(last = true, required = true)]
        command: Vec<OsString>,
    },
    /// Verify a pool while it is in use; exit status 1 if something does not hold
    Check {
        /// The mount point
        directory: PathBuf,
    },
    /// Replace the daemon of a pool in use, by another version or the same; no call fails, no
    /// mapping notices
    ///
    /// A version that does not know what the other leaves to it refuses, and the other goes on.
    Upgrade {
        /// The mount point
        directory: PathBuf,
        /// The new hugetlb2fsd; the one beside this program or in /usr/local/sbin or /usr/sbin, if
        /// none is given
        #[arg(long)]
        binary: Option<PathBuf>,
    },
    /// Write the man pages and the completions of shells below a directory, as /usr/share has them
    Generate {
        /// The directory
        directory: PathBuf,
    },
    /// Show on real memory what this filesystem is for; needs root, 2 GiB and a few seconds
    Demo,
    /// Mount a pool: mount.hugetlb2 by another name, see `hugetlb2 mount --help`
    #[command(disable_help_flag = true)]
    Mount {
        /// The arguments of mount.hugetlb2
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
}

#[derive(Subcommand)]
enum Direction {
    /// At the source: move the machine away, and write its losses to standard output
    ///
    /// If the migration fails, the machine and its quarantines are as before.
    Out {
        /// The socket of QEMU's monitor (-qmp unix:SOCKET,server=on,wait=off)
        #[arg(long, value_name = "SOCKET")]
        qmp: PathBuf,
        /// The address on which the other QEMU waits (-incoming), as in tcp:HOST:PORT
        #[arg(long, value_name = "URI")]
        to: String,
    },
    /// At the destination: read the losses from standard input, and have the machine go on
    ///
    /// Each lost subpage becomes a real memory error, which costs its frame.
    In {
        /// The socket of QEMU's monitor
        #[arg(long, value_name = "SOCKET")]
        qmp: PathBuf,
        /// Give up no frames: this QEMU runs under `hugetlb2 guard`, so a quarantine is a memory
        /// error of it
        #[arg(long)]
        keep_frames: bool,
    },
}

/// The help for the words of a placement.
const PLACEMENT_WORDS: &str = "\
Words:
  caller               as the memory policy of the thread that makes the file grow (numactl);
                       this is the default
  local                the node of the processor that this thread runs on
  bind:NODES           these nodes, the nearest first
  preferred:NODES      the same
  interleave:NODES     these nodes in turn, page by page
  weighted-interleave:NODES
                       the same, but a node has as many pages in turn as its weight
  best:Latency, best:Bandwidth, best:Capacity
                       the node that is best in this
  strict:WORDS         no other nodes than the words say: the file does not grow (ENOSPC) if they
                       are full; without this, other nodes give then

NODES are numbers as in 0-1,3, or all. A weight is written 0*3,1; a node without one has the
weight that the machine gives it.";

#[derive(Clone, Copy, ValueEnum)]
enum Verb {
    Zero,
    Salvage,
}

/// Runs as hugetlb2.
pub fn main(arguments: Vec<OsString>) -> ExitCode {
    let cli = Cli::parse_from(arguments);
    let done = match cli.action {
        Action::Status { directories } => status(&directories, cli.json),
        Action::Metrics { directories } => print_metrics(&directories),
        Action::Targets { directory } => targets(&directory, cli.json),
        Action::Poison { file, range, hw } => poison(&file, &range, hw, cli.json),
        Action::Repair { file, verb, target } => repair(&file, verb, &target, cli.json),
        Action::Collapse { file, target } => collapse(&file, &target, cli.json),
        Action::Map { file } => map(&file, cli.json),
        Action::Placement { path, words } => placement(&path, words.as_deref(), cli.json),
        Action::Move { file, to } => move_memory(&file, &to, cli.json),
        Action::Inject { file, offset } => inject(&file, &offset, cli.json),
        Action::Ready { directory, wait } => ready(&directory, wait, cli.json),
        Action::Guard { command } => guard::run(&command).map(|never| match never {}),
        Action::Migrate { direction: Direction::Out { qmp, to } } => {
            migrate::out(&qmp, &to).map(|()| ExitCode::SUCCESS)
        }
        Action::Migrate { direction: Direction::In { qmp, keep_frames } } => {
            migrate::into(&qmp, keep_frames).map(|()| ExitCode::SUCCESS)
        }
        Action::Open { file, fd, command } => {
            door::open(&file, fd, &command).map(|never| match never {})
        }
        Action::Check { directory } => check(&directory, cli.json),
        Action::Upgrade { directory, binary } => upgrade(&directory, binary, cli.json),
        Action::Generate { directory } => generate(&directory),
        Action::Demo => return demo::main(cli.json),
        Action::Mount { arguments } => {
            return mount::main(
                std::iter::once("mount.hugetlb2".into()).chain(arguments).collect(),
            );
        }
    };
    done.unwrap_or_else(|why| {
        if cli.json {
            let _ = print(json!({ "error": why })); // said below all the same
        }
        say(format_args!("hugetlb2: {why}"));
        ExitCode::from(FAILED)
    })
}

type Done = Result<ExitCode, String>;

fn generate(directory: &Path) -> Done {
    manual::write(directory, &Cli::command(), &[mount::command(), umount::command()])
        .map_err(|error| format!("{}: {error}", directory.display()))?;
    Ok(ExitCode::SUCCESS)
}

/// Prints a line, or several. A reader that has gone away has seen what it wanted.
fn print(text: impl Display) -> Result<(), String> {
    match writeln!(std::io::stdout(), "{text}") {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(format!("standard output: {error}"))
        }
        _ => Ok(()),
    }
}

fn print_json(value: &Value) -> Result<(), String> {
    print(format_args!("{value:#}"))
}

// ---- pools --------------------------------------------------------------------------------------

fn mount_points() -> Result<Vec<PathBuf>, String> {
    Ok(mounts::all()?.into_iter().map(|pool| pool.mount_point).collect())
}

/// The time after which a worker that does not answer is said to hang.
const PATIENCE: Duration = Duration::from_secs(2);

/// The counters of a pool, or who it is that does not deliver them.
fn counters(directory: &Path) -> Result<attributes::Counters, String> {
    let answer = attributes::pool_within(directory, PATIENCE);
    let mut counters = answer.unwrap_or_else(|| Err(describe_silence(directory)))?;
    counters.translate_processes(directory);
    Ok(counters)
}

fn describe_silence(directory: &Path) -> String {
    let processes = daemons::connection_of(directory).map(daemons::of).unwrap_or_default();
    if processes.is_empty() {
        return format!(
            "no answer within {} s, and no process is seen that serves it",
            PATIENCE.as_secs()
        );
    }
    let list: Vec<_> =
        processes.iter().map(|one| format!("process {} is {}", one.pid, one.state)).collect();
    format!(
        "no answer within {} s ({}); SIGHUP to the first replaces the worker",
        PATIENCE.as_secs(),
        list.join(", ")
    )
}

fn print_metrics(directories: &[PathBuf]) -> Done {
    for directory in directories {
        mounts::require_pool(directory).map_err(|why| format!("{}: {why}", directory.display()))?;
    }
    let all = if directories.is_empty() { mount_points()? } else { directories.to_vec() };
    let pools: Vec<_> = all
        .into_iter()
        .map(|pool| {
            let counters = attributes::pool_within(&pool, PATIENCE).and_then(Result::ok);
            (pool, counters)
        })
        .collect();
    print(metrics::text(&pools).trim_end())?;
    Ok(ExitCode::SUCCESS)
}

fn status(directories: &[PathBuf], json: bool) -> Done {
    let all = directories.is_empty();
    let directories = if all { mount_points()? } else { directories.to_vec() };
    if !json && directories.is_empty() {
        print("no pool is mounted")?;
    }
    let mut pools = Vec::new();
    for directory in directories {
        let counters = match counters(&directory) {
            Ok(counters) => counters,
            // Unmounted since we looked.
            Err(_) if all && !mount_points()?.contains(&directory) => continue,
            // A pool whose daemon has died must not hide the other pools.
            Err(why) if all && json => {
                pools.push(json!({ "mount_point": directory.to_string_lossy(), "error": why }));
                continue;
            }
            Err(why) if all => {
                print(format_args!("{}\n  daemon        {why}", directory.display()))?;
                continue;
            }
            Err(why) => return Err(format!("{}: {why}", directory.display())),
        };
        // Perhaps unmounted since.
        let options = attributes::options(&directory).unwrap_or_default();
        let misaligned =
            std::fs::metadata(&directory).map(|root| mappers::of_pool(&root)).unwrap_or_default();
        if json {
            let mut pool = Map::new();
            pool.insert("mount_point".into(), json!(directory.to_string_lossy()));
            pool.extend(counters.iter().map(|(name, value)| (name.to_owned(), json!(value))));
            let options = options.into_iter().map(|(name, value)| (name, json!(value)));
            pool.insert("options".into(), Value::Object(options.collect()));
            pool.insert("misaligned".into(), misaligned.iter().map(Misaligned::to_json).collect());
            let unavailable = attributes::unavailable(&directory);
            if !unavailable.is_empty() {
                pool.insert("unavailable".into(), json!(unavailable));
            }
            pools.push(Value::Object(pool));
        } else {
            print(describe_pool(&directory, &counters, &options).trim_end())?;
            for one in attributes::unavailable(&directory) {
                print(format_args!("  {:13} {one}", "unavailable"))?;
            }
            for one in misaligned {
                print(format_args!("  {:13} {}", "not huge", one.describe()))?;
            }
        }
    }
    if json {
        print_json(&Value::Array(pools))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Inodes in use, and files that can still be made; only if an option bounds them, or if few can be
/// made.
fn inodes(directory: &Path, options: &[(String, String)]) -> Option<(u64, u64)> {
    const FEW: u64 = 1000;
    let (files, free) = statvfs(directory).map(|counts| (counts.f_files, counts.f_ffree)).ok()?;
    let is_worth_saying = free < FEW || options.iter().any(|(name, _)| name == "nr_inodes");
    is_worth_saying.then(|| (files.saturating_sub(free), free))
}

fn describe_pool(
    directory: &Path,
    counters: &attributes::Counters,
    options: &[(String, String)],
) -> String {
    const MIB: u64 = 1 << 20;
    let of = |counter| counters.get(counter).unwrap_or(0);
    let mut out = format!("{}\n", directory.display());
    let mut row = |name: &str, text: String| {
        let _ = writeln!(out, "  {name:13} {text}");
    };
    let (total, size) = (of(Counter::PagesTotal), of(Counter::PageSize) / MIB);
    row(
        "pages",
        format!(
            "{total} of {size} MiB: {} used, {} free",
            of(Counter::PagesUsed),
            of(Counter::PagesFree)
        ),
    );
    let nodes = counters.nodes();
    let are_named = options.iter().any(|(name, _)| name == "nodes");
    for node in nodes.iter().copied().filter(|_| nodes.len() > 1 || are_named) {
        let (total, free) = (of(Counter::PagesTotalOn { node }), of(Counter::PagesFreeOn { node }));
        let used = of(Counter::PagesUsedOn { node });
        let mebibytes = total * size;
        row(
            &format!("  node {node}"),
            format!("{total}, {mebibytes} MiB: {used} used, {free} free"),
        );
    }
    if clears_ahead(options) {
        row("ready", describe_ready(counters));
    }
    let huge = of(Counter::HugeBytesAtMount) / MIB;
    row("in folios", format!("{huge} MiB were in 2 MiB folios when it was mounted"));
    let (objects, orphans) = (of(Counter::Objects), of(Counter::Orphans));
    row("files", format!("{objects} open or with contents, {orphans} unlinked and still in use"));
    if let Some((used, free)) = inodes(directory, options) {
        row("inodes", format!("{used} used, {free} more files can be made"));
    }
    if of(Counter::FilesUnavailable) > 0 {
        let count = of(Counter::FilesUnavailable);
        row(
            "unavailable",
            format!("{count} files cannot be opened: EIO; they are tried again each second"),
        );
    }
    if of(Counter::ShortBytes) > 0 {
        let (short, missing) = (of(Counter::ShortBytes) / MIB, of(Counter::PagesMissing));
        row(
            "short",
            format!(
                "{short} MiB are lacking, {missing} free pages for them; taken again each second"
            ),
        );
    }
    if of(Counter::PunchedBytes) > 0 {
        row(
            "punched",
            format!(
                "{} KiB are the machine's until they are touched",
                of(Counter::PunchedBytes) / 1024
            ),
        );
    }
    let (soft, hw) = (of(Counter::QuarantinedSoft), of(Counter::QuarantinedHw));
    let by_errors =
        if hw > 0 { format!(", {hw} of them for memory errors") } else { String::new() };
    row("quarantined", format!("{} subpages of 4 KiB{by_errors}", soft + hw));
    let daemon = match (counters.get(Counter::DaemonPid), counters.get(Counter::WorkerPid)) {
        (Some(daemon), Some(worker)) => format!("process {daemon}, worker {worker}"),
        (Some(daemon), None) => format!("process {daemon}, no worker just now"),
        (None, _) => "not seen from this process id namespace".to_owned(),
    };
    row("daemon", daemon);
    let options: Vec<String> =
        options.iter().map(|(name, value)| format!("{name}={value}")).collect();
    row("options", options.join(","));
    out
}

fn targets(directory: &Path, json: bool) -> Done {
    let failed = |why: String| format!("{}: {why}", directory.display());
    attributes::pool(directory).map_err(failed)?;
    let text = attributes::read(directory, attributes::TARGETS);
    let text = text.map_err(|errno| failed(errno.to_string()))?.ok_or_else(|| {
        failed("the daemon is of a version that does not tell its kinds of memory".to_owned())
    })?;
    let table = Table::parse(&text);
    if json {
        print_json(&table.to_json())?
    } else {
        print(table.to_text())?
    }
    Ok(ExitCode::SUCCESS)
}

/// The time between two looks at the memory that is cleared.
const BETWEEN_LOOKS: Duration = Duration::from_millis(100);

fn ready(directory: &Path, wait: bool, json: bool) -> Done {
    let failed = |why: String| format!("{}: {why}", directory.display());
    let mut pool = counters(directory).map_err(failed)?;
    let options = attributes::options(directory).unwrap_or_default();
    if !clears_ahead(&options) {
        let why = "no memory is cleared ahead; mount the pool with -o clear=ahead for that";
        return Err(failed(why.to_owned()));
    }
    let meter = Meter::new("clearing memory");
    let bytes = |pool: &attributes::Counters, pages| {
        pool.get(pages).unwrap_or(0) * pool.get(Counter::PageSize).unwrap_or(0)
    };
    while wait && is_clearing(&pool) {
        meter.show(bytes(&pool, Counter::PagesReady), bytes(&pool, Counter::PagesFree) / 2);
        std::thread::sleep(BETWEEN_LOOKS);
        pool = counters(directory).map_err(failed)?;
    }
    drop(meter);
    if json {
        print_json(&json!({
            "bytes_ready": bytes(&pool, Counter::PagesReady),
            "bytes_free": bytes(&pool, Counter::PagesFree),
            "clearing": is_clearing(&pool),
        }))?;
    } else {
        print(describe_ready(&pool))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn clears_ahead(options: &[(String, String)]) -> bool {
    options.iter().any(|(name, value)| name == "clear" && value == "ahead")
}

fn is_clearing(pool: &attributes::Counters) -> bool {
    pool.get(Counter::Clearing) == Some(1)
}

/// The free pages that are cleared ahead.
fn describe_ready(pool: &attributes::Counters) -> String {
    let of = |counter| pool.get(counter).unwrap_or(0);
    let more = if is_clearing(pool) { ", more are being cleared" } else { "" };
    let (ready, free) = (of(Counter::PagesReady), of(Counter::PagesFree));
    format!("{ready} of {free} free pages are cleared ahead{more}")
}

fn check(directory: &Path, json: bool) -> Done {
    let text = attributes::read(directory, attributes::CHECK).map_err(|errno| match errno {
        Errno::OPNOTSUPP => format!("{}: no hugetlb2 pool is mounted there", directory.display()),
        other => format!("{}: {other}", directory.display()),
    })?;
    let or = if geteuid().is_root() { "" } else { ", or you are not root" };
    let text = text
        .ok_or_else(|| format!("{}: no hugetlb2 pool is mounted there{or}", directory.display()))?;
    let wrong: Vec<&str> = text.lines().collect();
    if json {
        print_json(&json!({ "ok": wrong.is_empty(), "wrong": wrong }))?;
    } else if wrong.is_empty() {
        print(format_args!("{}: everything holds", directory.display()))?;
    } else {
        print(wrong.join("\n"))?;
    }
    Ok(if wrong.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(FAILED) })
}

fn upgrade(directory: &Path, binary: Option<PathBuf>, json: bool) -> Done {
    let failed = |why: String| format!("{}: {why}", directory.display());
    attributes::pool(directory).map_err(failed)?;
    let before = daemons::supervisor_of(directory).map_err(failed)?;
    let binary = match binary {
        Some(binary) => {
            binary.canonicalize().map_err(|error| format!("{}: {error}", binary.display()))?
        }
        None => session::daemon_program().map_err(|failure| failure.to_string())?,
    };
    let now =
        session::take_over(&binary, &before).map_err(|failure| failed(failure.to_string()))?;
    let before = before.pid;
    if json {
        print_json(&json!({ "daemon_pid": now, "was": before }))?;
    } else {
        print(format_args!("{}: process {now} serves in place of {before}", directory.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

// ---- files --------------------------------------------------------------------------------------

fn poison(file: &Path, range: &[String], hw: bool, json: bool) -> Done {
    let size = mounts::pool_file(file)?.len();
    if range.is_empty() {
        let text = attributes::read(file, attributes::POISON)
            .map_err(|errno| attributes::describe(file, errno))?;
        show_table(text.unwrap_or_default().as_str(), &["offset", "length", "kind", "time"], json)?;
        return Ok(ExitCode::SUCCESS);
    }
    let value = range.join(" ");
    explain(file, quarantine::parse_poison(value.as_bytes(), size))?;
    if hw {
        return request(file, attributes::LOSSES, &format!("{value} hw"), json);
    }
    request(file, attributes::POISON, &value, json)
}

fn repair(file: &Path, verb: Verb, target: &[String], json: bool) -> Done {
    let verb = match verb {
        Verb::Zero => "zero",
        Verb::Salvage => "salvage",
    };
    let value = format!("{verb} {}", target.join(" "));
    explain(file, quarantine::parse_repair(value.as_bytes(), mounts::pool_file(file)?.len()))?;
    request(file, attributes::REPAIR, &value, json)
}

fn collapse(file: &Path, target: &[String], json: bool) -> Done {
    let value = target.join(" ");
    explain(file, quarantine::parse_collapse(value.as_bytes(), mounts::pool_file(file)?.len()))?;
    request(file, attributes::COLLAPSE, &value, json)
}

fn inject(file: &Path, offset: &str, json: bool) -> Done {
    let value = format!("hw {offset}");
    explain(file, quarantine::parse_inject(value.as_bytes(), mounts::pool_file(file)?.len()))?;
    attributes::write(file, attributes::INJECT, &value).map_err(|errno| match errno {
        Errno::OPNOTSUPP => {
            "this kernel has no CONFIG_MEMORY_FAILURE: it cannot handle memory errors".to_owned()
        }
        other => attributes::describe(file, other),
    })?;
    if json {
        print_json(&json!({ "ok": true }))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn map(file: &Path, json: bool) -> Done {
    let metadata = mounts::pool_file(file)?;
    let text = attributes::read(file, attributes::MAP)
        .map_err(|errno| attributes::describe(file, errno))?;
    show_table(text.unwrap_or_default().as_str(), &["offset", "length", "state", "node"], json)?;
    for one in mappers::of_file(&metadata) {
        say(format_args!("hugetlb2: {}", one.describe()));
    }
    Ok(ExitCode::SUCCESS)
}

fn placement(path: &Path, words: Option<&str>, json: bool) -> Done {
    let is_right = |metadata: &Metadata| metadata.is_file() || metadata.is_dir();
    mounts::of_pool(path, is_right, "regular file or directory")?;
    if let Some(words) = words {
        explain(path, Placement::parse(words.as_bytes()))?;
        return request(path, attributes::PLACEMENT, words, json);
    }
    let text = attributes::read(path, attributes::PLACEMENT)
        .map_err(|errno| attributes::describe(path, errno))?;
    let text = text.unwrap_or_default();
    let (words, memory) = text.split_once('\n').unwrap_or((&text, ""));
    if json {
        let memory = table(memory, &["node", "bytes", "why"]);
        print_json(&json!({ "placement": words, "memory": memory }))?;
    } else {
        print(words)?;
        if !memory.is_empty() {
            show_table(memory, &["node", "bytes", ""], json)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn move_memory(file: &Path, words: &str, json: bool) -> Done {
    mounts::of_pool(file, Metadata::is_file, "regular file")?;
    explain(file, Placement::parse(words.as_bytes()))?;
    let meter = Meter::new("moving memory");
    let moved = std::thread::scope(|scope| {
        let (sender, answer) = mpsc::channel();
        // The filesystem tells its reason to the thread that has asked.
        let ask = || {
            let asked = attributes::write(file, attributes::PLACEMENT, words);
            asked.map_err(|errno| attributes::describe(file, errno))
        };
        scope.spawn(move || sender.send(ask()));
        loop {
            match answer.recv_timeout(Duration::from_millis(200)) {
                Ok(moved) => return moved,
                Err(mpsc::RecvTimeoutError::Disconnected) => return Err("no answer".to_owned()),
                Err(mpsc::RecvTimeoutError::Timeout) if meter.is_shown() => {
                    if let Some((done, total)) = bytes_in_place(file) {
                        meter.show(done, total);
                    }
                }
                Err(mpsc::RecvTimeoutError::Timeout) => {}
            }
        }
    });
    drop(meter);
    moved?;
    placement(file, None, json)
}

/// Bytes of a file on the NUMA nodes that its placement asks for, and on all nodes.
fn bytes_in_place(file: &Path) -> Option<(u64, u64)> {
    let text = attributes::read(file, attributes::PLACEMENT).ok().flatten()?;
    let rows = text.lines().skip(1).filter_map(|row| {
        let mut words = row.split(' ').skip(1);
        let bytes: u64 = words.next()?.parse().ok()?;
        Some((if words.next().is_none() { bytes } else { 0 }, bytes))
    });
    Some(rows.fold((0, 0), |sum, row| (sum.0 + row.0, sum.1 + row.1)))
}

/// Says what is wrong with a request in words; the filesystem can only say EINVAL.
fn explain<T>(file: &Path, parsed: hugetlb2fs::error::Result<T>) -> Result<(), String> {
    parsed.map(drop).map_err(|error| format!("{}: {error}", file.display()))
}

fn request(file: &Path, attribute: &str, value: &str, json: bool) -> Done {
    attributes::write(file, attribute, value).map_err(|errno| attributes::describe(file, errno))?;
    if json {
        print_json(&json!({ "ok": true }))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Shows the lines of an attribute: under a heading, or as JSON with numbers as numbers.
fn show_table(text: &str, columns: &[&str], json: bool) -> Result<(), String> {
    if json {
        return print_json(&table(text, columns));
    }
    let line = |row: &[&str]| {
        let cells: Vec<String> = row.iter().map(|word| format!("{word:>14}")).collect();
        cells.join(" ").trim_end().to_owned()
    };
    let rows = text.lines().map(|row| line(&row.split(' ').collect::<Vec<_>>()));
    let lines: Vec<String> = std::iter::once(line(columns)).chain(rows).collect();
    print(lines.join("\n"))
}

/// The lines of an attribute as objects, with numbers as numbers.
fn table(text: &str, columns: &[&str]) -> Value {
    let value = |word: &str| {
        hugetlb2fs::options::parse_number(word).map_or_else(|| json!(word), |n| json!(n))
    };
    let object = |row: &str| -> Value {
        let cells = columns.iter().zip(row.split(' '));
        cells.map(|(name, word)| ((*name).to_owned(), value(word))).collect::<Map<_, _>>().into()
    };
    text.lines().map(object).collect()
}
