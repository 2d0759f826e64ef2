//! One client of the API server: where it is, who we are, one request.
//!
//! In a pod everything is where Kubernetes puts it: `KUBERNETES_SERVICE_HOST` and `_PORT`, a token that the
//! kubelet renews and a certificate under [`SECRETS`].

use std::{path::PathBuf, time::Duration};

use anyhow::{Context as _, bail};
use reqwest::{Certificate, Client, Response, StatusCode};

use crate::config::Kubernetes;

/// What the kubelet mounts into every pod.
pub const SECRETS: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// A server that does not accept a connection within this time is away.
const CONNECT: Duration = Duration::from_secs(5);
/// A server that acknowledges nothing for this long is gone: watches are silent for minutes otherwise.
const SILENCE: Duration = Duration::from_secs(30);
/// Nothing at all for this long ends a request: bookmarks come every minute, so a silent watch is broken.
const READ: Duration = Duration::from_secs(360);

/// Reaches one API server.
pub struct Api {
    client: Client,
    base: String,
    token: Option<PathBuf>,
}

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The state that was asked for is not kept any more: list again.
    #[error("the API server's history is too short")]
    Gone,
    /// The service account may not do this.
    #[error("the service account may not read {0}: give it the rights (the chart's ClusterRole has them)")]
    Forbidden(String),
    /// Anything else.
    #[error("{0:#}")]
    Other(#[from] anyhow::Error),
}

impl Api {
    /// By the configuration, else as in a pod.
    ///
    /// # Errors
    /// It is not known where the server is, or its certificate cannot be read.
    pub fn new(config: &Kubernetes) -> anyhow::Result<Self> {
        let base = match &config.server {
            Some(server) => server.trim_end_matches('/').to_owned(),
            None => in_cluster().context("kubernetes.server is not set, and this is no pod")?,
        };
        let in_pod = |name: &str| Some(PathBuf::from(SECRETS).join(name)).filter(|p| p.exists());
        let token = config.token_file.clone().or_else(|| in_pod("token"));
        let authority = config.ca_file.clone().or_else(|| in_pod("ca.crt"));
        let mut builder = Client::builder()
            .connect_timeout(CONNECT)
            .read_timeout(READ)
            .tcp_keepalive(SILENCE / 3)
            .tcp_user_timeout(SILENCE)
            .user_agent(concat!("apiscope/", env!("CARGO_PKG_VERSION")))
            // A token goes to the server that was named, and to no other.
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy();
        if let Some(path) = authority {
            let pem = std::fs::read(&path).with_context(|| format!("failed to read {}", path.display()))?;
            let certificates = Certificate::from_pem_bundle(&pem)
                .with_context(|| format!("{} holds no certificates", path.display()))?;
            builder = builder.tls_certs_only(certificates);
        }
        let client = builder.build().context("failed to make the Kubernetes client")?;
        Ok(Self { client, base, token })
    }

    /// Where the server is.
    #[must_use]
    pub fn base(&self) -> &str {
        &self.base
    }

    /// Asks for `path`; the answer's body is still to be read.
    ///
    /// # Errors
    /// As [`Failure`] tells.
    pub async fn get(&self, path: &str, accept: &str) -> Result<Response, Failure> {
        let mut request = self.client.get(format!("{}{path}", self.base)).header("accept", accept);
        // Never in plaintext: `kubectl proxy` and its like need none.
        if let Some(file) = self.token.as_ref().filter(|_| self.base.starts_with("https:")) {
            // Read each time: it is renewed every hour.
            let token = std::fs::read_to_string(file).with_context(|| format!("failed to read {}", file.display()))?;
            request = request.bearer_auth(token.trim());
        }
        let response = request.send().await.with_context(|| format!("{} does not answer", self.base))?;
        let what = path.split('?').next().unwrap_or(path);
        match response.status() {
            StatusCode::OK => Ok(response),
            StatusCode::GONE => Err(Failure::Gone),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Err(Failure::Forbidden(what.to_owned())),
            other => Err(anyhow::anyhow!("{}{what}: {other}", self.base).into()),
        }
    }
}

/// The server's address as every pod is told it.
#[must_use]
pub fn in_cluster() -> Option<String> {
    let variable = |name: &str| std::env::var(name).ok().filter(|v| !v.is_empty());
    let host = variable("KUBERNETES_SERVICE_HOST")?;
    let port = variable("KUBERNETES_SERVICE_PORT_HTTPS").or_else(|| variable("KUBERNETES_SERVICE_PORT"))?;
    let host = if host.contains(':') { format!("[{host}]") } else { host };
    Some(format!("https://{host}:{port}"))
}

/// Reads a body of at most `most` bytes.
///
/// # Errors
/// It is longer, or ends early.
pub async fn body(mut response: Response, most: usize) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    while let Some(chunk) = response.chunk().await.context("the answer broke off")? {
        if bytes.len() + chunk.len() > most {
            bail!("the answer is longer than {most} bytes");
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}
