//! A Java virtual machine with a file here for its heap.

use crate::support::{FOLIO, Pool};
use crate::{outcome, said, tests};
use std::path::Path;
use std::process::Command;

tests!(
    a_java_heap_is_mapped_huge_and_keeps_every_byte,
    a_java_heap_that_does_not_fit_is_refused_by_java
);

const HEAP_MEBIBYTES: u64 = 128;

/// Fills arrays, looks at each, and forgets it later. Then prints the amount of its address space
/// that is mapped huge.
const PROGRAM: &str = r#"
import java.nio.file.*;
import java.util.*;

public class Churn {
    public static void main(String[] arguments) throws Exception {
        ArrayDeque<byte[]> live = new ArrayDeque<>();
        for (int round = 0; round < 20000; round++) {
            byte[] bytes = new byte[16384];
            Arrays.fill(bytes, (byte) round);
            live.add(bytes);
            if (live.size() > 1000) {
                for (byte found : live.remove())
                    if (found != (byte) (round - 1000)) throw new Error("a wrong byte");
            }
        }
        System.gc();
        long huge = 0;
        for (String line : Files.readAllLines(Path.of("/proc/self/smaps")))
            if (line.startsWith("FilePmdMapped") || line.startsWith("ShmemPmdMapped"))
                huge += Long.parseLong(line.replaceAll("[^0-9]", ""));
        System.out.println("huge " + huge / 1024);
    }
}
"#;

/// The option of docs/OPERATIONS.md, for a pool that is mounted elsewhere.
fn documented(pool: &Path) -> String {
    const DOCUMENT: &str = include_str!("../../docs/OPERATIONS.md");
    let option = DOCUMENT.lines().find(|line| line.starts_with("-XX:")).expect("the option");
    option.replace("/mnt/h2", &pool.display().to_string())
}

fn java(heap: &Path, collector: &str) -> (tempfile::TempDir, Command) {
    let work = tempfile::tempdir().unwrap();
    let source = work.path().join("Churn.java");
    std::fs::write(&source, PROGRAM).unwrap();
    let mut command = Command::new("java");
    command.arg(format!("-XX:+Use{collector}GC")).arg(documented(heap));
    command.args([format!("-Xms{HEAP_MEBIBYTES}m"), format!("-Xmx{HEAP_MEBIBYTES}m")]);
    command.arg("-XX:+AlwaysPreTouch").arg(source);
    (work, command)
}

fn a_java_heap_is_mapped_huge_and_keeps_every_byte() {
    for collector in ["G1", "Parallel"] {
        let pool = Pool::small(80);
        let (_work, mut command) = java(&pool.path(), collector);
        let text = said(&mut command);
        let huge =
            text.lines().find_map(|line| line.strip_prefix("huge ")).expect("what is mapped huge");
        println!("java  {collector}: {huge} of {HEAP_MEBIBYTES} MiB are mapped huge");
        assert!(huge.parse::<u64>().unwrap() >= HEAP_MEBIBYTES * 9 / 10, "{huge}");
        pool.check();
        pool.unmount();
    }
}

fn a_java_heap_that_does_not_fit_is_refused_by_java() {
    let pool = Pool::small(HEAP_MEBIBYTES * (1 << 20) / FOLIO - 1);
    let (_work, mut command) = java(&pool.path(), "G1");
    let (output, text) = outcome(&mut command);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(
        text.contains("Error in mapping Java heap at the given filesystem directory. error(28)"),
        "{text}"
    );
    println!("java  a full pool: {}", text.lines().last().unwrap_or_default());
    pool.check();
    pool.unmount();
}
