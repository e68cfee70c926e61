//! Quarantined ranges, and their text form in the attributes. This module only parses and formats.
//!
//! The grammar of the attributes: each line has one item, numbers are decimal or hexadecimal
//! (`0x`), and ranges are rounded outward to 4 KiB. If a line is malformed, or names bytes behind
//! the end of the file, the whole value is refused.

use crate::error::{Error, Result};
use crate::options::parse_number;
use crate::units::{Range, SUBPAGE_SIZE, Subpage};
use std::fmt::Write as _;

/// The cause of a quarantine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A hardware memory error: the kernel keeps the subpage out of use.
    Hw,
    /// A soft hole: invariant S1 ([`crate::sealed`]) keeps it shut.
    Soft,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Hw => "hw",
            Self::Soft => "soft",
        }
    }
}

/// A quarantined range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quarantined {
    /// The bytes, in whole subpages.
    pub range: Range,
    /// The cause.
    pub kind: Kind,
    /// Start of the quarantine, in seconds since the epoch.
    pub time: u64,
}

/// Joins neighbours with the same kind and time. `ranges` must ascend.
pub fn coalesce(ranges: impl Iterator<Item = (Range, Kind, u64)>) -> Vec<Quarantined> {
    let mut out: Vec<Quarantined> = Vec::new();
    for (range, kind, time) in ranges {
        match out.last_mut() {
            Some(last)
                if last.range.end == range.start && last.kind == kind && last.time == time =>
            {
                last.range.end = range.end;
            }
            _ => out.push(Quarantined { range, kind, time }),
        }
    }
    out
}

/// Formats the value of the poison attribute.
pub fn format(quarantined: &[Quarantined]) -> String {
    let mut out = String::new();
    for item in quarantined {
        let _ = writeln!(out, "{} {} {}", item.range, item.kind.name(), item.time);
    }
    out
}

/// The new content of a quarantined subpage after a repair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Zeros.
    Zero,
    /// The bytes that are still known.
    Salvage,
}

/// Parses a value of the poison attribute: `<offset> <length>` on each line. Further columns are
/// ignored, so a program can write a value that it has read.
///
/// # Errors
/// [`Error::Invalid`] if the value is not valid for a file of `size` bytes.
pub fn parse_poison(value: &[u8], size: u64) -> Result<Vec<Range>> {
    let ranges = items(value)?
        .map(|line| {
            let mut words = line.split_ascii_whitespace();
            parse_range(words.next(), words.next(), size)
        })
        .collect::<Result<Vec<_>>>()?;
    if ranges.is_empty() {
        return Err(Error::invalid("no range; expected <offset> <length>"));
    }
    Ok(ranges)
}

/// A line of a list of losses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// `hw`: a real memory error.
    Error,
    /// `soft`: a quarantine as on request.
    Soft,
    /// `lost`: a soft quarantine of which no byte is known.
    WithoutBytes,
}

/// Parses a list of losses: `<offset> <length> hw|soft|lost` on each line, as the poison attribute
/// shows the first two. Without a kind a range is soft, and further columns are ignored.
///
/// # Errors
/// [`Error::Invalid`] if the value is not valid for a file of `size` bytes.
pub fn parse_losses(value: &[u8], size: u64) -> Result<Vec<(Range, Loss)>> {
    let ranges = parse_poison(value, size)?;
    let kinds = items(value)?.map(|line| match line.split_ascii_whitespace().nth(2) {
        Some("hw") => Ok(Loss::Error),
        Some("soft") | None => Ok(Loss::Soft),
        Some("lost") => Ok(Loss::WithoutBytes),
        Some(other) => Err(Error::invalid(format!("{other:?} is not hw, soft or lost"))),
    });
    ranges.into_iter().zip(kinds).map(|(range, kind)| Ok((range, kind?))).collect()
}

