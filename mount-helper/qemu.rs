//! A monitor of QEMU: JSON, one object a line (QEMU Machine Protocol). It is read without a schema,
//! as each version of QEMU has another one.

use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The time within which QEMU answers. It answers no command while it moves the state of its
/// devices.
const PATIENCE: Duration = Duration::from_secs(60);

/// A connection to a monitor, which has one at a time.
pub struct Monitor {
    socket: PathBuf,
    answers: BufReader<UnixStream>,
}

/// A migration, from the side of its source.
pub struct Migration {
    /// As in `active`, `completed` or `failed`.
    pub status: String,
    /// QEMU's reason for a failure.
    pub error: Option<String>,
    /// Bytes of memory that have moved, and all.
    pub progress: Option<(u64, u64)>,
}

impl Monitor {
    /// Connects to the monitor at `socket` (`-qmp unix:SOCKET,server=on,wait=off`).
    ///
    /// # Errors
    /// A sentence.
    pub fn connect(socket: &Path) -> Result<Self, String> {
        let failed = |error: std::io::Error| format!("{}: {error}", socket.display());
        let stream = UnixStream::connect(socket).map_err(failed)?;
        stream.set_read_timeout(Some(PATIENCE)).map_err(failed)?;
        let mut monitor = Self { socket: socket.to_owned(), answers: BufReader::new(stream) };
        let greeting = monitor.read()?;
        if greeting.get("QMP").is_none() {
            return Err(format!("{}: no QMP monitor of QEMU", socket.display()));
        }
        monitor.execute("qmp_capabilities", &json!({}))?;
        Ok(monitor)
    }

    fn read(&mut self) -> Result<Value, String> {
        let mut line = String::new();
        let socket = self.socket.display();
        match self.answers.read_line(&mut line) {
            Ok(0) => Err(format!("{socket}: QEMU has ended")),
            Ok(_) => serde_json::from_str(&line).map_err(|error| format!("{socket}: {error}")),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                Err(format!("{socket}: no answer within {} s", PATIENCE.as_secs()))
            }
            Err(error) => Err(format!("{socket}: {error}")),
        }
    }

    fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value, String> {
        let line = json!({ "execute": command, "arguments": arguments });
        let sent = writeln!(self.answers.get_mut(), "{line}");
        sent.map_err(|error| format!("{}: {error}", self.socket.display()))?;
        loop {
            let mut answer = self.read()?; // or an event
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = answer.get("error") {
                let why = error.get("desc").and_then(Value::as_str).unwrap_or("no reason");
                return Err(format!("QEMU refuses {command}: {why}"));
            }
        }
    }

    /// The state of the machine, as in `running`, `paused` or `inmigrate`.
    ///
    /// # Errors
    /// A sentence.
    pub fn state(&mut self) -> Result<String, String> {
        let status = self.execute("query-status", &json!({}))?;
        Ok(text(&status, "status").unwrap_or_default())
    }

    /// Stops the machine. One that is still to come will not run by itself.
    ///
    /// # Errors
    /// A sentence.
    pub fn stop(&mut self) -> Result<(), String> {
        self.execute("stop", &json!({})).map(drop)
    }

    /// Has the machine go on.
    ///
    /// # Errors
    /// A sentence.
    pub fn go_on(&mut self) -> Result<(), String> {
        self.execute("cont", &json!({})).map(drop)
    }

    /// Begins to move the machine to `uri`, as in `tcp:HOST:PORT`.
    ///
    /// # Errors
    /// A sentence.
    pub fn migrate(&mut self, uri: &str) -> Result<(), String> {
        self.execute("migrate", &json!({ "uri": uri })).map(drop)
    }

    /// Ends a migration that is under way. The machine stays.
    ///
    /// # Errors
    /// A sentence.
    pub fn cancel_migration(&mut self) -> Result<(), String> {
        self.execute("migrate_cancel", &json!({})).map(drop)
    }

    /// The latest migration.
    ///
    /// # Errors
    /// A sentence.
    pub fn migration(&mut self) -> Result<Migration, String> {
        let answer = self.execute("query-migrate", &json!({}))?;
        let bytes = |name: &str| answer.get("ram")?.get(name)?.as_u64();
        let progress = bytes("total")
            .zip(bytes("remaining"))
            .map(|(total, remaining)| (total.saturating_sub(remaining), total));
        let status = text(&answer, "status").unwrap_or("none".to_owned());
        Ok(Migration { status, error: text(&answer, "error-desc"), progress })
    }

    /// The memory backends that are files: their names and paths.
    ///
    /// # Errors
    /// A sentence.
    pub fn memory_files(&mut self) -> Result<Vec<(String, PathBuf)>, String> {
        let objects = self.execute("qom-list", &json!({ "path": "/objects" }))?;
        let mut files = Vec::new();
        for object in objects.as_array().unwrap_or(&Vec::new()) {
            let is_file =
                text(object, "type").is_some_and(|kind| kind == "child<memory-backend-file>");
            let Some(name) = text(object, "name").filter(|_| is_file) else { continue };
            let place = json!({ "path": format!("/objects/{name}"), "property": "mem-path" });
            let path = self.execute("qom-get", &place)?;
            files.push((name, PathBuf::from(path.as_str().unwrap_or_default())));
        }
        Ok(files)
    }
}

fn text(value: &Value, name: &str) -> Option<String> {
    value.get(name)?.as_str().map(str::to_owned)
}
