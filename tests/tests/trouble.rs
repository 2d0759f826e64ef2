//! What goes wrong around an agent: each trouble gives one clear line with its cause and what to do, the right
//! exit code, and never a panic.

use std::{
    io::Read as _,
    path::Path,
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use apiscope::exchange::Side;
use apiscope_tests::{Agent, Step, listener, play, play_many, process::Folder, program};

/// `apiscope run` for a second, with a prefix (`setpriv …`), arguments and variables.
fn run(prefix: &[&str], arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    let binary = apiscope_tests::agent::binary();
    let (first, rest) = prefix.split_first().map_or((None, &[][..]), |(f, r)| (Some(*f), r));
    let mut command = match first {
        Some(name) => Command::new(program(name)),
        None => Command::new(&binary),
    };
    command.args(rest);
    if first.is_some() {
        command.arg(&binary);
    }
    command.args(["run", "--quiet", "--duration", "1"]).args(arguments);
    command.env_remove("OTEL_EXPORTER_OTLP_ENDPOINT").envs(environment.iter().copied());
    command.stdin(Stdio::null()).output().expect("it starts")
}

/// In a mount namespace of its own, after some shell commands.
fn run_after(setup: &str, arguments: &[&str]) -> Output {
    let script = format!("{setup} && exec \"$0\" \"$@\"");
    run(&["unshare", "--mount", "sh", "-ec", &script], arguments, &[])
}

/// The exit code, a last line that says all of `says`, and no panic.
fn expect(out: &Output, code: i32, says: &[&str]) {
    let text = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(code), "{text}");
    for part in says {
        assert!(text.contains(part), "`{part}` is not said in: {text}");
    }
    assert!(!text.contains("panicked") && !text.contains("RUST_BACKTRACE"), "{text}");
    // One clear line; where no door opens, a heading and a line for each of the three.
    assert!(text.lines().count() <= 4, "one clear line, not: {text}");
}

#[test]
fn missing_capabilities_are_named() {
    let folder = Folder::new("trouble-capabilities");
    let socket = folder.at("s");
    let arguments = ["--socket", &socket];
    for (drop, lacks) in [
        ("-all", "lacks CAP_BPF and CAP_PERFMON"),
        ("-perfmon,-sys_admin", "lacks CAP_PERFMON:"),
        ("-bpf,-sys_admin", "lacks CAP_BPF:"),
    ] {
        let out = run(&["setpriv", "--bounding-set", drop, "--inh-caps", "-all"], &arguments, &[]);
        expect(&out, 1, &[lacks, "run it as root (`sudo apiscope run`)", "Operation not permitted"]);
    }
    assert!(!Path::new(&socket).exists(), "the socket was left behind");
}

#[test]
fn a_kernel_without_types() {
    let folder = Folder::new("trouble-no-types");
    let out = run_after("mount -t tmpfs none /sys/kernel/btf", &["--socket", &folder.at("s")]);
    expect(&out, 1, &["/sys/kernel/btf/vmlinux", "CONFIG_DEBUG_INFO_BTF", "No such file"]);
    let cut = folder.at("btf");
    let setup = format!("head -c 100000 /sys/kernel/btf/vmlinux >{cut}; mount --bind {cut} /sys/kernel/btf/vmlinux");
    let out = run_after(&setup, &["--socket", &folder.at("s")]);
    expect(&out, 1, &["/sys/kernel/btf/vmlinux", "cut off"]);
}

/// The kernel's own types with a name changed are those of a kernel that lacks it.
#[test]
fn an_older_kernel() {
    let folder = Folder::new("trouble-older");
    for (name, other, says) in [
        ("btf_trace_sock_send_length", "btf_trace_xxxx_send_length", "no tracepoint sock_send_length (Linux 6.3"),
        ("skc_daddr", "xxx_daddr", "lack sock.__sk_common.skc_daddr"),
    ] {
        let changed = folder.at("btf");
        let setup = format!(
            "sed s/{name}/{other}/ /sys/kernel/btf/vmlinux >{changed}; mount --bind {changed} /sys/kernel/btf/vmlinux"
        );
        expect(&run_after(&setup, &["--socket", &folder.at("s")]), 1, &[says]);
    }
}

