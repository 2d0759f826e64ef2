//! The Huffman code of HPACK (RFC 7541 section 5.2 and appendix B), decoding only. The code is canonical:
//! the lengths of the codes alone give the codes, so the tables are computed at compile time.

/// Bits of each byte's code.
#[rustfmt::skip]
const LENGTHS: [u8; 256] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 28,
    6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6, 5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7, 8, 15, 6, 12, 10,
    13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6,
    15, 5, 6, 5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5, 6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7, 15, 11, 14, 13, 28,
    20, 22, 20, 20, 22, 22, 22, 23, 22, 23, 23, 23, 23, 23, 24, 23, 24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24,
    22, 21, 20, 22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23, 23, 21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23,
    26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25, 19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28, 27, 27, 27,
    20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23, 26, 27, 26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27, 27, 27, 26,
];
/// Longest code, bits.
const LONGEST: usize = 30;
/// Codes of up to this many bits are found with one look: those of all printable ASCII but a few.
const SHORT: u32 = 10;

struct Tables {
    /// By the next [`SHORT`] bits: byte << 8 | length; 0 where the code is longer.
    short: [u16; 1 << SHORT],
    /// First code of each length, left-aligned to 32 bits, and where its bytes begin in `bytes`. The
    /// last is above every code.
    first: [u32; LONGEST + 2],
    start: [u16; LONGEST + 2],
    /// All bytes in the order of their codes.
    bytes: [u8; 256],
}

static TABLES: Tables = tables();

const fn tables() -> Tables {
    let mut t = Tables { short: [0; 1 << SHORT], first: [0; LONGEST + 2], start: [0; LONGEST + 2], bytes: [0; 256] };
    let (mut code, mut placed, mut length) = (0u64, 0, 1);
    while length <= LONGEST {
        code <<= 1;
        t.first[length] = (code << (32 - length)) as u32;
        t.start[length] = placed;
        let mut byte = 0;
        while byte < 256 {
            if LENGTHS[byte] as usize == length {
                t.bytes[placed as usize] = byte as u8;
                placed += 1;
                if length <= SHORT as usize {
                    let free = SHORT as usize - length;
                    let mut i = 0;
                    while i < 1 << free {
                        t.short[((code as usize) << free) + i] = (byte as u16) << 8 | length as u16;
                        i += 1;
                    }
                }
                code += 1;
            }
            byte += 1;
        }
        length += 1;
    }
    // The code of all ones ends the string; no byte has it.
    t.first[LONGEST + 1] = u32::MAX << (32 - LONGEST);
    t.start[LONGEST + 1] = placed;
    t
}

/// Appends the decoded bytes to `out`. False when `coded` is not valid: it holds the end-of-string code,
/// or its padding is not the beginning of that, or is longer than 7 bits.
#[must_use]
pub fn decode(coded: &[u8], out: &mut Vec<u8>) -> bool {
    let (mut bits, mut held) = (0u64, 0u32);
    let mut rest = coded.iter();
    loop {
        while held <= 32 {
            let Some(&byte) = rest.next() else { break };
            bits |= u64::from(byte) << (56 - held);
            held += 8;
        }
        let short = TABLES.short[(bits >> (64 - SHORT)) as usize];
        let length = u32::from(short & 0xff);
        if short != 0 && length <= held {
            out.push((short >> 8) as u8);
            bits <<= length;
            held -= length;
            continue;
        }
        let next = (bits >> 32) as u32;
        if held < 8 && next == !(u32::MAX.checked_shr(held).unwrap_or(0)) {
            return true;
        }
        // The longest length whose first code is not above; short ones were looked for already.
        let mut length = 5;
        while length < LONGEST && (TABLES.first[length + 1] <= next || TABLES.start[length + 1] == TABLES.start[length])
        {
            length += 1;
        }
        if length as u32 > held || next >= TABLES.first[LONGEST + 1] {
            return false;
        }
        let index = u32::from(TABLES.start[length]) + ((next - TABLES.first[length]) >> (32 - length));
        let Some(&byte) = TABLES.bytes.get(index as usize) else { return false };
        out.push(byte);
        bits <<= length;
        held -= length as u32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(coded: &[u8]) -> Option<Vec<u8>> {
        let mut out = Vec::new();
        decode(coded, &mut out).then_some(out)
    }

    #[test]
    fn the_examples_of_the_rfc() {
        let coded = [0xf1, 0xe3, 0xc2, 0xe5, 0xf2, 0x3a, 0x6b, 0xa0, 0xab, 0x90, 0xf4, 0xff];
        assert_eq!(text(&coded).as_deref(), Some(&b"www.example.com"[..]));
        assert_eq!(text(&[0xa8, 0xeb, 0x10, 0x64, 0x9c, 0xbf]).as_deref(), Some(&b"no-cache"[..]));
        assert_eq!(text(&[]).as_deref(), Some(&b""[..]));
    }

    #[test]
    fn padding_is_held_to_the_rules() {
        assert_eq!(text(&[0xff]), None, "eight bits of padding");
        assert_eq!(text(&[0xff, 0xff, 0xff, 0xff]), None, "the end of the string");
        assert_eq!(text(&[0b0000_0000]), None, "padding of zeros");
        assert_eq!(text(&[0b0000_0111]).as_deref(), Some(&b"0"[..]));
    }

    /// Every byte by its canonical code, alone and behind an odd number of bits.
    #[test]
    fn every_byte() {
        let mut order: Vec<u8> = (0..=255).collect();
        order.sort_by_key(|&b| (LENGTHS[usize::from(b)], b));
        let (mut code, mut length) = (0u64, 0);
        for byte in order {
            let bits = LENGTHS[usize::from(byte)];
            code <<= bits - length;
            length = bits;
            for before in 0..4_u32 {
                // '0' has the code 00000.
                let used = 5 * before + u32::from(bits);
                let word = (code << (64 - used)) | (u64::MAX >> used);
                let coded = &word.to_be_bytes()[..(used as usize).div_ceil(8)];
                let mut wanted = vec![b'0'; before as usize];
                wanted.push(byte);
                assert_eq!(text(coded), Some(wanted), "byte {byte} behind {before}");
            }
            code += 1;
        }
    }
}
