//! `apiscope inventory`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{IsTerminal as _, Read as _, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
    time::SystemTime,
};

use anyhow::{Context as _, bail};
use apiscope::{
    config::Config,
    cyclonedx,
    inventory::{self, Ages, Entry, Inventory},
    local,
    openapi::{self, Difference, Document, Kind},
    pipeline, replay, report,
};
use clap::{Args, Subcommand, ValueEnum};

/// Bytes by which an inventory is told from a recording.
const BEGINNING: u64 = 256;

const EXAMPLES: &str = "\
Examples:
  sudo apiscope inventory                                  what the running agent knows
  sudo apiscope inventory --format json > node1.json       to be put together with other nodes'
  apiscope inventory --from node1.json node2.json --format csv
  apiscope inventory --from node1.json --format html > apis.html
  apiscope inventory --from access.log                     endpoints of an access log
  apiscope inventory diff openapi.yaml --from node1.json --fail-on shadow,unauthenticated";

/// What is asked.
#[derive(Args)]
#[command(after_help = EXAMPLES, args_conflicts_with_subcommands = true)]
pub struct InventoryCommand {
    #[command(subcommand)]
    action: Option<Action>,
    #[command(flatten)]
    source: Source,
    /// Output
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
}

#[derive(Subcommand)]
enum Action {
    /// What was seen against what OpenAPI documents promise
    Diff(DiffCommand),
}

/// Exit codes: 0 nothing of --fail-on was found, 1 something was, 2 it could not be told.
#[derive(Args)]
struct DiffCommand {
    /// OpenAPI 3.0 or 3.1, Swagger 2.0, in JSON or YAML; `SERVICE=FILE` is the document of these services alone
    #[arg(required = true, value_name = "[SERVICE=]FILE")]
    documents: Vec<String>,
    #[command(flatten)]
    source: Source,
    /// Differences that make the exit code 1
    #[arg(long, value_enum, value_name = "KIND", value_delimiter = ',')]
    fail_on: Vec<KindArgument>,
    /// Differences that are shown; all by default
    #[arg(long, value_enum, value_name = "KIND", value_delimiter = ',')]
    only: Vec<KindArgument>,
    /// A JSON array instead of text
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum KindArgument {
    /// Answered, and in no document
    Shadow,
    /// The path is documented, the method is not
    Method,
    /// A credential is documented, and requests without one are answered
    Unauthenticated,
    /// Credentials of another kind than documented
    Auth,
    /// Deprecated, and used
    Zombie,
    /// Documented, and not seen
    Orphan,
    /// A status that is not documented
    Status,
}

/// Where the list comes from.
#[derive(Args)]
struct Source {
    /// Socket of the agent
    #[arg(long, value_name = "PATH", env = "APISCOPE_SOCKET", default_value = "/run/apiscope/agent.sock")]
    socket: PathBuf,
    /// Instead of the agent: inventories in JSON (of several nodes: they are added up), recorded exchanges, access logs
    #[arg(long, value_name = "FILE", num_args = 1..)]
    from: Vec<PathBuf>,
    /// Configuration file, for the route patterns of recordings and logs
    #[arg(long, value_name = "FILE", env = "APISCOPE_CONFIG")]
    config: Option<PathBuf>,
    /// Only services of this name; `*` stands for anything
    #[arg(long, value_name = "NAME")]
    service: Option<String>,
    /// Only what is offered (`server`) or used (`client`) here
    #[arg(long, value_name = "SIDE", value_parser = ["server", "client"])]
    side: Option<String>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    /// For people
    Table,
    /// Everything; can be read again by --from
    Json,
    /// For spreadsheets
    Csv,
    /// OpenAPI 3.1 of one service
    Openapi,
    /// CycloneDX 1.6: services
    Cyclonedx,
    /// A page for a browser, in one file
    Html,
}

impl InventoryCommand {
    /// Prints.
    pub fn run(&self) -> ExitCode {
        let (result, code) = match &self.action {
            Some(Action::Diff(diff)) => (diff.run(), 2),
            // A wrong file is wrong usage; an agent that does not answer is a failure.
            None => (self.print().map(|()| ExitCode::SUCCESS), if self.source.from.is_empty() { 1 } else { 2 }),
        };
        match result {
            Ok(code) => code,
            Err(e) if super::is_broken_pipe(&e) => ExitCode::SUCCESS,
            Err(e) => {
                eprintln!("apiscope: {e:#}");
                ExitCode::from(code)
            }
        }
    }

