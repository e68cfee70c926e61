//! The ledger of a sealed file: the record of its quarantined subpages, and their bytes.
//!
//! The ledger keeps the bytes of a quarantined subpage at the offset that they have in `data`, plus
//! one folio. The first folio of the ledger has one block that means nothing: it is there because
//! tmpfs takes a limit of 0 blocks for no limit.
//!
//! An extended attribute of the ledger, `trusted.folio.<n>`, describes the soft holes of one folio:
//! its *record* ([`encode_record`]). There are three reasons for an attribute:
//! - One setxattr(2) changes all that is known of a folio.
//! - A record says which copy of a subpage is the true one, whatever bytes the two copies hold.
//! - A record survives a memory error in the kept bytes. For this reason the header of the sealed
//!   file is an attribute, too: `trusted.superblock` ([`Header`]).
//!
//! > A subpage that is in a record is a hole of `data`, and its block of the ledger is the true
//! > copy. For any other subpage, `data` is the true copy. If the ledger has a block for such a
//! > subpage, a process that died has left it, and the next worker frees it.
//!
//! Each recorded subpage has a block, so a worker finds all records by looking for blocks. A memory
//! error takes no block away: the kernel keeps the page.

use super::holes::{Hole, Holes, between, subpages};
use super::record::{
    Checksums, Header, MOST_RECORD_BYTES, SUPERBLOCK_BYTES, decode_record, encode_record,
};
use crate::error::{Error, Result};
use crate::sys::{calls, handle, tmpfs};
use crate::units::{FOLIO_SIZE, Folio, InodeId, Range, SUBPAGE_SIZE, Subpage};
use rustix::fs::XattrFlags;
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::ffi::CStr;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

/// Name of the ledger's file.
pub const LEDGER: &CStr = c"ledger";

const HEADER: &str = "trusted.superblock";
/// Name of the note with the memory errors: for each error a subpage and a time, 64 bits each.
const HW_ERRORS: &str = "poisoned";

/// Bytes of one subpage.
pub type Bytes = [u8; SUBPAGE_SIZE as usize];

/// The ledger's file, and the notes in it, each under a name. Notes belong to the owner of the
/// sealed file, and need no lock of the ledger.
///
/// The daemon opens the file when it needs it, through the data file on the same header. This
/// saves one descriptor for each file.
#[derive(Clone, Debug)]
pub struct Notes {
    data: Arc<File>,
    id: InodeId,
}

impl Notes {
    /// Opens the ledger's file.
    pub fn file(&self) -> Result<File> {
        open(&self.data, self.id)
    }

    /// The note with this name; `None` if there is none.
    ///
    /// # Errors
    /// The errors of getxattr(2).
    pub fn kept(&self, name: &str) -> Result<Option<Vec<u8>>> {
        const ROOM: [usize; 2] = [256, 64 << 10]; // a usual note; XATTR_SIZE_MAX
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

    /// Writes a note of a few bytes under `name`. It lasts as long as the file.
    ///
    /// # Errors
    /// The errors of setxattr(2).
    pub fn keep(&self, name: &str, value: &[u8]) -> Result<()> {
        Ok(calls::fsetxattr(&self.file()?, kept_attribute(name), value, XattrFlags::empty())?)
    }

    /// Removes the note with this name.
    ///
    /// # Errors
    /// The errors of removexattr(2).
    pub fn discard(&self, name: &str) -> Result<()> {
        Ok(calls::fremovexattr(&self.file()?, kept_attribute(name))?)
    }
}

/// The ledger, and its records in memory.
#[derive(Debug)]
pub struct Ledger {
    notes: Notes,
    header: Header,
    holes: Holes,
    /// The memory errors that the kernel keeps in the file, each with the time at which it was
    /// found. The ledger has no block and no record for them, as the kernel holds the page itself.
    hw_errors: BTreeMap<Subpage, u64>,
}

impl Ledger {
    /// Makes a new ledger in `file`. Its header has one free block, and also holds `data`.
    pub fn create(data: Arc<File>, file: File) -> Result<Self> {
        tmpfs::allocate(&file, Range::at(0, SUBPAGE_SIZE))?;
        let (header, id) = (Header::default(), handle::of(&file, c"")?);
        let (holes, hw_errors) = (Holes::default(), BTreeMap::new());
        let ledger = Self { notes: Notes { data, id }, header, holes, hw_errors };
        ledger.write_header()?;
        Ok(ledger)
    }

