//! A refused change has changed nothing. Each system call of each operation fails once with each
//! error of an emergency that it can answer. The operation then either succeeds all the same, or is
//! refused and leaves everything as before. In both cases the next try works.

mod support;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{
    CWD, FallocateFlags, FileType, Mode, OFlags, RenameFlags, XattrFlags, fallocate, renameat_with,
};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use support::{
    COLLAPSE, FAIL, FOLIO, PLACEMENT, POISON, Pool, REPAIR, SIZE as SIZE_OF_POOL, SUBPAGE,
    await_shut, get, limits, open_memory, poison, set,
};

const ERRORS: &[&str] = &["ENOMEM", "EMFILE", "ENOSPC"];
const PAGES: u64 = 8;

/// More calls than any operation here makes. The bound also ends an operation that never ends.
const MOST_CALLS: u64 = 2000;

/// An operation, and a check of its success.
struct Operation {
    name: &'static str,
    /// Further mount options of the pool.
    options: &'static str,
    prepare: fn(&Pool),
    change: fn(&mut Stage<'_>) -> Result<(), Errno>,
    verify: fn(&Pool),
}

/// The pool, with `file` open for reading and writing if it exists.
struct Stage<'a> {
    pool: &'a Pool,
    open: Option<File>,
}

impl Stage<'_> {
    fn path(&self) -> PathBuf {
        file(self.pool)
    }

    fn other(&self) -> PathBuf {
        other(self.pool)
    }

    fn file(&self) -> &File {
        self.open.as_ref().expect("the operation has prepared it")
    }

    fn allocate(&self, mode: FallocateFlags, offset: u64, length: u64) -> Result<(), Errno> {
        fallocate(self.file(), mode, offset, length)
    }

    /// Writes as programs do: after a write that ended early, another one goes on.
    fn write(&self, length: u64, offset: u64) -> Result<(), Errno> {
        self.file().write_all_at(&vec![9; length as usize], offset).map_err(errno)
    }

    fn resize(&self, size: u64) -> Result<(), Errno> {
        self.file().set_len(size).map_err(errno)
    }
}

fn errno(error: std::io::Error) -> Errno {
    Errno::from_io_error(&error).expect("an error of the kernel's")
}

fn file(pool: &Pool) -> PathBuf {
    pool.join("file")
}

fn other(pool: &Pool) -> PathBuf {
    pool.join("other")
}

/// Opens for reading and writing. The daemon reads for such a descriptor, and has nothing to do
/// when it is closed.
fn open(path: &Path) -> File {
    File::options().read(true).write(true).open(path).expect("it can be opened")
}

// ---- what is there -----------------------------------------------------------------------------

/// An inode as programs see it. Its times are left out: the daemon sets them before the contents
/// change, as the kernel does for its own filesystems.
#[derive(PartialEq)]
struct Entry {
    mode: u32,
    owner: (u32, u32),
    links: u64,
    size: u64,
    blocks: u64,
    attributes: BTreeMap<String, String>,
    /// A file's subpages, where a quarantined one is empty; or the target of a symbolic link.
    contents: Vec<Vec<u8>>,
}

/// All that programs see of a pool.
#[derive(PartialEq)]
struct Snapshot {
    entries: BTreeMap<PathBuf, Entry>,
    counters: BTreeMap<String, u64>,
}

impl Snapshot {
    fn of(pool: &Pool) -> Self {
        let mut entries = BTreeMap::new();
        collect(&pool.path(), &mut entries);
        Self { entries, counters: accounts(pool) }
    }

    /// The differences, a line for each.
    fn differences(&self, after: &Self) -> Vec<String> {
        let mut found = Vec::new();
        let paths = self
            .entries
            .keys()
            .chain(after.entries.keys().filter(|path| !self.entries.contains_key(*path)));
        for path in paths {
            let name = path.file_name().expect("a name").display();
            match (self.entries.get(path), after.entries.get(path)) {
                (Some(_), None) => found.push(format!("{name} is gone")),
                (None, _) => found.push(format!("{name} has come to be")),
                (Some(before), Some(after)) => {
                    found.extend(
                        before.differences(after).into_iter().map(|what| format!("{name}: {what}")),
                    );
                }
            }
        }
        for (name, count) in &self.counters {
            if after.counters[name] != *count {
                found.push(format!("{name} was {count} and is {}", after.counters[name]));
            }
        }
        found
    }
}

