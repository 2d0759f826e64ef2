//! What runs where in the cluster: container id -> pod, address at a time -> pod, service or node. A table
//! over values: `kubernetes` fills it from the API server, `pipeline` asks it.
//!
//! An address belongs to one pod after another, within a second of each other at times. Meant is the pod
//! that was known to hold it at the time of the exchange; else, since the API server tells late and creation
//! times are whole seconds, the one created last of those that may have held it then. A pod that ran to its
//! end holds nothing any more, though it is listed with its address until it is deleted. A node's own
//! address is the node's: its host-network pods share it.
//!
//! Bounds: [`MAX_PODS`], [`MAX_SERVICES`], [`MAX_NODES`]; what does not fit is refused and counted.

use std::{collections::HashMap, net::IpAddr, sync::Arc};

use rustc_hash::{FxHashMap, FxHashSet};

use crate::exchange::{Kind, Origin, Workload};

/// Most pods that are kept, those that are gone for less than [`GRACE`] included.
pub const MAX_PODS: usize = 150_000;
/// Most services.
pub const MAX_SERVICES: usize = 20_000;
/// Most nodes.
pub const MAX_NODES: usize = 10_000;
/// Most containers of one pod.
pub const MAX_CONTAINERS: usize = 64;
/// Most networks in which pods were seen; addresses of others are not waited for.
pub const MAX_NETWORKS: usize = 16_384;
/// A pod that is gone keeps its containers and addresses for this long, ns: its last exchanges end, and
/// are read, after it.
pub const GRACE: u64 = 60_000_000_000;
/// Clocks of API server and node differ by up to this, ns; creation times are whole seconds besides.
const SKEW: u64 = 3_000_000_000;

/// One pod, as an API server told.
#[derive(Debug, Clone)]
pub struct Pod {
    /// UID.
    pub uid: Arc<str>,
    /// Name, namespace, workload and node. Containers are [`Pod::containers`].
    pub origin: Arc<Origin>,
    /// Its addresses; none for host-network pods.
    pub addresses: Vec<IpAddr>,
    /// Its containers: id and the whole origin. Only of this node's pods.
    pub containers: Vec<(Arc<str>, Arc<Origin>)>,
    /// Creation, ns since the epoch.
    pub created: u64,
    /// It ran to its end.
    pub ended: bool,
}

/// What holds addresses beside pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fixed {
    /// Cluster addresses of services.
    Service,
    /// Addresses of nodes.
    Node,
}

/// One of the watches: what it tells is whole once it listed, and current while it is connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the variants say it")]
pub enum Source {
    /// Pods of this node.
    NodePods,
    /// Pods of other nodes.
    OtherPods,
    Services,
    Nodes,
}

impl Source {
    /// Every one.
    pub const ALL: [Self; 4] = [Self::NodePods, Self::OtherPods, Self::Services, Self::Nodes];

    /// In output and metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::NodePods => "node_pods",
            Self::OtherPods => "other_pods",
            Self::Services => "services",
            Self::Nodes => "nodes",
        }
    }
}

/// The table.
#[derive(Default)]
pub struct Pods {
    pods: FxHashMap<Arc<str>, Known>,
    containers: FxHashMap<Arc<str>, Arc<Origin>>,
    /// Pods that hold or held an address, the one created last at the end.
    addresses: FxHashMap<IpAddr, Vec<Arc<str>>>,
    fixed: FxHashMap<IpAddr, (Fixed, Arc<Origin>)>,
    /// Addresses of a service or node, by name.
    holders: HashMap<(Fixed, Arc<str>), Vec<IpAddr>>,
    /// Networks in which pods were seen: /16 and /64.
    near: FxHashSet<IpAddr>,
    live: [bool; Source::ALL.len()],
    /// Was connected once: what was there at the start is known.
    told: [bool; Source::ALL.len()],
    /// Pods that are gone, in that order: when to forget them.
    gone: std::collections::VecDeque<(u64, Arc<str>)>,
    /// Objects that did not fit.
    pub refused: u64,
    /// Changes so far: what was unknown may be known when this moved.
    pub changes: u64,
}

