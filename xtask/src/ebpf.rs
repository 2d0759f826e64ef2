//! The toolchain that compiles for `bpfel-unknown-none`, and how to call it.
//!
//! Wanted: a rustc with its own library source (for `-Z build-std=core`) and a bpf-linker that speaks
//! its LLVM. Two places give that rustc: Debian's `rustc-web`, or rustup where its server can be reached.
//! Both are stable releases, so `RUSTC_BOOTSTRAP` opens `-Z`. bpf-linker loads the LLVM of that same
//! rustc, never "any libLLVM on the path", so that what is written is also what can be read.

use std::{
    env, fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

use crate::{place, step};

/// The release of rustc that compiles the programs. The agent's own is in `rust-toolchain.toml`.
pub const RUSTC: &str = "1.96.0";
/// The linker's version: must speak the LLVM of [`RUSTC`], which is 22.
pub const LINKER: &str = "0.10.4";
/// Debian's packages with [`RUSTC`].
pub const DEBIAN: [&str; 3] = ["rustc-web", "rust-web-src", "cargo-web"];
/// The one target.
pub const TARGET: &str = "bpfel-unknown-none";
/// How long cargo may take for the eBPF crate.
const LIMIT: Duration = Duration::from_secs(900);

/// A compiler that was found.
#[derive(Debug, Clone)]
pub struct Compiler {
    /// Its rustc.
    pub rustc: PathBuf,
    /// Its cargo.
    pub cargo: PathBuf,
    /// First line of `rustc -V`.
    pub version: String,
    /// Its LLVM's version.
    pub llvm: String,
    /// Folders that hold the library's sources, as the compiler may name them.
    sources: Vec<PathBuf>,
    /// Its libLLVM.
    library: PathBuf,
}

impl Compiler {
    /// The first of Debian's and rustup's that is the right release and whole.
    #[must_use]
    pub fn find() -> Option<Self> {
        let debian = || Self::at(Path::new("/usr/bin/rustc"), Path::new("/usr/bin/cargo"));
        let rustup = || {
            let which = |tool: &str| {
                let out = step::output(Command::new("rustup").args(["which", "--toolchain", RUSTC, tool])).ok()?;
                Some(PathBuf::from(out.trim()))
            };
            Self::at(&which("rustc")?, &which("cargo")?)
        };
        debian().or_else(rustup)
    }

    fn at(rustc: &Path, cargo: &Path) -> Option<Self> {
        if !rustc.is_file() || !cargo.is_file() {
            return None;
        }
        let verbose = step::output(clean(&mut Command::new(rustc)).arg("-vV")).ok()?;
        let field = |name: &str| verbose.lines().find_map(|l| l.strip_prefix(name)).map(|v| v.trim().to_owned());
        let version = verbose.lines().next()?.to_owned();
        if field("release:")? != RUSTC {
            return None;
        }
        let llvm = field("LLVM version:")?;
        let host = field("host:")?;
        let sysroot =
            PathBuf::from(step::output(clean(&mut Command::new(rustc)).args(["--print", "sysroot"])).ok()?.trim());
        let named = sysroot.join("lib/rustlib/src/rust");
        if !named.join("library/core/Cargo.toml").is_file() {
            return None;
        }
        let mut sources = vec![named.clone()];
        if let Ok(real) = named.canonicalize()
            && real != named
        {
            sources.push(real);
        }
        let major = llvm.split('.').next()?;
        let triplet = host.replace("-unknown", "");
        let library = [sysroot.join("lib"), Path::new("/usr/lib").join(triplet)]
            .iter()
            .find_map(|dir| library_in(dir, &format!("libLLVM.so.{major}.")))?;
        Some(Self { rustc: rustc.to_owned(), cargo: cargo.to_owned(), version, llvm, sources, library })
    }

    /// Compiles the programs of `krate` into `target` and returns the object.
    ///
    /// Two clones anywhere, on two machines with the same compiler, give the same bytes: paths of the
    /// crate become relative (the linker then still finds the source lines it stores beside the code, for
    /// the verifier's log), paths of the registry and of the library become fixed names.
    ///
    /// # Errors
    /// The linker is not installed, or the build fails; the message ends with the compiler's.
    pub fn build(&self, krate: &Path, target: &Path, locked: bool) -> Result<PathBuf> {
        let linker = linker()?.context("bpf-linker is not installed; run `cargo xtask setup ebpf`")?;
        let locked = if locked { &["--locked"][..] } else { &[] };
        let mut fetch = self.cargo(krate);
        step::quietly("fetching the eBPF crate's dependencies", fetch.arg("fetch").args(locked), LIMIT)?;

        let mut flags = vec!["-Cdebuginfo=2".to_owned(), "-Clink-arg=--btf".to_owned()];
        let mut remap = |from: &Path, to: &str| flags.push(format!("--remap-path-prefix={}={to}", from.display()));
        for source in &self.sources {
            remap(source, "/rust");
        }
        for registry in registries()? {
            remap(&registry, "/registry");
        }
        remap(krate, ".");

        let library = place::cache(&format!("llvm/{}", slug(&self.library)))?;
        let link = library.join("libLLVM.so");
        if fs::read_link(&link).ok().as_ref() != Some(&self.library) {
            fs::remove_file(&link).ok();
            symlink(&self.library, &link).with_context(|| format!("failed to link {}", link.display()))?;
        }
        let path = env::join_paths(
            linker
                .parent()
                .map(Path::to_path_buf)
                .into_iter()
                .chain(env::split_paths(&env::var_os("PATH").unwrap_or_default())),
        )?;
        let mut build = self.cargo(krate);
        build
            .args([
                "build",
                "--release",
                "-Zbuild-std=core",
                "--target",
                TARGET,
                "--bin",
                "apiscope-ebpf",
                "--target-dir",
            ])
            .arg(target)
            .args(locked)
            .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
            .env("LD_LIBRARY_PATH", library)
            .env("PATH", path);
        step::quietly("building the eBPF programs", &mut build, LIMIT)?;
        Ok(target.join(TARGET).join("release/apiscope-ebpf"))
    }

    fn cargo(&self, krate: &Path) -> Command {
        let mut command = Command::new(&self.cargo);
        clean(&mut command).current_dir(krate).env("RUSTC", &self.rustc).env("RUSTC_BOOTSTRAP", "1");
        command
    }
}

/// The installed linker of the right version.
///
/// # Errors
/// There is no cache folder.
pub fn linker() -> Result<Option<PathBuf>> {
    let file = place::cache("tools")?.join(format!("bpf-linker-{LINKER}/bin/bpf-linker"));
    Ok(file.is_file().then_some(file))
}

/// Takes away what the calling cargo and rustup put into the environment: it is meant for another
/// toolchain. What says where the registry is stays.
fn clean(command: &mut Command) -> &mut Command {
    const STAY: [&str; 5] = ["CARGO_HOME", "CARGO_NET_", "CARGO_HTTP_", "CARGO_REGISTR", "CARGO_SOURCE_"];
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        let toolchain =
            ["CARGO", "RUSTC", "RUSTDOC", "RUSTFLAGS", "RUSTUP_TOOLCHAIN"].iter().any(|p| text.starts_with(p));
        if (toolchain && !STAY.iter().any(|p| text.starts_with(p))) || text == "LD_LIBRARY_PATH" {
            command.env_remove(&name);
        }
    }
    command
}

/// Where cargo unpacks crates: one folder per registry, named by a hash that depends on how it is reached.
fn registries() -> Result<Vec<PathBuf>> {
    let home = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo")))
        .context("neither CARGO_HOME nor HOME is set")?;
    let mut found = Vec::new();
    if let Ok(folders) = fs::read_dir(home.join("registry/src")) {
        for folder in folders {
            found.push(folder?.path());
        }
    }
    found.sort();
    if found.is_empty() {
        bail!("no unpacked crates in {}", home.display());
    }
    Ok(found)
}

fn library_in(dir: &Path, prefix: &str) -> Option<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir(dir)
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix)))
        .collect();
    found.sort();
    found.into_iter().next()
}

fn slug(path: &Path) -> String {
    path.to_string_lossy().trim_start_matches('/').replace('/', "-")
}
