//! The commands, tables and programs of the documents, run on mounted pools.

mod support;

use hugetlb2fs::options::TABLE;
use std::path::Path;
use std::process::{Command, Output};
use support::documents::{blocks, document, quoted, rows, section};
use support::{FOLIO, POOL, Pool, SUBPAGE, Worker, get, hugetlb2, limits, poison, run, text};

/// Runs `script` in a mount namespace of its own. There mount(8) finds the helpers, and the
/// directory /mnt/h2 exists. The namespace begins with copies of the mounts of other tests' pools,
/// so the script first unmounts these copies.
fn run_in_namespace(script: &str) -> String {
    const PREPARE: &str = "umount -i -c -l -a -t fuse.hugetlb2 || true
        mount -t tmpfs helpers /usr/sbin
        for name in hugetlb2 mount.hugetlb2 mount.fuse.hugetlb2 umount.fuse.hugetlb2; do
            ln -s \"$0\" /usr/sbin/$name
        done
        export PATH=/usr/sbin:$PATH
        mount -t tmpfs place /mnt
        mkdir /mnt/h2\n";
    let mut shell = Command::new("unshare");
    shell.args(["-m", "bash", "-euxo", "pipefail", "-c", &format!("{PREPARE}{script}")]);
    shell.arg(hugetlb2().get_program());
    let Output { status, stdout, stderr } =
        limits::output(limits::PROGRAM, &mut shell).expect("unshare(1)");
    let said = text(&stdout);
    assert!(status.success(), "{status}\n{said}{}", text(&stderr));
    said
}

/// The commands with a pool that fits into this machine's memory.
fn made_small(commands: &str) -> String {
    const LOG: &str = "log=/mnt/log";
    let small = commands.replace("-o size=64G", &format!("-o pagesize=2M,size=64M,{LOG}"));
    let small = small
        .replace("size=80G", "size=80M")
        .replace("size=50%", &format!("pagesize=2M,size=64M,{LOG}"));
    assert!(small.contains(LOG), "the size of the pool was not found in\n{commands}");
    small
}

const MOUNT: &str = "mount -t hugetlb2 pool0 /mnt/h2 -o size=64G\n";

#[test]
fn the_commands_of_a_pools_life_work() {
    let operations = document("docs/OPERATIONS.md");
    let life = blocks(section(&operations, "A pool's life"), "sh")[0];
    let said = run_in_namespace(&made_small(life));
    assert!(said.contains("40 of 2 MiB") && said.contains("everything holds"), "{said}");
    assert!(said.contains("serves in place of"), "{said}");

    let readme = document("README.md");
    let use_it = blocks(section(&readme, "Use it"), "sh")[0];
    support::guard(); // builds the library that is installed
    let built = Path::new(hugetlb2().get_program()).parent().expect("a directory").to_owned();
    let place = format!(
        "mount -t tmpfs bare /usr/sbin; cd {}; export BUILT={}\n",
        env!("CARGO_MANIFEST_DIR"),
        built.display()
    );
    let said = run_in_namespace(&(place + &made_small(use_it)));
    assert!(said.contains("32 of 2 MiB"), "{said}");
}

#[test]
fn the_line_of_fstab_mounts_the_pool() {
    let operations = document("docs/OPERATIONS.md");
    let line = made_small(blocks(&operations, "fstab")[0]);
    let script = format!(
        "cat >/mnt/fstab <<'END'\n{line}END
        mount -T /mnt/fstab /mnt/h2
        hugetlb2 status /mnt/h2
        umount /mnt/h2"
    );
    let said = run_in_namespace(&script);
    assert!(said.contains("32 of 2 MiB"), "{said}");
}

/// `umount -c` returns when the daemon has ended, so the log is complete.
#[test]
fn the_line_of_the_log_leads_to_the_file() {
    let operations = document("docs/OPERATIONS.md");
    let commands = blocks(section(&operations, "The log"), "sh")[0];
    let look = "setfattr -n user.hugetlb2.poison -v '0 4096' /mnt/h2/vm0
        umount -c /mnt/h2
        grep -c \"file $id: 0x0 0x1000 quarantined (soft)\" /mnt/log";
    let said = run_in_namespace(&made_small(&format!("{MOUNT}{commands}{look}")));
    assert_eq!(said, "/mnt/h2/vm0\n1\n");
}

#[test]
fn the_environment_of_mount_sets_the_filter_of_the_log() {
    let operations = document("docs/OPERATIONS.md");
    let setting =
        quoted(section(&operations, "The log")).find(|word| word.starts_with("HUGETLB2_LOG="));
    let script = format!(
        "{} {MOUNT}umount -c /mnt/h2\ngrep -c DEBUG /mnt/log",
        setting.expect("an example")
    );
    assert_ne!(run_in_namespace(&made_small(&script)), "0\n");
}

