//! A wait for an event that never comes ends at its limit, and then the test names the event.

mod support;

use rustix::process::Signal;
use std::os::unix::process::ExitStatusExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Command, Output};
use std::sync::Barrier;
use std::time::{Duration, Instant};
use support::limits::{self, Remedy};
use support::{Pool, Toucher, Worker, text};

const SHORT: Duration = Duration::from_millis(300);

/// The words of the panic of `wait`. The panic comes soon after the limit.
fn panic_of<T>(wait: impl FnOnce() -> T) -> String {
    let began = Instant::now();
    let panic = catch_unwind(AssertUnwindSafe(wait)).err().expect("the limit passes");
    assert!(began.elapsed() > SHORT && began.elapsed() < limits::ANSWER, "{:?}", began.elapsed());
    *panic.downcast::<String>().expect("a panic with words")
}

#[test]
fn a_program_that_does_not_end_is_killed_and_named() {
    let said = panic_of(|| limits::output(SHORT, Command::new("sleep").arg("1000")));
    assert!(said.contains("300ms") && said.contains(r#"the end of "sleep" "1000""#), "{said}");
}

#[test]
fn a_silent_process_is_killed_and_the_question_named() {
    let mut toucher = Toucher::start();
    toucher.freeze();
    let said = panic_of(|| toucher.ask_within(SHORT, "walk"));
    assert!(said.contains(r#"to "walk" has passed"#), "{said}");
}

#[test]
fn an_event_that_does_not_come_is_named() {
    let (reader, _writer) = std::io::pipe().unwrap();
    let said = panic_of(|| limits::readable(SHORT, "a word from the pipe", &reader));
    assert!(said.contains("limit of 300ms for a word from the pipe has passed"), "{said}");
    let said = panic_of(|| limits::until(SHORT, "the end of time", || false));
    assert!(said.contains("for the end of time has passed"), "{said}");
}

/// Runs the calling test once more in a process of its own, and `hang` in that process. Returns the
/// output of that process, and `None` inside of it.
fn in_a_process(test: &str, hang: impl FnOnce()) -> Option<Output> {
    const HANG: &str = "HUGETLB2_TEST_HANG";
    if std::env::var_os(HANG).is_some() {
        hang();
        return None;
    }
    let mut program = Command::new(std::env::current_exe().expect("this program"));
    program.args(["--exact", test, "--nocapture"]).env(HANG, "");
    Some(limits::output(limits::PROGRAM, &mut program).expect("this program again"))
}

/// Makes a mount whose worker is stopped, so that its calls get no answer. Prints the ids of its
/// processes.
fn unanswered() -> Pool {
    limits::allow(1);
    let pool = Pool::small(1);
    let worker = Worker::of(&pool);
    println!("pids {} {}", pool.daemon().pid, worker.pid);
    worker.stop();
    pool
}

/// Asserts that the mount and its processes have ended with the process that waited for them.
fn assert_gone(output: &Output) {
    let (said, errors) = (text(&output.stdout), text(&output.stderr));
    let pids =
        said.lines().find_map(|line| line.split_once("pids ")).expect("the mount was made").1;
    for pid in pids.split(' ') {
        let process = std::path::PathBuf::from(format!("/proc/{pid}"));
        limits::until(limits::ANSWER, &format!("the end of process {pid}"), || !process.exists());
    }
    let place = errors.split_once("which uses ").expect("the mount is named").1;
    let place = place.split_ascii_whitespace().next().expect("a path");
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(place), "{place} is mounted");
}

#[test]
fn a_call_that_is_not_answered_fails_and_its_test_is_named() {
    let name = "a_call_that_is_not_answered_fails_and_its_test_is_named";
    let hang = || {
        let pool = unanswered();
        let answer = std::fs::metadata(pool.join("file"));
        panic!("answered: {answer:?}");
    };
    let Some(output) = in_a_process(name, hang) else { return };
    let errors = text(&output.stderr);
    assert!(errors.contains(&format!("limit of 1s for the end of {name}")), "{errors}");
    assert!(errors.contains("answered: Err"), "{errors}");
    assert_eq!(output.status.code(), Some(101), "{errors}");
    assert_gone(&output);
}

#[test]
fn a_wait_without_remedy_ends_the_program_and_is_listed() {
    let name = "a_wait_without_remedy_ends_the_program_and_is_listed";
    let hang = || {
        let _pool = unanswered();
        limits::note("stands at the barrier");
        limits::within(SHORT, "a second thread", || Barrier::new(2).wait());
    };
    let Some(output) = in_a_process(name, hang) else { return };
    let errors = text(&output.stderr);
    assert!(errors.contains("limit of 300ms for a second thread ends this program"), "{errors}");
    assert!(errors.contains("stands at the barrier"), "{errors}");
    assert_eq!(output.status.signal(), Some(Signal::ABORT.as_raw()), "{errors}");
    assert_gone(&output);
}

#[test]
fn a_program_that_is_told_to_end_says_what_it_waits_for() {
    let name = "a_program_that_is_told_to_end_says_what_it_waits_for";
    let hang = || {
        let _test = limits::test(std::path::Path::new("/nowhere"), None);
        let _waiting = limits::begin(limits::PROGRAM, "the kettle", Remedy::End);
        rustix::process::kill_process(rustix::process::getpid(), Signal::TERM).unwrap();
        std::thread::park();
    };
    let Some(output) = in_a_process(name, hang) else { return };
    let errors = text(&output.stderr);
    assert!(
        errors.contains("SIGTERM ends this program") && errors.contains("the kettle"),
        "{errors}"
    );
    assert_eq!(output.status.signal(), Some(Signal::ABORT.as_raw()), "{errors}");
}
