//! Which TLS library a file is or contains, of which version: by its functions, its name, and where both say nothing by
//! the texts that libraries leave in what they are linked into.
//!
//! # Java
//! JSSE is Java: the runtime compiles `SSLEngine` and `SSLSocket` into memory and moves them, so that there is no place
//! in a file to probe. Considered, and why not: an agent that is attached to the JVM reads it well, and is code inside
//! of the application, which this program never brings there; HotSpot's static probes tell of method entries under
//! `-XX:+ExtendedDTraceProbes` alone, slow down everything then, and show no buffers; a perf map or jitdump wants a
//! flag, and the code in it moves; the AES-GCM routines are generated at run time as well; JSSE writes no key log. So
//! a JVM is reported with its reason, and its connections and bytes are counted. A JVM that goes through OpenSSL's
//! shared library (Tomcat's native connector) is read like any other program.
//!
//! # rustls
//! What a program reads comes out of rustls in four ways (`Reader`'s `read`, `read_buf`, `fill_buf` with `consume`,
//! `into_first_chunk`), which optimised programs have inlined at their callers: no method of `Reader` is left in a
//! release build of this very agent. But records are protected through trait objects, so that `<... as
//! MessageDecrypter>::decrypt` and `<... as MessageEncrypter>::encrypt` are called, never inlined, and keep their
//! symbols, in whatever provider: with ring in release and with fat LTO and one codegen unit, with aws-lc-rs at
//! `opt-level=s` with `v0` mangling (rustls 0.23.46, rustc 1.95). These two are probed (`agent-ebpf/src/rustls.rs`).
//!
//! What the probes know, of x86_64, looked at with a debugger in 803 records read and 87 written, by TLS 1.2 (AES-GCM,
//! ChaCha20) and 1.3:
//! - The registers are result, object, message, sequence number.
//! - A message to decrypt begins with the payload's pointer and length. The five bytes before the payload are its
//!   record's header, which verifies both for each record.
//! - A decrypted message has the plaintext's pointer, which is in the payload, and its length in words 1 and 2, and its
//!   type, numbered in the order of declaration, in the byte at 24.
//! - A message to encrypt begins with 0, pointer, length; or with an array of such pairs, their number, start and end.
//!   Its type is the byte at 32. Words 2 and 3 of the result are the ciphertext's pointer and length, which is the
//!   plaintext's with header and overhead, or nothing is read.
//!
//! The objects have no connection that could be seen. The socket is found by the ciphertext: of what is decrypted in the
//! thread's last receive, of what is encrypted in its next send. Until then the plaintext of the first records of a key
//! waits where it is (a server of TLS 1.3 whose clients take no tickets begins with an answer); after that the number
//! of each record says that it is the same key, and what is encrypted counts before it is sent.
//!
//! Limits:
//! - 0.23 alone, by the path of its sources, which panics leave in the text: 0.22 and older own the payload, so that no
//!   header is before it. A program whose path has no version (a vendored one) is reported as of an unknown version, a
//!   stripped one as stripped, any on arm64 as unsupported: nobody looked there.
//! - A return is probed, with what that means for confined processes (`confined.rs`).
//! - A first record of a key that is not sent by the thread that encrypted it, before anything else of rustls there, is
//!   missed, with the bytes before the next one that is; so is one of more than 32 slices. Counted (`tls_missed`).
//! - Of a program that was there before the agent connections are read from the next record on, as everywhere.
//!
//! # kTLS
//! A socket that began with TLS carries ciphertext for good, whoever encrypts it: with kTLS the library hands plaintext
//! to the socket, which is counted as bytes and never parsed, so that an exchange is seen where the library is called
//! and nowhere else. Not tested: the kernel at hand has none (`CONFIG_TLS` is not set).

use std::{fs::File, io, os::unix::fs::FileExt as _, path::Path};

use super::{elf::Symbols, rustls};
use crate::coverage::{Found, Library, Reason};

/// Most bytes of a file that are searched for texts.
const MAX_TEXT: u64 = 256 << 20;
/// Bytes that are searched at once.
const WINDOW: usize = 256 << 10;
/// Longest text that is looked for, its version included.
const LONGEST: usize = 64;

