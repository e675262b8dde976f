//! The guest agent of Transhume, for Linux guests.

use clap::Parser;
use std::path::PathBuf;
use std::process::ExitCode;
use tracing_subscriber::EnvFilter;
use transhume_agent::linux::{
    Correction, First, Group, LinuxCache, LinuxClasses, LinuxClock, PortPath, Preference, check,
    serve,
};

const AGENT: &str = concat!("transhume-agent ", env!("CARGO_PKG_VERSION"));

/// Tells the host which of the guest's memory is page cache, so that a live migration need not
/// send it.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Examples:
  transhume-agent                   serve the host, as the systemd service does
  transhume-agent --check           tell what could be reported, and end
  transhume-agent --port /dev/vport2p1 --source user-space
  transhume-agent --first redis-server --first nginx
                                    in post-copy redis' memory comes first, then nginx's

RUST_LOG=debug makes it say more. Exit codes: 0 ok, 1 nothing can be reported, 2 usage."
)]
struct Arguments {
    /// The port to the host, where it is not found by its name
    #[arg(long, value_name = "PATH")]
    port: Option<PathBuf>,
    /// How to learn what the page cache holds
    #[arg(long, value_enum, default_value_t)]
    source: Preference,
    /// A unit, or the path of a control group, whose memory comes first when this VM moves by post-copy; may be
    /// repeated, in that order
    #[arg(
        long,
        value_name = "UNIT",
        env = "TRANSHUME_FIRST",
        value_delimiter = ' '
    )]
    first: Vec<Group>,
    /// How the clock, which stands still while this VM moves, is set right afterwards. One that a time daemon keeps is
    /// left to it
    #[arg(
        long,
        value_enum,
        value_name = "HOW",
        env = "TRANSHUME_CLOCK",
        default_value_t
    )]
    clock: Correction,
    /// Make one report without a host, print what it found, and end
    #[arg(long)]
    check: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        // journald and a console without colours both like it plain.
        .with_ansi(false)
        .init();
    let mut cache = LinuxCache::new(arguments.source);
    let mut classes = LinuxClasses::new(First::new(arguments.first));
    if arguments.check {
        return match check(&mut cache, &mut classes) {
            Ok(summary) => {
                println!("{summary}");
                ExitCode::SUCCESS
            }
            Err(error) => {
                eprintln!("transhume-agent: {error}");
                ExitCode::FAILURE
            }
        };
    }
    let path = arguments.port.map_or(PortPath::Named, PortPath::At);
    let mut clock = LinuxClock::new(arguments.clock);
    serve(&path, AGENT, &mut cache, &mut classes, &mut clock)
}
