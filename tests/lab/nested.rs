//! Process 1 of a machine within the lab's machine: programs that use known subpages, or a known
//! part of the kernel, each checked again and again. The serial console has a line for each event.

use hugetlb2fs::sys::sigbus::Touchable;
use hugetlb2fs::units::SUBPAGE_SIZE;
use memmap2::{Advice, MmapMut, MmapRaw};
use rustix::mount::{MountFlags, mount};
use rustix::process::{WaitOptions, wait};
use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::process::{Command, exit};
use std::time::Duration;

#[path = "pattern.rs"]
mod pattern;

/// The programs: number, subpages, and its kind. A survivor outlives the loss of its subpage and
/// tells it. A reader has no subpage: it has the kernel read a text of the kernel's.
const PROGRAMS: [(u64, u64, &str); 6] = [
    (1, 1, "worker"),
    (2, 1, "worker"),
    (3, 1, "survivor"),
    (4, 1, "survivor"),
    (5, 0, "reader"),
    (9, 2000, "worker"),
];

/// Writes a line at once, so that the lines of several programs are not mixed.
macro_rules! say {
    ($($word:tt)*) => {
        tell(&std::io::stdout(), &format!($($word)*))
    };
}

fn tell(mut console: impl Write, line: &str) {
    let _ = console.write_all(format!("{line}\n").as_bytes());
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, word, number, subpages] = &arguments[..]
        && let (Ok(number), Ok(subpages)) = (number.parse(), subpages.parse())
    {
        return match word.as_str() {
            "survivor" => survive(number),
            "reader" => read(number),
            _ => work(number, subpages),
        };
    }
    for (kind, place) in [("devtmpfs", "/dev"), ("proc", "/proc")] {
        let _ = std::fs::create_dir(place);
        let _ = mount(kind, place, kind, MountFlags::empty(), None);
    }
    let console = File::options().read(true).write(true).open("/dev/ttyS0").expect("a console");
    let mut programs = HashMap::new();
    for (number, subpages, word) in PROGRAMS {
        let mut command = Command::new("/proc/self/exe");
        command.stdout(console.try_clone().expect("a descriptor"));
        command.args([word, &number.to_string(), &subpages.to_string()]);
        programs.insert(command.spawn().expect("a program").id() as i32, number);
    }
    while let Ok(Some((pid, status))) = wait(WaitOptions::empty()) {
        let number = programs.get(&pid.as_raw_nonzero().get()).copied().unwrap_or(0);
        let ended = (status.exit_status(), status.terminating_signal());
        tell(&console, &format!("program {number} has ended: {:?} {:?}", ended.0, ended.1));
    }
    loop {
        std::thread::sleep(Duration::from_secs(1)); // process 1 must not end
    }
}

/// Memory with the pattern of program `number`.
fn filled(number: u64, subpages: u64) -> MmapMut {
    let mut memory = MmapMut::map_anon((subpages * SUBPAGE_SIZE) as usize).expect("memory");
    memory.advise(Advice::NoHugePage).expect("memory in subpages");
    for (page, bytes) in (0..).zip(memory.chunks_exact_mut(SUBPAGE_SIZE as usize)) {
        bytes.copy_from_slice(&pattern::of(number, page));
    }
    say!("program {number} is ready");
    memory
}

/// Calls `look` ten times a second, and says every second that it has.
fn again_and_again(number: u64, mut look: impl FnMut()) {
    for round in 0u64.. {
        look();
        if round.is_multiple_of(10) {
            say!("program {number}: round {round}, all right");
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Knows nothing of SIGBUS.
fn work(number: u64, subpages: u64) {
    let memory = filled(number, subpages);
    again_and_again(number, || {
        for (page, bytes) in (0..).zip(memory.chunks_exact(SUBPAGE_SIZE as usize)) {
            if bytes != pattern::of(number, page) {
                say!("program {number}: WRONG BYTES in subpage {page}");
                exit(1);
            }
        }
    });
}

/// Reads the kernel's version. The kernel makes it of the text `linux_proc_banner`, which it reads
/// for nothing else.
fn read(number: u64) {
    let version = || std::fs::read("/proc/version").expect("a version");
    let first = version();
    say!("program {number} is ready");
    again_and_again(number, || {
        if version() != first {
            say!("program {number}: WRONG BYTES");
            exit(1);
        }
    });
}

/// Touches its subpage so that it survives a SIGBUS.
fn survive(number: u64) {
    let meant = pattern::of(number, 0);
    let memory = Touchable::new(MmapRaw::from(filled(number, 1)), 0).expect("a handler");
    again_and_again(number, || {
        for (at, meant) in (0..).zip(meant).step_by(64) {
            match memory.load(at) {
                Ok(byte) if byte == meant => {}
                Ok(_) => {
                    say!("program {number}: WRONG BYTES");
                    exit(1);
                }
                Err(hit) => {
                    let (code, lsb, subpage) = (hit.code, hit.lsb, hit.subpage.0);
                    say!("program {number}: SIGBUS {code}, lsb {lsb}, at subpage {subpage}");
                    exit(0);
                }
            }
        }
    });
}
