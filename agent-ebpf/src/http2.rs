//! HTTP/2 framing (RFC 9113 section 4) in the kernel. Frames are passed on whole and in order, but for
//! the payload of DATA frames, which is counted, and for frames that say nothing about an exchange
//! (WINDOW_UPDATE, PING, extensions). The frames of one system call share a record.
//!
//! What a record holds: the 9 bytes of a frame's head and its payload, one frame after the other; of a
//! DATA frame the head and four bytes: padding, messages (two, little endian), [`agent_ebpf::DataFlag`]s.
//! It is passed on with the last byte of its payload. A record without `Flag::FIRST` begins inside of a
//! payload, of which `Record::body` bytes are still to come. Records of a direction are numbered without a
//! gap, those that found the ring full included, so that the agent knows of each loss. How many answers ended
//! in these is counted, and said with the next record of the direction ([`dropped`]).
//!
//! Messages: a gRPC message is prefixed by five bytes, a flag and a length. The prefixes are followed
//! here, so that no byte of a message leaves the kernel. What the streams of a direction have open is in
//! [`Slot`]s; when more streams than that have messages across frames, the others are put aside in a table
//! ([`exchange`]), and only when that is full the counts are said to be inexact.
//!
//! A connection that is older than the agent, or whose bytes were missed, is found again where a
//! system call begins with heads of frames.

use agent_ebpf::{Count, DATA_LIMIT, DataFlag, Flag, Kind, MessageKey, STEPS, WINDOW};
use aya_ebpf::helpers::generated::{bpf_loop, bpf_probe_read_user};

use crate::{
    conn, emit,
    http1::{Context, advance, get, mode, next_buffer, pass_over, set},
    maps::{CLIENT, Connection, Direction, FRESH, HTTP2, MESSAGES, OPENED, QUIET, SERVER, Work},
    once::{flag, once},
};

/// Bytes of the preface of a client (RFC 9113 section 3.4).
pub const PREFACE: u64 = 24;
/// Bytes of a frame's head.
const HEAD: u64 = 9;
/// Bytes of a gRPC message's prefix.
const PREFIX: u8 = 5;
/// Most messages of a DATA frame that are followed: a body of zeros would be full of empty ones.
const MAX_MESSAGES: u16 = 512;
/// Streams of a direction that may have a message across frames without being put aside.
const SLOTS: usize = 3;
/// Longest frame of a connection that is found in the middle: the default, which hardly anyone changes.
const USUAL_FRAME: u64 = 16_384;
/// Heads in a row that make no sense, after which a connection is left alone.
const STRIKES: u16 = 16;
/// A record with more bytes than this is passed on.
const FULL: u64 = (DATA_LIMIT - WINDOW - 16) as u64;

/// Bits of `Direction::bits` in HTTP/2.
/// The preface came: to be said with the next record.
const PREFACE_CAME: u8 = 1;
/// Heads of streams were seen: this is HTTP/2 for sure.
const SURE: u8 = 2;

/// Types of frames (RFC 9113 section 6).
const DATA: u64 = 0;
const HEADERS: u64 = 1;
const RST_STREAM: u64 = 3;
const PING: u64 = 6;
const WINDOW_UPDATE: u64 = 8;
const CONTINUATION: u64 = 9;
const END_STREAM: u8 = 1;
const PADDED: u8 = 8;

/// What of a direction is only known in HTTP/2; lies in `Direction::carry`.
#[repr(C)]
struct Frames {
    /// The head of the frame under way; `Direction::carry_len` bytes of it while it is not whole.
    head: [u8; 9],
    /// The slot of the DATA frame under way.
    slot: u8,
    /// 1 while its messages are followed.
    follow: u8,
    /// [`DataFlag`]s of it.
    flags: u8,
    /// Messages that began in it.
    messages: u16,
    /// Its padding.
    padding: u8,
    /// [`DataFlag::INEXACT`]: a slot was taken away from a stream, and counts are inexact from then on. [`ASIDE`].
    state: u8,
    slots: [Slot; SLOTS],
}

/// Bit of `Frames::state`: streams were put aside.
const ASIDE: u8 = 0x80;

