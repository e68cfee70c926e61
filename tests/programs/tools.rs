//! The usual tools of an administrator.

use crate::support::{FOLIO, POISON, Pool, REPAIR, SUBPAGE, get, poison, set};
use crate::{outcome, said, tests};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

tests!(
    ordinary_tools_do_what_they_do_elsewhere,
    copies_carry_times_owners_and_attributes,
    sparse_copies_carry_quarantines_and_all_other_bytes,
    rsync_carries_a_quarantine_onto_a_copy_that_it_need_not_read,
    tools_that_cannot_read_a_quarantined_subpage_say_so,
    permissions_decide_about_programs_of_other_users,
    tools_that_look_under_the_surface_say_something_sensible,
);

const NOBODY: u32 = 65534;

fn ordinary_tools_do_what_they_do_elsewhere() {
    let pool = Pool::small(32);
    let here = pool.path();
    let shell = |script: &str| said(Command::new("sh").arg("-euc").arg(script).current_dir(&here));
    shell("mkdir -p a/b && dd if=/dev/urandom of=a/b/f bs=100k count=30 status=none");
    shell(
        "truncate -s 5000000 a/t && fallocate -l 3000000 a/g && cp a/b/f a/copy && cmp a/b/f a/copy",
    );
    assert_eq!(
        shell("stat -c '%s %F' a/t a/g").trim(),
        "5000000 regular file\n3000000 regular file"
    );
    assert_eq!(shell("find . -type f | sort").trim(), "./a/b/f\n./a/copy\n./a/g\n./a/t");
    // du(1) counts whole pages, as the pool does.
    assert_eq!(shell("du -sk a/b/f | cut -f1").trim(), (2 * FOLIO / 1024).to_string());
    assert_eq!(
        shell("df -k --output=size,used . | tail -1").split_whitespace().collect::<Vec<_>>(),
        ["65536", "18432"]
    );
    assert!(shell("ls -la a").contains("3072000"));
    shell("fallocate -p -o 4096 -l 8192 a/copy && ! cmp -s a/b/f a/copy");
    shell("dd if=a/b/f of=a/copy conv=notrunc status=none && cmp a/b/f a/copy");
    shell(
        "setfattr -n user.color -v green a/g && test $(getfattr --only-values -n user.color a/g) = green",
    );
    shell("mkdir there && tar cf - a | tar xf - -C there && diff -r a there/a && rm -r there");
    shell("mv a c && ln c/g c/h && ln -s g c/s && test $(stat -c %h c/h) = 2 && rm -r c");
    pool.check();
    pool.unmount();
}

fn copies_carry_times_owners_and_attributes() {
    let (from, to) = (Pool::small(8), Pool::small(8));
    let file = from.join("file");
    fs::write(&file, vec![7; FOLIO as usize + 5000]).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
    std::os::unix::fs::chown(&file, Some(NOBODY), Some(NOBODY)).unwrap();
    set(&file, "user.color", "green").unwrap();
    said(Command::new("touch").args(["-d", "2001-02-03 04:05:06.789"]).arg(&file));
    let copies: [&[&str]; 3] = [
        &["cp", "--sparse=always", "--preserve=all", "FROM", "TO"],
        &["rsync", "-aX", "FROM", "TO"],
        &[
            "sh",
            "-euc",
            "tar --xattrs --xattrs-include='*' -C $(dirname FROM) -cf - file | tar --xattrs --xattrs-include='*' -C $(dirname TO) -xf -",
        ],
    ];
    for copy in copies {
        let target = to.join("file");
        let words = copy.iter().map(|word| {
            word.replace("FROM", &file.to_string_lossy()).replace("TO", &target.to_string_lossy())
        });
        let words: Vec<String> = words.collect();
        said(Command::new(&words[0]).args(&words[1..]));
        let (was, is) = (fs::metadata(&file).unwrap(), fs::metadata(&target).unwrap());
        let facts = |of: &fs::Metadata| {
            (of.len(), of.mode(), of.uid(), of.gid(), of.mtime(), of.mtime_nsec())
        };
        assert_eq!(facts(&was), facts(&is), "{}", copy[0]);
        assert_eq!(get(&target, "user.color").unwrap(), "green", "{}", copy[0]);
        assert_eq!(fs::read(&target).unwrap(), fs::read(&file).unwrap());
        fs::remove_file(&target).unwrap();
    }
    println!("cp, rsync and tar carry mode, owner, times and attributes");
    from.check();
    to.check();
    from.unmount();
    to.unmount();
}

/// Asserts that every byte of `copy` is 7, except in the fourth subpage, which is zero.
fn assert_only_the_fourth_subpage_is_lost(copy: &Path) {
    let wrong = |(at, byte): (usize, u8)| byte != if at / 4096 == 3 { 0 } else { 7 };
    let copied = fs::read(copy).unwrap();
    assert!(copied.len() >= FOLIO as usize + 5000);
    let found =
        copied.into_iter().take(FOLIO as usize + 5000).enumerate().find(|&pair| wrong(pair));
    assert_eq!(found, None, "a wrong byte");
}

/// Makes a file with its fourth subpage quarantined.
fn quarantined(pool: &Pool) -> PathBuf {
    let file = pool.join("file");
    fs::write(&file, vec![7; FOLIO as usize + 5000]).unwrap();
    poison(&file, 3 * SUBPAGE, SUBPAGE).unwrap();
    file
}

