//! OpenAPI documents: what was promised (`read`), in what it differs from what was seen (`diff`), and what was seen as
//! a document (`export`).
//!
//! Read are OpenAPI 3.0, 3.1 and Swagger 2.0, in JSON and YAML. Documents are not trusted: size, depth, count of
//! operations, aliases of YAML and chains of `$ref` are bounded, and a document is never the cause of a request.

mod diff;
mod export;
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
    read(&bytes).with_context(context)
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
}
