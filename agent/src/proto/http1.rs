//! Heads of HTTP/1 messages (RFC 9112). The kernel side has found where a head begins and ends and how
//! long its message is; here it is read for what an exchange carries. Lenient on purpose: what a
//! server accepted must be counted, well-formed or not.

use std::{borrow::Cow, sync::Arc};

use super::{
    credential::{Principals, Reader},
    memo::Memo,
};
use crate::exchange::{Auth, MAX_QUERY_KEYS, MAX_USER_AGENT, Marks, Method, Protocol, TraceContext, unhex};

/// Longest name of a query parameter that is kept, in bytes.
const MAX_QUERY_KEY: usize = 64;

/// Longest media type that is kept, in bytes.
const MAX_MEDIA_TYPE: usize = 64;

/// What is taken from the head of a request.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Method.
    pub method: Method,
    /// Path of the target without query and fragment; `*` and the authority form as they are.
    pub path: Arc<str>,
    /// Names of the query parameters.
    pub query_keys: Arc<[Box<str>]>,
    /// Version.
    pub protocol: Protocol,
    /// Kind of credential.
    pub auth: Auth,
    /// Keyed hash of who the credential stands for.
    pub principal: Option<Arc<str>>,
    /// What else detectors ask for.
    pub marks: Marks,
    /// `traceparent`.
    pub trace: Option<TraceContext>,
    /// `User-Agent`, cut.
    pub user_agent: Option<Arc<str>>,
    /// Media type without parameters, lower case.
    pub media_type: Option<Arc<str>>,
}

/// What is taken from the head of a response.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Response {
    /// Status code.
    pub status: u16,
    /// Media type without parameters, lower case.
    pub media_type: Option<Arc<str>>,
    /// `Upgrade: websocket`.
    pub websocket: bool,
    /// `Upgrade: h2c` (RFC 7540 section 3.2).
    pub h2c: bool,
    /// `grpc-status`: gRPC-Web where there is no message.
    pub grpc_status: Option<u32>,
    /// What else detectors ask for.
    pub marks: Marks,
}

/// What was read of heads lately.
pub struct Heads {
    requests: Memo<Option<Arc<Request>>>,
    responses: Memo<Option<Arc<Response>>>,
}

impl Heads {
    /// Remembers nothing yet; `key` is secret.
    #[must_use]
    pub fn new(key: &[u8; 16]) -> Self {
        Self { requests: Memo::new(key), responses: Memo::new(key) }
    }

    /// As [`request_of`].
    #[must_use]
    pub fn request(&self, head: &[u8], principals: &Principals) -> Option<Arc<Request>> {
        self.requests.find(0, head, || request_of(head, principals).map(Arc::new))
    }

    /// As [`response`].
    #[must_use]
    pub fn response(&self, head: &[u8]) -> Option<Arc<Response>> {
        self.responses.find(0, head, || response(head).map(Arc::new))
    }
}

/// Reads the head of a request, without principals. `None` when its first line is none.
#[must_use]
pub fn request(head: &[u8]) -> Option<Request> {
    request_of(head, &Principals::default())
}

/// Reads the head of a request. `None` when its first line is none.
#[must_use]
pub fn request_of(head: &[u8], principals: &Principals) -> Option<Request> {
    let (line, fields) = first_line(head);
    let space = memchr::memchr(b' ', line)?;
    let (method, rest) = (&line[..space], &line[space + 1..]);
    if method.is_empty() {
        return None;
    }
    let last = memchr::memrchr(b' ', rest)?;
    let (target, version) = (&rest[..last], &rest[last + 1..]);
    let protocol = match version {
        b"HTTP/1.1" => Protocol::Http11,
        b"HTTP/1.0" => Protocol::Http10,
        _ => return None,
    };
    let (path, query) = split_target(target);
    let mut request = Request {
        method: Method::from_token(std::str::from_utf8(method).ok()?),
        path: text(path),
        query_keys: query_keys(query),
        protocol,
        auth: Auth::None,
        principal: None,
        marks: Marks::default(),
        trace: None,
        user_agent: None,
        media_type: None,
    };
    let mut credentials = principals.reader();
    if !query.is_empty() {
        query_credentials(query, &mut credentials);
    }
    let all = credentials.wants_any();
    for (name, value) in (Fields { rest: fields, wanted: if all { |_| true } else { of_request } }) {
        field(&mut request, name, value);
        credentials.field(name, value);
    }
    let credential = credentials.finish();
    (request.auth, request.principal) = (credential.auth, credential.principal);
    Some(request)
}

