//! One attack for each detector, and beside each the thing that looks alike and is none: the first must be
//! found by its rule, the second must not.

use super::{
    Outcome,
    town::{Town, address, at},
    world::MONDAY,
};
use crate::{
    config,
    detect::{Change, rules},
    exchange::{Auth, Exchange, Marks, Method, Peer, Scheme, Side},
};

/// Two stories about one rule.
pub struct Scenario {
    /// The rule.
    pub rule: &'static str,
    /// What happens.
    pub attack: &'static str,
    /// What looks alike.
    pub benign: &'static str,
    /// Days of background before.
    days: f64,
    /// Requests of it a second.
    rate: f64,
    play: fn(&mut Town, bool),
}

/// Requests a second of the background, and where a rule needs more of it.
const RATE: f64 = 0.05;
const BUSY: f64 = 3.0;

fn public(a: u8) -> Peer {
    Peer::Ip(([93, 184, 216, a], 44_000).into())
}

/// `n` exchanges, `gap` seconds apart.
fn many(town: &mut Town, n: u64, gap: f64, mut one: impl FnMut(&mut Town, u64)) {
    for i in 0..n {
        let next = town.now + gap;
        town.run(next);
        one(town, i);
    }
}

fn destination(x: &mut Exchange, ip: [u8; 4]) {
    x.side = Side::Client;
    x.server = Peer::Ip((ip, 80).into());
}

