//! A small Kubernetes API server for tests: lists, watches, tables, bookmarks and 410, over HTTP on
//! loopback. What it answers is what a real one does for these requests; what it holds a test says.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader, Write as _},
    net::TcpStream,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use serde_json::{Value, json};

/// The server; its threads end when nobody asks any more.
#[derive(Clone)]
pub struct ApiServer {
    port: u16,
    inner: Arc<Inner>,
}

struct Inner {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    objects: BTreeMap<(String, String), Value>,
    /// Version, type, object.
    history: Vec<(u64, &'static str, Value)>,
    version: u64,
    /// Versions up to this one are forgotten.
    forgotten: u64,
    away: bool,
    /// Moves when every connection is to be cut.
    cut: u64,
    lists: u64,
    watches: u64,
}

impl ApiServer {
    /// Starts one without objects.
    ///
    /// # Panics
    /// No port can be had.
    #[must_use]
    pub fn start() -> Self {
        let listener = crate::listener("127.0.0.1");
        let port = listener.local_addr().expect("an address").port();
        let inner =
            Arc::new(Inner { state: Mutex::new(State { version: 10, ..State::default() }), changed: Condvar::new() });
        let its = inner.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let its = its.clone();
                std::thread::spawn(move || while its.answer(&stream).is_some() {});
            }
        });
        Self { port, inner }
    }

    /// Where it is.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.inner.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds or changes an object: `kind` is `pods`, `services` or `nodes`.
    pub fn put(&self, kind: &str, mut object: Value) {
        let mut state = self.state();
        state.version += 1;
        object["metadata"]["resourceVersion"] = json!(state.version.to_string());
        let key = (kind.to_owned(), key(&object));
        let event = if state.objects.insert(key, object.clone()).is_some() { "MODIFIED" } else { "ADDED" };
        object["kind"] = json!(kind);
        let version = state.version;
        state.history.push((version, event, object));
        self.inner.changed.notify_all();
    }

    /// Removes the object with this metadata.
    pub fn delete(&self, kind: &str, object: &Value) {
        let mut state = self.state();
        let Some(mut object) = state.objects.remove(&(kind.to_owned(), key(object))) else { return };
        state.version += 1;
        object["metadata"]["resourceVersion"] = json!(state.version.to_string());
        object["kind"] = json!(kind);
        let version = state.version;
        state.history.push((version, "DELETED", object));
        self.inner.changed.notify_all();
    }

    /// Forgets its history: who watches from an older place gets 410.
    pub fn forget(&self) {
        let mut state = self.state();
        state.version += 1;
        state.forgotten = state.version;
        state.history.clear();
    }

    /// Cuts every connection, and refuses to answer until it is told to be back.
    pub fn set_away(&self, away: bool) {
        let mut state = self.state();
        state.away = away;
        state.cut += 1;
        self.inner.changed.notify_all();
    }

    /// Lists and watches that were asked for so far.
    #[must_use]
    pub fn requests(&self) -> (u64, u64) {
        let state = self.state();
        (state.lists, state.watches)
    }
}

