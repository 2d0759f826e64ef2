//! Writing [`Exchange`]s as NDJSON.

use std::sync::Arc;

use super::{Api, Exchange, Kind, Marks, Method, Origin, Peer};

/// The text between the value before and the value of this key in a JSON object.
macro_rules! key {
    ($name:literal) => {
        concat!(",\"", $name, "\":")
    };
}

/// Places that are remembered. A power of two.
const PLACES: usize = 512;

/// Writes many exchanges. What a line says of the connection and its ends is text that the next exchange of
/// that connection mostly has too: it is formatted once.
#[derive(Default)]
pub struct Lines {
    /// The exchange that was written last, and that text of it.
    places: Vec<Option<(Exchange, Vec<u8>)>>,
}

impl Lines {
    /// As [`Exchange::write_json`].
    pub fn write(&mut self, exchange: &Exchange, path: Option<&str>, out: &mut Vec<u8>) {
        if self.places.is_empty() {
            self.places.resize(PLACES, None);
        }
        let port = |peer: &Peer| if let Peer::Ip(address) = peer { address.port() } else { 0 };
        let at = usize::from(port(&exchange.client) ^ port(&exchange.server).rotate_left(4)) + exchange.side as usize;
        // The mask keeps it in bounds.
        let slot = &mut self.places[at & (PLACES - 1)];
        let mut object = Object::open(out);
        exchange.write_message(path, &mut object);
        match slot {
            Some((known, text)) if same_place(known, exchange) => object.put(text),
            _ => {
                let mut text = Vec::new();
                let mut place = Object { out: &mut text, line: [0; LINE], end: 0 };
                exchange.write_place(&mut place);
                place.close();
                object.put(&text);
                *slot = Some((exchange.clone(), text));
            }
        }
        object.put(b"}\n");
        object.close();
    }
}

/// Would [`Exchange::write_place`] write the same of both?
fn same_place(a: &Exchange, b: &Exchange) -> bool {
    fn same<T: PartialEq + ?Sized>(a: &Option<Arc<T>>, b: &Option<Arc<T>>) -> bool {
        match (a, b) {
            (Some(a), Some(b)) => Arc::ptr_eq(a, b) || a == b,
            (None, None) => true,
            _ => false,
        }
    }
    a.client == b.client
        && a.server == b.server
        && (a.side, a.scheme, a.protocol) == (b.side, b.scheme, b.protocol)
        && (a.tls_version, a.tls_cipher, a.tls_alpn, a.client_certificate)
            == (b.tls_version, b.tls_cipher, b.tls_alpn, b.client_certificate)
        && (a.end, a.attribution, a.auth, a.api, a.pid) == (b.end, b.attribution, b.auth, b.api, b.pid)
        && (Arc::ptr_eq(&a.service, &b.service) || a.service == b.service)
        && same(&a.exe, &b.exe)
        && same(&a.principal, &b.principal)
        && same(&a.caller, &b.caller)
        && same(&a.origin, &b.origin)
        && same(&a.peer, &b.peer)
        && same(&a.user_agent, &b.user_agent)
}

impl Exchange {
    /// Appends the exchange as one JSON object and a line feed. `path` is what is written as the
    /// path: the caller applies [`PathForm`](super::PathForm). For many of them see [`Lines`].
    pub fn write_json(&self, path: Option<&str>, out: &mut Vec<u8>) {
        let mut object = Object::open(out);
        self.write_message(path, &mut object);
        self.write_place(&mut object);
        object.put(b"}\n");
        object.close();
    }

