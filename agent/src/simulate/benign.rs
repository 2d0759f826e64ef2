//! Weeks without an attack, but with all that makes detectors cry: seasons, nightly and monthly jobs,
//! support, deployments, a campaign, an incident, a scanner's visit, an expired token, a broken client, a
//! holiday peak. What is found is a false alarm, or says too little to be one (low).

use std::collections::BTreeMap;

use serde::Serialize;

use super::{
    town::{Town, at},
    world::MONDAY,
};
use crate::{
    config,
    detect::{Change, Severity, rules},
    exchange::{Auth, Method, Peer},
};

/// What came out.
#[derive(Debug, Serialize, Default)]
pub struct Quiet {
    /// Days of virtual time.
    pub days: u64,
    /// Exchanges.
    pub exchanges: u64,
    /// Services.
    pub services: u64,
    /// Findings by rule and severity: low, medium, high, critical.
    pub findings: BTreeMap<String, [u64; 4]>,
    /// Findings of at least medium severity, for each service and 30 days.
    pub false_alarms_per_service_and_month: f64,
    /// Their sentences.
    pub alarms: Vec<String>,
    /// Bytes of the detectors' state, about.
    pub state_bytes: u64,
    /// Seed.
    pub seed: u64,
}

const DAY: f64 = 86_400.0;

/// Runs it.
///
/// # Errors
/// The configuration of the detectors is wrong.
pub fn run(
    days: u64,
    rate: f64,
    seed: u64,
    config: &config::Detect,
    progress: &mut dyn FnMut(f64),
) -> anyhow::Result<Quiet> {
    let mut town = Town::new(rate, seed, MONDAY, config)?;
    let mut quiet = Quiet { days, seed, services: 3, ..Quiet::default() };
    for rule in rules() {
        quiet.findings.insert(rule.id.into(), [0; 4]);
    }
    let mut released = None;
    for day in 0..days {
        let start = MONDAY as f64 + day as f64 * DAY;
        progress(day as f64 / days as f64);
        match day {
            // A deployment: new endpoints, a new workload that calls billing.
            8 => released = Some(town.place("shop", Method::Get, "/v2/customers/{int}/loyalty", Auth::Bearer, 600)),
            12 => (town.crowd, town.new) = (3.0, 0.25),
            15 => (town.crowd, town.new) = (1.0, 0.01),
            // A release: customers' programs ask half as often.
            25 => town.chatty = 4,
            28 => town.chatty = 2,
            30 => town.crowd = 2.5,
            34 => town.crowd = 1.0,
            _ => {}
        }
        nightly(&mut town, start, day);
        for hour in 2..24 {
            town.run(start + hour as f64 * 3_600.0);
            if (8..18).contains(&hour) && day % 7 < 5 {
                support(&mut town);
            }
            if let Some(place) = released {
                for _ in 0..40 {
                    let user = 1 + town.random.below(town.newest);
                    town.send(place, user, Some(user), |_| {});
                }
            }
            match (day, hour) {
                (8.., 11) => town
                    .send(at::INVOICE, 9_000_000_777, Some(77), |x| x.caller = Some("shop/deployment/loyalty".into())),
                (16, 14) => town.trouble = (0.3, 5),
                (16, 15) => town.trouble = (0.002, 1),
                (20, 10) => scanner(&mut town),
                (22, 12) => expired(&mut town),
                (23, 9) => broken(&mut town),
                _ => {}
            }
        }
        for event in town.engine.findings().drain().collect::<Vec<_>>() {
            if event.change != Change::Opened {
                continue;
            }
            let f = event.finding;
            quiet.findings.entry(f.rule.clone()).or_default()[f.severity as usize] += 1;
            if f.severity >= Severity::Medium {
                quiet.alarms.push(format!("day {day}: {} {}: {}", f.severity.name(), f.rule, f.explanation));
            }
        }
    }
    quiet.exchanges = town.exchanges;
    quiet.state_bytes = town.engine.bytes().iter().map(|(_, n)| *n as u64).sum();
    let months = days as f64 / 30.0;
    quiet.false_alarms_per_service_and_month = quiet.alarms.len() as f64 / quiet.services as f64 / months;
    Ok(quiet)
}

/// The job of every night, and of the first of the month.
fn nightly(town: &mut Town, start: f64, day: u64) {
    town.run(start + 3_600.0);
    let many = if day % 30 == 15 { 6_000 } else { 3_000 };
    for n in 0..many {
        town.run(start + 3_600.0 + 3_000.0 * n as f64 / many as f64);
        town.send(at::INVOICE, 9_000_000_002, Some(1 + (day * 3_000 + n) % 11_000_000), |_| {});
    }
}

/// Ten people of support look at the customers who call them.
fn support(town: &mut Town) {
    for person in 0..10 {
        for _ in 0..town.random.below(9) {
            let customer = 1 + town.random.below(town.newest);
            town.send(at::CUSTOMER, 8_000_000_000 + person, Some(customer), |x| {
                x.client = Peer::Ip(([10, 2, 0, person as u8], 20_000).into());
            });
        }
    }
}

/// A scanner of the internet comes by.
fn scanner(town: &mut Town) {
    let place = town.place("shop", Method::Get, "/{unmatched}", Auth::None, 150);
    for n in 0..400 {
        town.now += 0.2;
        town.send(place, 1, Some(n), |x| {
            x.status = 404;
            x.client = Peer::Ip(([198, 51, 100, 7], 50_000).into());
            x.user_agent = Some("zgrab/0.x".into());
        });
    }
}

/// One client goes on with a token that is over.
fn expired(town: &mut Town) {
    for _ in 0..2_000 {
        town.now += 0.3;
        town.send(at::CUSTOMER, 4_242, Some(4_242), |x| x.status = 401);
    }
}

/// One client asks for what is gone, again and again.
fn broken(town: &mut Town) {
    for _ in 0..3_000 {
        town.now += 0.1;
        town.send(at::ORDER, 5_151, Some(5), |x| x.status = 404);
    }
}
