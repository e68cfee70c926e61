//! Records for the next worker: numbers, and what a request found.

use super::Index;
use crate::error::Result;
use crate::sys::calls;
use rustix::fs::{AtFlags, XattrFlags};
use rustix::io::Errno;

impl Index {
    /// Stores a number for the next worker, or that there is none.
    ///
    /// # Errors
    /// The errors of setxattr(2).
    pub fn keep(&self, name: &str, number: Option<u64>) -> Result<()> {
        let text = number.map(|number| number.to_string()).unwrap_or_default();
        Ok(calls::fsetxattr(&self.orphans, kept(name), text.as_bytes(), XattrFlags::empty())?)
    }

    /// The number that was stored.
    ///
    /// # Errors
    /// The errors of getxattr(2).
    pub fn kept(&self, name: &str) -> Result<Option<u64>> {
        let mut text = [0; 20]; // digits of 2^64
        let length = calls::fgetxattr(&self.orphans, kept(name), &mut text[..])?;
        Ok(std::str::from_utf8(&text[..length]).ok().and_then(|text| text.parse().ok()))
    }

    /// Notes what `request` found before the request changes it. A worker may carry a request out
    /// and die before it answers; the kernel then sends the request to the next worker. Some
    /// requests leave no trace that tells that they are done, such as an exchange of two names: the
    /// note tells. The kernel never gives a number to two requests.
    ///
    /// Returns the earlier note, if the request had come this far before.
    ///
    /// # Errors
    /// The errors of symlinkat(2).
    pub fn witness(&self, request: u64, found: &str) -> Result<Option<String>> {
        let name = request.to_string();
        match calls::symlinkat(found, &self.witnesses, &name) {
            Ok(()) => Ok(None),
            Err(Errno::EXIST) => {
                let noted = calls::readlinkat(&self.witnesses, &name, Vec::new())?;
                Ok(Some(noted.to_string_lossy().into_owned()))
            }
            Err(errno) => Err(errno.into()),
        }
    }

    /// Removes the note when the request has been answered.
    pub fn dismiss(&self, request: u64) {
        // A note that stays costs a few bytes, and no request reads it again. The kernel has its
        // answer already, so a failure here cannot be reported and is not counted.
        let _ = rustix::fs::unlinkat(&self.witnesses, request.to_string(), AtFlags::empty());
    }
}

fn kept(name: &str) -> String {
    format!("trusted.kept.{name}")
}
