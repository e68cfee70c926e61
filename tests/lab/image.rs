//! The files that a machine boots from: Debian's kernel, and an initramfs of our programs with the
//! libraries of the host that these need.

use crate::cases::Machine;
use crate::support::limits;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
/// Test programs of the host that also run in the machine.
pub const SUITES: &[&str] = &["quarantine", "guard"];

/// Debian's programs of [`Machine::programs`](crate::cases::Machine): the place of each in the
/// initramfs, and its path here. QEMU loads its emulator of processors at run time.
const PROGRAMS: &[(&str, &str)] = &[
    ("numactl", "/usr/bin/numactl"),
    ("qemu-system-x86_64", "/usr/bin/qemu-system-x86_64"),
    ("lib/qemu/accel-tcg-x86_64.so", "/usr/lib/x86_64-linux-gnu/qemu/accel-tcg-x86_64.so"),
];

/// The directory of the initramfs for the kernel's modules of `tests/lab/fetch-kernel`.
const MODULES: &str = "lib/devices";

/// Our programs as the tests of the host have them: a worker dies where it is told to.
const KILLABLE: [(&str, &str); 2] = [
    ("lib/killable/hugetlb2", env!("CARGO_BIN_EXE_hugetlb2")),
    ("lib/killable/hugetlb2fsd", env!("CARGO_BIN_EXE_hugetlb2fsd")),
];

/// The package is built as for a release, without the kill points and the failing of system calls.
/// Other packages are those of this test's own build: only the code that is tested has to differ.
const AS_IN_A_RELEASE: [&str; 3] =
    ["debug-assertions=false", "overflow-checks=false", "opt-level=3"];

/// The paths of the files.
#[derive(Clone)]
pub struct Image {
    pub kernel: PathBuf,
    initramfs: PathBuf,
    /// An initramfs that has [`PROGRAMS`], too.
    with_programs: PathBuf,
    /// An initramfs that has all that a machine within needs, if that was fetched.
    with_nested: PathBuf,
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
        let own = without_debug_information(own_programs(&programs, &suites)?)?;
        let initramfs = write_initramfs("initramfs", &own)?;
        let others = PROGRAMS.iter().map(|(place, path)| ((*place).to_owned(), path.into()));
        let killable = KILLABLE.map(|(place, path)| (place.to_owned(), path.into()));
        let killable = without_debug_information(killable.to_vec())?;
        let all: Vec<_> = own.iter().cloned().chain(killable).chain(others).collect();
        let with_programs = write_initramfs("initramfs-programs", &all)?;
        let with_nested = with_nested(&own, &kernel, &programs)?;
        Ok(Self { kernel, initramfs, with_programs, with_nested, suites })
    }

    /// The initramfs for a machine.
    pub fn initramfs_of(&self, machine: Machine) -> &Path {
        match machine {
            Machine { nested: true, .. } => &self.with_nested,
            Machine { programs: true, .. } => &self.with_programs,
            _ => &self.initramfs,
        }
    }
}

/// Writes the initramfs of a machine that runs another one within: the files of
/// `tests/lab/fetch-nested` as far as they are there, the kernel, and that machine's initramfs.
fn with_nested(own: &[Program], kernel: &Path, programs: &Path) -> Result<PathBuf, String> {
    let place = |name: &str| format!("lib/nested/{name}");
    let fetched = directory().join("nested");
    let Ok(entries) = fs::read_dir(&fetched) else {
        return write_initramfs("initramfs-nested", own);
    };
    let init = ("init-within".to_owned(), programs.join("examples/lab-nested"));
    let init = without_debug_information(vec![init])?.remove(0).1;
    let within = write_initramfs("initramfs-within", &[("init".to_owned(), init)])?;
    let mut data = vec![(place("vmlinuz"), kernel.to_owned()), (place("initramfs"), within)];
    for entry in entries {
        let entry = entry.map_err(|error| format!("{}: {error}", fetched.display()))?;
        data.push((place(&entry.file_name().to_string_lossy()), entry.path()));
    }
    let (qemu, data): (Vec<_>, Vec<_>) =
        data.into_iter().partition(|(place, _)| place.ends_with("/qemu-system-x86_64"));
    let all: Vec<Program> = own.iter().cloned().chain(qemu).collect();
    write_initramfs_with("initramfs-nested", &all, data)
}

/// The place of a program in an initramfs, and its path on the host.
type Program = (String, PathBuf);

/// The programs that are built for the machine.
fn own_programs(programs: &Path, suites: &[PathBuf]) -> Result<Vec<Program>, String> {
    let mut built = vec![
        ("init".to_owned(), programs.join("examples/lab-guest")),
        ("handler-c".to_owned(), handlers::build_c()?),
        ("handler-rust".to_owned(), handlers::build_rust()?),
    ];
    let own = ["hugetlb2", "hugetlb2fsd", "toucher", "libhugetlb2_guard.so"];
    built.extend(own.map(|name| (name.to_owned(), programs.join(name))));
    let suites = SUITES.iter().zip(suites);
    built.extend(suites.map(|(suite, program)| (format!("suite-{suite}"), program.clone())));
    Ok(built)
}

/// Copies of programs without what only a debugger needs. That is more than half of them, and the
/// machine keeps them in memory, all on one NUMA node.
fn without_debug_information(programs: Vec<Program>) -> Result<Vec<Program>, String> {
    let stripped = directory().join("stripped");
    fs::create_dir_all(&stripped)
        .map_err(|error| format!("making {}: {error}", stripped.display()))?;
    let strip = |(place, program): Program| {
        let copy = stripped.join(place.replace('/', "-"));
        run(Command::new("strip").arg("--strip-debug").arg("-o").arg(&copy).arg(program))?;
        Ok((place, copy))
    };
    programs.into_iter().map(strip).collect()
}

