//! The test, stage by stage: what a cluster's first days are like for the agent.

use std::{
    collections::BTreeSet,
    fs,
    path::PathBuf,
    process::Command,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use super::{
    go_on,
    kubectl::{Kubectl, wait},
    node::Node,
    objects::{self, AGENT, CALLERS, COLLECTOR, KINDS, SERVERS, SHOP, STEADY},
    spans::{self, Span, Verdict},
    table::Table,
};
use crate::{place, step};

/// Longest time until pods run, jobs are done, a rollout is over.
const LIMIT: Duration = Duration::from_secs(180);
/// Longest time from an exchange to its span at the collector: the exporter's own interval is 5 s.
const EXPORTED: Duration = Duration::from_secs(30);
/// Calls of each kind.
const CALLS: usize = 20;
/// Pods of a second that are started together.
const BATCH: usize = 10;
/// From the start of an agent to the first exchange that it sees, at most, s.
const FIRST: f64 = 5.0;
/// Calls that one end may have counted before the other: the steady caller's.
const UNDER_WAY: u64 = 2;
/// How long the API server stays away.
const AWAY: Duration = Duration::from_secs(15);
/// What the chart makes.
const MADE: &str =
    "daemonset,pod,configmap,secret,serviceaccount,networkpolicy,clusterrole,clusterrolebinding,controllerrevision";

/// The test.
#[derive(Debug)]
pub struct Stages<'a> {
    kubectl: &'a Kubectl,
    /// The node, where it is this machine's.
    node: Option<&'a Node>,
    churn: usize,
    table: Table,
    server: String,
}

impl<'a> Stages<'a> {
    /// Against this cluster, with as many pods of a second.
    pub fn new(kubectl: &'a Kubectl, node: Option<&'a Node>, churn: usize) -> Self {
        Self { kubectl, node, churn, table: Table::default(), server: String::new() }
    }

    /// Runs all of it.
    ///
    /// # Errors
    /// A stage could not be run; a result that is not good is no error, but in the table.
    pub fn run(&mut self) -> Result<()> {
        self.clean()?;
        self.pods()?;
        self.install()?;
        self.first_exchange("start to first exchange")?;
        self.kinds("calls")?;
        self.brief()?;
        self.restart()?;
        self.api_away()?;
        self.upgrade()?;
        self.uninstall()
    }

    /// Removes what the test made, unless it is to be looked at; the results.
    pub fn finish(self, keep: bool) -> Table {
        if !keep
            && self.node.is_none()
            && let Err(error) = self.clean()
        {
            eprintln!("error: {error:#}");
        }
        self.table
    }

    fn clean(&self) -> Result<()> {
        if self.kubectl.run(&["get", "namespace", AGENT]).is_ok() {
            self.kubectl.helm(&["uninstall", "apiscope", "--namespace", AGENT, "--ignore-not-found", "--wait"])?;
        }
        self.kubectl.run(&["delete", "namespace", SERVERS, CALLERS, AGENT, "--ignore-not-found", "--wait"])?;
        Ok(())
    }

    /// Servers, a collector, and a caller that does not end: the agent comes to pods that are there already.
    fn pods(&mut self) -> Result<()> {
        println!("cluster: starting servers, a caller and a collector");
        self.kubectl.apply(&objects::namespaces())?;
        for namespace in [SERVERS, CALLERS, AGENT] {
            wait("service accounts", LIMIT, || {
                Ok(self
                    .kubectl
                    .run(&["get", "serviceaccount", "default", "--namespace", namespace])
                    .is_ok()
                    .then_some(()))
            })?;
        }
        self.kubectl.apply(&objects::collector())?;
        self.kubectl.apply(&[objects::servers()])?;
        self.rollout("deployment", SHOP, SERVERS)?;
        let ready = ["wait", "--for=condition=Ready", "pod", COLLECTOR, "--namespace", AGENT, &timeout()];
        self.kubectl.run(&ready)?;
        let pods = self.kubectl.json(&["get", "pods", "--namespace", SERVERS])?;
        self.server = pods["items"][0]["status"]["podIP"].as_str().context("the server has no address")?.to_owned();
        self.kubectl.apply(&[objects::steady(&self.server)])?;
        self.rollout("deployment", STEADY, CALLERS)
    }

