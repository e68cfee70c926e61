//! The commands of docs/OPERATIONS.md that move a machine with its losses. A case of the lab runs
//! those for a quarantine in the memory of a machine that runs under KVM.

use crate::support::documents::{blocks, document, quoted, subsection};
use crate::support::{LOSSES, POISON, REPAIR, SUBPAGE, get, hugetlb2, poison, run, set};
use crate::vm::{DOCUMENTED, MACHINE, Vm, free_port, pool, unmount};
use std::path::Path;
use std::process::Command;

pub const TESTS: &[(&str, fn())] = &[(
    "a_machine_moves_with_its_losses_by_the_documented_line",
    a_machine_moves_with_its_losses_by_the_documented_line,
)];

/// The arguments of QEMU in `text` that begin with this one.
fn arguments<'a>(text: &'a str, first: &str) -> Vec<&'a str> {
    let mut all = quoted(text).map(|words| words.split_whitespace().collect::<Vec<_>>());
    all.find(|words| words.first() == Some(&first)).expect("the document has the arguments")
}

/// One subpage of the machine is quarantined and has its bytes, and those of another are lost.
fn a_machine_moves_with_its_losses_by_the_documented_line() {
    let operations = document("docs/OPERATIONS.md");
    let text = subsection(&operations, "A memory error in a virtual machine");
    let (pool, work) = (pool(2), tempfile::tempdir().unwrap());
    let (memory, other) = (pool.join("vm0"), pool.join("vm1"));
    let [here, there] = ["here", "there"].map(|name| work.path().join(name).display().to_string());
    let port = free_port().to_string();
    let start = |memory: &Path, socket: &str, arguments: &[&str]| {
        let own = |word: &&str| word.replace("SOCKET", socket).replace("PORT", &port);
        let own: Vec<String> = arguments.iter().map(own).collect();
        let own: Vec<&str> = own.iter().map(String::as_str).collect();
        Vm::spawn_as(MACHINE, DOCUMENTED, memory, work.path(), &own)
    };
    let mut both = arguments(text, "-qmp");
    let mut vm = start(&memory, &here, &both);
    vm.boot.wait_until_ready().unwrap();
    vm.remembers();
    both.extend(arguments(text, "-incoming"));
    let mut target = start(&other, &there, &both);
    target.tell("info status");
    let [lost, known] = [0, 1].map(|number| vm.unused_folios().nth(number).expect("a folio"));
    poison(&memory, known, SUBPAGE).unwrap();
    set(&memory, LOSSES, format!("{lost} {SUBPAGE} hw")).unwrap();
    let line = blocks(text, "text").pop().expect("a line");
    let line = line.replace("ssh HOST ", "").replace("HOST", "127.0.0.1").replace("PORT", &port);
    let line = line.replacen("SOCKET", &here, 1).replace("SOCKET", &there);
    let programs = Path::new(hugetlb2().get_program()).parent().expect("a directory").to_owned();
    let mut shell = Command::new("bash");
    shell.args(["-euo", "pipefail", "-c", &format!("PATH=$0:$PATH\n{line}")]).arg(programs);
    run(&mut shell);
    drop(vm);
    target.remembers();
    let list = get(&other, POISON).unwrap();
    assert_eq!(list.lines().count(), 1, "{list}");
    assert!(list.starts_with(&format!("{lost:#x} 0x1000 ")), "{list}");
    target.works();
    set(&other, REPAIR, "zero all").unwrap();
    target.boot.shut_down();
    unmount(pool);
}