impl Entry {
    fn of(path: &Path) -> Self {
        let stat = fs::symlink_metadata(path).expect("it is there");
        let contents = match stat.file_type() {
            // Leaves a new file unopened.
            kind if kind.is_file() && stat.len() > 0 => subpages(path),
            kind if kind.is_symlink() => {
                vec![fs::read_link(path).expect("a link").into_os_string().into_encoded_bytes()]
            }
            _ => Vec::new(),
        };
        Self {
            mode: stat.mode(),
            owner: (stat.uid(), stat.gid()),
            links: stat.nlink(),
            size: stat.size(),
            blocks: stat.blocks(),
            attributes: attributes(path),
            contents,
        }
    }

    fn differences(&self, after: &Self) -> Vec<String> {
        let mut found = Vec::new();
        let mut compare = |what: &str, before: String, after: String| {
            if before != after {
                found.push(format!("{what} was {before} and is {after}"));
            }
        };
        compare("mode", format!("{:o}", self.mode), format!("{:o}", after.mode));
        compare("owner", format!("{:?}", self.owner), format!("{:?}", after.owner));
        compare("links", self.links.to_string(), after.links.to_string());
        compare("size", self.size.to_string(), after.size.to_string());
        compare("blocks", self.blocks.to_string(), after.blocks.to_string());
        compare("attributes", format!("{:?}", self.attributes), format!("{:?}", after.attributes));
        let both = self.contents.iter().zip(&after.contents);
        let changed = both.enumerate().filter(|(_, (before, after))| before != after);
        let changed: Vec<String> = changed
            .map(|(number, (before, after))| {
                format!("{number} ({:?} is {:?})", before.first(), after.first())
            })
            .collect();
        if let Some(first) = changed.first() {
            found.push(format!("{} subpages have changed, the first is {first}", changed.len()));
        }
        found
    }
}

fn collect(directory: &Path, entries: &mut BTreeMap<PathBuf, Entry>) {
    for entry in fs::read_dir(directory).expect("a directory") {
        let path = entry.expect("an entry").path();
        if path.is_dir() && !path.is_symlink() {
            collect(&path, entries);
        }
        entries.insert(path.clone(), Entry::of(&path));
    }
}

/// The bytes of each subpage. A subpage that cannot be read is empty.
fn subpages(path: &Path) -> Vec<Vec<u8>> {
    let (file, size) = (open(path), fs::metadata(path).expect("it is there").len());
    let mut found = Vec::new();
    let mut piece = vec![0; 1 << 20]; // one request
    while (found.len() as u64) * SUBPAGE < size {
        match file.read_at(&mut piece, found.len() as u64 * SUBPAGE) {
            Ok(length) => {
                found.extend(piece[..length].chunks(SUBPAGE as usize).map(<[u8]>::to_vec))
            }
            Err(_) => found.push(Vec::new()), // this subpage is quarantined: a read ends before it
        }
    }
    found
}

fn attributes(path: &Path) -> BTreeMap<String, String> {
    let mut names = vec![0; 4096];
    let length = rustix::fs::llistxattr(path, &mut names[..]).expect("attributes are listed");
    let names = support::text(&names[..length]);
    let ours = names
        .split_terminator('\0')
        .map(|name| (name.to_owned(), get(path, name).expect("it is listed")));
    ours.collect()
}

/// The counters that a refused change must not move.
fn accounts(pool: &Pool) -> BTreeMap<String, u64> {
    const WHICH: &[&str] = &[
        "pages_total",
        "pages_free",
        "pages_used",
        "pages_reserved",
        "pages_orphaned",
        "orphans",
        "quarantined_soft",
        "quarantined_hw",
        "opened_natively",
    ];
    pool.counters().into_iter().filter(|(name, _)| WHICH.contains(&name.as_str())).collect()
}

// ---- the operations ----------------------------------------------------------------------------

/// A file of three folios of sevens, in a pool of eight.
fn sevens(pool: &Pool) {
    fs::write(file(pool), vec![7; 3 * FOLIO as usize]).unwrap();
}

