//! What the codes of an exchange say: names of gRPC statuses and of HTTP/2 errors, and whose fault they are.

use crate::exchange::{Exchange, Side};

/// Is the exchange an error of the server: no answer, a status of 500 and above, or a gRPC status of that kind?
#[must_use]
pub fn is_server_error(exchange: &Exchange) -> bool {
    exchange.status == 0 || exchange.status >= 500 || exchange.grpc_status.is_some_and(is_grpc_server_error)
}

/// `error.type`: what ended a stream, server errors on both sides, client errors for who made them, and no
/// answer (semantic conventions for HTTP and gRPC).
#[must_use]
pub fn error_type(side: Side, status: u16, grpc: Option<u32>, stream: Option<u32>) -> Option<String> {
    if let Some(code) = stream.filter(|c| *c != 0) {
        return Some(stream_error_name(code).into());
    }
    match (status, grpc) {
        (200..=299, Some(code)) if is_grpc_server_error(code) || (code != 0 && side == Side::Client) => {
            Some(grpc_name(code).into())
        }
        (0, _) => Some("no_response".into()),
        (400..=499, _) if side == Side::Client => Some(status.to_string()),
        (500.., _) => Some(status.to_string()),
        _ => None,
    }
}

/// Name of a status (gRPC status codes); a code that is not registered is `UNKNOWN`, so that nobody
/// can choose label values.
#[must_use]
pub fn grpc_name(status: u32) -> &'static str {
    const NAMES: [&str; 17] = [
        "OK",
        "CANCELLED",
        "UNKNOWN",
        "INVALID_ARGUMENT",
        "DEADLINE_EXCEEDED",
        "NOT_FOUND",
        "ALREADY_EXISTS",
        "PERMISSION_DENIED",
        "RESOURCE_EXHAUSTED",
        "FAILED_PRECONDITION",
        "ABORTED",
        "OUT_OF_RANGE",
        "UNIMPLEMENTED",
        "INTERNAL",
        "UNAVAILABLE",
        "DATA_LOSS",
        "UNAUTHENTICATED",
    ];
    NAMES.get(status as usize).copied().unwrap_or("UNKNOWN")
}

/// Is the gRPC status the server's fault (semantic conventions for gRPC: errors of server spans)?
#[must_use]
pub fn is_grpc_server_error(status: u32) -> bool {
    matches!(status, 2 | 4 | 12..=15)
}

/// Name of an error code of HTTP/2 (RFC 9113 section 7).
#[must_use]
pub fn stream_error_name(code: u32) -> &'static str {
    const NAMES: [&str; 14] = [
        "NO_ERROR",
        "PROTOCOL_ERROR",
        "INTERNAL_ERROR",
        "FLOW_CONTROL_ERROR",
        "SETTINGS_TIMEOUT",
        "STREAM_CLOSED",
        "FRAME_SIZE_ERROR",
        "REFUSED_STREAM",
        "CANCEL",
        "COMPRESSION_ERROR",
        "CONNECT_ERROR",
        "ENHANCE_YOUR_CALM",
        "INADEQUATE_SECURITY",
        "HTTP_1_1_REQUIRED",
    ];
    NAMES.get(code as usize).copied().unwrap_or("UNKNOWN_ERROR")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert_eq!((grpc_name(0), grpc_name(5), grpc_name(999)), ("OK", "NOT_FOUND", "UNKNOWN"));
        assert_eq!((stream_error_name(8), stream_error_name(99)), ("CANCEL", "UNKNOWN_ERROR"));
    }

    #[test]
    fn errors_are_whose_they_are() {
        let of = |side, status, grpc, stream| error_type(side, status, grpc, stream);
        assert_eq!(of(Side::Server, 404, None, None), None);
        assert_eq!(of(Side::Client, 404, None, None).as_deref(), Some("404"));
        assert_eq!(of(Side::Server, 503, None, None).as_deref(), Some("503"));
        assert_eq!(of(Side::Server, 0, None, None).as_deref(), Some("no_response"));
        assert_eq!(of(Side::Server, 200, Some(5), None), None);
        assert_eq!(of(Side::Client, 200, Some(5), None).as_deref(), Some("NOT_FOUND"));
        assert_eq!(of(Side::Server, 200, Some(13), None).as_deref(), Some("INTERNAL"));
        assert_eq!(of(Side::Server, 200, None, Some(8)).as_deref(), Some("CANCEL"));
    }
}
