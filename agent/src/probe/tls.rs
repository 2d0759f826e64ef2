//! Finds the TLS libraries of all processes and attaches the probes: at start from `/proc`, then as the kernel
//! reports new executable mappings. A file is probed once, whatever number of processes map it, and well-known
//! libraries are probed before anybody uses them, so that a process that lives for milliseconds is seen too.
//!
//! Kept: [`MAX_FILES`] files. What does not fit is logged.

use std::{
    collections::HashMap,
    fs::{self, File},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use agent_ebpf::{LAYOUTS, Layout, Op};
use aya::maps::{Array, MapData};
use object::ReadCacheOps;

use super::{
    code,
    elf::{Elf, Function, Symbols},
    mappings::{Mapping, Mappings},
    uprobe::{self, Link, Place, Program},
};

/// Most files that are remembered.
const MAX_FILES: usize = 16_384;
/// Longest time between two looks at whether the agent ends.
const TURN: Duration = Duration::from_millis(100);

/// Functions to probe: symbol and what it is. See [`functions`] for the first four.
const FUNCTIONS: [(&str, u64); 10] = [
    ("SSL_read", Op::READ),
    ("SSL_read_ex", Op::READ_EX),
    ("SSL_write", Op::WRITE),
    ("SSL_write_ex", Op::WRITE_EX),
    ("SSL_sendfile", Op::SENDFILE),
    ("SSL_free", Op::FREE),
    ("gnutls_record_recv", Op::READ_LONG),
    ("gnutls_record_send", Op::WRITE_LONG),
    ("gnutls_record_send2", Op::WRITE_LONG),
    ("gnutls_deinit", Op::FREE),
];
/// Tells where a session keeps its client random.
const ACCESSOR: &str = "SSL_get_client_random";
/// Parts of the names of libraries that are worth a look inside; executables always are.
const NAMES: [&str; 4] = ["ssl", "tls", "node", "crypto"];
/// Folders whose libraries are probed before anybody uses them.
const FOLDERS: [&str; 6] =
    ["/lib/x86_64-linux-gnu", "/lib/aarch64-linux-gnu", "/usr/lib64", "/lib64", "/usr/lib", "/usr/local/lib"];
/// Starts of the names of those libraries.
const WELL_KNOWN: [&str; 2] = ["libssl.so", "libgnutls.so"];
/// Executables that have the library inside, and start too often for the first connections to be missed.
const EXECUTABLES: [&str; 2] = ["/usr/bin/node", "/usr/local/bin/node"];

/// The loaded programs.
pub struct Programs {
    /// At entries.
    pub enter: Program,
    /// At the returns of functions that read.
    pub read: Program,
    /// At those of functions that write.
    pub write: Program,
    /// Layouts of sessions, by number.
    pub layouts: Array<MapData, Layout>,
}

/// The probes and who finds them. Detached when it is dropped.
pub struct Tls {
    over: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Tls {
    /// Probes what is there and goes on with what comes.
    pub fn start(programs: Programs) -> Self {
        // Before the scan: nothing may come between the two.
        let mappings = Mappings::open();
        let mut finder = Finder { programs, files: HashMap::new(), next_layout: 0 };
        finder.scan();
        let over = Arc::new(AtomicBool::new(false));
        let ends = over.clone();
        let thread = match mappings {
            Ok(mappings) => std::thread::Builder::new()
                .name("libraries".into())
                .spawn(move || finder.follow(mappings, &ends))
                .map_err(|e| log::warn!("TLS libraries of new processes are not found: {e}"))
                .ok(),
            Err(e) => {
                log::warn!("new TLS libraries are looked for by the second: the kernel does not report mappings: {e}");
                std::thread::Builder::new().name("libraries".into()).spawn(move || finder.poll(&ends)).ok()
            }
        };
        Self { over, thread }
    }
}

impl Drop for Tls {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic there was reported by its own thread.
            let _ = thread.join();
        }
    }
}

/// A file as the kernel names it.
type Key = (u64, u64);

struct Finder {
    programs: Programs,
    /// Files that were looked at, with their probes.
    files: HashMap<Key, Vec<Link>>,
    next_layout: u32,
}

