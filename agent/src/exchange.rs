//! [`Exchange`]: one request and its answer as one end of a connection saw them. It is the one
//! currency of everything below the protocols, and it has one text form: a JSON object a line
//! (NDJSON), written by [`Exchange::write_json`] and read by [`Exchange::from_json`].
//!
//! **Invariant**: an exchange carries no credential, cookie, query value or body byte. It may carry
//! the raw path until `route`; what is written of it is decided by [`PathForm`].

mod cipher;
mod handshake;
pub mod json;
mod origin;

use std::{fmt, net::SocketAddr, sync::Arc};

use serde::Deserialize;

pub use cipher::Cipher;
pub use handshake::{Alpn, Handshake};
pub use origin::{Image, Kind, Origin, Workload};

/// One request and its answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Exchange {
    /// First byte of the request, nanoseconds since the Unix epoch.
    pub ts: u64,
    /// From the first byte of the request to the last byte of the answer, nanoseconds.
    pub duration_ns: u64,
    /// Name of the service that was seen: the server's on the server side, the caller's on the client side.
    pub service: Arc<str>,
    /// The end that was seen.
    pub side: Side,
    /// Method as sent, upper case not enforced (methods are case-sensitive, RFC 9110 section 9.1).
    pub method: Method,
    /// Path without query and fragment; `None` when it cannot be known (a header table older than the agent).
    pub path: Option<Arc<str>>,
    /// Names of query parameters in order of appearance, values never. At most [`MAX_QUERY_KEYS`].
    pub query_keys: Arc<[Box<str>]>,
    /// Status code; 0 where no answer came.
    pub status: u16,
    /// The whole request as it went over the connection: head, body and framing.
    pub request_bytes: u64,
    /// The whole answer, 1xx heads included.
    pub response_bytes: u64,
    /// Content of the request alone, where known.
    pub request_body_bytes: Option<u64>,
    /// Content of the answer alone, where known.
    pub response_body_bytes: Option<u64>,
    /// Who asked.
    pub client: Peer,
    /// The address that the client connected to.
    pub server: Peer,
    /// `http` or `https`.
    pub scheme: Scheme,
    /// HTTP version.
    pub protocol: Protocol,
    /// Version of TLS, where there is one and it is known.
    pub tls_version: Option<TlsVersion>,
    /// Cipher suite of TLS, where it is known.
    pub tls_cipher: Option<Cipher>,
    /// The protocol that ALPN chose, where it is known.
    pub tls_alpn: Option<Alpn>,
    /// Did the client show a certificate? Known at the server's end alone, and there of some libraries.
    pub client_certificate: Option<bool>,
    /// How it ended.
    pub end: End,
    /// How the connection of a TLS session was found.
    pub attribution: Attribution,
    /// Which kind of credential the request carried.
    pub auth: Auth,
    /// Who the credential stands for: a keyed hash, never the credential.
    pub principal: Option<Arc<str>>,
    /// Workload of the caller, where known.
    pub caller: Option<Arc<str>>,
    /// Where the end that was seen runs; `None` outside containers.
    pub origin: Option<Arc<Origin>>,
    /// Pod, service or node of the other end, where known.
    pub peer: Option<Arc<Origin>>,
    /// Process of the end that was seen; 0 where unknown.
    pub pid: u32,
    /// Its executable or script.
    pub exe: Option<Arc<str>>,
    /// Status of a gRPC call, from its trailers.
    pub grpc_status: Option<u32>,
    /// `traceparent` of the request (W3C Trace Context), where it carried a valid one.
    pub trace: Option<TraceContext>,
    /// `User-Agent` of the request, cut to [`MAX_USER_AGENT`] bytes.
    pub user_agent: Option<Arc<str>>,
    /// Media type of the answer without parameters, lower case.
    pub response_type: Option<Arc<str>>,
    /// What the heads said beside that.
    pub marks: Marks,
    /// What kind of API it belongs to.
    pub api: Api,
    /// HTTP/2: the code of what ended the stream early (RFC 9113 section 7).
    pub stream_error: Option<u32>,
    /// gRPC: messages of the request and of the answer, where they were counted to the last.
    pub messages: Option<[u64; 2]>,
}

/// Kind of API, by path and media types: no body is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub enum Api {
    /// None of the others.
    #[default]
    Http,
    /// gRPC over HTTP/2.
    Grpc,
    /// gRPC-Web.
    GrpcWeb,
    /// JSON-RPC over HTTP.
    JsonRpc,
    /// GraphQL over HTTP.
    GraphQl,
    /// Server-sent events.
    EventStream,
    /// WebSocket (RFC 6455, RFC 8441).
    WebSocket,
}

