//! The criterion benchmarks of the agent without a kernel, run and read back: `pipeline` from records to patterns,
//! `detect` through routes, patterns and every detector.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use crate::{place, setup, step};

/// Runs `cargo bench` of both and returns one entry per benchmark.
///
/// # Errors
/// It fails, or what criterion wrote cannot be read.
pub fn run(quick: bool) -> Result<Value> {
    let folder = place::target().join("criterion");
    // Results of benchmarks that no longer exist must not be reported.
    fs::remove_dir_all(&folder).ok();
    let mut bench = setup::cargo();
    bench.args(["bench", "--locked", "--package", "apiscope", "--bench", "pipeline", "--bench", "detect"]);
    bench.args(["--", "--noplot"]);
    step::plainly(if quick { bench.arg("--quick") } else { &mut bench })?;
    let mut found = Vec::new();
    for estimates in estimates_in(&folder) {
        found.push(entry(&estimates)?);
    }
    found.sort_by_key(|entry| entry.get("name").map(ToString::to_string));
    Ok(found.into())
}

/// Every `…/new/estimates.json` below `folder`.
fn estimates_in(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.ends_with("new/estimates.json") {
                found.push(path);
            }
        }
    }
    found
}

fn entry(estimates: &Path) -> Result<Value> {
    let read = |path: &Path| -> Result<Value> {
        let text = fs::read_to_string(path).with_context(|| format!("failed to read {}", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{} is not JSON", path.display()))
    };
    let times = read(estimates)?;
    let about = read(&estimates.with_file_name("benchmark.json"))?;
    let ns = ["/slope/point_estimate", "/mean/point_estimate"].iter().find_map(|p| times.pointer(p)?.as_f64());
    let ns = ns.with_context(|| format!("{} has no estimate", estimates.display()))?;
    // A benchmark that says how many exchanges an iteration handles.
    let elements = about.pointer("/throughput/Elements").and_then(Value::as_f64).unwrap_or(1.0);
    Ok(json!({
        "name": about.get("full_id"),
        "ns_per_exchange": ns / elements,
        "exchanges_per_second": elements * 1e9 / ns,
    }))
}
