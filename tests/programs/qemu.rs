//! QEMU with a file here for its memory, by the lines of docs/OPERATIONS.md. It is mapped by huge
//! entries, and a lack of memory does not kill it.
//!
//! The machines are stopped before their first instruction. At that time their memory is mapped and
//! taken.

use crate::support::documents::blocks;
use crate::support::{FOLIO, Pool, end, huge_bytes, hugetlb2, limits, run, text};
use crate::{outcome, tests};
use roxmltree::{Document, Node};
use std::path::Path;
use std::process::{Child, Command, Stdio};

tests!(
    a_machine_by_the_documented_line_is_mapped_huge,
    a_machine_whose_backend_replaces_libvirts_is_mapped_huge,
    a_machine_by_libvirts_own_settings_is_mapped_small,
    a_machine_without_align_is_named_with_what_helps,
    a_machine_that_does_not_fit_is_refused_by_qemu,
);

const BYTES: u64 = 32 * FOLIO;
const PLAIN: &str = "memory-backend-file,mem-path=FILE,share=on";

const DOCUMENT: &str = include_str!("../../docs/OPERATIONS.md");

/// The documented line, without size and id.
fn documented() -> String {
    let line =
        DOCUMENT.lines().find_map(|line| line.strip_prefix("-object ")).expect("the line for QEMU");
    line.replace("/mnt/h2/vm0", "FILE")
}

/// The arguments that the documented lines add to a domain of libvirt: the values of
/// `<qemu:arg>`, in their order.
fn documented_for_libvirt(file: &Path) -> Vec<String> {
    const SPACE: &str = "http://libvirt.org/schemas/domain/qemu/1.0";
    let domain = blocks(DOCUMENT, "xml").pop().expect("a domain");
    let domain = Document::parse(domain).expect("XML that is well-formed");
    let root = domain.root_element();
    assert!(root.has_tag_name("domain"), "a domain, and not {:?}", root.tag_name());
    let is_line = |node: &Node| node.has_tag_name((SPACE, "commandline"));
    let line = root.children().find(is_line).expect("a line of commands");
    let arguments = line.children().filter(|node| node.has_tag_name((SPACE, "arg")));
    let here = |argument: Node| {
        let value = argument.attribute("value").expect("an argument has a value");
        value
            .replace("size=64G", &format!("size={BYTES}"))
            .replace("/mnt/h2/vm0", &file.display().to_string())
    };
    arguments.map(here).collect()
}

/// A machine with [`BYTES`] of memory.
fn machine() -> Command {
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-accel", "tcg", "-nodefaults", "-nographic", "-S", "-monitor", "stdio"]);
    qemu.args(["-m", &format!("{}M", BYTES >> 20)]);
    qemu
}

/// A machine with `memory` for its memory, where FILE stands for the path.
fn machine_on(memory: &str, file: &Path) -> Command {
    let memory = memory.replace("FILE", &file.display().to_string());
    let mut qemu = machine();
    qemu.arg("-object").arg(format!("{memory},id=h2,size={BYTES}"));
    qemu
}

/// A machine that is paused until it gets the command to start.
struct Paused(Child);

impl Paused {
    fn start(command: &mut Command) -> Self {
        let child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("qemu-system-x86_64");
        let paused = Self(child);
        let monitor = paused.0.stdout.as_ref().expect("a pipe");
        limits::readable(
            limits::ANSWER,
            "QEMU's monitor, which speaks when its memory is there",
            monitor,
        );
        paused
    }

    fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        end(&mut self.0, "QEMU");
    }
}

fn a_machine_by_the_documented_line_is_mapped_huge() {
    let pool = Pool::small(32);
    let file = pool.join("vm0");
    let machine =
        Paused::start(machine_on(&documented(), &file).args(["-machine", "pc,memory-backend=h2"]));
    assert_eq!(huge_bytes(machine.pid(), &file), (BYTES, BYTES), "mapped, and by huge entries");
    let status = run(hugetlb2().arg("status").arg(pool.path()));
    assert!(!status.contains("not huge"), "{status}");
    println!("QEMU  {} of {} MiB are mapped huge", BYTES >> 20, BYTES >> 20);
    drop(machine);
    pool.check();
    std::fs::remove_file(file).unwrap();
    pool.unmount();
}

