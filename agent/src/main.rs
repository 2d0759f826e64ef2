//! The `apiscope` command: parses arguments, starts logging, calls the library.

use std::process::ExitCode;

mod cli;
mod commands;

fn main() -> ExitCode {
    cli::main()
}