/// A message under way. `Frames` keeps them between the DATA frames of a stream.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Slot {
    /// 0: free.
    stream: u32,
    /// Bytes of the message still to come.
    left: u32,
    /// Its prefix, as far as it came.
    prefix: [u8; 5],
    got: u8,
    pad: [u8; 2],
}

const _: () = assert!(size_of::<Frames>() == agent_ebpf::CARRY);

/// The head of a frame.
struct Head {
    length: u64,
    kind: u64,
    flags: u8,
    /// With the reserved bit.
    stream: u32,
}

#[inline(always)]
fn parse(low: u64, high: u8) -> Head {
    Head {
        length: (low & 0xff) << 16 | low & 0xff00 | (low >> 16) & 0xff,
        kind: (low >> 24) & 0xff,
        flags: (low >> 32) as u8,
        stream: ((low >> 40) as u32).swap_bytes() & 0xffff_ff00 | u32::from(high),
    }
}

/// Can this be the head of a frame? Types, lengths and streams are held against RFC 9113 section 6.
#[inline(always)]
fn is_plausible(head: &Head) -> bool {
    let stream = head.stream & 0x7fff_ffff;
    match head.kind {
        0 | 1 | 5 | 9 => stream != 0,
        2 => stream != 0 && head.length == 5,
        3 => stream != 0 && head.length == 4,
        4 => stream == 0 && head.length % 6 == 0,
        6 => stream == 0 && head.length == 8,
        7 => stream == 0 && head.length >= 8,
        8 => head.length == 4,
        _ => true,
    }
}

/// As [`is_plausible`], for bytes that need not be HTTP/2: no extensions, no unusual lengths or flags.
#[inline(always)]
fn is_likely(head: &Head) -> bool {
    // Flags by type, a byte each.
    const FLAGS: u64 = 0x0001_0c01_0000_2d09;
    let known = match head.kind {
        0..8 => (FLAGS >> (head.kind * 8)) as u8,
        8 => 0,
        CONTINUATION => 4,
        _ => return false,
    };
    head.length <= USUAL_FRAME && head.flags & !known == 0 && head.stream >> 31 == 0 && is_plausible(head)
}

#[inline(always)]
fn frames(d: &mut Direction) -> &mut Frames {
    // SAFETY: same size and alignment, integers only.
    unsafe { &mut *(&raw mut d.carry).cast::<Frames>() }
}

/// The first bytes of a direction, of which `limit` are in `data`, were no HTTP/1. True when they are
/// HTTP/2, which begins here.
#[inline(always)]
pub fn join(work: &mut Work, connection: &mut Connection) -> bool {
    // A server may speak before the client's preface has come, always with SETTINGS. As much of that head
    // as is there, its length left out.
    const HEAD_OF_SETTINGS: u64 = 4 << 24;
    let n = get(&raw const work.limit);
    if n == 0 || connection.state & OPENED != 0 {
        return false;
    }
    let fresh = connection.state & FRESH != 0;
    if fresh {
        let known = if n >= 8 { u64::MAX } else { (1u64 << ((n & 7) * 8)) - 1 } & !0x00ff_0000;
        let first = get((&raw const work.data).cast::<u64>());
        if (first ^ HEAD_OF_SETTINGS) & known != 0 || connection.strikes != 0 {
            return false;
        }
        if !conn::set_role(connection, work.direction, true) {
            connection.state |= QUIET;
            return false;
        }
    } else if !seek(work, false) {
        return false;
    }
    commit(work, connection);
    let d = &mut connection.directions[usize::from(work.direction != 0)];
    d.mode = mode::FRAME_HEAD;
    d.lost = u8::from(!fresh);
    true
}

/// A client's preface begins here; `limit` bytes of it are still to come.
#[inline(always)]
pub fn preface(work: &mut Work, connection: &mut Connection) {
    // A head that was under way when the line's end came.
    if connection.state & OPENED != 0 {
        emit::bare(work, connection, Kind::ABORT, 0);
    }
    if !conn::set_role(connection, work.direction, false) {
        connection.state |= QUIET;
        return;
    }
    commit(work, connection);
    let d = &mut connection.directions[usize::from(work.direction != 0)];
    d.mode = mode::PREFACE;
    d.remaining = get(&raw const work.limit);
    d.bits = PREFACE_CAME;
}

