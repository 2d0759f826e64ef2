//! Rules on a file's text: what every reader of the code may rely on.

use std::{env, path::Path};

use super::{Finding, code, table::NOT_NAMES};
use crate::place;

/// Lines a file may have; beyond, it has two reasons to change.
const MAX_LINES: usize = 900;
/// How far above an `unsafe` block its SAFETY comment may start.
const NEAR: usize = 6;
/// How far above an `unsafe fn` its `# Safety` section may start: documentation is longer.
const NEAR_FN: usize = 20;

/// Checks a Rust file; `name` is its path from the root of the clone.
#[must_use]
pub fn check_rust(name: &str, text: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    if !text.starts_with("//!") {
        findings.push(Finding::new(name, 1, "starts with no `//!` line that says what the file is for".to_owned()));
    }
    let count = text.lines().count();
    if count > MAX_LINES {
        findings.push(Finding::new(name, count, format!("{count} lines: split it ({MAX_LINES} at most)")));
    }
    let lines: Vec<&str> = text.lines().collect();
    let code = code::code_of(text);
    for (index, line) in code.lines().enumerate() {
        if has_word(line, "unsafe") && !line.contains("#[unsafe(") && !explained(&lines, index, line) {
            findings.push(Finding::new(
                name,
                index + 1,
                "unsafe without a SAFETY line that says why it holds".to_owned(),
            ));
        }
        if let Some(module) = line.trim().trim_start_matches("pub ").strip_prefix("mod ") {
            let module = module.trim_end_matches([';', '{', ' ']);
            if NOT_NAMES.contains(&module) {
                findings.push(Finding::new(
                    name,
                    index + 1,
                    format!("a module called {module} says nothing: name what it does"),
                ));
            }
        }
    }
    if let Some(stem) = Path::new(name).file_stem().and_then(|s| s.to_str())
        && NOT_NAMES.contains(&stem)
    {
        findings.push(Finding::new(name, 1, format!("a file called {stem} says nothing: name what it does")));
    }
    findings
}

/// Checks any text file.
#[must_use]
pub fn check_any(name: &str, text: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (index, line) in text.lines().enumerate() {
        for mark in [concat!("TO", "DO"), concat!("FIX", "ME")] {
            if has_word(line, mark) && !names_issue(line) {
                findings.push(Finding::new(name, index + 1, format!("{mark} without an issue number (#12)")));
            }
        }
        if let Some(path) = machine_path(line) {
            findings.push(Finding::new(name, index + 1, format!("{path}: a path of one machine")));
        }
    }
    findings
}

fn explained(lines: &[&str], index: usize, code: &str) -> bool {
    let above = |n: usize| &lines[index.saturating_sub(n)..=index];
    let declares = code.contains("unsafe fn") && above(NEAR_FN).iter().any(|l| l.contains("# Safety"));
    declares || above(NEAR).iter().any(|l| l.contains("SAFETY")) || code.contains("unsafe_op_in_unsafe_fn")
}

fn has_word(line: &str, word: &str) -> bool {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word).any(|(at, _)| {
        !line[..at].chars().next_back().is_some_and(part) && !line[at + word.len()..].chars().next().is_some_and(part)
    })
}

fn names_issue(line: &str) -> bool {
    line.match_indices('#').any(|(at, _)| line[at + 1..].starts_with(|c: char| c.is_ascii_digit()))
}

/// A home folder, or where this clone happens to be.
fn machine_path(line: &str) -> Option<String> {
    let here = [Some(place::root()), env::var_os("HOME").map(Into::into)];
    let here = here.into_iter().flatten().filter(|p| p.components().count() > 1);
    if let Some(path) = here.map(|p| p.to_string_lossy().into_owned()).find(|p| holds_folder(line, p)) {
        return Some(path);
    }
    [concat!("/ho", "me/"), concat!("/Us", "ers/")].into_iter().find_map(|start| {
        let (_, rest) = line.split_once(start)?;
        // A user and something of theirs, in lower case; `/Users/{id}` is somebody's API.
        let (user, more) = rest.split_once('/')?;
        let plain = |s: &str| !s.is_empty() && s.chars().all(|c| c.is_ascii_lowercase() || c == '_' || c == '-');
        (plain(user) && more.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '.'))
            .then(|| format!("{start}{user}/"))
    })
}

fn holds_folder(line: &str, path: &str) -> bool {
    line.match_indices(path)
        .any(|(at, _)| line[at + path.len()..].starts_with('/') && !line[..at].ends_with(|c: char| c.is_alphanumeric()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rust(text: &str) -> usize {
        check_rust("agent/src/event.rs", text).len()
    }

    #[test]
    fn every_rule_can_fail() {
        assert_eq!(rust("use std::fs;\n"), 1);
        assert_eq!(rust(&format!("//! Long.\n{}", "\n".repeat(MAX_LINES))), 1);
        assert_eq!(rust("//! Doc.\nfn f() { unsafe { g() } }\n"), 1);
        assert_eq!(rust("//! Doc.\n// SAFETY: g has no conditions.\nfn f() { unsafe { g() } }\n"), 0);
        assert_eq!(rust("//! Doc, unsafe in words.\n#[unsafe(no_mangle)]\nfn f() {}\n"), 0);
        assert_eq!(rust("//! Doc.\n/// # Safety\n/// Care.\npub unsafe fn f() {}\n"), 0);
        assert_eq!(rust(&format!("//! Doc.\nmod {}s;\n", "helper")), 1);
        assert_eq!(check_rust("agent/src/common.rs", "//! Doc.\n").len(), 1);
        assert_eq!(check_any("README.md", concat!("TO", "DO: later\n")).len(), 1);
        assert_eq!(check_any("README.md", concat!("TO", "DO(#12): later\n")).len(), 0);
        assert_eq!(check_any("README.md", concat!("cd /ho", "me/ann/src\n")).len(), 1);
        assert_eq!(check_any("README.md", &format!("cd {}/agent\n", place::root().display())).len(), 1);
        assert_eq!(check_any("README.md", concat!("GET /Us", "ers/{id}/orders\n")).len(), 0);
    }
}
