//! mount.hugetlb2, umount.fuse.hugetlb2 and the command hugetlb2: one program that goes by the name it is called by.

mod attributes;
mod cli;
mod demo;
mod mount;
mod options;
mod session;
mod touch;
mod umount;

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let name = arguments.first().and_then(|path| Path::new(path).file_name()).unwrap_or_default();
    match name.to_str() {
        Some("mount.hugetlb2" | "mount.fuse.hugetlb2") => mount::main(arguments),
        Some("umount.hugetlb2" | "umount.fuse.hugetlb2") => umount::main(arguments),
        _ => cli::main(arguments),
    }
}
