//! The command hugetlb2: its words for people and, with --json, for programs.

mod support;

use rustix::io::Errno;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use support::{
    FOLIO, Pool, SUBPAGE, Toucher, end, get, hugetlb2, limits, poison, run, start_until,
    status_and_error, text,
};

fn output(arguments: &[&str], path: &Path, rest: &[&str]) -> String {
    run(hugetlb2().args(arguments).arg(path).args(rest))
}

fn json_output(arguments: &[&str], path: &Path, rest: &[&str]) -> Value {
    serde_json::from_str(&output(&[&["--json"], arguments].concat(), path, rest))
        .expect("it is JSON")
}

/// Asserts that the command fails. Its standard error and, with --json, `error` contain `word`.
fn assert_refused(arguments: &[&str], path: &Path, rest: &[&str], word: &str) {
    let (status, error) = status_and_error(hugetlb2().args(arguments).arg(path).args(rest));
    assert_eq!(status, 1, "{arguments:?} {rest:?}: {error}");
    assert!(
        error.starts_with("hugetlb2: ") && error.contains(word),
        "{arguments:?} {rest:?}: {error}"
    );
    let mut json = hugetlb2();
    json.arg("--json").args(arguments).arg(path).args(rest);
    let json = limits::output(limits::PROGRAM, &mut json).unwrap();
    assert_eq!(json.status.code(), Some(1));
    let value: Value = serde_json::from_slice(&json.stdout).expect("it is JSON");
    let said = value["error"].as_str().expect("a sentence");
    assert!(said.contains(word), "{arguments:?} {rest:?}: {said}");
}

/// The words of each line.
fn rows(text: &str) -> Vec<Vec<&str>> {
    text.lines().map(|line| line.split_ascii_whitespace().collect()).collect()
}

/// A pool with a file of three folios of sevens.
fn pool_with_file() -> (Pool, std::path::PathBuf) {
    let pool = Pool::small(8);
    let file = pool.join("file");
    std::fs::write(&file, vec![7; 3 * FOLIO as usize]).unwrap();
    (pool, file)
}

// ---- refusals -----------------------------------------------------------------------------------

#[test]
fn a_refusal_tells_the_daemons_own_reason() {
    let pool = Pool::mount("pagesize=2M,size=16M,io=native,collapse=off");
    let file = pool.join("file");
    std::fs::write(&file, vec![7; FOLIO as usize]).unwrap();
    let reader = std::fs::File::open(&file).unwrap();
    let why = "programs have the file open for reading natively";
    assert_refused(&["poison"], &file, &["0", "4096"], why);
    assert_eq!(
        get(&file, "user.hugetlb2.refusal"),
        Err(Errno::NODATA),
        "the reason is another thread's"
    );
    assert_eq!(poison(&file, 0, SUBPAGE), Err(Errno::BUSY));
    assert!(get(&file, "user.hugetlb2.refusal").unwrap().starts_with(why));
    drop(reader);
    poison(&file, 0, SUBPAGE).unwrap();
    assert_eq!(
        get(&file, "user.hugetlb2.refusal"),
        Err(Errno::NODATA),
        "a request has succeeded since"
    );
}

// ---- status and check ---------------------------------------------------------------------------

#[test]
fn status_shows_the_counters_of_a_pool() {
    let (pool, file) = pool_with_file();
    poison(&file, 0, 2 * SUBPAGE).unwrap();
    let said = output(&["status"], &pool.path(), &[]);
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines[0], pool.path().to_str().unwrap());
    assert_eq!(lines[1], "  pages         8 of 2 MiB: 3 used, 5 free");
    assert_eq!(lines[2], "  in folios     16 MiB were in 2 MiB folios when it was mounted");
    assert_eq!(lines[3], "  files         1 open or with contents, 0 unlinked and still in use");
    assert_eq!(lines[4], "  quarantined   2 subpages of 4 KiB");
    assert_eq!(
        lines[5],
        format!(
            "  daemon        process {}, worker {}",
            pool.daemon().pid,
            pool.counter("worker_pid")
        )
    );
    let options =
        lines[6].strip_prefix("  options       pagesize=2M,mode=755,uid=0,gid=0,").unwrap();
    assert!(
        options
            .starts_with("collapse=on,recovery_write=on,io=auto,punch=release,clear=demand,log=/"),
        "{options}"
    );
    assert_eq!(lines.len(), 7);
}

