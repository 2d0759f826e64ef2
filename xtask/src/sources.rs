//! The built eBPF object in the tree, and what it was built from.
//!
//! `agent-ebpf/apiscope.bpf.o` is kept in the tree so that nobody needs an eBPF toolchain to build the
//! agent; `agent-ebpf/apiscope.bpf.json` says which sources and which toolchain gave it. This file is
//! compiled twice: into `xtask`, which writes both, and into the agent's build script, which refuses an
//! object that is not what the sources give. So it knows no more than the standard library, SHA-256 and
//! JSON.

use std::{
    fmt::Write as _,
    fs, io,
    path::{Path, PathBuf},
};

use sha2::{Digest as _, Sha256};

/// The object's name in `agent-ebpf/`.
pub const OBJECT: &str = "apiscope.bpf.o";
/// The manifest's name in `agent-ebpf/`.
pub const MANIFEST: &str = "apiscope.bpf.json";
/// What rebuilds both; every complaint names it.
pub const REBUILD: &str = "cargo xtask build --ebpf";

/// What the object was made from and with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// [`digest_of_sources`] at build time.
    pub sources: String,
    /// SHA-256 of the object, hexadecimal.
    pub object: String,
    /// First line of `rustc -V`.
    pub rustc: String,
    /// The LLVM that compiled and linked.
    pub llvm: String,
    /// Version of bpf-linker.
    pub linker: String,
}

impl Manifest {
    /// Reads `apiscope.bpf.json` of the eBPF crate at `krate`.
    ///
    /// # Errors
    /// One line that says what is missing.
    pub fn read(krate: &Path) -> Result<Self, String> {
        let path = krate.join(MANIFEST);
        let text = fs::read_to_string(&path).map_err(|e| format!("{MANIFEST}: {e}"))?;
        let json: serde_json::Value = serde_json::from_str(&text).map_err(|e| format!("{MANIFEST}: {e}"))?;
        let field = |pointer: &str| {
            json.pointer(pointer)
                .and_then(serde_json::Value::as_str)
                .map(str::to_owned)
                .ok_or_else(|| format!("{MANIFEST} has no {pointer}"))
        };
        Ok(Self {
            sources: field("/sources/sha256")?,
            object: field("/object/sha256")?,
            rustc: field("/toolchain/rustc")?,
            llvm: field("/toolchain/llvm")?,
            linker: field("/toolchain/bpf-linker")?,
        })
    }

    /// The text of `apiscope.bpf.json`.
    #[must_use]
    pub fn to_json(&self) -> String {
        let json = serde_json::json!({
            "sources": { "sha256": self.sources },
            "object": { "sha256": self.object },
            "toolchain": { "rustc": self.rustc, "llvm": self.llvm, "bpf-linker": self.linker },
        });
        format!("{json:#}\n")
    }
}

/// Checks without a toolchain that the object in the tree is what the sources in the tree give.
///
/// # Errors
/// One line that says what is wrong and which command puts it right.
pub fn verify(krate: &Path) -> Result<Manifest, String> {
    let advice = format!("run `{REBUILD}`");
    let object = fs::read(krate.join(OBJECT)).map_err(|e| format!("agent-ebpf/{OBJECT}: {e}; {advice}"))?;
    let manifest = Manifest::read(krate).map_err(|e| format!("agent-ebpf/{e}; {advice}"))?;
    let sources = digest_of_sources(krate).map_err(|e| format!("agent-ebpf: {e}"))?;
    if manifest.sources != sources {
        return Err(format!("agent-ebpf/{OBJECT} is older than the eBPF sources; {advice}"));
    }
    if manifest.object != sha256(&object) {
        return Err(format!("agent-ebpf/{OBJECT} is not the object that {MANIFEST} describes; {advice}"));
    }
    Ok(manifest)
}

/// SHA-256 over `Cargo.toml`, `Cargo.lock` and every file of `src/`, names and lengths included.
///
/// # Errors
/// A file cannot be read.
pub fn digest_of_sources(krate: &Path) -> io::Result<String> {
    let mut hash = Sha256::new();
    for name in source_files(krate)? {
        let bytes = fs::read(krate.join(&name))?;
        hash.update(name.as_os_str().as_encoded_bytes());
        hash.update([0]);
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(&bytes);
    }
    Ok(hex(&hash.finalize()))
}

/// The files that [`digest_of_sources`] covers, relative to `krate`, sorted.
///
/// # Errors
/// A folder cannot be read.
pub fn source_files(krate: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = vec![PathBuf::from("Cargo.toml"), PathBuf::from("Cargo.lock")];
    let mut folders = vec![PathBuf::from("src")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(krate.join(&folder))? {
            let entry = entry?;
            let name = folder.join(entry.file_name());
            if entry.file_type()?.is_dir() {
                folders.push(name);
            } else if name.extension().is_some_and(|e| e == "rs") {
                files.push(name);
            }
        }
    }
    files.sort();
    Ok(files)
}

/// SHA-256 in hexadecimal.
#[must_use]
pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is missing, older or foreign is said in one line that names the command.
    #[test]
    fn an_object_that_is_not_of_these_sources() {
        let krate = std::env::temp_dir().join(format!("apiscope-sources-{}", std::process::id()));
        fs::create_dir_all(krate.join("src")).expect("a folder");
        let write = |name: &str, text: &str| fs::write(krate.join(name), text).expect("writable");
        for (name, text) in [("Cargo.toml", "[package]"), ("Cargo.lock", ""), ("src/main.rs", "fn main() {}")] {
            write(name, text);
        }
        let refused = |says: &str| {
            let line = verify(&krate).expect_err("it must be refused");
            assert!(line.contains(says) && line.contains(REBUILD) && line.lines().count() == 1, "{line}");
        };
        refused(OBJECT);
        write(OBJECT, "object");
        refused(MANIFEST);
        let manifest = Manifest {
            sources: digest_of_sources(&krate).expect("readable"),
            object: sha256(b"object"),
            rustc: "r".into(),
            llvm: "l".into(),
            linker: "k".into(),
        };
        write(MANIFEST, &manifest.to_json());
        assert_eq!(verify(&krate), Ok(manifest));
        write("src/main.rs", "fn main() { }");
        refused("older than the eBPF sources");
        write("src/main.rs", "fn main() {}");
        write(OBJECT, "another");
        refused("is not the object");
        write(MANIFEST, "{");
        refused(MANIFEST);
        fs::remove_dir_all(krate).expect("removable");
    }
}