struct Known {
    pod: Pod,
    source: Source,
    /// When it was known to hold its addresses first, ns since the epoch.
    seen: u64,
    /// When it ended or was deleted.
    ended: Option<u64>,
    deleted: bool,
}

/// What an address is, at a time.
#[derive(Debug, Clone, PartialEq)]
pub enum Found {
    /// It belongs to this.
    Known(Arc<Origin>),
    /// This held it until a moment before; another may have it now, of which the API server tells late.
    Likely(Arc<Origin>),
    /// Pods have addresses like this, and the table may be a moment late.
    Perhaps,
    /// It belongs to nothing in the cluster.
    Outside,
}

impl Pods {
    /// Adds a pod, or what changed of it, as told at `now`, ns since the epoch.
    pub fn pod(&mut self, source: Source, pod: Pod, now: u64) {
        self.changes += 1;
        if !self.pods.contains_key(&pod.uid) && self.pods.len() >= MAX_PODS {
            self.refused += 1;
            return;
        }
        for (id, origin) in pod.containers.iter().take(MAX_CONTAINERS) {
            self.containers.insert(id.clone(), origin.clone());
        }
        let mut pod = pod;
        pod.containers.truncate(MAX_CONTAINERS);
        let (mut seen, mut ended) = (now, pod.ended.then_some(now));
        if let Some(old) = self.pods.get(&pod.uid) {
            let (addresses, containers) = (old.pod.addresses.clone(), old.pod.containers.clone());
            if !addresses.is_empty() {
                seen = old.seen;
            }
            ended = if pod.ended { old.ended.or(ended) } else { None };
            for address in addresses.iter().filter(|a| !pod.addresses.contains(a)) {
                // A finished pod has no address in some versions of the API; its exchanges still do.
                if !pod.addresses.is_empty() {
                    self.release(*address, &pod.uid);
                }
            }
            if pod.addresses.is_empty() {
                pod.addresses = addresses;
            }
            // A restarted container has another id; the old one may still have exchanges under way.
            for (id, origin) in containers {
                if !pod.containers.iter().any(|(new, _)| *new == id) && pod.containers.len() < MAX_CONTAINERS {
                    pod.containers.push((id, origin));
                } else if !pod.containers.iter().any(|(new, _)| *new == id) {
                    self.containers.remove(&id);
                }
            }
        }
        for &address in &pod.addresses {
            if self.near.len() < MAX_NETWORKS {
                self.near.insert(network(address));
            }
            let holders = self.addresses.entry(address).or_default();
            if !holders.contains(&pod.uid) {
                let created = pod.created;
                let pods = &self.pods;
                let at = holders.partition_point(|uid| pods.get(uid).is_none_or(|k| k.pod.created <= created));
                holders.insert(at, pod.uid.clone());
            }
        }
        self.pods.insert(pod.uid.clone(), Known { pod, source, seen, ended, deleted: false });
    }

    /// A pod was deleted at `now`, ns since the epoch.
    pub fn pod_gone(&mut self, uid: &str, now: u64) {
        let Some(known) = self.pods.get_mut(uid) else { return };
        if !known.deleted {
            known.deleted = true;
            known.ended.get_or_insert(now);
            self.gone.push_back((now + GRACE, known.pod.uid.clone()));
        }
    }

    /// Addresses of a service or node, or what changed of them; none when it is gone.
    pub fn fixed(&mut self, kind: Fixed, name: &Arc<str>, addresses: Vec<IpAddr>, origin: &Arc<Origin>) {
        self.changes += 1;
        let key = (kind, name.clone());
        for old in self.holders.remove(&key).unwrap_or_default() {
            if self.fixed.get(&old).is_some_and(|(k, o)| *k == kind && o.workload == origin.workload) {
                self.fixed.remove(&old);
            }
        }
        if addresses.is_empty() {
            return;
        }
        let most = if kind == Fixed::Service { MAX_SERVICES } else { MAX_NODES };
        if self.holders.keys().filter(|(k, _)| *k == kind).take(most).count() >= most {
            self.refused += 1;
            return;
        }
        for address in &addresses {
            self.fixed.insert(*address, (kind, origin.clone()));
        }
        self.holders.insert(key, addresses);
    }

