//! Ten thousand HTTP/2 connections at once keep to their memory, whatever their header tables hold and however many
//! streams are open. Counted by the allocator of this program, in which this is the only test; the figures:
//! `cargo test --release -p apiscope --test connections -- --nocapture`.

mod counting;

use std::sync::{Arc, atomic::Ordering};

use apiscope::{
    conn::{Connections, Identity, Outside},
    event::{Event, Frames, Opened, What},
    exchange::{Exchange, Handshake, Peer},
    proto::credential::Principals,
    stats::Stats,
};
use counting::ALLOCATOR;

/// Connections at once.
const MANY: u64 = 10_000;
/// What an allocator adds to a block, bytes: its head, and rounding up.
const BLOCK: usize = 16;
/// Most of one connection, bytes.
const EACH: usize = 16 << 10;
/// Most of all, bytes.
const ALL: usize = 128 << 20;

/// Counts exchanges and forgets them.
struct Sink {
    service: Arc<str>,
    exchanges: u64,
}

impl Outside for Sink {
    fn identify(&mut self, _: u32, _: &str, _: &Peer, _: &Peer) -> Identity {
        Identity { service: self.service.clone(), exe: None, origin: None, wanted: true }
    }
    fn exchange(&mut self, _: &mut Exchange) {
        self.exchanges += 1;
    }
    fn is_gone(&mut self, _: u32) -> bool {
        false
    }
}

fn opened() -> What<'static> {
    let peer = |port| Peer::Ip(([127, 0, 0, 1], port).into());
    What::Open(Box::new(Opened {
        late: false,
        local: peer(80),
        remote: peer(40_000),
        sock: 0,
        peer_sock: 0,
        comm: "server".into(),
        tls: None,
        handshake: Handshake::default(),
    }))
}

fn frames(sent: bool, bytes: &[u8]) -> What<'_> {
    let preface = !sent;
    What::Frames(Frames {
        sent,
        index: 0,
        boundary: true,
        remaining: 0,
        preface,
        lost: false,
        dropped: 0,
        first_ts: 9,
        bytes,
    })
}

/// HEADERS with END_HEADERS, and with END_STREAM where it `ends`.
fn headers(stream: u32, ends: bool, block: &[u8], out: &mut Vec<u8>) {
    out.extend(&u32::try_from(block.len()).expect("short").to_be_bytes()[1..]);
    out.extend([1, 4 | u8::from(ends)]);
    out.extend(stream.to_be_bytes());
    out.extend(block);
}

/// A literal with incremental indexing; `name` in front of it, or the index of one.
fn literal(name: &[u8], value: &str, out: &mut Vec<u8>) {
    out.extend(name);
    assert!(value.len() < 127, "one byte of length");
    out.push(value.len() as u8);
    out.extend(value.as_bytes());
}

/// What each connection carries.
#[derive(Clone, Copy, Debug)]
enum Load {
    /// Twenty fields that repeat and twenty paths.
    Usual,
    /// As many short paths as a table has room for.
    ShortPaths,
    /// As many short fields as a table has room for, in both directions: of names that are kept.
    Short,
    /// Values as long as they may be, in both directions.
    Long,
    /// A hundred open streams.
    Streams,
}

/// Records of one connection: [0] requests, [1] answers.
fn records(load: Load, conn: u64) -> [Vec<u8>; 2] {
    let (mut asked, mut answered) = (Vec::new(), Vec::new());
    let rounds: u32 = match load {
        Load::Usual => 20,
        Load::Short | Load::ShortPaths => 128,
        Load::Long | Load::Streams => 100,
    };
    for i in 0..rounds {
        let id = 2 * i + 1;
        let (mut block, mut answer) = (vec![0x82, 0x86], vec![0x88]);
        match load {
            Load::Usual => {
                literal(&[0x44], &format!("/api/v1/customers/{i}/orders"), &mut block);
                for k in 0..if i == 0 { 20 } else { 0 } {
                    let name = format!("\x40\x09x-field-{}", (b'a' + k) as char);
                    literal(name.as_bytes(), "a value of the usual length", &mut block);
                    literal(name.as_bytes(), "a value of the usual length", &mut answer);
                }
            }
            Load::ShortPaths => literal(&[0x44], &format!("/{i:02x}"), &mut block),
            Load::Short => {
                block.push(0x84);
                // Empty credentials, statuses and paths: what is kept of them is more than they are.
                literal(b"\x60", "", &mut block);
                literal(&[0x44], "", &mut block);
                literal(b"\x40\x07:status", "200", &mut answer);
                literal(b"\x40\x00", "", &mut answer);
            }
            Load::Long => {
                literal(&[0x44], &format!("/{conn}/{i:090}"), &mut block);
                literal(&[0x44], &format!("/{conn}/{i:090}"), &mut answer);
            }
            Load::Streams => literal(&[0x04], &format!("/api/v1/customers/{conn}/orders/{i}"), &mut block),
        }
        let open = matches!(load, Load::Streams);
        headers(id, true, &block, &mut asked);
        if !open {
            headers(id, true, &answer, &mut answered);
        }
    }
    [asked, answered]
}

#[test]
fn ten_thousand_connections_keep_to_their_memory() {
    let mut failed = Vec::new();
    for load in [Load::Usual, Load::ShortPaths, Load::Short, Load::Long, Load::Streams] {
        let mut sink = Sink { service: "shop".into(), exchanges: 0 };
        let principals = Principals::new(b"0123456789abcdef", &[], &[]).expect("a key");
        let held = || ALLOCATOR.held.load(Ordering::Relaxed) + BLOCK * ALLOCATOR.blocks.load(Ordering::Relaxed);
        let before = held();
        let mut connections = Connections::new(0, Arc::new(Stats::default())).with_principals(principals);
        for conn in 0..MANY {
            let [asked, answered] = records(load, conn);
            for what in [opened(), frames(false, &asked), frames(true, &answered)] {
                connections.handle(Event { conn, ts: 9, pid: 1, what }, &mut sink);
            }
        }
        let now = held() - before;
        let each = now / MANY as usize;
        println!(
            "{load:?}: {:.1} MB, {each} bytes each, {} as the sessions say; {} exchanges, {} streams open",
            now as f64 / 1e6,
            connections.session_memory() / MANY as usize,
            sink.exchanges,
            connections.open_streams(),
        );
        assert_eq!(connections.len() as u64, MANY);
        if each > EACH || now > ALL {
            failed.push(load);
        }
    }
    assert!(failed.is_empty(), "too much: {failed:?}");
}
