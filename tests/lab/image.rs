//! The files that a machine boots from: Debian's kernel, and an initramfs of static programs.

use crate::support::limits;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
/// Test programs of the host that also run in the machine.
pub const SUITES: &[&str] = &["quarantine"];

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// On a busy machine the compiler needs some minutes.
const BUILD: Duration = Duration::from_secs(1800);

/// The paths of the files.
#[derive(Clone)]
pub struct Image {
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
    /// The programs of [`SUITES`].
    pub suites: Vec<PathBuf>,
}

/// The lab's directory for files that take long to make.
pub fn directory() -> PathBuf {
    Path::new(ROOT).join("target/lab")
}

impl Image {
    /// The image of this run. The first call makes it.
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
        let suites =
            SUITES.iter().map(|suite| build_suite(suite)).collect::<Result<Vec<_>, _>>()?;
        let initramfs = directory().join("initramfs");
        let mut files = vec![
            ("init".to_owned(), programs.join("examples/lab-guest")),
            ("hugetlb2".to_owned(), programs.join("hugetlb2")),
            ("hugetlb2fsd".to_owned(), programs.join("hugetlb2fsd")),
            ("toucher".to_owned(), programs.join("toucher")),
            ("handler-c".to_owned(), handlers::build_c()?),
            ("handler-rust".to_owned(), handlers::build_rust()?),
        ];
        files.extend(
            SUITES
                .iter()
                .zip(&suites)
                .map(|(suite, program)| (format!("suite-{suite}"), program.clone())),
        );
        write_archive(&initramfs, &files)
            .map_err(|error| format!("writing {}: {error}", initramfs.display()))?;
        Ok(Self { kernel, initramfs, suites })
    }
}

/// Builds static programs, which need no libraries, and returns their directory.
fn build() -> Result<PathBuf, String> {
    cargo_build(Path::new(ROOT), &["--bins", "--example=lab-guest"])
}

/// Builds one of [`SUITES`] as a static program, and returns the path that cargo prints.
fn build_suite(suite: &str) -> Result<PathBuf, String> {
    let arguments = ["test", "--no-run", "--message-format=json", "--test", suite];
    let messages = run(&mut cargo(Path::new(ROOT), &arguments))?;
    let executable = |line: &str| {
        let (_, rest) =
            line.contains(r#""kind":["test"]"#).then(|| line.split_once(r#""executable":""#))??;
        Some(PathBuf::from(rest.split_once('"')?.0))
    };
    messages
        .lines()
        .filter_map(executable)
        .next_back()
        .ok_or_else(|| format!("cargo has built no {suite}"))
}

/// Builds the package in a directory with these arguments, and returns the directory of its
/// programs.
fn cargo_build(package: &Path, arguments: &[&str]) -> Result<PathBuf, String> {
    run(cargo(package, &["build"]).args(arguments))?;
    Ok(directory().join("build").join(TARGET).join("release"))
}

/// A command of cargo for static programs, in a target directory of the lab's own.
fn cargo(package: &Path, arguments: &[&str]) -> Command {
    let mut cargo = Command::new(env!("CARGO"));
    cargo
        .current_dir(package)
        .args(arguments)
        .args(["--quiet", "--release", "--target", TARGET, "--target-dir"])
        .arg(directory().join("build"))
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        // A machine copies the programs into its memory.
        .env("CARGO_PROFILE_RELEASE_STRIP", "debuginfo")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        // These are the host's programs; the guest has its own.
        .env_remove("CARGO_BIN_EXE_hugetlb2")
        .env_remove("CARGO_BIN_EXE_toucher");
    cargo
}

/// Runs a compiler and returns its output; the error holds the output, too.
fn run(command: &mut Command) -> Result<String, String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = limits::output(BUILD, command)
        .map_err(|error| format!("{program} cannot be started: {error}"))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(format!(
            "a static program cannot be built:\n{}",
            String::from_utf8_lossy(&output.stderr)
        ))
    }
}

/// Writes a cpio archive in the format that the kernel unpacks
/// (Documentation/driver-api/early-userspace/buffer-format.rst).
fn write_archive(path: &Path, files: &[(String, PathBuf)]) -> std::io::Result<()> {
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

/// The programs of docs/HANDLERS.md, built unchanged.
mod handlers {
    use super::{ROOT, cargo_build, directory, run};
    use std::fs;
    use std::path::{Path, PathBuf};
    use std::process::Command;

    const MANIFEST: &str = r#"[package]
name = "handler-rust"
version = "0.0.0"
edition = "2024"

[dependencies]
libc = "0.2"

# Not one with the package around it.
[workspace]
"#;

    pub fn build_c() -> Result<PathBuf, String> {
        let program = directory().join("handler-c");
        let source = directory().join("handler.c");
        write(&source, &block("c")?)?;
        let mut gcc = Command::new("gcc");
        gcc.args(["-static", "-O2", "-Wall", "-Werror", "-o"]).arg(&program).arg(&source);
        run(&mut gcc)?;
        Ok(program)
    }

    pub fn build_rust() -> Result<PathBuf, String> {
        let package = directory().join("handler-rust");
        fs::create_dir_all(package.join("src"))
            .map_err(|error| format!("making {}: {error}", package.display()))?;
        write(&package.join("Cargo.toml"), MANIFEST)?;
        write(&package.join("src/main.rs"), &block("rust")?)?;
        // The libc of our own build is at hand. cargo drops the other packages of this lock file.
        write(&package.join("Cargo.lock"), &read(&Path::new(ROOT).join("Cargo.lock"))?)?;
        Ok(cargo_build(&package, &["--offline"])?.join("handler-rust"))
    }

    /// The program of docs/HANDLERS.md in this language.
    fn block(language: &str) -> Result<String, String> {
        let document = read(&Path::new(ROOT).join("docs/HANDLERS.md"))?;
        let fence = format!("\n```{language}\n");
        let program = document.split_once(&fence).and_then(|(_, rest)| rest.split_once("\n```\n"));
        let (program, _) =
            program.ok_or_else(|| format!("docs/HANDLERS.md has no program in {language}"))?;
        Ok(format!("{program}\n"))
    }

    fn read(path: &Path) -> Result<String, String> {
        fs::read_to_string(path).map_err(|error| format!("reading {}: {error}", path.display()))
    }

    fn write(path: &Path, text: &str) -> Result<(), String> {
        fs::write(path, text).map_err(|error| format!("writing {}: {error}", path.display()))
    }
}
