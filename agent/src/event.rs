//! Wire records -> [`Event`]: the only reader of the ABI structs. A record that is cut off or of an
//! unknown kind is an error for the caller to count, never a panic.

use std::{
    mem::size_of,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use agent_ebpf::{Close, Flag, Kind, Open, Record, Tier};

use crate::exchange::{Alpn, Attribution, Cipher, Handshake, Peer, TlsVersion};

/// One record of the kernel side.
#[derive(Debug)]
pub struct Event<'a> {
    /// Connection.
    pub conn: u64,
    /// Monotonic time, ns.
    pub ts: u64,
    /// Process that made the call; 0 where none did.
    pub pid: u32,
    /// What happened.
    pub what: What<'a>,
}

/// What a record says.
#[derive(Debug)]
pub enum What<'a> {
    /// A connection speaks HTTP.
    Open(Box<Opened>),
    /// Head bytes.
    Head(Head<'a>),
    /// A message ended.
    End(Message),
    /// Frames of HTTP/2.
    Frames(Frames<'a>),
    /// The connection is over.
    Close(Closed),
    /// The head under way in a direction was none.
    Abort {
        /// Sent by this end.
        sent: bool,
    },
    /// The other end of a unix connection sends no more.
    Eof,
    /// A TLS connection is over: bytes of ciphertext.
    Sealed {
        /// A library that is read carried it.
        read: bool,
        /// By this end.
        received: u64,
        /// By this end.
        sent: u64,
    },
}

/// Addresses of a connection.
#[derive(Debug, Clone, PartialEq)]
pub struct Opened {
    /// Was there before the agent.
    pub late: bool,
    /// This end.
    pub local: Peer,
    /// The other.
    pub remote: Peer,
    /// Identity of the socket and of its peer, for unix sockets.
    pub sock: u64,
    /// See `sock`.
    pub peer_sock: u64,
    /// Name of the process.
    pub comm: String,
    /// How the socket of a TLS session was found; `None` for plaintext.
    pub tls: Option<Attribution>,
    /// What is known of its handshake.
    pub handshake: Handshake,
}

/// A message, or the part of it that was seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    /// A response, else a request.
    pub response: bool,
    /// Sent by this end, else received.
    pub sent: bool,
    /// Number in its direction.
    pub index: u32,
    /// Its first byte, monotonic ns.
    pub first_ts: u64,
    /// Bytes on the connection.
    pub bytes: u64,
    /// Content bytes.
    pub body: u64,
    /// Bytes were missed.
    pub lost: bool,
}

/// Head bytes of a message.
#[derive(Debug)]
pub struct Head<'a> {
    /// The message. Its sizes are final when `done`.
    pub message: Message,
    /// These are its first bytes.
    pub first: bool,
    /// These are its last.
    pub last: bool,
    /// The whole message ended with this record.
    pub done: bool,
    /// The head is longer than is passed on.
    pub cut: bool,
    /// The connection leaves HTTP.
    pub upgrade: bool,
    /// The bytes.
    pub bytes: &'a [u8],
}

/// Frames of HTTP/2, as far as the kernel side passes them on (see `agent-ebpf/src/http2.rs`).
#[derive(Debug, Clone, Copy)]
pub struct Frames<'a> {
    /// Sent by this end, else received.
    pub sent: bool,
    /// Number of the record in its direction, without gaps.
    pub index: u32,
    /// The record begins with a frame; else inside of a payload.
    pub boundary: bool,
    /// Bytes of that payload that are still to come, those of this record included.
    pub remaining: u64,
    /// The preface of the client came just before.
    pub preface: bool,
    /// Bytes were missed before.
    pub lost: bool,
    /// Answers that ended in records of this direction that the kernel side had to drop, since its last one. They
    /// are counted there.
    pub dropped: u32,
    /// First byte of the first frame, monotonic ns.
    pub first_ts: u64,
    /// The frames.
    pub bytes: &'a [u8],
}

