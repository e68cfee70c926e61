//! File handles (name_to_handle_at(2), open_by_handle_at(2)) of files on a mount.

use crate::support::{Pool, kill_worker};
use hugetlb2fs::error::{Error, Result};
use hugetlb2fs::sys::handle::Handle;
use rustix::fs::{CWD, Mode, OFlags, open, symlinkat};
use rustix::io::Errno;
use std::ffi::CString;
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

fn handle_of(path: &Path) -> Handle {
    let path = CString::new(path.as_os_str().as_bytes()).unwrap();
    Handle::of(CWD, &path).unwrap_or_else(|error| panic!("{path:?}: {error}"))
}

fn opened(pool: &Pool, handle: Handle) -> Result<OwnedFd> {
    handle.open(File::open(pool.path()).unwrap(), libc::O_RDONLY)
}

fn path_of(fd: &OwnedFd) -> PathBuf {
    fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap()
}

/// Makes the kernel forget the names and inodes that no program uses, and so all earlier look-ups.
fn drop_caches() {
    fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
}

#[test]
fn a_handle_outlives_caches_workers_and_names() {
    let pool = Pool::small(8);
    let (directory, file) = (pool.join("a/b/c"), pool.join("a/b/file"));
    fs::create_dir_all(&directory).unwrap();
    fs::write(&file, "bytes").unwrap();
    fs::write(pool.join("open"), "open").unwrap();
    let handles = [&directory, &file, &pool.path(), &pool.join("open")].map(|path| handle_of(path));
    let [of_directory, of_file, of_root, of_open] = handles;
    let open = File::open(pool.join("open")).unwrap();
    fs::remove_file(pool.join("open")).unwrap();
    fs::rename(&file, pool.join("a/moved")).unwrap();
    kill_worker(&pool);
    drop_caches();
    let mut text = String::new();
    File::from(opened(&pool, of_file).unwrap()).read_to_string(&mut text).unwrap();
    assert_eq!(text, "bytes", "it is found under whatever name");
    assert_eq!(
        path_of(&opened(&pool, of_directory).unwrap()),
        directory,
        "its parents are looked up by .."
    );
    assert_eq!(path_of(&opened(&pool, of_root).unwrap()), pool.path());
    let mut text = String::new();
    File::from(opened(&pool, of_open).unwrap()).read_to_string(&mut text).unwrap();
    assert_eq!(text, "open", "a file without a name is found as long as it is open");
    drop(open);
    fs::remove_file(pool.join("a/moved")).unwrap();
    drop_caches();
    for gone in [of_open, of_file] {
        assert!(matches!(opened(&pool, gone), Err(Error::Os(Errno::STALE))), "{gone:?}");
    }
    pool.check();
    pool.unmount();
}

/// Turns a handle of an inode in the daemon's own tmpfs into the handle that a FUSE mount would
/// have for it.
fn forged(of_inode: Handle) -> Handle {
    const FUSE: i32 = 0x81; // FILEID_INO64_GEN: node id, high half first, and generation
    let [generation, inode, _] = of_inode.words;
    Handle::new(FUSE, [generation, inode, 0])
}

#[test]
fn a_forged_handle_opens_nothing_beside_the_tree() {
    let pool = Pool::small(8);
    let index = PathBuf::from(format!("/proc/{}/root/index", pool.daemon().pid));
    fs::write(pool.join("file"), "bytes").unwrap();
    fs::create_dir(pool.join("directory")).unwrap();
    let (removed, path) =
        (File::open(pool.join("directory")).unwrap(), OFlags::PATH | OFlags::NOFOLLOW);
    fs::remove_dir(pool.join("directory")).unwrap();
    symlinkat("found", CWD, index.join(".witnesses/12345")).unwrap();
    let real = forged(handle_of(&index.join("tree/file")));
    assert_eq!(real, handle_of(&pool.join("file")), "this is how such a handle is made up");
    drop_caches();
    let mut text = String::new();
    File::from(opened(&pool, real).unwrap()).read_to_string(&mut text).unwrap();
    assert_eq!(text, "bytes");
    for hidden in ["", "tree", ".orphans", ".witnesses", ".witnesses/12345", "handover"] {
        let inode = open(index.join(hidden), path, Mode::empty()).unwrap();
        let handle = forged(Handle::of(&inode, c"").unwrap());
        let answer = handle.open(File::open(pool.path()).unwrap(), libc::O_PATH);
        assert!(matches!(answer, Err(Error::Os(Errno::STALE))), "/index/{hidden}: {answer:?}");
    }
    drop(removed);
    pool.check();
    pool.unmount();
}
