//! `cargo xtask build`: the agent, or the eBPF object that is kept in the tree.

use std::{env, fs, path::Path};

use anyhow::{Context as _, Result, anyhow, bail};
use clap::Args;

use crate::{
    ebpf::{self, Compiler},
    place,
    setup::{self, Level},
    sources::{self, MANIFEST, Manifest, OBJECT, REBUILD},
    step, strip,
};

/// What to build.
#[derive(Debug, Args)]
pub struct Options {
    /// Build the eBPF programs and write agent-ebpf/apiscope.bpf.o and its manifest.
    #[arg(long)]
    ebpf: bool,
    /// With --ebpf: write nothing, fail if the object in the tree is not what the sources give.
    #[arg(long, requires = "ebpf")]
    check: bool,
}

/// Runs the command.
///
/// # Errors
/// The build or the check fails.
pub fn run(options: &Options) -> Result<()> {
    if !options.ebpf {
        setup::need(Level::Run)?;
        return agent();
    }
    if options.check { check() } else { write() }
}

/// Builds the agent for release.
///
/// # Errors
/// Cargo fails.
pub fn agent() -> Result<()> {
    step::plainly(setup::cargo().args(["build", "--release", "--locked", "--package", "apiscope"]))
}

/// Builds the agent as one who wants to see it now does: less optimized, in two thirds of the time.
///
/// # Errors
/// Cargo fails.
pub fn quick() -> Result<()> {
    step::plainly(setup::cargo().args(["build", "--profile", "quick", "--locked", "--package", "apiscope"]))
}

fn write() -> Result<()> {
    setup::need(Level::Ebpf)?;
    let compiler = Compiler::find().context("no eBPF toolchain after setup")?;
    let krate = place::ebpf_crate();
    let built = compiler.build(&krate, &place::target().join("ebpf"), false)?;
    let object = object(&built)?;
    let manifest = manifest(&compiler, &object)?;
    fs::write(krate.join(OBJECT), &object).with_context(|| format!("failed to write {OBJECT}"))?;
    fs::write(krate.join(MANIFEST), manifest.to_json()).with_context(|| format!("failed to write {MANIFEST}"))?;
    println!("agent-ebpf/{OBJECT}: {} bytes, sha256 {}", object.len(), &manifest.object[..16]);
    Ok(())
}

fn check() -> Result<()> {
    let krate = place::ebpf_crate();
    let kept = sources::verify(&krate).map_err(|e| anyhow!(e))?;
    println!("agent-ebpf/{OBJECT} belongs to the sources (sha256 {})", &kept.sources[..16]);
    if let Err(error) = setup::need(Level::Ebpf) {
        // Where merges are decided, a check that could not be made is no check.
        if env::var_os("CI").is_some() {
            return Err(error);
        }
        println!("note: the object was not rebuilt and compared: {error:#}");
        return Ok(());
    }
    let compiler = Compiler::find().context("no eBPF toolchain after setup")?;
    let built = compiler.build(&krate, &place::target().join("ebpf"), true)?;
    let object = object(&built)?;
    let fresh = manifest(&compiler, &object)?;
    if (&fresh.rustc, &fresh.llvm, &fresh.linker) != (&kept.rustc, &kept.llvm, &kept.linker) {
        println!(
            "note: it builds, but bytes are compared with the same compiler only: here {} with LLVM {}, there {} with LLVM {}",
            fresh.rustc, fresh.llvm, kept.rustc, kept.llvm
        );
        return Ok(());
    }
    if fresh.object != kept.object {
        bail!(
            "agent-ebpf/{OBJECT} is not what its sources give ({} bytes, sha256 {} built; {} kept; the built one is {}); run `{REBUILD}`",
            object.len(),
            &fresh.object[..16],
            &kept.object[..16],
            built.display()
        );
    }
    println!("agent-ebpf/{OBJECT} is byte for byte what the sources give");
    Ok(())
}

fn object(built: &Path) -> Result<Vec<u8>> {
    let linked = fs::read(built).with_context(|| format!("failed to read {}", built.display()))?;
    strip::without_dwarf(&linked)
}

fn manifest(compiler: &Compiler, object: &[u8]) -> Result<Manifest> {
    Ok(Manifest {
        sources: sources::digest_of_sources(&place::ebpf_crate())?,
        object: sources::sha256(object),
        rustc: compiler.version.clone(),
        llvm: compiler.llvm.clone(),
        linker: ebpf::LINKER.to_owned(),
    })
}
