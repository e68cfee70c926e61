//! Starts a daemon and mounts its filesystem. A failure undoes everything.

use crate::daemons::Supervisor;
use crate::protocol::Failure;
use crate::terminal::Meter;
use hugetlb2fs::fuse::LARGEST_REQUEST;
use hugetlb2fs::mount_protocol::{Control, Message};
use hugetlb2fs::options::Options;
use hugetlb2fs::sys::process::explain_signal;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, FdFlags, fcntl_setfd};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount,
};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use std::fs::File;
use std::io::pipe;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

/// A daemon that is being started. Drop ends the daemon, and waits until it has given everything
/// back.
pub struct Daemon {
    child: Child,
    control: Control,
    interrupts: std::io::PipeReader,
    kept: bool,
}

impl Daemon {
    /// Starts `program` on `device`; it begins to fill its pool at once.
    ///
    /// # Errors
    /// [`Failure::System`].
    pub fn start(program: &Path, options: &Options, device: &File) -> Result<Self, Failure> {
        make_inheritable(device)?;
        let device_flag = format!("--fuse-fd={}", device.as_raw_fd());
        let daemon = Self::spawn(program, arguments(options).chain([device_flag]))?;
        fcntl_setfd(device, FdFlags::CLOEXEC)
            .map_err(|errno| Failure::System(format!("fcntl: {errno}")))?;
        Ok(daemon)
    }

    fn spawn(program: &Path, arguments: impl Iterator<Item = String>) -> Result<Self, Failure> {
        let system = |what: &'static str| {
            move |error: std::io::Error| Failure::System(format!("{what}: {error}"))
        };
        let (ours, theirs) = UnixStream::pair().map_err(system("socketpair"))?;
        let (interrupts, interrupted) = pipe().map_err(system("pipe"))?;
        for signal in
            [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM, signal_hook::consts::SIGHUP]
        {
            let end = interrupted.try_clone().map_err(system("pipe"))?;
            signal_hook::low_level::pipe::register(signal, std::os::fd::OwnedFd::from(end))
                .map_err(system("sigaction"))?;
        }
        make_inheritable(&theirs)?;
        let child = Command::new(program)
            .args(arguments)
            .arg(format!("--control-fd={}", theirs.as_raw_fd()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| {
                Failure::System(format!("{} cannot be started: {error}", program.display()))
            })?;
        Ok(Self { child, control: Control::new(ours), interrupts, kept: false })
    }

    /// Waits for the daemon's next line, or for the user to interrupt it.
    fn receive(&mut self) -> Result<Message, Failure> {
        if !self.control.has_buffered() {
            let mut fds = [
                PollFd::new(&self.interrupts, PollFlags::IN),
                PollFd::new(self.control.socket(), PollFlags::IN),
            ];
            while let Err(errno) = poll(&mut fds, None) {
                if errno != Errno::INTR {
                    return Err(Failure::System(format!("poll: {errno}")));
                }
            }
            if !fds[0].revents().is_empty() {
                return Err(Failure::Interrupted);
            }
        }
        match self.control.receive() {
            Some(Message::Failed(why)) => Err(Failure::Mount(why)),
            Some(message) => Ok(message),
            None => Err(Failure::System(self.silent_end())),
        }
    }

    /// The message for a daemon that has closed the socket without a word.
    fn silent_end(&mut self) -> String {
        match self.end().and_then(|status| status.signal()) {
            Some(signal) => format!("the daemon was {}", explain_signal(signal)),
            None => "the daemon ended without a word; see its log".to_owned(),
        }
    }

    /// The end of a daemon that has closed the socket. A process that ends closes its descriptors a
    /// moment before it can be waited for. `None` if the daemon goes on.
    fn end(&mut self) -> Option<ExitStatus> {
        const MOMENT: Timespec = Timespec { tv_sec: 5, tv_nsec: 0 };
        let process = pidfd_open(self.process(), PidfdFlags::empty()).ok()?;
        poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&MOMENT)).ok()?;
        self.child.try_wait().ok().flatten()
    }

    fn process(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32).expect("a child has a process id")
    }

    /// Waits until the pool is filled, and shows the progress on a terminal.
    ///
    /// # Errors
    /// Why it cannot be filled.
    pub fn wait_until_filled(&mut self) -> Result<(u64, u64), Failure> {
        let meter = Meter::new("taking memory");
        loop {
            match self.receive()? {
                Message::Progress { done, total } => meter.show(done, total),
                Message::Ready { huge, total } => return Ok((huge, total)),
                other => {
                    return Err(Failure::System(format!(
                        "unexpected word from the daemon: {other}"
                    )));
                }
            }
        }
    }

    /// Makes the filesystem, waits until it serves, and has `attach` give it a place in the tree.
    ///
    /// The filesystem serves before it has a place in the tree. Until then only the descriptor here
    /// holds it: if this program dies, the kernel ends the filesystem, and that ends the daemon.
    ///
    /// # Errors
    /// Why it does not serve, or those of `attach`; then nothing is mounted.
    pub fn mount(
        mut self,
        device: &File,
        source: &str,
        flags: MountFlags,
        attach: impl FnOnce(&OwnedFd) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let filesystem = create(device, source, flags).map_err(|errno| {
            Failure::Mount(format!("no filesystem can be made on /dev/fuse: {errno}"))
        })?;
        // A daemon that is gone is found out when its answer is waited for.
        let _ = self.control.send(&Message::Mounted);
        match self.receive()? {
            Message::Serving => {}
            other => {
                return Err(Failure::System(format!("unexpected word from the daemon: {other}")));
            }
        }
        attach(&filesystem)?;
        self.kept = true;
        Ok(())
    }

    /// Process id of the daemon.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if !self.kept {
            // Not SIGKILL: the supervisor has a worker to end before it ends.
            let _ = kill_process(self.process(), Signal::TERM);
            let _ = self.child.wait();
        }
    }
}

