//! kubectl and helm against one cluster.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use super::{binaries, node};
use crate::{helm, step};

/// Both, with the cluster they speak to.
#[derive(Debug, Clone)]
pub struct Kubectl {
    program: PathBuf,
    kubeconfig: PathBuf,
}

impl Kubectl {
    /// Of the cluster of this configuration.
    ///
    /// # Errors
    /// There is no cache folder.
    pub fn of(kubeconfig: &Path) -> Result<Self> {
        Ok(Self { program: binaries::folder()?.join("kubectl"), kubeconfig: kubeconfig.to_owned() })
    }

    /// Of this machine's own node.
    ///
    /// # Errors
    /// There is no cache folder.
    pub fn of_node() -> Result<Self> {
        Self::of(&node::kubeconfig())
    }

    /// Its output.
    ///
    /// # Errors
    /// It fails.
    pub fn run(&self, arguments: &[&str]) -> Result<String> {
        step::output(self.command().args(arguments))
    }

    /// Its output as JSON.
    ///
    /// # Errors
    /// It fails.
    pub fn json(&self, arguments: &[&str]) -> Result<Value> {
        let text = self.run(&[arguments, &["--output=json"]].concat())?;
        serde_json::from_str(&text).context("kubectl says no JSON")
    }

    /// Makes, or changes, these objects.
    ///
    /// # Errors
    /// They are refused.
    pub fn apply(&self, objects: &[Value]) -> Result<()> {
        let list = serde_json::json!({"apiVersion": "v1", "kind": "List", "items": objects});
        let mut command = self.command();
        command.args(["apply", "--filename=-"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().context("failed to start kubectl")?;
        child.stdin.take().context("no standard input")?.write_all(list.to_string().as_bytes())?;
        let out = child.wait_with_output()?;
        if !out.status.success() {
            bail!("kubectl apply: {}", String::from_utf8_lossy(&out.stderr));
        }
        Ok(())
    }

    /// helm's output.
    ///
    /// # Errors
    /// It fails.
    pub fn helm(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(helm::helm()?);
        command.env("KUBECONFIG", &self.kubeconfig).args(arguments);
        step::output(&mut command)
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.arg(format!("--kubeconfig={}", self.kubeconfig.display()));
        command
    }
}

/// Waits for something that comes by itself.
///
/// # Errors
/// It does not come in time; the message ends with the last reason.
pub fn wait<T>(what: &str, limit: Duration, mut ready: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let end = Instant::now() + limit;
    let mut last = String::new();
    loop {
        match ready() {
            Ok(Some(value)) => return Ok(value),
            Ok(None) => {}
            Err(error) => last = format!(": {error:#}"),
        }
        if Instant::now() > end {
            bail!("{what}: not within {} s{last}", limit.as_secs());
        }
        thread::sleep(Duration::from_millis(250));
    }
}
