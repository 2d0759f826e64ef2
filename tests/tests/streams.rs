//! Is each answer that of its own request? Every request has a path of its own, from which everything else of the
//! exchange follows: method, status, sizes, media type, and who sent it over which connection. What the agent has
//! recorded is held against that, exchange by exchange. And: what do many connections cost?

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use apiscope::exchange::{End, Exchange, Peer, Side};
use apiscope_tests::{Agent, free_port, process::Process, program, ready};
use h2::{SendStream, client::SendRequest};
use tokio::net::{TcpListener, TcpStream};
use tonic::codegen::{
    Bytes,
    http::{Method, Request, Response},
};

/// Requests of the usual run, and of the long one.
const USUAL: u64 = 32_000;
const LONG: u64 = 1_000_000;
/// Connections, and streams side by side on each.
const SHAPES: [(u64, u64); 4] = [(8, 1), (8, 2), (5, 8), (4, 100)];

/// What follows from the number of a request.
#[derive(Debug, PartialEq, Eq)]
struct Facts {
    method: &'static str,
    status: u16,
    request: u64,
    response: u64,
    media: String,
}

fn facts(n: u64) -> Facts {
    // The finalizer of SplitMix64 (Steele et al., 2014): neighbours have nothing in common.
    let mut x = n.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^= x >> 31;
    let method = ["GET", "POST", "PUT"][(x % 3) as usize];
    Facts {
        method,
        status: [200, 201, 202, 203, 206, 400, 404, 409, 422, 500][(x >> 8) as usize % 10],
        request: if method == "GET" { 0 } else { (x >> 16) % 700 },
        response: (x >> 32) % 900,
        media: format!("application/x-{}", (x >> 48) % 20),
    }
}

/// Sends content, which ends the stream.
fn send(stream: &mut SendStream<Bytes>, size: u64) -> Result<(), h2::Error> {
    stream.send_data(Bytes::from(vec![b'x'; size as usize]), true)
}

async fn drain(mut body: h2::RecvStream) -> u64 {
    let mut size = 0;
    while let Some(Ok(bytes)) = body.data().await {
        size += bytes.len() as u64;
        // It fails where the stream is over already.
        let _ = body.flow_control().release_capacity(bytes.len());
    }
    size
}

async fn serve(listener: TcpListener) {
    while let Ok((socket, _)) = listener.accept().await {
        socket.set_nodelay(true).expect("a TCP socket");
        tokio::spawn(async move {
            let mut connection = h2::server::handshake(socket).await.expect("a preface");
            while let Some(Ok((request, mut respond))) = connection.accept().await {
                tokio::spawn(async move {
                    let n = request.uri().path().rsplit('/').next().and_then(|n| n.parse().ok()).expect("a number");
                    let facts = facts(n);
                    assert_eq!(drain(request.into_body()).await, facts.request);
                    // Answers overtake each other.
                    for _ in 0..n % 5 {
                        tokio::task::yield_now().await;
                    }
                    let head = Response::builder()
                        .status(facts.status)
                        .header("content-type", &facts.media)
                        .header("x-number", n)
                        .body(())
                        .expect("a head");
                    // The client may be gone at the end of the test.
                    if let Ok(mut stream) = respond.send_response(head, facts.response == 0)
                        && facts.response > 0
                    {
                        let _ = send(&mut stream, facts.response);
                    }
                });
            }
        });
    }
}

async fn ask(client: &SendRequest<Bytes>, connection: u64, n: u64) {
    let facts = facts(n);
    let request = Request::builder()
        .method(Method::from_bytes(facts.method.as_bytes()).expect("a method"))
        .uri(format!("http://t/m/{connection}/{n}"))
        .header("user-agent", format!("connection {connection}"))
        .header("authorization", format!("Bearer token-{connection}"))
        .header("x-number", n)
        .body(())
        .expect("a head");
    let mut client = client.clone().ready().await.expect("a connection");
    let (response, mut stream) = client.send_request(request, facts.request == 0).expect("a stream");
    if facts.request > 0 {
        send(&mut stream, facts.request).expect("taken");
    }
    let response = response.await.expect("an answer");
    assert_eq!(response.status().as_u16(), facts.status);
    assert_eq!(drain(response.into_body()).await, facts.response);
}

