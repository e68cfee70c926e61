//! What is said to the kernel without having been asked (linux/fuse.h, `enum fuse_notify_code`), and what is said in place of a
//! filesystem that cannot answer. fuser has the first but swallows the one answer that matters, ENOENT, and not the second.

use crate::error::Result;
use crate::units::NodeId;
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

/// `struct fuse_out_header`, and what belongs to it.
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

/// Whether the kernel has an inode for `node`; one that is going away just now is waited for. It drops the attributes that it
/// keeps for it, which costs a getattr later, and nothing else (fs/fuse/inode.c, fuse_reverse_inval_inode).
///
/// Where the kernel does not say, the answer is yes: a node that nobody needs may stay, one that somebody needs may not go.
pub fn knows(device: impl AsFd, node: NodeId) -> bool {
    const NOT_ITS_PAGES: u64 = -1i64 as u64;
    notify(device, NOTIFY_INVAL_INODE, [node.0, NOT_ITS_PAGES, 0]) != Err(Errno::NOENT)
}

/// Tells whoever polls the open file with this handle of the kernel's to look again; one that is closed is nobody's loss.
pub fn wake_poller(device: impl AsFd, handle: u64) {
    let _ = notify(device, NOTIFY_POLL, [handle]);
}

/// Has the kernel send again what a former reader of the device has read and not answered (Linux 6.9). Those requests come with
/// `AGAIN` in their number.
///
/// # Errors
/// EINVAL on an older kernel.
pub fn resend(device: impl AsFd) -> Result<()> {
    Ok(notify(device, NOTIFY_RESEND, [])?)
}

/// `FUSE_UNIQUE_RESEND` in the number of a request.
pub const AGAIN: u64 = 1 << 63;

/// Reads one request and answers it with EIO. Returns false when the filesystem has been unmounted.
///
/// That a descriptor is closed is left to the next worker to be told of again: nobody waits for an answer.
///
/// # Errors
/// What reading the device answers.
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

/// Answers a request that was read with EIO. Returns false where the kernel waits for no such answer (any more).
pub fn refuse(device: impl AsFd, unique: u64) -> bool {
    rustix::io::write(device, &message(-Errno::IO.raw_os_error(), unique, [])).is_ok()
}

/// Operation and number of a request (`struct fuse_in_header`).
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
