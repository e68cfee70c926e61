//! The destinations of lines: a file, the system log, or the kernel's log.
//!
//! The daemon leaves the machine's mounts. So it keeps a descriptor of the root directory that it
//! was started in, opened with O_PATH, and looks the log up from there. This descriptor holds no
//! mount busy that the daemon's program does not hold.

use super::text::Shape;
use crate::sys;
use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, Stat, fstat, openat, openat2};
use rustix::io::Errno;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

/// The destination of lines.
pub enum Sink {
    /// To a file.
    File(LogFile),
    /// To the system log, or to the kernel's where no system log listens.
    System(SystemLog),
}

impl Sink {
    /// `root` is where paths start.
    ///
    /// # Errors
    /// See [`open_log`].
    pub fn open(root: OwnedFd, path: Option<&str>) -> io::Result<Self> {
        match path {
            Some(path) => LogFile::open(root, path.into()).map(Self::File),
            None => Ok(Self::System(SystemLog::open(root))),
        }
    }

    /// The shape of a line for this destination.
    pub fn shape(&self) -> Shape {
        match self {
            Self::File(_) => Shape::File,
            Self::System(_) => Shape::System,
        }
    }

    /// Writes a line, and says whether it has arrived. Waits for as long as the other side does.
    pub fn write(&mut self, line: &[u8]) -> bool {
        match self {
            Self::File(file) => file.write(line),
            Self::System(log) => log.write(line),
        }
    }

    /// Opens the log anew, by its name.
    ///
    /// # Errors
    /// See [`open_log`]; lines go to where they went before.
    pub fn reopen(&mut self) -> io::Result<()> {
        match self {
            Self::File(file) => file.reopen(),
            Self::System(log) => {
                log.socket = None;
                Ok(())
            }
        }
    }
}

// ---- a file -------------------------------------------------------------------------------------

/// A file that the admin has named.
pub struct LogFile {
    root: OwnedFd,
    path: PathBuf,
    file: File,
    /// The last line has no end: the disk was full.
    torn: bool,
}

impl LogFile {
    fn open(root: OwnedFd, path: PathBuf) -> io::Result<Self> {
        let file = open_log(&root, &path)?;
        Ok(Self { root, path, file, torn: false })
    }

    fn reopen(&mut self) -> io::Result<()> {
        self.file = open_log(&self.root, &self.path)?;
        self.torn = false;
        Ok(())
    }

    /// One write(2) a line, so that lines of several daemons in one file or pipe stay whole.
    fn write(&mut self, line: &[u8]) -> bool {
        let start: &[u8] = if self.torn { b"\n" } else { b"" };
        let text = [start, line, b"\n"].concat();
        let written = (&self.file).write(&text).unwrap_or(0);
        self.torn = if written == 0 { self.torn } else { written < text.len() };
        written == text.len()
    }
}

/// Opens the log file `path`, for appending, and makes it where it is missing.
///
/// A FIFO is opened for reading, too, so that it takes lines before another process reads it, and
/// after that process has ended. Neither opening nor writing waits (O_NONBLOCK).
///
/// # Errors
/// The errors of open(2), and a sentence if a user other than root could choose the file: the path
/// is a symbolic link, or lies in a directory of that user, or the user has put it into a directory
/// that all users can write to.
fn open_log(root: &OwnedFd, path: &Path) -> io::Result<File> {
    let refused = |why: String| io::Error::new(io::ErrorKind::PermissionDenied, why);
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::from(Errno::ISDIR));
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let how = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let directory = openat2(root, parent, flags, Mode::empty(), how)?;
    let of_all = check_directory(&fstat(&directory)?).map_err(refused)?;
    let flags = OFlags::RDWR | OFlags::APPEND | OFlags::CREATE | OFlags::NOFOLLOW;
    let flags = flags | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let opened = openat(&directory, name, flags, Mode::from_raw_mode(0o644));
    let file = opened.map_err(|errno| match errno {
        Errno::LOOP => refused("it is a symbolic link: name the file itself".into()),
        other => other.into(),
    })?;
    if of_all {
        check_file(&fstat(&file)?).map_err(refused)?;
    }
    Ok(file.into())
}

/// Returns whether all users can put files into the directory, but not take those of others away.
fn check_directory(directory: &Stat) -> Result<bool, String> {
    const STICKY: u32 = 0o1000;
    const OTHERS: u32 = 0o002;
    if directory.st_uid != 0 {
        let owner = directory.st_uid;
        return Err(format!("its directory belongs to user {owner}, and must belong to root"));
    }
    match (directory.st_mode & OTHERS != 0, directory.st_mode & STICKY != 0) {
        (true, false) => {
            Err("all users can write to its directory: take that permission away".into())
        }
        (of_all, _) => Ok(of_all),
    }
}

fn check_file(file: &Stat) -> Result<(), String> {
    let is_regular = FileType::from_raw_mode(file.st_mode) == FileType::RegularFile;
    if file.st_uid != 0 || is_regular && file.st_nlink != 1 {
        return Err("it lies in a directory of all users, and is not root's alone".into());
    }
    Ok(())
}

// ---- the system log -----------------------------------------------------------------------------

/// /dev/log (syslog(3)), and /dev/kmsg for where nothing listens there.
pub struct SystemLog {
    root: OwnedFd,
    socket: Option<UnixDatagram>,
    kernel: Option<File>,
}

impl SystemLog {
    fn open(root: OwnedFd) -> Self {
        let kernel = File::options().write(true).open("/dev/kmsg").ok();
        Self { root, socket: None, kernel }
    }

    fn write(&mut self, line: &[u8]) -> bool {
        if let Some(socket) = &self.socket
            && socket.send(line).is_ok()
        {
            return true;
        }
        // There was no connection, or the system log has ended and perhaps another has come.
        self.socket = connect(&self.root).ok();
        match (&self.socket, &mut self.kernel) {
            (Some(socket), _) => socket.send(line).is_ok(),
            (None, Some(kernel)) => kernel.write(line).is_ok(),
            (None, None) => false,
        }
    }
}

/// connect(2) takes a path only; /proc/self/fd leads to the socket that was looked up from `root`.
fn connect(root: &OwnedFd) -> io::Result<UnixDatagram> {
    let found = openat2(
        root,
        "/dev/log",
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::IN_ROOT,
    )?;
    let socket = UnixDatagram::unbound()?;
    socket.connect(sys::fd_path(found.as_fd()))?;
    Ok(socket)
}
