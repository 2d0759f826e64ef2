//! The command line.

use std::{
    io::{IsTerminal as _, Write as _},
    path::PathBuf,
    process::ExitCode,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::Context as _;
use apiscope::{
    config::{Config, DoorSetting, PathSetting, Rule, Sides},
    doctor, export, local, pipeline,
    replay::{self, Report},
    table::{self, Style},
};
use clap::{Args, CommandFactory as _, Parser, Subcommand, ValueEnum};

use crate::commands;

const EXAMPLES: &str = "\
Examples:
  sudo apiscope run                                   every HTTP API of this machine, live
  sudo apiscope run --side server --exchanges x.ndjson    and a recording of what is served
  OTEL_EXPORTER_OTLP_ENDPOINT=http://localhost:4317 OTEL_EXPORTER_OTLP_PROTOCOL=grpc sudo -E apiscope run
  sudo apiscope top --once --json                     the state of the running agent, for scripts
  apiscope replay access.log --report json            endpoints of an access log
  sudo apiscope doctor                                what this machine allows, and what it lacks

Exit codes: 0 done, 1 failed (or found: see `simulate` and `inventory diff`), 2 wrong usage, configuration or input.";

/// Every API of this machine, seen from the kernel: endpoints, rates, errors, latencies, credentials'
/// kinds. Metadata only; no application is touched.
#[derive(Parser)]
#[command(name = "apiscope", version, after_help = EXAMPLES, propagate_version = true)]
struct Cli {
    /// Say more (-v: what is done, -vv: everything)
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    verbose: u8,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// The agent: traces this machine until it is interrupted
    Run(Run),
    /// Live view of a running agent
    Top(Top),
    /// Takes recorded exchanges or access logs through the same pipeline
    Replay(Replay),
    /// Is the agent at work, with every probe attached? For probes of containers and scripts
    Health(HealthArguments),
    /// Red-team scenarios in virtual time: when would it have been found, and what was lost by then?
    Simulate(commands::Simulate),
    /// Drafts of authorization policies from recorded calls, and what they would have blocked
    Policy(commands::Policy),
    /// Findings of a running agent, the rules behind them, and what they cover
    Findings(commands::Findings),
    /// Every API that was seen, and in what it differs from OpenAPI documents
    Inventory(commands::InventoryCommand),
    /// What this kernel, these privileges and these processes allow, and why
    Doctor {
        /// One JSON object
        #[arg(long)]
        json: bool,
    },
    /// Checks or prints the configuration
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Completions for a shell, to standard output
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

#[derive(Subcommand)]
enum ConfigCommand {
    /// Reads a file and says what is wrong with it
    Check {
        /// The file; without one the default file
        file: Option<PathBuf>,
    },
    /// Prints every setting with its value: the defaults, or those of a file
    Print {
        /// The file
        file: Option<PathBuf>,
    },
}

#[derive(Args)]
struct Run {
    /// Configuration file [default: /etc/apiscope/config.toml, if it exists]
    #[arg(long, value_name = "FILE", env = "APISCOPE_CONFIG")]
    config: Option<PathBuf>,
    /// Write every exchange as a JSON line to FILE, or to standard output with `-`
    #[arg(long, value_name = "FILE")]
    exchanges: Option<PathBuf>,
    /// How recordings write paths: the route, the route with hashed ids, or as sent
    #[arg(long, value_enum, value_name = "FORM", env = "APISCOPE_CAPTURE_PATH")]
    capture_path: Option<PathArgument>,
    /// Where `top` finds the agent [default: /run/apiscope/agent.sock]
    #[arg(long, value_name = "PATH", env = "APISCOPE_SOCKET")]
    socket: Option<PathBuf>,
    /// Ends of connections to trace
    #[arg(long, value_enum, env = "APISCOPE_SIDE")]
    side: Option<SideArgument>,
    /// How sends and receives are seen [default: the best that the kernel offers; see `apiscope doctor`]
    #[arg(long, value_enum, env = "APISCOPE_DOOR")]
    door: Option<DoorArgument>,
    /// Leave out connections with this port at either end (may be repeated)
    #[arg(long, value_name = "PORT")]
    exclude_port: Vec<u16>,
    /// Leave out this process (may be repeated)
    #[arg(long, value_name = "PID")]
    exclude_pid: Vec<u32>,
    /// Leave out processes of this executable; `*` stands for anything (may be repeated)
    #[arg(long, value_name = "EXE")]
    exclude_exe: Vec<String>,
    /// Trace only connections with this port at either end (may be repeated)
    #[arg(long, value_name = "PORT")]
    include_port: Vec<u16>,
    /// Trace only processes of this executable (may be repeated)
    #[arg(long, value_name = "EXE")]
    include_exe: Vec<String>,
    /// Objects instead of text
    #[arg(long)]
    json: bool,
    /// Show only the totals at the end
    #[arg(short, long)]
    quiet: bool,
    /// Seconds between two outputs in a pipe
    #[arg(long, value_name = "SECONDS")]
    interval: Option<u64>,
    /// End after this many seconds
    #[arg(long, value_name = "SECONDS")]
    duration: Option<u64>,
}

#[derive(Clone, Copy, ValueEnum)]
enum PathArgument {
    Template,
    Hmac,
    Raw,
}

#[derive(Clone, Copy, ValueEnum)]
enum SideArgument {
    Server,
    Client,
    Both,
}

#[derive(Clone, Copy, ValueEnum)]
enum DoorArgument {
    Auto,
    #[value(name = "tp_btf")]
    TpBtf,
    Fexit,
    Kprobe,
}

#[derive(Args)]
struct Top {
    /// Socket of the agent
    #[arg(long, value_name = "PATH", env = "APISCOPE_SOCKET", default_value = "/run/apiscope/agent.sock")]
    socket: PathBuf,
    /// Show the present state and end; fails until every probe of the agent is attached
    #[arg(long)]
    once: bool,
    /// One JSON object instead of the table
    #[arg(long)]
    json: bool,
    /// Seconds between two looks
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=3600))]
    interval: u64,
}

