//! The protocol of the mount helper (mount(8), "external helpers"), and a pool's life from mount to
//! unmount.

use crate::support::limits;
use crate::support::place::{Namespace, Place};
use crate::support::{
    CHECK, Daemon, FOLIO, OPTIONS, Pool, REFUSAL, SIZE, Toucher, await_text, counters, end, get,
    hugetlb2, kill_worker, mount_hugetlb2, run, set, start_until, status_and_error, text,
    umount_hugetlb2,
};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

/// Eight pages of 2 MiB.
const SMALL: &str = "size=16M,pagesize=2M";

/// Exit statuses of `mount` (mount(8), "exit status").
const USAGE: i32 = 1;
const SYSTEM: i32 = 2;
const INTERRUPTED: i32 = 8;
const FAILED: i32 = 32;

// ---- where tests mount --------------------------------------------------------------------------

fn memory_available() -> u64 {
    hugetlb2fs::sys::memory_available().expect("/proc/meminfo")
}

/// Writes a file from another process. A child that this process forks has each open file of this
/// process open until it executes, and the mount is busy for this time.
fn write_from_outside(file: &Path) {
    run(Command::new("sh").args(["-c", "echo text > \"$0\""]).arg(file));
}

fn signal(pid: i32, signal: Signal) {
    kill_process(Pid::from_raw(pid).expect("a process id"), signal).expect("it runs");
}

// ---- options ------------------------------------------------------------------------------------

#[test]
fn each_wrong_option_is_refused_with_the_right_form() {
    let place = Place::new();
    for (options, word) in [
        ("pagesize=2M", "option size is required"),
        ("size=0", "option size: a size of 0 bytes is less than one page of 1G"),
        ("size=1M,pagesize=2M", "less than one page of 2M"),
        ("size=1Q", "option size: \"1Q\" is not a size"),
        ("size=", "option size: \"\" is not a size"),
        ("size=-1", "is not a size"),
        ("size=0%", "is not a size"),
        ("size=101%", "is not a size"),
        ("size=99999999999T", "more than any machine has"),
        ("size", "option size needs a value: size=SIZE"),
        ("size=16M,pagesize=3M", "option pagesize: \"3M\" is not a page size: 1G or 2M"),
        ("size=16M,pagesize=2M,mode=999", "option mode: \"999\" is not a mode: an octal number"),
        ("size=16M,pagesize=2M,uid=x", "option uid: \"x\" is not a numeric"),
        ("size=16M,pagesize=2M,gid=-1", "option gid: \"-1\" is not a numeric"),
        ("size=16M,pagesize=2M,collapse=maybe", "option collapse: \"maybe\" is neither on nor off"),
        ("size=16M,pagesize=2M,cpu=0", "option cpu: \"0\" is not from 1% to 100%"),
        ("size=16M,pagesize=2M,cpu=101%", "option cpu: \"101%\" is not from 1% to 100%"),
        (
            "size=16M,pagesize=2M,frobnicate",
            "unknown option \"frobnicate\"; there are size, nodes, pagesize",
        ),
        ("size=16M,pagesize=2M,szie=1G", "unknown option \"szie\""),
        ("size=16M,pagesize=2M,user_id=7", "unknown option \"user_id\""),
    ] {
        place.assert_refused(&mut place.mount(options), USAGE, word);
    }
    let mut relative = mount_hugetlb2();
    relative.arg("source").arg(place.mount_point()).args(["-o", SMALL, "-o", "log=relative"]);
    place.assert_refused(&mut relative, USAGE, "option log: \"relative\" is not an absolute path");
}

#[test]
fn a_wrong_command_line_is_a_usage_error() {
    let place = Place::new();
    place.assert_refused(&mut mount_hugetlb2(), USAGE, "Usage: mount.hugetlb2 NAME DIR");
    place.assert_refused(mount_hugetlb2().arg("source"), USAGE, "DIR");
    place.assert_refused(place.mount(SMALL).arg("-x"), USAGE, "-x");
    place.assert_refused(umount_hugetlb2().arg("-x"), USAGE, "-x");
}

#[test]
fn the_help_names_every_option_and_every_exit_status() {
    let help = run(mount_hugetlb2().arg("--help"));
    let help_in_one_line = help.split_ascii_whitespace().collect::<Vec<_>>().join(" ");
    for row in hugetlb2fs::options::TABLE {
        assert!(help.contains(&format!("  {}={}", row.name, row.value)), "{}", row.name);
    }
    let statuses = "0 mounted, 1 wrong usage, 2 system error, 4 internal error, 8 interrupted, 32 mount failed";
    assert!(help_in_one_line.contains(statuses), "{help}");
}

#[test]
fn sloppy_ignores_unknown_options_and_still_checks_ours() {
    let place = Place::new();
    place.assert_refused(place.mount("size=1Q,frobnicate").arg("-s"), USAGE, "option size");
    place.assert_refused(place.mount("frobnicate").arg("-s"), USAGE, "option size is required");
    run(place.mount(&format!("{SMALL},frobnicate,color=blue")).arg("-s"));
    assert!(place.mount_info().is_some());
}

#[test]
fn options_for_other_programs_and_accepted_flags_do_nothing() {
    let place = Place::new();
    let options =
        format!("defaults,noauto,nofail,_netdev,x-systemd.automount,x-a=b,comment=c,{SMALL}");
    run(place.mount(&options).args(["-n", "-t", "hugetlb2"]));
    assert_eq!(counters(&place.mount_point())["pages_total"], 8);
}

#[test]
fn fake_checks_everything_and_mounts_nothing() {
    let place = Place::new();
    run(place.mount(SMALL).arg("-f"));
    place.assert_nothing_is_left();
    assert!(!place.log().exists(), "a daemon was started");
    place.assert_refused(place.mount("size=1Q").arg("-f"), USAGE, "option size");
    place.assert_refused(
        place.mount_at(&place.join("missing"), SMALL).arg("-f"),
        FAILED,
        "No such file or directory",
    );
}

#[test]
fn the_roots_mode_and_owner_are_as_asked() {
    let place = Place::new();
    run(&mut place.mount(&format!("{SMALL},mode=1770,uid=1234,gid=4321")));
    let root = place.mount_point().metadata().unwrap();
    assert_eq!((root.permissions().mode(), root.uid(), root.gid()), (0o41770, 1234, 4321));
    let plain = Place::new();
    run(&mut plain.mount(SMALL));
    let root = plain.mount_point().metadata().unwrap();
    assert_eq!((root.permissions().mode(), root.uid(), root.gid()), (0o40755, 0, 0));
}

#[test]
fn generic_flags_reach_the_kernel() {
    let place = Place::new();
    run(&mut place.mount(&format!("ro,nosuid,nodev,noexec,noatime,{SMALL}")));
    assert_eq!(place.mount_info().unwrap().flags, "ro,nosuid,nodev,noexec,noatime");
    let refused = File::create(place.mount_point().join("file")).unwrap_err();
    assert_eq!(Errno::from_io_error(&refused), Some(Errno::ROFS));
}