/// Sends `requests` in all the shapes; gives the server's address and the number of connections.
async fn load(requests: u64) -> (String, u64) {
    let listener = TcpListener::bind(("127.0.0.1", free_port())).await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let server = tokio::spawn(serve(listener));
    let (mut number, mut connections) = (0, 0);
    for (side_by_side, streams) in SHAPES {
        let each = requests / SHAPES.len() as u64 / side_by_side / streams;
        let mut tasks = Vec::new();
        for _ in 0..side_by_side {
            connections += 1;
            let connection = connections;
            let socket = TcpStream::connect(address).await.expect("a listener");
            socket.set_nodelay(true).expect("a TCP socket");
            let (client, driver) = h2::client::handshake(socket).await.expect("a server");
            tokio::spawn(driver);
            for _ in 0..streams {
                let (client, first) = (client.clone(), number);
                number += each;
                tasks.push(tokio::spawn(async move {
                    for n in first..first + each {
                        ask(&client, connection, n).await;
                    }
                }));
            }
        }
        for task in tasks {
            task.await.expect("right answers");
        }
    }
    server.abort();
    assert_eq!(number, requests, "the shapes take them all");
    (address.to_string(), connections)
}

/// What was seen on one side, of which nothing may be twice or mixed up.
#[derive(Default)]
struct Recorded {
    numbers: HashSet<u64>,
    /// By connection: its address and its principal.
    connections: HashMap<u64, (Peer, String)>,
    wrong: Vec<String>,
    /// Sizes of these are not known: bytes of them were lost.
    partly: u64,
}

impl Recorded {
    fn take(&mut self, x: &Exchange) {
        let mut parts = x.path.as_deref().unwrap_or_default().rsplit('/').map(str::parse::<u64>);
        let (Some(Ok(n)), Some(Ok(connection))) = (parts.next(), parts.next()) else {
            return self.wrong.push(format!("no path of ours: {x:?}"));
        };
        let wanted = facts(n);
        let seen = Facts {
            method: ["GET", "POST", "PUT"].into_iter().find(|m| *m == x.method.as_str()).unwrap_or("another"),
            status: x.status,
            request: x.request_body_bytes.unwrap_or(u64::MAX),
            response: x.response_body_bytes.unwrap_or(u64::MAX),
            media: x.response_type.as_deref().unwrap_or_default().to_owned(),
        };
        let is_right = match x.end {
            End::Complete => seen == wanted,
            // What was lost of it is not known, but what is known is its own.
            End::Lost => {
                self.partly += 1;
                seen.method == wanted.method && (seen.status == 0 || seen.status == wanted.status)
            }
            _ => false,
        };
        let agent = x.user_agent.as_deref() == Some(&*format!("connection {connection}"));
        let who = (x.client.clone(), x.principal.as_deref().unwrap_or_default().to_owned());
        let known = self.connections.entry(connection).or_insert_with(|| who.clone());
        if !is_right || !agent || *known != who || !self.numbers.insert(n) {
            self.wrong.push(format!("{seen:?} instead of {wanted:?}, {known:?}: {x:?}"));
        }
    }
}

fn compare(requests: u64) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("threads");
    let agent = Agent::start(&format!("streams-{requests}"), &[]);
    let begun = Instant::now();
    let (address, connections) = runtime.block_on(load(requests));
    let took = begun.elapsed();
    runtime.shutdown_timeout(Duration::from_secs(2));
    // Until the recording stands still; what waits for the rest of it is given up after a second.
    let length = || agent.file.metadata().map_or(0, |m| m.len());
    let mut before = 0;
    while length() != before {
        before = length();
        std::thread::sleep(Duration::from_millis(2500));
    }
    let lost = agent.lost();
    let mut sides = HashMap::from([(Side::Server, Recorded::default()), (Side::Client, Recorded::default())]);
    for line in BufReader::new(File::open(&agent.file).expect("a recording")).split(b'\n') {
        let line = line.expect("readable");
        // Others' traffic is of no interest.
        if let Ok(x) = Exchange::from_json(&line)
            && x.server.to_string() == address
        {
            sides.entry(x.side).or_default().take(&x);
        }
    }
    let mut missing = 0;
    for (side, seen) in &sides {
        assert!(seen.wrong.is_empty(), "{side}: {} are wrong, as {}", seen.wrong.len(), seen.wrong[0]);
        let who: HashSet<_> = seen.connections.values().collect();
        assert_eq!(who.len() as u64, connections, "{side}: each connection has an address and a principal of its own");
        missing += requests - seen.numbers.len() as u64;
        eprintln!(
            "{side}: {} of {requests} seen, {} of them in parts, none mixed up; {:.0} requests/s",
            seen.numbers.len(),
            seen.partly,
            requests as f64 / took.as_secs_f64()
        );
    }
    assert!(missing <= lost, "{missing} are missing, {lost} are counted as lost");
    let (binary, file) = (agent.binary.clone(), agent.stop());
    eprintln!("agent: {}", binary.display());
    std::fs::remove_file(file).expect("removable");
}

