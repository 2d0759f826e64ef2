//! Evidence -> table of routes: which words below a node are names of the service, and which are values
//! of a parameter?
//!
//! Names are used again and again: after a while each was seen often. Values keep coming: the share of
//! observations that show something never seen before, the Good-Turing estimate of what is still unseen
//! (I. J. Good, 1953: singletons / observations), stays high. So the words below a node are sorted by how often
//! they were seen; those far above the rest are names whatever happens; the rest is a parameter when it has enough
//! different words, enough of them seen once, and enough different callers brought them. Where the evidence
//! is thin, the words themselves (digits, joined capitals) and what follows them (the same names below each)
//! lower the number that is asked for.
//!
//! Against poison: answers that say 'no such path' are no evidence at all; one caller counts for
//! [`PER_CALLER`] words of a node; a parameter needs a share of the service's callers, or a day; words
//! that came without credentials and all with the same size, where the service asks for
//! credentials, are a catch-all's answers to a scanner.

use rustc_hash::{FxHashMap, FxHashSet};

use super::{
    evidence::{Evidence, MAX_VERSIONS, NONE, Node},
    shape::Shape,
};

/// Words of one node that one caller can testify for.
const PER_CALLER: u32 = 8;
/// Callers that a parameter needs, unless the service has few or the evidence is a day old.
const CALLERS: usize = 4;
/// Evidence over this time stands for itself, ns.
const DAY: u64 = 24 * 3_600 * 1_000_000_000;
/// Depth of the deepest decision: as many segments as are looked at.
const MAX_DEPTH: usize = super::evidence::MAX_SEGMENTS;

/// The decided routes of one service.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Table {
    /// Node 0 is the root.
    pub nodes: Vec<Decided>,
}

/// One decided segment.
#[derive(Debug, Default, Clone)]
pub struct Decided {
    /// Names.
    pub names: FxHashMap<Box<str>, u32>,
    /// The parameter, where there is one.
    pub parameter: Option<(&'static str, u32)>,
    /// It was learned, not shown by its shape.
    pub learned: bool,
    /// Bit set of the shapes that this segment had, for a parameter.
    pub shapes: u16,
    /// Requests that came by.
    pub count: u32,
}

/// Two tables are equal when they give the same routes.
impl PartialEq for Decided {
    fn eq(&self, other: &Self) -> bool {
        (&self.names, self.parameter, self.learned) == (&other.names, other.parameter, other.learned)
    }
}

/// What is known of the service as a whole.
#[derive(Debug, Clone, Copy)]
pub struct Service {
    /// Different callers (up to a bound).
    pub callers: usize,
    /// Most answered requests carry a credential.
    pub authenticated: bool,
}

/// A word below a set of merged nodes.
struct Word<'e> {
    label: &'e str,
    nodes: Vec<u32>,
    count: u32,
}

/// What is beside the words of a segment.
#[derive(Debug, Clone, Copy)]
struct Around {
    /// Values of a certain shape that were seen.
    typed: u32,
    /// New words that found no place.
    overflow: u32,
    depth: usize,
}

/// Decides all of a service.
#[must_use]
pub fn decide(evidence: &Evidence, service: Service) -> Table {
    let mut table = Table::default();
    node(evidence, service, &mut table, &[0], "", 0);
    table
}

