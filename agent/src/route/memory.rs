//! What was learned, over a restart: a versioned JSON file, replaced as a whole.
//!
//! Only what is decided is written: names of a service that were seen at least [`SURE`] times, and where
//! its parameters are. A value of a parameter, or a word that may turn out to be one, never is.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use super::{
    decide::Table,
    evidence::{Evidence, MAX_CHILDREN, MAX_NODES, MAX_SEGMENTS},
};

/// Version of the file; another one is a fresh start.
const VERSION: u32 = 1;
/// How often a word was seen before its name is written.
const SURE: u32 = 8;
/// Largest file that is read, bytes.
const MAX_FILE: u64 = 64 << 20;

/// The file.
#[derive(Debug, Serialize, Deserialize)]
struct File {
    version: u32,
    services: BTreeMap<String, Known>,
}

/// A decided segment, and what is below it.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Known {
    /// How often it was seen.
    pub count: u32,
    /// Names.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub names: BTreeMap<String, Known>,
    /// The parameter, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parameter: Option<Box<Known>>,
    /// Bit set of the shapes that a parameter had.
    #[serde(default)]
    pub shapes: u16,
}

/// What is known by a table, without what is not sure.
#[must_use]
pub fn of(table: &Table) -> Known {
    below(table, 0, 0)
}

fn below(table: &Table, at: u32, depth: usize) -> Known {
    let Some(here) = table.nodes.get(at as usize).filter(|_| depth <= MAX_SEGMENTS) else { return Known::default() };
    let sure = |child: u32| table.nodes.get(child as usize).is_some_and(|n| n.count >= SURE);
    Known {
        count: here.count,
        names: here
            .names
            .iter()
            .filter(|(_, child)| sure(**child))
            .map(|(name, &child)| (name.to_string(), below(table, child, depth + 1)))
            .collect(),
        parameter: here.parameter.map(|(_, child)| Box::new(below(table, child, depth + 1))),
        shapes: here.shapes,
    }
}

/// Puts what is known into fresh evidence. Bounds of evidence hold.
pub fn into(known: &Known, evidence: &mut Evidence) {
    put(known, evidence, 0, 0);
}

fn put(known: &Known, evidence: &mut Evidence, at: u32, depth: usize) {
    if depth > MAX_SEGMENTS || evidence.nodes.len() >= MAX_NODES {
        return;
    }
    evidence.set(at, known.count, known.shapes);
    for (name, child) in known.names.iter().take(MAX_CHILDREN) {
        let node = evidence.child(at, Some(name));
        put(child, evidence, node, depth + 1);
    }
    if let Some(child) = &known.parameter {
        let node = evidence.child(at, None);
        put(child, evidence, node, depth + 1);
    }
}

/// Writes the file beside its place, then moves it there.
///
/// # Errors
/// The folder cannot be written to.
pub fn save(path: &Path, services: BTreeMap<String, Known>) -> anyhow::Result<()> {
    let context = || format!("failed to keep learned routes in {}", path.display());
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let beside = PathBuf::from(beside);
    let text = serde_json::to_vec(&File { version: VERSION, services }).with_context(context)?;
    fs::write(&beside, text).and_then(|()| fs::rename(&beside, path)).with_context(context)
}

/// Reads the file. A file that is not there is an empty start; one that cannot be understood is kept under
/// another name, and said.
///
/// # Errors
/// It is there and cannot be opened or read.
pub fn load(path: &Path) -> anyhow::Result<BTreeMap<String, Known>> {
    match fs::metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        Ok(data) if data.len() > MAX_FILE => return Ok(set_aside(path, "it is larger than 64 MiB")),
        _ => {}
    }
    let bytes = fs::read(path).with_context(|| format!("failed to read learned routes from {}", path.display()))?;
    match serde_json::from_slice::<File>(&bytes) {
        Ok(file) if file.version == VERSION => Ok(file.services),
        Ok(file) => Ok(set_aside(path, &format!("it has version {}, this agent writes {VERSION}", file.version))),
        Err(e) => Ok(set_aside(path, &e.to_string())),
    }
}

fn set_aside(path: &Path, why: &str) -> BTreeMap<String, Known> {
    let mut aside = path.as_os_str().to_owned();
    aside.push(".damaged");
    let aside = PathBuf::from(aside);
    let kept = match fs::rename(path, &aside) {
        Ok(()) => format!("kept as {}", aside.display()),
        Err(e) => format!("it could not be moved aside: {e}"),
    };
    log::warn!("learned routes in {} cannot be used ({why}); {kept}; learning starts anew", path.display());
    BTreeMap::new()
}
