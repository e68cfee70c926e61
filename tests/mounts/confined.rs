//! A daemon on a machine that refuses what the daemon needs: system calls (seccomp(2)), threads and
//! processes (pids.max of cgroups(7)).

use crate::support::cgroup::Cgroup;
use crate::support::place::Place;
use crate::support::{
    FAIL, FOLIO, POISON, Pool, REPAIR, SUBPAGE, Toucher, Worker, get, limits, mount_hugetlb2_in,
    poison, set, status_and_error, text,
};
use hugetlb2fs::sys::seccomp::NEEDED;
use rustix::io::Errno;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, apply_filter,
};
use std::fs;
use std::process::Stdio;

const SMALL: &str = "size=16M,pagesize=2M";
const SYSTEM: i32 = 2;
const FAILED: i32 = 32;

// ---- system calls ------------------------------------------------------------------------------

/// A filter that answers the matching calls with `answer`, and lets all others through.
fn filter(answer: SeccompAction, calls: &[(i64, Vec<SeccompRule>)]) -> BpfProgram {
    let architecture = std::env::consts::ARCH.try_into().unwrap();
    let rules = calls.iter().cloned().collect();
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, answer, architecture).unwrap();
    filter.try_into().unwrap()
}

/// A filter that answers one call with `answer`, for any arguments.
fn refusing(call: i64, answer: SeccompAction) -> BpfProgram {
    filter(answer, &[(call, Vec::new())])
}

fn errno(errno: Errno) -> SeccompAction {
    SeccompAction::Errno(errno.raw_os_error() as u32)
}

/// Starts the mount helper from a thread with these filters, which the helper and the daemon
/// inherit. Returns exit status and standard error.
fn mount_under(filters: &[BpfProgram], place: &Place) -> (i32, String) {
    let mut mount = place.mount(SMALL);
    let child = std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            filters.iter().for_each(|filter| apply_filter(filter).unwrap());
            mount.stderr(Stdio::piped()).spawn().expect("the helper")
        });
        thread.join().unwrap()
    });
    let output = limits::collect(limits::PROGRAM, "the helper", child).unwrap();
    (output.status.code().expect("it is not ended by a signal"), text(&output.stderr))
}

/// Asserts that the mount fails with `status`, says `words`, and leaves nothing.
fn assert_refused_under(filters: &[BpfProgram], status: i32, words: &str) {
    let place = Place::new();
    let (found, error) = mount_under(filters, &place);
    assert!(found == status && error.contains(words), "{found}: {error}");
    place.assert_nothing_is_left();
}

#[test]
fn a_refused_system_call_is_named_by_the_mount() {
    for (name, number) in NEEDED {
        for answer in [Errno::PERM, Errno::NOSYS] {
            let place = Place::new();
            let (status, error) = mount_under(&[refusing(*number, errno(answer))], &place);
            // The helper makes some of the calls itself.
            assert!(
                [SYSTEM, FAILED].contains(&status) && error.contains(name),
                "{name}: {status}, {error}"
            );
            place.assert_nothing_is_left();
        }
    }
}

#[test]
fn several_refused_system_calls_are_named_at_once() {
    let refused = ["setfsuid", "fspick", "open_by_handle_at"];
    let of_these = NEEDED.iter().filter(|(name, _)| refused.contains(name));
    let filters: Vec<_> =
        of_these.map(|(_, number)| refusing(*number, errno(Errno::PERM))).collect();
    let words = "system calls that the seccomp filter of its container or service refuses: fspick, \
                 open_by_handle_at, setfsuid\n";
    assert_refused_under(&filters, FAILED, words);
}

#[test]
fn a_filter_that_kills_the_daemon_is_told() {
    let filters = [refusing(libc::SYS_pivot_root, SeccompAction::KillProcess)];
    assert_refused_under(
        &filters,
        SYSTEM,
        "the daemon was ended by signal 31, by a seccomp filter",
    );
}

// ---- threads and processes ---------------------------------------------------------------------

#[test]
fn a_mount_without_threads_says_so() {
    let flag = libc::CLONE_THREAD as u64;
    let flag =
        SeccompCondition::new(0, SeccompCmpArgLen::Qword, SeccompCmpOp::MaskedEq(flag), flag);
    let threads = vec![SeccompRule::new(vec![flag.unwrap()]).unwrap()];
    // glibc uses clone(2) where clone3(2) is missing. A filter cannot see the flags of clone3(2).
    let filters = [
        refusing(libc::SYS_clone3, errno(Errno::NOSYS)),
        filter(errno(Errno::AGAIN), &[(libc::SYS_clone, threads)]),
    ];
    let words = "no thread can be started: Resource temporarily unavailable";
    assert_refused_under(&filters, FAILED, words);
}

