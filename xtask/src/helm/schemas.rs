//! Schemas of the Kubernetes API for kubeconform, of the kinds that the chart makes: cut out of the OpenAPI
//! document that every release of Kubernetes has (`api/openapi-spec/swagger.json`, Apache-2.0), without its
//! prose, strict: what is not in them is refused.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use crate::place;

/// Kinds of the chart, and their definitions.
const KINDS: [(&str, &str); 8] = [
    ("daemonset", "io.k8s.api.apps.v1.DaemonSet"),
    ("serviceaccount", "io.k8s.api.core.v1.ServiceAccount"),
    ("configmap", "io.k8s.api.core.v1.ConfigMap"),
    ("secret", "io.k8s.api.core.v1.Secret"),
    ("clusterrole", "io.k8s.api.rbac.v1.ClusterRole"),
    ("clusterrolebinding", "io.k8s.api.rbac.v1.ClusterRoleBinding"),
    ("networkpolicy", "io.k8s.api.networking.v1.NetworkPolicy"),
    ("priorityclass", "io.k8s.api.scheduling.v1.PriorityClass"),
];
const PREFIX: &str = "#/definitions/";

fn kept(version: &str) -> PathBuf {
    let minor = version.rsplit_once('.').map_or(version, |(minor, _)| minor);
    place::root().join(format!("tests/kubernetes/{minor}.json"))
}

/// Cuts the schemas out and keeps them in the tree.
///
/// # Errors
/// The document is none, or lacks a kind.
pub fn import(swagger: &Path, version: &str) -> Result<()> {
    let text = fs::read_to_string(swagger).with_context(|| format!("failed to read {}", swagger.display()))?;
    let document: Value = serde_json::from_str(&text).context("the document is no JSON")?;
    let all = document["definitions"].as_object().context("the document has no definitions")?;
    let mut wanted: Vec<String> = KINDS.iter().map(|(_, d)| (*d).to_owned()).collect();
    let mut definitions = BTreeMap::new();
    while let Some(name) = wanted.pop() {
        if definitions.contains_key(&name) {
            continue;
        }
        let mut definition = all.get(&name).with_context(|| format!("no definition {name}"))?.clone();
        strict(&name, &mut definition);
        let mut found = BTreeSet::new();
        references(&definition, &mut found);
        wanted.extend(found);
        definitions.insert(name, definition);
    }
    let path = kept(version);
    let text = serde_json::to_string(&json!({"kubernetes": version, "definitions": definitions}))?;
    // One definition a line, so that a difference can be read.
    let text = text.replace("},\"io.k8s.", "},\n\"io.k8s.");
    fs::create_dir_all(path.parent().context("a path without a folder")?)?;
    fs::write(&path, text + "\n").with_context(|| format!("failed to write {}", path.display()))?;
    println!("{}: {} definitions", path.display(), definitions.len());
    Ok(())
}

/// Writes one file for each kind, as kubeconform wants them; returns their folder.
///
/// # Errors
/// There are no schemas of that version.
pub fn unpack(version: &str, out: &Path) -> Result<PathBuf> {
    let path = kept(version);
    let text = fs::read_to_string(&path).with_context(|| format!("failed to read {}", path.display()))?;
    let document: Value = serde_json::from_str(&text).with_context(|| format!("{} is no JSON", path.display()))?;
    let folder = out.join(format!("schemas-{version}"));
    fs::create_dir_all(&folder)?;
    for (kind, definition) in KINDS {
        let schema = json!({"$ref": format!("{PREFIX}{definition}"), "definitions": document["definitions"]});
        fs::write(folder.join(format!("{kind}.json")), schema.to_string())?;
    }
    Ok(folder)
}

/// No prose, no unknown members; numbers where the API takes numbers for texts.
fn strict(name: &str, value: &mut Value) {
    if name.ends_with("IntOrString") || name.ends_with("Quantity") {
        *value = json!({"type": ["string", "number"]});
        return;
    }
    match value {
        Value::Object(map) => {
            if map.get("description").is_some_and(Value::is_string) {
                map.remove("description");
            }
            map.retain(|key, _| !key.starts_with("x-kubernetes") && key != "format" && key != "default");
            if map.get("properties").is_some_and(Value::is_object) && !map.contains_key("additionalProperties") {
                map.insert("additionalProperties".into(), json!(false));
            }
            map.values_mut().for_each(|v| strict("", v));
        }
        Value::Array(list) => list.iter_mut().for_each(|v| strict("", v)),
        _ => {}
    }
}

fn references(value: &Value, found: &mut BTreeSet<String>) {
    match value {
        Value::Object(map) => {
            if let Some(name) = map.get("$ref").and_then(Value::as_str).and_then(|r| r.strip_prefix(PREFIX)) {
                found.insert(name.to_owned());
            }
            map.values().for_each(|v| references(v, found));
        }
        Value::Array(list) => list.iter().for_each(|v| references(v, found)),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strict_without_prose() {
        let mut schema =
            json!({"description": "x", "properties": {"description": {"type": "string", "description": "y"}}});
        strict("a", &mut schema);
        assert_eq!(schema, json!({"properties": {"description": {"type": "string"}}, "additionalProperties": false}));
        let mut found = BTreeSet::new();
        references(&json!({"a": [{"$ref": "#/definitions/b"}]}), &mut found);
        assert!(found.contains("b"));
    }
}
