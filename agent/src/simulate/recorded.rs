//! One's own recorded exchanges as the background of a simulation, again and again. The attack goes to the
//! endpoint that hands out most objects.

use std::{
    fs::File,
    io::{BufRead as _, BufReader},
    path::Path,
    sync::Arc,
};

use anyhow::{Context as _, bail, ensure};
use serde::Serialize;

use super::world::attacker_id;
use crate::{
    aggregate::Endpoints,
    config::Config,
    detect::{Engine, is_public},
    exchange::{Auth, Exchange, Method, Peer, Side},
    params::{BUCKET_BITS, ParamHasher, Params},
    route::Routes,
};

/// Most exchanges of a recording that are used, for the sake of memory.
const MAX_EXCHANGES: usize = 4_000_000;
const S: f64 = 1e9;

struct Item {
    x: Exchange,
    at: usize,
    route: Arc<str>,
    params: Params,
}

/// Shortest recording that is of use: what is repeated more often than each second is no background.
const LEAST: u64 = 1_000_000_000;

/// What was read.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Summary {
    /// Exchanges that are used.
    pub exchanges: u64,
    /// From the first to the last, s.
    pub seconds: f64,
    /// Lines that are no exchanges and were left out.
    pub unreadable: u64,
    /// Exchanges that did not fit: [`MAX_EXCHANGES`], or more endpoints than are told apart.
    pub left_out: u64,
}

/// A recording that begins anew when it is over.
pub struct Recorded {
    summary: Summary,
    items: Vec<Item>,
    next: usize,
    /// ns from one beginning to the next.
    period: u64,
    /// ns to add to recorded times.
    shift: u64,
    hasher: ParamHasher,
    target: usize,
    /// An exchange of the target.
    example: usize,
    space: u64,
    now: f64,
}

impl Recorded {
    /// Reads a recording; it begins at `start`, s since the epoch.
    ///
    /// # Errors
    /// It cannot be read, is too short, or has no endpoint with objects.
    pub fn read(file: &Path, config: &Config, start: u64) -> anyhow::Result<Self> {
        let failed = || format!("failed to read {}", file.display());
        let hasher = ParamHasher::new([7; 16]);
        let mut routes = Routes::new(&config.routes.patterns);
        let mut endpoints = Endpoints::new(config.limits.endpoints, None);
        let (mut items, nothing) = (Vec::new(), Arc::<str>::from(""));
        let (mut unreadable, mut left_out, mut wrong) = (0, 0, None);
        for line in BufReader::new(File::open(file).with_context(failed)?).split(b'\n') {
            let line = line.with_context(failed)?;
            if line.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            let x = match Exchange::from_json(&line) {
                Ok(x) => x,
                Err(e) => {
                    unreadable += 1;
                    wrong.get_or_insert(e);
                    continue;
                }
            };
            if items.len() >= MAX_EXCHANGES {
                left_out += 1;
                continue;
            }
            routes.route(&x);
            items.push(Item { x, at: 0, route: nothing.clone(), params: Params::default() });
        }
        if let (true, Some(e)) = (items.is_empty(), wrong) {
            bail!(
                "none of the {unreadable} lines of {} is an exchange ({e}): it must be a recording of `apiscope run --exchanges`",
                file.display()
            );
        }
        // Routes are known when everything was seen.
        routes.settle();
        items.retain_mut(|i| {
            let path = i.x.path.as_deref().unwrap_or_default();
            let route = routes.current(&i.x.service, &i.x.method, path);
            let at = endpoints.record(&i.x, &route.template, route.source);
            i.at = at.unwrap_or(0);
            i.params = hasher.params(path, &route.template);
            i.route = route.template;
            left_out += u64::from(at.is_none());
            at.is_some()
        });
        ensure!(
            items.len() > 1,
            "{} holds no exchanges: it must be a recording of `apiscope run --exchanges`",
            file.display()
        );
        items.sort_by_key(|i| i.x.ts);
        let first = items[0].x.ts;
        let length = items[items.len() - 1].x.ts - first;
        ensure!(
            length >= LEAST,
            "{} holds less than a second of traffic, which is no background: record for longer",
            file.display()
        );
        // Days stay days, so that hours of the day meet again.
        let (hour, day) = (3_600_000_000_000, 86_400_000_000_000);
        let period =
            if length > 20 * hour { length.div_ceil(day) * day } else { length + length / items.len() as u64 + 1 };
        let mut counts = vec![0_u64; endpoints.len()];
        for i in items.iter().filter(|i| i.x.side == Side::Server && i.x.method == Method::Get && i.x.status < 400) {
            counts[i.at] += u64::from(!i.params.is_empty());
        }
        let target = (0..counts.len()).max_by_key(|&at| counts[at]).unwrap_or(0);
        ensure!(
            counts[target] > 0,
            "{} has no successful GET with an id in its path: record with --capture-path raw or hmac, templates hide the ids",
            file.display()
        );
        let of_target = items.iter().filter(|i| i.at == target);
        let highest = of_target.filter_map(|i| i.params.list().last().and_then(|p| p.bucket)).max();
        let space = highest.map_or(1 << 27, |b| ((b + 1) << BUCKET_BITS).clamp(1 << 16, 1 << 30));
        // Modulo 2^64: recordings are older or younger than the simulated days.
        let shift = (start * 1_000_000_000).wrapping_sub(first);
        let example = items.iter().position(|i| i.at == target).unwrap_or(0);
        let summary = Summary { exchanges: items.len() as u64, seconds: length as f64 / S, unreadable, left_out };
        Ok(Self { summary, example, items, next: 0, period, shift, hasher, target, space, now: start as f64 })
    }

    /// What was read.
    #[must_use]
    pub fn summary(&self) -> Summary {
        self.summary
    }
}

impl super::Background for Recorded {
    fn step(&mut self, until: f64, engine: &mut Engine) -> bool {
        if self.next >= self.items.len() {
            (self.next, self.shift) = (0, self.shift.wrapping_add(self.period));
        }
        let item = &mut self.items[self.next];
        let ts = item.x.ts.wrapping_add(self.shift);
        if ts as f64 / S >= until {
            self.now = self.now.max(until);
            return false;
        }
        self.next += 1;
        self.now = ts as f64 / S;
        let recorded = std::mem::replace(&mut item.x.ts, ts);
        engine.observe(&item.x, item.at, &item.route, &item.params);
        item.x.ts = recorded;
        true
    }

    fn attack(&mut self, now: f64, object: u64, who: u64, engine: &mut Engine) {
        let Some(example) = self.items.get(self.example) else { return };
        let numbers = example.params.list().last().is_some_and(|p| p.bucket.is_some());
        let params = self.hasher.number(object);
        let params = if numbers { params } else { params.opaque() };
        // From where the others come: who is on the internet where everybody is inside is found by that alone.
        let network = if is_public(&example.x.client) { [203, 0] } else { [10, 203] };
        let client = [network[0], network[1], (who >> 8) as u8, who as u8];
        let x = Exchange {
            ts: (now * S) as u64,
            status: 200,
            auth: if example.x.auth == Auth::None { Auth::Bearer } else { example.x.auth },
            principal: Some(format!("{:016x}", attacker_id(who)).into()),
            client: Peer::Ip((client, 50_000).into()),
            ..example.x.clone()
        };
        engine.observe(&x, self.target, &example.route.clone(), &params);
    }

    fn now(&self) -> f64 {
        self.now
    }

    fn target(&self) -> usize {
        self.target
    }

    fn space(&self) -> u64 {
        self.space
    }

    fn rate(&self) -> f64 {
        self.items.len() as f64 / (self.period as f64 / S)
    }
}
