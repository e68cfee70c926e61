//! The lab: cases that need a kernel with real memory errors (CONFIG_MEMORY_FAILURE), several NUMA
//! nodes, or a boot of their own. They run on Debian's kernel in a machine that QEMU emulates. The
//! project's programs are built as for a release there, and the packages that they use are not.
//!
//! ```text
//!   this program (host)                         the machine
//!     |                                            | boots kernel and initramfs (/init: lab-guest)
//!     |  second serial port           ready        |
//!     |<-------------------------------------------|
//!     |  run NAME                                  |
//!     |------------------------------------------->| a process of its own runs the case
//!     |  output LINE, ...                          |
//!     |<-------------------------------------------|
//!     |  case NAME passed|failed WHY|skipped WHY   |
//!     |<-------------------------------------------|
//!     |  off                                       |
//!     |------------------------------------------->| reboot(2)
//! ```
//!
//! The first serial port is the kernel's console. The lab boots a machine when a case asks for one
//! of its kind and none is idle, so two cases at once run on two machines. A machine runs one case
//! after the other. After a case that failed or did not end in time, the lab gives the machine up.
//!
//! Every case is a test of its own here: `cargo test --test lab NAME`. The lab needs its kernel
//! (`tests/lab/fetch-kernel`), for a machine within the machine KVM and QEMU 10
//! (`tests/lab/fetch-nested`), and Debian's qemu-system-x86, qemu-utils, numactl and
//! default-jdk-headless; `tests/run` installs all.

mod boot;
mod cases;
mod image;
mod java;
mod monitor;
mod pattern;
mod suites;
#[path = "../support/mod.rs"]
mod support;
mod vm;
mod vm_devices;
mod vm_documented;
mod vm_features;
mod vm_postcopy;
mod vm_snapshots;

use boot::{Boot, Verdict};
use cases::Machine;
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use std::cmp::Reverse;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, MutexGuard};

/// The machines that run and have no case at the moment.
#[derive(Default)]
struct Lab {
    idle: Mutex<Vec<(Machine, Boot)>>,
}

impl Lab {
    fn idle(&self) -> MutexGuard<'_, Vec<(Machine, Boot)>> {
        self.idle.lock().expect("no panic while the list is open")
    }

    /// A machine of this kind, with its kernel ready for a case. If none is idle, boots one in
    /// place of an idle machine of another kind, so there are no more machines than cases at once.
    fn machine(&self, kind: Machine) -> Result<Boot, String> {
        let (same, other) = {
            let mut idle = self.idle();
            idle.retain_mut(|(_, boot)| !boot.has_ended());
            let same = idle.iter().position(|(machine, _)| *machine == kind);
            let same = same.map(|place| idle.remove(place).1);
            let makes_room = same.is_none() && !idle.is_empty();
            (same, makes_room.then(|| idle.remove(0).1))
        };
        if let Some(other) = other {
            other.shut_down();
        }
        same.map_or_else(|| Boot::start(kind), Ok)
    }

    /// Runs the case `name` on such a machine. A case with `ends_kernel` has a machine of its own.
    fn run(
        &self,
        name: &str,
        kind: Machine,
        ends_kernel: Option<&str>,
    ) -> Result<Completion, Failed> {
        let mut boot = match ends_kernel {
            Some(_) => Boot::start(kind)?,
            None => self.machine(kind)?,
        };
        let report = boot.run(name);
        if matches!(report.verdict, Verdict::Passed | Verdict::Skipped(_)) {
            self.idle().push((kind, boot));
        }
        report.judge(name, ends_kernel)
    }

    /// Shuts the machines down as an administrator would.
    fn shut_down(&self) {
        let idle = std::mem::take(&mut *self.idle());
        idle.into_iter().for_each(|(_, boot)| boot.shut_down());
    }
}

/// A case, or a test of a suite.
struct OnMachine {
    name: String,
    kind: Machine,
    ends_kernel: Option<&'static str>,
}

/// All of these, and the reason if the suites cannot be listed. Those of one kind of machine stand
/// together, so that few machines are booted. The largest machines come first: their cases take
/// longest.
fn on_machines() -> (Vec<OnMachine>, Option<Failed>) {
    let (names, failed) = match suites::tests() {
        Ok(names) => (names, None),
        Err(why) => (Vec::new(), Some(why)),
    };
    let of_suites =
        names.into_iter().map(|name| OnMachine { name, kind: suites::MACHINE, ends_kernel: None });
    let cases = cases::all().map(|case| OnMachine {
        name: case.name.to_owned(),
        kind: case.machine,
        ends_kernel: case.ends_kernel,
    });
    let mut all: Vec<OnMachine> = cases.chain(of_suites).collect();
    all.sort_by_key(|one| {
        (Reverse(one.kind.memory), one.kind.nodes, one.kind.hmat, one.kind.command_line)
    });
    (all, failed)
}

fn main() -> ExitCode {
    support::limits::allow(1800);
    let arguments = Arguments::from_args();
    let lab = Arc::new(Lab::default());
    let (on_machines, failed) = on_machines();
    let mut trials: Vec<Trial> =
        [vm::TESTS, vm_devices::TESTS, vm_documented::TESTS, vm_features::TESTS, java::TESTS]
            .into_iter()
            .flatten()
            .map(|(name, run)| {
                Trial::test(*name, move || {
                    run();
                    Ok(())
                })
            })
            .collect();
    let of_qemu_10 = vm_snapshots::TESTS.iter().chain(vm_postcopy::TESTS);
    trials.extend(of_qemu_10.map(|(name, run)| {
        Trial::ignorable_test(*name, move || {
            if !boot::qemu_10().exists() {
                return Ok(Completion::ignored_with(
                    "no QEMU 10 is there: tests/lab/fetch-nested fetches it",
                ));
            }
            run();
            Ok(Completion::Completed)
        })
    }));
    trials.extend(on_machines.into_iter().map(|OnMachine { name, kind, ends_kernel }| {
        let lab = lab.clone();
        Trial::ignorable_test(name.clone(), move || lab.run(&name, kind, ends_kernel))
    }));
    trials.extend(failed.map(|why| Trial::test("the_suites_can_be_listed", move || Err(why))));
    let conclusion = libtest_mimic::run(&arguments, trials);
    lab.shut_down();
    conclusion.exit_code()
}
