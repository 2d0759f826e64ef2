//! Where an end of an exchange runs: container, pod, workload, node. Values alone: `identity` finds them.

use std::{fmt, sync::Arc};

/// Where a process runs, as far as it is known. Shared by all exchanges of a container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Origin {
    /// Id of the container as its runtime gave it: 64 hex digits for containerd, CRI-O and docker.
    pub container_id: Option<Arc<str>>,
    /// Name of the container in its pod.
    pub container: Option<Arc<str>>,
    /// What the container was made of.
    pub image: Option<Arc<Image>>,
    /// UID of the pod.
    pub pod_uid: Option<Arc<str>>,
    /// Name of the pod.
    pub pod: Option<Arc<str>>,
    /// Node.
    pub node: Option<Arc<str>>,
    /// What the pod belongs to. Where no API server told, the container stands for itself.
    pub workload: Option<Arc<Workload>>,
    /// The service's name was given by the process itself or by a rule: the workload does not change it.
    pub named: bool,
    /// It shares the node's network: its address is the node's.
    pub host_network: bool,
}

/// Image of a container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Image {
    /// Name without tag and digest.
    pub name: Box<str>,
    /// Tag, where the pod names one.
    pub tag: Option<Box<str>>,
    /// `name@sha256:…`, from the runtime.
    pub digest: Option<Box<str>>,
}

/// What exchanges are counted under: one OpenTelemetry resource of metrics each.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Workload {
    /// Namespace; empty outside Kubernetes.
    pub namespace: Arc<str>,
    /// Kind.
    pub kind: Kind,
    /// Name.
    pub name: Arc<str>,
    /// `service.name` by the conventions' order for Kubernetes.
    pub service: Arc<str>,
    /// `service.namespace` by the same.
    pub service_namespace: Arc<str>,
    /// `service.version` by the same.
    pub version: Option<Box<str>>,
    /// Labels that the configuration asks for, by name.
    pub labels: Vec<(Box<str>, Box<str>)>,
}

/// Kind of a workload, or of what an address belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[expect(missing_docs, reason = "the variants are Kubernetes' own kinds")]
pub enum Kind {
    Deployment,
    ReplicaSet,
    StatefulSet,
    DaemonSet,
    CronJob,
    Job,
    /// A pod that nothing controls.
    Pod,
    /// An address that is a service's, not a pod's.
    Service,
    /// A node's own address: its host-network pods share it.
    Node,
    /// A container of which no API server told.
    Container,
    /// A custom controller.
    Other(Box<str>),
}

impl Kind {
    /// As Kubernetes writes it.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Deployment => "Deployment",
            Self::ReplicaSet => "ReplicaSet",
            Self::StatefulSet => "StatefulSet",
            Self::DaemonSet => "DaemonSet",
            Self::CronJob => "CronJob",
            Self::Job => "Job",
            Self::Pod => "Pod",
            Self::Service => "Service",
            Self::Node => "Node",
            Self::Container => "Container",
            Self::Other(name) => name,
        }
    }

    /// Of an owner reference.
    #[must_use]
    pub fn of(name: &str) -> Self {
        match name {
            "Deployment" => Self::Deployment,
            "ReplicaSet" => Self::ReplicaSet,
            "StatefulSet" => Self::StatefulSet,
            "DaemonSet" => Self::DaemonSet,
            "CronJob" => Self::CronJob,
            "Job" => Self::Job,
            other => Self::Other(other.into()),
        }
    }

    /// The attribute of the semantic conventions that names a workload of this kind.
    #[must_use]
    pub fn attribute(&self) -> Option<&'static str> {
        Some(match self {
            Self::Deployment => "k8s.deployment.name",
            Self::ReplicaSet => "k8s.replicaset.name",
            Self::StatefulSet => "k8s.statefulset.name",
            Self::DaemonSet => "k8s.daemonset.name",
            Self::CronJob => "k8s.cronjob.name",
            Self::Job => "k8s.job.name",
            Self::Service => "k8s.service.name",
            Self::Pod | Self::Node | Self::Container | Self::Other(_) => return None,
        })
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            return f.write_str(&self.name);
        }
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl Origin {
    /// A container of which only the kernel told.
    #[must_use]
    pub fn of_container(id: &str, pod_uid: Option<&str>) -> Self {
        let id: Arc<str> = id.into();
        let none: Arc<str> = "".into();
        let workload = Workload {
            namespace: none.clone(),
            kind: Kind::Container,
            name: id.clone(),
            service: none.clone(),
            service_namespace: none,
            version: None,
            labels: Vec::new(),
        };
        Self {
            container_id: Some(id),
            pod_uid: pod_uid.map(Into::into),
            workload: Some(Arc::new(workload)),
            ..Self::default()
        }
    }

    /// Namespace of the pod or service; `None` where unknown.
    #[must_use]
    pub fn namespace(&self) -> Option<&Arc<str>> {
        self.workload.as_ref().map(|w| &w.namespace).filter(|n| !n.is_empty())
    }
}
