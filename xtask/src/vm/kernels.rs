//! The kernels, and how to get them: Debian's packages, unpacked into the cache. Nothing is installed and
//! no foreign architecture is added: apt works on a configuration, lists and a status file of its own.
//!
//! Packages are found through Debian's meta-packages, or as the newest of a series: old versions leave the
//! archive. What is in the cache is used as it is, so that all of this works offline.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

use super::Arch;
use crate::{place, step};

/// How long apt may take.
const LIMIT: Duration = Duration::from_secs(300);
/// Debian's keys.
const KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// A kernel that is tested.
#[derive(Debug)]
pub struct Kernel {
    /// As `--kernel` names it.
    pub version: &'static str,
    /// Its processor.
    pub arch: Arch,
    /// A part of the fast tier.
    pub fast: bool,
    /// Doors in the order in which they are tried, and whether this kernel offers them.
    pub doors: [(&'static str, bool); 3],
    /// It puts threads aside within itself (`PREEMPT(lazy)`): by fexit it skips a send while another's program is on the
    /// processor, which the agent counts.
    pub skips: bool,
    archive: Archive,
    suite: &'static str,
    /// Meta-package, or beginning of the name of the newest of a series.
    package: &'static str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Archive {
    Debian,
    Security,
}

const ALL_DOORS: [(&str, bool); 3] = [("tp_btf", true), ("fexit", true), ("kprobe", true)];
/// Before Linux 6.3.
const NO_TRACEPOINTS: [(&str, bool); 3] = [("tp_btf", false), ("fexit", true), ("kprobe", true)];
/// arm64 before 6.4.
const KPROBES_ONLY: [(&str, bool); 3] = [("tp_btf", false), ("fexit", false), ("kprobe", true)];
/// Before 5.17: no `bpf_loop`.
const NONE: [(&str, bool); 3] = [("tp_btf", false), ("fexit", false), ("kprobe", false)];

/// Every kernel, old to new.
pub const ALL: [Kernel; 7] = [
    Kernel {
        version: "5.10",
        arch: Arch::X86,
        fast: false,
        doors: NONE,
        skips: false,
        archive: Archive::Security,
        suite: "bullseye-security",
        package: "linux-image-cloud-amd64",
    },
    Kernel {
        version: "6.1",
        arch: Arch::X86,
        fast: true,
        doors: NO_TRACEPOINTS,
        skips: false,
        archive: Archive::Security,
        suite: "bookworm-security",
        package: "linux-image-cloud-amd64",
    },
    Kernel {
        version: "6.12",
        arch: Arch::X86,
        fast: true,
        doors: ALL_DOORS,
        skips: false,
        archive: Archive::Security,
        suite: "bookworm-security",
        package: "linux-image-6.12-cloud-amd64",
    },
    Kernel {
        version: "6.18",
        arch: Arch::X86,
        fast: false,
        doors: ALL_DOORS,
        skips: true,
        archive: Archive::Debian,
        suite: "trixie-backports",
        package: "linux-image-6.18.",
    },
    Kernel {
        version: "7.3",
        arch: Arch::X86,
        fast: false,
        doors: ALL_DOORS,
        skips: true,
        archive: Archive::Debian,
        suite: "trixie-backports",
        // From 7 on the kernel is not in linux-image, which depends on it.
        package: "linux-binary-7.3.",
    },
    Kernel {
        version: "6.1",
        arch: Arch::Arm64,
        fast: false,
        doors: KPROBES_ONLY,
        skips: false,
        archive: Archive::Security,
        suite: "bookworm-security",
        package: "linux-image-cloud-arm64",
    },
    Kernel {
        version: "6.12",
        arch: Arch::Arm64,
        fast: false,
        doors: ALL_DOORS,
        skips: false,
        archive: Archive::Security,
        suite: "bookworm-security",
        package: "linux-image-6.12-cloud-arm64",
    },
];

/// A kernel in the cache.
#[derive(Debug)]
pub struct Boot {
    /// The kernel itself.
    pub vmlinuz: PathBuf,
    /// Package and version.
    pub package: String,
}

/// Is this kernel in the cache?
#[must_use]
pub fn is_cached(kernel: &Kernel) -> bool {
    let folder = place::cache(&format!("vm/{}-{}", kernel.version, kernel.arch.name()));
    folder.is_ok_and(|f| f.join("vmlinuz").is_file() && f.join("package").is_file())
}

/// The kernel from the cache; fetched when it is not there, or when a newer one is asked for.
///
/// # Errors
/// The archive cannot be reached, or has no such package.
pub fn fetch(kernel: &Kernel, update: bool) -> Result<Boot> {
    let folder = place::cache(&format!("vm/{}-{}", kernel.version, kernel.arch.name()))?;
    let (vmlinuz, note) = (folder.join("vmlinuz"), folder.join("package"));
    if !update && let (true, Ok(package)) = (vmlinuz.is_file(), fs::read_to_string(&note)) {
        return Ok(Boot { vmlinuz, package });
    }
    let apt = Apt::new(kernel.archive, kernel.suite, kernel.arch)?;
    let package = apt.resolve(kernel)?;
    let unpacked = apt.unpack(&package, &folder)?;
    // From Linux 7 on it is among its modules.
    let modules =
        fs::read_dir(unpacked.join("usr/lib/modules")).into_iter().flatten().filter_map(|e| Some(e.ok()?.path()));
    let from = std::iter::once(unpacked.join("boot"))
        .chain(modules)
        .filter_map(|folder| fs::read_dir(folder).ok())
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz")))
        .with_context(|| format!("{package} holds no kernel"))?;
    fs::rename(from, &vmlinuz)?;
    fs::remove_dir_all(&unpacked)?;
    fs::write(&note, &package)?;
    Ok(Boot { vmlinuz, package })
}

/// A static busybox, for `--shell`.
///
/// # Errors
/// As [`fetch`].
pub fn busybox(arch: Arch) -> Result<PathBuf> {
    let folder = place::cache(&format!("vm/busybox-{}", arch.name()))?;
    let file = folder.join("busybox");
    if !file.is_file() {
        let apt = Apt::new(Archive::Debian, "bookworm", arch)?;
        let unpacked = apt.unpack("busybox-static", &folder)?;
        fs::rename(unpacked.join("bin/busybox"), &file)?;
        fs::remove_dir_all(&unpacked)?;
    }
    Ok(file)
}

/// What of Debian the guests' tests of TLS and HTTP/2 run.
pub const PROGRAMS: [(&str, &str); 3] =
    [("nginx", "/usr/sbin/nginx"), ("curl", "/usr/bin/curl"), ("nghttp2-client", "/usr/bin/nghttp")];

/// A folder with these and all that they depend on, as Debian installs it.
///
/// # Errors
/// As [`fetch`].
pub fn debian(arch: Arch) -> Result<PathBuf> {
    let folder = place::cache(&format!("vm/debian-{}", arch.name()))?;
    let whole = folder.join("root");
    if !has_debian(arch) {
        let apt = Apt::new(Archive::Debian, "bookworm", arch)?;
        let unpacked = apt.unpack_all(&PROGRAMS.map(|(package, _)| package), &folder)?;
        fs::remove_dir_all(&whole).ok();
        fs::rename(unpacked, &whole)?;
    }
    Ok(whole)
}

/// Is that folder in the cache?
#[must_use]
pub fn has_debian(arch: Arch) -> bool {
    place::cache(&format!("vm/debian-{}", arch.name()))
        .is_ok_and(|f| PROGRAMS.iter().all(|(_, path)| f.join(format!("root{path}")).is_file()))
}

/// apt on lists of its own, for one suite and processor.
struct Apt {
    configuration: PathBuf,
}

impl Apt {
    fn new(archive: Archive, suite: &str, arch: Arch) -> Result<Self> {
        for tool in ["apt-get", "dpkg-deb"] {
            if place::program(tool).is_none() {
                bail!("{tool} is not here: kernels come from Debian's packages; run this on Debian or a derivative");
            }
        }
        if !Path::new(KEYS).is_file() {
            bail!("{KEYS} is not here: install the package debian-archive-keyring");
        }
        let folder = place::cache(&format!("vm/apt-{suite}-{}", arch.name()))?;
        for below in ["lists/partial", "cache/archives/partial", "parts"] {
            fs::create_dir_all(folder.join(below))?;
        }
        fs::write(folder.join("status"), "")?;
        let sources = format!("deb [signed-by={KEYS}] {} {suite} main\n", archive.address());
        fs::write(folder.join("sources.list"), sources)?;
        let (here, debian) = (folder.display(), arch.debian());
        let text = format!(
            "Dir::State \"{here}\";\nDir::State::Lists \"{here}/lists\";\nDir::State::status \"{here}/status\";\n\
             Dir::Cache \"{here}/cache\";\nDir::Etc::main \"/dev/null\";\nDir::Etc::parts \"{here}/parts\";\n\
             Dir::Etc::sourcelist \"{here}/sources.list\";\nDir::Etc::sourceparts \"{here}/parts\";\n\
             APT::Architecture \"{debian}\";\nAPT::Architectures \"{debian}\";\nAPT::Sandbox::User \"\";\n\
             Acquire::Languages \"none\";\n"
        );
        let configuration = folder.join("apt.conf");
        fs::write(&configuration, text)?;
        let apt = Self { configuration };
        let what = format!("reading the package lists of {suite} ({debian})");
        step::quietly(&what, apt.command("apt-get").args(["-q", "update"]), LIMIT)?;
        Ok(apt)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("APT_CONFIG", &self.configuration).env("LC_ALL", "C");
        command
    }

    /// The package that a meta-package stands for, or the newest of a series.
    fn resolve(&self, kernel: &Kernel) -> Result<String> {
        if !kernel.package.ends_with('.') {
            let text = step::output(self.command("apt-cache").args(["show", kernel.package]))?;
            let depends = text.lines().find_map(|l| l.strip_prefix("Depends: ")).unwrap_or_default();
            let package = depends.split([' ', ',']).find(|word| word.starts_with("linux-image-"));
            return package.map(str::to_owned).with_context(|| format!("{} stands for no kernel", kernel.package));
        }
        let names = step::output(self.command("apt-cache").args(["pkgnames", kernel.package]))?;
        let ending = format!("-cloud-{}", kernel.arch.debian());
        newest(names.lines().filter(|name| name.ends_with(&ending)))
            .with_context(|| format!("{} has no {}*{ending}", kernel.suite, kernel.package))
    }

    /// Fetches a package and unpacks it below `folder`.
    fn unpack(&self, package: &str, folder: &Path) -> Result<PathBuf> {
        let unpacked = folder.join("unpacked");
        fs::remove_dir_all(&unpacked).ok();
        fs::create_dir_all(&unpacked)?;
        let mut fetch = self.command("apt-get");
        fetch.args(["-q", "download", package]).current_dir(folder);
        step::quietly(&format!("fetching {package}"), &mut fetch, LIMIT)?;
        let archive = fs::read_dir(folder)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.extension().is_some_and(|e| e == "deb"))
            .with_context(|| format!("apt fetched no {package}"))?;
        let mut unpack = Command::new("dpkg-deb");
        step::quietly(&format!("unpacking {package}"), unpack.arg("-x").arg(&archive).arg(&unpacked), LIMIT)?;
        fs::remove_file(archive)?;
        Ok(unpacked)
    }

    /// Fetches packages with all that they depend on and unpacks them below `folder`.
    fn unpack_all(&self, packages: &[&str], folder: &Path) -> Result<PathBuf> {
        let unpacked = folder.join("unpacked");
        let archives = self.configuration.with_file_name("cache").join("archives");
        fs::remove_dir_all(&unpacked).ok();
        fs::create_dir_all(&unpacked)?;
        let mut fetch = self.command("apt-get");
        // No package is installed as far as this apt knows: it fetches the C library and all.
        fetch.args(["-qy", "--download-only", "--no-install-recommends", "install"]).args(packages);
        step::quietly(&format!("fetching {} and what they need", packages.join(", ")), &mut fetch, LIMIT)?;
        let mut found: Vec<_> = fs::read_dir(&archives)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.extension().is_some_and(|e| e == "deb"))
            .collect();
        found.sort();
        for archive in found {
            step::output(Command::new("dpkg-deb").arg("-x").arg(&archive).arg(&unpacked))?;
            fs::remove_file(archive)?;
        }
        Ok(unpacked)
    }
}

