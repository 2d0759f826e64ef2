//! Running a long step: quiet when it works, its last lines when it fails, and a sign of life meanwhile.

use std::{
    fs::{self, File},
    io::{self, IsTerminal as _, Write as _},
    process::{Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use crate::place;

/// How often a terminal's line moves.
const TICK: Duration = Duration::from_millis(250);
/// How often a pipe (a CI log) gets a line.
const LINE: Duration = Duration::from_secs(20);
/// Lines of a failed step's output that are shown.
const TAIL: usize = 25;

/// Runs `command` with its output in a log file, showing `what` and the seconds it takes.
///
/// # Errors
/// It cannot be started, fails, or takes longer than `limit`; the message ends with its last lines.
pub fn quietly(what: &str, command: &mut Command, limit: Duration) -> Result<()> {
    let log = place::cache("logs")?.join(format!("{}-{}.log", slug(what), std::process::id()));
    let file = File::create(&log).with_context(|| format!("failed to write {}", log.display()))?;
    let program = command.get_program().to_string_lossy().into_owned();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file)
        .spawn()
        .with_context(|| format!("{what}: failed to start {program}"))?;
    let started = Instant::now();
    let mut line = Progress::new(what);
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break Some(status);
        }
        if started.elapsed() > limit {
            child.kill().and_then(|()| child.wait()).ok();
            break None;
        }
        line.tick(started.elapsed());
        thread::sleep(if started.elapsed() < TICK { Duration::from_millis(20) } else { TICK });
    };
    let seconds = started.elapsed().as_secs();
    if status.is_some_and(|s| s.success()) {
        line.end(&format!("done in {seconds} s"));
        fs::remove_file(&log).ok();
        return Ok(());
    }
    line.end(&format!("failed after {seconds} s"));
    let text = fs::read_to_string(&log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    let tail = lines[lines.len().saturating_sub(TAIL)..].join("\n    ");
    let why = status.map_or_else(|| format!("did not end within {} s", limit.as_secs()), |s| s.to_string());
    bail!("{what}: {program}: {why}\n    {tail}\n    (all of it: {})", log.display());
}

/// Runs `command` with this terminal and insists on success.
///
/// # Errors
/// It cannot be started or fails.
pub fn plainly(command: &mut Command) -> Result<()> {
    let status = status(command)?;
    if !status.success() {
        bail!("{}: {status}", shown(command));
    }
    Ok(())
}

/// Runs `command` with this terminal.
///
/// # Errors
/// It cannot be started.
pub fn status(command: &mut Command) -> Result<ExitStatus> {
    command.status().with_context(|| format!("failed to start {}", shown(command)))
}

/// Standard output of a short command that must succeed.
///
/// # Errors
/// It cannot be started or fails.
pub fn output(command: &mut Command) -> Result<String> {
    let out = command.stdin(Stdio::null()).output().with_context(|| format!("failed to start {}", shown(command)))?;
    if !out.status.success() {
        let stderr = String::from_utf8_lossy(&out.stderr);
        bail!("{}: {}: {}", shown(command), out.status, stderr.lines().last().unwrap_or_default());
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// The command as one would type it.
#[must_use]
pub fn shown(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}

fn slug(what: &str) -> String {
    what.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect()
}

struct Progress<'a> {
    what: &'a str,
    terminal: bool,
    said: Option<Duration>,
}

impl<'a> Progress<'a> {
    fn new(what: &'a str) -> Self {
        Self { what, terminal: io::stderr().is_terminal(), said: None }
    }

    fn tick(&mut self, elapsed: Duration) {
        let mut out = io::stderr().lock();
        if self.terminal {
            let _ = write!(out, "\r  {} ... {} s", self.what, elapsed.as_secs());
            let _ = out.flush();
        } else if self.said.is_none_or(|at| elapsed - at >= LINE) {
            self.said = Some(elapsed);
            let _ = match elapsed.as_secs() {
                0 => writeln!(out, "  {} ...", self.what),
                seconds => writeln!(out, "  {} ... {seconds} s", self.what),
            };
        }
    }

    fn end(&self, how: &str) {
        let start = if self.terminal { "\r" } else { "" };
        eprintln!("{start}  {} {how}", self.what);
    }
}
