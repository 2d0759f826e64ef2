//! Bytes -> [`Document`]. Whatever the bytes are: a document or a sentence, in bounded time and memory.

use std::{borrow::Cow, collections::BTreeSet, path::PathBuf};

use anyhow::{Context as _, bail};
use serde_json::{Map, Value};

use super::{Document, Operation, files::Files};

/// Longest document, bytes.
pub const MAX_DOCUMENT: usize = 16 << 20;
/// Most operations that are read of one.
pub const MAX_OPERATIONS: usize = 20_000;
/// Most nodes of a YAML document, with what its aliases stand for.
const MAX_NODES: usize = 1_000_000;
/// Most nodes that aliases stand for: what YAML bombs are made of.
const MAX_ALIASED: usize = 100_000;
/// Deepest nesting. (`serde_json` has a limit of its own, 128.)
const MAX_DEPTH: usize = 96;
/// Longest chain of `$ref`.
const MAX_REFS: usize = 16;
/// Most base paths that an operation is read with.
const MAX_BASES: usize = 8;
/// Longest path template, bytes.
const MAX_PATH: usize = 2_048;
/// Most sentences about what was passed over.
const MAX_NOTES: usize = 20;

const METHODS: [&str; 8] = ["get", "put", "post", "delete", "options", "head", "patch", "trace"];

/// Reads a document that is of no file.
///
/// # Errors
/// It is neither JSON nor YAML, no OpenAPI of a version that is known, or beyond a bound.
pub fn read(bytes: &[u8]) -> anyhow::Result<Document> {
    read_beside(bytes, Files::default())
}

/// Reads a document with its other files.
///
/// # Errors
/// As [`read`]; a file that cannot be read is a note.
pub fn read_beside(bytes: &[u8], files: Files) -> anyhow::Result<Document> {
    if bytes.len() > MAX_DOCUMENT {
        bail!("longer than {} MiB", MAX_DOCUMENT >> 20);
    }
    let root = value(bytes)?;
    let version = |key: &str| root.get(key).map(|v| v.as_str().map_or_else(|| v.to_string(), str::to_owned));
    let swagger = match (version("openapi"), version("swagger")) {
        (Some(v), _) if v.starts_with("3.0") || v.starts_with("3.1") => false,
        (None, Some(v)) if v == "2.0" || v == "2" => true,
        (Some(v), _) => bail!("OpenAPI {v:?}: 3.0, 3.1 and Swagger 2.0 are read"),
        (None, Some(v)) => bail!("Swagger {v:?}: 2.0, and OpenAPI 3.0 and 3.1 are read"),
        (None, None) => bail!("no OpenAPI document: neither `openapi` nor `swagger` is there"),
    };
    let mut reader = Reader { root: &root, swagger, files, document: Document::default() };
    reader.document.title =
        root.pointer("/info/title").and_then(Value::as_str).unwrap_or_default().chars().take(200).collect();
    reader.paths();
    Ok(reader.document)
}

/// Reads JSON or YAML.
///
/// # Errors
/// It is neither, or beyond a bound.
pub fn value(bytes: &[u8]) -> anyhow::Result<Value> {
    let text = std::str::from_utf8(bytes).context("not UTF-8")?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    if text.trim_start().starts_with('{') {
        // YAML is a superset of JSON, but JSON's reader is the better one for it.
        return serde_json::from_str(text).context("not valid JSON");
    }
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_depth: MAX_DEPTH,
            max_nodes: MAX_NODES,
            max_documents: 1,
            max_total_scalar_bytes: MAX_DOCUMENT,
        },
        alias_limits: serde_saphyr::alias_limits! { max_total_replayed_events: MAX_ALIASED, max_replay_stack_depth: 32 },
        with_snippet: false,
    };
    serde_saphyr::from_str_with_options(text, options).map_err(|e| anyhow::anyhow!("not valid YAML: {e}"))
}

struct Reader<'r> {
    root: &'r Value,
    swagger: bool,
    files: Files,
    document: Document,
}

