//! The daemon's log. Calls do not wait for it, users cannot fill it, and the daemon finds it again.

use crate::support;
use crate::support::place::Namespace;
use crate::support::{
    Daemon, POISON, Pool, await_text, counters, get, hugetlb2, kill_worker, limits, mount_hugetlb2,
    poison, run, set, status_and_error,
};
use rustix::fs::{CWD, FileType, Gid, Mode, Uid, chownat, fsetxattr, mknodat};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};
use std::fs::{File, OpenOptions, Permissions};
use std::io::{Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

const SMALL: &str = "size=16M,pagesize=2M,mode=1777";
const NOBODY: u32 = 65534;
/// The limit for a line, and for a call that must not wait for the log.
const LIMIT: Duration = limits::ANSWER;

/// Runs `call` in a thread of its own. If the limit passes, the thread stays behind.
fn in_time<T: Send + 'static>(what: &str, call: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, answer) = mpsc::channel();
    std::thread::spawn(move || sender.send(call()));
    answer.recv_timeout(LIMIT).unwrap_or_else(|_| panic!("{what}: no answer within {LIMIT:?}"))
}

/// Makes users, from number 10,000 on, send `times` requests each that the worker refuses, on a
/// file that they may write.
fn be_refused(file: &Path, users: u32, times: u32) {
    let file = OpenOptions::new().read(true).write(true).open(file).unwrap();
    for user in 10_000..10_000 + users {
        let file = file.try_clone().unwrap();
        in_time("refused requests", move || {
            rustix::thread::set_thread_uid(Uid::from_raw(user)).unwrap();
            for _ in 0..times {
                let refused = fsetxattr(
                    &file,
                    "user.hugetlb2.none",
                    b"value",
                    rustix::fs::XattrFlags::empty(),
                );
                assert_eq!(refused, Err(Errno::OPNOTSUPP));
            }
        });
    }
}

/// Makes a file that all users may write.
fn open_file(directory: &Path) -> PathBuf {
    let file = directory.join("file");
    std::fs::write(&file, vec![7; 4096]).unwrap();
    std::fs::set_permissions(&file, Permissions::from_mode(0o666)).unwrap();
    file
}

/// Makes calls as a user of the filesystem and as an administrator.
fn use_it(file: &Path) {
    let (file, directory) = (file.to_owned(), file.parent().unwrap().to_owned());
    in_time("a quarantine, a read and a look at the counters", move || {
        poison(&file, 0, 4096).unwrap();
        assert_eq!(std::fs::read(&file).unwrap_err().raw_os_error(), Some(5));
        assert_eq!(counters(&directory)["quarantined_soft"], 1);
        set(&file, support::REPAIR, "zero all").unwrap();
    });
}

// ---- the system log -----------------------------------------------------------------------------

/// A mount namespace with a pool in it. Its /dev has no system log but the test's.
struct Machine {
    namespace: Namespace,
    directory: tempfile::TempDir,
}

impl Machine {
    fn start() -> Self {
        const DEVICES: &str = "mount -t tmpfs dev /dev
            mknod /dev/null c 1 3; mknod /dev/fuse c 10 229";
        Self { namespace: Namespace::prepared_by(DEVICES), directory: tempfile::tempdir().unwrap() }
    }

    fn see(&self, path: &Path) -> PathBuf {
        self.namespace.path(path)
    }

    /// Starts a system log, which replaces an earlier one.
    fn listen(&self) -> UnixDatagram {
        let path = self.see(Path::new("/dev/log"));
        let _ = std::fs::remove_file(&path);
        let log = UnixDatagram::bind(path).expect("a socket");
        log.set_read_timeout(Some(LIMIT)).unwrap();
        log
    }

    /// Mounts a pool, and returns its path from outside of the namespace.
    fn mount(&self) -> PathBuf {
        let mut mount = self.namespace.command(hugetlb2().get_program().to_str().expect("a path"));
        mount.arg("mount");
        run(mount.arg("source").arg(self.directory.path()).args(["-o", SMALL]));
        self.see(self.directory.path())
    }
}

/// Reads lines until one has `text` in it.
fn await_line(log: &UnixDatagram, text: &str) -> String {
    let mut line = [0; 4096];
    loop {
        let length = log
            .recv(&mut line)
            .unwrap_or_else(|error| panic!("no line with {text:?} has come: {error}"));
        let line = support::text(&line[..length]);
        if line.contains(text) {
            return line;
        }
    }
}

#[test]
fn a_system_log_that_hangs_keeps_no_call_waiting() {
    let machine = Machine::start();
    let log = machine.listen();
    let pool = machine.mount();
    let daemon = Daemon::of(&pool);
    let file = open_file(&pool);
    be_refused(&file, 40, 60);
    use_it(&file);
    assert!(counters(&pool)["log_lines_dropped"] > 0);
    // Now the log reads on: it gets the number of lost messages, and loses no more.
    await_line(&log, "messages dropped: the log did not take them");
    assert_eq!(set(&file, POISON, "a last word"), Err(Errno::INVAL));
    let line = await_line(&log, "a last word");
    assert!(line.starts_with("<30>hugetlb2fsd["), "{line}");
    drop(machine);
    assert!(daemon.ends_within(LIMIT.as_secs()), "the daemon waits for its log");
}

