//! Several runs of several sides, in turn, and what they say of each other.

use super::measure::{Measured, Side, as_f64, run};
use super::setup::Setup;
use crate::Result;
use crate::hosts::Hosts;
use crate::progress::say;
use serde_json::{Value, json};
use std::time::Duration;

/// All runs of all sides.
#[derive(Debug, Clone)]
pub struct Comparison {
    /// In the order in which they ran.
    pub runs: Vec<Measured>,
}

/// Transhume against the better of the stock sides, each number by itself; medians.
#[derive(Debug, Clone, Copy)]
pub struct Ratios {
    /// Total time.
    pub total: f64,
    /// Bytes on the wire.
    pub wire_bytes: f64,
    /// Downtime.
    pub downtime: f64,
    /// Requests served in the best stock side's total time.
    pub work: f64,
}

/// Runs every side so many times, in turn, so that what else this machine does hits all of them.
pub fn compare(setup: &Setup, sides: &[Side], rounds: usize) -> Result<Comparison> {
    let hosts = Hosts::new(Some(setup.rate))?;
    let mut runs: Vec<Measured> = Vec::new();
    for round in 1..=rounds {
        for side in sides {
            say(format!("run {round} of {rounds}: {side}"));
            // Watched as long as the slowest so far, so that work can be compared over one span.
            let longest = runs.iter().map(Measured::total_ms).fold(0.0, f64::max);
            let measured = run(
                setup,
                &hosts,
                *side,
                Duration::from_secs_f64(longest / 1000.0),
            )?;
            say(format!("  {}", line(&measured)));
            runs.push(measured);
        }
    }
    Ok(Comparison { runs })
}

/// A run in one line.
pub fn line(run: &Measured) -> String {
    format!(
        "total {:.0} ms, downtime {:.0} ms (silence {:.0} ms), {:.0} MB on the wire, {:.0} requests/s before and {:.0} during; {}",
        run.total_ms(),
        run.downtime_ms(),
        run.gap_ms(),
        as_f64(run.wire_bytes) / 1e6,
        run.pace_before(),
        run.work_in(Duration::from_secs_f64(run.total_ms() / 1000.0)) / run.total_ms().max(1.0)
            * 1000.0,
        run.check
    )
}

/// The middle value; of an even number of them the mean of the two in the middle.
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        length if length % 2 == 1 => values[middle],
        _ => f64::midpoint(values[middle - 1], values[middle]),
    }
}

impl Comparison {
    /// The sides that ran.
    pub fn sides(&self) -> Vec<Side> {
        let mut sides = Vec::new();
        for run in &self.runs {
            if !sides.contains(&run.side) {
                sides.push(run.side);
            }
        }
        sides
    }

    /// A side's median of something.
    pub fn median_of(&self, side: Side, what: impl Fn(&Measured) -> f64) -> f64 {
        median(self.runs.iter().filter(|run| run.side == side).map(what))
    }

    /// The span over which work is compared: the better stock side's total, or Transhume's where it ran alone.
    pub fn span(&self) -> Duration {
        let best = self.best_stock(Measured::total_ms, f64::min);
        let ours = || self.median_of(Side::Transhume, Measured::total_ms);
        let span = best.unwrap_or_else(ours);
        Duration::try_from_secs_f64(span / 1000.0).unwrap_or_default()
    }

    /// None where no stock side ran.
    fn best_stock(
        &self,
        what: impl Fn(&Measured) -> f64,
        better: impl Fn(f64, f64) -> f64,
    ) -> Option<f64> {
        let stock = self
            .sides()
            .into_iter()
            .filter(|side| matches!(side, Side::Stock(_)));
        stock.map(|side| self.median_of(side, &what)).reduce(better)
    }

    /// Transhume against stock, when both ran.
    pub fn ratios(&self) -> Option<Ratios> {
        if !self.sides().contains(&Side::Transhume) {
            return None;
        }
        let ours = |what: &dyn Fn(&Measured) -> f64| self.median_of(Side::Transhume, what);
        let span = self.span();
        let wire = |run: &Measured| as_f64(run.wire_bytes);
        let work = |run: &Measured| run.work_in(span);
        Some(Ratios {
            total: ours(&Measured::total_ms) / self.best_stock(Measured::total_ms, f64::min)?,
            wire_bytes: ours(&wire) / self.best_stock(wire, f64::min)?,
            downtime: ours(&Measured::downtime_ms)
                / self.best_stock(Measured::downtime_ms, f64::min)?,
            work: ours(&work) / self.best_stock(work, f64::max)?,
        })
    }