/// Decides below the nodes `set`, which are one segment; returns its place in the table.
fn node(evidence: &Evidence, service: Service, table: &mut Table, set: &[u32], parent: &str, depth: usize) -> u32 {
    let place = u32::try_from(table.nodes.len()).unwrap_or(0);
    let here = || set.iter().filter_map(|&i| evidence.nodes.get(i as usize));
    table.nodes.push(Decided {
        shapes: here().fold(0, |all, n| all | n.shapes),
        count: here().fold(0u32, |sum, n| sum.saturating_add(n.count)),
        ..Decided::default()
    });
    if depth >= MAX_DEPTH {
        return place;
    }
    let at = |i: u32| evidence.nodes.get(i as usize);
    let mut words: FxHashMap<&str, Word<'_>> = FxHashMap::default();
    let mut values = Vec::new();
    let mut shapes = 0;
    for here in set.iter().filter_map(|&i| at(i)) {
        for (label, &child) in &here.children {
            let word = words.entry(label).or_insert_with(|| Word { label, nodes: Vec::new(), count: 0 });
            word.nodes.push(child);
            word.count += at(child).map_or(0, |n| n.count);
        }
        if let Some(parameter) = at(here.parameter) {
            values.push(here.parameter);
            shapes |= parameter.shapes;
        }
    }
    let mut words: Vec<Word<'_>> = words.into_values().collect();
    words.sort_by(|a, b| a.count.cmp(&b.count).then_with(|| a.label.cmp(b.label)));
    let versions = are_versions(evidence, &words, !values.is_empty(), parent, depth);
    words.retain(|word| {
        let shape = Shape::of(word.label);
        let value = shape != Shape::Word && !versions;
        if value {
            shapes |= 1 << shape as u16;
            values.extend(&word.nodes);
        }
        !value
    });
    let (form, nearly_all) = codes(evidence, service, &words);
    if form != 0 {
        shapes |= 1 << Shape::Word as u16;
        words.retain(|word| {
            // Languages without a code of two letters have one of three.
            let code = code(word.label) == form || nearly_all && word.label.len() <= 3;
            if code {
                values.extend(&word.nodes);
            }
            !code
        });
    }
    let overflow = here().fold(0u32, |sum, n| sum.saturating_add(n.overflow));
    let typed: u32 = values.iter().filter_map(|&i| at(i)).map(|n| n.count).sum();
    let low = parameter_words(evidence, service, &words, Around { typed, overflow, depth });
    // A parameter that was learned stays one over a restart.
    let learned = low > 0 || shapes & (1 << Shape::Word as u16) != 0;
    if low > 0 {
        shapes |= 1 << Shape::Word as u16;
        for word in words.drain(..low) {
            values.extend(word.nodes);
        }
    }
    words.sort_by(|a, b| a.label.cmp(b.label));
    for word in words {
        let child = node(evidence, service, table, &word.nodes, word.label, depth + 1);
        if let Some(decided) = table.nodes.get_mut(place as usize) {
            decided.names.insert(word.label.into(), child);
        }
    }
    if !values.is_empty() {
        let child = node(evidence, service, table, &values, "", depth + 1);
        if let Some(decided) = table.nodes.get_mut(place as usize) {
            decided.parameter = Some((name(shapes), child));
            decided.learned = learned;
        }
        if let Some(parameter) = table.nodes.get_mut(child as usize) {
            parameter.shapes = shapes;
        }
    }
    place
}

/// How many of the rarest words are values of a parameter. `words` is sorted by count.
fn parameter_words(evidence: &Evidence, service: Service, words: &[Word<'_>], around: Around) -> usize {
    let Around { typed, overflow, depth } = around;
    let low = rare(words);
    let candidates = &words[..low];
    if candidates.is_empty() {
        return 0;
    }
    let first = |w: &Word<'_>| {
        w.nodes.iter().filter_map(|&i| evidence.nodes.get(i as usize)).map(|n| n.first).min_by_key(|f| f.now)
    };
    // What a catch-all answers to a scanner is no evidence.
    let mut sizes: FxHashMap<u32, u32> = FxHashMap::default();
    if service.authenticated {
        for witness in candidates.iter().filter_map(first).filter(|f| !f.authenticated) {
            *sizes.entry(witness.size).or_default() += 1;
        }
    }
    let mut callers: FxHashMap<u32, u32> = FxHashMap::default();
    let (mut distinct, mut singles, mut observations) = (0u32, 0u32, 0u32);
    let (mut oldest, mut newest) = (u64::MAX, 0);
    let mut hints = 0u32;
    for word in candidates {
        let Some(witness) = first(word) else { continue };
        if !witness.authenticated && sizes.get(&witness.size).is_some_and(|&n| n >= 8) {
            continue;
        }
        let said = callers.entry(witness.who).or_default();
        *said += 1;
        if *said > PER_CALLER {
            continue;
        }
        oldest = oldest.min(witness.now);
        newest = newest.max(witness.now);
        distinct += 1;
        singles += u32::from(word.count == 1);
        observations += word.count;
        hints += u32::from(looks_like_value(word.label));
    }
    if distinct == 0 {
        return 0;
    }
    let wanted = CALLERS.max(distinct as usize / 8).min(service.callers.div_ceil(2)).max(2);
    // What looks like a value, beside values, and too rarely to be a name.
    let left_over = typed >= 10 && hints == distinct;
    if callers.len() < wanted && !left_over && newest.saturating_sub(oldest) < DAY {
        return 0;
    }
    let alike = alike(evidence, candidates);
    let mut enough = if depth == 0 { 10 } else { 6 };
    if typed > 0 {
        enough = 2;
    }
    if alike {
        enough = enough.min(4);
    }
    if hints * 3 >= distinct {
        enough = enough.min(3);
    }
    if left_over {
        enough = 1;
    }
    if distinct < enough {
        return 0;
    }
    // Good-Turing: singletons among the observations of the rare words. A word that found no place was new.
    let (singles, all) = (f64::from(singles) + f64::from(overflow), f64::from(observations) + f64::from(overflow));
    let unseen = singles / all.max(1.0);
    let share = singles / (f64::from(distinct) + f64::from(overflow));
    if unseen >= 0.2 && share >= 0.35 { low } else { 0 }
}