#[test]
fn a_hanging_log_does_not_keep_a_daemon_from_ending() {
    let machine = Machine::start();
    let _log = machine.listen();
    let pool = machine.mount();
    let daemon = Daemon::of(&pool);
    be_refused(&open_file(&pool), 1, 40);
    drop(machine);
    assert!(daemon.ends_within(LIMIT.as_secs()), "the daemon waits for its log");
}

#[test]
fn a_system_log_that_was_restarted_is_found() {
    let machine = Machine::start();
    let first = machine.listen();
    let pool = machine.mount();
    let file = open_file(&pool);
    await_line(&first, "8 pages of");
    drop(first);
    let second = machine.listen();
    assert_eq!(set(&file, POISON, "the second"), Err(Errno::INVAL));
    await_line(&second, "the second");
    drop(second);
    assert_eq!(set(&file, POISON, "while none listens"), Err(Errno::INVAL));
    await_none_waiting(&pool);
    let third = machine.listen();
    assert_eq!(set(&file, POISON, "the third"), Err(Errno::INVAL));
    await_line(&third, "the third");
    await_line(&third, "1 messages dropped");
}

/// Waits until the daemon has dropped a line.
fn await_none_waiting(pool: &Path) {
    limits::until(limits::ANSWER, "the line to be given up", || {
        counters(pool)["log_lines_dropped"] > 0
    });
}

// ---- a file -------------------------------------------------------------------------------------

#[test]
fn a_signal_has_a_rotated_log_opened_anew() {
    let place = tempfile::tempdir().unwrap();
    let log = place.path().join("log");
    let pool = Pool::mount(&format!("{SMALL},log={}", log.display()));
    let file = open_file(&pool.path());
    await_text(&log, "8 pages of");
    std::fs::rename(&log, place.path().join("log.1")).unwrap();
    kill_process(Pid::from_raw(pool.daemon().pid).unwrap(), Signal::USR1).unwrap();
    limits::until(limits::ANSWER, "a new log after SIGUSR1", || log.exists());
    assert_eq!(set(&file, POISON, "to the new file"), Err(Errno::INVAL));
    await_text(&log, "to the new file");
    kill_worker(&pool);
    assert_eq!(set(&file, POISON, "by the next worker"), Err(Errno::INVAL));
    await_text(&log, "by the next worker");
    let old = std::fs::read_to_string(place.path().join("log.1")).unwrap();
    assert!(!old.contains("new file") && !old.contains("next worker"), "{old}");
    pool.unmount();
}

#[test]
fn a_fifo_that_is_not_read_keeps_no_call_waiting() {
    let place = tempfile::tempdir().unwrap();
    let log = place.path().join("log");
    mknodat(CWD, &log, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    let options = format!("{SMALL},log={}", log.display());
    let pool = in_time("the mount", move || Pool::mount(&options));
    let file = open_file(&pool.path());
    be_refused(&file, 40, 60);
    use_it(&file);
    let mut reader =
        OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&log).unwrap();
    let mut lines = vec![0; 1 << 20];
    let length = reader.read(&mut lines).unwrap();
    assert!(
        support::text(&lines[..length])
            .contains("user 10000: \"user.hugetlb2.none\" \"value\" refused")
    );
    pool.unmount();
}

#[test]
fn a_full_disk_costs_lines_and_nothing_else() {
    let place = tempfile::tempdir().unwrap();
    let disk = place.path().join("disk");
    std::fs::create_dir(&disk).unwrap();
    run(Command::new("mount").args(["-t", "tmpfs", "-o", "size=64k,mode=755", "disk"]).arg(&disk));
    let log = disk.join("log");
    let pool = Pool::mount(&format!("{SMALL},log={}", log.display()));
    await_text(&log, "8 pages of");
    let full = File::create(disk.join("full")).unwrap().write_all(&[0; 1 << 20]);
    assert_eq!(full.unwrap_err().raw_os_error(), Some(28));
    let file = open_file(&pool.path());
    be_refused(&file, 10, 60);
    use_it(&file);
    std::fs::remove_file(disk.join("full")).unwrap();
    // The first lines for which there is room tell of the dropped lines.
    assert_eq!(set(&file, POISON, "room again"), Err(Errno::INVAL));
    await_text(&log, "room again");
    await_text(&log, "messages dropped: the log did not take them");
    pool.unmount();
    run(Command::new("umount").arg(&disk));
}

