//! A place to mount at with the mount helper, and other mount namespaces.

use super::limits::{self, Waiting};
use super::{end, mount_hugetlb2, program, start_until, status_and_error};
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, getsid};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// A directory with a mount point and a log. No other test has this log, so its path tells whose
/// daemon a process is.
pub struct Place {
    pub directory: tempfile::TempDir,
    _limit: Waiting,
}

impl Place {
    pub fn new() -> Self {
        let directory = tempfile::tempdir().expect("a directory for the test");
        let mount_point = directory.path().join("mnt");
        std::fs::create_dir(&mount_point).expect("a mount point");
        Self { directory, _limit: limits::test(&mount_point, None) }
    }

    pub fn join(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn mount_point(&self) -> PathBuf {
        self.join("mnt")
    }

    pub fn log(&self) -> PathBuf {
        self.join("log")
    }

    /// The helper, with the arguments to mount here. `options` and the log follow `-o`.
    pub fn mount(&self, options: &str) -> Command {
        self.mount_at(&self.mount_point(), options)
    }

    pub fn mount_at(&self, directory: &Path, options: &str) -> Command {
        let mut command = mount_hugetlb2();
        command.arg("source").arg(directory).arg("-o").arg(self.with_log(options));
        command
    }

    pub fn with_log(&self, options: &str) -> String {
        format!("{options},log={}", self.log().display())
    }

    /// The supervisor of the pool that is mounted here, if there is one.
    pub fn daemons(&self) -> Vec<i32> {
        let leads = |pid: &i32| {
            let pid = Pid::from_raw(*pid);
            pid.is_some_and(|process| getsid(pid) == Ok(process))
        };
        self.processes().into_iter().filter(leads).collect()
    }

    /// The supervisor and its worker.
    pub fn processes(&self) -> Vec<i32> {
        let flag = format!("--log={}", self.log().display());
        let processes = std::fs::read_dir("/proc").expect("/proc").filter_map(Result::ok);
        let ids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        let is_ours = |pid: &i32| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.split(|byte| *byte == 0).any(|argument| argument == flag.as_bytes())
        };
        ids.filter(is_ours).collect()
    }

    /// This place's line in mountinfo, if a filesystem is mounted here.
    pub fn mount_info(&self) -> Option<MountInfo> {
        MountInfo::of(&self.mount_point(), "/proc/self/mountinfo")
    }

    pub fn assert_nothing_is_left(&self) {
        assert!(self.mount_info().is_none(), "something is mounted");
        assert_eq!(self.processes(), [0; 0], "a daemon runs");
    }

    /// Asserts that the helper ends with `status`, says `word`, and leaves nothing.
    pub fn assert_refused(&self, command: &mut Command, status: i32, word: &str) {
        assert_eq!(self.mount_info(), None, "{command:?}: something is mounted beforehand");
        let (found, error) = status_and_error(command);
        assert_eq!(found, status, "{command:?}: {error}");
        assert!(error.contains(word), "{command:?}: {word:?} is not in {error:?}");
        self.assert_nothing_is_left();
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        while unmount(self.mount_point(), UnmountFlags::DETACH).is_ok() {}
    }
}

/// A line of mountinfo (proc(5)).
#[derive(Debug, PartialEq, Eq)]
pub struct MountInfo {
    pub flags: String,
    pub kind: String,
    pub source: String,
    pub options: String,
}

impl MountInfo {
    pub fn of(mount_point: &Path, file: &str) -> Option<Self> {
        let info = std::fs::read_to_string(file).expect("mountinfo");
        let mut lines = info.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        let fields = lines.rfind(|fields| Path::new(fields[4]) == mount_point)?;
        let end = fields.iter().position(|field| *field == "-").expect("a separator");
        let word = |index: usize| fields[index].replace("\\040", " ").replace("\\134", "\\");
        Some(Self {
            flags: word(5),
            kind: word(end + 1),
            source: word(end + 2),
            options: word(end + 3),
        })
    }
}

/// A mount namespace of its own. It ends when this is dropped.
pub struct Namespace {
    init: Child,
}

impl Namespace {
    /// A namespace in which mount(8) finds the helpers.
    pub fn new() -> Self {
        const HELPERS: &str = "mount -t tmpfs helpers /usr/sbin
            for name in mount.hugetlb2 mount.fuse.hugetlb2 umount.fuse.hugetlb2; do
                ln -s \"$0\" /usr/sbin/$name
            done";
        Self::prepared_by(HELPERS)
    }

    /// A namespace that `script` has prepared. `$0` is the program under test. The namespace begins
    /// with copies of the mounts of other tests' pools, and unmounts these copies at once.
    pub fn prepared_by(script: &str) -> Self {
        let script = format!(
            "umount -i -c -l -a -t fuse.hugetlb2\nset -e\n{script}\necho ready\nexec sleep infinity"
        );
        let mut shell = Command::new("unshare");
        shell
            .args(["-m", "sh", "-c", &script])
            .arg(program())
            .stdin(Stdio::null())
            .stderr(Stdio::null());
        Self { init: start_until("ready", &mut shell) }
    }

    pub fn pid(&self) -> String {
        self.init.id().to_string()
    }

    /// A program that runs in this namespace.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["-t", &self.pid(), "-m", "--", program]);
        command
    }

    /// The path by which a program outside of the namespace finds `path`.
    pub fn path(&self, path: &Path) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{}", self.init.id(), path.display()))
    }

    pub fn mount_info(&self, place: &Place) -> Option<MountInfo> {
        MountInfo::of(&place.mount_point(), &format!("/proc/{}/mountinfo", self.init.id()))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        end(&mut self.init, "the shell in a mount namespace");
    }
}
