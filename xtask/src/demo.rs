//! A sample shop with customers, so that a newcomer sees endpoints within seconds.
//!
//! Plain threads and the standard library: a server that answers just enough HTTP/1.1, and a few clients
//! with habits of their own (keep-alive or not, signed in or not, one that fails to sign in, one that
//! looks for files that are not there).

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::unix::process::CommandExt as _,
    process::Command,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use clap::Args;

use crate::run::Tied;

/// Longest wait on a socket.
const WAIT: Duration = Duration::from_millis(500);
/// A request of ours has no longer body.
const BODY: usize = 4096;

/// What a part is called: the agent names services by this variable of theirs.
const NAME: &str = "OTEL_SERVICE_NAME";

/// One part of the demo.
#[derive(Debug, Args)]
pub struct Options {
    /// Let the customers into the shop at this address; without it, be the shop.
    shop: Option<SocketAddr>,
}

/// The sample API and its clients, a process each; they end with the value, and with this process.
#[derive(Debug)]
pub struct Demo {
    address: SocketAddr,
    _parts: [Tied; 2],
}

/// One client's habit.
#[derive(Debug, Clone, Copy)]
struct Habit {
    pause: Duration,
    keep_alive: bool,
    token: Option<&'static str>,
    /// The n-th request: method, target, body.
    next: fn(&mut Dice) -> (&'static str, String, &'static str),
}

const HABITS: [Habit; 5] = [
    Habit { pause: Duration::from_millis(40), keep_alive: true, token: Some("shop-web"), next: browse },
    Habit { pause: Duration::from_millis(130), keep_alive: true, token: Some("mobile-app"), next: order },
    Habit { pause: Duration::from_millis(90), keep_alive: false, token: None, next: search },
    Habit { pause: Duration::from_millis(700), keep_alive: false, token: None, next: sign_in },
    Habit { pause: Duration::from_millis(1500), keep_alive: true, token: None, next: probe },
];

impl Demo {
    /// Opens a free loopback port and lets the customers in.
    ///
    /// # Errors
    /// A process cannot be started, or no port can be had.
    pub fn start() -> Result<Self> {
        let mut shop = part("shop", None)?;
        let address = shop.line()?.parse().context("no free loopback port for the sample API")?;
        let customers = part("customers", Some(address))?;
        Ok(Self { address, _parts: [shop, customers] })
    }

    /// Where the API listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

fn part(name: &str, shop: Option<SocketAddr>) -> Result<Tied> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("demo").args(shop.map(|a| a.to_string())).env(NAME, name);
    // A terminal's Ctrl-C is for the agent: what it traces ends after it.
    Tied::start(&format!("the demo's {name}"), command.process_group(0))
}

/// Is one part until standard input ends.
///
/// # Errors
/// No port or no thread can be had.
pub fn run(options: &Options) -> Result<()> {
    if let Some(shop) = options.shop {
        let_in(shop)?;
    } else {
        println!("{}", open()?);
    }
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink())?;
    Ok(())
}

/// The shop opens on a free loopback port.
fn open() -> Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("no free loopback port for the sample API")?;
    let address = listener.local_addr()?;
    thread::Builder::new().name("shop".to_owned()).spawn(move || {
        for (seed, stream) in listener.incoming().flatten().enumerate() {
            let served = move || serve(stream, &mut Dice::new(seed));
            thread::Builder::new().name("shop".to_owned()).spawn(served).ok();
        }
    })?;
    Ok(address)
}

/// Each habit becomes a customer of the shop.
fn let_in(shop: SocketAddr) -> Result<()> {
    for (seed, habit) in HABITS.into_iter().enumerate() {
        thread::Builder::new().name("customer".to_owned()).spawn(move || {
            let mut dice = Dice::new(seed);
            loop {
                // A refused or broken connection is tried again.
                visit(shop, habit, &mut dice);
                thread::sleep(habit.pause);
            }
        })?;
    }
    Ok(())
}

/// A linear congruential generator: the demo is the same each time.
struct Dice(u64);

impl Dice {
    /// Neighbouring seeds must not roll alike: each short connection takes the next one.
    fn new(seed: usize) -> Self {
        Self((seed as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15))
    }

    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }

    fn uuid(&mut self) -> String {
        let (a, b, c) = (self.roll(1 << 31), self.roll(1 << 16), self.roll(1 << 31));
        format!("{a:08x}-{b:04x}-4{:03x}-9{:03x}-{c:012x}", b & 0xfff, a & 0xfff)
    }
}

fn browse(dice: &mut Dice) -> (&'static str, String, &'static str) {
    match dice.roll(4) {
        0 => ("GET", format!("/users/{}", dice.roll(900) + 1), ""),
        1 => ("GET", format!("/users/{}/orders?page={}", dice.roll(900) + 1, dice.roll(5)), ""),
        _ => ("GET", format!("/products/{}", dice.roll(300) + 1), ""),
    }
}

