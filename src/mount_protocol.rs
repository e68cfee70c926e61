//! The messages between the mount helper and the daemon during a mount. Each message is one line on
//! a socket.
//!
//! ```text
//!   daemon                      helper
//!     | progress <done> <total>   |      while the pool is filled
//!     |-------------------------->|
//!     | ready <bytes in folios>   |      the pool is filled
//!     |-------------------------->|
//!     |                           |  fsmount(2): the filesystem exists, but is not mounted yet
//!     |                  mounted  |
//!     |<--------------------------|
//!     | serving                   |      FUSE_INIT is answered; the daemon closes the socket
//!     |-------------------------->|
//!     |                           |  move_mount(2)
//! ```
//!
//! In place of any of its lines, the daemon may send `failed <why>` and end. If a side finds the
//! socket closed before `serving`, it ends and gives everything back. Until move_mount(2), only the
//! helper holds the filesystem. So if the helper dies, the daemon sees an unmount.

use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;

/// A message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Progress while the pool is filled.
    Progress {
        /// Bytes in the pool now.
        done: u64,
        /// Bytes in the pool when it is full.
        total: u64,
    },
    /// The pool is filled.
    Ready {
        /// Bytes in 2 MiB folios.
        huge: u64,
        /// Bytes in all.
        total: u64,
    },
    /// The filesystem exists, and the helper holds it.
    Mounted,
    /// The daemon serves the filesystem.
    Serving,
    /// The daemon does not serve. The text has the reason.
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

/// One end of the socket.
#[derive(Debug)]
pub struct Control {
    lines: BufReader<UnixStream>,
    _lock: Option<File>,
}

impl Control {
    /// Makes an end of a connected socket.
    pub fn new(socket: UnixStream) -> Self {
        Self { lines: BufReader::new(socket), _lock: None }
    }

    /// Holds `lock` until this end is dropped. The worker drops it after it has told the helper
    /// that it serves, or when the worker ends.
    pub fn hold(&mut self, lock: File) {
        self._lock = Some(lock);
    }

    /// A second handle of this end. Its buffer is empty.
    ///
    /// # Errors
    /// The errors of dup(2).
    pub fn try_clone(&self) -> std::io::Result<Self> {
        Ok(Self::new(self.socket().try_clone()?))
    }

    /// The socket, for a caller that waits for input.
    pub fn socket(&self) -> &UnixStream {
        self.lines.get_ref()
    }

    /// True if received bytes are already in the buffer. Then the caller must not wait for the
    /// socket.
    pub fn has_buffered(&self) -> bool {
        !self.lines.buffer().is_empty()
    }

    /// Sends a line.
    ///
    /// # Errors
    /// EPIPE if the other side is gone.
    pub fn send(&mut self, message: &Message) -> std::io::Result<()> {
        self.lines.get_mut().write_all(format!("{message}\n").as_bytes())
    }

    /// Receives a line. `None` if the other side is gone, or has sent something that is no message.
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
