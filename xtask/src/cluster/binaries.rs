//! Kubernetes itself, built from its Go modules: where only a module proxy can be reached there is no other way
//! to have it, and where more can be reached it is the same on every machine.
//!
//! `k8s.io/kubernetes` is no module that others can require as it is: its go.mod replaces two dozen of
//! modules by folders beside it. They are published too, under the version with `v0` for `v1`: a module of our
//! own requires Kubernetes and replaces them by those. Ten minutes on two free cores, once a machine.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::{place, step};

/// Version of Kubernetes; that of its libraries begins with 0.
pub const KUBERNETES: &str = "1.34.4";
/// What is built of it.
pub const PROGRAMS: [&str; 5] = ["kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kubectl"];
/// Longest time for one program.
const LIMIT: Duration = Duration::from_secs(2400);

/// The folder with all of [`PROGRAMS`].
///
/// # Errors
/// There is no cache folder.
pub fn folder() -> Result<PathBuf> {
    Ok(place::cache("tools")?.join(format!("kubernetes-{KUBERNETES}")))
}

/// Whether all of them are built.
///
/// # Errors
/// There is no cache folder.
pub fn are_built() -> Result<bool> {
    let folder = folder()?;
    Ok(PROGRAMS.iter().all(|p| folder.join(p).is_file()))
}

/// Builds those that are missing; each is kept as soon as it is whole, so that an interrupted build goes on where it was.
///
/// # Errors
/// Go is not here, or the modules cannot be had.
pub fn build() -> Result<()> {
    if place::program("go").is_none() {
        bail!("Kubernetes is built with Go 1.24 or later, which is not installed");
    }
    let (folder, source) = (folder()?, place::cache("tools")?.join(format!("kubernetes-{KUBERNETES}.source")));
    fs::create_dir_all(&folder)?;
    fs::create_dir_all(&source)?;
    module(&source)?;
    for program in PROGRAMS {
        let whole = folder.join(program);
        if whole.is_file() {
            continue;
        }
        let partial = folder.join(format!("{program}.partial"));
        let version = "k8s.io/component-base/version";
        let (major, minor) = KUBERNETES.split_once('.').context("a version without a dot")?;
        let minor = minor.split('.').next().unwrap_or_default();
        let mut go = Command::new("go");
        go.args(["build", "-mod=mod", "-trimpath", "-o"]).arg(&partial);
        go.arg(format!(
            "-ldflags=-s -w -X {version}.gitVersion=v{KUBERNETES} -X {version}.gitMajor={major} -X {version}.gitMinor={minor}"
        ));
        go.arg(format!("k8s.io/kubernetes/cmd/{program}"));
        go.current_dir(&source).env("GOFLAGS", "");
        step::quietly(&format!("building {program} {KUBERNETES} (once)"), &mut go, LIMIT)?;
        fs::rename(&partial, &whole).with_context(|| format!("failed to move {program} to {}", whole.display()))?;
    }
    fs::remove_dir_all(&source).ok();
    Ok(())
}

/// The module of our own.
fn module(source: &Path) -> Result<()> {
    let mut download = Command::new("go");
    download.args(["mod", "download", "-json", &format!("k8s.io/kubernetes@v{KUBERNETES}")]);
    download.current_dir(source).env("GOFLAGS", "");
    fs::remove_file(source.join("go.mod")).ok();
    let answer: Value = serde_json::from_str(&step::output(&mut download)?).context("go mod download says no JSON")?;
    let path = answer["GoMod"].as_str().context("go mod download names no go.mod")?;
    let theirs = fs::read_to_string(path).with_context(|| format!("failed to read {path}"))?;
    fs::write(source.join("go.mod"), go_mod(&theirs)?)?;
    Ok(())
}

/// Ours, of theirs.
fn go_mod(theirs: &str) -> Result<String> {
    let libraries =
        KUBERNETES.split_once('.').map(|(_, rest)| format!("v0.{rest}")).context("a version without a dot")?;
    let go = theirs.lines().find(|l| l.starts_with("go ")).context("Kubernetes' go.mod names no version of Go")?;
    let replaced: String = theirs
        .lines()
        .filter_map(|l| l.split_once("=> ./staging/"))
        .map(|(name, _)| name.trim().trim_start_matches("replace "))
        .map(|name| format!("replace {name} => {name} {libraries}\n"))
        .collect();
    if replaced.is_empty() {
        bail!("Kubernetes' go.mod replaces nothing by ./staging: its layout is another than that of {KUBERNETES}");
    }
    // Minimal version selection: what Kubernetes itself requires comes with it.
    Ok(format!("module cluster\n\n{go}\n\nrequire k8s.io/kubernetes v{KUBERNETES}\n\n{replaced}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn staging_modules_are_replaced() {
        let ours =
            go_mod("module k8s.io/kubernetes\ngo 1.24.0\nreplace (\n\tk8s.io/api => ./staging/src/k8s.io/api\n)\n");
        assert!(ours.expect("a module").contains("\nreplace k8s.io/api => k8s.io/api v0.34.4\n"));
        assert!(go_mod("module x\ngo 1.24.0\n").is_err());
    }
}
