//! The `apiscope` command: parses arguments, starts logging, calls the library.

use std::process::ExitCode;

mod cli;

fn main() -> ExitCode {
    cli::main()
}