/// `101 Switching Protocols` to h2c: what follows in both directions is HTTP/2 (RFC 7540 section 3.2).
#[inline(always)]
pub fn upgrade(work: &mut Work, connection: &mut Connection) {
    commit(work, connection);
    let answers = usize::from(work.direction != 0);
    let d = &mut connection.directions[answers];
    d.mode = mode::FRAME_HEAD;
    d.lost = 0;
    let d = &mut connection.directions[1 - answers];
    reset(d);
    d.mode = mode::PREFACE;
    d.remaining = PREFACE;
    d.bits = PREFACE_CAME;
}

#[inline(always)]
fn commit(work: &mut Work, connection: &mut Connection) {
    emit::count(Count::HTTP2);
    connection.state |= HTTP2;
    connection.strikes = 0;
    reset(&mut connection.directions[usize::from(work.direction != 0)]);
}

#[inline(always)]
fn reset(d: &mut Direction) {
    d.index = 0;
    d.bits = 0;
    *dropped(d) = 0;
    d.remaining = 0;
    d.lost = 0;
    forget(d);
}

/// No frame is under way.
#[inline(always)]
fn forget(d: &mut Direction) {
    d.carry_len = 0;
    d.length = 0;
    d.carry = [0; agent_ebpf::CARRY / 8];
}

/// Takes a direction of a connection that speaks HTTP/2 since the other direction does.
#[inline(always)]
fn enter(work: &mut Work, connection: &mut Connection) {
    let fresh = connection.state & FRESH != 0;
    let requests = (work.direction != 0) == (connection.role == CLIENT);
    let d = &mut connection.directions[usize::from(work.direction != 0)];
    // A part of the preface may have been taken for a method.
    let begun = if d.mode == mode::HEAD && d.head < PREFACE as u32 { u64::from(d.head) } else { 0 };
    reset(d);
    if !fresh {
        d.mode = mode::SEEK;
        d.lost = 1;
    } else if requests {
        d.mode = mode::PREFACE;
        d.remaining = PREFACE - begun;
        d.bits = PREFACE_CAME;
    } else {
        d.mode = mode::FRAME_HEAD;
    }
}

/// Takes the bytes of a system call.
#[inline(always)]
pub fn feed(work: &mut Work, connection: &mut Connection) {
    http2_feed(work, connection);
}

/// See [`feed`] and [`crate::once`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn http2_feed(work: *mut Work, connection: *mut Connection) -> u32 {
    // SAFETY: `feed` passes what it has for itself.
    if let Some((work, connection)) = unsafe { once(work, connection) } {
        take_apart(work, connection);
    }
    0
}

#[inline(always)]
fn take_apart(work: &mut Work, connection: &mut Connection) {
    let direction = work.direction as usize & 1;
    if connection.directions[direction].mode < mode::PREFACE {
        enter(work, connection);
    }
    if connection.directions[direction].mode == mode::SEEK {
        if !seek(work, true) {
            return;
        }
        connection.directions[direction].mode = mode::FRAME_HEAD;
    }
    let d = &connection.directions[direction];
    let first_ts = if d.carry_len != 0 { d.first_ts } else { work.now };
    begin_record(work, d, first_ts);
    let mut context = Context { connection, work };
    // SAFETY: the callback gets the address of a local that outlives the call.
    let steps = unsafe { bpf_loop(STEPS, step as *mut _, (&raw mut context).cast(), 0) };
    // SAFETY: the callback has ended, and with it the other use of both.
    let (connection, work) = unsafe { (&mut *context.connection, &mut *context.work) };
    flush(work, connection, direction);
    if steps >= i64::from(STEPS) {
        emit::count(Count::STEPS);
        connection.directions[direction].mode = mode::SEEK;
    }
    if connection.directions[direction].mode == mode::SEEK {
        lose(connection, direction);
    }
}

