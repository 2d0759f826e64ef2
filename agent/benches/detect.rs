//! An exchange through routes, access patterns and every detector, on one core. One element is one exchange.

use std::hint::black_box;

use apiscope::{
    aggregate::Endpoints,
    config,
    detect::{Engine, sketch::mix},
    exchange::{Auth, Exchange, Method, Peer, Scheme, TlsVersion},
    params::ParamHasher,
    route::Routes,
};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

/// Exchanges of 20,000 principals at 200 endpoints.
fn exchanges(n: u64) -> Vec<Exchange> {
    (0..n)
        .map(|i| {
            let (who, place) = (mix(i) % 20_000, mix(i ^ 7) % 100);
            let object = if i % 4 == 0 { mix(i ^ 3) % 10_000_000 } else { who };
            let path =
                if i % 3 == 0 { format!("/v1/things-{place}/latest") } else { format!("/v1/things-{place}/{object}") };
            Exchange {
                ts: 1_700_000_000_000_000_000 + i * 50_000,
                duration_ns: 3_000_000 + i % 1_000,
                service: "shop".into(),
                method: Method::Get,
                path: Some(path.into()),
                status: if i % 97 == 0 { 404 } else { 200 },
                request_bytes: 400,
                response_bytes: 1_500 + i % 300,
                client: Peer::Ip(([81, 2, (who >> 8) as u8, who as u8], 40_000).into()),
                auth: Auth::Bearer,
                principal: Some(format!("{:016x}", mix(who)).into()),
                scheme: Scheme::Https,
                tls_version: Some(TlsVersion::Tls13),
                user_agent: Some("shop-ios/5.1".into()),
                ..Exchange::default()
            }
        })
        .collect()
}

fn detect(criterion: &mut Criterion) {
    const N: u64 = 200_000;
    let mut all = exchanges(N);
    let mut group = criterion.benchmark_group("detect");
    group.throughput(Throughput::Elements(N));
    group.sample_size(10);
    let (mut routes, mut endpoints) = (Routes::new(&[]), Endpoints::new(2_000, None));
    let mut engine = Engine::new(&config::Detect::default()).expect("valid");
    let hasher = ParamHasher::new([1; 16]);
    group.bench_function("routes_patterns_detectors", |b| {
        b.iter(|| {
            for x in &all {
                let route = routes.route(x);
                if let Some(at) = endpoints.record(x, &route.template, route.source) {
                    let params = hasher.params(x.path.as_deref().unwrap_or_default(), &route.template);
                    engine.observe(black_box(x), at, &route.template, &params);
                }
            }
            // Time goes on, or windows would never end.
            for x in &mut all {
                x.ts += N * 50_000;
            }
        });
    });
    group.finish();
    let (total, list) = (engine.bytes().iter().map(|(_, n)| n).sum::<usize>(), engine.bytes());
    println!("state of the detectors: {:.1} MB {list:?}", total as f64 / 1e6);
}

/// The route of a path that was seen lately: forty services of fifty endpoints each, ids of thirty objects.
fn known_path(criterion: &mut Criterion) {
    let mut routes = Routes::new(&[]);
    let all: Vec<_> = (0..60_000_u64)
        .map(|i| {
            let (endpoint, id) = (i % 2_000, i / 2_000);
            Exchange {
                service: format!("service-{}", endpoint % 40).into(),
                path: Some(format!("/api/v1/resource{}/{}/part", endpoint / 40, 1_000 + id * 7).into()),
                method: Method::Get,
                status: 200,
                auth: Auth::Bearer,
                principal: Some(format!("{:016x}", i % 60).into()),
                ..Exchange::default()
            }
        })
        .collect();
    all.iter().for_each(|x| drop(routes.route(x)));
    routes.settle();
    all.iter().for_each(|x| drop(routes.route(x)));
    let mut group = criterion.benchmark_group("routes");
    group.throughput(Throughput::Elements(1));
    let mut next = all.iter().cycle();
    group.bench_function("known_path", |b| b.iter(|| next.next().map(|x| routes.route(black_box(x)))));
    group.finish();
}

criterion_group!(benches, known_path, detect);
criterion_main!(benches);
