//! The first process of a test VM (`cargo xtask vm`): brings the machine up, starts one agent for each door
//! at the same time, sends traffic of every shape, and holds every agent's recording against it and against
//! each other.
//!
//! It speaks to the host in lines on the serial port, each after `@vm `: `test NAME ok|lack|FAIL SECONDS
//! WHAT`, `program DOOR NAME INSTRUCTIONS RUNS NS`, `ndjson DOOR {…}`, and at last `end`. Settings come on
//! the kernel's command line: `vm.doors=tp_btf:no,fexit:yes,…`, `vm.full`, `vm.tls`, `vm.skips`, `vm.filter=TEXT`, `vm.shell`;
//! words without a dot, such as `APISCOPE=PATH`, become variables of this process.

#[path = "guest/programs.rs"]
mod programs;

use std::{
    any::Any,
    ffi::CString,
    fmt::Write as _,
    fs,
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    panic::{AssertUnwindSafe, catch_unwind},
    process::{Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

use apiscope::exchange::{End, Side};
use apiscope_tests::{Agent, Call, Step, Want, perform};

/// Where the image has the agent.
const AGENT: &str = "/apiscope";

fn main() -> ExitCode {
    if std::process::id() != 1 {
        eprintln!("this is the first process of a test VM: run `cargo xtask vm`");
        return ExitCode::from(2);
    }
    let done = catch_unwind(|| {
        bring_up();
        let settings = Settings::read();
        if settings.shell {
            let status = Command::new("/bin/busybox").arg("sh").env("PATH", "/bin:/").status();
            println!("the shell ended: {status:?}");
        } else {
            if !settings.probe {
                Tests::new(settings).run();
            }
            println!("@vm end");
        }
    });
    if let Err(panic) = done {
        println!("the guest's own code failed: {}", text_of(&*panic));
    }
    // SAFETY: the end of this machine; nothing of it is kept.
    unsafe { libc::reboot(libc::LINUX_REBOOT_CMD_RESTART) };
    ExitCode::FAILURE
}

/// What the host wants.
struct Settings {
    /// Doors, and whether this kernel is expected to offer them.
    doors: Vec<(String, bool)>,
    full: bool,
    /// This kernel lets TLS be read.
    tls: bool,
    /// It skips programs of fexit.
    skips: bool,
    filter: String,
    shell: bool,
    /// Only to see whether a guest starts.
    probe: bool,
}

impl Settings {
    fn read() -> Self {
        let line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
        let value = |key: &str| line.split_ascii_whitespace().find_map(|w| w.strip_prefix(key)).unwrap_or_default();
        let doors = value("vm.doors=").split(',').filter_map(|d| d.split_once(':'));
        Self {
            doors: doors.map(|(door, offered)| (door.to_owned(), offered == "yes")).collect(),
            full: line.contains("vm.full"),
            tls: line.contains("vm.tls"),
            skips: line.contains("vm.skips"),
            filter: value("vm.filter=").to_owned(),
            shell: line.contains("vm.shell"),
            probe: line.contains("vm.probe"),
        }
    }
}

/// Mounts, loopback and terminal: what a distribution does before the first program.
fn bring_up() {
    for (kind, place) in [
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("devtmpfs", "/dev"),
        ("tmpfs", "/tmp"),
        ("tmpfs", "/run"),
        ("tracefs", "/sys/kernel/tracing"),
        ("securityfs", "/sys/kernel/security"),
        ("bpf", "/sys/fs/bpf"),
    ] {
        let _ = fs::create_dir_all(place);
        let (kind, target) = (CString::new(kind).expect("no NUL"), CString::new(place).expect("no NUL"));
        // SAFETY: three strings that live through the call. A file system that a kernel lacks is no matter.
        unsafe { libc::mount(kind.as_ptr(), target.as_ptr(), kind.as_ptr(), 0, std::ptr::null()) };
    }
    loopback_up();
    let _ = fs::write("/proc/sys/kernel/bpf_stats_enabled", "1");
}

fn loopback_up() {
    // SAFETY: plain data, zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[..2].copy_from_slice(&[b'l' as libc::c_char, b'o' as libc::c_char]);
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: a socket of our own and a request that lives through the call.
    unsafe {
        let socket = libc::socket(libc::AF_INET, libc::SOCK_DGRAM, 0);
        libc::ioctl(socket, libc::SIOCSIFFLAGS, &raw const request);
        libc::close(socket);
    }
}

/// How a test ended.
enum Verdict {
    Good(String),
    /// The kernel lacks what is tested, as expected, and the agent said so.
    Lack(String),
}

struct Tests {
    settings: Settings,
    agents: Vec<(String, Agent)>,
}

impl Tests {
    fn new(settings: Settings) -> Self {
        Self { settings, agents: Vec::new() }
    }

    fn run(&mut self) {
        self.loads();
        // It loads a door once more, and a door takes half a minute here.
        if self.settings.full {
            self.doctor();
        }
        if self.agents.is_empty() {
            return;
        }
        let traffic = Traffic::new();
        let sent = catch_unwind(AssertUnwindSafe(|| traffic.perform()));
        let (names, agents) = (self.names(), std::mem::take(&mut self.agents));
        for (door, agent) in &agents {
            self.test_door("exchanges", door, agent, || {
                let servers = sent.as_ref().map_err(|p| text_of(&**p))?;
                let mut n = 0;
                for (server, wanted) in servers {
                    agent.expect(server, wanted);
                    n += 2 * wanted.len();
                }
                let lost = agent.lost();
                if lost == 0 { Ok(Verdict::Good(format!("{n} exchanges"))) } else { Err(format!("{lost} losses")) }
            });
        }
        if self.settings.full {
            for (door, agent) in &agents {
                self.test(&format!("io_uring.{door}"), || uring(agent));
            }
            if self.settings.tls {
                self.programs(&agents);
            }
        }
        if let Ok(servers) = &sent
            && agents.len() > 1
        {
            let whole: Vec<_> = agents.iter().filter(|(_, agent)| skipped(agent) == 0).collect();
            self.test("equal", || compare(&whole, servers));
        }
        if self.settings.full {
            for (door, agent) in &agents {
                self.test_door("churn", door, agent, || churn(agent));
            }
        }
        for (door, agent) in agents {
            programs(&door, &agent);
            self.test(&format!("end.{door}"), || {
                agent.stop();
                Ok(Verdict::Good("detached".into()))
            });
        }
        if self.settings.full {
            self.hostile(&names);
        }
    }

    fn names(&self) -> Vec<String> {
        self.agents.iter().map(|(door, _)| door.clone()).collect()
    }

    /// The verifier accepts the programs of every door that this kernel offers; of the others the agent says
    /// in a line what is missing.
    fn loads(&mut self) {
        let tls = self.settings.tls;
        for (door, offered) in std::mem::take(&mut self.settings.doors) {
            let mut started = None;
            self.test(&format!("load.{door}"), || {
                let arguments = ["--door", &door, "--json"];
                if offered {
                    let agent = started.insert(Agent::start(&door, &arguments));
                    let programs = agent.snapshot().map(|s| s.cost.programs).unwrap_or_default();
                    let of_tls = ["tls_enter", "tls_read", "tls_write", "go_enter", "go_read", "go_write"];
                    let lacks: Vec<_> =
                        of_tls.into_iter().filter(|name| tls && programs.iter().all(|p| p.name != *name)).collect();
                    if !lacks.is_empty() {
                        return Err(format!("of TLS {} are not loaded: see the log", lacks.join(", ")));
                    }
                    return Ok(Verdict::Good(format!("{} programs accepted and attached", programs.len())));
                }
                let out = Command::new(AGENT)
                    .args(["run", "--duration", "1", "--socket", "/tmp/lack.sock"])
                    .args(arguments)
                    .stdin(Stdio::null())
                    .output()
                    .map_err(|e| e.to_string())?;
                let said = String::from_utf8_lossy(&out.stderr);
                let reason = said.lines().find(|l| l.trim_start().starts_with(&door)).unwrap_or_default();
                match out.status.code() {
                    Some(1) if !reason.is_empty() => Ok(Verdict::Lack(reason.trim().to_owned())),
                    Some(0) => Err("works, though this kernel was said to lack it: correct the table".into()),
                    code => Err(format!("ended with {code:?} and no reason: {said}")),
                }
            });
            self.agents.extend(started.map(|agent| (door, agent)));
        }
    }

    /// TLS and HTTP/2 by programs, both ends of each.
    fn programs(&mut self, agents: &[(String, Agent)]) {
        let servers = programs::servers();
        let ready = catch_unwind(AssertUnwindSafe(|| programs::warm_up(agents))).map_err(|p| text_of(&*p));
        for traffic in programs::TRAFFIC {
            let asked = ready.clone().and_then(|()| traffic.ask());
            for (door, agent) in agents {
                self.test_door(traffic.name, door, agent, || {
                    asked.clone()?;
                    traffic.hold(agent)?;
                    match agent.lost() {
                        0 => Ok(Verdict::Good(format!("{} exchanges", 2 * programs::REQUESTS))),
                        lost => Err(format!("{lost} losses")),
                    }
                });
            }
        }
        drop(servers);
    }

    /// `doctor` names the best door that did load.
    fn doctor(&mut self) {
        let wanted = self.names().first().cloned();
        self.test("doctor", || {
            let report = report(Command::new(AGENT).args(["doctor", "--json"]))?;
            let text = Command::new(AGENT).arg("doctor").output().map_err(|e| e.to_string())?;
            println!("{}", String::from_utf8_lossy(&text.stdout));
            let named = report["door"].as_str().map(str::to_owned);
            if named != wanted {
                return Err(format!("names {named:?}, but {wanted:?} loads; {}", report["doors"]));
            }
            Ok(Verdict::Good(format!("names {}", named.as_deref().unwrap_or("no door"))))
        });
    }

    /// What must end the agent with a clear line, or must not end it.
    fn hostile(&mut self, doors: &[String]) {
        let fails = |prepare: &dyn Fn(&mut Command), says: &str| {
            let mut command = Command::new(AGENT);
            command.args(["run", "--duration", "1", "--quiet", "--socket", "/tmp/hostile.sock"]).stdin(Stdio::null());
            prepare(&mut command);
            let out = command.output().map_err(|e| e.to_string())?;
            let said = String::from_utf8_lossy(&out.stderr).into_owned();
            if out.status.code() == Some(1) && said.contains(says) {
                let line = said.lines().find(|l| l.contains(says)).unwrap_or_default();
                Ok(Verdict::Good(format!("says: {}", line.trim())))
            } else {
                Err(format!("ended with {:?}: {said}", out.status.code()))
            }
        };
        for door in doors {
            self.test(&format!("kill.{door}"), || killed(door));
        }
        self.test("no-capability", || {
            use std::os::unix::process::CommandExt as _;
            fails(
                &|command| {
                    command.uid(65_534).gid(65_534);
                },
                "CAP_BPF",
            )
        });
        self.test("least-privileges", || {
            use std::os::unix::process::CommandExt as _;
            let mut command = Command::new(AGENT);
            command.args(["doctor", "--json"]);
            // SAFETY: the calls are async-signal-safe. What the bounding set lacks, root does not get by exec.
            unsafe {
                command.pre_exec(|| {
                    for capability in (0..=40).filter(|c| !LEAST.contains(c)) {
                        libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0);
                    }
                    Ok(())
                })
            };
            let report = report(&mut command)?;
            let door = report["door"].as_str().map(str::to_owned);
            if door.as_deref() != doors.first().map(String::as_str) {
                return Err(format!("names {door:?}: {}", report["doors"]));
            }
            let checks = report["checks"].as_array().cloned().unwrap_or_default();
            let tls = checks.iter().find(|c| c["name"] == "TLS of libraries").ok_or("nothing about TLS")?;
            Ok(Verdict::Good(format!("{}; TLS of libraries: {}", door.unwrap_or_default(), tls["found"])))
        });
        self.test("lockdown-integrity", || {
            if fs::write("/sys/kernel/security/lockdown", "integrity").is_err() {
                return Ok(Verdict::Lack("this kernel has no lockdown".into()));
            }
            let report = report(Command::new(AGENT).args(["doctor", "--json"]))?;
            match report["door"].as_str() {
                Some(door) => Ok(Verdict::Good(format!("names {door}"))),
                None => Err(format!("no door: {}", report["doors"])),
            }
        });
        self.test("lockdown-confidentiality", || {
            if fs::write("/sys/kernel/security/lockdown", "confidentiality").is_err() {
                return Ok(Verdict::Lack("this kernel has no lockdown".into()));
            }
            fails(&|_| {}, "no way to see")
        });
        self.test("no-types", || {
            let place = CString::new("/sys/kernel/btf").expect("no NUL");
            let kind = CString::new("tmpfs").expect("no NUL");
            // SAFETY: strings that live through the call.
            let hidden = unsafe { libc::mount(kind.as_ptr(), place.as_ptr(), kind.as_ptr(), 0, std::ptr::null()) };
            if hidden != 0 {
                return Err("could not hide the types".into());
            }
            fails(&|_| {}, "CONFIG_DEBUG_INFO_BTF")
        });
    }

    /// Runs a test of one door. Where the kernel skips programs of fexit, what is missing is named, if it was counted.
    fn test_door(&mut self, name: &str, door: &str, agent: &Agent, run: impl FnOnce() -> Result<Verdict, String>) {
        let skips = self.settings.skips && door == "fexit";
        self.test(&format!("{name}.{door}"), || {
            let result = catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| Err(text_of(&*panic)));
            match (result, skipped(agent)) {
                (Err(_), n @ 1..) if skips => Ok(Verdict::Lack(format!(
                    "the kernel skipped {n} sends or receives while another one's program was on the processor; counted"
                ))),
                (result, _) => result,
            }
        });
    }

    /// Runs one test, unless the filter leaves it out, and reports it. The first ones always run, since the
    /// others stand on them.
    fn test(&mut self, name: &str, run: impl FnOnce() -> Result<Verdict, String>) {
        if !name.starts_with("load.") && !name.contains(&self.settings.filter) {
            return;
        }
        let started = Instant::now();
        let verdict = catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| Err(text_of(&*panic)));
        let (word, what) = match verdict {
            Ok(Verdict::Good(what)) => ("ok", what),
            Ok(Verdict::Lack(what)) => ("lack", what),
            Err(what) => ("FAIL", what),
        };
        println!("@vm test {name} {word} {:.1} {}", started.elapsed().as_secs_f32(), what.replace('\n', " | "));
    }
}

