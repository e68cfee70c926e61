//! The kinds of memory of a pool, for people and for programs: the lines of the attribute as a
//! table and as JSON. Pure.

use hugetlb2fs::targets::VALUES;
use serde_json::{Map, Value, json};

/// The first columns: the two words before the values, and the first value.
const FIRST: [&str; 3] = ["node", "kind", "initiators"];

/// The lines, each as names and values.
pub struct Table(Vec<Vec<(String, String)>>);

impl Table {
    /// Parses the value of the attribute. A word that is no value is left out.
    pub fn parse(text: &str) -> Self {
        let row = |line: &str| {
            let mut words = line.split(' ');
            let places = FIRST[..2].iter().zip(words.by_ref().take(2));
            let mut row: Vec<(String, String)> =
                places.map(|(name, word)| ((*name).to_owned(), word.to_owned())).collect();
            let values = words.filter_map(|word| word.split_once('='));
            row.extend(values.map(|(name, value)| (name.to_owned(), value.to_owned())));
            row
        };
        Self(text.lines().map(row).collect())
    }

    /// A heading and the lines, in columns as wide as they need to be. A value that a line does not
    /// have is `-`. A column without a value is left out.
    pub fn to_text(&self) -> String {
        let columns = self.columns();
        let cell = |row: &[(String, String)], column: &str| {
            let value = row.iter().find(|(name, _)| name == column);
            value.map_or_else(|| "-".to_owned(), |(_, value)| value.clone())
        };
        let heading = columns.iter().map(|column| with_unit(column)).collect();
        let rows = self.0.iter().map(|row| columns.iter().map(|name| cell(row, name)).collect());
        aligned(&std::iter::once(heading).chain(rows).collect::<Vec<_>>())
    }

    /// An object for each line. Numbers are numbers, and lists of nodes or distances are arrays.
    pub fn to_json(&self) -> Value {
        let object = |row: &Vec<(String, String)>| -> Value {
            row.iter()
                .map(|(name, value)| (name.clone(), json_of(name, value)))
                .collect::<Map<_, _>>()
                .into()
        };
        self.0.iter().map(object).collect()
    }

    /// The names that some line has a value for: those that this version knows in their order, and
    /// then those of a newer daemon.
    fn columns(&self) -> Vec<&str> {
        let given = || self.0.iter().flatten().map(|(name, _)| name.as_str());
        let known = FIRST.into_iter().chain(VALUES.iter().map(|(name, _)| *name));
        let mut columns: Vec<&str> =
            known.filter(|name| given().any(|given| given == *name)).collect();
        for name in given() {
            if !columns.contains(&name) {
                columns.push(name);
            }
        }
        columns
    }
}

fn with_unit(column: &str) -> String {
    let unit = VALUES.iter().find(|(name, _)| *name == column).map_or("", |(_, unit)| unit);
    if unit.is_empty() { column.to_owned() } else { format!("{column}[{unit}]") }
}

fn json_of(name: &str, value: &str) -> Value {
    let number =
        |word: &str| word.parse::<u64>().map_or_else(|_| json!(word), |number| json!(number));
    match name {
        "initiators" | "Distance" => {
            value.split(',').filter(|word| !word.is_empty()).map(number).collect()
        }
        _ => number(value),
    }
}

/// The rows under each other, each column to the right.
fn aligned(rows: &[Vec<String>]) -> String {
    let width = |at: usize| rows.iter().filter_map(|row| row.get(at)).map(String::len).max();
    let line = |row: &Vec<String>| {
        let cells = row.iter().enumerate();
        let cells =
            cells.map(|(at, cell)| format!("{cell:>width$}", width = width(at).unwrap_or(0)));
        cells.collect::<Vec<_>>().join("  ")
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINES: &str = "0 dram initiators=0 Capacity=535000000 ReadLatency=80 pool_bytes=4 free_bytes=2\n\
        2 memory-only initiators=0,1 Capacity=256 Distance=20,31 pool_bytes=0 free_bytes=0 Later=x\n";

    #[test]
    fn lines_are_shown_in_columns_with_units() {
        assert_eq!(
            Table::parse(LINES).to_text(),
            "\
node         kind  initiators  Capacity[B]  ReadLatency[ns]  Distance  pool_bytes  free_bytes  Later
   0         dram           0    535000000               80         -           4           2      -
   2  memory-only         0,1          256                -     20,31           0           0      x"
        );
        assert_eq!(Table::parse("").to_text(), "");
    }

    #[test]
    fn in_json_numbers_are_numbers_and_lists_are_arrays() {
        assert_eq!(
            Table::parse(LINES).to_json(),
            json!([
                {
                    "node": 0, "kind": "dram", "initiators": [0], "Capacity": 535_000_000,
                    "ReadLatency": 80, "pool_bytes": 4, "free_bytes": 2,
                },
                {
                    "node": 2, "kind": "memory-only", "initiators": [0, 1], "Capacity": 256,
                    "Distance": [20, 31], "pool_bytes": 0, "free_bytes": 0, "Later": "x",
                },
            ])
        );
    }
}
