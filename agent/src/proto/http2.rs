//! Frames of HTTP/2 (RFC 9113) and what their header blocks mean. The kernel side has found the frames; see
//! `agent-ebpf/src/http2.rs` for what it passes on of them.

use std::sync::{Arc, LazyLock};

use super::{
    credential::{Found, Principals},
    hpack::{self, Decoder, Meaning, Seen},
    http1,
};
use crate::exchange::{MAX_USER_AGENT, Marks, Method, TraceContext};

/// Bytes of a frame's head.
pub const HEAD: usize = 9;

/// Types of frames (RFC 9113 section 6).
pub mod kind {
    #![expect(missing_docs, reason = "the frames' own names")]
    pub const DATA: u8 = 0;
    pub const HEADERS: u8 = 1;
    pub const RST_STREAM: u8 = 3;
    pub const PUSH_PROMISE: u8 = 5;
    pub const GOAWAY: u8 = 7;
    pub const CONTINUATION: u8 = 9;
}

/// Flags of frames.
pub mod flag {
    #![expect(missing_docs, reason = "the flags' own names")]
    pub const END_STREAM: u8 = 1;
    pub const END_HEADERS: u8 = 4;
    pub const PADDED: u8 = 8;
    pub const PRIORITY: u8 = 0x20;
}

/// The head of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHead {
    /// Bytes of payload.
    pub length: u32,
    /// Type.
    pub kind: u8,
    /// Flags.
    pub flags: u8,
    /// Stream, 0 for the connection.
    pub stream: u32,
}

impl FrameHead {
    /// Reads the nine bytes (RFC 9113 section 4.1).
    #[must_use]
    pub fn parse(bytes: &[u8; HEAD]) -> Self {
        let [a, b, c, kind, flags, stream @ ..] = *bytes;
        Self { length: u32::from_be_bytes([0, a, b, c]), kind, flags, stream: u32::from_be_bytes(stream) & 0x7fff_ffff }
    }

    /// Is the flag set?
    #[must_use]
    pub fn has(self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    /// Bytes on the connection.
    #[must_use]
    pub fn size(self) -> u64 {
        u64::from(self.length) + HEAD as u64
    }
}

/// The part of a header block in the payload of HEADERS or PUSH_PROMISE, padding and priority left out, and
/// the promised stream. `None` when the padding is longer than the payload.
#[must_use]
pub fn fragment(head: FrameHead, mut payload: &[u8]) -> Option<(&[u8], u32)> {
    let mut padding = 0;
    if head.has(flag::PADDED) {
        let (&first, rest) = payload.split_first()?;
        padding = usize::from(first);
        payload = rest;
    }
    let mut promised = 0;
    if head.kind == kind::PUSH_PROMISE {
        let (id, rest) = payload.split_first_chunk::<4>()?;
        promised = u32::from_be_bytes(*id) & 0x7fff_ffff;
        payload = rest;
    } else if head.has(flag::PRIORITY) {
        payload = payload.get(5..)?;
    }
    Some((payload.get(..payload.len().checked_sub(padding)?)?, promised))
}

/// Names of fields, as far as an exchange needs them.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields' own names")]
pub enum Name {
    Method,
    Path,
    Status,
    Protocol,
    /// `:scheme` and `:authority`: only requests have them.
    OfRequest,
    Traceparent,
    UserAgent,
    ContentType,
    GrpcStatus,
    /// One that says something by being there.
    Mark(Marks),
    /// One that may carry a credential.
    Credential(Arc<str>),
    Other,
}

/// What is kept of a field's value.
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "see `Name`")]
pub enum Value {
    None,
    Method(Method),
    Target(Arc<Target>),
    Status(u16),
    Text(Arc<str>),
    Trace(Option<TraceContext>),
    GrpcStatus(u32),
    Credential(Found),
}

/// A `:path`.
#[derive(Debug, Default, PartialEq)]
pub struct Target {
    /// Without the query.
    pub path: Arc<str>,
    /// Names of the query's parameters.
    pub query_keys: Arc<[Box<str>]>,
    /// Credentials in the query.
    pub credential: Found,
}

/// Table of one direction.
pub type Table = Decoder<Name, Value>;

/// A header block: what an exchange needs of it. Fields that cannot be known are left as they are by
/// default, and `unknown` is set.
#[derive(Debug, Default, PartialEq)]
pub struct Block {
    /// `:method`.
    pub method: Option<Method>,
    /// `:path`.
    pub target: Option<Arc<Target>>,
    /// `:status`.
    pub status: Option<u16>,
    /// `:protocol` (RFC 8441).
    pub protocol: Option<Arc<str>>,
    /// Some field that only requests have was there.
    pub of_request: bool,
    /// Credentials.
    pub credential: Found,
    /// `traceparent`.
    pub trace: Option<TraceContext>,
    /// `user-agent`.
    pub user_agent: Option<Arc<str>>,
    /// Media type without parameters.
    pub media: Option<Arc<str>>,
    /// `grpc-status`.
    pub grpc_status: Option<u32>,
    /// What else detectors ask for.
    pub marks: Marks,
    /// Some field is older than the agent.
    pub unknown: bool,
}

