//! Where to probe `crypto/tls` in a Go executable: behind the stack check of each function and at its return
//! instructions, which are found by decoding it. What the probes do: `agent-ebpf/src/go.rs`.
//!
//! Covered: Go 1.17 (arm64: 1.18) and later, from when arguments are in registers; static, dynamic,
//! position-independent, stripped. Not covered: forks of `crypto/tls` under other names, TLS within TLS.

use std::{fs::File, ops::Range};

use agent_ebpf::Op;
use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register};
use object::{
    Endianness, ReadCache, ReadRef,
    elf::{EM_AARCH64, EM_X86_64, FileHeader64, PF_X, PT_DYNAMIC, PT_LOAD, PT_NOTE},
    read::elf::{Dyn as _, FileHeader as _, ProgramHeader as _},
};

use super::{
    gopclntab::{self, Functions, Layout, ReadAt as _, Segment, Unfound},
    uprobe::Place,
};

/// Functions to probe, as the function table names them.
const READ: &str = "crypto/tls.(*Conn).Read";
const WRITE: &str = "crypto/tls.(*Conn).Write";
const CLOSE: &str = "crypto/tls.(*Conn).Close";
/// What they call.
const COPY: &str = "runtime.memmove";
const WRITE_RECORD: &str = "crypto/tls.(*Conn).writeRecordLocked";
const READ_RECORD: &str = "crypto/tls.(*Conn).readRecordOrCCS";
const READER: &str = "bytes.(*Reader).Read";
const HANDSHAKES: [&str; 2] = ["crypto/tls.(*Conn).clientHandshake", "crypto/tls.(*Conn).serverHandshake"];
/// Instructions of a function's start among which its stack check is.
const PROLOGUE: usize = 8;
/// Instructions between a call and the conditional jump on its result.
const BETWEEN: usize = 6;
/// `RET` of arm64.
const RET: u32 = 0xd65f_03c0;
/// Kinds of the dynamic section's entries for relocations.
const DT_RELA: i64 = 7;
const DT_RELASZ: i64 = 8;
/// Most bytes of notes and of the dynamic section, and most sections.
const MAX_TABLE: u64 = 64 << 10;
const MAX_SECTIONS: usize = 4096;

