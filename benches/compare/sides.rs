//! The filesystems that are compared. Each is mounted for the time of its measurement and takes
//! memory from the machine.
//!
//! The mounts go away and the huge pages go back in whatever way the program ends: a [`Side`]
//! undoes its own when it is dropped, also after a panic, and [`undo_on_signals`] undoes those of
//! all sides.

use super::Plan;
use super::limits::{self, Remedy, Waiting};
use super::sys::{Mapping, Sharing};
use hugetlb2fs::attributes::{Counter, POOL};
use hugetlb2fs::sys::memory_available;
use hugetlb2fs::units::Range;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::ffi::CString;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

pub const GIB: u64 = 1 << 30;

/// Memory that a side leaves to the machine.
const MARGIN: u64 = 2 * GIB;

/// The limit of all measurements with one side, which take some minutes together.
const MEASUREMENT: Duration = Duration::from_secs(1800);

/// One of the filesystems.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Ours with pages of 1 GiB.
    Ours,
    /// hugetlbfs with pages of 1 GiB.
    Gigantic,
    /// hugetlbfs with pages of 2 MiB.
    Huge,
    /// tmpfs with `huge=always`.
    TmpfsHuge,
    /// tmpfs with pages of 4 KiB.
    TmpfsSmall,
}

impl Kind {
    /// All kinds; ours comes first.
    pub const ALL: [Self; 5] =
        [Self::Ours, Self::Gigantic, Self::Huge, Self::TmpfsHuge, Self::TmpfsSmall];

    /// The name in a row.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ours => "hugetlb2",
            Self::Gigantic => "hugetlbfs 1G",
            Self::Huge => "hugetlbfs 2M",
            Self::TmpfsHuge => "tmpfs huge",
            Self::TmpfsSmall => "tmpfs 4K",
        }
    }

    /// Mounts a filesystem of this kind with `bytes` of memory, or returns the reason why that
    /// cannot be.
    pub fn mount(self, plan: &Plan, bytes: u64) -> Result<Side, String> {
        match self {
            Self::Ours => Side::ours(plan, bytes, ""),
            Self::Gigantic => Side::hugetlbfs(plan, bytes, &GIGANTIC),
            Self::Huge => Side::hugetlbfs(plan, bytes, &HUGE),
            Self::TmpfsHuge => Side::tmpfs(plan, bytes, "always"),
            Self::TmpfsSmall => Side::tmpfs(plan, bytes, "never"),
        }
    }
}

/// A page size of hugetlbfs.
struct HugePages {
    bytes: u64,
    option: &'static str,
    count: &'static str,
}

const GIGANTIC: HugePages = HugePages {
    bytes: GIB,
    option: "pagesize=1G",
    count: "/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages",
};

const HUGE: HugePages = HugePages {
    bytes: 2 << 20,
    option: "pagesize=2M",
    count: "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages",
};

impl HugePages {
    fn count(&self) -> Option<u64> {
        fs::read_to_string(self.count).ok()?.trim().parse().ok()
    }

    /// Adds `pages` pages to hugetlbfs, all or none.
    fn reserve(&'static self, pages: u64) -> Result<(), String> {
        let none = || format!("the machine has no huge pages with {}", self.option);
        let before = self.count().ok_or_else(none)?;
        fs::write(self.count, (before + pages).to_string()).map_err(|_| none())?;
        let got = self.count().unwrap_or(before).saturating_sub(before);
        if got == pages {
            return Ok(());
        }
        self.give_back(got);
        Err(format!("the machine has {got} of {pages} pages with {} in one piece", self.option))
    }

    fn give_back(&self, pages: u64) {
        let left = self.count().unwrap_or(0).saturating_sub(pages);
        if let Err(error) = fs::write(self.count, left.to_string()) {
            eprintln!("{pages} pages with {} could not be given back: {error}", self.option);
        }
    }
}

/// A mount, and memory taken for it, to be undone at the end.
struct Taken {
    mount_point: PathBuf,
    /// Memory of hugetlbfs and of ours.
    bytes: u64,
    pages: Option<(&'static HugePages, u64)>,
}

impl Taken {
    fn undo(&self) {
        let _ = unmount(&self.mount_point, UnmountFlags::DETACH); // fails if nothing is mounted yet
        let _ = fs::remove_dir(&self.mount_point);
        if let Some((kind, pages)) = self.pages {
            kind.give_back(pages);
        }
    }
}

/// A thread holds the lock while it takes or undoes something, so that a signal finds that done.
static TAKEN: Mutex<Vec<Taken>> = Mutex::new(Vec::new());

fn taken() -> MutexGuard<'static, Vec<Taken>> {
    // After a panic, too, things must be undone.
    TAKEN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Undoes everything when a signal ends the program.
pub fn undo_on_signals(base: &Path) {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).expect("handlers for signals");
    let base = base.to_owned();
    std::thread::spawn(move || {
        let Some(signal) = signals.forever().next() else { return };
        let all = taken();
        all.iter().rev().for_each(Taken::undo);
        let _ = fs::remove_dir(base);
        std::process::exit(128 + signal);
    });
}

/// A filesystem that is mounted for the time of a measurement.
pub struct Side {
    /// The name in a row.
    pub name: &'static str,
    /// The mount point.
    pub mount_point: PathBuf,
    /// The daemon of ours, to wait for its end.
    daemon: Option<OwnedFd>,
    _limit: Waiting,
}

