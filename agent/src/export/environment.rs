//! The standard variables that the exporters read themselves, looked at before they do: theirs is to pass
//! over what they do not understand, ours is to say it at the start.

use std::{fs::File, path::Path};

/// A variable that says what cannot be: wrong configuration, not a failure.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0}")]
pub struct WrongVariable(pub String);

/// Signals with variables of their own.
const SIGNALS: [&str; 3] = ["METRICS", "TRACES", "LOGS"];

/// Holds every variable of the exporters against what it may be.
///
/// # Errors
/// [`WrongVariable`] names the first that is wrong, and what it may be.
pub fn check(variable: impl Fn(&str) -> Option<String>) -> Result<(), WrongVariable> {
    let hold = |name: &str, may: &str, good: &dyn Fn(&str) -> bool| match variable(name) {
        Some(value) if !good(value.trim()) => Err(WrongVariable(format!("{name} is `{value}`: it must be {may}"))),
        _ => Ok(()),
    };
    for signal in SIGNALS {
        hold(&format!("OTEL_{signal}_EXPORTER"), "otlp or none", &|v| matches!(v, "otlp" | "none"))?;
    }
    for infix in ["", "METRICS_", "TRACES_", "LOGS_"] {
        let name = |rest: &str| format!("OTEL_EXPORTER_OTLP_{infix}{rest}");
        hold(&name("ENDPOINT"), "a URL that begins with http:// or https://", &|v| {
            let lower = v.to_ascii_lowercase();
            lower.starts_with("http://") || lower.starts_with("https://")
        })?;
        hold(&name("TIMEOUT"), "a number of milliseconds", &|v| v.parse::<u64>().is_ok())?;
        hold(&name("COMPRESSION"), "gzip or none", &|v| matches!(v, "gzip" | "none"))?;
        if let Some(headers) = variable(&name("HEADERS"))
            && headers
                .split(',')
                .any(|h| !h.trim().is_empty() && h.split_once('=').is_none_or(|(k, _)| k.trim().is_empty()))
        {
            // Headers carry credentials: their values are not repeated.
            return Err(WrongVariable(format!("{} is not a list of name=value, separated by commas", name("HEADERS"))));
        }
        for file in ["CERTIFICATE", "CLIENT_CERTIFICATE", "CLIENT_KEY"] {
            let name = name(file);
            if let Some(path) = variable(&name)
                && let Err(e) = File::open(Path::new(path.trim()))
            {
                return Err(WrongVariable(format!("{name} is `{path}`, which cannot be read: {e}")));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(name: &str, value: &str) -> Result<(), WrongVariable> {
        check(|asked| (asked == name).then(|| value.to_owned()))
    }

    #[test]
    fn what_may_be_and_what_may_not() {
        for (name, good, bad) in [
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318", "collector:4318"),
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "https://c/v1/traces", "ftp://c"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "500", "5s"),
            ("OTEL_EXPORTER_OTLP_METRICS_COMPRESSION", "gzip", "zip"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "a=b, c=d=e,", "a b"),
            ("OTEL_METRICS_EXPORTER", "none", "prometheus"),
            ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/dev/null", "/no/such/file"),
        ] {
            assert_eq!(with(name, good), Ok(()), "{name}={good}");
            let error = with(name, bad).expect_err(bad).to_string();
            assert!(error.contains(name), "{error}");
        }
        let secret = with("OTEL_EXPORTER_OTLP_HEADERS", "authorization secret").expect_err("no =").to_string();
        assert!(!secret.contains("secret"), "{secret}");
    }
}
