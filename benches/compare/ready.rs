//! New files whose memory is cleared ahead of use (`clear=ahead`), beside files whose memory is
//! cleared when they take it.
//!
//! Ours has memory for four files, and the others for one. In each round, one side at a time has
//! memory, and touches all of it before the measurement (see `allocation`). Then a first file
//! teaches the size, and the measurement begins when nothing more is to be cleared. Nothing is
//! free: a row has the processor time of a file's whole life, with that of the daemon until the
//! next file is ready.

use super::allocation::{FOLIO, lengthen, touch};
use super::limits;
use super::sides::{GIB, Kind, Side, map};
use super::table::Samples;
use super::{Plan, Table, microseconds, milliseconds};
use hugetlb2fs::attributes::Counter;
use hugetlb2fs::units::PageSize;
use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;

/// The limit of a program's start.
const START: Duration = Duration::from_secs(120);

/// Each look takes processor time, which a row counts.
const BETWEEN_LOOKS: Duration = Duration::from_millis(50);

/// A state of the pool, or another filesystem.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    /// Memory for the whole file is ready.
    Ready,
    /// Memory for half of it is.
    HalfReady,
    /// A file of the size has just been removed; others are ready.
    AfterRemoval,
    /// Memory is cleared when the file takes it.
    OnDemand,
    Hugetlbfs,
    HugetlbfsByFallocate,
    Tmpfs,
}

impl Way {
    const ALL: [Self; 7] = [
        Self::Ready,
        Self::HalfReady,
        Self::AfterRemoval,
        Self::OnDemand,
        Self::Hugetlbfs,
        Self::HugetlbfsByFallocate,
        Self::Tmpfs,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Ready => "hugetlb2, ready",
            Self::HalfReady => "hugetlb2, half ready",
            Self::AfterRemoval => "hugetlb2, after a removal",
            Self::OnDemand => "hugetlb2, on demand",
            Self::Hugetlbfs => "hugetlbfs 2M, by touch",
            Self::HugetlbfsByFallocate => "hugetlbfs 2M, by fallocate",
            Self::Tmpfs => "tmpfs huge",
        }
    }

    fn is_ours(self) -> bool {
        !matches!(self, Self::Hugetlbfs | Self::HugetlbfsByFallocate | Self::Tmpfs)
    }

    /// The memory that a side has for a file, or for many, of so many bytes in all.
    fn memory(self, bytes: u64) -> u64 {
        if self.is_ours() { 4 * bytes } else { bytes }
    }

    fn mount(self, plan: &Plan, bytes: u64, page: PageSize) -> Result<Side, String> {
        let bytes = self.memory(bytes);
        let option = format!("pagesize={}", page.bytes());
        match self {
            Self::Ready | Self::HalfReady | Self::AfterRemoval => {
                Side::ours(plan, bytes, &format!("{option},clear=ahead,cpu=100%"))
            }
            Self::OnDemand => Side::ours(plan, bytes, &option),
            Self::Hugetlbfs | Self::HugetlbfsByFallocate => Kind::Huge.mount(plan, bytes),
            Self::Tmpfs => Kind::TmpfsHuge.mount(plan, bytes),
        }
    }

    fn size(self, file: &File, bytes: u64) {
        lengthen(file, bytes, self == Self::HugetlbfsByFallocate);
    }
}

/// Times in milliseconds.
struct Times {
    sized: f64,
    /// Sized, and every subpage touched.
    touched: f64,
    /// The longest first touch of a folio.
    worst: f64,
    /// The processor time of a file's life.
    processor: f64,
}

/// Measures the rows of this module.
pub fn measure(plan: &Plan, table: &mut Table) {
    files_of(plan, 64 * MIB, plan.at_most(15), table);
    small_files(plan, table);
    if plan.short {
        return table.skip("a new file of 4 GiB", "a short run takes less memory");
    }
    files_of(plan, 4 * GIB, 5, table);
    starts(plan, 4 * GIB, 5, table);
}

/// Measures in turn, as long as a way can be.
fn in_rounds<T>(
    rounds: usize,
    what: &str,
    table: &mut Table,
    mut once: impl FnMut(Way) -> Result<T, String>,
) -> Vec<(Way, Vec<T>)> {
    let mut ways: Vec<(Way, Vec<T>)> = Way::ALL.map(|way| (way, Vec::new())).into();
    for _ in 0..rounds {
        ways.retain_mut(|(way, results)| match once(*way) {
            Ok(result) => {
                results.push(result);
                true
            }
            Err(why) => {
                table.skip(&format!("{what}, {}", way.name()), &why);
                false
            }
        });
    }
    ways
}

