//! What the fuzz targets call, one function for each door by which bytes of others come in. `tests/fuzz` runs
//! them under libFuzzer; `tests/fuzz.rs` runs them on mutated examples with stable Rust, on every test run.
//!
//! Each takes any bytes, and asserts what must hold of the result whatever they were.

use std::sync::Arc;

use apiscope::{
    accesslog,
    config::Config,
    conn::{Connections, Identity, MAX_PIPELINE, Outside},
    event::{self, Frames},
    exchange::{Exchange, MAX_QUERY_KEYS, MAX_USER_AGENT, Method, Peer},
    probe::{
        elf::{CODE_BYTES, Elf},
        gopclntab::{self as table, Layout, Segment},
    },
    proto::{
        credential::Principals,
        hpack::MAX_TABLE,
        http1,
        http2::{Block, Shared, Table},
    },
    route::Routes,
    stats::{Stats, Unread},
    stream::{Around, Session},
};

/// A target: its name, its function, and an example of what it reads.
pub type Target = (&'static str, fn(&[u8]), &'static [u8]);

/// All of them.
pub const TARGETS: [Target; 11] = [
    (
        "http1",
        head,
        b"POST /a/42?token=1&b HTTP/1.1\r\nHost: t\r\nAuthorization: Bearer abc\r\nCookie: a=b\r\nUser-Agent: x\r\n\
          traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\n\r\n\
          HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\nUpgrade: websocket\r\n\r\n",
    ),
    ("records", records, b"\x01\x00\x02\x00\x01\x00\x00\x00GET /u/1 HTTP/1.1\r\n\r\n\xff\x02\x00\x07\x00\x01\x00HTTP/1.1 200 OK\r\n\r\n"),
    (
        "hpack",
        header_blocks,
        b"\x04\x82\x86\x84\xbe\x0b\x40\x01a\x01b\x44\x04/a?b\x82\x05\x3f\xe1\x01\x88\xbf\x0c\x57\x8a\xff\xc1\xc0\xbf\x0f\x10\x02xx",
    ),
    (
        "frames",
        frames,
        b"\x01\x00\x10\x00\x00\x03\x01\x05\x00\x00\x00\x01\x82\x86\x84\x00\x00\x0e\x00\x00\x01\x01\x05\x00\x00\x00\x01\x88\x00\x00\x00",
    ),
    (
        "accesslog",
        access_log,
        b"10.0.0.1 - frank [10/Oct/2023:13:55:36 -0700] \"GET /users/1?x=y HTTP/1.1\" 200 2326 \"http://r\" \"a \\\" b\"",
    ),
    (
        "ndjson",
        ndjson,
        b"{\"ts\":1,\"service\":\"s\",\"method\":\"GET\",\"path\":\"/u/1\",\"status\":200,\"client\":\"[::1]:80\",\
          \"query_keys\":[\"a\"],\"end\":\"reset\",\"trace_id\":\"0af7651916cd43dd8448eb211c80319c\",\"side\":\"client\"}",
    ),
    (
        "config",
        config,
        b"[capture]\nsides = \"server\"\n[[capture.exclude]]\naddress = \"10.0.0.0/8\"\nexe = \"*/n*x\"\n[limits]\n\
          ring_bytes = 65536\n[[service]]\nname = \"s\"\nport = 80\n[routes]\npatterns = [\"/a/{b}\"]\n",
    ),
    (
        "openapi",
        openapi,
        b"openapi: 3.1.0\ninfo: {title: &t x, version: '1'}\nservers: [{url: 'https://{h}/v1', variables: {h: {enum: [a, b]}}}]\n\
          paths:\n  /a/{id}: {get: {security: [{k: []}], responses: {200: {description: *t}, 4XX: {}}}}\n  /b: {$ref: '#/paths/~1a~1{id}'}\n\
          components: {securitySchemes: {k: {type: http, scheme: bearer}}}\n",
    ),
    ("gopclntab", gopclntab, &GO_PROGRAM),
    ("elf", elf, &LIBRARY),
    ("routes", routes, b"/users/42/orders/7f9c2ba4-e88f-11ee-ae5d-0242ac120002\n/a//b/\xc3\xa9%20?\n*"),
];

