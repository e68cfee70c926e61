//! One life of a worker: fill the pool and wait for the mount, or take over from another worker;
//! serve. A worker that ends leaves everything in place, for the next worker, or for the supervisor
//! to give back.
//!
//! A worker may end at any instruction. It keeps knowledge in its memory for speed only: the next
//! worker reads everything off the files ([`crate::fs::Fs::open`]), finishes or undoes half-done
//! changes, and takes the session over ([`Connection::take_over`]). One worker runs at a time: each
//! holds a lock, which the kernel frees when the process is gone.

use crate::agents;
use crate::error::Error;
use crate::fs::{self, Fs};
use crate::fuse::{self, Connection};
use crate::logging;
use crate::mount_protocol::{Control, Message};
use crate::options::{Nodes, Options};
use crate::pool::{self, Pool, Sizes};
use crate::session_record::SessionRecord;
use crate::supervisor::{Announcement, Death, Role, Start};
use crate::sys::{self, cgroup, identity, namespace, seccomp};
use crate::units::NumaNode;
use crossbeam::channel::Sender;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

/// Descriptors that a worker may have.
const MOST_DESCRIPTORS: u64 = 1 << 20;

/// Held by the worker that serves; in the private root.
const LOCK: &str = "/worker";

/// Readies the process that workers are going to be forked from.
///
/// # Errors
/// A sentence.
pub fn prepare(namespace: impl FnOnce() -> Result<(), Error>) -> Result<(), String> {
    let preparing = |error: Error| format!("preparing the daemon: {error}");
    let missing = identity::missing_capabilities().map_err(preparing)?;
    refuse_if_any("the daemon needs capabilities that it is started without", &missing)?;
    let refused = seccomp::refused_calls().map_err(preparing)?;
    refuse_if_any(
        "the daemon needs system calls that the seccomp filter of its container or service refuses",
        &refused,
    )?;
    let prepared = raise_descriptor_limit()
        .and_then(|()| sys::sigbus::survive_news()) // of a memory error; the patrol finds it anyway
        .and_then(|()| identity::keep_capabilities_across_fsuid())
        .and_then(|()| namespace());
    prepared.map_err(preparing)?;
    // A shortage that the daemon causes must end no other process.
    if let Err(error) = sys::shortage::spare_others() {
        log::warn!(
            "memory that is taken can be the end of other processes (no CAP_SYS_RESOURCE?): {error}"
        );
    }
    // All memory of the pool would be lost with the daemon, so the OOM killer is told to look
    // elsewhere (proc(5)).
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", "-1000") {
        log::warn!("the OOM killer may choose this process (no CAP_SYS_RESOURCE?): {error}");
    }
    Ok(())
}

fn refuse_if_any(why: &str, names: &[&str]) -> Result<(), String> {
    if names.is_empty() { Ok(()) } else { Err(format!("{why}: {}", names.join(", "))) }
}

/// Leaves the machine's mounts for a namespace with what [`run`] needs.
///
/// # Errors
/// As for [`namespace::enter_private_root`].
pub fn enter_private_root() -> Result<(), Error> {
    let directories = [crate::index::MOUNT_POINT, fs::OBJECTS, pool::RESERVES];
    namespace::enter_private_root(&directories.map(|path| path.trim_start_matches('/')))
}

/// To what is good for a million files, or as far as it goes without CAP_SYS_RESOURCE.
fn raise_descriptor_limit() -> Result<(), Error> {
    let wanted = Rlimit { current: Some(MOST_DESCRIPTORS), maximum: Some(MOST_DESCRIPTORS) };
    if setrlimit(Resource::Nofile, wanted).is_ok() {
        return Ok(());
    }
    let maximum = getrlimit(Resource::Nofile).maximum;
    let most = maximum.map_or("without end".to_owned(), |most| most.to_string());
    log::warn!(
        "at most {most} descriptors may be open (no CAP_SYS_RESOURCE), a limit to the number of files"
    );
    Ok(setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })?)
}