/// What was under way when a connection ended: [0] received, [1] sent.
#[derive(Debug, Clone, Copy)]
pub struct Closed {
    /// By a reset.
    pub reset: bool,
    /// Bytes of the message under way or last seen.
    pub bytes: [u64; 2],
    /// Content bytes of it.
    pub body: [u64; 2],
    /// Time of the last byte.
    pub last_ts: [u64; 2],
    /// It ends properly with the connection.
    pub until_close: [bool; 2],
    /// One is under way.
    pub unfinished: [bool; 2],
    /// Responses that the kernel side saw.
    pub responses: u32,
    /// HTTP/2: see [`Frames::dropped`], both directions.
    pub dropped: u32,
    /// HTTP/2: records of each direction; `bytes` and `body` are stream and bytes of the DATA frame under way.
    pub records: [u32; 2],
}

/// A record that cannot be read.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BadRecord {
    /// Shorter than it says.
    #[error("the record is cut off")]
    Cut,
    /// Of a kind that is not known.
    #[error("a record of unknown kind {0}")]
    Kind(u8),
}

/// Reads one record.
///
/// # Errors
/// [`BadRecord`], when it is cut off or of an unknown kind.
pub fn parse(bytes: &[u8]) -> Result<Event<'_>, BadRecord> {
    let (record, data): (Record, _) = take(bytes)?;
    let data = data.get(..record.len as usize).ok_or(BadRecord::Cut)?;
    let flag = |f: u16| record.flags & f != 0;
    let message = Message {
        response: flag(Flag::RESPONSE),
        sent: flag(Flag::SENT),
        index: record.index,
        first_ts: record.first_ts,
        bytes: record.message,
        body: record.body,
        lost: flag(Flag::LOST),
    };
    let what = match record.kind {
        Kind::HEAD => What::Head(Head {
            message,
            first: flag(Flag::FIRST),
            last: flag(Flag::LAST),
            done: flag(Flag::DONE),
            cut: flag(Flag::CUT),
            upgrade: flag(Flag::UPGRADE),
            bytes: data.get(usize::from(record.skip)..).unwrap_or_default(),
        }),
        Kind::END => What::End(message),
        Kind::OPEN => {
            let (open, hello) = take::<Open>(data)?;
            What::Open(Box::new(opened(&open, flag(Flag::LATE), hello)))
        }
        Kind::CLOSE => {
            let close = take::<Close>(data)?.0;
            What::Close(Closed {
                reset: flag(Flag::RESET),
                bytes: close.message,
                body: close.body,
                last_ts: close.last_ts,
                until_close: close.until_close.map(|b| b != 0),
                unfinished: close.unfinished.map(|b| b != 0),
                responses: close.responses,
                dropped: u32::try_from(record.body).unwrap_or(u32::MAX),
                records: [close.requests, close.responses],
            })
        }
        Kind::FRAMES => What::Frames(Frames {
            sent: message.sent,
            index: record.index,
            boundary: flag(Flag::FIRST),
            remaining: record.body,
            preface: flag(Flag::PREFACE),
            lost: message.lost,
            dropped: u32::try_from(record.message).unwrap_or(u32::MAX),
            first_ts: record.first_ts,
            bytes: data,
        }),
        Kind::ABORT => What::Abort { sent: message.sent },
        Kind::EOF => What::Eof,
        Kind::SEALED => What::Sealed { read: flag(Flag::DONE), received: record.message, sent: record.body },
        other => return Err(BadRecord::Kind(other)),
    };
    Ok(Event { conn: record.conn, ts: record.ts, pid: record.pid, what })
}

/// Types that any bytes are a value of.
trait Plain: Copy {}
impl Plain for Record {}
impl Plain for Open {}
impl Plain for Close {}

fn take<T: Plain>(bytes: &[u8]) -> Result<(T, &[u8]), BadRecord> {
    let (head, rest) = bytes.split_at_checked(size_of::<T>()).ok_or(BadRecord::Cut)?;
    // SAFETY: `head` has the size of T, and any bytes are a T (integers, repr(C), no padding).
    Ok((unsafe { head.as_ptr().cast::<T>().read_unaligned() }, rest))
}

