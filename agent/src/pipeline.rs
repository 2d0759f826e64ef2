//! Puts the parts together; the only file that imports them all.
//!
//! One thread reads the ring and takes each exchange through routes, endpoints and the exporter's
//! recorders: no locks and no queues on that way. Beside it: the recording's writer, the local socket,
//! the display, and the exporter's own threads. None of these can hold it up.

use std::{
    collections::{BTreeMap, HashSet},
    io::{IsTerminal as _, Write as _},
    path::PathBuf,
    sync::{
        Arc, Condvar, Mutex, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use crate::{
    aggregate::{Endpoints, Moved},
    config::{Config, Subject},
    conn::{Connections, Identity, Outside},
    detect::{Coverage, Engine},
    event,
    exchange::{Exchange, Origin, Peer, Side},
    export::{self, Changes, Exporter},
    identity::{
        self, Processes,
        ends::Ends,
        pods::{Pods, Source},
    },
    inventory::{self, Inventory, Keeper},
    kubernetes::Watches,
    local::Socket,
    openapi,
    params::ParamHasher,
    probe::{
        load::{Kernel, Wanted},
        ring::Reader,
    },
    proto::credential::Principals,
    recording::Recording,
    route::Routes,
    scrape::Scrape,
    stats::{self, Loss, Stats, Totals},
    table::{self, Cost, Lasting, Program, Snapshot, Style},
};
/// Records that are taken before the other work gets its turn.
const BATCH: usize = 65_536;
/// Time between two looks at counters, sweeps and the like.
const HOUSEKEEPING: Duration = Duration::from_millis(200);
/// Time between two looks whether the processes that are left alone are gone.
const PROCESS_LOOK: Duration = Duration::from_secs(2);
/// Exchanges under way that a snapshot names.
const MAX_LASTING: usize = 100;
/// Time between two savings of what was learned.
const KEEP: Duration = Duration::from_secs(300);
/// Longest time that the last records are waited for at the end.
const LAST_DRAIN: Duration = Duration::from_secs(3);
/// Longest time that the collector is waited for at the end.
const LAST_EXPORT: Duration = Duration::from_secs(8);
/// Time between two savings of what detectors have learned.
const SAVE: Duration = Duration::from_secs(900);
/// Time between two looks at what detectors cover.
const COVERAGE: Duration = Duration::from_secs(15);
/// Time between two looks at what became of the inventory, which is when its file is written.
const INVENTORY: Duration = Duration::from_secs(60);
/// Time until the first one.
const FIRST_LOOK: Duration = Duration::from_secs(10);
/// Most renamed routes that wait for it; entries of later ones keep their old names.
const MAX_MOVES: usize = 20_000;
/// Most connections that the kernel side is told to leave out at once; the others are told later.
const MAX_UNWANTED: usize = 1_024;
/// What the kernel needs for one connection's state, bytes: the value and its bookkeeping.
const STATE_BYTES: u64 = 512;

/// What `run` is asked to do.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// The configuration with flags applied.
    pub config: Config,
    /// Where to record exchanges.
    pub exchanges: Option<PathBuf>,
    /// Output for scripts.
    pub json: bool,
    /// Show nothing but the totals at the end.
    pub quiet: bool,
    /// End after this time.
    pub duration: Option<Duration>,
    /// The socket was named by the operator: failing to make it is an error.
    pub socket_named: bool,
}

/// What is shared with the threads beside.
#[derive(Default)]
struct Shared {
    wanted: AtomicBool,
    /// The last snapshot and its number.
    latest: Mutex<(u64, Arc<Snapshot>)>,
    made: Condvar,
    over: AtomicBool,
    /// The list of earlier runs.
    keeper: Mutex<Keeper>,
    /// Routes that were renamed since it was asked last.
    moves: Mutex<Vec<Moved>>,
}

/// Signals received; the second one ends at once.
static SIGNALS: AtomicUsize = AtomicUsize::new(0);

extern "C" fn on_signal(_: libc::c_int) {
    if SIGNALS.fetch_add(1, Ordering::Relaxed) > 0 {
        // SAFETY: async-signal-safe; the kernel detaches everything of a process that is gone.
        unsafe { libc::_exit(130) };
    }
}

/// Runs the agent until a signal. The totals are those of the whole run.
///
/// # Errors
/// The kernel or the privileges lack something, a file cannot be made, another agent is there.
pub fn run(options: &Options) -> anyhow::Result<Totals> {
    for signal in [libc::SIGINT, libc::SIGTERM] {
        let handler = on_signal as extern "C" fn(libc::c_int);
        // SAFETY: the handler touches atomics alone.
        unsafe { libc::signal(signal, handler as libc::sighandler_t) };
    }
    let stats = Arc::new(Stats::default());
    let config = &options.config;
    let keeper = Mutex::new(Keeper::open(config.inventory.file.as_deref()));
    let shared = Arc::new(Shared { keeper, ..Shared::default() });
    let recording = match &options.exchanges {
        Some(path) => Some(Recording::start(path, config.capture.path.into(), stats.clone())?),
        None => None,
    };
    let exporter = Exporter::start(stats.clone())?;
    let principals = principals(config);
    let socket = match Socket::bind(&config.agent.socket) {
        Ok(socket) => Some(socket.with_stats(stats.clone())),
        Err(e) if options.socket_named || e.to_string().starts_with("another agent") => return Err(e),
        Err(e) => {
            log::warn!("{e:#}: `apiscope top` will not find this agent");
            None
        }
    };
    let _scrape = config.agent.metrics.map(|at| Scrape::start(at, stats.clone())).transpose()?;
    let wanted = Wanted {
        server: config.capture.sides.has(Side::Server),
        client: config.capture.sides.has(Side::Client),
        ring_bytes: config.limits.ring_bytes,
        door: config.capture.door,
    };
    let (kernel, reader) = Kernel::start(wanted, &stats.coverage)?;
    stats::return_memory();
    log::info!("every probe is attached");
    let pods = Arc::default();
    let watches = Watches::start(&config.kubernetes, Arc::clone(&pods), stats.clone())?;
    let ends = watches.is_some().then_some(pods);
    let changes = exporter.as_ref().map(Exporter::changes);
    let mut capture = Capture::new(options, stats.clone(), shared.clone(), kernel, recording, exporter, principals)?;
    capture.inner.ends = ends.map(|pods: Arc<RwLock<Pods>>| {
        let sources = if config.kubernetes.peers { &Source::ALL[..] } else { &Source::ALL[..1] };
        Ends::new(pods, stats.clone()).starting(sources, wall())
    });
    stats.ready.store(true, Ordering::Relaxed);
    let socket_path = socket.as_ref().map(|s| s.path().to_owned());
    std::thread::scope(|scope| -> anyhow::Result<()> {
        if let Some(socket) = &socket {
            let shared = shared.clone();
            std::thread::Builder::new().name("local".into()).spawn_scoped(scope, move || {
                socket.serve(
                    || serde_json::to_string(&*shared.fresh()?).ok(),
                    || serde_json::to_string(&shared.inventory(&*shared.fresh()?)).ok(),
                    || shared.over.load(Ordering::Relaxed),
                );
            })?;
        }
        if config.inventory.file.is_some() || changes.is_some() || log::log_enabled!(log::Level::Info) {
            let shared = shared.clone();
            std::thread::Builder::new()
                .name("inventory".into())
                .spawn_scoped(scope, move || keep(&shared, changes.as_ref()))?;
        }
        let shows = !options.quiet && options.exchanges.as_deref() != Some(std::path::Path::new("-"));
        if shows {
            let shared = shared.clone();
            std::thread::Builder::new()
                .name("display".into())
                .spawn_scoped(scope, move || display(options, &shared))?;
        }
        capture.work(reader);
        shared.over.store(true, Ordering::Relaxed);
        shared.made.notify_all();
        if let Some(path) = &socket_path {
            // Wakes the thread at the socket.
            let _ = std::os::unix::net::UnixStream::connect(path);
        }
        Ok(())
    })?;
    capture.finish()?;
    Ok(stats.totals())
}

/// What names principals. An agent that cannot keep a key works with one for this run.
fn principals(config: &Config) -> Principals {
    let identity = &config.identity;
    Principals::load(&identity.key_file, &identity.api_key_headers, &identity.api_key_query).unwrap_or_else(|e| {
        log::warn!("{e:#}: principals have a key of this run only, and other names after it");
        let mut key = zeroize::Zeroizing::new([0; 32]);
        let random = std::fs::File::open("/dev/urandom").and_then(|mut f| std::io::Read::read_exact(&mut f, &mut *key));
        let made = random
            .map_err(Into::into)
            .and_then(|()| Principals::new(&*key, &identity.api_key_headers, &identity.api_key_query));
        made.unwrap_or_default()
    })
}

impl Shared {
    /// A snapshot that is made now; `None` when the capture does not come to it in time.
    fn fresh(&self) -> Option<Arc<Snapshot>> {
        let latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        let before = latest.0;
        self.wanted.store(true, Ordering::Relaxed);
        let (latest, _) = self
            .made
            .wait_timeout_while(latest, Duration::from_secs(2), |l| l.0 == before && !self.over.load(Ordering::Relaxed))
            .unwrap_or_else(PoisonError::into_inner);
        (latest.0 != before).then(|| latest.1.clone())
    }

    /// All that is known, earlier runs included.
    fn inventory(&self, snapshot: &Snapshot) -> Inventory {
        let moves = std::mem::take(&mut *self.moves.lock().unwrap_or_else(PoisonError::into_inner));
        let mut keeper = self.keeper.lock().unwrap_or_else(PoisonError::into_inner);
        keeper.now(&snapshot.endpoints, &moves, snapshot.now)
    }
}

/// Says what became of the endpoints and writes their list, until the end and once more then.
fn keep(shared: &Shared, exported: Option<&Changes>) {
    let (mut next, mut failed) = (Instant::now() + FIRST_LOOK, false);
    loop {
        let over = shared.over.load(Ordering::Relaxed);
        if !over && Instant::now() < next {
            std::thread::sleep(Duration::from_millis(50));
            continue;
        }
        next = Instant::now() + INVENTORY;
        let last = || Some(shared.latest.lock().unwrap_or_else(PoisonError::into_inner).1.clone());
        if let Some(snapshot) = if over { last() } else { shared.fresh() } {
            let inventory = shared.inventory(&snapshot);
            let mut keeper = shared.keeper.lock().unwrap_or_else(PoisonError::into_inner);
            for change in keeper.changes(&inventory) {
                if let Some(exported) = exported {
                    exported.add(&change);
                }
                let inventory::Change { event, service, method, route, what, .. } = change;
                log::info!("{event} {service:?} {method:?} {route:?}: {what:?}");
            }
            let saved = keeper.save(&inventory);
            match &saved {
                Err(e) if !failed => log::warn!("{e:#}: tried again every {} s", INVENTORY.as_secs()),
                Ok(()) if failed => log::info!("the inventory is written again"),
                _ => {}
            }
            failed = saved.is_err();
        }
        if over {
            return;
        }
    }
}

/// Shows the endpoints until the end.
fn display(options: &Options, shared: &Shared) {
    // With a collector the numbers go there.
    if export::is_configured() && !options.json {
        return;
    }
    let terminal = std::io::stdout().is_terminal() && !options.json;
    let pause = if terminal { Duration::from_secs(1) } else { Duration::from_secs(options.config.agent.interval_s) };
    let colour = terminal && std::env::var_os("NO_COLOR").is_none();
    let mut next = Instant::now() + if terminal { Duration::ZERO } else { pause };
    while !shared.over.load(Ordering::Relaxed) {
        if Instant::now() < next {
            std::thread::sleep(Duration::from_millis(50));
            continue;
        }
        next = Instant::now() + pause;
        let Some(snapshot) = shared.fresh() else { continue };
        let text = if terminal {
            let (width, height) = terminal_size();
            // Home, then the table, then clear what is below: no flicker.
            format!("\x1b[H\x1b[J{}", table::table(&snapshot, Style { colour, width, height }))
        } else if options.json {
            table::json_lines(&snapshot)
        } else {
            table::lines(&snapshot)
        };
        let mut out = std::io::stdout().lock();
        if out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_err() {
            // Nobody reads any more.
            return;
        }
    }
}

/// Columns and lines of the terminal.
#[must_use]
pub fn terminal_size() -> (usize, usize) {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the call fills the struct that it gets.
    let known = unsafe { libc::ioctl(libc::STDOUT_FILENO, libc::TIOCGWINSZ, &raw mut size) } == 0;
    if known && size.ws_col > 0 { (size.ws_col.into(), size.ws_row.into()) } else { (120, 40) }
}

/// The capture thread's own state.
struct Capture {
    connections: Connections,
    inner: Inner,
    kernel: Kernel,
    shared: Arc<Shared>,
    started: Instant,
    /// When what was learned was kept last.
    kept: Instant,
    deadline: Option<Instant>,
    next_save: Option<Instant>,
    /// When to look again whether processes are gone.
    next_look: Instant,
}

/// What the connection table asks and tells.
struct Inner {
    config: Config,
    processes: Processes,
    /// Names pods, where there is an API server to tell them.
    ends: Option<Ends>,
    routes: Routes,
    endpoints: Endpoints,
    detectors: Option<Engine>,
    params: ParamHasher,
    /// What detectors cover, and when that was worked out: it is much text that changes slowly.
    coverage: (Option<Instant>, Arc<Vec<Coverage>>),
    exporter: Option<Exporter>,
    recording: Option<Recording>,
    stats: Arc<Stats>,
    /// Processes that the kernel side is to leave alone from now on.
    excluded: Vec<u32>,
    /// Connections of these that send records still.
    unwanted: Vec<u64>,
    /// Those that it leaves alone.
    left_alone: HashSet<u32>,
    shared: Arc<Shared>,
}

impl Capture {
    fn new(
        options: &Options,
        stats: Arc<Stats>,
        shared: Arc<Shared>,
        kernel: Kernel,
        recording: Option<Recording>,
        exporter: Option<Exporter>,
        principals: Principals,
    ) -> anyhow::Result<Self> {
        let config = options.config.clone();
        let mut detectors = config.detect.enabled.then(|| Engine::new(&config.detect)).transpose()?;
        if let (Some(detectors), Some(file)) = (&mut detectors, &config.detect.state_file)
            && let Ok(text) = std::fs::read(file)
        {
            match serde_json::from_slice(&text) {
                Ok(learned) => match detectors.load(learned) {
                    Ok(n) => log::info!("{n} endpoints are known from before"),
                    Err(e) => log::warn!("the baselines in {} are not taken: {e}: they begin anew", file.display()),
                },
                Err(e) => log::warn!("the baselines in {} are not understood: {e}: they begin anew", file.display()),
            }
        }
        let params = ParamHasher::new(principals.param_key());
        let mut routes = openapi::routes(&config.routes)?;
        if let Some(file) = &config.routes.state_file {
            routes.restore(file)?;
        }
        Ok(Self {
            connections: Connections::new(epoch(), stats.clone()).with_principals(principals),
            inner: Inner {
                processes: Processes::default(),
                ends: None,
                routes,
                endpoints: Endpoints::new(config.limits.endpoints, exporter.as_ref().map(Exporter::sink)),
                detectors,
                params,
                coverage: Default::default(),
                exporter,
                recording,
                stats,
                excluded: Vec::new(),
                unwanted: Vec::new(),
                left_alone: HashSet::new(),
                shared: shared.clone(),
                config,
            },
            kernel,
            shared,
            started: Instant::now(),
            kept: Instant::now(),
            deadline: options.duration.map(|d| Instant::now() + d),
            next_save: None,
            next_look: Instant::now(),
        })
    }

    /// Reads until a signal or the deadline, then what is left.
    fn work(&mut self, mut reader: Reader) {
        for rule in self.inner.config.capture.exclude.clone() {
            match (rule.port, rule.pid) {
                (Some(port), None)
                    if rule.exe.is_none() && rule.name.is_none() && rule.address.is_none() && rule.side.is_none() =>
                {
                    let fits = self.kernel.exclude_port(port);
                    if !fits {
                        log::warn!("port {port} is traced and then left out: the kernel side's table is full");
                    }
                }
                (None, Some(pid)) if rule.is_about_process() && rule.exe.is_none() && rule.name.is_none() => {
                    self.inner.excluded.push(pid);
                }
                _ => {}
            }
        }
        self.leave_alone();
        let mut next_work = Instant::now();
        let mut over: Option<Instant> = None;
        loop {
            let (connections, inner) = (&mut self.connections, &mut self.inner);
            let n = reader.drain(BATCH, |record| match event::parse(record) {
                Ok(event) => connections.handle(event, inner),
                Err(e) => {
                    log::debug!("{e}");
                    inner.stats.lose(Loss::BadRecord, 1);
                }
            });
            for id in self.inner.unwanted.drain(..) {
                self.kernel.exclude_connection(id);
            }
            let now = Instant::now();
            if now >= next_work {
                next_work = now + HOUSEKEEPING;
                self.housekeeping();
            }
            if self.shared.wanted.swap(false, Ordering::Relaxed) {
                self.publish();
            }
            let ends = SIGNALS.load(Ordering::Relaxed) > 0 || self.deadline.is_some_and(|d| now >= d);
            match over {
                // What was in the ring when the end came is read still.
                Some(since) if n == 0 || since.elapsed() > LAST_DRAIN => break,
                None if ends => over = Some(now),
                _ if n < BATCH / 2 => reader.rest(),
                _ => {}
            }
        }
        self.connections.flush(&mut self.inner);
        for exchange in self.inner.ends.as_mut().map(Ends::flush).unwrap_or_default() {
            self.inner.take(&exchange);
        }
        self.housekeeping();
        self.keep();
        self.publish();
    }

    fn housekeeping(&mut self) {
        if self.kept.elapsed() > KEEP {
            self.keep();
        }
        self.inner.stats.beat();
        self.kernel.log();
        self.kernel.report(&self.inner.stats);
        let stats = &self.inner.stats;
        stats.connections.store(self.connections.len() as u64, Ordering::Relaxed);
        stats.streams.store(self.connections.open_streams() as u64, Ordering::Relaxed);
        self.connections.sweep(monotonic(), &mut self.inner);
        for exchange in self.inner.ends.as_mut().map(|e| e.due(wall())).unwrap_or_default() {
            self.inner.take(&exchange);
        }
        self.leave_alone();
        if let Some(recording) = &mut self.inner.recording {
            recording.flush();
        }
        if let Some(detectors) = &mut self.inner.detectors {
            detectors.tick((epoch() + monotonic()) / 1_000_000_000);
            for event in detectors.findings().drain() {
                log::info!("finding {:?}: {} {}", event.change, event.finding.rule, event.finding.explanation);
                if let Some(exporter) = &self.inner.exporter {
                    exporter.finding(&event);
                }
            }
            for (counter, n) in self.inner.stats.findings_open.iter().zip(detectors.findings().open()) {
                counter.store(n, Ordering::Relaxed);
            }
            if let Some(file) = &self.inner.config.detect.state_file
                && self.next_save.is_none_or(|at| Instant::now() >= at)
            {
                if self.next_save.is_some() {
                    save(file, &detectors.save());
                }
                self.next_save = Some(Instant::now() + SAVE);
            }
        }
    }

    /// Tells the kernel side which processes the rules leave out, and which of them are gone: their numbers
    /// come back for others. One that finds the table full costs more, and is left out all the same.
    fn leave_alone(&mut self) {
        let now = Instant::now();
        if now >= self.next_look {
            self.next_look = now + PROCESS_LOOK;
            self.kernel.forget_messages(|id| self.connections.knows(id));
            let kernel = &mut self.kernel;
            self.inner.left_alone.retain(|&pid| {
                let gone = identity::is_gone(pid);
                if gone {
                    kernel.forget_pid(pid);
                }
                !gone
            });
        }
        for pid in std::mem::take(&mut self.inner.excluded) {
            if !self.inner.left_alone.contains(&pid) && self.kernel.exclude_pid(pid) {
                self.inner.left_alone.insert(pid);
            }
        }
    }

    fn publish(&mut self) {
        self.kernel.report(&self.inner.stats);
        let inner = &mut self.inner;
        if let Some(detectors) = &inner.detectors
            && inner.coverage.0.is_none_or(|at| at.elapsed() > COVERAGE)
        {
            inner.coverage = (Some(Instant::now()), Arc::new(detectors.coverage()));
        }
        let (live, lasting) = lasting(&self.connections, &mut inner.routes);
        let now = epoch() + monotonic();
        let (cpu_s, rss_bytes) = stats::usage();
        let snapshot = Snapshot {
            version: env!("CARGO_PKG_VERSION").into(),
            ready: self.inner.stats.ready.load(Ordering::Relaxed),
            door: self.kernel.door().name().into(),
            uptime_s: self.started.elapsed().as_secs(),
            now,
            totals: self.inner.stats.totals(),
            cost: Cost {
                cpu_s,
                rss_bytes,
                map_bytes: self.connections.len() as u64 * STATE_BYTES,
                programs: self
                    .kernel
                    .costs()
                    .map(|(name, runs, ns, verified)| Program { name, runs, ns, verified })
                    .collect(),
            },
            endpoints: self.inner.endpoints.view(now),
            overflowed: self.inner.endpoints.overflowed,
            live,
            lasting,
            findings: self.inner.detectors.as_ref().map(Engine::view).unwrap_or_default(),
            tls_coverage: self.inner.stats.coverage().view(),
            coverage: self.inner.coverage.1.clone(),
        };
        let mut latest = self.shared.latest.lock().unwrap_or_else(PoisonError::into_inner);
        *latest = (latest.0 + 1, Arc::new(snapshot));
        self.shared.made.notify_all();
    }

    /// Keeps what was learned; a file that cannot be written is said, and the agent goes on.
    fn keep(&mut self) {
        self.kept = Instant::now();
        if let Some(file) = &self.inner.config.routes.state_file
            && let Err(e) = self.inner.routes.save(file)
        {
            log::warn!("{e:#}");
        }
    }

    fn finish(self) -> anyhow::Result<()> {
        if let (Some(detectors), Some(file)) = (&self.inner.detectors, &self.inner.config.detect.state_file) {
            save(file, &detectors.save());
        }
        if let Some(exporter) = self.inner.exporter {
            exporter.shutdown(LAST_EXPORT);
        }
        match self.inner.recording {
            Some(recording) => recording.finish(),
            None => Ok(()),
        }
    }
}

/// What has lasted for more than a second: the oldest, and the number of each kind.
fn lasting(connections: &Connections, routes: &mut Routes) -> (Vec<Lasting>, BTreeMap<String, u64>) {
    let now = monotonic();
    let mut live = connections.live(now.saturating_sub(1_000_000_000));
    live.sort_by_key(|(_, _, l)| l.first_ts);
    let mut kinds: BTreeMap<String, u64> = BTreeMap::new();
    for (_, _, l) in &live {
        *kinds.entry(l.api.name().to_owned()).or_default() += 1;
    }
    live.truncate(MAX_LASTING);
    let rows = live.into_iter().map(|(service, side, l)| Lasting {
        side: side.name().into(),
        api: l.api.name().into(),
        service: service.to_string(),
        route: routes
            .current(&service, &l.method, l.path.as_deref().unwrap_or(crate::route::UNKNOWN))
            .template
            .to_string(),
        method: l.method.as_str().into(),
        age_ms: now.saturating_sub(l.first_ts) / 1_000_000,
        request_body_bytes: l.body[0],
        response_body_bytes: l.body[1],
        request_messages: l.messages[0],
        response_messages: l.messages[1],
    });
    (rows.collect(), kinds)
}

impl Outside for Inner {
    fn identify(&mut self, pid: u32, comm: &str, local: &Peer, remote: &Peer) -> Identity {
        let process = self.processes.get(pid, comm);
        let subject =
            Subject { exe: process.exe.as_deref().unwrap_or_default(), name: &process.name, pid, local, remote };
        let wanted = self.config.capture.wants(subject, None);
        if !wanted && self.config.capture.excludes_process(subject) {
            self.excluded.push(pid);
        }
        let rule = self.config.service.iter().find(|rule| rule.matches(subject));
        let (service, origin) = match rule {
            Some(rule) => {
                let origin = process.origin.map(|o| Arc::new(Origin { named: true, ..(*o).clone() }));
                (rule.name.as_str().into(), origin)
            }
            None => (process.service, process.origin),
        };
        Identity { service, exe: process.exe, origin, wanted }
    }

    fn exchange(&mut self, exchange: &mut Exchange) {
        // One that waits for the names of its ends comes later.
        if self.ends.as_mut().is_none_or(|ends| ends.name(exchange, wall())) {
            self.take(exchange);
        }
    }

    fn sealed(&mut self, pid: u32, read: bool, bytes: u64) {
        self.stats.coverage().ended(pid, read, bytes);
    }

    fn is_gone(&mut self, pid: u32) -> bool {
        identity::is_gone(pid)
    }

    fn unwanted(&mut self, id: u64) {
        if self.unwanted.len() < MAX_UNWANTED && self.unwanted.last() != Some(&id) {
            self.unwanted.push(id);
        }
    }
}

impl Inner {
    /// Moves the endpoints of services whose routes have other names now.
    fn reroute(&mut self) {
        for service in self.routes.changed() {
            let moves = self.endpoints.reroute(&service, |method, route| self.routes.current(&service, method, route));
            for moved in &moves {
                log::debug!("apiscope.route.merged {service} {} {} -> {}", moved.method, moved.from, moved.into);
                if let Some(exporter) = &self.exporter {
                    exporter.moved(moved);
                }
            }
            self.stats.routes_moved.fetch_add(moves.len() as u64, Ordering::Relaxed);
            let mut waiting = self.shared.moves.lock().unwrap_or_else(PoisonError::into_inner);
            let room = MAX_MOVES.saturating_sub(waiting.len());
            waiting.extend(moves.into_iter().take(room));
        }
    }

    /// Takes a finished exchange whose ends are named.
    fn take(&mut self, exchange: &Exchange) {
        let rules = &self.config.capture;
        if rules.exclude.iter().chain(&rules.include).any(|r| r.side.is_some()) {
            let (local, remote) = match exchange.side {
                Side::Server => (&exchange.server, &exchange.client),
                Side::Client => (&exchange.client, &exchange.server),
            };
            let exe = exchange.exe.as_deref().unwrap_or_default();
            let name = self.processes.name(exchange.pid).unwrap_or_else(|| exchange.service.clone());
            let subject = Subject { exe, name: &name, pid: exchange.pid, local, remote };
            if !rules.wants(subject, Some(exchange.side)) {
                return;
            }
        }
        self.stats.exchanges[usize::from(exchange.side == Side::Client)].fetch_add(1, Ordering::Relaxed);
        let route = self.routes.route(exchange);
        if self.routes.has_changed() {
            self.reroute();
        }
        let endpoint = self.endpoints.record(exchange, &route.template, route.source);
        if let (Some(detectors), Some(at)) = (&mut self.detectors, endpoint) {
            let params = self.params.params(exchange.path.as_deref().unwrap_or_default(), &route.template);
            detectors.observe(exchange, at, &route.template, &params);
        }
        if let Some(exporter) = &self.exporter {
            exporter.span(exchange, &route.template);
        }
        if let Some(recording) = &mut self.recording {
            recording.add(exchange, &route.template);
        }
    }
}

/// Writes what detectors have learned, beside the file and then in its place.
fn save(file: &std::path::Path, learned: &serde_json::Value) {
    let beside = file.with_extension("new");
    let folder = file.parent().filter(|f| !f.as_os_str().is_empty());
    let made = folder.map_or(Ok(()), std::fs::create_dir_all);
    let written = made.and_then(|()| {
        use std::os::unix::fs::OpenOptionsExt as _;
        let options = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&beside);
        options.and_then(|mut out| out.write_all(learned.to_string().as_bytes()))
    });
    if let Err(e) = written.and_then(|()| std::fs::rename(&beside, file)) {
        log::warn!("failed to keep the baselines in {}: {e}: they begin anew after a restart", file.display());
    }
}

/// Monotonic time, ns: the clock of `bpf_ktime_get_ns`.
fn monotonic() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call fills the struct that it gets.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    u64::try_from(time.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0)
}

/// Time since the epoch, ns.
fn wall() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(0)
}

/// What to add to a monotonic time to get time since the epoch, ns.
fn epoch() -> u64 {
    wall().saturating_sub(monotonic())
}
