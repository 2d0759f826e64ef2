//! The Kubernetes API, watched: pods of this node whole, pods of other nodes and nodes as rows of a table
//! with metadata, services. One thread, one task for each of the four; it fills
//! [`Pods`](crate::identity::pods::Pods) and is asked for nothing.
//!
//! A list, then a watch from where it ended, for as long as the server allows; a new list only when the
//! server has forgotten that place (410). Lists are answered from the server's cache (`resourceVersion=0`)
//! and not from etcd. While the server is away everything known stays; retries wait [`RETRY`], doubled up to
//! [`RETRY_MOST`], each with a part of chance so that the agents of a cluster do not come back all at once.
//!
//! Why no client crate: `kube` with its object model would bring 58 further crates, a YAML and a JSONPath
//! parser among them, into a process with the right to load kernel programs, and its watchers know no tables;
//! four GET requests over the HTTP client that is linked anyway need none of it.

mod client;
mod objects;

use std::{
    net::IpAddr,
    sync::{Arc, PoisonError, RwLock, atomic::Ordering},
    thread::JoinHandle,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, anyhow};
use rustc_hash::FxHashSet;
use tokio::sync::watch;

use crate::{
    config::Kubernetes,
    exchange::Kind,
    identity::pods::{Fixed, Pods, Source, fixed_origin},
    stats::{Stats, Unnamed},
};
use client::{Api, Failure};
use objects::{Column, Event, List, Meta, Naming, Shared};

/// First and longest pause before a failed request is made again.
pub const RETRY: Duration = Duration::from_millis(500);
/// See [`RETRY`]. Pods that start in this time after the API server is back go by container id.
pub const RETRY_MOST: Duration = Duration::from_secs(5);
/// A failure is complained about once, then this often.
const COMPLAIN_AFTER: Duration = Duration::from_secs(300);
/// Objects of one page of a list.
const PAGE: u32 = 500;
/// Longest page, bytes: servers that answer from their cache ignore [`PAGE`].
const MAX_PAGE: usize = 256 << 20;
/// Longest line of a watch, bytes: an object of etcd's own limit is 1.5 MiB.
const MAX_LINE: usize = 8 << 20;
/// How long one watch is asked for, s; up to as much again is left to chance.
const WATCH_S: u64 = 240;
/// Objects that are put into the table under one lock.
const BATCH: usize = 256;
const JSON: &str = "application/json";
const TABLE: &str = "application/json;as=Table;g=meta.k8s.io;v=v1";