fn lose_one(pool: &Pool) {
    sevens(pool);
    poison(file(pool), FOLIO + SUBPAGE, SUBPAGE).unwrap();
}

fn keep_punched(pool: &Pool) {
    sevens(pool);
    fallocate(open(&file(pool)), PUNCH, FOLIO, FOLIO).unwrap();
}

const PUNCH: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);
const MEDIATED: &str = "io=mediated";
const NATIVE: &str = "io=native";
const KEEP: &str = "io=mediated,punch=keep";

/// Asserts the runs of bytes from the start of the file to its end.
fn assert_runs(pool: &Pool, runs: &[(u64, u8)]) {
    let (bytes, mut meant) = (fs::read(file(pool)).unwrap(), Vec::new());
    runs.iter().for_each(|(length, byte)| meant.resize(meant.len() + *length as usize, *byte));
    let found = || {
        bytes.chunk_by(|one, next| one == next).map(|run| (run.len(), run[0])).collect::<Vec<_>>()
    };
    assert!(bytes == meant, "{:?} are not {runs:?}", found());
}

fn assert_sevens(pool: &Pool) {
    assert_runs(pool, &[(3 * FOLIO, 7)]);
}

fn assert_free(pool: &Pool, pages: u64) {
    assert_eq!(pool.free_pages(), pages);
}

/// Polls with a short timeout, so that the daemon notes that it must wake the caller. The kernel
/// turns any error of the daemon into POLLERR.
fn poll_for_a_quarantine(file: &File) -> Result<(), Errno> {
    let mut fds = [PollFd::new(file, PollFlags::PRI)];
    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 1 }))?;
    if fds[0].revents().contains(PollFlags::ERR) { Err(Errno::NOMEM) } else { Ok(()) }
}

