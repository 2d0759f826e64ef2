//! `cargo xtask run`: builds the agent and starts it as root.

use std::{
    io::{BufRead as _, BufReader},
    os::unix::process::{CommandExt as _, ExitStatusExt as _},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use signal_hook::consts::{SIGINT, SIGTERM};

use crate::{
    build,
    demo::Demo,
    place, root,
    setup::{self, Level},
};

/// How long the agent may take to end after a signal (its final flush included) before it is killed.
pub const END: Duration = Duration::from_secs(15);

/// How long an agent that heard of a signal by itself is left alone.
const HEARD: Duration = Duration::from_secs(3);

/// How to run.
#[derive(Debug, Args)]
pub struct Options {
    /// Also start a small sample API with traffic on a free loopback port.
    #[arg(long)]
    demo: bool,
    /// Build what is shipped, not what is built soonest.
    #[arg(long)]
    release: bool,
    /// Arguments of `apiscope run`.
    #[arg(last = true)]
    agent: Vec<String>,
}

/// Runs the command.
///
/// # Errors
/// The build fails, this cannot be root, or the agent fails.
pub fn run(options: &Options) -> Result<()> {
    setup::need(Level::Run)?;
    // Before the build: nobody should wait for it to learn that they are not root.
    let agent = if options.release { place::agent() } else { place::quick_agent() };
    let mut command = root::command(&agent, "tracing the kernel")?;
    command.arg("run").args(&options.agent);
    if options.release { build::agent() } else { build::quick() }?;
    if !options.demo {
        return Err(command.exec()).with_context(|| format!("failed to start {}", agent.display()));
    }
    let demo = Demo::start()?;
    eprintln!("sample API: http://{}/ (ends with the agent)", demo.address());
    let stop = stopped()?;
    let mut agent = Running::start("the agent", &mut command)?;
    let status = loop {
        if let Some(status) = agent.child.try_wait()? {
            break status;
        }
        if stop.load(Ordering::Relaxed) {
            // A terminal's Ctrl-C reached the agent too, and a second one would cut its last flush short; a signal
            // sent to this process alone did not.
            let asked = Instant::now();
            while asked.elapsed() < HEARD && !agent.is_over()? {
                thread::sleep(Duration::from_millis(20));
            }
            let status = agent.end()?;
            if status.signal() == Some(SIGINT) {
                // Asked before it had its handlers in place: it is gone, which was the wish.
                return Ok(());
            }
            break status;
        }
        thread::sleep(Duration::from_millis(100));
    };
    drop(demo);
    if !status.success() {
        bail!("the agent ended: {status}");
    }
    Ok(())
}

/// Becomes true when someone asks this process to end; what it started can then be ended first.
///
/// # Errors
/// The handlers cannot be installed.
pub fn stopped() -> Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // A second one ends this process at once.
        signal_hook::flag::register_conditional_shutdown(signal, 130, flag.clone())?;
        signal_hook::flag::register(signal, flag.clone())?;
    }
    Ok(flag)
}

/// A helper of ours that ends when its standard input does: with the value, and with this process, however that ends.
#[derive(Debug)]
pub struct Tied(Child);

/// What it may take a [`Tied`] process to end by itself.
const PATIENCE: Duration = Duration::from_secs(2);

impl Tied {
    /// Starts `command`.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(what: &str, command: &mut Command) -> Result<Self> {
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        Ok(Self(child.with_context(|| format!("failed to start {what}"))?))
    }

    /// The first line that it writes, to be asked for once; empty when it ends without one.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        BufReader::new(self.0.stdout.take().context("it was asked before")?).read_line(&mut line)?;
        Ok(line.trim().to_owned())
    }
}

impl Drop for Tied {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        // It ends by itself then, or has no use for its input; there is nothing to do about one that was gone before.
        let end = Instant::now() + PATIENCE;
        while matches!(self.0.try_wait(), Ok(None)) && Instant::now() < end {
            thread::sleep(Duration::from_millis(20));
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A process that ends, by its id, with the value.
#[derive(Debug)]
pub struct Running {
    what: String,
    child: Child,
}

impl Running {
    /// Starts `command`.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(what: &str, command: &mut Command) -> Result<Self> {
        let child = command.spawn().with_context(|| format!("failed to start {what}"))?;
        Ok(Self { what: what.to_owned(), child })
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has ended by itself.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn is_over(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    /// Interrupts it and waits [`END`], then kills it.
    ///
    /// # Errors
    /// It had to be killed.
    pub fn end(&mut self) -> Result<std::process::ExitStatus> {
        if let Some(status) = self.child.try_wait()? {
            return Ok(status);
        }
        self.signal("INT");
        let asked = Instant::now();
        while asked.elapsed() < END {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            thread::sleep(Duration::from_millis(20));
        }
        self.signal("KILL");
        self.child.wait()?;
        bail!("{} did not end within {} s and was killed", self.what, END.as_secs());
    }

    /// By the command, since what sudo started is not ours to signal.
    fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        let sent = root::command("kill", "ending a process").and_then(|mut kill| {
            kill.args([&format!("-{name}"), &pid]);
            crate::step::output(&mut kill)
        });
        if let Err(error) = sent {
            eprintln!("  note: {}: {error:#}", self.what);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            eprintln!("  note: {error:#}");
        }
    }
}
