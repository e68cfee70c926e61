//! The ledger of a sealed file: what is known about each soft-quarantined subpage.
//!
//! Block `n` holds the 4096 bytes rescued from the n-th quarantined subpage; it is the very block that the subpage gave up. As
//! that leaves no room in it, what *describes* the subpage is an extended attribute of the ledger, `trusted.record.<n>` ([`Record`]).
//! That has three uses: every byte can be put back, the description is in place *before* the subpage is punched (so that a
//! hole is never without one, whenever the daemon dies), and it survives a memory error in the block. For the same reasons what the
//! object keeps about itself is an attribute, `trusted.superblock` ([`Superblock`]). Block 0 is there because tmpfs takes a
//! limit of 0 blocks for none.
//!
//! **Bytes on the move.** From before a subpage is punched until its bytes are in the block, and from before the block is given up
//! until they are back, they are also in an attribute, `trusted.moving.<n>`, so that a daemon that dies in between takes
//! none with it:
//!
//! ```text
//!   quarantine   moving(In)   record   punch data   take block   store bytes   -moving
//!   repair       moving(Out)  give block   write data   -record   -moving
//!   discard      give block   -record
//! ```

use crate::error::{Error, Result};
use crate::steps::{self, Step};
use crate::sys::{calls, handle, tmpfs};
use crate::units::{NodeId, Range, SUBPAGE_SIZE, Subpage};
use rustix::fs::XattrFlags;
use rustix::io::Errno;
use slab::Slab;
use std::collections::BTreeMap;
use std::ffi::CStr;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

/// Version of [`Superblock`] and [`Record`]; a reader that does not know it refuses the object.
const VERSION: u32 = 1;
const MAGIC: [u8; 8] = *b"hugetlb2";
const SUPERBLOCK_BYTES: usize = 40;
const RECORD_BYTES: usize = 32;
const MOVING_BYTES: usize = 1 + SUBPAGE_SIZE as usize;

/// The file's name.
pub const LEDGER: &CStr = c"ledger";

const SUPERBLOCK: &str = "trusted.superblock";
/// What the memory errors are kept under: a subpage and a time each, in 64 bits.
const POISONED: &str = "poisoned";

/// Bytes of one subpage.
pub type Bytes = [u8; SUBPAGE_SIZE as usize];

/// What a sealed file keeps about itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Superblock {
    /// Pages from the file's start on that belong to it, whether it has memory in all of them or not.
    pub reserved_pages: u64,
    /// The quarantine has grown since its owner last looked (POLLPRI).
    pub alarm: bool,
    /// A change of the file's size or memory is under way, which is undone by coming back to this size.
    pub undo_size: Option<u64>,
}

/// Which way the bytes of a subpage are on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// To the ledger.
    In = 1,
    /// Back to the file.
    Out = 2,
}

impl Superblock {
    fn encode(self) -> [u8; SUPERBLOCK_BYTES] {
        let mut out = [0; SUPERBLOCK_BYTES];
        out[..8].copy_from_slice(&MAGIC);
        out[8..12].copy_from_slice(&VERSION.to_le_bytes());
        out[12] = u8::from(self.alarm);
        out[13] = u8::from(self.undo_size.is_some());
        out[16..24].copy_from_slice(&self.reserved_pages.to_le_bytes());
        out[24..32].copy_from_slice(&self.undo_size.unwrap_or(0).to_le_bytes());
        let checksum = crc32fast::hash(&out[..32]);
        out[32..36].copy_from_slice(&checksum.to_le_bytes());
        out
    }

    fn decode(bytes: &[u8; SUPERBLOCK_BYTES]) -> Result<Self> {
        if bytes[..8] != MAGIC || number(&bytes[32..36]) != u64::from(crc32fast::hash(&bytes[..32])) {
            return Err(Error::Corrupt("an object's superblock".into()));
        }
        if number(&bytes[8..12]) != u64::from(VERSION) {
            return Err(Error::Corrupt(format!("an object of version {}", number(&bytes[8..12]))));
        }
        Ok(Self {
            reserved_pages: number(&bytes[16..24]),
            alarm: bytes[12] != 0,
            undo_size: (bytes[13] != 0).then(|| number(&bytes[24..32])),
        })
    }
}

