//! HTTP/2 in every shape, byte for byte, and by programs under conditions: seen from both ends.

use std::{
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use apiscope::exchange::{End, Protocol, Side};
use apiscope_tests::{Agent, Call, Step, Want, free_port, play, play_many, process::Guard, program};

const HERE: &str = "127.0.0.1:0";
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const OK: &[u8] = &[0x88];

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("small").to_be_bytes();
    let mut out = vec![length[1], length[2], length[3], kind, flags];
    out.extend(stream.to_be_bytes());
    out.extend(payload);
    out
}

/// A block of a request: the path is inserted into the table where `insert`.
fn ask(method: u8, path: &str, insert: bool) -> Vec<u8> {
    let mut block = vec![method, 0x86, if insert { 0x44 } else { 0x04 }, path.len() as u8];
    block.extend(path.as_bytes());
    block
}

const GET: u8 = 0x82;
const POST: u8 = 0x83;

/// What opens a session in both directions.
fn open() -> (Vec<u8>, Vec<u8>) {
    let settings = frame(4, 0, 0, &[0, 3, 0, 0, 0, 100]);
    ([PREFACE, &settings].concat(), [settings, frame(4, 1, 0, &[])].concat())
}

/// Padded, with a priority, over two CONTINUATIONs, in pieces of every size, by every call.
#[test]
fn frames_at_every_split() {
    let (client, server) = open();
    let mut sessions = Vec::new();
    let mut wanted = Vec::new();
    for (i, split) in [1, 2, 3, 8, 9, 10, 100, 100_000].into_iter().enumerate() {
        for (k, call) in [Call::Write, Call::Writev, Call::Send, Call::Sendmsg].into_iter().enumerate() {
            let path = format!("/split/{i}/{k}");
            let block = ask(POST, &path, true);
            let head = [&[3, 0, 0, 0, 0, 9][..], &block[..2], &[0; 3]].concat();
            let rq = [
                frame(1, 0x28, 1, &head),
                frame(9, 0, 1, &block[2..5]),
                frame(8, 0, 0, &[0, 0, 1, 0]),
                frame(9, 4, 1, &block[5..]),
                frame(0, 8, 1, &[&[5][..], &[b'q'; 700], &[0; 5]].concat()),
                frame(6, 0, 0, &[1; 8]),
                frame(0, 1, 1, &[b'q'; 300]),
            ]
            .concat();
            let rs = [
                frame(1, 4, 1, b"\x08\x03103"),
                frame(1, 4, 1, OK),
                frame(0, 0, 1, &[b's'; 5000]),
                frame(0, 1, 1, &[]),
            ]
            .concat();
            sessions.push(vec![
                Step::client(client.clone()).split(split).by(call),
                Step::server(server.clone()).split(split).by(call),
                Step::client(rq.clone()).split(split).by(call),
                Step::server(rs.clone()).split(split).by(call),
            ]);
            // WINDOW_UPDATE and PING belong to no stream.
            let request = rq.len() - 13 - 17;
            wanted.push(Want {
                request_bytes: Some(request as u64),
                response_bytes: Some(rs.len() as u64),
                ..Want::any("POST", path, 200).bodies(1000, 5000)
            });
        }
    }
    let agent = Agent::shared();
    let server = play_many(HERE, &sessions);
    agent.expect(&server, &wanted);
    assert!(agent.seen(&server, Side::Server).iter().all(|e| e.protocol == Protocol::Http2));
}

