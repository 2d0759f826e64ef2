//! The life of an agent as its user sees it: what it prints where, how settings come together, how it ends, and
//! that it leaves nothing behind.

use std::{
    io::{BufRead as _, BufReader, Read as _},
    os::fd::{FromRawFd as _, OwnedFd},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use apiscope::exchange::{Exchange, Side};
use apiscope_tests::{Agent, Step, Want, play};

const RQ: &str = "GET /life/7 HTTP/1.1\r\nHost: t\r\n\r\n";
const RS: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

fn folder(name: &str) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("apiscope-life-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder");
    folder
}

fn traffic(n: usize) -> String {
    let steps: Vec<Step> = (0..n).flat_map(|_| [Step::client(RQ), Step::server(RS)]).collect();
    play("127.0.0.1:0", &steps)
}

/// `apiscope run` that is not [`Agent`]'s: with its output as the test wants it.
fn start(socket: &Path, arguments: &[&str], out: Stdio) -> Child {
    let child = Command::new(apiscope_tests::agent::binary())
        .args(["run", "--socket"])
        .arg(socket)
        .args(arguments)
        .env_remove("OTEL_EXPORTER_OTLP_ENDPOINT")
        .env_remove("NO_COLOR")
        .stdin(Stdio::null())
        .stdout(out)
        .spawn()
        .expect("it starts");
    let end = Instant::now() + Duration::from_secs(60);
    while apiscope::local::snapshot(socket).is_err() {
        assert!(Instant::now() < end, "it does not come up");
        std::thread::sleep(Duration::from_millis(50));
    }
    child
}

fn signal(child: &Child, signal: libc::c_int) {
    let pid = libc::pid_t::try_from(child.id()).expect("a pid");
    // SAFETY: signals our own child, which is not waited for yet.
    assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
}

/// What was sent a moment before the signal is in the recording, and the last line has the totals.
#[test]
fn interrupted_and_terminated_it_flushes() {
    for (name, number) in [("int", libc::SIGINT), ("term", libc::SIGTERM)] {
        let folder = folder(name);
        let (file, socket) = (folder.join("x.ndjson"), folder.join("s"));
        let path = file.display().to_string();
        let mut child = start(&socket, &["--quiet", "--json", "--exchanges", &path], Stdio::piped());
        let server = traffic(200);
        signal(&child, number);
        let begun = Instant::now();
        let mut text = String::new();
        child.stdout.take().expect("piped").read_to_string(&mut text).expect("text");
        assert!(child.wait().expect("a child").success());
        assert!(begun.elapsed() < Duration::from_secs(15));
        let totals: serde_json::Value = serde_json::from_str(text.trim()).expect("one object, on one line");
        assert!(totals["exchanges"]["server"].as_u64().is_some_and(|n| n >= 200), "{totals}");
        assert_eq!(totals["losses"]["recursion"], 0, "{totals}");
        let recorded = std::fs::read_to_string(&file).expect("a recording");
        let lines = recorded.lines().filter(|l| l.contains(&server)).count();
        assert_eq!(lines, 400, "both ends of 200 exchanges, the last of them sent just before the signal");
        assert!(recorded.ends_with('\n') && !socket.exists());
        std::fs::remove_dir_all(folder).expect("removable");
    }
}

/// Numbers of the eBPF programs and maps that a process holds, as its descriptors say (proc_pid_fdinfo(5)).
fn held(pid: u32) -> Vec<(libc::c_long, u32)> {
    // BPF_PROG_GET_FD_BY_ID and BPF_MAP_GET_FD_BY_ID of bpf(2).
    const KINDS: [(&str, libc::c_long); 2] = [("prog_id:", 13), ("map_id:", 14)];
    let mut found = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fdinfo")).expect("ours").flatten() {
        let text = std::fs::read_to_string(entry.path()).unwrap_or_default();
        for (key, command) in KINDS {
            let id = text.lines().find_map(|l| l.strip_prefix(key)).and_then(|v| v.trim().parse().ok());
            found.extend(id.map(|id| (command, id)));
        }
    }
    found
}

/// Is it loaded still?
fn is_loaded((command, id): (libc::c_long, u32)) -> bool {
    let attributes = [u64::from(id), 0];
    // SAFETY: the kernel reads the 16 bytes that are named.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_ptr(), size_of_val(&attributes)) };
    if fd >= 0 {
        // SAFETY: a descriptor that was just made for us.
        drop(unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).expect("a descriptor")) });
    }
    fd >= 0
}