/// libvirt has a backend of its own for the memory, and no setting for the alignment of a file. It
/// appends the words of `<qemu:commandline>` to its own. If two words set one property, QEMU takes
/// the later.
fn a_machine_whose_backend_replaces_libvirts_is_mapped_huge() {
    let pool = Pool::small(32);
    let file = pool.join("vm0");
    let mut command = machine();
    command
        .arg("-object")
        .arg(format!(r#"{{"qom-type":"memory-backend-ram","id":"pc.ram","size":{BYTES}}}"#));
    command
        .args(["-machine", "pc,usb=off,memory-backend=pc.ram"])
        .args(documented_for_libvirt(&file));
    let machine = Paused::start(&mut command);
    assert_eq!(huge_bytes(machine.pid(), &file), (BYTES, BYTES), "mapped, and by huge entries");
    drop(machine);
    std::fs::remove_file(file).unwrap();
    pool.unmount();
}

/// Asserts that QEMU's address rules huge entries out. Once in 512 times, it is a multiple of 2 MiB
/// by chance; then `start` starts another QEMU.
fn mapped_small(file: &Path, start: impl Fn() -> Paused) -> Paused {
    let machine =
        (0..4).map(|_| start()).find(|machine| huge_bytes(machine.pid(), file) == (BYTES, 0));
    machine.expect("QEMU without align does not have its memory aligned")
}

/// The words of libvirt 9.0 for `<memoryBacking>` with `<source type='file'/>`, `<access
/// mode='shared'/>` and `<allocation mode='immediate'/>`. It makes the directories itself.
fn a_machine_by_libvirts_own_settings_is_mapped_small() {
    let pool = Pool::small(32);
    let directory = pool.join("libvirt/qemu/1-vm0");
    std::fs::create_dir_all(&directory).unwrap();
    let file = directory.join("pc.ram");
    let backend = serde_json::json!({
        "qom-type": "memory-backend-file", "id": "pc.ram", "mem-path": file, "share": true,
        "x-use-canonical-path-for-ramblock-id": false, "prealloc": true, "size": BYTES,
    });
    let machine = mapped_small(&file, || {
        let mut command = machine();
        command.args(["-object", &backend.to_string(), "-machine", "pc,memory-backend=pc.ram"]);
        Paused::start(&mut command)
    });
    drop(machine);
    std::fs::remove_file(file).unwrap();
    pool.unmount();
}

fn a_machine_without_align_is_named_with_what_helps() {
    let pool = Pool::small(32);
    let file = pool.join("vm0");
    let start = || {
        Paused::start(
            machine_on(&format!("{PLAIN},prealloc=on"), &file)
                .args(["-machine", "pc,memory-backend=h2"]),
        )
    };
    let machine = mapped_small(&file, start);
    let said =
        format!("process {} (qemu-system-x86) maps 64 MiB of {}", machine.pid(), file.display());
    let status = run(hugetlb2().arg("status").arg(pool.path()));
    assert!(status.contains(&said) && status.contains("align=2M"), "{status}");
    let json = run(hugetlb2().args(["status", "--json"]).arg(pool.path()));
    assert!(json.contains(&format!("\"pid\": {}", machine.pid())), "{json}");
    let map = limits::output(limits::PROGRAM, hugetlb2().arg("map").arg(&file)).unwrap();
    assert!(text(&map.stderr).contains(&said), "{}", text(&map.stderr));
    println!("QEMU  without align: {}", status.lines().last().unwrap_or_default().trim());
    drop(machine);
    std::fs::remove_file(file).unwrap();
    pool.unmount();
}

/// Without `prealloc=on`, QEMU 7.2 warns of ftruncate(2)'s ENOSPC and goes on; the first touch is
/// SIGBUS.
fn a_machine_that_does_not_fit_is_refused_by_qemu() {
    let pool = Pool::small(31);
    let file = pool.join("vm0");
    let mut command = machine_on(&documented(), &file);
    let (output, text) = outcome(command.args(["-machine", "pc,memory-backend=h2"]));
    assert_eq!(output.status.code(), Some(1), "{}: {text}", output.status);
    println!("QEMU  a full pool: {}", text.trim().replace('\n', "; "));
    assert!(text.contains("preallocating memory failed"), "{text}");
    assert_eq!(pool.free_pages(), 31);
    pool.check();
    pool.unmount();
}
