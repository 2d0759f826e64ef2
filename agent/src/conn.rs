//! The connection table: events -> exchanges. Requests and responses meet here by their numbers; the
//! kernel side has done the framing. Time is what the events say.
//!
//! Bounds: [`MAX_CONNECTIONS`] connections (the one opened first goes first), [`MAX_PIPELINE`] requests
//! under way on each, [`MAX_PARTIAL_BYTES`] of unfinished heads in all. What does not fit is counted.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use rustc_hash::FxHashMap;
use zeroize::{Zeroize as _, Zeroizing};

use crate::{
    event::{Closed, Event, Head, Message, Opened, What},
    exchange::{Alpn, Api, Attribution, Auth, End, Exchange, Handshake, Origin, Peer, Protocol, Scheme, Side},
    proto::{credential::Principals, grpc, http1, http2},
    stats::{Loss, Stats, Unread},
    stream::{Around, Live, MAX_OPEN, Session},
};

/// Most connections that are kept.
pub const MAX_CONNECTIONS: usize = 131_072;
/// Most requests under way on one connection.
pub const MAX_PIPELINE: usize = 256;
/// Most bytes of unfinished heads in all.
pub const MAX_PARTIAL_BYTES: usize = 16 << 20;
/// Usual bytes of a head that comes in parts.
const MAX_HEAD: usize = 8 << 10;
/// Most client-side exchanges that wait for what the server's end tells.
const MAX_HELD: usize = 1024;
/// How long they wait, ns.
const HOLD: u64 = 1_000_000_000;
/// A unix connection whose other end closed is over when nothing happens for this long, ns.
const EOF_GRACE: u64 = 500_000_000;

/// Who is at this end of a connection.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Service name.
    pub service: Arc<str>,
    /// Executable or script.
    pub exe: Option<Arc<str>>,
    /// Where it runs, as the kernel tells.
    pub origin: Option<Arc<Origin>>,
    /// False: the rules leave it out.
    pub wanted: bool,
}

/// Answers what the table cannot know.
pub trait Outside {
    /// Who runs as `pid`; `comm` is what the kernel called it. The addresses are as seen from it.
    fn identify(&mut self, pid: u32, comm: &str, local: &Peer, remote: &Peer) -> Identity;
    /// Sees a finished exchange; what it leaves of it is not looked at again.
    fn exchange(&mut self, exchange: &mut Exchange);
    /// A TLS connection of a process ended, with these bytes of ciphertext; `read` where its plaintext was.
    fn sealed(&mut self, _pid: u32, _read: bool, _bytes: u64) {}
    /// Is this process gone?
    fn is_gone(&mut self, pid: u32) -> bool;
    /// Records come of a connection that the rules leave out.
    fn unwanted(&mut self, id: u64) {
        let _ = id;
    }
}

/// All connections that speak HTTP.
pub struct Connections {
    table: FxHashMap<u64, Connection>,
    /// Order of opening, for eviction; may name connections that are gone.
    order: VecDeque<u64>,
    /// Unix sockets, for finding the other end.
    unix: HashMap<u64, u64>,
    /// Spare boxes.
    #[expect(clippy::vec_box, reason = "the boxes themselves go back into the queues of connections")]
    spare: Vec<Box<Pending>>,
    /// Client-side exchanges whose end the other end of the connection may still tell.
    held: VecDeque<(u64, Exchange)>,
    partial_bytes: usize,
    /// Streams of HTTP/2 that are open.
    streams: usize,
    /// Bytes of them.
    stream_bytes: usize,
    /// What sessions read of header blocks lately.
    blocks: http2::Shared,
    /// Exchanges that a session finished: room that is used again.
    finished: Vec<Exchange>,
    /// Turns credentials into principals.
    principals: Principals,
    /// What was read of heads lately.
    heads: http1::Heads,
    /// Nanoseconds from the monotonic clock to the epoch.
    epoch: u64,
    stats: Arc<Stats>,
}

struct Connection {
    pid: u32,
    side: Option<Side>,
    local: Peer,
    remote: Peer,
    identity: Identity,
    late: bool,
    /// How the socket of a TLS session was found; `None` for plaintext.
    tls: Option<Attribution>,
    handshake: Handshake,
    sock: u64,
    peer_sock: u64,
    pending: VecDeque<Box<Pending>>,
    /// Heads that are not whole: [0] received, [1] sent.
    partial: [Zeroizing<Vec<u8>>; 2],
    /// Set when the other end of a unix connection closed.
    eof_at: u64,
    /// It speaks HTTP/2.
    http2: Option<Box<Session>>,
}

