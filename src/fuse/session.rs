//! The start of a session with the kernel, and the takeover of a session from a dead worker.
//!
//! fuser begins with the handshake (FUSE_INIT) on the descriptor that it gets. So it gets one end
//! of a socket pair, and the worker writes the request to the other end. At a mount this is the
//! kernel's request, and the worker passes fuser's reply on to the kernel. At a takeover it is the
//! stored request of the mount, and the worker compares fuser's reply with the stored one. Then the
//! device takes the place of the socket.
//!
//! All workers use one open file of the device. So the kernel keeps the requests that a dead worker
//! has read and not answered (`fuse_dev.pq`), and sends them again when a worker asks for that.
//! With a clone of the device for each worker (`clone_fd`), the kernel would end these requests
//! with ECONNABORTED.

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
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair,
};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

/// Size of the buffer for the handshake. The kernel demands at least FUSE_MIN_READ_BUFFER; no
/// FUSE_INIT needs as much.
const HANDSHAKE_BYTES: usize = 64 << 10;

/// The file of [`Attempts`] in the private root.
const ATTEMPTS: &str = "/attempts";

/// The two messages of the handshake with the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Handshake {
    /// The kernel's FUSE_INIT.
    pub request: Vec<u8>,
    /// The daemon's reply.
    pub reply: Vec<u8>,
}

/// A session that the kernel has agreed to, and that no thread serves yet.
pub struct Connection(Session<Adapter>);

impl Connection {
    /// Answers the kernel's FUSE_INIT on `device`, which must be mounted. `keep` gets the handshake
    /// before the kernel gets the reply, so that from then on another worker can take over.
    ///
    /// # Errors
    /// A sentence: a feature that the kernel lacks, or that nothing is mounted.
    pub fn establish(
        fs: Arc<Fs>,
        device: &OwnedFd,
        keep: impl FnOnce(&Handshake) -> Result<()>,
    ) -> Result<Self, String> {
        let request =
            read_request(device).map_err(|errno| format!("waiting for the mount: {errno}"))?;
        let (session, reply) = shake_hands(Adapter::new(fs, device, attempts()?)?, &request)?;
        keep(&Handshake { request, reply: reply.clone() })
            .map_err(|error| format!("keeping the handshake: {error}"))?;
        rustix::io::write(device, &reply)
            .map_err(|errno| format!("answering the handshake: {errno}"))?;
        Self::on(session, device)
    }

    /// Takes over a session that began with `handshake`:
    ///
    /// - It erases the nodes that the kernel has given up meanwhile.
    /// - It wakes the programs that poll, so that they look again.
    /// - It answers EIO to each request that has killed too many workers.
    /// - It asks the kernel to send the other unanswered requests again.
    ///
    /// # Errors
    /// A sentence. The kernel keeps the session, so another worker can still take it over.
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
    /// The errors of read(2) on the device.
    pub fn serve(self) -> Result<()> {
        Ok(self.0.run()?)
    }
}

/// Starts as many threads as [`Connection::serve`] does, and ends them. fuser starts its threads
/// only when the filesystem already counts as serving. That is too late to find out that the kernel
/// refuses threads.
///
/// # Errors
/// EAGAIN if a thread cannot be started.
pub fn rehearse_threads() -> io::Result<()> {
    let (hold, held) = bounded::<()>(0);
    let start = |_| {
        let held = held.clone();
        std::thread::Builder::new().name("rehearsal".into()).spawn(move || _ = held.recv())
    };
    let started: io::Result<Vec<_>> = (0..THREADS).map(start).collect();
    drop(hold); // all threads continue and end
    for thread in started? {
        let _ = thread.join(); // a thread that panics ends the process
    }
    Ok(())
}

fn attempts() -> Result<Arc<Attempts>, String> {
    let attempts = Attempts::open(Path::new(ATTEMPTS));
    attempts
        .map(Arc::new)
        .map_err(|error| format!("reading which requests were under way: {error}"))
}

/// Answers EIO to the requests that have killed too many workers, if they are still unanswered.
fn refuse_exhausted(attempts: &Attempts, device: &OwnedFd) {
    for number in attempts.exhausted() {
        if device::refuse(device, number) {
            log::error!(
                "one worker after the other has died of request {number:#x}: it is refused (EIO)"
            );
        }
    }
}

const DIFFERENT: &str =
    "this version agrees with the kernel on other terms than the one that mounted: unmount first";

/// Checks that this version agrees with the kernel on an equal session.
///
/// # Errors
/// A sentence, if the session would be a different one.
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

/// Passes `request` to fuser over a socket, and returns fuser's reply.
fn shake_hands<F: Filesystem>(
    filesystem: F,
    request: &[u8],
) -> Result<(Session<F>, Vec<u8>), String> {
    let pair = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
    let (ours, its) = pair.map_err(|errno| format!("socketpair: {errno}"))?;
    send(&ours, request, SendFlags::empty())
        .map_err(|errno| format!("passing the handshake on: {errno}"))?;
    let mut config = Config::default();
    config.n_threads = Some(THREADS);
    let session = Session::from_fd(filesystem, its, SessionACL::All, config)
        .map_err(|error| error.to_string())?;
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
