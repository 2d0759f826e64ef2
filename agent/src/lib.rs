//! apiscope: kernel hooks see the heads of every HTTP message on every socket of a node; one agent turns
//! them into exchanges, finds their routes, keeps per-endpoint access patterns and exports OpenTelemetry.
//!
//! # The way of a request
//! `probe` (loads the eBPF programs, reads their ring) -> `event` (wire records) -> `conn` (requests meet
//! responses) with `proto` (heads) and `identity` (processes) -> [`exchange::Exchange`] -> `route` ->
//! `aggregate` -> `table`, `local`, `export`, `recording`. `replay` and `accesslog` enter at the exchange.
//! `kubernetes` tells `identity` which pod a container and an address belong to.
//! `pipeline` puts it all together and is imported by nothing.
//!
//! # Where the framing is done
//! In the kernel (`agent-ebpf/src/http1.rs`, `body.rs`): it must know where bodies are in order not to copy
//! them, so it follows Content-Length, chunks, interim and bodyless responses to the byte, and tells the
//! agent each message's sizes and times. User space reads heads only, and never has to guess an end. State
//! lives in the socket (`sk_storage`): no table of descriptors, no eviction, gone with the socket.
//!
//! # Invariants (`cargo xtask tidy`)
//! - `aya` only in `probe`; `opentelemetry` only in `export`; imports point down the way above.
//! - Nothing below `proto` sees a credential, cookie, query value or body byte.
//! - Everything that grows has a bound, and a counter for what does not fit ([`stats`]).
//! - Nothing here panics on what comes from outside; nothing is lost without being counted.
pub mod accesslog;
pub mod aggregate;
pub mod authorization;
pub mod config;
pub mod conn;
pub mod coverage;
pub mod cyclonedx;
pub mod detect;
pub mod doctor;
pub mod event;
pub mod exchange;
pub mod export;
pub mod identity;
pub mod inventory;
pub mod kubernetes;
pub mod local;
pub mod openapi;
pub mod params;
pub mod pipeline;
pub mod probe;
pub mod proto;
pub mod recording;
pub mod replay;
pub mod report;
pub mod route;
pub mod scrape;
pub mod simulate;
pub mod stats;
pub mod status;
pub mod stream;
pub mod table;
