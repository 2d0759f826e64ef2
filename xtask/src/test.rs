//! `cargo xtask test`: unit tests, then the end-to-end tests as root.

use std::{
    env,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context as _, Result, bail};
use clap::Args;

use crate::{
    build, collector, place, programs, root,
    setup::{self, Level},
    step,
};

/// The package of the end-to-end tests.
const END_TO_END: &str = "apiscope-tests";

/// Which tests.
#[derive(Debug, Args)]
pub struct Options {
    /// Unit tests only: no root, no other program, nothing of the kernel.
    #[arg(long)]
    quick: bool,
    /// Also the tests that take minutes or thousands of descriptors; without this they are listed as ignored.
    #[arg(long, conflicts_with = "quick")]
    long: bool,
    /// Only tests whose name contains this.
    filter: Option<String>,
}

/// Runs the command.
///
/// # Errors
/// A test fails, or the tests cannot be built or started.
pub fn run(options: &Options) -> Result<()> {
    setup::need(match (options.quick, options.long) {
        (true, _) => Level::Run,
        (false, true) => Level::Long,
        (false, false) => Level::Test,
    })?;
    if !options.quick {
        // Now, not after minutes of unit tests.
        root::command("true", "the end-to-end tests")?;
    }
    let started = Instant::now();
    let mut sum = Sum::default();
    let filter: Vec<&str> = options.filter.as_deref().into_iter().collect();

    let mut unit = setup::cargo();
    unit.args(["test", "--locked", "--workspace", "--exclude", END_TO_END, "--no-fail-fast", "--"]).args(&filter);
    sum.run(&mut unit)?;
    if !options.quick {
        build::agent()?;
        for (name, binary) in end_to_end()? {
            eprintln!("     Running {name} (as root)");
            let mut command = root::command("env", "the end-to-end tests")?;
            command.arg(format!("APISCOPE={}", place::agent().display()));
            command.arg(format!("APISCOPE_OTELCOL={}", collector::binary()?.display()));
            command.arg(format!("APISCOPE_GRPC_GO={}", setup::grpc_go()?.display()));
            command.arg(format!("APISCOPE_ENVOY={}", programs::envoy()?.display()));
            command.arg(format!("APISCOPE_GRPC_JAVA={}", programs::grpc_java()?.display()));
            command.arg(format!("APISCOPE_VALIDATORS={}", setup::validators()?.display()));
            for name in ["PATH", "CARGO_MANIFEST_DIR"] {
                let value = if name == "PATH" {
                    env::var_os(name).unwrap_or_default()
                } else {
                    place::root().join("tests").into_os_string()
                };
                command.arg(format!("{name}={}", value.to_string_lossy()));
            }
            command.arg(&binary).args(&filter);
            if options.long {
                command.arg("--include-ignored");
            }
            command.current_dir(place::root().join("tests"));
            sum.run(&mut command)?;
        }
    }
    println!(
        "{}: {} passed, {} failed, {} ignored{} in {} s",
        if options.quick { "unit tests" } else { "all tests" },
        sum.passed,
        sum.failed,
        sum.ignored,
        if sum.ignored > 0 && !options.long { " (`cargo xtask test --long` runs them)" } else { "" },
        started.elapsed().as_secs()
    );
    if sum.broken {
        bail!("tests failed");
    }
    if sum.passed == 0 {
        bail!(
            "no test ran{}",
            options.filter.as_ref().map_or_else(String::new, |f| format!(": nothing is called {f}"))
        );
    }
    Ok(())
}

/// Builds the end-to-end tests as this user and returns their binaries: cargo itself never runs as root
/// under sudo, or root's files would be in the target folder.
fn end_to_end() -> Result<Vec<(String, PathBuf)>> {
    let mut build = setup::cargo();
    build.args(["test", "--locked", "--package", END_TO_END, "--no-run", "--message-format=json-render-diagnostics"]);
    let text = step::output(build.stderr(Stdio::inherit()))?;
    let mut found = Vec::new();
    for line in text.lines() {
        let message: serde_json::Value = serde_json::from_str(line).context("cargo's messages are not JSON")?;
        let test = message.pointer("/profile/test").and_then(serde_json::Value::as_bool) == Some(true);
        if let (true, Some(path)) = (test, message.get("executable").and_then(serde_json::Value::as_str)) {
            let name = message.pointer("/target/name").and_then(serde_json::Value::as_str).unwrap_or("tests");
            found.push((name.to_owned(), Path::new(path).to_owned()));
        }
    }
    Ok(found)
}

#[derive(Debug, Default)]
struct Sum {
    passed: u64,
    failed: u64,
    ignored: u64,
    broken: bool,
}

impl Sum {
    /// Runs a test program, passing its output on and adding up its result lines.
    fn run(&mut self, command: &mut Command) -> Result<()> {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("failed to start {}", step::shown(command)))?;
        if let Some(out) = child.stdout.take() {
            for line in BufReader::new(out).split(b'\n') {
                let line = line?;
                let line = String::from_utf8_lossy(&line);
                println!("{line}");
                self.add(&line);
            }
        }
        self.broken |= !child.wait()?.success();
        Ok(())
    }

    /// `test result: ok. 12 passed; 0 failed; 1 ignored; …`
    fn add(&mut self, line: &str) {
        let Some(rest) = line.strip_prefix("test result: ") else { return };
        let count = |what: &str| {
            rest.split([';', '.'])
                .find_map(|part| part.trim().strip_suffix(what)?.trim().parse::<u64>().ok())
                .unwrap_or(0)
        };
        self.passed += count("passed");
        self.failed += count("failed");
        self.ignored += count("ignored");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn result_lines_are_added_up() {
        let mut sum = Sum::default();
        sum.add("test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 3 filtered out; finished in 0.01s");
        sum.add("test result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out");
        sum.add("a test result: of another program");
        assert_eq!((sum.passed, sum.failed, sum.ignored), (14, 1, 1));
    }
}