/// A hundred streams that are answered in another order, with paths out of the table; unix sockets too.
#[test]
fn streams_side_by_side_and_out_of_order() {
    let (client, server) = open();
    let mut asked = client;
    for i in 0..100_u32 {
        // Every path is sent twice: literally, then as the newest entry of the table.
        let block = if i % 2 == 0 { ask(GET, &format!("/o/{i}"), true) } else { vec![GET, 0x86, 0xbe] };
        asked.extend(frame(1, 5, 2 * i + 1, &block));
    }
    let mut answered = server;
    for i in (0..100_u32).rev() {
        answered.extend(frame(1, 4, 2 * i + 1, OK));
    }
    for i in 0..100_u32 {
        answered.extend(frame(0, 1, 2 * i + 1, &vec![b'x'; i as usize]));
    }
    let steps = [Step::client(asked).split(1000), Step::server(answered).split(777)];
    let wanted: Vec<_> = (0..100).map(|i| Want::any("GET", format!("/o/{}", i / 2 * 2), 200).bodies(0, i)).collect();
    let unix = format!("unix:{}/apiscope-h2-{}", std::env::temp_dir().display(), std::process::id());
    for address in [HERE, &unix] {
        let server = play(address, &steps);
        for side in [Side::Server, Side::Client] {
            let agent = Agent::shared();
            agent.expect_side(
                &server,
                side,
                &wanted.iter().map(|w| Want { response_body: None, ..w.clone() }).collect::<Vec<_>>(),
            );
            let sum: u64 = agent.seen(&server, side).iter().filter_map(|e| e.response_body_bytes).sum();
            assert_eq!(sum, 99 * 100 / 2, "{side} at {server}");
        }
    }
}

/// Messages of gRPC in pieces that take turns on fifty streams, both ways: each is counted once. A stream that is
/// reset in the middle of one takes it along.
#[test]
fn messages_in_turns_on_fifty_streams() {
    const STREAMS: u32 = 50;
    const MESSAGES: usize = 7;
    let (client, server) = open();
    // application/grpc: a literal whose name is entry 31.
    let grpc = [&[0x0f, 0x10, 16][..], b"application/grpc"].concat();
    let id = |i: u32| 2 * i + 1;
    let content = |i: u32, size: usize| {
        let message = [&[0, 0, 0, (size >> 8) as u8, size as u8][..], &vec![i as u8; size]].concat();
        message.repeat(MESSAGES)
    };
    // Each piece ends in the middle of a message or of its prefix.
    let in_turns = |size: usize, is_end: bool| {
        let all: Vec<_> = (0..STREAMS).map(|i| content(i, size + i as usize)).collect();
        let mut out = Vec::new();
        for from in (0..all.iter().map(Vec::len).max().unwrap_or(0)).step_by(97) {
            for (i, content) in (0..).zip(&all).filter(|(_, content)| from < content.len()) {
                let to = content.len().min(from + 97);
                let flags = u8::from(is_end && to == content.len());
                out.extend(frame(0, flags, id(i), &content[from..to]));
            }
        }
        out
    };
    let mut asked = client;
    let mut answered = server;
    for i in 0..STREAMS {
        asked.extend(frame(1, 4, id(i), &[ask(POST, &format!("/m/{i}"), true), grpc.clone()].concat()));
        answered.extend(frame(1, 4, id(i), &[OK, &grpc].concat()));
    }
    asked.extend(in_turns(300, true));
    // One more that is given up, twice begun on the same number of bytes.
    asked.extend(frame(1, 4, id(STREAMS), &[ask(POST, "/m/given-up", true), grpc].concat()));
    asked.extend(frame(0, 0, id(STREAMS), &[0, 0, 0, 1, 0, 9, 9]));
    answered.extend(in_turns(200, false));
    for i in 0..STREAMS {
        answered.extend(frame(1, 5, id(i), &[&[0x00, 11][..], b"grpc-status", &[1], b"0"].concat()));
    }
    let reset = frame(3, 0, id(STREAMS), &8_u32.to_be_bytes());
    let steps = [Step::client(asked).split(1000), Step::server(answered).split(777), Step::client(reset)];
    let address = play(HERE, &steps);
    let agent = Agent::shared();
    for side in [Side::Server, Side::Client] {
        let end = Instant::now() + Duration::from_secs(10);
        while agent.seen(&address, side).len() <= STREAMS as usize && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(50));
        }
        let seen = agent.seen(&address, side);
        assert_eq!(seen.len(), STREAMS as usize + 1, "{side}");
        for e in seen {
            let wanted = if e.path.as_deref() == Some("/m/given-up") { [1, 0] } else { [MESSAGES as u64; 2] };
            assert_eq!(e.messages, Some(wanted), "{side} {e:?}");
        }
    }
}