#[test]
fn a_source_is_a_name_and_cannot_bring_options_in() {
    let place = Place::new();
    let plain = Place::new();
    let source = "a b,max_read=4096,user_id=7,\\ro";
    run(mount_hugetlb2().arg(source).arg(place.mount_point()).args(["-o", &place.with_log(SMALL)]));
    run(&mut plain.mount(SMALL));
    let (found, expected) = (place.mount_info().unwrap(), plain.mount_info().unwrap());
    assert_eq!((found.source.as_str(), found.kind.as_str()), (source, "fuse.hugetlb2"));
    assert_eq!((found.flags, found.options), (expected.flags, expected.options));
    std::fs::write(place.mount_point().join("file"), "text").unwrap();
}

// ---- mount points -------------------------------------------------------------------------------

#[test]
fn a_mount_point_must_be_an_empty_directory() {
    let place = Place::new();
    let file = place.join("file");
    std::fs::write(&file, "").unwrap();
    place.assert_refused(
        &mut place.mount_at(&place.join("missing"), SMALL),
        FAILED,
        "missing: No such file",
    );
    place.assert_refused(&mut place.mount_at(&file, SMALL), FAILED, "file: not a directory");
    std::fs::write(place.mount_point().join("inside"), "").unwrap();
    place.assert_refused(&mut place.mount(SMALL), FAILED, "mnt: not empty");
    assert!(!place.log().exists(), "a daemon was started");
    run(&mut place.mount(&format!("{SMALL},nonempty")));
    assert_eq!(place.mount_point().read_dir().unwrap().count(), 0);
}

#[test]
fn a_symbolic_link_to_a_directory_is_followed() {
    let place = Place::new();
    let link = place.join("link");
    symlink(place.mount_point(), &link).unwrap();
    run(&mut place.mount_at(&link, SMALL));
    assert!(place.mount_info().is_some(), "mounted on what the link names");
}

// ---- a system that lacks something --------------------------------------------------------------

#[test]
fn without_the_fuse_device_nothing_starts() {
    let (place, namespace) = (Place::new(), Namespace::new());
    run(namespace.command("mount").args(["-t", "tmpfs", "none", "/dev"]));
    for flag in ["-n", "-f"] {
        let mut mount = namespace.command("/sbin/mount.hugetlb2");
        mount.arg("source").arg(place.mount_point()).args(["-o", &place.with_log(SMALL), flag]);
        place.assert_refused(
            &mut mount,
            SYSTEM,
            "/dev/fuse cannot be opened: No such file or directory",
        );
    }
    assert!(!place.log().exists(), "a daemon was started");
}

#[test]
fn a_false_fuse_device_fails_the_mount_and_leaves_nothing() {
    let (place, namespace) = (Place::new(), Namespace::new());
    run(namespace.command("mount").args(["-t", "tmpfs", "none", "/dev"]));
    run(namespace.command("touch").arg("/dev/fuse"));
    run(namespace.command("mknod").args(["/dev/null", "c", "1", "3"]));
    let mut mount = namespace.command("/sbin/mount.hugetlb2");
    mount.arg("source").arg(place.mount_point()).args(["-o", &place.with_log(SMALL)]);
    place.assert_refused(&mut mount, FAILED, "no filesystem can be made on /dev/fuse: ");
    assert!(
        std::fs::read_to_string(place.log()).unwrap().contains("8 pages"),
        "it had been filled"
    );
    assert!(namespace.mount_info(&place).is_none());
}

#[test]
fn more_memory_than_there_is_is_refused_at_once() {
    let place = Place::new();
    let before = memory_available();
    let total = hugetlb2fs::sys::memory_total().unwrap();
    for size in ["100%".to_owned(), total.to_string(), format!("{}", 64 * total)] {
        let mut mount = place.mount(&format!("size={size},pagesize=2M"));
        mount.env("HUGETLB2_LOG", "debug");
        place.assert_refused(&mut mount, FAILED, "the machine cannot give ");
    }
    let (_, error) = status_and_error(&mut place.mount("size=100%,pagesize=2M"));
    assert!(error.contains("are available now; choose a smaller size="), "{error}");
    let log = std::fs::read_to_string(place.log()).unwrap();
    assert!(log.contains("the machine cannot give ") && !log.contains("bytes taken"), "{log}");
    assert!(before.saturating_sub(memory_available()) < total / 2, "memory is missing");
}

#[test]
fn a_fill_says_in_the_log_how_far_it_is() {
    let place = Place::new();
    run(place.mount("size=128M,pagesize=2M").env("HUGETLB2_LOG", "debug"));
    await_text(&place.log(), " 67108864 bytes taken");
    await_text(&place.log(), " 134217728 bytes taken");
}

#[test]
fn only_root_can_mount() {
    let place = Place::new();
    let mut mount = Command::new("setpriv");
    mount.args([
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        env!("CARGO_BIN_EXE_hugetlb2"),
        "mount",
        "source",
    ]);
    mount.arg(place.mount_point()).args(["-o", &place.with_log(SMALL)]);
    place.assert_refused(&mut mount, USAGE, "only root can mount");
}

#[test]
fn each_capability_that_the_daemon_lacks_is_named() {
    let place = Place::new();
    let needed = [
        "sys_admin",
        "dac_read_search",
        "dac_override",
        "chown",
        "fowner",
        "fsetid",
        "setuid",
        "setgid",
    ];
    for capability in needed.into_iter().chain(["setpcap"]) {
        let mut mount = Command::new("setpriv");
        mount.arg(format!("--bounding-set=-{capability}"));
        mount.args([env!("CARGO_BIN_EXE_hugetlb2"), "mount", "source"]).arg(place.mount_point());
        mount.args(["-o", &place.with_log(SMALL)]);
        let word = format!("started without: CAP_{}\n", capability.to_uppercase());
        place.assert_refused(&mut mount, FAILED, &word);
    }
}

#[test]
fn a_root_directory_that_cannot_be_left_is_named() {
    const SCRIPT: &str = "set -e; root=$0/root; build=$1; shift
        for directory in /bin /lib /lib64 /usr /dev /proc /sys /tmp $build; do
            [ -d $directory ] || continue
            mkdir -p $root$directory
            mount --rbind $directory $root$directory
        done
        exec chroot $root \"$@\"";
    let place = Place::new();
    let build = Path::new(env!("CARGO_BIN_EXE_hugetlb2")).parent().unwrap();
    let mut mount = Command::new("unshare");
    mount.args(["-m", "sh", "-c", SCRIPT]).arg(place.directory.path()).arg(build);
    mount.args([env!("CARGO_BIN_EXE_hugetlb2"), "mount", "source"]).arg(place.mount_point());
    mount.args(["-o", &place.with_log(SMALL)]);
    place.assert_refused(
        &mut mount,
        FAILED,
        "this root directory cannot be left: it is the initramfs, or",
    );
}

