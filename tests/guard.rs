//! Soft quarantines as memory errors of one program (`hugetlb2 guard`). Without
//! CONFIG_MEMORY_FAILURE the kernel reports a touch of a marker as one of a hole: the lab runs
//! these tests on a kernel that has it.

mod support;

use hugetlb2fs::guard::{self, Area};
use hugetlb2fs::sys::markers::is_marker_in;
use hugetlb2fs::sys::memory_failures;
use hugetlb2fs::units::Range;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use support::sys::{Mapping, Sharing};
use support::{
    COLLAPSE, FOLIO, POISON, Pool, QUARANTINE, REPAIR, SUBPAGE, Toucher, get, hugetlb2,
    kill_worker, limits, poison, run, set, status_and_error,
};

const SIZE: u64 = 3 * FOLIO;

/// One subpage of each folio.
const LOST: [u64; 3] = [5 * SUBPAGE, FOLIO + 300 * SUBPAGE, 2 * FOLIO + SUBPAGE];

/// A pool, and a file of sevens that any user can write.
fn pool_with_file() -> (Pool, PathBuf) {
    let pool = Pool::small(8);
    let file = pool.join("file");
    fs::write(&file, vec![7; SIZE as usize]).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o666)).unwrap();
    (pool, file)
}

/// A guarded process that maps all of `file`.
fn guarded(file: &Path) -> Toucher {
    let mut program = Toucher::start_by(Toucher::guarded());
    program.map(file, 0, SIZE, "shared rw");
    program
}

/// The answer for a touch of a marker at `offset`: BUS_MCEERR_AR with the bits of 4 KiB, where the
/// kernel has memory errors.
fn memory_error(offset: u64) -> String {
    match memory_failures() {
        Some(_) => format!("sigbus {offset} 4 12"),
        None => format!("sigbus {offset} 2 0"),
    }
}

fn hole(offset: u64) -> String {
    format!("sigbus {offset} 2 0")
}

/// The address of the byte of `file` at `offset` in the first mapping that a process has of it.
fn address(process: u32, file: &Path, offset: u64) -> u64 {
    let (inode, subpage) = (fs::metadata(file).unwrap().ino(), Range::at(offset, SUBPAGE));
    let maps = fs::read_to_string(format!("/proc/{process}/maps")).unwrap();
    let mut areas = maps.lines().filter_map(|line| Area::parse(line.as_bytes()));
    let area = areas.find(|area| area.inode == inode && area.bytes().covers(subpage));
    area.expect("it is mapped").addresses_of(subpage).start
}

fn is_marked_at(process: u32, address: u64) -> bool {
    let pagemap = File::open(format!("/proc/{process}/pagemap")).unwrap();
    is_marker_in(&pagemap, address).unwrap()
}

fn is_marked(process: u32, file: &Path, offset: u64) -> bool {
    is_marked_at(process, address(process, file, offset))
}

fn wait_for_marker(program: &Toucher, file: &Path, offset: u64) {
    limits::until(limits::ANSWER, "a marker", || is_marked(program.pid(), file, offset));
}

fn wait_for_no_marker(program: &Toucher, file: &Path, offset: u64) {
    limits::until(limits::ANSWER, "a marker's end", || !is_marked(program.pid(), file, offset));
}

#[test]
fn a_quarantine_is_a_memory_error_of_a_guarded_program() {
    let (pool, file) = pool_with_file();
    poison(&file, LOST[0], SUBPAGE).unwrap();
    let mut program = guarded(&file);
    assert_eq!(program.ask(&format!("report {}", LOST[0])), memory_error(LOST[0]), "at once");
    // One that comes later, and one after the death of the worker that the guard polled.
    poison(&file, LOST[1], SUBPAGE).unwrap();
    wait_for_marker(&program, &file, LOST[1]);
    kill_worker(&pool);
    poison(&file, LOST[2], SUBPAGE).unwrap();
    wait_for_marker(&program, &file, LOST[2]);
    assert_eq!(program.walk(), LOST, "and all else is there");
    for lost in LOST {
        assert_eq!(program.ask(&format!("report {lost}")), memory_error(lost));
        assert_eq!(program.load(lost + SUBPAGE), Some(7));
        assert_eq!(program.load(lost - 1), Some(7));
    }
    // A second mapping has its markers, too, and another program has none.
    let mut other = Toucher::mapping(&file, SIZE);
    assert_eq!(other.ask(&format!("report {}", LOST[1])), hole(LOST[1]));
    drop((program, other));
    pool.check();
    pool.unmount();
}