#[test]
fn a_log_that_others_can_put_elsewhere_is_refused() {
    let place = tempfile::tempdir().unwrap();
    let make = |name: &str, mode: u32, owner: u32| {
        let directory = place.path().join(name);
        std::fs::create_dir(&directory).unwrap();
        std::fs::set_permissions(&directory, Permissions::from_mode(mode)).unwrap();
        chownat(
            CWD,
            &directory,
            Some(Uid::from_raw(owner)),
            Some(Gid::ROOT),
            rustix::fs::AtFlags::empty(),
        )
        .unwrap();
        directory
    };
    let target = place.path().join("target");
    std::fs::write(&target, "precious").unwrap();
    let [mine, foreign, open, sticky] = [
        make("mine", 0o755, 0),
        make("foreign", 0o755, NOBODY),
        make("open", 0o777, 0),
        make("sticky", 0o1777, 0),
    ];
    symlink(&target, mine.join("link")).unwrap();
    std::fs::write(sticky.join("file"), "").unwrap();
    std::os::unix::fs::chown(sticky.join("file"), Some(NOBODY), None).unwrap();
    std::fs::hard_link(&target, sticky.join("hard")).unwrap();
    for (log, why) in [
        (mine.join("link"), "it is a symbolic link"),
        (foreign.join("log"), "its directory belongs to user 65534"),
        (open.join("log"), "all users can write to its directory"),
        (sticky.join("file"), "is not root's alone"),
        (sticky.join("hard"), "is not root's alone"),
    ] {
        let mount_point = make(&format!("mnt-{}", log.file_name().unwrap().display()), 0o755, 0);
        let mut mount = mount_hugetlb2();
        mount
            .arg("source")
            .arg(&mount_point)
            .arg("-o")
            .arg(format!("{SMALL},log={}", log.display()));
        let (status, error) = status_and_error(&mut mount);
        let _ = rustix::mount::unmount(&mount_point, rustix::mount::UnmountFlags::DETACH);
        std::fs::remove_dir(&mount_point).unwrap();
        assert_eq!(status, 32, "{}: {error}", log.display());
        assert!(
            error.contains("option log: ") && error.contains(why),
            "{}: {error}",
            log.display()
        );
    }
    assert_eq!(std::fs::read_to_string(&target).unwrap(), "precious");
    Pool::mount(&format!("{SMALL},log={}", sticky.join("log").display())).unmount();
}

// ---- texts and floods from users ----------------------------------------------------------------

#[test]
fn a_users_text_cannot_forge_a_line() {
    let pool = Pool::mount(SMALL);
    let file = open_file(&pool.path());
    let forged = "user.hugetlb2.x\n1900000000 hugetlb2fsd[1] ERROR: memory error\x1b[2J";
    assert_eq!(set(&file, forged, "value"), Err(Errno::OPNOTSUPP));
    assert_eq!(set(&file, POISON, "0 1\n1900000000 hugetlb2fsd[1] ERROR: also"), Err(Errno::INVAL));
    assert_eq!(set(&file, POISON, "a last word"), Err(Errno::INVAL));
    let log = pool.await_log("a last word");
    let start = |line: &str| line.split(' ').nth(1).is_some_and(|word| word == "hugetlb2fsd[1]");
    assert!(!log.lines().any(start), "{log}");
    assert!(
        log.contains(r"user.hugetlb2.x\n1900000000 hugetlb2fsd[1] ERROR: memory error\x1b[2J"),
        "{log}"
    );
}

#[test]
fn one_user_cannot_fill_the_log() {
    let pool = Pool::mount(SMALL);
    let file = open_file(&pool.path());
    let before = pool.log().len();
    for _ in 0..200 {
        assert_eq!(set(&file, support::REPAIR, [1; 65_000]), Err(Errno::INVAL));
    }
    be_refused(&file, 1, 1); // another user has a limit of its own
    pool.await_log("user 10000: ");
    let log = pool.await_log("more messages suppressed that are like: ");
    assert!(log.len() - before < 100 << 10, "{} bytes", log.len() - before);
    assert!(log.contains(" and 64900 bytes more refused: "), "{log}");
}

#[test]
fn an_ioctl_that_is_not_known_is_enotty_and_no_line() {
    let pool = Pool::mount(SMALL);
    let path = open_file(&pool.path());
    let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let directory = File::open(pool.path()).unwrap();
    pool.await_log("8 pages of");
    let before = pool.log();
    for _ in 0..100 {
        assert_eq!(rustix::termios::tcgetattr(&file).err(), Some(Errno::NOTTY));
        assert_eq!(rustix::termios::tcgetattr(&directory).err(), Some(Errno::NOTTY));
    }
    assert_eq!(set(&path, POISON, "a last word"), Err(Errno::INVAL));
    let log = pool.await_log("a last word");
    assert_eq!(log.lines().count(), before.lines().count() + 1, "{log}");
    assert!(get(pool.path(), support::CHECK).is_ok());
}
