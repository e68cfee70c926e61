//! The ledger of a sealed file: what is known about the subpages that were quarantined.
//!
//! The bytes of a quarantined subpage lie in the ledger at the same place as in `data`, one folio further on: the
//! first folio is for the superblock's block, which is there because tmpfs takes a limit of 0 blocks for none.
//! What *describes* them is an extended attribute of the ledger for each folio with soft holes, `trusted.folio.<n>`
//! ([`encode_record`]). That has three uses: all that is known of a folio changes in one setxattr(2); a record says which
//! copy of a subpage is the true one, whatever the two hold; and it survives a memory error in the bytes. For the
//! last reason what the object keeps about itself is an attribute, too: `trusted.superblock` ([`Superblock`]).
//!
//! > A subpage that is in a record is a hole of `data`, and its block of the ledger is the true copy. For any other
//! > subpage `data` is, and a block that the ledger has for it is left over from a process that died, to be freed.
//!
//! Each record has a block, so whoever opens the ledger finds all records by looking for blocks. A memory error takes
//! no block away: the kernel keeps the page.

use super::holes::{Hole, Holes, between};
use super::record::{
    Checksums, MOST_RECORD_BYTES, SUPERBLOCK_BYTES, Superblock, decode_record, encode_record,
};
use crate::error::{Error, Result};
use crate::sys::{calls, handle, tmpfs};
use crate::units::{FOLIO_SIZE, Folio, NodeId, Range, SUBPAGE_SIZE, Subpage};
use rustix::fs::XattrFlags;
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::ffi::CStr;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

/// The file's name.
pub const LEDGER: &CStr = c"ledger";

const SUPERBLOCK: &str = "trusted.superblock";
/// What the memory errors are kept under: a subpage and a time each, in 64 bits.
const POISONED: &str = "poisoned";

/// Bytes of one subpage.
pub type Bytes = [u8; SUBPAGE_SIZE as usize];

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
    holes: Holes,
    /// When each memory error that the kernel keeps in the file was found. It has no block and no record: the kernel
    /// holds the page itself.
    poisoned: BTreeMap<Subpage, u64>,
}