#[test]
fn a_guarded_program_reads_what_is_repaired() {
    let (pool, file) = pool_with_file();
    LOST.iter().for_each(|lost| poison(&file, *lost, SUBPAGE).unwrap());
    let mut program = guarded(&file);
    assert_eq!(program.walk(), LOST);
    // As long as another subpage of the folio is lost, the daemon does not collapse the folio,
    // which would be the end of its markers, too.
    for round in 1..4 {
        let neighbour = LOST[0] + round * SUBPAGE;
        poison(&file, neighbour, SUBPAGE).unwrap();
        wait_for_marker(&program, &file, neighbour);
        set(&file, REPAIR, format!("salvage {neighbour} {SUBPAGE}")).unwrap();
        wait_for_no_marker(&program, &file, neighbour);
        assert_eq!(program.load(neighbour), Some(7));
        assert_eq!(program.walk(), LOST);
    }
    set(&file, REPAIR, format!("salvage {} {SUBPAGE}", LOST[0])).unwrap();
    wait_for_no_marker(&program, &file, LOST[0]);
    assert_eq!(program.load(LOST[0]), Some(7));
    assert_eq!(program.walk(), LOST[1..], "the others stay");
    assert_eq!(program.ask(&format!("report {}", LOST[1])), memory_error(LOST[1]));
    set(&file, REPAIR, "zero all").unwrap();
    LOST.iter().for_each(|lost| wait_for_no_marker(&program, &file, *lost));
    assert_eq!(program.walk(), []);
    assert_eq!(program.load(LOST[2]), Some(0));
    set(&file, COLLAPSE, "all").unwrap();
    assert_eq!(program.walk(), []);
    assert_eq!(program.huge(), 3, "nothing is left of the markers");
    drop(program);
    pool.unmount();
}

/// A part of the mapping is replaced by anonymous memory: a marker that is there goes with the
/// mapping, a quarantine that comes later is none of that memory, and a repair takes nothing away.
#[test]
fn a_marker_hits_no_other_mapping() {
    let (pool, file) = pool_with_file();
    poison(&file, LOST[0], SUBPAGE).unwrap();
    let mut program = guarded(&file);
    let places = [LOST[0], LOST[0] + 9 * SUBPAGE];
    let addresses = places.map(|place| address(program.pid(), &file, place));
    assert_eq!(program.ask(&format!("replace 0 {FOLIO}")), "ok");
    poison(&file, places[1], SUBPAGE).unwrap();
    poison(&file, LOST[1], SUBPAGE).unwrap();
    wait_for_marker(&program, &file, LOST[1]);
    for (place, address) in places.into_iter().zip(addresses) {
        assert!(!is_marked_at(program.pid(), address));
        assert_eq!(program.load(place), Some(0));
        assert!(program.store(place, 9));
    }
    set(&file, REPAIR, "salvage all").unwrap();
    wait_for_no_marker(&program, &file, LOST[1]);
    assert_eq!(places.map(|place| program.load(place)), [Some(9), Some(9)]);
    drop(program);
    pool.unmount();
}

#[test]
fn a_marker_outlives_madv_dontneed() {
    let (pool, file) = pool_with_file();
    poison(&file, LOST[0], SUBPAGE).unwrap();
    let mut program = guarded(&file);
    let advise = format!("advise 0 {SIZE} {}", libc::MADV_DONTNEED);
    assert_eq!(program.ask(&advise), "ok");
    assert!(is_marked(program.pid(), &file, LOST[0]), "on return");
    assert_eq!(program.walk(), [LOST[0]]);
    drop(program);
    pool.unmount();
}