impl Finder {
    /// Looks at well-known libraries and at all processes.
    fn scan(&mut self) {
        for folder in FOLDERS {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                let name = entry.file_name();
                if WELL_KNOWN.iter().any(|start| name.to_string_lossy().starts_with(start)) {
                    self.look(&entry.path());
                }
            }
        }
        for path in EXECUTABLES {
            self.look(Path::new(path));
        }
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            if let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) {
                self.process(pid);
            }
        }
    }

    /// Looks at what a process maps.
    fn process(&mut self, pid: u32) {
        if pid == std::process::id() {
            return;
        }
        self.look(Path::new(&format!("/proc/{pid}/exe")));
        let Ok(maps) = fs::read_to_string(format!("/proc/{pid}/maps")) else { return };
        for line in maps.lines() {
            // address perms offset dev inode path
            let mut fields = line.splitn(6, ' ');
            if !fields.nth(1).is_some_and(|p| p.contains('x')) {
                continue;
            }
            if let Some(path) = fields.nth(3).map(str::trim_start).filter(|p| p.starts_with('/') && is_likely(p)) {
                self.look(&inside(pid, path));
            }
        }
    }

    /// Probes a file, once.
    fn look(&mut self, path: &Path) {
        let Ok(file) = File::open(path) else { return };
        let Ok(meta) = file.metadata() else { return };
        if !meta.is_file() || self.files.contains_key(&(meta.dev(), meta.ino())) {
            return;
        }
        if self.files.len() >= MAX_FILES {
            log::warn!("{} is not looked at for TLS: {MAX_FILES} files were", path.display());
            return;
        }
        let links = self.probe(&file, path).unwrap_or_else(|e| {
            log::debug!("{} is not probed: {e:#}", path.display());
            Vec::new()
        });
        if !links.is_empty() {
            log::debug!("TLS of {} is read", path.display());
        }
        self.files.insert((meta.dev(), meta.ino()), links);
    }

    fn probe(&mut self, file: &File, path: &Path) -> anyhow::Result<Vec<Link>> {
        let elf = Elf::new(file);
        let mut wanted: Vec<&'static str> = FUNCTIONS.iter().map(|(name, _)| *name).collect();
        wanted.push(ACCESSOR);
        let symbols = elf.symbols(&wanted)?;
        let has = |names: [&str; 2]| names.iter().all(|n| symbols.functions.contains_key(n));
        if !has(["SSL_read", "SSL_write"]) && !has(["gnutls_record_recv", "gnutls_record_send"]) {
            return Ok(Vec::new());
        }
        let layout = symbols.functions.get(ACCESSOR).and_then(|f| code::random_layout(elf.code(*f)));
        let number = layout.map_or(0, |layout| self.layout(layout));
        let [entries, reads, writes] = places(&functions(&symbols, &elf), number);
        // The returns first: a return without its entry is nothing, an entry without its return would wait.
        let programs = &self.programs;
        let mut links = Vec::new();
        for (program, places, at_return) in
            [(&programs.read, reads, true), (&programs.write, writes, true), (&programs.enter, entries, false)]
        {
            if !places.is_empty() {
                links.push(uprobe::attach(program, file, &places, at_return).map_err(|e| {
                    log::warn!("TLS of {} is not read: the kernel refused the probes: {e}", path.display());
                    e
                })?);
            }
        }
        Ok(links)
    }

    /// Number of a layout; 0 stands for an unknown one.
    fn layout(&mut self, layout: Layout) -> u64 {
        if self.next_layout as usize + 1 >= LAYOUTS {
            return 0;
        }
        self.next_layout += 1;
        match self.programs.layouts.set(self.next_layout, layout, 0) {
            Ok(()) => u64::from(self.next_layout),
            Err(e) => {
                log::warn!("sessions on memory will not find their sockets: {e}");
                0
            }
        }
    }

    fn follow(mut self, mut mappings: Mappings, over: &AtomicBool) {
        while !over.load(Ordering::Relaxed) {
            let lost = mappings.wait(TURN, |Mapping { pid, path }| {
                if is_likely(&path) {
                    self.look(&inside(pid, &path));
                } else {
                    // An executable, perhaps: it has a name of any kind.
                    let exe = PathBuf::from(format!("/proc/{pid}/exe"));
                    if fs::read_link(&exe).is_ok_and(|e| e == Path::new(&path)) {
                        self.look(&exe);
                    }
                }
            });
            if lost {
                self.scan();
            }
        }
    }

    fn poll(mut self, over: &AtomicBool) {
        let mut turns = 0;
        while !over.load(Ordering::Relaxed) {
            std::thread::sleep(TURN);
            turns += 1;
            if turns % 10 == 0 {
                self.scan();
            }
        }
    }
}

