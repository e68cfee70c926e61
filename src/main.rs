//! hugetlb2fsd: the daemon behind one mounted pool. mount.hugetlb2 starts it.

use clap::{Arg, ArgMatches, Command};
use hugetlb2fs::control::{Control, Message};
use hugetlb2fs::options::{Options, TABLE};
use hugetlb2fs::{logging, sys, worker};
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

fn command() -> Command {
    let table = TABLE.iter().map(|row| {
        let default = row.default.map_or("required".to_owned(), |value| format!("default: {value}"));
        Arg::new(row.name).long(row.name).value_name(row.value).help(format!("{} [{default}]", row.help))
    });
    let descriptor = |name: &'static str, help: &'static str| {
        Arg::new(name)
            .long(name)
            .value_name("FD")
            .value_parser(clap::value_parser!(RawFd))
            .required(true)
            .help(help)
    };
    Command::new("hugetlb2fsd")
        .version(clap::crate_version!())
        .about("Serves one pool of gigantic pages. mount.hugetlb2 starts it; there is no use in doing so by hand.")
        .args(table)
        .arg(descriptor("fuse-fd", "an open /dev/fuse that is going to be mounted"))
        .arg(descriptor("control-fd", "a socket to the mount helper"))
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

fn inherited(matches: &ArgMatches, name: &str) -> Result<OwnedFd, String> {
    let fd = matches.get_one::<RawFd>(name).expect("clap has required it");
    sys::inherited(*fd).map_err(|error| format!("--{name}={fd}: {error}"))
}

fn run() -> Result<(), String> {
    let matches = command().get_matches();
    let mut control = Control::new(UnixStream::from(inherited(&matches, "control-fd")?));
    let device = inherited(&matches, "fuse-fd")?;
    let started = options(&matches).and_then(|options| {
        logging::start(options.log.as_deref()).map_err(|error| format!("option log: {error}"))?;
        rustix::process::setsid().map_err(|error| format!("setsid: {error}"))?;
        Ok(options)
    });
    match started {
        Ok(options) => worker::run(&options, device, control),
        Err(why) => {
            let _ = control.send(&Message::Failed(why.clone()));
            Err(why)
        }
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
