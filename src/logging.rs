//! Where the daemon's log goes: a file that the admin names, the system log, or the kernel's.

use env_logger::{Builder, Target};
use log::{Level, LevelFilter};
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::net::UnixDatagram;

/// Sends each record to the system log as one datagram (RFC 3164, syslog(3)).
struct SystemLog(UnixDatagram);

impl Write for SystemLog {
    fn write(&mut self, record: &[u8]) -> io::Result<usize> {
        self.0.send(record.trim_ascii_end())?;
        Ok(record.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Opens the log, for as long as the process lives: to `path`, or else to the system's.
///
/// # Errors
/// Where `path` cannot be opened for appending. A machine without a system log is served by its kernel log.
pub fn start(path: Option<&str>) -> io::Result<()> {
    let mut builder = Builder::new();
    builder.filter_level(LevelFilter::Info).parse_env("HUGETLB2_LOG");
    match path {
        Some(path) => {
            let file = OpenOptions::new().create(true).append(true).open(path)?;
            builder.target(Target::Pipe(Box::new(file))).format(|out, record| {
                let time = crate::sys::unix_time();
                writeln!(
                    out,
                    "{time} hugetlb2fsd[{}] {}: {}",
                    std::process::id(),
                    record.level(),
                    record.args()
                )
            });
        }
        None => {
            builder.target(Target::Pipe(system_log())).format(|out, record| {
                let priority = DAEMON_FACILITY | severity(record.level());
                writeln!(out, "<{priority}>hugetlb2fsd[{}]: {}", std::process::id(), record.args())
            });
        }
    }
    builder.init();
    Ok(())
}

const DAEMON_FACILITY: u8 = 3 << 3;

fn severity(level: Level) -> u8 {
    match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    }
}

fn system_log() -> Box<dyn Write + Send> {
    let socket = UnixDatagram::unbound().and_then(|socket| {
        socket.connect("/dev/log")?;
        Ok(socket)
    });
    match (socket, OpenOptions::new().write(true).open("/dev/kmsg")) {
        (Ok(socket), _) => Box::new(SystemLog(socket)),
        (Err(_), Ok(kmsg)) => Box::new(kmsg),
        (Err(_), Err(_)) => Box::new(io::sink()),
    }
}
