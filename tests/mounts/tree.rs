//! The directory tree: the promises of POSIX for names, owners, modes, times, links and attributes.

use crate::support;
use crate::support::{FOLIO, Pool, get, run, set};
use rustix::fs::{
    AtFlags, CWD, Dev, FileType, Gid, Mode, OFlags, RawDir, RenameFlags, SeekFrom, Stat, StatFs,
    Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, Uid, XattrFlags, makedev, mkdirat, mknodat,
    renameat_with,
};
use rustix::io::Errno;
use rustix::mount::{FsPickFlags, fsconfig_reconfigure, fsconfig_set_string, fspick};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fmt::Debug;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{
    DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown, symlink,
};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

const NOBODY: u32 = 65534;
const SOMEBODY: u32 = 60001;
const TEAM: u32 = 60002;

/// A pool whose root gives every user the rights of /tmp.
fn shared_pool() -> Pool {
    let pool = Pool::mount(&format!("pagesize=2M,size={},mode=1777", 4 * FOLIO));
    chmod(pool.path().parent().expect("the test's directory"), 0o755);
    pool
}

/// Runs `work` as `uid`, with the group of this number and with `groups`, without capabilities.
fn as_user<T: Send>(uid: u32, groups: &[u32], work: impl FnOnce() -> T + Send) -> T {
    let groups: Vec<Gid> = groups.iter().copied().map(Gid::from_raw).collect();
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(uid));
    let run = move || {
        rustix::thread::set_thread_groups(&groups).expect("root may");
        rustix::thread::set_thread_res_gid(gid, gid, gid).expect("root may");
        rustix::thread::set_thread_res_uid(uid, uid, uid).expect("root may");
        work()
    };
    let joined = std::thread::scope(|scope| scope.spawn(run).join());
    joined.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn errno<T: Debug>(result: io::Result<T>) -> Errno {
    Errno::from_io_error(&result.expect_err("it is to be refused")).expect("the kernel's answer")
}

fn chmod(path: impl AsRef<Path>, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).expect("chmod");
}

/// Permission bits, with set-id and sticky bits.
fn mode(path: impl AsRef<Path>) -> u32 {
    fs::symlink_metadata(path).expect("it exists").mode() & 0o7777
}

fn owner(path: impl AsRef<Path>) -> (u32, u32) {
    let stat = fs::symlink_metadata(path).expect("it exists");
    (stat.uid(), stat.gid())
}

fn links(path: impl AsRef<Path>) -> u64 {
    fs::symlink_metadata(path).expect("it exists").nlink()
}

fn inode(path: impl AsRef<Path>) -> u64 {
    fs::symlink_metadata(path).expect("it exists").ino()
}

/// Makes a regular file without opening it.
fn touch(path: impl AsRef<Path>) {
    node(path, FileType::RegularFile, 0).expect("mknod");
}

fn node(path: impl AsRef<Path>, kind: FileType, device: Dev) -> rustix::io::Result<()> {
    mknodat(CWD, path.as_ref(), kind, Mode::from_raw_mode(0o666), device)
}

fn mkfifo(path: impl AsRef<Path>) {
    node(path, FileType::Fifo, 0).expect("mkfifo");
}

fn rename(from: &Path, to: &Path, flags: RenameFlags) -> rustix::io::Result<()> {
    renameat_with(CWD, from, CWD, to, flags)
}

fn open_directory(path: impl AsRef<Path>) -> OwnedFd {
    rustix::fs::open(
        path.as_ref(),
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .expect("a directory")
}

fn names(path: impl AsRef<Path>) -> Vec<Vec<u8>> {
    let entry = |entry: io::Result<fs::DirEntry>| entry.expect("readable").file_name().into_vec();
    let mut names: Vec<_> = fs::read_dir(path).expect("a directory").map(entry).collect();
    names.sort();
    names
}

// ---- directories --------------------------------------------------------------------------------

#[test]
fn a_directory_counts_its_links() {
    let pool = Pool::small(1);
    let directory = pool.join("d");
    fs::create_dir(&directory).unwrap();
    assert_eq!((links(pool.path()), links(&directory)), (3, 2));
    fs::create_dir_all(directory.join("a/b")).unwrap();
    touch(directory.join("file"));
    assert_eq!((links(&directory), links(directory.join("a"))), (3, 3));
    fs::rename(directory.join("a/b"), pool.join("b")).unwrap();
    assert_eq!((links(pool.path()), links(&directory), links(directory.join("a"))), (4, 3, 2));
    fs::remove_dir(directory.join("a")).unwrap();
    assert_eq!(links(&directory), 2);
}

#[test]
fn files_and_directories_refuse_each_with_its_errno() {
    let pool = Pool::small(1);
    let (directory, file) = (pool.join("d"), pool.join("d/f"));
    fs::create_dir(&directory).unwrap();
    touch(&file);
    assert_eq!(errno(fs::remove_dir(&directory)), Errno::NOTEMPTY);
    assert_eq!(errno(fs::remove_dir(&file)), Errno::NOTDIR);
    assert_eq!(errno(fs::remove_file(&directory)), Errno::ISDIR);
    assert_eq!(errno(File::create(&directory)), Errno::ISDIR);
    assert_eq!(errno(File::open(&directory).unwrap().read_at(&mut [0], 0)), Errno::ISDIR);
    assert_eq!(errno(File::open(file.join("below"))), Errno::NOTDIR);
    assert_eq!(errno(fs::create_dir(file.join("below"))), Errno::NOTDIR);
    assert_eq!(errno(fs::read_dir(&file)), Errno::NOTDIR);
    assert_eq!(errno(fs::create_dir(&directory)), Errno::EXIST);
    assert_eq!(errno(fs::create_dir(&file)), Errno::EXIST);
    assert_eq!(errno(fs::remove_dir(pool.join("missing"))), Errno::NOENT);
    assert_eq!(errno(fs::remove_file(pool.join("missing"))), Errno::NOENT);
    assert_eq!(errno(fs::remove_dir(directory.join("."))), Errno::INVAL);
    assert_eq!(errno(fs::remove_dir(directory.join(".."))), Errno::NOTEMPTY);
    assert_eq!(errno(fs::hard_link(&directory, pool.join("link"))), Errno::PERM);
    assert_eq!(names(&directory), [b"f"]);
}

#[test]
fn only_one_of_many_creates_a_file_exclusively() {
    let pool = Pool::small(1);
    let path = pool.join("file");
    let create = || OpenOptions::new().write(true).create_new(true).open(&path).is_ok();
    let won = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(create)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).filter(|won| *won).count()
    });
    assert_eq!(won, 1);
    assert_eq!(errno(OpenOptions::new().write(true).create_new(true).open(&path)), Errno::EXIST);
}

#[test]
fn a_removed_open_directory_has_no_links_and_takes_no_entry() {
    let pool = Pool::small(1);
    let directory = pool.join("d");
    fs::create_dir(&directory).unwrap();
    let open = open_directory(&directory);
    fs::remove_dir(&directory).unwrap();
    assert_eq!(rustix::fs::fstat(&open).unwrap().st_nlink, 0);
    assert_eq!(mkdirat(&open, "sub", Mode::RWXU).unwrap_err(), Errno::NOENT);
    assert_eq!(
        rustix::fs::openat(&open, "f", OFlags::CREATE | OFlags::RDWR, Mode::RWXU).unwrap_err(),
        Errno::NOENT
    );
    fs::create_dir(&directory).unwrap();
    assert_ne!(inode(&directory), rustix::fs::fstat(&open).unwrap().st_ino);
}

#[test]
fn the_working_directory_can_be_removed_and_then_has_no_path() {
    let pool = Pool::small(1);
    let directory = pool.join("d");
    fs::create_dir(&directory).unwrap();
    let script = "rmdir \"$PWD\" && readlink /proc/self/cwd && ls -a";
    let printed = run(Command::new("sh").args(["-c", script]).current_dir(&directory));
    assert_eq!(printed, format!("{} (deleted)\n", directory.display()));
    assert!(!directory.exists());
}

