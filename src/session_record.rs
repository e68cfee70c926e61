//! A small text file beside the tree, for the next daemon. It holds what the files do not tell.
//!
//! ```text
//!   hugetlb2 handover 1
//!   option size=64G
//!   request 6800...        FUSE_INIT as the kernel sent it, in hexadecimal
//!   reply 5000...          what it was answered
//! ```
//!
//! The first worker writes the file once, when the filesystem is mounted. The first line names the
//! version of *everything* that outlives a process: this file, the layout of objects and reserves,
//! and the ledgers, which also have versions of their own. A daemon that does not know the version
//! changes nothing.

use crate::error::{Error, Result};
use crate::fuse::Handshake;
use crate::index::MOUNT_POINT;
use crate::options::Options;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

const TITLE: &str = "hugetlb2 handover";
const VERSION: u32 = 1;

/// The content of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionRecord {
    /// The options that the pool was mounted with.
    pub options: Options,
    /// The handshake with the kernel.
    pub handshake: Handshake,
}

impl SessionRecord {
    /// Leaves it for who comes after: all of it or nothing.
    ///
    /// # Errors
    /// The errors of the kernel.
    pub fn write(&self) -> Result<()> {
        let (path, draft) = (Self::path(Path::new("/")), format!("{MOUNT_POINT}/handover.new"));
        std::fs::write(&draft, self.encode())?;
        Ok(std::fs::rename(draft, path)?)
    }

    /// Reads what was left, below `root`: `/`, or another process's root.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for another version or a text that does not parse; ENOENT.
    pub fn read(root: &Path) -> Result<Self> {
        Self::decode(&std::fs::read_to_string(Self::path(root))?).map_err(Error::Corrupt)
    }

    /// The file, below `root`.
    pub fn path(root: &Path) -> PathBuf {
        root.join(MOUNT_POINT.trim_start_matches('/')).join("handover")
    }

    fn encode(&self) -> String {
        let mut out = format!("{TITLE} {VERSION}\n");
        for (name, value) in self.options.given() {
            let _ = writeln!(out, "option {name}={value}");
        }
        let _ = writeln!(out, "request {}", to_hex(&self.handshake.request));
        let _ = writeln!(out, "reply {}", to_hex(&self.handshake.reply));
        out
    }

    fn decode(text: &str) -> Result<Self, String> {
        let mut lines = text.lines();
        let version = lines.next().and_then(|line| line.strip_prefix(TITLE)?.trim().parse().ok());
        match version {
            Some(VERSION) => {}
            Some(other) => {
                return Err(format!(
                    "what was left is of version {other}, and this program knows {VERSION}"
                ));
            }
            None => return Err("what was left has no version".into()),
        }
        let (mut options, mut handshake) = (Options::default(), Handshake::default());
        for line in lines {
            let wrong = || format!("{line:?} is nothing that this program knows");
            let (what, value) = line.split_once(' ').ok_or_else(wrong)?;
            match what {
                "option" => {
                    let (name, value) = value.split_once('=').ok_or_else(wrong)?;
                    options.set(name, Some(value))?;
                }
                "request" => handshake.request = from_hex(value).ok_or_else(wrong)?,
                "reply" => handshake.reply = from_hex(value).ok_or_else(wrong)?,
                _ => return Err(wrong()),
            }
        }
        Ok(Self { options, handshake })
    }
}

fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: &u8| (*byte as char).to_digit(16).map(|digit| digit as u8);
    let pairs = text.as_bytes().chunks(2);
    pairs.map(|pair| Some(digit(pair.first()?)? << 4 | digit(pair.get(1)?)?)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handover() -> SessionRecord {
        let mut options = Options::default();
        options.set("size", Some("64M")).unwrap();
        options.set("pagesize", Some("2M")).unwrap();
        options.set("punch", Some("keep")).unwrap();
        options.set("nodes", Some("0:32M,2:32M")).unwrap();
        options.set("log", Some("/var/log/a pool=1")).unwrap();
        SessionRecord {
            options,
            handshake: Handshake { request: vec![0, 255, 16], reply: vec![1] },
        }
    }

    #[test]
    fn what_is_left_reads_as_it_was_written() {
        assert_eq!(SessionRecord::decode(&handover().encode()), Ok(handover()));
    }

    /// A version that did not know the option left none, and took memory of all nodes.
    #[test]
    fn a_record_without_an_option_has_its_default() {
        let text = handover().encode().replace("option nodes=0:33554432,2:33554432\n", "");
        let left = SessionRecord::decode(&text).unwrap();
        assert_eq!(left.options, Options { nodes: None, ..handover().options });
    }

    #[test]
    fn another_version_is_refused_with_both_named() {
        let text = handover().encode().replace("handover 1", "handover 2");
        let why = SessionRecord::decode(&text).unwrap_err();
        assert!(why.contains("version 2") && why.contains("knows 1"), "{why}");
    }

    #[test]
    fn what_does_not_parse_is_refused() {
        for text in
            ["", "hugetlb2 handover", "hugetlb2 handover 1\nnews", "hugetlb2 handover 1\nreply 0"]
        {
            assert!(SessionRecord::decode(text).is_err(), "{text:?}");
        }
    }
}