/// Parses a value of the repair attribute: `zero|salvage <offset> <length>` or `zero|salvage all`
/// on each line.
///
/// # Errors
/// [`Error::Invalid`] if the value is not valid for a file of `size` bytes.
pub fn parse_repair(value: &[u8], size: u64) -> Result<Vec<(Repair, Range)>> {
    let parse = |line: &str| {
        let (verb, target) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let verb = match verb {
            "zero" => Repair::Zero,
            "salvage" => Repair::Salvage,
            other => return Err(Error::invalid(format!("{other:?} is neither zero nor salvage"))),
        };
        Ok((verb, parse_target(target, size)?))
    };
    let repairs = items(value)?.map(parse).collect::<Result<Vec<_>>>()?;
    if repairs.is_empty() {
        return Err(Error::invalid("no request; expected zero|salvage <offset> <length>, or all"));
    }
    Ok(repairs)
}

/// Parses a value of the collapse attribute: `<offset> <length>` or `all` on each line.
///
/// # Errors
/// [`Error::Invalid`] if the value is not valid for a file of `size` bytes.
pub fn parse_collapse(value: &[u8], size: u64) -> Result<Vec<Range>> {
    let ranges = items(value)?.map(|line| parse_target(line, size)).collect::<Result<Vec<_>>>()?;
    if ranges.is_empty() {
        return Err(Error::invalid("no range; expected <offset> <length>, or all"));
    }
    Ok(ranges)
}

/// Parses a value of the inject attribute: `hw <offset>`.
///
/// # Errors
/// [`Error::Invalid`] if the value is not valid for a file of `size` bytes.
pub fn parse_inject(value: &[u8], size: u64) -> Result<Subpage> {
    let lines: Vec<&str> = items(value)?.collect();
    let [line] = lines[..] else { return Err(Error::invalid("expected one line, hw <offset>")) };
    match line.split_ascii_whitespace().collect::<Vec<_>>()[..] {
        ["hw", offset] => {
            Ok(Subpage::containing(parse_range(Some(offset), Some("1"), size)?.start))
        }
        _ => Err(Error::invalid(format!("{line:?} is not hw <offset>"))),
    }
}

/// The lines that are not blank. Shells add a final newline and C programs a final NUL; neither
/// makes a line.
fn items(value: &[u8]) -> Result<impl Iterator<Item = &str>> {
    let value = value.strip_suffix(b"\0").unwrap_or(value);
    let text = std::str::from_utf8(value).map_err(|_| Error::invalid("not text"))?;
    Ok(text.lines().map(str::trim).filter(|line| !line.is_empty()))
}

fn parse_target(text: &str, size: u64) -> Result<Range> {
    let mut words = text.split_ascii_whitespace();
    let (first, second, third) = (words.next(), words.next(), words.next());
    match (first, second) {
        (Some("all"), None) => Ok(Range::new(0, size).subpages_out()),
        _ if third.is_some() => {
            Err(Error::invalid(format!("{text:?} has more than an offset and a length")))
        }
        _ => parse_range(first, second, size),
    }
}

