//! Whose TLS is read, and whose is not and why: what the probes found in each process's files, held against the
//! connections that the kernel side recognised by their first record.
//!
//! Kept: [`MAX_PROCESSES`] processes while they live. Connections of those that ended stay in the sums by library and
//! reason, which have as many rows as there are libraries and reasons.

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};

/// Most processes that are remembered; of others the connections are summed up alone.
pub const MAX_PROCESSES: usize = 16_384;
/// Most processes that are shown.
const MAX_SHOWN: usize = 2_048;
/// Most processes whose files are to be looked at for what they use; others are asked for again with their next
/// connection.
const MAX_PUZZLES: usize = 256;

/// A library that carries TLS, or something that stands for one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Library {
    /// OpenSSL.
    Openssl,
    /// BoringSSL, in most of its forms.
    Boringssl,
    /// LibreSSL.
    Libressl,
    /// GnuTLS.
    Gnutls,
    /// NSS, through the functions of NSPR.
    Nss,
    /// Go's `crypto/tls`.
    Go,
    /// Java's JSSE.
    Jsse,
    /// rustls.
    Rustls,
    /// wolfSSL.
    Wolfssl,
    /// Mbed TLS.
    Mbedtls,
    /// s2n-tls.
    S2n,
    /// None that is known.
    Unknown,
}

impl Library {
    /// As a person writes it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Openssl => "OpenSSL",
            Self::Boringssl => "BoringSSL",
            Self::Libressl => "LibreSSL",
            Self::Gnutls => "GnuTLS",
            Self::Nss => "NSS",
            Self::Go => "Go crypto/tls",
            Self::Jsse => "Java JSSE",
            Self::Rustls => "rustls",
            Self::Wolfssl => "wolfSSL",
            Self::Mbedtls => "Mbed TLS",
            Self::S2n => "s2n-tls",
            Self::Unknown => "unknown library",
        }
    }

    /// As a value of a label.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Openssl => "openssl",
            Self::Boringssl => "boringssl",
            Self::Libressl => "libressl",
            Self::Gnutls => "gnutls",
            Self::Nss => "nss",
            Self::Go => "go",
            Self::Jsse => "jsse",
            Self::Rustls => "rustls",
            Self::Wolfssl => "wolfssl",
            Self::Mbedtls => "mbedtls",
            Self::S2n => "s2n",
            Self::Unknown => "unknown",
        }
    }
}

/// Why a library's plaintext is not read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// Linked into the executable, without symbols.
    Stripped,
    /// No library that is known was found in the process's files.
    UnknownLibrary,
    /// A known library that there are no probes for.
    Unsupported,
    /// Functions that are there in other versions are not in this one.
    UnknownVersion,
    /// Code that is made at run time has no place in a file.
    CompiledAtRunTime,
    /// The kernel refused the probes.
    Refused,
    /// This kernel or these privileges allow no probes in user space.
    NoProbes,
    /// On this kernel a probed return ends processes that are confined by seccomp.
    EndsConfined,
    /// The file could not be opened: it was deleted or replaced, or the agent may not.
    Unreadable,
    /// As many files are probed as may be.
    TooManyFiles,
}

impl Reason {
    /// As a value of a label.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Stripped => "stripped",
            Self::UnknownLibrary => "unknown_library",
            Self::Unsupported => "unsupported",
            Self::UnknownVersion => "unknown_version",
            Self::CompiledAtRunTime => "compiled_at_run_time",
            Self::Refused => "refused",
            Self::NoProbes => "no_probes",
            Self::EndsConfined => "ends_confined_processes",
            Self::Unreadable => "unreadable",
            Self::TooManyFiles => "too_many_files",
        }
    }

    /// A sentence for people: what it is, and what can be done.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::Stripped => {
                "linked into the executable without symbols: ship the symbol table, or link the shared one"
            }
            Self::UnknownLibrary => "no known TLS library in its files",
            Self::Unsupported => "there are no probes for this library",
            Self::UnknownVersion => "functions that other versions have are not in this one",
            Self::CompiledAtRunTime => {
                "compiled at run time, so that no file holds its functions: terminate TLS in a proxy that is read"
            }
            Self::Refused => "the kernel refused the probes: see the agent's log",
            Self::NoProbes => {
                "no probes in user space: CAP_BPF with CAP_PERFMON allow them, before Linux 6.6 CAP_SYS_ADMIN"
            }
            Self::EndsConfined => {
                "on this kernel a probed return ends processes with a seccomp filter: 6.14 and later stable kernels do not"
            }
            Self::Unreadable => {
                "its file was replaced before the agent came, or may not be opened: restart the process"
            }
            Self::TooManyFiles => "too many files are probed already",
        }
    }
}

/// A library in a process.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Found {
    /// Which.
    pub library: Library,
    /// Its version, where the file tells.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub version: Option<String>,
    /// Why it is not read; `None` where it is.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub reason: Option<Reason>,
}