#[test]
fn the_daemon_keeps_nothing_open_that_its_starter_had() {
    let place = Place::new();
    let secret = place.join("secret");
    std::fs::write(&secret, "text").unwrap();
    let mut mount = Command::new("sh");
    mount.args(["-c", "exec 7<$0 9>>$0; exec \"$@\""]).arg(&secret);
    mount.args([env!("CARGO_BIN_EXE_hugetlb2"), "mount", "source"]).arg(place.mount_point());
    run(mount.args(["-o", &place.with_log(SMALL)]));
    let processes = place.processes();
    assert_eq!(processes.len(), 2);
    for process in processes {
        let open = std::fs::read_dir(format!("/proc/{process}/fd")).unwrap().map(Result::unwrap);
        let open: Vec<PathBuf> = open.filter_map(|fd| std::fs::read_link(fd.path()).ok()).collect();
        assert!(!open.contains(&secret), "process {process} has it open: {open:?}");
    }
}

// ---- a daemon that does not do its part ---------------------------------------------------------

impl Place {
    /// Runs the helper from a directory of its own, with `script` as the daemon beside it.
    fn mount_with_daemon(&self, script: Option<&str>) -> Command {
        let helper = self.install(Path::new(env!("CARGO_BIN_EXE_hugetlb2")), "hugetlb2");
        if let Some(script) = script {
            let source = self.join("script");
            std::fs::write(&source, format!("#!/bin/sh\n{script}\n")).unwrap();
            self.install(&source, "hugetlb2fsd");
        }
        let mut command = Command::new(helper);
        command
            .arg0("mount.hugetlb2")
            .arg("source")
            .arg(self.mount_point())
            .args(["-o", &self.with_log(SMALL)]);
        command
    }
}

impl Place {
    /// Another process writes the program. If this process wrote it, a child forked meanwhile would
    /// have it open for writing, and a program that is open for writing cannot be executed
    /// (ETXTBSY).
    fn install(&self, source: &Path, name: &str) -> PathBuf {
        run(Command::new("install").args(["-m", "755"]).arg(source).arg(self.join(name)));
        self.join(name)
    }
}

/// Sets `$control` to the descriptor's number.
const FIND_CONTROL: &str =
    "for argument; do case $argument in --control-fd=*) control=${argument#*=};; esac; done\n";

#[test]
fn a_daemon_that_ends_without_a_word_fails_the_mount() {
    let place = Place::new();
    place.assert_refused(
        &mut place.mount_with_daemon(Some("exit 3")),
        SYSTEM,
        "the daemon ended without a word",
    );
}

#[test]
fn a_daemon_that_ends_after_the_mount_leaves_nothing_mounted() {
    let place = Place::new();
    let script = format!(
        "{FIND_CONTROL}eval \"echo ready 1 1 >&$control; read word <&$control\"; echo $word > {}",
        place.join("word").display()
    );
    place.assert_refused(
        &mut place.mount_with_daemon(Some(&script)),
        SYSTEM,
        "the daemon ended without a word",
    );
    assert_eq!(
        std::fs::read_to_string(place.join("word")).unwrap(),
        "mounted\n",
        "it had been mounted"
    );
}

#[test]
fn a_helper_that_is_killed_while_it_mounts_leaves_nothing() {
    let place = Place::new();
    let word = place.join("word");
    let script = format!(
        "{FIND_CONTROL}eval \"echo ready 1 1 >&$control; read word <&$control\"; kill -KILL $PPID
        echo $word > {0}.new; mv {0}.new {0}",
        word.display()
    );
    let status = place.mount_with_daemon(Some(&script)).status().unwrap();
    assert_eq!(status.signal(), Some(Signal::KILL.as_raw()), "{status}");
    limits::until(limits::ANSWER, "the daemon's last word", || word.exists());
    assert_eq!(std::fs::read_to_string(word).unwrap(), "mounted\n", "there was a filesystem");
    assert!(place.mount_info().is_none(), "a mount is left that no daemon serves");
}

#[test]
fn a_daemon_whose_mount_helper_dies_gives_everything_back() {
    let place = Place::new();
    let script = "kill -STOP $PPID; exec \"$DAEMON\" \"$@\""; // the helper does nothing more
    File::create(place.log()).unwrap();
    let mut helper = place.mount_with_daemon(Some(script));
    let mut helper = helper.env("DAEMON", env!("CARGO_BIN_EXE_hugetlb2fsd")).spawn().unwrap();
    await_text(&place.log(), "8 pages of");
    let daemon = Daemon::with_pid(place.daemons()[0]);
    end(&mut helper, "the helper");
    daemon.wait();
    place.assert_nothing_is_left();
}

#[test]
fn a_daemon_that_fails_says_why_through_the_helper() {
    let place = Place::new();
    let script = format!("{FIND_CONTROL}eval \"echo failed for a good reason >&$control\"");
    place.assert_refused(&mut place.mount_with_daemon(Some(&script)), FAILED, "for a good reason");
}

#[test]
fn a_daemon_that_talks_nonsense_is_ended() {
    let place = Place::new();
    let script = format!("{FIND_CONTROL}eval \"echo serving >&$control\"; exec sleep infinity");
    place.assert_refused(
        &mut place.mount_with_daemon(Some(&script)),
        SYSTEM,
        "unexpected word from the daemon: serving",
    );
}

#[test]
fn a_log_that_cannot_be_opened_fails_the_mount() {
    let place = Place::new();
    std::fs::create_dir(place.log()).unwrap();
    place.assert_refused(&mut place.mount(SMALL), FAILED, "cannot be opened: Is a directory");
}

// ---- interruption -------------------------------------------------------------------------------

/// A mount whose daemon stops in the middle of filling its pool. The helper is stopped, and the
/// socket on which the daemon reports its progress has room for a few lines only.
struct Standing {
    place: Place,
    helper: Child,
    daemon: Daemon,
}

/// A script between the helper and the daemon. It executes the daemon at its end.
const HOLD: &str = r#"#!/usr/bin/perl
use Socket;
$^F = 1000; # the daemon is to have the socket, too
my ($control) = map { /^--control-fd=(\d+)$/ } @ARGV;
open(my $socket, '+<&=', $control) or die;
setsockopt($socket, SOL_SOCKET, SO_SNDBUF, 1) or die;
kill 'STOP', getppid();
exec { $ENV{DAEMON} } 'hugetlb2fsd', @ARGV;
"#;

