//! `cargo xtask cluster`: the chart and the agent in a real Kubernetes.
//!
//! `up` brings up one node on this machine: API server, etcd, controller manager, scheduler, kubelet,
//! containerd and CNI, in namespaces of its own, without a container engine and without a network. `test` brings one up,
//! installs the chart as a user would, and holds what a real OpenTelemetry Collector received against what the pods did; `down`
//! ends it and removes what it made, but for empty folders that containerd and CNI insist on. With `--kubeconfig` the same test runs against any cluster whose nodes can be
//! given images (`--load 'kind load docker-image'` and the like are run with the path of each archive).
//!
//! The collector runs in the cluster and prints what it decoded: that is read by `kubectl logs`, so that nothing of a
//! cluster need be reachable from here but its API server.
//!
//! Not a part of CI: the first run builds Kubernetes (some 20 minutes), and it needs root.

mod binaries;
mod config;
mod images;
mod kubectl;
mod node;
mod objects;
mod spans;
mod stages;
mod table;

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use clap::{Args, Subcommand};

pub use self::binaries::{are_built, build};
use self::kubectl::{Kubectl, wait};
use crate::{
    image, root,
    run::stopped,
    setup::{self, Level},
    step,
};

/// Longest time until the node is ready.
const READY: Duration = Duration::from_secs(120);

/// What to do.
#[derive(Debug, Args)]
pub struct Options {
    #[command(subcommand)]
    command: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Bring up a node on this machine; it stays until `down`.
    Up,
    /// Test the chart and the agent: on a node that is up, on one that is brought up for it, or on any cluster.
    Test(Test),
    /// End the node and remove what it made.
    Down,
}

/// How to test.
#[derive(Debug, Args)]
struct Test {
    /// Test this cluster instead of a node on this machine.
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// With --kubeconfig: gives the nodes an image; run with the path of its archive [such as 'kind load image-archive'].
    #[arg(long, value_name = "COMMAND", requires = "kubeconfig")]
    load: Option<String>,
    /// A static agent that was built before, instead of building it now.
    #[arg(long, value_name = "FILE")]
    program: Option<PathBuf>,
    /// Leave the node up, and what is installed.
    #[arg(long)]
    keep: bool,
    /// Pods of about a second.
    #[arg(long, default_value_t = 100, value_name = "PODS")]
    churn: usize,
    /// Also write the results here.
    #[arg(long, value_name = "OUT")]
    json: Option<PathBuf>,
}

/// Someone asked this process to end.
static STOP: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// Runs the command.
///
/// # Errors
/// The node does not come up, or the agent does not do what it should.
pub fn run(options: &Options) -> Result<()> {
    match &options.command {
        Action::Up => {
            prepare()?;
            if node::is_up() {
                println!("the node is up already");
            } else {
                let guard = Down(false);
                up()?;
                guard.keep();
            }
            println!(
                "use it: KUBECONFIG={} {}",
                node::kubeconfig().display(),
                binaries::folder()?.join("kubectl").display()
            );
            println!("end it: cargo xtask cluster down");
            Ok(())
        }
        Action::Test(test) => run_test(test),
        Action::Down => {
            must_be_root()?;
            node::down()
        }
    }
}

fn run_test(test: &Test) -> Result<()> {
    let (kubectl, load, guard) = match &test.kubeconfig {
        Some(file) => {
            STOP.set(stopped()?).ok();
            setup::need(Level::Cluster)?;
            (Kubectl::of(file)?, Load::Command(test.load.clone()), Down(true))
        }
        None => {
            prepare()?;
            let was_up = node::is_up();
            let guard = Down(was_up || test.keep);
            if !was_up {
                up()?;
            }
            (Kubectl::of_node()?, Load::Node, guard)
        }
    };
    let agent = image::made(test.program.as_deref())?;
    for archive in [images::programs()?, agent] {
        load.image(&archive)?;
    }
    let own = test.kubeconfig.is_none().then(node::Node::here);
    let mut stages = stages::Stages::new(&kubectl, own.as_ref(), test.churn);
    let outcome = stages.run();
    let table = stages.finish(test.keep);
    print!("\n{table}");
    if let Some(file) = &test.json {
        std::fs::write(file, table.json()).with_context(|| format!("failed to write {}", file.display()))?;
    }
    drop(guard);
    outcome?;
    match table.failures() {
        0 => Ok(()),
        n => bail!("cluster: {n} failed"),
    }
}

fn must_be_root() -> Result<()> {
    if !root::is_root() {
        bail!("a node has namespaces and cgroups, which only root can make: run this as root");
    }
    Ok(())
}

fn prepare() -> Result<()> {
    must_be_root()?;
    STOP.set(stopped()?).ok();
    setup::need(Level::Cluster)
}

fn up() -> Result<()> {
    let started = Instant::now();
    let say = |what: &str| println!("cluster: {:5.1} s  {what}", started.elapsed().as_secs_f64());
    say("starting a node");
    node::up()?;
    say("its programs run");
    node::Node::here().import(&images::programs()?)?;
    let kubectl = Kubectl::of_node()?;
    wait("the node becomes ready", READY, || {
        let node = kubectl.json(&["get", "node", config::NAME])?;
        let conditions = node["status"]["conditions"].as_array().cloned().unwrap_or_default();
        Ok(conditions.iter().any(|c| c["type"] == "Ready" && c["status"] == "True").then_some(()))
    })?;
    say("the node is ready");
    Ok(())
}

/// Ends the node, however this program comes to its own end, unless it is to stay.
struct Down(bool);

impl Down {
    fn keep(mut self) {
        self.0 = true;
    }
}

impl Drop for Down {
    fn drop(&mut self) {
        if !self.0 && root::is_root() && node::state().exists() {
            println!("cluster: ending the node");
            if let Err(error) = node::down() {
                eprintln!("error: {error:#} (`cargo xtask cluster down` tries again)");
            }
        }
    }
}

/// How nodes get images.
enum Load {
    Node,
    Command(Option<String>),
}

impl Load {
    fn image(&self, archive: &Path) -> Result<()> {
        match self {
            Self::Node => node::Node::here().import(archive),
            Self::Command(None) => {
                println!("cluster: the nodes must have the image of {}", archive.display());
                Ok(())
            }
            Self::Command(Some(command)) => {
                let mut words = command.split_whitespace();
                let program = words.next().context("--load is empty")?;
                step::plainly(Command::new(program).args(words).arg(archive))
            }
        }
    }
}

/// Fails when this program was asked to end.
fn go_on() -> Result<()> {
    if STOP.get().is_some_and(|stop| stop.load(Ordering::Relaxed)) {
        bail!("interrupted");
    }
    Ok(())
}
