//! The texts that the guard reads: the list of quarantines, and /proc/self/maps. No memory is
//! taken.

use crate::attributes::LONGEST_VALUE;
use crate::options::parse_number;
use crate::units::Range;
use rustix::fd::OwnedFd;
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::{Errno, read};

/// The length of the shortest line of a list: `0x0 0x1000 hw 0`.
const SHORTEST_LINE: usize = 16;

/// The quarantined ranges of a file, in the order of their offsets.
pub struct List {
    ranges: [(Range, bool); LONGEST_VALUE / SHORTEST_LINE],
    count: usize,
}

impl List {
    /// An empty one.
    pub const fn new() -> Self {
        const NOTHING: (Range, bool) = (Range { start: 0, end: 0 }, false);
        Self { ranges: [NOTHING; LONGEST_VALUE / SHORTEST_LINE], count: 0 }
    }

    /// Replaces the ranges by those of a value of the quarantine attribute:
    /// `<offset> <length> hw|soft <unix time>` on each line. Lines of another form are left out.
    pub fn parse(&mut self, value: &[u8]) {
        self.count = 0;
        let text = str::from_utf8(value).unwrap_or_default();
        for line in text.lines() {
            let mut words = line.split(' ');
            let mut number = || parse_number(words.next()?);
            let Some(range) = number().zip(number()).and_then(|(at, n)| Range::checked_at(at, n))
            else {
                continue;
            };
            let Some(place) = self.ranges.get_mut(self.count) else { break };
            *place = (range, words.next() == Some("soft"));
            self.count += 1;
        }
    }

    fn all(&self) -> &[(Range, bool)] {
        &self.ranges[..self.count]
    }

    /// The parts of `bytes` that are quarantined softly.
    pub fn soft_in(&self, bytes: Range) -> impl Iterator<Item = Range> {
        let soft = self.all().iter().filter(|(_, is_soft)| *is_soft);
        soft.map(move |(range, _)| range.intersect(bytes)).filter(|range| !range.is_empty())
    }

    /// Calls `found` with the parts of `bytes` that are not quarantined.
    pub fn for_each_good_in(&self, bytes: Range, mut found: impl FnMut(Range)) {
        let mut at = bytes.start;
        let first = self.all().partition_point(|(range, _)| range.end <= bytes.start);
        for (range, _) in &self.all()[first..] {
            let good = Range::new(at, range.start.min(bytes.end));
            if !good.is_empty() {
                found(good);
            }
            at = at.max(range.end);
            if range.start >= bytes.end {
                return;
            }
        }
        if at < bytes.end {
            found(Range::new(at, bytes.end));
        }
    }
}

/// A mapping of a file, as a line of /proc/PID/maps tells it (proc(5)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area {
    /// The addresses.
    pub addresses: Range,
    /// The offset in the file of the first byte.
    pub offset: u64,
    /// The device number of the file's filesystem, major and minor.
    pub device: (u32, u32),
    /// The file's inode number.
    pub inode: u64,
    /// True for MAP_SHARED.
    pub is_shared: bool,
}

impl Area {
    /// Parses a line: `7f0e3fe00000-7f0e43e00000 rw-s 00000000 00:2b 1234   /mnt/h2/vm0`.
    pub fn parse(line: &[u8]) -> Option<Self> {
        let fields = line.split(|byte| *byte == b' ').take(5);
        let mut fields = fields.map(|field| str::from_utf8(field).unwrap_or_default());
        let hexadecimal = |text: &str| u64::from_str_radix(text, 16).ok();
        let (start, end) = fields.next()?.split_once('-')?;
        let is_shared = fields.next()?.as_bytes().get(3) == Some(&b's');
        let offset = hexadecimal(fields.next()?)?;
        let (major, minor) = fields.next()?.split_once(':')?;
        let number = |text: &str| u32::from_str_radix(text, 16).ok();
        Some(Self {
            addresses: Range::new(hexadecimal(start)?, hexadecimal(end)?),
            offset,
            device: (number(major)?, number(minor)?),
            inode: fields.next()?.parse().ok()?,
            is_shared,
        })
    }

    /// The bytes of the file that are mapped.
    pub fn bytes(&self) -> Range {
        Range::new(self.offset, self.offset.saturating_add(self.addresses.len()))
    }

    /// The addresses of a part of [`Area::bytes`].
    pub fn addresses_of(&self, bytes: Range) -> Range {
        let move_to = |byte: u64| byte.wrapping_sub(self.offset).wrapping_add(self.addresses.start);
        Range::new(move_to(bytes.start), move_to(bytes.end))
    }

