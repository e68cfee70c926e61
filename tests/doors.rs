//! Programs that have the memory of a file open by themselves, as a file on tmpfs: the things that
//! they can do, and those that stay out of their reach.

mod support;

use rustix::fs::{FallocateFlags, fallocate, fstatfs};
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use support::{
    CHECK, COLLAPSE, FOLIO, OPEN, Pool, REPAIR, SUBPAGE, Toucher, await_shut, get, hugetlb2,
    kill_worker, limits, open_memory, poison, run, set, status_and_error,
};

const PAGES: u64 = 12;
const FILE: u64 = 4;
const TMPFS: i64 = 0x0102_1994;
const NOBODY: u32 = 65534;
const PUNCH: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);

/// A pool with a file of sevens, and another one of nines.
fn pool(options: &str) -> (Pool, PathBuf) {
    let pool = Pool::mount(&format!("pagesize=2M,size={},{options}", PAGES * FOLIO));
    fs::write(pool.join("file"), vec![7; (FILE * FOLIO) as usize]).unwrap();
    fs::write(pool.join("other"), vec![9; (FILE * FOLIO) as usize]).unwrap();
    let path = pool.join("file");
    (pool, path)
}

fn resize(path: &Path, size: u64) -> std::io::Result<()> {
    File::options().write(true).open(path)?.set_len(size)
}

/// The number of bytes of the other file that are not as they were written.
fn foreign(pool: &Pool) -> usize {
    fs::read(pool.join("other")).unwrap().iter().filter(|byte| **byte != 9).count()
}

fn assert_whole(pool: &Pool, path: &Path) {
    assert_eq!(fs::metadata(path).unwrap().size(), FILE * FOLIO);
    assert_eq!(Toucher::mapping(path, FILE * FOLIO).walk(), [], "each subpage has memory");
    assert_eq!(pool.free_pages(), PAGES - 2 * FILE);
    assert_eq!(pool.counter("punched_bytes"), 0);
    assert_eq!(foreign(pool), 0);
    pool.check();
}

#[test]
fn a_program_has_the_memory_of_a_file_open() {
    let (pool, path) = pool("io=auto");
    let mut mapper = Toucher::mapping(&path, FILE * FOLIO);
    let memory = open_memory(&path).unwrap();
    assert_eq!(fstatfs(&memory).unwrap().f_type, TMPFS);
    assert_eq!(memory.metadata().unwrap().size(), FILE * FOLIO);
    memory.write_all_at(&[8; 100], 5000).unwrap();
    assert_eq!(mapper.load(5050), Some(8), "it is the memory that others map");
    assert_eq!(fs::read(&path).unwrap()[5000..5100], [8; 100]);
    let file = File::options().write(true).open(&path).unwrap();
    file.write_all_at(&[6; 100], FOLIO).unwrap();
    let mut bytes = [0; 100];
    memory.read_exact_at(&mut bytes, FOLIO).unwrap();
    assert_eq!(bytes, [6; 100]);
    // A second one, and the first goes.
    let second = open_memory(&path).unwrap();
    drop(memory);
    assert_eq!(get(&path, OPEN).unwrap(), "open\n");
    drop(second);
    // A change that finds it closed need not wait.
    limits::until(limits::ANSWER, "a change", || resize(&path, FOLIO).is_ok());
    assert_eq!(get(&path, OPEN), Err(Errno::NODATA));
    resize(&path, FILE * FOLIO).unwrap();
    drop((mapper, file));
    assert_whole(&pool, &path);
    pool.unmount();
}

#[test]
fn nothing_changes_a_file_whose_memory_is_open() {
    let (pool, path) = pool("io=auto");
    let memory = open_memory(&path).unwrap();
    let busy = |what: &str, result: Result<(), Errno>| {
        assert_eq!(result, Err(Errno::BUSY), "{what}");
    };
    let errno = |result: std::io::Result<()>| result.map_err(|e| Errno::from_io_error(&e).unwrap());
    let file = File::options().write(true).open(&path).unwrap();
    busy("shrink", errno(file.set_len(FOLIO)));
    busy("grow", errno(file.set_len(5 * FOLIO)));
    busy("append", errno(file.write_all_at(&[1], FILE * FOLIO)));
    busy("punch", fallocate(&file, PUNCH, 0, FOLIO));
    busy("extend", fallocate(&file, FallocateFlags::empty(), FILE * FOLIO, FOLIO));
    busy("quarantine", poison(&path, 0, SUBPAGE));
    assert_eq!(set(&path, REPAIR, "zero all"), Err(Errno::BUSY));
    set(&path, COLLAPSE, "all").unwrap();
    let (status, said) = status_and_error(hugetlb2().arg("poison").arg(&path).args(["0", "4096"]));
    assert!(status == 1 && said.contains("hugetlb2 open"), "{said}");
    pool.check();
    // A mapping holds it, too.
    let mapping = hugetlb2fs::sys::mapping::View::new(&memory, FOLIO).unwrap();
    drop(memory);
    busy("quarantine", poison(&path, 0, SUBPAGE));
    drop(mapping);
    limits::until(limits::ANSWER, "a quarantine", || poison(&path, 0, SUBPAGE).is_ok());
    // A read(2) of the memory would deliver zeros.
    assert_eq!(open_memory(&path).unwrap_err(), Errno::BUSY);
    set(&path, REPAIR, "salvage all").unwrap();
    drop((file, open_memory(&path).unwrap()));
    await_shut(&path);
    assert_whole(&pool, &path);
    pool.unmount();
}

