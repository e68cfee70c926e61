//! mount.hugetlb2, by the protocol of mount(8) for external helpers.

use crate::attributes::{self, Counters};
use crate::mounts;
use crate::namespace::Namespaces;
use crate::options::Requested;
use crate::protocol::{self, Failure};
use crate::session::{self, Daemon};
use crate::terminal::say;
use clap::{Arg, ArgAction, ArgMatches, Command};
use hugetlb2fs::attributes::Counter;
use hugetlb2fs::options::{Nodes, Options, Size, agreed};
use hugetlb2fs::pool::Sizes;
use hugetlb2fs::units::PageSize;
use rustix::fs::{CWD, Dir, DirEntry, Mode, OFlags, StatVfsMountFlags, openat, statvfs};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount_remount};
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// The command line.
pub fn command() -> Command {
    let flag = |name: &'static str, short: char, help: &'static str| {
        Arg::new(name).short(short).action(ArgAction::SetTrue).help(help)
    };
    Command::new("mount.hugetlb2")
        .version(clap::crate_version!())
        .about("Takes a pool of gigantic pages from the machine and mounts it.")
        .override_usage("mount.hugetlb2 NAME DIR [-sfnv] [-N NAMESPACE] [-o OPTIONS] [-t TYPE]")
        .after_help(format!(
            "Options of the pool (-o):\n{}\n\
             mount(8)'s generic options (ro, nosuid, noexec, remount, ...) work as usual;\n\
             remount,size= resizes a mounted pool, remount,nodes=0:SIZE,1:SIZE each node's\n\
             part; nonempty mounts over a directory that has entries.\n\n\
             Exit status: 0 mounted, 1 wrong usage, 2 system error, 4 internal error,\n\
             8 interrupted, 32 mount failed.",
            Options::help()
        ))
        .arg(Arg::new("name").required(true).help("what /proc/mounts shows as the source"))
        .arg(
            Arg::new("dir")
                .required(true)
                .value_parser(clap::value_parser!(PathBuf))
                .help("an empty directory"),
        )
        .arg(flag("sloppy", 's', "ignore unknown options"))
        .arg(flag("fake", 'f', "check everything, mount nothing"))
        .arg(flag("no-mtab", 'n', "accepted; there is no mtab to write to"))
        .arg(flag("verbose", 'v', "say what is done"))
        .arg(
            Arg::new("namespace")
                .short('N')
                .help("mount in this mount namespace: a process id, or a path"),
        )
        .arg(
            Arg::new("options")
                .short('o')
                .action(ArgAction::Append)
                .help("comma-separated; see below"),
        )
        .arg(Arg::new("type").short('t').help("accepted; there is one type"))
}

/// Runs as mount.hugetlb2.
pub fn main(arguments: Vec<OsString>) -> ExitCode {
    protocol::run(command(), arguments, carry_out)
}

fn carry_out(matches: &ArgMatches) -> Result<(), Failure> {
    let strings = matches.get_many::<String>("options").into_iter().flatten().map(String::as_str);
    let requested =
        Requested::parse(strings, matches.get_flag("sloppy")).map_err(Failure::Usage)?;
    let directory: &PathBuf = matches.get_one("dir").expect("clap has required it");
    let source: &String = matches.get_one("name").expect("clap has required it");
    let verbose = matches.get_flag("verbose");
    if !rustix::process::geteuid().is_root() {
        return Err(Failure::Usage("only root can mount".into()));
    }
    let namespaces = Namespaces::open(matches.get_one::<String>("namespace"))?;
    if requested.remount {
        namespaces.enter_target()?;
        return remount(directory, &requested, matches.get_flag("fake"));
    }
    check_size(&requested)?;
    let device = session::open_device()?;
    let program = session::daemon_program()?;
    namespaces.enter_target()?;
    let place = open_directory(directory, requested.nonempty)?;
    if matches.get_flag("fake") {
        return Ok(());
    }
    namespaces.leave_target()?;
    let mut daemon = Daemon::start(&program, &requested.pool, &device)?;
    let pid = daemon.pid();
    let (huge, total) = daemon.wait_until_filled()?;
    if verbose || huge < total {
        say(format_args!("mount.hugetlb2: {huge} of {total} bytes are in 2 MiB folios"));
    }
    daemon.mount(&device, source, requested.flags, |filesystem| {
        namespaces.enter_target()?;
        session::attach(filesystem, &place).map_err(|errno| {
            Failure::Mount(format!("mounting on {}: {errno}", directory.display()))
        })
    })?;
    if verbose {
        let directory = directory.display();
        say(format_args!(
            "mount.hugetlb2: {source} mounted on {directory}, served by process {pid}"
        ));
    }
    Ok(())
}