#[test]
fn ready_tells_how_much_is_cleared_ahead_and_waits_for_it() {
    let pool = Pool::mount("pagesize=2M,size=64M,clear=ahead,cpu=100%");
    let said = output(&["ready"], &pool.path(), &["--wait"]);
    assert_eq!(said, "15 of 32 free pages are cleared ahead\n"); // 8, 4, 2 and 1
    let status = output(&["status"], &pool.path(), &[]);
    assert!(
        status.contains("\n  ready         15 of 32 free pages are cleared ahead\n"),
        "{status}"
    );
    assert!(status.contains(",clear=ahead,cpu=100%,"), "{status}");
    let value = json_output(&["ready"], &pool.path(), &[]);
    assert_eq!(
        value,
        json!({ "bytes_ready": 15 * FOLIO, "bytes_free": 32 * FOLIO, "clearing": false })
    );
    pool.unmount();
    let other = Pool::small(1);
    assert_refused(&["ready"], &other.path(), &[], "no memory is cleared ahead; mount the pool");
    assert_refused(
        &["ready"],
        Path::new("/proc"),
        &["--wait"],
        "no hugetlb2 pool is mounted there",
    );
}

#[test]
fn status_in_json_has_every_counter_as_a_number() {
    let (pool, _) = pool_with_file();
    let value = json_output(&["status"], &pool.path(), &[]);
    let found = value[0].as_object().unwrap();
    assert_eq!(found["mount_point"], pool.path().to_str().unwrap());
    for (name, value) in pool.counters() {
        assert_eq!(found[&name], json!(value), "{name}");
    }
    assert_eq!(found["options"]["pagesize"], "2M");
    assert_eq!(found.len(), pool.counters().len() + 3);
    assert_eq!(value.as_array().unwrap().len(), 1);
}

#[test]
fn status_without_a_directory_finds_all_pools() {
    let pool = Pool::small(1);
    let odd = Pool::small(2);
    let place = tempfile::tempdir().unwrap();
    let strange = place.path().join("a b\\c");
    std::fs::create_dir(&strange).unwrap();
    run(Command::new("mount").arg("--bind").arg(odd.path()).arg(&strange));
    let all = limits::output(limits::PROGRAM, hugetlb2().args(["--json", "status"])).unwrap();
    let said = limits::output(limits::PROGRAM, hugetlb2().arg("status")).unwrap();
    run(Command::new("umount").args(["-i", "-l"]).arg(&strange));
    assert!(
        all.status.success() && said.status.success(),
        "{}{}",
        text(&all.stderr),
        text(&said.stderr)
    );
    let said = text(&said.stdout);
    let value: Value = serde_json::from_slice(&all.stdout).unwrap();
    let pages = |path: &Path| {
        let found = value
            .as_array()
            .unwrap()
            .iter()
            .find(|pool| pool["mount_point"] == path.to_str().unwrap());
        found.map(|pool| pool["pages_total"].as_u64().unwrap())
    };
    assert_eq!(
        (pages(&pool.path()), pages(&odd.path()), pages(&strange)),
        (Some(1), Some(2), Some(2))
    );
    assert!(said.lines().any(|line| Path::new(line) == pool.path()));
}

#[test]
fn status_takes_several_directories_in_their_order() {
    let (first, second) = (Pool::small(1), Pool::small(2));
    let second_path = second.path();
    let value = json_output(&["status"], &first.path(), &[second_path.to_str().unwrap()]);
    assert_eq!((&value[0]["pages_total"], &value[1]["pages_total"]), (&json!(1), &json!(2)));
}

#[test]
fn status_and_check_of_what_is_no_pool_fail() {
    let place = tempfile::tempdir().unwrap();
    for action in ["status", "check"] {
        assert_refused(&[action], place.path(), &[], "no hugetlb2 pool is mounted there");
        assert_refused(&[action], &place.path().join("missing"), &[], "No such file or directory");
    }
    let (pool, file) = pool_with_file();
    assert_refused(&["check"], &file, &[], "no hugetlb2 pool is mounted there");
    pool.check();
}

#[test]
fn check_of_a_pool_in_use_finds_that_everything_holds() {
    let (pool, file) = pool_with_file();
    poison(&file, FOLIO, 1).unwrap();
    let _toucher = Toucher::mapping(&file, 3 * FOLIO);
    assert_eq!(
        output(&["check"], &pool.path(), &[]),
        format!("{}: everything holds\n", pool.path().display())
    );
    assert_eq!(json_output(&["check"], &pool.path(), &[]), json!({ "ok": true, "wrong": [] }));
}

