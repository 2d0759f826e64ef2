//! Under load: what was sent is what was counted, or counted as lost; memory stays flat; durations are those
//! that the client measures. The long ones are ignored by default: `cargo xtask test --long` runs them too.

use std::{
    collections::HashMap,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use apiscope::exchange::Side;
use apiscope_tests::{Agent, free_port, listener};

const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

/// A server that answers every head with [`ANSWER`], after `rest`; a thread for each connection.
fn serve(listener: TcpListener, rest: impl Fn(&str) -> Duration + Send + Sync + 'static) {
    let rest = Arc::new(rest);
    thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { continue };
            let rest = rest.clone();
            let served = thread::Builder::new().stack_size(64 << 10).spawn(move || {
                let mut head = [0; 1024];
                while let Ok(n) = stream.read(&mut head) {
                    if n == 0 {
                        return;
                    }
                    thread::sleep(rest(&String::from_utf8_lossy(&head[..n])));
                    if stream.write_all(ANSWER).is_err() {
                        return;
                    }
                }
            });
            served.expect("a thread for a connection");
        }
    });
}

fn listen() -> (TcpListener, SocketAddr) {
    let listener = listener("127.0.0.1");
    let address = listener.local_addr().expect("an address");
    (listener, address)
}

/// An agent that sees only `port`: its totals are this test's alone.
fn agent(name: &str, port: u16) -> Agent {
    Agent::start(name, &["--include-port", &port.to_string()])
}

fn exchanges(agent: &Agent) -> [u64; 2] {
    let totals = agent.snapshot().expect("an answer").totals;
    ["server", "client"].map(|side| totals.exchanges[side])
}

/// Waits until the agent counted `sent` on both sides; losses (the machine's) may stand for what is missing.
fn expect_counted(agent: &Agent, what: &str, before: [u64; 2], lost_before: u64, sent: u64) {
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        let now = exchanges(agent);
        let seen = [now[0] - before[0], now[1] - before[1]];
        let lost = agent.lost() - lost_before;
        assert!(seen.iter().all(|&n| n <= sent), "{what}: {sent} sent, {seen:?} counted: more than there were");
        if seen == [sent, sent] {
            return;
        }
        if Instant::now() > end {
            assert!(seen[0] + seen[1] + lost >= 2 * sent, "{what}: {sent} sent, {seen:?} counted, {lost} lost");
            eprintln!("{what}: {sent} sent, {seen:?} counted, {lost} counted as lost on this machine");
            return;
        }
        thread::sleep(Duration::from_millis(100));
    }
}

/// Sends at `rate` (requests a second in all; 0 is as fast as it goes) over `n` connections; how many were
/// answered.
fn send(address: SocketAddr, n: usize, rate: u64, time: Duration) -> u64 {
    let mut connections: Vec<TcpStream> = (0..n).map(|_| TcpStream::connect(address).expect("a listener")).collect();
    connections.iter().for_each(|c| c.set_nodelay(true).expect("a TCP socket"));
    let (started, mut sent) = (Instant::now(), 0);
    let mut answer = [0; ANSWER.len()];
    while started.elapsed() < time {
        // As many at once as there are connections, or as the rate allows in 5 ms.
        let due = match rate {
            0 => n as u64,
            rate => (rate * started.elapsed().as_micros() as u64 / 1_000_000).saturating_sub(sent).min(n as u64),
        };
        for c in connections.iter_mut().take(due as usize) {
            c.write_all(b"GET /load HTTP/1.1\r\nHost: t\r\n\r\n").expect("a server");
        }
        for c in connections.iter_mut().take(due as usize) {
            c.read_exact(&mut answer).expect("an answer");
        }
        sent += due;
        if rate != 0 {
            thread::sleep(Duration::from_micros(500));
        }
    }
    sent
}