/// One quarantined subpage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// The ledger's block that holds the rescued bytes.
    pub slot: u64,
    /// When it was quarantined, in seconds since the epoch.
    pub time: u64,
    /// Checksum of the rescued bytes; `None` where none could be rescued.
    pub checksum: Option<u32>,
}

impl Record {
    fn encode(self, subpage: Subpage) -> [u8; RECORD_BYTES] {
        let mut out = [0; RECORD_BYTES];
        out[..4].copy_from_slice(&VERSION.to_le_bytes());
        out[4] = u8::from(self.checksum.is_some());
        out[8..16].copy_from_slice(&subpage.0.to_le_bytes());
        out[16..24].copy_from_slice(&self.time.to_le_bytes());
        out[24..28].copy_from_slice(&self.checksum.unwrap_or(0).to_le_bytes());
        let checksum = crc32fast::hash(&out[..28]);
        out[28..].copy_from_slice(&checksum.to_le_bytes());
        out
    }

    fn decode(slot: u64, bytes: &[u8; RECORD_BYTES]) -> Result<(Subpage, Self)> {
        if number(&bytes[28..]) != u64::from(crc32fast::hash(&bytes[..28])) {
            return Err(Error::Corrupt(format!("ledger record {slot}")));
        }
        if number(&bytes[..4]) != u64::from(VERSION) {
            return Err(Error::Corrupt(format!("a ledger record of version {}", number(&bytes[..4]))));
        }
        let checksum = (bytes[4] != 0).then(|| number(&bytes[24..28]) as u32);
        Ok((Subpage(number(&bytes[8..16])), Self { slot, time: number(&bytes[16..24]), checksum }))
    }
}

/// A little-endian number of up to eight bytes.
fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// The ledger's file, and what is kept there for the owner of the sealed file, under names. It needs none of the locks that the rest
/// of a ledger does.
///
/// The file is opened when it is needed, from the data file that is on the same superblock: a descriptor less for each file.
#[derive(Clone, Debug)]
pub struct Notes {
    data: Arc<File>,
    id: NodeId,
}

impl Notes {
    /// Opens the file.
    pub fn file(&self) -> Result<File> {
        open(&self.data, self.id)
    }

    /// What was kept under `name`.
    ///
    /// # Errors
    /// What getxattr(2) answers.
    pub fn kept(&self, name: &str) -> Result<Option<Vec<u8>>> {
        const ROOM: [usize; 2] = [256, 64 << 10]; // hardly any is longer; none is longer than XATTR_SIZE_MAX
        for room in ROOM {
            let mut value = vec![0; room];
            match calls::fgetxattr(&self.file()?, kept_attribute(name), &mut value[..]) {
                Ok(length) => {
                    value.truncate(length);
                    return Ok(Some(value));
                }
                Err(Errno::RANGE) => {}
                Err(Errno::NODATA) => return Ok(None),
                Err(errno) => return Err(errno.into()),
            }
        }
        Err(Errno::RANGE.into())
    }

    /// Keeps a few bytes under `name`, for as long as there is the file.
    ///
    /// # Errors
    /// What setxattr(2) answers.
    pub fn keep(&self, name: &str, value: &[u8]) -> Result<()> {
        Ok(calls::fsetxattr(&self.file()?, kept_attribute(name), value, XattrFlags::empty())?)
    }

    /// Removes what was kept under `name`.
    ///
    /// # Errors
    /// What removexattr(2) answers.
    pub fn discard(&self, name: &str) -> Result<()> {
        Ok(calls::fremovexattr(&self.file()?, kept_attribute(name))?)
    }
}

