//! HTTP/1 in every shape, byte for byte: each test is connections of its own, seen from both ends.

use std::{fmt::Write as _, time::Duration};

use apiscope::exchange::End;
use apiscope_tests::{Agent, Call, Step, Want, play, play_many};

const HERE: &str = "127.0.0.1:0";

fn request(method: &str, target: &str, body: &[u8], fields: &str) -> Vec<u8> {
    let mut head = format!("{method} {target} HTTP/1.1\r\nHost: t.test\r\n{fields}");
    if !body.is_empty() {
        let _ = write!(head, "Content-Length: {}\r\n", body.len());
    }
    [head.as_bytes(), b"\r\n", body].concat()
}

fn response(status: u16, body: &[u8]) -> Vec<u8> {
    [format!("HTTP/1.1 {status} Whatever\r\nServer: t\r\nContent-Length: {}\r\n\r\n", body.len()).as_bytes(), body]
        .concat()
}

fn chunked(head: &str, body: &[u8], size: usize) -> Vec<u8> {
    let mut out = format!("{head}Transfer-Encoding: chunked\r\n\r\n").into_bytes();
    for part in body.chunks(size) {
        out.extend_from_slice(format!("{:x};note=1\r\n", part.len()).as_bytes());
        out.extend_from_slice(part);
        out.extend_from_slice(b"\r\n");
    }
    out.extend_from_slice(b"0\r\nX-Trailer: done\r\n\r\n");
    out
}

#[test]
fn keep_alive_with_bodies_of_every_size() {
    let (mut steps, mut wanted) = (Vec::new(), Vec::new());
    for (i, size) in [0, 1, 17, 300, 4096, 9000, 200_000].into_iter().enumerate() {
        let (rq, rs) =
            (request("POST", &format!("/k/{i}"), &vec![b'q'; size], ""), response(201, &vec![b's'; size * 2]));
        steps.extend([Step::client(rq.clone()), Step::server(rs.clone())]);
        wanted.push(Want::new("POST", format!("/k/{i}"), 201, &rq, &rs).bodies(size, size * 2));
    }
    Agent::shared().expect(&play(HERE, &steps), &wanted);
}

#[test]
fn chunks_both_ways_at_every_split() {
    let (mut steps, mut wanted) = (Vec::new(), Vec::new());
    for (i, split) in [1, 2, 7, 100, 5000].into_iter().enumerate() {
        let path = format!("/chunked/{i}");
        let rq = chunked(&format!("PUT {path} HTTP/1.1\r\nHost: t\r\n"), &vec![b'a'; 900], 37);
        let rs = chunked("HTTP/1.1 200 OK\r\n", &vec![b'b'; 3000], 1000);
        steps.extend([Step::client(rq.clone()).split(split), Step::server(rs.clone()).split(split)]);
        wanted.push(Want::new("PUT", path, 200, &rq, &rs).bodies(900, 3000));
    }
    Agent::shared().expect(&play(HERE, &steps), &wanted);
}

#[test]
fn pipelined_requests_and_answers_in_odd_pieces() {
    for split in [1, 3, 100, 1000] {
        let rqs: Vec<_> = (0..10).map(|i| request("GET", &format!("/pipe/{i}"), b"", "")).collect();
        let rss: Vec<_> = (0..10).map(|i| response(200, &vec![b'x'; i * 10])).collect();
        let wanted: Vec<_> = (0..10).map(|i| Want::new("GET", format!("/pipe/{i}"), 200, &rqs[i], &rss[i])).collect();
        let server = play(HERE, &[Step::client(rqs.concat()), Step::server(rss.concat()).split(split)]);
        Agent::shared().expect(&server, &wanted);
    }
}

