//! From FUSE to [`crate::fs`] and back: decode, call, encode. The only module that knows fuser's types.
//!
//! Every regular file is opened `PASSTHROUGH`: mmap(2) goes to the object's `data` without us (Linux 6.9). All opens of a file
//! name the same number of a backing file, which lives as long as the file does (`backing`). `DIRECT_IO` besides has reads and
//! writes come here (`Opened`); without it, as a descriptor for reading only can have it, reads go to `data` too.
//!
//! Names, attributes and absence change through this kernel only, so it may keep names and attributes for good; it
//! drops them itself where a request changes them (fs/fuse/dir.c), with the one exception that `validity` makes.
//!
//! A worker may die at any instruction, and another takes over ([`Connection::take_over`]): an open file and an open directory are
//! nothing here but their node, and the one number that the kernel knows a file's memory by is kept with the file.

mod attempts;
mod backing;
mod device;
mod encode;
mod jobs;
mod session;

pub use device::{refuse_one, resend};
pub use session::{Connection, Handshake, rehearse_threads, would_agree};

use crate::error::{Error, Result};
use crate::fs::{Allocation, Changes, Fs, Object, Pace, Reading, Ticket};
use crate::index::{Attributes, Kind, New, Time};
use crate::sys::identity::{Caller, Member};
use crate::sys::process;
use crate::units::NodeId;
use attempts::{Attempts, Turn};
use backing::{Borrower, Lent};
use encode::{errno, file_attr, file_type};
use fuser::{
    BsdFileFlags, CopyFileRangeFlags, FileHandle, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    IoctlFlags, KernelConfig, LockOwner, OpenFlags, PollEvents, PollFlags, PollNotifier, ReplyAttr,
    ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen,
    ReplyPoll, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use jobs::{DAEMON, Holds, Jobs, Waiting};
use rustix::io::Errno;
use std::cell::RefCell;
use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Largest read or write in one request; what `max_read=` of the mount must say too.
pub const LARGEST_REQUEST: u32 = 1 << 20;

/// Threads that serve requests. None of them waits for a file's lock, for memory that moves, or for what another request brings
/// ([`Adapter::answer`]).
const THREADS: usize = 8;

/// For good: see the head of the module.
const FOR_GOOD: Duration = Duration::from_secs(365 * 24 * 3600);

const GENERATION: Generation = Generation(0);

/// What the kernel must offer, and since when it does.
const REQUIRED: &[(InitFlags, &str)] = &[
    (InitFlags::FUSE_PASSTHROUGH, "FUSE passthrough (CONFIG_FUSE_PASSTHROUGH, Linux 6.9)"),
    (InitFlags::FUSE_POSIX_ACL, "POSIX ACLs in FUSE (Linux 4.9)"),
    (InitFlags::FUSE_DONT_MASK, "FUSE_DONT_MASK (Linux 2.6.31)"),
    (InitFlags::FUSE_EXPORT_SUPPORT, "FUSE_EXPORT_SUPPORT (Linux 2.6.28)"),
    (InitFlags::FUSE_HANDLE_KILLPRIV_V2, "FUSE_HANDLE_KILLPRIV_V2 (Linux 5.11)"),
];

/// What the kernel may offer.
const WELCOME: &[InitFlags] = &[InitFlags::FUSE_PARALLEL_DIROPS, InitFlags::FUSE_CACHE_SYMLINKS];

/// A filesystem that answers the kernel.
struct Adapter {
    fs: Arc<Fs>,
    /// What is said to the kernel without having been asked.
    device: OwnedFd,
    jobs: Jobs,
    waiting: Arc<Waiting>,
    holds: Holds,
    attempts: Arc<Attempts>,
    backings: backing::Issuer,
}

/// A request that may be answered later.
struct Asked {
    user: u32,
    ticket: Ticket,
    /// Its number, as [`Attempts`] knows it.
    number: u64,
    /// Held until it is answered, or postponed.
    turn: Option<Turn>,
}

/// What is missing in what the kernel offers; `None` if nothing is.
fn missing(offered: InitFlags) -> Option<String> {
    let names: Vec<_> =
        REQUIRED.iter().filter(|(flag, _)| !offered.contains(*flag)).map(|(_, name)| *name).collect();
    (!names.is_empty()).then(|| format!("this kernel lacks {}", names.join(", ")))
}

fn node_id(ino: INodeNo) -> NodeId {
    NodeId(ino.0)
}

fn caller(request: &Request, umask: u32) -> Caller {
    Caller { uid: request.uid(), gid: request.gid(), umask }
}

/// Which request it is. Only for a write does the kernel say whether the caller has CAP_FSETID; otherwise root is taken to have it.
fn ticket(request: &Request) -> Ticket {
    let (number, again) = (request.unique().0 & !device::AGAIN, request.unique().0 & device::AGAIN != 0);
    Ticket { number, again, thread: request.pid(), unprivileged: request.uid() != 0, brief: true }
}

impl Adapter {
    fn new(fs: Arc<Fs>, device: &OwnedFd, attempts: Arc<Attempts>) -> Result<Self, String> {
        let device = device.try_clone().map_err(|error| format!("dup: {error}"))?;
        let jobs = Jobs::start().map_err(|error| {
            format!("no threads for long requests can be started: {}", process::explain_refusal(error))
        })?;
        let (waiting, holds) = (Arc::default(), Holds::default());
        Ok(Self { fs, device, jobs, waiting, holds, attempts, backings: backing::Issuer::default() })
    }

    /// A request is going to be carried out; see [`Attempts::begin`].
    fn begin(&self, request: &Request) -> Option<Turn> {
        self.attempts.begin(request.unique().0)
    }

    /// Readies a file for being mapped, and says who reads by the descriptor.
    fn ready(
        &self,
        object: &Object,
        flags: i32,
        ticket: Ticket,
        reply: &impl Borrower,
    ) -> Result<(Lent, Opened)> {
        let number = self.backings.number_of(object, &self.device)?;
        let native = self.fs.open_natively(object, is_read_only(flags), ticket)?;
        Ok((reply.lend(number), if native { Opened::Native(ticket.number) } else { Opened::Mediated }))
    }

    /// Answers now where that takes a moment, and later otherwise.
    fn answer<T: 'static>(
        &self,
        request: &Request,
        run: impl Fn(&Fs, Ticket) -> Result<T> + Send + 'static,
        finish: impl FnOnce(&Fs, Result<T>) + Send + 'static,
    ) {
        let asked = self.asked(request);
        match run(&self.fs, asked.ticket) {
            Err(error) if is_delay(&error) => self.answer_later(asked, run, finish),
            result => finish(&self.fs, result),
        }
    }

    fn asked(&self, request: &Request) -> Asked {
        let (user, number) = (request.uid(), request.unique().0);
        Asked { user, ticket: ticket(request), number, turn: self.begin(request) }
    }

    /// Answers from a job's thread; or from a thread of its own where that takes what the kernel has yet to tell: FORGET, which
    /// brings the pages of files that are going away, or RELEASE of a descriptor.
    fn answer_later<T: 'static>(
        &self,
        Asked { user, ticket, number, turn }: Asked,
        run: impl Fn(&Fs, Ticket) -> Result<T> + Send + 'static,
        finish: impl FnOnce(&Fs, Result<T>) + Send + 'static,
    ) {
        drop(turn);
        self.attempts.postpone(number);
        let (fs, waiting, attempts) = (self.fs.clone(), self.waiting.clone(), self.attempts.clone());
        let run = move |fs: &Fs| run(fs, Ticket { brief: false, ..ticket });
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

    fn forget_one(&self, node: NodeId) {
        if forget(&self.fs, &self.device, node) {
            let fs = self.fs.clone();
            self.jobs.submit(DAEMON, move || fs.dismantle_stranded_or_warn());
        }
    }

    /// After a file may have lost its last name.
    fn count_orphans(&self) {
        if self.fs.has_uncounted_orphans() {
            let fs = self.fs.clone();
            self.jobs.submit(DAEMON, move || fs.count_orphans());
        }
    }

    /// Undoes a creation of which the kernel learns nothing.
    fn uncreate(&self, parent: NodeId, name: &OsStr, node: NodeId, ticket: Ticket) {
        let _ = self.fs.unlink(parent, name, ticket); // it would be an empty file that nobody has asked for, no more
        self.forget_one(node);
    }

    /// Makes a regular file and readies it for being mapped; undone where the latter fails.
    fn create_file(
        &self,
        parent: NodeId,
        name: &OsStr,
        mode: u32,
        caller: Caller,
        ticket: Ticket,
    ) -> Result<(Attributes, Arc<Object>)> {
        let attributes = self.fs.make(parent, name, New::Node(mode | libc::S_IFREG, 0), caller, ticket)?;
        let object = self.fs.object(attributes.node);
        let object = object.inspect_err(|_| self.uncreate(parent, name, attributes.node, ticket))?;
        Ok((attributes, object))
    }
}

