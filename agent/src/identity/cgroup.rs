//! `/proc/PID/cgroup` -> container id and pod uid. Pure.
//!
//! A line is `hierarchy:controllers:path` (`cgroups(7)`): one for each v1 hierarchy, `0::path` for v2.
//! What runtimes make of the path:
//!
//! | | path |
//! | --- | --- |
//! | kubelet, cgroupfs driver | `/kubepods/burstable/pod<uid>/<id>` |
//! | kubelet, systemd driver | `/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod<uid with _>.slice/cri-containerd-<id>.scope` (`crio-`, `docker-`) |
//! | containerd as a systemd service | `…/system.slice/containerd.service/kubepods-…-pod<uid>.slice:cri-containerd:<id>` |
//! | docker | `/docker/<id>`, `/system.slice/docker-<id>.scope` |
//! | podman | `/machine.slice/libpod-<id>.scope[/container]` |
//! | AWS ECS | `/ecs/<task>/<id>` |
//!
//! A container may have cgroups of its own below (systemd inside, nested docker): the outermost id is the
//! one that the node's runtime knows. A process in a cgroup namespace sees a path that begins with `/..`;
//! the rest is read the same.

/// A container, as the kernel shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Container {
    /// Its id.
    pub id: String,
    /// UID of its pod with dashes; the hash of its manifest for a static pod.
    pub pod_uid: Option<String>,
}

/// Longest path that is looked at, bytes (`PATH_MAX`).
const MAX_PATH: usize = 4096;

/// The container of a process, from the content of its `/proc/PID/cgroup`.
#[must_use]
pub fn container(text: &str) -> Option<Container> {
    // Every hierarchy tells the same; some are left at the root by some runtimes.
    text.lines().filter_map(|line| line.splitn(3, ':').nth(2)).find_map(of_path)
}

fn of_path(path: &str) -> Option<Container> {
    if path.len() > MAX_PATH {
        return None;
    }
    let mut pod_uid = None;
    // `:` joins what systemd would nest, where containerd itself is a unit.
    for part in path.split(['/', ':']) {
        if let Some(id) = container_id(part) {
            return Some(Container { id: id.to_owned(), pod_uid });
        }
        if let Some(uid) = uid(part) {
            pod_uid = Some(uid);
        }
    }
    None
}

/// `<id>`, `<runtime>-<id>.scope`. CRI-O's monitor (`crio-conmon-<id>.scope`) is not the container.
fn container_id(part: &str) -> Option<&str> {
    let name = part.strip_suffix(".scope").unwrap_or(part);
    let (runtime, id) = name.rsplit_once('-').map_or(("", name), |(r, id)| (r, id));
    if runtime.ends_with("conmon") {
        return None;
    }
    let whole = id.len() == 64 && is_hex(id);
    // ECS on Fargate: 32 hex digits, a dash, the container's number.
    let fargate = runtime.len() == 32
        && is_hex(runtime)
        && (1..=20).contains(&id.len())
        && id.bytes().all(|b| b.is_ascii_digit());
    if fargate { Some(name) } else { whole.then_some(id) }
}

/// `pod<uid>`, or a slice whose last word is that, with `_` for `-`.
fn uid(part: &str) -> Option<String> {
    let name = part.strip_suffix(".slice").unwrap_or(part);
    let word = if name.len() < part.len() { name.rsplit('-').next()? } else { name };
    let uid = word.strip_prefix("pod")?;
    let dashed = uid.replace('_', "-");
    let is_uuid = dashed.len() == 36
        && dashed.bytes().enumerate().all(|(i, b)| match i {
            8 | 13 | 18 | 23 => b == b'-',
            _ => b.is_ascii_hexdigit(),
        });
    let is_static = dashed.len() == 32 && is_hex(&dashed);
    (is_uuid || is_static).then_some(dashed)
}

