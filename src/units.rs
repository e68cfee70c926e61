//! The units of memory as types, and all conversions between them.
//!
//! | type | unit of | size |
//! |---|---|---|
//! | [`Subpage`] | quarantine: the base page that one memory error takes | 4 KiB |
//! | [`Folio`] | mapping by one PMD entry: the largest page of tmpfs | 2 MiB |
//! | [`PageSize`] | reservation: the pool counts in pages | 2 MiB or 1 GiB |
//! | [`Range`] | bytes, half open | any |
//!
//! A conversion that rounds has the direction in its name.

use std::fmt;

/// Bytes in a base page. Mapping and quarantine work in base pages.
pub const SUBPAGE_SIZE: u64 = 4096;
/// Bytes in a folio that one PMD entry maps (x86_64, and aarch64 with 4 KiB base pages).
pub const FOLIO_SIZE: u64 = 2 << 20;
/// Base pages in a folio.
pub const SUBPAGES_PER_FOLIO: u64 = FOLIO_SIZE / SUBPAGE_SIZE;
/// Bytes in one unit of `st_blocks` (stat(2)).
pub const STAT_BLOCK: u64 = 512;

const _: () = assert!(SUBPAGES_PER_FOLIO == 512);
const _: () = assert!(FOLIO_SIZE.is_power_of_two() && SUBPAGE_SIZE.is_power_of_two());

/// Index of a 4 KiB subpage in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Subpage(pub u64);

impl Subpage {
    /// The subpage that holds the byte at `offset`.
    pub fn containing(offset: u64) -> Self {
        Self(offset / SUBPAGE_SIZE)
    }

    /// Offset of the first byte, in bytes.
    pub fn offset(self) -> u64 {
        self.0 * SUBPAGE_SIZE
    }

    /// The bytes of the subpage.
    pub fn range(self) -> Range {
        Range::at(self.offset(), SUBPAGE_SIZE)
    }

    /// The folio that contains the subpage.
    pub fn folio(self) -> Folio {
        Folio(self.0 / SUBPAGES_PER_FOLIO)
    }
}

/// Index of a 2 MiB folio in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Folio(pub u64);

impl Folio {
    /// The bytes of the folio.
    pub fn range(self) -> Range {
        Range::at(self.0 * FOLIO_SIZE, FOLIO_SIZE)
    }
}

/// Index of a page (of the pool's [`PageSize`]) in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Page(pub u64);

/// The size of the pool's pages, the unit of reservation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageSize {
    /// 2 MiB: one folio.
    Huge,
    /// 1 GiB: 512 folios.
    Gigantic,
}

impl PageSize {
    /// Bytes in a page.
    pub const fn bytes(self) -> u64 {
        match self {
            Self::Huge => FOLIO_SIZE,
            Self::Gigantic => 1 << 30,
        }
    }

    /// Number of pages that `bytes` need. The last page may be used in part.
    pub const fn pages_up(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.bytes())
    }

    /// Number of whole pages in `bytes`.
    pub const fn pages_down(self, bytes: u64) -> u64 {
        bytes / self.bytes()
    }

    /// The bytes of `page`.
    pub fn range(self, page: Page) -> Range {
        Range::at(page.0 * self.bytes(), self.bytes())
    }

    /// The bytes of consecutive pages.
    pub fn bytes_of(self, pages: &std::ops::Range<Page>) -> Range {
        Range::new(pages.start.0 * self.bytes(), pages.end.0 * self.bytes())
    }

    /// The pages that contain at least one byte of `range`.
    pub fn pages_touching(self, range: Range) -> std::ops::Range<Page> {
        let start = self.pages_down(range.start);
        let end = if range.is_empty() { start } else { self.pages_up(range.end) };
        Page(start)..Page(end)
    }

    /// The pages that lie completely in `range`. If there are none, the result is an empty range.
    pub fn pages_within(self, range: Range) -> std::ops::Range<Page> {
        let start = self.pages_up(range.start);
        Page(start)..Page(self.pages_down(range.end).max(start))
    }
}

