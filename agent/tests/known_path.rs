//! The route of a known path is one look-up without allocation, and what is learned of two thousand endpoints stays
//! within 16 MiB: counted by the allocator of this program, in which this is the only test.

mod counting;

use std::sync::atomic::Ordering;

use apiscope::{
    exchange::{Auth, Exchange, Method},
    route::Routes,
};
use counting::ALLOCATOR;

fn exchange(service: usize, path: String, who: usize) -> Exchange {
    Exchange {
        service: format!("service-{service}").into(),
        path: Some(path.into()),
        method: Method::Get,
        status: 200,
        principal: Some(format!("{who:016x}").into()),
        auth: Auth::Bearer,
        response_bytes: 100 + who as u64,
        ..Exchange::default()
    }
}

#[test]
fn a_known_path_allocates_nothing_and_two_thousand_endpoints_are_small() {
    let before = ALLOCATOR.held.load(Ordering::Relaxed);
    let mut routes = Routes::new(&[]);
    // Forty services of fifty endpoints with ids, thirty different requests each.
    for i in 0..60_000 {
        let (endpoint, id) = (i % 2_000, i / 2_000);
        let path = format!("/api/v1/resource{}/{}/part", endpoint / 40, 1_000 + id * 7);
        routes.route(&exchange(endpoint % 40, path, i % 60));
    }
    routes.settle();
    let held = ALLOCATOR.held.load(Ordering::Relaxed) - before;
    let known = exchange(3, "/api/v1/resource7/1007/part".into(), 5);
    assert_eq!(&*routes.route(&known).template, "/api/v1/resource7/{int}/part");
    let calls = ALLOCATOR.calls.load(Ordering::Relaxed);
    for _ in 0..1_000 {
        std::hint::black_box(routes.route(std::hint::black_box(&known)));
    }
    let calls = ALLOCATOR.calls.load(Ordering::Relaxed) - calls;
    eprintln!("{held} bytes of 2,000 endpoints and 60,000 paths; {calls} allocations of 1,000 look-ups");
    assert_eq!(calls, 0);
    assert!(held < 16 << 20, "{held} bytes");
}
