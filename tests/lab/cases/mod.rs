//! The cases, and the machines that they need. The host reads the names, the guest runs the functions.
#![allow(missing_docs)]

mod compare;
mod containment;
mod errors;
mod handlers;
mod hw;
mod kernel;
mod mixture;
mod pools;

/// What a machine has besides two processors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Machine {
    /// In MiB.
    pub memory: u64,
    /// NUMA nodes, with equal shares of the memory.
    pub nodes: u64,
    /// What the kernel is told besides.
    pub command_line: &'static str,
}

impl Machine {
    pub const SMALL: Self = Self { memory: 640, nodes: 1, command_line: "" };
    pub const TWO_NODES: Self = Self { memory: 1024, nodes: 2, command_line: "" };
    /// With a page of 1 GiB for hugetlbfs, and room for one of ours.
    pub const GIGANTIC: Self = Self { memory: 3072, nodes: 1, command_line: "hugepagesz=1G hugepages=1" };
}

/// A case.
#[allow(dead_code)] // the host runs none, the guest does not care where it is
pub struct Case {
    pub name: &'static str,
    pub machine: Machine,
    /// For one that ends its kernel, on a machine that serves nothing else: what the console says then.
    pub ends_kernel: Option<&'static str>,
    /// Panics where the rule does not hold.
    pub run: fn(),
}

/// `MACHINE: name, name; ...`: a case for each function.
macro_rules! cases {
    ($($machine:ident: $($name:ident),+;)+) => {
        pub const CASES: &[$crate::cases::Case] = &[$($(
            $crate::cases::Case {
                name: stringify!($name),
                machine: $crate::cases::Machine::$machine,
                ends_kernel: None,
                run: $name,
            }
        ),+),+];
    };
}
use cases;

/// All of them. Those that share a machine stand together.
pub fn all() -> impl Iterator<Item = &'static Case> {
    let by_kernel = [kernel::CASES, pools::CASES, errors::CASES];
    by_kernel
        .into_iter()
        .chain([hw::CASES, containment::CASES, mixture::CASES, handlers::CASES, compare::CASES])
        .flatten()
}

/// The programs of docs/HANDLERS.md in C and in Rust, in the machine.
#[allow(dead_code)] // the host does not run them
pub const HANDLER_C: &str = "/bin/handler-c";
#[allow(dead_code)]
pub const HANDLER_RUST: &str = "/bin/handler-rust";

/// Exit status of a case's process that says: skipped, for the reason in the last line.
pub const SKIPPED: i32 = 77;

/// Ends a case that cannot run on this kernel. For its beginning: nothing is cleaned up.
#[allow(dead_code)]
pub fn skip(reason: &str) -> ! {
    println!("{reason}");
    std::process::exit(SKIPPED)
}
