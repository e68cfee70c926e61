//! Messages to the kernel: notifications (linux/fuse.h, `enum fuse_notify_code`), and EIO replies
//! for requests that no worker can serve. fuser can send notifications, but hides the one answer
//! that matters, ENOENT. fuser cannot send such replies.

use crate::error::Result;
use crate::units::InodeId;
use rustix::io::Errno;
use std::os::fd::AsFd;

const NOTIFY_POLL: i32 = 1;
const NOTIFY_INVAL_INODE: i32 = 2;
const NOTIFY_RESEND: i32 = 7;

/// Bytes of `struct fuse_in_header` and `struct fuse_out_header`.
const IN_HEADER: usize = 40;
const OUT_HEADER: usize = 16;

const FORGET: u32 = 2;
const BATCH_FORGET: u32 = 42;
const INTERRUPT: u32 = 36;
const RELEASE: u32 = 18;

/// A message: `struct fuse_out_header` and its body.
fn message<const N: usize>(error: i32, unique: u64, body: [u64; N]) -> Vec<u8> {
    let length = (OUT_HEADER + 8 * N) as u32;
    let mut out = Vec::with_capacity(length as usize);
    out.extend(length.to_ne_bytes());
    out.extend(error.to_ne_bytes());
    out.extend(unique.to_ne_bytes());
    body.iter().for_each(|word| out.extend(word.to_ne_bytes()));
    out
}

fn notify<const N: usize>(device: impl AsFd, code: i32, body: [u64; N]) -> Result<(), Errno> {
    rustix::io::write(device, &message(code, 0, body)).map(drop)
}

/// True if the kernel has an inode for `node`. If the kernel is just now removing the inode, the
/// call waits until it is gone. The kernel also drops its cached attributes of the node. That
/// costs one getattr later, and nothing else (fs/fuse/inode.c, fuse_reverse_inval_inode).
///
/// If the kernel gives no clear answer, the result is true: a node without users may stay, but a
/// node with users must not go.
pub fn knows(device: impl AsFd, node: InodeId) -> bool {
    const NOT_ITS_PAGES: u64 = -1i64 as u64;
    notify(device, NOTIFY_INVAL_INODE, [node.0, NOT_ITS_PAGES, 0]) != Err(Errno::NOENT)
}

/// Tells the kernel to wake the pollers of the open file with this handle (the kernel's number), so
/// that they look again. If the file is closed already, nothing is lost.
pub fn wake_poller(device: impl AsFd, handle: u64) {
    let _ = notify(device, NOTIFY_POLL, [handle]);
}

/// Asks the kernel to send again all requests that a former worker has read and not answered (Linux
/// 6.9). Their numbers have the bit [`AGAIN`].
///
/// # Errors
/// EINVAL if the kernel is older.
pub fn resend(device: impl AsFd) -> Result<()> {
    Ok(notify(device, NOTIFY_RESEND, [])?)
}

/// `FUSE_UNIQUE_RESEND` in the number of a request.
pub const AGAIN: u64 = 1 << 63;

/// Reads one request and answers it with EIO. Returns false after the filesystem was unmounted.
///
/// A RELEASE gets no answer, because no program waits for one. So the kernel sends it again to the
/// next worker, which learns that the descriptor is closed.
///
/// # Errors
/// The errors of read(2) on the device.
pub fn refuse_one(device: impl AsFd, buffer: &mut [u8]) -> Result<bool> {
    let device = device.as_fd();
    let length = match rustix::io::read(device, &mut *buffer) {
        Ok(length) => length,
        Err(Errno::INTR | Errno::AGAIN | Errno::NOENT) => return Ok(true),
        Err(Errno::NODEV) => return Ok(false),
        Err(errno) => return Err(errno.into()),
    };
    let Some((opcode, unique)) = head(&buffer[..length]) else { return Ok(true) };
    if !matches!(opcode, FORGET | BATCH_FORGET | INTERRUPT | RELEASE) {
        refuse(device, unique);
    }
    Ok(true)
}

/// Answers a request with EIO. Returns false if the kernel does not wait for this answer (any
/// more).
pub fn refuse(device: impl AsFd, unique: u64) -> bool {
    rustix::io::write(device, &message(-Errno::IO.raw_os_error(), unique, [])).is_ok()
}

/// The operation and the number of a request (`struct fuse_in_header`).
fn head(request: &[u8]) -> Option<(u32, u64)> {
    let opcode = request.get(4..8)?.try_into().ok()?;
    let unique = request.get(8..16)?.try_into().ok()?;
    (request.len() >= IN_HEADER).then(|| (u32::from_ne_bytes(opcode), u64::from_ne_bytes(unique)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_have_the_kernels_layout() {
        let bytes = message(NOTIFY_INVAL_INODE, 0, [7, u64::MAX, 0]);
        assert_eq!(bytes.len(), 40);
        assert_eq!(bytes[..8], [40, 0, 0, 0, 2, 0, 0, 0]);
        assert_eq!(bytes[16..24], 7u64.to_ne_bytes());
    }

    #[test]
    fn a_request_shorter_than_its_header_is_none() {
        assert_eq!(head(&[0; 39]), None);
        assert_eq!(head(&[0; 40]), Some((0, 0)));
    }
}
