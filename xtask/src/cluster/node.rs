//! The node: every program of Kubernetes in namespaces and cgroups of its own, and their end.
//!
//! - Network: a namespace with a bridge that holds the node's address, and one wire to the machine. Nothing leads
//!   from there to anywhere else.
//! - Mounts: a namespace of its own too, so that what kubelet and containerd mount goes with the last of them,
//!   however they end. It is etcd's, the first that is started; the others join it. `/run/containerd`,
//!   `/run/netns`, `/var/lib/cni` and `/var/log/containers`, which they insist on, are file systems in memory there.
//! - Processes: no namespace, since the agent must be at the root of them, as on a real node. All are
//!   in one cgroup instead, and its children: whatever is in there at the end is killed, those that a
//!   crashed run left behind too. Names are fixed: one node a machine, and `down` needs no memory.

use std::{
    fs::{self, File},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use super::{binaries, config, images};
use crate::{place, step};

/// Name of the network namespace and of the cgroups.
const NAME: &str = "apiscope-cluster";
/// The machine's end of the wire, and the node's.
const WIRE: [&str; 2] = ["apiscope-node", "machine"];
/// Longest time until the API server is ready, and until a program's end.
const READY: Duration = Duration::from_secs(120);
const END: Duration = Duration::from_secs(30);
/// Lines of a program's log that an error shows.
const TAIL: usize = 8;

/// Where everything of the running node is.
#[must_use]
pub fn state() -> PathBuf {
    place::target().join("cluster")
}

/// The administrator's configuration for kubectl and helm.
#[must_use]
pub fn kubeconfig() -> PathBuf {
    state().join("admin.kubeconfig")
}

/// Whether its API server answers.
#[must_use]
pub fn is_up() -> bool {
    kubeconfig().is_file() && answers()
}

/// Brings it up; what is left of an earlier one goes first.
///
/// # Errors
/// A program does not start: the message has the end of its log.
pub fn up() -> Result<()> {
    down()?;
    let state = state();
    for folder in ["log", "cni", "certificates", "addresses", "pods", "kubelet"] {
        fs::create_dir_all(state.join(folder)).with_context(|| format!("failed to make {}", state.display()))?;
    }
    network()?;
    let cgroups = cgroups();
    for cgroup in &cgroups {
        // A hierarchy that takes none is one that the node does not need, or kubelet says which.
        fs::create_dir_all(cgroup.join("daemons")).ok();
    }
    credentials(&state)?;
    let path = |name: &str| state.join(name);
    fs::write(path("containerd.toml"), config::containerd(&state, images::PROGRAMS))?;
    fs::write(path("cni/10-pods.conflist"), config::network(&state))?;
    fs::write(path("kubelet.yaml"), config::kubelet(&state, NAME))?;
    let node = Node { state: state.clone() };
    node.first()?;
    node.start("containerd", Path::new("containerd"), &[format!("--config={}", path("containerd.toml").display())])?;
    node.apiserver()?;
    let built = binaries::folder()?;
    node.start("controllers", &built.join("kube-controller-manager"), &config::controllers(&state))?;
    let scheduler =
        [format!("--kubeconfig={}", path("scheduler.kubeconfig").display()), "--leader-elect=false".to_owned()];
    node.start("scheduler", &built.join("kube-scheduler"), &scheduler)?;
    let kubelet = [
        format!("--config={}", path("kubelet.yaml").display()),
        format!("--kubeconfig={}", path("node.kubeconfig").display()),
        format!("--hostname-override={}", config::NAME),
        format!("--node-ip={}", config::NODE),
        format!("--root-dir={}", path("kubelet").display()),
        format!("--cert-dir={}", path("kubelet/pki").display()),
    ];
    node.start("kubelet", &built.join("kubelet"), &kubelet)
}

/// Ends everything and removes what was made, but the images' cache and the empty folders below the mounts of
/// [`Node::first`]. Does nothing where nothing is.
///
/// # Errors
/// A process does not end, or something cannot be removed.
pub fn down() -> Result<()> {
    let cgroups = cgroups();
    let asked = Instant::now();
    loop {
        let left: Vec<i32> = cgroups.iter().flat_map(|c| processes(c)).collect();
        if left.is_empty() {
            break;
        }
        if asked.elapsed() > END {
            bail!("processes of the node do not end: {left:?}");
        }
        for process in left {
            // Gone already is as good; a process in the cgroup is the node's, whatever its id was before.
            if let Some(process) = rustix::process::Pid::from_raw(process) {
                rustix::process::kill_process(process, rustix::process::Signal::KILL).ok();
            }
        }
        thread::sleep(Duration::from_millis(50));
    }
    if Path::new("/run/netns").join(NAME).exists() {
        step::output(Command::new("ip").args(["netns", "delete", NAME]))?;
    }
    if Path::new("/sys/class/net").join(WIRE[0]).exists() {
        step::output(Command::new("ip").args(["link", "delete", WIRE[0]]))?;
    }
    for cgroup in cgroups.iter().filter(|c| c.exists()) {
        remove(cgroup).with_context(|| format!("failed to remove {}", cgroup.display()))?;
    }
    match fs::remove_dir_all(state()) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("failed to remove {}", state().display()))
        }
        _ => Ok(()),
    }
}

