//! What the mount helper and the daemon say to each other while a pool is being mounted: a line each, over a socket.
//!
//! ```text
//!   daemon                      helper
//!     | progress <done> <total>   |      while the pool is filled
//!     |-------------------------->|
//!     | ready <bytes in folios>   |      the pool is filled
//!     |-------------------------->|
//!     |                           |  fsmount(2): the filesystem is there, and mounted nowhere
//!     |                  mounted  |
//!     |<--------------------------|
//!     | serving                   |      FUSE_INIT is answered; the daemon lets go of the socket
//!     |-------------------------->|
//!     |                           |  move_mount(2)
//! ```
//!
//! Instead of each of its lines the daemon may say `failed <why>` and end. A side that finds the socket closed before
//! `serving` ends and gives everything back. Until move_mount(2) the helper alone holds the filesystem, so its death
//! is an unmount to the daemon.

use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;

/// A line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Bytes that the pool has by now, and will have.
    Progress {
        /// By now.
        done: u64,
        /// In the end.
        total: u64,
    },
    /// The pool is filled, with so many bytes in 2 MiB folios.
    Ready {
        /// Bytes in 2 MiB folios.
        huge: u64,
        /// Bytes in all.
        total: u64,
    },
    /// The filesystem is there, and held by the helper.
    Mounted,
    /// The filesystem serves.
    Serving,
    /// It does not, and why.
    Failed(String),
}

impl fmt::Display for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Progress { done, total } => write!(f, "progress {done} {total}"),
            Self::Ready { huge, total } => write!(f, "ready {huge} {total}"),
            Self::Mounted => write!(f, "mounted"),
            Self::Serving => write!(f, "serving"),
            Self::Failed(why) => write!(f, "failed {}", why.replace('\n', " ")),
        }
    }
}

impl Message {
    fn parse(line: &str) -> Option<Self> {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        let pair = || {
            let (first, second) = rest.split_once(' ')?;
            Some((first.parse().ok()?, second.parse().ok()?))
        };
        match word {
            "progress" => pair().map(|(done, total)| Self::Progress { done, total }),
            "ready" => pair().map(|(huge, total)| Self::Ready { huge, total }),
            "mounted" => Some(Self::Mounted),
            "serving" => Some(Self::Serving),
            "failed" => Some(Self::Failed(rest.to_owned())),
            _ => None,
        }
    }
}

/// One end.
#[derive(Debug)]
pub struct Control {
    lines: BufReader<UnixStream>,
    _lock: Option<File>,
}

impl Control {
    /// Over a connected socket.
    pub fn new(socket: UnixStream) -> Self {
        Self { lines: BufReader::new(socket), _lock: None }
    }

    /// Holds `lock` until this is dropped: by the worker that has told the helper that it serves, or at its end.
    pub fn hold(&mut self, lock: File) {
        self._lock = Some(lock);
    }

    /// The same end once more, of which nothing has been received.
    ///
    /// # Errors
    /// What dup(2) answers.
    pub fn try_clone(&self) -> std::io::Result<Self> {
        Ok(Self::new(self.socket().try_clone()?))
    }

    /// The socket, to wait for it.
    pub fn socket(&self) -> &UnixStream {
        self.lines.get_ref()
    }

    /// Whether a line has been received already, so that there is nothing to wait for.
    pub fn has_buffered(&self) -> bool {
        !self.lines.buffer().is_empty()
    }

    /// Sends a line.
    ///
    /// # Errors
    /// EPIPE where the other side is gone.
    pub fn send(&mut self, message: &Message) -> std::io::Result<()> {
        self.lines.get_mut().write_all(format!("{message}\n").as_bytes())
    }

    /// Receives a line; `None` where the other side is gone, or speaks something else.
    pub fn receive(&mut self) -> Option<Message> {
        let mut line = String::new();
        self.lines.read_line(&mut line).ok()?;
        Message::parse(line.strip_suffix('\n')?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_is_understood_by_the_other_side() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (mut ours, mut theirs) = (Control::new(ours), Control::new(theirs));
        for message in [
            Message::Progress { done: 1, total: 2 },
            Message::Ready { huge: 3, total: 4 },
            Message::Mounted,
            Message::Serving,
            Message::Failed("this kernel lacks something".into()),
        ] {
            ours.send(&message).unwrap();
            assert_eq!(theirs.receive(), Some(message));
        }
        drop(ours);
        assert_eq!(theirs.receive(), None);
    }
}
