//! The score of the route learner on services that it does not know, against regression: seven invented
//! APIs with their own words and shapes of ids, whose traffic is made here. A parameter counts as right when it is one,
//! whatever its name.

use std::{collections::HashMap, sync::Arc};

use apiscope::{
    exchange::{Auth, Exchange, Method, Peer},
    route::Routes,
};

/// Service, and its true routes. In `{}` the kind of value: see `Values::make`.
const SERVICES: [(&str, &[&str]); 7] = [
    (
        "library",
        &[
            "/shelves",
            "/shelves/{word}",
            "/shelves/{word}/books",
            "/shelves/{word}/books/{isbn}",
            "/readers/{int}/loans",
            "/search",
            "/health",
        ],
    ),
    (
        "rail",
        &[
            "/v2/stations/{code}/departures",
            "/v2/stations/{code}",
            "/v2/trips/{uuid}",
            "/v2/trips/{uuid}/stops/{int}",
            "/v2/fares",
            "/v2/tickets/{mixed}/refund",
            "/v2/tickets",
        ],
    ),
    (
        "bakery",
        &[
            "/orders/{mixed}",
            "/orders/{mixed}/lines/{int}",
            "/recipes/{words}",
            "/recipes/{words}/ratings",
            "/recipes/popular",
            "/ovens/{int}/temperature",
            "/menu/{date}",
        ],
    ),
    (
        "forum",
        &[
            "/{word}/threads",
            "/{word}/threads/{int}",
            "/{word}/threads/{int}/replies",
            "/login",
            "/logout",
            "/settings/notifications",
            "/settings/profile",
        ],
    ),
    (
        "weather",
        &[
            "/api/3/forecast/{words}",
            "/api/3/alerts",
            "/api/3/radar/{date}",
            "/api/3/sensors/{hex}",
            "/api/3/sensors/{hex}/readings",
            "/api/3/units",
        ],
    ),
    (
        "depot",
        &[
            "/files/{mixed}",
            "/files/{mixed}/versions/{int}",
            "/users/{email}",
            "/users/{email}/quota",
            "/shares/{hex}",
            "/admin/stats",
            "/admin/jobs",
        ],
    ),
    (
        "choir",
        &[
            "/singers",
            "/singers/{words}",
            "/singers/search",
            "/scores/{int}/parts/{int}",
            "/concerts/{date}",
            "/concerts/next",
            "/rehearsals",
            "/rooms",
            "/rooms/free",
        ],
    ),
];
/// Beginnings and ends of made-up words.
const SYLLABLES: [&str; 24] = [
    "bar", "cel", "dor", "fen", "gal", "hum", "jin", "kel", "lom", "mar", "nev", "or", "pel", "quin", "rus", "sol",
    "tam", "ul", "vex", "win", "yor", "zed", "mist", "brook",
];

/// A small generator (xorshift): the same traffic every time.
struct Values(u64);

impl Values {
    fn next(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % below
    }

    fn word(&mut self) -> String {
        (0..2 + self.next(2)).map(|_| SYLLABLES[self.next(24) as usize]).collect()
    }

    fn make(&mut self, kind: &str) -> String {
        match kind {
            "int" => self.next(1_000_000).to_string(),
            "word" => self.word(),
            "words" => format!("{}-{}", self.word(), self.word()),
            "code" => ["ABC", "DEF", "GHI", "KLM", "NOP", "QRS", "TUV"][self.next(7) as usize].into(),
            "isbn" => format!("978-{}-{:05}", self.next(10), self.next(100_000)),
            "date" => format!("20{:02}-{:02}-{:02}", 10 + self.next(16), 1 + self.next(12), 1 + self.next(28)),
            "hex" => format!("{:024x}", u128::from(self.next(u64::MAX)) << 8 | 0x5a),
            "uuid" => format!("{:08x}-1111-4222-8333-{:012x}", self.next(1 << 32), self.next(1 << 48)),
            "email" => format!("{}@{}.org", self.word(), self.word()),
            _ => (0..14).map(|_| b"aB3dE5fG7hJ9kL2mN4pQ6rS8t"[self.next(25) as usize] as char).collect(),
        }
    }
}

