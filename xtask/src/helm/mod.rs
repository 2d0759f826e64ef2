//! `cargo xtask helm`: the chart, checked by helm itself and by the API's own schemas.
//!
//! Documentation of values and the schema's coverage need no tool and are always checked. The rest needs helm
//! (five minutes to build, once a machine) and kubeconform: without `--if-cached` they are built, with it
//! their lack is said and is no failure, so that CI stays short on a new machine.

mod schemas;
mod values;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use clap::Args;

use crate::{
    place,
    setup::{self, Level},
    step,
};

/// Version of helm.
pub const HELM: &str = "3.22.0";
/// Version of kubeconform.
pub const KUBECONFORM: &str = "0.7.0";
/// Longest time for either build.
const LIMIT: Duration = Duration::from_secs(1500);
/// Versions of Kubernetes that the chart is rendered and checked for: the first that it takes, or nearly,
/// and a late one. Their schemas are in tests/kubernetes.
const VERSIONS: [&str; 2] = ["1.29.15", "1.34.4"];
/// What the default values may give the agent, and nothing else.
const CAPABILITIES: [&str; 4] = ["BPF", "PERFMON", "SYS_PTRACE", "DAC_READ_SEARCH"];
/// What must not be in the chart's output with default values.
const FORBIDDEN: [&str; 6] = [
    "privileged: true",
    "hostNetwork: true",
    "hostIPC: true",
    "hostPath:",
    "allowPrivilegeEscalation: true",
    "- SYS_ADMIN",
];

/// What to do.
#[derive(Debug, Args)]
pub struct Options {
    /// Write the table of values in helm/README.md instead of only checking it.
    #[arg(long)]
    write: bool,
    /// Check only what the tools at hand allow; build none.
    #[arg(long)]
    if_cached: bool,
    /// Make tests/kubernetes/VERSION.json of the `api/openapi-spec/swagger.json` of that Kubernetes.
    #[arg(long, value_name = "SWAGGER", requires = "version")]
    schemas: Option<PathBuf>,
    /// See --schemas.
    #[arg(long)]
    version: Option<String>,
}

/// Runs the command.
///
/// # Errors
/// The chart is wrong, or its documentation is not what its values say.
pub fn run(options: &Options) -> Result<()> {
    if let (Some(swagger), Some(version)) = (&options.schemas, &options.version) {
        return schemas::import(swagger, version);
    }
    let chart = place::root().join("helm");
    values::check(&chart, options.write)?;
    println!("helm: values, their documentation and their schema agree");
    if options.if_cached && (!helm()?.is_file() || !kubeconform()?.is_file()) {
        println!(
            "helm: NOT CHECKED here: lint, templates and manifests, since helm {HELM} is not built on this machine; \
             `cargo xtask helm` builds it (5 minutes, once) and checks them"
        );
        return Ok(());
    }
    setup::need(Level::Helm)?;
    let mut cases: Vec<Option<PathBuf>> = vec![None];
    for entry in fs::read_dir(chart.join("ci")).context("helm/ci is missing")? {
        cases.push(Some(entry?.path()));
    }
    cases.sort();
    let out = place::target().join("helm");
    fs::create_dir_all(&out)?;
    for version in VERSIONS {
        let schemas = schemas::unpack(version, &out)?;
        for case in &cases {
            one(&chart, case.as_deref(), version, &out, &schemas)?;
        }
    }
    refuses(&chart)?;
    println!("helm: {} sets of values for Kubernetes {} are right", cases.len(), VERSIONS.join(" and "));
    Ok(())
}

/// Lints, renders and checks one set of values for one version.
fn one(chart: &Path, case: Option<&Path>, version: &str, out: &Path, schemas: &Path) -> Result<()> {
    let name = case.and_then(Path::file_stem).map_or_else(|| "default".into(), |n| n.to_string_lossy().into_owned());
    let with = |command: &mut Command| {
        if let Some(case) = case {
            command.arg("--values").arg(case);
        }
    };
    let mut lint = Command::new(helm()?);
    lint.args(["lint", "--strict", "--quiet", "--kube-version", version]).arg(chart);
    with(&mut lint);
    step::output(&mut lint).with_context(|| format!("{name}: helm lint"))?;
    let mut template = Command::new(helm()?);
    template.args(["template", "apiscope"]).arg(chart).args([
        "--namespace",
        "observability",
        "--kube-version",
        version,
    ]);
    with(&mut template);
    let text = step::output(&mut template).with_context(|| format!("{name}: helm template"))?;
    let file = out.join(format!("{name}-{version}.yaml"));
    fs::write(&file, &text)?;
    let mut conform = Command::new(kubeconform()?);
    // Of the Prometheus operator's kinds no schema is here.
    conform.args(["-strict", "-summary", "-skip", "PodMonitor,PrometheusRule", "-schema-location"]);
    conform.arg(schemas.join("{{.ResourceKind}}.json")).arg(&file);
    let verdict = conform.output().context("failed to start kubeconform")?;
    let said = String::from_utf8_lossy(&verdict.stdout).into_owned();
    if !verdict.status.success() {
        bail!("{name}, Kubernetes {version}: kubeconform on {}:\n{said}", file.display());
    }
    println!("helm: {name}, Kubernetes {version}: {}", said.lines().last().unwrap_or_default());
    if case.is_none() {
        least_privilege(&text)?;
    }
    configuration(&text, &out.join(format!("{name}-{version}.toml")))
}

