//! The words of a placement, as users write them and as they are kept with a file.
//!
//! ```text
//!   placement = ["strict:"] wish
//!   wish      = "caller" | "local"
//!             | ("bind" | "preferred" | "interleave") ":" nodes
//!             | "weighted-interleave" ":" weighted
//!             | "best" ":" ("Latency" | "Bandwidth" | "Capacity")
//!   nodes     = "all" | part {"," part}               part = number ["-" number]
//!   weighted  = "all" | part ["*" weight] {"," ...}   weight = 1 to 255
//! ```
//!
//! The words are those of numactl(8), and mean the same. A line that was read from the attribute
//! can be written again: only the first line counts.

use crate::error::{Error, Result};
use crate::units::NumaNode;
use std::collections::BTreeMap;
use std::fmt;

/// The wish of a file or directory for the NUMA nodes of its memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Placement {
    /// The nodes that are asked for.
    pub wish: Wish,
    /// A growth fails where these nodes are full. Without this, other nodes give then.
    pub strict: bool,
}

/// The nodes that a placement asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Wish {
    /// Those of the memory policy of the thread that makes the file grow.
    #[default]
    Caller,
    /// The node of the processor that this thread runs on.
    Local,
    /// These nodes, the nearest first.
    Bind(Nodes),
    /// These nodes, the nearest first.
    Preferred(Nodes),
    /// These nodes in turn.
    Interleave(Nodes),
    /// These nodes in turn, each for as many pages as its weight.
    WeightedInterleave(Nodes, Weights),
    /// The best node for a purpose.
    Best(Quality),
}

/// A set of nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Nodes {
    /// All nodes of the pool.
    All,
    /// These, ascending, each once, at least one.
    Listed(Vec<NumaNode>),
}

/// Weights that are asked for. The weight of another node is the machine's.
pub type Weights = BTreeMap<NumaNode, u32>;

/// A quality by which memory is compared. The names are those of hwloc's memory attributes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quality {
    /// The time of an access: less is better.
    Latency,
    /// The bytes that can be read in a second: more is better.
    Bandwidth,
    /// The size of the node: more is better.
    Capacity,
}

/// The largest weight: that of the kernel (mm/mempolicy.c, iw_table).
const HEAVIEST: u32 = 255;

/// The words, for messages.
const EXPECTED: &str = "caller, local, bind:NODES, preferred:NODES, interleave:NODES, \
    weighted-interleave:NODES or best:Latency|Bandwidth|Capacity, perhaps with strict: before it";

/// An example of the nodes, for messages.
const EXAMPLE: &str = "as in 0-1,3, or all";

impl Placement {
    /// Parses the value of an attribute. Lines behind the first tell of the memory that the file
    /// has, and are ignored.
    ///
    /// # Errors
    /// [`Error::Invalid`]: the text says which part is wrong, and what is right in its place.
    pub fn parse(value: &[u8]) -> Result<Self> {
        let value = value.strip_suffix(b"\0").unwrap_or(value);
        let text = std::str::from_utf8(value).map_err(|_| Error::invalid("not text"))?;
        let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        let Some(line) = lines.next() else {
            return Err(Error::invalid(format!("no placement; expected {EXPECTED}")));
        };
        match line.strip_prefix("strict:") {
            Some(wish) => Ok(Self { wish: parse_wish(wish)?, strict: true }),
            None => Ok(Self { wish: parse_wish(line)?, strict: false }),
        }
    }

    /// Refuses nodes that the pool does not have.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the first such node, and those of the pool.
    pub fn refuse_other_than(&self, pool: &[NumaNode]) -> Result<()> {
        let missing = self.wish.listed().iter().find(|node| !pool.contains(node));
        missing.map_or(Ok(()), |node| {
            let nodes = list(pool);
            Err(Error::invalid(format!("the pool has no memory on node {node}; it has {nodes}")))
        })
    }
}

impl Wish {
    /// True if the order of the nodes depends on the thread that makes a file grow.
    pub fn depends_on_caller(&self) -> bool {
        !matches!(self, Self::Interleave(_) | Self::WeightedInterleave(..))
    }

    /// True if the words say which nodes are meant, for each caller the same.
    pub fn names_nodes(&self) -> bool {
        !matches!(self, Self::Caller | Self::Local | Self::Best(_))
    }

    /// The nodes that are named.
    fn listed(&self) -> &[NumaNode] {
        match self {
            Self::Bind(nodes)
            | Self::Preferred(nodes)
            | Self::Interleave(nodes)
            | Self::WeightedInterleave(nodes, _) => nodes.listed(),
            Self::Caller | Self::Local | Self::Best(_) => &[],
        }
    }
}

