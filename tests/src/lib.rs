//! What the end-to-end tests share: the built agent under test, scripted peers that send byte for byte
//! what a test says, and the comparison of what was sent with what was seen.
//!
//! The agent needs root; without it the tests fail and say so. One agent serves all tests of a binary:
//! each test has a server address of its own and looks only at exchanges there.

use std::{
    net::TcpListener,
    ops::Range,
    os::{
        fd::IntoRawFd as _,
        linux::net::SocketAddrExt as _,
        unix::net::{SocketAddr, UnixDatagram},
    },
    sync::atomic::{AtomicU16, Ordering},
};

pub mod agent;
pub mod apiserver;
pub mod fuzz;
pub mod peer;
pub mod process;
pub mod rpc;
pub mod sink;
pub mod tls;

pub use agent::{Agent, Want};
pub use peer::{Call, Step, perform, play, play_many};

/// A port of this test alone: free now, never handed out before by this process nor by another that runs tests, and
/// outside the range from which the kernel takes ports by itself. A recording is of the whole run, so that two servers
/// at one address, one after the other, would be one server to whoever reads it.
///
/// # Panics
/// No port can be had: the machine is out of them.
#[must_use]
pub fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let (first, count) = (PORTS.start, PORTS.end - PORTS.start);
    // Processes begin at different places, so that they seldom meet.
    let begin = std::process::id().wrapping_mul(977) as u16 % count;
    for _ in 0..count {
        let port = first + (begin + NEXT.fetch_add(1, Ordering::Relaxed) % count) % count;
        if claim(port) && TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
    panic!("no free port in {PORTS:?}")
}

/// Below what kernels take by themselves: 32768 and above, where nobody changed `ip_local_port_range`.
const PORTS: Range<u16> = 12_000..32_000;

/// Takes a port for as long as this process lives: a name that the kernel gives once, and frees when its owner ends.
fn claim(port: u16) -> bool {
    let name = format!("apiscope-test-port-{port}");
    let claimed = SocketAddr::from_abstract_name(name).and_then(|address| UnixDatagram::bind_addr(&address));
    // A socket that is never closed holds the name; one for each server of a test run is few.
    claimed.map(UnixDatagram::into_raw_fd).is_ok()
}

/// A listener at a [`free_port`] of this host.
///
/// # Panics
/// As there.
#[must_use]
pub fn listener(host: &str) -> TcpListener {
    TcpListener::bind((host, free_port())).expect("a port that was free a moment ago")
}

/// The program's path, or a panic that names it: a test never passes because something is absent.
///
/// # Panics
/// The program is not installed.
#[must_use]
pub fn program(name: &str) -> std::path::PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/usr/bin".into()])
        .map(|folder| folder.join(name))
        .find(|p| p.is_file())
        .unwrap_or_else(|| panic!("{name} is not installed: `cargo xtask setup` installs what the tests need"))
}

/// A Python that has `module`.
///
/// # Panics
/// None has.
#[must_use]
pub fn python(module: &str) -> std::path::PathBuf {
    let has = |python: &std::path::PathBuf| {
        let mut import = std::process::Command::new(python);
        import.args(["-c", &format!("import {module}")]).stderr(std::process::Stdio::null());
        import.status().is_ok_and(|s| s.success())
    };
    let found = [program("python3"), "/usr/bin/python3".into()].into_iter().find(has);
    found.unwrap_or_else(|| panic!("no python3 has {module}: `cargo xtask setup` installs it"))
}

/// Lets this process have as many descriptors as it may; returns how many those are.
///
/// # Panics
/// The kernel refuses.
pub fn raise_descriptors() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: a valid struct, both times.
    unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit);
        limit.rlim_cur = limit.rlim_max;
        assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit), 0);
    }
    limit.rlim_max
}

/// Waits until a program that prints `ready` has done so.
///
/// # Panics
/// It prints something else, or its output is not piped.
pub fn ready(child: &mut std::process::Child) {
    use std::io::BufRead as _;
    let mut line = String::new();
    let out = child.stdout.take().expect("piped");
    std::io::BufReader::new(out).read_line(&mut line).expect("readable");
    assert_eq!(line.trim(), "ready");
}