    fn print(&self) -> anyhow::Result<()> {
        let inventory = self.source.read()?;
        let text = match self.format {
            Format::Table => {
                let terminal = std::io::stdout().is_terminal();
                let (width, _) = pipeline::terminal_size();
                inventory::table(&inventory, width, terminal && std::env::var_os("NO_COLOR").is_none())
            }
            Format::Json => serde_json::to_string_pretty(&inventory)? + "\n",
            Format::Csv => inventory::csv(&inventory)?,
            Format::Openapi => serde_json::to_string_pretty(&document(inventory)?)? + "\n",
            Format::Cyclonedx => serde_json::to_string_pretty(&cyclonedx::bill(&inventory))? + "\n",
            Format::Html => report::html(&inventory),
        };
        std::io::stdout().write_all(text.as_bytes())?;
        Ok(())
    }
}

/// What one service offers: a document is of one API.
fn document(mut inventory: Inventory) -> anyhow::Result<serde_json::Value> {
    if inventory.endpoints.iter().any(|e| e.side == "server") {
        inventory.endpoints.retain(|e| e.side == "server");
    }
    let services: BTreeSet<String> = inventory.endpoints.iter().map(|e| e.service.clone()).collect();
    match services.iter().next() {
        Some(service) if services.len() == 1 => Ok(openapi::export(service, &inventory)),
        None => bail!("there is no endpoint to document"),
        Some(_) => {
            let names: Vec<_> = services.iter().take(20).map(String::as_str).collect();
            bail!("a document is of one service: choose one with --service, of {}", names.join(", "))
        }
    }
}

impl DiffCommand {
    fn run(&self) -> anyhow::Result<ExitCode> {
        let mut documents = Vec::new();
        for argument in &self.documents {
            // A file may have a `=` in its name; what names services has no slash.
            let (service, file) = match argument.split_once('=') {
                Some((service, file)) if !service.contains('/') && !Path::new(argument).exists() => (service, file),
                _ => ("*", argument.as_str()),
            };
            let document = openapi::open(Path::new(file))?;
            for note in &document.notes {
                eprintln!("apiscope: {file}: {note}");
            }
            documents.push((service, document));
        }
        let mut inventory = self.source.read()?;
        if self.source.side.is_none() {
            inventory.endpoints.retain(|e| e.side == "server");
        }
        let differences = differences(documents, inventory.endpoints);
        let shown: Vec<_> = differences
            .iter()
            .filter(|d| self.only.is_empty() || self.only.iter().any(|k| k.kind() == d.kind))
            .collect();
        let mut out = std::io::stdout().lock();
        if self.json {
            writeln!(out, "{}", serde_json::to_string_pretty(&shown)?)?;
        } else {
            for d in &shown {
                let line = format!("{:<16} {} {} {}: {}", d.kind.name(), d.service, d.method, d.route, d.what);
                writeln!(out, "{}", inventory::printable(&line))?;
            }
        }
        let mut counts = BTreeMap::<_, u64>::new();
        for d in &differences {
            *counts.entry(d.kind).or_default() += 1;
        }
        let counts: Vec<_> = counts.iter().map(|(kind, n)| format!("{} {n}", kind.name())).collect();
        let counts = if counts.is_empty() { "no differences".into() } else { counts.join(", ") };
        eprintln!("apiscope: {counts}");
        let hit = differences.iter().any(|d| self.fail_on.iter().any(|k| k.kind() == d.kind));
        Ok(if hit { ExitCode::from(1) } else { ExitCode::SUCCESS })
    }
}

/// Documents of the same services together are what these promise.
fn differences(documents: Vec<(&str, Document)>, entries: Vec<Entry>) -> Vec<Difference> {
    let mut groups: Vec<(&str, Vec<Document>)> = Vec::new();
    for (service, document) in documents {
        match groups.iter_mut().find(|(s, _)| *s == service) {
            Some((_, group)) => group.push(document),
            None => groups.push((service, vec![document])),
        }
    }
    // A service that is named has its own documents; what stands for all of them is for the others.
    groups.sort_by_key(|(service, _)| service.contains('*'));
    let mut left = entries;
    let mut all = Vec::new();
    for (service, documents) in groups {
        let (its, others) = left.into_iter().partition(|e| apiscope::config::glob(service, &e.service));
        left = others;
        all.extend(openapi::diff(&documents, &its));
    }
    all.sort_by(|a, b| a.kind.cmp(&b.kind).then(b.requests.cmp(&a.requests)));
    all
}

impl KindArgument {
    fn kind(self) -> Kind {
        match self {
            Self::Shadow => Kind::Shadow,
            Self::Method => Kind::Method,
            Self::Unauthenticated => Kind::Unauthenticated,
            Self::Auth => Kind::Auth,
            Self::Zombie => Kind::Zombie,
            Self::Orphan => Kind::Orphan,
            Self::Status => Kind::Status,
        }
    }
}

impl Source {
    /// The list, with what was not asked for left out.
    fn read(&self) -> anyhow::Result<Inventory> {
        let mut inventory = if self.from.is_empty() { local::inventory(&self.socket)? } else { self.files()? };
        inventory.endpoints.retain(|e| {
            self.service.as_deref().is_none_or(|s| apiscope::config::glob(s, &e.service))
                && self.side.as_deref().is_none_or(|s| s == e.side)
        });
        Ok(inventory)
    }