/// Functions that one of the libraries with OpenSSL's interface has alone.
pub const MARKS: [(&str, Library); 2] =
    [("SSL_CTX_set_grease_enabled", Library::Boringssl), ("SSL_CTX_load_verify_mem", Library::Libressl)];
/// Names of files, from their start: libraries that are told by them.
const NAMES: [(&str, Library, Reason); 4] = [
    ("libjvm.so", Library::Jsse, Reason::CompiledAtRunTime),
    ("libwolfssl.so", Library::Wolfssl, Reason::Unsupported),
    ("libmbedtls.so", Library::Mbedtls, Reason::Unsupported),
    ("libs2n.so", Library::S2n, Reason::Unsupported),
];
/// Names of libraries that are read.
const PROBED: [(&str, Library); 3] =
    [("libssl.so", Library::Openssl), ("libgnutls.so", Library::Gnutls), ("libnspr4.so", Library::Nss)];
/// What a library leaves in a file, up to its version.
const TEXTS: [(&[u8], Library); 4] = [
    (b"/rustls-", Library::Rustls),
    (b"OpenSSL ", Library::Openssl),
    (b"Enabled GnuTLS ", Library::Gnutls),
    (b"LibreSSL ", Library::Libressl),
];
/// The source of BoringSSL's `SSL_read`, which its errors name (OpenSSL's is C). BoringSSL has no versions.
const BORINGSSL: &[u8] = b"ssl/ssl_lib.cc";

/// The library whose functions a file has: what must be there to read what it carries.
#[must_use]
pub fn by_functions(symbols: &Symbols) -> Option<Library> {
    let has = |names: [&str; 2]| names.iter().all(|n| symbols.functions.contains_key(n));
    if has(["SSL_read", "SSL_write"]) {
        let marked = MARKS.iter().find(|(name, _)| symbols.functions.contains_key(name));
        return Some(marked.map_or(Library::Openssl, |(_, library)| *library));
    }
    if has(["gnutls_record_recv", "gnutls_record_send"]) {
        return Some(Library::Gnutls);
    }
    has(["PR_Read", "PR_Write"]).then_some(Library::Nss)
}

/// A library that is told by the name of its file, and why it is not read.
#[must_use]
pub fn by_name(path: &Path) -> Option<Found> {
    let name = path.file_name()?.to_str()?;
    let (_, library, reason) = NAMES.iter().find(|(start, ..)| name.starts_with(start))?;
    Some(Found { library: *library, version: None, reason: Some(*reason) })
}

/// A library that would be read, by the name of its file, and why it is not.
#[must_use]
pub fn not_read(path: &Path, reason: Reason) -> Option<Found> {
    let name = path.file_name()?.to_str()?;
    let (_, library) = PROBED.iter().find(|(start, _)| name.starts_with(start))?;
    Some(Found { library: *library, version: None, reason: Some(reason) })
}

/// The library that a file without its functions' names contains, by its texts.
#[must_use]
pub fn by_text(file: &File) -> Option<Found> {
    let (library, version) = search(file, &TEXTS, Some(BORINGSSL)).ok().flatten()?;
    let is_foreign = library == Library::Rustls && !rustls::IS_READ;
    let reason = if is_foreign { Reason::Unsupported } else { Reason::Stripped };
    Some(Found { library, version, reason: Some(reason) })
}

/// The version of a library that is in `file`, which was found at `path`. libssl does not know its own: libcrypto
/// beside it does.
#[must_use]
pub fn version(file: &File, path: &Path, library: Library) -> Option<String> {
    let (text, beside): (&[u8], _) = match library {
        Library::Openssl => (b"OpenSSL ", true),
        Library::Libressl => (b"LibreSSL ", true),
        Library::Gnutls => (b"Enabled GnuTLS ", false),
        Library::Rustls => (b"/rustls-", false),
        _ => return None,
    };
    let texts = [(text, library)];
    let crypto = || {
        let name = path.file_name()?.to_str()?;
        let name = name.strip_prefix("libssl").filter(|_| beside)?;
        File::open(path.with_file_name(format!("libcrypto{name}"))).ok()
    };
    let of = |file: &File| search(file, &texts, None).ok()??.1;
    crypto().and_then(|f| of(&f)).or_else(|| of(file))
}