fn order(dice: &mut Dice) -> (&'static str, String, &'static str) {
    match dice.roll(3) {
        0 => ("POST", "/orders".to_owned(), r#"{"product":17,"amount":2}"#),
        1 => ("PATCH", format!("/orders/{}", dice.uuid()), r#"{"amount":3}"#),
        _ => ("GET", format!("/orders/{}", dice.uuid()), ""),
    }
}

fn search(dice: &mut Dice) -> (&'static str, String, &'static str) {
    let words = ["lamp", "desk", "chair", "rug"];
    ("GET", format!("/search?q={}&sort=price", words[dice.roll(4) as usize]), "")
}

fn sign_in(_: &mut Dice) -> (&'static str, String, &'static str) {
    ("POST", "/login".to_owned(), r#"{"name":"demo"}"#)
}

fn probe(dice: &mut Dice) -> (&'static str, String, &'static str) {
    let paths = ["/.env", "/admin", "/users/1", "/backup.zip"];
    ("GET", paths[dice.roll(4) as usize].to_owned(), "")
}

/// One connection: requests until the server or the habit closes it.
fn visit(address: SocketAddr, habit: Habit, dice: &mut Dice) -> Option<()> {
    let stream = TcpStream::connect_timeout(&address, WAIT).ok()?;
    stream.set_nodelay(true).ok()?;
    stream.set_read_timeout(Some(WAIT)).ok()?;
    let mut answers = BufReader::new(stream.try_clone().ok()?);
    let mut stream = stream;
    loop {
        let (method, target, body) = (habit.next)(dice);
        let token = habit.token.map_or_else(String::new, |t| format!("Authorization: Bearer demo-{t}\r\n"));
        let connection = if habit.keep_alive { "keep-alive" } else { "close" };
        let request = format!(
            "{method} {target} HTTP/1.1\r\nHost: shop.example\r\nUser-Agent: demo/1\r\n{token}Connection: {connection}\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(request.as_bytes()).ok()?;
        let (_, length, _) = head(&mut answers)?;
        skip(&mut answers, length)?;
        if !habit.keep_alive {
            return Some(());
        }
        thread::sleep(habit.pause);
    }
}

/// Answers the requests of one connection. `None`: the other end is gone or does not speak HTTP.
fn serve(stream: TcpStream, dice: &mut Dice) -> Option<()> {
    stream.set_nodelay(true).ok()?;
    let mut requests = BufReader::new(stream.try_clone().ok()?);
    let mut stream = stream;
    loop {
        let (line, length, head) = head(&mut requests)?;
        skip(&mut requests, length)?;
        let mut words = line.split(' ');
        let (method, target) = (words.next()?, words.next()?);
        let path = target.split('?').next().unwrap_or(target);
        let signed_in = head.iter().any(|l| l.starts_with("authorization:"));
        let (status, body) = answer(method, path, signed_in, dice);
        let answer = format!(
            "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(answer.as_bytes()).ok()?;
        if head.iter().any(|l| l == "connection: close") {
            return Some(());
        }
    }
}

fn answer(method: &str, path: &str, signed_in: bool, dice: &mut Dice) -> (&'static str, String) {
    let first = path.split('/').nth(1).unwrap_or_default();
    let work = match first {
        "search" => 8 + dice.roll(20),
        "orders" => 2 + dice.roll(6),
        _ => dice.roll(3),
    };
    thread::sleep(Duration::from_millis(work));
    match (method, first) {
        ("POST", "login") if dice.roll(3) == 0 => ("401 Unauthorized", r#"{"error":"wrong password"}"#.to_owned()),
        ("POST", "login") => ("200 OK", r#"{"token":"demo"}"#.to_owned()),
        (_, "users" | "orders" | "products") if !signed_in => ("401 Unauthorized", r#"{"error":"sign in"}"#.to_owned()),
        (_, "orders") if dice.roll(25) == 0 => ("500 Internal Server Error", r#"{"error":"out of stock"}"#.to_owned()),
        ("POST", "orders") => ("201 Created", format!(r#"{{"id":"{}"}}"#, dice.uuid())),
        ("GET" | "PATCH", "users" | "orders" | "products") => {
            ("200 OK", format!(r#"{{"items":"{}"}}"#, "x".repeat(dice.roll(600) as usize)))
        }
        ("GET", "search") => ("200 OK", format!(r#"{{"found":{}}}"#, dice.roll(50))),
        _ => ("404 Not Found", r#"{"error":"not found"}"#.to_owned()),
    }
}

/// First line, Content-Length and the other lines in lower case.
fn head(from: &mut BufReader<TcpStream>) -> Option<(String, usize, Vec<String>)> {
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        // Bounded: a head of this demo has a dozen short lines.
        if from.by_ref().take(8192).read_line(&mut line).ok()? == 0 || lines.len() > 64 {
            return None;
        }
        let line = line.trim_end();
        if line.is_empty() {
            break;
        }
        lines.push(line.to_owned());
    }
    if lines.is_empty() {
        return None;
    }
    let first = lines.remove(0);
    let lines: Vec<String> = lines.into_iter().map(|l| l.to_ascii_lowercase()).collect();
    let length = lines.iter().find_map(|l| l.strip_prefix("content-length:")?.trim().parse().ok()).unwrap_or(0);
    Some((first, length, lines))
}

fn skip(from: &mut BufReader<TcpStream>, length: usize) -> Option<()> {
    let mut body = vec![0; length.min(BODY)];
    from.read_exact(&mut body).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shop_answers_each_habit() {
        let shop = open().expect("opens");
        for habit in HABITS {
            let mut dice = Dice::new(1);
            assert!(visit(shop, Habit { keep_alive: false, ..habit }, &mut dice).is_some());
        }
    }
}