#[test]
fn streams_that_end_early() {
    let (client, server) = open();
    let ask = |id: u32, path: &str| frame(1, 4, id, &ask(POST, path, false));
    let steps = [
        Step::client(client),
        Step::server(server),
        Step::client([ask(1, "/cancelled"), ask(3, "/early"), ask(5, "/refused"), ask(7, "/left")].concat()),
        Step::client(frame(3, 0, 1, &8u32.to_be_bytes())),
        Step::server([frame(1, 5, 3, b"\x8d"), frame(3, 0, 3, &[0; 4])].concat()),
        Step::server(frame(3, 0, 5, &7u32.to_be_bytes())),
    ];
    let server = play(HERE, &steps);
    Agent::shared().expect(
        &server,
        &[
            Want::any("POST", "/cancelled", 0).ending(End::Reset),
            Want::any("POST", "/early", 404),
            Want::any("POST", "/refused", 0).ending(End::Reset),
            Want { end: None, ..Want::any("POST", "/left", 0) },
        ],
    );
    let seen = Agent::shared().seen(&server, Side::Server);
    let code = |path: &str| seen.iter().find(|e| e.path.as_deref() == Some(path)).and_then(|e| e.stream_error);
    assert_eq!((code("/cancelled"), code("/refused"), code("/early")), (Some(8), Some(7), None));
}

/// `Upgrade: h2c` (RFC 7540 section 3.2), with what follows in the same call or in others.
#[test]
fn h2c_by_upgrade() {
    let (client, server) = open();
    for together in [true, false] {
        let path = format!("/upgraded/{together}");
        let rq = format!(
            "GET {path} HTTP/1.1\r\nHost: t\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n\r\n"
        );
        let switching = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n".to_vec();
        let first = [frame(1, 4, 1, OK), frame(0, 1, 1, b"hello")].concat();
        let mut steps = vec![Step::client(rq.as_bytes())];
        if together {
            steps.push(Step::server([&switching[..], &server, &first].concat()));
            steps.push(Step::client(client.clone()));
        } else {
            steps.extend([
                Step::server(switching),
                Step::client(client.clone()).split(5),
                Step::server(server.clone()),
            ]);
            steps.push(Step::server(first));
        }
        steps.push(Step::client(frame(1, 5, 3, &ask(GET, "/second", false))));
        steps.push(Step::server(frame(1, 5, 3, b"\x89")));
        let at = play(HERE, &steps);
        Agent::shared().expect(
            &at,
            &[
                Want { request_bytes: Some(rq.len() as u64), ..Want::any("GET", path, 200).bodies(0, 5) },
                Want::any("GET", "/second", 204).bodies(0, 0),
            ],
        );
    }
}

