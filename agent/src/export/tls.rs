//! TLS to the collector, by the standard variables that the exporters do not read themselves:
//! `OTEL_EXPORTER_OTLP_CERTIFICATE`, `_CLIENT_CERTIFICATE` and `_CLIENT_KEY`, each also with a signal
//! (`OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE`). Files in PEM. Without a certificate the system's roots count.

use opentelemetry_otlp::tonic_types::transport::{Certificate, ClientTlsConfig, Identity};

use super::{WrongVariable, variable};

/// What TLS to the collector of one signal needs.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Tls {
    authority: Option<Vec<u8>>,
    /// Certificate and key of the agent.
    own: Option<(Vec<u8>, Vec<u8>)>,
    https: bool,
}

impl Tls {
    /// Of a signal: `METRICS`, `TRACES`, `LOGS`.
    ///
    /// # Errors
    /// A file cannot be read, or a certificate is there without its key.
    pub fn from_environment(signal: &str) -> anyhow::Result<Self> {
        let value = |what: &str| {
            let own = format!("OTEL_EXPORTER_OTLP_{signal}_{what}");
            variable(&own).map(|v| (own, v)).or_else(|| {
                let name = format!("OTEL_EXPORTER_OTLP_{what}");
                variable(&name).map(|v| (name, v))
            })
        };
        let file = |what: &str| -> anyhow::Result<Option<Vec<u8>>> {
            let Some((name, path)) = value(what) else { return Ok(None) };
            let bytes = std::fs::read(&path)
                .map_err(|e| WrongVariable(format!("{name} is `{path}`, which cannot be read: {e}")))?;
            Ok(Some(bytes))
        };
        let own = match (file("CLIENT_CERTIFICATE")?, file("CLIENT_KEY")?) {
            (Some(certificate), Some(key)) => Some((certificate, key)),
            (None, None) => None,
            _ => {
                let needed = "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE and OTEL_EXPORTER_OTLP_CLIENT_KEY";
                return Err(WrongVariable(format!("of {needed} one is set: mutual TLS needs both")).into());
            }
        };
        let https = value("ENDPOINT").is_some_and(|(_, url)| url.starts_with("https:"));
        Ok(Self { authority: file("CERTIFICATE")?, own, https })
    }

    /// For gRPC; `None` where the endpoint speaks plaintext.
    #[must_use]
    pub fn grpc(&self) -> Option<ClientTlsConfig> {
        if !self.https {
            return None;
        }
        let mut config = match &self.authority {
            Some(pem) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem)),
            None => ClientTlsConfig::new().with_native_roots(),
        };
        if let Some((certificate, key)) = &self.own {
            config = config.identity(Identity::from_pem(certificate, key));
        }
        Some(config)
    }

    /// For HTTP; `None` where the exporter's own client does.
    ///
    /// # Errors
    /// A file holds no certificate or no key.
    pub fn http(&self) -> anyhow::Result<Option<reqwest::Client>> {
        if self.authority.is_none() && self.own.is_none() {
            return Ok(None);
        }
        let wrong = |what: &str| {
            let what = what.to_owned();
            move |e: reqwest::Error| WrongVariable(format!("the file of OTEL_EXPORTER_OTLP_{what} is not PEM: {e}"))
        };
        let mut builder = reqwest::Client::builder();
        if let Some(pem) = &self.authority {
            let all = reqwest::Certificate::from_pem_bundle(pem).map_err(wrong("CERTIFICATE"))?;
            if all.is_empty() {
                return Err(
                    WrongVariable("the file of OTEL_EXPORTER_OTLP_CERTIFICATE holds no certificate".into()).into()
                );
            }
            builder = builder.tls_certs_only(all);
        }
        if let Some((certificate, key)) = &self.own {
            let both = [certificate.as_slice(), b"\n", key.as_slice()].concat();
            builder = builder.identity(reqwest::Identity::from_pem(&both).map_err(wrong("CLIENT_CERTIFICATE"))?);
        }
        Ok(Some(builder.build().map_err(wrong("CERTIFICATE"))?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plaintext_needs_nothing_and_wrong_files_are_named() {
        let none = Tls::default();
        assert!(none.grpc().is_none() && none.http().expect("nothing to read").is_none());
        let system = Tls { https: true, ..Tls::default() };
        assert!(system.grpc().is_some() && system.http().expect("nothing to read").is_none());
        let wrong = Tls { authority: Some(b"not PEM".to_vec()), https: true, own: None };
        let error = wrong.http().expect_err("no certificate").to_string();
        assert!(error.contains("OTEL_EXPORTER_OTLP_CERTIFICATE"), "{error}");
    }
}
