//! Compares docs/FORMAT.md with the files of daemons. Each name and attribute in the daemons' mount
//! namespaces has a row, and the test sees each row. The bytes are as the tables of offsets say.
//!
//! A child of another test holds copies of this test's descriptors for a moment. So the tests
//! detach pools and do not unmount them.

mod support;

use hugetlb2fs::sys::memory_failures;
use rustix::event::epoll;
use rustix::fs::{CWD, FallocateFlags, RenameFlags, fallocate, renameat_with};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::thread;
use support::documents::{blocks, document, quoted, rows, section};
use support::{
    FOLIO, Held, INJECT, PLACEMENT, Pool, SUBPAGE, get, hugetlb2, kill_worker, limits, open_memory,
    poison, run, set,
};

const FORMAT: &str = "docs/FORMAT.md";
const WITNESSED: &str = "exchange: what it found is noted";
const ANNOUNCED: &str = "allocate: the size to come back to is noted";

// ---- files of a daemon -------------------------------------------------------------------------

/// The root of a daemon's mount namespace.
fn root(pool: &Pool) -> PathBuf {
    PathBuf::from(format!("/proc/{}/root", pool.counter("daemon_pid")))
}

/// The ledgers of all regular files.
fn ledgers(pool: &Pool) -> Vec<PathBuf> {
    let objects = fs::read_dir(root(pool).join("objects")).unwrap();
    objects.map(|object| object.unwrap().path().join("ledger")).collect()
}

/// The ledger of a regular file. The inode number names the file's directory of objects.
fn ledger_of(pool: &Pool, file: &str) -> PathBuf {
    let id = fs::metadata(pool.join(file)).unwrap().ino();
    root(pool).join(format!("objects/{id:016x}/ledger"))
}

fn attributes(path: &Path) -> Vec<String> {
    let mut names = vec![0; 64 << 10];
    let length = rustix::fs::llistxattr(path, &mut names[..]).unwrap();
    let names = String::from_utf8(names[..length].to_vec()).expect("names are text");
    names.split_terminator('\0').map(str::to_owned).collect()
}

fn bytes(path: &Path, name: &str) -> Vec<u8> {
    let mut value = vec![0; 64 << 10];
    let length = rustix::fs::lgetxattr(path, name, &mut value[..])
        .unwrap_or_else(|_| panic!("{name} at {path:?}"));
    value.truncate(length);
    value
}

/// The rows of the documented tables that a test has seen.
#[derive(Default)]
struct Seen {
    /// Path and kind.
    names: BTreeSet<(String, String)>,
    /// Path and attribute.
    attributes: BTreeSet<(String, String)>,
}

impl Seen {
    /// Looks at all files of a pool's daemon, except the machine's /proc, /sys and cgroups, and the
    /// names of users.
    fn look(&mut self, pool: &Pool) {
        let root = root(pool);
        let device = root.metadata().unwrap().dev();
        self.look_into(&root, &root, device);
    }

    fn look_into(&mut self, root: &Path, directory: &Path, device: u64) {
        for entry in fs::read_dir(directory).unwrap() {
            let entry = entry.unwrap();
            let path = format!("/{}", entry.path().strip_prefix(root).unwrap().display());
            let is_the_machines =
                ["/proc", "/sys", "/cgroup"].iter().any(|prefix| path.starts_with(prefix));
            if is_the_machines || path.starts_with("/index/tree/") {
                continue;
            }
            let (metadata, name) = (entry.path().symlink_metadata().unwrap(), documented(&path));
            let of_names = attributes(&entry.path())
                .into_iter()
                .map(|attribute| (name.clone(), numbered(&attribute)));
            self.attributes.extend(of_names);
            self.names.insert((name, kind(&metadata, device)));
            if metadata.is_dir() {
                self.look_into(root, &entry.path(), metadata.dev());
            }
        }
    }
}

fn kind(metadata: &fs::Metadata, device: u64) -> String {
    let kind = metadata.file_type();
    let names = [
        (metadata.dev() != device, "mount"),
        (kind.is_dir(), "directory"),
        (kind.is_symlink(), "symlink"),
    ];
    names.iter().find(|(is, _)| *is).map_or("file", |(_, name)| name).to_owned()
}

/// A path with the placeholders of the document.
fn documented(path: &str) -> String {
    let is_id = |part: &str| part.len() == 16 && part.bytes().all(|byte| byte.is_ascii_hexdigit());
    let is_number = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    let mut before = "";
    let parts = path.split('/').map(|part| {
        let placed = match before {
            "objects" | "doors" | ".orphans" if is_id(part) => "<id>",
            "reserve" if is_number(part) => "<node>",
            ".witnesses" if is_number(part) => "<unique>",
            _ => part,
        };
        before = part;
        placed
    });
    parts.collect::<Vec<_>>().join("/")
}

