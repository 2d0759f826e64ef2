//! One configuration, parsed once: a TOML file, then `APISCOPE_*` variables, then flags (the command
//! line applies the last two). Unknown keys are refused, with the nearest known one named.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};

use crate::exchange::{PathForm, Peer, Side};

/// Read when no file is named, if it exists.
pub const DEFAULT_FILE: &str = "/etc/apiscope/config.toml";

/// Everything that can be set.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// What is traced.
    pub capture: Capture,
    /// Names of services, before what processes say themselves; first match first.
    pub service: Vec<ServiceRule>,
    /// Routes.
    pub routes: RouteConfig,
    /// Who asks.
    pub identity: IdentityConfig,
    /// The list of every API.
    pub inventory: InventoryConfig,
    /// Detectors.
    pub detect: Detect,
    /// Bounds.
    pub limits: Limits,
    /// The agent's own socket and output.
    pub agent: Agent,
    /// Names of pods.
    pub kubernetes: Kubernetes,
}

/// What is traced.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Capture {
    /// Ends to trace.
    pub sides: Sides,
    /// How sends and receives are seen.
    pub door: DoorSetting,
    /// How paths are written in recordings.
    pub path: PathSetting,
    /// With any include rule, only what matches one is traced.
    pub include: Vec<Rule>,
    /// What matches one of these is not traced; they come before the include rules.
    pub exclude: Vec<Rule>,
}

/// Ends of connections.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sides {
    /// Requests that are received and requests that are sent.
    #[default]
    Both,
    /// Requests that are received.
    Server,
    /// Requests that are sent.
    Client,
}

/// How sends and receives are seen; see `apiscope doctor`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DoorSetting {
    /// The best that this kernel offers.
    #[default]
    Auto,
    /// Tracepoints behind every send and receive (Linux 6.3).
    TpBtf,
    /// Trampolines at the return of the protocols' functions.
    Fexit,
    /// Breakpoints at their entry and return.
    Kprobe,
}

/// See [`PathForm`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "the same as in PathForm")]
pub enum PathSetting {
    #[default]
    Template,
    Hmac,
    Raw,
}

/// A rule matches when all that it names match.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Rule {
    /// Executable: a path in which `*` stands for any characters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exe: Option<String>,
    /// Name of the process, as `ps` shows it; `*` as above.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Process.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// Port of either end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// Address of the other end, or a network: `10.0.0.0/8`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<Network>,
    /// `server` or `client`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub side: Option<Sides>,
}

/// Gives a service its name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServiceRule {
    /// The name.
    pub name: String,
    /// Executable, as in [`Rule`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exe: Option<String>,
    /// Name of the process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process: Option<String>,
    /// Port that the service listens on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
}

/// Routes.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RouteConfig {
    /// Templates that come before what is found: `/files/{name}`.
    pub patterns: Vec<String>,
    /// Where learned routes are kept over a restart; without one they are learned anew.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state_file: Option<PathBuf>,
    /// OpenAPI documents: their paths come before patterns and what is found.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub document: Vec<DocumentRule>,
}

/// The document of a service.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DocumentRule {
    /// Name of the service, as `top` shows it.
    pub service: String,
    /// OpenAPI 3.0 or 3.1, Swagger 2.0, in JSON or YAML.
    pub file: PathBuf,
}

/// Who asks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct IdentityConfig {
    /// File with the key of principals, made at the first start. Nodes that share the key share their
    /// principals. `APISCOPE_PRINCIPAL_KEY` comes before it.
    pub key_file: PathBuf,
    /// More header fields that carry API keys.
    pub api_key_headers: Vec<String>,
    /// More query parameters that carry API keys.
    pub api_key_query: Vec<String>,
}

/// The list of every API.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct InventoryConfig {
    /// Where it is kept over a restart: `/var/lib/apiscope/inventory.json`, say; without one it begins anew.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
}

