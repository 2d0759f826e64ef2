//! Credentials -> who asks, without keeping what they showed: header fields and query parameters go in,
//! a scheme and a keyed hash come out. One [`Reader`] per request; the decoders of every HTTP version
//! hand it their (name, value) pairs.
//!
//! A principal is HMAC-SHA-256(key, kind ‖ identity) cut to 64 bits, written as 16 hexadecimal digits.
//! When a request carries several credentials the one that names its holder best wins: the certificate of
//! the connection, then `Authorization` (of a JWT its issuer and subject, of Basic and Digest the user
//! name), then an API key, then a client certificate that a proxy vouches for
//! (`X-Forwarded-Client-Cert`), then a session cookie. A JWT is not verified here: whoever counts
//! principals counts a refused request as nobody's. Negotiate and NTLM tokens change with every
//! connection, so they have a scheme but no principal.
//!
//! What was found in a value is remembered under a keyed hash of it (`memo`).
//!
//! **Invariant**: no credential outlives the call that brought it. What is decoded on the way is wiped,
//! and so are the states of the hash (`zeroize` of `hmac` and `sha2`).

use std::{
    borrow::Cow,
    fmt,
    io::{self, Read as _, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, bail};
use base64::{
    Engine as _,
    engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig},
};
use hmac::{Hmac, KeyInit as _, Mac as _};
use serde::Deserialize;
use sha2::Sha256;
use zeroize::Zeroizing;

use super::memo::Memo;
use crate::exchange::Auth;

/// Names the key of principals in the environment, as text of at least [`MIN_KEY`] bytes.
pub const KEY_VARIABLE: &str = "APISCOPE_PRINCIPAL_KEY";
/// Shortest key, bytes.
pub const MIN_KEY: usize = 16;
/// Longest key file that is read, bytes.
const MAX_KEY: u64 = 4096;
/// Longest part of a JWT or a Basic credential that is decoded, bytes of base64; a longer one is hashed whole.
const MAX_DECODED: usize = 4096;
/// Shortest value of a cookie of unknown purpose that may name somebody, bytes.
const MIN_TOKEN: usize = 16;

/// Header fields that carry API keys, lower case. More are configured by `identity.api_key_headers`.
const API_KEY_HEADERS: [&str; 11] = [
    "x-api-key",
    "api-key",
    "apikey",
    "x-apikey",
    "x-auth-token",
    "x-access-token",
    "x-goog-api-key",
    "x-functions-key",
    "x-vault-token",
    "private-token",
    "ocp-apim-subscription-key",
];
/// Query parameters that carry credentials, lower case. More are configured by `identity.api_key_query`.
pub const CREDENTIAL_QUERY: [&str; 12] = [
    "api_key",
    "apikey",
    "api-key",
    "access_token",
    "auth_token",
    "token",
    "subscription-key",
    "jwt",
    "x-amz-credential",
    "x-goog-credential",
    "sig",
    "key",
];
/// Parts of the names of cookies that carry sessions.
const SESSION_COOKIE: [&str; 8] = ["sess", "sid", "auth", "token", "jwt", "login", "remember", "identity"];
/// Beginnings of the names of cookies that say nothing about who is allowed what: analytics, consent,
/// forgery protection, display.
const OTHER_COOKIE: [&str; 27] = [
    "_ga",
    "_gid",
    "_gat",
    "_gcl",
    "__utm",
    "_fb",
    "_hj",
    "_pk",
    "_uet",
    "_cl",
    "_dd",
    "_tt",
    "_pin",
    "ajs_",
    "amp_",
    "amplitude",
    "mp_",
    "optimizely",
    "intercom-id",
    "cookie",
    "consent",
    "csrf",
    "xsrf",
    "_csrf",
    "lang",
    "locale",
    "theme",
];

/// Turns credentials into principals. Cheap to clone.
#[derive(Clone, Default)]
pub struct Principals {
    mac: Option<Hmac<Sha256>>,
    memo: Option<Memo<Found>>,
    headers: Vec<Box<str>>,
    query: Vec<Box<str>>,
}

/// Fields that may carry a credential.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields' own names")]
pub enum Place {
    Authorization,
    Cookie,
    ForwardedCertificate,
    /// One of several, and of those that are configured.
    ApiKey,
}