    fn install(&mut self) -> Result<()> {
        let collector = self.kubectl.json(&["get", "pod", COLLECTOR, "--namespace", AGENT])?;
        let address = collector["status"]["podIP"].as_str().context("the collector has no address")?;
        let chart = chart()?;
        let endpoint = format!("otlp.endpoint=http://{address}:4318");
        let started = Instant::now();
        self.kubectl.helm(&["install", "apiscope", &chart, "--namespace", AGENT, "--set", &endpoint])?;
        if let Err(error) = self.rollout("daemonset", "apiscope", AGENT) {
            let about = self.kubectl.run(&["describe", "pods", "--namespace", AGENT, "--selector", SELECTOR])?;
            let log = self.kubectl.run(&["logs", "daemonset/apiscope", "--namespace", AGENT, "--tail=30"]);
            bail!("{error:#}\n{about}\n{}", log.unwrap_or_default());
        }
        let seconds = started.elapsed().as_secs_f64();
        self.table.add(
            "`helm install`, default values, to DaemonSet Ready",
            "< 60 s",
            format!("{seconds:.1} s"),
            json!(seconds),
            seconds < 60.0,
        );
        Ok(())
    }

    /// From the start of the newest agent's container to its first exchange. The cluster tells the start in whole seconds,
    /// rounded down: the figure is at most a second too large.
    fn first_exchange(&mut self, what: &str) -> Result<()> {
        let agent = self.agent()?;
        let text = agent["status"]["containerStatuses"][0]["state"]["running"]["startedAt"].as_str();
        let started = seconds(text.context("the agent does not run")?)?;
        let first = wait("the first exchange", EXPORTED, || {
            Ok(self.spans()?.iter().map(Span::start).filter(|s| *s >= started).min_by(f64::total_cmp))
        })?;
        let took = first - started;
        self.table.add(what, &format!("< {FIRST} s"), format!("{took:.1} s"), json!(took), took < FIRST);
        Ok(())
    }

    /// Every kind of call, from a job.
    fn kinds(&mut self, name: &str) -> Result<()> {
        self.kubectl.apply(&[objects::job(name, &self.server, CALLS)])?;
        let done = ["wait", "--for=condition=Complete", "job", name, "--namespace", CALLERS, &timeout()];
        self.kubectl.run(&done)?;
        let belongs = |s: &Span| s.caller.starts_with(&format!("{name}-"));
        let spans = self.wait_for(2 * CALLS * KINDS.len(), belongs)?;
        for ((kind, side), seen) in spans::seen(&spans) {
            let what = format!("`{kind}` calls of job `{name}`, seen by the {side}");
            self.table.add(&what, &CALLS.to_string(), seen.to_string(), json!(seen), seen == CALLS);
        }
        self.once(&format!("calls of job `{name}` that were told more than once"), &spans);
        self.judge(&format!("attribution of job `{name}`"), &spans, |_| ("job", name.to_owned()))
    }