/// Things that a head may say and detectors ask for: a set of the constants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Marks(u8);

impl Marks {
    /// The answer asks who is there: `WWW-Authenticate` (RFC 9110 section 11.6.1).
    pub const CHALLENGE: Self = Self(1);
    /// The answer says that the endpoint is deprecated: `Deprecation` (RFC 9745).
    pub const DEPRECATED: Self = Self(2);
    /// The answer says when the endpoint goes: `Sunset` (RFC 8594).
    pub const SUNSET: Self = Self(4);
    /// The request asks to be treated as another method: `X-HTTP-Method-Override` and its kind.
    pub const METHOD_OVERRIDE: Self = Self(8);
    const NAMES: [(Self, &str); 4] = [
        (Self::CHALLENGE, "challenge"),
        (Self::DEPRECATED, "deprecated"),
        (Self::SUNSET, "sunset"),
        (Self::METHOD_OVERRIDE, "method_override"),
    ];

    /// Adds these.
    pub fn insert(&mut self, other: Self) {
        self.0 |= other.0;
    }

    /// The marks of both.
    #[must_use]
    pub fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Are all of these set?
    #[must_use]
    pub fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Names of what is set.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        Self::NAMES.into_iter().filter(move |(m, _)| self.has(*m)).map(|(_, name)| name)
    }

    fn from_names<'a>(names: impl Iterator<Item = &'a str>) -> Self {
        names.filter_map(|n| Self::NAMES.iter().find(|(_, name)| *name == n)).fold(Self(0), |all, (m, _)| all.with(*m))
    }
}

/// Most query parameter names kept of one request.
pub const MAX_QUERY_KEYS: usize = 16;
/// Most bytes kept of a `User-Agent`.
pub const MAX_USER_AGENT: usize = 96;

/// The end of the connection that was seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Side {
    /// The end that received the request.
    Server,
    /// The end that sent it.
    Client,
}

/// A request method: the registered ones without allocation, any other token as it was sent.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[expect(missing_docs, reason = "the variants are the methods' own names")]
pub enum Method {
    Get,
    Head,
    Post,
    Put,
    Delete,
    Connect,
    Options,
    Trace,
    Patch,
    /// Any other token.
    Other(Box<str>),
    /// Not known: the header table of the connection is older than the agent.
    Unknown,
}

/// One end of a connection.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Peer {
    /// An IP address and port; IPv4-mapped IPv6 addresses are kept as IPv4.
    Ip(SocketAddr),
    /// A unix socket: its path, `@name` for an abstract one, empty for an unnamed one.
    Unix(Arc<str>),
    /// Not known.
    Unknown,
}

/// Scheme of the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[expect(missing_docs, reason = "the variants say it")]
pub enum Scheme {
    Http,
    Https,
}

/// HTTP version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[expect(missing_docs, reason = "the variants say it")]
pub enum Protocol {
    Http10,
    Http11,
    Http2,
    Http3,
}

/// TLS version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[expect(missing_docs, reason = "the variants say it")]
pub enum TlsVersion {
    Tls10,
    Tls11,
    Tls12,
    Tls13,
}

/// How an exchange ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum End {
    /// Request and answer were whole.
    Complete,
    /// The connection was reset before.
    Reset,
    /// The connection was closed before.
    Closed,
    /// The connection left HTTP with this exchange (101, or 2xx to CONNECT).
    Upgraded,
    /// Bytes were missed: sizes and duration are lower bounds.
    Lost,
}

/// How sure the connection of an exchange is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Attribution {
    /// Plaintext: the socket itself.
    Socket,
    /// TLS: the socket call ran inside the library call.
    Nested,
    /// TLS on memory: found by the ciphertext.
    Ciphertext,
    /// TLS: the connection is unknown.
    None,
}

/// Kind of credential of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[expect(missing_docs, reason = "the variants are the schemes' own names")]
pub enum Auth {
    None,
    Basic,
    Bearer,
    ApiKey,
    Cookie,
    Digest,
    Negotiate,
    Mtls,
    Other,
}

/// W3C Trace Context of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceContext {
    /// 16 bytes, not all zero.
    pub trace_id: [u8; 16],
    /// Span that the caller named as the parent: 8 bytes, not all zero.
    pub parent_id: [u8; 8],
    /// The caller's sampling decision.
    pub sampled: bool,
}