/// The head of a request or a response. No query value and no credential comes through.
pub fn head(bytes: &[u8]) {
    if let Some(request) = http1::request(bytes) {
        assert!(!request.path.contains('?') || !request.path.starts_with('/'), "a query is left in {}", request.path);
        assert!(request.query_keys.len() <= MAX_QUERY_KEYS);
        assert!(request.user_agent.is_none_or(|a| a.chars().count() <= MAX_USER_AGENT));
    }
    if let Some(response) = http1::response(bytes) {
        assert!(response.status < 1000);
    }
}

struct Sink(u64);

impl Outside for Sink {
    fn identify(&mut self, _: u32, comm: &str, _: &Peer, _: &Peer) -> Identity {
        Identity { service: comm.into(), exe: None, origin: None, wanted: !comm.starts_with('x') }
    }

    fn exchange(&mut self, exchange: &mut Exchange) {
        self.0 += 1;
        // What is written must be read again: recordings are an input too.
        let mut line = Vec::new();
        exchange.write_json(exchange.path.as_deref(), &mut line);
        Exchange::from_json(&line).expect("a line of our own");
    }

    fn is_gone(&mut self, pid: u32) -> bool {
        pid % 2 == 1
    }
}

/// Records of the kernel side, in any order: the first byte of each part says how many bytes its header takes
/// from the data, so that most are well-formed enough to reach the connection table.
pub fn records(bytes: &[u8]) {
    // As they are.
    let _ = event::parse(bytes);
    let stats = Arc::new(Stats::default());
    let (mut table, mut sink) = (Connections::new(1, stats.clone()), Sink(0));
    let mut rest = bytes;
    let mut ts = 0;
    while let Some((header, after)) = rest.split_at_checked(8) {
        let take = usize::from(header[7]).min(after.len());
        let (data, after) = after.split_at(take);
        rest = after;
        ts += u64::from(header[6]);
        let wire = record(header, ts, data);
        match event::parse(&wire) {
            Ok(event) => table.handle(event, &mut sink),
            Err(_) => stats.miss(Unread::Framing, 1),
        }
        if header[0] & 0x80 != 0 {
            table.sweep(ts << 24, &mut sink);
        }
    }
    assert!(table.len() <= 4, "{} connections of four numbers", table.len());
    assert!(table.under_way() <= 4 * (MAX_PIPELINE + 1), "{} requests under way", table.under_way());
    table.flush(&mut sink);
}

/// A wire record (`agent_ebpf::Record`) of eight bytes of choice.
fn record(choice: &[u8], ts: u64, data: &[u8]) -> Vec<u8> {
    let mut data = data.to_vec();
    let kind = choice[0] & 7;
    if kind == 1 {
        // An OPEN carries addresses of 184 bytes, a CLOSE counts of 64.
        data.resize(184, choice[5]);
    } else if kind == 4 {
        data.resize(64, choice[5]);
    }
    let mut wire = vec![kind, choice[1] % 24];
    wire.extend_from_slice(&u16::from_le_bytes([choice[2], choice[3]]).to_le_bytes());
    wire.extend_from_slice(&(data.len() as u32).to_le_bytes());
    wire.extend_from_slice(&u64::from(choice[4] & 3).to_le_bytes());
    wire.extend_from_slice(&(ts << 20).to_le_bytes());
    wire.extend_from_slice(&(ts << 19).to_le_bytes());
    wire.extend_from_slice(&u32::from(choice[5] >> 4).to_le_bytes());
    wire.extend_from_slice(&u32::from(choice[5]).to_le_bytes());
    wire.extend_from_slice(&u64::from(choice[6]).to_le_bytes());
    wire.extend_from_slice(&u64::from(choice[7]).to_le_bytes());
    wire.extend_from_slice(&data);
    wire
}

/// Header blocks, each behind its length: the table keeps its bound, and no credential.
pub fn header_blocks(bytes: &[u8]) {
    let principals = Principals::new(b"a key of the fuzzer", &[], &[]).expect("long enough");
    for whole in [true, false] {
        let (mut table, mut shared) = (Table::new(whole), Shared::default());
        let mut rest = bytes;
        while let Some((&length, after)) = rest.split_first() {
            let (block, after) = after.split_at(usize::from(length).min(after.len()));
            rest = after;
            if let Ok(block) = Block::decode(&mut table, &principals, &mut shared, block)
                && let Some(path) = &block.path
            {
                assert!(!path.starts_with('/') || !path.contains('?'), "a query is left");
            }
            assert!(table.memory() <= MAX_TABLE);
        }
    }
}

