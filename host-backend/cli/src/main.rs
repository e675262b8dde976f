//! The command line of Transhume: speaks to this host's `transhumed`.

use clap::Parser;
use std::process::ExitCode;
use transhume_cli::Cli;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    Cli::parse().run().await
}
