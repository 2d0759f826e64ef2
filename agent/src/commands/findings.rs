//! `apiscope findings`.

use std::{io::Write as _, path::PathBuf};

use apiscope::{detect, local, table};
use clap::Args;

/// What is asked.
#[derive(Args)]
pub struct Findings {
    /// Socket of the agent
    #[arg(long, value_name = "PATH", env = "APISCOPE_SOCKET", default_value = "/run/apiscope/agent.sock")]
    socket: PathBuf,
    /// A JSON array instead of a table
    #[arg(long)]
    json: bool,
    /// Findings as OCSF 1.4 Detection Findings (class 2004), a JSON array
    #[arg(long, conflicts_with_all = ["coverage", "json"])]
    ocsf: bool,
    /// Which detectors are armed, learning or blind at each endpoint, and the smallest leak they would find
    #[arg(long)]
    coverage: bool,
    /// The rules: what they look at, how they decide, what can be set, where they are blind
    #[arg(long, conflicts_with_all = ["coverage"])]
    rules: bool,
}

impl Findings {
    /// Prints.
    pub fn run(&self) -> anyhow::Result<()> {
        let mut out = std::io::stdout().lock();
        if self.rules {
            let all = detect::rules();
            let text = if self.json {
                serde_json::to_string_pretty(&all)? + "\n"
            } else {
                all.into_iter().map(|rule| rules(rule) + "\n").collect()
            };
            out.write_all(text.as_bytes())?;
            return Ok(());
        }
        let snapshot = local::snapshot(&self.socket)?;
        if self.ocsf {
            let all: Vec<_> = snapshot.findings.iter().map(detect::ocsf::detection_finding).collect();
            writeln!(out, "{}", serde_json::to_string_pretty(&all)?)?;
            return Ok(());
        }
        let text = match (self.coverage, self.json) {
            (true, true) => serde_json::to_string_pretty(&snapshot.coverage)? + "\n",
            (true, false) => table::coverage(&snapshot.coverage),
            (false, true) => serde_json::to_string_pretty(&snapshot.findings)? + "\n",
            (false, false) => table::findings(&snapshot.findings),
        };
        out.write_all(text.as_bytes())?;
        Ok(())
    }
}

fn rules(rule: &detect::Rule) -> String {
    let mut text = format!(
        "{} {}: {}\n  OWASP {}; ATT&CK {}\n  looks at: {}\n  decides:  {}\n  source:   {}\n  memory:   {}\n  blind to: {}\n",
        rule.id,
        rule.name,
        rule.title,
        rule.owasp.join(" "),
        rule.attack.join(" "),
        rule.signal,
        rule.algorithm,
        rule.source,
        rule.memory,
        rule.blind
    );
    for s in rule.settings {
        text += &format!("  \"{}.{}\" = {}: {}\n", rule.id, s.name, s.default, s.about);
    }
    text
}