/// Lets go of a node without a name that the kernel does not know any more, with the number that the kernel knew its memory by.
/// Returns whether that was so: [`Fs::dismantle_stranded`] is to follow.
fn forget(fs: &Fs, device: &OwnedFd, node: NodeId) -> bool {
    let close = |object: &Object| match backing::close(object, device) {
        Ok(()) | Err(Error::Os(Errno::NOENT)) => {} // a worker has closed it and died
        Err(error) => {
            log::warn!("file {node}: the kernel keeps its superblock until it is unmounted: {error}");
        }
    };
    fs.forget(node, || device::knows(device, node), close)
}

/// How the kernel reads and writes by a new descriptor, besides that it maps the file's memory.
#[derive(Clone, Copy)]
enum Opened {
    /// By asking us.
    Mediated,
    /// By itself, from the file's memory. It stands under this number ([`Fs::open_natively`]), which is never 0.
    Native(u64),
}

impl Opened {
    fn handle(self) -> FileHandle {
        match self {
            Self::Mediated => FileHandle(0),
            Self::Native(number) => FileHandle(number),
        }
    }

    fn flags(self) -> FopenFlags {
        match self {
            Self::Mediated => FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES,
            Self::Native(_) => FopenFlags::empty(),
        }
    }
}

/// Whether a request is to be carried out once more, by a thread that has the time for it.
fn is_delay(error: &Error) -> bool {
    matches!(error, Error::TakesLong | Error::Returning | Error::OpenNatively)
}