/// The first of `texts` that is followed by a version, which ends the text; else BoringSSL, when `boringssl` is there.
fn search(
    file: &File,
    texts: &[(&[u8], Library)],
    boringssl: Option<&[u8]>,
) -> io::Result<Option<(Library, Option<String>)>> {
    let mut without = None;
    let mut buffer = vec![0u8; WINDOW + LONGEST];
    let end = file.metadata()?.len().min(MAX_TEXT);
    let mut at = 0;
    while at < end {
        let n = read_at(file, &mut buffer, at)?;
        for (text, library) in texts {
            for found in memchr::memmem::find_iter(&buffer[..n], text) {
                if let Some(version) = version_at(&buffer[found + text.len()..n]) {
                    return Ok(Some((*library, Some(version))));
                }
            }
        }
        if without.is_none() && boringssl.is_some_and(|text| memchr::memmem::find(&buffer[..n], text).is_some()) {
            without = Some((Library::Boringssl, None));
        }
        if n < buffer.len() {
            break;
        }
        at += WINDOW as u64;
    }
    Ok(without)
}

/// Fills `buffer` as far as the file goes.
fn read_at(file: &File, buffer: &mut [u8], at: u64) -> io::Result<usize> {
    let mut n = 0;
    while n < buffer.len() {
        match file.read_at(&mut buffer[n..], at + n as u64)? {
            0 => break,
            more => n += more,
        }
    }
    Ok(n)
}

/// `3.0.22` or `1.1.1w` at the start of `bytes`.
fn version_at(bytes: &[u8]) -> Option<String> {
    let bytes = &bytes[..bytes.len().min(24)];
    let len = bytes.iter().take_while(|b| b.is_ascii_alphanumeric() || **b == b'.').count();
    let text = std::str::from_utf8(&bytes[..len]).ok()?;
    let mut parts = text.split('.');
    let is_number = |part: Option<&str>| part.is_some_and(|p| !p.is_empty() && p.bytes().all(|b| b.is_ascii_digit()));
    let starts = is_number(parts.next()) && is_number(parts.next());
    let last = parts.next().is_some_and(|p| p.starts_with(|c: char| c.is_ascii_digit()));
    (starts && last).then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        assert_eq!(version_at(b"3.0.22 25 Aug 2026").as_deref(), Some("3.0.22"));
        assert_eq!(version_at(b"1.1.1w\0").as_deref(), Some("1.1.1w"));
        assert_eq!(version_at(b"0.23.12/src/conn.rs").as_deref(), Some("0.23.12"));
        for other in [&b"3.0"[..], b"PKCS#12", b"", b"3..1", b"x.1.2", b"ssl-0.1/"] {
            assert_eq!(version_at(other), None);
        }
    }

    #[test]
    fn a_text_across_two_windows() {
        let path = std::env::temp_dir().join(format!("apiscope-library-{}", std::process::id()));
        for before in [0, WINDOW - 20, WINDOW - 3, WINDOW + LONGEST - 9, 2 * WINDOW - 5] {
            let mut content = vec![b'O'; before];
            content.extend_from_slice(b"/registry/rustls-0.23.12/src/conn.rs");
            std::fs::write(&path, &content).expect("written");
            let found = by_text(&File::open(&path).expect("there")).expect("found");
            assert_eq!((found.library, found.version.as_deref()), (Library::Rustls, Some("0.23.12")), "{before}");
        }
        std::fs::write(&path, b"external/boringssl+/ssl/ssl_lib.cc\0OpenSSL is fun").expect("written");
        let found = by_text(&File::open(&path).expect("there")).expect("found");
        assert_eq!((found.library, found.version), (Library::Boringssl, None));
        std::fs::write(&path, b"OpenSSL is fun, ssl/ssl_lib.c").expect("written");
        assert_eq!(by_text(&File::open(&path).expect("there")), None);
        std::fs::remove_file(path).expect("removable");
    }

    #[test]
    fn names() {
        let jvm = by_name(Path::new("/usr/lib/jvm/x/lib/server/libjvm.so")).expect("known");
        assert_eq!((jvm.library, jvm.reason), (Library::Jsse, Some(Reason::CompiledAtRunTime)));
        assert_eq!(by_name(Path::new("/lib/libc.so.6")), None);
    }
}