/// Starts `program` in place of the daemon `predecessor`, waits until it serves, and returns its
/// process id. From the moment that it has ended the other daemon, the new one goes on without this
/// program.
///
/// # Errors
/// Why it does not; the other goes on then, unless that had ended by itself.
pub fn take_over(program: &Path, predecessor: &Supervisor) -> Result<u32, Failure> {
    let Supervisor { pid, connection, .. } = predecessor;
    let arguments = [format!("--take-over={pid}"), format!("--connection={connection}")];
    let mut daemon = Daemon::spawn(program, arguments.into_iter())?;
    daemon.kept = true;
    match daemon.receive()? {
        Message::Serving => Ok(daemon.pid()),
        other => Err(Failure::System(format!("unexpected word from the new daemon: {other}"))),
    }
}

fn make_inheritable(fd: impl AsFd) -> Result<(), Failure> {
    fcntl_setfd(fd, FdFlags::empty()).map_err(|errno| Failure::System(format!("fcntl: {errno}")))
}

/// Makes the filesystem that `device` serves. It is mounted nowhere yet (fsmount(2)). /proc/mounts
/// will show it as `fuse.hugetlb2`.
fn create(device: &File, source: &str, flags: MountFlags) -> Result<OwnedFd, Errno> {
    let context = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (name, value) in [
        ("subtype", "hugetlb2"),
        ("source", source),
        ("fd", &device.as_raw_fd().to_string()),
        ("rootmode", "40000"),
        ("user_id", "0"),
        ("group_id", "0"),
        ("max_read", &LARGEST_REQUEST.to_string()),
    ] {
        fsconfig_set_string(context.as_fd(), name, value)?;
    }
    let asked =
        OF_THE_FILESYSTEM.iter().filter(|(flag, _)| flags.contains(*flag)).map(|(_, name)| *name);
    for name in ["default_permissions", "allow_other"].into_iter().chain(asked) {
        fsconfig_set_flag(context.as_fd(), name)?;
    }
    fsconfig_create(context.as_fd())?;
    let asked = OF_THE_MOUNT.iter().filter(|(flag, _)| flags.contains(*flag));
    let attributes = asked.fold(MountAttrFlags::empty(), |all, (_, attribute)| all | *attribute);
    fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

/// The meaning of mount(2)'s flags: options of the filesystem (fs/fs_context.c), and attributes of
/// the mount.
const OF_THE_FILESYSTEM: [(MountFlags, &str); 4] = [
    (MountFlags::RDONLY, "ro"),
    (MountFlags::SYNCHRONOUS, "sync"),
    (MountFlags::DIRSYNC, "dirsync"),
    (MountFlags::LAZYTIME, "lazytime"),
];
const OF_THE_MOUNT: [(MountFlags, MountAttrFlags); 7] = [
    (MountFlags::RDONLY, MountAttrFlags::MOUNT_ATTR_RDONLY),
    (MountFlags::NOSUID, MountAttrFlags::MOUNT_ATTR_NOSUID),
    (MountFlags::NODEV, MountAttrFlags::MOUNT_ATTR_NODEV),
    (MountFlags::NOEXEC, MountAttrFlags::MOUNT_ATTR_NOEXEC),
    (MountFlags::NOATIME, MountAttrFlags::MOUNT_ATTR_NOATIME),
    (MountFlags::NODIRATIME, MountAttrFlags::MOUNT_ATTR_NODIRATIME),
    (MountFlags::STRICTATIME, MountAttrFlags::MOUNT_ATTR_STRICTATIME),
];

/// Mounts a filesystem from [`Daemon::mount`] on `directory`, an open directory, even if its name
/// has come to stand for another one.
///
/// # Errors
/// The errors of move_mount(2).
pub fn attach(filesystem: &OwnedFd, directory: &OwnedFd) -> Result<(), Errno> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(filesystem, "", directory, "", flags)
}

/// The device that the filesystem will be served through.
///
/// # Errors
/// [`Failure::System`].
pub fn open_device() -> Result<File, Failure> {
    File::options().read(true).write(true).open("/dev/fuse").map_err(|error| {
        let why = format!(
            "/dev/fuse cannot be opened: {error}; is the kernel's fuse module loaded (modprobe fuse)?"
        );
        Failure::System(why)
    })
}

/// The daemon's program: beside this one, or where it is installed.
///
/// # Errors
/// [`Failure::System`].
pub fn daemon_program() -> Result<PathBuf, Failure> {
    const INSTALLED: [&str; 2] = ["/usr/local/sbin/hugetlb2fsd", "/usr/sbin/hugetlb2fsd"];
    let beside = std::env::current_exe().ok().map(|program| program.with_file_name("hugetlb2fsd"));
    let mut places = beside.into_iter().chain(INSTALLED.iter().map(PathBuf::from));
    places.find(|place| place.is_file()).ok_or_else(|| {
        Failure::System(format!(
            "hugetlb2fsd is neither beside this program nor in {}",
            INSTALLED.join(" or ")
        ))
    })
}

/// The options as the daemon's flags; see [`hugetlb2fs::options::TABLE`].
fn arguments(options: &Options) -> impl Iterator<Item = String> {
    options.given().map(|(name, value)| format!("--{name}={value}"))
}
