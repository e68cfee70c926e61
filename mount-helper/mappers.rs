//! Processes that map a pool's files where huge entries are impossible.
//!
//! A 2 MiB entry maps a folio of the file to an address that is a multiple of 2 MiB. So the
//! distance from a mapping's address to its offset in the file must be such a multiple. mmap(2)
//! chooses such an address, unless the program asks for another one: QEMU first reserves address
//! space that is aligned to its property `align` only.

use crate::guard;
use hugetlb2fs::guard::Area;
use hugetlb2fs::sys::markers;
use hugetlb2fs::units::{FOLIO_SIZE, Range};
use rustix::fs::{major, minor};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs::{self, File, Metadata};
use std::os::unix::fs::MetadataExt;

/// A process and a file that it maps misaligned.
#[derive(Debug, PartialEq, Eq)]
pub struct Misaligned {
    /// Its process id.
    pub pid: u32,
    /// Its name (proc(5), /proc/PID/comm).
    pub program: String,
    /// The file's path as the process sees it.
    pub path: String,
    /// The bytes of the file that are mapped in this way.
    pub bytes: u64,
}

impl Misaligned {
    /// A sentence with what helps.
    pub fn describe(&self) -> String {
        let Self { pid, program, path, bytes } = self;
        let remedy = if program.starts_with("qemu") {
            "align=2M in its memory-backend-file helps"
        } else {
            "mmap(2) without an address helps, or with one that is a multiple of 2 MiB from the offset"
        };
        format!(
            "process {pid} ({program}) maps {} MiB of {path} at an address that rules huge entries out; {remedy}",
            bytes >> 20
        )
    }

    /// The same for programs.
    pub fn to_json(&self) -> Value {
        json!({ "pid": self.pid, "program": self.program, "path": self.path, "bytes": self.bytes })
    }
}

/// The files of a pool, or one of them.
#[derive(Clone, Copy)]
struct Files {
    /// The pool's device number, major and minor.
    device: (u32, u32),
    /// The inode number of the one file.
    inode: Option<u64>,
}

impl Files {
    fn of_device(device: u64) -> Self {
        Self { device: (major(device), minor(device)), inode: None }
    }
}

/// All processes that map files of a pool misaligned, by the metadata of its root. Processes that
/// this one may not look at (ptrace(2), PTRACE_MODE_READ) are left out.
pub fn of_pool(root: &Metadata) -> Vec<Misaligned> {
    misaligned(Files::of_device(root.dev()))
}

/// The same for one file.
pub fn of_file(file: &Metadata) -> Vec<Misaligned> {
    misaligned(Files { inode: Some(file.ino()), ..Files::of_device(file.dev()) })
}

fn misaligned(files: Files) -> Vec<Misaligned> {
    processes().into_iter().flat_map(|pid| of_process(pid, files)).collect()
}

fn processes() -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().filter_map(Result::ok);
    let mut pids: Vec<u32> =
        entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    pids.sort_unstable();
    pids
}

/// A process that maps a file, and its mappings of it.
pub struct Mapper {
    /// Its process id.
    pub pid: u32,
    areas: Vec<Area>,
    is_guarded: bool,
}

impl Mapper {
    /// All of a file. Processes that this one may not look at are left out.
    pub fn all(file: &Metadata) -> Vec<Self> {
        processes().into_iter().filter_map(|pid| Self::of(pid, file)).collect()
    }

    fn of(pid: u32, file: &Metadata) -> Option<Self> {
        let maps = fs::read(format!("/proc/{pid}/maps")).ok()?;
        let lines = || maps.split(|byte| *byte == b'\n');
        let device = (major(file.dev()), minor(file.dev()));
        let is_of_file = |area: &Area| (area.device, area.inode) == (device, file.ino());
        let areas: Vec<Area> = lines().filter_map(Area::parse).filter(is_of_file).collect();
        let has_library = |line: &[u8]| {
            let path = line.strip_suffix(b" (deleted)").unwrap_or(line); // by an upgrade
            path.ends_with(format!("/{}", guard::LIBRARY).as_bytes())
        };
        let is_guarded = lines().any(has_library);
        (!areas.is_empty()).then_some(Self { pid, areas, is_guarded })
    }

    /// True if it runs under `hugetlb2 guard`.
    pub fn is_guarded(&self) -> bool {
        self.is_guarded
    }

    /// True if a touch of `subpage` is a memory error wherever the process maps it, and it maps it.
    pub fn has_marker(&self, subpage: Range) -> bool {
        let Ok(pagemap) = File::open(format!("/proc/{}/pagemap", self.pid)) else { return false };
        let areas = self.areas.iter().filter(|area| area.bytes().covers(subpage));
        let mut addresses = areas.map(|area| area.addresses_of(subpage).start).peekable();
        addresses.peek().is_some()
            && addresses.all(|at| markers::is_marker_in(&pagemap, at).unwrap_or(false))
    }
}

