//! The one table of options: mount option = daemon flag = default = check = help text.

use crate::units::{NumaNode, PageSize};
use std::collections::BTreeMap;
use std::fmt::{self, Write as _};

/// The options that a pool is mounted with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Grain of reservation.
    pub page_size: PageSize,
    /// Size of the pool; required, unless `nodes` has the size of each node's part.
    pub size: Option<Size>,
    /// The NUMA nodes that the pool has memory of. Without it, all nodes with processors.
    pub nodes: Option<Nodes>,
    /// Permission bits of the root directory.
    pub mode: u32,
    /// Owner of the root directory.
    pub uid: u32,
    /// Group of the root directory.
    pub gid: u32,
    /// Most nodes; as many as tmpfs allows by itself where none is given.
    pub inodes: Option<u64>,
    /// Put huge mappings back after a repair without being asked.
    pub collapse: bool,
    /// A write that covers a quarantined subpage repairs it.
    pub recovery_write: bool,
    /// The reader for descriptors that are open for reading only.
    pub io: Io,
    /// A punched page stays the file's, and the next touch fills it. Otherwise the page goes back
    /// to the pool.
    pub keep_punched: bool,
    /// The time at which memory is cleared.
    pub clear: Clear,
    /// With [`Clear::Ahead`], the part of a processor of each NUMA node that clears memory, in
    /// percent: 1 to 100.
    pub cpu: u32,
    /// The file that the daemon logs to; without one, the system log.
    pub log: Option<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            page_size: PageSize::Gigantic,
            size: None,
            nodes: None,
            mode: 0o755,
            uid: 0,
            gid: 0,
            inodes: None,
            collapse: true,
            recovery_write: true,
            io: Io::Auto,
            keep_punched: false,
            clear: Clear::Demand,
            cpu: DEFAULT_CPU,
            log: None,
        }
    }
}

/// The reader for descriptors that are open for reading only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Io {
    /// The kernel if it handles memory errors (CONFIG_MEMORY_FAILURE), otherwise the daemon.
    Auto,
    /// The kernel, from the memory of the file. While such a descriptor is open, only a real memory
    /// error quarantines a subpage.
    Native,
    /// The daemon.
    Mediated,
}

/// The part of a processor that clears memory ahead, in percent.
const DEFAULT_CPU: u32 = 50;

/// The time at which the pool clears free memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clear {
    /// When a file takes it.
    Demand,
    /// Before, in the background.
    Ahead,
}

impl Clear {
    fn parse(text: &str) -> Result<Self, String> {
        match text {
            "demand" => Ok(Self::Demand),
            "ahead" => Ok(Self::Ahead),
            _ => Err(format!("{text:?} is neither demand nor ahead")),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Demand => "demand",
            Self::Ahead => "ahead",
        }
    }
}

impl Io {
    const ALL: [(Self, &str); 3] =
        [(Self::Auto, "auto"), (Self::Native, "native"), (Self::Mediated, "mediated")];

    fn parse(text: &str) -> Result<Self, String> {
        let named = Self::ALL.iter().find(|(_, name)| *name == text).map(|(io, _)| *io);
        named.ok_or_else(|| format!("{text:?} is none of auto, native and mediated"))
    }

    fn name(self) -> String {
        Self::ALL.iter().find(|(io, _)| *io == self).map_or("auto", |(_, name)| name).to_owned()
    }
}

/// The pages of each part of a pool.
pub type Parts = BTreeMap<NumaNode, u64>;

/// The NUMA nodes of a pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Nodes {
    /// Each of these nodes, ascending, has an equal part of the pool.
    Even(Vec<NumaNode>),
    /// Each of these nodes, ascending, has a part of so many bytes.
    Sized(Vec<(NumaNode, u64)>),
}