    /// The greatest memory of any daemon, in MiB.
    pub fn peak_rss_mib(&self) -> f64 {
        self.runs
            .iter()
            .map(|run| as_f64(run.peak_memory) / f64::from(1 << 20))
            .fold(0.0, f64::max)
    }

    /// The object of a link of so many Mbit/s.
    pub fn json(&self, rate: u32) -> Value {
        let round = |value: f64| (value * 1000.0).round() / 1000.0;
        let ratios = self.ratios();
        let span = self.span();
        let runs: Vec<Value> = self
            .runs
            .iter()
            .map(|run| {
                json!({
                    "side": run.side.to_string(),
                    "total_ms": round(run.total_ms()),
                    "stream_ms": round(run.stream_ms()),
                    "downtime_ms": round(run.downtime_ms()),
                    "silence_ms": round(run.gap_ms()),
                    "wire_bytes": run.wire_bytes,
                    "work": run.work_in(span).round(),
                    "work_per_s_before": run.pace_before().round(),
                    "peak_rss_mib": round(as_f64(run.peak_memory) / f64::from(1 << 20)),
                    "check": run.check,
                    "summary": run.summary(),
                })
            })
            .collect();
        json!({
            "rate_mbit_s": rate,
            "total_ratio": ratios.map(|ratios| round(ratios.total)),
            "wire_bytes_ratio": ratios.map(|ratios| round(ratios.wire_bytes)),
            "downtime_ratio": ratios.map(|ratios| round(ratios.downtime)),
            "downtime_ms": ratios.map(|_| round(self.median_of(Side::Transhume, Measured::downtime_ms))),
            "work_ratio": ratios.map(|ratios| round(ratios.work)),
            "peak_rss_mib": round(self.peak_rss_mib()),
            "work_span_ms": round(span.as_secs_f64() * 1000.0),
            "runs": runs,
        })
    }

    /// A table for people.
    pub fn table(&self) -> String {
        use std::fmt::Write as _;
        let span = self.span();
        let mut text = format!(
            "{:<22} {:>9} {:>10} {:>10} {:>11} {:>9}\n",
            "median of runs", "total s", "downtime", "silence", "wire MB", "requests"
        );
        for side in self.sides() {
            let _ = writeln!(
                text,
                "{:<22} {:>9.2} {:>7.0} ms {:>7.0} ms {:>11.0} {:>9.0}",
                side.to_string(),
                self.median_of(side, Measured::total_ms) / 1000.0,
                self.median_of(side, Measured::downtime_ms),
                self.median_of(side, Measured::gap_ms),
                self.median_of(side, |run| as_f64(run.wire_bytes)) / 1e6,
                self.median_of(side, |run| run.work_in(span)),
            );
        }
        if let Some(ratios) = self.ratios() {
            let _ = writeln!(
                text,
                "Transhume against the better stock side: total {:.2}, bytes on the wire {:.2}, downtime {:.2}, requests in {:.1} s {:.2}",
                ratios.total,
                ratios.wire_bytes,
                ratios.downtime,
                span.as_secs_f64(),
                ratios.work
            );
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qemu::migrate::{Moments, Stock};
    use std::time::SystemTime;

    #[test]
    fn the_median_is_in_the_middle() {
        assert!((median([3.0, 1.0, 2.0]) - 2.0).abs() < f64::EPSILON);
        assert!((median([4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < f64::EPSILON);
        assert!(median([]).is_nan());
    }

    fn run(side: Side, total: u64) -> Measured {
        let at = |ms| SystemTime::UNIX_EPOCH + Duration::from_millis(ms);
        Measured {
            side,
            begun: at(0),
            moments: Moments {
                told: at(1),
                stopped: at(total - 10),
                resumed: at(total),
                completed: at(total),
            },
            wire_bytes: total * 1000,
            samples: Vec::new(),
            beats: Vec::new(),
            check: "check ok".into(),
            messages: Vec::new(),
            peak_memory: 1 << 20,
        }
    }

    #[test]
    fn a_side_alone_is_compared_with_nothing() {
        let stock = Side::Stock(Stock::Plain);
        for side in [Side::Transhume, stock] {
            let runs = vec![run(side, 500)];
            let alone = Comparison { runs };
            assert!(alone.ratios().is_none());
            assert_eq!(alone.span(), Duration::from_millis(500));
            let text = format!("{}{}", alone.table(), alone.json(300));
            assert!(!text.contains("NaN") && !text.contains("inf"), "{text}");
        }
        let runs = vec![run(stock, 1000), run(Side::Transhume, 250)];
        let ratios = Comparison { runs }.ratios().expect("two sides");
        assert!((ratios.total - 0.25).abs() < 1e-9 && (ratios.wire_bytes - 0.25).abs() < 1e-9);
    }
}