/// How paths are written outside the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PathForm {
    /// The route: `/users/{id}`.
    #[default]
    Template,
    /// The route with a keyed hash in each parameter.
    Hmac,
    /// As sent. Only for a recording that the operator asked for.
    Raw,
}

macro_rules! names {
    ($type:ty { $($variant:ident => $name:literal),+ $(,)? }) => {
        impl $type {
            /// The name used in NDJSON, metrics and the command line.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name),+ }
            }
            /// The value of a name.
            #[must_use]
            pub fn from_name(name: &str) -> Option<Self> {
                match name { $($name => Some(Self::$variant),)+ _ => None }
            }
        }
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.name())
            }
        }
    };
}
names!(Side { Server => "server", Client => "client" });
names!(Scheme { Http => "http", Https => "https" });
names!(Protocol { Http10 => "1.0", Http11 => "1.1", Http2 => "2", Http3 => "3" });
names!(TlsVersion { Tls10 => "1.0", Tls11 => "1.1", Tls12 => "1.2", Tls13 => "1.3" });
names!(Alpn {
    None => "none", Http10 => "http/1.0", Http11 => "http/1.1", H2 => "h2", Other => "other",
});
names!(End { Complete => "complete", Reset => "reset", Closed => "closed", Upgraded => "upgraded", Lost => "lost" });
names!(Attribution { Socket => "socket", Nested => "nested", Ciphertext => "ciphertext", None => "none" });
names!(Auth {
    None => "none", Basic => "basic", Bearer => "bearer", ApiKey => "apikey", Cookie => "cookie",
    Digest => "digest", Negotiate => "negotiate", Mtls => "mtls", Other => "other",
});
names!(Api {
    Http => "http", Grpc => "grpc", GrpcWeb => "grpc-web", JsonRpc => "json-rpc", GraphQl => "graphql",
    EventStream => "event-stream", WebSocket => "websocket",
});
names!(PathForm { Template => "template", Hmac => "hmac", Raw => "raw" });

impl Method {
    /// The method of a token. The token is trusted to be one (RFC 9110 section 5.6.2).
    #[must_use]
    pub fn from_token(token: &str) -> Self {
        match token {
            "GET" => Self::Get,
            "HEAD" => Self::Head,
            "POST" => Self::Post,
            "PUT" => Self::Put,
            "DELETE" => Self::Delete,
            "CONNECT" => Self::Connect,
            "OPTIONS" => Self::Options,
            "TRACE" => Self::Trace,
            "PATCH" => Self::Patch,
            "" => Self::Unknown,
            other => Self::Other(other.into()),
        }
    }

    /// The token as sent; empty for [`Method::Unknown`].
    #[must_use]
    pub fn as_str(&self) -> &str {
        match self {
            Self::Get => "GET",
            Self::Head => "HEAD",
            Self::Post => "POST",
            Self::Put => "PUT",
            Self::Delete => "DELETE",
            Self::Connect => "CONNECT",
            Self::Options => "OPTIONS",
            Self::Trace => "TRACE",
            Self::Patch => "PATCH",
            Self::Other(token) => token,
            Self::Unknown => "",
        }
    }

