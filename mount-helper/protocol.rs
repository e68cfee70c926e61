//! The protocol of mount(8) and umount(8) for external helpers: a command line, and an exit status.

use crate::terminal::say;
use clap::{ArgMatches, Command};
use std::ffi::OsString;
use std::process::ExitCode;

/// Why a request did not succeed, by the exit statuses of mount(8).
#[derive(Debug)]
pub enum Failure {
    /// 1: the request was wrong, or the user may not make it.
    Usage(String),
    /// 2: the system could not do what it should be able to.
    System(String),
    /// 8: the user interrupted it.
    Interrupted,
    /// 32: the mount failed.
    Mount(String),
}

impl Failure {
    fn status(&self) -> u8 {
        match self {
            Self::Usage(_) => 1,
            Self::System(_) => 2,
            Self::Interrupted => 8,
            Self::Mount(_) => 32,
        }
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Usage(why) | Self::System(why) | Self::Mount(why) => f.write_str(why),
            Self::Interrupted => f.write_str("interrupted; everything has been given back"),
        }
    }
}

/// Runs as a helper: reads the command line, carries the request out, and says why it failed.
pub fn run(
    command: Command,
    arguments: Vec<OsString>,
    carry_out: impl FnOnce(&ArgMatches) -> Result<(), Failure>,
) -> ExitCode {
    let name = command.get_name().to_owned();
    let matches = match command.try_get_matches_from(arguments) {
        Ok(matches) => matches,
        Err(error) => {
            let _ = error.print();
            let is_wrong = error.use_stderr(); // else the help, or the version, was asked for
            return ExitCode::from(u8::from(is_wrong));
        }
    };
    match carry_out(&matches) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            say(format_args!("{name}: {failure}"));
            ExitCode::from(failure.status())
        }
    }
}