/// The ledger, and what it says.
#[derive(Debug)]
pub struct Ledger {
    notes: Notes,
    superblock: Superblock,
    records: BTreeMap<Subpage, Record>,
    /// Key `n` stands for block `n + 1`.
    slots: Slab<Subpage>,
    /// When each memory error that the kernel keeps in the file was found. It has no block and no slot: the kernel
    /// holds the page itself.
    poisoned: BTreeMap<Subpage, u64>,
}

impl Ledger {
    /// A new ledger in `file`, in a superblock that has one free block, and `data`.
    pub fn create(data: Arc<File>, file: File) -> Result<Self> {
        tmpfs::allocate(&file, block(0))?;
        let (superblock, id) = (Superblock::default(), handle::of(&file, c"")?);
        let (records, slots, poisoned) = (BTreeMap::new(), Slab::new(), BTreeMap::new());
        let ledger = Self { notes: Notes { data, id }, superblock, records, slots, poisoned };
        ledger.write_superblock()?;
        Ok(ledger)
    }

    /// Reads back what `create` and the other functions wrote, in the superblock that is mounted at `mount`.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for a superblock or record that is damaged or of another version.
    pub fn open(data: Arc<File>, mount: &OwnedFd) -> Result<Self> {
        let id = handle::of(mount, LEDGER)?;
        let file = open(&data, id)?;
        let superblock = read_superblock(&file)?;
        let mut records = BTreeMap::new();
        for slot in 1..=tmpfs::size(&file)? / SUBPAGE_SIZE + 1 {
            match read_record(&file, slot)? {
                Some((subpage, record)) => {
                    records.insert(subpage, record);
                }
                None => remove(&file, &moving_attribute(slot))?, // not begun, or at its end
            }
        }
        let slots = records.iter().map(|(subpage, record)| ((record.slot - 1) as usize, *subpage)).collect();
        Ok(Self { notes: Notes { data, id }, superblock, records, slots, poisoned: BTreeMap::new() })
    }

    /// Its file, and what is kept there.
    pub fn notes(&self) -> &Notes {
        &self.notes
    }

    /// The object's superblock.
    pub fn superblock(&self) -> Superblock {
        self.superblock
    }

    /// Changes the object's superblock.
    pub fn update(&mut self, change: impl FnOnce(&mut Superblock)) -> Result<()> {
        let before = self.superblock;
        change(&mut self.superblock);
        if self.superblock == before {
            return Ok(());
        }
        self.write_superblock().inspect_err(|_| self.superblock = before)
    }

    fn write_superblock(&self) -> Result<()> {
        let bytes = self.superblock.encode();
        Ok(calls::fsetxattr(&self.notes.file()?, SUPERBLOCK, &bytes, XattrFlags::empty())?)
    }

    /// The memory errors that the kernel keeps in the file, and when they were found.
    pub fn poisoned(&self) -> &BTreeMap<Subpage, u64> {
        &self.poisoned
    }

    /// Notes a memory error.
    pub fn note_poisoned(&mut self, subpage: Subpage, time: u64) -> Result<()> {
        self.poisoned.insert(subpage, time);
        self.keep_poisoned()
    }

    /// Strikes a memory error out, whose page is no longer in the file.
    pub fn forget_poisoned(&mut self, subpage: Subpage) -> Result<()> {
        if self.poisoned.remove(&subpage).is_some() { self.keep_poisoned() } else { Ok(()) }
    }

    /// As many as an attribute holds; what is left out is found again when the kernel meets the next one.
    fn keep_poisoned(&self) -> Result<()> {
        const MOST: usize = (64 << 10) / 16; // XATTR_SIZE_MAX
        let pairs = self.poisoned.iter().take(MOST).flat_map(|(subpage, time)| [subpage.0, *time]);
        let bytes: Vec<u8> = pairs.flat_map(u64::to_le_bytes).collect();
        self.notes.keep(POISONED, &bytes)
    }

    /// The memory errors that another process has noted, in place of ours.
    pub fn read_poisoned(&mut self) -> Result<()> {
        let bytes = self.notes.kept(POISONED)?.unwrap_or_default();
        let (words, _) = bytes.as_chunks::<8>();
        let (pairs, _) = words.as_chunks::<2>();
        let pairs = pairs.iter().map(|pair| pair.map(u64::from_le_bytes));
        self.poisoned = pairs.map(|[subpage, time]| (Subpage(subpage), time)).collect();
        Ok(())
    }