#[test]
fn sent_is_counted_at_every_rate() {
    let (listener, address) = listen();
    serve(listener, |_| Duration::ZERO);
    let agent = agent("rates", address.port());
    for connections in [16, 256] {
        for rate in [100, 1000, 10_000, 0] {
            let (before, lost) = (exchanges(&agent), agent.lost());
            let sent = send(address, connections, rate, Duration::from_millis(1500));
            let what = format!("{connections} connections, {rate}/s");
            assert!(sent >= 100, "{what}: only {sent} were sent");
            expect_counted(&agent, &what, before, lost, sent);
        }
    }
    agent.stop();
}

/// Resident memory of the agent, KiB.
fn resident(agent: &Agent) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", agent.child.id())).expect("it runs");
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).expect("a size");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

/// Runs `work` in so many threads for `time`, and looks at the agent's memory: after a quarter of it nothing may grow by more than
/// 6 MiB, which is less than one more byte for each of the requests that follow.
fn flat(agent: &Agent, time: Duration, workers: usize, work: impl Fn() -> u64 + Sync) -> u64 {
    let (sent, over) = (AtomicU64::new(0), AtomicBool::new(false));
    let mut sizes = Vec::new();
    thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    sent.fetch_add(work(), Ordering::Relaxed);
                }
            });
        }
        for _ in 0..20 {
            thread::sleep(time / 20);
            sizes.push(resident(agent));
        }
        over.store(true, Ordering::Relaxed);
    });
    let settled = sizes[..5].iter().max().copied().unwrap_or_default();
    let most = sizes.iter().max().copied().unwrap_or_default();
    let n = sent.into_inner();
    eprintln!("{n} exchanges in {} s ({}/s); RSS of the agent, KiB: {sizes:?}", time.as_secs(), n / time.as_secs());
    assert!(most <= settled + 6 * 1024, "the agent grows: {sizes:?} KiB");
    n
}

/// One connection for one request, at one of many loopback addresses (a port can be used again for another).
fn short_connection(port: u16, number: u64, path: &str) -> u64 {
    let address = Ipv4Addr::new(127, 1 + (number % 200) as u8, (number / 200 % 250) as u8, 1);
    let Ok(mut stream) = TcpStream::connect((address, port)) else { return 0 };
    let request = format!("GET {path} HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).expect("a server");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).expect("an answer");
    assert_eq!(answer, ANSWER);
    1
}

/// A server for connections of one request, without a thread for each.
fn serve_shortly() -> u16 {
    let listener = listener("0.0.0.0");
    let port = listener.local_addr().expect("an address").port();
    let listener = Arc::new(listener);
    for _ in 0..2 {
        let listener = listener.clone();
        thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let mut head = [0; 1024];
                if stream.read(&mut head).is_ok_and(|n| n > 0) {
                    // A client that is gone is its test's to report.
                    let _ = stream.write_all(ANSWER);
                }
            }
        });
    }
    port
}

fn short_connections_and_many_paths(name: &str, time: Duration) {
    let port = serve_shortly();
    let agent = agent(name, port);
    let lost = agent.lost();
    let number = AtomicU64::new(0);
    let started = Instant::now();
    let sent = flat(&agent, time, 2, || {
        // 10,000 a second, no more.
        if number.load(Ordering::Relaxed) > started.elapsed().as_micros() as u64 / 100 {
            thread::sleep(Duration::from_micros(500));
            return 0;
        }
        let n = number.fetch_add(1, Ordering::Relaxed);
        // 100,000 paths that look like no type of id.
        let word: String = (0..6).map(|i| char::from(b'a' + (n % 100_000 / 10_u64.pow(i) % 10) as u8)).collect();
        short_connection(port, n, &format!("/word/{word}"))
    });
    expect_counted(&agent, name, [0, 0], lost, sent);
    let snapshot = agent.snapshot().expect("an answer");
    let requests: u64 = snapshot.endpoints.iter().map(|e| e.requests).sum();
    let both: u64 = snapshot.totals.exchanges.values().sum();
    assert_eq!(requests, both, "the endpoints' sum, the overflow's included, is not the total");
    assert!(snapshot.endpoints.len() <= 2100, "{} endpoints", snapshot.endpoints.len());
    agent.stop();
}