#[derive(Args)]
struct HealthArguments {
    /// Socket of the agent
    #[arg(long, value_name = "PATH", env = "APISCOPE_SOCKET", default_value = "/run/apiscope/agent.sock")]
    socket: PathBuf,
    /// Only whether it is at work, not whether every probe is attached
    #[arg(long)]
    live: bool,
}

#[derive(Args)]
struct Replay {
    /// Exchanges as NDJSON, or access logs in the combined format; `-` is standard input
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// Write the final route of each input line, one a line
    #[arg(long, value_name = "OUT")]
    routes: Option<PathBuf>,
    /// Print the endpoints
    #[arg(long, value_enum, value_name = "FORMAT")]
    report: Option<ReportFormat>,
    /// Configuration file, for its route patterns
    #[arg(long, value_name = "FILE", env = "APISCOPE_CONFIG")]
    config: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum ReportFormat {
    Json,
    Table,
}

/// Wrong usage, configuration or input, as clap's own.
const USAGE: u8 = 2;

/// Parses, runs, and turns errors into a line and an exit code.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let level = match cli.verbose {
        0 => "warn",
        1 => "info",
        _ => "debug",
    };
    log_to_stderr(level);
    let set = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
    for (name, meant) in commands::slips(&Cli::command(), set) {
        log::warn!("{name} is not a variable of apiscope: did you mean {meant}?");
    }
    let result = match cli.command {
        Command::Run(arguments) => return run(&arguments),
        Command::Top(arguments) => top(&arguments),
        Command::Health(arguments) => health(&arguments),
        Command::Replay(arguments) => return finish(replay_files(&arguments), USAGE),
        Command::Simulate(arguments) => return arguments.run(),
        Command::Findings(arguments) => arguments.run(),
        Command::Inventory(arguments) => return arguments.run(),
        Command::Policy(arguments) => return finish(arguments.run(), USAGE),
        Command::Doctor { json } => return doctor_report(json),
        Command::Config(command) => return config(&command),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "apiscope", &mut std::io::stdout());
            Ok(())
        }
    };
    finish(result, 1)
}

/// `TIME LEVEL MODULE: MESSAGE`, the level in colour on a terminal; `RUST_LOG` is stronger than `level`.
fn log_to_stderr(level: &str) {
    let mut log = env_logger::Builder::from_env(env_logger::Env::default().default_filter_or(level));
    log.format(|to, record| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let time = apiscope::inventory::time(u64::try_from(now.as_nanos()).unwrap_or(u64::MAX));
        let (level, style) = (record.level(), to.default_level_style(record.level()));
        writeln!(to, "[{time} {style}{level:<5}{style:#} {}] {}", record.target(), record.args())
    });
    log.init();
}

fn finish(result: anyhow::Result<()>, code: u8) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) if commands::is_broken_pipe(&e) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("apiscope: {e:#}");
            // A wrong variable is found where it is used, and is wrong configuration all the same.
            ExitCode::from(if e.is::<export::WrongVariable>() { USAGE } else { code })
        }
    }
}

fn run(arguments: &Run) -> ExitCode {
    let config = match settings(arguments) {
        Ok(config) => config,
        Err(e) => return finish(Err(e), USAGE),
    };
    let options = pipeline::Options {
        config,
        exchanges: arguments.exchanges.clone(),
        json: arguments.json,
        quiet: arguments.quiet,
        duration: arguments.duration.map(Duration::from_secs),
        socket_named: arguments.socket.is_some(),
    };
    let to_stdout = arguments.exchanges.as_deref() != Some(std::path::Path::new("-"));
    finish(
        pipeline::run(&options).and_then(|totals| {
            let text = if arguments.json { serde_json::to_string(&totals)? } else { table::summary(&totals) };
            if to_stdout {
                writeln!(std::io::stdout(), "{text}")?;
            } else {
                eprintln!("{text}");
            }
            Ok(())
        }),
        1,
    )
}

