//! What is known of a TLS handshake.

use super::{Cipher, TlsVersion};

/// Outcome of a TLS handshake, as far as it was seen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Handshake {
    /// Version, where its ServerHello was seen.
    pub version: Option<TlsVersion>,
    /// Cipher suite, likewise.
    pub cipher: Option<Cipher>,
    /// The protocol that ALPN chose.
    pub alpn: Option<Alpn>,
    /// Did the other end show a certificate? Servers always do.
    pub peer_certificate: Option<bool>,
}

/// The protocol that ALPN chose (RFC 7301; names by IANA, "TLS Application-Layer Protocol Negotiation Protocol IDs").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Alpn {
    /// None was chosen: not offered, or not answered.
    None,
    /// `http/1.0`
    Http10,
    /// `http/1.1`
    Http11,
    /// `h2`
    H2,
    /// Any other.
    Other,
}

impl Alpn {
    /// The protocol with this name; an empty one stands for none.
    #[must_use]
    pub fn from_wire(name: &[u8]) -> Self {
        match name {
            b"" => Self::None,
            b"http/1.0" => Self::Http10,
            b"http/1.1" => Self::Http11,
            b"h2" => Self::H2,
            _ => Self::Other,
        }
    }
}
