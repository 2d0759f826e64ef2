//! Whether a file imports only what the architecture lets it.

use super::{
    Finding,
    code::{self, Path},
    table::{ANY, BASE, COMMAND_LINE, FENCED, MODULES, PIPELINE, WITHOUT_TOKIO},
};

/// Where the agent's modules are.
const AGENT: &str = "agent/src/";

/// Checks one file; `name` is its path from the root of the clone.
#[must_use]
pub fn check(name: &str, text: &str) -> Vec<Finding> {
    let code = code::code_of(text);
    let mut findings = Vec::new();
    for path in code::paths_of(before_tests(&code)) {
        fences(name, &path, &mut findings);
        if let Some(module) = module_of(name) {
            arrows(name, &module, &path, &mut findings);
        }
    }
    if let Some(module) = module_of(name) {
        let top = module.first().map_or("", String::as_str);
        if !top.is_empty() && !COMMAND_LINE.contains(&top) && !MODULES.iter().any(|m| m.name == top) {
            let text = format!("module {top} has no line in the import table (xtask/src/tidy/table.rs)");
            findings.push(Finding::new(name, 1, text));
        }
    }
    findings
}

/// Tests may use anything.
fn before_tests(code: &str) -> &str {
    code.find("#[cfg(test)]\nmod ").map_or(code, |at| &code[..at])
}

/// The module path of a file of the agent; empty for `lib.rs`.
fn module_of(name: &str) -> Option<Vec<String>> {
    let inner = name.strip_prefix(AGENT)?.strip_suffix(".rs")?;
    let inner = inner.strip_suffix("/mod").unwrap_or(inner);
    Some(if inner == "lib" { Vec::new() } else { inner.split('/').map(str::to_owned).collect() })
}

fn fences(name: &str, path: &Path, findings: &mut Vec<Finding>) {
    if !name.starts_with("agent") {
        return;
    }
    let first = path.segments[0].as_str();
    for fence in &FENCED {
        let named = fence.krate.strip_suffix('*').map_or(first == fence.krate, |start| first.starts_with(start));
        if named && !fence.only.iter().any(|home| name.starts_with(home)) {
            findings.push(Finding::new(name, path.line, format!("{first} is not for this file: {}", fence.why)));
        }
    }
}

fn arrows(name: &str, module: &[String], path: &Path, findings: &mut Vec<Finding>) {
    let Some(top) = module.first().map(String::as_str) else { return };
    let mut say = |text: String| findings.push(Finding::new(name, path.line, text));
    if path.segments[0] == "tokio" && WITHOUT_TOKIO.contains(&top) {
        say(format!("tokio in {top}: it is plain functions over values, and time is an argument"));
    }
    let Some(target) = target(module, path) else { return };
    if target == top || COMMAND_LINE.contains(&top) || !MODULES.iter().any(|m| m.name == target) {
        return;
    }
    let Some(own) = MODULES.iter().find(|m| m.name == top) else { return };
    if target == PIPELINE {
        say("nothing imports pipeline".to_owned());
    } else if !BASE.contains(&target) && !own.may.contains(&target) && !own.may.contains(&ANY) {
        say(format!("{top} may not import {target}: imports point down the flow (xtask/src/tidy/table.rs)"));
    }
}

/// The agent's top-level module that a path leads into.
fn target<'a>(module: &[String], path: &'a Path) -> Option<&'a str> {
    let mut at = 0;
    let mut left = module.len();
    match path.segments[0].as_str() {
        "crate" | "apiscope" => {
            at = 1;
            left = 0;
        }
        "super" => {
            while path.segments.get(at).is_some_and(|s| s == "super") {
                at += 1;
                left = left.saturating_sub(1);
            }
        }
        _ => return None,
    }
    if left > 0 { None } else { path.segments.get(at).map(String::as_str) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bad(name: &str, text: &str) -> Vec<String> {
        check(name, text).into_iter().map(|f| f.to_string()).collect()
    }

    #[test]
    fn arrows_up_the_flow_are_found() {
        let found = bad("agent/src/route.rs", "use crate::{\n    exchange::Exchange,\n    conn::Connections,\n};\n");
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].starts_with("agent/src/route.rs:3: route may not import conn"), "{found:?}");
        assert_eq!(bad("agent/src/detect/volume.rs", "fn f() { super::super::proto::http1::parse() }").len(), 1);
        assert_eq!(bad("agent/src/detect/mod.rs", "use super::event;").len(), 1);
        assert_eq!(bad("agent/src/detect/mod.rs", "use super::aggregate;"), [""; 0]);
        assert_eq!(bad("agent/src/detect/volume.rs", "use super::Finding;"), [""; 0]);
    }

    #[test]
    fn nothing_imports_pipeline_but_the_command_line() {
        assert_eq!(bad("agent/src/export/mod.rs", "use crate::pipeline::Pipeline;").len(), 1);
        assert_eq!(bad("agent/src/main.rs", "use apiscope::pipeline::Pipeline;"), [""; 0]);
    }

    #[test]
    fn crates_stay_in_their_homes() {
        assert_eq!(bad("agent/src/conn.rs", "use aya::Ebpf;").len(), 1);
        assert_eq!(bad("agent/src/conn.rs", "fn f() -> opentelemetry_sdk::Resource {}").len(), 1);
        assert_eq!(bad("agent/src/conn.rs", "// aya::Ebpf is not known here\n"), [""; 0]);
        assert_eq!(bad("agent/src/conn.rs", "async fn f() { tokio::time::sleep(d).await }").len(), 1);
        assert_eq!(bad("agent/src/probe/load.rs", "use aya::Ebpf;"), [""; 0]);
        assert_eq!(bad("agent/src/export/otlp.rs", "use opentelemetry::metrics::Meter; use tokio::time;"), [""; 0]);
    }

    #[test]
    fn a_new_module_must_be_listed() {
        assert_eq!(bad("agent/src/surprise.rs", "//! A surprise.\n").len(), 1);
    }

    #[test]
    fn the_table_names_modules_that_it_lists() {
        for module in &MODULES {
            for other in module.may.iter().filter(|name| **name != ANY) {
                assert!(
                    MODULES.iter().any(|m| m.name == *other),
                    "{} may import {other}, which is not listed",
                    module.name
                );
            }
        }
    }
}
