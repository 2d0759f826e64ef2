//! What the guests said, as a table: a row for each test, a column for each kernel; then the verifier's
//! figures, the reasons of lacks, and what failed.

use std::{
    collections::BTreeMap,
    fmt::{self, Write as _},
    fs,
    path::Path,
};

use anyhow::Result;

use super::{kernels::Kernel, machine::Run};

/// Instructions that a kernel's verifier looks at before it gives up (`BPF_COMPLEXITY_LIMIT_INSNS`), and
/// the part of it at which a program is too near: other kernels count differently.
const VERIFIER_LIMIT: u64 = 1_000_000;
const VERIFIER_WARNING: u64 = VERIFIER_LIMIT * 6 / 10;
const MARK: &str = "@vm ";

/// What one test found on one kernel.
#[derive(Debug, Clone)]
struct Cell {
    word: String,
    seconds: String,
    what: String,
}

/// One program on one kernel.
#[derive(Debug, Clone, Copy)]
struct Program {
    instructions: u64,
    runs: u64,
    ns: u64,
}

/// All kernels' results.
#[derive(Debug, Default)]
pub struct Results {
    kernels: Vec<String>,
    /// Tests in the order in which they came.
    tests: Vec<String>,
    cells: BTreeMap<(String, String), Cell>,
    programs: BTreeMap<(String, String), BTreeMap<String, Program>>,
    failures: Vec<String>,
}

/// The line that a person sees while the guest runs.
#[must_use]
pub fn progress(line: &str) -> Option<String> {
    let (name, cell) = cell(line)?;
    Some(format!("{:<4} {name} ({} s) {}", cell.word, cell.seconds, cell.what))
}

fn cell(line: &str) -> Option<(String, Cell)> {
    let mut parts = line.strip_prefix(MARK)?.strip_prefix("test ")?.splitn(4, ' ');
    let (name, word, seconds) = (parts.next()?, parts.next()?, parts.next()?);
    let what = parts.next().unwrap_or_default().to_owned();
    Some((name.to_owned(), Cell { word: word.to_owned(), seconds: seconds.to_owned(), what }))
}

impl Results {
    /// Takes in a guest's run; recordings go to `folder`, one file for each door.
    ///
    /// # Errors
    /// A recording cannot be written.
    pub fn add(&mut self, kernel: &Kernel, run: &Run, folder: &Path) -> Result<()> {
        let name = kernel.version.to_owned();
        let mut recordings: BTreeMap<String, String> = BTreeMap::new();
        for line in &run.lines {
            if let Some((test, cell)) = cell(line) {
                if cell.word == "FAIL" {
                    self.failures.push(format!("{name} {test}: {}", cell.what));
                }
                if !self.tests.contains(&test) {
                    self.tests.push(test.clone());
                }
                self.cells.insert((test, name.clone()), cell);
            } else if let Some(rest) = line.strip_prefix(MARK).and_then(|l| l.strip_prefix("program ")) {
                self.program(&name, rest);
            } else if let Some((door, json)) =
                line.strip_prefix(MARK).and_then(|l| l.strip_prefix("ndjson ")).and_then(|l| l.split_once(' '))
            {
                let _ = writeln!(recordings.entry(door.to_owned()).or_default(), "{json}");
            }
        }
        for (door, lines) in recordings {
            fs::write(folder.join(format!("{door}.ndjson")), lines)?;
        }
        if !run.ended {
            self.failures.push(format!("{name}: {} ({})", run.why, folder.join("serial.log").display()));
        }
        self.kernels.push(name);
        Ok(())
    }

    /// `DOOR NAME INSTRUCTIONS RUNS NS`.
    fn program(&mut self, kernel: &str, rest: &str) {
        let words: Vec<&str> = rest.split(' ').collect();
        let [door, name, figures @ ..] = &words[..] else { return };
        let figures: Vec<u64> = figures.iter().filter_map(|n| n.parse().ok()).collect();
        let [instructions, runs, ns] = figures[..] else { return };
        self.programs
            .entry(((*door).to_owned(), (*name).to_owned()))
            .or_default()
            .insert(kernel.to_owned(), Program { instructions, runs, ns });
    }

