//! Records to the agent: bounded copies, every failure counted by its reason.

use core::ptr::{read_volatile, write_volatile};

use agent_ebpf::{Close, Count, DATA_LIMIT, Flag, HELLO, Kind, Open, Record, Tier};
use aya_ebpf::{
    bindings::{BPF_RB_AVAIL_DATA, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP},
    helpers::generated,
};

use crate::{
    http2, kernel,
    maps::{self, COUNTS, Connection, OPENED, RECORDS, Work, setting},
    once::once,
    tls,
};

/// Adds one to a counter of this CPU.
#[inline(always)]
pub fn count(which: u32) {
    add(which, 1);
}

/// Adds `n` to a counter of this CPU.
#[inline(always)]
pub fn add(which: u32, n: u64) {
    if let Some(slot) = COUNTS.get_ptr_mut(which) {
        // SAFETY: a valid slot of this CPU's array.
        unsafe { *slot += n }
    }
}

/// Records of a CPU between two looks at how full the ring is: the look shares a cache line with the
/// reader and costs more than a small record does.
const LOOK_EVERY: u64 = 64;

/// The reader polls; it is woken only when a good part of the ring is full.
#[inline(always)]
fn wake_flags(work: &mut Work) -> u64 {
    work.records += 1;
    if work.records & (LOOK_EVERY - 1) != 0 {
        return u64::from(BPF_RB_NO_WAKEUP);
    }
    // SAFETY: the map is a ring buffer.
    let waiting =
        unsafe { generated::bpf_ringbuf_query((&raw const RECORDS).cast_mut().cast(), u64::from(BPF_RB_AVAIL_DATA)) };
    if waiting > u64::from(setting!(wake_bytes)) { u64::from(BPF_RB_FORCE_WAKEUP) } else { u64::from(BPF_RB_NO_WAKEUP) }
}

/// Copies `size` bytes from `data` into the ring.
#[inline(always)]
fn output(work: &mut Work, data: *const u8, size: u64) -> bool {
    let flags = wake_flags(work);
    // SAFETY: `data` is map memory with at least `size` bytes: the verifier proves it at load.
    unsafe {
        generated::bpf_ringbuf_output((&raw const RECORDS).cast_mut().cast(), data.cast_mut().cast(), size, flags) == 0
    }
}

/// Fills the header but for kind, flags and data.
#[inline(always)]
fn header(work: &mut Work, connection: &Connection, kind: u8, flags: u16) {
    let d = &connection.directions[usize::from(work.direction != 0)];
    let record = &mut work.record;
    record.kind = kind;
    record.skip = 0;
    record.len = 0;
    record.flags = flags | if work.direction != 0 { Flag::SENT } else { 0 };
    record.conn = connection.id;
    record.ts = work.now;
    record.first_ts = d.first_ts;
    record.index = d.index;
    record.pid = work.pid as u32;
    record.message = d.message;
    record.body = d.body;
}

/// Does the agent want no more of this connection? Then it gets no more.
#[inline(always)]
fn is_unwanted(connection: &mut Connection) -> bool {
    let place = connection.id as u32 & (agent_ebpf::UNWANTED as u32 - 1);
    let unwanted = maps::UNWANTED.get(place).is_some_and(|&id| id == connection.id);
    if unwanted {
        connection.state |= maps::QUIET;
    }
    unwanted
}

/// Passes on the first `len` bytes of `work.data`, of which `skip` are repeated. False when the ring
/// is full.
#[inline(always)]
pub fn head(
    work: &mut Work,
    connection: &mut Connection,
    flags: u16,
    len: u64,
    skip: u8,
    message: u64,
    body: u64,
) -> bool {
    if connection.state & OPENED == 0 {
        if !open(work, connection) {
            return false;
        }
    } else if is_unwanted(connection) {
        return true;
    }
    header(work, connection, Kind::HEAD, flags);
    work.record.skip = skip;
    work.record.message = message;
    work.record.body = body;
    let len = if len > DATA_LIMIT as u64 { DATA_LIMIT as u64 } else { len };
    work.record.len = len as u32;
    output(work, (&raw const work.record).cast(), size_of::<Record>() as u64 + len)
}

/// Passes on the frames in `work.data`. False when the ring is full.
#[inline(always)]
pub fn frames(work: &mut Work, connection: &mut Connection, direction: usize, flags: u16) -> bool {
    if connection.state & OPENED == 0 {
        if !open(work, connection) {
            return false;
        }
    } else if is_unwanted(connection) {
        return true;
    }
    let record = &mut work.record;
    record.kind = Kind::FRAMES;
    record.skip = 0;
    record.flags = flags | if direction != 0 { Flag::SENT } else { 0 };
    record.conn = connection.id;
    record.ts = work.now;
    record.first_ts = work.end;
    record.index = connection.directions[direction].index;
    record.pid = work.pid as u32;
    record.message = u64::from(*http2::dropped(&mut connection.directions[direction]));
    record.body = work.line;
    let len = if work.filled > DATA_LIMIT as u64 { DATA_LIMIT as u64 } else { work.filled };
    record.len = len as u32;
    let data = (&raw const work.record).cast();
    output(work, data, size_of::<Record>() as u64 + len)
}