/// Reads the credentials of one request.
pub struct Reader<'p> {
    principals: &'p Principals,
    rank: u8,
    auth: Auth,
    principal: Option<u64>,
}

/// What a request's credentials say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credential {
    /// The scheme.
    pub auth: Auth,
    /// The keyed hash of who it stands for: 16 hexadecimal digits.
    pub principal: Option<Arc<str>>,
}

/// What one field or a query says of who asks: to be kept in place of the credential, and merged with
/// the others of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    rank: u8,
    auth: Auth,
    principal: Option<u64>,
}

/// Bytes of a [`Found`] that is written.
const PACKED: usize = 11;
/// Every scheme at its number.
const AUTHS: [Auth; 9] = [
    Auth::None,
    Auth::Basic,
    Auth::Bearer,
    Auth::ApiKey,
    Auth::Cookie,
    Auth::Digest,
    Auth::Negotiate,
    Auth::Mtls,
    Auth::Other,
];

impl Default for Found {
    fn default() -> Self {
        Self { rank: 0, auth: Auth::None, principal: None }
    }
}

impl Found {
    /// Takes the other where it names its holder better.
    pub fn merge(&mut self, other: &Self) {
        if other.rank > self.rank || self.auth == Auth::None {
            *self = *other;
        }
    }

    /// As bytes; none where nothing was found.
    pub fn write(self, out: &mut Vec<u8>) {
        if self != Self::default() {
            out.extend([self.rank, self.auth as u8, self.principal.is_some().into()]);
            out.extend(self.principal.unwrap_or_default().to_le_bytes());
        }
    }

    /// What [`Found::write`] wrote, and what follows it.
    #[must_use]
    pub fn read(bytes: &[u8]) -> (Self, &[u8]) {
        let Some((&[rank, auth, named, principal @ ..], rest)) = bytes.split_first_chunk::<PACKED>() else {
            return (Self::default(), bytes);
        };
        let auth = AUTHS.get(usize::from(auth)).copied().unwrap_or(Auth::None);
        (Self { rank, auth, principal: (named != 0).then(|| u64::from_le_bytes(principal)) }, rest)
    }

    /// What the credentials say in all.
    #[must_use]
    pub fn credential(self) -> Credential {
        Credential { auth: self.auth, principal: self.principal.map(hex) }
    }
}

/// What of an `X-` or JWT payload names the holder.
#[derive(Deserialize)]
struct Claims<'a> {
    #[serde(borrow, default)]
    iss: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    sub: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    client_id: Option<Cow<'a, str>>,
}

/// Accepts both alphabets' padding habits: issuers differ.
const LENIENT: GeneralPurposeConfig = GeneralPurposeConfig::new()
    .with_decode_allow_trailing_bits(true)
    .with_decode_padding_mode(base64::engine::DecodePaddingMode::Indifferent);
const URL_SAFE: GeneralPurpose = GeneralPurpose::new(&base64::alphabet::URL_SAFE, LENIENT);
const STANDARD: GeneralPurpose = GeneralPurpose::new(&base64::alphabet::STANDARD, LENIENT);

impl Principals {
    /// With this key, and the names of more fields and parameters that carry API keys.
    ///
    /// # Errors
    /// The key is shorter than [`MIN_KEY`].
    pub fn new(key: &[u8], headers: &[String], query: &[String]) -> anyhow::Result<Self> {
        if key.len() < MIN_KEY {
            bail!("the key of principals has {} bytes: it must have at least {MIN_KEY}", key.len());
        }
        let lower = |names: &[String]| names.iter().map(|n| n.to_ascii_lowercase().into()).collect();
        let mac = Hmac::new_from_slice(key).map_err(|_| anyhow::anyhow!("the key of principals cannot be used"))?;
        let mut known = Self { mac: Some(mac), memo: None, headers: lower(headers), query: lower(query) };
        known.memo = Some(Memo::new(&known.key_for("memo")));
        Ok(known)
    }

    /// With the key from [`KEY_VARIABLE`], else from `file`, which is made (mode 0600, 32 random bytes as
    /// hexadecimal digits) when there is none. Nodes that share the key share their principals.
    ///
    /// # Errors
    /// The file cannot be read or made, others may read it, or the key is too short.
    pub fn load(file: &Path, headers: &[String], query: &[String]) -> anyhow::Result<Self> {
        let key = match std::env::var(KEY_VARIABLE) {
            Ok(text) if !text.trim().is_empty() => Zeroizing::new(text.trim().as_bytes().to_vec()),
            _ => read_or_make(file)?,
        };
        Self::new(&key, headers, query)
    }