/// What is no HTTP/2 after all makes no exchange, and harms nobody.
#[test]
fn hostile_frames() {
    let (client, server) = open();
    let good = |path: &str| {
        [
            Step::client([&client[..], &frame(1, 5, 1, &ask(GET, path, false))].concat()),
            Step::server([&server[..], &frame(1, 5, 1, OK)].concat()),
        ]
    };
    let noise: Vec<u8> = (0..4000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let mut sessions = Vec::new();
    for (i, bad) in [
        [&frame(1, 4, 0, b"x")[..], &noise].concat(),
        [&frame(9, 4, 3, b"\xff\xff\xff\xff\xff")[..], &noise].concat(),
        frame(1, 0x2d, 3, &[200, 0, 0, 0, 0, 0]),
        frame(5, 4, 1, &[0]),
        frame(7, 0, 0, &[0xff; 8]),
        noise.clone(),
    ]
    .into_iter()
    .enumerate()
    {
        let mut steps = good(&format!("/hostile/{i}")).to_vec();
        steps.extend([Step::client(bad.clone()), Step::server(bad)]);
        sessions.push(steps);
    }
    // A preface that is none, and a server that only looks like one.
    sessions.push(vec![Step::client([PREFACE, &noise].concat()), Step::server(noise.clone())]);
    sessions.push(vec![Step::server([0, 0, 6, 4, 0].to_vec()), Step::client(noise.clone()), Step::server(noise)]);
    let server = play_many(HERE, &sessions);
    let wanted: Vec<_> = (0..6).map(|i| Want::any("GET", format!("/hostile/{i}"), 200)).collect();
    Agent::shared().expect(&server, &wanted);
}

fn wait_for(port: u16) {
    let end = Instant::now() + Duration::from_secs(20);
    while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(Instant::now() < end, "nothing listens at {port}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// nginx that answers `ok` over HTTP/2 in plaintext, its port, and the folder that is to be removed.
fn nginx(name: &str) -> (Guard, u16, std::path::PathBuf) {
    let port = free_port();
    let folder = std::env::temp_dir().join(format!("apiscope-nginx-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder");
    let f = folder.display();
    let text = format!(
        "daemon off; worker_processes 1; pid {f}/pid; error_log {f}/error.log; user root; events {{ worker_connections 2048; }}
        http {{ access_log off; client_body_temp_path {f}/b; proxy_temp_path {f}/p; fastcgi_temp_path {f}/f; uwsgi_temp_path {f}/u;
        scgi_temp_path {f}/s; keepalive_requests 10000000; http2_max_concurrent_streams 512;
        server {{ listen 127.0.0.1:{port} http2; location / {{ return 200 ok; }} }} }}"
    );
    std::fs::write(folder.join("nginx.conf"), text).expect("writable");
    let nginx = Command::new(program("nginx"))
        .args(["-g", "master_process off;", "-p"])
        .arg(&folder)
        .arg("-c")
        .arg(folder.join("nginx.conf"))
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("nginx starts");
    let server = Guard(nginx);
    wait_for(port);
    (server, port, folder)
}

/// The agent stands still now and then while 20,000 streams go by, and its ring is the smallest: what did not fit
/// is counted. A connection whose end did not fit counts once more than its streams. Counters are those of the
/// machine, so that others' traffic makes it try again.
#[test]
fn what_a_full_ring_loses_is_counted() {
    const STREAMS: u64 = 20_000;
    let (_server, port, folder) = nginx("h2-ring");
    let config = folder.join("ring.toml");
    std::fs::write(&config, "[limits]\nring_bytes = 65536\n").expect("writable");
    let config = config.display().to_string();
    let mut attempts = 0;
    let mut shapes = vec![(10, 1), (10, 10), (2, 100)];
    while let Some((connections, streams)) = shapes.pop() {
        let only = port.to_string();
        let agent = Agent::start(&format!("h2-ring-{streams}"), &["--config", &config, "--include-port", &only]);
        let pid = libc::pid_t::try_from(agent.child.id()).expect("a pid");
        let load = Command::new(program("h2load"))
            .args(["-t1", &format!("-n{STREAMS}"), &format!("-c{connections}"), &format!("-m{streams}")])
            .arg(format!("http://127.0.0.1:{port}/ring"))
            .stdout(Stdio::piped())
            .spawn()
            .expect("h2load starts");
        for signal in [libc::SIGSTOP, libc::SIGCONT, libc::SIGSTOP] {
            std::thread::sleep(Duration::from_millis(100));
            // SAFETY: signals our own child.
            unsafe { libc::kill(pid, signal) };
        }
        let out = load.wait_with_output().expect("h2load ends");
        assert!(String::from_utf8_lossy(&out.stdout).contains("20000 succeeded"), "{out:?}");
        // SAFETY: as above.
        unsafe { libc::kill(pid, libc::SIGCONT) };
        // Streams that wait for the rest of theirs are given up after a second.
        std::thread::sleep(Duration::from_millis(2500));
        let losses = agent.snapshot().expect("an answer").totals.losses;
        let lost = ["ring_full", "end_ring_full", "http2_streams"].map(|reason| losses[reason]);
        let seen = |side| agent.seen(&format!("127.0.0.1:{port}"), side).len() as u64;
        let counted = seen(Side::Server) + seen(Side::Client);
        agent.stop();
        let sum = counted + lost.iter().sum::<u64>();
        let what = format!("-c{connections} -m{streams}: {counted} seen, {lost:?} lost: {sum} of {}", 2 * STREAMS);
        assert!(sum >= 2 * STREAMS - STREAMS / 500 && lost[0] > 1000, "{what}: some are lost silently");
        if sum > 2 * STREAMS + 2 * connections + STREAMS / 50 {
            eprintln!("{what}: others send too, or it is counted twice");
            attempts += 1;
            assert!(attempts < 8, "{what}, and so it was again and again");
            shapes.push((connections, streams));
        }
    }
    std::fs::remove_dir_all(folder).expect("removable");
}

/// nginx and h2load with 1, 8 and 100 streams a connection; curl, whose connections have one.
#[test]
fn nginx_with_h2load_and_curl() {
    let agent = Agent::shared();
    let (_server, port, folder) = nginx("h2");
    let lost = agent.lost();
    let mut wanted = Vec::new();
    for (connections, streams) in [(1, 1), (4, 8), (2, 100)] {
        let path = format!("/h/{streams}");
        let out = Command::new(program("h2load"))
            .args(["-t1", "-n2000", &format!("-c{connections}"), &format!("-m{streams}")])
            .arg(format!("http://127.0.0.1:{port}{path}"))
            .output()
            .expect("h2load starts");
        assert!(String::from_utf8_lossy(&out.stdout).contains("2000 succeeded"), "{out:?}");
        wanted.extend(std::iter::repeat_n(Want::any("GET", path, 200).bodies(0, 2), 2000));
    }
    let url = format!("http://127.0.0.1:{port}/curl");
    let status = Command::new(program("curl"))
        .args(["-sf", "-o", "/dev/null", "--http2-prior-knowledge", &url])
        .status()
        .expect("curl starts");
    assert!(status.success());
    wanted.push(Want::any("GET", "/curl", 200).bodies(0, 2));
    agent.expect(&format!("127.0.0.1:{port}"), &wanted);
    assert_eq!(agent.lost(), lost);
    std::fs::remove_dir_all(folder).expect("removable");
}

/// A session whose header table is full before the agent comes: what it sends from then on is seen, by what
/// can be known of it.
#[test]
fn node_with_a_session_older_than_the_agent() {
    let port = free_port();
    let code = format!(
        "const http2 = require('http2');
        const server = http2.createServer((q, r) => {{ q.resume(); q.on('end', () => r.end('ok')); }});
        server.listen({port}, '127.0.0.1', async () => {{
          const s = http2.connect('http://127.0.0.1:{port}');
          const get = p => new Promise(r => {{ const q = s.request({{ ':path': p, 'x-same': 'value' }}); q.resume(); q.on('end', r); q.end(); }});
          for (let i = 0; i < 20; i++) await get('/early/' + i);
          console.log('ready');
          process.stdin.once('data', async () => {{
            await Promise.all([...Array(50).keys()].map(i => get('/fresh/' + i)));
            console.log('done');
          }});
        }});"
    );
    let mut node = Command::new(program("node"))
        .args(["-e", &code])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("node starts");
    let mut lines = BufReader::new(node.stdout.take().expect("piped"));
    let mut input = node.stdin.take().expect("piped");
    let _node = Guard(node);
    let mut line = String::new();
    lines.read_line(&mut line).expect("a line");
    assert_eq!(line.trim(), "ready");
    let agent = Agent::start("late-h2", &[]);
    std::io::Write::write_all(&mut input, b"go\n").expect("it reads");
    line.clear();
    lines.read_line(&mut line).expect("a line");
    assert_eq!(line.trim(), "done");
    let wanted: Vec<_> = (0..50).map(|i| Want::any("GET", format!("/fresh/{i}"), 200).bodies(0, 2)).collect();
    agent.expect(&format!("127.0.0.1:{port}"), &wanted);
    agent.stop();
}