impl Nodes {
    /// Parses a list of nodes (`0,2-3`), or of nodes with sizes (`0:32G,2:64G`). Either can be in
    /// quotes, as mount(8) passes a value on that has a comma.
    ///
    /// # Errors
    /// A sentence that says what is wrong and what would be right.
    pub fn parse(quoted: &str) -> Result<Self, String> {
        let unquoted = quoted.strip_prefix('"').and_then(|text| text.strip_suffix('"'));
        let text = unquoted.unwrap_or(quoted);
        let nodes = if text.contains(':') {
            Self::parse_sized(text).map(Self::Sized)
        } else {
            NumaNode::parse_list(text).map(Self::Even)
        };
        nodes.ok_or_else(|| {
            format!(
                "{text:?} names no nodes: a list that ascends, as in 0,2-3, or each node with the size of its part, as in \
                 0:32G,2:64G"
            )
        })
    }

    fn parse_sized(text: &str) -> Option<Vec<(NumaNode, u64)>> {
        let part = |part: &str| {
            let (node, size) = part.split_once(':')?;
            let node = NumaNode::parse(node).filter(|node| *node <= NumaNode::LAST)?;
            match Size::parse(size) {
                Ok(Size::Bytes(bytes)) => Some((node, bytes)),
                _ => None,
            }
        };
        let parts: Vec<_> = text.split(',').map(part).collect::<Option<_>>()?;
        parts.is_sorted_by(|one, next| one.0 < next.0).then_some(parts)
    }

    /// The nodes, ascending.
    pub fn names(&self) -> Vec<NumaNode> {
        match self {
            Self::Even(nodes) => nodes.clone(),
            Self::Sized(parts) => parts.iter().map(|(node, _)| *node).collect(),
        }
    }

    /// The whole pages of each part. `None` where no sizes are given.
    ///
    /// # Errors
    /// A sentence, where a part is less than a page.
    pub fn parts(&self, page_size: PageSize) -> Result<Option<Parts>, String> {
        let parts = self.parts_or_none(page_size)?;
        let none = |parts: &Parts| parts.iter().find(|(_, pages)| **pages == 0).map(|part| *part.0);
        match parts.as_ref().and_then(none) {
            Some(node) => Err(format!("node {node} has size 0; leave it out")),
            None => Ok(parts),
        }
    }

    /// The same, but a part may have the size 0: a mounted pool is to have it no more.
    ///
    /// # Errors
    /// A sentence, where another part is less than a page.
    pub fn parts_or_none(&self, page_size: PageSize) -> Result<Option<Parts>, String> {
        let Self::Sized(parts) = self else { return Ok(None) };
        let part = |(node, bytes): &(NumaNode, u64)| match bytes {
            0 => Ok((*node, 0)),
            // The memory of the machine has a part in percentages only, which these are not.
            bytes => match Size::Bytes(*bytes).pages(page_size, 0) {
                Ok(pages) => Ok((*node, pages)),
                Err(why) => Err(format!("node {node}: {why}")),
            },
        };
        parts.iter().map(part).collect::<Result<_, _>>().map(Some)
    }
}

impl fmt::Display for Nodes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Even(nodes) => f.write_str(&NumaNode::list(nodes)),
            Self::Sized(parts) => {
                let part = |(node, bytes): &(NumaNode, u64)| format!("{node}:{bytes}");
                f.write_str(&parts.iter().map(part).collect::<Vec<_>>().join(","))
            }
        }
    }
}

/// A size as it was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// So many bytes.
    Bytes(u64),
    /// So many hundredths of the machine's memory.
    Percent(u64),
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bytes(bytes) => write!(f, "{bytes}"),
            Self::Percent(percent) => write!(f, "{percent}%"),
        }
    }
}