    /// What credential a field of this name may carry, in any case. The first byte and the length are enough to pass
    /// over most.
    #[must_use]
    pub fn place(&self, name: &[u8]) -> Option<Place> {
        match (name.len(), name.first()? | 0x20) {
            (13, b'a') if name.eq_ignore_ascii_case(b"authorization") => Some(Place::Authorization),
            (6, b'c') if name.eq_ignore_ascii_case(b"cookie") => Some(Place::Cookie),
            (23, b'x') if name.eq_ignore_ascii_case(b"x-forwarded-client-cert") => Some(Place::ForwardedCertificate),
            (6..=25, b'a' | b'x' | b'o' | b'p') if is_one_of(&API_KEY_HEADERS, name) => Some(Place::ApiKey),
            _ if self.headers.iter().any(|h| h.as_bytes().eq_ignore_ascii_case(name)) => Some(Place::ApiKey),
            _ => None,
        }
    }

    /// Reads the credentials of one request.
    #[must_use]
    pub fn reader(&self) -> Reader<'_> {
        Reader { principals: self, rank: 0, auth: Auth::None, principal: None }
    }

    /// A key for hashes of path parameters, which nodes that share the key share too. Without a key it is
    /// the same everywhere.
    #[must_use]
    pub fn param_key(&self) -> [u8; 16] {
        self.key_for("path parameters")
    }

    /// A secret key for what was read of heads.
    #[must_use]
    pub fn memo_key(&self) -> [u8; 16] {
        self.key_for("heads")
    }

    fn key_for(&self, purpose: &str) -> [u8; 16] {
        let half = |part: &[u8]| self.hash(purpose, [b"", part]).unwrap_or(0).to_be_bytes();
        let mut key = [0; 16];
        key[..8].copy_from_slice(&half(b"0"));
        key[8..].copy_from_slice(&half(b"1"));
        key
    }

    /// The principal of an identity; 64 bits of its HMAC. `None` without a key.
    #[inline(never)]
    fn hash(&self, kind: &str, parts: [&[u8]; 2]) -> Option<u64> {
        let mut mac = self.mac.clone()?;
        mac.update(kind.as_bytes());
        let mut fed = kind.len();
        for part in parts {
            // The length first: no two lists of parts are the same text.
            mac.update(&(part.len() as u64).to_be_bytes());
            mac.update(part);
            fed += 8 + part.len();
        }
        // `finalize` moves the state, and what is moved is not wiped where it was: zeros fill its buffer of
        // 64 bytes to the end and then all but once more, so that nothing of the secret is in it.
        mac.update(&[0; 64][..64 - fed % 64]);
        mac.update(&[0; 63]);
        mac.finalize().into_bytes().first_chunk().map(|b| u64::from_be_bytes(*b))
    }
}

impl fmt::Debug for Principals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Principals").field("key", &self.mac.as_ref().map(|_| "set")).finish_non_exhaustive()
    }
}

