//! Agreeing with the kernel on a session, and taking one over from a process that is no more.
//!
//! fuser speaks first of all the handshake, FUSE_INIT, on the descriptor that it is given. It gets one end of a socket pair, in
//! which the request lies: the kernel's own when the filesystem is mounted, the one that was kept from then
//! when a session is taken over. The answer is passed on to the kernel, or compared with the one that it got at first. Then
//! the device takes the place of the socket.
//!
//! The device is one open file for all who ever serve it, so the kernel keeps what a dead worker had read and not answered
//! (`fuse_dev.pq`), and sends it again when asked. Clones of the device (`clone_fd`) would end those requests with
//! ECONNABORTED instead.

use super::adapter::{Adapter, forget};
use super::attempts::Attempts;
use super::features::agree;
use super::{THREADS, backing, device};
use crate::error::Result;
use crate::fs::Fs;
use crate::sys::process;
use crossbeam::channel::bounded;
use fuser::{Config, Filesystem, KernelConfig, Request, Session, SessionACL};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

/// What a device must be read with at least (FUSE_MIN_READ_BUFFER), and more than any FUSE_INIT needs.
const HANDSHAKE_BYTES: usize = 64 << 10;

/// Where [`Attempts`] are noted, in the private root.
const ATTEMPTS: &str = "/attempts";

/// What was said in the handshake with the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Handshake {
    /// The kernel's FUSE_INIT.
    pub request: Vec<u8>,
    /// Our answer.
    pub reply: Vec<u8>,
}

/// A connection to the kernel, agreed on and not served yet.
pub struct Connection(Session<Adapter>);

impl Connection {
    /// Answers the kernel's FUSE_INIT on `device`, which must have been mounted. `keep` is given what was said before the
    /// kernel has the answer, so that another can take over from then on.
    ///
    /// # Errors
    /// A sentence: what the kernel lacks, or that nothing is mounted.
    pub fn establish(
        fs: Arc<Fs>,
        device: &OwnedFd,
        keep: impl FnOnce(&Handshake) -> Result<()>,
    ) -> Result<Self, String> {
        let request = read_request(device).map_err(|errno| format!("waiting for the mount: {errno}"))?;
        let (session, reply) = shake_hands(Adapter::new(fs, device, attempts()?)?, &request)?;
        keep(&Handshake { request, reply: reply.clone() })
            .map_err(|error| format!("keeping the handshake: {error}"))?;
        rustix::io::write(device, &reply).map_err(|errno| format!("answering the handshake: {errno}"))?;
        Self::on(session, device)
    }

    /// Takes over a session that was agreed on with `handshake`: nodes that the kernel has given up meanwhile are erased, those
    /// who poll look again, and what was asked and not answered is asked again, but for what worker after worker has died of:
    /// that is answered with EIO.
    ///
    /// # Errors
    /// A sentence. The kernel has noticed nothing.
    pub fn take_over(fs: Arc<Fs>, device: &OwnedFd, handshake: &Handshake) -> Result<Self, String> {
        let attempts = attempts()?;
        let adapter = Adapter::new(fs.clone(), device, attempts.clone())?;
        let (session, reply) = shake_hands(adapter, &handshake.request)?;
        if reply != handshake.reply {
            return Err(DIFFERENT.to_owned());
        }
        let connection = Self::on(session, device)?;
        if let Err(error) = backing::close_lost(&fs, device) {
            log::warn!("the kernel may keep an empty superblock until it is unmounted: {error}");
        }
        for node in fs.orphans() {
            forget(&fs, device, node);
        }
        fs.dismantle_stranded_or_warn();
        fs.wake_pollers(|handle| device::wake_poller(device, handle))
            .map_err(|error| format!("waking who polls: {error}"))?;
        refuse_exhausted(&attempts, device);
        device::resend(device).map_err(|error| format!("having requests sent again: {error}"))?;
        Ok(connection)
    }

    fn on(session: Session<Adapter>, device: &OwnedFd) -> Result<Self, String> {
        process::replace(session.as_fd(), device).map_err(|error| format!("dup3: {error}"))?;
        Ok(Self(session))
    }

    /// Serves until the filesystem is unmounted.
    ///
    /// # Errors
    /// What reading the device answers.
    pub fn serve(self) -> Result<()> {
        Ok(self.0.run()?)
    }
}

/// Starts as many threads as [`Connection::serve`] will, and ends them. fuser starts its threads when the filesystem is
/// said to serve, which is too late to find out that the kernel refuses them.
///
/// # Errors
/// EAGAIN where one cannot be started.
pub fn rehearse_threads() -> io::Result<()> {
    let (hold, held) = bounded::<()>(0);
    let start = |_| {
        let held = held.clone();
        std::thread::Builder::new().name("rehearsal".into()).spawn(move || _ = held.recv())
    };
    let started: io::Result<Vec<_>> = (0..THREADS).map(start).collect();
    drop(hold); // all go on, and end
    for thread in started? {
        let _ = thread.join(); // a thread that panics ends the process
    }
    Ok(())
}

fn attempts() -> Result<Arc<Attempts>, String> {
    let attempts = Attempts::open(Path::new(ATTEMPTS));
    attempts.map(Arc::new).map_err(|error| format!("reading which requests were under way: {error}"))
}

/// Answers what workers have died of too often, as far as it is not answered yet.
fn refuse_exhausted(attempts: &Attempts, device: &OwnedFd) {
    for number in attempts.exhausted() {
        if device::refuse(device, number) {
            log::error!("one worker after the other has died of request {number:#x}: it is refused (EIO)");
        }
    }
}

const DIFFERENT: &str =
    "this version agrees with the kernel on other terms than the one that mounted: unmount first";

/// Whether this version would have agreed on the same session.
///
/// # Errors
/// A sentence, where it would not.
pub fn would_agree(handshake: &Handshake) -> Result<(), String> {
    struct Agreeing;
    impl Filesystem for Agreeing {
        fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
            agree(config)
        }
    }
    let (_, reply) = shake_hands(Agreeing, &handshake.request)?;
    if reply == handshake.reply { Ok(()) } else { Err(DIFFERENT.to_owned()) }
}

/// Has fuser answer `request`, on a socket.
fn shake_hands<F: Filesystem>(filesystem: F, request: &[u8]) -> Result<(Session<F>, Vec<u8>), String> {
    let pair = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
    let (ours, its) = pair.map_err(|errno| format!("socketpair: {errno}"))?;
    send(&ours, request, SendFlags::empty()).map_err(|errno| format!("passing the handshake on: {errno}"))?;
    let mut config = Config::default();
    config.n_threads = Some(THREADS);
    let session =
        Session::from_fd(filesystem, its, SessionACL::All, config).map_err(|error| error.to_string())?;
    let mut reply = vec![0; HANDSHAKE_BYTES];
    let (length, _) = recv(&ours, &mut reply[..], RecvFlags::DONTWAIT)
        .map_err(|errno| format!("no answer to the handshake: {errno}"))?;
    reply.truncate(length);
    Ok((session, reply))
}

fn read_request(device: &OwnedFd) -> Result<Vec<u8>, Errno> {
    let mut request = vec![0; HANDSHAKE_BYTES];
    loop {
        match rustix::io::read(device, &mut request[..]) {
            Ok(length) => {
                request.truncate(length);
                return Ok(request);
            }
            Err(Errno::INTR | Errno::AGAIN | Errno::NOENT) => {}
            Err(errno) => return Err(errno),
        }
    }
}
