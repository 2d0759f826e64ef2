//! HTTP/1 as it should not be, or seldom is: each test is connections of its own, seen from both ends. What a
//! server may accept is counted byte for byte; what is not HTTP is not.

use std::{fmt::Write as _, time::Duration};

use apiscope::exchange::End;
use apiscope_tests::{Agent, Step, Want, play};

const HERE: &str = "127.0.0.1:0";

fn request(method: &str, path: &str, fields: &str, body: &[u8]) -> Vec<u8> {
    let mut head = format!("{method} {path} HTTP/1.1\r\nHost: t\r\n{fields}");
    if !body.is_empty() {
        let _ = write!(head, "Content-Length: {}\r\n", body.len());
    }
    [head.as_bytes(), b"\r\n", body].concat()
}

fn response(status: u16, fields: &str, body: &[u8]) -> Vec<u8> {
    let head = format!("HTTP/1.1 {status} Whatever\r\n{fields}Content-Length: {}\r\n\r\n", body.len());
    [head.as_bytes(), body].concat()
}

/// Requests and their answers one after the other, each as (method, path, status, request, response).
type One = (&'static str, &'static str, u16, Vec<u8>, Vec<u8>);

fn in_turn(all: Vec<One>, splits: &[usize]) {
    for &split in splits {
        let (mut steps, mut wanted) = (Vec::new(), Vec::new());
        for (method, path, status, rq, rs) in &all {
            steps.extend([Step::client(rq.clone()).split(split), Step::server(rs.clone()).split(split)]);
            wanted.push(Want::new(method, *path, *status, rq, rs));
        }
        Agent::shared().expect(&play(HERE, &steps), &wanted);
    }
}

const SPLITS: [usize; 6] = [1, 2, 3, 13, 64, usize::MAX];

#[test]
fn methods_that_nobody_registered() {
    let all = ["get", "G", "VERSION-CONTROL", "BASELINE-CONTROL", "X~!#$%&'*+-.^_`|", "HEADS", "CONNECTED", "H"]
        .into_iter()
        .map(|m| (m, "/m", 200, request(m, "/m", "", b""), response(200, "", b"1")))
        .collect();
    in_turn(all, &[1, 5, usize::MAX]);
}

#[test]
fn chunks_as_the_grammar_allows() {
    let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
    let upload = "POST /chunks HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n";
    let long = format!("3;x={}\r\nabc\r\n0\r\n\r\n", "y".repeat(5000));
    let trailers: String = (0..200).map(|i| format!("X-Trailer-{i}: {}\r\n", "t".repeat(60))).collect();
    let bodies = [
        "3\r\nabc\r\n0\r\n\r\n".to_owned(),
        "0\r\n\r\n".into(),
        "0003\r\nabc\r\n00000\r\n\r\n".into(),
        "A\r\n0123456789\r\na\r\n0123456789\r\n0\r\n\r\n".into(),
        "3;name=\"quoted;\\\"value\"\r\nabc\r\n0;last\r\n\r\n".into(),
        "3 \r\nabc\r\n0 \r\n\r\n".into(),
        "2\r\n\r\n\r\n0\r\n\r\n".into(),
        "5\r\n0\r\n\r\n\r\n0\r\n\r\n".into(),
        long,
        format!("1\r\nx\r\n0\r\n{trailers}\r\n"),
        "3\nabc\n0\n\n".replace("abc\n", "abc\r\n"),
    ];
    let all = bodies
        .iter()
        .map(|b| ("POST", "/chunks", 200, format!("{upload}{b}").into_bytes(), format!("{head}{b}").into_bytes()))
        .collect();
    in_turn(all, &SPLITS);
}