/// Takes what an exchange needs of one field. The first byte and the length of its name are enough to
/// pass over most.
fn field(request: &mut Request, name: &[u8], value: &[u8]) {
    let is = |wanted: &[u8]| name.eq_ignore_ascii_case(wanted);
    match (name.len(), name[0] | 0x20) {
        (11, b't') if is(b"traceparent") => request.trace = traceparent(value),
        (10, b'u') if is(b"user-agent") => {
            let cut = &value[..value.len().min(MAX_USER_AGENT)];
            request.user_agent = Some(match std::str::from_utf8(cut) {
                Ok(text) => text.into(),
                Err(_) => String::from_utf8_lossy(cut).into(),
            });
        }
        (12, b'c') if is(b"content-type") => request.media_type = media_type(value),
        (22, b'x') if is(b"x-http-method-override") => request.marks.insert(Marks::METHOD_OVERRIDE),
        (17, b'x') if is(b"x-method-override") => request.marks.insert(Marks::METHOD_OVERRIDE),
        (13, b'x') if is(b"x-http-method") => request.marks.insert(Marks::METHOD_OVERRIDE),
        _ => {}
    }
}

/// Reads the head of a response. `None` when its first line is none.
#[must_use]
pub fn response(head: &[u8]) -> Option<Response> {
    let (line, fields) = first_line(head);
    if !line.starts_with(b"HTTP/1.") {
        return None;
    }
    let digits = line.get(9..12)?;
    let status = digits.iter().try_fold(0u16, |n, d| d.is_ascii_digit().then(|| n * 10 + u16::from(d - b'0')))?;
    let mut response = Response { status, ..Response::default() };
    for (name, value) in (Fields { rest: fields, wanted: of_response }) {
        match (name.len(), name[0] | 0x20) {
            (12, b'c') if name.eq_ignore_ascii_case(b"content-type") => {
                response.media_type = media_type(value);
            }
            (7, b'u') if name.eq_ignore_ascii_case(b"upgrade") => {
                response.websocket = value.eq_ignore_ascii_case(b"websocket");
                response.h2c = value.eq_ignore_ascii_case(b"h2c");
            }
            (11, b'g') if name.eq_ignore_ascii_case(b"grpc-status") => {
                response.grpc_status = std::str::from_utf8(value).ok().and_then(|v| v.parse().ok());
            }
            (16, b'w') if name.eq_ignore_ascii_case(b"www-authenticate") => response.marks.insert(Marks::CHALLENGE),
            (11, b'd') if name.eq_ignore_ascii_case(b"deprecation") => response.marks.insert(Marks::DEPRECATED),
            (6, b's') if name.eq_ignore_ascii_case(b"sunset") => response.marks.insert(Marks::SUNSET),
            _ => {}
        }
    }
    Some(response)
}

/// The first line without its end, and what follows.
fn first_line(head: &[u8]) -> (&[u8], &[u8]) {
    let Some(end) = memchr::memchr(b'\n', head) else { return (head, &[]) };
    let line = &head[..end];
    (line.strip_suffix(b"\r").unwrap_or(line), &head[end + 1..])
}

/// The fields of a head whose lines may be wanted: names and trimmed values. Lines without a name are passed over.
struct Fields<'a> {
    rest: &'a [u8],
    /// May this line be wanted? A look at a byte or two, where looking for the colon takes one at every byte.
    wanted: fn(&[u8]) -> bool,
}

/// May a request's field on this line be wanted? Credentials begin with `a`, `c`, `o`, `p` or `x`.
fn of_request(line: &[u8]) -> bool {
    match line.first().map(|b| b | 0x20) {
        Some(b'a' | b'o' | b'p' | b'x') => true,
        Some(b'c') => matches!((line.get(6), line.get(12)), (Some(b':'), _) | (_, Some(b':'))),
        Some(b'u') => line.get(10) == Some(&b':'),
        Some(b't') => line.get(11) == Some(&b':'),
        _ => false,
    }
}

