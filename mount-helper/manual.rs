//! The man pages and the completions of shells, from the same tables as the programs themselves:
//! clap's commands, the options of a mount, and the attributes.

use clap::Command;
use clap_complete::{Shell, generate};
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, italic, roman};
use hugetlb2fs::attributes::{self, Attribute};
use hugetlb2fs::options;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// The section of the programs, and that of the filesystem.
const PROGRAMS: &str = "8";
const FORMATS: &str = "5";

/// The page of the filesystem.
const FILESYSTEM: &str = "hugetlb2fs";

const SOURCE: &str = concat!("hugetlb2fs ", env!("CARGO_PKG_VERSION"));

const MANUAL: &str = "System administration";

const OTHERS: [&str; 5] =
    ["hugetlb2(8)", "hugetlb2fs(5)", "mount.hugetlb2(8)", "umount.fuse.hugetlb2(8)", "mount(8)"];

/// Other names of programs.
const ALIASES: [(&str, &str); 2] =
    [("mount.fuse.hugetlb2", "mount.hugetlb2"), ("umount.hugetlb2", "umount.fuse.hugetlb2")];

/// Writes all of them below `directory`, where /usr/share has them. `hugetlb2` is the command for
/// people, and `programs` are the others.
///
/// # Errors
/// The errors of mkdir(2) and write(2).
pub fn write(directory: &Path, hugetlb2: &Command, programs: &[Command]) -> io::Result<()> {
    let man = directory.join("man/man8");
    fs::create_dir_all(&man)?;
    for program in std::iter::once(hugetlb2).chain(programs) {
        let mut program = program.clone().disable_help_subcommand(true);
        program.build(); // gives each subcommand its whole name
        for command in with_subcommands(&program) {
            let name = command.get_display_name().unwrap_or(command.get_name()).to_owned();
            put(man.join(format!("{name}.{PROGRAMS}")), page_of(command, &name)?)?;
        }
    }
    for (alias, name) in ALIASES {
        let page = format!(".so man8/{name}.{PROGRAMS}\n");
        put(man.join(format!("{alias}.{PROGRAMS}")), page)?;
    }
    let man = directory.join("man/man5");
    fs::create_dir_all(&man)?;
    put(man.join(format!("{FILESYSTEM}.{FORMATS}")), filesystem())?;
    completions(directory, hugetlb2)
}

/// Writes a file. A link in its place is not followed, and goes.
fn put(path: PathBuf, bytes: impl AsRef<[u8]>) -> io::Result<()> {
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => File::create_new(path)?.write_all(bytes.as_ref()),
    }
}

/// A command, and its subcommands at all depths.
fn with_subcommands(command: &Command) -> Vec<Command> {
    let below = command.get_subcommands().flat_map(with_subcommands);
    std::iter::once(command.clone()).chain(below).collect()
}

fn page_of(command: Command, name: &str) -> io::Result<Vec<u8>> {
    let notes = command.get_after_long_help().or(command.get_after_help()).map(ToString::to_string);
    let has_subcommands = command.has_subcommands();
    let page = Man::new(command)
        .title(name.to_uppercase())
        .section(PROGRAMS)
        .source(SOURCE)
        .manual(MANUAL);
    let mut text = Vec::new();
    page.render_title(&mut text)?;
    page.render_name_section(&mut text)?;
    page.render_synopsis_section(&mut text)?;
    page.render_description_section(&mut text)?;
    page.render_options_section(&mut text)?;
    if has_subcommands {
        page.render_subcommands_section(&mut text)?;
    }
    if let Some(notes) = notes {
        text.extend(as_it_is("NOTES", &notes).into_bytes());
    }
    let mut others = Roff::new();
    others.control("SH", ["SEE ALSO"]);
    let list = OTHERS.iter().filter(|other| !other.starts_with(&format!("{name}(")));
    others.text([roman(list.copied().collect::<Vec<_>>().join(", "))]);
    text.extend(others.to_roff().into_bytes());
    Ok(text)
}

/// A section whose lines stay as they are.
fn as_it_is(heading: &str, lines: &str) -> String {
    let mut section = Roff::new();
    section.control("SH", [heading]);
    section.control("EX", []);
    lines.lines().for_each(|line| {
        section.text([roman(line)]);
    });
    section.control("EE", []);
    section.to_roff()
}

/// The page of mount options and attributes.
fn filesystem() -> String {
    let mut page = Roff::new();
    page.control("TH", [&FILESYSTEM.to_uppercase(), FORMATS, "", SOURCE, MANUAL]);
    page.control("SH", ["NAME"]);
    page.text([roman(format!(
        "{FILESYSTEM} - {}",
        env!("CARGO_PKG_DESCRIPTION").trim_start_matches("A ").trim_end_matches('.')
    ))]);
    page.control("SH", ["DESCRIPTION"]);
    page.text([roman(
        "A pool of gigantic pages is taken from the machine's memory when it is mounted. Programs map the files in it by 2 MiB \
         entries. A memory error costs the 4 KiB that it hit: these are quarantined, a touch of them is SIGBUS and a read(2) is \
         EIO, and all else goes on. A repair puts a healthy subpage back.",
    )]);
    page.control("SH", ["OPTIONS"]);
    page.text([roman("Beside the generic ones of mount(8):")]);
    for row in options::TABLE {
        page.control("TP", []);
        page.text([bold(row.name), roman("="), italic(row.value)]);
        let default = row.default.map_or("required".to_owned(), |value| format!("default {value}"));
        page.text([roman(format!("{} ({default})", row.help))]);
    }
    page.control("SH", ["ATTRIBUTES"]);
    page.text([roman(
        "Extended attributes (xattr(7)) are the interface, and hugetlb2(8) is a program for it. Values are text: one item a \
         line, numbers decimal or 0x hexadecimal.",
    )]);
    for row in attributes::TABLE.iter().filter(|row| !row.only_for_tests) {
        page.control("TP", []);
        let on = match row.attribute {
            Attribute::File(_) => "regular files",
            Attribute::Entry(_) => "regular files and directories",
            Attribute::Root(_) => "the mount point",
        };
        page.text([bold(row.name), roman(" of "), roman(on)]);
        let read = row.get.map(|what| format!("Read: {what}."));
        let written = row.set.map(|what| format!("Written: {what}."));
        page.text([roman(read.into_iter().chain(written).collect::<Vec<_>>().join(" "))]);
    }
    page.control("SH", ["SEE ALSO"]);
    page.text([roman(
        "hugetlb2(8), mount.hugetlb2(8), umount.fuse.hugetlb2(8), mount(8), xattr(7)",
    )]);
    page.to_roff()
}

/// The completions of each shell, where Debian has them.
fn completions(directory: &Path, hugetlb2: &Command) -> io::Result<()> {
    let name = hugetlb2.get_name().to_owned();
    for (shell, path) in [
        (Shell::Bash, format!("bash-completion/completions/{name}")),
        (Shell::Zsh, format!("zsh/vendor-completions/_{name}")),
        (Shell::Fish, format!("fish/vendor_completions.d/{name}.fish")),
    ] {
        let path = directory.join(path);
        fs::create_dir_all(path.parent().expect("it is below the directory"))?;
        let mut text = Vec::new();
        generate(shell, &mut hugetlb2.clone(), &name, &mut text);
        put(path, text)?;
    }
    Ok(())
}