/// All of them, in the order of the rules.
#[must_use]
pub fn all() -> Vec<Scenario> {
    let s = |rule, days, attack, benign, play| {
        let rate = if matches!(rule, "D5" | "D7" | "D8" | "D13" | "D18") { BUSY } else { RATE };
        Scenario { rule, attack, benign, days, rate, play }
    };
    vec![
        s("D1", 2.0, "customers' records without a credential", "a health check without a credential", |t, attack| {
            let place = if attack { at::CUSTOMER } else { at::HEALTH };
            many(t, 5, 1.0, |t, i| {
                t.send(place, i, attack.then_some(i), |x| (x.auth, x.principal) = (Auth::None, None))
            });
        }),
        s("D2", 0.1, "an endpoint that never asks", "one that refuses some", |t, attack| {
            let place = t.place("shop", Method::Get, "/v1/exports/{int}", Auth::None, 9_000);
            many(t, 600, 0.5, |t, i| {
                t.send(place, i, Some(i), |x| {
                    if !attack && i % 50 == 0 {
                        x.status = 401
                    }
                })
            });
        }),
        s("D3", 0.1, "passwords are tried out", "one client goes on with an expired token", |t, attack| {
            many(t, 300, 0.5, |t, i| {
                t.send(at::CUSTOMER, if attack { i } else { 7 }, Some(1), |x| (x.status, x.client) = (401, public(1)));
            });
        }),
        s("D4", 2.0, "one token reads random customers", "one token reads its own customer", |t, attack| {
            many(t, 80, 2.0, |t, i| t.send(at::CUSTOMER, 77, Some(if attack { i * 7_919 } else { 77 }), |_| {}));
        }),
        s("D5", 2.0, "300 tokens walk the ids", "300 tokens read their own", |t, attack| {
            many(t, 120, 0.1, |t, i| {
                let user = 1_000_000 + i * 9_999;
                t.send(at::CUSTOMER, user, Some(if attack { 500_000 + i } else { user }), |_| {});
            });
        }),
        s("D6", 2.0, "one session fetches 300 MB", "one session fetches 5 MB", |t, attack| {
            many(t, if attack { 1_500 } else { 25 }, 0.2, |t, i| t.send(at::FILE, 5, Some(i % 40), |_| {}));
        }),
        s("D7", 5.0, "3,000 tokens read a record each minute or so", "three times as many customers", |t, attack| {
            if attack {
                many(t, 60_000, 0.4, |t, _| {
                    let (user, id) = (6_000_000 + t.random.below(3_000), 1 + t.random.below(t.newest));
                    t.send(at::CUSTOMER, user, Some(id), |_| {});
                });
            } else {
                t.crowd = 3.0;
                let end = t.now + 24_000.0;
                t.run(end);
            }
        }),
        s("D8", 9.0, "60 tokens use one endpoint only", "60 busy customers", |t, attack| {
            many(t, 1_800, 1.0, |t, i| {
                let user = 6_100_000 + i % 60;
                // Drawn, not `i % 3`: that would give each of the 60 the same endpoint for ever.
                let elsewhere = !attack && t.random.chance(1.0 / 3.0);
                t.send(if elsewhere { at::ORDER } else { at::CUSTOMER }, user, Some(user), |_| {});
            });
        }),
        s("D9", 4.0, "a debug endpoint appears", "an unknown path is refused", |t, attack| {
            let place = t.place("shop", Method::Get, "/debug/users/{int}", Auth::None, 4_000);
            many(t, 10, 60.0, |t, i| t.send(place, i, Some(i), |x| x.status = if attack { 200 } else { 404 }));
        }),
        s("D10", 1.0, "a deprecated endpoint is used", "the current one is used", |t, attack| {
            many(t, 3, 1.0, |t, i| {
                t.send(at::ORDER, i, Some(i), |x| {
                    if attack {
                        x.marks.insert(Marks::DEPRECATED)
                    }
                })
            });
        }),
        s("D11", 8.0, "a workload that never called billing", "one that calls it every day", |t, attack| {
            t.send(at::INVOICE, 9_000_000_000, Some(1), |x| {
                if attack {
                    x.caller = Some("guest/pod/shell".into())
                }
            });
        }),
        s("D12", 0.1, "tokens over plaintext HTTP", "tokens on loopback", |t, attack| {
            many(t, 5, 1.0, |t, i| {
                t.send(at::ORDER, i, Some(i), |x| {
                    (x.scheme, x.tls_version) = (Scheme::Http, None);
                    x.client = if attack { public(3) } else { Peer::parse("127.0.0.1:5000") };
                });
            });
        }),
        s("D13", 2.0, "answers grow tenfold", "answers grow by half", |t, attack| {
            many(t, 4_000, 0.3, |t, _| {
                let user = 1 + t.random.below(t.newest);
                t.send(at::ORDER, user, Some(user), |x| x.response_bytes = if attack { 90_000 } else { 1_500 });
            });
        }),
        s("D14", 0.1, "paths are tried out", "one path is asked for again and again", |t, attack| {
            let place = t.place("shop", Method::Get, "/{unmatched}", Auth::None, 100);
            many(t, 90, 0.5, |t, i| {
                t.send(place, 1, Some(if attack { i } else { 1 }), |x| (x.status, x.client) = (404, public(4)))
            });
        }),
        s("D15", 4.0, "DELETE where there was only GET", "OPTIONS before a request of a browser", |t, attack| {
            let method = if attack { Method::Delete } else { Method::Options };
            let place = t.place("shop", method, "/v1/customers/{int}", Auth::None, 50);
            t.send(place, 3, Some(3), |_| {});
        }),
        s("D16", 9.0, "an internal key is used from the internet", "a customer is somewhere else", |t, attack| {
            let (place, user) = if attack { (at::INVOICE, 9_000_000_001) } else { (at::ORDER, 12) };
            t.send(place, user, Some(5), |x| x.client = public(5));
        }),
        s("D17", 22.0, "hundreds of orders on a Sunday night", "the Sunday job again", |t, attack| {
            // A job that runs on Mondays at noon, and once at another hour.
            let _ = attack;
            many(t, 700, 2.0, |t, i| {
                t.send(if attack { 9 } else { at::PRODUCTS }, i, attack.then_some(i).or(Some(i)), |_| {})
            });
        }),
        s("D18", 9.0, "a token hops between endpoints at random", "a customer reads much", |t, attack| {
            many(t, 300, 20.0, |t, i| {
                let rare = [at::FILE, at::BUY, at::CHARGE][(i % 3) as usize];
                t.send(if attack { rare } else { at::CUSTOMER }, 31, Some(31), |_| {});
            });
        }),
        s("D19", 0.1, "one token from 30 networks", "one phone on 3 networks", |t, attack| {
            many(t, 120, 5.0, |t, i| {
                t.send(at::ORDER, 99, Some(99), |x| {
                    let net = if attack { i % 30 } else { i % 3 };
                    x.client = address(1_000 + net * 31);
                    x.user_agent = Some(format!("agent-{}", if attack { i % 9 } else { 0 }).into());
                });
            });
        }),
        s("D20", 4.0, "the id comes a second time", "a page number comes", |t, attack| {
            many(t, 3, 1.0, |t, i| {
                t.send(at::ORDER, i, Some(i), |x| {
                    x.query_keys = vec![if attack { "customer_id" } else { "page" }.into()].into()
                })
            });
        }),
        s("D21", 4.0, "the metadata address after a request", "another machine after a request", |t, attack| {
            let place = t.place("shop", Method::Get, "/latest/meta-data/{id}", Auth::None, 80);
            t.send(at::ORDER, 1, Some(1), |_| {});
            t.now += 0.2;
            t.send(place, 1, Some(1), |x| destination(x, if attack { [169, 254, 169, 254] } else { [10, 9, 9, 9] }));
        }),
    ]
}