/// An attribute with the placeholder of the document for a number at its end.
fn numbered(attribute: &str) -> String {
    let name = attribute.trim_end_matches(|c: char| c.is_ascii_digit());
    if name.len() < attribute.len() { format!("{name}<n>") } else { attribute.to_owned() }
}

/// The first two columns of a documented table.
fn pairs(heading: &str) -> BTreeSet<(String, String)> {
    let word = |cell: &str| quoted(cell).next().unwrap_or(cell).to_owned();
    rows(section(&document(FORMAT), heading))
        .iter()
        .map(|row| (word(&row[0]), word(&row[1])))
        .collect()
}

// ---- situations --------------------------------------------------------------------------------

fn open(pool: &Pool, name: &str) -> File {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(pool.join(name))
        .unwrap()
}

fn file(pool: &Pool, name: &str, pages: u64) -> File {
    let file = open(pool, name);
    file.write_all_at(&vec![7; (pages * FOLIO) as usize], 0).unwrap();
    file
}

fn punch(file: &File, page: u64) {
    let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(file, how, page * FOLIO, FOLIO).unwrap();
}

/// Opens a file `count` times and makes a queue that polls all of these.
fn polled(pool: &Pool, name: &str, count: u64) -> (OwnedFd, Vec<File>) {
    let files: Vec<File> = (0..count).map(|_| open(pool, name)).collect();
    let queue = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
    for (number, file) in files.iter().enumerate() {
        let data = epoll::EventData::new_u64(number as u64);
        epoll::add(&queue, file, data, epoll::EventFlags::PRI).unwrap();
    }
    (queue, files)
}

/// Makes a directory with two names. It is not the root, because the kernel keeps the directory
/// locked while a program exchanges names in it.
fn make_names(pool: &Pool) {
    fs::create_dir(pool.join("names")).unwrap();
    ["names/one", "names/other"].iter().for_each(|name| drop(open(pool, name)));
}

fn exchange(pool: &Pool) {
    let [one, other] = ["names/one", "names/other"].map(|name| pool.join(name));
    renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE).unwrap();
}

/// Runs `look` while an exchange of names is held after its first step.
fn beside_an_exchange(pool: &Pool, look: impl FnOnce()) {
    thread::scope(|scope| {
        let held = Held::at(pool, WITNESSED);
        let exchanging = scope.spawn(|| exchange(pool));
        let witnesses = root(pool).join("index/.witnesses");
        let is_there = || fs::read_dir(&witnesses).unwrap().next().is_some();
        limits::until(limits::ANSWER, "the witness of an exchange", is_there);
        look();
        drop(held);
        limits::within(limits::ANSWER, "the end of an exchange", || exchanging.join().unwrap());
    });
}

#[test]
fn each_name_that_outlives_a_process_is_documented() {
    let mut seen = Seen::default();
    let mut pool = Pool::mount(&format!("pagesize=2M,size={},io=native", 20 * FOLIO));
    run(hugetlb2().arg("upgrade").arg(pool.path()));
    pool.note_new_daemon();
    set(pool.path(), PLACEMENT, "local").unwrap();
    file(&pool, "quarantined", 1);
    poison(pool.join("quarantined"), 0, SUBPAGE).unwrap();
    if memory_failures().is_some() {
        set(pool.join("quarantined"), INJECT, format!("hw {SUBPAGE}")).unwrap();
        get(pool.join("quarantined"), support::POISON).unwrap();
    }
    punch(&file(&pool, "punched", 3), 1);
    file(&pool, "read", 1);
    let reader = File::open(pool.join("read")).unwrap();
    let pollers = polled(&pool, "read", 130);
    file(&pool, "opened", 1);
    let memory = open_memory(pool.join("opened")).unwrap();
    let unlinked = file(&pool, "unlinked", 1);
    fs::remove_file(pool.join("unlinked")).unwrap();
    make_names(&pool);
    beside_an_exchange(&pool, || seen.look(&pool));
    drop((reader, pollers, memory, unlinked, pool));

    let pool = Pool::mount(&format!("pagesize=2M,size={},punch=keep", 4 * FOLIO));
    punch(&file(&pool, "punched", 2), 1);
    seen.look(&pool);
    drop(pool);

    let pool = Pool::mount(&format!("pagesize=2M,size={},clear=ahead", 4 * FOLIO));
    limits::until(limits::ANSWER, "memory that is ready", || pool.counter("pages_ready") > 0);
    seen.look(&pool);
    drop(pool);

    let orphan = |(name, kind): (String, String)| {
        let kind = if name == "/index/.orphans/<id>" { "any".to_owned() } else { kind };
        (name, kind)
    };
    assert_eq!(seen.names.into_iter().map(orphan).collect::<BTreeSet<_>>(), pairs("Names"));
    let mut attributes = pairs("Attributes");
    if memory_failures().is_none() {
        // This kernel reports no memory errors, so no daemon notes one.
        attributes.retain(|(_, name)| name != "trusted.kept.poisoned");
    }
    // No page moves to another NUMA node here.
    attributes.retain(|(_, name)| name != "trusted.kept.moving");
    assert_eq!(seen.attributes, attributes);
}

