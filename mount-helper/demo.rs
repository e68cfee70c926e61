//! `hugetlb2 demo`: on real memory, what this filesystem is for.
//!
//! Every printed number was measured in that run: by clocks, by smaps of the process that has the
//! file mapped, by counting the bytes that read(2) delivers. If a number is not as claimed, the
//! demonstration fails.

use crate::attributes::{self, COLLAPSE, POISON, REPAIR};
use crate::demo_mapper::Mapper;
use hugetlb2fs::attributes::Counter;
use hugetlb2fs::units::{PageSize, SUBPAGE_SIZE};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, fstat, mkdirat, openat, unlinkat};
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, PidfdFlags, geteuid, pidfd_open};
use serde_json::{Map, Value, json};
use std::env::temp_dir;
use std::fs::{File, Permissions};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

const PAGE: u64 = PageSize::Gigantic.bytes();
const SUBPAGES: u64 = PAGE / SUBPAGE_SIZE;
const HUGE_ENTRIES: u64 = 512;
/// An arbitrary place, neither at the start nor at the end of a 2 MiB folio.
const BAD: u64 = 0x2345_6000;
/// The neighbouring subpage, in which the other process keeps working.
const BUSY: u64 = BAD + SUBPAGE_SIZE;
const PIECE: usize = 1 << 20;
const MOUNT_POINT: &str = "mnt";

type Step<T = ()> = Result<T, String>;

/// Runs it.
pub fn main(json: bool) -> ExitCode {
    let mut report = Report { json, values: Map::new() };
    let shown = show(&mut report);
    if json {
        report.values.insert("ok".into(), json!(shown.is_ok()));
        println!("{:#}", Value::Object(report.values));
    }
    match shown {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("hugetlb2 demo: {why}");
            ExitCode::FAILURE
        }
    }
}

fn show(report: &mut Report) -> Step {
    report.heading("A pool of two 1 GiB pages");
    let clock = Instant::now();
    let pool = Pool::mount()?;
    report.time("mount", clock);
    let counters = attributes::pool(&pool.mount_point)?;
    report.expect("pages_free", "pages free", counters.get(Counter::PagesFree).unwrap_or(0), 2)?;
    let clock = Instant::now();
    let file = pool.create_file()?;
    // On a virtual machine the host takes most of this time: it finds memory for its guest at the
    // guest's first touch.
    report.time("create the file", clock);

    report.heading("Another process maps a file of one page");
    let mut other = Mapper::start(&pool.file)?;
    report.expect(
        "sigbus_before",
        "SIGBUS in a walk over all 262144 subpages",
        other.walk()?.len() as u64,
        0,
    )?;
    report.expect(
        "huge_before",
        "2 MiB entries that map it (smaps)",
        other.huge_entries()?,
        HUGE_ENTRIES,
    )?;
    write_pattern(&file)?;
    other.work(BUSY)?;

    report.heading("4 KiB go bad while it is being used");
    let clock = Instant::now();
    set(&pool.file, POISON, &format!("{BAD:#x} {SUBPAGE_SIZE}"))?;
    report.time("quarantine", clock);
    report.expect(
        "sigbus_neighbour",
        "SIGBUS at the neighbouring subpage, which was in use",
        other.rest()?,
        0,
    )?;
    let hits = other.walk()?;
    report.expect("sigbus_after", "SIGBUS in a walk over all subpages", hits.len() as u64, 1)?;
    report.expect("sigbus_offset", "at offset", hits.first().copied().unwrap_or(0), BAD)?;
    report.expect(
        "huge_poisoned",
        "2 MiB entries that still map the rest",
        other.huge_entries()?,
        HUGE_ENTRIES - 1,
    )?;
    let clock = Instant::now();
    let (good, wrong) = read_pattern(&file)?;
    report.time("read", clock);
    report.expect("good_subpages", "subpages that read(2) delivers", good, SUBPAGES - 1)?;
    report.expect("wrong_subpages", "of which with a wrong byte", wrong, 0)?;

    report.heading("Repair, by two extended attributes");
    let clock = Instant::now();
    set(&pool.file, REPAIR, &format!("salvage {BAD:#x} {SUBPAGE_SIZE}"))?;
    report.time("repair", clock);
    let clock = Instant::now();
    set(&pool.file, COLLAPSE, "all")?;
    report.time("collapse", clock);
    report.expect(
        "sigbus_repaired",
        "SIGBUS in a walk over all subpages",
        other.walk()?.len() as u64,
        0,
    )?;
    report.expect(
        "huge_repaired",
        "2 MiB entries that map it",
        other.huge_entries()?,
        HUGE_ENTRIES,
    )?;
    let (good, wrong) = read_pattern(&file)?;
    report.expect("good_repaired", "subpages that read(2) delivers", good, SUBPAGES)?;
    report.expect("wrong_repaired", "of which with a wrong byte", wrong, 0)?;

    report.heading("What it cost");
    let wrong = attributes::read(&pool.mount_point, attributes::CHECK)
        .map_err(|errno| errno.to_string())?;
    report.expect(
        "violations",
        "invariants that do not hold",
        wrong.unwrap_or_default().lines().count() as u64,
        0,
    )?;
    report.line("lost_here", "bytes out of reach meanwhile, here", SUBPAGE_SIZE);
    report.line("lost_hugetlbfs", "and on hugetlbfs, where the page is lost whole", PAGE);
    drop(other);
    drop(file);
    pool.unmount()
}