fn is_read_only(flags: i32) -> bool {
    flags & libc::O_ACCMODE == libc::O_RDONLY
}

/// How long the kernel may keep what it is told of a node: not at all what is provisional, and not for a file with set-id bits. A
/// write can end those, and the kernel, which leaves that to us (FUSE_HANDLE_KILLPRIV_V2), would go on to execute the file with
/// them.
fn validity(attributes: &Attributes) -> Duration {
    const SET_ID: u32 = 0o6000;
    let mortal = attributes.kind == Kind::File && attributes.mode & SET_ID != 0;
    if mortal || attributes.provisional { Duration::ZERO } else { FOR_GOOD }
}

fn reply_entry(reply: ReplyEntry, result: Result<Attributes>) {
    match result {
        Ok(attributes) => reply.entry(&validity(&attributes), &file_attr(&attributes), GENERATION),
        Err(error) => reply.error(errno(&error)),
    }
}

fn reply_attr(reply: ReplyAttr, result: Result<Attributes>) {
    match result {
        Ok(attributes) => reply.attr(&validity(&attributes), &file_attr(&attributes)),
        Err(error) => reply.error(errno(&error)),
    }
}

fn reply_empty(reply: ReplyEmpty, result: Result<()>) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(errno(&error)),
    }
}

fn reply_data(reply: ReplyData, result: Result<impl AsRef<[u8]>>) {
    match result {
        Ok(bytes) => reply.data(bytes.as_ref()),
        Err(error) => reply.error(errno(&error)),
    }
}

