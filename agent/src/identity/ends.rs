//! Names both ends of exchanges: container and pod of the end that was seen, pod, service or node of the
//! other. What the API server has not told yet is waited for, shortly, so that the first exchange of a pod
//! is counted under its name and not under its container.
//!
//! Nothing is lost here: what cannot be named in time goes on without, and is counted ([`Unnamed`]). While the API
//! server is away nothing waits. At the agent's own start everything waits for the first lists, [`START`] at most: a
//! restart loses no names.

use std::{
    collections::VecDeque,
    net::IpAddr,
    sync::{Arc, PoisonError, RwLock},
};

use rustc_hash::FxHashMap;

use super::pods::{Found, Pods, Source};
use crate::{
    exchange::{Exchange, Origin, Peer, Side},
    stats::{Stats, Unnamed},
};

/// Most exchanges that wait for a name.
pub const MAX_WAITING: usize = 4_096;
/// How long one waits, ns: a watch tells of a pod some 0.1 s after the API server does.
pub const WAIT: u64 = 2_000_000_000;
/// How long the first lists are waited for, ns.
pub const START: u64 = 10_000_000_000;
/// Most addresses that are remembered as nobody's.
const MAX_STRANGERS: usize = 8_192;
/// For how long, ns.
const STRANGER_FOR: u64 = 30_000_000_000;

/// Names ends.
pub struct Ends {
    pods: Arc<RwLock<Pods>>,
    waiting: VecDeque<(u64, Exchange)>,
    /// Addresses that look like a pod's, for which nothing was told in time.
    strangers: FxHashMap<IpAddr, u64>,
    /// Until when, ns since the epoch, which watches' first lists are waited for.
    start: Option<(u64, &'static [Source])>,
    /// State of the table when what waits was last looked up.
    changes: u64,
    stats: Arc<Stats>,
}

/// What is missing of an exchange.
#[derive(Default, Clone, Copy)]
struct Missing {
    own: bool,
    peer: Option<IpAddr>,
}

impl Missing {
    /// What of an exchange has no name yet that a pod could give it.
    fn of(exchange: &Exchange) -> Self {
        let peer = if exchange.side == Side::Server { &exchange.client } else { &exchange.server };
        let address = if let Peer::Ip(address) = peer { Some(address.ip()) } else { None };
        let origin = exchange.origin.as_ref();
        Self {
            own: origin.is_some_and(|o| o.container_id.is_some() && o.pod.is_none() && o.pod_uid.is_some()),
            peer: address.filter(|_| exchange.peer.is_none()),
        }
    }
}

impl Ends {
    /// Asks `pods`.
    #[must_use]
    pub fn new(pods: Arc<RwLock<Pods>>, stats: Arc<Stats>) -> Self {
        Self { pods, waiting: VecDeque::new(), strangers: FxHashMap::default(), start: None, changes: 0, stats }
    }

    /// From now on, `now`, the first lists of these watches are waited for.
    #[must_use]
    pub fn starting(mut self, sources: &'static [Source], now: u64) -> Self {
        self.start = Some((now + START, sources));
        self
    }

    /// Names the ends of an exchange. False when it was taken, to wait for what the API server says: see
    /// [`Ends::due`]. `now` is ns since the epoch.
    pub fn name(&mut self, exchange: &mut Exchange, now: u64) -> bool {
        let (missing, until) = {
            let pods = self.pods.read().unwrap_or_else(PoisonError::into_inner);
            match self.start {
                Some((until, sources)) if is_starting(&pods, sources, until, now) => {
                    (Missing::of(exchange), until.max(now + WAIT))
                }
                _ => (look_up(&pods, exchange, !pods.is_live(Source::NodePods)), now + WAIT),
            }
        };
        let stranger = missing.peer.is_some_and(|a| self.strangers.get(&a).is_some_and(|until| *until > now));
        if !missing.own && (missing.peer.is_none() || stranger) {
            self.count(exchange);
            return true;
        }
        if self.waiting.len() >= MAX_WAITING {
            self.stats.unnamed(Unnamed::WaitingFull, 1);
            return true;
        }
        self.waiting.push_back((until, std::mem::take(exchange)));
        false
    }