fn parse_range(offset: Option<&str>, length: Option<&str>, size: u64) -> Result<Range> {
    let number = |word: Option<&str>, what: &str| {
        let word = word.ok_or_else(|| Error::invalid(format!("the {what} is missing")))?;
        parse_number(word)
            .ok_or_else(|| Error::invalid(format!("{word:?} is not a number ({what})")))
    };
    let (offset, length) = (number(offset, "offset")?, number(length, "length")?);
    let range = Range::checked_at(offset, length)
        .filter(|range| range.end <= size.next_multiple_of(SUBPAGE_SIZE));
    match range {
        Some(range) if !range.is_empty() && range.start < size => Ok(range.subpages_out()),
        Some(range) if range.is_empty() => Err(Error::invalid("the length is 0")),
        _ => Err(Error::invalid(format!(
            "{offset:#x} {length:#x} reaches behind the end of the file ({size:#x})"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 1 << 20;

    #[test]
    fn neighbours_are_joined_and_others_are_not() {
        let joined = coalesce(
            [(1, 5), (2, 5), (3, 6), (9, 6)]
                .iter()
                .map(|(n, time)| (Subpage(*n).range(), Kind::Soft, *time)),
        );
        let ranges: Vec<_> =
            joined.iter().map(|item| (item.range.start / 4096, item.range.len() / 4096)).collect();
        assert_eq!(ranges, [(1, 2), (3, 1), (9, 1)]);
    }

    #[test]
    fn a_value_that_was_read_can_be_written() {
        let quarantined = coalesce([(Subpage(7).range(), Kind::Soft, 1_800_000_000)].into_iter());
        let text = format(&quarantined);
        assert_eq!(text, "0x7000 0x1000 soft 1800000000\n");
        assert_eq!(parse_poison(text.as_bytes(), SIZE).unwrap(), [Subpage(7).range()]);
    }

    #[test]
    fn ranges_are_rounded_outward_and_numbers_may_be_hexadecimal() {
        assert_eq!(parse_poison(b"0x1001 1", SIZE).unwrap(), [Range::new(0x1000, 0x2000)]);
        assert_eq!(parse_poison(b"4095 2\n8192 1\0", SIZE).unwrap().len(), 2);
    }

    #[test]
    fn the_last_subpage_of_a_file_that_ends_within_it_can_be_named() {
        assert_eq!(parse_poison(b"4096 4096", 5000).unwrap(), [Range::new(4096, 8192)]);
        assert!(parse_poison(b"8192 1", 5000).is_err());
    }

    #[test]
    fn malformed_poison_is_refused() {
        for value in [
            &b""[..],
            b"x",
            b"1",
            b"1 y",
            b"-1 5",
            b"0 0",
            b"0x 1",
            b"+1 1",
            b"1048576 1",
            b"0 1048577",
            b"18446744073709551615 2",
            b"\xff\xfe",
            b"0 4096\nnonsense",
        ] {
            assert!(matches!(parse_poison(value, SIZE), Err(Error::Invalid(_))), "{value:?}");
        }
    }

    #[test]
    fn repairs_name_what_to_put_in_place() {
        assert_eq!(parse_repair(b"zero 0 1", SIZE).unwrap(), [(Repair::Zero, Range::new(0, 4096))]);
        assert_eq!(
            parse_repair(b"salvage all\n", SIZE).unwrap(),
            [(Repair::Salvage, Range::new(0, SIZE))]
        );
        for value in [
            &b""[..],
            b"zero",
            b"heal all",
            b"zero all all",
            b"zero 0",
            b"zero 0 1 2",
            b"all",
            b"zeroall",
        ] {
            assert!(matches!(parse_repair(value, SIZE), Err(Error::Invalid(_))), "{value:?}");
        }
    }

    #[test]
    fn a_list_of_losses_has_kinds() {
        let text = b"0 4096 hw 7\n0x2000 1\n0x3000 4096 soft\n0x1000 1 lost";
        let kinds: Vec<Loss> =
            parse_losses(text, 16384).unwrap().into_iter().map(|(_, kind)| kind).collect();
        assert_eq!(kinds, [Loss::Error, Loss::Soft, Loss::Soft, Loss::WithoutBytes]);
        for wrong in ["", "0", "0 1 hard", "0 4096 hw\n16384 1 hw", "0 1 HW"] {
            assert!(matches!(parse_losses(wrong.as_bytes(), 16384), Err(Error::Invalid(_))));
        }
    }

    #[test]
    fn injection_takes_one_offset() {
        assert_eq!(parse_inject(b"hw 0x1fff\n", SIZE).unwrap(), Subpage(1));
        for value in
            [&b""[..], b"hw", b"soft 0", b"hw 0 1", b"hw 0\nhw 4096", b"hw 1048576", b"hw x"]
        {
            assert!(matches!(parse_inject(value, SIZE), Err(Error::Invalid(_))), "{value:?}");
        }
    }

    #[test]
    fn collapse_takes_a_range_or_all() {
        assert_eq!(parse_collapse(b"all", SIZE).unwrap(), [Range::new(0, SIZE)]);
        assert_eq!(parse_collapse(b"0 4096", SIZE).unwrap(), [Range::new(0, 4096)]);
        assert!(parse_collapse(b"everything", SIZE).is_err());
    }
}
