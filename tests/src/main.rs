//! `cargo testbed …`

use clap::{Parser, Subcommand};
use std::process::ExitCode;
use std::time::Duration;
use testbed::bench::{self, Profile, Side};
use testbed::hosts::Hosts;
use testbed::layout::Layout;
use testbed::packages::{Kernel, Packages, Qemu, tools};
use testbed::qemu::migrate::Stock;
use testbed::scenario::{self, Bed};
use testbed::{Result, cleanup, suite};

/// Moves real guests between two hosts on this machine.
#[derive(Debug, Parser)]
#[command(name = "cargo testbed", version)]
struct Arguments {
    #[command(subcommand)]
    command: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Gets the Debian packages that everything else needs, without installing them
    #[command(after_help = "Example:\n  cargo testbed packages")]
    Packages,
    /// Runs everything: format, lints, unit tests, the module for both kernels, and the scenarios
    #[command(
        after_help = "Examples:\n  cargo testbed test\n  cargo testbed test --list\n  cargo testbed test --only guest-6.1\n\nExit codes: 0 all passed, 1 some failed, 2 usage."
    )]
    Test {
        /// Only the scenarios whose names contain this, and nothing else
        #[arg(long, value_name = "NAME")]
        only: Option<String>,
        /// Lists the scenarios
        #[arg(long)]
        list: bool,
    },
    /// Moves the bench's guest by stock QEMU alone, and prints what was measured
    #[command(after_help = "Example:\n  cargo testbed stock --qemu 10.0 --channels 2")]
    Stock {
        /// QEMU's release: 7.2 or 10.0
        #[arg(long, default_value = "10.0")]
        qemu: String,
        /// Channels of multifd with zstd; without it, one plain connection
        #[arg(long)]
        channels: Option<u8>,
        /// A small guest
        #[arg(long)]
        quick: bool,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("testbed: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<ExitCode> {
    if let Task::Test { list: true, .. } = arguments.command {
        for scenario in scenario::all() {
            println!("{}: {}", scenario.name, scenario.about);
        }
        return Ok(ExitCode::SUCCESS);
    }
    cleanup::watch_signals()?;
    let layout = Layout::find()?;
    tools::ensure()?;
    let packages = Packages::new(&layout);
    match &arguments.command {
        Task::Packages => packages.all()?,
        Task::Test { only, .. } => {
            let bed = Bed { layout, packages };
            let passed = suite::run(&bed, only.as_deref())?;
            return Ok(if passed {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            });
        }
        Task::Stock {
            qemu,
            channels,
            quick,
        } => {
            stock(&layout, &packages, qemu, *channels, *quick)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn stock(
    layout: &Layout,
    packages: &Packages,
    version: &str,
    channels: Option<u8>,
    quick: bool,
) -> Result<()> {
    let version = Qemu::ALL
        .into_iter()
        .find(|qemu| qemu.version() == version)
        .ok_or_else(|| {
            testbed::Error::machine(format!("No QEMU {version} here"), "Say 7.2 or 10.0")
        })?;
    let profile = if quick {
        Profile::QUICK
    } else {
        Profile::BENCH
    };
    let qemu = packages.qemu(version)?;
    let machine = profile.machine(layout, packages, Kernel::V6_12)?;
    let way = channels.map_or(Stock::Plain, |channels| Stock::MultifdZstd { channels });
    let hosts = Hosts::new(Some(profile.rate))?;
    let run = bench::run(&hosts, &machine, &qemu, Side::Stock(way), Duration::ZERO)?;
    println!(
        "{}: total {:.0} ms (stream {:.0}), downtime {:.0} ms (gap {:.0}), {:.0} MB on the wire, {:.0} requests in the total (pace before: {:.0}/s), {}",
        run.side,
        run.total_ms(),
        run.stream_ms(),
        run.downtime_ms(),
        run.gap_ms(),
        run.wire_bytes as f64 / 1e6,
        run.work_in(Duration::from_secs_f64(run.total_ms() / 1000.0)),
        run.pace_before(),
        run.check
    );
    Ok(())
}