// ---- rename -------------------------------------------------------------------------------------

#[test]
fn a_rename_moves_an_inode_between_directories() {
    let pool = Pool::small(1);
    let (from, to) = (pool.join("a/from"), pool.join("b/to"));
    fs::create_dir(pool.join("a")).unwrap();
    fs::create_dir(pool.join("b")).unwrap();
    fs::write(&from, "contents").unwrap();
    let before = inode(&from);
    fs::rename(&from, &to).unwrap();
    assert!(!from.exists());
    assert_eq!((inode(&to), fs::read(&to).unwrap()), (before, b"contents".to_vec()));
    assert_eq!(errno(fs::rename(&from, &to)), Errno::NOENT);
}

#[test]
fn a_rename_over_a_file_replaces_it_and_its_open_contents_stay() {
    let pool = Pool::small(4);
    let (from, to) = (pool.join("from"), pool.join("to"));
    fs::write(&from, "new").unwrap();
    fs::write(&to, "old").unwrap();
    let old = File::open(&to).unwrap();
    fs::rename(&from, &to).unwrap();
    assert_eq!(fs::read(&to).unwrap(), b"new");
    assert_eq!(old.metadata().unwrap().nlink(), 0);
    let mut contents = String::new();
    (&old).read_to_string(&mut contents).unwrap();
    assert_eq!(contents, "old");
    assert_eq!(names(pool.path()), [b"to"]);
    pool.check();
}

#[test]
fn a_rename_over_a_file_with_another_name_leaves_that_name() {
    let pool = Pool::small(4);
    let (from, to, other) = (pool.join("from"), pool.join("to"), pool.join("other"));
    fs::write(&from, "new").unwrap();
    fs::write(&to, "old").unwrap();
    fs::hard_link(&to, &other).unwrap();
    fs::rename(&from, &to).unwrap();
    assert_eq!((fs::read(&other).unwrap(), links(&other), links(&to)), (b"old".to_vec(), 1, 1));
}

#[test]
fn a_rename_between_two_names_of_one_inode_does_nothing() {
    let pool = Pool::small(1);
    let (a, b) = (pool.join("a"), pool.join("b"));
    fs::write(&a, "x").unwrap();
    fs::hard_link(&a, &b).unwrap();
    fs::rename(&a, &b).unwrap();
    assert_eq!((names(pool.path()).len(), links(&a)), (2, 2));
    fs::rename(&a, &a).unwrap();
    assert_eq!((names(pool.path()).len(), links(&a)), (2, 2));
    assert_eq!(fs::read(&b).unwrap(), b"x");
}

#[test]
fn a_directory_replaces_an_empty_directory_and_nothing_else() {
    let pool = Pool::small(1);
    let [from, empty, full, file] = ["from", "empty", "full", "file"].map(|name| pool.join(name));
    for directory in [&from, &empty, &full] {
        fs::create_dir(directory).unwrap();
    }
    touch(full.join("entry"));
    touch(&file);
    assert_eq!(errno(fs::rename(&from, &full)), Errno::NOTEMPTY);
    assert_eq!(errno(fs::rename(&from, &file)), Errno::NOTDIR);
    assert_eq!(errno(fs::rename(&file, &empty)), Errno::ISDIR);
    assert_eq!(errno(fs::rename(&from, from.join("below"))), Errno::INVAL);
    let (open, before) = (open_directory(&empty), inode(&from));
    fs::rename(&from, &empty).unwrap();
    assert_eq!(inode(&empty), before);
    assert_eq!(rustix::fs::fstat(&open).unwrap().st_nlink, 0);
    assert_eq!(names(pool.path()), [&b"empty"[..], b"file", b"full"]);
    assert_eq!(links(pool.path()), 4);
}

#[test]
fn rename_noreplace_replaces_nothing() {
    let pool = Pool::small(2);
    let (from, to) = (pool.join("from"), pool.join("to"));
    fs::write(&from, "new").unwrap();
    fs::write(&to, "old").unwrap();
    assert_eq!(rename(&from, &to, RenameFlags::NOREPLACE), Err(Errno::EXIST));
    assert_eq!(
        (fs::read(&from).unwrap(), fs::read(&to).unwrap()),
        (b"new".to_vec(), b"old".to_vec())
    );
    assert_eq!(links(&to), 1);
    rename(&from, &pool.join("free"), RenameFlags::NOREPLACE).unwrap();
    assert_eq!(fs::read(pool.join("free")).unwrap(), b"new");
}

#[test]
fn rename_exchange_swaps_two_entries_of_any_kind() {
    let pool = Pool::small(2);
    let (file, directory) = (pool.join("a/file"), pool.join("b/directory"));
    fs::create_dir_all(&directory).unwrap();
    fs::create_dir(pool.join("a")).unwrap();
    fs::write(&file, "x").unwrap();
    touch(directory.join("entry"));
    let before = (inode(&file), inode(&directory));
    rename(&file, &directory, RenameFlags::EXCHANGE).unwrap();
    assert_eq!((inode(&directory), inode(&file)), before);
    assert_eq!(
        (fs::read(&directory).unwrap(), names(&file)),
        (b"x".to_vec(), vec![b"entry".to_vec()])
    );
    assert_eq!((links(pool.join("a")), links(pool.join("b")), links(&directory)), (3, 2, 1));
    assert_eq!(rename(&file, &pool.join("missing"), RenameFlags::EXCHANGE), Err(Errno::NOENT));
    assert_eq!(rename(&file, &file.join("entry"), RenameFlags::EXCHANGE), Err(Errno::INVAL));
}

#[test]
fn whiteouts_are_refused_and_change_nothing() {
    let pool = Pool::small(1);
    let (from, to) = (pool.join("from"), pool.join("to"));
    touch(&from);
    assert_eq!(rename(&from, &to, RenameFlags::WHITEOUT), Err(Errno::INVAL));
    assert_eq!(names(pool.path()), [b"from"]);
}

// ---- links --------------------------------------------------------------------------------------

#[test]
fn hard_links_are_names_of_one_inode_and_share_its_contents() {
    let pool = Pool::small(2);
    fs::create_dir(pool.join("d")).unwrap();
    let (a, b) = (pool.join("a"), pool.join("d/b"));
    fs::write(&a, "first").unwrap();
    fs::hard_link(&a, &b).unwrap();
    assert_eq!((inode(&a), links(&a), links(&b)), (inode(&b), 2, 2));
    fs::write(&b, "second").unwrap();
    assert_eq!(fs::read(&a).unwrap(), b"second");
    chmod(&a, 0o604);
    assert_eq!(mode(&b), 0o604);
    assert_eq!(errno(fs::hard_link(&a, &b)), Errno::EXIST);
    fs::remove_file(&a).unwrap();
    assert_eq!((links(&b), fs::read(&b).unwrap()), (1, b"second".to_vec()));
    assert_eq!(pool.free_pages(), 1);
    pool.check();
}

#[test]
fn an_unlinked_open_file_has_no_links_and_can_get_none() {
    let pool = Pool::small(1);
    let path = pool.join("file");
    fs::write(&path, "x").unwrap();
    let open = File::open(&path).unwrap();
    fs::remove_file(&path).unwrap();
    assert_eq!(open.metadata().unwrap().nlink(), 0);
    let again = rustix::fs::linkat(&open, "", CWD, pool.join("again"), AtFlags::EMPTY_PATH);
    assert_eq!(again.unwrap_err(), Errno::NOENT);
    assert_eq!(names(pool.path()), Vec::<Vec<u8>>::new());
    let mode = Permissions::from_mode(0o640);
    open.set_permissions(mode).unwrap();
    assert_eq!(
        (open.metadata().unwrap().mode() & 0o7777, open.metadata().unwrap().nlink()),
        (0o640, 0)
    );
}

