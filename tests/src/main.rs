//! `cargo testbed …`

use clap::{Args, Parser, Subcommand, ValueEnum};
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use testbed::bench::adapt::{Case, Size};
use testbed::bench::post_copy::{self, Load, Plan};
use testbed::bench::{Setup, Side, compare};
use testbed::hosts::daemon;
use testbed::layout::{Layout, write_whole};
use testbed::packages::{Packages, Qemu, tools};
use testbed::progress::say;
use testbed::qemu::migrate::Stock;
use testbed::scenario::{self, Bed, Draw, Outcome};
use testbed::suite::{self, Options};
use testbed::{Error, Result, bench, cleanup, report};

/// Nothing is known of ours: something else failed.
const MACHINERY: u8 = 3;

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
        after_help = "Examples:\n  cargo testbed bench page-cache --json\n  cargo testbed bench page-cache --quick --rate 300\n  cargo testbed bench relay --runs 5 --json\n  cargo testbed bench relay --sides plain,transhume\n  cargo testbed bench adapt --cases slow-disk,link-dip\n  cargo testbed bench post-copy --loads compute --vcpus 1"
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
        /// page-cache: the link, in Mbit/s (1000 and 300: at the first both hosts are bound by this machine's CPUs, at the
        /// second by the link, as hosts with CPUs of their own are)
        #[arg(long, value_name = "MBIT", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=100_000))]
        rate: Vec<u32>,
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
    ///
    /// What came of each part, and how long it took, is printed at the end, compared with tests/budget.json, and kept in
    /// target/testbed/tests.json.
    #[command(
        after_help = "Examples:\n  cargo testbed test\n  cargo testbed test --list\n  cargo testbed test --all --resume\n  cargo testbed test --only choice --only 'post-copy-*'\n\nExit codes: 0 all passed; 1 some failed; 2 usage; 3 the machinery failed (a package that cannot be got, no memory, a translator that ended of itself), and nothing else did."
    )]
    Test {
        /// Only the test of that name, or those of a pattern (post-copy-*); may be said several times
        #[arg(long, value_name = "NAME")]
        only: Vec<String>,
        /// What takes long, too: all twins, more failures at random, and all of the nested tier, hosts with KVM that run
        /// as guests
        #[arg(long)]
        all: bool,
        /// Both of tests that differ by their kernel or their QEMU alone, and else take turns from commit to commit
        #[arg(long)]
        twins: bool,
        /// Not what passed already at this state of the work tree
        #[arg(long)]
        resume: bool,
        /// Writes the times that were measured to tests/budget.json
        #[arg(long)]
        set_budget: bool,
        /// Lists the tests
        #[arg(long)]
        list: bool,
    },
    /// One scenario, in a process of its own
    #[command(hide = true)]
    Scenario {
        /// Its name.
        name: String,
        /// Where to say what came of it.
        #[arg(long)]
        result: PathBuf,
        /// As much as before a release.
        #[arg(long)]
        all: bool,
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
    #[value(name = "10.0.13")]
    V10_0_13,
    #[value(name = "11.1")]
    V11_1,
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
            Release::V10_0_13 => Qemu::V10_0_13,
            Release::V11_1 => Qemu::V11_1,
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
        Ok(Outcome::Passed) => ExitCode::SUCCESS,
        Ok(Outcome::Failed) => ExitCode::FAILURE,
        Ok(Outcome::Machinery) => MACHINERY.into(),
        Err(error) => {
            eprintln!("testbed: {error}");
            match error {
                Error::Usage(_) => 2.into(),
                error if error.is_machinery() => MACHINERY.into(),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

/// Says whether all went well.
fn run(task: Task) -> Result<Outcome> {
    if let Task::Test { list: true, .. } = task {
        suite::list();
        return Ok(Outcome::Passed);
    }
    cleanup::watch_signals()?;
    let _settings = daemon::keep_settings();
    if let Task::NestedHost { case } = &task {
        return scenario::inside_nested_host(case).map(|()| Outcome::Passed);
    }
    let released = match &task {
        Task::Test { all, .. } | Task::Scenario { all, .. } => *all,
        _ => true,
    };
    let layout = Layout::find(released)?;
    tools::ensure()?;
    let packages = Packages::new(&layout);
    match task {
        Task::Packages => packages.all()?,
        Task::NestedHost { .. } => {}
        Task::Scenario { name, result, all } => {
            return suite::one(&Bed::new(layout, packages, Draw::new(all)?), &name, &result);
        }
        Task::Test {
            only,
            all,
            twins,
            resume,
            set_budget,
            list: _,
        } => {
            let options = Options {
                only,
                all,
                twins,
                resume,
                set_budget,
            };
            return suite::run(&Bed::new(layout, packages, Draw::new(all)?), &options);
        }
        Task::Demo(choice) => demo(&layout, &packages, &choice)?,
        Task::Bench {
            what,
            quick,
            json,
            runs,
            rate,
            cases,
            loads,
            vcpus,
            choice,
        } => {
            let runs = if quick { 1 } else { usize::from(runs) };
            let (table, object) = match what {
                Bench::PageCache => {
                    let rates = or_else(rate, &[1000, 300]);
                    page_cache(&layout, &packages, quick, runs, &choice, &rates)?
                }
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
    Ok(Outcome::Passed)
}

/// The bench's table and object.
fn page_cache(
    layout: &Layout,
    packages: &Packages,
    quick: bool,
    runs: usize,
    choice: &Choice,
    rates: &[u32],
) -> Result<(String, Value)> {
    let (profile, movers) = if quick {
        (bench::Profile::QUICK, choice.movers(&Mover::FAST))
    } else {
        (bench::Profile::BENCH, choice.movers(&Mover::ALL))
    };
    let transhume = movers.contains(&Mover::Transhume);
    let mut setup = Setup::prepare(layout, packages, profile, choice.qemu(), transhume)?;
    let (mut tables, mut objects) = (String::new(), Vec::new());
    for &rate in rates {
        setup.rate = rate;
        let comparison = compare(&setup, &choice.sides(&movers), runs)?;
        let _ = writeln!(tables, "{rate} Mbit/s\n{}", comparison.table());
        objects.push(comparison.json(rate));
    }
    Ok((tables, json!({"bench": "page-cache", "rates": objects})))
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