    /// Reads the ledger in the header that is mounted at `mount`.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for a header or record that is damaged or of another version.
    pub fn open(data: Arc<File>, mount: &OwnedFd) -> Result<Self> {
        let id = handle::of(mount, LEDGER)?;
        let file = open(&data, id)?;
        let header = read_header(&file)?;
        let mut holes = Holes::default();
        for folio in folios_with_blocks(&file)? {
            let record = read_record(&file, folio)?;
            record.into_iter().flat_map(|(holes, _)| holes).for_each(|hole| holes.add(hole));
        }
        Ok(Self { notes: Notes { data, id }, header, holes, hw_errors: BTreeMap::new() })
    }

    /// The ledger's file, and the notes in it.
    pub fn notes(&self) -> &Notes {
        &self.notes
    }

    /// The header of the sealed file.
    pub fn header(&self) -> Header {
        self.header
    }

    /// Changes the header of the sealed file.
    pub fn update(&mut self, change: impl FnOnce(&mut Header)) -> Result<()> {
        let before = self.header;
        change(&mut self.header);
        if self.header == before {
            return Ok(());
        }
        let written = self.write_header().inspect_err(|_| self.header = before);
        debug_assert_eq!(written.is_err(), self.header == before, "it is changed if it is written");
        written
    }

    fn write_header(&self) -> Result<()> {
        let bytes = self.header.encode();
        Ok(calls::fsetxattr(&self.notes.file()?, HEADER, &bytes, XattrFlags::empty())?)
    }

    // ---- memory errors --------------------------------------------------------------------------

    /// The memory errors that the kernel keeps in the file, each with the time at which it was
    /// found.
    pub fn hw_errors(&self) -> &BTreeMap<Subpage, u64> {
        &self.hw_errors
    }

    /// Notes a memory error.
    pub fn note_hw_error(&mut self, subpage: Subpage, time: u64) -> Result<()> {
        assert!(!self.holes.contains(subpage), "{subpage:?} is quarantined already");
        let known = self.hw_errors.insert(subpage, time);
        debug_assert!(known.is_none(), "{subpage:?} is noted already");
        self.keep_hw_errors()
    }

    /// Forgets a memory error. Its page is no longer in the file.
    ///
    /// # Errors
    /// The errors of setxattr(2). Nothing has changed.
    pub fn forget_hw_errors(&mut self, subpage: Subpage) -> Result<()> {
        let Some(time) = self.hw_errors.remove(&subpage) else { return Ok(()) };
        self.keep_hw_errors().inspect_err(|_| {
            self.hw_errors.insert(subpage, time);
        })
    }

    /// Writes the note with the memory errors, as many as an attribute holds. The daemon finds the
    /// others again when the kernel meets the next memory error.
    fn keep_hw_errors(&self) -> Result<()> {
        const MOST: usize = (64 << 10) / 16; // XATTR_SIZE_MAX
        let pairs = self.hw_errors.iter().take(MOST).flat_map(|(subpage, time)| [subpage.0, *time]);
        let bytes: Vec<u8> = pairs.flat_map(u64::to_le_bytes).collect();
        self.notes.keep(HW_ERRORS, &bytes)
    }

    /// Replaces the memory errors here by those that another process has noted.
    pub fn read_hw_errors(&mut self) -> Result<()> {
        let bytes = self.notes.kept(HW_ERRORS)?.unwrap_or_default();
        let (words, _) = bytes.as_chunks::<8>();
        let (pairs, _) = words.as_chunks::<2>();
        let pairs = pairs.iter().map(|pair| pair.map(u64::from_le_bytes));
        self.hw_errors = pairs.map(|[subpage, time]| (Subpage(subpage), time)).collect();
        Ok(())
    }

    // ---- records --------------------------------------------------------------------------------

    /// The soft holes.
    pub fn holes(&self) -> &Holes {
        &self.holes
    }

