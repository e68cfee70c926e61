//! Migration and snapshots as QEMU 10 has them, each with a quarantined subpage.

use crate::cases::Machine;
use crate::support::{POISON, Pool, REPAIR, SUBPAGE, get, poison, run, set};
use crate::vm::{
    DOCUMENTED, MEBIBYTES, Vm, free_port, migrate, migrate_out, receive, state, unmount,
    used_subpages,
};
use rustix::io::Errno;
use std::fs::{self, File};
use std::path::Path;

pub const TESTS: &[(&str, fn())] = &[
    ("a_machine_moves_by_several_channels", a_machine_moves_by_several_channels),
    ("a_machine_is_saved_to_a_file_and_comes_back", a_machine_is_saved_to_a_file_and_comes_back),
    (
        "a_saved_machine_with_a_quarantine_does_not_come_back",
        a_saved_machine_with_a_quarantine_does_not_come_back,
    ),
    ("a_machine_is_copied_while_it_runs", a_machine_is_copied_while_it_runs),
    ("qemu_is_replaced_over_the_same_memory", qemu_is_replaced_over_the_same_memory),
];

pub const MACHINE: Machine = Machine { memory: MEBIBYTES, by_qemu_10: true, ..Machine::SMALL };

/// A pool, a machine that remembers bytes and has a quarantined subpage, and a directory.
struct Stage {
    pool: Pool,
    work: tempfile::TempDir,
    vm: Vm,
    /// The quarantined subpage.
    place: u64,
}

impl Stage {
    /// A pool for the memory of `machines` machines.
    fn set(machines: u64) -> Self {
        let pool = Pool::mount(&format!("pagesize=2M,size={}M", machines * MEBIBYTES + 64));
        let work = tempfile::tempdir().unwrap();
        let mut vm = Vm::start_as(MACHINE, DOCUMENTED, &pool.join("vm0"), work.path(), &[]);
        vm.remembers();
        let place = vm.unused();
        poison(&vm.memory, place, SUBPAGE).unwrap();
        Self { pool, work, vm, place }
    }

    /// A QEMU that waits for a machine.
    fn target(&self, name: &str) -> Vm {
        let vm = spawn(
            &self.pool.join(name),
            self.work.path(),
            DOCUMENTED,
            &["-S", "-incoming", "defer"],
        );
        vm.tell("info status");
        vm
    }

    fn strike(self) {
        self.pool.check();
        drop(self.vm);
        unmount(self.pool);
    }
}

fn spawn(memory: &Path, work: &Path, options: &str, more: &[&str]) -> Vm {
    Vm::spawn_as(MACHINE, options, memory, work, more)
}

/// Has the machine that comes to `vm` go on, with the losses of the file `list`.
fn arrive(vm: &Vm, list: &Path) {
    let (has_come, said) = receive(vm, File::open(list).unwrap());
    assert!(has_come, "{said}");
}

/// multifd: threads of their own read the memory.
fn a_machine_moves_by_several_channels() {
    let stage = Stage::set(2);
    let mut there = stage.target("vm1");
    for vm in [&stage.vm, &there] {
        vm.tell("migrate_set_capability multifd on");
        vm.tell("migrate_set_parameter multifd-channels 4");
    }
    let to = format!("tcp:127.0.0.1:{}", free_port());
    there.tell(&format!("migrate_incoming {to}"));
    migrate(&stage.vm, &there, &to);
    there.remembers();
    there.works();
    assert_eq!(get(&there.memory, POISON), Err(Errno::NODATA), "its bytes are known");
    drop(there);
    stage.strike();
}

/// mapped-ram: each page has its place in the file, which is in the pool, too.
fn a_machine_is_saved_to_a_file_and_comes_back() {
    let stage = Stage::set(3);
    let (saved, list) = (stage.pool.join("saved"), stage.work.path().join("losses"));
    let uri = format!("file:{}", saved.display());
    stage.vm.tell("migrate_set_capability mapped-ram on");
    let losses = run(&mut migrate_out(&stage.vm, &uri));
    fs::write(&list, losses).unwrap();
    let mut vm = stage.target("vm1");
    vm.tell("migrate_set_capability mapped-ram on");
    let _answer = vm.order(&format!("migrate_incoming {uri}"));
    arrive(&vm, &list);
    vm.remembers();
    vm.works();
    drop(vm);
    stage.strike();
}

