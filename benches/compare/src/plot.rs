//! The pictures: bars of the servers side by side, and curves of what grows. They are read on white and on dark.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use crate::Result;
use crate::goals::{self, Panel, Picture};
use crate::report::{Raw, with_unit};

/// A panel's place, and where its bars begin and end in it.
const WIDTH: f64 = 430.0;
const LEFT: f64 = 118.0;
const RIGHT: f64 = WIDTH - 90.0;
const BAR: f64 = 22.0;
const HEAD: f64 = 46.0;
/// A curve's panel, and its frame.
const CURVE_HEIGHT: f64 = 230.0;
const CURVE: [f64; 4] = [64.0, 44.0, WIDTH - 66.0, CURVE_HEIGHT - 46.0];

const STYLE: &str = "<style>
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.title { font-weight: 600 } .note { font-size: 11px; fill: #656d76 }
.ours { fill: #d9480f } .theirs { fill: #8c959f } .axis { stroke: #8c959f; stroke-width: 1 }
.first { stroke: #d9480f; fill: #d9480f } .second { stroke: #1c7ed6; fill: #1c7ed6 }
polyline { stroke-width: 2; fill: none !important }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .note { fill: #9198a1 } }
</style>\n";

/// Draws what there are figures for, each into a file of the directory; a table goes into its `performance.md`.
pub(crate) fn draw(raw: &Raw, dir: &Path) -> Result<()> {
    let bars: Vec<_> = goals::pictures().iter().filter_map(|picture| bars(raw, picture)).collect();
    let curves: Vec<_> = goals::panels().iter().filter_map(|panel| curves(raw, panel)).collect();
    if bars.is_empty() && curves.is_empty() {
        return Err("there are no figures to draw".into());
    }
    for (file, drawn) in [("performance.svg", &bars), ("performance-growth.svg", &curves)] {
        if !drawn.is_empty() {
            let path = dir.join(file);
            fs::write(&path, in_columns(drawn))?;
            println!("{}", path.display());
        }
    }
    let document = dir.join("performance.md");
    if bars.is_empty() || !document.exists() { Ok(()) } else { raw.publish(&goals::lines(), &document) }
}

/// A drawing, and its height.
type Drawn = (String, f64);

fn in_columns(panels: &[Drawn]) -> String {
    let mut body = String::new();
    let mut y = 0.0;
    for row in panels.chunks(2) {
        for (n, (panel, _)) in row.iter().enumerate() {
            let _ = writeln!(body, "<g transform=\"translate({}, {y})\">\n{panel}</g>", n as f64 * WIDTH);
        }
        y += row.iter().fold(0.0, |highest: f64, (_, height)| highest.max(*height));
    }
    let size = format!("width=\"{0}\" height=\"{y}\" viewBox=\"0 0 {0} {y}\"", 2.0 * WIDTH);
    format!("<svg xmlns=\"http://www.w3.org/2000/svg\" {size}>\n{STYLE}{body}</svg>\n")
}

/// The servers at one work, a bar each; none if nkv or everybody else is missing.
fn bars(raw: &Raw, picture: &Picture) -> Option<Drawn> {
    let median = |cell| Some((cell, raw.spread(picture.goal, cell, picture.figure)?.median));
    let medians: Vec<_> = picture.cells.iter().copied().filter_map(median).collect();
    if medians.len() < 2 || !medians[0].0.peer.is_nkv() {
        return None;
    }
    let longest = medians.iter().fold(0.0, |longest: f64, (_, median)| longest.max(*median));
    let better = if picture.figure.ends_with("per_s") { "longer is better" } else { "shorter is better" };
    let mut out = heading(picture.title, better);
    for (n, (cell, median)) in medians.iter().enumerate() {
        let y = HEAD + n as f64 * BAR;
        let class = if cell.peer.is_nkv() { "ours" } else { "theirs" };
        let len = (RIGHT - LEFT) * median / longest;
        text(&mut out, [LEFT - 8.0, y + 13.0], "text-anchor=\"end\"", cell.peer.name());
        let _ = writeln!(
            out,
            "<rect class=\"{class}\" x=\"{LEFT}\" y=\"{y}\" width=\"{len:.1}\" height=\"{}\" rx=\"2\"/>",
            BAR - 5.0
        );
        text(&mut out, [LEFT + len + 6.0, y + 13.0], "", &with_unit(*median, picture.figure));
    }
    Some((out, HEAD + medians.len() as f64 * BAR + 16.0))
}

/// How a figure changes with another; none if nothing was measured.
fn curves(raw: &Raw, panel: &Panel) -> Option<Drawn> {
    let series = panel.series.iter().map(|series| {
        let point = |(x, cell): &(usize, _)| Some((*x as f64, raw.spread(0, *cell, series.figure)?.median));
        (series, series.points.iter().filter_map(point).collect::<Vec<_>>())
    });
    let series: Vec<_> = series.filter(|(_, points)| points.len() > 1).collect();
    let all = || series.iter().flat_map(|(_, points)| points.iter().copied());
    let highest = all().map(|(_, y)| y).reduce(f64::max)?;
    let (first, last) = (all().map(|(x, _)| x).reduce(f64::min)?, all().map(|(x, _)| x).reduce(f64::max)?);
    let [left, top, right, bottom] = CURVE;
    let place_x = |x: f64| left + (right - left) * (x / first).ln() / (last / first).ln();
    let place_y = |y: f64| bottom - (bottom - top) * y / highest;
    let mut out = heading(panel.title, "");
    let _ = writeln!(out, "<path class=\"axis\" fill=\"none\" d=\"M{left} {top}V{bottom}H{right}\"/>");
    for share in [0.0, 0.5, 1.0] {
        let y = highest * share;
        let label = if share == 0.0 { "0".to_owned() } else { with_unit(y, series[0].0.figure) };
        text(&mut out, [left - 6.0, place_y(y) + 4.0], "class=\"note\" text-anchor=\"end\"", &label);
    }
    for (x, _) in &series[0].1 {
        let at = [place_x(*x), bottom + 16.0];
        text(&mut out, at, "class=\"note\" text-anchor=\"middle\"", &thousands(*x as usize));
    }
    text(&mut out, [(left + right) / 2.0, bottom + 32.0], "class=\"note\" text-anchor=\"middle\"", panel.x);
    let mut label_y = f64::NEG_INFINITY;
    for ((series, points), class) in series.iter().zip(["first", "second"]) {
        let places: Vec<_> = points.iter().map(|(x, y)| (place_x(*x), place_y(*y))).collect();
        let line = places.iter().map(|(x, y)| format!("{x:.1},{y:.1} ")).collect::<String>();
        let _ = writeln!(out, "<polyline class=\"{class}\" points=\"{}\"/>", line.trim_end());
        for (x, y) in &places {
            let _ = writeln!(out, "<circle class=\"{class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\"/>");
        }
        if let Some((x, y)) = places.last() {
            // Below the one before, where they would meet: the first series is the higher one.
            label_y = (y + 4.0).max(label_y + 14.0);
            text(&mut out, [x + 8.0, label_y], "", series.name);
        }
    }
    Some((out, CURVE_HEIGHT))
}

fn heading(title: &str, note: &str) -> String {
    let mut out = String::new();
    text(&mut out, [12.0, 20.0], "class=\"title\"", title);
    text(&mut out, [12.0, 36.0], "class=\"note\"", note);
    out
}

fn text(out: &mut String, [x, y]: [f64; 2], attributes: &str, text: &str) {
    let text = text.replace('&', "&amp;").replace('<', "&lt;");
    let _ = writeln!(out, "<text x=\"{x:.1}\" y=\"{y:.1}\" {attributes}>{text}</text>");
}

fn thousands(number: usize) -> String {
    match number {
        1_000_000.. => format!("{} M", number / 1_000_000),
        1_000.. => format!("{} k", number / 1_000),
        _ => number.to_string(),
    }
}
