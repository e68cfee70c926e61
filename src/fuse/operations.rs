//! The requests of the kernel: each is decoded, carried out by [`crate::fs`], and answered.

use super::adapter::{Adapter, Opened, is_delay};
use super::decode::{allocation, caller, context, member, node_id, time};
use super::encode::{errno, file_attr, file_type};
use super::features::agree;
use super::reply::{
    GENERATION, reply_attr, reply_data, reply_empty, reply_entry, reply_write, reply_xattr,
    validity,
};
use crate::error::{Error, Result};
use crate::fs::{Changes, Fs, NewValue, Pace, Position, Reading, RequestContext};
use crate::index::{Name, New};
use crate::units::InodeId;
use fuser::{
    BsdFileFlags, CopyFileRangeFlags, FileHandle, Filesystem, FopenFlags, INodeNo, IoctlFlags,
    KernelConfig, LockOwner, OpenFlags, PollEvents, PollFlags, PollNotifier, ReplyAttr,
    ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek,
    ReplyOpen, ReplyPoll, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use rustix::fs::XattrFlags;
use std::cell::RefCell;
use std::ffi::{CString, OsStr};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::SystemTime;

thread_local! {
    /// The bytes of a read, on their way to the kernel.
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
        let change = move |fs: &Fs, context| fs.change(node_id(ino), &changes, context);
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
        reply_entry(
            reply,
            self.fs.make(node_id(parent), name, new, caller(request, umask), context(request)),
        );
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
        reply_entry(
            reply,
            self.fs.make(node_id(parent), name, new, caller(request, umask), context(request)),
        );
    }

    fn unlink(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let _turn = self.begin(request);
        reply_empty(reply, self.fs.unlink(node_id(parent), name, context(request)));
    }

    fn rmdir(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let _turn = self.begin(request);
        reply_empty(reply, self.fs.remove_directory(node_id(parent), name, context(request)));
    }

    fn symlink(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        let _turn = self.begin(request);
        let target = CString::new(target.as_os_str().as_bytes())
            .map_err(|_| Error::invalid("NUL in a target"));
        let made = target.and_then(|target| {
            self.fs.make(
                node_id(parent),
                name,
                New::Symlink(&target),
                caller(request, 0),
                context(request),
            )
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
        let from = Name { parent: node_id(parent), name };
        let to = Name { parent: node_id(newparent), name: newname };
        let context = context(request);
        reply_empty(reply, self.fs.rename(from, to, flags, context));
        self.fs.dismiss(context);
    }

    fn link(
        &self,
        request: &Request,
        ino: INodeNo,
        newparent: INodeNo,
        newname: &OsStr,
        reply: ReplyEntry,
    ) {
        let _turn = self.begin(request);
        reply_entry(
            reply,
            self.fs.link(node_id(ino), node_id(newparent), newname, context(request)),
        );
    }

    fn open(&self, request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let _turn = self.begin(request);
        let object = self.fs.object(node_id(ino));
        match object.and_then(|object| self.ready(&object, flags.0, context(request), &reply)) {
            Ok((backing, opened)) => {
                reply.opened_passthrough(opened.handle(), opened.flags(), &backing)
            }
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
        let (parent, context) = (node_id(parent), context(request));
        let created = self.create_file(parent, name, mode, caller(request, umask), context);
        let opened = created.and_then(|(attributes, object)| {
            let ready = self.ready(&object, flags, context, &reply);
            let ready =
                ready.inspect_err(|_| self.uncreate(parent, name, attributes.node, context))?;
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
        // A file that cannot be viewed is read instead, and the read reports the reason.
        if let Ok(object) = self.fs.object(node)
            && let Ok(Some(viewed)) = object.view(offset, size.into(), &Pace::of(asked.context))
        {
            return reply.data(viewed.bytes());
        }
        READ_BUFFER.with_borrow_mut(|buffer| {
            if buffer.len() < length {
                buffer.resize(length, 0);
            }
            match self.fs.read(node, &mut buffer[..length], offset, asked.context) {
                Err(Error::TakesLong) => {
                    let read = move |fs: &Fs, context| read_anew(fs, node, offset, length, context);
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
        asked.context.unprivileged = write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID);
        match self.fs.write(node_id(ino), data, offset, asked.context) {
            Err(error) if is_delay(&error) => {
                let bytes = self.holds.hold_prefix(request.uid(), data);
                let write = move |fs: &Fs, context| fs.write(node_id(ino), &bytes, offset, context);
                let finish = move |_: &Fs, written| reply_write(reply, written);
                self.answer_later(asked, write, finish);
            }
            result => reply_write(reply, result),
        }
    }

    // Every write is complete when it is answered. ENOSYS tells the kernel not to ask again.

    fn flush(
        &self,
        _: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        reply.error(fuser::Errno::ENOSYS);
    }

    fn fsync(
        &self,
        _: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        reply.error(fuser::Errno::ENOSYS);
    }

    fn fsyncdir(
        &self,
        _: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        reply.error(fuser::Errno::ENOSYS);
    }

    /// This filesystem has no ioctls. isatty(3) asks for one, and many programs call it for each
    /// file that they open: so the refusal is silent.
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
        let (node, by, asked) = (node_id(ino), member(request), self.asked(request));
        let context = asked.context;
        let flags = XattrFlags::from_bits_retain(flags as u32);
        match self.fs.set_attribute(node, name, NewValue { bytes: value, flags }, by, context) {
            Err(error) if is_delay(&error) => {
                let (Some(value), name) = (self.holds.hold(request.uid(), value), name.to_owned())
                else {
                    return reply.error(fuser::Errno::ENOSPC);
                };
                let set = move |fs: &Fs, context| {
                    let value = NewValue { bytes: &value, flags };
                    fs.set_attribute(node, &name, value, by, context)
                };
                self.answer_later(asked, set, move |fs, result| {
                    reply_empty(reply, result);
                    fs.dismiss(context);
                });
            }
            result => {
                reply_empty(reply, result);
                self.fs.dismiss(context);
            }
        }
    }

    fn getxattr(
        &self,
        request: &Request,
        ino: INodeNo,
        name: &OsStr,
        size: u32,
        reply: ReplyXattr,
    ) {
        let reading =
            if size == 0 { Reading::Length } else { Reading::Value { room: size as usize } };
        let name = name.to_owned();
        let get = move |fs: &Fs, context| fs.attribute(node_id(ino), &name, reading, context);
        self.answer(request, get, move |_, value| reply_xattr(reply, size, value));
    }

    fn listxattr(&self, request: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        let _turn = self.begin(request);
        reply_xattr(reply, size, self.fs.attribute_names(node_id(ino), request.uid()));
    }

    fn removexattr(&self, request: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let _turn = self.begin(request);
        let context = context(request);
        reply_empty(reply, self.fs.remove_attribute(node_id(ino), name, context));
        self.fs.dismiss(context);
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
        // The waker is registered before the state is read: an alarm in between then wakes the
        // program once too often, and is not missed.
        if flags.contains(PollFlags::FUSE_POLL_SCHEDULE_NOTIFY) {
            let key = notifier.handle().0;
            let wake = move || {
                // The kernel may have dropped the handle; then no program waits.
                let _ = notifier.notify();
            };
            if let Err(error) = object.wake_on_alarm(key, Box::new(wake)) {
                return reply.error(errno(&error));
            }
        }
        let mut events = PollEvents::POLLIN
            | PollEvents::POLLOUT
            | PollEvents::POLLRDNORM
            | PollEvents::POLLWRNORM;
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
        let allocate = move |fs: &Fs, context| {
            allocation(mode)
                .and_then(|what| fs.allocate(node_id(ino), what, offset, length, context))
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
        let seek = move |fs: &Fs, context| fs.seek(node_id(ino), offset, data, context);
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
        let from = Position { node: node_id(ino_in), offset: offset_in };
        let to = Position { node: node_id(ino_out), offset: offset_out };
        let copy = move |fs: &Fs, context| fs.copy(from, to, len, context);
        self.answer(request, copy, move |_, copied| reply_write(reply, copied));
    }
}

/// Reads up to `length` bytes at `offset` into a buffer of its own.
fn read_anew(
    fs: &Fs,
    node: InodeId,
    offset: u64,
    length: usize,
    context: RequestContext,
) -> Result<Vec<u8>> {
    let mut bytes = vec![0; length];
    let read = fs.read(node, &mut bytes, offset, context)?;
    bytes.truncate(read);
    Ok(bytes)
}