/// The default is least privilege: exactly the capabilities of the table in README.md.
fn least_privilege(text: &str) -> Result<()> {
    if let Some(bad) = FORBIDDEN.iter().find(|f| text.contains(**f)) {
        bail!("default values give `{bad}`");
    }
    let added: Vec<&str> = text
        .lines()
        .skip_while(|l| l.trim() != "add:")
        .skip(1)
        .map(str::trim)
        .take_while(|l| l.starts_with('#') || l.starts_with("- "))
        .filter_map(|l| l.strip_prefix("- "))
        .collect();
    if added != CAPABILITIES || !text.contains("drop: [ALL]") || !text.contains("readOnlyRootFilesystem: true") {
        bail!("default values give the capabilities {added:?}, not {CAPABILITIES:?} alone");
    }
    Ok(())
}

/// The agent itself reads the configuration that the chart makes.
fn configuration(text: &str, file: &Path) -> Result<()> {
    let lines = text.lines().skip_while(|l| l.trim() != "config.toml: |").skip(1);
    let toml: Vec<&str> = lines.take_while(|l| l.is_empty() || l.starts_with("    ")).map(str::trim_start).collect();
    fs::write(file, toml.join("\n"))?;
    let mut check = setup::cargo();
    check.args(["run", "--quiet", "--locked", "--package", "apiscope", "--", "config", "check"]).arg(file);
    let out = check.output().context("failed to start the agent")?;
    if !out.status.success() {
        bail!("the agent refuses {}: {}", file.display(), String::from_utf8_lossy(&out.stderr));
    }
    Ok(())
}

/// Wrong values are refused, by name.
fn refuses(chart: &Path) -> Result<()> {
    for wrong in [
        "otlp.endpont=http://x:1",
        "capture.sides=all",
        "metrics.port=99999",
        "otlp.endpoint=collector:4317",
        "nothing=1",
    ] {
        let mut template = Command::new(helm()?);
        template.args(["template", "apiscope"]).arg(chart).args(["--kube-version", VERSIONS[0], "--set", wrong]);
        if template.output().context("failed to start helm")?.status.success() {
            bail!("the schema lets `--set {wrong}` through");
        }
    }
    Ok(())
}

/// The built helm.
///
/// # Errors
/// There is no cache folder.
pub fn helm() -> Result<PathBuf> {
    Ok(place::cache("tools")?.join(format!("helm-{HELM}/helm")))
}

/// The built kubeconform.
///
/// # Errors
/// There is no cache folder.
pub fn kubeconform() -> Result<PathBuf> {
    Ok(place::cache("tools")?.join(format!("kubeconform-{KUBECONFORM}/kubeconform")))
}

/// Builds both with the `go` of this machine.
///
/// # Errors
/// Go is not here or too old, or their modules cannot be had.
pub fn build() -> Result<()> {
    if place::program("go").is_none() {
        bail!("helm and kubeconform are built with Go 1.25 or later, which is not installed");
    }
    for (tool, version, module) in [
        ("helm", HELM, "helm.sh/helm/v3/cmd/helm"),
        ("kubeconform", KUBECONFORM, "github.com/yannh/kubeconform/cmd/kubeconform"),
    ] {
        let whole = place::cache("tools")?.join(format!("{tool}-{version}"));
        if whole.join(tool).is_file() {
            continue;
        }
        let partial = whole.with_file_name(format!("{tool}-{version}.partial"));
        fs::remove_dir_all(&partial).ok();
        let mut go = Command::new("go");
        go.args(["install", &format!("{module}@v{version}")]).env("GOBIN", &partial);
        step::quietly(&format!("building {tool} {version} (once)"), &mut go, LIMIT)?;
        fs::remove_dir_all(&whole).ok();
        fs::rename(&partial, &whole).with_context(|| format!("failed to move {tool} to {}", whole.display()))?;
    }
    Ok(())
}