fn is_hex(text: &str) -> bool {
    text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ID: &str = "4f1c8e2ad0b34c6f9a7be51d2083c6e94f1c8e2ad0b34c6f9a7be51d2083c6e9";
    const UID: &str = "0e5a3c0d-8f57-4c0f-9d43-3c7c2f6c2a11";

    fn found(text: &str) -> (String, Option<String>) {
        container(text).map(|c| (c.id, c.pod_uid)).unwrap_or_default()
    }

    #[test]
    fn what_runtimes_write() {
        let slice = UID.replace('-', "_");
        let pod = (ID.to_owned(), Some(UID.to_owned()));
        for path in [
            format!("/kubepods/besteffort/pod{UID}/{ID}"),
            format!("/kubepods/pod{UID}/{ID}"),
            format!(
                "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{slice}.slice/cri-containerd-{ID}.scope"
            ),
            format!("/kubepods.slice/kubepods-pod{slice}.slice/crio-{ID}.scope"),
            format!("/kubepods.slice/kubepods-pod{slice}.slice/crio-{ID}.scope/container"),
            format!("/kubepods.slice/kubepods-pod{slice}.slice/docker-{ID}.scope"),
            format!("/system.slice/containerd.service/kubepods-burstable-pod{slice}.slice:cri-containerd:{ID}"),
            format!("/../../kubepods-pod{slice}.slice/cri-containerd-{ID}.scope"),
            format!("/kubelet/kubepods/burstable/pod{UID}/{ID}/system.slice/nginx.service"),
            // A container engine inside the pod: the outer id is the pod's.
            format!("/kubepods/besteffort/pod{UID}/{ID}/docker/{}", "a".repeat(64)),
        ] {
            assert_eq!(found(&format!("0::{path}\n")), pod, "{path}");
            assert_eq!(found(&format!("12:pids:/\n3:cpu,cpuacct:{path}\n0::/\n")), pod, "v1 {path}");
        }
        let alone = (ID.to_owned(), None);
        for path in [
            format!("/docker/{ID}"),
            format!("/system.slice/docker-{ID}.scope"),
            format!("/machine.slice/libpod-{ID}.scope/container"),
            format!("/ecs/0123456789abcdef0123456789abcdef/{ID}"),
            format!("/default/{ID}"),
        ] {
            assert_eq!(found(&format!("0::{path}\n")), alone, "{path}");
        }
        let fargate = "0123456789abcdef0123456789abcdef-1234567890";
        assert_eq!(found(&format!("0::/ecs/x/{fargate}\n")).0, fargate);
        let hash = "0123456789abcdef0123456789abcdef";
        assert_eq!(found(&format!("0::/kubepods/burstable/pod{hash}/{ID}\n")).1.as_deref(), Some(hash));
    }

    #[test]
    fn what_is_no_container() {
        for text in [
            "",
            "0::/",
            "0::/system.slice/nginx.service\n",
            "0::/user.slice/user-1000.slice/session-3.scope\n",
            &format!("0::/kubepods.slice/kubepods-pod{}.slice/crio-conmon-{ID}.scope\n", UID.replace('-', "_")),
            &format!("0::/kubepods/besteffort/pod{UID}\n"),
            &format!("0::/docker/{}\n", &ID[1..]),
            "no colons at all",
        ] {
            assert_eq!(container(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_id_in_any_shape(id in "[0-9a-f]{64}", uid in "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
            class in prop::sample::select(vec!["", "besteffort", "burstable"]),
            runtime in prop::sample::select(vec!["cri-containerd", "crio", "docker"]), v2 in any::<bool>(), systemd in any::<bool>(),
            below in prop::sample::select(vec!["", "/container", "/init.scope", "/system.slice/a.service"])) {
            let path = if systemd {
                let dash = if class.is_empty() { String::new() } else { format!("{class}-") };
                let middle = if class.is_empty() { String::new() } else { format!("/kubepods-{class}.slice") };
                format!("/kubepods.slice{middle}/kubepods-{dash}pod{}.slice/{runtime}-{id}.scope{below}", uid.replace('-', "_"))
            } else {
                let middle = if class.is_empty() { String::new() } else { format!("/{class}") };
                format!("/kubepods{middle}/pod{uid}/{id}{below}")
            };
            let line = if v2 { format!("0::{path}\n") } else { format!("11:memory:{path}\n1:name=systemd:{path}\n") };
            prop_assert_eq!(container(&line), Some(Container { id, pod_uid: Some(uid) }));
        }

        #[test]
        fn never_panics(text in "(.|[:/\n_-]|pod|kubepods|scope){0,300}") {
            if let Some(found) = container(&text) {
                prop_assert!(text.contains(&found.id));
            }
        }
    }
}
