//! Being root for one command: directly, by sudo, or a clear line that it cannot be.

use std::{env, ffi::OsStr, process::Command};

use anyhow::{Result, bail};

use crate::place;

/// Whether this process is root.
#[must_use]
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// `program` as root, `why` being what for. Variables of the agent and of OpenTelemetry go through sudo.
///
/// # Errors
/// Not root, and there is no sudo.
pub fn command(program: impl AsRef<OsStr>, why: &str) -> Result<Command> {
    if is_root() {
        return Ok(Command::new(program));
    }
    let Some(sudo) = place::program("sudo") else {
        bail!("{why} needs root: run this as root, or install sudo");
    };
    let mut command = Command::new(sudo);
    let keep: Vec<String> = env::vars_os()
        .filter_map(|(name, _)| name.into_string().ok())
        .filter(|name| ["OTEL_", "APISCOPE_", "RUST_", "DEBIAN_FRONTEND", "XDG_"].iter().any(|p| name.starts_with(p)))
        .collect();
    if !keep.is_empty() {
        command.arg(format!("--preserve-env={}", keep.join(",")));
    }
    command.arg("--").arg(program);
    Ok(command)
}