impl<'r> Reader<'r> {
    fn paths(&mut self) {
        let Some(paths) = self.root.get("paths").and_then(Value::as_object) else {
            self.note("it has no paths".into());
            return;
        };
        let bases = self.bases(self.root).unwrap_or_else(|| vec![String::new()]);
        let security = self.root.get("security");
        for (path, item) in paths {
            if !path.starts_with('/') || path.len() > MAX_PATH {
                if !path.starts_with("x-") {
                    self.note(format!(
                        "{path:.80?} is passed over: a path begins with / and has at most {MAX_PATH} bytes"
                    ));
                }
                continue;
            }
            let Some(item) = self.resolve(item) else { continue };
            let Some(item) = item.as_object() else { continue };
            let of_path = self.bases_of(item);
            for method in METHODS {
                let Some(operation) = item.get(method).and_then(Value::as_object) else { continue };
                if self.document.operations.len() >= MAX_OPERATIONS {
                    self.note(format!("operations beyond {MAX_OPERATIONS} are passed over"));
                    return;
                }
                let bases = self.bases_of(operation).or_else(|| of_path.clone()).unwrap_or_else(|| bases.clone());
                let templates = bases.iter().map(|base| format!("{base}{path}")).collect();
                let mut read = Operation { method: method.to_uppercase(), templates, ..Operation::default() };
                read.deprecated = operation.get("deprecated").and_then(Value::as_bool).unwrap_or(false);
                self.security(operation.get("security").or(security), &mut read);
                self.statuses(operation.get("responses"), &mut read);
                self.document.operations.push(read);
            }
        }
    }

    /// Follows `$ref` inside of the document and to the files beside it.
    fn resolve(&mut self, value: &'r Value) -> Option<Cow<'r, Value>> {
        let mut value = Cow::Borrowed(value);
        // The file that `value` is of, from the document's folder; none: the document itself.
        let mut file = PathBuf::new();
        for _ in 0..MAX_REFS {
            let Some(reference) = value.get("$ref").and_then(Value::as_str) else { return Some(value) };
            let (name, pointer) = reference.split_once('#').unwrap_or((reference, ""));
            // A pointer in a fragment may be percent-encoded (RFC 6901 section 6): the braces of paths are.
            let pointer = pointer.replace("%7B", "{").replace("%7D", "}").replace("%7b", "{").replace("%7d", "}");
            let target = if name.is_empty() && file.as_os_str().is_empty() {
                let there = self.root.pointer(&pointer).map(Cow::Borrowed);
                there.ok_or_else(|| "it is not in this document".to_owned())
            } else {
                let path = if name.is_empty() { Ok(file.clone()) } else { self.files.path(&file, name) };
                match path.and_then(|path| self.files.get(&path).map(|v| (v.pointer(&pointer).cloned(), path))) {
                    Ok((Some(target), path)) => {
                        file = path;
                        Ok(Cow::Owned(target))
                    }
                    Ok((None, _)) => Err("it is not in that file".to_owned()),
                    Err(refused) => Err(refused.to_string()),
                }
            };
            match target {
                Ok(target) => value = target,
                Err(why) => {
                    let note = format!("{reference:.120?} is not followed: {why}");
                    self.note(note);
                    return None;
                }
            }
        }
        self.note("a $ref that comes back to itself, or has more than 16 steps, is not followed".into());
        None
    }

    /// Base paths of the servers that are named here; `None` when none is.
    fn bases(&mut self, holder: &Value) -> Option<Vec<String>> {
        self.bases_of(holder.as_object()?)
    }

    fn bases_of(&mut self, holder: &Map<String, Value>) -> Option<Vec<String>> {
        if self.swagger {
            let base = holder.get("basePath")?.as_str()?;
            return Some(vec![base_path(base)]);
        }
        let servers = holder.get("servers")?.as_array()?;
        let mut bases = BTreeSet::new();
        for server in servers.iter().take(4 * MAX_BASES) {
            let Some(url) = server.get("url").and_then(Value::as_str).filter(|u| u.len() <= MAX_PATH) else { continue };
            for url in with_variables(url, server.get("variables")) {
                if bases.len() < MAX_BASES {
                    bases.insert(base_path(&url));
                } else {
                    self.note(format!("base paths of servers beyond {MAX_BASES} are passed over"));
                }
            }
        }
        (!bases.is_empty()).then(|| bases.into_iter().collect())
    }

    fn security(&mut self, security: Option<&Value>, into: &mut Operation) {
        let Some(any_of) = security.and_then(Value::as_array) else {
            into.open = true;
            return;
        };
        into.says_auth = true;
        into.open = any_of.is_empty();
        for all_of in any_of.iter().take(64).filter_map(Value::as_object) {
            into.open |= all_of.is_empty();
            for name in all_of.keys().take(64) {
                let kind = self.scheme(name);
                into.auth.insert(kind.into());
            }
        }
    }

    fn scheme(&mut self, name: &str) -> &'static str {
        let root = self.root;
        let holder =
            if self.swagger { root.get("securityDefinitions") } else { root.pointer("/components/securitySchemes") };
        let Some(scheme) = holder.and_then(|h| h.get(name)).and_then(|s| self.resolve(s)) else {
            self.note(format!("the security scheme {name:.80?} is not defined"));
            return "other";
        };
        let text = |key: &str| scheme.get(key).and_then(Value::as_str).unwrap_or_default().to_ascii_lowercase();
        match (text("type").as_str(), text("scheme").as_str(), text("in").as_str()) {
            ("http", "basic", _) | ("basic", ..) => "basic",
            ("http", "bearer", _) | ("oauth2" | "openidconnect", ..) => "bearer",
            ("http", "digest", _) => "digest",
            ("http", "negotiate", _) => "negotiate",
            ("apikey", _, "cookie") => "cookie",
            ("apikey", ..) => "apikey",
            ("mutualtls", ..) => "mtls",
            _ => "other",
        }
    }

