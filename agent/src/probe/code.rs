//! Reads machine code, as little as that is possible: where does an accessor find its field, which function does a
//! wrapper call? x86_64 alone.

use agent_ebpf::Layout;
use iced_x86::{Decoder, DecoderOptions, Mnemonic, OpKind, Register};

/// Instructions of an accessor that are looked at.
const MOST_INSTRUCTIONS: usize = 64;
/// Largest offset that a field of a session is believed to have, bytes.
const MAX_OFFSET: u64 = 8192;
/// Smallest: the first bytes of every known session are something else.
const MIN_OFFSET: u64 = 8;

/// Finds where `SSL_get_client_random(const SSL *, unsigned char *, size_t)` copies from: the first address
/// that is built from its first argument, directly (OpenSSL 3) or through one pointer (OpenSSL 1.1,
/// BoringSSL). What is found may be wrong without harm: 128 bits of the wire must be the same as those there.
#[must_use]
pub fn random_layout(code: &[u8]) -> Option<Layout> {
    if cfg!(not(target_arch = "x86_64")) {
        return None;
    }
    // What each register holds: the session, or what a pointer in it at an offset leads to.
    #[derive(Clone, Copy)]
    enum Value {
        Session,
        Behind(u32),
    }
    let mut values: Vec<(Register, Value)> = vec![(Register::RDI, Value::Session)];
    let of = |values: &[(Register, Value)], r: Register| values.iter().find(|(x, _)| *x == r).map(|(_, v)| *v);
    let offset = |x: u64| (MIN_OFFSET..MAX_OFFSET).contains(&x).then(|| u32::try_from(x).ok()).flatten();
    let layout = |value: Value, random: u32| Layout {
        known: 1,
        pointer: match value {
            Value::Session => Layout::DIRECT,
            Value::Behind(at) => at,
        },
        random,
        pad: 0,
    };
    let mut decoder = Decoder::new(64, code, DecoderOptions::NONE);
    for _ in 0..MOST_INSTRUCTIONS {
        if !decoder.can_decode() {
            break;
        }
        let i = decoder.decode();
        if i.is_invalid() {
            break;
        }
        let target = i.op0_register().full_register();
        let wide = i.op0_register().size() == 8;
        let plain = i.memory_index() == Register::None;
        match i.mnemonic() {
            Mnemonic::Lea if plain => {
                if let (Some(value), Some(at)) = (of(&values, i.memory_base()), offset(i.memory_displacement64())) {
                    return Some(layout(value, at));
                }
                values.retain(|(r, _)| *r != target);
            }
            Mnemonic::Add if i.op0_kind() == OpKind::Register && wide => {
                if let (Some(value), Some(at)) = (of(&values, target), i.try_immediate(1).ok().and_then(offset)) {
                    return Some(layout(value, at));
                }
                values.retain(|(r, _)| *r != target);
            }
            Mnemonic::Mov if i.op0_kind() == OpKind::Register => {
                let new = match i.op1_kind() {
                    OpKind::Register if wide => of(&values, i.op1_register()),
                    OpKind::Memory if wide && plain => match of(&values, i.memory_base()) {
                        Some(Value::Session) => offset(i.memory_displacement64()).map(Value::Behind),
                        _ => None,
                    },
                    _ => None,
                };
                values.retain(|(r, _)| *r != target);
                values.extend(new.map(|v| (target, v)));
            }
            // Vector copies name the place themselves.
            Mnemonic::Movups | Mnemonic::Movdqu | Mnemonic::Vmovups | Mnemonic::Vmovdqu
                if i.op1_kind() == OpKind::Memory && plain =>
            {
                if let (Some(value), Some(at)) = (of(&values, i.memory_base()), offset(i.memory_displacement64())) {
                    return Some(layout(value, at));
                }
            }
            Mnemonic::Cmp | Mnemonic::Test | Mnemonic::Push => {}
            _ if i.op_count() > 0 && i.op0_kind() == OpKind::Register => values.retain(|(r, _)| *r != target),
            _ => {}
        }
    }
    None
}

/// The function that does the work of a wrapper.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Inner {
    /// From the wrapper's first byte to its own, bytes.
    pub distance: i64,
    /// Which argument points to where it puts the number of bytes, from 0.
    pub moved: usize,
}

/// Finds the function that `int SSL_read(session, buffer, int size)` or `SSL_write` hands its arguments to, and which
/// the library's BIO calls as well: the first call before which session and buffer are where they came, the size was
/// widened, and the next (or second next) argument is a place on the stack, for the number of bytes.
#[must_use]
pub fn inner(code: &[u8]) -> Option<Inner> {
    if cfg!(not(target_arch = "x86_64")) {
        return None;
    }
    let mut widened = false;
    let mut moved = None;
    let mut decoder = Decoder::new(64, code, DecoderOptions::NONE);
    for _ in 0..MOST_INSTRUCTIONS {
        if !decoder.can_decode() {
            return None;
        }
        let i = decoder.decode();
        if i.is_invalid() || matches!(i.mnemonic(), Mnemonic::Ret | Mnemonic::Jmp) {
            return None;
        }
        if i.mnemonic() == Mnemonic::Call {
            let moved = moved.filter(|_| widened && i.op0_kind() == OpKind::NearBranch64)?;
            return Some(Inner { distance: i.near_branch64().cast_signed(), moved });
        }
        if i.op_count() == 0 || i.op0_kind() != OpKind::Register {
            continue;
        }
        let reads_only = matches!(i.mnemonic(), Mnemonic::Cmp | Mnemonic::Test | Mnemonic::Push);
        let of_stack = match i.mnemonic() {
            Mnemonic::Mov => i.op1_kind() == OpKind::Register && i.op1_register() == Register::RSP,
            Mnemonic::Lea => matches!(i.memory_base(), Register::RSP | Register::RBP),
            _ => false,
        };
        match i.op0_register().full_register() {
            _ if reads_only => {}
            Register::RDI | Register::RSI => return None,
            Register::RDX => widened = i.mnemonic() == Mnemonic::Movsxd,
            Register::RCX if of_stack => moved = Some(3),
            Register::R8 if of_stack => moved = Some(4),
            Register::RCX | Register::R8 if moved == Some(3) => moved = None,
            Register::R8 => moved = None,
            _ => {}
        }
    }
    None
}