    /// The value of `http.request.method`: unknown methods are `_OTHER` (OpenTelemetry semantic
    /// conventions 1.44), so that an attacker cannot choose label values.
    #[must_use]
    pub fn semantic_name(&self) -> &str {
        match self {
            Self::Other(token) if &**token == "QUERY" => "QUERY",
            Self::Other(_) | Self::Unknown => "_OTHER",
            known => known.as_str(),
        }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Peer {
    /// Reads `ip:port`, `[v6]:port`, `unix:PATH`, or a bare IP address (port 0).
    #[must_use]
    pub fn parse(text: &str) -> Self {
        if let Some(path) = text.strip_prefix("unix:") {
            return Self::Unix(path.into());
        }
        let address = text.parse::<SocketAddr>().ok().or_else(|| text.parse().ok().map(|ip| SocketAddr::new(ip, 0)));
        address.map_or(Self::Unknown, |a| Self::Ip(SocketAddr::new(a.ip().to_canonical(), a.port())))
    }

    /// The host alone: the address without its port, `unix` for unix sockets. What distinguishes
    /// callers, whose ports change with every connection.
    #[must_use]
    pub fn host(&self) -> String {
        match self {
            Self::Ip(a) => a.ip().to_string(),
            Self::Unix(_) => "unix".into(),
            Self::Unknown => String::new(),
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(a) => write!(f, "{a}"),
            Self::Unix(path) => write!(f, "unix:{path}"),
            Self::Unknown => Ok(()),
        }
    }
}

impl Default for Exchange {
    fn default() -> Self {
        Self {
            ts: 0,
            duration_ns: 0,
            service: "".into(),
            side: Side::Server,
            method: Method::Unknown,
            path: None,
            query_keys: Arc::default(),
            status: 0,
            request_bytes: 0,
            response_bytes: 0,
            request_body_bytes: None,
            response_body_bytes: None,
            client: Peer::Unknown,
            server: Peer::Unknown,
            scheme: Scheme::Http,
            protocol: Protocol::Http11,
            tls_version: None,
            tls_cipher: None,
            tls_alpn: None,
            client_certificate: None,
            end: End::Complete,
            attribution: Attribution::Socket,
            auth: Auth::None,
            principal: None,
            caller: None,
            origin: None,
            peer: None,
            pid: 0,
            exe: None,
            grpc_status: None,
            trace: None,
            user_agent: None,
            response_type: None,
            marks: Marks::default(),
            api: Api::Http,
            stream_error: None,
            messages: None,
        }
    }
}

impl Exchange {
    /// Reads one NDJSON line. Unknown keys are ignored; `ts`, `service`, `method`, `path` and
    /// `status` are required, everything else may be missing.
    ///
    /// # Errors
    /// Says what is wrong with the line: not JSON, a key of the wrong type, a required key missing.
    pub fn from_json(line: &[u8]) -> Result<Self, serde_json::Error> {
        let line: Line<'_> = serde_json::from_slice(line)?;
        if line.method.as_deref().is_some_and(str::is_empty) {
            return Err(serde::de::Error::custom("the method is empty"));
        }
        // What a header table older than the agent hides is left out; HTTP/1 has none.
        let hidden = matches!(&*line.protocol, "2" | "3");
        if !hidden && line.method.is_none() {
            return Err(serde::de::Error::missing_field("method"));
        }
        if !hidden && line.path.is_none() {
            return Err(serde::de::Error::missing_field("path"));
        }
        Ok(line.into())
    }
}

/// An NDJSON line as read.
#[derive(Deserialize)]
struct Line<'a> {
    ts: u64,
    #[serde(default)]
    duration_ns: u64,
    #[serde(borrow)]
    service: std::borrow::Cow<'a, str>,
    #[serde(default, borrow)]
    side: std::borrow::Cow<'a, str>,
    #[serde(borrow)]
    method: Option<std::borrow::Cow<'a, str>>,
    path: Option<Arc<str>>,
    #[serde(default)]
    query_keys: Vec<Box<str>>,
    status: u16,
    #[serde(default)]
    request_bytes: u64,
    #[serde(default)]
    response_bytes: u64,
    request_body_bytes: Option<u64>,
    response_body_bytes: Option<u64>,
    #[serde(default, borrow)]
    client: std::borrow::Cow<'a, str>,
    #[serde(default, borrow)]
    server: std::borrow::Cow<'a, str>,
    #[serde(default, borrow)]
    scheme: std::borrow::Cow<'a, str>,
    #[serde(default, borrow)]
    protocol: std::borrow::Cow<'a, str>,
    #[serde(default, borrow)]
    tls_version: std::borrow::Cow<'a, str>,
    #[serde(default, borrow)]
    tls_cipher: std::borrow::Cow<'a, str>,
    #[serde(default, borrow)]
    tls_alpn: std::borrow::Cow<'a, str>,
    client_certificate: Option<bool>,
    #[serde(default, borrow)]
    end: std::borrow::Cow<'a, str>,
    #[serde(default, borrow)]
    attribution: std::borrow::Cow<'a, str>,
    #[serde(default, borrow)]
    auth: std::borrow::Cow<'a, str>,
    principal: Option<Arc<str>>,
    caller: Option<Arc<str>>,
    #[serde(default)]
    pid: u32,
    exe: Option<Arc<str>>,
    grpc_status: Option<u32>,
    trace_id: Option<Box<str>>,
    parent_id: Option<Box<str>>,
    user_agent: Option<Arc<str>>,
    response_type: Option<Arc<str>>,
    #[serde(default, borrow)]
    marks: Vec<std::borrow::Cow<'a, str>>,
    #[serde(default, borrow)]
    api: std::borrow::Cow<'a, str>,
    stream_error: Option<u32>,
    request_messages: Option<u64>,
    response_messages: Option<u64>,
}

impl From<Line<'_>> for Exchange {
    fn from(line: Line<'_>) -> Self {
        let trace = line.trace_id.as_deref().and_then(unhex).zip(line.parent_id.as_deref().and_then(unhex));
        Self {
            ts: line.ts,
            duration_ns: line.duration_ns,
            service: line.service.as_ref().into(),
            side: Side::from_name(&line.side).unwrap_or(Side::Server),
            method: Method::from_token(line.method.as_deref().unwrap_or_default()),
            path: line.path,
            query_keys: line.query_keys.into(),
            status: line.status,
            request_bytes: line.request_bytes,
            response_bytes: line.response_bytes,
            request_body_bytes: line.request_body_bytes,
            response_body_bytes: line.response_body_bytes,
            client: Peer::parse(&line.client),
            server: Peer::parse(&line.server),
            scheme: Scheme::from_name(&line.scheme).unwrap_or(Scheme::Http),
            protocol: Protocol::from_name(&line.protocol).unwrap_or(Protocol::Http11),
            tls_version: TlsVersion::from_name(&line.tls_version),
            tls_cipher: Cipher::from_name(&line.tls_cipher),
            tls_alpn: Alpn::from_name(&line.tls_alpn),
            client_certificate: line.client_certificate,
            end: End::from_name(&line.end).unwrap_or(End::Complete),
            attribution: Attribution::from_name(&line.attribution).unwrap_or(Attribution::Socket),
            auth: Auth::from_name(&line.auth).unwrap_or(Auth::None),
            principal: line.principal.filter(|p| !p.is_empty()),
            caller: line.caller,
            origin: None,
            peer: None,
            pid: line.pid,
            exe: line.exe,
            grpc_status: line.grpc_status,
            trace: trace.map(|(trace_id, parent_id)| TraceContext { trace_id, parent_id, sampled: false }),
            user_agent: line.user_agent,
            response_type: line.response_type,
            marks: Marks::from_names(line.marks.iter().map(|n| &**n)),
            api: Api::from_name(&line.api).unwrap_or_default(),
            stream_error: line.stream_error,
            messages: line.request_messages.zip(line.response_messages).map(|(a, b)| [a, b]),
        }
    }
}