    /// The quarantined subpages and their records, ascending.
    pub fn records(&self) -> &BTreeMap<Subpage, Record> {
        &self.records
    }

    /// Describes `subpage` before it is punched; takes no block yet.
    pub fn record(&mut self, subpage: Subpage, time: u64, rescued: Option<&Bytes>) -> Result<Record> {
        assert!(!self.records.contains_key(&subpage), "{subpage:?} is quarantined already");
        let checksum = rescued.map(|bytes| crc32fast::hash(bytes));
        let slot = self.slots.vacant_key() as u64 + 1;
        let record = Record { slot, time, checksum };
        self.begin_move(record, Direction::In, rescued.unwrap_or(&[0; SUBPAGE_SIZE as usize]))?;
        steps::done(Step::QuarantineKept);
        calls::fsetxattr(&self.notes.file()?, attribute(slot), &record.encode(subpage), XattrFlags::empty())?;
        self.slots.insert(subpage);
        self.records.insert(subpage, record);
        Ok(record)
    }

    /// Strikes the record of `subpage` out, whose block has been [`Ledger::release_block`]d or was never taken.
    pub fn forget(&mut self, subpage: Subpage) -> Result<()> {
        let record = self.records[&subpage];
        remove(&self.notes.file()?, &attribute(record.slot))?;
        steps::done(Step::RepairForgotten);
        self.end_move(record)?;
        self.records.remove(&subpage);
        self.slots.remove((record.slot - 1) as usize);
        Ok(())
    }

    /// Keeps the bytes of a subpage for as long as they are on the move. [`Ledger::record`] does so by itself.
    pub fn begin_move(&self, record: Record, direction: Direction, bytes: &Bytes) -> Result<()> {
        let mut value = [0; MOVING_BYTES];
        value[0] = direction as u8;
        value[1..].copy_from_slice(bytes);
        let name = moving_attribute(record.slot);
        Ok(calls::fsetxattr(&self.notes.file()?, name, &value, XattrFlags::empty())?)
    }

    /// They have arrived.
    pub fn end_move(&self, record: Record) -> Result<()> {
        remove(&self.notes.file()?, &moving_attribute(record.slot))
    }

    /// The bytes that a daemon which died had on the move, and which way.
    pub fn moving(&self, record: Record) -> Result<Option<(Direction, Bytes)>> {
        let mut value = [0; MOVING_BYTES];
        match calls::fgetxattr(&self.notes.file()?, moving_attribute(record.slot), &mut value[..]) {
            Err(Errno::NODATA) => return Ok(None),
            other => other?,
        };
        let direction = if value[0] == Direction::In as u8 { Direction::In } else { Direction::Out };
        Ok(Some((direction, value[1..].try_into().expect("the length is that of a subpage"))))
    }

    /// Whether a record's block is there.
    pub fn has_block(&self, record: Record) -> Result<bool> {
        Ok(tmpfs::resident(&self.notes.file()?, block(record.slot))? > 0)
    }

    /// Takes the superblock's free block for a record in the ledger's `file`; [`Error::Full`] while there is none.
    pub fn take_block(file: &File, record: Record) -> Result<()> {
        tmpfs::allocate(file, block(record.slot))
    }

    /// Gives a record's block up.
    pub fn release_block(&self, record: Record) -> Result<()> {
        tmpfs::punch(&self.notes.file()?, block(record.slot))
    }

    /// Stores what was rescued in the block that was taken for it; in another, where a memory error has hit that.
    pub fn store(&self, record: Record, rescued: &Bytes) -> Result<()> {
        let offset = record.slot * SUBPAGE_SIZE;
        match tmpfs::write_at(&self.notes.file()?, rescued, offset) {
            Err(Error::Poisoned) => {
                tmpfs::punch(&self.notes.file()?, block(record.slot))?;
                tmpfs::write_at(&self.notes.file()?, rescued, offset).map(drop)
            }
            result => result.map(drop),
        }
    }

