//! Things that another user prepares, or changes meanwhile, in places where root's programs act.
//! These programs follow none of these things.

use crate::support;
use crate::support::place::{MountInfo, Namespace, Place};
use crate::support::{Daemon, end, run, start_until, status_and_error};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

const SMALL: &str = "size=16M,pagesize=2M";

// ---- a path that changes -----------------------------------------------------------------------

/// A pool at `user/mnt`, a foreign filesystem at `victim/mnt`, and a link to `victim` that can take
/// the place of `user`.
struct Scene {
    namespace: Namespace,
    place: Place,
}

impl Scene {
    fn new() -> Self {
        let (namespace, place) = (Namespace::new(), Place::new());
        for directory in ["user/mnt", "victim/mnt"] {
            fs::create_dir_all(place.join(directory)).unwrap();
        }
        symlink(place.join("victim"), place.join("link")).unwrap();
        let scene = Self { namespace, place };
        run(scene
            .namespace
            .command("mount")
            .args(["-t", "tmpfs", "victim"])
            .arg(scene.place.join("victim/mnt")));
        scene.mount();
        scene
    }

    fn mount(&self) {
        let mut mount = self.namespace.command("/sbin/mount.hugetlb2");
        run(mount.arg("source").arg(self.pool()).args(["-o", &self.place.with_log(SMALL)]));
    }

    fn pool(&self) -> PathBuf {
        self.place.join("user/mnt")
    }

    /// The flags of the mount on a directory.
    fn flags(&self, directory: &str) -> Option<String> {
        let file = format!("/proc/{}/mountinfo", self.namespace.pid());
        MountInfo::of(&self.place.join(directory), &file).map(|info| info.flags)
    }

    /// Runs `work` while another thread exchanges `link` and `user` over and over, which the owner
    /// of the directory can do.
    fn while_the_path_changes(&self, work: impl FnOnce()) {
        let done = AtomicBool::new(false);
        let exchange = || {
            renameat_with(
                CWD,
                self.place.join("user"),
                CWD,
                self.place.join("link"),
                RenameFlags::EXCHANGE,
            )
            .unwrap();
        };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    exchange();
                    exchange();
                }
            });
            work();
            done.store(true, Ordering::Relaxed);
        });
    }
}

#[test]
fn an_umount_acts_on_the_pool_that_it_has_looked_at() {
    let scene = Scene::new();
    let mut unmounted = 0;
    for _ in 0..100 {
        scene.while_the_path_changes(|| {
            let mut umount = scene.namespace.command("/sbin/umount.fuse.hugetlb2");
            let (status, error) = status_and_error(umount.arg(scene.pool()));
            assert!(status == 0 || error.contains("no hugetlb2 pool is mounted there"), "{error}");
        });
        assert!(scene.flags("victim/mnt").is_some(), "a stranger's filesystem was unmounted");
        if scene.flags("user/mnt").is_none() {
            unmounted += 1;
            scene.mount();
        }
    }
    assert!(unmounted > 0);
}

#[test]
fn a_remount_acts_on_the_pool_that_it_has_looked_at() {
    let scene = Scene::new();
    let mut remounted = 0;
    for _ in 0..100 {
        scene.while_the_path_changes(|| {
            let mut mount = scene.namespace.command("/sbin/mount.hugetlb2");
            let (status, error) = status_and_error(
                mount.arg("source").arg(scene.pool()).args(["-o", "remount,noexec"]),
            );
            remounted += u32::from(status == 0);
            assert!(status == 0 || error.contains("no hugetlb2 pool is mounted there"), "{error}");
        });
        assert_eq!(
            scene.flags("victim/mnt").unwrap(),
            "rw,relatime",
            "a stranger's filesystem was remounted"
        );
    }
    assert!(remounted > 0 && scene.flags("user/mnt").unwrap().contains("noexec"));
}

#[test]
fn an_umount_follows_the_link_that_it_is_given() {
    let place = Place::new();
    run(&mut place.mount(SMALL));
    let daemon = Daemon::of(&place.mount_point());
    symlink("mnt", place.join("link")).unwrap();
    symlink(place.join("link"), place.join("another")).unwrap();
    run(support::umount_hugetlb2().arg("another").current_dir(place.directory.path()));
    assert!(daemon.ends_within(0), "the daemon runs on");
    place.assert_nothing_is_left();
}

// ---- a process that is no daemon ---------------------------------------------------------------

