//! `cargo xtask image`: a container image without a container engine. `cargo xtask deb`: a Debian package.
//!
//! Both carry one static program (its C library linked in), so neither needs anything of the machine that it
//! comes to. The image is that program, the certificates of the public authorities, and a user database; no
//! shell, no package manager. Its time is the commit's: the same commit gives the same bytes.

pub mod archive;
mod deb;
mod oci;
mod sbom;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use clap::Args;

use self::archive::Entry;
use crate::{place, setup, sources::sha256, step};

/// Largest image, bytes, as it is pulled and as it is kept.
const MOST: usize = 40 << 20;
/// Usual name of the image.
const NAME: &str = concat!("ghcr.io/apiscope/apiscope:", env!("CARGO_PKG_VERSION"));
/// Where Debian and its kin keep the certificates of public authorities.
const AUTHORITIES: &str = "/etc/ssl/certs/ca-certificates.crt";
/// Targets that can be built, with their names in images and packages.
const TARGETS: [(&str, &str); 2] = [("x86_64-unknown-linux-gnu", "amd64"), (ARM64, "arm64")];
/// The target of 64-bit ARM.
pub const ARM64: &str = "aarch64-unknown-linux-gnu";

/// What to make.
#[derive(Debug, Args)]
pub struct Options {
    /// Architecture: amd64 or arm64 (needs that target's standard library and linker).
    #[arg(long, default_value = "amd64", value_parser = ["amd64", "arm64"])]
    arch: String,
    /// Name and tag of the image.
    #[arg(long, default_value = NAME)]
    name: String,
    /// A static program that was built before, instead of building it now.
    #[arg(long, value_name = "FILE")]
    program: Option<PathBuf>,
    /// Folder for what is made [default: target/dist].
    #[arg(long, value_name = "FOLDER")]
    output: Option<PathBuf>,
}

/// Makes the image.
///
/// # Errors
/// The build fails, or the image is too large.
pub fn image(options: &Options) -> Result<()> {
    archived(options).map(drop)
}

/// Makes the image of this machine's architecture under its usual name, of a program that was built before or is
/// built now; returns the archive.
///
/// # Errors
/// The build fails, or the image is too large.
pub fn made(program: Option<&Path>) -> Result<PathBuf> {
    let name = NAME.to_owned();
    let arch = if env::consts::ARCH == "aarch64" { "arm64" } else { "amd64" }.to_owned();
    archived(&Options { arch, name, program: program.map(Path::to_owned), output: None })
}

fn archived(options: &Options) -> Result<PathBuf> {
    let program = Program::get(options)?;
    let sbom = program.sbom()?;
    let mut files = vec![
        Entry::folder("etc/"),
        Entry::file("etc/group", 0o644, "root:x:0:\nnogroup:x:65534:\n"),
        Entry::file("etc/nsswitch.conf", 0o644, "hosts: files dns\n"),
        Entry::file(
            "etc/passwd",
            0o644,
            "root:x:0:0:root:/:/sbin/nologin\nnobody:x:65534:65534:nobody:/:/sbin/nologin\n",
        ),
    ];
    match fs::read(AUTHORITIES) {
        Ok(pem) => {
            files.extend(["etc/ssl/", "etc/ssl/certs/"].map(Entry::folder));
            files.push(Entry::file("etc/ssl/certs/ca-certificates.crt", 0o644, pem));
        }
        Err(e) => eprintln!("  note: {AUTHORITIES}: {e}: the image trusts only authorities that are mounted"),
    }
    files.extend(["run/", "usr/", "usr/bin/"].map(Entry::folder));
    files.push(Entry::file("usr/bin/apiscope", 0o755, program.bytes.clone()));
    files.extend(["usr/share/", "usr/share/doc/", "usr/share/doc/apiscope/"].map(Entry::folder));
    files.push(Entry::file("usr/share/doc/apiscope/LICENSE", 0o644, fs::read(place::root().join("LICENSE"))?));
    files.push(Entry::file("usr/share/doc/apiscope/sbom.cdx.json", 0o644, serde_json::to_vec_pretty(&sbom)?));
    let built = oci::build(&oci::Image {
        name: &options.name,
        architecture: &options.arch,
        version: env!("CARGO_PKG_VERSION"),
        revision: &program.revision,
        time: (program.time, &program.date),
        files: &files,
        sbom: &sbom,
    })?;
    let file = folder(options)?.join(format!("apiscope-{}-{}.oci.tar", env!("CARGO_PKG_VERSION"), options.arch));
    fs::write(&file, &built.archive).with_context(|| format!("failed to write {}", file.display()))?;
    fs::write(file.with_extension("").with_extension("cdx.json"), serde_json::to_vec_pretty(&sbom)?)?;
    let mib = |n: usize| format!("{:.1} MiB", n as f64 / f64::from(1 << 20));
    println!("{}", file.display());
    println!(
        "  {} {}: {} to pull, {} unpacked",
        options.name,
        built.digest,
        mib(built.compressed),
        mib(built.unpacked)
    );
    println!(
        "  load: ctr -n k8s.io images import FILE; podman load -i FILE; push: skopeo copy oci-archive:FILE:TAG docker://…"
    );
    if built.unpacked > MOST {
        bail!("the image is larger than {}", mib(MOST));
    }
    Ok(file)
}

/// Makes the Debian package.
///
/// # Errors
/// The build fails.
pub fn deb(options: &Options) -> Result<()> {
    let program = Program::get(options)?;
    let package = deb::build(&program, &serde_json::to_vec_pretty(&program.sbom()?)?)?;
    let file = folder(options)?.join(format!("apiscope_{}_{}.deb", env!("CARGO_PKG_VERSION"), options.arch));
    fs::write(&file, &package).with_context(|| format!("failed to write {}", file.display()))?;
    println!("{}: {:.1} MiB", file.display(), package.len() as f64 / f64::from(1 << 20));
    Ok(())
}