#[test]
fn files_that_cannot_be_written() {
    let folder = Folder::new("trouble-files");
    std::fs::create_dir(folder.join("ro")).expect("a folder");
    let (socket, inside) = (folder.at("s"), folder.at("ro/inside"));
    let read_only = format!("mount -t tmpfs -o ro none {}", folder.at("ro"));
    let out = run_after(&read_only, &["--socket", &inside]);
    expect(&out, 1, &[&inside, "Read-only file system"]);
    let out = run_after(&read_only, &["--socket", &socket, "--exchanges", &inside]);
    expect(&out, 1, &["recording", &inside, "Read-only file system"]);
    // Without a named socket the agent works, and says what it cannot.
    let out = run_after("mount -t tmpfs -o ro none /run", &[]);
    expect(&out, 0, &["Read-only file system", "`apiscope top` will not find this agent"]);
    let out = run(&[], &["--socket", &socket, "--exchanges", "/no/such/folder/x"], &[]);
    expect(&out, 1, &["/no/such/folder/x", "No such file"]);
}

#[test]
fn a_disk_that_is_full() {
    let folder = Folder::new("trouble-full");
    let socket = folder.at("s");
    let mut agent = Command::new(apiscope_tests::agent::binary())
        .args(["run", "--quiet", "--exchanges", "/dev/full", "--socket", &socket])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it starts");
    let (rq, rs) = ("GET /full HTTP/1.1\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
    let end = Instant::now() + Duration::from_secs(60);
    let lost = || apiscope::local::snapshot(Path::new(&socket)).ok().map(|s| s.totals.losses["recording"]);
    while lost().is_none_or(|lost| lost == 0) {
        assert!(Instant::now() < end, "the loss is not counted");
        play("127.0.0.1:0", &[Step::client(rq), Step::server(rs)]);
        std::thread::sleep(Duration::from_millis(300));
    }
    let pid = libc::pid_t::try_from(agent.id()).expect("a pid");
    // SAFETY: signals our own child.
    unsafe { libc::kill(pid, libc::SIGINT) };
    let mut text = String::new();
    agent.stderr.take().expect("piped").read_to_string(&mut text).expect("text");
    assert_eq!(agent.wait().expect("a child").code(), Some(1), "{text}");
    for says in ["the recording ends here", "apiscope: failed to write the recording: No space left on device"] {
        assert!(text.contains(says), "{text}");
    }
}

/// `-vv` shows what the eBPF programs decide about a connection.
#[test]
fn the_programs_log_when_asked() {
    let folder = Folder::new("trouble-log");
    let socket = folder.at("s");
    let mut agent = Command::new(apiscope_tests::agent::binary())
        .args(["-vv", "run", "--quiet", "--socket", &socket, "--exclude-pid", &std::process::id().to_string()])
        .env_remove("RUST_LOG")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it starts");
    // The verifier's words are many: nobody may wait for this end of the pipe.
    let mut stderr = agent.stderr.take().expect("piped");
    let reader = std::thread::spawn(move || {
        let mut text = Vec::new();
        stderr.read_to_end(&mut text).expect("readable");
        String::from_utf8_lossy(&text).into_owned()
    });
    let end = Instant::now() + Duration::from_secs(60);
    while apiscope::local::snapshot(Path::new(&socket)).is_err() {
        assert!(Instant::now() < end, "it does not come up");
        std::thread::sleep(Duration::from_millis(50));
    }
    play("127.0.0.1:0", &[Step::client("GET /log HTTP/1.1\r\n\r\n")]);
    std::thread::sleep(Duration::from_secs(1));
    let pid = libc::pid_t::try_from(agent.id()).expect("a pid");
    // SAFETY: signals our own child.
    unsafe { libc::kill(pid, libc::SIGINT) };
    assert!(agent.wait().expect("a child").success());
    let text = reader.join().expect("no panic");
    let line = format!("left out: a connection of process {}", std::process::id());
    assert!(text.contains(&line), "{text}");
}

/// A mistyped `--socket` must not cost a file.
#[test]
fn a_socket_path_that_is_a_file() {
    let folder = Folder::new("trouble-precious");
    let file = folder.at("file");
    std::fs::write(&file, "precious").expect("writable");
    expect(&run(&[], &["--socket", &file], &[]), 1, &[&file, "is no socket"]);
    assert_eq!(std::fs::read_to_string(&file).expect("still there"), "precious");
}

#[test]
fn wrong_variables_are_wrong_configuration() {
    let folder = Folder::new("trouble-variables");
    let socket = folder.at("s");
    for (name, value, says) in [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grcp", "must be grpc or http/protobuf"),
        ("OTEL_METRIC_EXPORT_INTERVAL", "soon", "milliseconds"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "5s", "milliseconds"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "zip", "gzip or none"),
        ("OTEL_METRICS_EXPORTER", "prometheus", "otlp or none"),
        ("OTEL_TRACES_SAMPLER", "sometimes", "always_on"),
        ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/no/such/file", "No such file"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "a b", "name=value"),
        ("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", "diff", "cumulative, delta or lowmemory"),
        ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "collector:4318", "http://"),
        ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "http://[", "invalid"),
        ("APISCOPE_SIDE", "left", "possible values"),
    ] {
        let environment = [("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1"), (name, value)];
        let out = run(&[], &["--socket", &socket], &environment);
        let text = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(2), "{name}={value}: {text}");
        assert!(text.contains(says) && (text.contains(name) || name.starts_with("APISCOPE")), "{name}={value}: {text}");
    }
}