// ---- poison, repair, collapse, map --------------------------------------------------------------

#[test]
fn poison_quarantines_a_range_and_shows_what_is_quarantined() {
    let (_pool, file) = pool_with_file();
    assert_eq!(rows(&output(&["poison"], &file, &[])), [["offset", "length", "kind", "time"]]);
    assert_eq!(json_output(&["poison"], &file, &[]), json!([]));
    assert_eq!(output(&["poison"], &file, &["0x1001", "1"]), "");
    assert_eq!(json_output(&["poison"], &file, &["2097152", "8192"]), json!({ "ok": true }));
    let said = output(&["poison"], &file, &[]);
    let rows = rows(&said);
    assert_eq!(rows[1][..3], ["0x1000", "0x1000", "soft"]);
    assert_eq!(rows[2][..3], ["0x200000", "0x2000", "soft"]);
    let value = json_output(&["poison"], &file, &[]);
    let time = value[0]["time"].as_u64().unwrap();
    assert!(hugetlb2fs::sys::unix_time() - time < 60);
    assert_eq!(value[0], json!({ "offset": 4096, "length": 4096, "kind": "soft", "time": time }));
    assert_eq!((&value[1]["offset"], &value[1]["length"]), (&json!(2097152), &json!(8192)));
    assert_eq!(Toucher::mapping(&file, 3 * FOLIO).walk(), [SUBPAGE, FOLIO, FOLIO + SUBPAGE]);
}

#[test]
fn repair_salvages_or_zeroes_what_is_quarantined() {
    let (_pool, file) = pool_with_file();
    for offset in [0, FOLIO, 2 * FOLIO] {
        poison(&file, offset, SUBPAGE).unwrap();
    }
    assert_eq!(output(&["repair"], &file, &["salvage", "0", "0x1000"]), "");
    assert_eq!(json_output(&["repair"], &file, &["zero", "all"]), json!({ "ok": true }));
    assert_eq!(json_output(&["poison"], &file, &[]), json!([]));
    let bytes = std::fs::read(&file).unwrap();
    assert_eq!((bytes[0], bytes[FOLIO as usize], bytes[2 * FOLIO as usize]), (7, 0, 0));
    assert_eq!(bytes.iter().filter(|byte| **byte == 0).count() as u64, 2 * SUBPAGE);
}

#[test]
fn map_shows_how_ranges_are_mapped_and_collapse_mends_it() {
    let pool = Pool::mount("pagesize=2M,size=16M,collapse=off");
    let file = pool.join("file");
    std::fs::write(&file, vec![7; 2 * FOLIO as usize]).unwrap();
    let whole = json!([{ "offset": 0, "length": 2 * FOLIO, "state": "huge", "node": 0 }]);
    assert_eq!(json_output(&["map"], &file, &[]), whole);
    poison(&file, FOLIO, SUBPAGE).unwrap();
    let said = output(&["map"], &file, &[]);
    let found = rows(&said);
    assert_eq!(found[0], ["offset", "length", "state", "node"]);
    assert_eq!(found[1], ["0x0", "0x200000", "huge", "0"]);
    assert_eq!(found[2][..3], ["0x200000", "0x1000", "poisoned"]);
    assert_eq!(found[3], ["0x201000", "0x1ff000", "small", "0"]);
    output(&["repair"], &file, &["salvage", "all"]);
    assert_eq!(json_output(&["map"], &file, &[])[1]["state"], "small", "nobody has asked for more");
    assert_eq!(json_output(&["collapse"], &file, &["0x200000", "1"]), json!({ "ok": true }));
    assert_eq!(json_output(&["map"], &file, &[]), whole);
    assert_eq!(output(&["collapse"], &file, &["all"]), "");
}

#[test]
fn an_empty_file_has_an_empty_map() {
    let (pool, _) = pool_with_file();
    let empty = pool.join("empty");
    std::fs::write(&empty, "").unwrap();
    assert_eq!(json_output(&["map"], &empty, &[]), json!([]));
    assert_eq!(rows(&output(&["map"], &empty, &[])).len(), 1);
}