#[test]
fn an_upgrade_looks_at_no_process_of_another_user() {
    const PROCESS: &str = r#"$| = 1; chroot $ARGV[0] or die; $) = $( = 65534; $> = $< = 65534; print "ready\n"; sleep"#;
    let place = tempfile::tempdir().unwrap();
    let root = place.path().join("root");
    fs::create_dir(&root).unwrap();
    let victim = place.path().join("victim");
    symlink(&victim, root.join("upgrade")).unwrap();
    symlink(&root, root.join("index")).unwrap();
    symlink(&victim, root.join("handover")).unwrap();
    let mut perl = Command::new("perl");
    let mut process = start_until("ready", perl.args(["-e", PROCESS]).arg(&root));
    let mut daemon = Command::new("sh");
    daemon.args([
        "-c",
        "exec \"$0\" \"$@\" --control-fd=3 3</dev/null",
        env!("CARGO_BIN_EXE_hugetlb2fsd"),
    ]);
    daemon.args([&format!("--take-over={}", process.id()), "--connection=1"]);
    let (status, error) = status_and_error(&mut daemon);
    assert_eq!(status, 1);
    assert!(!victim.exists(), "a file was made where a link points to: {error}");
    assert!(error.contains("is not taken over from: it is another user's"), "{error}");
    end(&mut process, "a process of another user");
}

// ---- installing --------------------------------------------------------------------------------

#[test]
fn an_installation_follows_no_link() {
    let place = tempfile::tempdir().unwrap();
    let (lib, library) = (place.path().join("usr/lib/hugetlb2"), "libhugetlb2_guard.so");
    let (sbin, elsewhere, victim) = (
        place.path().join("usr/sbin"),
        place.path().join("elsewhere"),
        place.path().join("victim"),
    );
    fs::create_dir_all(&sbin).unwrap();
    fs::create_dir_all(&lib).unwrap();
    fs::create_dir(&elsewhere).unwrap();
    fs::write(&victim, "text").unwrap();
    for name in [library.to_owned(), format!(".{library}.new")] {
        symlink(&victim, lib.join(name)).unwrap();
    }
    for name in ["hugetlb2", "hugetlb2fsd", ".hugetlb2.new", ".hugetlb2fsd.new"] {
        symlink(&victim, sbin.join(name)).unwrap();
    }
    for name in
        ["mount.hugetlb2", "umount.hugetlb2", ".mount.hugetlb2.new", ".umount.fuse.hugetlb2.new"]
    {
        symlink(&elsewhere, sbin.join(name)).unwrap();
    }
    support::guard(); // builds the library
    for _ in 0..2 {
        let built = Path::new(env!("CARGO_BIN_EXE_hugetlb2")).parent().unwrap();
        let mut install =
            Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/mount-helper/install"));
        run(install.env("BUILT", built).env("DESTDIR", place.path()));
        assert_eq!(fs::read_to_string(&victim).unwrap(), "text");
        assert_eq!(fs::read_dir(&elsewhere).unwrap().count(), 0);
        assert_installed(&sbin);
        let page = place.path().join("usr/share/man/man8/umount.hugetlb2.8");
        assert!(fs::read_to_string(page).unwrap().contains("umount.fuse.hugetlb2"));
        assert!(lib.join(library).symlink_metadata().unwrap().is_file());
        assert_eq!(fs::read_dir(&lib).unwrap().count(), 1, "nothing else is there");
    }
    // The installed command finds the installed library.
    run(Command::new(sbin.join("hugetlb2")).args(["guard", "true"]));
}

fn assert_installed(sbin: &Path) {
    for program in ["hugetlb2", "hugetlb2fsd"] {
        let found = sbin.join(program).symlink_metadata().unwrap();
        assert!(
            found.is_file() && found.permissions().mode() == 0o100_755 && found.uid() == 0,
            "{program}"
        );
    }
    for name in ["mount.hugetlb2", "mount.fuse.hugetlb2", "umount.hugetlb2", "umount.fuse.hugetlb2"]
    {
        assert_eq!(fs::read_link(sbin.join(name)).unwrap(), Path::new("hugetlb2"), "{name}");
    }
    assert_eq!(fs::read_dir(sbin).unwrap().count(), 6, "nothing else is there");
    let help = run(Command::new(sbin.join("hugetlb2")).arg0("mount.hugetlb2").arg("--help"));
    assert!(help.contains("mount.hugetlb2 NAME DIR"), "{help}");
}