/// Runs a worker on `device` (/dev/fuse), in the process that was forked for the worker. Returns
/// the exit status.
pub fn run(options: &Options, device: &OwnedFd, role: Role) -> i32 {
    sys::policy::stay_mapped();
    sys::allocator::keep_memory_at_hand();
    let writes = logging::start_writer().map_err(no_thread);
    let done = match role {
        Role::Refuse => refuse(device), // without a writer its lines wait for the next worker's
        Role::Serve { announcement, mut start } => {
            let served = writes.and_then(|()| serve(options, device, announcement, &mut start));
            if let (Err(why), Some(control)) = (&served, &mut start.control) {
                // A helper that is gone need not know.
                let _ = control.send(&Message::Failed(why.clone()));
            }
            served
        }
    };
    if let Err(why) = &done {
        log::error!("{why}");
    }
    logging::flush();
    i32::from(done.is_err())
}

fn no_thread(error: std::io::Error) -> String {
    format!("no thread can be started: {}", sys::process::explain_refusal(error))
}

/// Answers everything with EIO until it is unmounted, killed, or replaced.
fn refuse(device: &OwnedFd) -> Result<(), String> {
    log::error!(
        "one worker after the other has ended before it was of use: every request is refused (EIO) for now. Mappings and \
         all memory stay as they are. Within half a minute a worker is started again; SIGHUP to process {} starts one at \
         once, `hugetlb2 upgrade` one of another version",
        rustix::process::getppid().map_or(0, |pid| pid.as_raw_nonzero().get())
    );
    // The workers may have died of a request that is not answered yet.
    fuse::resend(device).map_err(|error| format!("having requests sent again: {error}"))?;
    let mut buffer = vec![0; 2 * fuse::LARGEST_REQUEST as usize];
    while fuse::refuse_one(device, &mut buffer)
        .map_err(|error| format!("refusing requests: {error}"))?
    {}
    Ok(())
}

fn serve(
    options: &Options,
    device: &OwnedFd,
    announcement: Announcement,
    start: &mut Start,
) -> Result<(), String> {
    let _only_one =
        take_turn().map_err(|error| format!("waiting for the worker before this one: {error}"))?;
    let (sender, agent) = agents::collapse::start().map_err(no_thread)?;
    let repaired = options.collapse.then_some(sender);
    let connected = match &mut start.control {
        Some(control) if start.mounting => begin(options, device, control, repaired),
        _ => take_over(options, device, repaired, start.after),
    };
    let served = connected.and_then(|(fs, connection)| {
        let patrol = agents::patrol::start(fs.clone()).map_err(no_thread)?;
        let follower = agents::policies::start(fs.clone()).map_err(no_thread)?;
        let doors = agents::doors::start(fs.clone()).map_err(no_thread)?;
        let steward = agents::steward::start(&fs).map_err(no_thread)?;
        fuse::rehearse_threads().map_err(no_thread)?;
        let told = start.control.take().map(|mut control| control.send(&Message::Serving));
        if start.mounting && told.is_none_or(|told| told.is_err()) {
            return Err(HELPER_GONE.to_owned()); // it would have said that it is mounted
        }
        announcement.serving();
        let served = connection
            .serve()
            .map_err(|error| format!("the connection to the kernel broke: {error}"));
        let _hurry = fs.hurry_stewards(); // a busy machine would keep them from their end
        drop((patrol, follower, doors, steward));
        served
    });
    // Everything that could report a repair is gone by now, so the agent ends.
    agent.join().map_err(|_| "the collapse agent panicked".to_owned())?;
    served
}

const HELPER_GONE: &str = "the mount helper has gone away";

/// Waits until no other worker is left.
fn take_turn() -> Result<File, Error> {
    let lock = File::options().create(true).truncate(false).write(true).open(LOCK)?;
    while let Err(errno) = flock(&lock, FlockOperation::LockExclusive) {
        if errno != Errno::INTR {
            return Err(errno.into());
        }
    }
    Ok(lock)
}

