//! How fast the relay is where it has nothing to save: a guest full of data that does not compress, no page
//! cache, no zero pages, over a link as fast as this machine. Against stock QEMU with TLS as well, so that
//! all sides encrypt.

use super::compare::median;
use super::measure::as_f64;
use super::micro::{self, Bed, Cpu, Moved, by_stock, by_transhume};
use crate::command::Run;
use crate::guest::build;
use crate::hosts::{Host, Hosts};
use crate::layout::Layout;
use crate::packages::{Packages, Qemu};
use crate::progress::say;
use crate::qemu::Machine;
use crate::qemu::migrate::{Credentials, Stock};
use crate::{Error, Result};
use serde_json::{Value, json};
use std::fmt;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

/// MiB of its memory that hold no data: for the guest itself.
const GUESTS_OWN: u64 = 64;

/// Who moves the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// QEMU alone, with TLS.
    Stock(Stock),
    /// Transhume, with TLS.
    Transhume,
}

impl fmt::Display for Side {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stock(stock) => write!(formatter, "stock-{stock}-tls"),
            Self::Transhume => write!(formatter, "transhume"),
        }
    }
}

/// What it takes, got and built before a clock starts.
#[derive(Debug)]
pub struct Setup {
    machine: Machine,
    /// MiB of data in it.
    data: u64,
    /// What Transhume's hosts are told of their QEMU's channels.
    qemu_channels: Option<u8>,
    qemu: PathBuf,
    programs: PathBuf,
}

/// All runs of all sides.
#[derive(Debug)]
pub struct Comparison {
    /// GiB of data in the guest.
    gib: f64,
    runs: Vec<(Side, Moved)>,
}

impl Setup {
    /// A guest with so many MiB of data, and little memory beside it. `qemu_channels`: what Transhume's hosts are
    /// told, if anything.
    pub fn prepare(
        layout: &Layout,
        packages: &Packages,
        version: Qemu,
        data: u64,
        qemu_channels: Option<u8>,
    ) -> Result<Self> {
        let memory = data + GUESTS_OWN;
        let parameters = format!("content=random data={data}M zero=0");
        Ok(Self {
            machine: micro::machine(build::micro_guest(layout)?, memory, parameters, Vec::new()),
            data,
            qemu_channels,
            qemu: packages.qemu(version)?,
            programs: build::host_programs(layout)?,
        })
    }
}

/// Certificates of one authority in the places where QEMU looks for them, made by `transhume pki`.
fn credentials(hosts: &Hosts, programs: &Path) -> Result<Credentials> {
    let authority = hosts.a.folder.join("qemu-authority");
    let pki = |arguments: &[&str]| {
        Run::new(programs.join("transhume"))
            .arg("pki")
            .args(arguments)
            .arg("--dir")
            .arg(&authority)
            .cure("See its words")
            .output()
    };
    pki(&["init"])?;
    let issue = |host: &Host, end: &str| -> Result<PathBuf> {
        let folder = host.empty_folder("qemu-pki")?;
        pki(&["issue", host.name, "--out", &folder.display().to_string()])?;
        let copy = |from: &Path, to: &str| {
            let to = folder.join(to);
            fs::copy(from, &to).map_err(Error::file("write", &to))
        };
        copy(&authority.join("ca.crt"), "ca-cert.pem")?;
        for (ending, name) in [("crt", "cert"), ("key", "key")] {
            let from = folder.join(format!("{}.{ending}", host.name));
            copy(&from, &format!("{end}-{name}.pem"))?;
        }
        Ok(folder)
    };
    Ok(Credentials {
        client: issue(&hosts.a, "client")?,
        server: issue(&hosts.b, "server")?,
        server_name: hosts.b.name.into(),
    })
}

/// Runs every side so many times, in turn.
pub fn compare(setup: &Setup, sides: &[Side], rounds: usize) -> Result<Comparison> {
    let mut hosts = Hosts::new(None)?;
    hosts.a.qemu_channels = setup.qemu_channels;
    let credentials = credentials(&hosts, &setup.programs)?;
    let bed = Bed {
        hosts: &hosts,
        qemu: &setup.qemu,
        programs: &setup.programs,
        machine: &setup.machine,
        credentials: Some(&credentials),
        before: &|| Ok(()),
        beside: &|| Ok(()),
        after: &|| Ok(()),
    };
    let mut comparison = Comparison {
        gib: as_f64(setup.data) / 1024.0,
        runs: Vec::new(),
    };
    for round in 1..=rounds {
        for &side in sides {
            say(format!("run {round} of {rounds}: {side}"));
            let moved = match side {
                Side::Stock(stock) => by_stock(&bed, stock)?,
                Side::Transhume => by_transhume(&bed)?,
            };
            say(format!(
                "  {:.2} GiB/s: stream {:.0} ms of {:.0} ms, {:.0} MB on the wire; {} pages right",
                comparison.throughput(&moved),
                moved.stream_ms,
                moved.total_ms,
                as_f64(moved.wire_bytes) / 1e6,
                moved.checked_pages
            ));
            comparison.runs.push((side, moved));
        }
    }
    Ok(comparison)
}

impl Comparison {
    /// GiB of data a second of stream.
    fn throughput(&self, moved: &Moved) -> f64 {
        self.gib * 1000.0 / moved.stream_ms
    }