    /// Pods of a second, more of them than there are addresses.
    fn brief(&mut self) -> Result<()> {
        let mut addresses = Vec::new();
        let names: Vec<String> = (0..self.churn).map(|n| format!("brief-{n}")).collect();
        let mut succeeded = BTreeSet::new();
        for (batch, names) in names.chunks(BATCH).enumerate() {
            go_on()?;
            let kind = KINDS[batch % KINDS.len()];
            let pods: Vec<Value> = names.iter().map(|n| objects::brief(n, kind, &self.server)).collect();
            self.kubectl.apply(&pods)?;
            let ended = wait("pods of a second", LIMIT, || {
                let all = self.kubectl.json(&["get", "pods", "--namespace", CALLERS, "--selector", "app=brief"])?;
                let all = all["items"].as_array().cloned().unwrap_or_default();
                let over = |p: &Value| matches!(p["status"]["phase"].as_str(), Some("Succeeded" | "Failed"));
                Ok((all.len() == names.len() && all.iter().all(over)).then_some(all))
            })?;
            for pod in &ended {
                addresses.extend(pod["status"]["podIP"].as_str().map(str::to_owned));
                if pod["status"]["phase"] == "Succeeded" {
                    succeeded.insert(pod["metadata"]["name"].as_str().unwrap_or_default().to_owned());
                }
            }
            let delete = ["delete", "pods", "--namespace", CALLERS, "--selector", "app=brief", "--now"];
            self.kubectl.run(&delete)?;
        }
        let distinct = addresses.iter().collect::<BTreeSet<_>>().len();
        let what = "pods of a second that were run, on fewer addresses";
        let measured = format!("{} on {distinct}", succeeded.len());
        let value = json!({"pods": succeeded.len(), "addresses": distinct});
        self.table.add(what, &self.churn.to_string(), measured, value, succeeded.len() == self.churn);
        let spans = self.wait_for(2 * 2 * succeeded.len(), |s| succeeded.contains(&s.caller))?;
        // Not their spans: those are sampled, and the control plane's own take up the limit while pods come and go.
        let wanted = 2 * succeeded.len() as u64;
        let end = Instant::now() + EXPORTED;
        let (mut seen, mut client, mut server);
        loop {
            let all = self.top()?;
            seen = requests(&all, "client", |s| s.starts_with("brief-"));
            client = requests(&all, "client", |_| true);
            server = requests(&all, "server", |s| s == SHOP);
            if (seen >= wanted && client.abs_diff(server) <= UNDER_WAY) || Instant::now() > end {
                break;
            }
            std::thread::sleep(Duration::from_millis(500));
        }
        self.table.add(
            "their calls, as the agent counts them by pod",
            &wanted.to_string(),
            seen.to_string(),
            json!(seen),
            seen == wanted,
        );
        self.table.add(
            "calls of all pods so far, counted by callers and by servers",
            &format!("the same, {UNDER_WAY} under way"),
            format!("{client} and {server}"),
            json!({"client": client, "server": server}),
            client.abs_diff(server) <= UNDER_WAY,
        );
        self.once("their calls that were told more than once", &spans);
        self.judge("attribution of pods of a second", &spans, |s| ("pod", s.caller.clone()))
    }

