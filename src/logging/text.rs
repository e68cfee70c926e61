//! A line of the log is one line, printable, and not too long, no matter what a user has put into
//! it.

use crate::sys;
use log::Level;
use std::fmt::{self, Arguments, Write as _};

/// The most bytes of a line. /dev/kmsg takes no more than 976 (kernel/printk/printk.c,
/// LOG_LINE_MAX).
pub const LONGEST: usize = 900;

/// Bytes of a line that are left to what is in front of the text and behind a text that was cut.
const FRAME: usize = 100;

/// The shape of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// In a file: time, process, level, text.
    File,
    /// In the system log (RFC 3164, syslog(3)) or the kernel's: priority, process, text.
    System,
}

const DAEMON_FACILITY: u8 = 3 << 3;

fn severity(level: Level) -> u8 {
    match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    }
}

impl Shape {
    /// The line, without its end.
    pub fn line(self, level: Level, text: &Arguments<'_>) -> String {
        let process = std::process::id();
        let mut line = match self {
            Self::File => format!("{} hugetlb2fsd[{process}] {level}: ", sys::unix_time()),
            Self::System => {
                format!("<{}>hugetlb2fsd[{process}]: ", DAEMON_FACILITY | severity(level))
            }
        };
        let room = LONGEST - FRAME;
        let mut bounded = Bounded { line: &mut line, room, cut: 0 };
        let _ = bounded.write_fmt(*text); // a value that cannot be shown ends the line
        let cut = bounded.cut;
        if cut > 0 {
            let _ = write!(line, "... ({cut} bytes more)");
        }
        line
    }
}

/// Takes so many bytes, escapes what is not printable, and counts the rest.
struct Bounded<'a> {
    line: &'a mut String,
    room: usize,
    cut: usize,
}

impl fmt::Write for Bounded<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for (at, character) in text.char_indices() {
            let escaped = escaped(character);
            let length = escaped.clone().map(char::len_utf8).sum();
            if self.cut > 0 || self.room < length {
                self.cut += text.len() - at;
                return Ok(());
            }
            self.room -= length;
            self.line.extend(escaped);
        }
        Ok(())
    }
}

/// Quotes and backslashes stay: a value that a program chooses is logged as [`Excerpt`], which
/// escapes these.
fn escaped(character: char) -> impl Iterator<Item = char> + Clone {
    let plain = matches!(character, '"' | '\'' | '\\').then_some(character);
    let escaped = character.escape_debug().take(if plain.is_some() { 0 } else { usize::MAX });
    plain.into_iter().chain(escaped)
}

/// A value that a user has chosen, in quotes: its first bytes, with everything but ASCII escaped.
pub struct Excerpt<'a>(pub &'a [u8]);

impl Excerpt<'_> {
    const BYTES: usize = 100;
}

impl fmt::Display for Excerpt<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = &self.0[..self.0.len().min(Self::BYTES)];
        write!(f, "\"{}\"", shown.escape_ascii())?;
        match self.0.len() - shown.len() {
            0 => Ok(()),
            more => write!(f, " and {more} bytes more"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_with_line_ends_and_controls_is_one_line() {
        let text = "a\nb\r\x1b[2J\u{85}\u{202e}\"c\" \\";
        let line = Shape::System.line(Level::Info, &format_args!("{text}"));
        let start = format!("<30>hugetlb2fsd[{}]: ", std::process::id());
        let shown = r#"a\nb\r\u{1b}[2J\u{85}\u{202e}"c" \"#;
        assert_eq!(line.strip_prefix(&start), Some(shown));
    }

    #[test]
    fn a_long_text_is_cut_and_the_rest_is_counted() {
        for text in ["x".repeat(70_000), "\n".repeat(70_000), "\u{e9}".repeat(35_000)] {
            for shape in [Shape::File, Shape::System] {
                let line = shape.line(Level::Error, &format_args!("{text}"));
                assert!(line.len() <= LONGEST, "{} bytes", line.len());
                assert!(line.ends_with(" bytes more)"), "{line}");
            }
        }
    }

    #[test]
    fn an_excerpt_shows_the_first_bytes_escaped() {
        assert_eq!(Excerpt(b"nonsense").to_string(), "\"nonsense\"");
        assert_eq!(Excerpt(b"a\"\n\xff").to_string(), r#""a\"\n\xff""#);
        let long = Excerpt(&[b'x'; 65_000]).to_string();
        assert_eq!(long, format!("\"{}\" and 64900 bytes more", "x".repeat(100)));
    }
}
