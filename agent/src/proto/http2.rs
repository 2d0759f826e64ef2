//! Frames of HTTP/2 (RFC 9113) and what their header blocks mean. The kernel side has found the frames; see
//! `agent-ebpf/src/http2.rs` for what it passes on of them.

use std::sync::{Arc, LazyLock};

use super::{
    credential::{Found, Place, Principals},
    hpack::{self, Decoder, Meaning, Scratch, Seen},
    http1,
    texts::Texts,
};
use crate::exchange::{MAX_USER_AGENT, Marks, Method, TraceContext};

/// Bytes of a frame's head.
pub const HEAD: usize = 9;

/// Longest `:protocol` that is told from others, bytes.
const MAX_PROTOCOL: usize = 32;

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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[expect(missing_docs, reason = "the fields' own names")]
pub enum Name {
    #[default]
    Other,
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
    Credential(Place),
}

/// How the bytes begin that are kept of a `:path`.
mod target {
    /// The rest is the path.
    pub const PATH: u8 = 0;
    /// The path's length (4 bytes), the path, names of the query's parameters with `&` between them.
    pub const QUERY: u8 = 1;
    /// The query's credentials, then as above.
    pub const CREDENTIAL: u8 = 2;
}

/// Table of one direction.
pub type Table = Decoder<Name>;

/// What the decoding of all blocks shares.
#[derive(Debug, Default)]
pub struct Shared {
    scratch: Scratch,
    paths: Texts,
    /// User agents and media types.
    texts: Texts,
}

/// A header block: what an exchange needs of it. Fields that cannot be known are left as they are by
/// default, and `unknown` is set.
#[derive(Debug, Default, PartialEq)]
pub struct Block {
    /// `:method`.
    pub method: Option<Method>,
    /// `:path` without the query.
    pub path: Option<Arc<str>>,
    /// Names of the query's parameters; `None` where there is no query.
    pub query_keys: Option<Arc<[Box<str>]>>,
    /// `:status`.
    pub status: Option<u16>,
    /// `:protocol` (RFC 8441) is `websocket`.
    pub websocket: bool,
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
    pub fn decode(
        table: &mut Table,
        principals: &Principals,
        shared: &mut Shared,
        block: &[u8],
    ) -> Result<Self, hpack::BadBlock> {
        let mut out = Self::default();
        let Shared { scratch, paths, texts } = shared;
        table.block(&Fields { principals }, scratch, block, |seen| match seen {
            Seen::Field(name, kept) => out.take(name, kept, paths, texts),
            Seen::Unknown => out.unknown = true,
        })?;
        Ok(out)
    }

    /// Takes a field: what [`Fields::keep`] kept of it.
    fn take(&mut self, name: Name, kept: &[u8], paths: &mut Texts, texts: &mut Texts) {
        match name {
            Name::Other => return,
            Name::OfRequest => {}
            Name::Method => {
                if let Ok(method) = std::str::from_utf8(kept) {
                    self.method = Some(Method::from_token(method));
                }
            }
            Name::Path => self.target(kept, paths),
            Name::Protocol => self.websocket = kept == b"websocket",
            Name::Status => {
                if let Ok(status) = kept.try_into() {
                    self.status = Some(u16::from_le_bytes(status));
                }
                return;
            }
            Name::Traceparent => {
                self.trace = kept.split_first_chunk().and_then(|(trace_id, rest)| {
                    let (parent_id, rest) = rest.split_first_chunk()?;
                    Some(TraceContext { trace_id: *trace_id, parent_id: *parent_id, sampled: rest == [1] })
                });
                return;
            }
            Name::UserAgent => {
                self.user_agent = Some(texts.get(kept, String::from_utf8_lossy));
                return;
            }
            Name::ContentType => {
                if !kept.is_empty() {
                    self.media = Some(texts.get(kept, String::from_utf8_lossy));
                }
                return;
            }
            Name::GrpcStatus => {
                if let Ok(status) = kept.try_into() {
                    self.grpc_status = Some(u32::from_le_bytes(status));
                }
                return;
            }
            Name::Mark(marks) => return self.marks.insert(marks),
            Name::Credential(_) => return self.credential.merge(&Found::read(kept).0),
        }
        self.of_request = true;
    }

    fn target(&mut self, kept: &[u8], paths: &mut Texts) {
        let Some((&form, mut rest)) = kept.split_first() else { return };
        let (mut path, mut keys) = (rest, &[][..]);
        if form != target::PATH {
            if form == target::CREDENTIAL {
                let found;
                (found, rest) = Found::read(rest);
                self.credential.merge(&found);
            }
            let Some((length, rest)) = rest.split_first_chunk() else { return };
            (path, keys) = rest.split_at((u32::from_le_bytes(*length) as usize).min(rest.len()));
        }
        self.query_keys = (!keys.is_empty()).then(|| http1::query_keys(keys));
        self.path = Some(paths.get(path, http1::lossless));
    }
}

/// The meaning of fields for exchanges.
pub struct Fields<'p> {
    /// Turns credentials into principals.
    pub principals: &'p Principals,
}