/// Plays one story. For an attack `detected` says that its rule found it.
///
/// # Errors
/// The configuration is wrong.
pub fn run(scenario: &Scenario, attack: bool, seed: u64, config: &config::Detect) -> anyhow::Result<Outcome> {
    play(scenario, attack, seed, config, false)
}

/// As [`run`]; the agent may be restarted in the middle of learning and before the story.
fn play(s: &Scenario, attack: bool, seed: u64, config: &config::Detect, restarts: bool) -> anyhow::Result<Outcome> {
    let scenario = s;
    // The catalogue is public, and its operator has said so.
    let catalogue =
        config::Allow { rule: Some("D2".into()), route: Some("/v1/products/*".into()), ..config::Allow::default() };
    let mut config = config.clone();
    config.allow.push(catalogue);
    let mut town = Town::new(scenario.rate, seed, MONDAY, &config)?;
    let mut outcome = Outcome { scenario: scenario.rule.to_lowercase(), seed, ..Outcome::default() };
    if scenario.rule == "D17" {
        sundays(&mut town, scenario.days);
    } else {
        let end = MONDAY as f64 + scenario.days * 86_400.0 + 36_000.0;
        if restarts {
            town.run((MONDAY as f64 + end) / 2.0);
            town.restart(&config)?;
        }
        town.run(end);
    }
    if restarts {
        town.restart(&config)?;
    }
    for event in town.engine.findings().drain().collect::<Vec<_>>() {
        if event.change == Change::Opened && event.finding.rule == scenario.rule {
            outcome.alarm(&event.finding);
        }
    }
    let begin = town.now;
    outcome.learned_s = begin - MONDAY as f64;
    let before = town.exchanges;
    (scenario.play)(&mut town, attack);
    let end = town.now + 3_700.0;
    town.run(end);
    outcome.records_until_detection = town.exchanges - before;
    for event in town.engine.findings().drain().collect::<Vec<_>>() {
        let f = event.finding;
        if event.change == Change::Opened && f.rule == scenario.rule && !outcome.detected {
            outcome.detected = true;
            outcome.detector = Some(f.rule.clone());
            outcome.time_to_detect_s = Some((f.first_seen as f64 / 1e9 - begin).max(0.0));
            outcome.records_exposed = f.records_exposed;
            outcome.finding = Some(f);
        }
    }
    outcome.exchanges = town.exchanges;
    Ok(outcome)
}

/// An endpoint that is used on Mondays at noon only, for weeks, and then it is Sunday, 03:00.
fn sundays(town: &mut Town, days: f64) {
    let place = town.place("billing", Method::Get, "/statements/{int}", Auth::ApiKey, 900);
    for week in 0..(days / 7.0) as u64 {
        town.run(MONDAY as f64 + week as f64 * 604_800.0 + 43_200.0);
        for i in 0..900 {
            town.now += 1.0;
            town.send(place, 9_000_000_001, Some(i % 50), |_| {});
        }
    }
    town.run(MONDAY as f64 + 27.0 * 86_400.0 + 10_800.0);
}

