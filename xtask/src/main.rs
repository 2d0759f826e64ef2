//! Developer commands: `cargo xtask <command>`. One file per command; each sets up what it needs first.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod bench;
mod build;
mod cluster;
mod collector;
mod demo;
mod deny;
mod ebpf;
mod helm;
mod image;
mod place;
mod programs;
mod root;
mod run;
mod setup;
mod sources;
mod step;
mod strip;
mod test;
mod tidy;
mod vm;

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
    /// Build the agent and start it as root.
    Run(run::Options),
    /// Unit tests, then end-to-end tests as root.
    Test(test::Options),
    /// Check the conventions of the house: imports, file docs, SAFETY lines and more.
    Tidy,
    /// Check licences, bans and sources of the dependencies.
    Deny,
    /// Check the chart: documentation, schema, lint, templates, manifests.
    Helm(helm::Options),
    /// A one-node Kubernetes on this machine, and the chart's test in it or in any cluster.
    Cluster(cluster::Options),
    /// A container image (OCI layout in a tar archive) with its bill of materials, without a container engine.
    Image(image::Options),
    /// A Debian package.
    Deb(image::Options),
    /// Boot other kernels in an emulator and test the agent there.
    Vm(vm::Options),
    /// A part of `run --demo`, in a process of its own.
    #[command(hide = true)]
    Demo(demo::Options),
    /// Measure what the agent costs.
    Bench(bench::Options),
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Setup(options) => setup::run(&options),
        Command::Build(options) => build::run(&options),
        Command::Run(options) => run::run(&options),
        Command::Test(options) => test::run(&options),
        Command::Tidy => tidy::run(),
        Command::Deny => deny::run(),
        Command::Helm(options) => helm::run(&options),
        Command::Cluster(options) => cluster::run(&options),
        Command::Image(options) => image::image(&options),
        Command::Deb(options) => image::deb(&options),
        Command::Vm(options) => vm::run(&options),
        Command::Demo(options) => demo::run(&options),
        Command::Bench(options) => bench::run(&options),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