    /// The agent's pod is deleted; its successor finds everything as it is.
    fn restart(&mut self) -> Result<()> {
        let name = self.agent()?["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        self.kubectl.run(&["delete", "pod", &name, "--namespace", AGENT])?;
        self.rollout("daemonset", "apiscope", AGENT)?;
        self.first_exchange("restart to first exchange")?;
        self.steady("attribution after a restart of the agent", now())
    }

    /// Without the API server what is known stays; afterwards new pods are known again.
    fn api_away(&mut self) -> Result<()> {
        let Some(node) = self.node else {
            println!("cluster: NOT TESTED: the API server's absence, since the node is not this machine's own");
            return Ok(());
        };
        node.kill("apiserver")?;
        let since = now();
        std::thread::sleep(AWAY);
        node.apiserver()?;
        self.steady("attribution while the API server is away", since)?;
        self.kinds("after")
    }

    fn upgrade(&mut self) -> Result<()> {
        let arguments = ["upgrade", "apiscope", &chart()?, "--namespace", AGENT, "--reuse-values", "--set"];
        self.kubectl.helm(&[&arguments[..], &["limits.endpoints=3000"]].concat())?;
        self.rollout("daemonset", "apiscope", AGENT)?;
        self.steady("attribution after `helm upgrade`", now())
    }

    fn uninstall(&mut self) -> Result<()> {
        let before = self.programs()?;
        self.kubectl.helm(&["uninstall", "apiscope", "--namespace", AGENT, "--wait"])?;
        let labels = "app.kubernetes.io/instance=apiscope";
        let left = wait("the end of the agent's pods", LIMIT, || {
            let left = self.kubectl.run(&["get", MADE, "--all-namespaces", "--selector", labels, "--output=name"])?;
            let left: Vec<String> = left.lines().map(str::to_owned).collect();
            Ok((!left.iter().any(|l| l.starts_with("pod/"))).then_some(left))
        })?;
        let measured = if left.is_empty() { "none".to_owned() } else { left.join(", ") };
        self.table.add("objects after `helm uninstall`", "none", measured, json!(left), left.is_empty());
        if let Some(before) = before {
            let after = all_programs()?;
            let left: Vec<&u64> = before.intersection(&after).collect();
            let measured = format!("{} of {}", left.len(), before.len());
            self.table.add(
                "its eBPF programs after `helm uninstall`",
                "none",
                measured,
                json!(left.len()),
                left.is_empty(),
            );
        }
        Ok(())
    }

    /// What the steady caller's spans say from then on.
    fn steady(&mut self, what: &str, since: f64) -> Result<()> {
        let spans = self.wait_for(20, |s| s.caller.starts_with(STEADY) && s.start() >= since)?;
        self.judge(what, &spans, |_| ("deployment", STEADY.to_owned()))
    }

    fn once(&mut self, what: &str, spans: &[Span]) {
        let again = spans.len() - spans::distinct(spans);
        let measured = if again == 0 { "none".to_owned() } else { again.to_string() };
        self.table.add(what, "none", measured, json!(again), again == 0);
    }

    fn judge(&mut self, what: &str, spans: &[Span], workload: impl Fn(&Span) -> (&'static str, String)) -> Result<()> {
        let mut verdict = Verdict::default();
        for span in spans {
            let (key, name) = workload(span);
            verdict.add(&span.judge((key, &name)));
        }
        let right = verdict.ends - verdict.unnamed;
        let unnamed = if verdict.unnamed > 0 { self.unnamed()? } else { 0 };
        let mut measured = format!("{right} of {} ends", verdict.ends);
        if verdict.unnamed > 0 {
            measured += &format!(", {} unnamed ({unnamed} counted)", verdict.unnamed);
        }
        for (wrong, n) in &verdict.wrong {
            measured += &format!("; {n} times {wrong}");
        }
        let is_good = verdict.ends > 0 && verdict.wrong.is_empty() && verdict.unnamed as u64 <= unnamed;
        let value = json!({"ends": verdict.ends, "unnamed": verdict.unnamed, "wrong": verdict.wrong});
        self.table.add(what, "100 %, or counted", measured, value, is_good);
        Ok(())
    }

    /// Ends of exchanges without a pod, as the agent counts them.
    fn unnamed(&self) -> Result<u64> {
        let all = self.top()?;
        let reasons = all["unnamed"].as_object().context("top says nothing of unnamed ends")?;
        Ok(reasons.values().filter_map(Value::as_u64).sum())
    }

    fn top(&self) -> Result<Value> {
        let top =
            ["exec", "daemonset/apiscope", "--namespace", AGENT, "--", "/usr/bin/apiscope", "top", "--once", "--json"];
        serde_json::from_str(&self.kubectl.run(&top)?).context("top says no JSON")
    }

    /// Spans of the test that the collector has so far.
    fn spans(&self) -> Result<Vec<Span>> {
        go_on()?;
        let text = self.kubectl.run(&["logs", COLLECTOR, "--container=sink", "--namespace", AGENT])?;
        Ok(text.lines().filter_map(Span::parse).collect())
    }

    /// Spans of that kind: as many as are wanted, or those that are there after [`EXPORTED`].
    fn wait_for(&self, wanted: usize, of: impl Fn(&Span) -> bool) -> Result<Vec<Span>> {
        let end = Instant::now() + EXPORTED;
        loop {
            let spans: Vec<Span> = self.spans()?.into_iter().filter(|s| of(s)).collect();
            if spans::distinct(&spans) >= wanted || Instant::now() > end {
                return Ok(spans);
            }
            std::thread::sleep(Duration::from_millis(500));
        }
    }

    /// The running agent's pod.
    fn agent(&self) -> Result<Value> {
        let all = self.kubectl.json(&["get", "pods", "--namespace", AGENT, "--selector", SELECTOR])?;
        let all = all["items"].as_array().context("no pods")?;
        let alive = all.iter().find(|p| p["metadata"]["deletionTimestamp"].is_null());
        alive.cloned().context("no agent runs")
    }

    fn rollout(&self, kind: &str, name: &str, namespace: &str) -> Result<()> {
        go_on()?;
        self.kubectl.run(&["rollout", "status", kind, name, "--namespace", namespace, &timeout()]).map(drop)
    }

    /// The agent's own eBPF programs, where bpftool is here and the node this machine's.
    fn programs(&self) -> Result<Option<BTreeSet<u64>>> {
        if self.node.is_none() {
            return Ok(None);
        }
        let uid = self.agent()?["metadata"]["uid"].as_str().context("a pod without uid")?.to_owned();
        let programs = programs_of(&uid);
        if programs.is_empty() || !programs.is_subset(&all_programs()?) {
            bail!("the agent's eBPF programs are not found");
        }
        Ok(Some(programs))
    }
}

/// The agent's pods.
const SELECTOR: &str = "app.kubernetes.io/name=apiscope";

/// [`LIMIT`] for kubectl.
fn timeout() -> String {
    format!("--timeout={}s", LIMIT.as_secs())
}

fn chart() -> Result<String> {
    let path: PathBuf = place::root().join("helm");
    path.to_str().map(str::to_owned).context("the clone's path is no UTF-8")
}

/// Ids of all eBPF programs.
fn all_programs() -> Result<BTreeSet<u64>> {
    let program = place::program("bpftool").context("bpftool is not installed")?;
    let text = step::output(Command::new(program).args(["--json", "prog", "show"]))?;
    let all: Value = serde_json::from_str(&text).context("bpftool says no JSON")?;
    Ok(all.as_array().context("bpftool lists nothing")?.iter().filter_map(|p| p["id"].as_u64()).collect())
}

/// Ids of the eBPF programs that processes of a pod hold, by their descriptors or those of links.
fn programs_of(uid: &str) -> BTreeSet<u64> {
    let mut ids = BTreeSet::new();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten().map(|e| e.path()) {
        if !fs::read_to_string(process.join("cgroup")).unwrap_or_default().contains(uid) {
            continue;
        }
        for descriptor in fs::read_dir(process.join("fdinfo")).into_iter().flatten().flatten() {
            let text = fs::read_to_string(descriptor.path()).unwrap_or_default();
            ids.extend(text.lines().filter_map(|l| l.strip_prefix("prog_id:")?.trim().parse::<u64>().ok()));
        }
    }
    ids
}

/// Requests of the test's calls on one side, of services whose name is right, as `top` says.
fn requests(top: &Value, side: &str, service: impl Fn(&str) -> bool) -> u64 {
    let endpoints = top["endpoints"].as_array().into_iter().flatten();
    let ours = endpoints.filter(|e| e["side"] == side && e["route"] == "/orders");
    ours.filter(|e| e["service"].as_str().is_some_and(&service)).filter_map(|e| e["requests"].as_u64()).sum()
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

/// Seconds since the epoch of a time as the API writes it (`2026-01-02T03:04:05Z`).
fn seconds(text: &str) -> Result<f64> {
    let out = step::output(Command::new("date").args(["--utc", "--date", text, "+%s"]))?;
    out.trim().parse().with_context(|| format!("`{text}` is no time"))
}
