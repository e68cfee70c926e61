//! Programs that keep their data in a file here and map it.

use crate::support::{Pool, end, huge_bytes, limits};
use crate::{at_length, said, tests};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

tests!(memcached_finds_its_items_after_a_restart, sqlite_keeps_a_database_whole_that_it_maps);

// ---- memcached ----------------------------------------------------------------------------------

struct Memcached {
    child: Child,
    port: u16,
}

impl Memcached {
    fn start(memory: &Path) -> Self {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let child = Command::new("memcached")
            .args([
                "-u",
                "root",
                "-l",
                "127.0.0.1",
                "-U",
                "0",
                "-m",
                "64",
                "-p",
                &port.to_string(),
                "-e",
            ])
            .arg(memory)
            .stdin(Stdio::null())
            .spawn()
            .expect("memcached");
        Self { child, port }
    }

    fn connect(&self) -> BufReader<TcpStream> {
        let mut connected = None;
        limits::until(limits::ANSWER, "memcached to listen", || {
            connected = TcpStream::connect(("127.0.0.1", self.port)).ok();
            connected.is_some()
        });
        let stream = connected.expect("it listens");
        stream.set_read_timeout(Some(limits::ANSWER)).expect("a limit for each answer");
        BufReader::new(stream)
    }

    /// Ends memcached so that it leaves its items to the next one (see "restartable cache" in its
    /// documentation).
    fn stop(mut self) {
        let pid = rustix::process::Pid::from_raw(self.child.id() as i32).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::USR1).unwrap();
        assert!(limits::exit(limits::ANSWER, "memcached", &mut self.child).success());
    }
}

impl Drop for Memcached {
    fn drop(&mut self) {
        end(&mut self.child, "memcached");
    }
}

/// Waits for the next second: memcached 1.6 does not trust items from the second in which it
/// starts, on any filesystem.
fn wait_for_another_second() {
    let second =
        || SystemTime::now().duration_since(UNIX_EPOCH).expect("it is after 1970").as_secs();
    let then = second();
    while second() <= then + 1 {
        std::thread::sleep(Duration::from_millis(20)); // the wait is for time to pass
    }
}

fn ask(connection: &mut BufReader<TcpStream>, request: &str) -> String {
    connection.get_mut().write_all(request.as_bytes()).unwrap();
    let mut line = String::new();
    connection.read_line(&mut line).unwrap();
    line.trim_end().to_owned()
}

fn memcached_finds_its_items_after_a_restart() {
    const ITEMS: usize = 1000;
    let pool = Pool::small(64);
    let cache = pool.join("cache");
    let server = Memcached::start(&cache);
    let mut connection = server.connect();
    for item in 0..ITEMS {
        assert_eq!(
            ask(&mut connection, &format!("set key{item} 0 0 8\r\n{item:08}\r\n")),
            "STORED"
        );
    }
    let (mapped, huge) = huge_bytes(server.child.id(), &cache);
    println!("memcached  {} of {} MiB are mapped huge", huge >> 20, mapped >> 20);
    assert!(mapped >= 64 << 20 && huge == mapped, "{huge} of {mapped}");
    drop(connection);
    server.stop();
    wait_for_another_second();
    let server = Memcached::start(&cache);
    let mut connection = server.connect();
    for item in 0..ITEMS {
        assert_eq!(
            ask(&mut connection, &format!("get key{item}\r\n")),
            format!("VALUE key{item} 0 8")
        );
        let mut lines = [String::new(), String::new()];
        for line in &mut lines {
            connection.read_line(line).unwrap();
        }
        assert_eq!(
            (lines[0].trim_end(), lines[1].trim_end()),
            (format!("{item:08}").as_str(), "END")
        );
    }
    println!("memcached  {ITEMS} items are there after a restart");
    drop(connection);
    server.stop();
    pool.check();
    std::fs::remove_file(&cache).unwrap();
    pool.unmount();
}

// ---- SQLite -------------------------------------------------------------------------------------

fn sql(database: &Path, statements: &str) -> String {
    said(Command::new("sqlite3").arg("-bail").arg(database).arg(statements))
}

fn sqlite_keeps_a_database_whole_that_it_maps() {
    const MAPPED: &str = "pragma mmap_size=67108864; pragma busy_timeout=60000;";
    let pool = Pool::small(64);
    let database = pool.join("database");
    let rows = 20_000 * at_length(10);
    sql(&database, "pragma journal_mode=wal; create table t(id integer primary key, text);");
    let insert = |half: u64| {
        format!(
            "{MAPPED} with recursive n(x) as (select {half} union all select x + 2 from n where x + 2 < {rows})
             insert into t select x, printf('%064d', x) from n;
             update t set text = text || 'x' where id % 10 = {half};
             delete from t where id % 100 = {half};"
        )
    };
    std::thread::scope(|scope| {
        for half in 0..2 {
            let (database, statements) = (&database, insert(half));
            scope.spawn(move || sql(database, &statements));
        }
    });
    let check = sql(
        &database,
        &format!(
            "{MAPPED} pragma wal_checkpoint(truncate); pragma integrity_check; select count(*) from t;"
        ),
    );
    let lines: Vec<&str> = check.lines().rev().take(2).collect();
    assert_eq!(lines, [(rows - rows / 50).to_string().as_str(), "ok"], "{check}");
    println!("sqlite3  integrity_check of {} rows after two writers at once: ok", lines[0]);
    pool.check();
    pool.unmount();
}
