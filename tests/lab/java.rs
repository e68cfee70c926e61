//! Java virtual machines with a heap on a pool, of which they give memory back.

use crate::support::{FOLIO, Pool, end, limits};
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

pub const TESTS: &[(&str, fn())] = &[
    ("zgc_gives_memory_back_and_takes_it_again", zgc_gives_memory_back_and_takes_it_again),
    ("zgc_that_finds_the_pool_full_throws_an_error", zgc_that_finds_the_pool_full_throws_an_error),
    ("g1_keeps_the_memory_of_its_largest_heap", g1_keeps_the_memory_of_its_largest_heap),
];

/// The largest heap, in pages of the pool.
const LARGEST: u64 = (128 << 20) / FOLIO;

/// The pages of the arrays that the program fills.
const ARRAYS: u64 = (64 << 20) / FOLIO;

/// For each line of its input, fills arrays and looks at each byte, or forgets them all.
const PROGRAM: &str = r#"
import java.util.*;

public class Breathe {
    public static void main(String[] arguments) {
        Scanner lines = new Scanner(System.in);
        List<byte[]> live = new ArrayList<>();
        for (int round = 1; lines.hasNextLine(); round++) {
            boolean fills = lines.nextLine().equals("fill");
            live.clear();
            for (int i = 0; fills && i < 1024; i++) {
                live.add(new byte[1 << 16]);
                Arrays.fill(live.get(i), (byte) (i + round));
            }
            for (int i = 0; i < live.size(); i++)
                for (byte found : live.get(i))
                    if (found != (byte) (i + round)) throw new Error("a wrong byte");
            System.gc();
            System.out.println("done");
        }
    }
}
"#;

/// A Java virtual machine that runs the program. The drop ends it.
struct Java {
    process: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    _work: tempfile::TempDir,
}

impl Java {
    fn start(pool: &Pool, options: &[&str]) -> Self {
        let work = tempfile::tempdir().unwrap();
        let source = work.path().join("Breathe.java");
        std::fs::write(&source, PROGRAM).unwrap();
        let mut command = Command::new("java");
        command.args(options).arg(format!("-XX:AllocateHeapAt={}", pool.path().display()));
        command.args(["-Xms16m".to_owned(), format!("-Xmx{}", LARGEST * FOLIO)]).arg(source);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = command.spawn().expect("java (Debian's default-jdk-headless)");
        let input = process.stdin.take().expect("a pipe");
        let output = BufReader::new(process.stdout.take().expect("a pipe"));
        Self { process, input, output, _work: work }
    }

    /// Has the program fill or forget its arrays, and waits until it has.
    fn does(&mut self, what: &str) {
        writeln!(self.input, "{what}").expect("it runs");
        limits::readable(limits::ANSWER, "the Java program", self.output.get_ref());
        let mut line = String::new();
        self.output.read_line(&mut line).expect("it speaks");
        assert_eq!(line, "done\n");
    }
}

impl Drop for Java {
    fn drop(&mut self) {
        end(&mut self.process, "java");
    }
}

/// ZGC punches memory that it has not used for a second, and allocates it again (fallocate(2))
/// before the program touches it.
fn zgc_gives_memory_back_and_takes_it_again() {
    for mode in ["", ",punch=keep"] {
        let pool = Pool::mount(&format!("pagesize=2M,size={}{mode}", LARGEST * FOLIO));
        let mut java = Java::start(&pool, &["-XX:+UseZGC", "-XX:ZUncommitDelay=1"]);
        let given_back = || match mode {
            "" => pool.free_pages(),
            _ => pool.counter("punched_bytes") / FOLIO,
        };
        for _ in 0..2 {
            java.does("fill");
            let before = given_back();
            assert!(before <= LARGEST - ARRAYS, "{before} pages, and the arrays are in use");
            java.does("forget");
            limits::until(limits::ANSWER, "ZGC to give memory back", || {
                given_back() >= before + ARRAYS / 2
            });
            println!("java  ZGC{mode}: {before} pages, then {} not in use", given_back());
        }
        java.does("fill");
        pool.check();
        drop(java);
        pool.wait_for_free_pages(LARGEST);
        pool.unmount();
    }
}

/// Another file takes the memory that ZGC has given back.
fn zgc_that_finds_the_pool_full_throws_an_error() {
    let pool = Pool::small(LARGEST);
    let mut java = Java::start(&pool, &["-XX:+UseZGC", "-XX:ZUncommitDelay=1"]);
    java.does("fill");
    java.does("forget");
    limits::until(limits::ANSWER, "ZGC to give memory back", || pool.free_pages() >= ARRAYS / 2);
    let other = File::create(pool.join("other")).unwrap();
    limits::until(limits::ANSWER, "the other file to have all memory", || {
        let pages = pool.free_pages() + other.metadata().unwrap().len() / FOLIO;
        other.set_len(pages * FOLIO).unwrap();
        pool.free_pages() == 0
    });
    writeln!(java.input, "fill").expect("it runs");
    let mut said = String::new();
    limits::within(limits::ANSWER, "the end of java", || java.output.read_to_string(&mut said))
        .unwrap();
    let why = "Failed to commit memory (No space left on device)";
    assert!(said.contains(why), "{said}");
    assert_eq!(limits::exit(limits::ANSWER, "java", &mut java.process).code(), Some(1));
    pool.check();
    drop((java, other));
    std::fs::remove_file(pool.join("other")).unwrap();
    pool.wait_for_free_pages(LARGEST);
    pool.unmount();
}

/// The memory of a heap in a file is the collector's from the beginning, and stays so.
fn g1_keeps_the_memory_of_its_largest_heap() {
    let pool = Pool::small(LARGEST + 1);
    let options = ["-XX:+UseG1GC", "-XX:MinHeapFreeRatio=5", "-XX:MaxHeapFreeRatio=10"];
    let mut java = Java::start(&pool, &options);
    for what in ["fill", "forget"] {
        java.does(what);
        assert_eq!(pool.free_pages(), 1, "after {what}");
    }
    pool.check();
    drop(java);
    pool.wait_for_free_pages(LARGEST + 1);
    pool.unmount();
}
