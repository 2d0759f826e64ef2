//! Images of the test: one file system in one layer, in the archive that `ctr`, `docker load` and kind take.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result};
use serde_json::json;

use crate::{
    collector,
    image::archive::{self, Entry},
    place,
    sources::sha256,
    step,
};

/// Name of the image with the callers, the servers, the collector and its sink; the sandbox of pods too.
pub const PROGRAMS: &str = "localhost/apiscope-cluster-test:1";

/// Builds the test's image; returns its archive.
///
/// # Errors
/// Go fails, or the collector is not built.
pub fn programs() -> Result<PathBuf> {
    let folder = place::target().join("cluster-images");
    fs::create_dir_all(&folder)?;
    let program = folder.join("app");
    let mut go = Command::new("go");
    go.args(["build", "-trimpath", "-ldflags=-s", "-o"]).arg(&program);
    go.arg(place::root().join("tests/programs/cluster.go"));
    go.envs([("CGO_ENABLED", "0"), ("GO111MODULE", "off"), ("GOFLAGS", "")]);
    step::quietly("building the test's program", &mut go, Duration::from_secs(600))?;
    let read = |path: &Path| fs::read(path).with_context(|| format!("failed to read {}", path.display()));
    let files =
        [Entry::file("app", 0o755, read(&program)?), Entry::file("otelcol", 0o755, read(&collector::binary()?)?)];
    let archive = folder.join("programs.tar");
    fs::write(&archive, docker(PROGRAMS, &["/app"], &files)?)?;
    Ok(archive)
}

/// An archive as `docker save` writes it.
fn docker(name: &str, entrypoint: &[&str], files: &[Entry]) -> Result<Vec<u8>> {
    let layer = archive::tar(files, "", 0)?;
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": {"Entrypoint": entrypoint, "Cmd": ["pause"]},
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{}", sha256(&layer))]},
    });
    let config = config.to_string();
    let file = format!("{}.json", sha256(config.as_bytes()));
    let manifest = json!([{"Config": file, "RepoTags": [name], "Layers": ["layer.tar"]}]).to_string();
    let entries = [
        Entry::file("layer.tar", 0o644, layer),
        Entry::file(&file, 0o644, config),
        Entry::file("manifest.json", 0o644, manifest),
    ];
    archive::tar(&entries, "", 0)
}