/// Detectors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Detect {
    /// Judge exchanges at all.
    pub enabled: bool,
    /// Where baselines are kept over a restart; without one they begin anew.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state_file: Option<PathBuf>,
    /// A finding that was not seen for this long is resolved, hours.
    pub quiet_hours: u64,
    /// Detectors that are off: `D16` or its name.
    pub disable: Vec<String>,
    /// Ids of findings that were looked at: they alert no more, and their baseline learns again.
    pub acknowledge: Vec<String>,
    /// Settings of detectors by name: `"D4.hour" = 200`.
    pub thresholds: std::collections::BTreeMap<String, f64>,
    /// What is no finding.
    pub allow: Vec<Allow>,
}

/// What is allowed: all that is named must match; `*` stands for any characters.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[expect(missing_docs, reason = "the names of what they match")]
pub struct Allow {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub method: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub route: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub principal: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub caller: Option<String>,
    /// Why; for people.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Bounds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Endpoints that are told apart; the rest is one overflow endpoint.
    pub endpoints: usize,
    /// Bytes of the ring between kernel and agent: a power of two, 64 KiB to 256 MiB.
    pub ring_bytes: u32,
}

/// The agent itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Agent {
    /// Where `top` and `doctor` find the agent.
    pub socket: PathBuf,
    /// Seconds between two outputs in a pipe.
    pub interval_s: u64,
    /// Where Prometheus finds the agent's own numbers, `address:port`; nowhere by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metrics: Option<SocketAddr>,
}

/// Names of pods and workloads, from the API server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Kubernetes {
    /// Whether the API server is watched; by default in a pod only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub enabled: Option<bool>,
    /// This node's name; by default `NODE_NAME`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// `https://host:port` of the API server; by default as every pod is told it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub server: Option<String>,
    /// File with the bearer token; by default the pod's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_file: Option<PathBuf>,
    /// Certificates that the server's is checked by; by default the pod's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// Other nodes' pods, services and nodes are watched too, to name the other end of exchanges.
    pub peers: bool,
    /// `app.kubernetes.io/instance`, `name` and `version` labels name services, before their workloads do.
    pub well_known_labels: bool,
    /// Labels of pods that become attributes `k8s.pod.label.<name>`.
    pub labels: Vec<String>,
}

/// An address or a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    address: IpAddr,
    bits: u8,
}

impl Default for Capture {
    fn default() -> Self {
        Self {
            sides: Sides::Both,
            door: DoorSetting::Auto,
            path: PathSetting::Template,
            include: Vec::new(),
            exclude: Vec::new(),
        }
    }
}

impl Default for IdentityConfig {
    fn default() -> Self {
        Self {
            key_file: "/var/lib/apiscope/principal.key".into(),
            api_key_headers: Vec::new(),
            api_key_query: Vec::new(),
        }
    }
}

impl Default for Detect {
    fn default() -> Self {
        Self {
            enabled: true,
            state_file: None,
            quiet_hours: 24,
            disable: Vec::new(),
            acknowledge: Vec::new(),
            thresholds: std::collections::BTreeMap::new(),
            allow: Vec::new(),
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self { endpoints: 2_000, ring_bytes: 8 << 20 }
    }
}

impl Default for Agent {
    fn default() -> Self {
        Self { socket: "/run/apiscope/agent.sock".into(), interval_s: 10, metrics: None }
    }
}

impl Default for Kubernetes {
    fn default() -> Self {
        Self {
            enabled: None,
            node: None,
            server: None,
            token_file: None,
            ca_file: None,
            peers: true,
            well_known_labels: false,
            labels: Vec::new(),
        }
    }
}

impl Kubernetes {
    /// Is the API server to be watched? `in_cluster`: this is a pod.
    #[must_use]
    pub fn is_on(&self, in_cluster: bool) -> bool {
        self.enabled.unwrap_or(in_cluster)
    }
}

impl From<PathSetting> for PathForm {
    fn from(setting: PathSetting) -> Self {
        match setting {
            PathSetting::Template => Self::Template,
            PathSetting::Hmac => Self::Hmac,
            PathSetting::Raw => Self::Raw,
        }
    }
}

impl Sides {
    /// Is this end to be traced?
    #[must_use]
    pub fn has(self, side: Side) -> bool {
        match self {
            Self::Both => true,
            Self::Server => side == Side::Server,
            Self::Client => side == Side::Client,
        }
    }
}

impl std::str::FromStr for Network {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is no address or network, such as 10.0.0.7 or 10.0.0.0/8");
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address, Some(bits.parse().map_err(|_| wrong())?)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let bits = bits.unwrap_or(most);
        if bits > most { Err(wrong()) } else { Ok(Self { address, bits }) }
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.bits)
    }
}