const OPERATIONS: &[Operation] = &[
    Operation {
        name: "create",
        options: MEDIATED,
        prepare: |_| {},
        change: |stage| {
            File::options()
                .read(true)
                .write(true)
                .create_new(true)
                .open(stage.path())
                .map(drop)
                .map_err(errno)
        },
        verify: |pool| {
            assert_runs(pool, &[]);
            fs::write(file(pool), [7; 5000]).unwrap();
            assert_runs(pool, &[(5000, 7)]);
        },
    },
    Operation {
        name: "create below a directory with a placement",
        options: MEDIATED,
        prepare: |pool| {
            fs::create_dir(other(pool)).unwrap();
            set(other(pool), PLACEMENT, "strict:bind:0").unwrap();
        },
        change: |stage| File::create_new(stage.other().join("file")).map(drop).map_err(errno),
        verify: |pool| {
            let inherited = get(other(pool).join("file"), PLACEMENT);
            assert_eq!(inherited.unwrap(), "strict:bind:0\n");
        },
    },
    Operation {
        name: "ask for NUMA nodes",
        options: MEDIATED,
        prepare: sevens,
        change: |stage| set(stage.path(), PLACEMENT, "local"),
        verify: |pool| assert!(get(file(pool), PLACEMENT).unwrap().starts_with("local\n")),
    },
    Operation {
        name: "ask for no NUMA nodes any more",
        options: MEDIATED,
        prepare: |pool| {
            sevens(pool);
            set(file(pool), PLACEMENT, "local").unwrap();
        },
        change: |stage| rustix::fs::removexattr(stage.path(), PLACEMENT),
        verify: |pool| assert!(get(file(pool), PLACEMENT).unwrap().starts_with("caller\n")),
    },
    Operation {
        name: "make a node and open it",
        options: MEDIATED,
        prepare: |pool| {
            rustix::fs::mknodat(
                CWD,
                other(pool),
                FileType::RegularFile,
                Mode::from_raw_mode(0o600),
                0,
            )
            .unwrap();
        },
        change: |stage| {
            File::options().read(true).write(true).open(stage.other()).map(drop).map_err(errno)
        },
        verify: |pool| fs::write(other(pool), [7; 5000]).unwrap(),
    },
    Operation {
        name: "open for reading natively, and close",
        options: NATIVE,
        prepare: sevens,
        change: |stage| {
            drop(File::open(stage.path()).map_err(errno)?);
            let is_closed = || stage.pool.counter("opened_natively") == 0;
            limits::until(limits::ANSWER, "the end of a native reader", is_closed); // close(2) does not wait
            Ok(())
        },
        verify: assert_sevens,
    },
    Operation {
        name: "unlink",
        options: MEDIATED,
        prepare: sevens,
        change: |stage| fs::remove_file(stage.path()).map_err(errno),
        verify: |pool| assert_eq!(fs::read_dir(pool.path()).unwrap().count(), 0),
    },
    Operation {
        name: "unlink and close, which erases",
        options: MEDIATED,
        prepare: sevens,
        change: |stage| {
            fs::remove_file(stage.path()).map_err(errno)?;
            stage.open = None;
            // Looks at the daemon's own directory, as a request of this test would be one whose
            // calls are counted.
            let objects = format!("/proc/{}/root/objects", stage.pool.daemon().pid);
            let is_empty = || fs::read_dir(&objects).expect("the daemon runs").next().is_none();
            limits::until(limits::ANSWER, "the end of a file without a name", is_empty);
            Ok(())
        },
        verify: |pool| fs::write(file(pool), vec![7; (PAGES * FOLIO) as usize]).unwrap(),
    },
    Operation {
        name: "unlink one of two names",
        options: MEDIATED,
        prepare: |pool| {
            sevens(pool);
            fs::hard_link(file(pool), other(pool)).unwrap();
        },
        change: |stage| fs::remove_file(stage.other()).map_err(errno),
        verify: assert_sevens,
    },
    Operation {
        name: "link",
        options: MEDIATED,
        prepare: sevens,
        change: |stage| fs::hard_link(stage.path(), stage.other()).map_err(errno),
        verify: |pool| assert_eq!(fs::metadata(other(pool)).unwrap().nlink(), 2),
    },
    Operation {
        name: "rename",
        options: MEDIATED,
        prepare: sevens,
        change: |stage| fs::rename(stage.path(), stage.other()).map_err(errno),
        verify: |pool| assert!(!file(pool).exists() && other(pool).exists()),
    },
    Operation {
        name: "rename over a file",
        options: MEDIATED,
        prepare: |pool| {
            sevens(pool);
            fs::write(other(pool), "other").unwrap();
        },
        change: |stage| fs::rename(stage.other(), stage.path()).map_err(errno),
        verify: |pool| assert_eq!(fs::read(file(pool)).unwrap(), b"other"),
    },
    Operation {
        name: "rename over a directory",
        options: MEDIATED,
        prepare: |pool| {
            ["one", "two"].iter().for_each(|name| fs::create_dir(pool.join(name)).unwrap())
        },
        change: |stage| fs::rename(stage.pool.join("one"), stage.pool.join("two")).map_err(errno),
        verify: |pool| assert_eq!(fs::read_dir(pool.path()).unwrap().count(), 1),
    },
    Operation {
        name: "exchange",
        options: MEDIATED,
        prepare: |pool| {
            sevens(pool);
            fs::create_dir(other(pool)).unwrap();
        },
        change: |stage| renameat_with(CWD, stage.path(), CWD, stage.other(), RenameFlags::EXCHANGE),
        verify: |pool| assert!(file(pool).is_dir() && other(pool).is_file()),
    },
    Operation {
        name: "mkdir",
        options: MEDIATED,
        prepare: |_| {},
        change: |stage| fs::create_dir(stage.other()).map_err(errno),
        verify: |pool| assert!(other(pool).is_dir()),
    },
    Operation {
        name: "rmdir",
        options: MEDIATED,
        prepare: |pool| fs::create_dir(other(pool)).unwrap(),
        change: |stage| fs::remove_dir(stage.other()).map_err(errno),
        verify: |pool| assert!(!other(pool).exists()),
    },
    Operation {
        name: "symlink",
        options: MEDIATED,
        prepare: |_| {},
        change: |stage| std::os::unix::fs::symlink("target", stage.other()).map_err(errno),
        verify: |pool| assert_eq!(fs::read_link(other(pool)).unwrap(), Path::new("target")),
    },
    Operation {
        name: "chown",
        options: MEDIATED,
        prepare: sevens,
        change: |stage| {
            std::os::unix::fs::chown(stage.path(), Some(1000), Some(1000)).map_err(errno)
        },
        verify: |pool| assert_eq!(fs::metadata(file(pool)).unwrap().uid(), 1000),
    },
    Operation {
        name: "chmod",
        options: MEDIATED,
        prepare: sevens,
        change: |stage| rustix::fs::chmod(stage.path(), Mode::from_raw_mode(0o640)),
        verify: |pool| assert_eq!(fs::metadata(file(pool)).unwrap().mode() & 0o7777, 0o640),
    },
    Operation {
        name: "set an attribute that must not be there",
        options: MEDIATED,
        prepare: sevens,
        change: |stage| {
            rustix::fs::setxattr(stage.path(), "user.color", b"blue", XattrFlags::CREATE)
        },
        verify: |pool| assert_eq!(get(file(pool), "user.color").unwrap(), "blue"),
    },
    Operation {
        name: "remove an attribute",
        options: MEDIATED,
        prepare: |pool| {
            sevens(pool);
            set(file(pool), "user.color", "blue").unwrap();
        },
        change: |stage| rustix::fs::removexattr(stage.path(), "user.color"),
        verify: |pool| assert_eq!(get(file(pool), "user.color"), Err(Errno::NODATA)),
    },
    Operation {
        name: "write in place",
        options: MEDIATED,
        prepare: sevens,
        change: |stage| stage.write(SUBPAGE, FOLIO),
        verify: |pool| assert_runs(pool, &[(FOLIO, 7), (SUBPAGE, 9), (2 * FOLIO - SUBPAGE, 7)]),
    },
    Operation {
        name: "append within a folio",
        options: MEDIATED,
        prepare: |pool| fs::write(file(pool), [7; 5000]).unwrap(),
        change: |stage| stage.write(100, 5050),
        verify: |pool| assert_runs(pool, &[(5000, 7), (50, 0), (100, 9)]),
    },
    Operation {
        name: "write behind the end",
        options: MEDIATED,
        prepare: |pool| fs::write(file(pool), [7; 5000]).unwrap(),
        change: |stage| stage.write(SUBPAGE, 2 * FOLIO),
        verify: |pool| {
            assert_runs(pool, &[(5000, 7), (2 * FOLIO - 5000, 0), (SUBPAGE, 9)]);
            assert_free(pool, 5);
        },
    },
    Operation {
        name: "write into a released page",
        options: MEDIATED,
        prepare: keep_punched,
        change: |stage| stage.write(SUBPAGE, FOLIO),
        verify: |pool| {
            assert_runs(pool, &[(FOLIO, 7), (SUBPAGE, 9), (FOLIO - SUBPAGE, 0), (FOLIO, 7)]);
            assert_free(pool, 5);
        },
    },
    Operation {
        name: "grow",
        options: MEDIATED,
        prepare: |pool| fs::write(file(pool), [7; 5000]).unwrap(),
        change: |stage| stage.resize(5 * FOLIO + 17),
        verify: |pool| {
            assert_runs(pool, &[(5000, 7), (5 * FOLIO + 17 - 5000, 0)]);
            assert_free(pool, 2);
        },
    },
    Operation {
        name: "shrink",
        options: MEDIATED,
        prepare: sevens,
        change: |stage| stage.resize(FOLIO + 5000),
        verify: |pool| {
            assert_runs(pool, &[(FOLIO + 5000, 7)]);
            assert_free(pool, 6);
        },
    },
    Operation {
        name: "shrink over a quarantine",
        options: MEDIATED,
        prepare: lose_one,
        change: |stage| stage.resize(FOLIO),
        verify: |pool| {
            assert_runs(pool, &[(FOLIO, 7)]);
            assert_free(pool, 7);
        },
    },
    Operation {
        name: "extend",
        options: MEDIATED,
        prepare: sevens,
        change: |stage| stage.allocate(FallocateFlags::empty(), 3 * FOLIO, 100),
        verify: |pool| {
            assert_runs(pool, &[(3 * FOLIO, 7), (100, 0)]);
            assert_free(pool, 4);
        },
    },
    Operation {
        name: "allocate behind the end",
        options: MEDIATED,
        prepare: sevens,
        change: |stage| stage.allocate(FallocateFlags::KEEP_SIZE, 3 * FOLIO, 2 * FOLIO),
        verify: |pool| {
            assert_sevens(pool);
            assert_free(pool, 3);
        },
    },
    Operation {
        name: "allocate what was released",
        options: MEDIATED,
        prepare: keep_punched,
        change: |stage| stage.allocate(FallocateFlags::KEEP_SIZE, 0, 3 * FOLIO),
        verify: |pool| {
            assert_runs(pool, &[(FOLIO, 7), (FOLIO, 0), (FOLIO, 7)]);
            assert_free(pool, 5);
        },
    },
    Operation {
        name: "punch a page and parts of others",
        options: MEDIATED,
        prepare: sevens,
        change: |stage| stage.allocate(PUNCH, FOLIO - 5000, FOLIO + 10000),
        verify: |pool| {
            assert_runs(pool, &[(FOLIO - 5000, 7), (FOLIO + 10000, 0), (FOLIO - 5000, 7)]);
            assert_free(pool, 6);
        },
    },
    Operation {
        name: "punch over a quarantine",
        options: MEDIATED,
        prepare: lose_one,
        change: |stage| stage.allocate(PUNCH, FOLIO, FOLIO),
        verify: |pool| {
            assert_runs(pool, &[(FOLIO, 7), (FOLIO, 0), (FOLIO, 7)]);
            assert_free(pool, 6);
        },
    },
    Operation {
        name: "zero",
        options: MEDIATED,
        prepare: sevens,
        change: |stage| stage.allocate(FallocateFlags::ZERO_RANGE, FOLIO, 3 * FOLIO),
        verify: |pool| {
            assert_runs(pool, &[(FOLIO, 7), (3 * FOLIO, 0)]);
            assert_free(pool, 4);
        },
    },
    Operation {
        name: "punch and keep",
        options: KEEP,
        prepare: sevens,
        change: |stage| stage.allocate(PUNCH, FOLIO, FOLIO),
        verify: |pool| {
            assert_runs(pool, &[(FOLIO, 7), (FOLIO, 0), (FOLIO, 7)]);
            assert_free(pool, 5);
        },
    },
    Operation {
        name: "allocate what was punched and kept",
        options: KEEP,
        prepare: keep_punched,
        change: |stage| stage.allocate(FallocateFlags::KEEP_SIZE, 0, 3 * FOLIO),
        verify: |pool| {
            assert_runs(pool, &[(FOLIO, 7), (FOLIO, 0), (FOLIO, 7)]);
            assert_eq!(pool.counter("punched_bytes"), 0);
        },
    },
    Operation {
        name: "quarantine",
        options: MEDIATED,
        prepare: sevens,
        change: |stage| set(stage.path(), POISON, format!("{} {SUBPAGE}", FOLIO + SUBPAGE)),
        verify: |pool| {
            assert_eq!(pool.counter("quarantined_soft"), 1);
            set(file(pool), REPAIR, "salvage all").unwrap();
            assert_sevens(pool);
        },
    },
    Operation {
        name: "repair with zeros",
        options: MEDIATED,
        prepare: lose_one,
        change: |stage| set(stage.path(), REPAIR, "zero all"),
        verify: |pool| {
            assert_runs(pool, &[(FOLIO + SUBPAGE, 7), (SUBPAGE, 0), (2 * FOLIO - 2 * SUBPAGE, 7)]);
        },
    },
    Operation {
        name: "salvage",
        options: MEDIATED,
        prepare: lose_one,
        change: |stage| set(stage.path(), REPAIR, "salvage all"),
        verify: assert_sevens,
    },
    Operation {
        name: "repair by a write",
        options: MEDIATED,
        prepare: lose_one,
        change: |stage| stage.write(3 * SUBPAGE, FOLIO),
        verify: |pool| {
            assert_runs(pool, &[(FOLIO, 7), (3 * SUBPAGE, 9), (2 * FOLIO - 3 * SUBPAGE, 7)])
        },
    },
    Operation {
        name: "collapse",
        options: MEDIATED,
        prepare: sevens,
        change: |stage| set(stage.path(), COLLAPSE, "all"),
        verify: assert_sevens,
    },
    Operation {
        name: "open the memory",
        options: MEDIATED,
        prepare: sevens,
        change: |stage| open_memory(stage.path()).map(drop),
        verify: |pool| {
            await_shut(file(pool));
            assert_sevens(pool);
        },
    },
    Operation {
        name: "enlarge the pool",
        options: MEDIATED,
        prepare: sevens,
        change: |stage| set(stage.pool.path(), SIZE_OF_POOL, (12 * FOLIO).to_string()),
        verify: |pool| {
            assert_free(pool, 9);
            set(pool.path(), SIZE_OF_POOL, (PAGES * FOLIO).to_string()).unwrap();
        },
    },
    Operation {
        name: "reduce the pool",
        options: MEDIATED,
        prepare: sevens,
        change: |stage| set(stage.pool.path(), SIZE_OF_POOL, (4 * FOLIO).to_string()),
        verify: |pool| {
            assert_free(pool, 1);
            set(pool.path(), SIZE_OF_POOL, (PAGES * FOLIO).to_string()).unwrap();
        },
    },
    Operation {
        name: "resize the part of a node",
        options: MEDIATED,
        prepare: sevens,
        change: |stage| set(stage.pool.path(), SIZE_OF_POOL, format!("0:{}", 12 * FOLIO)),
        verify: |pool| {
            assert_free(pool, 9);
            set(pool.path(), SIZE_OF_POOL, format!("0:{}", PAGES * FOLIO)).unwrap();
        },
    },
    Operation {
        name: "poll for a quarantine",
        options: MEDIATED,
        prepare: sevens,
        change: |stage| poll_for_a_quarantine(stage.file()),
        verify: assert_sevens,
    },
    Operation {
        name: "copy a range",
        options: MEDIATED,
        prepare: |pool| {
            sevens(pool);
            fs::write(other(pool), [9; 5000]).unwrap();
        },
        change: |stage| {
            let (from, mut place, mut left) = (open(&stage.other()), FOLIO, 5000);
            while left > 0 {
                left -=
                    rustix::fs::copy_file_range(&from, None, stage.file(), Some(&mut place), left)?;
            }
            Ok(())
        },
        verify: |pool| assert_runs(pool, &[(FOLIO, 7), (5000, 9), (2 * FOLIO - 5000, 7)]),
    },
];

