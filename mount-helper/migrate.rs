//! `hugetlb2 migrate`: moves a machine of QEMU to another QEMU, and the losses of its memory with
//! it. Each side has its monitor; a pipe carries the losses.
//!
//! ```text
//!   out, at the source                         in, at the destination
//!   1. stop                                    1. stop: the machine will not run by itself
//!   2. salvage each subpage with known bytes   2. read the losses from the pipe
//!   3. note the losses with the files
//!   4. put zeros in their places
//!   5. cont, if nothing is lost
//!   6. migrate                      memory
//!   ------------------------------------------>
//!   7. write the losses             losses
//!   ------------------------------------------>
//!                                              3. quarantine them again, as hw
//!                                              4. cont
//! ```
//!
//! If frames are to be kept, step 3 makes quarantines of which no byte is known, and waits until
//! QEMU's guard has marked them (`hugetlb2 guard`).
//!
//! QEMU ends by SIGBUS if it reads a quarantined subpage, so no quarantine is left before step 6. A
//! machine with losses stands still from step 1 to the end, so its programs never see these zeros.
//! If a step fails, the source's quarantines come back, and its machine goes on there. If `out` is
//! killed, the machine stands still; the note of step 3 lets the next `out` bring them back.

use crate::mappers::Mapper;
use crate::qemu::Monitor;
use crate::terminal::{Meter, say};
use crate::{attributes, mounts};
use hugetlb2fs::options::parse_number;
use hugetlb2fs::quarantine::{Kind, coalesce, parse_poison};
use hugetlb2fs::units::{Range, SUBPAGE_SIZE};
use rustix::fs::removexattr;
use rustix::io::Errno;
use rustix::process::geteuid;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::fmt::Write as _;
use std::io::{Read, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// The first word of the text in the pipe, and its version.
const HEADING: &str = "hugetlb2-losses 1";

/// The attribute of a file of which quarantines were taken back for a migration.
const NOTE: &str = "user.migration.quarantines";

/// The time between two looks at a migration. QEMU announces its end only if it was asked to.
const PERIOD: Duration = Duration::from_millis(100);

/// The time between two looks for markers, which come within milliseconds.
const GLANCE: Duration = Duration::from_millis(5);

/// A memory backend of QEMU that is a file of a pool.
struct Memory {
    /// The backend's name. Source and destination have the same names.
    name: String,
    file: PathBuf,
    /// Subpages whose bytes are lost.
    lost: Vec<Range>,
    /// Subpages that were quarantined, and have their bytes again.
    salvaged: Vec<Range>,
}

impl Memory {
    /// All of QEMU's.
    fn all(monitor: &mut Monitor) -> Result<Vec<Self>, String> {
        let mut found = Vec::new();
        for (name, file) in monitor.memory_files()? {
            if mounts::is_in_pool(&file) {
                mounts::pool_file(&file)?;
                found.push(Self { name, file, lost: Vec::new(), salvaged: Vec::new() });
            }
        }
        match found.is_empty() {
            true => Err("QEMU has no memory in a file of a hugetlb2 pool here".to_owned()),
            false => Ok(found),
        }
    }

    /// The quarantined subpages.
    fn quarantined(&self) -> Result<Vec<Range>, String> {
        let size = mounts::pool_file(&self.file)?.len();
        let text = attributes::read(&self.file, attributes::POISON).map_err(|e| self.said(e))?;
        let ranges = text.map_or(Ok(Vec::new()), |text| parse_poison(text.as_bytes(), size));
        let ranges = ranges.map_err(|error| format!("{}: {error}", self.file.display()))?;
        Ok(ranges.into_iter().flat_map(|range| range.steps(SUBPAGE_SIZE)).collect())
    }

    /// Gives each quarantined subpage its bytes back, if they are known. The others are lost.
    fn salvage(&mut self) -> Result<(), String> {
        for subpage in self.quarantined()? {
            match attributes::write(&self.file, attributes::REPAIR, &format!("salvage {subpage}")) {
                Ok(()) => self.salvaged.push(subpage),
                Err(Errno::NODATA) => self.lost.push(subpage),
                Err(errno) => return Err(self.said(errno)),
            }
        }
        Ok(())
    }

    /// Puts zeros in the places of what is lost, and notes with the file what was quarantined.
    fn cover(&self) -> Result<(), String> {
        if self.lost.is_empty() {
            return Ok(());
        }
        if !geteuid().is_root() {
            return Err(format!(
                "{}: bytes of it are lost; only root can move them",
                self.file.display()
            ));
        }
        self.write(NOTE, &self.list())?;
        let zeros = lines(&self.lost, |range| format!("zero {range}"));
        self.write(attributes::REPAIR, &zeros)
    }

    /// The quarantines, as [`attributes::LOSSES`] takes them.
    fn list(&self) -> String {
        lines(&self.salvaged, |range| format!("{range} soft"))
            + &lines(&self.lost, |range| format!("{range} hw"))
    }

    /// Quarantines again what was, after a migration that failed.
    fn restore(&self) -> Result<(), String> {
        let noted = attributes::read(&self.file, NOTE).map_err(|errno| self.said(errno))?;
        if let Some(list) = noted {
            self.write(attributes::LOSSES, &list)?;
            self.forget_note();
        } else if !self.salvaged.is_empty() {
            let list = lines(&self.salvaged, |range| range.to_string());
            self.write(attributes::POISON, &list)?;
        }
        Ok(())
    }

    /// Refuses a file that a process maps without `hugetlb2 guard`.
    fn require_guard(&self) -> Result<(), String> {
        let mappers = Mapper::all(&mounts::pool_file(&self.file)?);
        let file = self.file.display();
        if mappers.is_empty() {
            return Err(format!("{file}: no process is seen that maps it"));
        }
        match mappers.iter().find(|mapper| !mapper.is_guarded()) {
            Some(mapper) => Err(format!(
                "{file}: process {} maps it and does not run under `hugetlb2 guard`; without \
                 --keep-frames it needs none",
                mapper.pid
            )),
            None => Ok(()),
        }
    }

    /// Waits until a touch of each of these quarantined subpages is a memory error of the processes
    /// that map the file.
    fn await_markers(&self, lost: &[Range]) -> Result<(), String> {
        const PATIENCE: Duration = Duration::from_secs(10);
        let file = mounts::pool_file(&self.file)?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mappers = Mapper::all(&file);
            let subpages =
                || lost.iter().flat_map(|range| range.subpages_out().steps(SUBPAGE_SIZE));
            let lacks = |mapper: &&Mapper| !subpages().all(|subpage| mapper.has_marker(subpage));
            match mappers.iter().find(lacks) {
                None => return Ok(()),
                Some(mapper) if Instant::now() >= deadline => {
                    return Err(format!(
                        "{}: the guard of process {} has not marked the lost subpages; the \
                         machine stands still",
                        self.file.display(),
                        mapper.pid
                    ));
                }
                Some(_) => std::thread::sleep(GLANCE), // the kernel announces no marker
            }
        }
    }

    fn write(&self, attribute: &str, value: &str) -> Result<(), String> {
        attributes::write(&self.file, attribute, value).map_err(|errno| self.said(errno))
    }

    fn has_note(&self) -> bool {
        attributes::read(&self.file, NOTE).is_ok_and(|note| note.is_some())
    }

    fn forget_note(&self) {
        match removexattr(&self.file, NOTE) {
            Ok(()) | Err(Errno::NODATA) => {}
            Err(errno) => say(format_args!("hugetlb2: {}", self.said(errno))),
        }
    }

    fn said(&self, errno: Errno) -> String {
        attributes::describe(&self.file, errno)
    }
}