impl Connection {
    fn scheme(&self) -> Scheme {
        if self.tls.is_some() { Scheme::Https } else { Scheme::Http }
    }

    /// Fills in what a session does not know of its exchanges.
    fn dress(&self, exchange: &mut Exchange, epoch: u64) {
        let side = self.side.unwrap_or(Side::Server);
        let (client, server) = match side {
            Side::Server => (&self.remote, &self.local),
            Side::Client => (&self.local, &self.remote),
        };
        exchange.ts += epoch;
        exchange.service = self.identity.service.clone();
        exchange.side = side;
        exchange.client = client.clone();
        exchange.scheme = self.scheme();
        exchange.attribution = self.tls.unwrap_or(Attribution::Socket);
        self.secure(exchange);
        exchange.server = server.clone();
        exchange.origin = self.identity.origin.clone();
        exchange.exe = self.identity.exe.clone();
        if exchange.pid == 0 {
            exchange.pid = self.pid;
        }
    }

    /// Fills in what the handshake says.
    fn secure(&self, exchange: &mut Exchange) {
        if self.tls.is_none() {
            return;
        }
        let Handshake { version, cipher, alpn, peer_certificate } = self.handshake;
        exchange.tls_version = version;
        exchange.tls_cipher = cipher;
        // HTTP/2 over TLS is chosen by ALPN and by nothing else (RFC 9113 section 3.2).
        let spoken = (exchange.protocol == Protocol::Http2).then_some(Alpn::H2);
        exchange.tls_alpn = alpn.or(spoken);
        if exchange.side == Side::Server {
            exchange.client_certificate = peer_certificate;
            if exchange.auth == Auth::None && peer_certificate == Some(true) {
                exchange.auth = Auth::Mtls;
            }
        }
    }
}

/// A request under way.
#[derive(Default)]
struct Pending {
    index: u32,
    /// Sent by this end.
    sent: bool,
    request: Option<Arc<http1::Request>>,
    first_ts: u64,
    pid: u32,
    request_bytes: u64,
    request_body: u64,
    request_done: bool,
    lost: bool,
    /// Bytes of interim responses.
    interim: u64,
    response: Option<Arc<http1::Response>>,
    response_bytes: u64,
    response_body: u64,
    response_done: bool,
    upgraded: bool,
    last_ts: u64,
}

impl Pending {
    fn api(request: &http1::Request, response: Option<&http1::Response>) -> Api {
        if response.is_some_and(|r| r.websocket) {
            return Api::WebSocket;
        }
        let media = response.and_then(|r| r.media_type.as_deref());
        grpc::api(&request.path, request.media_type.as_deref(), media)
    }

    fn live(&self) -> Option<Live> {
        let request = self.request.as_ref()?;
        Some(Live {
            api: Self::api(request, self.response.as_deref()),
            method: request.method.clone(),
            path: Some(request.path.clone()),
            first_ts: self.first_ts,
            body: [self.request_body, self.response_body],
            messages: [0; 2],
        })
    }
}

impl Connections {
    /// An empty table. `epoch` is what to add to a monotonic time, ns.
    pub fn new(epoch: u64, stats: Arc<Stats>) -> Self {
        Self {
            table: FxHashMap::default(),
            order: VecDeque::new(),
            unix: HashMap::new(),
            spare: Vec::new(),
            held: VecDeque::new(),
            partial_bytes: 0,
            streams: 0,
            stream_bytes: 0,
            blocks: http2::Shared::default(),
            finished: Vec::new(),
            principals: Principals::default(),
            heads: http1::Heads::new(&[0; 16]),
            epoch,
            stats,
        }
    }

    /// Names principals; without this there are only schemes.
    #[must_use]
    pub fn with_principals(mut self, principals: Principals) -> Self {
        self.heads = http1::Heads::new(&principals.memo_key());
        self.principals = principals;
        self
    }

    /// Connections that are kept.
    pub fn len(&self) -> usize {
        self.table.len()
    }

    /// True when there is none.
    pub fn is_empty(&self) -> bool {
        self.table.is_empty()
    }