/// The filesystem and its session as another worker has left them.
fn take_over(
    options: &Options,
    device: &OwnedFd,
    repaired: Option<Sender<fs::Repaired>>,
    after: Option<Death>,
) -> Result<(Arc<Fs>, Connection), String> {
    let left = SessionRecord::read(Path::new("/"))
        .map_err(|error| format!("reading what was left: {error}"))?;
    if let Some(Death { worker, status }) = after {
        log::error!(
            "worker {} has ended ({}); this one takes over",
            worker.as_raw_nonzero(),
            describe(status)
        );
    }
    let fs =
        Fs::open(options, repaired).map_err(|error| format!("reading what was left: {error}"))?;
    let fs = Arc::new(fs);
    fs.look_for_hw_errors(); // an error may have hit while no worker was there
    let connection = Connection::take_over(fs.clone(), device, &left.handshake)?;
    Ok((fs, connection))
}

fn describe(status: rustix::process::WaitStatus) -> String {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => format!("status {code}"),
        (_, Some(signal)) => format!("signal {signal}"),
        _ => "in some way".to_owned(),
    }
}

fn begin(
    options: &Options,
    device: &OwnedFd,
    control: &mut Control,
    repaired: Option<Sender<fs::Repaired>>,
) -> Result<(Arc<Fs>, Connection), String> {
    let fs = set_up(options, control, repaired)?;
    // The helper makes the filesystem now; then the kernel speaks first.
    if control.receive() != Some(Message::Mounted) {
        return Err("the mount helper has gone away without having mounted".to_owned());
    }
    let keep = |handshake: &fuse::Handshake| {
        SessionRecord { options: options.clone(), handshake: handshake.clone() }.write()
    };
    let connection = Connection::establish(fs.clone(), device, keep)?;
    Ok((fs, connection))
}

/// The pool, and the filesystem on it.
fn set_up(
    options: &Options,
    control: &mut Control,
    repaired: Option<Sender<fs::Repaired>>,
) -> Result<Arc<Fs>, String> {
    let what = |what: &'static str| move |error: Error| format!("{what}: {error}");
    let pages = options.pages(sys::memory_total().map_err(what("reading /proc/meminfo"))?)?;
    sys::huge_tmpfs_allowed().map_err(|error| error.to_string())?;
    let pool = fill(options, pages, control)?;
    let fs = Fs::create(options, pool, repaired).map_err(what("creating the filesystem"))?;
    let total = pages * options.page_size.bytes();
    let huge = fs.huge_at_mount();
    log::info!(
        "{pages} pages of {} bytes taken, {huge} bytes in 2 MiB folios",
        options.page_size.bytes()
    );
    if huge < total {
        log::warn!("memory is fragmented: {} bytes of the pool are in small pages", total - huge);
    }
    control.send(&Message::Ready { huge, total }).map_err(|_| HELPER_GONE.to_owned())?;
    Ok(Arc::new(fs))
}

fn fill(options: &Options, pages: u64, control: &mut Control) -> Result<Pool, String> {
    let (page_size, total) = (options.page_size, pages * options.page_size.bytes());
    let sizes = match &options.nodes {
        None => Sizes::Anywhere(pages),
        Some(Nodes::Even(nodes)) => Sizes::Even(nodes.clone(), pages),
        Some(Nodes::Sized(_)) => Sizes::Parts(options.parts()?.unwrap_or_default()),
    };
    let progress = |done| Ok(control.send(&Message::Progress { done, total })?);
    let filled = Pool::fill(page_size, &sizes, progress);
    filled.map_err(|error| match error {
        Error::NoMemory | Error::Full => refusal(total),
        other => format!("filling the pool: {other}"),
    })
}

/// The message for a pool of `total` bytes that does not fit, with what would be right.
fn refusal(total: u64) -> String {
    if let Ok(Some((nodes, available))) = sys::numa::available_in_cpuset()
        && available < total
    {
        let nodes = NumaNode::list(&nodes);
        return format!(
            "the NUMA nodes {nodes}, which the daemon's cpuset allows, cannot give {total} bytes: {available} are available \
             now; allow more nodes, or choose a smaller size="
        );
    }
    match cgroup::tightest_limit("self") {
        Some(limit) if limit.room() < total => format!(
            "the daemon's cgroup cannot give {total} bytes: {limit}; raise the limit, or choose a smaller size="
        ),
        _ => format!(
            "the machine cannot give {total} bytes: {} are available now; choose a smaller size=, or free memory first",
            sys::memory_available().unwrap_or(0)
        ),
    }
}