/// CAP_SYS_PTRACE, CAP_PERFMON, CAP_BPF: what the agent asks for (capabilities(7)).
const LEAST: [i32; 3] = [19, 38, 39];

/// What `doctor --json` says.
fn report(doctor: &mut Command) -> Result<serde_json::Value, String> {
    let out = doctor.stdin(Stdio::null()).output().map_err(|e| e.to_string())?;
    serde_json::from_slice(&out.stdout).map_err(|e| format!("{e}: {}", String::from_utf8_lossy(&out.stderr)))
}

fn text_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned())).unwrap_or_else(|| "a panic".into())
}

/// Runs of its programs that the kernel skipped.
fn skipped(agent: &Agent) -> u64 {
    agent.snapshot().and_then(|s| s.totals.losses.get("recursion").copied()).unwrap_or(0)
}

/// Verifier and run-time figures of an agent's programs.
fn programs(door: &str, agent: &Agent) {
    let Some(snapshot) = agent.snapshot() else { return };
    for p in snapshot.cost.programs {
        println!("@vm program {door} {} {} {} {}", p.name, p.verified, p.runs, p.ns);
    }
}

/// Connections, each at an address of its own.
struct Traffic(Vec<(&'static str, Vec<Step>, Vec<Want>)>);

fn request(method: &str, target: &str, body: &[u8], fields: &str) -> Vec<u8> {
    let mut head = format!("{method} {target} HTTP/1.1\r\nHost: t.test\r\n{fields}");
    if !body.is_empty() {
        let _ = write!(head, "Content-Length: {}\r\n", body.len());
    }
    [head.as_bytes(), b"\r\n", body].concat()
}

fn response(status: u16, body: &[u8]) -> Vec<u8> {
    [format!("HTTP/1.1 {status} X\r\nContent-Length: {}\r\n\r\n", body.len()).as_bytes(), body].concat()
}

impl Traffic {
    fn new() -> Self {
        let mut all = Vec::new();
        let calls = [Call::Write, Call::Writev, Call::Send, Call::Sendmsg, Call::Sendfile];
        for address in ["127.0.0.1:0", "[::1]:0", "unix:/tmp/calls"] {
            let (mut steps, mut wanted) = (Vec::new(), Vec::new());
            for (i, call) in calls.into_iter().enumerate() {
                let size = [0, 17, 300, 9_000, 70_000][i];
                // The bytes of sendfile never were in the application: only a body can come that way.
                let (rq, rs) = (
                    request("POST", &format!("/calls/{i}"), &vec![b'q'; size], ""),
                    response(201, &vec![b's'; size * 2]),
                );
                let (rq_head, rs_head) = (rq.len() - size, rs.len() - size * 2);
                if call == Call::Sendfile {
                    steps.extend([
                        Step::client(&rq[..rq_head]),
                        Step::client(&rq[rq_head..]).by(call),
                        Step::server(&rs[..rs_head]),
                        Step::server(&rs[rs_head..]).by(call),
                    ]);
                } else {
                    steps.extend([Step::client(rq.clone()).by(call), Step::server(rs.clone()).by(call)]);
                }
                let want = Want::new("POST", format!("/calls/{i}"), 201, &rq, &rs);
                wanted.push(if size == 0 { want } else { want.bodies(size, size * 2) });
            }
            all.push((address, steps, wanted));
        }
        let (mut steps, mut wanted) = (Vec::new(), Vec::new());
        for (i, split) in [1, 7, 100, 5_000].into_iter().enumerate() {
            let path = format!("/split/{i}");
            let rq = request("PUT", &path, &[b'a'; 90], "X-A: b\r\n");
            let mut rs = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec();
            for part in [7, 100, 3_000] {
                rs.extend_from_slice(format!("{part:x};note=1\r\n").as_bytes());
                rs.extend(std::iter::repeat_n(b'b', part));
                rs.extend_from_slice(b"\r\n");
            }
            rs.extend_from_slice(b"0\r\nX-Trailer: done\r\n\r\n");
            steps.extend([Step::client(rq.clone()).split(split), Step::server(rs.clone()).split(split.max(100))]);
            wanted.push(Want::new("PUT", path, 200, &rq, &rs).bodies(90, 3_107));
        }
        all.push(("127.0.0.1:0", steps, wanted));
        let rqs: Vec<_> = (0..5).map(|i| request("GET", &format!("/pipe/{i}"), b"", "")).collect();
        let rss: Vec<_> = (0..5).map(|i| response(200, &vec![b'x'; i * 10])).collect();
        let wanted = (0..5).map(|i| Want::new("GET", format!("/pipe/{i}"), 200, &rqs[i], &rss[i])).collect();
        all.push(("127.0.0.1:0", vec![Step::client(rqs.concat()), Step::server(rss.concat())], wanted));
        let (rq, rs) =
            (b"GET /old HTTP/1.0\r\n\r\n", [b"HTTP/1.0 200 OK\r\n\r\n".to_vec(), vec![b'y'; 3_000]].concat());
        // The client sees the end: closed by both at once, such a body is whole or not, as it happens.
        let steps = vec![Step::client(&rq[..]), Step::server(rs.clone()), Step::Close(false), Step::ReadEnd(true)];
        all.push(("127.0.0.1:0", steps, vec![Want::new("GET", "/old", 200, rq, &rs).bodies(0, 3_000)]));
        let (rq, rs) = (request("GET", "/cut", b"", ""), response(200, &vec![b'r'; 5_000]));
        let pause = Duration::from_millis(100);
        let steps = vec![
            Step::client(rq),
            Step::server(&rs[..2_000]),
            Step::Sleep(false, pause),
            Step::Reset(false),
            Step::Sleep(true, 3 * pause),
        ];
        let mut cut = Want::any("GET", "/cut", 200).ending(End::Reset);
        cut.response_bytes = Some(2_000);
        all.push(("127.0.0.1:0", steps, vec![cut]));
        Self(all)
    }

    /// Sends everything; returns each server's address with what must be seen there.
    fn perform(&self) -> Vec<(String, &[Want])> {
        self.0
            .iter()
            .map(|(address, steps, wanted)| (perform(address, std::slice::from_ref(steps)), &wanted[..]))
            .collect()
    }
}

/// The recordings of all doors, byte for byte, apart from times and the order of independent exchanges.
fn compare(agents: &[&(String, Agent)], servers: &[(String, &[Want])]) -> Result<Verdict, String> {
    let mut all = Vec::new();
    for &(door, agent) in agents {
        let text = fs::read_to_string(&agent.file).map_err(|e| e.to_string())?;
        for line in text.lines() {
            println!("@vm ndjson {door} {line}");
        }
        let named = |line: &str, server: &str| line.contains(&format!("\"{server}\""));
        // Of the warm-up each door saw another part.
        let ours = |line: &&str| {
            servers.iter().any(|(server, _)| named(line, server))
                || programs::TRAFFIC.iter().any(|t| named(line, t.server) && !line.contains("\"/warm/"))
        };
        let mut lines: Vec<String> = text.lines().filter(ours).map(without_times).collect();
        lines.sort();
        all.push((door, lines));
    }
    let (first, lines) = &all[0];
    for (door, other) in &all[1..] {
        if let Some((a, b)) = lines.iter().zip(other).find(|(a, b)| a != b) {
            return Err(format!("{first}: {a} | {door}: {b}"));
        }
        if lines.len() != other.len() {
            return Err(format!("{first} has {} lines, {door} {}", lines.len(), other.len()));
        }
    }
    let doors: Vec<_> = all.iter().map(|(door, _)| door.as_str()).collect();
    Ok(Verdict::Good(format!("{} lines each of {}", lines.len(), doors.join(", "))))
}

/// The line with the values of `ts` and `duration_ns` taken out, and not another byte changed.
fn without_times(line: &str) -> String {
    let mut line = line.to_owned();
    for key in ["\"ts\":", "\"duration_ns\":"] {
        if let Some(at) = line.find(key).map(|at| at + key.len()) {
            let digits = line[at..].bytes().take_while(u8::is_ascii_digit).count();
            line.replace_range(at..at + digits, "");
        }
    }
    line
}

/// A client on io_uring is counted as not read, and its server is read: the kernel sends and receives for it within
/// other system calls, or in a thread of its own.
fn uring(agent: &Agent) -> Result<Verdict, String> {
    use io_uring::{IoUring, opcode, types::Fd};
    use std::os::fd::AsRawFd as _;

    const ROUNDS: usize = 3;
    let unread = || agent.snapshot().and_then(|s| s.totals.unread.get("io_uring").copied()).unwrap_or(0);
    let before = unread();
    let (rq, rs) = (request("GET", "/uring", b"", ""), response(200, b"ok"));
    let mut servers = Vec::new();
    for polled in [false, true] {
        let listener = TcpListener::bind("127.0.0.1:0").map_err(|e| e.to_string())?;
        let address = listener.local_addr().map_err(|e| e.to_string())?;
        let (length, answer) = (rq.len(), rs.clone());
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept()?;
            for _ in 0..ROUNDS {
                stream.read_exact(&mut vec![0; length])?;
                stream.write_all(&answer)?;
            }
            Ok::<_, std::io::Error>(())
        });
        let stream = TcpStream::connect(address).map_err(|e| e.to_string())?;
        let mut builder = IoUring::<io_uring::squeue::Entry>::builder();
        if polled {
            builder.setup_sqpoll(2_000);
        }
        let mut ring = match builder.build(8) {
            Ok(ring) => ring,
            Err(e) => return Ok(Verdict::Lack(format!("this kernel offers no io_uring: {e}"))),
        };
        let mut buffer = vec![0; 4_096];
        let fd = Fd(stream.as_raw_fd());
        for _ in 0..ROUNDS {
            let send = opcode::Send::new(fd, rq.as_ptr(), rq.len() as u32).build();
            let receive = opcode::Recv::new(fd, buffer.as_mut_ptr(), 4_096).build();
            for entry in [send, receive] {
                // SAFETY: both buffers outlive the wait for their completion.
                unsafe { ring.submission().push(&entry) }.map_err(|e| e.to_string())?;
                ring.submit_and_wait(1).map_err(|e| e.to_string())?;
                let result = ring.completion().next().map_or(-1, |c| c.result());
                if result <= 0 {
                    return Err(format!("error {result} of the ring"));
                }
            }
        }
        server.join().map_err(|p| text_of(&*p))?.map_err(|e| e.to_string())?;
        servers.push(address.to_string());
    }
    let want = Want::new("GET", "/uring", 200, &rq, &rs);
    for server in &servers {
        agent.expect_side(server, Side::Server, &vec![want.clone(); ROUNDS]);
        agent.expect_side(server, Side::Client, &[]);
    }
    match unread() - before {
        0 => Err("it was not counted".into()),
        n => Ok(Verdict::Good(format!(
            "{n} of the client's calls counted as not read, {} exchanges of the server",
            2 * ROUNDS
        ))),
    }
}

