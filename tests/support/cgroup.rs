//! Control groups that belong to one test (cgroups(7)).

use super::limits;
use std::fs;
use std::path::PathBuf;

/// A cgroup of either version. Its processes must be gone when it is dropped.
pub struct Cgroup {
    pub directory: PathBuf,
    /// The file with the limit for its processes.
    pub limit: &'static str,
}

impl Cgroup {
    /// A cgroup with `controller`. The first file of `limits` has the limit in version 1, the
    /// second in version 2.
    pub fn new(name: &str, controller: &str, limits: [&'static str; 2]) -> Self {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let mounted = |kind: &str, option: &str| {
            let mut fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
            let found = fields
                .find(|fields| fields[2] == kind && fields[3].split(',').any(|one| one == option));
            found.map(|fields| PathBuf::from(fields[1]))
        };
        let (parent, limit) = match mounted("cgroup", controller) {
            Some(parent) => (parent, limits[0]),
            None => {
                let parent =
                    mounted("cgroup2", "rw").expect("cgroups of either version are mounted");
                fs::write(parent.join("cgroup.subtree_control"), format!("+{controller}"))
                    .unwrap_or_else(|error| panic!("the {controller} controller: {error}"));
                (parent, limits[1])
            }
        };
        let directory = parent.join(format!("hugetlb2-{name}-{}", std::process::id()));
        fs::create_dir(&directory).unwrap();
        Self { directory, limit }
    }

    /// Bytes of memory of its processes, if its controller is that of memory.
    pub fn taken(&self) -> u64 {
        let file =
            if self.limit == "memory.max" { "memory.current" } else { "memory.usage_in_bytes" };
        let text = fs::read_to_string(self.directory.join(file)).unwrap();
        text.trim().parse().expect("a number")
    }

    pub fn limit(&self, most: u64) {
        fs::write(self.directory.join(self.limit), most.to_string()).unwrap();
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let gone = || fs::remove_dir(&self.directory).is_ok();
            limits::until(limits::ANSWER, "a cgroup whose last process has ended", gone);
        }
    }
}
