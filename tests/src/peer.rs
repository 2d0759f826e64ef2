//! Two ends of scripted connections, in two threads: each sends, or reads exactly as many bytes as the
//! other sends.

use std::{
    io::{self, IoSlice, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    os::{
        fd::{AsRawFd as _, RawFd},
        unix::net::{UnixListener, UnixStream},
    },
    thread,
    time::Duration,
};

/// One step of a connection.
#[derive(Debug, Clone)]
pub enum Step {
    /// The client (true) or the server sends these bytes, in pieces of at most so many, by this call.
    Send(bool, Vec<u8>, usize, Call),
    /// That end sleeps.
    Sleep(bool, Duration),
    /// That end closes.
    Close(bool),
    /// That end resets the connection.
    Reset(bool),
    /// That end sends no more.
    Shutdown(bool),
    /// That end reads until the other has no more to send.
    ReadEnd(bool),
}

/// System call that sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the calls' own names")]
pub enum Call {
    Write,
    Writev,
    Send,
    Sendmsg,
    Sendfile,
}

impl Step {
    /// The client sends.
    pub fn client(bytes: impl Into<Vec<u8>>) -> Self {
        Self::Send(true, bytes.into(), usize::MAX, Call::Write)
    }

    /// The server sends.
    pub fn server(bytes: impl Into<Vec<u8>>) -> Self {
        Self::Send(false, bytes.into(), usize::MAX, Call::Write)
    }

    /// In pieces of so many bytes.
    #[must_use]
    pub fn split(self, size: usize) -> Self {
        match self {
            Self::Send(who, bytes, _, call) => Self::Send(who, bytes, size, call),
            other => other,
        }
    }

    /// By another call.
    #[must_use]
    pub fn by(self, call: Call) -> Self {
        match self {
            Self::Send(who, bytes, size, _) => Self::Send(who, bytes, size, call),
            other => other,
        }
    }
}

enum Connection {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Connection {
    fn fd(&self) -> RawFd {
        match self {
            Self::Tcp(s) => s.as_raw_fd(),
            Self::Unix(s) => s.as_raw_fd(),
        }
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(s) => s.read(buffer),
            Self::Unix(s) => s.read(buffer),
        }
    }

    fn send(&mut self, bytes: &[u8], call: Call) -> io::Result<usize> {
        let fd = self.fd();
        let checked = |n: isize| usize::try_from(n).map_err(|_| io::Error::last_os_error());
        match (call, self) {
            (Call::Write, Self::Tcp(s)) => s.write(bytes),
            (Call::Write, Self::Unix(s)) => s.write(bytes),
            (Call::Writev, connection) => {
                let (a, rest) = bytes.split_at(bytes.len() / 3);
                let (b, c) = rest.split_at(rest.len() / 2);
                let parts = [IoSlice::new(a), IoSlice::new(b), IoSlice::new(c)];
                match connection {
                    Self::Tcp(s) => s.write_vectored(&parts),
                    Self::Unix(s) => s.write_vectored(&parts),
                }
            }
            (Call::Send, _) => {
                // SAFETY: pointer and length of a live slice.
                checked(unsafe { libc::send(fd, bytes.as_ptr().cast(), bytes.len(), libc::MSG_NOSIGNAL) })
            }
            (Call::Sendmsg, _) => {
                let cut = 1.min(bytes.len());
                let mut parts = [&bytes[..cut], &bytes[cut..]]
                    .map(|p| libc::iovec { iov_base: p.as_ptr().cast_mut().cast(), iov_len: p.len() });
                // SAFETY: plain data, zero is valid.
                let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
                message.msg_iov = parts.as_mut_ptr();
                message.msg_iovlen = 2;
                // SAFETY: as above.
                checked(unsafe { libc::sendmsg(fd, &raw const message, libc::MSG_NOSIGNAL) })
            }
            (Call::Sendfile, _) => {
                let path = std::env::temp_dir().join(format!("apiscope-sendfile-{}-{fd}", std::process::id()));
                std::fs::write(&path, bytes)?;
                let file = std::fs::File::open(&path)?;
                std::fs::remove_file(&path)?;
                // SAFETY: two open descriptors, no offset.
                checked(unsafe { libc::sendfile(fd, file.as_raw_fd(), std::ptr::null_mut(), bytes.len()) })
            }
        }
    }
}

fn run(client: bool, mut connection: Connection, steps: &[Step]) {
    for step in steps {
        match step {
            Step::Send(who, bytes, size, call) if *who == client => {
                for piece in bytes.chunks((*size).min(bytes.len().max(1))) {
                    let mut rest = piece;
                    while !rest.is_empty() {
                        match connection.send(rest, *call) {
                            Ok(n) => rest = &rest[n..],
                            Err(_) => return,
                        }
                    }
                }
            }
            Step::Send(_, bytes, ..) => {
                let mut left = bytes.len();
                let mut buffer = vec![0; 65_536];
                while left > 0 {
                    let room = left.min(buffer.len());
                    match connection.read(&mut buffer[..room]) {
                        Ok(0) | Err(_) => break,
                        Ok(n) => left -= n,
                    }
                }
            }
            Step::Sleep(who, time) if *who == client => thread::sleep(*time),
            Step::Close(who) if *who == client => return,
            Step::ReadEnd(who) if *who == client => while connection.read(&mut [0; 4096]).is_ok_and(|n| n > 0) {},
            Step::Shutdown(who) if *who == client => {
                // SAFETY: an open socket.
                unsafe { libc::shutdown(connection.fd(), libc::SHUT_WR) };
            }
            Step::Reset(who) if *who == client => {
                let linger = libc::linger { l_onoff: 1, l_linger: 0 };
                // SAFETY: an open socket and a struct of the size that is named.
                unsafe {
                    libc::setsockopt(
                        connection.fd(),
                        libc::SOL_SOCKET,
                        libc::SO_LINGER,
                        (&raw const linger).cast(),
                        libc::socklen_t::try_from(size_of::<libc::linger>()).expect("small"),
                    );
                }
                return;
            }
            _ => {}
        }
    }
}

/// Plays a connection at an address of its own: `127.0.0.1:0`, `[::1]:0` or `unix:PATH`. Returns the
/// address as the agent names it.
pub fn play(address: &str, steps: &[Step]) -> String {
    play_many(address, &[steps.to_vec()])
}

/// Plays several connections at once at one address.
///
/// # Panics
/// The address cannot be had.
pub fn play_many(address: &str, sessions: &[Vec<Step>]) -> String {
    // What is sent before the agent is there is not seen.
    crate::Agent::shared();
    perform(address, sessions)
}

/// As [`play_many`], whichever agents there are.
///
/// # Panics
/// The address cannot be had.
pub fn perform(address: &str, sessions: &[Vec<Step>]) -> String {
    if let Some(path) = address.strip_prefix("unix:") {
        let listener = UnixListener::bind(path).expect("a free path");
        let mut threads = Vec::new();
        for steps in sessions {
            let client = UnixStream::connect(path).expect("a listener");
            let (server, _) = listener.accept().expect("a client");
            for (who, stream) in [(true, client), (false, server)] {
                let steps = steps.clone();
                threads.push(thread::spawn(move || run(who, Connection::Unix(stream), &steps)));
            }
        }
        threads.into_iter().for_each(|t| t.join().expect("a peer that does not panic"));
        std::fs::remove_file(path).expect("its own path");
        return address.to_owned();
    }
    let listener = match address.parse::<SocketAddr>() {
        Ok(any) if any.port() == 0 => TcpListener::bind((any.ip(), crate::free_port())),
        _ => TcpListener::bind(address),
    };
    let listener = listener.expect("a free port");
    let address = listener.local_addr().expect("an address");
    let mut threads = Vec::new();
    for steps in sessions {
        let client = TcpStream::connect(address).expect("a listener");
        let (server, _) = listener.accept().expect("a client");
        for (who, stream) in [(true, client), (false, server)] {
            stream.set_nodelay(true).expect("a TCP socket");
            let steps = steps.clone();
            threads.push(thread::spawn(move || run(who, Connection::Tcp(stream), &steps)));
        }
    }
    threads.into_iter().for_each(|t| t.join().expect("a peer that does not panic"));
    address.to_string()
}