    fn sides(&self) -> Vec<Side> {
        let mut sides = Vec::new();
        for (side, _) in &self.runs {
            if !sides.contains(side) {
                sides.push(*side);
            }
        }
        sides
    }

    fn median_of(&self, side: Side, what: impl Fn(&Moved) -> f64) -> f64 {
        let runs = self.runs.iter().filter(|(ran, _)| *ran == side);
        median(runs.map(|(_, moved)| what(moved)))
    }

    /// Transhume's throughput against that of a stock side; none if either did not run.
    fn ratio(&self, is: impl Fn(Stock) -> bool) -> Option<f64> {
        let against = self
            .sides()
            .into_iter()
            .find(|side| matches!(side, Side::Stock(stock) if is(*stock)))?;
        let throughput = |side| self.median_of(side, |moved| self.throughput(moved));
        let ratio = throughput(Side::Transhume) / throughput(against);
        ratio.is_finite().then_some(ratio)
    }

    fn one_stream(&self) -> Option<f64> {
        self.ratio(|stock| stock == Stock::Plain)
    }

    fn multifd(&self) -> Option<f64> {
        self.ratio(|stock| matches!(stock, Stock::Multifd { .. }))
    }

    /// CPU seconds a GiB.
    fn cost(&self, side: Side, what: impl Fn(&Cpu) -> f64) -> f64 {
        self.median_of(side, |moved| what(&moved.cpu) / self.gib)
    }

    /// The greatest memory of any daemon, in MiB.
    fn peak_mib(&self) -> f64 {
        let peaks = self.runs.iter().map(|(_, moved)| moved.peak_memory);
        micro::mib(peaks.max().unwrap_or(0))
    }

    /// The bench's one object.
    pub fn json(&self) -> Value {
        let round = |value: f64| (value * 1000.0).round() / 1000.0;
        let runs: Vec<Value> = self
            .runs
            .iter()
            .map(|(side, moved)| {
                json!({
                    "side": side.to_string(),
                    "gib_per_s": round(self.throughput(moved)),
                    "stream_ms": round(moved.stream_ms),
                    "total_ms": round(moved.total_ms),
                    "downtime_ms": round(moved.downtime_ms),
                    "wire_bytes": moved.wire_bytes,
                    "cpu_s": {
                        "source": round(moved.cpu.source),
                        "destination": round(moved.cpu.destination),
                        "source_qemu": round(moved.cpu.source_qemu),
                        "destination_qemu": round(moved.cpu.destination_qemu),
                    },
                    "peak_rss_mib": round(micro::mib(moved.peak_memory)),
                    "checked_pages": moved.checked_pages,
                    "summary": moved.summary,
                })
            })
            .collect();
        json!({
            "bench": "relay",
            "guest_gib": round(self.gib),
            "one_stream_ratio": self.one_stream().map(round),
            "multifd_ratio": self.multifd().map(round),
            "cpu_s_per_gib_source": round(self.cost(Side::Transhume, |cpu| cpu.source)),
            "cpu_s_per_gib_destination": round(self.cost(Side::Transhume, |cpu| cpu.destination)),
            "peak_rss_mib": round(self.peak_mib()),
            "runs": runs,
        })
    }

    /// A table for people.
    pub fn table(&self) -> String {
        let mut text = format!(
            "{:.1} GiB of data that does not compress; every side encrypts (TLS, certificates at both ends).\n\
             Throughput is data by stream time: from the order to QEMU, both ends being prepared, to the guest's\n\
             first sign at the destination. CPU is user and system time from then (Transhume: from the command)\n\
             to the end; QEMU's has the idle guest's in it.\n\n{:<22} {:>7} {:>8} {:>8} {:>9} {:>26} {:>26}\n",
            self.gib,
            "median of runs",
            "GiB/s",
            "stream s",
            "total s",
            "downtime",
            "CPU s/GiB: daemon src, dst",
            "QEMU src, dst"
        );
        for side in self.sides() {
            let _ = writeln!(
                text,
                "{:<22} {:>7.2} {:>8.2} {:>8.2} {:>6.0} ms {:>26} {:>26}",
                side.to_string(),
                self.median_of(side, |moved| self.throughput(moved)),
                self.median_of(side, |moved| moved.stream_ms / 1000.0),
                self.median_of(side, |moved| moved.total_ms / 1000.0),
                self.median_of(side, |moved| moved.downtime_ms),
                match side {
                    Side::Stock(_) => "-".to_owned(),
                    Side::Transhume => format!(
                        "{:.2}, {:.2}",
                        self.cost(side, |cpu| cpu.source),
                        self.cost(side, |cpu| cpu.destination)
                    ),
                },
                format!(
                    "{:.2}, {:.2}",
                    self.cost(side, |cpu| cpu.source_qemu),
                    self.cost(side, |cpu| cpu.destination_qemu)
                ),
            );
        }
        for (name, ratio) in [
            ("one stream", self.one_stream()),
            ("multifd", self.multifd()),
        ] {
            if let Some(ratio) = ratio {
                let _ = writeln!(
                    text,
                    "Transhume's throughput against stock QEMU, {name}: {ratio:.2}"
                );
            }
        }
        if self.sides().contains(&Side::Transhume) {
            let _ = writeln!(
                text,
                "Greatest memory of a daemon: {:.0} MiB",
                self.peak_mib()
            );
        }
        text
    }
}