/// How far from a function's first byte its first direct call goes.
#[must_use]
pub fn first_call(code: &[u8]) -> Option<i64> {
    let mut decoder = Decoder::new(64, code, DecoderOptions::NONE);
    let calls = std::iter::from_fn(|| decoder.can_decode().then(|| decoder.decode()));
    calls
        .take(MOST_INSTRUCTIONS)
        .take_while(|i| !i.is_invalid())
        .find(|i| i.mnemonic() == Mnemonic::Call)
        .filter(|i| i.op0_kind() == OpKind::NearBranch64)
        .map(|i| i.near_branch64().cast_signed())
}

/// Does a function do nothing but go where a table of addresses says (an entry of a procedure linkage table)?
#[must_use]
pub fn is_stub(code: &[u8]) -> bool {
    let mut decoder = Decoder::new(64, code, DecoderOptions::NONE);
    for _ in 0..2 {
        let i = decoder.decode();
        if i.mnemonic() == Mnemonic::Jmp {
            return i.op0_kind() == OpKind::Memory;
        }
    }
    false
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;

    #[test]
    fn openssl_3_keeps_the_random_in_the_session() {
        // mov rcx,rsi; mov eax,32; test rdx,rdx; je; cmp rdx,rax; lea rsi,[rdi+0x160]
        let code = [
            0x48, 0x89, 0xf1, 0xb8, 0x20, 0, 0, 0, 0x48, 0x85, 0xd2, 0x74, 0x5a, 0x48, 0x39, 0xc2, 0x48, 0x8d, 0xb7,
            0x60, 0x01, 0, 0,
        ];
        let layout = random_layout(&code).expect("found");
        assert_eq!((layout.pointer, layout.random), (Layout::DIRECT, 0x160));
    }

    #[test]
    fn boringssl_and_openssl_1_1_behind_a_pointer() {
        // mov rax,[rdi+0x30]; lea rsi,[rax+0x30]
        let code = [0x48, 0x8b, 0x47, 0x30, 0x48, 0x8d, 0x70, 0x30];
        let layout = random_layout(&code).expect("found");
        assert_eq!((layout.pointer, layout.random), (0x30, 0x30));
        // mov rsi,[rdi+0xa8]; add rsi,0xb8
        let code = [0x48, 0x8b, 0xb7, 0xa8, 0, 0, 0, 0x48, 0x81, 0xc6, 0xb8, 0, 0, 0];
        let layout = random_layout(&code).expect("found");
        assert_eq!((layout.pointer, layout.random), (0xa8, 0xb8));
    }

    #[test]
    fn the_function_behind_ssl_read() {
        // sub rsp,24; mov rax,fs:40; mov [rsp+8],rax; xor eax,eax; test edx,edx; js; mov rcx,rsp; movsxd rdx,edx; call
        let code = [
            0x48, 0x83, 0xec, 0x18, 0x64, 0x48, 0x8b, 0x04, 0x25, 0x28, 0, 0, 0, 0x48, 0x89, 0x44, 0x24, 0x08, 0x31,
            0xc0, 0x85, 0xd2, 0x78, 0x2f, 0x48, 0x89, 0xe1, 0x48, 0x63, 0xd2, 0xe8, 0x3d, 0xfe, 0xff, 0xff,
        ];
        assert_eq!(inner(&code), Some(Inner { distance: 35 - 0x1c3, moved: 3 }));
        // With flags: mov rdx,edx; lea r8,[rsp]; xor ecx,ecx; call
        let code = [0x48, 0x63, 0xd2, 0x4c, 0x8d, 0x04, 0x24, 0x31, 0xc9, 0xe8, 0x10, 0, 0, 0];
        assert_eq!(inner(&code), Some(Inner { distance: 14 + 16, moved: 4 }));
        // An error is noted first: call before the arguments are there.
        assert_eq!(inner(&[0xe8, 0x10, 0, 0, 0, 0x48, 0x63, 0xd2]), None);
        // The session was exchanged for another: mov rdi,[rdi+48]
        assert_eq!(inner(&[0x48, 0x8b, 0x7f, 0x30, 0x48, 0x63, 0xd2, 0x48, 0x89, 0xe1, 0xe8, 0, 0, 0, 0]), None);
        // endbr64; jmp [rip+0x1000]
        assert!(is_stub(&[0xf3, 0x0f, 0x1e, 0xfa, 0xff, 0x25, 0, 0x10, 0, 0]) && !is_stub(&code));
    }

    proptest::proptest! {
        #[test]
        fn any_bytes(code in proptest::collection::vec(proptest::num::u8::ANY, 0..256)) {
            let _ = (random_layout(&code), inner(&code), is_stub(&code));
        }
    }
}
