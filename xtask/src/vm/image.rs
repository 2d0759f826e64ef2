//! An initramfs: the archive that the kernel unpacks as its first file system ("newc" cpio, see
//! `Documentation/driver-api/early-userspace/buffer-format.rst` of Linux). Written here because it is
//! sixty lines, and a `cpio` program could not make device nodes without root.

use std::{collections::BTreeSet, fs, path::Path};

use anyhow::{Context as _, Result};

const FOLDER: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const CHARACTER_DEVICE: u32 = 0o020_600;

/// An archive under way.
#[derive(Debug, Default)]
pub struct Image {
    bytes: Vec<u8>,
    folders: BTreeSet<String>,
    entries: u32,
}

impl Image {
    /// Adds an executable file at an absolute path, with the folders above it.
    pub fn program(&mut self, path: &str, content: &[u8]) {
        self.folders_of(path);
        self.entry(path.trim_start_matches('/'), PROGRAM, (0, 0), content);
    }

    /// Adds an empty folder, with those above it.
    pub fn folder(&mut self, path: &str) {
        self.folders_of(&format!("{path}/."));
    }

    /// Ends the archive and writes it.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(mut self, file: &Path) -> Result<()> {
        // Without it the first process has no standard output.
        self.folders_of("/dev/console");
        self.entry("dev/console", CHARACTER_DEVICE, (5, 1), b"");
        self.entry("TRAILER!!!", 0, (0, 0), b"");
        fs::write(file, &self.bytes).with_context(|| format!("failed to write {}", file.display()))
    }

    fn folders_of(&mut self, path: &str) {
        let path = path.trim_start_matches('/');
        for (at, _) in path.match_indices('/') {
            let folder = path[..at].to_owned();
            if self.folders.insert(folder.clone()) {
                self.entry(&folder, FOLDER, (0, 0), b"");
            }
        }
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.entries += 1;
        let size = u32::try_from(content.len()).unwrap_or(u32::MAX);
        let length = u32::try_from(name.len() + 1).unwrap_or(u32::MAX);
        // Number, mode, owner, group, links, time, size, device of the file, device it is, name, checksum.
        let fields = [self.entries, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, length, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_folders_come_once() {
        let mut image = Image::default();
        image.program("/lib/a", b"abc");
        image.program("/lib/b", b"");
        let text = String::from_utf8(image.bytes.clone()).expect("ASCII");
        assert_eq!(image.bytes.len() % 4, 0);
        assert_eq!(text.matches("070701").count(), 3);
        assert!(text.contains("lib/a\0abc") || text.contains("lib/a\0\0abc") || text.contains("abc"));
    }
}
