//! `hugetlb2 guard`: runs a program with a library in it that makes soft quarantines memory errors
//! of that program. `mount-helper/preload/` is the library, and `hugetlb2fs::guard` its work.

use crate::terminal::say;
use rustix::fs::getxattr;
use rustix::process::{getegid, geteuid};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The file of the library.
pub const LIBRARY: &str = "libhugetlb2_guard.so";

/// The directory of an installed one, seen from that of this program.
const INSTALLED: &str = "../lib/hugetlb2";

/// Becomes the program `command`, guarded.
///
/// # Errors
/// A sentence.
pub fn run(command: &[OsString]) -> Result<std::convert::Infallible, String> {
    let (program, arguments) = command.split_first().ok_or("a command is missing")?;
    let library = library()?;
    if let Some(path) = found(program) {
        takes_libraries(&path).map_err(|why| format!("{}: {why}", path.display()))?;
    }
    if hugetlb2fs::sys::memory_failures().is_none() {
        say(format_args!(
            "hugetlb2: this kernel has no CONFIG_MEMORY_FAILURE: the program's own touches stay BUS_ADRERR"
        ));
    }
    let preloaded = std::env::var_os("LD_PRELOAD").filter(|others| !others.is_empty());
    let preload = preloaded.map_or(library.clone().into_os_string(), |others| {
        let bytes = [library.as_os_str().as_bytes(), b":", others.as_bytes()].concat();
        OsString::from_vec(bytes)
    });
    let error = Command::new(program).args(arguments).env("LD_PRELOAD", preload).exec();
    Err(format!("{}: {error}", Path::new(program).display()))
}

/// The path of the library: beside this program, or where it is installed.
fn library() -> Result<PathBuf, String> {
    let program = std::env::current_exe().map_err(|error| format!("this program: {error}"))?;
    let own = program.parent().unwrap_or(Path::new("/"));
    let places = [own.to_owned(), own.join(INSTALLED)];
    let there = places.iter().find_map(|place| place.join(LIBRARY).canonicalize().ok());
    let path = there.ok_or_else(|| {
        format!(
            "the library {LIBRARY} is neither in {} nor in {}; mount-helper/install puts it there",
            places[0].display(),
            places[1].display()
        )
    })?;
    // The loader takes these characters for ends of a path (ld.so(8)).
    match path.as_os_str().as_bytes().iter().any(|byte| b": \t\n".contains(byte)) {
        true => Err(format!("{}: a path with a blank or a colon cannot be loaded", path.display())),
        false => Ok(path),
    }
}

/// The file that execvp(3) takes for `program`.
fn found(program: &OsStr) -> Option<PathBuf> {
    if program.as_bytes().contains(&b'/') {
        return Some(program.into());
    }
    let directories = std::env::var_os("PATH")?;
    let mut paths = std::env::split_paths(&directories).map(|directory| directory.join(program));
    paths.find(|path| path.is_file())
}

/// Refuses a program into which the loader loads no library of the environment. An interpreter's
/// text is not looked at.
fn takes_libraries(path: &Path) -> Result<(), String> {
    let file = match File::open(path) {
        Err(error) if error.kind() == ErrorKind::PermissionDenied => return Ok(()), // may run
        opened => opened.map_err(|error| error.to_string())?,
    };
    let status = file.metadata().map_err(|error| error.to_string())?;
    let (user, group) = (geteuid(), getegid());
    let changes_user = status.mode() & 0o4000 != 0 && status.uid() != user.as_raw();
    let changes_group = status.mode() & 0o2000 != 0 && status.gid() != group.as_raw();
    let has_capabilities = !user.is_root()
        && getxattr(path, "security.capability", &mut [0u8; 0][..]).is_ok_and(|length| length > 0);
    if changes_user || changes_group || has_capabilities {
        return Err("a program that gets other rights (set-user-ID, capabilities) \
                    cannot be guarded"
            .to_owned());
    }
    match has_loader(&file) {
        Ok(false) => Err("a static program cannot be guarded".to_owned()),
        _ => Ok(()),
    }
}

/// True if a file names a loader (PT_INTERP, elf(5)), or is no program of 64 bits.
fn has_loader(mut file: &File) -> std::io::Result<bool> {
    const PT_INTERP: u32 = 3;
    let mut header = [0; 64];
    file.read_exact(&mut header)?;
    if !header.starts_with(b"\x7fELF\x02") {
        return Ok(true);
    }
    let number = |bytes: &[u8]| bytes.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
    let (table, size, count) =
        (number(&header[32..40]), number(&header[54..56]), number(&header[56..58]));
    for entry in 0..count {
        let mut kind = [0; 4];
        file.read_exact_at(&mut kind, table.saturating_add(entry * size))?;
        if u32::from_le_bytes(kind) == PT_INTERP {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_with_a_loader_takes_libraries() {
        let program = std::env::current_exe().unwrap();
        assert_eq!(takes_libraries(&program), Ok(()));
        let work = tempfile::tempdir().unwrap();
        let (text, fixed) = (work.path().join("text"), work.path().join("static"));
        std::fs::write(&text, "#!/bin/sh\n".repeat(10)).unwrap();
        assert_eq!(takes_libraries(&text), Ok(()));
        let mut header = [0; 128];
        header[..5].copy_from_slice(b"\x7fELF\x02");
        (header[32], header[54], header[56], header[64]) = (64, 56, 1, 1); // one entry, PT_LOAD
        std::fs::write(&fixed, header).unwrap();
        assert!(takes_libraries(&fixed).unwrap_err().contains("static"));
    }

    #[test]
    fn a_program_is_found_as_the_shell_finds_it() {
        assert_eq!(found(OsStr::new("/no/such")), Some("/no/such".into()));
        assert!(found(OsStr::new("sh")).is_some_and(|path| path.ends_with("sh")));
        assert_eq!(found(OsStr::new("no such program")), None);
    }
}