/// Killed without a chance to tidy up, it leaves no program, no map and no link in the kernel.
#[test]
fn killed_it_leaves_nothing_attached() {
    let folder = folder("kill");
    let socket = folder.join("s");
    let mut child = start(&socket, &["--quiet"], Stdio::null());
    let all = held(child.id());
    let programs = all.iter().filter(|(command, _)| *command == 13).count();
    assert!(programs >= 4 && all.len() > programs + 4, "{all:?}");
    assert!(all.iter().all(|&one| is_loaded(one)));
    signal(&child, libc::SIGKILL);
    child.wait().expect("a child");
    let end = Instant::now() + Duration::from_secs(10);
    while all.iter().any(|&one| is_loaded(one)) {
        assert!(Instant::now() < end, "left behind: {:?}", all.iter().filter(|&&o| is_loaded(o)).collect::<Vec<_>>());
        std::thread::sleep(Duration::from_millis(50));
    }
    // Its socket is left, and does not stop the next one.
    assert!(socket.exists());
    let mut next = start(&socket, &["--quiet"], Stdio::null());
    signal(&next, libc::SIGINT);
    assert!(next.wait().expect("a child").success() && !socket.exists());
    std::fs::remove_dir_all(folder).expect("removable");
}

/// In a pipe: plain lines, one for each endpoint of an interval, and nothing of a terminal.
#[test]
fn plain_lines_in_a_pipe() {
    let folder = folder("pipe");
    for json in [false, true] {
        let arguments = [&["--interval", "1"][..], if json { &["--json"] } else { &[] }].concat();
        let mut child = start(&folder.join("s"), &arguments, Stdio::piped());
        traffic(5);
        let mut out = BufReader::new(child.stdout.take().expect("piped"));
        let mut line = String::new();
        while !line.contains("/life/{int}") {
            line.clear();
            assert!(out.read_line(&mut line).expect("text") > 0, "the endpoint is not shown");
            assert!(!line.contains('\x1b'), "{line:?}");
            if json {
                serde_json::from_str::<serde_json::Value>(&line).unwrap_or_else(|e| panic!("{e}: {line}"));
            }
        }
        assert!(line.contains("GET"), "{line}");
        // A reader that goes away does not end the agent, nor make a fuss.
        drop(out);
        std::thread::sleep(Duration::from_millis(1500));
        assert!(child.try_wait().expect("a child").is_none(), "it ended with its reader");
        signal(&child, libc::SIGINT);
        assert!(child.wait().expect("a child").success());
    }
    std::fs::remove_dir_all(folder).expect("removable");
}