#[test]
fn a_descriptor_can_be_linked_while_the_file_has_a_name() {
    let pool = Pool::small(1);
    fs::write(pool.join("a"), "x").unwrap();
    let open = File::open(pool.join("a")).unwrap();
    rustix::fs::linkat(&open, "", CWD, pool.join("b"), AtFlags::EMPTY_PATH).unwrap();
    fs::remove_file(pool.join("a")).unwrap();
    assert_eq!(
        (fs::read(pool.join("b")).unwrap(), open.metadata().unwrap().nlink()),
        (b"x".to_vec(), 1)
    );
}

#[test]
fn symlinks_hold_any_target_and_are_followed() {
    let pool = Pool::small(2);
    fs::create_dir(pool.join("d")).unwrap();
    fs::write(pool.join("d/file"), "x").unwrap();
    symlink("d/file", pool.join("relative")).unwrap();
    symlink(pool.join("d"), pool.join("absolute")).unwrap();
    symlink("nowhere", pool.join("dangling")).unwrap();
    assert_eq!(fs::read(pool.join("relative")).unwrap(), b"x");
    assert_eq!(fs::read(pool.join("absolute/file")).unwrap(), b"x");
    assert_eq!(errno(File::open(pool.join("dangling"))), Errno::NOENT);
    fs::write(pool.join("dangling"), "made").unwrap();
    assert_eq!(fs::read(pool.join("nowhere")).unwrap(), b"made");
    let long = PathBuf::from("x/".repeat(2047) + "y");
    symlink(&long, pool.join("long")).unwrap();
    assert_eq!(fs::read_link(pool.join("long")).unwrap(), long);
    assert_eq!(fs::symlink_metadata(pool.join("long")).unwrap().len(), 4095);
    assert_eq!(errno(symlink("x".repeat(4096), pool.join("longer"))), Errno::NAMETOOLONG);
    assert_eq!(errno(fs::read_link(pool.join("d"))), Errno::INVAL);
    let target = OsStr::from_bytes(b"\xff\n\x80");
    symlink(target, pool.join("raw")).unwrap();
    assert_eq!(fs::read_link(pool.join("raw")).unwrap(), target);
}

#[test]
fn a_symlink_is_an_inode_of_its_own() {
    let pool = Pool::small(1);
    let (file, link) = (pool.join("file"), pool.join("link"));
    touch(&file);
    symlink("file", &link).unwrap();
    assert_ne!(inode(&file), inode(&link));
    rustix::fs::linkat(CWD, &link, CWD, pool.join("second"), AtFlags::empty()).unwrap();
    assert_eq!((links(&link), links(&file)), (2, 1));
    std::os::unix::fs::lchown(&link, Some(NOBODY), Some(NOBODY)).unwrap();
    assert_eq!((owner(&link), owner(&file)), ((NOBODY, NOBODY), (0, 0)));
    fs::remove_file(&link).unwrap();
    assert!(file.exists() && pool.join("second").exists());
}

#[test]
fn endless_and_forbidden_symlinks_are_eloop() {
    let pool = Pool::small(1);
    symlink("b", pool.join("a")).unwrap();
    symlink("a", pool.join("b")).unwrap();
    assert_eq!(errno(File::open(pool.join("a"))), Errno::LOOP);
    touch(pool.join("file"));
    symlink("file", pool.join("link")).unwrap();
    let nofollow =
        rustix::fs::open(pool.join("link"), OFlags::RDONLY | OFlags::NOFOLLOW, Mode::empty());
    assert_eq!(nofollow.unwrap_err(), Errno::LOOP);
}

// ---- FIFOs, sockets, devices --------------------------------------------------------------------

#[test]
fn a_fifo_carries_bytes_from_a_writer_to_a_reader() {
    let pool = Pool::small(1);
    let path = pool.join("fifo");
    mkfifo(&path);
    let received = std::thread::scope(|scope| {
        scope.spawn(|| {
            OpenOptions::new().write(true).open(&path).unwrap().write_all(b"through").unwrap()
        });
        let mut received = String::new();
        File::open(&path).unwrap().read_to_string(&mut received).unwrap();
        received
    });
    assert_eq!(received, "through");
    assert_eq!(FileType::from_raw_mode(fs::metadata(&path).unwrap().mode()), FileType::Fifo);
}

#[test]
fn a_socket_that_is_bound_here_can_be_connected_to() {
    let pool = Pool::small(1);
    let listener = UnixListener::bind(pool.join("socket")).unwrap();
    fs::rename(pool.join("socket"), pool.join("renamed")).unwrap();
    let mut client = UnixStream::connect(pool.join("renamed")).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    client.write_all(b"hello").unwrap();
    drop(client);
    let mut received = String::new();
    server.read_to_string(&mut received).unwrap();
    assert_eq!(received, "hello");
    assert_eq!(errno(UnixListener::bind(pool.join("renamed"))), Errno::ADDRINUSE);
    fs::remove_file(pool.join("renamed")).unwrap();
    assert_eq!(errno(UnixStream::connect(pool.join("renamed"))), Errno::NOENT);
}

#[test]
fn device_nodes_are_the_devices_they_name() {
    let pool = Pool::small(1);
    let (zero, disk) = (pool.join("zero"), pool.join("disk"));
    node(&zero, FileType::CharacterDevice, makedev(1, 5)).unwrap();
    node(&disk, FileType::BlockDevice, makedev(0x801, 0x12345)).unwrap();
    let mut bytes = [7; 16];
    File::open(&zero).unwrap().read_exact(&mut bytes).unwrap();
    assert_eq!(bytes, [0; 16]);
    let stat = rustix::fs::stat(&disk).unwrap();
    assert_eq!(FileType::from_raw_mode(stat.st_mode), FileType::BlockDevice);
    assert_eq!(stat.st_rdev, makedev(0x801, 0x12345));
}

#[test]
fn only_root_makes_device_nodes() {
    let pool = shared_pool();
    let path = pool.join("zero");
    let made = as_user(NOBODY, &[], || node(&path, FileType::CharacterDevice, makedev(1, 5)));
    assert_eq!(made, Err(Errno::PERM));
}

// ---- modes and owners ---------------------------------------------------------------------------

#[test]
fn chmod_sets_every_bit_of_the_owners_own_things_only() {
    let pool = shared_pool();
    let path = pool.join("file");
    touch(&path);
    for bits in [0o7777, 0o000, 0o4711, 0o640] {
        chmod(&path, bits);
        assert_eq!(mode(&path), bits);
    }
    let refused =
        as_user(NOBODY, &[], || errno(fs::set_permissions(&path, Permissions::from_mode(0o777))));
    assert_eq!((refused, mode(&path)), (Errno::PERM, 0o640));
    chown(&path, Some(NOBODY), None).unwrap();
    as_user(NOBODY, &[], || chmod(&path, 0o600));
    assert_eq!(mode(&path), 0o600);
}

#[test]
fn set_group_id_is_not_for_those_outside_the_group() {
    let pool = shared_pool();
    let path = pool.join("file");
    touch(&path);
    chown(&path, Some(NOBODY), Some(TEAM)).unwrap();
    as_user(NOBODY, &[], || chmod(&path, 0o2755));
    assert_eq!(mode(&path), 0o755);
    as_user(NOBODY, &[TEAM], || chmod(&path, 0o2755));
    assert_eq!(mode(&path), 0o2755);
}

#[test]
fn chown_changes_owners_and_clears_set_id_bits() {
    let pool = shared_pool();
    let path = pool.join("file");
    touch(&path);
    chmod(&path, 0o6755);
    chown(&path, Some(NOBODY), Some(TEAM)).unwrap();
    assert_eq!((owner(&path), mode(&path)), ((NOBODY, TEAM), 0o755));
    chown(&path, None, Some(SOMEBODY)).unwrap();
    assert_eq!(owner(&path), (NOBODY, SOMEBODY));
    let given_away = as_user(NOBODY, &[TEAM], || errno(chown(&path, Some(SOMEBODY), None)));
    assert_eq!(given_away, Errno::PERM);
    as_user(NOBODY, &[TEAM], || chown(&path, None, Some(TEAM))).unwrap();
    assert_eq!(owner(&path), (NOBODY, TEAM));
}

