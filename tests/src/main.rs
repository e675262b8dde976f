//! `cargo testbed …`

use clap::{Args, Parser, Subcommand, ValueEnum};
use serde_json::Value;
use std::process::ExitCode;
use testbed::bench::adapt::{Case, Size};
use testbed::bench::post_copy::{self, Load, Plan};
use testbed::bench::{Setup, Side, compare};
use testbed::layout::{Layout, write_whole};
use testbed::packages::{Packages, Qemu, tools};
use testbed::progress::say;
use testbed::qemu::migrate::Stock;
use testbed::scenario::{self, Bed};
use testbed::{Error, Result, bench, cleanup, report, suite};

/// Moves real guests between two hosts on this machine.
#[derive(Debug, Parser)]
#[command(name = "cargo testbed", version)]
struct Arguments {
    #[command(subcommand)]
    command: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Moves a Linux guest from hosta to hostb over 1 Gbit/s: first by stock QEMU, then by Transhume
    ///
    /// Prints the comparison, the guest's own check of its data included, and writes an HTML report with a
    /// timeline of bytes by kind.
    #[command(after_help = "Example:\n  cargo testbed demo")]
    Demo(Choice),
    /// Measures Transhume against stock QEMU at its best
    #[command(
        after_help = "Examples:\n  cargo testbed bench page-cache --json\n  cargo testbed bench page-cache --quick\n  cargo testbed bench relay --runs 5 --json\n  cargo testbed bench relay --sides plain,transhume\n  cargo testbed bench adapt --cases slow-disk,link-dip\n  cargo testbed bench post-copy --loads compute --vcpus 1"
    )]
    Bench {
        /// What to measure
        #[arg(value_enum)]
        what: Bench,
        /// One run a side, of a small guest
        #[arg(long)]
        quick: bool,
        /// Prints one JSON object as the last line
        #[arg(long)]
        json: bool,
        /// Runs a side
        #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=99))]
        runs: u8,
        /// What adapt measures (all)
        #[arg(long, value_enum, value_delimiter = ',')]
        cases: Vec<Case>,
        /// What the guest of post-copy does (all)
        #[arg(long, value_enum, value_delimiter = ',')]
        loads: Vec<Load>,
        /// vCPUs of the guests of post-copy (1 and 2; --quick: 1)
        #[arg(long, value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=8))]
        vcpus: Vec<u32>,
        #[command(flatten)]
        choice: Choice,
    },
    /// Runs everything: format, lints, unit tests, the module for both kernels, and the scenarios
    #[command(
        after_help = "Examples:\n  cargo testbed test\n  cargo testbed test --list\n  cargo testbed test --all\n  cargo testbed test --only guest-6.1\n\nExit codes: 0 all passed, 1 some failed, 2 usage."
    )]
    Test {
        /// Only the scenarios whose names contain this, and nothing else
        #[arg(long, value_name = "NAME")]
        only: Option<String>,
        /// What takes long, too: more failures at random, and all of the nested tier, hosts with KVM that run as guests
        #[arg(long)]
        all: bool,
        /// Lists the scenarios
        #[arg(long)]
        list: bool,
    },
    /// What runs in a nested host
    #[command(hide = true)]
    NestedHost {
        /// Who puts page faults off
        case: String,
    },
    /// Gets the Debian packages that everything else needs, without installing them
    #[command(after_help = "Example:\n  cargo testbed packages")]
    Packages,
}

/// What is measured.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Bench {
    /// A guest whose memory is mostly clean page cache, over 1 Gbit/s
    PageCache,
    /// A guest with nothing to save, all of it data that does not compress, over an unshaped link; all
    /// sides with TLS, stock QEMU's multifd without compression
    Relay,
    /// A guest half of page cache, over 1 Gbit/s, when something is bad; against stock QEMU, plain
    Adapt,
    /// A guest at work while its memory follows it, over 1 Gbit/s and 10 ms each way; against stock QEMU's
    /// post-copy with postcopy-preempt
    PostCopy,
}

