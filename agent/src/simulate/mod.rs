//! Attacks that anyone can replay, in virtual time: a background, an attack, and the same detectors as in
//! the agent. What is printed is what an operator would have known, and what was true.
//!
//! Everything follows from the seed: the same arguments give the same result on every machine.

pub mod benign;
pub mod random;
pub mod recorded;
pub mod scenarios;
pub mod tmobile;
pub mod town;
pub mod world;

use serde::Serialize;

use crate::detect::{Engine, Finding, Severity};

/// What goes on beside an attack.
pub trait Background {
    /// Hands the next exchange to the engine; false when that comes at or after `until` (s since the epoch).
    fn step(&mut self, until: f64, engine: &mut Engine) -> bool;
    /// An attacker's request for an object, at `now`.
    fn attack(&mut self, now: f64, object: u64, who: u64, engine: &mut Engine);
    /// Seconds since the epoch.
    fn now(&self) -> f64;
    /// Number of the endpoint that is attacked.
    fn target(&self) -> usize;
    /// Ids of objects go from 1 to this.
    fn space(&self) -> u64;
    /// Exchanges a second, on average.
    fn rate(&self) -> f64;
}

/// What came out.
#[derive(Debug, Clone, Serialize, Default)]
pub struct Outcome {
    /// Scenario.
    pub scenario: String,
    /// The attack was found.
    pub detected: bool,
    /// By which rule.
    pub detector: Option<String>,
    /// From the first request of the attack to the finding, s.
    pub time_to_detect_s: Option<f64>,
    /// Records exposed by then, as the agent estimates it.
    pub records_exposed: Option<u64>,
    /// Records exposed by then, as it was.
    pub records_exposed_true: u64,
    /// Requests of the attack by then.
    pub records_until_detection: u64,
    /// Findings of at least medium severity that the attack did not cause.
    pub false_alarms: u64,
    /// What these were.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub alarms: Vec<String>,
    /// Background before the attack, s of virtual time.
    pub learned_s: f64,
    /// Exchanges that the detectors saw.
    pub exchanges: u64,
    /// The recording that was the background, where one was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recording: Option<recorded::Summary>,
    /// Seed.
    pub seed: u64,
    /// The finding.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub finding: Option<Finding>,
}

impl Outcome {
    /// A finding that is no part of the attack.
    fn alarm(&mut self, finding: &Finding) {
        if finding.severity >= Severity::Medium {
            self.false_alarms += 1;
            if self.alarms.len() < 20 {
                self.alarms.push(format!("{} {}", finding.rule, finding.explanation));
            }
        }
    }
}
