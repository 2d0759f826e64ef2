//! `empty_probes FILE…`: probes files where the agent would, with programs that do nothing, until its input ends. What the
//! kernel takes for that many probes is the least that any agent that probes these places costs; `cargo xtask bench`
//! measures the agent's TLS against it.

use std::{io::Read as _, path::PathBuf};

use apiscope::probe::tls;

fn main() -> anyhow::Result<()> {
    let files: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let _probes = tls::attach_empty(&files)?;
    println!("ready");
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}
