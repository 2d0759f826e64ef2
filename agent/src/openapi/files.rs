//! The other files of a document: what a `$ref` names beside it. Files of the document's own folder and of what is
//! below it, no others, and never anything over a network: a document is not trusted to say what is read or asked for.

use std::{
    collections::BTreeMap,
    fs::File,
    io::Read as _,
    path::{Component, Path, PathBuf},
};

use serde_json::Value;

use super::read;

/// Most other files of a document.
pub const MAX_FILES: usize = 1_000;

/// Files that were read, by their path from the document's folder.
#[derive(Debug, Default)]
pub struct Files {
    /// Its folder, canonical; `None`: the document is of no file, and has no others.
    folder: Option<PathBuf>,
    read: BTreeMap<PathBuf, Option<Value>>,
    /// Bytes that may still be read.
    left: usize,
}

/// Why a file is not read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// A URL, or a document that is of no file.
    #[error("it is not in this document, and nothing is fetched")]
    Elsewhere,
    /// It leads out of the folder.
    #[error("it is not in the document's folder")]
    Outside,
    /// Too many, or too long together.
    #[error("a document has at most {MAX_FILES} other files of {} MiB together", super::MAX_DOCUMENT >> 20)]
    TooMuch,
    /// It cannot be read.
    #[error("it cannot be read: {0}")]
    Unreadable(String),
}

impl Files {
    /// The files beside a document.
    #[must_use]
    pub fn beside(document: &Path) -> Self {
        let folder = document.parent().map(|p| if p.as_os_str().is_empty() { Path::new(".") } else { p });
        Self { folder: folder.and_then(|f| f.canonicalize().ok()), read: BTreeMap::new(), left: super::MAX_DOCUMENT }
    }

    /// The path from the document's folder of what `reference` names in the file `from`.
    ///
    /// # Errors
    /// It is a URL, or leads out of the folder.
    pub fn path(&self, from: &Path, reference: &str) -> Result<PathBuf, Refused> {
        if self.folder.is_none() || reference.contains("://") || reference.starts_with("//") {
            return Err(Refused::Elsewhere);
        }
        let mut path = from.parent().map_or_else(PathBuf::new, Path::to_path_buf);
        for part in Path::new(reference).components() {
            match part {
                Component::CurDir => {}
                Component::Normal(name) => path.push(name),
                Component::ParentDir if path.pop() => {}
                _ => return Err(Refused::Outside),
            }
        }
        Ok(path)
    }

    /// What is in a file; it is read once.
    ///
    /// # Errors
    /// It is outside of the folder (by a link, too), cannot be read, or is too much.
    pub fn get(&mut self, path: &Path) -> Result<&Value, Refused> {
        if !self.read.contains_key(path) {
            if self.read.len() >= MAX_FILES {
                return Err(Refused::TooMuch);
            }
            let value = self.load(path);
            // A failure is remembered too: a thousand references to it are one attempt.
            self.read.insert(path.to_owned(), value.as_ref().ok().cloned());
            value?;
        }
        let missing = || Refused::Unreadable("see above".into());
        self.read.get(path).and_then(Option::as_ref).ok_or_else(missing)
    }

    fn load(&mut self, path: &Path) -> Result<Value, Refused> {
        let unreadable = |e: &dyn std::fmt::Display| Refused::Unreadable(e.to_string());
        let folder = self.folder.as_ref().ok_or(Refused::Elsewhere)?;
        let whole = folder.join(path).canonicalize().map_err(|e| unreadable(&e))?;
        if !whole.starts_with(folder) {
            return Err(Refused::Outside);
        }
        // A pipe or a device would be waited for.
        if !whole.is_file() {
            return Err(unreadable(&"it is no file"));
        }
        let mut bytes = Vec::new();
        let file = File::open(whole).map_err(|e| unreadable(&e))?;
        file.take(self.left as u64 + 1).read_to_end(&mut bytes).map_err(|e| unreadable(&e))?;
        self.left = self.left.checked_sub(bytes.len()).ok_or(Refused::TooMuch)?;
        read::value(&bytes).map_err(|e| unreadable(&format!("{e:#}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_leads_out_of_the_folder_is_not_read() {
        let files = Files { folder: Some("/docs".into()), ..Files::default() };
        let path = |from: &str, reference: &str| files.path(Path::new(from), reference);
        assert_eq!(path("api.yaml", "paths/a.yaml"), Ok("paths/a.yaml".into()));
        assert_eq!(path("paths/a.yaml", "../shared/./b.yaml"), Ok("shared/b.yaml".into()));
        assert_eq!(path("api.yaml", "../b.yaml"), Err(Refused::Outside));
        assert_eq!(path("paths/a.yaml", "../../b.yaml"), Err(Refused::Outside));
        assert_eq!(path("api.yaml", "/etc/passwd"), Err(Refused::Outside));
        for url in ["https://example.com/a.yaml", "file:///etc/passwd", "//host/a"] {
            assert_eq!(path("api.yaml", url), Err(Refused::Elsewhere), "{url}");
        }
        assert_eq!(Files::default().path(Path::new(""), "a.yaml"), Err(Refused::Elsewhere));
    }
}
