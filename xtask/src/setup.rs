//! `cargo xtask setup`: finds or installs what a command needs. Every other command calls it.
//!
//! It keeps no stamp: it looks whether each thing is there, which takes milliseconds and cannot be out of
//! date. Only what could not be had is remembered, for [`REMEMBER`], so that `cargo xtask test` does not
//! ask a package manager in vain each time; `cargo xtask setup` asks again.

use std::{
    env, fs,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    path::PathBuf,
    process::{Command, Stdio},
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, anyhow, bail};
use clap::{Args, ValueEnum};

use crate::{cluster, collector, ebpf, helm, image, place, programs, root, step};

/// How long a refusal is believed.
const REMEMBER: Duration = Duration::from_secs(3600);
/// Longest time for a package manager, and for a tool that is compiled.
pub const LIMIT: Duration = Duration::from_secs(1200);
/// Version of cargo-deny.
pub const DENY: &str = "0.20.2";

/// What a command needs. Each level includes `run`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Level {
    /// Build and start the agent: stable Rust, nothing else.
    Run,
    /// Rebuild the eBPF programs: a compiler for them, and their linker.
    Ebpf,
    /// The checks of CI that are not tests: cargo-deny.
    Deny,
    /// The end-to-end tests' servers and clients.
    Test,
    /// What the tests of `cargo xtask test --long` run besides: Envoy, gRPC for Java.
    Long,
    /// The chart's checks: helm (five minutes to build) and kubeconform.
    Helm,
    /// A Kubernetes to test the chart in (some 20 minutes to build), with helm and a collector.
    Cluster,
    /// The emulator that boots other kernels.
    Vm,
    /// What builds for 64-bit ARM and emulates it (`cargo xtask vm --arch arm64`): 400 MB.
    Arm64,
    /// The measurements' server, load generator and bpftool.
    Bench,
}

/// What to set up.
#[derive(Debug, Args)]
pub struct Options {
    /// For which command; by default all but arm64 and cluster.
    #[arg(value_enum)]
    levels: Vec<Level>,
}

/// Runs the command.
///
/// # Errors
/// Something that has no substitute could not be had.
pub fn run(options: &Options) -> Result<()> {
    fs::remove_dir_all(place::cache("refused")?).ok();
    // Not arm64 and cluster: large, and of use to few.
    let all = [Level::Run, Level::Ebpf, Level::Deny, Level::Test, Level::Long, Level::Vm, Level::Helm, Level::Bench];
    let levels = if options.levels.is_empty() { &all[..] } else { &options.levels };
    for level in levels {
        need(*level)?;
        println!("{}: ready", level.to_possible_value().map_or_else(String::new, |v| v.get_name().to_owned()));
    }
    Ok(())
}

/// Makes sure that `level` can be served. What only some tests need is asked for, and its lack is said in
/// a line; what the level cannot do without is an error.
///
/// # Errors
/// A thing without a substitute could not be had.
pub fn need(level: Level) -> Result<()> {
    if env::consts::OS != "linux" {
        bail!("apiscope is a Linux program: {} is not supported", env::consts::OS);
    }
    match level {
        Level::Run => Ok(()),
        Level::Ebpf => toolchain(),
        Level::Deny => deny(),
        Level::Test => {
            packages(&TEST);
            if !validators()?.is_file() {
                once("validators", make_validators).unwrap_or_else(|e| say(&format!("no validators: {e:#}")));
            }
            modules();
            if !grpc_go()?.is_file() {
                once("grpc-go", make_grpc_go).unwrap_or_else(|e| say(&format!("no grpc-go: {e:#}")));
            }
            if !collector::binary()?.is_file() {
                collector();
            }
            Ok(())
        }
        Level::Long => {
            need(Level::Test)?;
            if !programs::envoy()?.is_file() {
                once("envoy", programs::fetch_envoy).unwrap_or_else(|e| say(&format!("no Envoy: {e:#}")));
            }
            if !programs::grpc_java()?.is_dir() {
                once("grpc-java", programs::fetch_grpc_java)
                    .unwrap_or_else(|e| say(&format!("no gRPC for Java: {e:#}")));
            }
            Ok(())
        }
        Level::Helm => {
            if helm::helm()?.is_file() && helm::kubeconform()?.is_file() {
                Ok(())
            } else {
                once("helm", helm::build)
            }
        }
        Level::Vm => {
            packages(&VM);
            Ok(())
        }
        Level::Arm64 => {
            required("arm64", &ARM64)?;
            if image::has_library(image::ARM64)? { Ok(()) } else { once("rust-std-arm64", library_of_arm64) }
        }
        Level::Cluster => {
            required("a cluster", &CLUSTER)?;
            if !collector::binary()?.is_file() {
                once("otelcol", collector::build)?;
            }
            if !cluster::are_built()? {
                once("kubernetes", cluster::build)?;
            }
            need(Level::Helm)
        }
        Level::Bench => {
            required("bench", &BENCH)?;
            if grpc_go()?.is_file() { Ok(()) } else { once("grpc-go", make_grpc_go) }
        }
    }
}

