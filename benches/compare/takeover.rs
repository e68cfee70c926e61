//! The time for which calls wait when the worker dies.

use super::sides::Side;
use super::{Plan, Table, milliseconds};
use hugetlb2fs::attributes::Counter;
use rustix::process::{Signal, kill_process};
use std::fs::{self, File};
use std::io::ErrorKind;

/// Measures the row of this module.
pub fn measure(plan: &Plan, table: &mut Table) {
    let counts: &[u64] = if plan.short { &[10, 300] } else { &[10, 1000] };
    let mut samples = Vec::new();
    for files in counts {
        let name = format!("with {files} files");
        match Side::ours(plan, 64 << 20, "pagesize=2M") {
            Ok(side) => {
                (0..*files).for_each(|n| {
                    drop(File::create(side.mount_point.join(n.to_string())).expect("create"))
                });
                samples.push((name, (0..plan.rounds()).map(|n| kill_and_ask(&side, n)).collect()));
            }
            Err(why) => table.skip(&format!("takeover {name}"), &why),
        }
    }
    table.growth("takeover, from kill -9 of the worker to the next answer", "ms", samples);
}

/// Kills the worker and asks for a name that no call has looked up before: for such a name the
/// kernel has no answer of its own.
fn kill_and_ask(side: &Side, round: usize) -> f64 {
    let path = side.mount_point.join(format!("no-such-file-{round}"));
    let worker = side.process(Counter::WorkerPid);
    milliseconds(|| {
        kill_process(worker, Signal::KILL).expect("it runs");
        let answer = fs::metadata(&path).expect_err("there is no such file");
        assert_eq!(answer.kind(), ErrorKind::NotFound);
    })
}