/// TLS connections that ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// Of which a library that is read carried the plaintext.
    pub read: u64,
    /// Of which it did not.
    pub unread: u64,
    /// Bytes of ciphertext of the latter.
    pub unread_bytes: u64,
}

impl Ended {
    fn add(&mut self, other: Self) {
        self.read += other.read;
        self.unread += other.unread;
        self.unread_bytes += other.unread_bytes;
    }
}

/// A process with a TLS library, or with TLS connections.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its number.
    pub pid: u32,
    /// Its executable.
    pub exe: String,
    /// What it uses.
    pub libraries: Vec<Found>,
    /// Everything that it uses is read.
    pub covered: bool,
    /// Its connections.
    #[serde(flatten)]
    pub connections: Ended,
}

impl Process {
    /// Why not everything is read: the first reason.
    #[must_use]
    pub fn reason(&self) -> Option<Reason> {
        self.libraries.iter().find_map(|f| f.reason)
    }
}

/// Processes and connections of one library and reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sum {
    /// The library.
    pub library: Library,
    /// Why it is not read; `None` where it is.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub reason: Option<Reason>,
    /// Processes that are there now.
    pub processes: u64,
    /// Connections, those of processes that ended included.
    #[serde(flatten)]
    pub connections: Ended,
}

/// What is shown.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct View {
    /// Processes, those with most unread connections first.
    pub processes: Vec<Process>,
    /// By library and reason.
    pub libraries: Vec<Sum>,
    /// Processes whose mappings the agent may not read: what they use is not known.
    pub closed_processes: u64,
    /// Processes beyond [`MAX_PROCESSES`].
    pub overflowed: u64,
}

#[derive(Debug, Default)]
struct Known {
    exe: String,
    libraries: Vec<Found>,
    connections: Ended,
}

/// What is known of all processes.
#[derive(Debug, Default)]
pub struct Coverage {
    processes: HashMap<u32, Known>,
    ended: BTreeMap<(Library, Option<Reason>), Ended>,
    puzzles: Vec<u32>,
    closed: u64,
    overflowed: u64,
}

impl Coverage {
    /// Is it known already what `pid` maps?
    #[must_use]
    pub fn knows(&self, pid: u32) -> bool {
        self.processes.contains_key(&pid)
    }

    /// Nothing was found so far that explains the TLS of `pid`.
    #[must_use]
    pub fn is_unexplained(&self, pid: u32) -> bool {
        self.processes.get(&pid).is_some_and(|known| known.libraries.is_empty())
    }

    /// Is the executable of `pid` known?
    #[must_use]
    pub fn is_named(&self, pid: u32) -> bool {
        self.processes.get(&pid).is_some_and(|known| !known.exe.is_empty())
    }

    /// A process runs `exe` from now on, and nothing of what it ran before.
    pub fn runs(&mut self, pid: u32, exe: &str) {
        let full = self.processes.len() >= MAX_PROCESSES;
        match self.processes.get_mut(&pid) {
            Some(known) if known.exe == exe => {}
            // It had a connection before it was looked at.
            Some(known) if known.exe.is_empty() => known.exe = exe.to_owned(),
            Some(known) => {
                let before = std::mem::replace(known, Known { exe: exe.to_owned(), ..Known::default() });
                self.bury(before);
            }
            None if !full => {
                self.processes.insert(pid, Known { exe: exe.to_owned(), ..Known::default() });
            }
            None => self.overflowed += 1,
        }
    }

    /// A library was found in a process.
    pub fn found(&mut self, pid: u32, found: &Found) {
        if let Some(known) = self.processes.get_mut(&pid)
            && !known.libraries.contains(found)
        {
            known.libraries.push(found.clone());
            known.libraries.sort();
        }
    }

    /// A TLS connection of `pid` ended.
    pub fn ended(&mut self, pid: u32, read: bool, bytes: u64) {
        let one = if read {
            Ended { read: 1, ..Ended::default() }
        } else {
            Ended { unread: 1, unread_bytes: bytes, ..Ended::default() }
        };
        let full = self.processes.len() >= MAX_PROCESSES;
        let puzzling = match self.processes.get_mut(&pid) {
            Some(known) => {
                known.connections.add(one);
                !read && known.libraries.is_empty()
            }
            None if !full => {
                self.processes.insert(pid, Known { connections: one, ..Known::default() });
                true
            }
            None => {
                self.overflowed += 1;
                self.bury(Known { connections: one, ..Known::default() });
                false
            }
        };
        if puzzling && self.puzzles.len() < MAX_PUZZLES && !self.puzzles.contains(&pid) {
            self.puzzles.push(pid);
        }
    }