/// The results: printed at once for people, and at the end for programs.
struct Report {
    json: bool,
    values: Map<String, Value>,
}

impl Report {
    fn heading(&self, text: &str) {
        if !self.json {
            println!("{text}");
        }
    }

    fn line(&mut self, name: &str, text: &str, value: u64) {
        self.values.insert(name.into(), json!(value));
        if !self.json {
            println!("  {text:<58}{value:>14}");
        }
    }

    fn time(&mut self, name: &str, since: Instant) {
        let milliseconds = since.elapsed().as_secs_f64() * 1e3;
        self.values.insert(format!("{}_ms", name.replace(' ', "_")), json!(milliseconds));
        if !self.json {
            println!("  {:<58}{milliseconds:>11.3} ms", format!("time to {name}"));
        }
    }

    fn expect(&mut self, name: &str, text: &str, value: u64, claimed: u64) -> Step {
        self.line(name, text, value);
        if value == claimed {
            Ok(())
        } else {
            Err(format!("{text}: {value}, and {claimed} was claimed"))
        }
    }
}

/// A pool that is unmounted in any case.
///
/// Its mount point lies in a directory that root alone can search. Every path starts at the
/// descriptor of that directory, because the owner of TMPDIR can put something else in the place of
/// its name.
struct Pool {
    /// Also holds the descriptor open.
    directory: OwnedFd,
    name: PathBuf,
    mount_point: PathBuf,
    file: PathBuf,
    daemon: Option<OwnedFd>,
}

/// Makes a directory that no other user had made before (mkdtemp(3)), and opens it.
fn private_directory() -> Step<(PathBuf, OwnedFd)> {
    let mut builder = tempfile::Builder::new();
    let made =
        builder.prefix("hugetlb2-demo-").permissions(Permissions::from_mode(0o700)).tempdir();
    let name =
        made.map_err(|error| format!("a directory in {}: {error}", temp_dir().display()))?.keep();
    let failed = |errno: Errno| format!("{}: {errno}", name.display());
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = openat(CWD, &name, flags, Mode::empty()).map_err(failed)?;
    let found = fstat(&directory).map_err(failed)?;
    if found.st_uid != geteuid().as_raw() || found.st_mode & 0o077 != 0 {
        return Err(format!("{}: another user has put something in its place", name.display()));
    }
    Ok((name, directory))
}