#[inline(always)]
fn begin_record(work: &mut Work, d: &Direction, first_ts: u64) {
    work.filled = 0;
    set(&raw mut work.hits, 0);
    work.line = if d.mode == mode::FRAME { d.remaining } else { 0 };
    work.end = first_ts;
}

/// Answers that ended in records of this direction that found the ring full, since the last one that did not. They
/// are counted as lost already: the agent must not count them again, nor take their streams for open ones.
#[inline(always)]
pub fn dropped(d: &mut Direction) -> &mut u32 {
    // The length of a head of HTTP/1.
    &mut d.head
}

/// Passes on the frames in `data`.
#[inline(always)]
fn flush(work: &mut Work, connection: &mut Connection, direction: usize) {
    if work.filled == 0 {
        return;
    }
    let d = &mut connection.directions[direction];
    let mut flags = if work.line == 0 { Flag::FIRST } else { 0 };
    flags |= u16::from(get(&raw const d.lost)) * Flag::LOST;
    flags |= u16::from(get(&raw const d.bits) & PREFACE_CAME) * Flag::PREFACE;
    let passed = emit::frames(work, connection, direction, flags);
    let answers = (direction != 0) == (connection.role == SERVER);
    let d = &mut connection.directions[direction];
    d.index = d.index.wrapping_add(1);
    if passed {
        d.lost = 0;
        d.bits &= !PREFACE_CAME;
        *dropped(d) = 0;
    } else if answers {
        let ended = get(&raw const work.hits);
        emit::add(Count::RING_FULL, ended);
        *dropped(d) += ended as u32;
    }
    let now = work.now;
    begin_record(work, d, now);
}

// SAFETY: called by `bpf_loop` alone, with the context of `feed`.
unsafe extern "C" fn step(_step: u32, context: *mut Context) -> i64 {
    // SAFETY: as in `http1::step`.
    flag(unsafe { http2_step((*context).work, (*context).connection) })
}

/// See [`step`] and [`crate::once`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn http2_step(work: *mut Work, connection: *mut Connection) -> i64 {
    // SAFETY: `step` passes what `feed` has for itself.
    match unsafe { once(work, connection) } {
        Some((work, connection)) => {
            let direction = work.direction as usize & 1;
            i64::from(!one(work, connection, direction))
        }
        None => 1,
    }
}

/// As [`step`]; true to go on. Each way ends where it began but for map memory, which the verifier knows
/// nothing of: so what is common to several ways is done once, in a step of its own or at the end.
#[inline(always)]
fn one(work: &mut Work, connection: &mut Connection, direction: usize) -> bool {
    let d = &mut connection.directions[direction];
    let now = get(&raw const d.mode);
    if now == mode::DATA && get(&raw const d.remaining) == 0 {
        return finish_data(work, d);
    }
    if get(&raw const work.filled) > FULL {
        flush(work, connection, direction);
        return true;
    }
    if get(&raw const work.left) == 0 || now == mode::SEEK {
        return false;
    }
    if get(&raw const work.skip) != 0 && get(&raw const work.readable) != 0 {
        return pass_over(work);
    }
    // What is consumed, to be set by the ways below.
    set(&raw mut work.at, 0);
    if now == mode::SKIP || now == mode::PREFACE {
        at_most(work, get(&raw const d.remaining));
        let n = get(&raw const work.at);
        d.remaining -= n;
        if get(&raw const d.remaining) == 0 {
            d.mode = mode::FRAME_HEAD;
        }
    } else if get(&raw const work.readable) == 0 {
        if now != mode::DATA {
            d.mode = mode::SEEK;
            return false;
        }
        let f = frames(d);
        f.follow = 0;
        f.flags |= DataFlag::INEXACT;
        at_most(work, get(&raw const d.remaining));
        content(work, d);
    } else if get(&raw const work.length) == 0 {
        return next_buffer(work);
    } else if now == mode::DATA {
        data(work, d);
    } else if now == mode::FRAME {
        payload(work, d);
    } else if now == mode::PADDING {
        padding(work, d);
    } else {
        head(work, connection, direction);
    }
    let n = get(&raw const work.at);
    work.left = get(&raw const work.left).wrapping_sub(n);
    advance(work, n)
}