#[test]
fn heads_as_nobody_should_send_them() {
    let ok = || response(200, "", b"ok");
    let all = vec![
        (
            "GET",
            "/bare-lf",
            200,
            b"GET /bare-lf HTTP/1.1\nHost: t\n\n".to_vec(),
            b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok".to_vec(),
        ),
        ("GET", "/nul", 200, request("GET", "/nul", "X-A: a\0b\r\n", b""), response(200, "X-B: \0\0\r\n", b"x")),
        ("GET", "/bytes", 200, [b"GET /bytes HTTP/1.1\r\nX: \xff\xfe\x80\r\n".as_slice(), b"\r\n"].concat(), ok()),
        ("GET", "/fold", 200, request("GET", "/fold", "X-A: a\r\n  folded\r\n\tfolded\r\n", b""), ok()),
        ("GET", "/no-colon", 200, request("GET", "/no-colon", "nonsense\r\n: empty\r\n", b""), ok()),
        (
            "POST",
            "/tight",
            200,
            b"POST /tight HTTP/1.1\r\ncontent-length:3\r\n\r\nabc".to_vec(),
            b"HTTP/1.1 200\r\nCONTENT-LENGTH:   2  \r\n\r\nok".to_vec(),
        ),
        ("POST", "/tabs", 200, b"POST /tabs HTTP/1.1\r\nContent-Length:\t3\t\r\n\r\nabc".to_vec(), ok()),
        ("POST", "/zeros", 200, b"POST /zeros HTTP/1.1\r\nContent-Length: 0000003\r\n\r\nabc".to_vec(), ok()),
        (
            "POST",
            "/same-twice",
            200,
            b"POST /same-twice HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\nabc".to_vec(),
            ok(),
        ),
        (
            "POST",
            "/both",
            200,
            b"POST /both HTTP/1.1\r\nContent-Length: 99\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n"
                .to_vec(),
            ok(),
        ),
        (
            "POST",
            "/coded",
            200,
            b"POST /coded HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n1\r\na\r\n0\r\n\r\n".to_vec(),
            ok(),
        ),
        (
            "POST",
            "/case",
            200,
            b"POST /case HTTP/1.1\r\ntransfer-encoding: ChUnKeD\r\n\r\n1\r\na\r\n0\r\n\r\n".to_vec(),
            ok(),
        ),
        (
            "POST",
            "/almost",
            200,
            b"POST /almost HTTP/1.1\r\nX-Content-Length: 9\r\nContent-Lengths: 9\r\nContent-Length: 1\r\n\r\na"
                .to_vec(),
            ok(),
        ),
        ("GET", "/space in it", 200, request("GET", "/space in it", "", b""), ok()),
        ("GET", "/empty-lines", 200, b"\r\n\r\nGET /empty-lines HTTP/1.1\r\n\r\n".to_vec(), ok()),
    ];
    let (mut steps, mut wanted) = (Vec::new(), Vec::new());
    for (method, path, status, rq, rs) in &all {
        steps.extend([Step::client(rq.clone()), Step::server(rs.clone())]);
        // Empty lines before a message are no part of it.
        let message = &rq[rq.iter().take_while(|b| b"\r\n".contains(b)).count()..];
        wanted.push(Want::new(method, *path, *status, message, rs));
    }
    Agent::shared().expect(&play(HERE, &steps), &wanted);
}

#[test]
fn one_very_long_line() {
    let (mut steps, mut wanted) = (Vec::new(), Vec::new());
    for (i, split) in [100, 511, 512, 513, 4095, 4096, 4097, usize::MAX].into_iter().enumerate() {
        let path = format!("/long/{i}");
        let fields = format!("Cookie: {}\r\nContent-Length: 3\r\n", "c".repeat(20_000));
        let rq = request("POST", &path, &fields, b"");
        let rq = [&rq[..], b"abc"].concat();
        let rs = response(200, &format!("X: {}\r\n", "r".repeat(20_000 + i)), b"ok");
        steps.extend([Step::client(rq.clone()).split(split), Step::server(rs.clone()).split(split)]);
        wanted.push(Want::new("POST", path, 200, &rq, &rs));
    }
    Agent::shared().expect(&play(HERE, &steps), &wanted);
}

/// The field that frames the message is split at every byte, on a line that is longer than what is carried over.
#[test]
fn framing_fields_split_at_every_byte() {
    let (mut steps, mut wanted) = (Vec::new(), Vec::new());
    let heads = ["Content-Length: 5\r\n\r\nhello", "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"];
    for (k, tail) in heads.into_iter().enumerate() {
        for cut in 0..tail.len() {
            let path = format!("/cut/{k}/{cut}");
            let head = format!("POST {path} HTTP/1.1\r\nX-First: {}\r\n", "f".repeat(100));
            let rq = format!("{head}{tail}").into_bytes();
            let at = head.len() + cut;
            let rs = response(200, "", b"ok");
            steps.extend([Step::client(&rq[..at]), Step::client(&rq[at..]), Step::server(rs.clone())]);
            wanted.push(Want::new("POST", path, 200, &rq, &rs).bodies(5, 2));
        }
    }
    Agent::shared().expect(&play(HERE, &steps), &wanted);
}

#[test]
fn a_reset_content_answer() {
    // RFC 9110 section 15.3.6: no content, by whatever framing says so.
    let all = vec![
        ("POST", "/205", 205, request("POST", "/205", "", b"form"), response(205, "", b"")),
        (
            "POST",
            "/205",
            205,
            request("POST", "/205", "", b"form"),
            b"HTTP/1.1 205 Reset\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".to_vec(),
        ),
        ("GET", "/next", 200, request("GET", "/next", "", b""), response(200, "", b"still")),
    ];
    in_turn(all, &[usize::MAX]);
}

