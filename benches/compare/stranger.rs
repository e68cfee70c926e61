//! The time that calls of one user take while others keep the filesystem busy with long requests.
//!
//! Ten users make long requests, each on a file of their own, or root makes them. Meanwhile a
//! stranger opens, reads and closes a file, asks for its attributes, and makes a directory, again
//! and again. A row has the median, the best and the worst time of one of these calls, beside each
//! load.

use super::sides::{Kind, Side};
use super::table::Samples;
use super::{Plan, Table, milliseconds};
use hugetlb2fs::attributes::{self, CHECK, COLLAPSE, MAP, POISON, REPAIR};
use rustix::fs::{
    AtFlags, FallocateFlags, Gid, Mode, OFlags, StatxFlags, Uid, XattrFlags, fallocate, fchown,
    fgetxattr, fsetxattr, ftruncate, mkdirat, openat, statx, unlinkat,
};
use rustix::thread::set_thread_res_uid;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const USERS: u32 = 10;
const FIRST_USER: u32 = 3000;
const STRANGER: u32 = FIRST_USER + USERS;
/// The size of each user's file.
const FILE: u64 = 64 << 20;
/// All files, and some more for the moment in which a file has given memory back and takes some
/// again.
const POOL: u64 = (USERS as u64 + 2) * FILE;
/// The longest value of an attribute.
const VALUE: usize = 64 << 10;
/// The pause between two rounds of the stranger's calls.
const PAUSE: Duration = Duration::from_millis(2);

/// A long request that is repeated.
struct Load {
    name: &'static str,
    by: By,
    run: fn(Subject<'_>),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum By {
    Nobody,
    /// Ten users, on this filesystem only: others lack the request.
    Users,
    /// Ten users, on tmpfs, too.
    UsersOfBoth,
    Root,
}

/// The files on which a load acts.
#[derive(Clone, Copy)]
struct Subject<'a> {
    root: &'a File,
    file: &'a File,
}

const LOADS: &[Load] = &[
    Load { name: "nothing", by: By::Nobody, run: |_| {} },
    Load {
        name: "quarantine and repair",
        by: By::Users,
        run: |on| {
            on.set(POISON, &format!("0 {FILE}"));
            on.set(REPAIR, "zero all");
        },
    },
    Load { name: "map", by: By::Users, run: |on| get(on.file, MAP) },
    Load { name: "collapse", by: By::Users, run: |on| on.set(COLLAPSE, "all") },
    Load {
        name: "punch",
        by: By::UsersOfBoth,
        run: |on| {
            let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(on.file, punch, 4096, FILE - 4096).expect("fallocate");
            fallocate(on.file, FallocateFlags::empty(), 0, FILE).expect("fallocate");
        },
    },
    Load {
        name: "ftruncate up and down",
        by: By::UsersOfBoth,
        run: |on| {
            ftruncate(on.file, 4096).expect("ftruncate");
            ftruncate(on.file, FILE).expect("ftruncate");
        },
    },
    Load { name: "check", by: By::Root, run: |on| get(on.root, CHECK) },
    Load { name: "status", by: By::Root, run: |on| get(on.root, attributes::POOL) },
];

/// The name of a call of the stranger, and the call in a directory.
type Call = (&'static str, fn(&File));

const CALLS: &[Call] = &[
    ("open, read and close", |directory| {
        let file =
            openat(directory, "file", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).expect("open");
        let mut byte = [0];
        File::from(file).read_exact_at(&mut byte, 0).expect("read");
    }),
    ("stat", |directory| {
        statx(directory, "file", AtFlags::STATX_FORCE_SYNC, StatxFlags::BASIC_STATS)
            .expect("statx");
    }),
    ("mkdir", |directory| mkdirat(directory, "new", Mode::RWXU).expect("mkdir")),
];

impl Subject<'_> {
    fn set(self, name: &str, value: &str) {
        fsetxattr(self.file, name, value.as_bytes(), XattrFlags::empty()).expect("fsetxattr");
    }
}