#[test]
fn answers_without_a_body() {
    let (mut steps, mut wanted) = (Vec::new(), Vec::new());
    for (method, path, status, rs) in [
        ("HEAD", "/head", 200, &b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"[..]),
        ("GET", "/204", 204, b"HTTP/1.1 204 No Content\r\n\r\n"),
        ("GET", "/304", 304, b"HTTP/1.1 304 Not Modified\r\nContent-Length: 555\r\n\r\n"),
        ("GET", "/after", 200, b"HTTP/1.1 200 OK\r\ncontent-length:2\r\n\r\nok"),
    ] {
        let rq = request(method, path, b"", "");
        steps.extend([Step::client(rq.clone()), Step::server(rs)]);
        wanted.push(Want::new(method, path, status, &rq, rs));
    }
    Agent::shared().expect(&play(HERE, &steps), &wanted);
}

#[test]
fn interim_responses_count_with_the_final_one() {
    let rq = request("POST", "/continue", &[b'b'; 5000], "Expect: 100-continue\r\n");
    let cut = rq.len() - 5000;
    let (go, hints, rs) = (
        &b"HTTP/1.1 100 Continue\r\n\r\n"[..],
        &b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"[..],
        response(201, b"made"),
    );
    let steps = [
        Step::client(&rq[..cut]),
        Step::server(go),
        Step::client(&rq[cut..]),
        Step::server(hints),
        Step::server(rs.clone()),
    ];
    let whole = [go, hints, &rs].concat();
    Agent::shared().expect(&play(HERE, &steps), &[Want::new("POST", "/continue", 201, &rq, &whole)]);
}

#[test]
fn a_body_until_the_connection_closes() {
    let (rq, rs) = (b"GET /old HTTP/1.0\r\n\r\n", [b"HTTP/1.0 200 OK\r\n\r\n".to_vec(), vec![b'y'; 30_000]].concat());
    // A client that closes before it saw the end cannot know that it had all: it reads up to it.
    let steps = [Step::client(&rq[..]), Step::server(rs.clone()), Step::Close(false), Step::ReadEnd(true)];
    let server = play(HERE, &steps);
    Agent::shared().expect(&server, &[Want::new("GET", "/old", 200, rq, &rs).bodies(0, 30_000)]);
}

#[test]
fn heads_split_at_every_byte_and_heads_of_16_kib() {
    let (mut steps, mut wanted) = (Vec::new(), Vec::new());
    let filler: String = (0..30).map(|i| format!("X-Filler-{i}: {}\r\n", "z".repeat(530))).collect();
    for (i, (split, fields)) in
        [(1, "X-A: b\r\n"), (2, ""), (5, "X-C: d\r\n"), (1400, &filler), (usize::MAX, &filler)].into_iter().enumerate()
    {
        let path = format!("/split/{i}");
        let rq = request("POST", &path, b"0123456789", fields);
        let rs = response(200, &[b'c'; 20]);
        steps.extend([Step::client(rq.clone()).split(split), Step::server(rs.clone()).split(split)]);
        wanted.push(Want::new("POST", path, 200, &rq, &rs));
    }
    Agent::shared().expect(&play(HERE, &steps), &wanted);
}

#[test]
fn a_head_longer_than_the_limit_is_cut_and_counted_right() {
    let agent = Agent::shared();
    let before = agent.snapshot().map_or(0, |s| s.totals.unread["head_too_long"]);
    let filler: String = (0..100).map(|i| format!("X-Filler-{i}: {}\r\n", "z".repeat(500))).collect();
    let (rq, rs) = (request("POST", "/huge-head", b"body", &filler), response(200, b"ok"));
    let next = request("GET", "/huge-next", b"", "");
    let server = play(
        HERE,
        &[
            Step::client(rq.clone()).split(3000),
            Step::server(rs.clone()),
            Step::client(next.clone()),
            Step::server(rs.clone()),
        ],
    );
    agent.expect(
        &server,
        &[Want::new("POST", "/huge-head", 200, &rq, &rs), Want::new("GET", "/huge-next", 200, &next, &rs)],
    );
    assert!(agent.snapshot().map_or(0, |s| s.totals.unread["head_too_long"]) >= before + 2, "both ends count it");
}

#[test]
fn every_form_of_target_and_unusual_methods() {
    let (mut steps, mut wanted) = (Vec::new(), Vec::new());
    let long = format!("/{}", "p".repeat(3000));
    for (method, target, path) in [
        ("GET", "http://u:pw@t.test/absolute?q=1", "/absolute"),
        ("OPTIONS", "*", "*"),
        ("PURGE", "/cache/1", "/cache/1"),
        ("M-SEARCH", "/ssdp", "/ssdp"),
        ("GET", "/q?a=1&token=secret#f", "/q"),
        ("PATCH", long.as_str(), long.as_str()),
    ] {
        let (rq, rs) = (request(method, target, b"", ""), response(200, b"1"));
        steps.extend([Step::client(rq.clone()), Step::server(rs.clone())]);
        wanted.push(Want::new(method, path, 200, &rq, &rs));
    }
    let server = play(HERE, &steps);
    Agent::shared().expect(&server, &wanted);
    let text = std::fs::read_to_string(&Agent::shared().file).expect("the recording");
    assert!(
        !text.contains("secret") && !text.contains("u:pw"),
        "query values and user information must not be written"
    );
}

#[test]
fn ends_that_are_not_complete() {
    let agent = Agent::shared();
    let rq = request("GET", "/cut", b"", "");
    let rs = response(200, &vec![b'r'; 50_000]);
    let pause = Duration::from_millis(60);
    let server = play(
        HERE,
        &[
            Step::client(rq.clone()),
            Step::server(&rs[..20_000]),
            Step::Sleep(false, pause),
            Step::Reset(false),
            Step::Sleep(true, 3 * pause),
        ],
    );
    let mut cut = Want::any("GET", "/cut", 200).ending(End::Reset);
    cut.response_bytes = Some(20_000);
    agent.expect(&server, &[cut]);
    let rq = request("GET", "/unanswered", b"", "");
    let server = play(HERE, &[Step::client(rq.clone()), Step::Sleep(false, pause), Step::Close(false)]);
    agent.expect(&server, &[Want::new("GET", "/unanswered", 0, &rq, b"").ending(End::Closed)]);
}

#[test]
fn a_half_closed_client_is_answered() {
    let (rq, rs) = (request("GET", "/half", b"", ""), response(200, b"still"));
    let steps = [
        Step::client(rq.clone()),
        Step::Shutdown(true),
        Step::Sleep(false, Duration::from_millis(30)),
        Step::server(rs.clone()),
    ];
    Agent::shared().expect(&play(HERE, &steps), &[Want::new("GET", "/half", 200, &rq, &rs)]);
}

#[test]
fn bodies_that_look_like_heads() {
    let fake_request = b"GET /evil HTTP/1.1\r\nHost: e\r\n\r\n";
    let fake_response = b"HTTP/1.1 500 Bad\r\nContent-Length: 3\r\n\r\nbad";
    let body = [&fake_response[..], fake_request].concat();
    let rq = request("POST", "/lookalike", &body, "");
    let (head, rs) = (rq.len() - body.len(), response(200, fake_request));
    let cr = chunked("POST /chunk-lookalike HTTP/1.1\r\n", fake_request, fake_request.len());
    let steps = [
        Step::client(&rq[..head]),
        Step::client(fake_response),
        Step::client(fake_request),
        Step::server(&rs[..rs.len() - fake_request.len()]),
        Step::server(fake_request),
        Step::client(cr.clone()).split(8),
        Step::server(response(204, b"")),
    ];
    let mut last = Want::any("POST", "/chunk-lookalike", 204);
    last.request_bytes = Some(cr.len() as u64);
    Agent::shared().expect(&play(HERE, &steps), &[Want::new("POST", "/lookalike", 200, &rq, &rs), last]);
}

#[test]
fn upgrades_leave_http() {
    let rq = request("GET", "/chat", b"", "Connection: Upgrade\r\nUpgrade: websocket\r\n");
    let frames = b"\x81\x1cGET /frame HTTP/1.1\r\nHost: e\r\n\r\n".repeat(3);
    let go = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n";
    let server = play(
        HERE,
        &[
            Step::client(rq.clone()),
            Step::server(&go[..]),
            Step::client(frames.clone()),
            Step::server(frames.clone()).split(11),
        ],
    );
    // The sizes are those of request and answer; what was exchanged since the upgrade is their content.
    let sizes = |w: Want, request: usize, response: usize| Want {
        request_bytes: Some(request as u64),
        response_bytes: Some(response as u64),
        ..w.ending(End::Upgraded)
    };
    let want = Want::any("GET", "/chat", 101).bodies(frames.len(), frames.len());
    Agent::shared().expect(&server, &[sizes(want, rq.len(), go.len())]);
    let rq = b"CONNECT db.internal:443 HTTP/1.1\r\nHost: db\r\n\r\n";
    let steps = [
        Step::client(&rq[..]),
        Step::server(&b"HTTP/1.1 200 Established\r\n\r\n"[..]),
        Step::client(vec![7; 500]),
        Step::server(vec![9; 5000]),
    ];
    Agent::shared().expect(
        &play(HERE, &steps),
        &[sizes(Want::any("CONNECT", "db.internal:443", 200).bodies(500, 5000), rq.len(), 28)],
    );
}

#[test]
fn what_is_not_http_is_not_seen() {
    let talk = [
        Step::client(&b"*3\r\n$3\r\nSET\r\n$3\r\nkey\r\n$5\r\nvalue\r\n"[..]),
        Step::server(&b"+OK\r\n"[..]),
        Step::server(&b"SSH-2.0-OpenSSH_9.2\r\n"[..]),
        Step::client((0..3000_u32).map(|i| ((i * 7919) >> 3) as u8).collect::<Vec<_>>()),
        Step::client(&b"GETTING nowhere\r\n"[..]),
        Step::server(&b"HTTP is not spoken here\r\n"[..]),
        Step::client(&b"USER x\r\nPASS y\r\n"[..]),
    ];
    Agent::shared().expect(&play(HERE, &talk), &[]);
}

#[test]
fn every_sending_call() {
    let (mut steps, mut wanted) = (Vec::new(), Vec::new());
    for (i, call) in [Call::Write, Call::Writev, Call::Send, Call::Sendmsg].into_iter().enumerate() {
        let path = format!("/call/{i}");
        let (rq, rs) = (request("POST", &path, &[b'0'; 300], ""), response(200, &[b'w'; 700]));
        steps.extend([Step::client(rq.clone()).by(call), Step::server(rs.clone()).by(call)]);
        wanted.push(Want::new("POST", path, 200, &rq, &rs).bodies(300, 700));
    }
    let (rq, rs) = (request("GET", "/call/sendfile", b"", ""), response(200, &vec![b'f'; 100_000]));
    let head = rs.len() - 100_000;
    steps.extend([Step::client(rq.clone()), Step::server(&rs[..head]), Step::server(&rs[head..]).by(Call::Sendfile)]);
    wanted.push(Want::new("GET", "/call/sendfile", 200, &rq, &rs).bodies(0, 100_000));
    Agent::shared().expect(&play(HERE, &steps), &wanted);
}

#[test]
fn other_address_families() {
    let path = std::env::temp_dir().join(format!("apiscope-unix-{}", std::process::id()));
    for address in ["[::1]:0".to_owned(), format!("unix:{}", path.display())] {
        let (rq, rs) = (request("GET", "/family", b"", ""), response(200, b"here"));
        let server = play(&address, &[Step::client(rq.clone()), Step::server(rs.clone())]);
        Agent::shared().expect(&server, &[Want::new("GET", "/family", 200, &rq, &rs)]);
    }
}

#[test]
fn a_hundred_connections_at_once() {
    let (mut sessions, mut wanted) = (Vec::new(), Vec::new());
    for i in 0..100 {
        let mut steps = Vec::new();
        for k in 0..5 {
            let path = format!("/at-once/{i}/{k}");
            let (rq, rs) = (request("GET", &path, b"", ""), response(200, &[b'k'; 64]));
            steps.extend([
                Step::client(rq.clone()),
                Step::Sleep(false, Duration::from_millis(2)),
                Step::server(rs.clone()),
            ]);
            wanted.push(Want::new("GET", path, 200, &rq, &rs));
        }
        sessions.push(steps);
    }
    Agent::shared().expect(&play_many(HERE, &sessions), &wanted);
}

#[test]
fn durations_are_those_of_the_message() {
    let (mut steps, mut wanted) = (Vec::new(), Vec::new());
    for ms in [1_u64, 10, 100] {
        let path = format!("/slow/{ms}");
        let (rq, rs) = (request("GET", &path, b"", ""), response(200, b"slow"));
        steps.extend([
            Step::client(rq.clone()),
            Step::Sleep(false, Duration::from_millis(ms)),
            Step::server(rs.clone()),
        ]);
        let mut want = Want::new("GET", path, 200, &rq, &rs);
        // The upper bound is for a machine that is busy with other tests.
        want.duration = Some((ms * 980_000, ms * 1_050_000 + 200_000_000));
        wanted.push(want);
    }
    Agent::shared().expect(&play(HERE, &steps), &wanted);
}