impl Block {
    /// Decodes a block.
    ///
    /// # Errors
    /// It is not valid HPACK; what was read before the fault is lost with it.
    pub fn decode(table: &mut Table, principals: &Principals, block: &[u8]) -> Result<Self, hpack::BadBlock> {
        let mut out = Self::default();
        table.block(&Fields { principals }, block, |seen| match seen {
            Seen::Field(name, value) => out.take(name, value),
            Seen::Unknown => out.unknown = true,
        })?;
        Ok(out)
    }

    fn take(&mut self, name: &Name, value: &Value) {
        match (name, value) {
            (Name::Method, Value::Method(method)) => self.method = Some(method.clone()),
            (Name::Path, Value::Target(target)) => {
                self.credential.merge(&target.credential);
                self.target = Some(target.clone());
            }
            (Name::Status, Value::Status(status)) => self.status = Some(*status),
            (Name::Protocol, Value::Text(text)) => self.protocol = Some(text.clone()),
            (Name::Traceparent, Value::Trace(trace)) => self.trace = *trace,
            (Name::UserAgent, Value::Text(text)) => self.user_agent = Some(text.clone()),
            (Name::ContentType, Value::Text(text)) => self.media = Some(text.clone()),
            (Name::GrpcStatus, Value::GrpcStatus(status)) => self.grpc_status = Some(*status),
            (Name::Mark(marks), _) => self.marks.insert(*marks),
            (Name::Credential(_), Value::Credential(found)) => self.credential.merge(found),
            _ => {}
        }
        self.of_request |= matches!(name, Name::Method | Name::Path | Name::Protocol | Name::OfRequest);
    }
}

/// The meaning of fields for exchanges.
pub struct Fields<'p> {
    /// Turns credentials into principals.
    pub principals: &'p Principals,
}

/// The static table, read once.
static FIXED: LazyLock<Vec<(Name, Value)>> = LazyLock::new(|| {
    let principals = Principals::default();
    let fields = Fields { principals: &principals };
    hpack::STATIC
        .iter()
        .map(|(name, value)| {
            let name = fields.name(name.as_bytes());
            let value = fields.value(&name, value.as_bytes());
            (name, value)
        })
        .collect()
});

impl Meaning for Fields<'_> {
    type Name = Name;
    type Value = Value;

    fn fixed(&self, index: usize) -> Option<&(Name, Value)> {
        FIXED.get(index)
    }

    fn name(&self, name: &[u8]) -> Name {
        match name {
            b":method" => Name::Method,
            b":path" => Name::Path,
            b":status" => Name::Status,
            b":protocol" => Name::Protocol,
            b":scheme" | b":authority" => Name::OfRequest,
            b"traceparent" => Name::Traceparent,
            b"user-agent" => Name::UserAgent,
            b"content-type" => Name::ContentType,
            b"grpc-status" => Name::GrpcStatus,
            b"x-http-method-override" | b"x-method-override" | b"x-http-method" => Name::Mark(Marks::METHOD_OVERRIDE),
            b"www-authenticate" => Name::Mark(Marks::CHALLENGE),
            b"deprecation" => Name::Mark(Marks::DEPRECATED),
            b"sunset" => Name::Mark(Marks::SUNSET),
            other if self.principals.is_credential(other) => {
                Name::Credential(String::from_utf8_lossy(other).as_ref().into())
            }
            _ => Name::Other,
        }
    }

    fn value(&self, name: &Name, value: &[u8]) -> Value {
        let number = || std::str::from_utf8(value).ok().and_then(|v| v.parse::<u32>().ok());
        match name {
            Name::Method => std::str::from_utf8(value).map_or(Value::None, |m| Value::Method(Method::from_token(m))),
            Name::Path => Value::Target(Arc::new(self.target(value))),
            Name::Status => number().and_then(|n| u16::try_from(n).ok()).map_or(Value::None, Value::Status),
            Name::Protocol if value.len() <= 32 => Value::Text(String::from_utf8_lossy(value).as_ref().into()),
            Name::Traceparent => Value::Trace(http1::traceparent(value)),
            Name::UserAgent => {
                let end = value.len().min(MAX_USER_AGENT);
                Value::Text(String::from_utf8_lossy(&value[..end]).as_ref().into())
            }
            Name::ContentType => http1::media_type(value).map_or(Value::None, Value::Text),
            // A status that is none is an unknown error (gRPC over HTTP/2: Responses).
            Name::GrpcStatus => Value::GrpcStatus(number().unwrap_or(2)),
            Name::Credential(name) => {
                let mut reader = self.principals.reader();
                reader.field(name.as_bytes(), value);
                Value::Credential(reader.found())
            }
            _ => Value::None,
        }
    }

    fn weight(&self, value: &Value) -> usize {
        match value {
            Value::Text(text) => text.len() + 16,
            Value::Target(target) => {
                target.path.len() + target.query_keys.iter().map(|k| k.len() + 16).sum::<usize>() + size_of::<Target>()
            }
            Value::Method(Method::Other(token)) => token.len(),
            _ => 0,
        }
    }

    fn is_secret(&self, name: &Name, value: &[u8]) -> bool {
        match name {
            Name::Credential(_) => true,
            Name::Path => memchr::memchr(b'?', value).is_some(),
            _ => false,
        }
    }
}

