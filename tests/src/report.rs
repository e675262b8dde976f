//! The demo's report: one HTML file with nothing from elsewhere.

use crate::bench::measure::{as_f64, ms};
use crate::bench::{Comparison, Measured};
use std::fmt::Write as _;
use std::time::Duration;

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 240.0;
const LEFT: f64 = 64.0;
const BOTTOM: f64 = 34.0;
const TOP: f64 = 12.0;
/// Pages are counted in 4 KiB.
const PAGE_MB: f64 = 4096.0 / 1e6;

/// Kinds of pages in a snapshot of Transhume's, by what is drawn first, with colour and name.
const KINDS: [(&str, &str, &str); 7] = [
    ("data-pages", "#c2571a", "data"),
    ("resent-pages", "#e0a030", "sent again"),
    ("mismatched-pages", "#a02050", "digest mismatch"),
    ("late-pages", "#d08fa8", "disk was late"),
    ("disk-pages", "#2a7f62", "from disk"),
    ("zero-pages", "#9aa5b1", "zero"),
    ("unchanged-pages", "#c9b8e0", "unchanged"),
];
const LINK: &str = "#3061a8";

const STYLE: &str = "
:root{color-scheme:light dark;--ink:#1d2530;--dim:#5d6875;--line:#d5dae0;--paper:#fff}
@media(prefers-color-scheme:dark){:root{--ink:#e4e8ec;--dim:#9aa5b1;--line:#3a434d;--paper:#14181d}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:900px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}p,figcaption{color:var(--dim)}
table{border-collapse:collapse;width:100%}th,td{text-align:right;padding:.35rem .6rem;border-bottom:1px solid var(--line);font-variant-numeric:tabular-nums}
th:first-child,td:first-child{text-align:left}figure{margin:0}svg{width:100%;height:auto}
svg text{fill:var(--dim);font-size:12px}svg .axis{stroke:var(--line)}.key span{display:inline-block;margin-right:1.2rem}
.key i{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin-right:.4em}";

/// Writes the report of a comparison.
pub fn html(title: &str, about: &str, comparison: &Comparison) -> String {
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{0}</title>\
         <meta name=\"viewport\" content=\"width=device-width\"><style>{STYLE}</style></head><body>\
         <h1>{0}</h1><p>{1}</p>",
        escape(title),
        escape(about)
    );
    table(&mut page, comparison);
    let shown: Vec<&Measured> = comparison
        .sides()
        .into_iter()
        .filter_map(|side| comparison.runs.iter().rfind(|run| run.side == side))
        .collect();
    let seconds = shown.iter().map(|run| run.total_ms()).fold(1.0, f64::max) / 1000.0 * 1.05;
    for run in shown {
        chart(&mut page, run, seconds);
    }
    page.push_str("</body></html>\n");
    page
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

fn table(page: &mut String, comparison: &Comparison) {
    let span = comparison.span();
    let _ = write!(
        page,
        "<h2>Side by side</h2><table><tr><th>median of runs<th>total<th>downtime<th>silence of the guest<th>on the wire\
         <th>requests served in {:.1} s<th>its own check</tr>",
        span.as_secs_f64()
    );
    for side in comparison.sides() {
        let right = comparison
            .runs
            .iter()
            .filter(|run| run.side == side)
            .all(|run| run.check.starts_with("check ok"));
        let _ = write!(
            page,
            "<tr><td>{side}<td>{:.2} s<td>{:.0} ms<td>{:.0} ms<td>{:.0} MB<td>{:.0}<td>{}</tr>",
            comparison.median_of(side, Measured::total_ms) / 1000.0,
            comparison.median_of(side, Measured::downtime_ms),
            comparison.median_of(side, Measured::gap_ms),
            comparison.median_of(side, |run| as_f64(run.wire_bytes)) / 1e6,
            comparison.median_of(side, |run| run.work_in(span)),
            if right { "all right" } else { "failed" },
        );
    }
    page.push_str("</table>");
    if let Some(ratios) = comparison.ratios() {
        let _ = write!(
            page,
            "<p>Transhume against the better stock side: total time {:.2}, bytes on the wire {:.2}, downtime {:.2}, \
             requests served {:.2}. Its daemons took at most {:.0} MiB.</p>",
            ratios.total,
            ratios.wire_bytes,
            ratios.downtime,
            ratios.work,
            comparison.peak_rss_mib()
        );
    }
}

/// A stacked layer or a line: points of (seconds, MB).
type Points = Vec<(f64, f64)>;

/// What a side carried by kind, over time: each layer's upper edge.
fn layers(run: &Measured) -> Vec<(&'static str, &'static str, Points)> {
    let mut layers: Vec<_> = KINDS
        .iter()
        .map(|(_, colour, name)| (*colour, *name, Points::new()))
        .collect();
    for message in &run.messages {
        let traffic = &message.value["progress"]["traffic"];
        if traffic.is_null() {
            continue;
        }
        let second = ms(run.begun, message.at) / 1000.0;
        let mut height = 0.0;
        for (layer, (field, ..)) in layers.iter_mut().zip(KINDS) {
            height += traffic[field].as_u64().map_or(0.0, as_f64) * PAGE_MB;
            layer.2.push((second, height));
        }
    }
    layers.retain(|(_, _, points)| !points.is_empty());
    layers
}

fn link(run: &Measured) -> Points {
    let end = run.moments.resumed + Duration::from_millis(100);
    let inside = || {
        run.samples
            .iter()
            .filter(|sample| sample.at >= run.begun && sample.at <= end)
    };
    let first = inside().next().map_or(0, |sample| sample.bytes);
    inside()
        .map(|sample| {
            (
                ms(run.begun, sample.at) / 1000.0,
                as_f64(sample.bytes - first) / 1e6,
            )
        })
        .collect()
}

fn chart(page: &mut String, run: &Measured, seconds: f64) {
    let layers = layers(run);
    let link = link(run);
    let tops = layers.iter().map(|layer| &layer.2).chain([&link]);
    let highest = tops.flatten().map(|point| point.1).fold(1.0, f64::max) * 1.05;
    let x = |second: f64| LEFT + second / seconds * (WIDTH - LEFT - 8.0);
    let y = |height: f64| HEIGHT - BOTTOM - height / highest * (HEIGHT - BOTTOM - TOP);
    let _ = write!(
        page,
        "<h2>{}: {:.2} s, {:.0} MB on the wire</h2><figure><svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" \
         aria-label=\"bytes by kind over time\">",
        run.side,
        run.total_ms() / 1000.0,
        as_f64(run.wire_bytes) / 1e6
    );
    axes(page, seconds, highest, x, y);
    let mut below: Points = Vec::new();
    for (colour, name, points) in &layers {
        let mut path = String::new();
        for (index, (second, height)) in points.iter().enumerate() {
            let _ = write!(
                path,
                "{}{:.1},{:.1}",
                if index == 0 { "M" } else { "L" },
                x(*second),
                y(*height)
            );
        }
        if below.is_empty() {
            below = points.iter().map(|(second, _)| (*second, 0.0)).collect();
        }
        for (second, height) in below.iter().rev() {
            let _ = write!(path, "L{:.1},{:.1}", x(*second), y(*height));
        }
        let _ = write!(
            page,
            "<path d=\"{path}Z\" fill=\"{colour}\"><title>{name}</title></path>"
        );
        below.clone_from(points);
    }
    let drawn: Vec<String> = link
        .iter()
        .map(|(second, height)| format!("{:.1},{:.1}", x(*second), y(*height)))
        .collect();
    let _ = write!(
        page,
        "<polyline points=\"{}\" fill=\"none\" stroke=\"{LINK}\" stroke-width=\"2.5\"><title>on the wire</title></polyline>",
        drawn.join(" ")
    );
    let pause = ms(run.begun, run.moments.stopped) / 1000.0;
    let end = run.total_ms() / 1000.0;
    let _ = write!(
        page,
        "<rect x=\"{:.1}\" y=\"{TOP}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"#d03030\" opacity=\".35\"><title>downtime {:.0} ms</title></rect></svg>\
         <figcaption class=\"key\"><span><i style=\"background:{LINK}\"></i>carried by the link</span>",
        x(pause),
        (x(end) - x(pause)).max(1.0),
        HEIGHT - BOTTOM - TOP,
        run.downtime_ms()
    );
    for (colour, name, _) in &layers {
        let _ = write!(
            page,
            "<span><i style=\"background:{colour}\"></i>{name}</span>"
        );
    }
    page.push_str("<span><i style=\"background:#d03030;opacity:.5\"></i>downtime</span></figcaption></figure>");
}

fn axes(
    page: &mut String,
    seconds: f64,
    highest: f64,
    x: impl Fn(f64) -> f64,
    y: impl Fn(f64) -> f64,
) {
    let (across, up) = (tick(seconds), tick(highest));
    let ticks = |step: f64, end: f64| {
        (0..)
            .map(move |index| f64::from(index) * step)
            .take_while(move |at| *at <= end)
    };
    for second in ticks(across, seconds) {
        let _ = write!(
            page,
            "<line class=\"axis\" x1=\"{0:.1}\" x2=\"{0:.1}\" y1=\"{TOP}\" y2=\"{1:.1}\"/><text x=\"{0:.1}\" y=\"{2:.1}\" text-anchor=\"middle\">{second} s</text>",
            x(second),
            y(0.0),
            y(0.0) + 18.0
        );
    }
    for height in ticks(up, highest) {
        let _ = write!(
            page,
            "<line class=\"axis\" x1=\"{LEFT}\" x2=\"{0:.1}\" y1=\"{1:.1}\" y2=\"{1:.1}\"/><text x=\"{2:.1}\" y=\"{3:.1}\" text-anchor=\"end\">{height} MB</text>",
            x(seconds),
            y(height),
            LEFT - 6.0,
            y(height) + 4.0
        );
    }
}

/// A round step that divides an axis into four to ten parts.
fn tick(end: f64) -> f64 {
    let mut step = 10_f64.powf(end.max(1e-3).log10().floor());
    if end / step < 2.0 {
        step /= 5.0;
    } else if end / step < 5.0 {
        step /= 2.0;
    }
    step
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_few() {
        for end in [0.7, 1.0, 3.3, 19.0, 230.0, 2265.0, 99_999.0] {
            let parts = end / tick(end);
            assert!((4.0..=10.1).contains(&parts), "{end}: {parts}");
        }
    }

    #[test]
    fn text_is_escaped() {
        assert_eq!(escape("<a & \"b\">"), "&lt;a &amp; &quot;b&quot;&gt;");
    }
}
