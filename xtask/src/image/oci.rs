//! An OCI image as a layout in one tar archive (OCI Image Format 1.1): what `ctr images import`, `skopeo`,
//! `crane` and `podman load` take; `docker load` too, by the index of its own beside it.

use std::collections::BTreeMap;

use anyhow::Result;
use serde_json::{Value, json};

use super::archive::{self, Entry};
use crate::sources::sha256;

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const EMPTY: &str = "application/vnd.oci.empty.v1+json";
const CYCLONEDX: &str = "application/vnd.cyclonedx+json";

/// What goes into an image.
#[derive(Debug)]
pub struct Image<'a> {
    /// Its name with tag, as it is found after loading.
    pub name: &'a str,
    /// `amd64`, `arm64`.
    pub architecture: &'a str,
    /// Version of the agent.
    pub version: &'a str,
    /// Commit that it was built from.
    pub revision: &'a str,
    /// Time of everything, s since the epoch, and as text.
    pub time: (u64, &'a str),
    /// Its files.
    pub files: &'a [Entry],
    /// Its bill of materials.
    pub sbom: &'a Value,
}

/// A finished image.
#[derive(Debug)]
pub struct Built {
    /// The archive.
    pub archive: Vec<u8>,
    /// Digest of the manifest: what a chart may pin.
    pub digest: String,
    /// Bytes that a node pulls.
    pub compressed: usize,
    /// Bytes that a node keeps.
    pub unpacked: usize,
}

/// Makes the image.
///
/// # Errors
/// A path is too long for a tar archive.
pub fn build(image: &Image<'_>) -> Result<Built> {
    let layer = archive::tar(image.files, "", image.time.0)?;
    let packed = archive::gzip(&layer)?;
    let labels = json!({
        "org.opencontainers.image.title": "apiscope",
        "org.opencontainers.image.version": image.version,
        "org.opencontainers.image.revision": image.revision,
        "org.opencontainers.image.created": image.time.1,
        "org.opencontainers.image.licenses": "Apache-2.0",
        "org.opencontainers.image.source": env!("CARGO_PKG_REPOSITORY"),
    });
    let config = json!({
        "architecture": image.architecture, "os": "linux", "created": image.time.1,
        "config": {
            "Entrypoint": ["/usr/bin/apiscope"], "Cmd": ["run"], "WorkingDir": "/", "User": "0",
            "Env": ["PATH=/usr/bin"], "Labels": labels,
        },
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{}", sha256(&layer))]},
        "history": [{"created": image.time.1, "created_by": "cargo xtask image"}],
    });
    let mut blobs = BTreeMap::new();
    let mut keep = |bytes: Vec<u8>, media: &str| {
        let digest = sha256(&bytes);
        let descriptor = json!({"mediaType": media, "digest": format!("sha256:{digest}"), "size": bytes.len()});
        blobs.insert(digest, bytes);
        descriptor
    };
    let (compressed, unpacked) = (packed.len(), layer.len());
    let (config, layer) = (keep(config.to_string().into_bytes(), CONFIG), keep(packed, LAYER));
    let manifest = json!({
        "schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [layer], "annotations": labels,
    });
    let mut subject = keep(manifest.to_string().into_bytes(), MANIFEST);
    let digest = subject["digest"].as_str().unwrap_or_default().to_owned();
    // The bill of materials refers to the image, as registries serve it to who asks for referrers.
    let empty = keep(b"{}".to_vec(), EMPTY);
    let sbom = keep(serde_json::to_vec_pretty(image.sbom)?, CYCLONEDX);
    let referrer = json!({
        "schemaVersion": 2, "mediaType": MANIFEST, "artifactType": CYCLONEDX, "config": empty, "layers": [sbom],
        "subject": subject, "annotations": {"org.opencontainers.image.created": image.time.1},
    });
    let mut referrer = keep(referrer.to_string().into_bytes(), MANIFEST);
    referrer["artifactType"] = json!(CYCLONEDX);
    subject["platform"] = json!({"architecture": image.architecture, "os": "linux"});
    let tag = image.name.rsplit(':').next().unwrap_or_default();
    subject["annotations"] = json!({
        "org.opencontainers.image.ref.name": tag, "io.containerd.image.name": image.name,
    });
    let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [subject, referrer]});
    let path = |descriptor: &Value| {
        format!("blobs/sha256/{}", descriptor["digest"].as_str().unwrap_or_default().trim_start_matches("sha256:"))
    };
    let docker = json!([{"Config": path(&config), "RepoTags": [image.name], "Layers": [path(&layer)]}]);
    let mut entries = vec![
        Entry::file("oci-layout", 0o644, json!({"imageLayoutVersion": "1.0.0"}).to_string()),
        Entry::file("index.json", 0o644, index.to_string()),
        Entry::file("manifest.json", 0o644, docker.to_string()),
        Entry::folder("blobs/"),
        Entry::folder("blobs/sha256/"),
    ];
    entries
        .extend(blobs.into_iter().map(|(digest, bytes)| Entry::file(&format!("blobs/sha256/{digest}"), 0o644, bytes)));
    Ok(Built { archive: archive::tar(&entries, "", image.time.0)?, digest, compressed, unpacked })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_digest_is_there_and_right() {
        let files = [Entry::folder("usr/"), Entry::file("usr/x", 0o755, vec![7; 10_000])];
        let sbom = json!({"bomFormat": "CycloneDX"});
        let image = Image {
            name: "example.com/a:1",
            architecture: "amd64",
            version: "1",
            revision: "0",
            time: (1, "1970-01-01T00:00:01Z"),
            files: &files,
            sbom: &sbom,
        };
        let built = build(&image).expect("short paths");
        assert_eq!(built.archive, build(&image).expect("short paths").archive, "reproducible");
        let mut found = BTreeMap::new();
        let mut archive = tar::Archive::new(built.archive.as_slice());
        for entry in archive.entries().expect("an archive") {
            let mut entry = entry.expect("whole");
            let path = entry.path().expect("a path").to_string_lossy().into_owned();
            let mut bytes = Vec::new();
            std::io::Read::read_to_end(&mut entry, &mut bytes).expect("readable");
            if let Some(digest) = path.strip_prefix("blobs/sha256/").filter(|d| !d.is_empty()) {
                assert_eq!(sha256(&bytes), digest);
            }
            found.insert(path, bytes);
        }
        let json = |path: &str| serde_json::from_slice::<Value>(&found[path]).expect("JSON");
        let index = json("index.json");
        for manifest in index["manifests"].as_array().expect("manifests") {
            let of = |d: &Value| format!("blobs/sha256/{}", &d["digest"].as_str().expect("a digest")[7..]);
            let manifest = json(&of(manifest));
            for part in manifest["layers"].as_array().expect("layers").iter().chain([&manifest["config"]]) {
                assert_eq!(found[&of(part)].len() as u64, part["size"].as_u64().expect("a size"));
            }
        }
    }
}