fn sparse_copies_carry_quarantines_and_all_other_bytes() {
    let (from, to) = (Pool::small(8), Pool::small(8));
    let (file, copy) = (quarantined(&from), to.join("file"));
    // tar sets attributes twice: before it writes the contents, when the worker refuses them (tar
    // warns), and after.
    let tar = "tar -S --xattrs --xattrs-include='*' -cf - file | tar --xattrs --xattrs-include='*' -C \"$1\" -xf -";
    for script in ["cp --sparse=always --preserve=all file \"$1\"", tar] {
        let mut shell = Command::new("bash");
        shell
            .args(["-euo", "pipefail", "-c", script, "copy"])
            .arg(to.path())
            .current_dir(from.path());
        said(&mut shell);
        assert!(get(&copy, POISON).unwrap().starts_with("0x3000 0x1000 soft "), "{script}");
        set(&copy, REPAIR, "zero all").unwrap();
        assert_only_the_fourth_subpage_is_lost(&copy);
        fs::remove_file(&copy).unwrap();
    }
    println!("cp --sparse=always and tar -S carry quarantines");
    assert!(get(&file, POISON).is_ok());
    to.check();
    from.unmount();
    to.unmount();
}

/// rsync compares sizes and times, and reads files only if these differ. A rescue copy without
/// attributes exists before rsync runs.
fn rsync_carries_a_quarantine_onto_a_copy_that_it_need_not_read() {
    let (from, to) = (Pool::small(8), Pool::small(8));
    let (file, copy) = (quarantined(&from), to.join("file"));
    set(&file, "user.color", "green").unwrap();
    let rescue = ["--sparse=always", "--preserve=mode,ownership,timestamps"];
    said(Command::new("cp").args(rescue).arg(&file).arg(&copy));
    assert!(get(&copy, POISON).is_err() && get(&copy, "user.color").is_err());
    for run in ["carries them", "finds them there"] {
        let text = said(Command::new("rsync").args(["-aX", "--stats"]).arg(&file).arg(&copy));
        assert!(text.contains("Number of regular files transferred: 0\n"), "{text}");
        assert!(get(&copy, POISON).unwrap().starts_with("0x3000 0x1000 soft "), "{run}");
        assert_eq!(get(&copy, "user.color").unwrap(), "green", "{run}");
        let times = [&file, &copy].map(|path| fs::metadata(path).unwrap().modified().unwrap());
        assert_eq!(times[0], times[1], "{run}");
    }
    set(&copy, REPAIR, "zero all").unwrap();
    assert_only_the_fourth_subpage_is_lost(&copy);
    println!(
        "rsync -aX after cp --sparse=always --preserve=mode,ownership,timestamps carries the quarantine"
    );
    from.check();
    to.check();
    from.unmount();
    to.unmount();
}

fn tools_that_cannot_read_a_quarantined_subpage_say_so() {
    let (from, to) = (Pool::small(8), Pool::small(8));
    let (file, copy) = (quarantined(&from), to.join("file"));
    let (rsync, text) = outcome(Command::new("rsync").arg("-aX").arg(&file).arg(&copy));
    assert_eq!(rsync.status.code(), Some(23), "{text}");
    assert!(text.contains("Input/output error") && !copy.exists(), "{text}");
    let (tar, text) = outcome(Command::new("tar").arg("-cf").arg(to.join("archive")).arg(&file));
    assert!(!tar.status.success(), "{text}");
    let mut dd = Command::new("dd");
    dd.arg(format!("if={}", file.display())).arg(format!("of={}", copy.display()));
    let (_, text) = outcome(dd.args(["bs=4k", "conv=noerror,sync"]));
    assert!(text.contains("Input/output error"), "{text}");
    assert_only_the_fourth_subpage_is_lost(&copy);
    println!(
        "rsync -aX and tar without -S refuse a quarantined file; dd conv=noerror,sync copies the rest"
    );
    to.check();
    from.unmount();
    to.unmount();
}

fn permissions_decide_about_programs_of_other_users() {
    let pool = Pool::small(4);
    let file = pool.join("file");
    fs::write(&file, "text").unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    let nobody = |program: &str, arguments: &[&str]| {
        let mut command = Command::new(program);
        command.args(arguments).arg(&file).uid(NOBODY).gid(NOBODY);
        outcome(&mut command).0.status.success()
    };
    // Only root may search the directories above the mount point; the test is about the mount.
    for directory in pool.path().ancestors().take(2) {
        fs::set_permissions(directory, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let write = ["-n", POISON, "-v", "0 4096"];
    assert!(
        !nobody("cat", &[]) && !nobody("truncate", &["-s", "0"]) && !nobody("setfattr", &write)
    );
    std::os::unix::fs::chown(&file, Some(NOBODY), None).unwrap();
    assert!(nobody("cat", &[]) && nobody("setfattr", &write) && nobody("truncate", &["-s", "0"]));
    assert!(
        !nobody("setfattr", &["-n", "trusted.hugetlb2.inject", "-v", "hw 0"]),
        "that is for root"
    );
    pool.check();
    pool.unmount();
}

fn tools_that_look_under_the_surface_say_something_sensible() {
    let pool = Pool::small(4);
    let path = pool.join("file");
    fs::write(&path, vec![7; FOLIO as usize]).unwrap();
    let file = fs::File::open(&path).unwrap();
    let open = said(Command::new("lsof").arg(&path));
    assert!(open.contains("REG") && open.contains(&path.display().to_string()), "{open}");
    let (_, extents) = outcome(Command::new("filefrag").arg(&path));
    println!(
        "filefrag  {}",
        extents.trim().lines().last().unwrap_or_default().rsplit('/').next().unwrap_or_default()
    );
    let kind = said(Command::new("stat").args(["-f", "-c", "%T"]).arg(&path));
    println!("stat -f   {}", kind.trim());
    drop(file);
    pool.unmount();
}