impl Size {
    /// Parses a number of bytes with an optional suffix K, M, G or T (powers of 1024), or a
    /// percentage.
    ///
    /// # Errors
    /// A sentence that says what is wrong and what would be right.
    pub fn parse(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "{text:?} is not a size: a number with an optional suffix K, M, G or T, or a percentage of RAM as in 25%"
            )
        };
        if let Some(percent) = text.strip_suffix('%') {
            let percent: u64 = percent.parse().map_err(|_| wrong())?;
            return if (1..=100).contains(&percent) {
                Ok(Self::Percent(percent))
            } else {
                Err(wrong())
            };
        }
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let shift = match &text[digits.len()..] {
            "" => 0,
            "k" | "K" => 10,
            "m" | "M" => 20,
            "g" | "G" => 30,
            "t" | "T" => 40,
            _ => return Err(wrong()),
        };
        let number = parse_number(digits).ok_or_else(wrong)?;
        let bytes = number.checked_mul(1 << shift).filter(|bytes| *bytes <= i64::MAX as u64);
        Ok(Self::Bytes(bytes.ok_or_else(|| format!("{text} is more than any machine has"))?))
    }

    /// Whole pages of it, on a machine with `memory` bytes.
    ///
    /// # Errors
    /// A sentence, where that is none.
    pub fn pages(self, page_size: PageSize, memory: u64) -> Result<u64, String> {
        let bytes = match self {
            Self::Bytes(bytes) => bytes,
            Self::Percent(percent) => (u128::from(memory) * u128::from(percent) / 100) as u64,
        };
        match page_size.pages_down(bytes) {
            0 => Err(format!(
                "a size of {bytes} bytes is less than one page of {} (see pagesize=)",
                describe(page_size)
            )),
            pages => Ok(pages),
        }
    }
}

/// The pages of a pool for which both a size and the sizes of parts are given.
///
/// # Errors
/// A sentence, where they differ.
pub fn agreed(size: u64, parts: u64) -> Result<u64, String> {
    if size == parts {
        return Ok(size);
    }
    Err(format!(
        "option size: {size} pages, and the parts of nodes= have {parts}; leave size= out, or make them agree (a remount \
         has the options of fstab, too)"
    ))
}

/// Parses a decimal number, or a hexadecimal one that starts with `0x`.
pub fn parse_number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) if !hex.starts_with('+') => u64::from_str_radix(hex, 16).ok(),
        Some(_) => None,
        None if text.starts_with('+') => None,
        None => text.parse().ok(),
    }
}

fn describe(page_size: PageSize) -> &'static str {
    match page_size {
        PageSize::Huge => "2M",
        PageSize::Gigantic => "1G",
    }
}

/// One row of the table.
pub struct Row {
    /// As in `-o name=value` and `--name=value`.
    pub name: &'static str,
    /// The placeholder for the value in a help text.
    pub value: &'static str,
    /// The value that holds where none is given; `None` for an option that must be given.
    pub default: Option<&'static str>,
    /// One line for people.
    pub help: &'static str,
    /// Checks a value and puts it in.
    set: fn(&mut Options, &str) -> Result<(), String>,
    /// The value that is in, as it would be given.
    get: fn(&Options) -> Option<String>,
}