    /// A list of `source` is complete: what it told of before and that is not in `present` is gone.
    pub fn listed(&mut self, source: Source, present: &FxHashSet<Arc<str>>, now: u64) {
        self.changes += 1;
        match source {
            Source::NodePods | Source::OtherPods => {
                let gone: Vec<_> = self
                    .pods
                    .iter()
                    .filter(|(uid, k)| k.source == source && !k.deleted && !present.contains(*uid))
                    .map(|(uid, _)| uid.clone())
                    .collect();
                for uid in gone {
                    self.pod_gone(&uid, now);
                }
            }
            Source::Services | Source::Nodes => {
                let kind = if source == Source::Services { Fixed::Service } else { Fixed::Node };
                let gone: Vec<_> =
                    self.holders.keys().filter(|(k, name)| *k == kind && !present.contains(name)).cloned().collect();
                for key in gone {
                    for address in self.holders.remove(&key).unwrap_or_default() {
                        if self.fixed.get(&address).is_some_and(|(k, _)| *k == kind) {
                            self.fixed.remove(&address);
                        }
                    }
                }
            }
        }
    }

    /// A watch is connected, or not.
    pub fn set_live(&mut self, source: Source, live: bool) {
        self.live[source as usize] = live;
        self.told[source as usize] |= live;
        self.changes += 1;
    }

    /// Is this watch connected?
    #[must_use]
    pub fn is_live(&self, source: Source) -> bool {
        self.live[source as usize]
    }

    /// Was this watch connected once?
    #[must_use]
    pub fn has_told(&self, source: Source) -> bool {
        self.told[source as usize]
    }

    /// Where a container runs. `pod_uid` helps where the API server tells of the pod before its container.
    #[must_use]
    pub fn container(&self, id: &str, pod_uid: Option<&str>) -> Option<Arc<Origin>> {
        if let Some(origin) = self.containers.get(id) {
            return Some(origin.clone());
        }
        let known = self.pods.get(pod_uid?)?;
        Some(Arc::new(Origin { container_id: Some(id.into()), ..(*known.pod.origin).clone() }))
    }

    /// The pod itself, without a container.
    #[must_use]
    pub fn by_uid(&self, uid: &str) -> Option<Arc<Origin>> {
        self.pods.get(uid).map(|k| k.pod.origin.clone())
    }

    /// What held `address` at `ts`, ns since the epoch.
    #[must_use]
    pub fn at(&self, address: IpAddr, ts: u64) -> Found {
        let address = address.to_canonical();
        if let Some((_, origin)) = self.fixed.get(&address) {
            return Found::Known(origin.clone());
        }
        let holders = self.addresses.get(&address).map(Vec::as_slice).unwrap_or_default();
        let known = || holders.iter().rev().filter_map(|uid| self.pods.get(uid));
        let there = |k: &&Known| k.ended.is_none_or(|at| ts <= at);
        let created = |k: &&Known| k.pod.created <= ts.saturating_add(SKEW);
        let seen = known().find(|k| there(k) && k.pod.created <= ts && k.seen <= ts);
        if let Some(known) = seen.or_else(|| known().find(|k| there(k) && created(k))) {
            return Found::Known(known.pod.origin.clone());
        }
        let just_ended = |k: &&Known| created(k) && k.ended.is_some_and(|at| ts <= at.saturating_add(SKEW));
        if let Some(known) = known().find(just_ended) {
            return Found::Likely(known.pod.origin.clone());
        }
        let told = self.live[Source::NodePods as usize] || self.live[Source::OtherPods as usize];
        if told && self.near.contains(&network(address)) { Found::Perhaps } else { Found::Outside }
    }