/// The static table, read once.
static FIXED: LazyLock<Vec<(Name, Box<[u8]>)>> = LazyLock::new(|| {
    let principals = Principals::default();
    let fields = Fields { principals: &principals };
    hpack::STATIC
        .iter()
        .map(|(name, value)| {
            let name = fields.name(name.as_bytes());
            let mut kept = Vec::new();
            fields.keep(name, value.as_bytes(), &mut kept);
            (name, kept.into())
        })
        .collect()
});

impl Meaning for Fields<'_> {
    type Name = Name;

    fn fixed(&self, index: usize) -> Option<(Name, &[u8])> {
        FIXED.get(index).map(|(name, kept)| (*name, &**kept))
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
            other => self.principals.place(other).map_or(Name::Other, Name::Credential),
        }
    }

    fn keep(&self, name: Name, value: &[u8], kept: &mut Vec<u8>) {
        let number = || std::str::from_utf8(value).ok().and_then(|v| v.parse::<u32>().ok());
        match name {
            Name::Method => kept.extend_from_slice(value),
            Name::Path => self.keep_target(value, kept),
            Name::Protocol => kept.extend_from_slice(&value[..value.len().min(MAX_PROTOCOL)]),
            Name::Status => {
                kept.extend(number().and_then(|n| u16::try_from(n).ok()).iter().flat_map(|n| n.to_le_bytes()))
            }
            Name::Traceparent => {
                if let Some(trace) = http1::traceparent(value) {
                    kept.extend(trace.trace_id);
                    kept.extend(trace.parent_id);
                    kept.push(trace.sampled.into());
                }
            }
            Name::UserAgent => kept.extend_from_slice(&value[..value.len().min(MAX_USER_AGENT)]),
            Name::ContentType => kept.extend_from_slice(http1::media_type_of(value).unwrap_or_default().as_bytes()),
            // A status that is none is an unknown error (gRPC over HTTP/2: Responses).
            Name::GrpcStatus => kept.extend(number().unwrap_or(2).to_le_bytes()),
            Name::Credential(place) => {
                let mut reader = self.principals.reader();
                reader.value(place, value);
                reader.found().write(kept);
            }
            Name::Other | Name::OfRequest | Name::Mark(_) => {}
        }
    }

    fn is_secret(&self, name: Name, value: &[u8]) -> bool {
        match name {
            Name::Credential(_) => true,
            Name::Path => memchr::memchr(b'?', value).is_some(),
            _ => false,
        }
    }
}

impl Fields<'_> {
    /// See [`target`].
    fn keep_target(&self, value: &[u8], kept: &mut Vec<u8>) {
        let (path, query) = http1::split_target(value);
        if query.is_empty() {
            kept.push(target::PATH);
            return kept.extend_from_slice(path);
        }
        let mut reader = self.principals.reader();
        http1::query_credentials(query, &mut reader);
        let found = reader.found();
        kept.push(if found == Found::default() { target::QUERY } else { target::CREDENTIAL });
        found.write(kept);
        kept.extend(u32::try_from(path.len()).unwrap_or(u32::MAX).to_le_bytes());
        kept.extend_from_slice(path);
        for (i, name) in http1::query_names(query).enumerate() {
            if i > 0 {
                kept.push(b'&');
            }
            kept.extend_from_slice(name);
        }
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
        let mut shared = Shared::default();
        let first = Block::decode(&mut table, &principals, &mut shared, &block).expect("valid");
        assert_eq!(first.method, Some(Method::Get));
        assert_eq!(first.path.as_deref(), Some("/"));
        assert!(first.of_request && !first.unknown);
        // The same again, out of the table.
        let again =
            Block::decode(&mut table, &principals, &mut shared, &[0x82, 0x86, 0x84, 0xbf, 0xbe]).expect("valid");
        assert_eq!(again, first);
        let credential = again.credential.credential();
        assert_eq!(credential.auth, Auth::Bearer);
        assert_eq!(credential.principal.map(|p| p.len()), Some(16));
        assert!(!format!("{table:?}").contains("abc"));
    }

    #[test]
    fn a_default_table_full_of_short_paths_is_known_whole() {
        let (mut table, principals) = (Table::new(true), Principals::default());
        let mut shared = Shared::default();
        // 40 bytes each as the protocol counts.
        let path = |i: u8| format!("/{i:02x}");
        for i in 0..102 {
            let block = [&[0x82, 0x44, 3][..], path(i).as_bytes()].concat();
            Block::decode(&mut table, &principals, &mut shared, &block).expect("valid");
        }
        for i in 0..102 {
            // The newest has index 62; from 127 on there is a second byte (RFC 7541 section 5.1).
            let index = 62 + 101 - i;
            let block = if index < 127 { vec![0x82, 0x80 | index] } else { vec![0x82, 0xff, index - 127] };
            let block = Block::decode(&mut table, &principals, &mut shared, &block).expect("valid");
            assert_eq!(block.path.as_deref(), Some(&*path(i)), "entry {i}");
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
            let (principals, mut shared) = (Principals::default(), Shared::default());
            for block in blocks {
                let _ = Block::decode(&mut table, &principals, &mut shared, &block);
                proptest::prop_assert!(table.memory() <= hpack::MAX_TABLE);
            }
        }
    }
}
