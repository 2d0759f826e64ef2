//! Every fuzz target on mutated examples, for [`TIME`] each, or for the seconds of `APISCOPE_FUZZ_SECONDS`. The
//! seed is printed where one fails; `APISCOPE_FUZZ_SEED` takes it again. Coverage-guided runs: `tests/fuzz`.

use std::time::{Duration, Instant};

use apiscope_tests::fuzz::TARGETS;

/// Time for each target on a usual run.
const TIME: Duration = Duration::from_secs(2);
/// Longest input.
const MOST: usize = 4096;

/// xorshift64* (Vigna, 2016): the same inputs for the same seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
}

/// Changes an input a little.
fn mutate(input: &mut Vec<u8>, example: &[u8], random: &mut Random) {
    const TOKENS: [&[u8]; 12] = [
        b"\r\n",
        b"\n\n",
        b"\0",
        b" ",
        b":",
        b"?",
        b"%",
        b"\xff\xff",
        b"\"",
        b"\\",
        b"HTTP/1.1",
        b"99999999999999999999",
    ];
    for _ in 0..=random.below(8) {
        let at = random.below(input.len() + 1);
        match random.below(7) {
            0 if at < input.len() => input[at] ^= 1 << random.below(8),
            1 if at < input.len() => input[at] = random.next() as u8,
            2 => input.insert(at, random.next() as u8),
            3 if at < input.len() => {
                let end = (at + 1 + random.below(16)).min(input.len());
                input.drain(at..end);
            }
            4 => {
                let token = TOKENS[random.below(TOKENS.len())];
                input.splice(at..at, token.iter().copied());
            }
            5 => {
                let from = random.below(example.len());
                let part = &example[from..(from + 1 + random.below(32)).min(example.len())];
                input.splice(at..at, part.iter().copied());
            }
            _ => {
                let copy: Vec<u8> = input[at..].iter().take(1 + random.below(64)).copied().collect();
                input.splice(at..at, copy);
            }
        }
    }
    input.truncate(MOST);
}

fn run(name: &str) {
    let (_, target, example) = TARGETS.iter().find(|(n, ..)| *n == name).expect("a target of this name");
    let number = |name: &str| std::env::var(name).ok().and_then(|v| v.parse::<u64>().ok());
    let time = number("APISCOPE_FUZZ_SECONDS").map_or(TIME, Duration::from_secs);
    let seed = number("APISCOPE_FUZZ_SEED").unwrap_or_else(|| u64::from(std::process::id()) << 32 | 0x9e37_79b9);
    let (mut random, started, mut n) = (Random(seed), Instant::now(), 0_u64);
    target(example);
    target(&[]);
    let mut pool = vec![example.to_vec()];
    while started.elapsed() < time {
        let from = random.below(pool.len());
        let mut input = pool[from].clone();
        mutate(&mut input, example, &mut random);
        if let Err(cause) = std::panic::catch_unwind(|| target(&input)) {
            eprintln!("{name}: input {n} of seed {seed}: {:?}", String::from_utf8_lossy(&input));
            eprintln!("{name}: bytes {input:?}");
            std::panic::resume_unwind(cause);
        }
        // A pool that drifts away from the example, and comes back to it.
        if pool.len() < 256 {
            pool.push(input);
        } else if random.below(4) == 0 {
            let to = 1 + random.below(255);
            pool[to] = if random.below(8) == 0 { example.to_vec() } else { input };
        }
        n += 1;
    }
    eprintln!("{name}: {n} inputs, seed {seed}");
    assert!(n > 100, "only {n} inputs in {time:?}");
}

macro_rules! targets {
    ($($name:ident)+) => {
        $(#[test] fn $name() { run(stringify!($name)); })+
        #[test] fn every_target_is_run() { assert_eq!(TARGETS.map(|(name, ..)| name), [$(stringify!($name)),+]); }
    };
}

targets! { http1 records hpack frames accesslog ndjson config openapi gopclntab elf routes }
