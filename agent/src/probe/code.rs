//! Reads machine code, as little as that is possible: where does an accessor find its field? x86_64 alone.

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

    proptest::proptest! {
        #[test]
        fn any_bytes(code in proptest::collection::vec(proptest::num::u8::ANY, 0..256)) {
            let _ = random_layout(&code);
        }
    }
}
