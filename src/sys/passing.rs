//! Passes a descriptor to the program that waits for the answer to a request (pidfd_getfd(2),
//! unix(7), SCM_RIGHTS).

use super::thread::descriptor_of;
use crate::error::{Error, Result};
use crate::faults::{Want, attempt};
use rustix::io::{Errno, FdFlags, IoSlice, IoSliceMut, fcntl_setfd};
use rustix::ioctl::{Getter, ioctl};
use rustix::net::sockopt::{socket_domain, socket_peercred};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use rustix::process::Pid;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

/// The socket with this number among the descriptors of a thread.
///
/// # Errors
/// [`Error::Invalid`] if there is none; EPERM if this process may not trace the thread (ptrace(2),
/// PTRACE_MODE_ATTACH_REALCREDS).
pub fn socket_of(thread: u32, number: u32) -> Result<OwnedFd> {
    let seen = i32::try_from(thread).ok().and_then(Pid::from_raw);
    let seen = seen.ok_or_else(|| {
        Error::invalid("the daemon cannot see the caller: it is in another pid namespace")
    })?;
    attempt(Want::Descriptor)?;
    let no_socket = || Error::invalid(format!("descriptor {number} is no Unix socket"));
    let number_here = RawFd::try_from(number).map_err(|_| no_socket())?;
    let socket = descriptor_of(seen, number_here).map_err(|error| match error {
        Error::Os(Errno::BADF) => no_socket(),
        error => error,
    })?;
    match socket_domain(&socket) {
        Ok(AddressFamily::UNIX) if socket_peercred(&socket).is_ok() => Ok(socket),
        _ => Err(no_socket()),
    }
}

/// True if the peer of a Unix socket has not received all that was sent.
///
/// # Errors
/// The errors of ioctl(2).
pub fn has_unreceived(socket: impl AsFd) -> Result<bool> {
    // SAFETY: the opcode is SIOCOUTQ, and its answer an int (unix(7)).
    #[allow(unsafe_code)]
    let unsent = unsafe { ioctl(socket, Getter::<{ libc::TIOCOUTQ as _ }, libc::c_int>::new()) }?;
    Ok(unsent > 0)
}

/// Sends `descriptor`, with one byte, and does not wait for room.
///
/// # Errors
/// The errors of sendmsg(2): EPIPE and ENOTCONN without a peer.
pub fn send(socket: impl AsFd, descriptor: impl AsFd) -> Result<()> {
    attempt(Want::Memory)?;
    let descriptors = [descriptor.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut rights = SendAncillaryBuffer::new(&mut space);
    assert!(rights.push(SendAncillaryMessage::ScmRights(&descriptors)), "there is room for one");
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    sendmsg(socket, &[IoSlice::new(b"m")], &mut rights, flags)?;
    Ok(())
}

/// Receives a descriptor that [`send`] has sent. `None` if the message has none.
///
/// # Errors
/// The errors of recvmsg(2).
pub fn receive(socket: impl AsFd) -> Result<Option<OwnedFd>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut rights = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut rights, RecvFlags::CMSG_CLOEXEC)?;
    let descriptors = rights.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    Ok(descriptors.flatten().last())
}

/// Gives a descriptor the number `number`, under which a program that this process executes has it.
///
/// # Errors
/// EEXIST if the number is in use; EBADF for a number that no descriptor can have.
pub fn bequeath(descriptor: OwnedFd, number: RawFd) -> Result<()> {
    if descriptor.as_raw_fd() != number {
        // SAFETY: the call only asks if the number is in use.
        #[allow(unsafe_code)]
        let is_used = unsafe { libc::fcntl(number, libc::F_GETFD) } != -1;
        if is_used {
            return Err(Error::Os(Errno::EXIST));
        }
        // SAFETY: the number is not in use, so no owner of it finds another file behind it.
        #[allow(unsafe_code)]
        let result = unsafe { libc::dup2(descriptor.as_raw_fd(), number) };
        return if result == -1 { Err(std::io::Error::last_os_error().into()) } else { Ok(()) };
    }
    fcntl_setfd(&descriptor, FdFlags::empty())?;
    std::mem::forget(descriptor); // the program closes it
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Seek};
    use std::os::unix::net::UnixStream;

    #[test]
    fn only_a_unix_socket_of_a_thread_is_taken() {
        let own = rustix::thread::gettid().as_raw_nonzero().get() as u32;
        let number = |fd: &dyn AsRawFd| fd.as_raw_fd() as u32;
        let (one, _other) = UnixStream::pair().unwrap();
        assert!(socket_of(own, number(&one)).is_ok());
        let file = File::open("/proc/self/status").unwrap();
        let network = std::net::TcpListener::bind("localhost:0").unwrap();
        for other in [number(&file), number(&network), u32::MAX, 1 << 20] {
            assert!(matches!(socket_of(own, other), Err(Error::Invalid(_) | Error::Os(_))));
        }
        assert!(matches!(socket_of(0, number(&one)), Err(Error::Invalid(_))));
    }

    #[test]
    fn a_descriptor_is_sent_and_waits_for_its_receiver() {
        let (one, other) = UnixStream::pair().unwrap();
        assert!(!has_unreceived(&one).unwrap());
        send(&one, File::open("/proc/self/status").unwrap()).unwrap();
        assert!(has_unreceived(&one).unwrap());
        let mut received = File::from(receive(&other).unwrap().expect("a descriptor"));
        let mut text = String::new();
        received.rewind().and_then(|()| received.read_to_string(&mut text)).unwrap();
        assert!(text.starts_with("Name:") && !has_unreceived(&one).unwrap());
        drop(other);
        let file = File::open("/proc/self/status").unwrap();
        assert!(matches!(send(&one, file), Err(Error::Os(Errno::PIPE))));
    }
}
