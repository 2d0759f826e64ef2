//! Recorded exchanges and access logs through the same routes and endpoints as live ones.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, BufRead, BufReader, BufWriter, Write as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Context as _;
use serde::Serialize;

use crate::{
    accesslog,
    aggregate::{EndpointView, Endpoints},
    config::Config,
    detect::{Coverage, Engine, Finding},
    exchange::{Exchange, Method},
    openapi,
    params::ParamHasher,
    route::{self, Routes},
};

/// Longest line that is read; the rest of a longer one is passed over and the line counted.
const MAX_LINE: u64 = 1 << 20;
/// Reasons for unreadable lines that are told apart.
const MAX_REASONS: usize = 32;

/// What a replay found.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// Lines read.
    pub lines: u64,
    /// Exchanges among them.
    pub exchanges: u64,
    /// Lines that were no exchange, by reason.
    pub unreadable: BTreeMap<String, u64>,
    /// Endpoints, most used first.
    pub endpoints: Vec<EndpointView>,
    /// Findings, the open and most severe first.
    pub findings: Vec<Finding>,
    /// Which detectors are armed, learning or blind.
    pub coverage: Vec<Coverage>,
}

/// Replays `files` in order; `routes` gets the route of each line, `-` for an unreadable one.
///
/// # Errors
/// A file cannot be read or written. Lines that are no exchange are counted, not errors.
pub fn replay(files: &[PathBuf], config: &Config, routes: Option<&Path>) -> anyhow::Result<Report> {
    let out = match routes {
        Some(path) => {
            let file = File::create(path).with_context(|| format!("failed to make {}", path.display()))?;
            Some(BufWriter::new(file))
        }
        None => None,
    };
    let mut report = Report::default();
    let mut finder = openapi::routes(&config.routes)?;
    let mut endpoints = Endpoints::new(config.limits.endpoints, None);
    let mut detectors = config.detect.enabled.then(|| Engine::new(&config.detect)).transpose()?;
    // What is replayed is in the files already: the hashes need no secret, but be the same every time.
    let hasher = ParamHasher::new([0; 16]);
    let mut last = 0;
    let mut asked = Vec::new();
    for path in files {
        let context = || format!("failed to read {}", path.display());
        let stdin = path == Path::new("-");
        let mut input: Box<dyn BufRead> = if stdin {
            Box::new(io::stdin().lock())
        } else {
            Box::new(BufReader::with_capacity(1 << 20, File::open(path).with_context(context)?))
        };
        let service = path.file_stem().map_or_else(|| "log".into(), |s| s.to_string_lossy().into_owned());
        let mut line = Vec::new();
        while next_line(&mut input, &mut line).with_context(context)? {
            report.lines += 1;
            let exchange = if line.len() as u64 > MAX_LINE {
                Err("longer than 1 MiB".to_owned())
            } else if line.trim_ascii_start().first() == Some(&b'{') {
                Exchange::from_json(&line).map_err(|e| reason(&e))
            } else if line.trim_ascii().is_empty() {
                Err("empty".to_owned())
            } else {
                accesslog::parse(line.trim_ascii(), &service).map_err(str::to_owned)
            };
            match exchange {
                Ok(exchange) => {
                    let route = finder.route(&exchange);
                    if out.is_some() {
                        asked.push(Some(Asked::new(&exchange)));
                    }
                    for service in finder.changed() {
                        endpoints.reroute(&service, |method, route| finder.current(&service, method, route));
                    }
                    let endpoint = endpoints.record(&exchange, &route.template, route.source);
                    if let (Some(detectors), Some(at)) = (&mut detectors, endpoint) {
                        let params = hasher.params(exchange.path.as_deref().unwrap_or_default(), &route.template);
                        detectors.observe(&exchange, at, &route.template, &params);
                    }
                    report.exchanges += 1;
                    last = last.max(exchange.ts);
                }
                Err(why) => {
                    if out.is_some() {
                        asked.push(None);
                    }
                    let known = report.unreadable.len() < MAX_REASONS || report.unreadable.contains_key(&why);
                    *report.unreadable.entry(if known { why } else { "other".into() }).or_default() += 1;
                }
            }
        }
    }
    finder.settle();
    for service in finder.changed() {
        endpoints.reroute(&service, |method, route| finder.current(&service, method, route));
    }
    if let Some(mut out) = out {
        for line in &asked {
            match line {
                Some(asked) => writeln!(out, "{}", asked.route(&mut finder))?,
                None => writeln!(out, "-")?,
            }
        }
        out.flush()?;
    }
    report.endpoints = endpoints.view(last);
    if let Some(detectors) = &mut detectors {
        detectors.tick(last / 1_000_000_000 + 60);
        (report.findings, report.coverage) = (detectors.view(), detectors.coverage());
    }
    report.endpoints.sort_by(|a, b| b.requests.cmp(&a.requests).then_with(|| a.route.cmp(&b.route)));
    Ok(report)
}