    /// What is of this request and its answer.
    fn write_message(&self, path: Option<&str>, object: &mut Object<'_>) {
        object.number("\"ts\":", self.ts);
        object.number(key!("duration_ns"), self.duration_ns);
        if self.method != Method::Unknown {
            object.text(key!("method"), self.method.as_str());
        }
        if let Some(path) = path {
            object.text(key!("path"), path);
        }
        if !self.query_keys.is_empty() {
            object.list(key!("query_keys"), self.query_keys.iter().map(|k| &**k));
        }
        object.number(key!("status"), u64::from(self.status));
        object.number(key!("request_bytes"), self.request_bytes);
        object.number(key!("response_bytes"), self.response_bytes);
        if let Some(n) = self.request_body_bytes {
            object.number(key!("request_body_bytes"), n);
        }
        if let Some(n) = self.response_body_bytes {
            object.number(key!("response_body_bytes"), n);
        }
        if let Some(status) = self.grpc_status {
            object.number(key!("grpc_status"), u64::from(status));
        }
        if let Some(trace) = &self.trace {
            object.hex(key!("trace_id"), &trace.trace_id);
            object.hex(key!("parent_id"), &trace.parent_id);
        }
        if let Some(media) = &self.response_type {
            object.text(key!("response_type"), media);
        }
        if self.marks != Marks::default() {
            object.list(key!("marks"), self.marks.names());
        }
        if let Some(code) = self.stream_error {
            object.number(key!("stream_error"), u64::from(code));
        }
        if let Some([request, response]) = self.messages {
            object.number(key!("request_messages"), request);
            object.number(key!("response_messages"), response);
        }
    }

    /// What the next exchange of the same connection mostly has too: [`same_place`] compares all of it.
    fn write_place(&self, object: &mut Object<'_>) {
        object.text(key!("service"), &self.service);
        object.plain(key!("side"), self.side.name());
        object.peer(key!("client"), &self.client);
        object.peer(key!("server"), &self.server);
        object.plain(key!("scheme"), self.scheme.name());
        object.plain(key!("protocol"), self.protocol.name());
        if let Some(v) = self.tls_version {
            object.plain(key!("tls_version"), v.name());
        }
        if let Some(cipher) = self.tls_cipher {
            object.plain(key!("tls_cipher"), cipher.name());
        }
        if let Some(alpn) = self.tls_alpn {
            object.plain(key!("tls_alpn"), alpn.name());
        }
        if let Some(shown) = self.client_certificate {
            object.flag(key!("client_certificate"), shown);
        }
        object.plain(key!("end"), self.end.name());
        object.plain(key!("attribution"), self.attribution.name());
        object.plain(key!("auth"), self.auth.name());
        if let Some(p) = &self.principal {
            object.text(key!("principal"), p);
        }
        if let Some(c) = &self.caller {
            object.text(key!("caller"), c);
        }
        if let Some(origin) = &self.origin {
            object.origin(&OWN, origin);
        }
        if let Some(peer) = &self.peer {
            object.origin(&PEER, peer);
        }
        if self.pid != 0 {
            object.number(key!("pid"), u64::from(self.pid));
        }
        if let Some(exe) = &self.exe {
            object.text(key!("exe"), exe);
        }
        if let Some(agent) = &self.user_agent {
            object.text(key!("user_agent"), agent);
        }
        if self.api != Api::Http {
            object.plain(key!("api"), self.api.name());
        }
    }
}

/// Writes one JSON object. Keys come as [`key!`] makes them.
///
/// A recording at full speed is a hundred thousand of them a second: pieces are gathered on the stack, where
/// short ones are a few moves each.
struct Object<'a> {
    out: &'a mut Vec<u8>,
    line: [u8; LINE],
    end: usize,
}

/// Bytes that are gathered: a usual line.
const LINE: usize = 1024;

/// Keys of where an end runs; `workload` is `Kind/name`.
const OWN: [&str; 5] = [key!("container_id"), key!("namespace"), key!("pod"), key!("workload"), key!("node")];
/// The same of the other end.
const PEER: [&str; 5] =
    [key!("peer_container_id"), key!("peer_namespace"), key!("peer_pod"), key!("peer_workload"), key!("peer_node")];

impl<'a> Object<'a> {
    fn open(out: &'a mut Vec<u8>) -> Self {
        let mut line = [0; LINE];
        line[0] = b'{';
        Self { out, line, end: 1 }
    }