#[test]
fn the_placement_of_a_file_and_a_directory_is_shown_and_set() {
    let (pool, file) = pool_with_file();
    assert_eq!(output(&["placement"], &file, &["strict:bind:0"]), "");
    let said = output(&["placement"], &file, &[]);
    let said: Vec<&str> = said.lines().collect();
    assert_eq!(said[..2], ["strict:bind:0", "          node          bytes"]);
    let value = json_output(&["placement"], &file, &[]);
    assert_eq!(value["placement"], "strict:bind:0");
    let bytes = value["memory"].as_array().unwrap().iter().map(|row| row["bytes"].as_u64());
    assert_eq!(bytes.sum::<Option<u64>>(), Some(3 * FOLIO));
    assert_eq!(json_output(&["placement"], &pool.path(), &["local"]), json!({ "ok": true }));
    let root = json!({ "placement": "local", "memory": [] });
    assert_eq!(json_output(&["placement"], &pool.path(), &[]), root);
    assert_eq!(output(&["placement"], &pool.path(), &[]), "local\n");
    for (words, why) in [
        ("membind:0", "\"membind:0\" is no placement; expected caller, local, bind:NODES"),
        ("bind:1000", "the pool has no memory on node 1000"),
    ] {
        assert_refused(&["placement"], &file, &[words], why);
    }
    assert_refused(&["placement"], Path::new("/proc/version"), &[], "not a regular file or");
}

#[test]
fn a_move_ends_with_the_place_of_the_memory_or_a_reason() {
    let (pool, file) = pool_with_file();
    let said = output(&["move"], &file, &["--to", "strict:bind:0"]);
    assert!(said.starts_with("strict:bind:0\n") && said.contains("bytes"), "{said}");
    let value = json_output(&["move"], &file, &["--to", "local"]);
    assert_eq!(value["placement"], "local");
    assert_eq!(value["memory"][0]["node"], 0);
    for (words, why) in [
        ("membind:0", "\"membind:0\" is no placement; expected caller, local, bind:NODES"),
        ("bind:999", "999"),
    ] {
        assert_refused(&["move"], &file, &["--to", words], why);
    }
    assert_refused(&["move"], &pool.path(), &["--to", "local"], "not a regular file");
    assert_refused(&["move"], Path::new("/proc/version"), &["--to", "local"], "not a regular file");
    assert_eq!(output(&["placement"], &file, &[]).lines().next(), Some("local"), "as before");
}

#[test]
fn the_help_for_a_placement_has_each_word() {
    let help = run(hugetlb2().args(["placement", "-h"]));
    for words in [
        "caller",
        "local",
        "bind:",
        "preferred:",
        "interleave:",
        "weighted-interleave:",
        "best:Latency",
        "best:Bandwidth",
        "best:Capacity",
        "strict:",
        "0*3",
    ] {
        assert!(help.contains(words), "{words}: {help}");
    }
}

#[test]
fn a_senseless_request_is_explained_and_changes_nothing() {
    let (pool, file) = pool_with_file();
    for (action, rest, word) in [
        ("poison", &["x", "1"][..], "\"x\" is not a number (offset)"),
        ("poison", &["0", "1k"], "\"1k\" is not a number (length)"),
        ("poison", &["0", "0"], "the length is 0"),
        ("poison", &["6291456", "1"], "end"),
        ("poison", &["0", "18446744073709551615"], "end"),
        ("repair", &["zero", "some"], "\"some\" is not a number (offset)"),
        ("repair", &["zero", "0"], "the length is missing"),
        ("collapse", &["all", "0"], "\"all\" is not a number"),
        ("collapse", &["0"], "the length is missing"),
        ("repair", &["salvage", "all"], "there is nothing of that kind in this range"),
    ] {
        assert_refused(&[action], &file, rest, word);
    }
    assert_eq!(get(&file, support::POISON), Err(rustix::io::Errno::NODATA));
    for (action, rest) in [
        ("poison", &["0"][..]),
        ("repair", &["mend", "all"]),
        ("repair", &["zero"]),
        ("map", &["x"]),
    ] {
        assert_eq!(
            status_and_error(hugetlb2().arg(action).arg(&file).args(rest)).0,
            2,
            "{action} {rest:?}: usage"
        );
    }
    pool.check();
}