impl Standing {
    fn start() -> Self {
        let place = Place::new();
        std::fs::write(place.join("hold"), HOLD).unwrap();
        place.install(&place.join("hold"), "hugetlb2fsd");
        let program = place.install(Path::new(env!("CARGO_BIN_EXE_hugetlb2")), "hugetlb2");
        File::create(place.log()).unwrap();
        let mut helper = Command::new(program);
        helper.arg0("mount.hugetlb2").arg("source").arg(place.mount_point());
        helper.args(["-o", &place.with_log("size=1G,pagesize=2M")]);
        helper.env("DAEMON", env!("CARGO_BIN_EXE_hugetlb2fsd")).env("HUGETLB2_LOG", "debug");
        let helper =
            helper.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("the helper");
        await_text(&place.log(), " bytes taken");
        let daemons = place.daemons();
        assert_eq!(daemons.len(), 1);
        Self { place, helper, daemon: Daemon::with_pid(daemons[0]) }
    }

    /// Lets the helper go on.
    fn go_on(&self) {
        signal(self.helper.id() as i32, Signal::CONT);
    }

    fn assert_was_not_filled(&self) {
        let log = std::fs::read_to_string(self.place.log()).unwrap();
        assert!(!log.contains("512 pages of"), "the pool was filled: {log}");
    }
}

impl Standing {
    fn ending(&mut self) -> ExitStatus {
        limits::exit(limits::ANSWER, "the helper", &mut self.helper)
    }
}

impl Drop for Standing {
    fn drop(&mut self) {
        end(&mut self.helper, "the helper");
    }
}

#[test]
fn an_interrupt_while_the_pool_fills_gives_everything_back() {
    for interrupt in [Signal::INT, Signal::TERM, Signal::HUP] {
        let mut standing = Standing::start();
        signal(standing.helper.id() as i32, interrupt);
        standing.go_on();
        let status = standing.ending();
        assert_eq!(status.code(), Some(INTERRUPTED), "{interrupt:?}: {status}");
        assert!(standing.daemon.ends_within(0), "the daemon runs on");
        let mut error = String::new();
        standing.helper.stderr.take().unwrap().read_to_string(&mut error).unwrap();
        assert!(error.contains("interrupted; everything has been given back"), "{error}");
        standing.assert_was_not_filled();
        standing.place.assert_nothing_is_left();
    }
}

#[test]
fn a_daemon_whose_helper_was_killed_ends_by_itself() {
    let mut standing = Standing::start();
    signal(standing.helper.id() as i32, Signal::KILL);
    standing.ending();
    standing.daemon.wait();
    standing.assert_was_not_filled();
    standing.place.assert_nothing_is_left();
}

#[test]
fn a_daemon_that_is_killed_while_it_fills_fails_the_mount() {
    let mut standing = Standing::start();
    signal(standing.daemon.pid, Signal::KILL);
    standing.go_on();
    assert_eq!(standing.ending().code(), Some(SYSTEM));
    standing.place.assert_nothing_is_left();
}

// ---- messages -----------------------------------------------------------------------------------

#[test]
fn progress_is_shown_on_a_terminal_and_nowhere_else() {
    let place = Place::new();
    let options = place.with_log("size=256M,pagesize=2M");
    let mount = format!(
        "{} mount source {} -o {options}",
        env!("CARGO_BIN_EXE_hugetlb2"),
        place.mount_point().display()
    );
    let terminal =
        run(Command::new("script").args(["-qec", &mount, "/dev/null"]).stdin(Stdio::null()));
    assert!(terminal.contains("\rtaking memory: 0.1 of 0.2 GiB"), "{terminal:?}");
    assert!(terminal.ends_with("\r\u{1b}[K"), "the line is cleared in the end: {terminal:?}");
    assert!(place.mount_info().is_some());
    let piped = Place::new();
    assert_eq!(status_and_error(&mut piped.mount("size=256M,pagesize=2M")), (0, String::new()));
}

#[test]
fn verbose_says_who_serves() {
    let place = Place::new();
    let (status, error) = status_and_error(place.mount(SMALL).arg("-v"));
    let daemon = Daemon::of(&place.mount_point()).pid;
    assert_eq!(status, 0);
    assert!(error.contains("16777216 of 16777216 bytes are in 2 MiB folios"), "{error}");
    let line =
        format!("source mounted on {}, served by process {daemon}", place.mount_point().display());
    assert!(error.contains(&line), "{error}");
}

#[test]
fn words_that_nobody_reads_change_nothing() {
    let place = Place::new();
    let full = || Stdio::from(File::options().write(true).open("/dev/full").unwrap());
    assert_eq!(status(place.mount("size=1Q").stderr(full())), Some(USAGE));
    assert_eq!(status(place.mount(SMALL).arg("-v").stderr(full())), Some(0));
    assert!(place.mount_info().is_some());
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let status = status(umount_hugetlb2().arg(place.join("missing")).stderr(writer));
    assert_eq!(status, Some(FAILED));
}

/// Returns the exit status. The program's standard error is not a pipe of this process.
fn status(command: &mut Command) -> Option<i32> {
    let mut child = command.spawn().expect("the helper");
    limits::exit(limits::PROGRAM, "the helper", &mut child).code()
}

// ---- namespaces ---------------------------------------------------------------------------------

#[test]
fn a_pool_can_be_mounted_in_another_mount_namespace() {
    let (place, namespace) = (Place::new(), Namespace::new());
    // Only in the namespace, the mount point lies in a filesystem of its own.
    run(namespace.command("mount").args(["-t", "tmpfs", "none"]).arg(place.mount_point()));
    let directory = place.mount_point().join("there");
    run(namespace.command("mkdir").arg(&directory));
    let inside = namespace.path(&directory);
    for target in [namespace.pid(), format!("/proc/{}/ns/mnt", namespace.pid())] {
        run(place.mount_at(&directory, SMALL).args(["-N", &target]));
        assert_eq!(counters(&inside)["pages_total"], 8);
        write_from_outside(&inside.join("file"));
        assert!(place.mount_info().is_none(), "it is mounted here as well");
        let daemon = Daemon::of(&inside);
        assert_eq!(place.daemons(), [daemon.pid]);
        run(umount_hugetlb2().arg(&directory).args(["-N", &target]));
        assert!(daemon.ends_within(0), "the daemon runs on");
    }
}

#[test]
fn a_mount_point_that_the_other_namespace_lacks_is_refused() {
    let (place, namespace) = (Place::new(), Namespace::new());
    run(namespace.command("mount").args(["-t", "tmpfs", "none"]).arg(place.directory.path()));
    place.assert_refused(
        place.mount(SMALL).args(["-N", &namespace.pid()]),
        FAILED,
        "No such file or directory",
    );
    place.assert_refused(place.mount(SMALL).args(["-N", "/proc/self/status"]), SYSTEM, "setns");
    place.assert_refused(
        place.mount(SMALL).args(["-N", "/missing"]),
        USAGE,
        "namespace /missing: No such file",
    );
}