impl Reader<'_> {
    /// May a field of any name carry a credential? Else those whose names begin with `a`, `c`, `o`, `p` or `x`.
    #[must_use]
    pub fn wants_any(&self) -> bool {
        !self.principals.headers.is_empty()
    }

    /// Takes one header field. Names may be in any case.
    pub fn field(&mut self, name: &[u8], value: &[u8]) {
        if let Some(place) = self.principals.place(name) {
            self.value(place, value);
        }
    }

    /// Takes the value of a field that may carry a credential.
    pub fn value(&mut self, place: Place, value: &[u8]) {
        let read = match place {
            Place::Authorization => Self::authorization,
            Place::Cookie => Self::cookies,
            Place::ForwardedCertificate => Self::forwarded_certificate,
            Place::ApiKey => Self::api_key,
        };
        let Some(memo) = &self.principals.memo else { return read(self, value) };
        let found = memo.find(place as u8, value, || {
            let mut alone = self.principals.reader();
            read(&mut alone, value);
            alone.found()
        });
        let mut all = Found { rank: self.rank, auth: self.auth, principal: self.principal };
        all.merge(&found);
        (self.rank, self.auth, self.principal) = (all.rank, all.auth, all.principal);
    }

    /// Takes one query parameter as sent, not decoded.
    pub fn query(&mut self, key: &[u8], value: &[u8]) {
        if value.is_empty() || key.len() < 3 || key.len() > 32 {
            return;
        }
        let configured = || self.principals.query.iter().any(|q| q.as_bytes().eq_ignore_ascii_case(key));
        if is_one_of(&CREDENTIAL_QUERY, key) || configured() {
            self.api_key(value);
        }
    }

    /// Takes what names the holder of the connection's client certificate: its subject, or a SPIFFE id.
    pub fn certificate(&mut self, subject: &[u8]) {
        self.take(6, Auth::Mtls, "certificate", [b"", subject]);
    }

    /// What the credentials say in all.
    #[must_use]
    pub fn finish(self) -> Credential {
        self.found().credential()
    }

    /// As [`Reader::finish`], to be merged.
    #[must_use]
    pub fn found(self) -> Found {
        Found { rank: self.rank, auth: self.auth, principal: self.principal }
    }

    fn take(&mut self, rank: u8, auth: Auth, kind: &str, parts: [&[u8]; 2]) {
        if rank > self.rank {
            self.rank = rank;
            self.auth = auth;
            self.principal = self.principals.hash(kind, parts);
        }
    }

    fn api_key(&mut self, value: &[u8]) {
        if !value.is_empty() {
            self.take(4, Auth::ApiKey, "key", [b"", value]);
        }
    }

    /// `Authorization` (RFC 9110 section 11.6.2). A scheme without a credential is none.
    fn authorization(&mut self, value: &[u8]) {
        let end = memchr::memchr(b' ', value).unwrap_or(value.len());
        let (scheme, rest) = (&value[..end], value[end..].trim_ascii());
        let is = |names: &[&str]| names.iter().any(|n| scheme.eq_ignore_ascii_case(n.as_bytes()));
        if is(&["negotiate", "ntlm", "kerberos"]) {
            if self.rank < 5 {
                (self.rank, self.auth, self.principal) = (5, Auth::Negotiate, None);
            }
        } else if rest.is_empty() {
            // A bare token without a scheme is a habit of some APIs.
            if scheme.len() >= MIN_TOKEN {
                self.take(5, Auth::Other, "other", [b"", scheme]);
            }
        } else if is(&["bearer", "dpop"]) {
            self.bearer(rest);
        } else if is(&["basic"]) {
            let mut buffer = Zeroizing::new([0; MAX_DECODED]);
            let user = decode(&STANDARD, rest, &mut buffer)
                .and_then(|text| memchr::memchr(b':', text).map(|colon| &text[..colon]));
            match user.filter(|u| !u.is_empty()) {
                Some(user) => self.take(5, Auth::Basic, "basic", [b"user", user]),
                None => self.take(5, Auth::Basic, "basic", [b"", rest]),
            }
        } else if is(&["digest"]) {
            let user = parameter(rest, b"username").unwrap_or(rest);
            self.take(5, Auth::Digest, "digest", [b"", user]);
        } else if is(&["apikey", "api-key", "token"]) {
            self.take(5, Auth::ApiKey, "key", [b"", rest]);
        } else {
            // AWS Signature: the key's id; the signature is new with every request.
            let who = parameter(rest, b"Credential").map(|c| &c[..memchr::memchr(b'/', c).unwrap_or(c.len())]);
            self.take(5, Auth::Other, "other", [scheme, who.unwrap_or(rest)]);
        }
    }

    fn bearer(&mut self, token: &[u8]) {
        if self.rank >= 5 {
            return;
        }
        let mut parts = token.split(|&b| b == b'.');
        if let (Some(head), Some(payload), Some(_), None) = (parts.next(), parts.next(), parts.next(), parts.next())
            && head.starts_with(b"ey")
        {
            let mut buffer = Zeroizing::new([0; MAX_DECODED]);
            let claims = decode(&URL_SAFE, payload, &mut buffer)
                .and_then(|json| serde_json::from_slice::<Claims<'_>>(json).ok());
            if let Some(claims) = claims
                && let Some(who) = claims.sub.or(claims.client_id).map(|w| Zeroizing::new(w.into_owned()))
            {
                let issuer = Zeroizing::new(claims.iss.unwrap_or_default().into_owned());
                return self.take(5, Auth::Bearer, "jwt", [issuer.as_bytes(), who.as_bytes()]);
            }
        }
        self.take(5, Auth::Bearer, "bearer", [b"", token]);
    }

    /// The subject, URI or hash that a proxy took from its client's certificate; the last element is
    /// the nearest proxy's.
    fn forwarded_certificate(&mut self, value: &[u8]) {
        let last = value.rsplit(|&b| b == b',').next().unwrap_or_default();
        let named = [&b"URI"[..], b"Subject", b"Hash"].into_iter().find_map(|name| {
            last.split(|&b| b == b';').find_map(|part| {
                let part = part.trim_ascii();
                let rest = part.get(name.len()..)?.strip_prefix(b"=")?;
                part[..name.len()].eq_ignore_ascii_case(name).then_some(rest)
            })
        });
        if let Some(subject) = named.filter(|s| !s.is_empty()) {
            self.take(3, Auth::Mtls, "certificate", [b"", subject]);
        }
    }

    /// `Cookie` (RFC 6265 section 4.2.1); HTTP/2 may bring each pair as a field of its own.
    fn cookies(&mut self, value: &[u8]) {
        for pair in value.split(|&b| b == b';') {
            let Some((name, value)) = pair.trim_ascii().split_once_byte(b'=') else { continue };
            if value.is_empty() || starts_with_any(name, &OTHER_COOKIE) {
                continue;
            }
            if contains_any(name, &SESSION_COOKIE) && !contains_any(name, &["csrf", "xsrf"]) {
                self.take(2, Auth::Cookie, "cookie", [name, value]);
            } else if value.len() >= MIN_TOKEN {
                self.take(1, Auth::Cookie, "cookie", [name, value]);
            } else if self.rank == 0 {
                self.auth = Auth::Cookie;
            }
        }
    }
}

