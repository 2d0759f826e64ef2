//! Reads machine code, as little as that is possible: where does an accessor find its field, which function does a
//! wrapper call? x86_64 alone.

use agent_ebpf::{Layout, Place};
use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};

/// Instructions of an accessor that are looked at.
const MOST_INSTRUCTIONS: usize = 64;
/// Largest offset that a field of a session is believed to have, bytes.
const MAX_OFFSET: u64 = 8192;
/// Smallest: the first bytes of every known session are something else.
const MIN_OFFSET: u64 = 8;

/// What a register holds, as far as it is followed.
#[derive(Clone, Copy, PartialEq)]
enum Value {
    /// The function's nth argument.
    Argument(usize),
    /// What a pointer in the session, which is the first argument, leads to.
    Behind(u32),
    /// What was read at an offset of the struct that a pointer in the session leads to.
    Within(Place),
    /// Zero: the kind of a session over TCP, where there are others (OpenSSL 3.2 has QUIC's).
    Zero,
}

/// Registers of the first arguments, System V ABI.
const ARGUMENTS: [Register; 3] = [Register::RDI, Register::RSI, Register::RDX];

/// A walk over the first instructions of an accessor, as a session over TCP whose pointers are all set takes it.
/// Where that does not tell whether a branch is taken, it is not.
struct Walk<'a> {
    decoder: Decoder<'a>,
    bytes: usize,
    left: usize,
    values: Vec<(Register, Value)>,
    /// The zero flag, where it is known.
    zero: Option<bool>,
}

/// Registers that a called function may change, System V ABI.
const VOLATILE: [Register; 9] = [
    Register::RAX,
    Register::RCX,
    Register::RDX,
    Register::RSI,
    Register::RDI,
    Register::R8,
    Register::R9,
    Register::R10,
    Register::R11,
];

impl<'a> Walk<'a> {
    fn new(code: &'a [u8]) -> Self {
        let values = ARGUMENTS.into_iter().enumerate().map(|(i, r)| (r, Value::Argument(i))).collect();
        let decoder = Decoder::new(64, code, DecoderOptions::NONE);
        Self { decoder, bytes: code.len(), left: MOST_INSTRUCTIONS, values, zero: None }
    }

    /// The next instruction, before it is done.
    fn next(&mut self) -> Option<Instruction> {
        self.left = self.left.checked_sub(1)?;
        let i = self.decoder.can_decode().then(|| self.decoder.decode())?;
        (!i.is_invalid()).then_some(i)
    }

    fn of(&self, register: Register) -> Option<Value> {
        self.values.iter().find(|(r, _)| *r == register.full_register()).map(|(_, v)| *v)
    }

    /// Does it.
    fn step(&mut self, i: &Instruction) {
        match i.mnemonic() {
            Mnemonic::Test => {
                let one = i.op1_kind() == OpKind::Register && i.op0_register() == i.op1_register();
                let value = if one { self.of(i.op0_register()) } else { None };
                self.zero = value.map(|v| v == Value::Zero);
            }
            Mnemonic::Cmp => {
                let kind = i.op0_kind() == OpKind::Memory && self.read(i) == Some(Value::Zero);
                self.zero = (kind && i.try_immediate(1).is_ok_and(|x| x == 0)).then_some(true);
            }
            Mnemonic::Je if self.zero == Some(true) => self.go(i.near_branch64()),
            Mnemonic::Jne if self.zero == Some(false) => self.go(i.near_branch64()),
            Mnemonic::Jmp if i.op0_kind() == OpKind::NearBranch64 => self.go(i.near_branch64()),
            Mnemonic::Call => self.values.retain(|(r, _)| !VOLATILE.contains(r)),
            Mnemonic::Push | Mnemonic::Je | Mnemonic::Jne => {}
            _ => self.assign(i),
        }
    }

    /// Goes on at an address, unless that is outside of what is looked at.
    fn go(&mut self, to: u64) {
        match usize::try_from(to) {
            Ok(at) if at < self.bytes && self.decoder.set_position(at).is_ok() => self.decoder.set_ip(to),
            _ => self.left = 0,
        }
    }

