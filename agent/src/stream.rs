//! The streams of an HTTP/2 connection (RFC 9113): frames -> exchanges, one for each stream. Time is what the
//! events say.
//!
//! A session may begin in the middle, and records of it may be lost: then the header table of the direction
//! is forgotten, and what refers to it is unknown until it refills. A stream whose request or answer was
//! never seen makes no exchange: it is counted.
//!
//! Bounds: [`MAX_STREAMS`] of a session, [`MAX_OPEN`] bytes of the open streams of all together, [`MAX_BLOCK`] bytes of
//! a header block, `MAX_TABLE` of `proto/hpack.rs` of each table, and what is unfinished of all connections
//! together ([`Around::partial`]).

use std::{collections::BTreeMap, sync::Arc};

use zeroize::Zeroizing;

use crate::{
    event::{Closed, Frames},
    exchange::{Api, End, Exchange, Method, Protocol, TraceContext},
    proto::{
        credential::{Found, Principals},
        grpc, http1,
        http2::{self, Block, FrameHead, flag, kind},
    },
    stats::{Loss, Stats, Unread},
};

/// Most streams of a session that are kept; the oldest goes first.
pub const MAX_STREAMS: usize = 4096;
/// Most bytes of the open streams of all sessions: 80,000 usual ones. Beyond it a session that opens one gives up its
/// oldest, unless its own have less than [`FAIR`].
pub const MAX_OPEN: usize = 24 << 20;
/// Bytes of open streams that any session may have, whatever the others hold: five usual ones.
pub const FAIR: usize = 2048;
/// What an allocator and the list of streams add to one, about, bytes.
const STREAM_EXTRA: usize = 48;
/// Most bytes of a header block; a longer one is passed over, and the table is forgotten.
pub const MAX_BLOCK: usize = 256 * 1024;
/// Streams whose loss is noticed by the number of the next one; of more, only when their answers come.
const MAX_MISSED: u32 = 1024;
/// An answered stream whose request does not end, and one whose request was never seen, is given up
/// after this time, ns.
const LINGER: u64 = 1_000_000_000;

/// `REFUSED_STREAM` (RFC 9113 section 7).
const REFUSED: u32 = 7;

/// What sessions share.
pub struct Around<'a> {
    /// Turns credentials into principals.
    pub principals: &'a Principals,
    /// Counters.
    pub stats: &'a Stats,
    /// Bytes of unfinished frames and blocks of all sessions, and the most of it.
    pub partial: &'a mut usize,
    /// See `partial`.
    pub most_partial: usize,
    /// What was read of blocks lately.
    pub shared: &'a mut http2::Shared,
    /// Bytes of the open streams of all sessions, and the most of it.
    pub open: &'a mut usize,
    /// See `open`.
    pub most_open: usize,
}

/// One connection.
pub struct Session {
    /// Which half the client sends: index into `halves`.
    client: Option<usize>,
    /// [0] received, [1] sent.
    halves: [Half; 2],
    /// A tree gives back the room of what is over.
    streams: BTreeMap<u32, Box<Stream>>,
    /// Bytes of the open streams.
    held: usize,
    /// Highest stream that the client opened.
    last_stream: u32,
    /// Older than the agent.
    late: bool,
    /// Records were lost since.
    lossy: bool,
    /// Answers whose end was dropped by the kernel side, and counted there: so many of the streams that seem to be
    /// open are over.
    dropped: u32,
    /// Code of a GOAWAY.
    goaway: Option<u32>,
}

/// One direction.
struct Half {
    table: http2::Table,
    /// Number of the next record.
    next: u32,
    frame: Option<Partial>,
    block: Option<Partial>,
}

/// A frame whose payload, or a block whose CONTINUATION, is still to come.
struct Partial {
    head: FrameHead,
    promised: u32,
    /// Bytes on the connection.
    size: u64,
    first_ts: u64,
    /// `None`: too long.
    bytes: Option<Zeroizing<Vec<u8>>>,
}