/// All options that are ours; the generic ones of mount(8) are the mount helper's.
pub const TABLE: &[Row] = &[
    Row {
        name: "size",
        value: "SIZE",
        default: None,
        help: "size of the pool in whole pages: a number with an optional suffix K, M, G or T, or a percentage of RAM; a \
               64th comes on top",
        set: |options, text| Size::parse(text).map(|size| options.size = Some(size)),
        get: |options| options.size.map(|size| size.to_string()),
    },
    Row {
        name: "nodes",
        value: "NODES",
        default: Some("all nodes with processors"),
        help: "the NUMA nodes that the pool has memory of, in equal parts (0,2-3), or with the size of each part (0:32G,2:64G; size= \
               can be left out then). Nodes without processors give memory only if they are named. Each node must have its part",
        set: |options, text| Nodes::parse(text).map(|nodes| options.nodes = Some(nodes)),
        get: |options| options.nodes.as_ref().map(Nodes::to_string),
    },
    Row {
        name: "pagesize",
        value: "1G|2M",
        default: Some("1G"),
        help: "size of a page, the grain of reservation",
        set: |options, text| {
            options.page_size = match Size::parse(text) {
                Ok(Size::Bytes(bytes)) if bytes == PageSize::Huge.bytes() => PageSize::Huge,
                Ok(Size::Bytes(bytes)) if bytes == PageSize::Gigantic.bytes() => PageSize::Gigantic,
                _ => return Err(format!("{text:?} is not a page size: 1G or 2M")),
            };
            Ok(())
        },
        get: |options| Some(describe(options.page_size).to_owned()),
    },
    Row {
        name: "mode",
        value: "OCTAL",
        default: Some("755"),
        help: "permission bits of the root directory",
        set: |options, text| {
            let mode = u32::from_str_radix(text, 8)
                .ok()
                .filter(|mode| *mode <= 0o7777 && !text.starts_with('+'));
            options.mode =
                mode.ok_or_else(|| format!("{text:?} is not a mode: an octal number up to 7777"))?;
            Ok(())
        },
        get: |options| Some(format!("{:o}", options.mode)),
    },
    Row {
        name: "uid",
        value: "NUMBER",
        default: Some("0"),
        help: "owner of the root directory",
        set: |options, text| parse_id(text).map(|id| options.uid = id),
        get: |options| Some(options.uid.to_string()),
    },
    Row {
        name: "gid",
        value: "NUMBER",
        default: Some("0"),
        help: "group of the root directory",
        set: |options, text| parse_id(text).map(|id| options.gid = id),
        get: |options| Some(options.gid.to_string()),
    },
    Row {
        name: "nr_inodes",
        value: "NUMBER",
        default: Some("half as many as the machine has 4 KiB pages"),
        help: "most files, directories and other nodes, the root included; a number with an optional suffix K, M or G. A further name \
               of a file, and each KiB of extended attributes, counts as one",
        set: |options, text| parse_inodes(text).map(|number| options.inodes = Some(number)),
        get: |options| options.inodes.map(|number| number.to_string()),
    },
    Row {
        name: "collapse",
        value: "on|off",
        default: Some("on"),
        help: "put huge mappings back after a repair without being asked",
        set: |options, text| parse_switch(text).map(|on| options.collapse = on),
        get: |options| Some(describe_switch(options.collapse)),
    },
    Row {
        name: "recovery_write",
        value: "on|off",
        default: Some("on"),
        help: "let a write that covers a quarantined subpage whole repair it",
        set: |options, text| parse_switch(text).map(|on| options.recovery_write = on),
        get: |options| Some(describe_switch(options.recovery_write)),
    },
    Row {
        name: "io",
        value: "auto|native|mediated",
        default: Some("auto"),
        help: "who reads for a descriptor that was opened for reading only: the kernel (native), which is as fast as tmpfs, and \
               no quarantine can be asked for meanwhile (EBUSY); or the daemon (mediated). auto is native on a kernel with \
               CONFIG_MEMORY_FAILURE",
        set: |options, text| Io::parse(text).map(|io| options.io = io),
        get: |options| Some(options.io.name()),
    },
    Row {
        name: "punch",
        value: "release|keep",
        default: Some("release"),
        help: "release: punched pages go back to the pool, to touch them is SIGBUS; keep: they stay the file's and are cleared at \
            the next touch, but the machine has their memory until then: a touch may find none (OOM killer, SIGBUS)",
        set: |options, text| parse_punch(text).map(|keep| options.keep_punched = keep),
        get: |options| Some(if options.keep_punched { "keep" } else { "release" }.to_owned()),
    },
    Row {
        name: "clear",
        value: "demand|ahead",
        default: Some("demand"),
        help: "when free memory is cleared: as a file takes it (demand), or before, in the background, so that a new file of a \
               usual size gets its memory at once (ahead)",
        set: |options, text| Clear::parse(text).map(|clear| options.clear = clear),
        get: |options| Some(options.clear.name().to_owned()),
    },
    Row {
        name: "cpu",
        value: "PERCENT",
        default: Some("50%"),
        help: "with clear=ahead: the part of one processor of each NUMA node that clears memory, 1% to 100%; programs come first",
        set: |options, text| parse_percent(text).map(|percent| options.cpu = percent),
        get: |options| (options.clear == Clear::Ahead).then(|| format!("{}%", options.cpu)),
    },
    Row {
        name: "log",
        value: "FILE",
        default: Some("the system log"),
        help: "append the daemon's log to this file; SIGUSR1 to the daemon opens it anew",
        set: |options, text| {
            if !text.starts_with('/') {
                return Err(format!("{text:?} is not an absolute path"));
            }
            options.log = Some(text.to_owned());
            Ok(())
        },
        get: |options| options.log.clone(),
    },
];