/// A collector that is not there, refuses, or is slow costs a line, not exchanges and not the exit code.
#[test]
fn collectors_that_do_not_take_it() {
    let folder = Folder::new("trouble-collectors");
    let refusing = listener("127.0.0.1");
    let address = refusing.local_addr().expect("an address");
    std::thread::spawn(move || {
        for mut stream in refusing.incoming().flatten() {
            std::thread::spawn(move || {
                let mut bytes = [0; 65_536];
                while std::io::Read::read(&mut stream, &mut bytes).is_ok_and(|n| n > 0) {
                    let answer = b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n";
                    if std::io::Write::write_all(&mut stream, answer).is_err() {
                        return;
                    }
                }
            });
        }
    });
    for (endpoint, protocol) in [
        (format!("http://{address}"), "http/protobuf"),
        ("http://127.0.0.1:1".into(), "http/protobuf"),
        ("http://127.0.0.1:1".into(), "grpc"),
        ("https://127.0.0.1:1".into(), "grpc"),
        ("http://no-such-host.invalid:4318".into(), "http/protobuf"),
    ] {
        let started = Instant::now();
        let out = run(
            &[],
            &["--socket", &folder.at("s")],
            &[
                ("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint),
                ("OTEL_EXPORTER_OTLP_PROTOCOL", protocol),
                ("OTEL_EXPORTER_OTLP_TIMEOUT", "1000"),
            ],
        );
        expect(&out, 0, &[&format!("the collector at {endpoint} does not take"), "OTEL_EXPORTER_OTLP_ENDPOINT"]);
        assert!(started.elapsed() < Duration::from_secs(40), "{endpoint} held up the end");
    }
}

/// Requests of each connection and connections of the full-ring test.
const EACH: usize = 1000;
const CONNECTIONS: usize = 20;

/// The agent stands still while 20,000 requests are sent: what does not fit into the smallest ring is counted
/// to the exchange. Counters are those of the machine, so that others' traffic makes it try again.
#[test]
fn a_full_ring_is_counted_exactly() {
    let folder = Folder::new("trouble-ring");
    let config = folder.at("config.toml");
    std::fs::write(&config, "[limits]\nring_bytes = 65536\n").expect("writable");
    let (rq, rs) = ("GET /ring HTTP/1.1\r\nHost: t\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
    let session: Vec<Step> = (0..EACH).flat_map(|_| [Step::client(rq), Step::server(rs)]).collect();
    let sessions = vec![session; CONNECTIONS];
    let sent = 2 * (CONNECTIONS * EACH) as u64;
    for attempt in 0..5 {
        let agent = Agent::start(&format!("ring-{attempt}"), &["--config", &config]);
        let pid = libc::pid_t::try_from(agent.child.id()).expect("a pid");
        // SAFETY: signals our own child.
        unsafe { libc::kill(pid, libc::SIGSTOP) };
        let server = play_many("127.0.0.1:0", &sessions);
        // SAFETY: as above.
        unsafe { libc::kill(pid, libc::SIGCONT) };
        std::thread::sleep(Duration::from_secs(2));
        let lost = agent.snapshot().expect("an answer").totals.losses["ring_full"];
        let seen = [Side::Server, Side::Client].map(|side| agent.seen(&server, side).len() as u64);
        let file = agent.file.clone();
        agent.stop();
        let counted = seen.iter().sum::<u64>();
        assert!(counted + lost >= sent, "{sent} sent, {seen:?} seen, {lost} lost: some are lost silently");
        let text = std::fs::read_to_string(file).expect("the recording");
        let alone = text.lines().count() as u64 == counted;
        if alone && counted + lost == sent {
            assert!(lost > 1000 && counted > 100, "{counted} seen, {lost} lost: the ring was to be full");
            return;
        }
        assert!(
            !alone || attempt < 4,
            "{sent} sent, {seen:?} seen, {lost} lost: nobody else sent, and the sum is wrong"
        );
    }
    eprintln!("others send on this machine all the time: only that nothing is lost silently was seen");
}