/// A request and its answer. Index 0 is the request.
#[derive(Default)]
struct Stream {
    asked: bool,
    answered: bool,
    first_ts: u64,
    last_ts: u64,
    pid: u32,
    done: [bool; 2],
    bytes: [u64; 2],
    body: [u64; 2],
    messages: [u64; 2],
    /// Messages were missed, or there are none.
    inexact: bool,
    lost: bool,
    /// A field that the exchange needs may be older than the agent.
    unknown: bool,
    method: Option<Method>,
    path: Option<Arc<str>>,
    query_keys: Option<Arc<[Box<str>]>>,
    /// Extended CONNECT (RFC 8441).
    websocket: bool,
    credential: Found,
    trace: Option<TraceContext>,
    user_agent: Option<Arc<str>>,
    media: [Option<Arc<str>>; 2],
    status: u16,
    grpc_status: Option<u32>,
    marks: crate::exchange::Marks,
    /// The request came over HTTP/1 (h2c by upgrade).
    upgraded_from: Option<Arc<http1::Request>>,
    /// Its part of what sessions hold, bytes.
    charged: usize,
}

/// A stream that is open, for a live view.
#[derive(Debug, Clone)]
pub struct Live {
    /// Kind.
    pub api: Api,
    /// Method.
    pub method: Method,
    /// Raw path.
    pub path: Option<Arc<str>>,
    /// First byte, monotonic ns.
    pub first_ts: u64,
    /// Content bytes of request and answer so far.
    pub body: [u64; 2],
    /// gRPC messages so far; a lower bound.
    pub messages: [u64; 2],
}

impl Half {
    fn new(whole: bool) -> Self {
        Self { table: http2::Table::new(whole), next: 0, frame: None, block: None }
    }

    /// Drops what is unfinished; its bytes are given back.
    fn drop_partial(&mut self, around: &mut Around<'_>) {
        for partial in [self.frame.take(), self.block.take()].into_iter().flatten() {
            *around.partial -= partial.held();
        }
    }
}

/// Puts what is unfinished into its place. What was there was never finished, which is against the protocol:
/// its bytes are given back.
fn replace(place: &mut Option<Partial>, partial: Partial, around: &mut Around<'_>) {
    if let Some(before) = place.replace(partial) {
        *around.partial -= before.held();
    }
}

impl Partial {
    fn held(&self) -> usize {
        self.bytes.as_ref().map_or(0, |b| b.len())
    }

    /// Adds bytes, unless it is too long already.
    fn push(&mut self, bytes: &[u8], around: &mut Around<'_>) {
        let held = self.held();
        let Some(all) = &mut self.bytes else { return };
        if held + bytes.len() > MAX_BLOCK || *around.partial + bytes.len() > around.most_partial {
            *around.partial -= held;
            self.bytes = None;
            around.stats.miss(Unread::HeadTooLong, 1);
            return;
        }
        *around.partial += bytes.len();
        // Growing would leave copies of credentials behind: a new place, and the old one is wiped.
        if all.capacity() - held < bytes.len() {
            let mut larger = Zeroizing::new(Vec::with_capacity((held + bytes.len()).next_power_of_two()));
            larger.extend_from_slice(all);
            *all = larger;
        }
        all.extend_from_slice(bytes);
    }
}

impl Session {
    /// A session that is seen from its first byte, or `late`.
    #[must_use]
    pub fn new(late: bool) -> Self {
        Self {
            client: None,
            halves: [Half::new(!late), Half::new(!late)],
            streams: BTreeMap::new(),
            held: 0,
            last_stream: 0,
            late,
            lossy: false,
            dropped: 0,
            goaway: None,
        }
    }

    /// A session that begins with `101 Switching Protocols`: `request` is its first stream (RFC 7540 section
    /// 3.2). `bytes` and `body` are its sizes.
    #[must_use]
    pub fn upgraded(request: Arc<http1::Request>, sent: bool, first_ts: u64, pid: u32, bytes: u64, body: u64) -> Self {
        let mut session = Self::new(false);
        session.client = Some(usize::from(sent));
        session.last_stream = 1;
        let stream = Stream {
            asked: true,
            first_ts,
            last_ts: first_ts,
            pid,
            done: [true, false],
            bytes: [bytes, 0],
            body: [body, 0],
            inexact: true,
            upgraded_from: Some(request),
            ..Stream::default()
        };
        session.streams.insert(1, Box::new(stream));
        session
    }

    /// Does this end send the requests? `None` while that is not known.
    #[must_use]
    pub fn is_client(&self) -> Option<bool> {
        self.client.map(|half| half == 1)
    }

