//! The memory policy of a thread, as the kernel writes it in /proc.
//!
//! A thread may be anyone's, so no text is believed: a text that does not parse is no policy.

use super::{Nodes, Weights, Wish};
use crate::units::NumaNode;

/// The thread that makes a file grow, as far as it is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Its memory policy.
    pub wish: Wish,
    /// The NUMA node of the processor that it runs on.
    pub near: Option<NumaNode>,
    /// The NUMA nodes that its cpuset allows.
    pub allowed: Option<Vec<NumaNode>>,
}

/// Bytes of /proc/TID/numa_maps that hold the policy of the first record: an address, a space, and
/// the text of [`LONGEST_POLICY`].
pub const POLICY_BYTES: usize = 128;

/// The length of a policy's text above which the kernel cuts it (fs/proc/task_mmu.c,
/// show_numa_map: a buffer of 64 bytes).
const LONGEST_POLICY: usize = 63;

/// Makes the wish of a mode.
type ToWish = fn(Nodes) -> Wish;

/// The longest name of a mode first, as one begins with another (mm/mempolicy.c, policy_modes).
const MODES: [(&str, ToWish); 5] = [
    ("weighted interleave", |nodes| Wish::WeightedInterleave(nodes, Weights::new())),
    ("prefer (many)", Wish::Preferred),
    ("prefer", Wish::Preferred),
    ("interleave", Wish::Interleave),
    ("bind", Wish::Bind),
];

/// Parses the start of /proc/TID/numa_maps: the policy of the first mapping. It is the thread's
/// own, unless a program has given that mapping another one (mbind(2)), and that is the program's
/// code or the lowest address that it has chosen. None for a text that is not the kernel's.
///
/// The kernel has applied the thread's cpuset and the flags `static` and `relative` to the nodes.
/// So the nodes are meant as they are.
pub fn parse_policy(numa_maps: &[u8]) -> Option<Wish> {
    let text = ascii(numa_maps);
    let (address, policy) = text.lines().next()?.split_once(' ')?;
    u64::from_str_radix(address, 16).ok()?;
    // Without a policy of its own, a thread takes memory where it runs.
    if ["default", "local"].iter().any(|mode| is_mode(policy, mode)) {
        return Some(Wish::Local);
    }
    let (mode, wish) = MODES.iter().find(|(mode, _)| is_mode(policy, mode))?;
    let flags_and_nodes = &policy[mode.len()..];
    let (before, nodes) = flags_and_nodes.split_once(':')?;
    if before.contains(' ') {
        return None; // the colon belongs to something behind the policy
    }
    let nodes = nodes.split(' ').next()?;
    let length = mode.len() + before.len() + 1 + nodes.len();
    let whole = if length < LONGEST_POLICY { nodes } else { nodes.rsplit_once(',')?.0 };
    NumaNode::parse_list(whole).map(|nodes| wish(Nodes::Listed(nodes)))
}

/// True if `policy` has this mode: behind the name are flags, nodes, or the end of the policy.
fn is_mode(policy: &str, mode: &str) -> bool {
    policy
        .strip_prefix(mode)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', ':', '=']))
}

/// Parses the nodes that a thread's cpuset allows, from /proc/TID/status. None where the kernel has
/// no cpusets.
pub fn parse_allowed(status: &[u8]) -> Option<Vec<NumaNode>> {
    let text = ascii(status);
    let list = text.lines().find_map(|line| line.strip_prefix("Mems_allowed_list:"))?;
    NumaNode::parse_list(list.trim())
}

/// Parses the processor that a thread ran on last, from /proc/TID/stat (proc(5), field 39).
pub fn parse_processor(stat: &[u8]) -> Option<u32> {
    let text = ascii(stat);
    // The second field is the name, in parentheses. A program can put anything into it.
    let (_, behind_name) = text.rsplit_once(')')?;
    behind_name.split_ascii_whitespace().nth(36)?.parse().ok()
}