    /// Adds `runs` of one folio to the folio's record. No subpage of `runs` is a hole yet. When
    /// this function returns, the ledger has the true copy of these subpages.
    ///
    /// # Errors
    /// The errors of setxattr(2). Nothing has changed.
    pub fn record(&mut self, runs: &[Range], time: u64, checksums: &Checksums) -> Result<()> {
        let (folio, before) = (folio_of(runs), self.holes.count());
        let mut all = self.checksums(folio)?;
        runs.iter().for_each(|run| all.copy(checksums, *run));
        self.rewrite(folio, &all, |holes| {
            runs.iter().for_each(|range| holes.add(Hole { range: *range, time }))
        })?;
        debug_assert_eq!(self.holes.count(), before + subpages(runs), "no other hole is made");
        Ok(())
    }

    /// Forgets the bytes that the ledger keeps of the holes in `range`, which is of one folio. The
    /// holes stay, and their bytes count as lost.
    ///
    /// # Errors
    /// The errors of setxattr(2). Nothing has changed.
    pub fn forget_bytes(&mut self, range: Range) -> Result<()> {
        let folio = Subpage::containing(range.start).folio();
        let mut checksums = self.checksums(folio)?;
        self.holes
            .in_range(range)
            .for_each(|hole| checksums.copy(&Checksums::default(), hole.range));
        self.rewrite(folio, &checksums, |_| {})
    }