/// The kernel's markers need no privilege here: userfaultfd(2) for user mode alone.
#[test]
fn any_user_can_guard_a_program() {
    const NOBODY: u32 = 65534;
    let (pool, file) = pool_with_file();
    poison(&file, LOST[0], SUBPAGE).unwrap();
    let mut command = Toucher::guarded();
    command.uid(NOBODY).gid(NOBODY);
    let mut program = Toucher::start_by(command);
    program.map(&file, 0, SIZE, "shared rw");
    poison(&file, LOST[1], SUBPAGE).unwrap();
    wait_for_marker(&program, &file, LOST[1]);
    for lost in &LOST[..2] {
        assert_eq!(program.ask(&format!("report {lost}")), memory_error(*lost));
    }
    assert_eq!(program.walk(), LOST[..2]);
    drop(program);
    pool.unmount();
}

/// A marker would hide a copy that the program has, and its end would take the copy away. And the
/// kernel sets none where memory cannot be made writable.
#[test]
fn private_and_read_only_mappings_have_holes_as_before() {
    let (pool, file) = pool_with_file();
    poison(&file, LOST[0], SUBPAGE).unwrap();
    for how in ["private rw", "shared ro"] {
        let mut program = Toucher::start_by(Toucher::guarded());
        program.map(&file, 0, SIZE, how);
        assert_eq!(program.ask(&format!("report {}", LOST[0])), hole(LOST[0]), "{how}");
    }
    pool.unmount();
}

#[test]
fn a_guarded_program_leaves_the_alarm_to_others() {
    const MOMENT: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };
    let (pool, file) = pool_with_file();
    let program = guarded(&file);
    poison(&file, LOST[0], SUBPAGE).unwrap();
    wait_for_marker(&program, &file, LOST[0]);
    let open = File::options().read(true).write(true).open(&file).unwrap();
    let is_alarmed = || {
        let mut fds = [PollFd::new(&open, PollFlags::PRI)];
        poll(&mut fds, Some(&MOMENT)).unwrap() == 1
    };
    assert!(is_alarmed());
    assert_eq!(get(&file, QUARANTINE).unwrap(), get(&file, POISON).unwrap());
    assert!(!is_alarmed(), "the list was read");
    set(&file, REPAIR, "zero all").unwrap();
    assert_eq!(get(&file, QUARANTINE).unwrap(), "");
    drop((program, open));
    pool.unmount();
}

/// The guard has a descriptor of its own of each file that is mapped, and closes it soon after the
/// file is mapped no more: then the memory of an unlinked file is free.
#[test]
fn a_guard_lets_go_of_a_file_that_is_unmapped() {
    let (pool, file) = pool_with_file();
    let mut program = guarded(&file);
    assert_eq!(program.ask("unmap"), "ok");
    fs::remove_file(&file).unwrap();
    pool.wait_for_free_pages(8);
    let other = pool.join("other");
    fs::write(&other, vec![7; SIZE as usize]).unwrap();
    poison(&other, LOST[1], SUBPAGE).unwrap();
    program.map(&other, 0, SIZE, "shared rw");
    assert_eq!(program.ask(&format!("report {}", LOST[1])), memory_error(LOST[1]));
    drop(program);
    pool.unmount();
}

#[test]
fn a_program_in_rust_guards_itself() {
    let (pool, file) = pool_with_file();
    poison(&file, LOST[0], SUBPAGE).unwrap();
    let open = File::options().read(true).write(true).open(&file).unwrap();
    let mapping = Mapping::new(&open, Range::new(0, SIZE), Sharing::Shared, true).unwrap();
    guard::watch(open.as_fd()).unwrap();
    let hit = mapping.load(LOST[0]).unwrap_err();
    assert_eq!(format!("sigbus {} {} {}", LOST[0], hit.code, hit.lsb), memory_error(LOST[0]));
    let marked_at = mapping.address() as u64 + LOST[1];
    poison(&file, LOST[1], SUBPAGE).unwrap();
    let process = std::process::id();
    limits::until(limits::ANSWER, "a marker", || is_marked_at(process, marked_at));
    set(&file, REPAIR, "salvage all").unwrap();
    limits::until(limits::ANSWER, "a marker's end", || !is_marked_at(process, marked_at));
    assert_eq!(mapping.walk(), []);
    guard::changing(|| drop(mapping));
    let elsewhere = tempfile::tempfile().unwrap();
    assert!(guard::watch(elsewhere.as_fd()).is_err(), "no file of a pool");
    drop(open);
    pool.unmount();
}

