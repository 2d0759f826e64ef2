//! Objects of the Kubernetes API -> values of [`pods`]: only the members that are used are
//! decoded; the rest of an object is skipped without being stored. Pure.
//!
//! Pods of this node come whole. Pods of other nodes and nodes come as rows of a table
//! (`as=Table`, what `kubectl get -o wide` asks for) with their metadata beside: specification and status,
//! four fifths of a pod, stay with the API server, but the address is there, which an answer of metadata
//! alone lacks.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::{
    exchange::{Image, Kind, Origin, Workload},
    identity::pods::Pod,
};

/// Labels and annotations of one object that are read, at most.
const MAX_LABELS: usize = 64;

/// A page of a list.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct List<'a> {
    /// Where a watch goes on, and where the next page is.
    #[serde(default)]
    pub metadata: ListMeta,
    /// Objects of a list.
    #[serde(default, borrow)]
    pub items: Vec<&'a RawValue>,
    /// Columns of a table.
    #[serde(default)]
    pub column_definitions: Vec<Column>,
    /// Rows of a table.
    #[serde(default, borrow)]
    pub rows: Vec<&'a RawValue>,
}

/// Metadata of a list.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ListMeta {
    /// Version of the state that was listed.
    pub resource_version: String,
    /// Token of the next page; empty on the last.
    #[serde(rename = "continue")]
    pub next: String,
}

/// Column of a table.
#[derive(Debug, Deserialize)]
pub struct Column {
    /// Its heading.
    pub name: String,
}

/// One line of a watch.
#[derive(Debug, Deserialize)]
pub struct Event<'a> {
    /// `ADDED`, `MODIFIED`, `DELETED`, `BOOKMARK`, `ERROR`.
    #[serde(rename = "type")]
    pub kind: &'a str,
    /// The object, a table of one row, or a status.
    #[serde(borrow)]
    pub object: &'a RawValue,
}

/// What an `ERROR` event carries.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Status {
    /// HTTP status.
    pub code: u16,
    /// For people.
    pub message: String,
}

/// Metadata of an object.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Meta {
    /// Name.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// UID.
    pub uid: String,
    /// Version of the object, from which a watch goes on.
    pub resource_version: String,
    creation_timestamp: Option<String>,
    labels: BTreeMap<String, String>,
    annotations: BTreeMap<String, String>,
    owner_references: Vec<Owner>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Owner {
    kind: String,
    name: String,
    controller: bool,
}

/// An object of which only the metadata is read.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Named {
    /// Its metadata.
    pub metadata: Meta,
}