#[derive(Debug, Args)]
struct Choice {
    /// QEMU's release
    #[arg(long, value_enum, default_value_t = Release::V10_0)]
    qemu: Release,
    /// Who moves the guest
    /// (all; page-cache --quick: stock QEMU's faster one and Transhume; adapt: plain and Transhume, always;
    /// post-copy: plain, which stands for stock post-copy, and Transhume)
    #[arg(long, value_enum, value_delimiter = ',')]
    sides: Vec<Mover>,
    /// Channels of stock QEMU's multifd
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=16))]
    channels: u8,
    /// relay: through how many channels QEMU hands memory to Transhume (one stream)
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=8))]
    qemu_channels: Option<u8>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Release {
    #[value(name = "7.2")]
    V7_2,
    #[value(name = "10.0")]
    V10_0,
}

/// Who moves the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Mover {
    /// Stock QEMU, one connection
    Plain,
    /// Stock QEMU, several connections; page-cache: compressed by zstd
    Multifd,
    /// Transhume
    Transhume,
}

impl Mover {
    const ALL: [Self; 3] = [Self::Plain, Self::Multifd, Self::Transhume];
    const FAST: [Self; 2] = [Self::Multifd, Self::Transhume];
}

impl Choice {
    fn qemu(&self) -> Qemu {
        match self.qemu {
            Release::V7_2 => Qemu::V7_2,
            Release::V10_0 => Qemu::V10_0,
        }
    }

    /// Those that were named, or else `default`.
    fn movers(&self, default: &[Mover]) -> Vec<Mover> {
        or_else(self.sides.clone(), default)
    }

    /// Stock QEMU has one way there.
    fn post_copy_sides(&self) -> Result<Vec<post_copy::Side>> {
        let side = |mover| match mover {
            Mover::Plain => Ok(post_copy::Side::Stock),
            Mover::Transhume => Ok(post_copy::Side::Transhume),
            Mover::Multifd => Err(Error::machine(
                "Stock QEMU has no post-copy with multifd here",
                "Name plain, transhume or both",
            )),
        };
        let movers = self.movers(&[Mover::Plain, Mover::Transhume]);
        movers.into_iter().map(side).collect()
    }

    fn sides(&self, movers: &[Mover]) -> Vec<Side> {
        let channels = self.channels;
        let side = |mover: &Mover| match mover {
            Mover::Plain => Side::Stock(Stock::Plain),
            Mover::Multifd => Side::Stock(Stock::MultifdZstd { channels }),
            Mover::Transhume => Side::Transhume,
        };
        movers.iter().map(side).collect()
    }
}