    /// Streams that are open.
    #[must_use]
    pub fn open(&self) -> usize {
        self.streams.len()
    }

    /// Memory that the session holds, about, bytes.
    #[must_use]
    pub fn memory(&self) -> usize {
        size_of::<Self>() + self.halves.iter().map(|h| h.table.allocated()).sum::<usize>() + self.held
    }

    /// Streams that are open since before `since`, monotonic ns.
    pub fn live(&self, since: u64) -> impl Iterator<Item = Live> + '_ {
        self.streams.values().filter(move |s| s.asked && s.first_ts <= since).map(|s| Live {
            api: s.api(),
            method: s.method.clone().unwrap_or(Method::Unknown),
            path: s.path().map(Into::into),
            first_ts: s.first_ts,
            body: s.body,
            messages: s.messages,
        })
    }

    /// Takes one record. Finished exchanges go to `out`, with what only the connection knows left out and with
    /// monotonic time.
    pub fn record(&mut self, frames: &Frames<'_>, ts: u64, pid: u32, around: &mut Around<'_>, out: &mut Vec<Exchange>) {
        let at = usize::from(frames.sent);
        if frames.preface {
            self.client = Some(at);
            if self.late && self.last_stream == 0 {
                self.late = false;
                self.halves.iter_mut().for_each(|h| h.table = http2::Table::new(true));
            }
        }
        self.dropped = self.dropped.saturating_add(frames.dropped);
        let missed = frames.index.wrapping_sub(self.halves[at].next);
        self.halves[at].next = frames.index.wrapping_add(1);
        if missed != 0 || (frames.lost && frames.index != 0) {
            self.lose(at, around);
        } else if frames.lost {
            self.late = true;
            self.halves[at].table.forget();
        }
        let mut bytes = frames.bytes;
        if !frames.boundary {
            let (rest, after) = bytes.split_at(bytes.len().min(frames.remaining as usize));
            bytes = after;
            if let Some(mut frame) = self.halves[at].frame.take() {
                frame.push(rest, around);
                if rest.len() < frames.remaining as usize {
                    self.halves[at].frame = Some(frame);
                } else {
                    *around.partial -= frame.held();
                    let payload = frame.bytes.as_deref().map(Vec::as_slice);
                    self.frame(at, frame.head, payload, frame.first_ts, ts, pid, around, out);
                }
            }
        }
        let mut first_ts = frames.first_ts;
        while let Some((head, rest)) = bytes.split_first_chunk::<{ http2::HEAD }>() {
            let head = FrameHead::parse(head);
            if head.kind == kind::DATA {
                let Some((&[padding, low, high, flags], rest)) = rest.split_first_chunk::<4>() else { break };
                let content = u64::from(head.length).saturating_sub(if head.has(flag::PADDED) {
                    1 + u64::from(padding)
                } else {
                    0
                });
                self.data(at, head, content, u16::from_le_bytes([low, high]), flags == 0, ts, around, out);
                bytes = rest;
            } else if let Some((payload, rest)) = rest.split_at_checked(head.length as usize) {
                self.frame(at, head, Some(payload), first_ts, ts, pid, around, out);
                bytes = rest;
            } else {
                let mut frame = Partial { head, promised: 0, size: 0, first_ts, bytes: Some(Zeroizing::default()) };
                frame.push(rest, around);
                replace(&mut self.halves[at].frame, frame, around);
                break;
            }
            first_ts = ts;
        }
    }

    /// Takes a frame whose payload is whole; `None` where it was too long.
    #[expect(clippy::too_many_arguments, reason = "the place of a frame")]
    fn frame(
        &mut self,
        at: usize,
        head: FrameHead,
        payload: Option<&[u8]>,
        first_ts: u64,
        ts: u64,
        pid: u32,
        around: &mut Around<'_>,
        out: &mut Vec<Exchange>,
    ) {
        match head.kind {
            kind::HEADERS | kind::PUSH_PROMISE => {
                let found = payload.and_then(|p| http2::fragment(head, p));
                let promised = found.map_or(0, |(_, promised)| promised);
                let mut partial = Partial { head, promised, size: head.size(), first_ts, bytes: None };
                if let Some((fragment, _)) = found {
                    if head.has(flag::END_HEADERS) {
                        return self.block(at, &partial, Some(fragment), ts, pid, around, out);
                    }
                    partial.bytes = Some(Zeroizing::default());
                    partial.push(fragment, around);
                } else if head.has(flag::END_HEADERS) {
                    return self.block(at, &partial, None, ts, pid, around, out);
                }
                replace(&mut self.halves[at].block, partial, around);
            }
            kind::CONTINUATION => {
                let Some(mut partial) = self.halves[at].block.take() else {
                    // The beginning of the block is older than the agent, or lost.
                    return self.halves[at].table.forget();
                };
                partial.size += head.size();
                match payload {
                    Some(payload) => partial.push(payload, around),
                    None => {
                        *around.partial -= partial.held();
                        partial.bytes = None;
                    }
                }
                if head.has(flag::END_HEADERS) {
                    *around.partial -= partial.held();
                    let bytes = partial.bytes.take();
                    self.block(at, &partial, bytes.as_deref().map(Vec::as_slice), ts, pid, around, out);
                } else {
                    self.halves[at].block = Some(partial);
                }
            }
            kind::RST_STREAM => {
                let code = payload.and_then(|p| p.first_chunk()).map_or(0, |c| u32::from_be_bytes(*c));
                if let Some(stream) = self.streams.get_mut(&head.stream) {
                    let whole = stream.done[1];
                    if !whole {
                        stream.last_ts = ts;
                    }
                    let end = if whole { End::Complete } else { End::Reset };
                    self.finish(head.stream, end, (!whole).then_some(code), around, out);
                }
            }
            kind::GOAWAY => self.goaway(at, payload.unwrap_or_default(), ts, around, out),
            _ => {}
        }
    }

    /// The peer of whoever sends this has opened streams that were not and will not be looked at.
    fn goaway(&mut self, at: usize, payload: &[u8], ts: u64, around: &mut Around<'_>, out: &mut Vec<Exchange>) {
        let Some((&last, rest)) = payload.split_first_chunk::<4>() else { return };
        let last = u32::from_be_bytes(last) & 0x7fff_ffff;
        let code = rest.first_chunk().map_or(0, |c| u32::from_be_bytes(*c));
        if code != 0 {
            self.goaway = Some(code);
        }
        if self.client == Some(at) {
            return;
        }
        let refused: Vec<u32> = self.streams.range(last + 1..).map(|(id, _)| *id).filter(|id| id % 2 == 1).collect();
        for id in refused {
            if let Some(stream) = self.streams.get_mut(&id)
                && !stream.answered
            {
                stream.last_ts = ts;
                self.finish(id, End::Reset, Some(REFUSED), around, out);
            }
        }
    }

    /// Takes a header block.
    #[expect(clippy::too_many_arguments, reason = "the place of a frame")]
    fn block(
        &mut self,
        at: usize,
        frame: &Partial,
        bytes: Option<&[u8]>,
        ts: u64,
        pid: u32,
        around: &mut Around<'_>,
        out: &mut Vec<Exchange>,
    ) {
        let table = &mut self.halves[at].table;
        let block = match bytes.map(|b| Block::decode(table, around.principals, around.shared, b)) {
            Some(Ok(block)) => block,
            Some(Err(_)) => {
                around.stats.miss(Unread::Framing, 1);
                Block { unknown: true, ..Block::default() }
            }
            None => {
                table.forget();
                Block { unknown: true, ..Block::default() }
            }
        };
        let id = frame.head.stream;
        if frame.head.kind == kind::PUSH_PROMISE {
            // A request that the server makes for the client.
            self.client = Some(1 - at);
            let stream = self.stream(frame.promised, around, out);
            stream.ask(block, frame, pid);
            stream.done[0] = true;
            return self.charge(frame.promised, around);
        }
        if self.client.is_none() && (block.of_request || block.status.is_some()) {
            self.client = Some(if block.of_request { at } else { 1 - at });
        }
        let Some(client) = self.client else { return };
        let end = frame.head.has(flag::END_STREAM);
        if at == client {
            if id > self.last_stream && id % 2 == 1 {
                self.opened(id, around, out);
            }
            let new = !self.streams.contains_key(&id);
            // Trailers of a stream that is over, or of one that is older than the agent.
            if new && !block.of_request && (!block.unknown || id < self.last_stream) {
                return;
            }
            let stream = self.stream(id, around, out);
            if stream.asked {
                stream.bytes[0] += frame.size;
            } else {
                stream.ask(block, frame, pid);
            }
        } else {
            if !self.streams.contains_key(&id) && id <= self.last_stream {
                if self.lossy {
                    self.end_of_unknown(end, around);
                } else if self.late && block.status.is_some_and(|s| s >= 200) {
                    around.stats.miss(Unread::JoinedLate, 1);
                }
                return;
            }
            let stream = self.stream(id, around, out);
            stream.answer(block, frame);
            stream.last_ts = stream.last_ts.max(ts);
        }
        self.charge(id, around);
        if end {
            self.ended(id, usize::from(at != client), ts, around, out);
        }
    }

    /// A frame of an answer whose request and head were lost, and with it, where it ends, the exchange.
    fn end_of_unknown(&self, ends: bool, around: &mut Around<'_>) {
        around.stats.lose(Loss::Streams, u64::from(ends));
    }

    /// The client opened a stream: those between it and the last one were not seen.
    fn opened(&mut self, id: u32, around: &mut Around<'_>, out: &mut Vec<Exchange>) {
        let skipped = (id - self.last_stream).div_ceil(2) - 1;
        if self.lossy && self.last_stream != 0 {
            for i in (0..skipped.min(MAX_MISSED)).rev() {
                let missed = id - 2 * (i + 1);
                self.stream(missed, around, out).lost = true;
            }
        }
        self.last_stream = id;
    }

    /// The stream, a new one where there is none.
    fn stream(&mut self, id: u32, around: &mut Around<'_>, out: &mut Vec<Exchange>) -> &mut Stream {
        if !self.streams.contains_key(&id) {
            while self.is_full(around)
                && let Some((&oldest, _)) = self.streams.first_key_value()
            {
                // An exchange that is marked as lost, or counted as such.
                self.finish(oldest, End::Lost, None, around, out);
            }
            self.streams.insert(id, Box::default());
            self.charge(id, around);
        }
        self.streams.entry(id).or_default()
    }

    /// Is there no room for another stream?
    fn is_full(&self, around: &Around<'_>) -> bool {
        self.streams.len() >= MAX_STREAMS || (*around.open >= around.most_open && self.held >= FAIR)
    }

    /// Counts what a stream holds.
    fn charge(&mut self, id: u32, around: &mut Around<'_>) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        let (before, now) = (stream.charged, stream.weight());
        stream.charged = now;
        self.held = self.held + now - before;
        *around.open = *around.open + now - before;
    }

    /// Takes a stream out.
    fn remove(&mut self, id: u32, around: &mut Around<'_>) -> Option<Box<Stream>> {
        let stream = self.streams.remove(&id)?;
        self.held -= stream.charged;
        *around.open -= stream.charged;
        if self.streams.is_empty() {
            // An empty tree keeps a node.
            self.streams = BTreeMap::new();
        }
        Some(stream)
    }

    #[expect(clippy::too_many_arguments, reason = "the place of a frame")]
    fn data(
        &mut self,
        at: usize,
        head: FrameHead,
        content: u64,
        messages: u16,
        exact: bool,
        ts: u64,
        around: &mut Around<'_>,
        out: &mut Vec<Exchange>,
    ) {
        let Some(client) = self.client else { return };
        let which = usize::from(at != client);
        let Some(stream) = self.streams.get_mut(&head.stream) else {
            if which == 1 && self.lossy {
                self.end_of_unknown(head.has(flag::END_STREAM), around);
            }
            return;
        };
        stream.bytes[which] += head.size();
        stream.body[which] += content;
        stream.messages[which] += u64::from(messages);
        stream.inexact |= !exact;
        if head.has(flag::END_STREAM) {
            self.ended(head.stream, which, ts, around, out);
        }
    }

    /// END_STREAM.
    fn ended(&mut self, id: u32, which: usize, ts: u64, around: &mut Around<'_>, out: &mut Vec<Exchange>) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        stream.done[which] = true;
        if which == 1 {
            stream.last_ts = ts;
        }
        if stream.done == [true, true] && stream.asked {
            self.finish(id, End::Complete, None, around, out);
        }
    }

    /// Records of a direction are missing.
    fn lose(&mut self, at: usize, around: &mut Around<'_>) {
        self.lossy = true;
        self.halves[at].table.forget();
        self.halves[at].drop_partial(around);
        self.streams.values_mut().for_each(|s| s.lost = true);
    }

    /// Makes the exchange of a stream.
    fn finish(&mut self, id: u32, end: End, code: Option<u32>, around: &mut Around<'_>, out: &mut Vec<Exchange>) {
        let Some(stream) = self.remove(id, around) else { return };
        if stream.lost && !stream.done[1] && end != End::Reset && self.dropped > 0 {
            self.dropped -= 1;
            return;
        }
        if !stream.asked {
            if stream.lost || !self.late {
                around.stats.lose(Loss::Streams, 1);
            } else if stream.status >= 200 {
                around.stats.miss(Unread::JoinedLate, 1);
            }
            return;
        }
        if stream.status == 0 && stream.method.is_none() && stream.path().is_none() {
            // Nobody took it for a request.
            around.stats.miss(Unread::Framing, 1);
            return;
        }
        if stream.unknown {
            around.stats.miss(Unread::HeaderTable, 1);
        }
        out.push(stream.exchange(end, code));
    }

    /// Is there anything to [`Session::sweep`]?
    #[must_use]
    pub fn waits(&self, now: u64) -> bool {
        self.streams.values().any(|s| s.waits(now))
    }

    /// Gives up what does not end: answered streams whose request goes on, and answers without a request.
    /// `now` is monotonic, ns.
    pub fn sweep(&mut self, now: u64, around: &mut Around<'_>, out: &mut Vec<Exchange>) {
        let over: Vec<u32> = self.streams.iter().filter(|(_, s)| s.waits(now)).map(|(id, _)| *id).collect();
        for id in over {
            // A missing answer may still come to a stream that was noticed by its number alone.
            if self.streams.get(&id).is_some_and(|s| s.last_ts == 0) {
                if let Some(stream) = self.streams.get_mut(&id) {
                    stream.last_ts = now;
                }
                continue;
            }
            self.finish(id, End::Complete, None, around, out);
        }
    }

    /// The connection is over; `closed` is what the kernel side says of it, `reset` and `ts` how and when.
    pub fn close(&mut self, closed: Option<&Closed>, ts: u64, around: &mut Around<'_>, out: &mut Vec<Exchange>) {
        let mut reset = false;
        if let Some(closed) = closed {
            reset = closed.reset;
            self.dropped = self.dropped.saturating_add(closed.dropped);
            for at in [0, 1] {
                let missed = closed.records[at].wrapping_sub(self.halves[at].next);
                if missed != 0 {
                    self.lose(at, around);
                    if self.streams.is_empty() {
                        around.stats.lose(Loss::Streams, u64::from(missed));
                    }
                }
                // A DATA frame that was under way.
                if let (Some(client), true) = (self.client, closed.unfinished[at])
                    && let Some(stream) = u32::try_from(closed.bytes[at]).ok().and_then(|id| self.streams.get_mut(&id))
                {
                    let which = usize::from(at != client);
                    let sum = closed.body[at].saturating_add(http2::HEAD as u64);
                    stream.bytes[which] = stream.bytes[which].saturating_add(sum);
                    stream.body[which] = stream.body[which].saturating_add(closed.body[at]);
                }
            }
        }
        self.halves.iter_mut().for_each(|h| h.drop_partial(around));
        let ids: Vec<u32> = self.streams.keys().copied().collect();
        let code = self.goaway;
        for id in ids {
            let Some(stream) = self.streams.get_mut(&id) else { continue };
            let end = match stream.done[1] {
                true => End::Complete,
                false if closed.is_none() && ts == 0 => End::Lost,
                false if reset => End::Reset,
                false => End::Closed,
            };
            if !stream.done[1] {
                stream.last_ts = stream.last_ts.max(ts);
            }
            let code = if end == End::Complete { None } else { code };
            self.finish(id, end, code, around, out);
        }
    }
}