fn check_size(requested: &Requested) -> Result<(), Failure> {
    let memory =
        hugetlb2fs::sys::memory_total().map_err(|error| Failure::System(error.to_string()))?;
    requested.pool.pages(memory).map(drop).map_err(Failure::Usage)
}

/// Opens an existing directory, which must be empty without `nonempty`. The pool is mounted on the
/// opened directory: its name can come to stand for another one at any time.
fn open_directory(directory: &Path, nonempty: bool) -> Result<OwnedFd, Failure> {
    let wrong = |why: String| Failure::Mount(format!("mount point {}: {why}", directory.display()));
    let refused = |errno: Errno| match errno {
        Errno::NOTDIR => wrong("not a directory".into()),
        other => wrong(other.to_string()),
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let opened = openat(CWD, directory, flags, Mode::empty()).map_err(refused)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let listed = openat(&opened, ".", flags, Mode::empty()).map_err(refused)?;
    let mut entries = Dir::new(listed).map_err(refused)?;
    let is_entry = |entry: Result<DirEntry, Errno>| {
        entry.is_ok_and(|entry| !matches!(entry.file_name().to_bytes(), b"." | b".."))
    };
    if !nonempty && entries.any(is_entry) {
        return Err(wrong(
            "not empty; what is in it could not be reached (option nonempty mounts all the same)"
                .into(),
        ));
    }
    Ok(opened)
}

/// Changes a mounted pool: the size by the attribute, flags by mount(2). Other options that come
/// along from fstab must be as they are in force.
fn remount(directory: &Path, requested: &Requested, fake: bool) -> Result<(), Failure> {
    let failed = |why: String| Failure::Mount(format!("{}: {why}", directory.display()));
    let directory = mounts::enter(directory).map_err(|errno| failed(errno.to_string()))?;
    mounts::require_pool(directory).map_err(failed)?;
    let pool = attributes::pool(directory).map_err(failed)?;
    let in_force = attributes::options(directory).map_err(failed)?;
    refuse_changes(requested, &in_force).map_err(Failure::Usage)?;
    let size = new_size(requested, &pool)?;
    if fake {
        return Ok(());
    }
    let now = flags_in_force(directory).map_err(|errno| failed(errno.to_string()))?;
    let wanted = requested.applied_to(now);
    let set_flags = |flags| {
        mount_remount(directory, flags, "")
            .map_err(|errno| failed(format!("mount(2), MS_REMOUNT: {errno}")))
    };
    if let Some(size) = size {
        // The attribute of a pool that is mounted read-only cannot be set before that is lifted.
        let lifted = now.contains(MountFlags::RDONLY) && !wanted.contains(MountFlags::RDONLY);
        if lifted {
            set_flags(wanted)?;
        }
        attributes::resize(directory, &size).map_err(|why| {
            let put_back = if lifted { set_flags(now) } else { Ok(()) };
            put_back.err().unwrap_or_else(|| failed(why))
        })?;
    }
    set_flags(wanted)
}

/// The size that a remount asks for, as the attribute takes it: that of each node, or of the pool.
/// `None` if the size is to stay.
fn new_size(requested: &Requested, pool: &Counters) -> Result<Option<String>, Failure> {
    let memory =
        hugetlb2fs::sys::memory_total().map_err(|error| Failure::System(error.to_string()))?;
    let page_size = pool.page_size().map_err(Failure::Mount)?;
    let sizes = new_sizes(requested, pool, page_size, memory).map_err(Failure::Usage)?;
    let bytes = |pages: u64| pages * page_size.bytes();
    Ok(sizes.map(|sizes| match sizes.parts() {
        None => bytes(sizes.pages()).to_string(),
        Some(parts) => {
            let part = |(node, pages)| (node, bytes(pages));
            Nodes::Sized(parts.into_iter().map(part).collect()).to_string()
        }
    }))
}

/// The sizes that a remount asks for. Nodes without a size that the pool has already keep their
/// parts, unless a size is given; with another node they share the pool anew.
fn new_sizes(
    requested: &Requested,
    pool: &Counters,
    page_size: PageSize,
    memory: u64,
) -> Result<Option<Sizes>, String> {
    let size = requested.pool.size;
    let Some(nodes) = &requested.pool.nodes else {
        let pages = size.map(|size| size.pages(page_size, memory)).transpose();
        return Ok(pages.map_err(|why| format!("option size: {why}"))?.map(Sizes::Anywhere));
    };
    let named = |why: String| format!("option nodes: {why}");
    if let Some(parts) = nodes.parts_or_none(page_size).map_err(named)? {
        let total = parts.values().sum();
        let size = size.map_or(Ok(total), |size| size.pages(page_size, memory))?;
        return agreed(size, total).map(|_| Some(Sizes::Parts(parts)));
    }
    if size.is_none() && nodes.names() == pool.nodes() {
        return Ok(None);
    }
    let now = pool.get(Counter::PagesTotal).unwrap_or(0) * page_size.bytes();
    let size = Some(size.unwrap_or(Size::Bytes(now)));
    let pages = Options { page_size, size, ..requested.pool.clone() }.pages(memory)?;
    Ok(Some(Sizes::Even(nodes.names(), pages)))
}

/// mount(8) adds the options of fstab to a remount. An option that differs from the one in force is
/// refused; otherwise it would be ignored.
fn refuse_changes(requested: &Requested, in_force: &[(String, String)]) -> Result<(), String> {
    let is_asked = |name: &str| {
        !["size", "nodes"].contains(&name) && requested.given.iter().any(|given| given == name)
    };
    for (name, value) in requested.pool.given().filter(|(name, _)| is_asked(name)) {
        let now = in_force.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str());
        if now != Some(&value) {
            let now = now.unwrap_or("none");
            return Err(format!(
                "option {name}: {now} is in force, and stays so as long as the pool is mounted"
            ));
        }
    }
    Ok(())
}

/// The flags that the pool is mounted with, as mount(2) takes them.
fn flags_in_force(directory: &Path) -> Result<MountFlags, Errno> {
    let in_force = statvfs(directory)?.f_flag;
    let flags = REPORTED.iter().filter(|(reported, _)| in_force.contains(*reported));
    Ok(flags.fold(MountFlags::empty(), |all, (_, flag)| all | *flag))
}

/// The flags that statvfs(3) reports. It does not report dirsync and lazytime, which have no effect
/// here.
const REPORTED: [(StatVfsMountFlags, MountFlags); 8] = [
    (StatVfsMountFlags::RDONLY, MountFlags::RDONLY),
    (StatVfsMountFlags::NOSUID, MountFlags::NOSUID),
    (StatVfsMountFlags::NODEV, MountFlags::NODEV),
    (StatVfsMountFlags::NOEXEC, MountFlags::NOEXEC),
    (StatVfsMountFlags::SYNCHRONOUS, MountFlags::SYNCHRONOUS),
    (StatVfsMountFlags::NOATIME, MountFlags::NOATIME),
    (StatVfsMountFlags::NODIRATIME, MountFlags::NODIRATIME),
    (StatVfsMountFlags::RELATIME, MountFlags::RELATIME),
];