impl Serialize for Network {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Network {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

impl Network {
    /// Does it hold this address?
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        match (self.address, address) {
            (IpAddr::V4(a), IpAddr::V4(b)) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(self.bits)).unwrap_or(0);
                (a.to_bits() ^ b.to_bits()) & mask == 0
            }
            (IpAddr::V6(a), IpAddr::V6(b)) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(self.bits)).unwrap_or(0);
                (a.to_bits() ^ b.to_bits()) & mask == 0
            }
            _ => false,
        }
    }
}

/// What a rule is held against.
#[derive(Debug, Clone, Copy)]
pub struct Subject<'a> {
    /// Executable; empty where unknown.
    pub exe: &'a str,
    /// Name of the process.
    pub name: &'a str,
    /// Process.
    pub pid: u32,
    /// This end.
    pub local: &'a Peer,
    /// The other end.
    pub remote: &'a Peer,
}

fn port(peer: &Peer) -> Option<u16> {
    match peer {
        Peer::Ip(a) => Some(a.port()),
        _ => None,
    }
}

impl Rule {
    /// True when the rule names only what a process is, so that the whole process can be left alone.
    #[must_use]
    pub fn is_about_process(&self) -> bool {
        self.port.is_none() && self.address.is_none() && self.side.is_none()
    }

    /// Does everything match that the rule names? Sides are not known when a connection opens: a rule
    /// with a side matches later.
    #[must_use]
    pub fn matches(&self, subject: Subject<'_>, side: Option<Side>) -> bool {
        let named = self.exe.is_some()
            || self.name.is_some()
            || self.pid.is_some()
            || self.port.is_some()
            || self.address.is_some()
            || self.side.is_some();
        named
            && self.exe.as_deref().is_none_or(|p| runs(p, subject))
            && self.name.as_deref().is_none_or(|p| glob(p, subject.name))
            && self.pid.is_none_or(|p| p == subject.pid)
            && self.port.is_none_or(|p| port(subject.local) == Some(p) || port(subject.remote) == Some(p))
            && self.address.is_none_or(|n| matches!(subject.remote, Peer::Ip(a) if n.contains(a.ip())))
            && self.side.is_none_or(|s| side.is_some_and(|side| s.has(side)))
    }
}

impl Capture {
    /// Is this connection to be traced?
    #[must_use]
    pub fn wants(&self, subject: Subject<'_>, side: Option<Side>) -> bool {
        !self.exclude.iter().any(|r| r.matches(subject, side))
            && (self.include.is_empty()
                || self.include.iter().any(|r| r.matches(subject, side) || (side.is_none() && r.side.is_some())))
    }

    /// Is the whole process left out?
    #[must_use]
    pub fn excludes_process(&self, subject: Subject<'_>) -> bool {
        self.exclude.iter().any(|r| r.is_about_process() && r.matches(subject, None))
    }
}

impl ServiceRule {
    /// Does this rule name the service at the local end?
    #[must_use]
    pub fn matches(&self, subject: Subject<'_>) -> bool {
        (self.exe.is_some() || self.process.is_some() || self.port.is_some())
            && self.exe.as_deref().is_none_or(|p| runs(p, subject))
            && self.process.as_deref().is_none_or(|p| glob(p, subject.name))
            && self.port.is_none_or(|p| port(subject.local) == Some(p))
    }
}

