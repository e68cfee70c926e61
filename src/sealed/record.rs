//! The bytes of a sealed file that outlive a process: the header, and a record for each folio with
//! soft holes.

use super::holes::{Hole, Holes};
use crate::error::{Error, Result};
use crate::units::{Folio, Range, SUBPAGE_SIZE, SUBPAGES_PER_FOLIO, Subpage};

/// Version of [`Header`] and of the records. A reader refuses an object of a version that it
/// does not know. Version 1 had a record for each subpage.
const VERSION: u32 = 2;
const MAGIC: [u8; 8] = *b"hugetlb2";

/// Bytes of an encoded [`Header`].
pub const SUPERBLOCK_BYTES: usize = 40;

const HEAD_BYTES: usize = 16;
const RUN_BYTES: usize = 16;
const CHECKSUM_BYTES: usize = 4;

/// Most bytes of an encoded record, in which each subpage is a run of its own.
pub const MOST_RECORD_BYTES: usize =
    HEAD_BYTES + SUBPAGES_PER_FOLIO as usize * (RUN_BYTES + CHECKSUM_BYTES) + CHECKSUM_BYTES;
const _: () = assert!(MOST_RECORD_BYTES <= 64 << 10, "XATTR_SIZE_MAX");

/// The header: the data that a sealed file keeps about itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Pages from the start of the file on that belong to the file. Some of them may have no
    /// memory.
    pub owned_pages: u64,
    /// True if the quarantine has grown since a program last read the list (POLLPRI).
    pub alarm: bool,
    /// Present while a change of the file's size or memory is under way. To undo the change, the
    /// file goes back to this size.
    pub undo_size: Option<u64>,
}

impl Header {
    /// Encodes the header.
    pub fn encode(self) -> [u8; SUPERBLOCK_BYTES] {
        let mut out = [0; SUPERBLOCK_BYTES];
        out[..8].copy_from_slice(&MAGIC);
        out[8..12].copy_from_slice(&VERSION.to_le_bytes());
        out[12] = u8::from(self.alarm);
        out[13] = u8::from(self.undo_size.is_some());
        out[16..24].copy_from_slice(&self.owned_pages.to_le_bytes());
        out[24..32].copy_from_slice(&self.undo_size.unwrap_or(0).to_le_bytes());
        let checksum = crc32fast::hash(&out[..32]);
        out[32..36].copy_from_slice(&checksum.to_le_bytes());
        out
    }

    /// Decodes a header.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for a header that is damaged or of another version.
    pub fn decode(bytes: &[u8; SUPERBLOCK_BYTES]) -> Result<Self> {
        if bytes[..8] != MAGIC || number(&bytes[32..36]) != u64::from(crc32fast::hash(&bytes[..32]))
        {
            return Err(Error::Corrupt("an object's superblock".into()));
        }
        if number(&bytes[8..12]) != u64::from(VERSION) {
            return Err(Error::Corrupt(format!("an object of version {}", number(&bytes[8..12]))));
        }
        Ok(Self {
            owned_pages: number(&bytes[16..24]),
            alarm: bytes[12] != 0,
            undo_size: (bytes[13] != 0).then(|| number(&bytes[24..32])),
        })
    }
}

/// Checksums of the bytes that the ledger keeps, one for each subpage of a folio.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checksums(Box<[u32; SUBPAGES_PER_FOLIO as usize]>);

impl Default for Checksums {
    fn default() -> Self {
        Self(Box::new([Self::NONE; SUBPAGES_PER_FOLIO as usize]))
    }
}

impl Checksums {
    /// That of a subpage of which the ledger keeps no bytes.
    pub const NONE: u32 = 0;

    /// The checksum of `subpage`.
    pub fn of(&self, subpage: Subpage) -> u32 {
        self.0[Self::index(subpage)]
    }

    /// Computes the checksums of the subpages from offset `start` on, whose bytes are `bytes`.
    pub fn note(&mut self, start: u64, bytes: &[u8]) {
        assert!(start.is_multiple_of(SUBPAGE_SIZE), "a checksum is of a whole subpage");
        for (subpage, bytes) in (start / SUBPAGE_SIZE..).zip(bytes.chunks(SUBPAGE_SIZE as usize)) {
            self.0[Self::index(Subpage(subpage))] = crc32fast::hash(bytes);
        }
    }

    /// Copies the checksums of the subpages in `range` from `other`.
    pub fn copy(&mut self, other: &Self, range: Range) {
        for subpage in range.steps(SUBPAGE_SIZE).map(|subpage| Subpage::containing(subpage.start)) {
            self.0[Self::index(subpage)] = other.of(subpage);
        }
    }

    fn index(subpage: Subpage) -> usize {
        (subpage.0 % SUBPAGES_PER_FOLIO) as usize
    }
}

fn subpages_of(hole: Hole) -> impl Iterator<Item = Subpage> {
    hole.range.steps(SUBPAGE_SIZE).map(|subpage| Subpage::containing(subpage.start))
}