fn get(file: &File, name: &str) {
    let mut value = vec![0; VALUE];
    fgetxattr(file, name, &mut value[..]).expect("fgetxattr");
}

/// Measures and adds the rows of this module.
pub fn measure(plan: &Plan, table: &mut Table) {
    for kind in [Kind::Ours, Kind::TmpfsHuge] {
        let side = match kind {
            Kind::Ours => Side::ours(plan, POOL, "pagesize=2M"),
            other => other.mount(plan, POOL),
        };
        match side {
            Ok(side) => measure_in(plan, table, &side, kind),
            Err(why) => table.skip(&format!("a stranger's calls, {}", kind.name()), &why),
        }
    }
}

fn measure_in(plan: &Plan, table: &mut Table, side: &Side, kind: Kind) {
    let time = if plan.short { Duration::from_millis(300) } else { Duration::from_secs(3) };
    let known =
        |load: &&Load| kind == Kind::Ours || matches!(load.by, By::Nobody | By::UsersOfBoth);
    let mut rows: Vec<Vec<Samples>> = CALLS.iter().map(|_| Vec::new()).collect();
    for load in LOADS.iter().filter(known) {
        let samples = beside(load, side, time);
        for (row, samples) in rows.iter_mut().zip(samples) {
            row.push((format!("beside {}", load.name), samples));
        }
    }
    for ((call, _), row) in CALLS.iter().zip(rows) {
        table.growth(&format!("{call} by a stranger, {}", side.name), "ms", row);
    }
}

/// Milliseconds of each of [`CALLS`], made for `time` beside a load.
fn beside(load: &Load, side: &Side, time: Duration) -> Vec<Vec<f64>> {
    let root = File::open(&side.mount_point).expect("the root directory");
    let users = match load.by {
        By::Nobody => 0..0,
        By::Users | By::UsersOfBoth => FIRST_USER..FIRST_USER + USERS,
        By::Root => 0..1,
    };
    let files: Vec<_> =
        (0..USERS).map(|n| own_file(side, &format!("file-{n}"), FIRST_USER + n)).collect();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        for (user, file) in users.zip(&files) {
            let (on, stop) = (Subject { root: &root, file }, &stop);
            scope.spawn(move || {
                become_user(user);
                while !stop.load(Ordering::Relaxed) {
                    (load.run)(on);
                }
            });
        }
        let stranger = scope.spawn(|| live_on(side, time));
        let samples = stranger.join();
        stop.store(true, Ordering::Relaxed);
        samples.expect("a stranger's calls succeed")
    })
}

/// Makes the stranger's calls for `time`. Returns their milliseconds.
fn live_on(side: &Side, time: Duration) -> Vec<Vec<f64>> {
    let path = side.mount_point.join("stranger");
    fs::create_dir_all(&path).expect("mkdir");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).expect("chmod");
    let directory = File::open(&path).expect("a directory");
    become_user(STRANGER);
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC;
    let file = openat(&directory, "file", flags, Mode::RUSR | Mode::WUSR).expect("open");
    File::from(file).write_all_at(b"x", 0).expect("write");
    let mut samples: Vec<Vec<f64>> = CALLS.iter().map(|_| Vec::new()).collect();
    let begun = Instant::now();
    while begun.elapsed() < time {
        for ((_, call), samples) in CALLS.iter().zip(&mut samples) {
            samples.push(milliseconds(|| call(&directory)));
        }
        unlinkat(&directory, "new", AtFlags::REMOVEDIR).expect("rmdir");
        thread::sleep(PAUSE);
    }
    samples
}

/// A file of [`FILE`] bytes that belongs to `user`.
fn own_file(side: &Side, name: &str, user: u32) -> File {
    let file = side.file(name);
    fchown(&file, Some(Uid::from_raw(user)), Some(Gid::from_raw(user))).expect("fchown");
    file.set_len(FILE).expect("ftruncate");
    file
}

/// Makes `user` the user of this thread's calls. Other threads keep theirs.
fn become_user(user: u32) {
    let user = Uid::from_raw(user);
    set_thread_res_uid(user, user, user).expect("root may be any user");
}