/// Threads map the file, put anonymous memory in the place of a part, use it, and unmap all, while
/// subpages everywhere are quarantined and repaired.
#[test]
fn markers_and_changes_of_mappings_do_not_meet() {
    const ROUNDS: u64 = 150;
    let (pool, file) = pool_with_file();
    let open = File::options().read(true).write(true).open(&file).unwrap();
    let is_over = AtomicBool::new(false);
    let change = |seed: u8| {
        let mut changes = 0;
        while !is_over.load(Ordering::Relaxed) {
            let mapping = Mapping::new(&open, Range::new(0, SIZE), Sharing::Shared, true).unwrap();
            guard::watch(open.as_fd()).unwrap();
            let mine = Range::new(FOLIO, 2 * FOLIO);
            guard::changing(|| mapping.replace(mine)).unwrap();
            let places = || mine.steps(SUBPAGE).map(|subpage| subpage.start);
            assert!(places().all(|place| mapping.store(place, seed).is_ok()));
            let wrong = mapping.walk().into_iter().find(|hit| mine.covers(hit.subpage.range()));
            assert_eq!(wrong, None, "a marker hits other memory");
            assert!(places().all(|place| mapping.load(place) == Ok(seed)), "other memory is gone");
            guard::changing(|| drop(mapping));
            changes += 1;
        }
        changes
    };
    let changes: u64 = std::thread::scope(|scope| {
        let threads = [1, 2, 3].map(|seed| scope.spawn(move || change(seed)));
        for round in 0..ROUNDS {
            poison(&file, (round * 101) % (SIZE / SUBPAGE) * SUBPAGE, SUBPAGE).unwrap();
            if round % 8 == 7 {
                set(&file, REPAIR, "salvage all").unwrap();
            }
        }
        is_over.store(true, Ordering::Relaxed);
        threads.map(|thread| thread.join().unwrap()).iter().sum()
    });
    println!("{changes} changes of mappings beside {ROUNDS} quarantines");
    assert!(changes > 0);
    drop(open);
    pool.check();
    pool.unmount();
}

#[test]
fn a_guard_that_cannot_be_says_why() {
    let refused = |command: &mut Command, why: &str| {
        let (status, said) = status_and_error(command.stdin(Stdio::null()));
        assert!(status == 1 && said.contains(why), "{status}: {said}");
    };
    let guard = |program: &Path| {
        let mut command = support::guard();
        command.arg(program);
        command
    };
    refused(&mut guard(Path::new("/no/such/program")), "No such file");
    let work = tempfile::tempdir().unwrap();
    let program = work.path().join("program");
    let mut header = [0; 128]; // a program of one PT_LOAD (elf(5))
    header[..5].copy_from_slice(b"\x7fELF\x02");
    (header[32], header[54], header[56], header[64]) = (64, 56, 1, 1);
    fs::write(&program, header).unwrap();
    refused(&mut guard(&program), "a static program cannot be guarded");
    let alone = work.path().join("hugetlb2");
    fs::copy(hugetlb2().get_program(), &alone).unwrap();
    refused(Command::new(&alone).args(["guard", "true"]), "the library libhugetlb2_guard.so is");
}

/// The exit status is the program's, and its environment has the other libraries still.
#[test]
fn a_guarded_program_is_as_without_a_guard() {
    let mut shell = support::guard();
    shell.args(["sh", "-c", "echo \"${LD_PRELOAD##*:}\"; exit 7"]).env("LD_PRELOAD", "/dev/null");
    let output = limits::output(limits::PROGRAM, &mut shell).unwrap();
    assert_eq!(output.status.code(), Some(7), "{}", support::text(&output.stderr));
    assert_eq!(support::text(&output.stdout), "/dev/null\n");
    assert_eq!(run(support::guard().args(["echo", "--json"])), "--json\n");
}
