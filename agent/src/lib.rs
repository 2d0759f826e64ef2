//! apiscope: kernel hooks see the first bytes of every request and response on every socket of a
//! node; one agent turns them into exchanges, learns the routes, keeps per-endpoint access patterns
//! and exports OpenTelemetry.
pub mod accesslog;
pub mod aggregate;
pub mod config;
pub mod conn;
pub mod doctor;
pub mod event;
pub mod exchange;
pub mod export;
pub mod identity;
pub mod local;
pub mod pipeline;
pub mod probe;
pub mod proto;
pub mod recording;
pub mod replay;
pub mod route;
pub mod stats;
pub mod table;
