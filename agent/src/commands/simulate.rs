//! `apiscope simulate`.

use std::{
    io::{IsTerminal as _, Write as _},
    path::PathBuf,
    process::ExitCode,
};

use apiscope::{
    config::Config,
    simulate::{
        Outcome, benign,
        recorded::Recorded,
        scenarios,
        tmobile::{self, Attack, Order},
        world::MONDAY,
    },
};
use clap::{Args, Subcommand, ValueEnum};

/// Which scenario.
#[derive(Args)]
pub struct Simulate {
    #[command(subcommand)]
    scenario: Scenario,
    /// Configuration file, for its detectors
    #[arg(long, value_name = "FILE", env = "APISCOPE_CONFIG", global = true)]
    config: Option<PathBuf>,
    /// One JSON object
    #[arg(long, global = true)]
    json: bool,
    /// The same seed gives the same result
    #[arg(long, default_value_t = 1, global = true)]
    seed: u64,
}

#[derive(Subcommand)]
enum Scenario {
    /// 37 million records in 41 days through one API that answered whoever asked
    Tmobile(Tmobile),
    /// The attack that one detector is there for: D1 to D21, or its name
    Rule {
        /// The detector
        rule: String,
        /// What looks alike and is no attack: must not be found
        #[arg(long)]
        benign: bool,
    },
    /// Every detector's attack and what looks alike, as a table
    All,
    /// Weeks without an attack, with all that makes detectors cry: the false alarms, by detector
    Benign {
        /// Days
        #[arg(long, default_value_t = 41)]
        days: u64,
        /// Requests a second
        #[arg(long, value_name = "RPS", default_value_t = 6.0)]
        rate: f64,
    },
}

#[derive(Args)]
struct Tmobile {
    /// Principals that the attack is spread over
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    principals: u64,
    /// Requests a second of everybody else, on average over the week
    #[arg(long, value_name = "RPS", default_value_t = 200.0)]
    background: f64,
    /// Order in which records are asked for
    #[arg(long, value_enum, default_value_t = Ids::Sequential)]
    ids: Ids,
    /// Days that the attack goes on
    #[arg(long, default_value_t = 41.0)]
    days: f64,
    /// Requests of the attack a second
    #[arg(long, value_name = "RPS", default_value_t = tmobile::RATE)]
    rate: f64,
    /// Days of background before the attack [default: 14, less above 50 requests a second]
    #[arg(long, value_name = "DAYS")]
    learn_days: Option<f64>,
    /// Recorded exchanges (NDJSON with raw or hashed paths) as the background, again and again
    #[arg(long, value_name = "FILE", conflicts_with = "background")]
    against: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Ids {
    Sequential,
    Random,
    Uuid,
}

impl Simulate {
    /// Runs the scenario and prints what came out. Exit code 1 when an attack was not found.
    pub fn run(&self) -> ExitCode {
        let special = match &self.scenario {
            Scenario::All => Some(self.all()),
            Scenario::Benign { days, rate } => Some(self.benign(*days, *rate)),
            _ => None,
        };
        if let Some(result) = special {
            return match result {
                Ok(true) => ExitCode::SUCCESS,
                Ok(false) => ExitCode::from(1),
                Err(e) if super::is_broken_pipe(&e) => ExitCode::SUCCESS,
                Err(e) => {
                    eprintln!("apiscope: {e:#}");
                    ExitCode::from(2)
                }
            };
        }
        match self.outcome() {
            Ok(outcome) => {
                let text =
                    if self.json { serde_json::to_string_pretty(&outcome).unwrap_or_default() } else { text(&outcome) };
                let written = writeln!(std::io::stdout(), "{text}");
                if outcome.detected && written.is_ok() { ExitCode::SUCCESS } else { ExitCode::from(1) }
            }
            Err(e) => {
                eprintln!("apiscope: {e:#}");
                ExitCode::from(2)
            }
        }
    }

    /// True when every attack was found and nothing else.
    fn all(&self) -> anyhow::Result<bool> {
        let config = Config::load(self.config.as_deref())?.detect;
        let mut out = std::io::stdout().lock();
        let (mut right, mut rows) = (true, Vec::new());
        for scenario in scenarios::all() {
            let attack = scenarios::run(&scenario, true, self.seed, &config)?;
            let alike = scenarios::run(&scenario, false, self.seed, &config)?;
            let good = attack.detected && !alike.detected && attack.false_alarms == 0;
            right &= good;
            if self.json {
                rows.push(
                    serde_json::json!({ "rule": scenario.rule, "attack": attack, "benign": alike, "right": good }),
                );
            } else {
                let found =
                    attack.time_to_detect_s.map_or_else(|| "NOT FOUND".into(), |t| format!("found after {}", time(t)));
                let quiet = if alike.detected { "FOUND" } else { "quiet" };
                writeln!(
                    out,
                    "{:<4} {:<52} {found:<20}  {}: {quiet}",
                    scenario.rule, scenario.attack, scenario.benign
                )?;
            }
        }
        if self.json {
            writeln!(out, "{}", serde_json::to_string_pretty(&rows)?)?;
        }
        Ok(right)
    }

