//! What the test puts into the cluster: servers in one namespace, callers in another, a collector in a third.

use serde_json::{Value, json};

use super::images::PROGRAMS;

/// Namespace of the servers, the callers, the collector with the agent.
pub const SERVERS: &str = "apiscope-test-servers";
/// See [`SERVERS`].
pub const CALLERS: &str = "apiscope-test-callers";
/// See [`SERVERS`].
pub const AGENT: &str = "apiscope-test-agent";
/// Workload of the servers, and the one that calls all the time.
pub const SHOP: &str = "shop";
/// See [`SHOP`].
pub const STEADY: &str = "steady";
/// Name of the collector's pod.
pub const COLLECTOR: &str = "collector";
/// Kinds of calls, see `tests/programs/cluster.go`: HTTP/1.1 and HTTP/2, in plaintext and in TLS.
pub const KINDS: [&str; 4] = ["plain", "h2c", "tls", "h2"];

/// Milliseconds between two calls of the steady caller.
const INTERVAL: &str = "200";

/// The namespaces.
pub fn namespaces() -> Vec<Value> {
    let one = |name: &str| json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
    [SERVERS, CALLERS, AGENT].map(one).to_vec()
}

fn container(name: &str, arguments: &[&str]) -> Value {
    json!({
        "name": name, "image": PROGRAMS, "imagePullPolicy": "Never", "args": arguments,
        "securityContext": {
            "runAsUser": 65534, "runAsNonRoot": true, "allowPrivilegeEscalation": false,
            "readOnlyRootFilesystem": true, "capabilities": {"drop": ["ALL"]},
        },
    })
}

/// Nothing here has more to do when it is asked to end.
fn spec(containers: Value, restart: &str) -> Value {
    json!({
        "containers": containers, "restartPolicy": restart, "terminationGracePeriodSeconds": 1,
        "automountServiceAccountToken": false,
    })
}

fn deployment(namespace: &str, name: &str, replicas: usize, container: &Value) -> Value {
    let labels = json!({"app": name});
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "replicas": replicas, "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": spec(json!([container]), "Always")},
        },
    })
}

/// Two servers of one workload.
pub fn servers() -> Value {
    deployment(SERVERS, SHOP, 2, &container("server", &["serve"]))
}

/// A caller that never ends.
pub fn steady(address: &str) -> Value {
    deployment(CALLERS, STEADY, 1, &container("caller", &["call", "plain", address, "/orders", "0", INTERVAL]))
}

/// A job that makes `calls` of every kind, one after the other.
pub fn job(name: &str, address: &str, calls: usize) -> Value {
    let kinds = KINDS.join(",");
    let caller = container("caller", &["call", &kinds, address, "/orders", &calls.to_string(), "50"]);
    json!({
        "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name, "namespace": CALLERS},
        "spec": {"backoffLimit": 0, "template": {"spec": spec(json!([caller]), "Never")}},
    })
}

/// A pod that lives for about a second: one call at its beginning, and a pause.
pub fn brief(name: &str, kind: &str, address: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": CALLERS, "labels": {"app": "brief"}},
        "spec": spec(json!([container("caller", &["call", kind, address, "/orders", "2", "400"])]), "Never"),
    })
}

/// The collector, and beside it the sink that prints what it decoded.
pub fn collector() -> Vec<Value> {
    const CONFIG: &str = "receivers: {otlp: {protocols: {grpc: {endpoint: '0.0.0.0:4317'}, http: {endpoint: '0.0.0.0:4318'}}}}
exporters: {otlphttp: {endpoint: 'http://127.0.0.1:4319', encoding: json, compression: none}}
service: {telemetry: {metrics: {level: none}, logs: {level: warn}}, pipelines: {metrics: {receivers: [otlp], exporters: [otlphttp]}, traces: {receivers: [otlp], exporters: [otlphttp]}, logs: {receivers: [otlp], exporters: [otlphttp]}}}
";
    let mut collector = container("collector", &["--config=/etc/otelcol/config.yaml"]);
    collector["command"] = json!(["/otelcol"]);
    collector["volumeMounts"] = json!([{"name": "config", "mountPath": "/etc/otelcol"}]);
    let mut spec = spec(json!([collector, container("sink", &["sink"])]), "Always");
    spec["volumes"] = json!([{"name": "config", "configMap": {"name": COLLECTOR}}]);
    vec![
        json!({
            "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": COLLECTOR, "namespace": AGENT},
            "data": {"config.yaml": CONFIG},
        }),
        json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": COLLECTOR, "namespace": AGENT},
            "spec": spec,
        }),
    ]
}
