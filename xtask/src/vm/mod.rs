//! `cargo xtask vm`: does the agent work on the kernels that people run? Boots Debian's kernels in an
//! emulator, each with an image that holds the agent and a test program (`tests/src/bin/guest.rs`), and
//! prints what worked where.
//!
//! The fast tier is 6.1 and 6.12. `--full` boots every kernel of [`kernels::ALL`] and adds TLS and HTTP/2 with
//! programs of Debian, churn, kill, missing types and privileges, and lockdown. Results that were measured are in
//! `RESULTS.md` beside this file.

mod debian;
mod image;
mod kernels;
mod machine;
mod table;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use clap::{Args, ValueEnum};

use self::{image::Image, kernels::Kernel, machine::Machine, table::Results};
use crate::{
    build,
    image::{ARM64, link_static},
    place,
    setup::{self, Level},
    step,
};

/// How long a guest may take for the fast tier and for all tests; one that takes longer hangs. A guest
/// with a processor for itself needs a quarter of it, nearly all of it in the verifier.
const DEADLINE: Duration = Duration::from_secs(400);
const DEADLINE_FULL: Duration = Duration::from_secs(1_200);
/// How long a guest may take to start when hardware virtualisation is tried.
const PROBE: Duration = Duration::from_secs(20);

/// Which kernels and tests.
#[derive(Debug, Args)]
pub struct Options {
    /// Only these kernels, such as 6.1 6.12; by default those of the tier.
    #[arg(long, num_args = 1.., value_name = "VERSION")]
    kernel: Vec<String>,
    /// Every kernel and every test, not only the fast tier.
    #[arg(long)]
    full: bool,
    /// Processor of the guest.
    #[arg(long, value_enum, default_value = "x86_64")]
    arch: Arch,
    /// A shell in the guest instead of the tests; `exit` ends it.
    #[arg(long)]
    shell: bool,
    /// Use hardware virtualisation if a guest starts with it. (That its device opens says nothing.)
    #[arg(long)]
    kvm: bool,
    /// Let the guest's clock count instructions, one a nanosecond: what programs cost is then told in instructions, the
    /// same each time. Slower.
    #[arg(long, conflicts_with = "kvm")]
    count: bool,
    /// Look for newer kernel packages; without it nothing is fetched that is there.
    #[arg(long)]
    update: bool,
    /// Only with the emulator and the kernels that are on this machine already; install and fetch none.
    #[arg(long)]
    if_cached: bool,
    /// Test this agent instead of building one.
    #[arg(long, value_name = "FILE")]
    agent: Option<PathBuf>,
    /// Only tests whose name contains this.
    #[arg(last = true)]
    filter: Option<String>,
}

/// Processor of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Arch {
    /// PC.
    #[value(name = "x86_64")]
    X86,
    /// 64-bit ARM.
    Arm64,
}

/// Runs the command.
///
/// # Errors
/// A kernel cannot be had or booted, or a test fails.
pub fn run(options: &Options) -> Result<()> {
    let kernels = chosen(options)?;
    if options.if_cached {
        let mut missing: Vec<_> = kernels.iter().filter(|k| !kernels::is_cached(k)).map(|k| k.version).collect();
        if options.full && !kernels::has_debian(options.arch) {
            missing.push("Debian's programs");
        }
        if Machine::find(options.arch, options.count).is_err() || !missing.is_empty() {
            println!(
                "vm: NOT CHECKED here: other kernels, since {}; without --if-cached it gets what is missing",
                if missing.is_empty() {
                    "the emulator is not installed".into()
                } else {
                    format!("{} are not in the cache", missing.join(" and "))
                }
            );
            return Ok(());
        }
    }
    setup::need(if options.arch == Arch::Arm64 { Level::Arm64 } else { Level::Vm })?;
    let machine = Machine::find(options.arch, options.count)?;
    let image = image(options)?;
    let started = Instant::now();
    let mut accelerated = options.kvm;
    let mut results = Results::default();
    for kernel in kernels {
        let boot = kernels::fetch(kernel, options.update)?;
        let machine = machine.with(&boot.vmlinuz, &image);
        if options.shell {
            return machine.shell();
        }
        let folder = place::target().join("vm").join(format!("{}-{}", kernel.version, options.arch.name()));
        fs::create_dir_all(&folder).with_context(|| format!("failed to make {}", folder.display()))?;
        if accelerated && !machine.run("vm.probe", PROBE, true, &folder, |_| {})?.ended {
            println!("  note: no guest starts with hardware virtualisation here; emulating");
            accelerated = false;
        }
        let deadline = if options.full || options.count { DEADLINE_FULL } else { DEADLINE };
        println!("{}: {}", kernel.version, boot.package);
        let run = machine.run(&settings(kernel, options), deadline, accelerated, &folder, |line| {
            if let Some(test) = table::progress(line) {
                println!("  {test}");
            }
        })?;
        results.add(kernel, &run, &folder)?;
    }
    print!("\n{results}");
    println!("{} s", started.elapsed().as_secs());
    let failures = results.failures();
    if failures > 0 {
        bail!("vm: {failures} failed");
    }
    if results.is_empty() {
        bail!("no test ran: nothing is called {}", options.filter.as_deref().unwrap_or_default());
    }
    Ok(())
}