    /// What waited and is named now, or waited long enough.
    pub fn due(&mut self, now: u64) -> Vec<Exchange> {
        let pods = self.pods.read().unwrap_or_else(PoisonError::into_inner);
        let changed = pods.changes != self.changes;
        self.changes = pods.changes;
        if let Some((until, sources)) = self.start {
            if is_starting(&pods, sources, until, now) {
                return Vec::new();
            }
            self.start = None;
            for (until, _) in &mut self.waiting {
                *until = (*until).min(now.saturating_add(WAIT));
            }
        }
        if self.waiting.front().is_none_or(|(until, _)| *until > now) && !changed {
            return Vec::new();
        }
        let mut due = Vec::new();
        let mut waiting = VecDeque::new();
        for (until, mut exchange) in std::mem::take(&mut self.waiting) {
            let missing = look_up(&pods, &mut exchange, until <= now);
            if !missing.own && missing.peer.is_none() {
                self.count(&exchange);
                due.push(exchange);
            } else if until > now {
                waiting.push_back((until, exchange));
            } else {
                self.count(&exchange);
                if let Some(address) = missing.peer {
                    self.stats.unnamed(Unnamed::Peer, 1);
                    if self.strangers.len() >= MAX_STRANGERS {
                        self.strangers.retain(|_, until| *until > now);
                    }
                    if self.strangers.len() < MAX_STRANGERS {
                        self.strangers.insert(address, now + STRANGER_FOR);
                    }
                }
                due.push(exchange);
            }
        }
        self.waiting = waiting;
        due
    }

    /// An exchange goes on: with a name, or counted. Also while the API server is away, when nothing is missed that could come.
    fn count(&self, exchange: &Exchange) {
        if Missing::of(exchange).own {
            self.stats.unnamed(Unnamed::Pod, 1);
        }
    }

    /// Everything that waits, at the agent's own end.
    pub fn flush(&mut self) -> Vec<Exchange> {
        self.due(u64::MAX)
    }
}

/// Not all of these watches have told what is there, and there is time left.
fn is_starting(pods: &Pods, sources: &[Source], until: u64, now: u64) -> bool {
    now < until && !sources.iter().all(|s| pods.has_told(*s))
}

/// `last`: nothing will be waited for after this.
fn look_up(pods: &Pods, exchange: &mut Exchange, last: bool) -> Missing {
    let mut missing = Missing::default();
    if let Some(origin) = &exchange.origin
        && let Some(id) = &origin.container_id
        && origin.pod.is_none()
    {
        match pods.container(id, origin.pod_uid.as_deref()) {
            Some(found) if origin.named => exchange.origin = Some(Arc::new(Origin { named: true, ..(*found).clone() })),
            Some(found) => {
                if let Some(workload) = found.workload.as_ref().filter(|w| !w.service.is_empty()) {
                    exchange.service = workload.service.clone();
                }
                exchange.origin = Some(found);
            }
            // A container of a pod; others are none of Kubernetes' business.
            None => missing.own = origin.pod_uid.is_some() && pods.is_live(Source::NodePods),
        }
    }
    if exchange.peer.is_none() {
        let peer = if exchange.side == Side::Server { &exchange.client } else { &exchange.server };
        if let Peer::Ip(address) = peer {
            let address = address.ip();
            if address.is_loopback() {
                let same = exchange.origin.as_ref().filter(|o| !o.host_network).and_then(|o| o.pod_uid.as_deref());
                exchange.peer = same.and_then(|uid| pods.by_uid(uid));
            } else {
                match pods.at(address, exchange.ts) {
                    Found::Known(found) => exchange.peer = Some(found),
                    Found::Likely(found) if last => exchange.peer = Some(found),
                    Found::Likely(_) | Found::Perhaps => missing.peer = Some(address),
                    Found::Outside => {}
                }
            }
        }
    }
    if exchange.caller.is_none()
        && exchange.side == Side::Server
        && let Some(workload) = exchange.peer.as_ref().and_then(|p| p.workload.as_ref())
    {
        exchange.caller = Some(workload.to_string().into());
    }
    missing
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        exchange::{Kind, Workload},
        identity::pods::Pod,
    };

    const S: u64 = 1_000_000_000;

    fn pod(name: &str, address: &str, container: &str) -> Pod {
        let workload = Arc::new(Workload {
            namespace: "shop".into(),
            kind: Kind::Deployment,
            name: name.into(),
            service: format!("{name}-svc").into(),
            service_namespace: "shop".into(),
            version: None,
            labels: Vec::new(),
        });
        let uid: Arc<str> = name.into();
        let origin = Origin {
            pod: Some(uid.clone()),
            pod_uid: Some(uid.clone()),
            workload: Some(workload),
            ..Origin::default()
        };
        let id: Arc<str> = container.into();
        let of = Arc::new(Origin { container_id: Some(id.clone()), ..origin.clone() });
        let addresses = vec![address.parse().expect("an address")];
        Pod { uid, origin: Arc::new(origin), addresses, containers: vec![(id, of)], created: 0, ended: false }
    }

    fn exchange(container: &str, client: &str) -> Exchange {
        Exchange {
            ts: 100 * S,
            service: "python3".into(),
            origin: Some(Arc::new(Origin::of_container(container, Some("uid")))),
            client: Peer::parse(client),
            ..Exchange::default()
        }
    }

