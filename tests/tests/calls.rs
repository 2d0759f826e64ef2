//! Connections through unusual system calls and callers. `programs/calls.py` plays them and says what was
//! sent. What can be read must be seen byte for byte; what cannot must be counted, and nothing invented.

use std::{
    io::Write as _,
    net::TcpStream,
    process::{Command, Stdio},
};

use apiscope::exchange::{End, Side};
use apiscope_tests::{Agent, Step, Want, listener, play, program};

const PROGRAM: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/programs/calls.py");

/// Plays a case; the server's address and what was sent, for each side.
fn played(case: &str) -> (String, Vec<Want>, Vec<Want>) {
    Agent::shared();
    let folder = std::env::temp_dir().join(format!("apiscope-calls-{}-{case}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder");
    let out = Command::new(program("python3"))
        .args([PROGRAM, case])
        .arg(&folder)
        .stdin(Stdio::null())
        .output()
        .expect("python starts");
    std::fs::remove_dir_all(folder).expect("removable");
    assert!(out.status.success(), "{case}: {}", String::from_utf8_lossy(&out.stderr));
    let text = String::from_utf8(out.stdout).expect("text");
    let (address, lines) = text.split_once('\n').expect("an address");
    let (mut server, mut client) = (Vec::new(), Vec::new());
    for line in lines.lines() {
        let said: serde_json::Value = serde_json::from_str(line).expect("JSON");
        let number = |key: &str| said[key].as_u64();
        let status = number("status").and_then(|n| u16::try_from(n).ok()).expect("a status");
        let mut want = Want::any("POST", said["path"].as_str().expect("a path"), status);
        want.request_bytes = number("request_bytes");
        want.response_bytes = number("response_bytes");
        want.end = Some(if said["end"] == "reset" { End::Reset } else { End::Complete });
        match said["side"].as_str() {
            Some("server") => server.push(want),
            Some("client") => client.push(want),
            _ => {
                server.push(want.clone());
                client.push(want);
            }
        }
    }
    assert!(server.len() + client.len() > 0, "{case}: nothing was sent");
    (address.to_owned(), server, client)
}

fn all_seen(case: &str) {
    let (address, server, client) = played(case);
    Agent::shared().expect_side(&address, Side::Server, &server);
    Agent::shared().expect_side(&address, Side::Client, &client);
}

fn unread(reason: &str) -> u64 {
    Agent::shared().snapshot().expect("an answer").totals.unread[reason]
}

macro_rules! seen {
    ($($case:ident)+) => { $(#[test] fn $case() { all_seen(stringify!($case)); })+ };
}

seen! {
    peek_and_waitall empty_vectors a_thousand_vectors discarded_with_trunc spliced_bodies_both_ways
    spliced_request_then_close sendfile_with_offset dup_and_passed fork_with_a_shared_socket unix_abstract ipv4_mapped fast_open
    fast_open_connect linger_reset zero_copy one_message_each
}

/// What one end of a connection could not read is counted; its other end sees everything; nothing is invented.
fn uncovered(case: &str, reason: &str, at_least: u64) {
    let before = unread(reason);
    let (address, server, client) = played(case);
    Agent::shared().expect_side(&address, Side::Server, &server);
    Agent::shared().expect_side(&address, Side::Client, &client);
    assert!(unread(reason) >= before + at_least, "{case}: {reason} went from {before} to {}", unread(reason));
}

#[test]
fn sendmmsg_of_several_messages() {
    uncovered("several_messages", "unknown_syscall", 3);
}

/// Requests or answers that one end could not read must not shift what it reads before and after.
#[test]
fn several_messages_between_plain_ones() {
    uncovered("several_messages_between", "unknown_syscall", 3);
}

#[test]
fn recvmmsg_of_several_messages() {
    uncovered("receive_several", "unknown_syscall", 3);
}

/// The far ends of a relay that splices whole messages are read; the relay itself never has them in memory.
#[test]
fn a_relay_that_splices_heads_too() {
    let before = unread("unknown_syscall");
    let (address, server, _) = played("spliced_whole");
    Agent::shared().expect_side(&address, Side::Server, &server);
    Agent::shared().expect_side(&address, Side::Client, &[]);
    assert!(unread("unknown_syscall") >= before + 6, "six sends whose heads were not seen");
}

/// What goes by without a receive shifts nothing: numbers of bytes tell of it.
#[test]
fn a_server_that_splices_requests_away() {
    uncovered("spliced_requests_between", "missed_bytes", 3);
}

/// The same of answers.
#[test]
fn a_client_that_splices_answers_away() {
    uncovered("spliced_answers_between", "missed_bytes", 3);
}

/// The receiver takes an urgent byte apart from the stream.
#[test]
fn an_urgent_byte_between_messages() {
    let (address, server, _) = played("urgent_between");
    Agent::shared().expect_side(&address, Side::Server, &server);
}

const REQUEST: &[u8] = b"GET /thirty-two HTTP/1.1\r\nHost: t\r\n\r\n";
const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

/// A server by plain calls that answers three requests; then the server's side must be whole, the other empty.
fn three_answers(reason: &str, client: impl FnOnce(u16)) {
    let agent = Agent::shared();
    let before = unread(reason);
    let listener = listener("127.0.0.1");
    let address = listener.local_addr().expect("an address");
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a client");
        for _ in 0..3 {
            std::io::Read::read_exact(&mut stream, &mut [0; REQUEST.len()]).expect("a request");
            stream.write_all(ANSWER).expect("a reader");
        }
    });
    client(address.port());
    server.join().expect("no panic");
    let want = Want::new("GET", "/thirty-two", 200, REQUEST, ANSWER);
    agent.expect_side(&address.to_string(), Side::Server, &[want.clone(), want.clone(), want]);
    agent.expect_side(&address.to_string(), Side::Client, &[]);
    assert!(unread(reason) > before, "{reason} was not counted");
}

#[cfg(target_arch = "x86_64")]
#[test]
fn a_32_bit_process() {
    let binary = std::env::temp_dir().join(format!("apiscope-client32-{}", std::process::id()));
    let built = Command::new(program("gcc"))
        .args(["-m32", "-nostdlib", "-static", "-fno-pic", "-no-pie", "-fno-stack-protector", "-O1", "-o"])
        .arg(&binary)
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/programs/client32.c"))
        .output()
        .expect("gcc starts");
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    three_answers("compat_32bit", |port| {
        let status = Command::new(&binary).arg(port.to_string()).status().expect("a kernel that runs 32-bit programs");
        assert!(status.success(), "{status}");
    });
    std::fs::remove_file(binary).expect("removable");
}

/// `int 0x80` of a 64-bit process: the numbers and registers are those of 32 bits, the segment is not.
#[cfg(target_arch = "x86_64")]
#[test]
fn a_32_bit_call_of_a_64_bit_process() {
    use std::os::fd::AsRawFd as _;

    /// Calls the 32-bit `number` with three arguments.
    ///
    /// # Safety
    /// The arguments must be what the call expects.
    unsafe fn int80(number: u32, a: u32, b: u32, c: u32) -> i32 {
        let result: i32;
        // SAFETY: the caller's; the kernel keeps all registers but `eax` and, on old kernels, r8 to r11.
        unsafe {
            std::arch::asm!(
                "xchg {a}, rbx", "int 0x80", "xchg {a}, rbx",
                a = inout(reg) u64::from(a) => _, inlateout("eax") number => result, in("ecx") b, in("edx") c,
                out("r8") _, out("r9") _, out("r10") _, out("r11") _,
            );
        }
        result
    }

    three_answers("unknown_syscall", |port| {
        let stream = TcpStream::connect(("127.0.0.1", port)).expect("a listener");
        // SAFETY: a fresh private mapping below 4 GiB.
        let low = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                4096,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_32BIT,
                -1,
                0,
            )
        };
        assert_ne!(low, libc::MAP_FAILED);
        let (fd, address) = (u32::try_from(stream.as_raw_fd()).expect("a descriptor"), low as u32);
        for _ in 0..3 {
            // SAFETY: the mapping has 4096 bytes; write is 4 and read 3 for 32 bits.
            unsafe {
                std::ptr::copy_nonoverlapping(REQUEST.as_ptr(), low.cast(), REQUEST.len());
                assert_eq!(int80(4, fd, address, REQUEST.len() as u32), REQUEST.len() as i32);
                assert_eq!(int80(3, fd, address, 4096), ANSWER.len() as i32);
            }
        }
        // SAFETY: the mapping made above.
        unsafe { libc::munmap(low, 4096) };
    });
}