/// Reads up to `length` bytes at `offset` into memory of their own.
fn read_anew(fs: &Fs, node: NodeId, (offset, length): (u64, usize), ticket: Ticket) -> Result<Vec<u8>> {
    let mut bytes = vec![0; length];
    let read = fs.read(node, &mut bytes, offset, ticket)?;
    bytes.truncate(read);
    Ok(bytes)
}

fn reply_write(reply: ReplyWrite, result: Result<usize>) {
    match result {
        Ok(written) => reply.written(written as u32),
        Err(error) => reply.error(errno(&error)),
    }
}

/// getxattr(2) and listxattr(2): a size of 0 asks for the length.
fn reply_xattr(reply: ReplyXattr, size: u32, result: Result<Vec<u8>>) {
    match result {
        Ok(value) if size == 0 => reply.size(value.len() as u32),
        Ok(value) if value.len() > size as usize => reply.error(fuser::Errno::ERANGE),
        Ok(value) => reply.data(&value),
        Err(error) => reply.error(errno(&error)),
    }
}

fn time(time: Option<TimeOrNow>) -> Time {
    match time {
        None => Time::Omit,
        Some(TimeOrNow::Now) => Time::Now,
        Some(TimeOrNow::SpecificTime(time)) => Time::At(as_sent(time)),
    }
}

/// fuser 0.18 takes the nanoseconds of a time before 1970 to count backward; the kernel's count forward, as everywhere.
fn as_sent(time: SystemTime) -> SystemTime {
    match UNIX_EPOCH.duration_since(time) {
        Ok(before) => {
            UNIX_EPOCH - Duration::from_secs(before.as_secs())
                + Duration::from_nanos(before.subsec_nanos().into())
        }
        Err(_) => time,
    }
}

/// The modes of fallocate(2) that there are here.
fn allocation(mode: i32) -> Result<Allocation> {
    const KEEP: i32 = libc::FALLOC_FL_KEEP_SIZE;
    const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | KEEP;
    const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE;
    const ZERO_KEEP: i32 = ZERO | KEEP;
    match mode {
        0 => Ok(Allocation::Extend),
        KEEP => Ok(Allocation::KeepSize),
        PUNCH => Ok(Allocation::Punch),
        ZERO => Ok(Allocation::Zero),
        ZERO_KEEP => Ok(Allocation::ZeroKeepSize),
        _ => Err(Error::Unsupported),
    }
}

/// What this version asks of the kernel.
fn agree(config: &mut KernelConfig) -> io::Result<()> {
    if let Some(what) = missing(config.capabilities()) {
        return Err(io::Error::new(io::ErrorKind::Unsupported, what));
    }
    let refused = |what: &str| io::Error::new(io::ErrorKind::Unsupported, what.to_owned());
    for (flag, name) in REQUIRED {
        config.add_capabilities(*flag).map_err(|_| refused(name))?;
    }
    for flag in WELCOME {
        let _ = config.add_capabilities(*flag);
    }
    config.set_max_stack_depth(1).map_err(|_| refused("a stacking depth of 1"))?;
    config.set_max_write(LARGEST_REQUEST).map_err(|_| refused("writes of 1 MiB"))?;
    Ok(())
}

