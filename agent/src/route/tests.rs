//! Tests of the routes of a whole service.

use super::*;

fn exchange(service: &str, path: &str, status: u16, who: u64) -> Exchange {
    Exchange {
        service: service.into(),
        path: Some(path.into()),
        method: Method::Get,
        status,
        principal: Some(format!("{who:016x}").into()),
        auth: Auth::Bearer,
        response_bytes: 100 + who,
        ..Exchange::default()
    }
}

fn typed(path: &str) -> String {
    Routes::new(&["/files/{name}".into()]).route(&exchange("s", path, 200, 1)).template.to_string()
}

#[test]
fn shapes() {
    for (path, wanted) in [
        ("/", "/"),
        ("/users/42/orders/7", "/users/{int}/orders/{int}"),
        ("/v1/oauth2/utf8", "/v1/oauth2/utf8"),
        ("/o/6fa459ea-ee8a-3ca4-894e-db77e160355e", "/o/{uuid}"),
        ("/d/2024-01-31/", "/d/{date}/"),
        ("/u/jo@x.org", "/u/{email}"),
        ("/h/deadbeef01", "/h/{hex}"),
        ("/c/cus_9sXk2LmQ8rT1", "/c/{id}"),
        ("/files/anything.txt", "/files/{name}"),
        ("/files/a/b", "/files/a/b"),
        ("*", "*"),
        ("/repository-settings/code-scanning", "/repository-settings/code-scanning"),
    ] {
        assert_eq!(typed(path), wanted);
    }
    let mut routes = Routes::new(&[]);
    let connect = Exchange { method: Method::Connect, ..exchange("s", "db:443", 200, 1) };
    assert_eq!(&*routes.route(&connect).template, "{authority}");
}

proptest::proptest! {
    #[test]
    fn never_panics_and_is_deterministic(paths in proptest::collection::vec("(/[a-c0-9{}%é]{0,4}){0,4}.{0,20}", 1..60)) {
        let run = || {
            let mut routes = Routes::new(&[]);
            let seen: Vec<_> = paths.iter().zip(0..).map(|(p, i)| routes.route(&exchange("s", p, 200, i))).collect();
            routes.settle();
            (seen, paths.iter().map(|p| routes.current(&"s".into(), &Method::Get, p)).collect::<Vec<_>>())
        };
        proptest::prop_assert_eq!(run(), run());
    }
}

/// Names of users as they come: 300 different ones from 60 callers.
fn users(routes: &mut Routes, service: &str) {
    for i in 0..300u64 {
        let name: String =
            format!("{:x}", i.wrapping_mul(0x9e37_79b9)).chars().map(|c| (b'a' + c as u8 % 26) as char).collect();
        routes.route(&exchange(service, &format!("/users/{name}/orders"), 200, i % 60));
        routes.route(&exchange(service, "/users/search", 200, i % 60));
        routes.route(&exchange(service, "/health", 200, 1));
    }
}

#[test]
fn values_become_a_parameter_and_names_stay() {
    let mut routes = Routes::new(&[]);
    users(&mut routes, "s");
    routes.settle();
    assert!(routes.changed().iter().any(|s| &**s == "s"));
    let mut now = |path: &str| routes.current(&"s".into(), &Method::Get, path).template.to_string();
    assert_eq!(now("/users/never-seen/orders"), "/users/{id}/orders");
    assert_eq!(now("/users/{id}/orders"), "/users/{id}/orders");
    assert_eq!(now("/users/search"), "/users/search");
    assert_eq!(now("/health"), "/health");
    assert_eq!(now(UNMATCHED), UNMATCHED);
    assert_eq!(now(UNKNOWN), UNKNOWN);
}