/// Consumes `n` bytes, or what is left of the system call.
#[inline(always)]
fn at_most(work: &mut Work, n: u64) {
    set(&raw mut work.at, n);
    if n > get(&raw const work.left) {
        set(&raw mut work.at, get(&raw const work.left));
    }
}

/// As [`at_most`], of the current buffer. The result is unknown to the verifier, and not above `most`.
#[inline(always)]
fn of_buffer(work: &mut Work, n: u64, most: u64) -> u64 {
    at_most(work, n);
    if get(&raw const work.at) > get(&raw const work.length) {
        set(&raw mut work.at, get(&raw const work.length));
    }
    if get(&raw const work.at) > most {
        set(&raw mut work.at, most);
    }
    let n = get(&raw const work.at);
    if n > most { 0 } else { n }
}

/// Copies `n` bytes of the current buffer. False when that fails: then the position is lost.
#[inline(always)]
fn read(work: &mut Work, d: &mut Direction, to: *mut u8, n: u64) -> bool {
    // SAFETY: callers have room for `n` bytes; the helper checks the user's address.
    if unsafe { bpf_probe_read_user(to.cast(), n as u32, work.pointer as *const _) } == 0 {
        return true;
    }
    emit::count(Count::UNREADABLE);
    d.mode = mode::SEEK;
    false
}

/// (A part of) the head of a frame.
#[inline(always)]
fn head(work: &mut Work, connection: &mut Connection, direction: usize) {
    let d = &mut connection.directions[direction];
    let have = u64::from(get(&raw const d.carry_len)) & 15;
    if have == 0 {
        d.first_ts = work.now;
    }
    let n = of_buffer(work, HEAD.wrapping_sub(have), HEAD);
    // SAFETY: 15 + 9 bytes are within `carry`.
    let to = unsafe { (&raw mut d.carry).cast::<u8>().add(have as usize) };
    if !read(work, d, to, n) {
        return;
    }
    set(&raw mut d.carry_len, (have + n) as u8);
    if get(&raw const d.carry_len) < HEAD as u8 {
        return;
    }
    set(&raw mut d.carry_len, 0);
    let head = parse(get(&raw const d.carry[0]), get(&raw const d.carry[1]) as u8);
    if !is_plausible(&head) {
        d.mode = mode::SEEK;
        return;
    }
    d.remaining = head.length;
    d.mode = if head.length == 0 { mode::FRAME_HEAD } else { mode::FRAME };
    if head.kind == DATA {
        return begin_data(work, connection, &head);
    }
    if head.kind == PING || head.kind == WINDOW_UPDATE || head.kind > CONTINUATION {
        if get(&raw const work.filled) == 0 {
            work.end = work.now;
        }
        if head.length != 0 {
            d.mode = mode::SKIP;
        }
        return;
    }
    if head.kind == HEADERS {
        d.bits |= SURE;
        connection.strikes = 0;
    }
    put_head(work, &connection.directions[direction]);
    if head.kind == RST_STREAM || (head.kind == HEADERS && head.flags & END_STREAM != 0) {
        set(&raw mut work.hits, get(&raw const work.hits) + 1);
    }
    if head.kind == RST_STREAM {
        release(connection, 0, head.stream);
        release(connection, 1, head.stream);
    }
}

/// Adds the head of the frame under way to the record.
#[inline(always)]
fn put_head(work: &mut Work, d: &Direction) {
    let at = get(&raw const work.filled) & 0x1fff;
    if at > DATA_LIMIT as u64 {
        return;
    }
    let (low, high) = (get(&raw const d.carry[0]), get(&raw const d.carry[1]) as u8);
    // SAFETY: at + 9 is within `data`. The kernel's targets store unaligned words.
    unsafe {
        let to = (&raw mut work.data).cast::<u8>().add(at as usize);
        core::ptr::write_volatile(to.cast::<u64>(), low);
        core::ptr::write_volatile(to.add(8), high);
    }
    set(&raw mut work.filled, at + HEAD);
}

