//! `cargo xtask deny`: licences, bans and sources of everything that is linked.

use std::process::{Command, Stdio};

use anyhow::{Result, bail};

use crate::{
    place,
    setup::{self, Level},
    step,
};

/// Where advisories come from; they are checked only if it can be reached.
const ADVISORIES: &str = "https://github.com/rustsec/advisory-db";

/// Runs the command.
///
/// # Errors
/// Something is denied, or cargo-deny cannot be had.
pub fn run() -> Result<()> {
    setup::need(Level::Deny)?;
    let mut checks = vec!["bans", "licenses", "sources"];
    if reachable() {
        checks.push("advisories");
    } else {
        println!("deny: advisories were not checked: {ADVISORIES} cannot be reached");
    }
    let mut denied = false;
    for manifest in ["Cargo.toml", "agent-ebpf/Cargo.toml"] {
        println!("deny: {manifest}: {}", checks.join(", "));
        let mut command = Command::new(setup::cargo_deny()?);
        // Where deny.toml is.
        command.current_dir(place::root());
        command.args(["--locked", "--log-level", "error", "--manifest-path", manifest, "check"]);
        denied |= !step::status(command.args(&checks))?.success();
    }
    if denied {
        bail!("deny: see above");
    }
    Ok(())
}

fn reachable() -> bool {
    let mut probe = Command::new("git");
    probe.args([
        "-c",
        "http.lowSpeedLimit=1000",
        "-c",
        "http.lowSpeedTime=10",
        "ls-remote",
        "--quiet",
        ADVISORIES,
        "HEAD",
    ]);
    probe.env("GIT_TERMINAL_PROMPT", "0").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    probe.status().is_ok_and(|status| status.success())
}
