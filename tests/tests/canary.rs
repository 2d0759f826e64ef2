//! Nothing that is secret leaves the capture path: canaries go into every field that may hold a secret, and
//! are looked for in every output and in what a core dump of the agent would hold.

use std::{
    fs::File,
    io::{Read as _, Seek as _, SeekFrom},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use apiscope_tests::{Step, agent::binary, play, sink};

/// In every canary.
const MARK: &str = "CaNaRy7";

struct Agent(Child);

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Where in the memory of a process the text is, mappings that core dumps leave out aside.
fn in_memory(pid: u32, text: &[u8]) -> Vec<String> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).expect("our own child");
    let mut memory = File::open(format!("/proc/{pid}/mem")).expect("our own child");
    let (mut found, mut lines) = (Vec::new(), maps.lines().peekable());
    while let Some(line) = lines.next() {
        let Some((range, rest)) = line.split_once(' ') else { continue };
        let Some((from, to)) = range.split_once('-') else { continue };
        let (Ok(from), Ok(to)) = (u64::from_str_radix(from, 16), u64::from_str_radix(to, 16)) else { continue };
        let mut dumped = true;
        while let Some(next) = lines.peek() {
            if let Some(flags) = next.strip_prefix("VmFlags:") {
                dumped = !flags.split_whitespace().any(|f| f == "dd");
                break;
            }
            lines.next();
        }
        if !rest.starts_with('r') || !dumped || rest.contains("[vvar") || rest.contains("[vsyscall") {
            continue;
        }
        let mut bytes = vec![0; usize::try_from(to - from).expect("fits")];
        if memory.seek(SeekFrom::Start(from)).is_err() {
            continue;
        }
        let mut filled = 0;
        while let Ok(n @ 1..) = memory.read(&mut bytes[filled..]) {
            filled += n;
        }
        for at in memchr::memmem::find_iter(&bytes[..filled], text) {
            let around = &bytes[at.saturating_sub(40)..(at + 40).min(filled)];
            found.push(format!("{rest}: {}", String::from_utf8_lossy(around)));
        }
    }
    found
}

fn file(path: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned()
}

/// What came to each path of a collector.
type Received = Arc<Mutex<Vec<(String, Vec<u8>)>>>;

/// A collector of OTLP over HTTP that keeps everything as it came; its port.
fn collector() -> (u16, Received) {
    let received = Received::default();
    let its = received.clone();
    let port = sink::start("application/x-protobuf", "", move |path, body| {
        its.lock().expect("not poisoned").push((path.to_owned(), body));
    });
    (port, received)
}

/// What came to a path, as far as it is text.
fn exported(received: &Received, path: &str) -> String {
    let received = received.lock().expect("not poisoned");
    received.iter().filter(|(p, _)| p == path).map(|(_, b)| String::from_utf8_lossy(b).into_owned()).collect()
}

/// What a command prints, on both outputs; it must succeed.
fn printed(arguments: &[&str]) -> String {
    let out = Command::new(binary()).args(arguments).output().expect("it starts");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(out.status.success(), "{arguments:?}: {}", text(&out.stderr));
    text(&out.stdout) + &text(&out.stderr)
}