    /// Forgets what is gone for longer than [`GRACE`].
    pub fn sweep(&mut self, now: u64) {
        while let Some((at, uid)) = self.gone.front()
            && *at <= now
        {
            let uid = uid.clone();
            self.gone.pop_front();
            // It may have come back meanwhile: a list that was older than a watch.
            if self.pods.get(&uid).is_none_or(|k| !k.deleted) {
                continue;
            }
            if let Some(known) = self.pods.remove(&uid) {
                for address in known.pod.addresses {
                    self.release(address, &uid);
                }
                for (id, _) in known.pod.containers {
                    self.containers.remove(&id);
                }
            }
        }
    }

    /// Pods that are kept.
    #[must_use]
    pub fn len(&self) -> usize {
        self.pods.len()
    }

    /// True when there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pods.is_empty()
    }

    fn release(&mut self, address: IpAddr, uid: &str) {
        if let Some(holders) = self.addresses.get_mut(&address) {
            holders.retain(|h| **h != *uid);
            if holders.is_empty() {
                self.addresses.remove(&address);
            }
        }
    }
}

/// The network in which an address is taken for a pod's, when pods were seen there.
fn network(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(a) => IpAddr::from([a.octets()[0], a.octets()[1], 0, 0]),
        IpAddr::V6(a) => IpAddr::from((a.to_bits() >> 64 << 64).to_be_bytes()),
    }
}