/// Why a Go executable's TLS cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Uncovered {
    /// Its functions were not found.
    #[error("{0}")]
    Table(#[from] Unfound),
    /// Arguments are on the stack.
    #[error("built by a Go before {}", if cfg!(target_arch = "aarch64") { "1.18" } else { "1.17" })]
    Old,
    /// `crypto/tls` is there, but not this function of it.
    #[error("it has no function {0}")]
    Absent(&'static str),
    /// The function's code is not understood.
    #[error("the code of {0} is not understood")]
    Code(&'static str),
}

/// The places for each program.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Places {
    /// `go_enter`.
    pub enter: Vec<Place>,
    /// `go_read`.
    pub read: Vec<Place>,
    /// `go_write`.
    pub write: Vec<Place>,
}

/// An executable that Go made.
#[derive(Debug)]
pub struct Executable {
    layout: Layout,
    machine: u16,
}

impl Executable {
    /// Reads the headers. `None` where it is another's, or for another architecture.
    #[must_use]
    pub fn open(file: &File) -> Option<Self> {
        let (layout, machine) = layout(&ReadCache::new(file))?;
        let own = if cfg!(target_arch = "aarch64") { EM_AARCH64 } else { EM_X86_64 };
        (machine == own).then_some(Self { layout, machine })
    }

    /// Finds the places. `None` where there is no TLS inside.
    ///
    /// # Errors
    /// [`Uncovered`].
    pub fn places(&self, file: &File) -> Result<Option<Places>, Uncovered> {
        let wanted = [READ, WRITE, CLOSE, HANDSHAKES[0], HANDSHAKES[1], COPY, WRITE_RECORD, READ_RECORD, READER];
        match gopclntab::functions(file, &self.layout, &wanted) {
            Ok(functions) if !functions.by_name.contains_key(READ) && !functions.by_name.contains_key(WRITE) => {
                Ok(None)
            }
            Ok(functions) => assemble(file, &functions, self.machine).map(Some),
            // Names are the same in all versions.
            Err(_) if gopclntab::find(file, &self.layout, WRITE.as_bytes()).is_none() => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// The version of Go, from what `go version -m` reads (Go 1.18 and later).
    #[must_use]
    pub fn version(&self, file: &File) -> Option<String> {
        // `debug/buildinfo`: magic, size of pointers, flags (2: texts follow, with their lengths), at 32 the texts.
        let at = gopclntab::find(file, &self.layout, b"\xff Go buildinf:\x08\x02")?;
        let mut text = [0; 128];
        let n = file.read_at(at + 32, &mut text);
        let (length, text) = text[..n].split_first()?;
        let version = std::str::from_utf8(text.get(..usize::from(*length))?).ok()?.strip_prefix("go")?;
        Some(version.split(' ').next().unwrap_or_default().to_owned())
    }
}

fn assemble(file: &File, functions: &Functions, machine: u16) -> Result<Places, Uncovered> {
    if functions.is_before_1_18 && machine == EM_AARCH64 {
        return Err(Uncovered::Old);
    }
    let shape = |name: &'static str| {
        let range = functions.by_name.get(name).ok_or(Uncovered::Absent(name))?;
        let mut code = vec![0; usize::try_from(range.end - range.start).unwrap_or_default()];
        let n = file.read_at(range.start, &mut code);
        code.truncate(n);
        let distance = |callee| functions.by_name.get(callee).map(|r| r.start.wrapping_sub(range.start));
        let callees = [COPY, WRITE_RECORD, READ_RECORD, READER].map(distance);
        let shape = if machine == EM_AARCH64 { arm64(&code) } else { x86_64(&code, callees)? };
        let shape = shape.filter(|s| !s.returns.is_empty()).ok_or(Uncovered::Code(name))?;
        Ok::<_, Uncovered>((range, shape))
    };
    let mut places = Places::default();
    let mut add = |name, op, returns: bool| {
        let (range, shape): (&Range<u64>, Shape) = shape(name)?;
        let place = |at: u64, op| Place { offset: range.start + at, cookie: op };
        let enter = place(shape.entry, op);
        let leave = shape.returns.iter().map(|&at| place(at, Op::GO_RETURN));
        let within = |at: u64, op| place(at, op | shape.depth << 8);
        match op {
            Op::GO_READ if shape.spills && shape.copies.len() == 1 && !shape.results[1].is_empty() => {
                places.read.push(within(shape.copies[0], Op::GO_COPY));
                places.read.extend(shape.results[1].iter().map(|&at| within(at, Op::GO_RECORD)));
            }
            Op::GO_WRITE if !shape.results[0].is_empty() => {
                places.write.push(enter);
                places.write.extend(shape.results[0].iter().map(|&at| within(at, Op::GO_WRITTEN)));
            }
            Op::GO_READ if shape.spills => {
                places.read.extend(leave.map(|p| Place { cookie: Op::GO_SPILLED, ..p }));
            }
            Op::GO_READ => {
                places.enter.push(enter);
                places.read.extend(leave);
            }
            Op::GO_WRITE => {
                places.write.push(enter);
                places.write.extend(leave);
            }
            _ => {
                places.enter.push(enter);
                if returns {
                    places.enter.extend(leave);
                }
            }
        }
        Ok::<_, Uncovered>(())
    };
    add(READ, Op::GO_READ, true)?;
    add(WRITE, Op::GO_WRITE, true)?;
    // A program that is a client or a server alone has one of them; `Close` may be left out.
    let mut handshakes = 0;
    for (name, op, returns) in
        [(HANDSHAKES[0], Op::GO_HANDSHAKE, true), (HANDSHAKES[1], Op::GO_HANDSHAKE, true), (CLOSE, Op::GO_CLOSE, false)]
    {
        if functions.by_name.contains_key(name) {
            add(name, op, returns)?;
            handshakes += usize::from(returns);
        }
    }
    if handshakes == 0 {
        return Err(Uncovered::Absent(HANDSHAKES[0]));
    }
    Ok(places)
}

/// What is probed of a function: offsets in it.
#[derive(Debug, Default, PartialEq, Eq)]
struct Shape {
    /// Behind the stack check, where arguments are still where they came: a function that grows its stack begins
    /// again. The function's start where it has none.
    entry: u64,
    returns: Vec<u64>,
    /// Receiver and address of the buffer are on the stack at every return, where the ABI has room for them: they
    /// were put there before anything else was called, and nothing else is. Known of amd64 alone.
    spills: bool,
    /// Calls of `memmove`.
    copies: Vec<u64>,
    /// Conditional jumps behind the calls of `writeRecordLocked` and of `readRecordOrCCS`, where their results still are
    /// in their registers. Empty where there is a call without one.
    results: [Vec<u64>; 2],
    /// Bytes of the frame: from the stack pointer in the function to where it was at the entry.
    depth: u64,
}

/// Reads a function. `None` where it cannot be decoded. `callees` are the distances to `memmove`,
/// `writeRecordLocked`, `readRecordOrCCS` and the function that copies where it was not inlined.
fn x86_64(code: &[u8], callees: [Option<u64>; 4]) -> Result<Option<Shape>, Uncovered> {
    let mut shape = Shape::default();
    let mut spills = Spills::default();
    // Where the stack is grown: arguments are saved there too, for another reason.
    let mut body_end = u64::MAX;
    let mut decoder = Decoder::new(64, code, DecoderOptions::NONE);
    let (mut n, mut calls, mut returned, mut is_inlined) = (0, [0; 2], None, true);
    while decoder.can_decode() {
        let i = decoder.decode();
        if i.is_invalid() {
            return Ok(None);
        }
        // The stack's bound is in `g`, and that in thread-local storage while arguments are on the stack.
        if n < PROLOGUE && i.op_count() > 1 && i.op1_kind() == OpKind::Memory && i.memory_segment() == Register::FS {
            return Err(Uncovered::Old);
        }
        if n < PROLOGUE && shape.entry == 0 && i.mnemonic() == Mnemonic::Jbe {
            shape.entry = i.next_ip();
            body_end = i.near_branch64();
        } else if i.ip() < body_end {
            spills.look(&i);
        }
        let callee = (i.mnemonic() == Mnemonic::Call && i.op0_kind() == OpKind::NearBranch64)
            .then(|| callees.iter().position(|at| *at == Some(i.near_branch64())))
            .flatten();
        match callee {
            Some(0) => shape.copies.push(i.ip()),
            Some(3) => is_inlined = false,
            Some(callee) => {
                calls[callee - 1] += 1;
                returned = Some((callee - 1, n));
            }
            None => match returned {
                Some((_, at)) if n - at > BETWEEN => returned = None,
                Some((callee, _)) if i.flow_control() == FlowControl::ConditionalBranch => {
                    shape.results[callee].push(i.ip());
                    returned = None;
                }
                // The results must not be touched before.
                Some(_) if !leaves_results(&i) => returned = None,
                _ => {}
            },
        }
        if i.flow_control() == FlowControl::Return {
            shape.returns.push(i.ip());
        }
        n += 1;
    }
    shape.depth = spills.depth.unwrap_or_default();
    if !is_inlined {
        shape.copies.clear();
    }
    for (results, calls) in shape.results.iter_mut().zip(calls) {
        if results.len() != calls || shape.depth == 0 || shape.depth > u64::from(u16::MAX) {
            results.clear();
        }
    }
    shape.spills = spills.hold() && shape.entry != 0 && body_end < code.len() as u64;
    Ok(Some(shape))
}

/// Does an instruction go on to the next, with the first two results (rax, rbx) as they were?
fn leaves_results(i: &Instruction) -> bool {
    let register = i.op0_kind() == OpKind::Register;
    let target = i.op0_register().full_register();
    match i.mnemonic() {
        Mnemonic::Test | Mnemonic::Cmp | Mnemonic::Nop => true,
        Mnemonic::Mov | Mnemonic::Lea => !register || !matches!(target, Register::RAX | Register::RBX | Register::RSP),
        _ => false,
    }
}

/// Are the first two arguments kept in the caller's frame? (Go's `abi-internal.md`, "spill space".)
#[derive(Default)]
struct Spills {
    /// Bytes from the stack pointer to where it was at the entry, once the frame is made.
    depth: Option<u64>,
    pushed: u64,
    /// Stores of the receiver and of the buffer.
    stores: [usize; 2],
    is_wrong: bool,
}

impl Spills {
    /// Places of both, from the stack pointer at the entry; the return address is in front of them.
    const SLOTS: [(u64, Register); 2] = [(8, Register::RAX), (16, Register::RBX)];

    fn look(&mut self, i: &Instruction) {
        let Some(depth) = self.depth else {
            match i.mnemonic() {
                Mnemonic::Push => self.pushed += 8,
                Mnemonic::Sub if i.op0_register() == Register::RSP => {
                    self.depth = i.try_immediate(1).ok().and_then(|n| n.checked_add(self.pushed));
                }
                _ => {}
            }
            return;
        };
        if i.flow_control() == FlowControl::Call {
            self.is_wrong |= self.stores != [1, 1];
        }
        let is_address = i.mnemonic() == Mnemonic::Lea;
        let writes = i.op_count() > 0
            && i.op0_kind() == OpKind::Memory
            && !matches!(
                i.mnemonic(),
                Mnemonic::Cmp | Mnemonic::Test | Mnemonic::Push | Mnemonic::Call | Mnemonic::Jmp
            );
        if !writes && !is_address {
            return;
        }
        // The frame pointer is used for frames alone.
        self.is_wrong |= i.memory_base() == Register::RBP && i.memory_displacement64().cast_signed() >= 0;
        if i.memory_base() != Register::RSP {
            return;
        }
        let from = i.memory_displacement64().wrapping_sub(depth).cast_signed();
        let to = from + if is_address { 1 } else { i64::try_from(i.memory_size().size()).unwrap_or(64).max(1) };
        if to <= 8 || from >= 24 {
            return;
        }
        let slot = Self::SLOTS.iter().position(|(at, register)| {
            from == at.cast_signed() && i.mnemonic() == Mnemonic::Mov && i.op1_register() == *register
        });
        match slot {
            Some(slot) if !is_address && i.memory_index() == Register::None => self.stores[slot] += 1,
            _ => self.is_wrong = true,
        }
    }

    fn hold(&self) -> bool {
        !self.is_wrong && self.stores == [1, 1]
    }
}

fn arm64(code: &[u8]) -> Option<Shape> {
    let mut shape = Shape::default();
    for (i, word) in code.chunks_exact(4).enumerate() {
        let word = u32::from_le_bytes(word.try_into().ok()?);
        let at = 4 * i as u64;
        // B.LS: the condition is 9.
        if i < PROLOGUE && shape.entry == 0 && word & 0xff00_001f == 0x5400_0009 {
            shape.entry = at + 4;
        }
        if word == RET {
            shape.returns.push(at);
        }
    }
    Some(shape)
}

/// Reads the headers of a file, and its machine. `None` where it is not compiled by Go.
fn layout<'d>(data: impl ReadRef<'d>) -> Option<(Layout, u16)> {
    let header = FileHeader64::<Endianness>::parse(data).ok()?;
    let endian = header.endian().ok()?;
    let machine = header.e_machine(endian);
    let mut layout = Layout { quantum: if machine == EM_AARCH64 { 4 } else { 1 }, ..Layout::default() };
    let mut is_go = false;
    for segment in header.program_headers(endian, data).ok()? {
        let is_small = segment.p_filesz(endian) <= MAX_TABLE;
        match segment.p_type(endian) {
            PT_LOAD => layout.segments.push(Segment {
                address: segment.p_vaddr(endian),
                offset: segment.p_offset(endian),
                size: segment.p_filesz(endian),
                is_code: segment.p_flags(endian) & PF_X != 0,
            }),
            PT_NOTE if is_small => {
                let Ok(Some(mut notes)) = segment.notes(endian, data) else { continue };
                while let Ok(Some(note)) = notes.next() {
                    is_go |= note.name() == b"Go";
                }
            }
            PT_DYNAMIC if is_small => {
                for entry in segment.dynamic(endian, data).ok().flatten().unwrap_or_default() {
                    match entry.d_tag(endian) {
                        DT_RELA => layout.relocations.0 = entry.d_val(endian),
                        DT_RELASZ => layout.relocations.1 = entry.d_val(endian),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    // The note is left out with `-buildid=`.
    if !is_go && header.shnum(endian, data).is_ok_and(|n| n <= MAX_SECTIONS) {
        let sections = header.sections(endian, data).ok()?;
        is_go = sections.iter().any(|s| sections.section_name(endian, s).is_ok_and(|n| n == b".go.buildinfo"));
    }
    is_go.then_some((layout, machine))
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    /// `(*Conn).Read` of Go 1.26 for amd64, in short.
    const AMD64: [u8; 25] = [
        0x49, 0x3b, 0x66, 0x10, // cmp rsp, [r14+0x10]
        0x76, 0x0b, // jbe 17
        0x55, // push rbp
        0x48, 0x89, 0xe5, // mov rbp, rsp
        0x48, 0x85, 0xc0, // test rax, rax
        0x5d, // pop rbp
        0xc3, // ret
        0x5d, 0xc3, // pop rbp; ret
        0xe8, 0xc3, 0xc3, 0xc3, 0xc3, // call: bytes that look like returns
        0xeb, 0xe8, // jmp 0
        0x90,
    ];

    #[test]
    fn entries_and_returns_of_amd64() {
        let shape = x86_64(&AMD64, [None; 4]).expect("new enough").expect("code");
        assert_eq!(shape, Shape { entry: 6, returns: vec![14, 16], ..Shape::default() });
        assert_eq!(x86_64(&[0x06], [None; 4]).expect("new enough"), None);
    }

    #[test]
    fn arguments_that_stay_on_the_stack() {
        let code = |middle: &[u8]| {
            let mut code = vec![
                0x49, 0x3b, 0x66, 0x10, 0x76, 0, // cmp rsp, [r14+0x10]; jbe
                0x55, 0x48, 0x89, 0xe5, // push rbp; mov rbp, rsp
                0x48, 0x83, 0xec, 0x58, // sub rsp, 0x58
                0x48, 0x89, 0x44, 0x24, 0x68, // mov [rsp+0x68], rax
                0x48, 0x89, 0x5c, 0x24, 0x70, // mov [rsp+0x70], rbx
                0xe8, 0, 0, 0, 0, // call
            ];
            code.extend(middle);
            code.extend([0x48, 0x83, 0xc4, 0x58, 0x5d, 0xc3]); // add rsp, 0x58; pop rbp; ret
            code[5] = (code.len() - 6) as u8;
            code.extend([0x48, 0x89, 0x44, 0x24, 0x08, 0xeb, 0]); // mov [rsp+8], rax; jmp
            x86_64(&code, [None; 4]).expect("new enough").expect("code").spills
        };
        assert!(code(&[]));
        // A local: mov [rsp+0x50], rax.
        assert!(code(&[0x48, 0x89, 0x44, 0x24, 0x50]));
        // Another value in the slot: mov [rsp+0x70], rcx; a part of it: mov byte [rsp+0x6f], 0; its address: lea.
        assert!(!code(&[0x48, 0x89, 0x4c, 0x24, 0x70]));
        assert!(!code(&[0xc6, 0x44, 0x24, 0x6f, 0]));
        assert!(!code(&[0x48, 0x8d, 0x44, 0x24, 0x68]));
        // movups [rsp+0x5c], xmm15
        assert!(!code(&[0x44, 0x0f, 0x11, 0x7c, 0x24, 0x5c]));
    }

    #[test]
    fn results_are_looked_at_before_they_are_gone() {
        // sub rsp, 16; call 0x100; the middle; je
        let results = |middle: &[u8]| {
            let mut code = vec![0x48, 0x83, 0xec, 0x10, 0xe8, 0xf7, 0, 0, 0];
            code.extend(middle);
            code.extend([0x74, 0, 0xc3]);
            let shape = x86_64(&code, [Some(0x100), None, Some(0x100), None]).expect("new enough").expect("code");
            assert_eq!((shape.depth, shape.copies.len()), (16, 1));
            x86_64(&code, [None, Some(0x100), None, None]).expect("new enough").expect("code").results[0].clone()
        };
        // test rbx, rbx; a mov to memory.
        assert_eq!(results(&[0x48, 0x85, 0xdb]), [12]);
        assert_eq!(results(&[0x48, 0x89, 0x44, 0x24, 8, 0x48, 0x85, 0xdb]), [17]);
        // mov rax, rcx; another call; a long way.
        assert_eq!(results(&[0x48, 0x89, 0xc8]), [0_u64; 0]);
        assert_eq!(results(&[0xe8, 0, 0, 0, 0]), [0_u64; 0]);
        assert_eq!(results(&[0x90; 8]), [0_u64; 0]);
    }

    #[test]
    fn arguments_on_the_stack_are_too_old() {
        // mov rcx, fs:[-8]; cmp rsp, [rcx+0x10]; jbe; ret
        let code = [0x64, 0x48, 0x8b, 0x0c, 0x25, 0xf8, 0xff, 0xff, 0xff, 0x48, 0x3b, 0x61, 0x10, 0x76, 0, 0xc3];
        assert!(matches!(x86_64(&code, [None; 4]), Err(Uncovered::Old)));
    }

    #[test]
    fn entries_and_returns_of_arm64() {
        // ldr x16, [x28, #16]; cmp sp, x16; b.ls +16; str x30, [sp, #-64]!; ret; b 0
        let words: [u32; 6] = [0xf940_0b90, 0xeb30_63ff, 0x5400_0089, 0xf81c_0ffe, RET, 0x17ff_fffb];
        let code: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        assert_eq!(arm64(&code), Some(Shape { entry: 12, returns: vec![16], ..Shape::default() }));
    }

    #[test]
    fn this_test_is_not_a_go_program() {
        assert!(Executable::open(&File::open("/proc/self/exe").expect("readable")).is_none());
    }

    proptest::proptest! {
        #[test]
        fn any_code(code in proptest::collection::vec(proptest::num::u8::ANY, 0..256)) {
            let _ = (x86_64(&code, [None; 4]), arm64(&code));
        }

        #[test]
        fn any_damage_to_an_executable(
            changes in proptest::collection::vec((0_usize..2048, proptest::num::u8::ANY), 0..32),
            cut in 0_usize..8192,
        ) {
            let mut bytes = vec![0; 8192];
            File::open("/proc/self/exe").expect("readable").read_exact(&mut bytes).expect("longer than that");
            bytes.truncate(cut);
            for (at, byte) in changes {
                if let Some(place) = bytes.get_mut(at) {
                    *place = byte;
                }
            }
            let _ = layout(&*bytes);
        }
    }
}