/// Does a process run this executable? One that ended before it was looked at has only the kernel's name left:
/// the first 15 bytes of the file's (`TASK_COMM_LEN`, prctl(2)), unless it called itself otherwise.
fn runs(pattern: &str, subject: Subject<'_>) -> bool {
    if !subject.exe.is_empty() {
        return glob(pattern, subject.exe);
    }
    let file = pattern.rsplit('/').next().unwrap_or(pattern);
    let named = file.bytes().any(|b| b != b'*');
    named && (glob(file, subject.name) || (subject.name.len() == 15 && file.starts_with(subject.name)))
}

/// Matches `*` as any characters.
#[must_use]
pub fn glob(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else { return false };
    let mut parts: Vec<&str> = parts.collect();
    let Some(last) = parts.pop() else { return rest.is_empty() };
    for part in parts {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

impl Config {
    /// Reads a file; without one, the default file if it exists.
    ///
    /// # Errors
    /// The file cannot be read, is no TOML, has an unknown key or a value out of bounds.
    pub fn load(file: Option<&Path>) -> anyhow::Result<Self> {
        let path = match file {
            Some(path) => path,
            None if Path::new(DEFAULT_FILE).exists() => Path::new(DEFAULT_FILE),
            None => return Ok(Self::default()),
        };
        let text = std::fs::read_to_string(path).with_context(|| format!("failed to read {}", path.display()))?;
        Self::parse(&text).with_context(|| format!("{} is not valid", path.display()))
    }

    /// Reads the text of a file.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        let config: Self = toml::from_str(text).map_err(|e| {
            let message = e.to_string();
            match suggestion(&message) {
                Some(known) => anyhow::anyhow!("{}\nhint: did you mean `{known}`?", message.trim_end()),
                None => anyhow::anyhow!("{}", message.trim_end()),
            }
        })?;
        config.check()?;
        Ok(config)
    }

    /// Holds values against their bounds.
    ///
    /// # Errors
    /// Names the key and what it may be.
    pub fn check(&self) -> anyhow::Result<()> {
        let ring = self.limits.ring_bytes;
        if !ring.is_power_of_two() || !(64 << 10..=256 << 20).contains(&ring) {
            bail!("limits.ring_bytes is {ring}: it must be a power of two from 65536 to 268435456");
        }
        if self.limits.endpoints == 0 || self.limits.endpoints > 1_000_000 {
            bail!("limits.endpoints is {}: it must be from 1 to 1000000", self.limits.endpoints);
        }
        if self.kubernetes.labels.len() > 64 {
            bail!("kubernetes.labels has {} names: at most 64", self.kubernetes.labels.len());
        }
        if let Some(server) = self.kubernetes.server.as_ref().filter(|s| !s.starts_with("http")) {
            bail!("kubernetes.server is `{server}`: it must be https://host:port");
        }
        if self.agent.interval_s == 0 {
            bail!("agent.interval_s is 0: it must be at least 1");
        }
        if let Some(pattern) = self.routes.patterns.iter().find(|p| !p.starts_with('/')) {
            bail!("routes.patterns has `{pattern}`: a route begins with /");
        }
        Ok(())
    }

    /// Every setting with its value, as a file that reads back the same.
    #[must_use]
    pub fn print(&self) -> String {
        let text = toml::to_string_pretty(self).unwrap_or_default();
        format!("{HELP}\n{text}")
    }
}

const HELP: &str = "\
# apiscope's configuration. Flags come before APISCOPE_* variables, these before this file.
# OpenTelemetry is configured by the standard OTEL_* variables.
#
# capture.sides    both | server | client
# capture.door     auto | tp_btf | fexit | kprobe: how sends and receives are seen (see apiscope doctor)
# capture.path     template | hmac | raw: how recordings (--exchanges) write paths
# [[capture.include]] / [[capture.exclude]]
#                  exe, name (with *), pid, port, address (10.0.0.0/8), side; all named must match
# [[service]]      name, and exe, process or port: names a service
# [[routes.document]]  service, file (OpenAPI): its paths are routes; several of one service are put together
# routes.patterns  [\"/files/{name}\"]: routes that come before what is found
# routes.state_file   where learned routes are kept over a restart
# identity.key_file        key of the hashes that name principals; made at the first start (0600)
# identity.api_key_headers, identity.api_key_query   more names that carry API keys
# inventory.file   where the list of every API is kept over a restart (0600); not kept by default
# detect.disable, detect.thresholds   see `apiscope findings --rules`; [[detect.allow]] rule, service, method, route,
#                  principal, caller (with *), reason: what is no finding; detect.acknowledge: ids of findings
# limits.*         bounds of memory
# agent.socket     where `apiscope top` finds the agent
# agent.interval_s seconds between two outputs in a pipe
# agent.metrics    address:port where Prometheus finds the agent's own numbers
# kubernetes.*     enabled (default: in a pod), node, server, token_file, ca_file, peers, labels,
#                  well_known_labels: names of pods and workloads from the API server
";