/// Records of frames, each behind two bytes of flags and its length: nothing unfinished is kept at the end.
pub fn frames(bytes: &[u8]) {
    let (stats, principals) = (Stats::default(), Principals::default());
    let (mut partial, mut open, mut out, mut shared) = (0, 0, Vec::new(), Shared::default());
    let mut session = Session::new(bytes.first().is_some_and(|b| b & 1 != 0));
    let mut numbers = [0_u32; 2];
    let mut rest = bytes;
    while let Some((&[flags, remaining, length], after)) = rest.split_first_chunk::<3>() {
        let (data, after) = after.split_at(usize::from(length).min(after.len()));
        rest = after;
        let sent = flags & 2 != 0;
        let number = &mut numbers[usize::from(sent)];
        let record = Frames {
            dropped: u32::from(remaining & 3),
            sent,
            index: *number + u32::from(flags >> 6 == 3),
            boundary: flags & 4 == 0,
            remaining: u64::from(remaining),
            preface: flags & 8 != 0,
            lost: flags & 48 == 48,
            first_ts: 1,
            bytes: data,
        };
        *number = record.index + 1;
        let mut around = Around {
            principals: &principals,
            stats: &stats,
            partial: &mut partial,
            most_partial: 100_000,
            shared: &mut shared,
            open: &mut open,
            most_open: 10_000,
        };
        session.record(&record, 2, 3, &mut around, &mut out);
    }
    let mut around = Around {
        principals: &principals,
        stats: &stats,
        partial: &mut partial,
        most_partial: 100_000,
        shared: &mut shared,
        open: &mut open,
        most_open: 10_000,
    };
    session.sweep(u64::MAX / 2, &mut around, &mut out);
    session.close(None, 9, &mut around, &mut out);
    assert_eq!((session.open(), partial, open), (0, 0, 0));
}

/// A line of an access log.
pub fn access_log(bytes: &[u8]) {
    if let Ok(exchange) = accesslog::parse(bytes, "log") {
        assert!(exchange.ts > 0 || exchange.status > 0 || exchange.path.is_some());
    }
}

/// A line of a recording: what is read is written, and reads the same.
pub fn ndjson(bytes: &[u8]) {
    let Ok(exchange) = Exchange::from_json(bytes) else { return };
    let mut line = Vec::new();
    exchange.write_json(exchange.path.as_deref(), &mut line);
    let again =
        Exchange::from_json(&line).unwrap_or_else(|e| panic!("{e} in our own line {}", String::from_utf8_lossy(&line)));
    let mut second = Vec::new();
    again.write_json(again.path.as_deref(), &mut second);
    assert_eq!(line, second);
}

/// A configuration file: what is valid prints as a file that reads the same.
pub fn config(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(config) = Config::parse(text) {
        let again = Config::parse(&config.print()).expect("what was printed");
        assert_eq!(config, again);
    }
}

/// Paths, one a line: a route has no more of them than there were, and no line breaks.
pub fn routes(bytes: &[u8]) {
    let mut routes = Routes::new(&[]);
    for path in String::from_utf8_lossy(bytes).lines() {
        let exchange = Exchange {
            path: Some(path.into()),
            method: Method::Get,
            status: 200,
            service: "s".into(),
            ..Exchange::default()
        };
        let route = routes.route(&exchange);
        assert!(!route.template.contains('\n'));
        assert!(route.template.len() <= path.len().max(64) * 4, "{} of {path}", route.template);
    }
}

/// A document of others: its bounds hold, and every template is a path.
pub fn openapi(bytes: &[u8]) {
    if let Ok(document) = apiscope::openapi::read(bytes) {
        assert!(document.operations.len() <= apiscope::openapi::MAX_OPERATIONS);
        assert!(document.templates().iter().all(|t| t.starts_with('/')));
        let _ = apiscope::openapi::diff(&[document], &[]);
    }
}