/// The watches, running. They end when this is dropped.
pub struct Watches {
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

impl Watches {
    /// Starts watching, when the configuration says so.
    ///
    /// # Errors
    /// It cannot be done as configured: the certificate or the node's name is missing.
    pub fn start(config: &Kubernetes, pods: Arc<RwLock<Pods>>, stats: Arc<Stats>) -> anyhow::Result<Option<Self>> {
        if !config.is_on(client::in_cluster().is_some()) {
            return Ok(None);
        }
        // Another part of the process may have chosen a provider already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let known = Self::server(config);
        let (node, api) = match known {
            Ok(known) => known,
            // Nobody asked for it: a pod without a service account is traced all the same.
            Err(e) if config.enabled.is_none() => {
                log::warn!("{e:#}: pods go by container id");
                return Ok(None);
            }
            Err(e) => return Err(e),
        };
        let naming = Naming { well_known_labels: config.well_known_labels, labels: config.labels.clone() };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (stop, stopped) = watch::channel(false);
        let mut watchers = vec![Watcher::new(Source::NodePods, &node, &api, &pods, &stats, &naming)];
        if config.peers {
            for source in [Source::OtherPods, Source::Services, Source::Nodes] {
                watchers.push(Watcher::new(source, &node, &api, &pods, &stats, &naming));
            }
        }
        log::info!("watching {} for node {node}", api.base());
        let thread = std::thread::Builder::new().name("kubernetes".into()).spawn(move || {
            runtime.block_on(async move {
                let mut tasks = tokio::task::JoinSet::new();
                for mut watcher in watchers {
                    let mut stopped = stopped.clone();
                    tasks.spawn(async move {
                        tokio::select! {
                            _ = stopped.wait_for(|over| *over) => {}
                            () = watcher.work() => {}
                        }
                    });
                }
                while tasks.join_next().await.is_some() {}
            });
        })?;
        Ok(Some(Self { stop, thread: Some(thread) }))
    }
}

impl Watches {
    /// This node's name, and its API server.
    fn server(config: &Kubernetes) -> anyhow::Result<(String, Arc<Api>)> {
        let node = config.node.clone().or_else(|| std::env::var("NODE_NAME").ok().filter(|n| !n.is_empty()));
        let node = node.context("kubernetes.node is not set, nor is NODE_NAME: the chart sets it")?;
        Ok((node, Arc::new(Api::new(config)?)))
    }
}

impl Drop for Watches {
    fn drop(&mut self) {
        // Its tasks may be over already.
        let _ = self.stop.send(true);
        if let Some(thread) = self.thread.take() {
            // A panic there was reported already.
            let _ = thread.join();
        }
    }
}

struct Watcher {
    source: Source,
    path: String,
    api: Arc<Api>,
    pods: Arc<RwLock<Pods>>,
    stats: Arc<Stats>,
    naming: Naming,
    shared: Shared,
    columns: Vec<Column>,
    complained: Option<Instant>,
}

/// What an object says; applied under the table's lock.
enum Change {
    Pod(crate::identity::pods::Pod),
    PodGone(String),
    Fixed(Fixed, Arc<str>, Vec<IpAddr>, Arc<crate::exchange::Origin>),
}

impl Watcher {
    fn new(
        source: Source,
        node: &str,
        api: &Arc<Api>,
        pods: &Arc<RwLock<Pods>>,
        stats: &Arc<Stats>,
        naming: &Naming,
    ) -> Self {
        let path = match source {
            Source::NodePods => format!("/api/v1/pods?fieldSelector=spec.nodeName%3D{node}"),
            Source::OtherPods => {
                format!("/api/v1/pods?fieldSelector=spec.nodeName%21%3D{node}&includeObject=Metadata")
            }
            Source::Services => "/api/v1/services?".to_owned(),
            Source::Nodes => "/api/v1/nodes?includeObject=Metadata".to_owned(),
        };
        Self {
            source,
            path,
            api: api.clone(),
            pods: pods.clone(),
            stats: stats.clone(),
            naming: naming.clone(),
            shared: Shared::default(),
            columns: Vec::new(),
            complained: None,
        }
    }

    fn accept(&self) -> &'static str {
        if matches!(self.source, Source::OtherPods | Source::Nodes) { TABLE } else { JSON }
    }

    /// Lists and watches for ever.
    async fn work(&mut self) {
        let mut pause = RETRY;
        let mut version: Option<String> = None;
        loop {
            let result = match version.take() {
                None => self.list().await,
                Some(from) => self.watch(from.clone()).await.map_err(|(failure, at)| {
                    if !matches!(failure, Failure::Gone) {
                        version = Some(at);
                    }
                    failure
                }),
            };
            match result {
                Ok(next) => {
                    version = Some(next);
                    pause = RETRY;
                    if self.complained.take().is_some() {
                        log::warn!("{}: the API server answers again", self.source.name());
                    }
                }
                Err(failure) => {
                    self.with(|pods| pods.set_live(self.source, false));
                    if matches!(failure, Failure::Gone) {
                        log::debug!("{}: {failure}: listing again", self.source.name());
                    } else {
                        self.stats.kubernetes_failed.fetch_add(1, Ordering::Relaxed);
                        if self.complained.is_none_or(|at| at.elapsed() > COMPLAIN_AFTER) {
                            self.complained = Some(Instant::now());
                            log::warn!(
                                "{}: {failure}; what is known stays, new pods go by container id",
                                self.source.name()
                            );
                        }
                    }
                    tokio::time::sleep(pause + pause.mul_f64(chance())).await;
                    pause = (pause * 2).min(RETRY_MOST);
                }
            }
        }
    }