#[test]
fn a_directory_keeps_its_set_group_id_bit_when_it_changes_hands() {
    let pool = Pool::small(1);
    let path = pool.join("d");
    fs::create_dir(&path).unwrap();
    chmod(&path, 0o2775);
    chown(&path, Some(NOBODY), Some(TEAM)).unwrap();
    assert_eq!(mode(&path), 0o2775);
}

type Change = fn(&File);

/// Calls that change a file's contents.
const CHANGES: [(&str, Change); 4] = [
    ("write", |file| file.write_all_at(b"x", 0).unwrap()),
    ("truncate", |file| file.set_len(100).unwrap()),
    ("fallocate", |file| {
        rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, 200).unwrap();
    }),
    ("copy_file_range", |file| {
        let copied =
            rustix::fs::copy_file_range(file, Some(&mut 0), file, Some(&mut 4096), 1).unwrap();
        assert_eq!(copied, 1);
    }),
];

#[test]
fn an_unprivileged_change_of_contents_clears_set_id_bits() {
    let pool = shared_pool();
    for (name, change) in CHANGES {
        let path = pool.join(name);
        fs::write(&path, "contents").unwrap();
        chmod(&path, 0o6777);
        as_user(NOBODY, &[], || {
            change(&File::options().read(true).write(true).open(&path).unwrap())
        });
        assert_eq!(mode(&path), 0o777, "{name}");
        fs::remove_file(&path).unwrap();
    }
}

/// The kernel executes a file with the mode that it has cached.
#[test]
fn cleared_set_id_bits_do_not_come_back_at_an_execution() {
    let pool = shared_pool();
    let path = pool.join("id");
    fs::copy("/usr/bin/id", &path).unwrap();
    chmod(&path, 0o6777);
    let effective = |first: &str| {
        let script = format!("{first} exec \"$0\"");
        let user = ["--reuid=65534", "--regid=65534", "--clear-groups"];
        run(Command::new("setpriv").args(user).args(["sh", "-c", &script]).arg(&path))
    };
    assert!(effective("").contains("euid=0(root)"), "the bits count");
    assert!(!effective("printf '\\177' 1<>\"$0\";").contains("euid"), "the file was changed");
}

#[test]
fn set_id_bits_stay_when_root_changes_the_contents() {
    let pool = shared_pool();
    for (name, change) in CHANGES {
        let path = pool.join(name);
        fs::write(&path, "contents").unwrap();
        chmod(&path, 0o6777);
        change(&File::options().read(true).write(true).open(&path).unwrap());
        assert_eq!(mode(&path), 0o6777, "{name}");
        fs::remove_file(&path).unwrap();
    }
}

#[test]
fn truncating_at_open_drops_set_id_bits_too() {
    let pool = shared_pool();
    let path = pool.join("file");
    fs::write(&path, "contents").unwrap();
    chmod(&path, 0o6777);
    as_user(NOBODY, &[], || File::options().write(true).truncate(true).open(&path)).unwrap();
    assert_eq!((mode(&path), fs::metadata(&path).unwrap().len()), (0o777, 0));
}

/// capabilities(7): any change of contents or owner removes the capabilities, even one by root.
#[test]
fn file_capabilities_go_with_any_change_of_contents_or_owner() {
    const CAPABILITY: &str = "security.capability";
    let pool = shared_pool();
    let path = pool.join("file");
    fs::write(&path, "contents").unwrap();
    let give = || {
        run(Command::new("setcap").arg("cap_net_raw+ep").arg(&path));
        assert!(run(Command::new("getcap").arg(&path)).contains("cap_net_raw=ep"));
    };
    let has = || rustix::fs::getxattr(&path, CAPABILITY, &mut [0_u8; 64][..]);
    chmod(&path, 0o777);
    for (name, change) in CHANGES {
        let open = || File::options().read(true).write(true).open(&path).unwrap();
        give();
        as_user(NOBODY, &[], || change(&open()));
        assert_eq!(has(), Err(Errno::NODATA), "{name} by a user");
        give();
        change(&open());
        assert_eq!(has(), Err(Errno::NODATA), "{name} by root");
    }
    give();
    chown(&path, Some(NOBODY), None).unwrap();
    assert_eq!(has(), Err(Errno::NODATA), "chown");
}

#[test]
fn only_who_may_is_let_in() {
    let pool = shared_pool();
    let (closed, open) = (pool.join("closed"), pool.join("open"));
    fs::create_dir(&closed).unwrap();
    fs::create_dir(&open).unwrap();
    fs::write(closed.join("file"), "secret").unwrap();
    fs::write(open.join("file"), "public").unwrap();
    touch(pool.join("mine"));
    chown(pool.join("mine"), Some(NOBODY), None).unwrap();
    chmod(&closed, 0o700);
    as_user(NOBODY, &[], || {
        assert_eq!(errno(fs::metadata(closed.join("file"))), Errno::ACCESS);
        assert_eq!(errno(fs::read_dir(&closed)), Errno::ACCESS);
        assert_eq!(errno(File::create(closed.join("new"))), Errno::ACCESS);
        assert_eq!(fs::read(open.join("file")).unwrap(), b"public");
        assert_eq!(errno(File::options().write(true).open(open.join("file"))), Errno::ACCESS);
        assert_eq!(errno(File::create(open.join("new"))), Errno::ACCESS);
        assert_eq!(errno(fs::create_dir(open.join("new"))), Errno::ACCESS);
        assert_eq!(errno(symlink("x", open.join("new"))), Errno::ACCESS);
        assert_eq!(errno(fs::remove_file(open.join("file"))), Errno::ACCESS);
        assert_eq!(errno(fs::rename(open.join("file"), open.join("new"))), Errno::ACCESS);
        assert_eq!(errno(fs::hard_link(pool.join("mine"), open.join("new"))), Errno::ACCESS);
        assert_eq!(set(open.join("file"), "user.note", "x"), Err(Errno::ACCESS));
    });
    assert_eq!(names(&open), [b"file"]);
}

#[test]
fn a_supplementary_group_lets_in_and_owns_nothing() {
    let pool = shared_pool();
    let directory = pool.join("team");
    fs::create_dir(&directory).unwrap();
    chown(&directory, None, Some(TEAM)).unwrap();
    chmod(&directory, 0o770);
    let path = directory.join("file");
    assert_eq!(errno(as_user(NOBODY, &[], || File::create(&path))), Errno::ACCESS);
    as_user(NOBODY, &[TEAM], || fs::write(&path, "x").unwrap());
    as_user(NOBODY, &[TEAM], || fs::create_dir(directory.join("d")).unwrap());
    assert_eq!(owner(&path), (NOBODY, NOBODY));
    assert_eq!(owner(directory.join("d")), (NOBODY, NOBODY));
}

#[test]
fn the_umask_takes_bits_from_what_is_made() {
    let pool = Pool::small(1);
    let script = "umask 0027 && : > file && mkdir d && mkfifo fifo && umask 0777 && : > none && ln -s file link";
    run(Command::new("sh").args(["-c", script]).current_dir(pool.path()));
    let modes = ["file", "d", "fifo", "none", "link"].map(|name| mode(pool.join(name)));
    assert_eq!(modes, [0o640, 0o750, 0o640, 0, 0o777]);
}

