//! The only reads of kernel structs, through offsets resolved from BTF at load time.

use core::mem::offset_of;

use agent_ebpf::Open;
use aya_ebpf::helpers::generated::{bpf_get_current_task_btf, bpf_probe_read_kernel, bpf_task_pt_regs};

use crate::maps::setting;

pub const AF_UNIX: u16 = 1;
pub const AF_INET: u16 = 2;
pub const AF_INET6: u16 = 10;
const SOCK_STREAM: u16 = 1;
const IPPROTO_TCP: u16 = 6;

/// Reads a `T` at `address`; zero when that fails.
#[inline(always)]
pub fn read<T: Default>(address: u64) -> T {
    let mut value = T::default();
    // SAFETY: the helper checks the address; the target is a local of the right size.
    unsafe { bpf_probe_read_kernel((&raw mut value).cast(), size_of::<T>() as u32, address as *const _) };
    value
}

/// Reads a `T` into map memory.
// SAFETY: callers pass a valid target.
#[inline(always)]
unsafe fn read_into<T>(target: *mut T, address: u64) {
    // SAFETY: the caller's target is valid; the helper checks the address.
    unsafe { bpf_probe_read_kernel(target.cast(), size_of::<T>() as u32, address as *const _) };
}

/// Family of a socket.
#[inline(always)]
pub fn family(sock: u64) -> u16 {
    read(sock + u64::from(setting!(family)))
}

/// Is this a TCP or a unix stream socket?
#[inline(always)]
pub fn is_stream(sock: u64) -> bool {
    let family = family(sock);
    let kind: u16 = read(sock + u64::from(setting!(sk_type)));
    if kind != SOCK_STREAM {
        return false;
    }
    family == AF_UNIX
        || ((family == AF_INET || family == AF_INET6)
            && read::<u16>(sock + u64::from(setting!(sk_protocol))) == IPPROTO_TCP)
}

/// TCP: sequence number of the next byte that the application will receive (direction 0) or send.
#[inline(always)]
pub fn position(sock: u64, direction: u64) -> u32 {
    let field = if direction == 0 { setting!(copied_seq) } else { setting!(write_seq) };
    read(sock + u64::from(field))
}

/// Bits of `sk_shutdown`: 1 receive, 2 send.
#[inline(always)]
pub fn shutdown(sock: u64) -> u8 {
    read(sock + u64::from(setting!(sk_shutdown)))
}

/// Pending error of the socket.
#[inline(always)]
pub fn error(sock: u64) -> i32 {
    read(sock + u64::from(setting!(sk_err)))
}

/// Remote and local port, host order.
#[inline(always)]
pub fn ports(sock: u64) -> (u16, u16) {
    let local: u16 = read(sock + u64::from(setting!(num)));
    let remote: u16 = read(sock + u64::from(setting!(dport)));
    (local, u16::from_be(remote))
}

const _: () = assert!(offset_of!(Open, remote) - offset_of!(Open, peer_sock) == 24);

/// Fills the addresses of a connection.
// SAFETY: callers pass valid map memory.
#[inline(always)]
pub unsafe fn addresses(sock: u64, open: *mut Open) {
    let family = family(sock);
    // SAFETY: the caller's `open` is valid map memory.
    unsafe {
        (*open).family = family;
        (*open).sock = sock;
        (*open).path_len = 0;
        // Both addresses and what is in front of them, word by word: at once it would be a call of a function, and the
        // longest chain of calls has no room for its stack.
        let words = (&raw mut (*open).peer_sock).cast::<u64>();
        let mut i = 0;
        while i < 5 {
            core::ptr::write_volatile(words.add(i), 0);
            i += 1;
        }
        (*open).local_port = 0;
        (*open).remote_port = 0;
        if family == AF_UNIX {
            let peer: u64 = read(sock + u64::from(setting!(unix_peer)));
            (*open).peer_sock = peer;
            // The server's end carries the listener's name; a client is mostly unnamed and its peer is not.
            let mut name: u64 = read(sock + u64::from(setting!(unix_addr)));
            if name == 0 && peer != 0 {
                name = read(peer + u64::from(setting!(unix_addr)));
            }
            if name != 0 {
                (*open).path_len = read(name + u64::from(setting!(unix_len)));
                // sockaddr_un: two bytes of family, then the path.
                read_into(&raw mut (*open).path, name + u64::from(setting!(unix_name)) + 2);
            }
        } else {
            let (local, remote) = ports(sock);
            (*open).local_port = local;
            (*open).remote_port = remote;
            if family == AF_INET {
                read_into((&raw mut (*open).local).cast::<u32>(), sock + u64::from(setting!(rcv_saddr)));
                read_into((&raw mut (*open).remote).cast::<u32>(), sock + u64::from(setting!(daddr)));
            } else {
                read_into(&raw mut (*open).local, sock + u64::from(setting!(v6_rcv_saddr)));
                read_into(&raw mut (*open).remote, sock + u64::from(setting!(v6_daddr)));
            }
        }
    }
}

