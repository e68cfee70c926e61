//! The lab: cases that need a kernel with real memory errors (CONFIG_MEMORY_FAILURE), several NUMA
//! nodes, or a boot of their own. They run on Debian's kernel in a machine that QEMU emulates, with
//! the programs that users run.
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
//! The first serial port is the kernel's console. The lab boots a machine when the first case asks
//! for one of its kind. The machine runs one case after the other. After a case that failed or did
//! not end in time, the lab gives the machine up.
//!
//! Every case is a test of its own here: `cargo test --test lab NAME`. The lab needs its kernel
//! (`tests/lab/fetch-kernel`) and Debian's qemu-system-x86; `tests/run` installs both.

mod boot;
mod cases;
mod image;
mod suites;
#[path = "../support/mod.rs"]
mod support;
mod vm;

use boot::{Boot, Verdict};
use cases::Machine;
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use std::collections::HashMap;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};

/// A machine, if it runs, for one case at a time.
type Slot = Arc<Mutex<Option<Boot>>>;

/// The machines that cases have asked for.
#[derive(Default)]
struct Lab {
    slots: Mutex<HashMap<Machine, Slot>>,
}

impl Lab {
    fn slot(&self, machine: Machine) -> Slot {
        self.slots
            .lock()
            .expect("no panic while the table is open")
            .entry(machine)
            .or_default()
            .clone()
    }

    /// Runs the case `name` on such a machine. A case with `ends_kernel` has a machine of its own.
    fn run(
        &self,
        name: &str,
        machine: Machine,
        ends_kernel: Option<&str>,
    ) -> Result<Completion, Failed> {
        let slot = match ends_kernel {
            Some(_) => Slot::default(),
            None => self.slot(machine),
        };
        // A poisoned lock means that another case's thread panicked while it used the machine. The
        // machine is in an unknown state.
        let mut boot = slot.lock().unwrap_or_else(|poisoned| {
            let mut boot = poisoned.into_inner();
            *boot = None;
            boot
        });
        if boot.as_mut().is_none_or(Boot::has_ended) {
            *boot = Some(Boot::start(machine)?);
        }
        let report = boot.as_mut().expect("it was started").run(name);
        if !matches!(report.verdict, Verdict::Passed | Verdict::Skipped(_)) {
            *boot = None;
        }
        drop(boot);
        report.judge(name, ends_kernel)
    }

    /// Shuts the machines down as an administrator would.
    fn shut_down(&self) {
        for slot in self.slots.lock().expect("no panic while the table is open").values() {
            if let Some(boot) = slot.lock().ok().and_then(|mut boot| boot.take()) {
                boot.shut_down();
            }
        }
    }
}

fn main() -> ExitCode {
    support::limits::allow(1800);
    let arguments = Arguments::from_args();
    let lab = Arc::new(Lab::default());
    let trial = |name: String, machine: Machine, ends_kernel: Option<&'static str>| {
        let lab = lab.clone();
        Trial::ignorable_test(name.clone(), move || lab.run(&name, machine, ends_kernel))
    };
    let cases =
        cases::all().map(|case| trial(case.name.to_owned(), case.machine, case.ends_kernel));
    let mut trials: Vec<Trial> = cases.collect();
    match suites::tests() {
        Ok(names) => {
            trials.extend(names.into_iter().map(|name| trial(name, suites::MACHINE, None)))
        }
        Err(why) => trials.push(Trial::test("the_suites_can_be_listed", move || Err(why))),
    }
    trials.extend(vm::TESTS.iter().map(|(name, run)| {
        Trial::test(*name, move || {
            run();
            Ok(())
        })
    }));
    let conclusion = libtest_mimic::run(&arguments, trials);
    lab.shut_down();
    conclusion.exit_code()
}
