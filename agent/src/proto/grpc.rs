//! What kind of API an exchange belongs to, by its path and media types: gRPC, gRPC-Web, JSON-RPC, GraphQL and server-sent events. No body is read: of JSON-RPC and
//! GraphQL the name is known, not the operation; of gRPC-Web the status only where it is in the head.

use crate::exchange::Api;

/// The API of an exchange. Media types are lower case and without parameters.
#[must_use]
pub fn api(path: &str, request_media: Option<&str>, response_media: Option<&str>) -> Api {
    let media = |m: Option<&str>| m.map_or(Api::Http, of_media);
    match (media(request_media), media(response_media)) {
        (Api::Http, Api::Http) => of_path(path, request_media),
        (Api::Http, api) | (api, _) => api,
    }
}

fn of_media(media: &str) -> Api {
    match media {
        "application/graphql" | "application/graphql-response+json" => Api::GraphQl,
        "application/json-rpc" | "application/jsonrpc" | "application/jsonrequest" => Api::JsonRpc,
        "text/event-stream" => Api::EventStream,
        _ => match media.strip_prefix("application/grpc") {
            Some("") => Api::Grpc,
            // application/grpc+proto and such.
            Some(rest) if rest.starts_with('+') => Api::Grpc,
            Some(rest) if rest.starts_with("-web") => Api::GrpcWeb,
            _ => Api::Http,
        },
    }
}

/// What the last segment of the path says, where the request carries JSON.
fn of_path(path: &str, request_media: Option<&str>) -> Api {
    if request_media != Some("application/json") {
        return Api::Http;
    }
    match path.rsplit('/').next() {
        Some(last) if last.eq_ignore_ascii_case("graphql") => Api::GraphQl,
        Some(last) if last.eq_ignore_ascii_case("jsonrpc") || last.eq_ignore_ascii_case("json-rpc") => Api::JsonRpc,
        _ => Api::Http,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_media_type_and_path() {
        assert_eq!(api("/a.B/C", Some("application/grpc+proto"), None), Api::Grpc);
        assert_eq!(api("/a.B/C", Some("application/grpc-web-text"), Some("text/html")), Api::GrpcWeb);
        assert_eq!(api("/a.B/C", Some("application/grpcx"), None), Api::Http);
        assert_eq!(api("/events", None, Some("text/event-stream")), Api::EventStream);
        assert_eq!(api("/api/graphql", Some("application/json"), Some("application/json")), Api::GraphQl);
        assert_eq!(api("/api/graphql", None, Some("text/html")), Api::Http);
        assert_eq!(api("/jsonrpc", Some("application/json"), None), Api::JsonRpc);
        assert_eq!(api("/x", Some("application/json-rpc"), None), Api::JsonRpc);
    }
}