#[test]
fn a_set_group_id_directory_hands_down_its_group() {
    let pool = shared_pool();
    let directory = pool.join("team");
    fs::create_dir(&directory).unwrap();
    chown(&directory, None, Some(TEAM)).unwrap();
    chmod(&directory, 0o2777);
    as_user(NOBODY, &[], || {
        touch(directory.join("file"));
        fs::create_dir(directory.join("sub")).unwrap();
        symlink("file", directory.join("link")).unwrap();
        OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o2755)
            .open(directory.join("tool"))
            .unwrap();
    });
    for name in ["file", "sub", "link", "tool"] {
        assert_eq!(owner(directory.join(name)), (NOBODY, TEAM), "{name}");
    }
    assert_eq!(mode(directory.join("sub")) & 0o2000, 0o2000);
    assert_eq!(mode(directory.join("file")) & 0o2000, 0);
    assert_eq!(
        mode(directory.join("tool")) & 0o2000,
        0,
        "the bit is not for those outside the group"
    );
}

#[test]
fn in_a_sticky_directory_only_owners_remove_and_rename() {
    let pool = shared_pool();
    let (file, directory) = (pool.join("file"), pool.join("d"));
    as_user(NOBODY, &[], || {
        fs::write(&file, "x").unwrap();
        fs::DirBuilder::new().mode(0o777).create(&directory).unwrap();
    });
    as_user(SOMEBODY, &[], || {
        assert_eq!(errno(fs::remove_file(&file)), Errno::PERM);
        assert_eq!(errno(fs::remove_dir(&directory)), Errno::PERM);
        assert_eq!(errno(fs::rename(&file, pool.join("mine"))), Errno::PERM);
        fs::write(pool.join("other"), "y").unwrap();
        assert_eq!(errno(fs::rename(pool.join("other"), &file)), Errno::PERM);
    });
    as_user(NOBODY, &[], || fs::remove_file(&file)).unwrap();
}

/// Another process that looks at a new entry never finds another owner.
#[test]
fn what_a_user_makes_is_the_users_from_the_first_moment() {
    const COUNT: usize = 200;
    let pool = shared_pool();
    let path = |n: usize| pool.join(format!("entry{n}"));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            as_user(NOBODY, &[], || {
                for n in 0..COUNT {
                    match n % 4 {
                        0 => drop(File::create(path(n)).unwrap()),
                        1 => fs::create_dir(path(n)).unwrap(),
                        2 => symlink("target", path(n)).unwrap(),
                        _ => mkfifo(path(n)),
                    }
                }
            });
        });
        for n in 0..COUNT {
            let first = loop {
                match fs::symlink_metadata(path(n)) {
                    Ok(stat) => break stat,
                    Err(error) => assert_eq!(error.kind(), io::ErrorKind::NotFound),
                }
            };
            assert_eq!((first.uid(), first.gid()), (NOBODY, NOBODY), "{n}");
        }
    });
}

// ---- times --------------------------------------------------------------------------------------

/// Sets access and modification time, each in seconds and nanoseconds.
fn set_times(path: &Path, accessed: [i64; 2], modified: [i64; 2]) -> rustix::io::Result<()> {
    let timespec = |[tv_sec, tv_nsec]: [i64; 2]| Timespec { tv_sec, tv_nsec: tv_nsec as _ };
    let times =
        Timestamps { last_access: timespec(accessed), last_modification: timespec(modified) };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)
}

/// Access and modification time.
fn times(path: &Path) -> [[i64; 2]; 2] {
    let stat: Stat = rustix::fs::lstat(path).expect("it exists");
    [[stat.st_atime, stat.st_atime_nsec as i64], [stat.st_mtime, stat.st_mtime_nsec as i64]]
}

fn now() -> i64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .expect("after 1970")
        .as_secs() as i64
}

#[test]
fn any_time_can_be_set_and_is_kept_to_the_nanosecond() {
    let pool = Pool::small(1);
    touch(pool.join("file"));
    fs::create_dir(pool.join("d")).unwrap();
    symlink("file", pool.join("link")).unwrap();
    for path in ["file", "d", "link"].map(|name| pool.join(name)) {
        for seconds in [0, 1, 1_000_000_000, 1 << 33, 1 << 40, -1, -2, -86_400, -(1 << 33)] {
            for nanoseconds in [0, 1, 250_000_000, 999_999_999] {
                let both = [[seconds, nanoseconds], [seconds / 2, 7]];
                set_times(&path, both[0], both[1]).unwrap();
                assert_eq!(times(&path), both, "{}", path.display());
            }
        }
    }
}

#[test]
fn the_first_and_the_last_time_there_are_do_no_harm() {
    let pool = Pool::small(1);
    let path = pool.join("file");
    touch(&path);
    for seconds in [i64::MIN, i64::MIN + 1, i64::MAX - 1, i64::MAX] {
        let _ = set_times(&path, [seconds, 999_999_999], [seconds, 1]); // the kernel may round them
        assert!(rustix::fs::stat(&path).is_ok());
    }
    set_times(&path, [5, 5], [6, 6]).unwrap();
    assert_eq!(times(&path), [[5, 5], [6, 6]]);
}

#[test]
fn times_can_be_left_alone_and_set_to_the_present() {
    let pool = shared_pool();
    let path = pool.join("file");
    fs::write(&path, "x").unwrap();
    set_times(&path, [1000, 1], [2000, 2]).unwrap();
    set_times(&path, [0, UTIME_OMIT], [3000, 3]).unwrap();
    assert_eq!(times(&path), [[1000, 1], [3000, 3]]);
    set_times(&path, [4000, 4], [0, UTIME_OMIT]).unwrap();
    assert_eq!(times(&path), [[4000, 4], [3000, 3]]);
    let before = now();
    set_times(&path, [5000, 5], [0, UTIME_NOW]).unwrap();
    let [accessed, modified] = times(&path);
    assert_eq!(accessed, [5000, 5]);
    assert!((before - 1..=now()).contains(&modified[0]));
    chmod(&path, 0o666);
    as_user(NOBODY, &[], || {
        assert_eq!(set_times(&path, [1, 1], [1, 1]), Err(Errno::PERM));
        set_times(&path, [0, UTIME_NOW], [0, UTIME_NOW]).unwrap();
    });
    assert!(times(&path)[0][0] >= before - 1);
}

#[test]
fn a_directory_is_modified_by_every_change_of_its_entries() {
    let pool = Pool::small(1);
    let (directory, other) = (pool.join("d"), pool.join("other"));
    fs::create_dir(&directory).unwrap();
    fs::create_dir(&other).unwrap();
    let entry = |name: &str| directory.join(name);
    let changes: [(&str, &dyn Fn()); 9] = [
        ("create", &|| drop(File::create(entry("file")).unwrap())),
        ("link", &|| fs::hard_link(entry("file"), entry("second")).unwrap()),
        ("unlink", &|| fs::remove_file(entry("second")).unwrap()),
        ("symlink", &|| symlink("file", entry("link")).unwrap()),
        ("mknod", &|| mkfifo(entry("fifo"))),
        ("mkdir", &|| fs::create_dir(entry("sub")).unwrap()),
        ("rmdir", &|| fs::remove_dir(entry("sub")).unwrap()),
        ("rename away", &|| fs::rename(entry("file"), other.join("file")).unwrap()),
        ("rename back", &|| fs::rename(other.join("file"), entry("file")).unwrap()),
    ];
    for (name, change) in changes {
        set_times(&directory, [1000, 0], [1000, 0]).unwrap();
        assert_eq!(times(&directory)[1][0], 1000);
        change();
        assert!(times(&directory)[1][0] > 1000, "{name}");
    }
}

#[test]
fn a_file_is_modified_by_every_change_of_its_contents() {
    let pool = Pool::small(2);
    let path = pool.join("file");
    let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    for (name, change) in CHANGES {
        set_times(&path, [1000, 0], [1000, 0]).unwrap();
        change(&file);
        assert!(times(&path)[1][0] > 1000, "{name}");
        assert_eq!(
            times(&path)[0][0],
            1000,
            "{name}: reading and writing leave the access time alone"
        );
    }
}