fn describe_switch(on: bool) -> String {
    if on { "on" } else { "off" }.to_owned()
}

fn parse_id(text: &str) -> Result<u32, String> {
    let id = text.parse::<u32>().ok().filter(|id| *id != u32::MAX && !text.starts_with('+'));
    id.ok_or_else(|| format!("{text:?} is not a numeric user or group id"))
}

fn parse_inodes(text: &str) -> Result<u64, String> {
    match Size::parse(text) {
        Ok(Size::Bytes(number)) if (1..=u64::from(u32::MAX)).contains(&number) => Ok(number),
        _ => Err(format!(
            "{text:?} is not a number of inodes: from 1 to {}, with an optional suffix K, M or G",
            u32::MAX
        )),
    }
}

fn parse_percent(text: &str) -> Result<u32, String> {
    let percent = parse_number(text.strip_suffix('%').unwrap_or(text));
    let percent = percent.filter(|percent| (1..=100).contains(percent));
    percent.map(|percent| percent as u32).ok_or_else(|| format!("{text:?} is not from 1% to 100%"))
}

fn parse_switch(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(format!("{text:?} is neither on nor off")),
    }
}

fn parse_punch(text: &str) -> Result<bool, String> {
    match text {
        "release" => Ok(false),
        "keep" => Ok(true),
        _ => Err(format!("{text:?} is neither release nor keep")),
    }
}

impl Options {
    /// True if the table has `name`.
    pub fn knows(name: &str) -> bool {
        TABLE.iter().any(|row| row.name == name)
    }

    /// Takes one option.
    ///
    /// # Errors
    /// A sentence that names the option, says what is wrong and what would be right.
    pub fn set(&mut self, name: &str, value: Option<&str>) -> Result<(), String> {
        let row = TABLE.iter().find(|row| row.name == name).ok_or_else(|| {
            let names: Vec<_> = TABLE.iter().map(|row| row.name).collect();
            format!("unknown option {name:?}; there are {}, and mount(8)'s own", names.join(", "))
        })?;
        let value =
            value.ok_or_else(|| format!("option {name} needs a value: {name}={}", row.value))?;
        (row.set)(self, value).map_err(|why| format!("option {name}: {why}"))
    }