    fn statuses(&mut self, responses: Option<&Value>, into: &mut Operation) {
        let responses = responses.and_then(Value::as_object);
        into.any_status = responses.is_none_or(Map::is_empty);
        for key in responses.into_iter().flat_map(Map::keys).take(700) {
            match key.as_bytes() {
                b"default" => into.any_status = true,
                [class @ b'1'..=b'5', b'X' | b'x', b'X' | b'x'] => {
                    into.ranges.insert(u16::from(class - b'0'));
                }
                _ => {
                    if let Some(status) = key.parse().ok().filter(|s| (100..600).contains(s)) {
                        into.statuses.insert(status);
                    }
                }
            }
        }
    }

    fn note(&mut self, text: String) {
        if self.document.notes.len() < MAX_NOTES && !self.document.notes.contains(&text) {
            self.document.notes.push(text);
        }
    }
}

/// A server's URL with its variables replaced: by the default, and by each value where they are listed.
fn with_variables(url: &str, variables: Option<&Value>) -> Vec<String> {
    let mut urls = vec![url.to_owned()];
    for (name, variable) in variables.and_then(Value::as_object).into_iter().flatten().take(MAX_BASES) {
        let place = format!("{{{name}}}");
        if !url.contains(&place) {
            continue;
        }
        let mut values: BTreeSet<&str> = variable.get("default").and_then(Value::as_str).into_iter().collect();
        let listed = variable.get("enum").and_then(Value::as_array);
        values.extend(listed.into_iter().flatten().filter_map(Value::as_str).take(MAX_BASES));
        urls = urls
            .iter()
            .flat_map(|url| values.iter().filter(|v| v.len() <= MAX_PATH).map(|v| url.replace(&place, v)))
            .filter(|url| url.len() <= MAX_PATH)
            .take(4 * MAX_BASES)
            .collect();
    }
    urls
}