thread_local! {
    /// What was read, on its way to the kernel.
    static READ_BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

impl Filesystem for Adapter {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        agree(config)
    }

    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let _turn = self.begin(request);
        reply_entry(reply, self.fs.lookup(node_id(parent), name));
    }

    fn forget(&self, _request: &Request, ino: INodeNo, _nlookup: u64) {
        self.forget_one(node_id(ino));
    }

    fn getattr(&self, request: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        let _turn = self.begin(request);
        reply_attr(reply, self.fs.attributes(node_id(ino)));
    }

    fn setattr(
        &self,
        request: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let changes = Changes {
            mode: mode.map(|mode| mode & 0o7777),
            uid,
            gid,
            size,
            accessed: time(atime),
            modified: time(mtime),
        };
        let change = move |fs: &Fs, ticket| fs.change(node_id(ino), &changes, ticket);
        self.answer(request, change, move |_, changed| reply_attr(reply, changed));
    }

    fn readlink(&self, request: &Request, ino: INodeNo, reply: ReplyData) {
        let _turn = self.begin(request);
        match self.fs.read_link(node_id(ino)) {
            Ok(target) => reply.data(target.as_bytes()),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let _turn = self.begin(request);
        let new = New::Node(mode, u64::from(rdev));
        reply_entry(reply, self.fs.make(node_id(parent), name, new, caller(request, umask), ticket(request)));
    }

    fn mkdir(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        reply: ReplyEntry,
    ) {
        let _turn = self.begin(request);
        let new = New::Directory(mode);
        reply_entry(reply, self.fs.make(node_id(parent), name, new, caller(request, umask), ticket(request)));
    }

    fn unlink(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let _turn = self.begin(request);
        reply_empty(reply, self.fs.unlink(node_id(parent), name, ticket(request)));
        self.count_orphans();
    }

    fn rmdir(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let _turn = self.begin(request);
        reply_empty(reply, self.fs.remove_directory(node_id(parent), name, ticket(request)));
    }

    fn symlink(&self, request: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        let _turn = self.begin(request);
        let target =
            CString::new(target.as_os_str().as_bytes()).map_err(|_| Error::invalid("NUL in a target"));
        let made = target.and_then(|target| {
            self.fs.make(node_id(parent), name, New::Symlink(&target), caller(request, 0), ticket(request))
        });
        reply_entry(reply, made);
    }

    fn rename(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: fuser::RenameFlags,
        reply: ReplyEmpty,
    ) {
        let _turn = self.begin(request);
        let flags = rustix::fs::RenameFlags::from_bits_retain(flags.bits());
        let (from, to, ticket) = ((node_id(parent), name), (node_id(newparent), newname), ticket(request));
        reply_empty(reply, self.fs.rename(from, to, flags, ticket));
        self.fs.dismiss(ticket);
        self.count_orphans();
    }

    fn link(&self, request: &Request, ino: INodeNo, newparent: INodeNo, newname: &OsStr, reply: ReplyEntry) {
        let _turn = self.begin(request);
        reply_entry(reply, self.fs.link(node_id(ino), node_id(newparent), newname, ticket(request)));
    }

    fn open(&self, request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let _turn = self.begin(request);
        let object = self.fs.object(node_id(ino));
        match object.and_then(|object| self.ready(&object, flags.0, ticket(request), &reply)) {
            Ok((backing, opened)) => reply.opened_passthrough(opened.handle(), opened.flags(), &backing),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn release(
        &self,
        _request: &Request,
        ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        if fh != Opened::Mediated.handle() {
            self.fs.close_natively(node_id(ino), fh.0);
        }
        reply.ok();
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let _turn = self.begin(request);
        let (parent, ticket) = (node_id(parent), ticket(request));
        let created = self.create_file(parent, name, mode, caller(request, umask), ticket);
        let opened = created.and_then(|(attributes, object)| {
            let ready = self.ready(&object, flags, ticket, &reply);
            let ready = ready.inspect_err(|_| self.uncreate(parent, name, attributes.node, ticket))?;
            Ok((attributes, ready))
        });
        match opened {
            Ok((attributes, (backing, opened))) => reply.created_passthrough(
                &validity(&attributes),
                &file_attr(&attributes),
                GENERATION,
                opened.handle(),
                opened.flags(),
                &backing,
            ),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn read(
        &self,
        request: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let (node, asked, length) = (node_id(ino), self.asked(request), size as usize);
        // What cannot be viewed, for whatever reason, is read; that says what is wrong.
        if let Ok(object) = self.fs.object(node)
            && let Ok(Some(viewed)) = object.view(offset, size.into(), &Pace::of(asked.ticket))
        {
            return reply.data(viewed.bytes());
        }
        READ_BUFFER.with_borrow_mut(|buffer| {
            if buffer.len() < length {
                buffer.resize(length, 0);
            }
            match self.fs.read(node, &mut buffer[..length], offset, asked.ticket) {
                Err(Error::TakesLong) => {
                    let read = move |fs: &Fs, ticket| read_anew(fs, node, (offset, length), ticket);
                    self.answer_later(asked, read, move |_, read| reply_data(reply, read));
                }
                result => reply_data(reply, result.map(|read| &buffer[..read])),
            }
        });
    }

    fn write(
        &self,
        request: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let mut asked = self.asked(request);
        asked.ticket.unprivileged = write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID);
        match self.fs.write(node_id(ino), data, offset, asked.ticket) {
            Err(error) if is_delay(&error) => {
                let bytes = self.holds.hold_prefix(request.uid(), data);
                let write = move |fs: &Fs, ticket| fs.write(node_id(ino), &bytes, offset, ticket);
                let finish = move |_: &Fs, written| reply_write(reply, written);
                self.answer_later(asked, write, finish);
            }
            result => reply_write(reply, result),
        }
    }

    // Nothing is ever unwritten: the kernel stops asking when it is told that there is no such request.

    fn flush(&self, _: &Request, _ino: INodeNo, _fh: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        reply.error(fuser::Errno::ENOSYS);
    }

    fn fsync(&self, _: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        reply.error(fuser::Errno::ENOSYS);
    }

    fn fsyncdir(&self, _: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        reply.error(fuser::Errno::ENOSYS);
    }

    /// There are no ioctls here. isatty(3) asks for one, and many programs call it for each file that they open.
    fn ioctl(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        _command: u32,
        _input: &[u8],
        _output_bytes: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(fuser::Errno::ENOTTY);
    }

    fn opendir(&self, request: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let _turn = self.begin(request);
        match self.fs.open_directory(node_id(ino)) {
            Ok(_) => reply.opened(FileHandle(0), FopenFlags::empty()),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn readdir(
        &self,
        request: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let _turn = self.begin(request);
        let read = self.fs.open_directory(node_id(ino)).and_then(|directory| {
            self.fs.read_directory(&directory, offset, |entry| {
                let name = OsStr::from_bytes(&entry.name);
                !reply.add(INodeNo(entry.node.0), entry.next, file_type(entry.kind), name)
            })
        });
        match read {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn statfs(&self, request: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        let _turn = self.begin(request);
        const NAME_MAX: u32 = 255;
        match self.fs.statistics() {
            Ok(s) => {
                let unit = s.page_size as u32;
                reply.statfs(
                    s.pages,
                    s.free_pages,
                    s.free_pages,
                    s.inodes,
                    s.free_inodes,
                    unit,
                    NAME_MAX,
                    unit,
                );
            }
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn setxattr(
        &self,
        request: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        let by = Member { uid: request.uid(), gid: request.gid(), pid: request.pid() };
        let (node, asked) = (node_id(ino), self.asked(request));
        let ticket = asked.ticket;
        match self.fs.set_attribute(node, name, (value, flags), by, ticket) {
            Err(error) if is_delay(&error) => {
                let (Some(value), name) = (self.holds.hold(request.uid(), value), name.to_owned()) else {
                    return reply.error(fuser::Errno::ENOSPC);
                };
                let set = move |fs: &Fs, ticket| fs.set_attribute(node, &name, (&value, flags), by, ticket);
                self.answer_later(asked, set, move |fs, result| {
                    reply_empty(reply, result);
                    fs.dismiss(ticket);
                });
            }
            result => {
                reply_empty(reply, result);
                self.fs.dismiss(ticket);
            }
        }
    }

    fn getxattr(&self, request: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let reading = if size == 0 { Reading::Length } else { Reading::Value { room: size as usize } };
        let name = name.to_owned();
        let get = move |fs: &Fs, ticket| fs.attribute(node_id(ino), &name, reading, ticket);
        self.answer(request, get, move |_, value| reply_xattr(reply, size, value));
    }

    fn listxattr(&self, request: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        let _turn = self.begin(request);
        reply_xattr(reply, size, self.fs.attribute_names(node_id(ino), request.uid()));
    }

    fn removexattr(&self, request: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let _turn = self.begin(request);
        let ticket = ticket(request);
        reply_empty(reply, self.fs.remove_attribute(node_id(ino), name, ticket));
        self.fs.dismiss(ticket);
    }

    fn poll(
        &self,
        request: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        notifier: PollNotifier,
        _events: PollEvents,
        flags: PollFlags,
        reply: ReplyPoll,
    ) {
        let _turn = self.begin(request);
        let object = match self.fs.object(node_id(ino)) {
            Ok(object) => object,
            Err(error) => return reply.error(errno(&error)),
        };
        // First be told, then look: what happens in between is seen twice rather than not at all.
        if flags.contains(PollFlags::FUSE_POLL_SCHEDULE_NOTIFY) {
            let key = notifier.handle().0;
            let wake = move || {
                let _ = notifier.notify(); // a handle that the kernel has dropped is nobody's loss
            };
            if let Err(error) = object.wake_on_alarm(key, Box::new(wake)) {
                return reply.error(errno(&error));
            }
        }
        let mut events =
            PollEvents::POLLIN | PollEvents::POLLOUT | PollEvents::POLLRDNORM | PollEvents::POLLWRNORM;
        if object.summary().alarm {
            events |= PollEvents::POLLPRI;
        }
        reply.poll(events);
    }

    fn fallocate(
        &self,
        request: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let allocate = move |fs: &Fs, ticket| {
            allocation(mode).and_then(|what| fs.allocate(node_id(ino), what, (offset, length), ticket))
        };
        self.answer(request, allocate, move |_, result| reply_empty(reply, result));
    }

    fn lseek(
        &self,
        request: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let data = match whence {
            libc::SEEK_DATA => true,
            libc::SEEK_HOLE => false,
            _ => return reply.error(fuser::Errno::EINVAL),
        };
        let Ok(offset) = u64::try_from(offset) else { return reply.error(fuser::Errno::ENXIO) };
        let seek = move |fs: &Fs, ticket| fs.seek(node_id(ino), offset, data, ticket);
        self.answer(request, seek, move |_, found| match found {
            Ok(found) => reply.offset(found as i64),
            Err(error) => reply.error(errno(&error)),
        });
    }

    fn copy_file_range(
        &self,
        request: &Request,
        ino_in: INodeNo,
        _fh_in: FileHandle,
        offset_in: u64,
        ino_out: INodeNo,
        _fh_out: FileHandle,
        offset_out: u64,
        len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        let (from, to) = ((node_id(ino_in), offset_in), (node_id(ino_out), offset_out));
        let copy = move |fs: &Fs, ticket| fs.copy(from, to, len, ticket);
        self.answer(request, copy, move |_, copied| reply_write(reply, copied));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_without_passthrough_is_told_what_it_lacks() {
        let all = REQUIRED.iter().fold(InitFlags::empty(), |flags, (flag, _)| flags | *flag);
        assert_eq!(missing(all), None);
        let what = missing(all - InitFlags::FUSE_PASSTHROUGH).expect("something is missing");
        assert!(what.contains("FUSE passthrough") && what.contains("6.9"), "{what}");
    }

    #[test]
    fn modes_of_fallocate_that_are_not_offered_are_refused() {
        assert!(matches!(allocation(libc::FALLOC_FL_COLLAPSE_RANGE), Err(Error::Unsupported)));
        assert!(matches!(allocation(libc::FALLOC_FL_PUNCH_HOLE), Err(Error::Unsupported)));
        assert!(matches!(
            allocation(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE),
            Ok(Allocation::Punch)
        ));
    }
}