    fn close(self) {
        self.out.extend_from_slice(&self.line[..self.end]);
    }

    #[inline(always)]
    fn put(&mut self, bytes: &[u8]) {
        match self.line.get_mut(self.end..self.end + bytes.len()) {
            Some(room) => {
                room.copy_from_slice(bytes);
                self.end += bytes.len();
            }
            None => self.spill(bytes),
        }
    }

    #[cold]
    fn spill(&mut self, bytes: &[u8]) {
        self.out.extend_from_slice(&self.line[..self.end]);
        self.out.extend_from_slice(bytes);
        self.end = 0;
    }

    #[inline(always)]
    fn number(&mut self, key: &'static str, value: u64) {
        self.put(key.as_bytes());
        self.put(itoa::Buffer::new().format(value).as_bytes());
    }

    fn flag(&mut self, key: &'static str, value: bool) {
        self.put(key.as_bytes());
        self.put(if value { b"true" } else { b"false" });
    }

    /// A value that is known to need no escapes.
    #[inline(always)]
    fn plain(&mut self, key: &'static str, value: &str) {
        self.put(key.as_bytes());
        self.put(b"\"");
        self.put(value.as_bytes());
        self.put(b"\"");
    }

    #[inline(always)]
    fn text(&mut self, key: &'static str, value: &str) {
        self.put(key.as_bytes());
        self.put(b"\"");
        self.escaped(value);
        self.put(b"\"");
    }

    /// The inside of a JSON string (RFC 8259 section 7).
    fn escaped(&mut self, text: &str) {
        let special = |b: u8| (b < b' ') | (b == b'"') | (b == b'\\');
        let bytes = text.as_bytes();
        // Without a branch, for the vector unit.
        if !bytes.iter().fold(false, |any, &b| any | special(b)) {
            return self.put(bytes);
        }
        let hex = b"0123456789abcdef";
        for &b in bytes {
            match b {
                b'"' | b'\\' => self.put(&[b'\\', b]),
                b if special(b) => {
                    self.put(&[b'\\', b'u', b'0', b'0', hex[usize::from(b >> 4)], hex[usize::from(b & 15)]]);
                }
                b => self.put(&[b]),
            }
        }
    }

    fn list<'v>(&mut self, key: &'static str, values: impl Iterator<Item = &'v str>) {
        self.put(key.as_bytes());
        self.put(b"[");
        for (i, value) in values.enumerate() {
            self.put(if i > 0 { b",\"" } else { b"\"" });
            self.escaped(value);
            self.put(b"\"");
        }
        self.put(b"]");
    }

    fn origin(&mut self, keys: &[&'static str; 5], origin: &Origin) {
        let [id, namespace, pod, workload, node] = keys;
        if let Some(text) = &origin.container_id {
            self.text(id, text);
        }
        if let Some(text) = origin.namespace() {
            self.text(namespace, text);
        }
        if let Some(text) = &origin.pod {
            self.text(pod, text);
        }
        if let Some(w) = origin.workload.as_ref().filter(|w| w.kind != Kind::Container) {
            self.text(workload, &format!("{}/{}", w.kind.name(), w.name));
        }
        if let Some(text) = &origin.node {
            self.text(node, text);
        }
    }

    fn hex(&mut self, key: &'static str, value: &[u8]) {
        self.put(key.as_bytes());
        self.put(b"\"");
        for byte in value {
            let digit = |n: u8| b"0123456789abcdef"[usize::from(n)];
            self.put(&[digit(byte >> 4), digit(byte & 15)]);
        }
        self.put(b"\"");
    }

    fn peer(&mut self, key: &'static str, peer: &Peer) {
        match peer {
            Peer::Unknown => {}
            Peer::Unix(path) => {
                self.put(key.as_bytes());
                self.put(b"\"unix:");
                self.escaped(path);
                self.put(b"\"");
            }
            Peer::Ip(address) => self.plain(key, &address.to_string()),
        }
    }
}