/// Encodes the record of a folio. All of `holes` are in this folio.
///
/// ```text
///   version u32, runs u32, folio u64           once
///   first subpage u32, subpages u32, time u64  for each run
///   checksum u32                               for each subpage of the runs
///   checksum u32                               once, of all bytes before it
/// ```
pub fn encode_record(folio: Folio, holes: &Holes, checksums: &Checksums) -> Vec<u8> {
    let runs = holes.all().count() as u32;
    let mut out = Vec::with_capacity(MOST_RECORD_BYTES);
    out.extend(VERSION.to_le_bytes());
    out.extend(runs.to_le_bytes());
    out.extend(folio.0.to_le_bytes());
    for hole in holes.all() {
        let first = (hole.range.start - folio.range().start) / SUBPAGE_SIZE;
        out.extend((first as u32).to_le_bytes());
        out.extend(((hole.range.len() / SUBPAGE_SIZE) as u32).to_le_bytes());
        out.extend(hole.time.to_le_bytes());
    }
    for subpage in holes.all().flat_map(subpages_of) {
        out.extend(checksums.of(subpage).to_le_bytes());
    }
    let checksum = crc32fast::hash(&out);
    out.extend(checksum.to_le_bytes());
    out
}

/// Decodes a record: the holes, and the checksums of their subpages.
///
/// # Errors
/// [`Error::Corrupt`] for a record that is damaged, of another folio or of another version.
pub fn decode_record(folio: Folio, bytes: &[u8]) -> Result<(Vec<Hole>, Checksums)> {
    let damaged = || {
        Error::Corrupt(format!("the ledger's record of the 2 MiB at {:#x}", folio.range().start))
    };
    let (body, checksum) = bytes.split_last_chunk::<CHECKSUM_BYTES>().ok_or_else(damaged)?;
    if u32::from_le_bytes(*checksum) != crc32fast::hash(body) {
        return Err(damaged());
    }
    let (head, rest) = body.split_first_chunk::<HEAD_BYTES>().ok_or_else(damaged)?;
    if number(&head[..4]) != u64::from(VERSION) {
        return Err(Error::Corrupt(format!("a ledger's record of version {}", number(&head[..4]))));
    }
    let runs = number(&head[4..8]) as usize * RUN_BYTES;
    let (runs, sums) = rest.split_at_checked(runs).ok_or_else(damaged)?;
    let holes: Vec<Hole> =
        runs.as_chunks::<RUN_BYTES>().0.iter().map(|run| decode_run(folio, run)).collect();
    let (sums, _) = sums.as_chunks::<CHECKSUM_BYTES>();
    let subpages: u64 = holes.iter().map(|hole| hole.range.len() / SUBPAGE_SIZE).sum();
    let is_sound = number(&head[8..]) == folio.0
        && subpages == sums.len() as u64
        && holes.iter().all(|hole| !hole.range.is_empty() && folio.range().covers(hole.range))
        && holes.is_sorted_by(|one, next| one.range.end <= next.range.start);
    if !is_sound {
        return Err(damaged());
    }
    let mut checksums = Checksums::default();
    for (subpage, sum) in holes.iter().copied().flat_map(subpages_of).zip(sums) {
        checksums.0[Checksums::index(subpage)] = u32::from_le_bytes(*sum);
    }
    Ok((holes, checksums))
}

fn decode_run(folio: Folio, run: &[u8; RUN_BYTES]) -> Hole {
    let start = folio.range().start + number(&run[..4]) * SUBPAGE_SIZE;
    Hole { range: Range::at(start, number(&run[4..8]) * SUBPAGE_SIZE), time: number(&run[8..]) }
}

/// Decodes a little-endian number of up to eight bytes.
fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FOLIO: Folio = Folio(3);

    fn some() -> (Holes, Checksums) {
        let (mut holes, mut checksums) = (Holes::default(), Checksums::default());
        for (first, count, time) in [(0, 2, 5), (7, 1, 5), (8, 504, 1_800_000_000)] {
            let range = Range::at(FOLIO.range().start + first * SUBPAGE_SIZE, count * SUBPAGE_SIZE);
            holes.add(Hole { range, time });
            checksums.note(range.start, &vec![first as u8; range.len() as usize]);
        }
        (holes, checksums)
    }

    #[test]
    fn a_record_reads_as_it_was_written() {
        let (holes, checksums) = some();
        let bytes = encode_record(FOLIO, &holes, &checksums);
        assert!(bytes.len() <= MOST_RECORD_BYTES);
        let (read, sums) = decode_record(FOLIO, &bytes).unwrap();
        assert_eq!((read, sums), (holes.all().collect(), checksums));
    }

    #[test]
    fn a_record_that_is_damaged_or_of_another_folio_is_refused() {
        let (holes, checksums) = some();
        let bytes = encode_record(FOLIO, &holes, &checksums);
        assert!(matches!(decode_record(Folio(4), &bytes), Err(Error::Corrupt(_))));
        assert!(matches!(decode_record(FOLIO, &[]), Err(Error::Corrupt(_))));
        for place in [0, 4, 8, 17, bytes.len() - 1] {
            let mut bytes = bytes.clone();
            bytes[place] ^= 1;
            assert!(matches!(decode_record(FOLIO, &bytes), Err(Error::Corrupt(_))), "byte {place}");
        }
    }

    #[test]
    fn a_header_of_another_version_is_refused() {
        let header = Header { owned_pages: 3, alarm: true, undo_size: Some(0) };
        let mut bytes = header.encode();
        assert_eq!(Header::decode(&bytes).unwrap(), header);
        bytes[8] = 1;
        let checksum = crc32fast::hash(&bytes[..32]);
        bytes[32..36].copy_from_slice(&checksum.to_le_bytes());
        assert!(matches!(Header::decode(&bytes), Err(Error::Corrupt(_))));
    }
}