fn chosen(options: &Options) -> Result<Vec<&'static Kernel>> {
    let all = || kernels::ALL.iter().filter(|k| k.arch == options.arch);
    for wanted in &options.kernel {
        if !all().any(|k| k.version == wanted) {
            let known: Vec<_> = all().map(|k| k.version).collect();
            bail!("no kernel {wanted} for {}; there are {}", options.arch.name(), known.join(", "));
        }
    }
    Ok(all()
        .filter(|k| match options.kernel.is_empty() {
            true => options.full || k.fast,
            false => options.kernel.iter().any(|w| w == k.version),
        })
        .collect())
}

/// The guest's part of the kernel's command line.
fn settings(kernel: &Kernel, options: &Options) -> String {
    let doors = kernel.doors.map(|(door, offered)| format!("{door}:{}", if offered { "yes" } else { "no" }));
    let full = if options.full { " vm.full" } else { "" };
    // Where there is a door the programs of TLS are accepted too.
    let tls = if kernel.doors.iter().any(|(_, offered)| *offered) { " vm.tls" } else { "" };
    let skips = if kernel.skips { " vm.skips" } else { "" };
    let filter = options.filter.as_ref().map_or_else(String::new, |f| format!(" vm.filter={f}"));
    format!("vm.doors={}{tls}{skips}{full}{filter}", doors.join(","))
}

/// Builds what runs in the guest and packs it. On this machine's own processor that is the very binary that
/// users get, with the libraries that it asks for.
fn image(options: &Options) -> Result<PathBuf> {
    let mut image = Image::default();
    let (agent, guest) = match options.arch {
        Arch::X86 => {
            let agent = match &options.agent {
                Some(agent) => agent.clone(),
                None => {
                    build::agent()?;
                    place::agent()
                }
            };
            let mut build = setup::cargo();
            step::plainly(build.args(["build", "--locked", "--package", "apiscope-tests", "--bin", "apiscope-guest"]))?;
            (agent, place::target().join("debug/apiscope-guest"))
        }
        Arch::Arm64 => {
            let wanted = [("apiscope", "apiscope"), ("apiscope-tests", "apiscope-guest")];
            let built = link_static(ARM64, &wanted[usize::from(options.agent.is_some())..])?;
            (options.agent.clone().unwrap_or_else(|| built.join("apiscope")), built.join("apiscope-guest"))
        }
    };
    image.program("/apiscope", &stripped(&agent, "apiscope", options.arch)?);
    image.program("/init", &stripped(&guest, "guest", options.arch)?);
    if options.arch == Arch::X86 {
        for library in libraries(&[&agent, &guest])? {
            image.program(&library.to_string_lossy(), &fs::read(&library)?);
        }
    }
    if options.full {
        debian::add(&mut image, options.arch)?;
        image.program("/go-tls", &stripped(&debian::go(options.arch)?, "go-tls", options.arch)?);
    }
    if options.shell {
        image.program("/bin/busybox", &fs::read(kernels::busybox(options.arch)?)?);
    }
    let file = place::target().join("vm").join(format!("image-{}.cpio", options.arch.name()));
    image.write(&file)?;
    Ok(file)
}

/// A program without its debug information, where `strip` is there to take it away: the guest unpacks the
/// image on a slow processor.
fn stripped(program: &Path, name: &str, arch: Arch) -> Result<Vec<u8>> {
    let small = place::target().join("vm").join(format!("{name}-{}", arch.name()));
    fs::create_dir_all(place::target().join("vm"))?;
    let strip = if arch == Arch::Arm64 { "aarch64-linux-gnu-strip" } else { "strip" };
    let stripped = Command::new(strip).arg("--strip-all").arg("-o").arg(&small).arg(program).output();
    let from = if stripped.is_ok_and(|out| out.status.success()) { &small } else { program };
    fs::read(from).with_context(|| format!("failed to read {}", from.display()))
}

/// The shared libraries that programs ask for, with their loader.
fn libraries(programs: &[&Path]) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for program in programs {
        for line in step::output(Command::new("ldd").arg(program))?.lines() {
            // `libc.so.6 => /lib/… (0x…)`, `/lib64/ld-linux-x86-64.so.2 (0x…)`, and the vDSO without a path.
            let path = line.rsplit("=> ").next().unwrap_or(line).trim().split(" (").next().unwrap_or_default();
            let path = PathBuf::from(path);
            if path.is_absolute() && !found.contains(&path) {
                found.push(path);
            }
        }
    }
    Ok(found)
}

impl Arch {
    /// As in `uname -m`, but for arm64, which Debian calls so.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::X86 => "x86_64",
            Self::Arm64 => "arm64",
        }
    }

    /// Debian's name.
    #[must_use]
    pub const fn debian(self) -> &'static str {
        match self {
            Self::X86 => "amd64",
            Self::Arm64 => "arm64",
        }
    }
}