impl Nodes {
    /// The nodes that are named.
    pub(super) fn listed(&self) -> &[NumaNode] {
        match self {
            Self::All => &[],
            Self::Listed(nodes) => nodes,
        }
    }
}

fn parse_wish(text: &str) -> Result<Wish> {
    let (word, rest) = match text.split_once(':') {
        Some((word, rest)) => (word, Some(rest)),
        None => (text, None),
    };
    let nodes = || parse_nodes(word, rest);
    match word {
        "caller" => alone(word, rest).map(|()| Wish::Caller),
        "local" => alone(word, rest).map(|()| Wish::Local),
        "bind" => Ok(Wish::Bind(nodes()?)),
        "preferred" => Ok(Wish::Preferred(nodes()?)),
        "interleave" => Ok(Wish::Interleave(nodes()?)),
        "weighted-interleave" => {
            let (nodes, weights) = parse_weighted(word, rest)?;
            Ok(Wish::WeightedInterleave(nodes, weights))
        }
        "best" => parse_quality(rest).map(Wish::Best),
        _ => Err(Error::invalid(format!("{text:?} is no placement; expected {EXPECTED}"))),
    }
}

fn alone(word: &str, rest: Option<&str>) -> Result<()> {
    rest.map_or(Ok(()), |rest| {
        Err(Error::invalid(format!("{word} stands alone, without {rest:?}")))
    })
}

fn parse_quality(rest: Option<&str>) -> Result<Quality> {
    let wanted = rest.unwrap_or_default();
    let quality = Quality::ALL.iter().find(|quality| quality.name().eq_ignore_ascii_case(wanted));
    quality.copied().ok_or_else(|| {
        Error::invalid(format!(
            "{wanted:?} is no quality of memory; expected best:Latency, best:Bandwidth or best:Capacity"
        ))
    })
}

fn parse_nodes(word: &str, rest: Option<&str>) -> Result<Nodes> {
    match parse_weighted(word, rest)? {
        (nodes, weights) if weights.is_empty() => Ok(nodes),
        _ => Err(Error::invalid(format!("{word} has no weights; weighted-interleave has"))),
    }
}

/// Parses nodes, of which some may have a weight.
fn parse_weighted(word: &str, rest: Option<&str>) -> Result<(Nodes, Weights)> {
    let text = rest
        .filter(|rest| !rest.is_empty())
        .ok_or_else(|| Error::invalid(format!("{word} needs nodes behind a colon, {EXAMPLE}")))?;
    if text == "all" {
        return Ok((Nodes::All, Weights::new()));
    }
    let (mut nodes, mut weights) = (Vec::new(), Weights::new());
    for item in text.split(',') {
        let (part, weight) = match item.split_once('*') {
            Some((part, weight)) => (part, Some(parse_weight(weight)?)),
            None => (item, None),
        };
        for node in parse_part(part)? {
            nodes.push(node);
            weights.extend(weight.map(|weight| (node, weight)));
        }
    }
    nodes.sort_unstable();
    if let Some(twice) = nodes.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(Error::invalid(format!("node {} is named twice in {text:?}", twice[0])));
    }
    Ok((Nodes::Listed(nodes), weights))
}

/// Parses `1` or `0-3`.
fn parse_part(part: &str) -> Result<impl Iterator<Item = NumaNode> + use<>> {
    let (first, last) = part.split_once('-').unwrap_or((part, part));
    let number = |text: &str| match NumaNode::parse(text) {
        Some(node) if node <= NumaNode::LAST => Ok(node),
        Some(node) => {
            let last = NumaNode::LAST;
            Err(Error::invalid(format!("{node} is no node; the last one possible is {last}")))
        }
        None => Err(Error::invalid(format!("{text:?} is not the number of a node, {EXAMPLE}"))),
    };
    let (first, last) = (number(first)?, number(last)?);
    if first > last {
        return Err(Error::invalid(format!("{part:?} is not ascending; expected {last}-{first}")));
    }
    Ok((first.0..=last.0).map(NumaNode))
}

fn parse_weight(text: &str) -> Result<u32> {
    let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let weight = is_number.then(|| text.parse().ok()).flatten();
    weight.filter(|weight| (1..=HEAVIEST).contains(weight)).ok_or_else(|| {
        Error::invalid(format!("{text:?} is no weight; expected 1 to {HEAVIEST}, as in 0*3,1"))
    })
}