/// A function table of Go 1.20 with the functions `a` and `f`, what points to it, and 64 bytes of code: at 0x1000 and
/// 0x2000 in memory.
const GO_PROGRAM: [u8; 384] = {
    let mut bytes = [0; 384];
    // Halves of words: header (functions, files, unused, parts), entries and details, `moduledata`.
    let halves: [(usize, u32); 18] = [
        (0, 0xffff_fff1),
        (8, 2),
        (32, 72),
        (40, 80),
        (48, 80),
        (56, 80),
        (64, 80),
        (84, 20),
        (88, 16),
        (92, 28),
        (96, 48),
        (108, 16),
        (112, 2),
        (144, 0x1000),
        (152, 0x1048),
        (304, 0x2000),
        (312, 0x2030),
        (72, u32::from_le_bytes(*b"a\0f\0")),
    ];
    let mut i = 0;
    while i < halves.len() {
        let (at, half) = (halves[i].0, halves[i].1.to_le_bytes());
        let mut k = 0;
        while k < 4 {
            bytes[at + k] = half[k];
            k += 1;
        }
        i += 1;
    }
    bytes[6] = 1;
    bytes[7] = 8;
    bytes
};

/// A Go executable of which the headers were read: what is found lies in its code.
pub fn gopclntab(bytes: &[u8]) {
    let segment = |address, offset, size, is_code| Segment { address, offset, size, is_code };
    let segments = vec![segment(0x1000, 0, 320, false), segment(0x2000, 320, 64, true)];
    // Relocations anywhere in the data, wherever the last byte says.
    let relocations = (0x1000 + u64::from(bytes.last().copied().unwrap_or_default()), 4096);
    let found = table::functions(bytes, &Layout { segments, relocations, quantum: 1 }, &["a", "f"]);
    for range in found.iter().flat_map(|f| f.by_name.values()) {
        assert!((320..384).contains(&range.start) && range.start < range.end, "{range:?}");
    }
    if bytes == GO_PROGRAM {
        assert_eq!(found.map(|f| f.by_name["f"].clone()), Ok(336..368));
    }
}

/// The least of a library: a segment of code and two functions in a symbol table.
const LIBRARY: [u8; 512] = {
    let mut bytes = [0u8; 512];
    // Offset, bytes of the number, number (elf(5)): header, program header, symbols, sections.
    let numbers: [(usize, usize, u64); 38] = [
        (0, 4, 0x464c_457f),
        (4, 3, 0x0001_0102),
        (16, 2, 3),
        (18, 2, if cfg!(target_arch = "aarch64") { 183 } else { 62 }),
        (20, 4, 1),
        (32, 8, 64),
        (40, 8, 320),
        (52, 2, 64),
        (54, 2, 56),
        (56, 2, 1),
        (58, 2, 64),
        (60, 2, 3),
        (62, 2, 2),
        (64, 4, 1),
        (68, 4, 5),
        (72, 8, 0),
        (80, 8, 0x1000),
        (96, 8, 512),
        (104, 8, 512),
        (192, 8, u64::from_le_bytes(*b"\0SSL_rea")),
        (200, 8, u64::from_le_bytes(*b"d\0SSL_wr")),
        (208, 4, u32::from_le_bytes(*b"ite\0") as u64),
        (248, 4, 1),
        (252, 4, 0x0001_0012),
        (256, 8, 0x1080),
        (264, 8, 32),
        (272, 4, 10),
        (276, 4, 0x0001_0012),
        (280, 8, 0x10a0),
        (288, 8, 32),
        (388, 4, 11),
        (408, 8, 224),
        (416, 8, 72),
        (424, 4, 2),
        (440, 8, 24),
        (452, 4, 3),
        (472, 8, 192),
        (480, 8, 20),
    ];
    let mut i = 0;
    while i < numbers.len() {
        let (at, len, number) = (numbers[i].0, numbers[i].1, numbers[i].2.to_le_bytes());
        let mut k = 0;
        while k < len {
            bytes[at + k] = number[k];
            k += 1;
        }
        i += 1;
    }
    bytes
};

/// A file that a process maps: its functions are in it, whatever it says, and its code is read within it.
pub fn elf(bytes: &[u8]) {
    let elf = Elf::new(std::io::Cursor::new(bytes));
    let found = elf.symbols(&["SSL_read", "SSL_write"]);
    for function in found.iter().flat_map(|f| f.functions.values()) {
        assert!(elf.code(*function).len() <= CODE_BYTES);
    }
    if bytes == LIBRARY {
        let offsets = found.map(|f| ["SSL_read", "SSL_write"].map(|name| f.functions.get(name).map(|f| f.offset)));
        assert_eq!(offsets.ok(), Some([Some(0x80), Some(0xa0)]));
    }
}
