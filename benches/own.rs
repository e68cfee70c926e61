//! The cost of our own code without FUSE around it. The only comparison is an earlier run of this
//! bench.
//!
//! `cargo bench --bench own` takes some minutes, root, and 1.2 GiB of memory; `-- --test` runs
//! everything once. A slow preparation (100,000 real quarantines) is made once. A run that measures
//! nothing prepares less.

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput};
use hugetlb2fs::index::{DirEntry, Index, Name, New};
use hugetlb2fs::options::Options;
use hugetlb2fs::placement::Resolved;
use hugetlb2fs::pool::{Holding, Pool, Sizes};
use hugetlb2fs::quarantine::{Kind, coalesce, format, parse_poison};
use hugetlb2fs::sealed::{Reach, Sealed};
use hugetlb2fs::sys::identity::Caller;
use hugetlb2fs::sys::namespace::enter_private_root;
use hugetlb2fs::units::{FOLIO_SIZE, Folio, InodeId, PageSize, Range, Subpage};
use rustix::fs::{CWD, RenameFlags};
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};
use std::ffi::{OsStr, OsString};
use std::hint::black_box;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

const MANY: u64 = 100_000;
/// The number of quarantines, in place of [`MANY`], in a run that measures nothing.
const SOME: u64 = 1_000;
const GIB: u64 = 1 << 30;
const ROOT: Caller = Caller { uid: 0, gid: 0, umask: 0 };