fn opened(open: &Open, late: bool, hello: &[u8]) -> Opened {
    let text = |bytes: &[u8]| {
        let end = memchr::memchr(0, bytes).unwrap_or(bytes.len());
        String::from_utf8_lossy(&bytes[..end]).into_owned()
    };
    let (local, remote) = match i32::from(open.family) {
        libc::AF_UNIX => {
            // path_len counts the two bytes of the family as well.
            let len = (open.path_len as usize).saturating_sub(2).min(open.path.len());
            let path = match open.path[..len].split_first() {
                Some((0, name)) => format!("@{}", text(name)),
                _ => text(&open.path[..len]),
            };
            let peer = Peer::Unix(path.into());
            (peer.clone(), peer)
        }
        libc::AF_INET6 => (
            ip(IpAddr::V6(Ipv6Addr::from(open.local)), open.local_port),
            ip(IpAddr::V6(Ipv6Addr::from(open.remote)), open.remote_port),
        ),
        // A TLS session whose socket was not found.
        libc::AF_UNSPEC => (Peer::Unknown, Peer::Unknown),
        _ => {
            let v4 = |a: [u8; 16]| IpAddr::V4(Ipv4Addr::new(a[0], a[1], a[2], a[3]));
            (ip(v4(open.local), open.local_port), ip(v4(open.remote), open.remote_port))
        }
    };
    let tls = match open.tls {
        Tier::PLAINTEXT => None,
        Tier::NESTED => Some(Attribution::Nested),
        Tier::CIPHERTEXT => Some(Attribution::Ciphertext),
        _ => Some(Attribution::None),
    };
    let handshake = tls.map_or_else(Handshake::default, |_| handshake(open, hello));
    let (sock, peer_sock) = (open.sock, open.peer_sock);
    Opened { late, local, remote, sock, peer_sock, comm: text(&open.comm), tls, handshake }
}

fn handshake(open: &Open, hello: &[u8]) -> Handshake {
    let said = &open.session;
    let name = said.alpn.get(..usize::from(said.alpn_len));
    Handshake {
        version: tls_version(hello),
        cipher: tls_cipher(hello),
        // A name that is longer than what was kept is none of those that are told apart.
        alpn: if said.alpn_known == 0 { tls_alpn(hello) } else { Some(name.map_or(Alpn::Other, Alpn::from_wire)) },
        peer_certificate: (said.certificate != 0).then_some(said.certificate == 2),
    }
}

/// The extensions of a ServerHello, as far as they were seen: kind and content.
fn extensions(hello: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    // Type, length, version, random; then the session's name, cipher, compression, extensions.
    let start = hello.get(38).map_or(usize::MAX, |session| 39 + usize::from(*session) + 2 + 1 + 2);
    let mut rest = hello.get(start..).unwrap_or_default();
    std::iter::from_fn(move || {
        let (kind, behind) = rest.split_first_chunk::<2>()?;
        let (len, behind) = behind.split_first_chunk::<2>()?;
        let (content, behind) = behind.split_at(usize::from(u16::from_be_bytes(*len)).min(behind.len()));
        rest = behind;
        Some((u16::from_be_bytes(*kind), content))
    })
}

/// The protocol that a ServerHello chose (RFC 7301 section 3.1). From TLS 1.3 on that is encrypted (RFC 8446 section 4.2).
fn tls_alpn(hello: &[u8]) -> Option<Alpn> {
    const APPLICATION_LAYER_PROTOCOL_NEGOTIATION: u16 = 16;
    let (_, list) = extensions(hello).find(|(kind, _)| *kind == APPLICATION_LAYER_PROTOCOL_NEGOTIATION)?;
    // A list of one name: length of the list, length of the name, the name.
    let (len, name) = list.get(2..)?.split_first()?;
    name.get(..usize::from(*len)).map(Alpn::from_wire)
}

