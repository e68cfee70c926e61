//! The results: rows of medians with their spread, and the ratios between them.

use super::Machine;
use serde_json::{Map, Value, json};

/// A side and its samples.
pub type Samples = (String, Vec<f64>);

/// The meaning of the ratios in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ratio {
    /// The median of the first side, which is ours, divided by the median of this side. More than
    /// 1 means that ours has more.
    OursToIt,
    /// The median of this side divided by the median of the first, which is the smallest of its
    /// kind. The ratio shows the growth of a cost.
    ItToFirst,
}

/// One side in a row.
pub struct Figure {
    /// The name of the side.
    pub name: String,
    /// Median, least and most.
    pub spread: (f64, f64, f64),
    /// See [`Ratio`].
    pub ratio: f64,
}

/// A row.
pub struct Row {
    /// The operation.
    pub what: String,
    /// The unit of the samples.
    unit: &'static str,
    /// The meaning of its ratios.
    pub kind: Ratio,
    /// A figure for each side.
    pub figures: Vec<Figure>,
}

/// All rows of a run.
pub struct Table {
    json: bool,
    /// The rows up to now.
    pub rows: Vec<Row>,
    notes: Vec<String>,
    skipped: Vec<String>,
}

impl Table {
    /// Makes an empty table. Without `json`, it prints each row at once.
    pub fn new(json: bool) -> Self {
        Self { json, rows: Vec::new(), notes: Vec::new(), skipped: Vec::new() }
    }

    /// Adds a line of text.
    pub fn note(&mut self, text: &str) {
        self.print(text);
        self.notes.push(text.to_owned());
    }

    /// Notes that `what` could not be measured, and why.
    pub fn skip(&mut self, what: &str, why: &str) {
        self.print(&format!("skipped: {what}: {why}"));
        self.skipped.push(format!("{what}: {why}"));
    }

    fn print(&self, text: &str) {
        if !self.json {
            println!("{text}");
        }
    }

    /// Adds a row that compares ours, which comes first, with others.
    pub fn compare(&mut self, what: &str, unit: &'static str, samples: Vec<Samples>) {
        self.row(what, unit, Ratio::OursToIt, samples);
    }

    /// Adds a row that compares the smallest, which comes first, with larger ones.
    pub fn growth(&mut self, what: &str, unit: &'static str, samples: Vec<Samples>) {
        self.row(what, unit, Ratio::ItToFirst, samples);
    }

    fn row(&mut self, what: &str, unit: &'static str, kind: Ratio, samples: Vec<Samples>) {
        let samples: Vec<_> =
            samples.into_iter().filter(|(_, samples)| !samples.is_empty()).collect();
        let Some((_, first)) = samples.first() else { return };
        let first = spread(first).0;
        let figures = samples.iter().map(|(name, samples)| {
            let spread = spread(samples);
            let ratio = if kind == Ratio::OursToIt { first / spread.0 } else { spread.0 / first };
            Figure { name: name.clone(), spread, ratio }
        });
        let row = Row { what: what.to_owned(), unit, kind, figures: figures.collect() };
        self.print(&row.text());
        self.rows.push(row);
    }

    /// Prints the JSON object, if JSON was asked for.
    pub fn finish(&self, machine: &Machine) {
        if self.json {
            let rows: Map<String, Value> =
                self.rows.iter().map(|row| (row.what.clone(), row.json())).collect();
            let machine =
                json!({ "is": machine.hardware, "kernel": machine.kernel, "date": machine.date });
            let all = json!({ "machine": machine, "rows": rows, "notes": self.notes, "skipped": self.skipped });
            println!("{all:#}");
        }
    }
}

impl Row {
    /// Prints ratios first: the times are valid for this machine only.
    fn text(&self) -> String {
        let mut text = format!("{} ({})", self.what, self.unit);
        for (n, figure) in self.figures.iter().enumerate() {
            let ratio = match (n, self.kind) {
                (0, _) => String::new(),
                (_, Ratio::OursToIt) => format!("{} of", rounded(figure.ratio)),
                (_, Ratio::ItToFirst) => format!("x {}", rounded(figure.ratio)),
            };
            let (median, low, high) = figure.spread;
            text += &format!(
                "\n  {ratio:>10} {:<30}{median:>12.3}  ({low:.3} .. {high:.3})",
                figure.name
            );
        }
        text
    }

    fn json(&self) -> Value {
        let ratio = if self.kind == Ratio::OursToIt { "ours to it" } else { "it to the first" };
        let figure = |figure: &Figure| {
            let (median, min, max) = figure.spread;
            let value = json!({ "median": median, "min": min, "max": max, "ratio": figure.ratio });
            (figure.name.clone(), value)
        };
        let sides: Map<String, Value> = self.figures.iter().map(figure).collect();
        json!({ "unit": self.unit, "ratio": ratio, "sides": sides })
    }
}

/// Formats a ratio with its significant digits.
pub fn rounded(ratio: f64) -> String {
    match ratio {
        ratio if ratio >= 100.0 => format!("{ratio:.0}"),
        ratio if ratio >= 10.0 => format!("{ratio:.1}"),
        ratio if ratio >= 0.1 => format!("{ratio:.2}"),
        ratio => format!("{ratio:.5}"),
    }
}

fn spread(samples: &[f64]) -> (f64, f64, f64) {
    let mut samples = samples.to_vec();
    samples.sort_by(f64::total_cmp);
    (samples[samples.len() / 2], samples[0], samples[samples.len() - 1])
}