/// The cargo that runs this, in the root of the clone.
#[must_use]
pub fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(place::root());
    command
}

/// The installed cargo-deny.
///
/// # Errors
/// There is no cache folder.
pub fn cargo_deny() -> Result<PathBuf> {
    Ok(place::cache("tools")?.join(format!("cargo-deny-{DENY}/bin/cargo-deny")))
}

struct Package {
    program: &'static str,
    package: &'static str,
}

const fn from(program: &'static str, package: &'static str) -> Package {
    Package { program, package }
}

const TEST: [Package; 20] = [
    from("ip", "iproute2"),
    from("setpriv", "util-linux"),
    from("promtool", "prometheus"),
    from("nginx", "nginx-light"),
    from("wrk", "wrk"),
    from("curl", "curl"),
    from("wget", "wget"),
    from("h2load", "nghttp2-client"),
    from("nghttpd", "nghttp2-server"),
    from("apache2", "apache2-bin"),
    from("hypercorn", "python3-hypercorn"),
    from("openssl", "openssl"),
    from("node", "nodejs"),
    from("python3", "python3"),
    from("gcc", "gcc"),
    from("chromium", "chromium"),
    from("go", "golang-go"),
    from("selfserv", "libnss3-tools"),
    from("ruby", "ruby"),
    from("java", "default-jdk-headless"),
];

const VM: [Package; 1] = [from("qemu-system-x86_64", "qemu-system-x86")];

/// Emulator, C compiler (of ring) and linker, C library.
const ARM64: [Package; 2] =
    [from("qemu-system-aarch64", "qemu-system-arm"), from("aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu")];

/// The CNI plugins are in no PATH: one of them is looked for where Debian has it.
const CLUSTER: [Package; 9] = [
    from("/usr/lib/cni/bridge", "containernetworking-plugins"),
    from("etcd", "etcd-server"),
    from("containerd", "containerd"),
    from("runc", "runc"),
    from("ip", "iproute2"),
    from("nsenter", "util-linux"),
    from("openssl", "openssl"),
    from("bpftool", "bpftool"),
    from("go", "golang-go"),
];

const BENCH: [Package; 4] =
    [from("nginx", "nginx-light"), from("wrk", "wrk"), from("h2load", "nghttp2-client"), from("bpftool", "bpftool")];

fn packages(wanted: &[Package]) {
    let missing: Vec<&str> = wanted.iter().filter(|p| place::program(p.program).is_none()).map(|p| p.package).collect();
    if !missing.is_empty() {
        once(&missing.join("+"), || apt(&missing)).unwrap_or_else(|e| {
            say(&format!("could not install {}: {e:#}; what needs them is skipped", missing.join(", ")));
        });
    }
}

/// As [`packages`], where nothing can be done without one of them.
fn required(who: &str, wanted: &[Package]) -> Result<()> {
    packages(wanted);
    match wanted.iter().find(|p| place::program(p.program).is_none()) {
        Some(missing) => Err(anyhow!("{who} needs {}: install the package {}", missing.program, missing.package)),
        None => Ok(()),
    }
}

/// A Python with the public validators of what `apiscope inventory` writes, in a folder of its own.
///
/// # Errors
/// There is no cache folder.
pub fn validators() -> Result<PathBuf> {
    Ok(place::cache("tools")?.join("validators-1/bin/python"))
}

fn make_validators() -> Result<()> {
    const PACKAGES: [&str; 2] = ["openapi-spec-validator==0.9.0", "cyclonedx-python-lib[json-validation]==11.12.0"];
    programs::keep(&place::cache("tools")?.join("validators-1"), |partial| {
        let mut make = Command::new("python3");
        step::quietly("making a Python for validators", make.args(["-m", "venv"]).arg(partial), LIMIT)?;
        let mut install = Command::new(partial.join("bin/python"));
        install.args(["-m", "pip", "install", "-q"]).args(PACKAGES);
        step::quietly("installing the validators of OpenAPI and CycloneDX (once)", &mut install, LIMIT)
    })
}

