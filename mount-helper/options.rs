//! The string behind `-o`: the pool's options, mount(8)'s generic ones, and those that only
//! mount(8) itself looks at.

use hugetlb2fs::options::Options;
use rustix::mount::MountFlags;

/// A generic option, and what it does to the flags of mount(2).
type Generic = (&'static str, Change, MountFlags);

#[derive(Clone, Copy)]
enum Change {
    Set,
    Clear,
}

use Change::{Clear, Set};

const GENERIC: &[Generic] = &[
    ("ro", Set, MountFlags::RDONLY),
    ("rw", Clear, MountFlags::RDONLY),
    ("nosuid", Set, MountFlags::NOSUID),
    ("suid", Clear, MountFlags::NOSUID),
    ("nodev", Set, MountFlags::NODEV),
    ("dev", Clear, MountFlags::NODEV),
    ("noexec", Set, MountFlags::NOEXEC),
    ("exec", Clear, MountFlags::NOEXEC),
    ("sync", Set, MountFlags::SYNCHRONOUS),
    ("async", Clear, MountFlags::SYNCHRONOUS),
    ("dirsync", Set, MountFlags::DIRSYNC),
    ("noatime", Set, MountFlags::NOATIME),
    ("atime", Clear, MountFlags::NOATIME),
    ("nodiratime", Set, MountFlags::NODIRATIME),
    ("diratime", Clear, MountFlags::NODIRATIME),
    ("relatime", Set, MountFlags::RELATIME),
    ("norelatime", Clear, MountFlags::RELATIME),
    ("strictatime", Set, MountFlags::STRICTATIME),
    ("nostrictatime", Clear, MountFlags::STRICTATIME),
    ("lazytime", Set, MountFlags::LAZYTIME),
    ("nolazytime", Clear, MountFlags::LAZYTIME),
    ("silent", Set, MountFlags::SILENT),
    ("loud", Clear, MountFlags::SILENT),
];

/// Options that mount(8) has dealt with, or that fstab(5) says to others.
const FOR_OTHERS: &[&str] = &[
    "defaults", "auto", "noauto", "user", "nouser", "users", "owner", "group", "nofail", "_netdev",
];

/// Options that the kernel shows of a mounted pool. mount(8) passes them on at a remount. They stay
/// as they are.
const OF_THE_KERNEL: &[&str] =
    &["user_id", "group_id", "default_permissions", "allow_other", "max_read", "seclabel"];

/// The parsed options.
#[derive(Debug)]
pub struct Requested {
    /// Ours.
    pub pool: Options,
    /// Names of ours that were given.
    pub given: Vec<String>,
    /// For mount(2).
    pub flags: MountFlags,
    /// Flags that were asked for not to be there.
    cleared: MountFlags,
    /// Change a pool that is mounted.
    pub remount: bool,
    /// Mount over a directory with entries, which cannot be reached then.
    pub nonempty: bool,
}

impl Requested {
    /// Parses the strings of all `-o`; with `sloppy`, unknown options are ignored (mount(8), `-s`).
    ///
    /// # Errors
    /// A sentence that names the option.
    pub fn parse<'a>(strings: impl Iterator<Item = &'a str>, sloppy: bool) -> Result<Self, String> {
        let mut requested = Self {
            pool: Options::default(),
            given: Vec::new(),
            flags: MountFlags::empty(),
            cleared: MountFlags::empty(),
            remount: false,
            nonempty: false,
        };
        let items: Vec<&str> = strings.flat_map(items).filter(|item| !item.is_empty()).collect();
        requested.remount = items.contains(&"remount");
        for item in items {
            requested.take(item, sloppy)?;
        }
        Ok(requested)
    }

    /// The flags of a mount that has `now`: what was not asked for stays.
    pub fn applied_to(&self, now: MountFlags) -> MountFlags {
        // The kernel takes one of these, and relatime without any.
        let updates = MountFlags::NOATIME | MountFlags::RELATIME | MountFlags::STRICTATIME;
        let replaced = if self.flags.intersects(updates) { updates } else { MountFlags::empty() };
        (now - replaced - self.cleared) | self.flags
    }

    fn take(&mut self, item: &str, sloppy: bool) -> Result<(), String> {
        let (name, value) = match item.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (item, None),
        };
        if let Some((_, change, flag)) = GENERIC.iter().find(|row| row.0 == item) {
            match change {
                Set => (self.flags |= *flag, self.cleared -= *flag),
                Clear => (self.flags -= *flag, self.cleared |= *flag),
            };
            return Ok(());
        }
        let for_others = FOR_OTHERS.contains(&item)
            || name.starts_with("x-")
            || name.starts_with("X-")
            || name == "comment";
        match item {
            "remount" => {}
            "nonempty" => self.nonempty = true,
            _ if for_others => {}
            _ if self.remount && OF_THE_KERNEL.contains(&name) => {}
            _ if sloppy && !Options::knows(name) => {}
            _ => {
                self.pool.set(name, value)?;
                self.given.push(name.to_owned());
            }
        }
        Ok(())
    }
}