/// Offset and [`Op`] of the functions to probe. OpenSSL's BIO for TLS (`BIO_f_ssl`, which `openssl s_server` and others
/// read through) calls what is behind `SSL_read` and `SSL_write`: where that is found it is probed in place of them, so
/// that every call is seen once.
fn functions<R: ReadCacheOps>(symbols: &Symbols, elf: &Elf<R>) -> Vec<(u64, u64)> {
    let behind = |wrapper: &str, wide: &str| {
        let inner_of = |name| {
            let function = symbols.functions.get(name)?;
            let inner = code::inner(elf.code(*function))?;
            let offset = function.offset.checked_add_signed(inner.distance)?;
            let target = elf.code(Function { offset, size: 0 });
            (!target.is_empty() && !code::is_stub(target)).then_some((offset, inner.moved))
        };
        let (offset, moved) = inner_of(wrapper)?;
        let other = symbols.functions.get(wide).and_then(|f| Some((f, code::first_call(elf.code(*f))?)));
        let same = other.is_none_or(|(f, distance)| f.offset.checked_add_signed(distance) == Some(offset));
        // With flags the wide one has a wrapper of its own in between.
        (same || moved == 4).then_some((offset, moved))
    };
    let read = behind("SSL_read", "SSL_read_ex").filter(|(_, moved)| *moved == 3);
    let write = behind("SSL_write", "SSL_write_ex");
    let mut all = Vec::new();
    for (name, op) in FUNCTIONS {
        let Some(function) = symbols.functions.get(name) else { continue };
        match (op, read, write) {
            (Op::READ, Some((offset, _)), Some(_)) => all.push((offset, Op::READ_INNER)),
            (Op::WRITE, Some(_), Some((offset, 4))) => all.push((offset, Op::WRITE_INNER_FLAGS)),
            (Op::WRITE, Some(_), Some((offset, _))) => all.push((offset, Op::WRITE_INNER)),
            (Op::READ_EX | Op::WRITE_EX, Some(_), Some(_)) => {}
            _ => all.push((function.offset, op)),
        }
    }
    all
}

/// Where to put probes: entries, returns of reading functions, returns of writing ones.
fn places(functions: &[(u64, u64)], layout: u64) -> [Vec<Place>; 3] {
    let mut all = [Vec::new(), Vec::new(), Vec::new()];
    for (offset, op) in functions {
        let place = Place { offset: *offset, cookie: op | layout << 8 };
        all[0].push(place);
        match *op {
            Op::FREE => {}
            Op::READ | Op::READ_EX | Op::READ_LONG | Op::READ_INNER => all[1].push(place),
            _ => all[2].push(place),
        }
    }
    all
}

fn is_likely(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or_default();
    NAMES.iter().any(|part| name.contains(part))
}

/// A path as a process sees it, in its own mount namespace.
fn inside(pid: u32, path: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/root{path}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_and_writes_return_to_their_own_programs() {
        let functions: Vec<(u64, u64)> = FUNCTIONS.iter().enumerate().map(|(i, (_, op))| (i as u64, *op)).collect();
        let [entries, reads, writes] = places(&functions, 3);
        assert_eq!((entries.len(), reads.len(), writes.len()), (10, 3, 5));
        assert_eq!(reads[0], Place { offset: 0, cookie: Op::READ | 3 << 8 });
    }

    #[test]
    fn libraries_by_their_names() {
        assert!(is_likely("/usr/lib/libssl.so.3") && is_likely("/x/_ssl.cpython-311.so"));
        assert!(!is_likely("/usr/lib/libc.so.6") && !is_likely("/opt/openssl/lib/libz.so"));
    }
}