impl Fields<'_> {
    fn target(&self, value: &[u8]) -> Target {
        let (path, query) = http1::split_target(value);
        let mut reader = self.principals.reader();
        if !query.is_empty() {
            http1::query_credentials(query, &mut reader);
        }
        Target { path: http1::text(path), query_keys: http1::query_keys(query), credential: reader.found() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exchange::Auth;

    #[test]
    fn a_request_of_the_rfc_and_a_credential() {
        // RFC 7541 C.4.1, then `authorization: Bearer abc` as a literal.
        let mut block = vec![0x82, 0x86, 0x84, 0x41, 0x8c, 0xf1, 0xe3, 0xc2, 0xe5, 0xf2, 0x3a, 0x6b, 0xa0, 0xab];
        block.extend([0x90, 0xf4, 0xff, 0x57, 10]);
        block.extend(b"Bearer abc");
        let mut table = Table::new(true);
        let principals = Principals::new(b"0123456789abcdef", &[], &[]).expect("a key");
        let first = Block::decode(&mut table, &principals, &block).expect("valid");
        assert_eq!(first.method, Some(Method::Get));
        assert_eq!(first.target.as_deref().map(|t| &*t.path), Some("/"));
        assert!(first.of_request && !first.unknown);
        // The same again, out of the table.
        let again = Block::decode(&mut table, &principals, &[0x82, 0x86, 0x84, 0xbf, 0xbe]).expect("valid");
        assert_eq!(again, first);
        let credential = again.credential.credential();
        assert_eq!(credential.auth, Auth::Bearer);
        assert_eq!(credential.principal.map(|p| p.len()), Some(16));
        assert!(!format!("{table:?}").contains("abc"));
    }

    #[test]
    fn a_default_table_full_of_short_paths_is_known_whole() {
        let (mut table, principals) = (Table::new(true), Principals::default());
        // 40 bytes each as the protocol counts.
        let path = |i: u8| format!("/{i:02x}");
        for i in 0..102 {
            let block = [&[0x82, 0x44, 3][..], path(i).as_bytes()].concat();
            Block::decode(&mut table, &principals, &block).expect("valid");
        }
        for i in 0..102 {
            // The newest has index 62; from 127 on there is a second byte (RFC 7541 section 5.1).
            let index = 62 + 101 - i;
            let block = if index < 127 { vec![0x82, 0x80 | index] } else { vec![0x82, 0xff, index - 127] };
            let block = Block::decode(&mut table, &principals, &block).expect("valid");
            assert_eq!(block.target.as_deref().map(|t| &*t.path), Some(&*path(i)), "entry {i}");
        }
    }

    #[test]
    fn padding_and_priority_are_left_out() {
        let head = |kind, flags| FrameHead { length: 0, kind, flags, stream: 1 };
        assert_eq!(fragment(head(kind::HEADERS, 0x28), &[2, 0, 0, 0, 0, 9, 0x82, 0, 0]), Some((&[0x82][..], 0)));
        assert_eq!(fragment(head(kind::PUSH_PROMISE, 8), &[1, 0, 0, 0, 4, 0x82, 0]), Some((&[0x82][..], 4)));
        assert_eq!(fragment(head(kind::HEADERS, 8), &[3, 0x82, 0]), None);
        assert_eq!(fragment(head(kind::HEADERS, 0x20), &[0]), None);
    }

    proptest::proptest! {
        #[test]
        fn never_panics(blocks in proptest::collection::vec(proptest::collection::vec(proptest::num::u8::ANY, 0..200), 0..8)) {
            let mut table = Table::new(false);
            let principals = Principals::default();
            for block in blocks {
                let _ = Block::decode(&mut table, &principals, &block);
                proptest::prop_assert!(table.memory() <= hpack::MAX_TABLE);
            }
        }
    }
}