/// A line for each run of neighbouring subpages.
fn lines(subpages: &[Range], line: impl Fn(Range) -> String) -> String {
    let runs = coalesce(subpages.iter().map(|subpage| (*subpage, Kind::Hw, 0)));
    runs.into_iter().fold(String::new(), |text, run| text + &line(run.range) + "\n")
}

// ---- the source ---------------------------------------------------------------------------------

/// Moves the machine of the monitor at `socket` to `uri`, and writes the losses to standard output.
///
/// # Errors
/// A sentence. The machine is where it was, and as it was.
pub fn out(socket: &Path, uri: &str) -> Result<(), String> {
    let is_asked_to_end = Arc::new(AtomicBool::new(false));
    for signal in [SIGHUP, SIGINT, SIGTERM] {
        let registered = signal_hook::flag::register(signal, is_asked_to_end.clone());
        registered.map_err(|error| format!("signals: {error}"))?;
    }
    let mut monitor = Monitor::connect(socket)?;
    let mut memories = Memory::all(&mut monitor)?;
    let was_running = match monitor.state()?.as_str() {
        "running" => true,
        "paused" => false,
        other => return Err(format!("the machine is neither running nor paused, but {other}")),
    };
    restore_an_earlier_try(&memories, was_running)?;
    let moved = prepare(&mut monitor, &mut memories, was_running)
        .and_then(|()| follow(&mut monitor, uri, &is_asked_to_end));
    if let Err(why) = moved {
        return Err(give_up(&mut monitor, &memories, was_running, &why));
    }
    match monitor.state().as_deref() {
        // QEMU may end as soon as its machine has gone.
        Ok("postmigrate") | Err(_) => memories.iter().for_each(Memory::forget_note),
        // A snapshot in the background: a copy of the machine has gone, and the machine stays.
        Ok(_) => restore(&mut monitor, &memories, was_running)?,
    }
    let text = losses(&memories, was_running);
    std::io::stdout().write_all(text.as_bytes()).map_err(|error| {
        format!(
            "the machine has moved and stands still, as its losses cannot be written ({error}). \
             `migrate in` there takes them on standard input:\n{text}"
        )
    })
}

