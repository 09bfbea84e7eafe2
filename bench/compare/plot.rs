//! The picture of an outage: latency of every request and the backlog, over time. An SVG with a background of its own, so
//! that it can be read wherever it is shown.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::Path;

use crate::common::percentile;

/// One outage; times in seconds since the load began, latencies in milliseconds.
#[derive(Default)]
pub struct Timeline {
    pub title: String,
    pub length: f64,
    /// From when until when the node was away.
    pub away: (f64, f64),
    pub unhealthy: Option<f64>,
    pub in_sync: Option<f64>,
    /// When each was sent, and what it took.
    pub reads: Vec<(f64, f64)>,
    pub writes: Vec<(f64, f64)>,
    pub errors: Vec<(f64, f64)>,
    pub pending: Vec<(f64, u64)>,
}

const WIDTH: f64 = 1000.0;
const LEFT: f64 = 72.0;
const RIGHT: f64 = 928.0;
/// The legend, then for each outage its title, the plot, and the axis of time.
const LEGEND: f64 = 40.0;
const TITLE: f64 = 44.0;
const PLOT: f64 = 250.0;
const AXIS: f64 = 48.0;
/// Medians are of so many seconds.
const STEP: f64 = 0.5;

const STYLE: &str = "\
text { font: 13px system-ui, sans-serif; fill: #24292f }
.title { font-size: 15px; font-weight: 600 }
.page { fill: #ffffff } .frame { fill: none; stroke: #8c959f } .grid { stroke: #d8dee4 } .away { fill: #eaeef2 }
.mark { stroke: #57606a; stroke-dasharray: 4 3 }
.dots { stroke-width: 2.6; stroke-linecap: round; stroke-opacity: .45; fill: none }
.line { stroke-width: 2; fill: none }
.reads { stroke: #0969da } .writes { stroke: #bc4c00 } .errors { stroke: #cf222e; stroke-width: 2 }
.pending { stroke: #1a7f37; fill: #1a7f37; fill-opacity: .14; stroke-width: 1.5 } .of-pending { fill: #1a7f37 }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 }
.page { fill: #0d1117 } .frame { stroke: #6e7681 } .grid { stroke: #30363d } .away { fill: #21262d }
.mark { stroke: #8d96a0 }
.reads { stroke: #58a6ff } .writes { stroke: #f0883e } .errors { stroke: #ff7b72 }
.pending { stroke: #3fb950; fill: #3fb950 } .of-pending { fill: #3fb950 }
}
";

/// Where numbers lie: one axis of time and two of values.
struct Scale {
    top: f64,
    length: f64,
    /// Powers of ten between which all latencies are.
    decades: (i32, i32),
    most_pending: u64,
}

impl Scale {
    fn of(timeline: &Timeline, top: f64) -> Scale {
        let all = || {
            [&timeline.reads, &timeline.writes, &timeline.errors]
                .into_iter()
                .flatten()
        };
        let least = all().map(|(_, ms)| *ms).fold(1.0, f64::min).max(0.01);
        let most = all().map(|(_, ms)| *ms).fold(100.0, f64::max);
        let pending = timeline.pending.iter().map(|(_, count)| *count).max().unwrap_or(0);
        Scale {
            top,
            length: timeline.length.max(1.0),
            decades: (least.log10().floor() as i32, most.log10().ceil() as i32),
            most_pending: round_up(pending.max(10)),
        }
    }

    fn x(&self, second: f64) -> f64 {
        LEFT + (RIGHT - LEFT) * (second / self.length).clamp(0.0, 1.0)
    }

    fn y(&self, ms: f64) -> f64 {
        let (low, high) = self.decades;
        let part = (ms.log10() - f64::from(low)) / f64::from(high - low);
        self.top + PLOT * (1.0 - part.clamp(0.0, 1.0))
    }

    fn y_pending(&self, count: u64) -> f64 {
        self.top + PLOT * (1.0 - count as f64 / self.most_pending as f64)
    }
}

/// The next number that looks well at the end of an axis with four parts.
fn round_up(count: u64) -> u64 {
    let decade = 10_u64.pow(count.ilog10());
    let steps = [1, 2, 4, 6, 8, 10].map(|factor| factor * decade);
    steps.into_iter().find(|step| *step >= count).unwrap_or(10 * decade)
}

/// Seconds between two marks of the axis of time.
fn apart(length: f64) -> usize {
    [1, 2, 5, 10, 20, 60]
        .into_iter()
        .find(|step| length / *step as f64 <= 16.0)
        .unwrap_or(300)
}

fn text(svg: &mut String, (x, y): (f64, f64), anchor: &str, more: &str, words: &str) {
    let _ = writeln!(
        svg,
        "<text x=\"{x:.0}\" y=\"{y:.0}\" text-anchor=\"{anchor}\"{more}>{words}</text>"
    );
}

fn line(svg: &mut String, class: &str, from: (f64, f64), to: (f64, f64)) {
    let ((x1, y1), (x2, y2)) = (from, to);
    let _ = writeln!(
        svg,
        "<line class=\"{class}\" x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\"/>"
    );
}

/// A dot for each request; where several would cover each other, one.
fn dots(svg: &mut String, class: &str, points: &[(f64, f64)], scale: &Scale) {
    let places: BTreeSet<(i64, i64)> = points
        .iter()
        .map(|(at, ms)| (scale.x(*at).round() as i64, scale.y(*ms).round() as i64))
        .collect();
    let _ = write!(svg, "<path class=\"dots {class}\" d=\"");
    for (x, y) in places {
        let _ = write!(svg, "M{x} {y}h0");
    }
    svg.push_str("\"/>\n");
}

/// The median of each half second; where nothing was sent the line ends, and begins anew.
fn medians(svg: &mut String, class: &str, points: &[(f64, f64)], scale: &Scale) {
    let _ = write!(svg, "<path class=\"line {class}\" d=\"");
    let mut command = 'M';
    for step in 0..(scale.length / STEP).ceil() as usize {
        let from = step as f64 * STEP;
        let within = |point: &&(f64, f64)| point.0 >= from && point.0 < from + STEP;
        let times: Vec<f64> = points.iter().filter(within).map(|(_, ms)| *ms).collect();
        if times.is_empty() {
            command = 'M';
            continue;
        }
        let (x, y) = (scale.x(from + STEP / 2.0), scale.y(percentile(&times, 50.0)));
        let _ = write!(svg, "{command}{x:.1} {y:.1}");
        command = 'L';
    }
    svg.push_str("\"/>\n");
}

/// What was pending, as an area: it stays as it is from one look to the next.
fn pending(svg: &mut String, timeline: &Timeline, scale: &Scale) {
    let ground = scale.top + PLOT;
    let _ = write!(svg, "<path class=\"pending\" d=\"M{:.1} {ground:.1}", scale.x(0.0));
    let mut last = None;
    for (at, count) in timeline.pending.iter().filter(|(at, _)| *at <= timeline.length) {
        if last != Some(count) {
            let _ = write!(svg, "H{:.1}V{:.1}", scale.x(*at), scale.y_pending(*count));
        }
        last = Some(count);
    }
    let _ = writeln!(svg, "H{:.1}V{ground:.1}Z\"/>", scale.x(timeline.length));
}

/// The axes, what they measure, and the lines across the plot.
fn axes(svg: &mut String, scale: &Scale) {
    let ground = scale.top + PLOT;
    for decade in scale.decades.0..=scale.decades.1 {
        let y = scale.y(10_f64.powi(decade));
        line(svg, "grid", (LEFT, y), (RIGHT, y));
        let value = 10_f64.powi(decade);
        text(svg, (LEFT - 8.0, y + 4.0), "end", "", &value.to_string());
    }
    for part in 0..=4 {
        let count = scale.most_pending * part / 4;
        let y = scale.y_pending(count) + 4.0;
        text(
            svg,
            (RIGHT + 8.0, y),
            "start",
            " class=\"of-pending\"",
            &count.to_string(),
        );
    }
    for second in (0..=scale.length as usize).step_by(apart(scale.length)) {
        let x = scale.x(second as f64);
        line(svg, "frame", (x, ground), (x, ground + 5.0));
        text(svg, (x, ground + 19.0), "middle", "", &second.to_string());
    }
    let middle = scale.top + PLOT / 2.0;
    text(
        svg,
        ((LEFT + RIGHT) / 2.0, ground + 37.0),
        "middle",
        "",
        "seconds since the load began",
    );
    for (x, class, words) in [
        (18.0, "", "latency, ms"),
        (WIDTH - 10.0, " class=\"of-pending\"", "pending writes"),
    ] {
        let more = format!("{class} transform=\"rotate(-90 {x:.0} {middle:.0})\"");
        text(svg, (x, middle), "middle", &more, words);
    }
    let (width, left, top) = (RIGHT - LEFT, LEFT, scale.top);
    let _ = writeln!(
        svg,
        "<rect class=\"frame\" x=\"{left}\" y=\"{top}\" width=\"{width}\" height=\"{PLOT}\"/>"
    );
}

/// What happened when: names above the plot, those that would collide one line higher.
fn marks(svg: &mut String, timeline: &Timeline, scale: &Scale) {
    let moments = [
        (Some(timeline.away.0), "away"),
        (timeline.unhealthy, "noticed"),
        (Some(timeline.away.1), "back"),
        (timeline.in_sync, "in sync"),
    ];
    let mut free = 0.0;
    for (at, words) in moments {
        let Some(at) = at else { continue };
        let x = scale.x(at);
        line(svg, "mark", (x, scale.top), (x, scale.top + PLOT));
        let place = x.max(free);
        text(svg, (place, scale.top - 6.0), "start", "", words);
        free = place + 8.0 * words.len() as f64 + 6.0;
    }
}

fn legend(svg: &mut String) {
    let y = 24.0;
    let mut x = LEFT;
    for (class, words) in [("reads", "read"), ("writes", "write")] {
        let _ = writeln!(
            svg,
            "<path class=\"dots {class}\" d=\"M{x} {y}h0m5 -3h0m4 5h0m5 -4h0\"/>"
        );
        text(svg, (x + 22.0, y + 4.0), "start", "", words);
        line(svg, &format!("line {class}"), (x + 72.0, y), (x + 94.0, y));
        text(
            svg,
            (x + 100.0, y + 4.0),
            "start",
            "",
            &format!("{words}s, p50 of {STEP} s"),
        );
        x += 246.0;
    }
    let _ = writeln!(svg, "<path class=\"errors\" d=\"M{x} {}l8 8m0 -8l-8 8\"/>", y - 4.0);
    text(svg, (x + 16.0, y + 4.0), "start", "", "error");
    let box_ = |svg: &mut String, x: f64, class: &str, words: &str| {
        let top = y - 7.0;
        let _ = writeln!(
            svg,
            "<rect class=\"{class}\" x=\"{x}\" y=\"{top}\" width=\"22\" height=\"14\"/>"
        );
        text(svg, (x + 28.0, y + 4.0), "start", "", words);
    };
    box_(svg, x + 70.0, "pending", "pending writes");
    box_(svg, x + 206.0, "away", "node away");
}

fn panel(svg: &mut String, timeline: &Timeline, top: f64) {
    let scale = Scale::of(timeline, top + TITLE);
    text(svg, (LEFT, top + 16.0), "start", " class=\"title\"", &timeline.title);
    let (from, to) = (scale.x(timeline.away.0), scale.x(timeline.away.1));
    let _ = writeln!(
        svg,
        "<rect class=\"away\" x=\"{from:.1}\" y=\"{}\" width=\"{:.1}\" height=\"{PLOT}\"/>",
        scale.top,
        to - from
    );
    axes(svg, &scale);
    pending(svg, timeline, &scale);
    marks(svg, timeline, &scale);
    dots(svg, "reads", &timeline.reads, &scale);
    dots(svg, "writes", &timeline.writes, &scale);
    medians(svg, "reads", &timeline.reads, &scale);
    medians(svg, "writes", &timeline.writes, &scale);
    for (at, ms) in &timeline.errors {
        let (x, y) = (scale.x(*at) - 4.0, scale.y(*ms) - 4.0);
        let _ = writeln!(svg, "<path class=\"errors\" d=\"M{x:.1} {y:.1}l8 8m0 -8l-8 8\"/>");
    }
}

/// One outage below the other.
fn draw(timelines: &[Timeline]) -> String {
    let each = TITLE + PLOT + AXIS;
    let height = LEGEND + each * timelines.len() as f64 + 8.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" role=\"img\">\n\
         <title>Latency and backlog through an outage</title>\n<style>\n{STYLE}</style>\n\
         <rect class=\"page\" width=\"{WIDTH}\" height=\"{height}\"/>\n"
    );
    legend(&mut svg);
    for (n, timeline) in timelines.iter().enumerate() {
        panel(&mut svg, timeline, LEGEND + each * n as f64);
    }
    svg + "</svg>\n"
}

pub fn write(file: &Path, timelines: &[Timeline]) {
    std::fs::write(file, draw(timelines)).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
}