// ---- extended attributes ------------------------------------------------------------------------

fn attributes(path: &Path) -> BTreeSet<String> {
    let mut list = vec![0; 64 << 10];
    let length = rustix::fs::llistxattr(path, &mut list[..]).expect("listxattr");
    let name = |name: &[u8]| support::text(name.strip_suffix(b"\0").expect("each ends with a NUL"));
    list[..length].split_inclusive(|byte| *byte == 0).map(name).collect()
}

fn remove(path: &Path, name: &str) -> rustix::io::Result<()> {
    rustix::fs::lremovexattr(path, name)
}

#[test]
fn attributes_can_be_set_read_listed_and_removed() {
    let pool = Pool::small(2);
    fs::write(pool.join("file"), "x").unwrap();
    fs::create_dir(pool.join("d")).unwrap();
    for path in [pool.join("file"), pool.join("d"), pool.path()] {
        set(&path, "user.a", "one").unwrap();
        set(&path, "user.b", "").unwrap();
        set(&path, "trusted.c", [0, 255, 0]).unwrap();
        assert_eq!(attributes(&path), ["trusted.c", "user.a", "user.b"].map(str::to_owned).into());
        assert_eq!(
            (get(&path, "user.a"), get(&path, "user.b")),
            (Ok("one".into()), Ok(String::new()))
        );
        set(&path, "user.a", "another").unwrap();
        assert_eq!(get(&path, "user.a"), Ok("another".into()));
        for name in ["user.a", "user.b", "trusted.c"] {
            remove(&path, name).unwrap();
            assert_eq!(
                (remove(&path, name), get(&path, name)),
                (Err(Errno::NODATA), Err(Errno::NODATA))
            );
        }
        assert!(attributes(&path).is_empty());
    }
}

#[test]
fn creating_and_replacing_attributes_are_told_apart() {
    let pool = Pool::small(1);
    let path = pool.join("file");
    touch(&path);
    let set = |flags| rustix::fs::setxattr(&path, "user.a", b"x", flags);
    assert_eq!(set(XattrFlags::REPLACE), Err(Errno::NODATA));
    assert_eq!(set(XattrFlags::CREATE), Ok(()));
    assert_eq!(set(XattrFlags::CREATE), Err(Errno::EXIST));
    assert_eq!(set(XattrFlags::REPLACE), Ok(()));
}

#[test]
fn attributes_are_limited_as_the_kernel_limits_them() {
    let pool = Pool::small(1);
    let path = pool.join("file");
    touch(&path);
    let value = vec![7_u8; 64 << 10];
    set(&path, "user.long", &value).unwrap();
    let mut buffer = vec![0_u8; 64 << 10];
    assert_eq!(rustix::fs::getxattr(&path, "user.long", &mut buffer[..]), Ok(64 << 10));
    assert_eq!(buffer, value);
    assert_eq!(rustix::fs::getxattr(&path, "user.long", &mut buffer[..100]), Err(Errno::RANGE));
    assert_eq!(rustix::fs::getxattr_query(&path, "user.long"), Ok(64 << 10));
    assert_eq!(rustix::fs::listxattr(&path, &mut buffer[..3]), Err(Errno::RANGE));
    assert_eq!(rustix::fs::listxattr_query(&path), Ok("user.long\0".len()));
    assert_eq!(set(&path, "user.longer", vec![0; (64 << 10) + 1]), Err(Errno::TOOBIG));
    let longest = format!("user.{}", "n".repeat(250));
    set(&path, &longest, "x").unwrap();
    assert!(attributes(&path).contains(&longest));
    assert_eq!(set(&path, &format!("{longest}n"), "x"), Err(Errno::RANGE));
    assert_eq!(set(&path, "nonsense.name", "x"), Err(Errno::OPNOTSUPP));
}

#[test]
fn trusted_attributes_are_roots_secret() {
    let pool = shared_pool();
    let path = pool.join("file");
    touch(&path);
    set(&path, "trusted.secret", "x").unwrap();
    set(&path, "user.note", "y").unwrap();
    as_user(NOBODY, &[], || {
        assert_eq!(attributes(&path), ["user.note".to_owned()].into());
        assert_eq!(get(&path, "trusted.secret"), Err(Errno::NODATA));
        assert_eq!(set(&path, "trusted.secret", "z"), Err(Errno::PERM));
        assert_eq!(remove(&path, "user.note"), Err(Errno::ACCESS));
    });
    assert_eq!(get(&path, "trusted.secret"), Ok("x".into()));
}

#[test]
fn user_attributes_are_for_files_and_directories_only() {
    let pool = Pool::small(1);
    mkfifo(pool.join("fifo"));
    symlink("nowhere", pool.join("link")).unwrap();
    for path in ["fifo", "link"].map(|name| pool.join(name)) {
        assert_eq!(set(&path, "user.a", "x"), Err(Errno::PERM));
        set(&path, "trusted.a", "x").unwrap();
        assert_eq!(get(&path, "trusted.a"), Ok("x".into()));
    }
}

#[test]
fn attributes_follow_the_inode_and_go_with_it() {
    let pool = Pool::small(1);
    let (a, b) = (pool.join("a"), pool.join("b"));
    touch(&a);
    set(&a, "user.note", "x").unwrap();
    fs::rename(&a, &b).unwrap();
    assert_eq!(get(&b, "user.note"), Ok("x".into()));
    let open = File::open(&b).unwrap();
    fs::remove_file(&b).unwrap();
    rustix::fs::fsetxattr(&open, "user.late", b"y", XattrFlags::empty()).unwrap();
    let mut value = [0_u8; 8];
    assert_eq!(rustix::fs::fgetxattr(&open, "user.note", &mut value[..]), Ok(1));
    touch(&b);
    assert!(attributes(&b).is_empty());
}

// ---- ACLs ---------------------------------------------------------------------------------------

fn setfacl(entries: &[&str], path: &Path) {
    run(Command::new("setfacl").args(entries).arg(path));
}

/// Entries as `getfacl -cp` prints them, without the effective rights.
fn getfacl(path: &Path) -> BTreeSet<String> {
    let printed = run(Command::new("getfacl").args(["-c", "-p", "-n", "-E"]).arg(path));
    printed.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect()
}

#[test]
fn an_acl_lets_in_whom_the_mode_keeps_out() {
    let pool = shared_pool();
    let path = pool.join("file");
    fs::write(&path, "x").unwrap();
    chmod(&path, 0o600);
    assert_eq!(errno(as_user(NOBODY, &[], || File::open(&path))), Errno::ACCESS);
    setfacl(&["-m", &format!("u:{NOBODY}:rw,g:{TEAM}:r")], &path);
    assert_eq!(mode(&path), 0o660, "the group bits are the mask's");
    as_user(NOBODY, &[], || fs::write(&path, "y")).unwrap();
    assert_eq!(as_user(SOMEBODY, &[TEAM], || fs::read(&path)).unwrap(), b"y");
    assert_eq!(errno(as_user(SOMEBODY, &[TEAM], || File::create(&path))), Errno::ACCESS);
    assert_eq!(errno(as_user(SOMEBODY, &[], || File::open(&path))), Errno::ACCESS);
    setfacl(&["-m", "m::r"], &path);
    assert_eq!(errno(as_user(NOBODY, &[], || File::create(&path))), Errno::ACCESS);
    setfacl(&["-b"], &path);
    assert_eq!(errno(as_user(NOBODY, &[], || File::open(&path))), Errno::ACCESS);
}

#[test]
fn an_acl_takes_away_what_the_mode_gives() {
    let pool = shared_pool();
    let path = pool.join("file");
    fs::write(&path, "x").unwrap();
    setfacl(&["-m", &format!("u:{NOBODY}:-")], &path);
    assert_eq!(errno(as_user(NOBODY, &[], || File::open(&path))), Errno::ACCESS);
    assert_eq!(as_user(SOMEBODY, &[], || fs::read(&path)).unwrap(), b"x");
}