#[test]
fn an_expectation_that_is_refused() {
    let rq = request("POST", "/refused", "Expect: 100-continue\r\n", &[b'b'; 3000]);
    let head = rq.len() - 3000;
    let rs = response(417, "Connection: close\r\n", b"no");
    let server = play(HERE, &[Step::client(&rq[..head]), Step::server(rs.clone()), Step::Close(true)]);
    let mut want = Want::any("POST", "/refused", 417).ending(End::Closed);
    want.request_bytes = Some(head as u64);
    want.response_bytes = Some(rs.len() as u64);
    Agent::shared().expect(&server, &[want]);
}

#[test]
fn half_closed_both_ways() {
    // The client has no more to send, the server answers until it closes.
    let (rq, rs) = (request("GET", "/half", "", b""), [b"HTTP/1.1 200 OK\r\n\r\n".to_vec(), vec![b'h'; 9000]].concat());
    let server = play(
        HERE,
        &[
            Step::client(rq.clone()),
            Step::Shutdown(true),
            // Else the answer and its end may be there before the client says that it has no more to send.
            Step::ReadEnd(false),
            Step::server(rs.clone()),
            Step::Shutdown(false),
            Step::ReadEnd(true),
        ],
    );
    Agent::shared().expect(&server, &[Want::new("GET", "/half", 200, &rq, &rs).bodies(0, 9000)]);
}

#[test]
fn pipelines_of_a_hundred() {
    for (n, split) in [(63, 1000), (100, usize::MAX), (200, 777)] {
        let (mut rqs, mut rss, mut wanted) = (Vec::new(), Vec::new(), Vec::new());
        for i in 0..n {
            let path = format!("/pipe/{i}");
            let (rq, rs) = (request("GET", &path, "", b""), response(200, "", &vec![b'p'; i]));
            wanted.push(Want::new("GET", path, 200, &rq, &rs));
            rqs.extend(rq);
            rss.extend(rs);
        }
        let server = play(HERE, &[Step::client(rqs), Step::server(rss).split(split)]);
        Agent::shared().expect(&server, &wanted);
    }
}

/// Not HTTP/1.0 and 1.1, however near: nothing is seen, and what follows on another connection is.
#[test]
fn nearly_http() {
    let answer = b"<html>HTTP/0.9 has no head</html>";
    for talk in [
        &b"GET /old\r\n"[..],
        b"GET /\x00 HTTP/9.9\r\n\r\n",
        b"GET HTTP/1.1\r\n\r\n",
        b" GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1x\r\n\r\n",
        b"G\x80T / HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"RTSP/1.0 200 OK\r\n\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/1.1 xyz OK\r\n\r\n",
        b"HTTP/1\r\n\r\n",
        b"OPTIONS sip:a@b SIP/2.0\r\n\r\n",
    ] {
        let server = play(HERE, &[Step::client(talk), Step::server(&answer[..]), Step::Close(false)]);
        Agent::shared().expect(&server, &[]);
    }
}

/// A connection that begins as something else and then speaks HTTP (a proxy's PROXY line, a port shared by two
/// protocols) is seen from its first request on.
#[test]
fn another_protocol_first() {
    let (rq, rs) = (request("GET", "/after-proxy-line", "", b""), response(200, "", b"ok"));
    for line in [&b"PROXY TCP4 1.2.3.4 5.6.7.8 1111 80\r\n"[..], b"\r\n\r\nPROXY UNKNOWN\r\n", b"\x00\x01binary\xff"] {
        let server = play(HERE, &[Step::client(line), Step::client(rq.clone()), Step::server(rs.clone())]);
        Agent::shared().expect(&server, &[Want::new("GET", "/after-proxy-line", 200, &rq, &rs)]);
    }
}

#[test]
fn a_client_that_gives_up_in_the_middle() {
    let rq = request("POST", "/gives-up", "", &[b'g'; 5000]);
    let pause = Duration::from_millis(50);
    let server = play(HERE, &[Step::client(&rq[..2000]), Step::Sleep(true, pause), Step::Close(true)]);
    let mut want = Want::any("POST", "/gives-up", 0).ending(End::Closed);
    want.request_bytes = Some(2000);
    Agent::shared().expect(&server, &[want]);
    // In the head: there is no request yet.
    let server = play(HERE, &[Step::client(&rq[..20]), Step::Sleep(true, pause), Step::Close(true)]);
    Agent::shared().expect(&server, &[]);
}