/// Modules of Python that tests need, and Debian's packages of them.
const MODULES: [(&str, &str); 4] = [
    ("grpc", "python3-grpcio"),
    ("uvicorn", "python3-uvicorn"),
    ("httpx", "python3-httpx"),
    ("requests", "python3-requests"),
];

/// The Python in PATH has the modules that tests need, or Debian's has.
fn modules() {
    let has = |python: &str, module: &str| {
        let mut command = Command::new(python);
        command.args(["-c", &format!("import {module}")]).stdout(Stdio::null()).stderr(Stdio::null());
        command.status().is_ok_and(|s| s.success())
    };
    let all = |python: &str| MODULES.iter().all(|(module, _)| has(python, module));
    if all("python3") || all("/usr/bin/python3") {
        return;
    }
    let packages = MODULES.map(|(_, package)| package);
    once("python-modules", || apt(&packages))
        .unwrap_or_else(|e| say(&format!("could not install {}: {e:#}", packages.join(", "))));
}

/// The program of `tests/programs/grpc`, which the tests of grpc-go run: one for each state of its source.
///
/// # Errors
/// There is no cache folder, or the source cannot be read.
pub fn grpc_go() -> Result<PathBuf> {
    let mut state = DefaultHasher::new();
    for name in ["main.go", "go.mod", "go.sum"] {
        let path = grpc_source().join(name);
        fs::read(&path).with_context(|| format!("failed to read {}", path.display()))?.hash(&mut state);
    }
    Ok(place::cache("tools")?.join(format!("grpc-go-{:016x}", state.finish())))
}

fn grpc_source() -> PathBuf {
    place::root().join("tests/programs/grpc")
}

fn make_grpc_go() -> Result<()> {
    programs::keep(&grpc_go()?, |partial| {
        let mut build = Command::new("go");
        build.args(["build", "-trimpath", "-o"]).arg(partial).arg(".").current_dir(grpc_source());
        build.envs([("CGO_ENABLED", "0"), ("GOFLAGS", "-mod=readonly")]);
        step::quietly("building the program of grpc-go (once)", &mut build, LIMIT)
    })
}

fn collector() {
    let built = if place::program("go").is_some() {
        once("otelcol", collector::build)
    } else {
        Err(anyhow!("no Go here (1.25 or later)"))
    };
    if let Err(error) = built {
        say(&format!("no OpenTelemetry Collector: {error:#}; the tests that export to it are skipped"));
    }
}