/// May a response's field on this line be wanted?
fn of_response(line: &[u8]) -> bool {
    let colon = match line.first().map(|b| b | 0x20) {
        Some(b'c') => 12,
        Some(b'd' | b'g') => 11,
        Some(b's') => 6,
        Some(b'u') => 7,
        Some(b'w') => 16,
        _ => return false,
    };
    line.get(colon) == Some(&b':')
}

impl<'a> Iterator for Fields<'a> {
    type Item = (&'a [u8], &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        while !self.rest.is_empty() {
            let end = memchr::memchr(b'\n', self.rest).unwrap_or(self.rest.len());
            let line = &self.rest[..end];
            self.rest = self.rest.get(end + 1..).unwrap_or_default();
            // Names are short: a plain loop beats a vector search.
            if (self.wanted)(line)
                && let Some(colon) = line.iter().position(|&b| b == b':').filter(|&c| c > 0)
            {
                return Some((&line[..colon], line[colon + 1..].trim_ascii()));
            }
        }
        None
    }
}

/// Path and query of a request target (RFC 9112 section 3.2), the fragment left out.
pub(super) fn split_target(target: &[u8]) -> (&[u8], &[u8]) {
    let end = memchr::memchr(b'#', target).unwrap_or(target.len());
    let mut rest = &target[..end];
    if !rest.starts_with(b"/")
        && let Some(scheme) = memchr::memmem::find(rest, b"://")
        && rest[..scheme].iter().all(u8::is_ascii_alphanumeric)
    {
        // The absolute form: leave out the authority, which may carry user information.
        let authority = &rest[scheme + 3..];
        let path = authority.iter().position(|&b| b == b'/' || b == b'?').unwrap_or(authority.len());
        rest = &authority[path..];
        if rest.first() != Some(&b'/') {
            return (b"/", rest.get(1..).unwrap_or_default());
        }
    }
    match memchr::memchr(b'?', rest) {
        Some(mark) => (&rest[..mark], &rest[mark + 1..]),
        None => (rest, &[]),
    }
}

/// A path as text: bytes that are not UTF-8 are percent-encoded.
pub(super) fn lossless(path: &[u8]) -> Cow<'_, str> {
    if let Ok(text) = std::str::from_utf8(path) {
        return text.into();
    }
    let mut out = String::with_capacity(path.len() + 16);
    for chunk in path.utf8_chunks() {
        out.push_str(chunk.valid());
        for byte in chunk.invalid() {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out.into()
}

/// As [`lossless`], as another kind of text.
fn text<T: for<'t> From<&'t str>>(path: &[u8]) -> T {
    T::from(&*lossless(path))
}

pub(super) fn query_keys(query: &[u8]) -> Arc<[Box<str>]> {
    if query.is_empty() {
        return Arc::default();
    }
    query_names(query).map(text).collect()
}

/// Names of the parameters that are kept.
pub(super) fn query_names(query: &[u8]) -> impl Iterator<Item = &[u8]> {
    query
        .split(|&b| b == b'&')
        .map(|pair| &pair[..memchr::memchr(b'=', pair).unwrap_or(pair.len())])
        .filter(|key| !key.is_empty() && key.len() <= MAX_QUERY_KEY)
        .take(MAX_QUERY_KEYS)
}

/// Hands out the parameters; only their names are kept elsewhere.
pub(super) fn query_credentials(query: &[u8], credentials: &mut Reader<'_>) {
    for pair in query.split(|&b| b == b'&').take(4 * MAX_QUERY_KEYS) {
        if let Some(at) = memchr::memchr(b'=', pair) {
            credentials.query(&pair[..at], &pair[at + 1..]);
        }
    }
}

/// A media type without its parameters, lower case.
fn media_type(value: &[u8]) -> Option<Arc<str>> {
    media_type_of(value).map(Into::into)
}

/// As [`media_type`], borrowed where it is lower case already.
pub(super) fn media_type_of(value: &[u8]) -> Option<Cow<'_, str>> {
    let end = value.iter().position(|&b| b == b';').unwrap_or(value.len());
    let media = std::str::from_utf8(value[..end].trim_ascii()).ok().filter(|m| m.len() <= MAX_MEDIA_TYPE)?;
    Some(if media.bytes().any(|b| b.is_ascii_uppercase()) { media.to_ascii_lowercase().into() } else { media.into() })
}