impl Stream {
    /// Takes the head of the request.
    fn ask(&mut self, block: Block, frame: &Partial, pid: u32) {
        self.asked = true;
        self.first_ts = frame.first_ts;
        self.last_ts = self.last_ts.max(frame.first_ts);
        self.pid = pid;
        self.bytes[0] += frame.size;
        // A path or method that is missing without a reason is the client's fault.
        self.unknown |= block.unknown && (block.method.is_none() || block.path.is_none());
        self.method = block.method;
        self.path = block.path;
        self.query_keys = block.query_keys;
        self.websocket = block.websocket;
        self.credential = block.credential;
        self.trace = block.trace;
        self.user_agent = block.user_agent;
        self.media[0] = block.media;
        self.marks.insert(block.marks);
    }

    /// Takes the head or the trailers of the answer.
    fn answer(&mut self, block: Block, frame: &Partial) {
        self.bytes[1] += frame.size;
        if block.grpc_status.is_some() {
            self.grpc_status = block.grpc_status;
        }
        match block.status {
            // Interim.
            Some(100..=199) => return,
            Some(status) => {
                self.status = status;
                self.answered = true;
            }
            None if !self.answered => {
                self.answered = true;
                self.unknown |= block.unknown;
            }
            None => {}
        }
        if block.media.is_some() {
            self.media[1] = block.media;
        }
        self.marks.insert(block.marks);
    }