/// Writes an initramfs of programs and their libraries, which lie there where the host has them.
/// Returns its path.
fn write_initramfs(name: &str, programs: &[Program]) -> Result<PathBuf, String> {
    write_initramfs_with(name, programs, modules())
}

/// The kernel's modules, as far as they are there: the case that loads them says if not.
fn modules() -> Vec<Program> {
    let entries = fs::read_dir(directory().join("modules")).into_iter().flatten();
    let named = |entry: fs::DirEntry| {
        (format!("{MODULES}/{}", entry.file_name().to_string_lossy()), entry.path())
    };
    entries.filter_map(Result::ok).map(named).collect()
}

/// As [`write_initramfs`], with other files.
fn write_initramfs_with(
    name: &str,
    programs: &[Program],
    mut files: Vec<Program>,
) -> Result<PathBuf, String> {
    files.extend(programs.iter().cloned());
    let mut libraries = BTreeSet::new();
    for (_, program) in programs {
        libraries.extend(libraries_of(program)?);
    }
    let place = |library: &PathBuf| library.to_string_lossy().trim_start_matches('/').to_owned();
    files.extend(libraries.into_iter().map(|library| (place(&library), library)));
    let path = directory().join(name);
    write_archive(&path, &files).map_err(|error| format!("writing {}: {error}", path.display()))?;
    Ok(path)
}

/// The libraries of a program, and the loader of these (ldd(1)).
fn libraries_of(program: &Path) -> Result<Vec<PathBuf>, String> {
    let text = run(Command::new("ldd").arg(program))?;
    let words = text.split_ascii_whitespace();
    Ok(words.filter(|word| word.starts_with('/')).map(PathBuf::from).collect())
}

/// Builds our programs for the machine, and returns their directory.
fn build() -> Result<PathBuf, String> {
    run(package_cargo("build")?.args(["--lib", "--bins", "--examples"]))?;
    Ok(build_directory().join("debug"))
}

/// Builds one of [`SUITES`] for the machine, and returns the path that cargo prints.
fn build_suite(suite: &str) -> Result<PathBuf, String> {
    let mut cargo = package_cargo("test")?;
    cargo.args(["--no-run", "--message-format=json", "--test", suite]);
    let messages = run(&mut cargo)?;
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

/// The directory of the programs for the machine.
fn build_directory() -> PathBuf {
    directory().join("build")
}

/// A command of cargo that builds this package for the machine. It finds the other packages, built
/// for this test, in the directory above this test's own.
fn package_cargo(command: &str) -> Result<Command, String> {
    let here = std::env::current_exe().map_err(|error| format!("this program: {error}"))?;
    let mut cargo = cargo(Path::new(ROOT), command);
    for setting in AS_IN_A_RELEASE {
        let package = env!("CARGO_PKG_NAME");
        cargo.arg("--config").arg(format!("profile.dev.package.{package}.{setting}"));
    }
    if let Some(directory) = here.ancestors().nth(3) {
        cargo.env("CARGO_BUILD_BUILD_DIR", directory);
    }
    Ok(cargo)
}

/// A command of cargo whose programs do not replace those of this test.
fn cargo(package: &Path, command: &str) -> Command {
    let mut cargo = Command::new(env!("CARGO"));
    cargo
        .current_dir(package)
        .args([command, "--quiet", "--target-dir"])
        .arg(build_directory())
        // These are the host's programs; the guest has its own.
        .env_remove("CARGO_BIN_EXE_hugetlb2")
        .env_remove("CARGO_BIN_EXE_toucher");
    cargo
}

/// Runs a compiler and returns its output; the error holds the output, too.
fn run(command: &mut Command) -> Result<String, String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = limits::output(limits::BUILD, command)
        .map_err(|error| format!("{program} cannot be started: {error}"))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(format!("{program} fails:\n{}", String::from_utf8_lossy(&output.stderr)))
    }
}

/// Writes a cpio archive in the format that the kernel unpacks
/// (Documentation/driver-api/early-userspace/buffer-format.rst).
fn write_archive(path: &Path, files: &[(String, PathBuf)]) -> std::io::Result<()> {
    const EXECUTABLE: u32 = 0o100_755;
    const DIRECTORY: u32 = 0o040_755;
    let mut entries = BTreeMap::new(); // a directory stands before all that is in it
    for (name, source) in files {
        let above = Path::new(name).ancestors().skip(1).filter(|path| path.parent().is_some());
        entries.extend(above.map(|path| (path.to_owned(), (DIRECTORY, Vec::new()))));
        entries.insert(PathBuf::from(name), (EXECUTABLE, fs::read(source)?));
    }
    let mut out = File::create(path)?;
    for (inode, (name, (mode, content))) in (1..).zip(entries) {
        let entry =
            cpio::newc::Builder::new(&name.to_string_lossy()).ino(inode).nlink(1).mode(mode);
        let length = u32::try_from(content.len()).map_err(std::io::Error::other)?;
        let mut writer = entry.write(&mut out, length);
        writer.write_all(&content)?;
        writer.finish()?;
    }
    cpio::newc::trailer(&mut out)?.flush()
}

/// The programs of docs/HANDLERS.md, built unchanged.
mod handlers {
    use super::{ROOT, build_directory, cargo, directory, run};
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
        gcc.args(["-O2", "-Wall", "-Werror", "-o"]).arg(&program).arg(&source);
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
        run(cargo(&package, "build").args(["--release", "--offline"]))?;
        Ok(build_directory().join("release/handler-rust"))
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