fn main() {
    let results = results();
    enter_private_root(&["index", "criterion"]).expect("a mount namespace of its own; needs root");
    move_mount(&results, "", CWD, "/criterion", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .expect("move_mount");
    let criterion = Criterion::default().output_directory(Path::new("/criterion")).without_plots();
    let mut criterion = criterion.configure_from_args();
    quarantine_lookups(&mut criterion);
    ranges(&mut criterion);
    moves(&mut criterion);
    attributes(&mut criterion);
    index(&mut criterion);
    criterion.final_summary();
}

/// Opens the directory with the figures of earlier runs. This process will leave all its mounts
/// behind, as the daemon does.
fn results() -> OwnedFd {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("../criterion");
    std::fs::create_dir_all(&directory).expect("a directory");
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    open_tree(CWD, &directory, flags).expect("open_tree; needs root")
}

/// True if this run measures nothing: criterion's `--test`, or a run by `cargo test`.
fn only_tested() -> bool {
    let arguments: Vec<String> = std::env::args().collect();
    let has = |name: &str| arguments.iter().any(|argument| argument == name);
    has("--test") || !has("--bench")
}

/// Runs `untimed` and then `timed`, `n` times. Returns the time of all `timed` together.
fn time<S>(
    n: u64,
    state: &mut S,
    mut untimed: impl FnMut(&mut S),
    mut timed: impl FnMut(&mut S),
) -> Duration {
    let mut total = Duration::ZERO;
    for _ in 0..n {
        untimed(state);
        let clock = Instant::now();
        timed(state);
        total += clock.elapsed();
    }
    total
}

// ---- quarantine ---------------------------------------------------------------------------------

fn quarantine_lookups(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("quarantine");
    let mut sealed = Sealed::create(Reach::Programs, None).expect("a sealed file");
    sealed.take(Range::new(0, GIB), GIB).expect("a gigabyte");
    let most = if only_tested() { SOME } else { MANY };
    let mut quarantined = 0;
    for records in [0, 10, most] {
        // Every second subpage, so that no two are neighbours.
        (quarantined..records).for_each(|n| {
            sealed.quarantine(Subpage(2 * n + 1).range(), 1_700_000_000).expect("a quarantine")
        });
        quarantined = records;
        let mut subpages = (0..).map(|n: u64| Subpage(n * 40_503 % (GIB >> 12)));
        group.bench_function(BenchmarkId::new("is_lost", records), |bencher| {
            bencher.iter(|| sealed.is_lost(black_box(subpages.next().expect("it has no end"))));
        });
        let mut folios = (0..).map(|n: u64| Folio(n * 37 % (GIB / FOLIO_SIZE)).range());
        group.bench_function(BenchmarkId::new("lost_in a folio", records), |bencher| {
            bencher
                .iter(|| sealed.lost_in(black_box(folios.next().expect("it has no end"))).count());
        });
        group.bench_function(BenchmarkId::new("lost_in the file, first", records), |bencher| {
            bencher.iter(|| sealed.lost_in(black_box(Range::new(0, GIB))).next());
        });
    }
    group.finish();
}

fn ranges(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("ranges");
    group.throughput(Throughput::Elements(MANY));
    // In runs of three, because an error often hits neighbours, and each alone.
    let runs = || (0..MANY).map(|n| (Subpage(n + n / 3).range(), Kind::Soft, 1_700_000_000));
    let alone = || (0..MANY).map(|n| (Subpage(2 * n).range(), Kind::Soft, 1_700_000_000));
    group.bench_function("coalesce 100,000 in runs", |bencher| {
        bencher.iter(|| coalesce(runs()).len())
    });
    group.bench_function("coalesce 100,000 alone", |bencher| {
        bencher.iter(|| coalesce(alone()).len())
    });
    let joined = coalesce(alone());
    group.bench_function("format 100,000", |bencher| {
        bencher.iter(|| format(black_box(&joined)).len())
    });
    group.finish();
}

// ---- pool ---------------------------------------------------------------------------------------

fn moves(criterion: &mut Criterion) {
    const POOL: u64 = 128 << 20;
    let mut group = criterion.benchmark_group("pool");
    let pool =
        Pool::fill(PageSize::Huge, &Sizes::Anywhere(PageSize::Huge.pages_up(POOL)), |_| Ok(()))
            .expect("a pool");
    let mut holding = Holding::create(PageSize::Huge).expect("a file");
    for mebibytes in [2, 64] {
        let bytes = mebibytes << 20;
        let grow = |holding: &mut Holding| {
            let growth = holding
                .begin_growth(&pool, Range::new(0, bytes), bytes, &Resolved::default())
                .expect("pages");
            holding.complete(growth).expect("to grow");
        };
        let shrink = |holding: &mut Holding| {
            let shrinking = holding.begin_shrinking(&pool, 0).expect("no soft holes");
            holding.complete(shrinking).expect("to shrink");
        };
        group.throughput(Throughput::Bytes(bytes));
        group.bench_function(BenchmarkId::new("grow, MiB", mebibytes), |bencher| {
            bencher.iter_custom(|n| time(n, &mut holding, shrink, grow));
        });
        group.bench_function(BenchmarkId::new("shrink, MiB", mebibytes), |bencher| {
            bencher.iter_custom(|n| time(n, &mut holding, grow, shrink));
        });
    }
    group.finish();
}

// ---- attributes ---------------------------------------------------------------------------------

fn attributes(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("attributes");
    for lines in [1, 1_000u64] {
        let value: String =
            (0..lines).map(|n| format!("{:#x} 0x1000 soft 1700000000\n", n << 13)).collect();
        group.throughput(Throughput::Elements(lines));
        group.bench_function(BenchmarkId::new("parse poison, lines", lines), |bencher| {
            bencher
                .iter(|| parse_poison(black_box(value.as_bytes()), GIB).expect("it parses").len());
        });
    }
    group.finish();
}

// ---- index --------------------------------------------------------------------------------------

fn index(criterion: &mut Criterion) {
    const NAMES: u64 = 1_000;
    let index = Index::create(&Options::default()).expect("an index");
    let names: Vec<OsString> = (0..NAMES).map(|n| format!("name{n}").into()).collect();
    names.iter().for_each(|name| make(&index, name));
    let mut group = criterion.benchmark_group("index");
    group.bench_function("create, unlink and erase", |bencher| {
        bencher.iter(|| {
            make(&index, OsStr::new("new"));
            let orphan = index.unlink(InodeId::ROOT, OsStr::new("new")).expect("unlink");
            index.erase(orphan.expect("it was the last name")).expect("erase");
        });
    });
    let mut names = names.iter().cycle();
    group.bench_function("lookup among 1,000", |bencher| {
        let next = || names.next().expect("it has no end");
        bencher.iter_batched(next, |name| index.lookup(InodeId::ROOT, name), BatchSize::SmallInput);
    });
    make(&index, OsStr::new("a"));
    group.bench_function("rename there and back", |bencher| {
        bencher.iter(|| {
            ["a", "b", "a"].windows(2).for_each(|names| rename(&index, names[0], names[1]))
        });
    });
    let root = index.open_directory(InodeId::ROOT).expect("the root");
    group.throughput(Throughput::Elements(NAMES));
    group.bench_function("readdir of 1,000", |bencher| bencher.iter(|| count(&index, &root)));
    group.finish();
}

fn make(index: &Index, name: &OsStr) {
    const REGULAR: u32 = 0o100_644;
    index.make(InodeId::ROOT, name, New::Node(REGULAR, 0), ROOT).expect("a file");
}

fn rename(index: &Index, from: &str, to: &str) {
    let of = |name| Name { parent: InodeId::ROOT, name: OsStr::new(name) };
    index.rename(of(from), of(to), RenameFlags::empty()).expect("rename");
}

/// Reads the directory in several calls: each continues at the end of the one before. Returns the
/// number of entries.
fn count(index: &Index, directory: &OwnedFd) -> u64 {
    let (mut entries, mut next) = (0, 0);
    loop {
        let (before, from) = (entries, next);
        let take = |entry: DirEntry| {
            (entries, next) = (entries + 1, entry.next);
            true
        };
        index.read_directory(directory, from, take).expect("readdir");
        if entries == before {
            return entries;
        }
    }
}
