//! `apiscope policy`.

use std::{
    fs::File,
    io::{BufRead as _, BufReader, Write as _},
    path::PathBuf,
};

use anyhow::Context as _;
use apiscope::{
    authorization::{DryRun, Graph},
    config::Config,
    exchange::Exchange,
    route::Routes,
};
use clap::{Args, ValueEnum};

/// Which draft of which recordings.
#[derive(Args)]
pub struct Policy {
    /// Recorded exchanges (NDJSON) with callers
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// What to print
    #[arg(long, value_enum, default_value_t = Format::Report)]
    format: Format,
    /// Share of the exchanges that is learned from; the rest is judged (dry run)
    #[arg(long, default_value_t = 0.8)]
    learn: f64,
    /// Configuration file, for its route patterns
    #[arg(long, value_name = "FILE", env = "APISCOPE_CONFIG")]
    config: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    /// Who calls what, and what a policy would have blocked
    Report,
    /// The same as JSON
    Json,
    /// Istio AuthorizationPolicy
    Istio,
    /// Kubernetes NetworkPolicy
    Kubernetes,
}

impl Policy {
    /// Prints it.
    pub fn run(&self) -> anyhow::Result<()> {
        anyhow::ensure!((0.0..=1.0).contains(&self.learn), "--learn must be from 0 to 1");
        let config = Config::load(self.config.as_deref())?;
        // Once for the routes, which are known at the end, and once for who calls them.
        let mut routes = Routes::new(&config.routes.patterns);
        let (total, unreadable) = self.each(|x| {
            routes.route(&x);
        })?;
        routes.settle();
        anyhow::ensure!(
            total > 0,
            "there is no exchange in these files: they must be recordings of `apiscope run --exchanges`"
        );
        if unreadable > 0 {
            eprintln!("apiscope: {unreadable} lines are no exchanges and were left out");
        }
        let learned = (total as f64 * self.learn).ceil() as u64;
        let (mut graph, mut run, mut n) = (Graph::default(), DryRun::default(), 0);
        self.each(|x| {
            let route = routes.current(&x.service, &x.method, x.path.as_deref().unwrap_or_default());
            n += 1;
            if n <= learned { graph.learn(&x, &route.template) } else { graph.judge(&x, &route.template, &mut run) }
        })?;
        let mut out = std::io::stdout().lock();
        let nameless: u64 = graph.nameless.values().sum();
        match self.format {
            Format::Istio => writeln!(out, "{}", serde_json::to_string_pretty(&graph.istio())?)?,
            Format::Kubernetes => writeln!(out, "{}", serde_json::to_string_pretty(&graph.network())?)?,
            Format::Json => {
                let calls: Vec<_> =
                    graph.calls().iter().map(|(c, n)| serde_json::json!({ "call": c, "count": n })).collect();
                let report = serde_json::json!({ "calls": calls, "nameless": graph.nameless, "dry_run": run });
                writeln!(out, "{}", serde_json::to_string_pretty(&report)?)?;
            }
            Format::Report => {
                for (c, n) in graph.calls() {
                    writeln!(out, "{:<32} -> {:<20} {:<7} {:<40} {n}", c.caller, c.service, c.method, c.route)?;
                }
                writeln!(
                    out,
                    "dry run: {} exchanges judged, {} allowed, {} of nameless callers blocked",
                    run.judged, run.allowed, run.blocked_nameless
                )?;
                for (c, n) in &run.blocked_calls {
                    writeln!(out, "  would block {} -> {} {} {}: {n}", c.caller, c.service, c.method, c.route)?;
                }
            }
        }
        if nameless > 0 {
            eprintln!("apiscope: {nameless} exchanges have no caller: run the agent where it can name workloads");
        }
        Ok(())
    }

    /// Exchanges, and lines that are none.
    fn each(&self, mut take: impl FnMut(Exchange)) -> anyhow::Result<(u64, u64)> {
        let (mut n, mut unreadable) = (0, 0);
        for path in &self.files {
            let failed = || format!("failed to read {}", path.display());
            for line in BufReader::new(File::open(path).with_context(failed)?).split(b'\n') {
                let line = line.with_context(failed)?;
                match Exchange::from_json(&line) {
                    Ok(exchange) => {
                        n += 1;
                        take(exchange);
                    }
                    Err(_) => unreadable += u64::from(!line.trim_ascii().is_empty()),
                }
            }
        }
        Ok((n, unreadable))
    }
}
