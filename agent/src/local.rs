//! The agent's unix socket, where `apiscope top` asks. One request a connection: a line that names what
//! is wanted (`snapshot`, `inventory`, `health`), answered by one line of JSON. Root only (mode 0600).

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    os::unix::{
        fs::{FileTypeExt as _, PermissionsExt as _},
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, bail};

use std::sync::{Arc, atomic::Ordering};

use serde::{Deserialize, Serialize};

use crate::{inventory::Inventory, stats::Stats, table::Snapshot};

/// A client that does not ask or read within this time is left.
const PATIENCE: Duration = Duration::from_secs(2);
/// Longest request line, bytes.
const MAX_REQUEST: u64 = 256;
/// Longest answer that a client reads, bytes.
const MAX_ANSWER: u64 = 64 << 20;

/// The listening socket; its file is removed when this is dropped.
pub struct Socket {
    listener: UnixListener,
    path: PathBuf,
    stats: Arc<Stats>,
}

/// How the agent is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// Every probe is attached.
    pub ready: bool,
    /// The capture thread is at work.
    pub alive: bool,
}

impl Socket {
    /// Listens at `path`. A file that a dead agent left is replaced.
    ///
    /// # Errors
    /// Another agent answers there, or the file cannot be made.
    pub fn bind(path: &Path) -> anyhow::Result<Self> {
        if let Some(folder) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
            fs::create_dir_all(folder).with_context(|| format!("failed to make the folder {}", folder.display()))?;
        }
        if path.exists() {
            if UnixStream::connect(path).is_ok() {
                bail!("another agent runs at {}: stop it, or give this one another --socket", path.display());
            }
            if !fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket()) {
                bail!("{} exists and is no socket: name another --socket, or remove it", path.display());
            }
            fs::remove_file(path).with_context(|| format!("failed to replace {}", path.display()))?;
        }
        let listener = UnixListener::bind(path).with_context(|| format!("failed to listen at {}", path.display()))?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
        Ok(Self { listener, path: path.to_owned(), stats: Arc::default() })
    }

    /// Tells of this agent's health.
    #[must_use]
    pub fn with_stats(mut self, stats: Arc<Stats>) -> Self {
        self.stats = stats;
        self
    }

    /// Answers requests until `over` says so; `snapshot` and `inventory` make the answers.
    pub fn serve(
        &self,
        snapshot: impl Fn() -> Option<String>,
        inventory: impl Fn() -> Option<String>,
        over: impl Fn() -> bool,
    ) {
        for stream in self.listener.incoming() {
            if over() {
                return;
            }
            // A client that fails has only itself to blame.
            if let Ok(stream) = stream
                && let Err(e) = answer(stream, &self.stats, &snapshot, &inventory)
            {
                log::debug!("a request at the local socket failed: {e}");
            }
        }
    }

    /// Where it listens.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = fs::remove_file(&self.path);
    }
}

fn answer(
    mut stream: UnixStream,
    stats: &Stats,
    snapshot: &impl Fn() -> Option<String>,
    inventory: &impl Fn() -> Option<String>,
) -> anyhow::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut line = String::new();
    BufReader::new((&stream).take(MAX_REQUEST)).read_line(&mut line)?;
    let answer = match line.trim_end() {
        "snapshot" => snapshot().unwrap_or_else(|| r#"{"error":"the agent is busy"}"#.into()),
        "inventory" => inventory().unwrap_or_else(|| r#"{"error":"the agent is busy"}"#.into()),
        "health" => {
            let ready = stats.ready.load(Ordering::Relaxed);
            serde_json::to_string(&Health { ready, alive: stats.is_alive() })?
        }
        _ => r#"{"error":"unknown request: ask for snapshot, inventory or health"}"#.into(),
    };
    stream.write_all(answer.as_bytes())?;
    stream.write_all(b"\n")?;
    Ok(())
}

/// Asks a running agent for its state.
///
/// # Errors
/// Nothing answers at `path`, or not as an agent does.
pub fn snapshot(path: &Path) -> anyhow::Result<Snapshot> {
    ask(path, "snapshot")
}

/// Asks a running agent for all that it knows, earlier runs included.
///
/// # Errors
/// As [`snapshot`].
pub fn inventory(path: &Path) -> anyhow::Result<Inventory> {
    ask(path, "inventory")
}

/// Asks a running agent how it is.
///
/// # Errors
/// As [`snapshot`].
pub fn health(path: &Path) -> anyhow::Result<Health> {
    ask(path, "health")
}

fn ask<T: serde::de::DeserializeOwned>(path: &Path, what: &str) -> anyhow::Result<T> {
    let mut stream = UnixStream::connect(path).with_context(|| {
        format!("no agent answers at {}: start one with `apiscope run`, or name its --socket", path.display())
    })?;
    stream.set_read_timeout(Some(2 * PATIENCE))?;
    stream.write_all(format!("{what}\n").as_bytes())?;
    let mut text = String::new();
    BufReader::new(stream.take(MAX_ANSWER)).read_line(&mut text)?;
    serde_json::from_str(&text).with_context(|| {
        format!("the agent's answer is not understood: {}", text.chars().take(120).collect::<String>())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn asked_answered_and_cleaned_up() {
        let path = std::env::temp_dir().join(format!("apiscope-test-{}.sock", std::process::id()));
        let socket = Socket::bind(&path).expect("free");
        assert!(Socket::bind(&path).is_err_and(|e| e.to_string().contains("another agent")));
        let text = serde_json::to_string(&Snapshot { ready: true, ..Snapshot::default() }).expect("serializable");
        let over = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                socket.serve(|| Some(text.clone()), || None, || over.load(std::sync::atomic::Ordering::Relaxed));
            });
            for garbage in [&b"\xff\xfe\n"[..], b"", &[b'x'; 10_000]] {
                let mut stream = UnixStream::connect(&path).expect("listens");
                let _ = stream.write_all(garbage);
            }
            assert!(snapshot(&path).expect("an answer").ready);
            assert_eq!(health(&path).expect("an answer"), Health { ready: false, alive: false });
            over.store(true, std::sync::atomic::Ordering::Relaxed);
            let _ = UnixStream::connect(&path);
        });
        drop(socket);
        assert!(!path.exists());
        std::fs::write(&path, "precious").expect("writable");
        assert!(Socket::bind(&path).is_err_and(|e| e.to_string().contains("is no socket")));
        assert_eq!(std::fs::read_to_string(&path).expect("still there"), "precious");
        std::fs::remove_file(path).expect("removable");
    }
}