    /// Will it hardly end by itself?
    fn waits(&self, now: u64) -> bool {
        (self.done[1] || !self.asked) && now > self.last_ts + LINGER
    }

    /// Memory, about, bytes. Texts that many share count in full with each.
    fn weight(&self) -> usize {
        let text = |text: &Option<Arc<str>>| text.as_ref().map_or(0, |t| t.len());
        let keys = self.query_keys.iter().flat_map(|keys| keys.iter());
        let method = if let Some(Method::Other(token)) = &self.method { token.len() } else { 0 };
        size_of::<Self>()
            + STREAM_EXTRA
            + method
            + text(&self.path)
            + text(&self.user_agent)
            + self.media.iter().map(text).sum::<usize>()
            + keys.map(|k| k.len() + 2 * size_of::<Box<str>>()).sum::<usize>()
    }

    fn path(&self) -> Option<&str> {
        match &self.upgraded_from {
            Some(request) => Some(&request.path),
            None => self.path.as_deref(),
        }
    }

    fn api(&self) -> Api {
        if self.websocket {
            return Api::WebSocket;
        }
        grpc::api(self.path().unwrap_or_default(), self.media[0].as_deref(), self.media[1].as_deref())
    }

    fn exchange(self: Box<Self>, end: End, code: Option<u32>) -> Exchange {
        let api = self.api();
        let tunnel = self.method == Some(Method::Connect) && (200..300).contains(&self.status);
        let credential = self.credential.credential();
        let mut exchange = Exchange {
            ts: self.first_ts,
            duration_ns: self.last_ts.saturating_sub(self.first_ts),
            status: self.status,
            request_bytes: self.bytes[0],
            response_bytes: self.bytes[1],
            request_body_bytes: Some(self.body[0]),
            response_body_bytes: self.answered.then_some(self.body[1]),
            protocol: Protocol::Http2,
            end: match end {
                End::Complete if self.lost => End::Lost,
                End::Complete if tunnel => End::Upgraded,
                end => end,
            },
            pid: self.pid,
            grpc_status: self.grpc_status,
            response_type: self.media[1].clone(),
            marks: self.marks,
            api,
            stream_error: code.filter(|_| end != End::Complete),
            messages: (api == Api::Grpc && !self.inexact && !self.lost).then_some(self.messages),
            ..Exchange::default()
        };
        match &self.upgraded_from {
            Some(request) => {
                exchange.method = request.method.clone();
                exchange.path = Some(request.path.clone());
                exchange.query_keys = request.query_keys.clone();
                exchange.auth = request.auth;
                exchange.principal = request.principal.clone();
                exchange.trace = request.trace;
                exchange.user_agent = request.user_agent.clone();
                exchange.marks.insert(request.marks);
            }
            None => {
                exchange.method = self.method.unwrap_or(Method::Unknown);
                exchange.path = self.path;
                exchange.query_keys = self.query_keys.unwrap_or_default();
                exchange.auth = credential.auth;
                exchange.principal = credential.principal;
                exchange.trace = self.trace;
                exchange.user_agent = self.user_agent;
            }
        }
        exchange
    }
}

#[cfg(test)]
mod tests;