impl Quality {
    /// All qualities.
    pub const ALL: [Self; 3] = [Self::Latency, Self::Bandwidth, Self::Capacity];

    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Latency => "Latency",
            Self::Bandwidth => "Bandwidth",
            Self::Capacity => "Capacity",
        }
    }
}

impl fmt::Display for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let strict = if self.strict { "strict:" } else { "" };
        write!(f, "{strict}{}", self.wish)
    }
}

impl fmt::Display for Wish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Caller => write!(f, "caller"),
            Self::Local => write!(f, "local"),
            Self::Bind(nodes) => write!(f, "bind:{nodes}"),
            Self::Preferred(nodes) => write!(f, "preferred:{nodes}"),
            Self::Interleave(nodes) => write!(f, "interleave:{nodes}"),
            Self::WeightedInterleave(nodes, weights) if weights.is_empty() => {
                write!(f, "weighted-interleave:{nodes}")
            }
            Self::WeightedInterleave(nodes, weights) => {
                let item = |node: &NumaNode| match weights.get(node) {
                    Some(weight) => format!("{node}*{weight}"),
                    None => node.to_string(),
                };
                let items: Vec<String> = nodes.listed().iter().map(item).collect();
                write!(f, "weighted-interleave:{}", items.join(","))
            }
            Self::Best(quality) => write!(f, "best:{}", quality.name()),
        }
    }
}

impl fmt::Display for Nodes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => write!(f, "all"),
            Self::Listed(nodes) => write!(f, "{}", list(nodes)),
        }
    }
}

