//! What `doctor` looks at inside a container: whether the node's processes are to be seen, and whether pods
//! can have names. Facts first, judged apart from where they come from.

use std::{fs, net::ToSocketAddrs as _, time::Duration};

use super::Check;
use crate::table::Snapshot;

/// The first PID namespace's inode, a constant of the kernel (`PROC_PID_INIT_INO`).
const HOST_PIDS: &str = "pid:[4026531836]";
/// How long an API server is waited for.
const PATIENCE: Duration = Duration::from_secs(2);

/// What the checks rest on.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// Target of `/proc/self/ns/pid`.
    pub pid_namespace: String,
    /// `host:port` of the API server, where this is a pod.
    pub api_server: Option<String>,
    /// Why it cannot be reached.
    pub unreachable: Option<String>,
    /// `NODE_NAME`.
    pub node: Option<String>,
    /// Pods that the running agent knows, and its failed requests.
    pub watched: Option<(u64, u64)>,
}

impl Facts {
    /// Looks; `agent` is what a running agent answers.
    #[must_use]
    pub fn collect(agent: Option<&Snapshot>) -> Self {
        let variable = |name: &str| std::env::var(name).ok().filter(|v| !v.is_empty());
        let port = variable("KUBERNETES_SERVICE_PORT_HTTPS").unwrap_or_else(|| "443".into());
        let api_server = variable("KUBERNETES_SERVICE_HOST")
            .map(|host| if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") });
        let unreachable = api_server.as_deref().and_then(|server| {
            let address = server.to_socket_addrs().ok().and_then(|mut all| all.next());
            let Some(address) = address else { return Some("no such address".to_owned()) };
            std::net::TcpStream::connect_timeout(&address, PATIENCE).err().map(|e| e.to_string())
        });
        Self {
            pid_namespace: fs::read_link("/proc/self/ns/pid").map(|l| l.display().to_string()).unwrap_or_default(),
            api_server,
            unreachable,
            node: variable("NODE_NAME"),
            watched: agent.map(|s| (s.totals.pods, s.totals.kubernetes_failed)),
        }
    }

    /// The checks; none where nothing of this matters.
    #[must_use]
    pub fn checks(&self) -> Vec<Check> {
        let mut checks = Vec::new();
        let mut check = |name: &str, ok: bool, found: String, remedy: &str| {
            let remedy = (!ok).then(|| remedy.to_owned());
            checks.push(Check { name: name.into(), ok, found, remedy });
        };
        if !self.pid_namespace.is_empty() && self.pid_namespace != HOST_PIDS {
            check(
                "processes of the node",
                false,
                "hidden: this is a PID namespace of its own".into(),
                "set hostPID: true (Kubernetes), --pid=host (docker)",
            );
        }
        let Some(server) = &self.api_server else { return checks };
        match &self.unreachable {
            None => check("Kubernetes API", true, format!("{server} can be reached"), ""),
            Some(why) => check(
                "Kubernetes API",
                false,
                format!("{server}: {why}"),
                "let the agent reach the API server (networkPolicy.apiServerPorts), or set kubernetes.enabled: false",
            ),
        }
        if self.node.is_none() {
            check(
                "this node's name",
                false,
                "NODE_NAME is not set".into(),
                "set it from spec.nodeName, as the chart does",
            );
        }
        match self.watched {
            Some((0, failed)) if failed > 0 => check(
                "names of pods",
                false,
                format!("no pod is known, {failed} requests failed"),
                "give the service account list and watch of pods (rbac.create), and see the agent's log",
            ),
            Some((pods, failed)) => {
                check("names of pods", true, format!("{pods} pods are known, {failed} requests failed so far"), "");
            }
            None => {}
        }
        checks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lacks_has_a_remedy() {
        let host = Facts { pid_namespace: HOST_PIDS.into(), ..Facts::default() };
        assert!(host.checks().is_empty(), "outside of a container there is nothing to say");
        let hidden = Facts { pid_namespace: "pid:[4026532000]".into(), ..Facts::default() };
        assert!(hidden.checks()[0].remedy.as_deref().is_some_and(|r| r.contains("hostPID")));
        let pod = Facts {
            pid_namespace: HOST_PIDS.into(),
            api_server: Some("10.96.0.1:443".into()),
            node: Some("n1".into()),
            watched: Some((110, 0)),
            unreachable: None,
        };
        assert!(pod.checks().iter().all(|c| c.ok) && pod.checks().len() == 2);
        let forbidden = Facts { watched: Some((0, 4)), ..pod.clone() };
        assert!(forbidden.checks().iter().any(|c| !c.ok && c.found.contains("4 requests failed")));
        let away = Facts { unreachable: Some("timed out".into()), node: None, ..pod };
        assert_eq!(away.checks().iter().filter(|c| !c.ok).count(), 2);
    }
}