// ---- bytes -------------------------------------------------------------------------------------

/// The offset and the number of bytes of each field, by its name.
struct Layout(BTreeMap<String, (usize, usize)>);

impl Layout {
    /// The tables of offsets under a heading. Asserts that each table begins at 0 and leaves no
    /// byte out.
    fn all(heading: &str) -> Vec<Self> {
        let mut layouts: Vec<Self> = Vec::new();
        for row in rows(section(&document(FORMAT), heading)) {
            let [offset, bytes] =
                [0, 1].map(|cell: usize| row[cell].parse::<usize>().expect("a number"));
            if offset == 0 {
                layouts.push(Self(BTreeMap::new()));
            }
            let layout = layouts.last_mut().expect("a table begins at 0");
            assert_eq!(offset, layout.bytes(), "{row:?} does not follow the row before");
            let name = row[2].split([':', ' ']).next().expect("a word");
            layout.0.insert(format!("{name}@{offset}"), (offset, bytes));
        }
        layouts
    }

    fn bytes(&self) -> usize {
        self.0.values().map(|(offset, bytes)| offset + bytes).max().unwrap_or(0)
    }

    /// The number in the field `field` of a record.
    fn number(&self, record: &[u8], field: &str) -> u64 {
        let (offset, bytes) = self.0.get(field).unwrap_or_else(|| panic!("no field {field}"));
        record[*offset..offset + bytes]
            .iter()
            .rev()
            .fold(0, |number, byte| number << 8 | u64::from(*byte))
    }
}

/// The documented version of an object.
fn version(attribute: &str) -> u64 {
    let versions = rows(section(&document(FORMAT), "Versions"));
    let row = versions.iter().find(|row| row[2].contains(attribute)).expect("a row");
    row[1].parse().expect("a number")
}

#[test]
fn a_header_reads_as_documented() {
    let header = &Layout::all("A sealed file")[0];
    let pool = Pool::small(16);
    let file = file(&pool, "file", 3);
    let read = |name: &str| {
        let bytes = bytes(&ledger_of(&pool, "file"), "trusted.superblock");
        assert_eq!(bytes.len(), header.bytes());
        assert_eq!(u64::from(crc32fast::hash(&bytes[..32])), header.number(&bytes, "checksum@32"));
        assert_eq!(header.number(&bytes, "magic@0"), u64::from_le_bytes(*b"hugetlb2"));
        header.number(&bytes, name)
    };
    assert_eq!(read("version@8"), version("trusted.superblock"));
    assert_eq!((read("span@16"), read("alarm@12"), read("undo@13")), (3, 0, 0));
    thread::scope(|scope| {
        let held = Held::at(&pool, ANNOUNCED);
        let growing = scope.spawn(|| file.set_len(5 * FOLIO).unwrap());
        limits::until(limits::ANSWER, "the size to come back to", || read("undo@13") == 1);
        assert_eq!(read("undo@24"), 3 * FOLIO);
        drop(held);
        limits::within(limits::ANSWER, "the end of a growth", || growing.join().unwrap());
    });
    assert_eq!((read("span@16"), read("undo@13")), (5, 0));
    poison(pool.join("file"), FOLIO, SUBPAGE).unwrap();
    assert_eq!(read("alarm@12"), 1);
    for ledger in ledgers(&pool) {
        let limit = rustix::fs::statfs(ledger.parent().unwrap()).unwrap().f_blocks;
        assert_eq!(limit, 5 * 512 + 1, "blocks of {ledger:?}");
    }
    drop((file, pool));
}