/// The file that holds a machine has lost a subpage itself: its beginning, or a part of the
/// machine's memory. QEMU would start the machine as soon as it has come (there is no `-S`).
fn a_saved_machine_with_a_quarantine_does_not_come_back() {
    let stage = Stage::set(3);
    let saved = stage.pool.join("saved");
    let uri = format!("file:{}", saved.display());
    stage.vm.tell("migrate_set_capability mapped-ram on");
    run(&mut migrate_out(&stage.vm, &uri));
    let of_memory = used_subpages(&saved);
    let arrival = ["-global", "migration.mapped-ram=on", "-incoming", &uri];
    for place in [0, of_memory[of_memory.len() / 2]] {
        poison(&saved, place, SUBPAGE).unwrap();
        let mut refused = spawn(&stage.pool.join("vm1"), stage.work.path(), DOCUMENTED, &arrival);
        assert_eq!(refused.boot.wait_for_end().code(), Some(1), "QEMU refuses the file");
        assert!(get(&saved, POISON).unwrap().starts_with(&format!("{place:#x} 0x1000 soft ")));
        set(&saved, REPAIR, "salvage all").unwrap();
    }
    let mut vm = spawn(&stage.pool.join("vm1"), stage.work.path(), DOCUMENTED, &arrival);
    vm.wait_until_there();
    assert_eq!(state(&vm), "running");
    vm.remembers();
    vm.works();
    drop(vm);
    stage.strike();
}

/// background-snapshot: userfaultfd(2) protects the memory from stores until it is copied. The
/// machine goes on at its source.
fn a_machine_is_copied_while_it_runs() {
    let mut stage = Stage::set(2);
    let saved = stage.work.path().join("saved");
    let uri = format!("exec:cat > {}", saved.display());
    stage.vm.tell("migrate_set_capability background-snapshot on");
    let losses = run(&mut migrate_out(&stage.vm, &uri));
    assert_eq!(state(&stage.vm), "running");
    let list = get(&stage.vm.memory, POISON).unwrap();
    assert!(list.starts_with(&format!("{:#x} 0x1000 soft ", stage.place)), "as before: {list}");
    stage.vm.remembers();
    let mut copy = stage.target("vm1");
    let _answer = copy.order(&format!("migrate_incoming \"exec:cat {}\"", saved.display()));
    let list = stage.work.path().join("losses");
    fs::write(&list, losses).unwrap();
    arrive(&copy, &list);
    copy.remembers();
    copy.works();
    stage.vm.works();
    drop(copy);
    stage.strike();
}

/// x-ignore-shared: another QEMU takes the memory as it lies there, with its quarantines.
fn qemu_is_replaced_over_the_same_memory() {
    let mut stage = Stage::set(1);
    let elsewhere = tempfile::tempdir().unwrap();
    let to = format!("unix:{}", stage.work.path().join("migration").display());
    let options = "share=on,align=2M"; // prealloc=on touches every subpage
    let more = ["-incoming", "defer"];
    let mut next = spawn(&stage.vm.memory, elsewhere.path(), options, &more);
    for vm in [&stage.vm, &next] {
        vm.tell("migrate_set_capability x-ignore-shared on");
    }
    next.tell(&format!("migrate_incoming {to}"));
    stage.vm.tell(&format!("migrate -d {to}"));
    stage.vm.wait_until_gone();
    std::mem::swap(&mut stage.vm, &mut next);
    drop(next);
    stage.vm.remembers();
    stage.vm.works();
    let list = get(&stage.vm.memory, POISON).unwrap();
    assert!(list.starts_with(&format!("{:#x} 0x1000 soft ", stage.place)), "{list}");
    set(&stage.vm.memory, REPAIR, "salvage all").unwrap();
    stage.vm.works();
    stage.strike();
}