/// The text, with a question mark for each byte of a path or name that is not ASCII.
fn ascii(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| if byte.is_ascii() { char::from(*byte) } else { '?' }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn listed(numbers: &[u32]) -> Nodes {
        Nodes::Listed(numbers.iter().copied().map(NumaNode).collect())
    }

    #[test]
    fn policies_are_read_as_the_kernel_writes_them() {
        let weighted = |nodes| Wish::WeightedInterleave(nodes, Weights::new());
        let rows = [
            (
                "557fc6ede000 default file=/usr/bin/cat mapped=2 N0=2 kernelpagesize_kB=4",
                Wish::Local,
            ),
            ("7f0000000000 default", Wish::Local),
            ("00400000 local anon=1 dirty=1 N0=1 kernelpagesize_kB=4", Wish::Local),
            ("00400000 bind:0-1 file=/a:b anon=1", Wish::Bind(listed(&[0, 1]))),
            ("00400000 bind=static:1 anon=1", Wish::Bind(listed(&[1]))),
            ("00400000 bind=static|balancing:0,2", Wish::Bind(listed(&[0, 2]))),
            ("00400000 prefer:1 heap", Wish::Preferred(listed(&[1]))),
            ("00400000 prefer=relative:1", Wish::Preferred(listed(&[1]))),
            ("00400000 prefer (many):0-1 stack", Wish::Preferred(listed(&[0, 1]))),
            ("00400000 prefer (many)=static:3", Wish::Preferred(listed(&[3]))),
            ("00400000 interleave:0-3,7", Wish::Interleave(listed(&[0, 1, 2, 3, 7]))),
            ("00400000 interleave=relative:0-1", Wish::Interleave(listed(&[0, 1]))),
            ("00400000 weighted interleave:0-1 anon=5", weighted(listed(&[0, 1]))),
        ];
        for (line, wish) in rows {
            let file = format!("{line}\n7fff00000000 bind:9 stack\n");
            assert_eq!(parse_policy(file.as_bytes()), Some(wish), "{line}");
        }
    }

    #[test]
    fn a_text_that_is_not_the_kernels_is_no_policy() {
        for text in [
            "",
            "\n",
            "00400000",
            "00400000 ",
            "00400000 unknown",
            "00400000 bind",
            "00400000 bind:",
            "00400000 bind:x",
            "00400000 bind:2-1",
            "00400000 bind:0-4294967295",
            "00400000 bind file=/a:0",
            "00400000 bindings:0",
            "00400000 defaults",
            "nonsense default",
        ] {
            assert_eq!(parse_policy(text.as_bytes()), None, "{text:?}");
        }
        assert_eq!(parse_policy(b"00400000 default file=/\xff\xfe"), Some(Wish::Local));
    }

    #[test]
    fn a_list_that_the_kernel_has_cut_loses_its_last_part() {
        let policy = "weighted interleave=relative:0,2,4,6,8,10,12,14,16,18,20,22,1001";
        let cut = &policy[..LONGEST_POLICY];
        assert!(cut.ends_with(",100"), "which is not the last node: {cut}");
        let line = format!("00400000 {cut} file=/bin/x\n");
        assert!(line.find(" file").unwrap() < POLICY_BYTES);
        let Some(Wish::WeightedInterleave(Nodes::Listed(nodes), _)) = parse_policy(line.as_bytes())
        else {
            panic!("{line}")
        };
        assert_eq!(nodes.last(), Some(&NumaNode(22)));
    }

    #[test]
    fn the_cpuset_is_read_as_the_kernel_writes_it() {
        let status = b"Name:\tMems_allowed_list:\t7\nMems_allowed:\t3\nMems_allowed_list:\t0-1\n";
        assert_eq!(parse_allowed(status), Some([0, 1].map(NumaNode).to_vec()));
        assert_eq!(parse_allowed(b"Name:\tx\n"), None);
        assert_eq!(parse_allowed(b"Mems_allowed_list:\t\n"), None);
    }

    #[test]
    fn the_processor_is_read_in_spite_of_the_name() {
        let fields = "S 1 2 3 0 -1 4194560 100 0 0 0 1 2 0 0 20 0 1 0 99 8192 500 \
            18446744073709551615 1 1 0 0 0 0 0 4096 0 0 0 0 17 5 0 0 0 0 0";
        for name in ["sleep", ") S 1 (", "a b c"] {
            let stat = format!("4242 ({name}) {fields}\n");
            assert_eq!(parse_processor(stat.as_bytes()), Some(5), "{name:?}");
        }
        assert_eq!(parse_processor(b"4242 (x) S 1"), None);
        assert_eq!(parse_processor(b""), None);
    }

    proptest! {
        #[test]
        fn no_text_of_a_thread_does_harm(
            bytes in prop::collection::vec(any::<u8>(), 0..200),
            policy in "[0-9a-f]{1,8} (bind|prefer|interleave)[=a-z]{0,3}:[-,0-9]{0,70}",
        ) {
            for text in [&bytes[..], policy.as_bytes()] {
                parse_policy(text);
                parse_allowed(text);
                parse_processor(text);
            }
        }
    }
}
