//! mount.hugetlb2, umount.fuse.hugetlb2 and the command hugetlb2: one program, which acts by the
//! name that it is called by.
//!
//! Each module uses only those above it in this list (`tests/tidy.rs` checks it).

mod terminal;

mod protocol;

mod daemons;

mod attributes;

mod guard;

mod mappers;

mod mounts;

mod options;

mod session;

mod namespace;

mod mount;

mod umount;

mod demo_mapper;

mod demo;

mod targets;

mod qemu;

mod migrate;

mod door;

mod manual;

mod metrics;

mod cli;

use std::ffi::OsString;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::ExitCode;

/// The exit status for an internal bug (mount(8)).
const INTERNAL: u8 = 4;

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let name = arguments.first().and_then(|path| Path::new(path).file_name()).unwrap_or_default();
    match name.to_str() {
        Some("mount.hugetlb2" | "mount.fuse.hugetlb2") => guarded(|| mount::main(arguments)),
        Some("umount.hugetlb2" | "umount.fuse.hugetlb2") => guarded(|| umount::main(arguments)),
        Some(demo_mapper::NAME) => guarded(|| demo_mapper::main(&arguments)),
        _ => guarded(|| cli::main(arguments)),
    }
}

/// A panic unwinds, so what was begun has been undone, and the panic hook has said what was wrong.
fn guarded(program: impl FnOnce() -> ExitCode) -> ExitCode {
    catch_unwind(AssertUnwindSafe(program)).unwrap_or(ExitCode::from(INTERNAL))
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
