//! What the runs say of each other.

use super::moved::{Moved, SPAN};
use super::{DELAY, Load, RATE, Ran, Side, Size};
use crate::bench::compare::median;
use crate::bench::measure::as_f64;
use serde_json::{Value, json};
use std::fmt::Write as _;

/// What is looked at no closer than this: how finely a return to the old pace is told, in ms.
const FINEST: f64 = 50.0;

/// All runs.
#[derive(Debug)]
pub struct Comparison {
    pub(super) size: Size,
    pub(super) runs: Vec<Ran>,
}

/// Transhume by stock, for one guest; medians.
#[derive(Debug, Clone, Copy)]
struct Ratios {
    /// Work a second after the hand-over.
    work: f64,
    /// The time until its pace is back.
    back: f64,
    downtime: f64,
    total: f64,
    wire_bytes: f64,
}

fn round(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

/// As JSON has it: a number, or null.
fn number(value: f64) -> Option<f64> {
    value.is_finite().then(|| round(value))
}

/// What the gate in the guest took of its CPU, in ms for each GiB that was absent; not a number where there was none.
fn gate_cpu(moved: &Moved) -> f64 {
    let stalls = &moved.summary["post-copy"]["stalls"];
    let number = |name: &str| stalls[name].as_f64().unwrap_or(f64::NAN);
    let gib = number("absent-pages") * 4096.0 / f64::from(1 << 30);
    if gib > 0.0 {
        number("gate-cpu-ms") / gib
    } else {
        f64::NAN
    }
}

/// A run in one line.
pub(super) fn line(moved: &Moved) -> String {
    format!(
        "work {:.0}/s undisturbed and {:.0}/s after the hand-over, back {}; downtime {:.0} ms (silence {:.0} ms), \
         total {:.0} ms of which {:.0} ms followed, {:.0} MB on the wire; {}{}",
        moved.before,
        moved.after,
        moved
            .back_ms
            .map_or("not seen".to_owned(), |back| format!("after {back:.0} ms")),
        moved.downtime_ms,
        moved.silence_ms,
        moved.total_ms,
        moved.followed_ms,
        as_f64(moved.wire_bytes) / 1e6,
        moved.check,
        if moved.switched {
            ""
        } else {
            "; pre-copy ended by itself"
        }
    )
}

impl Comparison {
    fn of(&self, load: Load, vcpus: u32, side: Side) -> impl Iterator<Item = &Moved> {
        let wanted = move |ran: &&Ran| (ran.load, ran.vcpus, ran.side) == (load, vcpus, side);
        self.runs.iter().filter(wanted).map(|ran| &ran.moved)
    }

    /// Not a number if it was not measured.
    fn median_of(&self, guest: (Load, u32), side: Side, what: impl Fn(&Moved) -> f64) -> f64 {
        median(self.of(guest.0, guest.1, side).map(what))
    }

    /// The guests that were moved.
    fn guests(&self) -> Vec<(Load, u32)> {
        let mut guests = Vec::new();
        for ran in &self.runs {
            if !guests.contains(&(ran.load, ran.vcpus)) {
                guests.push((ran.load, ran.vcpus));
            }
        }
        guests
    }

    fn ratios(&self, guest: (Load, u32)) -> Ratios {
        let ratio = |what: &dyn Fn(&Moved) -> f64| {
            self.median_of(guest, Side::Transhume, what) / self.median_of(guest, Side::Stock, what)
        };
        Ratios {
            work: ratio(&|moved| moved.after),
            back: ratio(&|moved| moved.back_ms.map_or(f64::NAN, |back| back.max(FINEST))),
            downtime: ratio(&|moved| moved.downtime_ms),
            total: ratio(&|moved| moved.total_ms),
            wire_bytes: ratio(&|moved| as_f64(moved.wire_bytes)),
        }
    }

    fn of_undisturbed(&self, guest: (Load, u32), side: Side) -> f64 {
        self.median_of(guest, side, |moved| moved.after / moved.before)
    }

    /// The worst of the guests of a load, where more is better.
    fn least(&self, load: Load, what: impl Fn((Load, u32)) -> f64) -> Option<f64> {
        let guests = self.guests().into_iter().filter(|guest| guest.0 == load);
        let values = guests.map(what).filter(|value| value.is_finite());
        values.reduce(f64::min).map(round)
    }

    /// The worst of the guests of some loads, where less is better.
    fn greatest(&self, loads: &[Load], what: impl Fn(Ratios) -> f64) -> Option<f64> {
        let guests = self.guests().into_iter();
        let values = guests
            .filter(|guest| loads.contains(&guest.0))
            .map(|guest| what(self.ratios(guest)))
            .filter(|value| value.is_finite());
        values.reduce(f64::max).map(round)
    }

    /// The bench's one object.
    pub fn json(&self) -> Value {
        let guests: Vec<Value> = self
            .guests()
            .into_iter()
            .map(|guest| {
                let ratios = self.ratios(guest);
                json!({
                    "load": guest.0.name(),
                    "vcpus": guest.1,
                    "work_ratio": number(ratios.work),
                    "of_undisturbed": number(self.of_undisturbed(guest, Side::Transhume)),
                    "stock_of_undisturbed": number(self.of_undisturbed(guest, Side::Stock)),
                    "recovery_ratio": number(ratios.back),
                    "downtime_ratio": number(ratios.downtime),
                    "total_ratio": number(ratios.total),
                    "wire_bytes_ratio": number(ratios.wire_bytes),
                    "gate_cpu_ms_per_gib":
                        number(self.median_of(guest, Side::Transhume, gate_cpu)),
                })
            })
            .collect();
        let runs: Vec<Value> = self
            .runs
            .iter()
            .map(
                |Ran {
                     load,
                     vcpus,
                     side,
                     moved,
                 }| {
                    json!({
                        "load": load.name(),
                        "vcpus": vcpus,
                        "side": side.name(),
                        "work_per_s_before": round(moved.before),
                        "work_per_s_after": round(moved.after),
                        "recovery_ms": moved.back_ms.map(round),
                        "downtime_ms": round(moved.downtime_ms),
                        "silence_ms": round(moved.silence_ms),
                        "total_ms": round(moved.total_ms),
                        "followed_ms": round(moved.followed_ms),
                        "post_copy": moved.switched,
                    "wire_bytes": moved.wire_bytes,
                        "gate_cpu_ms_per_gib": number(gate_cpu(moved)),
                        "check": moved.check,
                        "summary": moved.summary,
                    })
                },
            )
            .collect();
        json!({
            "bench": "post-copy",
            "compute_ratio": self.least(Load::Compute, |guest| self.ratios(guest).work),
            "compute_of_undisturbed":
                self.least(Load::Compute, |guest| self.of_undisturbed(guest, Side::Transhume)),
            "kv_ratio": self.least(Load::Kv, |guest| self.ratios(guest).work),
            "web_ratio": self.least(Load::Web, |guest| self.ratios(guest).work),
            "recovery_ratio": self.greatest(&Load::SERVERS, |ratios| ratios.back),
            "downtime_ratio": self.greatest(&Load::ALL, |ratios| ratios.downtime),
            "total_ratio": self.greatest(&Load::ALL, |ratios| ratios.total),
            "wire_bytes_ratio": self.greatest(&Load::ALL, |ratios| ratios.wire_bytes),
            "guests": guests,
            "runs": runs,
        })
    }

    /// A table for people.
    pub fn table(&self) -> String {
        let mut text = format!(
            "A guest of {} MiB moves by post-copy, over {RATE} Mbit/s and {} ms each way; it switches after one scan.\n\
             Work is a second's, in the {} s from the guest's last sign at the source; undisturbed in the 5 s before the\n\
             command. It is back when a second of it has 90% of that. The total ends when all memory is there.\n\
             Medians, and the least and the greatest.\n\n\
             {:<26} {:>26} {:>12} {:>24} {:>12} {:>15} {:>22} {:>8}\n",
            self.size.memory,
            DELAY.as_millis(),
            SPAN.as_secs(),
            "",
            "work/s",
            "undisturbed",
            "back after ms",
            "downtime ms",
            "silence ms",
            "total s",
            "wire MB"
        );
        for guest in self.guests() {
            for side in [Side::Stock, Side::Transhume] {
                if self.of(guest.0, guest.1, side).next().is_none() {
                    continue;
                }
                let middle = |what: &dyn Fn(&Moved) -> f64| self.median_of(guest, side, what);
                let spread = |what: &dyn Fn(&Moved) -> f64, digits: usize| {
                    let values = || self.of(guest.0, guest.1, side).map(what);
                    format!(
                        "{:.digits$} ({:.digits$}-{:.digits$})",
                        middle(what),
                        values().fold(f64::INFINITY, f64::min),
                        values().fold(f64::NEG_INFINITY, f64::max)
                    )
                };
                let unseen = self
                    .of(guest.0, guest.1, side)
                    .any(|moved| moved.back_ms.is_none());
                let _ = writeln!(
                    text,
                    "{:<26} {:>26} {:>12.0} {:>24} {:>12.0} {:>15.0} {:>22} {:>8.0}",
                    format!("{}, {} vCPU, {}", guest.0.name(), guest.1, side.name()),
                    spread(&|moved| moved.after, 0),
                    middle(&|moved| moved.before),
                    if unseen {
                        "not always seen".to_owned()
                    } else {
                        spread(&|moved| moved.back_ms.unwrap_or(f64::NAN), 0)
                    },
                    middle(&|moved| moved.downtime_ms),
                    middle(&|moved| moved.silence_ms),
                    spread(&|moved| moved.total_ms / 1000.0, 2),
                    middle(&|moved| as_f64(moved.wire_bytes) / 1e6),
                );
            }
        }
        for guest in self.guests() {
            let cpu = self.median_of(guest, Side::Transhume, gate_cpu);
            if cpu.is_finite() {
                let _ = writeln!(
                    text,
                    "The gate took {cpu:.0} ms of the guest's CPU for each GiB of absent memory ({}, {} vCPU).",
                    guest.0.name(),
                    guest.1
                );
            }
        }
        let early = |side| {
            let runs = self.runs.iter().filter(|ran| ran.side == side);
            runs.filter(|ran| !ran.moved.switched).count()
        };
        let (stock, transhume) = (early(Side::Stock), early(Side::Transhume));
        if stock + transhume > 0 {
            let _ = writeln!(
                text,
                "Pre-copy ended by itself in {stock} of stock's runs and in {transhume} of Transhume's."
            );
        }
        text.push_str("\nTranshume against stock post-copy; where there are several guests, the worst of them:\n");
        let object = self.json();
        for (name, key, target) in [
            ("compute", "compute_ratio", "at least 1.8"),
            (
                "compute, of undisturbed",
                "compute_of_undisturbed",
                "at least 0.85",
            ),
            ("key-value store", "kv_ratio", "at least 1.5"),
            ("web server", "web_ratio", "at least 1.5"),
            ("time until it is back", "recovery_ratio", "at most 0.5"),
            ("downtime", "downtime_ratio", "at most 1.2"),
            ("total time", "total_ratio", "at most 0.8"),
            ("bytes on the wire", "wire_bytes_ratio", "at most 0.8"),
        ] {
            if let Some(value) = object[key].as_f64() {
                let _ = writeln!(text, "{name:<26} {value:>7.3}   target {target}");
            }
        }
        text
    }
}