    /// How many tests and guests failed.
    #[must_use]
    pub fn failures(&self) -> usize {
        self.failures.len()
    }

    /// No test ran.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.cells.is_empty() && self.failures.is_empty()
    }
}

impl fmt::Display for Results {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        row(f, "test", self.kernels.iter().cloned())?;
        row(f, "---", self.kernels.iter().map(|_| "---".to_owned()))?;
        for test in &self.tests {
            let words = self.kernels.iter().map(|kernel| {
                self.cells.get(&(test.clone(), kernel.clone())).map_or_else(String::new, |cell| cell.word.clone())
            });
            row(f, test, words)?;
        }
        if !self.programs.is_empty() {
            writeln!(
                f,
                "\nverifier: instructions looked at (of {VERIFIER_LIMIT}); then ns a run, emulated (with --count: instructions)\n"
            )?;
            row(f, "program", self.kernels.iter().cloned())?;
            row(f, "---", self.kernels.iter().map(|_| "---".to_owned()))?;
            for ((door, name), figures) in &self.programs {
                let all = self.kernels.iter().map(|kernel| figures.get(kernel).map_or_else(String::new, Program::text));
                row(f, &format!("{door} {name}"), all)?;
            }
            for ((door, name), figures) in &self.programs {
                for (kernel, program) in figures.iter().filter(|(_, p)| p.instructions > VERIFIER_WARNING) {
                    writeln!(
                        f,
                        "WARNING: {kernel} {door} {name}: {} instructions, more than {VERIFIER_WARNING}: a kernel that \
                         counts differently may refuse it",
                        program.instructions
                    )?;
                }
            }
        }
        let lacks: Vec<_> = self.cells.iter().filter(|(_, cell)| cell.word == "lack").collect();
        if !lacks.is_empty() {
            writeln!(f, "\nlacks, as expected")?;
        }
        for ((test, kernel), cell) in lacks {
            writeln!(f, "  {kernel} {test}: {}", cell.what)?;
        }
        if !self.failures.is_empty() {
            writeln!(f, "\nfailed")?;
        }
        for failure in &self.failures {
            writeln!(f, "  {failure}")?;
        }
        Ok(())
    }
}

impl Program {
    fn text(&self) -> String {
        match self.ns.checked_div(self.runs) {
            Some(mean) => format!("{} / {mean} ns", self.instructions),
            None => self.instructions.to_string(),
        }
    }
}

/// A line of a Markdown table that also reads well on a terminal.
fn row(f: &mut fmt::Formatter<'_>, name: &str, cells: impl Iterator<Item = String>) -> fmt::Result {
    write!(f, "| {name:<26} |")?;
    for cell in cells {
        write!(f, " {cell:<18} |")?;
    }
    writeln!(f)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::vm::kernels;

    fn results(lines: &[&str], ended: bool) -> Results {
        let mut results = Results::default();
        let run = Run {
            lines: lines.iter().map(|l| (*l).to_owned()).collect(),
            ended,
            why: if ended { String::new() } else { "hung".into() },
            took: Duration::ZERO,
        };
        results.add(&kernels::ALL[0], &run, Path::new("/nonexistent")).expect("nothing to write");
        results
    }

    #[test]
    fn words_reasons_and_failures() {
        let good =
            results(&["noise", "@vm test load.fexit ok 1.5 accepted", "@vm test load.x lack 0.1 no x here"], true);
        assert_eq!(good.failures(), 0);
        let text = good.to_string();
        assert!(text.contains("load.fexit") && text.contains("no x here"), "{text}");
        let bad = results(&["@vm test a FAIL 0.1 wrong number"], false);
        assert_eq!(bad.failures(), 2);
        assert!(bad.to_string().contains("wrong number") && bad.to_string().contains("hung"));
        assert!(results(&[], true).is_empty());
    }

    #[test]
    fn a_program_near_the_limit_is_warned_of() {
        let text = results(&["@vm program fexit tcp_send 700000 10 5000"], true).to_string();
        assert!(text.contains("WARNING") && text.contains("700000 / 500 ns"), "{text}");
        assert!(!results(&["@vm program fexit tcp_send 7000 0 0"], true).to_string().contains("WARNING"));
    }
}