    fn assign(&mut self, i: &Instruction) {
        if i.op_count() == 0 || i.op0_kind() != OpKind::Register {
            return;
        }
        let target = i.op0_register().full_register();
        let new = match (i.mnemonic(), i.op1_kind()) {
            (Mnemonic::Mov, OpKind::Register) if i.op0_register().size() == 8 => self.of(i.op1_register()),
            (Mnemonic::Mov, OpKind::Memory) => self.read(i),
            (Mnemonic::Xor, OpKind::Register) if i.op0_register() == i.op1_register() => Some(Value::Zero),
            _ => None,
        };
        self.values.retain(|(r, _)| *r != target);
        self.values.extend(new.map(|v| (target, v)));
    }

    /// What an instruction reads from memory. A length may have 32 bits, a pointer has 64.
    fn read(&self, i: &Instruction) -> Option<Value> {
        if i.memory_index() != Register::None {
            return None;
        }
        let (base, wide) = (self.of(i.memory_base())?, i.memory_size().size() == 8);
        if base == Value::Argument(0) && !wide && i.memory_displacement64() == 0 {
            return Some(Value::Zero);
        }
        let at = offset(i.memory_displacement64())?;
        match base {
            Value::Argument(0) if wide => Some(Value::Behind(at)),
            Value::Argument(0) => Some(Value::Within(Place { pointer: Layout::DIRECT, at })),
            Value::Behind(pointer) => Some(Value::Within(Place { pointer, at })),
            _ => None,
        }
    }
}

fn offset(x: u64) -> Option<u32> {
    (MIN_OFFSET..MAX_OFFSET).contains(&x).then(|| u32::try_from(x).ok()).flatten()
}

/// Where a value was read from.
fn place(value: Value) -> Option<Place> {
    match value {
        Value::Behind(at) => Some(Place { pointer: Layout::DIRECT, at }),
        Value::Within(place) => Some(place),
        Value::Argument(_) | Value::Zero => None,
    }
}

/// Finds where `SSL_get_client_random(const SSL *, unsigned char *, size_t)` copies from: the first address
/// that is built from its first argument, directly (OpenSSL 3) or through one pointer (OpenSSL 1.1,
/// BoringSSL). What is found may be wrong without harm: 128 bits of the wire must be the same as those there.
#[must_use]
pub fn random_layout(code: &[u8]) -> Option<Layout> {
    if cfg!(not(target_arch = "x86_64")) {
        return None;
    }
    let mut walk = Walk::new(code);
    while let Some(i) = walk.next() {
        let plain = i.memory_index() == Register::None;
        let (base, at) = match i.mnemonic() {
            Mnemonic::Lea if plain => (i.memory_base(), Some(i.memory_displacement64())),
            Mnemonic::Add if i.op0_kind() == OpKind::Register && i.op0_register().size() == 8 => {
                (i.op0_register(), i.try_immediate(1).ok())
            }
            // Vector copies name the place themselves.
            Mnemonic::Movups | Mnemonic::Movdqu | Mnemonic::Vmovups | Mnemonic::Vmovdqu
                if i.op1_kind() == OpKind::Memory && plain =>
            {
                (i.memory_base(), Some(i.memory_displacement64()))
            }
            _ => (Register::None, None),
        };
        let pointer = match walk.of(base) {
            Some(Value::Argument(0)) => Some(Layout::DIRECT),
            Some(Value::Behind(at)) => Some(at),
            _ => None,
        };
        if let (Some(pointer), Some(random)) = (pointer, at.and_then(offset)) {
            return Some(Layout { known: 1, pointer, random, ..Layout::default() });
        }
        walk.step(&i);
    }
    None
}

/// Finds what `SSL_get0_alpn_selected(const SSL *, const unsigned char **, unsigned *)` hands out: the place of the name,
/// and the offset of its length in the same struct.
#[must_use]
pub fn alpn(code: &[u8]) -> Option<(Place, u32)> {
    if cfg!(not(target_arch = "x86_64")) {
        return None;
    }
    let mut walk = Walk::new(code);
    let (mut name, mut len) = (None, None);
    while let Some(i) = walk.next() {
        if i.mnemonic() == Mnemonic::Mov && i.op0_kind() == OpKind::Memory && i.op1_kind() == OpKind::Register {
            let stored = walk.of(i.op1_register()).and_then(place);
            match walk.of(i.memory_base()) {
                Some(Value::Argument(1)) if i.memory_displacement64() == 0 => name = name.or(stored),
                Some(Value::Argument(2)) if i.memory_displacement64() == 0 => len = len.or(stored),
                _ => {}
            }
        }
        if let (Some(name), Some(len)) = (name, len) {
            return (name.pointer == len.pointer).then_some((name, len.at));
        }
        if i.mnemonic() == Mnemonic::Ret {
            break;
        }
        walk.step(&i);
    }
    None
}