/// The known key nearest to the unknown one that an error of serde's names.
fn suggestion(message: &str) -> Option<String> {
    let rest = message.split("unknown field `").nth(1)?;
    let (unknown, rest) = rest.split_once('`')?;
    let known = rest.split('`').skip(1).step_by(2);
    known
        .map(|k| (strsim::damerau_levenshtein(k, unknown), k))
        .filter(|(distance, k)| *distance <= 1 + k.len() / 3)
        .min()
        .map(|(_, k)| k.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn printed_and_read_again() {
        let mut config = Config::default();
        config
            .capture
            .exclude
            .push(Rule { address: Some("10.0.0.0/8".parse().expect("a network")), ..Rule::default() });
        config.service.push(ServiceRule { name: "shop".into(), exe: None, process: None, port: Some(80) });
        assert_eq!(Config::parse(&config.print()).expect("valid"), config);
        assert_eq!(Config::parse(&Config::default().print()).expect("valid"), Config::default());
    }

    #[test]
    fn unknown_keys_are_refused_with_the_nearest() {
        let error = Config::parse("[capture]\nsidse = \"server\"\n").expect_err("unknown").to_string();
        assert!(error.contains("line 2") && error.contains("did you mean `sides`"), "{error}");
        for bad in [
            "[limits]\nring_bytes = 5",
            "[agent]\ninterval_s = 0",
            "[[capture.exclude]]\naddress = \"10/99\"",
            "[routes]\npatterns = [\"x\"]",
            "=",
        ] {
            assert!(Config::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn rules() {
        let (local, remote) = (Peer::parse("127.0.0.1:80"), Peer::parse("10.1.2.3:5555"));
        let subject = Subject { exe: "/usr/sbin/nginx", name: "nginx", pid: 7, local: &local, remote: &remote };
        let capture = |text: &str| Config::parse(text).expect("valid").capture;
        assert!(!capture("[[capture.exclude]]\nexe = \"*/nginx\"").wants(subject, None));
        assert!(capture("[[capture.exclude]]\nexe = \"*/nginx\"\nport = 81").wants(subject, None));
        assert!(!capture("[[capture.exclude]]\naddress = \"10.0.0.0/8\"").wants(subject, None));
        assert!(!capture("[[capture.include]]\nport = 443").wants(subject, None));
        assert!(capture("[[capture.include]]\nname = \"ng*x\"").wants(subject, None));
        let server_only = capture("[[capture.exclude]]\nside = \"client\"");
        assert!(server_only.wants(subject, None) && !server_only.wants(subject, Some(Side::Client)));
        assert!(capture("[[capture.exclude]]").wants(subject, None), "an empty rule matches nothing");
        let gone = Subject { exe: "", name: "a-long-program-", ..subject };
        assert!(!capture("[[capture.exclude]]\nexe = \"/opt/a-long-program-name\"").wants(gone, None));
        assert!(!capture("[[capture.exclude]]\nexe = \"*/a-long*\"").wants(gone, None));
        assert!(capture("[[capture.exclude]]\nexe = \"/opt/*\"").wants(gone, None));
        assert!(capture("[[capture.exclude]]\nexe = \"*/nginx\"").wants(gone, None));
    }

    proptest::proptest! {
        #[test]
        fn never_panics(text in ".{0,200}", pattern in "[a*]{0,6}", subject in "[ab]{0,8}") {
            let _ = Config::parse(&text);
            let _ = glob(&pattern, &subject);
        }
    }
}