#[test]
fn mount_8_mounts_in_another_namespace_through_the_helper() {
    let (place, namespace, other) = (Place::new(), Namespace::new(), Namespace::new());
    let mut mount = namespace.command("mount");
    run(mount
        .args(["-N", &other.pid(), "-t", "hugetlb2", "source"])
        .arg(place.mount_point())
        .args(["-o", SMALL]));
    assert_eq!(counters(&other.path(&place.mount_point()))["pages_total"], 8);
    assert!(namespace.mount_info(&place).is_none() && place.mount_info().is_none());
    let daemon = Daemon::of(&other.path(&place.mount_point()));
    // With -c, umount(8) looks for the helper, and runs it in its own namespace.
    run(namespace.command("umount").args(["-c", "-N", &other.pid()]).arg(place.mount_point()));
    assert!(other.mount_info(&place).is_none());
    assert!(daemon.ends_within(0), "the daemon runs on");
}

// ---- unmounting ---------------------------------------------------------------------------------

#[test]
fn umount_returns_when_the_daemon_has_ended() {
    let place = Place::new();
    for _ in 0..10 {
        run(&mut place.mount(SMALL));
        let daemon = Daemon::of(&place.mount_point());
        run(umount_hugetlb2().arg(place.mount_point()));
        assert!(daemon.ends_within(0), "the daemon runs on");
        place.assert_nothing_is_left();
    }
}

#[test]
fn umount_of_what_is_not_mounted_fails() {
    let place = Place::new();
    let (status, error) = status_and_error(umount_hugetlb2().arg(place.mount_point()));
    assert_eq!(status, FAILED);
    assert!(error.contains("mnt: no hugetlb2 pool is mounted there"), "{error}");
}

#[test]
fn a_busy_pool_is_not_unmounted_and_goes_on() {
    let pool = Pool::small(8);
    let file = pool.join("file");
    write_from_outside(&file);
    let mut toucher = Toucher::mapping(&file, 4);
    let (status, error) = status_and_error(umount_hugetlb2().arg(pool.path()));
    assert_eq!(status, FAILED);
    assert!(error.contains("busy"), "{error}");
    assert!(toucher.store(0, b'T'));
    assert_eq!(run(Command::new("cat").arg(&file)), "Text\n");
    pool.check();
    drop(toucher);
    pool.unmount();
}

/// Starts a process that sleeps with a file of the pool open.
fn user_of(file: &Path) -> Child {
    let mut user = Command::new("sh");
    start_until("open", user.args(["-c", "exec <\"$0\"; echo open; exec sleep infinity"]).arg(file))
}

#[test]
fn a_forced_umount_of_a_pool_that_answers_is_refused() {
    let (place, namespace) = (Place::new(), Namespace::new());
    run(&mut namespace.mount_8(&place, "hugetlb2", &place.with_log(SMALL)));
    let mount_point = namespace.path(&place.mount_point());
    let file = mount_point.join("file");
    write_from_outside(&file);
    let mut user = user_of(&file);
    for by in [["umount", "-f"], ["/sbin/umount.fuse.hugetlb2", "-f"]] {
        let (status, error) =
            status_and_error(namespace.command(by[0]).arg(by[1]).arg(place.mount_point()));
        assert_eq!(status, FAILED, "{error}");
        assert!(
            error.contains("it is in use, and its daemon answers: nothing is forced"),
            "{error}"
        );
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "text\n");
    }
    // A forced umount disconnects a pool whose daemon is stopped.
    let daemon = Daemon::of(&mount_point);
    let processes = place.processes();
    processes.iter().for_each(|process| signal(*process, Signal::STOP));
    let (status, error) =
        status_and_error(namespace.command("umount").arg("-f").arg(place.mount_point()));
    assert_eq!(status, FAILED, "{error}");
    assert!(error.contains("all calls fail from now on; it is still in use"), "{error}");
    processes.iter().for_each(|process| signal(*process, Signal::CONT));
    end(&mut user, "the user of the pool");
    run(namespace.command("umount").arg("-l").arg(place.mount_point()));
    daemon.wait();
}

#[test]
fn a_forced_umount_of_a_pool_that_is_not_in_use_unmounts() {
    let place = Place::new();
    run(&mut place.mount(SMALL));
    let daemon = Daemon::of(&place.mount_point());
    run(umount_hugetlb2().arg("-f").arg(place.mount_point()));
    assert!(daemon.ends_within(0), "the daemon runs on");
    place.assert_nothing_is_left();
}

#[test]
fn a_lazy_umount_returns_memory_when_its_last_user_ends() {
    let place = Place::new();
    run(&mut place.mount(SMALL));
    let daemon = Daemon::of(&place.mount_point());
    let file = place.mount_point().join("file");
    std::fs::write(&file, vec![7; FOLIO as usize]).unwrap();
    let mut toucher = Toucher::mapping(&file, FOLIO);
    let open = File::options().read(true).append(true).open(&file).unwrap();
    run(umount_hugetlb2().arg("-l").arg(place.mount_point()));
    assert!(place.mount_info().is_none() && !file.exists());
    // Users of the file go on, and can even make it grow.
    assert!(toucher.store(1, 9));
    (&open).write_all(&[1; 10]).unwrap();
    assert_eq!(open.metadata().unwrap().len(), FOLIO + 10);
    drop(open);
    assert_eq!(toucher.load(1), Some(9));
    assert!(!daemon.ends_within(0), "a mapping needs it");
    drop(toucher);
    daemon.wait();
    place.assert_nothing_is_left();
}

// ---- mount(8) and umount(8) ---------------------------------------------------------------------

impl Namespace {
    /// A command that runs mount(8) in the namespace with these options.
    fn mount_8(&self, place: &Place, kind: &str, options: &str) -> Command {
        let mut command = self.command("mount");
        command.args(["-t", kind, "source"]).arg(place.mount_point()).args(["-o", options]);
        command
    }

    fn remount(&self, place: &Place, options: &str) -> Command {
        let mut command = self.command("mount");
        command.args(["-o", &format!("remount,{options}")]).arg(place.mount_point());
        command
    }

    fn pages(&self, place: &Place) -> u64 {
        counters(&self.path(&place.mount_point()))["pages_total"]
    }

    fn assert_check_finds_nothing(&self, place: &Place) {
        assert_eq!(get(self.path(&place.mount_point()), CHECK).unwrap(), "");
    }
}

#[test]
fn mount_8_and_umount_8_find_the_helpers_by_both_names() {
    let (place, namespace) = (Place::new(), Namespace::new());
    for kind in ["hugetlb2", "fuse.hugetlb2"] {
        run(&mut namespace.mount_8(&place, kind, &place.with_log(&format!("nosuid,{SMALL}"))));
        let info = namespace.mount_info(&place).unwrap();
        assert_eq!(
            (info.kind.as_str(), info.flags.as_str()),
            ("fuse.hugetlb2", "rw,nosuid,relatime")
        );
        assert!(place.mount_info().is_none(), "it is in the namespace only");
        let daemon = Daemon::of(&namespace.path(&place.mount_point()));
        assert_eq!(place.daemons(), [daemon.pid]);
        run(namespace.command("umount").arg("-c").arg(place.mount_point()));
        assert!(namespace.mount_info(&place).is_none());
        assert!(daemon.ends_within(0), "the daemon runs on");
    }
}

