//! Archives that come out the same, byte for byte, for the same content: sorted as given, no times but the
//! one that is asked for, owned by root.

use std::io::Write as _;

use anyhow::{Context as _, Result};
use flate2::{Compression, GzBuilder};

/// One file, folder or link.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Path without a leading slash; a folder's ends with one.
    pub path: String,
    /// Permissions.
    pub mode: u32,
    /// Content; for a link, what it points to.
    pub content: Vec<u8>,
    /// A symbolic link.
    pub link: bool,
}

impl Entry {
    /// A file.
    pub fn file(path: &str, mode: u32, content: impl Into<Vec<u8>>) -> Self {
        Self { path: path.to_owned(), mode, content: content.into(), link: false }
    }

    /// A folder.
    pub fn folder(path: &str) -> Self {
        Self::file(path, 0o755, Vec::new())
    }
}

/// A tar archive. `prefix` goes before each path; `time` is in s since the epoch.
///
/// # Errors
/// A path is too long for the format.
pub fn tar(entries: &[Entry], prefix: &str, time: u64) -> Result<Vec<u8>> {
    let mut archive = tar::Builder::new(Vec::new());
    for entry in entries {
        let mut header = tar::Header::new_gnu();
        header.set_mtime(time);
        header.set_mode(entry.mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_username("root")?;
        header.set_groupname("root")?;
        let path = format!("{prefix}{}", entry.path);
        let added = if entry.link {
            header.set_entry_type(tar::EntryType::Symlink);
            header.set_size(0);
            archive.append_link(&mut header, &path, String::from_utf8_lossy(&entry.content).as_ref())
        } else {
            let folder = entry.path.ends_with('/');
            header.set_entry_type(if folder { tar::EntryType::Directory } else { tar::EntryType::Regular });
            header.set_size(entry.content.len() as u64);
            archive.append_data(&mut header, &path, entry.content.as_slice())
        };
        added.with_context(|| format!("failed to put {path} into an archive"))?;
    }
    archive.into_inner().context("failed to end an archive")
}

/// The same, compressed, without a time of its own.
///
/// # Errors
/// Never for content in memory.
pub fn gzip(content: &[u8]) -> Result<Vec<u8>> {
    let mut out = GzBuilder::new().mtime(0).write(Vec::new(), Compression::best());
    out.write_all(content)?;
    Ok(out.finish()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_content_is_the_same_archive() {
        let entries = [Entry::folder("usr/"), Entry::file("usr/x", 0o755, "content")];
        let one = gzip(&tar(&entries, "./", 7).expect("short")).expect("in memory");
        assert_eq!(one, gzip(&tar(&entries, "./", 7).expect("short")).expect("in memory"));
        assert_ne!(one, gzip(&tar(&entries, "./", 8).expect("short")).expect("in memory"));
    }
}