/// Finds where `SSL_get_peer_certificate(const SSL *)`, in any of its forms, has what it returns: the first field that
/// it reads through a pointer of the session.
#[must_use]
pub fn certificate(code: &[u8]) -> Option<Place> {
    if cfg!(not(target_arch = "x86_64")) {
        return None;
    }
    let mut walk = Walk::new(code);
    while let Some(i) = walk.next() {
        if matches!(i.mnemonic(), Mnemonic::Ret | Mnemonic::Call) {
            break;
        }
        walk.step(&i);
        let read = i.mnemonic() == Mnemonic::Mov && i.op1_kind() == OpKind::Memory && i.op0_register().size() == 8;
        if read && let Some(Value::Within(place)) = walk.of(i.op0_register()) {
            return Some(place);
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
    fn what_alpn_chose_and_who_the_other_end_is() {
        // OpenSSL 3: mov rax,[rdi+0x488]; xor ecx,ecx; mov [rsi],rax; test rax,rax; je; mov ecx,[rdi+0x490]; mov [rdx],ecx
        let code = [
            0x48, 0x8b, 0x87, 0x88, 0x04, 0, 0, 0x31, 0xc9, 0x48, 0x89, 0x06, 0x48, 0x85, 0xc0, 0x74, 0x06, 0x8b, 0x8f,
            0x90, 0x04, 0, 0, 0x89, 0x0a, 0xc3,
        ];
        assert_eq!(alpn(&code), Some((Place { pointer: Layout::DIRECT, at: 0x488 }, 0x490)));
        // OpenSSL 1.1: mov rax,[rdi+0xa8]; mov rcx,[rax+0x3e8]; mov [rsi],rcx; ...; mov eax,[rax+0x3f0]; mov [rdx],eax
        let code = [
            0x48, 0x8b, 0x87, 0xa8, 0, 0, 0, 0x48, 0x8b, 0x88, 0xe8, 0x03, 0, 0, 0x48, 0x89, 0x0e, 0x8b, 0x80, 0xf0,
            0x03, 0, 0, 0x89, 0x02, 0xc3,
        ];
        assert_eq!(alpn(&code), Some((Place { pointer: 0xa8, at: 0x3e8 }, 0x3f0)));
        assert_eq!(alpn(&code[..14]), None);
        // OpenSSL 3.5, a kind before the session, QUIC's in the middle: mov r12,rsi; mov rbx,rdx; test rdi,rdi; je;
        // mov eax,[rdi]; test eax,eax; je +2; xor edi,edi; mov rax,[rdi+0x4b8]; mov [r12],rax; test rax,rax; je;
        // mov rax,[rdi+0x4c0]; mov [rbx],eax
        let code = [
            0x49, 0x89, 0xf4, 0x48, 0x89, 0xd3, 0x48, 0x85, 0xff, 0x74, 0x40, 0x8b, 0x07, 0x85, 0xc0, 0x74, 0x02, 0x31,
            0xff, 0x48, 0x8b, 0x87, 0xb8, 0x04, 0, 0, 0x49, 0x89, 0x04, 0x24, 0x48, 0x85, 0xc0, 0x74, 0x13, 0x48, 0x8b,
            0x87, 0xc0, 0x04, 0, 0, 0x89, 0x03, 0xc3,
        ];
        assert_eq!(alpn(&code), Some((Place { pointer: Layout::DIRECT, at: 0x4b8 }, 0x4c0)));
        // test rdi,rdi; je; mov rax,[rdi+0x918]; test rax,rax; je; mov rax,[rax+0x2b8]; ret
        let code = [
            0x48, 0x85, 0xff, 0x74, 0x1b, 0x48, 0x8b, 0x87, 0x18, 0x09, 0, 0, 0x48, 0x85, 0xc0, 0x74, 0x11, 0x48, 0x8b,
            0x80, 0xb8, 0x02, 0, 0, 0xc3,
        ];
        assert_eq!(certificate(&code), Some(Place { pointer: 0x918, at: 0x2b8 }));
        // A call comes first: push rbx; call
        assert_eq!(certificate(&[0x53, 0xe8, 0x10, 0, 0, 0, 0x48, 0x8b, 0x80, 0xb8, 0x02, 0, 0]), None);
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
            let _ = (random_layout(&code), alpn(&code), certificate(&code), inner(&code), is_stub(&code));
        }
    }
}
