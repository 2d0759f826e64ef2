//! An HTTP/1 server that takes what is posted to it: where collectors and exporters send to in tests.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    sync::Arc,
};

/// Starts one on a free loopback port, which is returned, and hands each path and body to `take`. Answers 200 with a
/// body of a media type. It lasts as long as the process.
///
/// # Panics
/// There is no free port.
pub fn start(media_type: &str, answer: &str, take: impl Fn(&str, Vec<u8>) + Send + Sync + 'static) -> u16 {
    let listener = crate::listener("127.0.0.1");
    let port = listener.local_addr().expect("an address").port();
    let size = answer.len();
    let answer = format!("HTTP/1.1 200 OK\r\nContent-Type: {media_type}\r\nContent-Length: {size}\r\n\r\n{answer}");
    let shared = Arc::new((take, answer));
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let shared = shared.clone();
            std::thread::spawn(move || while serve(&stream, &shared.0, &shared.1).is_some() {});
        }
    });
    port
}

/// One request; `None` when the connection is over.
fn serve(mut stream: &TcpStream, take: &impl Fn(&str, Vec<u8>), answer: &str) -> Option<()> {
    let mut reader = BufReader::new(stream);
    let (mut path, mut length) = (String::new(), 0);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).ok()? == 0 {
            return None;
        }
        if path.is_empty() {
            path = line.split(' ').nth(1)?.to_owned();
        }
        let line = line.trim_end().to_ascii_lowercase();
        if let Some(value) = line.strip_prefix("content-length:") {
            length = value.trim().parse().ok()?;
        }
        if line.is_empty() {
            break;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    take(&path, body);
    stream.write_all(answer.as_bytes()).ok()
}
