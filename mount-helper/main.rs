//! mount.hugetlb2, umount.fuse.hugetlb2 and the command hugetlb2: one program that goes by the name it is called by.

mod attributes;
mod cli;
mod daemons;
mod demo;
mod mappers;
mod mount;
mod mounts;
mod namespace;
mod options;
mod session;
mod touch;
mod umount;

use std::ffi::OsString;
use std::fmt::Arguments;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::ExitCode;

/// What mount(8) calls an internal bug.
const INTERNAL: u8 = 4;

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let name = arguments.first().and_then(|path| Path::new(path).file_name()).unwrap_or_default();
    match name.to_str() {
        Some("mount.hugetlb2" | "mount.fuse.hugetlb2") => guarded(|| mount::main(arguments)),
        Some("umount.hugetlb2" | "umount.fuse.hugetlb2") => guarded(|| umount::main(arguments)),
        _ => guarded(|| cli::main(arguments)),
    }
}

/// A panic unwinds, so what was begun has been undone, and the panic hook has said what was wrong.
fn guarded(program: impl FnOnce() -> ExitCode) -> ExitCode {
    catch_unwind(AssertUnwindSafe(program)).unwrap_or(ExitCode::from(INTERNAL))
}

/// Says something to whoever listens. That nobody does must not change what becomes of a mount: eprintln would panic.
fn say(line: Arguments<'_>) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_an_internal_error() {
        assert_eq!(guarded(|| panic!("on purpose")), ExitCode::from(INTERNAL));
        assert_eq!(guarded(|| ExitCode::from(32)), ExitCode::from(32));
    }
}