/// Every scenario's rule exists.
#[must_use]
pub fn find(name: &str) -> Option<Scenario> {
    let rule = rules().into_iter().find(|r| r.id.eq_ignore_ascii_case(name) || r.name == name)?;
    all().into_iter().find(|s| s.rule == rule.id)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every story of every rule, without and with restarts of the agent while it learns and before the story: attacks
    /// are found, what looks alike is not. The rules that learn for
    /// more than a week learn for a day or two here, or a debug build would take minutes; `apiscope simulate all`
    /// plays them at full length.
    #[test]
    fn every_rule_finds_its_attack_and_nothing_else() {
        let thresholds = [("D7.learn_hours", 24.0), ("D8.learn_days", 1.0), ("D18.learn_days", 0.5)];
        let config = config::Detect {
            thresholds: thresholds.map(|(name, value)| (name.to_owned(), value)).into(),
            ..config::Detect::default()
        };
        let mut wrong = Vec::new();
        for (seed, restarts) in [(1, false), (2, true)] {
            for mut scenario in all() {
                scenario.days = match scenario.rule {
                    "D5" => 0.1,
                    "D7" | "D8" | "D13" | "D18" => 0.7,
                    _ => scenario.days,
                };
                if matches!(scenario.rule, "D8" | "D18") {
                    scenario.rate = 1.0;
                }
                for attack in [true, false] {
                    // These take longest, and have their state tested with others.
                    if restarts && (matches!(scenario.rule, "D5" | "D13") || scenario.rule == "D7" && !attack) {
                        continue;
                    }
                    let outcome = play(&scenario, attack, seed, &config, restarts).expect("a valid configuration");
                    if outcome.detected != attack || outcome.false_alarms > 0 {
                        wrong.push(format!("{} attack {attack} restarts {restarts}: {outcome:?}", scenario.rule));
                    }
                }
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
        let named: Vec<_> = all().iter().map(|s| s.rule).collect();
        assert_eq!(named, rules().iter().map(|r| r.id).collect::<Vec<_>>());
    }

    /// A restart in the middle of an attack: what was counted so far counts, an open finding goes on and is not
    /// opened again, and a job that is known stays known.
    #[test]
    fn a_restart_changes_nothing_that_matters() {
        let config = config::Detect::default();
        let mut town = Town::new(RATE, 1, MONDAY, &config).expect("valid");
        let read = |town: &mut Town, user, ids: std::ops::Range<u64>| {
            for id in ids {
                town.now += 1.0;
                town.send(at::CUSTOMER, user, Some(id * 7_919), |_| {});
            }
        };
        let opened = |town: &mut Town| {
            let events: Vec<_> = town.engine.findings().drain().collect();
            events.iter().filter(|e| e.change == Change::Opened && e.finding.rule == "D4").count()
        };
        for day in 0..3 {
            town.run((MONDAY + day * 86_400 + 3_600) as f64);
            read(&mut town, 1, 0..400);
            town.restart(&config).expect("its own state");
        }
        town.run((MONDAY + 3 * 86_400) as f64);
        assert_eq!(opened(&mut town), 0, "the job was there from the first day on");
        read(&mut town, 2, 0..30);
        assert_eq!(opened(&mut town), 0);
        town.restart(&config).expect("its own state");
        read(&mut town, 2, 30..55);
        assert_eq!(opened(&mut town), 1, "30 and 25 are more than 50");
        town.restart(&config).expect("its own state");
        read(&mut town, 2, 55..90);
        assert_eq!(opened(&mut town), 0, "it is open already");
        assert_eq!(town.engine.view().iter().filter(|f| f.rule == "D4").count(), 1);
        let state = town.engine.save();
        let mut other = crate::detect::Engine::new(&config).expect("valid");
        assert!(other.load(serde_json::json!({ "version": 1, "endpoints": [] })).is_err());
        assert!(other.load(serde_json::json!([])).is_err());
        other.load(state).expect("its own state");
        assert_eq!(other.view(), town.engine.view());
    }
}