const _: () = assert!(PageSize::Gigantic.bytes().is_multiple_of(FOLIO_SIZE));

/// Bytes of a file: from `start` up to `end`, without the byte at `end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// Offset of the first byte.
    pub start: u64,
    /// Offset behind the last byte. It is never below `start`.
    pub end: u64,
}

impl Range {
    /// The bytes `start..end`. The range is empty if `end` is not above `start`.
    pub fn new(start: u64, end: u64) -> Self {
        Self { start, end: end.max(start) }
    }

    /// `length` bytes from `start`. `None` if the end does not fit in 64 bits.
    pub fn checked_at(start: u64, length: u64) -> Option<Self> {
        Some(Self { start, end: start.checked_add(length)? })
    }

    /// `length` bytes from `start`. The caller knows that the offsets are those of a file.
    ///
    /// # Panics
    /// If the end does not fit in 64 bits.
    pub fn at(start: u64, length: u64) -> Self {
        Self::checked_at(start, length).expect("a file's range ends below 2^64")
    }

    /// Length in bytes.
    pub fn len(self) -> u64 {
        self.end - self.start
    }

    /// True if the range has no byte.
    pub fn is_empty(self) -> bool {
        self.start == self.end
    }

    /// True if the range contains every byte of `other`.
    pub fn covers(self, other: Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// The bytes that are in both ranges.
    pub fn intersect(self, other: Self) -> Self {
        Self::new(self.start.max(other.start), self.end.min(other.end))
    }

    /// The range, enlarged to whole subpages.
    pub fn subpages_out(self) -> Self {
        self.aligned_out(SUBPAGE_SIZE)
    }

    /// The range, enlarged to whole folios.
    pub fn folios_out(self) -> Self {
        self.aligned_out(FOLIO_SIZE)
    }

    fn aligned_out(self, grain: u64) -> Self {
        Self::new(self.start / grain * grain, self.end.next_multiple_of(grain))
    }

    /// The subpages that contain at least one byte of the range.
    pub fn subpages(self) -> std::ops::Range<Subpage> {
        let out = self.subpages_out();
        Subpage(out.start / SUBPAGE_SIZE)..Subpage(out.end / SUBPAGE_SIZE)
    }

    /// The folios that contain at least one byte of the range.
    pub fn folios(self) -> impl DoubleEndedIterator<Item = Folio> + use<> {
        let out = self.folios_out();
        (out.start / FOLIO_SIZE..out.end / FOLIO_SIZE).map(Folio)
    }

    /// The pieces of the range between multiples of `grain`, in order.
    pub fn cut_at_multiples(self, grain: u64) -> impl DoubleEndedIterator<Item = Range> + use<> {
        let pieces = self.aligned_out(grain).steps(grain).map(move |piece| piece.intersect(self));
        pieces.filter(|piece| !piece.is_empty())
    }

    /// Pieces of at most `step` bytes, in order.
    pub fn steps(self, step: u64) -> impl DoubleEndedIterator<Item = Range> + use<> {
        let count = self.len().div_ceil(step);
        (0..count).map(move |n| {
            Range::new(self.start + n * step, (self.start + (n + 1) * step).min(self.end))
        })
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x} {:#x}", self.start, self.len())
    }
}

/// The identity of a file: inode number and generation of its inode in the index.
///
/// The generation is random, so the filesystem never uses an identity twice. The identity is enough
/// to open the inode again (open_by_handle_at(2)). The root has the number 1, as FUSE demands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InodeId(pub u64);

impl InodeId {
    /// The root directory of the mount.
    pub const ROOT: Self = Self(1);

    /// The identity from the two parts of a tmpfs file handle.
    pub fn from_parts(generation: u32, inode: u32) -> Self {
        Self(u64::from(generation) << 32 | u64::from(inode))
    }

    /// Parses the text that [`fmt::Display`] writes.
    pub fn parse(text: &str) -> Option<Self> {
        let is_number = text.len() == 16 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        is_number.then(|| u64::from_str_radix(text, 16).ok().map(Self))?
    }

