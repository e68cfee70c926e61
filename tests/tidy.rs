//! Rules of style that a test can check, and claims of the documents that need no mount.

#[path = "support/documents.rs"]
#[allow(dead_code)]
mod documents;

use documents::{document, documents, is_test_name, prose, quoted, rows, section};
use std::fs;
use std::path::{Path, PathBuf};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// Words that open a sentence without an actor.
const OPENINGS: [&str; 4] = ["What ", "Who ", "Whether ", "How "];

/// Words that name no actor.
const RIDDLES: [&str; 5] = ["nobody", "somebody", "anybody", "whoever", "Whoever"];

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

/// The modules that a file declares, in its order.
fn layers(file: &str) -> Vec<String> {
    let root = read(&Path::new(ROOT).join(file));
    let name = |line: &str| {
        let line = line.strip_prefix("pub ").unwrap_or(line);
        Some(line.strip_prefix("mod ")?.strip_suffix(';')?.to_owned())
    };
    root.lines().filter_map(name).collect()
}

/// The modules that a file names behind `crate::`, one by one or in braces, with the line numbers.
fn used_modules(path: &Path) -> Vec<(usize, String)> {
    let text = read(path);
    let code = text.lines().map(|line| line.split("//").next().unwrap_or_default());
    let code = code.collect::<Vec<_>>().join("\n");
    let mut used = Vec::new();
    for (at, prefix) in code.match_indices("crate::") {
        let line = 1 + code[..at].matches('\n').count();
        let rest = &code[at + prefix.len()..];
        let names = rest.strip_prefix('{').map_or_else(|| vec![rest], members);
        used.extend(names.into_iter().map(|name| (line, first_word(name))));
    }
    used
}

/// The members of a group, of which `text` is all that is behind its brace.
fn members(text: &str) -> Vec<&str> {
    let (mut members, mut depth, mut start) = (Vec::new(), 0, 0);
    for (at, c) in text.char_indices() {
        match c {
            '{' => depth += 1,
            ',' | '}' if depth == 0 => {
                members.push(&text[start..at]);
                start = at + 1;
                if c == '}' {
                    break;
                }
            }
            '}' => depth -= 1,
            _ => {}
        }
    }
    members
}

fn first_word(text: &str) -> String {
    text.trim_start().chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect()
}

/// The module that a source file in `directory` belongs to.
fn layer_below(path: &Path, directory: &str) -> Option<String> {
    let relative = path.strip_prefix(Path::new(ROOT).join(directory)).expect("below it");
    let first = relative.components().next()?.as_os_str().to_str()?;
    let name = first.strip_suffix(".rs").unwrap_or(first);
    // The library that is loaded into programs is a package of its own.
    let is_root = matches!(name, "lib" | "main" | "preload");
    (!is_root).then(|| name.to_owned())
}

/// The uses in `directory` of a module that stands below the user in the list in `file`.
fn upward_uses(directory: &str, file: &str) -> Vec<String> {
    let layers = layers(file);
    assert!(layers.len() > 10, "the list of layers was not found in {file}");
    let rank = |name: &str| layers.iter().position(|layer| layer == name);
    let mut wrong = Vec::new();
    for path in sources(directory) {
        let Some(own) = layer_below(&path, directory) else { continue };
        let own_rank = rank(&own).unwrap_or_else(|| panic!("{own} is not in {file}"));
        let used = used_modules(&path).into_iter();
        let above = used.filter(|(_, name)| rank(name).is_some_and(|rank| rank > own_rank));
        wrong.extend(
            above.map(|(line, name)| format!("{}:{line}: {own} uses {name}", path.display())),
        );
    }
    wrong
}