/// The `struct sock` of a `struct socket`.
#[inline(always)]
pub fn sock_of(socket: u64) -> u64 {
    read(socket + u64::from(setting!(socket_sk)))
}

/// The same by a plain load, which keeps the type for the verifier. Zero where there is none.
#[inline(always)]
pub fn sock_of_typed(socket: u64) -> u64 {
    let field = (socket + u64::from(setting!(socket_sk))) as *const u64;
    // SAFETY: `socket` is a hook's own argument: the verifier knows its type and checks the offset.
    unsafe { core::ptr::read_volatile(field) }
}

/// Where the bytes of the present system call are.
pub enum Buffer {
    /// `read`, `send` and the like: address.
    Flat(u64),
    /// `readv`, `writev`: address and number of the `iovec`s.
    Vector(u64, u64),
    /// `sendmsg`, `recvmsg`: address of the `msghdr`.
    Message(u64),
    /// The bytes never were in the application: `sendfile`, `splice`.
    None,
    /// `io_uring`.
    Uring,
    /// A 32-bit process.
    Compat,
    /// No process at all.
    Kernel,
    /// Anything else.
    Other,
}

/// `-ENOSYS`: what x86 keeps in `ax` from the entry of a system call to its end.
const IN_SYSCALL: u64 = (-38i64) as u64;

/// Takes the buffer from the arguments of the system call that is running. They are a stable ABI.
#[inline(always)]
pub fn buffer() -> Buffer {
    // SAFETY: helpers without preconditions; the task is the current one.
    let regs = unsafe { bpf_task_pt_regs(bpf_get_current_task_btf()) } as *const u64;
    // SAFETY (all reads below): `regs` is a `struct pt_regs` known to the verifier by its type; the
    // offsets are the architecture's ABI.
    let word = |i: usize| unsafe { core::ptr::read_volatile(regs.add(i)) };
    if setting!(arch) == 0 {
        let segment = word(17) & 0xffff;
        if segment & 3 != 3 {
            return Buffer::Kernel;
        }
        if segment == 0x23 {
            return Buffer::Compat;
        }
        let (call, second, third) = (word(15), word(13), word(12));
        // The bytes move outside the call whose registers these are: task work of io_uring.
        if word(10) != IN_SYSCALL {
            return Buffer::Uring;
        }
        match call {
            0 | 1 | 44 | 45 => Buffer::Flat(second),
            19 | 20 | 327 | 328 => Buffer::Vector(second, third),
            46 | 47 => Buffer::Message(second),
            // One message only: more cannot be told apart.
            307 | 299 if third == 1 => Buffer::Message(second),
            40 | 275 | 276 => Buffer::None,
            426 => Buffer::Uring,
            call if call & 0x4000_0000 != 0 => Buffer::Compat,
            _ => Buffer::Other,
        }
    } else {
        // struct pt_regs: regs[31], sp, pc, pstate, orig_x0.
        let state = word(33);
        // Bit 4: 32-bit; below it, zero for user mode.
        if state & 0x10 != 0 {
            return Buffer::Compat;
        }
        if state & 0xf != 0 {
            return Buffer::Kernel;
        }
        // A result took the place of the first argument, which is kept behind: task work of io_uring, after the call.
        if word(0) != word(34) {
            return Buffer::Uring;
        }
        // x8 holds the number of the call.
        let (call, second, third) = (word(8), word(1), word(2));
        match call {
            63 | 64 | 206 | 207 => Buffer::Flat(second),
            65 | 66 | 286 | 287 => Buffer::Vector(second, third),
            211 | 212 => Buffer::Message(second),
            269 | 243 if third == 1 => Buffer::Message(second),
            71 | 75 | 76 => Buffer::None,
            426 => Buffer::Uring,
            _ => Buffer::Other,
        }
    }
}
