//! The project's documents, as tests read them.

use std::fs;
use std::path::Path;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// The documents: their paths below the root, and their texts.
pub fn documents() -> Vec<(String, String)> {
    let below_docs = fs::read_dir(Path::new(ROOT).join("docs")).expect("a directory");
    let names =
        below_docs.map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8"));
    let paths = names
        .map(|name| format!("docs/{name}"))
        .chain(["README.md", "CHANGELOG.md"].map(Into::into));
    paths.map(|path| (path.clone(), document(&path))).collect()
}

pub fn document(path: &str) -> String {
    fs::read_to_string(Path::new(ROOT).join(path)).expect("readable text")
}

/// The cells of each row of the tables in `text`, without headings. A cell has `\|` for a bar.
pub fn rows(text: &str) -> Vec<Vec<String>> {
    let mut tables: Vec<Vec<Vec<String>>> = Vec::new();
    let mut inside = false;
    for line in text.lines() {
        if line.starts_with('|') && !inside {
            tables.push(Vec::new());
        }
        inside = line.starts_with('|');
        if inside {
            let line = line.trim_matches('|').replace("\\|", "\0");
            let cells = line.split('|').map(|cell| cell.trim().replace('\0', "|"));
            tables.last_mut().expect("a table has begun").push(cells.collect());
        }
    }
    tables.into_iter().flat_map(|table| table.into_iter().skip(2)).collect()
}

/// The part of `text` under a heading, up to the next one of its kind.
pub fn section<'a>(text: &'a str, heading: &str) -> &'a str {
    let (_, section) = text.split_once(&format!("\n## {heading}\n")).expect("the heading is there");
    section.split("\n## ").next().expect("there is a first part")
}

/// The part of `text` under a heading of the third level, up to the next one or to the section's
/// end.
pub fn subsection<'a>(text: &'a str, heading: &str) -> &'a str {
    let (_, rest) = text.split_once(&format!("\n### {heading}\n")).expect("the heading is there");
    let end = ["\n### ", "\n## "].iter().filter_map(|next| rest.find(next)).min();
    &rest[..end.unwrap_or(rest.len())]
}

/// The blocks of code in this language.
pub fn blocks<'a>(text: &'a str, language: &str) -> Vec<&'a str> {
    let fence = format!("\n```{language}\n");
    text.split(fence.as_str())
        .skip(1)
        .map(|rest| rest.split("```").next().expect("its end"))
        .collect()
}

/// The parts of `text` in backquotes.
pub fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// True for a word with four underscores or more: no other name in the documents has so many.
pub fn is_test_name(word: &str) -> bool {
    word.matches('_').count() >= 4
        && word.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
}

/// `text` without blocks of code and parts in backquotes.
pub fn prose(text: &str) -> String {
    let blocks = text.split("\n```").step_by(2);
    blocks.flat_map(|block| block.split('`').step_by(2)).collect()
}