/// The path of a URL, without a slash at its end.
fn base_path(url: &str) -> String {
    let path = match url.split_once("://") {
        Some((_, rest)) => rest.find('/').map_or("", |at| &rest[at..]),
        None => url,
    };
    let path = path.split(['?', '#']).next().unwrap_or_default().trim_matches('/');
    if path.is_empty() || path == "." { String::new() } else { format!("/{path}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    const YAML: &str = "
openapi: 3.1.0
info: {title: Shop, version: 1}
servers:
  - url: https://{region}.example.com/{base}/
    variables:
      region: {default: eu}
      base: {default: v2, enum: [v1, v2]}
security: [{token: []}]
paths:
  /orders/{id}:
    get:
      deprecated: true
      responses: {200: {description: one}, 4XX: {description: no}}
    post:
      security: []
      responses: {default: {description: any}}
  /health:
    $ref: '#/components/pathItems/health'
  /far:
    $ref: other.yaml#/far
  /loop:
    $ref: '#/paths/~1loop'
components:
  securitySchemes:
    token: {type: http, scheme: bearer}
  pathItems:
    health:
      servers: [{url: /}]
      get: {responses: {'204': {description: well}}}
";

    #[test]
    fn yaml_with_servers_variables_and_refs() {
        let d = read(YAML.as_bytes()).expect("valid");
        let got: Vec<_> = d.operations.iter().map(|o| (o.method.as_str(), o.templates.join(" "))).collect();
        let both = "/v1/orders/{id} /v2/orders/{id}".to_owned();
        assert_eq!(got, [("GET", "/health".into()), ("GET", both.clone()), ("POST", both)]);
        let [health, get, post] = &d.operations[..] else { panic!("three") };
        assert!(get.deprecated && !get.open && get.auth.contains("bearer") && get.statuses.contains(&200));
        assert!(get.ranges.contains(&4) && !get.any_status);
        assert!(post.open && post.says_auth && post.any_status && !health.open);
        assert_eq!(d.notes.len(), 2, "{:?}", d.notes);
    }

    #[test]
    fn swagger_in_json() {
        let d = read(
            br##"{"swagger":"2.0","info":{"title":"t","version":"1"},"basePath":"/api/","paths":{"/a":{"get":{"security":
            [{"k":[]},{}],"responses":{"200":{"description":""}}}}},"securityDefinitions":{"k":{"type":"apiKey","in":"header",
            "name":"x"}}}"##,
        )
        .expect("valid");
        let o = &d.operations[0];
        assert_eq!((o.templates[0].as_str(), o.open, o.auth.contains("apikey")), ("/api/a", true, true));
    }

    #[test]
    fn hostile_documents_are_refused_in_time() {
        let mut bomb = String::from("openapi: 3.0.0\na0: &a0 [x,x,x,x,x,x,x,x,x,x]\n");
        for i in 1..12 {
            let line = format!("*a{}", i - 1);
            bomb += &format!("a{i}: &a{i} [{}]\n", vec![line; 10].join(","));
        }
        let deep = format!("openapi: 3.0.0\nx: {}", "[".repeat(100_000));
        let deep_json = format!("{{\"openapi\":\"3.0.0\",\"x\":{}", "[".repeat(100_000));
        let long = "x".repeat(MAX_DOCUMENT + 1);
        let cycle = "openapi: 3.0.0\na: &a [*a]\n";
        for bad in [bomb.as_str(), &deep, &deep_json, &long, cycle, "", "openapi: 4", "a: 1", "- 1", "{", "\0"] {
            let begun = std::time::Instant::now();
            assert!(read(bad.as_bytes()).is_err(), "{bad:.60}");
            assert!(begun.elapsed().as_secs() < 8, "{:?} {bad:.60}", begun.elapsed());
        }
    }

    #[test]
    fn operations_are_bounded() {
        let mut text = String::from("openapi: 3.0.0\npaths:\n");
        for i in 0..MAX_OPERATIONS + 10 {
            text += &format!("  /p{i}: {{get: {{}}}}\n");
        }
        let d = read(text.as_bytes()).expect("valid");
        assert_eq!((d.operations.len(), d.notes.len()), (MAX_OPERATIONS, 1));
    }

    proptest::proptest! {
        #[test]
        fn never_panics(text in ".{0,300}", key in "[a-z$]{1,8}", part in "[^\u{0}]{0,60}") {
            let _ = read(text.as_bytes());
            let _ = read(format!("openapi: 3.1.0\n{key}: {part}\npaths:\n  /{part}:\n    get: {part}\n").as_bytes());
            let _ = base_path(&text);
        }
    }
}