/// Payload that is passed on.
#[inline(always)]
fn payload(work: &mut Work, d: &mut Direction) {
    let n = of_buffer(work, get(&raw const d.remaining), WINDOW as u64);
    let at = get(&raw const work.filled) & 0x1fff;
    if at > DATA_LIMIT as u64 {
        return;
    }
    // SAFETY: at + n <= DATA_LIMIT + WINDOW.
    let to = unsafe { (&raw mut work.data).cast::<u8>().add(at as usize) };
    if !read(work, d, to, n) {
        return;
    }
    set(&raw mut work.filled, at + n);
    d.remaining = get(&raw const d.remaining).wrapping_sub(n);
    if get(&raw const d.remaining) == 0 {
        d.mode = mode::FRAME_HEAD;
    }
}

/// A DATA frame begins.
#[inline(always)]
fn begin_data(work: &mut Work, connection: &mut Connection, head: &Head) {
    let d = &mut connection.directions[work.direction as usize & 1];
    d.length = head.length;
    d.mode = if head.flags & PADDED != 0 && head.length != 0 { mode::PADDING } else { mode::DATA };
    let f = frames(d);
    f.padding = 0;
    f.messages = 0;
    f.flags = f.state & DataFlag::INEXACT;
    f.follow = 0;
    if head.length == 0 {
        return;
    }
    // The slot of the stream, or a free one, or one whose stream is put aside.
    let stream = |f: &Frames, i: usize| get(&raw const f.slots[i].stream);
    let mine = |f: &Frames, i: usize| stream(f, i) == head.stream;
    let slot = if mine(f, 0) {
        0
    } else if mine(f, 1) {
        1
    } else if mine(f, 2) {
        2
    } else if stream(f, 0) == 0 {
        0
    } else if stream(f, 1) == 0 {
        1
    } else if stream(f, 2) == 0 {
        2
    } else {
        (head.stream >> 1) as u8 & 1
    };
    set(&raw mut f.slot, slot);
    f.follow = 1;
    let i = usize::from(get(&raw const f.slot)) & 3;
    if i < SLOTS && get(&raw const f.slots[i].stream) != head.stream {
        http2_exchange(work, connection, head.stream);
    }
}

/// Gives the slot of the DATA frame under way to `stream`; which had it, if any, is put aside with its message.
/// See [`crate::once`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn http2_exchange(work: *mut Work, connection: *mut Connection, stream: u32) -> u32 {
    // SAFETY: `begin_data` passes what it has for itself.
    if let Some((work, connection)) = unsafe { once(work, connection) } {
        exchange(work, connection, stream);
    }
    0
}

#[inline(always)]
fn exchange(work: &mut Work, connection: &mut Connection, stream: u32) {
    let mut key = MessageKey { connection: connection.id, stream: 0, direction: work.direction as u32 & 1 };
    let f = frames(&mut connection.directions[work.direction as usize & 1]);
    let i = usize::from(get(&raw const f.slot)) & 3;
    if i >= SLOTS {
        return;
    }
    let slot = &mut f.slots[i];
    if get(&raw const slot.stream) != 0 {
        key.stream = slot.stream;
        // By way of the stack: to Linux 6.1 the memory behind an argument is none that a value may be in.
        if MESSAGES.insert(&key, &get(slot), 0).is_err() {
            f.flags |= DataFlag::INEXACT;
            f.state |= DataFlag::INEXACT;
        }
        f.state |= ASIDE;
    }
    let slot = &mut f.slots[i];
    slot.stream = stream;
    slot.left = 0;
    slot.got = 0;
    if f.state & ASIDE == 0 {
        return;
    }
    key.stream = stream;
    if let Some(aside) = MESSAGES.get_ptr(&key) {
        // SAFETY: map memory; of a stream's messages nobody else writes.
        unsafe {
            slot.left = (*aside).left;
            slot.got = (*aside).got;
            let mut n = 0;
            while n < PREFIX as usize {
                slot.prefix[n] = (*aside).prefix[n];
                n += 1;
            }
        }
        // Absent is as good as removed.
        let _ = MESSAGES.remove(&key);
    }
}