/// A node that is up.
#[derive(Debug)]
pub struct Node {
    state: PathBuf,
}

impl Node {
    /// The one of this machine.
    #[must_use]
    pub fn here() -> Self {
        Self { state: state() }
    }

    /// etcd, which holds the namespaces.
    fn first(&self) -> Result<()> {
        let script =
            "mount --make-rshared / && for d in /run/containerd /run/netns /var/lib/cni /var/log/containers; do
            mkdir -p $d && mount -t tmpfs none $d || exit 1; done; exec \"$@\"";
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{NAME}"));
        command.args(["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", "etcd"]);
        self.launch("etcd", &mut command, &config::etcd(&self.state))
    }

    /// Starts the API server and waits until it is ready.
    ///
    /// # Errors
    /// It is not.
    pub fn apiserver(&self) -> Result<()> {
        self.start("apiserver", &binaries::folder()?.join("kube-apiserver"), &config::apiserver(&self.state))?;
        let end = Instant::now() + READY;
        while !answers() || super::kubectl::Kubectl::of_node()?.run(&["get", "--raw=/readyz"]).is_err() {
            if Instant::now() > end || !self.is_alive("apiserver") {
                bail!("the API server is not ready:\n{}", self.tail("apiserver"));
            }
            thread::sleep(Duration::from_millis(200));
        }
        Ok(())
    }

