//! The route of a known path is one look-up without allocation, and what is learned of two thousand endpoints stays
//! within 16 MiB: counted by the allocator of this program, in which this is the only test.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicUsize, Ordering},
};

use apiscope::{
    exchange::{Auth, Exchange, Method},
    route::Routes,
};

/// The system's allocator, which counts.
struct Counting;

static CALLS: AtomicUsize = AtomicUsize::new(0);
static HELD: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is handed on as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        CALLS.fetch_add(1, Ordering::Relaxed);
        HELD.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: as asked for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: it came from `alloc`.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

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
    let before = HELD.load(Ordering::Relaxed);
    let mut routes = Routes::new(&[]);
    // Forty services of fifty endpoints with ids, thirty different requests each.
    for i in 0..60_000 {
        let (endpoint, id) = (i % 2_000, i / 2_000);
        let path = format!("/api/v1/resource{}/{}/part", endpoint / 40, 1_000 + id * 7);
        routes.route(&exchange(endpoint % 40, path, i % 60));
    }
    routes.settle();
    let held = HELD.load(Ordering::Relaxed) - before;
    let known = exchange(3, "/api/v1/resource7/1007/part".into(), 5);
    assert_eq!(&*routes.route(&known).template, "/api/v1/resource7/{int}/part");
    let calls = CALLS.load(Ordering::Relaxed);
    for _ in 0..1_000 {
        std::hint::black_box(routes.route(std::hint::black_box(&known)));
    }
    let calls = CALLS.load(Ordering::Relaxed) - calls;
    eprintln!("{held} bytes of 2,000 endpoints and 60,000 paths; {calls} allocations of 1,000 look-ups");
    assert_eq!(calls, 0);
    assert!(held < 16 << 20, "{held} bytes");
}