#[test]
fn the_commands_after_a_memory_error_work() {
    let operations = document("docs/OPERATIONS.md");
    let [by_command, by_attributes] = blocks(section(&operations, "A memory error"), "sh")[..]
    else {
        panic!("there are two blocks");
    };
    let is_repaired = "! getfattr -n user.hugetlb2.poison /mnt/h2/vm0
        hugetlb2 check /mnt/h2
        umount /mnt/h2";
    for (commands, said_on_the_way) in [
        (by_command, ["0x5000         0x1000           soft", "huge"]),
        (by_attributes, ["0x5000 0x1000 soft", ""]),
    ] {
        let said = run_in_namespace(&made_small(&format!("{MOUNT}{commands}{is_repaired}")));
        assert!(said_on_the_way.iter().all(|words| said.contains(words)), "{said}");
        assert!(said.ends_with("everything holds\n"), "{said}");
    }
}

#[test]
fn the_commands_for_numa_nodes_work() {
    let operations = document("docs/OPERATIONS.md");
    let commands = blocks(section(&operations, "NUMA nodes"), "sh")[0].replace("4G", "4M");
    let said = run_in_namespace(&made_small(&format!("{MOUNT}{commands}umount /mnt/h2")));
    let (targets, placement) = said.split_once("interleave:all\n").expect("the placement");
    assert!(targets.contains("Capacity") && placement.contains("bytes"), "{said}");
}

#[test]
fn the_counters_are_those_of_the_table() {
    let operations = document("docs/OPERATIONS.md");
    let documented = rows(section(&operations, "Counters"));
    let documented: Vec<&str> =
        documented.iter().map(|row| quoted(&row[0]).next().expect("a name")).collect();
    let pool = Pool::small(2);
    let counters = get(pool.path(), POOL).unwrap();
    let names = counters.lines().map(|line| line.split(' ').next().expect("a name"));
    let of_other_nodes = |name: &&str| name.contains("_node") && !name.ends_with("_node0");
    assert_eq!(names.filter(|name| !of_other_nodes(name)).collect::<Vec<_>>(), documented);
}

#[test]
fn the_options_are_those_of_the_table() {
    let operations = document("docs/OPERATIONS.md");
    let documented = rows(section(&operations, "Options"));
    let documented: Vec<[&str; 3]> = documented
        .iter()
        .map(|row| [row[0].trim_matches('`'), row[1].as_str(), row[2].as_str()])
        .collect();
    let known: Vec<_> =
        TABLE.iter().map(|row| [row.name, row.value, row.default.unwrap_or("required")]).collect();
    assert_eq!(documented, known);
}

/// In a line of mountinfo (proc(5)), the options of the filesystem are the last word.
#[test]
fn nothing_of_a_pool_can_be_swapped_out() {
    let pool = Pool::small(4);
    std::fs::File::create(pool.join("file")).unwrap().set_len(FOLIO).unwrap();
    let worker = Worker::of(&pool).pid;
    let mounts = std::fs::read_to_string(format!("/proc/{worker}/mountinfo")).unwrap();
    let of_tmpfs: Vec<&str> = mounts.lines().filter(|line| line.contains(" - tmpfs ")).collect();
    for place in [" /index ", " /reserve/0 ", " /objects/"] {
        assert!(
            of_tmpfs.iter().any(|line| line.contains(place)),
            "nothing is mounted at {place}\n{mounts}"
        );
    }
    for line in of_tmpfs {
        let options = line.rsplit(' ').next().expect("a word");
        assert!(options.split(',').any(|option| option == "noswap"), "{line}");
    }
}

/// The lab runs this program and the one in Rust on real memory errors, too.
#[test]
fn the_c_program_goes_on_after_a_quarantine() {
    let pool = Pool::small(2);
    let path = pool.join("file");
    std::fs::write(&path, vec![7; FOLIO as usize]).unwrap();
    poison(&path, 3 * SUBPAGE, SUBPAGE).unwrap();
    let place = tempfile::tempdir().unwrap();
    let (source, program) = (place.path().join("handler.c"), place.path().join("handler"));
    std::fs::write(&source, blocks(&document("docs/HANDLERS.md"), "c")[0]).unwrap();
    run(Command::new("gcc").args(["-O2", "-Wall", "-Werror", "-o"]).arg(&program).arg(&source));
    assert_eq!(
        run(Command::new(&program).arg(&path)),
        format!("lost 4096 bytes at offset {}\n", 3 * SUBPAGE)
    );
    assert_eq!(run(Command::new(&program).arg(&path)), "", "nothing is left to be lost");
    pool.check();
}