#[test]
fn a_plain_umount_8_which_calls_no_helper_ends_the_daemon_too() {
    let (place, namespace) = (Place::new(), Namespace::new());
    run(&mut namespace.mount_8(&place, "hugetlb2", &place.with_log(SMALL)));
    let daemon = Daemon::of(&namespace.path(&place.mount_point()));
    run(namespace.command("umount").arg(place.mount_point()));
    assert!(namespace.mount_info(&place).is_none());
    daemon.wait();
    place.assert_nothing_is_left();
}

#[test]
fn mount_8_passes_the_helpers_status_and_words_on() {
    let (place, namespace) = (Place::new(), Namespace::new());
    place.assert_refused(
        &mut namespace.mount_8(&place, "hugetlb2", "size=1Q"),
        USAGE,
        "option size: \"1Q\"",
    );
    let mut sloppy = namespace.mount_8(&place, "hugetlb2", "size=100%,frobnicate");
    place.assert_refused(sloppy.arg("-s"), FAILED, "the machine cannot give ");
    run(namespace.mount_8(&place, "hugetlb2", SMALL).arg("-f"));
    assert!(namespace.mount_info(&place).is_none());
}

#[test]
fn umount_8_of_a_busy_pool_fails() {
    let (place, namespace) = (Place::new(), Namespace::new());
    run(&mut namespace.mount_8(&place, "hugetlb2", SMALL));
    let root = namespace.path(&place.mount_point());
    write_from_outside(&root.join("file"));
    let toucher = Toucher::mapping(&root.join("file"), 4);
    let (status, error) = status_and_error(namespace.command("umount").arg(place.mount_point()));
    assert_eq!(status, FAILED);
    assert!(error.contains("busy"), "{error}");
    drop(toucher);
    let daemon = Daemon::of(&root);
    run(namespace.command("umount").arg(place.mount_point()));
    daemon.wait();
}

#[test]
fn a_remount_resizes_up_and_down() {
    let (place, namespace) = (Place::new(), Namespace::new());
    run(&mut namespace.mount_8(&place, "hugetlb2", &place.with_log(SMALL)));
    let file = namespace.path(&place.mount_point()).join("file");
    std::fs::write(&file, vec![7; 3 * FOLIO as usize]).unwrap();
    for (size, pages) in [("64M", 32), ("33M", 16), ("8388608", 4), ("6M", 3), ("0x1000000", 8)] {
        run(&mut namespace.remount(&place, &format!("size={size}")));
        assert_eq!(namespace.pages(&place), pages, "{size}");
        namespace.assert_check_finds_nothing(&place);
    }
    assert!(std::fs::read(&file).unwrap() == vec![7; 3 * FOLIO as usize]);
    run(&mut namespace.remount(&place, "pagesize=2M,size=8M,mode=755,io=auto,punch=release"));
    assert_eq!(namespace.pages(&place), 4, "what else stands in fstab may come along");
}

/// mount(8) passes the list of nodes on as it is. This machine has a node 0; the lab has more.
#[test]
fn a_pool_of_named_nodes_is_mounted_and_resized() {
    let (place, namespace) = (Place::new(), Namespace::new());
    run(&mut namespace.mount_8(&place, "hugetlb2", &place.with_log("pagesize=2M,nodes=0:16M")));
    let file = namespace.path(&place.mount_point()).join("file");
    std::fs::write(&file, vec![7; 3 * FOLIO as usize]).unwrap();
    for (options, pages) in
        [("nodes=0:8M", 4), ("size=12M", 6), ("nodes=0,size=8M", 4), ("nodes=0:20M,nosuid", 10)]
    {
        run(&mut namespace.remount(&place, options));
        assert_eq!(namespace.pages(&place), pages, "{options}");
        namespace.assert_check_finds_nothing(&place);
    }
    for (options, status, word) in [
        ("nodes=0:4M", FAILED, "3 of the 10 pages of NUMA node 0 are in use"),
        ("nodes=0:99T", FAILED, "NUMA node 0 cannot give"),
        ("nodes=0:8M,999:8M", FAILED, "NUMA node 999 has no memory for the pool; the machine"),
        ("nodes=0,999", FAILED, "NUMA node 999 has no memory for the pool; the machine"),
        ("nodes=999:8M", FAILED, "NUMA node 999 has no memory for the pool; the machine"),
        ("nodes=0:0", FAILED, "a pool without pages; unmount it"),
        ("nodes=0:1M", USAGE, "less than one page"),
        ("nodes=0:8M,size=20M", USAGE, "make them agree (a remount has the options of fstab, too)"),
        ("nodes=0-31,size=20M", USAGE, "each node gives a page at least"),
        ("nodes=zero", USAGE, "names no nodes"),
    ] {
        let (found, error) = status_and_error(&mut namespace.remount(&place, options));
        assert_eq!(found, status, "{options}: {error}");
        assert!(error.contains(word), "{options}: {word:?} is not in {error:?}");
        assert_eq!(namespace.pages(&place), 10, "{options}");
    }
    assert!(std::fs::read(&file).unwrap() == vec![7; 3 * FOLIO as usize]);
    let elsewhere = Place::new();
    for (options, status, word) in [
        ("nodes=0,999,size=4M", FAILED, "NUMA node 999 has no memory for the pool"),
        ("nodes=0:4M,999:4M", FAILED, "NUMA node 999 has no memory for the pool"),
        ("nodes=0:4M,size=8M", USAGE, "make them agree"),
        ("nodes=0:4M,1:0", USAGE, "node 1 has size 0; leave it out"),
        ("nodes=0-2,size=4M", USAGE, "3 nodes, and a pool of 2 pages of 2M"),
        ("nodes=0:99T", FAILED, "NUMA node 0 cannot give"),
    ] {
        let mut mount = elsewhere.mount(&format!("pagesize=2M,{options}"));
        elsewhere.assert_refused(&mut mount, status, word);
    }
}

