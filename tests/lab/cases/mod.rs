//! The cases, and the machines that they need. The host reads the names, and the guest runs the
//! functions.
#![allow(missing_docs)]

mod compare;
mod containment;
mod devices;
mod errors;
mod gigantic;
mod guarded;
mod guests;
mod handlers;
mod homes;
mod hw;
mod kernel;
mod mixture;
mod moves;
mod nodes;
mod parts;
mod placement;
mod policies;
mod pools;
mod ready;
mod targets;

#[allow(unused_imports)] // the host looks at the disk and the memory
pub use devices::{DISK_SUBPAGES, FIRST_PATTERN};

/// The properties of a machine besides its two processors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Machine {
    /// In MiB.
    pub memory: u64,
    pub processors: u32,
    /// NUMA nodes, with equal shares of the memory. The first two have a processor each, and the
    /// others have memory only.
    pub nodes: u64,
    /// The firmware tells latencies and bandwidths (HMAT), and not only distances.
    pub hmat: bool,
    /// Further programs are there: QEMU, numactl(8), and ours with kill points (/lib/killable).
    pub programs: bool,
    /// KVM, QEMU 10 and a machine to run within are there (/lib/nested).
    pub nested: bool,
    /// QEMU 10 emulates it, and not Debian's.
    pub by_qemu_10: bool,
    /// Further words for the kernel's command line.
    pub command_line: &'static str,
}

impl Machine {
    pub const SMALL: Self = Self {
        memory: 640,
        processors: 2,
        nodes: 1,
        hmat: false,
        programs: false,
        nested: false,
        by_qemu_10: false,
        command_line: "",
    };
    pub const TWO_NODES: Self = Self { memory: 1024, nodes: 2, hmat: true, ..Self::SMALL };
    pub const TWO_NODES_WITH_PROGRAMS: Self = Self { programs: true, ..Self::TWO_NODES };
    pub const FOUR_NODES: Self = Self { memory: 1024, nodes: 4, hmat: true, ..Self::SMALL };
    pub const DISTANT_NODES: Self = Self { memory: 768, nodes: 3, ..Self::SMALL };
    /// Each node has memory for a page of 1 GiB, and for the same size of others.
    pub const TWO_LARGE_NODES: Self = Self { memory: 4096, programs: true, ..Self::TWO_NODES };
    /// The kernel does not clear memory when it is taken; Debian's does, if it is not told so.
    pub const UNCLEARED: Self = Self { command_line: "init_on_alloc=0", ..Self::SMALL };
    /// Its cases run in the initramfs: process 1 stays there.
    pub const INITRAMFS: Self = Self { command_line: IN_THE_INITRAMFS, ..Self::SMALL };
    /// It runs a machine within. It has one processor, as the machine within does not go on if
    /// QEMU takes two in turns.
    pub const NESTED: Self = Self { memory: 1152, processors: 1, nested: true, ..Self::SMALL };
    /// With a page of 1 GiB for hugetlbfs, and memory for one of ours.
    pub const GIGANTIC: Self =
        Self { memory: 3072, command_line: "hugepagesz=1G hugepages=1", ..Self::SMALL };
}

/// The kernel puts a word `name=value` of its command line that it does not know into the
/// environment of process 1.
const IN_THE_INITRAMFS: &str = "lab_root=initramfs";

/// True if process 1 was told to stay in the initramfs.
#[allow(dead_code)] // the host asks for it, the guest does it
pub fn stays_in_the_initramfs() -> bool {
    IN_THE_INITRAMFS
        .split_once('=')
        .is_some_and(|(name, value)| std::env::var(name).as_deref() == Ok(value))
}

/// A case.
#[allow(dead_code)] // the host calls no `run`, and the guest needs no `machine`
pub struct Case {
    pub name: &'static str,
    pub machine: Machine,
    /// Set for a case that ends its kernel, on a machine of its own: the console's last words.
    pub ends_kernel: Option<&'static str>,
    /// Panics if the rule does not hold.
    pub run: fn(),
}

/// `MACHINE: name, name; ...` makes a case for each function.
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

/// All cases. The cases of one machine stand together.
pub fn all() -> impl Iterator<Item = &'static Case> {
    let by_kernel = [
        kernel::CASES,
        devices::CASES,
        pools::CASES,
        ready::CASES,
        parts::CASES,
        homes::CASES,
        nodes::CASES,
        placement::CASES,
        policies::CASES,
        moves::CASES,
        targets::CASES,
    ];
    by_kernel
        .into_iter()
        .chain([
            errors::CASES,
            hw::CASES,
            containment::CASES,
            gigantic::CASES,
            guarded::CASES,
            guests::CASES,
            mixture::CASES,
            handlers::CASES,
            compare::CASES,
        ])
        .flatten()
}

/// The programs of docs/HANDLERS.md in C and in Rust, in the guest.
#[allow(dead_code)] // the host does not run them
pub const HANDLER_C: &str = "/bin/handler-c";
#[allow(dead_code)]
pub const HANDLER_RUST: &str = "/bin/handler-rust";

/// A case's process exits with this status to say: skipped. Its last line of output is the reason.
pub const SKIPPED: i32 = 77;

/// Loads a module of the kernel, unless an earlier case has loaded it.
#[allow(dead_code)]
pub fn load_module(path: &str, parameters: &std::ffi::CStr) {
    let module = std::fs::File::open(path).unwrap();
    match rustix::system::finit_module(module, parameters, 0) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => {}
        Err(errno) => panic!("{path}: {errno}"),
    }
}

/// The bytes of a row of /proc/meminfo (proc(5)).
#[allow(dead_code)]
pub fn meminfo(row: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap();
    let value = |line: &str| line.strip_prefix(row)?.strip_prefix(':').map(str::to_owned);
    let value = text.lines().find_map(value).expect("it is counted");
    value.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

/// Ends a case that cannot run on this kernel. A case calls it at its beginning, because it cleans
/// nothing up.
#[allow(dead_code)]
pub fn skip(reason: &str) -> ! {
    println!("{reason}");
    std::process::exit(SKIPPED)
}
