//! 37 million records in 41 days through one API that answered whoever asked: 10.44 requests a second,
//! by any number of principals, one id after the other or at random.

use super::{
    Background, Outcome,
    random::Random,
    world::{Ids, MONDAY, World},
};
use crate::{
    config,
    detect::{Change, Engine, Event},
};

/// Exchanges of the background before the attack, at most; with less traffic it is two weeks.
const LEARN_EXCHANGES: f64 = 40_000_000.0;
/// Longest time of learning, s.
const LEARN_MOST: f64 = 14.0 * 86_400.0;
/// 37 million in 41 days.
pub const RATE: f64 = 37.0e6 / (41.0 * 86_400.0);

/// In which order ids are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// One after the other.
    Sequential,
    /// Random numbers.
    Random,
    /// Random UUIDs.
    Uuid,
}

/// The attack.
#[derive(Debug, Clone, Copy)]
pub struct Attack {
    /// Who ask.
    pub principals: u64,
    /// Requests of the background a second, on average.
    pub background: f64,
    /// Order.
    pub order: Order,
    /// Days that it goes on.
    pub days: f64,
    /// Requests a second.
    pub rate: f64,
    /// Seed.
    pub seed: u64,
    /// Days of background before it; without, as many as [`LEARN_EXCHANGES`] allow.
    pub learn_days: Option<f64>,
}

/// Runs it over the simulated background until it is found, or over.
///
/// # Errors
/// The configuration of the detectors is wrong.
pub fn run(attack: &Attack, config: &config::Detect, progress: &mut dyn FnMut(f64)) -> anyhow::Result<Outcome> {
    let ids = if attack.order == Order::Uuid { Ids::Uuid } else { Ids::Number };
    against(&mut World::new(attack.background, ids, attack.seed, MONDAY), attack, config, progress)
}

/// Runs it over this background, which begins at [`MONDAY`], until it is found, or over.
///
/// # Errors
/// The configuration of the detectors is wrong.
pub fn against(
    world: &mut dyn Background,
    attack: &Attack,
    config: &config::Detect,
    progress: &mut dyn FnMut(f64),
) -> anyhow::Result<Outcome> {
    let mut engine = Engine::new(config)?;
    let mut random = Random::new(attack.seed, 2);
    let mut outcome = Outcome { scenario: "tmobile".into(), seed: attack.seed, ..Outcome::default() };
    let usual = (LEARN_EXCHANGES / world.rate().max(0.01)).min(LEARN_MOST);
    let (space, target) = (world.space(), world.target());
    let learn = attack.learn_days.map_or(usual, |d| d * 86_400.0);
    // The attack begins at any minute of the hour.
    let begin = MONDAY as f64 + learn + random.unit() * 3_600.0;
    outcome.learned_s = begin - MONDAY as f64;
    let end = begin + attack.days * 86_400.0;
    let mut next = begin;
    let mut exposed = vec![0_u64; usize::try_from(space / 64 + 1)?];
    let mut walking = 1 + random.below(space / 2);
    let mut n = 0_u64;
    while next < end {
        while world.step(next, &mut engine) {
            n += 1;
            if n.is_multiple_of(1 << 20) {
                progress((world.now() - MONDAY as f64) / (end - MONDAY as f64));
            }
            take(&mut engine, attack, target, begin, world.now(), &mut outcome);
            if outcome.detected {
                outcome.exchanges = n;
                return Ok(outcome);
            }
        }
        let customer = match attack.order {
            Order::Sequential => {
                walking = walking % space + 1;
                walking
            }
            _ => 1 + random.below(space),
        };
        world.attack(next, customer, random.below(attack.principals.max(1)), &mut engine);
        n += 1;
        outcome.records_until_detection += 1;
        let word = &mut exposed[usize::try_from(customer / 64)?.min((space / 64) as usize)];
        outcome.records_exposed_true += u64::from(*word & (1 << (customer % 64)) == 0);
        *word |= 1 << (customer % 64);
        take(&mut engine, attack, target, begin, next, &mut outcome);
        if outcome.detected {
            break;
        }
        next += random.gap(attack.rate);
    }
    outcome.exchanges = n;
    Ok(outcome)
}

fn take(engine: &mut Engine, attack: &Attack, target: usize, begin: f64, now: f64, outcome: &mut Outcome) {
    if !engine.findings().has_events() {
        return;
    }
    let events: Vec<Event> = engine.findings().drain().collect();
    for event in events.into_iter().filter(|e| e.change == Change::Opened) {
        let finding = event.finding;
        let attackers = |p: &str| (0..attack.principals).any(|i| p == super::world::attacker(i));
        let ours = now >= begin
            && engine.endpoint(target).is_some_and(|e| *e.route == *finding.route)
            && finding.principal.as_deref().is_none_or(attackers);
        // That somebody's token comes over plaintext, or from elsewhere, does not say that records are read.
        let said = finding.records_exposed.is_some();
        if ours && said && !outcome.detected {
            outcome.detected = true;
            outcome.detector = Some(finding.rule.clone());
            outcome.time_to_detect_s = Some(now - begin);
            outcome.records_exposed = finding.records_exposed;
            outcome.finding = Some(finding);
        } else if !ours {
            outcome.alarm(&finding);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// With little traffic the nightly export takes all morning; it is no leak, and random ids are found all the same.
    #[test]
    fn an_export_that_takes_all_morning_is_no_leak() {
        let attack = Attack {
            principals: 1,
            background: 1.0,
            order: Order::Random,
            days: 0.1,
            rate: RATE,
            seed: 1,
            learn_days: Some(4.0),
        };
        let outcome = run(&attack, &config::Detect::default(), &mut |_| {}).expect("a valid configuration");
        assert_eq!(outcome.detector.as_deref(), Some("D4"), "{outcome:?}");
        assert_eq!(outcome.false_alarms, 0, "{outcome:?}");
        let exact = outcome.records_exposed.map(|n| n.abs_diff(outcome.records_exposed_true));
        assert!(exact.is_some_and(|n| n <= 2), "{outcome:?}");
    }
}