fn key(object: &Value) -> String {
    let of = |name: &str| object["metadata"][name].as_str().unwrap_or_default().to_owned();
    of("namespace") + "/" + &of("name")
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One request of a connection; `None` ends it.
    fn answer(&self, mut stream: &TcpStream) -> Option<()> {
        let mut reader = BufReader::new(stream);
        let mut first = String::new();
        if reader.read_line(&mut first).ok()? == 0 {
            return None;
        }
        let mut table = false;
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line).ok()? == 0 {
                return None;
            }
            table |= line.contains("as=Table");
            if line.trim_end().is_empty() {
                break;
            }
        }
        let target = first.split(' ').nth(1)?;
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let kind = path.rsplit('/').next()?.to_owned();
        let parameter = |name: &str| query.split('&').find_map(|p| p.strip_prefix(name)?.strip_prefix('='));
        let selector = parameter("fieldSelector").unwrap_or_default().replace("%21", "!").replace("%3D", "=");
        let from = parameter("resourceVersion").and_then(|v| v.parse().ok()).unwrap_or(0);
        if self.lock().away {
            return None;
        }
        if parameter("watch").is_some() {
            self.lock().watches += 1;
            self.watch(stream, &kind, &selector, table, from);
            return None;
        }
        let body = {
            let mut state = self.lock();
            state.lists += 1;
            let wanted: Vec<&Value> = state
                .objects
                .iter()
                .filter(|((k, _), object)| *k == kind && selects(&selector, object))
                .map(|(_, object)| object)
                .collect();
            // Two pages, when there is something to turn.
            let skip: usize = parameter("continue").and_then(|c| c.strip_prefix("at-")?.parse().ok()).unwrap_or(0);
            let limit = if wanted.len() > 1 { wanted.len().div_ceil(2) } else { wanted.len() };
            let page: Vec<&Value> = wanted.iter().skip(skip).take(limit).copied().collect();
            let next =
                if skip + page.len() < wanted.len() { format!("at-{}", skip + page.len()) } else { String::new() };
            let metadata = json!({"resourceVersion": state.version.to_string(), "continue": next});
            if table {
                let rows: Vec<Value> = page.iter().map(|o| row(&kind, o)).collect();
                json!({"kind": "Table", "metadata": metadata, "columnDefinitions": columns(&kind), "rows": rows})
            } else {
                json!({"kind": "List", "metadata": metadata, "items": page})
            }
            .to_string()
        };
        write!(
            stream,
            "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        )
        .ok()
    }

    fn watch(&self, mut stream: &TcpStream, kind: &str, selector: &str, table: bool, from: u64) {
        if chunk_head(stream).is_err() {
            return;
        }
        let mut chunk = |value: &Value| {
            let line = value.to_string() + "\n";
            write!(stream, "{:x}\r\n{line}\r\n", line.len()).and_then(|()| stream.flush())
        };
        let (mut at, cut) = (from, self.lock().cut);
        let mut first = true;
        let mut bookmark = Instant::now();
        loop {
            let (events, version) = {
                let state = self.lock();
                let (state, _) = self
                    .changed
                    .wait_timeout_while(state, Duration::from_millis(200), |s| s.version == at && s.cut == cut)
                    .unwrap_or_else(PoisonError::into_inner);
                if state.cut != cut {
                    // Without the last chunk: a connection that broke off.
                    return;
                }
                if at < state.forgotten {
                    drop(state);
                    let status = json!({"kind": "Status", "code": 410, "message": "too old resource version"});
                    // The client may have gone.
                    let _ = chunk(&json!({"type": "ERROR", "object": status}));
                    return;
                }
                let events: Vec<_> =
                    state.history.iter().filter(|(v, _, o)| *v > at && o["kind"] == kind).cloned().collect();
                (events, state.version)
            };
            for (_, event, object) in events {
                if !selects(selector, &object) {
                    continue;
                }
                let object = if table { one_row(kind, &object, &mut first) } else { object };
                if chunk(&json!({"type": event, "object": object})).is_err() {
                    return;
                }
            }
            at = version;
            if bookmark.elapsed() > Duration::from_millis(300) {
                bookmark = Instant::now();
                let object = json!({"metadata": {"resourceVersion": at.to_string()}});
                let object = if table { one_row(kind, &object, &mut first) } else { object };
                if chunk(&json!({"type": "BOOKMARK", "object": object})).is_err() {
                    return;
                }
            }
        }
    }
}

fn chunk_head(mut stream: &TcpStream) -> std::io::Result<()> {
    stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n")
}

fn selects(selector: &str, object: &Value) -> bool {
    let node = object["spec"]["nodeName"].as_str().unwrap_or_default();
    match (selector.split_once("!="), selector.split_once('=')) {
        (Some((_, other)), _) => node != other,
        (None, Some((_, wanted))) => node == wanted,
        (None, None) => true,
    }
}

fn columns(kind: &str) -> Value {
    let names: &[&str] = if kind == "pods" {
        &["Name", "Ready", "Status", "Restarts", "Age", "IP", "Node", "Nominated Node", "Readiness Gates"]
    } else {
        &["Name", "Status", "Roles", "Age", "Version", "Internal-IP", "External-IP"]
    };
    names.iter().map(|n| json!({"name": n, "type": "string"})).collect()
}