impl Archive {
    /// Where this machine gets it from, else Debian's own address.
    fn address(self) -> String {
        let (ending, default) = match self {
            Self::Debian => ("/debian", "http://deb.debian.org/debian"),
            Self::Security => ("/debian-security", "http://deb.debian.org/debian-security"),
        };
        let known = step::output(Command::new("apt-get").args([
            "indextargets",
            "--format",
            "$(REPO_URI)",
            "Created-By: Packages",
        ]));
        known
            .unwrap_or_default()
            .lines()
            .map(|line| line.trim_end_matches('/'))
            .find(|line| line.ends_with(ending))
            .map_or_else(|| default.to_owned(), str::to_owned)
    }
}

/// By the numbers in their names.
fn newest<'a>(names: impl Iterator<Item = &'a str>) -> Option<String> {
    let numbers = |name: &str| -> Vec<u64> {
        name.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
    };
    names.max_by_key(|name| numbers(name)).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_is_not_the_last_in_the_alphabet() {
        let names = ["linux-image-6.18.9+deb13-cloud-amd64", "linux-image-6.18.12+deb13-cloud-amd64"];
        assert_eq!(newest(names.into_iter()).as_deref(), Some(names[1]));
        assert_eq!(newest([].into_iter()), None);
    }

    #[test]
    fn the_fast_tier_is_two_kernels_and_no_kernel_comes_twice() {
        assert_eq!(ALL.iter().filter(|k| k.fast).map(|k| k.version).collect::<Vec<_>>(), ["6.1", "6.12"]);
        for (i, kernel) in ALL.iter().enumerate() {
            assert!(!ALL[..i].iter().any(|k| k.version == kernel.version && k.arch == kernel.arch));
        }
    }
}
