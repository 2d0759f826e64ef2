//! Resources, by the semantic conventions for services, containers and Kubernetes (1.44).

use opentelemetry::KeyValue;
use opentelemetry_sdk::Resource;

use crate::exchange::{Kind, Origin, Workload};

/// The resource of a workload: `OTEL_RESOURCE_ATTRIBUTES` of the agent, and what is known of the workload.
/// A metric's: nothing of it changes from pod to pod.
pub fn resource(service: &str, workload: Option<&Workload>) -> Resource {
    Resource::builder().with_service_name(service.to_owned()).with_attributes(of_workload(workload)).build()
}

/// The resource of a container. A span's: with its pod, image and instance.
pub fn of_container(service: &str, origin: Option<&Origin>) -> Resource {
    let workload = origin.and_then(|o| o.workload.as_deref());
    let mut attributes = of_workload(workload.filter(|w| w.kind != Kind::Container));
    let mut add = |key: &'static str, value: Option<&str>| {
        attributes.extend(value.map(|v| KeyValue::new(key, v.to_owned())));
    };
    if let Some(origin) = origin {
        add("container.id", origin.container_id.as_deref());
        add("k8s.pod.name", origin.pod.as_deref());
        add("k8s.pod.uid", origin.pod_uid.as_deref());
        add("k8s.node.name", origin.node.as_deref());
        add("k8s.container.name", origin.container.as_deref());
        let image = origin.image.as_deref();
        add("container.image.name", image.map(|i| &*i.name));
        let mut list = |key: &'static str, value: Option<&str>| {
            let one =
                |v: &str| opentelemetry::Value::Array(vec![opentelemetry::StringValue::from(v.to_owned())].into());
            attributes.extend(value.map(|v| KeyValue::new(key, one(v))));
        };
        list("container.image.tags", image.and_then(|i| i.tag.as_deref()));
        list("container.image.repo_digests", image.and_then(|i| i.digest.as_deref()));
        if let (Some(namespace), Some(pod), Some(container)) = (origin.namespace(), &origin.pod, &origin.container) {
            attributes.push(KeyValue::new("service.instance.id", format!("{namespace}.{pod}.{container}")));
        }
    }
    Resource::builder().with_service_name(service.to_owned()).with_attributes(attributes).build()
}

fn of_workload(workload: Option<&Workload>) -> Vec<KeyValue> {
    let Some(workload) = workload else { return Vec::new() };
    if workload.kind == Kind::Container {
        return vec![KeyValue::new("container.id", workload.name.clone())];
    }
    let mut attributes = Vec::new();
    if !workload.namespace.is_empty() {
        attributes.push(KeyValue::new("k8s.namespace.name", workload.namespace.clone()));
        attributes.push(KeyValue::new("service.namespace", workload.service_namespace.clone()));
    }
    attributes.extend(workload.kind.attribute().map(|key| KeyValue::new(key, workload.name.clone())));
    attributes.extend(workload.version.as_ref().map(|v| KeyValue::new("service.version", v.to_string())));
    for (name, value) in &workload.labels {
        attributes.push(KeyValue::new(format!("k8s.pod.label.{name}"), value.to_string()));
    }
    attributes
}

/// The other end of a span.
pub fn of_peer(peer: &Origin) -> Vec<KeyValue> {
    let mut attributes = Vec::new();
    if let Some(workload) = &peer.workload {
        attributes.push(KeyValue::new("service.peer.name", workload.service.clone()));
        if !workload.namespace.is_empty() {
            attributes.push(KeyValue::new("service.peer.namespace", workload.service_namespace.clone()));
            attributes.push(KeyValue::new("apiscope.peer.k8s.namespace.name", workload.namespace.clone()));
        }
        let key = workload.kind.attribute().map(|key| format!("apiscope.peer.{key}"));
        attributes.extend(key.map(|key| KeyValue::new(key, workload.name.clone())));
    }
    let rest = [("apiscope.peer.k8s.pod.name", &peer.pod), ("apiscope.peer.k8s.node.name", &peer.node)];
    attributes.extend(rest.into_iter().filter_map(|(key, v)| Some(KeyValue::new(key, v.clone()?))));
    attributes
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn workload() -> Workload {
        Workload {
            namespace: "shop".into(),
            kind: Kind::StatefulSet,
            name: "db".into(),
            service: "db".into(),
            service_namespace: "store".into(),
            version: Some("7".into()),
            labels: vec![("team".into(), "a".into())],
        }
    }

    #[test]
    fn metrics_by_workload_spans_by_container() {
        let of = |r: &Resource, key: &'static str| r.get(&key.into()).map(|v| v.to_string()).unwrap_or_default();
        let metric = resource("db", Some(&workload()));
        assert_eq!(of(&metric, "k8s.statefulset.name") + &of(&metric, "service.namespace"), "dbstore");
        assert_eq!(of(&metric, "k8s.pod.label.team") + &of(&metric, "service.version"), "a7");
        assert_eq!(of(&metric, "k8s.pod.name"), "");
        let origin = Origin {
            pod: Some("db-0".into()),
            container: Some("pg".into()),
            container_id: Some("abc".into()),
            node: Some("n1".into()),
            workload: Some(Arc::new(workload())),
            ..Origin::default()
        };
        let span = of_container("db", Some(&origin));
        assert_eq!(of(&span, "service.instance.id"), "shop.db-0.pg");
        assert_eq!(of(&span, "container.id") + &of(&span, "k8s.node.name"), "abcn1");
        let alone = Origin::of_container("abc", None);
        assert_eq!(of(&of_container("x", Some(&alone)), "container.id"), "abc");
        assert_eq!(of(&resource("x", alone.workload.as_deref()), "container.id"), "abc");
        assert!(of_peer(&origin).iter().any(|a| a.key.as_str() == "apiscope.peer.k8s.pod.name"));
    }
}
