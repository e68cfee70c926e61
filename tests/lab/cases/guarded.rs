//! Guests of KVM whose QEMU runs under `hugetlb2 guard`: a quarantine is a memory error of theirs,
//! and costs no frame.

use super::cases;
use super::guests::{BYTES, Guest, QEMU, await_qemu, load_kvm, move_with_loss};
use crate::support::{
    POISON, Pool, REPAIR, SUBPAGE, get, guard, hugetlb2, limits, poison, set, status_and_error,
};
use hugetlb2fs::guard::Area;
use hugetlb2fs::sys::markers::is_marker_in;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

cases! {
    NESTED: a_guarded_qemu_tells_its_guest_of_a_quarantine,
        a_guest_of_kvm_arrives_with_its_loss_and_costs_no_frame;
}

/// QEMU under a guard.
fn guarded(memory: PathBuf, further: &[&str]) -> Guest {
    let mut command = guard();
    command.arg(QEMU);
    Guest::spawn_by(command, &memory.clone(), memory, further)
}

/// True if QEMU has a marker for the byte of the guest's memory at `offset`.
fn is_marked(guest: &Guest, offset: u64) -> bool {
    let of_qemu = |name: &str| format!("/proc/{}/{name}", guest.qemu.id());
    let inode = fs::metadata(&guest.memory).unwrap().ino();
    let maps = fs::read_to_string(of_qemu("maps")).unwrap();
    let mut areas = maps.lines().filter_map(|line| Area::parse(line.as_bytes()));
    let area = areas.find(|area| area.inode == inode).expect("QEMU maps its memory");
    let address = area.addresses.start + offset - area.offset;
    is_marker_in(&File::open(of_qemu("pagemap")).unwrap(), address).unwrap()
}

/// The guest stands still from the quarantine to the marker: a processor of it that touches the
/// subpage in between gets EFAULT, and QEMU pauses the guest.
fn a_guarded_qemu_tells_its_guest_of_a_quarantine() {
    load_kvm();
    let pool = Pool::mount(&format!("pagesize=2M,size={}", BYTES + (32 << 20)));
    let mut guest = guarded(pool.join("guest"), &[]);
    guest.await_programs();
    let memory = guest.memory.clone();
    for (program, words) in
        [(3, "program 3: SIGBUS 4, lsb 12, at subpage 0"), (1, "program 1 has ended: None Some(7)")]
    {
        let (now, lost) = (guest.text().len(), guest.subpage_of(program));
        guest.ask("stop");
        poison(&memory, lost, SUBPAGE).unwrap();
        limits::until(limits::ANSWER, "a marker", || is_marked(&guest, lost));
        guest.ask("cont");
        guest.await_line(now, words);
        guest.await_rounds(&[2, 4, 9]);
    }
    assert_eq!((pool.counter("quarantined_soft"), pool.counter("quarantined_hw")), (2, 0));
    assert_eq!(guest.qemu.try_wait().unwrap(), None, "QEMU runs");
    set(&memory, REPAIR, "salvage all").unwrap();
    assert_eq!(pool.counter("frames_given_up"), 0);
    pool.check();
    drop(guest);
    fs::remove_file(&memory).unwrap();
    pool.unmount();
}

/// As with real errors (`a_guest_of_kvm_arrives_with_its_loss`), but the destination loses nothing.
fn a_guest_of_kvm_arrives_with_its_loss_and_costs_no_frame() {
    load_kvm();
    let pool = Pool::mount(&format!("pagesize=2M,size={}", 2 * BYTES + (32 << 20)));
    let guest = Guest::start(pool.join("guest"));
    let lost = guest.subpage_of(3);
    let migrate_in = |qmp: &Path| {
        let mut into = hugetlb2();
        into.args(["migrate", "in", "--keep-frames", "--qmp"]).arg(qmp);
        into
    };
    let (status, said) = status_and_error(migrate_in(&guest.qmp).stdin(Stdio::null()));
    assert!(status == 1 && said.contains("does not run under `hugetlb2 guard`"), "{said}");
    let to = "unix:/tmp/migration-guarded";
    let mut there = guarded(pool.join("there"), &["-incoming", to]);
    await_qemu(&there, to);
    move_with_loss(&guest, lost, to, migrate_in(&there.qmp));
    drop(guest);
    there.await_line(0, "program 3: SIGBUS 4, lsb 12, at subpage 0"); // BUS_MCEERR_AR
    there.await_rounds(&[1, 2, 4, 9]);
    let list = get(&there.memory, POISON).unwrap();
    assert!(list.lines().count() == 1 && list.contains(" soft "), "{list}");
    let mut salvage = Command::new(hugetlb2().get_program());
    salvage.arg("repair").arg(&there.memory).args(["salvage", &lost.to_string(), "4096"]);
    assert_eq!(status_and_error(&mut salvage).0, 1, "no byte of it is known");
    assert_eq!(pool.counter("frames_given_up"), 0);
    assert_eq!(there.qemu.try_wait().unwrap(), None, "QEMU runs");
    set(&there.memory, REPAIR, "zero all").unwrap();
    pool.check();
    drop(there);
    ["guest", "there"].iter().for_each(|name| fs::remove_file(pool.join(name)).unwrap());
    pool.unmount();
}