    /// The bytes of the file at a part of the addresses.
    pub fn bytes_at(&self, addresses: Range) -> Range {
        let move_to = |at: u64| at.wrapping_sub(self.addresses.start).wrapping_add(self.offset);
        Range::new(move_to(addresses.start), move_to(addresses.end))
    }
}

/// The mappings of this process, one after the other.
pub struct Areas {
    maps: OwnedFd,
    text: [u8; LONGEST_LINE],
    start: usize,
    end: usize,
}

/// A path has 4095 bytes at most, and the kernel writes some of them as four.
const LONGEST_LINE: usize = 20 << 10;

impl Areas {
    /// From the lowest address on.
    ///
    /// # Errors
    /// The errors of open(2).
    pub fn open() -> Result<Self, Errno> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let maps = openat(CWD, c"/proc/self/maps", flags, Mode::empty())?;
        Ok(Self { maps, text: [0; LONGEST_LINE], start: 0, end: 0 })
    }
}

impl Iterator for Areas {
    type Item = Area;

    fn next(&mut self) -> Option<Area> {
        loop {
            let text = &self.text[self.start..self.end];
            if let Some(length) = text.iter().position(|byte| *byte == b'\n') {
                let area = Area::parse(&text[..length]);
                self.start += length + 1;
                match area {
                    Some(area) => return Some(area),
                    None => continue,
                }
            }
            self.text.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
            match read(&self.maps, &mut self.text[self.end..]) {
                Ok(0) | Err(_) => return None,
                Ok(count) => self.end += count,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(text: &str) -> Box<List> {
        let mut list = Box::new(List::new());
        list.parse(text.as_bytes());
        list
    }

    #[test]
    fn soft_ranges_are_marked_and_those_of_errors_are_not() {
        let list =
            list("0x1000 0x2000 soft 7\n0x3000 0x1000 hw 7\nso what\n0x8000 0x1000 soft 9\n");
        let soft: Vec<_> = list.soft_in(Range::new(0x2000, 0x9000)).collect();
        assert_eq!(soft, [Range::new(0x2000, 0x3000), Range::new(0x8000, 0x9000)]);
    }

    #[test]
    fn markers_of_what_is_not_quarantined_are_removed() {
        let list = list("0x1000 0x2000 soft 7\n0x3000 0x1000 hw 7\n0x8000 0x1000 soft 9\n");
        let good = |start, end| {
            let mut found = Vec::new();
            list.for_each_good_in(Range::new(start, end), |range| {
                found.push((range.start, range.end));
            });
            found
        };
        assert_eq!(good(0, 0x9000), [(0, 0x1000), (0x4000, 0x8000)]);
        assert_eq!(good(0x2000, 0x4000), []);
        assert_eq!(good(0x3000, 0x6000), [(0x4000, 0x6000)]);
        assert_eq!(good(0x8000, 0xa000), [(0x9000, 0xa000)]);
        assert_eq!(good(0x9000, 0xa000), [(0x9000, 0xa000)]);
    }

    #[test]
    fn a_list_is_never_longer_than_its_table() {
        let lines = "0x0 0x1000 hw 0\n".repeat(LONGEST_VALUE / SHORTEST_LINE + 1);
        assert_eq!(list(&lines).count, LONGEST_VALUE / SHORTEST_LINE);
    }

    #[test]
    fn a_mapping_leads_from_bytes_to_addresses() {
        let line = b"7f0000201000-7f0000601000 rw-s 00003000 00:2b 7   /h2/a b";
        let area = Area::parse(line).unwrap();
        assert_eq!((area.device, area.inode, area.is_shared), ((0, 0x2b), 7, true));
        assert_eq!(area.bytes(), Range::new(0x3000, 0x40_3000));
        let part = Range::new(0x4000, 0x5000);
        assert_eq!(area.addresses_of(part), Range::new(0x7f00_0020_2000, 0x7f00_0020_3000));
        assert_eq!(area.bytes_at(area.addresses_of(part)), part);
        assert_eq!(
            Area::parse(b"7f0000201000-7f0000601000 rw-p 00000000 00:00 0").unwrap().inode,
            0
        );
    }

    #[test]
    fn the_mappings_of_this_process_are_all_there() {
        let text = std::fs::read_to_string("/proc/self/maps").unwrap();
        let count = Areas::open().unwrap().count();
        assert!(count.abs_diff(text.lines().count()) < 20, "{count}\n{text}"); // others map, too
    }
}
