//! The mount namespace that `-N` names (mount(8), umount(8)).

use crate::protocol::Failure;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::fs::File;
use std::os::fd::AsFd;

/// Our own mount namespace, and the one to mount in where that is another.
pub struct Namespaces {
    own: File,
    target: Option<File>,
}

impl Namespaces {
    /// `target` is a process id, or the path of a namespace; a path is looked up where we are now.
    ///
    /// # Errors
    /// [`Failure::Usage`] where it names none.
    pub fn open(target: Option<&String>) -> Result<Self, Failure> {
        let open = |path: &str| {
            File::open(path).map_err(|error| Failure::Usage(format!("namespace {path}: {error}")))
        };
        let path = target.map(|target| match target.parse::<u32>() {
            Ok(pid) => format!("/proc/{pid}/ns/mnt"),
            Err(_) => target.clone(),
        });
        Ok(Self {
            own: open("/proc/self/ns/mnt")?,
            target: path.map(|path| open(&path)).transpose()?,
        })
    }

    /// Goes to where the mount is to be; stays where no target was given.
    ///
    /// # Errors
    /// [`Failure::System`].
    pub fn enter_target(&self) -> Result<(), Failure> {
        self.target.as_ref().map_or(Ok(()), enter)
    }

    /// Comes back.
    ///
    /// # Errors
    /// [`Failure::System`].
    pub fn leave_target(&self) -> Result<(), Failure> {
        self.target.as_ref().map_or(Ok(()), |_| enter(&self.own))
    }
}

fn enter(namespace: &File) -> Result<(), Failure> {
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Mount))
        .map_err(|errno| Failure::System(format!("setns: {errno}")))
}
