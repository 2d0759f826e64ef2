//! Servers and clients of Debian in the guest's image, as in a container: below [`ROOT`], with the libraries that they
//! ask for, and a configuration. What the guest does with them is in `tests/src/bin/guest/programs.rs`.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result};

use super::{Arch, image::Image, kernels};
use crate::{place, programs, step};

/// Where the guest has them.
const ROOT: &str = "/debian";
/// How long Go may take.
const LIMIT: Duration = Duration::from_secs(300);
/// HTTP/1.1 and HTTP/2 over TLS, and HTTP/2 in plaintext.
const NGINX: &str = "daemon off;
master_process off;
user root;
error_log stderr;
pid /tmp/nginx.pid;
events { worker_connections 64; }
http {
    access_log off;
    client_body_temp_path /tmp/body;
    proxy_temp_path /tmp/proxy;
    fastcgi_temp_path /tmp/fastcgi;
    uwsgi_temp_path /tmp/uwsgi;
    scgi_temp_path /tmp/scgi;
    keepalive_requests 1000;
    ssl_certificate /etc/cert.pem;
    ssl_certificate_key /etc/key.pem;
    server { listen 127.0.0.1:8443 ssl http2; listen 127.0.0.1:8080 http2; location / { return 200 \"hello from the guest\"; } }
}
";

/// Adds them.
///
/// # Errors
/// The packages cannot be had, or there is no openssl for a certificate.
pub fn add(image: &mut Image, arch: Arch) -> Result<()> {
    let root = kernels::debian(arch)?;
    let mut wanted: Vec<PathBuf> = kernels::PROGRAMS.iter().map(|(_, path)| PathBuf::from(path)).collect();
    let mut known = BTreeSet::new();
    while let Some(path) = wanted.pop() {
        if !known.insert(path.clone()) {
            continue;
        }
        let here = within(&root, &path)?;
        let content = fs::read(&here).with_context(|| format!("failed to read {}", here.display()))?;
        image.program(&format!("{ROOT}{}", path.display()), &content);
        wanted.extend(needed(&root, &here, arch)?);
    }
    let folder = place::target().join("vm");
    certificate(&folder)?;
    for name in ["cert.pem", "key.pem"] {
        image.program(&format!("{ROOT}/etc/{name}"), &fs::read(folder.join(name))?);
    }
    image.program(&format!("{ROOT}/etc/nginx.conf"), NGINX.as_bytes());
    image.program(&format!("{ROOT}/etc/passwd"), b"root:x:0:0:root:/:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n");
    image.program(&format!("{ROOT}/etc/group"), b"root:x:0:\nnogroup:x:65534:\n");
    for below in ["tmp", "dev", "var/log/nginx", "var/lib/nginx"] {
        image.folder(&format!("{ROOT}/{below}"));
    }
    Ok(())
}

/// The Go program of the tests of TLS, for the guest's processor.
///
/// # Errors
/// There is no Go, or it does not build.
pub fn go(arch: Arch) -> Result<PathBuf> {
    let program = place::target().join("vm").join(format!("go-tls-{}", arch.name()));
    let mut build = programs::go_tls(&program)?;
    step::quietly("building a program of Go", build.envs([("GOOS", "linux"), ("GOARCH", arch.debian())]), LIMIT)?;
    Ok(program)
}

/// The file of a path below `root`, whose links are of that root.
fn within(root: &Path, path: &Path) -> Result<PathBuf> {
    let mut here = root.join(path.strip_prefix("/").unwrap_or(path));
    for _ in 0..8 {
        let Ok(target) = fs::read_link(&here) else { break };
        here = match target.strip_prefix("/") {
            Ok(target) => root.join(target),
            Err(_) => here.parent().context("a link has a folder")?.join(target),
        };
    }
    Ok(here)
}

/// The libraries that a program or library asks for, and its loader, as paths below `root`.
fn needed(root: &Path, file: &Path, arch: Arch) -> Result<Vec<PathBuf>> {
    let triplet = if arch == Arch::Arm64 { "aarch64-linux-gnu" } else { "x86_64-linux-gnu" };
    let text = step::output(Command::new("readelf").env("LC_ALL", "C").args(["-W", "-d", "-l"]).arg(file))?;
    let mut found = Vec::new();
    for line in text.lines() {
        let bracketed = |start: &str| line.split_once(start)?.1.split_once(']').map(|(name, _)| name.trim());
        if let Some(loader) = bracketed("[Requesting program interpreter:") {
            found.push(PathBuf::from(loader));
        } else if line.contains("(NEEDED)")
            && let Some(name) = bracketed("[")
        {
            let folders = ["/lib", "/usr/lib"].map(|f| PathBuf::from(f).join(triplet));
            let place = folders.iter().map(|f| f.join(name)).find(|p| within(root, p).is_ok_and(|p| p.is_file()));
            found.push(place.with_context(|| format!("{} asks for {name}, which is not there", file.display()))?);
        }
    }
    Ok(found)
}

fn certificate(folder: &Path) -> Result<()> {
    let mut make = Command::new("openssl");
    make.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]);
    make.args(["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]);
    make.args(["-keyout", "key.pem", "-out", "cert.pem"]).current_dir(folder);
    step::output(&mut make).map(|_| ())
}