/// A `traceparent` value (W3C Trace Context, version 00 and compatible ones).
pub(super) fn traceparent(value: &[u8]) -> Option<TraceContext> {
    let value = std::str::from_utf8(value).ok()?;
    let mut parts = value.split('-');
    let version = parts.next().filter(|v| v.len() == 2 && *v != "ff")?;
    unhex::<1>(version)?;
    let trace_id = unhex(parts.next()?)?;
    let parent_id = unhex(parts.next()?)?;
    let [flags] = unhex(parts.next()?)?;
    (trace_id != [0; 16] && parent_id != [0; 8]).then_some(TraceContext {
        trace_id,
        parent_id,
        sampled: flags & 1 != 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_usual_request() {
        let head = b"POST /q/1?a=1&token=secret#f HTTP/1.1\r\nHost: h\r\nAUTHORIZATION: Bearer abc\r\nCookie: s=1\r\n\
            traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\nUser-Agent: x/1\r\n\r\n";
        let r = request(head).expect("a request");
        assert_eq!((&*r.path, r.auth, r.protocol), ("/q/1", Auth::Bearer, Protocol::Http11));
        assert_eq!(*r.query_keys, ["a".into(), "token".into()] as [Box<str>; 2]);
        assert_eq!(r.trace.expect("a parent").parent_id, [0xb7, 0xad, 0x6b, 0x71, 0x69, 0x20, 0x33, 0x31]);
        assert_eq!(r.user_agent.as_deref(), Some("x/1"));
        assert!(!format!("{r:?}").contains("secret") && !format!("{r:?}").contains("abc"));
    }

    #[test]
    fn every_form_of_target() {
        let path = |target: &str| request(format!("GET {target} HTTP/1.0\n\n").as_bytes()).map(|r| r.path.to_string());
        assert_eq!(path("http://user:pw@h.test/absolute?q=1").as_deref(), Some("/absolute"));
        assert_eq!(path("http://h.test").as_deref(), Some("/"));
        assert_eq!(path("http://h.test?x=1").as_deref(), Some("/"));
        assert_eq!(path("*").as_deref(), Some("*"));
        assert_eq!(path("db.internal:443").as_deref(), Some("db.internal:443"));
        assert_eq!(path("/a?url=http://x/y").as_deref(), Some("/a"));
        assert_eq!(
            request(b"GET /\xff\xfe/x HTTP/1.1\r\n\r\n").map(|r| r.path.to_string()).as_deref(),
            Some("/%FF%FE/x")
        );
    }

    #[test]
    fn what_is_no_head() {
        for head in
            [&b"GETTING nowhere\r\n"[..], b"", b" / HTTP/1.1\r\n", b"GET / HTTP/2.0\r\n", b"HTTP/1.1 200 OK\r\n"]
        {
            assert_eq!(request(head), None, "{head:?}");
        }
        for head in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"HTTP/1.1 2x0 OK\r\n", b"HTTP/1.1\r\n"] {
            assert_eq!(response(head), None, "{head:?}");
        }
    }

    #[test]
    fn a_usual_response() {
        let r = response(b"HTTP/1.1 404 Not Found\r\nContent-Type: Application/JSON; charset=x\r\n\r\n")
            .expect("a response");
        assert_eq!((r.status, r.media_type.as_deref()), (404, Some("application/json")));
    }

    proptest::proptest! {
        #[test]
        fn never_panics(head in proptest::collection::vec(proptest::num::u8::ANY, 0..300)) {
            let _ = request(&head);
            let _ = response(&head);
            let mut with_line = b"GET /x HTTP/1.1\r\n".to_vec();
            with_line.extend_from_slice(&head);
            proptest::prop_assert!(request(&with_line).is_some());
        }
    }
}