/// A row of a table.
#[derive(Debug, Deserialize)]
pub struct Row {
    #[serde(default)]
    cells: Vec<serde_json::Value>,
    /// Metadata of the object.
    #[serde(default)]
    pub object: Named,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct PodObject {
    metadata: Meta,
    spec: PodSpec,
    status: PodStatus,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct PodSpec {
    node_name: String,
    host_network: bool,
    containers: Vec<ContainerSpec>,
    init_containers: Vec<ContainerSpec>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct ContainerSpec {
    name: String,
    image: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct PodStatus {
    phase: String,
    #[serde(rename = "podIP")]
    pod_ip: String,
    #[serde(rename = "podIPs")]
    pod_ips: Vec<Ip>,
    container_statuses: Vec<ContainerStatus>,
    init_container_statuses: Vec<ContainerStatus>,
    ephemeral_container_statuses: Vec<ContainerStatus>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Ip {
    ip: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ContainerStatus {
    name: String,
    image: String,
    #[serde(rename = "imageID")]
    image_id: String,
    #[serde(rename = "containerID")]
    container_id: String,
    last_state: LastState,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct LastState {
    terminated: Option<Terminated>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Terminated {
    #[serde(rename = "containerID")]
    container_id: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct ServiceObject {
    metadata: Meta,
    spec: ServiceSpec,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ServiceSpec {
    #[serde(rename = "clusterIP")]
    cluster_ip: String,
    #[serde(rename = "clusterIPs")]
    cluster_ips: Vec<String>,
    #[serde(rename = "externalIPs")]
    external_ips: Vec<String>,
}

/// What the configuration asks of names.
#[derive(Debug, Clone, Default)]
pub struct Naming {
    /// `app.kubernetes.io/*` labels name services too.
    pub well_known_labels: bool,
    /// Labels that become attributes.
    pub labels: Vec<String>,
}

/// Shares equal names and workloads, so that five thousand pods of fifty workloads hold fifty.
#[derive(Debug, Default)]
pub struct Shared {
    words: rustc_hash::FxHashSet<Arc<str>>,
    workloads: rustc_hash::FxHashSet<Arc<Workload>>,
}

/// Most shared names, and workloads; beyond it they are forgotten and shared anew.
const MAX_SHARED: usize = 32_768;

impl Shared {
    fn word(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.words.get(text) {
            return known.clone();
        }
        if self.words.len() >= MAX_SHARED {
            self.words.clear();
        }
        let new: Arc<str> = text.into();
        self.words.insert(new.clone());
        new
    }

    fn workload(&mut self, workload: Workload) -> Arc<Workload> {
        if let Some(known) = self.workloads.get(&workload) {
            return known.clone();
        }
        if self.workloads.len() >= MAX_SHARED {
            self.workloads.clear();
        }
        let new = Arc::new(workload);
        self.workloads.insert(new.clone());
        new
    }
}

/// A whole pod.
///
/// # Errors
/// The text is no pod.
pub fn pod(text: &str, naming: &Naming, shared: &mut Shared) -> serde_json::Result<Pod> {
    let object: PodObject = serde_json::from_str(text)?;
    let (meta, spec, status) = (&object.metadata, &object.spec, &object.status);
    let first = spec.containers.first();
    let version = first.and_then(|c| image(&c.image, "").tag);
    let workload = workload(meta, version, naming, shared);
    let origin = Origin {
        pod: Some(meta.name.as_str().into()),
        pod_uid: Some(meta.uid.as_str().into()),
        node: (!spec.node_name.is_empty()).then(|| shared.word(&spec.node_name)),
        workload: Some(workload),
        host_network: spec.host_network,
        ..Origin::default()
    };
    let mut containers = Vec::new();
    let all = status.container_statuses.iter().chain(&status.init_container_statuses);
    for c in all.chain(&status.ephemeral_container_statuses) {
        let named = spec.containers.iter().chain(&spec.init_containers).find(|s| s.name == c.name);
        let image = Arc::new(image(named.map_or(&c.image, |s| &s.image), &c.image_id));
        let last = c.last_state.terminated.as_ref().map(|t| t.container_id.as_str());
        for id in [Some(c.container_id.as_str()), last].into_iter().flatten() {
            // `containerd://<id>`; empty until it is made.
            let Some((_, id)) = id.split_once("://") else { continue };
            let id: Arc<str> = id.into();
            let origin = Origin {
                container_id: Some(id.clone()),
                container: Some(shared.word(&c.name)),
                image: Some(image.clone()),
                ..origin.clone()
            };
            containers.push((id, Arc::new(origin)));
        }
    }
    let addresses = if spec.host_network {
        Vec::new()
    } else {
        addresses(status.pod_ips.iter().map(|ip| ip.ip.as_str()).chain([status.pod_ip.as_str()]))
    };
    Ok(Pod {
        uid: meta.uid.as_str().into(),
        origin: Arc::new(origin),
        addresses,
        containers,
        created: created(meta),
        ended: matches!(status.phase.as_str(), "Succeeded" | "Failed"),
    })
}

/// A row of the table of pods; `None` for a row without its object.
///
/// # Errors
/// The text is no row.
pub fn pod_row(
    text: &str,
    columns: &[Column],
    naming: &Naming,
    shared: &mut Shared,
) -> serde_json::Result<Option<Pod>> {
    let row: Row = serde_json::from_str(text)?;
    let meta = &row.object.metadata;
    if meta.uid.is_empty() {
        return Ok(None);
    }
    let node = row.cell(columns, "Node").filter(|n| !n.starts_with('<'));
    let origin = Origin {
        pod: Some(meta.name.as_str().into()),
        pod_uid: Some(meta.uid.as_str().into()),
        node: node.map(|n| shared.word(n)),
        workload: Some(workload(meta, None, naming, shared)),
        ..Origin::default()
    };
    Ok(Some(Pod {
        uid: meta.uid.as_str().into(),
        origin: Arc::new(origin),
        addresses: addresses(row.cell(columns, "IP").into_iter()),
        containers: Vec::new(),
        created: created(meta),
        // What `kubectl get` shows of pods in phase Succeeded and Failed. A pod that only restarts shows
        // another word a moment later.
        ended: matches!(row.cell(columns, "Status"), Some("Completed" | "Succeeded" | "Failed" | "Evicted")),
    }))
}

/// Namespace, name and cluster addresses of a service.
///
/// # Errors
/// The text is no service.
pub fn service(text: &str) -> serde_json::Result<(Meta, Vec<IpAddr>)> {
    let object: ServiceObject = serde_json::from_str(text)?;
    let spec = &object.spec;
    let all = spec.cluster_ips.iter().chain([&spec.cluster_ip]).chain(&spec.external_ips);
    Ok((object.metadata, addresses(all.map(String::as_str))))
}

/// Name and addresses of a row of the table of nodes.
///
/// # Errors
/// The text is no row.
pub fn node_row(text: &str, columns: &[Column]) -> serde_json::Result<(Meta, Vec<IpAddr>)> {
    let row: Row = serde_json::from_str(text)?;
    let all = [row.cell(columns, "Internal-IP"), row.cell(columns, "External-IP")];
    let addresses = addresses(all.into_iter().flatten());
    Ok((row.object.metadata, addresses))
}

impl Row {
    fn cell(&self, columns: &[Column], name: &str) -> Option<&str> {
        let at = columns.iter().position(|c| c.name.eq_ignore_ascii_case(name))?;
        self.cells.get(at)?.as_str()
    }
}

/// Addresses without what is none (`None`, `<none>`, empty) and without repetition.
fn addresses<'a>(texts: impl Iterator<Item = &'a str>) -> Vec<IpAddr> {
    let mut found: Vec<IpAddr> = Vec::new();
    for address in texts.filter_map(|t| t.parse::<IpAddr>().ok()) {
        if !found.contains(&address) {
            found.push(address);
        }
    }
    found
}

/// The workload of a pod and its service attributes, in the order of the semantic conventions ("Specify
/// resource attributes using Kubernetes annotations"): annotation, well-known labels where asked for, what
/// controls the pod.
fn workload(meta: &Meta, image_tag: Option<Box<str>>, naming: &Naming, shared: &mut Shared) -> Arc<Workload> {
    let (kind, name) = controller(meta);
    let annotation = |key: &str| meta.annotations.get(&format!("resource.opentelemetry.io/{key}"));
    let label = |key: &str| meta.labels.get(key).filter(|_| naming.well_known_labels);
    let service = annotation("service.name")
        .or_else(|| label("app.kubernetes.io/instance"))
        .or_else(|| label("app.kubernetes.io/name"))
        .map_or(name.as_str(), String::as_str);
    let service_namespace = annotation("service.namespace").unwrap_or(&meta.namespace);
    let version = annotation("service.version")
        .or_else(|| label("app.kubernetes.io/version"))
        .map(|v| v.as_str().into())
        .or(image_tag);
    let asked = naming.labels.iter().take(MAX_LABELS);
    let labels = asked.filter_map(|k| Some((k.as_str().into(), meta.labels.get(k)?.as_str().into()))).collect();
    let workload = Workload {
        namespace: shared.word(&meta.namespace),
        kind,
        name: shared.word(&name),
        service: shared.word(service),
        service_namespace: shared.word(service_namespace),
        version,
        labels,
    };
    shared.workload(workload)
}

/// What controls a pod: the deployment behind a replica set, the cron job behind a job. Told by the names
/// that their controllers give, so that no right to read them is needed: a replica set is named
/// `<deployment>-<pod-template-hash>`, a job `<cron job>-<minutes since the epoch>`.
fn controller(meta: &Meta) -> (Kind, String) {
    let owners = &meta.owner_references;
    let Some(owner) = owners.iter().find(|o| o.controller).or_else(|| owners.first()) else {
        return (Kind::Pod, meta.name.clone());
    };
    match owner.kind.as_str() {
        "ReplicaSet" => {
            let hash = meta.labels.get("pod-template-hash");
            let deployment = hash.and_then(|h| owner.name.strip_suffix(h.as_str())?.strip_suffix('-'));
            deployment.map_or_else(|| (Kind::ReplicaSet, owner.name.clone()), |d| (Kind::Deployment, d.to_owned()))
        }
        "Job" => match owner.name.rsplit_once('-') {
            Some((cron, minutes)) if minutes.len() == 8 && minutes.bytes().all(|b| b.is_ascii_digit()) => {
                (Kind::CronJob, cron.to_owned())
            }
            _ => (Kind::Job, owner.name.clone()),
        },
        // A static pod is its node's; the mirror's name ends with the node's.
        "Node" => {
            let name = meta.name.strip_suffix(owner.name.as_str()).and_then(|n| n.strip_suffix('-'));
            (Kind::Pod, name.unwrap_or(&meta.name).to_owned())
        }
        other => (Kind::of(other), owner.name.clone()),
    }
}

/// `registry/name:tag@digest` and the runtime's `name@sha256:…`.
fn image(spec: &str, id: &str) -> Image {
    let name = spec.split('@').next().unwrap_or_default();
    // A colon after the last slash is a tag's; before it, a port's.
    let (name, tag) = match name.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => (name, Some(tag.into())),
        _ => (name, None),
    };
    let digest = id.split_once("://").map_or(id, |(_, rest)| rest);
    let digest = Some(digest).filter(|d| d.contains("sha256:"));
    Image { name: name.into(), tag, digest: digest.map(Into::into) }
}

/// Creation, ns since the epoch; 0 where it is missing.
fn created(meta: &Meta) -> u64 {
    meta.creation_timestamp.as_deref().and_then(seconds).unwrap_or(0) * 1_000_000_000
}

/// `2026-01-31T10:20:30Z`, as the API server writes times, in s since the epoch.
fn seconds(text: &str) -> Option<u64> {
    let number = |from: usize, to: usize| text.get(from..to)?.parse::<u64>().ok();
    let (year, month, day) = (number(0, 4)?, number(5, 7)?, number(8, 10)?);
    let (hour, minute, second) = (number(11, 13)?, number(14, 16)?, number(17, 19)?);
    if !(1970..=9999).contains(&year) || !(1..=12).contains(&month) || !text.ends_with('Z') {
        return None;
    }
    // Days from the civil calendar: years that begin in March (Hinnant, "chrono-compatible date algorithms").
    let y = if month <= 2 { year - 1 } else { year };
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let days = y * 365 + y / 4 - y / 100 + y / 400 + day_of_year - 719_468;
    Some(days * 86_400 + hour * 3_600 + minute * 60 + second)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const POD: &str = r#"{"metadata":{"name":"web-7d4f9c-x2x","namespace":"shop","uid":"u1","resourceVersion":"7",
        "creationTimestamp":"2026-01-31T10:20:30Z","labels":{"pod-template-hash":"7d4f9c","team":"a",
        "app.kubernetes.io/name":"frontend"},"annotations":{"resource.opentelemetry.io/service.namespace":"store"},
        "ownerReferences":[{"kind":"ReplicaSet","name":"web-7d4f9c","controller":true}],"managedFields":[{"x":[1]}]},
        "spec":{"nodeName":"n1","containers":[{"name":"app","image":"reg:5000/web:1.2","env":[]}]},
        "status":{"phase":"Running","podIP":"10.1.0.5","podIPs":[{"ip":"10.1.0.5"},{"ip":"fd00::5"}],
        "containerStatuses":[{"name":"app","image":"reg:5000/web:1.2","imageID":"reg:5000/web@sha256:ab",
        "containerID":"containerd://abc","lastState":{"terminated":{"containerID":"containerd://old"}}}]}}"#;

    #[test]
    fn a_pod_by_the_conventions() {
        let mut naming = Naming { labels: vec!["team".into(), "none".into()], ..Naming::default() };
        let found = pod(POD, &naming, &mut Shared::default()).expect("a pod");
        let w = found.origin.workload.clone().expect("a workload");
        assert_eq!((&w.kind, &*w.name, &*w.service), (&Kind::Deployment, "web", "web"));
        assert_eq!((&*w.namespace, &*w.service_namespace, w.version.as_deref()), ("shop", "store", Some("1.2")));
        assert_eq!(w.labels, [("team".into(), "a".into())]);
        assert_eq!((found.addresses.len(), found.created), (2, 1_769_854_830_000_000_000));
        let (ids, origins): (Vec<_>, Vec<_>) = found.containers.iter().cloned().unzip();
        assert_eq!(ids.iter().map(|i| &**i).collect::<Vec<_>>(), ["abc", "old"]);
        let image = origins[0].image.clone().expect("an image");
        assert_eq!((&*image.name, image.tag.as_deref()), ("reg:5000/web", Some("1.2")));
        assert_eq!(image.digest.as_deref(), Some("reg:5000/web@sha256:ab"));
        naming.well_known_labels = true;
        let w = pod(POD, &naming, &mut Shared::default()).expect("a pod").origin.workload.clone().expect("a workload");
        assert_eq!(&*w.service, "frontend");
        let host = POD.replace("\"nodeName\"", "\"hostNetwork\":true,\"nodeName\"");
        let host = pod(&host, &naming, &mut Shared::default()).expect("a pod");
        assert!(host.origin.host_network && host.addresses.is_empty(), "its address is the node's");
    }

    #[test]
    fn controllers() {
        let of = |kind: &str, name: &str, pod: &str| {
            let text = format!(
                r#"{{"metadata":{{"name":"{pod}","labels":{{"pod-template-hash":"77"}},
                "ownerReferences":[{{"kind":"x","name":"y"}},{{"kind":"{kind}","name":"{name}","controller":true}}]}}}}"#
            );
            let named: Named = serde_json::from_str(&text).expect("an object");
            let (kind, name) = controller(&named.metadata);
            format!("{}/{name}", kind.name())
        };
        assert_eq!(of("ReplicaSet", "web-77", "web-77-a"), "Deployment/web");
        assert_eq!(of("ReplicaSet", "bare", "bare-a"), "ReplicaSet/bare");
        assert_eq!(of("StatefulSet", "db", "db-0"), "StatefulSet/db");
        assert_eq!(of("Job", "nightly-29123456", "p"), "CronJob/nightly");
        assert_eq!(of("Job", "once-2", "p"), "Job/once-2");
        assert_eq!(of("Node", "n1", "etcd-n1"), "Pod/etcd");
        assert_eq!(of("Rollout", "r", "p"), "Rollout/r");
    }

    #[test]
    fn rows() {
        let columns = ["Name", "Internal-IP", "IP", "Node"].map(|name| Column { name: name.into() });
        let row =
            r#"{"cells":["p",null,"10.1.0.7","n2"],"object":{"metadata":{"name":"p","namespace":"a","uid":"u"}}}"#;
        let found = pod_row(row, &columns, &Naming::default(), &mut Shared::default()).expect("a row").expect("a pod");
        assert_eq!((found.origin.node.as_deref(), found.addresses.len()), (Some("n2"), 1));
        let none = row.replace("10.1.0.7", "<none>").replace("n2", "<none>");
        let found =
            pod_row(&none, &columns, &Naming::default(), &mut Shared::default()).expect("a row").expect("a pod");
        assert_eq!((found.origin.node.as_deref(), found.addresses.len()), (None, 0));
        let (meta, addresses) =
            node_row(r#"{"cells":["n2","192.0.2.1"],"object":{"metadata":{"name":"n2"}}}"#, &columns).expect("a row");
        assert_eq!((meta.name.as_str(), addresses.len()), ("n2", 1));
        let (_, addresses) = service(r#"{"metadata":{"name":"s"},"spec":{"clusterIP":"None","clusterIPs":["None"]}}"#)
            .expect("a service");
        assert!(addresses.is_empty(), "a headless service has none");
    }

    #[test]
    fn times() {
        assert_eq!(seconds("1970-01-01T00:00:00Z"), Some(0));
        assert_eq!(seconds("2000-02-29T12:00:00Z"), Some(951_825_600));
        assert_eq!(seconds("2026-11-26T00:00:01Z"), Some(1_795_651_201));
        assert_eq!(seconds("yesterday"), None);
    }

    proptest! {
        #[test]
        fn never_panics(text in ".{0,200}", at in 0_usize..900) {
            let (naming, mut shared) = (Naming::default(), Shared::default());
            let _ = (pod(&text, &naming, &mut shared), service(&text), node_row(&text, &[]), seconds(&text));
            let cut: String = POD.chars().take(at).collect();
            let _ = pod(&cut, &naming, &mut shared);
            let _ = image(&text, &text);
        }
    }
}
