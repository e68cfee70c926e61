//! Style that a test can see.

use std::fs;
use std::path::{Path, PathBuf};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

fn sources(directory: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut pending = vec![Path::new(ROOT).join(directory)];
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(&directory).expect("a directory") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                pending.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    assert!(!found.is_empty(), "no source in {directory}");
    found
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).expect("readable text")
}

/// The modules of `lib.rs`, in its order.
fn layers() -> Vec<String> {
    let lib = read(&Path::new(ROOT).join("src/lib.rs"));
    lib.lines()
        .filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';'))
        .map(str::to_owned)
        .collect()
}

/// The module of `lib.rs` that a source file belongs to.
fn layer_of(path: &Path) -> Option<String> {
    let relative = path.strip_prefix(Path::new(ROOT).join("src")).expect("below src");
    let first = relative.components().next()?.as_os_str().to_str()?;
    let name = first.strip_suffix(".rs").unwrap_or(first);
    (name != "lib" && name != "main").then(|| name.to_owned())
}

#[test]
fn a_module_uses_only_those_above_it() {
    let layers = layers();
    assert!(layers.len() > 10, "the list of layers was not found");
    let rank = |name: &str| layers.iter().position(|layer| layer == name);
    let mut wrong = Vec::new();
    for path in sources("src") {
        let Some(own) = layer_of(&path) else { continue };
        let own_rank = rank(&own).unwrap_or_else(|| panic!("{own} is not in lib.rs"));
        for (number, line) in read(&path).lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            for used in code.split("crate::").skip(1) {
                let name: String =
                    used.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect();
                if rank(&name).is_some_and(|rank| rank > own_rank) {
                    wrong.push(format!("{}:{}: {own} uses {name}", path.display(), number + 1));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn unsafe_code_is_only_in_sys() {
    // fuser asks for it by the number of what the kernel was given before, and its types are not for `sys`.
    const ELSEWHERE: &[&str] = &["src/fuse/backing.rs"];
    for path in sources("src").into_iter().chain(sources("mount-helper")).chain(sources("tests")) {
        let inside_sys = layer_of_any(&path) == Some("sys".to_owned());
        let inside_sys = inside_sys || ELSEWHERE.iter().any(|known| path.ends_with(known));
        let allows = read(&path).contains(concat!("allow(", "unsafe_code)"));
        assert!(!allows || inside_sys, "{} allows unsafe code", path.display());
    }
}

fn layer_of_any(path: &Path) -> Option<String> {
    path.starts_with(Path::new(ROOT).join("src")).then(|| layer_of(path)).flatten()
}

#[test]
fn sources_are_ascii_and_their_lines_fit() {
    const WIDEST: usize = 140;
    for path in ["src", "mount-helper", "tests", "benches"].into_iter().flat_map(sources) {
        for (number, line) in read(&path).lines().enumerate() {
            let place = format!("{}:{}", path.display(), number + 1);
            assert!(line.is_ascii(), "{place} is not ASCII");
            assert!(line.len() <= WIDEST, "{place} has {} columns", line.len());
            assert!(!line.ends_with(' '), "{place} ends with a space");
        }
    }
}

/// `tests/support/limits.rs` has these calls with a limit.
#[test]
fn no_test_waits_without_a_limit() {
    const ENDLESS: [&str; 4] = [
        concat!(".output", "()"),
        concat!(".recv", "()"),
        concat!("wait_with", "_output()"),
        concat!("], ", "None)"),
    ];
    for path in sources("tests").into_iter().chain(sources("benches")) {
        if path.ends_with("tests/support/limits.rs") {
            continue;
        }
        for (number, line) in read(&path).lines().enumerate() {
            let endless = ENDLESS.iter().find(|call| line.contains(**call));
            assert_eq!(endless, None, "{}:{} waits without a limit", path.display(), number + 1);
        }
    }
}

#[test]
fn fuser_is_named_only_in_the_fuse_module() {
    for path in sources("src").into_iter().chain(sources("mount-helper")) {
        let named = read(&path).lines().any(|line| line.contains(concat!("fuser", "::")));
        assert!(!named || layer_of_any(&path) == Some("fuse".to_owned()), "{} names fuser", path.display());
    }
}

#[test]
fn every_test_that_the_readme_names_exists() {
    let readme = read(&Path::new(ROOT).join("README.md"));
    let tests: String = sources("tests")
        .iter()
        .chain(&sources("src"))
        .chain(&sources("mount-helper"))
        .map(|path| read(path))
        .collect();
    let mut named = 0;
    for line in readme.lines() {
        for name in line.split('`').skip(1).step_by(2).filter(|word| word.matches('_').count() >= 3) {
            assert!(
                tests.contains(&format!("fn {name}()")),
                "README names the test {name}, which is not there"
            );
            named += 1;
        }
    }
    assert!(named >= 12, "the behaviour table was not found: {named} tests named");
}