    /// Is this the number of an open connection?
    #[must_use]
    pub fn knows(&self, id: u64) -> bool {
        self.table.contains_key(&id)
    }

    /// Takes one event.
    pub fn handle(&mut self, event: Event<'_>, outside: &mut impl Outside) {
        match event.what {
            What::Open(opened) => self.open(event.conn, event.pid, *opened, outside),
            What::Head(head) => self.head(event.conn, event.ts, event.pid, &head, outside),
            What::Frames(frames) => {
                let late = self.table.get(&event.conn).is_none_or(|c| c.late);
                self.session(event.conn, outside, |session, around, out| {
                    let session = session.get_or_insert_with(|| Box::new(Session::new(late)));
                    session.record(&frames, event.ts, event.pid, around, out);
                });
            }
            What::End(message) => self.end(event.conn, event.ts, message, outside),
            What::Close(closed) => self.close(event.conn, event.ts, Some(closed), outside),
            What::Abort { sent } => {
                if let Some(connection) = self.table.get_mut(&event.conn) {
                    let partial = &mut connection.partial[usize::from(sent)];
                    self.partial_bytes -= partial.len();
                    *partial = Zeroizing::default();
                }
            }
            What::Eof => self.eof(event.conn, event.ts),
            What::Sealed { read, received, sent } => outside.sealed(event.pid, read, received.saturating_add(sent)),
        }
    }

    fn open(&mut self, id: u64, pid: u32, opened: Opened, outside: &mut impl Outside) {
        if self.table.len() >= MAX_CONNECTIONS {
            while let Some(oldest) = self.order.pop_front() {
                if self.table.contains_key(&oldest) {
                    self.close(oldest, 0, None, outside);
                    self.stats.lose(Loss::ConnectionsFull, 1);
                    break;
                }
            }
        }
        if self.order.len() > 2 * MAX_CONNECTIONS {
            self.order.retain(|id| self.table.contains_key(id));
        }
        if let Some(known) = self.table.get_mut(&id) {
            // A TLS session whose socket is found later than its first message.
            known.local = opened.local;
            known.remote = opened.remote;
            known.tls = opened.tls;
            known.handshake = opened.handshake;
            return;
        }
        self.order.push_back(id);
        let identity = outside.identify(pid, &opened.comm, &opened.local, &opened.remote);
        if !identity.wanted {
            outside.unwanted(id);
        }
        if matches!(opened.local, Peer::Unix(_)) {
            self.unix.insert(opened.sock, id);
        }
        self.table.insert(
            id,
            Connection {
                pid,
                side: None,
                local: opened.local,
                remote: opened.remote,
                identity,
                late: opened.late,
                tls: opened.tls,
                handshake: opened.handshake,
                sock: opened.sock,
                peer_sock: opened.peer_sock,
                pending: VecDeque::new(),
                partial: Default::default(),
                eof_at: 0,
                http2: None,
            },
        );
    }

    fn head(&mut self, id: u64, ts: u64, pid: u32, head: &Head<'_>, outside: &mut impl Outside) {
        let Some(connection) = self.table.get_mut(&id) else {
            self.stats.lose(Loss::BadRecord, u64::from(head.last && head.message.response));
            return;
        };
        if !connection.identity.wanted {
            return outside.unwanted(id);
        }
        let partial = &mut connection.partial[usize::from(head.message.sent)];
        if head.first && !partial.is_empty() {
            self.partial_bytes -= partial.len();
            partial.zeroize();
        }
        if !head.last {
            if self.partial_bytes + head.bytes.len() <= MAX_PARTIAL_BYTES {
                self.partial_bytes += head.bytes.len();
                // Growing would leave copies of credentials behind.
                let room = if partial.is_empty() { MAX_HEAD.max(head.bytes.len()) } else { head.bytes.len() };
                partial.reserve_exact(room);
                partial.extend_from_slice(head.bytes);
            }
            return;
        }
        if head.cut {
            self.stats.miss(Unread::HeadTooLong, 1);
        }
        if partial.is_empty() {
            self.whole_head(id, ts, pid, head, head.bytes, outside);
        } else {
            let mut bytes = std::mem::take(partial);
            self.partial_bytes -= bytes.len();
            bytes.extend_from_slice(head.bytes);
            self.whole_head(id, ts, pid, head, &bytes, outside);
        }
    }