    /// The two parts: generation and inode number.
    pub fn parts(self) -> (u32, u32) {
        ((self.0 >> 32) as u32, self.0 as u32)
    }
}

impl fmt::Display for InodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// A NUMA node: the memory beside one socket, by the kernel's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NumaNode(pub u32);

impl NumaNode {
    /// The last number that a kernel can have (CONFIG_NODES_SHIFT is 10 at most).
    pub const LAST: Self = Self(1023);

    /// Parses the text that [`fmt::Display`] writes.
    pub fn parse(text: &str) -> Option<Self> {
        let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        is_number.then(|| text.parse().ok().map(Self))?
    }

    /// Parses the kernel's list format, `0-2,5`. `None` for an empty list, and for one that does
    /// not ascend or goes beyond [`NumaNode::LAST`].
    pub fn parse_list(text: &str) -> Option<Vec<Self>> {
        let mut nodes = Vec::new();
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (Self::parse(first)?, Self::parse(last)?);
            let ascends = nodes.last().is_none_or(|before| *before < first) && first <= last;
            if !ascends || last > Self::LAST {
                return None;
            }
            nodes.extend((first.0..=last.0).map(Self));
        }
        Some(nodes)
    }

    /// The numbers of nodes, in the kernel's list format (`0,2`).
    pub fn list(nodes: &[Self]) -> String {
        nodes.iter().map(Self::to_string).collect::<Vec<_>>().join(",")
    }
}

impl fmt::Display for NumaNode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_round_outward_to_subpages() {
        assert_eq!(Range::at(1, 1).subpages_out(), Range::at(0, 4096));
        assert_eq!(Range::at(4095, 2).subpages_out(), Range::at(0, 8192));
        assert_eq!(Range::at(4096, 4096).subpages_out(), Range::at(4096, 4096));
    }

    #[test]
    fn pages_within_are_covered_and_pages_touching_are_met() {
        let size = PageSize::Huge;
        let range = Range::new(1, 3 * FOLIO_SIZE);
        assert_eq!(size.pages_within(range), Page(1)..Page(3));
        assert_eq!(size.pages_touching(range), Page(0)..Page(3));
        assert!(size.pages_touching(Range::new(5, 5)).is_empty());
        assert!(size.pages_within(Range::new(1, FOLIO_SIZE)).is_empty());
    }

    #[test]
    fn steps_cover_a_range_without_overlap() {
        let steps: Vec<_> = Range::new(10, 35).steps(10).collect();
        assert_eq!(steps, [Range::new(10, 20), Range::new(20, 30), Range::new(30, 35)]);
    }

    #[test]
    fn a_range_is_cut_at_multiples_without_overlap() {
        let pieces = |range: Range| range.cut_at_multiples(10).collect::<Vec<_>>();
        assert_eq!(
            pieces(Range::new(5, 25)),
            [Range::new(5, 10), Range::new(10, 20), Range::new(20, 25)]
        );
        assert_eq!(pieces(Range::new(10, 20)), [Range::new(10, 20)]);
        assert_eq!(pieces(Range::new(5, 5)), []);
    }

    #[test]
    fn a_node_id_survives_the_way_through_a_handle() {
        let id = InodeId::from_parts(0xdead_beef, 42);
        assert_eq!(id.parts(), (0xdead_beef, 42));
        assert_eq!(InodeId::parse(&id.to_string()), Some(id));
        assert_eq!(InodeId::parse("+eadbeef0000002a"), None);
    }

    #[test]
    fn node_lists_are_read_as_the_kernel_writes_them() {
        assert_eq!(NumaNode::parse_list("0"), Some(vec![NumaNode(0)]));
        assert_eq!(NumaNode::parse_list("0-2,5"), Some([0, 1, 2, 5].map(NumaNode).to_vec()));
        for text in ["", ",", "0,", "x", "+1", "2-1", "1,1", "0-2,1", "0-1024", "0-4294967295"] {
            assert_eq!(NumaNode::parse_list(text), None, "{text:?}");
        }
    }

    #[test]
    fn a_range_past_64_bits_is_refused() {
        assert_eq!(Range::checked_at(u64::MAX, 2), None);
    }
}