fn folder(options: &Options) -> Result<PathBuf> {
    let folder = options.output.clone().unwrap_or_else(|| place::target().join("dist"));
    fs::create_dir_all(&folder).with_context(|| format!("failed to make {}", folder.display()))?;
    Ok(folder)
}

/// The static program, and when and of what it was made.
#[derive(Debug)]
pub struct Program {
    /// Its target.
    target: &'static str,
    /// `amd64`, `arm64`.
    arch: String,
    bytes: Vec<u8>,
    revision: String,
    /// Time of the commit, s since the epoch, and as text.
    time: u64,
    date: String,
    /// As mail and changelogs write it.
    mail_date: String,
}

impl Program {
    fn get(options: &Options) -> Result<Self> {
        let arch = options.arch.clone();
        let target = TARGETS.iter().find(|(_, a)| *a == arch).map(|(t, _)| *t).context("an unknown architecture")?;
        let path = match &options.program {
            Some(path) => path.clone(),
            None => build(target)?,
        };
        let bytes = fs::read(&path).with_context(|| format!("failed to read {}", path.display()))?;
        match kind(&bytes) {
            Some((machine, false)) if machine == if arch == "amd64" { 62 } else { 183 } => {}
            Some((_, true)) => bail!("{} asks for a dynamic linker: it is not static", path.display()),
            _ => bail!("{} is no program for {arch}", path.display()),
        }
        let git = |arguments: &[&str]| {
            let mut command = Command::new("git");
            command.args(arguments).current_dir(place::root()).env("TZ", "UTC");
            step::output(&mut command).map(|t| t.trim().to_owned()).unwrap_or_default()
        };
        let time = git(&["log", "-1", "--format=%ct"]).parse().unwrap_or(0);
        let date = git(&["log", "-1", "--date=format-local:%Y-%m-%dT%H:%M:%SZ", "--format=%cd"]);
        let mail_date = git(&["log", "-1", "--format=%cD"]);
        Ok(Self { target, arch, bytes, revision: git(&["rev-parse", "HEAD"]), time, date, mail_date })
    }

    fn sbom(&self) -> Result<serde_json::Value> {
        let glibc = step::output(Command::new("ldd").arg("--version"))?;
        let glibc = glibc.lines().next().and_then(|l| l.rsplit(' ').next()).unwrap_or_default().to_owned();
        sbom::document(self.target, &sha256(&self.bytes), &[("glibc", glibc, "LGPL-2.1-or-later")])
    }
}

/// Builds the program with its C library linked in.
fn build(target: &str) -> Result<PathBuf> {
    Ok(link_static(target, &[("apiscope", "apiscope")])?.join("apiscope"))
}

/// Builds programs, each a package and a binary of it, for release with the C library linked in. Returns the folder
/// where they are.
///
/// # Errors
/// The target's standard library is not installed, or the build fails.
pub fn link_static(target: &str, programs: &[(&str, &str)]) -> Result<PathBuf> {
    if !has_library(target)? {
        bail!("Rust's standard library for {target} is not installed: `rustup target add {target}`");
    }
    // Of its own: the flags are others than those of the usual build, which would be thrown away.
    let folder = place::target().join("image");
    let mut build = setup::cargo();
    build.args(["build", "--release", "--locked", "--target", target]).arg("--target-dir").arg(&folder);
    for (package, binary) in programs {
        build.args(["--package", package, "--bin", binary]);
    }
    build.env("RUSTFLAGS", "-C target-feature=+crt-static").env("CARGO_PROFILE_RELEASE_STRIP", "debuginfo");
    if target.starts_with("aarch64") && env::consts::ARCH != "aarch64" {
        build.env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER", "aarch64-linux-gnu-gcc");
    }
    step::plainly(&mut build)?;
    Ok(folder.join(target).join("release"))
}

/// Is Rust's standard library for `target` installed?
///
/// # Errors
/// There is no rustc.
pub fn has_library(target: &str) -> Result<bool> {
    let libraries = step::output(Command::new("rustc").args(["--print", "target-libdir", "--target", target]))?;
    Ok(Path::new(libraries.trim()).is_dir())
}

/// Machine of a 64-bit ELF program (`e_machine`), and whether it asks for a dynamic linker (`PT_INTERP`).
fn kind(elf: &[u8]) -> Option<(u16, bool)> {
    const INTERPRETER: u32 = 3;
    let short = |at: usize| Some(u16::from_le_bytes(elf.get(at..at + 2)?.try_into().ok()?));
    if !elf.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let headers = usize::try_from(u64::from_le_bytes(elf.get(32..40)?.try_into().ok()?)).ok()?;
    let (size, count) = (usize::from(short(54)?), usize::from(short(56)?));
    let asks = (0..count).any(|i| {
        let at = headers.saturating_add(i * size);
        elf.get(at..at.saturating_add(4)).is_some_and(|t| t == INTERPRETER.to_le_bytes())
    });
    Some((short(18)?, asks))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_and_what_is_none() {
        let own = fs::read("/proc/self/exe").expect("this test");
        let machine = if env::consts::ARCH == "x86_64" { 62 } else { 183 };
        // Tests are linked dynamically.
        assert_eq!(kind(&own), Some((machine, true)));
        assert_eq!(kind(b"\x7fELF\x02\x01"), None);
        assert_eq!(kind(b"#!/bin/sh"), None);
    }
}