#[test]
fn a_file_that_is_not_a_pools_is_never_written_to() {
    let (pool, _) = pool_with_file();
    // This filesystem would store the attribute like any other.
    let place = tempfile::tempdir_in("/dev/shm").unwrap();
    let file = place.path().join("file");
    std::fs::write(&file, vec![7; SUBPAGE as usize]).unwrap();
    for (action, rest) in [
        ("poison", &["0", "4096"][..]),
        ("poison", &[]),
        ("repair", &["zero", "all"]),
        ("collapse", &["all"]),
        ("map", &[]),
    ] {
        assert_refused(&[action], &file, rest, "not a regular file of a hugetlb2 pool");
        assert_refused(&[action], &pool.path(), rest, "not a regular file of a hugetlb2 pool");
        assert_refused(&[action], &place.path().join("missing"), rest, "No such file or directory");
    }
    assert_eq!(get(&file, support::POISON), Err(rustix::io::Errno::NODATA));
}

#[test]
fn only_who_may_write_a_file_may_poison_it() {
    let place = tempfile::tempdir().unwrap();
    let pool = Pool::mount("pagesize=2M,size=16M,mode=755");
    let file = pool.join("file");
    std::fs::write(&file, "text").unwrap();
    // Only root may search the directory around the pool. The bind mount lies in an open directory.
    let open = place.path().join("open");
    std::fs::create_dir(&open).unwrap();
    std::fs::set_permissions(place.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))
        .unwrap();
    run(Command::new("mount").arg("--bind").arg(pool.path()).arg(&open));
    let as_nobody = |action: &str, path: &Path, rest: &[&str]| {
        let mut command = Command::new("setpriv");
        command.args([
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            env!("CARGO_BIN_EXE_hugetlb2"),
            action,
        ]);
        status_and_error(command.arg(path).args(rest))
    };
    let poisoned = as_nobody("poison", &open.join("file"), &["0", "1"]);
    let mapped = as_nobody("map", &open.join("file"), &[]);
    let checked = as_nobody("check", &open, &[]);
    let status = as_nobody("status", &open, &[]);
    run(Command::new("umount").args(["-i", "-l"]).arg(&open));
    assert!(poisoned.0 == 1 && poisoned.1.contains("Permission denied"), "{}", poisoned.1);
    assert_eq!(mapped.0, 0, "{}", mapped.1);
    assert!(checked.0 == 1 && checked.1.contains("or you are not root"), "{}", checked.1);
    assert_eq!(status.0, 0, "{}", status.1);
    assert_eq!(get(&file, support::POISON), Err(rustix::io::Errno::NODATA));
}

// ---- the command line itself --------------------------------------------------------------------

#[test]
fn a_reader_that_goes_away_is_no_error_and_a_full_disk_is_one() {
    let (_pool, file) = pool_with_file();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let gone =
        hugetlb2().arg("map").arg(&file).stdout(writer).stderr(Stdio::piped()).spawn().unwrap();
    let gone = limits::collect(limits::PROGRAM, "hugetlb2 map", gone).unwrap();
    assert!(gone.status.success() && gone.stderr.is_empty(), "{}", text(&gone.stderr));
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let full =
        hugetlb2().arg("map").arg(&file).stdout(full).stderr(Stdio::piped()).spawn().unwrap();
    let full = limits::collect(limits::PROGRAM, "hugetlb2 map", full).unwrap();
    assert_eq!(full.status.code(), Some(1));
    assert!(
        text(&full.stderr).contains("standard output: No space left on device"),
        "{}",
        text(&full.stderr)
    );
}

#[test]
fn the_help_names_every_action() {
    let help = run(hugetlb2().arg("--help"));
    for action in ["status", "poison", "repair", "collapse", "map", "check", "demo", "mount"] {
        assert!(
            help.lines().any(|line| line.trim_start().starts_with(&format!("{action} "))),
            "{action}"
        );
        run(hugetlb2().args([action, "--help"]));
    }
    assert_eq!(
        run(hugetlb2().arg("--version")),
        format!("hugetlb2 {}\n", env!("CARGO_PKG_VERSION"))
    );
    assert_eq!(status_and_error(&mut hugetlb2()).0, 2);
}

#[test]
fn status_shows_a_dead_daemon_beside_the_other_pools() {
    let (pool, dead) = (Pool::small(1), Pool::small(1));
    run(Command::new("kill").arg("-KILL").arg(dead.daemon().pid.to_string()));
    dead.daemon().wait();
    let said = run(hugetlb2().arg("status"));
    let after = |path: &Path| {
        let line = said.lines().skip_while(|line| Path::new(line) != path).nth(1);
        line.unwrap_or_else(|| panic!("{} is not shown: {said}", path.display())).to_owned()
    };
    assert!(after(&pool.path()).contains("pages"), "{said}");
    assert!(after(&dead.path()).contains("gone: Transport endpoint is not connected"), "{said}");
    assert_refused(&["status"], &dead.path(), &[], "Transport endpoint is not connected");
}