fn of_process(pid: u32, files: Files) -> Vec<Misaligned> {
    let read = |name: &str| fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default(); // it may have ended
    let program = String::from_utf8_lossy(&read("comm")).trim_end().escape_debug().to_string();
    let found = of_maps(&String::from_utf8_lossy(&read("maps")), files);
    let found = found.into_iter();
    found.map(|(path, bytes)| Misaligned { pid, program: program.clone(), path, bytes }).collect()
}

/// The same by path, of the text of /proc/PID/maps (proc(5)).
fn of_maps(maps: &str, files: Files) -> BTreeMap<String, u64> {
    let mut found = BTreeMap::new();
    for mapping in maps.lines().filter_map(Mapping::parse) {
        if mapping.is_of(files) && mapping.is_misaligned() {
            *found.entry(mapping.path.escape_debug().to_string()).or_default() += mapping.bytes();
        }
    }
    found
}

struct Mapping<'a> {
    start: u64,
    end: u64,
    offset: u64,
    device: (u32, u32),
    inode: u64,
    path: &'a str,
}

impl<'a> Mapping<'a> {
    /// A line: `7f0e3fe00000-7f0e43e00000 rw-s 00000000 00:2b 1234   /mnt/h2/vm0`.
    fn parse(line: &'a str) -> Option<Self> {
        let hexadecimal = |text: &str| u64::from_str_radix(text, 16).ok();
        let mut fields = line.splitn(6, ' ');
        let (start, end) = fields.next()?.split_once('-')?;
        let offset = fields.nth(1)?;
        let (major, minor) = fields.next()?.split_once(':')?;
        let device = (u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?);
        let inode = fields.next()?.parse().ok()?;
        let path = fields.next().unwrap_or_default().trim_start();
        let [start, end, offset] = [start, end, offset].map(hexadecimal);
        Some(Self { start: start?, end: end?, offset: offset?, device, inode, path })
    }

    fn bytes(&self) -> u64 {
        self.end - self.start
    }

    fn is_of(&self, files: Files) -> bool {
        self.device == files.device && files.inode.is_none_or(|inode| inode == self.inode)
    }

    /// True if a whole folio of the file is mapped at an address where a huge entry cannot map it.
    fn is_misaligned(&self) -> bool {
        let first_folio = self.offset.next_multiple_of(FOLIO_SIZE);
        let has_whole_folio = first_folio + FOLIO_SIZE <= self.offset + self.bytes();
        has_whole_folio && !self.start.wrapping_sub(self.offset).is_multiple_of(FOLIO_SIZE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POOL: Files = Files { device: (0, 0x2b), inode: None };

    fn found(maps: &str) -> Vec<(String, u64)> {
        of_maps(maps, POOL).into_iter().collect()
    }

    #[test]
    fn a_mapping_is_misaligned_by_its_distance_to_its_offset() {
        let aligned = "7f0000200000-7f0000600000 rw-s 00000000 00:2b 7   /h2/vm 0\n\
                       7f0000a01000-7f0000e00000 rw-s 00201000 00:2b 7   /h2/vm 0\n";
        assert_eq!(found(aligned), []);
        let misaligned = "7f0000201000-7f0000601000 rw-s 00000000 00:2b 7   /h2/vm 0\n\
                          7f0000a00000-7f0000e00000 r--p 00001000 00:2b 7   /h2/vm 0\n";
        assert_eq!(found(misaligned), [("/h2/vm 0".to_owned(), 8 << 20)]);
    }

    #[test]
    fn a_mapping_of_no_whole_folio_is_not_misaligned() {
        assert_eq!(found("7f0000201000-7f0000400000 rw-s 00000000 00:2b 7   /h2/small\n"), []);
        assert_eq!(found("7f0000201000-7f0000401000 rw-s 00100000 00:2b 7   /h2/across\n"), []);
    }

    #[test]
    fn other_files_are_passed_over() {
        let maps = "7f0000201000-7f0000601000 rw-s 00000000 08:01 7   /var/file\n\
                    7f0000201000-7f0000601000 rw-p 00000000 00:00 0\n\
                    7f0000201000-7f0000601000 rw-s 00000000 00:2b 8   /h2/a\\012b (deleted)\n";
        let of_inode = |inode| of_maps(maps, Files { inode: Some(inode), ..POOL });
        assert_eq!(found(maps).len(), 1);
        assert_eq!((of_inode(7).len(), of_inode(8).len()), (0, 1));
    }

    #[test]
    fn qemu_is_told_its_own_remedy() {
        let by = |program: &str| Misaligned {
            pid: 1,
            program: program.into(),
            path: "/f".into(),
            bytes: 1 << 20,
        };
        assert!(by("qemu-system-x86").describe().contains("align=2M"));
        assert!(by("postgres").describe().contains("mmap(2)"));
    }
}