#[test]
fn no_secret_comes_out() {
    let folder = std::env::temp_dir().join(format!("apiscope-canary-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder");
    let [exchanges, socket, out, err, config] = ["exchanges", "socket", "out", "err", "config"].map(|n| folder.join(n));
    let [key, state, routes, inventory] = ["key", "state", "routes", "inventory"].map(|n| folder.join(n));
    let text = format!(
        "[identity]\nkey_file = {key:?}\n[detect]\nstate_file = {state:?}\n[routes]\nstate_file = {routes:?}\n[inventory]\nfile = {inventory:?}\n"
    );
    let (port, received) = collector();
    std::fs::write(&config, text).expect("writable");
    let child = Command::new(binary())
        .args(["-vv", "run", "--quiet", "--json", "--exchanges"])
        .arg(&exchanges)
        .arg("--socket")
        .arg(&socket)
        .arg("--config")
        .arg(&config)
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", format!("http://127.0.0.1:{port}"))
        .env("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
        .env("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
        .env("OTEL_METRIC_EXPORT_INTERVAL", "500")
        .env("OTEL_BSP_SCHEDULE_DELAY", "300")
        .stdin(Stdio::null())
        .stdout(File::create(&out).expect("writable"))
        .stderr(File::create(&err).expect("writable"))
        .spawn()
        .expect("the agent starts");
    let mut agent = Agent(child);
    let end = Instant::now() + Duration::from_secs(90);
    while !apiscope::local::snapshot(&socket).is_ok_and(|s| s.ready) {
        assert!(Instant::now() < end, "the agent did not become ready: {}", file(&err));
        std::thread::sleep(Duration::from_millis(100));
    }
    // Base64 of a JWT's payload and of Basic hide the mark: each has one of its own to look for.
    let jwt = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJDYU5hUnk3LXN1YiIsImlzcyI6IkNhTmFSeTctaXNzIn0.CaNaRy7-signature";
    let basic = "Q2FOYVJ5Ny11c2VyOkNhTmFSeTctcGFzcw==";
    let secrets = [MARK, "Q2FOYVJ5Ny", "eyJzdWIiOiJDYU5hUnk3"];
    let mut steps = Vec::new();
    for i in 0..40 {
        let credential = [
            format!("Authorization: Bearer {jwt}{i}"),
            format!("Authorization: Basic {basic}"),
            format!("Authorization: Digest username=\"{MARK}-u\", response=\"{MARK}-r\""),
            format!("Cookie: session={MARK}-cookie-{i}; theme={MARK}-theme"),
            format!("X-API-Key: {MARK}-key-{i}"),
            format!("X-Custom-Secret: {MARK}-header\r\nProxy-Authorization: Basic {basic}"),
            format!("X-Forwarded-Client-Cert: Subject=\"CN={MARK}-cert\""),
        ];
        let line = &credential[i % credential.len()];
        let target = match i % 3 {
            0 => format!("/canary/4242{i}?access_token={MARK}-q&q={MARK}-v"),
            1 => format!("http://{MARK}-user:{MARK}-pw@h.test/canary/4242{i}"),
            _ => format!("/canary/4242{i}#{MARK}-fragment"),
        };
        let body = format!("{{\"password\":\"{MARK}-body\"}}");
        let request =
            format!("POST {target} HTTP/1.1\r\nHost: h.test\r\n{line}\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        // A head in two parts has to be kept for a moment.
        let (first, second) = request.split_at(60);
        steps.extend([Step::client(first.to_owned()), Step::client(second.to_owned())]);
        let answer = format!("{{\"ssn\":\"{MARK}-answer\"}}");
        steps.push(Step::server(format!(
            "HTTP/1.1 200 OK\r\nSet-Cookie: session={MARK}-set\r\nContent-Length: {}\r\n\r\n{answer}",
            answer.len()
        )));
    }
    let server = play("127.0.0.1:0", &steps);
    // A scanner, so that there is a finding, with an exemplar and a principal.
    let unknown = |i: u8| format!("{}{}", char::from(b'a' + i % 26), char::from(b'a' + i / 26)).repeat(4);
    let steps: Vec<_> = (0..45)
        .flat_map(|i| {
            [
                Step::client(format!(
                    "GET /{}?key={MARK}-q HTTP/1.1\r\nHost: h.test\r\nAuthorization: Bearer {MARK}-scan\r\n\r\n",
                    unknown(i)
                )),
                Step::server("HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"),
            ]
        })
        .collect();
    play("[::1]:0", &steps);
    let end = Instant::now() + Duration::from_secs(20);
    while file(&exchanges).matches(&server).count() < 80 {
        assert!(Instant::now() < end, "the exchanges are not all there: {}", file(&exchanges).matches(&server).count());
        std::thread::sleep(Duration::from_millis(100));
    }
    let snapshot = apiscope::local::snapshot(&socket).expect("it runs");
    let shown = serde_json::to_string(&snapshot).expect("serializable");
    let end = Instant::now() + Duration::from_secs(30);
    while !["/v1/traces", "/v1/metrics", "/v1/logs"].iter().all(|p| !exported(&received, p).is_empty())
        || !exported(&received, "/v1/logs").contains("D14")
    {
        assert!(Instant::now() < end, "not every signal was exported, or no finding: {}", file(&err));
        std::thread::sleep(Duration::from_millis(100));
    }
    let at = socket.to_string_lossy().into_owned();
    let service = file(&exchanges).lines().find(|l| l.contains(&server)).map(|line| {
        let exchange: serde_json::Value = serde_json::from_str(line).expect("JSON");
        exchange["service"].as_str().expect("a name").to_owned()
    });
    let service = service.expect("an exchange");
    let mut outputs: Vec<(String, String)> = Vec::new();
    let mut print = |arguments: &[&str]| outputs.push((arguments.join(" "), printed(arguments)));
    for format in ["table", "json", "csv", "openapi", "cyclonedx", "html"] {
        print(&["inventory", "--socket", &at, "--service", &service, "--format", format]);
    }
    for what in [&["--json"][..], &["--ocsf"], &["--coverage"], &["--coverage", "--json"], &[]] {
        print(&[&["findings", "--socket", &at][..], what].concat());
    }
    print(&["top", "--once", "--socket", &at]);
    print(&["-vv", "top", "--once", "--json", "--socket", &at]);
    assert!(outputs.iter().any(|(name, text)| name.starts_with("findings") && text.contains("D14")), "a finding");
    // The test's own memory is full of canaries: only the agent's is looked at.
    let pid = agent.0.id();
    for secret in secrets {
        let places = in_memory(pid, secret.as_bytes());
        assert!(
            places.is_empty(),
            "{secret} is in the agent's memory {} times: {:#?}",
            places.len(),
            &places[..places.len().min(5)]
        );
    }
    // SAFETY: signals our own child, which is not waited for yet.
    unsafe { libc::kill(libc::pid_t::try_from(pid).expect("a pid"), libc::SIGINT) };
    assert!(agent.0.wait().expect("a child").success());
    let recorded = exchanges.to_string_lossy().into_owned();
    let mut print = |arguments: &[&str]| outputs.push((arguments.join(" "), printed(arguments)));
    for format in ["report", "json", "istio", "kubernetes"] {
        print(&["policy", "--format", format, &recorded]);
    }
    print(&["-vv", "replay", "--report", "json", &recorded]);
    let recording = file(&exchanges);
    for (name, output) in [
        ("recording", recording.clone()),
        ("socket", shown),
        ("output", file(&out)),
        ("log", file(&err)),
        ("state", file(&state)),
        ("routes", file(&routes)),
        ("inventory", file(&inventory)),
        ("traces", exported(&received, "/v1/traces")),
        ("metrics", exported(&received, "/v1/metrics")),
        ("logs", exported(&received, "/v1/logs")),
    ] {
        assert!(!output.is_empty() || name == "output", "there is no {name}");
        outputs.push((name.into(), output));
    }
    for (name, output) in &outputs {
        for secret in secrets {
            assert!(!output.contains(secret), "{secret} is in the {name}");
        }
        // Ids of paths neither, without --capture-path raw.
        assert!(!output.contains("canary/4242"), "a raw path is in the {name}");
    }
    assert!(recording.contains("\"principal\":\""), "principals are there");
    assert!(recording.contains("access_token"), "names of parameters are there");
    std::fs::remove_dir_all(&folder).expect("removable");
}
