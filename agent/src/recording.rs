//! Recordings: every exchange as NDJSON, into a file or standard output. A thread of its own writes,
//! so that a slow disk does not hold up the capture; what it cannot take is dropped and counted.

use std::{
    fs::File,
    io::{self, Write},
    path::Path,
    sync::{
        Arc,
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    thread::JoinHandle,
};

use anyhow::Context as _;

use crate::{
    exchange::{Exchange, PathForm, json::Lines},
    stats::{Loss, Stats},
};

/// Bytes that are handed to the writer at once.
const BLOCK: usize = 256 << 10;
/// Blocks that may wait for it.
const WAITING: usize = 64;

/// A recording that is being written.
pub struct Recording {
    block: Vec<u8>,
    lines: u64,
    text: Lines,
    form: PathForm,
    key: [u8; 32],
    sender: Option<SyncSender<Vec<u8>>>,
    /// Blocks that are written: their memory is used again.
    written: Receiver<Vec<u8>>,
    writer: Option<JoinHandle<io::Result<()>>>,
    stats: Arc<Stats>,
}

impl Recording {
    /// Records into `path`; `-` is standard output.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn start(path: &Path, form: PathForm, stats: Arc<Stats>) -> anyhow::Result<Self> {
        let mut out: Box<dyn Write + Send> = if path == Path::new("-") {
            Box::new(io::stdout())
        } else {
            Box::new(File::create(path).with_context(|| format!("failed to make the recording {}", path.display()))?)
        };
        let mut key = [0; 32];
        if form == PathForm::Hmac {
            io::Read::read_exact(&mut File::open("/dev/urandom")?, &mut key)
                .context("failed to make a key for paths")?;
        }
        let (sender, blocks) = sync_channel::<Vec<u8>>(WAITING);
        let (back, written) = sync_channel(WAITING);
        let writer = std::thread::Builder::new().name("recording".into()).spawn(move || {
            let write = |block: Vec<u8>| {
                out.write_all(&block)?;
                // Blocks that are not needed again go.
                let _ = back.try_send(block);
                Ok(())
            };
            let written = blocks.into_iter().try_for_each(write).and_then(|()| out.flush());
            // Said now: the end, where it is an error, may be days away.
            written
                .inspect_err(|e| log::error!("the recording ends here, all later exchanges are counted as lost: {e}"))
        })?;
        Ok(Self {
            block: Vec::with_capacity(BLOCK + 4096),
            lines: 0,
            text: Lines::default(),
            form,
            key,
            sender: Some(sender),
            written,
            writer: Some(writer),
            stats,
        })
    }

    /// Adds one exchange with its route.
    pub fn add(&mut self, exchange: &Exchange, route: &str) {
        match self.form {
            PathForm::Raw => self.text.write(exchange, exchange.path.as_deref(), &mut self.block),
            PathForm::Template => self.text.write(exchange, Some(route), &mut self.block),
            PathForm::Hmac => {
                let path = exchange.path.as_deref().map(|path| hashed(path, route, &self.key));
                self.text.write(exchange, path.as_deref(), &mut self.block);
            }
        }
        self.lines += 1;
        if self.block.len() >= BLOCK {
            self.flush();
        }
    }

    /// Hands what there is to the writer.
    pub fn flush(&mut self) {
        let Some(sender) = self.sender.as_ref().filter(|_| !self.block.is_empty()) else { return };
        let mut next = self.written.try_recv().unwrap_or_else(|_| Vec::with_capacity(BLOCK + 4096));
        next.clear();
        match sender.try_send(std::mem::replace(&mut self.block, next)) {
            Ok(()) => self.lines = 0,
            Err(TrySendError::Full(block)) if block.len() < 8 * BLOCK => self.block = block,
            Err(_) => {
                self.stats.lose(Loss::Recording, self.lines);
                self.lines = 0;
            }
        }
    }

    /// Writes everything out.
    ///
    /// # Errors
    /// The disk is full, the pipe closed.
    pub fn finish(mut self) -> anyhow::Result<()> {
        if let Some(sender) = self.sender.take() {
            // The writer may have ended with an error: that is what is returned.
            let _ = sender.send(std::mem::take(&mut self.block));
        }
        match self.writer.take().map(JoinHandle::join) {
            Some(Ok(result)) => result.context("failed to write the recording"),
            _ => anyhow::bail!("the thread that writes the recording failed"),
        }
    }
}

/// The route with a keyed hash in place of each parameter: equal ids stay equal, and unreadable.
fn hashed(path: &str, route: &str, key: &[u8; 32]) -> String {
    use hmac::{Hmac, KeyInit as _, Mac as _};
    let mut out = String::with_capacity(path.len() + 16);
    let parts = path.split('/').filter(|s| !s.is_empty());
    for (segment, template) in parts.zip(route.split('/').filter(|s| !s.is_empty())) {
        out.push('/');
        if template.starts_with('{') {
            let Ok(mut mac) = Hmac::<sha2::Sha256>::new_from_slice(key) else { continue };
            mac.update(segment.as_bytes());
            for byte in &mac.finalize().into_bytes()[..8] {
                out.push_str(&format!("{byte:02x}"));
            }
        } else {
            out.push_str(segment);
        }
    }
    if out.is_empty() { "/".into() } else { out }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashed_paths_keep_their_shape_and_hide_their_ids() {
        let one = hashed("/users/42/orders/7", "/users/{int}/orders/{int}", &[1; 32]);
        assert_eq!(one, hashed("/users/42/orders/7", "/users/{int}/orders/{int}", &[1; 32]));
        assert_ne!(one, hashed("/users/42/orders/7", "/users/{int}/orders/{int}", &[2; 32]));
        assert!(one.starts_with("/users/") && one.contains("/orders/") && !one.contains("42"));
    }
}
