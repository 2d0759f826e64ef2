//! What the end-to-end tests share: the built agent under test, scripted peers that send byte for byte
//! what a test says, and the comparison of what was sent with what was seen.
//!
//! The agent needs root; without it the tests fail and say so. One agent serves all tests of a binary:
//! each test has a server address of its own and looks only at exchanges there.

pub mod agent;
pub mod apiserver;
pub mod fuzz;
pub mod peer;
pub mod process;
pub mod rpc;
pub mod tls;

pub use agent::{Agent, Want};
pub use peer::{Call, Step, perform, play, play_many};

/// A port that is free now.
///
/// # Panics
/// No port can be had: the machine is out of them.
#[must_use]
pub fn free_port() -> u16 {
    let socket = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    socket.local_addr().expect("an address").port()
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