/// The version that a ServerHello chose (RFC 8446 section 4.1.3, RFC 5246 section 7.4.1.3). It may be cut off:
/// a key share is in it from 1.3 on alone, and comes before what is cut.
fn tls_version(hello: &[u8]) -> Option<TlsVersion> {
    const SUPPORTED_VERSIONS: u16 = 43;
    const KEY_SHARE: u16 = 51;
    let word = |bytes: &[u8], at: usize| Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
    let name = |version: u16| match version {
        0x0301 => Some(TlsVersion::Tls10),
        0x0302 => Some(TlsVersion::Tls11),
        0x0303 => Some(TlsVersion::Tls12),
        0x0304 => Some(TlsVersion::Tls13),
        _ => None,
    };
    // Cut off before the extensions, what it says first may be another's.
    hello.get(38)?;
    let mut chosen = name(word(hello, 4)?);
    for (kind, content) in extensions(hello) {
        match kind {
            SUPPORTED_VERSIONS => return word(content, 0).and_then(name),
            KEY_SHARE => chosen = Some(TlsVersion::Tls13),
            _ => {}
        }
    }
    chosen
}

/// The cipher suite that a ServerHello chose: two bytes behind the session's name (as above).
fn tls_cipher(hello: &[u8]) -> Option<Cipher> {
    let at = 39 + usize::from(*hello.get(38)?);
    Cipher::from_number(u16::from_be_bytes(hello.get(at..at + 2)?.try_into().ok()?))
}

fn ip(address: IpAddr, port: u16) -> Peer {
    Peer::Ip(SocketAddr::new(address.to_canonical(), port))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes<T: Plain>(value: &T) -> Vec<u8> {
        // SAFETY: a Plain value is its bytes.
        unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast::<u8>(), size_of::<T>()) }.to_vec()
    }

    #[test]
    fn a_head_without_its_repeated_bytes() {
        let record =
            Record { kind: Kind::HEAD, skip: 2, flags: Flag::LAST | Flag::SENT, len: 5, conn: 9, ..Record::default() };
        let mut wire = bytes(&record);
        wire.extend_from_slice(b"abcde-not-mine");
        let event = parse(&wire).expect("good");
        let What::Head(head) = event.what else { panic!("a head") };
        assert_eq!((head.bytes, head.last, head.first, head.message.sent), (&b"cde"[..], true, false, true));
        wire.truncate(60);
        assert_eq!(parse(&wire).err(), Some(BadRecord::Cut));
    }

    #[test]
    fn the_version_of_a_server_hello() {
        let mut hello = vec![2, 0, 0, 76, 3, 3];
        hello.extend_from_slice(&[7; 32]);
        hello.push(0);
        hello.extend_from_slice(&[0xc0, 0x2f, 0, 0, 0]);
        assert_eq!(tls_version(&hello), Some(TlsVersion::Tls12));
        hello.extend_from_slice(&[0, 43, 0, 2, 3, 4]);
        assert_eq!(tls_version(&hello), Some(TlsVersion::Tls13));
        assert_eq!(tls_version(&hello[..30]), None);
        assert_eq!(tls_cipher(&hello).map(Cipher::name), Some("TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256"));
        assert_eq!(tls_alpn(&hello), None);
        hello.extend_from_slice(&[0, 16, 0, 5, 0, 3, 2, b'h', b'2']);
        assert_eq!(tls_alpn(&hello), Some(Alpn::H2));
        for cut in 0..hello.len() {
            let _ = (tls_version(&hello[..cut]), tls_cipher(&hello[..cut]), tls_alpn(&hello[..cut]));
        }
    }

    #[test]
    fn unknown_kinds_are_said() {
        assert_eq!(parse(&bytes(&Record { kind: 77, ..Record::default() })).err(), Some(BadRecord::Kind(77)));
    }

    proptest::proptest! {
        #[test]
        fn never_panics(data in proptest::collection::vec(proptest::num::u8::ANY, 0..400), kind in 0u8..9) {
            let mut data = data;
            if let Some(first) = data.first_mut() { *first = kind; }
            let _ = parse(&data);
        }
    }
}