#[test]
fn a_client_on_io_uring() {
    use io_uring::{IoUring, opcode, types::Fd};
    use std::os::fd::AsRawFd as _;

    for polled in [false, true] {
        three_answers("io_uring", |port| {
            let stream = TcpStream::connect(("127.0.0.1", port)).expect("a listener");
            let mut builder = IoUring::<io_uring::squeue::Entry>::builder();
            if polled {
                // A kernel thread takes the requests: no system call of this process is running then.
                builder.setup_sqpoll(2000);
            }
            let mut ring = builder.build(8).expect("io_uring is allowed here");
            let mut answer = [0; 4096];
            let fd = Fd(stream.as_raw_fd());
            for _ in 0..3 {
                let send = opcode::Send::new(fd, REQUEST.as_ptr(), REQUEST.len() as u32).build();
                let receive = opcode::Recv::new(fd, answer.as_mut_ptr(), 4096).build();
                for (entry, bytes) in [(send, REQUEST.len()), (receive, ANSWER.len())] {
                    // SAFETY: both buffers outlive the wait for their completion.
                    unsafe { ring.submission().push(&entry).expect("room") };
                    ring.submit_and_wait(1).expect("it completes");
                    let result = ring.completion().next().expect("a completion").result();
                    assert_eq!(usize::try_from(result).ok(), Some(bytes), "error {result}");
                }
            }
        });
    }
}

/// A connection that is not read must not keep the next one from being read.
#[test]
fn plain_calls_after_all_that() {
    let server = play("127.0.0.1:0", &[Step::client(REQUEST), Step::server(ANSWER)]);
    Agent::shared().expect(&server, &[Want::new("GET", "/thirty-two", 200, REQUEST, ANSWER)]);
}