    /// Ends one program at once.
    ///
    /// # Errors
    /// It does not end.
    pub fn kill(&self, name: &str) -> Result<()> {
        let process = self.process(name).with_context(|| format!("no process of {name} is known"))?;
        let process = rustix::process::Pid::from_raw(process).context("no process id")?;
        rustix::process::kill_process(process, rustix::process::Signal::KILL).ok();
        let end = Instant::now() + END;
        while self.is_alive(name) {
            if Instant::now() > end {
                bail!("{name} does not end");
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// A program in the node's network and mounts.
    ///
    /// # Errors
    /// etcd, whose they are, is gone.
    pub fn inside(&self, program: &Path) -> Result<Command> {
        let etcd = self.process("etcd").filter(|_| self.is_alive("etcd")).context("the node is not up")?;
        let mut command = Command::new("nsenter");
        command.args(["--target", &etcd.to_string(), "--net", "--mount", "--"]).arg(program);
        Ok(command)
    }

    /// Gives containerd an image.
    ///
    /// # Errors
    /// It does not take it.
    pub fn import(&self, archive: &Path) -> Result<()> {
        let mut import = self.inside(Path::new("ctr"))?;
        import.args(["--address", &format!("{}/containerd.sock", config::RUN), "--namespace", "k8s.io"]);
        import.args(["images", "import"]).arg(archive);
        step::output(&mut import).map(drop)
    }

    fn start(&self, name: &str, program: &Path, arguments: &[String]) -> Result<()> {
        self.launch(name, &mut self.inside(program)?, arguments)
    }

    /// A session of its own: a terminal's Ctrl-C is for this program, which then ends the node in order.
    fn launch(&self, name: &str, command: &mut Command, arguments: &[String]) -> Result<()> {
        let log = File::create(self.log(name)).with_context(|| format!("failed to write the log of {name}"))?;
        let join: Vec<String> = daemons().iter().map(|c| format!("echo $$ >'{}/cgroup.procs'", c.display())).collect();
        let mut shell = Command::new("setsid");
        shell.args(["sh", "-c", &format!("{} && exec \"$@\"", join.join(" && ")), "sh"]);
        shell.arg(command.get_program()).args(command.get_args()).args(arguments);
        shell.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin").current_dir(&self.state);
        let child = shell.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn();
        // setsid, sh, nsenter and unshare each become the next: the id stays.
        let child = child.with_context(|| format!("failed to start {name}"))?;
        fs::write(self.state.join(format!("{name}.pid")), child.id().to_string())?;
        thread::sleep(Duration::from_millis(300));
        if !self.is_alive(name) {
            bail!("{name} ended at once:\n{}", self.tail(name));
        }
        Ok(())
    }

    fn process(&self, name: &str) -> Option<i32> {
        fs::read_to_string(self.state.join(format!("{name}.pid"))).ok()?.trim().parse().ok()
    }

    /// Neither gone nor a zombie, which its parent, this program, does not wait for.
    fn is_alive(&self, name: &str) -> bool {
        let Some(process) = self.process(name) else { return false };
        let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
        stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
    }

    fn log(&self, name: &str) -> PathBuf {
        self.state.join(format!("log/{name}.log"))
    }

    fn tail(&self, name: &str) -> String {
        let text = fs::read_to_string(self.log(name)).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(TAIL)..].join("\n")
    }
}

fn answers() -> bool {
    let Ok(address) = format!("{}:443", config::NODE).parse() else { return false };
    TcpStream::connect_timeout(&address, Duration::from_millis(500)).is_ok()
}

fn network() -> Result<()> {
    let ip = |arguments: &str| step::output(Command::new("ip").args(arguments.split_whitespace())).map(drop);
    ip(&format!("netns add {NAME}"))?;
    let inside = |arguments: &str| ip(&format!("-n {NAME} {arguments}"));
    inside("link set lo up")?;
    inside("link add node type bridge")?;
    inside(&format!("address add {}/24 dev node", config::NODE))?;
    inside(&format!("address add {}/32 dev node", config::SERVICE))?;
    inside("link set node up")?;
    ip(&format!("link add {} type veth peer name {} netns {NAME}", WIRE[0], WIRE[1]))?;
    inside(&format!("link set {} master node up", WIRE[1]))?;
    ip(&format!("address add {}/24 dev {}", config::MACHINE, WIRE[0]))?;
    ip(&format!("link set {} up", WIRE[0]))?;
    let mut forward = Command::new("nsenter");
    forward.arg(format!("--net=/run/netns/{NAME}")).args(["sysctl", "-qw", "net.ipv4.ip_forward=1"]);
    step::output(&mut forward).map(drop)
}

fn credentials(state: &Path) -> Result<()> {
    let (key, public) = (state.join("certificates/accounts.key"), state.join("certificates/accounts.pub"));
    step::output(Command::new("openssl").args(["genrsa", "-out"]).arg(&key).arg("2048"))?;
    step::output(Command::new("openssl").args(["rsa", "-pubout", "-in"]).arg(&key).arg("-out").arg(&public))?;
    fs::write(state.join("tokens.csv"), config::TOKENS)?;
    for who in ["admin", "controller", "scheduler", "node"] {
        let text = config::kubeconfig(state, &format!("{who}-token"));
        fs::write(state.join(format!("{who}.kubeconfig")), text)?;
    }
    Ok(())
}

/// The node's cgroup in each hierarchy of this machine: one for version 2, one a controller for version 1.
fn cgroups() -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let kind = |l: &str| matches!(l.split(' ').nth(2), Some("cgroup" | "cgroup2"));
    mounts.lines().filter(|l| kind(l)).filter_map(|l| l.split(' ').nth(1)).map(|m| Path::new(m).join(NAME)).collect()
}

/// Where the node's own programs go: the hierarchies that take processes without any setting (`cpuset`
/// does not) and in which each has its place: version 2, or `pids`.
fn daemons() -> Vec<PathBuf> {
    let all = cgroups().into_iter().map(|c| c.join("daemons")).filter(|d| d.is_dir());
    all.filter(|d| !d.join("cpuset.cpus").exists() || d.join("cgroup.controllers").exists()).collect()
}

/// Ids of the processes in a cgroup and below.
fn processes(cgroup: &Path) -> Vec<i32> {
    let text = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    let mut all: Vec<i32> = text.lines().filter_map(|l| l.parse().ok()).filter(|p| *p > 0).collect();
    for below in children(cgroup) {
        all.extend(processes(&below));
    }
    all
}

fn children(cgroup: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(cgroup).into_iter().flatten().flatten();
    entries.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()).collect()
}

fn remove(cgroup: &Path) -> std::io::Result<()> {
    for below in children(cgroup) {
        remove(&below)?;
    }
    // A process that was just killed is still leaving.
    let end = Instant::now() + END;
    loop {
        match fs::remove_dir(cgroup) {
            Err(e) if e.raw_os_error() == Some(rustix::io::Errno::BUSY.raw_os_error()) && Instant::now() < end => {
                thread::sleep(Duration::from_millis(50));
            }
            done => return done,
        }
    }
}