// ---- the trials --------------------------------------------------------------------------------

fn mount(options: &str) -> Pool {
    Pool::mount(&format!("pagesize=2M,size={},{options}", PAGES * FOLIO))
}

/// Empties the pool and prepares the operation.
fn set_stage<'a>(pool: &'a Pool, operation: &Operation) -> Stage<'a> {
    for entry in fs::read_dir(pool.path()).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            fs::remove_dir_all(path).unwrap()
        } else {
            fs::remove_file(path).unwrap()
        }
    }
    wait_for_oblivion(pool);
    (operation.prepare)(pool);
    Stage { pool, open: file(pool).is_file().then(|| open(&file(pool))) }
}

/// Waits until the kernel has forgotten all files, which it does only after unlink(2) has returned.
fn wait_for_oblivion(pool: &Pool) {
    pool.wait_for_orphans();
    pool.wait_for_free_pages(PAGES);
}

/// Makes system calls of a pool's daemon fail, through a descriptor that causes no other request to
/// the daemon.
struct Failures(OwnedFd);

impl Failures {
    fn of(pool: &Pool) -> Self {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        Self(rustix::fs::open(pool.path(), flags, Mode::empty()).expect("the root can be opened"))
    }

    fn arm(&self, nth: u64, error: &str) {
        let value = format!("{nth} {error}");
        rustix::fs::fsetxattr(&self.0, FAIL, value.as_bytes(), XattrFlags::empty())
            .expect("a worker that was built for tests");
    }