/// The options of a string. No option begins with a digit: a comma before a digit is part of a list
/// in a value, as in `nodes=0,2`. tmpfs(5) reads `mpol=bind:0,2` in the same way.
fn items(string: &str) -> impl Iterator<Item = &str> {
    let mut rest = Some(string);
    std::iter::from_fn(move || {
        let string = rest?;
        let is_end = |at: &usize| !string[at + 1..].starts_with(|next: char| next.is_ascii_digit());
        let end = string.match_indices(',').map(|(at, _)| at).find(is_end);
        rest = end.map(|end| &string[end + 1..]);
        Some(&string[..end.unwrap_or(string.len())])
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Requested, String> {
        Requested::parse(std::iter::once(text), false)
    }

    #[test]
    fn a_list_of_nodes_is_one_value() {
        let split = |string| items(string).collect::<Vec<_>>();
        assert_eq!(split("ro,nodes=0,2-3,size=2M"), ["ro", "nodes=0,2-3", "size=2M"]);
        assert_eq!(split("nodes=0:2M,1:4M"), ["nodes=0:2M,1:4M"]);
        assert_eq!(split("ro,,rw,"), ["ro", "", "rw", ""]);
        let requested = parse("size=4M,nodes=0,1,nosuid").unwrap();
        assert_eq!(requested.pool.nodes.unwrap().to_string(), "0,1");
        assert_eq!(requested.given, ["size", "nodes"]);
    }

    #[test]
    fn generic_options_become_flags_and_the_last_one_holds() {
        let requested = parse("ro,nosuid,rw,size=2M,noexec,x-systemd.automount,nofail").unwrap();
        assert_eq!(requested.flags, MountFlags::NOSUID | MountFlags::NOEXEC);
        assert_eq!(requested.given, ["size"]);
    }

    #[test]
    fn a_remount_keeps_the_flags_that_it_does_not_name() {
        let now = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::RELATIME;
        let applied = |text: &str| parse(text).unwrap().applied_to(now);
        assert_eq!(applied("remount,size=2M"), now);
        assert_eq!(applied("remount,noexec,suid"), (now - MountFlags::NOSUID) | MountFlags::NOEXEC);
        assert_eq!(applied("remount,noatime"), (now - MountFlags::RELATIME) | MountFlags::NOATIME);
        assert_eq!(
            applied("remount,nosuid,suid,ro"),
            (now - MountFlags::NOSUID) | MountFlags::RDONLY
        );
    }

    #[test]
    fn what_the_kernel_shows_is_accepted_at_a_remount_only() {
        assert!(
            parse("rw,user_id=0,allow_other,max_read=1048576,remount,size=2M").unwrap().remount
        );
        assert!(parse("user_id=0,size=2M").unwrap_err().contains("user_id"));
    }

    #[test]
    fn unknown_options_are_refused_unless_sloppy() {
        assert!(parse("size=2M,frobnicate").unwrap_err().contains("frobnicate"));
        assert!(Requested::parse(std::iter::once("size=2M,frobnicate"), true).is_ok());
        assert!(Requested::parse(std::iter::once("size=2Q"), true).is_err(), "ours stay checked");
    }
}
