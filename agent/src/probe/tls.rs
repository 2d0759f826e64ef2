//! Finds the TLS libraries of all processes and attaches the probes: at start from `/proc`, then as the kernel
//! reports new executable mappings. A file is probed once, whatever number of processes map it, and well-known
//! libraries are probed before anybody uses them, so that a process that lives for milliseconds is seen too. What is
//! found in each process, read or not, goes to [`Coverage`].
//!
//! Kept: [`MAX_FILES`] files. What does not fit is reported as not read.

use std::{
    collections::{HashMap, HashSet},
    fs::{self, File},
    io,
    os::{fd::AsRawFd as _, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use agent_ebpf::{LAYOUTS, Layout, Op};
use aya::maps::{Array, MapData};
use object::ReadCacheOps;

use super::{
    code, confined,
    elf::{Elf, Function, Symbols},
    go,
    lease::{Key, Lease, Leases},
    library,
    mappings::{Mapping, Mappings},
    orphans::Orphans,
    rustls::{self, Protectors, Rustls},
    uprobe::{self, Link, Place, Program},
};
use crate::coverage::{Coverage, Found, Library, Reason, View};

/// Most files that are remembered.
const MAX_FILES: usize = 16_384;
/// Longest time between two looks at whether the agent ends.
const TURN: Duration = Duration::from_millis(100);
/// Most threads that detach at the end.
const DETACHERS: usize = 32;
/// Time between two looks at which processes there are: forked ones map nothing new.
const CENSUS: Duration = Duration::from_secs(5);

/// Functions to probe: symbol and what it is. See [`functions`] for the first four.
const FUNCTIONS: [(&str, u64); 16] = [
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
    ("PR_Read", Op::READ_ANY),
    ("PR_Recv", Op::READ_ANY),
    ("PR_Write", Op::WRITE_ANY),
    ("PR_Send", Op::WRITE_ANY),
    ("PR_Writev", Op::WRITEV_ANY),
    ("PR_Close", Op::FREE),
];
/// Tells where a session keeps its client random.
const CLIENT_RANDOM: &str = "SSL_get_client_random";
/// What ALPN chose.
const ALPN: &str = "SSL_get0_alpn_selected";
/// The other end's certificate: the first of these that does the work itself.
const CERTIFICATE: [&str; 3] = ["SSL_get0_peer_certificate", "SSL_get1_peer_certificate", "SSL_get_peer_certificate"];
/// Parts of the names of libraries that are worth a look inside; executables always are.
const NAMES: [&str; 7] = ["ssl", "tls", "node", "crypto", "nspr", "libjvm", "s2n"];
/// Folders whose libraries are probed before anybody uses them.
const FOLDERS: [&str; 6] =
    ["/lib/x86_64-linux-gnu", "/lib/aarch64-linux-gnu", "/usr/lib64", "/lib64", "/usr/lib", "/usr/local/lib"];
/// Starts of the names of those libraries.
const WELL_KNOWN: [&str; 3] = ["libssl.so", "libgnutls.so", "libnspr4.so"];
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
    /// Of Go: at entries and the ends of handshakes, at the returns of reads, at writes.
    pub go: Option<[Program; 3]>,
    /// Of rustls.
    pub rustls: Option<Rustls>,
    /// Layouts of sessions, by number.
    pub layouts: Option<Array<MapData, Layout>>,
}

/// Probes that do nothing, while this lives.
#[derive(Debug)]
pub struct Empty {
    _links: Vec<Link>,
}

/// Probes `files` where the agent would, with programs that do nothing: what so many probes cost by themselves, to hold
/// the agent's own against.
///
/// # Errors
/// One cannot be read, has no TLS inside, or the kernel refuses.
pub fn attach_empty(files: &[PathBuf]) -> anyhow::Result<Empty> {
    let way = uprobe::offered().map_err(anyhow::Error::msg)?;
    let empty = || uprobe::empty(way);
    let programs = Programs {
        enter: empty()?,
        read: empty()?,
        write: empty()?,
        go: Some([empty()?, empty()?, empty()?]),
        rustls: Some(Rustls { programs: [empty()?, empty()?, empty()?], used: None }),
        layouts: None,
    };
    let mut finder = Finder::new(Some(programs), Reason::NoProbes, Arc::default());
    let mut links = Vec::new();
    for path in files {
        let file = File::open(path)?;
        let looked = finder.probe(&file, path)?;
        anyhow::ensure!(!looked.links.is_empty(), "{} is not probed: {:?}", path.display(), looked.found);
        links.extend(looked.links);
    }
    Ok(Empty { _links: links })
}

/// The probes and who finds them. Detached when it is dropped.
pub struct Tls {
    over: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Tls {
    /// Probes what is there and goes on with what comes. Without `programs` it only looks.
    pub fn start(programs: Option<Programs>, orphans: Option<Orphans>, coverage: Arc<Mutex<Coverage>>) -> Self {
        // Before the scan: nothing may come between the two.
        let mappings = Mappings::open();
        let mut finder = Finder::new(programs, Reason::NoProbes, coverage);
        finder.ends_confined = finder.programs.as_ref().is_some_and(|p| confined::ends_confined(&p.read));
        finder.orphans = orphans;
        finder.leases = Leases::start().map_err(|e| log::warn!("files are probed without a lease: {e}")).ok();
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

/// Whose TLS an agent with the right privileges would read: a look that attaches nothing.
#[must_use]
pub fn look() -> View {
    let coverage = Arc::<Mutex<Coverage>>::default();
    let mut finder = Finder::new(None, Reason::NoProbes, coverage.clone());
    finder.would_be_read = true;
    finder.scan();
    let pids: Vec<u32> = processes().collect();
    for pid in pids {
        if finder.coverage().is_unexplained(pid) {
            finder.puzzle(pid);
        }
    }
    finder.coverage().view()
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

/// A file that was looked at, with its probes.
#[derive(Default)]
struct Looked {
    found: Vec<Found>,
    links: Vec<Link>,
    lease: Option<Lease>,
    /// Time of the last change and bytes: the number of a file that is gone may be another's.
    state: (i64, i64, u64),
}

struct Finder {
    programs: Option<Programs>,
    /// What stands in the way when there are no programs.
    without: Reason,
    /// Nothing is probed, and what would be is reported as read.
    would_be_read: bool,
    /// Probed returns end confined processes: only Go's, whose returns are probed like entries, are.
    ends_confined: bool,
    files: HashMap<Key, Looked>,
    /// What the texts of executables say.
    texts: HashMap<Key, Option<Found>>,
    next_layout: u32,
    coverage: Arc<Mutex<Coverage>>,
    orphans: Option<Orphans>,
    leases: Option<Leases>,
    next_census: Instant,
}

impl Finder {
    fn new(programs: Option<Programs>, without: Reason, coverage: Arc<Mutex<Coverage>>) -> Self {
        Self {
            programs,
            without,
            would_be_read: false,
            ends_confined: false,
            files: HashMap::new(),
            texts: HashMap::new(),
            next_layout: 0,
            coverage,
            orphans: None,
            leases: None,
            next_census: Instant::now() + CENSUS,
        }
    }

    fn coverage(&self) -> MutexGuard<'_, Coverage> {
        self.coverage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks at well-known libraries and at all processes.
    fn scan(&mut self) {
        for folder in FOLDERS {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                let name = entry.file_name();
                if WELL_KNOWN.iter().any(|start| name.to_string_lossy().starts_with(start)) {
                    // One that cannot be opened is nobody's so far.
                    let _ = self.look(&entry.path());
                }
            }
        }
        for path in EXECUTABLES {
            let _ = self.look(Path::new(path));
        }
        for pid in processes() {
            self.process(pid);
        }
    }

    /// Which processes are there? New ones are looked at, those that are gone forgotten.
    fn census(&mut self) {
        self.next_census = Instant::now() + CENSUS;
        let there: HashSet<u32> = processes().collect();
        let mut closed = 0;
        for pid in &there {
            if !self.coverage().knows(*pid) {
                closed += u64::from(!self.process(*pid));
            }
        }
        self.coverage().retain(|pid| there.contains(&pid), closed);
        if let Some(orphans) = &mut self.orphans {
            orphans.remove(|pid| there.contains(&pid));
        }
    }

    /// Looks at what a process maps. False when it may not be looked at.
    fn process(&mut self, pid: u32) -> bool {
        if pid == std::process::id() {
            return true;
        }
        let exe = match fs::read_link(format!("/proc/{pid}/exe")) {
            Ok(exe) => exe,
            // A thread of the kernel, or gone.
            Err(e) => return e.kind() != io::ErrorKind::PermissionDenied,
        };
        self.executable(pid, &exe);
        let Ok(maps) = fs::read_to_string(format!("/proc/{pid}/maps")) else { return true };
        for line in maps.lines() {
            // address perms offset dev inode path
            let mut fields = line.splitn(6, ' ');
            let range = fields.next().unwrap_or_default();
            if !fields.next().is_some_and(|p| p.contains('x')) {
                continue;
            }
            if let Some(path) = fields.nth(3).map(str::trim_start).filter(|p| p.starts_with('/') && is_likely(p)) {
                self.library(pid, path, Some(range));
            }
        }
        true
    }

    /// A process runs a file.
    fn executable(&mut self, pid: u32, exe: &Path) {
        let name = exe.to_string_lossy();
        self.coverage().runs(pid, name.trim_end_matches(" (deleted)"));
        for found in self.look(Path::new(&format!("/proc/{pid}/exe"))).unwrap_or_default() {
            self.coverage().found(pid, &found);
        }
    }

    /// A process maps a file, at `range` where that is known.
    fn library(&mut self, pid: u32, path: &str, range: Option<&str>) {
        let (name, deleted) = path.strip_suffix(" (deleted)").map_or((path, false), |name| (name, true));
        // A file that was replaced is another one now; the mapping leads to the one that is mapped.
        let at = match range {
            Some(range) if deleted => PathBuf::from(format!("/proc/{pid}/map_files/{range}")),
            _ => inside(pid, name),
        };
        let not_read = match self.look(&at) {
            Ok(all) if !all.is_empty() => {
                for found in all {
                    self.coverage().found(pid, &found);
                }
                return;
            }
            Ok(_) => library::not_read(name.as_ref(), Reason::UnknownVersion),
            Err(_) if Path::new(&format!("/proc/{pid}")).exists() => {
                library::not_read(name.as_ref(), Reason::Unreadable)
            }
            Err(_) => None,
        };
        if let Some(found) = not_read.or_else(|| library::by_name(name.as_ref())) {
            self.coverage().found(pid, &found);
        }
    }

    /// A process has TLS connections, and none of its files explains them.
    fn puzzle(&mut self, pid: u32) {
        if !self.coverage().is_unexplained(pid) {
            return;
        }
        if !self.coverage().is_named(pid) {
            self.process(pid);
        }
        let path = format!("/proc/{pid}/exe");
        let Ok(file) = File::open(&path) else { return };
        let Ok(meta) = file.metadata() else { return };
        if !self.coverage().is_unexplained(pid) || self.texts.len() >= MAX_FILES {
            return;
        }
        let found = self.texts.entry(identity(&file, &meta)).or_insert_with(|| library::by_text(&file)).clone();
        if let Some(found) = found {
            self.coverage().found(pid, &found);
        }
    }

    /// Probes a file, once, and tells what it is.
    fn look(&mut self, path: &Path) -> io::Result<Vec<Found>> {
        let file = File::open(path)?;
        let meta = file.metadata()?;
        if !meta.is_file() {
            return Ok(Vec::new());
        }
        let key = identity(&file, &meta);
        for broken in self.leases.iter().flat_map(Leases::broken) {
            self.files.remove(&broken);
        }
        let state = (meta.ctime(), meta.ctime_nsec(), meta.size());
        if let Some(looked) = self.files.get(&key)
            && (looked.state == state || !looked.links.is_empty() || looked.lease.is_some())
        {
            return Ok(looked.found.clone());
        }
        if self.files.len() >= MAX_FILES {
            log::warn!("{} is not looked at for TLS: {MAX_FILES} files were", path.display());
            return Ok(library::not_read(path, Reason::TooManyFiles).into_iter().collect());
        }
        // Before it is read. One that is being written is looked at when it is mapped again.
        let lease = self.leases.as_ref().map(|leases| leases.take(&file, key)).transpose()?.flatten();
        let mut looked = self.probe(&file, path).unwrap_or_else(|e| {
            log::debug!("{} is not probed: {e:#}", path.display());
            Looked::default()
        });
        looked.state = state;
        if !looked.links.is_empty()
            && let Some(lease) = lease
        {
            lease.keep(std::mem::take(&mut looked.links));
            looked.lease = Some(lease);
        }
        let found = looked.found.clone();
        for Found { library, .. } in found.iter().filter(|f| f.reason.is_none() && self.programs.is_some()) {
            log::debug!("TLS of {} is read: {}", path.display(), library.name());
        }
        self.files.insert(key, looked);
        Ok(found)
    }

    fn probe(&mut self, file: &File, path: &Path) -> anyhow::Result<Looked> {
        if let Some(looked) = self.probe_go(file, path) {
            return Ok(looked);
        }
        let elf = Elf::new(file);
        let mut wanted: Vec<&'static str> = FUNCTIONS.iter().map(|(name, _)| *name).collect();
        wanted.extend([CLIENT_RANDOM, ALPN]);
        wanted.extend(CERTIFICATE);
        wanted.extend(library::MARKS.map(|(name, _)| name));
        let symbols = elf.symbols(&wanted)?;
        let mut looked = self.probe_rustls(file, path, &symbols.protectors);
        let Some(library) = library::by_functions(&symbols) else { return Ok(looked) };
        let layout = layout(&symbols, &elf);
        let number = self.layout(layout);
        let [entries, reads, writes] = places(&functions(&symbols, &elf), number);
        // The returns first: a return without its entry is nothing, an entry without its return would wait.
        let mut links = Vec::new();
        let mut reason = (!self.would_be_read).then_some(self.without);
        if self.ends_confined {
            reason = Some(Reason::EndsConfined);
        } else if let Some(programs) = &self.programs {
            reason = None;
            for (program, places, at_return) in
                [(&programs.read, reads, true), (&programs.write, writes, true), (&programs.enter, entries, false)]
            {
                if places.is_empty() {
                    continue;
                }
                match uprobe::attach(program, file, &places, at_return) {
                    Ok(link) => links.push(link),
                    Err(e) => {
                        log::warn!("TLS of {} is not read: the kernel refused the probes: {e}", path.display());
                        reason = Some(Reason::Refused);
                        links.clear();
                        break;
                    }
                }
            }
        }
        let version = library::version(file, path, library);
        looked.found.push(Found { library, version, reason });
        looked.links.extend(links);
        Ok(looked)
    }

    /// Probes the functions of rustls that are in a file.
    fn probe_rustls(&mut self, file: &File, path: &Path, protectors: &Protectors) -> Looked {
        let mut looked = Looked::default();
        if protectors.is_empty() {
            return looked;
        }
        let version = library::version(file, path, Library::Rustls);
        let mut reason = rustls::uncovered(version.as_deref());
        if reason.is_none() && self.ends_confined {
            reason = Some(Reason::EndsConfined);
        }
        if reason.is_none() && !self.would_be_read {
            reason = match self.programs.as_mut().map(|programs| programs.rustls.as_mut()) {
                None => Some(self.without),
                Some(None) => Some(Reason::Refused),
                Some(Some(rustls)) => match rustls.attach(file, protectors) {
                    Ok(links) => {
                        looked.links = links;
                        None
                    }
                    Err(e) => {
                        log::warn!("TLS of {} is not read: the kernel refused the probes: {e}", path.display());
                        Some(Reason::Refused)
                    }
                },
            };
        }
        looked.found.push(Found { library: Library::Rustls, version, reason });
        looked
    }

    /// Probes a Go executable that has TLS inside.
    fn probe_go(&self, file: &File, path: &Path) -> Option<Looked> {
        let executable = go::Executable::open(file)?;
        let mut looked = Looked::default();
        let mut reason = (!self.would_be_read).then_some(self.without);
        match executable.places(file) {
            // C libraries that are linked in may still be there.
            Ok(None) => return None,
            Err(e) => {
                log::debug!("TLS of {} is not read: Go: {e}", path.display());
                reason = Some(Reason::UnknownVersion);
            }
            Ok(Some(places)) => {
                if let Some([enter, read, write]) = self.programs.as_ref().and_then(|p| p.go.as_ref()) {
                    reason = None;
                    // The returns first, as below.
                    for (program, places) in [(read, &places.read), (write, &places.write), (enter, &places.enter)] {
                        match uprobe::attach(program, file, places, false) {
                            Ok(link) => looked.links.push(link),
                            Err(e) => {
                                log::warn!("TLS of {} is not read: the kernel refused the probes: {e}", path.display());
                                reason = Some(Reason::Refused);
                                looked.links.clear();
                                break;
                            }
                        }
                    }
                }
            }
        }
        looked.found.push(Found { library: Library::Go, version: executable.version(file), reason });
        Some(looked)
    }

    /// Number of a layout; 0 stands for an unknown one.
    fn layout(&mut self, layout: Layout) -> u64 {
        if layout == Layout::default() {
            return 0;
        }
        let Some(layouts) = self.programs.as_mut().and_then(|p| p.layouts.as_mut()) else { return 0 };
        if self.next_layout as usize + 1 >= LAYOUTS {
            return 0;
        }
        self.next_layout += 1;
        match layouts.set(self.next_layout, layout, 0) {
            Ok(()) => u64::from(self.next_layout),
            Err(e) => {
                log::warn!("sessions on memory will not find their sockets: {e}");
                0
            }
        }
    }

    fn follow(mut self, mut mappings: Mappings, over: &AtomicBool) {
        while !over.load(Ordering::Relaxed) {
            let lost = mappings.wait(TURN, |Mapping { pid, path }| self.mapped(pid, &path));
            if lost {
                self.scan();
            }
            self.turn();
        }
    }

    /// A process maps a file that it may run.
    fn mapped(&mut self, pid: u32, path: &str) {
        let likely = is_likely(path);
        // An executable has a name of any kind.
        let exe = fs::read_link(format!("/proc/{pid}/exe"));
        match exe {
            Ok(exe) if exe == Path::new(path) => self.executable(pid, &exe),
            Ok(exe) if likely => {
                if !self.coverage().knows(pid) {
                    self.executable(pid, &exe);
                }
                self.library(pid, path, None);
            }
            // It is gone already, or may not be looked at: its library may be reached all the same.
            Err(_) if likely => self.library(pid, path, None),
            _ => {}
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
            self.turn();
        }
    }

    /// What is done beside.
    fn turn(&mut self) {
        let puzzles = self.coverage().puzzles();
        for pid in puzzles {
            self.puzzle(pid);
        }
        if Instant::now() >= self.next_census {
            self.census();
        }
    }
}

impl Drop for Finder {
    /// Detaches everything at once: for each link the kernel waits until no processor is inside of a probe, some tenths
    /// of a second on a busy machine, and waits for all of them as long as for one.
    fn drop(&mut self) {
        let probed = |l: &Looked| !l.links.is_empty() || l.lease.is_some();
        let mut probed: Vec<Looked> = self.files.drain().map(|(_, looked)| looked).filter(probed).collect();
        let share = probed.len().div_ceil(DETACHERS).max(1);
        std::thread::scope(|scope| {
            while !probed.is_empty() {
                let part = probed.split_off(probed.len() - probed.len().min(share));
                // Without a thread they are dropped here and now.
                let _ = std::thread::Builder::new().spawn_scoped(scope, move || drop(part));
            }
        });
    }
}

/// What a file is told apart by. The kernel probes the file below an overlay, of which each container has another view: the
/// same inode, on a device of the container's own. Probed once for each, every call would be seen as often. So the
/// device of such a file is when it was made, to the nanosecond, which all views say alike.
fn identity(file: &File, meta: &fs::Metadata) -> Key {
    const OVERLAY: libc::c_long = 0x794c_7630;
    // SAFETY: all zero is a valid value of this plain struct, and it outlives the call on a valid descriptor.
    let is_overlay = unsafe {
        let mut system: libc::statfs = std::mem::zeroed();
        libc::fstatfs(file.as_raw_fd(), &raw mut system) == 0 && system.f_type == OVERLAY
    };
    let made = meta.created().ok().and_then(|at| at.duration_since(SystemTime::UNIX_EPOCH).ok());
    match made {
        Some(made) if is_overlay => (u64::try_from(made.as_nanos()).unwrap_or(u64::MAX), meta.ino()),
        _ => (meta.dev(), meta.ino()),
    }
}

/// All processes.
fn processes() -> impl Iterator<Item = u32> {
    fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(|e| e.file_name().to_str()?.parse().ok())
}

/// Where the sessions of a library keep what is read of them, as its accessors tell.
fn layout<R: ReadCacheOps>(symbols: &Symbols, elf: &Elf<R>) -> Layout {
    let code = |name: &str| symbols.functions.get(name).map(|f| elf.code(*f));
    let random = code(CLIENT_RANDOM).and_then(code::random_layout).unwrap_or_default();
    let (alpn, alpn_len) = code(ALPN).and_then(code::alpn).unwrap_or_default();
    let certificate = CERTIFICATE.iter().find_map(|name| code(name).and_then(code::certificate)).unwrap_or_default();
    Layout { alpn, alpn_len, certificate, ..random }
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
            Op::READ | Op::READ_EX | Op::READ_LONG | Op::READ_INNER | Op::READ_ANY => all[1].push(place),
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
        assert_eq!((entries.len(), reads.len(), writes.len()), (16, 5, 8));
        assert_eq!(reads[0], Place { offset: 0, cookie: Op::READ | 3 << 8 });
    }

    #[test]
    fn libraries_by_their_names() {
        assert!(is_likely("/usr/lib/libssl.so.3") && is_likely("/x/_ssl.cpython-311.so"));
        assert!(!is_likely("/usr/lib/libc.so.6") && !is_likely("/opt/openssl/lib/libz.so"));
    }
}