/// What the final route of a line is asked with: routes are known when the last line was read.
struct Asked {
    service: Arc<str>,
    method: Method,
    path: Option<Arc<str>>,
}

impl Asked {
    fn new(exchange: &Exchange) -> Self {
        Self { service: exchange.service.clone(), method: exchange.method.clone(), path: exchange.path.clone() }
    }

    fn route(&self, routes: &mut Routes) -> String {
        let Some(path) = self.path.as_deref() else { return route::UNKNOWN.into() };
        routes.current(&self.service, &self.method, path).template.replace(['\n', '\r', '\t'], " ")
    }
}

/// What is wrong with a JSON line, without its position and values, so that equal faults are one reason.
fn reason(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let text = text.split(" at line").next().unwrap_or_default();
    match text.split_once(": ") {
        Some(("invalid type", rest)) => {
            format!("invalid type, expected {}", rest.rsplit("expected ").next().unwrap_or_default())
        }
        _ => text.to_owned(),
    }
}

/// Reads a line without its end; false at the end of the input. What is beyond [`MAX_LINE`] is dropped.
fn next_line(input: &mut dyn BufRead, line: &mut Vec<u8>) -> io::Result<bool> {
    line.clear();
    let n = io::Read::take(&mut *input, MAX_LINE + 1).read_until(b'\n', line)?;
    if line.last() == Some(&b'\n') {
        line.pop();
    } else if n as u64 > MAX_LINE {
        loop {
            let rest = input.fill_buf()?;
            if rest.is_empty() {
                break;
            }
            match memchr::memchr(b'\n', rest) {
                Some(end) => {
                    input.consume(end + 1);
                    break;
                }
                None => {
                    let all = rest.len();
                    input.consume(all);
                }
            }
        }
    }
    Ok(n > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routes_of_a_document_come_before_all_others() {
        let name = |what: &str| std::env::temp_dir().join(format!("replay-{what}-{}", std::process::id()));
        let (input, output, document) = (name("documented.ndjson"), name("documented.tsv"), name("documented.yaml"));
        let line = |service, path| {
            format!("{{\"ts\":1,\"service\":\"{service}\",\"method\":\"GET\",\"path\":\"{path}\",\"status\":200}}\n")
        };
        std::fs::write(&input, [line("s", "/v1/u/7"), line("s", "/v1/u/me"), line("other", "/v1/u/7")].concat())
            .expect("writable");
        let text = "openapi: 3.0.0\nservers: [{url: /v1}]\npaths: {'/u/{name}': {get: {}}, /u/me: {get: {}}}\n";
        std::fs::write(&document, text).expect("writable");
        let mut config = Config::default();
        config.routes.patterns = vec!["/v1/{any}/7".into()];
        config.routes.document.push(crate::config::DocumentRule { service: "s".into(), file: document.clone() });
        replay(std::slice::from_ref(&input), &config, Some(&output)).expect("readable");
        let routes = std::fs::read_to_string(&output).expect("written");
        assert_eq!(routes, "/v1/u/{name}\n/v1/u/me\n/v1/{any}/7\n");
        std::fs::remove_file(&document).expect("removable");
        assert!(
            replay(std::slice::from_ref(&input), &config, None).is_err_and(|e| format!("{e:#}").contains("document"))
        );
        std::fs::remove_file(input).and(std::fs::remove_file(output)).expect("removable");
    }

    #[test]
    fn a_route_for_every_line() {
        let folder = std::env::temp_dir();
        let (input, output) = (
            folder.join(format!("replay-{}.log", std::process::id())),
            folder.join(format!("replay-{}.tsv", std::process::id())),
        );
        let long = "x".repeat(2 << 20);
        let text = format!(
            "{{\"ts\":1,\"service\":\"s\",\"method\":\"GET\",\"path\":\"/u/1\",\"status\":200}}\nnonsense\n\n{long}\n\
             {{\"ts\":\"no\"}}\n1.1.1.1 - - [01/Jan/2024:00:00:00 +0000] \"GET /u/2 HTTP/1.1\" 200 5 \"-\" \"c\"\n"
        );
        std::fs::write(&input, text).expect("writable");
        let report = replay(std::slice::from_ref(&input), &Config::default(), Some(&output)).expect("readable");
        assert_eq!(std::fs::read_to_string(&output).expect("written"), "/u/{int}\n-\n-\n-\n-\n/u/{int}\n");
        assert_eq!((report.lines, report.exchanges), (6, 2));
        assert_eq!(report.unreadable.values().sum::<u64>(), 4);
        std::fs::remove_file(input).and(std::fs::remove_file(output)).expect("removable");
    }
}