/// Many short connections: none lost, and the agent's memory of connections goes back.
fn churn(agent: &Agent) -> Result<Verdict, String> {
    const CONNECTIONS: usize = 400;
    let (rq, rs) = (request("GET", "/churn", b"", ""), response(200, b"ok"));
    let steps = vec![Step::client(rq), Step::server(rs)];
    let mut servers = Vec::new();
    // Of a kretprobe on two processors the kernel keeps ten returns.
    for _ in 0..CONNECTIONS / 4 {
        servers.push(perform("127.0.0.1:0", &vec![steps.clone(); 4]));
    }
    let end = Instant::now() + Duration::from_secs(30);
    let seen = || servers.iter().map(|s| agent.seen(s, Side::Server).len()).sum::<usize>();
    while seen() < CONNECTIONS && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(200));
    }
    let open = || agent.snapshot().map_or(u64::MAX, |s| s.totals.connections);
    while open() > 8 && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(200));
    }
    match (seen(), agent.lost(), open()) {
        (CONNECTIONS, 0, 0..=8) => Ok(Verdict::Good(format!("{CONNECTIONS} connections, none left"))),
        (seen, lost, open) => Err(format!("{seen} of {CONNECTIONS} seen, {lost} lost, {open} still open")),
    }
}

/// An agent that is killed leaves no program behind.
fn killed(door: &str) -> Result<Verdict, String> {
    let before = programs_loaded();
    let mut agent = Agent::start(&format!("killed-{door}"), &["--door", door]);
    let there = programs_loaded();
    if there <= before {
        return Err(format!("{there} programs in the kernel while the agent runs, {before} before"));
    }
    agent.child.kill().and_then(|()| agent.child.wait()).map_err(|e| e.to_string())?;
    // The last ones go after a grace period.
    let end = Instant::now() + Duration::from_secs(20);
    while programs_loaded() > before && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(100));
    }
    match programs_loaded() {
        left if left > before => Err(format!("{} programs are left in the kernel", left - before)),
        _ => Ok(Verdict::Good(format!("all of its {} programs are gone", there - before))),
    }
}

/// eBPF programs in the kernel (`BPF_PROG_GET_NEXT_ID` of bpf(2)). One that is attached anywhere is there.
fn programs_loaded() -> usize {
    const NEXT: libc::c_long = 11;
    let mut ids = [0u32; 3];
    std::iter::from_fn(|| {
        ids[0] = std::mem::take(&mut ids[1]).max(ids[0]);
        // SAFETY: the kernel writes the second of three words, which outlive the call.
        let found = unsafe { libc::syscall(libc::SYS_bpf, NEXT, ids.as_mut_ptr(), 12) } == 0;
        found.then_some(())
    })
    .count()
}
