//! Access logs in the common and combined formats of nginx and Apache -> exchanges. What a log does not
//! say stays unknown: durations and sizes are 0.

use std::net::IpAddr;

use crate::{
    exchange::{Auth, Exchange, MAX_USER_AGENT, Peer},
    proto::http1,
};

/// Reads one line: `ADDRESS - USER [TIME] "REQUEST" STATUS BYTES "REFERRER" "AGENT"`.
///
/// # Errors
/// Says which part is missing or wrong.
pub fn parse(line: &[u8], service: &str) -> Result<Exchange, &'static str> {
    let line = std::str::from_utf8(line).map_err(|_| "not UTF-8")?;
    let (client, rest) = line.split_once(' ').ok_or("no client address")?;
    let (names, rest) = rest.split_once('[').ok_or("no time")?;
    let (time, rest) = rest.split_once("] \"").ok_or("no time")?;
    let user = names.split_ascii_whitespace().nth(1).unwrap_or("-");
    let (request, rest) = quoted(rest).ok_or("no request")?;
    let mut numbers = rest.split_ascii_whitespace();
    let status: u16 = numbers.next().and_then(|s| s.parse().ok()).ok_or("no status")?;
    let bytes = numbers.next().and_then(|s| s.parse().ok()).unwrap_or(0);
    let agent = rest.rsplit('"').nth(1).filter(|a| *a != "-" && rest.contains('"'));
    let parsed =
        http1::request(format!("{request}\r\n\r\n").as_bytes()).ok_or("the request is no HTTP/1 request line")?;
    let client: Option<IpAddr> = client.parse().ok();
    Ok(Exchange {
        ts: timestamp(time).ok_or("the time is not understood")?,
        service: service.into(),
        method: parsed.method,
        path: Some(parsed.path),
        query_keys: parsed.query_keys,
        protocol: parsed.protocol,
        status,
        response_body_bytes: Some(bytes),
        client: client.map_or(Peer::Unknown, |ip| Peer::Ip((ip.to_canonical(), 0).into())),
        auth: if user == "-" { Auth::None } else { Auth::Basic },
        user_agent: agent.map(|a| a.chars().take(MAX_USER_AGENT).collect::<String>().into()),
        ..Exchange::default()
    })
}

/// The text up to the closing quote, with `\"` in it, and what follows.
fn quoted(text: &str) -> Option<(&str, &str)> {
    let mut escaped = false;
    for (i, b) in text.bytes().enumerate() {
        match b {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => return Some((&text[..i], &text[i + 1..])),
            _ => {}
        }
    }
    None
}

/// `10/Oct/2000:13:55:36 -0700` as ns since the epoch.
fn timestamp(text: &str) -> Option<u64> {
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let (date, zone) = text.split_once(' ')?;
    let mut parts = date.split(['/', ':']);
    let day: i64 = parts.next()?.parse().ok()?;
    let name = parts.next()?;
    let month = i64::try_from(MONTHS.iter().position(|m| *m == name)?).ok()? + 1;
    let mut number = || parts.next()?.parse::<i64>().ok();
    let (year, hour, minute, second) = (number()?, number()?, number()?, number()?);
    let all = [(day, 1..=31), (year, 1970..=9999), (hour, 0..=23), (minute, 0..=59), (second, 0..=60)];
    if all.iter().any(|(n, may)| !may.contains(n)) {
        return None;
    }
    // Zones are at most 14 hours from UTC.
    let offset: i64 = zone.parse().ok().filter(|z| (-1459..=1459).contains(z))?;
    let offset = (offset / 100 * 60 + offset % 100) * 60;
    // Days from civil (Hinnant, chrono-compatible low-level date algorithms).
    let shifted = if month <= 2 { year - 1 } else { year };
    let (era, march) = (shifted.div_euclid(400), (month + 9) % 12);
    let of_era = shifted.rem_euclid(400);
    let of_year = (153 * march + 2) / 5 + day - 1;
    let days = era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468;
    let seconds = days * 86_400 + hour * 3_600 + minute * 60 + second - offset;
    u64::try_from(seconds).ok()?.checked_mul(1_000_000_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_combined_line() {
        let line = br#"203.0.113.9 - frank [10/Oct/2000:13:55:36 -0700] "GET /users/42?a=1 HTTP/1.1" 200 2326 "http://x/" "Mozilla \"5\"""#;
        let e = parse(line, "web").expect("readable");
        assert_eq!((e.ts, e.path.as_deref(), e.status), (971_211_336_000_000_000, Some("/users/42"), 200));
        assert_eq!((e.client.to_string().as_str(), e.auth), ("203.0.113.9:0", Auth::Basic));
    }

    #[test]
    fn a_common_line_and_bad_ones() {
        assert!(parse(br#"::1 - - [01/Jan/2024:00:00:00 +0000] "GET / HTTP/1.0" 304 -"#, "w").is_ok());
        for bad in [
            "",
            "x",
            r#"1.1.1.1 - - [x] "GET / HTTP/1.1" 200 1"#,
            r#"1.1.1.1 - - [01/Jan/2024:00:00:00 +9999999999999999999] "GET / HTTP/1.1" 200 1"#,
            r#"1.1.1.1 - - [01/Jan/2024:00:00:00 -0799999999999] "GET / HTTP/1.1" 200 1"#,
            r#"1.1.1.1 - - [01/Jan/2024:-9223372036854775807:00:00 +0000] "GET / HTTP/1.1" 200 1"#,
            r#"1.1.1.1 - - [01/Jan/2024:00:00:00 +0000] "\x16\x03" 400 1"#,
        ] {
            assert!(parse(bad.as_bytes(), "w").is_err(), "{bad}");
        }
    }

    proptest::proptest! {
        #[test]
        fn never_panics(line in ".{0,200}", time in ".{0,40}") {
            let _ = parse(line.as_bytes(), "w");
            let _ = timestamp(&time);
        }
    }
}
