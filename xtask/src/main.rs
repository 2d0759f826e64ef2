//! Developer commands: `cargo xtask <command>`. One file per command; each sets up what it needs first.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod build;
mod ebpf;
mod place;
mod root;
mod setup;
mod sources;
mod step;
mod strip;

/// Developer commands of apiscope.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Find or install what the other commands need.
    Setup(setup::Options),
    /// Build the agent, or the eBPF object kept in the tree.
    Build(build::Options),
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Setup(options) => setup::run(&options),
        Command::Build(options) => build::run(&options),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