    /// Processes with connections that nothing explains so far; they are handed out once.
    pub fn puzzles(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.puzzles)
    }

    /// Drops processes that are gone; their connections stay in the sums.
    pub fn retain(&mut self, is_there: impl Fn(u32) -> bool, closed: u64) {
        self.closed = closed;
        let gone: Vec<u32> = self.processes.keys().copied().filter(|pid| !is_there(*pid)).collect();
        for pid in gone {
            if let Some(known) = self.processes.remove(&pid) {
                self.bury(known);
            }
        }
    }

    fn bury(&mut self, known: Known) {
        for (key, connections) in shares(&known) {
            self.ended.entry(key).or_default().add(connections);
        }
    }

    /// What there is to show.
    #[must_use]
    pub fn view(&self) -> View {
        let mut sums: BTreeMap<(Library, Option<Reason>), (u64, Ended)> =
            self.ended.iter().map(|(key, ended)| (*key, (0, *ended))).collect();
        let mut processes = Vec::new();
        for (pid, known) in &self.processes {
            for found in &known.libraries {
                sums.entry((found.library, found.reason)).or_default().0 += 1;
            }
            for (key, connections) in shares(known) {
                sums.entry(key).or_default().1.add(connections);
            }
            if known.libraries.is_empty() && known.connections == Ended::default() {
                continue;
            }
            processes.push(Process {
                pid: *pid,
                exe: known.exe.clone(),
                covered: known.libraries.iter().all(|f| f.reason.is_none()) && !known.libraries.is_empty(),
                libraries: known.libraries.clone(),
                connections: known.connections,
            });
        }
        processes.sort_by_key(|p| (std::cmp::Reverse((p.connections.unread, p.connections.read)), p.pid));
        processes.truncate(MAX_SHOWN);
        let libraries = sums
            .into_iter()
            .filter(|(_, (processes, connections))| *processes > 0 || *connections != Ended::default())
            .map(|((library, reason), (processes, connections))| Sum { library, reason, processes, connections })
            .collect();
        View { processes, libraries, closed_processes: self.closed, overflowed: self.overflowed }
    }
}

/// To which library and reason a process's connections count: those that were read to what is read, the others to
/// what is not; where that does not say it, to the unknown.
fn shares(known: &Known) -> impl Iterator<Item = ((Library, Option<Reason>), Ended)> {
    let of = |read: bool| known.libraries.iter().find(|f| f.reason.is_none() == read);
    let Ended { read, unread, unread_bytes } = known.connections;
    let reader = of(true).map_or((Library::Unknown, None), |f| (f.library, None));
    let other = of(false).map_or((Library::Unknown, Some(Reason::UnknownLibrary)), |f| (f.library, f.reason));
    [(reader, Ended { read, ..Ended::default() }), (other, Ended { unread, unread_bytes, ..Ended::default() })]
        .into_iter()
        .filter(|(_, connections)| *connections != Ended::default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(library: Library, reason: Option<Reason>) -> Found {
        Found { library, version: None, reason }
    }

    #[test]
    fn the_sums_outlive_their_processes() {
        let mut coverage = Coverage::default();
        coverage.runs(1, "/usr/sbin/nginx");
        coverage.found(1, &found(Library::Openssl, None));
        coverage.runs(2, "/usr/bin/java");
        coverage.found(2, &found(Library::Jsse, Some(Reason::CompiledAtRunTime)));
        for _ in 0..3 {
            coverage.ended(1, true, 0);
            coverage.ended(2, false, 100);
        }
        coverage.ended(3, false, 7);
        assert_eq!(coverage.puzzles(), [3]);
        let before = coverage.view();
        assert_eq!(before.processes.iter().map(|p| p.pid).collect::<Vec<_>>(), [2, 3, 1]);
        assert!(before.processes[2].covered && !before.processes[1].covered);
        coverage.retain(|pid| pid == 1, 0);
        let after = coverage.view();
        let connections = |view: &View| view.libraries.iter().map(|s| (s.library, s.connections)).collect::<Vec<_>>();
        assert_eq!(connections(&before), connections(&after));
        assert_eq!(after.processes.len(), 1);
        let java = after.libraries.iter().find(|s| s.library == Library::Jsse).expect("kept");
        assert_eq!((java.processes, java.connections.unread, java.connections.unread_bytes), (0, 3, 300));
    }

    #[test]
    fn another_program_in_the_same_process() {
        let mut coverage = Coverage::default();
        coverage.runs(1, "/bin/sh");
        coverage.found(1, &found(Library::Openssl, None));
        coverage.ended(1, true, 0);
        coverage.runs(1, "/bin/other");
        let view = coverage.view();
        assert!(view.processes.is_empty());
        assert_eq!(view.libraries[0].connections.read, 1);
    }

    #[test]
    fn bounded() {
        let mut coverage = Coverage::default();
        for pid in 0..MAX_PROCESSES as u32 + 10 {
            coverage.ended(pid, false, 1);
        }
        let view = coverage.view();
        assert_eq!((view.processes.len(), view.overflowed), (MAX_SHOWN, 10));
        assert_eq!(view.libraries[0].connections.unread, MAX_PROCESSES as u64 + 10);
        assert_eq!(coverage.puzzles().len(), MAX_PUZZLES);
    }
}
