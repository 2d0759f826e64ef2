//! Where things are: the clone, the target folder, the cache outside the clone.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

/// The root of the clone. Asked at run time, so that a moved clone does not build its old self.
#[must_use]
pub fn root() -> PathBuf {
    let xtask =
        env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    xtask.parent().map_or_else(|| PathBuf::from("."), Path::to_path_buf)
}

/// The eBPF crate.
#[must_use]
pub fn ebpf_crate() -> PathBuf {
    root().join("agent-ebpf")
}

/// The workspace's target folder.
#[must_use]
pub fn target() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |dir| root().join(dir))
}

/// The release build of the agent.
#[must_use]
pub fn agent() -> PathBuf {
    target().join("release/apiscope")
}

/// The agent as [`crate::build::quick`] builds it.
#[must_use]
pub fn quick_agent() -> PathBuf {
    target().join("quick/apiscope")
}

/// Tools that take long to build live outside the clone, in a folder keyed by name and version, so that
/// a second clone finds them.
///
/// # Errors
/// Neither `XDG_CACHE_HOME` nor `HOME` is set, or the folder cannot be made.
pub fn cache(folder: &str) -> Result<PathBuf> {
    let base = env::var_os("XDG_CACHE_HOME")
        .filter(|dir| Path::new(dir).is_absolute())
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")))
        .context("neither XDG_CACHE_HOME nor HOME is set: no place for built tools")?;
    let dir = base.join("apiscope").join(folder);
    fs::create_dir_all(&dir).with_context(|| format!("failed to make {}", dir.display()))?;
    Ok(dir)
}

/// The first file of that name in `PATH` or the system's own folders (`/usr/sbin` is not in every `PATH`).
#[must_use]
pub fn program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}
