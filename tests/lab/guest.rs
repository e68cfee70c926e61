//! Process 1 of the lab's machine. It makes a usual root and runs the cases that the host asks for.
//! Each case has a process of its own (this program again, with the case's name), so that its death
//! ends nothing else.

mod cases;
mod monitor;
mod pattern;
#[path = "../support/mod.rs"]
mod support;

use cases::{Case, SKIPPED};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::mount::{MountFlags, mount, mount_move};
use rustix::process::{WaitOptions, chdir, chroot, wait};
use rustix::system::{RebootCommand, reboot};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, ExitCode, ExitStatus};

/// The second serial port, with the host at its other end.
const HOST: &str = "/dev/ttyS1";
const PROGRAM: &str = "/bin/hugetlb2";
const TOUCHER: &str = "/bin/toucher";
const SELF: &str = "/bin/lab-guest";
/// A suite prints this line when it has run the one test.
const RAN_ONE: &str = "test result: ok. 1 passed";
/// If the host sends nothing for this time, it has ended, and no other process would turn the
/// machine off.
const IDLE_LIMIT: Timespec = Timespec { tv_sec: 600, tv_nsec: 0 };

fn main() -> ExitCode {
    if let Some(name) = std::env::args().nth(1) {
        return run_case(&name);
    }
    assert_eq!(
        std::process::id(),
        1,
        "this is the init of the lab's machine: cargo test --test lab"
    );
    let served = make_a_root().and_then(|()| mount_the_usual()).and_then(|()| serve());
    if let Err(error) = served {
        eprintln!("lab: {error}");
    }
    let _ = reboot(RebootCommand::PowerOff);
    ExitCode::FAILURE
}

// ---- process 1 ----------------------------------------------------------------------------------

/// Directories of libraries.
const LIBRARIES: [&str; 2] = ["lib", "lib64"];

/// Puts the programs into /bin: of the initramfs, or of a tmpfs that becomes the root.
/// pivot_root(2) cannot leave the initramfs, and the daemon must.
fn make_a_root() -> io::Result<()> {
    if cases::stays_in_the_initramfs() {
        return move_programs(Path::new("/bin"));
    }
    let root = Path::new("/newroot");
    fs::create_dir(root)?;
    mount("root", root, "tmpfs", MountFlags::empty(), None)?;
    move_programs(&root.join("bin"))?;
    for name in LIBRARIES {
        move_files(&Path::new("/").join(name), &root.join(name))?;
    }
    chdir(root)?;
    mount_move(".", "/")?;
    chroot(".")?;
    Ok(chdir("/")?)
}

fn move_programs(directory: &Path) -> io::Result<()> {
    fs::create_dir(directory)?;
    for program in fs::read_dir("/")?.collect::<Result<Vec<_>, _>>()? {
        if program.file_type()?.is_file() {
            let name = if program.file_name() == "init" {
                "lab-guest".into()
            } else {
                program.file_name()
            };
            move_file(&program.path(), &directory.join(name))?;
        }
    }
    Ok(())
}

/// Moves all files below a directory.
fn move_files(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir(to)?;
    for entry in fs::read_dir(from)?.collect::<Result<Vec<_>, _>>()? {
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            move_files(&entry.path(), &target)?;
        } else {
            move_file(&entry.path(), &target)?;
        }
    }
    Ok(())
}

fn move_file(from: &Path, to: &Path) -> io::Result<()> {
    fs::copy(from, to)?;
    fs::remove_file(from)
}

fn mount_the_usual() -> io::Result<()> {
    for (kind, place) in
        [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("tmpfs", "/tmp")]
    {
        fs::create_dir_all(place)?; // the kernel has made /dev in the initramfs
        mount(kind, place, kind, MountFlags::empty(), None)?;
    }
    Ok(())
}

/// Runs cases until the host turns the machine off or ends.
fn serve() -> io::Result<()> {
    let port = File::options().read(true).write(true).open(HOST)?;
    let mut mode = tcgetattr(&port)?;
    mode.make_raw();
    tcsetattr(&port, OptionalActions::Now, &mode)?;
    let mut lines = BufReader::new(port.try_clone()?);
    let mut host = port;
    writeln!(host, "ready")?;
    loop {
        if poll(&mut [PollFd::new(&host, PollFlags::IN)], Some(&IDLE_LIMIT))? == 0 {
            return Ok(());
        }
        let mut line = String::new();
        lines.read_line(&mut line)?;
        let Some(name) = line.trim_end().strip_prefix("run ") else { return Ok(()) };
        writeln!(host, "case {name} begin")?;
        let result = run_in_process(name, &mut host)?;
        writeln!(host, "case {name} {result}")?;
        reap();
    }
}

/// Runs a case, forwards each line of its output at once, and returns the words for the host.
fn run_in_process(name: &str, host: &mut File) -> io::Result<String> {
    let (reader, writer) = io::pipe()?;
    let (mut command, proof) = match name.split_once("::") {
        None => (Command::new(SELF), None),
        Some((suite, _)) => (Command::new(format!("/bin/suite-{suite}")), Some(RAN_ONE)),
    };
    match name.split_once("::") {
        None => command.arg(name),
        Some((_, test)) => command.args(["--exact", test, "--nocapture"]),
    };
    command.env("HUGETLB2_PROGRAM", PROGRAM).env("HUGETLB2_TOUCHER", TOUCHER);
    command.env("RUST_BACKTRACE", "0");
    command.stdout(writer.try_clone()?).stderr(writer);
    let mut child = command.spawn()?;
    drop(command); // closes our copies of the pipe's end
    let (mut latest, mut proven) = (String::new(), proof.is_none());
    for line in BufReader::new(reader).lines() {
        latest = line?;
        proven |= proof.is_some_and(|proof| latest.starts_with(proof));
        writeln!(host, "output {latest}")?;
    }
    let status = child.wait()?;
    Ok(if proven { words(status, &latest) } else { format!("failed {status}, no test was run") })
}

fn words(status: ExitStatus, latest: &str) -> String {
    match status.code() {
        Some(0) => "passed".to_owned(),
        Some(SKIPPED) => format!("skipped {latest}"),
        _ => format!("failed {status}"),
    }
}

/// Collects daemons that have ended: they are children of process 1.
fn reap() {
    while let Ok(Some(_)) = wait(WaitOptions::NOHANG) {}
}

// ---- the process of a case ----------------------------------------------------------------------

fn run_case(name: &str) -> ExitCode {
    let Some(Case { run, .. }) = cases::all().find(|case| case.name == name) else {
        eprintln!("there is no case {name}");
        return ExitCode::FAILURE;
    };
    run(); // a panic ends the process with status 101
    ExitCode::SUCCESS
}