    /// True when there is at most one false alarm for each service and month.
    fn benign(&self, days: u64, rate: f64) -> anyhow::Result<bool> {
        between("--days", days as f64, MAX_DAYS)?;
        between("--rate", rate, MAX_RATE)?;
        let config = Config::load(self.config.as_deref())?.detect;
        let terminal = std::io::stderr().is_terminal();
        let quiet = benign::run(days, rate, self.seed, &config, &mut |done| {
            if terminal {
                eprint!("\r{:3.0} %", 100.0 * done);
            }
        })?;
        let mut out = std::io::stdout().lock();
        if self.json {
            writeln!(out, "{}", serde_json::to_string_pretty(&quiet)?)?;
        } else {
            writeln!(out, "rule   low  medium  high  critical")?;
            let mut rows: Vec<_> = quiet.findings.iter().collect();
            rows.sort_by_key(|(rule, _)| rule[1..].parse::<u32>().unwrap_or(0));
            for (rule, [low, medium, high, critical]) in rows {
                writeln!(out, "{rule:<4} {low:>5} {medium:>7} {high:>5} {critical:>9}")?;
            }
            for alarm in &quiet.alarms {
                writeln!(out, "{alarm}")?;
            }
            writeln!(
                out,
                "{:.2} false alarms for each service and month; {} exchanges of {} services in {} days, seed {}",
                quiet.false_alarms_per_service_and_month, quiet.exchanges, quiet.services, quiet.days, quiet.seed
            )?;
        }
        Ok(quiet.false_alarms_per_service_and_month <= 1.0)
    }

    fn outcome(&self) -> anyhow::Result<Outcome> {
        let config = Config::load(self.config.as_deref())?;
        let terminal = std::io::stderr().is_terminal();
        let mut progress = |done: f64| {
            if terminal {
                eprint!("\r{:3.0} %", 100.0 * done);
            }
        };
        let outcome = match &self.scenario {
            Scenario::Tmobile(t) => {
                between("--background", t.background, MAX_RATE)?;
                between("--rate", t.rate, MAX_RATE)?;
                between("--days", t.days, MAX_DAYS)?;
                t.learn_days.map_or(Ok(()), |days| between("--learn-days", days, MAX_DAYS))?;
                let attack = Attack {
                    principals: t.principals,
                    background: t.background,
                    order: match t.ids {
                        Ids::Sequential => Order::Sequential,
                        Ids::Random => Order::Random,
                        Ids::Uuid => Order::Uuid,
                    },
                    days: t.days,
                    rate: t.rate,
                    seed: self.seed,
                    learn_days: t.learn_days,
                };
                match &t.against {
                    Some(file) => {
                        let mut recorded = Recorded::read(file, &config, MONDAY)?;
                        let read = recorded.summary();
                        if read.unreadable > 0 || read.left_out > 0 {
                            eprintln!(
                                "apiscope: {}: {} lines are no exchanges and were left out, {} exchanges did not fit, {} are the background",
                                file.display(),
                                read.unreadable,
                                read.left_out,
                                read.exchanges
                            );
                        }
                        tmobile::against(&mut recorded, &attack, &config.detect, &mut progress)
                            .map(|outcome| Outcome { recording: Some(read), ..outcome })
                    }
                    None => tmobile::run(&attack, &config.detect, &mut progress),
                }
            }
            Scenario::Rule { rule, benign } => {
                let scenario = scenarios::find(rule).ok_or_else(|| {
                    anyhow::anyhow!("there is no detector `{rule}`: they are listed by `apiscope findings --rules`")
                })?;
                scenarios::run(&scenario, !benign, self.seed, &config.detect)
            }
            Scenario::All | Scenario::Benign { .. } => anyhow::bail!("has no single outcome"),
        };
        if terminal {
            eprint!("\r      \r");
        }
        outcome
    }
}

/// Most requests a second and most days that are simulated: more would take years of computing.
const MAX_RATE: f64 = 100_000.0;
const MAX_DAYS: f64 = 3_660.0;

fn between(name: &str, value: f64, most: f64) -> anyhow::Result<()> {
    anyhow::ensure!(value > 0.0 && value <= most, "{name} is {value}: it must be above 0 and at most {most}");
    Ok(())
}

/// Seconds as a person says them.
fn time(seconds: f64) -> String {
    match seconds {
        s if s < 120.0 => format!("{s:.0} s"),
        s if s < 7_200.0 => format!("{:.0} min", s / 60.0),
        s if s < 172_800.0 => format!("{:.1} h", s / 3_600.0),
        s => format!("{:.1} days", s / 86_400.0),
    }
}

fn text(o: &Outcome) -> String {
    let mut text = match (&o.finding, o.time_to_detect_s) {
        (Some(f), Some(t)) => format!(
            "found after {} by {} ({}, {})\n  {}\n  records exposed by then: {} estimated, {} in truth",
            time(t),
            f.rule,
            f.name,
            f.severity.name(),
            f.explanation,
            o.records_exposed.map_or_else(|| "not".into(), |n| n.to_string()),
            o.records_exposed_true
        ),
        _ => format!("not found; {} records exposed", o.records_exposed_true),
    };
    text += &format!(
        "\n  false alarms: {}; {} exchanges, {} of background before the attack, seed {}",
        o.false_alarms,
        o.exchanges,
        time(o.learned_s),
        o.seed
    );
    for alarm in &o.alarms {
        text += &format!("\n  false alarm: {alarm}");
    }
    text
}