fn is_one_of(names: &[&str], name: &[u8]) -> bool {
    names.iter().any(|n| n.len() == name.len() && n.as_bytes().eq_ignore_ascii_case(name))
}

/// 16 hexadecimal digits: `{:016x}`, on the way of every request.
fn hex(n: u64) -> Arc<str> {
    let digits: [u8; 16] = std::array::from_fn(|i| b"0123456789abcdef"[(n >> (60 - 4 * i)) as usize & 15]);
    std::str::from_utf8(&digits).unwrap_or_default().into()
}

/// What `slice::split_once` will be.
trait SplitOnce {
    fn split_once_byte(&self, at: u8) -> Option<(&[u8], &[u8])>;
}

impl SplitOnce for [u8] {
    fn split_once_byte(&self, at: u8) -> Option<(&[u8], &[u8])> {
        let i = self.iter().position(|&b| b == at)?;
        Some((&self[..i], &self[i + 1..]))
    }
}

fn starts_with_any(name: &[u8], starts: &[&str]) -> bool {
    starts.iter().any(|s| name.len() >= s.len() && name[..s.len()].eq_ignore_ascii_case(s.as_bytes()))
}

fn contains_any(name: &[u8], parts: &[&str]) -> bool {
    parts.iter().any(|p| name.windows(p.len()).any(|w| w.eq_ignore_ascii_case(p.as_bytes())))
}

/// Decodes base64 into `buffer`; `None` when it is none or too long.
fn decode<'b>(engine: &GeneralPurpose, text: &[u8], buffer: &'b mut [u8; MAX_DECODED]) -> Option<&'b [u8]> {
    if text.len() > MAX_DECODED {
        return None;
    }
    let n = engine.decode_slice(text, buffer).ok()?;
    buffer.get(..n)
}

/// The value of `name=value` or `name="value"` in a list separated by commas.
fn parameter<'v>(list: &'v [u8], name: &[u8]) -> Option<&'v [u8]> {
    list.split(|&b| b == b',').find_map(|part| {
        let (key, value) = part.trim_ascii().split_once_byte(b'=')?;
        key.eq_ignore_ascii_case(name)
            .then(|| value.strip_prefix(b"\"").unwrap_or(value))
            .map(|v| v.strip_suffix(b"\"").unwrap_or(v))
    })
}