#[test]
fn chmod_and_the_mask_of_an_acl_are_one() {
    let pool = Pool::small(1);
    let path = pool.join("file");
    touch(&path);
    chmod(&path, 0o640);
    setfacl(&["-m", &format!("u:{NOBODY}:rwx")], &path);
    assert_eq!(mode(&path), 0o670);
    chmod(&path, 0o640);
    let expected = ["user::rw-", "user:65534:rwx", "group::r--", "mask::r--", "other::---"];
    assert_eq!(getfacl(&path), expected.map(str::to_owned).into());
}

#[test]
fn a_default_acl_is_inherited_with_the_mask_of_the_creator() {
    let pool = shared_pool();
    let directory = pool.join("d");
    fs::create_dir(&directory).unwrap();
    chmod(&directory, 0o777);
    setfacl(&["-d", "-m", &format!("u::rwx,u:{SOMEBODY}:rwx,g::rx,o::-")], &directory);
    let script = "umask 077 && : > file && mkdir sub";
    run(Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups", "sh", "-c", script])
        .current_dir(&directory));
    let file = ["user::rw-", "user:60001:rwx", "group::r-x", "mask::rw-", "other::---"];
    assert_eq!(
        getfacl(&directory.join("file")),
        file.map(str::to_owned).into(),
        "the umask does not count"
    );
    assert_eq!(
        (mode(directory.join("file")), owner(directory.join("file"))),
        (0o660, (NOBODY, NOBODY))
    );
    let defaults = getfacl(&directory.join("sub"))
        .into_iter()
        .filter(|line| line.starts_with("default:"))
        .count();
    assert_eq!((defaults, mode(directory.join("sub"))), (5, 0o770));
    fs::write(directory.join("file"), "x").unwrap();
    assert_eq!(as_user(SOMEBODY, &[], || fs::read(directory.join("file"))).unwrap(), b"x");
    assert_eq!(errno(as_user(TEAM, &[], || File::open(directory.join("file")))), Errno::ACCESS);
}

#[test]
fn an_acl_is_set_by_the_owner_only() {
    let pool = shared_pool();
    let path = pool.join("file");
    touch(&path);
    setfacl(&["-m", &format!("u:{SOMEBODY}:r")], &path);
    let mut acl = [0_u8; 256];
    let length = rustix::fs::getxattr(&path, "system.posix_acl_access", &mut acl[..]).unwrap();
    let other = pool.join("other");
    touch(&other);
    let set_it = || set(&other, "system.posix_acl_access", &acl[..length]);
    assert_eq!(as_user(NOBODY, &[], set_it), Err(Errno::PERM));
    chown(&other, Some(NOBODY), None).unwrap();
    assert_eq!(as_user(NOBODY, &[], set_it), Ok(()));
    assert_eq!(getfacl(&other), getfacl(&path));
}

/// posix_acl_update_mode(): setting an access ACL is a chmod.
#[test]
fn setting_an_acl_from_outside_the_group_clears_set_group_id() {
    let pool = shared_pool();
    let path = pool.join("file");
    touch(&path);
    setfacl(&["-m", &format!("u:{SOMEBODY}:rx")], &path);
    let mut acl = [0_u8; 256];
    let length = rustix::fs::getxattr(&path, "system.posix_acl_access", &mut acl[..]).unwrap();
    chown(&path, Some(NOBODY), Some(TEAM)).unwrap();
    let set_it = || set(&path, "system.posix_acl_access", &acl[..length]).unwrap();
    chmod(&path, 0o2755);
    as_user(NOBODY, &[TEAM], set_it);
    assert_eq!(mode(&path) & 0o2000, 0o2000, "a member keeps it");
    as_user(NOBODY, &[], set_it);
    assert_eq!(mode(&path) & 0o2000, 0);
}

// ---- names --------------------------------------------------------------------------------------

#[test]
fn names_of_255_bytes_are_the_longest() {
    let pool = Pool::small(1);
    let (longest, longer) = (pool.join("n".repeat(255)), pool.join("n".repeat(256)));
    fs::write(&longest, "x").unwrap();
    assert_eq!(fs::read(&longest).unwrap(), b"x");
    assert_eq!(names(pool.path()), [vec![b'n'; 255]]);
    fs::rename(&longest, pool.join("m".repeat(255))).unwrap();
    fs::create_dir(&longest).unwrap();
    fs::remove_dir(&longest).unwrap();
    let short = pool.join("short");
    touch(&short);
    assert_eq!(errno(File::create(&longer)), Errno::NAMETOOLONG);
    assert_eq!(errno(fs::metadata(&longer)), Errno::NAMETOOLONG);
    assert_eq!(errno(fs::create_dir(&longer)), Errno::NAMETOOLONG);
    assert_eq!(errno(symlink("x", &longer)), Errno::NAMETOOLONG);
    assert_eq!(errno(fs::hard_link(&short, &longer)), Errno::NAMETOOLONG);
    assert_eq!(errno(fs::rename(&short, &longer)), Errno::NAMETOOLONG);
    assert_eq!(errno(fs::remove_file(&longer)), Errno::NAMETOOLONG);
}

#[test]
fn names_are_bytes() {
    let pool = Pool::small(1);
    let wild: [&[u8]; 6] = [b"\xff\xfe", b"\x80", b"a\nb", b" ", b"\x01\t", b"...."];
    for name in wild {
        touch(pool.join(OsStr::from_bytes(name)));
    }
    let mut expected: Vec<_> = wild.iter().map(|name| name.to_vec()).collect();
    expected.sort();
    assert_eq!(names(pool.path()), expected);
    for name in wild {
        let moved = [name, b"-moved"].concat();
        fs::rename(pool.join(OsStr::from_bytes(name)), pool.join(OsStr::from_bytes(&moved)))
            .unwrap();
        fs::remove_file(pool.join(OsStr::from_bytes(&moved))).unwrap();
    }
    assert!(names(pool.path()).is_empty());
}

// ---- reading directories ------------------------------------------------------------------------

/// Name, inode number, type, and the offset of the next entry.
type Entry = (Vec<u8>, u64, FileType, u64);

/// The entries of a directory from its present offset on.
fn entries(directory: impl AsFd) -> Vec<Entry> {
    let mut entries = Vec::new();
    each_entry(directory, |entry| {
        entries.push(entry);
        true
    });
    entries
}

fn each_entry(directory: impl AsFd, mut see: impl FnMut(Entry) -> bool) {
    let mut buffer = Vec::with_capacity(4 << 10);
    let mut reader = RawDir::new(directory, buffer.spare_capacity_mut());
    while let Some(entry) = reader.next() {
        let entry = entry.expect("readable");
        let name = entry.file_name().to_bytes().to_vec();
        if !see((name, entry.ino(), entry.file_type(), entry.next_entry_cookie())) {
            break;
        }
    }
}

#[test]
fn entries_say_the_inode_number_and_type_that_stat_says() {
    let pool = Pool::small(1);
    let directory = pool.join("d");
    fs::create_dir_all(directory.join("sub")).unwrap();
    fs::write(directory.join("file"), "x").unwrap();
    fs::hard_link(directory.join("file"), directory.join("second")).unwrap();
    symlink("file", directory.join("link")).unwrap();
    mkfifo(directory.join("fifo"));
    let _listener = UnixListener::bind(directory.join("socket")).unwrap();
    node(directory.join("device"), FileType::CharacterDevice, makedev(1, 3)).unwrap();
    let found = entries(open_directory(&directory));
    assert_eq!(found.len(), 9);
    for (name, ino, kind, _) in found {
        let stat = rustix::fs::lstat(directory.join(OsStr::from_bytes(&name))).unwrap();
        assert_eq!(
            (ino, kind),
            (stat.st_ino, FileType::from_raw_mode(stat.st_mode)),
            "{}",
            support::text(&name)
        );
    }
}