    /// All options that have a value, and the value, as they would be given.
    pub fn given(&self) -> impl Iterator<Item = (&'static str, String)> + '_ {
        TABLE.iter().filter_map(|row| Some((row.name, (row.get)(self)?)))
    }

    /// Pages of the pool, on a machine with `memory` bytes.
    ///
    /// # Errors
    /// A sentence, where no size is given, it is less than a page, or it is not that of the nodes'
    /// parts.
    pub fn pages(&self, memory: u64) -> Result<u64, String> {
        let pages = |size: Size| {
            size.pages(self.page_size, memory).map_err(|why| format!("option size: {why}"))
        };
        let size = self.size.map(pages).transpose()?;
        let parts = self.parts()?.map(|parts| parts.values().sum::<u64>());
        match (size, parts) {
            (Some(size), Some(parts)) => agreed(size, parts),
            (Some(pages), None) => self.refuse_empty_parts(pages).map(|()| pages),
            (None, Some(pages)) => Ok(pages),
            (None, None) => Err("option size is required, as in size=64G".to_owned()),
        }
    }

    /// The pages of each node's part, where the option `nodes` has sizes.
    ///
    /// # Errors
    /// A sentence, where a part is less than a page.
    pub fn parts(&self) -> Result<Option<Parts>, String> {
        let parts = self.nodes.as_ref().map(|nodes| nodes.parts(self.page_size));
        parts.transpose().map_err(|why| format!("option nodes: {why}")).map(Option::flatten)
    }

    /// Refuses equal parts of `pages` pages some of which would have no page.
    fn refuse_empty_parts(&self, pages: u64) -> Result<(), String> {
        match &self.nodes {
            Some(Nodes::Even(nodes)) if (nodes.len() as u64) > pages => Err(format!(
                "option nodes: {} nodes, and a pool of {pages} pages of {}; each node gives a page at least",
                nodes.len(),
                describe(self.page_size)
            )),
            _ => Ok(()),
        }
    }

    /// The table as text for a help page of 80 columns.
    pub fn help() -> String {
        const COLUMN: usize = 27;
        let indent = " ".repeat(COLUMN);
        let layout = textwrap::Options::new(80).subsequent_indent(&indent).break_words(false);
        let mut out = String::new();
        for row in TABLE {
            let default =
                row.default.map_or("required".to_owned(), |value| format!("default {value}"));
            let option = format!("  {}={}", row.name, row.value);
            let text = format!("{option:COLUMN$}{} ({default})", row.help);
            let _ = writeln!(out, "{}", textwrap::fill(&text, &layout));
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(name: &str, value: &str) -> Result<Options, String> {
        let mut options = Options::default();
        options.set(name, Some(value)).map(|()| options)
    }

    #[test]
    fn sizes_are_read_with_every_suffix() {
        for (text, bytes) in
            [("4096", 4096), ("3K", 3 << 10), ("2m", 2 << 20), ("4G", 4 << 30), ("0x10", 16)]
        {
            assert_eq!(Size::parse(text), Ok(Size::Bytes(bytes)), "{text}");
        }
        assert_eq!(Size::parse("25%"), Ok(Size::Percent(25)));
        assert_eq!(Size::Percent(25).pages(PageSize::Gigantic, 16 << 30), Ok(4));
    }

    #[test]
    fn malformed_values_are_refused_with_what_would_be_right() {
        for (name, value) in [
            ("size", "1Q"),
            ("size", ""),
            ("size", "-1"),
            ("size", "+1"),
            ("size", "0%"),
            ("size", "101%"),
            ("size", "99999999999T"),
            ("pagesize", "3M"),
            ("pagesize", "0"),
            ("mode", "999"),
            ("mode", "17777"),
            ("uid", "root"),
            ("gid", "4294967295"),
            ("nr_inodes", "0"),
            ("nr_inodes", "4G"),
            ("nr_inodes", "5%"),
            ("nr_inodes", "many"),
            ("collapse", "yes"),
            ("io", "fast"),
            ("punch", "on"),
            ("punch", ""),
            ("punch", "Keep"),
            ("log", "relative"),
            ("nodes", ""),
            ("nodes", "1,0"),
            ("nodes", "0,0"),
            ("nodes", "0,x"),
            ("nodes", "1024"),
            ("nodes", "0:1G,1"),
            ("nodes", "0:1G,0:1G"),
            ("nodes", "1:1G,0:1G"),
            ("nodes", "0:25%"),
            ("nodes", "0:"),
            ("nodes", "2000:1G"),
        ] {
            let why = set(name, value).expect_err(value);
            assert!(why.starts_with(&format!("option {name}: ")), "{why}");
        }
    }

    #[test]
    fn an_unknown_option_and_one_without_value_are_refused() {
        assert!(Options::default().set("szie", Some("1G")).unwrap_err().contains("unknown option"));
        assert!(Options::default().set("size", None).unwrap_err().contains("needs a value"));
    }

    #[test]
    fn a_size_below_a_page_is_refused() {
        assert!(
            set("size", "0").unwrap().pages(1 << 40).unwrap_err().contains("less than one page")
        );
        assert!(set("size", "1023M").unwrap().pages(1 << 40).is_err());
        assert_eq!(set("size", "2047M").unwrap().pages(1 << 40), Ok(1));
        assert!(Options::default().pages(1 << 40).unwrap_err().contains("required"));
    }

    #[test]
    fn nodes_are_a_list_or_have_sizes() {
        let nodes = |text: &str| Nodes::parse(text).unwrap();
        assert_eq!(nodes("0,2-3"), Nodes::Even([0, 2, 3].map(NumaNode).to_vec()));
        let sized = Nodes::Sized(vec![(NumaNode(0), 3 << 30), (NumaNode(2), 5 << 20)]);
        assert_eq!(nodes("0:3G,2:5M"), sized);
        assert_eq!(nodes(&sized.to_string()), sized);
        assert_eq!(nodes("\"0:3G,2:5M\""), sized);
        let parts = sized.parts(PageSize::Huge).unwrap();
        assert_eq!(parts, Some(Parts::from([(NumaNode(0), 1536), (NumaNode(2), 2)])));
        let why = sized.parts(PageSize::Gigantic).unwrap_err();
        assert!(why.starts_with("node 2: ") && why.contains("less than one page"), "{why}");
        let without = nodes("0:3G,2:0");
        assert!(without.parts(PageSize::Gigantic).unwrap_err().contains("node 2 has size 0"));
        let parts = without.parts_or_none(PageSize::Gigantic).unwrap();
        assert_eq!(parts, Some(Parts::from([(NumaNode(0), 3), (NumaNode(2), 0)])));
    }

    #[test]
    fn sizes_of_nodes_make_up_the_size() {
        let mut options = set("nodes", "0:2G,2:1G").unwrap();
        assert_eq!(options.pages(0), Ok(3));
        options.size = Some(Size::Bytes(3 << 30));
        assert_eq!(options.pages(0), Ok(3));
        options.size = Some(Size::Bytes(4 << 30));
        assert!(options.pages(0).unwrap_err().contains("make them agree"));
        let mut options = set("nodes", "0,1").unwrap();
        assert!(options.pages(1 << 40).unwrap_err().contains("required"));
        options.size = Some(Size::Bytes(2 << 30));
        assert_eq!(options.pages(0), Ok(2));
        options.size = Some(Size::Bytes(1 << 30));
        assert!(options.pages(0).unwrap_err().contains("each node gives a page at least"));
    }

    #[test]
    fn options_as_given_set_the_same_options() {
        let mut options = Options::default();
        for (name, value) in [
            ("size", "25%"),
            ("nodes", "0-2"),
            ("pagesize", "2M"),
            ("mode", "1777"),
            ("nr_inodes", "10k"),
            ("collapse", "off"),
            ("io", "native"),
            ("punch", "keep"),
        ] {
            options.set(name, Some(value)).unwrap();
        }
        let mut same = Options::default();
        options.given().for_each(|(name, value)| same.set(name, Some(&value)).unwrap());
        assert_eq!(same, options);
    }

    #[test]
    fn the_help_fits_a_terminal_and_its_columns_stand() {
        let (options, further): (Vec<String>, Vec<String>) =
            Options::help().lines().map(str::to_owned).partition(|line| !line.starts_with("   "));
        assert_eq!(options.len(), TABLE.len());
        for line in options.iter().chain(&further) {
            assert!(line.len() <= 80, "{line}");
            assert!(line[..27].ends_with(' ') && !line[27..].starts_with(' '), "{line}");
        }
    }

    #[test]
    fn every_default_in_the_table_is_the_default() {
        for row in TABLE.iter().filter(|row| !["log", "nr_inodes", "nodes"].contains(&row.name)) {
            let Some(default) = row.default else { continue };
            assert_eq!(set(row.name, default).unwrap(), Options::default(), "{}", row.name);
        }
    }
}