#[test]
fn short_connections() {
    short_connections_and_many_paths("short", Duration::from_secs(6));
}

#[test]
#[ignore = "takes 70 s: `cargo xtask test --long`"]
fn short_connections_for_long() {
    short_connections_and_many_paths("short-long", Duration::from_secs(70));
}

/// A process that sends one request and ends, 10 ms later. Between fork and its end it makes system calls only.
fn short_process(address: SocketAddr) -> u64 {
    const REQUEST: &[u8] = b"GET /process HTTP/1.1\r\nHost: t\r\n\r\n";
    let SocketAddr::V4(v4) = address else { return 0 };
    // SAFETY: plain data.
    let mut to: libc::sockaddr_in = unsafe { std::mem::zeroed() };
    to.sin_family = libc::AF_INET as u16;
    to.sin_port = v4.port().to_be();
    to.sin_addr.s_addr = u32::from(*v4.ip()).to_be();
    // SAFETY: the child makes async-signal-safe calls on its own stack alone, and never returns.
    unsafe {
        let pid = libc::fork();
        if pid == 0 {
            let s = libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0);
            let size = libc::socklen_t::try_from(size_of::<libc::sockaddr_in>()).unwrap_or(16);
            if libc::connect(s, (&raw const to).cast(), size) != 0 {
                libc::_exit(1);
            }
            let mut answer = [0_u8; ANSWER.len()];
            let sent = libc::write(s, REQUEST.as_ptr().cast(), REQUEST.len());
            let got = libc::recv(s, answer.as_mut_ptr().cast(), answer.len(), libc::MSG_WAITALL);
            libc::usleep(10_000);
            libc::_exit(i32::from(sent != REQUEST.len() as isize || got != answer.len() as isize));
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(pid, &raw mut status, 0), pid);
        u64::from(status == 0)
    }
}

fn short_processes(name: &str, time: Duration) {
    let (listener, address) = listen();
    serve(listener, |_| Duration::ZERO);
    let agent = agent(name, address.port());
    let lost = agent.lost();
    let sent = flat(&agent, time, 16, || short_process(address));
    expect_counted(&agent, name, [0, 0], lost, sent);
    agent.stop();
}

#[test]
fn processes_of_10_ms() {
    short_processes("processes", Duration::from_secs(5));
}

#[test]
#[ignore = "takes 70 s: `cargo xtask test --long`"]
fn processes_of_10_ms_for_long() {
    short_processes("processes-long", Duration::from_secs(70));
}

/// The client's end of 10,000 connections, in a process of its own: one process may not have 20,000 descriptors.
const TEN_THOUSAND: &str = "
import resource, socket, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
open = []
for i in range(10000):
    s = socket.create_connection((f'127.1.{i // 250}.{1 + i % 250}', int(sys.argv[1])))
    s.sendall(b'GET /open HTTP/1.1\\r\\nHost: t\\r\\n\\r\\n')
    assert s.recv(1000)
    open.append(s)
print('ready', flush=True)
sys.stdin.read()
";

/// 10,000 open connections, both ends of each traced: resident memory and maps within 64 MiB.
#[test]
#[ignore = "opens 20,000 descriptors: `cargo xtask test --long`"]
fn ten_thousand_open_connections() {
    let most = apiscope_tests::raise_descriptors();
    assert!(most >= 11_000, "this needs 11,000 descriptors a process; the limit is {most}");
    let port = free_port();
    let agent = agent("open", port);
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).expect("a free port");
    let lost = agent.lost();
    let mut client = std::process::Command::new(apiscope_tests::program("python3"))
        .args(["-c", TEN_THOUSAND, &port.to_string()])
        .stdin(std::process::Stdio::piped())
        .spawn()
        .expect("python starts");
    let mut open = Vec::new();
    for _ in 0..10_000 {
        let (mut server, _) = listener.accept().expect("a client");
        assert!(server.read(&mut [0; 256]).expect("a request") > 0);
        server.write_all(ANSWER).expect("open");
        open.push(server);
    }
    expect_counted(&agent, "open connections", [0, 0], lost, 10_000);
    let cost = agent.snapshot().expect("an answer").cost;
    let mib = (cost.rss_bytes + cost.map_bytes) as f64 / 1_048_576.0;
    eprintln!("10,000 connections, both ends: {mib:.1} MiB ({} bytes resident)", cost.rss_bytes);
    drop(client.stdin.take());
    assert!(client.wait().expect("a child").success());
    assert!(mib <= 64.0, "{mib:.1} MiB");
    agent.stop();
}