/// The length of the padding of a DATA frame.
#[inline(always)]
fn padding(work: &mut Work, d: &mut Direction) {
    let to = (&raw mut work.scratch).cast::<u8>();
    let n = of_buffer(work, 1, 1);
    if !read(work, d, to, n) {
        return;
    }
    let padding = get(&raw const work.scratch[0]) & 0xff;
    d.mode = mode::DATA;
    d.remaining = get(&raw const d.remaining).wrapping_sub(n);
    let room = get(&raw const d.length);
    d.length = if padding < room { room - 1 - padding } else { 0 };
    frames(d).padding = padding as u8;
}

/// Content and padding of a DATA frame.
#[inline(always)]
fn data(work: &mut Work, d: &mut Direction) {
    at_most(work, get(&raw const d.remaining));
    let left = get(&raw const d.length);
    let f = frames(d);
    let i = usize::from(get(&raw const f.slot)) & 3;
    if left != 0 && get(&raw const f.follow) != 0 && i < SLOTS {
        let slot = &mut f.slots[i];
        let message = u64::from(get(&raw const slot.left));
        if message != 0 {
            at_most(work, if message < left { message } else { left });
            slot.left = (message - get(&raw const work.at)) as u32;
        } else {
            let got = get(&raw const slot.got) & 7;
            // SAFETY: 7 + 5 bytes are within the slots and the fields behind them.
            let to = unsafe { (&raw mut slot.prefix).cast::<u8>().add(usize::from(got)) };
            let wanted = u64::from(PREFIX.wrapping_sub(got));
            let n = of_buffer(work, if wanted < left { wanted } else { left }, u64::from(PREFIX));
            if !read(work, d, to, n) {
                return;
            }
            prefix(frames(d), i, got + n as u8);
        }
    }
    content(work, d);
}

/// Counts what is consumed of a DATA frame.
#[inline(always)]
fn content(work: &Work, d: &mut Direction) {
    let n = get(&raw const work.at);
    d.remaining = get(&raw const d.remaining).wrapping_sub(n);
    let left = get(&raw const d.length);
    d.length = if n < left { left - n } else { 0 };
}

/// `got` bytes of a message's prefix are there.
#[inline(always)]
fn prefix(f: &mut Frames, i: usize, got: u8) {
    if i >= SLOTS {
        return;
    }
    let slot = &mut f.slots[i];
    slot.got = got;
    // Compressed or not; anything else is no message.
    if get(&raw const slot.prefix[0]) > 1 {
        f.flags |= DataFlag::OTHER;
        f.follow = 0;
        slot.got = 0;
        slot.stream = 0;
        return;
    }
    if got < PREFIX {
        return;
    }
    slot.got = 0;
    let byte = |i: usize| u32::from(get(&raw const slot.prefix[i]));
    slot.left = byte(1) << 24 | byte(2) << 16 | byte(3) << 8 | byte(4);
    f.messages += 1;
    if f.messages >= MAX_MESSAGES {
        f.flags |= DataFlag::INEXACT;
        f.follow = 0;
        slot.stream = 0;
    }
}

/// The last byte of a DATA frame was seen.
#[inline(always)]
fn finish_data(work: &mut Work, d: &mut Direction) -> bool {
    d.mode = mode::FRAME_HEAD;
    let f = frames(d);
    let i = usize::from(get(&raw const f.slot)) & 3;
    if f.follow != 0 && i < SLOTS {
        let slot = &mut f.slots[i];
        if f.head[4] & END_STREAM != 0 || (slot.left == 0 && slot.got == 0) {
            slot.stream = 0;
        }
    }
    if f.head[4] & END_STREAM != 0 {
        set(&raw mut work.hits, get(&raw const work.hits) + 1);
    }
    let info = u32::from(f.padding) | u32::from(f.messages) << 8 | u32::from(f.flags) << 24;
    if get(&raw const work.filled) == 0 {
        work.end = work.now;
    }
    put_head(work, d);
    let at = get(&raw const work.filled) & 0x1fff;
    if at > DATA_LIMIT as u64 {
        return false;
    }
    // SAFETY: at + 4 is within `data`.
    unsafe { core::ptr::write_volatile((&raw mut work.data).cast::<u8>().add(at as usize).cast::<u32>(), info) };
    set(&raw mut work.filled, at + 4);
    true
}