/// A cgroup that counts its processes and threads.
fn counting(name: &str) -> Cgroup {
    Cgroup::new(name, "pids", ["pids.max", "pids.max"])
}

#[test]
fn a_mount_with_too_few_threads_leaves_nothing() {
    let (cgroup, place) = (counting("mount"), Place::new()); // the place is dropped before the cgroup
    let mut refused = 0;
    for most in 1.. {
        cgroup.limit(most);
        let mut mount = mount_hugetlb2_in(&cgroup.directory);
        mount.arg("source").arg(place.mount_point()).args(["-o", &place.with_log(SMALL)]);
        let (status, error) = status_and_error(&mut mount);
        if status == 0 {
            break;
        }
        assert!(error.contains("Resource temporarily unavailable"), "{most}: {status} {error}");
        place.assert_nothing_is_left();
        refused += 1;
    }
    assert!(refused > 20, "{refused}");
    fs::write(place.mount_point().join("file"), "text").unwrap();
}

#[test]
fn a_worker_serves_on_where_threads_are_refused() {
    let cgroup = counting("service");
    let pool = Pool::mount_by(mount_hugetlb2_in(&cgroup.directory), SMALL);
    let worker = Worker::of(&pool).pid;
    let file = pool.join("file");
    fs::write(&file, vec![7; FOLIO as usize]).unwrap();
    let mut hammer = Toucher::mapping(&file, FOLIO);
    assert_eq!(hammer.ask("hammer 0"), "ok");
    cgroup.limit(1);
    let mut quarantined = 0;
    for _ in 0..100 {
        match poison(&file, 0, SUBPAGE) {
            Ok(()) => {
                quarantined += 1;
                set(&file, REPAIR, "salvage all").unwrap();
            }
            refused => assert_eq!(refused, Err(Errno::BUSY)),
        }
        pool.check();
    }
    drop(hammer);
    assert_eq!(poison(&file, 0, SUBPAGE), Ok(()), "{quarantined} of 100");
    fs::write(pool.join("another"), vec![7; FOLIO as usize]).unwrap();
    assert_eq!(Worker::of(&pool).pid, worker);
    pool.unmount();
}

#[test]
fn a_dead_worker_is_replaced_once_a_process_can_be_had() {
    let cgroup = counting("takeover");
    let pool = Pool::mount_by(mount_hugetlb2_in(&cgroup.directory), SMALL);
    fs::write(pool.join("file"), "text").unwrap();
    cgroup.limit(1);
    Worker::of(&pool).kill();
    std::thread::scope(|scope| {
        let read = scope.spawn(|| fs::read_to_string(pool.join("file")));
        let wanted =
            || fs::read_to_string(cgroup.directory.join("pids.events")).unwrap() != "max 0\n";
        limits::until(limits::ANSWER, "a process that is refused", wanted);
        assert!(!read.is_finished());
        cgroup.limit(1000);
        assert_eq!(read.join().unwrap().unwrap(), "text");
    });
    pool.check();
    pool.unmount();
}

// ---- memory -------------------------------------------------------------------------------------

/// The calls of a change fail from the n-th on, for each n. Before the change has begun, that is a
/// refusal. Afterwards the worker tries for a second, and leaves the rest to the next worker.
#[test]
fn the_next_worker_ends_a_change_that_lacks_memory() {
    const DEATHS: u32 = 2;
    let pool = Pool::small(8);
    let path = pool.join("file");
    let (mut refused, mut deaths) = (0, 0);
    for nth in 1.. {
        fs::write(&path, vec![7; 3 * FOLIO as usize]).unwrap();
        let file = fs::File::options().write(true).open(&path).unwrap();
        poison(&path, 2 * FOLIO, SUBPAGE).unwrap();
        let worker = Worker::of(&pool);
        set(pool.path(), FAIL, format!("{nth} ENOMEM lasting")).unwrap();
        let result = file.set_len(FOLIO / 2);
        deaths += u32::from(worker.has_ended());
        let counted = get(pool.path(), FAIL).unwrap(); // no call fails from here on
        match &result {
            Ok(()) => {
                assert_eq!(fs::read(&path).unwrap(), vec![7; FOLIO as usize / 2], "call {nth}")
            }
            Err(_) => {
                assert!(
                    !worker.has_ended(),
                    "call {nth}: {result:?} though the next worker has ended it"
                );
                assert_eq!(file.metadata().unwrap().len(), 3 * FOLIO, "call {nth}");
                assert_eq!(get(&path, POISON).unwrap().lines().count(), 1, "call {nth}");
                refused += 1;
            }
        }
        pool.check();
        if deaths == DEATHS || counted.starts_with("counted") {
            break;
        }
    }
    assert!(refused > 0 && deaths == DEATHS, "{refused} refused, {deaths} deaths");
    pool.await_log(
        "a change can be neither finished nor undone here, and is left to the next worker",
    );
    pool.unmount();
}
