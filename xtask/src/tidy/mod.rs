//! `cargo xtask tidy`: the conventions of the house as tests.
//!
//! It reads text, it does not compile: `use` lines and paths against [`table`], and a few rules on every
//! file. One line per finding, `file:line: what`.

mod code;
mod imports;
mod table;
mod text;

use std::{fmt, fs, io, path::Path};

use anyhow::{Context as _, Result, bail};

use crate::place;

/// One thing to put right.
#[derive(Debug)]
pub struct Finding {
    file: String,
    line: usize,
    text: String,
}

impl Finding {
    fn new(file: &str, line: usize, text: String) -> Self {
        Self { file: file.to_owned(), line, text }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.file, self.line, self.text)
    }
}

/// Kinds of files that are read.
const TEXT: [&str; 9] = ["rs", "md", "toml", "sh", "yml", "yaml", "py", "tpl", "json"];
/// Folders that are not ours.
const SKIP: [&str; 4] = ["target", ".git", "node_modules", ".cache"];

/// Runs the command.
///
/// # Errors
/// There are findings, or a file cannot be read.
pub fn run() -> Result<()> {
    let root = place::root();
    let mut files = Vec::new();
    walk(&root, Path::new(""), &mut files).context("failed to read the clone")?;
    files.sort();
    let mut findings = Vec::new();
    for name in &files {
        let Ok(text) = fs::read_to_string(root.join(name)) else { continue };
        findings.extend(text::check_any(name, &text));
        if name.ends_with(".rs") {
            findings.extend(text::check_rust(name, &text));
            findings.extend(imports::check(name, &text));
        }
    }
    for finding in &findings {
        println!("{finding}");
    }
    if !findings.is_empty() {
        bail!("tidy: {} things to put right", findings.len());
    }
    println!("tidy: {} files keep the rules", files.len());
    Ok(())
}

fn walk(root: &Path, folder: &Path, files: &mut Vec<String>) -> io::Result<()> {
    for entry in fs::read_dir(root.join(folder))? {
        let entry = entry?;
        let name = folder.join(entry.file_name());
        let last = entry.file_name();
        let kind = entry.file_type()?;
        if kind.is_dir() && !SKIP.iter().any(|skip| last == *skip) {
            walk(root, &name, files)?;
        } else if kind.is_file() && name.extension().and_then(|e| e.to_str()).is_some_and(|e| TEXT.contains(&e)) {
            files.push(name.to_string_lossy().into_owned());
        }
    }
    Ok(())
}
