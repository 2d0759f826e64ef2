//! What each program of the node is told, and why.

use std::path::Path;

/// Address of the node: the API server's and the kubelet's.
pub const NODE: &str = "10.201.0.1";
/// The machine's own end of the wire to it, so that kubectl works from anywhere on the machine.
pub const MACHINE: &str = "10.201.0.254";
/// Address of the service `kubernetes`. There is no kube-proxy: the API server listens at that address itself.
pub const SERVICE: &str = "10.203.0.1";
/// Addresses of services.
pub const SERVICES: &str = "10.203.0.0/24";
/// Addresses of pods. Few, so that a test of a hundred pods sees each of them used again.
pub const PODS: &str = "10.202.0.0/26";
/// Name of the node.
pub const NAME: &str = "node-1";
/// Where containerd keeps what lives as long as it; a file system of its own in the node's mount namespace.
pub const RUN: &str = "/run/containerd";

/// Names and rights, one a line: token, user, uid, groups.
pub const TOKENS: &str = "admin-token,admin,1,\"system:masters\"
controller-token,system:kube-controller-manager,2
scheduler-token,system:kube-scheduler,3
node-token,system:node:node-1,4,\"system:nodes\"
";

/// A client's configuration.
pub fn kubeconfig(state: &Path, token: &str) -> String {
    format!(
        "apiVersion: v1
kind: Config
clusters: [{{name: apiscope, cluster: {{server: 'https://{NODE}', certificate-authority: '{}/certificates/apiserver.crt'}}}}]
users: [{{name: apiscope, user: {{token: {token}}}}}]
contexts: [{{name: apiscope, context: {{cluster: apiscope, user: apiscope}}}}]
current-context: apiscope
",
        state.display()
    )
}

/// containerd: the pods' sandbox is the test's own image, since nothing can be pulled; the score by which the
/// kernel chooses what to kill is left alone where CAP_SYS_RESOURCE is missing (runc would end with `can't
/// get final child's PID from pipe`).
pub fn containerd(state: &Path, sandbox: &str) -> String {
    format!(
        "version = 2
root = '{0}/containerd'
state = '{RUN}/state'
[grpc]
address = '{RUN}/containerd.sock'
[plugins.'io.containerd.grpc.v1.cri']
sandbox_image = '{sandbox}'
restrict_oom_score_adj = true
[plugins.'io.containerd.grpc.v1.cri'.cni]
bin_dir = '/usr/lib/cni'
conf_dir = '{0}/cni'
[plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc]
runtime_type = 'io.containerd.runc.v2'
",
        state.display()
    )
}

/// The network of the pods: a bridge that is their gateway.
pub fn network(state: &Path) -> String {
    format!(
        r#"{{"cniVersion": "0.4.0", "name": "pods", "plugins": [{{"type": "bridge", "bridge": "cni0", "isGateway": true,
"ipam": {{"type": "host-local", "subnet": "{PODS}", "dataDir": "{}/addresses", "routes": [{{"dst": "0.0.0.0/0"}}]}}}}]}}"#,
        state.display()
    )
}

/// The kubelet: its cgroups beside those of the machine's other programs; cgroup v1 too, swap too; anyone in the
/// namespace may talk to it, which is the API server alone.
pub fn kubelet(state: &Path, cgroup: &str) -> String {
    format!(
        "apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {{anonymous: {{enabled: true}}, webhook: {{enabled: false}}}}
authorization: {{mode: AlwaysAllow}}
address: {NODE}
healthzPort: 0
cgroupDriver: cgroupfs
cgroupRoot: /{cgroup}
failCgroupV1: false
failSwapOn: false
resolvConf: ''
podLogsDir: '{}/pods'
containerRuntimeEndpoint: 'unix://{RUN}/containerd.sock'
enforceNodeAllocatable: []
containerLogMaxSize: 200Mi
evictionHard: {{memory.available: 100Mi, nodefs.available: 1%, imagefs.available: 1%, nodefs.inodesFree: 1%}}
",
        state.display()
    )
}

/// Arguments of the API server. With no certificate given it makes one for its addresses, and its authority.
pub fn apiserver(state: &Path) -> Vec<String> {
    let s = state.display();
    [
        "--etcd-servers=http://127.0.0.1:2379",
        "--bind-address=0.0.0.0",
        "--secure-port=443",
        &format!("--advertise-address={NODE}"),
        &format!("--cert-dir={s}/certificates"),
        &format!("--service-cluster-ip-range={SERVICES}"),
        "--service-account-issuer=https://kubernetes.default.svc",
        &format!("--service-account-key-file={s}/certificates/accounts.pub"),
        &format!("--service-account-signing-key-file={s}/certificates/accounts.key"),
        &format!("--token-auth-file={s}/tokens.csv"),
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--kubelet-preferred-address-types=InternalIP",
    ]
    .map(str::to_owned)
    .to_vec()
}

/// Arguments of etcd. What it keeps may be lost with the machine.
pub fn etcd(state: &Path) -> Vec<String> {
    [
        "--listen-client-urls=http://127.0.0.1:2379",
        "--advertise-client-urls=http://127.0.0.1:2379",
        "--listen-peer-urls=http://127.0.0.1:2380",
        "--unsafe-no-fsync",
        &format!("--data-dir={}/etcd", state.display()),
    ]
    .map(str::to_owned)
    .to_vec()
}

/// Arguments of the controller manager: it signs service accounts' tokens and makes pods of DaemonSets and jobs.
pub fn controllers(state: &Path) -> Vec<String> {
    let s = state.display();
    [
        &format!("--kubeconfig={s}/controller.kubeconfig"),
        &format!("--service-account-private-key-file={s}/certificates/accounts.key"),
        &format!("--root-ca-file={s}/certificates/apiserver.crt"),
        "--use-service-account-credentials",
        "--leader-elect=false",
        "--bind-address=127.0.0.1",
    ]
    .map(str::to_owned)
    .to_vec()
}
