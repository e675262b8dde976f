//! `cargo testbed …`

use clap::{Parser, Subcommand};
use std::process::ExitCode;
use testbed::layout::Layout;
use testbed::packages::{Packages, tools};
use testbed::{Result, cleanup};

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
    cleanup::watch_signals()?;
    let layout = Layout::find()?;
    tools::ensure()?;
    let packages = Packages::new(&layout);
    match &arguments.command {
        Task::Packages => packages.all()?,
    }
    Ok(ExitCode::SUCCESS)
}