/// Do the digits and dates below a node name versions? There are few of them, each with more than one name
/// below it, or there is only one, and they stand where versions do: at the root, behind `api` and the like, or on the way of nearly all.
fn are_versions(evidence: &Evidence, words: &[Word<'_>], values: bool, parent: &str, depth: usize) -> bool {
    let candidates: Vec<_> = words.iter().filter(|w| Shape::of(w.label) != Shape::Word).collect();
    if values || candidates.is_empty() || candidates.len() >= MAX_VERSIONS {
        return false;
    }
    let seen: u32 = candidates.iter().map(|w| w.count).sum();
    let all = evidence.nodes.first().map_or(0, |n| n.count);
    let place = depth == 0
        || ["api", "rest", "v", "version", "versions"].contains(&parent.to_ascii_lowercase().as_str())
        || u64::from(seen) * 2 > u64::from(all);
    let branches = |w: &Word<'_>| {
        let names: FxHashSet<&str> = w
            .nodes
            .iter()
            .filter_map(|&i| evidence.nodes.get(i as usize))
            .flat_map(|n| n.children.keys().map(|k| &**k))
            .collect();
        names.len()
    };
    let names = candidates.iter().map(|w| branches(w)).max();
    // The only one at the root, again and again: a constant, not a value.
    let constant = depth == 0 && candidates.len() == 1 && seen >= 20 && names == Some(1);
    place && seen >= 10 && (names > Some(1) || constant)
}