    /// Removes `runs` of one folio from the folio's record. When this function returns, `data` has
    /// the true copy of these subpages.
    ///
    /// # Errors
    /// The errors of setxattr(2) and removexattr(2). Nothing has changed.
    pub fn strike(&mut self, runs: &[Range]) -> Result<()> {
        let (folio, before) = (folio_of(runs), self.holes.count());
        let checksums = self.checksums(folio)?;
        self.rewrite(folio, &checksums, |holes| runs.iter().for_each(|run| holes.remove(*run)))?;
        debug_assert_eq!(self.holes.count() + subpages(runs), before, "other holes stay");
        Ok(())
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
        let is_inside = |hole: Hole| folio.range().covers(hole.range);
        assert!(holes.all().all(is_inside), "a record holds the holes of one folio");
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

    /// The checksums of the bytes that the ledger keeps of `folio`.
    ///
    /// # Errors
    /// The errors of getxattr(2). [`Error::Corrupt`] for a record that is damaged or of another
    /// version.
    pub fn checksums(&self, folio: Folio) -> Result<Checksums> {
        let record = read_record(&self.notes.file()?, folio)?;
        Ok(record.map(|(_, checksums)| checksums).unwrap_or_default())
    }

    // ---- bytes ----------------------------------------------------------------------------------

    /// Reads the kept bytes of `range`, whole subpages of one folio, from the ledger's `file` into
    /// `bytes`. A subpage whose kept bytes are lost becomes zeros. Returns the number of such
    /// subpages.
    ///
    /// # Errors
    /// A shortage. Then it is not known if bytes are lost.
    pub fn read(file: &File, range: Range, checksums: &Checksums, bytes: &mut [u8]) -> Result<u64> {
        assert_eq!(bytes.len() as u64, range.len(), "there is room for {range}");
        let is_read = |range: Range, bytes: &mut [u8]| match tmpfs::read_at(
            file,
            bytes,
            place(range).start,
        ) {
            Err(error) if error.is_shortage() => Err(error),
            read => Ok(read.is_ok_and(|read| read == bytes.len())),
        };
        let all = is_read(range, bytes)?;
        let subpages = range.steps(SUBPAGE_SIZE).zip(bytes.chunks_exact_mut(SUBPAGE_SIZE as usize));
        let (mut lost, mut damaged) = (0, 0);
        for (subpage, bytes) in subpages {
            let checksum = checksums.of(Subpage::containing(subpage.start));
            if !(all || is_read(subpage, bytes)?) || crc32fast::hash(bytes) != checksum {
                bytes.fill(0);
                lost += 1;
                damaged += u64::from(checksum != Checksums::NONE);
            }
        }
        if damaged > 0 {
            log::error!(
                "what was kept of {damaged} quarantined subpages of {range} is lost: a memory error has hit the ledger"
            );
        }
        Ok(lost)
    }

    /// Frees the ledger's blocks for `range`, which is in no record.
    ///
    /// # Errors
    /// The errors of fallocate(2).
    pub fn free(&self, range: Range) -> Result<()> {
        assert!(self.holes.in_range(range).next().is_none(), "{range} has its true copy here");
        tmpfs::punch(&self.notes.file()?, place(range))
    }

    /// Frees the ledger's blocks for `folio`, except those of its record and of `runs`.
    ///
    /// # Errors
    /// The errors of fallocate(2) and cachestat(2).
    pub fn trim(&self, folio: Folio, runs: &[Range]) -> Result<()> {
        let file = self.notes.file()?;
        let mut kept: Vec<Range> =
            self.holes.in_range(folio.range()).map(|hole| hole.range).collect();
        kept.extend(runs);
        kept.sort_by_key(|range| range.start);
        debug_assert!(kept.is_sorted_by_key(|range| range.end), "no two runs share a subpage");
        debug_assert!(kept.iter().all(|range| folio.range().covers(*range)), "of one folio");
        for left_over in between(folio.range(), kept.into_iter()) {
            if tmpfs::resident(&file, place(left_over))? > 0 {
                tmpfs::punch(&file, place(left_over))?;
            }
        }
        Ok(())
    }

    /// Frees the ledger's blocks of all folios, except those of the records.
    ///
    /// # Errors
    /// As for [`Ledger::trim`].
    pub fn trim_all(&self) -> Result<()> {
        if self.blocks()? == self.holes.count() + 1 {
            return Ok(());
        }
        folios_with_blocks(&self.notes.file()?)?
            .into_iter()
            .try_for_each(|folio| self.trim(folio, &[]))
    }

    /// Number of blocks that the ledger has, with the first one, which means nothing.
    pub fn blocks(&self) -> Result<u64> {
        tmpfs::blocks_taken(&self.notes.file()?)
    }
}

/// The offsets at which the ledger keeps the bytes of `range`.
pub fn place(range: Range) -> Range {
    Range::at(range.start + FOLIO_SIZE, range.len())
}

/// The folio in which all `runs` lie.
fn folio_of(runs: &[Range]) -> Folio {
    let folio = Subpage::containing(runs[0].start).folio();
    assert!(runs.iter().all(|run| folio.range().covers(*run)), "{runs:?} are not of one folio");
    folio
}

/// The folios of `data` for which the ledger's `file` has blocks.
fn folios_with_blocks(file: &File) -> Result<Vec<Folio>> {
    let mut found = Vec::new();
    for folio in Range::new(FOLIO_SIZE, tmpfs::size(file)?).folios() {
        if tmpfs::resident(file, folio.range())? > 0 {
            found.push(Folio(folio.0 - 1));
        }
    }
    Ok(found)
}

fn open(data: &File, id: InodeId) -> Result<File> {
    Ok(handle::open(data, id, libc::O_RDWR)?.into())
}

/// Checks that the sealed file in `directory` has the version of this daemon.
///
/// # Errors
/// [`Error::Corrupt`] for another version. ENOENT if there is no sealed file.
pub fn check_version(directory: &Path) -> Result<()> {
    header_at(directory).map(drop)
}

/// The header of the sealed file whose header is mounted at `directory`. The file need not be
/// open.
///
/// # Errors
/// [`Error::Corrupt`] for a header that is damaged or of another version.
pub fn header_at(directory: &Path) -> Result<Header> {
    read_header(&File::open(directory.join("ledger"))?)
}

fn read_header(file: &File) -> Result<Header> {
    let mut bytes = [0; SUPERBLOCK_BYTES];
    calls::fgetxattr(file, HEADER, &mut bytes[..])?;
    Header::decode(&bytes)
}

fn read_record(file: &File, folio: Folio) -> Result<Option<(Vec<Hole>, Checksums)>> {
    let mut bytes = [0; MOST_RECORD_BYTES];
    match calls::fgetxattr(file, attribute(folio), &mut bytes[..]) {
        Ok(length) => decode_record(folio, &bytes[..length]).map(Some),
        Err(Errno::NODATA) => Ok(None),
        Err(Errno::RANGE) => {
            Err(Error::Corrupt(format!("the ledger's record of folio {}", folio.0)))
        }
        Err(errno) => Err(errno.into()),
    }
}

fn kept_attribute(name: &str) -> String {
    format!("trusted.kept.{name}")
}

fn attribute(folio: Folio) -> String {
    format!("trusted.folio.{}", folio.0)
}
