//! Very many programs poll one file for a grown quarantine (POLLPRI).

mod support;

use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::Path;
use support::{FOLIO, POISON, Pool, SUBPAGE, get, kill_worker, limits, poison};

/// More pollers than the worker keeps for one file before it first wakes all pollers.
const POLLERS: u64 = 1100;

const MOMENT: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// Opens `path` [`POLLERS`] times for reading and writing: a descriptor for reading only might be
/// native, and then the worker would refuse a quarantine.
fn pollers(path: &Path) -> Vec<File> {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).unwrap();
    (0..POLLERS).map(|_| File::options().read(true).write(true).open(path).unwrap()).collect()
}

/// The number of sleeps of this thread. It sleeps for the answer to each request, and each wake of
/// a file that it polls ends a sleep.
fn sleeps() -> u64 {
    let status = fs::read_to_string("/proc/thread-self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
    line.expect("a line of proc(5)").trim().parse().unwrap()
}

/// Polls all `files` at once for a moment. Returns the number of files with an alarm.
fn poll_all(files: &[File]) -> usize {
    let mut fds: Vec<_> = files.iter().map(|file| PollFd::new(file, PollFlags::PRI)).collect();
    limits::within(limits::ANSWER, "an end of poll(2)", || poll(&mut fds, Some(&MOMENT)).unwrap())
}

/// The files of `queue` that were woken and have an alarm.
fn alarmed(queue: impl AsFd) -> BTreeSet<u64> {
    let mut events: Vec<epoll::Event> = Vec::with_capacity(2 * POLLERS as usize);
    limits::within(limits::ANSWER, "an end of epoll_wait(2)", || {
        epoll::wait(queue, rustix::buffer::spare_capacity(&mut events), Some(&MOMENT)).unwrap()
    });
    events.iter().map(|event| { event.data }.u64()).collect()
}

#[test]
fn each_of_many_pollers_is_asked_a_few_times() {
    const MOST: u64 = 12; // 5 on an idle machine; without the bound, poll(2) never ends
    let pool = Pool::small(2);
    let path = pool.join("file");
    fs::write(&path, vec![7; FOLIO as usize]).unwrap();
    let files = pollers(&path);
    let before = sleeps();
    assert_eq!(poll_all(&files), 0);
    let slept = sleeps() - before;
    println!("{POLLERS} descriptors, polled for a second: the poller slept {slept} times");
    assert!(slept <= MOST * POLLERS, "the poller slept {slept} times");
    drop(files);
    pool.unmount();
}

#[test]
fn each_of_many_pollers_is_woken_by_any_worker() {
    let pool = Pool::small(2);
    let path = pool.join("file");
    fs::write(&path, vec![7; FOLIO as usize]).unwrap();
    let files = pollers(&path);
    // The kernel asks again about the woken files of a queue, and about no others.
    let queue = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
    for (file, number) in files.iter().zip(0..) {
        let data = epoll::EventData::new_u64(number);
        epoll::add(&queue, file, data, epoll::EventFlags::PRI).unwrap();
    }
    for round in 0..4 {
        assert_eq!(alarmed(&queue), BTreeSet::new(), "round {round}");
        if round % 2 == 1 {
            kill_worker(&pool);
        }
        poison(&path, round * SUBPAGE, SUBPAGE).unwrap();
        assert_eq!(alarmed(&queue).len() as u64, POLLERS, "round {round}");
        get(&path, POISON).unwrap();
    }
    drop((queue, files));
    pool.unmount();
}