/// The form of codes, if there are so many among the words that they are values: a set of languages, countries or
/// currencies is a parameter, however often each was seen; 0 without. And whether nearly all words are such.
fn codes(evidence: &Evidence, service: Service, words: &[Word<'_>]) -> (u8, bool) {
    let most = (1..=3).map(|f| (words.iter().filter(|w| code(w.label) == f).count(), f)).max();
    let Some((n, form)) = most.filter(|(n, _)| *n >= 5) else { return (0, false) };
    if n * 10 >= words.len() * 9 {
        return (form, true);
    }
    // Beside names: more of them, by more than one caller. Two small letters may be a word.
    let coded = || words.iter().filter(|w| code(w.label) == form);
    let first = |w: &Word<'_>| w.nodes.first().and_then(|&i| evidence.nodes.get(i as usize)).map(|n| n.first.who);
    let callers: FxHashSet<u32> = coded().filter_map(first).collect();
    let named =
        coded().filter(|w| form != 1 || LANGUAGES.as_bytes().chunks(2).any(|l| l == w.label.as_bytes())).count();
    let enough = n >= 8 && named * 10 >= n * 9 && callers.len() >= service.callers.min(CALLERS);
    (if enough { form } else { 0 }, false)
}

/// Languages of ISO 639-1.
const LANGUAGES: &str = "aaabaeafakamanarasavayazbabebgbhbibmbnbobrbscacechcocrcscucvcydadedvdzeeeleneoeseteufafffifjfofrfygaglgngugvhahehihohrhthuhyhziaidieigiiikioisitiujajvkakgkikjkkklkmknkokrkskukvkwkylalblglilnloltlulvmgmhmimkmlmnmrmsmtmynanbndnengnlnnnonrnvnyocojomorospapiplpsptqurmrnrorurwsascsdsesgsiskslsmsnsosqsrssstsusvswtatetgthtitktltntotrtstttwtyugukuruzvevivowawoxhyiyozazhzu";

/// 1 for two small letters, 2 for two or three capitals, 3 for a language and where or how it is written
/// (`en-GB`, `en_us`, `es-419`, `zh-Hant`); 0 for what is no code.
fn code(label: &str) -> u8 {
    let b = label.as_bytes();
    let lower = |b: &[u8]| b.iter().all(u8::is_ascii_lowercase);
    let upper = |b: &[u8]| b.iter().all(u8::is_ascii_uppercase);
    match b.len() {
        2 if lower(b) => 1,
        2 | 3 if upper(b) => 2,
        5..=7 if lower(&b[..2]) && matches!(b[2], b'-' | b'_') => {
            let rest = &b[3..];
            let script = rest.len() == 4 && upper(&rest[..1]) && lower(&rest[1..]);
            let region = rest.len() == 2 && (upper(rest) || lower(rest));
            let area = rest.len() == 3 && rest.iter().all(u8::is_ascii_digit);
            if script || region || area { 3 } else { 0 }
        }
        _ => 0,
    }
}

/// How many words, from the rarest on, are not far above the rest.
fn rare(words: &[Word<'_>]) -> usize {
    let (mut n, mut sum) = (0usize, 0u64);
    for word in words {
        let mean = if n == 0 { 1.0 } else { sum as f64 / n as f64 };
        // The counts of values that are used again grow with the logarithm of how many there are.
        let usual = 2.0 + 1.7 * ((n + 1) as f64).ln();
        if f64::from(word.count) > (5.0 * mean).max(4.0).max(usual) {
            break;
        }
        n += 1;
        sum += u64::from(word.count);
    }
    n
}

/// Does what follows these words repeat? Names have each their own; values share them.
fn alike(evidence: &Evidence, words: &[Word<'_>]) -> bool {
    let mut below: FxHashSet<&str> = FxHashSet::default();
    let mut inner = 0usize;
    for word in words {
        let mut any = false;
        for node in word.nodes.iter().filter_map(|&i| evidence.nodes.get(i as usize)) {
            for label in node.children.keys() {
                below.insert(label);
                any = true;
            }
        }
        inner += usize::from(any);
    }
    inner >= 3 && below.len() * 2 <= inner
}

/// Digits, or capitals and small letters in turn: more usual in values than in names.
fn looks_like_value(word: &str) -> bool {
    let bytes = word.as_bytes();
    let digits = !super::shape::is_version(bytes) && bytes.iter().any(u8::is_ascii_digit);
    digits || (word.len() >= 8 && super::shape::is_scrambled(bytes, 4))
}

/// Name of a parameter that had these shapes.
fn name(shapes: u16) -> &'static str {
    const ALL: [Shape; 8] =
        [Shape::Word, Shape::Int, Shape::Uuid, Shape::Hex, Shape::Date, Shape::Email, Shape::Id, Shape::Long];
    match ALL.iter().filter(|&&s| shapes & (1 << s as u16) != 0).collect::<Vec<_>>()[..] {
        [only] => only.name(),
        _ => Shape::Id.name(),
    }
}

impl Table {
    /// Writes the route of a path. False when the table does not know it: then the route is a guess by shapes.
    pub fn route(&self, path: &str, out: &mut String) -> bool {
        let mut at = Some(0u32);
        let mut known = true;
        for (i, segment) in super::segments(path).enumerate() {
            out.push('/');
            if i == super::evidence::MAX_SEGMENTS {
                out.push_str("{rest}");
                return known;
            }
            let here = at.and_then(|at| self.nodes.get(at as usize));
            if let Some(&child) = here.and_then(|h| h.names.get(segment)) {
                out.push_str(segment);
                at = Some(child);
                continue;
            }
            let shape = Shape::of(segment);
            let takes = |h: &&Decided| h.learned || shape != Shape::Word || segment.starts_with('{');
            if let Some((name, child)) = here.filter(takes).and_then(|h| h.parameter) {
                out.push_str(name);
                at = Some(child);
                continue;
            }
            known = false;
            at = None;
            out.push_str(if shape == Shape::Word { segment } else { shape.name() });
        }
        known
    }
}

const _: () = assert!(NONE == u32::MAX && size_of::<Node>() <= 128);
