//! Just enough of Rust's syntax to read paths: comments and literals become spaces, lines stay where they
//! are.

/// The text with comments, strings and character literals blanked out.
#[must_use]
pub fn code_of(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out: Vec<u8> = bytes.to_vec();
    let mut at = 0;
    while at < bytes.len() {
        let end = match bytes[at] {
            b'/' if bytes.get(at + 1) == Some(&b'/') => find(bytes, at, b"\n"),
            b'/' if bytes.get(at + 1) == Some(&b'*') => end_of_block_comment(bytes, at),
            b'"' => end_of_string(bytes, at + 1),
            b'r' if !follows_word(bytes, at) || bytes[at - 1] == b'b' => end_of_raw_string(bytes, at).unwrap_or(at),
            b'\'' => end_of_char(bytes, at).unwrap_or(at),
            _ => at,
        };
        for byte in &mut out[at..end] {
            if *byte != b'\n' {
                *byte = b' ';
            }
        }
        at = end.max(at + 1);
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// One path in code.
#[derive(Debug, PartialEq, Eq)]
pub struct Path {
    /// Line, from 1.
    pub line: usize,
    /// Its segments as far as they are certain: a group's members are paths of their own.
    pub segments: Vec<String>,
}

/// Every path with two or more segments, and every `use` of a single name, with groups taken apart.
#[must_use]
pub fn paths_of(code: &str) -> Vec<Path> {
    let tokens = tokens(code);
    let mut found = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        let in_use = at > 0 && matches!(tokens[at - 1].1, "use" | "crate") && tokens[at].1 != "::";
        if is_word(tokens[at].1) && (tokens.get(at + 1).is_some_and(|t| t.1 == "::") || in_use) {
            at = path(&tokens, at, &[], &mut found);
        } else {
            at += 1;
        }
    }
    found
}

/// Reads one path or group that starts at `at`, after `before`; returns where it ends.
fn path(tokens: &[(usize, &str)], mut at: usize, before: &[String], found: &mut Vec<Path>) -> usize {
    let mut segments = before.to_vec();
    let line = tokens.get(at).map_or(0, |t| t.0);
    while let Some((_, token)) = tokens.get(at) {
        match *token {
            "{" if !segments.is_empty() => {
                at += 1;
                while let Some((_, token)) = tokens.get(at) {
                    match *token {
                        "}" => return at + 1,
                        word if is_word(word) => at = path(tokens, at, &segments, found),
                        _ => at += 1,
                    }
                }
                return at;
            }
            word if is_word(word) => segments.push(word.to_owned()),
            _ => break,
        }
        at += 1;
        if tokens.get(at).is_none_or(|t| t.1 != "::") {
            break;
        }
        at += 1;
    }
    found.push(Path { line, segments });
    at
}

fn tokens(code: &str) -> Vec<(usize, &str)> {
    let bytes = code.as_bytes();
    let (mut found, mut at, mut line) = (Vec::new(), 0, 1);
    while at < bytes.len() {
        let start = at;
        at += 1;
        match bytes[start] {
            b'\n' => line += 1,
            b if b.is_ascii_whitespace() => {}
            b if word_byte(b) => {
                while at < bytes.len() && word_byte(bytes[at]) {
                    at += 1;
                }
                found.push((line, &code[start..at]));
            }
            b':' if bytes.get(at) == Some(&b':') => {
                at += 1;
                found.push((line, "::"));
            }
            b if b.is_ascii() => found.push((line, &code[start..at])),
            _ => {}
        }
    }
    found
}

fn is_word(token: &str) -> bool {
    token.bytes().all(word_byte)
}

fn word_byte(b: u8) -> bool {
    b.is_ascii_alphanumeric() || b == b'_'
}

fn follows_word(bytes: &[u8], at: usize) -> bool {
    at > 0 && word_byte(bytes[at - 1])
}

fn find(bytes: &[u8], from: usize, what: &[u8]) -> usize {
    bytes[from..].windows(what.len()).position(|w| w == what).map_or(bytes.len(), |n| from + n)
}

fn end_of_block_comment(bytes: &[u8], from: usize) -> usize {
    let (mut depth, mut at) = (0_usize, from);
    while at < bytes.len() {
        match bytes.get(at..at + 2) {
            Some(b"/*") => (depth, at) = (depth + 1, at + 2),
            Some(b"*/") => {
                (depth, at) = (depth - 1, at + 2);
                if depth == 0 {
                    return at;
                }
            }
            _ => at += 1,
        }
    }
    at
}

fn end_of_string(bytes: &[u8], from: usize) -> usize {
    let mut at = from;
    while at < bytes.len() {
        match bytes[at] {
            b'\\' => at += 2,
            b'"' => return at + 1,
            _ => at += 1,
        }
    }
    bytes.len()
}

/// `r"…"`, `r#"…"#`; `None` for a word that begins with r.
fn end_of_raw_string(bytes: &[u8], from: usize) -> Option<usize> {
    let hashes = bytes[from + 1..].iter().take_while(|b| **b == b'#').count();
    let open = from + 1 + hashes;
    if bytes.get(open) != Some(&b'"') {
        return None;
    }
    let close: Vec<u8> = std::iter::once(b'"').chain(std::iter::repeat_n(b'#', hashes)).collect();
    Some((find(bytes, open + 1, &close) + close.len()).min(bytes.len()))
}

/// `'x'`, `'\n'`, `'é'`; `None` for a lifetime.
fn end_of_char(bytes: &[u8], from: usize) -> Option<usize> {
    let end = if bytes.get(from + 1) == Some(&b'\\') {
        find(bytes, from + 3, b"'")
    } else {
        (2..=5).map(|n| from + n).find(|n| bytes.get(*n) == Some(&b'\''))?
    };
    let inner = std::str::from_utf8(bytes.get(from + 1..end)?).ok()?;
    (inner.starts_with('\\') || inner.chars().count() == 1).then_some(end + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals_and_comments_are_not_code() {
        let text = "a // b\n/* c /* d */ */ e \"f \\\" g\" r#\"h \" i\"# 'j' '\\'' b'k' l<'m> br\"n\"";
        let code = code_of(text);
        let words: Vec<&str> = tokens(&code).into_iter().map(|t| t.1).filter(|t| is_word(t)).collect();
        assert_eq!(words, ["a", "e", "b", "l", "m", "b"]);
        assert_eq!(code.lines().count(), text.lines().count());
    }

    #[test]
    fn groups_are_taken_apart() {
        let found = paths_of("use crate::{\n  event::{Event, Kind},\n  stats,\n};\nfn f() { aya::x() }\nuse tokio;");
        let shown: Vec<String> = found.iter().map(|p| format!("{} {}", p.line, p.segments.join("::"))).collect();
        assert_eq!(shown, ["2 crate::event::Event", "2 crate::event::Kind", "3 crate::stats", "5 aya::x", "6 tokio"]);
    }
}