#[test]
fn nothing_is_mixed_up() {
    compare(USUAL);
}

/// 0.8 GB of recording.
#[test]
#[ignore = "takes minutes"]
fn nothing_is_mixed_up_in_a_million() {
    compare(LONG);
}

/// Connections that stay open, and the most that they may cost in all.
const MANY: usize = 10_000;
const MOST: u64 = 128 << 20;

/// Requests of a connection: as those of a client with twenty fields that repeat and paths that do not, or with as many
/// short paths as fill a table to the last entry, which is the worst.
fn requests(worst: bool) -> Vec<u8> {
    let mut all = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".to_vec();
    let mut stream = 1_u32;
    let mut ask = |block: &[u8]| {
        all.extend([0, (block.len() >> 8) as u8, block.len() as u8, 1, 5]);
        all.extend(stream.to_be_bytes());
        all.extend(block);
        stream += 2;
    };
    for i in 0..if worst { 102 } else { 20 } {
        let path = if worst { format!("/{i:02x}") } else { format!("/api/v1/customers/{i}/orders") };
        let mut block = vec![0x82, 0x86, 0x44, path.len() as u8];
        block.extend(path.as_bytes());
        if !worst && i == 0 {
            for k in 0..20 {
                let (name, value) = (format!("x-field-{k}"), format!("a value of the usual length {k}"));
                block.extend([0x40, name.len() as u8]);
                block.extend(name.as_bytes());
                block.push(value.len() as u8);
                block.extend(value.as_bytes());
            }
        }
        ask(&block);
    }
    all
}

/// Answers to so many requests.
fn answers(count: u32) -> Vec<u8> {
    let mut all = b"\0\0\0\x04\0\0\0\0\0".to_vec();
    for i in 0..count {
        all.extend(b"\0\0\x01\x01\x05");
        all.extend((2 * i + 1).to_be_bytes());
        all.push(0x88);
    }
    all
}

/// Memory of a process that is its own, bytes.
fn resident(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it lives");
    let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:")).expect("a line");
    1024 * line.trim().trim_end_matches(" kB").parse::<u64>().expect("kilobytes")
}

/// The client's end, in a process of its own: one may not have twenty thousand descriptors. It goes at a pace at which
/// nothing is lost.
const CLIENT: &str = "
import resource, socket, sys, time
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
asked, answer, all = open(sys.argv[2], 'rb').read(), int(sys.argv[3]), []
for i in range(int(sys.argv[4])):
    s = socket.create_connection(('127.0.0.1', int(sys.argv[1])))
    s.sendall(asked)
    left = answer
    while left: left -= len(s.recv(left))
    all.append(s)
    if i % 20 == 0: time.sleep(0.01)
print('ready', flush=True)
time.sleep(600)";

/// Ten thousand connections at once, of each of which the agent follows the server's end.
#[test]
#[ignore = "takes ten thousand descriptors twice"]
fn ten_thousand_connections() {
    apiscope_tests::raise_descriptors();
    for worst in [false, true] {
        let agent = Agent::start(&format!("many-{worst}"), &["--side", "server"]);
        let before = resident(agent.child.id());
        let (asked, answered) = (requests(worst), answers(if worst { 102 } else { 20 }));
        let mut listener = None;
        let mut client = Process::spawn("many", |folder, port| {
            // It listens before the client is there.
            listener = Some(net::TcpListener::bind(("127.0.0.1", port)).expect("a port"));
            std::fs::write(folder.join("asked"), &asked).expect("writable");
            let mut command = Command::new(program("python3"));
            command.args(["-c", CLIENT, &port.to_string(), "asked", &answered.len().to_string(), &MANY.to_string()]);
            command.stdout(Stdio::piped());
            command
        });
        let listener = listener.expect("it is made with the client");
        let mut open = Vec::with_capacity(MANY);
        for _ in 0..MANY {
            let (mut server, _) = listener.accept().expect("a client");
            server.read_exact(&mut vec![0; asked.len()]).expect("all of it");
            server.write_all(&answered).expect("taken");
            open.push(server);
        }
        ready(&mut client.child);
        std::thread::sleep(Duration::from_secs(3));
        let (lost, now) = (agent.lost(), resident(agent.child.id()));
        let each = now.saturating_sub(before) / MANY as u64;
        eprintln!("{MANY} connections, the worst {worst}: {} KiB, {each} bytes each; {lost} lost", now / 1024);
        assert!(now <= MOST && each <= 16 << 10, "{now} bytes, {each} each");
        std::fs::remove_file(agent.stop()).expect("removable");
    }
}
