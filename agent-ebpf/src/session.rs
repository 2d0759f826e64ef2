//! What a TLS library's own object of a session tells: which socket it belongs to, what its handshake agreed on. Where
//! that is in the object, the agent has read off the library's accessors ([`Layout`]).

use agent_ebpf::{Layout, Place};
use aya_ebpf::helpers::generated::bpf_probe_read_user;

use crate::{
    maps::{CLIENT, SERVER},
    tls::{HELLOS, HelloKey, LAYOUTS, PLAIN, Transfer},
};

/// Notes what the library keeps of the session's handshake, which is over when plaintext comes.
#[inline(never)]
pub fn ask(transfer: &Transfer, id: u64) {
    let Some(layout) = LAYOUTS.get(transfer.layout as u32) else { return };
    let Some(plain) = PLAIN.get_ptr_mut(&id) else { return };
    // SAFETY: map memory of this connection.
    let said = unsafe { &mut (*plain).open.session };
    // SAFETY: the helper checks the addresses, here and below.
    let word = |from: u64| unsafe {
        let mut word = 0u64;
        (bpf_probe_read_user((&raw mut word).cast(), 8, from as *const _) == 0).then_some(word)
    };
    let base = |place: Place| match place.pointer {
        0 => None,
        Layout::DIRECT => Some(transfer.session),
        at => word(transfer.session + u64::from(at)).filter(|base| *base != 0),
    };
    if let Some(base) = base(layout.alpn)
        && let Some(name) = word(base + u64::from(layout.alpn.at))
        && let Some(len) = word(base + u64::from(layout.alpn_len))
    {
        said.alpn_known = 1;
        // Some libraries have 32 bits for the length, and something else behind them.
        said.alpn_len = if name == 0 { 0 } else { len as u16 };
        // SAFETY: `alpn` has that many bytes.
        unsafe { bpf_probe_read_user((&raw mut said.alpn).cast(), size_of_val(&said.alpn) as u32, name as *const _) };
    }
    if let Some(base) = base(layout.certificate)
        && let Some(certificate) = word(base + u64::from(layout.certificate.at))
    {
        said.certificate = if certificate == 0 { 1 } else { 2 };
    }
}

/// The socket of this process that carried the session's ClientHello.
#[inline(always)]
pub fn by_random(transfer: &Transfer, direction: u64, pid: u64) -> Option<u64> {
    let layout = LAYOUTS.get(transfer.layout as u32)?;
    if layout.known == 0 {
        return None;
    }
    let mut base = transfer.session;
    if layout.pointer != Layout::DIRECT {
        let from = transfer.session + u64::from(layout.pointer);
        // SAFETY: the helper checks the address.
        unsafe { bpf_probe_read_user((&raw mut base).cast(), 8, from as *const _) };
    }
    let mut key = HelloKey { random: [0; 2], tgid: pid as u32, role: u32::from(SERVER) };
    // SAFETY: as above.
    unsafe { bpf_probe_read_user((&raw mut key.random).cast(), 16, (base + u64::from(layout.random)) as *const _) };
    if key.random[0] == 0 {
        return None;
    }
    // SAFETY: map memory.
    let server = HELLOS.get_ptr(&key).map(|id| unsafe { *id });
    key.role = u32::from(CLIENT);
    // SAFETY: map memory.
    let client = HELLOS.get_ptr(&key).map(|id| unsafe { *id });
    match (server, client) {
        (Some(server), Some(client)) => {
            // Both ends are in this process: the first word tells which this is.
            let mut word = 0u64;
            // SAFETY: the helper checks the address.
            unsafe { bpf_probe_read_user((&raw mut word).cast(), 7, transfer.buffer as *const _) };
            let response = word == u64::from_le_bytes(*b"HTTP/1.\0");
            Some(if (direction == 0) == response { client } else { server })
        }
        (one, other) => one.or(other),
    }
}
