//! The counters of pools as OpenMetrics text, for node_exporter's textfile collector and the like.
//! Names and units are by the conventions of Prometheus.

use crate::attributes::Counters;
use hugetlb2fs::attributes::Counter as Of;
use hugetlb2fs::units::SUBPAGE_SIZE;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};
use std::path::PathBuf;
use std::sync::atomic::Ordering;

type Labels = Vec<(&'static str, String)>;

/// A metric with one value for each pool.
struct Row {
    name: &'static str,
    help: &'static str,
    counter: Of,
    scale: Scale,
}

/// The unit of a counter.
#[derive(Clone, Copy)]
enum Scale {
    /// One.
    One,
    /// One byte.
    Byte,
    /// One page of the pool.
    Page,
}

const GAUGES: &[Row] = &[
    row("ready", "Free memory that is cleared ahead", Of::PagesReady, Scale::Page),
    row(
        "orphaned",
        "Memory of removed files that programs still use",
        Of::PagesOrphaned,
        Scale::Page,
    ),
    row("missing", "Free memory that is lacking and not handed out", Of::PagesMissing, Scale::Page),
    row(
        "short",
        "Memory that the pool lacks of its pages and its float",
        Of::ShortBytes,
        Scale::Byte,
    ),
    row(
        "punched",
        "Memory of files that the machine has until the next touch",
        Of::PunchedBytes,
        Scale::Byte,
    ),
    row("files", "Regular files that were opened at least once", Of::Objects, Scale::One),
    row("files_unavailable", "Files that cannot be opened", Of::FilesUnavailable, Scale::One),
    row(
        "files_memory_open",
        "Files whose memory programs have open by themselves",
        Of::MemoryOpen,
        Scale::One,
    ),
    row(
        "native_descriptors",
        "Descriptors by which the kernel reads itself",
        Of::OpenedNatively,
        Scale::One,
    ),
];

/// The worker counts these from its start on.
const COUNTERS: &[Row] = &[
    row(
        "frames_given_up",
        "Frames of good memory that were given up for losses of other machines",
        Of::FramesGivenUp,
        Scale::One,
    ),
    row(
        "log_lines_dropped",
        "Lines that the log did not take in time",
        Of::LogLinesDropped,
        Scale::One,
    ),
    row(
        "holes_shut_again",
        "Quarantined subpages that a touch opened and that were shut again",
        Of::HolesShutAgain,
        Scale::One,
    ),
];

const fn row(name: &'static str, help: &'static str, counter: Of, scale: Scale) -> Row {
    Row { name, help, counter, scale }
}

/// The text for pools, each with its counters, or none if its daemon does not answer.
pub fn text(pools: &[(PathBuf, Option<Counters>)]) -> String {
    let mut registry = Registry::with_prefix("hugetlb2");
    let of = |pool: &PathBuf| vec![("pool", pool.to_string_lossy().into_owned())];
    let up = Family::<Labels, Gauge>::default();
    for (pool, counters) in pools {
        up.get_or_create(&of(pool)).set(counters.is_some().into());
    }
    registry.register("pool_up", "1 if the pool's daemon answers", up);
    let answering =
        || pools.iter().filter_map(|(pool, counters)| Some((of(pool), counters.as_ref()?)));
    memory(&mut registry, answering());
    for row in GAUGES {
        let values = Family::<Labels, Gauge>::default();
        for (labels, counters) in answering() {
            if let Some(value) = row.value(counters) {
                values.get_or_create(&labels).set(number(value));
            }
        }
        match row.scale {
            Scale::One => registry.register(row.name, row.help, values),
            Scale::Byte | Scale::Page => {
                registry.register_with_unit(row.name, row.help, Unit::Bytes, values);
            }
        }
    }
    for row in COUNTERS {
        let values = Family::<Labels, Counter>::default();
        for (labels, counters) in answering() {
            if let Some(value) = row.value(counters) {
                values.get_or_create(&labels).inner().store(value, Ordering::Relaxed);
            }
        }
        registry.register(row.name, row.help, values);
    }
    let mut text = String::new();
    encode(&mut text, &registry).expect("a string takes any text");
    text
}

/// The pages of each node's part by their state, and the quarantine.
fn memory<'a>(registry: &mut Registry, pools: impl Iterator<Item = (Labels, &'a Counters)>) {
    let (pages, lost) = (Family::<Labels, Gauge>::default(), Family::<Labels, Gauge>::default());
    for (labels, counters) in pools {
        let with = |more: &[(&'static str, String)]| [&labels[..], more].concat();
        let page = counters.get(Of::PageSize).unwrap_or(0);
        for node in counters.nodes() {
            let of = |counter| counters.get(counter).unwrap_or(0);
            let (free, used) = (of(Of::PagesFreeOn { node }), of(Of::PagesUsedOn { node }));
            let rest = of(Of::PagesTotalOn { node }).saturating_sub(free + used);
            for (state, count) in [("free", free), ("used", used), ("reserved", rest)] {
                let labels = with(&[("node", node.to_string()), ("state", state.to_owned())]);
                pages.get_or_create(&labels).set(number(count * page));
            }
        }
        for (kind, counter) in [("soft", Of::QuarantinedSoft), ("hw", Of::QuarantinedHw)] {
            let bytes = counters.get(counter).unwrap_or(0) * SUBPAGE_SIZE;
            lost.get_or_create(&with(&[("kind", kind.to_owned())])).set(number(bytes));
        }
    }
    let help = "Pages of the pool by NUMA node and state; reserved are promised or missing";
    registry.register_with_unit("pool", help, Unit::Bytes, pages);
    let help = "Memory that is quarantined: soft on request, hw for memory errors";
    registry.register_with_unit("quarantined", help, Unit::Bytes, lost);
}

impl Row {
    /// The value of a pool; none if its daemon does not have the counter.
    fn value(&self, counters: &Counters) -> Option<u64> {
        let value = counters.get(self.counter)?;
        match self.scale {
            Scale::One | Scale::Byte => Some(value),
            Scale::Page => Some(value * counters.get(Of::PageSize)?),
        }
    }
}

fn number(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