// ---- targets ------------------------------------------------------------------------------------

#[test]
fn targets_are_shown_as_a_table_and_as_json() {
    let (pool, file) = pool_with_file();
    let said = output(&["targets"], &pool.path(), &[]);
    let said = rows(&said);
    assert_eq!(said[0][..4], ["node", "kind", "initiators", "Capacity[B]"]);
    let column = |name: &str| said[0].iter().position(|found| *found == name).unwrap();
    assert!(said.iter().all(|row| row.len() == said[0].len()), "{said:?}");
    let free = column("free_bytes");
    let free: u64 = said[1..].iter().map(|row| row[free].parse::<u64>().unwrap()).sum();
    assert_eq!(free, 5 * FOLIO);
    let value = json_output(&["targets"], &pool.path(), &[]);
    let targets = value.as_array().unwrap();
    assert_eq!(targets.len(), said.len() - 1);
    for (target, row) in targets.iter().zip(&said[1..]) {
        for name in ["node", "pool_bytes", "free_bytes"] {
            assert_eq!(target[name].to_string(), row[column(name)], "{name}");
        }
        assert!(target["initiators"].is_array(), "{target}");
    }
    assert_refused(&["targets"], &file, &[], "no hugetlb2 pool is mounted there");
    assert_refused(&["targets"], Path::new("/proc"), &[], "no hugetlb2 pool is mounted there");
    pool.unmount();
}

// ---- a daemon of another process id namespace ---------------------------------------------------

/// A process id namespace with a mount namespace, a /proc and a pool of its own.
struct Container {
    init: Child,
    directory: tempfile::TempDir,
}

impl Container {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let script =
            "\"$0\" mount inner \"$1\" -o size=4M,pagesize=2M && echo ready && exec sleep infinity";
        let mut shell = Command::new("unshare");
        shell.args(["-m", "-p", "-f", "--kill-child", "--mount-proc", "sh", "-c", script]);
        shell.arg(hugetlb2().get_program()).arg(directory.path()).stdin(Stdio::null());
        let init = start_until("ready", &mut shell);
        Self { init, directory }
    }

    fn mount_point(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{}", self.init.id(), self.directory.path().display()))
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        end(&mut self.init, "unshare(1)");
    }
}

fn name_of(process: &Value) -> String {
    let pid = process.as_u64().expect("a process id");
    std::fs::read_to_string(format!("/proc/{pid}/comm")).expect("it runs").trim_end().to_owned()
}

#[test]
fn a_daemon_of_another_pid_namespace_has_the_numbers_of_ours() {
    let container = Container::start();
    let value = &json_output(&["status"], &container.mount_point(), &[])[0];
    assert_eq!(name_of(&value["daemon_pid"]), "hugetlb2fsd");
    assert_eq!(name_of(&value["worker_pid"]), "hugetlb2fsd");
    let said = output(&["status"], &container.mount_point(), &[]);
    let line =
        format!("  daemon        process {}, worker {}", value["daemon_pid"], value["worker_pid"]);
    assert!(said.lines().any(|found| found == line), "{said}");
    assert_refused(
        &["upgrade"],
        &container.mount_point(),
        &[],
        "it is in another process id namespace",
    );
    let after = &json_output(&["status"], &container.mount_point(), &[])[0];
    assert_eq!(after["daemon_pid"], value["daemon_pid"], "it serves on");
}

#[test]
fn a_daemon_out_of_sight_is_not_taken_for_another_process() {
    let pool = Pool::small(2);
    let mut inside = Command::new("unshare");
    inside
        .args(["-m", "-p", "-f", "--mount-proc"])
        .arg(hugetlb2().get_program())
        .arg("status")
        .arg(pool.path());
    let said = run(&mut inside);
    assert!(said.contains("  daemon        not seen from this process id namespace"), "{said}");
    let mut inside = Command::new("unshare");
    inside
        .args(["-m", "-p", "-f", "--mount-proc"])
        .arg(hugetlb2().get_program())
        .arg("upgrade")
        .arg(pool.path());
    let (status, error) = status_and_error(&mut inside);
    assert_eq!(status, 1, "{error}");
    assert!(error.contains("its daemon is not seen from here"), "{error}");
    pool.unmount();
}