#[test]
fn a_scanner_learns_us_nothing() {
    for status in [404, 200] {
        let mut routes = Routes::new(&[]);
        users(&mut routes, "s");
        for i in 0..2_000u64 {
            let scan = Exchange {
                auth: Auth::None,
                response_bytes: 320,
                ..exchange("s", &format!("/w{:x}z.php", i * 7919), status, 1_000 + i % 3)
            };
            routes.route(&scan);
        }
        routes.settle();
        let mut now = |path: &str| routes.current(&"s".into(), &Method::Get, path).template.to_string();
        assert_eq!(now("/health"), "/health", "answered {status}");
        assert_eq!(now("/users/x/orders"), "/users/{id}/orders", "answered {status}");
        assert_eq!(now("/something"), "/something", "answered {status}");
    }
}

#[test]
fn what_a_service_does_not_know_has_few_routes() {
    let mut routes = Routes::new(&[]);
    let seen: FxHashSet<_> =
        (0..500).map(|i| routes.route(&exchange("s", &format!("/no{i}such"), 404, 1)).template).collect();
    assert!(seen.len() <= MAX_UNMATCHED + 1 && seen.contains(UNMATCHED), "{}", seen.len());
}

#[test]
fn versions_are_names_and_codes_are_values() {
    let mut routes = Routes::new(&[]);
    for i in 0..60u64 {
        for path in ["/api/2/issues", "/api/2/users", "/2010-04-01/Accounts", "/2010-04-01/Calls"] {
            routes.route(&exchange("s", path, 200, i));
        }
        for code in ["en", "de", "fr", "es", "it"] {
            routes.route(&exchange("s", &format!("/words/{code}"), 200, i));
        }
    }
    routes.settle();
    let mut now = |path: &str| routes.current(&"s".into(), &Method::Get, path).template.to_string();
    assert_eq!(now("/api/2/issues"), "/api/2/issues");
    assert_eq!(now("/2010-04-01/Calls"), "/2010-04-01/Calls");
    assert_eq!(now("/words/pt"), "/words/{id}");
}

#[test]
fn documents_come_first_then_patterns() {
    let mut routes = Routes::new(&["/files/{name}".into(), "/pets/{any}".into()]);
    routes.set_documented(&"s".into(), ["/pets/{petId}"]);
    let mut now = |service: &str, path: &str| {
        let route = routes.route(&exchange(service, path, 200, 1));
        (route.template.to_string(), route.source)
    };
    assert_eq!(now("s", "/pets/rex"), ("/pets/{petId}".into(), "documented"));
    assert_eq!(now("t", "/pets/rex"), ("/pets/{any}".into(), "config"));
    assert_eq!(now("s", "/files/a"), ("/files/{name}".into(), "config"));
}

#[test]
fn what_was_learned_outlives_a_restart_and_no_value_does() {
    let file = std::env::temp_dir().join(format!("apiscope-routes-{}", std::process::id()));
    let mut routes = Routes::new(&[]);
    users(&mut routes, "s");
    routes.save(&file).expect("writable");
    let text = std::fs::read_to_string(&file).expect("written");
    assert!(text.contains("search") && text.contains("orders"));
    // 300 names were seen; none that was a user's is written.
    let words: FxHashSet<_> = text.split('"').filter(|w| w.chars().all(|c| c.is_ascii_lowercase())).collect();
    assert!(words.len() < 15, "{words:?}");

    let mut again = Routes::new(&[]);
    again.restore(&file).expect("readable");
    for (path, wanted) in [("/users/zoe/orders", "/users/{id}/orders"), ("/users/search", "/users/search")] {
        let route = again.route(&exchange("s", path, 200, 1));
        assert_eq!((&*route.template, route.source), (wanted, "learned"));
    }

    for damaged in ["{", "{\"version\":9,\"services\":{}}"] {
        std::fs::write(&file, damaged).expect("writable");
        let mut fresh = Routes::new(&[]);
        fresh.restore(&file).expect("a fresh start");
        let aside = file.with_extension("damaged");
        assert_eq!(std::fs::read_to_string(&aside).expect("kept"), damaged);
        assert!(!file.exists());
        std::fs::remove_file(aside).expect("removable");
    }
}