#[test]
fn only_a_file_of_whole_folios_with_all_of_its_memory_is_opened() {
    let (pool, path) = pool("io=auto");
    for size in [0, 5000, 3 * FOLIO + SUBPAGE] {
        resize(&path, size).unwrap();
        assert_eq!(open_memory(&path).unwrap_err(), Errno::INVAL, "{size}");
    }
    resize(&path, FILE * FOLIO).unwrap();
    fallocate(File::options().write(true).open(&path).unwrap(), PUNCH, FOLIO, FOLIO).unwrap();
    assert_eq!(open_memory(&path).unwrap_err(), Errno::INVAL, "a released page");
    resize(&path, 0).unwrap();
    resize(&path, FILE * FOLIO).unwrap();
    for value in ["", "x", "-1", "4000000000", "1000000"] {
        assert_eq!(set(&path, OPEN, value), Err(Errno::INVAL), "{value:?}");
    }
    let no_socket = File::open("/dev/null").unwrap();
    assert_eq!(set(&path, OPEN, no_socket.as_raw_fd().to_string()), Err(Errno::INVAL));
    // One message at a time, so that no caller makes the daemon open files without end.
    let (_own, daemons) = UnixStream::pair().unwrap();
    let number = daemons.as_raw_fd().to_string();
    set(&path, OPEN, &number).unwrap();
    assert_eq!(set(&path, OPEN, &number), Err(Errno::BUSY));
    let alone = UnixStream::pair().unwrap().0;
    assert_eq!(set(&path, OPEN, alone.as_raw_fd().to_string()), Err(Errno::PIPE));
    drop((_own, daemons));
    await_shut(&path);
    assert_whole(&pool, &path);
    pool.unmount();
}

/// Does all that a file on tmpfs lets a holder do.
fn spoil(memory: &File, round: u64) {
    let keep = FallocateFlags::KEEP_SIZE;
    let _ = memory.set_len(round % (2 * FILE) * FOLIO + round % 3 * SUBPAGE);
    let _ = fallocate(memory, keep, round % PAGES * FOLIO, FOLIO); // also behind the end
    let _ = fallocate(memory, PUNCH, round % FILE * FOLIO, FOLIO / 2);
    let _ = memory.write_at(&[0xbb; 100], round % (2 * PAGES) * FOLIO);
    let _ = memory.set_len(FILE * FOLIO * 1000);
    let _ = memory.write_at(&[0xbb; 100], FILE * FOLIO * 999);
}

/// A thread that does so until this is dropped.
struct Spoiling(Arc<AtomicBool>, Option<JoinHandle<()>>);

impl Spoiling {
    fn start(memory: File) -> Self {
        let has_ended = Arc::new(AtomicBool::new(false));
        let is_told = has_ended.clone();
        let spoil = move || {
            let rounds = (0..).take_while(|_| !is_told.load(Ordering::Relaxed));
            rounds.for_each(|round| spoil(&memory, round));
        };
        Self(has_ended, Some(std::thread::spawn(spoil)))
    }
}

impl Drop for Spoiling {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
        self.1.take().expect("it is dropped once").join().expect("it does not panic");
    }
}

#[test]
fn a_hostile_holder_spoils_its_own_file_only() {
    for options in ["io=auto", "io=native", "punch=keep", "clear=ahead"] {
        let (pool, path) = pool(options);
        let memory = open_memory(&path).unwrap();
        let spoiling = Spoiling::start(memory.try_clone().unwrap());
        for _ in 0..3 {
            assert_eq!(foreign(&pool), 0, "{options}");
            // A read of what the holder cuts off at this moment can fail. tmpfs itself serves a
            // native reader, with the size that the holder has made.
            match fs::read(&path) {
                Err(error) => assert_eq!(Errno::from_io_error(&error), Some(Errno::IO)),
                Ok(bytes) if options == "io=native" => drop(bytes),
                Ok(bytes) => assert!(bytes.len() as u64 <= FILE * FOLIO, "{options}"),
            }
            let _ = fs::write(pool.join("more"), vec![9; (FILE * FOLIO) as usize]);
            assert_eq!(fs::metadata(&path).unwrap().size(), FILE * FOLIO);
            kill_worker(&pool);
            fs::remove_file(pool.join("more")).unwrap();
            pool.wait_for_orphans();
        }
        drop(spoiling);
        memory.set_len(SUBPAGE).unwrap();
        let said = get(pool.path(), CHECK).unwrap();
        assert!(said.contains("has made 4096 bytes of 8388608"), "{options}: {said:?}");
        drop(memory);
        await_shut(&path);
        if options == "punch=keep" {
            assert!(pool.counter("punched_bytes") > 0, "gaps stay for the next touch");
        } else {
            assert_eq!(pool.counter("punched_bytes"), 0);
        }
        assert_eq!(Toucher::mapping(&path, FILE * FOLIO).walk(), []);
        assert_whole(&pool, &path);
        fs::write(pool.join("more"), vec![9; (FILE * FOLIO) as usize]).unwrap();
        pool.check();
        pool.unmount();
    }
}