fn toolchain() -> Result<()> {
    if ebpf::Compiler::find().is_none() {
        once("ebpf-compiler", || {
            let tried = match compiler_from_debian() {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            compiler_from_rustup().map_err(|error| {
                anyhow!(
                    "no rustc {} with its library's source: neither from Debian ({tried:#}) nor from rustup ({error:#})",
                    ebpf::RUSTC
                )
            })
        })?;
        ebpf::Compiler::find().with_context(|| format!("installed rustc {}, but it is not whole", ebpf::RUSTC))?;
    }
    if ebpf::linker()?.is_none() {
        install("bpf-linker", ebpf::LINKER)?;
    }
    Ok(())
}

fn compiler_from_debian() -> Result<()> {
    let policy = || step::output(Command::new("apt-cache").args(["policy", ebpf::DEBIAN[0]]));
    let offered = |text: &str| text.lines().any(|l| l.trim().starts_with(&format!("Candidate: {}", ebpf::RUSTC)));
    if !fs::read_to_string("/etc/os-release").unwrap_or_default().lines().any(|l| l == "ID=debian") {
        bail!("this is not Debian");
    }
    if !offered(&policy()?) {
        apt_update()?;
        if !offered(&policy()?) {
            bail!("its {} is another release", ebpf::DEBIAN[0]);
        }
    }
    apt(&ebpf::DEBIAN)
}

fn compiler_from_rustup() -> Result<()> {
    has_rustup(ebpf::RUSTC)?;
    let mut command = Command::new("rustup");
    command.args(["toolchain", "install", ebpf::RUSTC, "--profile", "minimal", "--component", "rust-src"]);
    step::quietly(&format!("installing Rust {} for eBPF", ebpf::RUSTC), &mut command, LIMIT)
}

/// rustup, and a server that has the release.
fn has_rustup(release: &str) -> Result<()> {
    let server = env::var("RUSTUP_DIST_SERVER").unwrap_or_else(|_| "https://static.rust-lang.org".to_owned());
    if place::program("rustup").is_none() {
        bail!("rustup is not installed");
    }
    // rustup itself would try for minutes.
    if place::program("curl").is_some() {
        let probe = format!("{server}/dist/channel-rust-{release}.toml.sha256");
        step::output(Command::new("curl").args(["-fsS", "--max-time", "8", "-o", "/dev/null", &probe]))
            .with_context(|| format!("{server} cannot be reached"))?;
    }
    Ok(())
}

/// Of the release in `rust-toolchain.toml`.
fn library_of_arm64() -> Result<()> {
    let version = step::output(Command::new("rustc").arg("-V"))?;
    let release = version.split(' ').nth(1).unwrap_or_default();
    let lack = || format!("Rust's standard library for {} is not here and could not be fetched", image::ARM64);
    has_rustup(release).with_context(lack)?;
    let mut add = Command::new("rustup");
    add.args(["target", "add", image::ARM64]).current_dir(place::root());
    step::quietly("installing Rust's standard library for arm64", &mut add, LIMIT).with_context(lack)
}

fn deny() -> Result<()> {
    if cargo_deny()?.is_file() { Ok(()) } else { install("cargo-deny", DENY) }
}

/// Compiles a tool into the cache: into a temporary folder first, so that an interrupted build is not
/// taken for a tool.
fn install(krate: &str, version: &str) -> Result<()> {
    let tools = place::cache("tools")?;
    let (partial, whole) = (tools.join(format!("{krate}-{version}.partial")), tools.join(format!("{krate}-{version}")));
    fs::remove_dir_all(&partial).ok();
    let mut command = cargo();
    command.args(["install", krate, "--version", version, "--locked", "--root"]).arg(&partial);
    command.env_remove("CARGO_TARGET_DIR").env_remove("RUSTFLAGS");
    step::quietly(&format!("building {krate} {version} (once)"), &mut command, LIMIT)?;
    fs::remove_dir_all(&whole).ok();
    fs::rename(&partial, &whole).with_context(|| format!("failed to move {krate} to {}", whole.display()))
}

fn apt_update() -> Result<()> {
    let mut update = root::command("apt-get", "installing packages")?;
    step::quietly("reading the package lists", update.args(["-q", "update"]), LIMIT)
}

/// Installs Debian packages without starting any service that they bring, and without removing anything.
fn apt(packages: &[&str]) -> Result<()> {
    if place::program("apt-get").is_none() {
        bail!("no apt-get here: install by hand {}", packages.join(" "));
    }
    apt_update()?;
    // A package asks `policy-rc.d` before it starts its daemon; 101 means no. One that the machine's owner
    // has is left alone; ours goes however this ends.
    const INSTALL: &str = "policy=/usr/sbin/policy-rc.d
        if [ ! -e $policy ]; then
            trap 'rm -f $policy' EXIT
            trap 'exit 130' INT TERM
            printf '#!/bin/sh\\nexit 101\\n' >$policy && chmod 755 $policy
        fi
        DEBIAN_FRONTEND=noninteractive apt-get -qy --no-install-recommends --no-remove install \"$@\"";
    let mut command = root::command("sh", "installing packages")?;
    command.args(["-c", INSTALL, "sh"]).args(packages);
    step::quietly(&format!("installing {}", packages.join(", ")), &mut command, LIMIT)
}

/// Tries `what` unless it failed a short while ago.
fn once(key: &str, what: impl FnOnce() -> Result<()>) -> Result<()> {
    let note = place::cache("refused")?.join(key);
    let recent = |at: SystemTime| at.elapsed().is_ok_and(|age| age < REMEMBER);
    if let Ok(reason) = fs::read_to_string(&note)
        && fs::metadata(&note).and_then(|m| m.modified()).is_ok_and(recent)
    {
        bail!("{reason} (`cargo xtask setup` tries again)");
    }
    what().inspect_err(|error| {
        fs::write(&note, format!("{error:#}")).ok();
    })
}

/// One line of what is missing.
fn say(line: &str) {
    eprintln!("  note: {line}");
}
