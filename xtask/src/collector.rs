//! The OpenTelemetry Collector that the end-to-end tests export to: built once, kept in the cache.
//!
//! Core modules alone: a receiver of OTLP, and exporters that hand on what was really decoded.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result};

use crate::{place, step};

/// Version of the collector, its builder and every module.
const VERSION: &str = "0.165.0";
/// Longest time for either build.
const LIMIT: Duration = Duration::from_secs(1200);
const MODULES: [(&str, &[&str]); 3] = [
    ("receivers", &["receiver/otlpreceiver"]),
    ("processors", &["processor/batchprocessor"]),
    ("exporters", &["exporter/debugexporter", "exporter/otlphttpexporter"]),
];

/// The built collector.
///
/// # Errors
/// There is no cache folder.
pub fn binary() -> Result<PathBuf> {
    Ok(place::cache("tools")?.join(format!("otelcol-{VERSION}/otelcol")))
}

/// Builds it with the `go` of this machine.
///
/// # Errors
/// Its modules cannot be had, or Go is too old for them.
pub fn build() -> Result<()> {
    let tools = place::cache("tools")?;
    let (partial, whole) = (tools.join(format!("otelcol-{VERSION}.partial")), tools.join(format!("otelcol-{VERSION}")));
    fs::remove_dir_all(&partial).ok();
    fs::create_dir_all(&partial)?;
    let mut builder = Command::new("go");
    builder.args(["install", &format!("go.opentelemetry.io/collector/cmd/builder@v{VERSION}")]).env("GOBIN", &partial);
    step::quietly(&format!("building the collector's builder {VERSION} (once)"), &mut builder, LIMIT)?;
    let config = partial.join("builder.yaml");
    fs::write(&config, recipe(&partial)).with_context(|| format!("failed to write {}", config.display()))?;
    let mut collector = Command::new(partial.join("builder"));
    collector.arg("--config").arg(&config).current_dir(&partial);
    step::quietly(&format!("building the OpenTelemetry Collector {VERSION} (once)"), &mut collector, LIMIT)?;
    fs::remove_dir_all(&whole).ok();
    fs::create_dir_all(&whole)?;
    fs::rename(partial.join("out/otelcol"), whole.join("otelcol")).context("the builder left no otelcol")?;
    fs::remove_dir_all(&partial).ok();
    Ok(())
}

fn recipe(folder: &Path) -> String {
    let mut text =
        format!("dist:\n  name: otelcol\n  module: example.com/otelcol\n  output_path: {}/out\n", folder.display());
    for (kind, modules) in MODULES {
        text.push_str(&format!("{kind}:\n"));
        for module in modules {
            text.push_str(&format!("  - gomod: go.opentelemetry.io/collector/{module} v{VERSION}\n"));
        }
    }
    text
}