#[test]
fn the_memory_of_a_removed_file_is_its_holders_to_the_end() {
    let (pool, path) = pool("io=auto");
    let memory = open_memory(&path).unwrap();
    fs::remove_file(&path).unwrap();
    pool.wait_for_orphans();
    fs::write(pool.join("more"), vec![9; (FILE * FOLIO) as usize]).unwrap();
    assert!(resize(&pool.join("more"), 2 * FILE * FOLIO).is_err(), "the holder has those pages");
    kill_worker(&pool);
    let mut bytes = vec![0; (FILE * FOLIO) as usize];
    memory.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes.iter().all(|byte| *byte == 7));
    pool.check();
    drop(memory);
    pool.wait_for_free_pages(PAGES - 2 * FILE);
    resize(&pool.join("more"), 2 * FILE * FOLIO).unwrap();
    assert_eq!(foreign(&pool), 0);
    pool.check();
    pool.unmount();
}

/// A command by a user who is not root.
fn as_nobody(command: &[&str]) -> Command {
    let mut all = Command::new("setpriv");
    all.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "--inh-caps=-all", "--"]);
    all.args(command);
    all
}

#[test]
fn a_user_opens_what_the_user_may_write_and_gets_no_more_than_memory() {
    let (pool, path) = pool("io=auto");
    fs::set_permissions(pool.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let file = path.to_str().unwrap();
    let program = hugetlb2().get_program().to_str().unwrap().to_owned();
    let open =
        |script: &str| as_nobody(&[&program, "open", file, "--fd", "9", "--", "sh", "-c", script]);
    let (status, said) = status_and_error(&mut open("true"));
    assert!(status == 1 && said.contains("Permission denied"), "{said}");
    chown(&path, Some(NOBODY), Some(NOBODY)).unwrap();
    run(&mut open("printf bytes >&9"));
    await_shut(&path);
    assert_eq!(&fs::read(&path).unwrap()[..6], b"bytes\x07");
    // The inode is root's.
    for attempt in [
        "true <>/dev/fd/9",
        "chmod 777 /dev/fd/9",
        "chown 65534 /dev/fd/9",
        "setfattr -n user.a -v b /dev/fd/9",
        "setfacl -m u:65534:rwx /dev/fd/9",
        "touch -d 2001-01-01 /dev/fd/9",
        "ln -L /dev/fd/9 /tmp/hugetlb2-link",
    ] {
        let (status, said) = status_and_error(&mut open(attempt));
        assert!(status != 0, "{attempt}: {said}");
    }
    await_shut(&path);
    assert_whole(&pool, &path);
    pool.unmount();
}

#[test]
fn a_program_runs_with_the_memory_as_a_descriptor() {
    let (pool, path) = pool("io=auto");
    let file = path.to_str().unwrap();
    let bytes = run(hugetlb2().args(["open", file, "--", "stat", "-Lf", "-c", "%T", "/dev/fd/3"]));
    assert_eq!(bytes, "tmpfs\n");
    // The pool is not unmounted meanwhile.
    let mut reader = hugetlb2();
    let mut reader = reader.args(["open", file, "--", "cat"]);
    reader = reader.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut reader = reader.spawn().unwrap();
    let mut echo = [0];
    reader.stdin.as_mut().unwrap().write_all(b"x").unwrap();
    reader.stdout.as_mut().unwrap().read_exact(&mut echo).unwrap();
    assert_eq!(pool.counter("memory_open"), 1);
    assert_eq!(unmount(pool.path(), UnmountFlags::empty()), Err(Errno::BUSY));
    drop(reader.stdin.take());
    assert!(limits::exit(limits::PROGRAM, "cat", &mut reader).success());
    let mut in_use = hugetlb2();
    let (status, said) = status_and_error(in_use.args(["open", file, "--fd", "1", "--", "true"]));
    assert!(status == 1 && said.contains("descriptor 1"), "{said}");
    let mut missing = hugetlb2();
    let (status, said) = status_and_error(missing.args(["open", file, "--", "/no/program"]));
    assert!(status == 1 && said.contains("/no/program"), "{said}");
    let mut elsewhere = hugetlb2();
    let (status, said) = status_and_error(elsewhere.args(["open", "/etc/passwd", "--", "true"]));
    assert!(status == 1 && said.contains("/etc/passwd"), "{said}");
    await_shut(&path);
    assert_whole(&pool, &path);
    pool.unmount();
}
