//! One life of the daemon: fill the pool, wait for the mount, serve, give everything back.

use crate::agents;
use crate::control::{Control, Message};
use crate::error::Error;
use crate::fs::{self, Fs};
use crate::fuse::Connection;
use crate::options::Options;
use crate::pool::Pool;
use crate::sys::{self, identity, namespace};
use crate::units::PageSize;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Descriptors that the daemon may have: two a file, and one a directory that is open.
const MOST_DESCRIPTORS: u64 = 1 << 20;

/// Runs the daemon on `device` (/dev/fuse, not mounted yet), and tells the mount helper of it.
///
/// # Errors
/// A sentence for the admin, which the mount helper was told too. Nothing is left behind.
pub fn run(options: &Options, device: OwnedFd, mut control: Control) -> Result<(), String> {
    let served = serve(options, device, &mut control);
    if let Err(why) = &served {
        log::error!("{why}");
        let _ = control.send(&Message::Failed(why.clone())); // a helper that is gone need not know
    }
    served
}

fn serve(options: &Options, device: OwnedFd, control: &mut Control) -> Result<(), String> {
    let (sender, agent) =
        agents::collapse::start().map_err(|error| format!("no thread for an agent: {error}"))?;
    let repaired = options.collapse.then_some(sender);
    let served = set_up(options, control, repaired).and_then(|fs| {
        let patrol =
            agents::patrol::start(fs.clone()).map_err(|error| format!("no thread for an agent: {error}"))?;
        let connection = connect(fs, device, control)?;
        control.send(&Message::Serving).map_err(|_| "the mount helper has gone away".to_owned())?;
        let served =
            connection.serve().map_err(|error| format!("the connection to the kernel broke: {error}"));
        drop(patrol);
        served
    });
    // Everything that could report a repair is gone by now, so the agent ends.
    agent.join().map_err(|_| "the collapse agent panicked".to_owned())?;
    served
}

/// A mount namespace of our own, the pool, and the filesystem on it.
fn set_up(
    options: &Options,
    control: &mut Control,
    repaired: Option<crossbeam::channel::Sender<fs::Repaired>>,
) -> Result<Arc<Fs>, String> {
    let what = |what: &'static str| move |error: Error| format!("{what}: {error}");
    let pages = options.pages(sys::memory_total().map_err(what("reading /proc/meminfo"))?)?;
    sys::huge_tmpfs_allowed().map_err(|error| error.to_string())?;
    prepare_process().map_err(what("preparing the daemon (it must be started by root)"))?;
    let pool = fill(options.page_size, pages, control)?;
    let fs = Fs::create(options, pool, repaired).map_err(what("creating the filesystem"))?;
    let total = pages * options.page_size.bytes();
    let huge = fs.huge_at_mount();
    log::info!("{pages} pages of {} bytes taken, {huge} bytes in 2 MiB folios", options.page_size.bytes());
    if huge < total {
        log::warn!("memory is fragmented: {} bytes of the pool are in small pages", total - huge);
    }
    control.send(&Message::Ready { huge, total }).map_err(|_| "the mount helper has gone away".to_owned())?;
    Ok(Arc::new(fs))
}

fn prepare_process() -> Result<(), Error> {
    raise_descriptor_limit()?;
    // The kernel may tell a mapper of a memory error in a folio that has been split before; the patrol finds it anyway.
    sys::sigbus::survive_news()?;
    // All memory of the pool would be lost with the daemon: the OOM killer is to look elsewhere (proc(5)).
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", "-1000") {
        log::warn!("the OOM killer may choose this process (no CAP_SYS_RESOURCE?): {error}");
    }
    identity::keep_capabilities_across_fsuid()?;
    namespace::enter_private_root(&[
        crate::index::MOUNT_POINT.trim_start_matches('/'),
        fs::OBJECTS.trim_start_matches('/'),
    ])
}

/// To what is good for half a million files, or as far as it goes without CAP_SYS_RESOURCE.
fn raise_descriptor_limit() -> Result<(), Error> {
    let wanted = Rlimit { current: Some(MOST_DESCRIPTORS), maximum: Some(MOST_DESCRIPTORS) };
    if setrlimit(Resource::Nofile, wanted).is_ok() {
        return Ok(());
    }
    let maximum = getrlimit(Resource::Nofile).maximum;
    log::warn!("at most {maximum:?} descriptors may be open: a limit to the number of files");
    Ok(setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })?)
}

fn fill(page_size: PageSize, pages: u64, control: &mut Control) -> Result<Pool, String> {
    let total = pages * page_size.bytes();
    let filled = Pool::fill(page_size, pages, |done| Ok(control.send(&Message::Progress { done, total })?));
    filled.map_err(|error| match error {
        Error::NoMemory | Error::Full => format!(
            "the machine cannot give {total} bytes: {} are available now; choose a smaller size=, or free memory first",
            sys::memory_available().unwrap_or(0)
        ),
        other => format!("filling the pool: {other}"),
    })
}

/// Waits for the mount helper's mount(2), then agrees with the kernel on a session.
fn connect(fs: Arc<Fs>, device: OwnedFd, control: &mut Control) -> Result<Connection, String> {
    if control.receive() != Some(Message::Mounted) {
        return Err("the mount helper has gone away without having mounted".to_owned());
    }
    Connection::establish(fs, device)
}
