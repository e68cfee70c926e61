//! The filesystem's attributes from a program's side. getfattr(1) and setfattr(1) can do all of
//! this.

use crate::daemons;
use hugetlb2fs::attributes::{Counter, LONGEST_VALUE, OPTIONS, POOL, REFUSAL, SIZE, UNAVAILABLE};
use hugetlb2fs::sys::cgroup;
use hugetlb2fs::units::{NumaNode, PageSize};
use rustix::fs::{XattrFlags, getxattr, setxattr};
use rustix::io::Errno;
use rustix::process::geteuid;
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

pub use hugetlb2fs::attributes::{
    CHECK, COLLAPSE, INJECT, LOSSES, MAP, OPEN, PLACEMENT, POISON, REPAIR, TARGETS,
};

/// Reads an attribute; `None` where it has no value now.
///
/// # Errors
/// The errno.
pub fn read(path: &Path, name: &str) -> Result<Option<String>, Errno> {
    let mut value = vec![0; LONGEST_VALUE];
    match getxattr(path, name, &mut value[..]) {
        Ok(length) => {
            value.truncate(length);
            Ok(Some(harmless(&String::from_utf8_lossy(&value))))
        }
        Err(Errno::NODATA) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// Text that is safe for a terminal. Users choose the names of files, and a filesystem that is no
/// pool answers as it likes.
fn harmless(text: &str) -> String {
    let escaped = |c: char| (c.is_control() && c != '\n').then(|| c.escape_default().to_string());
    text.chars().map(|c| escaped(c).unwrap_or_else(|| c.to_string())).collect()
}

/// Writes an attribute.
///
/// # Errors
/// The errno.
pub fn write(path: &Path, name: &str, value: &str) -> Result<(), Errno> {
    setxattr(path, name, value.as_bytes(), XattrFlags::empty())
}

/// The daemon's own reason for the last [`write()`] of this thread to a file that failed. `None` if
/// the daemon has none, or is of a version that tells none.
pub fn refusal(file: &Path) -> Option<String> {
    read(file, REFUSAL).ok().flatten()
}

/// The sentence for a request to `file` that failed with `errno`.
pub fn describe(file: &Path, errno: Errno) -> String {
    let why = match errno {
        Errno::NODATA => "there is nothing of that kind in this range".to_owned(),
        Errno::BUSY | Errno::INVAL | Errno::NOSPC => {
            refusal(file).unwrap_or_else(|| errno.to_string())
        }
        Errno::OPNOTSUPP => "not a regular file of a hugetlb2 pool".to_owned(),
        Errno::AGAIN => "the kernel could not do it for all of the range now; try again".to_owned(),
        Errno::TOOBIG => "the list is longer than an extended attribute can be (64 KiB)".to_owned(),
        other => other.to_string(),
    };
    format!("{}: {why}", file.display())
}

/// The counters of a pool.
pub struct Counters(Vec<(String, u64)>);

impl Counters {
    /// The value of a counter; none if the daemon does not have it.
    pub fn get(&self, counter: Counter) -> Option<u64> {
        let name = counter.name();
        self.0.iter().find(|row| row.0 == name).map(|row| row.1)
    }

    /// All, in the filesystem's order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, u64)> {
        self.0.iter().map(|(name, value)| (name.as_str(), *value))
    }

    /// The NUMA nodes that the pool has memory of, ascending.
    pub fn nodes(&self) -> Vec<NumaNode> {
        let of_one = Counter::PagesTotalOn { node: NumaNode(0) }.name();
        let prefix = of_one.trim_end_matches('0');
        self.0.iter().filter_map(|(name, _)| NumaNode::parse(name.strip_prefix(prefix)?)).collect()
    }

    /// Replaces the process ids that the daemon's processes have in their namespace by those that
    /// they have here. A process that is not seen here loses its number, because here the number
    /// could be a stranger's.
    pub fn translate_processes(&mut self, directory: &Path) {
        let found = daemons::connection_of(directory).map(daemons::of).unwrap_or_default();
        let mut found = found.into_iter().map(|process| u64::from(process.pid));
        let numbers = [(Counter::DaemonPid, found.next()), (Counter::WorkerPid, found.next())];
        for (counter, seen) in numbers {
            let number = seen.or_else(|| {
                let told = self.get(counter).filter(|_| !geteuid().is_root());
                told.filter(|pid| daemons::is_called_daemon(*pid))
            });
            match (self.0.iter().position(|row| row.0 == counter.name()), number) {
                (Some(at), Some(number)) => self.0[at].1 = number,
                (Some(at), None) => drop(self.0.remove(at)),
                (None, _) => {}
            }
        }
    }

    /// The pool's page size.
    ///
    /// # Errors
    /// A sentence, where it is none that this version knows.
    pub fn page_size(&self) -> Result<PageSize, String> {
        let known = [PageSize::Huge, PageSize::Gigantic];
        let found =
            known.into_iter().find(|size| Some(size.bytes()) == self.get(Counter::PageSize));
        found.ok_or_else(|| "the pool has a page size that this version does not know".to_owned())
    }
}

/// Reads the options in force of the pool that is mounted on `directory`, names and values, without
/// the size.
///
/// # Errors
/// A sentence.
pub fn options(directory: &Path) -> Result<Vec<(String, String)>, String> {
    let text = read(directory, OPTIONS).map_err(|errno| errno.to_string())?.unwrap_or_default();
    let pair =
        |line: &str| line.split_once(' ').map(|(name, value)| (name.to_owned(), value.to_owned()));
    Ok(text.lines().filter_map(pair).collect())
}

/// Reads the counters of the pool that is mounted on `directory`.
///
/// # Errors
/// A sentence, where none is.
pub fn pool(directory: &Path) -> Result<Counters, String> {
    let text = match read(directory, POOL) {
        Ok(Some(text)) => text,
        Ok(None) | Err(Errno::OPNOTSUPP) => {
            return Err("no hugetlb2 pool is mounted there".to_owned());
        }
        // The second: it has died while we asked.
        Err(Errno::NOTCONN | Errno::CONNABORTED) => {
            return Err("gone: Transport endpoint is not connected; unmount it".to_owned());
        }
        Err(errno) => return Err(errno.to_string()),
    };
    let row = |line: &str| {
        let (name, value) = line.split_once(' ')?;
        Some((name.to_owned(), value.parse().ok()?))
    };
    Ok(Counters(text.lines().filter_map(row).collect()))
}

/// The same within `patience`. `None` if no answer comes; then the thread that asks is left behind,
/// and ends with this program.
pub fn pool_within(directory: &Path, patience: Duration) -> Option<Result<Counters, String>> {
    let (sender, answer) = mpsc::channel();
    let asked = directory.to_owned();
    let asking = std::thread::Builder::new().spawn(move || sender.send(pool(&asked)));
    match asking {
        Ok(_) => answer.recv_timeout(patience).ok(),
        Err(error) => Some(Err(format!("no thread to ask with: {error}"))),
    }
}

/// The files of a pool that cannot be opened, `<path> <pages> <why>` each. Empty for a caller that
/// may not see their names.
pub fn unavailable(directory: &Path) -> Vec<String> {
    let text = read(directory, UNAVAILABLE).ok().flatten().unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

/// Resizes the pool that is mounted on `directory` to a size, or to a size for each NUMA node, as
/// the attribute takes it.
///
/// # Errors
/// A sentence.
pub fn resize(directory: &Path, size: &str) -> Result<(), String> {
    let by_node = size.contains(':');
    let said = |otherwise: &str| refusal(directory).unwrap_or_else(|| otherwise.to_owned());
    write(directory, SIZE, size).map_err(|errno| match errno {
        Errno::NOSPC | Errno::INVAL | Errno::BUSY if by_node => said("resizing the pool failed"),
        Errno::BUSY => "more of the pool is in use than the new size has".to_owned(),
        Errno::NOSPC => refusal(directory)
            .filter(|why| why.contains("NUMA node"))
            .unwrap_or_else(|| no_memory(directory)),
        Errno::ROFS => {
            "a pool that is mounted read-only cannot be resized (remount it with rw)".to_owned()
        }
        other => format!("resizing the pool: {other}"),
    })
}

/// The message for a larger pool that does not fit. It names the limit of the daemon's cgroup if
/// there is one; the daemon's log says which of the two was too small.
fn no_memory(directory: &Path) -> String {
    let daemon = daemons::supervisor_of(directory).ok();
    match daemon.and_then(|daemon| cgroup::tightest_limit(&daemon.pid.to_string())) {
        Some(limit) => {
            format!("the machine has not that much memory, or the daemon's cgroup has not: {limit}")
        }
        None => "the machine has not that much memory".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_filesystem_answers_has_no_effect_on_a_terminal() {
        assert_eq!(harmless("a\u{1b}[2Jb\tc\n"), "a\\u{1b}[2Jb\\tc\n");
    }
}