    /// Lists everything; returns where a watch goes on.
    async fn list(&mut self) -> Result<String, Failure> {
        let mut present = FxHashSet::default();
        let mut next = String::new();
        loop {
            // Later pages belong to the state of the first.
            let at =
                if next.is_empty() { "resourceVersion=0".to_owned() } else { format!("continue={}", escaped(&next)) };
            let path = format!("{}&limit={PAGE}&{at}", self.path);
            let response = self.api.get(&path, self.accept()).await?;
            let bytes = client::body(response, MAX_PAGE).await?;
            let list: List<'_> = serde_json::from_slice(&bytes).context("a list that is none")?;
            if self.accept() == TABLE && list.column_definitions.is_empty() && next.is_empty() {
                return Err(anyhow!("the server answers without a table").into());
            }
            if !list.column_definitions.is_empty() {
                self.columns = list.column_definitions;
            }
            for batch in list.items.chunks(BATCH).chain(list.rows.chunks(BATCH)) {
                let mut changes = Vec::with_capacity(batch.len());
                for text in batch {
                    if let Some((change, _)) = self.change(text.get(), false) {
                        present.insert(match &change {
                            Change::Pod(pod) => pod.uid.clone(),
                            Change::PodGone(uid) => uid.as_str().into(),
                            Change::Fixed(_, name, ..) => name.clone(),
                        });
                        changes.push(change);
                    }
                }
                self.apply(changes);
            }
            next = list.metadata.next;
            if next.is_empty() {
                self.with(|pods| {
                    pods.listed(self.source, &present, now());
                    pods.set_live(self.source, true);
                });
                return Ok(list.metadata.resource_version);
            }
        }
    }

    /// Watches until the server ends it; returns where to go on, also with a failure.
    async fn watch(&mut self, from: String) -> Result<String, (Failure, String)> {
        let seconds = WATCH_S + (chance() * WATCH_S as f64) as u64;
        let path = format!(
            "{}&watch=1&allowWatchBookmarks=true&timeoutSeconds={seconds}&resourceVersion={}",
            self.path,
            escaped(&from)
        );
        let mut version = from;
        let mut response = match self.api.get(&path, self.accept()).await {
            Ok(response) => response,
            Err(failure) => return Err((failure, version)),
        };
        self.with(|pods| pods.set_live(self.source, true));
        let mut line = Vec::new();
        loop {
            let chunk = match response.chunk().await {
                Ok(Some(chunk)) => chunk,
                Ok(None) => return Ok(version),
                Err(e) => return Err((anyhow::Error::from(e).context("a watch broke off").into(), version)),
            };
            let mut rest = &chunk[..];
            let mut changes = Vec::new();
            while let Some(end) = memchr::memchr(b'\n', rest) {
                line.extend_from_slice(&rest[..end]);
                rest = &rest[end + 1..];
                let event = self.event(&line, &mut version);
                line.clear();
                match event {
                    Ok(change) => changes.extend(change),
                    Err(failure) => {
                        self.apply(changes);
                        return Err((failure, version));
                    }
                }
            }
            self.apply(changes);
            if line.len() + rest.len() > MAX_LINE {
                return Err((anyhow!("a line of a watch is longer than {MAX_LINE} bytes").into(), version));
            }
            line.extend_from_slice(rest);
            if line.is_empty() {
                line.shrink_to(64 << 10);
            }
        }
    }

    /// One line of a watch.
    fn event(&mut self, line: &[u8], version: &mut String) -> Result<Option<Change>, Failure> {
        if line.trim_ascii().is_empty() {
            return Ok(None);
        }
        let event: Event<'_> = serde_json::from_slice(line).context("a line of a watch that is no event")?;
        if event.kind == "ERROR" {
            let status: objects::Status = serde_json::from_str(event.object.get()).unwrap_or_default();
            return Err(if status.code == 410 {
                Failure::Gone
            } else {
                anyhow!("the watch ended: {} {}", status.code, status.message).into()
            });
        }
        let list: List<'_>;
        let object = if self.accept() == TABLE {
            list = serde_json::from_str(event.object.get()).context("a row of a watch that is none")?;
            if !list.metadata.resource_version.is_empty() {
                version.clone_from(&list.metadata.resource_version);
            }
            match list.rows.first() {
                Some(row) => row.get(),
                None => return Ok(None),
            }
        } else {
            event.object.get()
        };
        if event.kind == "BOOKMARK" {
            if self.accept() == JSON
                && let Ok(named) = serde_json::from_str::<objects::Named>(object)
                && !named.metadata.resource_version.is_empty()
            {
                *version = named.metadata.resource_version;
            }
            return Ok(None);
        }
        Ok(self.change(object, event.kind == "DELETED").map(|(change, at)| {
            if !at.is_empty() {
                *version = at;
            }
            change
        }))
    }