/// A record without data, about the direction of this run.
#[inline(always)]
pub fn bare(work: &mut Work, connection: &Connection, kind: u8, flags: u16) {
    header(work, connection, kind, flags);
    // The index counts messages begun: the one that ends is the one before.
    work.record.index = work.record.index.wrapping_sub(1);
    if !output(work, (&raw const work.record).cast(), size_of::<Record>() as u64) {
        count(Count::END_RING_FULL);
    }
}

/// Addresses of the connection, before its first head.
#[inline(always)]
fn open(work: &mut Work, connection: &mut Connection) -> bool {
    emit_open(work, connection) != 0
}

/// See [`open`] and [`crate::once`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn emit_open(work: *mut Work, connection: *mut Connection) -> u32 {
    // SAFETY: `open` passes what it has for itself.
    match unsafe { once(work, connection) } {
        Some((work, connection)) => u32::from(describe(work, connection)),
        None => 0,
    }
}

#[inline(always)]
fn describe(work: &mut Work, connection: &mut Connection) -> bool {
    header(work, connection, Kind::OPEN, if connection.state & maps::FRESH == 0 { Flag::LATE } else { 0 });
    work.record.len = size_of::<Open>() as u32;
    // The head is in `data` already: the addresses are built behind it.
    let place = (&raw mut work.data).cast::<u8>();
    // SAFETY: `data` has DATA_LIMIT + WINDOW + 64 bytes; the last WINDOW + 64 hold header and addresses.
    let (copy, open) = unsafe {
        let copy = place.add(DATA_LIMIT).cast::<Record>();
        (copy, place.add(DATA_LIMIT + size_of::<Record>()).cast::<Open>())
    };
    // SAFETY: as above; both are 8-aligned since `data` and DATA_LIMIT are.
    unsafe {
        // Word by word: as a whole it would pass through the stack, which is short.
        let words = (&raw const work.record).cast::<u64>();
        let mut i = 0;
        while i < size_of::<Record>() / 8 {
            write_volatile(copy.cast::<u64>().add(i), read_volatile(words.add(i)));
            i += 1;
        }
        if work.tls == 0 {
            kernel::addresses(work.sock, open);
        } else {
            (*copy).len += tls::describe(work.tls, open);
        }
        (*open).tls = if work.tls == 0 { Tier::PLAINTEXT } else { (*open).tls };
        (*open).role = connection.role;
        generated::bpf_get_current_comm((&raw mut (*open).comm).cast(), size_of_val(&(*open).comm) as u32);
    }
    let hello = if work.tls == 0 { 0 } else { HELLO };
    if output(work, copy.cast(), (size_of::<Record>() + size_of::<Open>() + hello) as u64) {
        connection.state |= OPENED;
        return true;
    }
    false
}

/// A TLS connection is over; `read` when a library that is read carried it.
#[inline(always)]
pub fn sealed(work: &mut Work, connection: &Connection, pid: u32, read: bool, received: u64, sent: u64) {
    work.direction = 0;
    let late = if connection.state & maps::FRESH == 0 { Flag::LATE } else { 0 };
    header(work, connection, Kind::SEALED, late | if read { Flag::DONE } else { 0 });
    work.record.pid = pid;
    work.record.message = received;
    work.record.body = sent;
    let record = (&raw const work.record).cast();
    if !output(work, record, size_of::<Record>() as u64) {
        count(Count::END_RING_FULL);
    }
}

/// The connection is over.
#[inline(always)]
pub fn close(
    work: &mut Work,
    connection: &mut Connection,
    flags: u16,
    unfinished: [u8; 2],
    until_close: [u8; 2],
    responses: u32,
) {
    header(work, connection, Kind::CLOSE, flags);
    if connection.state & maps::HTTP2 != 0 {
        let [received, sent] = &mut connection.directions;
        work.record.body = u64::from(*http2::dropped(received)) + u64::from(*http2::dropped(sent));
    }
    work.record.len = size_of::<Close>() as u32;
    let close = (&raw mut work.data).cast::<Close>();
    // SAFETY: `data` follows the header and is large enough.
    unsafe {
        (*close).pad = [0; 4];
        (*close).requests = connection.requests;
        (*close).responses = responses;
        let mut i = 0;
        while i < 2 {
            let d = &connection.directions[i];
            (*close).message[i] = d.message;
            (*close).body[i] = d.body;
            (*close).last_ts[i] = d.last_ts;
            (*close).unfinished[i] = unfinished[i];
            (*close).until_close[i] = until_close[i];
            i += 1;
        }
    }
    if !output(work, (&raw const work.record).cast(), (size_of::<Record>() + size_of::<Close>()) as u64) {
        // Of a connection that was idle nothing is missing.
        let idle = unfinished[0] | unfinished[1] == 0 && connection.requests == responses;
        if !idle || connection.state & maps::HTTP2 != 0 {
            count(Count::END_RING_FULL);
        }
    }
}