fn row(kind: &str, object: &Value) -> Value {
    let or_none = |v: &Value| v.as_str().map_or_else(|| json!("<none>"), |v| json!(v));
    let name = &object["metadata"]["name"];
    let cells = if kind == "pods" {
        let phase = object["status"]["phase"].as_str().unwrap_or("Running");
        let status = if phase == "Succeeded" { "Completed" } else { phase };
        let (ip, node) = (or_none(&object["status"]["podIP"]), or_none(&object["spec"]["nodeName"]));
        json!([name, "1/1", status, 0, "1s", ip, node, "<none>", "<none>"])
    } else {
        let address = object["status"]["addresses"].as_array().and_then(|a| a.first()).map(|a| a["address"].clone());
        json!([name, "Ready", "<none>", "1d", "v1.34.0", address, "<none>"])
    };
    json!({"cells": cells, "object": {"kind": "PartialObjectMetadata", "metadata": object["metadata"]}})
}

/// As in a watch: columns in the first event only.
fn one_row(kind: &str, object: &Value, first: &mut bool) -> Value {
    let version = object["metadata"]["resourceVersion"].clone();
    let columns = if std::mem::take(first) { columns(kind) } else { Value::Null };
    let mut table = json!({"kind": "Table", "metadata": {"resourceVersion": version}, "rows": [row(kind, object)]});
    if !columns.is_null() {
        table["columnDefinitions"] = columns;
    }
    table
}

/// A pod as an API server shows it, its size included. `owner` is the name of its replica set without the hash.
#[must_use]
pub fn pod(
    namespace: &str,
    name: &str,
    owner: &str,
    node: &str,
    address: Option<&str>,
    container: Option<&str>,
) -> Value {
    let statuses: Vec<Value> = container
        .iter()
        .map(|id| {
            json!({"name": "app", "image": format!("registry.example/{owner}:1.0"), "ready": true,
                "imageID": format!("registry.example/{owner}@sha256:{}", "ab".repeat(32)),
                "containerID": format!("containerd://{id}"), "state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}}})
        })
        .collect();
    let fields: Value = (0..30).map(|i| json!({format!("f:field{i}"): {"f:name": {}, "f:value": {}}})).collect();
    let env: Value =
        (0..30).map(|i| json!({"name": format!("VARIABLE_{i}"), "value": "a value of some length"})).collect();
    json!({
        "metadata": {
            "name": name, "namespace": namespace, "uid": uid(name), "creationTimestamp": now(),
            "labels": {"pod-template-hash": "5d4f8c7b9", "app": owner},
            "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": format!("{owner}-5d4f8c7b9"), "uid": uid(owner), "controller": true}],
            "managedFields": [{"manager": "kubelet", "operation": "Update", "fieldsV1": fields}],
        },
        "spec": {"nodeName": node, "containers": [{"name": "app", "image": format!("registry.example/{owner}:1.0"), "env": env}]},
        "status": {"phase": "Running", "podIP": address, "podIPs": address.map(|a| json!([{"ip": a}])), "containerStatuses": statuses},
    })
}

/// A UID made of a name.
#[must_use]
pub fn uid(name: &str) -> String {
    use std::hash::{DefaultHasher, Hash as _, Hasher as _};
    let mut hasher = DefaultHasher::new();
    name.hash(&mut hasher);
    let hash = hasher.finish();
    format!("{:08x}-{:04x}-4000-8000-{:012x}", hash >> 32, hash >> 16 & 0xffff, hash & 0xffff_ffff_ffff)
}

/// The present second, as an API server writes it.
///
/// # Panics
/// There is no `date`.
#[must_use]
pub fn now() -> String {
    static LAST: Mutex<(u64, String)> = Mutex::new((0, String::new()));
    let second = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    if last.0 != second {
        let at = format!("@{second}");
        let out = std::process::Command::new("date").args(["-u", "-d", &at, "+%Y-%m-%dT%H:%M:%SZ"]).output();
        *last = (second, String::from_utf8_lossy(&out.expect("date runs").stdout).trim().to_owned());
    }
    last.1.clone()
}
