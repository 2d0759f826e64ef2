//! apiscope: kernel hooks see the first bytes of every request and response on every socket of a
//! node; one agent turns them into exchanges, learns the routes, keeps per-endpoint access patterns
//! and exports OpenTelemetry.
pub mod aggregate;
pub mod conn;
pub mod event;
pub mod exchange;
pub mod identity;
pub mod probe;
pub mod proto;
pub mod stats;