fn row<T>(ways: &[(Way, Vec<T>)], part: fn(&T) -> f64) -> Vec<Samples> {
    ways.iter()
        .map(|(way, results)| (way.name().to_owned(), results.iter().map(part).collect()))
        .collect()
}

// ---- files --------------------------------------------------------------------------------------

fn files_of(plan: &Plan, bytes: u64, rounds: usize, table: &mut Table) {
    let what = format!("a new file of {} MiB, {rounds} rounds", bytes / MIB);
    let ways = in_rounds(rounds, &what, table, |way| once(plan, way, bytes));
    table.compare(&format!("{what}: sized"), "ms", row(&ways, |times| times.sized));
    table.compare(&format!("{what}: sized and touched"), "ms", row(&ways, |times| times.touched));
    table.compare(&format!("{what}: worst touch"), "ms", row(&ways, |times| times.worst));
    let life = "processor time of its life, with the daemon's until the next is ready";
    table.compare(&format!("{what}: {life}"), "ms", row(&ways, |times| times.processor));
}

fn once(plan: &Plan, way: Way, bytes: u64) -> Result<Times, String> {
    let page = if bytes < GIB { PageSize::Huge } else { PageSize::Gigantic };
    let side = way.mount(plan, bytes, page)?;
    touch_all_memory(&side, way.memory(bytes));
    let taught = if way == Way::HalfReady { bytes / 2 } else { bytes };
    live(&side, way, taught, |_| ());
    wait_until_ready(&side, way);
    if way == Way::AfterRemoval {
        live(&side, way, bytes, |file| _ = touch(&map(file, bytes), bytes));
    }
    let before = processor_time(&side, way);
    let mut times = Times { sized: 0.0, touched: 0.0, worst: 0.0, processor: 0.0 };
    times.sized = live(&side, way, bytes, |file| {
        let mapping = map(file, bytes);
        times.touched = milliseconds(|| times.worst = touch(&mapping, bytes));
    });
    times.touched += times.sized;
    wait_until_ready(&side, way);
    times.processor = processor_time(&side, way) - before;
    Ok(times)
}

/// On a virtual machine the host backs memory at the first touch.
fn touch_all_memory(side: &Side, bytes: u64) {
    let file = side.file("all");
    file.set_len(bytes).expect("ftruncate");
    touch(&map(&file, bytes), bytes);
    fs::remove_file(side.mount_point.join("all")).expect("unlink");
}

/// Makes a file, sizes it, uses it and removes it. Returns the milliseconds until it had its size.
fn live(side: &Side, way: Way, bytes: u64, use_it: impl FnOnce(&File)) -> f64 {
    let mut file = None;
    let sized = milliseconds(|| way.size(file.insert(side.file("file")), bytes));
    use_it(file.as_ref().expect("it is made"));
    fs::remove_file(side.mount_point.join("file")).expect("unlink");
    sized
}

/// Waits until the pages of removed files are back, and nothing more is to be cleared.
fn wait_until_ready(side: &Side, way: Way) {
    if way.is_ours() {
        let is_busy = || side.counter(Counter::PagesUsed) + side.counter(Counter::Clearing) > 0;
        let limit = Instant::now() + START;
        while is_busy() {
            assert!(Instant::now() < limit, "memory does not get ready");
            std::thread::sleep(BETWEEN_LOOKS);
        }
    }
}

/// The processor time of this process and of the daemon, in milliseconds.
fn processor_time(side: &Side, way: Way) -> f64 {
    let own = time_in("/proc/self/schedstat");
    if !way.is_ours() {
        return own;
    }
    let threads = format!("/proc/{}/task", side.process(Counter::WorkerPid).as_raw_nonzero());
    let threads = fs::read_dir(threads).expect("the worker's threads");
    let time = |thread: std::io::Result<fs::DirEntry>| {
        time_in(thread.expect("a thread").path().join("schedstat"))
    };
    own + threads.map(time).sum::<f64>()
}

/// The milliseconds on a processor (Documentation/scheduler/sched-stats.rst).
fn time_in(schedstat: impl AsRef<Path>) -> f64 {
    let text = fs::read_to_string(schedstat).unwrap_or_default(); // a thread may have ended
    let nanoseconds = text.split(' ').next().and_then(|word| word.parse::<f64>().ok());
    nanoseconds.unwrap_or(0.0) / 1e6
}

