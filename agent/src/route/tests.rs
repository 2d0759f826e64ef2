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
