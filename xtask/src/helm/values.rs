//! The chart's values: the table in its README is made of the comments in values.yaml, and the schema names
//! exactly what is there.
//!
//! values.yaml is read line by line, as it is written by hand: two spaces a level, a comment that begins with
//! `# --` above each value.

use std::{collections::BTreeSet, fs, path::Path};

use anyhow::{Context as _, Result, bail};
use serde_json::Value as Json;

/// Where the table begins and ends in README.md.
const MARKS: [&str; 2] = ["<!-- values: made by `cargo xtask helm --write` -->", "<!-- end of values -->"];

/// One value.
#[derive(Debug, PartialEq, Eq)]
struct Value {
    path: String,
    default: String,
    about: String,
}

/// Checks values, documentation and schema against each other.
///
/// # Errors
/// They differ, or a value has no comment.
pub fn check(chart: &Path, write: bool) -> Result<()> {
    let read = |name: &str| fs::read_to_string(chart.join(name)).with_context(|| format!("failed to read helm/{name}"));
    let values = parse(&read("values.yaml")?)?;
    let schema: Json = serde_json::from_str(&read("values.schema.json")?).context("values.schema.json is no JSON")?;
    let mut known = BTreeSet::new();
    leaves(&schema, "", &mut known);
    known.remove("global");
    let here: BTreeSet<String> = values.iter().map(|v| v.path.clone()).collect();
    let differ: Vec<&String> = here.symmetric_difference(&known).collect();
    if !differ.is_empty() {
        bail!("only in one of helm/values.yaml and helm/values.schema.json: {differ:?}");
    }
    let readme = read("README.md")?;
    let fresh = with_table(&readme, &table(&values))?;
    if fresh != readme {
        if !write {
            bail!("helm/README.md is not what values.yaml says: run `cargo xtask helm --write`");
        }
        fs::write(chart.join("README.md"), fresh)?;
        println!("helm/README.md: written");
    }
    Ok(())
}

fn parse(text: &str) -> Result<Vec<Value>> {
    let mut values: Vec<Value> = Vec::new();
    let mut path: Vec<&str> = Vec::new();
    let mut about: Option<String> = None;
    for (number, line) in text.lines().enumerate() {
        let depth = (line.len() - line.trim_start().len()) / 2;
        let line = line.trim();
        if let Some(comment) = line.strip_prefix('#') {
            match (comment.trim_start().strip_prefix("-- "), &mut about) {
                (Some(first), _) => about = Some(first.to_owned()),
                (None, Some(more)) => *more = format!("{more} {}", comment.trim()),
                (None, None) => {}
            }
            continue;
        }
        let Some((key, rest)) = line.split_once(':').filter(|(k, _)| !k.starts_with('-') && !k.contains(' ')) else {
            if line.is_empty() {
                about = None;
            }
            // An element of a list, or a line that belongs to the value above.
            if let Some(last) = values.last_mut().filter(|_| !line.is_empty()) {
                last.default = format!("{} {line}", last.default).trim().to_owned();
            }
            continue;
        };
        let inside = values.last().is_some_and(|v| {
            v.default.is_empty() && path.join(".").starts_with(&v.path) && depth > v.path.matches('.').count()
        });
        if inside && about.is_none() {
            // A member of a documented object.
            if let Some(last) = values.last_mut() {
                last.default.push_str(&format!("{key}: {} …", rest.trim()));
            }
            continue;
        }
        let within = values.last().is_some_and(|v| v.default.ends_with('…') && depth > v.path.matches('.').count());
        if within && about.is_none() {
            continue;
        }
        path.truncate(depth);
        path.push(key);
        match (about.take(), rest.trim()) {
            (Some(about), rest) => values.push(Value { path: path.join("."), default: rest.to_owned(), about }),
            (None, "") => {}
            (None, _) => bail!("helm/values.yaml:{}: `{}` has no comment", number + 1, path.join(".")),
        }
    }
    Ok(values)
}

/// Paths of the schema that have no properties of their own: what is documented one by one.
fn leaves(schema: &Json, path: &str, found: &mut BTreeSet<String>) {
    // Objects whose members are Kubernetes' or Helm's, not ours.
    const WHOLE: [&str; 4] = ["resources", "affinity", "securityContext.seLinuxOptions", "global"];
    match schema["properties"].as_object() {
        Some(properties) if !WHOLE.contains(&path) => {
            for (name, schema) in properties {
                let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                leaves(schema, &path, found);
            }
        }
        _ => {
            found.insert(path.to_owned());
        }
    }
}

fn table(values: &[Value]) -> String {
    let mut out = String::from("| value | default | what |\n| --- | --- | --- |\n");
    for v in values {
        let default =
            if v.default.is_empty() { "`\"\"`".to_owned() } else { format!("`{}`", v.default.replace('|', "\\|")) };
        out.push_str(&format!("| `{}` | {default} | {} |\n", v.path, v.about.replace('|', "\\|")));
    }
    out
}

fn with_table(readme: &str, table: &str) -> Result<String> {
    let (before, rest) = readme.split_once(MARKS[0]).context("helm/README.md has no mark where the values begin")?;
    let (_, after) = rest.split_once(MARKS[1]).context("helm/README.md has no mark where the values end")?;
    Ok(format!("{before}{}\n{table}{}{after}", MARKS[0], MARKS[1]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_and_their_comments() {
        let text = "# About the file\n\n# -- One\n# and more\na: 1\nb:\n  # -- Two\n  c: [x]\n# -- Three\nd:\n  e: f\n  g:\n    h: 1\n# -- Four\ni:\n  - j: k\n";
        let values = parse(text).expect("commented");
        let of = |i: usize| (values[i].path.as_str(), values[i].default.as_str(), values[i].about.as_str());
        assert_eq!(of(0), ("a", "1", "One and more"));
        assert_eq!(of(1), ("b.c", "[x]", "Two"));
        assert_eq!(of(2), ("d", "e: f …", "Three"));
        assert_eq!(of(3), ("i", "- j: k", "Four"));
        assert!(parse("a: 1\n").is_err(), "a value without a comment");
        let readme = format!("x\n{}\nold\n{}\ny\n", MARKS[0], MARKS[1]);
        let fresh = with_table(&readme, &table(&values)).expect("marked");
        assert!(fresh.contains("| `b.c` | `[x]` | Two |") && fresh.ends_with("\ny\n") && !fresh.contains("old"));
        assert_eq!(with_table(&fresh, &table(&values)).expect("marked"), fresh);
    }
}