/// What was named, or else all of `default`.
fn or_else<T: Clone>(named: Vec<T>, default: &[T]) -> Vec<T> {
    if named.is_empty() {
        default.to_vec()
    } else {
        named
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(arguments.command) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("testbed: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Says whether all went well.
fn run(task: Task) -> Result<bool> {
    if let Task::Test { list: true, .. } = task {
        for scenario in scenario::all() {
            println!("{}: {}", scenario.name, scenario.about);
        }
        for scenario in scenario::long() {
            println!("{} (with --all): {}", scenario.name, scenario.about);
        }
        return Ok(true);
    }
    cleanup::watch_signals()?;
    if let Task::NestedHost { case } = &task {
        return scenario::inside_nested_host(case).map(|()| true);
    }
    let layout = Layout::find()?;
    tools::ensure()?;
    let packages = Packages::new(&layout);
    match task {
        Task::Packages => packages.all()?,
        Task::NestedHost { .. } => {}
        Task::Test { only, all, .. } => {
            return suite::run(&Bed::new(layout, packages), only.as_deref(), all);
        }
        Task::Demo(choice) => demo(&layout, &packages, &choice)?,
        Task::Bench {
            what,
            quick,
            json,
            runs,
            cases,
            loads,
            vcpus,
            choice,
        } => {
            let runs = if quick { 1 } else { usize::from(runs) };
            let (table, object) = match what {
                Bench::PageCache => page_cache(&layout, &packages, quick, runs, &choice)?,
                Bench::Adapt => adapt(&layout, &packages, quick, runs, &choice, &cases)?,
                Bench::PostCopy => {
                    let plan = Plan {
                        sides: choice.post_copy_sides()?,
                        loads: or_else(loads, &Load::ALL),
                        vcpus: or_else(vcpus, if quick { &[1] } else { &[1, 2] }),
                        rounds: runs,
                    };
                    post_copy(&layout, &packages, quick, &choice, &plan)?
                }
                Bench::Relay => relay(&layout, &packages, quick, runs, &choice)?,
            };
            println!("{table}");
            if json {
                println!("{object}");
            }
        }
    }
    Ok(true)
}

/// The bench's table and object.
fn page_cache(
    layout: &Layout,
    packages: &Packages,
    quick: bool,
    runs: usize,
    choice: &Choice,
) -> Result<(String, Value)> {
    let (profile, movers) = if quick {
        (bench::Profile::QUICK, choice.movers(&Mover::FAST))
    } else {
        (bench::Profile::BENCH, choice.movers(&Mover::ALL))
    };
    let transhume = movers.contains(&Mover::Transhume);
    let setup = Setup::prepare(layout, packages, profile, choice.qemu(), transhume)?;
    let comparison = compare(&setup, &choice.sides(&movers), runs)?;
    Ok((comparison.table(), comparison.json("page-cache")))
}

/// The bench's table and object.
fn relay(
    layout: &Layout,
    packages: &Packages,
    quick: bool,
    runs: usize,
    choice: &Choice,
) -> Result<(String, Value)> {
    let data = if quick { 1024 } else { 3 * 1024 };
    let (qemu, told) = (choice.qemu(), choice.qemu_channels);
    let setup = bench::relay::Setup::prepare(layout, packages, qemu, data, told)?;
    let channels = choice.channels;
    let side = |mover: Mover| match mover {
        Mover::Plain => bench::relay::Side::Stock(Stock::Plain),
        Mover::Multifd => bench::relay::Side::Stock(Stock::Multifd { channels }),
        Mover::Transhume => bench::relay::Side::Transhume,
    };
    let sides: Vec<_> = choice.movers(&Mover::ALL).into_iter().map(side).collect();
    let comparison = bench::relay::compare(&setup, &sides, runs)?;
    Ok((comparison.table(), comparison.json()))
}

/// The bench's table and object.
fn adapt(
    layout: &Layout,
    packages: &Packages,
    quick: bool,
    runs: usize,
    choice: &Choice,
    cases: &[Case],
) -> Result<(String, Value)> {
    let size = if quick { Size::QUICK } else { Size::BENCH };
    let setup = bench::adapt::Setup::prepare(layout, packages, choice.qemu(), size)?;
    let cases = if cases.is_empty() { &Case::ALL } else { cases };
    let comparison = bench::adapt::compare(&setup, cases, runs)?;
    Ok((comparison.table(), comparison.json()))
}

/// The bench's table and object.
fn post_copy(
    layout: &Layout,
    packages: &Packages,
    quick: bool,
    choice: &Choice,
    plan: &Plan,
) -> Result<(String, Value)> {
    let size = if quick {
        post_copy::Size::QUICK
    } else {
        post_copy::Size::BENCH
    };
    let setup = post_copy::Setup::prepare(layout, packages, choice.qemu(), size)?;
    let comparison = post_copy::compare(&setup, plan)?;
    Ok((comparison.table(), comparison.json()))
}

fn demo(layout: &Layout, packages: &Packages, choice: &Choice) -> Result<()> {
    let movers = choice.movers(&Mover::ALL);
    let setup = Setup::prepare(
        layout,
        packages,
        bench::Profile::DEMO,
        choice.qemu(),
        movers.contains(&Mover::Transhume),
    )?;
    let comparison = compare(&setup, &choice.sides(&movers), 1)?;
    println!("{}", comparison.table());
    let path = layout.base.join("demo.html");
    let about = format!(
        "A Linux guest with {} MiB of memory, most of it page cache, serves requests and writes 20 MiB/s while it moves \
         from hosta to hostb over one link of {} Mbit/s (QEMU {}, both hosts on one machine, no KVM). Afterwards it compares all its data.",
        setup.machine.memory,
        setup.rate,
        choice.qemu().version()
    );
    write_whole(
        &path,
        report::html("A guest moves", &about, &comparison).as_bytes(),
    )?;
    say(format!("the report is {}", path.display()));
    Ok(())
}