    /// The place of the call that failed. `None` where the operation made too few calls.
    fn place(&self) -> Option<String> {
        let mut value = [0; 256];
        let length = rustix::fs::fgetxattr(&self.0, FAIL, &mut value[..]).expect("a report");
        support::text(&value[..length]).strip_prefix("failed ").map(|place| place.trim().to_owned())
    }
}

/// The number of calls that failed, and the number of operations that were refused for that.
#[derive(Default)]
struct Tally {
    failures: u64,
    refusals: u64,
}

/// Makes the `nth` call that can answer `error` fail. Returns false where there is no such call. An
/// error tells of a wrong outcome.
fn fail_one(
    pool: &Pool,
    operation: &Operation,
    nth: u64,
    error: &str,
    tally: &mut Tally,
) -> Result<bool, String> {
    let mut stage = set_stage(pool, operation);
    let failures = Failures::of(pool);
    let before = Snapshot::of(pool);
    failures.arm(nth, error);
    let result = (operation.change)(&mut stage);
    let place = failures.place();
    let case = format!(
        "{}: {error} of call {nth} ({})",
        operation.name,
        place.as_deref().unwrap_or("none")
    );
    let mut wrong = before_and_after(&before, pool, result);
    if result.is_err() {
        tally.refusals += 1;
        if let Err(again) = (operation.change)(&mut stage) {
            wrong.push(format!("refused for good: {again}"));
        }
    }
    tally.failures += u64::from(place.is_some());
    if place.is_none() && result.is_err() {
        wrong.push("refused though nothing failed".to_owned());
    }
    if !wrong.is_empty() {
        return Err(format!("{case}: {}", wrong.join("; ")));
    }
    if std::panic::catch_unwind(|| (operation.verify)(pool)).is_err() {
        return Err(format!("{case}: it has not done what it should"));
    }
    Ok(place.is_some())
}

