//! hugetlb2fsd, the daemon behind one mounted pool. mount.hugetlb2 starts it; `hugetlb2 upgrade`
//! starts another one in its place.

use clap::{Arg, ArgMatches, Command};
use hugetlb2fs::mount_protocol::{Control, Message};
use hugetlb2fs::options::{Options, TABLE};
use hugetlb2fs::supervisor::{End, supervise};
use hugetlb2fs::upgrade::Predecessor;
use hugetlb2fs::{logging, supervisor, sys, worker};
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: sys::allocator::Present = sys::allocator::Present;

fn command() -> Command {
    let table = TABLE.iter().map(|row| {
        let default =
            row.default.map_or("required".to_owned(), |value| format!("default: {value}"));
        Arg::new(row.name)
            .long(row.name)
            .value_name(row.value)
            .help(format!("{} [{default}]", row.help))
    });
    let number = |name: &'static str, value: &'static str, help: &'static str| {
        Arg::new(name)
            .long(name)
            .value_name(value)
            .value_parser(clap::value_parser!(i32))
            .help(help)
    };
    Command::new("hugetlb2fsd")
        .version(clap::crate_version!())
        .about("Serves one pool of gigantic pages. mount.hugetlb2 starts it; there is no use in doing so by hand.")
        .args(table)
        .arg(
            number("fuse-fd", "FD", "an open /dev/fuse that is going to be mounted")
                .required_unless_present("take-over"),
        )
        .arg(
            number("take-over", "PID", "take a pool in use over from this daemon (see hugetlb2 upgrade)")
                .conflicts_with_all(TABLE.iter().map(|row| row.name).chain(["fuse-fd"]))
                .requires("connection"),
        )
        .arg(number("connection", "NUMBER", "what that daemon must serve: the minor device number of the pool"))
        .arg(number("control-fd", "FD", "a socket to the mount helper").required(true))
}

fn options(matches: &ArgMatches) -> Result<Options, String> {
    let mut options = Options::default();
    for row in TABLE {
        if let Some(value) = matches.get_one::<String>(row.name) {
            options.set(row.name, Some(value))?;
        }
    }
    Ok(options)
}

/// The program that starts the daemon may have anything open: a lock, a terminal, a file on a disk
/// that is to be unmounted.
fn close_what_is_not_ours(matches: &ArgMatches) -> Result<(), String> {
    let names = ["fuse-fd", "control-fd"].into_iter();
    let mut kept: Vec<RawFd> = names.filter_map(|name| matches.get_one(name).copied()).collect();
    sys::close_all_but(&mut kept).map_err(|error| format!("close_range(2): {error}"))
}

fn inherited(matches: &ArgMatches, name: &str) -> Result<OwnedFd, String> {
    let fd = matches.get_one::<RawFd>(name).expect("clap has required it");
    sys::inherited(*fd).map_err(|error| format!("--{name}={fd}: {error}"))
}

/// A thread that panics would leave its request unanswered, and the caller would wait for good. So
/// the process ends, and another worker takes over.
fn end_at_a_panic() {
    std::panic::set_hook(Box::new(|panic| {
        log::error!("internal error, this process ends: {panic}");
        logging::flush();
        std::process::abort();
    }));
}

/// The pool to supervise: one that is going to be mounted, or another daemon's.
fn start(matches: &ArgMatches, control: &mut Control) -> Result<(Options, OwnedFd), String> {
    close_what_is_not_ours(matches)?;
    let Some(pid) = matches.get_one::<i32>("take-over") else {
        let device = inherited(matches, "fuse-fd")?;
        let options = options(matches)?;
        settle_in(&options, worker::enter_private_root)?;
        return Ok((options, device));
    };
    let connection = matches.get_one::<i32>("connection").expect("clap has required it");
    let predecessor = Predecessor::find(*pid, *connection)?;
    settle_in(&predecessor.options, || predecessor.enter_namespace())?;
    log::info!("taking over from daemon {pid}");
    let (options, device, only_one) = predecessor.succeed()?;
    control.hold(only_one);
    Ok((options, device))
}

fn settle_in(
    options: &Options,
    namespace: impl FnOnce() -> Result<(), hugetlb2fs::error::Error>,
) -> Result<(), String> {
    logging::start(options.log.as_deref()).map_err(|error| {
        let log = options.log.as_deref().unwrap_or("the system log");
        format!("option log: {log} cannot be opened: {error}")
    })?;
    end_at_a_panic();
    rustix::process::setsid().map_err(|error| format!("setsid: {error}"))?;
    worker::prepare(namespace)
}

fn run() -> Result<(), String> {
    let matches = command().get_matches();
    let mut control = Control::new(UnixStream::from(inherited(&matches, "control-fd")?));
    let (options, device) = start(&matches, &mut control).inspect_err(|why| {
        let _ = control.send(&Message::Failed(why.clone()));
    })?;
    let mounting = !matches.contains_id("take-over");
    let ended = supervise(Some(control), mounting, |role| worker::run(&options, &device, role));
    supervisor::free_memory();
    logging::flush();
    match ended.map_err(|error| format!("supervising: {error}"))? {
        End::Unmounted | End::Stopped => Ok(()),
        End::NeverServed => Err("the worker has not come to serve; see the log".into()),
    }
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("hugetlb2fsd: {why}");
            ExitCode::FAILURE
        }
    }
}