/// Exchanges with their true routes; `None` is a scanner's.
fn traffic(requests: usize, noise: usize, noise_status: u16) -> Vec<(Exchange, Option<String>)> {
    let mut values = Values(0x5eed_1234_abcd);
    let mut all = Vec::new();
    for (service, routes) in SERVICES {
        let service: Arc<str> = service.into();
        let exchange = |path: String, status, client: u64, auth| Exchange {
            service: service.clone(),
            method: Method::Get,
            path: Some(path.into()),
            status,
            auth,
            response_bytes: if auth == Auth::None { 512 } else { 100 + client * 13 },
            client: Peer::parse(&format!("10.9.{}.{}:1", client / 250, client % 250)),
            ..Exchange::default()
        };
        let mut pools: HashMap<&str, Vec<String>> = HashMap::new();
        for _ in 0..requests {
            let route = routes[(values.next(routes.len() as u64).min(values.next(routes.len() as u64))) as usize];
            let mut path = String::new();
            for segment in route.split('/').skip(1) {
                path.push('/');
                match segment.strip_prefix('{').and_then(|s| s.strip_suffix('}')) {
                    None => path.push_str(segment),
                    Some(kind) => {
                        let pool = pools.entry(segment).or_default();
                        let value = if !pool.is_empty() && values.next(3) == 0 {
                            pool[values.next(pool.len() as u64) as usize].clone()
                        } else {
                            values.make(kind)
                        };
                        if pool.len() < 300 {
                            pool.push(value.clone());
                        }
                        path.push_str(&value);
                    }
                }
            }
            let status = [200, 200, 200, 200, 201, 400, 404][values.next(7) as usize];
            all.push((exchange(path, status, values.next(300), Auth::Bearer), Some(route.to_owned())));
        }
        for i in 0..noise {
            let path = format!("/{}.{}", values.word(), ["php", "bak", "old", "zip"][i % 4]);
            all.push((exchange(path, noise_status, 60_000 + (i as u64 % 3), Auth::None), None));
        }
    }
    // Side by side, as they come.
    for i in (1..all.len()).rev() {
        let j = values.next(i as u64 + 1) as usize;
        all.swap(i, j);
    }
    all
}

/// F1 of segments and share of exact routes.
fn score(traffic: &[(Exchange, Option<String>)]) -> (f64, f64) {
    let mut routes = Routes::new(&[]);
    for (exchange, _) in traffic {
        routes.route(exchange);
    }
    routes.settle();
    let (mut hit, mut wrong, mut missed, mut exact, mut all) = (0.0, 0.0, 0.0, 0.0, 0.0);
    let form = |route: &str| {
        route.split('/').map(|s| if s.starts_with('{') { "{}".into() } else { s.to_owned() }).collect::<Vec<_>>()
    };
    for (exchange, truth) in traffic {
        let Some(truth) = truth else { continue };
        let path = exchange.path.as_deref().expect("a path");
        let (truth, found) = (form(truth), form(&routes.current(&exchange.service, &exchange.method, path).template));
        all += 1.0;
        exact += f64::from(u8::from(truth == found));
        for (t, f) in truth.iter().zip(&found) {
            match (t == "{}", f == "{}") {
                (true, true) => hit += 1.0,
                (false, true) => wrong += 1.0,
                (true, false) => missed += 1.0,
                _ => {}
            }
        }
    }
    (2.0 * hit / (2.0 * hit + wrong + missed), exact / all)
}

#[test]
fn the_score_does_not_fall() {
    let (f1, exact) = score(&traffic(3_000, 0, 404));
    println!("segment F1 {f1:.4}, exact {exact:.4}");
    assert!(f1 >= 0.97 && exact >= 0.95, "segment F1 {f1:.4}, exact {exact:.4}");
}

#[test]
fn a_scanner_costs_a_point_at_most() {
    let (f1, exact) = score(&traffic(3_000, 0, 404));
    for (noise, status) in [(60, 404), (2_000, 404), (60, 200), (2_000, 200)] {
        let (f1_then, exact_then) = score(&traffic(3_000, noise, status));
        println!("{noise} requests answered {status}: segment F1 {f1_then:.4}, exact {exact_then:.4}");
        assert!(
            f1 - f1_then <= 0.01 && exact - exact_then <= 0.01,
            "{noise} answered {status}: {f1_then:.4} {exact_then:.4}"
        );
    }
}

#[test]
fn the_same_traffic_gives_the_same_routes() {
    let traffic = traffic(500, 100, 200);
    let run = || {
        let mut routes = Routes::new(&[]);
        traffic.iter().map(|(exchange, _)| routes.route(exchange).template.to_string()).collect::<Vec<_>>()
    };
    assert_eq!(run(), run());
}