impl Pool {
    fn mount() -> Step<Self> {
        let (name, directory) = private_directory()?;
        mkdirat(&directory, MOUNT_POINT, Mode::from_raw_mode(0o700))
            .map_err(|errno| format!("{}/{MOUNT_POINT}: {errno}", name.display()))?;
        let base = format!("/proc/{}/fd/{}", std::process::id(), directory.as_raw_fd());
        let mount_point = Path::new(&base).join(MOUNT_POINT);
        let file = mount_point.join("file");
        let mut pool = Self { directory, name, mount_point, file, daemon: None };
        let mounted = Command::new(own_program()?)
            .arg0("mount.hugetlb2")
            .arg("demo")
            .arg(&pool.mount_point)
            .args(["-o", "size=2G,pagesize=1G"])
            .status()
            .map_err(|error| format!("mount.hugetlb2: {error}"))?;
        if !mounted.success() {
            return Err("the pool could not be mounted".to_owned());
        }
        let pid = attributes::pool(&pool.mount_point)?.get(Counter::DaemonPid).unwrap_or(0);
        let pid = i32::try_from(pid)
            .ok()
            .and_then(Pid::from_raw)
            .ok_or("the daemon has no process id")?;
        pool.daemon = Some(
            pidfd_open(pid, PidfdFlags::empty()).map_err(|errno| format!("pidfd_open: {errno}"))?,
        );
        Ok(pool)
    }

    fn create_file(&self) -> Step<File> {
        let options = File::options().read(true).write(true).create_new(true).open(&self.file);
        let file = options.map_err(|error| format!("{}: {error}", self.file.display()))?;
        file.set_len(PAGE).map_err(|error| format!("ftruncate: {error}"))?;
        Ok(file)
    }

    /// Unmounts, and waits until the memory is free again.
    fn unmount(mut self) -> Step {
        let daemon = self.daemon.take().ok_or("it is not mounted")?;
        unmount(&self.mount_point, UnmountFlags::NOFOLLOW)
            .map_err(|errno| format!("umount: {errno}"))?;
        let patience = Timespec { tv_sec: 10, tv_nsec: 0 };
        match poll(&mut [PollFd::new(&daemon, PollFlags::IN)], Some(&patience)) {
            Ok(1) => Ok(()),
            _ => Err("the daemon does not end".to_owned()),
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if self.daemon.is_some() {
            let _ = unmount(&self.mount_point, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
        }
        let _ = unlinkat(&self.directory, MOUNT_POINT, AtFlags::REMOVEDIR);
        let _ = std::fs::remove_dir(&self.name); // an empty directory, perhaps another user's by now
    }
}

fn own_program() -> Step<PathBuf> {
    std::env::current_exe().map_err(|error| format!("the way to this program: {error}"))
}

fn set(file: &Path, attribute: &str, value: &str) -> Step {
    attributes::write(file, attribute, value)
        .map_err(|errno| format!("{attribute} {value}: {errno}"))
}

// ---- the pattern --------------------------------------------------------------------------------

/// Each subpage is filled with its own number.
fn pattern(subpage: u64) -> impl Iterator<Item = u8> {
    std::iter::repeat_n(subpage.to_le_bytes(), SUBPAGE_SIZE as usize / 8).flatten()
}

fn write_pattern(file: &File) -> Step {
    for start in (0..PAGE).step_by(PIECE) {
        let first = start / SUBPAGE_SIZE;
        let piece: Vec<u8> =
            (first..first + PIECE as u64 / SUBPAGE_SIZE).flat_map(pattern).collect();
        file.write_all_at(&piece, start)
            .map_err(|error| format!("write at {start:#x}: {error}"))?;
    }
    Ok(())
}

/// The number of subpages that read(2) delivers, and the number of those that hold other bytes than
/// were written.
fn read_pattern(file: &File) -> Step<(u64, u64)> {
    let mut buffer = vec![0; PIECE];
    let (mut good, mut wrong, mut at) = (0, 0, 0);
    while at < PAGE {
        match file.read_at(&mut buffer, at) {
            Ok(read) => {
                for (n, bytes) in buffer[..read].chunks(SUBPAGE_SIZE as usize).enumerate() {
                    good += 1;
                    wrong +=
                        u64::from(!pattern(at / SUBPAGE_SIZE + n as u64).eq(bytes.iter().copied()));
                }
                at += read as u64;
            }
            Err(error) if error.raw_os_error() == Some(5) => at += SUBPAGE_SIZE,
            Err(error) => return Err(format!("read at {at:#x}: {error}")),
        }
    }
    Ok((good, wrong))
}
