//! What a machine boots: Debian's kernel, and an initramfs of static programs.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Paths of both.
#[derive(Clone)]
pub struct Image {
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
}

/// Where the lab keeps what takes long to make.
pub fn directory() -> PathBuf {
    Path::new(ROOT).join("target/lab")
}

impl Image {
    /// The image of this run, made at the first call.
    pub fn get() -> Result<Self, String> {
        static IMAGE: OnceLock<Result<Image, String>> = OnceLock::new();
        IMAGE.get_or_init(Self::make).clone()
    }

    fn make() -> Result<Self, String> {
        let kernel = directory().join("vmlinuz");
        if !kernel.is_file() {
            return Err(format!(
                "{} is not there: tests/lab/fetch-kernel fetches it from Debian",
                kernel.display()
            ));
        }
        let programs = build()?;
        let initramfs = directory().join("initramfs");
        let files = [
            ("init", programs.join("examples/lab-guest")),
            ("hugetlb2", programs.join("hugetlb2")),
            ("hugetlb2fsd", programs.join("hugetlb2fsd")),
        ];
        write_archive(&initramfs, &files)
            .map_err(|error| format!("writing {}: {error}", initramfs.display()))?;
        Ok(Self { kernel, initramfs })
    }
}

/// Builds the programs without a need for libraries, in a target directory of their own; returns where they are.
fn build() -> Result<PathBuf, String> {
    let target = directory().join("build");
    let output = Command::new(env!("CARGO"))
        .current_dir(ROOT)
        .args([
            "build",
            "--quiet",
            "--release",
            "--bins",
            "--example=lab-guest",
            "--target",
            TARGET,
            "--target-dir",
        ])
        .arg(&target)
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .env("CARGO_PROFILE_RELEASE_STRIP", "debuginfo") // a machine copies them into its memory
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("CARGO_BIN_EXE_hugetlb2") // of the host; the guest has its own
        .output()
        .map_err(|error| format!("cargo cannot be started: {error}"))?;
    if output.status.success() {
        Ok(target.join(TARGET).join("release"))
    } else {
        Err(format!("the static programs cannot be built:\n{}", String::from_utf8_lossy(&output.stderr)))
    }
}

/// A cpio archive in the format that the kernel unpacks (Documentation/driver-api/early-userspace/buffer-format.rst).
fn write_archive(path: &Path, files: &[(&str, PathBuf)]) -> std::io::Result<()> {
    const EXECUTABLE: u32 = 0o100_755;
    let mut out = File::create(path)?;
    for (inode, (name, source)) in (1..).zip(files) {
        let content = fs::read(source)?;
        let entry = cpio::newc::Builder::new(name).ino(inode).nlink(1).mode(EXECUTABLE);
        let length = u32::try_from(content.len()).map_err(std::io::Error::other)?;
        let mut writer = entry.write(&mut out, length);
        writer.write_all(&content)?;
        writer.finish()?;
    }
    cpio::newc::trailer(&mut out)?.flush()
}
