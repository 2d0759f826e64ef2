//! The invariants of the architecture as a list: who may import what.
//!
//! A new module of the agent gets a line here; a new arrow is a decision, so it is made here too.

/// One module of the agent and the modules that it may import.
#[derive(Debug)]
pub struct Module {
    /// Its name: `event.rs`, or the folder `probe/`.
    pub name: &'static str,
    /// What it may import, [`BASE`] aside.
    pub may: &'static [&'static str],
}

/// One outside crate and the only places that may name it.
#[derive(Debug)]
pub struct Fenced {
    /// Its name in paths; a trailing `*` stands for any ending.
    pub krate: &'static str,
    /// Path prefixes of files, from the root of the clone.
    pub only: &'static [&'static str],
    /// Why.
    pub why: &'static str,
}

const fn module(name: &'static str, may: &'static [&'static str]) -> Module {
    Module { name, may }
}

/// Values that every module may use: they import nothing of the agent but each other.
pub const BASE: [&str; 5] = ["exchange", "stats", "config", "status", "coverage"];

/// From the kernel to Exchange: these see bytes. From Exchange on, nothing does: `route` and all below may
/// import none of the first group.
pub const MODULES: [Module; 32] = [
    module("exchange", &[]),
    module("stats", &[]),
    module("config", &[]),
    module("status", &[]),
    module("coverage", &[]),
    // Bytes to exchanges.
    module("probe", &["event"]),
    module("event", &[]),
    module("proto", &[]),
    module("stream", &["event", "proto"]),
    module("conn", &["event", "stream", "proto", "identity"]),
    module("identity", &[]),
    module("kubernetes", &["identity"]),
    // Exchanges to knowledge.
    module("route", &[]),
    module("params", &["route"]),
    module("authorization", &["route"]),
    module("aggregate", &["route"]),
    module("inventory", &["route", "aggregate"]),
    module("openapi", &["route", "inventory"]),
    module("cyclonedx", &["inventory"]),
    module("detect", &["route", "params", "aggregate", "inventory"]),
    // Knowledge to people and collectors.
    module("export", &["route", "aggregate", "inventory", "detect", "identity"]),
    module("local", &["route", "aggregate", "inventory", "detect", "export", "table"]),
    module("scrape", &[]),
    module("table", &["route", "aggregate", "inventory", "detect"]),
    module("report", &["route", "aggregate", "inventory", "detect", "table"]),
    module("top", &["aggregate", "detect", "local", "table", "report"]),
    // Other ways in.
    module("accesslog", &["proto"]),
    module("recording", &["route"]),
    module(
        "replay",
        &[
            "accesslog",
            "openapi",
            "params",
            "recording",
            "route",
            "aggregate",
            "inventory",
            "detect",
            "table",
            "report",
        ],
    ),
    module("simulate", &["replay", "params", "route", "aggregate", "inventory", "detect", "report"]),
    module("doctor", &["probe", "identity", "local", "table"]),
    module(PIPELINE, &[ANY]),
];

/// In [`Module::may`]: everything.
pub const ANY: &str = "*";

/// The only module that imports everything, and that no other imports; `main.rs` and what it consists of
/// (`cli/`) start it.
pub const PIPELINE: &str = "pipeline";

/// Modules of the binary: they may use the whole library.
pub const COMMAND_LINE: [&str; 3] = ["main", "cli", "commands"];

/// Crates with one home.
pub const FENCED: [Fenced; 4] = [
    Fenced {
        krate: "aya",
        only: &["agent/src/probe/", "agent/src/probe.rs", "agent-ebpf/src/lib.rs"],
        why: "only the probes know aya",
    },
    Fenced { krate: "aya_log", only: &["agent/src/probe/", "agent/src/probe.rs"], why: "only the probes know aya" },
    Fenced {
        krate: "opentelemetry*",
        only: &["agent/src/export/", "agent/src/export.rs", "tests/"],
        why: "only the exporter knows OpenTelemetry",
    },
    Fenced {
        krate: "agent_ebpf",
        only: &[
            "agent/src/probe/",
            "agent/src/probe.rs",
            "agent/src/event.rs",
            "agent/src/event/",
            "agent-ebpf/",
            "tests/",
            // Benchmarks make records.
            "agent/benches/",
        ],
        why: "the kernel's records are read in one place",
    },
];

/// Plain functions over values, with time as an argument: no runtime in them.
pub const WITHOUT_TOKIO: [&str; 9] =
    ["event", "conn", "stream", "proto", "exchange", "route", "aggregate", "detect", "inventory"];

/// Names that say nothing about what is inside.
pub const NOT_NAMES: [&str; 6] = ["util", "utils", "common", "helper", "helpers", "misc"];