#[test]
fn above_the_root_there_is_only_the_root() {
    let pool = Pool::small(1);
    let found: BTreeMap<_, _> =
        entries(open_directory(pool.path())).into_iter().map(|entry| (entry.0, entry.1)).collect();
    assert_eq!(
        found,
        [(b".".to_vec(), inode(pool.path())), (b"..".to_vec(), inode(pool.path()))].into()
    );
}

#[test]
fn lasting_entries_appear_once_while_others_come_and_go() {
    const COUNT: usize = 5000;
    let pool = Pool::small(1);
    let directory = pool.join("d");
    fs::create_dir(&directory).unwrap();
    (0..COUNT).for_each(|n| touch(directory.join(format!("keep{n}"))));
    let done = AtomicBool::new(false);
    let churn = || {
        for n in (0..).take_while(|_| !done.load(Ordering::Relaxed)) {
            let path = directory.join(format!("churn{}", n % 50));
            if n / 50 % 2 == 0 { touch(path) } else { fs::remove_file(path).unwrap() }
        }
    };
    std::thread::scope(|scope| {
        let churning = [scope.spawn(churn)];
        for _ in 0..5 {
            let mut kept: Vec<_> =
                entries(open_directory(&directory)).into_iter().map(|entry| entry.0).collect();
            kept.retain(|name| name.starts_with(b"keep"));
            let distinct: BTreeSet<_> = kept.iter().collect();
            if (kept.len(), distinct.len()) != (COUNT, COUNT) {
                done.store(true, Ordering::Relaxed);
                panic!("{} entries, {} distinct", kept.len(), distinct.len());
            }
        }
        assert!(churning.iter().all(|thread| !thread.is_finished()));
        done.store(true, Ordering::Relaxed);
    });
}

#[test]
fn a_reader_that_renames_what_it_reads_comes_to_an_end() {
    const COUNT: usize = 1000;
    let pool = Pool::small(1);
    let directory = pool.join("d");
    fs::create_dir(&directory).unwrap();
    (0..COUNT).for_each(|n| touch(directory.join(format!("old{n}"))));
    let (mut seen, mut originals) = (0, BTreeSet::new());
    each_entry(open_directory(&directory), |(name, ..)| {
        if name.starts_with(b".") {
            return true;
        }
        seen += 1;
        let new = directory.join(format!("new{seen}"));
        fs::rename(directory.join(OsStr::from_bytes(&name)), new).unwrap();
        if name.starts_with(b"old") {
            originals.insert(name);
        }
        seen < 10 * COUNT
    });
    assert_eq!(originals.len(), COUNT);
    assert!(seen < 10 * COUNT, "it goes on and on");
    assert_eq!(names(&directory).len(), COUNT);
}

#[test]
fn a_reader_that_removes_what_it_reads_leaves_nothing() {
    const COUNT: usize = 1000;
    let pool = Pool::small(1);
    let directory = pool.join("d");
    fs::create_dir(&directory).unwrap();
    (0..COUNT).for_each(|n| touch(directory.join(format!("{n}"))));
    each_entry(open_directory(&directory), |(name, ..)| {
        if !name.starts_with(b".") {
            fs::remove_file(directory.join(OsStr::from_bytes(&name))).unwrap();
        }
        true
    });
    fs::remove_dir(&directory).unwrap();
}

#[test]
fn reading_goes_on_from_any_place_it_has_been_at() {
    const COUNT: usize = 500;
    let pool = Pool::small(1);
    let directory = pool.join("d");
    fs::create_dir(&directory).unwrap();
    (0..COUNT).for_each(|n| touch(directory.join(format!("{n}"))));
    let open = open_directory(&directory);
    let all = entries(&open);
    assert_eq!(all.len(), COUNT + 2);
    for at in [0, 1, 2, 77, COUNT - 1, COUNT] {
        rustix::fs::seek(&open, SeekFrom::Start(all[at].3)).unwrap();
        assert_eq!(entries(&open), all[at + 1..], "behind entry {at}");
    }
    rustix::fs::seek(&open, SeekFrom::Start(all[COUNT + 1].3)).unwrap();
    assert_eq!(entries(&open), []);
    fs::remove_file(directory.join(OsStr::from_bytes(&all[100].0))).unwrap();
    rustix::fs::seek(&open, SeekFrom::Start(all[100].3)).unwrap();
    assert_eq!(entries(&open), all[101..], "the place of an entry that is gone");
    touch(directory.join("later"));
    rustix::fs::seek(&open, SeekFrom::Start(0)).unwrap();
    let again: BTreeSet<_> = entries(&open).into_iter().map(|entry| entry.0).collect();
    assert!(again.contains(&b"later"[..]) && !again.contains(&all[100].0));
    assert_eq!(again.len(), COUNT + 2);
}

// ---- the filesystem -----------------------------------------------------------------------------

#[test]
fn statfs_counts_pages_and_inodes() {
    let pool = Pool::small(4);
    let stat = || -> StatFs { rustix::fs::statfs(pool.path()).unwrap() };
    let before = stat();
    assert_eq!((before.f_bsize as u64, before.f_frsize as u64), (FOLIO, FOLIO));
    assert_eq!((before.f_blocks, before.f_bfree, before.f_bavail), (4, 4, 4));
    assert_eq!((before.f_type as u64, before.f_namelen), (0x6573_5546, 255));
    assert!(before.f_ffree > 0 && before.f_ffree < before.f_files);
    fs::write(pool.join("file"), "x").unwrap();
    let after = stat();
    assert_eq!((after.f_blocks, after.f_bfree, after.f_bavail), (4, 3, 3));
    assert_eq!((after.f_files, after.f_ffree), (before.f_files, before.f_ffree - 1));
}

/// Sets the limit of inodes of the daemon's tree to their number plus `more`.
fn leave_room_for(pool: &Pool, more: u64) {
    let now = rustix::fs::statvfs(pool.path()).unwrap();
    let tree = format!("/proc/{}/root/index", pool.daemon().pid);
    let mount = fspick(CWD, &tree, FsPickFlags::FSPICK_CLOEXEC).unwrap();
    fsconfig_set_string(mount.as_fd(), "nr_inodes", (now.f_files - now.f_ffree + more).to_string())
        .unwrap();
    fsconfig_reconfigure(mount.as_fd()).unwrap();
}

#[test]
fn a_full_tree_refuses_new_names_and_lets_go_of_old_ones() {
    let pool = Pool::small(2);
    let path = |name: &str| pool.join(name);
    fs::write(path("kept"), [7; 5000]).unwrap();
    fs::hard_link(path("kept"), path("link")).unwrap();
    fs::create_dir(path("directory")).unwrap();
    symlink("kept", path("symlink")).unwrap();
    leave_room_for(&pool, 2);
    fs::write(path("one"), "").unwrap();
    fs::write(path("two"), "").unwrap();
    assert_eq!(errno(File::create_new(path("three"))), Errno::NOSPC);
    assert_eq!(errno(fs::hard_link(path("one"), path("three"))), Errno::NOSPC);
    let kept = File::open(path("kept")).unwrap();
    for name in ["kept", "link", "symlink", "one", "two"] {
        fs::remove_file(path(name)).unwrap();
        assert_eq!(errno(fs::symlink_metadata(path(name))), Errno::NOENT, "{name}");
    }
    fs::remove_dir(path("directory")).unwrap();
    let mut bytes = [0; 5000];
    kept.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!((bytes, kept.metadata().unwrap().nlink()), ([7; 5000], 0));
    drop(kept);
    pool.wait_for_orphans();
    for number in 0..6 {
        fs::write(path(&number.to_string()), "").unwrap();
    }
    assert_eq!(errno(File::create_new(path("seven"))), Errno::NOSPC);
    pool.check();
    pool.unmount();
}
