//! What the binary is made of, as a CycloneDX 1.6 document: every crate that is linked into it, with its
//! licence, its checksum from Cargo.lock and what it needs.

use std::{collections::BTreeMap, fs};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use crate::{place, setup, step};

/// The document for a target. `binary` is the SHA-256 of the program that it is about; `others` are parts
/// that are no crates: name, version, licence.
///
/// # Errors
/// Cargo does not tell.
pub fn document(target: &str, binary: &str, others: &[(&str, String, &str)]) -> Result<Value> {
    let mut command = setup::cargo();
    command.args(["metadata", "--format-version", "1", "--locked", "--filter-platform", target]);
    let metadata: Value = serde_json::from_str(&step::output(&mut command)?).context("cargo's metadata is no JSON")?;
    let lock = fs::read_to_string(place::root().join("Cargo.lock")).context("failed to read Cargo.lock")?;
    let checksums = checksums(&lock);
    let packages: BTreeMap<&str, &Value> = metadata["packages"]
        .as_array()
        .context("no packages")?
        .iter()
        .filter_map(|p| Some((p["id"].as_str()?, p)))
        .collect();
    let nodes: BTreeMap<&str, &Value> = metadata["resolve"]["nodes"]
        .as_array()
        .context("no graph")?
        .iter()
        .filter_map(|n| Some((n["id"].as_str()?, n)))
        .collect();
    let root = *packages.iter().find(|(_, p)| p["name"] == "apiscope").context("the agent is not in the workspace")?.0;
    let mut wanted = vec![root];
    let mut linked: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    while let Some(id) = wanted.pop() {
        if linked.contains_key(id) {
            continue;
        }
        let needs = nodes.get(id).map(|n| needed(n)).unwrap_or_default();
        wanted.extend(&needs);
        linked.insert(id, needs);
    }
    let reference = |id: &str| -> String {
        let p = packages.get(id);
        let of = |key: &str| p.and_then(|p| p[key].as_str()).unwrap_or_default();
        format!("pkg:cargo/{}@{}", of("name"), of("version"))
    };
    let mut components = Vec::new();
    for id in linked.keys().filter(|id| **id != root) {
        let Some(p) = packages.get(id) else { continue };
        let (name, version) = (p["name"].as_str().unwrap_or_default(), p["version"].as_str().unwrap_or_default());
        let mut component = json!({
            "type": "library", "bom-ref": reference(id), "name": name, "version": version, "purl": reference(id),
            "scope": "required",
        });
        if let Some(license) = p["license"].as_str() {
            component["licenses"] = json!([{"expression": license.replace('/', " OR ")}]);
        }
        if let Some(sum) = checksums.get(&(name.to_owned(), version.to_owned())) {
            component["hashes"] = json!([{"alg": "SHA-256", "content": sum}]);
        }
        if let Some(url) = p["repository"].as_str() {
            component["externalReferences"] = json!([{"type": "vcs", "url": url}]);
        }
        components.push(component);
    }
    for (name, version, license) in others {
        components.push(json!({
            "type": "library", "bom-ref": format!("pkg:generic/{name}@{version}"), "name": name, "version": version,
            "purl": format!("pkg:generic/{name}@{version}"), "licenses": [{"expression": license}],
        }));
    }
    let dependencies: Vec<Value> = linked
        .iter()
        .map(|(id, needs)| {
            let mut on: Vec<String> = needs.iter().map(|n| reference(n)).collect();
            on.sort();
            on.dedup();
            json!({"ref": reference(id), "dependsOn": on})
        })
        .collect();
    let version = env!("CARGO_PKG_VERSION");
    Ok(json!({
        "bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1,
        "metadata": {
            "component": {
                "type": "application", "bom-ref": reference(root), "name": "apiscope", "version": version,
                "purl": reference(root), "licenses": [{"expression": "Apache-2.0"}],
                "hashes": [{"alg": "SHA-256", "content": binary}],
            },
            "properties": [{"name": "apiscope:target", "value": target}],
        },
        "components": components,
        "dependencies": dependencies,
    }))
}

/// What a crate links: not what only its tests or its build script need.
fn needed(node: &Value) -> Vec<&str> {
    let all = node["deps"].as_array().map(Vec::as_slice).unwrap_or_default();
    let links = |d: &&Value| d["dep_kinds"].as_array().is_some_and(|k| k.iter().any(|k| k["kind"].is_null()));
    all.iter().filter(links).filter_map(|d| d["pkg"].as_str()).collect()
}

/// SHA-256 of packages, by name and version.
fn checksums(lock: &str) -> BTreeMap<(String, String), String> {
    let mut found = BTreeMap::new();
    for package in lock.split("[[package]]") {
        let of = |key: &str| {
            let line = package.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(" = "))?;
            Some(line.trim_matches('"').to_owned())
        };
        if let (Some(name), Some(version), Some(sum)) = (of("name"), of("version"), of("checksum")) {
            found.insert((name, version), sum);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_of_a_lock_file() {
        let lock = "version = 4\n\n[[package]]\nname = \"a\"\nversion = \"1.0\"\nchecksum = \"00ff\"\n\n[[package]]\nname = \"b\"\nversion = \"2\"\n";
        let found = checksums(lock);
        assert_eq!(found.len(), 1);
        assert_eq!(found.get(&("a".into(), "1.0".into())).map(String::as_str), Some("00ff"));
    }

    #[test]
    fn what_is_linked_and_what_is_not() {
        let node = json!({"deps": [
            {"pkg": "a", "dep_kinds": [{"kind": null}]},
            {"pkg": "b", "dep_kinds": [{"kind": "dev"}, {"kind": "build"}]},
        ]});
        assert_eq!(needed(&node), ["a"]);
    }
}
