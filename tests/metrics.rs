//! `hugetlb2 metrics`, read by the parser of Prometheus's own client library.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use support::{
    FOLIO, Pool, SUBPAGE, Worker, hugetlb2, limits, poison, run, status_and_error, text,
};

/// Prints a line for each sample: its name, its labels but the pool's, and its value.
const PARSER: &str = r#"
import sys
from prometheus_client.openmetrics.parser import text_string_to_metric_families
for family in text_string_to_metric_families(sys.stdin.read()):
    assert family.documentation and family.name.startswith("hugetlb2_"), family
    assert family.name.endswith("_bytes") == (family.unit == "bytes"), family
    for sample in family.samples:
        assert sample.labels.pop("pool") == sys.argv[1], sample
        labels = [f"{name}={value}" for name, value in sorted(sample.labels.items())]
        print(sample.name, ",".join(labels) or "-", int(sample.value))
"#;

/// The samples of a pool, by name and labels.
fn samples(pool: &Path) -> BTreeMap<(String, String), u64> {
    let metrics = run(hugetlb2().arg("metrics").arg(pool));
    let mut parser = Command::new("/usr/bin/python3"); // Debian's, which has the library
    parser.args(["-c", PARSER]).arg(pool).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut parser = parser.spawn().expect("python3-prometheus-client");
    parser.stdin.take().expect("a pipe").write_all(metrics.as_bytes()).unwrap();
    let parsed = limits::collect(limits::PROGRAM, "the parser", parser).unwrap();
    assert!(parsed.status.success(), "it does not parse:\n{metrics}");
    let row = |line: &str| {
        let words: Vec<&str> = line.split(' ').collect();
        let [name, labels, value] = words[..] else { panic!("{line}") };
        ((name.to_owned(), labels.to_owned()), value.parse().unwrap())
    };
    text(&parsed.stdout).lines().map(row).collect()
}

#[test]
fn metrics_are_openmetrics_with_the_counters_of_the_pool() {
    let pool = Pool::mount(&format!("pagesize=2M,size={},punch=keep", 8 * FOLIO));
    fs::write(pool.join("file"), vec![7; 3 * FOLIO as usize]).unwrap();
    poison(pool.join("file"), 0, 2 * SUBPAGE).unwrap();
    let found = samples(&pool.path());
    let of = |name: &str, labels: &str| {
        let key = (format!("hugetlb2_{name}"), labels.to_owned());
        *found.get(&key).unwrap_or_else(|| panic!("{name} {labels} is not in {found:?}"))
    };
    assert_eq!(of("pool_up", "-"), 1);
    assert_eq!(of("pool_bytes", "node=0,state=used"), 3 * FOLIO);
    assert_eq!(of("pool_bytes", "node=0,state=free"), 5 * FOLIO);
    assert_eq!(of("pool_bytes", "node=0,state=reserved"), 0);
    assert_eq!(of("quarantined_bytes", "kind=soft"), 2 * SUBPAGE);
    assert_eq!(of("quarantined_bytes", "kind=hw"), 0);
    assert_eq!((of("files", "-"), of("files_unavailable", "-")), (1, 0));
    assert_eq!((of("missing_bytes", "-"), of("punched_bytes", "-")), (0, 0));
    assert_eq!(of("frames_given_up_total", "-"), 0);
    // A daemon that does not answer.
    let worker = Worker::of(&pool);
    worker.stop();
    let found = samples(&pool.path());
    worker.signal(rustix::process::Signal::CONT);
    assert_eq!(found, BTreeMap::from([(("hugetlb2_pool_up".to_owned(), "-".to_owned()), 0)]));
    pool.unmount();
}

#[test]
fn metrics_of_what_is_no_pool_are_refused() {
    let (status, said) = status_and_error(hugetlb2().args(["metrics", "/proc"]));
    assert!(status == 1 && said.contains("/proc"), "{status}: {said}");
}