/// The nodes, which ascend, in the kernel's list format (`0-1,3`).
fn list(nodes: &[NumaNode]) -> String {
    let mut parts: Vec<(u32, u32)> = Vec::new();
    for NumaNode(node) in nodes {
        match parts.last_mut() {
            Some((_, last)) if *last + 1 == *node => *last = *node,
            _ => parts.push((*node, *node)),
        }
    }
    let part = |(first, last): &(u32, u32)| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    };
    parts.iter().map(part).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn listed(numbers: &[u32]) -> Nodes {
        Nodes::Listed(numbers.iter().copied().map(NumaNode).collect())
    }

    fn best_effort(wish: Wish) -> Placement {
        Placement { wish, strict: false }
    }

    #[test]
    fn each_word_is_read_and_written() {
        let weights = Weights::from([(NumaNode(0), 3)]);
        let rows = [
            ("caller", Wish::Caller),
            ("local", Wish::Local),
            ("bind:0-1", Wish::Bind(listed(&[0, 1]))),
            ("preferred:1", Wish::Preferred(listed(&[1]))),
            ("interleave:0-1,3", Wish::Interleave(listed(&[0, 1, 3]))),
            ("interleave:all", Wish::Interleave(Nodes::All)),
            ("weighted-interleave:0*3,1", Wish::WeightedInterleave(listed(&[0, 1]), weights)),
            ("weighted-interleave:0-1", Wish::WeightedInterleave(listed(&[0, 1]), Weights::new())),
            ("best:Latency", Wish::Best(Quality::Latency)),
            ("best:Bandwidth", Wish::Best(Quality::Bandwidth)),
            ("best:Capacity", Wish::Best(Quality::Capacity)),
        ];
        for (text, wish) in rows {
            let strict = Placement { wish: wish.clone(), strict: true };
            assert_eq!(Placement::parse(text.as_bytes()).unwrap(), best_effort(wish));
            assert_eq!(Placement::parse(format!("strict:{text}\n").as_bytes()).unwrap(), strict);
            assert_eq!(strict.to_string(), format!("strict:{text}"));
        }
    }

    #[test]
    fn other_spellings_mean_the_same() {
        let rows = [
            ("bind:1,0", "bind:0-1"),
            ("bind:3,0-1,2", "bind:0-3"),
            ("bind:00", "bind:0"),
            ("best:latency", "best:Latency"),
            ("weighted-interleave:0-1*2,4", "weighted-interleave:0*2,1*2,4"),
            (" local \n\0", "local"),
            ("\nlocal\n0 4096 full\nnonsense\n", "local"),
        ];
        for (text, canonical) in rows {
            assert_eq!(Placement::parse(text.as_bytes()).unwrap().to_string(), canonical);
        }
    }

    #[test]
    fn a_bad_text_is_refused_with_its_reason() {
        let rows = [
            ("", "no placement; expected caller"),
            ("\n \n", "no placement; expected caller"),
            ("strict:", "\"\" is no placement"),
            ("strict", "\"strict\" is no placement"),
            ("membind:0", "\"membind:0\" is no placement; expected caller, local, bind:NODES"),
            ("strict:strict:local", "\"strict:local\" is no placement"),
            ("Local", "\"Local\" is no placement"),
            ("local:0", "local stands alone, without \"0\""),
            ("caller:", "caller stands alone"),
            ("bind", "bind needs nodes behind a colon, as in 0-1,3"),
            ("bind:", "bind needs nodes behind a colon"),
            ("bind:x", "\"x\" is not the number of a node, as in 0-1,3"),
            ("bind:0,", "\"\" is not the number of a node"),
            ("bind:+1", "\"+1\" is not the number of a node"),
            ("bind:0x1", "\"0x1\" is not the number of a node"),
            ("bind:1-", "\"\" is not the number of a node"),
            ("bind:0-1-2", "\"1-2\" is not the number of a node"),
            ("bind:3-1", "\"3-1\" is not ascending; expected 1-3"),
            ("bind:0-4294967295", "4294967295 is no node; the last one possible is 1023"),
            ("bind:99999999999", "\"99999999999\" is not the number of a node"),
            ("bind:0-2,1", "node 1 is named twice in \"0-2,1\""),
            ("bind:0,all", "\"all\" is not the number of a node"),
            ("bind:0*3", "bind has no weights; weighted-interleave has"),
            ("weighted-interleave:0*0", "\"0\" is no weight; expected 1 to 255, as in 0*3,1"),
            ("weighted-interleave:0*256", "\"256\" is no weight"),
            ("weighted-interleave:0*", "\"\" is no weight"),
            ("weighted-interleave:0*+1", "\"+1\" is no weight"),
            ("best", "\"\" is no quality of memory; expected best:Latency"),
            ("best:Speed", "\"Speed\" is no quality of memory"),
        ];
        for (text, reason) in rows {
            let error = Placement::parse(text.as_bytes()).unwrap_err();
            assert!(matches!(error, Error::Invalid(_)), "{text:?}");
            assert!(error.to_string().starts_with(reason), "{text:?}: {error}");
        }
        assert!(Placement::parse(b"local\xff").is_err());
    }

    #[test]
    fn nodes_that_the_pool_lacks_are_refused() {
        let pool = [0, 1, 4].map(NumaNode);
        let refuse = |text: &str| Placement::parse(text.as_bytes())?.refuse_other_than(&pool);
        for text in ["bind:4", "interleave:all", "local", "best:Capacity"] {
            assert!(refuse(text).is_ok(), "{text}");
        }
        let error = refuse("weighted-interleave:0,2-3*2").unwrap_err();
        assert_eq!(error.to_string(), "the pool has no memory on node 2; it has 0-1,4");
    }

    fn any_nodes() -> impl Strategy<Value = Nodes> {
        let listed = prop::collection::btree_set(0..=NumaNode::LAST.0, 1..9)
            .prop_map(|numbers| Nodes::Listed(numbers.into_iter().map(NumaNode).collect()));
        prop_oneof![Just(Nodes::All), listed]
    }

    fn any_weighted() -> impl Strategy<Value = Wish> {
        (any_nodes(), prop::collection::vec(prop::option::of(1..=HEAVIEST), 9)).prop_map(
            |(nodes, weights)| {
                let weighted = nodes.listed().iter().zip(weights);
                let weights = weighted.filter_map(|(node, weight)| Some((*node, weight?)));
                let weights = weights.collect();
                Wish::WeightedInterleave(nodes, weights)
            },
        )
    }

    fn any_wish() -> impl Strategy<Value = Wish> {
        prop_oneof![
            Just(Wish::Caller),
            Just(Wish::Local),
            any_nodes().prop_map(Wish::Bind),
            any_nodes().prop_map(Wish::Preferred),
            any_nodes().prop_map(Wish::Interleave),
            any_weighted(),
            prop::sample::select(&Quality::ALL[..]).prop_map(Wish::Best),
        ]
    }

    proptest! {
        #[test]
        fn a_placement_survives_its_text((wish, strict) in (any_wish(), any::<bool>())) {
            let placement = Placement { wish, strict };
            let text = placement.to_string();
            prop_assert_eq!(Placement::parse(text.as_bytes()).unwrap(), placement);
        }

        #[test]
        fn no_text_does_harm(text in "(strict:)?(bind|best|weighted-interleave)?[-:*,0-9a]{0,12}") {
            if let Ok(placement) = Placement::parse(text.as_bytes()) {
                let again = placement.to_string();
                prop_assert_eq!(Placement::parse(again.as_bytes()).unwrap(), placement);
            }
        }
    }
}