    fn whole_head(&mut self, id: u64, ts: u64, pid: u32, head: &Head<'_>, bytes: &[u8], outside: &mut impl Outside) {
        let Some(connection) = self.table.get_mut(&id) else { return };
        let message = head.message;
        if connection.side.is_none() {
            connection.side = Some(if message.response == message.sent { Side::Server } else { Side::Client });
        }
        if !message.response {
            let Some(request) = self.heads.request(bytes, &self.principals) else {
                self.stats.miss(Unread::Framing, 1);
                return;
            };
            if connection.pending.len() >= MAX_PIPELINE {
                self.stats.lose(Loss::PipelineFull, 1);
                return;
            }
            // A response that came before its request waits here under the same number.
            let early = connection.pending.iter().position(|p| p.index == message.index && p.request.is_none());
            let mut new = match early.and_then(|i| connection.pending.remove(i)) {
                Some(pending) => pending,
                None => self.spare.pop().unwrap_or_default(),
            };
            new.index = message.index;
            new.sent = message.sent;
            new.request = Some(request);
            new.first_ts = message.first_ts;
            new.pid = pid;
            new.request_bytes = message.bytes;
            new.request_body = if head.done { message.body } else { 0 };
            new.request_done = head.done;
            new.last_ts = new.last_ts.max(ts);
            let complete = new.request_done && new.response_done;
            let at = connection.pending.iter().take_while(|p| p.index < new.index).count();
            connection.pending.insert(at, new);
            if complete {
                self.finish(id, at, None, outside);
            }
            return;
        }
        let Some(response) = self.heads.response(bytes) else {
            self.stats.miss(Unread::Framing, 1);
            return;
        };
        if connection.pending.front().is_some_and(|first| first.index < message.index) {
            self.pass_over(id, message.index, outside);
        }
        let Some(connection) = self.table.get_mut(&id) else { return };
        if connection.pending.front().is_none_or(|p| p.index != message.index) {
            let mut early = self.spare.pop().unwrap_or_default();
            early.index = message.index;
            early.sent = !message.sent;
            connection.pending.push_front(early);
        }
        let Some(pending) = connection.pending.front_mut() else { return };
        if response.status < 200 && response.status != 101 {
            pending.interim += message.bytes;
            pending.last_ts = ts;
            return;
        }
        if head.upgrade && response.h2c {
            return self.upgrade(id, outside);
        }
        if head.upgrade {
            self.stats.miss(if response.websocket { Unread::WebSocket } else { Unread::Upgraded }, 1);
        }
        pending.upgraded = head.upgrade;
        pending.response = Some(response);
        pending.response_bytes = message.bytes;
        pending.response_body = if head.done { message.body } else { 0 };
        pending.response_done = head.done;
        pending.last_ts = ts;
        // What left HTTP lasts until the connection ends.
        if pending.request.is_some() && pending.response_done && pending.request_done && !pending.upgraded {
            self.finish(id, 0, None, outside);
        }
    }

    /// Takes away the requests before the `index`th whose response never came: it was dropped, and counted.
    fn pass_over(&mut self, id: u64, index: u32, outside: &mut impl Outside) {
        while let Some(connection) = self.table.get_mut(&id)
            && let Some(first) = connection.pending.front_mut()
            && first.index < index
        {
            if first.response.is_some() {
                // Its end was dropped.
                first.lost = true;
                self.finish(id, 0, Some(End::Lost), outside);
            } else if let Some(pending) = connection.pending.pop_front() {
                recycle(&mut self.spare, pending);
            }
        }
    }

