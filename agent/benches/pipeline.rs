//! The user-side pipeline without kernel and collector: records of one request and its answer -> event ->
//! connection -> exchange -> route -> endpoint; `whole` goes on to detectors and a recording that nobody keeps.
//! One element is one exchange.

use std::{hint::black_box, sync::Arc};

use agent_ebpf::{Flag, Kind, Open, Record, Session};
use apiscope::{
    aggregate::Endpoints,
    config,
    conn::{Connections, Identity, Outside},
    detect::Engine,
    event,
    exchange::{Exchange, PathForm, Peer},
    params::ParamHasher,
    proto::credential::Principals,
    recording::Recording,
    route::Routes,
    stats::Stats,
};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

struct Sink {
    routes: Routes,
    endpoints: Endpoints,
    service: Arc<str>,
    more: Option<(Engine, ParamHasher, Recording)>,
}

impl Outside for Sink {
    fn identify(&mut self, _: u32, _: &str, _: &Peer, _: &Peer) -> Identity {
        Identity { service: self.service.clone(), exe: None, origin: None, wanted: true }
    }
    fn exchange(&mut self, exchange: &mut Exchange) {
        let route = self.routes.route(exchange);
        let at = self.endpoints.record(exchange, &route.template, route.source);
        if let (Some((detectors, hasher, recording)), Some(at)) = (&mut self.more, at) {
            let params = hasher.params(exchange.path.as_deref().unwrap_or_default(), &route.template);
            detectors.observe(exchange, at, &route.template, &params);
            recording.add(exchange, &route.template);
        }
    }
    fn is_gone(&mut self, _: u32) -> bool {
        false
    }
}

fn bytes<T>(value: &T) -> Vec<u8> {
    // SAFETY: the ABI's types are integers without padding.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast::<u8>(), size_of::<T>()) }.to_vec()
}

fn record(kind: u8, flags: u16, conn: u64, index: u32, ts: u64, data: &[u8]) -> Vec<u8> {
    let len = u32::try_from(data.len()).expect("small");
    let header =
        Record { kind, flags, conn, index, ts, first_ts: ts, len, pid: 1, message: len.into(), ..Record::default() };
    [bytes(&header), data.to_vec()].concat()
}

fn opened() -> Open {
    Open {
        family: 2,
        local_port: 80,
        remote_port: 40_000,
        role: 1,
        tls: 0,
        sock: 0,
        peer_sock: 0,
        local: [127; 16],
        remote: [10; 16],
        comm: [b'n'; 16],
        path: [0; 108],
        path_len: 0,
        session: Session::default(),
    }
}

/// A frame of HTTP/2 as the kernel side passes it on.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8], out: &mut Vec<u8>) {
    let length = u32::try_from(payload.len()).expect("small").to_be_bytes();
    out.extend([length[1], length[2], length[3], kind, flags]);
    out.extend(stream.to_be_bytes());
    out.extend(payload);
}

/// As [`pipeline`], with 32 streams side by side on each connection of HTTP/2.
fn streams(criterion: &mut Criterion) {
    const CONNECTIONS: u64 = 64;
    const STREAMS: u32 = 32;
    const ROUNDS: u32 = 4;
    let mut records = Vec::new();
    for conn in 0..CONNECTIONS {
        records.push(record(Kind::OPEN, 0, conn, 0, 1, &bytes(&opened())));
    }
    for round in 0..ROUNDS {
        for conn in 0..CONNECTIONS {
            let (mut asked, mut answered) = (Vec::new(), Vec::new());
            for i in 0..STREAMS {
                let id = (round * STREAMS + i) * 2 + 1;
                let path = format!("/users/{}/orders", id % 50);
                let mut block = vec![0x82, 0x86, 0x04, u8::try_from(path.len()).expect("short")];
                block.extend(path.as_bytes());
                // The user agent and a credential: inserted once, then referred to.
                if id == 1 {
                    block.extend(b"\x7a\x07bench/1\x57\x08Bearer x");
                } else {
                    block.extend([0xbf, 0xbe]);
                }
                frame(1, 5, id, &block, &mut asked);
                frame(1, 4, id, if id == 1 { b"\x88\x5f\x10application/json" } else { &[0x88, 0xbe] }, &mut answered);
                frame(0, 1, id, &[], &mut answered);
                answered.extend([0; 4]);
            }
            let ts = u64::from(round) * 1_000;
            let preface = if round == 0 { Flag::PREFACE } else { 0 };
            records.push(record(Kind::FRAMES, Flag::FIRST | preface, conn, round, ts, &asked));
            records.push(record(Kind::FRAMES, Flag::FIRST | Flag::SENT, conn, round, ts + 500, &answered));
        }
    }
    run(criterion, "streams", CONNECTIONS * u64::from(STREAMS * ROUNDS), &records, false);
}

fn run(criterion: &mut Criterion, name: &str, exchanges: u64, records: &[Vec<u8>], whole: bool) {
    let mut group = criterion.benchmark_group("pipeline");
    group.throughput(Throughput::Elements(exchanges));
    group.bench_function(name, |b| {
        let stats = Arc::new(Stats::default());
        let more = whole.then(|| {
            let recording = Recording::start("/dev/null".as_ref(), PathForm::Raw, stats.clone()).expect("writable");
            let engine = Engine::new(&config::Detect::default()).expect("valid");
            (engine, ParamHasher::new([1; 16]), recording)
        });
        let mut sink =
            Sink { routes: Routes::new(&[]), endpoints: Endpoints::new(2_000, None), service: "shop".into(), more };
        let principals = Principals::new(b"0123456789abcdef", &[], &[]).expect("a key");
        b.iter(|| {
            let mut connections = Connections::new(0, stats.clone()).with_principals(principals.clone());
            for record in records {
                if let Ok(event) = event::parse(black_box(record)) {
                    connections.handle(event, &mut sink);
                }
            }
            black_box(connections.len())
        });
    });
    group.finish();
}

fn pipeline(criterion: &mut Criterion) {
    const CONNECTIONS: u64 = 64;
    const EACH: u32 = 100;
    let mut records = Vec::new();
    for conn in 0..CONNECTIONS {
        records.push(record(Kind::OPEN, 0, conn, 0, 1, &bytes(&opened())));
    }
    let whole = Flag::FIRST | Flag::LAST | Flag::DONE;
    for index in 0..EACH {
        for conn in 0..CONNECTIONS {
            let request = format!(
                "GET /users/{}/orders HTTP/1.1\r\nHost: shop.test\r\nUser-Agent: bench/1\r\nAuthorization: Bearer x\r\n\r\n",
                index % 50
            );
            let response =
                b"HTTP/1.1 200 OK\r\nServer: bench\r\nContent-Type: application/json\r\nContent-Length: 0\r\n\r\n";
            records.push(record(Kind::HEAD, whole, conn, index, u64::from(index) * 1_000, request.as_bytes()));
            records.push(record(
                Kind::HEAD,
                whole | Flag::RESPONSE | Flag::SENT,
                conn,
                index,
                u64::from(index) * 1_000 + 500,
                response,
            ));
        }
    }
    run(criterion, "exchanges", CONNECTIONS * u64::from(EACH), &records, false);
    run(criterion, "whole", CONNECTIONS * u64::from(EACH), &records, true);
}

criterion_group!(benches, pipeline, streams);
criterion_main!(benches);