/// A stream is over: its message is too.
#[inline(always)]
fn release(connection: &mut Connection, direction: usize, stream: u32) {
    let key = MessageKey { connection: connection.id, stream, direction: direction as u32 };
    let d = &mut connection.directions[direction];
    if d.mode < mode::PREFACE {
        return;
    }
    let f = frames(d);
    let mut i = 0;
    while i < SLOTS {
        if get(&raw const f.slots[i].stream) == stream {
            set(&raw mut f.slots[i].stream, 0);
        }
        i += 1;
    }
    if f.state & ASIDE != 0 {
        // Absent is as good as removed.
        let _ = MESSAGES.remove(&key);
    }
}

/// Does the system call begin with heads of frames? Unless the connection is known to speak HTTP/2, two
/// frames must follow each other, or one must end where the buffer ends.
#[inline(always)]
fn seek(work: &mut Work, known: bool) -> bool {
    if work.readable == 0 || work.skip != 0 {
        return false;
    }
    if work.length == 0 && !next_buffer(work) {
        return false;
    }
    set(&raw mut work.at, 0);
    let mut i = 0;
    while i < 4 {
        let at = get(&raw const work.at);
        // To the byte all that was moved, or one of the buffers it was gathered from.
        if at == work.left || at == work.length {
            return i > 0;
        }
        if at + HEAD > work.length || at + HEAD > work.left {
            return i > 1 || (known && i > 0);
        }
        // SAFETY: `scratch` has 32 bytes; the helper checks the user's address.
        let failed = unsafe {
            bpf_probe_read_user((&raw mut work.scratch).cast(), HEAD as u32, (work.pointer + at) as *const _)
        };
        if failed != 0 {
            return false;
        }
        let head = parse(get(&raw const work.scratch[0]), get(&raw const work.scratch[1]) as u8);
        if !is_likely(&head) {
            return false;
        }
        set(&raw mut work.at, at + HEAD + head.length);
        i += 1;
    }
    true
}

/// `missed` bytes of the direction went by unseen: content of a frame, or the position in the frames is lost.
#[inline(always)]
pub fn missing(work: &mut Work, connection: &mut Connection, missed: u64) {
    let direction = work.direction as usize & 1;
    let d = &mut connection.directions[direction];
    if d.mode < mode::PREFACE || d.mode == mode::SEEK {
        // Nothing of it was seen, or the position is looked for already.
        return;
    }
    if d.mode == mode::DATA && missed <= d.remaining {
        let f = frames(d);
        f.follow = 0;
        f.flags |= DataFlag::INEXACT;
        set(&raw mut work.at, missed);
        content(work, d);
    } else if d.mode == mode::SKIP && missed < d.remaining {
        d.remaining -= missed;
    } else {
        emit::count(Count::MISSED);
        d.mode = mode::SEEK;
        lose(connection, direction);
    }
}

/// The position in the frames is lost: found again where a system call begins with them.
#[inline(always)]
pub fn lose(connection: &mut Connection, direction: usize) {
    let sure = (connection.directions[0].bits | connection.directions[1].bits) & SURE != 0;
    connection.strikes += 1;
    if connection.strikes >= STRIKES || !sure {
        emit::count(Count::NOT_HTTP);
        connection.state |= QUIET;
    }
    let d = &mut connection.directions[direction];
    d.lost = 1;
    forget(d);
}

/// What a connection's end says of a direction: stream and bytes of the DATA frame under way, in
/// `message` and `body`. True when there is one.
#[inline(always)]
pub fn under_way(d: &mut Direction) -> bool {
    if d.mode != mode::DATA {
        return false;
    }
    let head = parse(d.carry[0], d.carry[1] as u8);
    d.message = u64::from(head.stream & 0x7fff_ffff);
    d.body = head.length.wrapping_sub(d.remaining);
    true
}