/// The wrong outcomes of an operation, apart from its own result.
fn before_and_after(before: &Snapshot, pool: &Pool, result: Result<(), Errno>) -> Vec<String> {
    let mut wrong = Vec::new();
    if let Err(errno) = result {
        wrong.extend(
            before
                .differences(&Snapshot::of(pool))
                .iter()
                .map(|what| format!("{errno}, but {what}")),
        );
    }
    let found = get(pool.path(), support::CHECK).expect("the check attribute");
    wrong.extend(found.lines().map(|line| format!("check: {line}")));
    wrong
}

/// Pools for operations that are tried one after the other, by mount options. They are mounted
/// before any operation is tried: a new process has all descriptors of this test until it executes
/// its program.
struct Lane(BTreeMap<&'static str, Pool>);

impl Lane {
    fn new() -> Self {
        Self(
            [MEDIATED, NATIVE, KEEP].into_iter().map(|options| (options, mount(options))).collect(),
        )
    }

    /// Fails each call of an operation once. Returns the wrong outcomes.
    fn fail_each(&mut self, operation: &Operation) -> Vec<String> {
        let (mut tally, mut wrong) = (Tally::default(), Vec::new());
        for error in ERRORS {
            for nth in 1..MOST_CALLS {
                match fail_one(&self.0[operation.options], operation, nth, error, &mut tally) {
                    Ok(true) => {}
                    Ok(false) => break,
                    Err(what) => {
                        println!("wrong: {what}");
                        wrong.push(what);
                        // The old pool may be damaged.
                        self.0.insert(operation.options, mount(operation.options));
                    }
                }
            }
        }
        println!(
            "{}: {} calls failed, {} refusals",
            operation.name, tally.failures, tally.refusals
        );
        assert!(tally.failures > 0, "{}: nothing can fail there", operation.name);
        wrong
    }

    fn fail_each_of<'a>(&mut self, operations: impl Iterator<Item = &'a Operation>) -> Vec<String> {
        operations.flat_map(|operation| self.fail_each(operation)).collect()
    }
}

#[test]
fn a_refused_change_has_changed_nothing() {
    let mut lanes = [Lane::new(), Lane::new()];
    let next = AtomicUsize::new(0);
    let operations = || std::iter::from_fn(|| OPERATIONS.get(next.fetch_add(1, Ordering::Relaxed)));
    let wrong: Vec<String> = std::thread::scope(|scope| {
        let threads =
            lanes.each_mut().map(|lane| scope.spawn(move || lane.fail_each_of(operations())));
        threads
            .into_iter()
            .flat_map(|thread| thread.join().expect("what is wrong is returned"))
            .collect()
    });
    assert!(
        wrong.is_empty(),
        "{} failures have changed something:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
    lanes.into_iter().flat_map(|lane| lane.0.into_values()).for_each(Pool::unmount);
}