#[test]
fn a_daemon_that_takes_over_knows_that_nodes_were_named() {
    let mut pool = Pool::mount("pagesize=2M,nodes=0:8M");
    for takes_over in [
        |pool: &mut Pool| kill_worker(pool),
        |pool: &mut Pool| {
            run(hugetlb2().arg("upgrade").arg(pool.path()));
            pool.note_new_daemon();
        },
    ] {
        takes_over(&mut pool);
        assert!(get(pool.path(), OPTIONS).unwrap().contains("nodes 0\n"));
        for size in ["0:12M", "16M"] {
            set(pool.path(), SIZE, size).unwrap();
        }
        for size in ["0:99T", "99T"] {
            assert_eq!(set(pool.path(), SIZE, size), Err(Errno::NOSPC));
            let why = get(pool.path(), REFUSAL).unwrap();
            let is_named = why.contains("NUMA node 0 cannot give");
            assert!(is_named || size == "99T", "{size}: {why}");
        }
        assert_eq!(pool.counter("pages_total_node0"), 8);
        pool.check();
    }
    pool.unmount();
}

/// mount(8) puts the options of fstab before those of its command line. The last value of an option
/// is in force.
#[test]
fn fstab_can_name_nodes_and_a_remount_their_sizes() {
    const FSTAB: &str = "mount -t tmpfs etc /mnt; cp -a /etc/. /mnt; mount --move /mnt /etc";
    const HELPERS: &str = "mount -t tmpfs helpers /usr/sbin
        for name in mount.hugetlb2 mount.fuse.hugetlb2; do ln -s \"$0\" /usr/sbin/$name; done";
    let (place, namespace) = (Place::new(), Namespace::prepared_by(&format!("{FSTAB}\n{HELPERS}")));
    let mount_point = place.mount_point();
    let write_fstab = |options: &str| {
        let line = format!("pool0 {} hugetlb2 {options} 0 0\n", mount_point.display());
        std::fs::write(namespace.path(Path::new("/etc/fstab")), line).unwrap();
    };
    let status = || {
        let options = get(namespace.path(&mount_point), OPTIONS).unwrap();
        let nodes = options.lines().find_map(|line| line.strip_prefix("nodes ").map(str::to_owned));
        (nodes, namespace.pages(&place))
    };
    for nodes in ["nodes=0:16M", "nodes=\"0:16M\""] {
        write_fstab(&place.with_log(&format!("pagesize=2M,{nodes},nofail")));
        run(namespace.command("mount").arg(&mount_point));
        assert_eq!(status(), (Some("0".to_owned()), 8), "{nodes}");
        for (options, pages) in [("nodes=0:8M", 4), ("nodes=\"0:12M\"", 6), ("nosuid", 8)] {
            run(&mut namespace.remount(&place, options));
            assert_eq!(status(), (Some("0".to_owned()), pages), "{options}");
        }
        let (found, error) = status_and_error(&mut namespace.remount(&place, "size=8M"));
        assert!(found == USAGE && error.contains("the options of fstab, too"), "{error}");
        run(namespace.command("umount").arg(&mount_point));
    }
    write_fstab(&place.with_log("pagesize=2M,size=16M,nodes=0"));
    run(namespace.command("mount").arg(&mount_point));
    run(&mut namespace.remount(&place, "size=8M"));
    assert_eq!(status(), (Some("0".to_owned()), 4));
    run(&mut namespace.remount(&place, "size=12M,nodes=0:12M"));
    assert_eq!(status(), (Some("0".to_owned()), 6));
    let shown = run(hugetlb2().arg("status").arg(namespace.path(&mount_point)));
    assert!(shown.contains("node 0      6, 12 MiB: 0 used, 6 free"), "{shown}");
    run(namespace.command("umount").arg(&mount_point));
}

#[test]
fn a_remount_that_cannot_be_changes_nothing_and_says_why() {
    let (place, namespace) = (Place::new(), Namespace::new());
    run(&mut namespace.mount_8(&place, "hugetlb2", &place.with_log(SMALL)));
    let file = namespace.path(&place.mount_point()).join("file");
    std::fs::write(&file, vec![7; 3 * FOLIO as usize]).unwrap();
    for (options, status, word) in [
        ("size=4M", FAILED, "more of the pool is in use than the new size has"),
        ("size=4M,nosuid", FAILED, "more of the pool is in use"),
        ("size=100%", FAILED, "the machine has not that much memory"),
        ("size=0", USAGE, "less than one page of 2M"),
        ("size=1M", USAGE, "less than one page of 2M"),
        ("size=1Q", USAGE, "option size: \"1Q\" is not a size"),
        ("size", USAGE, "option size needs a value"),
        (
            "pagesize=1G",
            USAGE,
            "option pagesize: 2M is in force, and stays so as long as the pool is mounted",
        ),
        ("size=32M,pagesize=1G", USAGE, "option pagesize: 2M is in force"),
        ("size=32M,mode=700", USAGE, "option mode: 755 is in force"),
        ("io=native", USAGE, "option io: auto is in force"),
        ("size=32M,punch=keep", USAGE, "option punch: release is in force"),
        ("log=/var/log/other", USAGE, "option log: "),
        ("size=32M,frobnicate", USAGE, "unknown option \"frobnicate\""),
    ] {
        let (found, error) = status_and_error(&mut namespace.remount(&place, options));
        assert_eq!(found, status, "{options}: {error}");
        assert!(error.contains(word), "{options}: {word:?} is not in {error:?}");
        assert_eq!(namespace.pages(&place), 8, "{options}");
        assert_eq!(namespace.mount_info(&place).unwrap().flags, "rw,relatime", "{options}");
    }
    namespace.assert_check_finds_nothing(&place);
    assert!(std::fs::read(&file).unwrap() == vec![7; 3 * FOLIO as usize]);
}

#[test]
fn a_remount_changes_flags_and_keeps_the_size() {
    let (place, namespace) = (Place::new(), Namespace::new());
    run(&mut namespace.mount_8(&place, "hugetlb2", &place.with_log(SMALL)));
    let file = namespace.path(&place.mount_point()).join("file");
    run(&mut namespace.remount(&place, "ro"));
    let refused = File::create(&file).unwrap_err();
    assert_eq!(Errno::from_io_error(&refused), Some(Errno::ROFS));
    run(&mut namespace.remount(&place, "rw,size=32M"));
    std::fs::write(&file, "text").unwrap();
    assert_eq!(namespace.pages(&place), 16);
    run(&mut namespace.remount(&place, "ro,size=16M"));
    assert_eq!(namespace.pages(&place), 8);
    assert!(namespace.mount_info(&place).unwrap().flags.starts_with("ro"));
    run(namespace.remount(&place, "rw,size=8M").arg("-f"));
    assert_eq!(namespace.pages(&place), 8, "-f changes nothing");
}

#[test]
fn a_remount_keeps_the_flags_that_it_does_not_name() {
    let place = Place::new();
    run(&mut place.mount(&format!("{SMALL},nosuid,nodev,noexec,noatime")));
    let flags = || place.mount_info().unwrap().flags;
    assert_eq!(flags(), "rw,nosuid,nodev,noexec,noatime");
    run(&mut place.mount("remount,size=20M"));
    assert_eq!(flags(), "rw,nosuid,nodev,noexec,noatime");
    assert_eq!(counters(&place.mount_point())["pages_total"], 10);
    run(&mut place.mount("remount,suid,ro"));
    assert_eq!(flags(), "ro,nodev,noexec,noatime");
    place.assert_remount_refused("remount,size=16M", "is mounted read-only");
    run(&mut place.mount("remount,rw,size=16M,relatime"));
    assert_eq!(flags(), "rw,nodev,noexec,relatime");
}