    /// What an object says, and its version. One that is not understood is counted and passed over.
    fn change(&mut self, text: &str, deleted: bool) -> Option<(Change, String)> {
        let change = match self.source {
            // A pod that ends keeps its containers and addresses in its last event.
            Source::NodePods | Source::OtherPods if deleted => {
                self.meta(text).map(|m| Some((Change::PodGone(m.uid.clone()), m)))
            }
            Source::NodePods => objects::pod(text, &self.naming, &mut self.shared)
                .and_then(|pod| Ok(Some((Change::Pod(pod), self.meta(text)?)))),
            Source::OtherPods => match objects::pod_row(text, &self.columns, &self.naming, &mut self.shared) {
                Ok(Some(pod)) => self.meta(text).map(|m| Some((Change::Pod(pod), m))),
                Ok(None) => Ok(None),
                Err(e) => Err(e),
            },
            Source::Services => {
                objects::service(text).map(|(meta, addresses)| Some(fixed(Fixed::Service, meta, addresses, deleted)))
            }
            Source::Nodes => objects::node_row(text, &self.columns)
                .map(|(meta, addresses)| Some(fixed(Fixed::Node, meta, addresses, deleted))),
        };
        match change {
            Ok(change) => change.map(|(change, meta)| (change, meta.resource_version)),
            Err(e) => {
                log::debug!("{}: an object is not understood: {e}", self.source.name());
                self.stats.kubernetes_failed.fetch_add(1, Ordering::Relaxed);
                None
            }
        }
    }

    fn meta(&self, text: &str) -> serde_json::Result<Meta> {
        if self.accept() == TABLE {
            serde_json::from_str::<objects::Row>(text).map(|row| row.object.metadata)
        } else {
            serde_json::from_str::<objects::Named>(text).map(|named| named.metadata)
        }
    }

    fn apply(&self, changes: Vec<Change>) {
        if changes.is_empty() {
            return;
        }
        self.with(|pods| {
            for change in changes {
                match change {
                    Change::Pod(pod) => pods.pod(self.source, pod, now()),
                    Change::PodGone(uid) => pods.pod_gone(&uid, now()),
                    Change::Fixed(kind, name, addresses, origin) => pods.fixed(kind, &name, addresses, &origin),
                }
            }
        });
    }

    fn with(&self, act: impl FnOnce(&mut Pods)) {
        let mut pods = self.pods.write().unwrap_or_else(PoisonError::into_inner);
        act(&mut pods);
        pods.sweep(now());
        self.stats.pods.store(pods.len() as u64, Ordering::Relaxed);
        self.stats.set_unnamed(Unnamed::TableFull, pods.refused);
    }
}

fn fixed(kind: Fixed, meta: Meta, addresses: Vec<IpAddr>, deleted: bool) -> (Change, Meta) {
    let (namespace, name): (Arc<str>, Arc<str>) = (meta.namespace.as_str().into(), meta.name.as_str().into());
    let of = if kind == Fixed::Service { Kind::Service } else { Kind::Node };
    let origin = fixed_origin(of, &namespace, &name);
    // Names of services are unique in a namespace only.
    let key: Arc<str> = if namespace.is_empty() { name } else { format!("{namespace}/{name}").into() };
    (Change::Fixed(kind, key, if deleted { Vec::new() } else { addresses }, origin), meta)
}

/// Now, ns since the epoch.
fn now() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

/// A number from 0 to 1, different on each node: enough to keep agents apart.
fn chance() -> f64 {
    use std::hash::{BuildHasher as _, RandomState};
    (RandomState::new().hash_one(0_u8) >> 11) as f64 / (1_u64 << 53) as f64
}

/// For a query of a URL.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => out.push(char::from(byte)),
            other => out.push_str(&format!("%{other:02X}")),
        }
    }
    out
}
