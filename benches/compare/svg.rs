//! A picture of the ratios in plain SVG, with a bar for each row that measures ours against
//! hugetlbfs or tmpfs.
//!
//! The axis is logarithmic: the bars of "twice as fast" and "twice as slow" are equally long.

use super::Machine;
use super::sides::Kind;
use super::table::{Ratio, Row, Table, rounded};
use std::fmt::Write as _;

/// Rows whose name ends so show a part of the next row: hugetlbfs does the rest of the work later.
const PART: &str = "ready to map";

const WIDTH: f64 = 960.0;
const LABELS: f64 = 440.0;
const FIGURES: f64 = 190.0;
const LINE: f64 = 22.0;
const HEAD: f64 = 88.0;

/// Colours for a light page and for a dark one. Not every program that draws SVG knows variables.
const STYLE: &str = "
    text { font: 13px system-ui, sans-serif; fill: #1f2328 }
    .title { font-size: 17px; font-weight: 600 } .end { text-anchor: end } .middle { text-anchor: middle }
    .page { fill: #ffffff } .faint { fill: #59636e } .less { fill: #1a7f37 } .more { fill: #bc4c00 }
    line { stroke: #d1d9e0 } line.one { stroke: #1f2328 }
    @media (prefers-color-scheme: dark) {
      text { fill: #e6edf3 } .page { fill: #0d1117 } .faint { fill: #9198a1 }
      .less { fill: #3fb950 } .more { fill: #f0883e } line { stroke: #3d444d } line.one { stroke: #e6edf3 }
    }
";

/// A bar.
struct Bar<'a> {
    what: &'a str,
    /// The name of the other filesystem.
    by: &'a str,
    ratio: f64,
}

/// Returns the text of the SVG file.
pub fn picture(table: &Table, machine: &Machine) -> String {
    let bars: Vec<Bar> = table.rows.iter().filter_map(bar).collect();
    let scale = Scale::of(&bars);
    let bottom = HEAD + bars.len() as f64 * LINE;
    let mut svg = String::new();
    let _ = writeln!(
        svg,
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {}" role="img"><style>{STYLE}</style>"#,
        bottom + 16.0
    );
    let _ = writeln!(svg, r#"<rect class="page" width="100%" height="100%"/>"#);
    text(&mut svg, 16.0, 28.0, "title", "hugetlb2: time, as a multiple of the other's");
    let where_and_when = format!("{}, {}, {}", machine.hardware, machine.kernel, machine.date);
    text(&mut svg, 16.0, 48.0, "faint", &where_and_when);
    grid(&mut svg, &scale, bottom);
    for (n, bar) in bars.iter().enumerate() {
        draw(&mut svg, bar, &scale, HEAD + n as f64 * LINE);
    }
    svg + "</svg>\n"
}

/// The bar compares with hugetlbfs with pages of 1 GiB, which a user would have instead. If the row
/// has no such figure, it compares with tmpfs.
fn bar(row: &Row) -> Option<Bar<'_>> {
    let compares = row.kind == Ratio::OursToIt && !row.what.ends_with(PART);
    let by = |kind: Kind| row.figures.iter().skip(1).find(|figure| figure.name == kind.name());
    let figure = by(Kind::Gigantic).or_else(|| by(Kind::TmpfsHuge)).filter(|_| compares)?;
    Some(Bar { what: &row.what, by: &figure.name, ratio: figure.ratio })
}

/// The powers of ten around all bars, and their places in the picture.
struct Scale {
    low: f64,
    high: f64,
}

impl Scale {
    fn of(bars: &[Bar<'_>]) -> Self {
        let logarithms = || bars.iter().map(|bar| bar.ratio.log10());
        let low = logarithms().fold(-1.0, f64::min).floor();
        Self { low, high: logarithms().fold(1.0, f64::max).ceil() }
    }

    fn at(&self, ratio: f64) -> f64 {
        let whole = WIDTH - LABELS - FIGURES;
        LABELS + (ratio.log10() - self.low) / (self.high - self.low) * whole
    }
}

fn grid(svg: &mut String, scale: &Scale, bottom: f64) {
    for power in scale.low as i32..=scale.high as i32 {
        let (ratio, class) = (10f64.powi(power), if power == 0 { "one" } else { "" });
        let x = scale.at(ratio);
        let top = HEAD - 10.0;
        let _ = writeln!(
            svg,
            r#"<line class="{class}" x1="{x:.1}" x2="{x:.1}" y1="{top}" y2="{bottom}"/>"#
        );
        text(svg, x, top - 6.0, "faint middle", &ratio.to_string());
    }
}

fn draw(svg: &mut String, bar: &Bar<'_>, scale: &Scale, y: f64) {
    let (one, end) = (scale.at(1.0), scale.at(bar.ratio));
    let class = if bar.ratio > 1.0 { "more" } else { "less" };
    let (x, width) = (one.min(end), (end - one).abs().max(1.0));
    let (top, height) = (y + 3.0, LINE - 6.0);
    let _ = writeln!(
        svg,
        r#"<rect class="{class}" x="{x:.1}" y="{top}" width="{width:.1}" height="{height}" rx="2"/>"#
    );
    text(svg, LABELS - 10.0, y + 15.0, "end", bar.what);
    let figure = format!("{} of {}", rounded(bar.ratio), bar.by);
    text(svg, WIDTH - FIGURES + 12.0, y + 15.0, "", &figure);
}

fn text(svg: &mut String, x: f64, y: f64, class: &str, text: &str) {
    let text = text.replace('&', "&amp;").replace('<', "&lt;");
    let _ = writeln!(svg, r#"<text x="{x:.1}" y="{y:.1}" class="{class}">{text}</text>"#);
}