    /// What was rescued.
    ///
    /// # Errors
    /// [`Error::NoData`] where nothing is known, or what was kept has itself been lost.
    pub fn rescued(&self, record: Record) -> Result<Bytes> {
        let mut bytes = [0; SUBPAGE_SIZE as usize];
        let read =
            self.notes.file().and_then(|file| tmpfs::read_at(file, &mut bytes, record.slot * SUBPAGE_SIZE));
        let read = read.unwrap_or(0);
        match record.checksum {
            Some(checksum) if read == bytes.len() && checksum == crc32fast::hash(&bytes) => Ok(bytes),
            Some(_) => {
                log::error!(
                    "what was kept of a quarantined subpage is lost: a memory error has hit the ledger"
                );
                Err(Error::NoData)
            }
            None => Err(Error::NoData),
        }
    }

    /// Blocks that the ledger holds, its superblock among them.
    pub fn blocks(&self) -> Result<u64> {
        tmpfs::blocks_taken(&self.notes.file()?)
    }
}

fn open(data: &File, id: NodeId) -> Result<File> {
    Ok(handle::open(data, id, libc::O_RDWR)?.into())
}

fn block(slot: u64) -> Range {
    Range::at(slot * SUBPAGE_SIZE, SUBPAGE_SIZE)
}

/// Whether the sealed file in `directory` is of a version that is known here.
///
/// # Errors
/// [`Error::Corrupt`] where it is not; ENOENT where none is there.
pub fn check_version(directory: &Path) -> Result<()> {
    read_superblock(&File::open(directory.join("ledger"))?).map(drop)
}

fn read_superblock(file: &File) -> Result<Superblock> {
    let mut bytes = [0; SUPERBLOCK_BYTES];
    calls::fgetxattr(file, SUPERBLOCK, &mut bytes[..])?;
    Superblock::decode(&bytes)
}

fn read_record(file: &File, slot: u64) -> Result<Option<(Subpage, Record)>> {
    let mut bytes = [0; RECORD_BYTES];
    match calls::fgetxattr(file, attribute(slot), &mut bytes[..]) {
        Ok(_) => Record::decode(slot, &bytes).map(Some),
        Err(Errno::NODATA) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

fn remove(file: &File, name: &str) -> Result<()> {
    match calls::fremovexattr(file, name) {
        Ok(()) | Err(Errno::NODATA) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

fn moving_attribute(slot: u64) -> String {
    format!("trusted.moving.{slot}")
}

fn kept_attribute(name: &str) -> String {
    format!("trusted.kept.{name}")
}

fn attribute(slot: u64) -> String {
    format!("trusted.record.{slot}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_reads_as_it_was_written() {
        let record = Record { slot: 7, time: 1_800_000_000, checksum: Some(42) };
        let bytes = record.encode(Subpage(0x1234_5678));
        assert_eq!(Record::decode(7, &bytes).unwrap(), (Subpage(0x1234_5678), record));
    }

    #[test]
    fn a_damaged_record_is_refused() {
        let mut bytes = Record { slot: 1, time: 5, checksum: None }.encode(Subpage(9));
        bytes[8] ^= 1;
        assert!(matches!(Record::decode(1, &bytes), Err(Error::Corrupt(_))));
    }

    #[test]
    fn a_superblock_of_another_version_is_refused() {
        let superblock = Superblock { reserved_pages: 3, alarm: true, undo_size: Some(0) };
        let mut bytes = superblock.encode();
        assert_eq!(Superblock::decode(&bytes).unwrap(), superblock);
        bytes[8] = 2;
        let checksum = crc32fast::hash(&bytes[..32]);
        bytes[32..36].copy_from_slice(&checksum.to_le_bytes());
        assert!(matches!(Superblock::decode(&bytes), Err(Error::Corrupt(_))));
    }
}
