//! The adapter: the filesystem, and the ways in which a request is answered: at once, or later from
//! a job's thread.

use super::attempts::{Attempts, Turn};
use super::backing;
use super::decode::{context, is_read_only};
use super::device;
use super::jobs::{DAEMON, Holds, Jobs, Waiting};
use crate::error::{Error, Result};
use crate::fs::{Fs, Object, RequestContext};
use crate::index::{Attributes, New};
use crate::sys::backing::{Borrower, Lent};
use crate::sys::identity::Caller;
use crate::sys::process;
use crate::units::InodeId;
use fuser::{FileHandle, FopenFlags, Request};
use rustix::io::Errno;
use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// A filesystem that answers the kernel.
pub(super) struct Adapter {
    pub(super) fs: Arc<Fs>,
    /// For notifications to the kernel, and to close backing files.
    device: OwnedFd,
    jobs: Jobs,
    waiting: Arc<Waiting>,
    pub(super) holds: Holds,
    attempts: Arc<Attempts>,
    backings: backing::Issuer,
}

/// A request that may be answered later, from another thread.
pub(super) struct Asked {
    user: u32,
    pub(super) context: RequestContext,
    /// The kernel's number of the request, by which [`Attempts`] counts it.
    number: u64,
    /// Held until the request is answered or postponed.
    turn: Option<Turn>,
}

impl Adapter {
    pub(super) fn new(
        fs: Arc<Fs>,
        device: &OwnedFd,
        attempts: Arc<Attempts>,
    ) -> Result<Self, String> {
        let device = device.try_clone().map_err(|error| format!("dup: {error}"))?;
        let jobs = Jobs::start().map_err(|error| {
            format!(
                "no threads for long requests can be started: {}",
                process::explain_refusal(error)
            )
        })?;
        let (waiting, holds) = (Arc::default(), Holds::default());
        Ok(Self {
            fs,
            device,
            jobs,
            waiting,
            holds,
            attempts,
            backings: backing::Issuer::default(),
        })
    }

    /// Counts an attempt to carry a request out; see [`Attempts::begin`].
    pub(super) fn begin(&self, request: &Request) -> Option<Turn> {
        self.attempts.begin(request.unique().0)
    }

    /// Prepares a file to be mapped, and decides if the kernel reads by the descriptor itself.
    pub(super) fn ready(
        &self,
        object: &Object,
        flags: i32,
        context: RequestContext,
        reply: &impl Borrower,
    ) -> Result<(Lent, Opened)> {
        let number = self.backings.number_of(object, &self.device)?;
        let native = self.fs.open_natively(object, is_read_only(flags), context)?;
        Ok((
            reply.lend(number),
            if native { Opened::Native(context.unique) } else { Opened::Mediated },
        ))
    }

    /// Answers at once if that takes a moment only, and later if not.
    pub(super) fn answer<T: 'static>(
        &self,
        request: &Request,
        run: impl Fn(&Fs, RequestContext) -> Result<T> + Send + 'static,
        finish: impl FnOnce(&Fs, Result<T>) + Send + 'static,
    ) {
        let asked = self.asked(request);
        match run(&self.fs, asked.context) {
            Err(error) if is_delay(&error) => self.answer_later(asked, run, finish),
            result => finish(&self.fs, result),
        }
    }

    pub(super) fn asked(&self, request: &Request) -> Asked {
        let (user, number) = (request.uid(), request.unique().0);
        Asked { user, context: context(request), number, turn: self.begin(request) }
    }

    /// Answers from a job's thread. A request that waits for another message of the kernel is
    /// answered from a thread of its own. The message is FORGET, which returns the pages of a
    /// removed file, or RELEASE of a descriptor.
    pub(super) fn answer_later<T: 'static>(
        &self,
        Asked { user, context, number, turn }: Asked,
        run: impl Fn(&Fs, RequestContext) -> Result<T> + Send + 'static,
        finish: impl FnOnce(&Fs, Result<T>) + Send + 'static,
    ) {
        drop(turn);
        self.attempts.postpone(number);
        let (fs, waiting, attempts) =
            (self.fs.clone(), self.waiting.clone(), self.attempts.clone());
        let run = move |fs: &Fs| run(fs, RequestContext { brief: false, ..context });
        self.jobs.submit(user, move || {
            let turn = attempts.begin(number);
            match run(&fs) {
                Err(error) if is_delay(&error) => waiting.admit(user, move |may_wait| {
                    let _turn = turn;
                    let result = if may_wait { fs.patiently(|| run(&fs)) } else { Err(error) };
                    finish(&fs, result);
                }),
                result => finish(&fs, result),
            }
        });
    }

    pub(super) fn forget_one(&self, node: InodeId) {
        if forget(&self.fs, &self.device, node) {
            let fs = self.fs.clone();
            self.jobs.submit(DAEMON, move || fs.dismantle_stranded_or_warn());
        }
    }

    /// Undoes a creation that the kernel is not told of.
    pub(super) fn uncreate(
        &self,
        parent: InodeId,
        name: &OsStr,
        node: InodeId,
        context: RequestContext,
    ) {
        // A failure leaves an empty file, and no harm.
        let _ = self.fs.unlink(parent, name, context);
        self.forget_one(node);
    }

    /// Makes a regular file with its object. If there is no object to be had, the file is removed
    /// again.
    pub(super) fn create_file(
        &self,
        parent: InodeId,
        name: &OsStr,
        mode: u32,
        caller: Caller,
        context: RequestContext,
    ) -> Result<(Attributes, Arc<Object>)> {
        let attributes =
            self.fs.make(parent, name, New::Node(mode | libc::S_IFREG, 0), caller, context)?;
        let object = self.fs.object(attributes.node);
        let object =
            object.inspect_err(|_| self.uncreate(parent, name, attributes.node, context))?;
        Ok((attributes, object))
    }
}

/// Releases an orphan that the kernel does not know any more, with the number of its backing file.
/// Returns true if the node was one: then the caller calls [`Fs::dismantle_stranded`].
pub(super) fn forget(fs: &Fs, device: &OwnedFd, node: InodeId) -> bool {
    let close = |object: &Object| match backing::close(object, device) {
        Ok(()) | Err(Error::Os(Errno::NOENT)) => {} // an earlier worker has closed it and died
        Err(error) => {
            log::warn!(
                "file {node}: the kernel keeps its superblock until it is unmounted: {error}"
            );
        }
    };
    fs.forget(node, || device::knows(device, node), close)
}

/// The way in which the kernel reads and writes by a new descriptor. It maps the file's memory in
/// both.
#[derive(Clone, Copy)]
pub(super) enum Opened {
    /// The kernel sends each read and write to the daemon.
    Mediated,
    /// The kernel reads the file's memory itself. The descriptor has this number, which is never 0
    /// ([`Fs::open_natively`]).
    Native(u64),
}

impl Opened {
    pub(super) fn handle(self) -> FileHandle {
        match self {
            Self::Mediated => FileHandle(0),
            Self::Native(number) => FileHandle(number),
        }
    }

    pub(super) fn flags(self) -> FopenFlags {
        match self {
            Self::Mediated => {
                FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES
            }
            Self::Native(_) => FopenFlags::empty(),
        }
    }
}

/// True if a thread that may take long has to carry the request out once more.
pub(super) fn is_delay(error: &Error) -> bool {
    matches!(error, Error::TakesLong | Error::Returning | Error::OpenNatively)
}