// ---- many files ---------------------------------------------------------------------------------

/// Makes many files of a page each, and touches each.
fn small_files(plan: &Plan, table: &mut Table) {
    let files = if plan.short { 100 } else { 1000 };
    let rounds = plan.at_most(5);
    let what = format!("{files} new files of 2 MiB, {rounds} rounds");
    let ways = in_rounds(rounds, &what, table, |way| {
        if matches!(way, Way::HalfReady | Way::AfterRemoval) {
            return Err("the same as of a pool that is ready".to_owned());
        }
        let side = way.mount(plan, files * FOLIO, PageSize::Huge)?;
        touch_all_memory(&side, way.memory(files * FOLIO));
        live(&side, way, FOLIO, |_| ());
        wait_until_ready(&side, way);
        let make = |n: u64| {
            let file = side.file(&n.to_string());
            way.size(&file, FOLIO);
            touch(&map(&file, FOLIO), FOLIO);
        };
        Ok(microseconds(|| (0..files).for_each(make)) / files as f64)
    });
    table.compare(&format!("{what}: each, sized and touched"), "us", row(&ways, |time| *time));
}

// ---- programs -----------------------------------------------------------------------------------

/// A program that is started, and the arguments that have it take memory of a file in a directory.
type Starter = fn(&Path, u64) -> Command;

fn starts(plan: &Plan, bytes: u64, rounds: usize, table: &mut Table) {
    let starters: [(&str, Starter); 2] = [("QEMU", qemu), ("Java", java)];
    for (name, starter) in starters {
        let gib = bytes / GIB;
        let what = format!("{name} with {gib} GiB, all touched before it runs, {rounds} rounds");
        let ways = in_rounds(rounds, &what, table, |way| {
            if matches!(way, Way::HalfReady | Way::AfterRemoval | Way::HugetlbfsByFallocate) {
                return Err("the program chooses how it sizes its file".to_owned());
            }
            let side = way.mount(plan, bytes, PageSize::Gigantic)?;
            touch_all_memory(&side, way.memory(bytes));
            let mut started = Ok(());
            let mut start = || {
                let mut program = starter(&side.mount_point, bytes);
                let time = milliseconds(|| started = start(&mut program));
                let _ = fs::remove_file(side.mount_point.join(MEMORY));
                started.clone().map(|()| time)
            };
            start()?;
            wait_until_ready(&side, way);
            start()
        });
        table.compare(&format!("{what}: start and end"), "ms", row(&ways, |time| *time));
    }
}

fn start(program: &mut Command) -> Result<(), String> {
    program.stdin(Stdio::null());
    let output = limits::output(START, program).map_err(|error| error.to_string())?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    // QEMU ends with 1 where the machine has written 0 to its exit port.
    matches!(output.status.code(), Some(0 | 1)).then_some(()).ok_or(said)
}

/// The file that QEMU makes and leaves.
const MEMORY: &str = "memory";

/// A virtual machine whose first instruction ends it.
fn qemu(directory: &Path, bytes: u64) -> Command {
    const EXIT_PORT: [u8; 4] = [0xb0, 0x00, 0xe6, 0xf4]; // mov al, 0; out 0xf4, al
    const RESET_VECTOR: usize = 0xfff0;
    let memory = directory.join(MEMORY);
    let firmware = directory.with_extension("firmware");
    let mut code = vec![0xf4; 64 << 10]; // hlt
    code[RESET_VECTOR..RESET_VECTOR + EXIT_PORT.len()].copy_from_slice(&EXIT_PORT);
    fs::write(&firmware, code).expect("a file for the firmware");
    let memory = format!(
        "memory-backend-file,id=ram,mem-path={},size={bytes},share=on,prealloc=on,align=2M",
        memory.display()
    );
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-nodefaults", "-display", "none", "-accel", "tcg", "-object", &memory]);
    command.args(["-machine", "pc,memory-backend=ram", "-device", "isa-debug-exit,iobase=0xf4"]);
    command.arg("-m").arg(format!("{}M", bytes / MIB)).arg("-bios").arg(firmware);
    command
}

fn java(directory: &Path, bytes: u64) -> Command {
    let heap = bytes / MIB;
    let mut command = Command::new("java");
    command.args([format!("-Xms{heap}m"), format!("-Xmx{heap}m"), "-XX:+AlwaysPreTouch".into()]);
    command.arg(format!("-XX:AllocateHeapAt={}", directory.display())).arg("-version");
    command
}
