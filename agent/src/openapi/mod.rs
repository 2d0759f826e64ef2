//! OpenAPI documents: what was promised (`read`), in what it differs from what was seen (`diff`), and what was seen as
//! a document (`export`).
//!
//! Read are OpenAPI 3.0, 3.1 and Swagger 2.0, in JSON and YAML, in one file or split over several of a folder
//! (`files`). Documents are not trusted: size, depth, count of operations and files, aliases of YAML and chains of `$ref`
//! are bounded, no file outside of the folder is read, and a document is never the cause of a request.

mod diff;
mod export;
mod files;
mod read;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::Read as _,
    path::Path,
};

use anyhow::Context as _;

use crate::{config::RouteConfig, route::Routes};

pub use diff::{Difference, Kind, diff};
pub use export::export;
pub use files::MAX_FILES;
pub use read::{MAX_DOCUMENT, MAX_OPERATIONS, read};

/// What is used of a document.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Document {
    /// Its title.
    pub title: String,
    /// Operations, by path.
    pub operations: Vec<Operation>,
    /// What was passed over, as sentences.
    pub notes: Vec<String>,
}

/// One method of one path.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Operation {
    /// Upper case.
    pub method: String,
    /// With the base path of each server, `{…}` for parameters.
    pub templates: Vec<String>,
    /// Clients are asked not to use it any more.
    pub deprecated: bool,
    /// Kinds of credentials as [`crate::exchange::Auth`] names them; empty when none is asked for.
    pub auth: BTreeSet<String>,
    /// It is answered without one, too.
    pub open: bool,
    /// `security` is said, here or for the whole document.
    pub says_auth: bool,
    /// Statuses; hundreds (`200`..) of the ranges in [`Operation::ranges`].
    pub statuses: BTreeSet<u16>,
    /// `2XX`: 2.
    pub ranges: BTreeSet<u16>,
    /// `default` stands for any status, and so does a document without any.
    pub any_status: bool,
}

impl Document {
    /// Templates of all operations, the ones with the fewest parameters first: of two that fit the first is meant.
    #[must_use]
    pub fn templates(&self) -> Vec<&str> {
        let all: BTreeSet<&str> = self.operations.iter().flat_map(|o| &o.templates).map(String::as_str).collect();
        let mut all: Vec<_> = all.into_iter().collect();
        all.sort_by_key(|t| t.matches('{').count());
        all
    }
}

/// What finds routes, with the operator's patterns and documents. Several documents of a service are one.
///
/// # Errors
/// A document cannot be read.
pub fn routes(config: &RouteConfig) -> anyhow::Result<Routes> {
    let mut services = BTreeMap::<&str, Document>::new();
    for rule in &config.document {
        let document = open(&rule.file)?;
        for note in &document.notes {
            log::warn!("{}: {note}", rule.file.display());
        }
        services.entry(&rule.service).or_default().operations.extend(document.operations);
    }
    let mut routes = Routes::new(&config.patterns);
    for (service, document) in services {
        routes.set_documented(&service.into(), document.templates());
    }
    Ok(routes)
}

/// Reads a document from a file.
///
/// # Errors
/// The file cannot be read, or as [`read`].
pub fn open(path: &Path) -> anyhow::Result<Document> {
    let context = || format!("failed to read the document {}", path.display());
    let mut bytes = Vec::new();
    let file = File::open(path).with_context(context)?;
    file.take(MAX_DOCUMENT as u64 + 1).read_to_end(&mut bytes).with_context(context)?;
    read::read_beside(&bytes, files::Files::beside(path)).with_context(context)
}

/// Does a route fit a template? A parameter of the route needs one in the template; a word of the route fits a
/// parameter, too: it may be a value that was asked for often. Gives the number of words that are equal.
fn fits(template: &str, route: &str) -> Option<usize> {
    let (mut template, mut route) = (segments(template), segments(route));
    let mut equal = 0;
    loop {
        match (template.next(), route.next()) {
            (None, None) => return Some(equal),
            (Some(t), Some(r)) if t == r && !t.contains('{') => equal += 1,
            (Some(t), Some(r)) => {
                let (before, after) = (t.split_once('{')?.0, t.rsplit_once('}')?.1);
                let is_value = r.len() >= before.len() + after.len() && r.starts_with(before) && r.ends_with(after);
                if !is_value && !r.contains('{') {
                    return None;
                }
            }
            _ => return None,
        }
    }
}

fn segments(path: &str) -> impl Iterator<Item = &str> {
    path.split('/').filter(|s| !s.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fits() {
        for (template, route, equal) in [
            ("/a/{x}", "/a/{int}", Some(1)),
            ("/a/{x}", "/a/me", Some(1)),
            ("/a/me", "/a/{int}", None),
            ("/a/b", "/a/b/", Some(2)),
            ("/a/{x}.json", "/a/b.json", Some(1)),
            ("/a/{x}.json", "/a/b.xml", None),
            ("/a/{x}.json", "/a/{id}", Some(1)),
            ("/", "/", Some(0)),
            ("/a", "/a/b", None),
        ] {
            assert_eq!(fits(template, route), equal, "{template} {route}");
        }
    }

    #[test]
    fn a_document_in_several_files() {
        let folder = std::env::temp_dir().join(format!("apiscope-refs-{}", std::process::id()));
        std::fs::create_dir_all(folder.join("api/paths")).expect("writable");
        let write = |name: &str, text: &str| std::fs::write(folder.join(name), text).expect("writable");
        write("secret.yaml", "get: {responses: {200: {description: no}}}");
        write("api/all.json", r#"{"pets":{"$ref":"paths/pets.yaml#/list"},"loop":{"$ref":"all.json#/loop"}}"#);
        write(
            "api/paths/pets.yaml",
            "list: {$ref: '#/real'}\nreal: {get: {security: [{key: []}], responses: {200: {}}}}\n",
        );
        write("api/schemes.yaml", "key: {type: apiKey, in: header, name: x}");
        std::os::unix::fs::symlink("../secret.yaml", folder.join("api/link.yaml")).expect("a link");
        let document = "openapi: 3.1.0\npaths:\n  /pets: {$ref: all.json#/pets}\n  /a: {$ref: ../secret.yaml}\n  /b: {$ref: link.yaml}\n  \
            /c: {$ref: 'https://example.com/c.yaml'}\n  /d: {$ref: all.json#/loop}\n  /e: {$ref: missing.yaml}\n  \
            /f: {$ref: all.json#/nothing}\n  /g: {$ref: /etc/passwd}\n  /h: {$ref: paths}\n\
            components: {securitySchemes: {key: {$ref: schemes.yaml#/key}}}\n";
        write("api/openapi.yaml", document);
        let read = open(&folder.join("api/openapi.yaml")).expect("valid");
        std::fs::remove_dir_all(folder).expect("removable");
        assert_eq!(read.operations.len(), 1, "{read:?}");
        assert_eq!(read.operations[0].templates, ["/pets"]);
        assert!(read.operations[0].auth.contains("apikey"));
        assert_eq!(read.notes.len(), 8, "{:#?}", read.notes);
    }
}