impl Side {
    /// Mounts ours with `options` besides its size.
    pub fn ours(plan: &Plan, bytes: u64, options: &str) -> Result<Self, String> {
        let mut side = Self::prepare(plan, Kind::Ours.name(), bytes, None, |mount_point| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_hugetlb2"));
            command.arg0("mount.hugetlb2").arg("bench").arg(mount_point);
            command.arg("-o").arg(format!("size={bytes},{options}"));
            let output = limits::output(limits::PROGRAM, &mut command);
            let output = output.map_err(|error| format!("mount.hugetlb2: {error}"))?;
            // A failure of ours is no reason to skip a row: ours is the subject of the measurement.
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            Ok(())
        })?;
        side.daemon = Some(
            pidfd_open(side.process(Counter::DaemonPid), PidfdFlags::empty()).expect("it runs"),
        );
        Ok(side)
    }

    fn hugetlbfs(plan: &Plan, bytes: u64, kind: &'static HugePages) -> Result<Self, String> {
        let name = if kind.bytes == GIB { Kind::Gigantic.name() } else { Kind::Huge.name() };
        let pages = bytes.div_ceil(kind.bytes);
        Self::prepare(plan, name, bytes, Some((kind, pages)), |mount_point| {
            mount_at(mount_point, "hugetlbfs", kind.option)
        })
    }

    fn tmpfs(plan: &Plan, bytes: u64, huge: &str) -> Result<Self, String> {
        let name = if huge == "always" { Kind::TmpfsHuge.name() } else { Kind::TmpfsSmall.name() };
        if memory_available().unwrap_or(0) < bytes + MARGIN {
            return Err("the machine has too little memory left".to_owned());
        }
        Self::prepare(plan, name, 0, None, |mount_point| {
            mount_at(mount_point, "tmpfs", &format!("size={bytes},huge={huge}"))
        })
    }

    fn prepare(
        plan: &Plan,
        name: &'static str,
        bytes: u64,
        pages: Option<(&'static HugePages, u64)>,
        mount: impl FnOnce(&Path) -> Result<(), String>,
    ) -> Result<Self, String> {
        // `all` must be dropped before `side`, also by a panic: the drop of `side` takes the lock
        // again.
        let mount_point = plan.new_directory(name);
        let remedy = Remedy::Disconnect { mount_point: mount_point.clone(), supervisor: None };
        let limit = limits::begin(MEASUREMENT, format!("the measurement in {name}"), remedy);
        let side = Self { name, mount_point, daemon: None, _limit: limit };
        let mut all = taken();
        plan.afford(all.iter().map(|taken| taken.bytes).sum::<u64>() + bytes)?;
        if memory_available().unwrap_or(0) < bytes + MARGIN {
            return Err("the machine has too little memory left".to_owned());
        }
        if let Some((kind, pages)) = pages {
            kind.reserve(pages)?;
        }
        all.push(Taken { mount_point: side.mount_point.clone(), bytes, pages });
        let mounted = mount(&side.mount_point);
        drop(all);
        mounted.map(|()| side)
    }

    /// Opens or makes a file for reading and writing.
    pub fn file(&self, name: &str) -> File {
        let path = self.mount_point.join(name);
        File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .expect("a file")
    }

    /// Makes a file of `bytes` and maps all of it.
    pub fn mapped(&self, name: &str, bytes: u64) -> Mapping {
        let file = self.file(name);
        file.set_len(bytes).expect("ftruncate");
        map(&file, bytes)
    }

    /// The process that a counter of the pool names (ours only).
    pub fn process(&self, counter: Counter) -> Pid {
        Pid::from_raw(self.counter(counter) as i32).expect("a process id")
    }

    /// A counter of the pool (ours only).
    pub fn counter(&self, counter: Counter) -> u64 {
        let mut counters = vec![0; 4096];
        let length = rustix::fs::getxattr(&self.mount_point, POOL, &mut counters[..])
            .expect("the pool attribute");
        let counters = String::from_utf8_lossy(&counters[..length]);
        let prefix = format!("{} ", counter.name());
        let value = counters.lines().find_map(|line| line.strip_prefix(&prefix)?.parse().ok());
        value.expect("a counter")
    }

    /// The number of the worker's descriptors (ours only).
    pub fn descriptors(&self) -> u64 {
        let directory = format!("/proc/{}/fd", self.process(Counter::WorkerPid));
        fs::read_dir(directory).expect("descriptors").count() as u64
    }

    /// The limit of the worker's descriptors (ours only).
    pub fn descriptor_limit(&self) -> u64 {
        let limits =
            fs::read_to_string(format!("/proc/{}/limits", self.process(Counter::WorkerPid)))
                .expect("limits");
        let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"));
        let word = line.and_then(|line| line.split_ascii_whitespace().next()).expect("a limit");
        word.parse().unwrap_or(u64::MAX) // the word is "unlimited"
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        let mut all = taken();
        if let Some(at) = all.iter().position(|taken| taken.mount_point == self.mount_point) {
            all.remove(at).undo();
        }
        if let Some(daemon) = &self.daemon {
            // The memory of the daemon is free when the daemon has ended.
            if !limits::is_readable(limits::ANSWER, daemon) {
                eprintln!("the daemon of {} has not ended", self.mount_point.display());
            }
        }
    }
}

/// Maps the first `bytes` of a file for reading and writing.
pub fn map(file: &File, bytes: u64) -> Mapping {
    Mapping::new(file, Range::new(0, bytes), Sharing::Shared, true).expect("mmap")
}

fn mount_at(mount_point: &Path, kind: &str, options: &str) -> Result<(), String> {
    let options = CString::new(options).expect("no NUL");
    mount("bench", mount_point, kind, MountFlags::empty(), Some(options.as_c_str()))
        .map_err(|errno| format!("mounting {kind}: {errno}"))
}