/// Quarantines again what a killed `out` has left as zeros.
fn restore_an_earlier_try(memories: &[Memory], is_running: bool) -> Result<(), String> {
    let noted: Vec<&Memory> = memories.iter().filter(|memory| memory.has_note()).collect();
    match noted.first() {
        Some(memory) if is_running => Err(format!(
            "{}: an earlier migration was cut short, and the machine goes on with zeros in place \
             of lost bytes; the attribute {NOTE} has the places. Remove it to accept that",
            memory.file.display()
        )),
        _ => noted.into_iter().try_for_each(Memory::restore),
    }
}

/// Leaves no subpage quarantined. The machine runs at the end only if no bytes are lost.
fn prepare(
    monitor: &mut Monitor,
    memories: &mut [Memory],
    was_running: bool,
) -> Result<(), String> {
    let mut quarantined = 0;
    for memory in &*memories {
        quarantined += memory.quarantined()?.len();
    }
    if quarantined == 0 {
        return Ok(());
    }
    if was_running {
        monitor.stop()?;
    }
    memories.iter_mut().try_for_each(Memory::salvage)?;
    memories.iter().try_for_each(Memory::cover)?;
    let lost: usize = memories.iter().map(|memory| memory.lost.len()).sum();
    match lost {
        0 if was_running => monitor.go_on(),
        0 => Ok(()),
        _ => {
            say(format_args!(
                "hugetlb2: {lost} subpages are lost; the machine stands still until it has moved"
            ));
            Ok(())
        }
    }
}

/// Moves the machine.
fn follow(monitor: &mut Monitor, uri: &str, is_asked_to_end: &AtomicBool) -> Result<(), String> {
    monitor.migrate(uri)?;
    let meter = Meter::new("moving memory");
    loop {
        let now = monitor.migration()?;
        match now.status.as_str() {
            "completed" => return Ok(()),
            "failed" => {
                let why = now.error.unwrap_or("QEMU tells no reason".to_owned());
                return Err(format!("the migration has failed: {why}"));
            }
            "cancelled" => return Err("the migration was cancelled".to_owned()),
            _ if is_asked_to_end.swap(false, Ordering::Relaxed) => monitor.cancel_migration()?,
            _ => {}
        }
        if let Some((done, total)) = now.progress {
            meter.show(done, total);
        }
        std::thread::sleep(PERIOD);
    }
}

/// Makes the source as it was.
fn restore(monitor: &mut Monitor, memories: &[Memory], was_running: bool) -> Result<(), String> {
    memories.iter().try_for_each(Memory::restore)?;
    match monitor.state()?.as_str() {
        "running" => Ok(()),
        _ if was_running => monitor.go_on(),
        _ => Ok(()),
    }
}

/// The same after a failure. Returns the sentence about it.
fn give_up(monitor: &mut Monitor, memories: &[Memory], was_running: bool, why: &str) -> String {
    match restore(monitor, memories, was_running) {
        Ok(()) => format!("{why}. The machine is as it was"),
        Err(also) => format!("{why}. Then: {also}"),
    }
}

/// The text for the pipe.
fn losses(memories: &[Memory], was_running: bool) -> String {
    let mut text = format!("{HEADING}\n");
    for memory in memories {
        text += &lines(&memory.lost, |range| format!("lost {} {range}", memory.name));
    }
    let _ = writeln!(text, "moved {}", if was_running { "running" } else { "paused" });
    text
}

// ---- the destination ----------------------------------------------------------------------------