/// A pseudo-terminal: our end, and the one for the child.
fn terminal() -> (std::fs::File, OwnedFd) {
    let (mut ours, mut theirs) = (0, 0);
    let size = libc::winsize { ws_row: 40, ws_col: 120, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the call fills both numbers; the size is read.
    let made = unsafe {
        libc::openpty(&raw mut ours, &raw mut theirs, std::ptr::null_mut(), std::ptr::null(), &raw const size)
    };
    assert_eq!(made, 0);
    // SAFETY: two descriptors that were just made for us.
    unsafe { (std::fs::File::from_raw_fd(ours), OwnedFd::from_raw_fd(theirs)) }
}

#[test]
fn a_live_table_on_a_terminal() {
    let folder = folder("terminal");
    for colour in [true, false] {
        let (mut ours, theirs) = terminal();
        let mut child = Command::new(apiscope_tests::agent::binary())
            .args(["run", "--duration", "6", "--socket"])
            .arg(folder.join("s"))
            .env_remove("OTEL_EXPORTER_OTLP_ENDPOINT")
            .env_remove("NO_COLOR")
            .envs((!colour).then_some(("NO_COLOR", "1")))
            .stdin(Stdio::null())
            .stdout(theirs)
            .spawn()
            .expect("it starts");
        let reader = std::thread::spawn(move || {
            let (mut text, mut part) = (Vec::new(), [0; 4096]);
            // The end of a terminal is an error to read.
            while let Ok(n) = ours.read(&mut part)
                && n > 0
            {
                text.extend_from_slice(&part[..n]);
            }
            String::from_utf8_lossy(&text).into_owned()
        });
        while child.try_wait().expect("a child").is_none() {
            traffic(1);
            std::thread::sleep(Duration::from_millis(200));
        }
        let text = reader.join().expect("no panic");
        assert!(text.contains("\x1b[H") && text.contains("/life/{int}") && text.contains("nothing lost"), "{text:?}");
        assert_eq!(text.contains("\x1b[32m"), colour, "colours, unless NO_COLOR: {text:?}");
    }
    std::fs::remove_dir_all(folder).expect("removable");
}

/// Flags come before variables, these before the file.
#[test]
fn settings_come_together() {
    let folder = folder("settings");
    let file = folder.join("config.toml");
    std::fs::write(&file, "[capture]\nsides = \"server\"\n").expect("writable");
    let path = file.display().to_string();
    for (name, flag, variable, side) in [
        ("from-file", &[][..], None, Side::Server),
        ("from-variable", &[], Some("client"), Side::Client),
        ("from-flag", &["--side", "server"], Some("client"), Side::Server),
    ] {
        let arguments = [&["--config", &*path], flag].concat();
        let environment: Vec<_> = variable.map(|v| ("APISCOPE_SIDE", v)).into_iter().collect();
        let agent = Agent::start_with(name, &arguments, &environment);
        let server = traffic(2);
        let wanted = vec![Want::new("GET", "/life/7", 200, RQ.as_bytes(), RS.as_bytes()); 2];
        for each in [Side::Server, Side::Client] {
            agent.expect_side(&server, each, if each == side { &wanted } else { &[] });
        }
        agent.stop();
    }
    std::fs::remove_dir_all(folder).expect("removable");
}

/// Everything that `config print` shows can be set to another value, and a slip in any key is met with the key.
#[test]
fn every_key_is_checked() {
    let binary = apiscope_tests::agent::binary();
    let folder = folder("keys");
    let file = folder.join("config.toml");
    let check = |text: &str| {
        std::fs::write(&file, text).expect("writable");
        let out = Command::new(&binary).args(["config", "check"]).arg(&file).output().expect("it starts");
        (out.status.code(), String::from_utf8_lossy(&out.stderr).into_owned())
    };
    let print = Command::new(&binary).args(["config", "print"]).output().expect("it starts").stdout;
    let print = String::from_utf8(print).expect("text");
    assert_eq!(check(&print).0, Some(0), "what is printed is not valid");
    let mut section = String::new();
    let mut keys = 0;
    for line in print.lines().map(str::trim) {
        if line.starts_with('[') && line.ends_with(']') {
            section = line.to_owned();
        } else if let Some((key, value)) = line.split_once(" = ").filter(|(k, _)| !k.starts_with('#')) {
            keys += 1;
            // One letter more than the key has.
            let (code, text) = check(&format!("{section}\n{key}x = {value}\n"));
            assert_eq!(code, Some(2), "{section} {key}x: {text}");
            assert!(text.contains(&format!("did you mean `{key}`?")) && text.contains("line 2"), "{text}");
        }
    }
    assert!(keys >= 5, "{print}");
    let (code, text) = check("[captrue]\n");
    assert!(code == Some(2) && text.contains("did you mean `capture`?"), "{text}");
    let slip =
        Command::new(&binary).args(["config", "print"]).env("APISCOPE_SIED", "server").output().expect("it starts");
    let text = String::from_utf8_lossy(&slip.stderr);
    assert!(
        slip.status.success() && text.contains("APISCOPE_SIED") && text.contains("did you mean APISCOPE_SIDE?"),
        "{text}"
    );
    let missing = Command::new(&binary).args(["config", "check", "/no/such/file"]).output().expect("it starts");
    assert_eq!(missing.status.code(), Some(2));
    std::fs::remove_dir_all(folder).expect("removable");
}

/// A recording of one agent is what a replay reads.
#[test]
fn recordings_are_exchanges() {
    let agent = Agent::start("recording", &[]);
    let server = traffic(10);
    agent.expect_side(&server, Side::Server, &vec![Want::any("GET", "/life/7", 200); 10]);
    let file = agent.stop();
    let text = std::fs::read(&file).expect("a recording");
    for line in text.split(|&b| b == b'\n').filter(|l| !l.is_empty()) {
        Exchange::from_json(line).unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(line)));
    }
}