#[test]
fn a_module_uses_only_those_above_it() {
    let mut wrong = upward_uses("src", "src/lib.rs");
    wrong.extend(upward_uses("mount-helper", "mount-helper/main.rs"));
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_map_of_the_code_has_each_module() {
    let lib = read(&Path::new(ROOT).join("src/lib.rs"));
    let row = |line: &str| Some(line.strip_prefix("//! | [`")?.split_once("`] |")?.0.to_owned());
    assert_eq!(lib.lines().filter_map(row).collect::<Vec<_>>(), layers("src/lib.rs"));
}

#[test]
fn unsafe_is_only_in_sys() {
    // Of the programs, of the tests, and the functions that C programs call.
    const PLACES: [&str; 3] = ["src/sys", "tests/support/sys", "mount-helper/preload"];
    for path in ["src", "mount-helper", "tests", "benches"].into_iter().flat_map(sources) {
        let is_inside = PLACES.iter().any(|place| path.starts_with(Path::new(ROOT).join(place)));
        let allows = read(&path).contains(concat!("unsafe", "_code"));
        assert!(!allows || is_inside, "{} allows unsafe code", path.display());
    }
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

/// The text of a line that is a comment and nothing else.
fn comment_of(line: &str) -> Option<&str> {
    let text = line.trim_start().strip_prefix("//")?;
    Some(text.strip_prefix(['/', '!']).unwrap_or(text).trim_start_matches(' '))
}

/// Comments that lie in no drawing or program (between two lines of "```").
fn comments_of(text: &str) -> Vec<(usize, &str, &str)> {
    let mut is_fenced = false;
    let mut found = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let Some(comment) = comment_of(line) else { continue };
        let is_fence = comment.starts_with("```");
        is_fenced ^= is_fence;
        if !is_fenced && !is_fence {
            found.push((number + 1, line, comment));
        }
    }
    found
}

#[test]
fn comments_fit_and_name_the_actor() {
    const WIDEST: usize = 100;
    for path in ["src", "mount-helper", "tests", "benches"].into_iter().flat_map(sources) {
        for (number, line, comment) in comments_of(&read(&path)) {
            let place = format!("{}:{number}", path.display());
            assert!(line.len() <= WIDEST, "{place} is a comment of {} columns", line.len());
            let opens = OPENINGS.iter().any(|opening| comment.starts_with(opening));
            assert!(!opens, "{place}: a sentence that names no actor: {comment:?}");
            let riddle = RIDDLES.iter().find(|riddle| comment.contains(**riddle));
            assert_eq!(riddle, None, "{place}: {comment:?}");
        }
    }
}

/// `tests/support/limits.rs` makes these calls with a limit.
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

/// `src/sys/backing.rs` wraps the one call of fuser that is unsafe.
#[test]
fn fuser_is_named_only_in_fuse_and_for_its_unsafe_call() {
    for path in ["src", "mount-helper", "tests", "benches"].into_iter().flat_map(sources) {
        let named = read(&path).lines().any(|line| line.contains(concat!("fuser", "::")));
        let is_inside = path.starts_with(Path::new(ROOT).join("src/fuse"));
        assert!(
            !named || is_inside || path.ends_with("src/sys/backing.rs"),
            "{} names fuser",
            path.display()
        );
    }
}

// ---- documents ----------------------------------------------------------------------------------

#[test]
fn documents_are_ascii_and_their_lines_fit() {
    const WIDEST: usize = 120;
    for (path, text) in documents() {
        for (number, line) in text.lines().enumerate() {
            let place = format!("{path}:{}", number + 1);
            assert!(line.is_ascii(), "{place} is not ASCII");
            assert!(
                line.starts_with('|') || line.len() <= WIDEST,
                "{place} has {} columns",
                line.len()
            );
            assert!(!line.ends_with(' '), "{place} ends with a space");
        }
    }
}

#[test]
fn documents_name_the_actor() {
    for (path, text) in documents() {
        let text = prose(&text);
        let sentences =
            text.split(['.', '|', '\n']).map(|part| part.trim_start_matches([' ', '-', '*']));
        for sentence in sentences {
            let opens = OPENINGS.iter().any(|opening| sentence.starts_with(opening));
            assert!(!opens, "{path}: a sentence that names no actor: {sentence:?}");
        }
        for riddle in RIDDLES {
            assert!(!text.contains(riddle), "{path} says {riddle}");
        }
    }
}

#[test]
fn each_test_that_a_document_names_exists() {
    let places = ["tests", "src", "mount-helper"].into_iter().flat_map(sources);
    let tests: String = places.map(|path| read(&path)).collect();
    let mut named = 0;
    for (path, text) in documents() {
        let lines = text.lines().filter(|line| !line.starts_with("```"));
        for name in lines.flat_map(quoted).filter(|word| is_test_name(word)) {
            assert!(
                tests.contains(&format!("fn {name}()")),
                "{path} names the test {name}, which is not there"
            );
            named += 1;
        }
    }
    assert!(named >= 100, "the tables of behaviour were not found: {named} tests named");
}

#[test]
fn each_row_of_behaviour_names_its_test() {
    let (_, text) =
        documents().into_iter().find(|(path, _)| path == "docs/SEMANTICS.md").expect("it is there");
    let rows = rows(&text);
    assert!(rows.len() >= 50, "the tables of behaviour were not found");
    for row in rows {
        let proof = row.last().expect("a cell");
        assert!(quoted(proof).any(is_test_name), "{:?} has no test", row[0]);
    }
}

/// GitHub's anchor of a heading.
fn anchor(heading: &str) -> String {
    let kept = |c: &char| c.is_ascii_alphanumeric() || matches!(c, ' ' | '-' | '_');
    heading
        .chars()
        .filter(kept)
        .map(|c| if c == ' ' { '-' } else { c.to_ascii_lowercase() })
        .collect()
}

#[test]
fn links_between_documents_lead_somewhere() {
    for (path, text) in documents() {
        let directory = Path::new(&path).parent().expect("a file has a directory").to_owned();
        let targets = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        for target in targets.filter(|target| !target.contains("://")) {
            let (file, place) = target.split_once('#').unwrap_or((target, ""));
            let file = if file.is_empty() { path.clone().into() } else { directory.join(file) };
            let there = Path::new(ROOT).join(&file);
            assert!(there.exists(), "{path}: the link {target} leads nowhere");
            let has = || {
                read(&there)
                    .lines()
                    .any(|line| anchor(line.trim_start_matches(['#', ' '])) == place)
            };
            assert!(place.is_empty() || has(), "{path}: the heading of {target} is not there");
        }
    }
}

/// Compares the quoted part of a message: in the code, a message has line breaks and placeholders,
/// and that part has neither.
#[test]
fn each_message_of_the_table_of_troubles_is_in_the_code() {
    let operations = document("docs/OPERATIONS.md");
    let table = section(&operations, "Trouble");
    let code: String =
        ["src", "mount-helper"].into_iter().flat_map(sources).map(|path| read(&path)).collect();
    let lines = code.split("\\\n").map(str::trim_start);
    let code: String = lines.collect();
    let rows = rows(table);
    assert!(rows.len() >= 10, "the table of troubles was not found");
    for row in rows {
        let message = quoted(&row[0]).next().expect("a message");
        assert!(code.contains(message), "the message {message:?} is not in the code");
    }
}

/// The picture shows the median ratios of a run; the table also shows the times of this run.
#[test]
fn the_figures_are_those_of_the_picture() {
    let picture = document("benches/compare.svg");
    let of_class = |class: &str| -> Vec<&str> {
        let lines = picture.lines().filter(|line| line.contains(&format!("class=\"{class}\">")));
        lines.filter_map(|line| line.strip_suffix("</text>")?.rsplit('>').next()).collect()
    };
    let bars = of_class("end").into_iter().zip(of_class(""));
    let figures = rows(&document("docs/FIGURES.md"));
    let mut count = 0;
    for (what, ratio) in bars {
        let row = figures.iter().find(|row| row[0] == what);
        let row = row.unwrap_or_else(|| panic!("docs/FIGURES.md has no row {what:?}"));
        let here = row.last().expect("a cell");
        assert!(here.starts_with(ratio), "{what:?}: {here:?}, and {ratio:?} in the picture");
        count += 1;
    }
    assert!(count >= 20, "the bars of the picture were not found");
    let readme = document("README.md");
    let readme = rows(section(&readme, "Figures"));
    assert!(!readme.is_empty(), "the table of figures was not found");
    for row in readme {
        let same = |figure: &&Vec<String>| figure[..2] == row[..2] && figure.last() == row.last();
        assert!(
            figures.iter().find(same).is_some(),
            "README.md: {row:?} is not in docs/FIGURES.md"
        );
    }
}

#[test]
fn the_licences_and_the_version_are_there() {
    for name in ["LICENSE-MIT", "LICENSE-APACHE"] {
        assert!(Path::new(ROOT).join(name).is_file(), "Cargo.toml promises {name}");
    }
    let version = format!("\n## [{}]", env!("CARGO_PKG_VERSION"));
    assert!(
        document("CHANGELOG.md").contains(&version),
        "CHANGELOG.md has nothing about {version:?}"
    );
}