fn read_or_make(file: &Path) -> anyhow::Result<Zeroizing<Vec<u8>>> {
    use std::os::unix::fs::PermissionsExt as _;
    let failed = |what: &str| format!("failed to {what} the key of principals {}", file.display());
    match std::fs::File::open(file) {
        Ok(opened) => {
            let mode = opened.metadata().with_context(|| failed("read"))?.permissions().mode();
            // A file that is mounted from a Kubernetes secret may be readable by its group.
            if mode & 0o007 != 0 {
                bail!("others may read the key of principals {}: chmod 600 it", file.display());
            }
            let mut key = Zeroizing::new(Vec::with_capacity(256));
            opened.take(MAX_KEY).read_to_end(&mut key).with_context(|| failed("read"))?;
            let end = key.trim_ascii_end().len();
            key.truncate(end);
            Ok(key)
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            if let Some(folder) = file.parent().filter(|f| !f.as_os_str().is_empty()) {
                std::fs::create_dir_all(folder).with_context(|| failed("make"))?;
            }
            let mut random = Zeroizing::new([0; 32]);
            std::fs::File::open("/dev/urandom").and_then(|mut f| f.read_exact(&mut *random))?;
            let mut text = Zeroizing::new(Vec::with_capacity(64));
            for byte in random.iter() {
                text.extend([byte >> 4, byte & 15].map(|d| b"0123456789abcdef"[usize::from(d)]));
            }
            // Written beside and renamed: another agent that starts now sees a whole key or none.
            let beside = PathBuf::from(format!("{}.{}", file.display(), std::process::id()));
            let mut out = std::fs::OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&beside)
                .with_context(|| failed("make"))?;
            let written = out.write_all(&text).and_then(|()| std::fs::hard_link(&beside, file));
            std::fs::remove_file(&beside)?;
            match written {
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => read_or_make(file),
                written => written.map(|()| text).with_context(|| failed("make")),
            }
        }
        Err(e) => Err(e).with_context(|| failed("read")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn principals() -> Principals {
        Principals::new(&[7; 32], &["X-Shop-Key".into()], &["pass".into()]).expect("a key")
    }

    fn read(fields: &[(&str, &str)]) -> (Auth, Option<String>) {
        let principals = principals();
        let mut reader = principals.reader();
        for (name, value) in fields {
            reader.field(name.as_bytes(), value.as_bytes());
        }
        let credential = reader.finish();
        (credential.auth, credential.principal.map(|p| p.to_string()))
    }

    fn jwt(payload: &str) -> String {
        let part = |text: &str| URL_SAFE.encode(text).trim_end_matches('=').to_owned();
        format!("Bearer {}.{}.c2ln", part(r#"{"alg":"RS256"}"#), part(payload))
    }

    #[test]
    fn what_is_written_reads_the_same() {
        for (i, auth) in AUTHS.into_iter().enumerate() {
            assert_eq!(auth as usize, i);
            let found = Found { rank: 3, auth, principal: (i % 2 == 0).then_some(u64::MAX - 7) };
            let mut bytes = Vec::new();
            found.write(&mut bytes);
            assert_eq!(bytes.len(), PACKED);
            assert_eq!(Found::read(&bytes), (found, &[][..]));
        }
        assert_eq!(Found::read(&[]), (Found::default(), &[][..]));
    }

    #[test]
    fn every_scheme() {
        for (name, value, auth, named) in [
            ("authorization", "Basic YW5uOnNlY3JldA==", Auth::Basic, true),
            ("Authorization", "bearer opaque-token", Auth::Bearer, true),
            ("AUTHORIZATION", "Digest username=\"ann\", realm=\"x\", response=\"0\"", Auth::Digest, true),
            ("Authorization", "Negotiate YII", Auth::Negotiate, false),
            ("Authorization", "Token abc", Auth::ApiKey, true),
            ("Authorization", "AWS4-HMAC-SHA256 Credential=AKIA/2026/x, Signature=1", Auth::Other, true),
            ("Authorization", "Bearer", Auth::None, false),
            ("Authorization", "", Auth::None, false),
            ("X-API-Key", "k", Auth::ApiKey, true),
            ("x-shop-key", "k", Auth::ApiKey, true),
            ("X-Forwarded-Client-Cert", "By=a;Hash=9f;Subject=\"CN=shop\"", Auth::Mtls, true),
            ("Cookie", "_ga=GA1.2.3; theme=dark", Auth::None, false),
            ("Cookie", "_ga=GA1.2.3; sessionid=1", Auth::Cookie, true),
            ("Cookie", "s=1", Auth::Cookie, false),
            ("cookie", "u=0123456789abcdef0", Auth::Cookie, true),
            ("Cookie", "csrftoken=0123456789abcdef0", Auth::None, false),
            ("X-Request-Id", "k", Auth::None, false),
        ] {
            let (seen, principal) = read(&[(name, value)]);
            assert_eq!((seen, principal.is_some()), (auth, named), "{name}: {value}");
        }
    }

    #[test]
    fn the_holder_counts_not_the_token() {
        let one = read(&[("authorization", &jwt(r#"{"iss":"i","sub":"ann","exp":1}"#))]);
        assert_eq!(one, read(&[("authorization", &jwt(r#"{"exp":2,"sub":"ann","iss":"i","x":[{}]}"#))]));
        assert_ne!(one, read(&[("authorization", &jwt(r#"{"iss":"j","sub":"ann"}"#))]));
        assert_ne!(one, read(&[("authorization", "Bearer ey.x.y")]));
        let basic = |text: &str| read(&[("authorization", &format!("Basic {}", STANDARD.encode(text)))]);
        assert_eq!(basic("ann:one"), basic("ann:two"));
        assert_ne!(basic("ann:one"), basic("bob:one"));
        let cookie = |text: &str| read(&[("cookie", text)]);
        assert_eq!(cookie("_ga=1; sid=abc; z=0123456789abcdef"), cookie("sid=abc; _ga=2"));
    }

    #[test]
    fn the_best_credential_wins_in_any_order() {
        let all = [("cookie", "sid=abc"), ("x-api-key", "k"), ("authorization", "Bearer t")];
        let bearer = read(&all[2..]);
        assert_eq!(read(&all), bearer);
        assert_eq!(read(&[all[2], all[1], all[0]]), bearer);
        assert_eq!(read(&all[..2]).0, Auth::ApiKey);
        let principals = principals();
        let mut reader = principals.reader();
        reader.query(b"page", b"1");
        reader.query(b"access_token", b"t");
        assert_eq!(reader.finish().auth, Auth::ApiKey);
        let mut reader = principals.reader();
        reader.field(b"authorization", b"Bearer t");
        reader.certificate(b"CN=x");
        assert_eq!(reader.finish().auth, Auth::Mtls);
    }

    #[test]
    fn without_a_key_there_is_a_scheme_only() {
        let principals = Principals::default();
        let mut reader = principals.reader();
        reader.field(b"authorization", b"Bearer t");
        assert_eq!(reader.finish(), Credential { auth: Auth::Bearer, principal: None });
        assert!(Principals::new(b"short", &[], &[]).is_err());
    }

    #[test]
    fn the_key_is_made_once_and_for_its_owner() {
        use std::os::unix::fs::PermissionsExt as _;
        let file = std::env::temp_dir().join(format!("apiscope-key-{}", std::process::id()));
        let one = read_or_make(&file).expect("made");
        assert_eq!(one.len(), 64);
        assert_eq!(std::fs::metadata(&file).expect("there").permissions().mode() & 0o777, 0o600);
        assert_eq!(*read_or_make(&file).expect("read"), *one);
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).expect("ours");
        assert!(read_or_make(&file).is_err_and(|e| e.to_string().contains("chmod 600")));
        std::fs::remove_file(&file).expect("removable");
    }

    proptest::proptest! {
        #[test]
        fn never_panics(name in proptest::sample::select(vec!["authorization", "cookie", "x-api-key", "x-forwarded-client-cert"]),
            value in proptest::collection::vec(proptest::num::u8::ANY, 0..200), start in proptest::sample::select(vec!["", "Basic ", "Bearer ey.", "Digest "])) {
            let principals = principals();
            let mut reader = principals.reader();
            let value = [start.as_bytes(), &value].concat();
            reader.field(name.as_bytes(), &value);
            reader.query(b"token", &value);
            let _ = reader.finish();
        }
    }
}
