//! gRPC: grpc-go's server and client, unary calls of 32 bytes at full speed.

use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::load::{Speed, free_port};
use crate::{run::Tied, setup, step};

/// A running server.
pub struct Server {
    _running: Tied,
    port: u16,
}

impl Server {
    /// Starts the server of `tests/programs/grpc` on a free loopback port.
    ///
    /// # Errors
    /// Its program is not built, or does not start.
    pub fn start() -> Result<Self> {
        let port = free_port()?;
        let mut running =
            Tied::start("the gRPC server", Command::new(setup::grpc_go()?).args(["serve", &port.to_string()]))?;
        ensure!(running.line()? == "ready", "the gRPC server did not start");
        Ok(Self { _running: running, port })
    }

    /// Full speed for `seconds`: 8 calls at a time on each of 4 connections.
    ///
    /// # Errors
    /// The client fails, or a call does.
    pub fn full_speed(&self, seconds: u64) -> Result<Speed> {
        let mut load = Command::new(setup::grpc_go()?);
        load.args(["load", &self.port.to_string(), &seconds.to_string()]).stdin(Stdio::null());
        let text = step::output(&mut load)?;
        let said: Value = serde_json::from_str(&text).with_context(|| format!("the client of gRPC said: {text}"))?;
        let number = |key: &str| {
            said.get(key).and_then(Value::as_f64).with_context(|| format!("the client of gRPC said no {key}"))
        };
        ensure!(number("failed")? == 0.0, "calls failed: {}", text.trim());
        Ok(Speed {
            requests: number("calls")? as u64,
            rate: number("rate")?,
            p50_us: number("p50_us")?,
            p99_us: number("p99_us")?,
        })
    }
}