impl Ledger {
    /// A new ledger in `file`, in a superblock that has one free block, and `data`.
    pub fn create(data: Arc<File>, file: File) -> Result<Self> {
        tmpfs::allocate(&file, Range::at(0, SUBPAGE_SIZE))?;
        let (superblock, id) = (Superblock::default(), handle::of(&file, c"")?);
        let (holes, poisoned) = (Holes::default(), BTreeMap::new());
        let ledger = Self { notes: Notes { data, id }, superblock, holes, poisoned };
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
        let mut holes = Holes::default();
        for folio in folios_with_blocks(&file)? {
            let record = read_record(&file, folio)?;
            record.into_iter().flat_map(|(holes, _)| holes).for_each(|hole| holes.add(hole));
        }
        Ok(Self { notes: Notes { data, id }, superblock, holes, poisoned: BTreeMap::new() })
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

    // ---- memory errors ------------------------------------------------------------------------------------------

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
    ///
    /// # Errors
    /// What setxattr(2) answers; nothing has changed.
    pub fn forget_poisoned(&mut self, subpage: Subpage) -> Result<()> {
        let Some(time) = self.poisoned.remove(&subpage) else { return Ok(()) };
        self.keep_poisoned().inspect_err(|_| {
            self.poisoned.insert(subpage, time);
        })
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

    // ---- records ------------------------------------------------------------------------------------------------

    /// The soft holes.
    pub fn holes(&self) -> &Holes {
        &self.holes
    }

    /// Adds `runs` of a folio, none of which is a hole, to its record. When this returns, the ledger's copy of them is
    /// the true one.
    ///
    /// # Errors
    /// What setxattr(2) answers; nothing has changed.
    pub fn record(&mut self, runs: &[Range], time: u64, checksums: &Checksums) -> Result<()> {
        let folio = folio_of(runs);
        let mut all = self.checksums(folio)?;
        runs.iter().for_each(|run| all.copy(checksums, *run));
        self.rewrite(folio, &all, |holes| {
            runs.iter().for_each(|range| holes.add(Hole { range: *range, time }))
        })
    }

    /// Strikes `runs` of a folio out of its record. When this returns, `data` is the true copy of them.
    ///
    /// # Errors
    /// As for [`Ledger::record`].
    pub fn strike(&mut self, runs: &[Range]) -> Result<()> {
        let folio = folio_of(runs);
        let checksums = self.checksums(folio)?;
        self.rewrite(folio, &checksums, |holes| runs.iter().for_each(|run| holes.remove(*run)))
    }

    fn rewrite(
        &mut self,
        folio: Folio,
        checksums: &Checksums,
        change: impl FnOnce(&mut Holes),
    ) -> Result<()> {
        let mut holes = Holes::default();
        self.holes.in_range(folio.range()).for_each(|hole| holes.add(hole));
        change(&mut holes);
        let file = self.notes.file()?;
        if holes.is_empty() {
            calls::fremovexattr(&file, attribute(folio))?;
        } else {
            let record = encode_record(folio, &holes, checksums);
            calls::fsetxattr(&file, attribute(folio), &record, XattrFlags::empty())?;
        }
        self.holes.remove(folio.range());
        holes.all().for_each(|hole| self.holes.add(hole));
        Ok(())
    }

    /// The checksums of what is kept of a folio.
    ///
    /// # Errors
    /// What getxattr(2) answers.
    pub fn checksums(&self, folio: Folio) -> Result<Checksums> {
        let record = read_record(&self.notes.file()?, folio)?;
        Ok(record.map(|(_, checksums)| checksums).unwrap_or_default())
    }

    // ---- bytes --------------------------------------------------------------------------------------------------

    /// Reads what is kept of `range`, whole subpages of one folio, from the ledger's `file` into `bytes`: zeros where
    /// that is lost. Returns how many subpages are.
    ///
    /// # Errors
    /// A shortage: nothing is known to be lost.
    pub fn read(file: &File, range: Range, checksums: &Checksums, bytes: &mut [u8]) -> Result<u64> {
        let is_read = |range: Range, bytes: &mut [u8]| match tmpfs::read_at(file, bytes, place(range).start) {
            Err(error) if error.is_shortage() => Err(error),
            read => Ok(read.is_ok_and(|read| read == bytes.len())),
        };
        let all = is_read(range, bytes)?;
        let subpages = range.steps(SUBPAGE_SIZE).zip(bytes.chunks_exact_mut(SUBPAGE_SIZE as usize));
        let mut lost = 0;
        for (subpage, bytes) in subpages {
            let checksum = checksums.of(Subpage::containing(subpage.start));
            if !(all || is_read(subpage, bytes)?) || crc32fast::hash(bytes) != checksum {
                bytes.fill(0);
                lost += 1;
            }
        }
        if lost > 0 {
            log::error!(
                "what was kept of {lost} quarantined subpages of {range} is lost: a memory error has hit the ledger"
            );
        }
        Ok(lost)
    }

    /// Frees what blocks the ledger has for `range`, which is in no record.
    ///
    /// # Errors
    /// What fallocate(2) answers.
    pub fn free(&self, range: Range) -> Result<()> {
        tmpfs::punch(&self.notes.file()?, place(range))
    }

    /// Frees what blocks the ledger has for `folio` that are neither in its record nor in `runs`, which ascend.
    ///
    /// # Errors
    /// What fallocate(2) and cachestat(2) answer.
    pub fn trim(&self, folio: Folio, runs: &[Range]) -> Result<()> {
        let file = self.notes.file()?;
        let mut kept: Vec<Range> = self.holes.in_range(folio.range()).map(|hole| hole.range).collect();
        kept.extend(runs);
        kept.sort_by_key(|range| range.start);
        for left_over in between(folio.range(), kept.into_iter()) {
            if tmpfs::resident(&file, place(left_over))? > 0 {
                tmpfs::punch(&file, place(left_over))?;
            }
        }
        Ok(())
    }

    /// The same for all folios.
    ///
    /// # Errors
    /// As for [`Ledger::trim`].
    pub fn trim_all(&self) -> Result<()> {
        if self.blocks()? == self.holes.count() + 1 {
            return Ok(());
        }
        folios_with_blocks(&self.notes.file()?)?.into_iter().try_for_each(|folio| self.trim(folio, &[]))
    }

    /// Blocks that the ledger holds, its superblock among them.
    pub fn blocks(&self) -> Result<u64> {
        tmpfs::blocks_taken(&self.notes.file()?)
    }
}

/// Where the ledger keeps the bytes of `range`.
pub fn place(range: Range) -> Range {
    Range::at(range.start + FOLIO_SIZE, range.len())
}

/// The folio that `runs` are of.
fn folio_of(runs: &[Range]) -> Folio {
    Subpage::containing(runs[0].start).folio()
}

/// The folios of `data` that the ledger's `file` has blocks for.
fn folios_with_blocks(file: &File) -> Result<Vec<Folio>> {
    let mut found = Vec::new();
    for folio in Range::new(FOLIO_SIZE, tmpfs::size(file)?).folios() {
        if tmpfs::resident(file, folio.range())? > 0 {
            found.push(Folio(folio.0 - 1));
        }
    }
    Ok(found)
}

fn open(data: &File, id: NodeId) -> Result<File> {
    Ok(handle::open(data, id, libc::O_RDWR)?.into())
}

/// Whether the sealed file in `directory` is of a version that is known here.
///
/// # Errors
/// [`Error::Corrupt`] where it is not; ENOENT where none is there.
pub fn check_version(directory: &Path) -> Result<()> {
    superblock_at(directory).map(drop)
}

/// The superblock of the sealed file whose superblock is mounted there, which need not be opened for that.
///
/// # Errors
/// [`Error::Corrupt`] for one that is damaged or of another version.
pub fn superblock_at(directory: &Path) -> Result<Superblock> {
    read_superblock(&File::open(directory.join("ledger"))?)
}

fn read_superblock(file: &File) -> Result<Superblock> {
    let mut bytes = [0; SUPERBLOCK_BYTES];
    calls::fgetxattr(file, SUPERBLOCK, &mut bytes[..])?;
    Superblock::decode(&bytes)
}

fn read_record(file: &File, folio: Folio) -> Result<Option<(Vec<Hole>, Checksums)>> {
    let mut bytes = [0; MOST_RECORD_BYTES];
    match calls::fgetxattr(file, attribute(folio), &mut bytes[..]) {
        Ok(length) => decode_record(folio, &bytes[..length]).map(Some),
        Err(Errno::NODATA) => Ok(None),
        Err(Errno::RANGE) => Err(Error::Corrupt(format!("the ledger's record of folio {}", folio.0))),
        Err(errno) => Err(errno.into()),
    }
}

fn kept_attribute(name: &str) -> String {
    format!("trusted.kept.{name}")
}

fn attribute(folio: Folio) -> String {
    format!("trusted.folio.{}", folio.0)
}