#[test]
fn a_record_reads_as_documented() {
    let layouts = Layout::all("A sealed file");
    let [_, head, run] = &layouts[..] else { panic!("three tables") };
    let pool = Pool::small(4);
    let file = file(&pool, "file", 2);
    let kept = [[1; SUBPAGE as usize], [2; SUBPAGE as usize], [3; SUBPAGE as usize]];
    let places = [5, 6, 511];
    for (bytes, place) in kept.iter().zip(places) {
        file.write_all_at(bytes, FOLIO + place * SUBPAGE).unwrap();
    }
    let lost = places.map(|place| format!("{} {SUBPAGE}\n", FOLIO + place * SUBPAGE)).concat();
    set(pool.join("file"), support::POISON, lost).unwrap();
    let list = get(pool.join("file"), support::POISON).unwrap();
    let times: Vec<u64> =
        list.lines().map(|line| line.rsplit(' ').next().unwrap().parse().unwrap()).collect();

    let ledger = ledger_of(&pool, "file");
    let record = bytes(&ledger, "trusted.folio.1");
    let number = |field: &str| head.number(&record, field);
    assert_eq!(
        (number("version@0"), number("runs@4"), number("folio@8")),
        (version("trusted.folio.<n>"), 2, 1)
    );
    let (runs, sums) = record[head.bytes()..].split_at(2 * run.bytes());
    for ((bytes, expected), time) in runs.chunks(run.bytes()).zip([(5, 2), (511, 1)]).zip(times) {
        assert_eq!((run.number(bytes, "first@0"), run.number(bytes, "count@4")), expected);
        assert_eq!(run.number(bytes, "time@8"), time);
    }
    let mut expected: Vec<u8> =
        kept.iter().flat_map(|bytes| crc32fast::hash(bytes).to_le_bytes()).collect();
    expected.extend(crc32fast::hash(&record[..record.len() - 4]).to_le_bytes());
    assert_eq!(sums, expected);
    let ledger = File::open(ledger).unwrap();
    for (bytes, place) in kept.iter().zip(places) {
        let mut read = [0; SUBPAGE as usize];
        ledger.read_exact_at(&mut read, FOLIO + place * SUBPAGE + (2 << 20)).unwrap();
        assert_eq!(read, *bytes, "the ledger's copy of subpage {place}");
    }
    drop((file, pool));
}

#[test]
fn notes_of_a_file_read_as_documented() {
    let pool = Pool::mount(&format!("pagesize=2M,size={},io=native", 8 * FOLIO));
    let file = file(&pool, "file", 6);
    [1, 3, 4].into_iter().for_each(|page| punch(&file, page));
    let note = |name: &str| bytes(&ledger_of(&pool, "file"), &format!("trusted.kept.{name}"));
    let words = [1_u32, 1, 3, 2].map(u32::to_le_bytes).concat();
    assert_eq!(note("released"), words, "runs of released pages");
    assert_eq!(note("backing").len(), 4);
    let reader = File::open(pool.join("file")).unwrap();
    assert_eq!(note("natives").len(), 8);
    let pollers = polled(&pool, "file", 130);
    assert_eq!((note("pollers").len(), note("pollers 1").len()), (128 * 8, 2 * 8));
    let kept =
        |path: &str, name: &str| String::from_utf8(bytes(&root(&pool).join(path), name)).unwrap();
    assert_eq!(kept("reserve", "trusted.pages"), "8");
    assert_eq!(
        kept("reserve", "trusted.huge_at_mount"),
        pool.counter("huge_bytes_at_mount").to_string()
    );
    drop((file, reader, pollers, pool));
}

#[test]
fn a_placement_reads_as_documented() {
    let pool = Pool::small(2);
    file(&pool, "file", 1);
    set(pool.join("file"), PLACEMENT, " strict:weighted-interleave:00*2 \n\0").unwrap();
    let kept = bytes(&root(&pool).join("index/tree/file"), PLACEMENT);
    assert_eq!(String::from_utf8(kept).unwrap(), "strict:weighted-interleave:0*2");
    drop(pool);
}

#[test]
fn the_session_record_reads_as_documented() {
    let format = document(FORMAT);
    let session = section(&format, "The session record");
    let words: BTreeSet<String> = rows(session)
        .iter()
        .map(|row| quoted(&row[0]).next().expect("a word").to_owned())
        .collect();
    let pool = Pool::small(2);
    let record = fs::read_to_string(root(&pool).join("index/handover")).unwrap();
    let (first, rest) = record.split_once('\n').unwrap();
    assert_eq!(first, blocks(session, "text")[0].trim_end());
    assert!(first.ends_with(&format!(" {}", version("/index/handover"))), "{first}");
    let used: BTreeSet<String> =
        rest.lines().map(|line| line.split(' ').next().unwrap().to_owned()).collect();
    assert_eq!(used, words);
}

#[test]
fn a_request_that_was_sent_again_is_noted_as_documented() {
    let note = &Layout::all("Requests that were sent again")[0];
    let pool = Pool::small(4);
    make_names(&pool);
    let attempts = root(&pool).join("attempts");
    assert_eq!(fs::read(&attempts).unwrap(), [0; 4096]);
    beside_an_exchange(&pool, || kill_worker(&pool));
    let table = fs::read(&attempts).unwrap();
    assert_eq!(table.len() / note.bytes(), 256);
    let used: Vec<&[u8]> =
        table.chunks(note.bytes()).filter(|bytes| note.number(bytes, "number@0") != 0).collect();
    assert!(!used.is_empty(), "the exchange was sent again");
    for bytes in used {
        assert_eq!(note.number(bytes, "number@0") >> 63, 1);
        assert_eq!(note.number(bytes, "begun@8"), 1);
    }
}