impl Place {
    fn assert_remount_refused(&self, options: &str, word: &str) {
        let (status, error) = status_and_error(&mut self.mount(options));
        assert_eq!(status, FAILED, "{error}");
        assert!(error.contains(word), "{error}");
    }
}

#[test]
fn a_remount_of_what_is_no_pool_is_refused() {
    let place = Place::new();
    let (status, error) = status_and_error(&mut place.mount("remount,size=16M"));
    assert_eq!(status, FAILED);
    assert!(error.contains("no hugetlb2 pool is mounted there"), "{error}");
}

// ---- resizing through the attribute -------------------------------------------------------------

#[test]
fn the_size_attribute_resizes_a_pool_in_use() {
    let pool = Pool::small(8);
    let file = pool.join("file");
    std::fs::write(&file, vec![7; 4 * FOLIO as usize]).unwrap();
    let mut toucher = Toucher::mapping(&file, 4 * FOLIO);
    for (size, pages) in
        [("64M", 32), ("8M", 4), ("8388608\n", 4), ("0xc00000", 6), ("33M", 16), ("10M", 5)]
    {
        set(pool.path(), SIZE, size).unwrap();
        assert_eq!(get(pool.path(), SIZE).unwrap(), format!("{}\n", pages * FOLIO), "{size}");
        assert_eq!((pool.counter("pages_total"), pool.free_pages()), (pages, pages - 4), "{size}");
        pool.check();
    }
    assert_eq!(toucher.ask(&format!("differ 0 {} 7", 4 * FOLIO)), "count 0");
    assert_eq!(toucher.huge(), 4);
    // Files can take exactly the bytes of the size.
    let more = File::create(pool.join("more")).unwrap();
    assert!(more.set_len(2 * FOLIO).is_err());
    more.set_len(FOLIO).unwrap();
    pool.check();
}

#[test]
fn a_size_that_cannot_be_is_refused_and_changes_nothing() {
    let pool = Pool::small(8);
    File::create(pool.join("file")).unwrap().set_len(4 * FOLIO).unwrap();
    for (size, errno) in [
        ("6M", Errno::BUSY),
        ("2M", Errno::BUSY),
        ("100%", Errno::NOSPC),
        ("1T", Errno::NOSPC),
        ("0", Errno::INVAL),
        ("1M", Errno::INVAL),
        ("1Q", Errno::INVAL),
        ("-2M", Errno::INVAL),
        ("", Errno::INVAL),
        ("8M 8M", Errno::INVAL),
        ("99999999999T", Errno::INVAL),
    ] {
        assert_eq!(set(pool.path(), SIZE, size), Err(errno), "{size:?}");
        assert_eq!((pool.counter("pages_total"), pool.free_pages()), (8, 4), "{size:?}");
        pool.check();
    }
    assert_eq!(set(pool.path(), SIZE, [0xff, 0xfe]), Err(Errno::INVAL));
    assert_eq!(set(pool.join("file"), SIZE, "32M"), Err(Errno::OPNOTSUPP), "it is the root's");
}

#[test]
fn only_root_sees_and_sets_the_size() {
    let place = Place::new();
    std::fs::set_permissions(place.directory.path(), PermissionsExt::from_mode(0o755)).unwrap();
    run(&mut place.mount(&format!("{SMALL},mode=777")));
    let as_nobody = |program: &str, arguments: &[&str]| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups", program]).args(arguments);
        status_and_error(command.arg(place.mount_point()))
    };
    let (status, error) = as_nobody("setfattr", &["-n", SIZE, "-v", "32M"]);
    assert!(status != 0 && error.contains("Operation not permitted"), "{error}");
    let (status, error) = as_nobody("getfattr", &["-n", SIZE]);
    assert!(status != 0 && error.contains("No such attribute"), "{error}");
    assert_eq!(as_nobody("getfattr", &["-n", "user.hugetlb2.pool"]).0, 0);
    assert_eq!(counters(&place.mount_point())["pages_total"], 8);
}

#[test]
fn resizes_and_files_beside_each_other_keep_the_account() {
    let pool = Pool::small(24);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for n in 0..60 {
                let size = [48u64, 64, 40, 56][n % 4] << 20;
                match set(pool.path(), SIZE, size.to_string()) {
                    Ok(()) | Err(Errno::BUSY) => {}
                    Err(errno) => panic!("{size}: {errno}"),
                }
            }
        });
        for name in ["a", "b"] {
            let file = File::create(pool.join(name)).unwrap();
            scope.spawn(move || {
                for n in 0..60 {
                    file.set_len((n % 8) * FOLIO + n).expect("at most 16 of 20 pages");
                }
            });
        }
    });
    pool.check();
}

// ---- life ---------------------------------------------------------------------------------------

#[test]
fn two_hundred_lives_leave_nothing_behind() {
    const LIVES: u64 = 200;
    const POOL: u64 = 64 << 20;
    let place = Place::new();
    let before = memory_available();
    for n in 0..LIVES {
        if n == LIVES / 2 {
            place.assert_refused(
                &mut place.mount("size=100%,pagesize=2M"),
                FAILED,
                "the machine cannot give ",
            );
            place.assert_refused(
                &mut place.mount_with_daemon(Some("exit 1")),
                SYSTEM,
                "without a word",
            );
        }
        run(&mut place.mount(&format!("size={POOL},pagesize=2M")));
        let daemon = Daemon::of(&place.mount_point());
        write_from_outside(&place.mount_point().join("file"));
        run(umount_hugetlb2().arg(place.mount_point()));
        assert!(daemon.ends_within(0), "the daemon runs on");
        assert!(place.mount_info().is_none());
    }
    place.assert_nothing_is_left();
    // Other programs take and give memory meanwhile. Half of the memory that a leak would lose
    // tells both cases apart.
    assert!(before.saturating_sub(memory_available()) < LIVES * POOL / 2, "memory is missing");
}

#[test]
fn the_command_mounts_as_the_helper_does() {
    let place = Place::new();
    run(hugetlb2()
        .args(["mount", "source"])
        .arg(place.mount_point())
        .args(["-o", &place.with_log(SMALL)]));
    assert_eq!(counters(&place.mount_point())["pages_total"], 8);
    let (status, error) =
        status_and_error(hugetlb2().args(["mount", "source", "/missing", "-o", SMALL]));
    assert_eq!(status, FAILED);
    assert!(text(error.as_bytes()).contains("mount point /missing"), "{error}");
}