    /// Lets an HTTP/2 session of a connection act, and hands out what it finished.
    fn session(
        &mut self,
        id: u64,
        outside: &mut impl Outside,
        act: impl FnOnce(&mut Option<Box<Session>>, &mut Around<'_>, &mut Vec<Exchange>),
    ) {
        let Some(connection) = self.table.get_mut(&id) else {
            self.stats.lose(Loss::BadRecord, 1);
            return;
        };
        if !connection.identity.wanted {
            return outside.unwanted(id);
        }
        let open = |session: &Option<Box<Session>>| session.as_ref().map_or(0, |s| s.open());
        let before = open(&connection.http2);
        let mut finished = std::mem::take(&mut self.finished);
        let mut around = Around {
            principals: &self.principals,
            stats: &self.stats,
            partial: &mut self.partial_bytes,
            most_partial: MAX_PARTIAL_BYTES,
            shared: &mut self.blocks,
            open: &mut self.stream_bytes,
            most_open: MAX_OPEN,
        };
        act(&mut connection.http2, &mut around, &mut finished);
        self.streams = self.streams + open(&connection.http2) - before;
        if let Some(client) = connection.http2.as_ref().and_then(|s| s.is_client()) {
            connection.side = Some(if client { Side::Client } else { Side::Server });
        }
        for exchange in &mut finished {
            connection.dress(exchange, self.epoch);
        }
        for exchange in &mut finished {
            self.deliver(exchange, true, outside);
        }
        finished.clear();
        self.finished = finished;
    }

    /// The request under way goes on as the first stream of an HTTP/2 session.
    fn upgrade(&mut self, id: u64, outside: &mut impl Outside) {
        let Some(connection) = self.table.get_mut(&id) else { return };
        let Some(mut pending) = connection.pending.pop_front() else { return };
        if let Some(request) = pending.request.take() {
            let p = &pending;
            let session = Session::upgraded(request, p.sent, p.first_ts, p.pid, p.request_bytes, p.request_body);
            self.session(id, outside, |place, _, _| *place = Some(Box::new(session)));
        }
        recycle(&mut self.spare, pending);
    }

    fn end(&mut self, id: u64, ts: u64, message: Message, outside: &mut impl Outside) {
        let Some(connection) = self.table.get_mut(&id) else { return };
        let Some(i) = connection.pending.iter().position(|p| p.index == message.index) else { return };
        let pending = &mut connection.pending[i];
        pending.lost |= message.lost;
        if message.response {
            pending.response_bytes = message.bytes;
            pending.response_body = message.body;
            pending.response_done = true;
            pending.last_ts = ts;
        } else {
            pending.request_bytes = message.bytes;
            pending.request_body = message.body;
            pending.request_done = true;
            // An early answer is over before its request is.
            if pending.response.is_none() {
                pending.last_ts = ts;
            }
        }
        if pending.request.is_some() && pending.request_done && pending.response_done {
            self.finish(id, i, None, outside);
        }
    }

    /// Makes the exchange of the `i`th request under way.
    fn finish(&mut self, id: u64, i: usize, end: Option<End>, outside: &mut impl Outside) {
        let Some(connection) = self.table.get_mut(&id) else { return };
        let Some(mut pending) = connection.pending.remove(i) else { return };
        let Some(request) = pending.request.take() else {
            recycle(&mut self.spare, pending);
            return;
        };
        let side = connection.side.unwrap_or(Side::Server);
        let (client, server) = match side {
            Side::Server => (&connection.remote, &connection.local),
            Side::Client => (&connection.local, &connection.remote),
        };
        let end = match end {
            Some(end) => end,
            None if pending.lost => End::Lost,
            None if pending.upgraded => End::Upgraded,
            None => End::Complete,
        };
        let answered = pending.response.is_some();
        let none = http1::Response::default();
        let response = pending.response.as_deref().unwrap_or(&none);
        let api = Pending::api(&request, Some(response));
        let mut exchange = Exchange {
            ts: pending.first_ts + self.epoch,
            duration_ns: pending.last_ts.saturating_sub(pending.first_ts),
            service: connection.identity.service.clone(),
            side,
            method: request.method.clone(),
            path: Some(request.path.clone()),
            query_keys: request.query_keys.clone(),
            status: response.status,
            request_bytes: pending.request_bytes,
            response_bytes: pending.response_bytes + pending.interim,
            request_body_bytes: Some(pending.request_body),
            response_body_bytes: answered.then_some(pending.response_body),
            client: client.clone(),
            server: server.clone(),
            scheme: connection.scheme(),
            protocol: if answered || request.protocol == Protocol::Http10 {
                request.protocol
            } else {
                Protocol::Http11
            },
            tls_version: None,
            tls_cipher: None,
            tls_alpn: None,
            client_certificate: None,
            end,
            attribution: connection.tls.unwrap_or(Attribution::Socket),
            auth: request.auth,
            principal: request.principal.clone(),
            caller: None,
            origin: connection.identity.origin.clone(),
            peer: None,
            pid: if pending.pid == 0 { connection.pid } else { pending.pid },
            exe: connection.identity.exe.clone(),
            grpc_status: response.grpc_status,
            trace: request.trace,
            user_agent: request.user_agent.clone(),
            response_type: response.media_type.clone(),
            marks: request.marks.with(response.marks),
            api,
            stream_error: None,
            messages: None,
        };
        connection.secure(&mut exchange);
        recycle(&mut self.spare, pending);
        self.deliver(&mut exchange, answered, outside);
    }

    /// Hands out an exchange, unless the other end of its connection may know better how it ended.
    fn deliver(&mut self, exchange: &mut Exchange, answered: bool, outside: &mut impl Outside) {
        let (side, end) = (exchange.side, exchange.end);
        if exchange.protocol == Protocol::Http2 {
            // Streams say themselves how they end.
            return outside.exchange(exchange);
        }
        if !self.held.is_empty() && side == Side::Server {
            self.settle(exchange, outside);
        }
        if end == End::Closed && side == Side::Client && answered && self.held.len() < MAX_HELD {
            self.held.push_back((exchange.ts + exchange.duration_ns, std::mem::take(exchange)));
            return;
        }
        outside.exchange(exchange);
    }

    /// A client that closes first cannot see what became of the answer: that the server reset the
    /// connection, or that it had nothing more to send. The server's end can, when it is on this node.
    fn settle(&mut self, server: &Exchange, outside: &mut impl Outside) {
        let Some(i) = self.held.iter().position(|(_, e)| e.client == server.client && e.server == server.server) else {
            return;
        };
        let Some((_, mut exchange)) = self.held.remove(i) else { return };
        if server.end == End::Reset || (server.end == End::Complete && server.response_bytes == exchange.response_bytes)
        {
            exchange.end = server.end;
        }
        outside.exchange(&mut exchange);
    }

    fn close(&mut self, id: u64, ts: u64, closed: Option<Closed>, outside: &mut impl Outside) {
        let Some(connection) = self.table.get_mut(&id) else { return };
        let peer = connection.peer_sock;
        self.unix.remove(&connection.sock);
        if connection.http2.is_some() {
            self.session(id, outside, |session, around, out| {
                if let Some(session) = session {
                    session.close(closed.as_ref(), ts, around, out);
                }
            });
        }
        let mut first = true;
        while let Some(connection) = self.table.get_mut(&id) {
            let Some(pending) = connection.pending.front_mut() else { break };
            if let Some(closed) = &closed {
                if pending.request.is_none() || (pending.response.is_none() && pending.index < closed.responses) {
                    // Seen and dropped by the kernel side: counted there.
                    if let Some(pending) = connection.pending.pop_front() {
                        recycle(&mut self.spare, pending);
                    }
                    continue;
                }
                let (asked, answered) = (usize::from(pending.sent), usize::from(!pending.sent));
                if pending.upgraded {
                    // Request and answer are over since the upgrade; what came after is their content.
                    pending.request_body = closed.bytes[asked].saturating_sub(pending.request_bytes);
                    pending.response_body = closed.bytes[answered].saturating_sub(pending.response_bytes);
                    pending.last_ts = pending.last_ts.max(closed.last_ts[0]).max(closed.last_ts[1]);
                    self.finish(id, 0, Some(End::Upgraded), outside);
                    continue;
                }
                if !pending.request_done && closed.unfinished[asked] {
                    pending.request_bytes = closed.bytes[asked];
                    pending.request_body = closed.body[asked];
                }
                let mut whole = false;
                if first && !pending.response_done && closed.unfinished[answered] {
                    // The answer under way belongs to the first request: answers come in order.
                    pending.response_bytes = closed.bytes[answered];
                    pending.response_body = closed.body[answered];
                    pending.last_ts = pending.last_ts.max(closed.last_ts[answered]);
                    whole = closed.until_close[answered] && pending.response.is_some();
                } else if pending.response.is_none() {
                    pending.last_ts = pending.last_ts.max(ts);
                }
                first = false;
                let end = match closed.reset {
                    true => End::Reset,
                    false if whole || (pending.response_done && pending.request_done) => End::Complete,
                    false => End::Closed,
                };
                self.finish(id, 0, Some(end), outside);
            } else {
                let end = match ts {
                    _ if pending.upgraded => End::Upgraded,
                    0 => End::Lost,
                    _ => End::Closed,
                };
                pending.last_ts = pending.last_ts.max(ts);
                self.finish(id, 0, Some(end), outside);
            }
        }
        if let Some(connection) = self.table.remove(&id) {
            self.partial_bytes -= connection.partial.iter().map(|p| p.len()).sum::<usize>();
            if peer != 0
                && matches!(connection.local, Peer::Unix(_))
                && let Some(other) = self.unix.get(&peer).and_then(|id| self.table.get_mut(id))
            {
                other.eof_at = other.eof_at.max(ts);
            }
        }
    }

    fn eof(&mut self, id: u64, ts: u64) {
        let Some(connection) = self.table.get_mut(&id) else { return };
        connection.eof_at = ts;
        let peer = connection.peer_sock;
        if let Some(other) = self.unix.get(&peer).and_then(|id| self.table.get_mut(id)) {
            other.eof_at = ts;
        }
    }

    /// Ends what the kernel does not report: unix connections whose other end closed or whose process
    /// is gone. `now` is monotonic, ns. To be called about once a second.
    pub fn sweep(&mut self, now: u64, outside: &mut impl Outside) {
        while self.held.front().is_some_and(|(ts, _)| now + self.epoch > ts + HOLD) {
            if let Some((_, mut exchange)) = self.held.pop_front() {
                outside.exchange(&mut exchange);
            }
        }
        let answered: Vec<u64> = self
            .table
            .iter()
            .filter(|(_, c)| c.http2.as_ref().is_some_and(|s| s.waits(now)))
            .map(|(id, _)| *id)
            .collect();
        for id in answered {
            self.session(id, outside, |session, around, out| {
                if let Some(session) = session {
                    session.sweep(now, around, out);
                }
            });
        }
        let over: Vec<u64> = self
            .table
            .iter()
            .filter(|(_, c)| matches!(c.local, Peer::Unix(_)))
            .filter(|(_, c)| (c.eof_at != 0 && now > c.eof_at + EOF_GRACE) || outside.is_gone(c.pid))
            .map(|(id, _)| *id)
            .collect();
        for id in over {
            let ts = self.table.get(&id).map_or(now, |c| if c.eof_at == 0 { now } else { c.eof_at });
            self.close(id, ts, None, outside);
        }
    }

    /// Hands out what waits, at the agent's own end.
    pub fn flush(&mut self, outside: &mut impl Outside) {
        for (_, mut exchange) in std::mem::take(&mut self.held) {
            outside.exchange(&mut exchange);
        }
        // What left HTTP is known to be whole as an exchange; its connection just goes on.
        let upgraded: Vec<u64> =
            self.table.iter().filter(|(_, c)| c.pending.iter().any(|p| p.upgraded)).map(|(id, _)| *id).collect();
        for id in upgraded {
            while self.table.get(&id).and_then(|c| c.pending.front()).is_some_and(|p| p.upgraded) {
                self.finish(id, 0, Some(End::Upgraded), outside);
            }
        }
    }

    /// Exchanges that began before `since` (monotonic, ns) and are not over.
    pub fn live(&self, since: u64) -> Vec<(Arc<str>, Side, Live)> {
        let mut all = Vec::new();
        for c in self.table.values() {
            let side = c.side.unwrap_or(Side::Server);
            let requests = c.pending.iter().filter(|p| p.first_ts <= since).filter_map(|p| p.live());
            let streams = c.http2.iter().flat_map(|s| s.live(since));
            all.extend(requests.chain(streams).map(|l| (c.identity.service.clone(), side, l)));
        }
        all
    }

    /// Streams of HTTP/2 that are open.
    pub fn open_streams(&self) -> usize {
        self.streams
    }

    /// Memory of all HTTP/2 sessions, about, bytes.
    pub fn session_memory(&self) -> usize {
        self.table.values().filter_map(|c| c.http2.as_ref()).map(|s| s.memory()).sum()
    }

    /// Requests that are not answered yet. They are not reported at the agent's end: they are not over.
    pub fn under_way(&self) -> usize {
        self.table.values().map(|c| c.pending.len()).sum()
    }

    /// Was this connection there before the agent?
    pub fn is_late(&self, id: u64) -> bool {
        self.table.get(&id).is_some_and(|c| c.late)
    }
}

#[expect(clippy::vec_box, reason = "see `Connections::spare`")]
fn recycle(spare: &mut Vec<Box<Pending>>, mut pending: Box<Pending>) {
    if spare.len() < 1024 {
        *pending = Pending::default();
        spare.push(pending);
    }
}