    fn start() -> (Arc<RwLock<Pods>>, Arc<Stats>, Ends) {
        let (pods, stats) = (Arc::new(RwLock::new(Pods::default())), Arc::new(Stats::default()));
        let ends = Ends::new(pods.clone(), stats.clone());
        (pods, stats, ends)
    }

    #[test]
    fn waits_for_the_api_and_no_longer_than_it_should() {
        let (pods, stats, mut ends) = start();
        assert!(ends.name(&mut exchange("c1", "10.0.0.9:5"), 100 * S), "no API: nothing waits");
        pods.write().expect("whole").set_live(Source::NodePods, true);
        assert!(!ends.name(&mut exchange("c1", "10.0.0.9:5"), 100 * S));
        assert!(ends.due(100 * S + S).is_empty());
        pods.write().expect("whole").pod(Source::NodePods, pod("web", "10.0.0.1", "c1"), 0);
        let named = ends.due(100 * S + S);
        // The address beside the pod's may be a pod's too: that is waited for still.
        assert!(named.is_empty());
        pods.write().expect("whole").pod(Source::OtherPods, pod("job", "10.0.0.9", "x"), 0);
        let named = ends.due(100 * S + S);
        let first = named.first().expect("named");
        assert_eq!((&*first.service, first.caller.as_deref()), ("web-svc", Some("shop/job")));
        assert_eq!(first.origin.as_ref().and_then(|o| o.pod.as_deref()), Some("web"));
        assert!(!ends.name(&mut exchange("c2", "10.0.0.7:5"), 100 * S));
        let unnamed = ends.due(103 * S);
        assert_eq!((unnamed.len(), &*unnamed[0].service), (1, "python3"));
        let totals = stats.totals();
        assert_eq!((totals.unnamed["pod"], totals.unnamed["peer"]), (2, 1));
        assert!(ends.name(&mut exchange("c1", "10.0.0.7:5"), 104 * S), "a stranger is not waited for again");
    }

    #[test]
    fn first_lists_are_waited_for() {
        let (pods, stats, ends) = start();
        let mut ends = ends.starting(&[Source::NodePods, Source::OtherPods], 100 * S);
        assert!(!ends.name(&mut exchange("c1", "10.0.0.9:5"), 100 * S));
        pods.write().expect("whole").pod(Source::NodePods, pod("web", "10.0.0.1", "c1"), 0);
        pods.write().expect("whole").set_live(Source::NodePods, true);
        assert!(ends.due(105 * S).is_empty(), "the other end may still be told");
        pods.write().expect("whole").pod(Source::OtherPods, pod("job", "10.0.0.9", "x"), 0);
        pods.write().expect("whole").set_live(Source::OtherPods, true);
        let named = ends.due(105 * S);
        let first = named.first().expect("named");
        assert_eq!((&*first.service, first.caller.as_deref()), ("web-svc", Some("shop/job")));
        assert_eq!(stats.totals().unnamed.values().sum::<u64>(), 0);

        let (_, stats, ends) = start();
        let mut ends = ends.starting(&[Source::NodePods], 100 * S);
        assert!(!ends.name(&mut exchange("c1", "10.0.0.9:5"), 100 * S));
        assert!(ends.due(109 * S).is_empty());
        assert_eq!(ends.due(111 * S).len(), 1, "no longer than that");
        assert!(ends.name(&mut exchange("c1", "10.0.0.9:5"), 112 * S));
        assert_eq!(stats.totals().unnamed["pod"], 2);
    }

    #[test]
    fn names_that_processes_give_themselves_stay() {
        let (pods, _, mut ends) = start();
        pods.write().expect("whole").pod(Source::NodePods, pod("web", "10.0.0.1", "c1"), 0);
        let mut own = exchange("c1", "127.0.0.1:5");
        own.origin = own.origin.map(|o| Arc::new(Origin { named: true, ..(*o).clone() }));
        assert!(ends.name(&mut own, 100 * S), "known");
        assert_eq!(&*own.service, "python3");
        assert_eq!(own.peer.expect("the pod itself").pod.as_deref(), Some("web"));
    }

    #[test]
    fn what_waits_is_bounded() {
        let (pods, stats, mut ends) = start();
        pods.write().expect("whole").set_live(Source::NodePods, true);
        let passed = (0..MAX_WAITING + 5).filter(|_| ends.name(&mut exchange("c", "9.9.9.9:1"), 0)).count();
        assert_eq!((passed, ends.flush().len(), stats.totals().unnamed["waiting_full"]), (5, MAX_WAITING, 5));
    }
}
