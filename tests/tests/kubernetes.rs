//! Names of pods and workloads, from a small API server of the tests' own: its watches cut, its history
//! forgotten, itself away; pods that live for a second and hand their addresses on; five thousand pods.
//!
//! The pods of the end-to-end test are processes in cgroups like a kubelet's, in a network namespace with
//! addresses like a CNI's.

use std::{
    fs,
    net::IpAddr,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, RwLock},
    time::{Duration, Instant, SystemTime},
};

use apiscope::{
    config::Kubernetes,
    identity::pods::{Found, Pods, Source},
    kubernetes::Watches,
    stats::Stats,
};
use apiscope_tests::{
    Agent,
    apiserver::{ApiServer, pod, uid},
    free_port, listener,
    process::Guard,
    program,
};
use serde_json::{Value, json};

const NODE: &str = "node-1";

fn config(server: &ApiServer) -> Kubernetes {
    Kubernetes { enabled: Some(true), node: Some(NODE.into()), server: Some(server.url()), ..Kubernetes::default() }
}

fn wait(what: &str, ready: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(90);
    while !ready() {
        assert!(Instant::now() < end, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn wall() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after 1970");
    u64::try_from(now.as_nanos()).expect("before 2554")
}

/// What an address is now: `kind/name`.
fn at(pods: &RwLock<Pods>, address: &str) -> String {
    let address: IpAddr = address.parse().expect("an address");
    match pods.read().expect("whole").at(address, wall()) {
        Found::Known(o) => o.workload.as_ref().map(|w| format!("{}/{}", w.kind.name(), w.name)).unwrap_or_default(),
        Found::Likely(_) | Found::Perhaps => "perhaps".into(),
        Found::Outside => "outside".into(),
    }
}

#[test]
fn watches_outlive_cuts_forgetting_and_an_absent_server() {
    let server = ApiServer::start();
    let service = json!({"metadata": {"name": "web", "namespace": "shop"}, "spec": {"clusterIP": "10.96.0.9", "clusterIPs": ["10.96.0.9"]}});
    server.put("services", service.clone());
    server.put("nodes", json!({"metadata": {"name": "node-2"}, "status": {"addresses": [{"address": "192.0.2.2"}]}}));
    for i in 0..5 {
        server.put(
            "pods",
            pod("shop", &format!("web-{i}"), "web", NODE, Some(&format!("10.1.0.{i}")), Some(&format!("c{i}"))),
        );
        server.put("pods", pod("shop", &format!("far-{i}"), "far", "node-2", Some(&format!("10.1.1.{i}")), None));
    }
    let (pods, stats) = (Arc::new(RwLock::new(Pods::default())), Arc::new(Stats::default()));
    let watches = Watches::start(&config(&server), pods.clone(), stats.clone()).expect("valid").expect("on");
    let live = || Source::ALL.iter().all(|s| pods.read().expect("whole").is_live(*s));
    wait("lists, in pages", || live() && pods.read().expect("whole").len() == 10);
    assert_eq!(at(&pods, "10.1.0.4"), "Deployment/web");
    assert_eq!(at(&pods, "10.1.1.4"), "Deployment/far");
    assert_eq!(at(&pods, "10.96.0.9"), "Service/web");
    assert_eq!(at(&pods, "192.0.2.2"), "Node/node-2");
    assert_eq!((at(&pods, "10.1.9.9"), at(&pods, "8.8.8.8")), ("perhaps".into(), "outside".into()));
    let container = pods.read().expect("whole").container("c3", None).expect("named");
    assert_eq!((container.pod.as_deref(), container.container.as_deref()), (Some("web-3"), Some("app")));
    assert_eq!(container.image.as_ref().and_then(|i| i.tag.as_deref()), Some("1.0"));

    // What watches tell.
    server.put("pods", pod("shop", "new-1", "new", "node-2", Some("10.1.1.100"), None));
    wait("a new pod", || at(&pods, "10.1.1.100") == "Deployment/new");
    server.delete("services", &service);
    wait("a service that is gone", || at(&pods, "10.96.0.9") == "outside");

    // Quiet but for bookmarks, then cut: goes on without a list.
    std::thread::sleep(Duration::from_millis(700));
    let (lists, watched) = server.requests();
    server.set_away(true);
    wait("it is noticed", || !live());
    assert_eq!(at(&pods, "10.1.0.4"), "Deployment/web", "what is known stays");
    server.put("pods", pod("shop", "meanwhile", "meanwhile", NODE, Some("10.1.0.50"), Some("c50")));
    server.set_away(false);
    wait("back", || live() && at(&pods, "10.1.0.50") == "Deployment/meanwhile");
    let after = server.requests();
    assert_eq!(after.0, lists, "a watch goes on where it was");
    assert!(after.1 >= watched + 4);
    assert!(stats.totals().kubernetes_failed >= 4);

    // Away for longer than the server remembers: lists again, and what went meanwhile goes.
    server.set_away(true);
    wait("it is noticed", || !live());
    server.delete("pods", &pod("shop", "far-0", "far", "node-2", None, None));
    server.put("pods", pod("shop", "late", "late", "node-2", Some("10.1.1.0"), None));
    server.forget();
    server.set_away(false);
    wait("listed again", || live() && at(&pods, "10.1.1.0") == "Deployment/late");
    assert!(server.requests().0 > lists);
    // Nothing is asked for but watches: no polling.
    std::thread::sleep(Duration::from_millis(500));
    let (lists, watches_so_far) = server.requests();
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(server.requests(), (lists, watches_so_far));
    let stopping = Instant::now();
    drop(watches);
    assert!(stopping.elapsed() < Duration::from_secs(2), "it ends at once");
}

/// What was asked for and cannot be is an error that names it; a token never goes out in plaintext.
#[test]
fn wrong_configuration_is_named_and_tokens_stay() {
    use std::io::{Read as _, Write as _};
    let start = |config: &Kubernetes| Watches::start(config, Arc::default(), Arc::default());
    let config = Kubernetes { enabled: Some(true), ..Kubernetes::default() };
    let error = start(&config).err().expect("no node").to_string();
    assert!(error.contains("NODE_NAME"), "{error}");
    let config = Kubernetes { node: Some(NODE.into()), ..config };
    let error = start(&config).err().expect("no server").to_string();
    assert!(error.contains("kubernetes.server"), "{error}");
    assert!(start(&Kubernetes { enabled: Some(false), ..config.clone() }).expect("off").is_none());

    let token = std::env::temp_dir().join(format!("apiscope-token-{}", std::process::id()));
    fs::write(&token, "canary-token").expect("written");
    let listener = listener("127.0.0.1");
    let server = Some(format!("http://{}", listener.local_addr().expect("an address")));
    let stats = Arc::new(Stats::default());
    let config = Kubernetes { server, token_file: Some(token.clone()), peers: false, ..config };
    let watches = Watches::start(&config, Arc::default(), stats.clone()).expect("valid").expect("on");
    let (mut stream, _) = listener.accept().expect("asked");
    let mut head = [0; 4096];
    let n = stream.read(&mut head).expect("a request");
    let head = String::from_utf8_lossy(&head[..n]).into_owned();
    assert!(head.starts_with("GET /api/v1/pods") && !head.contains("canary"), "{head}");
    // Refused: counted, and said with its remedy in the log.
    stream.write_all(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n").expect("answered");
    wait("a counted failure", || stats.totals().kubernetes_failed > 0);
    drop(watches);
    fs::remove_file(token).expect("removable");
}

/// Cgroups, removed at the end.
struct Cgroups {
    root: PathBuf,
    made: Vec<PathBuf>,
}

impl Cgroups {
    /// Where this machine lets cgroups be made: v2, or a v1 hierarchy.
    fn new() -> Self {
        let name = format!("kubepods-test-{}", std::process::id());
        let root = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/pids"]
            .iter()
            .map(|base| Path::new(base).join(&name))
            .find(|root| {
                // On a machine with v1 hierarchies the first is a plain folder of them.
                let made = fs::create_dir(root).is_ok();
                let is_cgroup = root.join("cgroup.procs").exists();
                if made && !is_cgroup {
                    let _ = fs::remove_dir(root);
                }
                made && is_cgroup
            });
        let root = root.expect("no cgroup hierarchy can be written: the tests need root on a machine with cgroups");
        Self { made: vec![root.clone()], root }
    }

    fn container(&mut self, pod: &str, id: &str) -> PathBuf {
        let pod = self.root.join(format!("pod{}", uid(pod)));
        let container = pod.join(id);
        fs::create_dir_all(&container).expect("a cgroup");
        self.made.extend([pod, container.clone()]);
        container.join("cgroup.procs")
    }
}

impl Drop for Cgroups {
    fn drop(&mut self) {
        for folder in self.made.iter().rev() {
            for _ in 0..50 {
                // It empties when its processes are reaped.
                if fs::remove_dir(folder).is_ok() || !folder.exists() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
}

/// A command that runs inside a container's cgroup.
fn inside(procs: &Path, name: &str) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", "echo $$ > \"$0\"; exec \"$@\""]).arg(procs).arg(program(name));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

fn in_namespace(command: Command, pid: u32) -> Command {
    let mut outer = Command::new(program("nsenter"));
    outer.arg(format!("--net=/proc/{pid}/ns/net")).arg(command.get_program()).args(command.get_args());
    outer.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    // SAFETY: async-signal-safe; it ends with the test.
    unsafe {
        outer.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            Ok(())
        })
    };
    outer
}

/// A number, as long as a container's id.
fn container_id(n: usize) -> String {
    format!("{n:064x}")
}

#[test]
fn pods_of_a_second_are_named_on_both_ends() {
    const JOBS: usize = 40;
    const ADDRESSES: usize = 4;
    let server = ApiServer::start();
    server.put("nodes", json!({"metadata": {"name": NODE}, "status": {"addresses": [{"address": "192.0.2.1"}]}}));
    let mut cgroups = Cgroups::new();
    // A network namespace with the pods' addresses.
    let setup: String = (1..=ADDRESSES + 1).map(|i| format!("ip addr add 10.250.0.{i}/32 dev lo && ")).collect();
    let mut holder = Command::new(program("unshare"));
    holder.args(["-n", "sh", "-c", &format!("ip link set lo up && {setup} exec sleep 600")]);
    let holder = Guard(holder.spawn().expect("a network namespace"));
    wait("the namespace", || {
        let mut show = Command::new(program("ip"));
        show.args(["-br", "addr"]);
        let out = in_namespace(show, holder.0.id()).stdout(Stdio::piped()).output().expect("ip runs");
        String::from_utf8_lossy(&out.stdout).contains(&format!("10.250.0.{}/32", ADDRESSES + 1))
    });
    let folder = std::env::temp_dir().join(format!("apiscope-kubernetes-{}", std::process::id()));
    fs::create_dir_all(&folder).expect("a folder");
    let file = folder.join("config.toml");
    fs::write(&file, format!("[kubernetes]\nenabled = true\nnode = \"{NODE}\"\nserver = \"{}\"\n", server.url()))
        .expect("written");
    // Only what is the test's: the machine may be busy with others.
    let port = free_port().to_string();
    let agent = Agent::start("kubernetes", &["--config", &file.to_string_lossy(), "--include-port", &port]);

    // The web server's container is there before the API server tells of it.
    let web = "10.250.0.1";
    let procs = cgroups.container("web-0", &container_id(1));
    let mut serve = inside(&procs, "python3");
    serve.args(["-m", "http.server", &port, "--bind", web]);
    let _web = Guard(in_namespace(serve, holder.0.id()).spawn().expect("a server"));
    server.put("pods", pod("shop", "web-0", "web", NODE, Some(web), Some(&container_id(1))));
    wait("the web server", || {
        let mut ask = Command::new(program("curl"));
        ask.args(["-s", "-o", "/dev/null", &format!("http://{web}:{port}/ready")]);
        in_namespace(ask, holder.0.id()).status().expect("curl runs").success()
    });

    let tell_late = Duration::from_millis(120);
    for job in 0..JOBS {
        let (name, id) = (format!("job-{job}"), container_id(1000 + job));
        let address = format!("10.250.0.{}", 2 + job % ADDRESSES);
        // Scheduled, but without an address or container yet. Of every fourth the API server tells as of
        // another node's: a row of a table.
        let node = if job % 4 == 3 { "node-2" } else { NODE };
        server.put("pods", pod("batch", &name, "job", node, None, None));
        let procs = cgroups.container(&name, &id);
        let mut ask = inside(&procs, "curl");
        ask.args(["-s", "--interface", &address, "-o", "/dev/null", &format!("http://{web}:{port}/{name}")]);
        let mut asking = in_namespace(ask, holder.0.id()).spawn().expect("curl");
        std::thread::sleep(tell_late);
        let told = pod("batch", &name, "job", node, Some(&address), Some(&id));
        server.put("pods", told.clone());
        assert!(asking.wait().expect("a child").success(), "curl of {name}");
        // Every other one ends like a job: listed with its address until long after.
        if job % 2 == 0 {
            let mut ended = told.clone();
            ended["status"]["phase"] = json!("Succeeded");
            server.put("pods", ended);
        } else {
            server.delete("pods", &told);
        }
    }

    let lines = || -> Vec<Value> {
        let text = fs::read_to_string(&agent.file).unwrap_or_default();
        let all = text.lines().filter_map(|l| serde_json::from_str::<Value>(l).ok());
        all.filter(|e| e["path"].as_str().is_some_and(|p| p.starts_with("/job-"))).collect()
    };
    wait("both ends of every exchange", || lines().len() >= 2 * JOBS);
    let (mut wrong, mut unnamed) = (Vec::new(), 0_usize);
    for exchange in lines() {
        let path = exchange["path"].as_str().unwrap_or_default();
        let name = path.trim_start_matches('/');
        let of = |key: &str| exchange[key].as_str().unwrap_or_default().to_owned();
        let (own, peer) = if of("side") == "server" { ("web-0", name) } else { (name, "web-0") };
        let ns = |pod: &str| if pod.starts_with("job") { "batch" } else { "shop" };
        let service = if own == "web-0" { "web" } else { "job" };
        // On a machine that is too busy a name may come too late: then it is missing and counted, never wrong.
        if of("pod").is_empty() {
            unnamed += 1;
        } else if of("pod") != own || of("namespace") != ns(own) || of("service") != service {
            wrong.push(format!("{} of {path}: own `{}`, service `{}`", of("side"), of("pod"), of("service")));
        }
        if of("peer_pod").is_empty() {
            unnamed += 1;
        } else if of("peer_pod") != peer || of("peer_namespace") != ns(peer) {
            wrong.push(format!("{} of {path}: peer `{}`", of("side"), of("peer_pod")));
        } else if of("side") == "server" && of("caller") != "batch/job" {
            wrong.push(format!("{} of {path}: caller `{}`", of("side"), of("caller")));
        }
    }
    assert!(wrong.is_empty(), "{} wrong:\n  {}", wrong.len(), wrong.join("\n  "));
    let counted = agent.snapshot().expect("it runs").totals.unnamed.values().sum::<u64>();
    println!("{} ends of exchanges: {unnamed} without a name, {counted} counted", 4 * JOBS);
    assert!(unnamed as u64 <= counted, "{unnamed} ends have no name, {counted} are counted");
    assert!(unnamed <= JOBS / 2, "{unnamed} of {} ends have no name", 4 * JOBS);
    assert_eq!(agent.lost(), 0);
    drop(agent);
    fs::remove_dir_all(folder).expect("removable");
}

#[test]
fn five_thousand_pods_in_thirty_megabytes() {
    const PODS: usize = 5_000;
    let server = ApiServer::start();
    for i in 0..PODS {
        let (node, address) = (if i < 110 { NODE } else { "node-2" }, format!("10.1.{}.{}", i / 250, i % 250));
        let id = container_id(i);
        server.put(
            "pods",
            pod(
                &format!("ns-{}", i % 20),
                &format!("app-{}-{i}", i % 50),
                &format!("app-{}", i % 50),
                node,
                Some(&address),
                Some(&id),
            ),
        );
    }
    for i in 0..50 {
        let address = format!("10.96.0.{i}");
        server.put(
            "services",
            json!({"metadata": {"name": format!("app-{i}"), "namespace": "ns-1"}, "spec": {"clusterIP": address}}),
        );
    }
    let folder = std::env::temp_dir().join(format!("apiscope-many-pods-{}", std::process::id()));
    fs::create_dir_all(&folder).expect("a folder");
    let file = folder.join("config.toml");
    let resident = |enabled: bool| {
        let text = format!("[kubernetes]\nenabled = {enabled}\nnode = \"{NODE}\"\nserver = \"{}\"\n", server.url());
        fs::write(&file, text).expect("written");
        let agent = Agent::start(if enabled { "many-pods" } else { "no-pods" }, &["--config", &file.to_string_lossy()]);
        let wanted = if enabled { PODS as u64 } else { 0 };
        wait("every pod", || agent.snapshot().is_some_and(|s| s.totals.pods == wanted));
        std::thread::sleep(Duration::from_secs(1));
        let status = fs::read_to_string(format!("/proc/{}/status", agent.child.id())).expect("it runs");
        let of = |key: &str| -> u64 {
            let line = status.lines().find_map(|l| l.strip_prefix(key)).unwrap_or_default();
            line.trim().trim_end_matches(" kB").trim().parse().unwrap_or(0)
        };
        (of("VmRSS:"), of("VmHWM:"))
    };
    let (without, with) = (resident(false), resident(true));
    let (now, most) = (with.0.saturating_sub(without.0), with.1.saturating_sub(without.1));
    println!(
        "{PODS} pods: {now} KiB resident for identity above {} KiB; at its most {most} KiB above {} KiB",
        without.0, without.1
    );
    assert!(now.max(most) < 30 << 10, "identity takes {now} KiB, {most} KiB at its most");
    fs::remove_dir_all(folder).expect("removable");
}