/// Reads the losses from standard input, quarantines them in the memory of the machine that has
/// come to the monitor at `socket`, and has the machine go on.
///
/// # Errors
/// A sentence. The machine, if it has come, stands still.
pub fn into(socket: &Path, keeps_frames: bool) -> Result<(), String> {
    let mut monitor = Monitor::connect(socket)?;
    let memories = Memory::all(&mut monitor)?;
    if keeps_frames {
        memories.iter().try_for_each(Memory::require_guard)?;
    }
    if monitor.state()? == "inmigrate" {
        monitor.stop()?;
    }
    let mut text = String::new();
    let read = std::io::stdin().read_to_string(&mut text);
    read.map_err(|error| format!("standard input: {error}"))?;
    let (lists, runs) = parse(&text)?;
    while monitor.state()? == "inmigrate" {
        std::thread::sleep(PERIOD);
    }
    match monitor.state()?.as_str() {
        "paused" => {}
        "running" if lists.is_empty() => return Ok(()), // it has come before this command
        other => {
            return Err(format!(
                "the machine has come and is {other}: its programs may have seen zeros in place \
                 of lost bytes"
            ));
        }
    }
    for (name, _) in &lists {
        if !memories.iter().any(|memory| memory.name == *name) {
            return Err(format!("QEMU has no memory backend {name} in a pool here"));
        }
    }
    let kind = if keeps_frames { "lost" } else { "hw" };
    for (name, lost) in &lists {
        let list = lines(lost, |range| format!("{range} {kind}"));
        for memory in memories.iter().filter(|memory| memory.name == *name) {
            memory.write(attributes::LOSSES, &list)?;
            if keeps_frames {
                memory.await_markers(lost)?;
            }
        }
    }
    if !lists.is_empty() {
        say(format_args!("hugetlb2: {}", prospect(keeps_frames)));
    }
    if runs { monitor.go_on() } else { Ok(()) }
}

/// The sentence on what the machine will see of the losses.
fn prospect(keeps_frames: bool) -> &'static str {
    match hugetlb2fs::sys::memory_failures() {
        _ if keeps_frames => {
            "the lost subpages are memory errors of this QEMU: a program of the machine that uses one gets SIGBUS (BUS_MCEERR_AR)"
        }
        Some(_) => {
            "the lost subpages are memory errors here: under KVM, a program of the machine that uses one gets SIGBUS (BUS_MCEERR_AR)"
        }
        None => {
            "the lost subpages are quarantined, as this kernel has no memory errors: QEMU ends or pauses the machine if it uses one"
        }
    }
}

/// A backend, and the parts of it that are lost.
type Lost = (String, Vec<Range>);

/// Parses the text of the pipe: the list of each backend with losses, and whether the machine ran.
///
/// # Errors
/// A sentence.
fn parse(text: &str) -> Result<(Vec<Lost>, bool), String> {
    let mut rows = text.lines();
    if rows.next() != Some(HEADING) {
        return Err(
            "standard input has no losses of `hugetlb2 migrate out` of this version".to_owned()
        );
    }
    let mut lists: Vec<Lost> = Vec::new();
    for row in rows {
        match row.split(' ').collect::<Vec<_>>()[..] {
            ["lost", name, offset, length] => {
                let range = parse_number(offset).zip(parse_number(length));
                let range = range.and_then(|(at, length)| Range::checked_at(at, length));
                let range = range.ok_or_else(|| misunderstood(row))?;
                match lists.iter_mut().find(|list| list.0 == name) {
                    Some(list) => list.1.push(range),
                    None => lists.push((name.to_owned(), vec![range])),
                }
            }
            ["moved", how @ ("running" | "paused")] => return Ok((lists, how == "running")),
            _ => return Err(misunderstood(row)),
        }
    }
    Err("the machine has not moved: `hugetlb2 migrate out` has failed, and its machine stays"
        .to_owned())
}

fn misunderstood(row: &str) -> String {
    format!("standard input: {row:?} is not understood")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_make_one_line() {
        let subpage = |number: u64| Range::at(number * SUBPAGE_SIZE, SUBPAGE_SIZE);
        let text = lines(&[subpage(1), subpage(2), subpage(4)], |range| format!("{range} hw"));
        assert_eq!(text, "0x1000 0x2000 hw\n0x4000 0x1000 hw\n");
    }

    #[test]
    fn the_pipe_carries_losses_and_the_end() {
        let memory = |name: &str, lost: &[u64]| Memory {
            name: name.to_owned(),
            file: PathBuf::new(),
            lost: lost.iter().map(|at| Range::at(*at, SUBPAGE_SIZE)).collect(),
            salvaged: Vec::new(),
        };
        let text =
            losses(&[memory("a", &[0, 0x5000]), memory("b", &[]), memory("c", &[0x1000])], true);
        let subpages = |at: &[u64]| at.iter().map(|at| Range::at(*at, SUBPAGE_SIZE)).collect();
        let a = ("a".to_owned(), subpages(&[0, 0x5000]));
        let c = ("c".to_owned(), subpages(&[0x1000]));
        assert_eq!(parse(&text), Ok((vec![a, c], true)));
        assert_eq!(parse(&losses(&[], false)), Ok((Vec::new(), false)));
        let cut = text.strip_suffix("moved running\n").unwrap();
        for wrong in ["", "moved running\n", cut, &format!("{HEADING}\nlost a 1\nmoved running\n")]
        {
            parse(wrong).unwrap_err();
        }
    }
}
