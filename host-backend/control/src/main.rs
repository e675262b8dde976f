//! The service of Transhume: one on each host.

mod log;

use clap::Parser;
use std::path::PathBuf;
use std::process::ExitCode;
use tracing_subscriber::EnvFilter;
use transhume_base::allocator;
use transhume_control::{config::Config, service};

/// Keeps this host's VMs, and moves them to and from other hosts.
#[derive(Debug, Parser)]
#[command(
    name = "transhumed",
    version,
    after_help = "Example:\n  transhumed --config /etc/transhume/transhumed.toml\n\n\
                  A configuration needs host = \"NAME\", [tls] with the files that `transhume pki` makes, and \
                  [hosts.OTHER] with address = \"ADDRESS:7465\" for each host that VMs are to move to or come \
                  from. [incoming] names what VMs that come may use.\n\n\
                  Exit codes:\n  0  ended by SIGTERM or SIGINT; its VMs go on\n  1  could not begin\n  \
                  2  the command line is wrong\n  3  the configuration is wrong, or another transhumed runs"
)]
struct Arguments {
    /// The configuration
    #[arg(
        long,
        value_name = "FILE",
        default_value = "/etc/transhume/transhumed.toml"
    )]
    config: PathBuf,
    /// What to log: error, warn, info, debug, trace, or by part, as in "`info,transhume_relay=debug`"
    #[arg(
        long,
        value_name = "FILTER",
        env = "TRANSHUME_LOG",
        default_value = "info"
    )]
    log: String,
}

fn main() -> ExitCode {
    allocator::bound_arenas();
    let arguments = Arguments::parse();
    match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime.block_on(run(arguments)),
        Err(error) => {
            eprintln!("transhumed: it cannot start its threads: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: Arguments) -> ExitCode {
    let filter = match EnvFilter::try_new(&arguments.log) {
        Ok(filter) => filter,
        Err(error) => {
            eprintln!(
                "transhumed: --log {}: {error}; write a level, as in info",
                arguments.log
            );
            return ExitCode::from(2);
        }
    };
    log::begin(filter);
    let result = match Config::load(&arguments.config) {
        Ok(config) => service::run(config).await,
        Err(error) => Err(error),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("transhumed: {error}");
            ExitCode::from(error.kind().exit_code())
        }
    }
}