/// The file with variables and flags applied.
fn settings(arguments: &Run) -> anyhow::Result<Config> {
    let mut config = Config::load(arguments.config.as_deref())?;
    if let Some(form) = arguments.capture_path {
        config.capture.path = match form {
            PathArgument::Template => PathSetting::Template,
            PathArgument::Hmac => PathSetting::Hmac,
            PathArgument::Raw => PathSetting::Raw,
        };
    }
    if let Some(side) = arguments.side {
        config.capture.sides = match side {
            SideArgument::Server => Sides::Server,
            SideArgument::Client => Sides::Client,
            SideArgument::Both => Sides::Both,
        };
    }
    if let Some(door) = arguments.door {
        config.capture.door = match door {
            DoorArgument::Auto => DoorSetting::Auto,
            DoorArgument::TpBtf => DoorSetting::TpBtf,
            DoorArgument::Fexit => DoorSetting::Fexit,
            DoorArgument::Kprobe => DoorSetting::Kprobe,
        };
    }
    if let Some(socket) = &arguments.socket {
        config.agent.socket.clone_from(socket);
    }
    if let Some(interval) = arguments.interval {
        config.agent.interval_s = interval;
    }
    let exclude = &mut config.capture.exclude;
    exclude.extend(arguments.exclude_port.iter().map(|&p| Rule { port: Some(p), ..Rule::default() }));
    exclude.extend(arguments.exclude_pid.iter().map(|&p| Rule { pid: Some(p), ..Rule::default() }));
    exclude.extend(arguments.exclude_exe.iter().map(|e| Rule { exe: Some(e.clone()), ..Rule::default() }));
    let include = &mut config.capture.include;
    include.extend(arguments.include_port.iter().map(|&p| Rule { port: Some(p), ..Rule::default() }));
    include.extend(arguments.include_exe.iter().map(|e| Rule { exe: Some(e.clone()), ..Rule::default() }));
    config.check()?;
    Ok(config)
}

fn top(arguments: &Top) -> anyhow::Result<()> {
    let terminal = std::io::stdout().is_terminal();
    let colour = terminal && std::env::var_os("NO_COLOR").is_none();
    loop {
        let snapshot = local::snapshot(&arguments.socket)?;
        if arguments.once && !snapshot.ready {
            anyhow::bail!("the agent is still attaching its probes");
        }
        let text = if arguments.json {
            serde_json::to_string(&snapshot)? + "\n"
        } else {
            let (width, height) = pipeline::terminal_size();
            let height = if arguments.once { usize::MAX } else { height };
            let text = table::table(&snapshot, Style { colour, width, height });
            if terminal && !arguments.once { format!("\x1b[H\x1b[J{text}") } else { text }
        };
        let mut out = std::io::stdout().lock();
        out.write_all(text.as_bytes())?;
        out.flush()?;
        if arguments.once {
            return Ok(());
        }
        drop(out);
        std::thread::sleep(Duration::from_secs(arguments.interval));
    }
}

fn health(arguments: &HealthArguments) -> anyhow::Result<()> {
    let health = local::health(&arguments.socket)?;
    if !health.alive {
        anyhow::bail!("the agent is stuck, or has not begun: its capture does not come to its housekeeping");
    }
    if !health.ready && !arguments.live {
        anyhow::bail!("the agent is still attaching its probes");
    }
    writeln!(std::io::stdout(), "{}", if health.ready { "ready" } else { "alive" }).map_err(Into::into)
}

fn replay_files(arguments: &Replay) -> anyhow::Result<()> {
    let config = Config::load(arguments.config.as_deref())?;
    let report: Report = replay::replay(&arguments.files, &config, arguments.routes.as_deref())?;
    let mut out = std::io::stdout().lock();
    match arguments.report {
        Some(ReportFormat::Json) => writeln!(out, "{}", serde_json::to_string_pretty(&report)?)?,
        Some(ReportFormat::Table) => {
            let (width, _) = pipeline::terminal_size();
            out.write_all(table::endpoints(&report.endpoints, width).as_bytes())?;
        }
        None => {}
    }
    for (reason, n) in &report.unreadable {
        eprintln!("apiscope: {n} lines not read: {reason}");
    }
    if report.lines > 0 && report.exchanges == 0 {
        anyhow::bail!("none of {} lines could be read as an exchange or an access-log entry", report.lines);
    }
    Ok(())
}

fn doctor_report(json: bool) -> ExitCode {
    let report = doctor::examine();
    let text = if json {
        serde_json::to_string_pretty(&report).map(|t| t + "\n").map_err(Into::into)
    } else {
        Ok(report.text(std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none()))
    };
    let done = text.and_then(|t| std::io::stdout().write_all(t.as_bytes()).context("failed to write the report"));
    match done {
        Ok(()) if !report.can_capture => ExitCode::from(1),
        other => finish(other, 1),
    }
}

fn config(command: &ConfigCommand) -> ExitCode {
    let (file, print) = match command {
        ConfigCommand::Check { file } => (file, false),
        ConfigCommand::Print { file } => (file, true),
    };
    let read = match (file, print) {
        (None, true) => Ok(Config::default()),
        _ => Config::load(file.as_deref()),
    };
    finish(
        read.and_then(|config| {
            let text = if print { config.print() } else { "the configuration is valid\n".into() };
            std::io::stdout().write_all(text.as_bytes()).map_err(Into::into)
        }),
        USAGE,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
