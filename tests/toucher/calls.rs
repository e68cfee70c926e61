//! Single system calls, on a file that the line names or in the mounts of another process.

use super::{Answer, Words, number, ok};
use rustix::fs::{FallocateFlags, FlockOperation};
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, mount_bind, unmount};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

/// Makes the call that `command` names.
pub fn answer(command: &str, words: &mut Words<'_>) -> Answer {
    match command {
        "pwrite" => call(words, File::options().write(true), pwrite),
        "append" => call(words, File::options().append(true), append),
        "pread" => call(words, File::options().read(true), pread),
        "truncate" => call(words, File::options().write(true), truncate),
        "fallocate" => call(words, File::options().write(true), fallocate),
        "cover" => in_mounts_of(words, |words| mount_bind(path(words), path(words))),
        "uncover" => in_mounts_of(words, |words| unmount(path(words), UnmountFlags::empty())),
        other => Err(format!("unknown command {other:?}")),
    }
}

/// Locks the file that the line names, and puts it into `locked`.
pub fn lock(words: &mut Words<'_>, locked: &mut Option<File>) -> Answer {
    let path = words.next().ok_or("a path is missing")?;
    let file = File::options().read(true).write(true).open(path);
    let file = file.map_err(|error| format!("{path}: {error}"))?;
    let result = match words.next() {
        Some("flock") => rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive),
        Some("fcntl") => rustix::fs::fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive),
        other => return Err(format!("{other:?} is neither flock nor fcntl")),
    };
    Ok(ok_or_errno(result.map(|()| *locked = Some(file))))
}

/// Runs `change` in the mount namespace of the process that is named first.
fn in_mounts_of(
    words: &mut Words<'_>,
    change: impl FnOnce(&mut Words<'_>) -> Result<(), Errno>,
) -> Answer {
    let process: i32 = number(words)?;
    let namespace =
        File::open(format!("/proc/{process}/ns/mnt")).map_err(|error| error.to_string())?;
    let entered = move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Mount));
    Ok(ok_or_errno(entered.and_then(|()| change(words))))
}

fn path<'a>(words: &mut Words<'a>) -> &'a str {
    words.next().unwrap_or_default()
}

fn ok_or_errno(result: Result<(), Errno>) -> String {
    result.map_or_else(|errno| format!("errno {}", errno.raw_os_error()), |()| ok())
}

/// Opens the file that the line names and makes one system call on it; the answer is `errno E`
/// where either fails.
fn call(
    words: &mut Words<'_>,
    how: &OpenOptions,
    call: impl FnOnce(&File, &mut Words<'_>) -> Answer<io::Result<String>>,
) -> Answer {
    let path = words.next().ok_or("a path is missing")?;
    let answer = match how.open(path) {
        Ok(file) => call(&file, words)?,
        Err(error) => Err(error),
    };
    answer.or_else(|error| match error.raw_os_error() {
        Some(errno) => Ok(format!("errno {errno}")),
        None => Err(error.to_string()),
    })
}

fn pwrite(file: &File, words: &mut Words<'_>) -> Answer<io::Result<String>> {
    let (offset, length, byte) = (number(words)?, number(words)?, number(words)?);
    Ok(file.write_at(&vec![byte; length], offset).map(|count| format!("count {count}")))
}

fn append(mut file: &File, words: &mut Words<'_>) -> Answer<io::Result<String>> {
    let (length, byte) = (number(words)?, number(words)?);
    Ok(file.write(&vec![byte; length]).map(|count| format!("count {count}")))
}

fn pread(file: &File, words: &mut Words<'_>) -> Answer<io::Result<String>> {
    let (offset, length) = (number(words)?, number(words)?);
    let mut buffer = vec![0; length];
    Ok(file.read_at(&mut buffer, offset).map(|count| runs(&buffer[..count])))
}

fn runs(bytes: &[u8]) -> String {
    let runs = bytes.chunk_by(|one, next| one == next);
    runs.fold("runs".to_owned(), |line, run| line + &format!(" {}:{}", run.len(), run[0]))
}

fn truncate(file: &File, words: &mut Words<'_>) -> Answer<io::Result<String>> {
    let size = number(words)?;
    Ok(file.set_len(size).map(|()| ok()))
}

fn fallocate(file: &File, words: &mut Words<'_>) -> Answer<io::Result<String>> {
    let mode = FallocateFlags::from_bits_retain(number(words)?);
    let (offset, length) = (number(words)?, number(words)?);
    let done: Result<(), Errno> = rustix::fs::fallocate(file, mode, offset, length);
    Ok(done.map(|()| ok()).map_err(io::Error::from))
}