    fn files(&self) -> anyhow::Result<Inventory> {
        let (lists, logs): (Vec<_>, Vec<_>) = self
            .from
            .iter()
            .map(|path| is_inventory(path).map(|is| (path, is)))
            .collect::<anyhow::Result<Vec<_>>>()?
            .into_iter()
            .partition(|(_, is)| *is);
        let mut all: Option<Inventory> = None;
        let mut add = |list: Inventory| match &mut all {
            Some(all) => all.merge(&list),
            None => all = Some(list),
        };
        for (path, _) in lists {
            add(read_inventory(path)?);
        }
        if !logs.is_empty() {
            let mut config = Config::load(self.config.as_deref())?;
            config.detect.enabled = false;
            let logs: Vec<PathBuf> = logs.into_iter().map(|(path, _)| path.clone()).collect();
            let report = replay::replay(&logs, &config, None)?;
            for (reason, n) in &report.unreadable {
                eprintln!("apiscope: {n} lines not read: {reason}");
            }
            if report.lines > 0 && report.exchanges == 0 {
                bail!("none of {} lines could be read as an exchange or an access-log entry", report.lines);
            }
            // Ages are those at the end of the log: it may be read years later.
            let made = report.endpoints.iter().map(|e| e.last_seen).max().unwrap_or(0);
            add(Inventory::new(&report.endpoints, made));
        }
        let mut all = all.unwrap_or_default();
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_nanos());
        let now = u64::try_from(now).unwrap_or(u64::MAX);
        all.age(if all.made == 0 { now } else { all.made }, Ages::default());
        Ok(all)
    }
}

/// Is it an inventory, to be read whole, or lines?
fn is_inventory(path: &Path) -> anyhow::Result<bool> {
    if path == Path::new("-") {
        return Ok(false);
    }
    let mut begin = Vec::new();
    let file = File::open(path).with_context(|| format!("failed to read {}", path.display()))?;
    if file.metadata().is_ok_and(|m| m.is_file()) {
        file.take(BEGINNING).read_to_end(&mut begin).with_context(|| format!("failed to read {}", path.display()))?;
    }
    Ok(String::from_utf8_lossy(&begin).contains("\"apiscope_inventory\""))
}

fn read_inventory(path: &Path) -> anyhow::Result<Inventory> {
    let context = || format!("failed to read {}", path.display());
    let mut bytes = Vec::new();
    File::open(path)
        .with_context(context)?
        .take(inventory::MAX_FILE + 1)
        .read_to_end(&mut bytes)
        .with_context(context)?;
    anyhow::ensure!(bytes.len() as u64 <= inventory::MAX_FILE, "{} is too long for an inventory", path.display());
    inventory::parse(&bytes).with_context(context)
}