/// Each end's duration against the clock of the program at that end, request by request: never longer, since it
/// lies within; and within 5 % or 50 us of it. A busy machine takes the processor away between a program's
/// clock and its system call now and then: that makes the program's own figure wrong, so most must fit, not all.
#[test]
fn durations_are_what_both_ends_measure() {
    const EACH: usize = 20;
    let (listener, address) = listen();
    let agent = agent("durations", address.port());
    let served = thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a client");
        stream.set_nodelay(true).expect("a TCP socket");
        let mut measured = HashMap::new();
        let mut head = [0; 1024];
        loop {
            let n = stream.read(&mut head).expect("a request");
            let begun = Instant::now();
            if n == 0 {
                return measured;
            }
            let text = String::from_utf8_lossy(&head[..n]).into_owned();
            let path = text.split(' ').nth(1).expect("a path").to_owned();
            let ms = path.split('/').nth(2).and_then(|p| p.parse().ok()).expect("a time");
            thread::sleep(Duration::from_millis(ms));
            stream.write_all(ANSWER).expect("a client");
            measured.insert(path, begun.elapsed());
        }
    });
    let mut measured = HashMap::new();
    let mut stream = TcpStream::connect(address).expect("a listener");
    stream.set_nodelay(true).expect("a TCP socket");
    for ms in [1, 10, 100] {
        for i in 0..EACH {
            let path = format!("/slow/{ms}/{i}");
            let request = format!("GET {path} HTTP/1.1\r\nHost: t\r\n\r\n");
            let begun = Instant::now();
            stream.write_all(request.as_bytes()).expect("a server");
            stream.read_exact(&mut [0; ANSWER.len()]).expect("an answer");
            measured.insert(path, begun.elapsed());
        }
    }
    drop(stream);
    let ends = [(Side::Server, served.join().expect("no panic")), (Side::Client, measured)];
    let clock = Duration::from_micros(20);
    for (side, measured) in ends {
        let end = Instant::now() + Duration::from_secs(10);
        while agent.seen(&address.to_string(), side).len() < 3 * EACH && Instant::now() < end {
            thread::sleep(Duration::from_millis(50));
        }
        let seen = agent.seen(&address.to_string(), side);
        assert_eq!(seen.len(), 3 * EACH);
        for ms in [1, 10, 100] {
            let mut off = Vec::new();
            for e in &seen {
                let path = e.path.as_deref().expect("raw paths");
                if !path.starts_with(&format!("/slow/{ms}/")) {
                    continue;
                }
                let (own, ours) = (measured[path], Duration::from_nanos(e.duration_ns));
                // The server's clock starts after its receive, and the agent's with the receive's end.
                let longest =
                    if side == Side::Client { own + clock } else { own + own / 20 + Duration::from_micros(50) };
                assert!(
                    ours <= longest || side == Side::Server,
                    "{side} {path}: {ours:?}, the program measured {own:?}"
                );
                assert!(ours >= Duration::from_millis(ms) - clock, "{side} {path}: {ours:?} is less than it slept");
                off.push(own.abs_diff(ours).saturating_sub((own / 20).max(Duration::from_micros(50))));
            }
            let within = off.iter().filter(|d| d.is_zero()).count();
            assert!(
                within * 2 > off.len(),
                "{side}, {ms} ms: only {within} of {} are within 5 % or 50 us; off by more: {off:?}",
                off.len()
            );
            eprintln!("{side}, {ms} ms: {within} of {} within 5 % or 50 us", off.len());
        }
    }
    agent.stop();
}