/// The origin of a service's or node's address.
#[must_use]
pub fn fixed_origin(kind: Kind, namespace: &Arc<str>, name: &Arc<str>) -> Arc<Origin> {
    let node = (kind == Kind::Node).then(|| name.clone());
    let workload = Workload {
        namespace: namespace.clone(),
        kind,
        name: name.clone(),
        service: name.clone(),
        service_namespace: namespace.clone(),
        version: None,
        labels: Vec::new(),
    };
    Arc::new(Origin { node, workload: Some(Arc::new(workload)), ..Origin::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = 1_000_000_000;

    fn pod(uid: &str, address: &str, created: u64) -> Pod {
        let uid: Arc<str> = uid.into();
        let origin = Arc::new(Origin { pod: Some(uid.clone()), pod_uid: Some(uid.clone()), ..Origin::default() });
        let id: Arc<str> = format!("id-{uid}").into();
        let container = Arc::new(Origin { container_id: Some(id.clone()), ..(*origin).clone() });
        let addresses = address.parse().into_iter().collect();
        Pod { uid, origin, addresses, containers: vec![(id, container)], created, ended: false }
    }

    fn name(found: Found) -> String {
        match found {
            Found::Known(o) => {
                o.pod.clone().or_else(|| o.workload.as_ref().map(|w| w.name.clone())).expect("named").to_string()
            }
            Found::Likely(o) => format!("{}?", o.pod.as_deref().unwrap_or_default()),
            Found::Perhaps => "?".into(),
            Found::Outside => "-".into(),
        }
    }

    #[test]
    fn an_address_is_whose_it_was_at_the_time() {
        let mut pods = Pods::default();
        let ip = "10.1.2.3".parse().expect("an address");
        pods.set_live(Source::OtherPods, true);
        assert_eq!(name(pods.at(ip, 0)), "-");
        pods.pod(Source::OtherPods, pod("a", "10.1.2.3", 100 * S), 100 * S);
        pods.pod_gone("a", 200 * S);
        pods.pod(Source::OtherPods, pod("b", "10.1.2.3", 210 * S), 211 * S);
        assert_eq!(name(pods.at(ip, 150 * S)), "a");
        assert_eq!(name(pods.at(ip, 202 * S)), "a?");
        assert_eq!(name(pods.at(ip, 215 * S)), "b");
        assert_eq!(name(pods.at(ip, 50 * S)), "?");
        assert_eq!(name(pods.at("10.1.9.9".parse().expect("an address"), 150 * S)), "?");
        assert_eq!(name(pods.at("9.9.9.9".parse().expect("an address"), 150 * S)), "-");
        pods.sweep(200 * S + GRACE);
        assert_eq!((pods.len(), name(pods.at(ip, 150 * S)).as_str()), (1, "?"));
        // Told in the other order, as after a new list.
        let mut pods = Pods::default();
        pods.pod(Source::OtherPods, pod("b", "10.1.2.3", 210 * S), 211 * S);
        pods.pod(Source::OtherPods, pod("a", "10.1.2.3", 100 * S), 100 * S);
        assert_eq!(name(pods.at(ip, 215 * S)), "b");
    }

    #[test]
    fn addresses_that_change_hands_within_a_second() {
        let mut pods = Pods::default();
        let ip = "10.1.2.3".parse().expect("an address");
        let ms = |ms: u64| 100 * S + ms * 1_000_000;
        pods.pod(Source::OtherPods, pod("a", "10.1.2.3", 99 * S), 99 * S);
        pods.pod(Source::OtherPods, Pod { ended: true, ..pod("a", "10.1.2.3", 99 * S) }, ms(300));
        // Created in the same whole second, told of late.
        pods.pod(Source::OtherPods, pod("b", "10.1.2.3", 100 * S), ms(600));
        assert_eq!(name(pods.at(ip, ms(200))), "a");
        assert_eq!(name(pods.at(ip, ms(450))), "b", "before it was told of");
        assert_eq!(name(pods.at(ip, ms(700))), "b");
        pods.pod_gone("a", ms(800));
        assert_eq!(name(pods.at(ip, ms(700))), "b");
    }

    #[test]
    fn lists_end_what_they_do_not_name() {
        let mut pods = Pods::default();
        pods.pod(Source::NodePods, pod("a", "10.1.0.1", 0), 0);
        pods.pod(Source::OtherPods, pod("b", "10.1.0.2", 0), 0);
        pods.listed(Source::NodePods, &FxHashSet::default(), 10 * S);
        assert_eq!(name(pods.at("10.1.0.1".parse().expect("an address"), 20 * S)), "-");
        assert_eq!(name(pods.at("10.1.0.2".parse().expect("an address"), 20 * S)), "b");
        assert!(pods.container("id-a", None).is_some(), "its exchanges may still end");
        pods.sweep(10 * S + GRACE);
        assert!(pods.container("id-a", None).is_none() && pods.container("id-b", None).is_some());
        let (ns, node, ip) = ("".into(), "n1".into(), "10.1.0.2".parse().expect("an address"));
        pods.fixed(Fixed::Node, &node, vec![ip], &fixed_origin(Kind::Node, &ns, &node));
        assert_eq!(name(pods.at(ip, 20 * S)), "n1");
        pods.listed(Source::Nodes, &FxHashSet::default(), 0);
        assert_eq!(name(pods.at(ip, 20 * S)), "b");
    }

    #[test]
    fn a_container_is_known_by_its_pod_before_the_api_names_it() {
        let mut pods = Pods::default();
        pods.pod(Source::NodePods, pod("a", "", 0), 0);
        let origin = pods.container("new", Some("a")).expect("known by its pod");
        assert_eq!((origin.pod.as_deref(), origin.container_id.as_deref()), (Some("a"), Some("new")));
        assert!(pods.container("new", Some("b")).is_none() && pods.container("new", None).is_none());
    }

    #[test]
    fn bounded_and_nothing_left_behind() {
        let mut pods = Pods::default();
        for i in 0..MAX_PODS + 10 {
            let mut p = pod(&i.to_string(), "10.9.9.9", i as u64);
            p.containers.clear();
            p.addresses.clear();
            pods.pod(Source::OtherPods, p, 0);
        }
        assert_eq!((pods.len(), pods.refused), (MAX_PODS, 10));
        pods.listed(Source::OtherPods, &FxHashSet::default(), 0);
        pods.sweep(GRACE);
        assert!(pods.is_empty() && pods.addresses.is_empty() && pods.containers.is_empty() && pods.gone.is_empty());
    }
}
