//! Calls of every kind by tonic, both ends in this process, without generated code: messages are bytes.

use std::{
    convert::Infallible,
    future::Future,
    net::SocketAddr,
    path::Path,
    pin::Pin,
    time::{Duration, Instant},
};

use serde::Deserialize;
use tonic::{
    Code, Request, Response, Status, Streaming,
    body::Body,
    client::Grpc,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    codegen::{BoxFuture, BoxStream, Bytes, Context, Poll, Service, http, tokio_stream},
    server::{self, StreamingService},
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity, Server, ServerTlsConfig},
};

/// A call as its client says that it was.
#[derive(Debug, Clone, Deserialize)]
pub struct Called {
    /// `/SERVICE/METHOD`.
    pub path: String,
    /// Status of gRPC.
    pub status: u32,
    /// Messages sent.
    pub sent: u64,
    /// Messages got.
    pub got: u64,
    /// Bytes of the messages that were sent, with their five bytes each.
    pub request: u64,
    /// As `request`, of those that were got.
    pub answer: u64,
}

/// Starts a server, makes some calls, two dozen of them at once, and says what was called, at which address. With
/// the folder of a certificate it is inside TLS.
///
/// # Panics
/// An end fails.
#[must_use]
pub fn tonic(certificate: Option<&Path>) -> (String, Vec<Called>) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("threads");
    let address = SocketAddr::from(([127, 0, 0, 1], crate::free_port()));
    let calls = runtime.block_on(async {
        let mut server = Server::builder();
        let scheme = if certificate.is_some() { "https" } else { "http" };
        let mut client = Endpoint::from_shared(format!("{scheme}://{address}")).expect("an address");
        if let Some(folder) = certificate {
            let read = |name: &str| std::fs::read(folder.join(name)).expect("a certificate");
            let identity = Identity::from_pem(read("cert.pem"), read("key.pem"));
            server = server.tls_config(ServerTlsConfig::new().identity(identity)).expect("a certificate");
            let trusted = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read("cert.pem")));
            client = client.tls_config(trusted.domain_name("localhost")).expect("a certificate");
        }
        let server = tokio::spawn(server.serve(address, Echo));
        let end = Instant::now() + Duration::from_secs(10);
        let channel = loop {
            match client.connect().await {
                Ok(channel) => break channel,
                Err(e) => assert!(Instant::now() < end, "no server: {e}"),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        let mut tasks = Vec::new();
        for i in 0..4_u8 {
            let n = usize::from(i);
            for (method, sizes) in [
                ("Unary", vec![n * 1000]),
                ("Fail", vec![n + 1]),
                ("Many", vec![n * 20]),
                ("Collect", vec![n; n * 30]),
                ("Chat", vec![0, 700, n]),
                ("Late", vec![n]),
            ] {
                tasks.push(tokio::spawn(call(channel.clone(), method, sizes)));
            }
        }
        let mut calls = Vec::new();
        for task in tasks {
            calls.push(task.await.expect("a call"));
        }
        // Messages over several frames, side by side on more streams than the kernel side has places for.
        let large: Vec<_> =
            (0..12).map(|i| tokio::spawn(call(channel.clone(), "Chat", vec![i, 70_000 + i, 1]))).collect();
        for task in large {
            calls.push(task.await.expect("a call"));
        }
        drop(channel);
        server.abort();
        calls
    });
    runtime.shutdown_timeout(Duration::from_secs(2));
    (address.to_string(), calls)
}

async fn call(channel: Channel, method: &str, sizes: Vec<usize>) -> Called {
    let path = format!("/rs.Echo/{method}");
    let mut called = Called {
        sent: sizes.len() as u64,
        request: sizes.iter().map(|n| *n as u64 + 5).sum(),
        path: path.clone(),
        status: 0,
        got: 0,
        answer: 0,
    };
    let mut client = Grpc::new(channel);
    client.ready().await.expect("a connection");
    let messages = tokio_stream::iter(sizes.into_iter().map(|n| vec![7; n]));
    let path = http::uri::PathAndQuery::try_from(path).expect("a path");
    match client.streaming(Request::new(messages), path, Raw).await {
        Err(status) => called.status = status.code() as u32,
        Ok(answer) => {
            let mut messages: Streaming<Vec<u8>> = answer.into_inner();
            loop {
                match messages.message().await {
                    Ok(Some(message)) => {
                        called.got += 1;
                        called.answer += message.len() as u64 + 5;
                    }
                    Ok(None) => break,
                    Err(status) => {
                        called.status = status.code() as u32;
                        break;
                    }
                }
            }
        }
    }
    called
}

/// Bytes as they are.
#[derive(Debug, Clone, Copy, Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, item: Vec<u8>, out: &mut EncodeBuf<'_>) -> Result<(), Status> {
        bytes::BufMut::put_slice(out, &item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        let bytes: Bytes = bytes::Buf::copy_to_bytes(from, bytes::Buf::remaining(from));
        Ok(Some(bytes.to_vec()))
    }
}

/// The server: what it does is in the path.
#[derive(Debug, Clone, Copy)]
struct Echo;

impl Service<http::Request<Body>> for Echo {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let method = request.uri().path().rsplit('/').next().unwrap_or_default().to_owned();
        Box::pin(async move { Ok(server::Grpc::new(Raw).streaming(Answer(method), request).await) })
    }
}

struct Answer(String);

impl StreamingService<Vec<u8>> for Answer {
    type Response = Vec<u8>;
    type ResponseStream = BoxStream<Vec<u8>>;
    type Future = Pin<Box<dyn Future<Output = Result<Response<BoxStream<Vec<u8>>>, Status>> + Send>>;

    fn call(&mut self, request: Request<Streaming<Vec<u8>>>) -> Self::Future {
        let method = std::mem::take(&mut self.0);
        Box::pin(async move {
            let mut from = request.into_inner();
            let mut got = Vec::new();
            while let Some(message) = from.message().await? {
                got.push(message);
            }
            let first = got.first().map_or(0, Vec::len);
            let numbered = |n: usize| (0..n).map(|i| Ok(vec![1; i])).collect::<Vec<_>>();
            let answer: Vec<Result<Vec<u8>, Status>> = match method.as_str() {
                "Unary" | "Chat" => got.into_iter().map(Ok).collect(),
                "Many" => numbered(first),
                "Collect" => vec![Ok(vec![1; got.len()])],
                "Late" => numbered(first).into_iter().chain([Err(Status::aborted("after its messages"))]).collect(),
                _ => return Err(Status::new(Code::from_i32(i32::try_from(first).unwrap_or(2)), "as asked for")),
            };
            Ok(Response::new(Box::pin(tokio_stream::iter(answer)) as BoxStream<Vec<u8>>))
        })
    }
}