/// Bytes of a lower- or upper-case hexadecimal text of exactly `2 * N` digits.
#[must_use]
pub fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != 2 * N {
        return None;
    }
    let digit = |d: u8| (d as char).to_digit(16);
    let mut out = [0; N];
    for (byte, pair) in out.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = u8::try_from(digit(pair[0])? * 16 + digit(pair[1])?).ok()?;
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_and_read_again() {
        let exchange = Exchange {
            ts: 5,
            service: "a \"quoted\"\n service".into(),
            side: Side::Client,
            method: Method::from_token("PURGE"),
            path: Some("/caf\u{e9}/\\x".into()),
            query_keys: vec!["a".into(), "b".into()].into(),
            status: 418,
            request_body_bytes: Some(0),
            client: Peer::Unix("/run/x".into()),
            server: Peer::parse("[::ffff:127.0.0.1]:80"),
            tls_version: Some(TlsVersion::Tls13),
            tls_cipher: Cipher::from_number(0x1301),
            tls_alpn: Some(Alpn::Http11),
            client_certificate: Some(true),
            end: End::Upgraded,
            auth: Auth::Digest,
            marks: Marks::CHALLENGE.with(Marks::SUNSET),
            trace: Some(TraceContext { trace_id: [7; 16], parent_id: [9; 8], sampled: false }),
            ..Exchange::default()
        };
        let mut line = Vec::new();
        exchange.write_json(exchange.path.as_deref(), &mut line);
        let mut lines = json::Lines::default();
        for other in [true, false, false] {
            let mut again = Vec::new();
            let written = if other { Exchange::default() } else { exchange.clone() };
            lines.write(&written, written.path.as_deref(), &mut again);
            assert!(other || again == line, "{}", String::from_utf8_lossy(&again));
        }
        assert_eq!(exchange.server.to_string(), "127.0.0.1:80");
        assert_eq!(Exchange::from_json(&line).expect("readable"), exchange);
    }

    #[test]
    fn required_keys_are_required() {
        let error = Exchange::from_json(br#"{"ts":1,"service":"s","method":"GET","status":200}"#).expect_err("no path");
        assert!(error.to_string().contains("path"), "{error}");
    }
}
