//! What routes, endpoints and detectors hold stays flat, whoever comes: two thousand endpoints and fifty thousand
//! principals first, then a flood of principals that come once. Counted by the allocator of this program, in which
//! this is the only test. A debug build floods with 400,000; the whole flood, with its figures:
//! `cargo test --release -p apiscope --test flood -- --nocapture`.

mod counting;

use std::sync::atomic::Ordering;

use apiscope::{
    aggregate::Endpoints,
    config,
    detect::{Engine, sketch::mix},
    exchange::{Auth, Exchange, Method, Peer, Scheme, TlsVersion},
    params::ParamHasher,
    route::Routes,
};
use counting::ALLOCATOR;

const ENDPOINTS: u64 = 2_000;
const PRINCIPALS: u64 = 50_000;
/// Of each principal, before the flood.
const EACH: u64 = if cfg!(debug_assertions) { 3 } else { 60 };
const FLOOD: u64 = if cfg!(debug_assertions) { 400_000 } else { 10_000_000 };
/// Exchanges a second: hours pass during the flood.
const RATE: u64 = if cfg!(debug_assertions) { 20 } else { 2_000 };

/// Everything between capture and export.
struct Node {
    routes: Routes,
    endpoints: Endpoints,
    engine: Engine,
    hasher: ParamHasher,
    sent: u64,
}

impl Node {
    fn take(&mut self, who: u64) {
        let n = self.sent;
        self.sent += 1;
        let place = mix(n) % ENDPOINTS;
        let x = Exchange {
            ts: 1_700_000_000_000_000_000 + n * (1_000_000_000 / RATE),
            duration_ns: 3_000_000 + n % 1_000,
            service: format!("service-{}", place / 50).into(),
            method: Method::Get,
            path: Some(format!("/v1/things{}/{}", place % 50, mix(n ^ 3) % 10_000_000).into()),
            status: if n.is_multiple_of(97) { 404 } else { 200 },
            response_bytes: 1_500 + n % 300,
            client: Peer::Ip(([81, (who >> 16) as u8, (who >> 8) as u8, who as u8], 40_000).into()),
            auth: Auth::Bearer,
            principal: Some(format!("{:016x}", mix(who)).into()),
            scheme: Scheme::Https,
            tls_version: Some(TlsVersion::Tls13),
            user_agent: Some(format!("agent/{}", who % 5_000).into()),
            ..Exchange::default()
        };
        let route = self.routes.route(&x);
        if let Some(at) = self.endpoints.record(&x, &route.template, route.source) {
            let params = self.hasher.params(x.path.as_deref().unwrap_or_default(), &route.template);
            self.engine.observe(&x, at, &route.template, &params);
        }
        self.engine.findings().drain().for_each(drop);
    }
}

/// MB of the detectors, as they say.
fn said(engine: &Engine) -> f64 {
    engine.bytes().iter().map(|(_, n)| n).sum::<usize>() as f64 / 1e6
}

#[test]
fn a_flood_of_principals_does_not_grow_what_is_held() {
    let before = ALLOCATOR.held.load(Ordering::Relaxed);
    let mut node = Node {
        routes: Routes::new(&[]),
        endpoints: Endpoints::new(4_096, None),
        engine: Engine::new(&config::Detect::default()).expect("valid"),
        hasher: ParamHasher::new([1; 16]),
        sent: 0,
    };
    let held = || (ALLOCATOR.held.load(Ordering::Relaxed) - before) as f64 / 1e6;
    for n in 0..PRINCIPALS * EACH {
        node.take(mix(n) % PRINCIPALS);
    }
    let usual = held();
    println!("{ENDPOINTS} endpoints, {PRINCIPALS} principals, {} exchanges: {usual:.1} MB", node.sent);
    let mut list = node.engine.bytes();
    list.sort_by_key(|(_, n)| std::cmp::Reverse(*n));
    let parts: Vec<_> = list.iter().take(8).map(|(id, n)| format!("{id} {:.1}", *n as f64 / 1e6)).collect();
    println!("of which detectors, as they say: {:.1} MB: {}", said(&node.engine), parts.join(", "));
    // Tables fill up in the first half.
    let (mut first, mut second) = (0.0f64, 0.0f64);
    for n in 0..FLOOD {
        node.take(PRINCIPALS + n);
        if n % (FLOOD / 10) == FLOOD / 10 - 1 {
            let most = if n < FLOOD / 2 { &mut first } else { &mut second };
            *most = most.max(held());
            println!("{} principals more: {:.1} MB, detectors {:.1} MB", n + 1, held(), said(&node.engine));
        }
    }
    assert!(usual < LIMIT, "{usual:.1} MB of {ENDPOINTS} endpoints and {PRINCIPALS} principals");
    assert!(second < 1.05 * first, "from {first:.1} to {second:.1} MB");
    assert!(second < LIMIT, "{second:.1} MB at the end");
    assert!(said(&node.engine) < DETECTORS, "{:.1} MB of detectors", said(&node.engine));
}

/// MB of the detectors.
const DETECTORS: f64 = 64.0;
/// MB of all.
const LIMIT: f64 = 128.0;
